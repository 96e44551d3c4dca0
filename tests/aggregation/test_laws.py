"""The laws that every rule in `RULES`, and every chain of rules, obeys.

A new entry of `RULES` is covered without a change here. A chain worth its own run is added to `CHAINS`.

There are two settings: tensors of every kind without a network behind them, and a small network with a receiver that
holds data. Rules that need the receiver run in the second alone.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aggregation.base import Contribution, Local, Params, Receiver
from aggregation.rules import RULES, build, merge

Specs = Sequence[str | Mapping[str, Any]]

seeds = st.integers(0, 2**32)
counts = st.integers(1, 5)


# --- which chains ---------------------------------------------------------------------------------------
def by_itself(name: str) -> list[str | dict[str, Any]]:
    """The shortest list in which a rule can stand."""
    if RULES[name].takes_one:
        return ["mean", name]
    return [name] if RULES[name].reduces else [name, "mean"]


CHAINS: list[list[str | dict[str, Any]]] = [
    *(by_itself(name) for name in RULES),
    ["mean", "variance.corrected"],
    ["mean", "mean"],
    ["variance.corrected", "variance.corrected"],
    [
        {"name": "mean", "conservative": 0.0, "staleness_half_life": 2.0},
        {"name": "variance.corrected", "target": "own"},
    ],
    [{"name": "variance.corrected", "conservative": 0.9, "target": "mixed", "max_scale": 1.2}],
    [{"name": "fedavg", "staleness_half_life": 2.0}, "variance.corrected"],
    [{"name": "weight.staleness", "kind": "hinge"}, "weight.participation", "weight.window", "fedavg"],
    [{"name": "weight.staleness", "kind": "exponential", "half_life": 1e-3}, "mean"],
    ["soup.uniform", {"name": "momentum.outer", "form": "fedavg-m"}],
    ["fedavg", {"name": "momentum.outer", "form": "heavy-ball"}, "variance.corrected"],
    ["weight.participation", {"name": "weight.metric", "power": 2, "by": "accuracy"}, "mean", "accept"],
    [{"name": "soup.greedy", "by": "accuracy"}, "variance.corrected"],
    [
        "weight.staleness",
        {
            "name": "choose",
            "of": [["mean", "momentum.outer"], ["soup.greedy"], ["weight.window", "fedavg"]],
            "by": "accuracy",
            "own": False,
        },
        {"name": "accept", "tolerance": 0.1},
    ],
    ["fisher", "momentum.outer", "accept"],
]


def names_of(specs: Specs) -> Iterator[str]:
    """The names of all rules, those in the lists of `choose` among them."""
    for spec in specs:
        yield spec if isinstance(spec, str) else spec["name"]
        for nested in spec.get("of", []) if isinstance(spec, Mapping) else []:
            yield from names_of(nested)


# --- tensors of every kind ------------------------------------------------------------------------------
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(seed: int, dtypes: Sequence[torch.dtype] = FLOATS) -> Params:
    """Every kind of tensor a state dict holds, in each of `dtypes`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = {}
    for dtype in dtypes:
        tensors = {
            "linear.weight": draw(4, 3),
            "conv.weight": draw(3, 2, 2, 2) * 0.1,
            "strided.weight": draw(3, 4).T,
            "constant.weight": torch.full((2, 3), 0.1),
            "fc.bias": draw(5),
            "zero.bias": torch.zeros(3),
            "bn.running_mean": draw(3),
            "bn.running_var": draw(3).abs(),
            "temperature": draw(),
            "single.weight": draw(1, 1),
            "empty": draw(0),
            "empty.weight": draw(0, 3),
        }
        params |= {f"{dtype}.{name}": tensor.to(dtype) for name, tensor in tensors.items()}
    return params | {
        "bn.num_batches_tracked": torch.randint(0, 1000, (), generator=generator),
        "ids": torch.randint(0, 9, (2, 2), generator=generator),
        "mask": draw(3) > 0,
    }


def tensors_local(seed: int, dtypes: Sequence[torch.dtype] = FLOATS) -> Contribution:
    return Contribution(tensors(seed, dtypes), weight=3.0, source="local")


# --- a network and its receiver -------------------------------------------------------------------------
class Network(nn.Module):
    """Convolution, BatchNorm, a tied layer and dropout, so that training and evaluation differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.hidden.weight
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2).flatten(1)
        x = F.dropout(F.relu(self.hidden(x)), 0.3, self.training)
        return self.head(F.relu(self.again(x)))


def accuracy(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"accuracy": (outputs.argmax(-1) == targets).float().mean().item()}


def samples(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 4, 4] of three classes that differ in the mean of a column."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    inputs = torch.randn((count, 1, 4, 4), generator=generator)
    inputs[torch.arange(count), 0, :, targets] += 1
    return inputs, targets


def network_params(seed: int) -> Params:
    """A common start and as much again of each model's own; every entry of the running statistics is its own."""
    params = {}
    for name, tensor in Network().state_dict().items():
        if name == "again.weight":
            params[name] = params["hidden.weight"].clone()
            continue
        start, own = (torch.Generator().manual_seed(each) for each in (0, seed))
        if not tensor.is_floating_point():
            params[name] = torch.randint(0, 1000, (), generator=own)
            continue
        drawn = torch.randn(tensor.shape, generator=start) + torch.randn(tensor.shape, generator=own)
        params[name] = drawn.abs() + 0.1 if name.endswith("running_var") else 0.3 * drawn
    return params


def receiver_with(seed: int) -> Receiver:
    with torch.random.fork_rng():
        model = Network()
    return Receiver(
        model=model,
        loss=F.cross_entropy,
        metrics=accuracy,
        samples=samples(seed, 12),
        validation=samples(seed + 1, 40),
        probe=samples(0, 8)[0],
    )


def network_local(seed: int) -> Contribution:
    return Local(network_params(seed), weight=3.0, source="local", receiver=receiver_with(seed))


# --- the two settings -----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Setting:
    """What the laws are tried on: where models come from, and which tensors the laws name.

    law: how often a law with drawn seeds is tried.
    weight, matrix: the tensors that are spoiled, one of them with two dimensions.
    counters: what no merge may change.
    """

    name: str
    params_of: Callable[[int], Params]
    local_of: Callable[[int], Contribution]
    law: settings
    weights: tuple[str, ...]
    matrix: str
    counters: tuple[str, ...]

    def contributions_of(self, seed: int, count: int) -> list[Contribution]:
        return contributions_of(seed, count, self.params_of)


def contributions_of(seed: int, count: int, params_of: Callable[[int], Params]) -> list[Contribution]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Contribution(
            params_of(seed + index + 1),
            weight=0.1 + 100 * torch.rand((), generator=generator).item(),
            staleness=int(torch.randint(0, 20, (), generator=generator)),
            source=f"peer-{index}",
        )
        for index in range(count)
    ]


TENSORS = Setting(
    name="tensors",
    params_of=tensors,
    local_of=tensors_local,
    law=settings(derandomize=True, deadline=None, max_examples=15),
    weights=tuple(
        f"{torch.float32}.{name}" for name in ("linear.weight", "fc.bias", "temperature", "bn.running_var")
    ),
    matrix=f"{torch.float32}.linear.weight",
    counters=("bn.num_batches_tracked", "ids", "mask"),
)
NETWORK = Setting(
    name="network",
    params_of=network_params,
    local_of=network_local,
    law=settings(derandomize=True, deadline=None, max_examples=3),
    weights=("conv.weight", "head.bias", "bn.running_var"),
    matrix="head.weight",
    counters=("bn.num_batches_tracked",),
)


@dataclass(frozen=True, eq=False)
class Case:
    """A chain in a setting."""

    specs: Specs
    setting: Setting


def cases(setting: Setting, chains: Sequence[Specs] = CHAINS) -> list[Any]:
    """Those of `chains` that can run there."""
    return [
        pytest.param(Case(specs, setting), id=f"{setting.name}-{specs}")
        for specs in chains
        if setting is NETWORK or not build(specs).needs
    ]


every_case = pytest.mark.parametrize("case", cases(TENSORS) + cases(NETWORK))


def run(specs: Specs, received: list[Contribution], local: Contribution) -> Params:
    rule = build(specs)
    params, _ = merge(rule, received, rule.init(local.params), local)
    return params


# --- comparing ------------------------------------------------------------------------------------------
def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(left: Params, right: Params) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert bits(tensor) == bits(right[name]), name


def assert_close(left: Params, right: Params, inputs: Sequence[Contribution]) -> None:
    """Equal up to 64 roundings of the dtype at the size of the inputs, which may nearly cancel out."""
    assert list(left) == list(right)
    for name, tensor in left.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, right[name]), name
        elif tensor.numel():
            size = max(other.params[name].abs().max().item() for other in inputs)
            gap = (tensor.double() - right[name].double()).abs().max().item()
            assert gap <= 64 * torch.finfo(tensor.dtype).eps * size, name


# --- the laws -------------------------------------------------------------------------------------------
@every_case
def test_what_comes_in_is_not_written_to(case: Case) -> None:
    @case.setting.law
    @given(seed=seeds, count=counts)
    def holds(seed: int, count: int) -> None:
        received, local = case.setting.contributions_of(seed, count), case.setting.local_of(seed)
        before = copy.deepcopy([*received, local])

        run(case.specs, received, local)

        for after, original in zip([*received, local], before, strict=True):
            assert_same_bits(after.params, original.params)
            assert (after.weight, after.staleness, after.parts) == (original.weight, original.staleness, ())

    holds()


@every_case
def test_names_shapes_and_dtypes_are_the_local_models(case: Case) -> None:
    @case.setting.law
    @given(seed=seeds, count=st.integers(0, 5))
    def holds(seed: int, count: int) -> None:
        local = case.setting.local_of(seed)

        params = run(case.specs, case.setting.contributions_of(seed, count), local)

        assert list(params) == list(local.params)
        for name, tensor in params.items():
            assert (tensor.shape, tensor.dtype) == (local.params[name].shape, local.params[name].dtype), name
            assert tensor.isfinite().all(), name

    holds()


@every_case
def test_counters_and_masks_stay_local(case: Case) -> None:
    @case.setting.law
    @given(seed=seeds, count=counts)
    def holds(seed: int, count: int) -> None:
        local = case.setting.local_of(seed)

        params = run(case.specs, case.setting.contributions_of(seed, count), local)

        for name in case.setting.counters:
            assert torch.equal(params[name], local.params[name]), name

    holds()


@every_case
def test_the_order_of_contributions_does_not_matter(case: Case) -> None:
    if not all(RULES[name].order_free for name in names_of(case.specs)):
        pytest.skip("says that it minds the order")

    @case.setting.law
    @given(seed=seeds, order=st.permutations(range(5)))
    def holds(seed: int, order: list[int]) -> None:
        received, local = case.setting.contributions_of(seed, 5), case.setting.local_of(seed)

        reordered = [received[index] for index in order]

        assert_close(run(case.specs, received, local), run(case.specs, reordered, local), [*received, local])

    holds()


@every_case
def test_agreement_is_a_fixed_point_to_the_bit(case: Case) -> None:
    @case.setting.law
    @given(seed=seeds, count=st.integers(0, 5))
    def holds(seed: int, count: int) -> None:
        local = case.setting.local_of(seed)
        local.params[case.setting.matrix].view(-1)[:3] = torch.tensor([-0.0, 1e-45, -1.0])
        received = [
            replace(other, params={name: tensor.clone() for name, tensor in local.params.items()})
            for other in case.setting.contributions_of(seed, count)
        ]

        assert_same_bits(run(case.specs, received, local), local.params)

    holds()


scalable = [specs for specs in CHAINS if all(RULES[name].scale_free for name in names_of(specs))]


@pytest.mark.parametrize("case", cases(TENSORS, scalable))
def test_a_common_factor_comes_out_as_that_factor(case: Case) -> None:
    wide = (torch.float32, torch.float64)

    @case.setting.law
    @given(seed=seeds, count=counts, factor=st.sampled_from([1e-12, 1e-3, 0.5, -1.0, 7.0, 1e6]))
    def holds(seed: int, count: int, factor: float) -> None:
        received = contributions_of(seed, count, lambda each: tensors(each, wide))
        local = tensors_local(seed, wide)

        def scaled(params: Params) -> Params:
            return {
                name: tensor * factor if tensor.is_floating_point() else tensor
                for name, tensor in params.items()
            }

        inputs = [replace(other, params=scaled(other.params)) for other in [*received, local]]

        assert_close(
            run(case.specs, inputs[:-1], inputs[-1]), scaled(run(case.specs, received, local)), inputs
        )

    holds()


@every_case
@pytest.mark.parametrize("culprit", [0, 1, 2, "local"])
def test_a_value_that_is_not_finite_is_refused(case: Case, culprit: int | str) -> None:
    for name in case.setting.weights:
        received, local = case.setting.contributions_of(5, 3), case.setting.local_of(5)
        target = local if isinstance(culprit, str) else received[culprit]
        who = culprit if isinstance(culprit, str) else f"peer-{culprit}"
        for value in (math.nan, math.inf, -math.inf):
            target.params[name].view(-1)[-1] = value

            with pytest.raises(ValueError, match=f"{who}.*{name}"):
                run(case.specs, received, local)


def without(params: Params, name: str) -> Params:
    return {key: tensor for key, tensor in params.items() if key != name}


MISMATCHES: dict[str, Callable[[Params, str], Params]] = {
    "missing": lambda params, key: without(params, key),
    "unknown": lambda params, key: params | {"extra.weight": torch.ones(2, 2)},
    "renamed": lambda params, key: without(params, key) | {"extra.weight": params[key]},
    "another shape": lambda params, key: params | {key: params[key].T},
    "broadcastable": lambda params, key: params | {key: params[key][:1]},
    "another dtype": lambda params, key: params | {key: params[key].double()},
}


@every_case
@pytest.mark.parametrize("kind", MISMATCHES)
def test_a_model_of_another_layout_is_refused(case: Case, kind: str) -> None:
    for culprit in (0, 2):
        received, local = case.setting.contributions_of(5, 3), case.setting.local_of(5)
        params = MISMATCHES[kind](received[culprit].params, case.setting.matrix)
        received[culprit] = replace(received[culprit], params=params)

        with pytest.raises(ValueError, match=rf"peer-{culprit}.*({case.setting.matrix}|extra\.weight)"):
            run(case.specs, received, local)


@every_case
@pytest.mark.parametrize("change", [{"weight": 0.0}, {"weight": math.nan}, {"staleness": -1}], ids=str)
def test_a_weight_or_staleness_out_of_range_is_refused(case: Case, change: dict[str, Any]) -> None:
    received, local = case.setting.contributions_of(5, 3), case.setting.local_of(5)
    received[1] = replace(received[1], **change)

    with pytest.raises(ValueError, match=f"peer-1.*{next(iter(change))}"):
        run(case.specs, received, local)


@every_case
@pytest.mark.parametrize("count", range(6))
def test_one_contribution_is_left(case: Case, count: int) -> None:
    rule, local = build(case.specs), case.setting.local_of(9)

    results, _ = rule.update(case.setting.contributions_of(9, count), rule.init(local.params), local)

    assert len(results) == 1
    assert math.isfinite(results[0].weight)
    assert results[0].weight > 0


@pytest.mark.parametrize("name", [name for name, entry in RULES.items() if not entry.reduces])
@pytest.mark.parametrize("weight", [5e-324, 1.0, 1.7e308])
def test_a_rule_that_does_not_reduce_makes_no_more_of_them_and_keeps_weights_positive(
    name: str, weight: float
) -> None:
    rule, local = RULES[name].factory(), NETWORK.local_of(3)
    state = rule.init(local.params)
    count = 1 if RULES[name].takes_one else 4

    for step in range(3):
        received = [
            replace(other, weight=weight, staleness=10**index)
            for index, other in enumerate(NETWORK.contributions_of(step, count))
        ]
        left, state = rule.update(received, state, local)

        assert len(left) <= count
        assert all(math.isfinite(other.weight) and other.weight > 0 for other in left)


@every_case
def test_with_nothing_received_nothing_changes(case: Case) -> None:
    rule, local = build(case.specs), case.setting.local_of(9)
    fresh = rule.init(local.params)

    params, _ = merge(rule, [], fresh, local)
    _, later = merge(rule, case.setting.contributions_of(9, 3), fresh, local)
    afterwards, _ = merge(rule, [], later, local)

    assert_same_bits(params, local.params)
    assert_same_bits(afterwards, local.params)


@every_case
def test_the_state_goes_round(case: Case) -> None:
    rule, local = build(case.specs), case.setting.local_of(9)
    state = rule.init(local.params)

    for step in range(3):
        params, state = merge(rule, case.setting.contributions_of(step, 3), state, local)
        local = replace(local, params=params)
        assert all(isinstance(value, str | float | int) for value in rule.report(state).values())

    assert list(local.params) == list(case.setting.params_of(9))
    assert all(tensor.isfinite().all() for tensor in local.params.values())


@every_case
def test_the_same_state_and_input_give_the_same_result(case: Case) -> None:
    rule, local, received = build(case.specs), case.setting.local_of(9), case.setting.contributions_of(9, 4)
    _, state = merge(rule, case.setting.contributions_of(8, 4), rule.init(local.params), local)
    before = copy.deepcopy(state)

    first, _ = merge(rule, received, state, local)
    again, _ = merge(rule, received, state, local)
    copied, _ = merge(rule, received, before, local)

    assert_same_bits(first, again)
    assert_same_bits(first, copied)


@every_case
def test_the_global_generator_is_left_alone(case: Case) -> None:
    received, local = case.setting.contributions_of(9, 3), case.setting.local_of(9)
    before = torch.get_rng_state()

    run(case.specs, received, local)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", cases(NETWORK))
def test_what_the_receivers_model_holds_and_its_training_flag_do_not_matter(case: Case) -> None:
    received, local = NETWORK.contributions_of(9, 3), NETWORK.local_of(9)
    assert isinstance(local, Local)
    assert local.receiver is not None
    model = local.receiver.model.train()
    data = copy.deepcopy((local.receiver.samples, local.receiver.validation))
    first = run(case.specs, received, local)
    flags = [module.training for module in model.modules()]

    model.load_state_dict(network_params(77))
    second = run(case.specs, received, replace(local, receiver=replace(local.receiver, model=model.eval())))

    assert_same_bits(first, second)
    assert all(flags)
    assert not model.training
    for before, after in zip(data, (local.receiver.samples, local.receiver.validation), strict=True):
        assert before is not None
        assert after is not None
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
