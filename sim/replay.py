"""Having a run again, and finding where two runs part.

Belongs here: reading a results folder as a promise that the same scenario gives the same trace. The folder holds marks of
the running trace hash, not the trace itself: the events between two marks are had by running again.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from node.config import toml_value
from protocols.errors import ConfigError
from protocols.events import Event
from sim.learning import compute_nothing
from sim.results import Run, TraceBlock
from sim.scenario_files import convert, flat
from sim.scenarios import Scenario
from sim.world import Observer, World

SHOWN_BEFORE = 3
"""Common events shown before the first that differs."""


class Replay(Struct, frozen=True):
    """What a second run of a folder's scenario gave."""

    same: bool
    trace_hash: str
    expected: str
    events: int
    parted_after: int | None
    """Events up to the last mark that both runs share; None where they are the same."""


class TracedEvent(Struct, frozen=True):
    """One event of one node, and how many there were before it in the run."""

    number: int
    at_s: float
    node: int
    event: dict[str, Any]


class Difference(Struct, frozen=True):
    """Where two runs part.

    before: the last events that they share. Then the first event of each that differs; None where that run was over.
    """

    before: list[TracedEvent]
    a: TracedEvent | None
    b: TracedEvent | None
    settings: list[str]
    """Settings in which the scenarios differ, as `path: of a -> of b`, in TOML; the name and summary left out."""


def replay(run: Run, progress: Callable[[World], None] = lambda world: None) -> Replay:
    """Run the folder's scenario again, to the event at which the first run ended, and compare the trace hashes.

    Raises ConfigError where the folder holds no result.
    """
    expected, events = _ended(run)
    marks = _Marks()
    # One event more than there were would show a run that goes on where the first one stopped by itself.
    world = _world(run, marks, end_after=events if run.partial else events + 1)
    with closing(world.plan):
        result = world.run(progress)
    same = result.trace_hash == expected and result.events == events
    shared = None if same else _last_shared(run.blocks, marks.blocks)
    return Replay(same, result.trace_hash, expected, result.events, shared)


def diff(a: Run, b: Run, progress: Callable[[World], None] = lambda world: None) -> Difference | None:
    """The first event in which two runs part; None where their traces are the same.

    Runs both again, up to the first mark that differs.
    """
    if _ended(a) == _ended(b):
        return None
    shared = _last_shared(a.blocks, b.blocks)
    until = min(
        [block.events for block in (*a.blocks, *b.blocks) if block.events > shared],
        default=max(_ended(a)[1], _ended(b)[1]),
    )
    from_number = max(0, shared - SHOWN_BEFORE)
    first, second = (_events(run, from_number, min(until, _ended(run)[1]), progress) for run in (a, b))
    length = next(
        (i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y),
        min(len(first), len(second)),
    )
    return Difference(
        before=first[max(0, length - SHOWN_BEFORE) : length],
        a=first[length] if length < len(first) else None,
        b=second[length] if length < len(second) else None,
        settings=_changed(_scenario(a), _scenario(b)),
    )


def _ended(run: Run) -> tuple[str, int]:
    """Trace hash and events of a run that was not killed."""
    if not run.result:
        raise ConfigError(str(run.folder), "the run was killed before it could write its result")
    return run.result["trace_hash"], run.result["events"]


def _scenario(run: Run) -> Scenario:
    return convert(run.scenario_toml)


def _world(run: Run, observer: Observer, end_after: int, trace_events: bool = False) -> World:
    base = Path(run.result.get("base", run.folder))
    return World(
        _scenario(run),
        base,
        observer=observer,
        end_after=end_after,
        trace_events=trace_events,
        make_computer=compute_nothing,
    )


class _Marks(Observer):
    def __init__(self) -> None:
        self.blocks: list[TraceBlock] = []

    def block(self, row: TraceBlock) -> None:
        self.blocks.append(row)


class _Events(Observer):
    """Keeps the events from one number on."""

    def __init__(self, from_number: int) -> None:
        self._from = from_number
        self._seen = 0
        self.kept: list[TracedEvent] = []

    def event(self, at_s: float, node: int, event: Event) -> None:
        if self._seen >= self._from:
            told = msgspec.to_builtins(event)
            self.kept.append(TracedEvent(self._seen, at_s, node, told))
        self._seen += 1


def _events(run: Run, from_number: int, until: int, progress: Callable[[World], None]) -> list[TracedEvent]:
    watcher = _Events(from_number)
    world = _world(run, watcher, end_after=until, trace_events=True)
    with closing(world.plan):
        world.run(progress)
    return watcher.kept


def _last_shared(a: Sequence[TraceBlock], b: Sequence[TraceBlock]) -> int:
    """Events up to the last mark before the two part."""
    shared = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        shared = one.events
    return shared


def _changed(a: Scenario, b: Scenario) -> list[str]:
    first, second = dict(flat(msgspec.to_builtins(a))), dict(flat(msgspec.to_builtins(b)))
    return [
        f"{path}: {_shown(first.get(path))} -> {_shown(second.get(path))}"
        for path in sorted({**first, **second})
        if first.get(path) != second.get(path) and path not in ("name", "summary")
    ]


def _shown(value: Any) -> str:
    return "unset" if value is None else toml_value(value)
