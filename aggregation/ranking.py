"""G-Rank: search results ordered by the clicks of those who click like you (arXiv 2301.12530), and rankers to compare.

Belongs here: scores from a log of clicks, and the order that follows. Which items' metadata match a query, and how well
their text does, the caller says. Nothing is read but the log: a query needs no network.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aggregation.click_log import ClickLog as ClickLog
from aggregation.click_log import Entries
from aggregation.click_log import position_weight as position_weight
from aggregation.click_rows import F64, I64

DEFAULT_ISOLATION = 0.001
"""F: what a click counts beside the similarity of who made it. With 0 only those like you count; with 1 nearly all do. So
little of it decides where nobody like you has clicked, as for a newcomer, and hardly anywhere else: the more nodes there
are, the less of it a minority bears (`benchmarks/personal.py`)."""


class Query(NamedTuple):
    """A query, and what the catalogue says of it.

    terms: the words. matching: int64 [n] indices of the items whose metadata hold at least one of them, each once.
    num_matched: int64 [n] how many of the words each of those holds. relevance: float64 [n] of its text, higher is better.
    seed: of the order where nothing else tells items apart and there are no clicks.
    """

    terms: tuple[str, ...]
    matching: I64
    num_matched: I64
    relevance: F64 | None = None
    seed: int = 0


class Results(NamedTuple):
    """Ranked items, best first, [m] each. num_matched: how many of the query's words the metadata hold; 0 for an item
    that is here for its clicks alone."""

    items: I64
    scores: F64
    num_matched: I64


Ranker = Callable[["ClickLog", Entries, int, float], F64]
"""Scores [num_terms, num_items] from the rows of `num_terms` terms; the last argument is F."""


# --- rankers --------------------------------------------------------------------------------------------
def _summed(log: ClickLog, entries: Entries, num_terms: int, clicks: F64) -> F64:
    keys = entries.term * np.int64(log.num_items) + entries.item
    sums: F64 = np.bincount(keys, clicks, num_terms * log.num_items).astype(np.float64, copy=False)
    return sums.reshape(num_terms, log.num_items)


def g_rank(log: ClickLog, entries: Entries, num_terms: int, isolation: float) -> F64:
    """sum over authors j of clicks_j (S(j) + F). Source: arXiv 2301.12530, section 3."""
    return _summed(log, entries, num_terms, entries.clicks * log.factors(isolation)[entries.author])


def g_rank_capped(log: ClickLog, entries: Entries, num_terms: int, isolation: float) -> F64:
    """`g_rank`, in which an author counts at most once for a term and item: clicking again gains nothing."""
    return g_rank(log, entries._replace(clicks=np.minimum(entries.clicks, 1.0)), num_terms, isolation)


def popularity(log: ClickLog, entries: Entries, num_terms: int, _: float) -> F64:
    """All clicks on the item for the term, whoever made them."""
    return _summed(log, entries, num_terms, entries.clicks)


def panache(log: ClickLog, entries: Entries, num_terms: int, _: float) -> F64:
    """Hits of the keyword on the item: the authors who went from the one to the other, however often."""
    return _summed(log, entries, num_terms, np.ones(len(entries.clicks)))


def maay(log: ClickLog, entries: Entries, num_terms: int, _: float) -> F64:
    """REL POP match, where an item's votes v for words w are the clicks on it.

        REL = v(w) / all of the item's votes    POP = v(w) / all items' votes for w    match = sum over words u of REL(u) SP(u)
        SP(u) = the part of `me`'s clicks that are for u

    Reads the whole log. All is 0 for a node that has never clicked.
    """
    votes = popularity(log, entries, num_terms, 0.0)
    everything, own = log.entries(), log.own_counts()
    of_items = np.bincount(everything.item, everything.clicks, log.num_items)
    matching = np.bincount(everything.item, everything.clicks * own[everything.term], log.num_items)
    below = of_items**2 * votes.sum(axis=1, keepdims=True) * own.sum()
    found: F64 = np.divide(votes**2 * matching, below, out=np.zeros_like(votes), where=below > 0)
    return found


def bm25(log: ClickLog, _: Entries, num_terms: int, __: float) -> F64:
    """No clicks at all: `rank` takes the query's relevance for the score."""
    return np.zeros((num_terms, log.num_items))


RANKERS: dict[str, Ranker] = {
    "g-rank": g_rank,
    "g-rank-capped": g_rank_capped,
    "popularity": popularity,
    "panache": panache,
    "maay": maay,
    "bm25": bm25,
}


def scores(name: str, log: ClickLog, terms: Sequence[str], isolation: float = DEFAULT_ISOLATION) -> F64:
    """What ranker `name` makes of every item for each of `terms`: [terms, items]. A term twice gets its row twice.

    Raises ValueError for a ranker that is none of RANKERS, or an isolation that is no number of at least 0.
    """
    ranker = _ranker(name, isolation)
    distinct = list(dict.fromkeys(terms))
    found = ranker(log, log.entries(distinct), len(distinct), isolation)
    return found if len(distinct) == len(terms) else found[[distinct.index(term) for term in terms]]


def _ranker(name: str, isolation: float) -> Ranker:
    if name not in RANKERS:
        raise ValueError(f"ranker must be one of {', '.join(RANKERS)}, not {name!r}")
    if not (math.isfinite(isolation) and isolation >= 0):
        raise ValueError(f"isolation must be a number of at least 0, not {isolation}")
    return RANKERS[name]


# --- the order ------------------------------------------------------------------------------------------
def rank(
    name: str, log: ClickLog, query: Query, isolation: float = DEFAULT_ISOLATION, limit: int | None = None
) -> Results:
    """The results of a query, best first: what matches it, and what was clicked for it.

    Items whose metadata hold more of the query's words come first, whatever the clicks: those without any come last. Then
    the higher score, summed over the query's terms; then the higher relevance, where the query has that; then the item whose
    bytes are lower. An item that no metadata name is a result only where its score is above 0.

    With no click on record for any of the terms, and for `bm25` always, the score is the relevance, and items that are
    equal in it come in an order drawn from the query's seed: of the item's bytes and the seed alone, so that nodes agree.

    limit: at most so many results. Raises ValueError as `scores` does.

    Source: arXiv 2301.12530, section 3; relevance and more than one word are ours.
    """
    ranker = _ranker(name, isolation)
    terms = tuple(dict.fromkeys(query.terms))
    entries = log.entries(() if ranker is bm25 else terms)
    clicked_for = len(entries.item) > 0
    total = _total(ranker, log, entries, len(terms), isolation) if clicked_for else np.zeros(log.num_items)
    relevance = np.zeros(len(query.matching)) if query.relevance is None else query.relevance
    score = total[query.matching] if clicked_for else relevance
    total[query.matching] = 0.0
    others = np.flatnonzero(total > 0)
    keys = (
        np.concatenate((query.num_matched, np.zeros(len(others), dtype=np.int64))),
        np.concatenate((score, total[others])),
        np.concatenate((relevance, np.zeros(len(others)))),
    )
    items = np.concatenate((query.matching, others))

    def tie(item: int) -> bytes:
        return log.item_of(item) if clicked_for else _drawn(query.seed, log.item_of(item))

    order = _ordered(items, keys, len(items) if limit is None else limit, tie)
    return Results(items[order], keys[1][order], keys[0][order])


def _total(ranker: Ranker, log: ClickLog, entries: Entries, num_terms: int, isolation: float) -> F64:
    """Scores summed over terms: [items]. All but `maay` only sum, so that no table of terms and items is needed for them."""
    if ranker is not maay:
        entries, num_terms = entries._replace(term=np.zeros_like(entries.term)), 1
    total: F64 = ranker(log, entries, num_terms, isolation).sum(axis=0)
    return total


def _drawn(seed: int, item: bytes) -> bytes:
    return hashlib.blake2b(b"%d " % seed + item, digest_size=16).digest()


def _ordered(items: I64, keys: Sequence[NDArray[Any]], limit: int, tie: Callable[[int], bytes]) -> I64:
    """Places of the best `limit` items by keys, the first key first, each falling; equal ones by `tie`, rising."""
    at = _candidates(keys, limit)
    at = at[np.lexsort([-key[at] for key in reversed(keys)])]
    differs = np.zeros(max(len(at) - 1, 0), dtype=bool)
    for key in keys:
        differs |= key[at][1:] != key[at][:-1]
    edges = np.concatenate(([0], np.flatnonzero(differs) + 1, [len(at)]))
    runs = np.flatnonzero((np.diff(edges) > 1) & (edges[:-1] < limit))
    for start, stop in zip(edges[runs].tolist(), edges[runs + 1].tolist(), strict=True):
        at[start:stop] = sorted(at[start:stop].tolist(), key=lambda place: tie(int(items[place])))
    return at[:limit]


def _candidates(keys: Sequence[NDArray[Any]], limit: int) -> I64:
    """Places among which the best `limit` are: those, and what equals the last of them in all keys. No full sort is needed."""
    rest, chosen = np.arange(len(keys[0])), []
    for key in keys:
        if len(rest) <= limit:
            break
        values = key[rest]
        cut = np.partition(values, len(rest) - limit)[len(rest) - limit] if limit else np.inf
        above = values > cut
        chosen.append(rest[above])
        limit -= int(above.sum())
        rest = rest[values == cut]
    return np.concatenate([*chosen, rest])
