"""From the words of a query to ranked results that say why they are there.

Candidates are the items that somebody describes with a word of the query. Where no such word is in the catalogue, words
that begin like them stand for them, also in what was clicked. The order is `aggregation/ranking.py`'s.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from aggregation.click_log import ClickLog, Entries
from aggregation.ranking import Query, Results, rank
from node.library_catalogue import Catalogue, Share, distinct
from node.library_clicks import ClickTables
from protocols.entries import Shared
from protocols.terms import tokens
from protocols.vocabulary import Digest

NUM_BY_TEXT = 500
"""Shares that are ordered by their text where no clicks tell more: nobody looks further down."""
MAX_STANDING_IN = 16
"""Words of the catalogue that stand for those of a query, all together."""


class Result(Struct, frozen=True):
    """One item that a search found, and why."""

    item: Digest
    entry: Shared
    """As that sharer describes it who has most of the query's words; of equals this node, then the newest."""
    rank: int
    """From 1."""
    score: float
    """The ranker's own; of use to compare results of one search."""
    matched: tuple[str, ...]
    """Of the query, the words that this entry holds, or has a word that begins so. Empty where only clicks brought it."""
    tags: tuple[str, ...]
    """Of the entry, those that hold such a word."""
    clicks: float
    """On this item for any of the query's words, this node's own among them."""
    clickers: int
    """Who made them."""
    similar_clicks: float
    """Those of them that others made who click like this node."""
    similar_peers: int
    similarity: float
    """Of the one among those who is most like this node: above 0, at most 1. 0 where there is none."""
    sharers: tuple[bytes, ...]
    """Keys of who shares it: this node first, then by the age of what they say of it."""


def search(
    catalogue: Catalogue,
    clicks: ClickTables,
    words: tuple[str, ...],
    *,
    ranker: str,
    isolation: float,
    limit: int,
) -> list[Result]:
    """The best of the items that somebody describes. What nobody describes is of no use to a person: it is left out."""
    meant = _meant(catalogue, words)
    terms = clicks.hashed(tuple(dict.fromkeys(word for group in meant.values() for word in group)))
    entries = clicks.log.entries(terms)
    query = _query(catalogue, clicks.log.me, meant, terms, by_text=ranker == "bm25" or not len(entries.item))
    # Only what nothing but clicks brought can be without a description, and it comes last.
    for most in (2 * limit, None):
        ranked = rank(ranker, clicks.log, query, isolation=isolation, limit=most)
        found = _described(catalogue, clicks, ranked, limit)
        if len(found) == limit or most is None or len(ranked.items) < most:
            break
    support = _support(clicks.log, entries, [index for index, _, _ in found])
    return [
        _result(place, shares, score, meant, why)
        for place, ((_, score, shares), why) in enumerate(zip(found, support, strict=True), 1)
    ]


def _meant(catalogue: Catalogue, words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """For each word of the query those of the catalogue: itself, or, where none is there, those that begin so."""
    if any(len(catalogue.matching(word)) for word in words):
        return {word: (word,) for word in words}
    most = MAX_STANDING_IN // len(words)
    return {word: tuple(catalogue.words(word, most)) or (word,) for word in words}


def _query(
    catalogue: Catalogue,
    me: bytes,
    meant: dict[str, tuple[str, ...]],
    terms: tuple[str, ...],
    *,
    by_text: bool,
) -> Query:
    found = [distinct(*(catalogue.matching(word) for word in group)) for group in meant.values()]
    counts = np.bincount(np.concatenate(found))
    matching = np.flatnonzero(counts)
    num_matched = counts[matching]
    relevance = None
    if by_text and len(matching):
        best, relevance = catalogue.best([word for group in meant.values() for word in group], NUM_BY_TEXT)
        matching, num_matched = best, num_matched[np.searchsorted(matching, best)]
    # Where nothing tells results apart, each node has an order of its own, and keeps to it.
    seed = int.from_bytes(hashlib.sha256(me + " ".join(sorted(terms)).encode()).digest()[:4], "big")
    return Query(terms, matching, num_matched, relevance, seed)


def _described(
    catalogue: Catalogue, clicks: ClickTables, ranked: Results, limit: int
) -> list[tuple[int, float, list[Share]]]:
    found: list[tuple[int, float, list[Share]]] = []
    # What was clicked and nobody describes is not even looked for: there is no end of it where somebody means ill.
    known = clicks.log.are_held(ranked.items)
    for index, score in zip(ranked.items[known].tolist(), ranked.scores[known].tolist(), strict=True):
        if len(found) == limit:
            break
        if shares := catalogue.shares(clicks.log.item_of(index), first=clicks.log.me):
            found.append((index, score, shares))
    return found


class _Support(NamedTuple):
    """What speaks for a result. See `Result`."""

    clicks: float
    clickers: int
    similar_clicks: float
    similar_peers: int
    similarity: float


def _support(log: ClickLog, entries: Entries, items: Sequence[int]) -> list[_Support]:
    """Whose clicks speak for each of these items, in sums."""
    place = np.full(log.num_items, -1)
    place[items] = np.arange(len(items))
    here = place[entries.item] >= 0
    at, author, clicks = place[entries.item[here]], entries.author[here], entries.clicks[here]
    # An author has a row for each term: it is counted once.
    pairs = np.unique(np.stack((at, author)), axis=1)
    own = log.me
    me = [a for a in np.unique(author).tolist() if log.author_of(a) == own]
    similarity = log.factors(0.0)
    similarity[me] = 0.0
    most = np.zeros(len(items))
    np.maximum.at(most, at, similarity[author])
    alike = similarity[pairs[1]] > 0
    columns = (
        np.bincount(at, clicks, len(items)),
        np.bincount(pairs[0], minlength=len(items)),
        np.bincount(at, clicks * (similarity[author] > 0), len(items)),
        np.bincount(pairs[0][alike], minlength=len(items)),
        most,
    )
    return [_Support(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _result(
    place: int, shares: Sequence[Share], score: float, meant: dict[str, tuple[str, ...]], why: _Support
) -> Result:
    matched = [_matched(meant, share.words) for share in shares]
    best = max(range(len(shares)), key=lambda at: len(matched[at]))
    entry = shares[best].entry
    return Result(
        item=Digest(entry.item),
        entry=entry,
        rank=place,
        score=score,
        matched=matched[best],
        tags=tuple(tag for tag in entry.tags if _matched(meant, frozenset(tokens(tag)))),
        clicks=why.clicks,
        clickers=why.clickers,
        similar_clicks=why.similar_clicks,
        similar_peers=why.similar_peers,
        similarity=why.similarity,
        sharers=tuple(share.author for share in shares),
    )


def _matched(meant: dict[str, tuple[str, ...]], text: frozenset[str]) -> tuple[str, ...]:
    """The words of the query that are in a text."""
    return tuple(word for word, group in meant.items() if not text.isdisjoint(group))
