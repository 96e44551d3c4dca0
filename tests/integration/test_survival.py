"""What must hold when daemons die, disks lie and the bootstrap peer is not there. Real processes on loopback."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from node.cluster import Cluster, LocalNode, free_port, local_settings
from node.store import newest_checkpoints, verify_checkpoint

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(300)]

KILLS = 10
SEED = 7


def settings(index: int, count: int, port: int, bootstrap: list[str], **network: Any) -> dict[str, Any]:
    return local_settings(
        network={"listen": [f"/ip4/127.0.0.1/tcp/{port}"], "bootstrap": bootstrap, **network},
        learning={"pause_s": 0.1, "deadline_s": 2.0},
        training={"learning_rate": 0.05},
        task={"name": "digits", "shard": {"index": index, "count": count, "seed": 1}},
    )


def address(node: LocalNode, port: int) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{node.peer}"


def accuracy(status: dict[str, Any]) -> float:
    value: float = status["metrics"].get("accuracy", 0.0)
    return value


def test_ten_kills_at_random_moments_cost_neither_a_checkpoint_nor_the_place_in_the_network(
    tmp_path: Path,
) -> None:
    rng = random.Random(SEED)
    with Cluster() as cluster:
        ports = [free_port() for _ in range(3)]
        first = cluster.add(tmp_path / "0", settings(0, 3, ports[0], []))
        others = [
            cluster.add(tmp_path / str(i), settings(i, 3, ports[i], [address(first, ports[0])]))
            for i in (1, 2)
        ]
        for node in cluster.nodes:
            node.start()
        victim = others[-1]
        victim.wait_for(lambda s: accuracy(s) > 0.88 and s["live_peers"] == 2, "learning together")
        for kill in range(KILLS):
            # A moment within training, offering, merging, evaluating or writing, as the seed has it.
            until = victim.rounds()[-1]["round"] + rng.randint(1, 5)
            victim.wait_for(lambda s: s["round"] >= until, "a few rounds")  # noqa: B023
            for _ in range(rng.randint(0, 200)):
                victim.status()
                if rng.random() < 0.05:
                    break
            victim.kill()
            said = f"kill {kill}, seed {SEED}"
            records = victim.rounds()
            kept = newest_checkpoints(victim.home)
            refs = [verify_checkpoint(path)[0] for path in kept]
            assert refs, said
            assert refs[0].round >= records[-1]["round"], said
            at_checkpoint = next(r for r in reversed(records) if r["round"] < refs[0].round)["metrics"][
                "accuracy"
            ]
            victim.start()
            back = victim.wait_for(
                lambda s: s["live_peers"] == 2 and len(victim.rounds()) >= len(records) + 3,  # noqa: B023
                "the rejoin",
            )
            assert "damaged" not in victim.log(), said
            assert back["refused"] == {}, said
            after = victim.rounds()[len(records) :]
            assert after[0]["round"] >= refs[0].round, said
            assert min(row["metrics"]["accuracy"] for row in after) >= at_checkpoint - 0.02, said
            assert max(row["num_merged"] for row in after) > 0, said


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path: Path) -> None:
    with Cluster() as cluster:
        node = cluster.add(tmp_path / "n", settings(0, 4, free_port(), []))
        node.start()
        node.wait_for(lambda s: s["round"] >= 4, "four rounds")
        assert node.stop() == 0
        newest, before, *_ = newest_checkpoints(node.home)
        data = bytearray(newest.read_bytes())
        data[len(data) // 2] ^= 1
        newest.write_bytes(bytes(data))
        node.start()
        node.wait_until_up()
        log = node.log()
        assert newest.name in log
        assert "falling back to the one before" in log
        restored = verify_checkpoint(before)[0].round
        assert f"round={restored}" in log.split("falling back")[1]
        assert newest.with_suffix(".damaged").exists()


def test_a_bootstrap_peer_that_appears_late_is_joined_without_help(tmp_path: Path) -> None:
    with Cluster() as cluster:
        port = free_port()
        late = cluster.add(tmp_path / "late", settings(0, 2, port, []))
        early = cluster.add(
            tmp_path / "early",
            settings(1, 2, free_port(), [address(late, port)], redial_base_s=1.0, redial_max_s=4.0),
        )
        early.start()
        early.wait_for(lambda s: s["uptime_s"] >= 20.0 and s["live_peers"] == 0, "twenty seconds alone")
        late.start()
        late.wait_for(
            lambda s: s["live_peers"] == 1 and s["merged"] == 1, "the other's arrival", timeout_s=30
        )
        early.wait_for(lambda s: s["live_peers"] == 1 and s["merged"] == 1, "a merge")


def test_without_the_bootstrap_peer_the_rest_go_on_and_find_each_other_after_restarts(tmp_path: Path) -> None:
    with Cluster() as cluster:
        ports = [free_port() for _ in range(3)]
        boot = cluster.add(tmp_path / "boot", settings(0, 3, ports[0], []))
        rest = [
            cluster.add(tmp_path / str(i), settings(i, 3, ports[i], [address(boot, ports[0])]))
            for i in (1, 2)
        ]
        for node in cluster.nodes:
            node.start()
        for node in rest:
            node.wait_for(lambda s: s["live_peers"] == 2, "a full mesh")
        boot.kill()
        for node in rest:
            reached = node.wait_for(lambda s: s["live_peers"] == 1, "the loss of the bootstrap peer")["round"]
            node.wait_for(lambda s, r=reached: s["round"] > r + 3 and s["merged"] == 1, "rounds without it")
        for node in rest:
            assert node.stop() == 0
        for node in rest:
            node.start()
        for node in rest:
            node.wait_for(
                lambda s: s["live_peers"] == 1 and s["merged"] == 1, "each other, from stored peers"
            )


def test_a_frozen_peer_is_let_go_and_welcomed_back_when_it_thaws(tmp_path: Path) -> None:
    with Cluster() as cluster:
        ports = [free_port() for _ in range(2)]
        awake = cluster.add(tmp_path / "awake", settings(0, 2, ports[0], []))
        frozen = cluster.add(tmp_path / "frozen", settings(1, 2, ports[1], [address(awake, ports[0])]))
        for node in cluster.nodes:
            node.start()
        awake.wait_for(lambda s: s["live_peers"] == 1 and s["merged"] == 1, "a merge")
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            reached = awake.wait_for(lambda s: s["live_peers"] == 0, "the silence to be noticed")["round"]
            awake.wait_for(lambda s: s["round"] > reached + 3, "rounds alone")
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        awake.wait_for(lambda s: s["live_peers"] == 1 and s["merged"] == 1, "the return")


SLOW_TASK = """
import torch
from torch import nn
from node.tasks import Task


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, inputs):
        noise = torch.randn(1500, 1500)
        for _ in range(200):
            noise = noise @ noise / 1500
        return self.layer(inputs) + 0 * noise.mean()


def make_task():
    inputs, targets = torch.randn(50, 8), torch.randint(0, 2, (50,))
    return Task("slow", Slow, (inputs, targets), (inputs, targets))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_middle_of_a_long_training_is_clean_and_quick(
    tmp_path: Path, number: signal.Signals
) -> None:
    tables = settings(0, 1, free_port(), [])
    tables["task"] = {"name": "slow_task.py:make_task"}
    with Cluster() as cluster:
        node = cluster.add(tmp_path / "n", tables)
        (node.home / "slow_task.py").write_text(SLOW_TASK)
        node.start()
        status = node.wait_for(lambda s: s["phase"] == "training", "the training")
        os.kill(status["pid"], number)
        assert node.wait_for_exit(timeout_s=5.0) == 0, node.log()[-2000:]
        assert "stopped" in node.log()
        assert "terminate called" not in node.log()
        assert newest_checkpoints(node.home)
