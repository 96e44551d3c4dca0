"""Sharded computing gives what one engine gives: over actors in this process, and on a local Ray of two workers, which is
skipped where Ray is not installed."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from node.settings import TrainingSettings
from node.tasks import Task
from protocols.errors import ConfigError, LocalError
from sim.engine import LocalEngine
from sim.learning import Facts, compute_here, peer_name
from sim.orders import Begin, Measure, Merge, MergeInput, Program, Step, Train, run_program
from sim.other_process import Ready, Refused
from sim.ray_computer import (
    Actor,
    Job,
    RayComputer,
    Sharding,
    Spread,
    _agreed,
    compute_on_ray,
    overall_distance,
)
from sim.results import Result
from sim.rows import Rows
from sim.scenario_files import load
from sim.scenarios import ComputeSettings, Scenario
from sim.world import World

ROOT = Path(__file__).parents[2]
NUM_NODES = 7
NUM_ROWS = 12
TOLERANCE = 1e-6
"""Of distances: means are taken shard by shard. Losses and metrics are those of the same bits."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- in this process ------------------------------------------------------------------------------------
class LostError(Exception):
    """What the stand-in for Ray raises where an actor is gone."""


def ray_here() -> Any:
    """Does every call when it is sent, which is one of the orders in which Ray may do them."""
    return SimpleNamespace(
        exceptions=SimpleNamespace(RayError=LostError), get=lambda answers, timeout=None: answers
    )


def handle(actor: Actor) -> Any:
    def remote(method: Callable[..., Any]) -> Any:
        return SimpleNamespace(remote=method)

    return SimpleNamespace(export=remote(actor.export), do=remote(actor.do), describe=remote(actor.describe))


def engine() -> LocalEngine:
    """Of models with float32 and int64 tensors."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    task = Task(
        "toy",
        model=lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        train=(inputs[:42], targets[:42]),
        test=(inputs[42:], targets[42:]),
    )
    return LocalEngine(
        task,
        np.arange(42).reshape(NUM_NODES, 6),
        TrainingSettings(local_steps=2, batch_size=3, learning_rate=0.2),
        ["mean", "variance.corrected"],
        3,
        ComputeSettings(batching="never"),
        names=[peer_name(index) for index in range(NUM_NODES)],
    )


def sharded(num_actors: int) -> RayComputer:
    handles = []
    for _ in range(num_actors):
        actor = Actor()
        actor._engine = engine()
        handles.append(handle(actor))
    return RayComputer(ray_here(), handles, NUM_NODES, {"ray actors": num_actors}, ExitStack())


def drawn_program(rng: random.Random, written: set[int]) -> Program:
    """Any that keeps the contract. Rows go from node to node; some merges fail.

    written: rows that hold a model, before and after.
    """
    steps: list[Step] = []
    for _ in range(rng.randrange(1, 6)):
        # Every row of a step is either read, by anybody, or written, or one order's own for both.
        rows = rng.sample(range(NUM_ROWS), NUM_ROWS)
        to_write = rows[: rng.randrange(1, 6)]
        to_read = [row for row in rows[len(to_write) :] if row in written]
        step: tuple[list[Begin], list[Train], list[Merge]] = ([], [], [])
        kind = rng.randrange(3) if to_read else 0
        for row in to_write:
            own = row if row in written and rng.random() < 0.3 else rng.choice(to_read or [row])
            node = rng.randrange(NUM_NODES)
            if kind == 0:
                step[0].append(Begin(row, rng.randrange(4)))
            elif kind == 1:
                step[1].append(Train(row, own, node, rng.randrange(5)))
            else:
                inputs = [
                    MergeInput(rng.choice(to_read), rng.choice([0.0, 1.0, 2.0, 3.0]), 0, f"peer-{i}")
                    for i in range(rng.randrange(4))
                ]
                step[2].append(Merge(row, own, 1.0, tuple(inputs), node, 0))
        written.update(to_write)
        steps.append(Step(*step))
    some = sorted(written)
    return Program(
        num_rows=NUM_ROWS,
        steps=steps,
        measures=[Measure(row, 0) for row in rng.sample(some, rng.randrange(len(some) + 1))],
        comparisons=[rng.choices(some, k=rng.randrange(5)) for _ in range(rng.randrange(3))],
        merged=[rng.choices(some, k=rng.randrange(1, 5)) for _ in range(rng.randrange(3))],
    )


@given(st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_shards_give_what_one_engine_gives(seed: int, num_actors: int) -> None:
    rng, written = random.Random(seed), set[int]()
    one, many = engine(), sharded(num_actors)
    for _ in range(4):
        program = drawn_program(rng, written)
        wanted = run_program(one, program)
        many.submit(program)
        found = many.answers()
        assert found.failures == wanted.failures, f"seed {seed}"
        assert found.metrics == wanted.metrics, f"seed {seed}"
        assert found.merged == wanted.merged, f"seed {seed}"
        assert found.distances == pytest.approx(wanted.distances, rel=TOLERANCE, abs=TOLERANCE), (
            f"seed {seed}"
        )


def test_answers_come_program_by_program() -> None:
    computer = sharded(2)
    for row in range(2):
        computer.submit(Program(2, [Step(begins=[Begin(row, row)])], [Measure(row, 0)], []))
    one = engine()
    one.reserve(2)
    one.begin([Begin(0, 0), Begin(1, 1)])
    assert [computer.answers().metrics[0] for _ in range(2)] == one.measure([Measure(0, 0), Measure(1, 0)])


def test_a_lost_actor_is_told_of() -> None:
    ray = ray_here()
    computer = RayComputer(ray, [handle(Actor())], 1, {"ray actors": 1}, ExitStack())

    def get(answers: Any, timeout: float | None = None) -> Any:
        raise LostError("The actor died unexpectedly.\n\tclass_name: Actor")

    ray.get = get
    computer.submit(Program(0, [], [], []))
    with pytest.raises(LocalError, match=r"computing on Ray failed: The actor died"):
        computer.answers()
    computer._actors[0].describe.remote = lambda: None
    assert computer.describe() == {"ray actors": 1, "models moved": 0}


# --- planning -------------------------------------------------------------------------------------------
def rounds_of(neighbours: Callable[[int], Sequence[int]], num_nodes: int) -> Program:
    """All nodes begin, train and merge with their neighbours; two rows for each."""
    nodes = range(num_nodes)
    merges = [
        Merge(
            node + num_nodes,
            node,
            1.0,
            tuple(MergeInput(other, 1.0, 0, peer_name(other)) for other in neighbours(node)),
            node,
            0,
        )
        for node in nodes
    ]
    steps = [
        Step(begins=[Begin(node, node) for node in nodes]),
        Step(trains=[Train(node, node, node, 0) for node in nodes]),
        Step(merges=merges),
    ]
    return Program(2 * num_nodes, steps, [], [])


def test_only_what_is_read_elsewhere_moves() -> None:
    sharding = Sharding(num_shards=4, num_nodes=20)
    sharding.split(rounds_of(lambda node: [], 20))
    assert sharding.num_moved == 0, "each node begins, trains and merges at home"
    sharding.split(rounds_of(lambda node: [(node + 1) % 20], 20))
    assert sharding.num_moved == 4, "a ring is cut at four places"


def test_a_model_moves_once_in_a_step_however_many_read_it() -> None:
    sharding = Sharding(num_shards=2, num_nodes=8)
    (_, _, (near, far), *_) = sharding.split(rounds_of(lambda node: [0], 8))
    assert near.moves == {}
    assert [list(map(len, moved)) for moved in far.moves.values()] == [[1, 1]]


def test_what_is_begun_never_moves() -> None:
    sharding = Sharding(num_shards=2, num_nodes=2)
    steps = [Step(begins=[Begin(0, 9)]), Step(trains=[Train(1, 0, 0, 0), Train(2, 0, 1, 0)])]
    program = Program(3, steps, [], [[0, 1, 2]])
    _, trained, _ = sharding.split(program)
    assert [[begin.seed for begin in part.job.begins] for part in trained] == [[9], [9]]
    assert sharding.num_moved == 0


def test_rows_are_used_again() -> None:
    sharding, rng = Sharding(num_shards=3, num_nodes=NUM_NODES), random.Random(0)
    written: set[int] = set()
    for _ in range(200):
        sharding.split(drawn_program(rng, written))
    # Its own of every row, and one borrowed of every row that is read.
    assert max(sharding._num_rows) <= 2 * NUM_ROWS


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), max_size=12), st.randoms())
def test_the_distance_of_all_is_that_of_the_groups(models: list[list[float]], rng: random.Random) -> None:
    all_of_them = np.array(models).reshape(-1, 3)
    spreads = []
    rest = all_of_them
    while len(rest):
        cut = rng.randrange(len(rest)) + 1
        group, rest = rest[:cut], rest[cut:]
        distance = float(np.sqrt(np.square(group - group.mean(0)).sum() / cut))
        spreads.append(Spread(cut, distance, group.mean(0)))
    centre = all_of_them.mean(0) if models else 0.0
    wanted = float(np.sqrt(np.square(all_of_them - centre).sum() / max(1, len(models))))
    assert overall_distance(spreads) == pytest.approx(wanted, rel=1e-9, abs=1e-8)


# --- moving ---------------------------------------------------------------------------------------------
def test_rows_move_to_the_bit_whatever_their_dtype() -> None:
    params = {
        "weight": torch.tensor([[1.5, torch.nan], [-0.0, torch.inf]]),
        "counter": torch.tensor(2**40 + 1),
        "half": torch.tensor([1.0, -3.0, 7.0], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "nothing": torch.zeros(0, dtype=torch.float64),
    }
    source, target = (Rows(params, torch.device("cpu")) for _ in range(2))
    for rows in (source, target):
        rows.reserve(3)
    source.put(0, params)
    source.put(2, {name: torch.zeros_like(tensor) for name, tensor in params.items()})
    data = source.export(torch.tensor([2, 0]))
    data.flags.writeable = False  # as what comes from Ray's store
    target.import_(torch.tensor([0, 1]), data)
    for name, tensor in target.params(1).items():
        assert tensor.dtype == params[name].dtype
        assert tensor.shape == params[name].shape
        assert torch.equal(tensor.nan_to_num(7.0), params[name].nan_to_num(7.0)), name
    assert not any(tensor.any() for tensor in target.params(0).values())


# --- an actor -------------------------------------------------------------------------------------------
def small(tmp_path: Path, **changes: Any) -> Scenario:
    scenario, _ = load("baseline", ["nodes=8", "gossip.rounds=4", "compute.batching=never"])
    return msgspec.structs.replace(scenario, **changes)


def test_an_actor_makes_the_engine_itself(tmp_path: Path) -> None:
    actor, scenario = Actor(), small(tmp_path)
    _, answer = actor.start(msgspec.to_builtins(scenario), str(tmp_path))
    computer, facts = compute_here(scenario, tmp_path)
    assert answer == Ready(facts)
    done = actor.do(msgspec.msgpack.encode(Job(1, begins=[Begin(0, 5)], measures=[Measure(0, 0)])))
    computer.submit(Program(1, [Step(begins=[Begin(0, 5)])], [Measure(0, 0)], []))
    assert done.metrics == computer.answers().metrics


def test_an_actor_refuses_what_it_has_not_got(tmp_path: Path) -> None:
    scenario = small(tmp_path)
    elsewhere = msgspec.structs.replace(
        scenario, data=msgspec.structs.replace(scenario.data, task="my_task.py:make", options={})
    )
    _, answer = Actor().start(msgspec.to_builtins(elsewhere), str(tmp_path))
    assert isinstance(answer, Refused)
    assert answer.path == "--ray"
    assert "has no task file" in answer.problem
    _, answer = Actor().start(msgspec.to_builtins(small(tmp_path, rule="no")), str(tmp_path))
    assert isinstance(answer, Refused)
    assert answer.path == "rule"


def test_machines_must_agree_on_the_task() -> None:
    one = Ready(Facts("digits", b"schema", 10, [1, 2]))
    other = Ready(Facts("digits", b"schema", 10, [1, 3]))
    assert _agreed([("a", one), ("b", one)]) == one.facts
    with pytest.raises(ConfigError, match="--ray: b has another task or other data"):
        _agreed([("a", one), ("b", other)])
    with pytest.raises(ConfigError, match=r"data\.path: there is no file \(on b\)"):
        _agreed([("a", one), ("b", Refused("data.path", "there is no file", ""))])


# --- without a cluster ----------------------------------------------------------------------------------
def test_without_ray_there_is_a_remedy() -> None:
    script = (
        "import sys; sys.modules['ray'] = None\nfrom pathlib import Path\n"
        "from sim.ray_computer import compute_on_ray\nfrom sim.scenarios import Scenario\n"
        "compute_on_ray(None)(Scenario(), Path())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "--ray: ray is not installed (allowed: pip install 'covey[ray]')" in ended.stderr


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, address: str) -> None:
    """Before the tests with a cluster: one that stands is used whatever the address."""
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=f"--ray: no Ray cluster at {address}"):
        compute_on_ray(address)(small(tmp_path), tmp_path)


# --- on Ray ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["different", "common"])
def test_on_ray_a_run_is_what_it_is_here(tmp_path: Path, cluster: Any, start: str) -> None:
    scenario = small(tmp_path)
    data = msgspec.structs.replace(scenario.data, start=start)
    scenario = msgspec.structs.replace(
        scenario, data=data, timeline=("at 1 s: crash 30 %", "at 1.5 s: restart all")
    )

    def result(make_computer: Any) -> tuple[Result, dict[str, object]]:
        world = World(scenario, tmp_path, make_computer=make_computer)
        try:
            return world.run(), world.plan.describe()
        finally:
            world.plan.close()

    here, _ = result(compute_here)
    there, described = result(compute_on_ray(None, num_actors=2))
    assert there.trace_hash == here.trace_hash
    assert there.accuracy_mean == pytest.approx(here.accuracy_mean, abs=1e-3)
    assert there.consensus_distance == pytest.approx(here.consensus_distance, rel=1e-3)
    assert described["ray actors"] == 2
    assert described["models moved"]
    assert described["parameters"]


@pytest.mark.filterwarnings("ignore")
def test_closing_ends_the_actors_and_leaves_a_cluster_that_was_there(tmp_path: Path, cluster: Any) -> None:
    computer, _ = compute_on_ray(None, num_actors=2)(small(tmp_path), tmp_path)
    assert isinstance(computer, RayComputer)
    computer.close()
    computer.close()
    for actor in computer._actors:
        with pytest.raises(cluster.exceptions.RayActorError):
            cluster.get(actor.describe.remote())
    assert cluster.is_initialized()


@pytest.mark.filterwarnings("ignore")
def test_what_a_worker_refuses_is_refused_here(tmp_path: Path, cluster: Any) -> None:
    with pytest.raises(ConfigError, match="rule: "):
        compute_on_ray(None, num_actors=1)(small(tmp_path, rule="no"), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_more_actors_than_have_room_are_refused(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.ray_computer.PLACED_WITHIN_S", 0.0)
    with pytest.raises(ConfigError, match="--ray: no room for"):
        compute_on_ray(None, num_actors=3)(small(tmp_path), tmp_path)
