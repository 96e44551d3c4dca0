"""DIMAT against the field, with the deployed core in the simulator (paper: Saadati et al., arXiv 2404.08079).

Agents begin from different random networks, train alone for a quarter of the epochs, and then merge every 2 epochs: with
units aligned first (DIMAT), aligned by weights, not at all, or with the variance corrected. Beside them gossip after every
step (CDSGD), a common start, and no exchange.

    python benchmarks/dimat.py [FOLDER] [--seeds 3] [--seeds-of-ten 1] [--json] [--out docs] [--runs FILE] [--quick]

FOLDER holds MNIST, or a part of it, as `images-idx3-ubyte.gz` and `labels-idx1-ubyte.gz`; without one it is
scikit-learn's digits. Prints a table and draws `dimat.png` in `--out`. `--runs` keeps each run in a file and takes
from it those that are there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from sim.scenario_files import convert
from sim.world import World

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
EPOCHS_A_ROUND = 2
BATCH = 32
HIDDEN = [64, 64, 64, 64]
ADAM = {"optimizer": "adam", "learning_rate": 1e-3}
SGD = {"optimizer": "sgd", "learning_rate": 0.1}
"""For single steps, in which Adam from a fresh state would only take signs."""
TARGETS = {"iid": (0.85, 0.90), "class": (0.50, 0.85)}
NOISE = 3.0
"""Points of accuracy: of a smaller gain it is idle to say what a point costs."""
SHARED = {"probe": "shared"}


@dataclass(frozen=True)
class Curve:
    """before, after: the rules around the mean. each_step: merge after every step, from the first on."""

    name: str
    colour: str
    style: str = "-"
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    start: str = "different"
    each_step: bool = False
    exchanges: bool = True


CURVES = (
    Curve("DIMAT, own samples", "#0b6e4f", "-", ("align.activation",), ("repair",)),
    Curve(
        "DIMAT, shared probe",
        "#0b6e4f",
        "--",
        ({"name": "align.activation", **SHARED},),
        ({"name": "repair", **SHARED},),
    ),
    Curve("weight matching", "#8e44ad", "--", ("align.weight",)),
    Curve("weight matching, repair", "#8e44ad", "-", ("align.weight",), ("repair",)),
    Curve("plain mean", "#c1440e"),
    Curve("plain mean, repair", "#c1440e", "--", (), ("repair",)),
    Curve("variance corrected", "#e0a100", "-", (), ("variance.corrected",)),
    Curve("mean after every step (CDSGD)", "#3b5ba5", each_step=True),
    Curve("plain mean, common start", "#777777", "--", start="common"),
    Curve("alone", "#777777", ":", exchanges=False),
)


@dataclass(frozen=True)
class Setting:
    agents: int
    topology: str
    split: str

    @property
    def title(self) -> str:
        return f"{self.agents} agents, {self.topology}, {'IID' if self.split == 'iid' else 'class split'}"


@dataclass(frozen=True)
class Size:
    """rounds: of 2 epochs. alone: of them, those before the first merge. train: samples at most."""

    rounds: int = 20
    alone: int = 5
    train: int = 4000


@dataclass(frozen=True)
class Outcome:
    """accuracy: mean over the agents after each 2 epochs. sent: bytes of all agents by then.

    model_bytes: of one model. wall_s: what it took here.
    """

    accuracy: list[float]
    sent: list[float]
    model_bytes: int
    wall_s: float


# --- one run --------------------------------------------------------------------------------------------
def scenario_of(curve: Curve, setting: Setting, seed: int, size: Size, folder: str) -> Any:
    neighbours = 2 if setting.topology == "ring" else setting.agents - 1
    mean = {"name": "mean", "conservative": 1 / (1 + neighbours)}
    steps = steps_a_round(setting, size, folder)
    gossip: dict[str, Any] = {"rounds": size.rounds, "dense_from": size.alone / size.rounds}
    training: dict[str, Any] = {"local_steps": steps, **ADAM}
    if curve.each_step:
        gossip = {"rounds": size.rounds * steps}
        training = {"local_steps": 1, **SGD}
    if not curve.exchanges:
        gossip = {"rounds": size.rounds, "exchange_every": size.rounds + 1}
    return convert(
        {
            "nodes": setting.agents,
            "seed": seed,
            "topology": {"kind": setting.topology},
            "rule": (*curve.before, mean, *curve.after),
            "data": {
                "task": "dimat_task.py:digits",
                "options": {"folder": folder, "hidden": HIDDEN, "train": size.train},
                "partitioner": setting.split,
                "start": curve.start,
            },
            "training": {"batch_size": BATCH, **training},
            "gossip": {
                "quorum": 1.0,
                "deadline_s": 5.0,
                "pause_s": 0.0,
                "keep_every": 1_000_000,
                "wait_for_peers": neighbours,
                **gossip,
            },
            # In step: who is ahead when merging begins stays ahead, and the others' last merge finds nobody.
            "devices": {"spread": 0.0},
            "churn": {"join_within_s": 0.0},
            "evaluation": {"every": steps if curve.each_step else 1, "consensus": False},
            "compute": {"batching": "never"},
        }
    )


def steps_a_round(setting: Setting, size: Size, folder: str) -> int:
    num_samples = len(_task(folder, size.train).train[1])
    return round(EPOCHS_A_ROUND * num_samples / setting.agents / BATCH)


_TASKS: dict[tuple[str, int], Any] = {}


def _task(folder: str, train: int) -> Any:
    from dimat_task import digits  # beside this file, as the scenario names it

    if (folder, train) not in _TASKS:
        _TASKS[folder, train] = digits(folder, tuple(HIDDEN), train=train)
    return _TASKS[folder, train]


def run(curve: Curve, setting: Setting, seed: int, size: Size, folder: str) -> Outcome:
    began_at = time.perf_counter()
    world = World(scenario_of(curve, setting, seed, size, folder), HERE)
    try:
        result = world.run()
    finally:
        world.plan.close()
    assert not result.failed_work, result
    assert result.finished == setting.agents, result
    assert len(result.accuracy_by_round) == size.rounds
    alone = 0 if curve.each_step else size.alone if curve.exchanges else size.rounds
    merges = [max(0, done - alone) for done in range(1, size.rounds + 1)]
    # Every exchange moves the same number of models of one size.
    sent = [result.bytes_sent * done / max(1, merges[-1]) if merges[-1] else 0.0 for done in merges]
    per_exchange = 1 if not curve.each_step else steps_a_round(setting, size, folder)
    links = setting.agents * (2 if setting.topology == "ring" else setting.agents - 1)
    assert result.fetches == links * merges[-1] * per_exchange, (result.fetches, links, merges[-1])
    return Outcome(
        result.accuracy_by_round, sent, world.plan.facts.model_bytes, round(time.perf_counter() - began_at, 1)
    )


# --- what is told of them -------------------------------------------------------------------------------
def final(outcome: Outcome) -> float:
    """Mean over the last three rounds: one round is noisy."""
    return statistics.fmean(outcome.accuracy[-3:])


def sent_until(outcome: Outcome, target: float) -> float | None:
    """Bytes when the accuracy of merged models first reaches the target; None where it never does."""
    return next(
        (
            sent
            for accuracy, sent in zip(outcome.accuracy, outcome.sent, strict=True)
            if sent and accuracy >= target
        ),
        None,
    )


def after_first_merge(outcome: Outcome) -> float | None:
    return next((a for a, sent in zip(outcome.accuracy, outcome.sent, strict=True) if sent), None)


def median(values: Sequence[float | None]) -> float | None:
    """None, "never", is larger than any number."""
    ordered = sorted(values, key=lambda value: float("inf") if value is None else value)
    return (
        ordered[(len(ordered) - 1) // 2]
        if len(ordered) % 2 or ordered[len(ordered) // 2] is None
        else (statistics.median(value for value in ordered if value is not None))
    )


def row_of(outcomes: Sequence[Outcome], alone: Sequence[Outcome], split: str) -> dict[str, Any]:
    """Medians over the seeds."""
    gains = [100 * (final(one) - final(other)) for one, other in zip(outcomes, alone, strict=False)]
    total = outcomes[0].sent[-1]
    gain = statistics.median(gains)
    finals = [final(one) for one in outcomes]
    return {
        "final": statistics.median(finals),
        "final_range": [min(finals), max(finals)],
        "after_first_merge": median([after_first_merge(one) for one in outcomes]),
        "sent_mb": total / 1e6,
        "mb_to": {
            f"{target:.2f}": _mb(median([sent_until(one, target) for one in outcomes]))
            for target in TARGETS[split]
        },
        "points_over_alone": gain,
        "mb_a_point": total / 1e6 / gain if gain >= NOISE and total else None,
    }


def _mb(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6


def table_of(rows: dict[str, dict[str, Any]], split: str) -> Iterator[str]:
    """Markdown."""
    first, second = (f"{target:.2f}" for target in TARGETS[split])
    yield f"| | final | after the first merge | MB sent | MB to {first} | MB to {second} | MB a point over alone |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, row in rows.items():
        low, high = row["final_range"]
        spread = f" ({low:.3f} to {high:.3f})" if high > low else ""
        cells = [
            f"{row['final']:.3f}{spread}",
            _text(row["after_first_merge"], ".2f"),
            _text(row["sent_mb"], ",.0f"),
            *(_text(row["mb_to"][target], ",.0f") for target in (first, second)),
            _text(row["mb_a_point"], ",.1f"),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# --- the picture ----------------------------------------------------------------------------------------
def draw(found: dict[Setting, dict[str, list[Outcome]]], path: Path) -> None:
    """A row for each number of agents and topology; for each split accuracy over epochs and over bytes."""
    kinds = list(dict.fromkeys((one.agents, one.topology) for one in found))
    splits = list(dict.fromkeys(one.split for one in found))
    figure, axes = plt.subplots(
        len(kinds),
        2 * len(splits),
        figsize=(3.6 * 2 * len(splits), 2.7 * len(kinds) + 1),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for (row, kind), (column, split) in product(enumerate(kinds), enumerate(splits)):
        setting = Setting(*kind, split)
        if setting not in found:
            continue
        over_epochs, over_bytes = axes[row, 2 * column : 2 * column + 2]
        for curve in CURVES:
            if curve.name in found[setting]:
                _draw_curve(curve, found[setting][curve.name], over_epochs, over_bytes)
        over_epochs.set(title=setting.title, ylim=(0, 1))
        over_bytes.set(title="the same over bytes", xscale="log")
        if row == len(kinds) - 1:
            over_epochs.set_xlabel("epochs")
            over_bytes.set_xlabel("MB sent by all agents")
        for axis in (over_epochs, over_bytes):
            axis.title.set_fontsize(9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.25)
    for row in axes:
        row[0].set_ylabel("mean test accuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        "Merging every 2 epochs from different random starts, after a quarter of the epochs alone",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curve(curve: Curve, outcomes: Sequence[Outcome], over_epochs: Any, over_bytes: Any) -> None:
    columns = list(zip(*(one.accuracy for one in outcomes), strict=True))
    mean, low, high = [statistics.fmean(c) for c in columns], list(map(min, columns)), list(map(max, columns))
    epochs = [EPOCHS_A_ROUND * (index + 1) for index in range(len(mean))]
    style = {"color": curve.colour, "ls": curve.style, "lw": 1.5, "label": curve.name}
    over_epochs.plot(epochs, mean, **style)
    over_epochs.fill_between(epochs, low, high, color=curve.colour, alpha=0.10, lw=0)
    sent = [num_bytes / 1e6 for num_bytes in outcomes[0].sent]
    points = [(x, y) for x, y in zip(sent, mean, strict=True) if x]
    if points:
        over_bytes.plot(*zip(*points, strict=True), **style)
    else:
        over_bytes.axhline(mean[-1], **style)


# --- all of them ----------------------------------------------------------------------------------------
class Kept:
    """Runs by what they are, in a file of one JSON object a line; without a file, nowhere.

    It knows nothing of the code: after a change there, begin another file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                one = json.loads(line)
                self._found[json.dumps(one["key"])] = one["outcome"]

    def get(self, key: list[Any]) -> Outcome | None:
        found = self._found.get(json.dumps(key))
        return Outcome(**found) if found else None

    def add(self, key: list[Any], outcome: Outcome) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "outcome": asdict(outcome)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="MNIST as two IDX files; none: scikit-learn's digits"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each curve with 5 agents")
    parser.add_argument("--seeds-of-ten", type=int, default=1, help="the same with 10 agents")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder for dimat.png")
    parser.add_argument(
        "--runs", type=Path, help="file to keep single runs in, to go on after an interruption"
    )
    parser.add_argument(
        "--quick", action="store_true", help="5 agents, a ring, 6 rounds, few samples, one seed"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = "" if arguments.folder is None else str(arguments.folder.resolve())
    size, numbers, topologies = Size(), {5: arguments.seeds, 10: arguments.seeds_of_ten}, ("ring", "full")
    if arguments.quick:
        size, numbers, topologies = Size(rounds=6, alone=2, train=1000), {5: 1}, ("ring",)
    kept = Kept(arguments.runs)
    found: dict[Setting, dict[str, list[Outcome]]] = {}
    for agents, topology, split in product(numbers, topologies, TARGETS):
        if numbers[agents]:
            found[Setting(agents, topology, split)] = {curve.name: [] for curve in CURVES}
    # One seed of everything first: an interrupted experiment has something of each.
    for seed, setting, curve in product(range(max(numbers.values())), found, CURVES):
        if seed >= numbers[setting.agents]:
            continue
        # The data by its kind and not by its folder: a file of runs may move with it.
        key = [curve.name, *asdict(setting).values(), seed, *asdict(size).values(), bool(folder)]
        outcome = kept.get(key)
        if outcome is None:
            outcome = run(curve, setting, seed, size, folder)
            kept.add(key, outcome)
        found[setting][curve.name].append(outcome)
        print(
            f"{setting.title}, {curve.name}, seed {seed}: {final(outcome):.3f}, {outcome.wall_s} s",
            file=sys.stderr,
            flush=True,
        )
    picture = arguments.out / "dimat.png"
    draw(found, picture)
    rows = {
        setting: {
            name: row_of(outcomes, by_curve["alone"], setting.split) for name, outcomes in by_curve.items()
        }
        for setting, by_curve in found.items()
    }
    if arguments.json:
        print(json.dumps({setting.title: by_name for setting, by_name in rows.items()}))
        return
    for setting, by_name in rows.items():
        print(f"\n{setting.title}, {numbers[setting.agents]} seed(s)\n")
        print("\n".join(table_of(by_name, setting.split)))
    print(f"\ndrawn: {picture}")


if __name__ == "__main__":
    main()
