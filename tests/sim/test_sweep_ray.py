"""A sweep's cells on a local Ray of two workers give what they give in processes; skipped where Ray is not installed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocols.errors import ConfigError
from sim.sweep import Axis, Cell, Failure, Finished, LocalProcesses, Row, Sweep, command, run_sweep
from sim.sweep_ray import run_cells_on_ray, run_elsewhere

ROOT = Path(__file__).parents[2]

STAND_IN = """
import json, os, sys
words = sys.argv[1:]
scenario, out, seed = words[0], words[words.index("--out") + 1], int(words[words.index("--seed") + 1])
if "rule=FAIL" in words:
    sys.exit("covey: no such rule")
os.makedirs(out, exist_ok=True)
json.dump({"partial": False, "accuracy_mean": seed / 4, "scenario": open(scenario).read()},
          open(os.path.join(out, "result.json"), "w"))
open(os.path.join(out, "rounds.jsonl"), "w").write("rows")
open(os.path.join(out, "other"), "w").write("stays there")
"""


def stand_in() -> Callable[[Cell], list[str]]:
    """Made inside a function, so that it travels with the task and not by its module's name."""
    program = STAND_IN

    def make_command(cell: Cell) -> list[str]:
        return [sys.executable, "-S", "-c", program, *command(cell)[5:]]

    return make_command


def sweep_in(out: Path, scenario: Path, *rules: str) -> Sweep:
    scenario.write_text("seed = 1\n")
    return Sweep(str(scenario), out, (Axis("rule", rules),), seeds=2)


def test_a_worker_packs_up_the_run_and_nothing_else(tmp_path: Path) -> None:
    cell = sweep_in(tmp_path / "out", tmp_path / "mine.toml", "mean").cells()[1]
    parcel = run_elsewhere(cell, stand_in(), None)
    assert parcel.finished == Finished(0, "")
    assert set(parcel.files) == {"result.json", "rounds.jsonl"}
    assert not cell.folder.exists(), "it wrote in a folder of its own"


def test_a_worker_without_the_scenarios_file_gets_it(tmp_path: Path) -> None:
    cell = sweep_in(tmp_path / "out", tmp_path / "mine.toml", "mean").cells()[0]
    (tmp_path / "mine.toml").unlink()
    parcel = run_elsewhere(cell, stand_in(), b"seed = 5\n")
    assert json.loads(parcel.files["result.json"])["scenario"] == "seed = 5\n"


def test_a_failing_cell_brings_its_last_words(tmp_path: Path) -> None:
    cell = sweep_in(tmp_path / "out", tmp_path / "mine.toml", "FAIL").cells()[0]
    assert run_elsewhere(cell, stand_in(), None).finished == Finished(1, "covey: no such rule")


def test_without_ray_there_is_a_remedy() -> None:
    script = "import sys; sys.modules['ray'] = None\nfrom sim.sweep_ray import run_cells_on_ray\nrun_cells_on_ray([], print)"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "--ray: ray is not installed (allowed: pip install 'covey[ray]')" in ended.stderr


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """Before the tests with a cluster: one that stands is used whatever the address."""
    pytest.importorskip("ray")
    cells = sweep_in(tmp_path / "out", tmp_path / "mine.toml", "mean").cells()
    with pytest.raises(ConfigError, match="--ray: "):
        run_cells_on_ray(cells, lambda cell, finished: None, address="nonsense")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cluster")
def test_on_ray_the_results_are_those_of_processes(tmp_path: Path) -> None:
    def told(table_rows: list[Row], failed: list[Failure]) -> tuple[list[object], list[str]]:
        return [(row.values, row.seed, row.result) for row in table_rows], [
            failure.cell for failure in failed
        ]

    near = sweep_in(tmp_path / "near", tmp_path / "mine.toml", "mean", "corrected", "FAIL")
    far = sweep_in(tmp_path / "far", tmp_path / "mine.toml", "mean", "corrected", "FAIL")
    here = run_sweep(near, lambda cell: "", LocalProcesses(2, stand_in()))
    there = run_sweep(
        far, lambda cell: "", lambda cells, done: run_cells_on_ray(cells, done, make_command=stand_in())
    )
    assert told(there.rows, there.failed) == told(here.rows, here.failed)
    assert len(there.rows) == 4
    assert "covey: no such rule" in there.failed[0].why
    assert (far.cells()[0].folder / "rounds.jsonl").read_text() == "rows"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cluster")
def test_an_error_here_ends_what_runs_there(tmp_path: Path) -> None:
    def interrupt(cell: Cell, finished: Finished) -> None:
        raise KeyboardInterrupt

    cells = sweep_in(tmp_path / "out", tmp_path / "mine.toml", "mean", "corrected").cells()
    with pytest.raises(KeyboardInterrupt):
        run_cells_on_ray(cells, interrupt, make_command=stand_in())
    assert len(list((tmp_path / "out").glob("cells/*/result.json"))) == 1
