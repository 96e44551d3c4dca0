"""Latency models: the same for both directions, from the seed alone, and distributed as they say."""

import statistics
from math import exp
from pathlib import Path

import numpy as np
import pytest

from protocols.errors import ConfigError
from protocols.vocabulary import PeerId
from sim.latency import MIN_ROUND_TRIP_MS, OneWay, constant, lognormal, matrix, read_matrix

PEERS = [PeerId(f"node-{number:05d}") for number in range(60)]
PAIRS = [(a, b) for a in PEERS for b in PEERS if a < b]
MATRIX = np.array([[0.1, 20.0, 30.0], [20.0, 0.1, 50.0], [30.0, 50.0, 0.1]])


@pytest.mark.parametrize(
    "make",
    [
        lambda key: constant(0.1),
        lambda key: lognormal(0.1, 0.5, key),
        lambda key: matrix(MATRIX, key),
    ],
    ids=["constant", "lognormal", "matrix"],
)
def test_both_directions_take_the_same_and_so_do_two_runs(make: OneWay) -> None:
    first, second = make(b"seed"), make(b"seed")  # type: ignore[call-arg, arg-type]
    # In another order: nothing may depend on who asked first.
    there = {pair: first(*pair) for pair in PAIRS}  # type: ignore[operator]
    back = {(a, b): second(b, a) for a, b in reversed(PAIRS)}  # type: ignore[operator]
    assert there == back
    assert min(there.values()) > 0


def test_the_lognormal_has_its_median_and_its_spread() -> None:
    one_way = lognormal(0.1, 0.5, b"seed")
    drawn = sorted(one_way(a, b) for a, b in PAIRS)
    assert len(set(drawn)) == len(PAIRS)
    assert statistics.median(drawn) == pytest.approx(0.1, rel=0.05)
    # 84.1 % lie below one standard deviation.
    assert drawn[int(0.841 * len(drawn))] == pytest.approx(0.1 * exp(0.5), rel=0.07)
    assert drawn[int(0.159 * len(drawn))] == pytest.approx(0.1 * exp(-0.5), rel=0.07)
    assert lognormal(0.1, 0.0, b"seed")(*PAIRS[0]) == 0.1


def test_another_seed_draws_anew() -> None:
    for make in (lambda key: lognormal(0.1, 0.5, key), lambda key: matrix(MATRIX, key)):
        one, other = make(b"1"), make(b"2")
        assert sum(one(*pair) != other(*pair) for pair in PAIRS) > len(PAIRS) / 4


def test_the_matrix_gives_half_of_a_round_trip_and_uses_all_its_hosts() -> None:
    one_way = matrix(MATRIX, b"seed")
    seen = {one_way(a, b) for a, b in PAIRS}
    assert seen == {0.01, 0.015, 0.025, 0.000_05}


def test_a_matrix_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "rtt.csv"
    path.write_text("0, 10, -1\n30, 0.5, -0.5\n8, 0, 1e1\n")
    assert read_matrix(path).tolist() == [
        [MIN_ROUND_TRIP_MS, 20.0, 8.0],  # the two directions averaged; a hole filled from the other direction
        [20.0, 0.5, MIN_ROUND_TRIP_MS],  # a hole in both
        [8.0, MIN_ROUND_TRIP_MS, 10.0],
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot read"),
        ("", "0 rows"),
        ("1,2\n3,4\n5,6\n", "3 rows and 2 columns"),
        ("1,2\n3\n", "not a table of numbers"),
        ("1,2\n3,far\n", "not a table of numbers"),
        ("1,nan\n3,4\n", "not finite"),
        ("\xff\n", "not a table of numbers"),
    ],
    ids=str,
)
def test_a_file_that_is_no_matrix_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "rtt.csv"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=problem) as caught:
        read_matrix(path)
    assert caught.value.path == "links.matrix_path"


def test_a_folder_is_no_matrix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_matrix(tmp_path)
