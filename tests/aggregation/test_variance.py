"""`variance.corrected`: the worked numbers of arXiv 2404.04616, its invariants, and what passes through untouched."""

import math

import pytest
import torch
from torch import Tensor

from aggregation.averaging import TILE_ENTRIES, mean, population_variance
from aggregation.base import Contribution, Part, Rule, chain
from aggregation.variance import corrected


def one(tensor: Tensor, weight: float = 1.0, name: str = "w") -> Contribution:
    return Contribution({name: tensor}, weight=weight)


def run(rule: Rule, received: list[Contribution], local: Contribution) -> Contribution:
    (result,), _ = rule.update(received, rule.init(local.params), local)
    return result


def matrix(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype).reshape(2, -1)


def random_models(seed: int, count: int, *shape: int, spread: float = 1.0) -> list[Contribution]:
    generator = torch.Generator().manual_seed(seed)
    return [one(torch.randn(*shape, generator=generator, dtype=torch.float64) * spread) for _ in range(count)]


OWN = one(matrix(0, 2, 4, 6))
RECEIVED = [one(matrix(2, 2, 0, 4)), one(matrix(4, 0, 2, 2))]
# mixed [1.5, 1.5, 2.5, 4.5]: mean 2.5, population variance 1.5; variances: own 5, received 2 and 2


def stretched_to(target: float) -> Tensor:
    return 2.5 + (matrix(1.5, 1.5, 2.5, 4.5) - 2.5) * math.sqrt(target / 1.5)


def test_the_worked_vector_of_the_paper_digest() -> None:
    result = run(corrected(), RECEIVED, OWN)

    expected = matrix(1.345299462, 1.345299462, 2.5, 4.809401077)
    assert torch.allclose(result.params["w"], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("target", "wanted"), [("received", 2.0), ("own", 5.0), ("mixed", 0.5 * 5.0 + 0.5 * 2.0)]
)
def test_each_target_gives_the_variance_it_names(target: str, wanted: float) -> None:
    result = run(corrected(target=target), RECEIVED, OWN)

    assert torch.allclose(result.params["w"], stretched_to(wanted), rtol=0, atol=1e-12)
    assert population_variance(result.params["w"]) == pytest.approx(wanted, rel=1e-12)


def test_the_median_of_the_variances_is_not_moved_by_one_liar() -> None:
    liar = one(matrix(1000, -1000, 0, 0), weight=1e6)

    result = run(corrected(target="median"), [*RECEIVED, liar], OWN)

    assert population_variance(result.params["w"]) == pytest.approx(2.0, rel=1e-12)


def test_the_mixed_target_mixes_by_the_share_of_the_local_model() -> None:
    result = run(corrected(conservative=0.25, target="mixed"), RECEIVED, OWN)

    assert population_variance(result.params["w"]) == pytest.approx(0.25 * 5 + 0.75 * 2, rel=1e-12)


def test_received_variances_count_by_weight() -> None:
    received = [one(matrix(2, 2, 0, 4), weight=3), one(matrix(8, 0, 4, 4), weight=1)]

    result = run(corrected(), received, OWN)

    assert population_variance(result.params["w"]) == pytest.approx((3 * 2 + 8) / 4, rel=1e-12)


@pytest.mark.parametrize("target", ["received", "own", "mixed"])
def test_it_is_the_same_alone_and_behind_a_mean(target: str) -> None:
    received, local = random_models(1, 4, 8, 5), random_models(2, 1, 8, 5)[0]

    alone = run(corrected(0.3, target), received, local)
    chained = run(chain(mean(0.3), corrected(0.3, target)), received, local)

    assert torch.equal(alone.params["w"], chained.params["w"])
    assert (alone.weight, len(alone.parts)) == (chained.weight, len(chained.parts)) == (4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_tensor_of_several_tiles_is_stretched_as_a_whole(dtype: torch.dtype, is_transposed: bool) -> None:
    models = [model.params["w"].to(dtype) for model in random_models(3, 4, TILE_ENTRIES // 50, 120)]
    local, *received = [one(model.T if is_transposed else model) for model in models]
    before = [model.clone() for model in models]

    alone = run(corrected(), received, local).params["w"]
    chained = run(chain(mean(), corrected()), received, local).params["w"]

    plain = run(mean(), received, local).params["w"].double()
    target = sum(population_variance(other.params["w"]) for other in received) / 3
    scale = math.sqrt(target / plain.var(correction=0).item())
    expected = plain.mean() + scale * (plain - plain.mean())
    assert torch.allclose(alone.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-8)
    assert torch.equal(alone, chained)
    assert all(torch.equal(model, original) for model, original in zip(models, before, strict=True))


def test_the_mean_that_it_was_given_is_not_written_into() -> None:
    (merged,), _ = mean().update(RECEIVED, (), OWN)
    before = merged.params["w"].clone()

    result = run(corrected(), [merged], OWN)

    assert not torch.equal(result.params["w"], before)
    assert torch.equal(merged.params["w"], before)


def test_the_local_model_is_not_written_into_where_all_agree_but_not_those_behind_them() -> None:
    own = matrix(0, 2, 4, 6)
    wider = Contribution({"w": own.clone()}, parts=(Part(1.0, {"w": 2 * own}),))

    result = run(corrected(conservative=0), [wider, one(own.clone())], one(own))

    assert torch.equal(own, matrix(0, 2, 4, 6))
    assert population_variance(result.params["w"]) == pytest.approx((4 * 5 + 5) / 2, rel=1e-12)


def test_parameters_that_require_gradients_give_a_result_that_does_not() -> None:
    received = [one(torch.nn.Parameter(other.params["w"])) for other in RECEIVED]

    result = run(chain(mean(), corrected()), received, one(torch.nn.Parameter(OWN.params["w"].clone())))

    assert torch.allclose(result.params["w"], stretched_to(2.0), rtol=0, atol=1e-12)
    assert not result.params["w"].requires_grad


def test_stale_contributions_fade_when_it_averages_itself() -> None:
    received = [Contribution({"w": matrix(1, 2, 3, 4)}, staleness=10**6), one(matrix(2, 2, 0, 4))]

    result = run(corrected(staleness_half_life=1), received, OWN)

    assert torch.allclose(result.params["w"], run(corrected(), received[1:], OWN).params["w"], atol=1e-12)


def test_a_single_mean_is_corrected_without_another_averaging() -> None:
    behind = (Part(0.5, {"w": matrix(9, 9, 5, 5)}), Part(0.5, {"w": matrix(0, 0, 4, 4)}))
    merged = Contribution({"w": matrix(1, 1, 3, 3)}, parts=behind)

    result = run(corrected(), [merged], OWN)

    assert torch.allclose(result.params["w"], matrix(0, 0, 4, 4), rtol=0, atol=1e-12)


def test_averaging_uncorrelated_models_shrinks_variance_by_the_law() -> None:
    received, local = random_models(7, 3, 100, 200), random_models(8, 1, 100, 200)[0]

    plain = population_variance(run(mean(conservative=0), received, local).params["w"])
    conserved = population_variance(run(mean(conservative=0.5), received, local).params["w"])

    assert plain == pytest.approx(1 / 3, rel=0.03)
    assert conserved == pytest.approx(1 / 4 + 1 / 12, rel=0.03)


@pytest.mark.parametrize("conservative", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_correction_reaches_the_target_and_keeps_the_mean(seed: int, conservative: float) -> None:
    received, local = random_models(seed, 6, 20, 10, spread=0.05), random_models(seed + 100, 1, 20, 10)[0]

    plain = run(mean(conservative), received, local).params["w"]
    result = run(corrected(conservative), received, local).params["w"]

    target = sum(population_variance(other.params["w"]) for other in received) / 6
    assert population_variance(result) == pytest.approx(target, rel=1e-9)
    assert result.mean().item() == pytest.approx(plain.mean().item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_plain_mean_is_never_squeezed(seed: int) -> None:
    received, local = random_models(seed, 4, 6, 6), random_models(seed + 100, 1, 6, 6)[0]

    plain = run(mean(conservative=0), received, local).params["w"]
    result = run(corrected(conservative=0), received, local).params["w"]

    assert population_variance(result) > population_variance(plain)


@pytest.mark.parametrize("target", ["received", "own", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_agreement_gives_the_very_same_tensor(dtype: torch.dtype, target: str) -> None:
    tensor = torch.randn(7, 3, generator=torch.Generator().manual_seed(3)).to(dtype)
    received = [one(tensor.clone(), weight=weight) for weight in (0.1, 0.7, 13.0)]
    local = one(tensor)

    assert run(corrected(0.3, target), received, local).params["w"] is tensor


@pytest.mark.parametrize("factor", [1e-18, 1e-9, 0.1, 3.0, -2.0, 1e15])
def test_a_common_factor_comes_out_as_that_factor(factor: float) -> None:
    models = random_models(11, 5, 6, 4)
    scaled = [one(model.params["w"] * factor) for model in models]

    result = run(corrected(), models[1:], models[0]).params["w"]
    result_scaled = run(corrected(), scaled[1:], scaled[0]).params["w"]

    assert torch.allclose(result_scaled / factor, result, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["fc.bias", "bn.weight", "bn.running_mean", "bn.running_var"])
def test_one_dimensional_tensors_are_averaged_and_not_stretched(name: str) -> None:
    received = [
        one(torch.tensor([1.0, -1.0, 3.0]), name=name),
        one(torch.tensor([-1.0, 1.0, 3.0]), name=name),
    ]

    result = run(corrected(conservative=0), received, one(torch.zeros(3), name=name))

    assert result.params[name].tolist() == [0.0, 0.0, 3.0]


@pytest.mark.parametrize("name", ["bn.running_mean", "bn.running_var"])
def test_running_statistics_are_not_stretched_in_any_shape(name: str) -> None:
    received = [one(matrix(1, 3, 2, 4), name=name), one(matrix(3, 1, 2, 8), name=name)]

    result = run(corrected(conservative=0), received, one(matrix(0, 0, 0, 0), name=name))

    assert result.params[name].tolist() == [[2, 2], [2, 6]]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_a_constant_tensor_passes_through(value: float) -> None:
    constant = torch.full((3, 5), value)

    result = run(corrected(conservative=0), [one(constant.clone()), one(constant.clone())], one(constant))

    assert torch.equal(result.params["w"], constant)


def test_models_that_cancel_out_are_not_blown_up_from_rounding() -> None:
    (model,) = random_models(5, 1, 4, 4)
    thirds = [one(model.params["w"] * factor) for factor in (0.1, 0.2, -0.3)]

    plain = run(mean(conservative=0), thirds, model).params["w"]
    result = run(corrected(conservative=0), thirds, model).params["w"]

    assert 0 < population_variance(plain) < 1e-30
    assert torch.equal(result, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_that_wobble_by_rounding_are_not_stretched(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    wobble = torch.finfo(dtype).eps
    models = [one(1 + wobble * torch.randint(0, 4, (9, 9), generator=generator).to(dtype)) for _ in range(4)]

    result = run(corrected(), models[1:], models[0]).params["w"]

    assert torch.equal(result, run(mean(), models[1:], models[0]).params["w"])


def test_received_constants_do_not_erase_the_local_spread() -> None:
    result = run(corrected(), [one(matrix(0, 0, 0, 0))], OWN)

    assert torch.equal(result.params["w"], matrix(0, 1, 2, 3))


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 0, 2)])
def test_tensors_too_small_to_have_a_spread_pass_through(shape: tuple[int, ...]) -> None:
    result = run(corrected(), [one(torch.ones(shape))], one(torch.zeros(shape)))

    assert torch.equal(result.params["w"], torch.full(shape, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_reaches_the_target_to_its_own_rounding(dtype: torch.dtype) -> None:
    received = [one(other.params["w"].to(dtype)) for other in random_models(21, 4, 30, 30, spread=0.02)]
    local = one(random_models(22, 1, 30, 30, spread=0.02)[0].params["w"].to(dtype))

    result = run(corrected(), received, local).params["w"]

    target = sum(population_variance(other.params["w"]) for other in received) / 4
    assert result.dtype == dtype
    assert population_variance(result) == pytest.approx(target, rel=torch.finfo(dtype).eps)


def test_variances_far_below_the_reference_codes_epsilon_are_corrected_in_full() -> None:
    received, local = random_models(31, 3, 30, 30, spread=1e-4), random_models(32, 1, 30, 30, spread=1e-4)[0]

    result = run(corrected(), received, local).params["w"]

    target = sum(population_variance(other.params["w"]) for other in received) / 3
    assert population_variance(result) == pytest.approx(target, rel=1e-9)


@pytest.mark.parametrize(("max_scale", "scale"), [(1.0, 1.0), (2.0, 2.0), (None, 1.5 * math.sqrt(3))])
def test_the_scale_stops_at_its_limit(max_scale: float | None, scale: float) -> None:
    # The mean keeps a hundredth of each model's spread; two models were received.
    received = [one(matrix(101, -99, 99, -101)), one(matrix(-99, 101, -101, 99))]

    result = run(corrected(conservative=0, max_scale=max_scale), received, OWN)

    assert torch.allclose(result.params["w"], matrix(1, 1, -1, -1) * scale, rtol=0, atol=1e-12)


def test_the_limit_counts_the_models_behind_a_mean() -> None:
    behind = tuple(Part(1 / 8, {"w": matrix(100, 100, -100, -100)}) for _ in range(8))
    merged = Contribution({"w": matrix(1, 1, -1, -1)}, parts=behind)

    assert run(corrected(), [merged], OWN).params["w"].max().item() == pytest.approx(4.5)


def test_a_stretch_beyond_the_dtypes_range_is_left_out() -> None:
    top = 65000.0
    received = [
        one(matrix(top, -top, 0, 0, dtype=torch.float16)),
        one(matrix(top, 0, 0, top, dtype=torch.float16)),
    ]
    local = one(matrix(top, 0, -top, 0, dtype=torch.float16))

    result = run(corrected(), received, local).params["w"]

    assert torch.equal(result, run(mean(), received, local).params["w"])


def test_variances_beyond_float64_leave_the_mean() -> None:
    received = [one(matrix(1e200, -1e200, 0, 0))]

    result = run(corrected(), received, OWN).params["w"]

    assert torch.equal(result, run(mean(), received, OWN).params["w"])


@pytest.mark.parametrize("value", ["others", "", None, 1])
def test_an_unknown_target_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="target must be one of received, median, own, mixed"):
        corrected(target=value)


@pytest.mark.parametrize("value", [0.99, 0, -2, math.nan, math.inf, True, "2"])
def test_a_limit_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max_scale must be None or a number of at least 1"):
        corrected(max_scale=value)


def test_the_arguments_of_the_mean_are_checked_too() -> None:
    with pytest.raises(ValueError, match="conservative must be"):
        corrected(conservative=2)
    with pytest.raises(ValueError, match="staleness_half_life must be"):
        corrected(staleness_half_life=0)
