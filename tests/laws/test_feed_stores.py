"""What every store of feeds does, the daemon's on the disk and the simulator's in memory: what the core believes it has, it has."""

import sqlite3
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.library_feeds import TABLES, FeedTables, transaction
from protocols.entries import Cut, Feed, Head, Want
from protocols.events import KeepEntries, Recall, Recalled
from protocols.feeds import DAY_S, FeedSet, batch_bytes
from protocols.vocabulary import MAX_BATCH_BYTES
from tests.protocols.content_network import ContentNetwork, Store
from tests.protocols.feed_copies import EPOCH, LIMITS, NOW, PLENTY, TODAY, Story, click, clicks, shared
from tests.protocols.feed_store import FeedStore
from tests.protocols.identities import FakeSignatures

law = settings(derandomize=True, deadline=None, max_examples=200)


class Tables:
    """The daemon's, in a database of its own."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.executescript(TABLES)
        self._feeds = FeedTables(self._db, b"")

    def keep(self, effect: KeepEntries) -> None:
        with transaction(self._db):
            self._feeds.keep(effect)

    def recall(self, effect: Recall) -> Recalled:
        return Recalled(effect.token, self._feeds.recall(effect))

    def heads(self) -> tuple[tuple[Feed, tuple[Head, ...]], ...]:
        return tuple((feed, self._feeds.heads(feed)) for feed in Feed)


STORES: dict[str, Callable[[], Store]] = {"sqlite": Tables, "memory": FeedStore}


def said() -> list[Story]:
    """Four authors; the first has told two stories and the second has begun anew; some spoke long ago."""
    start = clicks(3, TODAY - 9)
    return [
        Story("liar", [*start, *clicks(5, word="jazz")]),
        Story("liar", [*start, *clicks(6, word="rock")]),
        Story("other", clicks(6, TODAY - 3)),
        Story("other", clicks(8), epoch=EPOCH + 1),
        Story("silent", clicks(7, TODAY - 170)),
        Story("last", [*clicks(4, TODAY - 5), *clicks(8)]),
    ]


STORIES = said()
parts = st.lists(
    st.tuples(st.integers(0, len(STORIES) - 1), st.integers(1, 12), st.integers(1, 12)), max_size=14
)
steps = st.one_of(
    parts.map(lambda each: ("take", each)),
    st.integers(0, 20).map(lambda each: ("expire", each)),
    st.just(("say", None)),
    st.just(("begin anew", None)),
    st.just(("restart", None)),
)


class Shell:
    """A feed set and the store that does what it says, several batches in one effect as `Content` does it."""

    def __init__(self, make: Callable[[], Store], window: int, max_authors: int) -> None:
        self.limits = LIMITS._replace(window=window, max_authors=max_authors)
        self.store = make()
        self.days = 0
        self.start()

    def start(self) -> None:
        self.feeds = FeedSet("net", Feed.CLICKS, FakeSignatures("me"), self.limits)
        self.feeds.load(dict(self.store.heads()).get(Feed.CLICKS, ()))

    @property
    def now(self) -> float:
        return NOW + self.days * DAY_S

    def step(self, what: str, argument: object) -> None:
        match what, argument:
            case "take", list():
                for number, first, last in argument:
                    story = STORIES[number]
                    low, high = min(first, last, story.last), min(max(first, last), story.last)
                    came = self.feeds.take(story.batch(low, high), self.now)
                    if came.batch or came.cuts:
                        self.keep((came.batch,) if came.batch else (), came.cuts)
            case "expire", int():
                self.days += argument
                self.keep((), tuple(self.feeds.expire(self.now)))
            case "say", None:
                self.keep(tuple(self.feeds.publish([click(1, TODAY)], self.now)), ())
            case "begin anew", None:
                batch, cut = self.feeds.begin_anew(TODAY, self.now)
                self.keep((batch,), (cut,))
            case _:
                self.start()

    def keep(self, batches: tuple, cuts: tuple[Cut, ...]) -> None:  # type: ignore[type-arg]
        if batches or cuts:
            self.store.keep(KeepEntries(Feed.CLICKS, batches, cuts))

    def check(self) -> None:
        """Every author as far as the core has it, and its entries as they were said."""
        kept = {head.author: head for head in dict(self.store.heads()).get(Feed.CLICKS, ())}
        heads = {head.author: head for head in self.feeds.heads()}
        assert set(kept) == set(heads)
        for author, head in heads.items():
            mine = kept[author]
            assert (mine.epoch, mine.void) == (head.epoch, head.void)
            if head.void or head.first > head.last:
                assert mine.first > mine.last
                continue
            assert (mine.last, mine.chain, mine.day) == (head.last, head.chain, head.day)
            assert mine.first <= head.first
            wants = (Want(author, head.epoch, head.first - 1, PLENTY),)
            batches = self.store.recall(Recall(1, Feed.CLICKS, wants, PLENTY)).batches
            assert batches[0].first == head.first
            assert batches[-1].last == head.last
            other = FeedSet("net", Feed.CLICKS, FakeSignatures("other"), LIMITS)
            assert all(other.take(batch, self.now).batch == batch for batch in batches), "signed and whole"
            assert other.heads()[0].chain == head.chain


@pytest.mark.parametrize("name", STORES)
@law
@given(
    st.lists(steps, max_size=8),
    st.sampled_from([1, 3, 5, 100]),
    st.sampled_from([2, 3, 100]),
)
def test_a_store_has_what_the_core_believes_it_has(
    name: str, happened: list[tuple[str, object]], window: int, max_authors: int
) -> None:
    shell = Shell(STORES[name], window, max_authors)
    for what, argument in happened:
        shell.step(what, argument)
        shell.check()


@pytest.mark.parametrize("name", STORES)
@law
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(1, 2_000),
)
def test_an_answer_is_no_longer_than_asked(
    name: str, cuts: list[tuple[int, int]], limit: int, max_bytes: int
) -> None:
    store = STORES[name]()
    story = Story("author", clicks(12))
    store.keep(KeepEntries(Feed.CLICKS, tuple(story.batches([end for pair in cuts for end in pair]))))
    wants = (
        Want(story.author, EPOCH, 0, limit),
        Want(b"x" * 32, EPOCH, 0, limit),
        Want(story.author, EPOCH, 12, 5),
    )
    batches = store.recall(Recall(1, Feed.CLICKS, wants, max_bytes)).batches
    assert sum(len(batch.entries) for batch in batches) <= limit
    assert sum(map(batch_bytes, batches)) <= max_bytes
    for batch in batches:
        assert batch == story.batch(batch.first, batch.last)


@pytest.mark.parametrize("name", STORES)
def test_long_entries_are_brought_in_batches_that_travel(name: str) -> None:
    store = STORES[name]()
    story = Story("author", [shared(number, details=16) for number in range(100)], feed=Feed.CATALOGUE)
    store.keep(KeepEntries(Feed.CATALOGUE, tuple(story.batches(range(0, 100, 5)))))
    wants = (Want(story.author, EPOCH, 0, 100),)
    batches = store.recall(Recall(1, Feed.CATALOGUE, wants, PLENTY)).batches
    assert [entry for batch in batches for entry in batch.entries] == list(story.entries)
    assert all(batch_bytes(batch) <= MAX_BATCH_BYTES for batch in batches)
    assert len(batches) == 10, "and no more than need be"


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("seed", range(3))
def test_whole_nodes_live_on_each_store(name: str, seed: int) -> None:
    net = ContentNetwork(5, seed, make_store=STORES[name])
    net.live(40)
    assert net.run(300, lambda: net.all_equal() and net.all_equal(Feed.CATALOGUE)), f"seed {seed}"
    net.check()
