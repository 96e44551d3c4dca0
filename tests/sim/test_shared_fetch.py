"""A simulated fetch from several sources: each brings its part, and the others make up for one that fails."""

import random
from typing import Any

import pytest

from node.ports import NetworkEvent
from protocols.blob import num_chunks
from protocols.events import Fetched, FetchFailed, LinkUp, Rejected
from protocols.vocabulary import DIGEST_BYTES, Digest, ModelRef, PeerId, Reason
from sim.clock import VirtualClock
from sim.links import FETCH_OVERHEAD_BYTES, LinkSettings, SimNetwork, SimPort, sim_address

LATENCY = 0.125
ME = PeerId("me")
SOURCES = tuple(PeerId(f"source{number}") for number in range(3))
A, B, C = SOURCES
SIZE = 3_000_000
REF = ModelRef(bytes(range(32)), SIZE, 1, 1)
OVERHEAD = num_chunks(SIZE) * DIGEST_BYTES + FETCH_OVERHEAD_BYTES
UP = 100_000.0


class Net:
    """A node that is linked to three sources of one model."""

    def __init__(self, seed: int = 1, **settings: Any) -> None:
        self.clock = VirtualClock()
        options = {"latency_s": LATENCY, "up_bytes_per_s": UP, "down_bytes_per_s": 1e9, **settings}
        self.network = SimNetwork(self.clock, LinkSettings(**options), random.Random(seed))
        self.heard: list[tuple[float, NetworkEvent]] = []
        self.ports: dict[PeerId, SimPort] = {}
        self.join(ME)
        for peer in SOURCES:
            self.join(peer)
            self.ports[peer].endpoint.held[Digest(REF.digest)] = "model"
            self.ports[ME].dial(sim_address(peer))
        self.past(10)
        assert len(self.of(LinkUp)) == 3
        self.heard.clear()
        self.began_s = self.clock.now()

    def join(self, peer: PeerId) -> None:
        def hear(event: NetworkEvent) -> None:
            if peer == ME:
                self.heard.append((self.clock.now(), event))

        self.ports[peer] = self.network.join(peer, hear, lambda ref, value: None)

    def of(self, *kinds: type) -> list[Any]:
        return [event for _, event in self.heard if isinstance(event, kinds)]

    def past(self, duration_s: float) -> None:
        until = self.clock.now() + duration_s
        self.clock.at(until, lambda: None)
        while (due := self.clock.due_at()) is not None and due <= until:
            self.clock.step()

    def fetch(self, *sources: PeerId) -> None:
        self.ports[ME].fetch(7, sources[0], REF, sources[1:])

    def answer(self) -> tuple[float, NetworkEvent]:
        """The seconds it took and what came of it."""
        self.past(1_000)
        ((at_s, event),) = [item for item in self.heard if isinstance(item[1], Fetched | FetchFailed)]
        return at_s - self.began_s, event

    def sent(self) -> dict[PeerId, int]:
        return {peer: self.ports[peer].endpoint.bytes_sent for peer in SOURCES}


def test_equal_parts_come_from_all_at_once() -> None:
    net = Net()
    net.fetch(*SOURCES)
    took_s, event = net.answer()
    assert event == Fetched(7)
    assert took_s == pytest.approx(2 * LATENCY + (SIZE / 3 + OVERHEAD) / UP)
    assert net.sent() == dict.fromkeys(SOURCES, SIZE // 3 + OVERHEAD)
    assert net.network.model_bytes == SIZE + 3 * OVERHEAD
    assert net.ports[ME].endpoint.held[Digest(REF.digest)] == "model"
    assert net.ports[ME].endpoint.bytes_received == SIZE + 3 * OVERHEAD


def test_one_source_is_as_without_others() -> None:
    times = []
    for others in ((), (A,), (PeerId("stranger"),)):
        net = Net()
        net.ports[ME].fetch(7, A, REF, others)
        times.append(net.answer())
    assert times == [times[0]] * 3


def test_a_source_that_crashes_has_its_rest_taken_by_the_others() -> None:
    net = Net()
    net.fetch(*SOURCES)
    net.past(5)
    net.network.leave(B)
    took_s, event = net.answer()
    assert event == Fetched(7)
    alone_s, together_s = SIZE / UP, SIZE / 3 / UP
    assert together_s < took_s < 0.6 * alone_s
    assert sum(net.sent().values()) < SIZE + 6 * OVERHEAD, "what had come was not sent again"
    assert not net.of(Rejected)


def test_a_source_that_falls_silent_is_made_up_for_after_its_time() -> None:
    net = Net(fetch_timeout_s=4.0)
    net.fetch(*SOURCES)
    net.past(5)
    net.network.silence(A)
    took_s, event = net.answer()
    assert event == Fetched(7)
    assert took_s == pytest.approx(10 + 0.5 * (10 - 5), abs=1.0)


def test_a_source_that_does_not_hold_it_costs_a_round_trip() -> None:
    net = Net()
    net.ports[B].endpoint.held.clear()
    net.fetch(*SOURCES)
    took_s, event = net.answer()
    assert event == Fetched(7)
    assert took_s == pytest.approx(SIZE / 2 / UP, abs=1.0)
    assert net.sent()[B] == 0


def test_it_fails_when_the_last_source_has_failed() -> None:
    net = Net()
    net.fetch(*SOURCES)
    for peer in SOURCES:
        net.past(1)
        net.network.leave(peer)
    _, event = net.answer()
    assert isinstance(event, FetchFailed)
    assert event.reason is Reason.LINK
    assert not net.ports[ME].endpoint.fetching


def test_damaged_parts_name_their_source_and_are_fetched_elsewhere() -> None:
    """With half of the parts damaged, each fetch is answered once, and the first is named once: here or by the failure."""
    outcomes = set()
    for seed in range(40):
        net = Net(seed, corruption=0.5)
        net.fetch(*SOURCES)
        _, event = net.answer()
        named = [rejected.peer for rejected in net.of(Rejected)]
        assert len(set(named)) == len(named)
        assert all(rejected.reason is Reason.WRONG_HASH for rejected in net.of(Rejected))
        if isinstance(event, FetchFailed):
            assert (event.reason, set(named)) == (Reason.WRONG_HASH, {B, C})
        else:
            assert len(named) < 3
        assert net.heard[-1][1] is event, "whoever lied is named before"
        outcomes.add((type(event), len(named)))
    assert {(Fetched, 0), (Fetched, 1), (Fetched, 2), (FetchFailed, 2)} == outcomes


def test_a_node_that_leaves_amid_its_fetch_hears_nothing_of_it() -> None:
    net = Net()
    net.fetch(*SOURCES)
    net.past(5)
    net.network.leave(ME)
    net.past(1_000)
    assert net.heard == []
    assert not any(net.ports[peer].endpoint.serving for peer in SOURCES)


def test_equal_seeds_give_equal_runs() -> None:
    def run(seed: int) -> list[tuple[float, NetworkEvent]]:
        net = Net(seed, jitter_s=0.1, corruption=0.3)
        net.fetch(*SOURCES)
        net.past(3)
        net.network.leave(C)
        net.past(1_000)
        return net.heard

    assert run(5) == run(5)
    assert run(5) != run(6)
