"""Scalars measured for many nodes at once, and rounds replayed, on the rows of an engine.

Belongs here: what `LocalEngine` does where nodes learn by scalars. Directions, codes and replays are those of
`aggregation`, and what a scalar is that of `node/scalar_measuring.py`: a scalar is
what a daemon would measure, to rounding, and a replay is the same to the bit.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap

from aggregation import spsa
from aggregation.base import Params
from aggregation.perturbation import (
    GENERATOR,
    apply_steps,
    normals,
    signs_of,
    trained,
)
from node.partition import Indices
from node.randomness import stream
from node.scalar_measuring import (
    codes_of,
    direction_key,
    measure,
    scalar_batches,
    scalar_streams,
    trained_by_scalars,
    undecayed,
)
from node.settings import TrainingSettings
from node.tasks import Task
from node.weights import all_sane
from protocols.errors import LocalError
from protocols.scalar_terms import GENERATORS, ScalarSettings
from protocols.vocabulary import PeerId, one_line
from sim.calibration import NEVER, NUM_PLAIN, TOLERANCE, Choice, compare, disagreement, tile_size
from sim.orders import NO_SLOT, Estimate, Replay, ReplayedRound
from sim.rows import Rows
from sim.scenarios import ComputeSettings
from sim.signing import author_of

MAX_KNOWN_KEYS = 20_000
"""Authors' rounds whose keys are kept: hashing them anew would take longer than applying them."""
LARGEST_TOGETHER = 1_000_000
"""Trained entries up to which directions are held as numbers; above it the daemon's way is the faster one anyway."""


class _Scalar(NamedTuple):
    """One scalar to be measured: the model's row, its direction, and the samples, by their indices among all."""

    row: int
    key: int
    batch: NDArray[np.int64]


class ScalarPart:
    """The part of an engine that measures and replays.

    task: with all training samples, on the engine's device; model: a module of it, whose contents nobody counts on.
    names: of the nodes; parts: which training samples each has.
    base: stands for the model that all begin with, in the keys of the directions.
    Raises ConfigError where the task has nothing that scalars can train.
    """

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        rows: Rows,
        names: Sequence[str],
        parts: Sequence[Indices],
        settings: ScalarSettings,
        training: TrainingSettings,
        seed: int,
        base: bytes,
        compute: ComputeSettings,
    ) -> None:
        self._task, self._model, self._rows = task, model, rows
        self._names, self._parts = names, parts
        self._settings, self._training, self._seed = settings, training, seed
        self._base, self._compute = base, compute
        self._authors = [author_of(PeerId(name)) for name in names]
        self._streams = scalar_streams(seed, names)
        self._kind = GENERATORS[settings.direction]
        self._epsilon = float(np.float32(settings.epsilon))
        params = trained_by_scalars(task, model, "data.task")
        self._shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
        self._sizes = [tensor.numel() for tensor in params.values()]
        self._undecayed = undecayed(params)
        self._aliases = _aliases(model, params)
        self._codes: dict[int, bytes] = {}
        self._known_keys: dict[tuple[bytes, int], tuple[int, ...]] = {}
        self._trial_row = 0
        self._clips: dict[int, spsa.ClipState] = {}
        """Of each row, like what follows."""
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._first: Params = {}
        """What all begin with: a pool's directions are applied to it."""

    def begin(self, row: int) -> None:
        """This row holds what all begin with."""
        self._clips[row] = spsa.open_clip()
        if self._settings.pool:
            self._sums[row] = np.zeros(self._settings.pool)
            self._first = {name: tensor.clone() for name, tensor in self._params_of(row).items()}

    def describe(self) -> dict[str, object]:
        """As `Engine.describe`."""
        choice: Choice | None = self.__dict__.get("_choice")
        if choice is None:
            return {}
        shown = {"batched": choice.batched_from != NEVER, **msgspec.to_builtins(choice)}
        return {"estimate": {key: value for key, value in shown.items() if value not in (None, NEVER)}}

    # --- measuring --------------------------------------------------------------------------------------
    def estimate(self, orders: Sequence[Estimate]) -> list[str]:
        """As `Engine.estimate`. Orders with one size of batch are measured together."""
        answers = [""] * len(orders)
        groups: dict[int, list[int]] = {}
        for place, order in enumerate(orders):
            groups.setdefault(min(self._training.batch_size, len(self._parts[order.node])), []).append(place)
        for places in groups.values():
            scalars = [self._scalars_of(orders[place]) for place in places]
            try:
                values = self._measure([scalar for each in scalars for scalar in each])
            except Exception as error:  # a user's model or loss may raise anything
                failed = one_line(f"{type(error).__name__}: {error}")
                values = [math.nan] * sum(map(len, scalars))
            else:
                failed = ""
            begin = 0
            for place, each in zip(places, scalars, strict=True):
                answers[place] = self._say(orders[place], values[begin : begin + len(each)], failed)
                begin += len(each)
        return answers

    def _say(self, order: Estimate, values: Sequence[float], failed: str) -> str:
        """Put the codes of one order into its slot; zeros where something failed, and why."""
        if not failed and not all(map(math.isfinite, values)):
            failed = f"the loss is not finite in round {order.round}"
        if failed:
            self._codes[order.slot] = bytes(order.num_samples)
            return failed
        node = self._names[order.node]
        self._codes[order.slot] = codes_of(values, self._settings, self._seed, node, order.round)
        return ""

    def _scalars_of(self, order: Estimate) -> list[_Scalar]:
        part = self._parts[order.node]
        own = scalar_batches(
            self._streams, order.node, order.round, order.num_samples, len(part), self._training
        )
        author = self._authors[order.node]
        keys = self._keys(author, order.round, order.num_samples)
        return [_Scalar(order.source, key, part[batch]) for key, batch in zip(keys, own, strict=True)]

    def _keys(self, author: bytes, round_: int, count: int) -> tuple[int, ...]:
        """Of an author's first directions in a round; many states are made of the same ones."""
        known = self._known_keys.get((author, round_), ())
        if len(known) < count:
            known = tuple(
                direction_key(self._settings, self._base, author, round_, sample) for sample in range(count)
            )
            self._known_keys[author, round_] = known
            while len(self._known_keys) > MAX_KNOWN_KEYS:
                del self._known_keys[next(iter(self._known_keys))]
        return known[:count]

    def _measure(self, scalars: Sequence[_Scalar]) -> list[float]:
        """All have one size of batch."""
        if self._settings.private_clip is not None:
            return self._one_by_one(scalars)
        self._trial_row = scalars[0].row
        choice = self._choice
        if not choice.batches(len(scalars)):
            return self._one_by_one(scalars)
        values: list[float] = []
        for tile in _tiles(scalars, choice.tile):
            try:
                sides = self._together(tile)
            except Exception:  # what vmap or one bad sample breaks is found out one by one
                values += self._one_by_one(tile)
            else:
                values += [spsa.difference(upper, lower, self._epsilon) for upper, lower in sides.tolist()]
        return values

    @torch.no_grad()
    def _together(self, scalars: Sequence[_Scalar]) -> Tensor:
        """Losses on both sides, [scalars, 2]."""
        inputs, targets = (self._samples(part, scalars) for part in self._task.train)
        rows = torch.tensor([scalar.row for scalar in scalars], device=inputs.device)
        models = self._rows.views(self._rows.gather(rows))
        flat = torch.cat([models[name].flatten(1) for name in self._shapes], dim=1)
        # What is not trained is the same in all rows.
        rest = {
            name: tensor
            for name, tensor in self._rows.params(scalars[0].row).items()
            if name not in self._moving
        }
        moves = torch.from_numpy(self._directions([scalar.key for scalar in scalars])).to(flat.device)
        moves *= self._epsilon
        self._model.eval()
        sides = []
        for moved in (flat + moves, flat - moves):
            parts = torch.split(moved, self._sizes, dim=1)
            views = {
                name: part.view(-1, *shape)
                for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
            }
            sides.append(self._losses(views, rest, inputs, targets))
        return torch.stack(sides, dim=1)

    @cached_property
    def _losses(self) -> Callable[..., Tensor]:
        def loss(moving: Params, rest: Params, inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = functional_call(self._model, {**moving, **rest}, (inputs,))
            return self._task.loss(outputs, targets)

        losses: Callable[..., Tensor] = vmap(loss, in_dims=(0, None, 0, 0), randomness="error")
        return losses

    @cached_property
    def _moving(self) -> frozenset[str]:
        """Names of what is moved, tied ones by all their names."""
        return frozenset(self._shapes) | self._aliases.keys()

    def _samples(self, data: Tensor, scalars: Sequence[_Scalar]) -> Tensor:
        """[scalars, batch, ...]"""
        batches = torch.from_numpy(np.stack([scalar.batch for scalar in scalars])).to(data.device)
        return data.index_select(0, batches.reshape(-1)).view(*batches.shape, *data.shape[1:])

    def _directions(self, keys: Sequence[int]) -> NDArray[np.float32]:
        if self._kind == GENERATOR:
            return signs_of(keys, self._sizes, np.float32)
        return np.stack([normals(key, self._sizes) for key in keys])

    def _one_by_one(self, scalars: Sequence[_Scalar]) -> list[float]:
        """As a daemon does. The noise of a private one follows from the seed, so that a run can be had again; a daemon's
        must not be known."""
        device = self._task.train[0].device
        return [
            measure(
                self._task,
                self._model,
                own,
                torch.from_numpy(scalar.batch).to(device),
                scalar.key,
                self._settings,
                stream(self._seed, str(scalar.key), "scalar noise"),
            )
            for scalar, own in self._loaded(scalars)
        ]

    def _loaded(self, scalars: Sequence[_Scalar]) -> Iterator[tuple[_Scalar, Params]]:
        """Each with its model in the module, whose trained parameters come along; scalars at one model stand side by side."""
        for row, some in itertools.groupby(scalars, key=lambda scalar: scalar.row):
            self._model.load_state_dict(self._rows.params(row))
            self._model.eval()
            own = trained(self._model)
            yield from ((scalar, own) for scalar in some)

    # --- replaying --------------------------------------------------------------------------------------
    def replay(self, orders: Sequence[Replay]) -> list[str]:
        """As `Engine.replay`: by the code of a daemon, since the bytes have to be the same."""
        return [self._replay(order) for order in orders]

    def _replay(self, order: Replay) -> str:
        rows, row, source = self._rows, order.row, order.source
        clip, sums = self._clips[source], self._sums.get(source)
        kept = {dtype: matrix[source].clone() for dtype, matrix in rows.matrices.items()}
        rows.copy(source, row)
        params = self._params_of(row)
        try:
            if self._settings.pool:
                assert sums is not None
                sums = self._replay_pool(params, order, sums)
            else:
                self._clips[row] = spsa.replay(
                    params,
                    self._rounds(order.rounds),
                    clip,
                    base=self._base,
                    quantile=self._settings.clip_quantile,
                    every=self._settings.checkpoint_every,
                    kind=self._kind,
                    undecayed=self._undecayed,
                    keys_of=self._keys,
                )
            for name, tensor in params.items():
                if not all_sane(tensor):
                    raise LocalError(f"{name} is not finite any more; scalars.learning_rate is too high")
        except Exception as error:  # a failure is an answer
            for dtype, values in kept.items():
                rows.matrices[dtype][row] = values
            self._clips[row] = clip
            failed = one_line(f"{type(error).__name__}: {error}")
        else:
            failed = ""
            for alias, name in self._aliases.items():
                rows.params(row)[alias].copy_(params[name])
        if sums is not None:
            self._sums[row] = sums
        return failed

    def _replay_pool(self, params: Params, order: Replay, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the sums stand for, applied to what all began with."""
        sums, self._clips[order.row] = spsa.pool_replay(
            sums,
            self._rounds(order.rounds),
            self._clips[order.source],
            base=self._base,
            quantile=self._settings.clip_quantile,
            every=self._settings.checkpoint_every,
        )
        for name, tensor in params.items():
            tensor.copy_(self._first[name])
        apply_steps(params, [spsa.pool_step(sums, self._base)], kind=self._kind)
        return sums

    def _params_of(self, row: int) -> Params:
        """Views of what is trained, as `perturbation.trained` names it."""
        params = self._rows.params(row)
        return {name: params[name] for name in self._shapes}

    def _rounds(self, rounds: Sequence[ReplayedRound]) -> Iterator[spsa.Round]:
        for number, scale, decay, scalars in rounds:
            entries = [
                (author, codes if slot == NO_SLOT else self._codes[slot]) for author, slot, codes in scalars
            ]
            yield spsa.Round(number, scale, decay, entries)

    # --- choosing ---------------------------------------------------------------------------------------
    @cached_property
    def _choice(self) -> Choice:
        """As for training: by setting, by whether a batched call gives the same losses, and by which is faster."""
        inputs = self._task.train[0]
        node = int(np.argmax([len(part) for part in self._parts]))
        batch = min(self._training.batch_size, len(self._parts[node]))
        size_bytes = 8 * sum(self._sizes) + batch * inputs[:1].numel() * inputs.element_size()
        tile = self._compute.tile or tile_size(size_bytes, 1 << 30, inputs.device.type)
        if self._compute.batching == "never":
            return Choice(tile, NEVER, "compute.batching is never")
        if problem := self._problem(node):
            return Choice(tile, NEVER, problem)
        if self._compute.batching == "always":
            return Choice(tile, 1, "compute.batching is always")
        key = (
            "estimate",
            batch,
            tuple(self._shapes.items()),
            tile,
            str(inputs.device),
            torch.get_num_threads(),
        )

        def run_plain(count: int) -> None:
            self._one_by_one(self._trial(node, count))

        def run_batched(count: int) -> None:
            self._together(self._trial(node, count))

        return compare(key, tile, run_plain, run_batched)

    def _problem(self, node: int) -> str:
        params = self._rows.params(self._trial_row)
        if any(params[name].dtype != torch.float32 for name in self._shapes):
            return "what is trained is not float32"
        if sum(self._sizes) > LARGEST_TOGETHER:
            return f"more than {LARGEST_TOGETHER:,} trained parameters"
        scalars = self._trial(node, NUM_PLAIN)
        try:
            together = self._together(scalars)
        except Exception as error:  # what vmap cannot do it says in many ways
            return one_line(f"{type(error).__name__}: {error}")
        found = self._one_by_one(scalars)
        # Losses agree to rounding; the difference of two divides by epsilon what they differ by.
        plain = torch.tensor(found) * 2 * self._epsilon
        distance = disagreement(plain, (together[:, 0] - together[:, 1]).cpu())
        return "" if distance <= TOLERANCE else f"differs from one by one by {distance:.1e}"

    def _trial(self, node: int, count: int) -> list[_Scalar]:
        return [
            scalar
            for number in range(count)
            for scalar in self._scalars_of(Estimate(0, self._trial_row, node, number, 1))
        ]


def _aliases(model: torch.nn.Module, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of tied parameters, and under which one each is trained."""
    places = {(tensor.data_ptr(), tensor.shape): name for name, tensor in params.items()}
    found = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first = places.get((tensor.data_ptr(), tensor.shape))
        if first is not None and first != name:
            found[name] = first
    return found


def _tiles(scalars: Sequence[_Scalar], size: int) -> Iterator[Sequence[_Scalar]]:
    """Nearly equal runs of at most `size`."""
    num_tiles = -(-len(scalars) // size)
    for i in range(num_tiles):
        yield scalars[i * len(scalars) // num_tiles : (i + 1) * len(scalars) // num_tiles]
