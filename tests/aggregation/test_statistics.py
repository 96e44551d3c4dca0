"""BatchNorm's statistics re-estimated, and REPAIR: units of a mean vary as those of the models averaged."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aggregation.base import Contribution, Local, Params, Receiver
from aggregation.rules import build, merge
from aggregation.statistics import reestimated, repaired
from aggregation.symmetry import run, symmetry_of
from tests.aggregation.networks import NETWORKS


def params_of(model: nn.Module) -> Params:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def random_like(params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and not name.endswith("running_var")
        else tensor
        for name, tensor in params.items()
    }


def probe_like(inputs: Tensor, count: int) -> Tensor:
    return torch.randn(count, *inputs.shape[1:], generator=torch.Generator().manual_seed(3))


def receiver_for(model: nn.Module, probe: Tensor) -> Receiver:
    targets = torch.zeros(len(probe), dtype=torch.int64)
    return Receiver(model, nn.functional.cross_entropy, lambda *_: {}, (probe, targets))


# --- BatchNorm ------------------------------------------------------------------------------------------
def test_statistics_are_those_of_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))
    inputs = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    params = params_of(model)

    found = reestimated(model, params, inputs)

    with torch.no_grad():
        values = nn.functional.linear(inputs, params["0.weight"], params["0.bias"])
    assert torch.allclose(found["1.running_mean"], values.mean(0), atol=1e-5)
    assert torch.allclose(found["1.running_var"], values.var(0), rtol=1e-4)
    for name in params:
        if "running" not in name:
            assert torch.equal(found[name], params[name]), name


def test_deeper_layers_see_what_the_layers_before_give_in_training_mode() -> None:
    model, inputs = NETWORKS["resnet_bn"]()
    probe, params = probe_like(inputs, 64), params_of(model)
    expected = params_of(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.running_mean[:], module.running_var[:] = 1.0, 0, 1
    with torch.no_grad():
        model(probe)
    expected = params_of(model)
    model.load_state_dict(params)

    found = reestimated(model, params, probe)

    for name in params:
        if "running" in name:
            assert torch.allclose(found[name], expected[name], atol=1e-4, rtol=1e-4), name


def test_momentum_mode_and_generator_are_as_before() -> None:
    model, inputs = NETWORKS["resnet_bn"]()
    model.train()
    state = torch.get_rng_state()

    reestimated(model, params_of(model), probe_like(inputs, 20))

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_without_batch_norm_is_handed_on() -> None:
    model, inputs = NETWORKS["mlp"]()
    params = params_of(model)

    assert reestimated(model, params, inputs) is params


# --- REPAIR ---------------------------------------------------------------------------------------------
WATCHED = {
    "mlp": ("linear",),
    "lenet": ("linear", "conv"),
    "transformer_torch": ("layer_norm",),
    "resnet_gn": ("group_norm",),
    "vit": ("layer_norm",),
}
"""Nodes that set the scale, in networks where norms undo what is done before them."""


@pytest.mark.parametrize("name", WATCHED)
def test_units_of_the_repaired_mean_vary_as_the_endpoints_do(name: str) -> None:
    model, inputs = NETWORKS[name]()
    probe, one = probe_like(inputs, 64), params_of(model)
    other = random_like(one, 1)
    merged = {key: (one[key] + other[key]) / 2 for key in one}
    symmetry = symmetry_of(model, probe)

    fixed = repaired(symmetry, merged, [(0.25, one), (0.75, other)], probe)

    values: list[dict[str, tuple[Tensor, Tensor]]] = []
    for params in (one, other, merged, fixed):
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def look(node: str, value: Any, seen: dict[str, tuple[Tensor, Tensor]] = seen) -> Any:
            if node.startswith(WATCHED[name]):
                rows = value.movedim(1 if node.startswith(("conv", "group")) else value.ndim - 1, 0).flatten(
                    1
                )
                seen[node] = rows.mean(1), rows.std(1, correction=0)
            return value

        run(symmetry, params, probe, look)
        values.append(seen)
    ones, others, before, after = values
    hidden = list(ones) if name in ("resnet_gn", "transformer_torch") else list(ones)[:-1]
    assert hidden
    changed = 0
    for node in hidden:
        goal = [0.25 * a + 0.75 * b for a, b in zip(ones[node], others[node], strict=True)]
        alive = after[node][1] > 1e-4
        assert torch.allclose(after[node][0][alive], goal[0][alive], atol=2e-3, rtol=1e-3), node
        assert torch.allclose(after[node][1][alive], goal[1][alive], atol=2e-3, rtol=1e-3), node
        changed += not torch.allclose(before[node][1], goal[1], rtol=0.02)
    assert changed, "the mean had nothing to repair: the test shows nothing"


def test_endpoints_that_agree_need_no_repair() -> None:
    model, inputs = NETWORKS["lenet"]()
    probe, params = probe_like(inputs, 32), params_of(model)

    fixed = repaired(symmetry_of(model, probe), params, [(0.5, params), (0.5, params)], probe)

    assert all(torch.allclose(fixed[name], params[name], atol=1e-6) for name in params)


def test_output_layers_and_layers_before_a_batch_norm_are_left_alone() -> None:
    for name, untouched in (("mlp", "4.weight"), ("resnet_bn", "stem.weight"), ("resnet_bn", "head.weight")):
        model, inputs = NETWORKS[name]()
        probe, one = probe_like(inputs, 32), params_of(model)
        merged = random_like(one, 2)

        fixed = repaired(symmetry_of(model, probe), merged, [(1.0, one)], probe)

        assert torch.equal(fixed[untouched], merged[untouched])


@pytest.mark.parametrize("end", [nn.LogSoftmax(1), nn.Sigmoid(), nn.Flatten()])
def test_the_output_layer_is_one_behind_an_activation_function_too(end: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), end).eval()
    probe, one = torch.randn(32, 5, generator=torch.Generator().manual_seed(1)), params_of(model)
    merged = random_like(one, 2)

    fixed = repaired(symmetry_of(model, probe), merged, [(1.0, one)], probe)

    assert torch.equal(fixed["2.weight"], merged["2.weight"])
    assert not torch.equal(fixed["0.weight"], merged["0.weight"])


def test_the_rule_takes_the_shares_of_the_mean_before_it() -> None:
    model, inputs = NETWORKS["mlp"]()
    probe, own = probe_like(inputs, 64), params_of(model)
    others = [random_like(own, seed) for seed in (1, 2)]
    rule = build([{"name": "mean", "conservative": 0.2}, "repair"])
    received = [Contribution(others[0], weight=3), Contribution(others[1], weight=1)]

    params, _ = merge(rule, received, rule.init(own), Local(own, receiver=receiver_for(model, probe)))

    mean = build([{"name": "mean", "conservative": 0.2}])
    merged, _ = merge(mean, received, mean.init(own), Contribution(own))
    shares = [(0.2, own), (0.6, others[0]), (0.2, others[1])]
    expected = repaired(symmetry_of(model, probe), merged, shares, probe)
    assert all(torch.allclose(params[name], expected[name], atol=1e-6) for name in params)
    assert not torch.allclose(params["0.weight"], merged["0.weight"], atol=1e-3)


@pytest.mark.parametrize("name", ["repair", "norm.reestimate"])
def test_they_refuse_to_stand_before_a_mean(name: str) -> None:
    with pytest.raises(ValueError, match=r"rules\[0\]: it takes exactly one contribution"):
        build([name, "mean"])


def test_a_mean_scores_worse_with_the_statistics_of_other_networks() -> None:
    """Invariant 7 of the paper digest: without re-estimation a drop, with it a recovery."""
    inputs = torch.randn(600, 6, generator=torch.Generator().manual_seed(1))
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model, own = trained(inputs, targets, 0)
    _, other = trained(inputs, targets, 1)

    def accuracy(*rules: str) -> float:
        rule = build(list(rules))
        local = Local(own, receiver=receiver_for(model, inputs))
        params, _ = merge(rule, [Contribution(other)], rule.init(own), local)
        model.load_state_dict(params)
        model.eval()
        with torch.no_grad():
            return float((model(inputs).argmax(1) == targets).float().mean())

    plain, fixed = accuracy("mean"), accuracy("mean", "norm.reestimate")
    aligned = accuracy("align.activation", "mean", "norm.reestimate")
    assert fixed > plain + 0.02, (plain, fixed)
    assert aligned > fixed + 0.2, (fixed, aligned)


def trained(inputs: Tensor, targets: Tensor, seed: int) -> tuple[nn.Module, Params]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = [6, 48, 48, 48, 48]
        layers = [
            layer
            for a, b in itertools.pairwise(sizes)
            for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
        ]
        model = nn.Sequential(*layers, nn.Linear(48, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model, params_of(model)
