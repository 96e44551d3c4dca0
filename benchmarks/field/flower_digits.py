"""Flower's simulation on the digits: FedAvg over all clients. Runs in Flower's environment; see run.py."""

import logging
import os
import time
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

# Ray's workers inherit these. Both must be set before either is imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch
from digits import (
    BATCH_SIZE,
    LEARNING_RATE,
    SAMPLES_PER_NODE,
    Samples,
    accuracy,
    arguments,
    draw_samples,
    load,
    mlp,
    report,
    run_for,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

NUM_ACTORS = 2


# --- the client: in Ray's workers -----------------------------------------------------------------------
@cache
def model() -> nn.Sequential:
    """One a process: every round overwrites all of it."""
    torch.set_num_threads(1)
    return mlp()


@cache
def samples(data: str, nodes: int, seed: int) -> list[Samples]:
    """Every client's training samples, read once a process."""
    (x, y), _ = load(data)
    return [(x[indices], y[indices]) for indices in draw_samples(len(y), nodes, seed)]


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    asked = message.content["config"]
    x, y = samples(asked["data"], asked["nodes"], asked["seed"])[int(context.node_config["partition-id"])]
    network = model()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    network.train()
    optimiser = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    for batch in torch.randperm(SAMPLES_PER_NODE).split(BATCH_SIZE):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
        optimiser.step()
    answer = {
        "arrays": ArrayRecord(network.state_dict()),
        "metrics": MetricRecord({"num-examples": len(y)}),
    }
    return Message(content=RecordDict(answer), reply_to=message)


# --- the server: in this process ------------------------------------------------------------------------
class CountingFedAvg(FedAvg):
    """Knows how many clients' answers were used."""

    num_used = 0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        self.num_used += sum(not reply.has_error() for reply in replies)
        return super().aggregate_train(server_round, replies)


def main() -> None:
    asked = arguments()
    torch.manual_seed(asked.seed)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    server = ServerApp()

    @server.main()
    def measure(grid: Grid, context: Context) -> None:
        network, num_used = mlp(), 0
        settings = {"data": str(Path(asked.data).resolve()), "nodes": asked.nodes, "seed": asked.seed}

        def run(rounds: int) -> float:
            """Go on from where the last run ended."""
            nonlocal num_used
            strategy = CountingFedAvg(fraction_evaluate=0.0, min_available_nodes=asked.nodes)
            arrays, config = ArrayRecord(network.state_dict()), ConfigRecord(settings)
            began_at = time.perf_counter()
            result = strategy.start(grid, arrays, rounds, train_config=config)
            wall_s = time.perf_counter() - began_at
            network.load_state_dict(result.arrays.to_torch_state_dict())
            num_used = strategy.num_used
            return wall_s

        rounds, wall_s = run_for(asked.seconds, run)
        report(
            "flower",
            version("flwr"),
            nodes=asked.nodes,
            rounds=rounds,
            node_rounds=num_used,
            wall_s=wall_s,
            score=accuracy(network, load(asked.data)[1]),
            ray=version("ray"),
        )

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=asked.nodes,
        backend_config={
            "init_args": {"num_cpus": NUM_ACTORS},
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
        },
    )


if __name__ == "__main__":
    # Ray sends what is in `__main__` along with every message, and caches would be lost; a module it imports.
    import flower_digits

    flower_digits.main()
