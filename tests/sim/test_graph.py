"""Work put off: nothing is computed for nobody, every order reads what it was ordered on, and answers find their way.

Models are terms here: what a row holds says how it was made, so that a wrong row is a wrong term.
"""

from collections.abc import Sequence
from weakref import ref as weak

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.graph import Applied, Codes, Graph, Metrics, Received, Round, Scalars, Surrogate, Value
from sim.orders import (
    NO_SLOT,
    Answers,
    Begin,
    Estimate,
    Measure,
    Merge,
    Program,
    Replay,
    Train,
    run_program,
)

FAILS_FROM = 1000
"""Work of these nodes gives nothing usable."""
MANY = 10**6


class Terms:
    """Terms by number, each once: a model that many others are made from stays one small number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, ...], int] = {}

    def __call__(self, *term: object) -> int:
        return self._numbers.setdefault(term, len(self._numbers))


class Recording:
    """A computer that keeps its programs and holds terms in its rows. Done as late as it may be."""

    def __init__(self) -> None:
        self.terms = Terms()
        self.rows: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.programs: list[Program] = []
        self.closed = False
        self._num_rows = 0
        self._waiting: list[Program] = []

    # --- a computer -------------------------------------------------------------------------------------
    def submit(self, program: Program) -> None:
        assert len(self._waiting) <= 1, "one program is under way at the most"
        self.programs.append(program)
        self._waiting.append(program)

    def answers(self) -> Answers:
        return run_program(self, self._waiting.pop(0))

    def describe(self) -> dict[str, object]:
        return {}

    def close(self) -> None:
        self.closed = True

    # --- an engine --------------------------------------------------------------------------------------
    def reserve(self, num_rows: int) -> None:
        self._num_rows = max(num_rows, self._num_rows)

    def begin(self, orders: Sequence[Begin]) -> None:
        self._write([order.row for order in orders], [self.terms("begin", order.seed) for order in orders])

    def train(self, orders: Sequence[Train]) -> list[str]:
        made = [
            self.rows[order.source] if order.node >= FAILS_FROM else self._trained(order) for order in orders
        ]
        self._check_independent([(order.row, [order.source]) for order in orders])
        self._write([order.row for order in orders], made)
        return ["diverged" if order.node >= FAILS_FROM else "" for order in orders]

    def merge(self, orders: Sequence[Merge]) -> list[str]:
        made = [self.rows[order.own] if order.node >= FAILS_FROM else self._merged(order) for order in orders]
        self._check_independent([(o.row, [o.own, *(item.row for item in o.inputs)]) for o in orders])
        self._write([order.row for order in orders], made)
        return ["no weight" if order.node >= FAILS_FROM else "" for order in orders]

    def estimate(self, orders: Sequence[Estimate]) -> list[str]:
        for order in orders:
            self.codes[order.slot] = self.terms("codes", self.rows[order.source], order.node, order.round)
        return [""] * len(orders)

    def replay(self, orders: Sequence[Replay]) -> list[str]:
        made = []
        for order in orders:
            ((number, scale, decay, scalars),) = order.rounds
            said = [self.codes[slot] if slot != NO_SLOT else codes for _, slot, codes in scalars]
            made.append(self.terms("replay", self.rows[order.source], number, scale, decay, tuple(said)))
        self._check_independent([(order.row, [order.source]) for order in orders])
        self._write([order.row for order in orders], made)
        return [""] * len(orders)

    def measure(self, orders: Sequence[Measure]) -> list[dict[str, float]]:
        return [{"term": self.rows[order.row], "node": order.node} for order in orders]

    def consensus(self, rows: Sequence[int]) -> float:
        return self.terms("consensus", *(self.rows[row] for row in rows))

    def merged(self, rows: Sequence[int]) -> dict[str, float]:
        return {"mean": self.terms("mean", *(self.rows[row] for row in rows))}

    def _trained(self, order: Train) -> int:
        return self.terms("train", self.rows[order.source], order.node, order.round)

    def _merged(self, order: Merge) -> int:
        inputs = [(self.rows[row], weight, stale, peer) for row, weight, stale, peer in order.inputs]
        return self.terms(
            "merge",
            self.rows[order.own],
            order.own_weight,
            tuple(inputs),
            order.node,
            order.life,
            order.rule,
        )

    def _check_independent(self, orders: list[tuple[int, list[int]]]) -> None:
        writers = {row: number for number, (row, _) in enumerate(orders)}
        for number, (_, sources) in enumerate(orders):
            assert all(writers.get(source, number) == number for source in sources)

    def _write(self, rows: list[int], terms: list[int]) -> None:
        assert len(set(rows)) == len(rows), "two orders of one call write one row"
        assert all(0 <= row < self._num_rows for row in rows), "a row that was not reserved"
        self.rows.update(zip(rows, terms, strict=True))


class Rig:
    """A graph on a recording computer."""

    def __init__(self, max_pending: int = MANY) -> None:
        self.computer = Recording()
        self.failures: list[tuple[int, str]] = []
        self.graph = Graph(
            self.computer, max_pending, lambda node, detail: self.failures.append((node, detail))
        )

    def term(self, value: Value) -> int:
        return self.computer.rows[value.row]

    def kinds(self, program: int = -1) -> list[str]:
        """Of a program's steps, as `begin 3`."""
        names = ("begin", "train", "merge", "estimate", "replay")
        return [
            " ".join(f"{name} {len(orders)}" for name, orders in zip(names, step, strict=True) if orders)
            for step in self.computer.programs[program].steps
        ]

    def merge(self, own: Value, *others: Value, node: int = 0) -> Value:
        inputs = [Received(value, 1.0, 0, f"peer {number}") for number, value in enumerate(others)]
        return self.graph.merge(own, 1.0, inputs, node, 1)


def test_a_mean_is_measured_of_the_models_as_they_were_and_becomes_nobodys() -> None:
    rig = Rig()
    models = [rig.graph.begin(seed) for seed in range(3)]
    found = rig.graph.merged(models)
    assert found == {}
    trained = rig.graph.train(models[0], 0, 0)
    rig.graph.flush()
    terms = rig.computer.terms
    assert found == {"mean": terms("mean", *(terms("begin", seed) for seed in range(3)))}
    assert rig.term(trained) == terms("train", terms("begin", 0), 0, 0)
    rig.graph.flush()
    assert rig.computer.programs[-1].merged == [], "once"
    assert Surrogate().merged(models) == {}


def test_a_merge_says_by_which_rule() -> None:
    rig = Rig()
    own, other = rig.graph.begin(0), rig.graph.begin(1)
    kept = [rig.merge(own, other)]
    kept += [
        rig.graph.merge(own, 1.0, [Received(other, 1.0, 0, "p")], 1, 1, rule) for rule in ("final", "accept")
    ]
    rig.graph.flush()
    merges = [order for step in rig.computer.programs[-1].steps for order in step.merges]
    assert [order.rule for order in merges] == ["round", "final", "accept"]


# --- what is computed -----------------------------------------------------------------------------------
def test_nothing_is_computed_before_it_is_asked_for() -> None:
    rig = Rig()
    held = rig.graph.train(rig.graph.begin(1), 0, 0)
    metrics = rig.graph.measure(held, 0)
    assert rig.computer.programs == []
    assert metrics == {}
    rig.graph.flush()
    assert metrics == {"term": rig.computer.terms("train", rig.computer.terms("begin", 1), 0, 0), "node": 0}


def test_what_nobody_refers_to_is_never_computed() -> None:
    rig = Rig()
    first = rig.graph.begin(1)
    kept = rig.graph.train(first, 0, 0)
    rig.graph.train(first, 1, 0)
    rig.graph.train(rig.graph.begin(2), 2, 0)
    rig.graph.flush()
    assert rig.kinds() == ["begin 1", "train 1"]
    assert rig.graph.num_rows_used == 2
    del first, kept
    assert rig.graph.num_rows_used == 0


def test_what_is_only_measured_is_computed_for_that_and_forgotten() -> None:
    rig = Rig()
    metrics = rig.graph.measure(rig.graph.begin(1), 0)
    distance = rig.graph.consensus([rig.graph.begin(2), rig.graph.begin(3)])
    rig.graph.flush()
    assert rig.kinds() == ["begin 3"]
    assert rig.graph.num_rows_used == 0
    assert "term" in metrics
    assert set(distance) == {"distance"}


def test_a_model_is_computed_once_whoever_needs_it() -> None:
    rig = Rig()
    common = rig.graph.begin(1)
    first = [rig.graph.train(common, node, 0) for node in range(3)]
    rig.graph.flush()
    second = [rig.graph.train(common, node, 1) for node in range(3)]
    rig.graph.flush()
    assert rig.kinds(0) == ["begin 1", "train 3"]
    assert rig.kinds(1) == ["train 3"]
    assert len({rig.term(value) for value in (*first, *second)}) == 6


def test_a_chain_of_many_rounds_takes_two_rows() -> None:
    rig = Rig()
    value = rig.graph.begin(1)
    for round_ in range(20):
        value = rig.graph.train(value, 0, round_)
    rig.graph.flush()
    assert rig.kinds() == ["begin 1", *["train 1"] * 20]
    assert rig.computer.programs[0].num_rows == 2
    assert rig.graph.num_rows_used == 1


def test_a_row_is_given_again_once_nobody_refers_to_its_model() -> None:
    rig = Rig()
    first, second = rig.graph.begin(1), rig.graph.begin(2)
    rig.graph.flush()
    row = first.row
    del first
    third = rig.graph.begin(3)
    rig.graph.flush()
    assert third.row == row != second.row
    assert rig.term(second) == rig.computer.terms("begin", 2)
    assert rig.computer.programs[-1].num_rows == 2


def test_a_long_chain_that_nobody_needs_is_let_go_of() -> None:
    rig = Rig()
    value = rig.graph.begin(1)
    first = weak(value)
    for round_ in range(100_000):
        value = rig.graph.train(value, 0, round_)
    del value
    assert first() is None
    rig.graph.flush()
    assert rig.kinds() == []


# --- batches --------------------------------------------------------------------------------------------
def test_nodes_in_different_phases_of_their_rounds_share_batches() -> None:
    rig = Rig()
    start = [rig.graph.begin(node) for node in range(4)]
    rig.graph.flush()
    # Two of them merge first and train then, the others the other way round.
    ends = [rig.graph.train(rig.merge(start[node], start[1 - node]), node, 0) for node in (0, 1)]
    ends += [rig.merge(rig.graph.train(start[node], node, 0), start[0]) for node in (2, 3)]
    ends += [rig.graph.train(end, node, 1) for node, end in enumerate(ends[2:], 2)]
    rig.graph.flush()
    assert rig.kinds() == ["train 2", "merge 4", "train 4"]


def test_orders_are_handed_over_together_at_the_bound() -> None:
    rig = Rig(max_pending=3)
    held = [rig.graph.begin(seed) for seed in range(8)]
    assert [rig.kinds(number) for number in range(2)] == [["begin 3"], ["begin 3"]]
    assert len(rig.computer.programs) == 2
    rig.graph.flush()
    assert rig.kinds() == ["begin 2"]
    assert [rig.term(value) for value in held] == [rig.computer.terms("begin", seed) for seed in range(8)]


def test_what_is_under_way_is_not_waited_for_before_the_next_batch_is_full() -> None:
    rig = Rig(max_pending=2)
    held = [rig.graph.begin(seed) for seed in range(3)]
    assert len(rig.computer.programs) == 1
    assert rig.computer.rows == {}, "nobody has taken the answers yet"
    held.append(rig.graph.begin(3))
    assert len(rig.computer.rows) == 2
    assert len(rig.computer.programs) == 2


def test_flushing_twice_computes_nothing_twice() -> None:
    rig = Rig()
    value = rig.graph.begin(1)
    rig.graph.flush()
    rig.graph.flush()
    assert sum(len(program.steps) for program in rig.computer.programs) == 1
    assert value.row == 0


def test_closing_closes_the_computer() -> None:
    rig = Rig()
    rig.graph.close()
    assert rig.computer.closed


# --- what is told ---------------------------------------------------------------------------------------
def test_answers_come_to_those_who_asked() -> None:
    rig = Rig()
    models = [rig.graph.begin(seed) for seed in range(5)]
    measured = {seed: rig.graph.measure(models[seed], 10 + seed) for seed in (3, 0, 4)}
    compared = {pair: rig.graph.consensus([models[i] for i in pair]) for pair in ((1, 2), (4, 0, 1))}
    rig.graph.flush()
    begun = [rig.computer.terms("begin", seed) for seed in range(5)]
    assert measured == {seed: {"term": begun[seed], "node": 10 + seed} for seed in (3, 0, 4)}
    for pair, found in compared.items():
        assert found == {"distance": rig.computer.terms("consensus", *(begun[i] for i in pair))}


def test_what_is_told_later_is_told_in_order_and_with_everything_before_it_computed() -> None:
    rig = Rig(max_pending=2)
    told: list[tuple[int, list[bool]]] = []
    measured: list[Metrics] = []
    held = []

    def tell(number: int) -> None:
        told.append((number, [bool(metrics) for metrics in measured]))

    for number in range(5):
        held.append(rig.graph.begin(number))
        measured.append(rig.graph.measure(held[-1], 0))
        rig.graph.later(lambda number=number: tell(number))  # type: ignore[misc]
    rig.graph.flush()
    assert [number for number, _ in told] == list(range(5))
    assert all(all(filled[: number + 1]) for number, filled in told)


def test_nothing_is_told_before_its_time() -> None:
    rig = Rig(max_pending=3)
    told: list[str] = []
    held = [rig.graph.begin(seed) for seed in range(2)]
    rig.graph.later(lambda: told.append("first"))
    held.append(rig.graph.begin(2))  # the bound: what is so far is handed over
    rig.graph.later(lambda: told.append("second"))
    assert told == []
    held += [rig.graph.begin(seed) for seed in range(3, 6)]
    assert told == ["first"]
    rig.graph.flush()
    assert told == ["first", "second"]


def test_a_failure_is_told_and_the_model_before_it_stands_for_the_result() -> None:
    rig = Rig()
    first = rig.graph.begin(1)
    trained = rig.graph.train(first, FAILS_FROM, 0)
    merged = rig.merge(trained, rig.graph.begin(2), node=FAILS_FROM + 1)
    after = rig.graph.train(merged, 3, 1)
    rig.graph.train(first, FAILS_FROM + 2, 0)  # nobody needs it, so it does not fail
    told: list[int] = []
    rig.graph.later(lambda: told.append(len(rig.failures)))
    rig.graph.flush()
    assert rig.failures == [(FAILS_FROM, "diverged"), (FAILS_FROM + 1, "no weight")]
    assert told == [2], "what was put off comes after the failures"
    begun = rig.computer.terms("begin", 1)
    assert (rig.term(trained), rig.term(merged)) == (begun, begun)
    assert rig.term(after) == rig.computer.terms("train", begun, 3, 1)


# --- against doing everything at once -------------------------------------------------------------------
class Naive:
    """The same orders, each done at once, and which of them somebody needs."""

    def __init__(self, max_pending: int) -> None:
        self.rig = Rig(max_pending)
        self.max_pending = max_pending
        self.held: list[tuple[Value, int]] = []
        """Each with its number among all orders."""
        self.term: list[int] = []
        self.sources: list[list[int]] = []
        self.node: list[int] = []
        self.num_pending = 0
        self.computed: set[int] = set()
        self.asked: set[int] = set()
        self.answers: list[tuple[Metrics, dict[str, float]]] = []
        self.told: list[int] = []
        self.num_later = 0

    def order(self, value: Value, term: int, sources: list[int], node: int = 0) -> None:
        self.held.append((value, len(self.term)))
        self.term.append(term)
        self.sources.append(sources)
        self.node.append(node)
        self.num_pending += 1
        if self.num_pending == self.max_pending:
            self.hand_over()

    def hand_over(self) -> None:
        """Everything is computed that is held, or asked for, or that such a thing is made from."""
        needed = [number for _, number in self.held] + sorted(self.asked)
        wanted = set()
        while needed:
            number = needed.pop()
            if number not in self.computed | wanted:
                wanted.add(number)
                needed += self.sources[number]
        steps = self.rig.computer.programs[-1].steps
        assert sum(len(orders) for step in steps for orders in step) == len(wanted)
        assert all(sum(bool(orders) for orders in step) == 1 for step in steps), "a step is of one kind"
        self.computed |= wanted
        self.asked.clear()
        self.num_pending = 0

    def act(self, kind: str, a: int, b: int, fails: bool) -> None:
        graph, terms = self.rig.graph, self.rig.computer.terms
        node = len(self.term) + FAILS_FROM * fails  # no two orders share one, nor so their failures
        assert len(self.term) < FAILS_FROM
        if kind == "begin" or not self.held:
            # The value is ordered before the bookkeeping, which sees it as held.
            self.order(graph.begin(a), terms("begin", a), [])
            return
        value, number = self.held[a % len(self.held)]
        other, other_number = self.held[b % len(self.held)]
        term = self.term[number]
        match kind:
            case "train":
                made = term if fails else terms("train", term, node, b)
                self.order(graph.train(value, node, b), made, [number], node)
            case "merge":
                inputs = [Received(other, 0.5, b, "x"), Received(value, 2.0, 1, "y")]
                told = tuple(
                    (self.term[n], *item[1:]) for n, item in zip((other_number, number), inputs, strict=True)
                )
                made = term if fails else terms("merge", term, 3.0, told, node, 7, "round")
                self.order(graph.merge(value, 3.0, inputs, node, 7), made, [number, other_number], node)
            case "measure":
                self.asked.add(number)
                self.answers.append((graph.measure(value, node), {"term": term, "node": node}))
            case "compare":
                self.asked |= {number, other_number}
                expected = terms("consensus", term, self.term[other_number])
                self.answers.append((graph.consensus([value, other]), {"distance": expected}))
            case "later":
                self.later(len(self.answers))
            case "drop":
                del self.held[a % len(self.held)]
            case "flush":
                graph.flush()
                self.hand_over()
                self.check()

    def later(self, num_answers: int) -> None:
        place, self.num_later = self.num_later, self.num_later + 1

        def tell() -> None:
            self.told.append(place)
            assert all(got == expected for got, expected in self.answers[:num_answers])

        self.rig.graph.later(tell)

    def check(self) -> None:
        """After a flush everything is there, and nothing else is."""
        assert all(got == expected for got, expected in self.answers)
        assert self.told == list(range(self.num_later))
        assert [self.rig.term(value) for value, _ in self.held] == [self.term[n] for _, n in self.held]
        assert self.rig.graph.num_rows_used == len({number for _, number in self.held})
        failed = [node for node, _ in self.rig.failures]
        assert sorted(failed) == sorted(
            self.node[number] for number in self.computed if self.node[number] >= FAILS_FROM
        )


kinds = st.sampled_from(
    ["begin", "train", "train", "merge", "merge", "measure", "compare", "later", "drop", "drop", "flush"]
)
small = st.integers(0, 9)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(kinds, small, small, st.integers(0, 9).map(lambda n: n == 0)), max_size=80),
    st.integers(1, 30),
)
def test_every_order_reads_what_it_was_ordered_on(
    script: list[tuple[str, int, int, bool]], max_pending: int
) -> None:
    naive = Naive(max_pending)
    for action in script:
        naive.act(*action)
    naive.act("flush", 0, 0, False)


# --- without any ----------------------------------------------------------------------------------------
def test_a_surrogate_has_no_models_and_tells_at_once() -> None:
    surrogate = Surrogate()
    told: list[str] = []
    first = surrogate.begin(1)
    trained = surrogate.train(first, 0, 0)
    merged = surrogate.merge(trained, 1.0, [Received(first, 1.0, 0, "x")], 0, 1)
    assert first is trained is merged
    surrogate.later(lambda: told.append("now"))
    assert told == ["now"]
    assert surrogate.measure(merged, 0) == surrogate.consensus([first]) == {}
    surrogate.flush()
    surrogate.close()


@pytest.mark.parametrize("max_pending", [1, 2, 7])
def test_the_bound_changes_what_is_computed_together_and_not_what_comes_out(max_pending: int) -> None:
    rig = Rig(max_pending)
    models = [rig.graph.begin(node) for node in range(3)]
    for round_ in range(4):
        models = [rig.graph.train(model, node, round_) for node, model in enumerate(models)]
        models = [rig.merge(model, models[node - 1], node=node) for node, model in enumerate(models)]
    found = rig.graph.consensus(models)
    rig.graph.flush()

    terms = rig.computer.terms
    expected = [terms("begin", node) for node in range(3)]
    for round_ in range(4):
        expected = [terms("train", model, node, round_) for node, model in enumerate(expected)]
        expected = [
            terms("merge", model, 1.0, ((expected[node - 1], 1.0, 0, "peer 0"),), node, 1, "round")
            for node, model in enumerate(expected)
        ]
    assert [rig.term(model) for model in models] == expected
    assert found == {"distance": terms("consensus", *expected)}


# --- scalars --------------------------------------------------------------------------------------------
def applied(state: bytes, number: int, *said: Codes | bytes) -> Applied:
    scalars = [Scalars(bytes([place]) * 32, codes) for place, codes in enumerate(said)]
    return Applied(state, lambda: Round(number, 0.5, 0.0, scalars))


def test_a_state_is_computed_once_whoever_replays_it_from_wherever() -> None:
    rig = Rig()
    base = rig.graph.begin(0)
    said = [rig.graph.estimate(base, node, 1, 2) for node in range(3)]
    first = applied(b"one", 1, *said)
    ahead = rig.graph.replay(base, [first], 0)
    later = rig.graph.estimate(ahead, 0, 2, 2)
    both = [first, applied(b"two", 2, later, b"xy")]
    states = [
        rig.graph.replay(ahead, both[1:], 0),
        rig.graph.replay(base, both, 1),
        rig.graph.replay(base, both, 2),
    ]
    assert len(set(map(id, states))) == 1
    rig.graph.flush()
    assert rig.kinds() == ["begin 1", "estimate 3", "replay 1", "estimate 1", "replay 1"]
    terms = rig.computer.terms
    start = terms("begin", 0)
    one = terms("replay", start, 1, 0.5, 0.0, tuple(terms("codes", start, node, 1) for node in range(3)))
    assert rig.term(states[0]) == terms("replay", one, 2, 0.5, 0.0, (terms("codes", one, 0, 2), b"xy"))


def test_states_are_kept_for_others_and_only_so_many() -> None:
    rig = Rig()
    graph = rig.graph = Graph(rig.computer, MANY, lambda node, detail: None, max_recent=2)
    base = graph.begin(0)
    state = base
    for number in range(1, 6):
        state = graph.replay(state, [applied(bytes([number]), number, b"x")], 0)
    graph.flush()
    assert graph.num_rows_used == 3, "the base, the last state, and the one before it"
    rounds = [applied(bytes([number]), number, b"x") for number in range(1, 5)]
    again = graph.replay(base, rounds, 1)
    assert again.row != -1, "it is there"
    del state, again
    graph.flush()
    assert graph.num_rows_used == 3


def test_scalars_that_nobody_needs_are_not_measured_and_their_places_are_used_again() -> None:
    rig = Rig()
    base = rig.graph.begin(0)
    said = [rig.graph.estimate(base, node, 1, 2) for node in range(4)]
    del said[1:]
    rig.graph.flush()
    assert rig.kinds() == ["begin 1", "estimate 1"]
    said[0] = rig.graph.estimate(base, 0, 2, 2)
    rig.graph.flush()
    assert rig.graph._num_slots == 1


def test_without_sharing_every_replay_is_computed() -> None:
    rig = Rig()
    graph = Graph(rig.computer, MANY, lambda node, detail: None, share=False)
    base = graph.begin(0)
    states = [
        graph.replay(base, [applied(b"one", 1, b"x"), applied(b"two", 2, b"y")], node) for node in range(3)
    ]
    graph.flush()
    assert len({state.row for state in states}) == 3
    assert len({rig.computer.rows[state.row] for state in states}) == 1


def test_a_surrogate_replays_nothing() -> None:
    surrogate = Surrogate()
    base = surrogate.begin(0)
    assert surrogate.replay(base, [applied(b"one", 1, surrogate.estimate(base, 0, 1, 2))], 0) is base
