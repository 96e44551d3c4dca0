"""Learning from one scalar for each direction: the estimate, and what a log of such scalars makes of parameters.

Belongs here: the central difference, the running clip, from codes to coefficients, replaying rounds. Directions and
how they are applied are in `perturbation.py`, the one-byte code in `scalar_code.py`, who may say what in `protocols`.

In a round each author evaluates its loss at theta + epsilon z and theta - epsilon z for directions z that are functions
of (base, author, round, sample), and says (L+ - L-) / (2 epsilon) for each, in one byte. Every replica goes
theta -= scale * scalar * z over all of them in canonical order: by round, then author, then sample. Two replicas that
know the same rounds have the same bytes, however many rounds they replay at a time.

Sources: Spall 1992, Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation;
Malladi et al. 2023 (MeZO), arXiv 2305.17333; Zelikman et al. 2023, Just One Byte (per gradient), arXiv 2306.10015.
The replay from a log is ours.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aggregation.base import Params
from aggregation.perturbation import (
    FLOAT32_MAX,
    GENERATOR,
    Step,
    apply_steps,
    origin,
    pool_key,
    seed_key,
    shift,
    unshift,
)
from aggregation.scalar_code import DECODED, LEVEL, SIGN

KEYS_AT_A_TIME = 2**14
"""From how many directions on a replay begins another pass: their keys are a few megabytes, and a pass costs next
to nothing beside that many."""

T = TypeVar("T")

KeysOf = Callable[[bytes, int, int], Sequence[int]]
"""(author, round, how many) -> the keys of its first directions in that round."""


class Round(NamedTuple):
    """What all authors said in one round.

    number: from 0 on.
    scale: by how much a scalar is multiplied, above 0: the learning rate over what the round is normed by.
    decay: the share by which values shrink before the update, from 0 up to 1, without 1.
    entries: (author of 32 bytes, one code for each sample in order), by author in rising order, each once.
    """

    number: int
    scale: float
    decay: float
    entries: Sequence[tuple[bytes, bytes]]


class ClipState(NamedTuple):
    """The running clip: the level that larger scalars are cut to, and how often each level was said since it was set.

    limit: 0 to 127, the level of `scalar_code`.
    counts: int64 [128].
    """

    limit: int
    counts: NDArray[np.int64]


# --- the estimate ---------------------------------------------------------------------------------------
def central_difference(
    loss: Callable[[], float], params: Params, key: int, epsilon: float, kind: str = GENERATOR
) -> float:
    """The slope of the loss along a direction, (L(theta + epsilon z) - L(theta - epsilon z)) / (2 epsilon).

    `loss` is evaluated twice, with `params` moved in place; it must be the same function both times (evaluation mode,
    the same samples) and keep no graph. Afterwards, also when it raises, every byte of `params` is what it was.

    epsilon: above 0, rounded to float32, which is what the division takes too. A power of two is best: it keeps what
        `shift` has to remember small.

    Raises ValueError for an epsilon out of range. The result may be NaN or infinite if the loss is.

    Source: MeZO, algorithm 1, but without its drift.
    """
    upper, lower, size = _two_sides(loss, params, key, epsilon, kind)
    return difference(float(upper), float(lower), size)


def difference(upper: float, lower: float, epsilon: float) -> float:
    """(upper - lower) / (2 epsilon): of a quadratic the exact slope for every epsilon, but for rounding."""
    return (upper - lower) / (2 * epsilon)


def private_difference(
    losses: Callable[[], Tensor],
    params: Params,
    key: int,
    epsilon: float,
    clip: float,
    noise: float,
    rng: np.random.Generator,
    kind: str = GENERATOR,
) -> float:
    """`central_difference` of each example, cut to +-clip, averaged, plus normal noise of noise * clip / examples.

    The noise is on one scalar, so it does not grow with the model. One example more or less moves the sum by at most
    `clip`; what privacy follows from that over many rounds is for the caller to count. A difference that is NaN
    counts 0: an example must not show by spoiling the mean.

    Args:
        losses: the loss of each example, [examples], the same examples in the same order both times.
        clip: above 0, in loss per unit of epsilon.
        noise: standard deviation in units of the clip, from 0 on.
        rng: where the noise comes from. It must not be known to others.

    Raises ValueError for an argument out of range and for losses that are no vector of examples.

    Source: Zhang et al. 2024, DPZero: Private Fine-Tuning of Language Models without Backpropagation, arXiv
    2310.09639; its direction is uniform on the sphere, here it is of signs, of the same length.
    """
    if not (0 < clip < math.inf and 0 <= noise < math.inf):
        raise ValueError(
            f"clip must be above 0 and noise at least 0, both finite, not {clip!r} and {noise!r}"
        )
    upper, lower, size = _two_sides(losses, params, key, epsilon, kind)
    if upper.dim() != 1 or upper.shape != lower.shape or not len(upper):
        raise ValueError(
            f"losses must be a vector of examples, not {list(upper.shape)} and {list(lower.shape)}"
        )
    slopes = (upper.detach().double() - lower.detach().double()) / (2 * size)
    mean = float(slopes.nan_to_num(0.0, math.inf, -math.inf).clamp(-clip, clip).mean())
    return mean + float(rng.normal()) * noise * clip / len(upper)


def _two_sides(
    loss: Callable[[], T], params: Params, key: int, epsilon: float, kind: str
) -> tuple[T, T, float]:
    """The loss on both sides, and the epsilon that was really used."""
    size = float(np.float32(epsilon)) if 0 < epsilon <= FLOAT32_MAX else 0.0
    if not size:
        raise ValueError(f"epsilon must be a float32 above 0, not {epsilon!r}")
    found = []
    for step in (size, -size):
        lost = shift(params, key, step, kind)
        try:
            with torch.no_grad():
                found.append(loss())
        finally:
            unshift(params, key, step, lost, kind)
    return found[0], found[1], size


# --- the running clip -----------------------------------------------------------------------------------
def open_clip(limit: int = LEVEL) -> ClipState:
    """A clip that has seen nothing. With the default nothing is cut until the first limit is set."""
    return ClipState(limit, np.zeros(LEVEL + 1, np.int64))


def clip_after(clip: ClipState, number: int, codes: bytes, quantile: float, every: int) -> ClipState:
    """The clip once a round's codes, of all authors in any order, are counted.

    When `number` is a multiple of `every` the limit becomes the smallest level at or below which at least the share
    `quantile` of all counted codes lie, and counting starts anew; with nothing counted it stays. Codes are counted as
    they were said, not as they were cut, so the limit can rise again.

    Args:
        quantile: above 0, up to 1. 1 is off: the limit becomes 127.
        every: rounds, at least 1.

    Raises ValueError for an argument out of range.

    Source: ours. Zelikman et al. send what they measure.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be above 0 and at most 1, not {quantile!r}")
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every!r}")
    counts = clip.counts + np.bincount(_levels(codes), minlength=LEVEL + 1)
    if number % every or not counts.any():
        return ClipState(clip.limit, counts)
    reached = np.cumsum(counts) >= quantile * int(counts.sum())
    return open_clip(LEVEL if quantile == 1 else int(np.argmax(reached)))


def _levels(codes: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(codes, np.uint8) & np.uint8(LEVEL)


def _cut(codes: bytes, limit: int) -> NDArray[np.float64]:
    """What the codes mean, a level above the limit taken as the limit."""
    signs = np.frombuffer(codes, np.uint8) & np.uint8(SIGN)
    values: NDArray[np.float64] = DECODED[signs | np.minimum(_levels(codes), np.uint8(limit))]
    return values


# --- replaying ------------------------------------------------------------------------------------------
def coefficients(codes: bytes, scale: float, limit: int = LEVEL) -> NDArray[np.float32]:
    """-scale * value of each code, cut to the limit, in float64 and then rounded to float32. Without a code there is nothing
    to scale.

    Raises ValueError for a scale that is not above 0 or takes a value out of float32's range.
    """
    largest = scale * float(DECODED[LEVEL])
    if len(codes) and not (scale > 0 and largest <= FLOAT32_MAX):
        raise ValueError(f"scale must be above 0, and small enough for float32, not {scale!r}")
    return (-scale * _cut(codes, limit)).astype(np.float32)


def replay(
    params: Params,
    rounds: Iterable[Round],
    clip: ClipState,
    *,
    base: bytes,
    quantile: float,
    every: int,
    kind: str = GENERATOR,
    undecayed: Collection[str] = (),
    keys_of: KeysOf | None = None,
) -> ClipState:
    """Apply rounds to `params` in place, in as few passes as can be, and hand on the clip.

    Every round's codes are cut to the limit that the rounds before left, and then counted by `clip_after`. Replaying
    rounds in several calls gives the same bytes as in one.

    Args:
        params: where the rounds before have led to, by name (see `perturbation.trained`).
        rounds: in rising order of their numbers.
        clip: as the rounds before left it; `open_clip()` at the base.
        base: 32 bytes that name what the run began from, for the keys of the directions.
        undecayed: names of parameters that do not decay.
        keys_of: an author's keys in a round, for a caller that knows them already; None makes them by `seed_key`.

    Raises ValueError for rounds or authors out of order, and whatever `coefficients`, `clip_after`, `seed_key` and
    `apply_steps` raise; passes before the faulty round may have been applied by then.
    """
    steps: list[Step] = []
    num_keys = 0
    for each, codes, limit, clip_next in _clipped(rounds, clip, quantile, every):
        said = ((author, each.number, len(codes)) for author, codes in each.entries)
        if keys_of is not None:
            keys = tuple(key for where in said for key in keys_of(*where))
        else:
            keys = tuple(
                seed_key(base, author, number, sample)
                for author, number, count in said
                for sample in range(count)
            )
        steps.append(Step(keys, coefficients(codes, each.scale, limit), each.decay))
        num_keys += len(keys)
        if num_keys >= KEYS_AT_A_TIME:
            apply_steps(params, steps, kind=kind, undecayed=undecayed)
            steps, num_keys = [], 0
        clip = clip_next
    apply_steps(params, steps, kind=kind, undecayed=undecayed)
    return clip


def _clipped(
    rounds: Iterable[Round], clip: ClipState, quantile: float, every: int
) -> Iterator[tuple[Round, bytes, int, ClipState]]:
    """Each round with its codes in canonical order, the limit for them, and the clip after it."""
    last = -1
    for each in rounds:
        authors = [author for author, _ in each.entries]
        if each.number <= last or any(one >= other for one, other in itertools.pairwise(authors)):
            raise ValueError(
                f"round {each.number}: rounds and their authors must come in rising order, each once"
            )
        last = each.number
        codes = b"".join(said for _, said in each.entries)
        after = clip_after(clip, each.number, codes, quantile, every)
        yield each, codes, clip.limit, after
        clip = after


# --- a pool of directions -------------------------------------------------------------------------------
def pool_index(base: bytes, author: bytes, round_: int, sample: int, size: int) -> int:
    """Which of the `size` directions of the pool a sample takes: public, and not for its author to choose.

    The first 8 bytes, highest first, of SHA-256 over b"covey pool draw 1\\0" and `perturbation.origin`, modulo size.
    Raises ValueError as `seed_key` does, and for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size!r}")
    drawn = hashlib.sha256(b"covey pool draw 1\0" + origin(base, author, round_, sample)).digest()
    return int.from_bytes(drawn[:8], "big") % size


def pool_replay(
    sums: NDArray[np.float64],
    rounds: Iterable[Round],
    clip: ClipState,
    *,
    base: bytes,
    quantile: float,
    every: int,
) -> tuple[NDArray[np.float64], ClipState]:
    """`replay` where all directions come from a pool: one sum for each of them is all that is kept.

    sums: float64 [size of the pool], zeros at the base; a new array is handed back, with -scale * value (cut to the
    limit) added in canonical order. What parameters follow from it says `pool_step`. A newcomer needs the base, the
    sums and the clip, and no history.

    Raises ValueError as `replay` does, and for a round with decay, which sums cannot hold.

    Source: Qin et al. 2024, Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost
    under 18 Kilobytes (FedKSeed), arXiv 2312.06353.
    """
    sums = np.array(sums, np.float64)
    for each, codes, limit, clip_next in _clipped(rounds, clip, quantile, every):
        if each.decay:
            raise ValueError(f"round {each.number}: a pool's parameters cannot decay")
        origins = ((author, sample) for author, said in each.entries for sample in range(len(said)))
        values = -each.scale * _cut(codes, limit)
        for (author, sample), value in zip(origins, values, strict=True):
            sums[pool_index(base, author, each.number, sample, len(sums))] += value
        clip = clip_next
    return sums, clip


def pool_step(sums: NDArray[np.float64], base: bytes) -> Step:
    """The one step from the parameters of the base to those that a pool's sums stand for.

    Each sum is rounded to float32; directions that nobody took are left out. Apply it to the base's own values, and
    not to those of an earlier state of the sums.
    """
    rounded = np.asarray(sums).astype(np.float32)
    taken = np.flatnonzero(rounded)
    return Step(tuple(pool_key(base, int(index)) for index in taken), rounded[taken])
