"""The long proofs, run by `make test-slow`: the benchmarks' own claims, as tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
