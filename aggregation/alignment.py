"""Bringing a received model's units into the order of the receiver's own, before anything is averaged.

Two networks that compute the same may have their hidden units in different orders; averaged unit by unit, both are
destroyed. Belongs here: finding the order, by what units do on data (activation matching) or by their weights (weight
matching), and the two rules. What may be reordered at all is found in `symmetry.py`.

Every model is matched pairwise to the receiver's own. Sources: DIMAT (arXiv 2404.08079, MERGE) for activation matching;
Git Re-Basin (arXiv 2209.04836, weight matching) for the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, fx

from aggregation.base import (
    MODEL,
    SAMPLES,
    Contribution,
    Params,
    Receiver,
    Report,
    Rule,
    is_number,
    receiver_of,
    require,
    require_count,
)
from aggregation.probes import CHUNK, PROBES, batches, probe_of, same
from aggregation.statistics import reestimated
from aggregation.symmetry import Layout, Permutations, Piece, Symmetry, outer_dim, run, symmetry_of

TINY = 1e-7
"""Of a product of two standard deviations: below it a unit is dead and matches nothing (DIMAT's own figure)."""
PLACES = ("last", "all")
TIE = 1e-5
"""Of a correlation: differences below it do not decide."""


# --- finding permutations from gains --------------------------------------------------------------------
Gains = Mapping[int, Tensor]
"""For an axis how well each own unit (row) and each of the other model's (column) go together; float64. An axis within
another has one row for each unit of both, the outer one's first."""


def assign(symmetry: Symmetry, unit: int, gains: Gains) -> Permutations:
    """The orders of a free axis, and of all within it, with the greatest sum of gains.

    unit: a free axis that lies in none; or a held one, for what lies within it.
    """
    axis = symmetry.axes[unit]
    inner = inner_axes(symmetry, unit)
    best: dict[int, dict[tuple[int, int], Tensor]] = {number: {} for number in inner}
    total = gains[unit].clone() if unit in gains else torch.zeros(axis.size, axis.size, dtype=torch.float64)
    for number in inner:
        size = symmetry.axes[number].size
        blocks = gains[number].reshape(axis.size, size, axis.size, size).permute(0, 2, 1, 3)
        for own in range(axis.size):
            for other in [own] if axis.held else range(axis.size):
                order = _assigned(blocks[own, other])
                best[number][own, other] = order
                total[own, other] += blocks[own, other, torch.arange(size), order].sum()
    outer = torch.arange(axis.size) if axis.held else _assigned(total)
    found = {
        number: torch.stack([best[number][own, int(outer[own])] for own in range(axis.size)])
        for number in inner
    }
    return found if axis.held else {unit: outer, **found}


def _assigned(gain: Tensor) -> Tensor:
    """For each row its column. In float64 on the CPU: the same on every machine."""
    from scipy.optimize import linear_sum_assignment  # here: reading a config should not wait for it

    return torch.from_numpy(linear_sum_assignment(gain.detach().numpy(), maximize=True)[1])


def inner_axes(symmetry: Symmetry, unit: int) -> list[int]:
    """The free axes within this one."""
    return [number for number in symmetry.free if symmetry.axes[number].within == unit]


def units(symmetry: Symmetry) -> list[int]:
    """The axes to assign one after another: those that are free and lie in none, and those with free ones within."""
    found = dict.fromkeys(
        number if symmetry.axes[number].within is None else symmetry.axes[number].within
        for number in symmetry.free
    )
    return [number for number in found if number is not None]


def _flat_places(symmetry: Symmetry, axes: Sequence[int], number: int) -> Iterator[tuple[int, ...]]:
    """Where the axis stands among `axes`: its place, or for one within another that one's place and its own."""
    for place, axis in enumerate(axes):
        if axis == number:
            within = symmetry.axes[number].within
            yield (place,) if within is None else (outer_dim(axes, place, symmetry.axes), place)


def _to_front(block: Tensor, places: Sequence[int]) -> Tensor:
    """[units, rest]: the dimensions at `places` as rows."""
    moved = block.movedim(tuple(places), tuple(range(len(places))))
    return moved.reshape(moved.shape[: len(places)].numel(), -1)


# --- activation matching --------------------------------------------------------------------------------
@dataclass(slots=True)
class Moments:
    """Running means and co-moments of two sets of variables. float64, [A], [B], [A], [B], [A, B]."""

    count: int
    mean_a: Tensor
    mean_b: Tensor
    square_a: Tensor
    square_b: Tensor
    cross: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> "Moments":
        """a: [A, samples], b: [B, samples], float."""
        mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
        a, b = a - mean_a, b - mean_b
        squares = a.square().sum(1).double(), b.square().sum(1).double()
        return cls(a.shape[1], mean_a[:, 0].double(), mean_b[:, 0].double(), *squares, (a @ b.T).double())

    def add(self, other: "Moments") -> None:
        """Chan's parallel update: no large sums are subtracted from each other."""
        share = other.count / (self.count + other.count)
        weight = self.count * share
        step_a, step_b = other.mean_a - self.mean_a, other.mean_b - self.mean_b
        self.square_a += other.square_a + weight * step_a.square()
        self.square_b += other.square_b + weight * step_b.square()
        self.cross += other.cross + weight * torch.outer(step_a, step_b)
        self.mean_a += share * step_a
        self.mean_b += share * step_b
        self.count += other.count

    def correlation(self) -> Tensor:
        """[A, B]; 0 for what never varies."""
        deviations = torch.outer((self.square_a / self.count).sqrt(), (self.square_b / self.count).sqrt())
        return self.cross / self.count / deviations.clamp_min(TINY)


def activation_gains(
    symmetry: Symmetry, own: Params, others: Sequence[Params], inputs: Tensor, places: str = "all"
) -> list[dict[int, Tensor]]:
    """For each of `others` the correlations of its units with the receiver's over the inputs [samples, ...].

    An axis is looked at where layers read it, after the activation function, or where none does (queries and keys),
    where it was written. places: as in `watched`.
    """
    nodes = watched(symmetry, places)
    names = {name for each in nodes.values() for name in each}
    moments: list[dict[tuple[int, str, int], Moments]] = [{} for _ in others]
    for batch in batches(inputs, symmetry.batch_size):
        mine = _activations(symmetry, own, batch, names)
        for other, found in zip(others, moments, strict=True):
            theirs = _activations(symmetry, other, batch, names)
            for axis, watched_names in nodes.items():
                for name in watched_names:
                    for key, a, b in _sides(symmetry, axis, name, mine[name], theirs[name]):
                        now = Moments.of(a, b)
                        if key in found:
                            found[key].add(now)
                        else:
                            found[key] = now
    return [_summed(found) for found in moments]


def _summed(moments: Mapping[tuple[int, str, int], Moments]) -> dict[int, Tensor]:
    gains: dict[int, Tensor] = {}
    for (axis, _, _), found in moments.items():
        gains[axis] = gains[axis] + found.correlation() if axis in gains else found.correlation()
    return gains


def _sides(
    symmetry: Symmetry, axis: int, name: str, mine: Tensor, theirs: Tensor
) -> Iterator[tuple[tuple[int, str, int], Tensor, Tensor]]:
    """Both models' units of the axis in a node's value, as rows [units, samples and positions]."""
    for index, piece in enumerate(symmetry.nodes[name]):
        for places in _flat_places(symmetry, piece.axes, axis):
            a, b = (_to_front(piece.take(value, symmetry.axes), places) for value in (mine, theirs))
            yield (axis, name, index), a.float(), b.float()


def _activations(symmetry: Symmetry, params: Params, batch: Tensor, names: set[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        if name in names:
            kept[name] = value
        return value

    run(symmetry, params, batch, keep)
    return kept


def watched(symmetry: Symmetry, places: str = "all") -> dict[int, list[str]]:
    """For every free axis the nodes whose values tell what its units do.

    places: "all", the inputs of the layers that read it, or "last", that of the last one (DIMAT's matching nodes).
    """
    around = {axis.within for axis in symmetry.axes.values()}
    read: dict[int, list[str]] = {}
    written: dict[int, list[str]] = {}
    for node in symmetry.graph.graph.nodes:
        if node.op != "call_function" or not (weight := _weight_of(symmetry, node)):
            continue
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "call_function" and source.name in symmetry.nodes:
            for axis in _axes_in(symmetry.nodes[source.name]) & _axes_in(symmetry.nodes[weight]):
                earlier = read.get(axis, []) if places == "all" else []
                read[axis] = [*earlier, source.name] if source.name not in earlier else earlier
        if node.name in symmetry.nodes:
            for axis in _axes_in(symmetry.nodes[node.name]):
                written.setdefault(axis, []).append(node.name)
    return {
        axis: read.get(axis) or written.get(axis) or _anywhere(symmetry, axis)
        for axis in symmetry.free
        if axis not in around  # heads and groups go by what is within them
    }


def _weight_of(symmetry: Symmetry, node: fx.Node) -> str | None:
    """The placeholder of the matrix that a layer multiplies by; None where the node is no such layer."""
    weight = node.args[1] if len(node.args) > 1 else None
    if isinstance(weight, fx.Node) and weight.op == "placeholder" and weight.name in symmetry.nodes:
        return weight.name if len(weight.meta["val"].shape) >= 2 else None
    return None


def _axes_in(layout: Layout) -> set[int]:
    return {axis for piece in layout for axis in piece.axes}


def _anywhere(symmetry: Symmetry, axis: int) -> list[str]:
    """The last node whose value has it."""
    names = [
        node.name
        for node in symmetry.graph.graph.nodes
        if node.op == "call_function"
        and node.name in symmetry.nodes
        and axis in _axes_in(symmetry.nodes[node.name])
    ]
    return names[-1:]


def match_activations(
    symmetry: Symmetry,
    own: Params,
    others: Sequence[Params],
    inputs: Tensor,
    names: Sequence[str],
    places: str = "all",
    stay: float = 0.0,
) -> list[Permutations | None]:
    """For each of the other models the orders in which its units do most nearly what the receiver's do.

    None for a model whose activations are not finite, as weights that are finite but huge make them.

    names: of the parameters by which units are told apart that do nothing on these inputs, or the same as another.
    places: as in `watched`. stay: what is added to the correlation of units in one place.
    """
    return [
        _assign_with_ties(symmetry, _reluctant(gains, stay), WeightMatching(symmetry, own, other, names))
        if all(bool(gain.isfinite().all()) for gain in gains.values())
        else None
        for gains, other in zip(activation_gains(symmetry, own, others, inputs, places), others, strict=True)
    ]


def _reluctant(gains: Gains, stay: float) -> Gains:
    """With so much more correlation for each unit's own place."""
    return {axis: gain + stay * torch.eye(len(gain), dtype=gain.dtype) for axis, gain in gains.items()}


def _assign_with_ties(symmetry: Symmetry, gains: Gains, weights: "WeightMatching") -> Permutations:
    """The best orders by `gains`; where several are as good, that which brings the weights nearest."""
    orders = symmetry.identity()
    for unit in units(symmetry):
        orders |= assign(symmetry, unit, gains)
    for unit in units(symmetry):
        ties = weights.gains(unit, orders)
        orders |= assign(symmetry, unit, {axis: _tilted(gains.get(axis), tie) for axis, tie in ties.items()})
    return orders


def _tilted(gain: Tensor | None, tie: Tensor) -> Tensor:
    slight = tie * (TIE / tie.abs().max().clamp_min(TINY))
    return slight if gain is None else gain + slight


# --- weight matching ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WeightMatching:
    """Looks for the orders of `other` with the greatest inner product of weights with `own`, which is the least distance.

    names: of the parameters that count.
    """

    symmetry: Symmetry
    own: Params
    other: Params
    names: Sequence[str]

    @cached_property
    def _blocks(self) -> list[tuple[Piece, Tensor, Tensor]]:
        """Every piece with a free axis, of both models."""
        free = set(self.symmetry.free)
        return [
            (
                piece,
                piece.take(self.own[name], self.symmetry.axes).float(),
                piece.take(self.other[name], self.symmetry.axes).float(),
            )
            for name in self.names
            if name in self.symmetry.tensors
            for piece in self.symmetry.tensors[name]
            if free & set(piece.axes)
        ]

    def objective(self, orders: Permutations) -> float:
        """The inner product, over all that has a free axis."""
        return sum(
            float((own.double() * self.symmetry.permute_block(other, piece.axes, orders)).sum())
            for piece, own, other in self._blocks
        )

    def gains(self, unit: int, orders: Permutations) -> dict[int, Tensor]:
        """What each pair of units adds to the inner product while all other axes have the order given."""
        found: dict[int, Tensor] = {}
        inner = inner_axes(self.symmetry, unit)
        for piece, own, other in self._blocks:
            for axis in [number for number in inner if number in piece.axes] or [unit]:
                for places in self._places(piece, axis, unit):
                    rest = self.symmetry.permute_block(other, piece.axes, orders, skip=places)
                    gain = (_to_front(own, places) @ _to_front(rest, places).T).double()
                    found[axis] = found[axis] + gain if axis in found else gain
        return found

    def _places(self, piece: Piece, axis: int, unit: int) -> Iterator[tuple[int, ...]]:
        if axis in piece.axes and not (axis == unit and self.symmetry.axes[unit].held):
            yield from _flat_places(self.symmetry, piece.axes, axis)

    def improve(self, orders: Permutations, sequence: Sequence[int]) -> tuple[Permutations, float]:
        """Coordinate descent: one axis after another gets its best order, as long as the whole gains by it."""
        current = self.objective(orders)
        for _ in range(MAX_PASSES):
            before = current
            for unit in sequence:
                trial = {**orders, **assign(self.symmetry, unit, self.gains(unit, orders))}
                value = self.objective(trial)
                if value > current + SLACK * abs(current):
                    orders, current = trial, value
            if current <= before + SLACK * abs(before):
                break
        return orders, current


MAX_PASSES = 100
SLACK = 1e-9
"""An improvement smaller than this part of the whole is rounding."""


def match_weights(
    symmetry: Symmetry,
    own: Params,
    other: Params,
    names: Sequence[str],
    seed: int = 0,
    restarts: int = 2,
) -> Permutations:
    """The orders of `other`'s units that bring its weights nearest to the receiver's. Needs no data.

    names: of the parameters that count; running statistics should not.
    restarts: descents beside the first. That one goes through the axes from the input on, the others in random orders
        drawn from `seed`; the best end counts.
    """
    search = WeightMatching(symmetry, own, other, names)
    forward = units(symmetry)
    generator = torch.Generator().manual_seed(seed)
    sequences = [forward, forward[::-1]] + [
        [forward[i] for i in torch.randperm(len(forward), generator=generator).tolist()]
        for _ in range(restarts)
    ]
    ends = [search.improve(symmetry.identity(), sequence) for sequence in sequences[: restarts + 1]]
    return max(ends, key=lambda end: end[1])[0]


# --- the rules ------------------------------------------------------------------------------------------
def by_activation(
    probe: str = "own", samples: int = 512, places: str = "all", stay: float = 0.0, reestimate: bool = True
) -> Rule:
    """Reorder each received model's units so that they do most nearly what the receiver's own do on probe data.

    Before the comparison BatchNorm's statistics are re-estimated on the probe, in copies; what is handed on keeps its
    own. Put `norm.reestimate` (with BatchNorm) or `repair` (without) behind the mean that follows: a mean with BatchNorm
    and the statistics of others is near chance, however well it is aligned.

    Args:
        probe: "own": the receiver's training samples. "shared": inputs that all nodes have (`Task.probe`), better
            where peers mostly learn from other classes than the receiver's. Where they share no class at all no
            alignment helps.
        samples: probe inputs at most. A few per class and hidden unit are enough; cost grows with them.
        places: where units are looked at that several layers read, as those of a residual stream. "all": where each of
            them reads, the correlations added up. "last": where the last one does, which is the paper's own choice;
            merged ResNets score worse by it.
        stay: from a node's second merge on, what a unit's own place counts more than another, as a correlation from 0 to
            2. 0 is the paper's. With 0.5 a unit moves only for a correlation that is higher by so much: where data are
            unequal, noise would otherwise shuffle units again at each merge.
        reestimate: BatchNorm's statistics before the comparison, as the paper does.

    A model whose activations are not finite is dropped.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2404.08079 (DIMAT), MERGE: covariances of post-activation values, normalised, one assignment for each
    matching node, all models matched pairwise to the own one. The optimizer's state is none of this rule's matter: it
    starts afresh in each round.
    """
    require(probe in PROBES, "probe", f"one of {', '.join(PROBES)}", probe)
    require_count("samples", samples)
    require(places in PLACES, "places", f"one of {', '.join(PLACES)}", places)
    require(is_number(stay) and 0 <= stay <= 2, "stay", "a number from 0 to 2", stay)

    def align(
        receiver: Receiver, own: Params, others: Sequence[Params], is_first: bool
    ) -> tuple[Symmetry, Sequence[Permutations | None], str]:
        inputs = probe_of(receiver, probe, samples)
        symmetry = symmetry_of(receiver.model, inputs)
        compared = [
            reestimated(receiver.model, params, inputs) if reestimate else params for params in (own, *others)
        ]
        names = _parameters(receiver)
        reluctance = 0.0 if is_first else stay
        orders = match_activations(symmetry, compared[0], compared[1:], inputs, names, places, reluctance)
        return symmetry, orders, f"{len(inputs)} {probe} samples"

    return _rule("align.activation", align, (MODEL, SAMPLES))


def by_weight(restarts: int = 2, seed: int = 0) -> Rule:
    """Reorder each received model's units so that its weights lie nearest to the receiver's own.

    Needs no data but one batch of the receiver's samples to trace the network with. Coordinate descent over the axes,
    from the input on and again in `restarts` random sequences drawn from `seed`; the best of them counts.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2209.04836 (Git Re-Basin), weight matching; parameters only, without running statistics.
    """
    require_count("restarts", restarts, 0)
    require_count("seed", seed, 0)

    def align(
        receiver: Receiver, own: Params, others: Sequence[Params], is_first: bool
    ) -> tuple[Symmetry, Sequence[Permutations | None], str]:
        symmetry = symmetry_of(receiver.model, probe_of(receiver, "own", CHUNK))
        orders = [
            match_weights(symmetry, own, other, _parameters(receiver), seed, restarts) for other in others
        ]
        return symmetry, orders, "none needed"

    return _rule("align.weight", align, (MODEL, SAMPLES))


def _parameters(receiver: Receiver) -> list[str]:
    """Without running statistics and other buffers."""
    return [name for name, _ in receiver.model.named_parameters()]


_Align = Callable[
    [Receiver, Params, Sequence[Params], bool], tuple[Symmetry, Sequence[Permutations | None], str]
]
"""(receiver, own, others, is_first) -> the structure, an order for each of the others, which probe. No order where there
is nothing to compare."""


class _Done(NamedTuple):
    """What a rule remembers: merges that had something to align, and what the last one did."""

    num_merges: int
    report: Report


def _rule(name: str, align: _Align, needs: Sequence[str]) -> Rule:
    def update(
        contributions: Sequence[Contribution], state: _Done, local: Contribution
    ) -> tuple[list[Contribution], _Done]:
        differing = [other for other in contributions if not same(other.params, local.params)]
        if not differing:
            return list(contributions), state._replace(report={})
        others = [other.params for other in differing]
        symmetry, orders, probe = align(receiver_of(local), local.params, others, state.num_merges == 0)
        found = {id(other): order for other, order in zip(differing, orders, strict=True)}
        usable = [order for order in orders if order is not None]
        report: dict[str, str | float] = {
            f"{name}.probe": probe,
            f"{name}.moved": _share_moved(symmetry, usable),
        }
        if len(usable) < len(orders):
            report[f"{name}.dropped"] = len(orders) - len(usable)
        if held := symmetry.left_alone():
            report[f"{name}.left_alone"] = "; ".join(f"{axis} {reason}" for axis, reason in held.items())
        done = _Done(state.num_merges + 1, report)
        aligned = [
            replace(other, params=symmetry.permute(other.params, order))
            for other in contributions
            if (order := found.get(id(other), {})) is not None
        ]
        return aligned, done

    return Rule(lambda params: _Done(0, {}), update, frozenset(needs), lambda state: state.report)


def _share_moved(symmetry: Symmetry, orders: Sequence[Permutations]) -> float:
    """Of all free units of all models, those that changed their place."""
    stay = symmetry.identity()
    moved = sum(int((order[axis] != stay[axis]).sum()) for order in orders for axis in stay)
    total = sum(place.numel() for place in stay.values()) * len(orders)
    return moved / total if total else 0.0
