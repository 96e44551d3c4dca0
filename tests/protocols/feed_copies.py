"""Authors with any number of stories, and copies of their feeds that pull from each other as nodes do, without a network."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from protocols.entries import Batch, Click, Entry, Feed, FeedMark, Head, Kind, Shared
from protocols.events import KeepEntries, Recall
from protocols.feeds import START, FeedLimits, FeedSet, Taken, chains, head_bytes
from tests.protocols.feed_store import FeedStore
from tests.protocols.identities import FakeSignatures

TODAY = 20_000
NOW = TODAY * 86_400.0 + 3_600
EPOCH = 1_700_000_000
LIMITS = FeedLimits(max_authors=100, max_entries=100_000, window=1_000, expire_days=180)
PLENTY = 1_000_000_000


def click(number: int, day: int = TODAY, word: str = "house") -> Click:
    """A click on an item that the number stands for."""
    return Click(number.to_bytes(32, "big"), day, (word,), 1)


def clicks(count: int, day: int = TODAY, word: str = "house") -> list[Entry]:
    return [click(number, day, word) for number in range(1, count + 1)]


def shared(number: int, title: str = "A title", day: int = TODAY, details: int = 0) -> Shared:
    """An item of some 100 bytes, or of 200 more for each detail."""
    extra = tuple((f"key {n}", "x" * 190) for n in range(details))
    item = number.to_bytes(32, "big")
    return Shared(item, day, Kind.FILE, title, "", ("house",), "text/plain", 1_000, "", extra)


class Story:
    """What an author says in one epoch. It signs after each entry, so that a batch may end anywhere."""

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        *,
        feed: Feed = Feed.CLICKS,
        epoch: int = EPOCH,
        network: str = "net",
    ) -> None:
        self._signatures = FakeSignatures(name)
        self.author = self._signatures.author
        self.feed, self.epoch, self.network = feed, epoch, network
        self.entries = tuple(entries)
        self.chains = [START, *chains(START, entries)]

    @property
    def last(self) -> int:
        return len(self.entries)

    def batch(self, first: int = 1, last: int | None = None) -> Batch:
        """Entries `first` to `last`, both included."""
        last = self.last if last is None else last
        said = head_bytes(self.network, self.feed, self.author, self.epoch, last, self.chains[last])
        return Batch(
            *(self.author, self.epoch, first, self.chains[first - 1], self.entries[first - 1 : last]),
            self._signatures.sign(said),
        )

    def batches(self, ends: Iterable[int] = ()) -> list[Batch]:
        """All of it, cut after these entries."""
        cuts = sorted({0, self.last, *(end for end in ends if 0 < end < self.last)})
        return [self.batch(a + 1, b) for a, b in pairwise(cuts)]

    def head(self, window: int = PLENTY) -> Head:
        """Where a copy stands that has all of it."""
        return Head(
            *(self.author, self.epoch, max(1, self.last - window + 1), self.last, self.chains[-1]),
            self.entries[-1].day,
        )


class Copy:
    """One feed of all authors as a node has it, and the disk under it."""

    def __init__(
        self, name: str = "me", feed: Feed = Feed.CLICKS, limits: FeedLimits = LIMITS, network: str = "net"
    ) -> None:
        self.feed = feed
        self.feeds = FeedSet(network, feed, FakeSignatures(name), limits)
        self.store = FeedStore()

    def take(self, *batches: Batch, now: float = NOW) -> list[Taken]:
        """In this order, once each."""
        taken = []
        for batch in batches:
            came = self.feeds.take(batch, now)
            taken.append(came)
            if came.batch is not None or came.cuts:
                kept = () if came.batch is None else (came.batch,)
                self.store.keep(KeepEntries(self.feed, kept, came.cuts))
        return taken

    def settle(self, *batches: Batch, now: float = NOW) -> None:
        """Again and again in this order, until none changes anything, as peers would bring them."""
        while any(came.batch or came.cuts for came in self.take(*batches, now=now)):
            pass

    def say(self, *entries: Entry, now: float = NOW) -> None:
        """In the node's own name."""
        self.store.keep(KeepEntries(self.feed, tuple(self.feeds.publish(entries, now))))

    def begin_anew(self, now: float = NOW) -> None:
        batch, cut = self.feeds.begin_anew(int(now) // 86_400, now)
        self.store.keep(KeepEntries(self.feed, (batch,), (cut,)))

    def pull(
        self, other: "Copy", *, per_author: int = 128, max_entries: int = PLENTY, now: float = NOW
    ) -> int:
        """Ask another copy for what this one lacks; how many new entries came."""
        marks: dict[bytes, FeedMark] = {mark.author: mark for mark in self.feeds.marks(0, 0)}
        wants = other.feeds.lacking(marks, 0, 0, offset=0, per_author=per_author, max_entries=max_entries)
        batches = other.store.recall(Recall(1, self.feed, wants, PLENTY)).batches
        return sum(len(came.batch.entries) for came in self.take(*batches, now=now) if came.batch)

    def heads(self) -> list[Head]:
        return self.feeds.heads()

    def entries(self, author: bytes) -> tuple[Entry, ...]:
        """All that the disk has of an author."""
        return tuple(entry for batch in self.kept(author) for entry in batch.entries)

    def kept(self, author: bytes) -> list[Batch]:
        wants = self.feeds.lacking({}, 0, 0, offset=0, per_author=PLENTY, max_entries=PLENTY)
        mine = tuple(want for want in wants if want.author == author)
        return list(self.store.recall(Recall(1, self.feed, mine, PLENTY)).batches)
