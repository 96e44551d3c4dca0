"""The work that a world hands to an engine, and what an engine promises.

Belongs here: orders over rows. A row is one model's place in an engine's store; who owns it and when it is free again
is the graph's affair (`sim/graph.py`). Nothing here imports torch.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct


class Begin(NamedTuple):
    """Fill `row` with the first parameters of a fresh model, as `node.tasks.initial_params(task, seed)`."""

    row: int
    seed: int


class Train(NamedTuple):
    """One training round of `node` from the model in `source` into `row`, as `node.training.train`."""

    row: int
    source: int
    node: int
    round: int


class MergeInput(NamedTuple):
    """One received model."""

    row: int
    weight: float
    staleness: int
    peer: str


class Merge(NamedTuple):
    """One merge of `node`: its own trained model in `own`, the received ones, into `row`.

    life: counts the node's restarts; what a rule remembers between merges belongs to one life.
    rule: as in `protocols.events.Aggregate`.
    """

    row: int
    own: int
    own_weight: float
    inputs: tuple[MergeInput, ...]
    node: int
    life: int
    rule: str = "round"


class Estimate(NamedTuple):
    """So many scalars of `node` in `round`, measured at the model in `source`: their codes go into `slot`."""

    slot: int
    source: int
    node: int
    round: int
    num_samples: int


class Counted(NamedTuple):
    """One author's scalars in a replayed round: the codes in `slot`, or, where that is NO_SLOT, `codes`."""

    author: bytes
    slot: int
    codes: bytes = b""


NO_SLOT = -1


class ReplayedRound(NamedTuple):
    """As `protocols.events.RoundScalars`."""

    round: int
    scale: float
    decay: float
    scalars: tuple[Counted, ...]


class Replay(NamedTuple):
    """Apply rounds to the model in `source`, in order, into `row`. node: who asked first."""

    row: int
    source: int
    rounds: tuple[ReplayedRound, ...]
    node: int


class Measure(NamedTuple):
    """The task's metrics of the model in `row`, as `node.training.evaluate`."""

    row: int
    node: int


class Step(NamedTuple):
    """Orders of one kind, in one of the lists; the others are empty. They do not depend on each other."""

    begins: Sequence[Begin] = ()
    trains: Sequence[Train] = ()
    merges: Sequence[Merge] = ()
    estimates: Sequence[Estimate] = ()
    replays: Sequence[Replay] = ()


class Program(Struct, frozen=True, array_like=True):
    """A batch of work, in an order in which it can be done.

    num_rows: rows that the engine needs room for.
    comparisons: rows whose consensus distance is wanted, each list for itself.
    merged: rows whose mean is to be measured, each list for itself.
    """

    num_rows: int
    steps: list[Step]
    measures: list[Measure]
    comparisons: list[list[int]]
    merged: list[list[int]] = []


class Answers(Struct, frozen=True, array_like=True):
    """What came of a program.

    failures: node and reason of every piece of work that gave nothing usable.
    metrics, distances, merged: of its measures, comparisons and means, in their order.
    """

    failures: list[tuple[int, str]]
    metrics: list[dict[str, float]]
    distances: list[float]
    merged: list[dict[str, float]] = []


class Engine(Protocol):
    """Computes orders on models held in rows.

    The orders of one call do not depend on each other: no row is written that another order of the call reads, but
    an order's own `source` or `own` may be its `row`. A list of answers has the order of the orders. A failure is an
    answer, never an exception: the order's `row` then holds what `source` or `own` held, and its `slot` zeros.
    """

    def reserve(self, num_rows: int) -> None:
        """Make room for rows 0 to num_rows - 1; what rows hold stays."""

    def begin(self, orders: Sequence[Begin]) -> None: ...

    def train(self, orders: Sequence[Train]) -> list[str]:
        """Per order "" or why it failed, in one line."""

    def merge(self, orders: Sequence[Merge]) -> list[str]: ...

    def estimate(self, orders: Sequence[Estimate]) -> list[str]: ...

    def replay(self, orders: Sequence[Replay]) -> list[str]: ...

    def measure(self, orders: Sequence[Measure]) -> list[dict[str, float]]: ...

    def consensus(self, rows: Sequence[int]) -> float:
        """Consensus distance: the root mean square distance of these models to their mean."""

    def merged(self, rows: Sequence[int]) -> dict[str, float]:
        """The task's metrics of the mean of these models, which changes none of them. {} where measuring raises."""

    def describe(self) -> dict[str, object]:
        """What was chosen and why, for the operator: device, threads, batching, tile, measured times."""

    def close(self) -> None: ...


def run_program(engine: Engine, program: Program) -> Answers:
    """Do a program, step by step."""
    engine.reserve(program.num_rows)
    failures: list[tuple[int, str]] = []
    for begins, trains, merges, estimates, replays in program.steps:
        if begins:
            engine.begin(begins)
        if trains:
            failures += _failed(trains, engine.train(trains))
        if merges:
            failures += _failed(merges, engine.merge(merges))
        if estimates:
            failures += _failed(estimates, engine.estimate(estimates))
        if replays:
            failures += _failed(replays, engine.replay(replays))
    return Answers(
        failures=failures,
        metrics=engine.measure(program.measures) if program.measures else [],
        distances=[engine.consensus(rows) for rows in program.comparisons],
        merged=[engine.merged(rows) for rows in program.merged],
    )


def _failed(
    orders: Sequence[Train | Merge | Estimate | Replay], details: Sequence[str]
) -> list[tuple[int, str]]:
    return [(order.node, detail) for order, detail in zip(orders, details, strict=True) if detail]


class Computer(Protocol):
    """Where programs are computed: here, in another process, or on other machines.

    Programs are done in the order in which they are given, and their answers come in the same order.
    """

    def submit(self, program: Program) -> None:
        """Returns as soon as it can; at most one program is under way when this is called."""

    def answers(self) -> Answers:
        """Of the earliest program whose answers were not taken yet. Waits for them."""

    def describe(self) -> dict[str, object]:
        """As `Engine.describe`. No program is under way."""

    def close(self) -> None: ...


class Here:
    """A `Computer` in this process: a program is done when it is submitted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._done: list[Answers] = []

    def submit(self, program: Program) -> None:
        self._done.append(run_program(self._engine, program))

    def answers(self) -> Answers:
        return self._done.pop(0)

    def describe(self) -> dict[str, object]:
        return self._engine.describe()

    def close(self) -> None:
        self._engine.close()
