"""Weights by age, merit and participation, and the mean of all models: the numbers by hand and from the papers."""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aggregation.base import Contribution, Local, Receiver, Rule, State
from aggregation.rules import build, merge
from aggregation.weighting import (
    MAX_SOURCES,
    TINY,
    Intervals,
    fedavg,
    floored_powers,
    metric,
    metric_weights,
    observed,
    own_share,
    participation,
    staleness,
    window,
)


def one(value: float = 1.0, weight: float = 1.0, staleness: int = 0, source: str = "peer") -> Contribution:
    return Contribution({"w": torch.tensor([value], dtype=torch.float64)}, weight, staleness, source)


LOCAL = one(0.0, source="me")


def weights_of(
    rule: Rule, received: list[Contribution], local: Contribution = LOCAL, state: State = None
) -> list[float]:
    left, _ = rule.update(received, rule.init(local.params) if state is None else state, local)
    return [other.weight for other in left]


# --- fedavg ---------------------------------------------------------------------------------------------
def test_fedavg_is_the_weighted_mean_of_all_models() -> None:
    (merged,), _ = fedavg().update([one(4.0, 2.0), one(7.0, 5.0)], (), one(1.0, 3.0))

    assert merged.params["w"].item() == pytest.approx((3 * 1 + 2 * 4 + 5 * 7) / 10, rel=1e-15)
    assert merged.weight == 7
    assert [(part.share, part.params["w"].item()) for part in merged.parts] == [
        (pytest.approx(2 / 7), 4.0),
        (pytest.approx(5 / 7), 7.0),
    ]


def test_fedavg_does_not_mind_the_order() -> None:
    generator = random.Random(5)
    received = [
        one(generator.gauss(0, 1), generator.uniform(0.1, 900), source=str(index)) for index in range(9)
    ]
    (first,), _ = fedavg().update(received, (), LOCAL)
    (second,), _ = fedavg().update(received[::-1], (), LOCAL)

    assert first.params["w"].item() == pytest.approx(second.params["w"].item(), abs=1e-12)


def test_what_is_very_stale_leaves_the_own_model_and_what_is_a_little_stale_counts_half() -> None:
    (stale,), _ = fedavg(2.0).update([one(9.0, staleness=10**7)], (), one(1.0))
    (half,), _ = fedavg(2.0).update([one(4.0, staleness=2)], (), one(1.0))

    assert stale.params["w"].item() == 1.0
    assert half.params["w"].item() == pytest.approx(2.0)  # 1 at weight 1, 4 at weight 1/2


@pytest.mark.parametrize(
    ("own", "others", "share"), [(3, [1], 0.75), (1, [1, 2], 0.25), (1.7e308, [1.7e308], 0.5)]
)
def test_the_own_share_is_the_own_weight_in_all_weights(
    own: float, others: list[float], share: float
) -> None:
    assert own_share([one(weight=each) for each in others], one(weight=own)) == share


# --- staleness ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [1, 2**-0.5, 0.5, 0.1]),
        ({"a": 1}, [1, 1 / 2, 1 / 4, 1 / 100]),
        ({"kind": "hinge", "a": 10, "b": 2}, [1, 1, 1 / 11, 1 / 971]),
        ({"kind": "exponential", "half_life": 3}, [1, 2 ** (-1 / 3), 0.5, 2**-33]),
        ({"a": 0}, [1, 1, 1, 1]),
    ],
)
def test_weights_fall_by_the_chosen_function_of_staleness(
    arguments: dict[str, Any], expected: list[float]
) -> None:
    received = [one(weight=2.0, staleness=each) for each in (0, 1, 3, 99)]

    assert weights_of(staleness(**arguments), received) == pytest.approx([2 * each for each in expected])


@pytest.mark.parametrize("kind", ["polynomial", "hinge", "exponential"])
def test_no_weight_underflows_and_the_freshest_of_stale_ones_leads(kind: str) -> None:
    received = [one(staleness=each) for each in (10**6, 10**9, 10**300)]

    weights = weights_of(staleness(kind, a=60.0, half_life=1e-3), received)

    assert weights[0] > weights[1] >= weights[2] >= TINY**2


def test_the_floor_is_relative_to_the_largest() -> None:
    assert floored_powers([-1e9, -1e9 - 1]) == [TINY, TINY / 2]
    assert floored_powers([-math.inf, -math.inf]) == [TINY, TINY]
    assert floored_powers([]) == []


# --- metric ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("power", "expected"),
    [(0, [1 / 3] * 3), (1, [1 / 7, 2 / 7, 4 / 7]), (2, [0.047619, 0.190476, 0.761905])],
)
def test_metric_weights_have_the_papers_numbers(power: float, expected: list[float]) -> None:
    assert metric_weights([1.0, 0.5, 0.25], power) == pytest.approx(expected, abs=5e-7)


def test_a_loss_of_zero_takes_the_whole_and_two_share_it() -> None:
    assert metric_weights([0.0, 1.0], 1) == pytest.approx([1, 0], abs=1e-11)
    assert metric_weights([0.0, 1.0, -1.0], 1) == pytest.approx([0.5, 0, 0.5], abs=1e-11)
    assert all(weight > 0 for weight in metric_weights([1e-300, 1e300, 1.0], 1e308))
    assert metric_weights([], 1) == []


class Constant(nn.Module):
    """Says w whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x))


def close(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"accuracy": ((outputs - targets).abs() < 1).double().mean().item()}


def judge(targets: list[float]) -> Local:
    """A receiver whose loss of the model w is the mean absolute difference to `targets`."""
    held_out = torch.zeros(len(targets)), torch.tensor(targets, dtype=torch.float64)
    receiver = Receiver(Constant(), F.l1_loss, close, held_out, held_out)
    return Local(LOCAL.params, 1.0, 0, "me", receiver=receiver)


def test_weights_follow_the_receivers_own_loss_and_keep_their_sum() -> None:
    received = [one(1.0, 30.0), one(0.5, 30.0), one(0.25, 30.0)]

    assert weights_of(metric(), received, judge([0.0])) == pytest.approx([90 / 7, 180 / 7, 360 / 7])
    assert weights_of(metric(0), received, judge([0.0])) == [30.0, 30.0, 30.0]


def test_weights_multiply_what_they_were() -> None:
    received = [one(1.0, 1.0), one(0.5, 3.0)]

    # 1 * 1 and 3 * 2, brought back to a sum of 4
    assert weights_of(metric(), received, judge([0.0])) == pytest.approx([4 / 7, 24 / 7])


def test_by_accuracy_the_share_of_wrong_answers_is_the_loss() -> None:
    received = [one(0.5), one(2.5)]

    # 0.5 is close to three of four, 2.5 to one: wrong are 1/4 and 3/4
    assert weights_of(metric(by="accuracy"), received, judge([0, 1, 1.2, 2.4])) == pytest.approx([1.5, 0.5])


def test_a_model_whose_loss_is_no_number_is_dropped_and_where_all_are_the_local_model_stays() -> None:
    rule, local = build([{"name": "weight.metric"}, {"name": "mean", "conservative": 0}]), judge([0.0])
    broken = one(1e308), judge([-1e308, -1e308])

    one_left, state = merge(rule, [one(3.0), one(1.0)], rule.init(local.params), local)
    none_left, after = merge(rule, [broken[0]], state, broken[1])

    assert one_left["w"].item() == pytest.approx((3 / 3 + 1 / 1) / (1 / 3 + 1))
    assert rule.report(state) == {"dropped": 0, "best_loss": 1.0}
    assert none_left["w"].item() == 0.0
    assert rule.report(after) == {"dropped": 1}


def test_without_validation_samples_the_operator_is_told() -> None:
    receiver = Receiver(Constant(), F.l1_loss, close, (torch.zeros(1), torch.zeros(1)))

    with pytest.raises(ValueError, match="hold some out"):
        metric().update([one()], {}, Local(LOCAL.params, receiver=receiver))
    with pytest.raises(ValueError, match="pass a Local with a Receiver"):
        metric().update([one()], {}, LOCAL)


# --- participation --------------------------------------------------------------------------------------
def used(pattern: str, at_most: int = 10**5) -> list[float]:
    """The weight in each round, known before it, of a client that takes part where `pattern` has a 1."""
    intervals, weights = Intervals(), []
    for each in pattern.replace(" ", ""):
        weights.append(intervals.weight)
        intervals = observed(intervals, each == "1", at_most)
    return weights


def test_participation_weights_are_the_papers_sequence() -> None:
    assert used("0 0 1 1 0 0 0 1 1") == pytest.approx([1, 1, 1, 3, 2, 2, 2, 2, 8 / 3])


def test_who_takes_part_every_fourth_round_counts_four_times() -> None:
    assert used("0001" * 5)[4:] == [4.0] * 16


def test_an_interval_limit_of_one_turns_it_off_and_any_limit_bounds_the_weight() -> None:
    assert used("0010010001", at_most=1) == [1.0] * 10
    assert max(used("0" * 1000 + "1", at_most=50)) == 50


@pytest.mark.parametrize("probability", [0.1, 0.4])
def test_the_weight_tends_to_one_over_the_probability(probability: float) -> None:
    generator = random.Random(11)
    pattern = "".join("1" if generator.random() < probability else "0" for _ in range(20_000))

    assert used(pattern)[-1] == pytest.approx(1 / probability, rel=0.05)


def series(rule: Rule, rounds: list[str]) -> list[dict[str, float]]:
    """For each merge the weights by source; a source is one letter, and its own weight is 1."""
    state, seen = rule.init(LOCAL.params), []
    for sources in rounds:
        left, state = rule.update([one(source=source) for source in sources], state, LOCAL)
        seen.append({other.source: other.weight for other in left})
    return seen


def test_a_source_counts_by_its_mean_interval_in_earlier_merges() -> None:
    seen = series(participation(), ["ab", "a", "a", "ab", "", "ab"])

    assert [each.get("a") for each in seen] == [1, 1, 1, 1, None, 1]
    # b's intervals are 1 and 3, and the merge in which nothing came is none
    assert [each.get("b") for each in seen] == [1, None, None, 1, None, 2]


# --- windows --------------------------------------------------------------------------------------------
def test_a_source_counts_by_the_merges_since_its_last_contribution() -> None:
    seen = series(window(), ["a", "b", "", "ab", "a"])

    assert seen == [{"a": 1}, {"b": 1}, {}, {"a": 3, "b": 2}, {"a": 1}]


def test_over_a_long_run_every_client_counts_its_weight_a_window() -> None:
    took = {"a": 1.0, "b": 2.5, "c": 7.0}  # in windows; FedFix's vector is that of b: 0.25 * 3 = 0.75
    wanted = {"a": 0.5, "b": 0.25, "c": 0.25}
    rule, sums = window(), dict.fromkeys(took, 0.0)
    state = rule.init(LOCAL.params)
    for step in range(1, 4201):
        came = [one(weight=wanted[name], source=name) for name in took if step % math.ceil(took[name]) == 0]
        left, state = rule.update(came, state, LOCAL)
        for other in left:
            sums[other.source] += other.weight
            if other.source == "b" and step > 3:
                assert other.weight == 0.75

    assert {name: total / 4200 for name, total in sums.items()} == pytest.approx(wanted, rel=2e-3)


def test_a_long_absence_counts_up_to_the_limit() -> None:
    assert series(window(at_most=5), ["a", *[""] * 100, "a"])[-1] == {"a": 5}


@pytest.mark.parametrize("rule", [participation(), window()], ids=["participation", "window"])
def test_a_stream_of_new_names_does_not_grow_the_memory(rule: Rule) -> None:
    state = rule.init(LOCAL.params)
    for step in range(30):
        _, state = rule.update([one(source=f"{step} {index}") for index in range(100)], state, LOCAL)

    remembered = state if isinstance(state, dict) else state.last
    assert len(remembered) == MAX_SOURCES
    assert "29 99" in remembered
    assert "0 0" not in remembered


# --- arguments ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedavg(0), "staleness_half_life must be None or a number of rounds above 0, not 0"),
        (lambda: staleness("linear"), "kind must be one of polynomial, hinge, exponential, not 'linear'"),
        (lambda: staleness(a=-1), "a must be a number of at least 0, not -1"),
        (lambda: staleness(b=math.nan), "b must be a number of rounds of at least 0, not nan"),
        (lambda: staleness(half_life=0), "half_life must be a number of rounds above 0, not 0"),
        (lambda: metric(power=-1), "power must be a number of at least 0, not -1"),
        (lambda: metric(by="f1"), "by must be one of loss, accuracy, not 'f1'"),
        (lambda: participation(0), "at_most must be a whole number of at least 1, not 0"),
        (lambda: participation(True), "at_most must be a whole number of at least 1, not True"),
        (lambda: window(1.5), "at_most must be a whole number of at least 1, not 1.5"),  # type: ignore[arg-type]
    ],
)
def test_an_argument_out_of_range_is_refused(make: Callable[[], Rule], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
