"""The state of a replica that learns by shared-seed scalars: what all begin with, and what rounds make of it.

The module is changed in place, and never copied: beside it stand the base values of what is trained, on the disk where
they are not small. What a state is follows from the log alone; how it is reached (from the base, from a saved state,
from where the module is) changes no bit of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aggregation import spsa
from aggregation.base import Params
from aggregation.perturbation import apply_steps, params_digest, trained
from aggregation.scalar_code import LEVEL
from node.scalar_measuring import trained_by_scalars, undecayed
from node.state_file import StateFile
from node.tasks import Task, build_model
from node.weights import Schema, TensorSpec, all_sane, schema_of
from protocols.errors import ConfigError, LocalError, PeerError
from protocols.events import RoundScalars
from protocols.scalar_terms import GENERATORS, ScalarSettings
from protocols.vocabulary import Reason

BASE_SEED = 0
"""Of the first model where none is configured: it has to be the same on all nodes."""
SMALL_SHARE = 0.05
"""Of the module: up to it the base values of what is trained are kept in memory."""
CLIP, SUMS = "scalars.clip", "scalars.sums"
"""Tensors in the file of a state beside the parameters: the running clip, int64 [1 + 128], the limit first; and of a
pool, whose parameters follow from them, the sums of its directions, float64 [pool]."""
NUM_LEVELS = LEVEL + 1
MAX_COUNT = 2**48
"""Of one level in the running clip, so that a peer's numbers do not overflow when they are added up."""


# --- the base -------------------------------------------------------------------------------------------
def base_module(task: Task, seed: int | None) -> nn.Module:
    """The model that all nodes begin with, in evaluation mode.

    seed: of the config; None is the same for all.
    Raises ConfigError where it cannot be made, or not be trained by scalars.
    """
    try:
        module = build_model(task, BASE_SEED if seed is None else seed).eval()
    except Exception as error:  # the user's own model, which may raise anything
        raise ConfigError("task.name", f"the model of '{task.name}' cannot be made: {error!r}") from error
    trained_by_scalars(task, module, "task.name")
    return module


def base_digest(module: nn.Module) -> bytes:
    """SHA-256 over all parameters, frozen ones too, and all buffers that belong to a saved model: 32 bytes.

    Other buffers are computed when a module is made, and may differ in the last bit between machines. That is harmless: a
    forward pass may, a replay uses none.
    """
    tensors: Params = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        transient = part._non_persistent_buffers_set
        for name, buffer in part.named_buffers(recurse=False):
            if name not in transient:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return params_digest(tensors)


class _Base:
    """The values of what is trained as they were at first."""

    def __init__(self, module: nn.Module, params: Params, scratch: Path) -> None:
        self._params = params
        self._copy: Params | None = None
        self._path = scratch / "base.safetensors"
        self._file = StateFile(schema_of(params))
        size_bytes = sum(tensor.nbytes for tensor in params.values())
        whole = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        if size_bytes <= SMALL_SHARE * whole:
            self._copy = {name: tensor.clone() for name, tensor in params.items()}
            return
        try:
            scratch.mkdir(exist_ok=True)
            with self._path.open("wb") as file:
                for piece in self._file.pieces(params):
                    file.write(piece)
        except OSError as error:
            raise LocalError(f"the base model cannot be put into {self._path}: {error}") from error

    def restore(self) -> None:
        """Put them back. Raises LocalError where the disk fails."""
        if self._copy is None:
            self._file.read(self._path, self._params)
            return
        for name, tensor in self._params.items():
            tensor.copy_(self._copy[name])


# --- the state ------------------------------------------------------------------------------------------
class State(ABC):
    """Trained parameters where rounds have led to, and what the next rounds need beside them."""

    def __init__(
        self, settings: ScalarSettings, module: nn.Module, base: bytes, scratch: Path, tensors: Schema
    ) -> None:
        """tensors: that are in its file beside the clip."""
        self._params = trained(module)
        self._digest = base
        self._kind = GENERATORS[settings.direction]
        self._base = _Base(module, self._params, scratch)
        self._quantile = settings.clip_quantile
        self._every = settings.checkpoint_every
        self._clip = spsa.open_clip()
        self.file = StateFile({**tensors, CLIP: TensorSpec((1 + NUM_LEVELS,), "I64")})

    @abstractmethod
    def reset(self) -> None:
        """Back to the base. Raises LocalError where the disk fails."""

    def read(self, path: Path) -> None:
        """To what a checked file holds. Raises LocalError where it cannot be read."""
        clip = self._clip_tensor()
        self._read(path, clip)
        self._clip = spsa.ClipState(int(clip[0]), clip[1:].numpy().copy())

    @abstractmethod
    def apply(self, rounds: Sequence[RoundScalars]) -> None:
        """On by these rounds, in order. Raises ValueError as `spsa.replay` does."""

    @abstractmethod
    def settle(self) -> None:
        """Bring the module to the state, if it is not there yet. Raises LocalError where the disk fails."""

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The state as a file. Raises LocalError where a value is out of range, as no peer would take it."""
        tensors = self._tensors()
        for name, tensor in tensors.items():
            if not all_sane(tensor):
                raise LocalError(f"{name} is not finite any more; scalars.learning_rate is too high")
        return self.file.pieces({**tensors, CLIP: self._clip_tensor()})

    def check(self, path: Path) -> None:
        """Accept a file of a peer, or raise PeerError as `StateFile.check` does, or for a clip that no log leads to."""
        self.file.check(path)
        clip = self.file.load(path, CLIP)
        limit, counts = int(clip[0]), clip[1:]
        if not 0 <= limit <= LEVEL or int(counts.min()) < 0 or int(counts.max()) > MAX_COUNT:
            raise PeerError(Reason.WRONG_FORMAT, f"{CLIP} holds what no log leads to")

    def _clip_tensor(self) -> Tensor:
        return torch.from_numpy(np.array([self._clip.limit, *self._clip.counts], np.int64))

    @abstractmethod
    def _tensors(self) -> Params: ...

    @abstractmethod
    def _read(self, path: Path, clip: Tensor) -> None: ...


def _rounds(rounds: Sequence[RoundScalars]) -> Iterator[spsa.Round]:
    for each in rounds:
        entries = [(record.author, record.codes) for record in each.records]
        yield spsa.Round(each.round, each.scale, each.decay, entries)


class Direct(State):
    """Every direction is new, and the parameters are the state."""

    def __init__(self, settings: ScalarSettings, module: nn.Module, base: bytes, scratch: Path) -> None:
        super().__init__(settings, module, base, scratch, schema_of(trained(module)))
        self._undecayed = undecayed(self._params)

    def reset(self) -> None:
        self._base.restore()
        self._clip = spsa.open_clip()

    def apply(self, rounds: Sequence[RoundScalars]) -> None:
        self._clip = spsa.replay(
            self._params,
            _rounds(rounds),
            self._clip,
            base=self._digest,
            quantile=self._quantile,
            every=self._every,
            kind=self._kind,
            undecayed=self._undecayed,
        )

    def settle(self) -> None:
        """It is always there."""

    def _tensors(self) -> Params:
        return self._params

    def _read(self, path: Path, clip: Tensor) -> None:
        self.file.read(path, {**self._params, CLIP: clip})


class Pooled(State):
    """All directions come from one pool, and the state is a number for each: the module follows when it is needed."""

    def __init__(self, settings: ScalarSettings, module: nn.Module, base: bytes, scratch: Path) -> None:
        super().__init__(settings, module, base, scratch, {SUMS: TensorSpec((settings.pool,), "F64")})
        self._sums: NDArray[np.float64] = np.zeros(settings.pool)
        self._settled = True

    def reset(self) -> None:
        self._sums, self._clip = np.zeros_like(self._sums), spsa.open_clip()
        self._settled = False

    def apply(self, rounds: Sequence[RoundScalars]) -> None:
        self._sums, self._clip = spsa.pool_replay(
            self._sums,
            _rounds(rounds),
            self._clip,
            base=self._digest,
            quantile=self._quantile,
            every=self._every,
        )
        self._settled = False

    def settle(self) -> None:
        """The base values, and all directions on top: what the module was before does not matter."""
        if not self._settled:
            self._base.restore()
            apply_steps(self._params, [spsa.pool_step(self._sums, self._digest)], kind=self._kind)
            self._settled = True

    def _tensors(self) -> Params:
        return {SUMS: torch.from_numpy(self._sums)}

    def _read(self, path: Path, clip: Tensor) -> None:
        sums = torch.from_numpy(self._sums.copy())
        self.file.read(path, {SUMS: sums, CLIP: clip})
        self._sums = sums.numpy()
        self._settled = False


def make_state(settings: ScalarSettings, module: nn.Module, base: bytes, scratch: Path) -> State:
    """The state of a module that is at the base, whose digest this is.

    scratch: a folder for the base values, made where it is missing.
    Raises LocalError where the disk fails.
    """
    return (Pooled if settings.pool else Direct)(settings, module, base, scratch)
