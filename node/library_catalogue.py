"""What is shared, by whom, and where words occur in it: SQLite's FTS5 over the newest entry of each sharer and item.

The text that is indexed is tokens already (see `protocols/terms.py`), so FTS5 only has to part them at blanks: its `ascii`
tokenizer leaves all beyond ASCII as it is. Titles are hostile text: they reach SQL as parameters, and a query's words as
quoted strings of FTS5.
"""

import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aggregation.click_log import ClickLog
from node.library_feeds import Changes, Place, decode_entry
from protocols.entries import Kind, Shared, Withdrawn
from protocols.terms import tokens
from protocols.vocabulary import Digest

TABLES = """
CREATE TABLE IF NOT EXISTS shares (id INTEGER PRIMARY KEY, item BLOB NOT NULL, feed INTEGER NOT NULL, seq INTEGER NOT NULL,
    day INTEGER NOT NULL, kind TEXT NOT NULL, size_bytes INTEGER NOT NULL, UNIQUE (item, feed));
CREATE INDEX IF NOT EXISTS shares_by_feed ON shares (feed, seq);
CREATE TABLE IF NOT EXISTS free_shares (id INTEGER PRIMARY KEY);
CREATE VIRTUAL TABLE IF NOT EXISTS texts USING fts5 (text, tokenize = 'ascii');
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5vocab (texts, row);
"""
"""A row of `texts` has the number of its share; the entry itself is in `entries`, at (feed, seq). Numbers that were given up
are given again, so that a table of all of them stays short."""
MAX_CACHED = 4_000_000
"""Items in the cached answers for single words, all together."""
MAX_SHARES = 64
"""Sharers of one item that are told of: nobody fetches from more."""

MAX_CLAIMS = 16
"""Kinds and sizes of one item that are told of: more than one is a lie in any case."""

Indices = NDArray[np.int64]


class Share(NamedTuple):
    """An item as one author shares it. words: all that it is found by there."""

    author: bytes
    entry: Shared
    words: frozenset[str]


class Catalogue:
    """Shares by item and by word.

    Args:
        log: whose numbers of items tell what is found.
    """

    def __init__(self, db: sqlite3.Connection, log: ClickLog) -> None:
        self._db = db
        self._log = log
        self._added: list[tuple[int, bytes]] = []
        """New shares and their items, which get their numbers when all is on the disk."""
        self._removed: list[bytes] = []
        """Items of shares that are gone, which lose theirs then."""
        self._found: OrderedDict[str, Indices] = OrderedDict()
        self._num_cached = 0
        rows = db.execute("SELECT id, item FROM shares ORDER BY id").fetchall()
        (num_free,) = db.execute("SELECT count(*) FROM free_shares").fetchone()
        if rows and not 0 < rows[0][0] <= rows[-1][0] <= len(rows) + num_free:
            raise sqlite3.DatabaseError("shares are not numbered as they should be")
        self._item_of_share = np.zeros(len(rows) + num_free + 1, np.int64)
        if rows:
            ids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
            self._item_of_share[ids] = [log.item_index(row[1]) for row in rows]

    # --- changes ----------------------------------------------------------------------------------------
    def take(self, changes: Changes) -> None:
        """To be called in the transaction that keeps the entries."""
        self._removed, self._added = [], []
        for place, entry in changes.gone.items():
            if isinstance(entry, Shared):
                self._remove(place, entry.item, only_at=place.seq)
        for place, entry in changes.new.items():
            if isinstance(entry, Shared | Withdrawn):
                self._remove(place, entry.item)
            if isinstance(entry, Shared):
                self._add(place, entry)

    def settle(self) -> None:
        """To be called after that transaction."""
        for share, item in self._added:
            if share >= len(self._item_of_share):
                self._item_of_share = np.concatenate([self._item_of_share, np.zeros(share + 1, np.int64)])
            self._item_of_share[share] = self._log.item_index(item)
        for item in self._removed:
            self._log.release(item)
        self._removed, self._added = [], []

    def _add(self, place: Place, entry: Shared) -> None:
        words = words_of(entry)
        share = self._number()
        self._db.execute(
            "INSERT INTO shares VALUES (?, ?, ?, ?, ?, ?, ?)",
            (share, entry.item, place.feed, place.seq, entry.day, entry.kind, entry.size_bytes),
        )
        self._db.execute("INSERT INTO texts (rowid, text) VALUES (?, ?)", (share, " ".join(words)))
        self._added.append((share, entry.item))
        self._uncache(words)

    def _number(self) -> int:
        (number,) = self._db.execute("SELECT min(id) FROM free_shares").fetchone()
        if number is None:
            (number,) = self._db.execute("SELECT coalesce(max(id), 0) + 1 FROM shares").fetchone()
        else:
            self._db.execute("DELETE FROM free_shares WHERE id = ?", (number,))
        return int(number)

    def _remove(self, place: Place, item: bytes, *, only_at: int | None = None) -> None:
        row = self._db.execute(
            "SELECT id, seq, text FROM shares JOIN texts ON texts.rowid = id WHERE item = ? AND feed = ?",
            (item, place.feed),
        ).fetchone()
        if row is None or only_at not in (None, row[1]):
            return
        self._db.execute("DELETE FROM texts WHERE rowid = ?", (row[0],))
        self._db.execute("DELETE FROM shares WHERE id = ?", (row[0],))
        self._db.execute("INSERT INTO free_shares VALUES (?)", (row[0],))
        self._removed.append(item)
        self._uncache(row[2].split(" "))

    # --- by word ----------------------------------------------------------------------------------------
    def matching(self, word: str) -> Indices:
        """The numbers of the items that somebody describes with this word, ascending."""
        found = self._found.get(word)
        if found is None:
            found = self._matching(word)
            self._cache(word, found)
        else:
            self._found.move_to_end(word)
        return found

    def words(self, start: str, limit: int) -> list[str]:
        """Words of the catalogue that begin like this, in the order of their bytes."""
        rows = self._db.execute(
            "SELECT term FROM words WHERE term >= ? AND term < ? LIMIT ?", (start, start + _LAST, limit)
        )
        return [term for (term,) in rows]

    def _matching(self, word: str) -> Indices:
        rows = self._db.execute("SELECT rowid FROM texts WHERE texts MATCH ?", (_quoted(word),))
        shares = np.fromiter((row[0] for row in rows), np.int64)
        return distinct(self._item_of_share[shares])

    def best(self, words: Iterable[str], limit: int) -> tuple[Indices, NDArray[np.float64]]:
        """Items by BM25 over any of the words, of so many shares the best: their numbers, ascending, and relevance."""
        rows = self._db.execute(
            "SELECT rowid, -rank FROM texts WHERE texts MATCH ? ORDER BY rank LIMIT ?",
            (" OR ".join(map(_quoted, words)), limit),
        ).fetchall()
        shares = np.fromiter((row[0] for row in rows), np.int64, len(rows))
        items, places = np.unique(self._item_of_share[shares], return_inverse=True)
        relevance = np.zeros(len(items))
        np.maximum.at(relevance, places, np.fromiter((row[1] for row in rows), np.float64, len(rows)))
        return items, relevance

    def _cache(self, word: str, found: Indices) -> None:
        self._found[word] = found
        self._num_cached += len(found)
        while self._num_cached > MAX_CACHED:
            self._num_cached -= len(self._found.popitem(last=False)[1])

    def _uncache(self, words: Iterable[str]) -> None:
        for word in words:
            if (found := self._found.pop(word, None)) is not None:
                self._num_cached -= len(found)

    # --- by item ----------------------------------------------------------------------------------------
    def shares(self, item: bytes, *, first: bytes = b"") -> list[Share]:
        """The item as its sharers describe it: author `first`, then those of the kind and size that most say it has, then the
        newest; at most `MAX_SHARES`. One who speaks last cannot make something else of it for everybody."""
        found = list(map(_Row._make, self._db.execute(_SHARES, (item,))))
        alike = Counter((row.kind, row.size_bytes) for row in found)
        found.sort(
            key=lambda row: (row.author != first, -alike[row.kind, row.size_bytes], -row.day, row.author)
        )
        # The long texts are read of those alone that are told of: thousands may share one item.
        return [self._share(row) for row in found[:MAX_SHARES]]

    def _share(self, row: "_Row") -> Share:
        body, text = self._db.execute(_TEXTS, (row.feed, row.seq, row.id)).fetchone()
        entry = decode_entry(body)
        assert isinstance(entry, Shared)
        return Share(row.author, entry, frozenset(text.split(" ")))

    def claims(self, item: bytes) -> list[tuple[Kind, int]]:
        """Which kinds and sizes in bytes its sharers say that an item has, what most say first; at most `MAX_CLAIMS`."""
        return [
            (Kind(kind), size_bytes) for kind, size_bytes in self._db.execute(_CLAIMS, (item, MAX_CLAIMS))
        ]

    def items(self, author: bytes | None, limit: int, offset: int) -> list[Digest]:
        """Items that an author shares, the last said first; or all, by the day on which somebody last said so."""
        rows = self._db.execute(
            _ITEMS if author is None else _ITEMS_OF, {"author": author, "limit": limit, "offset": offset}
        )
        return [Digest(item) for (item,) in rows]

    def find(self, low: bytes, high: bytes, limit: int) -> list[Digest]:
        """Items between two digests, both included."""
        rows = self._db.execute(
            "SELECT DISTINCT item FROM shares WHERE item BETWEEN ? AND ? ORDER BY item LIMIT ?",
            (low, high, limit),
        )
        return [Digest(item) for (item,) in rows]

    def num_items(self) -> int:
        """Items that somebody shares."""
        (count,) = self._db.execute("SELECT count(DISTINCT item) FROM shares").fetchone()
        return int(count)


def distinct(*items: Indices) -> Indices:
    """Numbers of items, each once, ascending. Takes as long as there are items, which is faster than to sort many."""
    return np.flatnonzero(np.bincount(items[0] if len(items) == 1 else np.concatenate(items)))


def words_of(entry: Shared) -> list[str]:
    """All that an item can be found by, in order."""
    texts = (entry.title, entry.creator, *entry.tags, *(text for _, text in entry.details), entry.uri)
    return [word for text in texts for word in tokens(text)]


def _quoted(word: str) -> str:
    """A string of FTS5's query language, in which nothing has a meaning but the quotes."""
    return '"' + word.replace('"', '""') + '"'


class _Row(NamedTuple):
    """Of a share, but for its texts."""

    author: bytes
    kind: str
    size_bytes: int
    day: int
    feed: int
    seq: int
    id: int


_LAST = "\U0010ffff"
"""Comes after whatever else a word goes on with."""
_SHARES = """
SELECT author, kind, size_bytes, shares.day, shares.feed, seq, shares.id FROM shares JOIN feeds ON feeds.id = shares.feed
WHERE item = ?
"""
_TEXTS = (
    "SELECT body, text FROM entries, texts WHERE entries.feed = ? AND entries.seq = ? AND texts.rowid = ?"
)
_CLAIMS = """
SELECT kind, size_bytes FROM shares WHERE item = ? GROUP BY kind, size_bytes ORDER BY count(*) DESC, max(day) DESC LIMIT ?
"""
_ITEMS = "SELECT item FROM shares GROUP BY item ORDER BY max(day) DESC, item LIMIT :limit OFFSET :offset"
_ITEMS_OF = """
SELECT shares.item FROM shares JOIN feeds ON feeds.id = shares.feed WHERE feeds.author = :author
ORDER BY shares.seq DESC LIMIT :limit OFFSET :offset
"""
