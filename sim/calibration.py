"""Whether many models are better computed in one call, found out by trying.

Belongs here: the choice, what it rests on, and how it is told to the operator. A choice decides on speed alone.
"""

import math
import time
from collections.abc import Callable, Hashable

import torch
from msgspec import Struct
from torch import Tensor

TOLERANCE = 1e-4
"""A batched result further than this from the plain one, measured on the larger of 1 and the largest entry, is taken
for wrong rather than rounded."""

TILE_BYTES = {"cpu": 12_000_000, "cuda": 1_000_000_000}
"""Of models and data worked on in one call. On a CPU what the cache holds together with the gradients: beyond about
20 MB every step waits for the memory, and with a small part of it for the calls."""
SMALLEST_TILE, LARGEST_TILE = 4, {"cpu": 1024, "cuda": 65_536}
NUM_PLAIN = 3
"""Models in the trial and in one timing of the plain loop."""
NEVER = 1 << 62


class Choice(Struct, frozen=True):
    """How one kind of work is done."""

    tile: int
    """Models in one call, at most."""
    batched_from: int
    """Fewer models than this are computed one by one; `NEVER` where all are."""
    reason: str
    plain_us: float | None = None
    """Measured, a model."""
    batched_us: float | None = None
    """Measured, a model of a full tile."""

    def batches(self, num_models: int) -> bool:
        """Whether so many models are computed in one call."""
        return num_models >= self.batched_from


def tile_size(bytes_per_model: int, num_models: int, device: str) -> int:
    """How many models fit the cache, or a part of the device's memory."""
    fitting = TILE_BYTES[device] // max(1, bytes_per_model)
    return min(max(SMALLEST_TILE, fitting), LARGEST_TILE[device], max(1, num_models))


def disagreement(plain: Tensor, batched: Tensor) -> float:
    """How far two results are apart, as `TOLERANCE` counts it; infinite where one has what the other has not."""
    if not plain.numel():
        return 0.0
    if not torch.equal(plain.isnan(), batched.isnan()):
        return math.inf
    # What both make of unusable data counts as equal; infinities become the largest numbers.
    plain, batched = plain.double().nan_to_num(), batched.double().nan_to_num()
    return float((plain - batched).abs().max() / plain.abs().max().clamp(min=1))


def compare(
    key: Hashable, tile: int, run_plain: Callable[[int], None], run_batched: Callable[[int], None]
) -> Choice:
    """Time both on so many models each; measured once per key and process, because it takes a moment.

    A call costs something whatever its size: from a call with two models and a full one follows the number of
    models from which calls pay.
    """
    if key not in _compared:
        _compared[key] = _compare(tile, run_plain, run_batched)
    return _compared[key]


_compared: dict[Hashable, Choice] = {}


def _compare(tile: int, run_plain: Callable[[int], None], run_batched: Callable[[int], None]) -> Choice:
    three_s, few_s, full_s = _seconds(
        lambda: run_plain(NUM_PLAIN), lambda: run_batched(2), lambda: run_batched(tile)
    )
    plain_s = three_s / NUM_PLAIN
    per_model_s = max(0.0, full_s - few_s) / max(1, tile - 2)
    per_call_s = max(0.0, few_s - 2 * per_model_s)
    pays = tile > 1 and full_s / tile < plain_s
    smallest = math.ceil(per_call_s / (plain_s - per_model_s)) if plain_s > per_model_s else tile
    return Choice(
        tile,
        max(2, min(smallest, tile)) if pays else NEVER,
        "measured",
        round(plain_s * 1e6, 1),
        round(full_s / tile * 1e6, 1),
    )


def _seconds(*runs: Callable[[], None]) -> list[float]:
    """The best of four of each, by turns, so that a busy moment of the machine falls on all of them alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + 4):
        for run, found in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
    return [min(found[1:]) for found in times]  # the first pays for what is set up once
