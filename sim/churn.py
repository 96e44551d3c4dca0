"""Who comes and goes, and when: a schedule drawn from a seed, or written by hand."""

import random
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct


class Change(StrEnum):
    """What happens to a node."""

    JOIN = "join"
    CRASH = "crash"
    RESTART = "restart"


class ChurnEvent(Struct, frozen=True, order=True):
    """One node, one moment (virtual seconds)."""

    at_s: float
    node: int
    change: Change


class ChurnSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Exponential sessions. Without `mean_online_s` nobody ever crashes."""

    join_within_s: Annotated[float, Meta(ge=0)] = 1.0
    """Nodes start at moments drawn uniformly from 0 to this."""
    mean_online_s: Annotated[float, Meta(gt=0)] | None = None
    mean_offline_s: Annotated[float, Meta(gt=0)] = 10.0
    until_s: Annotated[float, Meta(gt=0)] = 3600.0
    """No crash after this; who is down then still comes back."""


def draw_schedule(settings: ChurnSettings, num_nodes: int, rng: random.Random) -> list[ChurnEvent]:
    """Every node's joins, crashes and restarts, in order of time. A crashed node always comes back."""
    events = []
    for node in range(num_nodes):
        at = rng.random() * settings.join_within_s
        events.append(ChurnEvent(at, node, Change.JOIN))
        while settings.mean_online_s is not None:
            at += rng.expovariate(1 / settings.mean_online_s)
            if at > settings.until_s:
                break
            events.append(ChurnEvent(at, node, Change.CRASH))
            at += rng.expovariate(1 / settings.mean_offline_s)
            events.append(ChurnEvent(at, node, Change.RESTART))
    return sorted(events)


def check_schedule(events: Sequence[ChurnEvent], num_nodes: int) -> None:
    """Each node joins first, then crashes and restarts by turns.

    Raises:
        ValueError: which event of which node is out of place.
    """
    allowed = {
        None: Change.JOIN,
        Change.JOIN: Change.CRASH,
        Change.CRASH: Change.RESTART,
        Change.RESTART: Change.CRASH,
    }
    last: dict[int, Change] = {}
    for event in sorted(events):
        if not 0 <= event.node < num_nodes:
            raise ValueError(f"churn at {event.at_s} s: node {event.node} of {num_nodes}")
        expected = allowed[last.get(event.node)]
        if event.change is not expected:
            raise ValueError(
                f"churn at {event.at_s} s: node {event.node} cannot {event.change.value} now (allowed: {expected.value})"
            )
        last[event.node] = event.change
