"""A device that does not work now, in a sampled network of real daemons: it is passed over, and nobody waits for it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from node.cluster import Cluster, free_port, local_settings

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(180)]

DEADLINE_S = 60.0
"""Whoever waited for the one that waits would wait so long."""


def test_a_node_outside_of_its_hours_holds_up_no_round(tmp_path: Path) -> None:
    now = datetime.now(UTC).astimezone()
    hours = f"{now + timedelta(hours=3):%H:%M}-{now + timedelta(hours=4):%H:%M}"
    port = free_port()
    with Cluster() as cluster:
        bootstrap: list[str] = []
        for index in range(3):
            tables = local_settings(
                network={
                    "listen": [f"/ip4/127.0.0.1/tcp/{0 if bootstrap else port}"],
                    "bootstrap": bootstrap,
                },
                learning={"protocol": "sampled"},
                sampled={
                    "sample_size": 2,
                    "success_fraction": 1.0,
                    "pause_s": 0.2,
                    "ping_s": 1.0,
                    "deadline_s": DEADLINE_S,
                    "wait_for_members": 3,
                },
                device={"hours": hours} if index == 2 else {},
                task={"shard": {"index": index, "count": 4}},
            )
            node = cluster.add(tmp_path / str(index), tables)
            bootstrap = bootstrap or [f"/ip4/127.0.0.1/tcp/{port}/p2p/{node.peer}"]
            node.start()
        first, _, waiting = cluster.nodes
        waiting.wait_for(lambda s: s["live_peers"] == 2, "a whole network")
        first.wait_for(lambda s: s["round"] >= 8, "rounds without a wait", DEADLINE_S)
        status = waiting.wait_until_up()
        assert status["waiting"] == f"outside of {hours}"
        assert "waiting" in waiting.log()
        merged = [row["num_merged"] for row in first.rounds() if row["round"] > 2 and row["num_merged"]]
        assert set(merged) <= {2}, "the two that work, in each round that was aggregated here"
        assert not any(row["num_merged"] for row in waiting.rounds())
