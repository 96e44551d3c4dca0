"""How long a message takes between two nodes: constant, drawn per pair, or from measured round trips.

Belongs here: functions from a pair of nodes to seconds one way. They draw by hashing the pair with a key, so they
remember no pair, give both directions alike, and do not depend on who came first.
"""

import warnings
from collections.abc import Callable
from hashlib import blake2b
from math import exp
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from protocols.errors import ConfigError
from protocols.vocabulary import PeerId

OneWay = Callable[[PeerId, PeerId], float]
"""Seconds from one node to the other, the same in both directions."""

MIN_ROUND_TRIP_MS = 0.01
"""What stands for a round trip that was measured as nothing, or as less: two processes on one machine."""


def constant(latency_s: float) -> OneWay:
    """The same for every pair."""
    return lambda a, b: latency_s


def lognormal(median_s: float, sigma: float, key: bytes) -> OneWay:
    """Drawn once per pair: `median_s * exp(sigma * z)`, z standard normal.

    key: at most 64 bytes; another key draws anew.
    """
    normal = NormalDist()

    def one_way(a: PeerId, b: PeerId) -> float:
        low, high = (a, b) if a < b else (b, a)
        # The middle of one of 2**53 equal parts of (0, 1): neither end, where the normal has no value.
        uniform = ((_draw(key, f"{low} {high}") >> 11) + 0.5) / 2**53
        return median_s * exp(sigma * normal.inv_cdf(uniform))

    return one_way


def matrix(round_trips_ms: npt.NDArray[np.float64], key: bytes) -> OneWay:
    """Every node is put at one of the measured hosts, drawn per node; several may share one.

    round_trips_ms: N x N, symmetric, positive, as `read_matrix` gives it. Half a round trip is one way.
    """
    num_hosts = len(round_trips_ms)

    def one_way(a: PeerId, b: PeerId) -> float:
        return float(round_trips_ms[_draw(key, a) % num_hosts, _draw(key, b) % num_hosts]) / 2_000

    return one_way


def read_matrix(path: Path) -> npt.NDArray[np.float64]:
    """The N x N round trips of a CSV file, in ms, repaired.

    Measured matrices have holes (negative or zero), and two directions that were measured at different times: a hole
    takes the other direction's value, what is still not positive becomes `MIN_ROUND_TRIP_MS`, and the two directions
    are averaged.

    Raises:
        ConfigError: at `links.matrix_path`, the file is missing, not numeric, empty or not square.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file is found below
            measured = np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8")
    except OSError as error:
        raise ConfigError("links.matrix_path", f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError("links.matrix_path", f"{path} is not a table of numbers: {error}") from error
    rows, columns = measured.shape
    if rows != columns or rows == 0:
        raise ConfigError(
            "links.matrix_path", f"{path} has {rows} rows and {columns} columns", ["a square matrix"]
        )
    if not np.isfinite(measured).all():
        raise ConfigError("links.matrix_path", f"{path} holds a value that is not finite")
    filled = np.where(measured > 0, measured, measured.T)
    clipped = np.maximum(filled, MIN_ROUND_TRIP_MS)
    return np.asarray((clipped + clipped.T) / 2, dtype=np.float64)


def _draw(key: bytes, text: str) -> int:
    """64 bits for this text."""
    return int.from_bytes(blake2b(text.encode(), key=key, digest_size=8).digest(), "big")
