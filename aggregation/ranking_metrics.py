"""How good a ranking is: against what a person wanted, and against the ranking that all nodes together would give.

Belongs here: figures of orders that are already made. Ranks are counted from 1, indices from 0.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def mean_reciprocal_rank(ranks: Sequence[int | None]) -> float:
    """Mean of 1 / rank of the wanted item over queries; None, where it was not found, is 0. Raises ValueError for no query.

    >>> round(mean_reciprocal_rank([1, 3, 10]), 4)
    0.4778
    """
    _require(ranks, "a query")
    return math.fsum(0.0 if rank is None else 1.0 / rank for rank in ranks) / len(ranks)


def rank_of(item: T, ranking: Sequence[T]) -> int | None:
    """Where an item stands, from 1; None if it does not."""
    return ranking.index(item) + 1 if item in ranking else None


def ndcg_at(k: int, ranking: Sequence[T], gains: Mapping[T, float]) -> float:
    """Gain of the first k results, an item at rank r divided by log2(r + 1), as a part of the best order's: 0 to 1.

    gains: at least 0 each; an item without one has 0. 0 where no item has any.

    Source: Järvelin and Kekäläinen 2002, with the discount of trec_eval, whose figures these are.
    """
    best = _discounted(sorted(gains.values(), reverse=True)[:k])
    return _discounted(gains.get(item, 0.0) for item in ranking[:k]) / best if best else 0.0


def recall_at(k: int, ranking: Sequence[T], relevant: Collection[T]) -> float:
    """The part of the relevant items that is among the first k results; 0 where none is relevant."""
    return len(set(ranking[:k]) & set(relevant)) / len(relevant) if relevant else 0.0


def positional_distance(ranking: Sequence[T], reference: Sequence[T]) -> int:
    """Sum over the items of `reference` of how many places off they stand; a missing one counts `len(reference)`.

    Source: arXiv 2301.12530, the first metric of its experiment.

    >>> positional_distance(["b", "a"], ["a", "b", "c"])
    5
    """
    places = {item: index for index, item in enumerate(ranking)}
    missing = len(reference)
    return sum(
        abs(places[item] - index) if item in places else missing for index, item in enumerate(reference)
    )


def share_of_top(rankings: Sequence[Sequence[T]], best: T) -> float:
    """The part of the nodes whose first result is `best`; one without results has another. Raises ValueError for no node.

    Source: arXiv 2301.12530, the second metric of its experiment.
    """
    _require(rankings, "a ranking")
    return sum(len(ranking) > 0 and bool(ranking[0] == best) for ranking in rankings) / len(rankings)


def _discounted(gains: Iterable[float]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def _require(given: Sequence[object], what: str) -> None:
    if not given:
        raise ValueError(f"at least {what} is needed")
