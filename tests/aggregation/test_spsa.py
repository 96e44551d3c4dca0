"""`spsa`: the estimate on a quadratic, the clip by hand, and replicas with the same log that are the same to the byte."""

import hashlib
import itertools
import math
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregation import spsa
from aggregation.base import Params
from aggregation.perturbation import (
    GAUSSIAN,
    GENERATOR,
    Step,
    apply_steps,
    normals,
    params_digest,
    pool_key,
    seed_key,
    signs,
    signs_of,
)
from aggregation.scalar_code import DECODED, decode, encode
from aggregation.spsa import (
    ClipState,
    Round,
    central_difference,
    clip_after,
    coefficients,
    difference,
    open_clip,
    pool_index,
    pool_replay,
    pool_step,
    private_difference,
    replay,
)

BASE, AUTHOR, OTHER = bytes(range(32)), bytes(range(32, 64)), b"\xff" * 32


def quadratic(params: Params, curvature: Tensor) -> float:
    return float((0.5 * curvature * params["w"].double() ** 2).sum())


def some_rounds(count: int, seed: int = 0, decay: float = 0.01, authors: int = 3) -> list[Round]:
    rng = np.random.default_rng(seed)
    return [
        Round(
            number,
            2.0 ** -rng.integers(3, 7),
            decay if number % 2 else 0.0,
            [(bytes([author]) * 32, rng.bytes(rng.integers(0, 5))) for author in range(authors)],
        )
        for number in range(count)
    ]


def some_params(dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(size, generator=generator).to(dtype)
        for name, size in (("b", 300), ("a", 1000), ("c", 7))
    }


def after(
    rounds: Sequence[Round], quantile: float = 0.9, every: int = 4, dtype: torch.dtype = torch.float32
) -> bytes:
    params = some_params(dtype)
    replay(params, rounds, open_clip(), base=BASE, quantile=quantile, every=every, undecayed=["c"])
    return params_digest(params)


# --- the estimate ---------------------------------------------------------------------------------------
def test_of_a_quadratic_the_difference_is_the_slope() -> None:
    """The vector of papers.md, with its direction."""
    curvature, theta, z = (
        np.array(values) for values in ([3.0, 1.0, 0.5], [1.0, -2.0, 4.0], [0.3, -1.2, 0.7])
    )
    upper, lower = (float((0.5 * curvature * (theta + side * z) ** 2).sum()) for side in (0.1, -0.1))
    assert difference(upper, lower, 0.1) == pytest.approx(4.7, rel=1e-12)
    assert z @ (curvature * theta) == pytest.approx(4.7, rel=1e-12)


@pytest.mark.parametrize("kind", [GENERATOR, GAUSSIAN])
@pytest.mark.parametrize("epsilon", [2.0**-10, 0.25, 1e-2])
def test_the_estimate_is_the_slope_along_the_direction(kind: str, epsilon: float) -> None:
    params = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0))}
    curvature = torch.rand(100, generator=torch.Generator().manual_seed(1)).double()
    direction = (signs if kind == GENERATOR else normals)(5, [100])
    slope = direction.astype(float) @ (curvature * params["w"].double()).numpy()
    before = params_digest(params)

    found = central_difference(lambda: quadratic(params, curvature), params, 5, epsilon, kind)

    # Where theta +- epsilon z is rounded, to float32, the two sides are not quite as far from each other.
    assert found == pytest.approx(slope, rel=1e-3, abs=1e-3)
    assert params_digest(params) == before


def test_parameters_come_back_when_the_loss_raises() -> None:
    params = some_params(torch.bfloat16)
    before = params_digest(params)
    calls = []

    def loss() -> float:
        calls.append(params_digest(params))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return 1.0

    with pytest.raises(RuntimeError, match="memory"):
        central_difference(loss, params, 3, 1e-3)

    assert params_digest(params) == before
    assert len({before, *calls}) == 3


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 1e-60, 1e39])
def test_epsilon_is_above_0(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        central_difference(lambda: 0.0, {}, 1, epsilon)


def test_the_second_moment_of_the_estimate() -> None:
    """Of signs ||g z||**2 is d ||grad||**2 on average, for normals it would be d + 2; of m averaged 1 + (d - 1) / m."""
    entries, count, averaged = 50, 6000, 10
    gradient = np.random.default_rng(0).normal(size=entries)
    z = signs_of(range(count), [entries], np.float64)
    estimates = (z @ gradient)[:, None] * z
    square = gradient @ gradient

    assert (estimates**2).sum(1).mean() == pytest.approx(entries * square, rel=0.05)
    means = estimates.reshape(-1, averaged, entries).mean(1)
    assert (means**2).sum(1).mean() == pytest.approx((1 + (entries - 1) / averaged) * square, rel=0.05)
    assert np.abs(estimates.mean(0) - gradient).max() < 0.5


def test_a_private_difference_is_cut_averaged_and_noisy() -> None:
    params = {"w": torch.zeros(4)}
    sides = iter([torch.tensor([1.0, 5.0, math.nan, 0.0]), torch.tensor([0.0, 0.0, 0.0, 3.0])])
    rng, same = np.random.default_rng(3), np.random.default_rng(3)

    found = private_difference(lambda: next(sides), params, 1, 0.5, clip=2.0, noise=0.3, rng=rng)

    # Slopes of 1, 5 (cut to 2), none and -3 (cut to -2).
    assert found == pytest.approx((1 + 2 + 0 - 2) / 4 + same.normal() * 0.3 * 2 / 4)
    assert not params["w"].any()


def test_one_example_moves_a_private_difference_by_the_clip_at_most() -> None:
    def estimate(last: float) -> float:
        sides = iter([torch.tensor([0.1, last]), torch.zeros(2)])
        rng = np.random.default_rng(0)
        return private_difference(lambda: next(sides), {}, 1, 0.5, clip=1.0, noise=0.0, rng=rng)

    middle = estimate(0.0)
    for last in (1e30, -1e30, math.inf, -math.inf, math.nan):
        assert abs(estimate(last) - middle) <= 1.0 / 2 + 1e-9


@pytest.mark.parametrize(("clip", "noise"), [(0.0, 1.0), (math.inf, 1.0), (1.0, -0.1), (1.0, math.nan)])
def test_clip_and_noise_have_a_range(clip: float, noise: float) -> None:
    with pytest.raises(ValueError, match="clip must be"):
        private_difference(lambda: torch.zeros(2), {}, 1, 0.5, clip, noise, np.random.default_rng(0))
    with pytest.raises(ValueError, match="vector"):
        private_difference(lambda: torch.tensor(1.0), {}, 1, 0.5, 1.0, 1.0, np.random.default_rng(0))


# --- the running clip -----------------------------------------------------------------------------------
def test_the_clip_by_hand() -> None:
    clip = clip_after(open_clip(), 1, bytes([0x10, 0x90, 0x20]), quantile=0.5, every=2)
    assert clip.limit == 127
    assert clip.counts[[0x10, 0x20]].tolist() == [2, 1]

    # Levels 0, 16, 16, 32, 48, 127: half of the six lie at or below 16, two thirds at or below 32.
    assert clip_after(clip, 2, bytes([0x00, 0x30, 0xFF]), 0.5, 2).limit == 0x10
    clip = clip_after(clip, 2, bytes([0x00, 0x30, 0xFF]), 0.51, 2)
    assert clip.limit == 0x20
    assert not clip.counts.any()

    assert clip_after(clip, 4, b"", 0.5, 2).limit == 0x20, "nothing was counted"
    assert clip_after(clip, 4, b"\x70", 0.5, 2).limit == 0x70, "codes count as they were said"
    assert clip_after(clip, 4, b"\x70", 1.0, 2).limit == 127, "1 is off"


@given(st.binary(max_size=40), st.floats(0.01, 1))
def test_the_order_within_a_round_does_not_count(codes: bytes, quantile: float) -> None:
    before = ClipState(50, np.arange(128))
    found = clip_after(before, 8, codes, quantile, 4)
    other = clip_after(before, 8, bytes(sorted(codes)), quantile, 4)
    assert found.limit == other.limit
    assert np.array_equal(found.counts, other.counts)
    assert np.array_equal(before.counts, np.arange(128)), "what was given stays as it was"


@pytest.mark.parametrize(("quantile", "every"), [(0.0, 1), (1.1, 1), (math.nan, 1), (0.5, 0)])
def test_quantile_and_every_have_a_range(quantile: float, every: int) -> None:
    with pytest.raises(ValueError, match=r"quantile|every"):
        clip_after(open_clip(), 1, b"", quantile, every)


# --- from codes to parameters ---------------------------------------------------------------------------
def test_coefficients_are_cut_and_rounded_once() -> None:
    codes = bytes(range(256))
    found = coefficients(codes, 0.01, limit=0x50)
    assert found.dtype == np.float32
    for code in range(256):
        cut = DECODED[(code & 0x80) | min(code & 0x7F, 0x50)]
        assert found[code] == np.float32(-0.01 * cut)
    for scale in (0.0, -1.0, math.nan, math.inf, 1e38):
        with pytest.raises(ValueError, match="scale"):
            coefficients(codes, scale)


def test_one_applied_update() -> None:
    """As in protocols/README.md."""
    rounds = [
        Round(0, 0.01, 0.0, [(AUTHOR, bytes([encode(3.7), encode(-0.02)])), (OTHER, bytes([encode(0.5)]))]),
        Round(1, 0.01, 0.125, [(AUTHOR, b"\x40\x00"), (OTHER, b"\xc0")]),
    ]
    expected = {
        torch.float32: (
            "4c706dbc766cfe3d36aa303e0f9db53e746ded3e",
            "be53783f88cd03c09a320a3f",
            "3312ef3094ec4c2c0aa123662e33ed1b3a767744f4839f5888069c06965e0a50",
        ),
        torch.bfloat16: (
            "6cbcff3d303eb63eee3e",
            "783f04c00a3f",
            "800c6f70d88358ffa836efe652e924fd51e4d39f615c0237a83ec4212d7a88ba",
        ),
        torch.float16: (
            "6da3f32f8531ac356b37",
            "c33b1ec05238",
            "0c0d1f278bc4bbf39f081016a7e6d789a369f2d503312ccb9a3d1f4038189d79",
        ),
    }
    for dtype, (a, b, digest) in expected.items():
        params = {"b": torch.tensor([1.0, -2.0, 0.5], dtype=dtype), "a": (torch.arange(5) / 8).to(dtype)}
        replay(params, rounds, open_clip(), base=BASE, quantile=1.0, every=16, undecayed=["b"])
        assert params["a"].view(torch.uint8).numpy().tobytes().hex() == a
        assert params["b"].view(torch.uint8).numpy().tobytes().hex() == b
        assert params_digest(params).hex() == digest


def test_a_replay_is_the_steps_by_hand() -> None:
    rounds = some_rounds(3)
    params, expected = some_params(), some_params()
    for each in rounds:
        keys = [
            seed_key(BASE, author, each.number, sample)
            for author, codes in each.entries
            for sample in range(len(codes))
        ]
        codes = b"".join(codes for _, codes in each.entries)
        values = np.array([-each.scale * decode(code) for code in codes])
        apply_steps(expected, [Step(tuple(keys), values.astype(np.float32), each.decay)])

    clip = replay(params, rounds, open_clip(), base=BASE, quantile=1.0, every=100)

    assert params_digest(params) == params_digest(expected)
    assert clip.counts.sum() == sum(len(codes) for _, codes in rounds[1].entries + rounds[2].entries)


@given(
    st.lists(st.integers(0, 12), max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
@settings(max_examples=25, deadline=None)
def test_replaying_in_parts_is_replaying_at_once(cuts: list[int], dtype: torch.dtype) -> None:
    """A late joiner equals the veteran, wherever its checkpoint was taken."""
    rounds = some_rounds(12)
    params, clip = some_params(dtype), open_clip()
    bounds = [0, *sorted(cuts), 12]
    for start, end in itertools.pairwise(bounds):
        clip = replay(params, rounds[start:end], clip, base=BASE, quantile=0.9, every=4, undecayed=["c"])
    assert params_digest(params) == after(rounds, dtype=dtype)


def test_a_long_replay_makes_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = after(some_rounds(12))
    monkeypatch.setattr(spsa, "KEYS_AT_A_TIME", 5)
    assert after(some_rounds(12)) == at_once


def test_the_log_says_it_all_and_every_part_of_it_counts() -> None:
    rounds = some_rounds(6)
    entries = rounds[1].entries
    others = [
        rounds[:-1],
        [rounds[0], rounds[1]._replace(entries=[(entries[0][0], b"\x55\x55"), *entries[1:]]), *rounds[2:]],
        [rounds[0], rounds[1]._replace(decay=0.02), *rounds[2:]],
        [rounds[0], rounds[1]._replace(scale=1.0), *rounds[2:]],
    ]
    digests = [after(rounds), *(after(each) for each in others), after(rounds, quantile=0.1)]
    assert after(rounds) == digests[0]
    assert len(set(digests)) == 6


def test_a_log_out_of_order_is_refused() -> None:
    rounds = some_rounds(3)
    for faulty in ([rounds[1], rounds[0]], [rounds[1], rounds[1]]):
        with pytest.raises(ValueError, match="rising order"):
            after(faulty)
    for entries in (rounds[0].entries[::-1], [*rounds[0].entries, rounds[0].entries[-1]]):
        with pytest.raises(ValueError, match="rising order"):
            after([rounds[0]._replace(entries=entries)])


# --- a pool ---------------------------------------------------------------------------------------------
def test_which_direction_of_the_pool() -> None:
    said = b"covey pool draw 1\0" + BASE + AUTHOR + struct.pack(">QI", 7, 3)
    drawn = int.from_bytes(hashlib.sha256(said).digest()[:8], "big")
    assert pool_index(BASE, AUTHOR, 7, 3, 4096) == drawn % 4096
    assert [pool_index(BASE, AUTHOR, *place, 4096) for place in ((0, 0), (1, 11), (11, 1))] == [
        1135,
        2995,
        3044,
    ]
    with pytest.raises(ValueError, match="size"):
        pool_index(BASE, AUTHOR, 7, 3, 0)


def test_a_pool_holds_the_sums_of_all_that_was_said() -> None:
    rounds = some_rounds(20, decay=0.0)
    expected = np.zeros(8)
    for each in rounds:
        for author, codes in each.entries:
            for sample, code in enumerate(codes):
                expected[pool_index(BASE, author, each.number, sample, 8)] -= each.scale * decode(code)
    zeros = np.zeros(8)

    sums, clip = pool_replay(zeros, rounds, open_clip(), base=BASE, quantile=1.0, every=5)

    assert np.array_equal(sums, expected)
    assert not zeros.any()
    params, by_hand = some_params(), some_params()
    apply_steps(params, [pool_step(sums, BASE)])
    keys = tuple(pool_key(BASE, index) for index in range(8))
    apply_steps(by_hand, [Step(keys, expected.astype(np.float32))])
    assert params_digest(params) == params_digest(by_hand)
    assert clip.limit == 127


def test_a_pool_can_be_replayed_in_parts() -> None:
    rounds = some_rounds(20, decay=0.0)
    at_once, last = pool_replay(np.zeros(8), rounds, open_clip(), base=BASE, quantile=0.7, every=5)
    sums, clip = np.zeros(8), open_clip()
    for start in range(0, 20, 3):
        sums, clip = pool_replay(sums, rounds[start : start + 3], clip, base=BASE, quantile=0.7, every=5)
    assert np.array_equal(sums, at_once)
    assert clip.limit == last.limit < 127
    assert np.array_equal(clip.counts, last.counts)


def test_a_pool_that_nobody_used_changes_nothing() -> None:
    params = some_params()
    apply_steps(params, [pool_step(np.zeros(8), BASE)])
    assert params_digest(params) == params_digest(some_params())
    with pytest.raises(ValueError, match="decay"):
        pool_replay(np.zeros(8), some_rounds(2), open_clip(), base=BASE, quantile=1.0, every=5)


def test_it_learns() -> None:
    """Three peers with a third of a quadratic's data each, one byte a round and peer."""
    params = {"w": torch.full((20,), 2.0)}
    targets = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    best = float(((targets.mean(0) - targets) ** 2).mean())
    clip = open_clip()
    for number in range(400):
        entries = []
        for peer in range(3):
            author = bytes([peer]) * 32
            key = seed_key(BASE, author, number, 0)
            slope = central_difference(
                lambda peer=peer: float(((params["w"] - targets[peer]) ** 2).mean()), params, key, 2.0**-8
            )
            entries.append((author, bytes([encode(slope)])))
        each = Round(number, 0.08, 0.0, entries)
        clip = replay(params, [each], clip, base=BASE, quantile=0.99, every=20)
    assert float(((params["w"] - targets) ** 2).mean()) < best + 0.05
