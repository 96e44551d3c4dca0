"""Merging networks that grew up apart: what aligning, re-estimating and REPAIR are each worth, and where they fail.

Pairs of networks from different random starts, trained on the same digits or on different classes, are merged half and
half by the rules a node would run, at a receiver that has its own data only (papers: DIMAT, arXiv 2404.08079; Git
Re-Basin, arXiv 2209.04836; REPAIR, arXiv 2211.08403). All accuracies are on test digits of all classes.

    python benchmarks/merging_apart.py FOLDER [--seeds 3] [--only mlp,deep,resnet] [--cache FOLDER] [--out docs] [--json]

FOLDER holds `images-idx3-ubyte.gz` and `labels-idx1-ubyte.gz`, 10,000 digits. Prints tables and redraws `apart.png` and
`barriers.png`; docs/merging.md reads them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from apart_networks import HALVES, KINDS, Digits, Share, read_digits, receiver, trained
from torch import Tensor

from aggregation import alignment, rules
from aggregation.base import Contribution, Local, Params, Receiver
from aggregation.probes import probe_of
from aggregation.statistics import reestimated, repaired
from aggregation.symmetry import Permutations, Symmetry, symmetry_of

mpl.use("Agg")
from matplotlib import pyplot as plt

Specs = list[str | dict[str, Any]]

SAMPLES = 2048
HALF: Specs = [{"name": "mean", "conservative": 0.5}]
ALIGNED: dict[str, Specs] = {
    "plain": [],
    "activation, own probe": [{"name": "align.activation", "samples": SAMPLES}],
    "activation, shared probe": [{"name": "align.activation", "samples": SAMPLES, "probe": "shared"}],
    "weight": ["align.weight"],
}
STREAMS: dict[str, Specs] = {
    "activation, own, last place": [{"name": "align.activation", "samples": SAMPLES, "places": "last"}],
}
"""For networks with a residual stream, which several layers read."""
COLOURS = {
    "plain": "#c1440e",
    "activation, own probe": "#0b6e4f",
    "activation, shared probe": "#7cb518",
    "weight": "#3b5ba5",
}
SAME, APART = (Share(), Share()), (Share(HALVES[0]), Share(HALVES[1]))
OTHERS = (0.02, 0.1, 0.3)
"""Parts of the other side's rows that a peer has too, between none at all and the same data."""
ALPHAS = [step / 10 for step in range(11)]
DRAWN = ("mlp", "deep", "resnet", "resnet-gn")


@dataclass(frozen=True)
class Pair:
    """Two trained networks; the first one's peer is the receiver."""

    kind: str
    own: Params
    other: Params
    receiver: Receiver
    other_receiver: Receiver
    test: tuple[Tensor, Tensor]
    shares: tuple[Share, Share]

    def fix(self, probe: str) -> Specs:
        return [{"name": KINDS[self.kind].fix, "samples": SAMPLES, "probe": probe}]

    def merge(self, specs: Specs) -> tuple[Params, Mapping[str, str | float]]:
        """By the rules as a node runs them, with their report."""
        rule = rules.build(specs)
        local = Local(self.own, receiver=self.receiver)
        params, state = rules.merge(rule, [Contribution(self.other, source="b")], rule.init(self.own), local)
        return params, rule.report(state)

    @torch.no_grad()
    def logits(self, params: Params) -> Tensor:
        self.receiver.model.load_state_dict(params)
        return self.receiver.model(self.test[0])

    def accuracy(self, outputs: Tensor) -> float:
        return _mean(outputs.argmax(1) == self.test[1])

    def merged_accuracy(self, specs: Specs) -> float:
        return self.accuracy(self.logits(self.merge(specs)[0]))

    @property
    def symmetry(self) -> Symmetry:
        return symmetry_of(self.receiver.model, probe_of(self.receiver, "own", 256))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.receiver.model.named_parameters()]


def _mean(values: Tensor) -> float:
    return float(values.float().mean())


@dataclass
class Columns:
    """Numbers by the row of a table and the column, one for each pair."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, column: str, value: float) -> None:
        self.values.setdefault(row, {}).setdefault(column, []).append(value)

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            row: {name: statistics.median(numbers) for name, numbers in columns.items()}
            for row, columns in self.values.items()
        }


# --- the main table -------------------------------------------------------------------------------------
def compare(pair: Pair, table: Columns) -> None:
    """Endpoints, what both say together, and every alignment without and with what puts activations right."""
    mine, theirs = pair.logits(pair.own), pair.logits(pair.other)
    table.add("receiver's own", "mean", pair.accuracy(mine))
    table.add("the other's", "mean", pair.accuracy(theirs))
    table.add("both, logits added (no merge)", "mean", pair.accuracy(mine + theirs))
    streams = STREAMS if pair.kind.startswith("resnet") else {}
    for name, align in (ALIGNED | streams).items():
        table.add(name, "mean", pair.merged_accuracy(align + HALF))
        for probe in ("own", "shared"):
            table.add(name, f"+fix, {probe}", pair.merged_accuracy(align + HALF + pair.fix(probe)))


# --- why: the decision between the halves ---------------------------------------------------------------
def examine(pair: Pair, table: Columns) -> None:
    """What is left of either half's knowledge, and of telling one half from the other."""
    mine, theirs = pair.logits(pair.own), pair.logits(pair.other)
    outputs = {
        "receiver's own": mine,
        "the other's": theirs,
        "both, logits added (no merge)": (mine + theirs) / 2,
    }
    outputs |= {name: pair.logits(pair.merge(align + HALF)[0]) for name, align in ALIGNED.items()}
    labels = pair.test[1]
    first = labels < HALVES[1].start
    for name, each in outputs.items():
        low, high = each[:, HALVES[0]], each[:, HALVES[1]]
        gap = low.max(1).values - high.max(1).values
        within = torch.where(first, low.argmax(1), high.argmax(1) + HALVES[1].start) == labels
        reach = float(gap.abs().max())
        shifts = torch.linspace(-reach, reach, 201)
        table.add(name, "0-4", _mean((each.argmax(1) == labels)[first]))
        table.add(name, "5-9", _mean((each.argmax(1) == labels)[~first]))
        table.add(name, "0-4, half told", _mean(within[first]))
        table.add(name, "5-9, half told", _mean(within[~first]))
        table.add(name, "halves, AUC", _auc(gap, first))
        table.add(
            name, "best shift", max(pair.accuracy(torch.cat([low, high + shift], 1)) for shift in shifts)
        )
        table.add(name, "logits' dev.", float(each.std()))
    head = [name for name in pair.names if name.endswith("weight")][-1]

    def votes(params: Params) -> Tensor:
        """How much each unit of the last hidden layer speaks for the first half against the second."""
        return params[head][HALVES[0]].mean(0) - params[head][HALVES[1]].mean(0)

    for name, align in ALIGNED.items():
        moved, _ = pair.merge([*align, {"name": "mean", "conservative": 0}])
        table.add(name, "cos of votes", float(F.cosine_similarity(votes(pair.own), votes(moved), dim=0)))


def _auc(score: Tensor, positive: Tensor) -> float:
    """The chance that a positive sample scores above a negative one."""
    ranks = score.argsort().argsort().double()
    num = int(positive.sum())
    return float((ranks[positive].sum() - num * (num - 1) / 2) / (num * (len(score) - num)))


# --- what might help ------------------------------------------------------------------------------------
def try_remedies(pair: Pair, seed: int, table: Columns) -> Mapping[str, str | float]:
    """Accuracies of all that was tried; the report of `choose`."""
    symmetry, generator = pair.symmetry, torch.Generator().manual_seed(seed)
    own, other = (probe_of(each, "own", SAMPLES) for each in (pair.receiver, pair.other_receiver))
    shared = probe_of(pair.receiver, "shared", SAMPLES)
    union = torch.cat([own[::2], other[::2]])
    probes = {"own": own, "other's": other, "both sides'": union, "shared": shared}
    probes["noise"] = torch.randn(own.shape, generator=generator)
    gains = {
        name: alignment.activation_gains(symmetry, pair.own, [pair.other], inputs)[0]
        for name, inputs in probes.items()
    }
    gains["mean of both sides' correlations"] = {
        axis: (gains["own"][axis] + gains["other's"][axis]) / 2 for axis in symmetry.free
    }
    orders = {f"activation, {name}": _orders(symmetry, each) for name, each in gains.items()}
    orders["weight"] = alignment.match_weights(symmetry, pair.own, pair.other, pair.names)
    on_shared = orders["activation, shared"]
    for least in (0.3, 0.5, 0.7):
        orders[f"activation, shared, correlation >= {least}"] = {
            axis: _above(gains["shared"][axis], order, least) for axis, order in on_shared.items()
        }
    first, last = min(symmetry.free), max(symmetry.free)
    orders["activation, shared, first layer only"] = {first: on_shared[first]}
    orders["activation, shared, all but the last"] = {
        axis: on_shared[axis] for axis in on_shared if axis != last
    }
    orders["activation, shared, last layer only"] = {last: on_shared[last]}
    orders["random order"] = symmetry.random(generator)
    orders = {"plain": {}, **orders}
    for name, order in orders.items():
        moved = symmetry.permute(pair.other, order)
        _judge(pair, moved, _half(pair.own, moved), shared, name, table)
    for name in ("plain", "activation, shared", "weight"):
        moved = symmetry.permute(pair.other, orders[name])
        _judge(
            pair,
            moved,
            _head_by_class(pair, moved),
            shared,
            f"{name}; output rows by who has the class",
            table,
        )
        summed = _summed(pair, moved, gains["shared"], orders[name])
        _judge(pair, moved, summed, shared, f"{name}; units below 0.5 summed, not halved", table)
    fix = pair.fix("shared")
    lists = [HALF + fix, ALIGNED["activation, shared probe"] + HALF + fix, ALIGNED["weight"] + HALF + fix]
    report: Mapping[str, str | float] = {}
    for own_too in (True, False):
        params, report = pair.merge([{"name": "choose", "of": lists, "own": own_too}])
        name = f"choose of plain, activation, weight{'' if own_too else '; own model no candidate'}"
        table.add(name, "+fix, shared", pair.accuracy(pair.logits(params)))
    return report


def _orders(symmetry: Symmetry, gains: Mapping[int, Tensor]) -> Permutations:
    found: Permutations = {}
    for unit in alignment.units(symmetry):
        found |= alignment.assign(symmetry, unit, gains)
    return found


def _above(gain: Tensor, order: Tensor, least: float) -> Tensor:
    """Only pairs that correlate so much; the others keep their place, or take one that is left."""
    good = gain[torch.arange(len(order)), order] >= least
    out = torch.where(good, order, torch.full_like(order, -1))
    left = sorted(set(range(len(order))) - set(out.tolist()))
    for place in range(len(order)):
        if out[place] < 0 and place in left:
            out[place] = place
            left.remove(place)
    out[out < 0] = torch.tensor(left, dtype=out.dtype)
    return out


def _half(own: Params, other: Params) -> Params:
    return {
        name: torch.lerp(tensor, other[name], 0.5) if tensor.is_floating_point() else tensor
        for name, tensor in own.items()
    }


def _head_by_class(pair: Pair, moved: Params) -> Params:
    """The mean, but every row of the output layer from the peer that has the class."""
    merged = _half(pair.own, moved)
    for name in pair.names[-2:]:
        merged[name] = torch.cat([pair.own[name][HALVES[0]], moved[name][HALVES[1]]])
    return merged


def _summed(pair: Pair, moved: Params, gain: Mapping[int, Tensor], order: Permutations) -> Params:
    """The mean, but twice what goes into hidden units that were not matched. For MLPs: two names a layer, one axis."""
    merged = _half(pair.own, moved)
    for layer, axis in enumerate(sorted(gain)):
        places = torch.arange(len(gain[axis]))
        weak = gain[axis][places, order.get(axis, places)] < 0.5
        for name in pair.names[2 * layer : 2 * layer + 2]:
            merged[name][weak] *= 2
    return merged


def _judge(pair: Pair, moved: Params, merged: Params, inputs: Tensor, name: str, table: Columns) -> None:
    table.add(name, "mean", pair.accuracy(pair.logits(merged)))
    if KINDS[pair.kind].fix == "repair":
        fixed = repaired(pair.symmetry, merged, [(0.5, pair.own), (0.5, moved)], inputs)
    else:
        fixed = reestimated(pair.receiver.model, merged, inputs)
    table.add(name, "+fix, shared", pair.accuracy(pair.logits(fixed)))


# --- the alignment score --------------------------------------------------------------------------------
def alignment_score(own: Tensor, other: Tensor) -> float:
    """How far two weights' singular directions agree, the largest first: 1 for equal weights (arXiv 2402.04051)."""
    left_a, values_a, right_a = torch.linalg.svd(own.flatten(1).double(), full_matrices=False)
    left_b, values_b, right_b = torch.linalg.svd(other.flatten(1).double(), full_matrices=False)
    weights = values_a * values_b
    agreement = ((left_a * left_b).sum(0) * (right_a * right_b).sum(1)).abs()
    return float((weights * agreement).sum() / weights.sum())


def score_layers(pair: Pair, table: Columns) -> None:
    for name, align in ALIGNED.items():
        moved, _ = pair.merge([*align, {"name": "mean", "conservative": 0}])
        for layer in (each for each in pair.names if pair.own[each].ndim >= 2):
            table.add(layer, name, alignment_score(pair.own[layer], moved[layer]))


# --- barriers -------------------------------------------------------------------------------------------
def along_the_line(pair: Pair) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By alignment, without and with the fix: loss and accuracy from the receiver's model to the other's."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in ("plain", "activation, own probe", "weight"):
        other, _ = pair.merge([*ALIGNED[name], {"name": "mean", "conservative": 0}])
        lines[name] = {"mean": [], "fixed": []}
        for alpha in ALPHAS:
            mean: Specs = [{"name": "mean", "conservative": 1 - alpha}]
            for which, specs in (("mean", mean), ("fixed", mean + pair.fix("own"))):
                rule = rules.build(specs)
                local = Local(pair.own, receiver=pair.receiver)
                params, _ = rules.merge(rule, [Contribution(other)], rule.init(pair.own), local)
                outputs = pair.logits(params)
                loss = float(F.cross_entropy(outputs, pair.test[1]))
                lines[name][which].append((loss, pair.accuracy(outputs)))
    return lines


def draw_barriers(lines: Mapping[tuple[str, str], Mapping[str, Any]], path: Path) -> None:
    kinds = list(dict.fromkeys(kind for kind, _ in lines))
    rows = [("same", 0), ("same", 1), ("apart", 0), ("apart", 1)]
    titles = {"same": "same data", "apart": "classes 0-4 | 5-9"}
    figure, axes = plt.subplots(
        len(rows), len(kinds), figsize=(2.9 * len(kinds), 9), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )  # fmt: skip
    for column, kind in enumerate(kinds):
        for axis, (split, what) in zip(axes[:, column], rows, strict=True):
            for name, curves in lines[kind, split].items():
                for which, style in (("mean", ":"), ("fixed", "-")):
                    label = name if which == "mean" else f"{name}, fixed"
                    values = [point[what] for point in curves[which]]
                    axis.plot(ALPHAS, values, style, color=COLOURS[name], label=label, lw=1.8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.25)
            axis.set(xlim=(0, 1), **({"ylim": (0, 1)} if what else {"yscale": "log", "ylim": (0.05, 30)}))
            if column == 0:
                axis.set_ylabel(f"{titles[split]}\n{'accuracy' if what else 'loss (log)'}")
        axes[0, column].set_title(KINDS[kind].title, fontsize=10)
        axes[-1, column].set_xlabel("share of the other's model")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(
        "From the receiver's model to a peer's, on test digits of all classes\n"
        "(fixed: BatchNorm re-estimated, or where there is none REPAIR, on the receiver's data)",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_overlap(tables: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], path: Path) -> None:
    """Accuracy by how much of the other side's data a peer has."""
    splits = {
        "apart": "0",
        **{f"{others:.0%} of the others": f"{others * 100:.0f}" for others in OTHERS},
        "same": "100",
    }
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5 * len(kinds), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        medians = [tables[f"{kind}, {split}"] for split in splits]
        together = [each["both, logits added (no merge)"]["mean"] for each in medians]
        axis.plot(
            range(len(splits)), together, "--", color="#999999", lw=1.2, label="both models run, not merged"
        )
        for name, colour in COLOURS.items():
            values = [
                each[name]["+fix, own" if name != "activation, shared probe" else "+fix, shared"]
                for each in medians
            ]
            axis.plot(range(len(splits)), values, "-o", ms=3.5, color=colour, lw=1.8, label=name)
        axis.set(title=KINDS[kind].title, xlabel="% of the other side's rows that a peer has", ylim=(0.2, 1))
        axis.set_xticks(range(len(splits)), list(splits.values()))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0, 0].set_ylabel("test accuracy of the merge, all classes")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(
        "One model of two: mean after alignment, then REPAIR, by how far apart the data are", fontsize=11
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- putting it together --------------------------------------------------------------------------------
def run(
    digits: Digits, kinds: Sequence[str], seeds: int, cache: Path | None, note: Callable[[str], None]
) -> dict[str, Any]:
    def pairs(kind: str, shares: tuple[Share, Share]) -> list[Pair]:
        return [
            Pair(
                kind,
                *(
                    trained(kind, digits, share, 2 * number + side, cache)
                    for side, share in enumerate(shares)
                ),
                *(receiver(kind, digits, share) for share in shares),
                digits.test,
                shares,
            )
            for number in range(min(seeds, KINDS[kind].most_pairs))
        ]

    main, why, remedies, scores = ({} for _ in range(4))
    lines, choices = {}, {}
    for kind in kinds:
        splits = {"same": SAME, "apart": APART}
        if kind in ("mlp", "deep"):
            splits |= {
                f"{others:.0%} of the others": tuple(Share(half, others) for half in HALVES)
                for others in OTHERS
            }
            splits["apart, masked loss"] = tuple(Share(half, masked=True) for half in HALVES)
        for split, shares in splits.items():
            found = pairs(kind, shares)
            tables = [Columns() for _ in range(4)]
            for number, pair in enumerate(found):
                note(f"{KINDS[kind].title}, {split}, pair {number + 1} of {len(found)}")
                compare(pair, tables[0])
                if split == "apart":
                    examine(pair, tables[1])
                if kind in ("mlp", "deep") and split in ("apart", "2% of the others"):
                    choices[f"{kind}, {split}, {number}"] = dict(try_remedies(pair, number, tables[2]))
                if kind in ("mlp", "deep") and split in ("same", "apart"):
                    score_layers(pair, tables[3])
            for result, table in zip((main, why, remedies, scores), tables, strict=True):
                if table.values:
                    result[f"{kind}, {split}"] = table.medians()
            if kind in DRAWN and split in ("same", "apart"):
                note(f"{KINDS[kind].title}, {split}: along the line")
                lines[kind, split] = along_the_line(found[0])
    return {
        "main": main,
        "why": why,
        "remedies": remedies,
        "scores": scores,
        "choices": choices,
        "lines": lines,
    }


def show(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"\n{title:56}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns))
    for name, row in rows.items():
        cells = (f"{row[each]:.3f}" if each in row else "" for each in columns)
        print(
            f"  {name:54}"
            + "".join(f"{cell:>{max(9, len(each) + 2)}}" for cell, each in zip(cells, columns, strict=True))
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="10,000 digits as two gzipped IDX files")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "docs", help="folder of the pictures"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of each kind; the tables show medians")
    parser.add_argument("--only", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}, with commas")
    parser.add_argument("--cache", type=Path, help="folder to keep trained networks in, for the next run")
    arguments = parser.parse_args()
    kinds = arguments.only.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--only: no kind is called {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if not arguments.out.is_dir():
        parser.error(f"--out: {arguments.out} is no folder")
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    torch.set_num_threads(1)
    digits = read_digits(arguments.folder)
    result = run(digits, kinds, arguments.seeds, arguments.cache, lambda line: print(line, file=sys.stderr))
    lines = result.pop("lines")
    if any(kind in DRAWN for kind in kinds):
        draw_barriers(lines, arguments.out / "barriers.png")
    if overlapping := [kind for kind in kinds if kind in ("mlp", "deep")]:
        draw_overlap(result["main"], overlapping, arguments.out / "apart.png")
    if arguments.json:
        result["lines"] = {f"{kind}, {split}": each for (kind, split), each in lines.items()}
        print(json.dumps(result))
        return
    headings = {
        "main": "accuracy (fix: BatchNorm re-estimated, else REPAIR)",
        "why": "why",
        "remedies": "what was tried",
        "scores": "alignment score",
    }
    for part, heading in headings.items():
        for case, rows in result[part].items():
            show(f"{case}: {heading}", rows)
    print(f"\ndrawn in {arguments.out}")


if __name__ == "__main__":
    main()
