"""The work of a node that learns by shared-seed scalars: measure scalars, replay rounds, evaluate, in one module.

Belongs here: which samples and directions a scalar is measured on, and which state the module is in.
"""

import math
import os

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from aggregation import spsa
from aggregation.perturbation import pool_key, seed_key, trained
from aggregation.scalar_code import encode
from node.compute import WorkOrder, WorkResult
from node.randomness import RoundStreams, stream
from node.scalar_state import KINDS, State
from node.settings import TrainingSettings
from node.store import BlobStore
from node.tasks import Task
from node.training import batch_indices, evaluate_module
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
        self._batches = RoundStreams(seed, [node], "scalar batches")
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
        settings = self._settings
        draws = stream(self._seed, self._node, "scalar rounding", order.round).random(order.num_samples)
        codes = bytearray()
        for sample, batch in enumerate(self._batches_of(order)):
            value = self._measure(order.round, sample, batch)
            if not math.isfinite(value):
                raise LocalError(
                    f"the loss is not finite in round {order.round}; scalars.learning_rate is too high, or "
                    "scalars.epsilon"
                )
            codes.append(encode(value, float(draws[sample]) if settings.rounding == "stochastic" else None))
        return Estimated(order.token, bytes(codes))

    def _batches_of(self, order: Estimate) -> Tensor:
        """Which of the node's samples each scalar is measured on: [scalars, batch]."""
        settings = msgspec.structs.replace(self._training, local_steps=order.num_samples)
        inputs, _ = self._task.train
        (batches,) = batch_indices(self._batches, [(0, order.round)], len(inputs), settings)
        return torch.from_numpy(batches).to(inputs.device)

    def _measure(self, round_: int, sample: int, batch: Tensor) -> float:
        settings, task = self._settings, self._task
        inputs, targets = (part.index_select(0, batch) for part in task.train)
        key, kind = self._key(round_, sample), KINDS[settings.direction]

        def loss() -> float:
            with torch.inference_mode():
                return float(task.loss(self._module(inputs), targets))

        def losses() -> Tensor:
            with torch.inference_mode():
                outputs = self._module(inputs)
                rows = range(len(targets))
                return torch.stack([task.loss(outputs[i : i + 1], targets[i : i + 1]) for i in rows])

        if settings.private_clip is None:
            return spsa.central_difference(loss, self._params, key, settings.epsilon, kind)
        return spsa.private_difference(
            losses,
            self._params,
            key,
            settings.epsilon,
            settings.private_clip,
            settings.private_noise,
            self._noise,
            kind,
        )

    def _key(self, round_: int, sample: int) -> int:
        where = self._base, self._author, round_, sample
        if self._settings.pool:
            return pool_key(self._base, spsa.pool_index(*where, self._settings.pool))
        return seed_key(*where)
