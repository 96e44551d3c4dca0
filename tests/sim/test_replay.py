"""Having runs again, and the first event in which two of them part, against the whole lists of their events."""

import json
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from protocols.errors import ConfigError
from protocols.events import Event
from sim.replay import SHOWN_BEFORE, Difference, TracedEvent, diff, replay
from sim.results import RESULT_FILE, SCENARIO_FILE, TRACE_FILE, Run, read_run
from sim.running import run_scenario
from sim.scenario_files import convert
from sim.scenarios import Scenario
from sim.world import BLOCK_EVENTS, Observer, World

BASE: dict[str, Any] = {
    "nodes": 8,
    "dry_run": True,
    "topology": {"degree": 3},
    "gossip": {"rounds": 45},
    "links": {"jitter_s": 0.01},
    "compute": {"threads": 1, "batching": "never"},
}
"""Some 4,000 events, so a few marks of the trace."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def no_report(folder: Path) -> Path:
        raise ConfigError("report", "is not wanted here")

    monkeypatch.setattr("sim.running._write_report", no_report)
    # A run begins with a collection, which takes longer than these runs do.
    monkeypatch.setattr("gc.collect", lambda: 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def scenario(**tables: Any) -> Scenario:
    data = dict(BASE)
    for name, value in tables.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return convert(data)


def make_run(
    folder: Path, progress: Callable[[World], None] = lambda world: None, base: Path = Path(), **tables: Any
) -> Run:
    run_scenario(scenario(**tables), base, folder, progress=progress)
    return read_run(folder)


def stop(world: World) -> None:
    signal.raise_signal(signal.SIGINT)


class Whole(Observer):
    """Every event of a run."""

    def __init__(self) -> None:
        self.events: list[TracedEvent] = []

    def event(self, at_s: float, node: int, event: Event) -> None:
        self.events.append(TracedEvent(len(self.events), at_s, node, msgspec.to_builtins(event)))


@cache
def events_of(chosen: bytes) -> list[TracedEvent]:
    whole = Whole()
    World(convert(msgspec.json.decode(chosen)), observer=whole, trace_events=True).run()
    return whole.events


def all_events(**tables: Any) -> list[TracedEvent]:
    return events_of(msgspec.json.encode(scenario(**tables)))


def rewrite(run: Run, name: str, change: Callable[[str], str]) -> Run:
    path = run.folder / name
    path.write_text(change(path.read_text()))
    return read_run(run.folder)


def with_result(run: Run, **changes: Any) -> Run:
    return rewrite(run, RESULT_FILE, lambda text: json.dumps({**json.loads(text), **changes}))


def with_other_marks_from(run: Run, place: int) -> Run:
    """As if the run had parted from what its scenario gives before that mark."""

    def change(text: str) -> str:
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines[place:]:
            line["hash"] = line["hash"][::-1]
        return "".join(json.dumps(line) + "\n" for line in lines)

    return with_result(rewrite(run, TRACE_FILE, change), trace_hash="0" * 64)


# --- replay ---------------------------------------------------------------------------------------------
def test_a_run_is_had_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", churn={"join_within_s": 2.0}, timeline=["at 5 s: crash 25 %"])
    seen: list[int] = []
    found = replay(run, lambda world: seen.append(world.events))
    assert found.same
    assert found.parted_after is None
    assert found.trace_hash == found.expected == run.result["trace_hash"]
    assert found.events == run.result["events"] > 2 * BLOCK_EVENTS
    assert seen, "it tells how far it is"


def test_an_interrupted_run_is_had_again_up_to_where_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stop, gossip={"rounds": 200})
    assert run.partial
    whole = all_events(gossip={"rounds": 200})
    assert 0 < run.result["events"] < len(whole)
    found = replay(run)
    assert found.same
    assert found.events == run.result["events"]


def test_a_run_that_learns_is_had_again(tmp_path: Path) -> None:
    tables = {"dry_run": False, "nodes": 4, "topology": {"degree": 2}, "data": {"options": {"hidden": [8]}}}
    run = make_run(tmp_path / "run", **tables, gossip={"rounds": 3})
    assert run.result["accuracy_mean"] is not None
    assert replay(run).same


def test_the_files_of_a_scenario_are_found_from_where_it_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "mine"
    base.mkdir()
    (base / "edges.csv").write_text("a,b\n" + "".join(f"{i},{(i + 1) % 8}\n" for i in range(8)))
    monkeypatch.chdir(base)
    run = make_run(tmp_path / "run", topology={"kind": "file", "path": "edges.csv"})
    monkeypatch.chdir(tmp_path)
    assert replay(run).same


@pytest.mark.parametrize("place", [0, 1, 2])
def test_another_trace_is_told_with_the_last_mark_that_is_shared(tmp_path: Path, place: int) -> None:
    run = with_other_marks_from(make_run(tmp_path / "run"), place)
    assert len(run.blocks) > 2
    found = replay(run)
    assert not found.same
    assert found.expected == "0" * 64 != found.trace_hash
    assert found.parted_after == place * BLOCK_EVENTS


def test_a_trace_that_parts_after_the_last_mark_is_told_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = replay(with_result(run, trace_hash="0" * 64))
    assert not found.same
    assert found.parted_after == len(run.blocks) * BLOCK_EVENTS


def test_a_run_that_would_go_on_is_not_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", at_most_s=4.0)
    longer = rewrite(run, SCENARIO_FILE, lambda text: text.replace("at_most_s = 4.0", "at_most_s = 9.0"))
    found = replay(longer)
    assert not found.same
    assert found.events == run.result["events"] + 1, "and no further than needed to see it"


def test_another_seed_in_the_folder_is_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seed=1)
    found = replay(rewrite(run, SCENARIO_FILE, lambda text: text.replace("seed = 1", "seed = 2")))
    assert (found.same, found.parted_after) == (False, 0)


@pytest.mark.parametrize("compare", [replay, lambda run: diff(run, run)])
def test_a_run_that_was_killed_has_nothing_to_compare(tmp_path: Path, compare: Callable[[Run], Any]) -> None:
    run = make_run(tmp_path / "run")
    (run.folder / RESULT_FILE).unlink()
    with pytest.raises(ConfigError, match="killed before") as refused:
        compare(read_run(run.folder))
    assert refused.value.path == str(run.folder)


# --- diff -----------------------------------------------------------------------------------------------
def check(found: Difference | None, first: list[TracedEvent], second: list[TracedEvent]) -> int:
    """Compares with the whole lists of events; the number of the first that differs."""
    pairs = enumerate(zip(first, second, strict=False))
    number = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    assert found is not None
    assert found.a == (first[number] if number < len(first) else None)
    assert found.b == (second[number] if number < len(second) else None)
    assert found.before == first[max(0, number - SHOWN_BEFORE) : number]
    return number


DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"seed": 1}, {"seed": 2}, ["seed: 1 -> 2"]),
    ({}, {"links": {"loss": 0.02}}, ["links.loss: 0.0 -> 0.02"]),
    ({"links": {"loss": 0.02}}, {"links": {"loss": 0.05}}, ["links.loss: 0.02 -> 0.05"]),
    ({}, {"timeline": ["at 9 s: crash nodes 3"]}, ['timeline: [] -> ["at 9 s: crash nodes 3"]']),
    ({"timeline": ["at 14 s: loss 20 %"]}, {"timeline": []}, ['timeline: ["at 14 s: loss 20 %"] -> []']),
    ({"at_most_s": 7.0}, {"at_most_s": 12.0}, ["at_most_s: 7.0 -> 12.0"]),
    ({}, {"seed": 1, "compute": {"tile": 3}, "name": "other"}, ["compute.tile: unset -> 3", "seed: 0 -> 1"]),
    ({}, {"gossip": {"rounds": 46}}, ["gossip.rounds: 45 -> 46"]),
]


@pytest.mark.parametrize(("one", "other", "settings"), DIFFERENT, ids=[case[2][0] for case in DIFFERENT])
def test_the_first_event_that_differs_is_named(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], settings: list[str]
) -> None:
    a, b = make_run(tmp_path / "a", **one), make_run(tmp_path / "b", **other)
    found = diff(a, b)
    check(found, all_events(**one), all_events(**other))
    assert found is not None
    assert found.settings == settings


def test_runs_that_part_late_are_followed_through_many_marks(tmp_path: Path) -> None:
    late = {"timeline": ["at 30 s: crash nodes 3"]}
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **late)
    number = check(diff(a, b), all_events(), all_events(**late))
    assert number > 2 * BLOCK_EVENTS
    marks = [block.events for block in a.blocks if block in b.blocks]
    assert marks[-1] <= number < marks[-1] + BLOCK_EVENTS


def test_no_more_is_run_again_than_up_to_the_first_mark_that_differs(tmp_path: Path) -> None:
    long = {"gossip": {"rounds": 200}}
    a, b = make_run(tmp_path / "a", **long, seed=1), make_run(tmp_path / "b", **long, seed=2)
    seen: list[int] = []
    assert replay(a, lambda world: seen.append(world.events)).same
    assert seen
    assert diff(a, b, lambda world: pytest.fail(f"{world.events} events")) is not None


@pytest.mark.parametrize("just_after_a_mark", [0, 1, SHOWN_BEFORE])
def test_what_both_share_is_shown_across_a_mark(tmp_path: Path, just_after_a_mark: int) -> None:
    """They part so soon after the mark that what was before lies on its other side."""
    whole = all_events()
    mark = 2 * BLOCK_EVENTS
    at_s = whole[mark + just_after_a_mark].at_s
    shorter = {"at_most_s": (at_s + whole[mark + just_after_a_mark - 1].at_s) / 2}
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **shorter)
    found = diff(a, b)
    assert check(found, whole, all_events(**shorter)) == mark + just_after_a_mark
    assert found is not None
    assert len(found.before) == SHOWN_BEFORE


def test_a_run_does_not_part_from_itself_nor_from_what_only_computes_otherwise(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", name="other", compute={"batching": "always"})
    assert diff(a, a) is None
    assert diff(a, b) is None


def test_an_interrupted_run_parts_from_the_whole_one_at_its_end(tmp_path: Path) -> None:
    tables = {"gossip": {"rounds": 200}}
    a, b = make_run(tmp_path / "a", stop, **tables), make_run(tmp_path / "b", **tables)
    whole = all_events(**tables)
    number = check(diff(a, b), whole[: a.result["events"]], whole)
    assert number == a.result["events"]
