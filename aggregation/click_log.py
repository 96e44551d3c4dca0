"""Who clicked what for which term, as far as one node knows, and how like that node each of them is.

Belongs here: the log, and what it keeps up to date with each click. What order of results follows is said in `ranking.py`;
who told of a click is the caller's matter.

How fast: a click costs about a microsecond for each of its terms, and a query reads the rows of its terms alone. A log
that is loaded stays in arrays; what changes of it is taken apart author by author, when that author's first new click
comes.
"""

import math
from array import array
from collections.abc import Sequence
from heapq import nsmallest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aggregation.click_rows import (
    EMPTY,
    F64,
    I64,
    WEIGHT_GRAIN,
    Arrays,
    Groups,
    Rows,
    no_rows,
    numbered,
    packed,
    unjoined,
    view,
)

Numbers = NDArray[np.integer[Any]]

FACTOR_GRAIN = 2.0**-30
"""What a click of an author counts is a multiple of this. With `WEIGHT_GRAIN` it makes sums of clicks exact, so that the
order in which clicks were heard of changes no score."""
MAX_WEIGHT = 2.0**16

_SPARSE = 4
"""The rows of some terms are gathered one by one while they are less than one in this many, else all are read through."""
_MAX_DEAD = 4096
"""Rows of clicks that were taken back, which are kept at any rate."""
_UNSETTLED = -2


class Entries(NamedTuple):
    """Rows of a log: author `author[r]` clicked item `item[r]` for the `term[r]`-th of the terms asked for, `clicks[r]` times."""

    term: Numbers
    author: Numbers
    item: Numbers
    clicks: F64


def position_weight(rank: int) -> float:
    """What a click on the result at `rank` (from 1) says: log2(rank + 1), for whoever looks that far down has looked.

    It is the inverse of the propensity 1 / log2(rank + 1) with which a result is seen at all. An option: the paper counts
    each click once, wherever it was made.

    >>> position_weight(1), position_weight(7)
    (1.0, 3.0)
    """
    return math.log2(rank + 1)


class _Author:
    """What one author clicked, taken apart: `rows` and `items` count for similarity, `counts` for the frequent terms."""

    __slots__ = ("counts", "items", "rows", "top", "weakest")

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}  # term and item in one number, to the row
        self.items: dict[int, int] = {}  # to how many rows of this author hold it
        self.counts: dict[int, float] = {}  # clicks for a term
        self.top: dict[int, int] = {}  # the most frequent terms, to their place in the log's table
        self.weakest = EMPTY  # of `top`, once that is full; or _UNSETTLED


class ClickLog:
    """Who clicked what for which term, as far as node `me` knows, and how like `me` each of them is.

        S(j) = (kt + km^2) / ku     kt: terms that are among the `top_terms` most frequent both of me and of j
                                    km, ku: items that both, or at least one of us, have clicked, whatever the term

    divided by the largest over the others. S is 0 where neither has clicked anything. `me` itself counts as the largest, 1.
    Of terms equally frequent the smaller one comes first.

    A click of weight w counts like w clicks, everywhere; it has to be above 0 and is rounded to WEIGHT_GRAIN. Of terms that
    one click names twice the second is ignored.

    Authors, items and terms are numbered as they come. An item keeps its number while it has clicks or somebody holds it by
    `item_index`, and through `to_arrays`; then another gets it. Not for more than one thread at a time.

    Source: arXiv 2301.12530, section 3, in the words of its author's thesis.
    """

    def __init__(self, me: bytes, *, top_terms: int = 10) -> None:
        if top_terms < 1:
            raise ValueError(f"top_terms must be at least 1, not {top_terms}")
        self._me_key = me
        self._top_terms = top_terms
        self._similarity: F64 | None = None
        self._load([me], [], [], no_rows(), np.zeros(1, dtype=np.int64))

    # -- what it holds
    @property
    def me(self) -> bytes:
        """The author whose log this is."""
        return self._me_key

    @property
    def num_items(self) -> int:
        """One more than the highest number of an item; not all of them need to have clicks."""
        return len(self._items)

    @property
    def num_clicks(self) -> int:
        """How often `add` was called, less what was taken back."""
        return sum(self._num_clicks)

    def item_index(self, item: bytes) -> int:
        """The number of an item (not empty), which it gets now if it has none, and keeps until `release` was called as often."""
        index = self._numbered(item)
        self._num_holds[index] += 1
        return index

    def release(self, item: bytes) -> None:
        """Takes one call of `item_index` back."""
        index = self._item_of[item]
        self._num_holds[index] -= 1
        self._let_go(index)

    def are_held(self, items: Numbers) -> NDArray[np.bool_]:
        """Which of these numbers somebody holds by `item_index`, whatever was clicked: [len(items)]."""
        return np.asarray(view(self._num_holds)[items] > 0)

    def item_of(self, index: int) -> bytes:
        """The item of a number; empty where none has it now."""
        return self._items[index]

    def _numbered(self, item: bytes) -> int:
        index = self._item_of.get(item)
        if index is None and self._free:
            index = self._item_of[item] = self._free.pop()
            self._items[index] = item
        elif index is None:
            index = self._item_of[item] = len(self._items)
            self._items.append(item)
            self._num_rows.append(0)
            self._num_holds.append(0)
        return index

    def _let_go(self, index: int) -> None:
        """Another may have the number of an item that has neither clicks nor holder: there is no end of items to click."""
        if not self._num_rows[index] and not self._num_holds[index]:
            del self._item_of[self._items[index]]
            self._items[index] = b""
            self._free.append(index)

    # -- changes
    def add(self, author: bytes, terms: Sequence[str], item: bytes, weight: float = 1.0) -> None:
        """`author` clicked `item` among the results for `terms`. Raises ValueError for no term, or a weight out of range."""
        if len(terms) != 1:
            terms = _distinct(terms)
        if weight != 1.0:
            weight = _grained(weight)
        a = self._author_of.get(author)
        if a is None:
            a = self._new_author(author)
        i = self._item_of.get(item)
        if i is None:
            i = self._numbered(item)
        state = self._states[a] or self._taken_apart(a)
        self._similarity = None
        self._num_clicks[a] += 1
        counts, top, clicks = state.counts, state.top, self._clicks
        for term in terms:
            t = self._term_of.get(term)
            if t is None:
                t = self._new_term(term)
            row = state.rows.get(t << 32 | i)
            if row is None or not clicks[row]:
                row = self._row_begins(a, state, t, i, row)
            clicks[row] += weight
            count = counts[t] = counts.get(t, 0.0) + weight
            if t in top:
                if t == state.weakest:
                    state.weakest = self._weakest(state)
            elif self._is_promoted(state, t, count):
                self._promote(a, state, t)

    def remove(self, author: bytes, terms: Sequence[str], item: bytes, weight: float = 1.0) -> None:
        """Takes a click back, as if it had never been added. Raises ValueError, and changes nothing, if it was not."""
        terms, weight = _distinct(terms), _grained(weight)
        a, i = self._author_of.get(author, EMPTY), self._item_of.get(item, EMPTY)
        numbers = [self._term_of.get(term, EMPTY) for term in terms]
        state = _Author() if a == EMPTY else self._states[a] or self._taken_apart(a)
        rows = [state.rows.get(t << 32 | i, EMPTY) for t in numbers]
        if any(row == EMPTY or self._clicks[row] < weight for row in rows):
            raise ValueError("this click is not in the log")
        self._similarity = None
        self._num_clicks[a] -= 1
        for t, row in zip(numbers, rows, strict=True):
            self._clicks[row] -= weight
            state.counts[t] -= weight
            if not self._clicks[row]:
                self._row_ends(a, state, i)
            if not state.counts[t]:
                del state.counts[t]
        if any(t in state.top for t in numbers):
            self._unsettle(a, state)
        self._tidy()

    def drop(self, author: bytes) -> None:
        """Takes all clicks of an author back. One that has none is no error."""
        a = self._author_of.get(author)
        if a is None:
            return
        state = self._states[a] or self._taken_apart(a)
        self._similarity = None
        for row in state.rows.values():
            if self._clicks[row]:
                self._clicks[row] = 0.0
                self._row_dies(self._row_items[row])
        state = self._states[a] = _Author()
        self._num_clicks[a] = self._num_clicked[a] = 0
        if a == self._me:
            self._num_common = array("i", bytes(4 * len(self._authors)))
        self._num_common[a] = 0
        self._unsettle(a, state)
        self._tidy()

    # -- what it says
    def similarities(self, normalised: bool = True) -> dict[bytes, float]:
        """S of all others who have clicked anything; not `normalised`: before the division by the largest."""
        values = (self._similarity_vector() if normalised else self._raw_similarity()).tolist()
        return {
            key: values[a] for a, key in enumerate(self._authors) if a != self._me and self._num_clicks[a]
        }

    def entries(self, terms: Sequence[str] | None = None) -> Entries:
        """The rows of distinct `terms`, in an order that may be any; None: of all terms, by their own numbers."""
        clicks = view(self._clicks)
        columns = [view(column) for column in (self._row_terms, self._row_authors, self._row_items)]
        if terms is None:
            kept = clicks > 0
            term, author, item = (column[kept] for column in columns)
            return Entries(term, author, item, clicks[kept])
        numbers = [self._term_of.get(term, EMPTY) for term in terms]
        rows = [self._by_term.rows(t) if t != EMPTY else np.zeros(0, dtype=np.int64) for t in numbers]
        if _SPARSE * sum(map(len, rows)) < len(clicks):
            at = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
            local = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
            kept = clicks[at] > 0
            at, local = at[kept], local[kept]
            return Entries(local, columns[1][at], columns[2][at], clicks[at])
        place = np.full(len(self._term_names), EMPTY)
        for k, t in enumerate(numbers):
            if t != EMPTY:
                place[t] = k
        local = place[columns[0]]
        kept = (local != EMPTY) & (clicks > 0)
        return Entries(local[kept], columns[1][kept], columns[2][kept], clicks[kept])

    # -- to keep it
    def to_arrays(self, *, all_items: bool = True) -> dict[str, NDArray[Any]]:
        """All of it but `me`, as numpy arrays of numbers: what `from_arrays` takes. Items keep their numbers, unless those
        without clicks are left out: not `all_items`.

        authors, items, terms: uint8, the names one after the other (terms in UTF-8), with `*_ends`: int64, where each ends.
        row_terms, row_authors, row_items: int32 [rows], in ascending order and distinct; row_clicks: float64 [rows], above 0.
        num_clicks: int64 [authors], calls of `add` for each.
        """
        term, author, item, clicks = self.entries()
        used_authors = np.flatnonzero(view(self._num_clicks))
        used_terms = np.flatnonzero(np.bincount(term, minlength=1))
        used_items = np.arange(len(self._items)) if all_items else np.flatnonzero(view(self._num_rows))
        author, term = np.searchsorted(used_authors, author), np.searchsorted(used_terms, term)
        item = item if all_items else np.searchsorted(used_items, item)
        order = np.lexsort((item, author, term))
        names = {
            "authors": [self._authors[a] for a in used_authors.tolist()],
            "items": [self._items[i] for i in used_items.tolist()],
            "terms": [self._term_names[t].encode() for t in used_terms.tolist()] if len(term) else [],
        }
        arrays: dict[str, NDArray[Any]] = {}
        for name, each in names.items():
            arrays[name] = np.frombuffer(b"".join(each), dtype=np.uint8)
            arrays[f"{name}_ends"] = np.cumsum([len(one) for one in each], dtype=np.int64)
        for name, column in (("row_terms", term), ("row_authors", author), ("row_items", item)):
            arrays[name] = column[order].astype(np.int32)
        return arrays | {
            "row_clicks": clicks[order],
            "num_clicks": np.array(self._num_clicks, dtype=np.int64)[used_authors],
        }

    @classmethod
    def from_arrays(cls, me: bytes, arrays: Arrays, *, top_terms: int = 10) -> "ClickLog":
        """The log of `to_arrays`, for any `me`. Raises ValueError for arrays that no log would give."""
        log = cls(me, top_terms=top_terms)
        try:
            log._restore(arrays)
        except (KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"not the arrays of a click log: {error}") from error
        return log

    def _restore(self, arrays: Arrays) -> None:
        authors, items, terms = (unjoined(arrays, name) for name in ("authors", "items", "terms"))
        rows = Rows(*(np.ascontiguousarray(arrays[f"row_{name}"]) for name in Rows._fields))
        rows.require(len(terms), len(authors), len(items))
        num_clicks = np.asarray(arrays["num_clicks"])
        if num_clicks.shape != (len(authors),) or num_clicks.dtype != np.int64 or (num_clicks < 0).any():
            raise ValueError("not the arrays of a click log: num_clicks")
        if self._me_key not in authors:
            authors.append(self._me_key)
            num_clicks = np.append(num_clicks, 0)
        self._load(authors, items, [term.decode() for term in terms], rows, num_clicks)

    def _load(
        self, authors: list[bytes], items: list[bytes], terms: list[str], rows: Rows, num_clicks: I64
    ) -> None:
        self._authors, self._items, self._term_names = authors, items, terms
        self._author_of, self._item_of, self._term_of = numbered(authors), numbered(items), numbered(terms)
        self._item_of.pop(b"", None)
        self._free = [index for index, item in enumerate(items) if not item]
        self._num_rows = packed("i", np.bincount(rows.items, minlength=len(items)))
        self._num_holds = array("i", bytes(4 * len(items)))
        if (
            len(self._author_of) < len(authors)
            or len(self._item_of) + len(self._free) < len(items)
            or len(self._term_of) < len(terms)
        ):
            raise ValueError("not the arrays of a click log: a name twice")
        if any(self._num_rows[index] for index in self._free):
            raise ValueError("not the arrays of a click log: clicks on no item")
        self._me = self._author_of[self._me_key]
        self._states: list[_Author | None] = [None] * len(authors)
        self._row_terms, self._row_authors, self._row_items = (packed("i", column) for column in rows[:3])
        self._clicks = packed("d", rows.clicks)
        self._num_dead = 0
        self._by_term = Groups(rows.terms, len(terms))
        self._by_author = Groups(rows.authors, len(authors))
        self._num_clicks = packed("q", num_clicks)
        clicked, common = rows.clicked_and_common(len(authors), len(items), self._me)
        self._num_clicked, self._num_common = packed("i", clicked), packed("i", common)
        self._top = packed("i", rows.top_terms(len(authors), terms, self._top_terms))
        self._similarity = None
        self._unsettled = set[int]()

    # -- what changes with a click
    def _new_author(self, author: bytes) -> int:
        a = self._author_of[author] = len(self._authors)
        self._authors.append(author)
        self._states.append(_Author())
        for counted in (self._num_clicks, self._num_clicked, self._num_common):
            counted.append(0)
        self._top.extend([EMPTY] * self._top_terms)
        return a

    def _new_term(self, term: str) -> int:
        t = self._term_of[term] = len(self._term_names)
        self._term_names.append(term)
        return t

    def _taken_apart(self, a: int) -> _Author:
        """An author as of the arrays that were loaded: nothing of it has changed since."""
        state = self._states[a] = _Author()
        for row in self._by_author.rows(a).tolist():
            t, i = self._row_terms[row], self._row_items[row]
            state.rows[t << 32 | i] = row
            state.items[i] = state.items.get(i, 0) + 1
            state.counts[t] = state.counts.get(t, 0.0) + self._clicks[row]
        table = self._top[a * self._top_terms : (a + 1) * self._top_terms]
        state.top = {t: place for place, t in enumerate(table) if t != EMPTY}
        state.weakest = self._weakest(state)
        return state

    def _row_begins(self, a: int, state: _Author, t: int, i: int, row: int | None) -> int:
        """`row`: one that these three had before, and is empty."""
        if row is None:
            row = state.rows[t << 32 | i] = len(self._clicks)
            self._row_terms.append(t)
            self._row_authors.append(a)
            self._row_items.append(i)
            self._clicks.append(0.0)
            self._by_term.added[t].append(row)
        else:
            self._num_dead -= 1
        self._num_rows[i] += 1
        held = state.items.get(i, 0)
        state.items[i] = held + 1
        if not held:
            self._item_counts(a, i, 1)
        return row

    def _row_ends(self, a: int, state: _Author, i: int) -> None:
        state.items[i] -= 1
        if not state.items[i]:
            del state.items[i]
            self._item_counts(a, i, -1)
        self._row_dies(i)

    def _row_dies(self, i: int) -> None:
        self._num_dead += 1
        self._num_rows[i] -= 1
        self._let_go(i)

    def _item_counts(self, a: int, i: int, change: int) -> None:
        """An author has clicked an item for the first time, or takes its last click on it back."""
        self._num_clicked[a] += change
        if a != self._me:
            mine = self._states[self._me] or self._taken_apart(self._me)
            if i in mine.items:
                self._num_common[a] += change
            return
        # Through all rows: a person does not click so often that a table of every item's clicks would be worth it.
        here = (view(self._row_items) == i) & (view(self._clicks) > 0)
        for other in set(view(self._row_authors)[here].tolist()) - {a}:
            self._num_common[other] += change

    def _is_promoted(self, state: _Author, t: int, count: float) -> bool:
        weakest = state.weakest
        if weakest < 0:
            return weakest == EMPTY
        bar = state.counts[weakest]
        return count > bar or (count == bar and self._term_names[t] < self._term_names[weakest])

    def _weakest(self, state: _Author) -> int:
        if len(state.top) < self._top_terms:
            return EMPTY
        # A loop spelt out: half of all clicks of a young log come through here.
        counts, names = state.counts, self._term_names
        weakest, least = EMPTY, math.inf
        for t in state.top:
            count = counts[t]
            if count < least or (count == least and names[t] > names[weakest]):
                weakest, least = t, count
        return weakest

    def _promote(self, a: int, state: _Author, t: int) -> None:
        place = len(state.top) if state.weakest == EMPTY else state.top.pop(state.weakest)
        state.top[t] = place
        self._top[a * self._top_terms + place] = t
        state.weakest = self._weakest(state)

    def _unsettle(self, a: int, state: _Author) -> None:
        """What may now be among the top terms only a look at all would tell: once, before the next question."""
        state.top, state.weakest = {}, _UNSETTLED
        self._unsettled.add(a)

    def _settle(self) -> None:
        names = self._term_names
        for a in self._unsettled:
            state = self._states[a] or self._taken_apart(a)
            counts = state.counts
            best = nsmallest(self._top_terms, counts, key=lambda t: (-counts[t], names[t]))
            state.top = {t: place for place, t in enumerate(best)}
            state.weakest = self._weakest(state)
            table = array("i", best + [EMPTY] * (self._top_terms - len(best)))
            self._top[a * self._top_terms : (a + 1) * self._top_terms] = table
        self._unsettled.clear()

    def _tidy(self) -> None:
        """Empty rows are let go of once they are most: so this costs little for each."""
        if self._num_dead > max(_MAX_DEAD, len(self._clicks) // 2):
            holds = self._num_holds
            self._restore(self.to_arrays())
            self._num_holds = holds

    # -- similarity
    def _raw_similarity(self) -> F64:
        """S of all authors before the division, 0 for `me`: [authors]."""
        self._settle()
        is_mine = np.zeros(len(self._term_names) + 1, dtype=bool)  # the last one is for `EMPTY`
        table = view(self._top).reshape(len(self._authors), self._top_terms)
        is_mine[table[self._me]] = True
        is_mine[EMPTY] = False
        kt = is_mine[table].sum(axis=1)
        km = view(self._num_common).astype(np.float64)
        num_clicked = view(self._num_clicked)
        ku = num_clicked[self._me] + num_clicked - km
        raw: F64 = np.divide(kt + km**2, ku, out=np.zeros(len(km)), where=ku > 0)
        raw[self._me] = 0.0
        return raw

    def _similarity_vector(self) -> F64:
        """S of all authors, 1 for `me`: [authors]."""
        if self._similarity is None:
            raw = self._raw_similarity()
            raw /= raw.max() or 1.0
            raw[self._me] = 1.0
            self._similarity = raw
        return self._similarity

    def factors(self, isolation: float) -> F64:
        """S + F of all authors by their numbers: what a click of each counts. Rounded up to FACTOR_GRAIN."""
        return np.ceil((self._similarity_vector() + isolation) / FACTOR_GRAIN) * FACTOR_GRAIN

    def own_counts(self) -> F64:
        """How often `me` has clicked for each term, by their numbers: [terms]."""
        mine = self._states[self._me] or self._taken_apart(self._me)
        counts = np.zeros(len(self._term_names))
        counts[list(mine.counts)] = list(mine.counts.values())
        return counts

    def author_of(self, index: int) -> bytes:
        """The author of a number that `entries` gave."""
        return self._authors[index]


def _distinct(terms: Sequence[str]) -> list[str]:
    if not terms:
        raise ValueError("a click is for at least one term")
    return list(dict.fromkeys(terms))


def _grained(weight: float) -> float:
    grained = round(weight / WEIGHT_GRAIN) * WEIGHT_GRAIN if math.isfinite(weight) else 0.0
    if not 0 < grained <= MAX_WEIGHT:
        raise ValueError(f"a click's weight must be above 0 and at most {MAX_WEIGHT:g}, not {weight}")
    return grained
