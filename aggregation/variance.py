"""Variance correction: gives an averaged weight tensor back the spread that averaging took.

The mean of N uncorrelated tensors of variance v has variance v / N, which stops signals from reaching the last
layer. Correction stretches each weight tensor around its own mean. It sets the scale right and aligns nothing.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aggregation import averaging
from aggregation.averaging import empty_like, moments, population_variance, tiles
from aggregation.base import Contribution, Part, Rule, is_number, require, stateless

TARGETS = ("received", "median", "own", "mixed")

TINY = 1e-12
"""A variance below this part of what it is compared with is rounding, not spread."""

ROUNDING = 1e-12
"""A scale this close to 1 is 1: variances are taken in float64, and equal ones differ by less."""


def corrected(
    conservative: float = 0.5,
    target: str = "received",
    max_scale: float | None = None,
    staleness_half_life: float | None = None,
) -> Rule:
    """The mean of the received models with its weight tensors stretched to the variance they had before.

        scale = sqrt(wanted / Var(x))
        out   = mean(x) + scale * (x - mean(x))

    per floating tensor of two or more dimensions, with one mean and one population variance for the whole
    tensor. Biases, norm layers and running statistics are left alone: to stretch them moves thresholds. So are
    tensors without spread, whose wanted variance is nothing, or that would leave their dtype's range. What
    counts as nothing is relative, hence a common factor on all inputs comes out as that factor.

    Given one contribution that is a mean already (it has `parts`), as after `mean` in a chain, it only
    corrects, and `conservative` serves the target "mixed" alone: give both rules the same value. Anything else
    is first averaged by `averaging.mean(conservative, staleness_half_life)`. Both ways the result is the same, to
    the bit; the second needs memory for one new model, the first for two. Leaves one contribution.

    Args:
        conservative: share of the local model, from 0 to 1.
        target: the wanted variance. "received": the weighted mean of the received models' variances, the
            paper's rule (FOLLOW_OTHERS). "median": their median without weights, which one liar among three
            does not move (ours). "own": the local model's (FOLLOW_SELF), which no peer can influence.
            "mixed": conservative * own + (1 - conservative) * received (FOLLOW_CONSERVATIVE).
        max_scale: upper limit for the scale, at least 1. None: 1.5 * sqrt(N + 1) for N received models; the
            mean of N + 1 uncorrelated models needs sqrt(N + 1).
        staleness_half_life: as in `averaging.mean`.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2404.04616, VC_AVERAGE. Population variance and weights only, as in the
    authors' first code; the relative guard and the limit are ours.
    """
    require(target in TARGETS, "target", f"one of {', '.join(TARGETS)}", target)
    require(
        max_scale is None or (is_number(max_scale) and max_scale >= 1),
        "max_scale",
        "None or a number of at least 1",
        max_scale,
    )
    average = averaging.mean(conservative, staleness_half_life)

    def wanted(name: str, parts: Sequence[Part], own: Tensor) -> float:
        if target == "own":
            return population_variance(own)
        variances = [population_variance(part.params[name]) for part in parts]
        if target == "median":
            return statistics.median(variances)
        received = _mean_variance(variances, [part.share for part in parts])
        if target == "received":
            return received
        return conservative * population_variance(own) + (1 - conservative) * received

    def function(contributions: Sequence[Contribution], local: Contribution) -> list[Contribution]:
        is_given = len(contributions) == 1 and bool(contributions[0].parts)
        if not is_given:
            contributions, _ = average.update(contributions, (), local)
        (merged,) = contributions
        if not merged.parts:
            return [merged]
        limit = 1.5 * math.sqrt(len(merged.parts) + 1) if max_scale is None else max_scale
        weights = {name: tensor for name, tensor in merged.params.items() if is_correctable(name, tensor)}
        # A mean taken here is nobody else's yet, and is stretched where it lies. The rest must not be written into.
        shared = {name: own for name, own in weights.items() if is_given or own is local.params[name]}
        room = weights | empty_like(shared)
        params = dict(merged.params)
        for name, tensor in weights.items():
            centre, variance = moments(tensor)
            scale = _scale(variance, centre, wanted(name, merged.parts, local.params[name]), limit)
            if abs(scale - 1) > ROUNDING and _stays_finite(tensor, centre, variance, scale):
                _stretch(room[name], tensor, centre, scale)
                params[name] = room[name]
        return [replace(merged, params=params)]

    return stateless(function)


def is_correctable(name: str, tensor: Tensor) -> bool:
    """Whether it is a weight tensor, whose spread is worth keeping."""
    is_running = name.endswith(("running_mean", "running_var"))
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() > 0 and not is_running


def _mean_variance(variances: Sequence[float], shares: Sequence[float]) -> float:
    """Weighted, as a running mean: equal variances give that variance, to the bit."""
    result, total = variances[0], shares[0]
    for variance, share in zip(variances[1:], shares[1:], strict=True):
        total += share
        result += share / total * (variance - result) if share else 0.0
    return result


@torch.no_grad()
def _stays_finite(tensor: Tensor, centre: float, variance: float, scale: float) -> bool:
    """Whether all stretched entries fit the dtype."""
    furthest = math.sqrt(variance * tensor.numel())
    if abs(centre) + scale * furthest < 0.99 * torch.finfo(tensor.dtype).max:
        return True
    ends = torch.stack(torch.aminmax(tensor)).double()
    return bool(ends.lerp_(ends.new_tensor(centre), 1 - scale).to(tensor.dtype).isfinite().all())


@torch.no_grad()
def _stretch(out: Tensor, tensor: Tensor, centre: float, scale: float) -> None:
    """Write centre + scale * (tensor - centre) into `out`, which may be `tensor`. In float64, rounded once."""
    end = torch.tensor(centre, dtype=torch.float64, device=tensor.device)
    for to, tile in tiles(out, tensor):
        to.copy_(tile.to(torch.float64, copy=True).lerp_(end, 1 - scale))


def _scale(current: float, centre: float, wanted: float, max_scale: float) -> float:
    if not math.isfinite(current + wanted):
        return 1.0
    mean_square = current + centre * centre
    has_no_spread = current <= TINY * (mean_square + wanted)
    # Models in which a tensor is constant say nothing of its spread, and to follow them would erase it.
    wants_no_spread = wanted <= TINY * current
    if has_no_spread or wants_no_spread:
        return 1.0
    return min(math.sqrt(wanted / current), max_scale)
