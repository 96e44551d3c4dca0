"""Who comes and goes: schedules that make sense, means that were asked for, and traces read line by line."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import ConfigError
from sim.churn import Change, ChurnEvent, ChurnSettings, draw_schedule, read_trace

JOIN, CRASH, WIPE, LEAVE = Change.JOIN, Change.CRASH, Change.WIPE, Change.LEAVE
RESTART, SILENCE, WAKE = Change.RESTART, Change.SILENCE, Change.WAKE
GONE = (CRASH, WIPE, LEAVE)
HERE = Path()

churn = st.builds(
    ChurnSettings,
    join_within_s=st.floats(0, 100),
    model=st.sampled_from(["none", "exponential", "weibull", "lognormal"]),
    mean_online_s=st.floats(1, 100),
    mean_offline_s=st.floats(0.1, 100),
    shape=st.floats(0.5, 2),
    wipe_share=st.floats(0, 1),
    leave_share=st.floats(0, 1),
    day_s=st.floats(20, 100),
    night_share=st.floats(0, 1),
    night_s=st.floats(0.1, 19),
    until_s=st.floats(1, 500),
)


# --- what a schedule may be -----------------------------------------------------------------------------
_GOING = (Change.CRASH, Change.WIPE, Change.LEAVE, Change.SILENCE)
_NEXT: dict[Change | None, tuple[Change, ...]] = {
    None: (Change.JOIN,),
    Change.JOIN: _GOING,
    Change.RESTART: _GOING,
    Change.WAKE: _GOING,
    Change.CRASH: (Change.RESTART,),
    Change.WIPE: (Change.RESTART,),
    Change.LEAVE: (Change.RESTART,),
    Change.SILENCE: (Change.WAKE, Change.CRASH, Change.WIPE),
}


def check_schedule(events: Sequence[ChurnEvent], num_nodes: int) -> None:
    """A node joins first; then it goes and restarts, or falls silent and wakes, by turns. A silent one may crash.

    Raises:
        ValueError: which event of which node is out of place.
    """
    last: dict[int, Change] = {}
    for event in sorted(events):
        if not 0 <= event.node < num_nodes:
            raise ValueError(f"churn at {event.at_s} s: node {event.node} of {num_nodes}")
        allowed = _NEXT[last.get(event.node)]
        if event.change not in allowed:
            raise ValueError(
                f"churn at {event.at_s} s: node {event.node} cannot {event.change.value} now "
                f"(allowed: {', '.join(change.value for change in allowed)})"
            )
        last[event.node] = event.change


def draw(num_nodes: int, seed: int = 1, **changes: Any) -> list[ChurnEvent]:
    return draw_schedule(ChurnSettings(**changes), num_nodes, random.Random(seed), HERE)


def of(events: list[ChurnEvent], node: int) -> list[ChurnEvent]:
    return [event for event in events if event.node == node]


# --- drawn ----------------------------------------------------------------------------------------------
@settings(derandomize=True, deadline=None)
@given(churn, st.integers(1, 20), st.integers(0, 2**32))
def test_going_and_returning_alternate_and_nobody_stays_away(
    churn: ChurnSettings, num_nodes: int, seed: int
) -> None:
    events = draw_schedule(churn, num_nodes, random.Random(seed), HERE)
    check_schedule(events, num_nodes)
    assert events == sorted(events)
    for node in range(num_nodes):
        own = of(events, node)
        assert own[0].change is JOIN
        assert own[0].at_s >= 0
        for before, after in pairwise(own):
            assert after.at_s > before.at_s
            assert (after.change is RESTART) == (before.change in GONE)
        assert own[-1].change not in GONE
        assert all(event.at_s <= churn.until_s for event in own if event.change in GONE)


@settings(derandomize=True, deadline=None)
@given(churn, st.integers(1, 10), st.integers(1, 10), st.integers(0, 2**32))
def test_more_nodes_change_nothing_for_the_first_ones(
    churn: ChurnSettings, few: int, more: int, seed: int
) -> None:
    small, large = (
        draw_schedule(churn, num_nodes, random.Random(seed), HERE) for num_nodes in (few, few + more)
    )
    assert small == [event for event in large if event.node < few]


def test_without_a_model_nobody_goes() -> None:
    events = draw(50)
    assert [event.change for event in events] == [JOIN] * 50
    assert max(event.at_s for event in events) <= 1
    assert len({event.at_s for event in events}) == 50


def lengths(events: list[ChurnEvent], ends: tuple[Change, ...]) -> list[float]:
    return [after.at_s - before.at_s for before, after in pairwise(events) if after.change in ends]


@pytest.mark.parametrize(
    ("model", "shape"),
    [("exponential", 0.5), ("weibull", 0.5), ("weibull", 1.5), ("lognormal", 0.5), ("lognormal", 1.0)],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_sessions_and_absences_have_the_means_asked_for(model: str, shape: float, seed: int) -> None:
    events = draw(
        1, seed, model=model, shape=shape, mean_online_s=20.0, mean_offline_s=5.0, until_s=500_000.0
    )
    for found, mean in ((lengths(events, GONE), 20.0), (lengths(events, (RESTART,)), 5.0)):
        assert len(found) > 15_000
        assert sum(found) / len(found) == pytest.approx(mean, rel=0.06), f"seed {seed}"


@pytest.mark.parametrize(
    ("model", "shape", "median"),
    [
        ("exponential", 0.5, math.log(2)),
        ("weibull", 0.5, math.log(2) ** 2 / math.gamma(3)),
        ("lognormal", 1.0, math.exp(-0.5)),
    ],
)
def test_the_shape_is_the_models(model: str, shape: float, median: float) -> None:
    found = sorted(lengths(draw(1, model=model, shape=shape, mean_online_s=1.0, until_s=20_000.0), GONE))
    assert found[len(found) // 2] == pytest.approx(median, rel=0.1)


def test_departures_are_of_the_kinds_asked_for() -> None:
    events = draw(1, model="exponential", leave_share=0.5, wipe_share=0.2, until_s=300_000.0)
    count = Counter(event.change for event in events)
    departures = sum(count[change] for change in GONE)
    assert departures > 3_000
    shares = {change: count[change] / departures for change in GONE}
    assert shares == pytest.approx({LEAVE: 0.5, WIPE: 0.1, CRASH: 0.4}, abs=0.03)


def test_by_night_some_are_away_for_their_part_of_each_day() -> None:
    events = draw(400, night_share=0.25, day_s=100.0, night_s=30.0, until_s=1000.0, join_within_s=0.0)
    nightly = [own for node in range(400) if len(own := of(events, node)) > 1]
    assert len(nightly) == pytest.approx(100, abs=25)
    for own in nightly:
        falls = [event.at_s for event in own if event.change in GONE]
        assert all(b - a == pytest.approx(100) for a, b in pairwise(falls))
        assert len(falls) == 10
        assert lengths(own, (RESTART,)) == pytest.approx([30] * 10)
    assert len({round(own[1].at_s % 100) for own in nightly}) > 40, "each has its own time of day"
    late = [own[0].at_s for own in nightly if own[0].at_s > 0]
    assert len(late) == pytest.approx(30, abs=15), "who starts in its night comes at its end"
    assert max(late) <= 30


def test_a_seed_gives_one_schedule() -> None:
    first, again, other = (draw(5, seed, model="weibull", until_s=100.0) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"night_share": 0.1, "day_s": 100.0, "night_s": 100.0}, "churn.night_s"),
        ({"model": "none", "trace_path": "sessions.csv"}, "churn.trace_path"),
        ({"model": "trace"}, "churn.trace_path"),
        ({"model": "exponential", "mean_online_s": 1e-9, "mean_offline_s": 1e-9}, "churn.mean_online_s"),
        ({"night_share": 0.1, "day_s": 1e-6, "night_s": 1e-7}, "churn.day_s"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        draw(4, **changes)
    assert caught.value.path == path


# --- by hand --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(1.5, 0, CRASH)], "churn at 1.5 s: node 0 cannot crash now (allowed: join)"),
        ([(1.0, 1, RESTART)], "churn at 1.0 s: node 1 cannot restart now (allowed: join)"),
        (
            [(0.0, 0, JOIN), (2.0, 0, WAKE)],
            "churn at 2.0 s: node 0 cannot wake now (allowed: crash, wipe, leave, silence)",
        ),
        (
            [(0.0, 0, JOIN), (2.0, 0, WIPE), (3.0, 0, CRASH)],
            "churn at 3.0 s: node 0 cannot crash now (allowed: restart)",
        ),
        (
            [(0.0, 0, JOIN), (2.0, 0, SILENCE), (3.0, 0, LEAVE)],
            "churn at 3.0 s: node 0 cannot leave now (allowed: wake, crash, wipe)",
        ),
        ([(0.0, 2, JOIN)], "churn at 0.0 s: node 2 of 2"),
        ([(0.0, -1, JOIN)], "churn at 0.0 s: node -1 of 2"),
    ],
)
def test_an_event_out_of_place_is_named(events: list[tuple[float, int, Change]], message: str) -> None:
    with pytest.raises(ValueError, match="churn at") as caught:
        check_schedule([ChurnEvent(*event) for event in events], 2)
    assert str(caught.value) == message


def test_a_schedule_by_hand_may_be_in_any_order() -> None:
    changes = [JOIN, SILENCE, WAKE, LEAVE, RESTART, SILENCE, CRASH, RESTART, WIPE]
    check_schedule([ChurnEvent(float(at), 0, change) for at, change in enumerate(changes)][::-1], num_nodes=1)


# --- from a trace ---------------------------------------------------------------------------------------
def trace(folder: Path, rows: str, num_nodes: int = 3) -> list[list[tuple[float, float]]]:
    (folder / "sessions.csv").write_text(f"node,online_from_s,online_to_s\n{rows}", encoding="utf-8")
    return read_trace("sessions.csv", num_nodes, folder)


def test_a_trace_is_who_is_online_when(tmp_path: Path) -> None:
    found = trace(tmp_path, "2,5,6.5\n0,10,20\n0,30,\n\n0,1,9\n0,20,25\n")
    assert found == [[(1, 9), (10, 25), (30, math.inf)], [], [(5, 6.5)]]
    settings = ChurnSettings(model="trace", trace_path="sessions.csv", until_s=8.0)
    events = draw_schedule(settings, 3, random.Random(1), tmp_path)
    check_schedule(events, 3)
    assert [(event.at_s, event.node, event.change) for event in events] == [
        (1, 0, JOIN),
        (5, 2, JOIN),
        (6.5, 2, CRASH),
        (9, 0, CRASH),
        (10, 0, RESTART),
        (25, 0, CRASH),
        (30, 0, RESTART),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,0,1\n3,0,1\n", "line 3 of sessions.csv: there is no node '3' (allowed: 0 to 2)"),
        ("-1,0,1\n", "line 2 of sessions.csv: there is no node '-1' (allowed: 0 to 2)"),
        ("a,0,1\n", "line 2 of sessions.csv: there is no node 'a' (allowed: 0 to 2)"),
        ("0,-1,1\n", "line 2 of sessions.csv: '-1' is no time (allowed: seconds, 0 or more)"),
        ("0,nan,1\n", "line 2 of sessions.csv: 'nan' is no time (allowed: seconds, 0 or more)"),
        ("0,,1\n", "line 2 of sessions.csv: '' is no time (allowed: seconds, 0 or more)"),
        ("0,1,inf\n", "line 2 of sessions.csv: 'inf' is no time (allowed: seconds, 0 or more)"),
        ("0,2,2\n", "line 2 of sessions.csv: node 0 is online from 2.0 s to 2.0 s (allowed: a session that ends later)"),
        ("0,5,9\n1,0,1\n0,1,6\n", "line 4 of sessions.csv: node 0 is online already, by line 2"),
        ("0,1,\n0,5,6\n", "line 3 of sessions.csv: node 0 is online already, by line 2"),
        ("0,1\n", "line 2 of sessions.csv: has 2 columns (allowed: node,online_from_s,online_to_s)"),
        ("", "sessions.csv has no sessions (allowed: at least one row)"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trace(tmp_path, rows)
    assert str(caught.value) == f"churn.trace_path: {message}"


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"churn.trace_path: .*none.csv cannot be read \(No such file"):
        read_trace("none.csv", 2, tmp_path)
