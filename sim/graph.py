"""Learning put off: models as a graph of orders, computed in few large batches.

Belongs here: what depends on what, when it is computed, and which row of the engine a model has. How and where orders
are computed is said in `sim/orders.py`.

A `Value` is one model, perhaps not computed yet. Whoever needs it refers to it; a value that nothing refers to any
more is never computed, and its row is free again. Values are made after those they depend on, so the order in which
they were made is an order in which they can be computed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol
from weakref import ref as weak

from sim.orders import Begin, Computer, Measure, Merge, MergeInput, Program, Train

NO_ROW = -1


class Value:
    """One model. It has a row from the moment at which a program that computes it is made."""

    __slots__ = ("__weakref__", "_free", "level", "row")

    def __init__(self, free: list[int]) -> None:
        self.row = NO_ROW
        self.level = 0
        """Of a program's steps, the one that computes it; 0 once it has a row."""
        self._free = free

    def __del__(self) -> None:
        if self.row != NO_ROW:
            self._free.append(self.row)


class Metrics(dict[str, float]):
    """What was measured: empty until it is computed."""


class Received(NamedTuple):
    """One received model of a merge."""

    value: Value
    weight: float
    staleness: int
    peer: str


class _Began(Value):
    __slots__ = ("seed",)

    def __init__(self, free: list[int], seed: int) -> None:
        super().__init__(free)
        self.seed = seed


class _Trained(Value):
    __slots__ = ("node", "round", "source")

    def __init__(self, free: list[int], source: Value, node: int, round_: int) -> None:
        super().__init__(free)
        self.source: Value | None = source
        self.node = node
        self.round = round_


class _Merged(Value):
    __slots__ = ("inputs", "life", "node", "own", "own_weight", "rule")

    def __init__(
        self,
        free: list[int],
        own: Value,
        own_weight: float,
        inputs: Sequence[Received],
        node: int,
        life: int,
        rule: str,
    ) -> None:
        super().__init__(free)
        self.own: Value | None = own
        self.own_weight = own_weight
        self.inputs = inputs
        self.node = node
        self.life = life
        self.rule = rule


_Put = _Began | _Trained | _Merged
"""A value that is put off. Computed, it lets go of what it is made from."""


class _UnderWay(NamedTuple):
    """What waits for the answers of a program."""

    metrics: list[Metrics]
    distances: list[Metrics]
    merged: list[Metrics]
    to_tell: list[Callable[[], None]]


class Learning(Protocol):
    """The nodes' work as a world orders it."""

    def begin(self, seed: int) -> Value: ...

    def train(self, source: Value, node: int, round_: int) -> Value: ...

    def merge(
        self,
        own: Value,
        own_weight: float,
        inputs: Sequence[Received],
        node: int,
        life: int,
        rule: str = "round",
    ) -> Value: ...

    def measure(self, value: Value, node: int) -> Metrics:
        """The task's metrics: empty now, filled by the time `flush` returns."""

    def consensus(self, values: Sequence[Value]) -> Metrics:
        """`distance`, by the time `flush` returns: how far these models are from their mean."""

    def merged(self, values: Sequence[Value]) -> Metrics:
        """The task's metrics of the mean of these models, by the time `flush` returns. It becomes nobody's model."""

    def later(self, tell: Callable[[], None]) -> None:
        """Have `tell` called once all that was ordered so far is computed; what came first is told first."""

    def flush(self) -> None:
        """Compute everything that is still needed, and tell all that is to be told."""

    def close(self) -> None: ...


class Graph:
    """`Learning` on a computer.

    max_pending: orders held back before all of them are computed: a bound on memory, without influence on results
        beyond rounding.
    on_failure: told the node and the reason of every training and merge that gave nothing usable. The model it
        began with then stands for its result.

    While one batch is computed the next one gathers. What is in which batch, and what is told when, depends on the
    orders alone.
    """

    def __init__(self, computer: Computer, max_pending: int, on_failure: Callable[[int, str], None]) -> None:
        self._computer = computer
        self._max_pending = max_pending
        self._on_failure = on_failure
        self._pending: list[weak[_Put]] = []
        self._measures: list[tuple[Value, int, Metrics]] = []
        self._comparisons: list[tuple[tuple[Value, ...], Metrics]] = []
        self._means: list[tuple[tuple[Value, ...], Metrics]] = []
        self._to_tell: list[Callable[[], None]] = []
        self._under_way: _UnderWay | None = None
        self._free: list[int] = []
        self._num_rows = 0

    @property
    def num_rows_used(self) -> int:
        """Rows of the engine that hold a model which somebody refers to."""
        return self._num_rows - len(self._free)

    # --- ordering ---------------------------------------------------------------------------------------
    def begin(self, seed: int) -> Value:
        return self._add(_Began(self._free, seed))

    def train(self, source: Value, node: int, round_: int) -> Value:
        return self._add(_Trained(self._free, source, node, round_))

    def merge(
        self,
        own: Value,
        own_weight: float,
        inputs: Sequence[Received],
        node: int,
        life: int,
        rule: str = "round",
    ) -> Value:
        return self._add(_Merged(self._free, own, own_weight, inputs, node, life, rule))

    def measure(self, value: Value, node: int) -> Metrics:
        answer = Metrics()
        self._measures.append((value, node, answer))
        return answer

    def consensus(self, values: Sequence[Value]) -> Metrics:
        answer = Metrics()
        self._comparisons.append((tuple(values), answer))
        return answer

    def merged(self, values: Sequence[Value]) -> Metrics:
        answer = Metrics()
        self._means.append((tuple(values), answer))
        return answer

    def later(self, tell: Callable[[], None]) -> None:
        self._to_tell.append(tell)

    def _add(self, value: _Put) -> Value:
        self._pending.append(weak(value))
        if len(self._pending) >= self._max_pending:
            self._hand_over()
        return value

    # --- computing --------------------------------------------------------------------------------------
    def flush(self) -> None:
        self._hand_over()
        self._await()

    def close(self) -> None:
        self._computer.close()

    def _hand_over(self) -> None:
        """Give everything that is still needed to the computer, once it is done with what it has."""
        self._await()
        steps = self._plan()
        program = Program(
            num_rows=self._num_rows,
            steps=steps,
            measures=[Measure(value.row, node) for value, node, _ in self._measures],
            comparisons=[[value.row for value in values] for values, _ in self._comparisons],
            merged=[[value.row for value in values] for values, _ in self._means],
        )
        self._computer.submit(program)
        self._under_way = _UnderWay(
            metrics=[metrics for _, _, metrics in self._measures],
            distances=[metrics for _, metrics in self._comparisons],
            merged=[metrics for _, metrics in self._means],
            to_tell=self._to_tell,
        )
        self._measures, self._comparisons, self._means, self._to_tell = [], [], [], []

    def _plan(self) -> list[tuple[list[Begin], list[Train], list[Merge]]]:
        """Turn what is pending into steps, and give every value its row.

        From here on a value counts as computed: whatever is ordered next comes after this program.
        """
        levels: dict[int, list[_Put]] = {}
        pending, self._pending = self._pending, []
        for value in _alive(pending):
            value.level = level = _level(value)
            if level in levels:
                levels[level].append(value)
            else:
                levels[level] = [value]
        steps = []
        for level in sorted(levels):
            steps.append(self._step(levels[level]))
            # What nobody needs after its level gives its row to the next one.
            del levels[level]
        return steps

    def _step(self, values: list[_Put]) -> tuple[list[Begin], list[Train], list[Merge]]:
        """One level, which is of one kind."""
        step: tuple[list[Begin], list[Train], list[Merge]] = ([], [], [])
        rows = [self._free_row() for _ in values]
        for row, value in zip(rows, values, strict=True):
            if type(value) is _Trained and value.source is not None:
                step[1].append(Train(row, value.source.row, value.node, value.round))
            elif type(value) is _Merged and value.own is not None:
                inputs = [MergeInput(v.row, weight, stale, peer) for v, weight, stale, peer in value.inputs]
                own = value.own.row
                step[2].append(
                    Merge(row, own, value.own_weight, tuple(inputs), value.node, value.life, value.rule)
                )
            elif type(value) is _Began:
                step[0].append(Begin(row, value.seed))
        # Only now: no row of this step may be read and given away in it.
        for row, value in zip(rows, values, strict=True):
            value.row, value.level = row, 0
            if type(value) is _Trained:
                value.source = None
            elif type(value) is _Merged:
                value.own, value.inputs = None, ()
        return step

    def _await(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        answers = self._computer.answers()
        for node, detail in answers.failures:
            self._on_failure(node, detail)
        for metrics, found in zip(under_way.metrics, answers.metrics, strict=True):
            metrics.update(found)
        for metrics, distance in zip(under_way.distances, answers.distances, strict=True):
            metrics["distance"] = distance
        for metrics, found in zip(under_way.merged, answers.merged, strict=True):
            metrics.update(found)
        for tell in under_way.to_tell:
            tell()

    def _free_row(self) -> int:
        if self._free:
            return self._free.pop()
        self._num_rows += 1
        return self._num_rows - 1


def _alive(references: Iterable[weak[_Put]]) -> Iterable[_Put]:
    for reference in references:
        value = reference()
        if value is not None:
            yield value


def _level(value: _Put) -> int:
    """When it can be computed. Trainings stand on odd levels and merges on even ones, so that nodes in different
    phases of their rounds still share a batch."""
    if type(value) is _Trained and value.source is not None:
        return value.source.level + 2 - (value.source.level + 1) % 2
    if type(value) is _Merged and value.own is not None:
        level = value.own.level
        for item in value.inputs:
            if item.value.level > level:
                level = item.value.level
        return level + 2 - level % 2
    return 0


class Surrogate:
    """`Learning` without any: the network runs, and there are no models and no metrics."""

    def __init__(self) -> None:
        self._nothing = Value([])

    def begin(self, seed: int) -> Value:
        return self._nothing

    def train(self, source: Value, node: int, round_: int) -> Value:
        return self._nothing

    def merge(
        self,
        own: Value,
        own_weight: float,
        inputs: Sequence[Received],
        node: int,
        life: int,
        rule: str = "round",
    ) -> Value:
        return self._nothing

    def measure(self, value: Value, node: int) -> Metrics:
        return Metrics()

    def consensus(self, values: Sequence[Value]) -> Metrics:
        return Metrics()

    def merged(self, values: Sequence[Value]) -> Metrics:
        return Metrics()

    def later(self, tell: Callable[[], None]) -> None:
        tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
