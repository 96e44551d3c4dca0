"""Tasks by name, and from a user's own file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from node.settings import Shard, TrainingSettings
from node.task_loading import TASKS, load_task, make_task
from node.tasks import Task, initial_params
from node.training import evaluate, train
from node.weights import schema_of
from protocols.errors import ConfigError

OWN_TASK = '''\
"""Which flats are dear: my own table and a small network."""
from pathlib import Path
import numpy as np
import torch
from torch import nn
from node.tasks import Task

def make_task(table: str = "flats.csv", hidden: int = 16) -> Task:
    rows = np.loadtxt(Path(__file__).parent / table, delimiter=",", skiprows=1, dtype=np.float32)
    inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, -1]).long()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    network = lambda: nn.Sequential(nn.Linear(inputs.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 2))
    train, test = slice(20, None), slice(20)
    return Task("flats", network, (inputs[train], targets[train]), (inputs[test], targets[test]))
'''


def refused(reference: str, options: Mapping[str, Any], base: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        make_task(reference, options, base)
    return str(caught.value)


def learns(task: Task) -> dict[str, float]:
    params, steps = initial_params(task, 0), TrainingSettings(local_steps=300)
    trained, _ = train(task, params, steps, round=0, seed=0, node=0)
    return evaluate(task, trained)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_an_unknown_task_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    assert refused("mnist", {}, tmp_path) == (
        "task.name: there is no task 'mnist' (allowed: digits, csv, npz, libsvm, "
        "hf-classifier, hf-causal-lm, <file>.py:<function>)"
    )


def test_a_shard_restricts_training_samples_only(tmp_path: Path) -> None:
    task = make_task("digits", {}, tmp_path, Shard(index=1, count=10, partitioner="dirichlet"))
    assert 10 <= len(task.train[0]) < 400
    assert len(task.test[0]) == 359


@pytest.mark.parametrize("name", ["csv", "npz", "libsvm"])
def test_a_missing_path_is_named(name: str, tmp_path: Path) -> None:
    assert refused(name, {}, tmp_path) == f"task.options.path: missing; the task `{name}` needs it"


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_option_is_refused_with_the_known_ones(name: str, tmp_path: Path) -> None:
    message = refused(name, {"depth": 3}, tmp_path)
    assert message.startswith(f"task.options.depth: not an option of the task `{name}` (allowed: ")
    assert ("max_tokens" if name.startswith("hf-") else "hidden") in message


def test_a_users_own_task_of_twenty_lines_trains(tmp_path: Path) -> None:
    assert len(OWN_TASK.splitlines()) <= 20
    write(tmp_path / "my_task.py", OWN_TASK)
    rows = "".join(f"{area},{area % 7},{int(area > 60)}\n" for area in (40 + n * 37 % 40 for n in range(120)))
    write(tmp_path / "flats.csv", "area,floor,dear\n" + rows)
    task = make_task("my_task.py:make_task", {"hidden": 4}, tmp_path)
    assert task.name == "flats"
    assert schema_of(task.model())["0.weight"].shape == (4, 2)
    assert learns(task)["accuracy"] > 0.9
    assert len(make_task("my_task.py:make_task", {}, tmp_path, Shard(index=0, count=4)).train[0]) == 25


def test_a_users_draws_are_the_same_on_every_node_and_leave_the_generator_alone(tmp_path: Path) -> None:
    write(
        tmp_path / "toy.py",
        "import torch\nfrom node.tasks import Task, mlp\n"
        "def make(**anything):\n"
        "    data = torch.rand(9, 2), torch.arange(9) % 2\n"
        "    return Task('toy', lambda: mlp(2, [], 2), data, data)\n",
    )
    before = torch.get_rng_state()
    one, other = (load_task("toy.py:make", {"any": n}, tmp_path) for n in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.train[0], other.train[0])


@pytest.mark.parametrize(
    ("reference", "body", "options", "message"),
    [
        ("no.py:make", "", {}, "task.name: there is no file {base}/no.py"),
        ("t.py", "", {}, "task.name: 't.py' names no function (allowed: <file>.py:<function>)"),
        ("t.txt:make", "", {}, "task.name: {base}/t.txt is no Python file (allowed: <file>.py:<function>)"),
        (
            "t.py:mak",
            "def make(): pass\ndef _hidden(): pass",
            {},
            "task.name: {base}/t.py has no function 'mak' (allowed: make)",
        ),
        ("t.py:make", "def make(: pass", {}, "task.name: t.py:make raised SyntaxError: "),
        (
            "t.py:make",
            "import nothing_such",
            {},
            "task.name: t.py:make raised ModuleNotFoundError: No module",
        ),
        ("t.py:make", "def make(): 1 / 0", {}, "task.name: t.py:make raised ZeroDivisionError: division by"),
        ("t.py:make", "def make(): return 3", {}, "task.name: t.py:make returned int, not a Task"),
        (
            "t.py:make",
            "def make(a, *, b=1): pass",
            {"c": 2},
            "task.options.c: not an option of `make` (allowed: a, b)",
        ),
        ("t.py:make", "def make(a, *, b=1): pass", {"b": 2}, "task.options.a: missing; `make` needs it"),
        (
            "t.py:make",
            "def make(): return task('', 2, 2)",
            {},
            "task.name: t.py:make names its task '' (allowed: 1 to 64 characters)",
        ),
        (
            "t.py:make",
            "def make(): return task('t', 2, 3)",
            {},
            "task.name: t.py:make gives train 2 inputs and 3 targets (allowed: as many of each, at least one)",
        ),
        ("t.py:make", "def make(): return task('t', 0, 0)", {}, "task.name: t.py:make gives train 0 inputs"),
    ],
)
def test_every_mistake_with_an_own_task_says_what(
    reference: str, body: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    helper = (
        "import torch as _torch\nfrom node.tasks import Task\n"
        "task = lambda name, x, y: Task(name, None, (_torch.zeros(x), _torch.zeros(y)), None)\n"
    )
    helper = helper if "task(" in body else ""
    for name in ("t.py", "t.txt"):
        write(tmp_path / name, f"{helper}{body}\n")
    assert refused(reference, options, tmp_path).startswith(message.format(base=tmp_path))


def test_a_users_exception_is_kept_for_the_traceback(tmp_path: Path) -> None:
    write(tmp_path / "t.py", "def make(): 1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        load_task("t.py:make", {}, tmp_path)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# --- a shared probe -------------------------------------------------------------------------------------
def saved(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "probe.npz", **arrays)
    return "probe.npz"


def test_a_probe_from_a_file_goes_with_any_task_and_any_shard(tmp_path: Path) -> None:
    x = np.random.default_rng(1).random((30, 64))
    shard = Shard(index=1, count=4)

    task = make_task("digits", {}, tmp_path, shard, saved(tmp_path, x=x))

    assert task.probe is not None
    assert task.probe.dtype == task.train[0].dtype
    assert torch.equal(task.probe, torch.from_numpy(x).float())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((5, 63))}, r"x is \[5, 63\] \(allowed: \[samples, 64\], as the network takes them\)"),
        ({"x": np.zeros((0, 64))}, r"x is \[0, 64\]"),
        ({"x": np.full((5, 64), np.nan)}, "x holds a value that is not finite"),
        ({"y": np.zeros((5, 64))}, r"cannot be read: .*\(allowed: an .npz file with an array x\)"),
        ({"x": np.array([{}])}, "cannot be read: "),
    ],
)
def test_a_wrong_probe_is_told(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ConfigError, match=f"task.probe: .*{message}"):
        make_task("digits", {}, tmp_path, probe=saved(tmp_path, **arrays))


def test_a_missing_probe_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.probe: .*none.npz cannot be read"):
        make_task("digits", {}, tmp_path, probe="none.npz")
