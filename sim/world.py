"""Many node cores in one process, in virtual time: performs the same effects as `node/driver.py`, on a heap.

Everything is drawn from the scenario's seed, one generator per concern, so a seed gives one trace; its hash is
part of the result. Nothing here imports torch: what is learned is behind `sim/graph.py`.
"""

import hashlib
import math
import random
import statistics
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, assert_never, cast, get_args

import msgspec
from msgspec.structs import replace

from node.core import CoreSettings, NodeCore
from protocols.events import (
    Aggregate,
    Aggregated,
    Dial,
    Disconnect,
    Discovered,
    Effect,
    Emit,
    Estimate,
    Estimated,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    FinalMergeDone,
    Forget,
    Halt,
    Keep,
    KeepEntries,
    KeepPeer,
    KeepScalars,
    LearningDone,
    Penalise,
    Recall,
    Record,
    Replay,
    Replayed,
    RoundDone,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Trouble,
)
from protocols.view import NO_LEARNING, ViewSettings
from protocols.vocabulary import (
    DIGEST_BYTES,
    MAX_ROUND,
    MAX_SAMPLES,
    ModelRef,
    PeerId,
    PeerRecord,
    SchemaHash,
)
from sim import timeline
from sim.churn import Change, ChurnEvent, draw_schedule
from sim.clock import VirtualClock
from sim.dealing import deal
from sim.garbage import fewer_collections
from sim.graph import Codes, Metrics, Received, Value
from sim.learning import MakeComputer, compute_here, peer_name, plan_learning
from sim.links import SimNetwork, SimPort, sim_address
from sim.nat import Nat
from sim.results import (
    ConsensusRow,
    MergedRow,
    NoteRow,
    Overlay,
    OverlayNode,
    Result,
    RoundRow,
    SampleRow,
    ScalarFigures,
    TraceBlock,
)
from sim.scalar_world import ScalarDisk, ScalarSide, lowest_cut, name_codes
from sim.scenarios import DeviceClass, Scenario
from sim.signing import SimSignatures, author_of
from sim.timeline import Action, TimelineEvent
from sim.topology import draw_edges

BLOCK_EVENTS = 1024
"""Events between two marks of the running trace hash."""
ACTIONS_PER_TELLING = 4096
"""Of the clock, between two calls of a run's `progress`."""
MAX_ROWS = 500
"""Rows of samples after which the time between two of them doubles."""
MAX_CONSENSUS = 64
"""Models compared in one measurement of the consensus distance."""
HALT_S = 1.0
"""From a graceful end to the closing of the node's connections: its goodbyes are on their way."""
LOOK_AGAIN_S = 1.0
"""Where all are done and do not agree yet."""
SILENT_BACKLOG = 4096
"""Events that a silenced node finds when it wakes; older ones are lost."""


class Observer:
    """Told what happens, in the order of virtual time. This one ignores all of it."""

    def record(self, at_s: float, node: int, record: Record) -> None: ...

    def round(self, row: RoundRow) -> None: ...

    def sample(self, row: SampleRow) -> None: ...

    def consensus(self, row: ConsensusRow) -> None: ...

    def merged(self, row: MergedRow) -> None: ...

    def note(self, row: NoteRow) -> None: ...

    def block(self, row: TraceBlock) -> None: ...

    def event(self, at_s: float, node: int, event: Event) -> None:
        """Every single event, but only in a world made with `trace_events=True`."""


class Checking(Protocol):
    """What is asked after every event (see `sim/checkers.py`)."""

    def started(self, node: int, core: NodeCore, now: float, epoch: int) -> None: ...

    def gone(self, node: int, wiped: bool = False) -> None: ...

    def after(self, node: int, now: float, event: Event, effects: Sequence[Effect]) -> None: ...

    def finish(self, now: float) -> None: ...


class SimNode:
    """One node: its core while it is online, and what outlives a crash."""

    __slots__ = (
        "accepted",
        "accuracy",
        "backlog",
        "changes",
        "checkpoint",
        "clock_offset_s",
        "clock_rate",
        "core",
        "device",
        "disk",
        "epoch",
        "evaluates",
        "finished",
        "held",
        "index",
        "last_accuracy",
        "merged_accuracy",
        "num_estimates",
        "num_models",
        "num_samples",
        "peer",
        "peers",
        "port",
        "settled",
        "silent",
        "speed",
        "view",
    )

    def __init__(self, index: int, num_samples: int) -> None:
        self.index = index
        self.peer = peer_name(index)
        self.num_samples = num_samples
        self.device = ""
        self.speed = 1.0
        self.clock_offset_s = 0.0
        self.clock_rate = 1.0
        self.evaluates = False
        self.epoch = 0
        self.num_models = 0
        self.core: NodeCore | None = None
        self.port: SimPort | None = None
        self.held: dict[bytes, Value] = {}
        """By digest: what its network can serve, which is what its core holds."""
        self.silent = False
        self.backlog: deque[Event] = deque(maxlen=SILENT_BACKLOG)
        self.checkpoint: tuple[ModelRef, Value] | None = None
        self.disk = ScalarDisk()
        """Its log, where it learns by scalars."""
        self.num_estimates = 0
        self.peers: dict[str, PeerRecord] = {}
        self.view = ViewSettings()
        self.accuracy: dict[int, float] = {}
        """By round."""
        self.last_accuracy: float | None = None
        """After a lost disk this is not the highest round's."""
        self.merged_accuracy: float | None = None
        """Of the final merge's model."""
        self.accepted: Metrics | None = None
        """Of what the final merge ended with."""
        self.finished = False
        self.settled = False
        self.changes = 0
        """Comings and goings still ahead of it."""

    @property
    def online(self) -> bool:
        """Whether it runs and answers."""
        return self.core is not None and not self.silent


class World:
    """Runs one scenario.

    base: the folder from which the scenario's relative paths start.
    checkers: asked after every event; what they raise ends the run.
    core: makes the nodes' cores, for tests that break one. Called as `NodeCore` is, the signatures left out where
        nothing is signed.
    trace_events: tells `observer.event` of every event: for comparing two runs.
    end_after: the run ends with this event, if it comes so far.
    make_computer: says where what is learned is computed.

    Raises ConfigError where the scenario cannot be run (see `scenario_files.validate`), or its task or data.
    """

    def __init__(
        self,
        scenario: Scenario,
        base: Path | None = None,
        *,
        observer: Observer | None = None,
        checkers: Checking | None = None,
        core: Callable[..., NodeCore] = NodeCore,
        trace_events: bool = False,
        end_after: int = sys.maxsize,
        make_computer: MakeComputer = compute_here,
    ) -> None:
        self.scenario = scenario
        self.clock = VirtualClock()
        self.events = 0
        self.node_rounds = 0
        self.refused: Counter[str] = Counter()
        self.fetches = 0
        self.failed_work = 0
        self.observer = observer or Observer()
        self._base = base or Path.cwd()
        self._checkers = checkers
        self._make_core = core
        self._trace_events = trace_events
        self._end_after = end_after
        self._hash = hashlib.sha256()
        self._traced = bytearray()
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._stopped = False
        self._num_unsettled = scenario.nodes
        self._common: Value | None = None
        """Where all begin from one model, that one."""
        self._consensus: float | None = None
        self._merged: float | None = None
        self._num_rows = 0
        self._sample_every_s = scenario.evaluation.sample_every_s
        self._train_s = scenario.devices.train_s
        self._aggregate_s = scenario.devices.aggregate_s
        self._evaluate_s = scenario.devices.evaluate_s
        self.plan = plan_learning(scenario, self._base, self._work_failed, make_computer)
        self._learning = self.plan.learning
        self._scalars: ScalarSide | None = None
        if scenario.learning == "scalars":
            self._scalars = ScalarSide(ModelRef(self.plan.facts.base, self.plan.facts.model_bytes, 0, 1))
        self._event: Event | None = None
        """What the core answers at the moment."""
        try:
            self._prepare()
        except BaseException:
            self.plan.close()
            raise

    def run(self, progress: Callable[["World"], None] = lambda world: None) -> Result:
        """Until every node is done or gone for good, virtual time is up, or `stop` is called."""
        self._tells_records = type(self.observer).record is not Observer.record
        with fewer_collections():
            while self.clock.run(self.scenario.at_most_s, ACTIONS_PER_TELLING):
                progress(self)
        if self._checkers is not None and not self._stopped:
            self._checkers.finish(self.clock.now())
        if self._lines_ahead and not self._stopped:
            text = f"{self._lines_ahead} lines of the timeline come after the end"
            self._learning.later(partial(self.observer.note, NoteRow(self.clock.now(), text)))
        return self.result()

    def stop(self) -> None:
        """Have `run` return after the event it is at, with what there is: a partial result."""
        self._stopped = self.clock.stopped = True

    # --- making the nodes -------------------------------------------------------------------------------
    def _rng(self, concern: str) -> random.Random:
        """One generator per concern: drawing more in one place changes nothing in another."""
        return random.Random(f"{self.scenario.seed} {concern}")

    def _prepare(self) -> None:
        scenario = self.scenario
        peers = [peer_name(index) for index in range(scenario.nodes)]
        nat = Nat(scenario.nat, peers, self._rng("nat"), self._base) if scenario.nat.classes else None
        self._network = SimNetwork(self.clock, scenario.links, self._rng("links"), nat, self._base)
        self.nodes = [SimNode(index, samples) for index, samples in enumerate(self.plan.facts.num_samples)]
        self._deal_devices()
        self._lay_links()
        self._choose_measured()
        # A wrong path in the churn or the timeline ends the run here, before anything has happened.
        for event in draw_schedule(scenario.churn, scenario.nodes, self._rng("churn"), self._base):
            self.nodes[event.node].changes += 1
            self.clock.at(event.at_s, self._scheduled, event)
        self._timeline_rng = self._rng("timeline")
        lines = timeline.parse(scenario.timeline, scenario.nodes)
        self._lines_ahead = len(lines)
        for line in lines:
            self.clock.at(line.at_s, self._befall, line)
        for node in self.nodes:
            self._settle(node)
        self.clock.after(0.0, self._sample)

    def _choose_measured(self) -> None:
        """Who evaluates: the others' configs say never."""
        scenario = self.scenario
        self._measured = CoreSettings(
            network="sim",
            task=self.plan.facts.task_name,
            schema=SchemaHash(self.plan.facts.schema),
            max_model_bytes=self.plan.facts.model_bytes,
            learning=scenario.learning,
            exchange=scenario.exchange,
            gossip=replace(scenario.gossip, evaluate_every=scenario.evaluation.every),
            sampled=replace(scenario.sampled, evaluate_every=scenario.evaluation.every),
            scalars=replace(scenario.scalars, evaluate_every=scenario.evaluation.every),
            base=self.plan.facts.base,
            members=frozenset(author_of(PeerId(peer)) for peer in scenario.scalars.members),
        )
        self._unmeasured = replace(
            self._measured,
            gossip=replace(scenario.gossip, evaluate_every=MAX_ROUND + 1),
            sampled=replace(scenario.sampled, evaluate_every=MAX_ROUND + 1),
            scalars=replace(scenario.scalars, evaluate_every=MAX_ROUND + 1),
        )
        count = max(1, round(scenario.evaluation.share * len(self.nodes)))
        chosen = sorted(self._rng("evaluation").sample(range(len(self.nodes)), count))
        for index in chosen:
            self.nodes[index].evaluates = True
        self._compared = [self.nodes[index] for index in chosen[:MAX_CONSENSUS]]

    def _deal_devices(self) -> None:
        devices, speeds, clocks = self.scenario.devices, self._rng("speed"), self._rng("clocks")
        classes = devices.classes or (DeviceClass(name="", share=1.0),)
        kinds = deal([item.share for item in classes], len(self.nodes), self._rng("devices"))
        for node, kind in zip(self.nodes, kinds, strict=True):
            node.device = classes[kind].name
            node.speed = classes[kind].slowdown * (1 + devices.spread * (2 * speeds.random() - 1))
            node.clock_offset_s = devices.clock_offset_s * clocks.random()
            node.clock_rate = 1 + devices.clock_drift * (2 * clocks.random() - 1)

    def _lay_links(self) -> None:
        """Who dials whom. Each edge of a drawn topology is dialled from one end, the one that can."""
        topology, view = self.scenario.topology, self.scenario.view
        if topology.kind == "discover":
            for island in range(topology.islands):
                nodes = [n for n in self.nodes if n.index * topology.islands // len(self.nodes) == island]
                first = sim_address(self._most_reachable(nodes))
                own = replace(view, bootstrap=(first,), target_degree=topology.degree)
                for node in nodes:
                    node.view = own
            return
        dials: dict[int, list[str]] = defaultdict(list)
        for low, high in draw_edges(topology, len(self.nodes), self.scenario.seed, self._base):
            one, other = self.nodes[low].peer, self.nodes[high].peer
            if self._network.reaches(other, one):
                dials[high].append(sim_address(one))
            else:
                dials[low].append(sim_address(other))
        for node in self.nodes:
            node.view = replace(
                view,
                bootstrap=tuple(dials[node.index]),
                static=True,
                target_degree=0,
                max_degree=len(self.nodes),
            )

    def _most_reachable(self, nodes: Sequence[SimNode]) -> PeerId:
        """Of these the first of the NAT class that most of them can dial."""
        firsts = {self._network.nat_of(node.peer): node.peer for node in reversed(nodes)}
        reached = {
            peer: sum(self._network.reaches(node.peer, peer) for node in nodes)
            for peer in sorted(firsts.values())
        }
        return max(reached, key=lambda peer: reached[peer])

    # --- coming and going -------------------------------------------------------------------------------
    def _scheduled(self, event: ChurnEvent) -> None:
        node = self.nodes[event.node]
        self._changed(node, event.change)

    def _changed(self, node: SimNode, change: Change) -> None:
        """A change that was ahead of the node has come."""
        node.changes -= 1
        self._change(node, change)
        self._settle(node)
        self._end_if_settled()

    def _befall(self, line: TimelineEvent) -> None:
        """One line of the timeline."""
        self._lines_ahead -= 1
        self._learning.later(partial(self.observer.note, NoteRow(self.clock.now(), line.text)))
        match line.action:
            case Action.PARTITION:
                groups = timeline.groups(line, len(self.nodes), self._timeline_rng)
                self._network.partition([[self.nodes[i].peer for i in group] for group in groups])
            case Action.HEAL:
                self._network.heal()
            case Action.LOSS:
                self._network.set_loss(line.value)
            case Action.LATENCY:
                self._network.scale_latency(line.value)
            case Action.BANDWIDTH:
                self._network.scale_bandwidth(line.value)
            case Action.INTRODUCE:
                named = [self.nodes[index] for index in line.nodes]
                for node in named:
                    addresses = tuple(sim_address(other.peer) for other in named if other is not node)
                    if node.core is not None:
                        self._handle(node, node.epoch, Discovered(addresses))
            case _:
                change = CHANGES[line.action]
                able = [
                    node.index
                    for node in self.nodes
                    # A silent node is only switched off and on where it is named.
                    if _can(node, change) and (line.nodes or not (node.silent and change is Change.RESTART))
                ]
                for index in timeline.choose(line, able, self._timeline_rng):
                    self._change(self.nodes[index], change)
        for node in self.nodes:
            self._settle(node)
        self._end_if_settled()

    def _change(self, node: SimNode, change: Change) -> None:
        """Where it makes no sense any more, as a crash of a node that another cause took down, nothing happens."""
        if not _can(node, change):
            return
        match change:
            case Change.JOIN | Change.RESTART:
                if node.core is not None:
                    self._crash(node)  # it hung, and is switched off and on
                self._start(node)
            case Change.CRASH:
                self._crash(node)
            case Change.WIPE:
                self._crash(node, wiped=True)
                node.checkpoint = None
                node.disk = ScalarDisk()
                node.peers = {}
            case Change.LEAVE:
                self._handle(node, node.epoch, StopRequested())
            case Change.SILENCE:
                node.silent = True
                self._network.silence(node.peer)
            case Change.WAKE:
                node.silent = False
                self._network.wake(node.peer)
                backlog, node.backlog = node.backlog, deque(maxlen=SILENT_BACKLOG)
                epoch = node.epoch
                for event in backlog:
                    self._handle(node, epoch, event)
            case _:
                assert_never(change)

    def _start(self, node: SimNode) -> None:
        if node.port is not None:  # its goodbyes are still on their way
            node.changes += 1
            self.clock.after(HALT_S, self._changed, node, Change.RESTART)
            return
        node.epoch += 1
        node.finished = False  # with what it has lost it may have rounds to do again
        node.port = self._network.join(node.peer, partial(self._handle, node, node.epoch), _admit)
        node.held = cast("dict[bytes, Value]", node.port.endpoint.held)
        settings = self._measured if node.evaluates else self._unmeasured
        rng = self._rng(f"core {node.index} {node.epoch}")
        node.core = self._make_core(
            replace(settings, view=node.view), node.peer, rng, SimSignatures(node.peer)
        )
        self._settle(node)
        if self._checkers is not None:
            self._checkers.started(node.index, node.core, self.clock.now(), node.epoch)
        self._handle(node, node.epoch, self._first_event(node))

    def _first_event(self, node: SimNode) -> Started:
        addresses, peers = (sim_address(node.peer),), tuple(node.peers.values())
        if self.scenario.learning == NO_LEARNING:
            return Started(addresses, peers, None, unix_s=self._wall_clock(node))
        if self._scalars is not None:
            self._scalars.began(node.index, self.clock.now(), self._other_cores(node))
            ref, checkpoint = self._scalars.base, node.disk.checkpoint
            if checkpoint is None or checkpoint.ref.digest == ref.digest:
                node.held[ref.digest] = self._first_model(node)
            else:
                assert node.checkpoint is not None
                kept, value = node.checkpoint
                assert kept.digest == checkpoint.ref.digest, (
                    "the checkpoint that was sealed is the one that was kept"
                )
                node.held[kept.digest] = value
            records = node.disk.after_checkpoint()
            return Started(addresses, peers, ref, checkpoint, records, self._wall_clock(node))
        if node.checkpoint is None:
            node.checkpoint = self._new_ref(node, 0), self._first_model(node)
        ref, value = node.checkpoint
        node.held[ref.digest] = value
        return Started(addresses, peers, ref, unix_s=self._wall_clock(node))

    def _wall_clock(self, node: SimNode) -> float:
        """As its own clock has it. Two lives of a node never begin in one second of it."""
        return node.clock_offset_s + self.clock.now() + node.epoch

    def _other_cores(self, node: SimNode) -> list[NodeCore]:
        return [other.core for other in self.nodes if other.online and other is not node and other.core]

    def _first_model(self, node: SimNode) -> Value:
        seed = self.scenario.seed
        if self.scenario.data.start == "different" and self.scenario.learning == "gossip":
            return self._learning.begin(seed * 100_003 + node.index + 1)
        if self._common is None:
            self._common = self._learning.begin(seed)
        return self._common

    def _crash(self, node: SimNode, wiped: bool = False) -> None:
        """Nothing of it goes on but what it keeps on its disk."""
        self._end(node, wiped)
        self._unplug(node)

    def _halt(self, node: SimNode) -> None:
        """A graceful end: what was sent still goes out."""
        self._end(node)
        self.clock.after(HALT_S, self._halted, node)

    def _end(self, node: SimNode, wiped: bool = False) -> None:
        node.epoch += 1
        node.core = None
        node.silent = False
        node.backlog.clear()
        if self._checkers is not None:
            self._checkers.gone(node.index, wiped)
        if self._scalars is not None:
            self._scalars.ended(node.index)
        self._settle(node)

    def _halted(self, node: SimNode) -> None:
        self._unplug(node)
        self._end_if_settled()

    def _unplug(self, node: SimNode) -> None:
        if node.port is not None:
            self._network.leave(node.peer)
            node.held.clear()  # what is still on its way there would keep its models in memory
            node.port = None

    def _settle(self, node: SimNode) -> None:
        """Count a node whose end is reached: it is done, or away for good."""
        away = not node.online and not node.changes and not self._lines_ahead
        settled = node.finished or away
        self._num_unsettled -= settled - node.settled
        node.settled = settled

    def _end_if_settled(self) -> None:
        """Asked once whatever happened at this moment is complete: a node may be down in the middle of its restart."""
        if self._num_unsettled:
            return
        if self._scalars is not None and not self._scalars.has_settled(
            self.clock.now(), self._finished_cores()
        ):
            self.clock.after(LOOK_AGAIN_S, self._end_if_settled)
            return
        self.clock.stopped = True

    def _finished_cores(self) -> list[NodeCore]:
        return [node.core for node in self.nodes if node.online and node.finished and node.core is not None]

    # --- events and effects -----------------------------------------------------------------------------
    def _handle(self, node: SimNode, epoch: int, event: Event) -> None:
        """Hand an event to the core and do what it asks for, unless the node has crashed since."""
        if node.epoch != epoch:
            return
        if node.silent:
            node.backlog.append(event)
            return
        core, now = node.core, self.clock.moment_s
        assert core is not None
        self._trace(now, node.index, event)
        effects = core.step(node.clock_offset_s + now * node.clock_rate, event)
        if self._checkers is not None:
            self._checkers.after(node.index, now, event, effects)
        self._event = event
        for effect in effects:
            _PERFORM[type(effect)](self, node, effect)

    def _send(self, node: SimNode, effect: Send) -> None:
        assert node.port is not None
        before = self._network.control_bytes
        node.port.send(effect.peer, effect.message)
        if self._scalars is not None:
            self._scalars.sent(effect.message, self._network.control_bytes - before, self._event)

    def _set_timer(self, node: SimNode, effect: SetTimer) -> None:
        delay_s = effect.after_s / node.clock_rate
        self.clock.after(delay_s, self._handle, node, node.epoch, TimerFired(effect.timer))

    def _fetch(self, node: SimNode, effect: Fetch) -> None:
        assert node.port is not None
        self.fetches += 1
        assert isinstance(effect.ref, ModelRef), "no scenario gets shared content"
        node.port.fetch(effect.token, effect.peer, effect.ref, effect.others)

    def _share(self, node: SimNode, effect: KeepEntries | Recall) -> None:
        raise AssertionError("no scenario shares content; `covey sim grank` has a network of its own")

    def _keep(self, node: SimNode, effect: Keep) -> None:
        node.checkpoint = effect.ref, node.held[effect.ref.digest]

    def _forget(self, node: SimNode, effect: Forget) -> None:
        node.held.pop(effect.ref.digest, None)

    def _penalise(self, node: SimNode, effect: Penalise) -> None:
        self.refused[effect.reason.value] += 1

    def _keep_peer(self, node: SimNode, effect: KeepPeer) -> None:
        node.peers[effect.record.peer] = effect.record

    def _dial(self, node: SimNode, effect: Dial) -> None:
        assert node.port is not None
        node.port.dial(effect.address)

    def _disconnect(self, node: SimNode, effect: Disconnect) -> None:
        assert node.port is not None
        node.port.disconnect(effect.peer, effect.reason)

    def _stop_node(self, node: SimNode, effect: Halt) -> None:
        self._halt(node)

    # --- work -------------------------------------------------------------------------------------------
    def _train(self, node: SimNode, effect: Train) -> None:
        value = self._learning.train(node.held[effect.ref.digest], node.index, effect.round)
        ref = self._new_ref(node, effect.round)
        self._work(node, self._train_s, Trained(effect.token, ref), value)

    def _aggregate(self, node: SimNode, effect: Aggregate) -> None:
        own = effect.own
        inputs = [
            Received(node.held[item.ref.digest], float(item.ref.num_samples), item.staleness, item.peer)
            for item in effect.inputs
        ]
        value = self._learning.merge(
            node.held[own.digest], float(own.num_samples), inputs, node.index, node.epoch, effect.rule
        )
        ref = self._new_ref(node, own.round)
        if effect.rule == "final":
            behind = own.num_samples + sum(item.ref.num_samples for item in effect.inputs)
            ref = replace(ref, num_samples=min(behind, MAX_SAMPLES))
        elif effect.rule == "accept" and node.evaluates:
            node.accepted = self._learning.measure(value, node.index)
        self._work(node, self._aggregate_s, Aggregated(effect.token, ref), value)

    def _evaluate(self, node: SimNode, effect: Evaluate) -> None:
        # At its end every node asks, those too that are not to be measured.
        metrics = self._learning.measure(node.held[effect.ref.digest], node.index) if node.evaluates else {}
        answer = Evaluated(effect.token, metrics)
        self.clock.after(self._evaluate_s * node.speed, self._handle, node, node.epoch, answer)

    def _estimate(self, node: SimNode, effect: Estimate) -> None:
        assert self._scalars is not None
        assert node.core is not None
        codes = self._learning.estimate(
            node.held[effect.ref.digest], node.index, effect.round, effect.num_samples
        )
        self._scalars.went_on(node.index, self.clock.now(), node.core, partial(self._other_cores, node))
        node.num_estimates += 1
        named = name_codes(node.index, node.num_estimates, effect.num_samples)
        duration_s = self.scenario.devices.estimate_s * effect.num_samples * node.speed
        answer = Estimated(effect.token, named)
        self.clock.after(duration_s, self._estimated, node, node.epoch, answer, effect.round, codes)

    def _estimated(self, node: SimNode, epoch: int, answer: Estimated, round_: int, codes: Codes) -> None:
        if node.epoch == epoch and self._scalars is not None:
            if not self.scenario.dry_run:
                self._scalars.remember(author_of(node.peer), round_, answer.codes, codes)
            self._handle(node, epoch, answer)

    def _replay(self, node: SimNode, effect: Replay) -> None:
        """What the state is worth depends on its name alone; so does its digest, saved or not."""
        assert self._scalars is not None
        source, rounds = node.held[effect.ref.digest], []
        if not self.scenario.dry_run:
            rounds = self._scalars.applied(node.index, effect.ref.digest, effect.name, effect.rounds)
        value = self._learning.replay(source, rounds, node.index)
        ref = ModelRef(effect.name, self.plan.facts.model_bytes, effect.rounds[-1].round, 1)
        num_scalars = self.scenario.scalars.samples * sum(len(each.records) for each in effect.rounds)
        self._work(node, self.scenario.devices.replay_s * num_scalars, Replayed(effect.token, ref), value)

    def _keep_scalars(self, node: SimNode, effect: KeepScalars) -> None:
        assert self._scalars is not None
        node.disk.keep(effect.records, effect.checkpoint, effect.cut)
        self._scalars.signed(effect.records, author_of(node.peer))
        if effect.checkpoint is not None and node.core is not None:
            self._scalars.went_on(node.index, self.clock.now(), node.core, partial(self._other_cores, node))

    def _work(
        self, node: SimNode, duration_s: float, answer: Trained | Aggregated | Replayed, value: Value
    ) -> None:
        self.clock.after(duration_s * node.speed, self._worked, node, node.epoch, answer, value)

    def _worked(
        self, node: SimNode, epoch: int, answer: Trained | Aggregated | Replayed, value: Value
    ) -> None:
        if node.epoch == epoch:
            node.held[answer.ref.digest] = value
            self._handle(node, epoch, answer)

    def _new_ref(self, node: SimNode, round_: int) -> ModelRef:
        """A digest names who made a model and when, not its bytes: a trace then depends on no rounding."""
        node.num_models += 1
        digest = (node.index << 64 | node.num_models).to_bytes(DIGEST_BYTES, "big")
        return ModelRef(digest, self.plan.facts.model_bytes, round_, node.num_samples)

    def _work_failed(self, index: int, detail: str) -> None:
        self.failed_work += 1
        self.observer.note(NoteRow(self.clock.now(), detail, index))

    # --- records and rows -------------------------------------------------------------------------------
    def _emit(self, node: SimNode, effect: Emit) -> None:
        record, now = effect.record, self.clock.moment_s
        if isinstance(record, RoundDone):
            self.node_rounds += 1
            if isinstance(record.metrics, Metrics):
                self._learning.later(partial(self._measured_round, now, node, record))
        elif isinstance(record, FinalMergeDone):
            if not self.scenario.dry_run:
                keeps_merged = self.scenario.gossip.final_keep == "merged"
                went_on_with = record.merged if keeps_merged else node.accepted
                self._learning.later(partial(self._measured_final, now, node, record, went_on_with))
        elif isinstance(record, LearningDone):
            node.finished = True
            if self._scalars is not None and node.core is not None:
                self._scalars.went_on(node.index, now, node.core, partial(self._other_cores, node))
            self._settle(node)
            self._end_if_settled()
        elif isinstance(record, Trouble):
            self._learning.later(
                partial(self.observer.note, NoteRow(now, f"{record.what}: {record.detail}", node.index))
            )
        if self._tells_records:
            self._learning.later(partial(self.observer.record, now, node.index, record))

    def _measured_round(self, at_s: float, node: SimNode, record: RoundDone) -> None:
        if record.metrics:
            node.accuracy[record.round] = node.last_accuracy = next(iter(record.metrics.values()))
        elif not self.scenario.dry_run:
            self.failed_work += 1
        self.observer.round(
            RoundRow(
                at_s=at_s,
                node=node.index,
                round=record.round,
                num_merged=record.num_merged,
                staleness_max=record.staleness_max,
                duration_s=record.duration_s,
                metrics=record.metrics,
            )
        )

    def _measured_final(
        self, at_s: float, node: SimNode, record: FinalMergeDone, accepted: Mapping[str, float] | None
    ) -> None:
        """Which model was kept is known only now: the core was answered before anything was computed."""
        if not (accepted and record.before and record.merged):
            return
        name, value = next(iter(accepted.items()))
        own, merged = record.before[name], record.merged[name]
        node.merged_accuracy, node.last_accuracy = merged, value
        kept = "own" if _distance(accepted, record.before) < _distance(accepted, record.merged) else "merged"
        text = f"final merge of {record.num_members}: {name} {own:.3f}, merged {merged:.3f}, kept {kept}"
        self.observer.note(NoteRow(at_s, text, node.index))
        self.observer.round(
            RoundRow(
                at_s=at_s,
                node=node.index,
                round=self.scenario.gossip.rounds,
                num_merged=record.num_members - 1,
                staleness_max=0,
                duration_s=record.duration_s,
                metrics=accepted,
            )
        )

    def _sample(self) -> None:
        """One row of the time series, now and again later."""
        self._sample_now()
        if self._scalars is not None:
            cores = [node.core for node in self.nodes if node.core is not None]
            self._scalars.forget(lowest_cut(cores, [node.disk for node in self.nodes if node.core is None]))
        self._num_rows += 1
        if self._num_rows % MAX_ROWS == 0:
            self._sample_every_s *= 2
        self.clock.after(self._sample_every_s, self._sample)

    def _sample_now(self) -> None:
        network, now = self._network, self.clock.now()
        row = SampleRow(
            at_s=now,
            alive=self.num_online,
            done=self.num_finished,
            links=network.num_links,
            rounds=self.node_rounds,
            events=self.events,
            messages=dict(sorted(network.messages.items())),
            control_bytes=network.control_bytes,
            model_bytes=network.model_bytes,
        )
        self._learning.later(partial(self.observer.sample, row))
        if not self.scenario.dry_run:
            self._compare(now)

    def _compare(self, now: float) -> None:
        evaluation = self.scenario.evaluation
        models = [
            node.held[node.core.model.digest]
            for node in self._compared
            if node.core is not None and node.core.model is not None
        ]
        if len(models) < 2:
            return
        if evaluation.consensus:
            found = self._learning.consensus(models)
            self._learning.later(partial(self._measured_consensus, now, len(models), found))
        if evaluation.merged:
            found = self._learning.merged(models)
            self._learning.later(partial(self._measured_merged, now, len(models), found))

    def _measured_consensus(self, at_s: float, num_models: int, found: Metrics) -> None:
        if not math.isnan(found["distance"]):
            self._consensus = found["distance"]
            self.observer.consensus(ConsensusRow(at_s, num_models, found["distance"]))

    def _measured_merged(self, at_s: float, num_models: int, found: Metrics) -> None:
        if found:
            self._merged = next(iter(found.values()))
            self.observer.merged(MergedRow(at_s, num_models, self._merged))

    # --- the trace --------------------------------------------------------------------------------------
    def _trace(self, now: float, index: int, event: Event) -> None:
        """Every event goes into the trace hash, measured values apart: a trace must not depend on rounding."""
        if type(event) is Evaluated:
            event = Evaluated(event.token, {})
        self._encode_into((now, index, event), self._traced, -1)
        self.events += 1
        if self.events >= self._end_after:
            self.clock.stopped = True
        if not self.events % BLOCK_EVENTS:
            self.observer.block(TraceBlock(self.events, now, self._trace_hash()))
        if self._trace_events:
            self.observer.event(now, index, event)

    def _trace_hash(self) -> str:
        self._hash.update(self._traced)
        self._traced.clear()
        return self._hash.hexdigest()

    # --- for whoever watches ----------------------------------------------------------------------------
    @property
    def num_online(self) -> int:
        return sum(node.online for node in self.nodes)

    @property
    def num_finished(self) -> int:
        return sum(node.finished for node in self.nodes)

    @property
    def bytes_sent(self) -> int:
        return self._network.control_bytes + self._network.model_bytes

    def accuracy(self) -> float | None:
        """The mean of what the evaluating nodes found last, as far as it is computed."""
        last = self._last_accuracies()
        return statistics.fmean(last) if last else None

    def _last_accuracies(self) -> list[float]:
        """Of those that are here or done: a node that vanished amid its rounds says nothing of the network's end. Where a few
        nodes make a round's model for all, of whoever made the latest."""
        if self.scenario.learning == "sampled" and not self.num_finished:
            newest = max((max(node.accuracy, default=-1) for node in self.nodes), default=-1)
            return [node.accuracy[newest] for node in self.nodes if newest in node.accuracy]
        return [
            node.last_accuracy
            for node in self.nodes
            if node.last_accuracy is not None and (node.online or node.finished)
        ]

    # --- the end ----------------------------------------------------------------------------------------
    def overlay(self) -> Overlay:
        """Who is linked with whom now."""
        index = {node.peer: node.index for node in self.nodes}
        nodes = [
            OverlayNode(
                index=node.index,
                alive=node.online,
                device=node.device,
                nat=self._network.nat_of(node.peer),
                round=node.core.round if node.core else 0,
            )
            for node in self.nodes
        ]
        links = sorted(tuple(sorted((index[a], index[b]))) for a, b in self._network.links())
        return Overlay(nodes, [(a, b) for a, b in links])

    def result(self) -> Result:
        """What the run gave so far. Computes what was put off."""
        self._sample_now()
        if self.scenario.learning in ("sampled", "scalars") and not self.scenario.dry_run:
            self._measure_last()
        self._learning.flush()
        last = self._last_accuracies()
        final = [node.merged_accuracy for node in self.nodes if node.merged_accuracy is not None]
        by_round: dict[int, list[float]] = defaultdict(list)
        for node in self.nodes:
            for round_, accuracy in node.accuracy.items():
                by_round[round_].append(accuracy)
        return Result(
            trace_hash=self._trace_hash(),
            partial=self._stopped,
            accuracy_mean=statistics.fmean(last) if last else None,
            accuracy_min=min(last, default=None),
            accuracy_max=max(last, default=None),
            accuracy_by_round=[statistics.fmean(by_round[round_]) for round_ in sorted(by_round)],
            evaluated_rounds=sorted(by_round),
            consensus_distance=self._consensus,
            events=self.events,
            node_rounds=self.node_rounds,
            bytes_sent=self.bytes_sent,
            messages_sent=dict(sorted(self._network.messages.items())),
            fetches=self.fetches,
            refused=dict(sorted(self.refused.items())),
            failed_work=self.failed_work,
            virtual_s=self.clock.now(),
            nodes=len(self.nodes),
            alive=self.num_online,
            finished=self.num_finished,
            timeline_left=self._lines_ahead,
            merged_accuracy=self._merged,
            final_merged_accuracy=statistics.fmean(final) if final else None,
            scalars=self._scalar_figures(),
        )

    def _scalar_figures(self) -> ScalarFigures | None:
        if self._scalars is None:
            return None
        live = [node.core for node in self.nodes if node.online and node.core is not None]
        return self._scalars.figures(self._finished_cores(), live)

    def _measure_last(self) -> None:
        """A node that came to the others' model after its last round has not measured that one."""
        for node in self.nodes:
            if node.evaluates and node.finished and node.online and node.core is not None:
                ref = node.core.model
                assert ref is not None
                found = self._learning.measure(node.held[ref.digest], node.index)
                self._learning.later(partial(self._measured_last, node, found))

    def _measured_last(self, node: SimNode, found: Metrics) -> None:
        if found:
            node.last_accuracy = next(iter(found.values()))


CHANGES = {
    Action.CRASH: Change.CRASH,
    Action.WIPE: Change.WIPE,
    Action.LEAVE: Change.LEAVE,
    Action.RESTART: Change.RESTART,
    Action.SILENCE: Change.SILENCE,
    Action.WAKE: Change.WAKE,
}


def _can(node: SimNode, change: Change) -> bool:
    """Whether this can happen to the node as it is."""
    match change:
        case Change.JOIN | Change.RESTART:
            return not node.online and (node.epoch > 0 or change is Change.JOIN)
        case Change.WAKE:
            return node.silent
        case Change.CRASH | Change.WIPE:
            return node.core is not None
        case Change.LEAVE | Change.SILENCE:
            return node.online
        case _:
            assert_never(change)


def _distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return sum(abs(value - other.get(name, value)) for name, value in one.items())


def _admit(ref: ModelRef, value: object) -> None:
    """Models made here are right by construction; damaged ones are the links' affair."""


_PERFORM: dict[type, Callable[[World, SimNode, Any], None]] = {
    Send: World._send,
    SetTimer: World._set_timer,
    Train: World._train,
    Aggregate: World._aggregate,
    Evaluate: World._evaluate,
    Estimate: World._estimate,
    Replay: World._replay,
    KeepScalars: World._keep_scalars,
    KeepEntries: World._share,
    Recall: World._share,
    Fetch: World._fetch,
    Keep: World._keep,
    Forget: World._forget,
    Emit: World._emit,
    Penalise: World._penalise,
    KeepPeer: World._keep_peer,
    Dial: World._dial,
    Disconnect: World._disconnect,
    Halt: World._stop_node,
}
assert set(_PERFORM) == set(get_args(Effect)), "an effect without a deed"
