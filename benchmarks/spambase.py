"""The classic gossip-learning set-up: spambase, one training row a node.

    python benchmarks/spambase.py FOLDER [--rounds 100] [--json]

FOLDER holds UCI spambase as `train.svm` and `test.svm` (libsvm lines, 57 features). Every node holds one row, trains one
step a round, sends its model to one random neighbour and waits for nobody. Prints the time and the memory of both
processes, the one with the events and the one that computes.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from sim.other_process import compute_beside
from sim.scenario_files import convert
from sim.world import World


def run(folder: Path, nodes: int, rounds: int) -> dict[str, Any]:
    options = {
        "path": str(folder / "train.svm"),
        "test_path": str(folder / "test.svm"),
        "features": 57,
        "hidden": [],
    }
    scenario = convert(
        {
            "nodes": nodes,
            "rule": "mean",
            "data": {"task": "libsvm", "options": options, "start": "common"},
            "training": {"local_steps": 1, "batch_size": 1, "learning_rate": 0.1},
            "gossip": {"rounds": rounds, "quorum": 0.0, "fanout": 1, "pause_s": 0.0},
            "topology": {"degree": 4},
            "evaluation": {"share": 0.01},
        }
    )
    began_at = time.perf_counter()
    world = World(scenario, make_computer=compute_beside)
    ready_at = time.perf_counter()
    try:
        result = world.run()
    finally:
        world.plan.close()
    peak_kb = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "nodes": nodes,
        "rounds": rounds,
        "setup_s": round(ready_at - began_at, 1),
        "wall_s": round(time.perf_counter() - ready_at, 1),
        "node_rounds_per_s": round(result.node_rounds / (time.perf_counter() - ready_at), 1),
        "events_peak_mb": round(peak_kb[0] / 1024, 1),
        "computing_peak_mb": round(peak_kb[1] / 1024, 1),
        "accuracy_mean": result.accuracy_mean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4140)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="one object on one line")
    arguments = parser.parse_args()
    found = run(arguments.folder, arguments.nodes, arguments.rounds)
    if arguments.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:20} {value}")


if __name__ == "__main__":
    main()
