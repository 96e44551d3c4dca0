"""Join in a minute: on a clean home one command, against a network of real daemons, up to the first merged round."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.api import call
from node.cluster import NODE, Cluster, LocalNode, free_port, local_settings

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(240)]

JOIN_S = 60.0
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is this machine's business and not the network's: a free port, and nobody else asked."""
    for name in [name for name in os.environ if name.startswith("COVEY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COVEY_NETWORK__LISTEN", "['/ip4/127.0.0.1/tcp/0']")
    monkeypatch.setenv("COVEY_NETWORK__MDNS", "false")
    monkeypatch.setenv("COVEY_NETWORK__DHT", "false")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


def covey(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*NODE, *words], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def merged(node: LocalNode) -> bool:
    return any(row.get("num_merged", 0) > 0 for row in node.rounds())


GOSSIP = ("learning.pause_s=0.3", "learning.deadline_s=5")
SAMPLED = ("sampled.sample_size=2", "sampled.pause_s=0.3", "sampled.ping_s=1", "sampled.wait_for_members=2")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ((), GOSSIP),
        (("--private", "--psk"), GOSSIP),
        (("--private", "--protocol", "sampled"), SAMPLED),
    ],
    ids=["open gossip", "private gossip with a secret", "private sampled"],
)
def test_a_clean_home_joins_a_running_network_within_a_minute(
    cluster: Cluster, tmp_path: Path, kind: tuple[str, ...], settings: tuple[str, ...]
) -> None:
    alice = cluster.add(tmp_path / "alice", None)
    covey(tmp_path, "network", "new", "--home", "alice", *kind, *(w for s in settings for w in ("--set", s)))
    alice.start()
    alice.wait_until_up()
    link = covey(tmp_path, "invite", "--home", "alice").stdout.strip()
    bob, carol = (cluster.add(tmp_path / name, None) for name in ("bob", "carol"))
    bob.start("join", link, "--yes")
    bob.wait_for(lambda s: s["live_peers"] == 1 and merged(alice), "a network of two that learns")

    began_at = time.monotonic()
    carol.start("join", link, "--yes")
    carol.wait_for(lambda s: merged(carol), "the first merged round", JOIN_S)
    took_s = time.monotonic() - began_at
    print(f"\njoined in {took_s:.1f} s", file=sys.stderr)
    assert took_s < JOIN_S
    status = carol.status()
    assert status is not None
    assert status["refused"] == {}

    def measured(_: object) -> bool:
        rows = [row for row in call(carol.home, "/peers") if row["state"] == "live"]
        return any(row["latency_ms"] and row["bytes_sent"] and row["bytes_received"] for row in rows)

    carol.wait_for(measured, "latency and bytes of a peer")
    shown = covey(tmp_path, "peers", "--home", "carol").stdout
    assert re.search(r"live.*, round \d+, \d+\.\d ms, [\d.]+ k?B sent, [\d.]+ k?B received", shown), shown
    assert "this month" in covey(tmp_path, "status", "--home", "carol").stdout
    assert carol.stop() == 0


def test_a_bootstrap_peer_that_cannot_be_reached_is_told_of_soon_and_again_until_it_is(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVEY_NETWORK__LISTEN")
    listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    door = cluster.add(tmp_path / "door", local_settings(network={"listen": [listen]}))
    address = f"{listen}/p2p/{door.peer}"
    node = cluster.add(tmp_path / "node", local_settings(network={"bootstrap": [address]}))
    node.start()
    began_at = time.monotonic()
    node.wait_for(lambda s: "no link to anybody" in node.log(), "word of it")
    assert time.monotonic() - began_at < 30, "and most of it was the start"
    first = node.log().split("no link to anybody")[1]
    assert address in first
    assert "Connection refused" in first
    assert f"covey doctor --home {node.home}" in first
    node.wait_for(lambda s: node.log().count("no link to anybody") >= 2, "a second word")
    told_s = [int(seconds) for seconds in re.findall(r"for_s=(\d+)", node.log())]
    assert told_s[:2] == [3, 9]
    door.start()
    node.wait_for(lambda s: s["live_peers"] == 1, "the link")
    assert "link up" in node.log()


# --- the README's transcript ----------------------------------------------------------------------------
def transcript() -> list[tuple[str, list[str]]]:
    """The commands of the README's section on joining, each with what it shows for it."""
    section = README.read_text(encoding="utf-8").split("\n## Join a network\n", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(r"^```console\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


MASKS = [
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "<time>"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "<date>"),
    (r"/ip4/[\d.]+/tcp/\d+", "<address>"),
    (r"12D3KooW\w{44}", "<peer>"),
    (r"\b[0-9a-f]{64}\b|\b[0-9a-f]{16}\b", "<digits>"),
    (r"\d+(\.\d+)?", "<number>"),
    (r" +", " "),
]


def masked(text: str) -> list[str]:
    """Lines without what differs from run to run."""
    for pattern, name in MASKS:
        text = re.sub(pattern, name, text)
    return [line.strip() for line in text.splitlines()]


def is_log(line: str) -> bool:
    return line.startswith("<time>")


def test_the_transcript_of_the_readme_is_what_is_printed(cluster: Cluster, tmp_path: Path) -> None:
    shown = transcript()
    assert [shlex.split(command)[1] for command, _ in shown] == ["network", "run", "invite", "join"]
    for command, lines in shown:
        words = shlex.split(command)[1:]
        wanted = masked("\n".join(lines))
        home = tmp_path / words[words.index("--home") + 1]
        if words[-1] == "&":
            node = cluster.add(home, None)
            node.start()
            node.wait_until_up()
        elif words[0] == "join":
            words[1] = str(tmp_path / words[1])
            node = cluster.add(home, None)
            node.start(*words[: words.index("--home")], "--yes")
            node.wait_for(lambda s, node=node: merged(node), "the first merged round", JOIN_S)  # type: ignore[misc]
            printed = masked(node.log().replace(f"{tmp_path}/", ""))
            assert [x for x in wanted if not is_log(x)] == [x for x in printed if not is_log(x)]
            assert {x for x in wanted if is_log(x)} <= set(printed)
        else:
            output, _, target = command.partition(" > ")
            done = covey(tmp_path, *shlex.split(output)[1:])
            if target:
                (tmp_path / target).write_text(done.stdout)
            assert wanted == masked(done.stderr if target else done.stdout)
