"""What all the measured systems have in common: the task, its settings, and how a run is timed and reported.

Belongs here: only what torch and numpy can say, for every system imports this from its own environment.
"""

import argparse
import json
import time
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HIDDEN = 32
SAMPLES_PER_NODE = 16
BATCH_SIZE = 8
STEPS_PER_ROUND = SAMPLES_PER_NODE // BATCH_SIZE
LEARNING_RATE = 0.1
DEGREE = 4
"""Links of each node, where a system has links."""
EVALUATED_SHARE = 0.01
"""Of the nodes, each round, where a system evaluates nodes."""

Samples = tuple[Tensor, Tensor]
"""Images [samples, 64], classes [samples]."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="digits.npz, as run.py writes it")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="least length of the run that counts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(path: str) -> tuple[Samples, Samples]:
    """Training and test samples."""
    with np.load(path) as arrays:
        x, y, test_x, test_y = (torch.from_numpy(arrays[k]) for k in ("x", "y", "test_x", "test_y"))
    return (x, y), (test_x, test_y)


def draw_samples(num_samples: int, nodes: int, seed: int) -> list[list[int]]:
    """Every node's own draw of distinct training samples; nodes may share some."""
    rng = np.random.default_rng(seed)
    return [rng.choice(num_samples, SAMPLES_PER_NODE, replace=False).tolist() for _ in range(nodes)]


def mlp() -> nn.Sequential:
    """64-32-10 with ReLU, freshly drawn."""
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    draw_weights(model)
    return model


def draw_weights(model: nn.Module) -> None:
    """Xavier-uniform weights, zero biases, in place: an optimiser may already hold them."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def accuracy(model: nn.Module, test: Samples) -> float:
    """0 to 1. Leaves the model in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        return (model(test[0]).argmax(-1) == test[1]).float().mean().item()


def timed(run: Callable[[], object]) -> float:
    """Wall time of a call, in seconds."""
    began_at = time.perf_counter()
    run()
    return time.perf_counter() - began_at


def run_for(seconds: float, run: Callable[[int], float]) -> tuple[int, float]:
    """Run longer and longer until one run lasts `seconds`: its rounds and its wall time. Those before warm up.

    run: takes a number of rounds and returns the wall time of what counts of them.
    """
    rounds = 1
    run(rounds)
    while (wall_s := run(rounds)) < seconds:
        rounds = ceil(rounds * min(10.0, max(1.2, 1.1 * seconds / wall_s)))
    return rounds, wall_s


def report(
    system: str,
    version: str,
    *,
    nodes: int,
    rounds: int,
    node_rounds: int,
    wall_s: float,
    score: float | None,
    **more: Any,
) -> None:
    """Print the one JSON line that run.py reads, whatever the system itself prints around it.

    node_rounds: counted, not reckoned: nodes x rounds where every node did every round.
    """
    figures = {
        "system": system,
        "version": version,
        "torch": torch.__version__,
        "nodes": nodes,
        "rounds": rounds,
        "node_rounds": node_rounds,
        "wall_s": round(wall_s, 3),
        "node_rounds_per_s": round(node_rounds / wall_s, 2),
        "accuracy": None if score is None else round(score, 4),
        **more,
    }
    print("\n" + json.dumps(figures), flush=True)
