"""Figures of rankings: by hand, and against trec_eval."""

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.ranking_metrics import (
    mean_reciprocal_rank,
    ndcg_at,
    positional_distance,
    rank_of,
    recall_at,
    share_of_top,
)

law = settings(derandomize=True, deadline=None, max_examples=200)
NAMES = [f"item{n:02d}" for n in range(25)]

queries = st.lists(
    st.tuples(
        st.permutations(NAMES).flatmap(lambda order: st.integers(1, len(NAMES)).map(lambda n: order[:n])),
        st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=5,
)


def test_reciprocal_ranks_by_hand() -> None:
    assert mean_reciprocal_rank([1, 3, 10]) == pytest.approx((1 + 1 / 3 + 1 / 10) / 3)
    assert round(mean_reciprocal_rank([1, 3, 10]), 4) == 0.4778
    assert mean_reciprocal_rank([2, None]) == 0.25


def test_gain_and_recall_by_hand() -> None:
    assert ndcg_at(10, ["x", "a"], {"a": 1}) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg_at(1, ["x", "a"], {"a": 1}) == 0.0
    assert ndcg_at(10, ["a"], {}) == 0.0
    assert recall_at(2, ["a", "x", "b"], {"a", "b"}) == 0.5
    assert recall_at(2, ["a"], set()) == 0.0


@law
@given(queries)
def test_the_figures_are_those_of_trec_eval(queries: list[tuple[list[str], dict[str, int]]]) -> None:
    gains = {f"q{n}": gains for n, (_, gains) in enumerate(queries)}
    runs = {
        f"q{n}": {item: float(len(order) - place) for place, item in enumerate(order)}
        for n, (order, _) in enumerate(queries)
    }
    theirs = pytrec_eval.RelevanceEvaluator(gains, {"recip_rank", "ndcg_cut.10", "recall.10"}).evaluate(runs)
    first = []
    for n, (order, gains_here) in enumerate(queries):
        expected = theirs[f"q{n}"]
        assert ndcg_at(10, order, gains_here) == pytest.approx(expected["ndcg_cut_10"], abs=1e-9)
        assert recall_at(10, order, gains_here) == pytest.approx(expected["recall_10"], abs=1e-9)
        first.append(min((rank for item in gains_here if (rank := rank_of(item, order))), default=None))
    mean = sum(each["recip_rank"] for each in theirs.values()) / len(theirs)
    assert mean_reciprocal_rank(first) == pytest.approx(mean, abs=1e-9)


def test_distance_by_hand() -> None:
    assert positional_distance(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert positional_distance(["c", "b", "a"], ["a", "b", "c"]) == 4
    assert positional_distance(["b", "a"], ["a", "b", "c"]) == 1 + 1 + 3
    assert positional_distance([], ["a", "b", "c"]) == 9
    assert positional_distance(["x", "a"], ["a"]) == 1
    assert positional_distance(["x"], []) == 0


def test_share_of_top_by_hand() -> None:
    assert share_of_top([["a", "b"], ["b", "a"], [], ["a"]], "a") == 0.5


def test_no_query_is_no_figure() -> None:
    with pytest.raises(ValueError, match="query"):
        mean_reciprocal_rank([])
    with pytest.raises(ValueError, match="ranking"):
        share_of_top([], "a")
