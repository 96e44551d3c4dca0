"""Sweeps: which cells there are, which are run again, how one that fails or is interrupted ends."""

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import ConfigError
from sim.sweep import (
    Axis,
    Cell,
    Finished,
    LocalProcesses,
    Step,
    Sweep,
    Table,
    command,
    format_table,
    parse_settings,
    read_table,
    run_sweep,
    summarise,
    value_text,
)

AXES = (Axis("rule", ("mean", "corrected")), Axis("data.alpha", (0.1, 0.5)))

# A run in miniature: reads `--seed` and `--out`, leaves what a run leaves. FAIL in a setting makes it fail.
STAND_IN = """
import json, os, sys
words = sys.argv[1:]
out, seed = words[words.index("--out") + 1], int(words[words.index("--seed") + 1])
settings = [word for before, word in zip(words, words[1:]) if before == "--set"]
if any("FAIL" in setting for setting in settings):
    print("line\\n" * 30 + "covey: no such rule", file=sys.stderr)
    sys.exit(2)
os.makedirs(out, exist_ok=True)
open(os.path.join(out, "scenario.toml"), "w").write(f"settings = {json.dumps(settings)}\\nseed = {seed}\\n")
open(os.path.join(out, "rounds.jsonl"), "w").close()
result = {"partial": "PARTIAL" in settings[0], "accuracy_mean": 0.5 + seed / 10, "accuracy_by_round": [0.1, 0.5],
          "events": 7, "threads": os.environ.get("OMP_NUM_THREADS")}
json.dump(result, open(os.path.join(out, "result.json"), "w"))
"""


def stand_in(cell: Cell) -> list[str]:
    return [sys.executable, "-S", "-c", STAND_IN, *command(cell)[5:]]


def resolve(cell: Cell) -> str:
    return f"settings = {json.dumps(cell.settings)}\nseed = {cell.seed}\n"


class Here:
    """Runs cells in this process, and keeps which; as a whole run would leave them."""

    def __init__(
        self, fail: Callable[[Cell], bool] = lambda cell: False, stop_after: int | None = None
    ) -> None:
        self.ran: list[str] = []
        self._fail = fail
        self._stop_after = stop_after

    def __call__(self, cells: Sequence[Cell], done: Callable[[Cell, Finished], None]) -> None:
        for cell in cells:
            if len(self.ran) == self._stop_after:
                raise KeyboardInterrupt
            self.ran.append(cell.folder.name)
            if self._fail(cell):
                done(cell, Finished(1, "covey: boom"))
                continue
            write_cell(cell)
            done(cell, Finished(0, ""))


def write_cell(cell: Cell, **result: Any) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "scenario.toml").write_text(resolve(cell))
    whole = {
        "partial": False,
        "accuracy_mean": 0.5 + cell.seed / 10,
        "accuracy_by_round": [0.25, 0.5],
        "events": 9,
    }
    (cell.folder / "result.json").write_text(json.dumps({**whole, **result}))


def sweep_in(out: Path, **changes: Any) -> Sweep:
    return Sweep(**{"scenario": "non-iid", "out": out, "axes": AXES, "seeds": 2, **changes})


# --- what is asked for ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("rule=mean,corrected", ("mean", "corrected")),
        ("data.alpha=0.1,0.5", (0.1, 0.5)),
        ("nodes=16, 32", (16, 32)),
        ("dry_run=true,false", (True, False)),
        ("data.options.hidden=[[32],[64,64]]", ([32], [64, 64])),
        ("data.options.hidden=[32],[64,64]", ([32], [64, 64])),
        ('rule=["mean", "a,b"]', ("mean", "a,b")),
        ('rule="a,b",mean', ("a,b", "mean")),
        ("rule=mean+variance.corrected,mean", ("mean+variance.corrected", "mean")),
        ("data.task=tasks/a.py:make,tasks/b.py:make", ("tasks/a.py:make", "tasks/b.py:make")),
    ],
)
def test_an_option_with_several_values_is_an_axis(text: str, values: tuple[Any, ...]) -> None:
    assert parse_settings([text]) == ((), (Axis(text.partition("=")[0], values),))


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("links.loss=0.1", "links.loss=0.1"),
        ("rule=mean", "rule=mean"),
        ('rule="mean"', "rule=mean"),
        ('name="a,b"', 'name="a,b"'),
        ("data.options.hidden=[[32, 32]]", "data.options.hidden=[32, 32]"),
        ("name=two words", 'name="two words"'),
    ],
)
def test_an_option_with_one_value_is_a_setting(text: str, setting: str) -> None:
    assert parse_settings([text]) == ((setting,), ())


@pytest.mark.parametrize(
    "pairs",
    [
        ["rule"],
        ["=1"],
        ["rule="],
        ["rule=a,,b"],
        ["rule=[]"],
        ["rule=a,a"],
        ["rule=a", "rule=b"],
        ["seed=1,2"],
    ],
)
def test_a_wrong_option_is_refused(pairs: list[str]) -> None:
    with pytest.raises(ConfigError, match="--set: "):
        parse_settings(pairs)


plain = st.recursive(
    st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(value=plain.filter(lambda value: value != "" and value != []))
def test_every_value_comes_through_the_command_line(value: Any) -> None:
    text = value_text([value]) if isinstance(value, list) else value_text(value)
    ((setting,), ()) = parse_settings([f"path={text}"])
    assert setting == f"path={value_text(value)}"


def test_the_cells_are_the_product_with_the_seeds_innermost(tmp_path: Path) -> None:
    cells = sweep_in(tmp_path, settings=("nodes=8",), first_seed=3).cells()
    assert [(*cell.values, cell.seed) for cell in cells] == [
        ("mean", 0.1, 3),
        ("mean", 0.1, 4),
        ("mean", 0.5, 3),
        ("mean", 0.5, 4),
        ("corrected", 0.1, 3),
        ("corrected", 0.1, 4),
        ("corrected", 0.5, 3),
        ("corrected", 0.5, 4),
    ]
    assert cells[0].settings == ("nodes=8", "rule=mean", "data.alpha=0.1")
    assert cells[0].folder == tmp_path / "cells" / "rule-mean__alpha-0.1__seed-3"


def test_the_command_is_one_that_anybody_can_repeat(tmp_path: Path) -> None:
    cell = sweep_in(tmp_path).cells()[0]
    assert command(cell) == [
        *(
            sys.executable,
            "-P",
            "-m",
            "node",
            "sim",
            "non-iid",
            "--set",
            "rule=mean",
            "--set",
            "data.alpha=0.1",
        ),
        *("--seed", "0", "--out", str(cell.folder), "--quiet"),
    ]


def test_folder_names_are_safe_and_different() -> None:
    values = ("a/b", "a b", "a\\b", "../..", "é", "x" * 300, "x" * 299 + "y", [32], [64, 64], "mean+x")
    names = [cell.folder.name for cell in Sweep("s", Path("out"), (Axis("a.rule", values),)).cells()]
    assert len(set(names)) == len(values)
    assert all(len(name) < 100 and set(name) <= SAFE and not name.startswith(".") for name in names), names
    assert names[-1] == "rule-mean+x__seed-0"
    assert names[-2].startswith("rule-64-64")


SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")


def test_folder_names_tell_paths_apart_that_end_alike() -> None:
    axes = (Axis("links.up", (1, 2)), Axis("nat.up", (1, 2)))
    assert Sweep("s", Path("out"), axes).cells()[1].folder.name == "links.up-1__nat.up-2__seed-0"


# --- running --------------------------------------------------------------------------------------------
def test_a_sweep_runs_every_cell_and_tells_of_it(tmp_path: Path) -> None:
    steps: list[Step] = []
    table = run_sweep(sweep_in(tmp_path), resolve, Here(), steps.append)
    assert [(step.how, step.num_done, step.num_cells) for step in steps] == [
        ("ran", n, 8) for n in range(1, 9)
    ]
    assert [(*row.values, row.seed) for row in table.rows][:3] == [
        ("mean", 0.1, 0),
        ("mean", 0.1, 1),
        ("mean", 0.5, 0),
    ]
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert len(lines) == 8
    assert lines[1]["rule"] == "mean"
    assert lines[1]["seed"] == "1"
    assert lines[1]["accuracy_mean"] == "0.6"
    assert lines[1]["consensus_distance"] == ""
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert rows[7]["data.alpha"] == 0.5
    assert rows[7]["accuracy_by_round"] == [0.25, 0.5]


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    run_sweep(sweep_in(tmp_path), resolve, Here())
    again = Here()
    steps: list[Step] = []
    table = run_sweep(sweep_in(tmp_path, seeds=3), resolve, again, steps.append)
    assert again.ran == [f"rule-{r}__alpha-{a}__seed-2" for r in ("mean", "corrected") for a in (0.1, 0.5)]
    assert [step.how for step in steps].count("kept") == 8
    assert len(table.rows) == 12


def spoil_partial(cell: Cell) -> None:
    write_cell(cell, partial=True)


def spoil_damaged(cell: Cell) -> None:
    (cell.folder / "result.json").write_text('{"partial": fal')


def spoil_missing(cell: Cell) -> None:
    (cell.folder / "result.json").unlink()


def spoil_other_scenario(cell: Cell) -> None:
    (cell.folder / "scenario.toml").write_text(resolve(cell) + "nodes = 17\n")


@pytest.mark.parametrize("spoil", [spoil_partial, spoil_damaged, spoil_missing, spoil_other_scenario])
def test_a_cell_without_a_whole_result_of_this_scenario_is_run_again(
    tmp_path: Path, spoil: Callable[[Cell], None]
) -> None:
    sweep = sweep_in(tmp_path)
    run_sweep(sweep, resolve, Here())
    cell = sweep.cells()[5]
    spoil(cell)
    (cell.folder / "report.html").write_text("of the old run")
    again = Here()
    run_sweep(sweep, resolve, again)
    assert again.ran == [cell.folder.name]
    assert not (cell.folder / "report.html").exists()


def test_a_failing_cell_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    table = run_sweep(
        sweep_in(tmp_path), resolve, Here(fail=lambda cell: cell.values == ("mean", 0.5) and cell.seed == 1)
    )
    assert len(table.rows) == 7
    (failure,) = table.failed
    assert failure.cell == "rule-mean__alpha-0.5__seed-1"
    assert "-m node sim non-iid --set rule=mean --set data.alpha=0.5 --seed 1" in failure.why
    assert failure.why.endswith("exit code 1\ncovey: boom")
    assert [point.num_seeds for point in summarise(table)] == [2, 1, 2, 2]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep_in(tmp_path), resolve, Here(stop_after=3))
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + 3
    again = Here()
    run_sweep(sweep_in(tmp_path), resolve, again)
    assert len(again.ran) == 5


def test_a_mistake_is_found_before_anything_runs(tmp_path: Path) -> None:
    def strict(cell: Cell) -> str:
        if cell.values[0] == "corrected":
            raise ConfigError("rule", "no such rule")
        return resolve(cell)

    here = Here()
    with pytest.raises(ConfigError, match="no such rule"):
        run_sweep(sweep_in(tmp_path), strict, here)
    assert here.ran == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .* cannot be written"):
        run_sweep(sweep_in(tmp_path / "file"), resolve, Here())


# --- in processes ---------------------------------------------------------------------------------------
def test_cells_run_in_processes_of_their_own(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, axes=(Axis("rule", ("mean", "FAIL")),))
    table = run_sweep(sweep, resolve, LocalProcesses(2, stand_in))
    assert [row.result["accuracy_mean"] for row in table.rows] == [0.5, 0.6]
    assert [row.result["threads"] for row in table.rows] == ["1", "1"]
    assert [failure.cell for failure in table.failed] == ["rule-FAIL__seed-0", "rule-FAIL__seed-1"]
    lines = table.failed[0].why.splitlines()
    assert lines[1] == "exit code 2"
    assert lines[-1] == "covey: no such rule"
    assert len(lines) == 2 + 12, "the end of what it wrote, not all"


def test_one_job_leaves_torch_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    table = run_sweep(sweep_in(tmp_path, axes=AXES[:1], seeds=1), resolve, LocalProcesses(1, stand_in))
    assert [row.result["threads"] for row in table.rows] == [None, None]


def test_a_run_that_ended_well_without_a_whole_result_has_failed(tmp_path: Path) -> None:
    table = run_sweep(
        sweep_in(tmp_path, axes=(), settings=("name=PARTIAL",), seeds=1), resolve, LocalProcesses(1, stand_in)
    )
    assert table.rows == []
    assert "it left no whole result" in table.failed[0].why


WAITS = """
import os, sys
ready, never, saved = sys.argv[1:]
try:
    open(ready, "w").write(str(os.getpid()))
    open(never).read()
except KeyboardInterrupt:
    open(saved, "w").write("what there was")
"""


def test_whatever_goes_wrong_the_children_are_asked_to_end(tmp_path: Path) -> None:
    """The first cell ends once the second one waits, for ever; telling of the first raises, as Ctrl-C would."""
    ready, never, saved = (tmp_path / name for name in ("ready", "never", "saved"))
    os.mkfifo(ready)
    os.mkfifo(never)
    held_open = os.open(never, os.O_RDWR)
    pids: list[int] = []

    def make_command(cell: Cell) -> list[str]:
        if cell.seed == 0:
            return [
                sys.executable,
                "-S",
                "-c",
                "import sys; sys.stderr.write(open(sys.argv[1]).read())",
                str(ready),
            ]
        return [sys.executable, "-S", "-c", WAITS, str(ready), str(never), str(saved)]

    def interrupt(cell: Cell, finished: Finished) -> None:
        pids.append(int(finished.error))
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            LocalProcesses(2, make_command)(sweep_in(tmp_path, axes=()).cells(), interrupt)
    finally:
        os.close(held_open)
    assert saved.read_text() == "what there was"
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


# --- what they say together -----------------------------------------------------------------------------
def test_means_and_deviations_are_over_the_seeds(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, axes=AXES[:1], seeds=3)
    for cell in sweep.cells():
        write_cell(cell, accuracy_mean={0: 0.2, 1: 0.4, 2: 0.9}[cell.seed], virtual_s=10.0)
    mean, corrected = summarise(read_table(sweep))
    assert mean.name == "rule mean"
    assert corrected.values == ("corrected",)
    accuracy = mean.means["accuracy_mean"]
    assert accuracy is not None
    assert accuracy.mean == pytest.approx(0.5)
    assert accuracy.std == pytest.approx(0.36055512754639896)  # the root of (0.09 + 0.01 + 0.16) / 2
    assert mean.means["consensus_distance"] is None
    assert mean.curves == [[0.25, 0.5]] * 3
    assert format_table(read_table(sweep)).splitlines() == [
        "rule       seeds  accuracy_mean    virtual_s",
        "mean       3      0.5000 ± 0.3606  10.0 ± 0.0",
        "corrected  3      0.5000 ± 0.3606  10.0 ± 0.0",
    ]


def test_a_single_seed_has_no_deviation(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, axes=(), seeds=1)
    write_cell(sweep.cells()[0])
    (point,) = summarise(read_table(sweep))
    assert point.name == "non-iid"
    assert str(point.means["accuracy_mean"]) == "0.5000"


def test_a_table_of_nothing_is_its_head() -> None:
    assert format_table(Table("x", ("rule",), [], [])) == "rule  seeds"
