"""`covey sim`, `sweep`, `replay` and `diff`: what they print, how they end, and every mistake by its path."""

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner, Result

from protocols.errors import ConfigError
from sim import scenario_files
from sim.cli import EXIT_FAILED, EXIT_INTERRUPTED, RUNS_FOLDER, _computer, register
from sim.learning import compute_here
from sim.other_process import compute_beside
from sim.results import read_run
from sim.swarm import SwarmOutcome
from sim.world import World

TINY = """
summary = "as small as it gets"
nodes = 4
topology = { degree = 2 }
data = { options = { hidden = [8] } }
training = { local_steps = 1 }
gossip = { rounds = 3 }
compute = { threads = 1, batching = "never" }
"""
USAGE = 2


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder with the file `tiny.toml`, and on one core, where everything is computed in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    # A run begins with a collection, which takes longer than most of these runs.
    monkeypatch.setattr("gc.collect", lambda: 0)
    Path("tiny.toml").write_text(TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the page does not matter: to draw it takes longer than the run."""

    def cannot(folder: Path) -> Path:
        raise ConfigError("report", "cannot be drawn")

    monkeypatch.setattr("sim.running._write_report", cannot)


def covey(*arguments: str) -> Result:
    app = Typer()
    register(app)
    return CliRunner().invoke(app, list(arguments))


def json_of(*arguments: str, exit_code: int = 0) -> Any:
    result = covey(*arguments, "--json")
    assert result.exit_code == exit_code, (result.output, result.exception)
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def refused(*arguments: str) -> ConfigError:
    result = covey(*arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return result.exception


def folders() -> list[str]:
    return sorted(str(path) for path in RUNS_FOLDER.iterdir()) if RUNS_FOLDER.exists() else []


# --- help, list, show -----------------------------------------------------------------------------------
def test_help_says_what_there_is() -> None:
    result = covey("sim", "--help")
    assert result.exit_code == 0
    for name in ("run", "show", "swarm", "--list"):
        assert name in result.stdout
    result = covey("--help")
    for name in ("sim", "sweep", "replay", "diff"):
        assert name in result.stdout


def test_the_help_of_a_run_names_its_options() -> None:
    result = covey("sim", "run", "--help")
    for name in (
        "--set",
        "--nodes",
        "--dry-run",
        "--out",
        "--replace",
        "--quiet",
        "--json",
        "--device",
        "--ray",
    ):
        assert name in result.stdout


def test_every_built_in_scenario_is_listed_with_what_it_shows() -> None:
    result = covey("sim", "--list")
    assert result.exit_code == 0
    listed = json_of("sim", "--list")
    assert [(row["name"], row["summary"]) for row in listed] == scenario_files.names()
    assert {"baseline", "mass-failure"} <= {row["name"] for row in listed}
    for row in listed:
        assert row["name"] in result.stdout
        assert row["summary"][:60] in result.stdout


def test_a_scenario_that_is_shown_can_be_saved_and_run() -> None:
    result = covey("sim", "show", "mass-failure")
    assert result.exit_code == 0
    Path("saved.toml").write_text(result.stdout)
    mine, _ = scenario_files.load("saved.toml", ["name=mass-failure"])
    assert mine == scenario_files.load("mass-failure")[0]


def test_only_what_is_built_in_can_be_shown() -> None:
    error = refused("sim", "show", "baselin")
    assert error.path == "scenario"
    assert "baseline" in error.allowed


# --- one run --------------------------------------------------------------------------------------------
def test_the_json_of_a_run_has_what_was_promised() -> None:
    data = json_of("sim", "tiny.toml", "--set", "gossip.rounds=2", "--set", "links.jitter_s=0.01", "--no-out")
    promised = {"trace_hash", "accuracy_mean", "accuracy_min", "accuracy_by_round", "events", "bytes_sent"}
    assert promised | {"wall_s", "node_rounds_per_s", "events_per_s", "engine"} <= set(data)
    assert len(data["trace_hash"]) == 64
    assert len(data["accuracy_by_round"]) == 2
    assert 0 <= data["accuracy_min"] <= data["accuracy_mean"] <= 1
    assert (data["finished"], data["node_rounds"]) == (4, 8)
    assert data["engine"]["device"] == "cpu"
    assert data["folder"] is None
    assert sorted(path.name for path in Path().iterdir()) == ["tiny.toml"], "it leaves nothing"


def test_one_seed_one_trace() -> None:
    one, again, other = (
        json_of("sim", "tiny.toml", "--dry-run", "--no-out", "--seed", seed)["trace_hash"] for seed in "112"
    )
    assert one == again != other


@pytest.mark.usefixtures("no_report")
def test_short_options_are_settings() -> None:
    options = ["--nodes", "6", "--rounds", "2", "--seed", "3", "--dry-run", "--device", "cpu"]
    data = json_of("sim", "baseline", *options, "--out", "out")
    assert (data["nodes"], data["node_rounds"], data["accuracy_mean"]) == (6, 12, None)
    assert data["engine"] == {"dry run": True}
    written = read_run(Path("out")).scenario_toml
    assert (written["seed"], written["gossip"]["rounds"], written["compute"]["device"]) == (3, 2, "cpu")
    assert written["name"] == "baseline"


def test_a_short_option_wins_over_a_setting() -> None:
    data = json_of("sim", "tiny.toml", "--set", "nodes=3", "--nodes", "5", "--dry-run", "--no-out")
    assert data["nodes"] == 5


def test_a_task_is_found_from_where_the_command_is_given() -> None:
    Path("deep").mkdir()
    Path("deep/tiny.toml").write_text(TINY)
    Path("task.py").write_text(
        "from pathlib import Path\nfrom node.builtin_tasks import DigitsOptions, digits\n"
        "def make():\n    return digits(DigitsOptions(hidden=(8,)), Path())\n"
    )
    data = json_of("sim", "deep/tiny.toml", "--task", "task.py:make", "--no-out")
    assert data["accuracy_mean"] is not None


@pytest.mark.usefixtures("no_report")
def test_each_run_has_a_folder_of_its_own() -> None:
    for _ in range(2):
        assert covey("sim", "tiny.toml", "--dry-run").exit_code == 0
    assert json_of("sim", "tiny.toml", "--dry-run", "--seed", "7")["folder"] == str(RUNS_FOLDER / "tiny-7")
    assert folders() == [str(RUNS_FOLDER / name) for name in ("tiny-0", "tiny-0-2", "tiny-7")]


def test_the_text_of_a_run_has_its_numbers_and_its_page() -> None:
    pytest.importorskip("matplotlib")
    result = covey("sim", "run", "tiny.toml", "--out", "out")
    assert result.exit_code == 0, result.output
    run = read_run(Path("out"))
    assert f"{run.result['accuracy_mean']:.4f}" in result.stdout
    assert run.result["trace_hash"] in result.stdout
    assert f"{run.result['events']:,}" in result.stdout
    assert "4: 4 finished, 4 alive" in result.stdout
    assert "device cpu" in result.stdout
    assert "out/report.html" in result.stdout
    assert Path("out/report.html").is_file()


@pytest.mark.usefixtures("no_report")
def test_without_a_page_the_text_says_why() -> None:
    result = covey("sim", "tiny.toml", "--dry-run", "--out", "out")
    assert "out (no report: report: cannot be drawn)" in result.stdout


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("quiet", ["--quiet", "-q"])
def test_quiet_prints_nothing(quiet: str) -> None:
    result = covey("sim", "tiny.toml", "--dry-run", "--out", "out", quiet)
    assert (result.exit_code, result.output) == (0, "")
    assert read_run(Path("out")).result["finished"] == 4
    assert json_of("sim", "tiny.toml", "--dry-run", "--no-out", quiet)["finished"] == 4
    result = covey("sim", "swarm", "--seed", "1", quiet)
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.usefixtures("no_report")
def test_an_earlier_run_is_replaced_on_demand() -> None:
    first = json_of("sim", "tiny.toml", "--dry-run", "--out", "out")
    assert refused("sim", "tiny.toml", "--dry-run", "--seed", "1", "--out", "out").path == "--out"
    assert read_run(Path("out")).result["trace_hash"] == first["trace_hash"]
    second = json_of("sim", "tiny.toml", "--dry-run", "--seed", "1", "--out", "out", "--replace")
    assert read_run(Path("out")).result["trace_hash"] == second["trace_hash"] != first["trace_hash"]


@pytest.mark.usefixtures("no_report")
def test_an_interrupted_run_says_so_and_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(world: World, began_at: float) -> str:
        signal.raise_signal(signal.SIGINT)
        return "so far"

    monkeypatch.setattr("sim.cli._status", interrupted)
    monkeypatch.setattr("sim.cli.TOLD_EVERY_S", 0.0)
    long = ["sim", "tiny.toml", "--dry-run", "--rounds", "400"]
    result = covey(*long, "--out", "out")
    assert result.exit_code == EXIT_INTERRUPTED == 130
    assert "Interrupted" in result.stdout
    assert "so far" in result.stderr
    assert read_run(Path("out")).partial
    result = covey(*long, "--no-out", "--json")
    assert result.exit_code == EXIT_INTERRUPTED
    assert json.loads(result.stdout)["partial"] is True


def test_progress_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.cli.TOLD_EVERY_S", 0.0)
    result = covey("sim", "tiny.toml", "--rounds", "120", "--no-out", "--json")
    assert json.loads(result.stdout)["finished"] == 4
    first = result.stderr.splitlines()[0]
    for part in ("s virtual", "round ", "events/s", "4/4 alive", "MB", "accuracy 0."):
        assert part in first


def test_work_goes_to_another_process_where_there_is_a_core_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _computer(None) is compute_here
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert _computer(None) is compute_beside


@pytest.mark.parametrize(
    ("arguments", "path", "text"),
    [
        (["basline"], "scenario", "baseline"),
        (["nowhere.toml"], "scenario", "cannot be read"),
        (["tiny.toml", "--set", "links.los=0.1"], "links.los", "loss"),
        (["tiny.toml", "--set", "links.loss=2"], "links.loss", "<"),
        (["tiny.toml", "--set", "links.latency_s=-1"], "links.latency_s", ">="),
        (["tiny.toml", "--set", "topology.kind=star"], "topology.kind", "ring"),
        (["tiny.toml", "--set", "topology.degree=3", "--nodes", "5"], "topology.degree", "3"),
        (["tiny.toml", "--set", "links"], "--set", "links.loss=0.1"),
        (
            ["tiny.toml", "--set", "churn.model=trace", "--set", "churn.trace_path=no.csv"],
            "churn.trace_path",
            "no.csv",
        ),
        (["tiny.toml", "--set", 'timeline=["at noon: crash"]'], "timeline[0]", "noon"),
        (["tiny.toml", "--set", "rule=meen"], "rule", "meen"),
        (["tiny.toml", "--task", "mnist"], "data.task", "digits"),
        (["tiny.toml", "--task", "no.py:make"], "data.task", "no.py"),
        (["tiny.toml", "--set", "data.options.depth=3"], "data.options.depth", "hidden"),
        (["tiny.toml", "--set", "data.partitioner=shard", "--nodes", "2000"], "nodes", "samples_per_node"),
        (["tiny.toml", "--device", "abacus"], "compute.device", "cpu"),
    ],
)
def test_a_mistake_is_told_by_its_path_and_nothing_is_left(
    arguments: list[str], path: str, text: str
) -> None:
    error = refused("sim", *arguments)
    assert error.path == path
    assert text in str(error)
    assert folders() == []


@pytest.mark.parametrize(
    "arguments", [["--nodes", "0"], ["--rounds", "0"], ["--nodes", "x"], ["--lost"], ["a", "b"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert covey("sim", *arguments).exit_code == USAGE


# --- a swarm --------------------------------------------------------------------------------------------
def test_a_swarm_tells_of_every_seed() -> None:
    data = json_of("sim", "swarm", "--seeds", "3", "--jobs", "1")
    assert data["failed"] == []
    assert [outcome["seed"] for outcome in data["outcomes"]] == [0, 1, 2]
    assert all(outcome["ok"] and outcome["events"] > 0 for outcome in data["outcomes"])


def test_a_seed_can_be_looked_at_closely() -> None:
    result = covey("sim", "swarm", "--seed", "6", "--verbose")
    assert result.exit_code == 0
    assert "seed 6: " in result.stdout
    assert "1 seeds, " in result.stdout
    assert "all held" in result.stdout


def test_a_seed_that_fails_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_many(seeds: range, jobs: int, tell: Any) -> list[SwarmOutcome]:
        outcomes = []
        for seed in seeds:
            why = "" if seed != 5 else f"a bug\nagain: covey sim swarm --seed {seed} --verbose"
            outcomes.append(SwarmOutcome(seed, not why, why, "", 10, 1.0, 1.0, "", ()))
            tell(outcomes[-1])
        return outcomes

    monkeypatch.setattr("sim.swarm.run_many", run_many)
    result = covey("sim", "swarm", "--first", "4", "--seeds", "3")
    assert result.exit_code == EXIT_FAILED == 1
    assert "seed 5 failed" in result.stderr
    assert "covey sim swarm --seed 5 --verbose" in result.stderr
    assert "failed: 5" in result.stdout
    assert json_of("sim", "swarm", "--first", "4", "--seeds", "3", exit_code=1)["failed"] == [5]


# --- a sweep --------------------------------------------------------------------------------------------
def test_a_sweep_runs_its_cells_and_leaves_a_table() -> None:
    grid = [
        "sweep",
        "tiny.toml",
        "--set",
        "dry_run=true",
        "--set",
        "links.loss=0,0.1",
        "--out",
        "out",
        "--jobs",
        "2",
    ]
    data = json_of(*grid)
    assert data["folder"] == "out"
    assert data["failed"] == []
    assert [row["values"] for row in data["rows"]] == [[0], [0.1]]
    with Path("out/table.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 3
    again = covey(*grid)
    assert again.exit_code == 0
    assert "loss" in again.stdout
    assert "out/table.csv" in again.stdout
    assert "2/2" in again.stderr, "both were there already"


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["basline"], "scenario"),
        (["tiny.toml", "--set", "links.los=0,1"], "links.los"),
        (["tiny.toml", "--set", "links.loss=0,7"], "links.loss"),
        (["tiny.toml", "--set", "seed=1,2"], "--set"),
    ],
)
def test_a_sweep_is_refused_before_a_cell_runs(arguments: list[str], path: str) -> None:
    assert refused("sweep", *arguments).path == path
    assert folders() == []


# --- having it again ------------------------------------------------------------------------------------
@pytest.fixture
def runs(no_report: None) -> None:
    """Folders `a` and `b` of two seeds."""
    for name, seed in (("a", "1"), ("b", "2")):
        assert covey("sim", "tiny.toml", "--dry-run", "--seed", seed, "--out", name, "-q").exit_code == 0


@pytest.mark.usefixtures("runs")
def test_a_replay_says_whether_it_is_the_same() -> None:
    result = covey("replay", "a")
    run = read_run(Path("a"))
    assert result.exit_code == 0
    assert f"the same: {run.result['events']:,} events, trace {run.result['trace_hash']}" in result.stdout
    assert json_of("replay", "a")["same"] is True
    changed = {**run.result, "trace_hash": "0" * 64}
    Path("a/result.json").write_text(json.dumps(changed))
    result = covey("replay", "a")
    assert result.exit_code == EXIT_FAILED
    assert f"not {'0' * 64}; they part after event 0" in result.stdout
    assert json_of("replay", "a", exit_code=EXIT_FAILED)["parted_after"] == 0


@pytest.mark.usefixtures("runs")
def test_a_difference_is_told_with_settings_and_events() -> None:
    result = covey("diff", "a", "b")
    assert result.exit_code == EXIT_FAILED
    lines = result.stdout.splitlines()
    assert lines[0] == "setting  seed: 1 -> 2"
    assert [line.split("  ")[0].strip() for line in lines[-2:]] == ["a", "b"]
    data = json_of("diff", "a", "b", exit_code=EXIT_FAILED)
    assert f"#{data['a']['number']:,} at {data['a']['at_s']:.6f} s, node {data['a']['node']}: " in lines[-2]
    assert data["a"]["event"]["type"] in lines[-2]


@pytest.mark.usefixtures("runs")
def test_no_difference_is_told_as_such() -> None:
    result = covey("diff", "a", "a")
    assert (result.exit_code, result.stdout) == (0, "the same trace\n")
    assert json_of("diff", "a", "a") is None


@pytest.mark.parametrize(
    "arguments", [["replay", "nowhere"], ["diff", "nowhere", "nowhere"], ["replay", "."]]
)
def test_a_folder_without_a_run_is_refused(arguments: list[str]) -> None:
    error = refused(*arguments)
    assert error.path == arguments[1]
    assert "not a results folder" in error.problem
