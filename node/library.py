"""What a node has heard of shared content and of clicks, in one file, and the search over it.

`library.db` holds the feeds' entries (`library_feeds.py`), what is shared and its words (`library_catalogue.py`), and the
operator's own clicks with a snapshot of the click log (`library_clicks.py`). A search reads nothing else
(`library_search.py`): it works without a network. How results are ordered is said in `aggregation/ranking.py`.
"""

import math
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
from msgspec import Struct

from aggregation.ranking import RANKERS
from node import library_catalogue, library_clicks, library_feeds
from node.config import ContentConfig
from node.library_catalogue import Catalogue
from node.library_clicks import ClickTables, OwnClick
from node.library_feeds import FeedTables, transaction
from node.library_search import Result, search
from protocols.entries import Feed, Head, Kind, Shared
from protocols.errors import ConfigError, LocalError
from protocols.events import KeepEntries, Recall, Recalled
from protocols.terms import query_terms
from protocols.vocabulary import MAX_TERMS, Digest

DATABASE = "library.db"
BUSY_TIMEOUT_S = 10.0
CACHE_KIB = 64 * 1024
WAL_PAGES = 4096
"""Pages are put in their places this many at a time: of entries by many authors most go to places of their own."""
MAX_FOUND = 32
"""Items named for the beginning of a digest."""


class Counts(Struct, frozen=True):
    """How much a library holds. authors: of either feed. items: that somebody shares. size_bytes: of its file."""

    entries: int
    authors: int
    items: int
    clicks: int
    own_clicks: int
    size_bytes: int


class Library:
    """One node's library. Used from any thread: each call is whole.

    Args:
        home: the folder of `library.db`.
        me: this node's raw public key. What it has published itself is synced to the disk: after a power failure it must
            not say something else under the same number. What others said would come from them again.
        network: whose salt the clicks' terms are hashed with.
        warn: told in a line of what is repaired.

    Raises LocalError where the file cannot be opened, read or written.
    """

    def __init__(
        self,
        home: Path,
        me: bytes,
        network: str,
        settings: ContentConfig | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._path = home / DATABASE
        self._me = me
        self._settings = settings or ContentConfig()
        self._lock = threading.RLock()
        self._db = _opened(self._path)
        try:
            with self._whole():
                self._feeds = FeedTables(self._db, me)
                self._clicks = ClickTables(
                    self._db,
                    me,
                    network,
                    top_terms=self._settings.top_terms,
                    by_position=self._settings.position_weights,
                    warn=warn,
                )
                self._catalogue = Catalogue(self._db, self._clicks.log)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Keeps a snapshot, so that the next start takes no time."""
        with self._lock:
            # Without one the next start reads the entries.
            with suppress(sqlite3.Error):
                self._clicks.save_if_new()
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what the core asks -----------------------------------------------------------------------------
    def heads(self) -> tuple[tuple[Feed, tuple[Head, ...]], ...]:
        """Where the feeds stand, for `protocols.events.Started`."""
        with self._whole():
            return tuple((feed, self._feeds.heads(feed)) for feed in Feed)

    def keep(self, effect: KeepEntries) -> None:
        """See `protocols.events.KeepEntries`. All of it or nothing: where the disk refuses, or has refused what came before."""
        own = self._me in {batch.author for batch in effect.batches} | {cut.author for cut in effect.cuts}
        with self._whole():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if own else 'NORMAL'}")
            with transaction(self._db):
                changes = self._feeds.keep(effect)
                self._catalogue.take(changes)
                self._clicks.mark(changes)
            self._catalogue.settle()
            self._clicks.take(changes)
            self._clicks.save_if_due()

    def recall(self, effect: Recall) -> Recalled:
        """See `protocols.events.Recall`."""
        with self._whole():
            return Recalled(effect.token, self._feeds.recall(effect))

    # --- search -----------------------------------------------------------------------------------------
    def search(
        self, text: str, limit: int = 20, ranker: str | None = None, isolation: float | None = None
    ) -> list[Result]:
        """What is found for a query, best first. Items that clicks name and nobody describes are left out.

        Raises ConfigError where there is no such ranker, or `isolation` is no number of at least 0.
        """
        name = self._settings.ranker if ranker is None else ranker
        if isolation is None:
            isolation = self._settings.isolation
        if name not in RANKERS:
            raise ConfigError("ranker", f"there is no ranker called '{name}'", RANKERS)
        if not (math.isfinite(isolation) and isolation >= 0):
            raise ConfigError("isolation", f"{isolation} is no number of at least 0")
        words = query_terms(text)
        if not words:
            return []
        with self._whole():
            return search(self._catalogue, self._clicks, words, ranker=name, isolation=isolation, limit=limit)

    # --- the operator's own -----------------------------------------------------------------------------
    def click(self, terms: Sequence[str], item: bytes, rank: int, at_s: float) -> None:
        """The operator chose the item at this rank (from 1) among the results for these words. Private, and counts at once.

        Raises ValueError for no words, or a rank below 1.
        """
        if not terms or rank < 1:
            raise ValueError(f"a click is for at least one word and at a rank from 1, not {terms} at {rank}")
        with self._whole():
            self._clicks.click(OwnClick(at_s, tuple(terms)[:MAX_TERMS], Digest(item), rank))

    def history(self, limit: int = 100) -> list[OwnClick]:
        """The operator's last clicks, the newest first."""
        with self._whole():
            return self._clicks.history(limit)

    def forget(self) -> None:
        """Own clicks are gone, and with them what they did to the ranking. What was published is the core's matter."""
        with self._whole():
            self._clicks.forget()

    # --- what is held -----------------------------------------------------------------------------------
    def entry(self, item: bytes) -> Shared | None:
        """The item as to be shown: as this node shares it, or else as most do, and of those the newest."""
        with self._whole():
            shares = self._catalogue.shares(item, first=self._me)
        return shares[0].entry if shares else None

    def claims(self, item: bytes) -> list[tuple[Kind, int]]:
        """Which kinds and sizes in bytes its sharers say that an item has, what most say first."""
        with self._whole():
            return self._catalogue.claims(item)

    def sharers(self, item: bytes) -> list[bytes]:
        """The keys of who shares an item, those of `entry` first."""
        with self._whole():
            return [share.author for share in self._catalogue.shares(item, first=self._me)]

    def items(self, author: bytes | None = None, limit: int = 100, offset: int = 0) -> list[Digest]:
        """What an author shares, the last said first; or anybody, by the day on which somebody last said so."""
        with self._whole():
            return self._catalogue.items(author, limit, offset)

    def find(self, prefix: str) -> list[Digest]:
        """Shared items whose digest begins with these hexadecimal digits, at most `MAX_FOUND`."""
        if not re.fullmatch("[0-9a-fA-F]{1,64}", prefix):
            return []
        low, high = (bytes.fromhex(prefix.ljust(64, filler)) for filler in "0f")
        with self._whole():
            return self._catalogue.find(low, high, MAX_FOUND)

    def counts(self) -> Counts:
        """How much is held."""
        with self._whole():
            return Counts(
                entries=self._feeds.num_entries(),
                authors=self._feeds.num_authors(),
                items=self._catalogue.num_items(),
                clicks=self._clicks.log.num_clicks,
                own_clicks=self._clicks.num_own(),
                size_bytes=sum(path.stat().st_size for path in self._path.parent.glob(DATABASE + "*")),
            )

    # --- the file ---------------------------------------------------------------------------------------
    @contextmanager
    def _whole(self) -> Iterator[None]:
        """One call at a time; what SQLite says in words for the operator."""
        with self._lock:
            try:
                yield
            except _DAMAGE as error:
                raise LocalError(f"{self._path} cannot be read or written ({error}); {_REMEDY}") from error


def _opened(path: Path) -> sqlite3.Connection:
    """What the operator searched for is in it, so that only its owner may read it."""
    try:
        path.touch(mode=0o600)
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise LocalError(f"{path} cannot be opened ({error}); {_REMEDY}") from error
    try:
        for pragma in _PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
        for module in (library_feeds, library_catalogue, library_clicks):
            db.executescript(module.TABLES)
    except _DAMAGE as error:
        db.close()
        raise LocalError(f"{path} is damaged ({error}); {_REMEDY}") from error
    return db


_PRAGMAS = (
    "journal_mode = WAL",
    f"wal_autocheckpoint = {WAL_PAGES}",
    f"cache_size = -{CACHE_KIB}",
    "secure_delete = ON",  # what is forgotten is not in the file's free pages either
)
# SQLite does not check what it reads: of a damaged file anything may come.
_DAMAGE = (sqlite3.Error, msgspec.MsgspecError, UnicodeDecodeError)
_REMEDY = "is the disk full? A damaged file has to be moved away: what others said is heard again"
