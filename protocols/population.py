"""Everybody in a network, as far as a node knows: who is active, and in which order they are asked in a round.

Belongs here: the view of decentralised sampling (MoDeST and Plexus, arXiv 2302.13837) and the drawing of a sample from
it. A population is a join-semilattice of records that their owners signed, so that it does not matter in which order,
how often or from whom they come. Pure data: who is probed, and when, is decided in `protocols/sampling.py`.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from math import ceil

from protocols.signing import is_newer
from protocols.vocabulary import PeerId, PeerRecord

Order = Callable[[str, int, bytes], bytes]
"""(peer, round, beacon) -> what peers are sorted by in this round."""


def md5_order(peer: str, round_: int, beacon: bytes) -> bytes:
    """As the papers' code does. Who may choose its own id can be first in any round it likes."""
    return hashlib.md5(f"{peer}-{round_}".encode(), usedforsecurity=False).digest()


def beacon_order(peer: str, round_: int, beacon: bytes) -> bytes:
    """With the digest of an earlier aggregate mixed in, which nobody knew when ids were chosen."""
    return hashlib.sha256(b"covey order 1\0" + beacon + f"{peer}-{round_}".encode()).digest()


ORDERS: dict[str, Order] = {"beacon": beacon_order, "md5": md5_order}


class Population:
    """The records of one network's nodes, the newest of each.

    max_members: beyond it a newcomer takes the place of one that has left, or has not been active for a window; else it is
        not taken in.
    window: rounds without a sign of life after which a node is not active any more.
    """

    def __init__(self, me: PeerId, max_members: int, window: int, order: Order) -> None:
        self._me = me
        self._max_members = max_members
        self._window = window
        self._order = order
        self._records: dict[PeerId, PeerRecord] = {}
        self._pending: dict[PeerId, PeerRecord] = {}
        self._digests = [0] * BUCKETS

    def __len__(self) -> int:
        return len(self._records)

    def get(self, peer: PeerId) -> PeerRecord | None:
        return self._records.get(peer)

    def records(self) -> list[PeerRecord]:
        """By peer, so that it is the same wherever it is the same."""
        return [self._records[peer] for peer in sorted(self._records)]

    @property
    def digests(self) -> bytes:
        """One digest of 8 bytes for each bucket of peers: equal where the same are members, whenever they last gave a sign
        of life."""
        return b"".join(digest.to_bytes(8, "big") for digest in self._digests)

    def differing(self, digests: bytes) -> list[PeerRecord]:
        """The records in the buckets that are not the same there, by peer."""
        ours = self.digests
        wrong = {i for i in range(BUCKETS) if ours[8 * i : 8 * i + 8] != digests[8 * i : 8 * i + 8]}
        return [self._records[peer] for peer in sorted(self._records) if _bucket(peer) in wrong]

    def _flip(self, record: PeerRecord) -> None:
        said = f"{record.peer}\0{record.incarnation}\0{record.left}".encode()
        self._digests[_bucket(record.peer)] ^= int.from_bytes(hashlib.sha256(said).digest()[:8], "big")

    def take(self, record: PeerRecord, hold: bool = False) -> bool:
        """A genuine record. Whether it is news.

        hold: keep whoever comes or comes back aside until `fold`, so that a sample that is being drawn stays as it is
            (Plexus, section 5.5 of our notes: pending joins). Whoever leaves does so at once.
        """
        peer = PeerId(record.peer)
        known = self._pending.get(peer) or self._records.get(peer)
        if not is_newer(record, known):
            return False
        present = self._records.get(peer)
        joins = not record.left and (present is None or present.left)
        if joins and hold:
            if len(self._pending) >= self._max_members:
                return False
            self._pending[peer] = record
            return True
        self._pending.pop(peer, None)
        return self._put(peer, record)

    def fold(self) -> None:
        """Take in those who were held aside."""
        pending, self._pending = self._pending, {}
        for peer, record in pending.items():
            if is_newer(record, self._records.get(peer)):
                self._put(peer, record)

    def _put(self, peer: PeerId, record: PeerRecord) -> bool:
        present = self._records.get(peer)
        if present is None and len(self._records) >= self._max_members and not self._make_room(record.round):
            return False
        if present is not None:
            self._flip(present)
        self._flip(record)
        self._records[peer] = record
        return True

    def _make_room(self, round_: int) -> bool:
        """For one that gave a sign of life in this round."""
        others = (record for record in self._records.values() if record.peer != self._me)
        worst = min(others, key=lambda record: (not record.left, record.round), default=None)
        if worst is None or not (worst.left or worst.round < round_ - self._window):
            return False
        self._flip(self._records.pop(PeerId(worst.peer)))
        return True

    def active(self, round_: int) -> list[PeerId]:
        """Members with a sign of life within the window, sorted. This node is always one of them."""
        found = {
            peer
            for peer, record in self._records.items()
            if not record.left and record.round >= round_ - self._window
        }
        found.add(self._me)
        return sorted(found)

    def order(self, round_: int, beacon: bytes) -> list[PeerId]:
        """All active members as they are asked in this round: the same on all nodes with the same view."""
        return ordered(self.active(round_), round_, beacon, self._order)


def ordered(peers: Iterable[PeerId], round_: int, beacon: bytes, order: Order) -> list[PeerId]:
    """Peers by their hash with the round, ties by their ids (MoDeST, section 5.3 of our notes)."""
    return sorted(sorted(peers), key=lambda peer: order(peer, round_, beacon))


@lru_cache(maxsize=16_384)
def _bucket(peer: str) -> int:
    return hashlib.sha256(peer.encode()).digest()[0] % BUCKETS


BUCKETS = 32


class Draw:
    """SAMPLE(k, c): the first `count` in an order who prove to be there.

    Several are asked at once, and as many more as the share of answers so far makes it take, but those who answer are
    taken in the order: whoever draws from the same order with the same peers alive has the same sample.

    doubtful: peers that seem to be gone. They are asked in their turn, but others are asked in their place, and they are
        not waited for any more after `give_up_doubtful`.
    """

    def __init__(self, order: Sequence[PeerId], count: int, doubtful: Collection[PeerId] = ()) -> None:
        self._order = order
        self._count = count
        self._doubtful = set(doubtful)
        self._next = 0
        self._answers: dict[PeerId, bool] = {}
        self._asked: dict[PeerId, None] = {}

    def ask(self) -> list[PeerId]:
        """Whom to ask now: nobody while enough answers are outstanding."""
        alive = sum(self._answers.values())
        sure = [peer for peer in self._answers if peer not in self._doubtful]
        missing = self._count - alive - sum(peer not in self._doubtful for peer in self._asked)
        if missing <= 0:
            return []
        if not self._next:
            # A few more than it takes: one that is gone then costs no wait.
            wanted = self._count + max(1, self._count // 4)
        else:
            # One answer is counted as alive beforehand, so that the first failures do not have half the network asked.
            share = (1 + sum(self._answers[peer] for peer in sure)) / (1 + len(sure))
            wanted = ceil(AGAIN * missing / share)
        chosen: list[PeerId] = []
        for peer in self._order[self._next : self._next + MAX_ASKED_TIMES * (self._count + 1)]:
            if wanted <= 0:
                break
            chosen.append(peer)
            wanted -= peer not in self._doubtful
        self._next += len(chosen)
        self._asked.update(dict.fromkeys(chosen))
        return chosen

    def awaits(self, peer: PeerId) -> bool:
        return peer in self._asked

    def answered(self, peer: PeerId, alive: bool) -> None:
        """An answer, or the lack of one."""
        if peer in self._asked:
            del self._asked[peer]
            self._answers[peer] = alive

    def give_up_doubtful(self) -> None:
        """Wait no longer for those who seemed to be gone."""
        for peer in [peer for peer in self._asked if peer in self._doubtful]:
            self.answered(peer, False)

    def sample(self) -> list[PeerId] | None:
        """In order: those found alive, once nobody before the last of them may still answer; None before that."""
        found: list[PeerId] = []
        for peer in self._order[: self._next]:
            if peer in self._asked:
                return None
            if self._answers[peer]:
                found.append(peer)
                if len(found) == self._count:
                    return found
        return found if self._next == len(self._order) else None


AGAIN = 1.5
"""After a failure, by how much more are asked than the share of answers so far makes it take."""
MAX_ASKED_TIMES = 5
"""Peers asked at once, in sample sizes."""
