"""The work of a node that learns by shared-seed scalars: measure scalars, replay rounds, evaluate, in one module.

Belongs here: which state the module is in. What a scalar is, is said in `scalar_measuring.py`.
"""

import math
import os

import numpy as np
import torch
from torch import nn

from aggregation.perturbation import trained
from node.compute import WorkOrder, WorkResult
from node.scalar_measuring import codes_of, direction_key, measure, scalar_batches, scalar_streams
from node.scalar_state import State
from node.settings import TrainingSettings
from node.store import BlobStore
from node.tasks import Task
from node.training import evaluate_module
from protocols.errors import LocalError
from protocols.events import (
    Aggregate,
    Estimate,
    Estimated,
    Evaluate,
    Evaluated,
    Replay,
    Replayed,
    Train,
    WorkFailed,
)
from protocols.scalar_terms import ScalarSettings
from protocols.vocabulary import ModelRef, one_line


class ScalarWork:
    """Does one node's work, one order at a time.

    Args:
        module: at the base, in evaluation mode; from now on nobody else's.
        state: of that module.
        base: its digest.
        author: this node's key, which its directions follow from.
        seed, node: the random streams of this node's batches derive from both and the round.
    """

    def __init__(
        self,
        task: Task,
        module: nn.Module,
        state: State,
        settings: ScalarSettings,
        training: TrainingSettings,
        store: BlobStore,
        base: bytes,
        author: bytes,
        seed: int,
        node: str,
    ) -> None:
        self._task = task
        self._module = module
        self._params = trained(module)
        self._state = state
        self._settings = settings
        self._training = training
        self._store = store
        self._base = base
        self._author = author
        self._seed = seed
        self._node = node
        self._streams = scalar_streams(seed, [node])
        self._noise = np.random.Generator(np.random.Philox(int.from_bytes(os.urandom(32), "big")))
        """Nobody can know it, nor draw it again."""
        self._names: frozenset[bytes] = frozenset({base})
        """Of the state that the module is in; none where it is in no state that has a name."""

    def perform(self, order: WorkOrder) -> WorkResult:
        """Do it. What goes wrong is an answer, not an exception: the core decides what follows."""
        try:
            match order:
                case Estimate():
                    return self._estimate(order)
                case Replay():
                    return self._replay(order)
                case Evaluate():
                    self._go_to(order.ref)
                    self._state.settle()
                    return Evaluated(order.token, evaluate_module(self._task, self._module))
                case Train() | Aggregate():
                    return WorkFailed(order.token, "this node learns by scalars")
        except Exception as error:  # a user's model, loss or metrics may raise anything
            return WorkFailed(order.token, one_line(f"{type(error).__name__}: {error}"))

    # --- states -----------------------------------------------------------------------------------------
    def _go_to(self, ref: ModelRef) -> None:
        """Bring the state to the one that is asked for.

        Raises LocalError where it is neither current, nor the base, nor saved.
        """
        if ref.digest in self._names:
            return
        blob = self._store.get(ref.digest)
        if ref.digest != self._base and blob is None:
            raise LocalError(
                f"state {ref.digest.hex()[:12]} of round {ref.round} is neither current nor saved"
            )
        self._names = frozenset()
        if blob is None:
            self._state.reset()
        else:
            self._state.read(blob.path)
        self._names = frozenset({ref.digest})

    def _replay(self, order: Replay) -> Replayed:
        self._go_to(order.ref)
        self._names = frozenset()
        self._state.apply(order.rounds)
        round_ = order.rounds[-1].round if order.rounds else order.ref.round
        ref = ModelRef(order.name, self._state.file.size_bytes, round_, 1)
        names = {order.name}
        if order.save:
            ref = self._store.save_pieces(self._state.pieces(), round_, 1)
            names.add(ref.digest)
        self._names = frozenset(names)
        return Replayed(order.token, ref)

    # --- scalars ----------------------------------------------------------------------------------------
    def _estimate(self, order: Estimate) -> Estimated:
        self._go_to(order.ref)
        self._state.settle()
        self._module.eval()
        settings, round_ = self._settings, order.round
        inputs, _ = self._task.train
        batches = scalar_batches(self._streams, 0, round_, order.num_samples, len(inputs), self._training)
        values = []
        for sample, batch in enumerate(torch.from_numpy(batches).to(inputs.device)):
            key = direction_key(settings, self._base, self._author, round_, sample)
            value = measure(self._task, self._module, self._params, batch, key, settings, self._noise)
            if not math.isfinite(value):
                raise LocalError(
                    f"the loss is not finite in round {round_}; scalars.learning_rate is too high, or "
                    "scalars.epsilon"
                )
            values.append(value)
        return Estimated(order.token, codes_of(values, settings, self._seed, self._node, round_))
