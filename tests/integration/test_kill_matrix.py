"""The kill matrix: each role of a sampled network dies with SIGKILL in each phase, and the network does not care.

One network of real daemons for all twenty cases, so that what one death leaves behind, the next one meets.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.cluster import Cluster, LocalNode, free_port, local_settings
from node.store import newest_checkpoints, verify_checkpoint
from tests.integration.dying_node import ARM, PHASES, ROLES

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(240)]

NODES = 5
DYING = (sys.executable, "-m", "tests.integration.dying_node")
CATCH_UP_ROUNDS = 3


class Network:
    """Five nodes that learn for ever, three of them a round, and places for newcomers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = Cluster()
        self.port = free_port()
        self.first = self.add("0", 0, [])
        bootstrap = [f"/ip4/127.0.0.1/tcp/{self.port}/p2p/{self.first.peer}"]
        self.bootstrap = bootstrap
        self.others = [self.add(str(i), i, bootstrap) for i in range(1, NODES)]
        for node in self.cluster.nodes:
            node.start()
        self.first.wait_for(lambda s: s["round"] >= 3 and s["live_peers"] == NODES - 1, "rounds", 90)

    def add(self, name: str, index: int, bootstrap: list[str]) -> LocalNode:
        port = self.port if not bootstrap else 0
        settings = local_settings(
            network={
                "listen": [f"/ip4/127.0.0.1/tcp/{port}"],
                "bootstrap": bootstrap,
                "mdns": False,
                "dht": False,
            },
            learning={"protocol": "sampled"},
            sampled={
                "sample_size": 3,
                "ping_s": 1.0,
                "deadline_s": 6.0,
                "pause_s": 0.3,
                "wait_for_members": NODES,
                "evaluate_every": 5,
            },
            task={"name": "digits", "shard": {"index": index, "count": NODES + 1, "seed": 1}},
        )
        return self.cluster.add(self.folder / name, settings, DYING)

    def victim(self, role: str, phase: str) -> LocalNode:
        match role:
            case "bootstrap":
                return self.first
            case "trainer":
                return self.others[0]
            case "aggregator":
                return self.others[1]
            case _:
                return self.add(f"newcomer-{phase}", NODES, self.bootstrap)

    def round(self, but: LocalNode) -> int:
        """The highest round that any other node is in."""
        found = [node.status() for node in self.cluster.nodes if node is not but and node.running]
        return max(status["round"] for status in found if status is not None)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    network = Network(tmp_path_factory.mktemp("network"))
    with network.cluster:
        yield network


def check_files(node: LocalNode) -> None:
    """Every checkpoint is what its name says, and the log tells of no damage."""
    for path in newest_checkpoints(node.home):
        verify_checkpoint(path)
    assert "damaged" not in node.log()
    assert "the node broke" not in node.log()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("role", ROLES)
def test_a_death_is_survived(network: Network, role: str, phase: str) -> None:
    victim = network.victim(role, phase)
    if phase == "handshake" and victim.running:
        assert victim.stop() == 0  # it greets when it starts
    (victim.home / ARM).write_text(f"{role} {phase}")
    if not victim.running:
        victim.start()
    assert victim.wait_for_exit(60) == -9
    at_death = network.round(but=victim)
    watcher = network.others[2]
    watcher.wait_for(lambda s: s["round"] >= at_death + 2, "two rounds without the dead", 40)
    check_files(victim)
    victim.start()
    back = victim.wait_for(lambda s: s["live_peers"] >= NODES - 1, "the rejoin", 60)
    met = network.round(but=victim)
    caught_up = victim.wait_for(lambda s: s["round"] >= met, "the present round", 40)
    assert network.round(but=victim) - caught_up["round"] <= CATCH_UP_ROUNDS
    assert back["refused"].keys() <= {"duplicate"}
    check_files(victim)
    if role == "newcomer":
        assert victim.stop() == 0
