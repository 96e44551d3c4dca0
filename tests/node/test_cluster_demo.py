"""Real daemons as the demo starts them: they stop when told to, and what the demo counts about the one it killed."""

import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from node.cluster import Cluster, LocalNode, free_port, local_settings
from node.config import convert_config, load_config
from node.demo import print_summary, rounds_to_return, run_demo
from node.identity import load_key, peer_id_of
from node.store import newest_checkpoints, verify_checkpoint
from protocols.errors import ConfigError, LocalError


# --- what the demo counts -------------------------------------------------------------------------------
def record(at_s: float, accuracy: float) -> dict[str, Any]:
    return {"at_s": at_s, "metrics": {"accuracy": accuracy}}


OTHERS = [
    [record(1, 0.50), record(3, 0.80), record(5, 0.90)],
    [record(2, 0.60), record(4, 0.90), record(6, 0.94)],
]


@pytest.mark.parametrize(
    ("returned", "rounds"),
    [
        ([record(4.5, 0.85)], 1),  # the others stand at 0.80 and 0.90 then
        ([record(4.5, 0.84)], 1),
        ([record(4.5, 0.82)], None),
        ([record(4.5, 0.70), record(5.5, 0.70), record(6.5, 0.901)], 3),
        ([record(4.5, 0.70), record(4.6, 0.85), record(6.5, 0.10)], 2),
        ([record(2.5, 0.99), record(4.5, 0.85)], 2),  # what was before its restart is no return
        ([record(2.5, 0.99)], None),
        ([], None),
    ],
)
def test_a_node_is_back_once_it_is_close_to_where_the_others_were_then(
    returned: list[dict[str, Any]], rounds: int | None
) -> None:
    assert rounds_to_return(returned, OTHERS, since=3.0) == rounds


def test_others_without_a_record_yet_do_not_count() -> None:
    assert rounds_to_return([record(1.5, 0.49)], OTHERS, since=0.0) == 1
    assert rounds_to_return([record(0.5, 0.99)], OTHERS, since=0.0) is None
    assert rounds_to_return([record(9.0, 0.99)], [[], []], since=0.0) is None


@pytest.mark.parametrize(
    ("back", "sentence"), [(1, "1 round after"), (3, "3 rounds after"), (None, "at no time")]
)
def test_the_summary_says_how_the_killed_node_fared(back: int | None, sentence: str) -> None:
    console = Console(record=True, width=100)
    result = {
        "alone": [0.5, 0.7],
        "together": [0.9, 0.95],
        "bytes_per_node": [1_000_000, 2_500_000],
        "alone_mean": 0.6,
        "together_mean": 0.925,
        "killed_and_back": back,
        "rounds": 80,
        "wall_s": 12.5,
    }
    print_summary(result, console)
    text = console.export_text()
    assert sentence in text
    assert "0.600" in text
    assert "0.925" in text
    assert "2.50 MB" in text


def test_a_demo_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "node-0").mkdir()
    with pytest.raises(LocalError, match="holds an earlier demo"):
        run_demo(2, 10, 1, tmp_path, Console(quiet=True))


# --- homes ----------------------------------------------------------------------------------------------
def test_local_settings_are_a_config_and_what_is_given_goes_on_top() -> None:
    config = convert_config(local_settings())
    assert config.network.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert config.network.heartbeat_s == 1.0
    tables = local_settings(network={"heartbeat_s": 0.5}, training={"local_steps": 3})
    config = convert_config(tables)
    assert (config.network.heartbeat_s, config.network.dead_after_s) == (0.5, 5.0)
    assert config.training.local_steps == 3


def test_one_nodes_settings_do_not_change_anothers() -> None:
    local_settings(network={"heartbeat_s": 0.5})["network"]["name"] = "changed"
    assert local_settings()["network"].get("name") is None


def test_a_local_node_makes_its_home_and_keeps_its_key(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "node", local_settings(network={"name": "net"}))
    assert load_config(node.home, {}) == node.config
    assert peer_id_of(load_key(node.home / "identity.pem")) == node.peer
    assert LocalNode(tmp_path / "node", local_settings()).peer == node.peer
    assert (node.running, node.pid, node.log(), node.rounds(), node.status()) == (False, None, "", [], None)
    assert node.stop() == 0


def test_wrong_settings_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"network\.heartbeat: no such setting"):
        LocalNode(tmp_path / "node", local_settings(network={"heartbeat": 1}))


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "node", local_settings())
    (node.home / "rounds.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 2}\n{"ro')
    assert node.rounds() == [{"round": 1}, {"round": 2}]


# --- daemons --------------------------------------------------------------------------------------------
LEARNING = local_settings(
    learning={"pause_s": 0.05},
    training={"local_steps": 2},
    task={"name": "digits", "options": {"hidden": [8]}},
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LocalNode]:
    """A daemon that has learned a few rounds."""
    with Cluster() as cluster:
        node = cluster.add(tmp_path / "node", LEARNING)
        node.start()
        node.wait_for(lambda status: status["round"] >= 3, "three rounds")
        yield node


@pytest.mark.daemons
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_stops_a_daemon_within_5_seconds_and_nothing_is_lost(
    node: LocalNode, number: signal.Signals
) -> None:
    began = time.monotonic()
    assert node._end(number) == 0
    assert time.monotonic() - began < 5
    assert not node.running
    assert "Traceback" not in node.log()
    assert not (node.home / "api.json").exists()
    rounds = [row["round"] for row in node.rounds()]
    assert rounds == list(range(len(rounds)))
    newest, _ = verify_checkpoint(newest_checkpoints(node.home)[0])
    # A round whose evaluation the signal cut short is kept, and has no record.
    assert newest.round - rounds[-1] in (1, 2), "the model after the last finished round"
    with sqlite3.connect(node.home / "covey.db") as database:
        (stored,) = database.execute("SELECT count(*) FROM rounds").fetchone()
    database.close()
    assert stored == len(rounds)


@pytest.mark.daemons
def test_a_killed_daemon_goes_on_from_its_checkpoint(node: LocalNode) -> None:
    node.kill()
    assert not node.running
    assert (node.home / "api.json").exists(), "it had no time to clean up"
    kept, _ = verify_checkpoint(newest_checkpoints(node.home)[0])
    before = len(node.rounds())
    assert kept.round >= before - 3, "the disk keeps up, but for a round or two"
    node.start()
    status = node.wait_for(lambda status: status["round"] > kept.round, "another round")
    assert status["peer"] == node.peer
    assert node.rounds()[before]["round"] == kept.round
    assert node.metric("covey_round") >= kept.round
    assert node.stop() == 0


@pytest.mark.daemons
def test_a_second_daemon_in_one_home_is_refused_and_the_first_stays(node: LocalNode) -> None:
    other = LocalNode(node.home, LEARNING)
    other.start()
    assert other._process is not None
    assert other._process.wait(timeout=60) == 1
    assert f"in use by another covey daemon (process {node.pid})" in node.log()
    assert node.running


@pytest.mark.daemons
def test_waiting_for_a_daemon_that_ends_tells_its_last_words(tmp_path: Path) -> None:
    with Cluster() as cluster:
        node = cluster.add(tmp_path / "node", local_settings(task={"name": "csv"}))
        node.start()
        with pytest.raises(
            LocalError, match=r"ended while waiting for answer:\n(.|\n)*task\.options\.path: missing"
        ):
            node.wait_until_up()
        assert node.stop() == 2


@pytest.mark.daemons
def test_a_cluster_ends_its_daemons_when_the_test_fails(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "node", local_settings(learning={"protocol": "none"}))

    def fail_with_a_daemon_up() -> None:
        with Cluster([node]):
            node.start()
            node.wait_until_up()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_a_daemon_up()
    assert not node.running


def test_a_free_port_can_be_listened_on() -> None:
    assert 1024 < free_port() <= 65_535
