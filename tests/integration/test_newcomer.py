"""Real daemons: who comes late, or back after an absence, has the network's model before others hear of its own.

Run as `python -m tests.integration.test_newcomer run --home HOME` this is a `covey` that sends damaged bytes of every model
once HOME/lie is there: good names, good hashes, and nothing of what they promise.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from node.cli import main
from node.cluster import NODE, Cluster, LocalNode, local_settings
from node.store import Blob

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(180)]

LIE = "lie"
LIAR = (sys.executable, "-m", "tests.integration.test_newcomer")
AHEAD = 12
"""Rounds that the network has done before anybody comes."""
COUNT = 4


def settings(index: int, bootstrap: list[str], **learning: Any) -> dict[str, Any]:
    return local_settings(
        network={"bootstrap": bootstrap, "mdns": False, "dht": False},
        learning={"pause_s": 0.3, "deadline_s": 2.0, "catch_up_after": 6, **learning},
        training={"local_steps": 2, "learning_rate": 0.05},
        task={"name": "digits", "shard": {"index": index, "count": COUNT, "seed": 1}},
    )


def start_all(cluster: Cluster, folder: Path, *programs: tuple[str, ...]) -> list[str]:
    """One daemon a program, all linked and so many rounds on; their addresses."""
    addresses: list[str] = []
    for index, program in enumerate(programs):
        node = cluster.add(folder / str(index), settings(index, addresses[:]), program)
        node.start()
        node.wait_until_up()
        addresses.append(node.address())
    for node in cluster.nodes:
        node.wait_for(
            lambda s: s["round"] >= AHEAD and s["live_peers"] == len(programs) - 1, "learning together"
        )
    return addresses


def caught_up(node: LocalNode) -> dict[str, float]:
    """What the node says of its catching up, once it has."""
    node.wait_for(lambda status: "caught up" in node.log(), "catching up")
    (line,) = [line for line in node.log().splitlines() if "caught up" in line]
    fields = re.findall(r"(round|from_round|models|seconds)=([\d.]+)", re.sub(r"\x1b\[\d*m", "", line))
    return {name: float(value) for name, value in fields}


def test_a_newcomer_catches_up_before_it_contributes_though_a_neighbour_lies(tmp_path: Path) -> None:
    with Cluster() as cluster:
        addresses = start_all(cluster, tmp_path, NODE, NODE, LIAR)
        honest, liar = cluster.nodes[:2], cluster.nodes[2]
        (liar.home / LIE).touch()
        before = [len(node.rounds()) for node in honest]
        newcomer = cluster.add(tmp_path / "new", settings(3, addresses, wait_for_peers=1))
        newcomer.start()
        said = caught_up(newcomer)
        assert said["from_round"] == 0
        assert said["round"] >= AHEAD - 1
        assert said["models"] >= 1
        newcomer.wait_for(lambda s: s["merged"] >= 1, "a merge of its own")
        assert newcomer.rounds()[0]["round"] >= said["round"], "it trained nothing before"
        for node, count in zip(honest, before, strict=True):
            node.wait_for(lambda s: len(node.rounds()) >= count + 3, "going on")  # noqa: B023
            assert max(row["staleness_max"] for row in node.rounds()[count:]) < AHEAD - 1
        status = newcomer.wait_for(lambda s: "wrong_hash" in s["refused"], "a lie")
        assert set(status["refused"]) == {"wrong_hash"}
        assert all(node.running for node in cluster.nodes)


def test_a_node_back_after_an_absence_merges_its_own_with_the_others(tmp_path: Path) -> None:
    with Cluster() as cluster:
        addresses = start_all(cluster, tmp_path, NODE, NODE)
        away = LocalNode(tmp_path / "away", settings(3, addresses, catch_up="merge"))
        cluster.nodes.append(away)
        away.start()
        left_at = away.wait_for(lambda s: s["merged"] == 2, "a merge with both")["round"]
        assert away.stop() == 0
        num_rounds = len(away.rounds())
        cluster.nodes[0].wait_for(lambda s: s["round"] >= left_at + AHEAD, "the others going on")
        (away.home / "daemon.log").unlink()
        away.start()
        said = caught_up(away)
        assert said["from_round"] >= left_at
        assert said["round"] >= left_at + AHEAD - 1
        assert said["models"] >= 1
        away.wait_for(lambda s: s["merged"] == 2 and s["round"] > said["round"], "a round with both")
        alone = [row for row in away.rounds()[num_rounds:] if row["round"] < said["round"]]
        assert all(row["num_merged"] == 0 for row in alone), "it trained before it was linked, for nobody"


def lie(home: Path) -> None:
    """Damage what this process sends, once it is told to."""
    read = Blob.read

    def reading(self: Blob, index: int) -> bytes:
        data = read(self, index)
        return bytes(len(data)) if (home / LIE).exists() else data

    Blob.read = reading  # type: ignore[method-assign]


if __name__ == "__main__":
    lie(Path(sys.argv[sys.argv.index("--home") + 1]))
    main()
