"""Every rule is broken once and names itself; honest cores break none, whatever befalls them."""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from node.core import CoreSettings, NodeCore
from protocols.address_book import Entry
from protocols.events import (
    Aggregate,
    Aggregated,
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FinalMergeDone,
    Forget,
    Halt,
    Input,
    Keep,
    LearningDone,
    LinkDown,
    LinkUp,
    Phase,
    Received,
    RoundDone,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
    Train,
    Trained,
    WorkFailed,
)
from protocols.exchange import ExchangeSettings
from protocols.gossip import GossipSettings
from protocols.messages import Heartbeat, Hello, Offer, Peers
from protocols.view import ViewSettings
from protocols.vocabulary import ModelRef, PeerId, Reason, SchemaHash
from sim import checkers as module
from sim.checkers import RULES, Checkers, Limits, Liveness, Violation, brief
from sim.signing import SimSignatures
from tests.protocols.identities import hello_of

NODES = 4


def name(index: int) -> PeerId:
    return PeerId(f"n{index}")


def address(peer: str) -> str:
    return f"/memory/0/p2p/{peer}"


def unknown(number: int = 1, round_: int = 0) -> ModelRef:
    """A model that nobody has."""
    return ModelRef(number.to_bytes(32, "big"), 100, round_, 10)


class Node:
    def __init__(self, index: int) -> None:
        self.index = index
        self.peer = name(index)
        self.core: NodeCore | None = None
        self.epoch = 0
        self.num_models = 0
        self.kept: ModelRef | None = None
        self.held: set[bytes] = set()

    @property
    def online(self) -> bool:
        return self.core is not None


class Arena:
    """Nodes on a heap. Fetches and work may fail, links break and nodes crash, all drawn from the seed.

    spoil: changes an event on its way to a node: for a world that breaks its own promises.
    """

    def __init__(
        self,
        seed: int = 0,
        make: Callable[..., NodeCore] = NodeCore,
        *,
        trouble: float = 0.0,
        spoil: Callable[[Event], list[Event]] = lambda event: [event],
        stride: int = 1,
        limits: Limits | None = None,
        **gossip: Any,
    ) -> None:
        self.rng = random.Random(seed)
        self.make, self.trouble, self.spoil = make, trouble, spoil
        self.settings = CoreSettings(
            network="net",
            task="task",
            schema=SchemaHash(bytes(32)),
            max_model_bytes=1_000,
            view=ViewSettings(bootstrap=(address(name(0)),), target_degree=3),
            exchange=ExchangeSettings(max_parallel_fetches=2, max_waiting=2, max_attempts=2),
            gossip=GossipSettings(**{"rounds": 12, "pause_s": 0.2, "deadline_s": 3.0, **gossip}),
        )
        self.checkers = Checkers(limits, encode=True, stride=stride)
        self.clock = self
        self.time = 0.0
        self.pushed = 0
        self.heap: list[tuple[float, int, Node, int, int, Event]] = []
        self.links: dict[tuple[PeerId, PeerId], int] = {}
        """Each with a number of its own: what was sent on one is not heard on the next."""
        self.nodes = [Node(index) for index in range(NODES)]
        self.of = {node.peer: node for node in self.nodes}
        for node in self.nodes:
            self.start(node)

    def now(self) -> float:
        return self.time

    def later(self, after_s: float, node: Node, event: Event, link: int = 0) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (self.time + after_s, self.pushed, node, node.epoch, link, event))

    def ref(self, node: Node, round_: int) -> ModelRef:
        node.num_models += 1
        return unknown(node.index << 64 | node.num_models, round_)

    def start(self, node: Node) -> None:
        node.epoch += 1
        node.core = self.make(
            self.settings, node.peer, random.Random(f"{node.peer} {node.epoch}"), SimSignatures(node.peer)
        )
        self.checkers.started(node.index, node.core, self.time, node.epoch)
        ref = node.kept = node.kept or self.ref(node, 0)
        node.held = {ref.digest}
        self.handle(node, Started((address(node.peer),), (), ref, unix_s=self.time + node.epoch))

    def crash(self, node: Node, *, wiped: bool = False) -> None:
        for a, b in sorted(self.links):
            if a == node.peer:
                self.cut(a, b, Reason.LINK)
        node.epoch += 1  # and so it hears none of it
        node.core = None
        self.checkers.gone(node.index, wiped)
        if wiped:
            node.kept = None

    def cut(self, a: PeerId, b: PeerId, reason: Reason) -> None:
        if (a, b) in self.links:
            del self.links[a, b], self.links[b, a]
            self.later(0.0, self.of[a], LinkDown(b, reason))
            self.later(0.0, self.of[b], LinkDown(a, Reason.LINK))

    def run(self, until_s: float = 120.0) -> "Arena":
        while self.heap and self.heap[0][0] <= until_s:
            self.time, _, node, epoch, link, event = heapq.heappop(self.heap)
            if self.rng.random() < self.trouble / 10:
                self.befall()
            if node.epoch == epoch and (not link or link in self.links.values()):
                for spoilt in self.spoil(event):
                    self.handle(node, spoilt)
        self.checkers.finish(self.time)
        return self

    def befall(self) -> None:
        node = self.rng.choice(self.nodes)
        if node.core is None:
            self.start(node)
        elif self.rng.random() < 0.2:
            self.crash(node, wiped=self.rng.random() < 0.3)
        elif self.links:
            self.cut(*self.rng.choice(sorted(self.links)), Reason.LINK)

    def handle(self, node: Node, event: Event) -> None:
        if isinstance(event, Trained | Aggregated):
            node.held.add(event.ref.digest)
        assert node.core is not None
        effects = node.core.step(self.time, event)
        self.checkers.after(node.index, self.time, event, effects)
        for effect in effects:
            self.perform(node, effect)

    def fails(self) -> bool:
        return self.rng.random() < self.trouble

    def perform(self, node: Node, effect: Effect) -> None:
        me = node.peer
        match effect:
            case Dial(where):
                self.dial(node, where)
            case Disconnect(peer, reason):
                self.cut(me, peer, reason)
            case Send(peer, message) if (me, peer) in self.links:
                self.later(0.01, self.of[peer], Received(me, message), self.links[me, peer])
            case SetTimer(timer, after_s):
                self.later(after_s, node, TimerFired(timer))
            case Fetch():
                self.fetch(node, effect)
            case Train() | Aggregate() | Evaluate():
                self.work(node, effect)
            case Keep(ref):
                node.kept = ref
            case Forget(ref):
                node.held.discard(ref.digest)
            case Halt():
                self.crash(node)

    def dial(self, node: Node, where: str) -> None:
        me, peer = node.peer, PeerId(where.rpartition("/")[2])
        if (me, peer) in self.links:
            return
        if not self.of[peer].online or self.fails():
            self.later(0.1, node, DialFailed(where, Reason.UNREACHABLE))
            return
        self.links[me, peer] = self.links[peer, me] = self.pushed + 1
        self.later(0.0, node, LinkUp(peer, True, where))
        self.later(0.0, self.of[peer], LinkUp(me, False, ""))

    def fetch(self, node: Node, fetch: Fetch) -> None:
        reason = Reason.WRONG_HASH if self.rng.random() < 0.2 else Reason.TIMEOUT
        if self.fails() or (node.peer, fetch.peer) not in self.links:
            self.later(0.3, node, FetchFailed(fetch.token, reason))
        elif fetch.ref.digest not in self.of[fetch.peer].held:
            self.later(0.1, node, FetchFailed(fetch.token, Reason.GONE))
        else:
            node.held.add(fetch.ref.digest)
            self.later(self.rng.uniform(0.05, 1.0), node, Fetched(fetch.token))

    def work(self, node: Node, order: Train | Aggregate | Evaluate) -> None:
        answer: Event
        if self.fails():
            answer = WorkFailed(order.token, "boom")
        elif isinstance(order, Train):
            answer = Trained(order.token, self.ref(node, order.round))
        elif isinstance(order, Aggregate):
            answer = Aggregated(order.token, self.ref(node, order.own.round))
        else:
            answer = Evaluated(order.token, {})
        self.later(self.rng.uniform(0.2, 0.6), node, answer)


# --- honest cores ---------------------------------------------------------------------------------------
GOSSIP = [
    {"quorum": 1.0, "rounds": 40, "pause_s": 0.0},
    {"quorum": 0.0, "fanout": 1, "evaluate_every": 3},
    {"quorum": 0.5, "keep_every": 3, "pause_s": 1.0, "wait_for_peers": 2},
    {"quorum": 1.0, "exchange_every": 3, "dense_from": 0.5, "sparse_fanout": 0.5},
    {"window_s": 2.0, "fanout": 0.7, "pause_s": 0.0},
    {
        "quorum": 0.0,
        "fanout": 0.2,
        "final_merge": "butterfly",
        "final_deadline_s": 4.0,
        "final_keep": "better",
    },
    {"quorum": 1.0, "dense_until": 0.5, "final_merge": "aggregator", "final_deadline_s": 4.0},
]


@pytest.mark.parametrize("gossip", GOSSIP)
def test_honest_cores_in_fair_weather_break_no_rule_and_finish(gossip: dict[str, Any]) -> None:
    arena = Arena(seed=1, **gossip).run()
    assert arena.checkers.num_events > 500
    assert all(node.core is not None and node.core.phase is Phase.DONE for node in arena.nodes)
    Liveness(stops_at_s=0.0, round_s=20.0, links_s=60.0).check(arena, arena.checkers)


@pytest.mark.parametrize("gossip", GOSSIP)
@pytest.mark.parametrize("trouble", [0.03, 0.15, 0.5])
def test_honest_cores_in_trouble_break_no_rule(gossip: dict[str, Any], trouble: float) -> None:
    arenas = [Arena(seed, trouble=trouble, **{**gossip, "rounds": 60}).run() for seed in range(4)]
    assert sum(arena.checkers.num_events for arena in arenas) > 3_000
    assert any(node.epoch > 1 for arena in arenas for node in arena.nodes), "somebody did crash"


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 40))
def test_no_seed_makes_an_honest_core_break_a_rule(seed: int, trouble: float, rounds: int) -> None:
    Arena(seed, trouble=trouble, rounds=rounds, quorum=seed % 3 / 2).run(until_s=40.0)


def test_a_node_that_is_asked_to_stop_breaks_no_rule() -> None:
    arena = Arena(seed=3)
    arena.run(until_s=5.0)
    arena.handle(arena.nodes[1], StopRequested())
    assert arena.nodes[1].core is None
    arena.run()


def test_looking_changes_nothing() -> None:
    told: list[tuple[int, Effect]] = []

    class Telling(NodeCore):
        def step(self, now: float, event: Event) -> list[Effect]:
            effects = super().step(now, event)
            told[-1:] = [*told[-1:], *((self.view._me, effect) for effect in effects)]  # type: ignore[list-item]
            return effects

    runs = []
    for stride in (1, 10_000):
        told = []
        Arena(seed=2, make=Telling, trouble=0.1, stride=stride).run()
        runs.append(told)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("number", range(3, 60, 3))
def test_honest_cores_stop_and_come_back_amid_their_final_merge(number: int) -> None:
    """At one event of it one of them stops; with what it keeps it begins again."""
    seen = 0

    def spoil(event: Event) -> list[Event]:
        nonlocal seen
        seen += any(node.core is not None and node.core.phase is Phase.FINAL for node in arena.nodes)
        return [StopRequested()] if seen == number else [event]

    arena = Arena(number, spoil=spoil, rounds=3, final_merge="butterfly", final_deadline_s=4.0)
    arena.run(until_s=60.0)
    for node in arena.nodes:
        if node.core is None:
            arena.start(node)
    arena.run(until_s=200.0)
    assert all(node.core is not None and node.core.phase is Phase.DONE for node in arena.nodes)
    assert max(node.epoch for node in arena.nodes) > 1, "somebody did stop"


# --- broken cores ---------------------------------------------------------------------------------------
Change = Callable[[NodeCore, Event, list[Effect]], list[Effect]]


def breaking(change: Change, since: int = 60) -> type[NodeCore]:
    """A core that answers honestly for a while, and then as `change` would have it."""

    class Broken(NodeCore):
        num_steps = 0

        def step(self, now: float, event: Event) -> list[Effect]:
            effects = super().step(now, event)
            self.num_steps += 1
            return change(self, event, effects) if self.num_steps > since else effects

    return Broken


def each(kind: type, change: Callable[[Any], list[Effect]]) -> Change:
    """Every effect of this kind is replaced."""
    return lambda core, event, effects: [
        new for effect in effects for new in (change(effect) if isinstance(effect, kind) else [effect])
    ]


def add(kind: type, make: Callable[[NodeCore, Any], Effect]) -> Change:
    """On every event of this kind, one more effect."""
    return lambda core, event, effects: [*effects, make(core, event)] if isinstance(event, kind) else effects


def records(kind: type, change: Callable[[Any], Any]) -> Change:
    return each(Emit, lambda emit: [Emit(change(emit.record)) if isinstance(emit.record, kind) else emit])


def sends(kind: type, change: Callable[[Send], list[Effect]]) -> Change:
    return each(Send, lambda send: change(send) if isinstance(send.message, kind) else [send])


def other_inputs(change: Callable[[tuple[Input, ...]], tuple[Input, ...]]) -> Change:
    return each(Aggregate, lambda order: [replace(order, inputs=change(order.inputs))])


NUMBERS = count(1)

FINAL_MERGE_DONE = Emit(FinalMergeDone(1, 0, 1, {}, {}, "own", 0.0))
BROKEN: dict[str, tuple[str, Change]] = {
    "counts a peer twice": ("counted_once", other_inputs(lambda inputs: (*inputs, inputs[0]))),
    "counts itself": (
        "counted_once",
        lambda core, event, effects: other_inputs(
            lambda inputs: (*inputs, replace(inputs[0], peer=core.view._me))
        )(core, event, effects),
    ),
    "merges nothing": ("counted_once", other_inputs(lambda inputs: ())),
    "merges a model never fetched": (
        "verified",
        other_inputs(lambda inputs: (replace(inputs[0], ref=unknown()),)),
    ),
    "merges into a model it has not": ("verified", each(Aggregate, lambda o: [replace(o, own=unknown())])),
    "merges what it has forgotten": (
        "verified",
        each(Aggregate, lambda o: [Forget(o.inputs[0].ref), o]),
    ),
    "takes one peer's model for another's": (
        "offered",
        other_inputs(lambda inputs: (replace(inputs[0], peer=PeerId("liar")),)),
    ),
    "rewrites an offer": (
        "offered",
        other_inputs(lambda inputs: (replace(inputs[0], ref=replace(inputs[0].ref, num_samples=11)),)),
    ),
    "has models from the future": (
        "staleness",
        other_inputs(lambda inputs: (replace(inputs[0], staleness=-1),)),
    ),
    "trains from nothing": ("held", each(Train, lambda order: [replace(order, ref=unknown())])),
    "evaluates nothing": ("held", each(Evaluate, lambda order: [replace(order, ref=unknown())])),
    "keeps nothing": ("held", each(Keep, lambda keep: [Keep(unknown(1, keep.ref.round))])),
    "offers nothing": ("held", sends(Offer, lambda send: [Send(send.peer, Offer(unknown()))])),
    "forgets twice": ("forgets_once", each(Forget, lambda forget: [forget, forget])),
    "forgets what never was": ("forgets_once", add(TimerFired, lambda core, event: Forget(unknown()))),
    "forgets what it trains from": (
        "forgets_unused",
        each(Train, lambda order: [order, Forget(order.ref)]),
    ),
    "forgets what it merges": (
        "forgets_unused",
        each(Aggregate, lambda order: [order, Forget(order.inputs[0].ref)]),
    ),
    "forgets what it fetches": ("forgets_unused", each(Fetch, lambda fetch: [fetch, Forget(fetch.ref)])),
    "trains twice at once": (
        "one_order",
        each(Train, lambda order: [order, replace(order, token=order.token + 1)]),
    ),
    "works after the end": (
        "one_order",
        lambda core, event, effects: (
            effects + [Train(10**6, core.model, core.round)] * (core.phase is Phase.DONE and not effects)  # type: ignore[list-item]
        ),
    ),
    "has a final merge that nobody asked for": (
        "final",
        add(TimerFired, lambda core, event: FINAL_MERGE_DONE),
    ),
    "uses a token again": ("new_token", each(Train, lambda order: [replace(order, token=1)])),
    "sets a timer twice": ("new_token", each(SetTimer, lambda effect: [effect, effect])),
    "sets a timer in the past": ("new_token", each(SetTimer, lambda e: [replace(e, after_s=-1.0)])),
    "fetches under an old token": ("new_token", each(Fetch, lambda fetch: [replace(fetch, token=1)])),
    "fetches twice at once": ("new_token", each(Fetch, lambda fetch: [fetch, fetch])),
    "fetches two copies": (
        "one_copy",
        each(Fetch, lambda fetch: [fetch, replace(fetch, token=fetch.token + 1)]),
    ),
    "sends without a link": ("linked", sends(Heartbeat, lambda s: [Send(PeerId("x"), s.message)])),
    "sends where a link was": ("linked", add(LinkDown, lambda core, e: Send(e.peer, Heartbeat(0, True)))),
    "fetches without a link": ("linked", each(Fetch, lambda fetch: [replace(fetch, peer=PeerId("x"))])),
    "closes what is not there": (
        "linked",
        add(TimerFired, lambda core, event: Disconnect(PeerId("x"), Reason.LINK)),
    ),
    "greets twice": ("greeted", sends(Heartbeat, lambda send: [Send(send.peer, core_hello())])),
    "does not greet": ("greeted", sends(Hello, lambda send: [Send(send.peer, Peers(()))])),
    "talks before it is greeted": (
        "greeted",
        add(LinkUp, lambda core, event: Send(event.peer, Heartbeat(0, True))),
    ),
    "dials itself": ("dials", add(TimerFired, lambda core, event: Dial(address(core.view._me)))),
    "dials its neighbour": ("dials", add(LinkUp, lambda core, event: Dial(address(event.peer)))),
    "dials twice": ("dials", each(Dial, lambda dial: [dial, dial])),
    "goes back in rounds": ("rounds", records(RoundDone, lambda r: replace(r, round=max(0, r.round - 2)))),
    "leaps ahead": ("rounds", records(RoundDone, lambda record: replace(record, round=10_000))),
    "goes beyond the last round": ("rounds", records(RoundDone, lambda record: replace(record, round=12))),
    "is done too early": ("rounds", records(LearningDone, lambda record: replace(record, round=3))),
    "keeps an old round": ("rounds", each(Keep, lambda keep: [Keep(replace(keep.ref, round=0))])),
    "keeps a round to come": ("rounds", each(Keep, lambda keep: [Keep(replace(keep.ref, round=99))])),
    "trains another round": ("rounds", each(Train, lambda order: [replace(order, round=0)])),
    "writes what nobody can read": (
        "encodes",
        sends(Heartbeat, lambda send: [Send(send.peer, Heartbeat(send.message.round, 1))]),  # type: ignore[arg-type, union-attr]
    ),
    "halts by itself": ("halts", add(TimerFired, lambda core, event: Halt())),
    "arms timers without end": (
        "timers",
        add(
            TimerFired,
            lambda core, event: SetTimer(Timer("view", "beat", next(NUMBERS)), 1_000.0),
        ),
    ),
}


def core_hello() -> Hello:
    return hello_of("n1")


@pytest.mark.parametrize("what", BROKEN)
def test_a_core_that_(what: str) -> None:
    rule, change = BROKEN[what]
    # Not yet linked, there are no dials and greetings to break any more after the first steps.
    since = 0 if rule in ("dials", "greeted") else 60
    with pytest.raises(Violation) as caught:
        Arena(seed=2, make=breaking(change, since), trouble=0.05).run()
    assert caught.value.rule == rule, str(caught.value)
    assert f"rule '{rule}' at {caught.value.at_s:.6f} s, node {caught.value.node}: " in str(caught.value)
    assert caught.value.effects, "it ends with the one that is wrong"


def again_in_the_end(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    """Whoever went into a final merge goes into the next stage as well."""
    out: list[Effect] = []
    for effect in effects:
        if isinstance(effect, Aggregate) and effect.rule == "final":
            core.before = (*getattr(core, "before", ()), *effect.inputs)  # type: ignore[attr-defined]
            effect = replace(effect, inputs=core.before)  # type: ignore[attr-defined]
        out.append(effect)
    return out


def held_for_ever(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    assert core.learning is not None
    assert core.learning._final is not None
    core.learning._final._box |= {PeerId(f"passer-by {number}"): unknown() for number in range(20)}
    return effects


BROKEN_AT_THE_END: dict[str, tuple[str, Change]] = {
    "merges_a_peer_twice": ("counted_once", again_in_the_end),
    "chooses_anothers_model": (
        "counted_once",
        each(
            Aggregate,
            lambda order: [
                replace(order, inputs=(replace(order.inputs[0], peer=name(9)),))
                if order.rule == "accept"
                else order
            ],
        ),
    ),
    "takes_what_was_not_offered": (
        "offered",
        each(
            Aggregate,
            lambda order: [
                replace(order, inputs=(replace(order.inputs[0], peer=name(9)),))
                if order.rule == "final"
                else order
            ],
        ),
    ),
    "ends_it_twice": (
        "final",
        each(Emit, lambda emit: [emit, emit] if isinstance(emit.record, FinalMergeDone) else [emit]),
    ),
    "leaves_it_out": (
        "rounds",
        each(Emit, lambda emit: [] if isinstance(emit.record, FinalMergeDone) else [emit]),
    ),
    "lets_it_begin_too_early": (
        "final",
        each(Emit, lambda emit: [emit, FINAL_MERGE_DONE] if isinstance(emit.record, RoundDone) else [emit]),
    ),
    "lets_its_box_grow": ("bounds", held_for_ever),
}


@pytest.mark.parametrize("what", BROKEN_AT_THE_END)
def test_a_core_whose_final_merge_(what: str) -> None:
    rule, change = BROKEN_AT_THE_END[what]
    with pytest.raises(Violation) as caught:
        Arena(
            seed=1,
            make=breaking(change, 0),
            rounds=3,
            quorum=1.0,
            final_merge="butterfly",
            final_deadline_s=4.0,
            final_keep="better",
        ).run()
    assert caught.value.rule == rule, str(caught.value)


def grow_inbox(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    """As if models stayed under the names of everyone who ever passed by."""
    assert core.learning is not None
    if isinstance(event, Fetched):
        core.learning._inbox |= {PeerId(f"passer-by {number}"): unknown() for number in range(8)}
    return effects


def let_offers_wait(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    core.exchange._waiting |= {PeerId(f"passer-by {number}"): unknown() for number in range(3)}
    return effects


def offer_for_ever(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    core.exchange._offered += core.exchange._offered
    return effects


def leak_transfers(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    """What was fetched stays on the list."""
    core.seen = getattr(core, "seen", {}) | core.exchange._transfers  # type: ignore[attr-defined]
    if isinstance(event, Fetched) and event.token in core.seen:  # type: ignore[attr-defined]
        core.exchange._transfers[event.token] = core.seen[event.token]  # type: ignore[attr-defined]
    return effects


def believe_in_links(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    """A link that is gone stays on the list."""
    core.ever = getattr(core, "ever", {}) | core.view._links  # type: ignore[attr-defined]
    core.view._links |= core.ever  # type: ignore[attr-defined]
    return effects


def know_everybody(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    for number in range(1_000):
        core.view._book._entries[PeerId(f"passer-by {number}")] = core.view._book.get(name(0)) or Entry(())
    return effects


def without(owner: str) -> Change:
    return each(SetTimer, lambda effect: [effect] if effect.timer.owner != owner else [])


INSIDE: dict[str, tuple[str, Change]] = {
    "lets its inbox grow": ("bounds", grow_inbox),
    "lets offers wait without end": ("bounds", let_offers_wait),
    "offers all that it ever made": ("bounds", offer_for_ever),
    "leaks transfers": ("leaks", leak_transfers),
    "never tries again": ("leaks", without("exchange")),
    "never forgets": ("leaks", each(Forget, lambda forget: [])),
    "believes in links that are gone": ("leaks", believe_in_links),
    "knows everybody": ("leaks", know_everybody),
    "collects for ever": ("stuck", without("learning")),
}


@pytest.mark.parametrize("what", INSIDE)
def test_a_core_that_inside_(what: str) -> None:
    rule, change = INSIDE[what]
    with pytest.raises(Violation) as caught:
        Arena(seed=1, make=breaking(change, since=10), trouble=0.15, rounds=0).run()
    assert caught.value.rule == rule, str(caught.value)


# --- broken worlds --------------------------------------------------------------------------------------
def twice(*kinds: type) -> Callable[[Event], list[Event]]:
    def spoil(event: Event) -> list[Event]:
        return [event, event] if isinstance(event, kinds) else [event]

    return spoil


def never(*kinds: type) -> Callable[[Event], list[Event]]:
    def spoil(event: Event) -> list[Event]:
        return [] if isinstance(event, kinds) else [event]

    return spoil


WORLDS: dict[str, tuple[str, Callable[[Event], list[Event]]]] = {
    "answers trainings twice": ("answers", twice(Trained)),
    "answers merges twice": ("answers", twice(Aggregated, WorkFailed)),
    "answers fetches twice": ("answers", twice(Fetched, FetchFailed)),
    "fires timers twice": ("answers", twice(TimerFired)),
    "links twice": ("links", twice(LinkUp)),
    "ends links twice": ("links", twice(LinkDown)),
    "delivers before it links": ("links", lambda e: [] if isinstance(e, LinkUp) and not e.outbound else [e]),
    "does not train": ("stuck", never(Trained)),
    "does not fetch": ("overdue", never(Fetched)),
    "answers no dial": ("overdue", never(DialFailed)),
    "loses timers": ("overdue", never(TimerFired)),
}


@pytest.mark.parametrize("what", WORLDS)
def test_a_world_that_(what: str) -> None:
    rule, spoil = WORLDS[what]
    limits = Limits(work_s=10.0, fetch_s=10.0, dial_s=10.0)
    with pytest.raises(Violation) as caught:
        Arena(seed=1, spoil=spoil, trouble=0.1, limits=limits).run()
    assert caught.value.rule == rule, str(caught.value)


@pytest.mark.parametrize("older", [True, False])
def test_a_world_that_restarts_from_another_checkpoint_or_none(older: bool) -> None:
    arena = Arena(seed=1)
    arena.run(until_s=8.0)
    node = arena.nodes[2]
    assert node.kept is not None
    assert node.kept.round > 1
    arena.crash(node)
    node.kept = replace(node.kept, round=node.kept.round - 1) if older else None
    with pytest.raises(Violation, match=r"rule 'resumes' .* was kept"):
        arena.start(node)


def test_a_world_that_runs_a_node_twice_or_a_gone_one() -> None:
    arena = Arena(seed=1)
    with pytest.raises(Violation, match="a second core"):
        arena.checkers.started(0, arena.nodes[0].core, 0.0, 1)  # type: ignore[arg-type]
    arena.checkers.gone(0)
    with pytest.raises(Violation, match="not online"):
        arena.checkers.after(0, 0.0, StopRequested(), [])
    arena.checkers.gone(0)  # nobody minds


def test_what_is_late_counts_only_from_the_end_of_the_faults() -> None:
    arena = Arena(seed=1, spoil=never(Fetched), limits=Limits(fetch_s=10.0, since_s=1e6))
    arena.run(until_s=60.0)


# --- the whole ------------------------------------------------------------------------------------------
def test_every_rule_is_broken_somewhere_above() -> None:
    broken = {rule for table in (BROKEN, INSIDE, WORLDS) for rule, _ in table.values()} | {"resumes"}
    assert broken == {rule.name for rule in RULES} | {"encodes", "bounds", "leaks", "stuck", "overdue"}


def test_every_rule_stands_in_the_table() -> None:
    assert module.__doc__ is not None
    named = Counter(line.split("`")[1] for line in module.__doc__.splitlines() if line.startswith("| `"))
    assert set(named) == {rule.name for rule in RULES} | {"encodes", "bounds", "leaks", "stuck", "overdue"}
    assert max(named.values()) == 1


def test_a_violation_is_told_in_a_few_lines() -> None:
    order = Aggregate(3, unknown(), (Input(PeerId("n1"), unknown(2, 5), 0),))
    text = str(Violation(1.5, 2, "verified", "why", Trained(1, unknown()), [order] * 20))
    assert text.splitlines()[:4] == [
        "rule 'verified' at 1.500000 s, node 2: why",
        "  event  Trained(1, ModelRef(00000000, 100, 0, 10))",
        "  after 12 other effects",
        "  effect Aggregate(3, ModelRef(00000000, 100, 0, 10), (Input(n1, ModelRef(00000000, 100, 5, 10), 0)), round)",
    ]
    assert len(text.splitlines()) == 3 + 8
    assert (
        brief(Received(PeerId("a"), Offer(unknown()))) == "Received(a, Offer(ModelRef(00000000, 100, 0, 10)))"
    )


# --- liveness -------------------------------------------------------------------------------------------
def test_a_node_that_has_not_ended_its_rounds_is_not_alive() -> None:
    arena = Arena(seed=1).run(until_s=6.0)
    with pytest.raises(Violation, match=r"rule 'ends' at .* in round \d+ of 12"):
        Liveness(stops_at_s=0.0, round_s=1.0).check(arena, arena.checkers)


def test_without_a_last_round_one_must_have_ended_of_late() -> None:
    arena = Arena(seed=1, rounds=0).run(until_s=20.0)
    Liveness(stops_at_s=0.0, round_s=6.0).check(arena, arena.checkers)
    arena.time = 30.0
    with pytest.raises(Violation, match=r"rule 'ends' at 30.*no round ended for 1\d"):
        Liveness(stops_at_s=0.0, round_s=6.0).check(arena, arena.checkers)
    Liveness(stops_at_s=29.0, round_s=6.0).check(arena, arena.checkers)


class Hermit(NodeCore):
    """Takes up no link and dials nobody."""

    def step(self, now: float, event: Event) -> list[Effect]:
        if isinstance(event, LinkUp | LinkDown | Received | DialFailed):
            return []
        return [effect for effect in super().step(now, event) if not isinstance(effect, Dial)]


def test_a_node_without_neighbours_is_not_alive_where_there_are_any() -> None:
    arena = Arena(seed=1, make=Hermit, stride=10**9)
    arena.checkers._look_closer = lambda *args: None  # type: ignore[method-assign]
    arena.run(until_s=50.0)
    Liveness(stops_at_s=0.0, round_s=20.0, links_s=60.0).check(arena, arena.checkers)
    with pytest.raises(Violation, match=r"rule 'neighbours' .* node 0: no link, though there are n1, n2, n3"):
        Liveness(stops_at_s=0.0, round_s=20.0, links_s=30.0).check(arena, arena.checkers)
    for node in arena.nodes[1:]:
        node.core = None
    Liveness(stops_at_s=0.0, round_s=20.0, links_s=30.0).check(arena, arena.checkers)
