"""How much each contribution counts, by its age, its merit or how often its source comes.

Belongs here: rules that change weights and leave the models alone, and the mean in which the receiver's own
weight counts like the others'. The averaging itself is `averaging.py`'s.

A weight stays finite and above 0 whatever a rule makes of it: what is to count for nothing counts TINY.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from aggregation import averaging
from aggregation.base import (
    MODEL,
    VALIDATION,
    Contribution,
    Report,
    Rule,
    State,
    is_number,
    receiver_of,
    reporting,
    require,
    require_count,
    stateless,
)
from aggregation.scoring import figure, require_measure, score

TINY = 2.0**-40
"""The least a factor leaves of a weight, beside what it leaves of the largest: about 1e-12."""

V = TypeVar("V")

MAX_SOURCES = 1024
"""How many sources a rule remembers; those longest unseen are forgotten first."""


# --- the mean of all models -----------------------------------------------------------------------------
def fedavg(staleness_half_life: float | None = None) -> Rule:
    """The weighted mean of all models, the receiver's own among them by its own weight.

        out = sum_k n_k x_k / sum_k n_k        n_k: weights, after the staleness decay of `averaging.mean`

    This is `averaging.mean` with the local model's share of all weights as `conservative`: what is said there
    of dtypes, counters, agreement and `parts` holds here. The own model does not decay, hence where all
    others are very stale it is what remains.

    Args:
        staleness_half_life: rounds after which a contribution counts half, above 0. None: staleness is
            ignored.

    Raises ValueError for an argument outside its range.

    Source: arXiv 1602.05629, FederatedAveraging; the receiver stands where the server did.
    """
    averaging.mean(staleness_half_life=staleness_half_life)  # refuses the argument now rather than at a merge

    def function(contributions: Sequence[Contribution], local: Contribution) -> list[Contribution]:
        share = own_share(contributions, local, staleness_half_life)
        merged, _ = averaging.mean(share, staleness_half_life).update(contributions, (), local)
        return merged

    return stateless(function)


def own_share(
    contributions: Sequence[Contribution], local: Contribution, staleness_half_life: float | None = None
) -> float:
    """The local weight as a share of all weights, from 0 to 1, the others' decayed.

    >>> own_share([Contribution({}, weight=1.0)], Contribution({}, weight=3.0))
    0.75
    """
    # Relative to the largest, or the sum of weights that are fine by themselves could be infinite.
    largest = max(other.weight for other in [*contributions, local])
    received = math.fsum(
        other.weight / largest * _decay(other.staleness, staleness_half_life) for other in contributions
    )
    own = local.weight / largest
    return own / (own + received)


def _decay(staleness: float, half_life: float | None) -> float:
    return 1.0 if half_life is None else 0.5 ** (staleness / half_life)


# --- by age ---------------------------------------------------------------------------------------------
KINDS = ("polynomial", "hinge", "exponential")


def staleness(kind: str = "polynomial", a: float = 0.5, b: float = 4.0, half_life: float = 4.0) -> Rule:
    """Multiplies each weight by a function of its staleness s that is 1 at s = 0 and falls from there.

        polynomial    (1 + s) ** -a
        hinge         1 up to s = b, then 1 / (a (s - b) + 1)
        exponential   0.5 ** (s / half_life)

    The freshest one's factor is TINY or more, and no other is below TINY of that: no contribution is lost to
    underflow, and among those that are all very stale the freshest still lead. Before `mean` only the ratios
    matter; before `fedavg` the received models lose ground to the local one.

    Args:
        kind: polynomial forgives much, hinge forgives the first b rounds, exponential forgets.
        a: how steep, at least 0; of polynomial and hinge. At 0 staleness is ignored.
        b: rounds without loss, at least 0; of hinge.
        half_life: rounds after which half is left, above 0; of exponential.

    Raises ValueError for an argument outside its range.

    Source: arXiv 1903.03934 (FedAsync) for polynomial and hinge. There the factor scales the server's
    mixing share for one arrival; here it scales one weight among several.
    """
    require(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
    require(is_number(a) and a >= 0, "a", "a number of at least 0", a)
    require(is_number(b) and b >= 0, "b", "a number of rounds of at least 0", b)
    require(is_number(half_life) and half_life > 0, "half_life", "a number of rounds above 0", half_life)
    logs: Mapping[str, Callable[[float], float]] = {
        "polynomial": lambda s: -a * math.log2(1 + s),
        "hinge": lambda s: -math.log2(1 + a * (s - b)) if s > b else 0.0,
        "exponential": lambda s: -s / half_life,
    }

    def function(contributions: Sequence[Contribution], local: Contribution) -> list[Contribution]:
        factors = floored_powers([logs[kind](float(other.staleness)) for other in contributions])
        return [_times(other, factor) for other, factor in zip(contributions, factors, strict=True)]

    return stateless(function)


def floored_powers(logs: Sequence[float]) -> list[float]:
    """2 ** log for each: the largest at least TINY, the others at least TINY of that one.

    >>> floored_powers([0.0, -2.0, -1e9]) == [1.0, 0.25, TINY]
    True
    """
    if not logs:
        return []
    # No minus infinities: their difference is no number.
    bounded = [max(log, -sys.float_info.max) for log in logs]
    largest, least = max(bounded), math.log2(TINY)
    return [2.0 ** (max(largest, least) + max(log - largest, least)) for log in bounded]


# --- by merit -------------------------------------------------------------------------------------------
def metric(power: float = 1.0, by: str = "loss") -> Rule:
    """Multiplies each weight by loss ** -power, the loss being the receiver's, on its validation samples.

    A model whose loss is no finite number is dropped; where that drops all, a rule that reduces is left with
    the local model. The sum of the weights of the others stays as it was. A peer's own figure is never used:
    it would have to be believed.

    Args:
        power: how sharply merit counts, at least 0. 0 leaves the weights alone.
        by: "loss", which should not be negative, or "accuracy", where the share of wrong answers is the loss.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2504.18580, metrics-weighted averaging. The form is reconstructed from the abstract: a
    weight that falls with the loss, with one exponent.
    """
    require(is_number(power) and power >= 0, "power", "a number of at least 0", power)
    require_measure(by)

    def function(
        contributions: Sequence[Contribution], local: Contribution
    ) -> tuple[list[Contribution], Report]:
        receiver = receiver_of(local)
        scores = [score(receiver, other.params, by) for other in contributions]
        losses = [-value if by == "loss" else 1 - value for value in scores]
        kept = [(other, loss) for other, loss in zip(contributions, losses, strict=True) if loss < math.inf]
        report: dict[str, str | float] = {"dropped": len(losses) - len(kept)}
        if kept:
            report[f"best_{by}"] = figure(max(scores), by)
        merits = metric_weights([loss for _, loss in kept], power)
        return _reweighted([other for other, _ in kept], merits), report

    return reporting(function, needs={MODEL, VALIDATION})


def metric_weights(losses: Sequence[float], power: float) -> list[float]:
    """loss_i ** -power as shares of their sum. Finite losses; all that are not above 0 share the whole.

    Floored at TINY of the largest share.

    >>> [round(weight, 6) for weight in metric_weights([1.0, 0.5, 0.25], 2)]
    [0.047619, 0.190476, 0.761905]
    """
    if power and any(loss <= 0 for loss in losses):
        merits = [1.0 if loss <= 0 else TINY for loss in losses]
    else:
        logs = [min(-power * math.log2(loss), sys.float_info.max) if power else 0.0 for loss in losses]
        largest = max(logs, default=0.0)
        merits = floored_powers([log - largest for log in logs])
    total = math.fsum(merits)
    return [merit / total for merit in merits]


def _reweighted(contributions: Sequence[Contribution], merits: Sequence[float]) -> list[Contribution]:
    """Weights times merits, brought back to the sum the weights had."""
    if len(set(merits)) <= 1:
        return list(contributions)  # to the bit: a sum taken apart and put together again would not be
    largest = max(other.weight for other in contributions)
    weights = [other.weight / largest for other in contributions]
    total = math.fsum(weights)
    products = [weight * merit for weight, merit in zip(weights, merits, strict=True)]
    scale = total / math.fsum(products)
    return [
        _weighing(other, product * scale * largest)
        for other, product in zip(contributions, products, strict=True)
    ]


# --- by participation -----------------------------------------------------------------------------------
class Intervals(NamedTuple):
    """How often one source takes part: FedAU's counters.

    since: merges since it last took part, or since a long absence was cut.
    covered, ended: the merges in the intervals that ended, and the number of those intervals.
    """

    since: int = 0
    covered: int = 0
    ended: int = 0

    @property
    def weight(self) -> float:
        """The mean interval, which estimates 1 / (probability to take part); 1 before the first one ends."""
        return self.covered / self.ended if self.ended else 1.0


def observed(intervals: Intervals, takes_part: bool, at_most: int) -> Intervals:
    """One merge later. An interval ends when the source takes part, or is cut at `at_most` merges."""
    since = intervals.since + 1
    if takes_part or since >= at_most:
        return Intervals(0, intervals.covered + since, intervals.ended + 1)
    return intervals._replace(since=since)


def participation(at_most: int = 50) -> Rule:
    """Multiplies each weight by the mean interval between its source's contributions in earlier merges.

    Who comes half as often counts twice as much when it comes, so that over time all sources have their say
    by their weights, not by their presence. The factor of a merge is known before it: a source cannot raise
    it by staying away this once. A source never seen counts as it is.

    FedAU's server divides by the number of all clients, present or not, so that its step is short when few
    came. Here a `mean` follows and divides by the weights that came: the direction is FedAU's, the length is
    the mean's. A merge in which nothing came does not count. MAX_SOURCES sources are remembered.

    Args:
        at_most: an absence counts as so many merges at most, 1 or more; bounds the factor. 1 turns it off.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2306.03401 (FedAU), the weights.
    """
    require_count("at_most", at_most)

    def update(
        contributions: Sequence[Contribution], state: State, local: Contribution
    ) -> tuple[list[Contribution], State]:
        if not contributions:
            return [], state
        known: dict[str, Intervals] = state
        came = {other.source for other in contributions}
        weighted = [_times(other, known.get(other.source, Intervals()).weight) for other in contributions]
        absent = {
            source: observed(intervals, False, at_most)
            for source, intervals in known.items()
            if source not in came
        }
        present = {source: observed(known.get(source, Intervals()), True, at_most) for source in sorted(came)}
        return weighted, _latest(absent | present)

    return Rule(init=lambda params: {}, update=update)


# --- by windows -----------------------------------------------------------------------------------------
class Windows(NamedTuple):
    """How many merges there were, and which of them each source last contributed to."""

    num_merges: int
    last: dict[str, int]


def window(at_most: int = 50) -> Rule:
    """Multiplies each weight by the number of merges since its source's last contribution; 1 for the first.

    A source whose computation takes three merges contributes to every third, three times as much, which is
    its weight a merge on the average. For merges at fixed times: a merge in which nothing came counts as one.
    Unlike `weight.participation` it looks at this one interval and averages none. MAX_SOURCES sources are
    remembered.

    Args:
        at_most: upper limit of the factor, 1 or more. 1 turns it off.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2206.10189 (FedFix): p_i * ceil(tau_i / window) for a client that takes tau_i. Here the
    interval is counted rather than known.
    """
    require_count("at_most", at_most)

    def update(
        contributions: Sequence[Contribution], state: State, local: Contribution
    ) -> tuple[list[Contribution], State]:
        windows: Windows = state
        now = windows.num_merges + 1
        weighted = [
            _times(other, min(now - windows.last.get(other.source, now - 1), at_most))
            for other in contributions
        ]
        came = {other.source for other in contributions}
        absent = {source: last for source, last in windows.last.items() if source not in came}
        return weighted, Windows(now, _latest(absent | dict.fromkeys(sorted(came), now)))

    return Rule(init=lambda params: Windows(0, {}), update=update)


# --- weights --------------------------------------------------------------------------------------------
def _times(contribution: Contribution, factor: float) -> Contribution:
    return _weighing(contribution, contribution.weight * factor)


def _weighing(contribution: Contribution, weight: float) -> Contribution:
    return replace(contribution, weight=min(max(weight, sys.float_info.min), sys.float_info.max))


def _latest(by_source: dict[str, V]) -> dict[str, V]:
    """The last MAX_SOURCES of a dict in which those seen last stand last."""
    return dict(list(by_source.items())[-MAX_SOURCES:])
