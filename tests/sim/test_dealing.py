"""Kinds dealt by their shares: as exact as whole numbers allow, and in a drawn order."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.dealing import deal

shares = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8).filter(
    lambda s: sum(s) > 0
)


@settings(derandomize=True, deadline=None)
@given(shares, st.integers(0, 300), st.integers(0, 3))
def test_everybody_gets_a_kind_and_no_kind_is_a_whole_node_off(
    chosen: list[float], count: int, seed: int
) -> None:
    kinds = deal(chosen, count, random.Random(seed))
    assert len(kinds) == count
    numbers = Counter(kinds)
    for kind, share in enumerate(chosen):
        assert abs(numbers[kind] - share / sum(chosen) * count) < 1 + 1e-6
    assert set(kinds) <= set(range(len(chosen)))


@pytest.mark.parametrize(
    ("chosen", "count", "numbers"),
    [
        ([1.0], 5, [5]),
        ([0.5, 0.5], 5, [3, 2]),
        ([0.2, 0.3, 0.5], 10, [2, 3, 5]),
        ([2, 3, 5], 10, [2, 3, 5]),
        ([0.1, 0.1, 0.8], 4, [1, 0, 3]),
        ([0.34, 0.33, 0.33], 1, [1, 0, 0]),
        ([0.0, 1.0], 3, [0, 3]),
    ],
)
def test_what_is_left_over_goes_to_the_largest_remainders_and_then_the_first(
    chosen: list[float], count: int, numbers: list[int]
) -> None:
    kinds = Counter(deal(chosen, count, random.Random(0)))
    assert [kinds[kind] for kind in range(len(chosen))] == numbers


def test_the_order_is_drawn_from_the_given_generator() -> None:
    first, again, other = (deal([0.5, 0.5], 40, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first != sorted(first)
