"""What is learned in a run, and where it is computed: made from a scenario, without torch where nothing is learned here.

Belongs here: reading the task, dealing its data, and all that a world must know of models without touching one.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from protocols.errors import ConfigError
from protocols.view import NO_LEARNING
from protocols.vocabulary import PeerId
from sim.graph import Graph, Learning, Surrogate
from sim.orders import Answers, Computer, Here, Program
from sim.scenario_files import validate_rule
from sim.scenarios import Scenario, rule_specs

if TYPE_CHECKING:
    from node.partition import Indices
    from node.tasks import Task
    from sim.engine import LocalEngine

ROUNDS_PUT_OFF = 2
"""Rounds of all nodes that are held back, where the scenario does not say how many orders. Fewer make smaller batches;
with more, less of the computing goes on beside the events."""

MAX_RECENT, RECENT_BYTES = 4, 200_000_000
"""Replayed states that are kept for others to begin with: so many for each node, and no more than this memory holds."""
PATHS = {
    "task.name": "data.task",
    "task.options": "data.options",
    "task.shard": "data",
    "task.probe": "data.probe",
}
"""Of a daemon's config, and what they are in a scenario."""


def peer_name(index: int) -> PeerId:
    """The peer id of a simulated node."""
    return PeerId(f"node-{index:05d}")


class Facts(Struct, frozen=True, array_like=True):
    """What a world knows of the models.

    num_samples: training samples of each node. base: stands for the model that all begin with, where they begin with one.
    """

    task_name: str
    schema: bytes
    model_bytes: int
    num_samples: list[int]
    base: bytes = b""


@dataclass(frozen=True)
class Plan:
    """The learning of one run. computer: None in a dry run."""

    learning: Learning
    computer: Computer | None
    facts: Facts

    def describe(self) -> dict[str, object]:
        """How it is computed, for the operator."""
        return self.computer.describe() if self.computer is not None else {"dry run": True}

    def close(self) -> None:
        """End whatever computes."""
        if self.computer is not None:
            self.computer.close()


class MakeComputer(Protocol):
    """Reads a scenario's task and deals its data; raises ConfigError where that cannot be done.

    base: the folder from which a task's relative paths start.
    """

    def __call__(self, scenario: Scenario, base: Path) -> tuple[Computer, Facts]: ...


def make_engine(scenario: Scenario, base: Path) -> tuple["LocalEngine", Facts]:
    """All models in this process.

    Raises ConfigError where task, data, rule or device cannot be used.
    """
    from sim.engine import LocalEngine

    task, parts, held_out, facts = _read(scenario, base)
    names = [peer_name(index) for index in range(scenario.nodes)]
    engine = LocalEngine(
        task,
        parts,
        scenario.training,
        rule_specs(scenario.rule),
        scenario.seed,
        scenario.compute,
        names,
        final_rule=_final_rule(scenario),
        held_out=held_out,
        scalars=scenario.scalars if scenario.learning == "scalars" else None,
        base=facts.base,
    )
    return engine, facts


def _base_of(schema: bytes, seed: int) -> bytes:
    """Stands for the model that all begin with, in place of its digest: as good as that, and had without the model."""
    return hashlib.sha256(b"covey simulated base\0" + schema + str(seed).encode()).digest()


def _final_rule(scenario: Scenario) -> tuple[str | dict[str, Any], ...] | None:
    return None if scenario.gossip.final_merge == "none" else rule_specs(scenario.final_rule)


def _read(scenario: Scenario, base: Path) -> tuple["Task", list["Indices"], list["Indices"] | None, Facts]:
    """The whole task, each node's training samples, those that it judges by where it does, and what a world knows."""
    from node.merging import build_rules, hold_out, judges
    from node.settings import Partition
    from node.task_loading import make_task
    from node.tasks import initial_params, partition_indices
    from node.weights import encode_params, schema_hash, schema_of

    validate_rule(scenario)
    data = scenario.data
    partition = Partition(
        count=scenario.nodes,
        partitioner=data.partitioner,
        alpha=data.alpha,
        shards_per_node=data.shards_per_node,
        samples_per_node=data.samples_per_node,
        seed=scenario.seed,
    )
    with _paths_of_a_scenario():
        task = make_task(data.task, data.options, base, probe=data.probe)
        num_samples = len(task.train[1])
        if scenario.nodes > num_samples and data.samples_per_node is None:
            problem = f"{scenario.nodes} are more than the {num_samples} training samples to deal"
            raise ConfigError("nodes", problem, [f"1 to {num_samples}", "more with data.samples_per_node"])
        parts = partition_indices(task, partition)
    final_rule = _final_rule(scenario)
    held_out = None
    judges_final = scenario.gossip.final_keep == "better"
    exchanges_models = scenario.learning in ("gossip", "sampled")
    if exchanges_models and judges(build_rules(rule_specs(scenario.rule), final_rule, judges_final)):
        both = [hold_out(part, scenario.training.validation) for part in parts]
        parts, held_out = [own for own, _ in both], [held for _, held in both]
    params = initial_params(task, scenario.seed)
    schema = schema_hash(task.name, schema_of(params))
    facts = Facts(
        task_name=task.name,
        schema=schema,
        model_bytes=len(encode_params(params)),
        num_samples=[len(part) for part in parts],
        base=_base_of(schema, scenario.seed),
    )
    return task, parts, held_out, facts


@contextmanager
def _paths_of_a_scenario() -> Iterator[None]:
    """A daemon's config has other names for what stands in `data`."""
    try:
        yield
    except ConfigError as error:
        theirs = next((path for path in PATHS if error.path.startswith(path)), "")
        path = PATHS.get(theirs, "") + error.path.removeprefix(theirs)
        raise ConfigError(path, error.problem, [error.allowed] if error.allowed else ()) from error


def compute_here(scenario: Scenario, base: Path) -> tuple[Computer, Facts]:
    """A `MakeComputer`: in this process, by turns with the events."""
    engine, facts = make_engine(scenario, base)
    return Here(engine), facts


class _Nothing:
    """A `Computer` that answers with nothing measured."""

    def __init__(self) -> None:
        self._asked: list[Program] = []

    def submit(self, program: Program) -> None:
        self._asked.append(program)

    def answers(self) -> Answers:
        program = self._asked.pop(0)
        return Answers(
            failures=[],
            metrics=[{} for _ in program.measures],
            distances=[math.nan for _ in program.comparisons],
            merged=[{} for _ in program.merged],
        )

    def describe(self) -> dict[str, object]:
        return {"nothing": True}

    def close(self) -> None:
        pass


def compute_nothing(scenario: Scenario, base: Path) -> tuple[Computer, Facts]:
    """A `MakeComputer` for those who only want the trace, which no value has a part in."""
    return _Nothing(), _read(scenario, base)[3]


def plan_learning(
    scenario: Scenario,
    base: Path,
    on_failure: Callable[[int, str], None],
    make_computer: MakeComputer = compute_here,
) -> Plan:
    """Everything that has to do with models, ready to run.

    on_failure: as in `Graph`.

    Raises ConfigError where task, data or rule cannot be used.
    """
    if scenario.dry_run or scenario.learning == NO_LEARNING:
        schema = hashlib.sha256(b"dry run").digest()
        facts = Facts(
            task_name=scenario.data.task,
            schema=schema,
            model_bytes=scenario.data.model_bytes,
            num_samples=[scenario.data.samples_per_node or 1] * scenario.nodes,
            base=_base_of(schema, scenario.seed),
        )
        return Plan(Surrogate(), None, facts)
    computer, facts = make_computer(scenario, base)
    pending = scenario.compute.max_pending or 2 * ROUNDS_PUT_OFF * scenario.nodes
    recent = min(MAX_RECENT * scenario.nodes, RECENT_BYTES // facts.model_bytes)
    return Plan(Graph(computer, pending, on_failure, max_recent=recent), computer, facts)
