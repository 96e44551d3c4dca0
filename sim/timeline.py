"""What befalls the network at moments that the scenario names: `at 120 s: crash 30 %`.

Belongs here: from lines of text to events, and from an event to the nodes it means. Doing it is the world's affair.
The grammar is written down in `docs/scenarios.md`.
"""

import random
import re
from collections.abc import Callable, Sequence
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from protocols.errors import ConfigError

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_NUMBER = r"(?P<number>\d+(?:\.\d+)?)"
_LINE = re.compile(rf"at {_NUMBER} ?(?P<unit>{'|'.join(UNITS)}) ?: ?(?P<word>[a-z]+) ?(?P<rest>.*)")
_SHARE = re.compile(rf"{_NUMBER} ?%")
_FACTOR = re.compile(rf"x ?{_NUMBER}")
_LISTED = re.compile(r"nodes? ?(?P<list>[\d, -]+)")
_RANGE = re.compile(r"(?P<first>\d{1,9})(?: ?- ?(?P<last>\d{1,9}))?")
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
MAX_FACTOR = 1e6


class Action(StrEnum):
    """What happens."""

    CRASH = "crash"
    WIPE = "wipe"
    LEAVE = "leave"
    SILENCE = "silence"
    RESTART = "restart"
    WAKE = "wake"
    PARTITION = "partition"
    HEAL = "heal"
    LOSS = "loss"
    LATENCY = "latency"
    BANDWIDTH = "bandwidth"
    INTRODUCE = "introduce"


class Group(Struct, frozen=True):
    """One side of a partition: a share of the nodes, or nodes by number. With neither it is a side like the others."""

    share: float | None = None
    nodes: tuple[int, ...] = ()


class TimelineEvent(Struct, frozen=True):
    """One line. What its action does not speak of stays empty."""

    at_s: float
    action: Action
    share: float | None = None
    """Of the nodes that it can befall; `all` is 1.0."""
    nodes: tuple[int, ...] = ()
    """By number, rising; instead of a share."""
    groups: tuple[Group, ...] = ()
    """Of a partition. Who is in none of them is on one further side."""
    value: float = 0.0
    """The share that is lost from now on; or what latencies or bandwidths are multiplied with, against what the
    scenario says: 1.0 puts them back."""
    text: str = ""
    """The line without its time, for people."""


def parse(lines: Sequence[str], num_nodes: int) -> tuple[TimelineEvent, ...]:
    """The events in order of time; those of one moment keep the order of the lines.

    Raises:
        ConfigError: at `timeline[i]`, with what could stand there.
    """
    events = [parse_line(f"timeline[{index}]", line, num_nodes) for index, line in enumerate(lines)]
    return tuple(sorted(events, key=lambda event: event.at_s))


def parse_line(path: str, line: str, num_nodes: int) -> TimelineEvent:
    """One line. `path` is its place in the scenario, for errors.

    Raises:
        ConfigError: at `path`, with what could stand there.
    """
    text = " ".join(line.lower().split())
    found = _LINE.fullmatch(text)
    if found is None:
        raise ConfigError(
            path, f"'{line}' cannot be read", ["at N s|min|h: action ..., as in 'at 120 s: crash 30 %'"]
        )
    if found["word"] not in _EXAMPLES:
        raise ConfigError(path, f"there is no action '{found['word']}'", list(_EXAMPLES.values()))
    action, rest = Action(found["word"]), found["rest"].strip()
    event = _READERS[action](_Words(path, action, rest, num_nodes))
    at_s = float(found["number"]) * UNITS[found["unit"]]
    return replace(event, at_s=at_s, text=f"{action} {rest}".strip())


def choose(event: TimelineEvent, candidates: Sequence[int], rng: random.Random) -> list[int]:
    """The nodes that the event befalls, rising.

    candidates: whom it can befall now: who is online for a crash, who is down for a restart, who is silent for a
        wake. Nodes given by number that are not among them are left out.

    A share is of the candidates, to the nearest whole node, and one at least where the share is not 0.
    """
    if event.share is None:
        return sorted(set(event.nodes).intersection(candidates))
    return sorted(rng.sample(sorted(candidates), min(_part(event.share, len(candidates)), len(candidates))))


def groups(event: TimelineEvent, num_nodes: int, rng: random.Random) -> list[list[int]]:
    """The sides of a partition: every node on one, each side rising, in the order of the line, none of them empty.

    Sides by name differ by one node at most, shares are met to the nearest node.
    """
    if event.groups[0].nodes:
        sides = [sorted(group.nodes) for group in event.groups]
        named = {node for side in sides for node in side}
        rest = [node for node in range(num_nodes) if node not in named]
        return [*sides, rest] if rest else sides
    shuffled = rng.sample(range(num_nodes), num_nodes)
    begin, sides = 0, []
    for size in _sizes(_shares(event.groups), num_nodes):
        sides.append(sorted(shuffled[begin : begin + size]))
        begin += size
    return sides


def _shares(sides: Sequence[Group]) -> list[float]:
    """What each side is of the whole; together 1."""
    shares = [1 / len(sides) if side.share is None else side.share for side in sides]
    rest = 1 - sum(shares)
    return [*shares, rest] if rest > 1e-9 else shares


def _part(share: float, whole: int) -> int:
    return max(int(share * whole + 0.5), 1 if share else 0)


def _sizes(shares: Sequence[float], whole: int) -> list[int]:
    """Whole numbers, none 0, that add up to `whole` and are as the shares."""
    sizes = [_part(share, whole) for share in shares]
    while surplus := sum(sizes) - whole:
        # The largest bears what rounding left over: there it is the smallest part. Of equal ones the last for too
        # much and the first for too little.
        largest = max(sizes)
        place = sizes.index(largest) if surplus < 0 else len(sizes) - 1 - sizes[::-1].index(largest)
        sizes[place] -= 1 if surplus > 0 else -1
    return sizes


# --- reading --------------------------------------------------------------------------------------------
class _Words:
    """What stands behind an action, and where, for errors."""

    def __init__(self, path: str, action: Action, rest: str, num_nodes: int) -> None:
        self.path = path
        self.action = action
        self.rest = rest
        self.num_nodes = num_nodes

    def wrong(self, problem: str, *allowed: str) -> ConfigError:
        return ConfigError(self.path, problem, allowed or [_EXAMPLES[self.action]])

    def unread(self) -> ConfigError:
        """Raised where nothing fits."""
        after = f"'{self.rest}'" if self.rest else "nothing"
        return self.wrong(f"after '{self.action}' stands {after}")

    def share(self, text: str) -> float | None:
        found = _SHARE.fullmatch(text)
        if found is None:
            return None
        if float(found["number"]) > 100:
            raise self.wrong(f"'{text}' is more than all", "0 % to 100 %")
        return float(found["number"]) / 100

    def listed(self, text: str) -> tuple[int, ...]:
        """Nodes by number, rising; empty where the text is something else."""
        found = _LISTED.fullmatch(text)
        if found is None:
            return ()
        nodes: set[int] = set()
        for part in found["list"].split(","):
            numbers = _RANGE.fullmatch(part.strip())
            if numbers is None:
                raise self.wrong(f"'{part.strip()}' is no node and no range", "nodes 1,2,5-9")
            first, last = int(numbers["first"]), int(numbers["last"] or numbers["first"])
            if first > last or last >= self.num_nodes:
                raise self.wrong(f"there are no nodes '{part.strip()}'", f"0 to {self.num_nodes - 1}, rising")
            nodes.update(range(first, last + 1))
        return tuple(sorted(nodes))

    def factor(self, text: str) -> float:
        found = _FACTOR.fullmatch(text)
        if found is None:
            raise self.unread()
        if not 0 < float(found["number"]) <= MAX_FACTOR:
            raise self.wrong(f"'{text}' is out of range", f"above 0, to {MAX_FACTOR:.0f}")
        return float(found["number"])


def _read_befall(words: _Words) -> TimelineEvent:
    if words.rest == "all":
        return TimelineEvent(0.0, words.action, share=1.0)
    share = words.share(words.rest)
    nodes = words.listed(words.rest)
    if share is None and not nodes:
        raise words.unread()
    return TimelineEvent(0.0, words.action, share=share, nodes=nodes)


def _read_partition(words: _Words) -> TimelineEvent:
    texts = [text.strip() for text in words.rest.split("|")]
    sides = tuple(Group(words.share(text), words.listed(text)) for text in texts)
    kinds = {(side.share is not None, bool(side.nodes)) for side in sides}
    by_name = (False, False) in kinds
    if by_name and any(_NAME.fullmatch(text) is None for text in texts):
        raise words.unread()
    if len(kinds) > 1:
        raise words.wrong("mixes names, shares and nodes")
    listed = [node for side in sides for node in side.nodes]
    if len(listed) != len(set(listed)):
        raise words.wrong("puts a node on two sides")
    if any(side.share == 0 for side in sides) or sum(side.share or 0 for side in sides) > 1 + 1e-9:
        raise words.wrong("the shares are not parts of the whole", "each above 0 %, together up to 100 %")
    if by_name and len(set(texts)) < len(texts):
        raise words.wrong("two sides have one name")
    num_sides = len(_shares(sides)) if not listed else len(sides) + (len(listed) < words.num_nodes)
    if num_sides < 2:
        raise words.wrong("parts nobody: there is one side only")
    if num_sides > words.num_nodes:
        raise words.wrong(f"makes {num_sides} sides of {words.num_nodes} nodes")
    return TimelineEvent(0.0, words.action, groups=sides)


def _read_heal(words: _Words) -> TimelineEvent:
    if words.rest:
        raise words.unread()
    return TimelineEvent(0.0, words.action)


def _read_loss(words: _Words) -> TimelineEvent:
    share = words.share(words.rest)
    if share is None:
        raise words.unread()
    if share == 1:
        raise words.wrong("a network that loses everything has no links", "0 % to below 100 %", "silence all")
    return TimelineEvent(0.0, words.action, value=share)


def _read_factor(words: _Words) -> TimelineEvent:
    return TimelineEvent(0.0, words.action, value=words.factor(words.rest))


def _read_introduce(words: _Words) -> TimelineEvent:
    nodes = words.listed(words.rest)
    if not nodes:
        raise words.unread()
    if len(nodes) < 2:
        raise words.wrong("introduces a node to nobody", "introduce nodes 5,105")
    return TimelineEvent(0.0, words.action, nodes=nodes)


_READERS: dict[Action, Callable[[_Words], TimelineEvent]] = {
    **dict.fromkeys(
        (Action.CRASH, Action.WIPE, Action.LEAVE, Action.SILENCE, Action.RESTART, Action.WAKE), _read_befall
    ),
    Action.PARTITION: _read_partition,
    Action.HEAL: _read_heal,
    Action.LOSS: _read_loss,
    Action.LATENCY: _read_factor,
    Action.BANDWIDTH: _read_factor,
    Action.INTRODUCE: _read_introduce,
}
_EXAMPLES: dict[str, str] = {
    action.value: f"{action.value} N % | all | nodes 1,2,5-9"
    for action in Action
    if _READERS[action] is _read_befall
} | {
    "partition": "partition a|b, partition 70 %|30 %, partition nodes 0-4|nodes 5-9",
    "heal": "heal",
    "loss": "loss 10 %",
    "latency": "latency x 3",
    "bandwidth": "bandwidth x 0.1",
    "introduce": "introduce nodes 5,105",
}
"""What is allowed behind each action."""
