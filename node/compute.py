"""The work a core asks for, done: train, merge, evaluate. One implementation for the daemon and the simulator.

Where models lie is behind `Models`; when the work happens is its caller's affair.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from aggregation.base import Contribution, Local, Params
from node.merging import FINAL, Specs, build_rules, hold_out, judges, make_receiver, merge_usable, rehearse
from node.settings import TrainingSettings
from node.store import BlobStore
from node.tasks import Task, build_model, restricted
from node.training import GoesOn, evaluate, train
from node.weights import encode_params, load_params
from protocols.events import (
    Aggregate,
    Aggregated,
    Estimate,
    Estimated,
    Evaluate,
    Evaluated,
    Replay,
    Replayed,
    Train,
    Trained,
    WorkFailed,
)
from protocols.vocabulary import MAX_SAMPLES, ModelRef, one_line

WorkOrder = Train | Aggregate | Evaluate | Estimate | Replay
WorkResult = Trained | Aggregated | Evaluated | Estimated | Replayed | WorkFailed


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
    final_rule: of the merge after the last round; None where there is none. judges_final: whether its result is judged
        before it is kept.
    pace: called as a training begins; its answer may end it early.

    Raises ValueError for rules that do not exist or fit.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        rule: Specs,
        models: Models,
        seed: int,
        node: str,
        final_rule: Specs | None = None,
        judges_final: bool = False,
        pace: Callable[[], GoesOn] = lambda: lambda num_steps: True,
    ) -> None:
        self._rules = build_rules(rule, final_rule, judges_final)
        self._rule_states: dict[str, Any] = {}
        everything = np.arange(len(task.train[0]))
        own, held_out = (
            hold_out(everything, settings.validation) if judges(self._rules) else (everything, None)
        )
        validation = None if held_out is None else restricted(task, held_out).train
        self._task = task if held_out is None else restricted(task, own)
        self._model = build_model(task)
        self._receiver = make_receiver(self._task, self._model, validation)
        self._settings = settings
        self._models = models
        self._seed = seed
        self._node = node
        self._pace = pace

    def rehearse(self, params: Params) -> None:
        """Raises ValueError where a merge of models like this one would fail for want of something."""
        rehearse(self._rules, params, self._receiver)

    @property
    def num_samples(self) -> int:
        """Samples that it trains on."""
        return len(self._task.train[0])

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
                case Estimate() | Replay():
                    return WorkFailed(order.token, "this node learns by exchanging models")
        except Exception as error:  # a user's model, loss or metrics may raise anything
            return WorkFailed(order.token, one_line(f"{type(error).__name__}: {error}"))

    def _train(self, order: Train) -> Trained:
        params, weight = train(
            self._task,
            self._models.load(order.ref),
            self._settings,
            round=order.round,
            seed=self._seed,
            node=self._node,
            model=self._model,
            goes_on=self._pace(),
        )
        return Trained(order.token, self._models.save(params, order.round, weight))

    def _aggregate(self, order: Aggregate) -> Aggregated:
        own = self._models.load(order.own)
        local = Local(own, weight=float(order.own.num_samples), source="own", receiver=self._receiver)
        contributions = [
            Contribution(
                self._models.load(item.ref),
                weight=float(item.ref.num_samples),
                staleness=item.staleness,
                source=item.peer,
            )
            for item in order.inputs
        ]
        rule = self._rules[order.rule]
        if order.rule not in self._rule_states:
            self._rule_states[order.rule] = rule.init(own)
        params, state, report = merge_usable(rule, contributions, self._rule_states[order.rule], local)
        self._rule_states[order.rule] = state
        # What counted for more because of steps left out has counted: a later merge weighs by samples again.
        num_samples = self.num_samples
        if order.rule == FINAL:  # a sum over all nodes, on its way to the next one
            behind = order.own.num_samples + sum(item.ref.num_samples for item in order.inputs)
            num_samples = min(MAX_SAMPLES, behind)
        ref = self._models.save(params, order.own.round, num_samples)
        return Aggregated(order.token, ref, tuple(report.items()))
