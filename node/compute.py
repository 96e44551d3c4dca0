"""The work a core asks for, done: train, merge, evaluate. One implementation for the daemon and the simulator.

Where models lie is behind `Models`; when the work happens is its caller's affair.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from aggregation.base import Contribution, Params
from aggregation.rules import build, merge
from node.settings import TrainingSettings
from node.store import BlobStore
from node.tasks import Task, build_model
from node.training import evaluate, train
from node.weights import encode_params, load_params
from protocols.events import Aggregate, Aggregated, Evaluate, Evaluated, Train, Trained, WorkFailed
from protocols.vocabulary import ModelRef, one_line

WorkOrder = Train | Aggregate | Evaluate
WorkResult = Trained | Aggregated | Evaluated | WorkFailed


class Models(Protocol):
    """Where models lie, by reference."""

    def load(self, ref: ModelRef) -> Params: ...

    def save(self, params: Params, round_: int, num_samples: int) -> ModelRef: ...


class StoredModels:
    """Models as safetensors files; the ones made last are at hand without reading them again."""

    def __init__(self, store: BlobStore, num_cached: int = 2) -> None:
        self._store = store
        self._num_cached = num_cached
        self._cache: dict[bytes, Params] = {}

    def load(self, ref: ModelRef) -> Params:
        """Raises LocalError where the model is not held."""
        cached = self._cache.get(ref.digest)
        return cached if cached is not None else load_params(self._store.path(ref))

    def save(self, params: Params, round_: int, num_samples: int) -> ModelRef:
        ref = self._store.save(encode_params(params), round_, num_samples)
        self._cache[ref.digest] = params
        while len(self._cache) > self._num_cached:
            del self._cache[next(iter(self._cache))]
        return ref


class Work:
    """Does one node's work, one order at a time.

    seed, node: the random streams of this node's batches derive from both and the round.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        rule: Sequence[str | dict[str, Any]],
        models: Models,
        seed: int,
        node: str,
    ) -> None:
        self._task = task
        self._model = build_model(task)
        self._settings = settings
        self._rule = build(rule)
        self._rule_state: Any = None
        self._models = models
        self._seed = seed
        self._node = node

    def perform(self, order: WorkOrder) -> WorkResult:
        """Do it. What goes wrong is an answer, not an exception: the core decides what follows."""
        try:
            match order:
                case Train():
                    return self._train(order)
                case Aggregate():
                    return self._aggregate(order)
                case Evaluate():
                    params = self._models.load(order.ref)
                    return Evaluated(order.token, evaluate(self._task, params, model=self._model))
        except Exception as error:  # a user's model, loss or metrics may raise anything
            return WorkFailed(order.token, one_line(f"{type(error).__name__}: {error}"))

    def _train(self, order: Train) -> Trained:
        params, num_samples = train(
            self._task,
            self._models.load(order.ref),
            self._settings,
            round=order.round,
            seed=self._seed,
            node=self._node,
            model=self._model,
        )
        return Trained(order.token, self._models.save(params, order.round, num_samples))

    def _aggregate(self, order: Aggregate) -> Aggregated:
        own = self._models.load(order.own)
        local = Contribution(own, weight=float(order.own.num_samples), source="own")
        contributions = [
            Contribution(
                self._models.load(item.ref),
                weight=float(item.ref.num_samples),
                staleness=item.staleness,
                source=item.peer,
            )
            for item in order.inputs
        ]
        if self._rule_state is None:
            self._rule_state = self._rule.init(own)
        params, self._rule_state = merge(self._rule, contributions, self._rule_state, local)
        return Aggregated(order.token, self._models.save(params, order.own.round, order.own.num_samples))
