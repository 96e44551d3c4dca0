"""The log of shared-seed scalars on the disk: records, sealed checkpoints, and the terms that they were made under.

In the home's `covey.db`, over a connection of its own. What a node signed is on the disk before anybody hears of it:
one that forgot would sign something else for the same round, and be convicted of it. So an own record and a checkpoint
are synced; what others signed survives the process, and after a power failure comes from them again.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from protocols.errors import LocalError
from protocols.messages import Terms
from protocols.scalar_terms import misfit
from protocols.vocabulary import Checkpoint, ScalarRecord

DATABASE = "covey.db"
BUSY_TIMEOUT_S = 10.0

T = TypeVar("T")


class ScalarStore:
    """One node's log. Used from one thread.

    Args:
        home: the folder of `covey.db`.
        author: whose records are synced.
        keep_log: whether records from before a checkpoint stay, so that the log can be replayed from the base model.

    Raises LocalError where the file cannot be opened or is damaged.
    """

    def __init__(self, home: Path, author: bytes = b"", keep_log: bool = True) -> None:
        self._path = home / DATABASE
        self._author = author
        self._keep_log = keep_log
        self._num_records: int | None = None
        try:
            self._db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        except sqlite3.Error as error:
            raise LocalError(f"{self._path} cannot be opened ({error}); {_REMEDY}") from error
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise LocalError(f"{self._path} is damaged ({error}); {_REMEDY}") from error

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what the core asks -----------------------------------------------------------------------------
    def keep(
        self, records: Sequence[ScalarRecord], checkpoint: Checkpoint | None = None, cut: int = 0
    ) -> None:
        """Make records durable, and a sealed checkpoint. See `protocols.events.KeepScalars`.

        cut: records of rounds up to it are not needed to go on. Where it reaches the checkpoint's own round, the
            checkpoint is others' and what was held of those rounds is not what led there: it goes in any case.

        Raises LocalError where the disk refuses.
        """
        own = any(record.author == self._author for record in records)
        try:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if own or checkpoint else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                rows = [(record.round, record.author, msgspec.msgpack.encode(record)) for record in records]
                more = self._db.executemany("INSERT OR IGNORE INTO scalar_records VALUES (?, ?, ?)", rows)
                fewer = 0 if checkpoint is None else self._seal(checkpoint, cut)
            if self._num_records is not None:
                self._num_records += more.rowcount - fewer
        except sqlite3.Error as error:
            raise LocalError(
                f"the log of scalars cannot be written ({error}), and a node that forgets what it signed would "
                f"contradict itself; is the disk of {self._path} full?"
            ) from error

    def _seal(self, checkpoint: Checkpoint, cut: int) -> int:
        """How many records went."""
        adopted = cut >= checkpoint.round > 0
        self._db.execute(
            "DELETE FROM scalar_checkpoints WHERE round >= ?", (0 if adopted else checkpoint.round,)
        )
        self._db.execute(
            "INSERT INTO scalar_checkpoints VALUES (?, ?)",
            (checkpoint.round, msgspec.msgpack.encode(checkpoint)),
        )
        if not adopted and self._keep_log:
            return 0
        gone = self._db.execute("DELETE FROM scalar_records WHERE round <= ?", (cut,))
        self._db.execute("DELETE FROM scalar_checkpoints WHERE round < ?", (cut,))
        self._db.execute("UPDATE scalar_state SET cut = max(cut, ?)", (cut,))
        return gone.rowcount

    # --- what was kept ----------------------------------------------------------------------------------
    def records(self, after: int = 0) -> tuple[ScalarRecord, ...]:
        """The records of the rounds after this one, by round and author; both of two that contradict each other.

        Raises LocalError where they are of another version of covey.
        """
        rows = self._db.execute(
            "SELECT data FROM scalar_records WHERE round > ? ORDER BY round, author, data", (after,)
        )
        return tuple(self._decoded(data, ScalarRecord) for (data,) in rows)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The sealed checkpoints, newest first. Raises LocalError as `records` does."""
        rows = self._db.execute("SELECT data FROM scalar_checkpoints ORDER BY round DESC")
        return tuple(self._decoded(data, Checkpoint) for (data,) in rows)

    def num_records(self) -> int:
        """All that are on the disk. Counted once: a long log takes a while."""
        if self._num_records is None:
            (count,) = self._db.execute("SELECT count(*) FROM scalar_records").fetchone()
            self._num_records = int(count)
        return self._num_records

    @property
    def cut(self) -> int:
        """Records of rounds up to this one are gone from the disk."""
        (cut,) = self._db.execute("SELECT cut FROM scalar_state").fetchone()
        return int(cut)

    # --- the terms --------------------------------------------------------------------------------------
    def terms(self) -> Terms | None:
        """What the log was made under; None where nothing was kept yet.

        Raises LocalError where they are of another version of covey.
        """
        (data,) = self._db.execute("SELECT terms FROM scalar_state").fetchone()
        return None if data is None else self._decoded(data, Terms)

    def bind(self, terms: Terms) -> None:
        """From now on the log is one under these terms.

        Raises LocalError where it is one under others already: its signatures and its states would not hold.
        """
        kept = self.terms()
        if kept is None:
            self._db.execute("UPDATE scalar_state SET terms = ?", (msgspec.msgpack.encode(terms),))
        elif problem := misfit(terms, kept):
            raise LocalError(
                f"the log in {self._path} was made under other terms: {problem[1]} (before, and now); set that back, "
                f"or {_AFRESH}"
            )

    def _decoded(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except msgspec.DecodeError as error:
            raise LocalError(
                f"the log in {self._path} is of another version of covey ({error}); {_AFRESH}"
            ) from error


_REMEDY = "move it away to start afresh"
_AFRESH = "begin afresh: move covey.db and the folder checkpoints away"
_TABLES = """
CREATE TABLE IF NOT EXISTS scalar_records (round INTEGER NOT NULL, author BLOB NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (round, author, data)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scalar_checkpoints (round INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS scalar_state (id INTEGER PRIMARY KEY CHECK (id = 0), cut INTEGER NOT NULL, terms BLOB);
INSERT OR IGNORE INTO scalar_state VALUES (0, 0, NULL);
"""
