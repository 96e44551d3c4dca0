"""The laws that every rule in `RULES`, and every chain of rules, obeys.

A new entry of `RULES` is covered without a change here. A chain worth its own run is added to `CHAINS`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregation.base import Contribution, Params
from aggregation.rules import RULES, build, merge

CHAINS: list[list[str | dict[str, Any]]] = [
    *([name] if entry.reduces else [name, "mean"] for name, entry in RULES.items()),
    ["mean", "variance.corrected"],
    ["mean", "mean"],
    ["variance.corrected", "variance.corrected"],
    [
        {"name": "mean", "conservative": 0.0, "staleness_half_life": 2.0},
        {"name": "variance.corrected", "target": "own"},
    ],
    [{"name": "variance.corrected", "conservative": 0.9, "target": "mixed", "max_scale": 1.2}],
]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def names_of(specs: Sequence[str | dict[str, Any]]) -> list[str]:
    return [spec if isinstance(spec, str) else spec["name"] for spec in specs]


every_rule = pytest.mark.parametrize("specs", CHAINS, ids=str)
law = settings(derandomize=True, deadline=None, max_examples=15)
seeds = st.integers(0, 2**32)
counts = st.integers(1, 5)


def model(seed: int, dtypes: Sequence[torch.dtype] = FLOATS) -> Params:
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


def contributions_of(seed: int, count: int, dtypes: Sequence[torch.dtype] = FLOATS) -> list[Contribution]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Contribution(
            model(seed + index + 1, dtypes),
            weight=0.1 + 100 * torch.rand((), generator=generator).item(),
            staleness=int(torch.randint(0, 20, (), generator=generator)),
            source=f"peer-{index}",
        )
        for index in range(count)
    ]


def local_of(seed: int, dtypes: Sequence[torch.dtype] = FLOATS) -> Contribution:
    return Contribution(model(seed, dtypes), weight=3.0, source="local")


def run(specs: Sequence[str | dict[str, Any]], received: list[Contribution], local: Contribution) -> Params:
    rule = build(specs)
    params, _ = merge(rule, received, rule.init(local.params), local)
    return params


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


@every_rule
@law
@given(seed=seeds, count=counts)
def test_what_comes_in_is_not_written_to(specs: list[str | dict[str, Any]], seed: int, count: int) -> None:
    received, local = contributions_of(seed, count), local_of(seed)
    before = copy.deepcopy([*received, local])

    run(specs, received, local)

    for after, original in zip([*received, local], before, strict=True):
        assert_same_bits(after.params, original.params)
        assert replace(after, params={}) == replace(original, params={})


@every_rule
@law
@given(seed=seeds, count=st.integers(0, 5))
def test_names_shapes_and_dtypes_are_the_local_models(
    specs: list[str | dict[str, Any]], seed: int, count: int
) -> None:
    local = local_of(seed)

    params = run(specs, contributions_of(seed, count), local)

    assert list(params) == list(local.params)
    for name, tensor in params.items():
        assert (tensor.shape, tensor.dtype) == (local.params[name].shape, local.params[name].dtype), name
        assert tensor.isfinite().all(), name


@every_rule
@law
@given(seed=seeds, count=counts)
def test_counters_and_masks_stay_local(specs: list[str | dict[str, Any]], seed: int, count: int) -> None:
    local = local_of(seed)

    params = run(specs, contributions_of(seed, count), local)

    for name in ("bn.num_batches_tracked", "ids", "mask"):
        assert torch.equal(params[name], local.params[name]), name


@every_rule
@law
@given(seed=seeds, order=st.permutations(range(5)))
def test_the_order_of_contributions_does_not_matter(
    specs: list[str | dict[str, Any]], seed: int, order: list[int]
) -> None:
    if not all(RULES[name].order_free for name in names_of(specs)):
        pytest.skip("says that it minds the order")
    received, local = contributions_of(seed, 5), local_of(seed)

    reordered = [received[index] for index in order]

    assert_close(run(specs, received, local), run(specs, reordered, local), [*received, local])


@every_rule
@law
@given(seed=seeds, count=st.integers(0, 5))
def test_agreement_is_a_fixed_point_to_the_bit(
    specs: list[str | dict[str, Any]], seed: int, count: int
) -> None:
    local = local_of(seed)
    local.params["signed.weight"] = torch.tensor([[-0.0, 0.0], [1e-45, -1.0]])
    received = [
        replace(other, params={name: tensor.clone() for name, tensor in local.params.items()})
        for other in contributions_of(seed, count)
    ]

    assert_same_bits(run(specs, received, local), local.params)


@every_rule
@law
@given(seed=seeds, count=counts, factor=st.sampled_from([1e-12, 1e-3, 0.5, -1.0, 7.0, 1e6]))
def test_a_common_factor_comes_out_as_that_factor(
    specs: list[str | dict[str, Any]], seed: int, count: int, factor: float
) -> None:
    wide = (torch.float32, torch.float64)
    received, local = contributions_of(seed, count, wide), local_of(seed, wide)

    def scaled(params: Params) -> Params:
        return {
            name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in params.items()
        }

    inputs = [replace(other, params=scaled(other.params)) for other in [*received, local]]

    assert_close(run(specs, inputs[:-1], inputs[-1]), scaled(run(specs, received, local)), inputs)


@every_rule
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("culprit", [0, 1, 2, "local"])
@pytest.mark.parametrize("name", ["linear.weight", "fc.bias", "temperature", "bn.running_var"])
def test_a_value_that_is_not_finite_is_refused(
    specs: list[str | dict[str, Any]], value: float, culprit: int | str, name: str
) -> None:
    received, local = contributions_of(5, 3), local_of(5)
    key = f"{torch.float32}.{name}"
    target = local if isinstance(culprit, str) else received[culprit]
    target.params[key].view(-1)[-1] = value

    with pytest.raises(ValueError, match=f"{culprit if culprit == 'local' else f'peer-{culprit}'}.*{key}"):
        run(specs, received, local)


def without(params: Params, name: str) -> Params:
    return {key: tensor for key, tensor in params.items() if key != name}


KEY = f"{torch.float32}.linear.weight"
MISMATCHES: dict[str, Callable[[Params], Params]] = {
    "missing": lambda params: without(params, KEY),
    "unknown": lambda params: params | {"extra.weight": torch.ones(2, 2)},
    "renamed": lambda params: without(params, KEY) | {"extra.weight": params[KEY]},
    "another shape": lambda params: params | {KEY: params[KEY].T},
    "broadcastable": lambda params: params | {KEY: params[KEY][:1]},
    "another dtype": lambda params: params | {KEY: params[KEY].double()},
}


@every_rule
@pytest.mark.parametrize("kind", MISMATCHES)
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_model_of_another_layout_is_refused(
    specs: list[str | dict[str, Any]], kind: str, culprit: int
) -> None:
    received, local = contributions_of(5, 3), local_of(5)
    received[culprit] = replace(received[culprit], params=MISMATCHES[kind](received[culprit].params))

    with pytest.raises(ValueError, match=rf"peer-{culprit}.*({KEY}|extra\.weight)"):
        run(specs, received, local)


@every_rule
@pytest.mark.parametrize("change", [{"weight": 0.0}, {"weight": math.nan}, {"staleness": -1}], ids=str)
def test_a_weight_or_staleness_out_of_range_is_refused(
    specs: list[str | dict[str, Any]], change: dict[str, Any]
) -> None:
    received, local = contributions_of(5, 3), local_of(5)
    received[1] = replace(received[1], **change)

    with pytest.raises(ValueError, match=f"peer-1.*{next(iter(change))}"):
        run(specs, received, local)


@every_rule
@pytest.mark.parametrize("count", range(6))
def test_one_contribution_is_left(specs: list[str | dict[str, Any]], count: int) -> None:
    rule, local = build(specs), local_of(9)

    results, _ = rule.update(contributions_of(9, count), rule.init(local.params), local)

    assert len(results) == 1
    assert math.isfinite(results[0].weight)
    assert results[0].weight > 0


@every_rule
def test_with_nothing_received_nothing_changes(specs: list[str | dict[str, Any]]) -> None:
    local = local_of(9)

    assert_same_bits(run(specs, [], local), local.params)


@every_rule
def test_the_state_goes_round(specs: list[str | dict[str, Any]]) -> None:
    rule, local = build(specs), local_of(9)
    state = rule.init(local.params)

    for step in range(3):
        params, state = merge(rule, contributions_of(step, 3), state, local)
        local = replace(local, params=params)

    assert list(local.params) == list(model(9))


@every_rule
def test_the_same_state_and_input_give_the_same_result(specs: list[str | dict[str, Any]]) -> None:
    rule, local, received = build(specs), local_of(9), contributions_of(9, 4)
    state = rule.init(local.params)

    first, _ = merge(rule, received, copy.deepcopy(state), local)
    second, _ = merge(rule, received, state, local)

    assert_same_bits(first, second)
