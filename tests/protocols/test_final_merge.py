"""The merge after the last round: who sends what to whom, with numbers for models, and what happens when some fall out."""

import heapq
import itertools
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from node.core import CoreSettings, NodeCore
from protocols.events import (
    Aggregate,
    Aggregated,
    Disconnect,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FinalMergeDone,
    Forget,
    Keep,
    LearningDone,
    LinkDown,
    LinkUp,
    Phase,
    Received,
    Record,
    Send,
    SetTimer,
    Started,
    TimerFired,
    Train,
    Trained,
    WorkFailed,
)
from protocols.final_merge import (
    MAX_TURNS,
    Stage,
    aggregator,
    butterfly,
    in_order,
    num_stages,
)
from protocols.gossip import GossipSettings
from protocols.messages import Heartbeat, Offer
from protocols.view import ViewSettings
from protocols.vocabulary import ModelRef, PeerId, Reason, SchemaHash
from sim.checkers import Violation
from tests.protocols.identities import FakeSignatures
from tests.sim.test_checkers import Arena, breaking

Mean = tuple[Fraction, int]
"""A model that is a number, and the samples behind it."""


def members_of(count: int) -> tuple[PeerId, ...]:
    return in_order([PeerId(f"p{number}") for number in range(count)], "net")


def joined(*means: Mean) -> Mean:
    samples = sum(weight for _, weight in means)
    return sum((value * weight for value, weight in means), Fraction(0)) / samples, samples


# --- the plans ------------------------------------------------------------------------------------------
def follow(plans: dict[PeerId, list[Stage]], models: dict[PeerId, Mean]) -> tuple[dict[PeerId, Mean], int]:
    """Do all stages in their order; what everybody has in the end, and how many models have moved."""
    moved = 0
    for number in range(1, 1 + max((s.number for plan in plans.values() for s in plan), default=0)):
        now = {me: stage for me, plan in plans.items() for stage in plan if stage.number == number}
        after = dict(models)
        for me, stage in now.items():
            for peer in stage.send_to:
                assert me in now[peer].receive_from, "whoever sends is awaited"
            moved += len(stage.send_to)
            came = [models[peer] for peer in stage.receive_from]
            assert all(me in now[peer].send_to for peer in stage.receive_from), "whoever is awaited sends"
            assert all(now[peer].sends_result == stage.takes_result for peer in stage.receive_from)
            if came:
                after[me] = came[0] if stage.takes_result else joined(models[me], *came)
        models = after
    return models, moved


@pytest.mark.parametrize("count", range(1, 18))
@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_everybody_ends_with_the_weighted_mean_of_all(mode: str, count: int) -> None:
    members, rng = members_of(count), random.Random(count)
    models = {peer: (Fraction(rng.randint(-99, 99)), rng.randint(1, 50)) for peer in members}
    plan = butterfly if mode == "butterfly" else lambda members, me: aggregator(members, me, 0)
    plans = {me: plan(members, me) for me in members}
    found, moved = follow(plans, models)
    assert set(found.values()) == {joined(*models.values())}
    surplus = count - (1 << count.bit_length() - 1)
    expected = (count - surplus) * (count.bit_length() - 1) + 2 * surplus
    assert moved == (expected if mode == "butterfly" else 2 * (count - 1))
    highest = max((stage.number for stages in plans.values() for stage in stages), default=0)
    assert highest <= num_stages(mode, count)
    if mode == "butterfly":
        assert highest == num_stages(mode, count)


def test_the_next_aggregator_takes_over_from_those_that_are_left() -> None:
    members = members_of(5)
    heads = [next(me for me in members if aggregator(members, me, turn)[1].sends_result) for turn in range(3)]
    assert heads == list(members[:3])
    gather, spread = aggregator(members, members[1], 1)
    assert (gather.number, spread.number) == (3, 4)
    assert gather.receive_from == members[2:], "the lost one is not awaited"
    assert set(spread.send_to) == set(members) - {members[1]}, "but it is told, if it should still be there"


def test_the_order_is_the_same_for_all_and_differs_between_networks() -> None:
    peers = [PeerId(f"p{number}") for number in range(20)]
    assert in_order(peers, "a") == in_order(peers[::-1], "a")
    assert in_order(peers, "a") != in_order(peers, "b")
    assert in_order(peers, "a") != tuple(sorted(peers))


# --- whole nodes ----------------------------------------------------------------------------------------
DEADLINE_S = 10.0
ROUNDS = 2


class Net:
    """Cores with the slowest of all networks between them: every message and every piece of work takes its time."""

    def __init__(self, count: int, mode: str, seed: int = 0, links: object = None, **options: object) -> None:
        self.rng = random.Random(seed)
        self.mode = mode
        self.options = {"rounds": ROUNDS, "quorum": 0, "pause_s": 0, **options}
        self.now = 0.0
        self.heap: list[tuple[float, int, PeerId, int, Event]] = []
        self.count = itertools.count()
        self.cores: dict[PeerId, NodeCore] = {}
        self.life: dict[PeerId, int] = {}
        self.due: dict[tuple[PeerId, PeerId], float] = {}
        self.silent: set[PeerId] = set()
        self.models: dict[bytes, Mean] = {}
        self.samples: dict[PeerId, int] = {}
        self.start: dict[PeerId, Fraction] = {}
        self.held: dict[PeerId, set[bytes]] = {}
        self.kept: dict[PeerId, ModelRef] = {}
        self.records: dict[PeerId, list[Record]] = {}
        self.final_inputs: dict[PeerId, list[PeerId]] = {}
        self.merged: dict[PeerId, set[bytes]] = {}
        self.slow: dict[PeerId, float] = {}
        self.chooses = "merged"
        self.watch: Callable[[PeerId, object], None] = lambda me, effect: None
        self.peers = [PeerId(f"p{number}") for number in range(count)]
        for peer in self.peers:
            self.samples[peer] = self.rng.randint(1, 9)
            self.start[peer] = Fraction(self.rng.randint(-99, 99))
            self.boot(peer)
        self.edges = links if links is not None else list(itertools.combinations(self.peers, 2))
        for one, other in self.edges:
            self.link(one, other)

    def boot(self, me: PeerId) -> None:
        gossip = GossipSettings(final_merge=self.mode, final_deadline_s=DEADLINE_S, **self.options)
        far = ViewSettings(target_degree=0, max_degree=64, heartbeat_s=500, dead_after_s=3000)
        core = CoreSettings("net", "task", SchemaHash(bytes(32)), 1_000, view=far, gossip=gossip)
        self.cores[me] = NodeCore(core, me, random.Random(me), FakeSignatures(me))
        self.life[me] = self.life.get(me, -1) + 1
        self.records[me], self.final_inputs[me], self.merged[me] = [], [], set()
        ref = self.kept.get(me) or self.new(me, 0, (self.start[me], self.samples[me]))
        self.held[me] = {ref.digest}
        self.step(me, Started((), (), ref))

    def new(self, me: PeerId, round_: int, mean: Mean) -> ModelRef:
        digest = next(self.count).to_bytes(32, "big")
        self.models[digest] = mean
        return ModelRef(digest, 100, round_, mean[1])

    def link(self, one: PeerId, other: PeerId) -> None:
        self.step(one, LinkUp(other, True, ""))
        self.step(other, LinkUp(one, False, ""))

    def kill(self, gone: PeerId) -> None:
        """Its neighbours are told at once."""
        del self.cores[gone]
        for peer in sorted(self.cores):
            if gone in self.cores[peer].view._links:
                self.later(0.01, peer, LinkDown(gone, Reason.LINK))

    def later(self, after_s: float, me: PeerId, event: Event) -> None:
        heapq.heappush(self.heap, (self.now + after_s, next(self.count), me, self.life[me], event))

    def run(self, until_s: float = 1_000.0) -> None:
        while self.heap and self.heap[0][0] <= until_s:
            self.now, _, me, life, event = heapq.heappop(self.heap)
            if me in self.cores and self.life[me] == life:
                self.step(me, event)

    def step(self, me: PeerId, event: Event) -> None:
        for effect in self.cores[me].step(self.now, event):
            self.watch(me, effect)
            self.perform(me, effect)
            if me not in self.cores:
                return

    def perform(self, me: PeerId, effect: object) -> None:
        work_s = 0.5 * self.slow.get(me, 1.0)
        match effect:
            case Send(peer, message):
                if isinstance(message, Offer) and message.ref.round == ROUNDS + 1:
                    assert message.ref.digest in self.merged[me], "only a merge made here is called a result"
                if peer in self.cores and not {me, peer} & self.silent:
                    # On one link messages keep their order.
                    due = max(self.now + 0.01 + self.rng.random() / 50, self.due.get((me, peer), 0.0))
                    self.due[me, peer] = due
                    self.later(due - self.now, peer, Received(me, message))
            case Disconnect(peer):
                self.later(0, me, LinkDown(peer, Reason.LINK))
            case SetTimer(timer, after_s):
                assert after_s >= 0
                self.later(after_s, me, TimerFired(timer))
            case Fetch(token, peer, ref):
                there = peer in self.cores and peer not in self.silent and ref.digest in self.held[peer]
                if there:
                    self.held[me].add(ref.digest)
                self.later(0.1, me, Fetched(token) if there else FetchFailed(token, Reason.GONE))
            case Train(token, _, round_):
                ref = self.new(me, round_, (self.start[me], self.samples[me]))
                self.held[me].add(ref.digest)
                self.later(work_s, me, Trained(token, ref))
            case Aggregate():
                self.later(0.05, me, self.merge(me, effect))
            case Evaluate(token, ref):
                assert ref.digest in self.held[me]
                self.later(0.05, me, Evaluated(token, {"value": float(self.models[ref.digest][0])}))
            case Keep(ref):
                self.kept[me] = ref
            case Forget(ref):
                self.held[me].discard(ref.digest)  # it may have come in part only
            case Emit(record):
                self.records[me].append(record)

    def merge(self, me: PeerId, order: Aggregate) -> Event:
        assert {order.own.digest, *(item.ref.digest for item in order.inputs)} <= self.held[me]
        if order.rule == "accept":
            (item,) = order.inputs
            if self.chooses == "fail":
                return WorkFailed(order.token, "no")
            return Aggregated(order.token, order.own if self.chooses == "own" else item.ref)
        if order.rule == "round":
            ref = self.new(me, order.own.round, (self.start[me], self.samples[me]))
        else:
            self.final_inputs[me] += [item.peer for item in order.inputs]
            parts = [order.own, *(item.ref for item in order.inputs)]
            mean = joined(*((self.models[part.digest][0], part.num_samples) for part in parts))
            ref = self.new(me, order.own.round, mean)
            self.merged[me].add(ref.digest)
        self.held[me].add(ref.digest)
        return Aggregated(order.token, ref)

    # --- what came of it --------------------------------------------------------------------------------
    def of(self, me: PeerId, kind: type) -> list:
        return [record for record in self.records[me] if isinstance(record, kind)]

    def final(self, me: PeerId) -> FinalMergeDone:
        (record,) = self.of(me, FinalMergeDone)
        return record

    def value(self, me: PeerId) -> Mean:
        model = self.cores[me].model
        assert model is not None
        return self.models[model.digest]

    def mean_of(self, *peers: PeerId) -> Mean:
        return joined(*((self.start[peer], self.samples[peer]) for peer in peers))

    def check_ended(self) -> None:
        """Everybody who is here is done, once, and holds nothing that it does not need."""
        for me, core in self.cores.items():
            assert core.phase is Phase.DONE, me
            assert len(self.of(me, LearningDone)) == 1
            assert len(set(self.final_inputs[me])) == len(self.final_inputs[me]), "nobody is counted twice"
            assert self.held[me] == set(core.exchange._held)
            offered = {ref.digest for ref in core.exchange._offered}
            assert self.held[me] == {core.model.digest, *offered}
            assert not core.learning._final._box
            assert self.kept[me].round == ROUNDS + 1
            assert self.kept[me].num_samples == self.samples[me]


@pytest.mark.parametrize("count", range(2, 18))
@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_where_all_are_linked_all_end_with_the_same_exact_mean(mode: str, count: int) -> None:
    net = Net(count, mode, seed=count)
    net.run()
    net.check_ended()
    mean = net.mean_of(*net.peers)
    for me in net.peers:
        assert net.value(me) == mean
        record = net.final(me)
        assert (record.num_members, record.num_samples, record.kept) == (count, mean[1], "merged")
        assert record.before == {"value": float(net.start[me])}
        assert record.merged == {"value": float(mean[0])}
        assert record.duration_s < DEADLINE_S, "nobody waited in vain"


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.sampled_from(["butterfly", "aggregator"]), st.integers(0, 2**32))
def test_different_paces_change_nothing(count: int, mode: str, seed: int) -> None:
    net = Net(count, mode, seed)
    rng = random.Random(seed)
    net.slow = {peer: rng.uniform(0.5, 8.0) for peer in net.peers}
    net.run()
    net.check_ended()
    assert {net.value(me) for me in net.peers} == {net.mean_of(*net.peers)}


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_a_node_that_is_alone_ends_after_the_deadline_with_its_own_model(mode: str) -> None:
    net = Net(1, mode)
    net.run()
    net.check_ended()
    record = net.final(net.peers[0])
    assert (record.num_members, record.num_stages, record.kept) == (1, 0, "own")
    assert record.before == record.merged == {}
    assert record.duration_s == DEADLINE_S


def kill_at(net: Net, me: PeerId, when: Callable[[object], bool], how: str) -> None:
    """Once it does something of this kind, a node is gone."""

    def watch(peer: PeerId, effect: object) -> None:
        if peer == me and me in net.cores and me not in net.silent and when(effect):
            net.silent.add(me) if how == "silent" else net.kill(me)

    net.watch = watch


def offers_stage(number: int) -> Callable[[object], bool]:
    return lambda effect: (
        isinstance(effect, Send)
        and isinstance(effect.message, Offer)
        and effect.message.ref.round == ROUNDS + 1 + number
    )


@pytest.mark.parametrize("how", ["dead", "silent"])
@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 11), st.integers(0, 2**32), st.integers(0, 4))
def test_whoever_falls_out_stops_nobody(mode: str, how: str, count: int, seed: int, stage: int) -> None:
    net = Net(count, mode, seed)
    gone = net.rng.choice(net.peers)
    kill_at(net, gone, offers_stage(stage), how)
    net.run()
    net.cores.pop(gone, None)
    net.check_ended()
    for me in net.cores:
        assert net.final(me).duration_s <= DEADLINE_S * (2 + num_stages(mode, count))
        # A mean of what there is, with no sample twice.
        assert net.final(me).num_samples <= net.mean_of(*net.peers)[1]


def test_those_who_are_told_of_a_death_before_they_begin_merge_the_rest_exactly() -> None:
    net = Net(9, "butterfly")
    gone, rest = net.peers[4], [peer for peer in net.peers if peer != net.peers[4]]
    net.slow = {gone: 10.0}
    net.run(until_s=3.0)
    net.kill(gone)
    net.run()
    net.check_ended()
    assert {net.value(me) for me in rest} == {net.mean_of(*rest)}
    assert all(net.final(me).duration_s < DEADLINE_S for me in rest)


@pytest.mark.parametrize("how", ["dead", "silent"])
@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_when_aggregators_are_lost_the_next_takes_over(how: str, num_lost: int) -> None:
    net = Net(7, "aggregator", seed=3)
    order = in_order(net.peers, "net")
    lost, rest = order[:num_lost], order[num_lost:]

    def watch(me: PeerId, effect: object) -> None:
        # The first to lose is lost as soon as anybody has offered it a model.
        if (
            isinstance(effect, Send)
            and isinstance(effect.message, Offer)
            and effect.message.ref.round > ROUNDS
        ):
            for peer in lost:
                if peer in net.cores and peer not in net.silent:
                    net.silent.add(peer) if how == "silent" else net.kill(peer)

    net.watch = watch
    net.run()
    for peer in lost:
        net.cores.pop(peer, None)
    net.check_ended()
    if num_lost < MAX_TURNS:
        assert {net.value(me) for me in rest} == {net.mean_of(*rest)}
        assert all(net.final(me).kept == "merged" for me in rest)
    else:
        assert {net.value(me) for me in rest} == {(net.start[me], net.samples[me]) for me in rest}
        assert all(net.final(me).kept == "own" for me in rest), "nobody hangs"


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_a_straggler_is_left_out_and_given_the_result(mode: str) -> None:
    net = Net(5, mode, seed=2)
    late, rest = net.peers[2], [peer for peer in net.peers if peer != net.peers[2]]
    net.slow = {late: 60.0}
    net.run()
    net.check_ended()
    assert {net.value(me) for me in rest} == {net.mean_of(*rest)}
    assert all(net.final(me).duration_s <= DEADLINE_S + 2 for me in rest)
    assert net.value(late) == net.mean_of(*rest)
    assert net.final(late).duration_s < DEADLINE_S
    assert not net.final_inputs[late]


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_a_node_that_comes_back_after_its_rounds_takes_the_result_of_the_others(mode: str) -> None:
    net = Net(5, mode, seed=4)
    back, rest = net.peers[1], [peer for peer in net.peers if peer != net.peers[1]]
    kill_at(net, back, lambda effect: isinstance(effect, Keep) and effect.ref.round == ROUNDS, "dead")
    net.run(until_s=100.0)
    assert net.kept[back].round == ROUNDS
    net.now = 100.0
    net.boot(back)
    for peer in rest:
        net.link(back, peer)
    net.run()
    net.check_ended()
    assert {net.value(me) for me in net.peers} == {net.mean_of(*rest)}
    assert not net.final_inputs[back]


def test_a_node_that_comes_back_alone_does_not_wait_for_ever_and_merges_only_once() -> None:
    net = Net(1, "butterfly")
    (me,) = net.peers
    net.kept[me] = replace(net.new(me, ROUNDS, (Fraction(1), net.samples[me])))
    net.boot(me)
    net.run()
    net.check_ended()
    assert net.final(me).duration_s == DEADLINE_S
    net.boot(me)
    assert net.cores[me].phase is Phase.DONE
    assert not net.of(me, FinalMergeDone), "its checkpoint says that it has it behind itself"


@pytest.mark.parametrize("chooses", ["own", "merged", "fail"])
def test_the_better_model_is_kept(chooses: str) -> None:
    net = Net(4, "butterfly", final_keep="better")
    net.chooses = chooses
    net.run()
    net.check_ended()
    for me in net.peers:
        own = (net.start[me], net.samples[me])
        assert net.value(me) == (net.mean_of(*net.peers) if chooses == "merged" else own)
        assert net.final(me).kept == ("merged" if chooses == "merged" else "own")
        assert net.final(me).merged == {"value": float(net.mean_of(*net.peers)[0])}


def test_the_merged_model_is_kept_unjudged_where_that_is_wanted() -> None:
    net = Net(4, "butterfly", final_keep="merged")
    net.chooses = "fail"
    net.run()
    net.check_ended()
    assert {net.value(me) for me in net.peers} == {net.mean_of(*net.peers)}
    assert {net.final(me).kept for me in net.peers} == {"merged"}


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
@pytest.mark.parametrize("seed", range(8))
def test_where_not_all_are_linked_everybody_ends_all_the_same(mode: str, seed: int) -> None:
    rng = random.Random(seed)
    peers = [PeerId(f"p{number}") for number in range(9)]
    ring = list(itertools.pairwise([*peers, peers[0]]))
    chords = [pair for pair in itertools.combinations(peers, 2) if rng.random() < 0.15 and pair not in ring]
    net = Net(9, mode, seed, links=[*ring, *(pair for pair in chords if pair[::-1] not in ring)])
    net.run()
    net.check_ended()


def test_rounds_do_not_wait_for_those_who_are_through_them() -> None:
    """A quorum of all would otherwise cost a deadline in each of the slow node's rounds."""
    net = Net(3, "butterfly", quorum=1, deadline_s=100.0)
    net.slow = {net.peers[0]: 12.0}
    net.run()
    net.check_ended()
    assert {net.value(me) for me in net.peers} == {net.mean_of(*net.peers)}
    assert net.final(net.peers[0]).duration_s < DEADLINE_S


def test_a_failed_merge_passes_over_what_came() -> None:
    net = Net(4, "butterfly", seed=1)
    bad, merge = net.peers[0], net.merge
    net.merge = lambda me, order: (  # type: ignore[method-assign]
        WorkFailed(order.token, "boom") if me == bad and order.rule == "final" else merge(me, order)
    )
    net.run()
    net.check_ended()
    assert net.value(bad) == (net.start[bad], net.samples[bad])
    assert net.final(bad).kept == "own"


# --- whose word for a result is taken -------------------------------------------------------------------
LIE: Mean = (Fraction(666), 1)


def parted_from_the_first(mode: str) -> Net:
    """Four nodes, all linked but for the first; it is through alone, and the second waits for the third and fourth."""
    peers = [PeerId(f"p{number}") for number in range(4)]
    net = Net(4, mode, links=list(itertools.combinations(peers[1:], 2)))
    net.slow = {peers[1]: 18, peers[2]: 28, peers[3]: 28}
    net.run(12.0)
    alone, early, *_ = peers
    assert (net.cores[alone].phase, net.cores[early].phase) == (Phase.DONE, Phase.FINAL)
    return net


def claim(net: Net, liar: PeerId, peer: PeerId, after_s: float = 0.0) -> None:
    """The liar tells this neighbour that it is past its session, and has the mean of all."""
    ref = net.new(liar, ROUNDS + 1, LIE)
    net.held[liar].add(ref.digest)
    net.later(after_s, peer, Received(liar, Heartbeat(ROUNDS + 1, False)))
    net.later(after_s, peer, Received(liar, Offer(ref)))


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("num_links", [1, 3])
@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_the_model_of_a_node_that_ended_alone_is_nobodys_result(
    mode: str, num_links: int, restarts: bool
) -> None:
    net = parted_from_the_first(mode)
    alone, *rest = net.peers
    if restarts:
        net.kill(alone)
        net.boot(alone)
        assert net.cores[alone].phase is Phase.DONE, "its checkpoint says that it has it behind itself"
    for peer in rest[:num_links]:
        net.link(alone, peer)
    net.run()
    assert net.value(alone) == (net.start[alone], net.samples[alone])
    assert {net.value(peer) for peer in rest} == {net.mean_of(*rest)}
    for peer in rest:
        assert (net.final(peer).kept, net.final(peer).num_members) == ("merged", 3)
        assert net.final(peer).duration_s < DEADLINE_S, "nobody waits for who is through"


@pytest.mark.parametrize("num_links", [1, 3])
@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_one_neighbours_result_takes_nobody_from_those_who_are_still_to_come(
    mode: str, num_links: int
) -> None:
    net = parted_from_the_first(mode)
    liar, *rest = net.peers
    for peer in rest[:num_links]:
        net.link(liar, peer)
        claim(net, liar, peer, 1.0)
    net.run()
    assert {net.value(peer) for peer in rest} == {net.mean_of(*rest)}


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_who_cannot_verify_a_result_keeps_it_to_itself(mode: str) -> None:
    """With nobody left to merge with it takes it, and whoever links up later has not got it from there."""
    net = Net(3, mode, links=[])
    liar, late, later = net.peers
    net.slow = {late: 18, later: 36}
    net.run(12.0)
    net.link(liar, late)
    claim(net, liar, late, 1.0)
    net.run(16.0)
    assert net.cores[late].phase is Phase.DONE
    assert net.value(late) == LIE
    assert (net.final(late).num_members, net.final(late).kept) == (1, "merged")
    net.link(late, later)
    net.run()
    assert net.value(later) == (net.start[later], net.samples[later])
    assert net.final(later).duration_s == DEADLINE_S


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_a_members_result_is_taken_by_nobody_whose_plan_has_it_come_from_another(
    mode: str, place: int
) -> None:
    net = Net(6, mode)
    order = in_order(net.peers, "net")
    liar, rest = order[place], [peer for peer in net.peers if peer != order[place]]
    told: list[PeerId] = []

    def watch(me: PeerId, effect: object) -> None:
        begun = (
            isinstance(effect, Send)
            and isinstance(effect.message, Offer)
            and effect.message.ref.round > ROUNDS
        )
        if begun and not told:
            told.extend(rest)
            for peer in rest:
                claim(net, liar, peer, 0.001)

    net.watch = watch
    net.run()
    assert told
    assert all(core.phase is Phase.DONE for core in net.cores.values())
    plan = butterfly if mode == "butterfly" else lambda members, me: aggregator(members, me, 0)
    trusting = {
        peer
        for peer in rest
        if any(stage.takes_result and liar in stage.receive_from for stage in plan(order, peer))
    }
    assert len(trusting) == (5 * (place == 0) if mode == "aggregator" else place < 2)
    assert {peer for peer in rest if net.value(peer) == LIE} <= trusting
    for peer in rest:
        assert peer in trusting or net.final(peer).num_samples > LIE[1]


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_stragglers_take_the_result_of_the_many_and_do_not_make_one_of_their_own(mode: str) -> None:
    net = Net(6, mode, seed=5)
    late, rest = net.peers[:2], net.peers[2:]
    net.slow = {late[0]: 60.0, late[1]: 70.0}
    net.run()
    net.check_ended()
    assert {net.value(me) for me in net.peers} == {net.mean_of(*rest)}
    assert not any(net.final_inputs[me] for me in late)


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
def test_as_many_as_are_through_merge_among_themselves(mode: str) -> None:
    net = Net(6, mode, seed=5)
    late, rest = net.peers[:3], net.peers[3:]
    net.slow = dict.fromkeys(late, 60.0)
    net.run()
    net.check_ended()
    assert {net.value(me) for me in rest} == {net.mean_of(*rest)}
    assert {net.value(me) for me in late} == {net.mean_of(*late)}


def test_a_node_that_kept_its_own_model_offers_no_result() -> None:
    net = Net(4, "butterfly", final_keep="better")
    net.chooses = "own"
    net.run()
    for me in net.peers:
        core = net.cores[me]
        assert core.view.round == ROUNDS + 1, "it has been in a session"
        assert core.exchange._offered[-1] == replace(core.model, round=ROUNDS)


def test_the_checkers_see_a_result_that_was_not_merged() -> None:
    def lie(core: NodeCore, event: Event, effects: list) -> list:
        sent = [
            effect for effect in effects if isinstance(effect, Send) and isinstance(effect.message, Offer)
        ]
        return effects + [
            replace(effect, message=Offer(replace(effect.message.ref, round=4))) for effect in sent
        ]

    with pytest.raises(Violation) as caught:
        Arena(seed=1, make=breaking(lie, 0), rounds=3, final_merge="butterfly", final_deadline_s=4.0).run()
    assert caught.value.rule == "final", str(caught.value)
