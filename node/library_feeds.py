"""The feeds' entries on the disk, as `protocols/feeds.py` decides: made durable, cut, and brought back for peers.

Over the library's connection, inside its transactions. What the core says is obeyed, not judged: signatures, days and
windows are its business. Entries of others that are held already are passed over. What does not go on where the feed ends is
refused: the disk has lost what the core gave before, and the core has to read where the feeds stand.
"""

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from protocols.entries import Batch, Cut, Entry, Feed, Head, Want
from protocols.errors import LocalError
from protocols.events import KeepEntries, Recall
from protocols.feeds import BATCH_OVERHEAD_BYTES, START, chain_after
from protocols.vocabulary import MAX_BATCH_BYTES, MAX_ENTRIES_PER_BATCH

TABLES = """
CREATE TABLE IF NOT EXISTS feeds (id INTEGER PRIMARY KEY, feed TEXT NOT NULL, author BLOB NOT NULL,
    epoch INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, prior BLOB NOT NULL, chain BLOB NOT NULL,
    day INTEGER NOT NULL, void INTEGER NOT NULL, UNIQUE (feed, author));
CREATE TABLE IF NOT EXISTS entries (feed INTEGER NOT NULL, seq INTEGER NOT NULL, body BLOB NOT NULL, chain BLOB NOT NULL,
    signature BLOB, PRIMARY KEY (feed, seq)) WITHOUT ROWID;
"""
"""`prior`: running hash before `first`. `chain`: after `last`, or after the entry. `signature`: where the author signed."""

MAX_BODIES_BYTES = MAX_BATCH_BYTES - BATCH_OVERHEAD_BYTES

decode_entry = msgspec.msgpack.Decoder(Entry).decode
_encode = msgspec.msgpack.Encoder().encode


def transaction(db: sqlite3.Connection) -> sqlite3.Connection:
    """To be entered: what is done inside is committed at its end, or undone where it raises."""
    db.execute("BEGIN IMMEDIATE")
    return db


class Place(NamedTuple):
    """Where an entry stands: the row of its author's feed, the author's key, and its number."""

    feed: int
    author: bytes
    seq: int


class Changes(NamedTuple):
    """What `keep` came to: entries that were held before and are no more, and then new ones, each in order."""

    gone: dict[Place, Entry]
    new: dict[Place, Entry]


class _Stand:
    """One author's row of the table."""

    __slots__ = ("chain", "day", "epoch", "first", "id", "last", "prior", "void")

    def __init__(self, row: tuple[int, int, int, int, bytes, bytes, int, int]) -> None:
        self.id, self.epoch, self.first, self.last, self.prior, self.chain, self.day, self.void = row


class FeedTables:
    """The entries of all authors, by feed, author and number."""

    def __init__(self, db: sqlite3.Connection, me: bytes) -> None:
        self._db = db
        self._me = me
        self._ids: dict[bytes, int] = {}
        """Of authors whose feed begins anew in one effect: they keep their place among all."""

    def heads(self, feed: Feed) -> tuple[Head, ...]:
        """Where each author's feed stands, in the order in which they were first heard of."""
        rows = self._db.execute(
            "SELECT author, epoch, first, last, chain, day, void FROM feeds WHERE feed = ? ORDER BY id",
            (feed,),
        )
        return tuple(
            Head(author, epoch, first, last, chain, day, bool(void))
            for author, epoch, first, last, chain, day, void in rows
        )

    def num_entries(self) -> int:
        """Of both feeds. A feed is held without a gap, so that nothing has to be counted."""
        (count,) = self._db.execute("SELECT coalesce(sum(last - first + 1), 0) FROM feeds").fetchone()
        return int(count)

    def num_authors(self) -> int:
        """Who is known in either feed."""
        (count,) = self._db.execute("SELECT count(DISTINCT author) FROM feeds").fetchone()
        return int(count)

    # --- keep -------------------------------------------------------------------------------------------
    def keep(self, effect: KeepEntries) -> Changes:
        """See `protocols.events.KeepEntries`. To be called in a transaction.

        Raises:
            LocalError: a batch does not go on where its author's feed ends.
        """
        changes = Changes({}, {})
        self._ids = {}
        for cut in effect.cuts:
            self._cut(effect.feed, cut, changes)
        for batch in effect.batches:
            self._append(effect.feed, batch, changes)
        for cut in effect.cuts:  # a batch may be longer than what is kept of an author
            stand = self._stand(effect.feed, cut.author)
            if stand is not None and cut.epoch == stand.epoch and stand.first < cut.first <= stand.last:
                self._shorten(stand, cut, changes)
        return changes

    def _stand(self, feed: Feed, author: bytes) -> _Stand | None:
        row = self._db.execute(
            "SELECT id, epoch, first, last, prior, chain, day, void FROM feeds WHERE feed = ? AND author = ?",
            (feed, author),
        ).fetchone()
        return None if row is None else _Stand(row)

    def _begin(self, feed: Feed, author: bytes, epoch: int, first: int, prior: bytes) -> _Stand:
        """An author that nothing is held of; the next entry is `first`."""
        added = self._db.execute(
            "INSERT INTO feeds VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, 0)",
            (self._ids.pop(author, None), feed, author, epoch, first, first - 1, prior, prior),
        )
        assert added.lastrowid is not None
        return _Stand((added.lastrowid, epoch, first, first - 1, prior, prior, 0, 0))

    def _cut(self, feed: Feed, cut: Cut, changes: Changes) -> None:
        stand = self._stand(feed, cut.author)
        if stand is not None and cut.epoch < stand.epoch:
            return
        if cut.void:
            self._void(feed, cut, stand, changes)
        elif stand is not None and (cut.epoch > stand.epoch or cut.first > stand.last + 1):
            self._drop(stand, cut.author, changes)
        elif stand is not None and cut.first > stand.first:
            self._shorten(stand, cut, changes)

    def _void(self, feed: Feed, cut: Cut, stand: _Stand | None, changes: Changes) -> None:
        """Nothing of the author is held, but how far it was, and that it is not to be heard in this epoch."""
        if stand is not None and cut.epoch > stand.epoch:
            self._drop(stand, cut.author, changes)
            stand = None
        if stand is None:
            stand = self._begin(feed, cut.author, cut.epoch, cut.first, START)
        self._delete(stand, cut.author, stand.last, changes)
        self._db.execute(
            "UPDATE feeds SET first = last + 1, prior = chain, void = 1 WHERE id = ?", (stand.id,)
        )

    def _drop(self, stand: _Stand, author: bytes, changes: Changes) -> None:
        """Forget the author altogether."""
        self._delete(stand, author, stand.last, changes)
        self._db.execute("DELETE FROM feeds WHERE id = ?", (stand.id,))
        self._ids[author] = stand.id

    def _shorten(self, stand: _Stand, cut: Cut, changes: Changes) -> None:
        prior = self._chain(stand.id, cut.first - 1)
        self._delete(stand, cut.author, cut.first - 1, changes)
        self._db.execute("UPDATE feeds SET first = ?, prior = ? WHERE id = ?", (cut.first, prior, stand.id))

    def _delete(self, stand: _Stand, author: bytes, up_to: int, changes: Changes) -> None:
        rows = self._db.execute(
            "SELECT seq, body FROM entries WHERE feed = ? AND seq <= ? ORDER BY seq", (stand.id, up_to)
        )
        gone = {Place(stand.id, author, seq): decode_entry(body) for seq, body in rows}
        if gone:
            self._db.execute("DELETE FROM entries WHERE feed = ? AND seq <= ?", (stand.id, up_to))
            changes.gone.update(
                (place, entry) for place, entry in gone.items() if not changes.new.pop(place, None)
            )

    def _append(self, feed: Feed, batch: Batch, changes: Changes) -> None:
        stand = self._stand(feed, batch.author)
        if stand is not None and batch.epoch > stand.epoch:
            self._drop(stand, batch.author, changes)
            stand = None
        if stand is not None and (batch.epoch < stand.epoch or stand.void):
            return
        if stand is not None and not self._goes_on(stand, batch):
            raise LocalError(f"entries up to {batch.first - 1} are not held; an earlier write has failed")
        if stand is None:
            stand = self._begin(feed, batch.author, batch.epoch, batch.first, batch.prior)
        new = batch.entries[stand.last + 1 - batch.first :]
        if new:
            self._insert(stand, batch, new, changes)

    def _goes_on(self, stand: _Stand, batch: Batch) -> bool:
        """Of one's own nothing may be passed over: it would be taken for kept."""
        if batch.first == stand.last + 1:
            return batch.prior == stand.chain
        return batch.first <= stand.last and batch.author != self._me

    def _insert(self, stand: _Stand, batch: Batch, new: tuple[Entry, ...], changes: Changes) -> None:
        rows, chain = [], stand.chain
        for seq, entry in enumerate(new, stand.last + 1):
            chain = chain_after(chain, entry)
            rows.append(
                (stand.id, seq, _encode(entry), chain, batch.signature if seq == batch.last else None)
            )
            changes.new[Place(stand.id, batch.author, seq)] = entry
        self._db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", rows)
        self._db.execute(
            "UPDATE feeds SET last = ?, chain = ?, day = ? WHERE id = ?",
            (batch.last, chain, new[-1].day, stand.id),
        )

    # --- recall -----------------------------------------------------------------------------------------
    def recall(self, effect: Recall) -> tuple[Batch, ...]:
        """See `protocols.events.Recall`."""
        found: list[Batch] = []
        room = effect.max_bytes
        for want in effect.wants:
            for batch in self._batches(effect.feed, want):
                room -= len(_encode(batch))
                if room < 0:
                    return tuple(found)
                found.append(batch)
        return tuple(found)

    def _batches(self, feed: Feed, want: Want) -> Iterator[Batch]:
        """What a peer wants of one author, in as few batches as can be: a signature proves all before it."""
        stand = self._stand(feed, want.author)
        if stand is None or stand.epoch != want.epoch:
            return
        first = max(want.after + 1, stand.first)
        prior = stand.prior if first == stand.first else self._chain(stand.id, first - 1)
        joined: list[_Row] = []
        size_bytes = 0
        for part in self._signed(stand.id, first, want.limit):
            more = sum(len(row.body) for row in part)
            if joined and (
                len(joined) + len(part) > MAX_ENTRIES_PER_BATCH or size_bytes + more > MAX_BODIES_BYTES
            ):
                yield _batch(want, first, prior, joined)
                first, prior, joined, size_bytes = first + len(joined), joined[-1].chain, [], 0
            joined += part
            size_bytes += more
        if joined:
            yield _batch(want, first, prior, joined)

    def _signed(self, feed: int, first: int, limit: int) -> Iterator[list["_Row"]]:
        """Entries from one on, up to each that the author signed. One that came as a batch is no longer than a batch."""
        part: list[_Row] = []
        rows = self._db.execute(
            "SELECT body, chain, signature FROM entries WHERE feed = ? AND seq >= ? ORDER BY seq LIMIT ?",
            (feed, first, limit),
        )
        for row in map(_Row._make, rows):
            part.append(row)
            if row.signature is not None:
                yield part
                part = []

    def _chain(self, feed: int, seq: int) -> bytes:
        row = self._db.execute("SELECT chain FROM entries WHERE feed = ? AND seq = ?", (feed, seq)).fetchone()
        return START if row is None else bytes(row[0])


class _Row(NamedTuple):
    body: bytes
    chain: bytes
    signature: bytes | None


def _batch(want: Want, first: int, prior: bytes, rows: list[_Row]) -> Batch:
    signature = rows[-1].signature
    assert signature is not None
    entries = tuple(decode_entry(row.body) for row in rows)
    return Batch(want.author, want.epoch, first, prior, entries, signature)
