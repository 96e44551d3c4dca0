"""Bytes pass at an even rate: no burst, no drift, in the order of asking."""

from itertools import pairwise

import pytest

from node.rate_limit import MIN_BYTES_PER_S, MIN_PIECE_BYTES, TokenBucket, check_limit
from protocols.errors import ConfigError
from protocols.vocabulary import CHUNK_BYTES

RATES = [MIN_BYTES_PER_S, 200_000, 8_000_000, 100_000_000]


def passed_at(
    bucket: TokenBucket, num_bytes: int, lateness_s: float = 0.0, start_s: float = 5.0
) -> list[float]:
    """When each piece of so many bytes passes, for one who asks for the next as soon as it may send one, or a bit later."""
    now_s, times = start_s, []
    while num_bytes > 0:
        piece = min(bucket.piece_bytes, num_bytes)
        now_s += bucket.reserve(piece, now_s)
        times.append(now_s)
        now_s += lateness_s
        num_bytes -= piece
    return times


def test_no_limit_is_no_wait_and_one_piece_a_chunk() -> None:
    bucket = TokenBucket()
    assert [bucket.reserve(10**9, 0.0) for _ in range(3)] == [0.0] * 3
    assert (bucket.piece_bytes, bucket.max_streams) == (CHUNK_BYTES, float("inf"))


@pytest.mark.parametrize("rate", RATES)
def test_the_rate_is_kept_and_nothing_bursts(rate: int) -> None:
    bucket = TokenBucket(rate)
    times = passed_at(bucket, 10 * CHUNK_BYTES)
    took_s = times[-1] - times[0]
    gap_s = bucket.piece_bytes / rate
    assert took_s == pytest.approx(10 * CHUNK_BYTES / rate - 2 * gap_s, abs=gap_s)
    assert max(after - before for before, after in pairwise(times)) < 1.01 * gap_s
    assert times[2] - times[0] > 0.99 * gap_s, "two pieces at once, and no third"


@pytest.mark.parametrize("rate", RATES)
def test_pieces_are_small_against_the_limit_and_the_timeouts(rate: int) -> None:
    assert MIN_PIECE_BYTES <= TokenBucket(rate).piece_bytes <= CHUNK_BYTES
    assert TokenBucket(rate).piece_bytes / rate <= 0.5


def test_who_wakes_up_late_still_gets_the_whole_rate() -> None:
    took_s = passed_at(TokenBucket(1_000_000), 10_000_000, lateness_s=0.03)[-1] - 5.0
    assert took_s == pytest.approx(10, rel=0.02)


def test_an_idle_bucket_saves_up_no_more_than_a_piece() -> None:
    bucket = TokenBucket(160_000)
    first = passed_at(bucket, 1_000_000)[-1]
    later = passed_at(bucket, 1_000_000, start_s=first + 3600)
    assert later[-1] - later[0] == pytest.approx(1_000_000 / 160_000, rel=0.04)


def test_those_who_share_a_limit_take_turns() -> None:
    bucket = TokenBucket(160_000)
    waits = [bucket.reserve(16_000, 1.0) for _ in range(6)]
    assert waits == pytest.approx([0.0, 0.0, 0.0976, 0.1976, 0.2976, 0.3976], abs=0.01)


@pytest.mark.parametrize(
    ("rate", "streams"), [(MIN_BYTES_PER_S, 1), (3 * MIN_BYTES_PER_S + 1, 3), (8_000_000, 244)]
)
def test_a_limit_is_shared_by_no_more_than_it_can_feed(rate: int, streams: int) -> None:
    assert TokenBucket(rate).max_streams == streams


@pytest.mark.parametrize("rate", [0, MIN_BYTES_PER_S, 10**9])
def test_sensible_limits_are_taken(rate: int) -> None:
    assert check_limit("network.up_bytes_per_s", rate) == rate


@pytest.mark.parametrize("rate", [1, MIN_BYTES_PER_S - 1, -1])
def test_limits_that_no_peer_would_wait_for_are_refused(rate: int) -> None:
    with pytest.raises(ConfigError, match=r"network\.up_bytes_per_s"):
        check_limit("network.up_bytes_per_s", rate)
