"""When to talk: the same traffic early, evenly or late, and one merge of all at the end (arXiv 2507.06542).

Sixteen nodes with unequal data (Dirichlet, 0.5 and 0.1) learn handwritten digits in the simulator, all from one start.
Compared at one budget of exchanged models: dense exchanges at the beginning, evenly spread ones, dense exchanges at the
end. Then sparse exchanges throughout (each node sends its model to one other, in every fifth, every second or every
round) with one final merge, against the server-style run that averages all models after every round, and against no
exchange before the final merge.

    python benchmarks/single_merge.py [FOLDER] [--json] [--out docs/single-merge.png] [--seeds 3]

FOLDER holds MNIST's test images (t10k) as two gzipped IDX files; left out, scikit-learn's digits are learned. Prints
for each run the nodes' mean accuracy, what the mean of their models is worth, and the models sent; draws the picture.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

from sim.results import MergedRow, SampleRow
from sim.scenario_files import convert
from sim.world import Observer, World

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
NODES, ROUNDS = 16, 300
ALPHAS = (0.5, 0.1)
SPARSE, SHARE = 0.2, 0.05
"""Receivers of a model in a sparse exchange, and the share of the rounds that are dense."""
DENSE = {"quorum": 1.0}
BUDGET = SHARE * (NODES - 1) + (1 - SHARE) * SPARSE
"""Models that a node sends in a round, on average over the run."""

NOBODY = 1e-9
"""As a number of receivers: in the schedule, 0 means all."""


def final(fanout: float) -> dict[str, Any]:
    """Sparse exchanges throughout, and one merge of all at the end."""
    return {"gossip": {"quorum": 0.0, "fanout": fanout, "final_merge": "butterfly", "final_deadline_s": 10.0}}


RUNS: dict[str, dict[str, Any]] = {
    "early": {"gossip": {**DENSE, "dense_until": SHARE, "sparse_fanout": SPARSE}},
    "evenly": {"gossip": {"quorum": 0.0, "fanout": BUDGET}},
    "late": {"gossip": {**DENSE, "dense_from": 1 - SHARE, "sparse_fanout": SPARSE}},
    "1 in 5 rounds, final merge": final(0.2),
    "1 in 2 rounds, final merge": final(0.5),
    "every round, final merge": final(1.0),
    "server-style": {"rule": "fedavg", "gossip": DENSE},
    "nothing, final merge": final(NOBODY),
    "nothing, other starts, final merge": {**final(NOBODY), "data": {"start": "different"}},
}
COLOURS = ["#c1440e", "#c9a227", "#0b6e4f", "#5b2a86", "#8e5bb5", "#c9a6e4", "#3b5ba5", "#777777", "#bbbbbb"]


class Outcome(NamedTuple):
    """Accuracies by virtual seconds; the last ones of the nodes before any final merge, of the mean of all models, and of
    the final merge; the models that travelled."""

    nodes: list[tuple[float, float]]
    mean: list[tuple[float, float]]
    local: float
    merged: float
    final: float | None
    sent: int


class _Curves(Observer):
    def __init__(self, world: World) -> None:
        self.world = world
        self.nodes: list[tuple[float, float]] = []
        self.mean: list[tuple[float, float]] = []

    def sample(self, row: SampleRow) -> None:
        accuracy = self.world.accuracy()
        if accuracy is not None:
            self.nodes.append((row.at_s, accuracy))

    def merged(self, row: MergedRow) -> None:
        self.mean.append((row.at_s, row.accuracy))


def run(name: str, alpha: float, seed: int, folder: str) -> Outcome:
    """One run; its traffic is that of all nodes."""
    changes = RUNS[name]
    data = {
        "start": "common",
        "partitioner": "dirichlet",
        "alpha": alpha,
        **(
            {"task": "dimat_task.py:digits", "options": {"folder": folder, "hidden": [64], "train": 5488}}
            if folder
            else {}
        ),
        **changes.get("data", {}),
    }
    gossip = {"rounds": ROUNDS, "deadline_s": 10.0, "pause_s": 0.0, "keep_every": 1000, **changes["gossip"]}
    scenario = convert(
        {
            "nodes": NODES,
            "seed": seed,
            "rule": changes.get("rule", "mean"),
            "topology": {"kind": "full"},
            "data": data,
            "training": {"local_steps": 5, "batch_size": 16, "learning_rate": 0.1},
            "gossip": gossip,
            "evaluation": {"merged": True, "every": 10, "sample_every_s": 5.0},
        }
    )
    world = World(scenario, HERE)
    curves = world.observer = _Curves(world)
    result = world.run()
    world.plan.close()
    assert result.merged_accuracy is not None
    return Outcome(
        curves.nodes,
        curves.mean,
        result.accuracy_by_round[-1],
        result.merged_accuracy,
        result.final_merged_accuracy,
        result.fetches,
    )


Outcomes = dict[float, dict[str, list[Outcome]]]
"""By alpha, by run, a seed each."""


def draw(outcomes: Outcomes, path: Path) -> None:
    """What nodes have and what their mean is worth, over time, of the first seed."""
    figure, axes = plt.subplots(len(outcomes), 2, figsize=(11, 7.5), sharex=True, sharey=True, squeeze=False)
    for row, (alpha, by_name) in zip(axes, outcomes.items(), strict=True):
        for axis, field, title in (
            (row[0], "nodes", "the nodes' models"),
            (row[1], "mean", "the mean of all models"),
        ):
            for (name, runs), colour in zip(by_name.items(), COLOURS, strict=True):
                points = getattr(runs[0], field)
                axis.plot(*zip(*points, strict=True), color=colour, lw=1.6, label=name)
                if field == "mean" and runs[0].final is not None:
                    axis.plot(points[-1][0], runs[0].final, "*", color=colour, ms=12)
            axis.set_title(f"Dirichlet({alpha}): {title}", fontsize=10)
            axis.grid(alpha=0.25)
        row[0].set_ylabel("test accuracy")
    for axis in axes[-1]:
        axis.set_xlabel("virtual seconds")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


def table(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Medians over the seeds."""
    return [
        {
            "alpha": alpha,
            "run": name,
            "nodes": statistics.median(one.local for one in runs),
            "mean_of_models": statistics.median(
                one.merged if one.final is None else one.final for one in runs
            ),
            "models_sent": statistics.median(one.sent for one in runs),
        }
        for alpha, by_name in outcomes.items()
        for name, runs in by_name.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", default="", help="MNIST's test images; left out, scikit-learn's digits"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "single-merge.png")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    folder = str(Path(options.folder).resolve()) if options.folder else ""
    if folder and not Path(folder).is_dir():
        parser.error(f"there is no folder {folder}")
    outcomes: Outcomes = {alpha: {} for alpha in ALPHAS}
    for alpha, by_name in outcomes.items():
        for name in RUNS:
            print(f"Dirichlet({alpha}), {name} ...", file=sys.stderr)
            by_name[name] = [run(name, alpha, seed, folder) for seed in range(options.seeds)]
    draw(outcomes, options.out)
    rows = table(outcomes)
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'alpha':>5}  {'run':36} {'nodes':>7} {'mean of models':>15} {'models sent':>12}")
    for row in rows:
        print(
            f"{row['alpha']:5}  {row['run']:36} {row['nodes']:7.3f} {row['mean_of_models']:15.3f} {row['models_sent']:12,.0f}"
        )


if __name__ == "__main__":
    main()
