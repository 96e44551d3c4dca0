"""Networks in which nobody learns: joining, what it costs, machines that fall silent, and parts that find each other."""

from collections import Counter
from typing import Any

import pytest

from node.core import CoreSettings, NodeCore
from protocols.errors import ConfigError
from protocols.events import LinkChanged, Record
from protocols.vocabulary import Reason
from sim.checkers import Checkers
from sim.learning import peer_name
from sim.results import SampleRow
from sim.scenario_files import convert, load, validate
from sim.scenarios import Scenario
from sim.world import Observer, World

BASE: dict[str, Any] = {
    "learning": "none",
    "nodes": 40,
    "at_most_s": 300.0,
    "topology": {"kind": "discover", "degree": 4},
    "churn": {"join_within_s": 20.0},
    "evaluation": {"sample_every_s": 10.0},
}


def scenario(**tables: Any) -> Scenario:
    """BASE with tables merged into its own."""
    data = dict(BASE)
    for name, value in tables.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    chosen = convert(data)
    validate(chosen, load("baseline")[1])
    return chosen


class Log(Observer):
    """Samples, and the links that ended, by (moment, node, peer, reason)."""

    def __init__(self) -> None:
        self.samples: dict[float, SampleRow] = {}
        self.ended: list[tuple[float, int, str, str]] = []

    def sample(self, row: SampleRow) -> None:
        self.samples[row.at_s] = row

    def record(self, at_s: float, node: int, record: Record) -> None:
        if isinstance(record, LinkChanged) and not record.up:
            self.ended.append((at_s, node, record.peer, record.reason))


def across(world: World) -> int:
    """Links between the lower half of the nodes and the upper one."""
    half = len(world.nodes) // 2
    return sum((a < half) != (b < half) for a, b in world.overlay().links)


# --- a world without learning ---------------------------------------------------------------------------
def test_nobody_learns_and_no_task_is_loaded() -> None:
    world = World(scenario(nodes=4, at_most_s=30.0, data={"task": "no-such-task"}))
    result = world.run()
    assert (result.virtual_s, result.alive, result.finished) == (30.0, 4, 0)
    assert (result.node_rounds, result.fetches, result.accuracy_mean) == (0, 0, None)
    assert not {"offer", "rec", "want"} & set(result.messages_sent)


def test_everybody_finds_a_place_by_one_known_node_and_the_checkers_have_no_complaint() -> None:
    world = World(scenario(), checkers=Checkers())
    world.run()
    links = Counter(node for pair in world.overlay().links for node in pair)
    assert min(links[node.index] for node in world.nodes) >= 4


def test_links_are_no_more_than_half_as_many_again_as_wanted_once_the_crowd_has_settled() -> None:
    chosen = scenario(nodes=80, at_most_s=600.0)
    world = World(chosen)
    world.run()
    links = Counter(node for pair in world.overlay().links for node in pair)
    assert chosen.topology.degree <= links.total() / 80 <= 1.5 * chosen.topology.degree
    assert max(links.values()) <= 3 * chosen.topology.degree, "the bootstrap node has room for newcomers"


def test_a_seed_gives_one_trace() -> None:
    one, same, other = (World(scenario(at_most_s=60.0, seed=seed)).run().trace_hash for seed in (1, 1, 2))
    assert one == same != other


def test_a_crowd_is_turned_away_few_times_for_doors_lead_to_those_who_came_just_before() -> None:
    world = World(scenario(nodes=300, at_most_s=60.0, view={"redial_max_s": 5.0}))
    result = world.run()
    assert result.refused["full"] > 100, "one bootstrap node has not room for all"
    assert result.refused["full"] < 2 * 300
    assert result.messages_sent["hello"] < 13 * 300


def test_what_it_costs_a_node_does_not_grow_with_the_network() -> None:
    per_node = []
    for nodes in (40, 320):
        log = Log()
        World(scenario(nodes=nodes, at_most_s=240.0), observer=log).run()
        sent = [sum(log.samples[at_s].messages.values()) for at_s in (120.0, 240.0)]
        per_node.append((sent[1] - sent[0]) / nodes)
    assert per_node[1] == pytest.approx(per_node[0], rel=0.2)


# --- the silent -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_the_silent_are_found_in_time_and_nobody_else_is_given_up(loss: float) -> None:
    log, silent = Log(), {peer_name(7), peer_name(23)}
    chosen = scenario(timeline=["at 120 s: silence nodes 7,23"], links={"loss": loss})
    world = World(chosen, observer=log)
    world.run()
    view = chosen.view
    found = [at_s - 120 for at_s, node, peer, _ in log.ended if peer in silent and at_s >= 120]
    assert len(found) >= 2 * chosen.topology.degree
    assert max(found) <= view.dead_after_s + view.heartbeat_s + 0.1
    given_up = {peer for _, _, peer, reason in log.ended if reason == Reason.SILENT.value}
    assert given_up == silent
    states = [
        row.state
        for node in world.nodes
        if node.core and node.online
        for row in node.core.peers()
        if row.peer in silent
    ]
    assert states.count("suspected") > 0.9 * len(states)


def test_who_wakes_is_known_to_be_there_again() -> None:
    world = World(scenario(at_most_s=900.0, timeline=["at 120 s: silence nodes 7", "at 200 s: wake nodes 7"]))
    world.run()
    states = Counter(
        row.state
        for node in world.nodes
        if node.core
        for row in node.core.peers()
        if row.peer == peer_name(7)
    )
    assert states["live"] >= 4
    assert states["suspected"] == 0


# --- parts of a network ---------------------------------------------------------------------------------
def test_islands_stay_apart_until_a_node_of_each_hears_of_the_other() -> None:
    for timeline, together in (([], False), (["at 120 s: introduce nodes 5,25"], True)):
        world = World(scenario(at_most_s=720.0, topology={"islands": 2}, timeline=timeline))
        world.run()
        assert (across(world) >= 10) == together
        assert (across(world) == 0) != together


def test_halves_that_were_parted_for_five_minutes_find_together_without_an_operator() -> None:
    seen: list[int] = []
    cut = ["at 60 s: partition nodes 0-19|nodes 20-39", "at 360 s: heal"]
    world = World(scenario(at_most_s=1200.0, timeline=cut))
    world.clock.at(359.0, lambda: seen.append(across(world)))
    world.run()
    assert seen == [0]
    assert across(world) >= 10
    states = Counter(row.state for node in world.nodes if node.core for row in node.core.peers())
    assert states["suspected"] < 0.01 * states.total()


# --- saying so in a scenario ----------------------------------------------------------------------------
def refused(**tables: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        scenario(**tables)
    return caught.value


def test_islands_are_for_nodes_that_discover_and_not_more_than_there_are() -> None:
    assert refused(topology={"kind": "regular", "islands": 2}).path == "topology.islands"
    assert refused(nodes=3, topology={"islands": 4}).path == "topology.islands"


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("", "stands nothing"),
        ("5 %", "stands '5 %'"),
        ("nodes 5", "to nobody"),
        ("nodes 5,40", "no nodes '40'"),
    ],
)
def test_an_introduction_needs_two_nodes_by_number(rest: str, problem: str) -> None:
    error = refused(timeline=[f"at 5 s: introduce {rest}"])
    assert error.path == "timeline[0]"
    assert problem in str(error)


def test_who_is_down_hears_of_nobody() -> None:
    timeline = ["at 20 s: crash nodes 3", "at 21 s: introduce nodes 2,3"]
    world = World(scenario(nodes=4, at_most_s=30.0, topology={"islands": 2}, timeline=timeline))
    world.run()
    assert [node.core is None for node in world.nodes] == [False, False, False, True]


def test_every_node_of_an_island_knows_its_own_first_node() -> None:
    made: list[CoreSettings] = []

    def core(settings: CoreSettings, *rest: Any) -> NodeCore:
        made.append(settings)
        return NodeCore(settings, *rest)

    World(scenario(nodes=6, at_most_s=30.0, topology={"islands": 2}), core=core).run()
    known = Counter(address for settings in made for address in settings.view.bootstrap)
    assert known == {f"/memory/0/p2p/{peer_name(0)}": 3, f"/memory/0/p2p/{peer_name(3)}": 3}


def test_the_built_in_scenarios() -> None:
    membership, islands = load("membership")[0], load("islands")[0]
    assert (membership.learning, membership.nodes, membership.topology.kind) == ("none", 1000, "discover")
    assert (islands.learning, islands.nodes, islands.topology.islands) == ("none", 200, 2)
    assert membership.view == islands.view == Scenario().view
