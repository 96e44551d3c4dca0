"""`scalar_code`: the table of the paper's notes, all 256 codes, rounding by a draw, and what has no code."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.scalar_code import DECODED, LEVELS, decode, encode, level

TABLE = [
    (1.0, 0x40, 1.0),
    (0.5, 0x3A, 0.4723665527410147),
    (3.7, 0x4A, 3.4903429574618414),
    (100.0, 0x65, 102.00277308269969),
    (-0.02, 0xA1, -0.020754337873699742),
    (1e-5, 0x01, 0.0003801289578694637),
    (3000.0, 0x7F, 2630.686190299136),
    (0.0, 0x00, 0.0),
    (-1.0, 0xC0, -1.0),
]

inside = st.floats(LEVELS[1], LEVELS[127])


@pytest.mark.parametrize(("value", "code", "decoded"), TABLE)
def test_the_table(value: float, code: int, decoded: float) -> None:
    assert encode(value) == code
    assert decode(code) == decoded


def test_every_code_means_a_finite_number_and_is_what_that_is_encoded_as() -> None:
    for code in range(256):
        value = decode(code)
        assert math.isfinite(value)
        assert encode(value) == (0 if code == 0x80 else code)
        assert value == (-1 if code & 0x80 else 1) * LEVELS[level(code)]
    assert decode(0x80) == decode(0) == 0


def test_the_levels_are_those_of_exp_to_its_last_bits() -> None:
    found = np.array(LEVELS[1:])
    assert np.all(np.abs(found - np.exp((np.arange(1, 128) - 64) / 8)) <= 2 * np.spacing(found))
    assert (np.diff(LEVELS) > 0).all()


def test_levels_do_not_depend_on_the_machine() -> None:
    """The bits of the first, the one above the middle, the last, and of all; as in protocols/README.md."""
    assert [LEVELS[index].hex() for index in (1, 65, 127)] == [
        "0x1.8e981713b5a6dp-12",
        "0x1.2216045b6f5cdp+0",
        "0x1.48d5f5455bb3ep+11",
    ]
    assert hashlib.sha256(np.array(LEVELS, "<f8").tobytes()).hexdigest() == (
        "bd133578c822997cefceb8b1f5d0e418b8e53c17e507634cd41d93004ec73d1f"
    )


@given(inside, st.sampled_from([1, -1]))
def test_within_the_levels_the_error_is_at_most_6_45_per_cent(size: float, sign: int) -> None:
    assert abs(decode(encode(sign * size)) - sign * size) <= (math.exp(1 / 16) - 1) * size * (1 + 1e-12)


@given(inside, st.floats(0, 1, exclude_max=True), st.sampled_from([1, -1]))
def test_a_drawn_code_is_one_of_the_neighbours(size: float, draw: float, sign: int) -> None:
    code = encode(sign * size, draw)
    below = max(index for index in range(128) if LEVELS[index] <= size)
    assert level(code) in {below, min(below + 1, 127)}
    assert (code >= 0x80) == (sign < 0)


@pytest.mark.parametrize("value", [0.0123, -1.05, 7.0, 2000.0])
def test_a_drawn_code_is_right_on_average(value: float) -> None:
    draws = (np.arange(20_000) + 0.5) / 20_000
    mean = DECODED[[encode(value, draw) for draw in draws]].mean()
    assert mean == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("draw", [None, 0.0, 0.999])
def test_beyond_the_levels_values_are_cut(draw: float | None) -> None:
    assert [encode(value, draw) for value in (5e-324, -1e-5, 1e300, -3000.0)] == [0x01, 0x81, 0x7F, 0xFF]
    assert [encode(value, draw) for value in (0.0, -0.0)] == [0, 0]
    assert [encode(value, draw) for value in (LEVELS[1], LEVELS[127])] == [1, 127]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_code(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        encode(value)


@pytest.mark.parametrize("draw", [-0.1, 1.0, math.nan])
def test_a_draw_is_from_0_up_to_1(draw: float) -> None:
    with pytest.raises(ValueError, match="draw"):
        encode(1.0, draw)


@pytest.mark.parametrize("code", [-1, 256])
def test_a_code_is_a_byte(code: int) -> None:
    with pytest.raises(ValueError, match="byte"):
        decode(code)
