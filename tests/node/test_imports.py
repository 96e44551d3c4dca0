"""What a command loads before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "libp2p")


@pytest.mark.parametrize("modules", ["node.settings", "node.config, node.cli", "sim.cli"])
def test_commands_start_without_what_only_work_needs(modules: str) -> None:
    script = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (loaded.stdout.strip(), loaded.returncode) == ("[]", 0), loaded.stderr
