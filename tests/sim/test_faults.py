"""One seed, one configuration: always a legal one, all faults among a hundred, and every one of them ends."""

import re
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import timeline
from sim.churn import check_churn
from sim.faults import FAULTS, Adversity, describe, draw_faults, limits_of, liveness_of
from sim.scenarios import Scenario
from sim.topology import check_topology

HUNDRED = [draw_faults(seed) for seed in range(100)]


def test_a_seed_is_one_configuration_and_another_seed_another() -> None:
    assert [draw_faults(seed) for seed in range(100)] == HUNDRED
    assert len({msgspec.json.encode(drawn.scenario) for drawn in HUNDRED}) == 100


def test_every_fault_is_among_a_hundred_seeds_ten_times_and_most_come_together() -> None:
    counts = Counter(kind for drawn in HUNDRED for kind in drawn.kinds)
    assert set(counts) == set(FAULTS)
    assert min(counts.values()) >= 10, counts
    numbers = sorted(len(drawn.kinds) for drawn in HUNDRED)
    assert numbers[50] >= 4
    assert numbers[0] <= 2, "some stay simple enough to be read"


def test_the_networks_are_of_all_sorts() -> None:
    scenarios = [drawn.scenario for drawn in HUNDRED]
    assert {item.topology.kind for item in scenarios} == {"regular", "ring", "full", "discover"}
    assert {item.gossip.quorum for item in scenarios} == {0.0, 0.5, 1.0}
    assert {item.gossip.fanout for item in scenarios} == {0, 0.2, 1, 1.5, 2}
    assert {item.gossip.exchange_every for item in scenarios} == {1, 2, 3, 7}
    assert {item.gossip.window_s for item in scenarios} >= {0, 0.3, 5.0}
    assert {item.gossip.final_merge for item in scenarios} == {"none", "butterfly", "aggregator"}
    assert 10 <= sum(item.gossip.has_window for item in scenarios) <= 40
    assert {item.gossip.sparse_fanout for item in scenarios if item.gossip.has_window} == {0, 0.2, 1, 1.5}
    assert min(item.nodes for item in scenarios) == 3
    assert max(item.nodes for item in scenarios) == 24
    assert 5 <= sum(item.gossip.rounds == 0 for item in scenarios) <= 30
    assert 10 <= sum(item.links.encode for item in scenarios) <= 40
    scalars = [item.scalars for item in scenarios if item.learning == "scalars"]
    assert 20 <= len(scalars) <= 45
    assert {item.quorum for item in scalars} == {0.0, 0.5, 0.8, 1.0}
    assert {item.late_rounds for item in scalars} == {0, 2, 5}
    assert min(item.max_authors for item in scalars) < 20
    sampled = [item for item in scenarios if item.learning == "sampled"]
    assert 20 <= len(sampled) <= 45
    assert {item.topology.kind for item in sampled} == {"discover", "full"}, (
        "everybody has to hear of everybody"
    )
    assert {item.sampled.aggregators for item in sampled} == {1, 2, 3}
    assert all(item.sampled.rounds and item.sampled.sample_size <= item.nodes for item in sampled)
    assert 1 <= sum(not item.dry_run for item in scenarios) <= 10
    assert {item.exchange.max_waiting for item in scenarios} >= {1, 64}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 2**64))
def test_every_seed_is_a_legal_scenario_whose_faults_end(seed: int) -> None:
    drawn = draw_faults(seed)
    scenario = drawn.scenario
    assert msgspec.convert(msgspec.to_builtins(scenario), Scenario) == scenario
    check_topology(scenario.topology, scenario.nodes)
    check_churn(scenario.churn, scenario.nodes)
    events = timeline.parse(scenario.timeline, scenario.nodes)
    assert all(event.at_s <= drawn.stops_at_s for event in events)
    assert scenario.at_most_s > drawn.stops_at_s
    last = [event.text for event in events if event.at_s == drawn.stops_at_s]
    assert ("loss 0 %" in last) == (scenario.links.loss > 0)
    assert ("heal" in last) == ("partition" in drawn.kinds)
    if scenario.churn.model != "none":
        assert scenario.churn.until_s <= drawn.stops_at_s
        assert "restart all" in last


def test_what_is_allowed_follows_from_what_was_drawn() -> None:
    for seed, drawn in enumerate(HUNDRED):
        scenario, limits, live = drawn.scenario, limits_of(drawn), liveness_of(drawn)
        slowest = max([1.0, *(item.slowdown for item in scenario.devices.classes)])
        scalars = scenario.learning == "scalars"
        devices, settings = scenario.devices, getattr(scenario, scenario.learning)
        work_s = devices.estimate_s * scenario.scalars.samples if scalars else devices.train_s
        assert limits.work_s > work_s * slowest, f"seed {seed}"
        assert limits.fetch_s > scenario.data.model_bytes / scenario.links.up_bytes_per_s, f"seed {seed}"
        assert limits.dial_s > scenario.links.dial_timeout_s, f"seed {seed}"
        assert limits.since_s == live.stops_at_s == drawn.stops_at_s
        assert live.round_s > settings.deadline_s + settings.pause_s
        # Of sampling's rounds only a few can go as badly as one may.
        rounds = 3 if scenario.learning == "sampled" else settings.rounds
        assert scenario.at_most_s > drawn.stops_at_s + rounds * live.round_s
        assert live.settled_s > scenario.at_most_s or (scalars and scenario.topology.kind == "full")
    one = next(
        drawn
        for drawn in HUNDRED
        if drawn.scenario.sampled.aggregators == 1 and drawn.scenario.learning == "sampled"
    )
    assert liveness_of(msgspec.structs.replace(one, kinds=("clocks",))).one_end
    assert not liveness_of(msgspec.structs.replace(one, kinds=("clocks", "silence"))).one_end
    looked_at = [liveness_of(drawn).links_s < drawn.scenario.at_most_s for drawn in HUNDRED]
    assert 15 < sum(looked_at) < 90
    assert any(liveness_of(drawn).settled_s < drawn.scenario.at_most_s for drawn in HUNDRED)


def test_a_configuration_can_be_read() -> None:
    drawn = next(drawn for drawn in HUNDRED if "loss" in drawn.kinds and drawn.scenario.timeline)
    head, *lines = describe(drawn).splitlines()
    assert head == f"faults: {', '.join(drawn.kinds)}; they stop at {drawn.stops_at_s:g} s"
    assert f"  links.loss = {drawn.scenario.links.loss}" in lines
    assert all(re.fullmatch(r"  [a-z_.]+ = \S.*", line) for line in lines)
    assert describe(Adversity(Scenario(), 1.0, ())) == "faults: none; they stop at 1 s"
    # What it says is all that is needed to build it again.
    tables: dict[str, object] = {}
    for line in lines:
        path, _, value = line.strip().partition(" = ")
        *folders, name = path.split(".")
        table = tables
        for folder in folders:
            table = table.setdefault(folder, {})  # type: ignore[assignment]
        table[name] = msgspec.json.decode(value)
    for learning in ("gossip", "sampled", "scalars"):
        tables[learning] = msgspec.to_builtins(getattr(Scenario(), learning)) | tables.get(learning, {})  # type: ignore[operator]
    assert msgspec.convert(tables, Scenario) == drawn.scenario


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_leaves_its_mark(kind: str) -> None:
    """Of two seeds with and without it, the descriptions differ in what it writes."""
    marks = {
        "loss": "links.loss",
        "duplication": "links.duplication",
        "reordering": "links.reordering",
        "corruption": "links.corruption",
        "latency": "links.",
        "narrow lines": "links.up_bytes_per_s",
        "impatience": "links.fetch_timeout_s",
        "nat": "nat.classes",
        "slow devices": "devices.classes",
        "clocks": "devices.clock_drift",
        "crashes": "crash ",
        "wipes": "wipe ",
        "leaving": "leave ",
        "silence": "silence ",
        "partition": "partition ",
        "churn": "churn.model",
        "small buffers": "exchange.max_waiting",
    }
    for seed, drawn in enumerate(HUNDRED):
        if kind in drawn.kinds:
            assert marks[kind] in describe(drawn), f"seed {seed}"
        elif kind not in ("latency",):
            assert marks[kind] not in describe(drawn), f"seed {seed}"
