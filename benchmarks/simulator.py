"""How fast the simulator is: against bare training loops without any protocol, and its kernel by itself.

    python benchmarks/simulator.py --json

Every figure with a ratio is measured beside what it is compared with, in turns, and is a median: machines are noisy.
Every part runs in a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
NODE_COUNTS = (100, 300, 1000)
SAMPLES, BATCH, STEPS, LEARNING_RATE = 16, 8, 2, 0.1
"""One local epoch of batch 8 over a node's 16 samples."""

PUSH_GOSSIP = {"quorum": 0.0, "fanout": 1, "pause_s": 0.0}


def scenario(nodes: int, rounds: int, **tables: Any) -> Any:
    """Push gossip to one peer a round on a random graph; 1 % of the nodes evaluate."""
    from sim.scenario_files import convert

    return convert(
        {
            "nodes": nodes,
            "rule": "mean",
            "gossip": {**PUSH_GOSSIP, "rounds": rounds},
            "topology": {"degree": 4},
            "evaluation": {"share": 0.01, "consensus": False},
            **tables,
        }
    )


def digits(nodes: int, rounds: int, **tables: Any) -> Any:
    return scenario(
        nodes,
        rounds,
        data={"options": {"hidden": [32]}, "samples_per_node": SAMPLES, "start": "common"},
        training={"local_steps": STEPS, "batch_size": BATCH, "learning_rate": LEARNING_RATE},
        **tables,
    )


def simulate(chosen: Any) -> tuple[float, Any]:
    """Seconds from the first event to the computed result, and the result. Reading the data is not in them."""
    from sim.other_process import compute_beside
    from sim.world import World

    world = World(chosen, HERE.parent, make_computer=compute_beside)
    began_at = time.perf_counter()
    try:
        result = world.run()
        return time.perf_counter() - began_at, result
    finally:
        world.plan.close()


# --- what it is compared with ---------------------------------------------------------------------------
def bare_vmap(task: Any, nodes: int, rounds: int, steps: int, batch: int, chunk: int | None) -> float:
    """Seconds of SGD on stacked models: no protocol, no merging, no evaluation."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap

    from node.tasks import build_model

    model = build_model(task)
    params, _ = stack_module_state([build_model(task, seed) for seed in range(nodes)])
    inputs, targets = task.train
    generator = torch.Generator().manual_seed(0)

    def loss(weights: Any, x: Any, y: Any) -> Any:
        return task.loss(functional_call(model, weights, (x,)), y)

    gradients = vmap(grad(loss), chunk_size=chunk)
    chosen = torch.randint(0, len(inputs), (nodes, steps, batch), generator=generator)
    began_at = time.perf_counter()
    for _ in range(rounds):
        for step in range(steps):
            found = gradients(params, inputs[chosen[:, step]], targets[chosen[:, step]])
            params = {name: value - LEARNING_RATE * found[name] for name, value in params.items()}
    return time.perf_counter() - began_at


def bare_loop(task: Any, nodes: int, rounds: int, steps: int, batch: int) -> float:
    """Seconds of torch's own SGD, one node after another: no protocol, no merging, no evaluation."""
    import torch

    from node.tasks import build_model

    models = [build_model(task, seed) for seed in range(nodes)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) for model in models]
    inputs, targets = task.train
    chosen = torch.randint(0, len(inputs), (nodes, steps, batch), generator=torch.Generator().manual_seed(0))
    began_at = time.perf_counter()
    for _ in range(rounds):
        for node, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for step in range(steps):
                batch_of = chosen[node, step]
                optimizer.zero_grad()
                task.loss(model(inputs[batch_of]), targets[batch_of]).backward()
                optimizer.step()
    return time.perf_counter() - began_at


def in_turns(repeat: int, **measures: Callable[[], float]) -> dict[str, float]:
    """The median of every measure, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeat):
        for name, measure in measures.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


# --- the parts ------------------------------------------------------------------------------------------
def measure_digits(repeat: int, threads: int | None) -> dict[str, Any]:
    from node.task_loading import make_task

    task = make_task("digits", {"hidden": [32]}, HERE.parent)
    compute = {"compute": {"threads": threads}} if threads else {}
    rates: dict[str, float] = {}
    rounds_of = {100: 60, 300: 30, 1000: 20}

    def ours(nodes: int) -> float:
        seconds, result = simulate(digits(nodes, rounds_of[nodes], **compute))
        return float(result.node_rounds / seconds)

    def vmapped() -> float:
        return 1000 * 10 / bare_vmap(task, 1000, 10, STEPS, BATCH, None)

    def vmapped_alone() -> float:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return vmapped()
        finally:
            torch.set_num_threads(before)

    def looped() -> float:
        return 100 * 5 / bare_loop(task, 100, 5, STEPS, BATCH)

    simulate(digits(100, 5, **compute))  # warm
    vmapped()
    for nodes in NODE_COUNTS[:-1]:
        rates[str(nodes)] = round(statistics.median(ours(nodes) for _ in range(repeat)), 1)
    medians = in_turns(
        repeat, ours=lambda: ours(1000), vmapped=vmapped, vmapped_alone=vmapped_alone, looped=looped
    )
    rates["1000"] = round(medians["ours"], 1)
    return {
        "node_rounds_per_s": rates,
        "bare_vmap_per_s": round(medians["vmapped"], 1),
        "bare_vmap_one_thread_per_s": round(medians["vmapped_alone"], 1),
        "bare_loop_per_s": round(medians["looped"], 1),
        "ratio_to_bare_vmap": round(medians["ours"] / medians["vmapped"], 3),
        "ratio_to_bare_vmap_one_thread": round(medians["ours"] / medians["vmapped_alone"], 3),
        "ratio_to_bare_loop": round(medians["ours"] / medians["looped"], 2),
    }


def measure_large(repeat: int, threads: int | None, name: str, key: str, nodes: int) -> dict[str, Any]:
    from node.task_loading import make_task

    reference = f"{HERE.with_name('simulator_tasks.py')}:{name}"
    task = make_task(reference, {}, HERE.parent)
    steps, batch, rounds = 5, 8, 8
    compute = {"compute": {"threads": threads}} if threads else {}

    def ours() -> float:
        chosen = scenario(
            nodes,
            rounds,
            data={"task": reference, "start": "common"},
            training={"local_steps": steps, "batch_size": batch, "learning_rate": 0.05},
            **compute,
        )
        seconds, result = simulate(chosen)
        return float(result.node_rounds / seconds)

    def rate(seconds: float) -> float:
        return nodes * rounds / seconds

    medians = in_turns(
        repeat,
        ours=ours,
        whole=lambda: rate(bare_vmap(task, nodes, rounds, steps, batch, None)),
        tiled=lambda: rate(bare_vmap(task, nodes, rounds, steps, batch, 32)),
        looped=lambda: rate(bare_loop(task, nodes, rounds, steps, batch)),
    )
    best = max(medians["whole"], medians["tiled"], medians["looped"])
    return {
        f"{key}_ratio": round(medians["ours"] / best, 3),
        f"{key}_per_s": {name: round(value, 1) for name, value in medians.items()},
    }


def measure_kernel(repeat: int) -> dict[str, Any]:
    """Events of real cores, without learning: 300 nodes, push gossip."""
    rates = []
    for _ in range(repeat):
        seconds, result = simulate(scenario(300, 100, dry_run=True))
        rates.append(result.events / seconds)
    return {"events_per_s": round(statistics.median(rates), 1)}


def measure_dry(nodes: int, rounds: int) -> dict[str, Any]:
    """Nodes that come and go; a fifth of them is away at any time."""
    churn = {"model": "exponential", "mean_online_s": 40.0, "mean_offline_s": 10.0, "until_s": 60.0}
    seconds, result = simulate(scenario(nodes, rounds, dry_run=True, churn=churn))
    return {
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "node_rounds": result.node_rounds,
        "events": result.events,
        "finished": result.finished,
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "digits": lambda a: measure_digits(a.repeat, a.threads),
    "mlp784": lambda a: measure_large(a.repeat, a.threads, "mlp784", "mlp784", 100),
    "cnn": lambda a: measure_large(a.repeat, a.threads, "lenet", "cnn", 40),
    "kernel": lambda a: measure_kernel(a.repeat),
    "dry_1000": lambda a: measure_dry(1000, 100),
    "dry_10000": lambda a: measure_dry(10_000, 100),
}


def run_part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, so that its peak memory is its own too."""
    command = [sys.executable, str(HERE), "--part", name, "--repeat", str(arguments.repeat)]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    print(f"measuring {name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--repeat", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--threads", type=int, help="of torch, for all sides; left out, its own choice")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    found: dict[str, Any] = {}
    dry: dict[str, dict[str, Any]] = {}
    for name in arguments.only.split(","):
        part = run_part(name, arguments)
        if name.startswith("dry"):
            dry[name] = part
        else:
            found |= part
    if "dry_10000" in dry:
        found["dry_run_10000_s"] = round(dry["dry_10000"]["seconds"], 1)
        found["dry_run_10000_peak_mb"] = round(dry["dry_10000"]["peak_mb"], 1)
        found["dry_run_10000_finished"] = dry["dry_10000"]["finished"]
    if len(dry) == 2:
        cost = {name: part["seconds"] / part["node_rounds"] for name, part in dry.items()}
        found["dry_cost_ratio_10000_to_1000"] = round(cost["dry_10000"] / cost["dry_1000"], 3)
    if arguments.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:32} {value}")


if __name__ == "__main__":
    main()
