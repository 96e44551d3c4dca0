"""What a node learns: a model, its data, a loss and metrics.

Belongs here: the Task and what is made from one: a fresh model, its first parameters, the part of its data that one
node gets. How a task is trained is in `training.py`, how indices are dealt in `partition.py`, the tasks that come with
covey in `builtin_tasks.py`, finding a task by its name in `task_loading.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aggregation.base import Params
from node.partition import PARTITIONERS, Indices
from node.randomness import stream, torch_seeded
from node.settings import Partition, Shard
from protocols.errors import ConfigError


# --- the task -------------------------------------------------------------------------------------------
def classification_metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """outputs: scores [samples, classes]; targets: classes [samples]. {"accuracy": 0 to 1}."""
    return {"accuracy": (outputs.argmax(-1) == targets).float().mean().item()}


def regression_metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Of one shape. {"rmse": in the target's unit, "r2": 1 is perfect, 0 no better than the mean}."""
    squared_error = (outputs - targets).square()
    residual = squared_error.sum().item()
    total = (targets - targets.mean()).square().sum().item()
    constant = 0.0 if residual else 1.0  # what scikit-learn's r2_score says of a target that never varies
    r2 = 1.0 - residual / total if total else constant
    return {"rmse": squared_error.mean().sqrt().item(), "r2": r2}


@dataclass(frozen=True, eq=False)
class Task:
    """Everything a node needs to learn, in plain PyTorch. At most twenty lines make one's own.

    name: 1 to 64 characters; nodes exchange models only where name and tensors are the same.
    model: makes a fresh module.
    train, test: (inputs [samples, ...], targets [samples, ...]), held in memory. A node trains on its own
        `train`; `test` should be the same on every node if their metrics are to be compared.
    loss: (outputs, targets) -> a scalar to be made small.
    metrics: (outputs, targets) over the whole test set -> numbers by name, the one that counts first.
    probe: inputs that every node has, without targets, on which merge rules may compare networks (`probe = "shared"`).
    """

    name: str
    model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metrics: Callable[[Tensor, Tensor], dict[str, float]] = classification_metrics
    probe: Tensor | None = None


def build_model(task: Task, seed: int = 0) -> nn.Module:
    """A fresh module, its start drawn from `seed`; torch's global generator stays as it was."""
    with torch_seeded(seed):
        return task.model()


def initial_params(task: Task, seed: int) -> Params:
    """The parameters and buffers of a fresh model: equal for equal seeds."""
    return {name: tensor.detach().clone() for name, tensor in build_model(task, seed).state_dict().items()}


# --- models ---------------------------------------------------------------------------------------------
def mlp(num_inputs: int, hidden: Sequence[int], num_outputs: int) -> nn.Sequential:
    """[batch, num_inputs] -> [batch, num_outputs] with ReLU between; Xavier-uniform weights, zero biases."""
    sizes = [num_inputs, *hidden, num_outputs]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# --- one data set among many nodes ----------------------------------------------------------------------
def partition_indices(task: Task, partition: Partition) -> list[Indices]:
    """Which training samples each node has: one sorted index array a node, none of them empty.

    Raises ConfigError where the data cannot be dealt so.
    """
    if partition.samples_per_node is not None:
        return _drawn(len(task.train[1]), partition, partition.samples_per_node)
    return _dealt(task, partition)


def partition_task(task: Task, partition: Partition) -> list[Task]:
    """The task of every node: its own part of `train`, the same `test` (shared, not copied).

    Raises ConfigError where the data cannot be dealt so.
    """
    return [restricted(task, indices) for indices in partition_indices(task, partition)]


def shard_task(task: Task, shard: Shard) -> Task:
    """The task of one node: `partition_task(task, shard)[shard.index]` without the others' tensors."""
    if shard.index >= shard.count:
        raise ConfigError("task.shard.index", f"{shard.index} of {shard.count}", [f"0 to {shard.count - 1}"])
    return restricted(task, partition_indices(task, shard)[shard.index])


def restricted(task: Task, indices: Indices) -> Task:
    """The task with these of its training samples alone."""
    inputs, targets = task.train
    chosen = torch.from_numpy(indices).to(inputs.device)
    return replace(task, train=(inputs[chosen], targets[chosen]))


def _drawn(num_samples: int, partition: Partition, size: int) -> list[Indices]:
    """Each node's own draw, from a stream of its own: it stays the same when nodes are added."""
    if partition.partitioner != "iid":
        raise ConfigError("task.shard.samples_per_node", f"set beside `{partition.partitioner}`", ["iid"])
    if size > num_samples:
        raise ConfigError(
            "task.shard.samples_per_node", f"{size} of {num_samples} samples", [f"1 to {num_samples}"]
        )
    draws = (stream(partition.seed, "partition", "draw", node) for node in range(partition.count))
    return [np.sort(rng.choice(num_samples, size=size, replace=False)) for rng in draws]


def _dealt(task: Task, partition: Partition) -> list[Indices]:
    num_samples = len(task.train[1])
    targets = task.train[1].detach().cpu().reshape(num_samples, -1).numpy()
    options: dict[str, dict[str, float]] = {
        "iid": {},
        "dirichlet": {"alpha": partition.alpha},
        "shard": {"shards_per_node": partition.shards_per_node},
        "class": {},
    }
    has_classes = targets.dtype.kind in "iub" and targets.shape[1] == 1
    if partition.partitioner in ("dirichlet", "class") and not has_classes:
        problem = f"`{partition.partitioner}` needs one integer class a sample"
        raise ConfigError("task.shard.partitioner", problem, ["iid", "shard"])
    rng = stream(partition.seed, "partition", partition.partitioner, partition.count)
    try:
        return PARTITIONERS[partition.partitioner](
            targets[:, 0], partition.count, rng, **options[partition.partitioner]
        )
    except ValueError as error:
        raise ConfigError("task.shard", str(error)) from error
