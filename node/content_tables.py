"""Which contents there are on this disk and which are on their way: `content.db`.

Belongs here: rows, and the files of the store's own that go when no row speaks of them any more. What a row means for a
peer or for the operator is said in `content_store.py`.
"""

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from protocols.errors import LocalError
from protocols.vocabulary import Digest

Origin = Literal["shared", "copied", "listed", "got", "arrived"]
"""Of a file: lies where its owner keeps it; was copied into the home; is a folder's list; lies in the downloads; has come and
is not placed yet."""


class Hashed(NamedTuple):
    """A file that was read."""

    digest: Digest
    size_bytes: int
    stamp: str
    """See `content_blobs.stamp_of`."""
    hashes: bytes
    """Of its chunks, one after the other."""


class ContentTables:
    """The rows, for any thread.

    path: made so that only its owner may read it, for it tells what was got, and where what is shared lies.
    own: the folder of the files that are the store's own.

    Raises:
        LocalError: `path` is damaged.
    """

    def __init__(self, path: Path, own: Path) -> None:
        self._own = own
        self._lock = threading.RLock()
        self._depth = 0
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise LocalError(
                f"{path} is damaged ({error}); move it away and share your files again"
            ) from error

    def close(self) -> None:
        """No call comes after this one."""
        with self._lock:
            self._db.close()

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and nobody reads what is in between. May be used within itself."""
        with self._lock:
            if not self._depth:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self._db
            except BaseException:
                if self._depth == 1:
                    self._db.execute("ROLLBACK")
                raise
            else:
                if self._depth == 1:
                    self._db.execute("COMMIT")
            finally:
                self._depth -= 1

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All that answers a query."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def row(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first that answers a query."""
        with self._lock:
            found: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
            return found

    # --- files ------------------------------------------------------------------------------------------
    def is_held(self, digest: bytes) -> bool:
        """Whether a content is here, unless its file turns out to have changed."""
        return self.row("SELECT 1 FROM files WHERE digest = ? AND NOT changed", digest) is not None

    def put_files(self, item: bytes, files: Iterable[tuple[Path, Hashed, Origin]]) -> None:
        """Files of an item, in place of what was known of these paths."""
        rows = (
            (item, os.fsencode(path), hashed.digest, hashed.size_bytes, hashed.stamp, hashed.hashes, origin)
            for path, hashed, origin in files
        )
        with self.change() as db:
            db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, 0)", rows)

    def forget_arrived(self, digests: Iterable[bytes]) -> list[bytes]:
        """Contents have a place of their own, or are not wanted any more; the paths at which they lay."""
        arrived = "FROM files WHERE digest = ? AND origin = 'arrived'"
        paths: list[bytes] = []
        with self.change() as db:
            for digest in digests:
                paths += (path for (path,) in self.rows(f"SELECT path {arrived}", digest))
                db.execute(f"DELETE {arrived}", (digest,))
        return paths

    def forget_want(self, digest: bytes) -> None:
        """Something is not wanted any more."""
        with self.change() as db:
            db.execute("DELETE FROM wants WHERE digest = ?", (digest,))
            db.execute("DELETE FROM parts WHERE root = ?", (digest,))

    def remove_unused(self, paths: Iterable[bytes]) -> None:
        """Remove files of the store's own that no row speaks of any more."""
        for path in paths:
            own = path_of(path).parent == self._own
            if own and not self.row("SELECT 1 FROM files WHERE path = ?", path):
                path_of(path).unlink(missing_ok=True)


def path_of(raw: bytes) -> Path:
    """A path out of a row; those of this disk need not be text."""
    return Path(os.fsdecode(raw))


_TABLES = """
CREATE TABLE IF NOT EXISTS items (digest BLOB PRIMARY KEY, kind TEXT NOT NULL, path BLOB NOT NULL,
    is_got INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS files (item BLOB NOT NULL, path BLOB NOT NULL, digest BLOB NOT NULL,
    size_bytes INTEGER NOT NULL, stamp TEXT NOT NULL, hashes BLOB NOT NULL, origin TEXT NOT NULL,
    changed INTEGER NOT NULL, PRIMARY KEY (item, path));
CREATE INDEX IF NOT EXISTS files_by_digest ON files (digest);
CREATE INDEX IF NOT EXISTS files_by_path ON files (path);
CREATE TABLE IF NOT EXISTS wants (digest BLOB PRIMARY KEY, size_bytes INTEGER NOT NULL, kind TEXT NOT NULL,
    title TEXT NOT NULL, placed BLOB);
CREATE TABLE IF NOT EXISTS parts (root BLOB NOT NULL, digest BLOB NOT NULL, size_bytes INTEGER NOT NULL,
    copies INTEGER NOT NULL, PRIMARY KEY (root, digest));
CREATE INDEX IF NOT EXISTS parts_by_digest ON parts (digest);
"""
