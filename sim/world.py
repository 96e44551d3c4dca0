"""Many node cores in one process, in virtual time: performs the same effects as `node/driver.py`, on a heap.

Everything is drawn from the scenario's seed, one generator per concern, so a seed gives one trace; its hash is
part of the result.
"""

import hashlib
import random
import statistics
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, assert_never

import msgspec
import networkx as nx
from msgspec import Meta, Struct, field

from aggregation.rules import build
from node.compute import Work, WorkOrder
from node.core import CoreSettings, NodeCore
from node.settings import Partition, TrainingSettings
from node.task_loading import make_task
from node.tasks import Task, build_model, initial_params, partition_task
from node.weights import encode_params, max_blob_bytes, schema_hash, schema_of
from protocols.errors import ConfigError, LocalError, PeerError
from protocols.events import (
    Aggregate,
    Dial,
    Disconnect,
    Effect,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Forget,
    Halt,
    Keep,
    KeepPeer,
    LearningDone,
    Penalise,
    Record,
    RoundDone,
    Send,
    SetTimer,
    Started,
    TimerFired,
    Train,
)
from protocols.exchange import ExchangeSettings
from protocols.gossip import GossipSettings
from protocols.view import ViewSettings
from protocols.vocabulary import Digest, ModelRef, PeerId, PeerRecord, Reason
from sim.churn import Change, ChurnEvent, ChurnSettings, check_schedule, draw_schedule
from sim.clock import VirtualClock
from sim.compute import NodeModels, SharedModels
from sim.links import LinkSettings, SimNetwork, SimPort, sim_address


class ComputeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How long work takes, in virtual seconds."""

    train_s: Annotated[float, Meta(ge=0)] = 0.5
    aggregate_s: Annotated[float, Meta(ge=0)] = 0.05
    evaluate_s: Annotated[float, Meta(ge=0)] = 0.05
    spread: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Each node's speed is drawn once, uniformly within this share around 1."""


class Scenario(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole run. The same scenario gives the same trace."""

    task: str = "digits"
    options: dict[str, Any] = {}
    nodes: Annotated[int, Meta(ge=1, le=100_000)] = 16
    seed: int = 0
    topology: Literal["regular", "ring", "full", "discover"] = "regular"
    """`discover`: every node knows one bootstrap node and finds the others itself."""
    degree: Annotated[int, Meta(ge=1, le=64)] = 4
    """Links of each node in a `regular` topology, the target degree in `discover`."""
    start: Literal["different", "common"] = "different"
    """Whether nodes begin from different random models or from one."""
    partitioner: Literal["iid", "dirichlet", "shard"] = "iid"
    alpha: Annotated[float, Meta(gt=0)] = 0.5
    rule: tuple[str | dict[str, Any], ...] = ("mean", "variance.corrected")
    training: TrainingSettings = field(default_factory=TrainingSettings)
    gossip: GossipSettings = field(
        default_factory=lambda: GossipSettings(rounds=40, quorum=1.0, deadline_s=5.0, pause_s=0.0)
    )
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    links: LinkSettings = field(default_factory=LinkSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    churn: ChurnSettings = field(default_factory=ChurnSettings)
    schedule: tuple[ChurnEvent, ...] = ()
    """Joins, crashes and restarts by hand, instead of drawn ones."""
    at_most_s: Annotated[float, Meta(gt=0)] = 36_000.0
    """Virtual time after which the run ends in any case."""


class Result(Struct, frozen=True):
    """What a run gave. Accuracies are the task's first metric."""

    trace_hash: str
    accuracy_mean: float
    accuracy_min: float
    accuracy_by_round: list[float]
    """Mean over the nodes that evaluated after each round."""
    events: int
    bytes_sent: int
    messages_sent: dict[str, int]
    fetches: int
    refused: dict[str, int]
    virtual_s: float
    finished: int
    """Nodes that did all their rounds."""


class SimNode:
    """One node: its core while it is online, and what outlives a crash."""

    def __init__(self, index: int, task: Task, work_seed: int) -> None:
        self.index = index
        self.peer = PeerId(f"node-{index:05d}")
        self.task = task
        self.seed = work_seed
        self.speed = 1.0
        self.epoch = 0
        self.core: NodeCore | None = None
        self.port: SimPort | None = None
        self.work: Work | None = None
        self.checkpoint: ModelRef | None = None
        self.peers: dict[str, PeerRecord] = {}
        self.view = ViewSettings()
        self.accuracy: dict[int, float] = {}


class World:
    """Runs one scenario.

    on_record: told of every record of every node, with the virtual time and the node's index.
    """

    def __init__(
        self,
        scenario: Scenario,
        on_record: Callable[[float, int, Record], None] = lambda at_s, node, record: None,
    ) -> None:
        self.scenario = scenario
        self.clock = VirtualClock()
        self.events = 0
        self.refused: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.fetches = 0
        self._bytes_of_the_gone = 0
        self._on_record = on_record
        self._trace = hashlib.sha256()
        self._encoder = msgspec.msgpack.Encoder()
        self._shared = SharedModels()
        self._network = SimNetwork(self.clock, scenario.links, self._rng("links"))
        self._finished: set[int] = set()
        self._prepare()

    def run(self, progress: Callable[["World"], None] = lambda world: None) -> Result:
        """Until every node is done and nobody is away, or virtual time is up. Ctrl-C raises as usual."""
        while (
            not self._over() and (due := self.clock.due_at()) is not None and due <= self.scenario.at_most_s
        ):
            self.clock.step()
            if self.events % 512 == 0:
                progress(self)
        return self.result()

    # --- making the nodes -------------------------------------------------------------------------------
    def _rng(self, concern: str) -> random.Random:
        """One generator per concern: drawing more in one place changes nothing in another."""
        return random.Random(f"{self.scenario.seed} {concern}")

    def _prepare(self) -> None:
        from pathlib import Path

        scenario = self.scenario
        try:
            build(scenario.rule)
        except ValueError as error:
            raise ConfigError("rule", str(error)) from error
        whole = make_task(scenario.task, scenario.options, Path.cwd())
        partition = Partition(
            count=scenario.nodes, partitioner=scenario.partitioner, alpha=scenario.alpha, seed=scenario.seed
        )
        self._model = build_model(whole)
        params = initial_params(whole, scenario.seed)
        schema = schema_of(params)
        self._model_bytes = len(encode_params(params))
        self._settings = CoreSettings(
            network="sim",
            task=whole.name,
            schema=schema_hash(whole.name, schema),
            max_model_bytes=max_blob_bytes(schema),
            exchange=scenario.exchange,
            gossip=scenario.gossip,
        )
        speeds = self._rng("speed")
        self.nodes = []
        for index, task in enumerate(partition_task(whole, partition)):
            node = SimNode(index, task, scenario.seed)
            node.speed = 1 + scenario.compute.spread * (2 * speeds.random() - 1)
            self.nodes.append(node)
        self._lay_links()
        schedule = list(scenario.schedule) or draw_schedule(
            scenario.churn, scenario.nodes, self._rng("churn")
        )
        try:
            check_schedule(schedule, scenario.nodes)
        except ValueError as error:
            raise ConfigError("schedule", str(error)) from error
        self._pending_changes = len(schedule)
        for event in sorted(schedule):
            self.clock.after(event.at_s, self._change(event))

    def _lay_links(self) -> None:
        """Who dials whom. Each edge of a drawn topology is dialled from one end."""
        scenario = self.scenario
        if scenario.topology == "discover":
            first = sim_address(self.nodes[0].peer)
            for node in self.nodes:
                node.view = ViewSettings(bootstrap=(first,), target_degree=scenario.degree)
            return
        dials: dict[int, list[str]] = defaultdict(list)
        for low, high in draw_edges(scenario):
            dials[high].append(sim_address(self.nodes[low].peer))
        for node in self.nodes:
            node.view = ViewSettings(
                bootstrap=tuple(dials[node.index]),
                static=True,
                target_degree=0,
                max_degree=max(1, scenario.nodes),
            )

    # --- coming and going -------------------------------------------------------------------------------
    def _change(self, event: ChurnEvent) -> Callable[[], None]:
        def change() -> None:
            self._pending_changes -= 1
            node = self.nodes[event.node]
            if event.change is Change.CRASH:
                self._crash(node)
            else:
                self._start(node)

        return change

    def _start(self, node: SimNode) -> None:
        node.epoch += 1
        epoch = node.epoch

        def deliver(event: Event) -> None:
            if node.epoch == epoch:
                self._handle(node, event)

        port = node.port = self._network.join(node.peer, deliver, lambda ref, digest: self._admit(ref))
        models = NodeModels(
            self._shared, port.endpoint.held, node.index * 1_000_000 + epoch, self._model_bytes
        )
        node.core = NodeCore(
            msgspec.structs.replace(self._settings, view=node.view),
            node.peer,
            self._rng(f"core {node.index} {epoch}"),
        )
        node.work = Work(
            node.task,
            self.scenario.training,
            self.scenario.rule,
            models,
            node.seed,
            node.peer,
            model=self._model,
        )
        ref = node.checkpoint
        if ref is None:
            seed = (
                self.scenario.seed
                if self.scenario.start == "common"
                else self.scenario.seed * 100_003 + node.index + 1
            )
            ref = models.save(initial_params(node.task, seed), 0, len(node.task.train[1]))
        else:
            self._shared.add(Digest(ref.digest), self._shared.get(Digest(ref.digest)))
            port.endpoint.held[Digest(ref.digest)] = Digest(ref.digest)
        deliver(Started((sim_address(node.peer),), tuple(node.peers.values()), ref))

    def _crash(self, node: SimNode) -> None:
        assert node.port is not None
        endpoint = node.port.endpoint
        node.epoch += 1
        self._network.leave(node.peer)
        self._bytes_of_the_gone += endpoint.bytes_sent
        for digest in list(endpoint.held):
            self._shared.drop(digest)
        node.core = node.port = node.work = None

    def _admit(self, ref: ModelRef) -> None:
        """Models made here are right by construction; hostile ones are the faults' affair, not the network's."""
        digest = Digest(ref.digest)
        try:
            self._shared.add(digest, self._shared.get(digest))
        except LocalError as error:  # its last holder let it go while it was on its way
            raise PeerError(Reason.GONE, str(error)) from error

    # --- events and effects -----------------------------------------------------------------------------
    def _handle(self, node: SimNode, event: Event) -> None:
        assert node.core is not None
        self.events += 1
        self._hash(node, event)
        for effect in node.core.step(self.clock.now(), event):
            self._do(node, effect)

    def _hash(self, node: SimNode, event: Event) -> None:
        # Measured values stay out: a trace must not depend on rounding.
        traced = Evaluated(event.token, {}) if isinstance(event, Evaluated) else event
        self._trace.update(struct.pack("<dI", self.clock.now(), node.index))
        self._trace.update(self._encoder.encode(traced))

    def _do(self, node: SimNode, effect: Effect) -> None:
        assert node.port is not None
        match effect:
            case Send(peer, message):
                self.messages[str(type(message).__struct_config__.tag)] += 1
                node.port.send(peer, message)
            case SetTimer(timer, after_s):
                self._later(node, after_s, lambda: TimerFired(timer))
            case Train() | Aggregate() | Evaluate():
                self._work(node, effect)
            case Fetch(token, peer, ref):
                self.fetches += 1
                node.port.fetch(token, peer, ref)
            case Keep(ref):
                self._keep(node, ref)
            case Forget(ref):
                if node.port.endpoint.held.pop(Digest(ref.digest), None) is not None:
                    self._shared.drop(Digest(ref.digest))
            case Emit(record):
                self._record(node, record)
            case Penalise(_, reason, _):
                self.refused[reason.value] += 1
            case KeepPeer(record):
                node.peers[record.peer] = record
            case Dial(address):
                node.port.dial(address)
            case Disconnect(peer, reason):
                node.port.disconnect(peer, reason)
            case Halt():
                self._crash(node)
            case _:
                assert_never(effect)

    def _work(self, node: SimNode, order: WorkOrder) -> None:
        compute, work = self.scenario.compute, node.work
        assert work is not None
        duration = {Train: compute.train_s, Aggregate: compute.aggregate_s, Evaluate: compute.evaluate_s}[
            type(order)
        ]
        self._later(node, duration * node.speed, lambda: work.perform(order))

    def _later(self, node: SimNode, delay_s: float, make_event: Callable[[], Event]) -> None:
        epoch = node.epoch

        def due() -> None:
            if node.epoch == epoch:
                self._handle(node, make_event())

        self.clock.after(delay_s, due)

    def _keep(self, node: SimNode, ref: ModelRef) -> None:
        old, digest = node.checkpoint, Digest(ref.digest)
        self._shared.add(digest, self._shared.get(digest))
        node.checkpoint = ref
        if old is not None:
            self._shared.drop(Digest(old.digest))

    def _record(self, node: SimNode, record: Record) -> None:
        if isinstance(record, RoundDone) and record.metrics:
            node.accuracy[record.round] = next(iter(record.metrics.values()))
        elif isinstance(record, LearningDone):
            self._finished.add(node.index)
        self._on_record(self.clock.now(), node.index, record)

    # --- the end ----------------------------------------------------------------------------------------
    def _over(self) -> bool:
        return self._pending_changes == 0 and len(self._finished) == len(self.nodes)

    @property
    def num_finished(self) -> int:
        return len(self._finished)

    def result(self) -> Result:
        """What the run gave so far."""
        last = [accuracy for node in self.nodes if (accuracy := _last(node.accuracy)) is not None]
        by_round: dict[int, list[float]] = defaultdict(list)
        for node in self.nodes:
            for round_, accuracy in node.accuracy.items():
                by_round[round_].append(accuracy)
        bytes_sent = self._bytes_of_the_gone + sum(
            node.port.endpoint.bytes_sent for node in self.nodes if node.port is not None
        )
        return Result(
            trace_hash=self._trace.hexdigest(),
            accuracy_mean=statistics.mean(last) if last else 0.0,
            accuracy_min=min(last, default=0.0),
            accuracy_by_round=[statistics.mean(by_round[round_]) for round_ in sorted(by_round)],
            events=self.events,
            bytes_sent=bytes_sent,
            messages_sent=dict(sorted(self.messages.items())),
            fetches=self.fetches,
            refused=dict(sorted(self.refused.items())),
            virtual_s=self.clock.now(),
            finished=len(self._finished),
        )


def _last(accuracy: Mapping[int, float]) -> float | None:
    return accuracy[max(accuracy)] if accuracy else None


def draw_edges(scenario: Scenario) -> Sequence[tuple[int, int]]:
    """The undirected edges of a drawn topology, each as (low, high), sorted; always connected.

    Raises:
        ConfigError: no such graph exists.
    """
    nodes, degree = scenario.nodes, scenario.degree
    if nodes == 1:
        return []
    if scenario.topology == "ring":
        graph = nx.cycle_graph(nodes) if nodes > 2 else nx.path_graph(nodes)
    elif scenario.topology == "full":
        graph = nx.complete_graph(nodes)
    else:
        if degree >= nodes or (nodes * degree) % 2 or (degree == 1 and nodes > 2):
            raise ConfigError(
                "degree",
                f"no connected {degree}-regular graph of {nodes} nodes",
                ["2 to nodes - 1, nodes * degree even"],
            )
        seeds = random.Random(f"{scenario.seed} topology")
        graph = nx.random_regular_graph(degree, nodes, seed=seeds.getrandbits(32))
        while not nx.is_connected(graph):
            graph = nx.random_regular_graph(degree, nodes, seed=seeds.getrandbits(32))
    return sorted((min(edge), max(edge)) for edge in graph.edges)
