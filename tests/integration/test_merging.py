"""Rules that look into the network, between real daemons that began apart. Real processes on loopback."""

from pathlib import Path
from typing import Any

import pytest

from node.cluster import Cluster, free_port, local_settings

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(300)]

NODES = 3
ALONE = 8
"""Rounds that each trains for itself, from its own start, before the first merge."""


def settings(index: int, port: int, bootstrap: list[str], rule: list[Any]) -> dict[str, Any]:
    return local_settings(
        network={"listen": [f"/ip4/127.0.0.1/tcp/{port}"], "bootstrap": bootstrap},
        learning={
            "rule": rule,
            "rounds": ALONE + 4,
            "dense_from": ALONE / (ALONE + 4),
            "quorum": 1.0,
            "deadline_s": 30.0,
            "pause_s": 0.0,
            "wait_for_peers": NODES - 1,
        },
        training={"learning_rate": 0.05, "local_steps": 60, "momentum": 0.9},
        task={
            "name": "digits",
            "seed": index,
            "options": {"hidden": [32, 32, 32]},
            "shard": {"index": index, "count": NODES},
        },
    )


def learned(folder: Path, rule: list[Any]) -> list[list[dict[str, Any]]]:
    """Every node's rounds."""
    with Cluster() as cluster:
        first_port = free_port()
        first = cluster.add(folder / "0", settings(0, first_port, [], rule))
        bootstrap = [f"/ip4/127.0.0.1/tcp/{first_port}/p2p/{first.peer}"]
        for index in range(1, NODES):
            cluster.add(folder / str(index), settings(index, free_port(), bootstrap, rule))
        for node in cluster.nodes:
            node.start()
        for node in cluster.nodes:
            node.wait_for(lambda s: s["phase"] == "done", "the last round", timeout_s=120)
            assert node.metric("covey_trouble_total") == 0, node.log()
        return [node.rounds() for node in cluster.nodes]


def test_daemons_that_grew_up_apart_align_before_they_average(tmp_path: Path) -> None:
    aligned = learned(tmp_path / "aligned", ["align.activation", "mean", "variance.corrected"])
    plain = learned(tmp_path / "plain", ["mean"])

    def at_first_merge(rounds: list[dict[str, Any]]) -> tuple[float, float]:
        """Accuracy before and after."""
        first = next(i for i, row in enumerate(rounds) if row["num_merged"])
        return rounds[first - 1]["metrics"]["accuracy"], rounds[first]["metrics"]["accuracy"]

    drops_aligned = [before - after for before, after in map(at_first_merge, aligned)]
    drops_plain = [before - after for before, after in map(at_first_merge, plain)]
    assert max(drops_aligned) < 0.15, (drops_aligned, drops_plain)
    # One node may meet models that the others have merged already.
    assert sum(drops_plain) / NODES > 0.2, (drops_aligned, drops_plain)
    for rounds in aligned:
        merged = [row for row in rounds if row["num_merged"]]
        # Towards the end the first to be done are awaited no longer.
        assert merged[0]["num_merged"] == NODES - 1
        assert merged[0]["report"]["align.activation.moved"] > 0.5
        assert merged[0]["report"]["align.activation.probe"].endswith(" own samples")
        assert max(row["metrics"]["accuracy"] for row in merged) > 0.92
