"""The weighted mean of what was received, mixed with the receiver's own model.

Belongs here: rules that average, and how to go over large models in tiles. What a contribution's weight should be
is `weighting.py`'s matter; putting back the variance that averaging takes away is `variance.py`'s.

How it stays fast: a mean is bound by memory, so each entry is fetched once, in tiles that stay in the cache until
the last model is done, and what is written goes where the result will be.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from aggregation.base import Contribution, Params, Part, Rule, is_number, require, stateless

TILE_ENTRIES = 2**19
"""Entries of one tensor that are worked on together: two megabytes of float32, a part of a last-level cache. With
fewer, the calls and the waiting of torch's threads for each other cost more than the cache wins; with twice as many
a large merge is a twentieth faster, and the float64 copies of a tile begin to count as memory."""

LARGE_ENTRIES, ROW_ENTRIES = 2**18, 512
"""From how many entries on float32 squares are summed up in float32, and how many at most; see `_sums`."""

ALIGNMENT_BYTES = 64
"""Where torch would let a tensor begin: at a multiple of a cache line."""


def mean(conservative: float = 0.5, staleness_half_life: float | None = None) -> Rule:
    """The weighted mean of the received models, mixed with the receiver's own.

        share_k = weight_k * 0.5 ** (staleness_k / staleness_half_life)
        avg     = sum_k share_k * received_k / sum_k share_k
        out     = conservative * local + (1 - conservative) * avg

    Floating tensors of every shape are averaged, BatchNorm's running_mean and running_var among them
    (re-estimate those on local data afterwards if they matter). The average is taken in steps, model after model:
    of float32 and float64 in the tensor's own precision, with one rounding a step, unless that overflows; else in
    float64, rounded once. Integer and bool tensors, such as BatchNorm's num_batches_tracked, keep the local value.
    An entry on which all models agree stays as it is, to the bit; where they agree on a whole tensor, the local
    tensor itself is handed on.

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
        steps = _steps([*((1 - conservative) * share for share in shares), conservative])
        models = [*(other.params for other in contributions), local.params]
        changing = {name: own for name, own in local.params.items() if _differ(name, own, contributions)}
        averages = empty_like(changing)
        for name, average in averages.items():
            _average(average, [params[name] for params in models], steps)
        return [
            Contribution(
                params=local.params | averages,
                weight=min(sum(other.weight for other in contributions), sys.float_info.max),
                source="merged",
                parts=_parts(contributions, shares),
                own_share=conservative,
            )
        ]

    return stateless(function)


@torch.no_grad()
def moments(tensor: Tensor) -> tuple[float, float]:
    """Mean and population variance over all entries of a floating tensor of any shape; zeros for no entries.

    Right to float64's precision, and for float32 tensors of LARGE_ENTRIES or more to 1e-8 of the variance, a
    fraction of their own. No square leaves its range, however large or small the entries are.
    """
    if not tensor.numel():
        return 0.0, 0.0
    sums = [_sums(tile) for (tile,) in tiles(tensor)]
    centre, mean_square = (sum(each) / tensor.numel() for each in zip(*sums, strict=True))
    variance = mean_square - centre * centre
    # Far from the ends of float32's range, and no difference of like numbers, in which roundings would stand out.
    if 1e-30 < variance < 1e30 and variance > 0.9 * mean_square:
        return centre, variance
    return _centred_moments(tensor)


def population_variance(tensor: Tensor) -> float:
    """The variance of `moments`."""
    return moments(tensor)[1]


def _sums(tile: Tensor) -> tuple[float, float]:
    """The sums of the entries and of their squares; not finite where a square leaves float32's range.

    To widen a large tile would take twice as long as to sum it up. In rows, few roundings add up in float32, and
    over many rows they cancel out.
    """
    if tile.dtype is not torch.float32 or tile.numel() < LARGE_ENTRIES or tile.numel() % ROW_ENTRIES:
        wide = tile.double().reshape(-1)
        return float(wide.sum()), float(torch.dot(wide, wide))
    rows = tile.reshape(-1, ROW_ENTRIES)
    norms = torch.linalg.vector_norm(rows, dim=1).double()
    return float(rows.sum(1).double().sum()), float(torch.dot(norms, norms))


def _centred_moments(tensor: Tensor) -> tuple[float, float]:
    """`moments`, in float64 and around each tile's own mean, so that nothing cancels out.

    Source: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """
    count, centre, squares = 0, 0.0, 0.0
    for (tile,) in tiles(tensor):
        wide = tile.to(torch.float64, copy=True).reshape(-1)
        mean = float(wide.mean())
        wide.sub_(mean)
        before, count = count, count + len(wide)
        away = mean - centre
        centre += away * len(wide) / count
        squares += float(torch.dot(wide, wide)) + away * away * before / count * len(wide)
    return centre, squares / count


def empty_like(params: Params) -> Params:
    """New tensors with these names, shapes and dtypes, in row-major order and without defined contents.

    They lie in one piece of memory, though none of them shows it. That piece is asked of numpy, which asks the
    system for large pages: with small ones, the first touch of a model's worth of memory takes as long as a mean.
    """
    if any(tensor.device.type != "cpu" for tensor in params.values()):
        return {name: torch.empty_like(tensor) for name, tensor in params.items()}
    sizes = [tensor.numel() * tensor.element_size() for tensor in params.values()]
    ends = list(itertools.accumulate(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes))
    block = np.empty(ends[-1] + ALIGNMENT_BYTES if ends else 0, dtype=np.uint8)
    first = -block.ctypes.data % ALIGNMENT_BYTES
    return {
        name: torch.from_numpy(block[first + start :][:size]).view(tensor.dtype).view(tensor.shape)
        for (name, tensor), start, size in zip(params.items(), [0, *ends], sizes, strict=False)
    }


def tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape that hold the same entries of each, at most TILE_ENTRIES where that can be.

    Of tensors that all lie in one piece the tiles are vectors; of others they are rows of the first dimension.
    """
    entries = tensors[0].numel()
    if entries <= TILE_ENTRIES:
        yield tensors
        return
    lie_in_one_piece = all(tensor.is_contiguous() for tensor in tensors)
    parts = [tensor.view(-1) if lie_in_one_piece else tensor for tensor in tensors]
    length = max(1, TILE_ENTRIES * len(parts[0]) // entries)
    yield from zip(*(torch.split(part, length) for part in parts), strict=True)


def _differ(name: str, own: Tensor, others: Sequence[Contribution]) -> bool:
    """Whether there is something to average."""
    return own.is_floating_point() and not all(torch.equal(other.params[name], own) for other in others)


def _shares(contributions: Sequence[Contribution], half_life: float | None) -> list[float]:
    """What each contribution counts; 1 in all."""
    # Only differences matter, and without the freshest as origin all shares could underflow to zero.
    freshest = min(other.staleness for other in contributions)
    shares = [
        other.weight * (1.0 if half_life is None else 0.5 ** ((other.staleness - freshest) / half_life))
        for other in contributions
    ]
    largest = max(shares)  # the sum of large weights could overflow
    total = sum(share / largest for share in shares)
    return [share / largest / total for share in shares]


def _steps(shares: Sequence[float]) -> list[float]:
    """How far the running mean moves towards each value: its share of all shares up to its own.

    A mean taken in such steps stays put, to the bit, as long as the values are equal; a sum of products
    would not.
    """
    totals = itertools.accumulate(shares)
    return [share / total if share else 0.0 for share, total in zip(shares, totals, strict=True)]


def _parts(contributions: Sequence[Contribution], shares: Sequence[float]) -> tuple[Part, ...]:
    """The received models behind the mean: those behind a contribution that is a mean itself, in its place."""
    return tuple(
        Part(share * part.share, part.params)
        for other, share in zip(contributions, shares, strict=True)
        for part in other.parts or (Part(1.0, other.params),)
    )


@torch.no_grad()
def _average(out: Tensor, values: Sequence[Tensor], steps: Sequence[float]) -> None:
    """Write the running mean of two or more tensors, moved by `steps` from value to value, into `out`."""
    for tile, first, *rest in tiles(out, *values):
        if tile.dtype in (torch.float32, torch.float64):
            torch.lerp(first, rest[0], steps[1], out=tile)
            for value, step in zip(rest[1:], steps[2:], strict=True):
                tile.lerp_(value, step)
            # The difference of two large values leaves float32's range, and then the sum shows it.
            if math.isfinite(tile.sum()):
                continue
        wide = first.to(torch.float64, copy=True)
        for value, step in zip(rest, steps[1:], strict=True):
            wide.lerp_(value.double(), step)
        tile.copy_(wide)
