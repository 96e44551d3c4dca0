"""Momentum over merges: steps by hand, the paper's local form, and what passes through."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from aggregation.base import Contribution, Params, Rule
from aggregation.momentum import outer
from aggregation.rules import build, merge


def at(*values: float, dtype: torch.dtype = torch.float64) -> Params:
    return {"w": torch.tensor(values, dtype=dtype)}


def path(rule: Rule, merged: list[float]) -> list[float]:
    """Where the rule arrives at each merge."""
    state, places = rule.init(at(0.0)), []
    for each in merged:
        (result,), state = rule.update([Contribution(at(each))], state, Contribution(at(0.0)))
        places.append(result.params["w"].item())
    return places


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # From 10, merged 9: d = 1, v = 1, a step of .7 (1 + .9) = 1.33. Then merged 8: d = .67, v = 1.57.
        ({}, [10, 8.67, 8.67 - 0.7 * (0.67 + 0.9 * 1.57)]),
        ({"form": "heavy-ball", "mu": 0.5, "lr": 1.0}, [10, 9, 9 - (0.5 + 1)]),
        ({"form": "fedavg-m", "beta": 0.5, "gamma": 2.0}, [10, 9, 9 - 2 * (0.5 * 1 + 0.5 * 0.5)]),
    ],
)
def test_steps_are_the_formulas(arguments: dict[str, Any], expected: list[float]) -> None:
    assert path(outer(**arguments), [10, 9, 8]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"form": "fedavg-m", "beta": 1.0, "gamma": 1.0},
        {"form": "nesterov", "mu": 0.0, "lr": 1.0},
        {"form": "heavy-ball", "mu": 0.0, "lr": 1.0},
    ],
)
def test_some_arguments_are_no_momentum(arguments: dict[str, Any]) -> None:
    assert path(outer(**arguments), [10, 9, 3, -5]) == [10, 9, 3, -5]


def test_nesterov_is_that_of_an_optimizer() -> None:
    weight = torch.nn.Parameter(torch.tensor([10.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    merged, expected = [10.0], [10.0]
    for step in range(5):
        towards = weight.item() - 1 / (step + 1)
        merged.append(towards)
        weight.grad = weight.detach() - towards
        optimizer.step()
        expected.append(weight.item())

    assert path(outer(), merged) == pytest.approx(expected)


def test_on_a_linear_loss_it_is_the_papers_local_form() -> None:
    """K local steps by beta g_i + (1 - beta) G against plain local steps and the momentum at the merge."""
    beta, rate, steps, ratio = 0.1, 0.05, 8, 1.5
    gradients = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, direction = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    rule = outer(form="fedavg-m", beta=beta, gamma=ratio)
    local = Contribution({"w": x})
    (first,), state = rule.update([local], rule.init(local.params), local)
    ours = first.params["w"]
    for of_round in gradients:
        ends = []
        for gradient in of_round:
            y = x.clone()
            for _ in range(steps):
                y -= rate * (beta * gradient + (1 - beta) * direction)
            ends.append(y)
        direction = (x - torch.stack(ends).mean(0)) / (rate * steps)
        x = x - ratio * rate * steps * direction  # the paper's gamma

        plain = torch.stack([ours - rate * steps * gradient for gradient in of_round]).mean(0)
        (merged,), state = rule.update([Contribution({"w": plain})], state, local)
        ours = merged.params["w"]

        assert torch.allclose(ours, x, rtol=0, atol=1e-12)


def test_where_nothing_came_the_next_step_starts_from_the_local_model_and_keeps_its_velocity() -> None:
    rule = build(["mean", {"name": "momentum.outer", "form": "heavy-ball", "mu": 0.5, "lr": 1.0}])
    state = rule.init(at(10.0))
    for own in (10.0, 8.0):
        params, state = merge(rule, [Contribution(at(own))], state, Contribution(at(own + 1e-9)))

    alone, state = merge(rule, [], state, Contribution(at(3.0)))
    after, _ = merge(rule, [Contribution(at(2.0))], state, Contribution(at(2.0 + 1e-9)))

    assert params["w"].item() == pytest.approx(8)
    assert alone["w"].item() == 3.0
    assert after["w"].item() == pytest.approx(3 - (0.5 * 2 + 1))


def test_new_statistics_alone_are_no_step() -> None:
    """As where nothing came and a rule before this one has re-estimated BatchNorm's statistics."""
    rule, own = outer(), {"w": torch.ones(2), "bn.running_mean": torch.zeros(2)}
    local = Contribution(own)
    _, state = rule.update([Contribution({**own, "w": torch.zeros(2)})], rule.init(own), local)

    (result,), _ = rule.update([Contribution({**own, "bn.running_mean": torch.ones(2)})], state, local)

    assert result.params["w"] is own["w"]
    assert result.params["bn.running_mean"].tolist() == [1.0, 1.0]


def test_counters_and_running_statistics_are_as_merged() -> None:
    def params(value: float) -> Params:
        names = ("w", "bn.running_mean", "bn.running_var")
        return {name: torch.full((2,), value) for name in names} | {"bn.num_batches_tracked": torch.tensor(7)}

    rule, local = outer(), Contribution(params(0.0))
    _, state = rule.update([Contribution(params(10.0))], rule.init(local.params), local)

    (merged,), _ = rule.update([Contribution(params(1.0))], state, local)

    assert merged.params["w"].tolist() == pytest.approx([10 - 0.7 * 1.9 * 9] * 2)
    for name in ("bn.running_mean", "bn.running_var"):
        assert merged.params[name].tolist() == [1.0, 1.0]
    assert merged.params["bn.num_batches_tracked"].item() == 7


@pytest.mark.parametrize(
    ("dtype", "start", "to"),
    [(torch.float16, 6e4, -6e4), (torch.float32, 3e38, -3e38), (torch.float64, 1e308, -1e308)],
)
def test_a_step_out_of_range_is_not_made_and_its_velocity_forgotten(
    dtype: torch.dtype, start: float, to: float
) -> None:
    rule, local = outer(mu=0.9, lr=3.0), Contribution(at(0.0, dtype=dtype))
    _, state = rule.update([Contribution(at(start, dtype=dtype))], rule.init(local.params), local)

    (stays,), state = rule.update([Contribution(at(to, dtype=dtype))], state, local)
    (later,), _ = rule.update([Contribution(at(to, dtype=dtype))], state, local)

    assert torch.equal(stays.params["w"], at(to, dtype=dtype)["w"])
    assert torch.equal(later.params["w"], at(to, dtype=dtype)["w"])


def test_what_it_remembers_is_no_view_of_what_it_was_given() -> None:
    rule, given = outer(form="heavy-ball", mu=0.0, lr=1.0), torch.tensor([10.0])
    local = Contribution({"w": torch.zeros(1)})
    _, state = rule.update([Contribution({"w": given})], rule.init(local.params), local)
    given.fill_(1000.0)

    (merged,), _ = rule.update([Contribution({"w": torch.tensor([9.0])})], state, local)

    assert merged.params["w"].item() == 9.0


@pytest.mark.parametrize("count", [0, 2])
def test_it_takes_one_contribution(count: int) -> None:
    with pytest.raises(
        ValueError, match=f"takes one contribution, not {count}: put it behind a rule that reduces"
    ):
        outer().update([Contribution(at(1.0))] * count, None, Contribution(at(1.0)))


@pytest.mark.parametrize("specs", [["momentum.outer"], ["momentum.outer", "mean"]])
def test_a_list_in_which_nothing_reduces_before_it_is_refused(specs: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape("rules[0]: ") + ".*mean"):
        build(specs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "adam"}, "form must be one of fedavg-m, nesterov, heavy-ball, not 'adam'"),
        ({"mu": 1}, "mu must be a number from 0 to below 1, not 1"),
        ({"lr": 0}, "lr must be a number above 0, not 0"),
        ({"beta": 0}, "beta must be a number above 0, up to 1, not 0"),
        ({"gamma": float("nan")}, "gamma must be a number above 0, not nan"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        outer(**arguments)


def test_half_precision_moves_by_less_than_its_own_rounding() -> None:
    """The velocity is kept wider than the model: many small steps are not lost in it."""
    rule = outer(form="fedavg-m", beta=0.001, gamma=1.0)
    local = Contribution(at(0.0, dtype=torch.float16))
    _, state = rule.update([Contribution(at(1.0, dtype=torch.float16))], rule.init(local.params), local)
    _, after = rule.update([Contribution(at(0.999, dtype=torch.float16))], state, local)

    velocity: Tensor = after.velocity["w"]
    assert velocity.dtype == torch.float32
    assert velocity.item() == pytest.approx(1e-6, rel=0.1)
