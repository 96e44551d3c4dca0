"""Feeds as sets: in whatever order, parts and number their entries come, and by whomever, all copies become the same."""

import hashlib
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from protocols.entries import Batch, Begun, Entry, Feed, FeedMark, Want, Withdrawn
from protocols.errors import PeerError
from protocols.feeds import (
    DAY_S,
    NOTHING,
    START,
    FeedLimits,
    FeedSet,
    batch_bytes,
    begins_with,
    chains,
    entry_bytes,
    head_bytes,
)
from protocols.vocabulary import (
    MAX_AUTHOR_BITS,
    MAX_BATCH_BYTES,
    MAX_ENTRIES_PER_BATCH,
    MAX_ENTRY_BYTES,
    MAX_MARKS_PER_MESSAGE,
    MAX_SEQ,
    Reason,
)
from tests.protocols.feed_copies import (
    EPOCH,
    LIMITS,
    NOW,
    PLENTY,
    TODAY,
    Copy,
    Story,
    click,
    clicks,
    shared,
)
from tests.protocols.identities import FakeSignatures

law = settings(derandomize=True, deadline=None, max_examples=100)
D1, D2 = bytes(range(32)), b"\xff" * 32


# --- vectors --------------------------------------------------------------------------------------------
def test_the_running_hash_never_changes() -> None:
    entries = [
        Begun(TODAY),
        replace(click(1), item=D2),
        replace(click(1), item=D1, terms=("東京", "#0123456789abcdef")),
    ]
    assert [each.hex() for each in chains(START, entries)] == [
        "75df2f1ea6e6fe1d57465f6a97adb77f",
        "dbe20867f2898d0516c9626de490787c",
        "31cfe7eacecfff3650712cc34a203d09",
    ]
    first = hashlib.sha256(START + bytes.fromhex("92a5626567756ecd4e20")).digest()
    assert chains(START, entries)[0] == first[:16], "of the entry as it travels, its tag first"


def test_the_signed_bytes_never_change() -> None:
    said = head_bytes("net", Feed.CLICKS, D1, EPOCH, 300, bytes(range(16)))
    assert said.hex() == (
        "636f766579206665656420310096a36e6574a6636c69636b73c420000102030405060708090a0b0c0d0e0f1011121314"
        "15161718191a1b1c1d1e1fce6553f100cd012cc410000102030405060708090a0b0c0d0e0f"
    )


# --- laws -----------------------------------------------------------------------------------------------
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=3)
cuts = st.lists(st.integers(1, 12), max_size=6)
ranges = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=6)


def stories(of: list[int]) -> list[Story]:
    """One author for each length."""
    return [Story(f"author {number}", clicks(length)) for number, length in enumerate(of)]


def overlapping(story: Story, ends: list[int], more: list[tuple[int, int]]) -> list[Batch]:
    """All of a story cut somehow, and some parts of it again in other cuts."""
    again = [(min(a, story.last), min(b, story.last)) for a, b in more]
    return [*story.batches(ends), *(story.batch(min(pair), max(pair)) for pair in again)]


@law
@given(lengths, cuts, ranges, st.randoms(use_true_random=False))
def test_order_repetition_cuts_and_overlap_do_not_matter(
    of: list[int], ends: list[int], more: list[tuple[int, int]], rng: random.Random
) -> None:
    said = stories(of)
    batches = [batch for story in said for batch in overlapping(story, ends, more)]
    batches += batches[: len(batches) // 2]
    rng.shuffle(batches)
    copy = Copy()
    copy.take(*(story.batch(1, 1) for story in said))  # who is given the end alone never has the beginning
    copy.settle(*batches)
    assert copy.heads() == sorted((story.head() for story in said), key=lambda head: head.author)
    for story in said:
        assert copy.entries(story.author) == story.entries
    assert copy.feeds.num_entries == sum(of)
    assert copy.take(*batches) == [NOTHING] * len(batches)


@law
@given(lengths, cuts, ranges, st.randoms(use_true_random=False))
def test_whatever_comes_first_all_come_as_far(
    of: list[int], ends: list[int], more: list[tuple[int, int]], rng: random.Random
) -> None:
    said = stories(of)
    batches = [batch for story in said for batch in overlapping(story, ends, more)]
    rng.shuffle(batches)
    copy = Copy()
    copy.settle(*batches)
    assert {head.author: (head.last, head.chain) for head in copy.heads()} == {
        story.author: (story.last, story.chains[-1]) for story in said
    }
    for story, head in zip(sorted(said, key=lambda each: each.author), copy.heads(), strict=True):
        assert copy.entries(story.author) == story.entries[head.first - 1 :], "without a gap"


@law
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 13),
    st.randoms(use_true_random=False),
)
def test_copies_that_ask_each_other_become_the_same(
    has: list[tuple[int, int, int]], per_author: int, rng: random.Random
) -> None:
    """Each copy begins with the beginnings of some authors, then random ones ask random ones until nobody gets anything."""
    said = stories([12, 12, 12])
    copies = [Copy(f"copy {number}") for number in range(4)]
    furthest: dict[bytes, Story] = {}
    for copy, number, last in has:
        copies[copy].take(said[number].batch(1, last))
        known = furthest.get(said[number].author)
        if known is None or known.last < last:
            furthest[said[number].author] = Story(f"author {number}", clicks(last))
    pairs = [(a, b) for a in copies for b in copies if a is not b]
    while True:
        rng.shuffle(pairs)
        if not sum([a.pull(b, per_author=max(12, per_author)) for a, b in pairs]):
            break
    expected = sorted((story.head() for story in furthest.values()), key=lambda head: head.author)
    for copy in copies:
        assert copy.heads() == expected
        for story in furthest.values():
            assert copy.entries(story.author) == story.entries


# --- two stories ----------------------------------------------------------------------------------------
forks = st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5))


def two_stories(common: int, one: int, other: int) -> tuple[Story, Story]:
    """Both by one author in one epoch, equal up to a point."""
    start = clicks(common)
    return Story("liar", [*start, *clicks(one, word="jazz")]), Story(
        "liar", [*start, *clicks(other, word="rock")]
    )


@law
@given(forks, cuts, st.randoms(use_true_random=False))
def test_whoever_tells_two_stories_is_void_in_whichever_order_they_come(
    fork: tuple[int, int, int], ends: list[int], rng: random.Random
) -> None:
    """As soon as one comes that is as long as the one that is held."""
    common, length, _ = fork
    one, other = two_stories(common, length, length)
    batches = [*one.batches(ends), *other.batches(ends), one.batch(), other.batch()]
    rng.shuffle(batches)
    copy = Copy()
    copy.settle(*batches)
    (head,) = copy.heads()
    assert head.void
    assert copy.entries(one.author) == ()
    assert copy.feeds.num_entries == 0
    assert copy.feeds.marks(0, 0) == (FeedMark(one.author, EPOCH, MAX_SEQ),), "asks for no more of it"


@law
@given(forks)
def test_a_longer_second_story_voids_and_a_shorter_one_is_not_noticed(fork: tuple[int, int, int]) -> None:
    one, other = two_stories(*fork)
    short, long = sorted((one, other), key=lambda story: story.last)
    copy = Copy()
    copy.settle(short.batch())
    copy.settle(long.batch())
    assert copy.heads()[0].void
    copy = Copy()
    copy.settle(long.batch())
    assert copy.take(short.batch())[0] == NOTHING or short.last == long.last
    assert copy.heads()[0].void == (short.last == long.last)


def test_a_second_story_that_goes_on_where_the_first_ends_is_found_by_its_prior() -> None:
    one, other = two_stories(2, 3, 6)
    copy = Copy()
    copy.take(one.batch())
    (taken,) = copy.take(other.batch(6, 8))
    assert taken.batch is None
    assert [cut.void for cut in taken.cuts] == [True]


def test_what_is_void_stays_void_until_its_author_begins_anew() -> None:
    one, other = two_stories(2, 3, 3)
    later = Story("liar", clicks(2), epoch=EPOCH + 1)
    copy = Copy()
    copy.take(one.batch(), other.batch())
    assert (
        copy.take(one.batch(), other.batch(4, 5), Story("liar", clicks(9, word="pop")).batch())
        == [NOTHING] * 3
    )
    copy.feeds.load(copy.heads())
    assert copy.take(one.batch()) == [NOTHING], "after a restart too"
    copy.take(later.batch())
    assert copy.heads() == [later.head()]
    assert copy.entries(later.author) == later.entries


def test_one_author_is_void_and_the_others_are_not() -> None:
    one, other = two_stories(0, 1, 1)
    honest = Story("honest", clicks(3))
    copy = Copy()
    copy.settle(one.batch(), honest.batch(), other.batch())
    assert [head.void for head in copy.heads()] == [h.author == one.author for h in copy.heads()]
    assert copy.entries(honest.author) == honest.entries


def test_days_that_go_back_between_batches_are_the_authors_doing_not_the_bearers() -> None:
    """Who was only ever given the second part could not see it, and passed it on in good faith."""
    story = Story("liar", [*clicks(3, TODAY), *clicks(3, TODAY - 1)])
    relay, copy = Copy("relay"), Copy("copy")
    relay.take(story.batch(4, 6))
    copy.take(story.batch(1, 3))
    copy.pull(relay)
    assert copy.heads()[0].void or copy.heads()[0].last == 3


# --- what is refused ------------------------------------------------------------------------------------
STORY = Story("author", clicks(6))
ALTERED: dict[str, tuple[Callable[[Batch], Batch], Reason]] = {
    "another signature": (lambda b: replace(b, signature=bytes(64)), Reason.FORGED),
    "another author": (lambda b: replace(b, author=FakeSignatures("other").author), Reason.FORGED),
    "a later epoch": (lambda b: replace(b, epoch=EPOCH + 1), Reason.FORGED),
    "other numbers": (lambda b: replace(b, first=b.first + 1), Reason.FORGED),
    "another prior": (lambda b: replace(b, prior=bytes(15) + b"\1"), Reason.FORGED),
    "an entry changed": (lambda b: replace(b, entries=(click(77), *b.entries[1:])), Reason.FORGED),
    "an entry left out": (lambda b: replace(b, entries=b.entries[1:]), Reason.FORGED),
    "an entry more": (lambda b: replace(b, entries=(*b.entries, click(7))), Reason.FORGED),
    "entries in another order": (lambda b: replace(b, entries=b.entries[::-1]), Reason.FORGED),
    "a word changed": (
        lambda b: replace(b, entries=(replace(b.entries[0], terms=("jazz",)), *b.entries[1:])),
        Reason.FORGED,
    ),
    "an entry of the other feed": (
        lambda b: replace(b, entries=(*b.entries, Withdrawn(D1, TODAY))),
        Reason.MALFORMED,
    ),
    "beyond the last number": (lambda b: replace(b, first=MAX_SEQ), Reason.MALFORMED),
    "days that go back": (
        lambda b: replace(b, entries=(*b.entries, click(7, TODAY - 1))),
        Reason.MALFORMED,
    ),
}


@pytest.mark.parametrize(("alter", "reason"), ALTERED.values(), ids=ALTERED)
@pytest.mark.parametrize("known", [0, 2, 4])
def test_what_its_author_has_not_signed_is_refused_and_changes_nothing(
    alter: Callable[[Batch], Batch], reason: Reason, known: int
) -> None:
    copy = Copy()
    if known:
        copy.take(STORY.batch(1, known))
    before = copy.heads(), copy.feeds.num_entries, copy.entries(STORY.author)
    with pytest.raises(PeerError) as caught:
        copy.take(alter(STORY.batch(3, 6)))
    assert caught.value.reason is reason
    assert (copy.heads(), copy.feeds.num_entries, copy.entries(STORY.author)) == before
    copy.settle(STORY.batch())
    assert copy.heads()[0].last == 6, "and what is right is taken afterwards"


def test_a_first_entry_has_nothing_before_it() -> None:
    """Or an author could tell two stories that no running hash tells apart from one."""
    batch = replace(STORY.batch(), prior=b"x" * 16)
    said = head_bytes("net", Feed.CLICKS, STORY.author, EPOCH, 6, chains(batch.prior, batch.entries)[-1])
    with pytest.raises(PeerError) as caught:
        Copy().take(replace(batch, signature=FakeSignatures("author").sign(said)))
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("other", [{"network": "ten"}, {"feed": Feed.CATALOGUE}], ids=str)
def test_what_is_said_elsewhere_is_refused(other: dict[str, object]) -> None:
    """`Begun` may stand in both feeds: the signature is what tells them apart."""
    copy = Copy()
    with pytest.raises(PeerError) as caught:
        copy.take(Story("author", [Begun(TODAY)], **other).batch())  # type: ignore[arg-type]
    assert caught.value.reason is Reason.FORGED
    assert copy.heads() == []


def test_an_entry_that_is_too_long_is_refused() -> None:
    entry = shared(1, details=16)
    long = replace(entry, title="東" * 200, tags=("東" * 40,) * 16, creator="東" * 100, uri="u" * 1_024)
    long = replace(long, details=tuple(("k", "東" * 240) for _ in range(16)))
    assert entry_bytes(long) > MAX_ENTRY_BYTES >= entry_bytes(entry)
    with pytest.raises(PeerError) as caught:
        Copy(feed=Feed.CATALOGUE).take(Story("author", [long], feed=Feed.CATALOGUE).batch())
    assert caught.value.reason is Reason.MALFORMED


def test_a_batch_that_is_too_long_to_be_passed_on_is_refused() -> None:
    """It fits the frame it came in, and with a longer token around it no frame any more."""
    entries: list[Entry] = [shared(number, details=16) for number in range(18)]
    batch = Story("author", entries, feed=Feed.CATALOGUE).batch()
    assert batch_bytes(batch) > MAX_BATCH_BYTES
    with pytest.raises(PeerError) as caught:
        Copy(feed=Feed.CATALOGUE).take(batch)
    assert caught.value.reason is Reason.MALFORMED


def test_what_may_be_of_tomorrow_waits() -> None:
    copy = Copy()
    tomorrow, after = Story("a", [click(1, TODAY + 1)]), Story("b", [click(1, TODAY + 2)])
    copy.take(tomorrow.batch(), after.batch())
    assert [head.author for head in copy.heads()] == [tomorrow.author]
    copy.take(after.batch(), now=NOW + DAY_S)
    assert len(copy.heads()) == 2


# --- epochs ---------------------------------------------------------------------------------------------
@law
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_latest_epoch_counts_in_whatever_order_they_come(
    said: list[tuple[int, int]], rng: random.Random
) -> None:
    told = [Story("author", clicks(last, word=f"word {epoch}"), epoch=EPOCH + epoch) for epoch, last in said]
    copy = Copy()
    batches = [story.batch() for story in told]
    rng.shuffle(batches)
    copy.settle(*batches)
    best = max(told, key=lambda story: (story.epoch, story.last))
    assert copy.heads() == [best.head()]
    assert copy.entries(best.author) == best.entries
    assert copy.feeds.num_entries == best.last


def test_a_later_epoch_takes_back_all_that_was_said() -> None:
    old, new = Story("author", clicks(5)), Story("author", [Begun(TODAY)], epoch=EPOCH + 1)
    copy = Copy()
    copy.take(old.batch())
    (taken,) = copy.take(new.batch())
    (cut,) = taken.cuts
    assert (cut.author, cut.epoch, cut.first, cut.void) == (old.author, EPOCH + 1, 1, False)
    assert copy.entries(old.author) == new.entries
    assert copy.take(old.batch()) == [NOTHING], "and it does not come back"


def test_an_epoch_of_the_future_waits_for_its_day() -> None:
    story = Story("author", clicks(2), epoch=int(NOW) + DAY_S + 1)
    copy = Copy()
    assert copy.take(story.batch()) == [NOTHING]
    assert copy.heads() == []
    copy.take(story.batch(), now=NOW + 1)
    assert copy.heads() == [story.head()]


# --- windows, gaps --------------------------------------------------------------------------------------
@law
@given(st.integers(1, 6), st.integers(1, 12), cuts)
def test_the_newest_entries_are_kept(window: int, length: int, ends: list[int]) -> None:
    story = Story("author", clicks(length))
    copy = Copy(limits=LIMITS._replace(window=window))
    for batch in story.batches(ends):
        copy.take(batch)
        (head,) = copy.heads()
        assert copy.feeds.num_entries == head.last - head.first + 1 <= window
    assert copy.heads() == [story.head(window)]
    assert copy.entries(story.author) == story.entries[-window:]


@law
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), cuts)
def test_a_copy_with_a_small_window_gets_the_newest_of_another(
    small: int, large: int, length: int, ends: list[int]
) -> None:
    story = Story("author", clicks(length))
    source, copy = Copy(limits=LIMITS._replace(window=large)), Copy(limits=LIMITS._replace(window=small))
    source.take(*story.batches(ends))
    while copy.pull(source):
        pass
    assert copy.heads() == [story.head(min(small, large))]


def test_whoever_leaves_out_a_part_makes_nobody_forget() -> None:
    story = Story("author", clicks(9))
    copy = Copy()
    copy.take(story.batch(1, 3))
    assert copy.take(story.batch(5, 9)) == [NOTHING]
    assert copy.entries(story.author) == story.entries[:3]
    copy.take(story.batch(4, 6), story.batch(5, 9))
    assert copy.entries(story.author) == story.entries


def test_a_gap_is_jumped_where_all_that_is_held_would_go_in_any_case() -> None:
    story = Story("author", clicks(9))
    copy = Copy(limits=LIMITS._replace(window=3))
    copy.take(story.batch(1, 3))
    assert copy.take(story.batch(5, 5)) == [NOTHING]
    copy.take(story.batch(7, 9))
    assert copy.heads() == [story.head(3)]
    assert copy.entries(story.author) == story.entries[6:]


@pytest.mark.parametrize(("silent_days", "jumps"), [(1, False), (180, False), (181, True)])
def test_a_gap_is_jumped_where_all_that_is_held_has_expired(silent_days: int, jumps: bool) -> None:
    story = Story("author", [*clicks(3, TODAY - silent_days), *clicks(3, TODAY)])
    copy = Copy()
    copy.take(story.batch(1, 3), story.batch(5, 6))
    assert copy.entries(story.author) == (story.entries[4:] if jumps else story.entries[:3])


# --- expiry and room ------------------------------------------------------------------------------------
def test_who_is_silent_for_long_expires_and_goes_on_later() -> None:
    story = Story("author", [*clicks(3, TODAY - 180), click(4, TODAY + 1), click(5, TODAY + 1)])
    copy = Copy()
    copy.take(story.batch(1, 3))
    assert copy.feeds.expire(NOW) == []
    (cut,) = copy.feeds.expire(NOW + DAY_S)
    assert (cut.author, cut.epoch, cut.first) == (story.author, EPOCH, 4)
    assert copy.feeds.expire(NOW + DAY_S) == []
    assert copy.feeds.num_entries == 0
    assert copy.feeds.marks(0, 0)[0].last == 3, "it is not asked for again"
    copy.take(story.batch(5, 5), now=NOW + DAY_S)
    assert copy.heads()[0].first == 5, "nothing is held before the gap"


def test_the_quiet_make_room_and_nobody_else() -> None:
    copy = Copy(limits=LIMITS._replace(max_authors=20))
    said = [Story(f"author {number}", clicks(1, TODAY - 22 - number)) for number in range(20)]
    copy.take(*(story.batch() for story in said))
    newcomer = Story("newcomer", clicks(1))
    assert copy.take(newcomer.batch()) == [NOTHING], "all places are taken"
    cuts = copy.feeds.expire(NOW)
    assert [(cut.author, cut.first) for cut in cuts] == [(said[19].author, MAX_SEQ)], (
        "the quietest, and no more"
    )
    assert copy.take(newcomer.batch())[0].batch == newcomer.batch()
    while copy.feeds.expire(NOW):
        copy.take(Story(f"another {len(copy.feeds)} {copy.feeds.num_entries}", clicks(1)).batch())
    kept = {head.author for head in copy.heads()}
    assert {story.author for story in said[:9]} <= kept, "who spoke within a month stays"


def test_a_node_makes_no_room_in_its_own_name() -> None:
    copy = Copy(limits=LIMITS._replace(max_authors=2))
    copy.say(click(1, TODAY - 100))
    for number in range(5):
        copy.take(Story(f"author {number}", clicks(1, TODAY - 5 + number)).batch())
    assert FakeSignatures("me").author in {head.author for head in copy.heads()}
    assert len(copy.feeds) == 2


@pytest.mark.parametrize("day", [TODAY, TODAY + 1])
def test_a_flood_of_new_keys_drives_out_nobody(day: int) -> None:
    copy = Copy(limits=LIMITS._replace(max_authors=100))
    honest = {Story(f"honest {number}", clicks(1)).author for number in range(60)}
    copy.take(*(Story(f"honest {number}", clicks(1, TODAY - number % 30)).batch() for number in range(60)))
    copy.take(*(Story(f"flood {number}", clicks(1, day)).batch() for number in range(1_000)))
    copy.feeds.expire(NOW)
    assert honest <= {head.author for head in copy.heads()}
    more = Story("honest 7", [*clicks(1, TODAY - 7), click(2, TODAY)])
    assert copy.take(more.batch())[0].batch is not None, "who is known is heard"


@pytest.mark.parametrize("flood_first", [False, True])
def test_a_flood_that_grows_drives_out_nobody(flood_first: bool) -> None:
    copy = Copy(limits=LIMITS._replace(max_entries=100, window=50))
    honest = [Story(f"honest {number}", clicks(5)) for number in range(10)]
    flood = [Story(f"flood {number}", clicks(50)) for number in range(10)]
    early, late = (flood, honest) if flood_first else (honest, flood)
    copy.take(*(story.batch(1, 4) for story in early), *(story.batch(1, 4) for story in late))
    copy.take(*(story.batch(5, 50) for story in flood))
    copy.take(*(story.batch() for story in honest))
    assert {story.author for story in honest} <= {head.author for head in copy.heads()}
    assert all(copy.entries(story.author) == story.entries for story in honest)
    assert copy.feeds.num_entries <= 100


def test_all_authors_together_stay_in_bounds() -> None:
    copy = Copy(limits=LIMITS._replace(max_entries=20, window=10))
    said = [Story(f"author {number}", clicks(10, TODAY - number)) for number in range(6)]
    for last in range(1, 11):
        copy.take(*(story.batch(last, last) for story in said))
    assert copy.feeds.num_entries <= 20 + 10


def test_one_author_takes_no_more_than_its_window() -> None:
    copy = Copy(limits=LIMITS._replace(window=50))
    story = Story("flood", clicks(2_000))
    for first in range(1, 2_001, 100):
        copy.take(story.batch(first, first + 99))
    assert copy.feeds.num_entries == 50
    assert copy.entries(story.author) == story.entries[-50:]


# --- in the node's own name -----------------------------------------------------------------------------
def test_what_is_said_is_taken_by_others() -> None:
    me, other = Copy("me"), Copy("other")
    me.say(*clicks(3))
    me.say(click(4))
    other.pull(me)
    assert other.heads() == me.heads()
    assert other.entries(FakeSignatures("me").author) == tuple(clicks(4))
    assert me.heads()[0].epoch == int(NOW)


def test_much_that_is_said_is_cut_into_batches_that_travel() -> None:
    copy = Copy(feed=Feed.CATALOGUE)
    batches = copy.feeds.publish([shared(n, details=16) for n in range(40)], NOW)
    assert all(batch_bytes(batch) <= MAX_BATCH_BYTES for batch in batches)
    assert max(map(batch_bytes, batches)) > MAX_BATCH_BYTES - MAX_ENTRY_BYTES
    batches += copy.feeds.publish([shared(n) for n in range(300)], NOW)
    assert [len(batch.entries) for batch in batches[-3:]] == [128, 128, 44]
    assert MAX_ENTRIES_PER_BATCH == 128
    other = Copy(feed=Feed.CATALOGUE)
    other.take(*batches)
    assert other.heads() == copy.heads()


def test_days_never_go_back_whatever_the_clock_does() -> None:
    me, other = Copy("me"), Copy("other")
    me.say(click(1, TODAY), click(2, TODAY - 3))
    me.say(click(3, TODAY - 1), now=NOW - DAY_S)
    other.pull(me)
    assert [entry.day for entry in other.entries(FakeSignatures("me").author)] == [TODAY] * 3


def test_to_begin_anew_takes_back_what_was_said_everywhere() -> None:
    me, other = Copy("me"), Copy("other")
    me.say(*clicks(3))
    other.pull(me)
    for _ in range(2):  # within one second
        me.begin_anew()
        other.pull(me)
        assert other.heads() == me.heads()
        assert other.entries(FakeSignatures("me").author) == (Begun(TODAY),)
    assert me.heads()[0].epoch == int(NOW) + 2
    me.say(click(9))
    other.pull(me)
    assert other.entries(FakeSignatures("me").author) == (Begun(TODAY), click(9))


def test_a_home_that_is_an_old_copy_ends_void_and_goes_on_in_a_new_epoch() -> None:
    me, restored, other = Copy("me"), Copy("me"), Copy("other")
    me.say(*clicks(2))
    restored.take(*me.kept(FakeSignatures("me").author))
    me.say(click(3), click(4))
    other.pull(me)
    restored.say(click(33))
    restored.pull(other)
    assert restored.heads()[0].void
    restored.say(click(44))
    other.pull(restored)
    assert other.heads() == restored.heads()
    assert other.entries(FakeSignatures("me").author) == (click(44),)


def test_what_a_node_said_before_it_lost_its_home_comes_back() -> None:
    me, other, again = Copy("me"), Copy("other"), Copy("me")
    me.say(*clicks(3))
    other.pull(me)
    again.pull(other)
    assert again.heads() == me.heads()
    again.say(click(4))
    other.pull(again)
    assert other.entries(FakeSignatures("me").author) == tuple(clicks(4))


@pytest.mark.parametrize("entry", [Withdrawn(D1, TODAY), shared(1)])
def test_a_node_says_nothing_that_others_would_refuse(entry: Entry) -> None:
    copy = Copy()
    with pytest.raises(ValueError, match="in the clicks"):
        copy.say(click(1), entry)
    assert copy.heads() == [], "not even a part of it"


# --- what a peer lacks ----------------------------------------------------------------------------------
def test_only_what_is_lacking_is_given() -> None:
    copy = Copy()
    a, b, c = (Story(name, clicks(6)) for name in "abc")
    copy.take(a.batch(), b.batch(), c.batch())
    marks = {
        a.author: FeedMark(a.author, EPOCH, 6),
        b.author: FeedMark(b.author, EPOCH, 4),
        c.author: FeedMark(c.author, EPOCH - 1, 5),
    }
    wants = copy.feeds.lacking(marks, 0, 0, offset=0, per_author=100, max_entries=100)
    assert set(wants) == {Want(b.author, EPOCH, 4, 2), Want(c.author, EPOCH, 0, 6)}
    ahead = {each.author: FeedMark(each.author, EPOCH + 1, 0) for each in (a, b, c)}
    assert copy.feeds.lacking(ahead, 0, 0, offset=0, per_author=100, max_entries=100) == ()


@law
@given(lengths, st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
def test_an_answer_is_no_longer_than_asked(
    of: list[int], per_author: int, max_entries: int, offset: int
) -> None:
    copy = Copy()
    copy.take(*(story.batch() for story in stories(of)))
    wants = copy.feeds.lacking({}, 0, 0, offset=offset, per_author=per_author, max_entries=max_entries)
    assert all(0 < want.limit <= per_author for want in wants)
    assert sum(want.limit for want in wants) == min(max_entries, sum(min(n, per_author) for n in of))
    assert len({want.author for want in wants}) == len(wants)


def test_wherever_an_answer_begins_each_author_comes_first_at_times() -> None:
    copy = Copy()
    copy.take(*(story.batch() for story in stories([3] * 5)))
    firsts = {copy.feeds.lacking({}, 0, 0, offset=n, per_author=3, max_entries=3)[0].author for n in range(5)}
    assert len(firsts) == 5


@pytest.mark.parametrize("num_authors", [0, 1, MAX_MARKS_PER_MESSAGE, MAX_MARKS_PER_MESSAGE + 1, 5_000])
def test_marks_fit_a_message_however_many_authors_there_are(num_authors: int) -> None:
    feeds = FeedSet("net", Feed.CLICKS, FakeSignatures("me"), FeedLimits(10_000, PLENTY, 10, 180))
    feeds.load(Story(f"author {number}", clicks(1)).head() for number in range(num_authors))
    rng = random.Random(1)
    told: set[bytes] = set()
    for _ in range(40):
        drawn = rng.randrange(2**MAX_AUTHOR_BITS)
        bits = feeds.bits_for(drawn, MAX_AUTHOR_BITS, MAX_MARKS_PER_MESSAGE)
        prefix = drawn >> (MAX_AUTHOR_BITS - bits)
        marks = feeds.marks(bits, prefix)
        assert len(marks) <= MAX_MARKS_PER_MESSAGE
        assert {mark.author for mark in marks} == {
            head.author for head in feeds.heads() if begins_with(head.author, bits, prefix)
        }, "all of these, or the answer brings what is known"
        assert bits == 0 or len(marks) * 2 > MAX_MARKS_PER_MESSAGE // 3, "no fewer than need be"
        told |= {mark.author for mark in marks}
    assert len(told) == num_authors, "and in time everybody"


def test_a_key_begins_with_its_bits() -> None:
    author = bytes([0b10110000, 0, 0, 1]) + bytes(28)
    assert begins_with(author, 0, 0)
    assert [begins_with(author, 3, prefix) for prefix in range(8)] == [n == 0b101 for n in range(8)]
    assert begins_with(author, MAX_AUTHOR_BITS, 0b1011 << 16)


@law
@given(lengths, st.integers(1, 5))
def test_a_copy_goes_on_where_it_was(of: list[int], window: int) -> None:
    limits = LIMITS._replace(window=window)
    said = stories(of)
    copy = Copy(limits=limits)
    copy.take(*(story.batch(1, (story.last + 1) // 2) for story in said))
    again = Copy(limits=limits)
    again.feeds.load(copy.heads())
    again.store = copy.store
    assert again.feeds.num_entries == copy.feeds.num_entries
    again.take(*(story.batch() for story in said))
    assert again.heads() == sorted((story.head(window) for story in said), key=lambda head: head.author)


def test_heads_survive_being_written_down() -> None:
    copy = Copy()
    copy.take(*(story.batch() for story in stories([3, 1])))
    data = msgspec.msgpack.encode(copy.heads())
    assert msgspec.msgpack.decode(data, type=list[type(copy.heads()[0])]) == copy.heads()
