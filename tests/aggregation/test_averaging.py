"""`averaging.mean`: the numbers by hand, what is averaged, what is kept."""

import math

import pytest
import torch
from torch import Tensor

from aggregation.averaging import mean, population_variance
from aggregation.base import Contribution, Part, Rule


def one(tensor: Tensor, weight: float = 1.0, staleness: int = 0, name: str = "w") -> Contribution:
    return Contribution({name: tensor}, weight=weight, staleness=staleness, source=f"{weight}@{staleness}")


def run(rule: Rule, received: list[Contribution], local: Contribution) -> Contribution:
    (result,), _ = rule.update(received, rule.init(local.params), local)
    return result


def vector(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def test_the_result_is_the_weighted_mean_mixed_with_the_local_model() -> None:
    received = [one(vector(1.0, 0.0), weight=1), one(vector(5.0, 8.0), weight=3)]

    result = run(mean(conservative=0.25), received, one(vector(8.0, 4.0)))

    # The mean is 4 and 6, of which the result takes three quarters.
    assert torch.allclose(result.params["w"], vector(5.0, 5.5), rtol=0, atol=1e-12)


def test_half_is_the_default_share_of_the_local_model() -> None:
    result = run(mean(), [one(vector(2.0))], one(vector(4.0)))

    assert result.params["w"].item() == 3.0


@pytest.mark.parametrize(("conservative", "expected"), [(0.0, 1e-9), (1.0, 1e9)])
def test_the_ends_of_the_range_are_the_plain_mean_and_the_local_model(
    conservative: float, expected: float
) -> None:
    result = run(mean(conservative), [one(vector(1e-9))], one(vector(1e9)))

    assert result.params["w"].item() == expected


def test_a_contribution_counts_half_after_each_half_life() -> None:
    received = [one(vector(7.0), weight=2), one(vector(1.0), weight=2, staleness=6)]

    result = run(mean(conservative=0, staleness_half_life=3), received, one(vector(0.0)))

    # shares 2 and 2 / 4
    assert result.params["w"].item() == pytest.approx((2 * 7 + 0.5 * 1) / 2.5, rel=1e-12)


def test_without_a_half_life_staleness_is_ignored() -> None:
    received = [one(vector(7.0)), one(vector(1.0), staleness=1000)]

    assert run(mean(conservative=0), received, one(vector(0.0))).params["w"].item() == 4.0


def test_contributions_that_are_all_very_stale_still_average() -> None:
    received = [one(vector(7.0), staleness=10**7), one(vector(1.0), staleness=10**7)]

    result = run(mean(conservative=0, staleness_half_life=0.5), received, one(vector(0.0)))

    assert result.params["w"].item() == 4.0


def test_a_share_that_underflows_counts_nothing_wherever_it_stands() -> None:
    stale, fresh = one(vector(7.0), staleness=10**7), one(vector(1.0))
    rule = mean(conservative=0, staleness_half_life=0.5)

    for received in ([stale, fresh], [fresh, stale], [stale, stale, fresh]):
        assert run(rule, received, one(vector(0.0))).params["w"].item() == 1.0


def test_with_nothing_received_the_local_model_is_left_as_it_is() -> None:
    local = one(vector(1.0, 2.0), weight=5)

    result = run(mean(), [], local)

    assert result.params["w"] is local.params["w"]
    assert result == local
    assert result.parts == ()


def test_counters_and_masks_keep_the_local_value() -> None:
    def params(count: int, mask: bool) -> dict[str, Tensor]:
        return {"bn.num_batches_tracked": torch.tensor(count), "mask": torch.tensor([mask])}

    result = run(mean(), [Contribution(params(100, True))], Contribution(params(7, False)))

    assert result.params["bn.num_batches_tracked"].item() == 7
    assert result.params["bn.num_batches_tracked"].dtype == torch.int64
    assert result.params["mask"].tolist() == [False]


@pytest.mark.parametrize("name", ["bn.running_mean", "bn.running_var", "bn.weight", "fc.bias"])
def test_floating_vectors_and_running_statistics_are_averaged(name: str) -> None:
    result = run(mean(), [one(vector(1.0, 3.0), name=name)], one(vector(3.0, 5.0), name=name))

    assert result.params[name].tolist() == [2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_wide_and_rounded_once(dtype: torch.dtype) -> None:
    values = [1.0] + [2.0**-10] * 64
    received = [one(vector(value, dtype=dtype)) for value in values]

    result = run(mean(conservative=0), received, one(vector(0.0, dtype=dtype)))

    assert result.params["w"].dtype == dtype
    assert torch.equal(result.params["w"], vector(math.fsum(values) / 65).to(dtype))


def test_opposite_extremes_of_float32_average_to_something_finite() -> None:
    top = torch.finfo(torch.float32).max
    received = [one(vector(top, dtype=torch.float32)), one(vector(-top, dtype=torch.float32))]

    result = run(mean(), received, one(vector(1.0, dtype=torch.float32)))

    assert result.params["w"].item() == pytest.approx(0.5)


def test_a_tensor_on_which_all_agree_is_handed_on_without_a_copy() -> None:
    local = Contribution({"frozen": vector(0.1, -0.0), "w": vector(1.0)})
    other = Contribution({"frozen": vector(0.1, -0.0), "w": vector(2.0)})

    result = run(mean(0.3), [other, other, other], local)

    assert result.params["frozen"] is local.params["frozen"]


def test_entries_on_which_all_agree_stay_to_the_bit_beside_others_that_move() -> None:
    agreed = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    received = [one(torch.cat([agreed, vector(value)]), weight=value) for value in (0.1, 0.7, 13.0)]

    result = run(mean(conservative=0.3), received, one(torch.cat([agreed, vector(0.0)])))

    assert torch.equal(result.params["w"][:-1], agreed)


def test_the_largest_weights_still_average_and_sum_to_a_number() -> None:
    received = [one(vector(value), weight=1.7e308) for value in (1.0, 2.0, 6.0)]

    result = run(mean(conservative=0), received, one(vector(0.0)))

    assert result.params["w"].item() == pytest.approx(3.0)
    assert math.isfinite(result.weight)


def test_the_result_says_what_it_was_made_of() -> None:
    received = [one(torch.zeros(2, 2), weight=2.5, staleness=3), one(torch.ones(2, 2), weight=4)]

    result = run(mean(staleness_half_life=1), received, one(torch.ones(2, 2), weight=100))

    assert (result.weight, result.source, len(result.parts), result.staleness) == (6.5, "merged", 2, 0)


def test_the_parts_are_the_received_models_and_their_shares() -> None:
    received = [one(vector(1.0), weight=1), one(vector(2.0), weight=3)]

    result = run(mean(staleness_half_life=5), received, one(vector(9.0)))

    assert [part.share for part in result.parts] == pytest.approx([0.25, 0.75])
    assert [part.params for part in result.parts] == [other.params for other in received]


def test_shares_decay_with_staleness_as_the_mean_does() -> None:
    received = [one(vector(1.0)), one(vector(2.0), staleness=1)]

    result = run(mean(staleness_half_life=1), received, one(vector(0.0)))

    assert [part.share for part in result.parts] == pytest.approx([2 / 3, 1 / 3])


def test_a_received_mean_stands_for_the_models_behind_it() -> None:
    behind = tuple(Part(share, one(vector(share)).params) for share in (0.25, 0.25, 0.5))
    partial = Contribution({"w": vector(0.0)}, parts=behind)
    plain = one(vector(8.0))

    result = run(mean(), [partial, plain], one(vector(1.0)))

    assert [part.share for part in result.parts] == pytest.approx([0.125, 0.125, 0.25, 0.5])
    assert [part.params["w"].item() for part in result.parts] == [0.25, 0.25, 0.5, 8.0]


def test_parameters_that_require_gradients_give_a_result_that_does_not() -> None:
    trained = torch.nn.Parameter(torch.ones(2, 2))

    result = run(mean(), [one(torch.zeros(2, 2))], one(trained))

    assert not result.params["w"].requires_grad
    assert result.params["w"].grad_fn is None


def test_population_variance_survives_squares_beyond_float32() -> None:
    assert population_variance(torch.tensor([1e30, -1e30])) == pytest.approx(1e60, rel=1e-6)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
def test_conservative_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="conservative must be a number from 0 to 1"):
        mean(conservative=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "3"])
def test_a_half_life_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="staleness_half_life must be None or a number of rounds above 0"):
        mean(staleness_half_life=value)
