"""The log of shared-seed scalars: a set of records that only grows, cut where it is sealed.

Two nodes that hold the same set hold the same log, whatever came in which order. Belongs here: what a slot holds, the
digests by which two logs are compared, and the rounds as they are replayed. Who is told what is said in `scalars.py`.

A slot is one author's place in one round. It is empty, holds the author's record, or is void: two different records
that an author signed for one round are the proof of its equivocation, and neither counts.
"""

import hashlib
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from enum import Enum, auto
from itertools import islice
from typing import NamedTuple

from msgspec import Struct

from protocols.messages import RoundRange
from protocols.vocabulary import RECORD_ID_BYTES, Checkpoint, RecordId, ScalarRecord

_RECORD, _VOID, _RANGE, _CHAIN, _CROWD = (
    f"covey scalar {name} 1\0".encode() for name in ("record", "void", "range", "log", "crowd")
)
_SIGNED = b"covey scalars 1\0"


def signed_bytes(terms: bytes, round_: int, codes: bytes, built_on: bytes) -> bytes:
    """What an author signs: its scalars of one round under these terms, which no other network shares."""
    return _SIGNED + terms + round_.to_bytes(8, "big") + built_on + codes


class Outcome(Enum):
    """What became of a record that was put into the log."""

    NEW = auto()
    KNOWN = auto()
    VOIDED = auto()
    """It contradicts the record that was there."""
    LATE = auto()
    CROWDED = auto()
    """The round has as many authors as it may have, and their keys come first."""


class _Slot(NamedTuple):
    """records: one, or the two that contradict each other, in the order of what they say."""

    id: RecordId
    records: tuple[ScalarRecord, ...]


class _Round:
    """One round's slots by author, and what is derived from them while nothing changes."""

    __slots__ = ("counting", "crowd", "digest", "slots")

    def __init__(self) -> None:
        self.slots: dict[bytes, _Slot] = {}
        self.digest: bytes | None = None
        self.counting: tuple[ScalarRecord, ...] | None = None
        self.crowd: list[tuple[bytes, bytes]] = []
        """Place and author of every slot, in order, once the round is full."""


class ScalarLog:
    """The records that one node holds.

    base: digest of the model that round 0 stands for. max_authors: of one round; beyond it those stay whose keys,
        hashed with the round, come first, so that all nodes keep the same ones.
    """

    def __init__(self, base: bytes, max_authors: int) -> None:
        self._max_authors = max_authors
        self._rounds: dict[int, _Round] = {}
        self._newest: dict[bytes, int] = {}
        self._chain: dict[int, bytes] = {}
        """Digest of the log up to a round, from `sealed` on as far as it was asked for."""
        self.cut = 0
        """Rounds up to this one are gone."""
        self.sealed = 0
        """Rounds up to this one take no record any more."""
        self._sealed_log = base
        self._sealed_records = 0
        self.num_records = 0
        """Held."""
        self.num_void = 0

    # --- what comes in ----------------------------------------------------------------------------------
    def add(self, record: ScalarRecord) -> Outcome:
        """Put one record in. Its signature is the caller's affair."""
        if record.round <= self.sealed:
            return Outcome.LATE
        round_ = self._rounds.get(record.round)
        if round_ is None:
            round_ = self._rounds[record.round] = _Round()
        slot = round_.slots.get(record.author)
        if slot is None:
            if len(round_.slots) >= self._max_authors and not self._make_room(round_, record):
                return Outcome.CROWDED
            self._put(round_, record.author, _Slot(_record_id(record), (record,)))
            self.num_records += 1
            if record.round > self._newest.get(record.author, 0):
                self._newest[record.author] = record.round
            return Outcome.NEW
        held = slot.records[0]
        if len(slot.records) > 1 or held is record or _says(held) == _says(record):
            return Outcome.KNOWN
        first, second = sorted((held, record), key=_says)
        self._put(round_, record.author, _Slot(_void_id(record), (first, second)))
        self.num_void += 1
        return Outcome.VOIDED

    def has_spoken(self, author: bytes, round_: int) -> bool:
        """Whether this author has a slot in this round."""
        return round_ in self._rounds and author in self._rounds[round_].slots

    def holds(self, record: ScalarRecord) -> bool:
        """Whether putting it in would change nothing."""
        if record.round <= self.sealed:
            return True
        round_ = self._rounds.get(record.round)
        slot = round_.slots.get(record.author) if round_ is not None else None
        return slot is not None and (len(slot.records) > 1 or _says(slot.records[0]) == _says(record))

    def _put(self, round_: _Round, author: bytes, slot: _Slot) -> None:
        round_.slots[author] = slot
        round_.digest = round_.counting = None
        self._forget_chain(slot.records[0].round)

    def _make_room(self, round_: _Round, record: ScalarRecord) -> bool:
        crowd, number = round_.crowd, record.round
        if not crowd:
            crowd[:] = sorted((_place(author, number), author) for author in round_.slots)
        place = _place(record.author, number)
        if place > crowd[-1][0]:
            return False
        _, last = crowd.pop()
        insort(crowd, (place, record.author))
        del round_.slots[last]
        if self._newest.get(last) == number:
            del self._newest[last]
        self.num_records -= 1
        return True

    # --- comparing --------------------------------------------------------------------------------------
    def range(self, first: int, last: int) -> RoundRange:
        """The rounds `first` to `last` in one digest. Rounds without a record say nothing."""
        hashed, count = hashlib.sha256(_RANGE), 0
        for number in self._between(first, last):
            hashed.update(number.to_bytes(8, "big") + self._digest_of(number))
            count += len(self._rounds[number].slots)
        return RoundRange(first, last, count, hashed.digest())

    def count(self, first: int, last: int) -> int:
        """Slots that are taken in these rounds."""
        return sum(len(self._rounds[number].slots) for number in self._between(first, last))

    def ids(self, first: int, last: int) -> Iterator[RecordId]:
        """Of all slots of these rounds, by round and author."""
        for number in self._between(first, last):
            slots = self._rounds[number].slots
            yield from (slots[author].id for author in sorted(slots))

    def select(
        self, first: int, last: int, wanted: Callable[[RecordId], bool], at_most: int
    ) -> list[ScalarRecord]:
        """The records of the slots with these ids; both of a void one."""
        slots = (
            slot
            for number in self._between(first, last)
            for slot in self._rounds[number].slots.values()
            if wanted(slot.id)
        )
        return [record for slot in islice(slots, at_most) for record in slot.records]

    def chain(self, round_: int) -> bytes:
        """The digest of all that counted up to this round: equal digests, equal states. Not below `sealed`."""
        assert round_ >= self.sealed
        known = self._chain
        if not known:
            known[self.sealed] = self._sealed_log
        if round_ in known:
            return known[round_]
        start = max(number for number in known if number < round_)
        digest = known[start]
        for number in self._between(start + 1, round_):
            digest = hashlib.sha256(
                _CHAIN + digest + number.to_bytes(8, "big") + self._digest_of(number)
            ).digest()
            known[number] = digest
        known[round_] = digest
        return digest

    def num_counted(self, round_: int) -> int:
        """Records that counted up to this round, void slots among them."""
        return self._sealed_records + self.count(self.sealed + 1, round_)

    def _digest_of(self, number: int) -> bytes:
        round_ = self._rounds[number]
        if round_.digest is None:
            ids = (author + round_.slots[author].id for author in sorted(round_.slots))
            round_.digest = hashlib.sha256(b"".join(ids)).digest()
        return round_.digest

    def _forget_chain(self, round_: int) -> None:
        known = self._chain
        for number in [number for number in known if number >= round_]:
            del known[number]

    def _between(self, first: int, last: int) -> Iterable[int]:
        if last - first < len(self._rounds):
            return (number for number in range(first, last + 1) if number in self._rounds)
        return sorted(number for number in self._rounds if first <= number <= last)

    # --- replaying --------------------------------------------------------------------------------------
    def counting(self, round_: int) -> tuple[ScalarRecord, ...]:
        """The records that count in a round, in the order of their authors' keys."""
        found = self._rounds.get(round_)
        if found is None:
            return ()
        if found.counting is None:
            slots = [found.slots[author] for author in sorted(found.slots)]
            found.counting = tuple(slot.records[0] for slot in slots if len(slot.records) == 1)
        return found.counting

    def rounds(self, first: int, last: int) -> list[int]:
        """The rounds among these that have a record, in order."""
        return list(self._between(first, last))

    # --- who is where -----------------------------------------------------------------------------------
    def newest_of(self, author: bytes) -> int:
        """The last round that this author has a record of; 0 where there is none."""
        return self._newest.get(author, 0)

    def authors(self, since: int) -> Set[bytes]:
        """Those with a record of this round or a later one."""
        return {author for author, newest in self._newest.items() if newest >= since}

    def records(self) -> Iterator[ScalarRecord]:
        """All that are held, by round and author, contradictions included."""
        for number in sorted(self._rounds):
            slots = self._rounds[number].slots
            for author in sorted(slots):
                yield from slots[author].records

    # --- sealing ----------------------------------------------------------------------------------------
    def seal(self, round_: int) -> None:
        """Take no more records up to this round. They are kept for those who seal it later."""
        log, counted = self.chain(round_), self.num_counted(round_)
        self.sealed, self._sealed_log, self._sealed_records = round_, log, counted
        self._chain = {number: digest for number, digest in self._chain.items() if number >= round_}

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Begin at a state that others have sealed: what this node held of its rounds means nothing any more."""
        self.drop(checkpoint.round)
        self.cut = (
            checkpoint.round
        )  # where it is an older one, what was cut after it is to be had from others again
        self.sealed, self._sealed_log = checkpoint.round, checkpoint.log
        self._sealed_records = checkpoint.num_records
        self._chain = {}

    def drop(self, round_: int) -> None:
        """Let go of the records up to this round."""
        for number in [number for number in self._rounds if number <= round_]:
            slots = self._rounds.pop(number).slots
            self.num_records -= len(slots)
        self.cut = max(self.cut, round_)
        self._newest = {author: newest for author, newest in self._newest.items() if newest > round_}


def _says(record: ScalarRecord) -> tuple[bytes, bytes]:
    """A second signature under the same words says nothing new."""
    return record.codes, record.built_on


def _record_id(record: ScalarRecord) -> RecordId:
    place = record.author + record.round.to_bytes(8, "big")
    hashed = hashlib.sha256(_RECORD + place + record.built_on + record.codes)
    return RecordId(hashed.digest()[:RECORD_ID_BYTES])


def _void_id(record: ScalarRecord) -> RecordId:
    """The same whichever two of an author's contradicting records a node has seen."""
    hashed = hashlib.sha256(_VOID + record.author + record.round.to_bytes(8, "big"))
    return RecordId(hashed.digest()[:RECORD_ID_BYTES])


def _place(author: bytes, round_: int) -> bytes:
    """Where an author stands in a crowded round. Drawn anew for each round, so that nobody is left out for good."""
    return hashlib.sha256(_CROWD + author + round_.to_bytes(8, "big")).digest()


# --- for the operator -----------------------------------------------------------------------------------
class LogStatus(Struct, frozen=True):
    """The log of one node, for the operator."""

    round: int
    num_records: int
    num_void: int
    cut: int
    sealed: Checkpoint | None
    proposed: Checkpoint | None
    log: str
    """Digest of the log up to `round`, in hex: equal logs, equal states."""
    authors: dict[str, int]
    """Newest round of each author, by its key in hex."""
    missing: tuple[tuple[int, int], ...]
    """Rounds after `sealed` without any record, as first and last."""
    counts: dict[str, int]
    """Records by what became of them."""


def log_status(
    log: ScalarLog,
    round_: int,
    sealed: Checkpoint | None,
    proposed: Checkpoint | None,
    counts: Mapping[str, int],
) -> LogStatus:
    """A log at a glance. round_: how many the node has behind it."""
    first = log.sealed + 1
    return LogStatus(
        round=round_,
        num_records=log.num_records,
        num_void=log.num_void,
        cut=log.cut,
        sealed=sealed,
        proposed=proposed,
        log=log.chain(max(round_, log.sealed)).hex(),
        authors={author.hex(): log.newest_of(author) for author in sorted(log.authors(first))},
        missing=_gaps(log.rounds(first, round_), first, round_),
        counts=dict(counts),
    )


def _gaps(present: Sequence[int], first: int, last: int) -> tuple[tuple[int, int], ...]:
    gaps: list[tuple[int, int]] = []
    expected = first
    for number in [*present, last + 1]:
        if number > expected:
            gaps.append((expected, number - 1))
        expected = number + 1
    return tuple(gaps)
