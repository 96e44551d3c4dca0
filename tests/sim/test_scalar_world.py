"""Whole networks that learn by scalars: one log, one state, and a trace that no rounding has a part in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aggregation import spsa
from aggregation.perturbation import params_digest
from node.task_loading import make_task
from node.tasks import initial_params
from protocols.errors import ConfigError
from protocols.events import KeepScalars
from protocols.scalar_terms import round_scalars
from protocols.scalars import ScalarLearning
from protocols.vocabulary import Checkpoint, ModelRef, ScalarRecord
from sim import world as module
from sim.checkers import Checkers
from sim.engine import LocalEngine
from sim.graph import Codes, Graph, Surrogate, Value
from sim.learning import compute_nothing
from sim.orders import Here
from sim.other_process import compute_beside
from sim.ray_computer import compute_on_ray
from sim.results import Result, ScalarFigures
from sim.running import run_scenario
from sim.scalar_checkers import apart
from sim.scalar_world import ScalarDisk, ScalarSide, as_rows, name_codes
from sim.scenario_files import convert, validate
from sim.scenarios import Scenario
from sim.signing import SimSignatures, author_of
from sim.world import SimNode, World

BASE: dict[str, Any] = {
    "learning": "scalars",
    "nodes": 6,
    "topology": {"degree": 3},
    "data": {"options": {"hidden": [4]}},
    "training": {"batch_size": 16},
    "scalars": {
        "rounds": 12,
        "samples": 4,
        "learning_rate": 0.1,
        "checkpoint_every": 4,
        "quorum": 1.0,
        "repair_s": 1.0,
    },
    "evaluation": {"every": 4},
    "compute": {"threads": 1},
}
STORM: dict[str, Any] = {
    "nodes": 8,
    "scalars": {
        "rounds": 25,
        "late_rounds": 5,
        "wait_for_peers": 2,
        "wait_at_most_s": 10.0,
        "deadline_s": 2.0,
        "pause_s": 0.5,
    },
    "links": {"loss": 0.05, "jitter_s": 0.01},
    "view": {"heartbeat_s": 1.0, "dead_after_s": 4.0, "redial_max_s": 5.0},
    "timeline": ["at 5 s: crash nodes 1,2", "at 7 s: wipe nodes 3", "at 9 s: restart all"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scenario(**tables: Any) -> Scenario:
    """BASE with tables merged into its own."""
    data = dict(BASE)
    for name, value in tables.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return convert(data)


def run(**tables: Any) -> tuple[World, Result]:
    world = World(scenario(**tables), checkers=Checkers(stride=1, encode=True))
    return world, world.run()


def figures(result: Result) -> ScalarFigures:
    assert result.scalars is not None
    return result.scalars


def engine_of(world: World) -> LocalEngine:
    computer = world.plan.computer
    assert isinstance(computer, Here)
    assert isinstance(computer._engine, LocalEngine)
    return computer._engine


def state_of(world: World, node: SimNode) -> bytes:
    """The digest of the very bytes that a node has learned."""
    assert node.core is not None
    assert node.core.model is not None
    return params_digest(engine_of(world).params(node.held[node.core.model.digest].row))


# --- a calm network -------------------------------------------------------------------------------------
def test_a_network_learns_and_ends_in_one_state() -> None:
    world, result = run(scalars={"rounds": 60, "samples": 16, "learning_rate": 0.3})
    assert figures(result).num_states == 1
    assert result.finished == 6
    assert result.accuracy_mean == result.accuracy_min == result.accuracy_max
    assert result.accuracy_mean is not None
    assert result.accuracy_mean > 0.5 > result.accuracy_by_round[0]
    assert result.evaluated_rounds == list(range(4, 61, 4))
    assert figures(result).log_records >= 6 * 58
    assert figures(result).held_records < figures(result).log_records, "the log is cut"
    assert 100 < figures(result).log_bytes / figures(result).log_records < 160
    assert result.fetches == 0, "no model travels where nobody comes late"
    assert result.failed_work == 0
    graph = world.plan.learning
    assert isinstance(graph, Graph)
    assert (
        len({node.held[node.core.model.digest] for node in world.nodes if node.core and node.core.model}) == 1
    )


def test_states_computed_each_for_itself_are_equal_to_the_byte() -> None:
    """By default equal states are one value. Here every node computes its own, but where it fetched another's checkpoint."""
    digests = []
    for share in (True, False):
        world = World(scenario(**STORM))
        graph = world.plan.learning
        assert isinstance(graph, Graph)
        graph._share = share
        assert figures(world.run()).num_states == 1
        found = {state_of(world, node) for node in world.nodes}
        assert len(found) == 1
        rows = {
            node.held[node.core.model.digest].row for node in world.nodes if node.core and node.core.model
        }
        assert len(rows) == 1 if share else len(rows) >= 5
        digests.append(found)
    assert digests[0] == digests[1]


def test_the_state_follows_from_the_log_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What node 0 kept, replayed from the base by the library, gives the bytes that all nodes have."""
    kept: dict[ScalarRecord, None] = {}
    perform = module._PERFORM[KeepScalars]

    def keep(world: World, node: SimNode, effect: KeepScalars) -> None:
        if node.index == 0:
            kept.update(dict.fromkeys(effect.records))
        perform(world, node, effect)

    monkeypatch.setitem(module._PERFORM, KeepScalars, keep)
    monkeypatch.setattr(ScalarSide, "forget", lambda side, cut: None)
    world, result = run()
    settings, base = world.scenario.scalars, world.plan.facts.base
    engine = engine_of(world)
    assert world._scalars is not None
    assert engine._scalars is not None
    params = initial_params(make_task("digits", {"hidden": [4]}, Path.cwd()), 0)
    rounds = []
    for number in range(1, settings.rounds + 1):
        records = tuple(sorted((r for r in kept if r.round == number), key=lambda record: record.author))
        scale = round_scalars(settings, number, records)
        said = world._scalars._round(scale).scalars
        codes = [c if isinstance(c, bytes) else engine._scalars._codes[c.slot] for _, c in said]
        entries = [(record.author, code) for record, code in zip(records, codes, strict=True)]
        rounds.append(spsa.Round(number, scale.scale, scale.decay, entries))
    spsa.replay(
        params,
        rounds,
        spsa.open_clip(),
        base=base,
        quantile=settings.clip_quantile,
        every=settings.checkpoint_every,
        undecayed={name for name, tensor in params.items() if tensor.dim() < 2},
    )
    assert params_digest(params) == state_of(world, world.nodes[3])
    assert figures(result).log_records == len([record for record in kept if record.round <= settings.rounds])


# --- the trace ------------------------------------------------------------------------------------------
def test_a_seed_gives_one_trace_wherever_and_whether_it_is_computed(tmp_path: Path) -> None:
    here = World(scenario(**STORM), tmp_path).run()
    again = World(scenario(**STORM), tmp_path).run()
    nothing = World(scenario(**STORM), tmp_path, make_computer=compute_nothing).run()
    plain = World(scenario(**STORM, compute={"batching": "never", "max_pending": 5}), tmp_path).run()
    beside_world = World(scenario(**STORM), tmp_path, make_computer=compute_beside)
    beside = beside_world.run()
    beside_world.plan.close()
    assert here == again
    assert len({each.trace_hash for each in (here, nothing, plain, beside)}) == 1
    assert beside.accuracy_by_round == here.accuracy_by_round
    assert World(scenario(**STORM, seed=1), tmp_path).run().trace_hash != here.trace_hash


def test_a_dry_run_has_the_network_and_no_models() -> None:
    world, result = run(dry_run=True, nodes=40, topology={"degree": 4})
    assert isinstance(world.plan.learning, Surrogate)
    assert figures(result).num_states == 1
    assert result.accuracy_mean is None
    assert world._scalars is not None
    assert not world._scalars._estimates


def test_names_of_estimates_differ_and_are_no_longer_than_their_codes() -> None:
    names = {name_codes(node, number, 16) for node in range(20) for number in range(20)}
    assert len(names) == 400
    assert {len(name) for name in names} == {16}
    assert name_codes(3, 7, 200)[:16] == name_codes(3, 7, 16), "and say nothing of what was measured"


def test_nothing_is_left_in_memory() -> None:
    world, _ = run(scalars={"rounds": 40})
    graph = world.plan.learning
    assert isinstance(graph, Graph)
    assert graph.num_rows_used <= 4 * 6 + 8, "a few rows for each node, whatever the number of rounds"
    assert world._scalars is not None
    held = sum(map(len, world._scalars._estimates.values()))
    assert held < 6 * 25, "estimates go with the records that are cut"
    assert graph._num_slots < 6 * 30


# --- crashes --------------------------------------------------------------------------------------------
def test_who_crashes_goes_on_with_its_log_and_who_loses_its_disk_comes_back_too() -> None:
    world, result = run(**STORM)
    found = figures(result)
    assert found.num_states == 1
    assert found.caught_up >= 3
    assert found.behind == 0
    assert found.catch_up_median_s is not None
    assert found.catch_up_max_s is not None
    assert 0 < found.catch_up_median_s <= found.catch_up_max_s < 60
    assert found.served_bytes > 0
    assert not apart({node.peer: node.core for node in world.nodes if node.core})
    for node in world.nodes:
        assert node.core is not None
        learning = node.core.learning
        assert isinstance(learning, ScalarLearning)
        assert node.disk.checkpoint == learning._sealed


def test_a_disk_keeps_what_is_needed_to_go_on() -> None:
    disk = ScalarDisk()
    records = [ScalarRecord(bytes(32), number, b"a", bytes(16), bytes(64)) for number in range(1, 9)]
    disk.keep(records, None, 0)
    assert disk.after_checkpoint() == tuple(records)
    sealed = Checkpoint(6, bytes(32), 6, ModelRef(bytes(32), 1, 6, 1))
    disk.keep((), sealed, 4)
    assert [record.round for record in disk.records] == [5, 6, 7, 8]
    assert [record.round for record in disk.after_checkpoint()] == [7, 8]


def test_late_joiners_are_timed() -> None:
    _, result = run(nodes=8, churn={"join_within_s": 4.0}, scalars={"rounds": 40})
    assert figures(result).caught_up > 0
    assert figures(result).num_states == 1


# --- figures and settings -------------------------------------------------------------------------------
def test_the_figures_are_told(tmp_path: Path) -> None:
    outcome = run_scenario(scenario(), tmp_path, tmp_path / "out")
    found = figures(outcome.result)
    assert set(as_rows(found)) == {"log", "states", "repair"}
    assert (tmp_path / "out" / "result.json").read_text().count('"log_records"') == 1
    if outcome.report is not None:
        page = outcome.report.read_text()
        assert "Final states" in page
        assert "Log" in page


def test_what_is_sent_is_told_apart() -> None:
    _, result = run(links={"loss": 0.2}, scalars={"rounds": 20, "late_rounds": 5, "repair_s": 0.5})
    found = figures(result)
    assert found.flooded_bytes > found.served_bytes > 0
    assert found.compared_bytes > 0
    assert found.marks_bytes > 0
    total = found.flooded_bytes + found.served_bytes + found.compared_bytes + found.marks_bytes
    assert total < result.bytes_sent


@pytest.mark.parametrize(
    ("tables", "path"),
    [
        ({"scalars": {"evaluate_every": 3}}, "scalars.evaluate_every"),
        ({"devices": {"estimate_s": 0.0, "replay_s": 0.0}}, "devices.estimate_s"),
    ],
)
def test_what_does_not_fit_is_told_by_its_path(tables: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(scenario(**tables), Path.cwd())
    assert caught.value.path == path


def test_what_contradicts_itself_is_told_by_its_table() -> None:
    with pytest.raises(ConfigError) as caught:
        convert({"scalars": {"schedule": "linear", "rounds": 0}})
    assert caught.value.path == "scalars"


def test_scalars_are_computed_on_one_machine() -> None:
    with pytest.raises(ConfigError, match="one machine"):
        compute_on_ray(None)(scenario(), Path.cwd())


def test_only_members_count() -> None:
    world, result = run(scalars={"members": ["node-00000", "node-00001", "node-00002", "node-00003"]})
    assert figures(result).num_states == 1, "the others follow them"
    assert result.refused == {}, "and say nothing themselves"
    for node in world.nodes:
        assert node.core is not None
        assert isinstance(node.core.learning, ScalarLearning)
        log = node.core.learning._log
        assert {record.author for record in log.records()} <= {author_of(n.peer) for n in world.nodes[:4]}


def test_a_signature_is_of_its_author_and_its_data() -> None:
    one, other = SimSignatures(module.peer_name(0)), SimSignatures(module.peer_name(1))
    signature = one.sign(b"data")
    assert len(signature) == 64
    assert other.verify(one.author, b"data", signature)
    assert not other.verify(other.author, b"data", signature)
    assert not other.verify(one.author, b"date", signature)


def test_an_estimate_of_a_name_that_is_taken_is_the_first_one() -> None:
    side = ScalarSide(ModelRef(bytes(32), 1, 0, 1))
    first, second = Codes([], Value([]), 0, 1, 1), Codes([], Value([]), 0, 1, 1)
    side.remember(b"a" * 32, 1, b"x", first)
    side.remember(b"a" * 32, 1, b"x", second)
    assert side._estimates[1][b"a" * 32, b"x"] is first
    side.forget(1)
    assert side._estimates == {}
