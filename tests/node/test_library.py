"""The library: what was kept is there after any end, what was cut is gone without a trace, and searches say why."""

import contextlib
import io
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from node import library_clicks
from node.config import ContentConfig
from node.library import DATABASE, Library
from node.library_search import Result
from protocols.entries import Batch, Begun, Click, Cut, Entry, Feed, Kind, Shared, Want, Withdrawn
from protocols.errors import ConfigError, LocalError
from protocols.events import KeepEntries, Recall
from protocols.feeds import START, FeedLimits, FeedSet, batch_bytes
from protocols.terms import hashed, query_terms
from protocols.vocabulary import MAX_BATCH_BYTES, MAX_ENTRIES_PER_BATCH, MAX_SEQ
from tests.protocols.identities import FakeSignatures

NETWORK = "net"
ME, ANN, BOB, EVE = (FakeSignatures(name) for name in ("me", "ann", "bob", "eve"))
NOW_S = 1_700_000_000.0
DAY = int(NOW_S // 86_400)
LIMITS = FeedLimits(max_authors=100, max_entries=10_000, window=1_000, expire_days=90)
EVERYTHING = 2**30


def item(number: int) -> bytes:
    return number.to_bytes(2, "big") * 16


def shared(number: int, title: str, *tags: str, day: int = DAY, **fields: Any) -> Shared:
    facts = {"creator": "", "media_type": "", "size_bytes": 1, "uri": "", "details": (), **fields}
    return Shared(item(number), day, Kind.FILE, title, tags=tags, **facts)


def click(number: int, *terms: str, rank: int = 1) -> Click:
    return Click(item(number), DAY, terms, rank)


class Author:
    """Somebody with a feed of each kind, and what is said in them."""

    def __init__(self, signatures: FakeSignatures) -> None:
        self.key = signatures.author
        self.feeds = {feed: FeedSet(NETWORK, feed, signatures, LIMITS) for feed in Feed}

    def says(self, *entries: Entry) -> KeepEntries:
        feed = Feed.CLICKS if isinstance(entries[0], Click) else Feed.CATALOGUE
        return KeepEntries(feed, tuple(self.feeds[feed].publish(entries, NOW_S)))

    def begins_anew(self, feed: Feed) -> KeepEntries:
        batch, cut = self.feeds[feed].begin_anew(DAY, NOW_S)
        return KeepEntries(feed, (batch,), (cut,))


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library(tmp_path, ME.author, NETWORK) as opened:
        yield opened


def reopened(home: Path, **options: Any) -> Library:
    return Library(home, ME.author, NETWORK, **options)


def after_a_crash(home: Path, **options: Any) -> Library:
    """The library as a process finds it that comes after one that was killed: nothing was closed."""
    copy = Path(tempfile.mkdtemp(dir=home))
    for file in home.glob(DATABASE + "*"):
        shutil.copy(file, copy)
    return reopened(copy, **options)


def titles(found: list[Result]) -> list[str]:
    return [result.entry.title for result in found]


def everything(library: Library) -> dict[Feed, tuple[Batch, ...]]:
    return {
        feed: library.recall(
            Recall(1, feed, tuple(Want(head.author, head.epoch, 0, MAX_SEQ) for head in heads), EVERYTHING)
        ).batches
        for feed, heads in library.heads()
    }


# --- keep and recall ------------------------------------------------------------------------------------
def test_what_was_said_comes_back_as_it_was_signed(library: Library) -> None:
    ann = Author(ANN)
    library.keep(ann.says(shared(1, "one"), shared(2, "two")))
    library.keep(ann.says(Withdrawn(item(1), DAY)))
    (batch,) = everything(library)[Feed.CATALOGUE]
    assert batch.entries == (shared(1, "one"), shared(2, "two"), Withdrawn(item(1), DAY))
    node = FeedSet(NETWORK, Feed.CATALOGUE, BOB, LIMITS)
    assert node.take(batch, NOW_S).batch == batch
    assert dict(library.heads())[Feed.CATALOGUE] == tuple(node.heads())


def test_a_second_time_changes_nothing(library: Library) -> None:
    ann = Author(ANN)
    said = [
        ann.says(shared(1, "one"), shared(2, "two")),
        ann.says(shared(3, "three")),
        ann.says(click(1, "one")),
    ]
    for effect in said:
        library.keep(effect)
    before = (library.heads(), everything(library), library.counts().entries, library.search("one"))
    for effect in said:
        library.keep(effect)
    assert (library.heads(), everything(library), library.counts().entries, library.search("one")) == before


def test_of_an_overlap_only_what_is_new_is_taken(library: Library) -> None:
    ann = Author(ANN)
    first, second = ann.says(shared(1, "one")).batches[0], ann.says(shared(2, "two")).batches[0]
    library.keep(KeepEntries(Feed.CATALOGUE, (first,)))
    library.keep(
        KeepEntries(
            Feed.CATALOGUE, (replace(second, first=1, prior=START, entries=first.entries + second.entries),)
        )
    )
    assert [entry.title for entry in everything(library)[Feed.CATALOGUE][0].entries] == ["one", "two"]
    assert library.counts().entries == 2


@given(order=st.permutations(range(6)))
@settings(max_examples=15, deadline=None)
def test_the_order_of_different_authors_does_not_matter(order: list[int]) -> None:
    said = [
        [author.says(shared(n, f"jaguar {n}")), author.says(click(n, "jaguar"))]
        for n, author in enumerate([Author(ANN), Author(BOB), Author(EVE)])
    ]
    effects = [effect for each in said for effect in each]
    seen = []
    for arrangement in (range(6), order):
        with tempfile.TemporaryDirectory() as folder, reopened(Path(folder)) as library:
            for place in arrangement:
                library.keep(effects[place])
            found = library.search("jaguar", isolation=1.0)
            seen.append((in_order(library.heads()), in_order(everything(library).items()), found))
    assert seen[0] == seen[1]


def in_order(of_feeds: Iterable[tuple[Feed, Iterable[Any]]]) -> list[Any]:
    """By author: an order that is not that of arrival."""
    return [(feed, sorted(each, key=lambda one: one.author)) for feed, each in of_feeds]


def test_who_was_heard_of_first_stays_first(library: Library) -> None:
    """Whoever came last makes room first (see `FeedSet`), also after a restart and whatever is said anew."""
    ann, bob, eve = Author(ANN), Author(BOB), Author(EVE)
    for author in (eve, bob, ann):
        library.keep(author.says(shared(1, "one")))
    library.keep(eve.begins_anew(Feed.CATALOGUE))
    later = replace(bob.says(shared(5, "late")).batches[0], first=50, prior=b"p" * 16)
    library.keep(KeepEntries(Feed.CATALOGUE, (later,), (Cut(BOB.author, later.epoch, 50),)))
    assert [head.author for head in dict(library.heads())[Feed.CATALOGUE]] == [eve.key, bob.key, ann.key]


@pytest.mark.parametrize("signatures", [ME, ANN], ids=["own", "another's"])
def test_what_the_disk_has_lost_ends_nothing(library: Library, signatures: FakeSignatures) -> None:
    """A batch that was not kept: what comes after it is refused, until the core goes on where the library stands."""
    author, peer = Author(signatures), FeedSet(NETWORK, Feed.CATALOGUE, BOB, LIMITS)
    library.keep(author.says(shared(1, "one"), shared(2, "two")))
    before = told(library)
    author.says(shared(3, "lost"))
    with pytest.raises(LocalError, match="up to 3 are not held"):
        library.keep(KeepEntries(Feed.CATALOGUE, author.says(shared(4, "four")).batches))
    assert told(library) == before
    author.feeds[Feed.CATALOGUE].load(dict(library.heads())[Feed.CATALOGUE])
    library.keep(author.says(shared(5, "five")))
    (batch,) = everything(library)[Feed.CATALOGUE]
    assert [entry.title for entry in batch.entries] == ["one", "two", "five"]
    assert peer.take(batch, NOW_S).batch == batch


def test_no_own_entry_is_taken_for_kept_that_is_not(library: Library) -> None:
    """The core may have read where the library stands a moment before an entry was kept."""
    me = Author(ME)
    library.keep(me.says(shared(1, "one")))
    heads = dict(library.heads())[Feed.CATALOGUE]
    library.keep(me.says(shared(2, "two")))
    me.feeds[Feed.CATALOGUE].load(heads)
    with pytest.raises(LocalError, match="not held"):
        library.keep(me.says(shared(3, "other")))
    me.feeds[Feed.CATALOGUE].load([replace(heads[0], last=2, chain=b"x" * 16)])
    with pytest.raises(LocalError, match="not held"):
        library.keep(me.says(shared(3, "other")))
    assert library.search("other") == []


def test_a_batch_that_is_brought_ends_where_its_author_signed(library: Library) -> None:
    ann = Author(ANN)
    for size in (3, 2, 4):
        library.keep(ann.says(*(shared(n, f"title {n}") for n in range(size))))
    for limit, expected in ((2, 0), (3, 3), (4, 3), (5, 5), (8, 5), (9, 9), (100, 9)):
        want = Want(ANN.author, _epoch(library, ANN), 0, limit)
        batches = library.recall(Recall(1, Feed.CATALOGUE, (want,), EVERYTHING)).batches
        assert sum(len(batch.entries) for batch in batches) == expected
        assert all(
            FeedSet(NETWORK, Feed.CATALOGUE, BOB, LIMITS).take(batch, NOW_S).batch for batch in batches
        )


def test_a_peer_that_has_the_beginning_gets_the_rest(library: Library) -> None:
    ann = Author(ANN)
    library.keep(ann.says(*(shared(n, f"title {n}") for n in range(5))))
    library.keep(ann.says(shared(5, "last")))
    (whole,) = everything(library)[Feed.CATALOGUE]
    for after in range(6):
        want = Want(ANN.author, whole.epoch, after, 100)
        (rest,) = library.recall(Recall(7, Feed.CATALOGUE, (want,), EVERYTHING)).batches
        assert (rest.first, rest.entries) == (after + 1, whole.entries[after:])
        assert FeedSet(NETWORK, Feed.CATALOGUE, BOB, LIMITS).take(rest, NOW_S).batch == rest


def test_nothing_is_brought_of_another_epoch_or_of_a_stranger(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "one")))
    wants = (Want(ANN.author, _epoch(library, ANN) + 1, 0, 9), Want(BOB.author, 1, 0, 9))
    assert library.recall(Recall(1, Feed.CATALOGUE, wants, EVERYTHING)).batches == ()
    assert library.recall(Recall(1, Feed.CLICKS, wants, EVERYTHING)).batches == ()


@pytest.mark.parametrize("chars", [1, 240])
def test_batches_are_no_longer_than_a_batch_may_be(library: Library, chars: int) -> None:
    ann, bob = Author(ANN), Author(BOB)
    details = tuple((f"key {n}", "x" * chars) for n in range(16))
    for author in (ann, bob):
        for n in range(70):
            library.keep(author.says(*(shared(4 * n + k, "t", details=details) for k in range(4))))
    batches = everything(library)[Feed.CATALOGUE]
    assert sum(len(batch.entries) for batch in batches) == 560
    assert max(len(batch.entries) for batch in batches) <= MAX_ENTRIES_PER_BATCH
    assert max(map(batch_bytes, batches)) <= MAX_BATCH_BYTES
    wants = tuple(Want(author.key, batches[0].epoch, 0, 280) for author in (ann, bob))
    for max_bytes in (0, batch_bytes(batches[0]) - 1, batch_bytes(batches[0]), 100_000, 200_000):
        some = library.recall(Recall(1, Feed.CATALOGUE, wants, max_bytes)).batches
        assert sum(map(batch_bytes, some)) <= max_bytes
        assert bool(some) == (max_bytes >= batch_bytes(batches[0]))


# --- cuts -----------------------------------------------------------------------------------------------
def test_what_is_cut_is_neither_found_nor_brought_nor_counted(library: Library) -> None:
    ann = Author(ANN)
    library.keep(ann.says(shared(1, "jaguar one"), shared(2, "jaguar two")))
    library.keep(ann.says(click(1, "jaguar"), click(2, "jaguar"), click(2, "jaguar")))
    epoch = _epoch(library, ANN)
    library.keep(KeepEntries(Feed.CATALOGUE, (), (Cut(ANN.author, epoch, 2),)))
    library.keep(KeepEntries(Feed.CLICKS, (), (Cut(ANN.author, epoch, 3),)))
    assert [(r.entry.title, r.clicks) for r in library.search("jaguar")] == [("jaguar two", 1.0)]
    assert library.counts().clicks == 1
    for batches in everything(library).values():
        (batch,) = batches
        fresh = FeedSet(NETWORK, Feed.CATALOGUE, BOB, LIMITS)
        assert len(batch.entries) == 1
        assert batch.entries[0].item == item(2)
        if isinstance(batch.entries[0], Shared):
            assert fresh.take(batch, NOW_S).batch == batch


def test_a_feed_that_is_begun_anew_replaces_what_was_said(library: Library) -> None:
    ann = Author(ANN)
    library.keep(ann.says(shared(1, "jaguar")))
    library.keep(ann.says(click(1, "jaguar")))
    for feed in Feed:
        library.keep(ann.begins_anew(feed))
    assert library.search("jaguar") == []
    assert library.counts().clicks == 0
    assert [batch.entries for batches in everything(library).values() for batch in batches] == [
        (Begun(DAY),)
    ] * 2
    library.keep(ann.says(shared(2, "puma")))
    assert titles(library.search("puma")) == ["puma"]


def test_who_told_two_stories_is_silent_and_stays_so(library: Library) -> None:
    ann = Author(ANN)
    said = ann.says(shared(1, "jaguar"), shared(2, "jaguar"))
    library.keep(said)
    library.keep(KeepEntries(Feed.CATALOGUE, (), (Cut(ANN.author, _epoch(library, ANN), 3, void=True),)))
    before = library.heads()
    (head,) = dict(before)[Feed.CATALOGUE]
    assert head.void
    assert (head.first, head.last) == (3, 2)
    library.keep(said)
    library.keep(ann.says(shared(3, "jaguar")))
    assert library.search("jaguar") == []
    assert everything(library)[Feed.CATALOGUE] == ()
    assert library.heads() == before
    library.keep(ann.begins_anew(Feed.CATALOGUE))
    assert not dict(library.heads())[Feed.CATALOGUE][0].void


def test_a_liar_for_whom_there_is_no_room_is_forgotten_too(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "jaguar")))
    epoch = _epoch(library, ANN)
    library.keep(KeepEntries(Feed.CATALOGUE, (), (Cut(ANN.author, epoch, 2, void=True),)))
    library.keep(KeepEntries(Feed.CATALOGUE, (), (Cut(ANN.author, epoch, MAX_SEQ),)))
    assert dict(library.heads())[Feed.CATALOGUE] == ()


def test_an_author_for_whom_there_is_no_room_leaves_nothing(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "jaguar")))
    library.keep(KeepEntries(Feed.CATALOGUE, (), (Cut(ANN.author, _epoch(library, ANN), MAX_SEQ),)))
    assert dict(library.heads())[Feed.CATALOGUE] == ()
    assert library.search("jaguar") == []
    library.keep(Author(ANN).says(shared(1, "jaguar")))
    assert titles(library.search("jaguar")) == ["jaguar"]


def test_cuts_come_first_however_much_of_one_author_is_in_an_effect(library: Library) -> None:
    ann = Author(ANN)
    old = ann.says(shared(1, "old"))
    new = ann.begins_anew(Feed.CATALOGUE)
    library.keep(KeepEntries(Feed.CATALOGUE, (*old.batches, *new.batches), new.cuts))
    assert [batch.entries for batch in everything(library)[Feed.CATALOGUE]] == [(Begun(DAY),)]
    assert library.items() == []
    (head,) = dict(library.heads())[Feed.CATALOGUE]
    gap = replace(ann.says(shared(5, "late")).batches[0], first=50, prior=b"p" * 16)
    library.keep(KeepEntries(Feed.CATALOGUE, (gap,), (Cut(ANN.author, head.epoch, 50),)))
    assert [(h.first, h.last) for h in dict(library.heads())[Feed.CATALOGUE]] == [(50, 50)]


def test_what_comes_and_goes_in_one_effect_was_never_there(library: Library) -> None:
    ann = Author(ANN)
    old, new = ann.says(click(1, "jaguar"), click(2, "jaguar")), ann.begins_anew(Feed.CLICKS)
    library.keep(KeepEntries(Feed.CLICKS, (*old.batches, *new.batches), new.cuts))
    assert library.counts().clicks == 0
    more = ann.says(*(click(n, "jaguar") for n in range(9)))
    library.keep(KeepEntries(Feed.CLICKS, more.batches, (Cut(ann.key, _epoch(library, ANN), 8),)))
    assert library.counts().clicks == 3
    assert [(head.first, head.last) for head in dict(library.heads())[Feed.CLICKS]] == [(8, 10)]


def _epoch(library: Library, author: FakeSignatures) -> int:
    (epoch,) = {head.epoch for _, heads in library.heads() for head in heads if head.author == author.author}
    return epoch


# --- search ---------------------------------------------------------------------------------------------
def test_words_are_found_wherever_they_stand(library: Library) -> None:
    library.keep(
        Author(ANN).says(
            shared(1, "Spirals", "two moons", creator="Ada", details=(("task", "classify"),)),
            shared(2, "Paper", uri="https://example.org/gossip/learning.pdf"),
        )
    )
    for word in ("spirals", "SPIRALS", "moons", "ada", "classify"):
        assert titles(library.search(word)) == ["Spirals"], word
    for word in ("gossip", "example", "pdf"):
        assert titles(library.search(word)) == ["Paper"], word
    assert library.search("task") == []
    assert library.search("") == library.search("?!") == []


@pytest.mark.parametrize(
    ("title", "query"),
    [
        ("日本語の音楽", "日本語"),
        ("日本語の音楽", "音楽"),
        ("日本語の音楽", "音"),
        ("Война и мир", "ВОЙНА"),
        ("Война и мир", "вой"),
        ("Café Zoë Ångström", "cafe"),
        ("Cafe\u0301", "CAFÉ"),
        ("ﬁne Straße", "fine strasse"),
        ("ภาษาไทย", "ภาษา"),
        ("한국어 노래", "노래"),
        ("हिन्दी", "हिन्दी"),
        ("العربية", "العربية"),
        ("𠮷野家", "𠮷野"),
        ("𞤀𞤣𞤤𞤢𞤥", "𞤀𞤣𞤤𞤢𞤥"),
    ],
)
def test_words_of_any_language_are_found(library: Library, title: str, query: str) -> None:
    library.keep(Author(ANN).says(shared(1, title), shared(2, "nothing of the kind")))
    assert titles(library.search(query)) == [title]


def test_items_with_more_of_the_words_come_first(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "red house"), shared(2, "red"), shared(3, "house")))
    library.keep(Author(BOB).says(click(2, "red"), click(2, "red"), click(3, "house")))
    found = library.search("red house blue")
    assert titles(found) == ["red house", "red", "house"]
    assert [result.matched for result in found] == [("red", "house"), ("red",), ("house",)]
    assert [result.rank for result in found] == [1, 2, 3]
    assert titles(library.search("red house", limit=1)) == ["red house"]


def test_a_beginning_is_enough_where_no_word_is_found(library: Library) -> None:
    ann = Author(ANN)
    library.keep(ann.says(shared(1, "jaguar"), shared(2, "jag")))
    assert titles(library.search("jag")) == ["jag"]
    assert sorted(titles(library.search("ja"))) == ["jag", "jaguar"]
    assert {result.matched for result in library.search("ja")} == {("ja",)}
    assert library.search("puma ja") == library.search("ja puma")
    # What was clicked for the whole word counts for its beginning.
    library.keep(Author(BOB).says(click(1, "jaguar")))
    assert titles(library.search("ja")) == ["jaguar", "jag"]
    library.keep(ann.says(*(shared(n, f"word{n:03}") for n in range(10, 60))))
    assert sorted(titles(library.search("word", limit=100))) == [f"word{n:03}" for n in range(10, 26)]


def test_a_result_says_why_it_is_there(library: Library) -> None:
    ann, bob = Author(ANN), Author(BOB)
    library.keep(ann.says(shared(1, "Jaguar", "big cats", "film"), shared(2, "Jaguar car")))
    library.keep(bob.says(click(1, "cats"), click(1, "cats"), click(2, "jaguar")))
    library.keep(ann.says(click(1, "cats"), click(9, "other")))
    library.click(("cats",), item(1), 1, NOW_S)
    (result,) = library.search("cats")
    assert (result.item, result.matched, result.tags) == (item(1), ("cats",), ("big cats",))
    assert (result.clicks, result.clickers) == (4.0, 3)
    assert (result.similar_clicks, result.similar_peers, result.similarity) == (3.0, 2, 1.0)
    assert result.sharers == (ANN.author,)


def test_who_clicks_for_several_of_the_words_is_one_clicker(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "big cats"), shared(2, "big"), shared(3, "big")))
    library.keep(
        Author(BOB).says(click(1, "big"), click(1, "cats"), click(1, "big", "cats"), click(2, "big"))
    )
    library.keep(Author(EVE).says(click(1, "cats"), click(1, "unasked")))
    library.click(("other",), item(2), 1, NOW_S)
    found = library.search("big cats")
    assert [(r.item, r.clicks, r.clickers) for r in found] == [
        (item(1), 5.0, 2),
        (item(2), 1.0, 1),
        (item(3), 0.0, 0),
    ]
    assert [(r.similar_clicks, r.similar_peers, r.similarity) for r in found] == [
        (4.0, 1, 1.0),
        (1.0, 1, 1.0),
        (0.0, 0, 0.0),
    ]


def test_the_operators_own_click_counts_at_once(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "jaguar a"), shared(2, "jaguar b")))
    for chosen in (1, 2, 2):
        library.click(("jaguar",), item(chosen), 1, NOW_S)
    assert library.search("jaguar")[0].item == item(2)


def test_those_who_click_alike_decide_and_popularity_does_not_see_it(library: Library) -> None:
    """A query of two meanings (papers of G-Rank and ours): who clicked cats before gets the cat first."""
    library.keep(
        Author(ANN).says(
            shared(1, "jaguar car"), shared(2, "jaguar cat"), shared(3, "lion"), shared(4, "audi")
        )
    )
    for number in range(5):
        library.keep(Author(FakeSignatures(f"driver {number}")).says(click(4, "audi"), click(1, "jaguar")))
    library.keep(Author(BOB).says(click(3, "lion"), click(2, "jaguar")))
    library.click(("lion",), item(3), 1, NOW_S)
    assert library.search("jaguar", isolation=0.0)[0].item == item(2)
    assert library.search("jaguar", ranker="popularity")[0].item == item(1)


def test_hashed_and_plain_clicks_meet(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "jaguar a"), shared(2, "jaguar b")))
    library.keep(Author(BOB).says(click(2, hashed("jaguar", NETWORK))))
    library.keep(Author(EVE).says(click(2, "jaguar"), click(1, hashed("jaguar", "another network"))))
    found = library.search("jaguar")
    assert [(result.item, result.clicks) for result in found] == [(item(2), 2.0), (item(1), 0.0)]


def test_what_only_clicks_name_is_last_or_left_out(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "jaguar"), shared(60, "puma")))
    library.keep(Author(BOB).says(*(click(n, "jaguar") for n in range(2, 61))))
    found = library.search("jaguar", limit=2)
    assert titles(found) == ["jaguar", "puma"]
    assert [result.matched for result in found] == [("jaguar",), ()]


def test_an_item_is_shown_as_it_is_here_or_as_the_newest_has_it(library: Library) -> None:
    library.keep(Author(ANN).says(shared(1, "old name", day=DAY - 3)))
    library.keep(Author(BOB).says(shared(1, "new name")))
    assert library.entry(item(1)) == shared(1, "new name")
    assert library.sharers(item(1)) == [BOB.author, ANN.author]
    # What matched is what is shown, so that a result never looks out of place.
    assert titles(library.search("old")) == ["old name"]
    me = Author(ME)
    library.keep(me.says(shared(1, "own name", day=DAY - 5)))
    assert library.entry(item(1)) == shared(1, "own name", day=DAY - 5)
    assert titles(library.search("name")) == ["own name"]
    library.keep(me.says(Withdrawn(item(1), DAY)))
    assert library.sharers(item(1)) == [BOB.author, ANN.author]
    assert library.entry(item(7)) is None


def test_what_nobody_describes_is_not_even_looked_for(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no end of items that clicks can name."""
    library.keep(Author(ANN).says(shared(1, "jazz")))
    library.keep(Author(EVE).says(*(click(number, "jazz") for number in range(100, 200))))
    looked_for, shares = list[bytes](), library._catalogue.shares

    def shares_of(item: bytes, *, first: bytes = b"") -> list[Any]:
        looked_for.append(item)
        return shares(item, first=first)

    monkeypatch.setattr(library._catalogue, "shares", shares_of)
    assert titles(library.search("jazz", isolation=1.0)) == ["jazz"]
    assert set(looked_for) == {item(1)}


def test_what_most_say_of_an_item_counts_more_than_the_newest_word(library: Library) -> None:
    for author, title in ((Author(ANN), "ann's"), (Author(BOB), "bob's")):
        library.keep(author.says(shared(1, title, size_bytes=7)))
    library.keep(Author(EVE).says(shared(1, "eve's", day=DAY + 1, size_bytes=9)))
    assert library.claims(item(1)) == [(Kind.FILE, 7), (Kind.FILE, 9)]
    entry = library.entry(item(1))
    assert entry is not None
    assert entry.size_bytes == 7
    assert library.sharers(item(1))[2] == EVE.author


def test_a_later_entry_of_a_sharer_replaces_the_earlier(library: Library) -> None:
    ann = Author(ANN)
    library.keep(ann.says(shared(1, "first")))
    library.keep(Author(BOB).says(click(2, "first"), click(1, "second")))
    assert titles(library.search("first")) == ["first"]
    library.keep(ann.says(shared(1, "second")))
    assert library.search("first") == []
    assert titles(library.search("second")) == ["second"]
    # The first is cut from the feed: the second has nothing to do with it.
    library.keep(KeepEntries(Feed.CATALOGUE, (), (Cut(ANN.author, _epoch(library, ANN), 2),)))
    assert titles(library.search("second")) == ["second"]
    library.keep(ann.says(Withdrawn(item(1), DAY)))
    assert library.search("second") == []


def test_sharing_and_withdrawing_again_and_again_takes_no_room(tmp_path: Path) -> None:
    with reopened(tmp_path) as library:
        ann = Author(ANN)
        library.keep(ann.says(shared(9, "puma")))
        for number in range(50):
            library.keep(
                ann.says(shared(number % 3, f"jaguar {number}"), Withdrawn(item((number + 1) % 3), DAY))
            )
            library.keep(ann.says(shared(4, "lion")))
        expected = library.search("jaguar")
    with sqlite3.connect(tmp_path / DATABASE) as db:
        assert db.execute("SELECT max(id) FROM shares").fetchone()[0] <= 6
    db.close()
    with reopened(tmp_path) as library:
        assert library.search("jaguar") == expected
        assert sorted(titles(library.search("puma lion"))) == ["lion", "puma"]


def test_ever_new_items_take_no_more_room_than_those_that_are_kept(tmp_path: Path) -> None:
    """Clicked and shared alike, in the memory and in the snapshot."""
    ann, window = Author(ANN), 20
    limits = LIMITS._replace(window=window)
    feeds = {feed: FeedSet(NETWORK, feed, BOB, limits) for feed in Feed}
    with reopened(tmp_path) as library:
        for number in range(40 * window):
            for entry in (click(number, "jazz"), shared(1000 + number, "jazz")):
                effect = ann.says(entry)
                taken = feeds[effect.feed].take(effect.batches[0], NOW_S)
                library.keep(replace(effect, cuts=taken.cuts))
        assert library._clicks.log.num_items <= 2 * window + 2
        kept = everything(library)
        found = [result.item for result in library.search("jazz", limit=1000)]
        assert sorted(found) == sorted(entry.item for entry in kept[Feed.CATALOGUE][0].entries)
    with reopened(tmp_path) as library:
        assert library._clicks.log.num_items == 2 * window
        assert everything(library) == kept


@pytest.mark.parametrize("ranker", ["g-rank", "g-rank-capped", "popularity", "panache", "maay", "bm25"])
def test_every_ranker_answers(library: Library, ranker: str) -> None:
    library.keep(Author(ANN).says(shared(1, "jaguar"), shared(2, "jaguar jaguar jaguar")))
    assert len(library.search("jaguar", ranker=ranker)) == 2
    library.keep(Author(BOB).says(click(1, "jaguar")))
    assert len(library.search("jaguar", ranker=ranker)) == 2
    assert library.search("puma", ranker=ranker) == []


def test_bm25_is_the_text_alone(library: Library) -> None:
    library.keep(
        Author(ANN).says(shared(1, "jaguar and much else beside"), shared(2, "jaguar"), shared(3, "x"))
    )
    library.keep(Author(BOB).says(click(1, "jaguar")))
    assert titles(library.search("jaguar", ranker="bm25"))[0] == "jaguar"
    assert library.search("jaguar")[0].item == item(1)


def test_there_is_no_such_ranker(library: Library) -> None:
    with pytest.raises(ConfigError, match=r"no ranker called 'best'.*g-rank"):
        library.search("x", ranker="best")
    with pytest.raises(ConfigError, match="isolation"):
        library.search("x", isolation=-1.0)


def test_clicks_far_down_count_more_where_the_operator_wants_it(tmp_path: Path) -> None:
    with reopened(tmp_path, settings=ContentConfig(position_weights=True)) as library:
        library.keep(Author(ANN).says(shared(1, "jaguar a"), shared(2, "jaguar b")))
        bob = Author(BOB)
        library.keep(bob.says(click(1, "jaguar"), click(1, "jaguar"), click(2, "jaguar", rank=7)))
        assert [(r.item, r.clicks) for r in library.search("jaguar")] == [(item(2), 3.0), (item(1), 2.0)]
        library.keep(KeepEntries(Feed.CLICKS, (), (Cut(BOB.author, _epoch(library, BOB), 4),)))
        assert library.counts().clicks == 0


# --- hostile text ---------------------------------------------------------------------------------------
HOSTILE = [
    'jaguar" OR "x',
    "jaguar NOT x",
    "jaguar NEAR(x, 2)",
    "text : jaguar",
    "jaguar*",
    "^jaguar",
    "{jaguar}",
    "(jaguar",
    "jaguar\x00x\x1b[2J",
    "'); DROP TABLE entries; --",
    '"); DELETE FROM texts; --',
    "jaguar' OR 1=1",
    "\ud800jaguar".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
    "%s ? :item",
    "AND OR NOT",
    "-jaguar +x",
    "jaguar\u202e\u200b",
]


def printable(text: str) -> str:
    """As an entry may hold it: whatever else a peer sends does not get through the codec."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", " ", text)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_a_command(library: Library, text: str) -> None:
    """Neither of a query nor of an entry: it is words, and those are found."""
    library.keep(Author(ANN).says(shared(1, "jaguar"), shared(2, "puma")))
    library.search(text)
    said = printable(text)
    library.keep(Author(EVE).says(shared(3, said, said, creator=said, details=((said[:32], said),))))
    assert item(3) in [result.item for result in library.search(text)]
    assert library.counts().items == 3
    assert titles(library.search("puma")) == ["puma"]


@given(text=st.text(max_size=40), query=st.text(max_size=20))
@settings(max_examples=40, deadline=None)
def test_any_text_can_be_shared_and_searched(text: str, query: str) -> None:
    with tempfile.TemporaryDirectory() as folder, reopened(Path(folder)) as library:
        library.keep(Author(ANN).says(shared(1, printable(text) or "-")))
        library.search(query)
        for word in query_terms(printable(text)):
            assert [result.item for result in library.search(word)] == [item(1)]


# --- lists ----------------------------------------------------------------------------------------------
def test_what_is_shared_is_listed_newest_first(library: Library) -> None:
    ann, bob = Author(ANN), Author(BOB)
    library.keep(ann.says(shared(1, "a", day=DAY - 2), shared(2, "b", day=DAY - 1)))
    library.keep(bob.says(shared(3, "c"), shared(1, "a too")))
    assert library.items() == [item(1), item(3), item(2)]
    assert library.items(limit=1, offset=1) == [item(3)]
    assert library.items(ann.key) == [item(2), item(1)]
    assert library.items(EVE.author) == []
    counts = library.counts()
    assert (counts.entries, counts.authors, counts.items, counts.clicks) == (4, 2, 3, 0)
    assert counts.size_bytes > 0


def test_items_are_found_by_the_beginning_of_their_digest(library: Library) -> None:
    library.keep(Author(ANN).says(shared(0x1234, "a"), shared(0x1235, "b"), shared(0xFFFF, "c")))
    assert library.find("123") == [item(0x1234), item(0x1235)]
    assert library.find("1235") == [item(0x1235)]
    assert library.find("F") == library.find(item(0xFFFF).hex()) == [item(0xFFFF)]
    for text in ("", "xyz", "12 ", "%", "1" * 65, "'", "0"):
        assert library.find(text) == []


# --- own clicks -----------------------------------------------------------------------------------------
def test_own_clicks_are_kept_and_forgotten_without_a_trace(tmp_path: Path) -> None:
    with reopened(tmp_path) as library:
        library.keep(Author(ANN).says(shared(1, "jaguar a"), shared(2, "jaguar b")))
        library.keep(Author(BOB).says(click(1, "jaguar"), click(2, "jaguar")))
        newcomer = library.search("jaguar")
        library.click(("zzsecretword", "jaguar"), item(2), 2, NOW_S)
    with reopened(tmp_path) as library:
        (kept,) = library.history()
        assert (kept.at_s, kept.terms, kept.item, kept.rank) == (
            NOW_S,
            ("zzsecretword", "jaguar"),
            item(2),
            2,
        )
        assert library.search("jaguar") != newcomer
        assert library.counts().own_clicks == 1
        library.forget()
        assert library.history() == []
        assert library.search("jaguar") == newcomer
        with after_a_crash(tmp_path) as after:
            assert after.search("jaguar") == newcomer
            assert after.history() == []
        secrets = (b"zzsecretword", hashed("zzsecretword", NETWORK).encode())
        for file in tmp_path.glob(DATABASE + "*"):
            assert not [secret for secret in secrets if secret in file.read_bytes()]


def test_what_is_forgotten_stays_so_whatever_fails(tmp_path: Path) -> None:
    with reopened(tmp_path) as library:
        library.keep(Author(ANN).says(shared(1, "jaguar a"), shared(2, "jaguar b")))
        library.click(("jaguar",), item(2), 2, NOW_S)
    with reopened(tmp_path) as library:
        refuse_snapshots(tmp_path)
        with pytest.raises(LocalError, match="full"):
            library.forget()
        with after_a_crash(tmp_path) as after:
            assert [result.clicks for result in after.search("jaguar")] == [0.0, 0.0]


def refuse_snapshots(home: Path) -> None:
    other = sqlite3.connect(home / DATABASE)
    other.execute("CREATE TRIGGER full BEFORE INSERT ON snapshot BEGIN SELECT raise(FAIL, 'full'); END")
    other.commit()
    other.close()


def test_what_the_node_published_of_its_own_clicks_is_not_counted_twice(
    library: Library, tmp_path: Path
) -> None:
    library.click(("jaguar",), item(1), 1, NOW_S)
    me = Author(ME)
    library.keep(me.says(shared(1, "jaguar")))
    library.keep(me.says(click(1, "jaguar")))
    (found,) = library.search("jaguar")
    assert (found.clicks, found.clickers, found.similar_peers) == (1.0, 1, 0)
    with after_a_crash(tmp_path) as after:
        assert after.search("jaguar") == [found]
    library.keep(me.begins_anew(Feed.CLICKS))
    assert library.search("jaguar")[0].clicks == 1.0
    assert library.counts().clicks == 1


def test_a_click_that_cannot_be_counted_is_not_kept(library: Library) -> None:
    for terms, rank in ((), 1), (("jaguar",), 0):
        with pytest.raises(ValueError, match="at least one word"):
            library.click(terms, item(1), rank, NOW_S)
    assert library.history() == []


def test_only_its_owner_reads_the_file(library: Library, tmp_path: Path) -> None:
    assert {file.stat().st_mode & 0o077 for file in tmp_path.glob(DATABASE + "*")} == {0}


# --- snapshots ------------------------------------------------------------------------------------------
@pytest.fixture
def many_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_clicks, "MIN_CLICKS_PER_SNAPSHOT", 3)
    monkeypatch.setattr(library_clicks, "SNAPSHOT_SHARE", 0.0)


def filled(library: Library) -> list[Result]:
    library.keep(Author(ANN).says(*(shared(n, f"jaguar {n}") for n in range(5))))
    library.keep(Author(BOB).says(*(click(n % 5, "jaguar") for n in range(11))))
    library.click(("jaguar",), item(3), 1, NOW_S)
    return library.search("jaguar")


def damage_bytes(db: sqlite3.Connection) -> None:
    db.execute("UPDATE snapshot SET data = zeroblob(length(data)) WHERE name = 'row_clicks'")


def damage_checksum(db: sqlite3.Connection) -> None:
    db.execute("UPDATE snapshot SET crc = crc + 1 WHERE name = 'row_items'")


def lose_an_array(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM snapshot WHERE name = 'row_items'")


def lose_all(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM snapshot")


@pytest.mark.parametrize("harm", [damage_bytes, damage_checksum, lose_an_array, lose_all])
def test_a_damaged_snapshot_is_made_anew(tmp_path: Path, harm: Callable[[sqlite3.Connection], None]) -> None:
    warnings: list[str] = []
    with reopened(tmp_path) as library:
        expected = filled(library)
    with sqlite3.connect(tmp_path / DATABASE) as db:
        harm(db)
    db.close()
    with reopened(tmp_path, warn=warnings.append) as library:
        assert library.search("jaguar") == expected
    assert len(warnings) == 1
    assert "damaged" in warnings[0]
    with reopened(tmp_path, warn=warnings.append) as library:
        assert library.search("jaguar") == expected
    assert len(warnings) == 1


def test_a_snapshot_is_no_object_that_could_run(tmp_path: Path) -> None:
    with reopened(tmp_path) as library:
        expected = filled(library)
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    with sqlite3.connect(tmp_path / DATABASE) as db:
        crc = library_clicks.zlib.crc32(file.getvalue())
        db.execute("UPDATE snapshot SET data = ?, crc = ?", (file.getvalue(), crc))
    db.close()
    warnings: list[str] = []
    with reopened(tmp_path, warn=warnings.append) as library:
        assert library.search("jaguar") == expected
    assert "pickle" in warnings[0]


def test_other_settings_count_the_clicks_anew(tmp_path: Path) -> None:
    warnings: list[str] = []
    with reopened(tmp_path) as library:
        filled(library)
    with reopened(tmp_path, settings=ContentConfig(top_terms=3), warn=warnings.append) as library:
        assert library.counts().clicks == 12
    assert "another way" in warnings[0]


@pytest.mark.usefixtures("many_snapshots")
def test_who_is_gone_since_the_snapshot_does_not_count_after_a_crash(tmp_path: Path) -> None:
    with reopened(tmp_path) as library:
        filled(library)
        epoch = _epoch(library, BOB)
    with reopened(tmp_path) as library:
        library.keep(KeepEntries(Feed.CLICKS, (), (Cut(BOB.author, epoch, 11),)))
        with after_a_crash(tmp_path) as after:
            assert after.search("jaguar") == library.search("jaguar")
            assert after.counts().clicks == 2
        library.keep(KeepEntries(Feed.CLICKS, (), (Cut(BOB.author, epoch, MAX_SEQ),)))
        with after_a_crash(tmp_path) as after:
            assert after.counts().clicks == 1


def test_a_file_that_is_no_database_is_told_of(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"no database at all" * 1000)
    with pytest.raises(LocalError, match=r"library.db.*damaged.*moved away"):
        reopened(tmp_path)


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    with reopened(tmp_path) as library:
        expected = filled(library)
        other = sqlite3.connect(tmp_path / DATABASE)
        other.execute(
            "CREATE TRIGGER full BEFORE INSERT ON entries WHEN new.seq = 2 BEGIN SELECT raise(FAIL, 'full'); END"
        )
        other.commit()
        before = (library.heads(), everything(library))
        with pytest.raises(LocalError, match="full"):
            library.keep(Author(EVE).says(click(0, "jaguar"), click(1, "jaguar")))
        with pytest.raises(LocalError, match="full"):
            library.keep(Author(EVE).says(shared(8, "jaguar"), shared(9, "jaguar")))
        assert (library.heads(), everything(library), library.search("jaguar")) == (*before, expected)
        other.close()


def test_what_is_refused_at_the_very_end_has_never_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = Author(ANN), Author(BOB)
    with reopened(tmp_path) as library:
        library.keep(ann.says(shared(1, "jazz record")))
        library.keep(bob.says(shared(9, "other thing")))
        before, num_items = told(library), library._clicks.log.num_items

        def refuse(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        effect = ann.says(Withdrawn(item(1), DAY), shared(2, "cooking"), shared(3, "jazz"))
        with monkeypatch.context() as patch:
            patch.setattr(library._clicks, "mark", refuse)
            with pytest.raises(LocalError, match="disk is full"):
                library.keep(effect)
        assert titles(library.search("jazz")) == ["jazz record"]
        assert told(library) == before
        assert library._clicks.log.num_items == num_items
        library.keep(effect)
        assert titles(library.search("jazz")) == ["jazz"]


def test_a_snapshot_that_cannot_be_written_is_no_loss(tmp_path: Path, many_snapshots: None) -> None:
    warnings: list[str] = []
    with reopened(tmp_path, warn=warnings.append) as library:
        refuse_snapshots(tmp_path)
        expected = filled(library)
    assert warnings
    assert "full" in warnings[0]
    with reopened(tmp_path) as library:
        assert library.search("jaguar") == expected


KILLED = """
import os, signal, sys
from pathlib import Path
from node import library_clicks
from tests.node.test_library import *
library_clicks.MIN_CLICKS_PER_SNAPSHOT = int(sys.argv[2])
library = reopened(Path(sys.argv[1]))
filled(library)
library.keep(Author(ME).says(shared(7, "jaguar of my own")))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("clicks_per_snapshot", [3, 1000])
def test_what_was_kept_outlives_kill_9(tmp_path: Path, clicks_per_snapshot: int) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "steady").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(clicks_per_snapshot)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with reopened(tmp_path / "killed") as killed, reopened(tmp_path / "steady") as steady:
        filled(steady)
        steady.keep(Author(ME).says(shared(7, "jaguar of my own")))
        assert told(killed) == told(steady)
        assert len(killed.search("jaguar")) == 6


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_file_is_told_of_and_never_worse(tmp_path: Path, seed: int) -> None:
    with reopened(tmp_path) as library:
        filled(library)
    rng = random.Random(seed)
    content = bytearray((tmp_path / DATABASE).read_bytes())
    for _ in range(20):
        at = rng.randrange(100, len(content) - 64)
        content[at : at + 64] = rng.randbytes(64)
    (tmp_path / DATABASE).write_bytes(content)
    with contextlib.suppress(LocalError), reopened(tmp_path) as library:
        told(library)
        library.items()
        filled(library)


def test_many_threads_may_ask_at_once(library: Library) -> None:
    ann = Author(ANN)
    said = [ann.says(shared(n, f"jaguar {n}")) for n in range(30)] + [
        ann.says(click(n, "jaguar")) for n in range(30)
    ]
    with ThreadPoolExecutor(4) as pool:
        kept = [pool.submit(lambda: [library.keep(effect) for effect in said])]
        asked = [pool.submit(library.search, "jaguar") for _ in range(100)]
        listed = [pool.submit(told, library) for _ in range(5)]
        for each in (*kept, *asked, *listed):
            each.result()
    assert len(library.search("jaguar", limit=100)) == 30


# --- restarts -------------------------------------------------------------------------------------------
authors_drawn = st.sampled_from(["ann", "bob", "eve", "me"])
steps = st.one_of(
    st.tuples(st.just("share"), authors_drawn, st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("withdraw"), authors_drawn, st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("click"), authors_drawn, st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("lie"), authors_drawn, st.sampled_from(Feed)),
    st.tuples(st.just("begin anew"), authors_drawn, st.sampled_from(Feed)),
    st.tuples(st.just("choose"), st.just("me"), st.integers(0, 5)),
    st.tuples(st.just("forget"), st.just("me"), st.just(0)),
    st.tuples(st.just("hear later"), st.just(""), st.integers(1, 4)),
    st.tuples(st.just("close"), st.just(""), st.just(0)),
    st.tuples(st.just("kill"), st.just(""), st.just(0)),
)
TINY = FeedLimits(max_authors=3, max_entries=1_000, window=4, expire_days=90)
COLOURS = ("red", "green", "blue", "красный")


class World:
    """A node's feeds and what its authors say; one library lives through all, the other is closed and killed now and then."""

    def __init__(self, folder: Path) -> None:
        self.names = {name: FakeSignatures(name) for name in ("ann", "bob", "eve", "me")}
        self.authors = {name: Author(key) for name, key in self.names.items()}
        self.feeds = {feed: FeedSet(NETWORK, feed, self.names["me"], TINY) for feed in Feed}
        self.waiting: list[KeepEntries] = []  # one effect for many batches, as a core has it
        self.num_waiting = 0
        self.folder = folder
        (folder / "steady").mkdir()
        (folder / "shaken").mkdir()
        self.steady, self.shaken = reopened(folder / "steady"), reopened(folder / "shaken")

    def step(self, what: str, who: str, of_what: Any) -> None:
        if what == "close":
            self.shaken.close()
            self.shaken = reopened(self.folder / "shaken", warn=pytest.fail)
        elif what == "kill":
            killed, self.shaken = self.shaken, after_a_crash(self.folder / "shaken", warn=pytest.fail)
            self.folder_of_shaken(killed)
        elif what == "hear later":
            self.num_waiting = of_what
        elif what == "choose":
            self.both(lambda library: library.click((COLOURS[of_what % 4],), item(of_what), 1, NOW_S))
        elif what == "forget":
            self.both(Library.forget)
        else:
            self.hear(self.said(what, self.authors[who], of_what))

    def folder_of_shaken(self, killed: Library) -> None:
        """What was killed is closed for the sake of the test alone; the copy takes its place."""
        killed.close()
        self.shaken.close()
        (copy,) = [path for path in (self.folder / "shaken").iterdir() if path.is_dir()]
        for file in (self.folder / "shaken").glob(DATABASE + "*"):
            file.unlink()
        for file in copy.iterdir():
            file.rename(self.folder / "shaken" / file.name)
        copy.rmdir()
        self.shaken = reopened(self.folder / "shaken", warn=pytest.fail)

    def both(self, call: Callable[[Library], None]) -> None:
        call(self.steady)
        call(self.shaken)

    def said(self, what: str, author: Author, of_what: Any) -> KeepEntries:
        if what == "begin anew":
            return author.begins_anew(of_what)
        if what == "lie":
            liar = Author(next(key for key in self.names.values() if key.author == author.key))
            liar.feeds[of_what].load(
                [replace(head, chain=b"x" * 16) for head in author.feeds[of_what].heads()]
            )
            return liar.says(click(1, "lie") if of_what is Feed.CLICKS else shared(1, "lie"))
        entries: dict[str, Callable[[int], Entry]] = {
            "share": lambda n: shared(n, COLOURS[n % 4], COLOURS[n // 4]),
            "withdraw": lambda n: Withdrawn(item(n), DAY),
            "click": lambda n: click(n, COLOURS[n % 4], COLOURS[n // 4 + 2]),
        }
        return author.says(*map(entries[what], of_what))

    def hear(self, effect: KeepEntries) -> None:
        feeds = self.feeds[effect.feed]
        for taken in [feeds.take(batch, NOW_S) for batch in effect.batches]:
            batches = () if taken.batch is None else (taken.batch,)
            last = self.waiting[-1] if self.waiting else None
            if taken.cuts or last is None or last.feed is not effect.feed:
                self.waiting.append(KeepEntries(effect.feed, batches, taken.cuts))
            else:
                self.waiting[-1] = replace(last, batches=last.batches + batches)
        self.num_waiting -= 1
        if self.num_waiting <= 0:
            self.flush()

    def flush(self) -> None:
        for effect in self.waiting:
            self.both(lambda library, effect=effect: library.keep(effect))
        self.waiting = []

    def check(self) -> None:
        self.flush()
        assert told(self.steady) == told(self.shaken)
        assert in_order(self.steady.heads()) == [(feed, self.feeds[feed].heads()) for feed in Feed]
        for feed, heads in self.steady.heads():
            assert [head.author for head in heads] == list(self.feeds[feed]._states)
        (self.folder / "fresh").mkdir()
        with reopened(self.folder / "fresh") as fresh:
            for feed, batches in everything(self.shaken).items():
                fresh.keep(KeepEntries(feed, batches))
            for click_ in reversed(self.shaken.history()):
                fresh.click(click_.terms, click_.item, click_.rank, click_.at_s)
            assert searched(fresh) == searched(self.shaken)
            assert everything(fresh) == everything(self.shaken)

    def close(self) -> None:
        self.both(Library.close)


def searched(library: Library) -> list[Any]:
    return [
        library.search(word, ranker=ranker)
        for word in (*COLOURS, "red blue")
        for ranker in ("g-rank", "maay")
    ]


def told(library: Library) -> list[Any]:
    counts = library.counts()
    return [
        library.heads(),
        everything(library),
        searched(library),
        library.history(),
        (counts.entries, counts.authors, counts.items, counts.clicks, counts.own_clicks),
    ]


@pytest.mark.usefixtures("many_snapshots")
@given(done=st.lists(steps, max_size=25))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_library_that_was_closed_and_killed_is_as_one_that_was_not(
    done: list[tuple[str, str, Any]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        try:
            for step in done:
                world.step(*step)
            world.check()
        finally:
            world.close()
