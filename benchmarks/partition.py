"""A network cut in two halves for fifty rounds and healed, under each learning protocol, against the same network uncut.

    python benchmarks/partition.py [--nodes 40] [--seeds 1] [--json] [--only gossip] [--out docs/partition.png]

The halves are drawn; every link between them breaks, every dial across fails. Nobody is told of the end either. Gossip and
sampling find their neighbours themselves (`discover`); nodes that learn by scalars know each other's keys (`members`),
without which a network that has parted may keep two logs (docs/scalars.md). Accuracy is the mean of what nodes have,
under sampling that of the latest aggregate of each half. The overlay is healed with the first look at which a tenth of all
links run across as they did before the cut.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from msgspec import Struct, field

from sim.results import RoundRow
from sim.scenario_files import convert, validate
from sim.scenarios import Scenario
from sim.timeline import groups, parse
from sim.world import Observer, World

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
CUT_ROUNDS = 50
HEALED = 0.1
PERIOD_S = 2.0
"""Over so much time accuracies are averaged in the picture."""
COMMON: dict[str, Any] = {
    "data": {"options": {"hidden": [32]}, "samples_per_node": 40},
    "topology": {"kind": "discover", "degree": 6},
    "training": {"local_steps": 5, "batch_size": 16, "learning_rate": 0.1},
    # All defaults divided by five, as the heartbeat is.
    "view": {
        "heartbeat_s": 1.0,
        "dead_after_s": 4.0,
        "greeting_s": 2.0,
        "redial_max_s": 6.0,
        "shuffle_s": 6.0,
        "rotate_s": 60.0,
        "rejoin_s": 12.0,
    },
    "links": {"dial_timeout_s": 2.0},
    "evaluation": {"consensus": False},
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "gossip": {
        "rule": "corrected",
        "gossip": {"rounds": 170, "quorum": 0.5, "deadline_s": 3.0, "pause_s": 0.0},
    },
    "sampled": {
        "rule": "fedavg",
        "sampled": {"rounds": 170, "sample_size": 10, "deadline_s": 10.0, "ping_s": 1.0},
    },
    "scalars": {
        "data": {"options": {"hidden": [16]}},
        "training": {"batch_size": 8},
        "scalars": {
            "rounds": 120,
            "samples": 16,
            "learning_rate": 0.2,
            "schedule": "linear",
            "quorum": 0.9,
            "deadline_s": 2.0,
            "wait_for_peers": 3,
            "wait_at_most_s": 20.0,
            "sync_s": 3.0,
            "repair_s": 1.0,
            "late_rounds": 5,
            "checkpoint_every": 10,
        },
        "devices": {"estimate_s": 0.025},
    },
}
START_S: dict[str, tuple[float, float]] = {
    "gossip": (20.0, 0.7),
    "sampled": (45.0, 0.8),
    "scalars": (15.0, 0.45),
}
"""When the cut comes, and about how long a round takes."""


class Outcome(Struct):
    """Of one run. Times in virtual seconds."""

    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Accuracies by half."""
    final: float = 0.0
    finished: int = 0
    ends: int = 0
    """Different models at the end."""
    cut_s: float = 0.0
    heal_s: float = 0.0
    cut_rounds: dict[str, int] = field(default_factory=dict)
    """Rounds of each half while it was cut off."""
    before: float = 0.0
    """Accuracy of the worse half before the cut and before the healing."""
    during: float = 0.0
    healed_s: float | None = None
    """From the end of the cut."""
    wall_s: float = 0.0


class Watcher(Observer):
    """Rounds by half, and links across."""

    def __init__(self) -> None:
        self.rows: list[RoundRow] = []
        self.across: list[tuple[float, int, int]] = []
        self.sides: dict[int, str] = {}
        self.looked_at_s = -1.0

    def round(self, row: RoundRow) -> None:
        if row.metrics:
            self.rows.append(row)

    def look(self, world: World) -> None:
        """Count the links across, twice a second at most."""
        now = world.clock.moment_s
        if now - self.looked_at_s < 0.5:
            return
        self.looked_at_s = now
        links = world.overlay().links
        across = sum(self.sides[a] != self.sides[b] for a, b in links)
        self.across.append((now, across, len(links)))


def scenario_of(protocol: str, nodes: int, seed: int, cut: bool) -> Scenario:
    """One of the runs."""
    tables: dict[str, Any] = {"learning": protocol, "nodes": nodes, "seed": seed, "at_most_s": 900.0}
    for source in (COMMON, PROTOCOLS[protocol]):
        for name, value in source.items():
            tables[name] = {**tables.get(name, {}), **value} if isinstance(value, dict) else value
    if protocol == "sampled":
        tables["sampled"]["wait_for_members"] = nodes
    if protocol == "scalars":
        tables["scalars"]["members"] = [f"node-{index:05}" for index in range(nodes)]
    if cut:
        at_s, round_s = START_S[protocol]
        heal_s = round(at_s + CUT_ROUNDS * round_s)
        tables["timeline"] = [f"at {at_s:g} s: partition left|right", f"at {heal_s} s: heal"]
    scenario = convert(tables)
    validate(scenario, HERE)
    return scenario


def run(scenario: Scenario) -> Outcome:
    """One run and its figures."""
    watcher = Watcher()
    began_at = time.perf_counter()
    world = World(scenario, HERE, observer=watcher)
    watcher.sides = _sides(world)
    result = world.run(watcher.look)
    world.plan.close()
    cores = [node.core for node in world.nodes if node.core is not None]
    outcome = Outcome(
        points=_by_half(watcher),
        final=result.accuracy_mean or 0.0,
        finished=result.finished,
        ends=len({core.model.digest for core in cores if core.model is not None}),
        wall_s=time.perf_counter() - began_at,
    )
    if scenario.timeline:
        cut, heal = (line.at_s for line in parse(scenario.timeline, scenario.nodes))
        _judge(outcome, watcher, cut, heal)
    return outcome


def _sides(world: World) -> dict[int, str]:
    """Who will be on which side: drawn as the world will draw it."""
    lines = parse(world.scenario.timeline, world.scenario.nodes)
    if not lines:
        return {node.index: "left" for node in world.nodes}
    rng = type(world._timeline_rng)()
    rng.setstate(world._timeline_rng.getstate())
    left, right = groups(lines[0], world.scenario.nodes, rng)
    return {**dict.fromkeys(left, "left"), **dict.fromkeys(right, "right")}


def _by_half(watcher: Watcher) -> dict[str, list[tuple[float, float]]]:
    """Means over short periods."""
    bins: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in watcher.rows:
        bins[watcher.sides[row.node]][int(row.at_s // PERIOD_S)].append(row.metrics["accuracy"])
    return {
        side: [
            ((period + 0.5) * PERIOD_S, statistics.fmean(values)) for period, values in sorted(found.items())
        ]
        for side, found in sorted(bins.items())
    }


def _judge(outcome: Outcome, watcher: Watcher, cut_s: float, heal_s: float) -> None:
    outcome.cut_s, outcome.heal_s = cut_s, heal_s
    for side in ("left", "right"):
        rounds = [
            row.round for row in watcher.rows if watcher.sides[row.node] == side and cut_s < row.at_s < heal_s
        ]
        outcome.cut_rounds[side] = max(rounds) - min(rounds) if rounds else 0
    ends = [
        [value for at_s, value in points if at_s < moment][-1]
        for moment in (cut_s, heal_s)
        for points in outcome.points.values()
    ]
    outcome.before, outcome.during = min(ends[:2]), min(ends[2:])
    share = [across / max(1, total) for at_s, across, total in watcher.across if at_s < cut_s][-1]
    healed = (
        at_s
        for at_s, across, total in watcher.across
        if at_s >= heal_s and across / max(1, total) >= HEALED * share / 0.5
    )
    if (at_s := next(healed, None)) is not None:
        outcome.healed_s = at_s - heal_s


def draw(outcomes: dict[str, tuple[Outcome, Outcome]], path: Path) -> None:
    """Accuracy of both halves over time, and of the uncut network."""
    figure, axes = plt.subplots(
        1, len(outcomes), figsize=(4.4 * len(outcomes), 3.6), sharey=True, squeeze=False
    )
    for axis, (protocol, (cut, whole)) in zip(axes[0], outcomes.items(), strict=True):
        axis.axvspan(cut.cut_s, cut.heal_s, color="#888888", alpha=0.15, lw=0)
        for points, colour, label in (
            *((points, "#999999", "uncut") for points in whole.points.values()),
            (cut.points.get("left", []), "#2a78d6", "one half"),
            (cut.points.get("right", []), "#eb6834", "the other"),
        ):
            axis.plot(*zip(*points, strict=True), color=colour, lw=1.5, label=label)
        axis.set_title(protocol, fontsize=10)
        axis.set_xlabel("virtual seconds")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("test accuracy")
    axes[0][0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1, help="runs, with the seeds from 0 on")
    parser.add_argument("--only", choices=list(PROTOCOLS), action="append", help="these alone")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "partition.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    outcomes: dict[str, tuple[Outcome, Outcome]] = {}
    rows: list[dict[str, Any]] = []
    for protocol in arguments.only or PROTOCOLS:
        for seed in range(arguments.seeds):
            print(f"{protocol}, seed {seed} ...", file=sys.stderr)
            pair = [run(scenario_of(protocol, arguments.nodes, seed, cut)) for cut in (True, False)]
            outcomes.setdefault(protocol, (pair[0], pair[1]))
            rows.append(_row(protocol, seed, pair[0], pair[1]))
    draw(outcomes, arguments.out)
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))


def _row(protocol: str, seed: int, cut: Outcome, whole: Outcome) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "seed": seed,
        "cut_rounds": "/".join(map(str, cut.cut_rounds.values())),
        "before": round(cut.before, 3),
        "during": round(cut.during, 3),
        "healed_s": None if cut.healed_s is None else round(cut.healed_s, 1),
        "final": round(cut.final, 4),
        "uncut": round(whole.final, 4),
        "points_below": round(100 * (whole.final - cut.final), 2),
        "finished": cut.finished,
        "ends": cut.ends,
        "uncut_ends": whole.ends,
        "wall_s": round(cut.wall_s + whole.wall_s, 1),
    }


if __name__ == "__main__":
    main()
