"""A click log as columns of numbers: to load, to keep, and to read with numpy.

Belongs here: rows and their names as arrays, what follows from all rows at once, and the rows of one author, item or term.
What changes with a single click is `click_log.py`'s matter.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
T = TypeVar("T")

EMPTY = -1
WEIGHT_GRAIN = 2.0**-8
"""Weights of clicks are multiples of this: whatever is added and taken away again leaves no rounding behind."""


class Rows(NamedTuple):
    """Distinct rows in ascending order of term, author and item."""

    terms: NDArray[np.int32]
    authors: NDArray[np.int32]
    items: NDArray[np.int32]
    clicks: F64

    def require(self, num_terms: int, num_authors: int, num_items: int) -> None:
        """Raises ValueError unless these are rows of a log of so many names."""
        columns = (self.terms, self.authors, self.items)
        bounds = (num_terms, num_authors, num_items)
        good = self.clicks.ndim == 1 and self.clicks.dtype == np.float64
        for column, bound in zip(columns, bounds, strict=True):
            good = good and column.shape == self.clicks.shape and column.dtype == np.int32
            good = good and bool(((column >= 0) & (column < bound)).all())
        good = good and bool(((self.clicks >= WEIGHT_GRAIN) & np.isfinite(self.clicks)).all())
        if not good or (self.clicks % WEIGHT_GRAIN).any() or not self._rise():
            raise ValueError("not the arrays of a click log: rows")

    def _rise(self) -> bool:
        term, author, item = np.diff(self.terms), np.diff(self.authors), np.diff(self.items)
        return bool(((term > 0) | ((term == 0) & ((author > 0) | ((author == 0) & (item > 0))))).all())

    def clicked_and_common(self, num_authors: int, num_items: int, me: int) -> tuple[I64, I64]:
        """For each author how many items it clicked, and how many of them author `me` did as well (of itself: 0)."""
        width = max(num_items, 1)
        pairs = np.sort(self.authors.astype(np.int64) * width + self.items)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # several times faster than `np.unique`
        authors, items = np.divmod(pairs, width)
        is_mine = np.zeros(width, dtype=bool)
        is_mine[items[authors == me]] = True
        common = np.bincount(authors[is_mine[items]], minlength=num_authors)
        common[me] = 0
        return np.bincount(authors, minlength=num_authors), common

    def top_terms(self, num_authors: int, names: list[str], limit: int) -> NDArray[np.int32]:
        """Table [authors * limit] of each author's most frequent terms, filled up with `EMPTY`."""
        table = np.full(num_authors * limit, EMPTY, dtype=np.int32)
        if not len(self.clicks):
            return table
        is_next = (np.diff(self.terms, prepend=-1) != 0) | (np.diff(self.authors, prepend=-1) != 0)
        starts = np.flatnonzero(is_next)
        counts = np.add.reduceat(self.clicks, starts)
        terms, authors = self.terms[starts], self.authors[starts]
        alphabetic = np.empty(len(names), dtype=np.int64)
        alphabetic[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        order = np.lexsort((alphabetic[terms], -counts, authors))
        terms, authors = terms[order], authors[order]
        places = np.arange(len(authors)) - np.searchsorted(authors, authors)
        kept = places < limit
        table[authors[kept].astype(np.int64) * limit + places[kept]] = terms[kept]
        return table


def no_rows() -> Rows:
    """Of a log without clicks."""
    empty = np.zeros(0, dtype=np.int32)
    return Rows(empty, empty, empty, np.zeros(0))


def _new_rows() -> "array[int]":
    return array("q")


class Groups:
    """The rows of a column's every value: those of a sorted base, and those added since.

    The base is sorted at the first question and not before: a node that has just started answers at once.
    """

    def __init__(self, column: NDArray[np.int32], num_values: int) -> None:
        self._column = column
        self._num_values = num_values
        self._order: NDArray[np.intp] | None = None
        self._starts: NDArray[np.intp] | None = None
        self.added: defaultdict[int, array[int]] = defaultdict(_new_rows)
        """New rows by value; to be appended to."""

    def rows(self, value: int) -> I64:
        """Those with this value."""
        added = np.array(self.added.get(value, ()), dtype=np.int64)
        if value >= self._num_values:
            return added
        if self._order is None or self._starts is None:
            self._order = np.argsort(self._column, kind="stable")
            counts = np.bincount(self._column, minlength=self._num_values)
            self._starts = np.concatenate(([0], np.cumsum(counts)))
        base = self._order[self._starts[value] : self._starts[value + 1]]
        return np.concatenate((base, added)) if len(added) else base


def numbered(names: Iterable[T]) -> dict[T, int]:
    """Each name's place among them."""
    return {name: number for number, name in enumerate(names)}


def packed(code: str, column: NDArray[Any]) -> "array[Any]":
    """A column as an array that can grow, of the type that `code` is for."""
    packed = array(code)
    packed.frombytes(np.ascontiguousarray(column, dtype=packed.typecode).tobytes())
    return packed


def view(column: "array[Any]") -> NDArray[Any]:
    """What `packed` made, for numpy. No view may outlive the question it answers: an array that is looked at cannot grow."""
    return np.frombuffer(column, dtype=column.typecode) if column else np.zeros(0, dtype=column.typecode)


def unjoined(arrays: Arrays, name: str) -> list[bytes]:
    """Names that stand one after the other in `arrays[name]`. Raises ValueError where `*_ends` are not their ends."""
    joined, ends = np.asarray(arrays[name]), np.asarray(arrays[f"{name}_ends"])
    good = joined.dtype == np.uint8 and ends.dtype == np.int64 and joined.ndim == ends.ndim == 1
    if not good or (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != len(joined):
        raise ValueError(f"not the arrays of a click log: {name}")
    text, stops = joined.tobytes(), ends.tolist()
    return [text[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=False)]
