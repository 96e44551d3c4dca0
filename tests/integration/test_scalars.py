"""Real daemons that learn by exchanging scalars: one log and one state at the end, whatever happened to them meanwhile."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from node.api import call
from node.cluster import Cluster, LocalNode, free_port, local_settings
from node.config import load_config
from node.replica import describe_stopped, verify_log

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(300)]

ROUNDS = 50
EVERY = 5


def settings(index: int, port: int, bootstrap: list[str], **scalars: Any) -> dict[str, Any]:
    return local_settings(
        network={"listen": [f"/ip4/127.0.0.1/tcp/{port}"], "bootstrap": bootstrap},
        learning={"protocol": "scalars"},
        scalars={
            "rounds": ROUNDS,
            "samples": 4,
            "learning_rate": 0.01,
            "epsilon": 2.0**-7,
            "deadline_s": 2.0,
            "pause_s": 0.3,
            "sync_s": 0.3,
            "batch_s": 0.02,
            "repair_s": 0.3,
            "checkpoint_every": EVERY,
            "evaluate_every": 10,
            **scalars,
        },
        task={
            "name": "digits",
            "options": {"hidden": [16]},
            "shard": {"index": index, "count": 3, "seed": 1},
        },
    )


def address(node: LocalNode, port: int) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{node.peer}"


def covey(node: LocalNode, *words: str) -> tuple[int, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "node", *words, "--home", str(node.home), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def sealed(status: dict[str, Any]) -> int:
    return status["log"]["sealed"]["round"] if status["log"]["sealed"] else 0


def test_a_kill_and_a_late_join_end_in_one_log_and_one_state(tmp_path: Path) -> None:
    with Cluster() as cluster:
        ports = [free_port() for _ in range(3)]
        first = cluster.add(tmp_path / "0", settings(0, ports[0], []))
        door = [address(first, ports[0])]
        killed = cluster.add(tmp_path / "1", settings(1, ports[1], door))
        late = cluster.add(tmp_path / "2", settings(2, ports[2], door))
        first.start()
        killed.start()
        killed.wait_for(lambda s: s["round"] >= 4, "a few rounds")
        killed.kill()
        before = describe_stopped(killed.home)
        assert not before["running"]
        assert killed.peer in before["authors"]
        killed.start()
        killed.wait_for(lambda s: s["live_peers"] >= 1 and s["round"] > before["round"], "the way back")
        # Records of sealed rounds are gone one checkpoint later: a newcomer has to take the state over.
        first.wait_for(lambda s: s["log"]["cut"] >= EVERY, "a cut log")
        late.start()
        joined = late.wait_for(lambda s: s["round"] > EVERY, "the newcomer's first round")
        assert joined["log"]["counts"].get("adopted", 0) >= 1, joined["log"]

        for node in cluster.nodes:
            node.wait_for(lambda s: s["phase"] == "done" and sealed(s) == ROUNDS, "the end")
        logs = [call(node.home, "/log") for node in cluster.nodes]
        assert len({log["log"] for log in logs}) == 1
        assert len({json.dumps(log["sealed"]) for log in logs}) == 1
        assert {log["sealed"]["round"] for log in logs} == {ROUNDS}
        assert all(set(log["authors"]) <= {node.peer for node in cluster.nodes} for log in logs)
        for node in cluster.nodes:
            # A neighbour may be further than one that comes back expects; nothing else is odd.
            assert set(node.status()["refused"]) <= {"future"}, node.log()  # type: ignore[index]
            assert node.stop() == 0, node.log()

    code, told = covey(late, "verify")
    assert code == 0, told
    verdicts = [verify_log(load_config(node.home, {}), node.home, lambda *_: None) for node in cluster.nodes]
    assert [found.problem for found in verdicts] == ["", "", ""]
    assert {(found.round, found.log, found.state) for found in verdicts} == {
        (ROUNDS, logs[0]["log"], logs[0]["sealed"]["digest"])
    }
    assert (told["log"], told["state"]) == (verdicts[0].log, verdicts[0].state)
    assert [found.started_at > 0 for found in verdicts] == [False, False, True], "only the newcomer's is cut"
