"""What lies between two simulated nodes: latency, bandwidth, loss, and the end of a node."""

import random
from collections.abc import Callable

import pytest

from node.ports import NetworkEvent
from protocols.blob import num_chunks
from protocols.codec import encode
from protocols.errors import PeerError
from protocols.events import DialFailed, Fetched, FetchFailed, LinkDown, LinkUp, Received
from protocols.messages import Bye, Heartbeat
from protocols.vocabulary import Digest, ModelRef, PeerId, Reason
from sim.clock import VirtualClock
from sim.links import DIAL_ROUND_TRIPS, FETCH_OVERHEAD_BYTES, LinkSettings, SimNetwork, SimPort, sim_address

LATENCY = 0.125
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def ref_of(number: int, size: int = 1_000) -> ModelRef:
    return ModelRef(bytes([number]) * 32, size, 1, 1)


class Net:
    """A simulated network whose nodes note all they hear, and when."""

    def __init__(self, seed: int = 1, **settings: float) -> None:
        self.clock = VirtualClock()
        self.network = SimNetwork(
            self.clock, LinkSettings(**{"latency_s": LATENCY, **settings}), random.Random(seed)
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

    def events(self, peer: PeerId) -> list[NetworkEvent]:
        return [event for _, event in self.heard[peer]]

    def serve(self, peer: PeerId, ref: ModelRef) -> None:
        self.ports[peer].endpoint.held[Digest(ref.digest)] = "model"


def linked(**settings: float) -> Net:
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
            rng.random(),
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
    net = linked(bandwidth_bytes_per_s=1_000.0)
    ref, began = ref_of(1, 3_000_000), net.clock.now()
    net.serve(B, ref)
    net.ports[A].fetch(7, B, ref)
    net.run()
    ((at, event),) = net.heard[A]
    assert event == Fetched(7)
    assert at == pytest.approx(began + 2 * LATENCY + wire_size(ref) / 1_000)
    assert net.ports[B].endpoint.bytes_sent == net.ports[A].endpoint.bytes_received == wire_size(ref)
    assert Digest(ref.digest) in net.ports[A].endpoint.held, "and can serve it on"


def test_the_transfers_of_one_node_take_turns() -> None:
    net = Net(bandwidth_bytes_per_s=1_000.0)
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
    assert ends == pytest.approx(
        {1: 2 * LATENCY + each, 2: 2 * LATENCY + 2 * each, 3: 2 * LATENCY + 3 * each}
    )


def test_the_transfers_of_two_nodes_do_not_wait_for_each_other() -> None:
    net = Net(bandwidth_bytes_per_s=1_000.0)
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
    net = linked(bandwidth_bytes_per_s=1_000.0)
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
    net = Net(bandwidth_bytes_per_s=1_000.0)
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
