"""`averaging.mean`: the numbers by hand, what is averaged, what is kept; and that tiles are not to be seen."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregation import averaging
from aggregation.averaging import TILE_ENTRIES, empty_like, mean, moments, population_variance, tiles
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


# --- what is fast is right --------------------------------------------------------------------------------
def plain_mean(received: Sequence[Contribution], own: Tensor, conservative: float) -> Tensor:
    """What `mean` is to give, taken as it is written down, in float64."""
    total = sum(other.weight for other in received)
    average = sum(other.params["w"].double() * (other.weight / total) for other in received)
    return conservative * own.double() + (1 - conservative) * average


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T.contiguous().T,
    "every second entry": lambda tensor: tensor.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda tensor: tensor[:1].expand_as(tensor),
}
large = pytest.mark.parametrize(
    "shape", [(1, TILE_ENTRIES + 1), (3 * TILE_ENTRIES // 2, 2), (700, 700)], ids=str
)


@pytest.mark.parametrize("own", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_any_layout_gives_the_plain_mean(own: str, other: str) -> None:
    local = one(LAYOUTS[own](normal(1, 40, 30)))
    received = [one(LAYOUTS[other](normal(2, 40, 30)), weight=2), one(normal(3, 40, 30), weight=3)]

    result = run(mean(0.3), received, local).params["w"]

    assert torch.allclose(result.double(), plain_mean(received, local.params["w"], 0.3), rtol=0, atol=1e-6)


@large
@pytest.mark.parametrize("layout", ["row-major", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_several_tiles_give_the_plain_mean(
    shape: tuple[int, int], layout: str, dtype: torch.dtype
) -> None:
    received = [one(LAYOUTS[layout](normal(seed, *shape).to(dtype)), weight=seed) for seed in (1, 2, 3)]
    local = one(normal(4, *shape).to(dtype))

    result = run(mean(), received, local).params["w"]

    expected = plain_mean(received, local.params["w"], 0.5)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_size_of_the_tiles_does_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    received = [one(normal(seed, 13, 7).to(dtype), weight=seed) for seed in (1, 2, 3)]
    local = one(normal(4, 13, 7).to(dtype))
    whole = run(mean(), received, local).params["w"]

    for entries in (1, 8, 90):
        monkeypatch.setattr(averaging, "TILE_ENTRIES", entries)
        assert torch.equal(run(mean(), received, local).params["w"], whole)


def test_a_tile_that_leaves_its_range_is_averaged_wide_and_the_others_are_as_they_would_be() -> None:
    top = torch.finfo(torch.float32).max
    tensors = [normal(seed, 3 * TILE_ENTRIES) for seed in (1, 2, 3)]
    without = run(mean(), [one(tensors[0]), one(tensors[1])], one(tensors[2])).params["w"]
    changed = [tensor.clone() for tensor in tensors]
    for tensor, value in zip(changed, (top, -top, 1.0), strict=True):
        tensor[TILE_ENTRIES + 5] = value

    result = run(mean(), [one(changed[0]), one(changed[1])], one(changed[2])).params["w"]

    assert result[TILE_ENTRIES + 5].item() == pytest.approx(0.5)
    assert torch.equal(result[:TILE_ENTRIES], without[:TILE_ENTRIES])
    assert torch.equal(result[2 * TILE_ENTRIES :], without[2 * TILE_ENTRIES :])
    middle = slice(TILE_ENTRIES + 6, 2 * TILE_ENTRIES)
    assert torch.allclose(result[middle], without[middle], rtol=0, atol=1e-6)


def test_values_whose_difference_leaves_float64_are_not_written_into() -> None:
    tensors = [vector(1.7e308, 1.0), vector(-1.7e308, 2.0), vector(0.0, 3.0)]

    result = run(mean(), [one(tensors[0]), one(tensors[1])], one(tensors[2])).params["w"]

    assert result[1].item() == 2.25
    assert [tensor.tolist() for tensor in tensors] == [[1.7e308, 1.0], [-1.7e308, 2.0], [0.0, 3.0]]


@pytest.mark.parametrize("count", [1, 8, 300])
def test_rounding_grows_with_the_number_of_models_no_faster_than_its_root(count: int) -> None:
    received = [one(1 + normal(seed, 1000)) for seed in range(count)]

    result = run(mean(conservative=0), received, one(torch.zeros(1000))).params["w"]

    gap = (result.double() - plain_mean(received, torch.zeros(1000), 0.0)).abs().max().item()
    assert gap <= 2 * math.sqrt(count) * torch.finfo(torch.float32).eps


@settings(derandomize=True, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    entries=st.integers(1, 130),
    is_flipped=st.booleans(),
)
def test_tiles_hold_every_entry_once_and_the_same_of_each_tensor(
    shape: list[int], entries: int, is_flipped: bool
) -> None:
    counted, backwards = torch.arange(math.prod(shape)).reshape(shape), list(reversed(range(len(shape))))
    other = counted.permute(backwards).contiguous().permute(backwards) if is_flipped else counted.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averaging, "TILE_ENTRIES", entries)
        found = list(tiles(counted, other))

    assert all(torch.equal(left, right) for left, right in found)
    assert torch.equal(torch.cat([left.reshape(-1) for left, _ in found]), counted.reshape(-1))
    assert all(left.untyped_storage().data_ptr() == counted.untyped_storage().data_ptr() for left, _ in found)
    if not is_flipped:
        assert all(left.numel() <= entries for left, _ in found)


def test_new_tensors_have_memory_of_their_own() -> None:
    params = {
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "matrix": torch.zeros(4, 5).T,
    }

    made = empty_like(params)

    assert list(made) == list(params)
    for number, (name, tensor) in enumerate(made.items()):
        assert (tensor.dtype, tensor.shape) == (params[name].dtype, params[name].shape)
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in made.values()] == [[0], [], [2], [3]]
    assert empty_like({}) == {}


# --- means and variances ----------------------------------------------------------------------------------
def plain_moments(tensor: Tensor) -> tuple[float, float]:
    wide = tensor.double()
    return wide.mean().item(), wide.var(correction=0).item()


@large
@pytest.mark.parametrize("layout", ["row-major", "transposed"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, 1e-12), (torch.float32, 1e-8), (torch.float64, 1e-12)]
)
def test_moments_of_large_tensors(
    shape: tuple[int, int], layout: str, dtype: torch.dtype, precision: float
) -> None:
    tensor = LAYOUTS[layout]((0.3 + normal(1, *shape)).to(dtype))

    centre, variance = moments(tensor)

    expected = plain_moments(tensor)
    assert centre == pytest.approx(expected[0], abs=precision)
    assert variance == pytest.approx(expected[1], rel=precision)


@pytest.mark.parametrize("entries", [5, TILE_ENTRIES + 5, 2 * TILE_ENTRIES])
@pytest.mark.parametrize(
    ("centre", "spread"), [(0.0, 1e30), (0.0, 1e-30), (0.0, 1e-42), (1000.0, 1e-2), (-1e30, 1e28), (7.0, 0.0)]
)
def test_moments_neither_leave_their_range_nor_cancel_out(entries: int, centre: float, spread: float) -> None:
    tensor = centre + spread * normal(1, entries)

    assert moments(tensor) == pytest.approx(plain_moments(tensor), rel=1e-9, abs=0)


def test_one_entry_beyond_the_range_of_squares_is_not_lost_among_many() -> None:
    tensor = normal(1, 2 * TILE_ENTRIES)
    tensor[7] = 1e25

    assert moments(tensor) == pytest.approx(plain_moments(tensor), rel=1e-9)


@pytest.mark.parametrize("shape", [(64, 64), (512,), (33, 31)])
def test_moments_of_small_tensors_are_as_precise_as_float64(shape: tuple[int, ...]) -> None:
    tensor = normal(1, *shape)

    assert moments(tensor) == pytest.approx(plain_moments(tensor), rel=1e-12)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_nothing_has_no_moments(shape: tuple[int, ...]) -> None:
    assert moments(torch.empty(shape)) == (0.0, 0.0)


def test_moments_of_a_parameter_that_requires_gradients() -> None:
    assert moments(torch.nn.Parameter(torch.tensor([1.0, 3.0]))) == (2.0, 1.0)


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
