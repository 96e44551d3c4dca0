"""Alignment: a permuted copy is brought back to the bit, the assignment is the best one, and what the rules report."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aggregation.alignment import (
    Moments,
    WeightMatching,
    activation_gains,
    assign,
    match_activations,
    match_weights,
    units,
    watched,
)
from aggregation.base import Contribution, Local, Params, Receiver
from aggregation.probes import probe_of
from aggregation.rules import build, merge
from aggregation.symmetry import Axis, Symmetry, run, symmetry_of
from tests.aggregation.networks import NETWORKS

every_network = pytest.mark.parametrize("name", NETWORKS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def params_of(model: nn.Module) -> Params:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def probe_like(inputs: Tensor, count: int = 128) -> Tensor:
    shape = (count, *inputs.shape[1:])
    if inputs.is_floating_point():
        return torch.randn(shape, generator=generator(7))
    return torch.randint(0, int(inputs.max()) + 1, shape, generator=generator(7))


def receiver_for(model: nn.Module, inputs: Tensor, probe: Tensor | None = None) -> Receiver:
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    return Receiver(model, nn.functional.cross_entropy, lambda *_: {}, (inputs, targets), probe=probe)


def largest_difference(a: Params, b: Params) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# --- a copy comes back ----------------------------------------------------------------------------------
@every_network
@pytest.mark.parametrize("seed", range(2))
def test_both_matchings_bring_a_permuted_copy_back(name: str, seed: int) -> None:
    model, inputs = NETWORKS[name]()
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    other = symmetry.permute(own, symmetry.random(generator(seed)))

    (by_activation,) = match_activations(symmetry, own, [other], probe, names_of(model))
    by_weight = match_weights(symmetry, own, other, names_of(model))

    assert largest_difference(symmetry.permute(other, by_activation), own) == 0
    assert largest_difference(symmetry.permute(other, by_weight), own) == 0


@pytest.mark.parametrize("rule", ["align.activation", "align.weight"])
@every_network
def test_a_merge_with_permuted_copies_gives_the_receivers_own_model(name: str, rule: str) -> None:
    model, inputs = NETWORKS[name]()
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    received = [
        Contribution(symmetry.permute(own, symmetry.random(generator(seed))), source=f"peer-{seed}")
        for seed in range(3)
    ]
    built = build([rule, {"name": "mean", "conservative": 0.25}])

    merged, _ = merge(built, received, built.init(own), Local(own, receiver=receiver_for(model, probe)))

    assert largest_difference(merged, own) < 1e-4


# --- activation matching --------------------------------------------------------------------------------
def test_moments_added_batch_by_batch_are_those_of_all() -> None:
    a, b = torch.randn(3, 90, generator=generator(1)) * 5 + 100, torch.randn(4, 90, generator=generator(2))
    b[0] = 2 * a[1] + 1
    whole = Moments.of(a.double(), b.double())
    parts = Moments.of(a[:, :7].double(), b[:, :7].double())
    for start, end in ((7, 30), (30, 31), (31, 90)):
        parts.add(Moments.of(a[:, start:end].double(), b[:, start:end].double()))

    assert torch.allclose(parts.cross, whole.cross, rtol=1e-9)
    assert torch.allclose(parts.mean_a, a.double().mean(1))
    expected = torch.corrcoef(torch.cat([a, b]).double())[:3, 3:]
    assert torch.allclose(parts.correlation(), expected, atol=1e-9)
    assert parts.correlation()[1, 0] == pytest.approx(1.0)


def test_a_unit_correlates_fully_with_itself_and_a_dead_one_with_none() -> None:
    model, inputs = NETWORKS["mlp"]()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, -1.0  # never gets through the ReLU
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)

    (gains,) = activation_gains(symmetry, own, [own], probe)

    first = next(gain for axis, gain in gains.items() if symmetry.axes[axis].name == "0.weight[0]")
    assert first.diagonal()[3] == 0
    assert torch.equal(first[3], torch.zeros(16, dtype=torch.float64))
    live = torch.cat([first.diagonal()[:3], first.diagonal()[4:]])
    assert torch.allclose(live, torch.ones(15, dtype=torch.float64), atol=1e-5)


def test_dead_units_are_told_apart_by_their_weights() -> None:
    model, inputs = NETWORKS["mlp"]()
    with torch.no_grad():
        model[0].bias[2:9] = -100.0
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    other = symmetry.permute(own, symmetry.random(generator(3)))

    (orders,) = match_activations(symmetry, own, [other], probe, names_of(model))

    assert largest_difference(symmetry.permute(other, orders), own) == 0


def test_units_are_looked_at_where_they_are_read() -> None:
    model, inputs = NETWORKS["resnet_bn"]()
    symmetry = symmetry_of(model, inputs)
    targets = {node.name: str(node.target) for node in symmetry.graph.graph.nodes}

    for names in watched(symmetry, "last").values():
        assert len(names) == 1
        assert targets[names[0]].startswith(("aten.relu", "aten.flatten")), "after the activation function"


def test_units_stay_where_another_place_is_not_much_better() -> None:
    model, inputs = NETWORKS["mlp"]()
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    noisy = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator(8))
        for name, tensor in own.items()
    }
    shuffled = symmetry.permute(own, symmetry.random(generator(8)))

    def orders(other: Params, stay: float) -> Any:
        return match_activations(symmetry, own, [other], probe, names_of(model), stay=stay)[0]

    stays = symmetry.identity()
    assert all(torch.equal(order, stays[axis]) for axis, order in orders(noisy, 0.5).items())
    assert largest_difference(symmetry.permute(shuffled, orders(shuffled, 0.5)), own) == 0
    assert all(torch.equal(order, stays[axis]) for axis, order in orders(shuffled, 2.0).items())


@pytest.mark.parametrize("places", ["all", "last"])
def test_all_places_of_a_residual_stream_are_looked_at_or_only_the_last(places: str) -> None:
    model, inputs = NETWORKS["resnet_bn"]()
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    other = symmetry.permute(own, symmetry.random(generator(6)))

    last, everywhere = watched(symmetry, "last"), watched(symmetry)
    (orders,) = match_activations(symmetry, own, [other], probe, names_of(model), places)

    assert all(last[axis] == names[-1:] for axis, names in everywhere.items())
    # Three streams are read by several layers each; the insides of blocks by one.
    assert sorted(len(names) for names in everywhere.values()) == [1] * 6 + [2, 2, 3]
    assert largest_difference(symmetry.permute(other, orders), own) == 0


def test_a_matching_in_batches_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = NETWORKS["lenet"]()
    probe, own = probe_like(inputs, 96), params_of(model)
    other = {name: torch.randn(tensor.shape, generator=generator(5)) for name, tensor in own.items()}
    (whole,) = activation_gains(symmetry_of(model, probe), own, [other], probe)
    (parts,) = activation_gains(symmetry_of(model, probe[:32]), own, [other], probe)

    for axis, gain in whole.items():
        assert torch.allclose(gain, parts[axis], atol=1e-5)


# --- the assignment -------------------------------------------------------------------------------------
def blocks_of(outer: int, inner: int, held: bool = False) -> Symmetry:
    """An axis and one within it, and no network."""
    axes = {0: Axis(outer, None, "held" if held else "", "outer"), 1: Axis(inner, 0, "", "inner")}
    return Symmetry(axes, {}, {}, torch.fx.GraphModule({}, torch.fx.Graph()), (), 1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("held", [False, True])
def test_heads_and_what_is_within_them_are_assigned_together_as_well_as_can_be(seed: int, held: bool) -> None:
    symmetry = blocks_of(3, 2, held)
    gain = torch.randn(6, 6, generator=generator(seed), dtype=torch.float64)

    orders = assign(symmetry, 0, {1: gain})

    def total(outer: tuple[int, ...], inner: tuple[tuple[int, ...], ...]) -> float:
        return sum(float(gain[g * 2 + i, outer[g] * 2 + inner[g][i]]) for g in range(3) for i in range(2))

    outers = [(0, 1, 2)] if held else list(itertools.permutations(range(3)))
    inners = list(itertools.product([(0, 1), (1, 0)], repeat=3))
    best = max(total(outer, inner) for outer in outers for inner in inners)
    outer = orders.get(0, torch.arange(3))
    assert total(tuple(outer.tolist()), tuple(map(tuple, orders[1].tolist()))) == pytest.approx(best)


@pytest.mark.parametrize("size", [1, 2, 17])
def test_an_order_is_a_permutation_whatever_the_gains(size: int) -> None:
    symmetry = Symmetry(
        {0: Axis(size, None, "", "axis")}, {}, {}, torch.fx.GraphModule({}, torch.fx.Graph()), (), 1
    )
    for gain in (torch.zeros(size, size), torch.randn(size, size, generator=generator()), torch.eye(size)):
        order = assign(symmetry, 0, {0: gain.double()})[0]
        assert sorted(order.tolist()) == list(range(size))


# --- weight matching ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet_bn", "resnet_gn", "transformer", "tied_lm"])
def test_the_objective_never_falls_and_singular_values_stay(name: str) -> None:
    model, inputs = NETWORKS[name]()
    own = params_of(model)
    other = {
        key: torch.randn(tensor.shape, generator=generator(5)) if tensor.is_floating_point() else tensor
        for key, tensor in own.items()
    }
    symmetry = symmetry_of(model, inputs)
    search = WeightMatching(symmetry, own, other, names_of(model))
    orders = symmetry.identity()
    before = search.objective(orders)
    for unit in units(symmetry):
        orders, after = search.improve(orders, [unit])
        assert after >= before
        before = after

    assert search.objective(orders) > search.objective(symmetry.identity())
    for key, tensor in symmetry.permute(other, orders).items():
        if tensor.ndim == 2:
            assert torch.allclose(
                torch.linalg.svdvals(tensor.double()), torch.linalg.svdvals(other[key].double()), rtol=1e-6
            )


def test_weights_come_nearer() -> None:
    model, inputs = NETWORKS["mlp"]()
    own = params_of(model)
    other = {key: torch.randn(tensor.shape, generator=generator(5)) for key, tensor in own.items()}
    symmetry = symmetry_of(model, inputs)

    aligned = symmetry.permute(other, match_weights(symmetry, own, other, names_of(model)))

    def distance(params: Params) -> float:
        return math.sqrt(sum(float((params[key] - own[key]).square().sum()) for key in own))

    assert distance(aligned) < distance(other)


# --- the rules ------------------------------------------------------------------------------------------
def aligned(rule: str | dict[str, Any], receiver: Receiver, own: Params, *others: Params) -> Any:
    built = build([rule, "mean"])
    return merge(
        built, [Contribution(each) for each in others], built.init(own), Local(own, receiver=receiver)
    )


def test_the_report_says_which_probe_and_how_much_was_moved() -> None:
    model, inputs = NETWORKS["odd"]()
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    other = symmetry.permute(own, symmetry.random(generator(1)))
    rule = build(["align.activation", "mean"])
    _, state = aligned("align.activation", receiver_for(model, probe), own, other)

    report = rule.report(state)

    assert report["align.activation.probe"] == "128 own samples"
    assert 0.5 < float(report["align.activation.moved"]) <= 1
    assert report["align.activation.left_alone"] == (
        "first.weight[0] (12) meets cumsum, which minds the order of units"
    )


def test_where_all_agree_no_network_is_traced() -> None:
    model, inputs = NETWORKS["mlp"]()
    own = params_of(model)
    nothing = Receiver(model, nn.functional.mse_loss, lambda *_: {}, (inputs[:0], inputs[:0]))

    merged, _ = aligned("align.activation", nothing, own, own)

    assert all(merged[name] is own[name] for name in own)


def test_a_shared_probe_is_used_where_it_is_asked_for() -> None:
    model, inputs = NETWORKS["mlp"]()
    shared = probe_like(inputs, 40)
    receiver = receiver_for(model, inputs, probe=shared)

    assert torch.equal(probe_of(receiver, "shared", 1000), shared)
    with pytest.raises(ValueError, match=r'the task has no shared probe inputs \(.*\); use "own"'):
        probe_of(receiver_for(model, inputs), "shared", 10)


@pytest.mark.parametrize(
    ("samples", "wanted", "expected"), [(10, 3, 3), (1000, 700, 512), (1000, 2000, 768), (100, 256, 100)]
)
def test_probes_are_spread_evenly_and_in_whole_batches(samples: int, wanted: int, expected: int) -> None:
    model, _ = NETWORKS["mlp"]()
    inputs = torch.arange(samples).float()[:, None]

    probe = probe_of(receiver_for(model, inputs), "own", wanted)

    assert len(probe) == expected
    steps = probe[:, 0].diff()
    assert steps.min() >= samples // expected
    assert steps.max() <= -(-samples // expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "align.activation", "probe": "theirs"}, "probe must be one of own, shared, not 'theirs'"),
        ({"name": "align.activation", "samples": 0}, "samples must be a whole number of at least 1, not 0"),
        ({"name": "align.activation", "stay": -0.1}, "stay must be a number from 0 to 2, not -0.1"),
        ({"name": "align.activation", "places": "some"}, "places must be one of last, all, not 'some'"),
        ({"name": "align.weight", "restarts": -1}, "restarts must be a whole number of at least 0, not -1"),
        ({"name": "align.weight", "seed": True}, "seed must be a whole number of at least 0, not True"),
    ],
)
def test_wrong_arguments_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build([spec, "mean"])


def test_one_peers_huge_weights_cost_nobody_else_their_merge() -> None:
    """Finite, within what the daemon lets in, and still no number comes out of the last layer."""
    model, inputs = NETWORKS["mlp"]()
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    other = symmetry.permute(own, symmetry.random(generator(1)))
    huge = {name: torch.full_like(tensor, 1e10) for name, tensor in own.items()}
    huge["0.weight"], huge["2.weight"] = huge["0.weight"] * 1e9, huge["2.weight"] * 1e9
    rule = build(["align.activation", {"name": "mean", "conservative": 0.5}, "repair"])
    local = Local(own, receiver=receiver_for(model, probe))

    merged, state = merge(
        rule, [Contribution(huge, source="b"), Contribution(other, source="a")], rule.init(own), local
    )

    assert rule.report(state)["align.activation.dropped"] == 1
    assert largest_difference(merged, own) < 1e-4


def test_without_a_receiver_it_says_what_is_missing() -> None:
    own = {"w": torch.zeros(2, 2)}
    rule = build(["align.weight", "mean"])

    with pytest.raises(ValueError, match="needs the receiver's network and data"):
        merge(rule, [Contribution({"w": torch.ones(2, 2)})], rule.init(own), Contribution(own))


def test_aligned_networks_that_compute_the_same_average_to_what_they_compute() -> None:
    model, inputs = NETWORKS["transformer"]()
    probe, own = probe_like(inputs), params_of(model)
    symmetry = symmetry_of(model, probe)
    other = symmetry.permute(own, symmetry.random(generator(4)))
    plain, _ = merge(rule := build(["mean"]), [Contribution(other)], rule.init(own), Contribution(own))

    merged, _ = aligned("align.activation", receiver_for(model, probe), own, other)

    expected = run(symmetry, own, probe)
    assert torch.allclose(run(symmetry, merged, probe), expected, atol=1e-5)
    assert not torch.allclose(run(symmetry, plain, probe), expected, atol=1e-2)
