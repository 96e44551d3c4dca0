"""Work on order: the same as the pure functions do, and every failure an answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aggregation.base import Contribution, Params, Rule
from aggregation.rules import build, merge
from node import merging
from node.compute import StoredModels, Work
from node.settings import TrainingSettings
from node.store import BlobStore
from node.tasks import Task, initial_params, mlp
from node.training import evaluate, train
from node.weights import encode_params
from protocols.errors import LocalError
from protocols.events import Aggregate, Aggregated, Evaluate, Evaluated, Input, Train, Trained, WorkFailed
from protocols.vocabulary import Digest, ModelRef, PeerId

SETTINGS = TrainingSettings(local_steps=3, batch_size=4)
RULE = ("mean", "variance.corrected")
SEED, ME = 5, "me"


def toy(**changes: Any) -> Task:
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2
    return Task("toy", **{"model": lambda: mlp(3, [4], 2), "train": data, "test": data, **changes})


class Memory:
    """`Models` in a dict."""

    def __init__(self) -> None:
        self.params: dict[bytes, Params] = {}

    def load(self, ref: ModelRef) -> Params:
        if ref.digest not in self.params:
            raise LocalError("model is not held")
        return self.params[ref.digest]

    def save(self, params: Params, round_: int, num_samples: int) -> ModelRef:
        digest = Digest(bytes([len(self.params)]) * 32)
        self.params[digest] = params
        return ModelRef(digest, 100, round_, num_samples)


def make_work(task: Task, models: Memory, rule: Sequence[str | dict[str, Any]] = RULE) -> Work:
    return Work(task, SETTINGS, rule, models, SEED, ME)


def same(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_does_what_the_pure_function_does() -> None:
    task, models = toy(), Memory()
    start = initial_params(task, 1)
    ref = models.save(start, 6, 20)
    result = make_work(task, models).perform(Train(11, ref, 7))
    expected, num_samples = train(task, start, SETTINGS, round=7, seed=SEED, node=ME)
    assert isinstance(result, Trained)
    assert (result.token, result.ref.round, result.ref.num_samples) == (11, 7, num_samples)
    assert same(models.load(result.ref), expected)
    assert same(start, initial_params(task, 1)), "the start is another node's too"


def test_evaluating_does_what_the_pure_function_does() -> None:
    task, models = toy(), Memory()
    ref = models.save(initial_params(task, 1), 0, 20)
    expected = evaluate(task, models.load(ref))
    assert make_work(task, models).perform(Evaluate(12, ref)) == Evaluated(12, expected)


def test_merging_weighs_by_samples_and_staleness_and_starts_from_the_own_model() -> None:
    task, models = toy(), Memory()
    params = [initial_params(task, seed) for seed in range(3)]
    own, a, b = (models.save(p, 4, samples) for p, samples in zip(params, (20, 50, 5), strict=True))
    inputs = (Input(PeerId("a"), a, 0), Input(PeerId("b"), b, 3))
    specs = ({"name": "mean", "staleness_half_life": 2}, "variance.corrected")
    result = make_work(task, models, specs).perform(Aggregate(13, own, inputs))
    rule = build(specs)
    contributions = [
        Contribution(params[1], 50.0, 0, "a"),
        Contribution(params[2], 5.0, 3, "b"),
    ]
    expected, _ = merge(rule, contributions, rule.init(params[0]), Contribution(params[0], 20.0))
    assert isinstance(result, Aggregated)
    assert (result.token, result.ref.round, result.ref.num_samples) == (13, 4, 20)
    assert same(models.load(result.ref), expected)


def test_what_a_rule_remembers_is_carried_from_merge_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def update(
        contributions: Sequence[Contribution], state: int, local: Contribution
    ) -> tuple[list[Contribution], int]:
        seen.append(state)
        return [local], state + 1

    monkeypatch.setattr(merging, "build", lambda specs: Rule(init=lambda params: 100, update=update))
    task, models = toy(), Memory()
    ref = models.save(initial_params(task, 1), 0, 20)
    work = make_work(task, models)
    for token in range(3):
        assert isinstance(work.perform(Aggregate(token, ref, (Input(PeerId("a"), ref, 0),))), Aggregated)
    assert seen == [100, 101, 102]


def test_a_failed_merge_leaves_what_the_rule_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def update(
        contributions: Sequence[Contribution], state: int, local: Contribution
    ) -> tuple[list[Contribution], int]:
        seen.append(state)
        if len(seen) == 2:
            raise ValueError("not this time")
        return [local], state + 1

    monkeypatch.setattr(merging, "build", lambda specs: Rule(init=lambda params: 0, update=update))
    task, models = toy(), Memory()
    ref = models.save(initial_params(task, 1), 0, 20)
    work = make_work(task, models)
    order = Aggregate(1, ref, (Input(PeerId("a"), ref, 0),))
    kinds = [type(work.perform(order)) for _ in range(3)]
    assert kinds == [Aggregated, WorkFailed, Aggregated]
    assert seen == [0, 1, 1]


# --- failures -------------------------------------------------------------------------------------------
def test_a_model_that_is_not_held_is_a_failure_with_its_text() -> None:
    missing, work = ModelRef(bytes(32), 10, 0, 1), make_work(toy(), Memory())
    for order in (Train(1, missing, 0), Aggregate(1, missing, ()), Evaluate(1, missing)):
        assert work.perform(order) == WorkFailed(1, "LocalError: model is not held")


class Unlucky(nn.Module):
    """A user's model with a mistake in it."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.error = error

    def forward(self, inputs: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [ValueError("v"), RuntimeError("r"), KeyError("k"), TypeError("t"), IndexError("i"), MemoryError("m")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_users_model_raises_is_a_failure_not_the_end_of_the_worker(error: Exception) -> None:
    task, models = toy(model=lambda: Unlucky(error)), Memory()
    ref = models.save(initial_params(task, 1), 0, 20)
    work = make_work(task, models)
    for order in (Train(4, ref, 0), Evaluate(4, ref)):
        assert work.perform(order) == WorkFailed(4, f"{type(error).__name__}: {error}")


def test_targets_outside_the_models_classes_are_a_failure() -> None:
    task = toy(train=(torch.zeros(8, 3), torch.full((8,), 9)))
    models = Memory()
    result = make_work(task, models).perform(Train(1, models.save(initial_params(task, 1), 0, 8), 0))
    assert isinstance(result, WorkFailed)
    assert "out of bounds" in result.detail


def test_a_long_text_is_cut_to_what_a_detail_may_hold() -> None:
    task, models = toy(model=lambda: Unlucky(ValueError("x" * 1000))), Memory()
    result = make_work(task, models).perform(Evaluate(1, models.save(initial_params(task, 1), 0, 20)))
    assert isinstance(result, WorkFailed)
    assert len(result.detail) == 240


def test_a_peers_model_with_other_tensors_fails_the_merge() -> None:
    task, models = toy(), Memory()
    own = models.save(initial_params(task, 1), 0, 20)
    other = models.save({"weight": torch.zeros(2)}, 0, 20)
    result = make_work(task, models).perform(Aggregate(1, own, (Input(PeerId("a"), other, 0),)))
    assert isinstance(result, WorkFailed)
    assert result.detail.startswith("ValueError: ")


# --- stored models --------------------------------------------------------------------------------------
def test_stored_models_are_files_that_others_can_fetch(tmp_path: Path) -> None:
    task = toy()
    store = BlobStore(tmp_path, lambda path: None)
    models = StoredModels(store, num_cached=1)
    params = [initial_params(task, seed) for seed in range(3)]
    refs = [models.save(p, 2, 20) for p in params]
    for ref, p in zip(refs, params, strict=True):
        assert store.path(ref).read_bytes() == encode_params(p)
        assert same(models.load(ref), p), "from memory or from the file, all the same"
    assert models.load(refs[2]) is params[2]
    assert models.load(refs[0]) is not params[0], "only so many stay in memory"


def test_a_stored_model_that_is_not_held_is_an_error_of_ours(tmp_path: Path) -> None:
    models = StoredModels(BlobStore(tmp_path, lambda path: None))
    with pytest.raises(LocalError, match="is not held"):
        models.load(ModelRef(bytes(32), 10, 0, 1))
