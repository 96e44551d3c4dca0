"""What survives on the disk: blobs on their way in, checkpoints through any crash, one daemon per home."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from node import store as store_module
from node.store import (
    MAX_STORED_PEERS,
    NUM_CHECKPOINTS,
    BlobStore,
    History,
    HomeLock,
    Incoming,
    hash_pieces,
    newest_checkpoints,
    parse_checkpoint_name,
    verify_checkpoint,
)
from protocols.blob import chunks_of, hash_blob
from protocols.errors import LocalError, PeerError
from protocols.events import RoundDone
from protocols.messages import FetchHeader
from protocols.vocabulary import CHUNK_BYTES, ModelRef, PeerId, PeerRecord, Reason

LARGE = random.Random(1).randbytes(2 * CHUNK_BYTES + 5)


def accept_all(path: Path) -> None:
    assert path.is_file()


def make_store(home: Path, check: Callable[[Path], None] = accept_all) -> BlobStore:
    return BlobStore(home, check)


def ref_of(data: bytes, round_: int = 1) -> ModelRef:
    digest, _ = hash_blob(data)
    return ModelRef(digest, len(data), round_, 10)


def write_chunks(incoming: Incoming, data: bytes, first: int = 0, last: int = 99) -> None:
    """Chunks `first` to `last - 1` of `data`, as a fetch brings them."""
    _, hashes = hash_blob(data)
    incoming.prove(FetchHeader(len(data), hashes))
    for index, chunk in list(enumerate(chunks_of(data)))[first:last]:
        incoming.write(index, bytes(chunk))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- blobs ----------------------------------------------------------------------------------------------
def test_a_saved_blob_is_read_back_chunk_by_chunk(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    ref = store.save(LARGE, 7, 30)
    digest, hashes = hash_blob(LARGE)
    assert ref == ModelRef(digest, len(LARGE), 7, 30)
    blob = store.get(ref.digest)
    assert blob is not None
    assert (blob.size_bytes, blob.chunk_hashes) == (len(LARGE), hashes)
    assert [len(blob.read(index)) for index in range(3)] == [CHUNK_BYTES, CHUNK_BYTES, 5]
    assert b"".join(blob.read(index) for index in range(3)) == LARGE
    assert store.path(ref).read_bytes() == LARGE
    assert store.size_bytes() == len(LARGE)


def test_a_forgotten_blob_is_gone_from_the_disk_too(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    ref = store.save(b"model", 1, 1)
    store.forget(ref.digest)
    store.forget(ref.digest)
    assert store.get(ref.digest) is None
    assert names(tmp_path / "models") == set()
    with pytest.raises(LocalError, match="is not held"):
        store.path(ref)


def test_models_of_an_earlier_run_are_cleared_at_the_start(tmp_path: Path) -> None:
    make_store(tmp_path).save(b"model", 1, 1)
    assert make_store(tmp_path).size_bytes() == 0


def test_an_incoming_blob_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    store, ref = make_store(tmp_path), ref_of(LARGE)
    write_chunks(store.incoming(ref), LARGE, last=2)
    again = store.incoming(ref)
    assert (again.missing, again.complete) == ([2], False)
    assert store.get(ref.digest) is None, "half a blob is not served"
    write_chunks(again, LARGE, first=2)
    assert again.complete
    store.admit(again)
    assert store.path(ref).read_bytes() == LARGE
    assert names(tmp_path / "models") == {f"{ref.digest.hex()}.safetensors"}
    assert not store.incoming(ref).held, "nothing of it is under way any more"


def test_chunks_may_come_in_any_order_and_twice(tmp_path: Path) -> None:
    store, ref = make_store(tmp_path), ref_of(LARGE)
    incoming = store.incoming(ref)
    for index in (2, 0, 2):
        write_chunks(incoming, LARGE, first=index, last=index + 1)
    assert (incoming.missing, incoming.complete) == ([1], False)
    assert incoming.path.stat().st_size == len(LARGE)
    write_chunks(incoming, LARGE, first=1, last=2)
    store.admit(incoming)
    assert store.path(ref).read_bytes() == LARGE


def test_a_header_of_another_blob_proves_nothing(tmp_path: Path) -> None:
    incoming = make_store(tmp_path).incoming(ref_of(LARGE))
    for data, reason in ((LARGE[:-1], Reason.WRONG_SIZE), (b"x" * len(LARGE), Reason.WRONG_HASH)):
        with pytest.raises(PeerError) as caught:
            incoming.prove(FetchHeader(len(data), hash_blob(data)[1]))
        assert caught.value.reason is reason
    assert incoming.chunk_hashes == ()


def test_a_bad_chunk_writes_nothing(tmp_path: Path) -> None:
    store, ref = make_store(tmp_path), ref_of(LARGE)
    incoming = store.incoming(ref)
    incoming.prove(FetchHeader(len(LARGE), hash_blob(LARGE)[1]))
    with pytest.raises(PeerError) as caught:
        incoming.write(0, b"\0" * CHUNK_BYTES)
    assert caught.value.reason is Reason.WRONG_HASH
    assert (incoming.held, incoming.path.exists()) == (set(), False)
    write_chunks(incoming, LARGE, last=1)
    with pytest.raises(PeerError):
        incoming.write(1, b"\0" * CHUNK_BYTES)
    assert (incoming.held, incoming.path.stat().st_size) == ({0}, CHUNK_BYTES)
    write_chunks(incoming, LARGE, first=1)
    assert incoming.path.read_bytes() == LARGE


def test_what_the_gate_refuses_is_removed_and_may_be_sent_again(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise PeerError(Reason.NON_FINITE, "NaN")

    store, ref = make_store(tmp_path, refuse), ref_of(LARGE)
    incoming = store.incoming(ref)
    write_chunks(incoming, LARGE)
    with pytest.raises(PeerError) as caught:
        store.admit(incoming)
    assert caught.value.reason is Reason.NON_FINITE
    assert store.get(ref.digest) is None
    assert names(tmp_path / "models") == set()
    assert not store.incoming(ref).held


def test_the_gate_sees_the_whole_file_before_it_has_a_name(tmp_path: Path) -> None:
    seen: list[bytes] = []
    ref = ref_of(LARGE)

    def look(path: Path) -> None:
        seen.append(path.read_bytes())
        assert store.get(ref.digest) is None

    store = make_store(tmp_path, look)
    incoming = store.incoming(ref)
    write_chunks(incoming, LARGE)
    store.admit(incoming)
    assert seen == [LARGE]


def test_a_half_blob_can_be_forgotten(tmp_path: Path) -> None:
    store, ref = make_store(tmp_path), ref_of(LARGE)
    write_chunks(store.incoming(ref), LARGE, last=1)
    store.forget(ref.digest)
    assert store.size_bytes() == 0
    assert not store.incoming(ref).held


def test_a_lie_about_the_size_does_not_spoil_the_next_peers_try(tmp_path: Path) -> None:
    store, ref = make_store(tmp_path), ref_of(LARGE)
    lie = ModelRef(ref.digest, 10, 1, 10)
    assert store.incoming(lie).ref == lie
    honest = store.incoming(ref)
    assert honest.ref == ref
    write_chunks(honest, LARGE, last=1)
    assert store.incoming(lie) is honest, "a header has proved the size"


def test_a_fetch_under_way_is_not_replaced(tmp_path: Path) -> None:
    store, ref = make_store(tmp_path), ref_of(LARGE)
    lie = store.incoming(ModelRef(ref.digest, 10, 1, 10))
    lie.busy = True
    assert store.incoming(ref) is lie


# --- checkpoints ----------------------------------------------------------------------------------------
def keep(store: BlobStore, data: bytes, round_: int) -> Path:
    return store.keep(store.save(data, round_, 10))


def restored(home: Path, check: Callable[[Path], None] = accept_all) -> tuple[bytes | None, list[str]]:
    """What a new process finds: the restored model's bytes, and the warnings."""
    warnings: list[str] = []
    store = make_store(home, check)
    ref = store.restore(warnings.append)
    if ref is None:
        return None, warnings
    blob = store.get(ref.digest)
    assert blob is not None
    assert hash_blob(blob.path.read_bytes()) == (ref.digest, blob.chunk_hashes)
    return blob.path.read_bytes(), warnings


def test_a_kept_model_is_restored_with_its_round_and_samples(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    ref = store.save(LARGE, 12, 345)
    path = store.keep(ref)
    store.forget(ref.digest)
    assert path.read_bytes() == LARGE, "forgetting the model leaves the checkpoint"
    assert parse_checkpoint_name(path) == (12, 345, ref.digest)
    assert verify_checkpoint(path)[0] == ref
    assert make_store(tmp_path).restore(pytest.fail) == ref
    assert restored(tmp_path) == (LARGE, [])


def test_a_home_without_checkpoints_restores_nothing(tmp_path: Path) -> None:
    assert restored(tmp_path) == (None, [])


def test_a_model_that_is_not_held_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="is not held"):
        make_store(tmp_path).keep(ref_of(b"never seen"))


def test_the_newest_three_checkpoints_stay(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for round_ in (1, 2, 9, 10, 11):
        keep(store, f"model {round_}".encode(), round_)
    rounds = [parse_checkpoint_name(path)[0] for path in newest_checkpoints(tmp_path)]
    assert rounds == [11, 10, 9]
    assert len(rounds) == NUM_CHECKPOINTS


def test_keeping_one_model_twice_leaves_one_checkpoint(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    ref = store.save(b"model", 1, 10)
    assert store.keep(ref) == store.keep(ref)
    assert len(newest_checkpoints(tmp_path)) == 1
    assert restored(tmp_path) == (b"model", [])


def test_a_restored_model_can_be_kept_again(tmp_path: Path) -> None:
    keep(make_store(tmp_path), b"model", 4)
    store = make_store(tmp_path)
    ref = store.restore(pytest.fail)
    assert ref is not None
    store.keep(ref)
    assert restored(tmp_path) == (b"model", [])


def test_a_file_system_without_hard_links_gets_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    keep(make_store(tmp_path), LARGE, 1)
    assert restored(tmp_path) == (LARGE, [])


def test_the_file_is_synced_before_its_name_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append(f"rename {self.name}")
        return real_replace(self, target)

    store = make_store(tmp_path)
    ref = store.save(b"model", 1, 10)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    store.keep(ref)
    assert steps == ["sync draft", "rename draft", "sync checkpoints"]


class PowerCut(BaseException):
    """Nothing in the code under test may catch it: the machine is off."""


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (os, "link", 1),
        (os, "fsync", 1),
        (Path, "replace", 1),
        (os, "fsync", 2),
        (Path, "unlink", 2),
    ],
    ids=["before the link", "before the file's sync", "before the name", "before the directory's", "last"],
)
def test_a_crash_at_any_step_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int
) -> None:
    store = make_store(tmp_path)
    for round_ in range(NUM_CHECKPOINTS):
        keep(store, b"old" * (round_ + 1), round_)
    ref = store.save(b"new", 9, 10)
    calls = 0
    real = getattr(owner, name)

    def cut(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise PowerCut
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(PowerCut):
            store.keep(ref)
    assert calls == call
    for path in newest_checkpoints(tmp_path):
        verify_checkpoint(path)
    named = any(parse_checkpoint_name(path)[0] == 9 for path in newest_checkpoints(tmp_path))
    assert restored(tmp_path) == (b"new" if named else b"old" * NUM_CHECKPOINTS, [])
    keep(make_store(tmp_path), b"after", 10)
    assert restored(tmp_path) == (b"after", [])


def test_a_copy_cut_short_never_gets_a_valid_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    keep(store, b"old", 1)
    ref = store.save(LARGE, 2, 10)

    def no_links(*args: object) -> None:
        raise OSError(1, "Operation not permitted")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:1000])
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_links)
        patch.setattr(store_module.shutil, "copyfile", half)
        with pytest.raises(PowerCut):
            store.keep(ref)
    assert restored(tmp_path) == (b"old", [])


def test_a_full_disk_is_an_error_of_ours_and_spares_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    keep(store, b"old", 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LocalError, match=r"checkpoint of round 2 could not be kept: .*No space left"):
            keep(store, b"new", 2)
    assert restored(tmp_path) == (b"old", [])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rename(path: Path) -> None:
    path.rename(path.with_name("my-best-model.safetensors"))


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty, rename])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store = make_store(tmp_path)
    keep(store, LARGE, 1)
    damage(keep(store, LARGE[::-1], 2))
    (bad,) = [path for path in newest_checkpoints(tmp_path) if not path.name.startswith("0000000001-")]
    data, warnings = restored(tmp_path)
    assert data == LARGE
    (warning,) = warnings
    assert bad.name in warning
    assert "falling back" in warning
    assert bad.with_suffix(".damaged").exists(), "set aside for whoever wants to look"
    assert restored(tmp_path) == (LARGE, []), "and not looked at again"


def test_every_damaged_checkpoint_is_warned_of_and_the_last_leaves_a_fresh_start(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for round_ in range(3):
        flip_a_byte(keep(store, f"model {round_}".encode(), round_))
    data, warnings = restored(tmp_path)
    assert data is None
    assert len(warnings) == 3


def test_whole_checkpoints_of_another_model_stop_the_start_and_stay_where_they_are(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    kept = store.keep(store.save(b"old model", 3, 10))

    def other_task(path: Path) -> None:
        raise PeerError(Reason.WRONG_SHAPE, "0.weight is F32[64, 64], expected F32[32, 64]")

    with pytest.raises(LocalError, match=r"another model .*expected F32.*start afresh"):
        restored(tmp_path, other_task)
    assert kept.exists()


# --- one daemon per home --------------------------------------------------------------------------------
HOLD = """
import sys
from pathlib import Path
from node.store import HomeLock
with HomeLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_home_has_one_process_at_a_time_and_its_killing_frees_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LocalError, match=rf"in use by another covey daemon \(process {holder.pid}\)"):
            HomeLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with HomeLock(tmp_path):
            assert (tmp_path / "lock").read_text() == str(os.getpid())
    finally:
        holder.kill()
        holder.communicate()


def test_a_lock_is_free_after_its_block_and_after_an_error_in_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), HomeLock(tmp_path):
        raise ZeroDivisionError
    with HomeLock(tmp_path), pytest.raises(LocalError):
        HomeLock(tmp_path)
    with HomeLock(tmp_path):
        pass


# --- peers and rounds -----------------------------------------------------------------------------------
def record_of(peer: str, *addresses: str) -> PeerRecord:
    return PeerRecord(PeerId(peer), addresses)


def test_peers_survive_a_restart_the_last_seen_first(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.remember(record_of("a", "/ip4/1.1.1.1/tcp/1/p2p/a"), 1.0)
    history.remember(record_of("b", "/ip4/2.2.2.2/tcp/2/p2p/b"), 2.0)
    history.remember(record_of("a", "/ip4/3.3.3.3/tcp/3/p2p/a", "/ip4/1.1.1.1/tcp/1/p2p/a"), 3.0)
    history.close()
    again = History(tmp_path)
    assert again.peers() == (
        record_of("a", "/ip4/3.3.3.3/tcp/3/p2p/a", "/ip4/1.1.1.1/tcp/1/p2p/a"),
        record_of("b", "/ip4/2.2.2.2/tcp/2/p2p/b"),
    )
    again.close()


def test_remembered_peers_are_bounded_and_the_longest_unseen_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_STORED_PEERS >= 8
    monkeypatch.setattr(store_module, "MAX_STORED_PEERS", 8)
    history = History(tmp_path)
    for number in range(20):
        history.remember(record_of(f"peer{number}"), float(number))
    assert [record.peer for record in history.peers()] == [f"peer{number}" for number in range(19, 11, -1)]
    history.close()


def round_of(number: int, **metrics: float) -> RoundDone:
    return RoundDone(number, num_merged=2, staleness_max=0, metrics=metrics, duration_s=0.5)


def test_rounds_survive_a_restart_in_order(tmp_path: Path) -> None:
    history = History(tmp_path)
    for number in range(5):
        history.add_round(round_of(number, accuracy=number / 10), 100.0 + number)
    history.close()
    again = History(tmp_path)
    assert again.rounds(last=2) == [
        {"round": 3, "at_s": 103.0, "num_merged": 2, "metrics": {"accuracy": 0.3}},
        {"round": 4, "at_s": 104.0, "num_merged": 2, "metrics": {"accuracy": 0.4}},
    ]
    assert len(again.rounds()) == 5
    again.close()


def test_stored_rounds_are_bounded_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_STORED_ROUNDS", 4)
    history = History(tmp_path)
    for number in range(10):
        history.add_round(round_of(number), 1.0)
    assert [row["round"] for row in history.rounds()] == [6, 7, 8, 9]
    history.close()


def scribble_over_everything(path: Path) -> None:
    path.write_bytes(b"this is no database" * 100)


def scribble_over_the_pages(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [scribble_over_everything, scribble_over_the_pages, put_a_folder_there])
def test_a_damaged_database_says_what_to_do(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    history = History(tmp_path)
    history.remember(record_of("a"), 1.0)
    history.close()
    damage(tmp_path / "covey.db")
    with pytest.raises(LocalError, match=r"covey\.db .*move it away, it is rebuilt"):
        History(tmp_path)


# --- piece by piece -------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(1,), (CHUNK_BYTES,), (CHUNK_BYTES + 1, 3), (5, 0, 2 * CHUNK_BYTES, 7)])
def test_a_model_in_pieces_is_the_one_in_one_piece(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    pieces = [bytes([number]) * length for number, length in enumerate(lengths)]
    data = b"".join(pieces)
    digest, hashes = hash_blob(data)
    assert hash_pieces(map(memoryview, pieces)) == (digest, len(data), hashes)
    store = make_store(tmp_path)
    ref = store.save_pieces(pieces, 3, 1)
    assert ref == ModelRef(digest, len(data), 3, 1)
    assert store.path(ref).read_bytes() == data
    assert store.size_bytes() == len(data), "and nothing beside it"


# --- checkpoints by their digest ------------------------------------------------------------------------
def test_one_checkpoint_is_restored_by_its_digest(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    refs = [store.save(b"model %d" % number, number, 1) for number in range(3)]
    for ref in refs:
        store.keep(ref)
    warnings: list[str] = []
    again = make_store(tmp_path)
    assert again.restore_one(refs[1].digest, warnings.append)
    assert again.path(refs[1]).read_bytes() == b"model 1"
    assert again.get(refs[2].digest) is None
    assert not again.restore_one(bytes(32), warnings.append)
    assert warnings == []
    newest_checkpoints(tmp_path)[0].write_bytes(b"spoilt")
    assert not again.restore_one(refs[2].digest, warnings.append)
    assert "is damaged" in warnings[0]


def test_checkpoints_that_nothing_refers_to_are_set_aside(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    refs = [store.save(b"model %d" % number, number, 1) for number in range(2)]
    paths = [store.keep(ref) for ref in refs]
    warnings: list[str] = []
    store.set_aside([refs[0].digest], warnings.append)
    assert newest_checkpoints(tmp_path) == [paths[0]]
    assert "belongs to no log" in warnings[0]
    assert paths[1].with_suffix(".unused").exists()
