"""The feeds of one node in memory: what a core asks to be kept, and is brought when it asks.

Does what the daemon's SQLite tables do, by the same effects.
"""

from collections.abc import Iterable

from protocols.entries import Batch, Entry, Feed, Head
from protocols.events import KeepEntries, Recall, Recalled
from protocols.feeds import batch_bytes, chain_after
from protocols.vocabulary import MAX_BATCH_BYTES, MAX_ENTRIES_PER_BATCH


class _Kept:
    """One author's entries, from `first` on, the running hash before each, and where there is a signature."""

    __slots__ = ("chains", "entries", "epoch", "first", "signatures", "void")

    def __init__(self, epoch: int, first: int, prior: bytes) -> None:
        self.epoch = epoch
        self.first = first
        self.entries: list[Entry] = []
        self.chains = [prior]
        self.signatures: dict[int, bytes] = {}
        self.void = False

    @property
    def last(self) -> int:
        return self.first + len(self.entries) - 1

    def cut(self, first: int) -> None:
        """Let go of what is before."""
        gone = min(first - self.first, len(self.entries))
        if gone > 0:
            del self.entries[:gone], self.chains[:gone]
            self.first += gone
            self.signatures = {seq: s for seq, s in self.signatures.items() if seq >= self.first}

    def add(self, batch: Batch) -> None:
        """Go on with a batch."""
        for entry in batch.entries:
            self.entries.append(entry)
            self.chains.append(chain_after(self.chains[-1], entry))
        self.signatures[self.last] = batch.signature


class FeedStore:
    """All feeds of one node."""

    def __init__(self) -> None:
        self._kept: dict[Feed, dict[bytes, _Kept]] = {feed: {} for feed in Feed}

    def keep(self, effect: KeepEntries) -> None:
        """Cuts first, then batches."""
        authors = self._kept[effect.feed]
        for cut in effect.cuts:
            kept = authors.get(cut.author)
            if kept is None:
                continue
            # A cut far beyond the end is of an author that made room for others.
            if kept.epoch < cut.epoch or (cut.first > kept.last + 1 and not cut.void):
                del authors[cut.author]
            else:
                kept.cut(cut.first)
                kept.void = cut.void
        for batch in effect.batches:
            kept = authors.get(batch.author)
            if kept is None or (not kept.entries and kept.last + 1 != batch.first):
                kept = authors[batch.author] = _Kept(batch.epoch, batch.first, batch.prior)
            assert (kept.epoch, kept.last + 1, kept.chains[-1]) == (batch.epoch, batch.first, batch.prior)
            kept.add(batch)

    def recall(self, effect: Recall) -> Recalled:
        """Whole batches for each want, as many as fit."""
        left = effect.max_bytes
        found: list[Batch] = []
        for want in effect.wants:
            kept = self._kept[effect.feed].get(want.author)
            for batch in _batches(want.author, kept, want.after, want.limit) if kept is not None else ():
                left -= batch_bytes(batch)
                if left < 0:
                    return Recalled(effect.token, tuple(found))
                found.append(batch)
        return Recalled(effect.token, tuple(found))

    def heads(self) -> tuple[tuple[Feed, tuple[Head, ...]], ...]:
        """Where the feeds stand: what the core is told when it starts."""
        return tuple(
            (feed, tuple(_head(a, k) for a, k in authors.items())) for feed, authors in self._kept.items()
        )


def _batches(author: bytes, kept: _Kept, after: int, limit: int) -> Iterable[Batch]:
    """Each ends at a signature."""
    at, end = max(after + 1, kept.first), min(after + limit, kept.last)
    ends = sorted(seq for seq in kept.signatures if at <= seq <= end)
    while ends:
        fitting = [seq for seq in ends if seq < at + MAX_ENTRIES_PER_BATCH]
        batches = (_batch(author, kept, at, last) for last in reversed(fitting))
        batch = next((each for each in batches if batch_bytes(each) <= MAX_BATCH_BYTES), None)
        if batch is None:
            return
        yield batch
        at = batch.last + 1
        ends = [seq for seq in ends if seq >= at]


def _batch(author: bytes, kept: _Kept, first: int, last: int) -> Batch:
    low, high = first - kept.first, last - kept.first + 1
    entries = tuple(kept.entries[low:high])
    return Batch(author, kept.epoch, first, kept.chains[low], entries, kept.signatures[last])


def _head(author: bytes, kept: _Kept) -> Head:
    day = kept.entries[-1].day if kept.entries else 0
    return Head(author, kept.epoch, kept.first, kept.last, kept.chains[-1], day, kept.void)
