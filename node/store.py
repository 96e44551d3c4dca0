"""What a node keeps on disk: blobs that travel, checkpoints that last, known peers and past rounds.

Home layout: `covey.toml identity.pem api.json api.token lock covey.db models/ checkpoints/ scratch/ rounds.jsonl`. Shared
content lies beside it, see `content_store.py` and `library.py`.

A blob enters `models/` only whole and checked. A checkpoint is synced to disk before it gets its name, and
its name holds its digest, so that after any crash each file is either right or recognised as damaged.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from protocols.blob import check_chunk, check_header, digest_of, num_chunks
from protocols.errors import LocalError, PeerError
from protocols.events import RoundDone
from protocols.messages import FetchHeader
from protocols.vocabulary import CHUNK_BYTES, ContentRef, Digest, ModelRef, PeerRecord, Reason

NUM_CHECKPOINTS = 3
"""The newest may be damaged by the disk; two older ones stand behind it."""
MAX_STORED_PEERS = 1024
MAX_STORED_ROUNDS = 100_000
"""The oldest go first; `rounds.jsonl` has them all."""


MODEL_LANE, CONTENT_LANE = "model", "content"
"""Blobs of one lane share places to be served and fetched in, so that those of another never wait for them."""


class HomeLock:
    """One daemon per home. Released by the system when the process ends, however it ends.

    Raises:
        LocalError: another process holds it.
    """

    def __init__(self, home: Path) -> None:
        self._file = (home / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise LocalError(
                f"{home} is in use by another covey daemon (process {holder}); one daemon per home"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Blob:
    """A whole blob, read by chunk."""

    lane = MODEL_LANE

    def __init__(self, path: Path, size_bytes: int, chunk_hashes: tuple[bytes, ...]) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.chunk_hashes = chunk_hashes

    def read(self, index: int) -> bytes:
        """Chunk `index`. A blob forgotten in the middle of a transfer raises FileNotFoundError."""
        with self.path.open("rb") as file:
            file.seek(index * CHUNK_BYTES)
            return file.read(CHUNK_BYTES)


class Incoming:
    """A blob on its way in. Chunks come in any order; each is checked before it is written, so it can be taken up again."""

    lane = MODEL_LANE

    def __init__(self, path: Path, ref: ModelRef | ContentRef) -> None:
        self.path = path
        self.ref = ref
        self.held: set[int] = set()
        """The chunks that are written."""
        self.chunk_hashes: tuple[bytes, ...] = ()
        """Of all chunks, once a header has proved them."""
        self.busy = False

    def recover(self) -> None:
        """Find what an earlier process has left, if such things last. May read it all."""

    def prove(self, header: FetchHeader) -> None:
        """Take the chunks' hashes from a header.

        Raises:
            PeerError: WRONG_SIZE or WRONG_HASH, it is not that of the reference.
        """
        check_header(self.ref, header)
        self.chunk_hashes = header.chunk_hashes

    def write(self, index: int, chunk: bytes) -> None:
        """Check a chunk and put it in its place. From one thread at a time.

        Raises:
            PeerError: WRONG_HASH; nothing is written then.
        """
        check_chunk(chunk, self.chunk_hashes[index], index)
        with self.path.open("r+b" if self.held else "wb") as file:
            file.seek(index * CHUNK_BYTES)
            file.write(chunk)
        self.held.add(index)

    @property
    def missing(self) -> list[int]:
        """The chunks that are not written yet, in order."""
        return [index for index in range(num_chunks(self.ref.size_bytes)) if index not in self.held]

    @property
    def complete(self) -> bool:
        return len(self.held) == num_chunks(self.ref.size_bytes)


class BlobStore:
    """Models by digest. Used from the daemon's thread, the network's and the worker's: each call is whole.

    check: raises `PeerError` for a file that is not a model of this node's task.
    """

    def __init__(self, home: Path, check: Callable[[Path], None]) -> None:
        self._models = home / "models"
        self._checkpoints = home / "checkpoints"
        self._check = check
        self._blobs: dict[Digest, Blob] = {}
        self._incoming: dict[Digest, Incoming] = {}
        # What travelled before a crash is of no use after it; checkpoints are what lasts.
        shutil.rmtree(self._models, ignore_errors=True)
        self._models.mkdir(parents=True)
        self._checkpoints.mkdir(exist_ok=True)

    def save(self, data: bytes, round_: int, num_samples: int) -> ModelRef:
        """Take in a model made here."""
        return self.save_pieces([data], round_, num_samples)

    def save_pieces(self, pieces: Iterable[bytes | memoryview], round_: int, num_samples: int) -> ModelRef:
        """The same for a model that comes piece by piece: it goes to the disk as it comes. From one thread at a time."""
        part = self._models / "new.own"
        with part.open("wb") as file:
            digest, size_bytes, hashes = hash_pieces(_written(pieces, file))
        path = self._path(digest)
        part.replace(path)
        self._blobs[digest] = Blob(path, size_bytes, hashes)
        return ModelRef(digest, size_bytes, round_, num_samples)

    def get(self, digest: bytes) -> Blob | None:
        """The blob, if it is held whole."""
        return self._blobs.get(Digest(digest))

    def holds(self, ref: ModelRef) -> bool:
        """Whether the model is held whole."""
        return self.get(ref.digest) is not None

    def path(self, ref: ModelRef) -> Path:
        """Where a held model lies.

        Raises:
            LocalError: it is not held.
        """
        blob = self.get(ref.digest)
        if blob is None:
            raise LocalError(f"model {ref.digest.hex()[:12]} is not held")
        return blob.path

    def incoming(self, ref: ModelRef) -> Incoming:
        """Begin to take in a blob, or go on where an earlier attempt broke off."""
        digest = Digest(ref.digest)
        found = self._incoming.get(digest)
        # A header proves the size. Until then a peer that lied about it must not spoil the next one's try.
        unproven = found is not None and found.ref != ref and not found.chunk_hashes and not found.busy
        if found is None or unproven:
            found = self._incoming[digest] = Incoming(self._path(digest).with_suffix(".part"), ref)
        return found

    def admit(self, incoming: Incoming) -> None:
        """The one gate for what peers send: schema, dtypes, shapes and finiteness, then the name.

        Raises:
            PeerError: the blob is not a model of this task; it is gone then.
        """
        assert incoming.complete
        digest = Digest(incoming.ref.digest)
        try:
            self._check(incoming.path)
        except PeerError:
            self.forget(digest)
            raise
        path = self._path(digest)
        incoming.path.replace(path)
        self._blobs[digest] = Blob(path, incoming.ref.size_bytes, incoming.chunk_hashes)
        self._incoming.pop(digest, None)

    def forget(self, digest: bytes) -> None:
        """Let a blob go, whole or half."""
        key = Digest(digest)
        if blob := self._blobs.pop(key, None):
            blob.path.unlink(missing_ok=True)
        if incoming := self._incoming.pop(key, None):
            incoming.path.unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """All that is held under `models/`."""
        return sum(file.stat().st_size for file in self._models.iterdir())

    # --- checkpoints ------------------------------------------------------------------------------------
    def keep(self, ref: ModelRef) -> Path:
        """Make a held model the newest checkpoint: synced, then named, then the directory synced.

        Raises:
            LocalError: the model is not held, or the disk refuses.
        """
        name = f"{ref.round:010d}-{ref.num_samples}-{ref.digest.hex()}.safetensors"
        final, draft = self._checkpoints / name, self._checkpoints / "draft"
        try:
            draft.unlink(missing_ok=True)
            source = self.path(ref)
            try:
                os.link(source, draft)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, draft)
            _sync(draft)
            draft.replace(final)
            _sync(self._checkpoints)
            # Of an older round than others it may be one that was taken over from peers.
            for old in [path for path in self._newest_first() if path != final][NUM_CHECKPOINTS - 1 :]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise LocalError(f"checkpoint of round {ref.round} could not be kept: {error}") from error
        return final

    def restore(self, warn: Callable[[str], None]) -> ModelRef | None:
        """The newest checkpoint that is whole, as a held model; each damaged one is warned of and set aside.

        Raises:
            LocalError: a whole checkpoint is of another model: the task was changed, and its work is not thrown away.
        """
        for path in self._newest_first():
            if (ref := self._take(path, warn)) is not None:
                return ref
        return None

    def restore_one(self, digest: bytes, warn: Callable[[str], None]) -> bool:
        """Whether the checkpoint of this digest is whole; it is a held model then. The rest as in `restore`."""
        found = [path for path in self._newest_first() if digest.hex() in path.name]
        return any(self._take(path, warn) is not None for path in found)

    def set_aside(self, known: Collection[bytes], warn: Callable[[str], None]) -> None:
        """Put checkpoints out of the way that nothing refers to, or they would count among the newest.

        Raises:
            LocalError: one is of another model.
        """
        for path in self._newest_first():
            if not any(digest.hex() in path.name for digest in known):
                self._check_own_if_whole(path)
                warn(f"checkpoint {path.name} belongs to no log; it is set aside")
                path.rename(path.with_suffix(".unused"))

    def _take(self, path: Path, warn: Callable[[str], None]) -> ModelRef | None:
        """Hold a checkpoint if it is whole; else it is warned of and set aside."""
        try:
            ref, hashes = verify_checkpoint(path)
            self._check_own(path)
        except (PeerError, OSError) as error:
            warn(f"checkpoint {path.name} is damaged ({error}); falling back to the one before")
            path.rename(path.with_suffix(".damaged"))
            return None
        held = self._path(Digest(ref.digest))
        shutil.copyfile(path, held)
        self._blobs[Digest(ref.digest)] = Blob(held, ref.size_bytes, hashes)
        return ref

    def _check_own_if_whole(self, path: Path) -> None:
        with contextlib.suppress(PeerError, OSError):
            self._check_own(path)

    def _check_own(self, path: Path) -> None:
        try:
            self._check(path)
        except PeerError as error:
            if error.reason is not Reason.WRONG_SHAPE:
                raise
            raise LocalError(
                f"the checkpoints in {self._checkpoints} are of another model ({error.detail}); "
                "set the task back to what it was, or move that folder away to start afresh"
            ) from error

    def _newest_first(self) -> list[Path]:
        return newest_checkpoints(self._checkpoints.parent)

    def _path(self, digest: Digest) -> Path:
        return self._models / f"{digest.hex()}.safetensors"


def newest_checkpoints(home: Path) -> list[Path]:
    """A home's checkpoints, newest first, unverified."""
    return sorted((home / "checkpoints").glob("*.safetensors"), reverse=True)


def parse_checkpoint_name(path: Path) -> tuple[int, int, Digest]:
    """Round, number of samples and digest out of a checkpoint's name.

    Raises:
        PeerError: WRONG_FORMAT, the name is not one of ours.
    """
    try:
        round_, samples, digest = path.stem.split("-")
        return int(round_), int(samples), Digest(bytes.fromhex(digest))
    except ValueError as error:
        raise PeerError(Reason.WRONG_FORMAT, f"{path.name} is not a checkpoint's name") from error


def verify_checkpoint(path: Path) -> tuple[ModelRef, tuple[bytes, ...]]:
    """A checkpoint's reference and chunk hashes.

    Raises:
        LocalError: its name is not one of ours.
        PeerError: its bytes are not what its name says.
    """
    round_, num_samples, digest = parse_checkpoint_name(path)
    with path.open("rb") as file:
        found, size_bytes, hashes = hash_pieces(iter(lambda: file.read(CHUNK_BYTES), b""))
    if found != digest:
        raise PeerError(Reason.WRONG_HASH, "its bytes do not match its name")
    return ModelRef(digest, size_bytes, round_, num_samples), hashes


def hash_pieces(pieces: Iterable[bytes | memoryview]) -> tuple[Digest, int, tuple[bytes, ...]]:
    """A blob's digest, its size in bytes and its chunks' hashes, from pieces of any lengths."""
    hashes: list[bytes] = []
    chunk, in_chunk, size_bytes = hashlib.sha256(), 0, 0
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            part = view[: CHUNK_BYTES - in_chunk]
            chunk.update(part)
            view = view[len(part) :]
            in_chunk += len(part)
            size_bytes += len(part)
            if in_chunk == CHUNK_BYTES:
                hashes.append(chunk.digest())
                chunk, in_chunk = hashlib.sha256(), 0
    if in_chunk:
        hashes.append(chunk.digest())
    return digest_of(size_bytes, hashes), size_bytes, tuple(hashes)


def _written(pieces: Iterable[bytes | memoryview], file: BinaryIO) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        file.write(piece)
        yield piece


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class History:
    """Peers worth dialling again, and the rounds so far, in SQLite. Times are Unix seconds, given."""

    def __init__(self, home: Path) -> None:
        path = home / "covey.db"
        try:
            self._db = sqlite3.connect(path)
        except sqlite3.Error as error:
            raise LocalError(f"{path} cannot be opened ({error}); move it away, it is rebuilt") from error
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_TABLES)
            (problem,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if problem != "ok":
                raise sqlite3.DatabaseError(problem.splitlines()[-1])
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise LocalError(f"{path} is damaged ({error}); move it away, it is rebuilt") from error

    def remember(self, record: PeerRecord, at_s: float) -> None:
        """A peer answered at these addresses."""
        with self._db:
            self._db.execute(
                "INSERT INTO peers VALUES (?, ?, ?) ON CONFLICT (peer) DO UPDATE "
                "SET addresses = excluded.addresses, seen_at = excluded.seen_at",
                (record.peer, json.dumps(record.addresses), at_s),
            )
            self._db.execute(
                "DELETE FROM peers WHERE peer NOT IN (SELECT peer FROM peers ORDER BY seen_at DESC LIMIT ?)",
                (MAX_STORED_PEERS,),
            )

    def peers(self) -> tuple[PeerRecord, ...]:
        """Remembered peers, the last seen first."""
        rows = self._db.execute("SELECT peer, addresses FROM peers ORDER BY seen_at DESC")
        return tuple(PeerRecord(peer, tuple(json.loads(addresses))) for peer, addresses in rows)

    def add_round(self, record: RoundDone, at_s: float) -> None:
        """One more round is over."""
        with self._db:
            self._db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?)",
                (record.round, at_s, record.num_merged, json.dumps(dict(record.metrics))),
            )
            self._db.execute(
                "DELETE FROM rounds WHERE rowid <= (SELECT max(rowid) FROM rounds) - ?", (MAX_STORED_ROUNDS,)
            )

    def rounds(self, last: int = 1000) -> list[dict[str, object]]:
        """The last rounds, oldest first."""
        rows = self._db.execute(
            "SELECT round, at_s, num_merged, metrics FROM rounds ORDER BY rowid DESC LIMIT ?", (last,)
        ).fetchall()
        return [
            {"round": round_, "at_s": at_s, "num_merged": merged, "metrics": json.loads(metrics)}
            for round_, at_s, merged, metrics in reversed(rows)
        ]

    def add_traffic(self, month: str, num_bytes: int) -> None:
        """So many more bytes were sent and received in a month, such as "2026-11".

        Raises sqlite3.Error where the disk refuses.
        """
        with self._db:
            self._db.execute(
                "INSERT INTO traffic VALUES (?, ?) ON CONFLICT (month) DO UPDATE "
                "SET num_bytes = num_bytes + excluded.num_bytes",
                (month, num_bytes),
            )

    def traffic(self, month: str) -> int:
        """Bytes sent and received in a month."""
        row = self._db.execute("SELECT num_bytes FROM traffic WHERE month = ?", (month,)).fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        self._db.close()


_TABLES = """
CREATE TABLE IF NOT EXISTS peers (peer TEXT PRIMARY KEY, addresses TEXT NOT NULL, seen_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (round INTEGER NOT NULL, at_s REAL NOT NULL, num_merged INTEGER NOT NULL,
    metrics TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS traffic (month TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL);
"""
