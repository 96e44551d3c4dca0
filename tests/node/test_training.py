"""Training is a pure function, and the same one as with torch.optim."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aggregation.base import Params
from node.randomness import RoundStreams
from node.settings import TrainingSettings
from node.task_loading import make_task
from node.tasks import Task, build_model, initial_params, regression_metrics
from node.training import batch_indices, evaluate, train
from protocols.errors import LocalError


def toy(model: Callable[[], nn.Module] | None = None, num_samples: int = 40) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 6, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    return Task(name="toy", model=model or plain, train=(inputs, targets), test=(inputs, targets))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))


class PartlyUsed(nn.Module):
    """One frozen layer, one that the loss never reaches, and two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.used.weight
        self.frozen = nn.Linear(6, 2).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.tied(torch.relu(self.used(inputs)))
        outputs: Tensor = self.frozen(hidden)
        return outputs


def equal(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batches_of(num_samples: int, settings: TrainingSettings, round_: int = 0) -> np.ndarray:
    (batches,) = batch_indices(RoundStreams(5, ["a"], "batches"), [(0, round_)], num_samples, settings)
    return batches


def torch_optimizer(module: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            module.parameters(),
            lr=rate,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=decay,
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(module.parameters(), lr=rate, betas=settings.betas, eps=settings.epsilon, weight_decay=decay)


def reference(task: Task, params: Params, settings: TrainingSettings, batches: np.ndarray) -> Params:
    module = task.model()
    module.load_state_dict(params)
    optimizer = torch_optimizer(module, settings)
    for batch in batches:
        optimizer.zero_grad()
        loss = task.loss(module(task.train[0][batch]), task.train[1][batch])
        torch.autograd.backward(loss)
        optimizer.step()
    return dict(module.state_dict())


OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"optimizer": "adam", "learning_rate": 0.01},
    {"optimizer": "adam", "learning_rate": 0.01, "betas": (0.8, 0.9), "epsilon": 1e-3},
    {"optimizer": "adamw", "learning_rate": 0.01},
]


@pytest.mark.parametrize("model", [plain, PartlyUsed])
@pytest.mark.parametrize("chosen", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_training_equals_torch_optim(
    model: Callable[[], nn.Module], chosen: dict[str, Any], weight_decay: float
) -> None:
    task, settings = toy(model), TrainingSettings(weight_decay=weight_decay, **chosen)
    params = initial_params(task, 1)
    with torch.random.fork_rng():
        expected = reference(task, params, settings, batches_of(40, settings, round_=3))
    found, num_samples = train(task, params, settings, round=3, seed=5, node="a")
    assert num_samples == 40
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    if model is PartlyUsed:
        assert torch.equal(found["unused.weight"], params["unused.weight"])
        assert torch.equal(found["frozen.weight"], params["frozen.weight"])


@pytest.mark.parametrize("model", [plain, normalised])
def test_the_same_arguments_give_equal_bits_whatever_ran_before(model: Callable[[], nn.Module]) -> None:
    task, settings = toy(model), TrainingSettings(momentum=0.5)
    params, module = initial_params(task, 1), build_model(task)
    first, _ = train(task, params, settings, round=1, seed=2, node="a")
    torch.rand(3)
    train(task, params, settings, round=9, seed=9, node="b", model=module)
    evaluate(task, params, model=module)
    again, _ = train(task, params, settings, round=1, seed=2, node="a", model=module)
    assert equal(first, again)


@pytest.mark.parametrize("other", [{"round": 2}, {"seed": 3}, {"node": "b"}])
def test_round_seed_and_node_each_change_the_batches(other: dict[str, int | str]) -> None:
    task, settings = toy(), TrainingSettings()
    params = initial_params(task, 1)
    at = {"round": 1, "seed": 2, "node": "a"}
    first, _ = train(task, params, settings, **at)  # type: ignore[arg-type]
    second, _ = train(task, params, settings, **(at | other))  # type: ignore[arg-type]
    assert not equal(first, second)


def test_inputs_and_the_global_generator_are_untouched() -> None:
    task = toy(normalised)
    params = initial_params(task, 1)
    copies = {name: tensor.clone() for name, tensor in params.items()}
    data = [tensor.clone() for tensor in (*task.train, *task.test)]
    before = torch.get_rng_state()
    trained, _ = train(task, params, TrainingSettings(), round=0, seed=0, node=0)
    evaluate(task, trained)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(params, copies)
    assert all(torch.equal(*pair) for pair in zip((*task.train, *task.test), data, strict=True))


def test_results_share_no_memory_with_the_module_in_use() -> None:
    task = toy()
    params, module = initial_params(task, 1), build_model(task)
    first, _ = train(task, params, TrainingSettings(), round=0, seed=0, node=0, model=module)
    copies = {name: tensor.clone() for name, tensor in first.items()}
    train(task, first, TrainingSettings(), round=1, seed=0, node=0, model=module)
    assert equal(first, copies)
    assert not any(tensor.requires_grad for tensor in first.values())


def test_buffers_are_updated_and_returned() -> None:
    task = toy(normalised)
    params = initial_params(task, 1)
    trained, _ = train(task, params, TrainingSettings(local_steps=7), round=0, seed=0, node=0)
    assert trained["1.num_batches_tracked"].item() == 7
    assert not torch.equal(trained["1.running_mean"], params["1.running_mean"])


def test_a_batch_is_never_larger_than_the_shard_nor_holds_a_sample_twice() -> None:
    batches = batches_of(5, TrainingSettings(local_steps=3, batch_size=16))
    assert batches.shape == (3, 5)
    assert all(sorted(batch) == [0, 1, 2, 3, 4] for batch in batches.tolist())


def test_batches_walk_through_all_samples_before_they_repeat() -> None:
    settings = TrainingSettings(local_steps=10, batch_size=4)
    batches = batches_of(10, settings)
    assert batches.shape == (10, 4)
    assert np.bincount(batches.ravel()).tolist() == [4] * 10
    assert all(len(set(batch)) == 4 for batch in batches.tolist())
    assert len(set(batches_of(1000, settings).ravel().tolist())) == 40


@hypothesis_settings(derandomize=True, max_examples=200)
@given(
    num_samples=st.integers(1, 400),
    batch_size=st.integers(1, 40),
    local_steps=st.integers(1, 40),
    round_=st.integers(0, 2**40),
)
def test_the_law_of_batches(num_samples: int, batch_size: int, local_steps: int, round_: int) -> None:
    chosen = TrainingSettings(local_steps=local_steps, batch_size=batch_size)
    batches = batches_of(num_samples, chosen, round_)
    assert batches.shape == (local_steps, min(batch_size, num_samples))
    assert all(len(set(batch)) == len(batch) for batch in batches.tolist())
    uses = np.bincount(batches.ravel(), minlength=num_samples)
    assert len(uses) == num_samples
    assert uses.max() - uses.min() <= 1


def test_batches_of_many_nodes_are_those_of_each() -> None:
    chosen, names = TrainingSettings(local_steps=3, batch_size=4), ["a", "b", "c"]
    streams = RoundStreams(5, names, "batches")
    places = [(2, 7), (0, 1), (2, 8), (1, 7)]
    for num_samples in (1, 5, 12, 100, 1000):
        many = batch_indices(streams, places, num_samples, chosen)
        for (node, round_), batches in zip(places, many, strict=True):
            alone = RoundStreams(5, [names[node]], "batches")
            assert np.array_equal(batches, batch_indices(alone, [(0, round_)], num_samples, chosen)[0])


def test_a_shard_of_one_sample_trains() -> None:
    task = toy(num_samples=1)
    _, num_samples = train(task, initial_params(task, 0), TrainingSettings(), round=0, seed=0, node=0)
    assert num_samples == 1


def test_a_result_that_is_not_finite_is_our_own_error_and_names_the_round() -> None:
    task = toy()
    task = Task(
        name="toy",
        model=lambda: nn.Linear(6, 1),
        train=(task.train[0] * 1e10, task.train[0][:, :1]),
        test=task.test,
        loss=F.mse_loss,
    )
    settings = TrainingSettings(learning_rate=1000.0)
    with pytest.raises(LocalError, match=r"round 17 made weight non-finite; learning_rate 1000.0 may be too"):
        train(task, initial_params(task, 0), settings, round=17, seed=0, node=0)


def test_evaluation_in_chunks_equals_evaluation_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = toy(normalised)
    params = initial_params(task, 1)
    whole = evaluate(task, params)
    monkeypatch.setattr("node.training.EVALUATION_BATCH", 7)
    assert evaluate(task, params) == pytest.approx(whole)
    assert list(whole) == ["accuracy", "loss"]


def test_regression_is_measured_by_rmse_first() -> None:
    inputs = torch.arange(8.0).reshape(-1, 1)
    task = Task(
        name="line",
        model=lambda: nn.Linear(1, 1),
        train=(inputs, 2 * inputs),
        test=(inputs, 2 * inputs),
        loss=F.mse_loss,
        metrics=regression_metrics,
    )
    found = evaluate(task, {"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])})
    assert list(found) == ["rmse", "r2", "loss"]
    assert found == pytest.approx({"rmse": 1.0, "r2": 1 - 8 / 168, "loss": 1.0})


def test_the_digits_are_learnt_within_seconds(tmp_path: Path) -> None:
    task = make_task("digits", {}, tmp_path)
    params, module = initial_params(task, 0), build_model(task)
    assert evaluate(task, params, model=module)["accuracy"] < 0.4
    for round_number in range(60):
        params, num_samples = train(
            task, params, TrainingSettings(), round=round_number, seed=0, node="a", model=module
        )
    assert num_samples == 1438
    assert evaluate(task, params, model=module)["accuracy"] > 0.9


@pytest.mark.parametrize(
    "settings",
    [
        {"local_steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"optimizer": "rmsprop"},
        {"optimizer": "adam", "betas": [0.9, 1.0]},
        {"optimizer": "adam", "epsilon": 0},
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(settings, TrainingSettings)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"nesterov": True}, "nesterov needs a momentum above 0"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum and nesterov belong to sgd; adam has betas"),
        ({"optimizer": "adamw", "nesterov": True}, "belong to sgd; adamw has betas"),
        ({"betas": [0.8, 0.9]}, "belong to adam and adamw; sgd has momentum"),
        ({"epsilon": 1e-4}, "belong to adam and adamw"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(chosen: dict[str, object], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(chosen, TrainingSettings)
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**chosen)  # type: ignore[arg-type]
