"""Many merges at once, on models that are the rows of one matrix.

Belongs here: batched forms of the rules in `rules.py`, for a simulator that holds every node's model in one
store, and the registry of which rules have one. A batched form gives what its rule gives, to rounding; a rule
without one is run merge by merge. To add one, write its factory here and one entry in `BATCHED`.

How it stays fast: models are read as rows, never as dicts of tensors; a mean is one sparse-by-dense product; a
variance is taken once per distinct row, and in tiles that stay in the processor's cache.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aggregation import rules, variance
from aggregation.variance import TINY

TILE_ENTRIES = 2**17
"""Entries that are worked on together: a megabyte in float64, about a core's second-level cache. Smaller tiles
lose more to the calls than they win."""


class TensorSlice(NamedTuple):
    """Where one floating tensor of a model lies in a row: its entries in order, from column `offset` on."""

    name: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Merges:
    """M merges in progress, what a link takes and leaves. Indices are int64; all tensors share one device.

    store: float32 [num_rows, P], every model. Not to be written to.
    own: [M], the row of each merge's receiver.
    received: [K], rows of received models, those of one merge side by side.
    owner: [K], the merge, from 0 to M - 1, that each of `received` belongs to; ascending.
    weights: float64 [K], above 0.
    staleness: [K], rounds, >= 0.
    num_received: [M], how often each merge occurs in `owner`.
    merged: float32 [M, P], the result so far, which a link may write into; None until a rule has reduced.
    shares: float64 [K], how much each received model counts in its merge's mean, 1 in all for every merge
        that received something. None as long as `merged` is.
    """

    store: Tensor
    own: Tensor
    received: Tensor
    owner: Tensor
    weights: Tensor
    staleness: Tensor
    num_received: Tensor
    merged: Tensor | None = None
    shares: Tensor | None = None

    def reduced(self, how: str, values: Tensor) -> Tensor:
        """float64 [K, ...] to [M, ...]: "sum", "max" or "min" over each merge's received models; 0 for none."""
        return torch.segment_reduce(values, how, lengths=self.num_received, initial=_INITIAL[how])


_INITIAL = {"sum": 0.0, "max": 0.0, "min": math.inf}

Link = Callable[[Merges], Merges]
"""One rule of a chain. What it leaves for a merge that received nothing is not used."""


@dataclass(frozen=True, slots=True)
class BatchedRule:
    """A chain of links as one function, from `build_batched`."""

    links: tuple[Link, ...]

    @torch.no_grad()
    def __call__(
        self,
        store: Tensor,
        own: Tensor,
        received: Tensor,
        owner: Tensor,
        weights: Tensor,
        staleness: Tensor,
    ) -> Tensor:
        """The merged models as a new float32 matrix [M, P]; the arguments are said at `Merges`.

        A row may take part in any number of merges. A merge that received nothing leaves its own row, to the
        bit. What a merge gives does not depend on the others in the call, rounding apart. Other than `rules.merge`
        it does not look for values that are not finite: they leave values that are not finite.

        Raises ValueError where `owner` is not ascending.
        """
        if not len(received):
            return store.index_select(0, own)
        if bool((owner.diff() < 0).any()):
            raise ValueError("owner must be ascending: the received models of one merge lie side by side")
        num_received = torch.bincount(owner, minlength=len(own))
        merges = Merges(store, own, received, owner, weights, staleness, num_received)
        for link in self.links:
            merges = link(merges)
        merged = merges.merged
        assert merged is not None, "rules.build refuses a chain that does not reduce"
        alone = (num_received == 0).nonzero().squeeze(1)
        return merged.index_copy_(0, alone, store.index_select(0, own.index_select(0, alone)))


def build_batched(
    specs: Sequence[str | Mapping[str, Any]], layout: Sequence[TensorSlice]
) -> BatchedRule | None:
    """The batched form of `rules.build(specs)` for models laid out so, or None where one of the rules has none.

    Columns outside of `layout` are averaged like a bias.

    Raises ValueError as `rules.build` does.

    >>> build_batched(["mean"], [TensorSlice("fc.weight", 0, (3, 2)), TensorSlice("fc.bias", 6, (3,))])
    ... # doctest: +ELLIPSIS
    BatchedRule(...)
    """
    rules.build(specs)
    tables = [{"name": spec} if isinstance(spec, str) else spec for spec in specs]
    if any(table["name"] not in BATCHED or table.get("target") == "median" for table in tables):
        return None
    return BatchedRule(
        tuple(
            BATCHED[table["name"]](layout, **{key: value for key, value in table.items() if key != "name"})
            for table in tables
        )
    )


def _mean(
    layout: Sequence[TensorSlice], conservative: float = 0.5, staleness_half_life: float | None = None
) -> Link:
    """`averaging.mean`. Shares are taken in float64; the sum over models is taken in float32."""

    def link(merges: Merges) -> Merges:
        if merges.merged is not None:
            own = merges.store.index_select(0, merges.own)
            return replace(merges, merged=merges.merged.mul_(1 - conservative).add_(own, alpha=conservative))
        shares = _shares(merges, staleness_half_life)
        return replace(merges, merged=_mixed(merges, shares, conservative), shares=shares)

    return link


def _shares(merges: Merges, half_life: float | None) -> Tensor:
    """float64 [K], see `Merges.shares`."""
    shares, owner = merges.weights, merges.owner
    if half_life is not None:
        # From the freshest on, and below by the largest, as in `averaging`: nothing leaves float64's range.
        staleness = merges.staleness.double()
        shares = shares * torch.exp2((merges.reduced("min", staleness)[owner] - staleness) / half_life)
    shares = shares / merges.reduced("max", shares)[owner]
    return shares / merges.reduced("sum", shares)[owner]


def _mixed(merges: Merges, shares: Tensor, conservative: float) -> Tensor:
    """[M, P], conservative * own + (1 - conservative) * sum(shares * received) in one pass over the rows.

    An embedding bag is a product with a sparse matrix given by rows, and of all ways to take one (CSR, gathered
    bmm or lerp, index_add_) the fastest on a CPU, at one model per merge as at four.
    """
    num_received = merges.num_received
    merge = torch.arange(len(merges.own), device=merges.own.device)
    # Each bag holds the receiver's own row and, after it, the received ones.
    bags = merge + num_received.cumsum(0) - num_received
    places = torch.arange(len(merges.owner), device=merges.owner.device) + merges.owner + 1
    entries = merges.own.new_empty(len(merges.own) + len(merges.owner))
    entries[bags], entries[places] = merges.own, merges.received
    factors = merges.store.new_full(entries.shape, conservative)
    factors[places] = ((1 - conservative) * shares).float()
    return F.embedding_bag(entries, merges.store, bags, mode="sum", per_sample_weights=factors)


def _corrected(
    layout: Sequence[TensorSlice],
    conservative: float = 0.5,
    target: str = "received",
    max_scale: float | None = None,
    staleness_half_life: float | None = None,
) -> Link:
    """`variance.corrected`. Means, variances and the stretching are taken in float64, and rounded once."""
    average = _mean(layout, conservative, staleness_half_life)
    tensors = [
        tensor
        for tensor in layout
        if variance.is_correctable(tensor.name, torch.empty(tensor.shape, device="meta"))
    ]

    def wanted(merges: Merges, shares: Tensor) -> Tensor:
        """float64 [M, T] for the T correctable tensors."""
        if target == "own":
            return _variances(merges.store, merges.own, tensors)
        received = merges.reduced("sum", shares[:, None] * _variances(merges.store, merges.received, tensors))
        if target == "received":
            return received
        own = _variances(merges.store, merges.own, tensors)
        return conservative * own + (1 - conservative) * received

    def link(merges: Merges) -> Merges:
        if merges.merged is None:
            merges = average(merges)
        assert merges.merged is not None
        assert merges.shares is not None
        if tensors:
            num_received = merges.num_received.double()
            limits = (
                1.5 * (num_received + 1).sqrt()
                if max_scale is None
                else torch.full_like(num_received, max_scale)
            )
            _stretch(merges.merged, tensors, wanted(merges, merges.shares), limits)
        return merges

    return link


BATCHED: dict[str, Callable[..., Link]] = {"mean": _mean, "variance.corrected": _corrected}
"""A rule's name in `rules.RULES` to the factory of its batched form: (layout, and the rule's own arguments) to
a link."""


def _variances(store: Tensor, rows: Tensor, tensors: Sequence[TensorSlice]) -> Tensor:
    """float64 [N, T]: the population variance of each tensor in each of N rows; each row is looked at once."""
    distinct, places = torch.unique(rows, return_inverse=True)
    return torch.stack([_moments(_columns(store, tensor), distinct)[1] for tensor in tensors], dim=1)[places]


def _moments(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [N] each: mean and population variance over the entries of N rows.

    In two passes, and in float64 as in `averaging.population_variance`; `torch.var` takes several times as long.
    """
    means, variances = [], []
    for tile in _tiles(rows, columns):
        wide = columns.index_select(0, tile).double()
        mean = wide.mean(1)
        means.append(mean)
        norm = torch.linalg.vector_norm(wide.sub_(mean[:, None]), dim=1)
        variances.append(norm.square() / columns.shape[1])
    return torch.cat(means), torch.cat(variances)


def _stretch(merged: Tensor, tensors: Sequence[TensorSlice], wanted: Tensor, limits: Tensor) -> None:
    """Bring each tensor of each row of `merged` to its variance in `wanted` [M, T], in place.

    `limits` [M]: the largest scale.
    """
    everyone = torch.arange(len(merged), device=merged.device)
    for tensor, goals in zip(tensors, wanted.unbind(1), strict=True):
        columns = _columns(merged, tensor)
        means, variances = _moments(columns, everyone)
        scales = _scales(variances, means, goals, limits)
        parts = (_tiles(each, columns) for each in (columns, means[:, None], scales[:, None]))
        for before, mean, scale in zip(*parts, strict=True):
            after = before.double().sub_(mean).mul_(scale).add_(mean).float()
            # The largest entry tells whether all are finite, several times faster than to ask each.
            fits = after.abs().amax(1).isfinite()
            if not bool(fits.all()):
                after = torch.where(fits[:, None], after, before)
            before.copy_(after)


def _scales(current: Tensor, centre: Tensor, wanted: Tensor, limit: Tensor) -> Tensor:
    """`variance._scale` for many tensors."""
    has_no_spread = current <= TINY * (current + centre.square() + wanted)
    wants_no_spread = wanted <= TINY * current
    scales = (wanted / current).sqrt().minimum(limit)
    return scales.masked_fill(has_no_spread | wants_no_spread, 1.0)


def _columns(matrix: Tensor, tensor: TensorSlice) -> Tensor:
    return matrix[:, tensor.offset : tensor.offset + math.prod(tensor.shape)]


def _tiles(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """`rows`, something said per row, in parts whose entries in `columns` the cache holds."""
    return torch.split(rows, max(1, TILE_ENTRIES // columns.shape[1]))
