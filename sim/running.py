"""One whole run as people start it: with a results folder, a report, progress, and an end that loses nothing on Ctrl-C.

Belongs here: what `covey sim`, a sweep's cell and a replay do around a world.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from protocols.errors import ConfigError
from sim.learning import MakeComputer, compute_here
from sim.results import (
    REPORT_FILE,
    ConsensusRow,
    MergedRow,
    NoteRow,
    Result,
    ResultsWriter,
    RoundRow,
    SampleRow,
    TraceBlock,
    read_run,
)
from sim.scenario_files import to_toml, validate
from sim.scenarios import Scenario
from sim.world import Observer, World


@dataclass(frozen=True)
class Outcome:
    """How a run went.

    timing: what depends on this machine: seconds, rates, the engine's choices.
    report: the page, where one could be drawn; else `no_report` says why not.
    """

    result: Result
    timing: dict[str, Any]
    report: Path | None
    no_report: str = ""


class _ToFolder(Observer):
    def __init__(self, writer: ResultsWriter) -> None:
        self._writer = writer

    def round(self, row: RoundRow) -> None:
        self._writer.round(row)

    def sample(self, row: SampleRow) -> None:
        self._writer.sample(row)

    def consensus(self, row: ConsensusRow) -> None:
        self._writer.consensus(row)

    def merged(self, row: MergedRow) -> None:
        self._writer.merged(row)

    def note(self, row: NoteRow) -> None:
        self._writer.note(row)

    def block(self, row: TraceBlock) -> None:
        self._writer.block(row)


def run_scenario(
    scenario: Scenario,
    base: Path,
    out: Path | None,
    *,
    replace: bool = False,
    progress: Callable[[World], None] = lambda world: None,
    make_computer: MakeComputer = compute_here,
) -> Outcome:
    """Check the scenario, run it, and leave a results folder with a report.

    base: the folder that the scenario's relative paths start from.
    out: the results folder; None leaves nothing behind.
    replace: overwrite what an earlier run left there.

    Ctrl-C ends the run early: what there is by then is written and marked as partial. A second one gives up at once.

    Raises ConfigError before anything runs where the scenario, its files, task or data cannot be used.
    """
    validate(scenario, base)
    began_at = time.perf_counter()
    world = World(scenario, base, make_computer=make_computer)
    with closing(world.plan):
        if out is None:
            result, timing = _run(world, began_at, progress)
            return Outcome(result, timing, None)
        with ResultsWriter(out, to_toml(scenario), replace) as writer:
            world.observer = _ToFolder(writer)
            result, timing = _run(world, began_at, progress)
            writer.finish(result, {**timing, "base": str(base.resolve())}, world.overlay())
    try:
        return Outcome(result, timing, _write_report(out))
    except ConfigError as error:
        return Outcome(result, timing, None, str(error))


def _run(world: World, began_at: float, progress: Callable[[World], None]) -> tuple[Result, dict[str, Any]]:
    ready_at = time.perf_counter()
    with _stopped_by_signals(world):
        result = world.run(progress)
    wall_s = time.perf_counter() - ready_at
    timing = {
        "setup_s": round(ready_at - began_at, 3),
        "wall_s": round(wall_s, 3),
        "node_rounds_per_s": round(result.node_rounds / wall_s, 1),
        "events_per_s": round(result.events / wall_s, 1),
        "engine": world.plan.describe(),
    }
    return result, timing


@contextmanager
def _stopped_by_signals(world: World) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets the run end at its next event; the second does what it always does."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        world.stop()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # else whoever owns that one decides
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_report(folder: Path) -> Path:
    from sim.report import write_report

    page = folder / REPORT_FILE
    write_report(read_run(folder), page)
    return page
