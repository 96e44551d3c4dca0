"""Scalars of many nodes at once are those that a daemon measures, and a replay gives its very bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aggregation.perturbation import params_digest, trained
from aggregation.scalar_code import DECODED
from node.scalar_state import base_module, make_state
from node.scalar_work import ScalarWork
from node.settings import TrainingSettings
from node.store import BlobStore
from node.tasks import Task, mlp, restricted
from protocols.errors import ConfigError
from protocols.events import Estimate as EstimateOrder
from protocols.events import Estimated, Replayed, RoundScalars
from protocols.events import Replay as ReplayOrder
from protocols.scalar_terms import ScalarSettings, round_scalars
from protocols.vocabulary import SIGNATURE_BYTES, STATE_ID_BYTES, ModelRef, ScalarRecord
from sim.engine import LocalEngine
from sim.learning import peer_name
from sim.orders import NO_SLOT, Begin, Counted, Estimate, Measure, Replay, ReplayedRound
from sim.scenarios import ComputeSettings
from sim.signing import author_of

SEED, NUM_NODES, NUM_SAMPLES = 7, 4, 3
BASE = bytes(range(32))
NAMES = [peer_name(index) for index in range(NUM_NODES)]
PARTS = [np.arange(9 * index, 9 * index + 9 - index) for index in range(NUM_NODES)]
"""Of different sizes, one smaller than a batch."""
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.3,
    "checkpoint_every": 2,
    "clip_quantile": 0.8,
    "weight_decay": 0.1,
}


class Tied(nn.Module):
    """Two names share one parameter, one is frozen, and there are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.first.weight
        self.last = nn.Linear(4, 2)
        self.last.bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.again(torch.tanh(self.norm(self.first(inputs))))
        outputs: Tensor = self.last(hidden)
        return outputs


MODELS: dict[str, Any] = {
    "mlp": lambda: mlp(4, [8], 2),
    "tied": Tied,
    "half": lambda: mlp(4, [8], 2).to(torch.bfloat16),
}


def make_task(model: str) -> Task:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(50, 4, generator=generator)
    targets = (inputs[:, 0] > inputs[:, 1]).long()
    if model == "half":
        inputs = inputs.to(torch.bfloat16)
    return Task(
        "toy", model=MODELS[model], train=(inputs[:36], targets[:36]), test=(inputs[36:], targets[36:])
    )


def make_engine(model: str, batching: str, batch_size: int = 7, **scalars: Any) -> LocalEngine:
    engine = LocalEngine(
        make_task(model),
        PARTS,
        TrainingSettings(batch_size=batch_size),
        ["mean"],
        SEED,
        ComputeSettings(batching=batching, threads=1),  # type: ignore[arg-type]
        NAMES,
        scalars=ScalarSettings(**{**SETTINGS, **scalars}),
        base=BASE,
    )
    engine.reserve(4)
    engine.begin([Begin(0, SEED)])
    return engine


class Daemon:
    """One node's own worker, which begins with the same model."""

    def __init__(self, home: Path, node: int, model: str, batch_size: int = 7, **scalars: Any) -> None:
        task = restricted(make_task(model), PARTS[node])
        settings = ScalarSettings(**{**SETTINGS, **scalars})
        self.module = base_module(task, SEED)
        home.mkdir()
        state = make_state(settings, self.module, BASE, home / "scratch")
        self.work = ScalarWork(
            task,
            self.module,
            state,
            settings,
            TrainingSettings(batch_size=batch_size),
            BlobStore(home, state.check),
            BASE,
            author_of(NAMES[node]),
            SEED,
            NAMES[node],
        )
        self.ref = ModelRef(BASE, 1, 0, 1)

    def estimate(self, round_: int) -> bytes:
        answer = self.work.perform(EstimateOrder(1, self.ref, round_, NUM_SAMPLES))
        assert isinstance(answer, Estimated), answer
        return answer.codes

    def replay(self, rounds: tuple[RoundScalars, ...]) -> None:
        answer = self.work.perform(ReplayOrder(1, self.ref, rounds, bytes([rounds[-1].round]) * 32, False))
        assert isinstance(answer, Replayed), answer
        self.ref = answer.ref
        self.work._state.settle()  # a pool's parameters follow from its sums only when they are asked for


def records_of(round_: int, said: dict[int, bytes]) -> tuple[ScalarRecord, ...]:
    built_on, signature = bytes(STATE_ID_BYTES), bytes(SIGNATURE_BYTES)
    records = (
        ScalarRecord(author_of(NAMES[node]), round_, codes, built_on, signature)
        for node, codes in said.items()
    )
    return tuple(sorted(records, key=lambda record: record.author))


def as_order(row: int, source: int, rounds: tuple[RoundScalars, ...], slots: dict[bytes, int]) -> Replay:
    """Codes that were measured here by their slots, others as they are."""
    replayed = [
        ReplayedRound(
            each.round,
            each.scale,
            each.decay,
            tuple(
                Counted(record.author, slots.get(record.codes, NO_SLOT), record.codes)
                for record in each.records
            ),
        )
        for each in rounds
    ]
    return Replay(row, source, tuple(replayed), 0)


@pytest.mark.parametrize(
    ("model", "scalars"),
    [
        ("mlp", {}),
        ("mlp", {"rounding": "stochastic", "epsilon": 0.01}),
        ("mlp", {"direction": "gaussian"}),
        ("mlp", {"pool": 32, "weight_decay": 0.0}),
        ("mlp", {"private_clip": 0.5}),
        ("tied", {}),
        ("half", {"epsilon": 2.0**-5}),
    ],
)
def test_one_by_one_it_does_what_a_daemon_does(tmp_path: Path, model: str, scalars: dict[str, Any]) -> None:
    """The same codes in two rounds, and after each the same bytes."""
    engine = make_engine(model, "never", **scalars)
    daemons = [Daemon(tmp_path / NAMES[node], node, model, **scalars) for node in range(NUM_NODES)]
    settings, row = ScalarSettings(**{**SETTINGS, **scalars}), 0
    for round_ in (1, 2):
        orders = [Estimate(node, row, node, round_, NUM_SAMPLES) for node in range(NUM_NODES)]
        assert engine.estimate(orders) == [""] * NUM_NODES
        assert engine._scalars is not None
        said = {node: daemon.estimate(round_) for node, daemon in enumerate(daemons)}
        assert {node: engine._scalars._codes[node] for node in said} == said
        rounds = (round_scalars(settings, round_, records_of(round_, said)),)
        slots = {codes: node for node, codes in said.items()}
        assert engine.replay([as_order(round_, row, rounds, slots)]) == [""]
        row = round_
        for daemon in daemons:
            daemon.replay(rounds)
        theirs = trained(daemons[0].module)
        ours = engine.params(row)
        assert params_digest({name: ours[name] for name in theirs}) == params_digest(theirs)
    if model == "tied":
        assert torch.equal(ours["first.weight"], ours["again.weight"])


@pytest.mark.parametrize("model", ["mlp", "tied"])
@pytest.mark.parametrize("batch_size", [7, 32])
def test_batched_is_one_by_one_to_rounding(model: str, batch_size: int) -> None:
    """Near the middle between two levels the last bit may decide: the next level is as good."""
    codes = []
    for batching in ("always", "never"):
        engine = make_engine(model, batching, batch_size)
        orders = [Estimate(node, 0, node, 1, 8) for node in range(NUM_NODES)]
        assert engine.estimate(orders) == [""] * NUM_NODES
        assert engine._scalars is not None
        codes.append(
            np.frombuffer(b"".join(engine._scalars._codes[node] for node in range(NUM_NODES)), np.uint8)
        )
        assert engine._scalars._choice.batches(2) == (batching == "always")
    batched, plain = DECODED[codes[0]], DECODED[codes[1]]
    assert len(set(codes[1].tolist())) > 8, "they are not all alike"
    assert np.all(np.abs(batched - plain) <= 0.14 * np.abs(plain) + 1e-3)
    assert np.mean(codes[0] == codes[1]) > 0.9


def test_replaying_at_once_and_in_turn_is_the_same_and_rows_are_used_again() -> None:
    engine = make_engine("mlp", "never")
    settings = ScalarSettings(**SETTINGS)
    rounds = tuple(
        round_scalars(
            settings, number, records_of(number, {node: bytes([60 + node, 190, number]) for node in range(3)})
        )
        for number in range(1, 6)
    )
    assert engine.replay([as_order(1, 0, rounds, {})]) == [""]
    engine.begin([Begin(2, SEED)])
    for each in rounds:
        assert engine.replay([as_order(2, 2, (each,), {})]) == [""]
    once, turned = engine.params(1), engine.params(2)
    assert params_digest(once) == params_digest(turned)
    assert not torch.equal(once["0.weight"], engine.params(0)["0.weight"])


def test_what_cannot_be_measured_says_nothing_and_what_cannot_be_replayed_changes_nothing() -> None:
    engine = make_engine("mlp", "auto")
    assert engine._scalars is not None
    engine._rows.params(0)["0.weight"].fill_(torch.inf)
    (problem,) = engine.estimate([Estimate(0, 0, 0, 1, 2)])
    assert "not finite" in problem
    assert engine._scalars._codes[0] == bytes(2)
    engine.begin([Begin(0, SEED)])
    before = engine.params(0)
    rounds = (RoundScalars(1, 1e38, 0.0, records_of(1, {0: b"\x7f"})),)
    (problem,) = engine.replay([as_order(1, 0, rounds, {})])
    assert "scale" in problem
    assert params_digest(engine.params(1)) == params_digest(before)
    rounds = (RoundScalars(1, 1e34, 0.0, records_of(1, {0: b"\x7f" * 200})),)
    for _ in range(20):
        (problem,) = engine.replay([as_order(0, 0, rounds, {})])
    assert problem == "" or "finite" in problem


def test_a_model_that_many_have_is_measured_once() -> None:
    engine = make_engine("mlp", "auto")
    found = engine.measure([Measure(0, node) for node in range(NUM_NODES)])
    assert len(found) == NUM_NODES
    assert all(metrics == found[0] for metrics in found)


def test_what_scalars_cannot_train_is_told() -> None:
    frozen = mlp(4, [], 2).requires_grad_(False)
    MODELS["frozen"] = lambda: frozen
    MODELS["double"] = lambda: mlp(4, [], 2).double()
    try:
        for model, what in (("frozen", "nothing is learnt"), ("double", "which scalars cannot train")):
            with pytest.raises(ConfigError, match=what):
                make_engine(model, "never")
    finally:
        del MODELS["frozen"], MODELS["double"]
