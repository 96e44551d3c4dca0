"""What a network loses that learns by scalars, against one machine with the same number of them.

    python benchmarks/scalars_sim.py [--json] [--seeds 1] [--set nodes=100]

Runs the built-in scenario `scalars`: 200 nodes, 30 % of them away at any time, 10 % of all messages lost. Then the same
number of scalars on one machine that holds all the data, by plain SPSA without codes, in two ways: as many in
each of as many rounds, their mean taken, and one after the other. Both have their learning rate chosen from a grid by the
test accuracy, which favours them. The network's is that of the scenario.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from aggregation.perturbation import trained
from node.task_loading import make_task
from node.tasks import Task, build_model
from sim import scenario_files
from sim.scenarios import Scenario
from sim.world import World

MEAN_RATES = (0.3, 0.5, 0.8, 1.2, 2.0)
SEQUENTIAL_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
TILE = 400
BAND = 0.015
"""Accuracy that the network may be below the better of the two."""


def run_network(scenario: Scenario, base: Path) -> dict[str, Any]:
    """The scenario, and what it came to."""
    began_at = time.perf_counter()
    result = World(scenario, base).run()
    figures = result.scalars
    assert figures is not None
    assert result.accuracy_mean is not None
    repair = figures.compared_bytes + figures.served_bytes
    return {
        "wall_s": time.perf_counter() - began_at,
        "virtual_s": result.virtual_s,
        "events": result.events,
        "finished": result.finished,
        "accuracy": result.accuracy_mean,
        "states": figures.num_states,
        "log_records": figures.log_records,
        "log_bytes": figures.log_bytes,
        "held_records": figures.held_records,
        "flooded_bytes": figures.flooded_bytes,
        "repair_bytes": repair,
        "repair_share": repair / (repair + figures.flooded_bytes),
        "bytes_per_node": result.bytes_sent / result.nodes,
        "caught_up": figures.caught_up,
        "catch_up_median_s": figures.catch_up_median_s,
        "catch_up_max_s": figures.catch_up_max_s,
        "failed_work": result.failed_work,
    }


class Alone:
    """SPSA on one machine: several runs side by side, each with a learning rate of its own."""

    def __init__(self, task: Task, scenario: Scenario, rates: tuple[float, ...]) -> None:
        self.task, self.epsilon = task, scenario.scalars.epsilon
        self.batch = min(scenario.training.batch_size, len(task.train[0]))
        self.model = build_model(task, scenario.seed).eval()
        params = trained(self.model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
        self.sizes = [tensor.numel() for tensor in params.values()]
        flat = torch.cat([tensor.reshape(-1) for tensor in params.values()])
        self.states = flat.repeat(len(rates), 1)
        self.rates = torch.tensor(rates)
        self.rng = torch.Generator().manual_seed(scenario.seed)
        self.losses = vmap(self._loss, in_dims=(0, 0, 0))

    def _loss(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss(functional_call(self.model, params, (inputs,)), targets)

    def _params(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, self.sizes, dim=1)
        return {
            name: part.view(-1, *shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def slopes(self, state: Tensor, signs: Tensor, batch: Tensor) -> Tensor:
        """[scalars]; state: [scalars or 1, entries], signs: [scalars, entries], batch: [scalars, samples]."""
        inputs, targets = (part[batch] for part in self.task.train)
        sides = [
            self.losses(self._params(state + side * self.epsilon * signs), inputs, targets)
            for side in (1, -1)
        ]
        return (sides[0] - sides[1]) / (2 * self.epsilon)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Directions, and the samples of each scalar."""
        signs = 2.0 * torch.randint(0, 2, (count, sum(self.sizes)), generator=self.rng) - 1
        batch = torch.randint(0, len(self.task.train[0]), (count, self.batch), generator=self.rng)
        return signs, batch

    @torch.no_grad()
    def rounds(self, num_rounds: int, num_scalars: int, linear: bool) -> None:
        """Each a step along the mean of so many."""
        for number in range(num_rounds):
            share = 1 - number / num_rounds if linear else 1.0
            steps = torch.zeros_like(self.states)
            for start in range(0, num_scalars, TILE):
                signs, batch = self.draw(min(TILE, num_scalars - start))
                for i, state in enumerate(self.states):
                    steps[i] += self.slopes(state.unsqueeze(0), signs, batch) @ signs
            self.states -= share * self.rates[:, None] / num_scalars * steps

    @torch.no_grad()
    def in_turn(self, num_scalars: int, linear: bool) -> None:
        """Each a step of its own; all runs take the same direction and the same samples."""
        for start in range(0, num_scalars, TILE):
            all_signs, all_batches = self.draw(min(TILE, num_scalars - start))
            for number, (signs, batch) in enumerate(zip(all_signs, all_batches, strict=True), start):
                share = 1 - number / num_scalars if linear else 1.0
                size = (len(self.states), -1)
                slopes = self.slopes(self.states, signs.expand(*size), batch.expand(*size))
                self.states -= share * (self.rates * slopes)[:, None] * signs

    @torch.no_grad()
    def best(self) -> tuple[float, float]:
        """The accuracy of the best run, and its learning rate."""
        inputs, targets = self.task.test
        found = []
        for state, rate in zip(self.states, self.rates.tolist(), strict=True):
            params = {name: tensor[0] for name, tensor in self._params(state.unsqueeze(0)).items()}
            outputs = functional_call(self.model, params, (inputs,))
            found.append(((outputs.argmax(-1) == targets).float().mean().item(), rate))
        return max(found)


def run_alone(scenario: Scenario, base: Path, log_records: int) -> dict[str, Any]:
    """As many scalars as counted in the network."""
    task = make_task(scenario.data.task, scenario.data.options, base)
    rounds, linear = scenario.scalars.rounds, scenario.scalars.schedule == "linear"
    total = log_records * scenario.scalars.samples
    mean = Alone(task, scenario, MEAN_RATES)
    mean.rounds(rounds, round(total / rounds), linear)
    in_turn = Alone(task, scenario, SEQUENTIAL_RATES)
    in_turn.in_turn(total, linear)
    (mean_accuracy, mean_rate), (accuracy, rate) = mean.best(), in_turn.best()
    return {
        "scalars": total,
        "mean_accuracy": mean_accuracy,
        "mean_rate": mean_rate,
        "sequential_accuracy": accuracy,
        "sequential_rate": rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, default=1, help="runs, with the seeds from 0 on")
    parser.add_argument("--set", action="append", default=[], help="a setting of the scenario, as nodes=100")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        scenario, base = scenario_files.load("scalars", [*arguments.set, f"seed={seed}"])
        scenario_files.validate(scenario, base)
        network = run_network(scenario, base)
        alone = run_alone(scenario, base, network["log_records"])
        runs.append({"seed": seed, "nodes": scenario.nodes, "network": network, "alone": alone})
    accuracy = statistics.mean(run["network"]["accuracy"] for run in runs)
    mean = statistics.mean(run["alone"]["mean_accuracy"] for run in runs)
    sequential = statistics.mean(run["alone"]["sequential_accuracy"] for run in runs)
    result: dict[str, Any] = {
        "runs": runs,
        "points_below_mean": 100 * (mean - accuracy),
        "points_below_sequential": 100 * (sequential - accuracy),
        "one_state": all(run["network"]["states"] == 1 for run in runs),
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        _print(runs, result)
    if max(result["points_below_mean"], 0.0) > 100 * BAND or not result["one_state"]:
        sys.exit(1)


def _print(runs: list[dict[str, Any]], result: dict[str, Any]) -> None:
    for run in runs:
        network, alone = run["network"], run["alone"]
        print(
            f"seed {run['seed']}: {run['nodes']} nodes, {network['finished']} finished, {network['wall_s']:.0f} s here"
        )
        print(
            f"  accuracy {network['accuracy']:.3f}; alone {alone['mean_accuracy']:.3f} in rounds (rate "
            f"{alone['mean_rate']:g}), {alone['sequential_accuracy']:.3f} in turn (rate {alone['sequential_rate']:g})"
        )
        print(
            f"  {network['states']} final state; log {network['log_records']:,} records, "
            f"{network['log_bytes'] / 1e6:.2f} MB; repair {network['repair_bytes'] / 1e6:.1f} MB, "
            f"{network['repair_share']:.1%} of what carried records"
        )
        print(
            f"  {network['caught_up']} late starts caught up within {network['catch_up_median_s']:.1f} s in the median, "
            f"{network['catch_up_max_s']:.1f} s at most"
        )
    print(
        f"below one machine by {result['points_below_mean']:.2f} points in rounds (band {100 * BAND:g}), "
        f"{result['points_below_sequential']:.2f} in turn"
    )


if __name__ == "__main__":
    main()
