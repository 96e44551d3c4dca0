"""The engine computes what the daemon computes, whatever runs together."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aggregation.base import Contribution, Params, Rule
from aggregation.rules import RULES, build, merge
from node import merging
from node.partition import Indices
from node.settings import TrainingSettings
from node.tasks import Task, initial_params, mlp, regression_metrics
from node.training import evaluate, train
from protocols.errors import ConfigError
from sim import calibration, engine
from sim.calibration import NEVER, Choice
from sim.engine import LocalEngine
from sim.orders import Begin, Measure, Merge, MergeInput, Train
from sim.scenarios import ComputeSettings

SEED = 5
MAX_DIFFERENCE = 1e-5
"""Between batched and plain, in any weight after three rounds, where weights are of the size of 1."""
SIZES = (16, 20, 5, 1, 16, 9)
NAMES = [f"node-{i:05d}" for i in range(len(SIZES))]
RULE = ("mean", "variance.corrected")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- tasks ----------------------------------------------------------------------------------------------
def toy(model: Callable[[], nn.Module], shape: Sequence[int] = (6,), **changes: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, *shape, generator=generator)
    targets = (inputs.flatten(1)[:, 0] > 0).long()
    data = (inputs[:60], targets[:60]), (inputs[60:], targets[60:])
    return Task("toy", **{"model": model, "train": data[0], "test": data[1], **changes})


def regression() -> Task:
    task = toy(lambda: mlp(6, [5], 1))
    (inputs, _), (test, _) = task.train, task.test
    return Task(
        "line",
        task.model,
        train=(inputs, inputs[:, :1] * 2),
        test=(test, test[:, :1] * 2),
        loss=F.mse_loss,
        metrics=regression_metrics,
    )


class PartlyUsed(nn.Module):
    """One frozen layer, and one that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 5)
        self.frozen = nn.Linear(5, 2).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.frozen(torch.tanh(self.used(inputs)))
        return outputs


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.other(torch.relu(self.one(inputs)))
        return outputs


class Counting(nn.Module):
    """Its buffer is replaced, not written to, which vmap loses; and it stands in a dtype of its own."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
        outputs: Tensor = self.layer(inputs)
        return outputs


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 2)
    )


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


TASKS: dict[str, tuple[Task, bool]] = {
    "softmax": (toy(lambda: mlp(6, [], 2)), True),
    "mlp": (toy(lambda: mlp(6, [8, 5], 2)), True),
    "conv": (toy(conv, (1, 6, 6)), True),
    "norms": (toy(normed, (1, 6, 6)), True),
    "batch norm": (toy(batch_normed), True),
    "partly used": (toy(PartlyUsed), True),
    "regression": (regression(), True),
    "double": (toy(lambda: mlp(6, [4], 2).double()), False),
    "dropout": (toy(dropping), False),
    "tied": (toy(Tied), False),
    "counting": (toy(Counting), False),
}
"""Each with whether its nodes can be trained in one call."""
inputs, targets = TASKS["double"][0].train
TASKS["double"] = (
    toy(lambda: mlp(6, [4], 2).double(), train=(inputs.double(), targets), test=(inputs.double(), targets)),
    True,
)


def parts(sizes: Sequence[int] = SIZES) -> list[Indices]:
    rng = np.random.default_rng(3)
    return [np.sort(rng.choice(60, size, replace=False)) for size in sizes]


def restricted(task: Task, part: Indices) -> Task:
    data = task.train[0][part], task.train[1][part]
    return Task(task.name, task.model, data, task.test, task.loss, task.metrics)


def make_engine(
    task: Task,
    training: TrainingSettings | None = None,
    rule: Sequence[Any] = RULE,
    sizes: Sequence[int] = SIZES,
    held_out: Sequence[Indices] | None = None,
    **compute: Any,
) -> LocalEngine:
    names = [f"node-{i:05d}" for i in range(len(sizes))]
    made = LocalEngine(
        task,
        parts(sizes),
        training or TrainingSettings(),
        rule,
        SEED,
        ComputeSettings(**compute),
        names,
        held_out=held_out,
    )
    made.reserve(4 * len(sizes))
    made.begin([Begin(row, row) for row in range(len(sizes))])
    return made


def difference(one: Params, other: Params) -> float:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype for name in one)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def usable(name: str) -> tuple[int, ...]:
    # BatchNorm refuses to train on a single sample, in the daemon too.
    return tuple(max(2, size) for size in SIZES) if name == "batch norm" else SIZES


# --- training -------------------------------------------------------------------------------------------
def trained_by_the_daemon(
    task: Task, training: TrainingSettings, rounds: int, sizes: Sequence[int] = SIZES
) -> list[Params]:
    found = []
    for node, part in enumerate(parts(sizes)):
        own, params = restricted(task, part), initial_params(task, node)
        for round_ in range(rounds):
            params, _ = train(own, params, training, round=round_, seed=SEED, node=NAMES[node])
        found.append(params)
    return found


def compare(name: str, training: TrainingSettings, rounds: int = 3, **compute: Any) -> float:
    """The largest difference between the engine and the daemon in any weight of any node."""
    (task, _), sizes = TASKS[name], usable(name)
    made = make_engine(task, training, sizes=sizes, **compute)
    for round_ in range(rounds):
        orders = [Train(node, node, node, round_) for node in range(len(sizes))]
        assert made.train(orders) == [""] * len(sizes)
    expected = trained_by_the_daemon(task, training, rounds, sizes)
    return max(difference(made.params(node), expected[node]) for node in range(len(sizes)))


@pytest.mark.parametrize("name", TASKS)
def test_nodes_trained_together_are_trained_as_by_the_daemon(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "compare", lambda key, tile, *runs: Choice(tile, 1, "faster, says the test"))
    task, can_be_batched = TASKS[name]
    training = TrainingSettings(local_steps=4, batch_size=5)
    found = compare(name, training)
    print(f"{name}: {found:.1e}")
    assert found < MAX_DIFFERENCE
    made = make_engine(task, training, sizes=usable(name))
    made.train([Train(0, 0, 0, 0)])
    shown = made.describe()["train"]
    assert isinstance(shown, dict)
    assert shown["batched"] == can_be_batched, shown
    if not can_be_batched:
        assert found == 0.0, "the daemon's own code"
        assert shown["reason"]


OPTIMIZERS: list[dict[str, Any]] = [
    {"weight_decay": 0.01},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.01},
    {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)},
]


@pytest.mark.parametrize("chosen", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "partly used"])
def test_every_optimizer_does_the_same_to_many_nodes_as_to_one(name: str, chosen: dict[str, Any]) -> None:
    found = compare(name, TrainingSettings(local_steps=4, batch_size=5, **chosen), batching="always")
    print(f"{name} {chosen}: {found:.1e}")
    assert found < MAX_DIFFERENCE


def test_without_batching_every_bit_is_the_daemons() -> None:
    for name in ("mlp", "batch norm", "dropout"):
        assert compare(name, TrainingSettings(local_steps=3, batch_size=5), batching="never") == 0.0


@settings(derandomize=True, max_examples=12, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 5), max_size=3),
    order=st.permutations(range(len(SIZES))),
    tile=st.integers(1, 8),
)
def test_neither_tile_nor_order_nor_grouping_changes_results(
    cuts: list[int], order: list[int], tile: int
) -> None:
    training, task = TrainingSettings(local_steps=3, batch_size=5), TASKS["mlp"][0]
    made = make_engine(task, training, batching="always", tile=tile)
    bounds = [0, *sorted(set(cuts)), len(order)]
    for start, stop in itertools.pairwise(bounds):
        made.train([Train(10 + node, node, node, 2) for node in order[start:stop]])
    for node, part in enumerate(parts()):
        expected, _ = train(
            restricted(task, part), initial_params(task, node), training, round=2, seed=SEED, node=NAMES[node]
        )
        assert difference(made.params(10 + node), expected) < MAX_DIFFERENCE
        assert difference(made.params(node), initial_params(task, node)) == 0.0, "a source stays"


@pytest.mark.parametrize("batching", ["always", "never"])
def test_a_training_that_diverges_is_told_in_the_daemons_words_and_changes_nothing(batching: str) -> None:
    task = regression()
    task.train[0][7] *= 1e30
    made = make_engine(task, TrainingSettings(local_steps=20, batch_size=5), batching=batching)
    bad = [node for node, part in enumerate(parts()) if 7 in part]
    assert 0 < len(bad) < len(SIZES), f"the parts of seed 3: {bad}"
    answers = made.train([Train(10 + node, node, node, 4) for node in range(len(SIZES))])
    told = "LocalError: training in round 4 made 0.weight non-finite; learning_rate 0.1 may be too high"
    assert answers == [told if node in bad else "" for node in range(len(SIZES))]
    for node in bad:
        assert difference(made.params(10 + node), initial_params(task, node)) == 0.0
        (at_home,) = made.train([Train(node, node, node, 4)])
        assert at_home == told
        assert difference(made.params(node), initial_params(task, node)) == 0.0


@pytest.mark.parametrize("batching", ["always", "never"])
def test_one_bad_sample_fails_one_node(batching: str) -> None:
    task = toy(lambda: mlp(6, [4], 2))
    made = make_engine(task, TrainingSettings(local_steps=20, batch_size=5), batching=batching)
    task.train[1][7] = 9  # no such class
    answers = made.train([Train(10 + node, node, node, 0) for node in range(len(SIZES))])
    for node, part in enumerate(parts()):
        assert answers[node].startswith("IndexError: ") == (7 in part), answers
        assert (difference(made.params(10 + node), initial_params(task, node)) == 0.0) == (7 in part)


# --- merging --------------------------------------------------------------------------------------------
def merges(rng: np.random.Generator, num_nodes: int) -> list[Merge]:
    def received(node: int) -> tuple[MergeInput, ...]:
        rows = rng.choice(num_nodes, int(rng.integers(0, 4)), replace=False)
        return tuple(
            MergeInput(int(row), float(rng.integers(1, 50)), int(rng.integers(0, 3)), f"peer {row}")
            for row in rows
        )

    return [Merge(num_nodes + node, node, 16.0, received(node), node, 1) for node in range(num_nodes)]


def merged_by_the_daemon(
    order: Merge, rule: Rule, state: Any, models: Sequence[Params]
) -> tuple[Params, Any]:
    local = Contribution(models[order.own], weight=order.own_weight, source="own")
    contributions = [
        Contribution(models[row], weight=weight, staleness=staleness, source=peer)
        for row, weight, staleness, peer in order.inputs
    ]
    return merge(rule, contributions, rule.init(local.params) if state is None else state, local)


@pytest.mark.parametrize("name", ["mlp", "batch norm", "double"])
@pytest.mark.parametrize("batching", ["auto", "never"])
@pytest.mark.parametrize(
    "rule", [("mean",), RULE, ({"name": "mean", "conservative": 0.3, "staleness_half_life": 2.0},)], ids=str
)
def test_merges_are_the_daemons(name: str, batching: str, rule: Sequence[Any]) -> None:
    made = make_engine(TASKS[name][0], rule=rule, sizes=usable(name), batching=batching)
    made.train([Train(node, node, node, 0) for node in range(len(SIZES))])
    models = [made.params(node) for node in range(len(SIZES))]
    orders = merges(np.random.default_rng(1), len(SIZES))
    assert made.merge(orders) == [""] * len(orders)
    for order in orders:
        expected, _ = merged_by_the_daemon(order, build(rule), None, models)
        assert difference(made.params(order.row), expected) < (1e-6 if batching == "auto" else 1e-12)
        assert difference(made.params(order.own), models[order.own]) == 0.0


@pytest.mark.parametrize("batching", ["auto", "never"])
def test_a_merge_that_cannot_be_leaves_the_own_model_and_says_why(batching: str) -> None:
    made = make_engine(TASKS["mlp"][0], rule=("mean",), batching=batching)
    own = made.params(1)
    for row in (2, 3):
        made._rows.put(row, {name: tensor * 1e11 for name, tensor in made.params(row).items()})
    orders = [
        Merge(11, 1, 16.0, (MergeInput(0, 0.0, 0, "p"),), 1, 0),
        Merge(12, 1, 16.0, (MergeInput(2, 1.0, 0, "p"), MergeInput(3, 1.0, 0, "q")), 1, 0),
        Merge(13, 1, 16.0, (MergeInput(0, 1.0, 0, "p"),), 1, 0),
    ]
    answers = made.merge(orders)
    assert answers[0] == "ValueError: contribution from 'p': weight must be finite and above 0, not 0.0"
    assert answers[1:] == ["LocalError: merging made 0.weight non-finite", ""]
    assert difference(made.params(11), own) == difference(made.params(12), own) == 0.0
    assert difference(made.params(13), own) > 0


def test_what_a_rule_remembers_lasts_for_one_life_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, float]] = []

    def update(contributions: Sequence[Contribution], state: Any, local: Contribution) -> Any:
        seen.append((contributions[0].source, state["merges"], float(state["first"].sum())))
        return [contributions[0]], {**state, "merges": state["merges"] + 1}

    rule = Rule(lambda params: {"merges": 0, "first": params["0.bias"]}, update)
    monkeypatch.setattr(merging, "build", lambda specs: rule)
    monkeypatch.setattr(engine, "build_batched", lambda specs, layout: None)
    made = make_engine(TASKS["softmax"][0])
    first = float(made.params(0)["0.bias"].sum())
    for node, life in ((0, 1), (0, 1), (1, 1), (0, 2), (0, 2)):
        made.merge([Merge(node, node, 1.0, (MergeInput(5, 1.0, 0, f"{node} {life}"),), node, life)])
        made._rows.put(0, {name: tensor + 1 for name, tensor in made.params(0).items()})
    assert [entry[:2] for entry in seen] == [("0 1", 0), ("0 1", 1), ("1 1", 0), ("0 2", 0), ("0 2", 1)]
    assert seen[1][2] == pytest.approx(first), "a rule's memory is no view of a row"


def test_every_rule_can_be_an_engines() -> None:
    task = TASKS["mlp"][0]
    held_out = [np.array([i]) for i in range(len(SIZES))]
    for name, entry in RULES.items():
        rule = [name] if entry.reduces else ["mean", name] if entry.takes_one else [name, "mean"]
        made = make_engine(task, rule=rule, held_out=held_out)
        orders = merges(np.random.default_rng(1), len(SIZES))
        assert made.merge(orders) == [""] * len(orders)


# --- measuring ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("batching", ["always", "never"])
def test_models_measured_together_are_measured_as_by_the_daemon(
    name: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS[name][0]
    refused = name in ("dropout", "tied", "counting")
    made = make_engine(task, batching="never" if refused else batching)
    monkeypatch.setattr(engine, "EVALUATION_BATCH", 7)
    orders = [Measure(node, node) for node in range(len(SIZES))]
    first = made.measure(orders)
    made.train([Train(10, 0, 0, 0)])
    found = made.measure(orders)
    assert found == first, "training in between leaves no trace"
    shown = made.describe()["measure"]
    assert isinstance(shown, dict)
    assert shown["batched"] == (batching == "always" and not refused)
    for node, values in enumerate(found):
        expected = evaluate(task, initial_params(task, node))
        assert list(values) == list(expected)
        assert values == pytest.approx(expected, abs=1e-6 if batching == "always" else 0)


def test_what_cannot_be_measured_is_empty() -> None:
    def metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
        raise ValueError("no")

    for batching in ("auto", "never"):
        made = make_engine(toy(lambda: mlp(6, [], 2), metrics=metrics), batching=batching)
        assert made.measure([Measure(0, 0), Measure(1, 1)]) == [{}, {}]


def test_consensus_is_the_root_mean_square_distance_to_the_mean() -> None:
    made = make_engine(TASKS["batch norm"][0], sizes=(10,) * 6)
    models = torch.stack(
        [
            torch.cat(
                [
                    tensor.double().flatten()
                    for tensor in made.params(row).values()
                    if tensor.is_floating_point()
                ]
            )
            for row in (1, 2, 5)
        ]
    )
    expected = (models - models.mean(0)).square().sum(1).mean().sqrt()
    assert made.consensus([1, 2, 5]) == pytest.approx(float(expected))
    assert made.consensus([3]) == made.consensus([]) == 0.0


# --- rows -----------------------------------------------------------------------------------------------
def test_rows_keep_what_they_hold_as_the_store_grows() -> None:
    made = make_engine(TASKS["batch norm"][0], sizes=(10,) * 6)
    before = [made.params(row) for row in range(6)]
    for num_rows in (10, 30, 31, 500):
        made.reserve(num_rows)
    assert all(difference(made.params(row), before[row]) == 0.0 for row in range(6))
    made.begin([Begin(499, 3)])
    assert difference(made.params(499), before[3]) == 0.0


def test_models_of_one_seed_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = make_engine(TASKS["mlp"][0]), []

    def counted(task: Task, seed: int) -> Params:
        asked.append(seed)
        return initial_params(task, seed)

    monkeypatch.setattr(engine, "initial_params", counted)
    made.begin([Begin(row, 7 + row % 2) for row in range(6)])
    assert asked == [7, 8]
    assert difference(made.params(5), initial_params(TASKS["mlp"][0], 8)) == 0.0


def test_nothing_ordered_is_nothing_done() -> None:
    made = make_engine(TASKS["mlp"][0])
    assert (made.train([]), made.merge([]), made.measure([])) == ([], [], [])
    made.close()


# --- choosing -------------------------------------------------------------------------------------------
def test_auto_measures_once_and_tells() -> None:
    task = TASKS["mlp"][0]
    task = Task("measured once", task.model, task.train, task.test)
    before = len(calibration._compared)
    made, again = make_engine(task, threads=1), make_engine(task, threads=1)
    for one in (made, again):
        one.train([Train(0, 0, 0, 0)])
        shown = one.describe()["train"]
        assert isinstance(shown, dict)
        assert shown["reason"] == "measured"
        assert shown["plain_us"] > 0
        assert shown["batched_us"] > 0
    assert len(calibration._compared) == before + 2, "training and measuring, once each"
    assert made.describe() == again.describe()


def test_calls_are_batched_from_the_size_at_which_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    # The plain loop takes 1 s a model, a call 3 s and 0.5 s a model: it pays from 6 models on.
    seconds = [calibration.NUM_PLAIN * 1.0, 3 + 2 * 0.5, 3 + 100 * 0.5]
    monkeypatch.setattr(calibration, "_seconds", lambda *runs: seconds)
    choice = calibration._compare(100, lambda num: None, lambda num: None)
    assert (choice.batched_from, choice.plain_us, choice.batched_us) == (6, 1e6, 0.53e6)
    assert [choice.batches(num) for num in (1, 5, 6, 100)] == [False, False, True, True]
    seconds = [calibration.NUM_PLAIN * 1.0, 4.0, 200.0]
    assert calibration._compare(100, lambda num: None, lambda num: None).batched_from == NEVER


def test_always_refuses_what_cannot_be_before_anything_runs() -> None:
    with pytest.raises(
        ConfigError, match=r"^compute.batching: always: RuntimeError: vmap: .* \(allowed: auto, never\)"
    ):
        make_engine(TASKS["dropout"][0], batching="always")
    with pytest.raises(ConfigError, match=r"two names share one parameter"):
        make_engine(TASKS["tied"][0], batching="always")


def test_a_batched_result_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def crooked(self: LocalEngine, tile: Any, *args: Any) -> None:
        right(self, tile, *args)
        tile[torch.float32][0, 0] += 1e-3

    right = LocalEngine._batched_round
    monkeypatch.setattr(LocalEngine, "_batched_round", crooked)
    made = make_engine(TASKS["mlp"][0])
    made.train([Train(0, 0, 0, 0)])
    shown = made.describe()["train"]
    assert isinstance(shown, dict)
    assert not shown["batched"]
    assert shown["reason"].startswith("differs from one by one by ")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"^compute.device: there is no .* \(allowed: auto, cpu"):
        make_engine(TASKS["mlp"][0], device=device)


@pytest.mark.parametrize(("with_all_us", "threads"), [(500.0, 2), (900.0, 1)])
def test_a_large_model_gets_all_threads_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, with_all_us: float, threads: int
) -> None:
    monkeypatch.setattr(engine, "_ALL_THREADS", 2)
    monkeypatch.setattr(
        LocalEngine, "_round_us", lambda *_: 1000.0 if torch.get_num_threads() == 1 else with_all_us
    )
    assert make_engine(TASKS["mlp"][0]).describe()["threads"] == threads


def test_a_small_model_gets_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_ALL_THREADS", 2)
    monkeypatch.setattr(LocalEngine, "_round_us", lambda *_: 499.0 / torch.get_num_threads() ** 2)
    assert make_engine(TASKS["mlp"][0]).describe()["threads"] == 1


def test_threads_are_set_when_given() -> None:
    assert make_engine(TASKS["mlp"][0], threads=2).describe()["threads"] == 2
