"""A whole run as people start it: what is in its folder, and what Ctrl-C, a refusal or a failure leave behind."""

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from protocols.errors import ConfigError, LocalError
from sim.learning import Facts
from sim.orders import Answers, Computer, Program
from sim.results import (
    CONSENSUS_FILE,
    NOTES_FILE,
    OVERLAY_FILE,
    RESULT_FILE,
    ROUNDS_FILE,
    RUN_FILES,
    SAMPLES_FILE,
    SCENARIO_FILE,
    TRACE_FILE,
    read_run,
)
from sim.running import Outcome, run_scenario
from sim.scenario_files import convert, load
from sim.scenarios import Scenario
from sim.world import BLOCK_EVENTS, World

CAN_DRAW = importlib.util.find_spec("matplotlib") is not None
BASE: dict[str, Any] = {
    "name": "tiny",
    "nodes": 4,
    "topology": {"degree": 2},
    "data": {"options": {"hidden": [8]}},
    "training": {"local_steps": 2},
    "gossip": {"rounds": 4},
    "compute": {"threads": 1, "batching": "never"},
}
LONG: dict[str, Any] = {"dry_run": True, "gossip": {"rounds": 400}}
"""Some 30,000 events: `progress` is called a few times."""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # A run begins with a collection, which takes longer than most of these runs.
    monkeypatch.setattr("gc.collect", lambda: 0)
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_num_threads(threads)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def scenario(**tables: Any) -> Scenario:
    data = dict(BASE)
    for name, value in tables.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return convert(data)


class Fake:
    """A computer without torch: every answer is the same, unless it has to fail."""

    def __init__(self, fails: bool = False) -> None:
        self.closed = 0
        self._fails = fails
        self._waiting: list[Program] = []

    def make(self, scenario: Scenario, base: Path) -> tuple[Computer, Facts]:
        return self, Facts("fake", bytes(32), 1000, [10] * scenario.nodes)

    def submit(self, program: Program) -> None:
        self._waiting.append(program)

    def answers(self) -> Answers:
        program = self._waiting.pop(0)
        if self._fails:
            raise LocalError("no memory")
        metrics = [{"accuracy": 0.5} for _ in program.measures]
        return Answers(failures=[], metrics=metrics, distances=[0.0 for _ in program.comparisons])

    def describe(self) -> dict[str, object]:
        assert not self._waiting, "no program is under way"
        return {"device": "none"}

    def close(self) -> None:
        self.closed += 1


# --- a whole run ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scenario, Outcome, Path]:
    folder = tmp_path_factory.mktemp("runs") / "deep" / "run"
    chosen = scenario(gossip={"rounds": 60}, timeline=["at 2 s: loss 5 %"])
    threads = torch.get_num_threads()
    outcome = run_scenario(chosen, Path(), folder)
    torch.set_num_threads(threads)
    return chosen, outcome, folder


def test_the_folder_holds_everything(finished: tuple[Scenario, Outcome, Path]) -> None:
    chosen, outcome, folder = finished
    run = read_run(folder)
    expected = set(RUN_FILES) if CAN_DRAW else set(RUN_FILES) - {"report.html"}
    assert {path.name for path in folder.iterdir()} == expected
    assert load(folder / SCENARIO_FILE)[0] == chosen
    assert len(run.rounds) == outcome.result.node_rounds > 100
    assert {row.node for row in run.rounds} == set(range(4))
    assert all(0 <= row.metrics["accuracy"] <= 1 for row in run.rounds)
    assert run.samples[0].at_s == 0.0
    assert run.samples[-1].at_s == outcome.result.virtual_s
    assert run.samples[-1].events == outcome.result.events
    assert run.consensus[-1].distance == outcome.result.consensus_distance
    assert [row.text for row in run.notes] == ["loss 5 %"]
    assert [row.events for row in run.blocks] == [
        BLOCK_EVENTS * (i + 1) for i in range(outcome.result.events // BLOCK_EVENTS)
    ]
    assert run.blocks
    assert run.overlay is not None
    assert [node.index for node in run.overlay.nodes] == [0, 1, 2, 3]
    assert len(run.overlay.links) == 4


def test_the_result_stands_in_the_folder_with_how_it_was_made(
    finished: tuple[Scenario, Outcome, Path],
) -> None:
    _, outcome, folder = finished
    written = json.loads((folder / RESULT_FILE).read_text())
    for name in outcome.result.__struct_fields__:
        assert written[name] == getattr(outcome.result, name), name
    assert written["partial"] is False
    assert written["base"] == str(Path.cwd())
    assert written["engine"]["device"] == "cpu"
    assert written["wall_s"] > 0
    assert written["setup_s"] >= 0
    assert written["versions"]["python"]
    assert {name: written[name] for name in outcome.timing} == outcome.timing


@pytest.mark.skipif(not CAN_DRAW, reason="the drawing library is not installed")
def test_there_is_a_report(finished: tuple[Scenario, Outcome, Path]) -> None:
    _, outcome, folder = finished
    assert outcome.report == folder / "report.html"
    assert outcome.no_report == ""
    assert "tiny" in outcome.report.read_text(encoding="utf-8")


def test_a_run_that_leaves_nothing_is_the_same_run(
    finished: tuple[Scenario, Outcome, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, outcome, _ = finished
    monkeypatch.chdir(tmp_path)
    again = run_scenario(chosen, tmp_path, None)
    assert again.result == outcome.result
    assert again.report is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(folder: Path) -> Path:
        raise ConfigError("report", "cannot be drawn")

    monkeypatch.setattr("sim.running._write_report", cannot)


@pytest.mark.usefixtures("no_report")
def test_without_a_report_the_outcome_says_why(tmp_path: Path) -> None:
    outcome = run_scenario(scenario(), tmp_path, tmp_path / "out", make_computer=Fake().make)
    assert (outcome.report, outcome.no_report) == (None, "report: cannot be drawn")
    assert read_run(tmp_path / "out").result["finished"] == 4


# --- Ctrl-C ---------------------------------------------------------------------------------------------
def send(*numbers: int) -> Callable[[World], None]:
    """A `progress` that sends one of these signals to this process at each call."""
    waiting = list(numbers)

    def progress(world: World) -> None:
        if waiting:
            os.kill(os.getpid(), waiting.pop(0))

    return progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_what_there_is_marked_as_partial(tmp_path: Path, number: int) -> None:
    chosen = scenario(gossip={"rounds": 400})
    fake = Fake()
    outcome = run_scenario(chosen, tmp_path, tmp_path / "out", progress=send(number), make_computer=fake.make)
    assert outcome.result.partial
    assert 0 < outcome.result.node_rounds < 1600
    assert outcome.result.finished == 0
    run = read_run(tmp_path / "out")
    assert run.partial
    assert run.result["partial"] is True
    assert run.result["trace_hash"] == outcome.result.trace_hash
    assert len(run.rounds) == outcome.result.node_rounds, "what was put off is computed all the same"
    assert run.samples[-1].events == outcome.result.events == run.result["events"]
    assert run.overlay is not None
    assert fake.closed == 1
    if CAN_DRAW:
        assert outcome.report is not None
        assert "partial" in outcome.report.read_text(encoding="utf-8").lower()


def test_a_second_one_does_what_it_always_does(tmp_path: Path) -> None:
    fake = Fake()

    def twice(world: World) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_scenario(scenario(**LONG), tmp_path, tmp_path / "out", progress=twice, make_computer=fake.make)
    assert (tmp_path / "out" / SAMPLES_FILE).exists()
    assert not (tmp_path / "out" / RESULT_FILE).exists()
    assert read_run(tmp_path / "out").partial, "and what there is can be read"


def test_giving_up_at_once_does_not_wait_for_what_is_computed(tmp_path: Path) -> None:
    """With work under way, asking the computer how it was done would be out of turn."""
    fake = Fake()

    def twice(world: World) -> None:
        assert world.plan.computer is fake
        fake.submit(Program(0, [], [], []))
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_scenario(
            scenario(gossip={"rounds": 400}), tmp_path, None, progress=twice, make_computer=fake.make
        )
    assert fake.closed == 1


# --- what goes wrong ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tables", "path"),
    [
        ({"topology": {"kind": "regular", "degree": 9}}, "topology.degree"),
        ({"timeline": ["at noon: crash"]}, "timeline[0]"),
        ({"churn": {"model": "trace", "trace_path": "nowhere.csv"}}, "churn.trace_path"),
        ({"data": {"task": "mnist"}}, "data.task"),
        ({"data": {"options": {"depth": 3}}}, "data.options.depth"),
        ({"rule": "meen"}, "rule"),
    ],
)
def test_a_scenario_that_is_refused_leaves_no_folder(
    tmp_path: Path, tables: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run_scenario(scenario(**tables), tmp_path, tmp_path / "out")
    assert refused.value.path == path
    assert list(tmp_path.iterdir()) == []


def test_a_computer_that_fails_is_closed_and_the_rows_so_far_can_be_read(tmp_path: Path) -> None:
    fake = Fake(fails=True)
    with pytest.raises(LocalError, match="no memory"):
        run_scenario(scenario(), tmp_path, tmp_path / "out", make_computer=fake.make)
    assert fake.closed == 1
    assert read_run(tmp_path / "out").result == {}


def test_a_folder_that_cannot_be_written_closes_the_computer(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fake = Fake()
    with pytest.raises(ConfigError, match="--out"):
        run_scenario(scenario(), tmp_path, tmp_path / "file" / "out", make_computer=fake.make)
    assert fake.closed == 1


@pytest.mark.usefixtures("no_report")
def test_an_earlier_run_is_only_replaced_on_demand(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_scenario(scenario(dry_run=True, seed=1), tmp_path, out)
    (out / "mine.txt").write_text("notes")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="--replace"):
        run_scenario(scenario(dry_run=True, seed=2), tmp_path, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    second = run_scenario(scenario(dry_run=True, seed=2), tmp_path, out, replace=True)
    assert second.result.trace_hash != first.result.trace_hash
    run = read_run(out)
    assert run.result["trace_hash"] == second.result.trace_hash
    assert run.scenario_toml["seed"] == 2
    assert (out / "mine.txt").read_text() == "notes"


def test_rows_are_written_by_their_file(finished: tuple[Scenario, Outcome, Path]) -> None:
    """So that other tools may read them."""
    _, _, folder = finished
    num_lines = {
        name: len((folder / name).read_text().splitlines())
        for name in (ROUNDS_FILE, SAMPLES_FILE, CONSENSUS_FILE, NOTES_FILE, TRACE_FILE)
    }
    run = read_run(folder)
    assert num_lines == {
        ROUNDS_FILE: len(run.rounds),
        SAMPLES_FILE: len(run.samples) + 1,
        CONSENSUS_FILE: len(run.consensus) + 1,
        NOTES_FILE: len(run.notes),
        TRACE_FILE: len(run.blocks),
    }
    assert set(json.loads((folder / OVERLAY_FILE).read_text())) == {"nodes", "links"}
