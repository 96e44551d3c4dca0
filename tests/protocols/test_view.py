"""Whom a node keeps company with: greeting, liveness, back-off, degree, peer exchange."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest

from protocols.admission import Admission, AdmissionPolicy, Invitation, admission_bytes, invitation_bytes
from protocols.events import (
    Dial,
    DialFailed,
    Disconnect,
    Discovered,
    Effect,
    Emit,
    Evaluated,
    Event,
    KeepPeer,
    LinkChanged,
    LinkDown,
    LinkUp,
    Notice,
    PeerDown,
    PeerUp,
    Penalise,
    Reached,
    Received,
    Rejected,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
    Unreachable,
)
from protocols.messages import (
    Bye,
    Heartbeat,
    Hello,
    LinkMessage,
    Offer,
    Peers,
    Ping,
    Pong,
    Probe,
    Probed,
    Refuse,
    Shuffle,
    Suspects,
    Suspicion,
)
from protocols.signing import is_genuine
from protocols.view import NO_LEARNING, SHUFFLED, View, ViewSettings, mismatch
from protocols.vocabulary import (
    MAX_ADDRESSES,
    MAX_INCARNATION,
    MAX_PEERS_PER_MESSAGE,
    PROTOCOL_VERSION,
    ModelRef,
    PeerId,
    PeerRecord,
    Reason,
)
from tests.protocols.identities import KEYLESS, FakeSignatures, hello_of, signed_record

ME = PeerId("me")
A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
Output = Effect | Notice


def address(peer: str, port: int = 1) -> str:
    return f"/ip4/10.0.0.1/tcp/{port}/p2p/{peer}"


def hello(peer: str = A, **fields: Any) -> Hello:
    return hello_of(peer, address(peer), **{"task": "digits", **fields})


def told(peer: str, *addresses: str, **fields: Any) -> PeerRecord:
    """What a peer signed of itself."""
    return signed_record(peer, *(addresses or (address(peer),)), **fields)


def make_view(seed: int = 0, policy: AdmissionPolicy | None = None, **settings: Any) -> View:
    return View(
        ViewSettings(**settings),
        ME,
        hello_of(ME, task="digits"),
        random.Random(seed),
        FakeSignatures(ME),
        policy or AdmissionPolicy(),
    )


def start(view: View, now: float = 0.0, peers: Iterable[str] = (), unix_s: float = 0.0) -> list[Output]:
    records = tuple(told(peer) for peer in peers)
    return view.step(now, Started((address(ME),), records, None, unix_s=unix_s))


def say(view: View, peer: PeerId, message: LinkMessage, now: float = 0.0) -> list[Output]:
    return view.step(now, Received(peer, message))


def link(view: View, peer: str, now: float = 0.0, outbound: bool = True, **fields: Any) -> list[Output]:
    """A link that stands and is greeted; what the greeting brought."""
    view.step(now, LinkUp(PeerId(peer), outbound, address(peer) if outbound else ""))
    return say(view, PeerId(peer), hello(peer, **fields), now)


def beat(view: View, now: float) -> list[Output]:
    return view.step(now, TimerFired(Timer("view", "beat", 0)))


def of(kind: type, out: Iterable[Output]) -> list:
    return [item for item in out if isinstance(item, kind)]


def sent(out: Iterable[Output], peer: str | None = None) -> list[LinkMessage]:
    return [item.message for item in of(Send, out) if peer in (None, item.peer)]


def dialled(out: Iterable[Output]) -> list[str]:
    return [item.address for item in of(Dial, out)]


def news(out: Iterable[Output], peer: PeerId = B) -> list[PeerRecord | Suspicion]:
    """What a beat passed on to a neighbour."""
    told_: list[PeerRecord | Suspicion] = []
    for message in sent(out, peer):
        if isinstance(message, Peers):
            told_ += message.records
        elif isinstance(message, Suspects):
            told_ += message.peers
    return told_


def states(view: View) -> dict[str, str]:
    return {row.peer: row.state for row in view.status()}


def redial(out: Iterable[Output]) -> SetTimer | None:
    return next((item for item in of(SetTimer, out) if item.timer.name == "redial"), None)


def picture(view: View) -> object:
    """Everything a view holds, to see that nothing changed."""

    def inside(item: object) -> object:
        return [getattr(item, name) for name in item.__slots__]

    return (
        {peer: inside(known) for peer, known in view._book.items()},
        {peer: inside(link_) for peer, link_ in view._links.items()},
        (view._stopping, view._redial_token, view._redial_at, view._rng.getstate()),
        (view._hello, view._wanted, view._quests, view._awaited, list(view._news)),
        (view._shuffle_at, view._rotate_at, view._rejoin_at, view._rotating, view._denied_at),
    )


# --- greeting -------------------------------------------------------------------------------------------
def test_each_end_says_hello_as_soon_as_the_link_stands() -> None:
    view = make_view()
    start(view)
    (greeting,) = sent(view.step(0, LinkUp(A, False, "")), A)
    assert greeting == hello(ME, incarnation=1)
    assert not view.is_live(A)
    assert view.num_live() == 0


def test_a_matching_hello_makes_a_neighbour() -> None:
    view = make_view()
    out = link(view, A)
    assert sent(out, A) == [Heartbeat(0, True), Shuffle(())]
    assert of(PeerUp, out) == [PeerUp(A, hello(A))]
    assert of(KeepPeer, out) == [KeepPeer(told(A))]
    assert of(Emit, out) == [Emit(LinkChanged(peer=A, up=True, reason="", num_live=1))]
    assert view.is_live(A)
    assert view.learns(A)
    assert view.live_learners() == [A]


MISMATCHES = [
    (hello(version=1), Reason.VERSION, f"protocol version 1 met version {PROTOCOL_VERSION}"),
    (hello(network="other"), Reason.NETWORK, "network 'other' met network 'net'"),
    (hello(learning="sampled"), Reason.PROTOCOL, "learning protocol 'sampled' met 'gossip'"),
    (hello(task="mnist"), Reason.TASK, "task 'mnist' met task 'digits'"),
    (
        hello(schema=b"\xab" * 32),
        Reason.SCHEMA,
        "task 'digits': parameters differ (schema abababababab met 000000000000)",
    ),
]


@pytest.mark.parametrize(("theirs", "reason", "detail"), MISMATCHES, ids=[m[1].value for m in MISMATCHES])
def test_a_mismatch_is_refused_in_a_sentence_that_names_both_sides(
    theirs: Hello, reason: Reason, detail: str
) -> None:
    view = make_view()
    view.step(0, LinkUp(A, False, ""))
    assert say(view, A, theirs) == [
        Penalise(A, reason, detail),
        Send(A, Refuse(reason, detail)),
        Disconnect(A, reason),
    ]
    assert not view.is_live(A)
    assert view.live_learners() == []


def test_the_first_mismatch_found_is_the_one_told() -> None:
    theirs = hello(version=9, network="x", learning="x", task="x", schema=b"x" * 32)
    assert mismatch(hello(), theirs)[0] is Reason.VERSION
    theirs = hello(network="x", learning="x", task="x", schema=b"x" * 32)
    assert mismatch(hello(), theirs)[0] is Reason.NETWORK


def test_the_longest_mismatch_still_fits_a_detail() -> None:
    long = "n" * 64
    for field in ("network", "learning", "task"):
        assert len(mismatch(hello(**{field: "m" * 64}), hello(**{field: long}))[1]) <= 240


def test_a_helper_is_welcome_whatever_its_task_but_not_in_another_network() -> None:
    helper = hello(learning=NO_LEARNING, task="none", schema=b"h" * 32)
    assert mismatch(hello(), helper) is None
    assert mismatch(helper, hello()) is None
    assert mismatch(helper, hello(network="other"))[0] is Reason.NETWORK
    view = make_view()
    view.step(0, LinkUp(A, False, ""))
    assert of(PeerUp, say(view, A, helper))
    assert view.is_live(A)
    assert not view.learns(A)
    assert view.live_learners() == []


def test_versions_are_compared_with_the_protocol_not_with_each_other() -> None:
    assert mismatch(hello(version=PROTOCOL_VERSION), hello(version=PROTOCOL_VERSION)) is None


@pytest.mark.parametrize("message", [Heartbeat(0, True), Shuffle(()), Peers(()), Bye()], ids=repr)
def test_a_message_before_the_hello_ends_the_link(message: LinkMessage) -> None:
    view = make_view()
    view.step(0, LinkUp(A, False, ""))
    out = say(view, A, message)
    assert of(Penalise, out)[0].reason is Reason.GREETING
    assert [refusal.reason for refusal in sent(out, A)] == [Reason.GREETING]
    assert of(Disconnect, out) == [Disconnect(A, Reason.GREETING)]


def test_a_second_hello_ends_the_link() -> None:
    view = make_view()
    link(view, A)
    out = say(view, A, hello(A))
    assert of(Penalise, out) == [Penalise(A, Reason.GREETING, "a second hello on one link")]
    assert of(Disconnect, out) == [Disconnect(A, Reason.GREETING)]


def test_what_comes_after_a_refusal_is_not_held_against_the_peer() -> None:
    """The refused end may well have accepted our hello, and asked and beaten before it read the refusal."""
    view = make_view(max_degree=1)
    link(view, A)
    view.step(0, LinkUp(B, False, ""))
    assert of(Disconnect, say(view, B, hello(B))) == [Disconnect(B, Reason.FULL)]
    before = picture(view)
    for message in (Shuffle(()), Heartbeat(0, True), Peers((told(C),)), hello(B), Bye()):
        assert say(view, B, message) == []
    assert picture(view) == before


def test_a_hello_teaches_only_the_sender_s_own_addresses() -> None:
    view = make_view()
    view.step(0, LinkUp(A, False, ""))
    say(view, A, hello_of(A, address(A, 7), address(B), "/ip4/1.1.1.1", task="digits"))
    assert {row.peer: row.addresses for row in view.status()} == {A: (address(A, 7),)}


def test_a_machine_with_many_interfaces_tells_as_many_addresses_as_a_hello_holds() -> None:
    view = make_view()
    view.step(0, Started(tuple(address(ME, port) for port in range(20)), (), None))
    (greeting,) = sent(view.step(0, LinkUp(A, False, "")))
    assert greeting.record.addresses == tuple(address(ME, port) for port in range(MAX_ADDRESSES))


def test_a_link_without_a_hello_is_closed_in_time() -> None:
    view = make_view(greeting_s=10)
    view.step(0, LinkUp(A, False, ""))
    assert of(Disconnect, beat(view, 10)) == []
    out = beat(view, 10.1)
    assert of(Penalise, out) == [Penalise(A, Reason.GREETING, "no hello")]
    assert of(Disconnect, out) == [Disconnect(A, Reason.GREETING)]


# --- liveness -------------------------------------------------------------------------------------------
def test_heartbeats_go_to_every_greeted_neighbour_and_tell_where_we_stand() -> None:
    view = make_view(heartbeat_s=5)
    link(view, A)
    link(view, B)
    view.step(0, LinkUp(C, True, ""))
    view.round, view.active = 7, False
    out = beat(view, 5)
    assert of(Send, out) == [Send(A, Heartbeat(7, False)), Send(B, Heartbeat(7, False))]
    assert of(SetTimer, out) == [SetTimer(Timer("view", "beat", 0), 5)]


def test_nodes_that_start_together_do_not_beat_together() -> None:
    firsts = {of(SetTimer, start(make_view(seed)))[0].after_s for seed in range(20)}
    assert len(firsts) == 20
    assert all(2.5 <= first <= 5 for first in firsts)


def test_silence_closes_the_link_and_any_word_keeps_it() -> None:
    view = make_view(dead_after_s=20)
    link(view, A)
    link(view, B)
    say(view, B, Offer(ModelRef(bytes(32), 1, 0, 1)), now=15)
    assert of(Disconnect, beat(view, 20)) == []
    assert of(Disconnect, beat(view, 21)) == [Disconnect(A, Reason.SILENT)]


def test_a_neighbour_that_finished_is_no_learner_any_more() -> None:
    view = make_view()
    link(view, A)
    link(view, B)
    assert say(view, A, Heartbeat(9, False)) == []
    assert view.live_learners() == [B]
    assert view.is_live(A)
    assert {row.peer: row.round for row in view.status()} == {A: 9, B: 0}
    say(view, A, Heartbeat(9, True))
    assert view.live_learners() == [A, B]


def test_a_lost_neighbour_is_told_once() -> None:
    view = make_view()
    link(view, A)
    out = view.step(1, LinkDown(A, Reason.LINK, "reset"))
    assert of(PeerDown, out) == [PeerDown(A, Reason.LINK)]
    assert of(Emit, out) == [Emit(LinkChanged(peer=A, up=False, reason="link", num_live=0))]
    again = view.step(1, LinkDown(A, Reason.LINK, "reset"))
    assert not of(PeerDown, again)
    assert not of(Emit, again)


def test_a_link_that_was_never_greeted_goes_down_unsaid() -> None:
    view = make_view()
    view.step(0, LinkUp(A, False, ""))
    assert not of(PeerDown, view.step(1, LinkDown(A, Reason.LINK)))


def test_goodbye_ends_the_link_and_the_peer_is_no_learner_at_once() -> None:
    view = make_view()
    link(view, A)
    assert say(view, A, Bye()) == [Disconnect(A, Reason.LEAVING)]
    assert view.live_learners() == []


def test_stopping_says_goodbye_and_dials_and_beats_no_more() -> None:
    view = make_view(bootstrap=(address(C),))
    start(view)
    link(view, A)
    link(view, B)
    out = view.step(1, StopRequested())
    leave = Peers((told(ME, incarnation=2, left=True),))
    assert out == [
        Send(A, leave),
        Send(A, Bye()),
        Disconnect(A, Reason.LEAVING),
        Send(B, leave),
        Send(B, Bye()),
        Disconnect(B, Reason.LEAVING),
    ]
    assert beat(view, 5) == []
    assert not dialled(view.step(6, LinkDown(A, Reason.LEAVING)))
    assert not dialled(view.step(60, DialFailed(address(C), Reason.TIMEOUT)))


def test_a_link_that_replaces_another_is_greeted_anew_without_a_wait() -> None:
    view = make_view(bootstrap=(address(A),))
    start(view)
    link(view, A)
    down = view.step(1, LinkDown(A, Reason.DUPLICATE))
    assert of(PeerDown, down) == [PeerDown(A, Reason.DUPLICATE)]
    view.step(1, LinkUp(A, False, ""))
    (row,) = view.status()
    assert (row.state, row.failures) == ("greeting", 0), "a duplicate is nobody's failure"
    assert of(PeerUp, say(view, A, hello(A), 1))


def test_a_peer_cannot_claim_a_duplicate_to_be_dialled_without_a_wait() -> None:
    view = make_view(bootstrap=(address(A),))
    start(view)
    link(view, A)
    out = say(view, A, Refuse(Reason.DUPLICATE, ""), 1)
    assert of(Disconnect, out) == [Disconnect(A, Reason.LINK)]
    assert not dialled(view.step(1, LinkDown(A, Reason.LINK)))


def test_being_refused_is_told_to_the_operator_and_remembered() -> None:
    view = make_view()
    start(view, peers=[A])
    view.step(0, LinkUp(A, True, address(A)))
    out = say(view, A, Refuse(Reason.SCHEMA, "parameters differ"))
    assert of(Emit, out)[0].record.reason == "refused by peer, schema: parameters differ"
    assert of(Disconnect, out) == [Disconnect(A, Reason.SCHEMA)]
    assert not of(Penalise, out)
    view.step(0, LinkDown(A, Reason.SCHEMA))
    assert view.status()[0].last_reason == "refused by peer, schema: parameters differ"
    assert say(view, A, Refuse(Reason.SCHEMA, "again")) == [], "it has no link any more"


def test_bytes_thrown_away_are_counted_and_end_the_link() -> None:
    view = make_view()
    link(view, A)
    assert view.step(1, Rejected(A, Reason.MALFORMED, "junk")) == [
        Penalise(A, Reason.MALFORMED, "junk"),
        Send(A, Refuse(Reason.MALFORMED, "junk")),
        Disconnect(A, Reason.MALFORMED),
    ]
    nobody = Rejected(PeerId(""), Reason.SECURITY, "plaintext")
    assert view.step(1, nobody) == [Penalise(PeerId(""), Reason.SECURITY, "plaintext")]


# --- links that are ending ------------------------------------------------------------------------------
ENDINGS = {
    "closed by us": lambda view: view.close(A, Reason.WRONG_HASH, "why"),
    "its bytes were thrown away": lambda view: view.step(1, Rejected(A, Reason.MALFORMED, "junk")),
    "a second hello": lambda view: say(view, A, hello(A), 1),
    "refused by it": lambda view: say(view, A, Refuse(Reason.FULL, "no room"), 1),
    "goodbye": lambda view: say(view, A, Bye(), 1),
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_a_link_that_is_ending_is_none_any_more(end: Callable[[View], list[Output]]) -> None:
    view = make_view()
    link(view, A)
    link(view, B)
    assert len(of(Disconnect, end(view))) == 1
    assert (view.is_live(A), view.learns(A), view.live_learners()) == (False, False, [B])
    assert view.some_learners(1) == [B]
    assert sent(beat(view, 2), A) == []
    assert sent(view.heartbeat()) == [Heartbeat(0, True)], "B's alone"
    say(view, A, Heartbeat(3, True), 3)
    assert view.live_learners() == [B], "what it still says does not bring it back"
    assert view.step(3, Rejected(A, Reason.MALFORMED, "junk")) == [Penalise(A, Reason.MALFORMED, "junk")]


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_a_link_that_was_ending_is_told_as_lost_when_it_is(end: Callable[[View], list[Output]]) -> None:
    view = make_view()
    link(view, A)
    end(view)
    assert of(PeerDown, view.step(4, LinkDown(A, Reason.LINK))) == [PeerDown(A, Reason.LINK)]
    link(view, A, 5)
    assert view.is_live(A), "and a new one is as good as any"
    assert view.learns(A)
    assert sent(beat(view, 6), A) == [Heartbeat(0, True)]


def test_closing_tells_the_peer_why_in_one_line() -> None:
    view = make_view()
    link(view, A)
    assert view.close(A, Reason.TOO_LARGE, "two\nlines") == [
        Send(A, Refuse(Reason.TOO_LARGE, "two lines")),
        Disconnect(A, Reason.TOO_LARGE),
    ]


def test_some_learners_are_drawn_and_all_where_there_are_no_more() -> None:
    view = make_view()
    for peer in (A, B, C):
        link(view, peer)
    say(view, C, Heartbeat(1, False))
    assert view.some_learners(0) == view.some_learners(2) == view.some_learners(9) == [A, B]
    drawn = [tuple(view.some_learners(1)) for _ in range(50)]
    assert set(drawn) == {(A,), (B,)}
    assert make_view().some_learners(1) == []


# --- dialling and back-off ------------------------------------------------------------------------------
def waits(view: View, reason: Reason, num: int) -> list[float]:
    """The wait after each of `num` failed dials, taken from the timer and waited in full."""
    now, waited = 0.0, []
    assert dialled(start(view)) == [address(A)]
    for _ in range(num):
        out = view.step(now, DialFailed(address(A), reason))
        timer = redial(out)
        assert not dialled(out)
        assert timer
        waited.append(timer.after_s)
        now += timer.after_s
        out = view.step(now, TimerFired(timer.timer))
        if not dialled(out):  # the sum of two floats may fall just short
            now += redial(out).after_s
            out = view.step(now, TimerFired(redial(out).timer))
        assert dialled(out) == [address(A)]
    return waited


def test_the_wait_between_dials_doubles_up_to_its_cap() -> None:
    waited = waits(make_view(bootstrap=(address(A),), redial_base_s=1, redial_max_s=30), Reason.TIMEOUT, 12)
    for number, wait in enumerate(waited):
        full = min(2**number, 30)
        assert full / 2 <= wait <= full


def test_the_wait_is_drawn_from_the_given_generator() -> None:
    assert waits(make_view(1, bootstrap=(address(A),)), Reason.TIMEOUT, 5) == waits(
        make_view(1, bootstrap=(address(A),)), Reason.TIMEOUT, 5
    )
    assert waits(make_view(1, bootstrap=(address(A),)), Reason.TIMEOUT, 5) != waits(
        make_view(2, bootstrap=(address(A),)), Reason.TIMEOUT, 5
    )


@pytest.mark.parametrize("reason", [Reason.SECURITY, Reason.SCHEMA, Reason.FULL, Reason.NETWORK])
def test_who_will_not_have_changed_in_a_second_is_dialled_late_from_the_first_failure(reason: Reason) -> None:
    (first,) = waits(make_view(bootstrap=(address(A),), redial_max_s=30), reason, 1)
    assert 15 <= first <= 30


def test_a_bootstrap_peer_is_tried_for_ever() -> None:
    view = make_view(bootstrap=(address(A),), redial_max_s=30)
    assert len(waits(view, Reason.UNREACHABLE, 2_000)) == 2_000, "about 12 hours"
    assert link(view, A)
    assert view.status()[0].failures == 0


def test_remembered_peers_that_are_gone_do_not_keep_a_lonely_node_from_its_bootstrap() -> None:
    """Hundreds of them, each of which takes its time to fail."""
    view = make_view(bootstrap=(address("boot"),), target_degree=3)
    waiting = dialled(start(view, peers=[f"gone{number}" for number in range(200)]))
    assert len(waiting) == 3
    now = 0.0
    for _ in range(10):
        if address("boot") in waiting:
            return
        now += 10
        waiting += dialled(view.step(now, DialFailed(waiting.pop(0), Reason.TIMEOUT)))
    pytest.fail("the bootstrap peer was never dialled")


def test_remembered_peers_come_before_the_bootstrap_peer() -> None:
    view = make_view(bootstrap=(address("boot"),), target_degree=2)
    assert address("boot") not in dialled(start(view, peers=[A, B, C]))
    alone = make_view(bootstrap=(address("boot"),), target_degree=2)
    assert dialled(start(alone, peers=[A])) == [address(A), address("boot")]


def test_each_failure_turns_to_the_next_address() -> None:
    view = make_view(bootstrap=(address(A, 1), address(A, 2), address(A, 3)))
    out = start(view)
    tried, now = [], 0.0
    for _ in range(6):
        (dial,) = dialled(out)
        tried.append(dial)
        timer = redial(view.step(now, DialFailed(dial, Reason.TIMEOUT)))
        now += timer.after_s + 1e-6
        out = view.step(now, TimerFired(timer.timer))
    assert tried[:3] == tried[3:]
    assert len(set(tried)) == 3


def test_an_old_redial_timer_is_dropped() -> None:
    view = make_view(bootstrap=(address(A), address(B)))
    start(view)
    first = redial(view.step(0, DialFailed(address(A), Reason.SCHEMA)))
    second = redial(view.step(0, DialFailed(address(B), Reason.TIMEOUT)))
    assert second.after_s < first.after_s
    before = picture(view)
    assert view.step(1_000, TimerFired(first.timer)) == []
    assert picture(view) == before
    assert len(dialled(view.step(1_000, TimerFired(second.timer)))) == 2


def test_a_talkative_neighbour_does_not_pile_up_timers() -> None:
    view = make_view(bootstrap=(address(B),))
    start(view)
    link(view, A)
    view.step(0, DialFailed(address(B), Reason.SCHEMA))
    out = [item for _ in range(100) for item in say(view, A, Peers(()))]
    assert of(SetTimer, out) == []


def test_a_failed_dial_of_somebody_unknown_changes_nothing() -> None:
    view = make_view()
    before = picture(view)
    assert view.step(0, DialFailed(address("stranger"), Reason.TIMEOUT)) == []
    assert view.step(0, DialFailed("no peer in it", Reason.TIMEOUT)) == []
    assert picture(view) == before


# --- degree ---------------------------------------------------------------------------------------------
def test_as_many_links_are_dialled_as_are_missing() -> None:
    view = make_view(target_degree=3)
    first = dialled(start(view, peers=[f"p{number}" for number in range(10)]))
    assert len(set(first)) == 3
    assert len(dialled(view.step(0, DialFailed(first[0], Reason.TIMEOUT)))) == 1, "another in its place"
    assert view.step(0, LinkUp(PeerId("inbound"), False, "")) == [
        Send(PeerId("inbound"), hello(ME, incarnation=1))
    ]
    assert len(dialled(view.step(0, DialFailed(first[1], Reason.TIMEOUT)))) == 1, (
        "a silent stranger keeps no place"
    )
    view.step(0, Received(PeerId("inbound"), hello(PeerId("inbound"))))
    assert dialled(view.step(0, DialFailed(first[2], Reason.TIMEOUT))) == [], "a greeted inbound link counts"


def test_a_lost_link_is_made_up_for() -> None:
    view = make_view(target_degree=2)
    start(view)
    link(view, A)
    link(view, B)
    assert dialled(say(view, A, Peers((told(C),)))) == []
    assert dialled(view.step(1, LinkDown(A, Reason.LINK))) == [address(C)]


def test_nobody_is_dialled_without_a_target() -> None:
    assert dialled(start(make_view(target_degree=0, bootstrap=(address(A),)), peers=[B])) == []


def test_peers_are_chosen_by_the_seed_alone() -> None:
    many = [f"p{number}" for number in range(50)]
    choices = [tuple(dialled(start(make_view(seed), peers=many))) for seed in (1, 1, 2)]
    assert choices[0] == choices[1] != choices[2]


def test_a_static_topology_keeps_the_drawn_links_and_looks_for_nobody() -> None:
    view = make_view(bootstrap=(address(A), address(B)), static=True, target_degree=1)
    assert dialled(start(view, peers=[C])) == [address(A), address(B)]
    assert [type(message) for message in sent(link(view, A))] == [Heartbeat]
    assert dialled(say(view, A, Peers((told("D"),)))) == [], "heard of, and left alone"
    timer = redial(view.step(1, LinkDown(A, Reason.LINK)))
    assert dialled(view.step(99, TimerFired(timer.timer))) == [address(A)]


def test_a_full_node_refuses_but_names_other_doors() -> None:
    view = make_view(max_degree=2)
    link(view, A)
    link(view, B)
    view.step(0, LinkUp(C, False, ""))
    out = say(view, C, hello(C))
    peers, refusal = sent(out, C)
    assert {record.peer for record in peers.records} == {A, B}
    assert refusal == Refuse(Reason.FULL, "this node keeps at most 2 links")
    assert of(Disconnect, out) == [Disconnect(C, Reason.FULL)]
    assert not of(PeerUp, out)
    assert view.num_live() == 2


# --- peer exchange --------------------------------------------------------------------------------------
def test_who_shuffles_is_told_of_others_that_seem_to_be_there_but_not_of_itself() -> None:
    view = make_view()
    for peer in (A, B, C):
        link(view, peer)
    view.step(0, LinkUp(PeerId("D"), False, ""))
    answer = sent(say(view, A, Shuffle(())), A)[0]
    assert set(answer.records) == {told(B), told(C)}


def test_a_shuffle_holds_a_few_records_each_way() -> None:
    view = make_view(max_degree=40)
    start(view)
    for number in range(39):
        link(view, f"p{number}")
    (shuffle,) = [message for message in sent(link(view, "p39")) if isinstance(message, Shuffle)]
    assert shuffle.records[0] == view.record, "itself first"
    assert len({record.peer for record in shuffle.records}) == SHUFFLED
    answer = sent(say(view, PeerId("p0"), Shuffle(())))[0]
    assert len({record.peer for record in answer.records}) == SHUFFLED <= MAX_PEERS_PER_MESSAGE


def test_a_record_whose_address_names_another_peer_is_ignored() -> None:
    view = make_view()
    link(view, A)
    out = say(view, A, Peers((told(B, address(C), "/ip4/1.1.1.1/tcp/1", address(ME)),)))
    assert dialled(out) == []
    assert {row.peer: row.addresses for row in view.status()} == {A: (address(A),), B: ()}
    newer = told(B, address(C), address(B), incarnation=1)
    assert dialled(say(view, A, Peers((newer,)))) == [address(B)]


def test_nobody_learns_itself() -> None:
    view = make_view(bootstrap=(address(ME),))
    link(view, A)
    say(view, A, Peers((told(ME),)))
    assert [row.peer for row in view.status()] == [A]


FORGED = {
    "signed by who tells it": told(B, address(B, 100), signer=A, incarnation=9),
    "signed by nobody": PeerRecord(B, (address(B, 100),), 9),
    "a leave that its owner never signed": told(B, signer=A, incarnation=9, left=True),
    "of another network": told(B, address(B, 100), network="other", incarnation=9),
    "with another address": msgspec.structs.replace(told(B, incarnation=9), addresses=(address(B, 100),)),
    "with another incarnation": msgspec.structs.replace(told(B, incarnation=8), incarnation=9),
    "of a peer without a key": told(KEYLESS),
    "of this node, signed by another": told(ME, signer=A, incarnation=MAX_INCARNATION),
    "of this node, a leave signed by another": told(ME, signer=A, incarnation=9, left=True),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("message", [Peers, Shuffle])
def test_a_forged_record_ends_the_link_with_who_told_it_and_changes_nothing(
    forged: PeerRecord, message: type[Peers | Shuffle]
) -> None:
    view = make_view()
    start(view)
    link(view, A)
    link(view, B)
    before, mine = {row.peer: row.addresses for row in view.status()}, view.record
    out = say(view, A, message((forged, told(C))))
    assert [item.reason for item in of(Penalise, out)] == [Reason.FORGED]
    assert of(Disconnect, out) == [Disconnect(A, Reason.FORGED)]
    assert sent(out, A)[-1].reason is Reason.FORGED
    assert not view.is_live(A)
    assert view.is_live(B)
    assert {row.peer: row.addresses for row in view.status()} == before
    assert view.record == mine
    assert news(beat(view, 5)) == []


@pytest.mark.parametrize("peer", [B, ME], ids=["another peer's", "our own"])
def test_who_greets_with_a_stolen_record_is_refused(peer: PeerId) -> None:
    """Copied from whoever said it: genuine, but not the one whose key the channel has proved."""
    view = make_view()
    view.step(0, LinkUp(A, False, ""))
    out = say(view, A, hello(peer, incarnation=7))
    assert of(Penalise, out) == [
        Penalise(A, Reason.FORGED, "its record is not signed by its key for this network")
    ]
    assert of(Disconnect, out) == [Disconnect(A, Reason.FORGED)]
    assert view.num_known() == 0
    assert not of(PeerUp, out)


def test_a_neighbour_is_believed_what_a_peer_signed_itself() -> None:
    view = make_view()
    link(view, A)
    link(view, B)
    moved = told(B, address(B, 9), incarnation=1)
    say(view, A, Peers((moved,)))
    assert {row.peer: row.addresses for row in view.status()}[B] == (address(B, 9), address(B))
    say(view, A, Peers((told(B),)))
    assert {row.peer: row.addresses for row in view.status()}[B][0] == address(B, 9), (
        "old news changes nothing"
    )


def test_hearsay_cannot_push_out_what_the_operator_said() -> None:
    view = make_view(bootstrap=(address(B, 4001),))
    start(view)
    link(view, A)
    say(view, A, Peers((told(B, *(address(B, port) for port in range(100, 108))),)))
    assert view.is_live(A)
    addresses = {row.peer: row.addresses for row in view.status()}[B]
    assert address(B, 4001) in addresses
    assert len(addresses) <= MAX_ADDRESSES


def test_the_newest_address_comes_first_and_old_ones_fall_off() -> None:
    view = make_view()
    link(view, A)
    for port in range(10, 16):
        say(view, A, Peers((told(B, address(B, port), incarnation=port),)))
    assert {row.peer: row.addresses for row in view.status()}[B] == tuple(
        address(B, port) for port in (15, 14, 13, 12)
    )


def test_memory_of_peers_is_bounded_and_keeps_bootstrap_and_neighbours() -> None:
    boots = [f"boot{number}" for number in range(4)]
    view = make_view(bootstrap=tuple(map(address, boots)), max_known=8, target_degree=0)
    start(view)
    link(view, A)
    view.step(0, DialFailed(address("boot0"), Reason.TIMEOUT))
    for number in range(100):
        say(view, A, Peers((told(f"p{number}"),)))
        assert len(view.status()) <= 8
    assert {*boots, A, "p99"} <= {row.peer for row in view.status()}


def test_the_peer_that_failed_most_is_forgotten_first() -> None:
    view = make_view(max_known=8, target_degree=8)
    start(view, peers=[f"p{number}" for number in range(8)])
    view.step(0, DialFailed(address("p5"), Reason.TIMEOUT))
    view.step(0, LinkUp(A, False, ""))
    say(view, A, hello(A))
    known = {row.peer for row in view.status()}
    assert "p5" not in known
    assert A in known


def test_a_peer_that_is_being_dialled_is_not_forgotten() -> None:
    """The answer to the dial would find nobody; and it would be dialled a second time at once."""
    view = make_view(max_known=8, target_degree=2)
    dialling = dialled(start(view, peers=[f"p{number}" for number in range(8)]))
    assert len(dialling) == 2
    link(view, A)
    for number in range(100):
        say(view, A, Peers((told(f"q{number}"),)))
    states = {row.addresses[0]: row.state for row in view.status() if row.state == "dialling"}
    assert sorted(states) == sorted(dialling)
    assert len(view.status()) <= 8
    assert view.is_live(A)


def test_even_the_one_that_failed_most_stays_while_it_is_dialled_again() -> None:
    view = make_view(max_known=8, target_degree=8)
    start(view, peers=[f"p{number}" for number in range(8)])
    timer = redial(view.step(0, DialFailed(address("p5"), Reason.TIMEOUT)))
    assert address("p5") in dialled(view.step(60, TimerFired(timer.timer)))
    link(view, A, 60)
    assert "p5" in {row.peer for row in view.status()}
    assert A not in {row.peer for row in view.status() if row.addresses}, "all eight are being dialled"
    assert view.is_live(A), "which is no reason against a link"


def test_where_nobody_can_be_forgotten_nobody_new_is_learnt() -> None:
    boots = tuple(address(f"boot{number}") for number in range(8))
    view = make_view(bootstrap=boots, max_known=8)
    start(view, peers=[A])
    assert A not in {row.peer for row in view.status()}


# --- failure detection ----------------------------------------------------------------------------------
QUIET = {
    "heartbeat_s": 5,
    "dead_after_s": 20,
    "shuffle_s": 1e4,
    "rotate_s": 0,
    "rejoin_s": 0,
    "target_degree": 1,
}


def silent(num_helpers: int = 2) -> tuple[View, list[PeerId], list[Output]]:
    """A view whose neighbour A was last heard at 0, its helpers at 10; and what the beat at 11 brought."""
    view = make_view(**QUIET)
    start(view, 0, unix_s=100)
    helpers = [PeerId(f"h{number}") for number in range(num_helpers)]
    link(view, A)
    for helper in helpers:
        link(view, helper)
    hear(view, helpers, 10)
    return view, helpers, beat(view, 11)


def hear(view: View, peers: Iterable[PeerId], now: float) -> None:
    for peer in peers:
        say(view, peer, Heartbeat(0, True), now)


def probes(out: Iterable[Output]) -> dict[PeerId, Probe]:
    return {item.peer: item.message for item in of(Send, out) if isinstance(item.message, Probe)}


def test_after_half_the_time_a_silent_neighbour_is_asked_itself_and_through_others() -> None:
    view, helpers, out = silent()
    assert [type(message) for message in sent(out, A)] == [Heartbeat, Ping]
    assert probes(out).keys() == set(helpers)
    assert {probe.peer for probe in probes(out).values()} == {A}
    assert len({probe.token for probe in probes(out).values()}) == 2, "each answer finds its question"
    assert not of(Disconnect, out)
    assert not probes(beat(view, 16)), "once for one silence"
    say(view, A, Heartbeat(0, True), 17)
    beat(view, 22)
    hear(view, helpers, 27)
    assert probes(beat(view, 28)), "and again for the next"


def test_no_more_are_asked_than_the_settings_say_and_none_but_neighbours() -> None:
    view = make_view(**QUIET, helpers=3)
    link(view, A)
    for number in range(6):
        link(view, f"h{number}")
    link(view, "brief", outbound=False, brief=True)
    view.step(0, LinkUp(PeerId("greeting"), False, ""))
    hear(view, [PeerId(f"h{number}") for number in range(6)] + [PeerId("brief")], 10)
    asked = probes(beat(view, 11))
    assert len(asked) == 3
    assert not asked.keys() & {A, "brief", "greeting"}


def test_whoever_answers_the_ping_stays() -> None:
    view, helpers, out = silent()
    (ping,) = [message for message in sent(out, A) if isinstance(message, Ping)]
    say(view, A, Pong(ping.token, 3), 11.25)
    hear(view, helpers, 22)
    assert not of(Disconnect, beat(view, 26))
    assert view.is_live(A)
    row = next(row for row in view.status() if row.peer == A)
    assert (row.round, row.latency_ms) == (3, 250.0)


def test_a_neighbour_that_nobody_reaches_is_given_up_and_suspected_aloud() -> None:
    view, helpers, out = silent()
    for helper, probe in probes(out).items():
        say(view, helper, Probed(probe.token, False), 12)
    hear(view, helpers, 20)
    out = beat(view, 21)
    assert of(Disconnect, out) == [Disconnect(A, Reason.SILENT)]
    view.step(21, LinkDown(A, Reason.SILENT))
    assert states(view)[A] == "suspected"
    assert [news(out, helper) for helper in helpers] == [[Suspicion(A, 0)]] * 2
    assert news(beat(view, 25), helpers[0]) == [], "it is said once"


def test_a_neighbour_that_another_reaches_is_linked_with_anew_and_not_suspected() -> None:
    view, helpers, out = silent()
    for helper, probe in probes(out).items():
        say(view, helper, Probed(probe.token, helper == helpers[1]), 12)
    assert view.is_live(A), "another's word cuts no link"
    hear(view, helpers, 20)
    out = beat(view, 21)
    assert of(Disconnect, out) == [Disconnect(A, Reason.SILENT)]
    assert [news(out, helper) for helper in helpers] == [[], []]
    view.step(21, LinkDown(A, Reason.SILENT))
    assert states(view)[A] == "known"
    view.step(22, LinkDown(helpers[0], Reason.LINK))
    assert dialled(view.step(22, LinkDown(helpers[1], Reason.LINK))) == [address(A)]


def test_an_answer_to_a_question_that_was_never_asked_means_nothing() -> None:
    view, helpers, _ = silent()
    for token in (0, 10**6, 2**48):
        assert say(view, helpers[0], Probed(token, True), 12) == []
    hear(view, helpers, 20)
    assert news(beat(view, 21), helpers[0]) == [Suspicion(A, 0)]


def test_who_is_asked_answers_of_a_neighbour_by_what_it_heard_lately() -> None:
    view = make_view(**QUIET)
    link(view, A)
    link(view, B)
    say(view, A, Heartbeat(0, True), 10)
    assert sent(say(view, B, Probe(7, A), 20), B) == [Probed(7, True)]
    assert sent(say(view, B, Probe(8, A), 20.1), B) == [Probed(8, False)]
    assert sent(say(view, B, Probe(9, C), 20), B) == [Probed(9, False)], "of whom it knows nothing"


@pytest.mark.parametrize("there", [True, False])
def test_who_is_asked_of_another_peer_dials_it_for_a_moment(there: bool) -> None:
    view = make_view(**QUIET)
    link(view, A)
    link(view, B)
    say(view, A, Peers((told(C),)))
    assert dialled(say(view, A, Probe(7, C))) == [address(C)]
    assert dialled(say(view, B, Probe(8, C))) == [], "one dial for both"
    if there:
        view.step(1, LinkUp(C, True, address(C)))
        out = say(view, C, hello(C), 1)
        assert not of(PeerUp, out)
    else:
        out = view.step(1, DialFailed(address(C), Reason.TIMEOUT))
    assert sent(out, A) == [Probed(7, there)]
    assert sent(out, B) == [Probed(8, there)]


def test_a_flood_of_probes_is_bounded() -> None:
    view = make_view(**QUIET, max_known=400)
    link(view, A)
    link(view, B)
    say(view, A, Peers((told(C),)))
    out = [item for token in range(500) for item in say(view, B, Probe(token, C))]
    assert len(dialled(out)) == 1
    assert sum(map(len, view._quests.values())) <= 64
    assert sent(out, B)[0] == Probed(64, False), "more cannot wait for an answer"


def test_what_others_say_cuts_no_link_but_reaches_the_suspected() -> None:
    view = make_view(**QUIET)
    start(view)
    link(view, A)
    link(view, B)
    assert not of(Disconnect, say(view, B, Suspects((Suspicion(A, 0),))))
    assert view.is_live(A)
    assert view.live_learners() == [A, B]
    assert states(view)[A] == "live"
    out = beat(view, 5)
    assert not of(Disconnect, out)
    assert news(out, A) == [Suspicion(A, 0)]
    asked = sent(say(view, B, Shuffle(()), 6), B)[0]
    assert {record.peer for record in asked.records} == {A}, "and it is named to others as before"


def test_two_neighbours_of_a_suspect_do_not_tell_each_other_without_end() -> None:
    view = make_view(**QUIET)
    link(view, A)
    link(view, B)
    told_ = 0
    for number in range(1, 20):
        say(view, B, Suspects((Suspicion(A, 0),)), number)
        say(view, A, Heartbeat(0, True), number)
        told_ += len(news(beat(view, number), B))
    assert told_ == 1


def test_who_is_suspected_is_told_to_nobody_and_dialled_last_until_it_denies() -> None:
    view = make_view(**QUIET)
    start(view)
    for peer in (A, B):
        link(view, peer)
    say(view, A, Peers((told(C), told("D"))))
    say(view, B, Suspects((Suspicion(C, 0),)))
    assert states(view)[C] == "suspected"
    assert news(beat(view, 5), A) == [Suspicion(C, 0)], "it is passed on once"
    asked = sent(say(view, B, Shuffle(()), 6), B)[0]
    assert {record.peer for record in asked.records} == {A, "D"}
    say(view, B, Suspects((Suspicion(C, 0),)), 7)
    assert news(beat(view, 10), A) == []
    say(view, B, Peers((told(C),)), 11)
    assert states(view)[C] == "suspected", "what it said before it was suspected denies nothing"
    denial = told(C, incarnation=1)
    say(view, B, Peers((denial,)), 12)
    assert states(view)[C] == "known"
    assert news(beat(view, 15), A) == [denial], "and so is the denial"
    say(view, B, Suspects((Suspicion(C, 0),)), 16)
    assert states(view)[C] == "known", "old suspicions mean nothing"
    say(view, B, Suspects((Suspicion(C, 1),)), 17)
    assert states(view)[C] == "suspected"


def test_the_suspected_are_dialled_when_nobody_else_is_left() -> None:
    view = make_view(**QUIET | {"target_degree": 0})
    start(view)
    link(view, B)
    say(view, B, Peers((told(C), told("D"))))
    say(view, B, Suspects((Suspicion(C, 0),)))
    view._settings = msgspec.structs.replace(view._settings, target_degree=1)
    out = view.step(1, LinkDown(B, Reason.LINK))
    assert dialled(out) == [address("D")]
    view._settings = msgspec.structs.replace(view._settings, target_degree=2)
    assert address(C) in dialled(view.step(1, DialFailed(address("D"), Reason.TIMEOUT)))


def test_a_node_denies_that_it_is_dead_by_one_incarnation() -> None:
    view = make_view(**QUIET)
    start(view, unix_s=100)
    link(view, A)
    link(view, B)
    own = view.record.incarnation
    assert own == 100
    say(view, A, Suspects((Suspicion(ME, own - 1),)), 5)
    assert view.record.incarnation == own, "an old suspicion is denied already"
    out = say(view, A, Suspects((Suspicion(ME, MAX_INCARNATION),)), 5)
    assert view.record.incarnation == own + 1, "whatever incarnation somebody invents"
    assert is_genuine("net", view.record, FakeSignatures(ME))
    assert not of(Disconnect, out)
    assert news(beat(view, 6), B) == [view.record]


def test_a_storm_of_suspicions_makes_a_node_sign_once_a_beat() -> None:
    view = make_view(**QUIET)
    start(view, unix_s=100)
    link(view, A)
    signed: list[bytes] = []
    view._signatures.sign = lambda data: (signed.append(data), FakeSignatures(ME).sign(data))[1]  # type: ignore[method-assign]
    for number in range(1_000):
        now = 10 + number * 0.05
        say(view, A, Suspects((Suspicion(ME, MAX_INCARNATION - number),) * 16), now)
        if number % 100 == 0:
            beat(view, now)
    assert 9 <= len(signed) <= 11, "50 seconds are ten beats"
    assert view.record.incarnation == 100 + len(signed)


def test_a_peer_that_was_met_and_cannot_be_dialled_twice_is_suspected() -> None:
    view = make_view(**QUIET, bootstrap=(address(B),))
    start(view)
    link(view, A)
    link(view, B)
    view.step(1, LinkDown(A, Reason.LINK))
    assert states(view)[A] == "known"
    view.step(2, DialFailed(address(A), Reason.TIMEOUT))
    assert states(view)[A] == "suspected"
    assert news(beat(view, 5)) == [Suspicion(A, 0)]


def test_a_peer_that_links_up_while_it_is_dialled_is_neither_lost_nor_suspected() -> None:
    view = make_view(**QUIET)
    start(view)
    link(view, A)
    view.step(1, LinkDown(A, Reason.LINK))
    view.reach(2, A)
    link(view, A, 3, outbound=False)
    out = view.step(4, DialFailed(address(A), Reason.TIMEOUT))
    assert not of(Unreachable, out)
    assert states(view)[A] == "live"


# --- coming and going -----------------------------------------------------------------------------------
def test_a_leave_is_signed_told_on_and_believed() -> None:
    view = make_view(**QUIET)
    start(view)
    link(view, A)
    link(view, B)
    leave = told(C, incarnation=1, left=True)
    say(view, A, Peers((told(C),)))
    say(view, A, Peers((leave,)))
    assert states(view)[C] == "left"
    assert news(beat(view, 5), B) == [leave]
    assert {record.peer for record in sent(say(view, B, Shuffle(())), B)[0].records} == {A}
    say(view, A, Peers((told(C, incarnation=1),)))
    assert states(view)[C] == "left", "a join of the same incarnation does not undo it"
    say(view, A, Peers((told(C, incarnation=2),)))
    assert states(view)[C] == "known"


def test_who_has_left_is_not_dialled() -> None:
    view = make_view(**QUIET | {"target_degree": 3})
    start(view)
    link(view, A)
    out = say(view, A, Peers((told(B, incarnation=1, left=True), told(C))))
    assert dialled(out) == [address(C)]
    view.step(1, DialFailed(address(C), Reason.UNREACHABLE))
    say(view, A, Peers((told(C, incarnation=1, left=True),)), 2)
    for number in range(100):
        timer = Timer("view", "redial", view._redial_token)
        assert dialled(view.step(10 + 10 * number, TimerFired(timer))) == []
        say(view, A, Heartbeat(0, True), 10 + 10 * number)
        assert dialled(beat(view, 10 + 10 * number)) == []


def test_one_who_was_never_heard_of_and_has_left_is_no_news() -> None:
    view = make_view(**QUIET)
    link(view, A)
    link(view, B)
    say(view, A, Peers((told(C, incarnation=1, left=True),)))
    assert C not in states(view)
    assert news(beat(view, 5), B) == []


def test_a_node_that_meets_a_newer_record_of_itself_outdoes_it() -> None:
    view = make_view(**QUIET)
    start(view, unix_s=100)
    link(view, A)
    link(view, B)
    former = told(ME, incarnation=5_000, round=9)
    say(view, A, Peers((former,)))
    assert view.record.incarnation == 5_001
    assert (view.record.addresses, view.record.left) == ((address(ME),), False)
    assert is_genuine("net", view.record, FakeSignatures(ME))
    assert news(beat(view, 5), B) == [view.record]
    again = view.record
    say(view, A, Peers((former,)))
    assert view.record == again


def test_a_node_that_comes_back_within_a_second_outdoes_its_own_leave() -> None:
    view = make_view(**QUIET)
    start(view, unix_s=100)
    link(view, A)
    say(view, A, Peers((told(ME, incarnation=100, left=True),)))
    assert (view.record.incarnation, view.record.left) == (101, False)
    say(view, A, Peers((told(ME, incarnation=99, left=True),)))
    assert view.record.incarnation == 101


def test_a_node_that_leaves_does_not_deny_its_own_leave() -> None:
    view = make_view(**QUIET)
    start(view, unix_s=100)
    link(view, A)
    view.step(1, StopRequested())
    leave = view.record
    assert leave.left
    say(view, A, Peers((leave,)), 1)
    assert view.record == leave


def test_who_greets_with_less_than_is_known_of_it_is_told_what_it_said_before() -> None:
    view = make_view(**QUIET)
    start(view)
    link(view, B)
    former = told(A, incarnation=50, left=True)
    say(view, B, Peers((told(A),)))
    say(view, B, Peers((former,)))
    assert Peers((former,)) in sent(link(view, A, 1, incarnation=7), A)
    say(view, A, Peers((told(A, incarnation=51),)), 1)
    view.step(2, LinkDown(A, Reason.LINK))
    assert states(view)[A] == "known"


# --- invented peers -------------------------------------------------------------------------------------
def test_a_view_full_of_invented_peers_is_bounded_and_costs_nobody_who_was_met() -> None:
    view = make_view(**QUIET, max_known=40)
    start(view)
    met = [PeerId(f"met{number}") for number in range(12)]
    for peer in (A, B, *met):
        link(view, peer)
    for peer in met:
        view.step(1, LinkDown(peer, Reason.SURPLUS))
    for number in range(200):
        say(view, A, Peers(tuple(told(f"invented{number}-{index}") for index in range(16))), 1)
        assert view.num_known() <= 40
    invented = [peer for peer in states(view) if peer.startswith("invented")]
    assert 1 <= len(invented) <= 10, "a quarter"
    assert {A, B, *met} <= states(view).keys()
    assert view.is_live(A), "it broke no rule"
    assert view.is_live(B)


def test_even_many_inventors_push_out_nobody_who_was_met() -> None:
    view = make_view(**QUIET, max_known=16, max_degree=64)
    start(view)
    met = [PeerId(f"met{number}") for number in range(8)]
    for peer in met:
        link(view, peer)
    for liar in met[4:]:
        for number in range(20):
            say(view, liar, Peers(tuple(told(f"{liar}-{number}-{index}") for index in range(16))), 1)
    for peer in met[:4]:
        view.step(1, LinkDown(peer, Reason.SURPLUS))
    view.step(1, Discovered(tuple(address(f"found{number}") for number in range(16))))
    assert view.num_known() <= 16
    assert set(met) <= states(view).keys()


# --- private networks -----------------------------------------------------------------------------------
INVITER, HOLDER = FakeSignatures("inviter"), FakeSignatures("holder")


def admission(
    peer: PeerId = A, expires_at: int = 0, inviter: FakeSignatures = INVITER, **changes: Any
) -> Admission:
    said = invitation_bytes("net", HOLDER.author, expires_at)
    fields = {"network": "net", "inviter": inviter.author, "holder": HOLDER.author, "expires_at": expires_at}
    invitation = Invitation(**fields | changes, signature=inviter.sign(said))
    return Admission(invitation, HOLDER.sign(admission_bytes("net", peer)))


OUTSIDERS = {
    "with nothing": (None, Reason.UNINVITED),
    "with another peer's invitation": (admission(B), Reason.FORGED),
    "with an invitation that it made itself": (admission(inviter=FakeSignatures(A)), Reason.UNINVITED),
    "with an invitation that was changed": (admission(holder=FakeSignatures(A).author), Reason.FORGED),
    "with an invitation into another network": (admission(network="other"), Reason.UNINVITED),
    "with one that has expired": (admission(expires_at=1_005), Reason.EXPIRED),
}


@pytest.mark.parametrize(("shown", "reason"), OUTSIDERS.values(), ids=OUTSIDERS)
def test_nobody_enters_a_private_network(shown: Admission | None, reason: Reason) -> None:
    view = make_view(policy=AdmissionPolicy(inviters=frozenset({INVITER.author})), max_degree=1)
    start(view, 100, unix_s=1_000)
    out = link(view, A, 105, admission=shown)
    assert [item.reason for item in of(Penalise, out)] == [reason]
    assert of(Disconnect, out) == [Disconnect(A, reason)]
    assert not view.is_live(A)
    assert not of(PeerUp, out)
    assert view.num_known() == 0


def test_the_invited_enter_a_private_network_until_the_invitation_ends() -> None:
    view = make_view(policy=AdmissionPolicy(inviters=frozenset({INVITER.author})))
    start(view, 100, unix_s=1_000)
    assert of(PeerUp, link(view, A, 104, admission=admission(expires_at=1_005)))
    assert of(PeerUp, link(view, B, 10**6, admission=admission(B)))


def test_members_and_those_who_invite_need_no_invitation() -> None:
    policy = AdmissionPolicy(
        members=frozenset({FakeSignatures(A).author}), inviters=frozenset({FakeSignatures(B).author})
    )
    view = make_view(policy=policy)
    assert of(PeerUp, link(view, A))
    assert of(PeerUp, link(view, B))
    assert not of(PeerUp, link(view, C))


# --- links on demand ------------------------------------------------------------------------------------
def full(**settings: Any) -> View:
    """With all the links that it wants to keep: A's."""
    view = make_view(**QUIET | settings)
    start(view)
    link(view, A)
    say(view, A, Peers((told(B), told(C))))
    return view


def test_a_linked_peer_is_reached_at_once() -> None:
    assert full().reach(1, A) == [Reached(A)]


def test_a_known_peer_is_dialled_and_reached_on_a_link_that_is_not_kept() -> None:
    view = full()
    assert view.reach(1, B) == [Dial(address(B))]
    assert view.reach(1, B) == [], "it is being dialled"
    (greeting,) = sent(view.step(2, LinkUp(B, True, address(B))))
    assert greeting.brief
    assert view.reach(2, B) == [], "its hello is on the way"
    out = say(view, B, hello(B), 2)
    assert of(Reached, out) == [Reached(B)]
    assert not of(PeerUp, out)
    assert not of(Emit, out)
    assert (view.is_live(B), view.is_neighbour(B), view.num_live()) == (True, False, 1)
    assert view.live_learners() == view.learners() == [A]
    assert view.some_learners(5) == [A]
    assert states(view)[B] == "brief"
    assert not of(PeerDown, view.step(3, LinkDown(B, Reason.LINK)))


def test_a_peer_is_reached_on_a_link_that_is_kept_while_one_is_missing() -> None:
    view = full(target_degree=3)
    view.step(1, DialFailed(address(B), Reason.TIMEOUT))
    assert view.reach(1, B) == [Dial(address(B))]
    (greeting,) = sent(view.step(2, LinkUp(B, True, address(B))))
    assert not greeting.brief
    out = say(view, B, hello(B), 2)
    assert of(PeerUp, out)
    assert of(Reached, out) == [Reached(B)]


def test_a_peer_of_whom_only_the_caller_knows_an_address_is_dialled_there() -> None:
    view = full()
    d = PeerId("D")
    assert view.reach(1, d) == [Unreachable(d, Reason.UNREACHABLE)]
    assert view.reach(1, d, (address("E"), "nonsense")) == [Unreachable(d, Reason.UNREACHABLE)]
    assert view.reach(1, d, (address("E"), address(d, 7))) == [Dial(address(d, 7))]
    assert view.reach(1, ME, (address(ME),)) == [Unreachable(ME, Reason.UNREACHABLE)]


@pytest.mark.parametrize(
    "end",
    [
        lambda view: view.step(3, DialFailed(address(B), Reason.TIMEOUT)),
        lambda view: (view.step(3, LinkUp(B, True, "")), view.step(3, LinkDown(B, Reason.LINK)))[1],
        lambda view: (link(view, B, 3), view.step(4, LinkDown(B, Reason.LINK)))[1],
        lambda view: (link(view, B, 3, schema=b"s" * 32), view.step(4, LinkDown(B, Reason.SCHEMA)))[1],
    ],
    ids=["not dialled", "not greeted", "lost later", "turned away"],
)
def test_who_cannot_be_reached_is_told_once_to_who_wants_it(end: Callable[[View], list[Output]]) -> None:
    view = full()
    view.reach(1, B)
    assert [item.peer for item in of(Unreachable, end(view))] == [B]
    view.let_go(5, B)
    view.reach(6, B)
    view.let_go(6, B)
    assert not of(Unreachable, view.step(7, DialFailed(address(B), Reason.TIMEOUT)))


def test_a_link_that_was_dialled_for_a_moment_is_closed_by_who_dialled_it_when_idle() -> None:
    view = full(brief_s=10)
    view.reach(1, B)
    link(view, B, 2)
    hear(view, [A, B], 15)
    assert not of(Disconnect, beat(view, 15)), "it is still wanted"
    view.let_go(16, B)
    say(view, B, Offer(ModelRef(bytes(32), 1, 0, 1)), 20)
    hear(view, [A, B], 28)
    assert not of(Disconnect, beat(view, 30))
    out = beat(view, 31)
    assert of(Disconnect, out) == [Disconnect(B, Reason.SURPLUS)]
    assert not of(Penalise, out)
    view.step(31, LinkDown(B, Reason.SURPLUS))
    assert states(view)[B] == "known", "which is nobody's failure"
    assert next(row for row in view.status() if row.peer == B).failures == 0


def test_a_link_that_another_dialled_for_a_moment_is_its_own_to_close() -> None:
    view = full(brief_s=10)
    out = link(view, B, 2, outbound=False, brief=True)
    assert not of(PeerUp, out)
    assert states(view)[B] == "brief"
    for now in range(5, 60, 5):
        hear(view, [A, B], now)
        assert not of(Disconnect, beat(view, now))
    assert of(Disconnect, say(view, B, Refuse(Reason.SURPLUS, "done"), 60)) == [Disconnect(B, Reason.SURPLUS)]
    assert not of(Emit, view.step(60, LinkDown(B, Reason.SURPLUS)))


def test_who_dialled_for_a_moment_and_stays_is_not_put_up_with_for_ever() -> None:
    view = full(brief_s=10)
    link(view, B, 0, outbound=False, brief=True)
    for now in range(5, 61, 5):
        hear(view, [A, B], now)
        assert not of(Disconnect, beat(view, now))
    hear(view, [A, B], 65)
    assert of(Disconnect, beat(view, 65)) == [Disconnect(B, Reason.SURPLUS)]


def test_links_of_a_moment_and_links_to_keep_are_counted_apart() -> None:
    view = make_view(**QUIET | {"max_degree": 2, "max_brief": 3})
    for number in range(2):
        assert of(PeerUp, link(view, f"kept{number}", outbound=False))
    for number in range(3):
        assert not of(Disconnect, link(view, f"brief{number}", outbound=False, brief=True))
    for peer, is_brief, detail in [
        ("kept2", False, "at most 2 links"),
        ("brief3", True, "at most 3 brief links"),
    ]:
        out = link(view, peer, outbound=False, brief=is_brief)
        assert of(Disconnect, out) == [Disconnect(PeerId(peer), Reason.FULL)]
        assert detail in sent(out)[-1].detail
    assert view.num_live() == 2


def test_a_brief_link_is_none_of_those_that_are_missing() -> None:
    view = full()
    view.reach(1, B)
    link(view, B, 2)
    assert dialled(view.step(3, LinkDown(A, Reason.LINK))) == [address(C)]


def test_simultaneous_dials_of_a_wanted_peer_end_in_one_link() -> None:
    """Ours comes up and loses to theirs: not lost, and reached on the link that stays."""
    view = full()
    view.reach(1, B)
    view.step(2, LinkUp(B, True, address(B)))
    assert not of(Unreachable, view.step(2, LinkDown(B, Reason.DUPLICATE)))
    out = link(view, B, 2, outbound=False)
    assert of(Reached, out) == [Reached(B)]
    assert of(PeerUp, out), "they want to keep it"


def test_let_go_answers_reach_one_for_one() -> None:
    view = full()
    view.reach(1, A)
    view.reach(1, A)
    view.let_go(2, A)
    assert of(Unreachable, view.step(3, LinkDown(A, Reason.LINK))) == [Unreachable(A, Reason.LINK)]
    view.let_go(4, A)
    with pytest.raises(AssertionError, match="let go more often"):
        view.let_go(5, A)


def test_a_node_that_stops_reaches_for_nobody() -> None:
    view = full()
    view.step(1, StopRequested())
    assert view.reach(1, B) == [Unreachable(B, Reason.UNREACHABLE)]


def test_what_a_discovery_service_heard_is_dialled_and_nothing_more() -> None:
    view = make_view(**QUIET)
    start(view)
    assert dialled(view.step(1, Discovered((address(ME), "nonsense", address(A))))) == [address(A)]
    static = make_view(static=True, bootstrap=(address(B),))
    start(static)
    assert dialled(static.step(1, Discovered((address(A),)))) == []


# --- what means nothing ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "event",
    [
        Received(PeerId("stranger"), Bye()),
        Received(PeerId("stranger"), hello()),
        Received(PeerId("stranger"), Refuse(Reason.FULL, "")),
        TimerFired(Timer("view", "redial", 99)),
        TimerFired(Timer("exchange", "beat", 0)),
        TimerFired(Timer("learning", "redial", 0)),
        Evaluated(1, {}),
        LinkDown(PeerId("stranger"), Reason.LINK),
    ],
    ids=repr,
)
def test_stale_and_foreign_events_leave_the_view_as_it_was(event: Event) -> None:
    view = make_view(bootstrap=(address(A),))
    start(view)
    link(view, A)
    before = picture(view)
    assert view.step(1, event) == []
    assert picture(view) == before


def test_status_tells_the_state_of_each_peer() -> None:
    view = make_view(target_degree=1, bootstrap=(address(C),))
    start(view)
    link(view, A)
    view.step(0, LinkUp(B, False, ""))
    assert {row.peer: row.state for row in view.status()} == {C: "dialling", A: "live", B: "greeting"}
    view.step(0, DialFailed(address(C), Reason.TIMEOUT, "no answer"))
    row = next(row for row in view.status() if row.peer == C)
    assert (row.state, row.failures, row.last_reason) == ("known", 1, "timeout: no answer")
    assert row.bootstrap


def test_a_node_that_stood_still_itself_takes_nobody_for_gone() -> None:
    view, helpers, _ = silent()
    beat(view, 16)
    out = beat(view, 300)
    assert not of(Disconnect, out)
    assert not probes(out)
    for now in (305, 310, 315, 320):
        hear(view, helpers, now)
        out = beat(view, now)
    assert of(Disconnect, [*out, *beat(view, 325)]) == [Disconnect(A, Reason.SILENT)], "and then counts anew"


def test_a_peer_that_greets_and_goes_is_waited_for_longer_each_time() -> None:
    view = make_view(bootstrap=(address(A),), redial_base_s=1, redial_max_s=30)
    start(view)
    now, dials = 0.0, 0
    view.step(now, LinkUp(A, True, address(A)))
    while now < 600:
        say(view, A, hello(A), now)
        out = view.step(now, LinkDown(A, Reason.LINK))
        timer = redial(out)
        assert timer is not None
        now += timer.after_s
        dials += len(dialled(view.step(now, TimerFired(timer.timer))))
        view.step(now, LinkUp(A, True, address(A)))
    assert dials < 60
