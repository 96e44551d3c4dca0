"""The vanishing variance problem, with the deployed core in the simulator (papers: Tian et al., arXiv 2404.04616).

16 nodes on a drawn 4-regular graph learn the digits with a deep narrow network. From different random starts,
averaging shrinks the weights' variance and the network never leaves chance; correcting the variance after each
merge makes up for it. A common start, which a network without a server does not have, is the yardstick.

    python benchmarks/vanishing_variance.py [--json] [--out docs/variance.png] [--seeds 3]

Prints the rounds until the nodes' mean accuracy reaches 0.90, and redraws the picture in `docs/`.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from sim.scenario_files import convert
from sim.world import World

mpl.use("Agg")
from matplotlib import pyplot as plt

TARGET = 0.90
MAX_ROUNDS = 120
CURVES = {
    "different starts, variance corrected": ("different", ("mean", "variance.corrected"), "#0b6e4f", "-"),
    "common start, plain mean": ("common", ("mean",), "#3b5ba5", "--"),
    "different starts, plain mean": ("different", ("mean",), "#c1440e", "-"),
}
SPLITS = {"IID": ("iid", 0.5), "Dirichlet(0.5)": ("dirichlet", 0.5)}


def run(start: str, rule: tuple[str, ...], partitioner: str, alpha: float, seed: int) -> list[float]:
    """Mean accuracy after each round."""
    scenario = convert(
        {
            "nodes": 16,
            "seed": seed,
            "topology": {"degree": 4},
            "rule": rule,
            "data": {
                "start": start,
                "options": {"hidden": [64, 64, 64]},
                "partitioner": partitioner,
                "alpha": alpha,
            },
            "training": {"local_steps": 5, "batch_size": 16, "learning_rate": 0.1},
            "gossip": {
                "rounds": MAX_ROUNDS,
                "quorum": 1.0,
                "deadline_s": 5.0,
                "pause_s": 0.0,
                "keep_every": 1000,
            },
        }
    )
    return World(scenario).run().accuracy_by_round


def rounds_to(curve: list[float], target: float) -> int | None:
    """Rounds done when the curve first reaches the target; None where it never does."""
    return next((number for number, accuracy in enumerate(curve, start=1) if accuracy >= target), None)


def draw(curves: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (split, by_name) in zip(axes, curves.items(), strict=True):
        for name, runs in by_name.items():
            *_, colour, style = CURVES[name]
            rounds = range(1, len(runs[0]) + 1)
            columns = list(zip(*runs, strict=True))
            axis.plot(rounds, [statistics.mean(c) for c in columns], style, color=colour, label=name, lw=1.8)
            axis.fill_between(
                rounds, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, lw=0
            )
        axis.axhline(TARGET, color="#999999", lw=0.8, ls=":")
        axis.set(title=split, xlabel="round", ylim=(0, 1), xlim=(1, MAX_ROUNDS))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("mean test accuracy of 16 nodes")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CURVES), frameon=False
    )
    figure.suptitle(
        "Averaging models from different starts, with and without variance correction (line: 0.90)",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "variance.png")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each curve; the table shows each one's rounds"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, dict[str, list[list[float]]]] = {}
    result: dict[str, Any] = {"rounds_to_0.90": {}, "ratio_to_common_start": {}, "final": {}}
    for split, (partitioner, alpha) in SPLITS.items():
        curves[split] = {
            name: [run(start, rule, partitioner, alpha, seed) for seed in range(arguments.seeds)]
            for name, (start, rule, *_) in CURVES.items()
        }
        needed = {name: [rounds_to(curve, TARGET) for curve in runs] for name, runs in curves[split].items()}
        result["rounds_to_0.90"][split] = needed
        result["final"][split] = {name: [curve[-1] for curve in runs] for name, runs in curves[split].items()}
        corrected, common, _ = needed.values()
        pairs = [a / b for a, b in zip(corrected, common, strict=True) if a and b]
        result["ratio_to_common_start"][split] = statistics.median(pairs) if pairs else None
    draw(curves, arguments.out)
    if arguments.json:
        print(json.dumps(result))
        return
    for split, needed in result["rounds_to_0.90"].items():
        print(f"{split}: rounds to {TARGET:.2f} by seed ('-': not within {MAX_ROUNDS}), final accuracy")
        for name, rounds in needed.items():
            final = statistics.mean(result["final"][split][name])
            print(f"  {name:40} {' '.join(str(r or '-').rjust(4) for r in rounds)}   {final:.3f}")
        print(
            f"  corrected over common start, median: {result['ratio_to_common_start'][split]:.2f} (target 1.5)"
        )
    print(f"drawn: {arguments.out}")


if __name__ == "__main__":
    main()
