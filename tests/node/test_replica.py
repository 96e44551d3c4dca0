"""From a home to a replica and back: a log that leads to its checkpoints is verified, one that does not says where."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.config import Config, convert_config
from node.daemon import ScalarLearner
from node.replica import check_member, describe_stopped, verify_log
from node.scalar_store import ScalarStore
from node.signatures import peer_of_author
from node.store import newest_checkpoints
from protocols.errors import ConfigError, LocalError
from tests.node.scalar_home import CONFIG, EVERY, PEERS, SIGNATURES, Home, configure


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("whole") / "home")


@pytest.fixture
def home(whole: Home, tmp_path: Path) -> Home:
    """A copy to spoil."""
    copy = object.__new__(Home)
    copy.__dict__.update(whole.__dict__)
    copy.home = tmp_path / "home"
    shutil.copytree(whole.home, copy.home)
    return copy


def verify(home: Home, config: Config = CONFIG) -> Any:
    return verify_log(config, home.home, lambda done, of: None)


# --- verifying ------------------------------------------------------------------------------------------
def test_a_log_that_leads_to_its_checkpoints_is_right(home: Home) -> None:
    told: list[tuple[int, int]] = []
    found = verify_log(CONFIG, home.home, lambda done, of: told.append((done, of)))
    assert found.ok, found.problem
    assert (found.started_at, found.round, found.num_records, found.num_checkpoints) == (0, 10, 20, 2)
    assert found.log == home.log.chain(10).hex()
    assert told[-1] == (20, 20)
    assert found == verify(home), "and again"


def test_a_node_without_a_checkpoint_is_verified_too(tmp_path: Path) -> None:
    config = configure(checkpoint_every=20)
    home = Home(tmp_path / "home", config)
    home.edit("DELETE FROM scalar_checkpoints")
    found = verify(home, config)
    assert found.ok
    assert (found.num_checkpoints, found.round) == (0, 10)


@pytest.mark.parametrize(
    ("spoil", "round_", "problem"),
    [
        (
            lambda home: home.edit("DELETE FROM scalar_records WHERE round = 6"),
            8,
            "are not those of the checkpoint",
        ),
        (lambda home: home.edit("DELETE FROM scalar_records WHERE round = 2"), 4, "6 count, 8 did"),
        (lambda home: forge(home, 7), 7, f"the signature of {PEERS[1]} is wrong"),
        (lambda home: other_state(home, 4), 4, "the log leads to another state"),
        (lambda home: flip(newest_checkpoints(home.home)[0]), 8, "is damaged"),
    ],
    ids=["a round gone", "the first gone", "forged", "another state", "a damaged file"],
)
def test_what_does_not_fit_is_told_with_its_round(
    home: Home, spoil: Callable[[Home], None], round_: int, problem: str
) -> None:
    spoil(home)
    found = verify(home)
    assert not found.ok
    assert found.differs_at == round_
    assert found.problem.startswith(f"round {round_}: ")
    assert problem in found.problem


def forge(home: Home, number: int) -> None:
    wrong = msgspec.structs.replace(home.record(number, 1), codes=b"\x01")
    home.edit(
        "UPDATE scalar_records SET data = ? WHERE round = ? AND author = ?",
        msgspec.msgpack.encode(wrong),
        number,
        SIGNATURES[1].author,
    )


def other_state(home: Home, number: int) -> None:
    with ScalarStore(home.home) as store:
        (found,) = [each for each in store.checkpoints() if each.round == number]
    ref = msgspec.structs.replace(found.ref, digest=bytes(32))
    data = msgspec.msgpack.encode(msgspec.structs.replace(found, ref=ref))
    home.edit("UPDATE scalar_checkpoints SET data = ? WHERE round = ?", data, number)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_contradiction_counts_for_nothing_and_is_verified(home: Home, whole: Home) -> None:
    with ScalarStore(home.home) as store:
        store.keep([home.record(10, 1, b"\x01")])
    found = verify(home)
    assert found.ok
    assert found.num_records == 21
    assert found.state != verify(whole).state
    assert describe_stopped(home.home)["void"] == 1


def test_what_is_said_after_the_last_round_is_not_replayed(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", configure(rounds=9, schedule="linear"))
    found = verify(home, home.config)
    assert found.ok
    assert (found.round, found.num_records) == (9, 20)
    data = describe_stopped(home.home)
    assert (data["round"], data["log"]) == (9, found.log)
    assert set(data["authors"].values()) == {9}


def test_a_log_that_was_cut_is_verified_from_the_first_checkpoint_that_is_there(
    tmp_path: Path, whole: Home
) -> None:
    home = Home(tmp_path / "home", configure(keep_log=False))
    found = verify(home, home.config)
    assert found.ok, found.problem
    assert (found.started_at, found.num_checkpoints, found.round) == (4, 2, 10)
    assert found.num_records == 12
    assert (found.log, found.state) == (verify(whole).log, verify(whole).state)


def test_a_cut_log_without_a_whole_checkpoint_says_that_there_is_nothing_to_begin_with(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path / "home", configure(keep_log=False))
    for path in newest_checkpoints(home.home):
        flip(path)
    with pytest.raises(LocalError, match=r"rounds 1 to 4 are gone.*nothing to begin with"):
        verify(home, home.config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"scalars": {"learning_rate": 0.01, "checkpoint_every": EVERY}},
            "scalars.learning_rate 0.001 met 0.01",
        ),
        ({"task": {"name": "digits", "options": {"hidden": []}, "seed": 4}}, "base models differ"),
    ],
)
def test_a_config_that_is_not_the_logs_is_told(home: Home, change: dict[str, Any], told: str) -> None:
    config = convert_config({**msgspec.to_builtins(CONFIG), **change})
    with pytest.raises(LocalError, match=f"{told}.*give `verify` what `run` was"):
        verify(home, config)


@pytest.mark.parametrize(
    "question", [lambda home: verify_log(CONFIG, home, lambda *_: None), describe_stopped]
)
def test_a_home_without_a_log_says_so(tmp_path: Path, question: Callable[[Path], object]) -> None:
    with pytest.raises(LocalError, match="no log of scalars"):
        question(tmp_path)
    ScalarStore(tmp_path).close()
    with pytest.raises(LocalError, match="no log of scalars"):
        question(tmp_path)


# --- the log at a glance --------------------------------------------------------------------------------
def test_a_stopped_nodes_log_is_told_from_its_disk(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", skip=frozenset({5, 9}))
    data = describe_stopped(home.home)
    (_, newest) = sorted(newest_checkpoints(home.home))
    assert data == {
        "running": False,
        "round": 10,
        "log": home.log.chain(10).hex(),
        "records": 2,
        "void": 0,
        "cut": 8,
        "sealed": {
            "round": 8,
            "records": 14,
            "log": home.log.chain(8).hex(),
            "digest": newest.stem.split("-")[2],
        },
        "proposed": None,
        "authors": dict.fromkeys(sorted(PEERS, key=lambda peer: SIGNATURES[PEERS.index(peer)].author), 10),
        "missing": [[9, 9]],
        "counts": {},
        "on_disk": {"records": 16, "cut": 0},
    }


# --- beginning again ------------------------------------------------------------------------------------
def begin(home: Home) -> tuple[Any, list[str], ScalarLearner]:
    told: list[str] = []
    learner = ScalarLearner(home.config, home.home, PEERS[0], SIGNATURES[0].author)
    assert learner.scalars is not None
    try:
        return learner.begin(told.append), told, learner
    finally:
        learner.scalars.close()


def test_a_node_begins_at_its_newest_checkpoint_with_what_came_after(home: Home) -> None:
    found, told, learner = begin(home)
    assert told == []
    assert found.checkpoint.round == 8
    assert [record.round for record in found.records] == [9, 9, 10, 10]
    assert found.ref.digest == home.replica.base
    assert learner.store.get(found.checkpoint.ref.digest) is not None, "to be served, and read"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(home: Home) -> None:
    flip(newest_checkpoints(home.home)[0])
    found, told, _ = begin(home)
    assert found.checkpoint.round == 4
    assert [record.round for record in found.records] == [number for number in range(5, 11) for _ in PEERS]
    assert "is damaged" in told[0]


def test_without_any_checkpoint_the_log_is_replayed_from_the_base(home: Home) -> None:
    shutil.rmtree(home.home / "checkpoints")
    found, told, _ = begin(home)
    assert found.checkpoint is None
    assert len(found.records) == 20
    assert len(told) == 2


def test_a_cut_log_without_a_checkpoint_keeps_only_what_the_node_itself_signed(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", configure(keep_log=False))
    shutil.rmtree(home.home / "checkpoints")
    found, told, _ = begin(home)
    assert found.checkpoint is None
    assert {peer_of_author(record.author) for record in found.records} == {PEERS[0]}
    assert "has to come from neighbours" in told[-1]


def test_checkpoints_of_no_log_are_set_aside_and_of_another_model_refused(home: Home) -> None:
    stray = newest_checkpoints(home.home)[0]
    stray.rename(stray.with_name(f"0000000999-1-{'ab' * 32}.safetensors"))
    found, told, _ = begin(home)
    assert "belongs to no log; it is set aside" in told[0]
    assert found.checkpoint.round == 4
    (home.home / "checkpoints" / f"0000000999-1-{'cd' * 32}.safetensors").write_bytes(b"of gossip, say")
    with pytest.raises(LocalError, match="are of another model"):
        begin(home)


def test_other_terms_than_the_logs_are_refused_at_the_start(home: Home) -> None:
    home.config = configure(rounds=100)
    with pytest.raises(LocalError, match=r"under other terms: scalars.rounds 0 met 100"):
        begin(home)


def test_a_node_that_is_no_member_is_told_at_the_start(home: Home) -> None:
    home.config = configure(members=[PEERS[1]])
    with pytest.raises(ConfigError, match=f"nobody would take its scalars.*with '{PEERS[0]}'") as caught:
        begin(home)
    assert caught.value.path == "scalars.members"
    check_member(configure(members=PEERS), PEERS[0])
    check_member(CONFIG, PEERS[0])
