"""The log on the disk: what was kept is there after any end, both sides of a contradiction, and what was cut is gone."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from node.scalar_store import ScalarStore
from node.store import History
from protocols.errors import LocalError
from protocols.scalar_terms import ScalarSettings, terms_of
from protocols.vocabulary import SIGNATURE_BYTES, STATE_ID_BYTES, Checkpoint, ModelRef, ScalarRecord

ME, OTHER = b"m" * 32, b"o" * 32
TERMS = terms_of(ScalarSettings(), b"b" * 32, ())


def record(round_: int, author: bytes = ME, codes: bytes = b"\x40") -> ScalarRecord:
    return ScalarRecord(author, round_, codes, bytes(STATE_ID_BYTES), bytes(SIGNATURE_BYTES))


def checkpoint(round_: int, what: bytes = b"x") -> Checkpoint:
    return Checkpoint(round_, what * 32, round_, ModelRef(what * 32, 100, round_, 1))


def test_records_come_back_by_round_and_author(tmp_path: Path) -> None:
    said = [record(2, OTHER), record(1, OTHER), record(2), record(1, codes=b"")]
    with ScalarStore(tmp_path, ME) as store:
        store.keep(said[:2])
        store.keep(said[2:])
        store.keep(said)  # a second time changes nothing
    with ScalarStore(tmp_path) as store:
        assert store.records() == (record(1, codes=b""), record(1, OTHER), record(2), record(2, OTHER))
        assert store.records(after=1) == (record(2), record(2, OTHER))
        assert store.records(after=2) == ()
        assert store.num_records() == 4
        assert store.cut == 0


def test_two_records_that_contradict_each_other_are_both_kept(tmp_path: Path) -> None:
    one, two = record(3, OTHER, b"\x01"), record(3, OTHER, b"\x02")
    with ScalarStore(tmp_path, ME) as store:
        store.keep([one])
        store.keep([two])
        assert set(store.records()) == {one, two}


def test_checkpoints_come_back_newest_first_and_the_whole_log_stays(tmp_path: Path) -> None:
    with ScalarStore(tmp_path, ME) as store:
        store.keep([record(number) for number in range(1, 11)])
        for number, cut in ((4, 0), (8, 4)):
            store.keep([], checkpoint(number), cut)
    with ScalarStore(tmp_path, ME) as store:
        assert store.checkpoints() == (checkpoint(8), checkpoint(4))
        assert len(store.records()) == 10
        assert store.cut == 0


def test_without_a_log_records_go_with_the_cut_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    with ScalarStore(tmp_path, ME, keep_log=False) as store:
        store.keep([record(number) for number in range(1, 11)])
        for number, cut in ((3, 0), (6, 3), (9, 6)):
            store.keep([], checkpoint(number), cut)
        assert [each.round for each in store.checkpoints()] == [9, 6], "to fall back to"
        assert [each.round for each in store.records()] == [7, 8, 9, 10]
        assert store.cut == 6


def test_records_are_counted_as_they_come_and_go(tmp_path: Path) -> None:
    with ScalarStore(tmp_path, ME, keep_log=False) as store:
        assert store.num_records() == 0
        store.keep([record(1), record(2), record(2, OTHER)])
        store.keep([record(2), record(3)])
        assert store.num_records() == 4
        store.keep([record(4)], checkpoint(3), 2)
        assert store.num_records() == 2
        assert ScalarStore(tmp_path).num_records() == 2


def test_a_state_that_was_taken_over_replaces_what_was_held_before_it(tmp_path: Path) -> None:
    with ScalarStore(tmp_path, ME) as store:
        store.keep([record(number) for number in range(1, 11)])
        store.keep([], checkpoint(4), 0)
        store.keep([], checkpoint(8, b"y"), 8)
        assert store.checkpoints() == (checkpoint(8, b"y"),)
        assert [each.round for each in store.records()] == [9, 10]
        assert store.cut == 8
        store.keep([], checkpoint(12, b"y"), 8)
        assert [each.round for each in store.checkpoints()] == [12, 8]


def test_a_round_that_is_sealed_otherwise_has_one_checkpoint(tmp_path: Path) -> None:
    with ScalarStore(tmp_path, ME) as store:
        for number in (4, 8, 12):
            store.keep([], checkpoint(number), 0)
        store.keep([], checkpoint(8, b"z"), 4)
        assert store.checkpoints() == (checkpoint(8, b"z"), checkpoint(4))


def test_what_was_kept_is_there_after_a_kill(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from node.scalar_store import ScalarStore
from tests.node.test_scalar_store import ME, checkpoint, record
store = ScalarStore(Path(sys.argv[1]), ME)
for number in range(1, 10**6):
    store.keep([record(number)], checkpoint(number) if number % 5 == 0 else None)
    print(number, flush=True)
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 60:
            break
    process.send_signal(signal.SIGKILL)
    told = [int(line), *(int(rest) for rest in process.stdout.read().split(b"\n")[:-1] if rest)]
    process.wait()
    process.stdout.close()
    with ScalarStore(tmp_path) as store:
        kept = [each.round for each in store.records()]
        assert kept[: told[-1]] == list(range(1, told[-1] + 1))
        assert store.checkpoints()[0].round >= told[-1] // 5 * 5


@pytest.mark.parametrize(
    ("records", "sealed", "wanted"),
    [
        ([record(1)], None, 2),
        ([record(1, OTHER)], None, 1),
        ([], checkpoint(1), 2),
        ([record(1, OTHER), record(1)], None, 2),
    ],
    ids=["own", "others", "checkpoint", "both"],
)
def test_own_records_and_checkpoints_are_synced(
    tmp_path: Path, records: list[ScalarRecord], sealed: Checkpoint | None, wanted: int
) -> None:
    with ScalarStore(tmp_path, ME) as store:
        store.keep(records, sealed)
        assert store._db.execute("PRAGMA synchronous").fetchone() == (wanted,)
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_it_shares_the_file_with_the_history(tmp_path: Path) -> None:
    history = History(tmp_path)
    with ScalarStore(tmp_path, ME) as store:
        store.keep([record(1)])
        assert history.rounds() == []
        assert ScalarStore(tmp_path).records() == (record(1),), "and with one that reads"
    history.close()


def test_a_disk_that_refuses_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScalarStore(tmp_path, ME) as store:
        store._db.execute("DROP TABLE scalar_records")
        with pytest.raises(
            LocalError, match=r"cannot be written .*no such table.* is the disk of .*covey\.db full"
        ):
            store.keep([record(1)])
        assert not store._db.in_transaction


def test_a_damaged_file_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "covey.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(LocalError, match=r"is damaged .*move it away"):
        ScalarStore(tmp_path)


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "covey.db").mkdir()
    with pytest.raises(LocalError, match="cannot be opened"):
        ScalarStore(tmp_path)


# --- the terms ------------------------------------------------------------------------------------------
def test_a_log_is_bound_to_its_terms(tmp_path: Path) -> None:
    with ScalarStore(tmp_path, ME) as store:
        assert store.terms() is None
        store.bind(TERMS)
    with ScalarStore(tmp_path, ME) as store:
        store.bind(TERMS)
        assert store.terms() == TERMS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": 0.5}, r"scalars.learning_rate 0.001 met 0.5"),
        ({"base": b"c" * 32}, "base models differ"),
        ({"generator": "other"}, "directions .* met 'other'"),
    ],
)
def test_other_terms_are_refused_with_what_differs_and_what_to_do(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    with ScalarStore(tmp_path, ME) as store:
        store.bind(TERMS)
        with pytest.raises(LocalError, match=f"{told}.*move covey.db and the folder checkpoints away"):
            store.bind(msgspec.structs.replace(TERMS, **change))


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    with ScalarStore(tmp_path, ME) as store:
        store.keep([record(1)])
        store.bind(TERMS)
    db = sqlite3.connect(tmp_path / "covey.db")
    with db:
        db.execute("UPDATE scalar_state SET terms = ?", (msgspec.msgpack.encode(["terms", 1]),))
        db.execute("UPDATE scalar_records SET data = ?", (msgspec.msgpack.encode([1, 2, 3]),))
    db.close()
    with ScalarStore(tmp_path, ME) as store:
        for question in (store.terms, store.records):
            with pytest.raises(LocalError, match="of another version of covey"):
                question()
