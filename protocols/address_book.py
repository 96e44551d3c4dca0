"""The peers a node could dial: a partial view of bounded size, with what each said of itself and how dialling went.

Belongs here: what is known, who may fill it and who goes first when it is full. Decides nothing about links. Partial
views that are shuffled follow HyParView (Leitao et al. 2007) and Cyclon (Voulgaris et al. 2005).
"""

import random
from collections.abc import Collection, Iterator, Sequence

from protocols.signing import is_newer
from protocols.vocabulary import MAX_ADDRESSES, PeerId, PeerRecord, peer_of

INTRODUCED_SHARE = 4
"""One neighbour may fill at most one part in so many with peers that nobody here has met."""
KEPT_ADDRESSES = 4


class Entry:
    """A peer that could be dialled."""

    __slots__ = (
        "addresses",
        "bootstrap",
        "brief",
        "dialling",
        "doubted",
        "failures",
        "introducer",
        "last_reason",
        "met",
        "next_dial_at",
        "record",
        "rtt_s",
        "short_lived",
        "suspected",
    )

    def __init__(self, addresses: tuple[str, ...], bootstrap: bool = False) -> None:
        self.addresses = addresses
        self.bootstrap = bootstrap
        self.record: PeerRecord | None = None
        """The newest that it signed; None where only an address is known."""
        self.introducer: PeerId | None = None
        """Who told of it first, of a peer that was never met."""
        self.met = False
        """Whether a link to it has ever been greeted."""
        self.dialling = False
        self.brief = False
        """Whether the dial under way is for a link that will not be kept."""
        self.failures = 0
        self.short_lived = 0
        """Links in a row that ended soon after they had been greeted."""
        self.next_dial_at = 0.0
        self.last_reason = ""
        self.rtt_s: float | None = None
        self.suspected = False
        """Said to be gone, since the incarnation of its record."""
        self.doubted = -1
        """The latest incarnation of which that was passed on."""

    @property
    def gone(self) -> bool:
        """Left, or suspected: nobody is told of it, and it is dialled last."""
        return self.suspected or (self.record is not None and self.record.left)

    @property
    def incarnation(self) -> int:
        return self.record.incarnation if self.record else 0


class AddressBook:
    """At most `max_known` peers. `fixed` addresses are the operator's: they are never dropped."""

    def __init__(self, me: PeerId, fixed: Sequence[str], max_known: int) -> None:
        self._me = me
        self._fixed = frozenset(fixed)
        self._max_known = max_known
        self._entries: dict[PeerId, Entry] = {}
        for address in fixed:
            self.learn(address, bootstrap=True)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._entries)

    def get(self, peer: PeerId) -> Entry | None:
        return self._entries.get(peer)

    def items(self) -> list[tuple[PeerId, Entry]]:
        return list(self._entries.items())

    def learn(self, address: str, bootstrap: bool = False, keep: Collection[PeerId] = ()) -> None:
        """An address from the operator or from a discovery service. keep: peers that must not be dropped for it."""
        peer = peer_of(address)
        if peer is None or peer == self._me:
            return
        entry = self._entries.get(peer)
        if entry is None:
            if self._has_room(keep, None, bootstrap):
                self._entries[peer] = Entry((address,), bootstrap)
        elif address not in entry.addresses:
            signed = entry.record.addresses if entry.record else ()
            others = [each for each in entry.addresses if each not in signed]
            # What anybody may announce pushes out nothing that the peer itself has signed.
            entry.addresses = (*self._newest((address, *others))[: MAX_ADDRESSES - len(signed)], *signed)

    def take(self, record: PeerRecord, introducer: PeerId | None, keep: Collection[PeerId]) -> bool:
        """A genuine record. Whether it told anything new.

        introducer: the neighbour that told of it; None where the peer did so itself. keep: as in `learn`.
        """
        peer = PeerId(record.peer)
        entry = self._entries.get(peer)
        if entry is None:
            if record.left or not self._has_room(keep, introducer, introducer is None):
                return False
            entry = self._entries[peer] = Entry(())
            entry.introducer = introducer
        elif not is_newer(record, entry.record):
            return False
        if record.incarnation > entry.incarnation:
            entry.suspected = False
        entry.record = record
        own = tuple(address for address in record.addresses if peer_of(address) == peer)
        entry.addresses = self._newest((*own, *(a for a in entry.addresses if a not in own)))
        return True

    def count(self, introducer: PeerId) -> int:
        """Of the peers that nobody here has met, those that this neighbour told of."""
        return sum(e.introducer == introducer and not e.met for e in self._entries.values())

    def is_known_newer(self, record: PeerRecord) -> bool:
        """Whether the record would tell something new; asked before its signature is checked."""
        entry = self._entries.get(PeerId(record.peer))
        return is_newer(record, entry.record) if entry else True

    def sample(self, rng: random.Random, count: int, excluding: Collection[PeerId]) -> tuple[PeerRecord, ...]:
        """Records of up to so many peers that seem to be there: half of them met before, as far as both kinds last.

        Those that were met are sure to exist. Those that were not are the rest of the network, and have room; half of
        them are those heard of last, so that a part of the network that is new here gets around.
        """
        met: list[PeerRecord] = []
        others: list[PeerRecord] = []
        for peer, entry in self._entries.items():
            if entry.record is None or entry.gone or peer in excluding or not entry.record.addresses:
                continue
            (met if entry.met and not entry.failures else others).append(entry.record)
        num_met = min(len(met), max(count - count // 2, count - len(others)))
        num_newest = (count - num_met) // 2
        newest = others[max(0, len(others) - num_newest) :]
        older = others[: len(others) - len(newest)]
        num_older = min(count - num_met - num_newest, len(older))
        return tuple(rng.sample(met, num_met) + newest + rng.sample(older, num_older))

    def _has_room(self, keep: Collection[PeerId], introducer: PeerId | None, proven: bool) -> bool:
        """Whether one more fits, once the least useful one has gone. proven: it has shown that it is there."""
        if introducer is not None and self.count(introducer) >= max(1, self._max_known // INTRODUCED_SHARE):
            theirs = [p for p, e in self._entries.items() if e.introducer == introducer and not e.met]
            return self._drop(theirs, keep, proven)
        return len(self._entries) < self._max_known or self._drop(list(self._entries), keep, proven)

    def _drop(self, peers: list[PeerId], keep: Collection[PeerId], proven: bool) -> bool:
        worst: PeerId | None = None
        worst_place: tuple[bool, bool, int] | None = None
        for peer in peers:
            entry = self._entries[peer]
            if entry.bootstrap or entry.dialling or peer in keep:
                continue
            # Names alone, however many, push out nobody who was met and may be there.
            if not proven and entry.met and not entry.gone and not entry.failures:
                continue
            # One that left or was given up on, then one never met, then the one that failed most.
            place = (entry.gone, not entry.met, entry.failures)
            if worst_place is None or place > worst_place:
                worst, worst_place = peer, place
        if worst is None:
            return False
        del self._entries[worst]
        return True

    def _newest(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """The newest first; an old one that stopped working falls off the end. The operator's never do."""
        others = [address for address in addresses if address not in self._fixed][:KEPT_ADDRESSES]
        kept = [address for address in addresses if address in self._fixed or address in others]
        return tuple(kept[:MAX_ADDRESSES])
