"""What decentralised sampling costs and stands: four in five nodes fall silent, against gossip on the same network.

    python benchmarks/sampled.py [FOLDER] [--seeds 3] [--json] [--only sampled] [--out docs/sampled.png] [--set nodes=100]

Three kinds of runs. "built-in" is the scenario `sampled`: 300 nodes, ten of which train in each round; 80 % stop answering
at one third of the rounds and come back later. "whole" is the same network without a failure, under sampling, under gossip
with all neighbours and under gossip with one of them a round. In "early" 80 % fall silent for good when a third of
the way to the mark is done, which is soon enough to matter for the bytes.

FOLDER holds MNIST's test images (t10k) as two gzipped IDX files; left out, scikit-learn's digits are learned. What sampling
is measured by is the latest aggregate, of gossip the mean of what a tenth of the nodes have. A run reaches the mark with
the first moment at which the mean of the last three aggregates, or that of the nodes, is above it.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from msgspec import Struct

from protocols.events import Record, RoundDone
from sim import scenario_files
from sim.results import RoundRow, SampleRow
from sim.scenarios import Scenario
from sim.timeline import Action, parse
from sim.world import Observer, World

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

HERE = Path(__file__).parent
MARK = 0.9
LAST = 3
"""Aggregates whose mean is taken: one model's accuracy jumps."""
RUNS: dict[str, tuple[str, ...]] = {
    "sampled": (),
    "gossip": ("gossip.fanout=0",),
    "gossip, fanout 1": ("gossip.fanout=1", "gossip.quorum=0"),
}
GOSSIP = (
    "learning=gossip",
    "rule=corrected",
    "gossip.rounds=200",
    "gossip.quorum=0.5",
    "gossip.deadline_s=3",
    "evaluation.share=0.1",
    "evaluation.every=2",
)
AT_MOST_S = {"sampled": 180, "gossip": 60, "gossip, fanout 1": 80}
"""Of the runs beside the built-in one: enough to reach the mark."""
EARLY_S = {"sampled": 25, "gossip": 10, "gossip, fanout 1": 10}
COLOURS = {"sampled": "#2a78d6", "gossip": "#eb6834", "gossip, fanout 1": "#1baf7a"}
LARGE_BYTES = 1_000_000


class Outcome(Struct):
    """Of one run. Bytes are those of all nodes, times virtual seconds."""

    accuracy: list[tuple[float, float]]
    control: list[tuple[float, int]]
    model: list[tuple[float, int]]
    wall_s: float
    model_bytes: int
    nodes: int
    mark_s: float | None = None
    mark_control: int = 0
    mark_model: int = 0
    best: float = 0.0
    last: float = 0.0
    rounds: int = 0
    gap_s: float = 0.0
    """The longest between two aggregates, begun after the failure and ended before the return."""
    first_gap_s: float = 0.0
    """That which the failure itself made."""
    round_s: float = 0.0
    """Before the failure, in the median."""
    fell_s: float = 0.0
    back_s: float = 0.0
    accuracy_before: float = 0.0
    accuracy_during: float = 0.0
    """Before the failure, and just before the return."""
    waits: list[int] = []
    """Rounds until a node that came back trained again; of those that did."""
    returned: int = 0
    messages: dict[str, int] = {}


class Watcher(Observer):
    """Collects what the figures are made of."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.rounds: list[RoundRow] = []
        self.trained: list[tuple[float, int, int]] = []
        """When, who, and in which round."""
        self.samples: list[SampleRow] = []
        self.means: list[tuple[float, float]] = []
        self.silent: frozenset[int] = frozenset()
        """When somebody last was."""

    def record(self, at_s: float, node: int, record: Record) -> None:
        if isinstance(record, RoundDone) and not record.metrics:
            self.trained.append((at_s, node, record.round))

    def round(self, row: RoundRow) -> None:
        if row.metrics and row.num_merged:
            self.rounds.append(row)

    def sample(self, row: SampleRow) -> None:
        assert self.world is not None
        self.samples.append(row)
        if (mean := self.world.accuracy()) is not None:
            self.means.append((row.at_s, mean))

    def look(self, world: World) -> None:
        """Now and then, at the very moment: what is observed comes later."""
        self.silent = frozenset(node.index for node in world.nodes if node.silent) or self.silent


def run(scenario: Scenario, base: Path) -> Outcome:
    """One run and its figures."""
    watcher = Watcher()
    began_at = time.perf_counter()
    world = watcher.world = World(scenario, base, observer=watcher)
    result = world.run(watcher.look)
    world.plan.close()
    sampled = scenario.learning == "sampled"
    accuracy = _latest(watcher.rounds) if sampled else watcher.means
    outcome = Outcome(
        accuracy=accuracy,
        control=[(row.at_s, row.control_bytes) for row in watcher.samples],
        model=[(row.at_s, row.model_bytes) for row in watcher.samples],
        wall_s=time.perf_counter() - began_at,
        model_bytes=world.plan.facts.model_bytes,
        nodes=scenario.nodes,
        best=max(value for _, value in accuracy),
        last=accuracy[-1][1],
        rounds=max(row.round for row in watcher.rounds),
        messages=result.messages_sent,
    )
    _reach_mark(outcome, watcher.samples)
    if sampled and scenario.timeline:
        _judge_failure(outcome, scenario, watcher)
    return outcome


def _latest(rows: list[RoundRow]) -> list[tuple[float, float]]:
    """The mean of the last few aggregates at each of them."""
    values: list[float] = []
    points = []
    for row in sorted(rows, key=lambda row: row.at_s):
        values.append(row.metrics["accuracy"])
        points.append((row.at_s, statistics.fmean(values[-LAST:])))
    return points


def _reach_mark(outcome: Outcome, samples: list[SampleRow]) -> None:
    reached = next((at_s for at_s, value in outcome.accuracy if value >= MARK), None)
    row = next((row for row in samples if reached is not None and row.at_s >= reached), None)
    if row is not None:
        outcome.mark_s, outcome.mark_control, outcome.mark_model = reached, row.control_bytes, row.model_bytes


def _judge_failure(outcome: Outcome, scenario: Scenario, watcher: Watcher) -> None:
    """How the rounds went on, and how soon those who came back were drawn."""
    lines = parse(scenario.timeline, scenario.nodes)
    fell_s = next(line.at_s for line in lines if line.action is Action.SILENCE)
    back_s = next((line.at_s for line in lines if line.action is Action.WAKE), scenario.at_most_s)
    outcome.fell_s, outcome.back_s = fell_s, back_s
    moments = sorted(row.at_s for row in watcher.rounds)
    gaps = [(b, b - a) for a, b in pairwise(moments)]
    before = [gap for end_s, gap in gaps if end_s <= fell_s]
    during = [gap for end_s, gap in gaps if fell_s < end_s <= back_s]
    outcome.round_s = statistics.median(before)
    outcome.first_gap_s, outcome.gap_s = during[0], max(during)
    outcome.accuracy_before = next(value for at_s, value in reversed(outcome.accuracy) if at_s <= fell_s)
    outcome.accuracy_during = next(value for at_s, value in reversed(outcome.accuracy) if at_s <= back_s)
    returned = watcher.silent
    outcome.returned = len(returned)
    first = max((round_ for at_s, _, round_ in watcher.trained if at_s <= back_s), default=0)
    later: dict[int, int] = {}
    for at_s, node, round_ in sorted(watcher.trained):
        if at_s > back_s and node in returned:
            later.setdefault(node, round_ - first)
    outcome.waits = sorted(later.values())


# --- what is told ---------------------------------------------------------------------------------------
def expected_waits(num_nodes: int, size: int, rounds: int) -> tuple[float, float]:
    """Of nodes of which so many are drawn in each of `rounds`: the share that is drawn at all, and their mean wait."""
    p = size / num_nodes
    chances = [p * (1 - p) ** k for k in range(rounds)]
    drawn = sum(chances)
    return drawn, sum((k + 1) * chance for k, chance in enumerate(chances)) / drawn


def summary(name: str, kind: str, runs: list[Outcome]) -> dict[str, Any]:
    """Means over the seeds."""
    reached = [one for one in runs if one.mark_s is not None]
    mean = statistics.fmean
    found: dict[str, Any] = {
        "run": name,
        "kind": kind,
        "seeds": len(runs),
        "reached": len(reached),
        "best": mean(one.best for one in runs),
        "last": mean(one.last for one in runs),
        "wall_s": mean(one.wall_s for one in runs),
    }
    if reached:
        large = mean(one.mark_control + one.mark_model * LARGE_BYTES / one.model_bytes for one in reached)
        found |= {
            "mark_s": mean(one.mark_s or 0.0 for one in reached),
            "model_bytes": mean(one.mark_model for one in reached),
            "control_bytes": mean(one.mark_control for one in reached),
            "large_bytes": large,
            "per_node_s": mean(one.mark_control / one.nodes / (one.mark_s or 1.0) for one in reached),
        }
    if kind == "built-in":
        waits = [wait for one in runs for wait in one.waits]
        found |= {
            "round_s": mean(one.round_s for one in runs),
            "first_gap_s": max(one.first_gap_s for one in runs),
            "gap_s": max(one.gap_s for one in runs),
            "accuracy_before": mean(one.accuracy_before for one in runs),
            "accuracy_during": mean(one.accuracy_during for one in runs),
            "returned": sum(one.returned for one in runs),
            "drawn_again": len(waits),
            "wait_mean": mean(waits) if waits else None,
            "wait_max": max(waits, default=None),
        }
    return found


def draw(outcomes: dict[tuple[str, str], list[Outcome]], path: Path) -> None:
    """Accuracy over time and over traffic, of the first seed, whole and with the early failure."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.2), sharey=True)
    for row, kind, title in zip(
        axes, ("whole", "early"), ("nothing fails", "80 % fall silent at the triangle"), strict=True
    ):
        for name in RUNS:
            one = outcomes[name, kind][0]
            at_s, values = zip(*one.accuracy, strict=True)
            row[0].plot(at_s, values, color=COLOURS[name], lw=1.5, label=name)
            row[1].plot(_sent_at(one, at_s), values, color=COLOURS[name], lw=1.5)
            if kind == "early":
                place = next(i for i, moment in enumerate(at_s) if moment >= EARLY_S[name])
                row[0].plot(at_s[place], values[place], "v", color=COLOURS[name])
                row[1].plot(_sent_at(one, at_s)[place], values[place], "v", color=COLOURS[name])
        row[0].set_title(f"{title}: over time", fontsize=10)
        row[1].set_title(f"{title}: over traffic", fontsize=10)
        row[0].set_ylabel("test accuracy")
        row[1].set_xscale("log")
        row[1].set_xlim(20, 2500)
        row[1].xaxis.set_minor_formatter(NullFormatter())
        for axis in row:
            axis.axhline(MARK, color="#777777", lw=0.8, ls=":")
            axis.grid(alpha=0.25)
    axes[-1][0].set_xlabel("virtual seconds")
    axes[-1][1].set_xlabel("MB sent by all nodes, models and messages")
    axes[0][0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _sent_at(one: Outcome, moments: tuple[float, ...]) -> list[float]:
    """MB so far at each moment."""
    totals = [(at_s, (c + m) / 1e6) for (at_s, c), (_, m) in zip(one.control, one.model, strict=True)]
    sent, at = [], 0
    for moment in moments:
        while at + 1 < len(totals) and totals[at + 1][0] <= moment:
            at += 1
        sent.append(max(totals[at][1], 1e-3))
    return sent


def scenario_of(name: str, kind: str, seed: int, folder: str, settings: list[str]) -> tuple[Scenario, Path]:
    """One of the runs."""
    changes = [f"seed={seed}"]
    if kind != "built-in":
        silence = f'["at {EARLY_S[name]} s: silence 80 %"]' if kind == "early" else "[]"
        changes += [f"timeline={silence}", f"at_most_s={AT_MOST_S[name]}"]
    if name != "sampled":
        changes += [*GOSSIP, *RUNS[name]]
    if folder:
        options = f'{{folder="{folder}", hidden=[32], train=5488}}'
        changes += ['data.task="dimat_task.py:digits"', f"data.options={options}"]
    scenario, base = scenario_files.load("sampled", [*changes, *settings])
    scenario_files.validate(scenario, HERE if folder else base)
    return scenario, HERE if folder else base


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="", help="MNIST's test images; left out, digits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, default=1, help="runs, with the seeds from 0 on")
    parser.add_argument("--only", choices=list(RUNS), action="append", help="these alone, and no picture")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "sampled.png")
    parser.add_argument("--set", action="append", default=[], help="a setting of the scenario, as nodes=100")
    arguments = parser.parse_args()
    folder = str(Path(arguments.folder).resolve()) if arguments.folder else ""
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for name in arguments.only or RUNS:
        for kind in ("whole", "early", "built-in") if name == "sampled" else ("whole", "early"):
            outcomes[name, kind] = []
            for seed in range(arguments.seeds):
                print(f"{name}, {kind}, seed {seed} ...", file=sys.stderr)
                outcomes[name, kind].append(run(*scenario_of(name, kind, seed, folder, arguments.set)))
    rows = [summary(name, kind, runs) for (name, kind), runs in outcomes.items()]
    if not arguments.only:
        draw(outcomes, arguments.out)
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(", ".join(f"{key} {_text(value)}" for key, value in row.items()))
    kinds = Counter(next(iter(outcomes.values()))[0].messages)
    print("messages of the first run:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))


def _text(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
