"""The long proofs, run by `make test-slow`: the benchmarks' own claims, as tests."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sim.checkers import Checkers
from sim.results import RoundRow
from sim.scenario_files import load
from sim.swarm import run_many
from sim.world import Observer, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_eight_daemons_and_eight_simulated_nodes_learn_alike_and_exchange_as_much() -> None:
    result = run("two_worlds.py")
    assert result["accuracy_difference"] <= 0.03
    assert 0.8 <= result["exchange_ratio"] <= 1.2


def test_variance_correction_makes_up_for_different_starts(tmp_path: Path) -> None:
    result = run("vanishing_variance.py", "--seeds", "1", "--out", str(tmp_path / "curves.png"))
    for split, ratio in result["ratio_to_common_start"].items():
        assert ratio <= 1.5, split
        assert result["rounds_to_0.90"][split]["different starts, plain mean"] == [None], split
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_two_hundred_adverse_networks_keep_every_promise() -> None:
    failed = [outcome for outcome in run_many(range(200), jobs=2) if not outcome.ok]
    assert not failed, failed[0].violation


def test_after_a_mass_failure_the_survivors_go_on_learning() -> None:
    scenario, base = load("mass-failure", ["evaluation.share=0.2"])
    rows: list[RoundRow] = []

    class Watch(Observer):
        def round(self, row: RoundRow) -> None:
            rows.append(row)

    world = World(scenario, base, observer=Watch(), checkers=Checkers())
    result = world.run()  # a checker that is violated raises
    assert result.alive == 180

    def mean_between(begin_s: float, end_s: float) -> float:
        return statistics.fmean(row.metrics["accuracy"] for row in rows if begin_s <= row.at_s < end_s)

    before, alone, together, late = (
        mean_between(begin_s, begin_s + 5) for begin_s in (35.0, 70.0, 90.0, 115.0)
    )
    assert alone > before + 0.01, "the fifth that is left learns on"
    assert late > together > before + 0.01, "and so do those that came back"
