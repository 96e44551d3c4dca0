"""A grid over a scenario: every cell a run in its own process, resumable, one table at the end.

Belongs here: which cells there are, which of them are still to be run, running them on this machine, and what their
results say together. How one scenario runs is `world.py`'s affair; this module starts `covey sim`.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import Struct, field

from node.config import toml_value
from protocols.errors import ConfigError
from sim.results import RESULT_FILE, SCENARIO_FILE, clear_run
from sim.scenario_files import read_value

MAX_NAME_CHARS = 80
MAX_ERROR_LINES = 12
END_WITHIN_S = 20.0
"""After Ctrl-C each run may take so long to write what it has."""

HEADLINE = (
    "accuracy_mean",
    "accuracy_min",
    "accuracy_max",
    "merged_accuracy",
    "final_merged_accuracy",
    "consensus_distance",
    "node_rounds",
    "finished",
    "failed_work",
    "events",
    "bytes_sent",
    "virtual_s",
    "wall_s",
    "trace_hash",
)
"""What the table says of each cell."""
AVERAGED = (
    "accuracy_mean",
    "accuracy_min",
    "merged_accuracy",
    "final_merged_accuracy",
    "consensus_distance",
    "bytes_sent",
    "virtual_s",
    "wall_s",
)


# --- the grid -------------------------------------------------------------------------------------------
class Axis(Struct, frozen=True):
    """One setting and the values it takes in turn."""

    path: str
    values: tuple[Any, ...]


class Cell(Struct, frozen=True):
    """One run: the values of the axes, in their order."""

    scenario: str
    settings: tuple[str, ...]
    """As for `--set`: the sweep's own, then one of each axis."""
    values: tuple[Any, ...]
    seed: int
    folder: Path


class Sweep(Struct, frozen=True):
    """A grid over a scenario: the product of the axes, each with `seeds` seeds from `first_seed` on."""

    scenario: str
    """A built-in one's name or a file, as for `covey sim`."""
    out: Path
    axes: tuple[Axis, ...] = ()
    settings: tuple[str, ...] = ()
    """`path=value`, for all cells."""
    seeds: int = 1
    """5 show whether a difference is one; 1 shows nothing but that it runs."""
    first_seed: int = 0

    def cells(self) -> list[Cell]:
        """In the order of the grid, seeds innermost."""
        names = _short_names([axis.path for axis in self.axes])
        return [
            Cell(
                self.scenario,
                (
                    *self.settings,
                    *(f"{axis.path}={value_text(v)}" for axis, v in zip(self.axes, values, strict=True)),
                ),
                values,
                seed,
                self.out / "cells" / _folder_name({**dict(zip(names, values, strict=True)), "seed": seed}),
            )
            for values in itertools.product(*(axis.values for axis in self.axes))
            for seed in range(self.first_seed, self.first_seed + self.seeds)
        ]


def parse_settings(pairs: Sequence[str]) -> tuple[tuple[str, ...], tuple[Axis, ...]]:
    """`--set` options: those with one value, as they are, and the axes.

    `rule=mean,corrected` has two values. So has `x=[[1, 2], [3]]`, a TOML list of values, for values that hold commas.

    Raises:
        ConfigError: at `--set`: no `=`, no value, a path or a value twice, or the seed.
    """
    settings: list[str] = []
    axes: list[Axis] = []
    paths: set[str] = set()
    for pair in pairs:
        path, sign, text = pair.partition("=")
        path = path.strip()
        if not sign or not path:
            raise ConfigError(
                "--set", f"'{pair}' is not path=value", ["links.loss=0.1", "rule=mean,corrected"]
            )
        if path == "seed":
            raise ConfigError("--set", "the seed is not an axis", ["--seeds 5 --seed 0"])
        if path in paths:
            raise ConfigError("--set", f"{path} is given twice", [f"{path}=first,second"])
        paths.add(path)
        values = _split_values(text)
        if not values or "" in values:
            raise ConfigError("--set", f"'{pair}' has an empty value")
        if len({value_text(value) for value in values}) < len(values):
            raise ConfigError("--set", f"'{pair}' has a value twice")
        if len(values) == 1:
            settings.append(f"{path}={value_text(values[0])}")
        else:
            axes.append(Axis(path, values))
    return tuple(settings), tuple(axes)


def _split_values(text: str) -> tuple[Any, ...]:
    whole = read_value(text)
    if isinstance(whole, list):
        return tuple(whole)
    if whole is not None:
        return (whole,)
    return tuple(
        text.strip() if (value := read_value(text)) is None else value for text in _split_commas(text)
    )


def _split_commas(text: str) -> list[str]:
    """At the commas that stand in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        depth += 0 if quote else (char in "[{") - (char in "]}")
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def value_text(value: Any) -> str:
    """A value as for `--set`: TOML, but a plain word without its quotes."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.+:/-]*", value) and read_value(value) is None:
        return value
    return toml_value(value)


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path where that is enough to tell them apart."""
    last = [path.rpartition(".")[2] for path in paths]
    return [
        name if last.count(name) == 1 and name != "seed" else path
        for name, path in zip(last, paths, strict=True)
    ]


def _folder_name(values: Mapping[str, Any]) -> str:
    """Readable, safe on every file system, the same every time; with a hash where it had to lose something."""
    exact = "__".join(f"{name}-{value_text(value)}" for name, value in values.items())
    safe = "__".join(f"{name}-{_safe(value_text(value))}" for name, value in values.items())
    if safe == exact and len(safe) <= MAX_NAME_CHARS:
        return safe
    return f"{safe[:MAX_NAME_CHARS].rstrip('-.')}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")


def command(cell: Cell) -> list[str]:
    """What runs a cell."""
    chosen = [word for setting in cell.settings for word in ("--set", setting)]
    return [
        *(sys.executable, "-P", "-m", "node", "sim", cell.scenario, *chosen),
        *("--seed", str(cell.seed), "--out", str(cell.folder), "--quiet"),
    ]


# --- running --------------------------------------------------------------------------------------------
class Finished(NamedTuple):
    """How a cell's process ended: its exit code and the last lines of its standard error."""

    code: int
    error: str


class Failure(NamedTuple):
    """A cell without a result: its folder's name, and why, beginning with the command that shows it again."""

    cell: str
    why: str


class Step(NamedTuple):
    """For the progress line: a cell is done, one of `num_cells`."""

    cell: Cell
    how: str
    """`kept` from an earlier sweep, `ran` or `failed`."""
    num_done: int
    num_cells: int


class RunCells(Protocol):
    """Runs cells, in any order, and tells of each that ended; when it returns or raises, none is left running."""

    def __call__(self, cells: Sequence[Cell], done: Callable[[Cell, Finished], None]) -> None: ...


def run_sweep(
    sweep: Sweep,
    resolve: Callable[[Cell], str],
    run_cells: RunCells,
    progress: Callable[[Step], None] = lambda step: None,
) -> "Table":
    """Run what has no result yet and write `table.csv` and `table.jsonl`.

    A cell is kept when its folder holds a whole result of this very scenario; anything else in the folder of a run is
    removed first. Ctrl-C and every error leave the finished cells and the table of them.

    resolve: the text that a cell's run writes as `scenario.toml`; raises ConfigError for what no run would accept,
        so that nothing runs of a sweep with a mistake in it.
    """
    cells = sweep.cells()
    texts = [resolve(cell) for cell in cells]
    kept = [cell for cell, text in zip(cells, texts, strict=True) if _is_done(cell, text)]
    there = {cell.folder for cell in kept}
    missing = [cell for cell in cells if cell.folder not in there]
    failed: dict[Path, Failure] = {}
    num_done = 0

    def tell(cell: Cell, how: str) -> None:
        nonlocal num_done
        num_done += 1
        progress(Step(cell, how, num_done, len(cells)))

    def done(cell: Cell, finished: Finished) -> None:
        ran = finished.code == 0 and _whole_result(cell.folder) is not None
        if not ran:
            failed[cell.folder] = Failure(cell.folder.name, _why(cell, finished))
        tell(cell, "ran" if ran else "failed")

    try:
        for cell in missing:
            cell.folder.mkdir(parents=True, exist_ok=True)
            clear_run(cell.folder)
    except OSError as error:
        raise ConfigError("--out", f"{sweep.out} cannot be written ({error.strerror})") from error
    for cell in kept:
        tell(cell, "kept")
    try:
        run_cells(missing, done)
    finally:
        table = read_table(sweep, [failed[cell.folder] for cell in cells if cell.folder in failed])
        write_table(table, sweep.out)
    return table


def _is_done(cell: Cell, text: str) -> bool:
    if _whole_result(cell.folder) is None:
        return False
    try:
        return tomllib.loads((cell.folder / SCENARIO_FILE).read_text("utf-8")) == tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False


def _whole_result(folder: Path) -> dict[str, Any] | None:
    """The result in the folder, unless it is partial, damaged or not there."""
    try:
        result = msgspec.json.decode((folder / RESULT_FILE).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return None if result.get("partial", True) else result


def _why(cell: Cell, finished: Finished) -> str:
    how = f"exit code {finished.code}" if finished.code else "it left no whole result"
    return "\n".join(line for line in (_quoted(command(cell)), how, finished.error) if line)


def _quoted(words: Sequence[str]) -> str:
    return shlex.join(words)


def last_lines(error: bytes) -> str:
    """The end of what a process wrote to standard error."""
    return "\n".join(error.decode(errors="replace").rstrip().splitlines()[-MAX_ERROR_LINES:])


class LocalProcesses:
    """Runs cells on this machine, `jobs` at a time. A `RunCells`.

    make_command: what runs a cell; for tests.
    """

    def __init__(self, jobs: int, make_command: Callable[[Cell], list[str]] = command) -> None:
        self._jobs = jobs
        self._command = make_command
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False
        # Several runs at once: one thread each, or they fight for the cores.
        self._environ = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}

    def __call__(self, cells: Sequence[Cell], done: Callable[[Cell, Finished], None]) -> None:
        pool = ThreadPoolExecutor(self._jobs)
        try:
            left = {pool.submit(self._run, cell): cell for cell in cells}
            while left:
                for future in wait(left, return_when=FIRST_COMPLETED).done:
                    done(left.pop(future), future.result())
        finally:
            self._stop()
            pool.shutdown(cancel_futures=True)

    def _run(self, cell: Cell) -> Finished:
        with self._lock:
            if self._stopping:
                return Finished(-1, "the sweep was interrupted")
            # A session of its own: Ctrl-C reaches us alone, and we end the children by their ids.
            process = subprocess.Popen(
                self._command(cell),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=self._environ,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            _, error = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        return Finished(process.returncode, last_lines(error))

    def _stop(self) -> None:
        """What still runs is asked to write what it has, then ended."""
        with self._lock:
            self._stopping = True
            running = sorted(self._running, key=lambda process: process.pid)
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(END_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()


# --- the table ------------------------------------------------------------------------------------------
class Row(Struct, frozen=True):
    """A finished cell."""

    values: tuple[Any, ...]
    seed: int
    folder: str
    result: dict[str, Any]


class Table(Struct, frozen=True):
    """All finished cells of a sweep, in the order of the grid."""

    scenario: str
    axes: tuple[str, ...]
    rows: list[Row]
    failed: list[Failure]


class Mean(NamedTuple):
    """Over the seeds. std: of a sample (n - 1); None of a single one."""

    mean: float
    std: float | None

    def __str__(self) -> str:
        digits = 4 if abs(self.mean) < 10 else 1 if abs(self.mean) < 1000 else 0
        text = f"{self.mean:,.{digits}f}"
        return text if self.std is None else f"{text} ± {self.std:,.{digits}f}"


class GridPoint(Struct, frozen=True):
    """The seeds of one point of the grid together."""

    name: str
    values: tuple[Any, ...]
    num_seeds: int
    means: dict[str, Mean | None]
    """By the names in `AVERAGED`; None where a cell has no such number, as the accuracy of a dry run."""
    rounds: list[int] = field(default_factory=list)
    """Evaluated ones, counted from 0."""
    curves: list[list[float]] = field(default_factory=list)
    """Accuracy after each of `rounds`, one a seed."""


def read_table(sweep: Sweep, failed: Sequence[Failure] = ()) -> Table:
    """What the finished cells of a sweep left."""
    rows = [
        Row(cell.values, cell.seed, cell.folder.name, result)
        for cell in sweep.cells()
        if (result := _whole_result(cell.folder)) is not None
    ]
    return Table(sweep.scenario, tuple(axis.path for axis in sweep.axes), rows, list(failed))


def write_table(table: Table, out: Path) -> None:
    """`table.csv` with one line a cell, and `table.jsonl` with the accuracies by round as well."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.axes, "seed", *HEADLINE, "folder"])
    lines = []
    for row in table.rows:
        numbers = {name: row.result.get(name) for name in HEADLINE}
        writer.writerow(
            [*(value_text(value) for value in row.values), row.seed, *numbers.values(), row.folder]
        )
        lines.append(
            {
                **dict(zip(table.axes, row.values, strict=True)),
                "seed": row.seed,
                **numbers,
                "evaluated_rounds": row.result.get("evaluated_rounds", []),
                "accuracy_by_round": row.result.get("accuracy_by_round", []),
                "folder": row.folder,
            }
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.csv").write_text(text.getvalue(), encoding="utf-8")
        (out / "table.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    except OSError as error:
        raise ConfigError("--out", f"{out} cannot be written ({error.strerror})") from error


def summarise(table: Table) -> list[GridPoint]:
    """The grid points that have a finished cell, in the order of the grid."""
    names = _short_names(table.axes)
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        groups.setdefault(json.dumps(row.values, default=str), []).append(row)
    points = []
    for rows in groups.values():
        values = [value_text(value) for value in rows[0].values]
        points.append(
            GridPoint(
                name=", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
                or table.scenario,
                values=rows[0].values,
                num_seeds=len(rows),
                means={name: _mean([row.result.get(name) for row in rows]) for name in AVERAGED},
                rounds=max((row.result.get("evaluated_rounds", []) for row in rows), key=len),
                curves=[curve for row in rows if (curve := row.result.get("accuracy_by_round"))],
            )
        )
    return points


def measured(points: Sequence[GridPoint]) -> list[str]:
    """The names in `AVERAGED` that some grid point has a number for."""
    return [name for name in AVERAGED if any(point.means[name] is not None for point in points)]


def _mean(values: Sequence[Any]) -> Mean | None:
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if len(numbers) < len(values):
        return None
    return Mean(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def format_table(table: Table) -> str:
    """The grid points as plain text, one a line, for a terminal."""
    points = summarise(table)
    shown = measured(points)
    lines = [[*table.axes, "seeds", *shown]]
    for point in points:
        means = ("" if point.means[name] is None else str(point.means[name]) for name in shown)
        lines.append([*(value_text(value) for value in point.values), str(point.num_seeds), *means])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
