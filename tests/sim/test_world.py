"""Whole runs: one seed one trace, every topology, crashes and returns, and nothing left in memory."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import networkx as nx
import pytest
import torch

from node.task_loading import make_task
from protocols.errors import ConfigError
from protocols.events import Phase, Record, RoundDone
from protocols.vocabulary import Digest
from sim.world import Result, Scenario, World, draw_edges

BASE: dict[str, Any] = {
    "nodes": 4,
    "degree": 2,
    "options": {"hidden": [8]},
    "training": {"local_steps": 2},
    "gossip": {"rounds": 6, "quorum": 1.0, "deadline_s": 5.0, "pause_s": 0.0},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scenario(**tables: Any) -> Scenario:
    rounds = tables.pop("rounds", None)
    data = {**BASE, **tables}
    if rounds is not None:
        data["gossip"] = {**data["gossip"], "rounds": rounds}
    return msgspec.convert(data, Scenario)


def run(**tables: Any) -> tuple[World, Result]:
    world = World(scenario(**tables))
    return world, world.run()


def check_memory(world: World) -> None:
    """Every model in memory is held by a live node or a checkpoint, once counted for each."""
    holders: Counter[bytes] = Counter()
    for node in world.nodes:
        if node.port is not None:
            holders.update(list(node.port.endpoint.held))
        if node.checkpoint is not None:
            holders[node.checkpoint.digest] += 1
    assert world._shared._holders == holders
    assert len(world._shared) == len(holders)


CHURN = {"mean_online_s": 4.0, "mean_offline_s": 1.0, "until_s": 15.0}


# --- a seed decides everything --------------------------------------------------------------------------
def test_a_seed_gives_one_run_and_another_seed_another() -> None:
    tables = {"churn": CHURN, "links": {"loss": 0.05, "jitter_s": 0.01}, "nodes": 6}
    (_, first), (_, again), (_, other) = (run(seed=seed, **tables) for seed in (7, 7, 8))
    assert first == again
    assert first.trace_hash != other.trace_hash


HASHED = """
import json, sys, msgspec, torch
torch.set_num_threads(1)
from sim.world import Scenario, World
result = World(msgspec.convert(json.loads(sys.argv[1]), Scenario)).run()
print(result.trace_hash, result.accuracy_by_round)
"""


def test_a_run_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    tables = {**BASE, "topology": "discover", "nodes": 6, "degree": 3, "seed": 3, "churn": CHURN}
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
    _, slow = run(training={"local_steps": 2, "learning_rate": 0.01})
    _, fast = run(training={"local_steps": 2, "learning_rate": 0.1})
    _, later = run(compute={"train_s": 0.6})
    assert slow.trace_hash == fast.trace_hash
    assert slow.accuracy_by_round != fast.accuracy_by_round
    assert slow.trace_hash != later.trace_hash


# --- topologies -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("topology", "nodes", "degree", "links"),
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
    topology: str, nodes: int, degree: int, links: list[int]
) -> None:
    world, result = run(topology=topology, nodes=nodes, degree=degree, rounds=2)
    assert [node.core.view.num_live() for node in world.nodes if node.core] == links
    assert result.finished == nodes


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_a_regular_graph_is_connected_and_regular(seed: int, degree: int) -> None:
    edges = draw_edges(scenario(nodes=12, degree=degree, seed=seed))
    graph = nx.Graph(edges)
    assert nx.is_connected(graph)
    assert {count for _, count in graph.degree} == {degree}
    assert len(graph) == 12
    assert all(low < high for low, high in edges)
    assert edges == sorted(edges)


@pytest.mark.parametrize(("nodes", "degree"), [(4, 4), (4, 5), (5, 3), (3, 1), (7, 1)])
def test_a_graph_that_cannot_be_is_refused_with_what_can(nodes: int, degree: int) -> None:
    with pytest.raises(ConfigError, match=f"no connected {degree}-regular graph of {nodes} nodes") as caught:
        World(scenario(nodes=nodes, degree=degree))
    assert (caught.value.path, caught.value.allowed) == ("degree", "2 to nodes - 1, nodes * degree even")


def test_nodes_that_know_one_bootstrap_peer_find_each_other() -> None:
    world, result = run(topology="discover", nodes=10, degree=3, rounds=15)
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
    assert messages["ask"] > 0
    assert messages["peers"] > 0


def test_a_wrong_rule_or_schedule_is_the_operators_mistake() -> None:
    with pytest.raises(ConfigError, match=r"rule: .*meen"):
        World(scenario(rule=["meen"]))
    with pytest.raises(ConfigError, match=r"schedule: churn at 1.0 s: node 0 cannot crash now"):
        World(scenario(schedule=[{"at_s": 1.0, "node": 0, "change": "crash"}]))


# --- learning -------------------------------------------------------------------------------------------
def test_together_they_learn() -> None:
    _, result = run(rounds=30, training={"local_steps": 5}, options={"hidden": [32]})
    assert result.accuracy_mean > 0.8
    assert result.accuracy_min <= result.accuracy_mean
    assert result.accuracy_by_round[-1] > result.accuracy_by_round[0] + 0.4
    assert len(result.accuracy_by_round) == 30
    assert result.finished == 4


def test_a_common_start_is_one_model_and_different_starts_are_not() -> None:
    def first_models(start: str) -> list[torch.Tensor]:
        world = World(scenario(start=start))
        while any(node.core is None or node.core.model is None for node in world.nodes):
            world.clock.step()
        refs = [node.core.model for node in world.nodes if node.core and node.core.model]
        return [world._shared.get(Digest(ref.digest))["0.weight"] for ref in refs]

    common, different = first_models("common"), first_models("different")
    assert all(torch.equal(common[0], other) for other in common)
    assert not any(torch.equal(different[0], other) for other in different[1:])


def test_each_node_trains_on_its_own_part() -> None:
    world = World(scenario(partitioner="dirichlet", alpha=0.1))
    sizes = [len(node.task.train[0]) for node in world.nodes]
    assert sum(sizes) == len(make_task("digits", {}, Path()).train[0])
    assert len(set(sizes)) > 1


def test_every_record_is_told_with_its_time_and_node() -> None:
    told: list[tuple[float, int, Record]] = []
    world = World(scenario(), on_record=lambda *args: told.append(args))
    result = world.run()
    done = [(node, record.round) for _, node, record in told if isinstance(record, RoundDone)]
    assert sorted(done) == [(node, round_) for node in range(4) for round_ in range(6)]
    times = [at_s for at_s, _, _ in told]
    assert times == sorted(times)
    assert times[-1] <= result.virtual_s


def test_virtual_time_has_a_bound() -> None:
    _, result = run(at_most_s=2.0)
    assert result.virtual_s <= 2.0
    assert result.finished == 0
    _, nothing = run(at_most_s=0.001, churn={"join_within_s": 1.0}, rounds=1)
    assert (nothing.accuracy_mean, nothing.accuracy_by_round) == (0.0, [])


def test_progress_is_shown_now_and_then() -> None:
    seen: list[int] = []
    world = World(scenario(nodes=8, rounds=20))
    result = world.run(lambda world: seen.append(world.num_finished))
    assert len(seen) >= result.events // 512
    assert seen == sorted(seen)


# --- coming and going -----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("topology", ["regular", "discover"])
def test_a_network_with_churn_finishes_and_leaves_no_model_behind(seed: int, topology: str) -> None:
    world, result = run(
        seed=seed, nodes=6, degree=3, rounds=15, churn=CHURN, topology=topology, links={"jitter_s": 0.05}
    )
    assert result.finished == 6
    assert max(node.epoch for node in world.nodes) > 1, "somebody did crash"
    assert all(node.core is not None and node.core.phase is Phase.DONE for node in world.nodes)
    check_memory(world)
    assert result.refused == {}


def test_memory_is_right_after_every_event() -> None:
    world = World(scenario(nodes=6, degree=3, churn=CHURN, links={"jitter_s": 0.05}))
    while world.clock.step() and world.num_finished < 6:
        check_memory(world)


def test_a_node_that_returns_goes_on_from_its_checkpoint() -> None:
    schedule = [{"at_s": 0.0, "node": node, "change": "join"} for node in range(4)]
    schedule += [{"at_s": 4.0, "node": 2, "change": "crash"}, {"at_s": 5.0, "node": 2, "change": "restart"}]
    records: list[tuple[float, int]] = []
    world = World(
        scenario(rounds=20, schedule=schedule),
        on_record=lambda at_s, node, record: (
            records.append((at_s, record.round)) if node == 2 and isinstance(record, RoundDone) else None
        ),
    )
    result = world.run()
    before = [round_ for at_s, round_ in records if at_s <= 4.0]
    after = [round_ for at_s, round_ in records if at_s >= 5.0]
    assert not [at_s for at_s, _ in records if 4.0 < at_s < 5.0]
    assert after[0] == before[-1] + 1
    assert result.finished == 4
    assert world.nodes[2].accuracy[after[0]] >= world.nodes[2].accuracy[before[-1]] - 0.1
    check_memory(world)


def test_a_model_forgotten_while_it_travels_is_gone_not_the_end_of_the_run() -> None:
    world, result = run(
        rounds=40,
        gossip={"rounds": 40, "quorum": 0.0, "deadline_s": 5.0, "pause_s": 0.0},
        links={"bandwidth_bytes_per_s": 2_000.0},
        exchange={"num_generations": 1},
    )
    assert result.finished == 4
    check_memory(world)


def test_a_lossy_network_still_finishes() -> None:
    world, result = run(links={"loss": 0.2}, rounds=10)
    assert result.finished == 4
    check_memory(world)
