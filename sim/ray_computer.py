"""One large scenario's computing on the machines of a Ray cluster, the event loop staying here.

Belongs here: which node's models are held by which actor, and what has to move between them. Every actor makes the whole
engine from the scenario itself, so that no data travels; it holds the models that its nodes made, and those of another
actor's nodes only for the step that reads them. The wire is orders in MessagePack, and models as arrays of bytes that go
from actor to actor and never through this process.
"""

import itertools
import math
import platform
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from protocols.errors import ConfigError, LocalError
from protocols.vocabulary import one_line
from sim.learning import Facts, MakeComputer, make_engine
from sim.orders import Answers, Begin, Computer, Measure, Merge, MergeInput, Program, Train
from sim.other_process import Ready, Refused
from sim.ray_cluster import ray_at
from sim.scenario_files import convert
from sim.scenarios import Scenario

if TYPE_CHECKING:
    from sim.engine import LocalEngine

PLACED_WITHIN_S = 120.0
"""For the cluster to find room for all actors."""
DESCRIBED_WITHIN_S = 10.0
"""For an actor to say what it chose; it may be amid a program where a run was broken off."""
NODES_PER_ACTOR = 32
"""At least, unless the number of actors is given: with fewer a step's batches are too small to be worth the messages."""
_EVERYWHERE = "the same covey, task and data files on every machine of the cluster"


class Job(Struct, array_like=True):
    """What one shard does in one step. Rows are its own.

    num_rows: that it needs room for.
    imports: for each block of models that comes along, the rows it fills.
    comparisons: as in a program, each with the rows that this shard holds of it.
    merged: as in a program.
    """

    num_rows: int = 0
    imports: list[list[int]] = []
    begins: list[Begin] = []
    trains: list[Train] = []
    merges: list[Merge] = []
    measures: list[Measure] = []
    comparisons: list[list[int]] = []
    merged: list[list[int]] = []


class Spread(NamedTuple):
    """Some models of one comparison: how many, their distance to their own mean, and that mean, float64 [P]."""

    num_models: int
    distance: float
    mean: NDArray[np.float64]


class Done(NamedTuple):
    """What came of a job. failures: by place among its trainings and then its merges."""

    failures: list[tuple[int, str]]
    metrics: list[dict[str, float]]
    spreads: list[Spread]
    merged: list[dict[str, float]]


class Part(Struct):
    """One shard's part in a step, as its planner sees it.

    moves: from which other shards it needs models first: their rows there, and those that they fill here.
    orders: of every training and merge its place in the program and its node.
    measures, means: of every measurement and every mean its place in the program.
    """

    shard: int
    job: Job = msgspec.field(default_factory=Job)
    moves: dict[int, tuple[list[int], list[int]]] = {}
    orders: list[tuple[int, int]] = []
    measures: list[int] = []
    means: list[int] = []


# --- planning -------------------------------------------------------------------------------------------
class Sharding:
    """Cuts programs into the parts of shards, and keeps where each row is.

    A node belongs to one shard for the whole run, neighbours by number to the same one: what a rule remembers stays
    with it, and on a ring or behind a partition little moves. A model is where the order that made it was done.

    A model just begun is nowhere: whoever reads it begins it for itself, as its seed says all.
    """

    def __init__(self, num_shards: int, num_nodes: int) -> None:
        self.num_shards, self._num_nodes = num_shards, num_nodes
        self.num_moved = 0
        """Models sent from one shard to another so far."""
        self._seeds: dict[int, int] = {}
        self._places: dict[int, tuple[int, int]] = {}
        """Of a program's row: the shard and its row there."""
        self._free: list[list[int]] = [[] for _ in range(num_shards)]
        self._num_rows = [0] * num_shards
        # Of the step that is being planned.
        self._parts: list[Part] = []
        self._borrowed: dict[tuple[int, int], int] = {}

    def shard_of(self, node: int) -> int:
        return node * self.num_shards // self._num_nodes

    def split(self, program: Program) -> list[list[Part]]:
        """Of each step the parts of those shards that have one, and at the end what is measured.

        All exports of a step come before all of its jobs.
        """
        places = itertools.count()
        steps = []
        for begins, trains, merges, _, _ in program.steps:
            self._open()
            for begin in begins:
                self._leave(begin.row)
                self._seeds[begin.row] = begin.seed
            for train in trains:
                part = self._parts[self.shard_of(train.node)]
                source = self._read(train.source, part)
                part.job.trains.append(train._replace(row=self._write(train.row, part), source=source))
                part.orders.append((next(places), train.node))
            for merge in merges:
                part = self._parts[self.shard_of(merge.node)]
                own = self._read(merge.own, part)
                inputs = tuple(
                    [
                        MergeInput(self._read(row, part), w, stale, peer)
                        for row, w, stale, peer in merge.inputs
                    ]
                )
                part.job.merges.append(
                    merge._replace(row=self._write(merge.row, part), own=own, inputs=inputs)
                )
                part.orders.append((next(places), merge.node))
            steps.append(self._close())
        self._open()
        for place, measure in enumerate(program.measures):
            part = self._holder(measure.row)
            part.job.measures.append(measure._replace(row=self._read(measure.row, part)))
            part.measures.append(place)
        for rows in program.comparisons:
            for part in self._parts:
                part.job.comparisons.append([])
            for row in rows:
                part = self._holder(row)
                part.job.comparisons[-1].append(self._read(row, part))
        for place, rows in enumerate(program.merged):
            # One shard gets all of them: a mean is measured as a whole.
            part = self._holder(rows[0])
            part.job.merged.append([self._read(row, part) for row in rows])
            part.means.append(place)
        return [*steps, self._close()]

    def _open(self) -> None:
        self._parts = [Part(shard) for shard in range(self.num_shards)]

    def _close(self) -> list[Part]:
        """Only now may other models have the rows of the borrowed ones."""
        for (shard, _), own in self._borrowed.items():
            self._free[shard].append(own)
        self._borrowed.clear()
        for part in self._parts:
            part.job.num_rows = self._num_rows[part.shard]
            part.job.imports = [ours for _, ours in part.moves.values()]
        return [
            part
            for part in self._parts
            if part.orders or part.measures or part.means or any(part.job.comparisons)
        ]

    def _holder(self, row: int) -> Part:
        shard, _ = self._places.get(row, (row % self.num_shards, 0))
        return self._parts[shard]

    def _read(self, row: int, part: Part) -> int:
        """Its row on this shard, where it is by the time the job's orders are done."""
        home = self._places.get(row)
        if home is not None and home[0] == part.shard:
            return home[1]
        if (part.shard, row) in self._borrowed:
            return self._borrowed[part.shard, row]
        own = self._take(part.shard)
        if row in self._seeds:
            part.job.begins.append(Begin(own, self._seeds[row]))
        if home is None:
            assert row in self._seeds, f"row {row} was never written"
            self._places[row] = part.shard, own
            return own
        self._borrowed[part.shard, row] = own
        if row not in self._seeds:
            shard, there = home
            theirs, ours = part.moves.setdefault(shard, ([], []))
            theirs.append(there)
            ours.append(own)
            self.num_moved += 1
        return own

    def _write(self, row: int, part: Part) -> int:
        self._seeds.pop(row, None)
        home = self._places.get(row)
        if home is not None and home[0] == part.shard:
            return home[1]
        self._leave(row)
        own = self._take(part.shard)
        self._places[row] = part.shard, own
        return own

    def _leave(self, row: int) -> None:
        """Free at once: if this step reads it, then by an export to its new home, and exports come before jobs."""
        home = self._places.pop(row, None)
        if home is not None:
            self._free[home[0]].append(home[1])

    def _take(self, shard: int) -> int:
        if self._free[shard]:
            return self._free[shard].pop()
        self._num_rows[shard] += 1
        return self._num_rows[shard] - 1


def overall_distance(spreads: Sequence[Spread]) -> float:
    """The consensus distance of all models together: squares within each group, and those between the groups' means.

    That is exact, and in float64 as good as taking the mean of all first: nothing large is subtracted.
    """
    num_models = sum(spread.num_models for spread in spreads)
    if not num_models:
        return 0.0
    mean = sum(spread.num_models / num_models * spread.mean for spread in spreads)
    squares = sum(
        spread.num_models * (spread.distance**2 + float(np.square(spread.mean - mean).sum()))
        for spread in spreads
    )
    return math.sqrt(squares / num_models)


# --- an actor -------------------------------------------------------------------------------------------
class Actor:
    """One shard, which Ray makes an actor of: its calls are done one by one, in the order in which they were sent."""

    def __init__(self) -> None:
        self._engine: LocalEngine | None = None
        self._decoder = msgspec.msgpack.Decoder(Job)

    @property
    def engine(self) -> "LocalEngine":
        assert self._engine is not None, "start comes first"
        return self._engine

    def start(self, scenario: dict[str, Any], base: str) -> tuple[str, Ready | Refused]:
        """Make the engine, from this machine's files. The first answer is this machine's name."""
        here = platform.node()
        try:
            chosen = convert(scenario)
            file, colon, _ = chosen.data.task.rpartition(":")
            if colon and not (Path(base) / file).is_file():
                raise ConfigError("--ray", f"{here} has no task file {Path(base) / file}", [_EVERYWHERE])
            self._engine, facts = make_engine(chosen, Path(base))
        except ConfigError as error:
            return here, Refused(error.path, error.problem, error.allowed)
        return here, Ready(facts)

    def export(self, rows: list[int]) -> NDArray[np.uint8]:
        """As `LocalEngine.export`."""
        return self.engine.export(rows)

    def do(self, message: bytes, *blocks: NDArray[np.uint8]) -> Done:
        """Do a job in MessagePack. blocks: the models of its imports."""
        job = self._decoder.decode(message)
        engine = self.engine
        engine.reserve(job.num_rows)
        for rows, block in zip(job.imports, blocks, strict=True):
            engine.import_(rows, block)
        engine.begin(job.begins)
        details = engine.train(job.trains) + engine.merge(job.merges)
        return Done(
            failures=[(place, detail) for place, detail in enumerate(details) if detail],
            metrics=engine.measure(job.measures),
            spreads=[self._spread(rows) for rows in job.comparisons],
            merged=[engine.merged(rows) for rows in job.merged],
        )

    def describe(self) -> dict[str, object]:
        """As `Engine.describe`."""
        return self.engine.describe()

    def _spread(self, rows: list[int]) -> Spread:
        total = np.zeros(0)
        for number, row in enumerate(rows):
            tensors = self.engine.params(row).values()
            flat = np.concatenate(
                [tensor.double().flatten().numpy() for tensor in tensors if tensor.is_floating_point()]
                or [np.zeros(0)]
            )
            total = total + flat if number else flat
        return Spread(len(rows), self.engine.consensus(rows), total / max(1, len(rows)))


# --- here -----------------------------------------------------------------------------------------------
class RayComputer:
    """A `Computer` on actors.

    ray: the module, connected.
    actors: handles of a started `Actor` for each shard.
    place: where they are, for the operator.
    leave: ends them.
    """

    def __init__(
        self, ray: Any, actors: Sequence[Any], num_nodes: int, place: dict[str, int], leave: ExitStack
    ) -> None:
        self._ray, self._actors, self._place, self._leave = ray, actors, place, leave
        self._sharding = Sharding(len(actors), num_nodes)
        self._encoder = msgspec.msgpack.Encoder()
        self._under_way: deque[tuple[Program, list[Part], list[Any]]] = deque()

    def submit(self, program: Program) -> None:
        """Send everything at once. Ray keeps each actor's calls in order, and holds one back until its blocks are there."""
        parts: list[Part] = []
        answers: list[Any] = []
        for step in self._sharding.split(program):
            blocks = [
                [self._actors[shard].export.remote(rows) for shard, (rows, _) in part.moves.items()]
                for part in step
            ]
            for part, needed in zip(step, blocks, strict=True):
                message = self._encoder.encode(part.job)
                answers.append(self._actors[part.shard].do.remote(message, *needed))
            parts += step
        self._under_way.append((program, parts, answers))

    def answers(self) -> Answers:
        """Raises LocalError where an actor is lost."""
        program, parts, answers = self._under_way.popleft()
        found: list[Done] = _get(self._ray, answers)
        failures: list[tuple[int, int, str]] = []
        metrics: list[dict[str, float]] = [{}] * len(program.measures)
        spreads: list[list[Spread]] = [[] for _ in program.comparisons]
        merged: list[dict[str, float]] = [{}] * len(program.merged)
        for part, done in zip(parts, found, strict=True):
            failures += [(*part.orders[place], detail) for place, detail in done.failures]
            for place, measured in zip(part.measures, done.metrics, strict=True):
                metrics[place] = measured
            for place, measured in zip(part.means, done.merged, strict=True):
                merged[place] = measured
            for index, spread in enumerate(done.spreads):
                if spread.num_models:
                    spreads[index].append(spread)
        return Answers(
            failures=[(node, detail) for _, node, detail in sorted(failures)],
            metrics=metrics,
            distances=[overall_distance(groups) for groups in spreads],
            merged=merged,
        )

    def describe(self) -> dict[str, object]:
        """With what the first actor chose; the others choose by themselves, perhaps otherwise."""
        try:
            chosen = self._ray.get(self._actors[0].describe.remote(), timeout=DESCRIBED_WITHIN_S)
        except (
            self._ray.exceptions.RayError
        ):  # lost or busy: why is told elsewhere, and the rest is still true
            chosen = {}
        return {**self._place, "models moved": self._sharding.num_moved, **chosen}

    def close(self) -> None:
        self._leave.close()


def compute_on_ray(address: str | None, num_actors: int | None = None) -> MakeComputer:
    """A `MakeComputer` on a Ray cluster, where covey, the task and its data must be as they are here.

    address: as `sim.ray_cluster.ray_at` takes it.
    num_actors: left out, one for each GPU of the cluster where they are to be used, else for each `compute.threads` of
        its cores, though no more than make sense for the nodes.

    It raises ConfigError as `make_engine` does, and at `--ray`: Ray is not installed, no cluster answers, it has no
    room, or something is not there that is here.
    """
    return partial(_make_computer, address, num_actors)


def _make_computer(
    address: str | None, num_actors: int | None, scenario: Scenario, base: Path
) -> tuple[Computer, Facts]:
    if scenario.learning == "scalars":
        raise ConfigError("--ray", "scalars are computed on one machine", ["leave --ray out"])
    stack = ExitStack()
    try:
        ray = stack.enter_context(ray_at(address))
        resources = ray.cluster_resources()
        on_gpu = scenario.compute.device != "cpu" and resources.get("GPU", 0) >= 1
        room = int(resources["GPU"] if on_gpu else resources.get("CPU", 0) / scenario.compute.threads)
        num_actors = num_actors or max(1, min(room, scenario.nodes // NODES_PER_ACTOR))
        make = ray.remote(num_cpus=scenario.compute.threads, num_gpus=1 if on_gpu else 0)(Actor)
        actors = []
        for _ in range(num_actors):
            actors.append(make.remote())
            stack.callback(ray.kill, actors[-1])
        _await_place(ray, actors)
        settings = msgspec.to_builtins(scenario)
        started = _get(ray, [actor.start.remote(settings, str(base.resolve())) for actor in actors])
        facts = _agreed(started)
    except BaseException:  # Ctrl-C too
        stack.close()
        raise
    place = {"ray actors": num_actors, "machines": len({host for host, _ in started})}
    return RayComputer(ray, actors, scenario.nodes, place, stack), facts


def _await_place(ray: Any, actors: Sequence[Any]) -> None:
    placed, waiting = ray.wait(
        [actor.__ray_ready__.remote() for actor in actors],
        num_returns=len(actors),
        timeout=PLACED_WITHIN_S,
    )
    if waiting:
        raise ConfigError(
            "--ray", f"no room for {len(waiting)} of {len(actors)} actors", ["a cluster with free cores"]
        )
    try:
        ray.get(placed)
    except ray.exceptions.RayError as error:  # it cannot even load this module
        raise ConfigError("--ray", f"an actor did not start: {_why(error)}", [_EVERYWHERE]) from error


def _agreed(started: Sequence[tuple[str, Ready | Refused]]) -> Facts:
    """What all machines say of the task.

    Raises ConfigError where one refuses it or sees another.
    """
    first: Facts | None = None
    for host, answer in started:
        if isinstance(answer, Refused):
            where = "" if host == platform.node() else f" (on {host})"
            raise ConfigError(answer.path, answer.problem + where, [answer.allowed] if answer.allowed else ())
        first = first or answer.facts
        if answer.facts != first:
            raise ConfigError("--ray", f"{host} has another task or other data", [_EVERYWHERE])
    assert first is not None
    return first


def _get(ray: Any, answers: list[Any]) -> list[Any]:
    try:
        found: list[Any] = ray.get(answers)
    except ray.exceptions.RayError as error:
        raise LocalError(f"computing on Ray failed: {_why(error)}") from error
    return found


def _why(error: Exception) -> str:
    """Ray's messages hold a whole traceback; what was raised there says enough."""
    cause = getattr(error, "cause", None)
    return one_line(f"{type(cause).__name__}: {cause}" if cause is not None else str(error).strip())
