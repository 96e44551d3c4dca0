"""Learning put off: models as a graph of orders, computed in few large batches.

Belongs here: what depends on what, when it is computed, and which row of the engine a model has. How and where orders
are computed is said in `sim/orders.py`.

A `Value` is one model, perhaps not computed yet. Whoever needs it refers to it; a value that nothing refers to any
more is never computed, and its row is free again. Values are made after those they depend on, so the order in which
they were made is an order in which they can be computed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary
from weakref import ref as weak

from sim.orders import (
    NO_SLOT,
    Begin,
    Computer,
    Counted,
    Estimate,
    Measure,
    Merge,
    MergeInput,
    Program,
    Replay,
    ReplayedRound,
    Step,
    Train,
)

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


class Codes:
    """The scalars of one author in one round, perhaps not measured yet. They have a slot as a model has a row."""

    __slots__ = ("__weakref__", "_free", "level", "node", "num_samples", "round", "slot", "source")

    def __init__(
        self, free: list[int], source: Value | None, node: int, round_: int, num_samples: int
    ) -> None:
        self.slot = NO_SLOT
        self.level = 0
        self.source = source
        self.node = node
        self.round = round_
        self.num_samples = num_samples
        self._free = free

    def __del__(self) -> None:
        if self.slot != NO_SLOT:
            self._free.append(self.slot)


class Metrics(dict[str, float]):
    """What was measured: empty until it is computed."""


class Received(NamedTuple):
    """One received model of a merge."""

    value: Value
    weight: float
    staleness: int
    peer: str


class Scalars(NamedTuple):
    """One record of a replayed round: deferred codes, or such as came from nowhere in this world."""

    author: bytes
    codes: Codes | bytes


class Round(NamedTuple):
    """One replayed round, as `protocols.events.RoundScalars`."""

    round: int
    scale: float
    decay: float
    scalars: Sequence[Scalars]


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


class Applied(NamedTuple):
    """One round of a replay. state: a digest of all that was applied from the base to here, which names the state."""

    state: bytes
    make: Callable[[], Round]
    """Called where nobody has this state yet."""


class _Replayed(Value):
    __slots__ = ("node", "round", "source")

    def __init__(self, free: list[int], source: Value, round_: Round, node: int) -> None:
        super().__init__(free)
        self.source: Value | None = source
        self.round: Round | None = round_
        self.node = node


_Put = _Began | _Trained | _Merged | _Replayed | Codes
"""What is put off. Computed, it lets go of what it is made from."""


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

    def estimate(self, source: Value, node: int, round_: int, num_samples: int) -> Codes: ...

    def replay(self, source: Value, rounds: Sequence[Applied], node: int) -> Value:
        """Apply rounds one after the other. Equal states are one value, computed once."""

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
    on_failure: told the node and the reason of every piece of work that gave nothing usable. The model it began with
        then stands for its result, and zeros for scalars.
    share: whether equal states are one value. Tests compute each by itself to see that they are equal.
    max_recent: replayed states that are kept though nobody has them any more, since others may soon begin with them.

    While one batch is computed the next one gathers. What is in which batch, and what is told when, depends on the
    orders alone.
    """

    def __init__(
        self,
        computer: Computer,
        max_pending: int,
        on_failure: Callable[[int, str], None],
        *,
        share: bool = True,
        max_recent: int = 0,
    ) -> None:
        self._computer = computer
        self._share = share
        self._states: WeakValueDictionary[bytes, Value] = WeakValueDictionary()
        """By what was applied to get there."""
        self._recent: deque[Value] = deque(maxlen=max_recent)
        self._free_slots: list[int] = []
        self._num_slots = 0
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

    def estimate(self, source: Value, node: int, round_: int, num_samples: int) -> Codes:
        codes = Codes(self._free_slots, source, node, round_, num_samples)
        self._put_off(codes)
        return codes

    def replay(self, source: Value, rounds: Sequence[Applied], node: int) -> Value:
        value, first = source, 0
        if self._share:  # what went before the last rounds is the same for most
            for place in range(len(rounds) - 1, -1, -1):
                known = self._states.get(rounds[place].state)
                if known is not None:
                    value, first = known, place + 1
                    break
        for state, make in rounds[first:]:
            value = self._states[state] = self._add(_Replayed(self._free, value, make(), node))
        return value

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

    def _add(self, value: _Began | _Trained | _Merged | _Replayed) -> Value:
        self._put_off(value)
        return value

    def _put_off(self, thing: _Put) -> None:
        self._pending.append(weak(thing))
        if len(self._pending) >= self._max_pending:
            self._hand_over()

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

    def _plan(self) -> list[Step]:
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

    def _step(self, values: list[_Put]) -> Step:
        """One level, which is of one kind."""
        step: tuple[list[Begin], list[Train], list[Merge], list[Estimate], list[Replay]] = (
            [],
            [],
            [],
            [],
            [],
        )
        places = [self._free_slot() if type(value) is Codes else self._free_row() for value in values]
        for place, value in zip(places, values, strict=True):
            if type(value) is _Trained and value.source is not None:
                step[1].append(Train(place, value.source.row, value.node, value.round))
            elif type(value) is _Merged and value.own is not None:
                step[2].append(_merge(place, value, value.own))
            elif type(value) is Codes and value.source is not None:
                step[3].append(Estimate(place, value.source.row, value.node, value.round, value.num_samples))
            elif type(value) is _Replayed and value.source is not None and value.round is not None:
                step[4].append(Replay(place, value.source.row, (_replayed_round(value.round),), value.node))
            elif type(value) is _Began:
                step[0].append(Begin(place, value.seed))
        # Only now: no row of this step may be read and given away in it.
        for place, value in zip(places, values, strict=True):
            if type(value) is _Replayed:
                self._recent.append(value)
            _done(value, place)
        return Step(*step)

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

    def _free_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots - 1


def _merge(row: int, value: _Merged, own: Value) -> Merge:
    inputs = [MergeInput(v.row, weight, stale, peer) for v, weight, stale, peer in value.inputs]
    return Merge(row, own.row, value.own_weight, tuple(inputs), value.node, value.life, value.rule)


def _replayed_round(round_: Round) -> ReplayedRound:
    number, scale, decay, scalars = round_
    return ReplayedRound(
        number,
        scale,
        decay,
        tuple(
            Counted(author, codes.slot) if isinstance(codes, Codes) else Counted(author, NO_SLOT, codes)
            for author, codes in scalars
        ),
    )


def _done(value: _Put, place: int) -> None:
    """It has its place, and refers to nothing any more."""
    value.level = 0
    if type(value) is Codes:
        value.slot, value.source = place, None
        return
    assert not isinstance(value, Codes)
    value.row = place
    if type(value) is _Trained:
        value.source = None
    elif type(value) is _Merged:
        value.own, value.inputs = None, ()
    elif type(value) is _Replayed:
        value.source = value.round = None


def _alive(references: Iterable[weak[_Put]]) -> Iterable[_Put]:
    for reference in references:
        value = reference()
        if value is not None:
            yield value


def _level(value: _Put) -> int:
    """When it can be computed. Trainings and estimates stand on odd levels, merges and replays on even ones, so that
    nodes in different phases of their rounds still share a batch. A world has one of both kinds of learning."""
    if (type(value) is _Trained or type(value) is Codes) and value.source is not None:
        return value.source.level + 2 - (value.source.level + 1) % 2
    if type(value) is _Merged and value.own is not None:
        level = value.own.level
        for item in value.inputs:
            if item.value.level > level:
                level = item.value.level
        return level + 2 - level % 2
    if type(value) is _Replayed and value.source is not None and value.round is not None:
        level = value.source.level
        for _, codes in value.round.scalars:
            if type(codes) is Codes and codes.level > level:
                level = codes.level
        return level + 2 - level % 2
    return 0


class Surrogate:
    """`Learning` without any: the network runs, and there are no models and no metrics."""

    def __init__(self) -> None:
        self._nothing = Value([])
        self._no_codes = Codes([], None, 0, 0, 0)

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

    def estimate(self, source: Value, node: int, round_: int, num_samples: int) -> Codes:
        return self._no_codes

    def replay(self, source: Value, rounds: Sequence[Applied], node: int) -> Value:
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
