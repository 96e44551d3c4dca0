"""Whom a node keeps company with: greeting, liveness, back-off, degree, peer exchange."""

import random
from collections.abc import Callable, Iterable

import pytest

from protocols.events import (
    Dial,
    DialFailed,
    Disconnect,
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
    Received,
    Rejected,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
)
from protocols.messages import AskPeers, Bye, Heartbeat, Hello, LinkMessage, Offer, Peers, Refuse
from protocols.view import NO_LEARNING, View, ViewSettings, mismatch
from protocols.vocabulary import (
    MAX_ADDRESSES,
    MAX_PEERS_PER_MESSAGE,
    PROTOCOL_VERSION,
    ModelRef,
    PeerId,
    PeerRecord,
    Reason,
)

ME = PeerId("me")
A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
Output = Effect | Notice


def address(peer: str, port: int = 1) -> str:
    return f"/ip4/10.0.0.1/tcp/{port}/p2p/{peer}"


def hello(
    peer: str = "", *, network="net", learning="gossip", task="digits", schema=bytes(32), version=1
) -> Hello:
    return Hello(version, network, learning, task, schema, (address(peer),) if peer else ())


def make_view(seed: int = 0, **settings: object) -> View:
    return View(ViewSettings(**settings), ME, hello(), random.Random(seed))


def start(view: View, now: float = 0.0, peers: Iterable[str] = ()) -> list[Output]:
    records = tuple(PeerRecord(peer, (address(peer),)) for peer in peers)
    return view.step(now, Started((address(ME),), records, None))


def say(view: View, peer: PeerId, message: LinkMessage, now: float = 0.0) -> list[Output]:
    return view.step(now, Received(peer, message))


def link(view: View, peer: str, now: float = 0.0) -> list[Output]:
    """A link that stands and is greeted; what the greeting brought."""
    view.step(now, LinkUp(PeerId(peer), True, address(peer)))
    return say(view, PeerId(peer), hello(peer), now)


def beat(view: View, now: float) -> list[Output]:
    return view.step(now, TimerFired(Timer("view", "beat", 0)))


def of(kind: type, out: Iterable[Output]) -> list:
    return [item for item in out if isinstance(item, kind)]


def sent(out: Iterable[Output], peer: str | None = None) -> list[LinkMessage]:
    return [item.message for item in of(Send, out) if peer in (None, item.peer)]


def dialled(out: Iterable[Output]) -> list[str]:
    return [item.address for item in of(Dial, out)]


def redial(out: Iterable[Output]) -> SetTimer | None:
    return next((item for item in of(SetTimer, out) if item.timer.name == "redial"), None)


def picture(view: View) -> object:
    """Everything a view holds, to see that nothing changed."""

    def inside(item: object) -> object:
        return [getattr(item, name) for name in item.__slots__]

    return (
        {peer: inside(known) for peer, known in view._known.items()},
        {peer: inside(link_) for peer, link_ in view._links.items()},
        (view._stopping, view._redial_token, view._redial_at, view._rng.getstate()),
    )


# --- greeting -------------------------------------------------------------------------------------------
def test_each_end_says_hello_as_soon_as_the_link_stands() -> None:
    view = make_view()
    start(view)
    (greeting,) = sent(view.step(0, LinkUp(A, False, "")), A)
    assert greeting == hello(ME)
    assert not view.is_live(A)
    assert view.num_live() == 0


def test_a_matching_hello_makes_a_neighbour() -> None:
    view = make_view()
    out = link(view, A)
    assert sent(out, A) == [AskPeers(), Heartbeat(0, True)]
    assert of(PeerUp, out) == [PeerUp(A, hello(A))]
    assert of(KeepPeer, out) == [KeepPeer(PeerRecord(A, (address(A),)))]
    assert of(Emit, out) == [Emit(LinkChanged(peer=A, up=True, reason="", num_live=1))]
    assert view.is_live(A)
    assert view.learns(A)
    assert view.live_learners() == [A]


MISMATCHES = [
    (hello(version=2), Reason.VERSION, "protocol version 2 met version 1"),
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


@pytest.mark.parametrize("message", [Heartbeat(0, True), AskPeers(), Peers(()), Bye()], ids=repr)
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
    for message in (AskPeers(), Heartbeat(0, True), Peers((PeerRecord(C, (address(C),)),)), hello(B), Bye()):
        assert say(view, B, message) == []
    assert picture(view) == before


def test_a_hello_teaches_only_the_sender_s_own_addresses() -> None:
    view = make_view()
    view.step(0, LinkUp(A, False, ""))
    say(view, A, Hello(1, "net", "gossip", "digits", bytes(32), (address(A, 7), address(B), "/ip4/1.1.1.1")))
    assert {row.peer: row.addresses for row in view.status()} == {A: (address(A, 7),)}


def test_a_machine_with_many_interfaces_tells_as_many_addresses_as_a_hello_holds() -> None:
    view = make_view()
    view.step(0, Started(tuple(address(ME, port) for port in range(20)), (), None))
    (greeting,) = sent(view.step(0, LinkUp(A, False, "")))
    assert greeting.addresses == tuple(address(ME, port) for port in range(MAX_ADDRESSES))


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
    assert view.step(1, StopRequested()) == [
        Send(A, Bye()),
        Disconnect(A, Reason.LEAVING),
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
    assert view.step(0, LinkUp(PeerId("inbound"), False, "")) == [Send(PeerId("inbound"), hello(ME))]
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
    assert dialled(say(view, A, Peers((PeerRecord(C, (address(C),)),)))) == []
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
    assert AskPeers() not in sent(link(view, A))
    before = picture(view)
    assert say(view, A, Peers((PeerRecord("D", (address("D"),)),))) == []
    assert picture(view) == before
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
def test_who_asks_is_told_live_neighbours_but_not_itself() -> None:
    view = make_view()
    for peer in (A, B, C):
        link(view, peer)
    view.step(0, LinkUp(PeerId("D"), False, ""))
    (answer,) = sent(say(view, A, AskPeers()), A)
    assert set(answer.records) == {PeerRecord(peer, (address(peer),)) for peer in (B, C)}


def test_an_answer_never_holds_more_peers_than_a_message_may() -> None:
    view = make_view(max_degree=40)
    for number in range(40):
        link(view, f"p{number}")
    (answer,) = sent(say(view, PeerId("p0"), AskPeers()))
    assert len({record.peer for record in answer.records}) == MAX_PEERS_PER_MESSAGE


def test_a_record_whose_address_names_another_peer_is_ignored() -> None:
    view = make_view()
    link(view, A)
    before = picture(view)
    out = say(view, A, Peers((PeerRecord(B, (address(C), "/ip4/1.1.1.1/tcp/1", address(ME))),)))
    assert dialled(out) == []
    assert picture(view) == before
    assert dialled(say(view, A, Peers((PeerRecord(B, (address(C), address(B))),)))) == [address(B)]


def test_nobody_learns_itself() -> None:
    view = make_view(bootstrap=(address(ME),))
    link(view, A)
    say(view, A, Peers((PeerRecord(ME, (address(ME),)),)))
    assert [row.peer for row in view.status()] == [A]


def test_hearsay_cannot_push_out_what_a_neighbour_said_of_itself() -> None:
    view = make_view()
    link(view, A)
    link(view, B)
    lies = PeerRecord(B, tuple(address(B, port) for port in range(100, 108)))
    say(view, A, Peers((lies,)))
    assert {row.peer: row.addresses for row in view.status()}[B] == (address(B),)


def test_hearsay_cannot_push_out_what_the_operator_said() -> None:
    view = make_view(bootstrap=(address(B, 4001),))
    start(view)
    link(view, A)
    say(view, A, Peers((PeerRecord(B, tuple(address(B, port) for port in range(100, 108))),)))
    addresses = {row.peer: row.addresses for row in view.status()}[B]
    assert address(B, 4001) in addresses
    assert len(addresses) <= MAX_ADDRESSES


def test_the_newest_address_comes_first_and_old_ones_fall_off() -> None:
    view = make_view()
    link(view, A)
    for port in range(10, 16):
        say(view, A, Peers((PeerRecord(B, (address(B, port),)),)))
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
        say(view, A, Peers((PeerRecord(f"p{number}", (address(f"p{number}"),)),)))
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
        say(view, A, Peers((PeerRecord(f"q{number}", (address(f"q{number}"),)),)))
    states = {row.addresses[0]: row.state for row in view.status() if row.state == "dialling"}
    assert sorted(states) == sorted(dialling)
    assert len(view.status()) <= 8


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
