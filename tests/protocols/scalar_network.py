"""Cores that learn by scalars, wired by a heap, with logs for models: a state is the list of what was applied to it."""

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable

from node.core import CoreSettings, NodeCore
from protocols.codec import encode, link_decoder
from protocols.events import (
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Emit,
    Estimate,
    Estimated,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Keep,
    KeepScalars,
    LearningDone,
    LinkDown,
    LinkUp,
    Received,
    Replay,
    Replayed,
    Send,
    SetTimer,
    Started,
    TimerFired,
    Trouble,
    WorkFailed,
)
from protocols.messages import LinkMessage
from protocols.scalar_terms import ScalarSettings
from protocols.scalars import ScalarLearning
from protocols.view import ViewSettings
from protocols.vocabulary import Checkpoint, ModelRef, PeerId, Reason, ScalarRecord, SchemaHash
from tests.protocols.identities import FakeSignatures

BASE = hashlib.sha256(b"base").digest()
BASE_REF = ModelRef(BASE, 1, 0, 1)

State = tuple[object, ...]
"""Rounds as they were applied: (round, scale, decay, records by author and codes)."""


def address(peer: str) -> str:
    return f"/memory/{peer}/p2p/{peer}"


QUICK = {
    "rounds": 30,
    "samples": 3,
    "deadline_s": 4.0,
    "sync_s": 0.5,
    "batch_s": 0.05,
    "repair_s": 1.0,
    "checkpoint_every": 5,
    "evaluate_every": 5,
}


class Node:
    """One core, the worker beside it and the disk under it."""

    def __init__(self, name: str) -> None:
        self.peer = PeerId(name)
        self.core: NodeCore | None = None
        self.epoch = 0
        self.signatures = FakeSignatures(name)
        self.blobs: dict[bytes, State] = {}
        self.current: tuple[bytes, State] = (BASE, ())
        self.disk_records: dict[ScalarRecord, None] = {}
        self.disk_checkpoint: Checkpoint | None = None
        self.disk_blobs: dict[bytes, State] = {}
        self.cut = 0
        self.done = 0
        self.signed: dict[int, bytes] = {}
        self.troubles: list[str] = []
        self.penalties: Counter[Reason] = Counter()
        self.sent: Counter[str] = Counter()
        self.bytes_sent = 0
        self.fetches = 0

    @property
    def learning(self) -> ScalarLearning:
        assert self.core is not None
        learning = self.core.learning
        assert isinstance(learning, ScalarLearning)
        return learning

    def state_of(self, ref: ModelRef) -> State:
        """As a worker would: the state it is at, a saved one, or the base."""
        if ref.digest == self.current[0]:
            return self.current[1]
        if ref.digest == BASE:
            return ()
        return self.blobs[ref.digest]

    def state(self) -> State:
        """Of the node's own model."""
        ref = self.learning.own
        assert ref is not None
        return self.state_of(ref)


class ScalarNetwork:
    """Nodes `n0` ...; all dial `n0` unless `static` says otherwise. One seed decides all."""

    def __init__(
        self,
        num: int,
        seed: int = 0,
        *,
        slow: dict[str, float] | None = None,
        edges: list[tuple[int, int]] | None = None,
        start: bool = True,
        members: frozenset[bytes] = frozenset(),
        **scalars: object,
    ) -> None:
        self.members = members
        self.seed = seed
        self.rng = random.Random(seed)
        self.heap: list[tuple[float, int, PeerId, int, Event]] = []
        self.now, self._pushed = 0.0, 0
        self.links: set[tuple[PeerId, PeerId]] = set()
        self.slow = slow or {}
        self.slow_until = 1e9
        self.fetch_s = 0.1
        self.sources: dict[tuple[PeerId, int], tuple[PeerId, bytes]] = {}
        self.edges = edges
        self.settings = ScalarSettings(**{**QUICK, **scalars})  # type: ignore[arg-type]
        self.nodes: dict[PeerId, Node] = {}
        self.blocked: set[tuple[PeerId, PeerId]] = set()
        self.tamper: Callable[[PeerId, PeerId, LinkMessage], LinkMessage | None] = lambda a, b, message: (
            message
        )
        self.log: list[tuple[float, PeerId, Effect]] = []
        for number in range(num):
            self.add(f"n{number}", start=start)

    def add(self, name: str, start: bool = True) -> Node:
        node = self.nodes[PeerId(name)] = Node(name)
        if start:
            self.start(node)
        return node

    def core_settings(self, node: Node) -> CoreSettings:
        if self.edges is None:
            view = ViewSettings(bootstrap=(address("n0"),), target_degree=4, heartbeat_s=1, dead_after_s=5)
        else:
            me = int(node.peer[1:])
            others = [a if b == me else b for a, b in self.edges if me in (a, b)]
            view = ViewSettings(
                bootstrap=tuple(address(f"n{other}") for other in others),
                static=True,
                heartbeat_s=1,
                dead_after_s=5,
            )
        return CoreSettings(
            network="net",
            task="task",
            schema=SchemaHash(bytes(32)),
            max_model_bytes=1_000,
            learning="scalars",
            view=view,
            scalars=self.settings,
            base=BASE,
            members=self.members,
        )

    def start(self, node: Node) -> None:
        node.epoch += 1
        rng = random.Random(f"{self.seed} {node.peer} {node.epoch}")
        node.core = NodeCore(self.core_settings(node), node.peer, rng, node.signatures)
        node.blobs = dict(node.disk_blobs)
        node.current = (BASE, ())
        checkpoint = node.disk_checkpoint
        after = checkpoint.round if checkpoint else 0
        records = tuple(record for record in node.disk_records if record.round > after)
        started = Started((address(node.peer),), (), BASE_REF, checkpoint, records, self.now + node.epoch)
        self.push(self.rng.uniform(0, 0.2), node.peer, started)

    def crash(self, node: Node, wiped: bool = False) -> None:
        node.epoch += 1
        node.core = None
        for a, b in sorted(self.links):
            if a == node.peer:
                self.links -= {(a, b), (b, a)}
                self.push(0.02, b, LinkDown(a, Reason.LINK))
        if wiped:
            node.disk_records, node.disk_checkpoint, node.disk_blobs = {}, None, {}
            node.signed = {}

    def push(self, after_s: float, peer: PeerId, event: Event) -> None:
        self._pushed += 1
        heapq.heappush(self.heap, (self.now + after_s, self._pushed, peer, self.nodes[peer].epoch, event))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        while self.heap and self.heap[0][0] <= until and not stop():
            self.now, _, peer, epoch, event = heapq.heappop(self.heap)
            node = self.nodes[peer]
            if node.epoch != epoch or node.core is None:
                continue
            if isinstance(event, Fetched):
                event = self._fetched(node, event)
            for effect in node.core.step(self.now, event):
                self.log.append((self.now, peer, effect))
                self.perform(node, effect)
        if not stop():
            self.now = max(self.now, until)

    def run_to_end(self, until: float = 2000.0) -> None:
        """Until all that are up are done and nothing is stale any more."""
        self.run(until, lambda: all(node.done or node.core is None for node in self.nodes.values()))
        self.run(self.now + 3 * self.settings.deadline_s)

    def isolate(self, groups: list[list[str]]) -> None:
        """Cut all links between groups, and let none come up."""
        of = {PeerId(name): i for i, group in enumerate(groups) for name in group}
        self.blocked = {(a, b) for a in of for b in of if of[a] != of[b]}
        for a, b in sorted(self.links):
            if (a, b) in self.blocked:
                self.links.discard((a, b))
                self.push(0.02, a, LinkDown(b, Reason.LINK))

    def perform(self, node: Node, effect: Effect) -> None:  # noqa: C901 - one effect after another
        me = node.peer
        slow = self.slow.get(me, 1.0) if self.now < self.slow_until else 1.0
        match effect:
            case Dial(where):
                peer = PeerId(where.rpartition("/")[2])
                up = (
                    peer in self.nodes
                    and self.nodes[peer].core is not None
                    and (me, peer) not in self.blocked
                )
                if not up:
                    self.push(0.01, me, DialFailed(where, Reason.UNREACHABLE))
                elif (me, peer) not in self.links:
                    self.links |= {(me, peer), (peer, me)}
                    self.push(0.01, me, LinkUp(peer, True, where))
                    self.push(0.01, peer, LinkUp(me, False, ""))
            case Disconnect(peer, reason):
                if (me, peer) in self.links:
                    self.links -= {(me, peer), (peer, me)}
                    self.push(0.02, me, LinkDown(peer, reason))
                    self.push(0.02, peer, LinkDown(me, Reason.LINK))
            case Send(peer, message):
                frame = encode(message)
                node.sent[str(type(message).__struct_config__.tag)] += 1
                node.bytes_sent += len(frame)
                (read,) = link_decoder().feed(frame)
                changed = self.tamper(me, peer, read)
                if (me, peer) in self.links and changed is not None:
                    self.push(0.01, peer, Received(me, changed))
            case SetTimer(timer, after_s):
                self.push(after_s, me, TimerFired(timer))
            case Fetch(token, peer, ref):
                node.fetches += 1
                self.sources[me, token] = peer, ref.digest
                self.push(self.fetch_s, me, Fetched(token))
            case Forget(ref):
                node.blobs.pop(ref.digest, None)
            case Keep(ref):
                node.disk_blobs[ref.digest] = node.blobs[ref.digest]
            case KeepScalars(records, checkpoint, cut):
                node.disk_records.update(dict.fromkeys(records))
                if checkpoint is not None:
                    node.disk_checkpoint = checkpoint
                node.cut = cut
            case Estimate(token, ref, round_, count):
                seed = repr((me, round_, node.state_of(ref))).encode()
                codes = hashlib.sha256(seed).digest()[:count]
                self.push(self.rng.uniform(0.3, 0.6) * slow, me, Estimated(token, codes))
            case Replay():
                self._replay(node, effect)
            case Evaluate(token, ref):
                node.state_of(ref)
                self.push(0.05, me, Evaluated(token, {"accuracy": 0.5}))
            case Emit(record):
                if isinstance(record, LearningDone):
                    node.done += 1
                elif isinstance(record, Trouble):
                    node.troubles.append(record.detail)
            case _:
                if hasattr(effect, "reason"):
                    node.penalties[effect.reason] += 1

    def _fetched(self, node: Node, event: Fetched) -> Fetched | FetchFailed:
        """The other side must still have it at the end."""
        source, digest = self.sources.pop((node.peer, event.token))
        blob = self.nodes[source].blobs.get(digest)
        if blob is None:
            return FetchFailed(event.token, Reason.GONE)
        node.blobs[digest] = blob
        return event

    def _replay(self, node: Node, order: Replay) -> None:
        try:
            state = node.state_of(order.ref)
        except KeyError:
            self.push(0.05, node.peer, WorkFailed(order.token, "this state is not held"))
            return
        last = state[-1][0] if state else 0  # type: ignore[index]
        for number, scale, decay, records in (
            (each.round, each.scale, each.decay, each.records) for each in order.rounds
        ):
            assert number > last, "rounds are applied in order, each once"
            last = number
            assert [record.author for record in records] == sorted({record.author for record in records})
            state = (*state, (number, scale, decay, tuple((r.author, r.codes) for r in records)))
        digest = order.name
        if order.save:
            digest = hashlib.sha256(repr(state).encode()).digest()
            node.blobs[digest] = state
        node.current = (digest, state)
        self.push(
            0.05 + 0.01 * len(order.rounds), node.peer, Replayed(order.token, ModelRef(digest, 100, last, 1))
        )


def everyone_equal(network: ScalarNetwork) -> State:
    """The one state of all nodes that are up."""
    states = {node.peer: node.state() for node in network.nodes.values() if node.core is not None}
    lengths = {peer: (len(state), node_log(network, peer)) for peer, state in states.items()}
    assert len(set(states.values())) == 1, f"seed {network.seed}: {lengths}"
    return next(iter(states.values()))


def node_log(network: ScalarNetwork, peer: PeerId) -> str:
    return network.nodes[peer].learning.status().log[:8]
