"""One core, two worlds: the same scenario on real daemons over libp2p and on the simulator, side by side.

    python benchmarks/two_worlds.py [--json] [--nodes 8] [--rounds 40] [--seed 1]

Both run the digits on a drawn 4-regular graph, different first models, unequal shards (Dirichlet 0.5), the same
round settings and merge rule. Prints both accuracy curves and the counts of messages and model exchanges.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from node.cluster import Cluster, LocalNode, free_port, local_settings
from sim.scenario_files import convert
from sim.scenarios import Scenario, rule_specs
from sim.topology import draw_edges
from sim.world import World

KINDS = ("hello", "offer", "beat", "decline", "ask", "peers", "bye")


def make_scenario(nodes: int, rounds: int, seed: int) -> Scenario:
    tables = {
        "nodes": nodes,
        "seed": seed,
        "topology": {"degree": 4},
        "data": {"options": {"hidden": [64]}, "partitioner": "dirichlet", "alpha": 0.5},
        "training": {"local_steps": 10, "batch_size": 16, "learning_rate": 0.1},
        "gossip": {
            "rounds": rounds,
            "quorum": 1.0,
            "deadline_s": 5.0,
            "pause_s": 0.5,
            "wait_for_peers": 4,
            "wait_at_most_s": 120.0,
        },
        "links": {"latency_s": 0.005},
        "devices": {"train_s": 0.02, "aggregate_s": 0.01, "evaluate_s": 0.01},
    }
    return convert(tables)


def run_real(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """The scenario on daemons: fixed ports, so that the drawn graph can be written into their configs."""
    ports = [free_port() for _ in range(scenario.nodes)]
    neighbours: dict[int, list[int]] = defaultdict(list)
    for low, high in draw_edges(scenario.topology, scenario.nodes, scenario.seed, Path.cwd()):
        neighbours[high].append(low)
    gossip = msgspec.to_builtins(scenario.gossip)
    with Cluster() as cluster:
        for index, port in enumerate(ports):
            addresses = [
                f"/ip4/127.0.0.1/tcp/{ports[n]}/p2p/{cluster.nodes[n].peer}" for n in neighbours[index]
            ]
            network = {"listen": [f"/ip4/127.0.0.1/tcp/{port}"], "bootstrap": addresses, "static": True}
            shard = {"index": index, "count": scenario.nodes, "seed": scenario.seed}
            tables = local_settings(
                network={**network, "heartbeat_s": 5.0, "dead_after_s": 20.0},
                learning={**gossip, "rule": list(rule_specs(scenario.rule))},
                training=msgspec.to_builtins(scenario.training),
                task={
                    "name": scenario.data.task,
                    "options": scenario.data.options,
                    "shard": {
                        **shard,
                        "partitioner": scenario.data.partitioner,
                        "alpha": scenario.data.alpha,
                    },
                },
            )
            cluster.add(folder / str(index), tables)
        for node in cluster.nodes:
            node.start()
        for node in cluster.nodes:
            node.wait_for(lambda status: status["phase"] == "done", "the last round", 300)
        return {
            "accuracy_by_round": mean_by_round(cluster.nodes),
            "messages_sent": {kind: sum_of(cluster, sent(kind)) for kind in KINDS},
            "fetches": sum_of(cluster, 'covey_fetches_total{outcome="ok"}'),
        }


def sent(kind: str) -> str:
    return f'covey_messages_total{{direction="out",kind="{kind}"}}'


def sum_of(cluster: Cluster, metric: str) -> int:
    return int(sum(node.metric(metric) for node in cluster.nodes))


def mean_by_round(nodes: list[LocalNode]) -> list[float]:
    by_round: dict[int, list[float]] = defaultdict(list)
    for node in nodes:
        for row in node.rounds():
            by_round[row["round"]].append(row["metrics"]["accuracy"])
    return [statistics.mean(by_round[number]) for number in sorted(by_round)]


def compare(scenario: Scenario, folder: Path) -> dict[str, Any]:
    simulated = msgspec.to_builtins(World(scenario).run())
    real = run_real(scenario, folder)
    last = slice(-5, None)
    return {
        "nodes": scenario.nodes,
        "rounds": scenario.gossip.rounds,
        "real": real,
        "simulated": {name: simulated[name] for name in ("accuracy_by_round", "messages_sent", "fetches")},
        # The last five rounds: one round of one node moves by a point or two on its own.
        "accuracy_difference": abs(
            statistics.mean(real["accuracy_by_round"][last])
            - statistics.mean(simulated["accuracy_by_round"][last])
        ),
        "exchange_ratio": real["fetches"] / simulated["fetches"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="covey-two-worlds-") as folder:
        result = compare(make_scenario(arguments.nodes, arguments.rounds, arguments.seed), Path(folder))
    if arguments.json:
        print(json.dumps(result))
        return
    real, simulated = result["real"], result["simulated"]
    print("round   real   simulated")
    curves = list(zip(real["accuracy_by_round"], simulated["accuracy_by_round"], strict=False))
    for number in range(0, len(curves), max(1, len(curves) // 12)):
        print(f"{number:5}  {curves[number][0]:.3f}   {curves[number][1]:.3f}")
    print(f"{len(curves) - 1:5}  {curves[-1][0]:.3f}   {curves[-1][1]:.3f}")
    print("\nsent         real   simulated")
    for kind in KINDS:
        print(f"{kind:9} {real['messages_sent'][kind]:7} {simulated['messages_sent'].get(kind, 0):11}")
    print(f"{'models':9} {real['fetches']:7} {simulated['fetches']:11}")
    print(f"\naccuracy differs by {result['accuracy_difference']:.4f} (band 0.03)")
    print(f"model exchanges, real over simulated: {result['exchange_ratio']:.3f} (band 0.8 to 1.2)")
    if result["accuracy_difference"] > 0.03 or not 0.8 <= result["exchange_ratio"] <= 1.2:
        sys.exit(1)


if __name__ == "__main__":
    main()
