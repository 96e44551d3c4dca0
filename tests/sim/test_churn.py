"""Who comes and goes: each node joins, then crashes and restarts by turns."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.churn import Change, ChurnEvent, ChurnSettings, check_schedule, draw_schedule

JOIN, CRASH, RESTART = Change.JOIN, Change.CRASH, Change.RESTART

churn = st.builds(
    ChurnSettings,
    join_within_s=st.floats(0, 100),
    mean_online_s=st.none() | st.floats(1, 100),
    mean_offline_s=st.floats(0.1, 100),
    until_s=st.floats(1, 500),
)


@settings(derandomize=True, deadline=None)
@given(churn, st.integers(1, 20), st.integers(0, 2**32))
def test_join_crash_and_restart_alternate_and_nobody_stays_away(
    churn: ChurnSettings, num_nodes: int, seed: int
) -> None:
    events = draw_schedule(churn, num_nodes, random.Random(seed))
    check_schedule(events, num_nodes)
    assert events == sorted(events)
    for node in range(num_nodes):
        own = [event for event in events if event.node == node]
        assert own[0].change is JOIN
        assert 0 <= own[0].at_s <= churn.join_within_s
        for before, after in pairwise(own):
            assert after.at_s >= before.at_s
            assert after.change is (RESTART if before.change is CRASH else CRASH)
        assert own[-1].change is not CRASH
        assert all(event.at_s <= churn.until_s for event in own if event.change is CRASH)


def test_without_a_mean_session_nobody_crashes() -> None:
    events = draw_schedule(ChurnSettings(), 50, random.Random(1))
    assert [event.change for event in events] == [JOIN] * 50


def test_sessions_and_absences_have_the_means_asked_for() -> None:
    churn = ChurnSettings(join_within_s=0, mean_online_s=20.0, mean_offline_s=5.0, until_s=100_000.0)
    events = draw_schedule(churn, 1, random.Random(1))
    online = [b.at_s - a.at_s for a, b in pairwise(events) if b.change is CRASH]
    offline = [b.at_s - a.at_s for a, b in pairwise(events) if b.change is RESTART]
    assert sum(online) / len(online) == pytest.approx(20.0, rel=0.1)
    assert sum(offline) / len(offline) == pytest.approx(5.0, rel=0.1)


def test_a_seed_gives_one_schedule() -> None:
    churn = ChurnSettings(mean_online_s=10.0, until_s=100.0)
    first, again, other = (draw_schedule(churn, 5, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(1.5, 0, CRASH)], "churn at 1.5 s: node 0 cannot crash now (allowed: join)"),
        ([(1.0, 1, RESTART)], "churn at 1.0 s: node 1 cannot restart now (allowed: join)"),
        ([(0.0, 0, JOIN), (2.0, 0, JOIN)], "churn at 2.0 s: node 0 cannot join now (allowed: crash)"),
        ([(0.0, 0, JOIN), (2.0, 0, RESTART)], "churn at 2.0 s: node 0 cannot restart now (allowed: crash)"),
        (
            [(0.0, 0, JOIN), (2.0, 0, CRASH), (3.0, 0, CRASH)],
            "churn at 3.0 s: node 0 cannot crash now (allowed: restart)",
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
    check_schedule(
        [ChurnEvent(9.0, 0, RESTART), ChurnEvent(0.0, 0, JOIN), ChurnEvent(5.0, 0, CRASH)], num_nodes=1
    )
