"""Which peer is asked for which chunk, where several hold the same model. Pure: it moves no bytes."""

import heapq
from collections.abc import Iterable

from protocols.vocabulary import PeerId

MAX_ASKED = 2
"""Peers that one chunk is asked of at once, near the end."""


class ChunkQueue:
    """The chunks of one model that are still wanted.

    Each is asked of one peer, in order, fewer at a time towards the end. Once all have been asked for, whoever owes nothing
    more is given what another still owes, so that the slowest peer does not hold up the end; the first to bring a chunk
    wins.
    """

    def __init__(self, wanted: Iterable[int], num_peers: int) -> None:
        self._free = sorted(wanted)
        self._num_peers = num_peers
        self._owed: dict[int, list[PeerId]] = {}
        self._in_check: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether every chunk has come and was right."""
        return not (self._free or self._owed or self._in_check)

    def has_work(self, peer: PeerId) -> bool:
        """Whether `take` would give this peer something."""
        return bool(self._free) or self._late(peer) is not None

    def take(self, peer: PeerId, at_most: int) -> range:
        """Consecutive chunks to ask of this peer; it owes them from now on. Empty where there is nothing for it."""
        if not self._free:
            late = self._late(peer)
            taken = range(0) if late is None else range(late, late + 1)
        else:
            at_most = min(at_most, max(1, len(self._free) // (2 * self._num_peers)))
            first = end = self._free[0]
            while self._free and self._free[0] == end and end - first < at_most:
                heapq.heappop(self._free)
                end += 1
            taken = range(first, end)
        for index in taken:
            self._owed.setdefault(index, []).append(peer)
        return taken

    def bring(self, index: int) -> bool:
        """A chunk has come and is about to be checked. False where another peer was quicker."""
        if index not in self._owed:
            return False
        del self._owed[index]
        self._in_check.add(index)
        return True

    def settle(self, index: int, right: bool) -> None:
        """A chunk was checked; one that is wrong is wanted again."""
        self._in_check.remove(index)
        if not right:
            heapq.heappush(self._free, index)

    def drop(self, peer: PeerId) -> None:
        """Nothing more comes from this peer: what it owes is asked of others."""
        for index, asked in list(self._owed.items()):
            if peer in asked:
                asked.remove(peer)
                if not asked:
                    del self._owed[index]
                    heapq.heappush(self._free, index)

    def _late(self, peer: PeerId) -> int | None:
        """The chunk that will come last, of those that others owe; none for a peer that owes some itself."""
        if any(peer in asked for asked in self._owed.values()):
            return None
        for index, asked in reversed(self._owed.items()):
            if len(asked) < MAX_ASKED:
                return index
        return None
