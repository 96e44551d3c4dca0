"""Training, merging and measuring many models at once, on this machine.

Belongs here: `LocalEngine`, which computes orders on rows. Whatever is not known to be right and faster in one batched
call is done by the daemon's own code, model by model. What a model is worth to be batched is found in `calibration.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap

from aggregation.base import Contribution, Local, Params, Receiver
from aggregation.batched import build_batched
from aggregation.probes import evenly_spaced
from aggregation.statistics import reestimated
from node.merging import ROUND, build_rules, make_receiver, merge_usable, rehearse, rule_error
from node.optimizers import make_optimizer
from node.partition import Indices
from node.randomness import RoundStreams, torch_seed
from node.settings import TrainingSettings
from node.tasks import Task, build_model, classification_metrics, initial_params, restricted
from node.training import EVALUATION_BATCH, batch_indices, diverged, evaluate, train_on
from node.weights import schema_hash, schema_of
from protocols.errors import ConfigError, LocalError
from protocols.scalar_terms import ScalarSettings
from protocols.vocabulary import one_line
from sim.calibration import (
    NEVER,
    NUM_PLAIN,
    TOLERANCE,
    Choice,
    compare,
    disagreement,
    tile_size,
)
from sim.orders import Begin, Estimate, Measure, Merge, Replay, Train
from sim.rows import Rows, Tile
from sim.scalar_engine import ScalarPart
from sim.scenarios import ComputeSettings

Spec = str | Mapping[str, Any]
T = TypeVar("T")

TRIAL = TrainingSettings(local_steps=1, learning_rate=1.0)
"""One step from which the gradient itself is read: a longer round would magnify rounding."""
TIMED_STEPS = 2
"""Of a round, when batched and plain are timed."""
_ALL_THREADS = torch.get_num_threads()
LARGE_US = 500.0
"""Of a model's round, from which more threads are tried: its events take some 100."""
CALIBRATION = 2048
"""Training samples at most on which the statistics of a mean of models are re-estimated."""
WORTH_IT = 1.2
"""How many times faster all threads have to be."""


class LocalEngine:
    """An `Engine` for one task.

    task: with all training samples; parts: which of them each node has.
    rule: as for `aggregation.rules.build`.
    names: each node's name in its random streams, which is its peer id.
    final_rule: of the merge after the last round; None where there is none.
    held_out: the training samples by which each node judges models, where a rule does; none of them is in `parts`.
    scalars: where nodes learn by them; base: what then stands for the model that all begin with.
    Raises ConfigError for a device that is not there, and where `batching` is "always" and cannot be.
    """

    def __init__(
        self,
        task: Task,
        parts: Sequence[Indices],
        training: TrainingSettings,
        rule: Sequence[Spec],
        seed: int,
        compute: ComputeSettings,
        names: Sequence[str],
        *,
        final_rule: Sequence[Spec] | None = None,
        held_out: Sequence[Indices] | None = None,
        scalars: ScalarSettings | None = None,
        base: bytes = b"",
    ) -> None:
        assert len(parts) == len(names)
        torch.set_num_threads(compute.threads or 1)
        self._device = _find_device(compute.device)
        probe = None if task.probe is None else task.probe.to(self._device)
        self._task = replace(task, train=self._moved(task.train), test=self._moved(task.test), probe=probe)
        self._names, self._training, self._seed, self._compute = names, training, seed, compute
        self._model = build_model(task).to(self._device)
        self._rows = Rows(initial_params(task, seed), self._device)
        self._streams = RoundStreams(seed, names, "batches")
        self._sizes = np.array([len(part) for part in parts], dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._parts = np.concatenate(parts)
        self._own_parts, self._held_out = parts, held_out
        self._rules = build_rules(
            rule, final_rule, judges_final=final_rule is not None and held_out is not None
        )
        self._rule_states: dict[tuple[int, str], tuple[int, Any]] = {}
        self._receivers: dict[int, Receiver] = {}
        if receiver := self._receiver(0):
            try:
                rehearse(self._rules, initial_params(self._task, seed), receiver)
            except ValueError as error:
                raise rule_error(error, table="") from error
        is_plain_float = all(
            dtype == torch.float32 or not dtype.is_floating_point for dtype in self._rows.layout
        )
        slices = self._rows.layout.get(torch.float32, [])
        self._batched_rule = build_batched(rule, slices) if is_plain_float and slices else None
        self._scalars: ScalarPart | None = None
        if scalars is not None:
            self._scalars = ScalarPart(
                self._task, self._model, self._rows, names, parts, scalars, training, seed, base, compute
            )
        if compute.batching != "never":
            # Now, and not amid the run: the first batched step loads much of torch.
            if scalars is None:
                self._choose_threads()
            _ = self._measure_choice

    # --- rows -------------------------------------------------------------------------------------------
    def reserve(self, num_rows: int) -> None:
        self._rows.reserve(num_rows)

    def begin(self, orders: Sequence[Begin]) -> None:
        first_with: dict[int, int] = {}
        for row, seed in orders:
            if seed in first_with:
                self._rows.copy(first_with[seed], row)
            else:
                self._rows.put(row, initial_params(self._task, seed))
                first_with[seed] = row
            if self._scalars is not None:
                self._scalars.begin(row)

    def params(self, row: int) -> Params:
        """A copy of one model, on the CPU."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._rows.params(row).items()}

    def export(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """[models, bytes of one]: copies, to the bit, for `import_` of an engine of the same scenario elsewhere."""
        return self._rows.export(self._index(rows))

    def import_(self, rows: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Fill rows with models that another engine exported, in their order."""
        self._rows.import_(self._index(rows), data)

    def consensus(self, rows: Sequence[int]) -> float:
        """Over all floating tensors, in float64."""
        if not rows:
            return 0.0
        chosen, squares = self._index(rows), 0.0
        for matrix in self._rows.matrices.values():
            # In slices of columns: no more than one tile of float64 at a time.
            width = max(1, 4_000_000 // len(rows))
            for columns in torch.split(matrix, width, dim=1) if matrix.is_floating_point() else ():
                models = columns.index_select(0, chosen).double()
                squares += float((models - models.mean(0)).square().sum())
        return float((squares / len(rows)) ** 0.5)

    def merged(self, rows: Sequence[int]) -> dict[str, float]:
        """The mean of floating tensors in float64, all models alike; BatchNorm's statistics re-estimated on training
        samples of all nodes, always the same (arXiv 2507.06542, `avg_model_test_accuracy`)."""
        if not rows:
            return {}
        chosen, mean = self._index(rows), self._rows.gather(self._index(rows[:1]))
        width = max(1, 4_000_000 // len(rows))  # as above
        for dtype, matrix in self._rows.matrices.items():
            if dtype.is_floating_point:
                slices = zip(
                    torch.split(matrix, width, dim=1), torch.split(mean[dtype], width, dim=1), strict=True
                )
                for columns, into in slices:
                    into.copy_(columns.index_select(0, chosen).double().mean(0))
        try:
            params = reestimated(self._model, _first(self._rows.views(mean)), self._calibration)
            return evaluate(self._task, params, model=self._model)
        except Exception:  # a user's model or metrics may raise anything
            return {}

    @cached_property
    def _calibration(self) -> Tensor:
        places = self._parts[evenly_spaced(len(self._parts), CALIBRATION).numpy()]
        return self._task.train[0].index_select(0, self._index(places))

    def describe(self) -> dict[str, object]:
        """What was chosen, and by which measured times."""
        choices: dict[str, object] = {}
        for kind in ("train", "measure"):
            choice: Choice | None = self.__dict__.get(f"_{kind}_choice")
            if choice is not None:
                shown = {"batched": choice.batched_from != NEVER, **msgspec.to_builtins(choice)}
                choices[kind] = {key: value for key, value in shown.items() if value not in (None, NEVER)}
        return {
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "batching": self._compute.batching,
            "parameters": sum(tensor.numel() for tensor in self._model.state_dict().values()),
            **choices,
            **(self._scalars.describe() if self._scalars is not None else {}),
            "merge": {"batched": self._merges_in_batches, "tile": self._merge_tile},
        }

    def close(self) -> None:
        """Give the memory back."""
        self._rows.matrices.clear()
        self._rule_states.clear()
        self._receivers.clear()

    # --- training ---------------------------------------------------------------------------------------
    def train(self, orders: Sequence[Train]) -> list[str]:
        answers = [""] * len(orders)
        if not orders:
            return answers
        # [orders, 4]: row, source, node, round
        table = np.fromiter(chain.from_iterable(orders), np.int64, 4 * len(orders)).reshape(-1, 4)
        sizes = self._sizes[table[:, 2]]
        batches = np.minimum(sizes, self._training.batch_size)
        by_size = np.argsort(sizes, kind="stable")
        for batch in np.unique(batches):
            group = by_size[batches[by_size] == batch]
            for places in _tiles(group, self._train_choice.tile):
                if not (self._train_choice.batches(len(places)) and self._train_tile(table, places, answers)):
                    self._train_one_by_one(table, places, answers)
        return answers

    def _train_tile(self, table: NDArray[np.int64], places: NDArray[np.int64], answers: list[str]) -> bool:
        """False where it raised, and nothing is written: one bad sample fails a whole call, but only one node."""
        rows, sources, nodes, rounds = table[places].T
        tile = self._rows.gather(self._index(sources))
        try:
            self._batched_round(tile, nodes, rounds, self._training)
        except Exception:  # a user's model or loss may raise anything; the plain loop says what, and for whom
            return False
        insane = self._rows.insane(tile)
        for i, name in insane.items():
            answers[places[i]] = _failure(diverged(int(rounds[i]), name, self._training))
            self._rows.take_back(tile, i, int(sources[i]))
        self._rows.scatter(self._index(rows), tile)
        return True

    def _train_one_by_one(
        self, table: NDArray[np.int64], places: NDArray[np.int64], answers: list[str]
    ) -> None:
        for place, (row, source, node, round_) in zip(places.tolist(), table[places].tolist(), strict=True):
            try:
                trained = self._plain_round(self._rows.params(source), node, round_, self._training)
            except Exception as error:  # as above
                answers[place] = _failure(error)
                self._rows.copy(source, row)
            else:
                self._rows.put(row, trained)

    def _plain_round(self, params: Params, node: int, round_: int, settings: TrainingSettings) -> Params:
        masks = torch_seed(self._seed, self._names[node], "train", round_)
        if self._device.type == "cuda":
            torch.cuda.manual_seed_all(masks)
        (samples,) = self._samples(np.array([node]), np.array([round_]), settings)
        return train_on(self._task, params, settings, samples, round=round_, masks=masks, model=self._model)

    def _batched_round(
        self, tile: Tile, nodes: NDArray[np.int64], rounds: NDArray[np.int64], settings: TrainingSettings
    ) -> None:
        """Train every model of the tile in place, each on its node's samples; all have one size of batch."""
        inputs, targets = self._task.train
        samples = torch.from_numpy(self._samples(nodes, rounds, settings)).to(self._device)
        views = self._rows.views(tile)
        moving = {name: views.pop(name) for name in self._reached}
        # Whole tensors: of columns batch_norm takes a copy, and what it writes there is lost.
        buffers = {name: views[name].clone() for name, _ in self._model.named_buffers() if name in views}
        rest = views | buffers
        optimizer = make_optimizer(list(moving.values()), settings)
        self._model.train()
        for step in range(samples.shape[1]):
            batch = samples[:, step]
            gradients = self._gradients(moving, rest, _rows_at(inputs, batch), _rows_at(targets, batch))
            optimizer.step([gradients[name] for name in moving])
        for name, buffer in buffers.items():
            views[name].copy_(buffer)

    @cached_property
    def _gradients(self) -> Callable[..., dict[str, Tensor]]:
        """(moving, rest, inputs, targets), each with the models first -> the gradients of `moving`."""

        def loss(moving: Params, rest: Params, inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = functional_call(self._model, {**moving, **rest}, (inputs,))
            return self._task.loss(outputs, targets)

        # The gradient taken inside of vmap comes in the layout of its weight; outside it comes transposed.
        gradients: Callable[..., dict[str, Tensor]] = vmap(grad(loss), randomness="error")
        return gradients

    @cached_property
    def _reached(self) -> list[str]:
        """The parameters that the loss depends on; the others are left alone, as by the plain loop."""
        inputs, targets = self._task.train
        weights = {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}
        batch = torch.from_numpy(self._samples(*self._trial_places(1), self._training)[0, 0]).to(self._device)
        self._model.train()
        with torch.enable_grad():
            loss = self._task.loss(self._model(inputs.index_select(0, batch)), targets.index_select(0, batch))
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return [name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None]

    def _samples(
        self, nodes: NDArray[np.int64], rounds: NDArray[np.int64], settings: TrainingSettings
    ) -> NDArray[np.int64]:
        """[nodes, steps, batch]: indices into all training samples. All nodes have one size of batch."""
        sizes = self._sizes[nodes]
        batch = min(settings.batch_size, int(sizes[0]))
        own = np.empty((len(nodes), settings.local_steps, batch), dtype=np.int64)
        for size in np.unique(sizes):
            same = np.flatnonzero(sizes == size)
            places = list(zip(nodes[same].tolist(), rounds[same].tolist(), strict=True))
            own[same] = batch_indices(self._streams, places, int(size), settings)
        return self._parts[own + self._starts[nodes, None, None]]

    # --- merging ----------------------------------------------------------------------------------------
    @property
    def _merges_in_batches(self) -> bool:
        return self._batched_rule is not None and self._compute.batching != "never"

    @cached_property
    def _merge_tile(self) -> int:
        # Much is shared between merges of one call, and read once: tiles as large as memory bears.
        return self._compute.tile or 4 * tile_size(self._rows.bytes_per_row, 1 << 30, self._device.type)

    def merge(self, orders: Sequence[Merge]) -> list[str]:
        answers: list[str] = []
        for tile in _tiles(orders, self._merge_tile):
            together = self._merges_in_batches and all(order.rule == ROUND for order in tile)
            merged = self._merge_together(tile) if together else None
            answers += [self._merge_one(order) for order in tile] if merged is None else merged
        return answers

    def _merge_together(self, orders: Sequence[Merge]) -> list[str] | None:
        """None where a weight is out of its range, and nothing is written: one by one it is clear whose."""
        assert self._batched_rule is not None
        rows, own_rows, _, inputs, *_ = zip(*orders, strict=True)
        received = list(chain.from_iterable(inputs))
        received_rows, weights, staleness, _ = zip(*received, strict=True) if received else ((),) * 4
        wide = torch.tensor(weights, dtype=torch.float64, device=self._device)
        if not bool(((wide > 0) & (wide < torch.inf)).all()):
            return None
        owner = np.repeat(np.arange(len(orders)), [len(one) for one in inputs])
        own = self._index(own_rows)
        tile = {
            dtype: matrix.index_select(0, own)
            for dtype, matrix in self._rows.matrices.items()
            if dtype != torch.float32
        }
        tile[torch.float32] = self._batched_rule(
            self._rows.matrices[torch.float32],
            own,
            self._index(received_rows),
            self._index(owner),
            wide,
            self._index(staleness),
        )
        answers = [""] * len(orders)
        for i, name in self._rows.insane(tile).items():
            answers[i] = _failure(_overgrown(name))
            self._rows.take_back(tile, i, own_rows[i])
        self._rows.scatter(self._index(rows), tile)
        return answers

    def _receiver(self, node: int) -> Receiver | None:
        """Kept: rules ask for the same samples in every round. None where no rule asks for any."""
        if node not in self._receivers and any(rule.needs for rule in self._rules.values()):
            own = restricted(self._task, self._own_parts[node])
            held_out = None if self._held_out is None else self._held_out[node]
            validation = None if held_out is None else restricted(self._task, held_out).train
            self._receivers[node] = make_receiver(own, self._model, validation)
        return self._receivers.get(node)

    def _merge_one(self, order: Merge) -> str:
        """As the daemon's `node.compute.Work` does."""
        try:
            # Copies: what a rule remembers must not change when the row is used again.
            own = self._rows.views(self._rows.gather(self._index([order.own])))
            local = Local(
                _first(own), weight=order.own_weight, source="own", receiver=self._receiver(order.node)
            )
            contributions = [
                Contribution(
                    _first(self._rows.views(self._rows.gather(self._index([item.row])))),
                    weight=item.weight,
                    staleness=item.staleness,
                    source=item.peer,
                )
                for item in order.inputs
            ]
            rule, key = self._rules[order.rule], (order.node, order.rule)
            life, state = self._rule_states.get(key, (order.life, None))
            if state is None or life != order.life:
                state = rule.init(local.params)
            params, state, _ = merge_usable(rule, contributions, state, local)
            self._rule_states[key] = (order.life, state)
            self._rows.put(order.row, params)
            insane = self._rows.insane(self._rows.gather(self._index([order.row])))
            if insane:
                self._rows.put(order.row, local.params)
                return _failure(_overgrown(insane[0]))
        except Exception as error:  # a failure is an answer
            self._rows.copy(order.own, order.row)
            return _failure(error)
        return ""

    # --- scalars ----------------------------------------------------------------------------------------
    def estimate(self, orders: Sequence[Estimate]) -> list[str]:
        assert self._scalars is not None, "nodes exchange models"
        return self._scalars.estimate(orders)

    def replay(self, orders: Sequence[Replay]) -> list[str]:
        assert self._scalars is not None, "nodes exchange models"
        return self._scalars.replay(orders)

    # --- measuring --------------------------------------------------------------------------------------
    def measure(self, orders: Sequence[Measure]) -> list[dict[str, float]]:
        """Where measuring raises the answer is {}. A model that many nodes have is measured once."""
        rows = list(dict.fromkeys(order.row for order in orders))
        found: dict[int, dict[str, float]] = {}
        for tile in _tiles(rows, self._measure_choice.tile) if rows else ():
            measured = self._measure_together(tile) if self._measure_choice.batches(len(tile)) else None
            answers = [self._measure_one(row) for row in tile] if measured is None else measured
            found.update(zip(tile, answers, strict=True))
        return [found[order.row] for order in orders]

    def _measure_together(self, rows: Sequence[int]) -> list[dict[str, float]] | None:
        """None where it raised: one by one it is clear on whose model."""
        try:
            return self._measure_tile(self._rows.gather(self._index(rows)))
        except Exception:  # a user's model or metrics may raise anything
            return None

    def _measure_one(self, row: int) -> dict[str, float]:
        try:
            return evaluate(self._task, self._rows.params(row), model=self._model)
        except Exception:  # as above
            return {}

    @torch.no_grad()
    def _measure_tile(self, tile: Tile) -> list[dict[str, float]]:
        targets = self._task.test[1]
        outputs = self._outputs(tile, self._task.test[0])
        losses = vmap(self._task.loss, in_dims=(0, None))(outputs, targets).tolist()
        if self._task.metrics is classification_metrics:
            right = (outputs.argmax(-1) == targets).float().flatten(1).mean(1)
            metrics = [{"accuracy": share} for share in right.tolist()]
        else:
            metrics = [self._task.metrics(output, targets) for output in outputs]
        return [
            {**{str(name): float(value) for name, value in values.items()}, "loss": loss}
            for values, loss in zip(metrics, losses, strict=True)
        ]

    @torch.no_grad()
    def _outputs(self, tile: Tile, inputs: Tensor) -> Tensor:
        """[models, samples, ...]"""

        def forward(params: Params, chunk: Tensor) -> Tensor:
            outputs: Tensor = functional_call(self._model, params, (chunk,))
            return outputs

        self._model.eval()
        views, batched = self._rows.views(tile), vmap(forward, in_dims=(0, None), randomness="error")
        return torch.cat([batched(views, chunk) for chunk in torch.split(inputs, EVALUATION_BATCH)], dim=1)

    # --- choosing ---------------------------------------------------------------------------------------
    def _choose_threads(self) -> None:
        """One, so that events have the other cores; all where one round of a model takes much longer than its events."""
        alone = self._train_choice
        alone_us = self._round_us(alone)
        if self._compute.threads is not None or _ALL_THREADS == 1 or alone_us < LARGE_US:
            return
        del self._train_choice
        torch.set_num_threads(_ALL_THREADS)
        if self._round_us(self._train_choice) * WORTH_IT > alone_us:
            torch.set_num_threads(1)
            self._train_choice = alone

    def _round_us(self, choice: Choice) -> float:
        """One round of one model, as far as it was measured."""
        measured = [us for us in (choice.plain_us, choice.batched_us) if us]
        steps = self._training.local_steps
        return min(measured, default=0.0) * steps / min(TIMED_STEPS, steps)

    @cached_property
    def _train_choice(self) -> Choice:
        settings = self._training
        batch = min(settings.batch_size, int(self._sizes.max()))
        tile = self._tile_for(batch, self._task.train[0])

        def run_plain(num_models: int, settings: TrainingSettings) -> list[Params]:
            nodes, rounds = self._trial_places(num_models)
            models = self._trial_models(num_models)
            return [
                self._plain_round(_at(models, i), int(nodes[i]), int(rounds[i]), settings)
                for i in range(num_models)
            ]

        def run_batched(num_models: int, settings: TrainingSettings) -> Params:
            trained = self._trial_tile(num_models)
            self._batched_round(trained, *self._trial_places(num_models), settings)
            return self._rows.views(trained)

        def trial() -> float:
            step = msgspec.structs.replace(TRIAL, batch_size=batch)
            batched = run_batched(NUM_PLAIN, step)
            return max(
                disagreement(tensor, batched[name][i])
                for i, params in enumerate(run_plain(NUM_PLAIN, step))
                for name, tensor in params.items()
            )

        short = msgspec.structs.replace(settings, local_steps=min(TIMED_STEPS, settings.local_steps))
        return self._choose(
            ("train", batch, short),
            tile,
            trial,
            lambda num_models: _ignored(run_plain(num_models, short)),
            lambda num_models: _ignored(run_batched(num_models, short)),
        )

    @cached_property
    def _measure_choice(self) -> Choice:
        inputs = self._task.test[0]
        tile = self._tile_for(min(EVALUATION_BATCH, len(inputs)), inputs)

        def run_plain(num_models: int) -> list[dict[str, float]]:
            models = self._trial_models(num_models)
            return [evaluate(self._task, _at(models, i), model=self._model) for i in range(num_models)]

        def run_batched(num_models: int) -> list[dict[str, float]]:
            return self._measure_tile(self._trial_tile(num_models))

        def trial() -> float:
            some = inputs[:EVALUATION_BATCH]
            batched, models = self._outputs(self._trial_tile(NUM_PLAIN), some), self._trial_models(NUM_PLAIN)
            distances = []
            for i in range(NUM_PLAIN):
                self._model.load_state_dict(_at(models, i))
                self._model.eval()
                with torch.no_grad():
                    distances.append(disagreement(self._model(some), batched[i]))
            losses = zip(run_plain(NUM_PLAIN), run_batched(NUM_PLAIN), strict=True)
            distances += [
                disagreement(torch.tensor(plain["loss"]), torch.tensor(both["loss"]))
                for plain, both in losses
            ]
            return max(distances)

        return self._choose(
            ("measure", len(inputs), None),
            tile,
            trial,
            lambda num_models: _ignored(run_plain(num_models)),
            lambda num_models: _ignored(run_batched(num_models)),
        )

    def _choose(
        self,
        what: tuple[str, int, TrainingSettings | None],
        tile: int,
        trial: Callable[[], float],
        run_plain: Callable[[int], None],
        run_batched: Callable[[int], None],
    ) -> Choice:
        """By setting, by whether a batched call gives what the plain loop gives, and by which is faster."""
        if self._compute.batching == "never":
            return Choice(tile, NEVER, "compute.batching is never")
        problem = self._problem(trial)
        if problem and self._compute.batching == "always" and what[0] == "train":
            raise ConfigError("compute.batching", f"always: {problem}", ["auto", "never"])
        if problem:
            return Choice(tile, NEVER, problem)
        if self._compute.batching == "always":
            return Choice(tile, 1, "compute.batching is always")
        schema = schema_hash(self._task.name, schema_of(self._model))
        key = (*what, schema, tile, str(self._device), torch.get_num_threads())
        return compare(key, tile, run_plain, run_batched)

    def _problem(self, trial: Callable[[], float]) -> str:
        """Why models cannot be computed together; "" where they can."""
        if len(list(self._model.parameters())) < len(
            list(self._model.named_parameters(remove_duplicate=False))
        ):
            return "two names share one parameter"
        try:
            distance = trial()
        except Exception as error:  # what vmap cannot do it says in many ways
            return _failure(error)
        return "" if distance <= TOLERANCE else f"differs from one by one by {distance:.1e}"

    def _tile_for(self, batch: int, inputs: Tensor) -> int:
        data_bytes = batch * inputs[:1].numel() * inputs.element_size()
        fitting = tile_size(self._rows.bytes_per_row + data_bytes, len(self._names), self._device.type)
        return self._compute.tile or fitting

    @cached_property
    def _trial_rows(self) -> Rows:
        rows = Rows(initial_params(self._task, self._seed), self._device)
        rows.reserve(NUM_PLAIN)
        for row in range(NUM_PLAIN):
            rows.put(row, initial_params(self._task, self._seed + row))
        return rows

    def _trial_tile(self, num_models: int) -> Tile:
        return self._trial_rows.gather(self._index(np.arange(num_models) % NUM_PLAIN))

    def _trial_models(self, num_models: int) -> Params:
        return self._rows.views(self._trial_tile(num_models))

    def _trial_places(self, num_models: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Nodes, of those with the largest batch, and rounds."""
        batches = np.minimum(self._sizes, self._training.batch_size)
        return np.resize(np.flatnonzero(batches == batches.max()), num_models), np.arange(num_models)

    # --- small things -----------------------------------------------------------------------------------
    def _index(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self._device)

    def _moved(self, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return data[0].to(self._device), data[1].to(self._device)


def _find_device(name: str) -> torch.device:
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    allowed = ["auto", *there, *(["cuda"] if len(there) > 1 else [])]
    if name not in allowed:
        raise ConfigError("compute.device", f"there is no `{name}` here", allowed)
    return torch.device(wanted)


def _tiles(items: Sequence[T] | NDArray[Any], size: int) -> Iterator[Any]:
    """Nearly equal runs of at most `size` items: a short last one would cost as much as a full one."""
    num_tiles = -(-len(items) // size)
    for i in range(num_tiles):
        yield items[i * len(items) // num_tiles : (i + 1) * len(items) // num_tiles]


def _rows_at(data: Tensor, samples: Tensor) -> Tensor:
    """[models, batch, ...] of the samples [models, batch]."""
    return data.index_select(0, samples.reshape(-1)).view(*samples.shape, *data.shape[1:])


def _at(models: Params, index: int) -> Params:
    return {name: tensor[index] for name, tensor in models.items()}


def _first(models: Params) -> Params:
    return _at(models, 0)


def _failure(error: Exception) -> str:
    """In the words of the daemon's `WorkFailed`."""
    return one_line(f"{type(error).__name__}: {error}")


def _overgrown(name: str) -> LocalError:
    return LocalError(f"merging made {name} non-finite")


def _ignored(_result: object) -> None:
    """Timed for its own sake."""
