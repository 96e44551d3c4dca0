"""The feeds of all authors on one node: what is taken in, how far each goes, and what a peer lacks.

A feed is an author's own log: entries numbered from 1, a running hash over them, and the author's signature under it, as
in Secure Scuttlebutt (Tarr et al., ICN 2019) and Hypercore. One signature proves every entry before it, whoever passes
them on. What a node holds of a feed is its newest entries without a gap, so that one number says how far it is.

Two copies of a feed become the same whichever way they meet: the later epoch wins, then the longer one; an author that has
told two stories in one epoch is void in it. Pure: entries themselves are kept elsewhere (`KeepEntries`, `Recall`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from protocols.entries import FEEDS_OF, Batch, Begun, Cut, Entry, Feed, FeedMark, Head, Kind, Shared, Want
from protocols.errors import PeerError
from protocols.signing import Signatures
from protocols.terms import item_of_uri
from protocols.vocabulary import (
    CHAIN_BYTES,
    MAX_BATCH_BYTES,
    MAX_ENTRIES_PER_BATCH,
    MAX_ENTRY_BYTES,
    MAX_SEQ,
    Reason,
)

START = bytes(CHAIN_BYTES)
"""The running hash before the first entry."""
DAY_S = 86_400
CLOCK_SKEW_DAYS = 1
"""By how much an honest clock may be ahead of ours."""
FEW_CLICKS = 16
"""At most 33 kB, whatever their words."""
FULL = 0.95
"""Of what may be kept: beyond it no new author is taken in. Those who are known may go on to the end."""
QUIET_DAYS = 30
"""After so long without a word an author makes room for a new one, and not before: whoever invents names by the thousand
can keep newcomers out, but cannot make others be forgotten."""
BATCH_OVERHEAD_BYTES = 192
"""Of a batch, beside its entries."""

_encode = msgspec.msgpack.Encoder().encode


@lru_cache(4096)
def chain_after(prior: bytes, entry: Entry) -> bytes:
    """The running hash after one more entry, 16 bytes. Cached: where many nodes run in one process, each hears the same."""
    return hashlib.sha256(prior + _encode(entry)).digest()[:CHAIN_BYTES]


def chains(prior: bytes, entries: Iterable[Entry]) -> list[bytes]:
    """The running hash after each entry."""
    found = []
    for entry in entries:
        prior = chain_after(prior, entry)
        found.append(prior)
    return found


@lru_cache(4096)
def head_bytes(network: str, feed: Feed, author: bytes, epoch: int, last: int, chain: bytes) -> bytes:
    """What an author signs at the end of a batch."""
    return b"covey feed 1\0" + _encode((network, feed.value, author, epoch, last, chain))


def entry_bytes(entry: Entry) -> int:
    """How long an entry is when it travels."""
    return len(_encode(entry))


def batch_bytes(batch: Batch) -> int:
    """How long a batch is when it travels."""
    return len(_encode(batch))


class FeedLimits(NamedTuple):
    """How much a node keeps of one feed.

    max_entries: over all authors. window: the newest entries of one author. expire_days: whoever has said nothing for longer
    is forgotten.
    """

    max_authors: int
    max_entries: int
    window: int
    expire_days: int


class Taken(NamedTuple):
    """What a batch came to: what of it is new, and what has to go for it. Neither where it changes nothing."""

    batch: Batch | None = None
    cuts: tuple[Cut, ...] = ()


NOTHING = Taken()


class _State:
    """Where one author's feed stands. See `Head`."""

    __slots__ = ("chain", "day", "epoch", "first", "last", "void")

    def __init__(self, head: Head) -> None:
        self.epoch, self.first, self.last = head.epoch, min(head.first, head.last + 1), head.last
        self.chain, self.day, self.void = head.chain, head.day, head.void

    @property
    def count(self) -> int:
        return self.last - self.first + 1


class FeedSet:
    """One feed of every author that this node knows of."""

    def __init__(self, network: str, feed: Feed, signatures: Signatures, limits: FeedLimits) -> None:
        self._network = network
        self._feed = feed
        self._signatures = signatures
        self._limits = limits
        self._states: dict[bytes, _State] = {}
        self.num_entries = 0
        self._expired_on = -1
        self._no_room = (-1, 0, 0)
        """Entries of all when room was refused last, what its author would have had, and how many were too many."""

    def load(self, heads: Iterable[Head]) -> None:
        """What was kept before a restart."""
        self._states = {head.author: _State(head) for head in heads}
        self.num_entries = sum(state.count for state in self._states.values())
        self._expired_on = -1

    def __len__(self) -> int:
        return len(self._states)

    def heads(self) -> list[Head]:
        """Where each author's feed stands, by author."""
        return [
            Head(author, s.epoch, s.first, s.last, s.chain, s.day, s.void)
            for author, s in sorted(self._states.items())
        ]

    # --- what the node itself says ----------------------------------------------------------------------
    def publish(self, entries: Sequence[Entry], unix_s: float) -> list[Batch]:
        """Add entries to the node's own feed. Days never go back, whatever the clock does.

        Raises:
            ValueError: an entry does not belong into this feed, or is longer than `MAX_ENTRY_BYTES`.
        """
        for entry in entries:
            if self._feed not in FEEDS_OF[type(entry)]:
                raise ValueError(self._misplaced(type(entry)))
            if problem := _problem(entry):
                raise ValueError(problem)
        me = self._signatures.author
        state = self._states.get(me)
        if state is None or state.void:
            state = self._begin(me, max(int(unix_s), state.epoch + 1 if state else 0))
        batches = []
        for part in _parts(entries):
            prior, first = state.chain, state.last + 1
            dated = []
            for entry in part:
                state.day = max(state.day, entry.day)
                dated.append(entry if entry.day == state.day else replace(entry, day=state.day))
            state.chain = chains(prior, dated)[-1]
            state.last += len(dated)
            self.num_entries += len(dated)
            said = head_bytes(self._network, self._feed, me, state.epoch, state.last, state.chain)
            batches.append(Batch(me, state.epoch, first, prior, tuple(dated), self._signatures.sign(said)))
        return batches

    def begin_anew(self, day: int, unix_s: float) -> tuple[Batch, Cut]:
        """Take back all that the node itself has said: its feed goes on in a new epoch."""
        me = self._signatures.author
        old = self._states.get(me)
        state = self._begin(me, max(int(unix_s), old.epoch + 1 if old else 0))
        (batch,) = self.publish([Begun(day)], unix_s)
        return batch, Cut(me, state.epoch, 1)

    def _begin(self, author: bytes, epoch: int) -> _State:
        self._drop(author)
        state = self._states[author] = _State(Head(author, epoch, 1, 0, START, 0))
        return state

    # --- what others say --------------------------------------------------------------------------------
    def take(self, batch: Batch, unix_s: float) -> Taken:
        """Take in a batch from whoever brought it.

        Raises:
            PeerError: FORGED or MALFORMED. Nobody who checks would pass it on.
        """
        today = int(unix_s) // DAY_S
        state = self._states.get(batch.author)
        if batch.epoch > unix_s + CLOCK_SKEW_DAYS * DAY_S or (state is not None and _is_old(batch, state)):
            return NOTHING
        hashes = self._check(batch)
        age = today - batch.entries[-1].day
        if age < -CLOCK_SKEW_DAYS or age > self._limits.expire_days:
            return NOTHING
        if state is None or batch.epoch > state.epoch:
            return self._adopt(batch, hashes)
        if batch.first > state.last + 1:
            # Whoever leaves out a part must not make us forget what came before it.
            if not self._is_over(state, batch, today):
                return NOTHING
            return self._adopt(batch, hashes)
        before = batch.first - 1
        new = batch.entries[state.last - before :]
        chain = hashes[state.last - batch.first] if state.last > before else batch.prior
        # Whoever was given the later entries alone cannot know that their days go back: it is the author's doing.
        if chain != state.chain or (new and new[0].day < state.day):
            self._drop(batch.author, void=True)
            return Taken(None, (Cut(batch.author, batch.epoch, batch.last + 1, void=True),))
        if not new:
            return NOTHING
        added = (
            batch
            if len(new) == len(batch.entries)
            else replace(batch, first=state.last + 1, prior=state.chain, entries=new)
        )
        room = self._make_room(batch.author, min(len(new), self._limits.window - state.count))
        return NOTHING if room is None else self._append(state, added, hashes[-1], room)

    def _check(self, batch: Batch) -> list[bytes]:
        """The running hashes of a batch that its author signed."""
        if not batch.entries or batch.last > MAX_SEQ:
            raise PeerError(Reason.MALFORMED, "a batch without entries, or beyond the last number")
        if self._may_be_long(batch) and batch_bytes(batch) > MAX_BATCH_BYTES:
            # It has fitted the frame that it came in, and might not fit one of ours.
            raise PeerError(Reason.MALFORMED, f"a batch of more than {MAX_BATCH_BYTES} bytes")
        for kind in set(map(type, batch.entries)):
            if self._feed not in FEEDS_OF[kind]:
                raise PeerError(Reason.MALFORMED, self._misplaced(kind))
        days = [entry.day for entry in batch.entries]
        if days != sorted(days):
            raise PeerError(Reason.MALFORMED, "the days of a feed go back")
        if self._feed is Feed.CATALOGUE:  # no click can be wrong in these ways
            for entry in batch.entries:
                if problem := _problem(entry):
                    raise PeerError(Reason.MALFORMED, problem)
        if batch.first == 1 and batch.prior != START:
            raise PeerError(Reason.MALFORMED, "a running hash before the first entry")
        hashes = chains(batch.prior, batch.entries)
        said = head_bytes(self._network, self._feed, batch.author, batch.epoch, batch.last, hashes[-1])
        if not self._signatures.verify(batch.author, said, batch.signature):
            raise PeerError(Reason.FORGED, f"signature of author {batch.author.hex()[:12]}")
        return hashes

    def _may_be_long(self, batch: Batch) -> bool:
        """Few clicks cannot be, and to measure each batch would cost more than all other checks."""
        return self._feed is Feed.CATALOGUE or len(batch.entries) > FEW_CLICKS

    def _misplaced(self, kind: type) -> str:
        return f"a {kind.__name__.lower()} entry in the {self._feed.value}"

    def _is_over(self, state: _State, batch: Batch, today: int) -> bool:
        """Whether all that is held of an author would go in any case."""
        return (
            state.count == 0
            or state.last <= batch.last - self._limits.window
            or state.day < today - self._limits.expire_days
        )

    def _adopt(self, batch: Batch, hashes: Sequence[bytes]) -> Taken:
        """Hold this of an author, and nothing that was before."""
        author = batch.author
        before = self._states.get(author)
        if before is None and self._is_full():
            return NOTHING
        room = self._make_room(author, len(batch.entries) - (before.count if before else 0))
        if room is None:
            return NOTHING
        if before is not None:
            self._drop(author)
            room = (*room, Cut(author, batch.epoch, batch.first))
        head = Head(author, batch.epoch, batch.first, batch.first - 1, batch.prior, 0)
        state = self._states[author] = _State(head)
        return self._append(state, batch, hashes[-1], room)

    def _append(self, state: _State, batch: Batch, chain: bytes, cuts: tuple[Cut, ...]) -> Taken:
        state.last, state.chain, state.day = batch.last, chain, batch.entries[-1].day
        self.num_entries += len(batch.entries)
        first = max(state.first, state.last - self._limits.window + 1)
        if first > state.first:
            cuts = (*cuts, self._shorten(batch.author, first - state.first))
        return Taken(batch, cuts)

    # --- room -------------------------------------------------------------------------------------------
    def _is_full(self) -> bool:
        """Whether there is no place for a new author."""
        limits = self._limits
        authors, entries = len(self._states) / limits.max_authors, self.num_entries / limits.max_entries
        return max(authors, entries) > FULL

    def _make_room(self, author: bytes, more: int) -> tuple[Cut, ...] | None:
        """For more entries of an author: whoever has most loses its oldest, and nobody for one who would have more than it, or
        a few names could drive out all others. None where that is not enough."""
        excess = self.num_entries + more - self._limits.max_entries
        if excess <= 0:
            return ()
        own = more + (self._states[author].count if author in self._states else 0)
        total, own_then, excess_then = self._no_room
        if self.num_entries == total and own >= own_then and excess >= excess_then:
            return None  # nothing has changed since: whoever sends a thousand such costs little
        kept = (self._signatures.author, author)
        larger = [each for each, s in self._states.items() if s.count > own and each not in kept]
        if sum(self._states[each].count - own for each in larger) < excess:
            self._no_room = self.num_entries, own, excess
            return None
        enough = self.num_entries - excess - int((1 - FULL) * self._limits.max_entries)
        cuts = []
        for each in sorted(larger, key=lambda each: self._states[each].count, reverse=True):
            if self.num_entries <= enough:
                break
            cuts.append(self._shorten(each, min(self._states[each].count - own, self.num_entries - enough)))
        return tuple(cuts)

    def _shorten(self, author: bytes, count: int) -> Cut:
        state = self._states[author]
        state.first += count
        self.num_entries -= count
        return Cut(author, state.epoch, state.first)

    def _forget(self, author: bytes) -> Cut:
        self._drop(author)
        return Cut(author, self._states.pop(author).epoch, MAX_SEQ)

    def expire(self, unix_s: float) -> list[Cut]:
        """Let go of what authors said who have been silent for too long; where there is no room for new ones, of whoever has
        been silent for a while. To be called now and then."""
        today = int(unix_s) // DAY_S
        cuts = []
        if today != self._expired_on:  # whoever was not too old then is not yet
            self._expired_on = today
            for author, state in self._states.items():
                if state.count and state.day < today - self._limits.expire_days:
                    self._drop(author)
                    cuts.append(Cut(author, state.epoch, state.first))
        if self._is_full():
            quiet = [(s.day, a) for a, s in self._states.items() if s.day < today - QUIET_DAYS]
            for _, author in sorted(quiet):
                if author != self._signatures.author and self._is_full():
                    cuts.append(self._forget(author))
        return cuts

    def _drop(self, author: bytes, *, void: bool = False) -> None:
        state = self._states.get(author)
        if state is None:
            return
        self.num_entries -= state.count
        state.first = state.last + 1
        state.void = void

    # --- what a peer lacks ------------------------------------------------------------------------------
    def marks(self, bits: int, prefix: int) -> tuple[FeedMark, ...]:
        """How far this node is, for the authors whose keys begin with these bits."""
        return tuple(
            FeedMark(author, state.epoch, MAX_SEQ if state.void else state.last)
            for author, state in self._states.items()
            if not bits or begins_with(author, bits, prefix)
        )

    def bits_for(self, prefix: int, max_bits: int, max_marks: int) -> int:
        """How many bits of a key have to be equal, so that no more than `max_marks` authors are told of.

        prefix: `max_bits` of them, drawn.
        """
        authors: Sequence[bytes] = tuple(self._states)
        bits = 0
        while len(authors) > max_marks and bits < max_bits:
            bits += 1
            authors = [a for a in authors if begins_with(a, bits, prefix >> (max_bits - bits))]
        return bits

    def lacking(
        self,
        marks: Mapping[bytes, FeedMark],
        bits: int,
        prefix: int,
        *,
        offset: int,
        per_author: int,
        max_entries: int,
    ) -> tuple[Want, ...]:
        """Of which authors the sender of these marks lacks what, beginning anywhere, so that many answers bring all."""
        wants = []
        authors = list(self._states)
        start = offset % max(1, len(authors))
        left = max_entries
        for author in (*authors[start:], *authors[:start]):
            if left <= 0:
                break
            state = self._states[author]
            if bits and not begins_with(author, bits, prefix):
                continue
            theirs = marks.get(author)
            after = state.first - 1
            if theirs is not None and theirs.epoch >= state.epoch:
                if theirs.epoch > state.epoch or theirs.last >= state.last:
                    continue
                after = max(after, theirs.last)
            count = min(state.last - after, per_author, left)
            if count > 0:
                wants.append(Want(author, state.epoch, after, count))
                left -= count
        return tuple(wants)


def _problem(entry: Entry) -> str | None:
    """What is wrong with an entry on its own, beyond what its type says."""
    if isinstance(entry, Shared) and entry.kind is Kind.LINK and entry.item != item_of_uri(entry.uri):
        # Or a link could take the place of somebody's file.
        return "a link that is not the item of its URI"
    return f"an entry of more than {MAX_ENTRY_BYTES} bytes" if entry_bytes(entry) > MAX_ENTRY_BYTES else None


def _is_old(batch: Batch, state: _State) -> bool:
    """Whether a batch can tell nothing, so that it need not be checked. One that ends where ours does may tell otherwise."""
    if batch.epoch != state.epoch:
        return batch.epoch < state.epoch
    return state.void or batch.last < state.last


def begins_with(author: bytes, bits: int, prefix: int) -> bool:
    """Whether an author's key begins with these bits, most significant first."""
    return int.from_bytes(author[:4], "big") >> (32 - bits) == prefix


def _parts(entries: Sequence[Entry]) -> Iterable[Sequence[Entry]]:
    """Entries in batches, none of which is too long."""
    part: list[Entry] = []
    size = BATCH_OVERHEAD_BYTES
    for entry in entries:
        more = entry_bytes(entry)
        if part and (len(part) == MAX_ENTRIES_PER_BATCH or size + more > MAX_BATCH_BYTES):
            yield part
            part, size = [], BATCH_OVERHEAD_BYTES
        part.append(entry)
        size += more
    if part:
        yield part
