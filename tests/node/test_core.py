"""Whole cores, wired by a heap: delivery takes no wires, work invents references, one seed decides all."""

import hashlib
import heapq
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.core import CoreSettings, NodeCore
from protocols.codec import encode, link_decoder
from protocols.events import (
    Aggregate,
    Aggregated,
    Dial,
    DialFailed,
    Disconnect,
    Discovered,
    Effect,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Halt,
    Keep,
    LearningDone,
    LinkDown,
    LinkUp,
    Phase,
    Received,
    Rejected,
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
from protocols.messages import (
    Bye,
    Decline,
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
from protocols.view import NO_LEARNING, ViewSettings
from protocols.vocabulary import MAX_INCARNATION, MAX_ROUND, ModelRef, PeerId, Reason, SchemaHash
from tests.protocols.identities import FakeSignatures, hello_of, signed_record

SCHEMA = SchemaHash(bytes(32))


def settings_of(learning: str = "gossip", **gossip: object) -> CoreSettings:
    return CoreSettings(
        network="net",
        task="task",
        schema=SCHEMA,
        max_model_bytes=1_000,
        learning=learning,
        view=ViewSettings(bootstrap=(address("n0"),), target_degree=3),
        gossip=GossipSettings(**{"rounds": 10, "pause_s": 1.0, "deadline_s": 5.0, **gossip}),
    )


def address(peer: str) -> str:
    return f"/memory/{peer}/p2p/{peer}"


def make_core(core: CoreSettings, me: str = "me", seed: int = 0) -> NodeCore:
    return NodeCore(core, PeerId(me), random.Random(seed), FakeSignatures(me))


class Cluster:
    """Cores and a heap of (time, number, node, event). No loss, a little latency, work that takes a while."""

    def __init__(self, num: int, seed: int, **gossip: object) -> None:
        self.heap: list[tuple[float, int, PeerId, Event]] = []
        self.rng = random.Random(seed)
        self.now, self.pushed = 0.0, 0
        self.links: set[tuple[PeerId, PeerId]] = set()
        self.held: dict[PeerId, set[bytes]] = {}
        self.log: list[tuple[float, PeerId, Effect]] = []
        self.cores: dict[PeerId, NodeCore] = {}
        for number in range(num):
            peer = PeerId(f"n{number}")
            self.cores[peer] = NodeCore(
                settings_of(**gossip), peer, random.Random(f"{seed} {peer}"), FakeSignatures(peer)
            )
            self.held[peer] = set()
            self.push(0, peer, Started((address(peer),), (), self.make(peer, peer, 0)))

    def push(self, after_s: float, peer: PeerId, event: Event) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (self.now + after_s, self.pushed, peer, event))

    def make(self, peer: PeerId, of: object, round_: int) -> ModelRef:
        digest = hashlib.sha256(repr((peer, of, round_)).encode()).digest()
        self.held[peer].add(digest)
        return ModelRef(digest, 100, round_, 10)

    def run(self, until: float) -> None:
        while self.heap and self.heap[0][0] <= until:
            self.now, _, peer, event = heapq.heappop(self.heap)
            for effect in self.cores[peer].step(self.now, event):
                self.log.append((self.now, peer, effect))
                self.perform(peer, effect)

    def cut(self, a: PeerId, b: PeerId, reason: Reason) -> None:
        if (a, b) in self.links:
            self.links -= {(a, b), (b, a)}
            self.push(0.02, a, LinkDown(b, reason))
            self.push(0.02, b, LinkDown(a, Reason.LINK))

    def perform(self, me: PeerId, effect: Effect) -> None:
        work_s = self.rng.uniform(0.5, 1.5)
        match effect:
            case Dial(where):
                peer = PeerId(where.rpartition("/")[2])
                if (me, peer) not in self.links:
                    self.links |= {(me, peer), (peer, me)}
                    self.push(0.01, me, LinkUp(peer, True, where))
                    self.push(0.01, peer, LinkUp(me, False, ""))
            case Disconnect(peer, reason):
                self.cut(me, peer, reason)
            case Send(peer, message) if (me, peer) in self.links:
                (read,) = link_decoder().feed(encode(message))
                self.push(0.01, peer, Received(me, read))
            case SetTimer(timer, after_s):
                self.push(after_s, me, TimerFired(timer))
            case Fetch(token, peer, ref):
                if ref.digest in self.held[peer]:
                    self.held[me].add(ref.digest)
                    self.push(0.05, me, Fetched(token))
                else:
                    self.push(0.05, me, FetchFailed(token, Reason.GONE))
            case Train(token, ref, round_):
                self.push(work_s, me, Trained(token, self.make(me, ref, round_)))
            case Aggregate(token, own, inputs):
                assert {own.digest, *(item.ref.digest for item in inputs)} <= self.held[me]
                self.push(0.1, me, Aggregated(token, self.make(me, inputs, own.round)))
            case Evaluate(token, ref):
                assert ref.digest in self.held[me]
                self.push(0.1, me, Evaluated(token, {"loss": 0.5}))
            case Keep(ref):
                assert ref.digest in self.held[me]
            case Forget(ref):
                assert ref.digest in self.held[me], "forgotten twice"
                self.held[me].remove(ref.digest)

    def effects(self, kind: type, peer: PeerId | None = None) -> list:
        return [item for _, who, item in self.log if isinstance(item, kind) and peer in (None, who)]


# --- together -------------------------------------------------------------------------------------------
def test_four_nodes_find_each_other_and_learn_every_round() -> None:
    cluster = Cluster(4, seed=1)
    cluster.run(until=200)
    for peer, core in cluster.cores.items():
        assert (core.phase, core.round) == (Phase.DONE, 10)
        assert core.view.num_live() == 3
        records = [item.record for item in cluster.effects(Emit, peer)]
        assert [record.round for record in records if isinstance(record, LearningDone)] == [10]
        rounds = [record.round for record in records if isinstance(record, RoundDone)]
        assert rounds == sorted(set(rounds))
        assert rounds[-1] == 9
        assert cluster.effects(Keep, peer)[-1].ref == core.model
    merges = cluster.effects(Aggregate)
    assert len(merges) > 20
    for merge in merges:
        peers = [item.peer for item in merge.inputs]
        assert 1 <= len(peers) == len(set(peers)) <= 3
        assert all(item.staleness >= 0 for item in merge.inputs)


def test_bytes_held_stay_within_what_the_settings_say() -> None:
    cluster = Cluster(4, seed=2, rounds=50)
    cluster.run(until=500)
    generations = ExchangeSettings().num_generations
    for peer, core in cluster.cores.items():
        assert core.round >= 50
        assert len(cluster.held[peer]) <= generations + 1, "the offered ones and its own"


def test_a_seed_decides_everything() -> None:
    logs = []
    for seed in (1, 1, 2):
        cluster = Cluster(4, seed=seed)
        cluster.run(until=60)
        logs.append(cluster.log)
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_a_node_that_stops_says_goodbye_keeps_and_halts() -> None:
    cluster = Cluster(3, seed=1, rounds=0)
    cluster.run(until=10)
    me = PeerId("n1")
    out = cluster.cores[me].step(cluster.now, StopRequested())
    kinds = Counter(type(effect) for effect in out)
    assert kinds == {Send: 4, Disconnect: 2, Keep: 1, Halt: 1}
    assert isinstance(out[-1], Halt)
    leave = cluster.cores[me].view.record
    assert leave.left
    for peer in (PeerId("n0"), PeerId("n2")):
        said = [effect.message for effect in out if isinstance(effect, Send) and effect.peer == peer]
        assert said == [Peers((leave,)), Bye()]


def test_the_others_go_on_when_one_falls_silent() -> None:
    cluster = Cluster(4, seed=5, rounds=30)
    cluster.run(until=10)
    gone = PeerId("n3")
    for peer in list(cluster.cores):
        cluster.cut(peer, gone, Reason.LINK)
    cluster.heap = [item for item in cluster.heap if item[2] != gone]
    heapq.heapify(cluster.heap)
    cluster.cores[gone] = make_core(settings_of(), gone)  # it never starts
    cluster.run(until=400)
    assert all(core.round >= 30 for peer, core in cluster.cores.items() if peer != gone)


# --- alone ----------------------------------------------------------------------------------------------
def test_a_helper_greets_and_introduces_but_never_learns() -> None:
    core = make_core(settings_of(learning=NO_LEARNING), "n0")
    core.step(0, Started((), (), None))
    learners = [hello_of(peer, address(peer)) for peer in "ab"]
    for learner in learners:
        peer = PeerId(learner.record.peer)
        core.step(0, LinkUp(peer, False, ""))
        out = core.step(0, Received(peer, learner))
        assert Send(peer, Heartbeat(0, False)) in out
    (answer,) = core.step(0, Received(PeerId("b"), Shuffle(())))
    assert answer == Send(PeerId("b"), Peers((learners[0].record,)))
    ref = ModelRef(bytes(32), 10, 0, 1)
    decline = Send(PeerId("a"), Decline(ref.digest, Reason.IDLE))
    assert core.step(0, Received(PeerId("a"), Offer(ref))) == [decline]
    assert (core.model, core.round, core.phase) == (None, 0, Phase.DONE)
    assert core.step(1, StopRequested())[-1] == Halt()


def test_an_unknown_learning_protocol_is_no_core() -> None:
    with pytest.raises(KeyError):
        make_core(settings_of(learning="federated"), "n0")


def test_one_event_travels_through_all_machines_in_one_step() -> None:
    core = make_core(settings_of(wait_for_peers=1))
    core.step(0, Started((), (), ModelRef(bytes(32), 10, 0, 1)))
    core.step(0, LinkUp(PeerId("a"), False, ""))
    core.step(0, Received(PeerId("a"), hello_of("a")))
    out = core.step(0, Received(PeerId("a"), Heartbeat(0, True)))
    assert [effect for effect in out if isinstance(effect, Train)], "greeted, so in company, so it begins"


# --- garbage --------------------------------------------------------------------------------------------
peers = st.sampled_from([PeerId(name) for name in ("n0", "a", "b", "c", "")])
tokens = st.integers(0, 8)
rounds = st.sampled_from([0, 1, 2, 9, 10, 2**40, MAX_ROUND])
refs = st.builds(
    ModelRef,
    st.integers(0, 5).map(lambda n: bytes([n]) * 32),
    st.sampled_from([1, 100, 5_000]),
    rounds,
    st.just(1),
)
reasons = st.sampled_from(Reason)
where = st.sampled_from([address("a"), address("c"), address("n0"), "junk", "/p2p/", ""])
incarnations = st.sampled_from([0, 1, 2, MAX_INCARNATION])
known = st.builds(
    lambda peer, addresses, signer, **fields: signed_record(peer, *addresses, signer=signer, **fields),
    peers | st.just(PeerId("me")),
    st.lists(where, max_size=3),
    st.just("") | peers,
    incarnation=incarnations,
    left=st.booleans(),
    round=rounds,
)
hellos = st.builds(
    Hello,
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from(["net", "net", "other"]),
    st.sampled_from(["gossip", "gossip", NO_LEARNING]),
    st.just("task"),
    st.just(SCHEMA),
    known,
    st.booleans(),
    st.none(),
)
messages: st.SearchStrategy[LinkMessage] = st.one_of(
    hellos,
    hellos,
    st.builds(Refuse, reasons, st.just("why")),
    st.builds(Heartbeat, rounds, st.booleans()),
    st.builds(Shuffle, st.lists(known, max_size=3).map(tuple)),
    st.builds(Peers, st.lists(known, max_size=3).map(tuple)),
    st.builds(Ping, tokens),
    st.builds(Pong, tokens, rounds),
    st.builds(Probe, tokens, peers),
    st.builds(Probed, tokens, st.booleans()),
    st.builds(
        Suspects,
        st.lists(st.builds(Suspicion, peers | st.just(PeerId("me")), incarnations), max_size=3).map(tuple),
    ),
    st.builds(Offer, refs),
    st.builds(Offer, refs),
    st.builds(Decline, st.just(bytes(32)), reasons),
    st.builds(Bye),
)
timers = st.builds(
    Timer,
    st.sampled_from(["view", "exchange", "learning"]),
    st.sampled_from(["beat", "redial", "retry", "deadline", "pause"]),
    tokens,
)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Started, st.just((address("me"),)), st.lists(known, max_size=3).map(tuple), st.none() | refs),
    st.builds(LinkUp, peers, st.booleans(), where),
    st.builds(LinkUp, peers, st.booleans(), where),
    st.builds(LinkDown, peers, reasons),
    st.builds(DialFailed, where, reasons),
    st.builds(Discovered, st.lists(where, max_size=3).map(tuple)),
    st.builds(Received, peers, messages),
    st.builds(Received, peers, messages),
    st.builds(Received, peers, messages),
    st.builds(Rejected, peers, reasons),
    st.builds(TimerFired, timers),
    st.builds(Fetched, tokens),
    st.builds(FetchFailed, tokens, reasons),
    st.builds(Trained, tokens, refs),
    st.builds(Aggregated, tokens, refs),
    st.builds(Evaluated, tokens, st.just({})),
    st.builds(WorkFailed, tokens, st.just("boom")),
    st.builds(StopRequested),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(events, max_size=60), st.sampled_from(["gossip", NO_LEARNING]), st.integers(0, 2))
def test_no_sequence_of_events_breaks_a_core(script: list[Event], learning: str, company: int) -> None:
    core = make_core(settings_of(learning, wait_for_peers=company))
    for number, event in enumerate(script):
        for effect in core.step(float(number), event):
            if isinstance(effect, Send):
                # Whatever others say, what we say can be read.
                assert list(link_decoder().feed(encode(effect.message))) == [effect.message]
        core.peers()


@pytest.mark.parametrize("seed", range(4))
def test_a_core_survives_its_own_answers_mixed_with_garbage(seed: int) -> None:
    """Long and likely: most answers are the right ones, so that every phase is passed through."""
    rng = random.Random(seed)
    core = make_core(settings_of(rounds=0, pause_s=0), seed=seed)
    due: list[Event] = [Started((), (), ModelRef(bytes(32), 10, 0, 1))]
    noise: list[Event] = []
    done = 0
    for number in range(5_000):
        peer = PeerId(rng.choice("abc"))
        ref = ModelRef(rng.randbytes(32), rng.choice([10, 5_000]), rng.randrange(1_000), 1)
        noise += rng.choice(
            [
                [LinkUp(peer, False, ""), Received(peer, hello_of(peer))],
                [Received(peer, Offer(ref))],
                [Received(peer, Heartbeat(number, rng.random() < 0.9))],
                [LinkDown(peer, rng.choice(list(Reason)))] if rng.random() < 0.3 else [],
                [Fetched(rng.randrange(50)), Trained(rng.randrange(50), ref)],
            ]
        )
        pile = due if due and (rng.random() < 0.5 or not noise) else noise
        event = pile.pop(rng.randrange(len(pile))) if pile else LinkDown(peer, Reason.LINK)
        for effect in core.step(float(number), event):
            match effect:
                case Train(token) | Aggregate(token) as work:
                    answer = Trained if isinstance(work, Train) else Aggregated
                    due.append(rng.choice([answer(token, ref), answer(token, ref), WorkFailed(token, "")]))
                case Evaluate(token):
                    due.append(Evaluated(token, {}))
                case SetTimer(timer):
                    due.append(TimerFired(timer))
                case Fetch(token):
                    due.append(rng.choice([Fetched(token), FetchFailed(token, rng.choice(list(Reason)))]))
                case Emit(RoundDone()):
                    done += 1
        noise = noise[-40:]
    assert done > 100
