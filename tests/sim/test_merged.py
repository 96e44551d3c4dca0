"""The mean of models that nobody has: what it is, and that measuring it leaves no trace."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aggregation.base import Params
from aggregation.statistics import reestimated
from node.settings import TrainingSettings
from node.tasks import Task, mlp
from node.training import evaluate
from sim.engine import CALIBRATION, LocalEngine
from sim.orders import Begin, Train
from sim.scenarios import ComputeSettings

NUM_NODES = 4


def task_of(model: object) -> Task:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3_000, 6, generator=generator) * torch.tensor([1.0, 5, 2, 1, 1, 1]) + 2
    targets = ((inputs[:, 0] - 2) * (inputs[:, 1] - 2) > 0).long()
    return Task("toy", model, (inputs[:2_600], targets[:2_600]), (inputs[2_600:], targets[2_600:]))


def plain() -> nn.Module:
    return mlp(6, [16], 2)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def engine_of(model: object, steps: int = 60) -> tuple[Task, LocalEngine]:
    """Nodes that began from one model and trained apart, each on a corner of the data."""
    task = task_of(model)
    order = torch.argsort(task.train[0][:, 1]).numpy()
    engine = LocalEngine(
        task,
        np.array_split(order, NUM_NODES),
        TrainingSettings(local_steps=steps, batch_size=16, learning_rate=0.05),
        ["mean"],
        0,
        ComputeSettings(),
        [f"n{node}" for node in range(NUM_NODES)],
    )
    engine.reserve(NUM_NODES)
    engine.begin([Begin(row, 7) for row in range(NUM_NODES)])
    engine.train([Train(row, row, row, 0) for row in range(NUM_NODES)])
    return task, engine


def mean_of(models: list[Params]) -> Params:
    def one(tensors: list[Tensor]) -> Tensor:
        if not tensors[0].is_floating_point():
            return tensors[0]
        return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)

    return {name: one([model[name] for model in models]) for name in models[0]}


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1], [2]])
def test_it_is_the_mean_of_the_models(rows: list[int]) -> None:
    task, engine = engine_of(plain)
    assert engine.merged(rows) == evaluate(task, mean_of([engine.params(row) for row in rows]))


def test_the_order_of_the_models_does_not_matter_and_equal_ones_are_their_mean() -> None:
    task, engine = engine_of(plain)
    assert engine.merged([0, 1, 2, 3]) == pytest.approx(engine.merged([2, 0, 3, 1]), abs=1e-6)
    assert engine.merged([1, 1, 1]) == evaluate(task, engine.params(1))
    assert engine.merged([]) == {}


def test_statistics_of_batch_norm_are_measured_anew_on_samples_of_all_nodes() -> None:
    task, engine = engine_of(normed)
    averaged = mean_of([engine.params(row) for row in range(NUM_NODES)])
    found = engine.merged(range(NUM_NODES))
    measured = reestimated(engine._model, averaged, engine._calibration)
    assert found == evaluate(task, measured)
    assert found != evaluate(task, averaged)
    assert torch.equal(measured["0.weight"], averaged["0.weight"])
    assert len(engine._calibration) == CALIBRATION
    share = (engine._calibration[:, 1] > task.train[0][:, 1].median()).float().mean()
    assert share == pytest.approx(0.5, abs=0.02), "of all corners"
    assert found == engine.merged(range(NUM_NODES)), "always the same"


@pytest.mark.parametrize("model", [plain, normed])
def test_measuring_leaves_no_trace(model: object) -> None:
    _, engine = engine_of(model)
    rows = [engine.params(row) for row in range(NUM_NODES)]
    generator = torch.get_rng_state()
    momenta = copy.deepcopy([getattr(module, "momentum", None) for module in engine._model.modules()])
    engine.merged(range(NUM_NODES))
    for row, before in enumerate(rows):
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.params(row).items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [getattr(module, "momentum", None) for module in engine._model.modules()] == momenta
    _, untouched = engine_of(model)
    for one in (engine, untouched):
        one.train([Train(row, row, row, 1) for row in range(NUM_NODES)])
    for row in range(NUM_NODES):
        other = untouched.params(row)
        assert all(torch.equal(tensor, other[name]) for name, tensor in engine.params(row).items())


def test_what_cannot_be_measured_is_empty() -> None:
    def metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
        raise ValueError("no")

    _, engine = engine_of(plain, steps=1)
    engine._task = Task("toy", plain, engine._task.train, engine._task.test, metrics=metrics)
    assert engine.merged([0, 1]) == {}
