"""The weighted mean of what was received, mixed with the receiver's own model.

Belongs here: rules that average. What a contribution's weight should be is `weighting.py`'s matter; putting
back the variance that averaging takes away is `variance.py`'s.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from aggregation.base import Contribution, Part, Rule, is_number, require, stateless


def mean(conservative: float = 0.5, staleness_half_life: float | None = None) -> Rule:
    """The weighted mean of the received models, mixed with the receiver's own.

        share_k = weight_k * 0.5 ** (staleness_k / staleness_half_life)
        avg     = sum_k share_k * received_k / sum_k share_k
        out     = conservative * local + (1 - conservative) * avg

    Floating tensors of every shape are averaged, BatchNorm's running_mean and running_var among them
    (re-estimate those on local data afterwards if they matter). Sums are taken in float64, one tensor at a time,
    and rounded once to the tensor's own dtype. Integer and bool tensors, such as BatchNorm's
    num_batches_tracked, keep the local value. Where all models agree on a tensor, the local tensor itself is
    handed on.

    Leaves one contribution, "merged", with the sum of the received weights (before they decay), and the received
    models as its `parts`. With nothing received it leaves the local model.

    Args:
        conservative: share of the local model, from 0 (the plain mean) to 1 (ignore the others). The more the
            received models differ or the less they are trusted, the higher.
        staleness_half_life: rounds after which a contribution counts half, above 0. None: staleness is ignored.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2404.04616, VC_AVERAGE without the correction. The decay is ours.
    """
    require(
        is_number(conservative) and 0 <= conservative <= 1,
        "conservative",
        "a number from 0 to 1",
        conservative,
    )
    require(
        staleness_half_life is None or (is_number(staleness_half_life) and staleness_half_life > 0),
        "staleness_half_life",
        "None or a number of rounds above 0",
        staleness_half_life,
    )

    def function(contributions: Sequence[Contribution], local: Contribution) -> list[Contribution]:
        if not contributions:
            return [Contribution(local.params, local.weight, local.staleness, local.source)]
        shares = _shares(contributions, staleness_half_life)
        steps = _steps(shares)
        params = {
            name: _mixed(own, [other.params[name] for other in contributions], steps, conservative)
            for name, own in local.params.items()
        }
        return [
            Contribution(
                params=params,
                weight=min(sum(other.weight for other in contributions), sys.float_info.max),
                source="merged",
                parts=_parts(contributions, shares),
                own_share=conservative,
            )
        ]

    return stateless(function)


def population_variance(tensor: Tensor) -> float:
    """Variance over all entries of a floating tensor of any shape, divided by their number; 0 for no entries.

    Taken in float64: the square of a large float32 weight leaves float32's range.
    """
    if tensor.numel() == 0:
        return 0.0
    return float(tensor.detach().double().var(correction=0))


def _shares(contributions: Sequence[Contribution], half_life: float | None) -> list[float]:
    """What each contribution counts, up to a common factor."""
    if half_life is None:
        return [other.weight for other in contributions]
    # Only differences matter, and without the freshest as origin all shares could underflow to zero.
    freshest = min(other.staleness for other in contributions)
    return [other.weight * 0.5 ** ((other.staleness - freshest) / half_life) for other in contributions]


def _steps(shares: Sequence[float]) -> list[float]:
    """How far the running mean moves towards each value: its share of all shares up to its own.

    A mean taken in such steps stays put, to the bit, as long as the values are equal; a sum of products
    would not.
    """
    steps, total = [], 0.0
    for share in (share / max(shares) for share in shares):
        total += share
        steps.append(share / total if share else 0.0)
    return steps


def _parts(contributions: Sequence[Contribution], shares: Sequence[float]) -> tuple[Part, ...]:
    """The received models behind the mean: those behind a contribution that is a mean itself, in its place."""
    largest = max(shares)
    total = sum(share / largest for share in shares)
    return tuple(
        Part(share / largest / total * part.share, part.params)
        for other, share in zip(contributions, shares, strict=True)
        for part in other.parts or (Part(1.0, other.params),)
    )


@torch.no_grad()
def _mixed(own: Tensor, others: Sequence[Tensor], steps: Sequence[float], conservative: float) -> Tensor:
    """One tensor of the result. `own` itself where there is nothing to average or nothing to change."""
    if not own.is_floating_point() or all(torch.equal(other, own) for other in others):
        return own
    # `copy`: a float64 input would otherwise be the running mean itself, and be written into.
    average = others[0].to(torch.float64, copy=True)
    for other, step in zip(others[1:], steps[1:], strict=True):
        average.lerp_(other.double(), step)
    return average.lerp_(own.double(), conservative).to(own.dtype)
