"""Who comes and goes, and when: a schedule drawn from a seed, read from a trace, or written by hand.

Belongs here: every node's own sessions. What befalls many nodes at one moment is the timeline's affair
(`sim/timeline.py`), and what a change does to a node is the world's.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from protocols.errors import ConfigError
from sim.csv_files import Row, read_rows

TRACE_COLUMNS = ("node", "online_from_s", "online_to_s")
MAX_CHANGES = 20_000_000
"""More would fill the memory before anything ran."""


class Change(StrEnum):
    """What happens to a node."""

    JOIN = "join"
    """It starts for the first time."""
    CRASH = "crash"
    """It is gone without a word; its disk stays."""
    WIPE = "wipe"
    """A crash that takes the disk along: no checkpoint, no known peers, the same name."""
    LEAVE = "leave"
    """It says goodbye, keeps what is worth keeping, and stops."""
    RESTART = "restart"
    """It starts again from its disk."""
    SILENCE = "silence"
    """Its machine stops answering, and nobody is told: no link goes down, nothing arrives any more."""
    WAKE = "wake"
    """A silent machine answers again, with what it had."""


class ChurnEvent(Struct, frozen=True, order=True):
    """One node, one moment (virtual seconds)."""

    at_s: float
    node: int
    change: Change


class ChurnSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """When nodes are online. Sessions and absences are drawn alike, from one family, each with its own mean."""

    join_within_s: Annotated[float, Meta(ge=0)] = 1.0
    """Nodes start at moments drawn uniformly from 0 to this. A round's length keeps them from moving in step. A trace
    says itself when they start."""
    model: Literal["none", "exponential", "weibull", "lognormal", "trace"] = "none"
    """`none`: who has joined stays. `exponential`: how long a node was online says nothing on how long it stays, which
    is the simplest. `weibull` with a shape below 1 is what measurements of peer-to-peer networks find (Stutzbach and
    Rejaie 2006, section 4): many short sessions, some very long. `lognormal`: few very short ones. `trace`: a file."""
    mean_online_s: Annotated[float, Meta(gt=0)] = 60.0
    """Mean session. Divide by the length of a round for the rounds that a node does before it goes."""
    mean_offline_s: Annotated[float, Meta(gt=0)] = 10.0
    """Mean absence. The share of the nodes that are online is mean_online_s / (mean_online_s + mean_offline_s)."""
    shape: Annotated[float, Meta(ge=0.2, le=3)] = 0.5
    """The `weibull` exponent: 0.4 to 0.6 for file sharing, 1 is exponential. For `lognormal` the standard deviation
    of the logarithm: 0.5 is narrow, 2 very wide."""
    wipe_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of the crashes, those that lose the disk: models for reinstalled phones, containers without a volume."""
    leave_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of all departures, those that say goodbye; the others are crashes."""
    day_s: Annotated[float, Meta(gt=0)] = 86_400.0
    """A day's length. Shorten it with night_s together to see several days in a short run."""
    night_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of the nodes, those that are offline for a part of each day, each from its own time of day on. With any model."""
    night_s: Annotated[float, Meta(gt=0)] = 28_800.0
    """How long a night is; less than a day."""
    until_s: Annotated[float, Meta(gt=0)] = 3600.0
    """No departure and no nightfall after this, and who is away then still comes back: shows how the network recovers.
    The sessions of a trace are taken as they are."""
    trace_path: str | None = None
    """Of `trace`: a CSV with the columns `node,online_from_s,online_to_s`. A relative path starts at the scenario's
    folder."""


Session = tuple[float, float]
"""Online from, online to (virtual seconds); to is infinite for who stays."""


def draw_schedule(
    settings: ChurnSettings, num_nodes: int, rng: random.Random, base: Path
) -> list[ChurnEvent]:
    """Every node's joins, departures and returns, in order of time; strictly later each for one node.

    Each node draws from a generator of its own, so more nodes change nothing for the first ones. A node of a trace may
    be away for good, or never come.

    base: the folder that a relative `trace_path` starts from.

    Raises:
        ConfigError: as `check_churn`; or the trace is wrong.
    """
    check_churn(settings, num_nodes)
    trace = read_trace(settings.trace_path, num_nodes, base) if settings.model == "trace" else None
    own_seed = rng.getrandbits(64)
    events: list[ChurnEvent] = []
    for node in range(num_nodes):
        own = random.Random(f"{own_seed} {node}")
        sessions: Iterable[Session] = trace[node] if trace is not None else _draw_sessions(settings, own)
        if own.random() < settings.night_share:
            sessions = _without(sessions, _nights(settings, own))
        events += _events(settings, node, sessions, own)
    return sorted(events)


def check_churn(settings: ChurnSettings, num_nodes: int) -> None:
    """Whether the settings go together; a trace is not opened.

    Raises:
        ConfigError: at the field below `churn`.
    """
    if settings.trace_path is not None and settings.model != "trace":
        raise ConfigError(
            "churn.trace_path", f"means nothing with model '{settings.model}'", ["model = 'trace'"]
        )
    if settings.night_share and settings.night_s >= settings.day_s:
        raise ConfigError(
            "churn.night_s", f"a night of {settings.night_s} s leaves no day", ["less than day_s"]
        )
    if settings.model in DRAWS:
        cycles = num_nodes * settings.until_s / (settings.mean_online_s + settings.mean_offline_s)
        if 2 * cycles > MAX_CHANGES:
            raise ConfigError(
                "churn.mean_online_s",
                f"makes about {2 * cycles:.0e} changes of all nodes until until_s",
                [f"up to {MAX_CHANGES:.0e}: longer sessions, an earlier until_s, fewer nodes"],
            )
    if settings.night_share and num_nodes * settings.until_s / settings.day_s > MAX_CHANGES:
        raise ConfigError("churn.day_s", f"is too short for an until_s of {settings.until_s} s")


def read_trace(path: str | None, num_nodes: int, base: Path) -> list[list[Session]]:
    """Every node's sessions from a CSV with the header `node,online_from_s,online_to_s`, rows in any order.

    Nodes are whole numbers from 0. An empty `online_to_s` is to the end of the run. A session that begins when the one
    before ends goes on with it.

    Raises:
        ConfigError: at `churn.trace_path`, with the line: no such node, no such time, an empty session, two at once.
    """
    found: list[list[tuple[float, float, Row]]] = [[] for _ in range(num_nodes)]
    for row in read_rows("churn.trace_path", path, base, TRACE_COLUMNS):
        node, begin = row.node(0, num_nodes), row.seconds(1)
        end = row.seconds(2) if row.cells[2] else math.inf
        if begin >= end:
            raise row.wrong(f"node {node} is online from {begin} s to {end} s", "a session that ends later")
        found[node].append((begin, end, row))
    if not any(found):
        raise ConfigError("churn.trace_path", f"{path} has no sessions", ["at least one row"])
    for node, own in enumerate(found):
        own.sort(key=lambda session: session[:2])
        for (_, end, row), (begin, _, other) in pairwise(own):
            if begin < end:
                first, second = sorted((row, other), key=lambda row: row.line)
                raise second.wrong(f"node {node} is online already, by line {first.line}")
    return [list(_joined((begin, end) for begin, end, _ in own)) for own in found]


def _draw_exponential(mean_s: float, shape: float, rng: random.Random) -> float:
    return rng.expovariate(1 / mean_s)


def _draw_weibull(mean_s: float, shape: float, rng: random.Random) -> float:
    return rng.weibullvariate(mean_s / math.gamma(1 + 1 / shape), shape)


def _draw_lognormal(mean_s: float, shape: float, rng: random.Random) -> float:
    return rng.lognormvariate(math.log(mean_s) - shape**2 / 2, shape)


DRAWS: dict[str, Callable[[float, float, random.Random], float]] = {
    "exponential": _draw_exponential,
    "weibull": _draw_weibull,
    "lognormal": _draw_lognormal,
}
"""A length in seconds from its mean, the shape and a generator, by the name of the model."""


def _draw_sessions(settings: ChurnSettings, rng: random.Random) -> list[Session]:
    begin = rng.random() * settings.join_within_s
    draw = DRAWS.get(settings.model)
    if draw is None:
        return [(begin, math.inf)]
    sessions = []
    while (end := begin + draw(settings.mean_online_s, settings.shape, rng)) <= settings.until_s:
        sessions.append((begin, end))
        begin = end + draw(settings.mean_offline_s, settings.shape, rng)
    return list(_joined([*sessions, (begin, math.inf)]))


def _nights(settings: ChurnSettings, rng: random.Random) -> Iterator[Session]:
    """The one that may go on at the start first; the last one falls before `until_s`."""
    first = (rng.random() - 1) * settings.day_s
    falls = (first + day * settings.day_s for day in count())
    return ((fall, fall + settings.night_s) for fall in takewhile(lambda at: at <= settings.until_s, falls))


def _joined(sessions: Iterable[Session]) -> Iterator[Session]:
    """Sorted sessions, those that touch made one, empty ones dropped: a node is away for more than a moment."""
    current: Session | None = None
    for begin, end in sessions:
        if begin >= end:
            continue
        if current is not None and begin <= current[1]:
            current = (current[0], max(end, current[1]))
            continue
        if current is not None:
            yield current
        current = (begin, end)
    if current is not None:
        yield current


def _without(sessions: Iterable[Session], nights: Iterable[Session]) -> Iterator[Session]:
    """What is left of the sessions. Both are sorted and do not overlap among themselves."""
    rest = deque(sessions)
    for fall, dawn in nights:
        while rest and rest[0][1] <= fall:
            yield rest.popleft()
        if rest and rest[0][0] < fall:
            yield rest[0][0], fall
        while rest and rest[0][1] <= dawn:
            rest.popleft()
        if rest and rest[0][0] < dawn:
            rest[0] = dawn, rest[0][1]
    yield from rest


def _events(
    settings: ChurnSettings, node: int, sessions: Iterable[Session], rng: random.Random
) -> Iterator[ChurnEvent]:
    arrival = Change.JOIN
    for begin, end in sessions:
        yield ChurnEvent(begin, node, arrival)
        if end < math.inf:
            yield ChurnEvent(end, node, _departure(settings, rng))
        arrival = Change.RESTART


def _departure(settings: ChurnSettings, rng: random.Random) -> Change:
    if rng.random() < settings.leave_share:
        return Change.LEAVE
    return Change.WIPE if rng.random() < settings.wipe_share else Change.CRASH
