"""Decentralised sampling: rounds that go on, whoever falls silent, and what a liar can do about it.

Whole cores on a heap (`sampled_network.py`). Numbers in the docstrings of papers: arXiv 2302.13837.
"""

import hashlib
import random
from collections import Counter
from itertools import pairwise
from statistics import median

import pytest
import torch
from msgspec.structs import replace

from aggregation.base import Contribution
from aggregation.weighting import fedavg
from protocols.codec import encode, link_decoder
from protocols.errors import PeerError
from protocols.events import Received, Send, Train
from protocols.messages import (
    AggregatedModel,
    Census,
    Closed,
    Heartbeat,
    LinkMessage,
    Offer,
    Peers,
    Pong,
    TrainedModel,
)
from protocols.vocabulary import MAX_ROUND, ModelRef, PeerId, Reason
from tests.protocols.identities import signed_record
from tests.protocols.sampled_network import START, Model, Node, SampledNetwork, address

DIGEST = hashlib.sha256(b"no model").digest()


def trained_rounds(net: SampledNetwork) -> Counter[int]:
    return Counter(round_ for node in net.nodes.values() for round_ in node.trained)


def some(net: SampledNetwork, *excluding: str) -> Node:
    return next(node for node in net.up() if node.peer not in excluding)


# --- rounds ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["beacon", "md5"])
def test_rounds_follow_each_other(order: str) -> None:
    """Each has one aggregate and a sample that trains, everybody ends with the last one, and nothing is left over."""
    net = SampledNetwork(12, seed=1, order=order)
    assert net.run_to_end()
    assert {round_: len(digests) for round_, digests in net.aggregates.items()} == dict.fromkeys(
        range(2, 11), 1
    )
    # A link may end between the question whether somebody is there and the model.
    assert set(trained_rounds(net).values()) <= {3, 4}
    assert list(trained_rounds(net).values()).count(4) >= 8
    assert len({node.model.digest for node in net.up()}) == 1
    assert some(net).model.round == 11
    net.check_pedigrees()
    net.check_idle()


def test_a_round_is_made_once_at_an_aggregator_and_trained_once_at_a_node() -> None:
    for seed in range(4):
        net = SampledNetwork(10, seed, aggregators=2, success_fraction=0.5)
        net.nodes[PeerId("n3")].slow = 4
        assert net.run_to_end(), seed
        for node in net.nodes.values():
            made = [round_ for _, round_, _ in node.made]
            assert len(made) == len(set(made)), f"seed {seed}"
            assert len(node.trained) == len(set(node.trained)), f"seed {seed}"


@pytest.mark.parametrize("aggregators", [2, 3])
def test_without_failures_all_aggregators_make_the_same(aggregators: int) -> None:
    net = SampledNetwork(12, seed=2, aggregators=aggregators, success_fraction=1.0)
    assert net.run_to_end()
    made: dict[int, list[Model]] = {}
    for node in net.nodes.values():
        for _, round_, model in node.made:
            made.setdefault(round_, []).append(model)
    for round_ in range(3, 12):  # who begins the first round may not know the same nodes
        assert len(made[round_]) == aggregators
        assert len(set(made[round_])) == 1, f"round {round_}"
        assert len(made[round_][0].parents) == net.settings.sample_size
    assert not any(node.penalties for node in net.nodes.values())
    net.check_idle()


def test_the_slowest_are_not_waited_for_and_what_comes_late_is_not_averaged() -> None:
    """sf = 0.5 of 4: two make an aggregate. One that takes several times as long never holds a round up."""
    net = SampledNetwork(8, seed=3, success_fraction=0.5, rounds=25, aggregators=1)
    slow = net.nodes[PeerId("n5")]
    slow.slow = 4  # 2 s
    late: list[int] = []

    def watch(node: Node, effect: object) -> None:
        if isinstance(effect, Send) and effect.peer == slow.peer and isinstance(effect.message, Closed):
            late.append(effect.message.round)

    net.watch = watch
    assert net.run_to_end()
    first = {round_: min(digests.values()) for round_, digests in net.aggregates.items()}
    gaps = [first[round_ + 1] - first[round_] for round_ in range(2, 25)]
    assert max(gaps) < 5
    assert slow.trained
    assert late
    net.check_pedigrees()
    net.check_idle()


def test_a_success_fraction_is_of_the_sample() -> None:
    net = SampledNetwork(12, seed=4, sample_size=5, success_fraction=0.8)
    assert net.run_to_end()
    merged = [
        len(model.parents) for node in net.nodes.values() for _, round_, model in node.made if round_ > 2
    ]
    assert set(merged) <= {4, 5}
    assert merged.count(4) > len(merged) / 2


def test_a_pause_keeps_aggregates_apart() -> None:
    net = SampledNetwork(6, seed=5, pause_s=3.0, rounds=6)
    assert net.run_to_end()
    times = sorted(min(digests.values()) for digests in net.aggregates.values())
    assert all(later - earlier > 2.9 for earlier, later in pairwise(times))


# --- the same as FedAvg ---------------------------------------------------------------------------------
def local_step(params: torch.Tensor, peer: str, round_: int) -> torch.Tensor:
    """Some steps on this peer's data, in float32."""
    seed = int.from_bytes(hashlib.sha256(f"{peer} {round_}".encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        params = params - 0.1 * (torch.tanh(params) - torch.randn(params.shape, generator=generator))
    return params


def merged(models: list[torch.Tensor]) -> torch.Tensor:
    own, *others = ({"w": each} for each in models)
    rule = fedavg()
    (out,), _ = rule.update([Contribution(each) for each in others], rule.init(own), Contribution(own))
    return out.params["w"]


def test_where_all_take_part_it_is_fedavg_to_the_bit() -> None:
    """s = n, a = 1, sf = 1: the last aggregate is what a server's loop over all clients makes, in the order of their ids."""
    num, rounds = 6, 8
    net = SampledNetwork(
        num, seed=6, sample_size=num, success_fraction=1.0, rounds=rounds, wait_for_members=num
    )
    assert net.run_to_end()
    first = torch.linspace(-1, 1, 257)
    values: dict[Model, torch.Tensor] = {START: first}

    def value(model: Model) -> torch.Tensor:
        if model not in values:
            inputs = [value(parent) for parent in model.parents]
            values[model] = (
                merged(inputs) if model.kind == "mean" else local_step(inputs[0], model.peer, model.round)
            )
        return values[model]

    server = exact = first
    for round_ in range(1, rounds + 1):
        clients = [local_step(server, peer, round_) for peer in sorted(net.nodes)]
        server = merged(clients)
        exact = (
            torch.stack([local_step(exact, peer, round_) for peer in sorted(net.nodes)])
            .double()
            .mean(0)
            .float()
        )
    assert torch.equal(value(some(net).model), server)
    assert torch.allclose(server, exact, atol=1e-5)
    assert not torch.equal(server, merged([local_step(first, peer, 1) for peer in sorted(net.nodes)]))


# --- failures -------------------------------------------------------------------------------------------
def silence_most(
    seed: int, num: int = 60, share: float = 0.8, **sampled: object
) -> tuple[SampledNetwork, float]:
    """At some moment of a round so many machines hang. The time from there to the next aggregate."""
    net = SampledNetwork(
        num, seed, sample_size=6, rounds=0, wait_for_members=num * 3 // 4, deadline_s=10.0, **sampled
    )
    assert net.run_to_round(5, 60)
    rng = random.Random(seed)
    net.run(net.now + rng.uniform(0, 1.2))
    before, at = max(net.aggregates), net.now
    for name in rng.sample(sorted(net.nodes), round(num * share)):
        net.silence(net.nodes[name])
    assert net.run_to_round(before + 1, at + 200), f"seed {seed}: no round went on"
    return net, net.now - at


def test_with_four_in_five_silent_rounds_go_on() -> None:
    """Out of 60 nodes 48 hang: the next aggregate comes within a deadline in most runs, and five more follow.

    Of 20 seeds 17 stay within the deadline of 10 s, the others within 1.4 of it: there the sample and its aggregator are gone
    to the last node, and the rest waits a deadline before it begins anew.
    """
    waits = []
    for seed in range(4):
        net, wait = silence_most(seed)
        waits.append(wait)
        there = max(net.aggregates)
        assert net.run_to_round(there + 5, net.now + 30), f"seed {seed}"
    assert median(waits) <= net.settings.deadline_s, waits
    assert max(waits) <= 2 * net.settings.deadline_s, waits


def test_a_network_whose_whole_sample_vanishes_goes_on() -> None:
    """All that train and all that aggregate, at once: whoever has the latest model begins the next round."""
    for seed in range(5):
        net = SampledNetwork(12, seed, rounds=0)
        assert net.run_to_round(5, 60)
        net.run(net.now + 0.3)
        busy = [node for node in net.up() if node.sampling._busy()]
        assert busy
        for node in busy:
            net.crash(node)
        there = max(net.aggregates)
        assert net.run_to_round(there + 4, net.now + 4 * net.settings.deadline_s), f"seed {seed}"


def aggregators(net: SampledNetwork) -> list[Node]:
    return [node for node in net.up() if node.sampling._collects]


@pytest.mark.parametrize("how", ["crash", "silence"])
@pytest.mark.parametrize("when", ["collecting", "made"])
def test_an_aggregator_dies(how: str, when: str) -> None:
    """After it has some models, or right after its aggregate: those who trained give their models to the next in order."""
    for seed in range(3):
        net = SampledNetwork(10, seed, rounds=0)
        assert net.run_to_round(4, 60)
        there = max(net.aggregates)

        def ripe() -> bool:
            collects = [each for node in aggregators(net) for each in node.sampling._collects.values()]  # noqa: B023
            if when == "made":
                return max(net.aggregates) > there  # noqa: B023
            return any(each.models and not each.token for each in collects)

        assert net.run(net.now + 30, ripe)
        victims = aggregators(net) or [
            node for node in net.up() if node.made and node.made[-1][1] == max(net.aggregates)
        ]
        assert victims
        for victim in victims:
            (net.crash if how == "crash" else net.silence)(victim)
        assert net.run_to_round(there + 5, net.now + 5 * net.settings.deadline_s), f"seed {seed}"
        net.check_pedigrees()


def test_an_aggregate_that_only_its_maker_has_is_lost_and_the_round_is_made_again() -> None:
    """It tells those who trained that the round is closed, and dies before anybody has the model."""
    net = SampledNetwork(10, seed=1, rounds=0)
    assert net.run_to_round(4, 60)
    closed: list[Node] = []
    net.watch = lambda node, effect: (
        closed.append(node) if isinstance(effect, Send) and isinstance(effect.message, Closed) else None
    )
    assert net.run(net.now + 20, lambda: bool(closed))
    there = max(net.aggregates)
    net.crash(closed[0])
    assert net.run_to_round(there + 3, net.now + 6 * net.settings.deadline_s)


@pytest.mark.parametrize("how", ["crash", "silence"])
def test_a_participant_dies_in_training(how: str) -> None:
    """It is found gone, and not waited for: well before the deadline."""
    for seed in range(3):
        net = SampledNetwork(10, seed, rounds=0, success_fraction=1.0, deadline_s=20.0)
        assert net.run_to_round(4, 60)
        there = max(net.aggregates)
        for node in net.nodes.values():
            node.slow = 4  # 2 s
        assert net.run(net.now + 20, lambda: any(n.trained and n.trained[-1] == there for n in net.up()))  # noqa: B023
        net.run(net.now + 0.5)  # now others have the model too
        makers = {n.peer for n in net.up() if n.made and n.made[-1][1] == there}
        victim = next(n for n in net.up() if n.peer not in makers and n.trained and n.trained[-1] == there)
        (net.crash if how == "crash" else net.silence)(victim)
        at = net.now
        assert net.run_to_round(there + 1, at + 100)
        assert net.now - at < net.settings.deadline_s, f"seed {seed}"


def test_one_message_in_twenty_is_lost() -> None:
    for seed in range(4):
        net = SampledNetwork(10, seed, rounds=12)
        net.loss = 0.05
        assert net.run_to_round(10, 400), f"seed {seed}"
        net.loss = 0.0
        assert net.run_to_end(net.now + 300), f"seed {seed}"
        net.check_pedigrees()
        net.check_idle()


def test_all_are_restarted_from_their_checkpoints() -> None:
    for seed in range(3):
        net = SampledNetwork(10, seed, rounds=20)
        assert net.run_to_round(8, 60)
        for node in list(net.nodes.values()):
            net.crash(node)
        net.run(net.now + 5)
        for node in list(net.nodes.values()):
            net.start(node)
        assert net.run_to_end(net.now + 300), f"seed {seed}"
        best = max(net.aggregates)
        assert best == 20
        assert some(net).model.round == 21
        net.check_pedigrees()
        net.check_idle()


# --- coming and going -----------------------------------------------------------------------------------
def test_a_late_joiner_has_the_newest_model_and_is_drawn() -> None:
    """It is drawn once in n / s rounds: within eight times that the chance to miss it is one in three thousand."""
    for seed in range(3):
        net = SampledNetwork(12, seed, rounds=0)
        assert net.run_to_round(6, 60)
        joiner = net.add("late")
        there = max(net.aggregates)
        net.run(net.now + 3)
        assert joiner.model.round >= there - 1, f"seed {seed}"
        assert net.run(net.now + 200, lambda joiner=joiner: bool(joiner.trained)), f"seed {seed}"
        assert joiner.trained[0] <= there + 3 + 8 * 13 / 4, f"seed {seed}: drawn in round {joiner.trained[0]}"
        assert net.run(
            net.now + 100,
            lambda net=net: any(
                "late" in {p.peer for p in m.parents} for n in net.up() for _, _, m in n.made
            ),
        )


def test_all_get_to_know_a_joiner() -> None:
    """Also those who were busy when it came, and have not been drawn since."""
    net = SampledNetwork(30, seed=2, rounds=0)
    assert net.run_to_round(4, 60)
    net.add("late")
    net.run(net.now + 25)
    ignorant = [
        node.peer
        for node in net.up()
        if "late" not in node.sampling.population.active(net.up()[0].sampling.round)
    ]
    assert not ignorant


def test_a_leaver_is_not_drawn() -> None:
    net = SampledNetwork(10, seed=3, rounds=0)
    assert net.run_to_round(4, 60)
    leaver = some(net, "n0", "n1")
    net.leave(leaver)
    net.run(net.now + 4)
    assert leaver.halted
    for node in net.up():
        assert leaver.peer not in node.sampling.population.active(node.sampling.round)
    asked: list[object] = []
    net.watch = lambda node, effect: asked.append(effect) if address(leaver.peer) in str(effect) else None
    assert net.run_to_round(max(net.aggregates) + 10, net.now + 60)
    drawn = [
        effect for effect in asked if isinstance(effect, Send) and isinstance(effect.message, AggregatedModel)
    ]
    assert not drawn


def test_who_left_can_come_back() -> None:
    net = SampledNetwork(8, seed=4, rounds=0)
    assert net.run_to_round(4, 60)
    node = some(net, "n0", "n1")
    net.leave(node)
    net.run(net.now + 5)
    net.start(node)
    net.run(net.now + 10)
    for other in net.up():
        assert node.peer in other.sampling.population.active(other.sampling.round)
    begun = len(node.trained)
    assert net.run(net.now + 60, lambda: len(node.trained) > begun)


def test_two_halves_go_on_apart_and_then_as_one() -> None:
    """The half with the higher round wins; what the other learnt alone is lost."""
    for seed in range(2):
        net = SampledNetwork(16, seed, rounds=0, window=100)
        assert net.run_to_round(4, 60)
        halves = [[f"n{i}" for i in range(0, 16, 2)], [f"n{i}" for i in range(1, 16, 2)]]
        for name in halves[1]:
            net.nodes[PeerId(name)].slow = 2
        net.cut(halves)

        def front(half: list[str]) -> int:
            return max(net.nodes[PeerId(name)].sampling.own.round for name in half)  # type: ignore[union-attr]  # noqa: B023

        assert net.run(net.now + 200, lambda: min(map(front, halves)) >= 24), f"seed {seed}"  # noqa: B023
        assert front(halves[0]) > front(halves[1])
        net.heal()
        net.run(net.now + 40)
        healed = max(net.aggregates)
        assert net.run_to_round(healed + 20, net.now + 100)
        # One chain: in the later rounds one aggregate each, and trainers of both halves in it.
        later = [len(net.aggregates[round_]) for round_ in range(healed + 2, healed + 20)]
        assert later.count(1) >= len(later) - 1, f"seed {seed}: {later}"
        peers = {p.peer for n in net.up() for _, r, m in n.made if r > healed for p in m.parents}
        assert all(peers & {*half} for half in halves), f"seed {seed}"


# --- hostile --------------------------------------------------------------------------------------------
def under_way(seed: int = 1, num: int = 8, **sampled: object) -> SampledNetwork:
    net = SampledNetwork(num, seed, rounds=0, degree=5, **sampled)
    assert net.run_to_round(4, 60)
    return net


def goes_on(net: SampledNetwork, rounds: int = 5, within_s: float = 60.0) -> None:
    there = max(round_ for round_ in net.aggregates if round_ < 1_000)
    assert net.run(
        net.now + within_s, lambda: any(there + rounds <= each < 1_000 for each in net.aggregates)
    ), f"seed {net.seed}: rounds stand still"


def evil_neighbours(net: SampledNetwork, num: int) -> tuple[list[Node], Node]:
    """So many nodes and one with a link to all of them, and to as many others."""
    for victim in net.up():
        peers = [peer for peer in net.nodes if victim.core.view.is_neighbour(peer)]  # type: ignore[union-attr]
        if len(peers) >= num + 3:
            return [net.nodes[peer] for peer in peers[:num]], victim
    raise AssertionError("nobody has so many neighbours")


LEAP = 2**47
REF = ModelRef(DIGEST, 100, LEAP, 1)


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize(
    ("message", "counted"),
    [
        (Heartbeat(LEAP, True), False),
        (Pong(1, LEAP), False),
        (Offer(REF), False),
        (TrainedModel(REF, DIGEST, DIGEST, ("n1",)), True),
        (AggregatedModel(REF, DIGEST, ("n1",)), True),
        (Closed(LEAP), False),
    ],
)
def test_a_leap_in_a_round_number_changes_nothing(message: LinkMessage, counted: bool, num: int) -> None:
    net = under_way()
    liars, victim = evil_neighbours(net, num)
    for liar in liars:
        net.say(liar.peer, victim.peer, message)
    round_, penalties = victim.sampling.round, victim.penalties[Reason.LEAP]
    fetches = victim.fetches
    net.run(net.now + 0.03)
    assert victim.sampling.round <= round_ + 2
    assert victim.penalties[Reason.LEAP] == penalties + num * counted
    assert all(each < LEAP for each in victim.sampling._collects)
    assert victim.fetches <= fetches + 6
    goes_on(net)
    assert max(node.sampling.round for node in net.up()) < 1_000


def test_a_record_that_leaps_is_not_taken_in() -> None:
    """Who signs that it was alive in a round to come would be drawn for ever."""
    net = under_way()
    (liar,), victim = evil_neighbours(net, 1)
    forged_life = signed_record("ghost", address("ghost"), round=LEAP)
    net.say(liar.peer, victim.peer, Peers((forged_life,)))
    net.run(net.now + 10)
    assert all(node.sampling.population.get(PeerId("ghost")) is None for node in net.up())
    goes_on(net)


@pytest.mark.parametrize(
    "message",
    [
        Heartbeat(2**60, True),
        Closed(2**60),
        Offer(replace(REF, round=2**60)),
        TrainedModel(replace(REF, round=2**60), DIGEST, DIGEST, ()),
        AggregatedModel(replace(REF, round=2**60), DIGEST, ()),
        Peers((signed_record("x", round=2**60),)),
    ],
)
def test_a_round_of_2_to_the_60_is_no_message_at_all(message: LinkMessage) -> None:
    with pytest.raises(PeerError) as refused:
        list(link_decoder().feed(encode(message)))
    assert refused.value.reason is Reason.MALFORMED


def test_small_leaps_of_one_neighbour_stop_nothing() -> None:
    """Each number is a little ahead, so each is believed; whoever works on a round goes on with it all the same."""
    net = under_way(seed=3, num=8)
    (liar,), _ = evil_neighbours(net, 1)
    for _ in range(200):
        for victim in net.up():
            ahead = Heartbeat(min(victim.sampling.round + 3, MAX_ROUND), True)
            net.say(liar.peer, victim.peer, ahead)
        net.run(net.now + 0.1)
    there = [round_ for round_, digests in net.aggregates.items() if max(digests.values()) > net.now - 20]
    assert len(there) >= 10


@pytest.mark.parametrize("signer", ["liar", "n0"])
def test_nobody_can_say_that_another_leaves(signer: str) -> None:
    net = under_way()
    liars, victim = evil_neighbours(net, 1)
    forged = signed_record("n1", incarnation=2**40, left=True, signer=signer)
    net.say(liars[0].peer, victim.peer, Peers((forged,)))
    net.run(net.now + 5)
    assert all("n1" in node.sampling.population.active(node.sampling.round) for node in net.up())
    assert victim.penalties[Reason.FORGED] == 1
    goes_on(net)


def test_a_population_of_invented_peers_slows_rounds_and_stops_none() -> None:
    """2,000 keys that nobody answers for, against eight nodes: bounded, and rounds go on."""
    net = under_way(num=8, max_members=500, deadline_s=20.0, aggregators=1)
    (liar,), victim = evil_neighbours(net, 1)
    ghosts = [
        signed_record(f"ghost{i}", address(f"ghost{i}"), round=net.up()[0].sampling.round)
        for i in range(2_000)
    ]
    for start in range(0, 2_000, 16):
        net.say(liar.peer, victim.peer, Peers(tuple(ghosts[start : start + 16])))
    net.run(net.now + 5)
    sizes = [len(node.sampling.population) for node in net.up()]
    assert max(sizes) <= 500
    assert max(sizes) >= 100
    goes_on(net, rounds=3, within_s=250)


def test_a_population_of_ghosts_keeps_all_that_were_there() -> None:
    net = under_way(num=8, max_members=64)
    (liar,), victim = evil_neighbours(net, 1)
    for i in range(200):
        ghost = signed_record(f"ghost{i}", address(f"ghost{i}"), round=net.up()[0].sampling.round)
        net.say(liar.peer, victim.peer, Peers((ghost,)))
    net.run(net.now + 10)
    for node in net.up():
        assert len(node.sampling.population) <= 64
        assert {*net.nodes} <= {*node.sampling.population.active(node.sampling.round)}


def test_a_flood_of_censuses_is_answered_once() -> None:
    """Each asks for all that is known of everybody."""
    net = under_way(num=20)
    (liar,), victim = evil_neighbours(net, 1)
    before = net.sent["peers"]
    for _ in range(300):
        net.say(liar.peer, victim.peer, Census(bytes(256), False))
    net.run(net.now + 0.5)
    assert net.sent["peers"] - before < 30
    goes_on(net)


def test_a_flood_of_models_takes_no_room() -> None:
    """One peer names a thousand models for a hundred rounds to come, and a thousand who are said to train."""
    net = under_way(seed=2)
    (liar,), victim = evil_neighbours(net, 1)
    for i in range(1_000):
        ref = ModelRef(hashlib.sha256(f"{i}".encode()).digest(), 100, victim.sampling.round + 1 + i % 90, 1)
        ghosts = tuple(f"ghost{i}-{j}" for j in range(20))
        net.say(liar.peer, victim.peer, TrainedModel(ref, DIGEST, DIGEST, ghosts))
        if i % 100 == 99:
            net.run(net.now + 0.1)
            sampling = victim.sampling
            assert len(sampling._collects) <= 4
            assert all(
                len(each.expected) <= 2 * net.settings.sample_size + net.settings.sample_size
                for each in sampling._collects.values()
            )
            assert len(sampling._asking.calls) < 20
            assert len(victim.core.exchange._waiting) <= 8  # type: ignore[union-attr]
    goes_on(net)
    net.run(net.now + 4 * net.settings.deadline_s)
    assert len(victim.core.exchange._held) < 40  # type: ignore[union-attr]
    assert len(victim.sampling._timers.due) < 100


def test_a_round_that_is_under_way_is_not_displaced_by_names_of_others() -> None:
    net = under_way(seed=4, sample_size=6)
    for node in net.nodes.values():
        node.slow = 3
    assert net.run(
        net.now + 60,
        lambda: any(
            each.models and not each.token
            for node in aggregators(net)
            for each in node.sampling._collects.values()
        ),
    )
    victim = next(n for n in aggregators(net) if any(c.models for c in n.sampling._collects.values()))
    round_ = next(r for r, c in victim.sampling._collects.items() if c.models)
    liar = next(node for node in net.up() if victim.core.view.is_live(node.peer))  # type: ignore[union-attr]
    for i in range(20):
        ref = ModelRef(hashlib.sha256(f"{i}".encode()).digest(), 100, round_ + 1 + i, 1)
        net.say(liar.peer, victim.peer, TrainedModel(ref, DIGEST, DIGEST, ()))
    net.run(net.now + 0.05)
    assert round_ in victim.sampling._collects or round_ in net.aggregates


def test_a_model_that_is_too_large_is_refused() -> None:
    net = under_way()
    (liar,), victim = evil_neighbours(net, 1)
    large = ModelRef(DIGEST, 1_001, victim.sampling.round + 1, 1)
    net.say(liar.peer, victim.peer, TrainedModel(large, DIGEST, DIGEST, ()))
    net.say(
        liar.peer, victim.peer, AggregatedModel(replace(large, round=victim.sampling.round + 5), DIGEST, ())
    )
    net.run(net.now + 0.1)
    assert victim.penalties[Reason.TOO_LARGE] == 2
    goes_on(net)


def test_models_that_never_come_are_not_waited_for() -> None:
    """Names of bytes that nobody has, to everybody, in every round."""
    net = under_way(seed=5)
    (liar,), _ = evil_neighbours(net, 1)
    for i in range(40):
        for victim in net.up():
            ref = ModelRef(hashlib.sha256(f"{i}".encode()).digest(), 100, victim.sampling.round + 1, 1)
            net.say(liar.peer, victim.peer, TrainedModel(ref, DIGEST, DIGEST, (liar.peer,)))
            net.say(liar.peer, victim.peer, AggregatedModel(ref, DIGEST, (victim.peer,)))
        net.run(net.now + 0.5)
    goes_on(net, within_s=120)


@pytest.mark.parametrize("ahead", [1, 2, 9, 90])
def test_models_of_rounds_to_come_that_never_come_stop_nothing(ahead: int) -> None:
    """One neighbour of all says again and again what a round near or far begins with. The true claims are fetched beside."""
    net = under_way(seed=6)
    (liar,), _ = evil_neighbours(net, 1)
    for node in net.up():
        net.dial(liar.peer, node.peer)
    began, at = max(net.aggregates), net.now
    for i in range(100):
        for victim in net.up():
            digest = hashlib.sha256(f"{i}".encode()).digest()
            ref = ModelRef(digest, 100, victim.sampling.round + ahead, 1)
            net.say(liar.peer, victim.peer, AggregatedModel(ref, DIGEST, (victim.peer,)))
        net.run(net.now + 0.2)
    assert len([each for each in net.aggregates if began < each < began + 80]) >= 10, net.aggregates.keys()
    assert net.now - at < 21
    assert all(len(node.sampling._claims) < 10 for node in net.up())


def test_a_digest_that_a_liar_names_first_is_fetched_from_who_has_it() -> None:
    """It says that it has the aggregate before its maker does, and has nothing."""
    net = under_way(seed=7)
    (liar,), _ = evil_neighbours(net, 1)
    for node in net.up():
        net.dial(liar.peer, node.peer)
    net.run(net.now + 0.1)

    def tamper(me: PeerId, peer: PeerId, message: LinkMessage) -> LinkMessage:
        if isinstance(message, AggregatedModel) and liar.peer not in (me, peer):
            net.say(liar.peer, peer, message)
        return message

    net.tamper = tamper
    goes_on(net, rounds=8, within_s=30)


def test_an_aggregator_that_lies_is_outvoted_and_counted() -> None:
    """Of three, one hands out another model: it is taken by nobody."""
    net = SampledNetwork(10, seed=3, aggregators=3, success_fraction=1.0, rounds=12)
    liar = net.nodes[PeerId("n4")]
    lies: set[int] = set()

    def tamper(me: PeerId, peer: PeerId, message: LinkMessage) -> LinkMessage:
        if me == liar.peer and isinstance(message, AggregatedModel) and message.ref.round > 3:
            lies.add(message.ref.round)
            return replace(message, ref=replace(message.ref, digest=bad.digest), beacon=bytes(32))
        return message

    bad = START
    net.tamper = tamper
    net.watch = lambda node, effect: liar.blobs.setdefault(START.digest, START)  # type: ignore[func-returns-value]
    assert net.run_to_end(400)
    assert lies
    counted = sum(node.penalties[Reason.DISAGREES] for node in net.nodes.values())
    assert counted >= len(lies)
    for node in net.nodes.values():
        for _, round_, model in node.made:
            if round_ > 4 and node is not liar:
                assert all(parent.parents[0] != START for parent in model.parents), f"round {round_}"


def test_what_most_say_is_the_beacon() -> None:
    """One trainer of four names another digest to steer who is drawn the round after next: nobody follows."""
    seen: list[tuple[bytes, int]] = []
    net = SampledNetwork(8, seed=4, success_fraction=1.0, rounds=10)
    low = bytes(31) + b"\1"

    def tamper(me: PeerId, peer: PeerId, message: LinkMessage) -> LinkMessage:
        if me == "n3" and isinstance(message, TrainedModel):
            return replace(message, heard=low)
        if isinstance(message, AggregatedModel):
            seen.append((message.beacon, message.ref.round))
        return message

    net.tamper = tamper
    assert net.run_to_end()
    assert any("n3" in {parent.peer for parent in model.parents} for n in net.up() for _, _, model in n.made)
    assert all(beacon != low for beacon, _ in seen)


def test_a_peer_that_was_not_let_in_is_not_heard() -> None:
    """Before its hello is accepted nothing that it says counts: not a number, not a model."""
    net = under_way()
    victim = some(net)
    core = victim.core
    assert core is not None
    sampling, stranger = victim.sampling, PeerId("stranger")
    before = sampling.round
    ref = ModelRef(START.digest, 100, before + 1, 1)
    for message in (
        Heartbeat(before + 9, True),
        Offer(replace(ref, round=before + 9)),
        TrainedModel(ref, DIGEST, DIGEST, ("stranger",)),
        AggregatedModel(replace(ref, digest=sampling.own.digest), DIGEST, ("stranger",)),  # type: ignore[union-attr]
        Census(bytes(256), False),
    ):
        effects = core.step(net.now, Received(stranger, message))
        assert not [effect for effect in effects if isinstance(effect, (Send, Train))]
    assert sampling.round == before
    assert before + 1 not in sampling._collects or stranger not in sampling._collects[before + 1].coming


def test_a_pong_of_another_peer_does_not_take_an_answer_away() -> None:
    """Tokens are small numbers: anybody can say all of them."""
    net = under_way(seed=6)
    (liar,), _ = evil_neighbours(net, 1)
    for node in net.up():
        net.dial(liar.peer, node.peer)
    there = max(net.aggregates)
    for _ in range(150):
        for victim in net.up():
            for token in range(victim.sampling._timers._token - 9, victim.sampling._timers._token + 3):
                net.say(liar.peer, victim.peer, Pong(token, 0))
        net.run(net.now + 0.02)
    assert max(net.aggregates) >= there + 2
    assert not [peer for node in net.up() for peer in node.sampling._asking.failed]


def test_no_round_comes_after_the_last() -> None:
    net = SampledNetwork(8, seed=7, rounds=20)
    assert net.run_to_round(10, 60)
    (liar,), victim = [some(net)], net.up()[3]
    net.dial(liar.peer, victim.peer)
    net.run(net.now + 0.1)
    liar.blobs[START.digest] = START
    for round_ in (22, 30, 100):
        net.say(liar.peer, victim.peer, AggregatedModel(ModelRef(START.digest, 100, round_, 1), DIGEST, ()))
        net.say(
            liar.peer, victim.peer, TrainedModel(ModelRef(START.digest, 100, round_, 1), DIGEST, DIGEST, ())
        )
        net.say(liar.peer, victim.peer, Offer(ModelRef(START.digest, 100, round_, 1)))
    net.run(net.now + 0.5)
    assert victim.penalties[Reason.LEAP] == 6
    assert not victim.done
    assert net.run_to_end()
    assert some(net).model.round == 21


# --- everything at once ---------------------------------------------------------------------------------
def storm(seed: int) -> SampledNetwork:
    """A small network with settings, and with a series of mishaps, that the seed draws; all of it ends."""
    rng = random.Random(seed)
    net = SampledNetwork(
        rng.randint(4, 9),
        seed,
        rounds=rng.choice([10, 15]),
        sample_size=rng.choice([2, 4, 6]),
        aggregators=rng.choice([1, 1, 2, 3]),
        success_fraction=rng.choice([0.5, 0.8, 1.0]),
        at_least=rng.choice([1, 3]),
        pause_s=rng.choice([0, 0, 1.0]),
        window=rng.choice([4, 10, 100]),
        follow_every=rng.choice([0, 5]),
        order=rng.choice(["beacon", "md5"]),
    )
    net.loss = rng.choice([0, 0, 0.02, 0.05])
    for node in net.nodes.values():
        node.slow = rng.choice([1, 1, 1, 3, 8])
    for _ in range(rng.randint(1, 10)):
        net.run(net.now + rng.uniform(0.3, 4))
        mishap(net, rng)
    net.loss = 0.0
    for node in net.nodes.values():
        if not node.is_up and not node.halted and rng.random() < 0.5:
            net.revive(node)
    return net


def mishap(net: SampledNetwork, rng: random.Random) -> None:
    node = rng.choice(list(net.nodes.values()))
    spare = node.is_up and len(net.up()) > 3
    match rng.choice(
        ["crash", "silence", "restart", "crash", "silence", "restart", "leave", "join", "cut", "all"]
    ):
        case "crash" if spare:
            net.crash(node)
        case "silence" if spare:
            net.silence(node)
        case "leave" if spare:
            net.leave(node)
        case "restart":
            net.revive(node)
        case "join":
            net.add(f"n{len(net.nodes)}")
        case "cut":
            half = rng.sample(sorted(net.nodes), len(net.nodes) // 2)
            net.cut([half, [name for name in net.nodes if name not in half]])
            net.run(net.now + rng.uniform(2, 20))
            net.heal()
        case "all" if rng.random() < 0.5:
            for each in list(net.nodes.values()):
                net.revive(each)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_rounds_come_to_their_end_and_nothing_is_left(seed: int) -> None:
    net = storm(seed)
    assert net.run_to_end(net.now + 1_200), (
        f"seed {seed}: { {n.peer: (n.sampling.round, n.sampling.phase) for n in net.up()} }"
    )
    net.check_pedigrees()
    net.check_idle()
    assert not any(node.troubles for node in net.nodes.values())
