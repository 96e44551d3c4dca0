"""Shared content on whole cores: entries come only to who asks, and content only from who holds it, whatever liars do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import ValidationError, convert
from msgspec.structs import replace

from protocols.codec import encode
from protocols.content import ASKS_PER_S, MAX_GETS, MAX_SOURCES, MAX_TRIES, SEEKS_PER_S, ContentSettings
from protocols.entries import Batch, Begun, Feed, FeedMark
from protocols.events import (
    BeginAnew,
    ContentHeld,
    ContentMissing,
    Drop,
    Get,
    Hold,
    KeepEntries,
    Publish,
    Send,
    StopRequested,
    Unreachable,
)
from protocols.feeds import DAY_S, batch_bytes
from protocols.messages import Ask, Bye, Entries, Found, LinkMessage, Seek
from protocols.vocabulary import (
    MAX_BATCH_BYTES,
    MAX_FRAME_BYTES,
    MAX_MARKS_PER_MESSAGE,
    MAX_SEQ,
    ContentRef,
    Digest,
    PeerId,
    Reason,
)
from tests.protocols.content_network import QUICK, ContentNetwork, Node
from tests.protocols.feed_copies import EPOCH, NOW, TODAY, Story, click, clicks, shared
from tests.protocols.identities import FakeSignatures

D1, D2 = bytes(range(32)), b"\xff" * 32
SLOW = replace(QUICK, pull_s=3_600.0)


def question(net: ContentNetwork, me: str, to: str, feed: Feed = Feed.CLICKS) -> Ask:
    """The next question of one to another, which is not answered but by the test."""
    asks: list[Ask] = []

    def swallow(a: PeerId, b: PeerId, message: LinkMessage) -> LinkMessage | None:
        if (a, b) == (me, to) and isinstance(message, Ask):
            asks.append(message)
            return None
        return message

    net.tamper = swallow
    net.run(60, lambda: any(ask.feed is feed for ask in asks))
    return next(ask for ask in asks if ask.feed is feed)


# --- spreading ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_everybody_hears_everything(seed: int) -> None:
    net = ContentNetwork(8, seed)
    for number in range(8):
        net.publish(f"n{number}", *clicks(number + 1))
        net.publish(f"n{number}", shared(number), feed=Feed.CATALOGUE)
    assert net.run(120, lambda: net.all_equal() and net.all_equal(Feed.CATALOGUE)), f"seed {seed}"
    for node in net.up():
        for number in range(8):
            author = net[f"n{number}"].author
            assert node.entries(author) == tuple(clicks(number + 1))
            assert node.entries(author, Feed.CATALOGUE) == (shared(number),)
        assert not node.penalties
    net.check()


def test_what_others_said_is_passed_on_with_their_signatures() -> None:
    """The author is never linked with who hears of it, and is gone by then."""
    net = ContentNetwork(3)
    net.block("n1", "n2")
    net.publish("n1", *clicks(3))
    author = net["n1"].author
    assert net.run(30, lambda: author in net["n0"].heads())
    net.crash(net["n1"])
    assert net.run(30, lambda: author in net["n2"].heads())
    assert net["n2"].entries(author) == tuple(clicks(3))
    assert net["n2"].heads()[author] == net["n0"].heads()[author]


def test_only_what_is_lacking_travels() -> None:
    net = ContentNetwork(2)
    net.publish("n0", *clicks(5))
    net.publish("n1", *clicks(3))
    assert net.run(30, net.all_equal)
    net.run(60)
    net.publish("n0", click(9))
    assert net.run(30, net.all_equal)
    net.run(60)
    said = [
        batch
        for each in ("n0", "n1")
        for m in net.answers(each, "n1" if each == "n0" else "n0")
        for batch in m.batches
    ]
    assert sum(len(batch.entries) for batch in said) == 5 + 3 + 1
    assert [(b.first, b.last) for b in said if b.author == net["n0"].author] == [(1, 5), (6, 6)]


@pytest.mark.parametrize(("num_authors", "each"), [(100, 200), (10, 2_000), (1, 2_000)])
def test_a_newcomer_does_not_wait_for_the_timer_while_answers_bring_much(num_authors: int, each: int) -> None:
    """20,000 entries at 2,000 an answer, and 2,000 of one author at 256."""
    stories = [Story(f"author {number}", clicks(each)) for number in range(num_authors)]
    net = ContentNetwork(2, settings=replace(QUICK, pull_s=30.0), disks={"n0": stories})
    assert net.run(15, net.all_equal)
    assert net["n1"].feeds().num_entries == num_authors * each
    assert not net["n0"].penalties, "it did not ask too often"
    assert not net["n1"].penalties


def test_long_entries_come_without_waiting_for_the_timer_too() -> None:
    """300 of them are a full answer."""
    items = [shared(number, details=16) for number in range(400)]
    stories = [Story(f"author {number}", items, feed=Feed.CATALOGUE) for number in range(4)]
    net = ContentNetwork(2, settings=replace(QUICK, pull_s=30.0), disks={"n0": stories})
    assert net.run(15, lambda: net.all_equal(Feed.CATALOGUE))
    assert not net["n0"].penalties
    assert not net["n1"].penalties


def test_an_answer_is_bounded_and_cut_into_frames() -> None:
    settings = replace(QUICK, entries_per_answer=300, entries_per_author=128)
    items = [shared(number, details=16) for number in range(10)]
    stories = [Story(f"author {number}", items, feed=Feed.CATALOGUE) for number in range(60)]
    net = ContentNetwork(2, settings=settings, disks={"n0": stories})
    net.run(30, lambda: net.all_equal(Feed.CATALOGUE))
    assert net.all_equal(Feed.CATALOGUE)
    by_token: dict[int, list[Entries]] = {}
    for message in net.answers("n0", "n1"):
        by_token.setdefault(message.token, []).append(message)
        assert len(encode(message)) <= MAX_FRAME_BYTES
    for parts in by_token.values():
        assert sum(len(batch.entries) for part in parts for batch in part.batches) <= 300
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert max(map(len, by_token.values())) > 1
    assert not net["n1"].penalties


def test_an_honest_answer_is_never_more_than_was_asked_for() -> None:
    """Eight authors at 256 entries each are more than 2,000."""
    stories = [Story(f"author {number}", clicks(256)) for number in range(16)]
    net = ContentNetwork(2, disks={"n0": stories})
    assert net.run(30, net.all_equal)
    assert net["n1"].reasons() == {}


@pytest.mark.parametrize(("asks", "answers"), [(300, 2_000), (2_000, 300)])
def test_nodes_of_other_settings_bear_with_each_other(asks: int, answers: int) -> None:
    settings = {
        "n0": replace(QUICK, entries_per_answer=answers),
        "n1": replace(QUICK, entries_per_answer=asks),
    }
    stories = [Story(f"author {number}", clicks(100)) for number in range(40)]
    net = ContentNetwork(2, settings=settings, disks={"n0": stories})
    assert net.run(60, net.all_equal)
    assert net["n1"].reasons() == {}


def test_one_who_says_much_does_not_crowd_out_the_others() -> None:
    quiet = [Story(f"quiet {number}", clicks(1)) for number in range(20)]
    loud = Story("loud", clicks(2_000))
    net = ContentNetwork(2, disks={"n0": [loud, *quiet]})

    def first_answer() -> list[Entries]:
        parts = [message for message in net.answers("n0", "n1") if message.feed is Feed.CLICKS]
        return [part for part in parts if part.token == parts[0].token]

    assert net.run(30, lambda: any(part.last for part in first_answer()))
    heard = {batch.author: batch.last for part in first_answer() for batch in part.batches}
    assert {story.author for story in quiet} <= set(heard)
    assert heard[loud.author] == 256


def test_a_flood_by_one_author_is_held_in_its_window() -> None:
    settings = replace(QUICK, max_clicks_per_author=100, pull_s=0.5)
    net = ContentNetwork(3, settings=settings)
    for start in range(0, 3_000, 100):
        net.publish("n1", *(click(number) for number in range(start, start + 100)))
        net.run(0.2)
    net.run(60)
    author = net["n1"].author
    for name in ("n0", "n2"):
        assert net[name].feeds().num_entries == 100
        assert net[name].heads()[author].last == 3_000
    assert net["n2"].entries(author)[-1] == click(2_999)


@pytest.mark.parametrize("num_authors", [MAX_MARKS_PER_MESSAGE - 1, 3 * MAX_MARKS_PER_MESSAGE])
def test_however_many_authors_are_known_all_of_them_come(num_authors: int) -> None:
    """Both know most of them, and each some that the other does not."""
    stories = [Story(f"author {number}", clicks(1)) for number in range(num_authors)]
    disks = {"n0": stories[50:], "n1": stories[:-50]}
    net = ContentNetwork(2, settings=replace(QUICK, pull_s=0.5), disks=disks)
    assert net.run(60, net.all_equal)
    assert len(net["n1"].heads()) == num_authors
    asks = [e.message for _, _, e in net.log if isinstance(e, Send) and isinstance(e.message, Ask)]
    assert max(len(ask.marks) for ask in asks) <= MAX_MARKS_PER_MESSAGE
    assert all(len(encode(ask)) <= MAX_FRAME_BYTES for ask in asks)
    assert not net["n0"].penalties
    assert not net["n1"].penalties
    net.check()


def test_peers_that_are_known_and_not_linked_are_asked_too() -> None:
    """n1 and n2 would never keep a link: each dials the other for the question alone."""
    net = ContentNetwork(3)
    net.run(10)
    net.publish("n2", *clicks(2))
    asked = {
        e.peer
        for _, peer, e in net.log
        if peer == "n1" and isinstance(e, Send) and isinstance(e.message, Ask)
    }
    net.run(60)
    asked |= {
        e.peer
        for _, peer, e in net.log
        if peer == "n1" and isinstance(e, Send) and isinstance(e.message, Ask)
    }
    assert asked == {"n0", "n2"}


# --- nothing without being asked ------------------------------------------------------------------------
def test_entries_that_nobody_asked_for_are_counted_and_not_looked_at() -> None:
    net = ContentNetwork(2, settings=SLOW)
    net.link("n0", "n1")
    net.run(20)
    story = Story("author", clicks(3))
    before = net["n1"].reasons()
    for token in (0, 1, 2**40 + 1):
        net.say("n0", "n1", Entries(token, Feed.CLICKS, (story.batch(),), True))
    net.run(1)
    assert net["n1"].reasons() - before == {Reason.UNASKED: 3}
    assert net["n1"].heads() == {}
    assert net["n1"].entries(story.author) == ()
    net.link("n0", "n1")
    assert net.now < 25, "the link has stayed"


def test_a_question_is_answered_once_by_who_was_asked_for_what_was_asked() -> None:
    net = ContentNetwork(3)
    net.link("n0", "n1", "n2")
    a, b, c, d = (Story(name, clicks(2)) for name in "abcd")
    ask = question(net, "n1", "n0")
    net.say("n2", "n1", Entries(ask.token, Feed.CLICKS, (a.batch(),), True))
    net.say("n0", "n1", Entries(ask.token, Feed.CATALOGUE, (a.batch(),), True))
    net.run(0.1)
    assert net["n1"].heads() == {}
    assert net["n1"].reasons() == {Reason.UNASKED: 2}
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (b.batch(),), False))
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (c.batch(),), True))
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (d.batch(),), True))
    net.run(0.1)
    assert set(net["n1"].heads()) == {b.author, c.author}
    assert net["n1"].reasons() == {Reason.UNASKED: 3}


def test_an_answer_that_is_too_late_is_not_looked_at() -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    ask = question(net, "n1", "n0")
    net.run(21)
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (Story("author", clicks(1)).batch(),), True))
    net.run(0.1)
    assert net["n1"].heads() == {}
    assert net["n1"].reasons() == {Reason.UNASKED: 1}


def test_more_than_was_asked_for_is_refused() -> None:
    net = ContentNetwork(2, settings=replace(QUICK, entries_per_answer=128))
    net.link("n0", "n1")
    ask = question(net, "n1", "n0")
    stories = [Story(f"author {number}", clicks(100)) for number in range(3)]
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, tuple(s.batch() for s in stories), True))
    net.run(0.1)
    assert set(net["n1"].heads()) == {stories[0].author}
    assert net["n1"].reasons() == {Reason.UNASKED: 1}


def test_authors_that_were_not_asked_for_are_refused() -> None:
    stories = [Story(f"author {number}", clicks(1)) for number in range(2 * MAX_MARKS_PER_MESSAGE)]
    net = ContentNetwork(2, disks={"n1": stories})
    net.link("n0", "n1")
    ask = question(net, "n1", "n0")
    assert ask.bits > 0
    strangers = (Story(f"stranger {number}", clicks(1)) for number in range(1_000))
    other = next(s for s in strangers if int.from_bytes(s.author[:4], "big") >> (32 - ask.bits) != ask.prefix)
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (other.batch(),), True))
    net.run(0.1)
    assert other.author not in net["n1"].heads()
    assert net["n1"].reasons() == {Reason.UNASKED: 1}


def test_what_nobody_asked_for_is_taken_where_an_experiment_says_so() -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    story = Story("author", clicks(2))
    net["n1"].content.takes_unasked = True
    net.say("n0", "n1", Entries(0, Feed.CLICKS, (story.batch(),), True))
    net.run(0.1)
    assert net["n1"].entries(story.author) == story.entries


# --- forged, replayed, contradictory --------------------------------------------------------------------
def forged(batch: Batch) -> Batch:
    return replace(batch, signature=bytes(64))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (forged(Story("bad", clicks(2)).batch()), Reason.FORGED),
        (Story("bad", clicks(2), network="ten").batch(), Reason.FORGED),
        (Story("bad", [shared(1)], feed=Feed.CATALOGUE).batch(), Reason.MALFORMED),
        (replace(Story("bad", clicks(2)).batch(), author=FakeSignatures("n1").author), Reason.FORGED),
    ],
    ids=["forged", "another network", "the other feed", "in the receiver's name"],
)
def test_the_third_bad_answer_on_a_link_ends_it(bad: Batch, reason: Reason) -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    good = Story("good", clicks(3))
    late = Story("late", clicks(1))
    for number in (1, 2, 3):
        ask = question(net, "n1", "n0")
        net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (good.batch(1, number), bad, late.batch()), True))
        net.run(0.005 + 0.01)
        assert net["n1"].heads()[good.author].last == number, "what came before it is kept"
        assert set(net["n1"].heads()) == {good.author}, "nothing of it, and nothing after it"
        assert net["n1"].reasons() == {reason: number}
        assert net.is_live(PeerId("n1"), PeerId("n0")) == (number < 3)
    net.check()


def test_refusals_are_counted_for_each_link_alone() -> None:
    net = ContentNetwork(2)
    for _ in range(2):
        net.link("n0", "n1")
        for _ in range(2):
            ask = question(net, "n1", "n0")
            bad = forged(Story("bad", clicks(2)).batch())
            net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (bad,), True))
            net.run(0.015)
        assert net.is_live(PeerId("n1"), PeerId("n0"))
        net.cut("n0", "n1")
        net.run(0.1)
    assert net["n1"].reasons() == {Reason.FORGED: 4}


def test_a_question_ends_with_its_link() -> None:
    """The next is not held up by it, and it is not answered on another link."""
    net = ContentNetwork(2)
    net.link("n0", "n1")
    first = question(net, "n1", "n0")
    net.cut("n0", "n1")
    net.run(0.1)
    net.link("n0", "n1")
    net.say("n0", "n1", Entries(first.token, Feed.CLICKS, (Story("author", clicks(1)).batch(),), True))
    net.run(0.1)
    assert net["n1"].reasons() == {Reason.UNASKED: 1}
    assert net["n1"].heads() == {}
    began = net.now
    assert question(net, "n1", "n0").token > first.token
    assert net.now - began < 5


def test_what_was_said_before_does_no_harm_when_it_is_said_again() -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    old, new = Story("author", clicks(9)), Story("author", clicks(2), epoch=EPOCH + 1)
    ask = question(net, "n1", "n0")
    replayed = (old.batch(1, 4), old.batch(1, 4), new.batch(), old.batch(5, 9), new.batch(1, 1), new.batch())
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, replayed, True))
    net.run(0.1)
    assert net["n1"].heads()[new.author] == new.head()
    assert net["n1"].entries(new.author) == new.entries
    assert net["n1"].reasons() == {}
    net.check()


def test_an_epoch_and_a_day_of_the_future_are_passed_over_and_nobody_is_blamed() -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    ask = question(net, "n1", "n0")
    early = Story("early", clicks(1), epoch=int(NOW) + 2 * DAY_S)
    tomorrow = Story("tomorrow", [click(1, TODAY + 3)])
    today = Story("today", clicks(1))
    net.say(
        "n0", "n1", Entries(ask.token, Feed.CLICKS, (early.batch(), tomorrow.batch(), today.batch()), True)
    )
    net.run(0.1)
    assert set(net["n1"].heads()) == {today.author}
    assert net["n1"].reasons() == {}


def test_two_stories_void_their_author_wherever_both_come_and_nobody_who_passes_them_on() -> None:
    one, other = Story("liar", clicks(3, word="jazz")), Story("liar", clicks(5, word="rock"))
    honest = Story("honest", clicks(2))
    # A seed with which some hear the shorter story before the longer one: only they can tell.
    net = ContentNetwork(4, disks={"n1": [one, honest], "n2": [other]})
    author = one.author

    def void() -> bool:
        return sum(author in node.heads() and node.heads()[author].void for node in net.up()) >= 2

    assert net.run(60, void), f"seed {net.seed}"
    net.run(20)
    for node in net.up():
        assert set(node.reasons()) <= {Reason.EQUIVOCATION}
        assert {peer for peer, _ in node.penalties} <= {PeerId("")}
        if node.heads()[author].void:
            assert node.entries(author) == ()
        assert node.entries(honest.author) == honest.entries
    net.check()


@pytest.mark.parametrize("second", ["void", "anew"])
def test_one_message_may_hold_what_makes_its_beginning_void(second: str) -> None:
    """What the core believes is on the disk, and nothing else."""
    net = ContentNetwork(2)
    net.link("n0", "n1")
    one = Story("author", clicks(3, word="jazz"))
    other = Story("author", clicks(3, word="rock"), epoch=EPOCH + (second == "anew"))
    ask = question(net, "n1", "n0")
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (one.batch(), other.batch()), True))
    net.run(0.1)
    net.check()
    assert net["n1"].entries(one.author) == (other.entries if second == "anew" else ())


def test_what_makes_room_for_the_next_in_the_same_message_is_not_kept() -> None:
    net = ContentNetwork(2, settings=replace(QUICK, max_clicks=10))
    net.link("n0", "n1")
    first, second = Story("first", clicks(9)), Story("second", clicks(4))
    ask = question(net, "n1", "n0")
    batches = (first.batch(1, 8), second.batch(1, 1), first.batch(9, 9), second.batch(2, 4))
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, batches, True))
    net.run(0.1)
    assert net["n1"].entries(second.author) == second.entries
    assert net["n1"].entries(first.author) == first.entries[3:]
    net.check()


def test_a_batch_that_fills_its_frame_does_not_end_the_links_of_who_passes_it_on() -> None:
    around = len(encode(Entries(0, Feed.CATALOGUE, (), True)))
    items = [shared(number, details=16) for number in range(1, 20)]
    for length in range(1, 201):  # of all titles but one, and then of that one: to the last byte
        items = [replace(item, title="x" * length) for item in items]
        missing = (
            MAX_FRAME_BYTES - around + 4 - batch_bytes(Story("author", items, feed=Feed.CATALOGUE).batch())
        )
        if missing < 190:
            break
    items[0] = replace(items[0], creator="x" * (missing // 2), media_type="x" * (missing - missing // 2))
    story = Story("author", items, feed=Feed.CATALOGUE)
    full = Entries(0, Feed.CATALOGUE, (story.batch(),), True)
    assert MAX_FRAME_BYTES - 40 < len(encode(full)) - 4 <= MAX_FRAME_BYTES
    assert batch_bytes(story.batch()) > MAX_BATCH_BYTES
    net = ContentNetwork(3)
    net.block("n0", "n2")
    net.link("n0", "n1")
    ask = question(net, "n1", "n0", Feed.CATALOGUE)
    net.tamper = lambda a, b, message: message
    net["n1"].content._questions[0] = net["n1"].content._questions.pop(ask.token)
    net.say("n0", "n1", full)
    net.run(0.1)
    net.run(30)  # every message goes through the codec of the other side
    assert net["n1"].reasons() == {Reason.MALFORMED: 1}
    assert story.author not in net["n2"].heads(Feed.CATALOGUE)


# --- taking back, expiring, restarting ------------------------------------------------------------------
def test_what_is_taken_back_goes_everywhere() -> None:
    net = ContentNetwork(5)
    net.publish("n1", *clicks(4))
    net.publish("n2", *clicks(2))
    assert net.run(60, net.all_equal)
    net.happen("n1", BeginAnew(Feed.CLICKS))
    assert net.run(60, net.all_equal)
    for node in net.up():
        assert node.entries(net["n1"].author) == (Begun(TODAY),)
        assert node.entries(net["n2"].author) == tuple(clicks(2))
        assert not node.penalties
    net.check()


def test_who_says_nothing_for_long_expires() -> None:
    disk = [Story("old", clicks(3, TODAY - 31)), Story("new", clicks(2, TODAY - 29))]
    net = ContentNetwork(2, settings=replace(QUICK, expire_days=30), disks={"n0": disk})
    net.run(30)
    for node in net.up():
        assert node.feeds().num_entries == 2
        assert node.entries(Story("old", clicks(1)).author) == ()
    net.check()


def test_a_node_that_restarts_goes_on_where_it_was() -> None:
    net = ContentNetwork(3)
    net.publish("n1", *clicks(3))
    net.publish("n2", *clicks(5))
    assert net.run(60, net.all_equal)
    before = net["n1"].heads()
    sent = net["n0"].sent.copy(), net["n2"].sent.copy()
    net.crash(net["n1"])
    net.run(15)
    net.log.clear()
    net.start(net["n1"])
    assert net["n1"].heads() == before
    net.run(30)
    brought = [b for name in ("n0", "n2") for m in net.answers(name, "n1") for b in m.batches]
    assert brought == [], f"it lacks nothing {sent}"
    net.publish("n1", click(4))
    assert net.run(60, net.all_equal)
    assert net["n0"].heads()[net["n1"].author].last == 4
    assert net["n0"].heads()[net["n1"].author].epoch == before[net["n1"].author].epoch
    net.check()


def test_a_node_that_lost_its_home_gets_its_own_back_from_others() -> None:
    net = ContentNetwork(3)
    net.publish("n1", *clicks(3))
    assert net.run(60, net.all_equal)
    net.crash(net["n1"])
    net["n1"].store = net["n1"].make_store()
    net.run(15)
    net.start(net["n1"])
    assert net.run(60, net.all_equal)
    net.publish("n1", click(4))
    assert net.run(60, net.all_equal)
    assert net["n0"].entries(net["n1"].author) == tuple(clicks(4))


def test_a_node_whose_own_words_are_void_says_so_and_begins_anew() -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    net.publish("n1", *clicks(2))
    mine = net["n1"].heads()[net["n1"].author]
    other = Story("n1", clicks(3, word="of an older copy"), epoch=mine.epoch)
    ask = question(net, "n1", "n0")
    net.say("n0", "n1", Entries(ask.token, Feed.CLICKS, (other.batch(),), True))
    net.run(0.1)
    assert net["n1"].heads()[net["n1"].author].void
    assert len(net["n1"].troubles) == 1
    net.publish("n1", click(7))
    assert net["n1"].heads()[net["n1"].author].epoch > mine.epoch
    assert net["n1"].entries(net["n1"].author) == (click(7),)
    net.check()


def test_who_stops_asks_nobody_any_more() -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    net.happen("n1", StopRequested())
    net.log.clear()
    net.run(30)
    assert not [
        e for _, peer, e in net.log if peer == "n1" and isinstance(e, Send) and isinstance(e.message, Ask)
    ]


# --- questions that are none ----------------------------------------------------------------------------
def test_who_asks_too_often_is_not_answered_and_counted() -> None:
    net = ContentNetwork(2, settings=SLOW)
    net.link("n0", "n1")
    net.run(20)
    net.log.clear()
    for token in range(100):
        net.say("n0", "n1", Ask(token, Feed.CLICKS, 0, 0, (), 2_000))
    net.run(0.5)
    assert len(net.answers("n1", "n0")) == 2 * ASKS_PER_S
    assert net["n1"].reasons(PeerId("n0")) == {Reason.FLOOD: 100 - 2 * ASKS_PER_S}
    net.run(10)
    net.say("n0", "n1", Ask(200, Feed.CLICKS, 0, 0, (), 2_000))
    net.run(0.5)
    assert net.answers("n1", "n0")[-1].token == 200
    for token in range(100):
        net.say("n0", "n1", Seek(token, D1))
    net.run(0.5)
    assert sum(isinstance(e, Send) and isinstance(e.message, Found) for _, _, e in net.log) == 2 * SEEKS_PER_S


def test_a_prefix_longer_than_its_bits_is_malformed() -> None:
    net = ContentNetwork(2, settings=SLOW)
    net.link("n0", "n1")
    for number in range(3):
        net.say("n0", "n1", Ask(number, Feed.CLICKS, 3, 8, (), 2_000))
    net.run(0.015)
    assert net["n1"].reasons() == {Reason.MALFORMED: 3}
    assert not net.is_live(PeerId("n1"), PeerId("n0"))


def test_marks_that_are_lies_bring_nothing_and_break_nothing() -> None:
    net = ContentNetwork(2, settings=SLOW)
    net.link("n0", "n1")
    net.run(20)
    net.publish("n1", *clicks(3))
    author = net["n1"].author
    epoch = net["n1"].heads()[author].epoch
    lies = [
        (FeedMark(author, epoch, MAX_SEQ),),
        (FeedMark(author, epoch + 1, 0),),
        (FeedMark(author, epoch, 1), FeedMark(author, epoch, 3)),
        tuple(FeedMark(number.to_bytes(32, "big"), 0, MAX_SEQ) for number in range(MAX_MARKS_PER_MESSAGE)),
    ]
    for token, marks in enumerate(lies):
        net.say("n0", "n1", Ask(token, Feed.CLICKS, 0, 0, marks, 2_000))
    net.run(1)
    brought = {
        m.token: [(b.first, b.last) for b in m.batches] for m in net.answers("n1", "n0") if m.token < 9
    }
    assert brought == {0: [], 1: [], 2: [], 3: [(1, 3)]}
    assert net["n1"].reasons() == {}


def test_whoever_leaves_before_its_answer_comes_does_no_harm() -> None:
    net = ContentNetwork(2, settings=SLOW)
    net.publish("n1", *clicks(3))
    net.link("n0", "n1")
    net.say("n0", "n1", Ask(1, Feed.CLICKS, 0, 0, (), 2_000))
    net.say("n0", "n1", Bye())
    net.run(5)
    assert not net.answers("n1", "n0") or net.answers("n1", "n0")[-1].token != 1


# --- getting content ------------------------------------------------------------------------------------
def got(node: Node, net: ContentNetwork, for_s: float = 60) -> ContentHeld | ContentMissing:
    assert net.run(for_s, lambda: bool(node.records)), f"seed {net.seed}: no word of it"
    net.run(10)
    (record,) = node.records
    return record


def test_content_comes_from_those_who_hold_it() -> None:
    net = ContentNetwork(6)
    net.run(10)
    for name in ("n2", "n4"):
        net.hold(name, D1)
    net.hold("n5", D2)
    net.get("n1", D1)
    record = got(net["n1"], net)
    assert isinstance(record, ContentHeld)
    assert set(record.sources) == {"n2", "n4"}
    assert {*net["n1"].fetches[0]} == {"n2", "n4"}
    net.get("n3", D1)
    record = got(net["n3"], net)
    assert isinstance(record, ContentHeld)
    assert "n1" in record.sources, "who has got it serves it"


def test_content_that_nobody_holds_is_missing_soon() -> None:
    net = ContentNetwork(4)
    net.run(10)
    net.get("n1", D1)
    record = got(net["n1"], net, 6)
    assert isinstance(record, ContentMissing)
    assert "not held by any of 3 peers" in record.detail
    assert net["n1"].fetches == []
    assert not net["n1"].content._getting


def test_content_that_nobody_can_be_asked_for_is_missing() -> None:
    net = ContentNetwork(1)
    net.get("n0", D1)
    record = got(net["n0"], net)
    assert isinstance(record, ContentMissing)


def test_a_sharer_is_dialled_where_it_is_not_linked() -> None:
    net = ContentNetwork(16)
    net.run(60)
    unlinked = [
        (a, b)
        for a in net.nodes
        for b in net.nodes
        if "n0" not in (a, b) and frozenset((a, b)) not in net.links and a != b
    ]
    me, sharer = unlinked[0]
    net.hold(sharer, D1)
    net.get(me, D1, sharer)
    record = got(net[me], net)
    assert isinstance(record, ContentHeld)
    assert record.sources == (sharer,)
    net.run(60)
    assert not net[me].core.view._wanted, "every link that it reached for is let go"  # type: ignore[union-attr]


def test_those_who_are_busy_are_tried_again_and_not_for_ever() -> None:
    net = ContentNetwork(3)
    net.run(10)
    for name in ("n0", "n2"):
        net.hold(name, D1)
        net[name].busy = True
    net.get("n1", D1)
    record = got(net["n1"], net)
    assert isinstance(record, ContentMissing)
    assert len(net["n1"].fetches) == MAX_TRIES
    assert net["n1"].reasons() == {}
    net["n1"].records.clear()
    net.get("n1", D1)
    net.run(0.3)
    net["n2"].busy = False
    assert isinstance(got(net["n1"], net), ContentHeld)


def test_who_goes_away_while_the_busy_are_waited_for_changes_nothing() -> None:
    """It was asked as well, and had not answered yet."""
    net = ContentNetwork(3, settings=SLOW)
    net.link("n0", "n1", "n2")
    net.silent.add(PeerId("n0"))
    net.hold("n2", D1)
    net["n2"].busy = True
    net.get("n1", D1)
    net.run(1.0)
    assert len(net["n1"].fetches) == 1
    assert net["n1"].content.step(net.now, Unreachable(PeerId("n0"), Reason.TIMEOUT)) == []
    net["n2"].busy = False
    assert isinstance(got(net["n1"], net), ContentHeld)
    assert len(net["n1"].fetches) == 2


def test_who_likely_holds_it_is_not_asked_first() -> None:
    net = ContentNetwork(4)
    net.link("n0", "n1", "n2")
    net.block("n1", "n3")
    net.hold("n2", D1)
    net.get("n1", D1, likely=["n3", "n2"])
    assert net["n1"].fetches == [("n2",)]
    assert isinstance(got(net["n1"], net), ContentHeld)
    assert net["n1"].sent["seek"] == 0


@pytest.mark.parametrize("likely", ["n3", "n0"], ids=["not linked", "does not hold it"])
def test_others_are_asked_where_the_likely_ones_do_not_serve_it(likely: str) -> None:
    net = ContentNetwork(4)
    net.link("n0", "n1", "n2")
    net.block("n1", "n3")
    net.hold("n2", D1)
    net.get("n1", D1, likely=[likely])
    record = got(net["n1"], net)
    assert isinstance(record, ContentHeld)
    assert record.sources == ("n2",)


def test_what_is_held_already_is_not_looked_for() -> None:
    net = ContentNetwork(2)
    net.link("n0", "n1")
    net.hold("n1", D1)
    net.get("n1", D1)
    assert net["n1"].records == [ContentHeld(Digest(D1), ())]
    assert net["n1"].sent["seek"] == 0


def test_what_is_asked_for_twice_is_got_once_and_told_once() -> None:
    net = ContentNetwork(3)
    net.run(10)
    net.hold("n2", D1)
    net.get("n1", D1)
    net.get("n1", D1)
    assert isinstance(got(net["n1"], net), ContentHeld)
    assert len(net["n1"].fetches) == 1
    assert net["n1"].sent["seek"] == 2


def test_what_is_not_wanted_any_more_is_told_of_no_more() -> None:
    net = ContentNetwork(3)
    net.run(10)
    net.hold("n2", D1)
    net.get("n1", D1)
    net.run(0.1)
    net.happen("n1", Drop(D1))  # type: ignore[arg-type]
    net.happen("n1", Drop(D2))  # type: ignore[arg-type]
    net.run(30)
    assert net["n1"].records == []
    assert not net["n1"].core.view._wanted  # type: ignore[union-attr]
    net.get("n1", D1)
    assert isinstance(got(net["n1"], net), ContentHeld)


def test_so_many_items_are_got_at_once_and_no_more() -> None:
    net = ContentNetwork(2, settings=SLOW)
    for number in range(MAX_GETS + 1):
        net.get("n1", number.to_bytes(32, "big"))
    assert [type(record) for record in net["n1"].records] == [ContentMissing]
    net.run(30)
    assert len(net["n1"].records) == MAX_GETS + 1
    assert not net["n1"].content._getting


def test_one_that_lies_about_holding_does_not_keep_it_from_coming() -> None:
    net = ContentNetwork(3)
    net.run(10)
    net.hold("n0", D1, truly=False)
    net.hold("n2", D1)
    net.get("n1", D1)
    assert isinstance(got(net["n1"], net), ContentHeld)


def test_those_who_lie_about_holding_give_way_to_those_who_do() -> None:
    """More liars than are asked at once, and all of them quicker."""
    net = ContentNetwork(MAX_SOURCES + 4)
    names = [f"n{number}" for number in range(MAX_SOURCES + 4)]
    net.link(*names)
    *liars, honest, me = names
    for liar in liars:
        net.hold(liar, D1, truly=False)
    net.hold(honest, D1)

    def late(a: PeerId, b: PeerId, message: LinkMessage) -> LinkMessage | None:
        if a == honest and isinstance(message, Found):
            net.tamper = lambda a, b, message: message
            net.say(a, b, message)
            net.tamper = late
            return None
        return message

    net.tamper = late
    net.get(me, D1)
    assert isinstance(got(net[me], net), ContentHeld)


@pytest.mark.parametrize("hints", [(), ("n0",), ("n2",)])
def test_one_that_serves_wrong_bytes_is_found_and_the_others_serve(hints: tuple[str, ...]) -> None:
    net = ContentNetwork(3)
    net.run(10)
    for name in ("n0", "n2"):
        net.hold(name, D1)
    net["n0"].wrong = True
    net.get("n1", D1, *hints)
    assert isinstance(got(net["n1"], net), ContentHeld)
    assert set(net["n1"].reasons()) <= {Reason.WRONG_HASH}
    assert {peer for peer, _ in net["n1"].penalties} <= {"n0"}


def test_wrong_bytes_from_all_are_missing_content() -> None:
    net = ContentNetwork(3)
    net.run(10)
    net.hold("n0", D1)
    net["n0"].wrong = True
    net.get("n1", D1)
    record = got(net["n1"], net)
    assert isinstance(record, ContentMissing)
    assert net["n1"].reasons(PeerId("n0")) == {Reason.WRONG_HASH: 1}
    assert len(net["n1"].fetches) == 1, "a liar is not asked again"


def test_what_is_not_held_any_more_is_found_nowhere() -> None:
    net = ContentNetwork(2)
    net.run(5)
    net.hold("n0", D1)
    net.happen("n0", Hold((D1,), held=False))  # type: ignore[arg-type]
    net.get("n1", D1)
    assert isinstance(got(net["n1"], net), ContentMissing)
    assert net["n1"].fetches == []


def test_a_found_that_nobody_sought_means_nothing() -> None:
    net = ContentNetwork(3)
    net.link("n0", "n1", "n2")
    net.silent.add(PeerId("n0"))
    net.get("n1", D1)
    (token,) = [g.token for g in net["n1"].content._getting.values()]
    net.say("n0", "n1", Found(token + 1, True))
    net.say("n0", "n1", Found(0, True))
    net.run(0.1)
    assert net["n1"].fetches == []
    assert isinstance(got(net["n1"], net), ContentMissing)


def test_a_holder_that_goes_away_before_it_is_asked_is_missing_content() -> None:
    net = ContentNetwork(3)
    net.link("n0", "n1", "n2")
    net.hold("n2", D1)
    net.silent.add(PeerId("n0"))
    net.get("n1", D1)
    net.run(0.1)
    net.crash(net["n2"])
    record = got(net["n1"], net)
    assert isinstance(record, ContentMissing)
    assert not net["n1"].core.view._wanted  # type: ignore[union-attr]


# --- all together ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_those_who_remain_come_to_the_same(seed: int) -> None:
    net = ContentNetwork(6, seed)
    net.live(40)
    assert net.run(300, lambda: net.all_equal() and net.all_equal(Feed.CATALOGUE)), f"seed {seed}"
    net.check()
    for node in net.up():
        assert not node.penalties, f"seed {seed}: {node.peer} {node.penalties}"


LIES = [
    *(Story("one", clicks(9)).batch(first, last) for first, last in ((1, 3), (2, 6), (5, 9), (9, 9))),
    *(Story("one", clicks(9, word="jazz")).batch(first, last) for first, last in ((1, 2), (3, 9))),
    Story("one", clicks(2), epoch=EPOCH + 1).batch(),
    Story("one", clicks(2), epoch=int(NOW) + 9 * DAY_S).batch(),
    *(Story("n1", clicks(4), epoch=int(NOW) + n).batch() for n in (-1, 0, 1)),
    Story("two", clicks(128)).batch(),
    Story("two", clicks(3), network="ten").batch(),
    forged(Story("two", clicks(3)).batch()),
    Story("three", [shared(1), shared(2)], feed=Feed.CATALOGUE).batch(),
    Story("three", [shared(1, "Another")], feed=Feed.CATALOGUE).batch(),
]
MARKS = [
    FeedMark(FakeSignatures(name).author, epoch, last)
    for name in ("one", "two", "n1")
    for epoch in (EPOCH, int(NOW))
    for last in (0, 3, MAX_SEQ)
]
tokens = st.one_of(st.integers(0, 2**48), st.integers(0, 3).map(lambda n: -1 - n))
"""Below zero: one of the last questions that the node has asked."""
feeds = st.sampled_from(Feed)
hostile = st.one_of(
    st.builds(
        Ask,
        tokens,
        feeds,
        st.integers(0, 20),
        st.integers(0, 2**20),
        st.lists(st.sampled_from(MARKS)).map(tuple),
        st.integers(1, 300),
    ),
    st.builds(Entries, tokens, feeds, st.lists(st.sampled_from(LIES), max_size=5).map(tuple), st.booleans()),
    st.builds(Seek, tokens, st.sampled_from([D1, D2])),
    st.builds(Found, tokens, st.booleans()),
)
deeds = st.one_of(
    hostile,
    st.floats(0.001, 8),
    st.sampled_from([Get(ContentRef(D1, 9)), Drop(Digest(D1)), Hold((Digest(D2),)), BeginAnew(Feed.CLICKS)]),
    st.just(Publish(Feed.CLICKS, (click(5),))),
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(deeds, max_size=25))
def test_whatever_a_peer_says_nothing_breaks(happened: list[object]) -> None:
    net = ContentNetwork(2, settings=replace(QUICK, max_authors=2))
    net.link("n0", "n1")
    asked: list[int] = []

    def note(a: PeerId, b: PeerId, message: LinkMessage) -> LinkMessage | None:
        if a == "n1" and isinstance(message, Ask | Seek):
            asked.append(message.token)
            return None if message.token % 2 else message
        return message

    net.tamper = note
    for deed in happened:
        match deed:
            case float():
                net.run(deed)
            case Ask() | Entries() | Seek() | Found():
                token = deed.token if deed.token >= 0 else ([0] * 4 + asked)[deed.token]
                if frozenset(("n0", "n1")) in net.links:
                    net.say("n0", "n1", replace(deed, token=token))
                    net.run(0.011)
            case _:
                net.happen("n1", deed)  # type: ignore[arg-type]
        net.check()
    net.run(60)
    node = net["n1"]
    content = node.content
    assert not content._getting
    assert not content._recalls
    assert len(content._questions) <= 2
    assert len(node.feeds()) <= 3
    assert set(node.reasons()) <= {
        Reason.UNASKED,
        Reason.FORGED,
        Reason.MALFORMED,
        Reason.FLOOD,
        Reason.EQUIVOCATION,
    }


def test_the_same_seed_gives_the_same_run() -> None:
    def run() -> list[object]:
        net = ContentNetwork(4, 7)
        net.publish("n1", *clicks(3))
        net.get("n2", D1)
        net.run(40)
        return net.log  # type: ignore[return-value]

    assert run() == run()


def test_settings_out_of_bounds_are_refused() -> None:
    for name, value in (("pull_s", 0), ("max_authors", 0), ("entries_per_answer", 0), ("expire_days", 0)):
        with pytest.raises(ValidationError):
            convert({name: value}, type=ContentSettings)


def test_what_is_published_is_kept_before_anybody_can_ask() -> None:
    net = ContentNetwork(1)
    net.log.clear()
    net.happen("n0", Publish(Feed.CLICKS, tuple(clicks(300))))
    (effect,) = [effect for _, _, effect in net.log]
    assert isinstance(effect, KeepEntries)
    assert [len(batch.entries) for batch in effect.batches] == [128, 128, 44]


def test_what_others_would_refuse_is_told_to_the_operator_and_not_said() -> None:
    net = ContentNetwork(1)
    net.log.clear()
    long = replace(shared(1, "東" * 200), details=tuple((f"k{n}", "東" * 240) for n in range(16)))
    net.publish("n0", shared(2), feed=Feed.CLICKS)
    net.publish("n0", shared(2), long, feed=Feed.CATALOGUE)
    assert len(net["n0"].troubles) == 2
    assert not any(isinstance(effect, KeepEntries) for _, _, effect in net.log)
    assert net["n0"].heads(Feed.CATALOGUE) == {}
