"""Seeds that all hold, a broken core that does not, and what is told of it."""

import random
import shlex
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace

from node.core import CoreSettings, NodeCore
from protocols.events import Aggregate, Effect, Event
from protocols.vocabulary import PeerId
from sim.faults import draw_faults
from sim.swarm import SwarmOutcome, command_of, run_many, run_seed

SEEDS = [6, 18, 22, 28]
"""One of every topology, short ones, that learn by gossip."""


class CountsTwice(NodeCore):
    """Puts the first received model into every merge a second time."""

    def step(self, now: float, event: Event) -> list[Effect]:
        return [
            replace(effect, inputs=(*effect.inputs, effect.inputs[0]))
            if isinstance(effect, Aggregate)
            else effect
            for effect in super().step(now, event)
        ]


class Dies(NodeCore):
    def step(self, now: float, event: Event) -> list[Effect]:
        raise RuntimeError("a bug")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_core_keeps_its_promises(seed: int) -> None:
    outcome = run_seed(seed)
    assert outcome.ok, outcome.violation
    assert (outcome.violation, outcome.rule) == ("", "")
    assert outcome.events > 100
    assert outcome.virtual_s > 1
    assert len(outcome.trace_hash) == 64
    assert outcome.faults == draw_faults(seed).kinds


def test_seeds_that_nobody_has_tried_yet() -> None:
    """Others in every run; a failure names its seed and the command that shows it again."""
    for seed in random.SystemRandom().sample(range(10**6, 10**9), 3):
        outcome = run_seed(seed)
        assert outcome.ok, outcome.violation


def test_a_seed_gives_one_run() -> None:
    first, again = run_seed(SEEDS[0]), run_seed(SEEDS[0])
    assert replace(first, wall_s=0.0) == replace(again, wall_s=0.0)


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_a_core_that_counts_a_peer_twice_is_found(seed: int) -> None:
    outcome = run_seed(seed, CountsTwice)
    assert not outcome.ok
    assert outcome.rule == "counted_once"
    first, *lines = outcome.violation.splitlines()
    assert "a peer is counted twice among node-" in first
    assert f"again: covey sim swarm --seed {seed} --verbose" in lines
    faults = next(number for number, line in enumerate(lines) if line.startswith("faults: "))
    assert lines[faults - 2].startswith("  effect Aggregate("), "the effect that broke the rule comes last"
    assert f"  seed = {seed}" in lines
    assert outcome.trace_hash == ""


def test_whatever_breaks_the_seed_is_told() -> None:
    outcome = run_seed(SEEDS[0], Dies)
    assert outcome.rule == "RuntimeError"
    assert outcome.violation.startswith("RuntimeError at test_swarm.py:")
    assert "a bug" in outcome.violation
    assert command_of(SEEDS[0]) in outcome.violation


def test_the_command_names_the_seed() -> None:
    assert shlex.split(command_of(17)) == ["covey", "sim", "swarm", "--seed", "17", "--verbose"]


def test_a_core_is_made_with_its_own_randomness() -> None:
    drawn: list[float] = []

    def make(settings: CoreSettings, peer: PeerId, rng: random.Random, *signs: Any) -> NodeCore:
        drawn.append(random.Random(str(rng.getstate())).random())
        return NodeCore(settings, peer, rng, *signs)

    run_seed(SEEDS[0], make)
    assert len(drawn) == len(set(drawn)) >= draw_faults(SEEDS[0]).scenario.nodes


# --- many -----------------------------------------------------------------------------------------------
def test_in_one_process_each_is_told_in_turn() -> None:
    told: list[SwarmOutcome] = []
    outcomes = run_many(SEEDS[1::-1], 1, told.append)
    assert outcomes == told
    assert [outcome.seed for outcome in outcomes] == SEEDS[1::-1]


def test_in_two_processes_the_outcomes_are_the_same() -> None:
    told: list[SwarmOutcome] = []
    outcomes = run_many(SEEDS, 2, told.append)
    assert [outcome.seed for outcome in outcomes] == SEEDS
    assert sorted(outcome.seed for outcome in told) == sorted(SEEDS)
    assert replace(outcomes[1], wall_s=0.0) == replace(run_seed(SEEDS[1]), wall_s=0.0)
    assert all(one.trace_hash != other.trace_hash for one, other in pairwise(outcomes))


def test_an_interrupt_ends_a_swarm_in_processes() -> None:
    def interrupt(outcome: SwarmOutcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_many(range(10_000), 2, interrupt)
