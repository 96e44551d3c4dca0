"""Cores under `sampled`, wired by a heap, with pedigrees for models: of whose training a model was made, and from what.

Messages, fetches and links keep the promises of the `Network` port: in order on a link, none after its end.
"""

import hashlib
import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from node.core import CoreSettings, NodeCore
from protocols.codec import encode, link_decoder
from protocols.events import (
    Aggregate,
    Aggregated,
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Halt,
    Keep,
    LearningDone,
    LinkDown,
    LinkUp,
    Penalise,
    Received,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Trouble,
    WorkFailed,
)
from protocols.exchange import ExchangeSettings
from protocols.messages import AggregatedModel, LinkMessage, TrainedModel
from protocols.sampling import SampledSettings, Sampling
from protocols.view import ViewSettings
from protocols.vocabulary import ModelRef, PeerId, Reason, SchemaHash
from tests.protocols.identities import FakeSignatures

QUICK = {"rounds": 10, "sample_size": 4, "deadline_s": 8.0, "ping_s": 1.0, "wait_at_most_s": 15.0}
LATENCY_S = 0.02
DIAL_TIMEOUT_S = 2.0
MODEL_BYTES = 100


class Model(NamedTuple):
    """Made by training `round` at `peer` from one parent, or by averaging so many, in this order, into `round`."""

    kind: str
    round: int
    peer: str
    parents: tuple["Model", ...]

    @property
    def digest(self) -> bytes:
        key = (
            self.kind,
            self.round,
            self.peer if self.kind == "trained" else "",
            tuple(map(_digest, self.parents)),
        )
        return hashlib.sha256(repr(key).encode()).digest()


_digests: dict[int, tuple[Model, bytes]] = {}


def _digest(model: Model) -> bytes:
    """Pedigrees are deep and shared: each is hashed once."""
    found = _digests.get(id(model))
    if found is None or found[0] is not model:
        found = _digests[id(model)] = (model, model.digest)
    return found[1]


START = Model("start", 0, "", ())


def address(peer: str) -> str:
    return f"/memory/{peer}/p2p/{peer}"


@dataclass(eq=False)
class Link:
    """Both ends see it come up and go down; what is on the way when it ends still arrives."""

    ends: tuple[PeerId, PeerId]
    up: set[PeerId] = field(default_factory=set)
    ended: bool = False
    told: dict[PeerId, Reason] = field(default_factory=dict)
    """Why each end has ended it, as far as it has."""


@dataclass(eq=False)
class Node:
    """One core, the worker beside it and the disk under it."""

    peer: PeerId
    slow: float = 1.0
    core: NodeCore | None = None
    epoch: int = 0
    silent: bool = False
    """The machine hangs: what comes to it is lost, and its links stand."""
    restarts: bool = True
    blobs: dict[bytes, Model] = field(default_factory=dict)
    disk: ModelRef | None = None
    disk_blob: Model = START
    done: int = 0
    halted: bool = False
    penalties: Counter[Reason] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    """The rounds that it began to train."""
    made: list[tuple[float, int, Model]] = field(default_factory=list)
    """When it averaged which round, and what came out."""
    fetches: int = 0

    @property
    def sampling(self) -> Sampling:
        assert self.core is not None
        learning = self.core.learning
        assert isinstance(learning, Sampling)
        return learning

    @property
    def model(self) -> Model:
        ref = self.sampling.own
        assert ref is not None
        return self.blobs[ref.digest]

    @property
    def is_up(self) -> bool:
        return self.core is not None and not self.silent


class SampledNetwork:
    """Nodes `n0` ...; all dial `n0` and `n1`. One seed decides all."""

    def __init__(self, num: int, seed: int = 0, *, degree: int = 4, **sampled: object) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.heap: list[tuple[float, int, PeerId, int, Event, Link | None]] = []
        self.now, self._pushed = 0.0, 0
        self.links: dict[tuple[PeerId, PeerId], Link] = {}
        self.ending: list[Link] = []
        self.settings = SampledSettings(**{**QUICK, **sampled})  # type: ignore[arg-type]
        self.degree = degree
        self.nodes: dict[PeerId, Node] = {}
        self.loss = 0.0
        self.blocked: Callable[[PeerId, PeerId], bool] = lambda a, b: False
        self.tamper: Callable[[PeerId, PeerId, LinkMessage], LinkMessage | None] = lambda a, b, message: (
            message
        )
        """What becomes of a message; None is nothing. Seen by it are all that are sent."""
        self.watch: Callable[[Node, Effect], None] = lambda node, effect: None
        self.models: dict[bytes, Model] = {_digest(START): START}
        self.sources: dict[tuple[PeerId, int, int], tuple[PeerId, ModelRef]] = {}
        self.sent: Counter[str] = Counter()
        self.aggregates: dict[int, dict[bytes, float]] = defaultdict(dict)
        """For each round: what was handed out to begin it, and when first."""
        for number in range(num):
            self.add(f"n{number}")

    # --- who is there -----------------------------------------------------------------------------------
    def add(self, name: str, after_s: float | None = None) -> Node:
        node = self.nodes[PeerId(name)] = Node(PeerId(name))
        self.start(node, after_s)
        return node

    def core_settings(self) -> CoreSettings:
        return CoreSettings(
            network="net",
            task="task",
            schema=SchemaHash(bytes(32)),
            max_model_bytes=1_000,
            learning="sampled",
            view=ViewSettings(
                bootstrap=(address("n0"), address("n1")),
                target_degree=self.degree,
                heartbeat_s=1.0,
                dead_after_s=4.0,
                redial_max_s=5.0,
                shuffle_s=10.0,
                brief_s=3.0,
            ),
            exchange=ExchangeSettings(retry_s=0.3),
            sampled=self.settings,
        )

    def start(self, node: Node, after_s: float | None = None) -> None:
        """From its checkpoint, where it has one."""
        node.epoch += 1
        node.silent = node.halted = False
        rng = random.Random(f"{self.seed} {node.peer} {node.epoch}")
        node.core = NodeCore(self.core_settings(), node.peer, rng, FakeSignatures(node.peer))
        ref = node.disk or ModelRef(_digest(START), MODEL_BYTES, 0, 1)
        node.blobs = {ref.digest: node.disk_blob}
        started = Started((address(node.peer),), (), ref, unix_s=1_000.0 + self.now + node.epoch)
        self.push(self.rng.uniform(0, 0.2) if after_s is None else after_s, node.peer, started)

    def crash(self, node: Node) -> None:
        """The process is gone; its host says so to the others."""
        node.epoch += 1
        node.core = None
        for link in [link for ends, link in self.links.items() if node.peer in ends]:
            self._end(link, node.peer, Reason.LINK)

    def silence(self, node: Node) -> None:
        """As if the machine were unplugged."""
        node.epoch += 1
        node.silent = True

    def revive(self, node: Node) -> None:
        self.crash(node)
        self.start(node)

    def leave(self, node: Node) -> None:
        self.push(0.0, node.peer, StopRequested())

    def cut(self, groups: Iterable[Iterable[str]]) -> None:
        """No link between groups stands or comes up."""
        of = {PeerId(name): i for i, group in enumerate(groups) for name in group}
        self.blocked = lambda a, b: a in of and b in of and of[a] != of[b]
        for link in list(self.links.values()):
            if self.blocked(*link.ends):
                self._end(link, link.ends[0], Reason.LINK)

    def heal(self) -> None:
        self.blocked = lambda a, b: False

    def up(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_up]

    # --- running ----------------------------------------------------------------------------------------
    def push(self, after_s: float, peer: PeerId, event: Event, link: Link | None = None) -> None:
        self._pushed += 1
        epoch = self.nodes[peer].epoch if peer in self.nodes else 0
        heapq.heappush(self.heap, (self.now + after_s, self._pushed, peer, epoch, event, link))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Whether `stop` came true before."""
        while not stop():
            if not self.heap or self.heap[0][0] > until:
                self.now = max(self.now, until)
                return False
            self.now, _, peer, epoch, event, link = heapq.heappop(self.heap)
            node = self.nodes.get(peer)
            if node is None or node.epoch != epoch or not node.is_up:
                continue
            happened = self._happen(node, event, link)
            if happened is None or node.core is None:
                continue
            for effect in node.core.step(self.now, happened):
                self.watch(node, effect)
                self.perform(node, effect)
        return True

    def run_to_end(self, until: float = 600.0, idle_s: float = 0.0) -> bool:
        """Until all that are up are done; then so long, for what is held to be let go."""
        done = self.run(until, lambda: all(node.done for node in self.up()))
        self.run(self.now + (idle_s or 3 * self.settings.deadline_s))
        return done

    def run_to_round(self, round_: int, until: float) -> bool:
        """Until an aggregate has been handed out that begins this round, or a later one."""
        return self.run(until, lambda: any(each >= round_ for each in self.aggregates))

    def _happen(self, node: Node, event: Event, link: Link | None) -> Event | None:
        """What the event turns out to be when its time has come."""
        me = node.peer
        match event:
            case LinkUp() if link is not None:
                if link.ended:
                    link.up.add(me)  # it was up for a moment: its end is on the way
                    return event
                link.up.add(me)
            case LinkDown() if link is not None:
                if me not in link.up:
                    return None
                link.up.discard(me)
                return replace(event, reason=link.told.get(me, event.reason))
            case Received() if link is not None and me not in link.up:
                return None
            case Fetched(token):
                source, ref = self.sources.pop((me, node.epoch, token))
                other = self.nodes.get(source)
                if other is None or not other.is_up or self.blocked(me, source):
                    return FetchFailed(token, Reason.LINK)
                if ref.digest not in other.blobs:
                    return FetchFailed(token, Reason.GONE)
                node.blobs[ref.digest] = other.blobs[ref.digest]
            case Trained(_, ref) | Aggregated(_, ref):
                node.blobs[ref.digest] = self.models[ref.digest]
            case _:
                pass
        return event

    def _end(self, link: Link, first: PeerId, reason: Reason) -> None:
        if link.ended:
            return
        link.ended = True
        del self.links[link.ends]
        self.ending = [each for each in self.ending if each.up] + [link]
        for end in link.ends:
            self.push(
                LATENCY_S,
                end,
                LinkDown(link.ends[link.ends[0] == end], reason if end == first else Reason.LINK),
                link,
            )

    def _dial(self, me: PeerId, where: str) -> None:
        peer = PeerId(where.rpartition("/")[2])
        other = self.nodes.get(peer)
        if other is None or other.core is None or self.blocked(me, peer):
            self.push(2 * LATENCY_S, me, DialFailed(where, Reason.UNREACHABLE))
        elif other.silent:
            self.push(DIAL_TIMEOUT_S, me, DialFailed(where, Reason.TIMEOUT))
        elif _ends(me, peer) not in self.links:
            link = self.links[_ends(me, peer)] = Link(_ends(me, peer))
            self.push(2 * LATENCY_S, me, LinkUp(peer, True, where), link)
            self.push(2 * LATENCY_S, peer, LinkUp(me, False, ""), link)

    def dial(self, me: str, peer: str) -> None:
        """A link, whatever the core thinks of it."""
        self._dial(PeerId(me), address(peer))

    def say(self, me: str, peer: str, message: LinkMessage) -> None:
        """A message that this node's core has not written."""
        self._send(PeerId(me), PeerId(peer), message)

    def _send(self, me: PeerId, peer: PeerId, message: LinkMessage) -> None:
        tag = str(type(message).__struct_config__.tag)
        self.sent[tag] += 1
        if isinstance(message, AggregatedModel):
            self.aggregates[message.ref.round].setdefault(message.ref.digest, self.now)
        link = self.links.get(_ends(me, peer))
        read = message if tag == "beat" else next(iter(link_decoder().feed(encode(message))))
        changed = self.tamper(me, peer, read)
        lost = self.loss and tag not in ("hello", "refuse", "bye") and self.rng.random() < self.loss
        if link is not None and me in link.up and changed is not None and not lost:
            self.push(LATENCY_S, peer, Received(me, changed), link)

    def perform(self, node: Node, effect: Effect) -> None:  # noqa: C901 - one effect after another
        me = node.peer
        match effect:
            case Dial(where):
                self._dial(me, where)
            case Disconnect(peer, reason):
                for link in self.ending:
                    if {me, peer} == {*link.ends} and me in link.up:
                        link.told.setdefault(me, reason)
                link = self.links.get(_ends(me, peer))
                if link is not None and me in link.up:
                    link.told[me] = reason
                    self._end(link, me, reason)
            case Send(peer, message):
                self._send(me, peer, message)
            case SetTimer(timer, after_s):
                self.push(after_s, me, TimerFired(timer))
            case Fetch(token, peer, ref):
                node.fetches += 1
                self.sources[me, node.epoch, token] = peer, ref
                self.push(self.rng.uniform(0.05, 0.15), me, Fetched(token))
            case Forget(ref):
                node.blobs.pop(ref.digest, None)
            case Keep(ref):
                node.disk, node.disk_blob = ref, node.blobs[ref.digest]
            case Train(token, ref, round_):
                node.trained.append(round_)
                model = self._new(Model("trained", round_, me, (node.blobs[ref.digest],)))
                took_s = self.rng.uniform(0.4, 0.6) * node.slow
                self.push(took_s, me, Trained(token, ModelRef(_digest(model), MODEL_BYTES, round_, 1)))
            case Aggregate(token, own, inputs):
                parents = tuple(node.blobs[ref.digest] for ref in (own, *(each.ref for each in inputs)))
                model = self._new(Model("mean", own.round, me, parents))
                node.made.append((self.now, own.round, model))
                self.push(
                    0.05 * node.slow, me, Aggregated(token, ModelRef(_digest(model), MODEL_BYTES, 0, 1))
                )
            case Evaluate(token, ref):
                assert ref.digest in node.blobs
                self.push(0.05, me, Evaluated(token, {"accuracy": 0.5}))
            case Emit(LearningDone()):
                node.done += 1
            case Emit(Trouble(what, detail)):
                node.troubles.append(f"{what}: {detail}")
            case Penalise(_, reason):
                node.penalties[reason] += 1
            case Halt():
                node.halted = True
                self.crash(node)
            case _:
                pass

    def _new(self, model: Model) -> Model:
        return self.models.setdefault(_digest(model), model)

    # --- what has to hold -------------------------------------------------------------------------------
    def check_idle(self) -> None:
        """All that are up are done and quiet: they hold nothing that nobody needs."""
        for node in self.up():
            where = f"seed {self.seed}, {node.peer}"
            sampling, view = node.sampling, node.core.view  # type: ignore[union-attr]
            assert not view._wanted, f"{where}: still wanted: {view._wanted}"
            assert not sampling._asking.calls, where
            assert not sampling._collects, where
            assert not sampling._waiting_for, where
            assert sampling._trainer is None, where
            assert not sampling._serving, where
            assert not sampling._closing, where
            assert not sampling._asking.pings, (
                f"{where}: pings never taken back: {len(sampling._asking.pings)}"
            )
            self.check_held(node, own=1, others=0)
            assert set(node.blobs) <= {*node.core.exchange._held}, where  # type: ignore[union-attr]

    def check_held(self, node: Node, own: int, others: int) -> None:
        """Models that a node holds: its own, those it presents, and so many others."""
        assert node.core is not None
        held = node.core.exchange._held
        bound = own + node.core.exchange._settings.num_generations + others
        assert len(held) <= bound, f"seed {self.seed}, {node.peer}: {len(held)} models are held"

    def check_pedigrees(self) -> None:
        """What an average was made of: each trainer's model of the round before, once, in the order of their ids."""
        for node in self.nodes.values():
            for _, round_, model in node.made:
                assert {parent.kind for parent in model.parents} == {"trained"}
                assert {parent.round for parent in model.parents} == {round_ - 1}, f"seed {self.seed}"
                names = [parent.peer for parent in model.parents]
                assert names == sorted(set(names)), f"seed {self.seed}"


def _ends(a: PeerId, b: PeerId) -> tuple[PeerId, PeerId]:
    return (a, b) if a < b else (b, a)


def with_round(message: LinkMessage, round_: int) -> LinkMessage:
    """The same, of another round."""
    if isinstance(message, (AggregatedModel, TrainedModel)):
        return replace(message, ref=replace(message.ref, round=round_))
    return replace(message, round=round_)  # type: ignore[call-overload, no-any-return]


__all__ = ["START", "Model", "Node", "SampledNetwork", "WorkFailed", "address", "with_round"]
