"""Computing in a child process: the same numbers and the same refusals as here, and nothing of it stays behind."""

import io
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec import Struct

from protocols.errors import ConfigError, LocalError
from sim.learning import Facts, compute_here
from sim.orders import Answers, Begin, Computer, Measure, Merge, MergeInput, Program, Step, Train
from sim.other_process import (
    Broken,
    Describe,
    Described,
    Done,
    OtherProcess,
    Ready,
    Refused,
    Setup,
    Work,
    compute_beside,
    serve,
)
from sim.running import run_scenario
from sim.scenario_files import convert
from sim.scenarios import Scenario
from sim.world import World

BASE: dict[str, Any] = {
    "nodes": 4,
    "topology": {"degree": 2},
    "data": {"options": {"hidden": [8]}},
    "training": {"local_steps": 2},
    "gossip": {"rounds": 4},
    "compute": {"threads": 1, "batching": "never"},
}
TALKATIVE = """
import dataclasses, os, sys
from node.builtin_tasks import DigitsOptions, digits
from pathlib import Path

print("read")

def make(hidden):
    task = digits(DigitsOptions(hidden=tuple(hidden)), Path())
    def loss(outputs, targets):
        print("a loss")
        sys.stdout.flush()
        os.write(1, b"frames" * 1000)
        return task.loss(outputs, targets)
    return dataclasses.replace(task, loss=loss)
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scenario(**tables: Any) -> Scenario:
    data = dict(BASE)
    for name, value in tables.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return convert(data)


class Kept:
    """Makes computers beside, and keeps the last one."""

    process: OtherProcess

    def __call__(self, scenario: Scenario, base: Path) -> tuple[Computer, Facts]:
        computer, facts = compute_beside(scenario, base)
        assert isinstance(computer, OtherProcess)
        self.process = computer
        return computer, facts

    @property
    def child(self) -> subprocess.Popen[bytes]:
        return self.process._child


def begin_train_and_measure(num_models: int) -> Program:
    return Program(
        num_rows=2 * num_models,
        steps=[
            Step(begins=[Begin(i, 10 + i) for i in range(num_models)]),
            Step(trains=[Train(num_models + i, i, i, 0) for i in range(num_models)]),
            Step(
                merges=[Merge(0, num_models, 10.0, (MergeInput(num_models + 1, 5.0, 1, "node-00001"),), 0, 1)]
            ),
        ],
        measures=[Measure(0, 0), Measure(1, 1)],
        comparisons=[[0, 1], [num_models, num_models + 1]],
    )


def assert_alike(one: Answers, other: Answers) -> None:
    assert one.failures == other.failures
    assert len(one.metrics) == len(other.metrics)
    for mine, theirs in zip(one.metrics, other.metrics, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert one.distances == pytest.approx(other.distances, rel=1e-5)


# --- a real child ---------------------------------------------------------------------------------------
def test_a_run_beside_is_a_run_here(tmp_path: Path) -> None:
    """Two programs after the other, so that the rows of the child have to last."""
    tables = {"compute": {**BASE["compute"], "max_pending": 9}, "gossip": {"rounds": 6}}
    kept = Kept()
    beside = World(scenario(**tables), tmp_path, make_computer=kept)
    here = World(scenario(**tables), tmp_path, make_computer=compute_here)
    assert beside.plan.facts == here.plan.facts
    first, second = beside.run(), here.run()
    assert first.trace_hash == second.trace_hash
    assert first.accuracy_by_round == pytest.approx(second.accuracy_by_round, abs=1e-6)
    assert first.consensus_distance == pytest.approx(second.consensus_distance, rel=1e-5)
    assert beside.plan.describe() == here.plan.describe()
    # Ctrl-C and SIGTERM often go to the child as well; it ends with its parent, and not before.
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(kept.child.pid, number)
    program = begin_train_and_measure(3)
    answers = []
    for world in (beside, here):
        assert world.plan.computer is not None
        world.plan.computer.submit(program)
        answers.append(world.plan.computer.answers())
    assert_alike(*answers)
    beside.plan.close()
    assert kept.child.returncode == 0


def test_what_a_task_prints_does_not_come_between_the_frames(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talks.py").write_text(TALKATIVE)
    chosen = scenario(data={"task": "talks.py:make"}, gossip={"rounds": 1})
    outcome = run_scenario(chosen, tmp_path, None, make_computer=compute_beside)
    assert outcome.result.finished == 4
    assert outcome.result.accuracy_mean is not None
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.count("read\n") == 1
    assert told.err.count("a loss\n") >= 8


def test_a_child_that_is_killed_ends_the_run_with_what_to_do_about_it(tmp_path: Path) -> None:
    kept = Kept()
    killed = []

    def kill(world: World) -> None:
        os.kill(kept.child.pid, signal.SIGKILL)
        killed.append(world.events)

    chosen = scenario(gossip={"rounds": 1_000}, compute={**BASE["compute"], "max_pending": 10_000})
    with pytest.raises(LocalError, match=r"was ended by signal 9; .* compute\.max_pending"):
        run_scenario(chosen, tmp_path, tmp_path / "out", progress=kill, make_computer=kept)
    assert killed
    assert kept.child.returncode == -signal.SIGKILL, "it is reaped"
    with pytest.raises(ProcessLookupError):
        os.kill(kept.child.pid, 0)


def test_a_wrong_task_is_refused_as_it_is_here_and_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Watched(OtherProcess):
        def __init__(self) -> None:
            super().__init__()
            made.append(self._child)

    monkeypatch.setattr("sim.other_process.OtherProcess", Watched)
    wrong = scenario(data={"options": {"depth": 3}})
    with pytest.raises(ConfigError) as here:
        compute_here(wrong, tmp_path)
    with pytest.raises(ConfigError) as beside:
        compute_beside(wrong, tmp_path)
    assert str(beside.value) == str(here.value)
    assert beside.value.path == here.value.path == "data.options.depth"
    assert [child.returncode for child in made] == [0]


# --- its life -------------------------------------------------------------------------------------------
def test_closing_ends_an_idle_child() -> None:
    process = OtherProcess()
    assert process._child.poll() is None
    process.close()
    assert process._child.poll() == 0


def test_closing_ends_a_child_that_is_at_work() -> None:
    process = OtherProcess()
    process.ask(Setup({}, ""))
    process.close()
    assert process._child.poll() == -signal.SIGKILL


def test_asking_a_child_that_is_gone_says_what_became_of_it() -> None:
    process = OtherProcess()
    process._child.kill()
    process._child.wait()
    with pytest.raises(LocalError, match="was ended by signal 9"):
        process.describe()
    process.close()
    assert process._child.poll() is not None


def test_a_package_of_the_same_name_where_the_command_is_given_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    process = OtherProcess()
    process.close()
    assert process._child.poll() == 0


LEAVES_A_CHILD = """
import os, signal
from sim.other_process import OtherProcess
process = OtherProcess()
print(process._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_ends_with_its_parent() -> None:
    """It holds the other end of the parent's standard error: this only returns once both have ended."""
    parent = subprocess.run([sys.executable, "-c", LEAVES_A_CHILD], capture_output=True, timeout=30)
    assert parent.returncode == -signal.SIGKILL
    assert int(parent.stdout) > 0
    assert parent.stderr == b""


# --- the child's side, without a child ------------------------------------------------------------------
def frame(message: Struct) -> bytes:
    data = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(data)) + data


def answers(*questions: Struct, cut: int = 0) -> list[Any]:
    """What a child answers to these; `cut` bytes of the last question never arrive."""
    asked = b"".join(map(frame, questions))
    sink = io.BytesIO()
    try:
        serve(io.BytesIO(asked[: len(asked) - cut]), sink)
    finally:
        told.clear()
        data = sink.getvalue()
        while data:
            (size,) = struct.unpack("<I", data[:4])
            told.append(
                msgspec.msgpack.decode(data[4 : 4 + size], type=Ready | Done | Described | Refused | Broken)
            )
            data = data[4 + size :]
    return list(told)


told: list[Any] = []


def setup(base: Path, **tables: Any) -> Setup:
    return Setup(msgspec.to_builtins(scenario(**tables)), str(base))


def test_every_question_is_answered_in_turn(tmp_path: Path) -> None:
    program = begin_train_and_measure(2)
    ready, done, described, again = answers(setup(tmp_path), Work(program), Describe(), Work(program))
    computer, facts = compute_here(scenario(), tmp_path)
    computer.submit(program)
    assert ready == Ready(facts)
    assert_alike(done.answers, computer.answers())
    assert_alike(again.answers, done.answers)
    assert described.engine["device"] == "cpu"
    assert described.engine["batching"] == "never"


def test_a_question_cut_short_is_the_end() -> None:
    assert answers(Describe(), cut=1) == []
    assert answers(cut=0) == []


@pytest.mark.parametrize(
    ("tables", "path"),
    [
        ({"data": {"task": "mnist"}}, "data.task"),
        ({"data": {"task": "nowhere.py:make"}}, "data.task"),
        ({"data": {"options": {"hidden": [0]}}}, "data.options.hidden"),
        ({"data": {"task": "csv", "options": {"path": "nowhere.csv"}}}, "data.options.path"),
        ({"data": {"partitioner": "shard"}, "nodes": 2000}, "nodes"),
        ({"data": {"samples_per_node": 10_000}}, "data.samples_per_node"),
        ({"rule": "meen"}, "rule"),
    ],
)
def test_an_operators_mistake_keeps_its_path_and_what_is_allowed(
    tmp_path: Path, tables: dict[str, Any], path: str
) -> None:
    (refused,) = answers(setup(tmp_path, **tables))
    with pytest.raises(ConfigError) as here:
        compute_here(scenario(**tables), tmp_path)
    error = here.value
    assert refused == Refused(error.path, error.problem, error.allowed)
    assert error.path.split("[")[0] == path


def test_an_exception_is_told_before_the_child_ends(tmp_path: Path) -> None:
    nowhere = Program(num_rows=1, steps=[Step(trains=[Train(0, 0, 99, 0)])], measures=[], comparisons=[])
    with pytest.raises(IndexError) as raised:
        answers(setup(tmp_path), Work(nowhere), Describe())
    assert told[1:] == [Broken(f"IndexError: {raised.value}")]
