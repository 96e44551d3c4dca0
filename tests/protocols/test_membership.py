"""Whole networks of nodes that only keep company, over wires that delay and lose: crashes, leaves, islands, returns."""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from node.core import CoreSettings, NodeCore
from protocols.codec import encode, link_decoder
from protocols.events import (
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Event,
    LinkDown,
    LinkUp,
    Penalise,
    Received,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
)
from protocols.view import NO_LEARNING, ViewSettings
from protocols.vocabulary import PeerId, Reason, SchemaHash
from tests.protocols.identities import FakeSignatures

DELAY_S = 0.05
DIAL_TIMEOUT_S = 3.0
HEARTBEAT_S, DEAD_AFTER_S = 5.0, 20.0
Edge = tuple[PeerId, PeerId]


def address(peer: str) -> str:
    return f"/memory/{peer}/p2p/{peer}"


class Company:
    """Cores on a heap. One seed decides all; messages are delayed, and some of them lost."""

    def __init__(self, seed: int, *, loss: float = 0.0) -> None:
        self.seed, self.loss = seed, loss
        self.rng = random.Random(seed)
        self.now, self.pushed = 0.0, 0
        self.heap: list[tuple[float, int, PeerId, int, int, Event]] = []
        self.cores: dict[PeerId, NodeCore] = {}
        self.lives: Counter[PeerId] = Counter()
        self.links: dict[Edge, int] = {}
        """The ends that are up, with the number of the link: what was sent on one is not heard on the next."""
        self.parted: Callable[[PeerId, PeerId], bool] = lambda a, b: False
        self.cuts: list[tuple[float, PeerId, PeerId, Reason]] = []
        """When who ended its link with whom, and why."""
        self.dials: list[tuple[float, PeerId]] = []
        self.penalties: Counter[Reason] = Counter()
        self.num_sent = 0

    def __repr__(self) -> str:
        return f"seed {self.seed} at {self.now:.1f} s"

    # --- who is there -----------------------------------------------------------------------------------
    def start(self, *names: str, bootstrap: Iterable[str] = ("n0",)) -> None:
        for name in names:
            peer = PeerId(name)
            self.lives[peer] += 1
            settings = CoreSettings(
                network="net",
                task="none",
                schema=SchemaHash(bytes(32)),
                max_model_bytes=1,
                learning=NO_LEARNING,
                view=ViewSettings(
                    bootstrap=tuple(address(door) for door in bootstrap if door != name),
                    heartbeat_s=HEARTBEAT_S,
                    dead_after_s=DEAD_AFTER_S,
                ),
            )
            rng = random.Random(f"{self.seed} {peer} {self.lives[peer]}")
            self.cores[peer] = NodeCore(settings, peer, rng, FakeSignatures(peer))
            started = Started((address(peer),), (), None, unix_s=1_000 + self.now)
            self.push(self.rng.uniform(0, 2), peer, started)

    def crash(self, name: str) -> None:
        """Without a word: at the other ends its links stay up."""
        del self.cores[PeerId(name)]
        for end in [end for end in self.links if end[0] == name]:
            del self.links[end]

    def leave(self, name: str) -> None:
        self.handle(PeerId(name), StopRequested())
        self.crash(name)

    # --- what they do -----------------------------------------------------------------------------------
    def push(self, after_s: float, peer: PeerId, event: Event, link: int = 0) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (self.now + after_s, self.pushed, peer, self.lives[peer], link, event))

    def run(self, for_s: float, stop: Callable[[], bool] = lambda: False) -> float:
        """So long, or until `stop`, looked at once a second. How long it took."""
        began, until, look_at = self.now, self.now + for_s, self.now
        while self.heap and self.heap[0][0] <= until:
            if self.heap[0][0] >= look_at:
                self.now = max(self.now, look_at)
                look_at += 1
                if stop():
                    return self.now - began
            self.now, _, peer, life, link, event = heapq.heappop(self.heap)
            if peer in self.cores and self.lives[peer] == life:
                self.hear(peer, event, link)
        self.now = until
        return self.now - began

    def hear(self, peer: PeerId, event: Event, link: int) -> None:
        if link and self.links.get((peer, event.peer)) != link:  # type: ignore[union-attr]
            return
        if isinstance(event, LinkDown):
            del self.links[peer, event.peer]
        self.handle(peer, event)

    def handle(self, me: PeerId, event: Event) -> None:
        for effect in self.cores[me].step(self.now, event):
            self.perform(me, effect)

    def perform(self, me: PeerId, effect: Effect) -> None:
        match effect:
            case Dial(where):
                self.dial(me, where)
            case Disconnect(peer, reason) if (me, peer) in self.links:
                self.cuts.append((self.now, me, peer, reason))
                self.cut(me, peer, reason)
            case Send(peer, message) if (me, peer) in self.links:
                self.num_sent += 1
                if self.rng.random() >= self.loss and not self.parted(me, peer):
                    (read,) = link_decoder().feed(encode(message))
                    self.push(DELAY_S, peer, Received(me, read), self.links[me, peer])
            case SetTimer(timer, after_s):
                self.push(after_s, me, TimerFired(timer))
            case Penalise(_, reason, _):
                self.penalties[reason] += 1

    def cut(self, a: PeerId, b: PeerId, reason: Reason) -> None:
        """The other end hears what was said on the link, and then that it is down."""
        link = self.links[a, b]
        self.push(0, a, LinkDown(b, reason), link)
        if not self.parted(a, b):
            self.push(2 * DELAY_S, b, LinkDown(a, Reason.LINK), link)

    def dial(self, me: PeerId, where: str) -> None:
        peer = PeerId(where.rpartition("/")[2])
        self.dials.append((self.now, peer))
        if peer not in self.cores or self.parted(me, peer):
            self.push(DIAL_TIMEOUT_S, me, DialFailed(where, Reason.TIMEOUT))
        elif (me, peer) not in self.links:  # else they dialled each other
            self.connect(me, peer)

    def connect(self, me: PeerId, peer: PeerId) -> None:
        if (old := self.links.get((peer, me))) is not None:
            # Whoever dials has lost the link before.
            self.hear(peer, LinkDown(me, Reason.DUPLICATE), old)
        self.pushed += 1
        self.links[me, peer] = self.links[peer, me] = link = self.pushed
        self.push(DELAY_S, me, LinkUp(peer, True, address(peer)), link)
        self.push(DELAY_S, peer, LinkUp(me, False, ""), link)

    # --- what came of it --------------------------------------------------------------------------------
    def edges(self) -> set[frozenset[PeerId]]:
        return {
            frozenset((me, peer))
            for me, core in self.cores.items()
            for peer in core.view._links
            if core.view.is_neighbour(peer) and peer in self.cores
        }

    def is_connected(self, without: frozenset[PeerId] = frozenset()) -> bool:
        """Whether neighbours lead from each to each, also where the link between two of them goes."""
        near: dict[PeerId, set[PeerId]] = {peer: set() for peer in self.cores}
        for edge in self.edges() - {without}:
            a, b = edge
            near[a].add(b)
            near[b].add(a)
        reached, todo = set(), [next(iter(near))]
        while todo:
            peer = todo.pop()
            if peer not in reached:
                reached.add(peer)
                todo += near[peer]
        return len(reached) == len(near)

    def who_says(self, name: str, *states: str) -> set[PeerId]:
        return {
            me
            for me, core in self.cores.items()
            for row in core.view.status()
            if row.peer == name and row.state in states
        }

    def given_up(self, reason: Reason, since: float = 0.0) -> list[tuple[float, PeerId, PeerId]]:
        return [(at, me, peer) for at, me, peer, why in self.cuts if why is reason and at >= since]


def names(count: int, letter: str = "n") -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


def settled(seed: int, count: int, **options: float) -> Company:
    company = Company(seed, **options)
    company.start(*names(count))
    company.run(120)
    assert company.is_connected(), company
    return company


@pytest.mark.parametrize("seed", range(3))
def test_everybody_finds_a_place_and_nobody_is_crowded(seed: int) -> None:
    company = settled(seed, 60)
    degrees = {peer: core.view.num_live() for peer, core in company.cores.items()}
    assert min(degrees.values()) >= 6, company
    assert max(degrees.values()) <= 24, company
    assert not company.penalties.keys() - {Reason.FULL}, company
    known = [core.view.num_known() for core in company.cores.values()]
    assert min(known) > 20, f"{company}: views mix"


def test_a_seed_decides_everything() -> None:
    first, again, other = (settled(seed, 20, loss=0.05) for seed in (1, 1, 2))
    assert (first.edges(), first.num_sent) == (again.edges(), again.num_sent)
    assert first.edges() != other.edges()


def test_what_membership_costs_a_node_does_not_grow_with_the_network() -> None:
    """Messages a node and minute, beats included, within a fifth of each other."""
    costs = {}
    for count in (25, 100):
        company = settled(1, count)
        before = company.num_sent
        company.run(300)
        costs[count] = (company.num_sent - before) / count / 5
    assert max(costs.values()) < 1.2 * min(costs.values()), costs
    assert max(costs.values()) < 200, costs


# --- crashes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_a_crash_is_found_in_time_and_nobody_else_is_given_up_though_messages_are_lost(seed: int) -> None:
    """60 nodes, one message in twenty is lost, ten minutes."""
    company = settled(seed, 60, loss=0.05)
    gone = PeerId("n17")
    neighbours = company.who_says(gone, "live")
    crashed_at = company.now
    company.crash(gone)
    company.run(600)
    given_up = company.given_up(Reason.SILENT)
    assert {me for _, me, peer in given_up if peer == gone} >= neighbours, company
    latest = max(at for at, _, peer in given_up if peer == gone)
    assert latest - crashed_at <= DEAD_AFTER_S + HEARTBEAT_S + 2 * DELAY_S, company
    false = [(at, me, peer) for at, me, peer in given_up if peer != gone]
    assert not false, f"{company}: given up though they are there"
    assert len(company.who_says(gone, "suspected")) >= 20, f"{company}: word of it goes round"
    assert not company.who_says(gone, "known", "live"), company
    for peer in company.cores:
        assert not company.who_says(peer, "suspected"), f"{company}: {peer} is there"
    assert company.is_connected(), company


@pytest.mark.parametrize("seed", range(3))
def test_two_thirds_crash_at_once_and_the_rest_close_ranks(seed: int) -> None:
    company = settled(seed, 60)
    dead = company.rng.sample(names(60)[1:], 40)
    for name in dead:
        company.crash(name)

    def closed() -> bool:
        degrees = [core.view.num_live() for core in company.cores.values()]
        return (
            company.is_connected()
            and min(degrees) >= 6
            and not any(company.who_says(d, "live") for d in dead)
        )

    assert company.run(300, closed) <= 60, company


@pytest.mark.parametrize("seed", range(3))
def test_who_crashed_and_comes_back_is_believed_everywhere(seed: int) -> None:
    company = settled(seed, 40)
    company.crash("n7")
    company.run(120)
    assert len(company.who_says("n7", "suspected")) >= 20, company
    company.start("n7")
    took = company.run(300, lambda: not company.who_says("n7", "suspected"))
    assert took <= 60, company
    assert company.cores[PeerId("n7")].view.num_live() >= 6, company
    assert len(company.who_says("n7", "live")) >= 6, company


# --- leaving --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_word_of_a_leave_goes_round_and_nobody_dials_who_has_left(seed: int) -> None:
    company = settled(seed, 60)
    knew = company.who_says("n17", "live", "known", "brief") - {PeerId("n17")}
    assert len(knew) >= 20, company
    company.leave("n17")
    took = company.run(60, lambda: company.who_says("n17", "left") >= knew)
    assert took <= 3 * HEARTBEAT_S, company
    left_at = company.now
    company.run(600)
    assert [at for at, peer in company.dials if peer == "n17" and at > left_at] == [], company
    assert not company.who_says("n17", "live", "known", "suspected"), company


@pytest.mark.parametrize("seed", range(3))
def test_who_left_and_comes_back_is_a_member_as_before(seed: int) -> None:
    company = settled(seed, 40)
    company.leave("n7")
    company.run(60)
    company.start("n7")
    company.run(120)
    assert company.cores[PeerId("n7")].view.num_live() >= 6, company
    assert company.is_connected(), company
    took = company.run(600, lambda: len(company.who_says("n7", "live", "known")) >= 20)
    assert took < 600, company


# --- islands --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_two_islands_grow_together_once_one_link_exists(seed: int) -> None:
    """30 nodes each, with bootstrap peers of their own: within 150 s the one link is not needed any more."""
    company = Company(seed)
    company.start(*names(30, "a"), bootstrap=("a0",))
    company.start(*names(30, "b"), bootstrap=("b0",))
    company.run(120)
    assert not company.is_connected()
    first = frozenset((PeerId("a5"), PeerId("b7")))
    company.connect(*sorted(first))
    took = company.run(600, lambda: company.is_connected(without=first))
    assert took <= 150, company
    company.run(300)
    across = [edge for edge in company.edges() if len({peer[0] for peer in edge}) == 2]
    assert len(across) >= 20, f"{company}: {len(across)} links across, and once they met they mix"


@pytest.mark.parametrize("seed", range(3))
def test_halves_that_were_parted_find_together_again_by_themselves(seed: int) -> None:
    """Apart for five minutes, long enough that each takes the other for dead."""
    company = settled(seed, 40)
    half = set(names(20))
    company.parted = lambda a, b: (a in half) != (b in half)
    company.run(300)
    assert not [edge for edge in company.edges() if len(edge & half) == 1], company
    company.parted = lambda a, b: False
    assert company.run(300, company.is_connected) <= 60, company
    took = company.run(900, lambda: not any(company.who_says(peer, "suspected") for peer in company.cores))
    assert took <= 600, f"{company}: all are denied in the end"


@pytest.mark.parametrize("seed", range(3))
def test_a_bootstrap_peer_is_cut_off_and_comes_back(seed: int) -> None:
    company = settled(seed, 40)
    door = PeerId("n0")
    company.parted = lambda a, b: (a == door) != (b == door)
    company.run(300)
    assert company.cores[door].view.num_live() == 0, company
    alone = company.cores.pop(door)
    assert company.is_connected(), f"{company}: nobody needs it any more"
    company.cores[door] = alone
    company.parted = lambda a, b: False
    assert company.run(300, lambda: alone.view.num_live() >= 6) <= 60, company
    assert company.is_connected(), company


@pytest.mark.parametrize("seed", range(3))
def test_a_bootstrap_peer_that_has_forgotten_everything_is_found_by_the_others(seed: int) -> None:
    company = settled(seed, 40)
    company.crash("n0")
    company.run(300)
    company.start("n0", bootstrap=())
    assert company.run(300, company.is_connected) <= 60, company
    took = company.run(300, lambda: not company.who_says("n0", "suspected"))
    assert took <= 120, company
