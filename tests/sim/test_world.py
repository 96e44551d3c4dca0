"""Whole runs: one seed one trace, every topology, crashes and returns, and nothing left in memory."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

from node.core import CoreSettings, NodeCore
from protocols.errors import ConfigError
from protocols.events import Event, FinalMergeDone, LearningDone, Phase, Record, RoundDone
from protocols.machine import Machine
from protocols.signing import Signatures
from protocols.vocabulary import PeerId
from sim.graph import Graph, Value
from sim.results import ConsensusRow, MergedRow, NoteRow, Result, RoundRow, SampleRow, TraceBlock
from sim.scenario_files import convert
from sim.scenarios import Scenario
from sim.world import Observer, World

BASE: dict[str, Any] = {
    "nodes": 4,
    "topology": {"degree": 2},
    "data": {"options": {"hidden": [8]}},
    "training": {"local_steps": 2},
    "gossip": {"rounds": 6, "quorum": 1.0, "deadline_s": 5.0, "pause_s": 0.0},
    "compute": {"threads": 1},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scenario(**tables: Any) -> Scenario:
    """BASE with tables merged into its own; `rounds` is short for gossip's."""
    rounds = tables.pop("rounds", None)
    data = dict(BASE)
    for name, value in tables.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    if rounds is not None:
        data["gossip"] = {**data["gossip"], "rounds": rounds}
    return convert(data)


def run(**tables: Any) -> tuple[World, Result]:
    world = World(scenario(**tables))
    return world, world.run()


class Told(Observer):
    """Keeps everything it is told."""

    def __init__(self) -> None:
        self.records: list[tuple[float, int, Record]] = []
        self.rounds: list[RoundRow] = []
        self.samples: list[SampleRow] = []
        self.distances: list[ConsensusRow] = []
        self.means: list[MergedRow] = []
        self.notes: list[NoteRow] = []
        self.blocks: list[TraceBlock] = []
        self.events: list[tuple[float, int, Event]] = []

    def record(self, at_s: float, node: int, record: Record) -> None:
        self.records.append((at_s, node, record))

    def round(self, row: RoundRow) -> None:
        self.rounds.append(row)

    def merged(self, row: MergedRow) -> None:
        self.means.append(row)

    def sample(self, row: SampleRow) -> None:
        self.samples.append(row)

    def consensus(self, row: ConsensusRow) -> None:
        self.distances.append(row)

    def note(self, row: NoteRow) -> None:
        self.notes.append(row)

    def block(self, row: TraceBlock) -> None:
        self.blocks.append(row)

    def event(self, at_s: float, node: int, event: Event) -> None:
        self.events.append((at_s, node, event))


def run_told(**tables: Any) -> tuple[World, Result, Told]:
    told = Told()
    world = World(scenario(**tables), observer=told)
    return world, world.run(), told


def check_memory(world: World) -> None:
    """Every row of the engine is free, or that of a model which a live node, a checkpoint or work under way holds."""
    under_way = [thing for _, _, _, args in world.clock._heap for thing in args]
    ports = [node.port for node in world.nodes if node.port]
    things = [
        *(value for port in ports for value in port.endpoint.held.values()),
        *(node.checkpoint[1] for node in world.nodes if node.checkpoint),
        *under_way,
    ]
    held = {id(thing) for thing in things if isinstance(thing, Value)}
    graph = world.plan.learning
    assert isinstance(graph, Graph)
    assert graph.num_rows_used == len(held)


CHURN = {"model": "exponential", "mean_online_s": 4.0, "mean_offline_s": 1.0, "until_s": 15.0}


# --- a seed decides everything --------------------------------------------------------------------------
def test_a_seed_gives_one_run_and_another_seed_another() -> None:
    tables = {"churn": CHURN, "links": {"loss": 0.05, "jitter_s": 0.01}, "nodes": 6}
    (_, first), (_, again), (_, other) = (run(seed=seed, **tables) for seed in (7, 7, 8))
    assert first == again
    assert first.trace_hash != other.trace_hash


HASHED = """
import json, sys
from sim.scenario_files import convert
from sim.world import World
result = World(convert(json.loads(sys.argv[1]))).run()
print(result.trace_hash, result.accuracy_by_round)
"""


def test_a_run_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    tables = {**BASE, "topology": {"kind": "discover", "degree": 3}, "nodes": 6, "seed": 3, "churn": CHURN}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HASHED, json.dumps(tables)],
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
        )
        for hash_seed in ("1", "2")
    ]
    first, second = (process.communicate(timeout=100)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    assert len(first.split()[0]) == 64


def test_what_is_measured_is_not_in_the_trace_but_what_happens_is() -> None:
    _, slow = run(training={"learning_rate": 0.01})
    _, fast = run(training={"learning_rate": 0.1})
    _, later = run(devices={"train_s": 0.6})
    assert slow.trace_hash == fast.trace_hash
    assert slow.accuracy_by_round != fast.accuracy_by_round
    assert slow.trace_hash != later.trace_hash


def test_what_is_put_off_changes_neither_trace_nor_accuracy() -> None:
    tables = {"nodes": 8, "rounds": 20, "data": {"start": "common"}, "churn": CHURN}
    _, together = run(**tables)
    _, apart = run(**tables, compute={"batching": "never"})
    _, at_once = run(**tables, compute={"max_pending": 3})
    assert together.trace_hash == apart.trace_hash == at_once.trace_hash
    for other in (apart, at_once):
        assert together.accuracy_by_round == pytest.approx(other.accuracy_by_round, abs=1e-3)
        assert together.consensus_distance == pytest.approx(other.consensus_distance, rel=1e-3)


def test_a_dry_run_and_a_real_one_of_the_same_models_size_are_one_trace() -> None:
    world, real = run(nodes=6, churn=CHURN)
    size = world.plan.facts.model_bytes
    _, dry = run(nodes=6, churn=CHURN, dry_run=True, data={"model_bytes": size})
    assert (dry.accuracy_mean, dry.accuracy_by_round, dry.consensus_distance) == (None, [], None)
    # A dry run knows no sample counts, which are in the references.
    assert (dry.events, dry.messages_sent, dry.node_rounds) == (
        real.events,
        real.messages_sent,
        real.node_rounds,
    )


def test_the_marks_of_the_trace_lead_to_its_hash() -> None:
    told = Told()
    world = World(scenario(nodes=8, rounds=60, dry_run=True), observer=told, trace_events=True)
    result = world.run()
    assert [block.events for block in told.blocks] == [1024 * (i + 1) for i in range(result.events // 1024)]
    assert len(told.events) == result.events
    again = Told()
    until = told.blocks[0].events
    early = World(scenario(nodes=8, rounds=60, dry_run=True), observer=again, end_after=until).run()
    assert (early.events, early.trace_hash) == (until, told.blocks[0].hash)


# --- the core's routing ---------------------------------------------------------------------------------
class AsksEveryone(NodeCore):
    """Hands every event to every machine, and not only to those that say they deal with it."""

    def __init__(
        self, settings: CoreSettings, me: PeerId, rng: random.Random, signatures: Signatures
    ) -> None:
        super().__init__(settings, me, rng, signatures)
        assert all(isinstance(machine, Machine) for machine in self._machines)
        handlers = self._handlers
        self._handlers = {
            kind: tuple((i, type(m).step) for i, m in enumerate(self._machines)) for kind in handlers
        }


def test_machines_take_no_notice_of_what_is_not_in_their_tables() -> None:
    tables = {"nodes": 6, "churn": CHURN, "links": {"loss": 0.05}, "dry_run": True}
    routed = World(scenario(**tables)).run()
    everyone = World(scenario(**tables), core=AsksEveryone).run()
    assert routed.trace_hash == everyone.trace_hash


# --- topologies -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "nodes", "degree", "links"),
    [
        ("ring", 6, 1, [2] * 6),
        ("ring", 2, 1, [1, 1]),
        ("full", 5, 1, [4] * 5),
        ("regular", 8, 3, [3] * 8),
        ("regular", 2, 1, [1, 1]),
        ("regular", 1, 4, [0]),
    ],
)
def test_a_drawn_topology_is_the_links_that_stand(
    kind: str, nodes: int, degree: int, links: list[int]
) -> None:
    world, result = run(topology={"kind": kind, "degree": degree}, nodes=nodes, rounds=6)
    assert [node.core.view.num_live() for node in world.nodes if node.core] == links
    assert len(world.overlay().links) == sum(links) // 2
    assert result.finished == nodes


def test_nodes_that_know_one_bootstrap_peer_find_each_other() -> None:
    world, result = run(topology={"kind": "discover", "degree": 3}, nodes=10, rounds=15)
    assert result.finished == 10
    graph = nx.Graph()
    for node in world.nodes:
        assert node.core is not None
        assert node.core.view.num_live() >= 3
        assert len(node.peers) >= 3, "and would find them again after a crash"
        graph.add_edges_from((node.peer, row.peer) for row in node.core.peers() if row.state == "live")
    assert len(graph) == 10
    assert nx.is_connected(graph)
    messages = result.messages_sent
    assert messages["shuffle"] > 0
    assert messages["peers"] > 0


def test_an_edge_is_dialled_from_the_end_that_can() -> None:
    nat = {
        "classes": [{"name": "open", "share": 0.5}, {"name": "shut", "share": 0.5}],
        "reachable": [["open", "open"], ["shut", "open"]],
    }
    world, _ = run(nodes=6, topology={"kind": "full"}, rounds=2, nat=nat)
    kinds = {node.index: node.nat for node in world.overlay().nodes}
    shut = [index for index, kind in kinds.items() if kind == "shut"]
    assert len(shut) == 3
    links = set(world.overlay().links)
    expected = {(a, b) for a in range(6) for b in range(a + 1, 6) if not {a, b} <= set(shut)}
    assert links == expected


def test_a_task_or_a_churn_that_cannot_be_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="task"):
        World(scenario(data={"task": "no such task"}))
    with pytest.raises(ConfigError, match=r"churn\.trace_path"):
        World(scenario(churn={"model": "trace", "trace_path": "nowhere.csv"}))
    with pytest.raises(ConfigError, match=r"timeline\[0\]"):
        World(scenario(timeline=["at noon: crash"]))


# --- learning -------------------------------------------------------------------------------------------
def test_together_they_learn() -> None:
    _, result = run(rounds=30, training={"local_steps": 5}, data={"options": {"hidden": [32]}})
    assert result.accuracy_mean is not None
    assert result.accuracy_min is not None
    assert result.accuracy_mean > 0.8
    assert result.accuracy_min <= result.accuracy_mean
    assert result.accuracy_by_round[-1] > result.accuracy_by_round[0] + 0.4
    assert len(result.accuracy_by_round) == 30
    assert result.finished == 4


def test_a_common_start_agrees_and_different_starts_do_not() -> None:
    _, _, common = run_told(data={"start": "common"}, evaluation={"sample_every_s": 0.3}, rounds=1)
    _, _, different = run_told(data={"start": "different"}, evaluation={"sample_every_s": 0.3}, rounds=1)
    joined = [row for row in common.distances if row.nodes == 4]
    apart = [row for row in different.distances if row.nodes == 4]
    assert joined
    assert apart
    assert joined[0].distance == pytest.approx(0, abs=1e-5)
    assert apart[0].distance > 0.5


def test_a_sampled_share_of_the_nodes_evaluates() -> None:
    world, result, told = run_told(nodes=10, evaluation={"share": 0.2, "every": 3})
    chosen = {node.index for node in world.nodes if node.evaluates}
    assert len(chosen) == 2
    assert {row.node for row in told.rounds} == chosen
    assert {row.round for row in told.rounds} == {2, 5}
    assert all(0 <= row.metrics["accuracy"] <= 1 for row in told.rounds)
    assert len(result.accuracy_by_round) == 2


def test_every_record_is_told_with_its_time_and_node() -> None:
    _, result, told = run_told()
    done = [(node, record.round) for _, node, record in told.records if isinstance(record, RoundDone)]
    assert sorted(done) == [(node, round_) for node in range(4) for round_ in range(6)]
    assert all(record.metrics for _, _, record in told.records if isinstance(record, RoundDone))
    assert sum(isinstance(record, LearningDone) for _, _, record in told.records) == 4
    times = [at_s for at_s, _, _ in told.records]
    assert times == sorted(times)
    assert times[-1] <= result.virtual_s
    assert len(told.rounds) == result.node_rounds == 24


def test_the_time_series_only_grows_and_ends_near_the_result() -> None:
    _, result, told = run_told(rounds=20, evaluation={"sample_every_s": 0.5})
    for name in ("at_s", "rounds", "events", "control_bytes", "model_bytes"):
        values = [getattr(row, name) for row in told.samples]
        assert values == sorted(values), name
    last = told.samples[-1]
    assert last.at_s > result.virtual_s - 0.5
    assert last.alive == 4
    assert last.links == 4
    assert sum(last.messages.values()) > 0


def test_a_training_that_diverges_is_counted_and_the_run_goes_on() -> None:
    _, result, told = run_told(training={"learning_rate": 1000.0, "local_steps": 50}, rounds=3)
    assert result.failed_work > 0
    assert result.finished == 4
    assert any(row.node is not None and "non-finite" in row.text for row in told.notes)


def test_virtual_time_has_a_bound() -> None:
    _, result = run(at_most_s=2.0)
    assert result.virtual_s <= 2.0
    assert result.finished == 0
    _, nothing = run(at_most_s=0.001, churn={"join_within_s": 1.0}, rounds=1)
    assert (nothing.accuracy_mean, nothing.accuracy_by_round) == (None, [])


def test_a_stopped_run_is_partial_and_has_what_there_was() -> None:
    told = Told()
    world = World(scenario(rounds=200), observer=told)
    result = world.run(lambda world: world.stop())
    assert result.partial
    assert 0 < result.finished + result.node_rounds < 800
    assert len(told.rounds) == result.node_rounds
    assert result.accuracy_mean is not None


# --- coming and going -----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["regular", "discover"])
def test_a_network_with_churn_finishes_and_leaves_no_model_behind(seed: int, kind: str) -> None:
    world, result = run(
        seed=seed,
        nodes=6,
        rounds=15,
        churn=CHURN,
        topology={"kind": kind, "degree": 3},
        links={"jitter_s": 0.05},
    )
    assert result.finished == 6
    assert max(node.epoch for node in world.nodes) > 1, "somebody did crash"
    assert all(node.core is None or node.core.phase is Phase.DONE for node in world.nodes)
    check_memory(world)
    assert result.refused == {}


def rounds_of(told: Told, node: int) -> list[tuple[float, int]]:
    return [(at_s, r.round) for at_s, who, r in told.records if who == node and isinstance(r, RoundDone)]


def test_a_node_that_returns_goes_on_from_its_checkpoint() -> None:
    world, result, told = run_told(
        rounds=20, churn={"join_within_s": 0.0}, timeline=["at 4 s: crash nodes 2", "at 5 s: restart nodes 2"]
    )
    records = rounds_of(told, 2)
    before = [round_ for at_s, round_ in records if at_s <= 4.0]
    after = [round_ for at_s, round_ in records if at_s >= 5.0]
    assert not [at_s for at_s, _ in records if 4.0 < at_s < 5.0]
    assert after[0] == before[-1] + 1
    assert result.finished == 4
    assert world.nodes[2].accuracy[after[0]] >= world.nodes[2].accuracy[before[-1]] - 0.1
    assert [row.text for row in told.notes] == ["crash nodes 2", "restart nodes 2"]
    check_memory(world)


def test_a_node_that_lost_its_disk_begins_anew() -> None:
    _, result, told = run_told(
        rounds=20, churn={"join_within_s": 0.0}, timeline=["at 4 s: wipe nodes 2", "at 5 s: restart nodes 2"]
    )
    after = [round_ for at_s, round_ in rounds_of(told, 2) if at_s >= 5.0]
    assert after[0] == 0
    assert result.finished == 4


def test_a_node_that_leaves_says_goodbye() -> None:
    world, result, _ = run_told(rounds=20, timeline=["at 4 s: leave nodes 2"])
    assert result.messages_sent["bye"] > 0
    assert (result.finished, result.alive) == (3, 3)
    assert not world.nodes[2].online
    assert world.nodes[2].checkpoint is not None


def test_a_silent_node_is_let_go_of_and_taken_back() -> None:
    view = {"heartbeat_s": 0.5, "dead_after_s": 2.0, "redial_base_s": 0.5, "redial_max_s": 2.0}
    world, result, told = run_told(
        rounds=60,
        view=view,
        gossip={"deadline_s": 1.0},
        timeline=["at 5 s: silence nodes 1", "at 15 s: wake nodes 1"],
    )
    assert not [at_s for at_s, _ in rounds_of(told, 1) if 5.0 < at_s < 15.0]
    assert result.finished == 4
    alive = {round(row.at_s): row.alive for row in told.samples}
    assert (alive[4], alive[10], alive[17]) == (4, 3, 4)
    links = {round(row.at_s): row.links for row in told.samples}
    assert links[14] < links[4]
    assert world.overlay().links == sorted(world.overlay().links)


def test_a_partition_parts_and_heals() -> None:
    view = {"heartbeat_s": 0.5, "dead_after_s": 2.0, "redial_base_s": 0.5, "redial_max_s": 2.0}
    tables: dict[str, Any] = {
        "nodes": 6,
        "topology": {"kind": "full"},
        "rounds": 40,
        "view": view,
        "gossip": {"deadline_s": 1.0},
        "links": {"dial_timeout_s": 2.0, "fetch_timeout_s": 2.0},
    }
    _, result, told = run_told(**tables, timeline=["at 4 s: partition nodes 0-2|nodes 3-5", "at 14 s: heal"])
    links = {round(row.at_s): row.links for row in told.samples}
    assert (links[3], links[13]) == (15, 6)
    assert max(links.values()) == 15
    assert [row.links for row in told.samples if row.at_s > 20][-1] == 15
    assert result.finished == 6


def test_a_slow_clock_and_a_slow_device_change_the_pace() -> None:
    classes = [{"name": "phone", "share": 0.5, "slowdown": 4.0}, {"name": "desk", "share": 0.5}]
    world, result, told = run_told(
        devices={"classes": classes, "clock_drift": 0.1, "clock_offset_s": 100.0},
        gossip={"quorum": 0.0, "rounds": 8},
    )
    assert result.finished == 4
    ends = {node: max(at_s for at_s, _ in rounds_of(told, node)) for node in range(4)}
    slow = [ends[node.index] for node in world.nodes if node.device == "phone"]
    fast = [ends[node.index] for node in world.nodes if node.device == "desk"]
    assert (len(slow), len(fast)) == (2, 2)
    assert min(slow) > 2 * max(fast)


def test_a_run_ends_when_those_left_cannot_finish_any_more() -> None:
    _, result = run(rounds=30, timeline=["at 3 s: crash nodes 0,1"])
    assert result.finished == 2
    assert result.virtual_s < 120


def test_a_model_forgotten_while_it_travels_is_no_end_of_the_run() -> None:
    world, result = run(
        gossip={"rounds": 40, "quorum": 0.0},
        links={"up_bytes_per_s": 2_000.0},
        exchange={"num_generations": 1},
    )
    assert result.finished == 4
    check_memory(world)


def test_a_lossy_network_still_finishes() -> None:
    world, result = run(links={"loss": 0.2}, rounds=10)
    assert result.finished == 4
    check_memory(world)


# --- the end of a run -----------------------------------------------------------------------------------
QUIET_VIEW = {"heartbeat_s": 0.5, "dead_after_s": 2.0, "redial_base_s": 0.5, "redial_max_s": 2.0}


def test_a_node_that_is_back_before_its_goodbye_is_over_is_waited_for() -> None:
    _, result = run(dry_run=True, rounds=30, timeline=["at 5 s: leave all", "at 5.5 s: restart all"])
    assert (result.finished, result.alive) == (4, 4)
    assert result.virtual_s > 10


def test_switching_the_last_silent_node_off_and_on_does_not_end_the_run() -> None:
    _, result = run(
        dry_run=True,
        rounds=40,
        view=QUIET_VIEW,
        gossip={"deadline_s": 1.0},
        timeline=["at 2 s: silence nodes 3", "at 120 s: restart nodes 3"],
    )
    assert result.finished == 4
    assert result.virtual_s > 120


def test_a_node_that_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("node,online_from_s,online_to_s\n0,0,\n1,0,\n2,0,\n")
    tables = {"churn": {"model": "trace", "trace_path": str(tmp_path / "trace.csv")}, "dry_run": True}
    _, result = run(**tables, gossip={"deadline_s": 1.0})
    assert (result.finished, result.alive) == (3, 3)
    assert result.virtual_s < 60


def test_the_last_accuracy_is_the_newest_and_not_the_highest_rounds() -> None:
    _, result, told = run_told(
        rounds=60,
        at_most_s=13.0,
        churn={"join_within_s": 0.0},
        timeline=["at 10 s: wipe all", "at 10.1 s: restart all"],
    )
    last = {row.node: row for row in told.rounds}
    assert result.accuracy_mean == pytest.approx(
        sum(row.metrics["accuracy"] for row in last.values()) / len(last)
    )
    assert max(row.round for row in last.values()) < max(result.evaluated_rounds)


def test_nodes_that_vanished_say_nothing_of_the_end() -> None:
    world, result, _ = run_told(rounds=20, timeline=["at 1 s: crash nodes 0,1"])
    left = [world.nodes[index].last_accuracy for index in (2, 3)]
    assert [result.accuracy_min, result.accuracy_max] == sorted(left)  # type: ignore[type-var]


def test_a_share_of_restarts_is_of_those_that_are_down() -> None:
    world, _ = run(
        dry_run=True,
        at_most_s=8.0,
        rounds=100,
        timeline=["at 2 s: silence nodes 0", "at 3 s: crash nodes 1", "at 4 s: restart all"],
    )
    assert [node.silent for node in world.nodes] == [True, False, False, False]
    assert [node.epoch for node in world.nodes] == [1, 3, 1, 1], "one crash and one start"


def test_lines_that_come_too_late_are_told() -> None:
    _, result, told = run_told(rounds=3, timeline=["at 1000 s: crash 30 %", "at 1001 s: heal"])
    assert result.timeline_left == 2
    assert told.notes[-1].text == "2 lines of the timeline come after the end"


def test_metrics_that_fail_are_counted(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom node.tasks import Task, mlp\n"
        "def bad(outputs, targets):\n    raise ValueError('no')\n"
        "def make_task():\n"
        "    data = torch.zeros(40, 2), torch.zeros(40).long()\n"
        "    return Task('odd', lambda: mlp(2, [], 2), data, data, metrics=bad)\n"
    )
    _, result = run(rounds=2, data={"task": f"{tmp_path / 'odd.py'}:make_task", "options": {}})
    assert result.failed_work == 8
    assert result.accuracy_mean is None


# --- the final merge, and the mean that nobody has -------------------------------------------------------
FINAL: dict[str, Any] = {
    "nodes": 8,
    "rule": "mean",
    "topology": {"kind": "full"},
    "data": {"options": {"hidden": [8]}, "start": "common"},
    "training": {"local_steps": 10},
    "gossip": {"rounds": 4, "quorum": 0.0, "fanout": 0.2, "deadline_s": 5.0, "pause_s": 0.0},
}


def final(mode: str, **tables: Any) -> dict[str, Any]:
    merged = {**FINAL, **tables}
    return {**merged, "gossip": {**FINAL["gossip"], **tables.get("gossip", {}), "final_merge": mode}}


@pytest.mark.parametrize("mode", ["butterfly", "aggregator"])
@pytest.mark.parametrize("nodes", [8, 11])
def test_a_final_merge_gives_every_node_the_same_model(mode: str, nodes: int) -> None:
    told = Told()
    world = World(scenario(**final(mode, nodes=nodes)), observer=told)
    result = world.run()
    records = [record for _, _, record in told.records if isinstance(record, FinalMergeDone)]
    assert [record.num_members for record in records] == [nodes] * nodes
    assert {record.num_samples for record in records} == {sum(world.plan.facts.num_samples)}
    assert result.finished == nodes
    kept = [note.text.rpartition(" ")[2] for note in told.notes]
    assert kept == ["merged"] * nodes
    assert result.consensus_distance == pytest.approx(0, abs=1e-4)
    assert max(row.distance for row in told.distances) > 0.1
    assert result.final_merged_accuracy == pytest.approx(result.accuracy_mean)
    assert result.accuracy_mean > result.accuracy_by_round[-1]
    assert len(result.accuracy_by_round) == 4


def test_after_a_final_merge_each_node_has_what_it_judged_better() -> None:
    told = Told()
    result = World(scenario(**final("butterfly", gossip={"final_keep": "better"})), observer=told).run()
    kept = [note.text.rpartition(" ")[2] for note in told.notes]
    assert set(kept) == {"own", "merged"}, "few samples to judge by, and much alike models"
    assert result.consensus_distance > 0.1
    assert result.final_merged_accuracy > result.accuracy_mean
    by_node = {row.node: row.metrics["accuracy"] for row in told.rounds if row.round == 4}
    assert sum(by_node.values()) / 8 == pytest.approx(result.accuracy_mean)


def test_nobody_measures_the_final_merge_but_those_who_are_to() -> None:
    told = Told()
    result = World(scenario(**final("butterfly", evaluation={"share": 0.25})), observer=told).run()
    records = [record for _, _, record in told.records if isinstance(record, FinalMergeDone)]
    assert sum(bool(record.merged) for record in records) == 2
    assert result.final_merged_accuracy is not None
    dry = World(scenario(**final("butterfly", dry_run=True, data={}))).run()
    assert (dry.final_merged_accuracy, dry.finished) == (None, 8)


def test_a_final_merge_goes_on_without_those_that_crash_in_it() -> None:
    result = World(
        scenario(**final("butterfly", dry_run=True, data={}, timeline=["at 2.4 s: crash nodes 3"]))
    ).run()
    assert (result.finished, result.alive) == (7, 7)


BATCH_NORM = """
import torch
from torch import nn
from node.tasks import Task


def make_task() -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 6, generator=generator) * 3 + 1
    targets = (inputs[:, 0] * inputs[:, 1] > 1).long()
    net = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return Task("norm", net, (inputs[:300], targets[:300]), (inputs[300:], targets[300:]))
"""


@pytest.mark.parametrize("task", ["digits", "batch norm"])
def test_measuring_the_mean_of_the_models_changes_nothing(task: str, tmp_path: Path) -> None:
    (tmp_path / "norm.py").write_text(BATCH_NORM)
    data = {"task": "norm.py:make_task", "start": "common"} if task == "batch norm" else FINAL["data"]
    found = []
    for merged in (True, False):
        told = Told()
        tables = {**FINAL, "nodes": 4, "data": data, "evaluation": {"merged": merged}}
        if task == "batch norm":
            tables["data"] = {**data, "options": {}}
        world = World(scenario(**tables), tmp_path, observer=told)
        result = world.run()
        models = [
            world.plan.computer._engine.params(value.row)  # type: ignore[union-attr]
            for node in world.nodes
            if node.core is not None
            for value in [node.held[node.core.model.digest]]
        ]
        found.append((result, told, models))
    (with_it, means, ones), (without, none, others) = found
    assert with_it.trace_hash == without.trace_hash
    assert len(ones) == len(others) == 4
    for one, other in zip(ones, others, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert means.rounds == none.rounds
    assert means.distances == none.distances
    assert [row.at_s for row in means.means] == [row.at_s for row in means.distances]
    assert none.means == []
    assert (with_it.merged_accuracy, without.merged_accuracy) == (means.means[-1].accuracy, None)
    assert with_it.merged_accuracy > with_it.accuracy_mean - 0.05
