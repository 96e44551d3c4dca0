"""A core that learns by scalars and breaks a promise is found, by the rule that says so; one that keeps them is left alone."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from node.core import CoreSettings, NodeCore
from protocols.events import (
    Aggregate,
    Effect,
    Emit,
    Estimate,
    Estimated,
    Event,
    KeepScalars,
    LearningDone,
    Phase,
    Received,
    Replay,
    RoundDone,
    RoundScalars,
    Send,
    Started,
    Train,
)
from protocols.messages import Marks, Scalars, Terms
from protocols.scalar_log import ScalarLog, signed_bytes
from protocols.scalar_terms import round_scalars
from protocols.scalars import ScalarLearning
from protocols.vocabulary import Checkpoint, ModelRef, PeerId, ScalarRecord
from sim.checkers import Checkers, Violation
from sim.scalar_checkers import SCALAR_RULES, apart
from sim.scenario_files import convert
from sim.signing import SimSignatures
from sim.swarm import run_seed
from sim.world import World

TABLES: dict[str, Any] = {
    "learning": "scalars",
    "nodes": 5,
    "dry_run": True,
    "topology": {"degree": 4},
    "scalars": {"rounds": 14, "samples": 2, "checkpoint_every": 3, "deadline_s": 2.0, "repair_s": 1.0},
    "timeline": ["at 2 s: crash nodes 1", "at 3 s: restart all"],
    "at_most_s": 200.0,
}
Change = Callable[[NodeCore, Event, list[Effect]], list[Effect]]


def watched(
    change: Change | None = None, spoil: Callable[[NodeCore], None] | None = None, **tables: Any
) -> World:
    """A run with all rules, whose node 0 does otherwise. change: of its effects. spoil: of its core, before each event."""

    class Broken(NodeCore):
        def step(self, now: float, event: Event) -> list[Effect]:
            if spoil is not None:
                spoil(self)
            effects = super().step(now, event)
            return change(self, event, effects) if change is not None else effects

    def make(settings: CoreSettings, peer: PeerId, rng: random.Random, *signs: Any) -> NodeCore:
        kind = Broken if peer == "node-00000" else NodeCore
        return kind(settings, peer, rng, *signs)

    world = World(convert({**TABLES, **tables}), core=make, checkers=Checkers(stride=1, encode=True))
    world.run()
    return world


def each(kind: type, new: Callable[[Any], Any]) -> Change:
    """Changes the effects of one kind; None takes one away."""

    def change(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
        changed = [new(effect) if isinstance(effect, kind) else effect for effect in effects]
        return [effect for effect in changed if effect is not None]

    return change


def scalars_of(core: NodeCore) -> ScalarLearning:
    assert isinstance(core.learning, ScalarLearning)
    return core.learning


# --- what is broken -------------------------------------------------------------------------------------
def speaks_twice(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    learning = scalars_of(core)
    out: list[Effect] = []
    for effect in effects:
        if isinstance(effect, KeepScalars) and isinstance(event, Estimated) and effect.records:
            (record,) = effect.records
            other = replace(record, codes=record.codes[::-1] + b"!")
            out.append(KeepScalars((record, signed(learning, other))))
        else:
            out.append(effect)
    return out


def says_otherwise(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    """Of the same length, and signed."""
    return [
        KeepScalars(tuple(signed(scalars_of(core), replace(each, codes=b"??")) for each in effect.records))
        if isinstance(effect, KeepScalars) and isinstance(event, Estimated)
        else effect
        for effect in effects
    ]


def signed(learning: ScalarLearning, record: ScalarRecord) -> ScalarRecord:
    data = signed_bytes(learning._signed_terms, record.round, record.codes, record.built_on)
    return replace(record, signature=learning._signatures.sign(data))


def in_rounds(new: Callable[[RoundScalars], RoundScalars]) -> Change:
    return each(Replay, lambda order: replace(order, rounds=tuple(map(new, order.rounds))))


def twice(rounds: Sequence[RoundScalars]) -> tuple[RoundScalars, ...]:
    return (*rounds, rounds[-1])


def forged(order: Replay) -> Replay:
    first = order.rounds[0]
    record = replace(first.records[0], codes=b"??")
    return replace(order, rounds=(replace(first, records=(record, *first.records[1:])), *order.rounds[1:]))


def back_to_front(each_round: RoundScalars) -> RoundScalars:
    return replace(each_round, records=each_round.records[::-1])


def without_one(each_round: RoundScalars) -> RoundScalars:
    """With the scale that then follows: only another node can tell."""
    settings = convert(TABLES).scalars
    return round_scalars(settings, each_round.round, each_round.records[:-1] or each_round.records)


def of_another_round(keep: KeepScalars) -> KeepScalars:
    return keep if keep.checkpoint is None else replace(keep, checkpoint=replace(keep.checkpoint, round=2))


def made_up(keep: KeepScalars) -> KeepScalars:
    if keep.checkpoint is None:
        return keep
    ref = ModelRef(b"?" * 32, 1, 3, 1)
    return replace(keep, checkpoint=replace(keep.checkpoint, ref=ref))


def forgets_terms(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    """Says where it stands before it has heard under which terms."""
    extra = [
        Send(effect.peer, Marks(0, 0, Checkpoint(0, bytes(32), 0, ModelRef(bytes(32), 1, 0, 1)), None))
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.message, Terms)
    ]
    return [*effects, *extra]


def ends_again(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
    done = [
        effect for effect in effects if isinstance(effect, Emit) and isinstance(effect.record, LearningDone)
    ]
    return [*effects, *done]


def stuffs_its_ears(core: NodeCore) -> None:
    scalars_of(core)._flood._fresh.update(
        {ScalarRecord(bytes(32), number, b"", bytes(16), bytes(64)): set() for number in range(1, 40_000)}
    )


def miscounts(core: NodeCore) -> None:
    scalars_of(core)._log.num_records += 1


BROKEN: dict[str, tuple[str, Change]] = {
    "trains": (
        "orders",
        lambda core, event, effects: [
            Train(e.token, e.ref, e.round) if isinstance(e, Estimate) else e for e in effects
        ],
    ),
    "merges": (
        "orders",
        lambda core, event, effects: [
            Aggregate(e.token, e.ref, ()) if isinstance(e, Estimate) else e for e in effects
        ],
    ),
    "estimates a later round": (
        "estimates",
        each(Estimate, lambda order: replace(order, round=order.round + 1)),
    ),
    "says two things": ("says", speaks_twice),
    "says what it has not measured": (
        "says",
        says_otherwise,
    ),
    "does not keep": ("durable", each(KeepScalars, lambda keep: None if keep.records else keep)),
    "counts what nobody signed": ("genuine", each(Replay, forged)),
    "counts a round twice": ("applied_once", each(Replay, lambda o: replace(o, rounds=twice(o.rounds)))),
    "applies authors out of order": ("applied_once", in_rounds(back_to_front)),
    "applies nothing": ("applied_once", each(Replay, lambda order: replace(order, rounds=()))),
    "replays from nowhere": (
        "held",
        each(Replay, lambda order: replace(order, ref=replace(order.ref, digest=b"?" * 32))),
    ),
    "weighs otherwise": ("weighed", in_rounds(lambda one: replace(one, scale=2 * one.scale))),
    "decays otherwise": ("weighed", in_rounds(lambda one: replace(one, decay=0.5))),
    "leaves one out": ("one_state", in_rounds(without_one)),
    "seals what nobody made": ("sealed", each(KeepScalars, made_up)),
    "seals backwards": ("sealed", each(KeepScalars, of_another_round)),
    "speaks before the terms": ("terms", forgets_terms),
    "ends twice": ("told", ends_again),
    "ends a round again": (
        "told",
        each(
            Emit,
            lambda emit: Emit(replace(emit.record, round=1)) if isinstance(emit.record, RoundDone) else emit,
        ),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_core_that_breaks_a_promise_is_found(name: str) -> None:
    rule, change = BROKEN[name]
    with pytest.raises(Violation) as caught:
        watched(change)
    assert caught.value.rule == rule, str(caught.value)


@pytest.mark.parametrize(("spoil", "rule"), [(stuffs_its_ears, "bounds"), (miscounts, "log")])
def test_what_grows_or_is_miscounted_is_found(spoil: Callable[[NodeCore], None], rule: str) -> None:
    with pytest.raises(Violation) as caught:
        watched(spoil=spoil)
    assert caught.value.rule == rule


def test_a_core_that_takes_records_of_a_sealed_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = ScalarLog.add

    def take_all(log: ScalarLog, record: ScalarRecord) -> Any:
        log.sealed, before = min(log.sealed, record.round - 1), log.sealed
        try:
            return add(log, record)
        finally:
            log.sealed = before

    def never(log: ScalarLog, record: ScalarRecord) -> bool:
        return False

    monkeypatch.setattr(ScalarLog, "add", take_all)
    monkeypatch.setattr(ScalarLog, "holds", never)

    def brings_it_again(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
        records = [
            record
            for effect in effects
            if isinstance(effect, Send) and isinstance(effect.message, Scalars)
            for record in effect.message.records
        ]
        log = scalars_of(core)._log
        late = [record for record in records if record.round <= log.sealed]
        return [*effects, KeepScalars(tuple(late))] if late else effects

    with pytest.raises(Violation) as caught:
        watched(brings_it_again, links={"duplication": 0.5, "reordering": 0.5, "reorder_s": 5.0})
    assert caught.value.rule in ("settled", "applied_once", "one_state")


def test_a_node_that_forgets_a_record_over_a_crash_is_found() -> None:
    class Forgetful(Checkers):
        def after(self, node: int, now: float, event: Event, effects: Sequence[Effect]) -> None:
            if isinstance(event, Started) and event.records:
                event = replace(event, records=event.records[1:])
            super().after(node, now, event, effects)

    world = World(convert(TABLES), checkers=Forgetful(stride=1))
    with pytest.raises(Violation, match="records, and") as caught:
        world.run()
    assert caught.value.rule == "resumes"


def test_every_rule_is_broken_by_one_of_these() -> None:
    """`settled`, `signs_once` and `bounds` have tests of their own."""
    rules = {name for name, _, _ in SCALAR_RULES}
    assert rules - {rule for rule, _ in BROKEN.values()} == {"settled", "signs_once"}


def test_a_node_that_says_two_things_in_two_lives_with_one_disk_is_found() -> None:
    """It has signed a round, and begins that round again after a crash."""

    def forgets(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
        out = []
        for effect in effects:
            if isinstance(effect, KeepScalars) and effect.records and isinstance(event, Estimated):
                record = effect.records[0]
                effect = KeepScalars((signed(scalars_of(core), replace(record, round=1)),))
            out.append(effect)
        return out

    with pytest.raises(Violation) as caught:
        watched(forgets)
    assert caught.value.rule in ("says", "signs_once")


# --- whole runs -----------------------------------------------------------------------------------------
def test_a_core_that_keeps_its_promises_is_left_alone() -> None:
    world = watched(timeline=["at 2 s: crash nodes 1", "at 3 s: wipe nodes 2", "at 4 s: restart all"])
    cores = {node.peer: node.core for node in world.nodes if node.core is not None}
    assert len(cores) == 5
    assert apart(cores) == ""
    assert all(core.phase is Phase.DONE for core in cores.values())


def test_logs_that_differ_are_found() -> None:
    world = watched()
    cores = {node.peer: node.core for node in world.nodes if node.core is not None}
    learning = scalars_of(cores[PeerId("node-00003")])
    learning._log._sealed_log, learning._log._chain = b"?" * 32, {}
    assert "different logs" in apart(cores)
    for core in cores.values():
        scalars_of(core)._fellows.clear()
    assert apart(cores) == "", "who has no link to another cannot agree with it"


SCALAR_SEEDS = [14, 84, 90, 99]


@pytest.mark.parametrize("seed", SCALAR_SEEDS)
def test_adverse_networks_keep_their_promises(seed: int) -> None:
    outcome = run_seed(seed)
    assert outcome.ok, outcome.violation


def test_a_broken_core_is_found_in_an_adverse_network() -> None:
    class Greedy(NodeCore):
        def step(self, now: float, event: Event) -> list[Effect]:
            return [
                replace(effect, rounds=twice(effect.rounds)) if isinstance(effect, Replay) else effect
                for effect in super().step(now, event)
            ]

    outcome = run_seed(SCALAR_SEEDS[2], Greedy)
    assert outcome.rule == "applied_once"
    assert "is applied to a state of round" in outcome.violation


def test_a_forged_record_is_refused_by_all() -> None:
    """Node 0 passes on what others said, changed: nobody takes it, and the links with it end."""

    def forges(core: NodeCore, event: Event, effects: list[Effect]) -> list[Effect]:
        out: list[Effect] = []
        for effect in effects:
            if (
                isinstance(effect, Send)
                and isinstance(effect.message, Scalars)
                and isinstance(event, Received)
            ):
                bad = tuple(replace(record, codes=b"\x7f\x7f") for record in effect.message.records)
                effect = Send(effect.peer, replace(effect.message, records=bad))
            out.append(effect)
        return out

    # What it sends it never kept, which is the first rule that it breaks.
    with pytest.raises(Violation) as caught:
        watched(forges, links={"loss": 0.3})
    assert caught.value.rule == "durable"
    stranger = SimSignatures(PeerId("nobody"))
    record = ScalarRecord(stranger.author, 1, b"\x01", bytes(16), stranger.sign(b"another"))
    world = World(convert({**TABLES, "timeline": []}))
    world.clock.at(1.5, _deliver, world, record)
    result = world.run()
    assert result.refused["forged"] == 1
    assert all(record not in node.disk.records for node in world.nodes)


def _deliver(world: World, record: ScalarRecord) -> None:
    node = world.nodes[0]
    assert node.core is not None
    peer = next(iter(scalars_of(node.core)._fellows))
    world._handle(node, node.epoch, Received(peer, Scalars(0, (record,))))
