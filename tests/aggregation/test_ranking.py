"""G-Rank and its neighbours: vectors by hand, laws, and every ranker against the formulas written out slowly."""

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import click_log
from aggregation.ranking import RANKERS, ClickLog, Query, Results, position_weight, rank, scores

law = settings(derandomize=True, deadline=None, max_examples=200)

ME, ANNA, BO = b"me", b"anna", b"bo"
AUTHORS = [ME, ANNA, BO, b"cy", b"di"]
TERMS = ["a", "b", "c", "d", "e", "f"]
ITEMS = [bytes([n]) * 2 for n in (7, 3, 9, 1, 8, 2, 5)]
TOP_TERMS = 3


class Call(NamedTuple):
    """The arguments of `add` or `remove`."""

    author: bytes
    terms: list[str]
    item: bytes
    weight: float = 1.0


calls = st.builds(
    Call,
    st.sampled_from(AUTHORS),
    st.lists(st.sampled_from(TERMS), min_size=1, max_size=3),
    st.sampled_from(ITEMS),
    st.sampled_from([1.0, 1.0, 1.0, 0.5, 2.25, position_weight(2)]),
)
histories = st.lists(calls, max_size=30)
isolations = st.sampled_from([0.0, 0.1, 1.0])


def log_of(clicks: Iterable[Call], me: bytes = ME, top_terms: int = TOP_TERMS) -> ClickLog:
    log = ClickLog(me, top_terms=top_terms)
    for item in ITEMS:
        log.item_index(item)
    for click in clicks:
        log.add(*click)
    return log


def one(author: bytes, term: str, *items: bytes) -> list[Call]:
    return [Call(author, [term], item) for item in items]


def query(log: ClickLog, terms: Sequence[str], metadata: dict[bytes, int], **more: Any) -> Query:
    """metadata: how many of the terms an item's metadata hold."""
    found = sorted(
        (log.item_index(item), num_matched) for item, num_matched in metadata.items() if num_matched
    )
    matching, num_matched = (np.array([pair[k] for pair in found], dtype=np.int64) for k in (0, 1))
    return Query(tuple(terms), matching, num_matched, **more)


def items_of(log: ClickLog, results: Results) -> list[bytes]:
    return [log.item_of(item) for item in results.items]


def facts(log: ClickLog) -> dict[str, Any]:
    """All that a log says, whatever numbers it has given to names."""
    by_item = {
        (name, isolation): {
            (term, log.item_of(i)): score
            for term, row in zip(TERMS, scores(name, log, TERMS, isolation).tolist(), strict=True)
            for i, score in enumerate(row)
            if score
        }
        for name in RANKERS
        for isolation in (0.0, 0.1)
    }
    return {"scores": by_item, "S": log.similarities(), "raw": log.similarities(False), "n": log.num_clicks}


# --- the formulas, slowly -------------------------------------------------------------------------------
class Slow:
    """papers.md 4.3 and 4.6 over a plain list of clicks."""

    def __init__(self, clicks: Sequence[Call], me: bytes = ME) -> None:
        self.me = me
        self.votes: Counter[tuple[bytes, str, bytes]] = Counter()
        for author, terms, item, weight in clicks:
            for term in set(terms):
                self.votes[author, term, item] += round(weight * 256) / 256  # type: ignore[assignment]
        self.authors = {author for author, *_ in self.votes}

    def clicked(self, author: bytes) -> set[bytes]:
        return {item for j, _, item in self.votes if j == author}

    def top(self, author: bytes) -> set[str]:
        counts: Counter[str] = Counter()
        for (j, term, _), clicks in self.votes.items():
            if j == author:
                counts[term] += clicks
        return set(sorted(counts, key=lambda term: (-counts[term], term))[:TOP_TERMS])

    def raw(self, author: bytes) -> float:
        mine, theirs = self.clicked(self.me), self.clicked(author)
        common = len(mine & theirs)
        union = len(mine | theirs)
        return (len(self.top(self.me) & self.top(author)) + common**2) / union if union else 0.0

    def similarities(self) -> dict[bytes, float]:
        raw = {author: self.raw(author) for author in self.authors - {self.me}}
        largest = max(raw.values(), default=0.0)
        return {author: value / largest if largest else 0.0 for author, value in raw.items()}

    def score(self, name: str, term: str, item: bytes, isolation: float) -> float:
        similarity = self.similarities() | {self.me: 1.0}
        here = [(j, clicks) for (j, t, i), clicks in self.votes.items() if (t, i) == (term, item)]
        match name:
            case "g-rank":
                return sum(clicks * (similarity[j] + isolation) for j, clicks in here)
            case "g-rank-capped":
                return sum(min(clicks, 1) * (similarity[j] + isolation) for j, clicks in here)
            case "popularity":
                return sum(clicks for _, clicks in here)
            case "panache":
                return len(here)
            case "maay":
                return self.maay(term, item)
        return 0.0

    def total(self, author: bytes | None = None, term: str | None = None, item: bytes | None = None) -> float:
        return sum(
            clicks
            for (j, t, i), clicks in self.votes.items()
            if author in (None, j) and term in (None, t) and item in (None, i)
        )

    def maay(self, term: str, item: bytes) -> float:
        if not self.total(term=term, item=item) or not self.total(author=self.me):
            return 0.0
        relevant = {t: self.total(term=t, item=item) / self.total(item=item) for t in TERMS}
        popular = self.total(term=term, item=item) / self.total(term=term)
        profile = {t: self.total(author=self.me, term=t) / self.total(author=self.me) for t in TERMS}
        return relevant[term] * popular * sum(relevant[t] * profile[t] for t in TERMS)


# --- similarity -----------------------------------------------------------------------------------------
def test_similarity_by_hand() -> None:
    mine = [Call(ME, [term], bytes([n])) for term, n in (("a", 1), ("b", 2), ("c", 3))]
    theirs = [Call(ANNA, [term], bytes([n])) for term, n in (("b", 2), ("c", 3), ("d", 4), ("d", 5))]
    log = log_of(mine + theirs, top_terms=10)
    assert log.similarities(normalised=False) == {ANNA: (2 + 2**2) / 5}
    assert log.similarities() == {ANNA: 1.0}


def test_who_shares_nothing_with_me_has_none() -> None:
    assert ClickLog(ME).similarities() == {}
    assert log_of(one(ANNA, "a", *ITEMS[:2])).similarities() == {ANNA: 0.0}
    assert log_of(one(ME, "a", ITEMS[0])).similarities() == {}


def test_of_terms_equally_frequent_the_smaller_are_the_top() -> None:
    mine = [Call(ME, [term], ITEMS[0]) for term in "fedcba"]
    log = log_of(mine + one(ANNA, "c", ITEMS[1]) + one(BO, "d", ITEMS[2]))
    assert log.similarities(normalised=False) == {ANNA: 0.5, BO: 0.0}


@law
@given(histories)
def test_similarity_is_symmetric_and_never_below_zero(clicks: list[Call]) -> None:
    of_me, of_anna = (log_of(clicks, me).similarities(False) for me in (ME, ANNA))
    assert of_me.get(ANNA, 0.0) == of_anna.get(ME, 0.0) or not (ANNA in of_me and ME in of_anna)
    assert min(of_me.values(), default=0.0) >= 0.0


@law
@given(histories, st.sampled_from(TERMS))
def test_a_click_that_two_come_to_share_never_lowers_their_similarity(clicks: list[Call], term: str) -> None:
    slow = Slow(clicks)
    before = log_of(clicks).similarities(False)
    for author, similarity in before.items():
        for item in sorted(slow.clicked(author) - slow.clicked(ME)):
            after = log_of([*clicks, Call(ME, [term], item)]).similarities(False)
            assert after[author] >= similarity


@law
@given(histories)
def test_similarities_are_those_of_the_formula(clicks: list[Call]) -> None:
    log, slow = log_of(clicks), Slow(clicks)
    assert log.similarities(False) == pytest.approx({j: slow.raw(j) for j in slow.authors - {ME}})
    assert log.similarities() == pytest.approx(slow.similarities())


# --- scores ---------------------------------------------------------------------------------------------
@law
@given(histories, isolations)
def test_scores_are_those_of_the_formulas(clicks: list[Call], isolation: float) -> None:
    log, slow = log_of(clicks), Slow(clicks)
    for name in RANKERS:
        found = scores(name, log, TERMS, isolation)
        assert found.shape == (len(TERMS), log.num_items)
        expected = [[slow.score(name, term, item, isolation) for item in ITEMS] for term in TERMS]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=name)
        for k, term in enumerate(TERMS):  # few rows are found in another way than many
            np.testing.assert_array_equal(scores(name, log, [term], isolation), found[k : k + 1])


def test_the_rows_of_a_rare_term_are_all_found() -> None:
    clicks = [Call(ANNA, [TERMS[n % 3]], b"%d" % n) for n in range(60)] + one(ANNA, "f", ITEMS[0])
    log = log_of(clicks)
    found = scores("popularity", log, ["f", "none", "f"])
    assert found.sum() == 2.0
    assert found[0, log.item_index(ITEMS[0])] == found[2, log.item_index(ITEMS[0])] == 1.0
    assert rank("popularity", log, query(log, ["f", "none", "f"], {})).scores.tolist() == [1.0]


def test_a_rare_click_that_is_taken_back_is_no_click() -> None:
    log = log_of([Call(ANNA, [TERMS[n % 3]], b"%d" % n) for n in range(60)] + one(ANNA, "f", ITEMS[0]))
    log.remove(ANNA, ["f"], ITEMS[0])
    asked = query(log, ["f"], {ITEMS[0]: 1, ITEMS[1]: 1}, relevance=np.array([1.0, 2.0]))
    assert rank("g-rank", log, asked).scores.tolist() == [2.0, 1.0]


def test_however_little_someone_is_like_me_it_counts() -> None:
    clicks = one(ME, "a", *ITEMS) + one(ANNA, "a", *ITEMS) + [Call(BO, ["b"], b"%d" % n) for n in range(99)]
    log = log_of([*clicks, *one(BO, "f", ITEMS[0])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click_log, "FACTOR_GRAIN", 0.25)
        assert scores("g-rank", log, ["b"], 0.0).max() == 0.25


@law
@given(histories, st.randoms(use_true_random=False))
def test_the_order_of_clicks_does_not_matter(clicks: list[Call], random: Any) -> None:
    others = list(clicks)
    random.shuffle(others)
    first, second = log_of(clicks), ClickLog(ME, top_terms=TOP_TERMS)
    for click in others:
        second.add(*click)
    assert facts(first) == facts(second)


def test_clicking_again_counts_once_where_it_is_capped() -> None:
    log = log_of(one(ANNA, "a", *[ITEMS[0]] * 5) + one(BO, "a", ITEMS[1]))
    at = [log.item_index(item) for item in ITEMS[:2]]
    assert scores("g-rank", log, ["a"], 1.0)[0, at].tolist() == [5.0, 1.0]
    assert scores("g-rank-capped", log, ["a"], 1.0)[0, at].tolist() == [1.0, 1.0]


def test_a_term_named_twice_by_one_click_counts_once() -> None:
    assert facts(log_of([Call(ANNA, ["a", "a"], ITEMS[0])])) == facts(log_of(one(ANNA, "a", ITEMS[0])))


def test_a_click_far_down_says_more() -> None:
    assert [position_weight(rank) for rank in (1, 3, 7)] == [1.0, 2.0, 3.0]
    log = log_of([Call(ANNA, ["a"], ITEMS[0], position_weight(3)), *one(ANNA, "a", ITEMS[1])])
    assert scores("popularity", log, ["a"])[0, :2].tolist() == [2.0, 1.0]


# --- taking back ----------------------------------------------------------------------------------------
@law
@given(histories, histories)
def test_what_is_taken_back_was_never_there(kept: list[Call], gone: list[Call]) -> None:
    log = log_of(kept + gone)
    for click in gone:
        log.remove(*click)
    assert facts(log) == facts(log_of(kept))


@law
@given(histories, st.sampled_from(AUTHORS), histories)
def test_who_is_dropped_never_clicked_and_may_come_again(
    clicks: list[Call], author: bytes, later: list[Call]
) -> None:
    log = log_of(clicks)
    log.drop(author)
    kept = [click for click in clicks if click.author != author]
    assert facts(log) == facts(log_of(kept))
    for click in later:
        log.add(*click)
    assert facts(log) == facts(log_of(kept + later))


def test_what_is_not_there_cannot_be_taken_back() -> None:
    log = log_of([Call(ANNA, ["a", "b"], ITEMS[0])])
    before = facts(log)
    for call in (
        Call(BO, ["a"], ITEMS[0]),
        Call(ANNA, ["a", "c"], ITEMS[0]),
        Call(ANNA, ["a", "unheard"], ITEMS[0]),
        Call(ANNA, ["a"], ITEMS[1]),
        Call(ANNA, ["a"], b"unheard"),
        Call(ANNA, ["a"], ITEMS[0], 2.0),
    ):
        with pytest.raises(ValueError, match="not in the log"):
            log.remove(*call)
        assert facts(log) == before
    log.drop(b"nobody")
    assert facts(log) == before


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 2.0**20, 1e-9])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    log = ClickLog(ME)
    with pytest.raises(ValueError, match="weight"):
        log.add(ANNA, ["a"], ITEMS[0], weight)
    assert log.num_clicks == 0


def test_a_click_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="term"):
        ClickLog(ME).add(ANNA, [], ITEMS[0])
    with pytest.raises(ValueError, match="top_terms"):
        ClickLog(ME, top_terms=0)


# --- arrays ---------------------------------------------------------------------------------------------
@law
@given(histories, histories, st.sampled_from([*AUTHORS, b"another"]))
def test_a_log_survives_the_trip_through_arrays(clicks: list[Call], later: list[Call], me: bytes) -> None:
    log = log_of(clicks)
    again = ClickLog.from_arrays(me, log.to_arrays(), top_terms=TOP_TERMS)
    assert facts(again) == facts(log_of(clicks, me))
    assert [again.item_of(i) for i in range(again.num_items)] == [
        log.item_of(i) for i in range(log.num_items)
    ]
    for click in later:
        again.add(*click)
    assert facts(again) == facts(log_of(clicks + later, me))
    for click in clicks:
        again.remove(*click)
    assert facts(again) == facts(log_of(later, me))


@law
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove", "drop", "reload", "hold", "release"]), calls), max_size=40
    ),
    st.sampled_from([0, click_log._MAX_DEAD]),
    st.booleans(),
)
def test_any_sequence_of_changes_leaves_what_the_formulas_say(
    steps: list[tuple[str, Call]], max_dead: int, all_items: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click_log, "_MAX_DEAD", max_dead)  # 0: empty rows are cleared away all the time
        log, held = ClickLog(ME, top_terms=TOP_TERMS), list[Call]()
        numbers = dict[bytes, int]()  # of items that somebody holds
        for what, call in steps:
            match what:
                case "add":
                    log.add(*call)
                    held.append(call)
                case "remove" if held:
                    gone = held.pop(len(call.terms) % len(held))
                    log.remove(*gone)
                case "drop":
                    log.drop(call.author)
                    held = [click for click in held if click.author != call.author]
                case "reload":
                    arrays = log.to_arrays(all_items=all_items)
                    log = ClickLog.from_arrays(ME, arrays, top_terms=TOP_TERMS)
                    numbers = {item: log.item_index(item) for item in numbers}
                case "hold" if call.item not in numbers:
                    numbers[call.item] = log.item_index(call.item)
                case "release" if call.item in numbers:
                    log.release(call.item)
                    del numbers[call.item]
        assert {item: log._item_of[item] for item in numbers} == numbers
        assert set(log._item_of) == {click.item for click in held} | set(numbers)
        assert log.num_items <= len(ITEMS), "numbers are given again"
        by_number = [log.item_of(number) in numbers for number in range(log.num_items)]
        assert log.are_held(np.arange(log.num_items)).tolist() == by_number
        assert log._num_dead == sum(not clicks for clicks in log._clicks)
        assert facts(log) == facts(log_of(held))
        assert log.similarities() == pytest.approx(Slow(held).similarities())


def test_empty_rows_do_not_pile_up() -> None:
    log = log_of(one(ANNA, "a", ITEMS[0]))
    for n in range(20_000):
        log.add(BO, ["b"], b"item %d" % n)
        log.remove(BO, ["b"], b"item %d" % n)
    assert len(log._clicks) < 10_000
    assert log.num_items == len(ITEMS) + 1
    assert facts(log)["scores"] == facts(log_of(one(ANNA, "a", ITEMS[0])))["scores"]


def test_a_click_that_comes_again_takes_its_old_row() -> None:
    log = log_of(one(ANNA, "a", ITEMS[0]) + one(BO, "b", ITEMS[1]))
    for _ in range(3):
        log.remove(BO, ["b"], ITEMS[1])
        log.add(BO, ["b"], ITEMS[1])
    assert (len(log._clicks), log._num_dead) == (2, 0)


def damaged() -> dict[str, dict[str, Any]]:
    i32, i64 = np.int32, np.int64
    return {
        "a row too short": {"row_items": np.zeros(1, i32)},
        "an item that is not there": {"row_items": np.array([0, 99], i32)},
        "below zero": {"row_terms": np.array([-1, 0], i32)},
        "of another type": {"row_clicks": np.array([1, 1], np.float32)},
        "flat no more": {"row_clicks": np.ones((2, 1))},
        "not a number": {"row_clicks": np.array([1.0, math.nan])},
        "no click": {"row_clicks": np.array([1.0, 0.0])},
        "a finer weight": {"row_clicks": np.array([1.0, 1.0001])},
        "not in order": {"row_terms": np.array([1, 0], i32)},
        "twice the same": {f"row_{name}": np.zeros(2, i32) for name in ("terms", "authors", "items")},
        "names that end too far": {"items_ends": np.array([2, 400], i64)},
        "names that end before they begin": {"items_ends": np.array([8, 2, 6, 8, 10, 12, 14], i64)},
        "a name twice": {"items": np.zeros(14, np.uint8)},
        "clicks on no item": {"items_ends": np.array([0, 2, 4, 6, 8, 10, 14], i64)},
        "no text": {"terms": np.full(2, 0xFF, np.uint8)},
        "counts for others": {"num_clicks": np.array([1], i64)},
        "counts below zero": {"num_clicks": np.array([-1, 1], i64)},
    }


@pytest.mark.parametrize("what", damaged())
def test_arrays_of_no_log_are_refused(what: str) -> None:
    arrays = log_of(one(ANNA, "a", ITEMS[0]) + one(BO, "b", ITEMS[1])).to_arrays()
    assert ClickLog.from_arrays(ME, arrays).num_clicks == 2
    with pytest.raises(ValueError, match="not the arrays of a click log"):
        ClickLog.from_arrays(ME, {**arrays, **damaged()[what]})
    del arrays["row_clicks"]
    with pytest.raises(ValueError, match="not the arrays of a click log"):
        ClickLog.from_arrays(ME, arrays)


# --- the order ------------------------------------------------------------------------------------------
matches = st.dictionaries(st.sampled_from(ITEMS), st.integers(0, 2))
some_terms = st.lists(st.sampled_from(TERMS), min_size=1, max_size=3, unique=True)
relevances = st.none() | st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=len(ITEMS), max_size=len(ITEMS))


@law
@given(histories, matches, some_terms, relevances, st.sampled_from(sorted(RANKERS)), isolations)
def test_results_come_in_the_order_that_is_said(
    clicks: list[Call],
    metadata: dict[bytes, int],
    terms: list[str],
    relevance: list[float] | None,
    name: str,
    isolation: float,
) -> None:
    log = log_of(clicks)
    asked = query(log, terms, metadata)
    if relevance is not None:
        asked = asked._replace(relevance=np.array(relevance)[asked.matching])
    results = rank(name, log, asked, isolation)
    slow = Slow(clicks)
    expected = {
        item: sum(slow.score(name, term, item, isolation) for term in terms)
        for item in ITEMS
        if metadata.get(item) or any(slow.score(name, term, item, isolation) > 1e-12 for term in terms)
    }
    found = items_of(log, results)
    assert set(found) == set(expected)
    assert results.num_matched.tolist() == [metadata.get(item, 0) for item in found]
    text = dict(zip(asked.matching.tolist(), asked.relevance if relevance is not None else [], strict=False))
    is_clicked = name != "bm25" and any(slow.total(term=term) for term in terms)
    if is_clicked:
        np.testing.assert_allclose(results.scores, [expected[item] for item in found], atol=1e-6)
    else:
        assert results.scores.tolist() == [text.get(int(i), 0.0) for i in results.items]
    keys = [
        (-matched, -score, -text.get(int(i), 0.0), log.item_of(i) if is_clicked else b"")
        for i, score, matched in zip(*results, strict=True)
    ]
    assert keys == sorted(keys)
    for limit in range(len(found) + 2):
        first = rank(name, log, asked, isolation, limit=limit)
        assert all(np.array_equal(a, b[:limit]) for a, b in zip(first, results, strict=True))


@law
@given(histories, matches, some_terms, st.sampled_from(sorted(RANKERS)), isolations)
def test_no_clicks_lift_an_item_over_one_that_matches(
    clicks: list[Call], metadata: dict[bytes, int], terms: list[str], name: str, isolation: float
) -> None:
    log = log_of(clicks)
    num_matched = rank(name, log, query(log, terms, metadata), isolation).num_matched.tolist()
    assert num_matched == sorted(num_matched, reverse=True)


def test_a_bombed_item_stays_below_what_matches() -> None:
    good, bombed = ITEMS[0], ITEMS[1]
    log = log_of([*one(ME, "a", bombed), *one(ANNA, "a", *[bombed] * 1000)])
    results = rank("g-rank", log, query(log, ["a"], {good: 1}), isolation=1.0)
    assert items_of(log, results) == [good, bombed]


def test_equal_scores_go_by_relevance_and_then_by_the_lowest_item() -> None:
    log = log_of(one(ANNA, "a", *ITEMS), top_terms=10)
    assert items_of(log, rank("popularity", log, query(log, ["a"], {}))) == sorted(ITEMS)
    asked = query(log, ["a"], dict.fromkeys(ITEMS[:3], 1), relevance=np.array([1.0, 1.0, 2.0]))
    assert items_of(log, rank("popularity", log, asked, limit=3)) == [ITEMS[2], ITEMS[1], ITEMS[0]]


def test_more_of_the_words_come_before_more_clicks() -> None:
    both, first, clicked = ITEMS[:3]
    log = log_of(one(ANNA, "a", first, first) + one(ANNA, "b", clicked))
    results = rank("g-rank", log, query(log, ["a", "b"], {both: 2, first: 1}), isolation=1.0)
    assert items_of(log, results) == [both, first, clicked]
    assert results.scores.tolist() == [0.0, 2.0, 1.0]


def test_the_scores_of_several_words_add_up() -> None:
    log = log_of(one(ANNA, "a", ITEMS[0], ITEMS[1]) + one(BO, "b", ITEMS[1], ITEMS[2], ITEMS[2], ITEMS[2]))
    results = rank("popularity", log, query(log, ["a", "b", "a"], {}))
    assert dict(zip(items_of(log, results), results.scores.tolist(), strict=True)) == {
        ITEMS[2]: 3.0,
        ITEMS[1]: 2.0,
        ITEMS[0]: 1.0,
    }


def test_without_clicks_for_the_words_it_is_what_the_text_says() -> None:
    log = log_of(one(ANNA, "other", ITEMS[5]))
    asked = query(
        log, ["a", "b"], {ITEMS[0]: 1, ITEMS[1]: 1, ITEMS[2]: 2}, relevance=np.array([1.0, 3.0, 0.5])
    )
    for name in RANKERS:
        results = rank(name, log, asked)
        assert items_of(log, results) == [ITEMS[2], ITEMS[1], ITEMS[0]]
        assert results.scores.tolist() == [0.5, 3.0, 1.0]


def test_a_cold_start_draws_an_order_from_the_seed() -> None:
    log = log_of([])
    orders = {
        tuple(items_of(log, rank("g-rank", log, query(log, ["a"], dict.fromkeys(ITEMS, 1), seed=seed))))
        for seed in range(20)
    }
    assert len(orders) > 10
    assert all(sorted(order) == sorted(ITEMS) for order in orders)


COLD = """
import sys
import numpy as np
from aggregation.ranking import ClickLog, Query, rank
log = ClickLog(b"me")
for item in sorted({b"item %d" % n for n in range(40)}, reverse=sys.argv[1] == "falling"):
    log.item_index(item)
every = np.arange(log.num_items)
results = rank("g-rank", log, Query(("a",), every, np.ones(len(every), dtype=np.int64), seed=7))
print([log.item_of(i).decode() for i in results.items])
"""


def test_a_cold_start_is_the_same_everywhere() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", COLD, order],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
        for order in ("rising", "falling")
    }
    assert len(outputs) == 1


# --- personal -------------------------------------------------------------------------------------------
CAR, CAT = b"car", b"cat"


def jaguars() -> list[Call]:
    """Three who mean cars and three who mean cats, each with a word of their own and one in common."""
    clicks = []
    for group, (meaning, word) in {b"x": (CAR, "engine"), b"y": (CAT, "whiskers")}.items():
        for member in b"123":
            author = group + bytes([member])
            clicks += one(author, "jaguar", meaning) + one(author, word, meaning)
    return clicks


def test_each_group_finds_its_own_meaning_first() -> None:
    first = {}
    for name in ("g-rank", "g-rank-capped", "popularity"):
        for me in (b"x1", b"y1"):
            log = log_of(jaguars(), me)
            asked = query(log, ["jaguar"], {CAR: 1, CAT: 1})
            first[name, me] = items_of(log, rank(name, log, asked, isolation=0.0))[0]
    assert (first["g-rank", b"x1"], first["g-rank", b"y1"]) == (CAR, CAT)
    assert (first["g-rank-capped", b"x1"], first["g-rank-capped", b"y1"]) == (CAR, CAT)
    assert first["popularity", b"x1"] == first["popularity", b"y1"]


def test_users_with_nothing_in_common_get_different_orders() -> None:
    both = (
        one(ANNA, "a", ITEMS[0])
        + one(BO, "a", ITEMS[1])
        + one(ME, "b", ITEMS[2])
        + one(b"you", "b", ITEMS[3])
    )
    alike = one(ANNA, "b", ITEMS[2]) + one(BO, "b", ITEMS[3])
    orders = []
    for me in (ME, b"you"):
        log = log_of(both + alike, me)
        asked = query(log, ["a"], dict.fromkeys(ITEMS[:2], 1))
        orders.append(items_of(log, rank("g-rank", log, asked, isolation=0.0)))
    assert orders == [[ITEMS[0], ITEMS[1]], [ITEMS[1], ITEMS[0]]]


def test_only_who_is_like_me_counts_without_isolation() -> None:
    log = log_of(one(ME, "b", ITEMS[2]) + one(ANNA, "a", ITEMS[0]))
    assert rank("g-rank", log, query(log, ["a"], {}), isolation=0.0).items.tolist() == []
    assert items_of(log, rank("g-rank", log, query(log, ["a"], {}), isolation=0.1)) == [ITEMS[0]]


@pytest.mark.parametrize(("name", "isolation"), [("page-rank", 0.1), ("g-rank", -1.0), ("g-rank", math.nan)])
def test_what_no_ranker_takes_is_refused(name: str, isolation: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        scores(name, ClickLog(ME), ["a"], isolation)
