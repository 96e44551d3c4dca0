"""The click log of a library on the disk: own clicks, which stay private, and a snapshot so that a start takes no time.

What others clicked is in the feeds' entries, what the operator clicked in a table of its own; `ClickLog` is made from
both. A snapshot holds the log's arrays, and for each author how far its feed is counted in them: what came after is
added at the next start, and authors of whom something is gone since are counted anew.
"""

import io
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec
import numpy as np
from msgspec import Struct

from aggregation.ranking import ClickLog, position_weight
from node.library_feeds import Changes, decode_entry, transaction
from protocols.entries import Click
from protocols.terms import hashed
from protocols.vocabulary import Digest

TABLES = """
CREATE TABLE IF NOT EXISTS history (id INTEGER PRIMARY KEY, at_s REAL NOT NULL, terms BLOB NOT NULL, item BLOB NOT NULL,
    rank INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot (name TEXT PRIMARY KEY, data BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot_state (id INTEGER PRIMARY KEY CHECK (id = 0), settings TEXT NOT NULL, own INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS counted (author BLOB PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
"""
"""`own`: the last row of `history` in the snapshot. `counted`: the last entry of an author in it; 0 where some that are in
it are gone."""
MIN_CLICKS_PER_SNAPSHOT = 50_000
SNAPSHOT_SHARE = 0.1
"""Of a large log so much has to be new for the next snapshot, which takes time with its size."""
MAX_RANK = 100
"""Nobody looks further down; whoever says so counts no more for it."""
MAX_CACHED_TERMS = 100_000

_decode_terms = msgspec.msgpack.Decoder(tuple[str, ...]).decode


class OwnClick(Struct, frozen=True):
    """What the operator once chose. terms: the query's words. at_s: Unix seconds. rank: from 1."""

    at_s: float
    terms: tuple[str, ...]
    item: Digest
    rank: int


class ClickTables:
    """The click log of node `me`, and what it is made from.

    Args:
        by_position: whether clicks far down count more (see `position_weight`).
        warn: told in a line where a snapshot is of no use.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        me: bytes,
        network: str,
        *,
        top_terms: int,
        by_position: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._db = db
        self._me = me
        self._top_terms = top_terms
        self._by_position = by_position
        self._warn = warn
        self._settings = repr((1, me.hex(), network, top_terms, by_position))
        self._hashed = lru_cache(MAX_CACHED_TERMS)(lambda term: hashed(term, network))
        self._num_new = 0
        self.log, own = self._restored()
        self._catch_up(own)
        self.save_if_due()

    def hashed(self, terms: Sequence[str]) -> tuple[str, ...]:
        """Terms as the log has them, whether they came plain or hashed."""
        return tuple(map(self._hashed, terms))

    # --- others' clicks ---------------------------------------------------------------------------------
    def mark(self, changes: Changes) -> None:
        """Whose clicks in the snapshot are gone. To be called in the transaction that removes them."""
        authors = {place.author for place, entry in changes.gone.items() if isinstance(entry, Click)}
        self._db.executemany(
            "INSERT OR REPLACE INTO counted VALUES (?, 0)", [(author,) for author in authors]
        )

    def take(self, changes: Changes) -> None:
        """To be called after that transaction."""
        for place, entry in changes.gone.items():
            if isinstance(entry, Click) and place.author != self._me:
                self.log.remove(place.author, self.hashed(entry.terms), entry.item, self._weight(entry.rank))
                self._num_new += 1
        for place, entry in changes.new.items():
            if isinstance(entry, Click) and place.author != self._me:
                self._add(place.author, entry)

    def _add(self, author: bytes, click: Click | OwnClick) -> None:
        self.log.add(author, self.hashed(click.terms), click.item, self._weight(click.rank))
        self._num_new += 1

    def _weight(self, rank: int) -> float:
        return position_weight(min(rank, MAX_RANK)) if self._by_position else 1.0

    # --- own clicks -------------------------------------------------------------------------------------
    def click(self, click: OwnClick) -> None:
        """The operator chose this."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO history (at_s, terms, item, rank) VALUES (?, ?, ?, ?)",
                (click.at_s, msgspec.msgpack.encode(click.terms), click.item, click.rank),
            )
        self._add(self._me, click)

    def history(self, limit: int) -> list[OwnClick]:
        """The operator's last clicks, the newest first."""
        rows = self._db.execute(
            "SELECT at_s, terms, item, rank FROM history ORDER BY id DESC LIMIT ?", (limit,)
        )
        return [OwnClick(at_s, _decode_terms(terms), Digest(item), rank) for at_s, terms, item, rank in rows]

    def num_own(self) -> int:
        """How many clicks of the operator's own are kept."""
        (count,) = self._db.execute("SELECT count(*) FROM history").fetchone()
        return int(count)

    def forget(self) -> None:
        """No trace of the operator's clicks is left: not in the log, nor in a snapshot of it, nor in the file's free pages."""
        with transaction(self._db):
            self._db.execute("DELETE FROM history")
            self._delete_snapshot()
        self.log.drop(self._me)
        self.save()
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # --- snapshot ---------------------------------------------------------------------------------------
    def save_if_due(self) -> None:
        """Keep a snapshot where so much is new that the next start would take long. One that cannot be written is no loss."""
        if self._num_new < max(MIN_CLICKS_PER_SNAPSHOT, SNAPSHOT_SHARE * self.log.num_clicks):
            return
        try:
            self.save()
        except sqlite3.Error as error:
            self._warn(f"no snapshot of the click log can be written ({error}); the next start takes longer")
            self._num_new = 1  # tried again after as many as before

    def save(self) -> None:
        """Keep the log as it is now."""
        rows = []
        for name, array in self.log.to_arrays(all_items=False).items():
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            rows.append((name, file.getbuffer(), zlib.crc32(file.getbuffer())))
        with transaction(self._db):
            self._delete_snapshot()
            self._db.executemany("INSERT INTO snapshot VALUES (?, ?, ?)", rows)
            self._db.execute(
                "INSERT INTO snapshot_state SELECT 0, ?, coalesce(max(id), 0) FROM history", (self._settings,)
            )
            self._db.execute(
                "INSERT INTO counted SELECT author, last FROM feeds WHERE feed = 'clicks' AND last >= first"
            )
        self._num_new = 0

    def save_if_new(self) -> None:
        """The same where the log is not as the snapshot has it."""
        if self._num_new:
            self.save()

    def _delete_snapshot(self) -> None:
        self._db.execute("DELETE FROM snapshot")
        self._db.execute("DELETE FROM snapshot_state")
        self._db.execute("DELETE FROM counted")

    def _catch_up(self, own: int) -> None:
        """Add what came after the snapshot. own: the last own click that is in it."""
        for (author,) in self._db.execute("SELECT author FROM counted WHERE last = 0"):
            self.log.drop(author)
        for author, body in self._db.execute(_NOT_COUNTED, (self._me,)):
            if isinstance(entry := decode_entry(body), Click):
                self._add(author, entry)
        for at_s, terms, item, rank in self._db.execute(
            "SELECT at_s, terms, item, rank FROM history WHERE id > ?", (own,)
        ):
            self._add(self._me, OwnClick(at_s, _decode_terms(terms), Digest(item), rank))

    def _restored(self) -> tuple[ClickLog, int]:
        """The snapshot's log, and the last own click in it; an empty one where there is no snapshot that is of use."""
        state = self._db.execute("SELECT settings, own FROM snapshot_state").fetchone()
        if state is not None and state[0] == self._settings:
            try:
                log = ClickLog.from_arrays(self._me, self._arrays(), top_terms=self._top_terms)
                return log, int(state[1])
            except (sqlite3.DatabaseError, ValueError, LookupError, TypeError, EOFError) as error:
                self._warn(
                    f"the snapshot of the click log is damaged ({error}); it is made anew from entries"
                )
        elif state is not None:
            self._warn("clicks count in another way than before; the click log is made anew from entries")
        with transaction(self._db):
            self._delete_snapshot()
        return ClickLog(self._me, top_terms=self._top_terms), 0

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {}
        for name, data, crc in self._db.execute("SELECT name, data, crc FROM snapshot"):
            if zlib.crc32(data) != crc:
                raise ValueError(f"check sum of {name}")
            arrays[name] = np.load(io.BytesIO(data), allow_pickle=False)
        return arrays


_NOT_COUNTED = """
SELECT feeds.author, entries.body FROM feeds LEFT JOIN counted ON counted.author = feeds.author
JOIN entries ON entries.feed = feeds.id AND entries.seq > coalesce(counted.last, 0)
WHERE feeds.feed = 'clicks' AND feeds.author <> ?
"""
