"""Virtual time: in order of time, ties in order of asking, and never back."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.clock import VirtualClock


def run(clock: VirtualClock) -> None:
    while clock.step():
        pass


def test_nothing_due_moves_no_time() -> None:
    clock = VirtualClock()
    assert (clock.step(), clock.now(), clock.due_at()) == (False, 0.0, None)


def test_time_is_that_of_what_is_being_done() -> None:
    clock, seen = VirtualClock(), []
    clock.after(2.5, lambda: seen.append(clock.now()))
    assert (clock.now(), clock.due_at()) == (0.0, 2.5)
    assert clock.step()
    assert (seen, clock.now(), clock.due_at()) == ([2.5], 2.5, None)


def test_what_is_due_at_once_comes_out_as_it_went_in() -> None:
    clock, seen = VirtualClock(), []
    for number in range(50):
        clock.after(1.0, lambda number=number: seen.append(number))
    run(clock)
    assert seen == list(range(50))


def test_what_is_asked_for_now_comes_after_what_was_due_now_already() -> None:
    clock, seen = VirtualClock(), []

    def first() -> None:
        seen.append("first")
        clock.after(0.0, lambda: seen.append("asked by first"))

    clock.after(1.0, first)
    clock.after(1.0, lambda: seen.append("second"))
    run(clock)
    assert seen == ["first", "second", "asked by first"]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_the_order_is_that_of_time_and_then_of_asking(delays: list[int]) -> None:
    clock, seen = VirtualClock(), []
    for number, delay in enumerate(delays):
        clock.after(delay, lambda entry=(delay, number): seen.append(entry))
    run(clock)
    assert seen == sorted((delay, number) for number, delay in enumerate(delays))


def test_a_moment_is_kept_to_the_last_bit() -> None:
    """As a delay from different times it would be rounded, and the second could come before the first."""
    rng = random.Random(1)
    for _ in range(2_000):
        clock, seen = VirtualClock(), []
        moment = 1 + rng.random()
        clock.after(rng.random(), lambda c=clock, s=seen, m=moment: c.at(m, lambda: s.append("first")))
        clock.after(1.0, lambda c=clock, s=seen, m=moment: c.at(m, lambda: s.append("second")))
        run(clock)
        assert (seen, clock.now()) == (["first", "second"], moment)


def test_time_does_not_go_back() -> None:
    clock = VirtualClock()
    clock.after(1.0, lambda: None)
    clock.step()
    with pytest.raises(AssertionError, match="time does not go back"):
        clock.after(-0.1, lambda: None)
    with pytest.raises(AssertionError, match="time does not go back"):
        clock.at(0.9, lambda: None)
