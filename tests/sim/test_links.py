"""What lies between two simulated nodes: latency, loss and worse, silence, partitions, and the end of a node."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.ports import NetworkEvent
from protocols.blob import num_chunks
from protocols.codec import encode
from protocols.errors import ConfigError, PeerError
from protocols.events import DialFailed, Fetched, FetchFailed, LinkDown, LinkUp, Received
from protocols.messages import (
    Bye,
    Decline,
    Heartbeat,
    LinkMessage,
    Offer,
    Peers,
    Ping,
    Pong,
    Refuse,
    Shuffle,
    Suspects,
    Suspicion,
)
from protocols.vocabulary import Digest, ModelRef, PeerId, PeerRecord, Reason
from sim.clock import VirtualClock
from sim.links import (
    DIAL_ROUND_TRIPS,
    FETCH_OVERHEAD_BYTES,
    TYPICAL_BYTES,
    LinkSettings,
    SimNetwork,
    SimPort,
    sim_address,
)
from sim.nat import Nat, NatClass, NatSettings
from tests.protocols.identities import hello_of

LATENCY = 0.125
A, B, C, D = PeerId("a"), PeerId("b"), PeerId("c"), PeerId("d")
HELLO = hello_of(A, sim_address(A), network="sim", task="digits")
RESET = "the connection was reset"


def ref_of(number: int, size: int = 1_000) -> ModelRef:
    return ModelRef(bytes([number]) * 32, size, 1, 1)


class Net:
    """A simulated network whose nodes note all they hear, and when."""

    def __init__(self, seed: int = 1, nat: Nat | None = None, **settings: Any) -> None:
        self.clock = VirtualClock()
        self.network = SimNetwork(
            self.clock, LinkSettings(**{"latency_s": LATENCY, **settings}), random.Random(seed), nat
        )
        self.heard: dict[PeerId, list[tuple[float, NetworkEvent]]] = {}
        self.ports: dict[PeerId, SimPort] = {}
        self.gate: Callable[[ModelRef], None] = lambda ref: None

    def join(self, *peers: PeerId) -> None:
        """Each begins with an empty memory, as after a crash."""
        for peer in peers:
            heard = self.heard[peer] = []
            self.ports[peer] = self.network.join(
                peer,
                lambda event, h=heard: h.append((self.clock.now(), event)),
                lambda ref, _: self.gate(ref),
            )

    def link(self, a: PeerId, b: PeerId) -> None:
        self.ports[a].dial(sim_address(b))
        self.run()
        self.heard[a].clear()
        self.heard[b].clear()

    def run(self, until: float = 1e9) -> None:
        while (due := self.clock.due_at()) is not None and due <= until:
            self.clock.step()

    def past(self, duration_s: float) -> None:
        """Run so long and no longer."""
        until = self.clock.now() + duration_s
        self.clock.at(until, lambda: None)
        self.run(until)

    def events(self, peer: PeerId) -> list[NetworkEvent]:
        return [event for _, event in self.heard[peer]]

    def serve(self, peer: PeerId, ref: ModelRef) -> None:
        self.ports[peer].endpoint.held[Digest(ref.digest)] = "model"


def linked(**settings: Any) -> Net:
    net = Net(**settings)
    net.join(A, B)
    net.link(A, B)
    return net


# --- latency --------------------------------------------------------------------------------------------
def test_a_dial_takes_its_round_trips_and_the_other_end_hears_one_way_later() -> None:
    net = Net()
    net.join(A, B)
    net.ports[A].dial(sim_address(B))
    net.run()
    up_at = DIAL_ROUND_TRIPS * 2 * LATENCY
    assert net.heard[A] == [(up_at, LinkUp(B, True, sim_address(B)))]
    assert net.heard[B] == [(up_at + LATENCY, LinkUp(A, False, ""))]


def test_a_message_takes_one_latency_and_is_counted_at_both_ends() -> None:
    net = linked()
    sent_at, size = net.clock.now(), len(encode(Heartbeat(1, True)))
    net.ports[A].send(B, Heartbeat(1, True))
    net.run()
    assert net.heard[B] == [(sent_at + LATENCY, Received(A, Heartbeat(1, True)))]
    sender, receiver = net.ports[A].endpoint, net.ports[B].endpoint
    assert (sender.messages_sent, sender.bytes_sent) == (1, size)
    assert receiver.bytes_received == size


@pytest.mark.parametrize("latency_s", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(5))
def test_jitter_spreads_the_latency_but_keeps_the_order(seed: int, latency_s: float) -> None:
    net = linked(seed=seed, latency_s=latency_s, jitter_s=0.1)
    rng, began = random.Random(seed), net.clock.now()
    for number in range(300):
        net.clock.after(
            60 * rng.random(),
            lambda n=number: net.ports[A].send(B, Heartbeat(round(net.clock.now() * 1e9), n > 0)),
        )
    net.run()
    arrived = [(at, event.message.round / 1e9) for at, event in net.heard[B] if isinstance(event, Received)]  # type: ignore[union-attr]
    assert len(arrived) == 300
    assert [sent for _, sent in arrived] == sorted(sent for _, sent in arrived)
    delays = [at - sent for at, sent in arrived]
    assert latency_s - 1e-6 <= min(delays) < max(delays) <= latency_s + 0.1 + 1e-6
    assert max(delays) - min(delays) > 0.05
    assert net.clock.now() > began


@pytest.mark.parametrize("seed", range(30))
def test_nothing_arrives_before_the_link_does(seed: int) -> None:
    """Without latency and with jitter, a first message could overtake the last step of the link's making."""
    net = Net(seed=seed, latency_s=0.0, jitter_s=0.1)
    net.join(A, B)
    up = net.heard[A]
    net.ports[A].dial(sim_address(B))
    while not up:
        assert net.clock.step()
    for number in range(3):
        net.ports[A].send(B, Heartbeat(number, True))
    net.run()
    assert net.events(B) == [LinkUp(A, False, ""), *(Received(A, Heartbeat(n, True)) for n in range(3))]


@pytest.mark.parametrize("seed", range(30))
def test_after_the_end_of_a_link_nothing_arrives_on_it(seed: int) -> None:
    net = linked(seed=seed, latency_s=0.0, jitter_s=0.1)
    for number in range(5):
        net.ports[B].send(A, Heartbeat(number, True))
    net.ports[A].disconnect(B, Reason.LEAVING)
    net.run()
    assert net.events(A)[0] == LinkDown(B, Reason.LEAVING)
    assert len(net.events(A)) == 1
    assert net.events(B) == [LinkDown(A, Reason.LINK)]


def test_a_message_sent_without_a_link_goes_nowhere() -> None:
    net = Net()
    net.join(A, B)
    net.ports[A].send(B, Bye())
    net.run()
    assert (net.heard[A], net.heard[B], net.ports[A].endpoint.bytes_sent) == ([], [], 0)


# --- bandwidth ------------------------------------------------------------------------------------------
def wire_size(ref: ModelRef) -> int:
    return ref.size_bytes + 32 * num_chunks(ref.size_bytes) + FETCH_OVERHEAD_BYTES


def test_a_fetch_takes_two_latencies_and_its_bytes_time() -> None:
    net = linked(up_bytes_per_s=1_000.0)
    ref, began = ref_of(1, 3_000_000), net.clock.now()
    net.serve(B, ref)
    net.ports[A].fetch(7, B, ref)
    net.run()
    ((at, event),) = net.heard[A]
    assert event == Fetched(7)
    assert at == pytest.approx(began + 2 * LATENCY + wire_size(ref) / 1_000)
    assert net.ports[B].endpoint.bytes_sent == net.ports[A].endpoint.bytes_received == wire_size(ref)
    assert Digest(ref.digest) in net.ports[A].endpoint.held, "and can serve it on"


def test_the_transfers_of_one_node_share_its_line() -> None:
    net = Net(up_bytes_per_s=1_000.0)
    net.join(A, B, C)
    for peer in (A, C):
        net.link(peer, B)
    refs = [ref_of(number) for number in range(3)]
    for ref in refs:
        net.serve(B, ref)
    began, each = net.clock.now(), wire_size(refs[0]) / 1_000
    net.ports[A].fetch(1, B, refs[0])
    net.ports[C].fetch(2, B, refs[1])
    net.ports[A].fetch(3, B, refs[2])
    net.run()
    ends = {event.token: at - began for peer in (A, C) for at, event in net.heard[peer]}  # type: ignore[union-attr]
    assert ends == pytest.approx(dict.fromkeys((1, 2, 3), 2 * LATENCY + 3 * each))


def test_the_transfers_of_two_nodes_do_not_wait_for_each_other() -> None:
    net = Net(up_bytes_per_s=1_000.0)
    net.join(A, B, C)
    for peer in (B, C):
        net.link(A, peer)
        net.serve(peer, ref_of(1))
    began = net.clock.now()
    net.ports[A].fetch(1, B, ref_of(1))
    net.ports[A].fetch(2, C, ref_of(1))
    net.run()
    each = 2 * LATENCY + wire_size(ref_of(1)) / 1_000
    assert [at - began for at, _ in net.heard[A]] == pytest.approx([each, each])


def test_an_idle_line_saves_nothing_up() -> None:
    net = linked(up_bytes_per_s=1_000.0)
    net.serve(B, ref_of(1))
    net.clock.after(1_000.0, lambda: net.ports[A].fetch(1, B, ref_of(1)))
    began = net.clock.now()
    net.run()
    assert net.heard[A][0][0] == pytest.approx(began + 1_000 + 2 * LATENCY + wire_size(ref_of(1)) / 1_000)


def test_a_fetch_of_what_is_not_held_is_answered_gone() -> None:
    net = linked()
    net.ports[A].fetch(1, B, ref_of(1))
    net.run()
    assert net.events(A) == [FetchFailed(1, Reason.GONE)]


def test_what_the_gate_refuses_is_not_held() -> None:
    net = linked()
    net.serve(B, ref_of(1))

    def refuse(ref: ModelRef) -> None:
        raise PeerError(Reason.NON_FINITE, "NaN")

    net.gate = refuse
    net.ports[A].fetch(1, B, ref_of(1))
    net.run()
    assert net.events(A) == [FetchFailed(1, Reason.NON_FINITE, "NaN")]
    assert net.ports[A].endpoint.held == {}


# --- loss -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [0.0, 0.1, 0.5])
def test_the_share_of_lost_messages_is_the_one_asked_for(loss: float) -> None:
    net = linked(loss=loss)
    for number in range(4_000):
        net.ports[A].send(B, Heartbeat(number, True))
    net.run()
    assert len(net.heard[B]) / 4_000 == pytest.approx(1 - loss, abs=0.03)
    assert net.ports[A].endpoint.messages_sent == 4_000, "what is lost was sent all the same"
    rounds = [event.message.round for event in net.events(B)]  # type: ignore[union-attr]
    assert rounds == sorted(rounds)


def test_the_loss_can_change_while_it_runs() -> None:
    net = linked()
    for loss in (1.0, 0.0):
        net.network.set_loss(loss)
        for number in range(10):
            net.ports[A].send(B, Heartbeat(number, loss == 0))
        net.run()
    assert net.events(B) == [Received(A, Heartbeat(number, True)) for number in range(10)]


def test_fetches_and_the_links_own_life_are_never_lost() -> None:
    net = linked(loss=0.99)
    net.serve(B, ref_of(1))
    net.ports[A].fetch(1, B, ref_of(1))
    net.run()
    net.ports[A].disconnect(B, Reason.LEAVING)
    net.run()
    assert net.events(A) == [Fetched(1), LinkDown(B, Reason.LEAVING)]
    assert net.events(B) == [LinkDown(A, Reason.LINK)]


# --- crashes --------------------------------------------------------------------------------------------
def test_a_crash_is_told_to_every_neighbour_one_latency_later() -> None:
    net = Net()
    net.join(A, B, C)
    net.link(A, B)
    net.link(C, B)
    crashed_at = net.clock.now()
    net.network.leave(B)
    net.run()
    for peer in (A, C):
        assert net.heard[peer] == [
            (crashed_at + LATENCY, LinkDown(B, Reason.LINK, "the connection was reset"))
        ]


def test_what_was_under_way_to_or_from_a_crashed_node_never_arrives() -> None:
    net = linked()
    net.ports[A].send(B, Bye())
    net.ports[B].send(A, Bye())
    net.network.leave(B)
    net.run()
    assert net.events(A) == [LinkDown(B, Reason.LINK, "the connection was reset")]
    assert net.heard[B] == []


def test_a_fetch_from_a_node_that_crashes_fails() -> None:
    for moment in (0.5 * LATENCY, 1.5 * LATENCY):  # before the request arrives, and while the answer travels
        net = linked()
        net.serve(B, ref_of(1))
        net.ports[A].fetch(1, B, ref_of(1))
        net.clock.after(moment, lambda n=net: n.network.leave(B))
        net.run()
        assert FetchFailed(1, Reason.LINK, "the peer is gone") in net.events(A)
        assert net.ports[A].endpoint.held == {}


def test_a_dial_to_a_crashed_node_is_refused() -> None:
    net = linked()
    net.network.leave(B)
    net.run()
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.events(A)[-1] == DialFailed(sim_address(B), Reason.UNREACHABLE, "connection refused")


@pytest.mark.parametrize("moment", [0.1, 0.6, 1.1, 1.6, 2.5, 4.0, 7.5, 8.5])
def test_a_node_that_is_back_hears_nothing_that_its_former_life_asked_for(moment: float) -> None:
    """Tokens begin anew after a restart: an old answer would be taken for a new one."""
    net = Net(up_bytes_per_s=1_000.0)
    net.join(A, B, C)
    net.link(A, B)
    net.serve(B, ref_of(1))
    net.ports[A].fetch(1, B, ref_of(1))
    net.ports[A].fetch(2, B, ref_of(2))
    net.ports[A].dial(sim_address(C))
    net.ports[A].dial("/memory/0/p2p/nobody")
    net.ports[B].send(A, Bye())

    def crash_and_restart() -> None:
        net.network.leave(A)
        net.join(A)

    net.clock.after(moment * LATENCY, crash_and_restart)
    net.run()
    assert net.heard[A] == []
    assert net.ports[A].endpoint.held == {}


def test_two_that_crash_and_return_at_once_hear_nothing_of_their_former_link() -> None:
    net = linked()
    net.network.leave(A)
    net.clock.after(0.25 * LATENCY, lambda: net.network.leave(B))
    net.clock.after(0.5 * LATENCY, lambda: net.join(A, B))
    net.run()
    assert (net.heard[A], net.heard[B]) == ([], [])


def test_a_node_that_is_back_can_be_dialled_again() -> None:
    net = linked()
    net.network.leave(B)
    net.run()
    net.join(B)
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.events(A)[-1] == LinkUp(B, True, sim_address(B))
    net.ports[A].send(B, Bye())
    net.run()
    assert net.events(B) == [LinkUp(A, False, ""), Received(A, Bye())]


def test_a_node_cannot_dial_itself_or_be_online_twice() -> None:
    net = Net()
    net.join(A)
    net.ports[A].dial(sim_address(A))
    net.run()
    assert [type(event) for event in net.events(A)] == [DialFailed]
    with pytest.raises(AssertionError, match="online once"):
        net.join(A)


def test_a_dial_that_meets_a_crash_at_its_last_moment_is_answered() -> None:
    net = Net()
    net.join(A, B)
    net.clock.after(DIAL_ROUND_TRIPS * 2 * LATENCY, net.network.leave, B)
    net.ports[A].dial(sim_address(B))
    net.run()
    assert [type(event) for event in net.events(A)] == [DialFailed]


@pytest.mark.parametrize("closes", [A, B])
def test_a_dial_that_finds_the_link_closing_fails(closes: PeerId) -> None:
    net = linked()
    net.ports[A].dial(sim_address(B))
    net.past((DIAL_ROUND_TRIPS * 2 - 0.5) * LATENCY)
    net.ports[closes].disconnect(B if closes == A else A, Reason.LEAVING)
    net.run()
    failure = DialFailed(sim_address(B), Reason.LINK, "the link before it is still closing")
    down = LinkDown(B, Reason.LEAVING if closes == A else Reason.LINK)
    assert net.events(A) == ([down, failure] if closes == A else [failure, down])


def test_a_receiver_that_crashes_leaves_the_line_to_others() -> None:
    net = Net(up_bytes_per_s=wire_size(ref_of(1)) / 10)
    net.join(A, B, C)
    for peer in (A, C):
        net.link(peer, B)
    net.serve(B, ref_of(1))
    admitted: list[ModelRef] = []
    net.gate = admitted.append
    for peer in (A, C):
        net.ports[peer].fetch(1, B, ref_of(1))
    net.clock.after(LATENCY + 10, net.network.leave, A)
    began = net.clock.now()
    net.run()
    assert net.heard[A] == []
    assert net.heard[C] == [(pytest.approx(began + 2 * LATENCY + 15), Fetched(1))]
    assert len(admitted) == 1
    assert net.network.model_bytes == pytest.approx(1.5 * wire_size(ref_of(1)), abs=1)


def test_a_request_that_finds_the_link_closed_sends_nothing() -> None:
    net = linked()
    net.serve(B, ref_of(1))
    net.ports[A].fetch(1, B, ref_of(1))
    net.ports[A].disconnect(B, Reason.LEAVING)
    net.run()
    assert net.events(A)[1:] == [FetchFailed(1, Reason.LINK, "the peer is gone")]
    assert net.network.model_bytes == 0


# --- doubled, late, damaged -----------------------------------------------------------------------------
def test_the_share_of_doubled_messages_is_the_one_asked_for() -> None:
    net = linked(duplication=0.25)
    for number in range(4_000):
        net.ports[A].send(B, Heartbeat(number, True))
    net.run()
    copies = Counter(event.message.round for event in net.events(B))  # type: ignore[union-attr]
    assert set(copies.values()) == {1, 2}
    assert len(copies) == 4_000
    assert copies.total() / 4_000 == pytest.approx(1.25, abs=0.03)
    assert net.network.messages == {"beat": 4_000}, "it was sent once"


def test_late_messages_are_overtaken_and_hold_nobody_back() -> None:
    net = linked(reordering=0.25, reorder_s=10.0)
    sent_at = net.clock.now()
    for number in range(4_000):
        net.ports[A].send(B, Heartbeat(number, True))
    net.run()
    delays = [at - sent_at for at, _ in net.heard[B]]
    in_time = [event.message.round for at, event in net.heard[B] if at == sent_at + LATENCY]  # type: ignore[union-attr]
    assert len(delays) == 4_000
    assert in_time == sorted(in_time)
    assert len(in_time) / 4_000 == pytest.approx(0.75, abs=0.03)
    assert 9 < max(delays) - LATENCY <= 10


@pytest.mark.parametrize("seed", range(20))
def test_nothing_overtakes_or_doubles_a_greeting(seed: int) -> None:
    net = linked(seed=seed, duplication=1.0, reordering=0.9, reorder_s=5.0, jitter_s=0.3)
    net.ports[A].send(B, HELLO)
    for number in range(5):
        net.ports[A].send(B, Heartbeat(number, True))
    net.run()
    assert net.events(B)[0] == Received(A, HELLO)
    assert len(net.events(B)) == 1 + 2 * 5
    assert net.events(B).count(Received(A, HELLO)) == 1


def test_a_greeting_can_be_lost() -> None:
    net = linked(loss=0.5)
    for _ in range(100):
        net.ports[A].send(B, HELLO)
    net.run()
    assert 30 < len(net.events(B)) < 70


def test_what_arrives_damaged_is_refused_and_not_held() -> None:
    net = linked(corruption=0.5)
    for number in range(200):
        net.serve(B, ref_of(number))
        net.ports[A].fetch(number, B, ref_of(number))
    net.run()
    failed = [event for event in net.events(A) if isinstance(event, FetchFailed)]
    assert {event.reason for event in failed} == {Reason.WRONG_HASH}
    assert len(failed) / 200 == pytest.approx(0.5, abs=0.12)
    assert len(net.ports[A].endpoint.held) == 200 - len(failed)


def trouble(seed: int, **settings: Any) -> list[int]:
    """Which of 300 messages are lost."""
    net = linked(seed=seed, loss=0.3, **settings)
    for number in range(300):
        net.ports[A].send(B, Heartbeat(number, True))
    net.run()
    arrived = {event.message.round for event in net.events(B)}  # type: ignore[union-attr]
    return [number for number in range(300) if number not in arrived]


def test_switching_one_trouble_on_leaves_the_draws_of_the_others_as_they_were() -> None:
    alone = trouble(5)
    assert alone != trouble(6)
    for more in ({"jitter_s": 0.1}, {"duplication": 0.5}, {"reordering": 0.5}, {"corruption": 0.5}):
        assert trouble(5, **more) == alone, more


# --- sizes ----------------------------------------------------------------------------------------------
MESSAGES: list[LinkMessage] = [
    HELLO,
    Refuse(Reason.TASK, "another task"),
    Heartbeat(0, False),
    Heartbeat(9_999, True),
    Shuffle(()),
    Ping(0),
    Pong(300, 9_999),
    Suspects((Suspicion("d", 3),)),
    Peers(()),
    Peers(tuple(PeerRecord(PeerId(f"node-{n}"), (sim_address(A), sim_address(B))) for n in range(16))),
    Offer(ModelRef(bytes(32), 20_000, 0, 1)),
    Offer(ModelRef(bytes(32), 50_000_000, 9_999, 50_000)),
    Decline(bytes(32), Reason.IDLE),
    Bye(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_sizes_are_estimated_within_a_few_bytes_and_exact_with_encode(message: LinkMessage) -> None:
    size = len(encode(message))
    for exact, tolerance in ((True, 0), (False, 6 if type(message) in TYPICAL_BYTES else 0)):
        net = linked(encode=exact)
        net.ports[A].send(B, message)
        net.run()
        assert net.events(B) == [Received(A, message)]
        sent = {net.network.control_bytes, net.ports[A].endpoint.bytes_sent}
        sent.add(net.ports[B].endpoint.bytes_received)
        (counted,) = sent
        assert abs(counted - size) <= tolerance


def test_encode_delivers_what_was_read_from_bytes_and_notices_what_cannot_be() -> None:
    net = linked(encode=True)
    sent = Heartbeat(1, True)
    net.ports[A].send(B, sent)
    net.run()
    assert net.heard[B][0][1].message is not sent  # type: ignore[union-attr]
    net.ports[A].send(B, Heartbeat(-1, True))
    with pytest.raises(PeerError, match="malformed"):
        net.run()


def test_messages_are_counted_by_their_tag() -> None:
    net = linked()
    for message in MESSAGES:
        net.ports[A].send(B, message)
    assert net.network.messages == {
        "hello": 1, "refuse": 1, "beat": 2, "shuffle": 1, "ping": 1, "pong": 1, "suspects": 1, "peers": 2,
        "offer": 2, "decline": 1, "bye": 1
    }  # fmt: skip


def test_models_are_counted_apart_from_messages() -> None:
    net = linked()
    net.serve(B, ref_of(1))
    net.ports[A].fetch(1, B, ref_of(1))
    net.run()
    assert (net.network.model_bytes, net.network.control_bytes) == (wire_size(ref_of(1)), 0)


# --- silence --------------------------------------------------------------------------------------------
def test_nothing_passes_to_or_from_a_silent_node_and_nobody_is_told() -> None:
    net = linked()
    net.ports[B].send(A, Heartbeat(1, True))
    net.network.silence(B)
    net.ports[A].send(B, Heartbeat(2, True))
    net.ports[B].send(A, Heartbeat(3, True))
    net.run()
    assert (net.heard[A], net.heard[B]) == ([], [])


def test_a_link_that_outlasts_a_silence_works_again() -> None:
    net = linked()
    net.network.silence(B)
    net.ports[A].send(B, Heartbeat(1, True))
    net.run()
    net.network.wake(B)
    net.run()
    net.ports[A].send(B, Heartbeat(2, True))
    net.ports[B].send(A, Heartbeat(3, True))
    net.run()
    assert net.events(A) == [Received(B, Heartbeat(3, True))]
    assert net.events(B) == [Received(A, Heartbeat(2, True))]


def test_a_silent_node_learns_when_it_wakes_of_a_link_that_was_closed_meanwhile() -> None:
    net = linked()
    net.network.silence(B)
    net.ports[A].disconnect(B, Reason.SILENT)
    net.run()
    assert net.events(A) == [LinkDown(B, Reason.SILENT)]
    assert net.heard[B] == []
    woken_at = net.clock.now()
    net.network.wake(B)
    net.run()
    assert net.heard[B] == [(woken_at, LinkDown(A, Reason.LINK, RESET))]
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.events(B)[-1] == LinkUp(A, False, "")


def test_a_dial_to_a_silent_node_times_out_and_can_be_repeated_once_it_is_awake() -> None:
    net = Net(dial_timeout_s=7.0)
    net.join(A, B)
    net.network.silence(B)
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.heard[A] == [(7.0, DialFailed(sim_address(B), Reason.TIMEOUT, "no answer within 7 s"))]
    net.network.wake(B)
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.events(A)[-1] == LinkUp(B, True, sim_address(B))


def test_a_dial_that_takes_longer_than_its_time_fails() -> None:
    net = Net(latency_s=2.0)
    net.join(A, B)
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.heard[A] == [(10.0, DialFailed(sim_address(B), Reason.TIMEOUT, "no answer within 10 s"))]
    assert net.heard[B] == []


def test_a_silent_machine_that_leaves_is_told_to_nobody_and_refuses_no_dial() -> None:
    net = linked()
    net.network.silence(B)
    net.network.leave(B)
    net.ports[A].send(B, Bye())
    net.ports[A].dial(sim_address(C))
    net.run()
    assert [type(event) for event in net.events(A)] == [DialFailed]  # of C, who never was
    net.ports[A].disconnect(B, Reason.SILENT)
    net.run()
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.events(A)[1:] == [
        LinkDown(B, Reason.SILENT),
        DialFailed(sim_address(B), Reason.TIMEOUT, "no answer within 10 s"),
    ]


def test_a_machine_that_was_back_refuses_dials_once_it_has_crashed() -> None:
    net = Net()
    net.join(A, B)
    net.network.silence(B)
    net.network.leave(B)
    net.join(B)
    net.network.leave(B)
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.events(A) == [DialFailed(sim_address(B), Reason.UNREACHABLE, "connection refused")]


def test_a_link_that_came_and_went_in_a_silence_is_never_told() -> None:
    net = Net()
    net.join(A, B)
    net.ports[A].dial(sim_address(B))
    net.past(DIAL_ROUND_TRIPS * 2 * LATENCY)
    net.network.silence(B)
    net.past(1.0)
    # Awake just before the word of the end arrives, and before B has looked at what it missed.
    net.clock.after(LATENCY, net.network.wake, B)
    net.ports[A].disconnect(B, Reason.LEAVING)
    net.run()
    assert net.heard[B] == []
    net.ports[B].dial(sim_address(A))
    net.run()
    assert net.events(B) == [LinkUp(A, True, sim_address(A))]


def test_a_machine_that_is_back_resets_the_links_of_its_former_life() -> None:
    net = linked()
    net.network.silence(B)
    net.network.leave(B)
    net.join(B)
    net.run()
    assert net.heard[A] == [], "nobody has asked it"
    asked_at = net.clock.now()
    net.ports[A].send(B, Heartbeat(1, True))
    net.run()
    assert net.heard[A] == [(asked_at + 2 * LATENCY, LinkDown(B, Reason.LINK, RESET))]
    assert net.heard[B] == []


def test_a_node_that_is_back_replaces_the_link_of_its_former_life_when_it_dials() -> None:
    net = linked()
    net.network.silence(B)
    net.network.leave(B)
    net.join(B)
    net.ports[B].dial(sim_address(A))
    net.run()
    assert net.events(A) == [LinkDown(B, Reason.DUPLICATE), LinkUp(B, False, "")]
    net.ports[A].send(B, Bye())
    net.run()
    assert net.events(B) == [LinkUp(A, True, sim_address(A)), Received(A, Bye())]


@pytest.mark.parametrize("moment", [0.5, 1.5, 5.0])
def test_a_fetch_from_a_node_gone_silent_times_out(moment: float) -> None:
    """While the request travels, while the bytes do, and once the last byte is under way."""
    net = linked(fetch_timeout_s=6.0, up_bytes_per_s=wire_size(ref_of(1)) / (3 * LATENCY))
    net.serve(B, ref_of(1))
    began = net.clock.now()
    net.clock.after(moment * LATENCY, net.network.silence, B)
    net.ports[A].fetch(1, B, ref_of(1))
    net.run()
    ((at, event),) = net.heard[A]
    assert event == FetchFailed(1, Reason.TIMEOUT, "no byte for 6 s")
    assert at == pytest.approx(began + 6.0 + {0.5: 0.0, 1.5: 1.5, 5.0: 5.0}[moment] * LATENCY)
    assert net.ports[A].endpoint.held == {}


@pytest.mark.parametrize("moment", [1.5, 4.5])
def test_a_fetch_goes_on_after_a_short_silence(moment: float) -> None:
    net = linked(up_bytes_per_s=wire_size(ref_of(1)) / (3 * LATENCY))
    net.serve(B, ref_of(1))
    began = net.clock.now()
    net.clock.after(moment * LATENCY, net.network.silence, B)
    net.clock.after(moment * LATENCY + 10, net.network.wake, B)
    net.ports[A].fetch(1, B, ref_of(1))
    net.run()
    ((at, event),) = net.heard[A]
    assert event == Fetched(1)
    late = began + 5 * LATENCY + 10
    assert at == pytest.approx(late if moment == 1.5 else late + 0.5 * LATENCY)
    assert net.network.model_bytes == wire_size(ref_of(1))


def test_the_timeout_of_a_silence_that_is_over_fails_nothing() -> None:
    net = linked(up_bytes_per_s=wire_size(ref_of(1)) / 40)
    net.serve(B, ref_of(1))
    for silence_at in (5.0, 25.0):
        net.clock.after(silence_at, net.network.silence, B)
        net.clock.after(silence_at + 10, net.network.wake, B)
    net.ports[A].fetch(1, B, ref_of(1))
    began = net.clock.now()
    net.run()
    assert net.heard[A] == [(pytest.approx(began + 2 * LATENCY + 60), Fetched(1))]


def test_a_silent_node_hears_of_its_own_timeouts_when_it_wakes() -> None:
    net = linked(up_bytes_per_s=1.0)
    net.serve(B, ref_of(1))
    net.ports[A].fetch(1, B, ref_of(1))
    net.ports[A].dial(sim_address(C))
    net.past(1.5 * LATENCY)
    net.network.silence(A)
    net.run()
    assert net.heard[A] == []
    net.network.wake(A)
    net.run()
    assert [(type(e), e.reason) for e in net.events(A)] == [  # type: ignore[union-attr]
        (DialFailed, Reason.TIMEOUT),
        (FetchFailed, Reason.TIMEOUT),
    ]


def test_a_fetch_whose_link_ends_fails_with_it() -> None:
    for closes, later in ((A, 0.0), (B, LATENCY)):
        net = linked(up_bytes_per_s=1.0)
        net.serve(B, ref_of(1))
        net.ports[A].fetch(1, B, ref_of(1))
        net.past(100.0)
        net.ports[closes].disconnect(B if closes == A else A, Reason.LEAVING)
        closed_at = net.clock.now()
        net.run()
        assert net.heard[A][-1] == (closed_at + later, FetchFailed(1, Reason.LINK, "the peer is gone"))
        assert len(net.heard[A]) == 2
        assert net.network.model_bytes == pytest.approx(100.0 - LATENCY + later, abs=1), "what was sent of it"


# --- partitions -----------------------------------------------------------------------------------------
def parted() -> Net:
    """A and B on one side, C alone, D in no group; all linked with A, and C with D."""
    net = Net()
    net.join(A, B, C, D)
    for a, b in ((A, B), (A, C), (A, D), (C, D)):
        net.link(a, b)
    for heard in net.heard.values():
        heard.clear()
    net.network.partition([[A, B], [C]])
    return net


def test_messages_across_a_partition_vanish_and_no_link_ends() -> None:
    net = parted()
    for a, b in ((A, B), (A, C), (A, D), (C, D), (D, A)):
        net.ports[a].send(b, Bye())
    net.run()
    assert net.heard.pop(B) == [(net.clock.now(), Received(A, Bye()))]
    assert list(net.heard.values()) == [[], [], []]
    net.network.heal()
    net.ports[A].send(C, Bye())
    net.run()
    assert net.events(C) == [Received(A, Bye())]


def test_what_is_under_way_when_the_partition_opens_vanishes() -> None:
    net = parted()
    net.network.heal()
    net.ports[A].send(C, Bye())
    net.network.partition([[A], [C]])
    net.run()
    assert net.heard[C] == []


def test_those_in_no_group_are_one_more() -> None:
    net = parted()
    net.join(PeerId("e"))
    net.ports[D].dial(sim_address(PeerId("e")))
    net.run()
    assert [type(event) for event in net.events(D)] == [LinkUp]


def test_dials_across_a_partition_time_out() -> None:
    net = parted()
    net.ports[B].dial(sim_address(C))
    net.run()
    assert net.events(B) == [DialFailed(sim_address(C), Reason.TIMEOUT, "no answer within 10 s")]


def test_a_transfer_across_a_partition_stalls_and_goes_on_if_it_heals_in_time() -> None:
    for length, event in ((10.0, Fetched(1)), (20.0, FetchFailed(1, Reason.TIMEOUT, "no byte for 15 s"))):
        net = linked(up_bytes_per_s=wire_size(ref_of(1)) / 5)
        net.serve(B, ref_of(1))
        net.ports[A].fetch(1, B, ref_of(1))
        net.clock.after(2.0, net.network.partition, [[A]])
        net.clock.after(2.0 + length, net.network.heal)
        net.run()
        assert net.events(A) == [event]


def test_after_a_partition_a_closed_link_is_found_out_by_the_next_message() -> None:
    net = linked()
    net.network.partition([[A], [B]])
    net.ports[A].disconnect(B, Reason.SILENT)
    net.run()
    assert (net.events(A), net.heard[B]) == ([LinkDown(B, Reason.SILENT)], [])
    net.network.heal()
    net.ports[B].send(A, Heartbeat(1, True))
    net.run()
    assert net.events(B) == [LinkDown(A, Reason.LINK, RESET)]
    assert len(net.events(A)) == 1


def test_after_a_partition_a_link_that_one_end_lost_is_replaced_by_a_dial() -> None:
    net = linked()
    net.network.partition([[A], [B]])
    net.ports[A].disconnect(B, Reason.SILENT)
    net.run()
    net.network.heal()
    net.ports[A].dial(sim_address(B))
    net.run()
    assert net.events(B) == [LinkDown(A, Reason.DUPLICATE), LinkUp(A, False, "")]
    assert net.network.num_links == 1


def test_a_crash_behind_a_partition_is_not_told_until_somebody_asks() -> None:
    net = linked()
    net.network.partition([[A], [B]])
    net.network.leave(B)
    net.run()
    assert net.heard[A] == []
    net.network.heal()
    net.ports[A].send(B, Bye())
    net.run()
    assert net.events(A) == [LinkDown(B, Reason.LINK, RESET)]


# --- slower, faster -------------------------------------------------------------------------------------
def test_latencies_scale_from_now_on_and_nothing_is_overtaken() -> None:
    net = linked()
    began = net.clock.now()
    net.ports[A].send(B, Heartbeat(99, True))
    for factor in (0.25, 4.0, 1.0, 0.5):
        net.network.scale_latency(factor)
        net.ports[A].send(B, Heartbeat(int(factor * 100), True))
    net.run()
    net.ports[A].send(B, Bye())
    net.run()
    rounds = [event.message.round for event in net.events(B)[:-1]]  # type: ignore[union-attr]
    assert rounds == [99, 25, 400, 100, 50]
    assert net.heard[B][0][0] == net.heard[B][1][0] == began + LATENCY
    assert net.heard[B][2][0] == began + 4 * LATENCY
    assert net.heard[B][-1][0] == began + 4 * LATENCY + 0.5 * LATENCY
    net.join(C)
    net.ports[A].dial(sim_address(C))
    dialled_at = net.clock.now()
    net.run()
    assert net.heard[A][-1][0] == dialled_at + DIAL_ROUND_TRIPS * LATENCY


def test_bandwidths_scale_for_what_runs_already() -> None:
    net = linked(up_bytes_per_s=wire_size(ref_of(1)) / 10)
    net.serve(B, ref_of(1))
    began = net.clock.now()
    net.ports[A].fetch(1, B, ref_of(1))
    net.clock.after(LATENCY + 5.0, net.network.scale_bandwidth, 0.25)
    net.run()
    assert net.heard[A][0][0] == pytest.approx(began + 2 * LATENCY + 5 + 20)


# --- NAT, and who is where ------------------------------------------------------------------------------
def test_a_dial_that_nat_blocks_fails_after_its_time_and_says_why() -> None:
    settings = NatSettings(
        classes=(NatClass("open", 0.5), NatClass("symmetric", 0.5)),
        reachable=(("open", "open"), ("symmetric", "open")),
    )
    net = Net(nat=Nat(settings, [A, B], random.Random(1)))
    net.join(A, B)
    hidden, public = (A, B) if net.network.nat_of(A) == "symmetric" else (B, A)
    assert (net.network.reaches(hidden, public), net.network.reaches(public, hidden)) == (True, False)
    net.ports[public].dial(sim_address(hidden))
    net.run()
    assert net.heard[public] == [
        (10.0, DialFailed(sim_address(hidden), Reason.UNREACHABLE, "blocked by NAT (open -> symmetric)"))
    ]
    net.ports[hidden].dial(sim_address(public))
    net.run()
    net.ports[public].send(hidden, Bye())
    net.run()
    assert net.events(hidden)[-1] == Received(public, Bye()), "a link works both ways"


def test_a_blocked_dial_is_not_answered_where_the_other_side_has_made_the_link() -> None:
    settings = NatSettings(classes=(NatClass("a", 0.5), NatClass("b", 0.5)), reachable=(("a", "b"),))
    net = Net(nat=Nat(settings, [A, B], random.Random(1)))
    net.join(A, B)
    for peer, other in ((A, B), (B, A)):
        net.ports[peer].dial(sim_address(other))
    net.run()
    assert [type(event) for peer in (A, B) for event in net.events(peer)] == [LinkUp, LinkUp]


def test_each_pair_has_its_latency(tmp_path: Path) -> None:
    path = tmp_path / "rtt.csv"
    path.write_text("0,400\n400,0\n")
    for drawn in ({"latency": "lognormal", "sigma": 1.0}, {"latency": "matrix", "matrix_path": str(path)}):
        net = Net(seed=3, **drawn)
        peers = [PeerId(f"node-{number}") for number in range(12)]
        net.join(*peers)
        delays = set()
        for peer in peers[1:]:
            net.link(peers[0], peer)
            for a, b in ((peers[0], peer), (peer, peers[0])):
                sent_at = net.clock.now()
                net.ports[a].send(b, Bye())
                net.run()
                delays.add(round(net.heard[b][-1][0] - sent_at, 9))
        assert len(delays) == (11 if drawn["latency"] == "lognormal" else 2)


def test_a_matrix_needs_a_file() -> None:
    with pytest.raises(ConfigError, match=r"^links\.matrix_path: "):
        Net(latency="matrix")


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency_s": -0.1}, {"loss": 1.0}, {"duplication": 1.1}, {"reordering": -1}, {"corruption": 2},
        {"up_bytes_per_s": 0}, {"down_bytes_per_s": -1}, {"dial_timeout_s": 0}, {"fetch_timeout_s": 0},
        {"latency": "drawn"}, {"sigma": -1}, {"bandwidth_bytes_per_s": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=next(iter(wrong))):
        msgspec.convert(wrong, LinkSettings)


def test_links_are_listed_while_both_ends_have_them() -> None:
    net = Net()
    net.join(A, B, C)
    net.ports[B].dial(sim_address(A))
    net.past(DIAL_ROUND_TRIPS * 2 * LATENCY)
    assert (net.network.links(), net.network.num_links) == ([], 0), "the other end has not heard of it yet"
    net.run()
    net.link(B, C)
    assert (net.network.links(), net.network.num_links) == ([(A, B), (B, C)], 2)
    net.ports[B].disconnect(C, Reason.LEAVING)
    assert (net.network.links(), net.network.num_links) == ([(A, B)], 1)
    net.network.leave(A)
    assert (net.network.links(), net.network.num_links) == ([], 0)


# --- everything at once ---------------------------------------------------------------------------------
class Life:
    """What one node has done and heard since it joined, and what it is owed."""

    def __init__(self) -> None:
        self.links: set[PeerId] = set()
        self.dials: Counter[str] = Counter()
        self.settled: Counter[str] = Counter()
        """Dials that a link has answered, and that may fail all the same once that link is down again."""
        self.fetches: set[int] = set()

    def hear(self, event: NetworkEvent) -> None:
        match event:
            case LinkUp(peer):
                assert peer not in self.links, "a link that stood came up"
                self.links.add(peer)
                self.settled[sim_address(peer)] += self.dials.pop(sim_address(peer), 0)
            case LinkDown(peer):
                assert peer in self.links, "the end of no link"
                self.links.remove(peer)
            case DialFailed(address):
                owed = self.dials if self.dials[address] else self.settled
                assert owed[address] > 0, "an answer to no dial"
                owed[address] -= 1
            case Fetched(token) | FetchFailed(token):
                self.fetches.remove(token)  # a KeyError is a second answer
            case Received(peer):
                assert peer in self.links, "a message without a link"


PEERS = (A, B, C)
COMMANDS = (
    "dial", "dial", "dial", "send", "fetch", "fetch", "disconnect", "crash", "join", "join", "silence", "wake",
    "part", "heal", "scale", "wait",
)  # fmt: skip
WAITS = (0.0, 0.01, LATENCY, 0.3, 1.0, 4.0, 20.0)
TROUBLES: list[dict[str, float]] = [
    {},
    {"jitter_s": 0.2},
    {"reordering": 0.3, "duplication": 0.3, "loss": 0.2, "corruption": 0.2},
]


class Storm:
    """Three nodes to whom anything may happen. A command that makes no sense for a node now does nothing."""

    def __init__(self, trouble: dict[str, float]) -> None:
        self.net = Net(**trouble, up_bytes_per_s=1_000.0)
        self.lives: dict[PeerId, Life] = {}
        self.silent: set[PeerId] = set()
        self.token = 0
        for peer in PEERS:
            self.join(peer)

    def do(self, command: str, peer: PeerId, other: PeerId, wait: float) -> None:
        network = self.net.network
        match command:
            case "part":
                network.partition([[peer]])
            case "heal":
                network.heal()
            case "scale":
                network.scale_latency(0.5 + wait)
                network.scale_bandwidth(0.5 + wait)
            case "crash" if peer in self.lives:
                network.leave(peer)
                del self.lives[peer]
                self.silent.discard(peer)
            case "join" if peer not in self.lives:
                self.join(peer)
            case "wake" if peer in self.silent:
                self.silent.remove(peer)
                network.wake(peer)
            case "silence" | "dial" | "send" | "fetch" | "disconnect":
                if peer in self.lives and peer not in self.silent:
                    self.act(command, peer, other)
        self.net.past(wait)
        assert network.num_links == len(network.links())

    def join(self, peer: PeerId) -> None:
        life = self.lives[peer] = Life()
        self.net.ports[peer] = self.net.network.join(peer, life.hear, lambda ref, value: None)
        self.net.serve(peer, ref_of(ord(peer)))

    def act(self, command: str, peer: PeerId, other: PeerId) -> None:
        """What a node does that is online and awake."""
        port, life = self.net.ports[peer], self.lives[peer]
        self.token += 1
        match command:
            case "silence":
                self.net.network.silence(peer)
                self.silent.add(peer)
            case "dial" if other not in life.links:
                life.dials[sim_address(other)] += 1
                port.dial(sim_address(other))
            case "send":
                port.send(other, Heartbeat(self.token, True))
            case "fetch":
                life.fetches.add(self.token)
                port.fetch(self.token, other, ref_of(ord(other) - self.token % 2))
            case "disconnect":
                port.disconnect(other, Reason.LEAVING)

    def clear_up(self) -> None:
        """End all that befalls the network, and let everything come to rest."""
        network = self.net.network
        network.heal()
        network.scale_latency(1.0)
        network.set_loss(0.0)
        for peer in sorted(self.silent):
            network.wake(peer)
        self.silent.clear()
        self.net.run()


@pytest.mark.parametrize("seeds", [range(first, first + 150) for first in range(0, 1500, 150)], ids=str)
def test_whatever_happens_the_promises_hold(seeds: range) -> None:
    for seed in seeds:
        try:
            ride_out(seed)
        except Exception as error:
            raise AssertionError(f"ride_out({seed})") from error


def ride_out(seed: int) -> None:
    """One storm, and what must hold after it."""
    rng = random.Random(seed)
    storm = Storm(rng.choice(TROUBLES))
    net, lives = storm.net, storm.lives
    for _ in range(rng.choice((20, 60, 150))):
        storm.do(rng.choice(COMMANDS), rng.choice(PEERS), rng.choice(PEERS), rng.choice(WAITS))
    storm.clear_up()
    for peer, life in lives.items():
        assert life.fetches == set(), f"{peer} has fetches without an answer"
        endpoint = net.ports[peer].endpoint
        assert {**endpoint.fetching, **endpoint.serving} == {}, "what is over is forgotten"
        assert +life.dials == Counter(), f"{peer} has dials without an answer"

    # Once every machine is there again, a heartbeat on every link finds out those of which one end is gone.
    for peer in PEERS:
        if peer not in lives:
            storm.join(peer)
    for peer, life in lives.items():
        for other in sorted(life.links):
            net.ports[peer].send(other, Heartbeat(0, True))
    net.run()
    assert all(peer in lives[other].links for peer, life in lives.items() for other in life.links)
    assert net.network.num_links == sum(len(life.links) for life in lives.values()) / 2

    # And everybody can be dialled.
    for peer in PEERS:
        for other in PEERS:
            if peer < other:
                storm.act("dial", peer, other)
    net.run()
    assert all(life.links == lives.keys() - {peer} for peer, life in lives.items())
