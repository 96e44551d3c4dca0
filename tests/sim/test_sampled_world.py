"""Whole networks that learn by sampling: rounds that go on, one end for all, and rules that name what breaks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from node.core import NodeCore
from protocols.events import Aggregate, Effect, Emit, Event, Input, Keep, RoundDone, Train
from protocols.vocabulary import ModelRef, PeerId
from sim import sampled_checkers
from sim.checkers import Checkers, Limits, Liveness, Violation
from sim.plots import draw_run
from sim.results import RoundRow, read_run
from sim.running import run_scenario
from sim.sampled_checkers import different_ends
from sim.scenario_files import convert, load, validate
from sim.scenarios import Scenario
from sim.world import Observer, World

BASE: dict[str, Any] = {
    "learning": "sampled",
    "rule": "fedavg",
    "nodes": 16,
    "at_most_s": 400.0,
    "dry_run": True,
    "topology": {"kind": "discover", "degree": 4},
    "view": {"heartbeat_s": 1.0, "dead_after_s": 4.0, "redial_max_s": 5.0},
    "sampled": {
        "rounds": 20,
        "sample_size": 4,
        "deadline_s": 5.0,
        "ping_s": 1.0,
        "wait_for_members": 16,
    },
    "evaluation": {"consensus": False},
}
LEARNS: dict[str, Any] = {
    "dry_run": False,
    "data": {"options": {"hidden": [8]}, "samples_per_node": 40},
    "training": {"local_steps": 5, "batch_size": 16, "learning_rate": 0.1},
    "compute": {"threads": 1},
}


def scenario(**tables: Any) -> Scenario:
    """BASE with tables merged into its own."""
    data = dict(BASE)
    for name, value in tables.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    found = convert(data)
    validate(found, Path.cwd())
    return found


def checked(found: Scenario, core: Callable[..., NodeCore] = NodeCore) -> World:
    """A run with every rule looked at after every event."""
    checkers = Checkers(Limits(), encode=True, stride=8)
    world = World(found, checkers=checkers, core=core)
    world.run()
    return world


class Rounds(Observer):
    def __init__(self) -> None:
        self.rows: list[RoundRow] = []

    def round(self, row: RoundRow) -> None:
        self.rows.append(row)


def test_a_calm_network_ends_with_one_model() -> None:
    world = checked(scenario())
    assert world.num_finished == 16
    cores = [node.core for node in world.nodes if node.core is not None]
    assert len(different_ends(cores)) == 1
    # Each round has its sample, and hardly anybody beside.
    assert 4 * 20 <= world.node_rounds <= 1.5 * 4 * 20 + 16


def test_it_learns_and_all_have_the_result() -> None:
    rounds = Rounds()
    world = World(scenario(**LEARNS, sampled={"rounds": 40}), observer=rounds)
    result = world.run()
    assert result.accuracy_mean is not None
    assert result.accuracy_min == result.accuracy_max
    assert result.accuracy_mean > 0.6
    assert {row.round for row in rounds.rows if row.num_merged} == set(range(1, 40))


def test_accuracy_under_way_is_that_of_the_latest_aggregate() -> None:
    rounds = Rounds()
    world = World(scenario(**LEARNS, at_most_s=12.0), observer=rounds)
    result = world.run()
    newest = max(row.round for row in rounds.rows)
    assert result.finished == 0
    assert newest > 3
    assert result.accuracy_max == max(row.metrics["accuracy"] for row in rounds.rows if row.round == newest)


@pytest.mark.parametrize("seed", [0, 1])
def test_rounds_go_on_where_most_fall_silent_and_come_back(seed: int) -> None:
    lines = ["at 12 s: silence 80 %", "at 60 s: wake all"]
    world = checked(scenario(seed=seed, timeline=lines, sampled={"rounds": 60, "window": 20}))
    assert world.num_finished == 16


def test_who_slept_begins_no_old_round() -> None:
    """Nodes that wake believe for a moment that all stands still: so did they themselves."""
    lines = ["at 12 s: silence 80 %", "at 60 s: wake all"]
    rounds = Rounds()
    world = World(
        scenario(
            timeline=lines,
            sampled={"rounds": 60},
            dry_run=False,
            **{k: v for k, v in LEARNS.items() if k != "dry_run"},
        ),
        observer=rounds,
    )
    world.run()
    before = max(row.round for row in rounds.rows if row.at_s < 60)
    after = [row.round for row in rounds.rows if row.at_s > 60]
    # One aggregate may have been under way as its maker fell silent.
    assert sum(round_ < before for round_ in after) <= 1


def test_halves_go_on_and_find_together() -> None:
    lines = ["at 12 s: partition a|b", "at 40 s: heal"]
    world = checked(scenario(timeline=lines, sampled={"rounds": 80}))
    cores = [node.core for node in world.nodes if node.core is not None]
    assert world.num_finished == 16
    assert len(different_ends(cores)) == 1


def test_a_seed_gives_one_trace() -> None:
    one, other = (
        World(scenario(timeline=["at 9 s: crash 30 %", "at 15 s: restart all"])).run() for _ in range(2)
    )
    assert one.trace_hash == other.trace_hash
    assert World(scenario(seed=1)).run().trace_hash != one.trace_hash


def test_the_builtin_scenario_runs() -> None:
    found, base = load(
        "sampled",
        ["nodes=40", "sampled.wait_for_members=40", "sampled.rounds=20", "dry_run=true", "timeline=[]"],
    )
    validate(found, base)
    assert World(found, base).run().finished == 40


def test_the_report_shows_the_latest_aggregate(tmp_path: Any) -> None:
    outcome = run_scenario(
        scenario(**LEARNS, nodes=12, sampled={"rounds": 10, "wait_for_members": 12}),
        tmp_path,
        tmp_path / "out",
    )
    assert outcome.report is not None
    plots = {plot.title: plot for plot in draw_run(read_run(tmp_path / "out"))}
    assert any("of the latest aggregate" in plot.alt for plot in plots.values())
    assert "aggregated" in plots["Messages by kind"].alt


# --- rules: each is broken once -------------------------------------------------------------------------
class Spoilt(NodeCore):
    """Changes what a core asks for, once something fits."""

    change: Callable[[NodeCore, Effect], Effect | None]

    def step(self, now: float, event: Event) -> list[Effect]:
        return [type(self).change(self, effect) or effect for effect in super().step(now, event)]


def spoilt(change: Callable[[NodeCore, Effect], Effect | None]) -> type[NodeCore]:
    return type("Spoiled", (Spoilt,), {"change": staticmethod(change)})


def twice(core: NodeCore, effect: Effect) -> Effect | None:
    if isinstance(effect, Aggregate):
        return replace(effect, inputs=(*effect.inputs, effect.inputs[0]))
    return None


def of_nobody(core: NodeCore, effect: Effect) -> Effect | None:
    if isinstance(effect, Aggregate):
        stranger = Input(PeerId("nobody"), effect.inputs[0].ref, 0)
        return replace(effect, inputs=(stranger, *effect.inputs[1:]))
    return None


def unverified(core: NodeCore, effect: Effect) -> Effect | None:
    if isinstance(effect, Aggregate):
        return replace(effect, own=ModelRef(b"\xee" * 32, 1, effect.own.round, 1))
    return None


def of_another_round(core: NodeCore, effect: Effect) -> Effect | None:
    if isinstance(effect, Aggregate):
        return replace(effect, own=replace(effect.own, round=effect.own.round - 1))
    return None


def again(core: NodeCore, effect: Effect) -> Effect | None:
    return replace(effect, round=1) if isinstance(effect, Train) and effect.round > 4 else None


def older(core: NodeCore, effect: Effect) -> Effect | None:
    return Keep(replace(effect.ref, round=0)) if isinstance(effect, Keep) and effect.ref.round > 3 else None


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        (twice, {"sampled"}),
        (of_nobody, {"sampled"}),
        (unverified, {"sampled", "verified"}),
        (of_another_round, {"sampled"}),
        (again, {"rounds"}),
        (older, {"kept"}),
    ],
)
def test_a_broken_rule_names_itself(change: Any, rules: set[str]) -> None:
    with pytest.raises(Violation) as broken:
        # A small network, so that nodes are drawn again soon.
        checked(scenario(nodes=8, sampled={"wait_for_members": 8}), spoilt(change))
    assert broken.value.rule in rules


def leaves_a_ping(core: NodeCore) -> None:
    core.learning._asking.pings[10_000] = PeerId("node-00001")  # type: ignore[union-attr]


def wants_too_often(core: NodeCore) -> None:
    core.view._wanted[PeerId("node-00001")] = 7


def has_no_purpose(core: NodeCore) -> None:
    core.learning._timers.due.clear()  # type: ignore[union-attr]


def calls_too_many(core: NodeCore) -> None:
    learning: Any = core.learning
    learning._asking.calls += [object()] * (sampled_checkers.MAX_CALLS + 1)


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        (leaves_a_ping, "due"),
        (wants_too_often, "let_go"),
        (has_no_purpose, "due"),
        (calls_too_many, "bounds"),
    ],
)
def test_a_leak_names_itself(harm: Callable[[NodeCore], None], rule: str) -> None:
    class Leaky(NodeCore):
        def step(self, now: float, event: Event) -> list[Effect]:
            effects = super().step(now, event)
            if any(isinstance(effect, Train) for effect in effects):
                harm(self)
            return effects

    with pytest.raises(Violation) as broken:
        checked(scenario(nodes=8, sampled={"wait_for_members": 8}), Leaky)
    assert broken.value.rule == rule


def test_a_round_too_many_is_told() -> None:
    facts_of = checked(scenario(nodes=8, sampled={"wait_for_members": 8, "rounds": 3}))
    facts = sampled_checkers.SampledFacts(facts_of.nodes[0].core)  # type: ignore[arg-type]
    told = Emit(RoundDone(round=4, num_merged=0, staleness_max=0, metrics={}, duration_s=0.0))
    assert sampled_checkers._told_round(facts, told) == "round 4 of 3 ends"


def test_two_ends_of_a_whole_network_are_told() -> None:
    checkers = Checkers(Limits(), encode=True)
    world = World(scenario(), checkers=checkers)
    world.run()
    liveness = Liveness(stops_at_s=0.0, round_s=10.0, one_end=True)
    liveness.check(world, checkers)
    core = world.nodes[3].core
    assert core is not None
    learning: Any = core.learning
    learning._own = replace(learning._own, digest=b"\xee" * 32)
    with pytest.raises(Violation, match="one_end"):
        liveness.check(world, checkers)
