"""The task, and one data set dealt among many nodes."""

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from node.settings import Partition, Shard
from node.tasks import (
    Task,
    classification_metrics,
    initial_params,
    mlp,
    partition_indices,
    partition_task,
    regression_metrics,
    shard_task,
)
from protocols.errors import ConfigError


# --- the task -------------------------------------------------------------------------------------------
def test_accuracy_is_the_share_of_right_classes() -> None:
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert classification_metrics(outputs, torch.tensor([1, 0, 0, 0])) == {"accuracy": 0.75}


def test_r2_of_a_constant_target_is_one_only_when_it_is_met() -> None:
    ones = torch.ones(3, 1)
    assert regression_metrics(ones, ones) == {"rmse": 0.0, "r2": 1.0}
    assert regression_metrics(2 * ones, ones) == {"rmse": 1.0, "r2": 0.0}


def test_initial_params_depend_on_the_seed_alone() -> None:
    task = toy()
    before = torch.get_rng_state()
    first, again, other = (initial_params(task, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not any(tensor.requires_grad for tensor in first.values())


def test_the_mlp_starts_xavier_uniform_with_zero_biases() -> None:
    model = mlp(100, [50], 10)
    weight, bias = model.state_dict()["0.weight"], model.state_dict()["0.bias"]
    bound = (6 / 150) ** 0.5
    assert 0.98 * bound < weight.abs().max().item() <= bound
    assert not bias.any()
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in mlp(4, [], 2)] == [nn.Linear]


def toy(targets: Tensor | None = None) -> Task:
    inputs = torch.arange(60.0).reshape(-1, 1)
    targets = torch.arange(60) % 4 if targets is None else targets
    return Task("toy", lambda: mlp(1, [3], 4), (inputs, targets), (inputs[:6], targets[:6]))


# --- one data set among many nodes ----------------------------------------------------------------------
@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "shard"])
def test_a_shard_is_its_part_of_the_whole_deal(partitioner: Any) -> None:
    task = toy()
    deal = partition_task(task, Partition(count=5, partitioner=partitioner, seed=3))
    samples = torch.cat([part.train[0] for part in deal]).flatten()
    assert torch.equal(samples.sort().values, task.train[0].flatten())
    for index, part in enumerate(deal):
        own = shard_task(task, Shard(index=index, count=5, partitioner=partitioner, seed=3))
        assert torch.equal(own.train[0], part.train[0])
        assert torch.equal(own.train[1], own.train[0].flatten().long() % 4)
        assert part.test[0] is task.test[0]


def test_the_shard_seed_decides_the_deal() -> None:
    one, other = (shard_task(toy(), Shard(index=0, count=4, seed=seed)).train[0] for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("task", "shard", "message"),
    [
        (toy(), Shard(index=5, count=5), "task.shard.index: 5 of 5 (allowed: 0 to 4)"),
        (
            toy(),
            Shard(index=0, count=61),
            "task.shard: num_partitions: 61 (allowed: 1 to 60 for this data)",
        ),
        (
            toy(torch.arange(60.0)),
            Shard(index=0, count=3, partitioner="dirichlet"),
            "task.shard.partitioner: `dirichlet` needs one integer class a sample (allowed: iid, shard)",
        ),
        (
            toy(),
            Shard(index=0, count=3, samples_per_node=61),
            "task.shard.samples_per_node: 61 of 60 samples (allowed: 1 to 60)",
        ),
        (
            toy(),
            Shard(index=0, count=3, samples_per_node=6, partitioner="shard"),
            "task.shard.samples_per_node: set beside `shard` (allowed: iid)",
        ),
    ],
)
def test_a_deal_that_cannot_be_is_refused(task: Task, shard: Shard, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shard_task(task, shard)
    assert str(caught.value) == message


def test_nodes_may_draw_their_samples_each_by_itself() -> None:
    task = toy()
    deal = Partition(count=100, samples_per_node=7, seed=3)
    parts = partition_indices(task, deal)
    assert [len(set(part.tolist())) for part in parts] == [7] * 100
    assert all((part[:-1] < part[1:]).all() for part in parts)
    assert len({tuple(part) for part in parts}) > 95
    assert {int(sample) for part in parts for sample in part} == set(range(60))
    fewer = partition_indices(task, msgspec.structs.replace(deal, count=10))
    assert all((one == other).all() for one, other in zip(parts, fewer, strict=False)), (
        "a draw is a node's own"
    )


@pytest.mark.parametrize(
    "options", [{}, {"partitioner": "shard"}, {"partitioner": "dirichlet"}, {"samples_per_node": 9}], ids=str
)
def test_a_daemon_and_the_simulator_give_a_node_the_same_samples(options: dict[str, Any]) -> None:
    task = toy()
    parts = partition_indices(task, Partition(count=4, seed=2, **options))
    for index, part in enumerate(parts):
        own = shard_task(task, Shard(index=index, count=4, seed=2, **options))
        assert own.train[0].flatten().tolist() == part.tolist()


def test_regression_targets_can_be_dealt_in_sorted_shards() -> None:
    parts = partition_task(toy(torch.arange(60.0).reshape(-1, 1)), Partition(count=3, partitioner="shard"))
    assert [len(part.train[0]) for part in parts] == [20, 20, 20]


def test_a_shard_of_nonsense_is_refused_when_it_is_read() -> None:
    for wrong in ({"index": -1}, {"count": 0}, {"alpha": 0}, {"partitioner": "random"}, {"shards": 2}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"index": 0, "count": 2} | wrong, Shard)
