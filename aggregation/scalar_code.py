"""The code of one scalar in one byte, by which a peer sends a gradient estimate.

Belongs here: the code and its levels. What is done with a decoded value belongs to `spsa.py`.

    0x00            zero
    0x01 to 0x7f    exp((code - 64) / 8), from 3.801e-4 to 2630.69
    0x80 + level    minus that; 0x80 alone decodes to zero too, and is never made

The levels are computed in decimal arithmetic and rounded once to float64, so that all machines have the same bits:
`exp` of a machine's own library may differ in the last.

Source: Zelikman et al. 2023, Just One Byte (per gradient), arXiv 2306.10015, for a logarithmic code. Theirs has 510
values, which one byte cannot hold; half as many levels for each e-fold can.
"""

import decimal
import math
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

SIGN, LEVEL = 0x80, 0x7F
MIDDLE, PER_E_FOLD = 64, 8


def _levels() -> tuple[float, ...]:
    with decimal.localcontext(decimal.Context(prec=40)):
        return 0.0, *(float((Decimal(level - MIDDLE) / PER_E_FOLD).exp()) for level in range(1, LEVEL + 1))


LEVELS = _levels()
"""The 128 magnitudes, by the low seven bits of a code; rising, 0 first."""

DECODED: NDArray[np.float64] = np.array([*LEVELS, 0.0, *(-size for size in LEVELS[1:])])
"""What each of the 256 codes means."""


def level(code: int) -> int:
    """The low seven bits, which say how large a value is: 0 to 127."""
    return code & LEVEL


def decode(code: int) -> float:
    """What a code means; within 6.45 % of the value it was made from, if that lay within the levels.

    Raises ValueError for a code that is not a byte.
    """
    if not 0 <= code <= 255:
        raise ValueError(f"a code is a byte, from 0 to 255, not {code!r}")
    return float(DECODED[code])


def encode(value: float, draw: float | None = None) -> int:
    """The code of a finite value, which loses to the ends of the levels what lies beyond them.

    Without `draw` the level nearest on a logarithmic scale. With it, a number from 0 up to but without 1 drawn
    uniformly, the upper one b of the two neighbouring levels a < b with probability (|value| - a) / (b - a), else the
    lower one: then the decoded value is right on average. Only what is exactly 0 becomes 0. A peer that applies its
    own value must apply the decoded one, or it departs from the others.

    Raises ValueError for NaN and infinities, and for a draw out of its range.

    >>> encode(1.0), encode(-1.0), encode(0.0), encode(-0.02)
    (64, 192, 0, 161)
    """
    if not math.isfinite(value):
        raise ValueError(f"only a finite value has a code, not {value!r}")
    if draw is not None and not 0 <= draw < 1:
        raise ValueError(f"draw must be a number from 0 up to 1, without 1, not {draw!r}")
    if value == 0:
        return 0
    size = abs(float(value))
    if size <= LEVELS[1]:
        found = 1
    elif size >= LEVELS[LEVEL]:
        found = LEVEL
    elif draw is None:
        found = min(max(round(PER_E_FOLD * math.log(size)) + MIDDLE, 1), LEVEL)
    else:
        found = _drawn_level(size, draw)
    return found | SIGN if value < 0 else found


def _drawn_level(size: float, draw: float) -> int:
    upper = int(np.searchsorted(LEVELS, size))
    below, above = LEVELS[upper - 1], LEVELS[upper]
    return upper if draw < (size - below) / (above - below) else upper - 1
