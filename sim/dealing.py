"""Dealing kinds to nodes by their shares."""

import random
from collections.abc import Sequence


def deal(shares: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """Which kind each of `count` nodes is: exact shares, rounded by largest remainder, in an order drawn from `rng`.

    shares: of each kind, together more than 0; they need not add up to 1.
    """
    whole = sum(shares)
    quotas = [share / whole * count for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda kind: (counts[kind] - quotas[kind], kind))
    for kind in by_remainder[: count - sum(counts)]:
        counts[kind] += 1
    kinds = [kind for kind, number in enumerate(counts) for _ in range(number)]
    rng.shuffle(kinds)
    return kinds
