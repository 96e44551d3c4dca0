"""Timelines: every form is read as meant, every mistake is named with its line, and draws are exact."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import ConfigError
from sim.timeline import Action, Group, TimelineEvent, choose, groups, parse


def one(line: str, num_nodes: int = 10) -> TimelineEvent:
    (event,) = parse([line], num_nodes)
    return event


# --- reading --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "at_s", "action", "share", "nodes", "value"),
    [
        ("at 120 s: crash 30 %", 120, Action.CRASH, 0.3, (), 0),
        ("at 2 min: wipe 12.5%", 120, Action.WIPE, 0.125, (), 0),
        ("at 0.5 h: leave 0 %", 1800, Action.LEAVE, 0.0, (), 0),
        ("  At 1s :SILENCE  nodes 1, 2,5-7,6 ", 1, Action.SILENCE, None, (1, 2, 5, 6, 7), 0),
        ("at 1 s: restart all", 1, Action.RESTART, 1.0, (), 0),
        ("at 1 s: wake node 0", 1, Action.WAKE, None, (0,), 0),
        ("at 1 s: heal", 1, Action.HEAL, None, (), 0),
        ("at 1 s: loss 10 %", 1, Action.LOSS, None, (), 0.1),
        ("at 1 s: loss 0 %", 1, Action.LOSS, None, (), 0),
        ("at 1 s: latency x 3", 1, Action.LATENCY, None, (), 3),
        ("at 1 s: bandwidth x0.1", 1, Action.BANDWIDTH, None, (), 0.1),
    ],
)
def test_a_line_is_read_as_meant(
    line: str, at_s: float, action: Action, share: float | None, nodes: tuple[int, ...], value: float
) -> None:
    event = one(line)
    assert (event.at_s, event.action, event.share, event.nodes) == (at_s, action, share, nodes)
    assert event.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ("a|b", (Group(), Group())),
        ("left | right|up-2", (Group(), Group(), Group())),
        ("70 %|30 %", (Group(share=0.7), Group(share=0.3))),
        ("30 %", (Group(share=0.3),)),
        ("nodes 0-1|nodes 9,5", (Group(nodes=(0, 1)), Group(nodes=(5, 9)))),
    ],
)
def test_the_sides_of_a_partition_are_read_as_meant(sides: str, expected: tuple[Group, ...]) -> None:
    event = one(f"at 300 s: partition {sides}")
    assert (event.action, event.groups) == (Action.PARTITION, expected)
    assert event.text == f"partition {sides}"


def test_events_come_in_order_of_time_and_those_of_one_moment_in_order_of_lines() -> None:
    events = parse(["at 1 min: heal", "at 60 s: crash all", "at 5 s: loss 1 %", "at 60 s: restart all"], 3)
    assert [event.text for event in events] == ["loss 1 %", "heal", "crash all", "restart all"]


@pytest.mark.parametrize(
    ("line", "problem", "allowed"),
    [
        ("crash 30 %", "'crash 30 %' cannot be read", "at N s|min|h"),
        ("at -1 s: heal", "cannot be read", "at N s|min|h"),
        ("at 1 d: heal", "cannot be read", "at N s|min|h"),
        ("at 1e3 s: heal", "cannot be read", "at N s|min|h"),
        ("at 1 s heal", "cannot be read", "at N s|min|h"),
        ("", "'' cannot be read", "at N s|min|h"),
        ("at 1 s: explode all", "there is no action 'explode'", "partition a|b"),
        ("at 1 s: crash", "after 'crash' stands nothing", "N % | all | nodes 1,2,5-9"),
        ("at 1 s: crash 30", "after 'crash' stands '30'", "N % | all | nodes 1,2,5-9"),
        ("at 1 s: crash 101 %", "'101 %' is more than all", "0 % to 100 %"),
        ("at 1 s: crash nodes 3-10", "there are no nodes '3-10'", "0 to 9"),
        ("at 1 s: crash nodes 5-3", "there are no nodes '5-3'", "0 to 9"),
        ("at 1 s: crash nodes 1,,2", "'' is no node and no range", "nodes 1,2,5-9"),
        ("at 1 s: crash nodes 1 2", "'1 2' is no node and no range", "nodes 1,2,5-9"),
        ("at 1 s: crash nodes -1", "'-1' is no node and no range", "nodes 1,2,5-9"),
        ("at 1 s: heal all", "after 'heal' stands 'all'", "heal"),
        ("at 1 s: loss x 3", "after 'loss' stands 'x 3'", "loss 10 %"),
        ("at 1 s: loss 100 %", "loses everything", "below 100 %"),
        ("at 1 s: latency 3", "after 'latency' stands '3'", "latency x 3"),
        ("at 1 s: latency x 0", "'x 0' is out of range", "above 0"),
        ("at 1 s: bandwidth x 10000000", "is out of range", "above 0, to 1000000"),
        ("at 1 s: partition", "after 'partition' stands nothing", "partition a|b"),
        ("at 1 s: partition a", "one side only", "partition a|b"),
        ("at 1 s: partition 100 %", "one side only", "partition a|b"),
        ("at 1 s: partition nodes 0-9", "one side only", "partition a|b"),
        ("at 1 s: partition a|", "stands 'a|'", "partition a|b"),
        ("at 1 s: partition a|a", "two sides have one name", "partition a|b"),
        ("at 1 s: partition a|30 %", "stands 'a|30 %'", "partition a|b"),
        ("at 1 s: partition nodes 1|30 %", "mixes", "partition a|b"),
        ("at 1 s: partition 70 %|40 %", "not parts of the whole", "up to 100 %"),
        ("at 1 s: partition 0 %|40 %", "not parts of the whole", "above 0 %"),
        ("at 1 s: partition nodes 0-3|nodes 3-5", "a node on two sides", "partition a|b"),
        ("at 1 s: partition a|b|c|d|e|f|g|h|i|j|k", "11 sides of 10 nodes", "partition a|b"),
    ],
)
def test_a_mistake_names_its_line_and_what_could_stand_there(line: str, problem: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["at 9 s: heal", "at 8 s: heal", line], 10)
    assert caught.value.path == "timeline[2]"
    assert problem in caught.value.problem
    assert allowed in caught.value.allowed


# --- drawing --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("share", "candidates", "count"),
    [(30, 10, 3), (25, 10, 3), (24, 10, 2), (1, 10, 1), (0, 10, 0), (100, 7, 7), (50, 1, 1), (50, 0, 0)],
)
def test_a_share_is_to_the_nearest_and_one_at_least(share: int, candidates: int, count: int) -> None:
    event = one(f"at 1 s: crash {share} %")
    among = [3 * index + 1 for index in range(candidates)]
    chosen = choose(event, among, random.Random(1))
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(among)


def test_nodes_by_number_are_taken_where_they_can_be() -> None:
    assert choose(one("at 1 s: crash nodes 1,3-5"), [5, 4, 1, 0], random.Random(1)) == [1, 4, 5]


def test_a_choice_hangs_on_the_generator_alone_and_each_node_comes_up() -> None:
    event = one("at 1 s: crash 50 %")
    draws = [choose(event, [7, 1, 5, 3], random.Random(seed)) for seed in range(40)]
    assert draws == [choose(event, [1, 3, 5, 7], random.Random(seed)) for seed in range(40)]
    assert {node for chosen in draws for node in chosen} == {1, 3, 5, 7}
    assert len({tuple(chosen) for chosen in draws}) == 6


def sizes(sides: Sequence[Sequence[int]]) -> list[int]:
    return [len(side) for side in sides]


@pytest.mark.parametrize(
    ("line", "num_nodes", "expected"),
    [
        ("a|b", 10, [5, 5]),
        ("a|b|c", 10, [4, 3, 3]),
        ("a|b|c", 11, [4, 4, 3]),
        ("70 %|30 %", 10, [7, 3]),
        ("30 %", 10, [3, 7]),
        ("1 %|99 %", 10, [1, 9]),
        ("34 %|34 %|30 %|2 %", 5, [2, 1, 1, 1]),
        ("a|b|c", 3, [1, 1, 1]),
    ],
)
def test_sides_have_the_sizes_asked_for(line: str, num_nodes: int, expected: list[int]) -> None:
    event = one(f"at 1 s: partition {line}", num_nodes)
    for seed in range(5):
        sides = groups(event, num_nodes, random.Random(seed))
        assert sizes(sides) == expected
        assert sorted(node for side in sides for node in side) == list(range(num_nodes))


def test_sides_by_number_are_as_they_stand_and_the_others_are_one_more() -> None:
    rng = random.Random(1)
    assert groups(one("at 1 s: partition nodes 2,1|nodes 0", 3), 3, rng) == [[1, 2], [0]]
    assert groups(one("at 1 s: partition nodes 4|nodes 0-1", 6), 6, rng) == [[4], [0, 1], [2, 3, 5]]


def test_sides_by_name_are_drawn() -> None:
    event = one("at 1 s: partition a|b")
    first, again, other = (groups(event, 10, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=2, max_size=6), st.integers(7, 200), st.integers(0, 2**32))
def test_every_node_is_on_one_side_and_no_side_is_empty(
    weights: list[int], num_nodes: int, seed: int
) -> None:
    whole = sum(weights)
    line = "|".join(f"{int(100 * weight / whole) or 1} %" for weight in weights)
    try:
        event = one(f"at 1 s: partition {line}", num_nodes)
    except ConfigError:  # the roundings up made it more than all
        return
    sides = groups(event, num_nodes, random.Random(seed))
    assert all(sides)
    assert all(side == sorted(side) for side in sides)
    assert sorted(node for side in sides for node in side) == list(range(num_nodes))
    for side, group in zip(sides, event.groups, strict=False):
        assert group.share is not None
        assert abs(len(side) - group.share * num_nodes) <= len(sides), (
            f"{line}, {num_nodes} nodes, seed {seed}"
        )
