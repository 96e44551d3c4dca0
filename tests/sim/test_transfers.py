"""Fair-shared bandwidth: every transfer ends when arithmetic says so."""

import random
from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.clock import VirtualClock
from sim.transfers import Line, Transfer, Transfers


class Office:
    """Lines by name, and when each transfer ended."""

    def __init__(self, up: float = 100.0, down: float = 100.0) -> None:
        self.clock = VirtualClock()
        self.transfers = Transfers(self.clock, up, down)
        self.lines = {name: Line() for name in "abcdefgh"}
        self.ends: dict[str, float] = {}

    def start(self, name: str, num_bytes: float) -> Transfer:
        """`ab1` goes from a to b."""
        sender, receiver = self.lines[name[0]], self.lines[name[1]]
        return self.transfers.start(sender, receiver, num_bytes, self._end, name)

    def start_at(self, moment_s: float, name: str, num_bytes: float) -> None:
        self.clock.at(moment_s, self.start, name, num_bytes)

    def _end(self, name: str) -> None:
        assert name not in self.ends, "it ended twice"
        self.ends[name] = self.clock.now()

    def run(self) -> dict[str, float]:
        while self.clock.step():
            pass
        assert all(not line.uploads and not line.downloads for line in self.lines.values())
        return self.ends


def test_alone_it_runs_at_the_smaller_of_the_two_lines() -> None:
    for up, down, ends_at in ((100, 50, 20.0), (50, 100, 20.0), (100, 100, 10.0)):
        office = Office(up, down)
        office.start("ab", 1_000)
        assert office.run() == {"ab": ends_at}


def test_nothing_to_send_is_there_at_once() -> None:
    office = Office()
    office.start_at(3.0, "ab", 0)
    assert office.run() == {"ab": 3.0}


def test_two_uploads_halve_the_line_and_the_second_half_is_the_survivors() -> None:
    office = Office()
    office.start("ab", 1_000)
    office.start("ac", 500)
    # Both at 50 until 10 s, when `ac` is through; the 500 bytes left of `ab` then pass at 100.
    assert office.run() == {"ac": 10.0, "ab": 15.0}


def test_two_downloads_halve_the_line_as_well() -> None:
    office = Office()
    office.start("ba", 1_000)
    office.start("ca", 500)
    assert office.run() == {"ca": 10.0, "ba": 15.0}


def test_a_latecomer_slows_the_one_before_it() -> None:
    office = Office()
    office.start("ab", 1_000)
    office.start_at(5.0, "ac", 1_000)
    # 500 bytes of `ab` by 5 s, the other 500 at 50 until 15 s; then 500 of `ac` are left, at 100.
    assert office.run() == {"ab": 15.0, "ac": 20.0}


def test_both_directions_of_a_line_are_apart() -> None:
    office = Office()
    office.start("ab", 1_000)
    office.start("ba", 1_000)
    assert office.run() == {"ab": 10.0, "ba": 10.0}


def test_a_rate_is_the_smaller_of_the_two_shares_and_what_is_left_over_is_nobodys() -> None:
    office = Office()
    office.start("ad", 300)  # a sends three: 33.3 each
    office.start("ab1", 1_000)
    office.start("ab2", 1_000)
    office.start("cd", 300)  # d receives two: 50 for this one, though `ad` uses only 33.3 of its 50
    ends = office.run()
    assert ends["cd"] == pytest.approx(6.0)
    assert ends["ad"] == pytest.approx(9.0)
    # 300 bytes each at 33.3 until 9 s, then 700 at 50.
    assert ends["ab1"] == ends["ab2"] == pytest.approx(23.0)


@pytest.mark.parametrize("crowd", [2, 3, 7, 50])
def test_a_crowd_takes_as_long_as_one_after_the_other(crowd: int) -> None:
    office = Office()
    for number in range(crowd):
        office.start(f"ab{number}", 1_000)
    ends = office.run()
    assert list(ends.values()) == pytest.approx([10.0 * crowd] * crowd)


def test_a_paused_transfer_leaves_the_line_to_others_and_goes_on_where_it_was() -> None:
    office = Office()
    paused = office.start("ab", 1_000)
    office.start("ac", 1_000)
    remaining: list[float] = []
    office.clock.at(4.0, lambda: remaining.append(office.transfers.pause(paused)))
    office.clock.at(5.0, lambda: remaining.append(office.transfers.pause(paused)))
    office.clock.at(20.0, office.transfers.resume, paused)
    # 200 bytes of each by 4 s; 800 of `ac` alone until 12 s; 800 of `ab` alone from 20 s on.
    assert office.run() == {"ac": 12.0, "ab": 28.0}
    assert remaining == [800.0, 800.0]


def test_one_that_is_paused_for_good_never_ends() -> None:
    office = Office()
    paused = office.start("ab", 1_000)
    office.clock.at(4.0, office.transfers.pause, paused)
    assert office.run() == {}
    assert (paused.remaining, paused.ends_at) == (600.0, inf)


def test_a_change_of_bandwidth_holds_for_what_runs() -> None:
    office = Office()
    office.start("ab", 1_000)
    office.clock.at(5.0, office.transfers.set_bandwidth, 25.0, 100.0)
    office.clock.at(15.0, office.transfers.set_bandwidth, 50.0, 1_000.0)
    # 500 by 5 s, 250 more by 15 s, and 250 at 50.
    assert office.run() == {"ab": 20.0}


def test_one_that_becomes_faster_and_slower_ends_once_and_in_time() -> None:
    office = Office()
    office.start("ab", 1_000)
    for moment in range(1, 9):
        office.start_at(float(moment), f"ac{moment}", 5)
    ends = office.run()
    # Each of the eight takes 0.1 s at half the line, which costs `ab` 5 bytes.
    assert ends["ab"] == pytest.approx(10.0 + 8 * 0.05)


@dataclass
class Slow:
    """The same model in the dullest way: at every step, all rates anew."""

    up: float
    down: float

    def ends(self, jobs: list[tuple[float, str, float]]) -> dict[str, float]:
        waiting, running, ends, now = sorted(jobs), dict[str, float](), dict[str, float](), 0.0
        while waiting or running:
            rates = {
                name: min(
                    self.up / sum(other[0] == name[0] for other in running),
                    self.down / sum(other[1] == name[1] for other in running),
                )
                for name in running
            }
            step = min((left / rates[name] for name, left in running.items()), default=inf)
            if waiting:
                step = min(step, waiting[0][0] - now)
            now += step
            running = {name: left - rates[name] * step for name, left in running.items()}
            for name in [name for name, left in running.items() if left <= 1e-6]:
                ends[name] = now
                del running[name]
            while waiting and waiting[0][0] <= now:
                _, name, num_bytes = waiting.pop(0)
                running[name] = num_bytes
        return ends


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_ends_equal_those_of_a_plain_reckoning(seed: int, num_jobs: int) -> None:
    rng = random.Random(seed)
    office = Office(up=100.0, down=70.0)
    jobs = []
    for number in range(num_jobs):
        sender, receiver = rng.sample("abcde", 2)
        jobs.append((rng.uniform(0, 50), f"{sender}{receiver}{number}", rng.uniform(1, 2_000)))
    for job in jobs:
        office.start_at(*job)
    assert office.run() == pytest.approx(Slow(100.0, 70.0).ends(jobs), rel=1e-6)
