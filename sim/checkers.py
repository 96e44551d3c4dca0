"""What a node core promises, checked from outside after every step of every node.

Belongs here: the rules, and the facts that follow from a node's events and effects alone. A rule never changes
anything; it compares what the core asks for with these facts, and says in one sentence what does not fit. Which faults
are drawn and how a run is judged as a whole is said in `faults.py` and `swarm.py`.

What the core promises:

| rule | on | what holds |
| --- | --- | --- |
| `verified` | Aggregate | every model was fetched and found good, or made here, in this life, and not forgotten since |
| `offered` | Aggregate | every input is what that very peer offered; a choice is between the node's own models |
| `counted_once` | Aggregate | inputs come from distinct peers, never from the node itself; there is one at least; in a final merge none comes twice |
| `staleness` | Aggregate | counted from the node's round, never negative; sample counts are positive |
| `held` | Train, Estimate, Replay, Evaluate, Keep, Send of an offer | the model is held at this moment |
| `forgets_once` | Forget | what is held, or was fetched in part, and each only once |
| `forgets_unused` | Forget | nothing under way reads or writes that model |
| `one_order` | Train, Aggregate, Estimate, Replay, Evaluate | no other work is awaited, and none begins after the last round |
| `new_token` | work, Fetch, SetTimer | tokens rise; a fetch is only repeated for the same model after it failed |
| `one_copy` | Fetch | one fetch at a time of the same bytes and from the same peer |
| `linked` | Send, Disconnect, Fetch | the peer has a link that is up |
| `greeted` | Send, Fetch | one hello first; heartbeats, offers and fetches only after the peer's hello was accepted |
| `dials` | Dial | neither to itself nor to a peer that is linked or being dialled |
| `rounds` | RoundDone, LearningDone, Keep, Train | rise, by `MAX_JUMP` + 1 at most, and stay below the last |
| `final` | FinalMergeDone, Send of an offer | once, after the last round, and before the end of learning; only what was merged there is offered as a result |
| `encodes` | Send | the message survives its encoding (where asked for) |
| `halts` | Halt | only when stopped |
| `bounds` | each step | inbox, waiting offers, transfers, offered models and accepted links within the settings |
| `timers` | SetTimer | few outstanding under one name, one heartbeat among them |
| `leaks` | now and then | the core counts on the models, links and transfers that there are; known peers stay within `max_known` |
| `stuck` | now and then | no phase lasts longer than its work or its timer |

What it promises beyond this where it learns by scalars is said in `scalar_checkers.py`, and where it learns by sampling in
`sampled_checkers.py`.

What the world promises the core, since a rule above may only be as good as this:

| rule | on | what holds |
| --- | --- | --- |
| `answers` | every answer, TimerFired | answers one thing that was asked for and not answered before |
| `links` | LinkUp, LinkDown, Received | one link per peer, ended once, and nothing arrives without it |
| `resumes` | Started | first, once, and from the checkpoint that was kept last, or from nothing |
| `overdue` | now and then, at the end | every order, fetch, dial and timer is answered within its limit |
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from node.core import NodeCore
from protocols.codec import encode, link_decoder
from protocols.errors import PeerError
from protocols.events import (
    Aggregate,
    Aggregated,
    CaughtUp,
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
    FinalMergeDone,
    Forget,
    Halt,
    Keep,
    LearningDone,
    LinkDown,
    LinkUp,
    Phase,
    Received,
    Record,
    Replay,
    Replayed,
    RoundDone,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
    Train,
    Trained,
    WorkFailed,
)
from protocols.final_merge import num_stages
from protocols.gossip import MAX_JUMP, Gossip
from protocols.messages import (
    Decline,
    Heartbeat,
    Hello,
    Offer,
    Ping,
    Pong,
    Probe,
    Probed,
    Shuffle,
    Suspects,
    Terms,
)
from protocols.sampling import Sampling
from protocols.scalars import GRACE, ScalarLearning
from protocols.vocabulary import ModelRef, PeerId, ScalarRecord, peer_of
from sim import sampled_checkers, scalar_checkers
from sim.sampled_checkers import OF_SAMPLING, SampledFacts
from sim.scalar_checkers import AFTER_TERMS, SCALAR_RULES, Disk, ScalarFacts, States

DRIFT = 2.0
"""Virtual seconds that one second of a node's own clock lasts at most."""


class Limits(Struct, frozen=True):
    """After how many virtual seconds an answer is overdue."""

    work_s: float = 600.0
    fetch_s: float = 600.0
    dial_s: float = 300.0
    since_s: float = 0.0
    """Waiting counts from here on: before it, nodes may have been made not to answer."""


class Violation(Exception):  # noqa: N818 - not an error of this code: a finding
    """A rule does not hold.

    event: what the node was told, None where time alone has shown it. effects: what it answered, the last of them the
        one that breaks the rule where one does.
    """

    def __init__(
        self,
        at_s: float,
        node: int,
        rule: str,
        what: str,
        event: Event | None = None,
        effects: Sequence[Effect] = (),
    ) -> None:
        super().__init__(at_s, node, rule, what)
        self.at_s = at_s
        self.node = node
        self.rule = rule
        self.what = what
        self.event = event
        self.effects = tuple(effects)

    def __str__(self) -> str:
        lines = [f"rule '{self.rule}' at {self.at_s:.6f} s, node {self.node}: {self.what}"]
        if self.event is not None:
            lines.append(f"  event  {brief(self.event)}")
        if len(self.effects) > _SHOWN:
            lines.append(f"  after {len(self.effects) - _SHOWN} other effects")
        lines += [f"  effect {brief(effect)}" for effect in self.effects[-_SHOWN:]]
        return "\n".join(lines)


_SHOWN = 8


def brief(thing: object) -> str:
    """An event or an effect in one line, digests cut short."""
    if isinstance(thing, bytes):
        return thing.hex()[:8]
    if isinstance(thing, tuple):
        return "(" + ", ".join(brief(item) for item in thing) + ")"
    if isinstance(thing, Struct):
        fields = ", ".join(brief(getattr(thing, name)) for name in thing.__struct_fields__)
        return f"{type(thing).__name__}({fields})"
    return str(thing)


class _Asked(NamedTuple):
    """An effect that waits for its answer."""

    effect: Any
    at_s: float


class Facts:
    """What is known of one node in one life, from its events and effects."""

    __slots__ = (
        "box",
        "ceiling",
        "core",
        "dialling",
        "done",
        "ended",
        "epoch",
        "event",
        "failed",
        "fetch_token",
        "fetching",
        "final_models",
        "final_peers",
        "greeted",
        "held",
        "helloed",
        "inbox",
        "kept",
        "links",
        "merged",
        "num_timers",
        "offers",
        "orders",
        "partial",
        "phase_at_s",
        "phase_token",
        "round",
        "round_at_s",
        "sampled",
        "scalars",
        "seen_at_s",
        "since_s",
        "started",
        "timers",
        "token",
    )

    def __init__(self, core: NodeCore, epoch: int, now: float, kept: ModelRef | None) -> None:
        self.core = core
        self.scalars: ScalarFacts | None = None
        """Of a core that learns by them."""
        self.sampled = SampledFacts(core) if isinstance(core.learning, Sampling) else None
        self.epoch = epoch
        self.started = False
        self.kept = kept
        """The newest checkpoint; it outlives a crash."""
        self.event: Event | None = None
        self.links: set[PeerId] = set()
        self.greeted: set[PeerId] = set()
        self.helloed: set[PeerId] = set()
        self.dialling: dict[PeerId, float] = {}
        self.held: set[bytes] = set()
        self.partial: set[bytes] = set()
        """Fetched in part at the most: half of it may lie on a disk."""
        self.offers: set[tuple[PeerId, ModelRef]] = set()
        self.orders: dict[int, _Asked] = {}
        """By their tokens; one at a time but where a node has several parts in a round."""
        self.fetching: dict[int, _Asked] = {}
        self.failed: dict[int, tuple[Fetch, int]] = {}
        """Fetches that failed so many times and may be asked for again."""
        self.timers: dict[Timer, float] = {}
        self.num_timers: Counter[tuple[str, str]] = Counter()
        self.token = 0
        self.fetch_token = 0
        self.inbox = 0
        self.box = 0
        self.round = 0
        self.ended = -1
        self.ceiling = 0
        """The highest round that the node can be in."""
        self.done = False
        self.merged = False
        """Its final merge is over."""
        self.final_peers: set[PeerId] = set()
        """Whose models went into it."""
        self.final_models: set[bytes] = set()
        """What came of merging them here."""
        self.round_at_s = now
        self.seen_at_s = now
        self.since_s = now
        """Waiting counts from here on: the start, or the end of the last silence."""
        self.phase_at_s = now
        self.phase_token = -1
        if self.sampled is not None:
            self.sampled.held = self.held

    def heard(self, now: float) -> None:
        """An event has come. A node that was not even told of its own heartbeats was silenced."""
        if now - self.seen_at_s > 2 * DRIFT * self.core.view._settings.heartbeat_s:
            self.since_s = now
        self.seen_at_s = now

    # --- what was told ----------------------------------------------------------------------------------
    def see(self, event: Event, effects: Sequence[Effect]) -> None:
        """Take note of what the core was told."""
        self.event = event
        match event:
            case Received(peer, message):
                if type(message) is Offer:
                    self.offers.add((peer, message.ref))
                elif type(message) is Hello and _accepted(peer, effects):
                    self.greeted.add(peer)
            case TimerFired(timer):
                del self.timers[timer]
                self.num_timers[timer.owner, timer.name] -= 1
            case Fetched() | FetchFailed():
                self._see_fetch(event)
            case Trained() | Aggregated() | Estimated() | Replayed() | Evaluated() | WorkFailed():
                self._see_work(event)
            case LinkUp() | LinkDown() | DialFailed():
                self._see_link(event)
            case Started(_, _, ref):
                self.started = True
                if event.checkpoint is not None:
                    ref = event.checkpoint.ref
                if ref is not None:
                    self.held.add(ref.digest)
                    self.round = self.ceiling = ref.round
                    self.ended = ref.round - 1
            case _:
                pass
        for beside in (self.scalars, self.sampled):
            if beside is not None:
                beside.see(event)

    def _see_fetch(self, event: Fetched | FetchFailed) -> None:
        fetch = self.fetching.pop(event.token).effect
        if isinstance(event, Fetched):
            self.held.add(fetch.ref.digest)
            self.partial.discard(fetch.ref.digest)
            return
        _, num_failed = self.failed.pop(event.token, (fetch, 0))
        self.failed[event.token] = fetch, num_failed + 1
        if fetch.ref.digest not in self.held:
            self.partial.add(fetch.ref.digest)

    def _see_work(self, event: Trained | Aggregated | Estimated | Replayed | Evaluated | WorkFailed) -> None:
        order = self.orders.pop(event.token, None)
        if isinstance(event, Trained | Aggregated | Replayed):
            self.held.add(event.ref.digest)
            if isinstance(event, Aggregated) and order is not None and isinstance(order.effect, Aggregate):
                self._see_merged(order.effect, event.ref.digest)
        elif isinstance(event, WorkFailed) and order is not None and isinstance(order.effect, Train):
            # The same round would fail again.
            self.round += 1
            self.ceiling += 1

    def _see_merged(self, order: Aggregate, digest: bytes) -> None:
        """A choice of the own model is no merge, nor is that of a result that came from elsewhere."""
        chose_own = digest == order.own.digest
        candidates = {item.ref.digest for item in order.inputs}
        if order.rule == "final" or (
            order.rule == "accept" and not chose_own and self.final_models & candidates
        ):
            self.final_models.add(digest)

    def _see_link(self, event: LinkUp | LinkDown | DialFailed) -> None:
        peer = peer_of(event.address) if isinstance(event, DialFailed) else event.peer
        if peer is None:
            return
        self.dialling.pop(peer, None)
        if isinstance(event, LinkUp):
            self.links.add(peer)
        elif isinstance(event, LinkDown):
            for peers in (self.links, self.greeted, self.helloed):
                peers.discard(peer)

    # --- what was asked for -----------------------------------------------------------------------------
    def do(self, now: float, effect: Effect) -> None:
        """Take note of what the core asked for."""
        match effect:
            case Send(peer, message):
                if type(message) is Hello:
                    self.helloed.add(peer)
            case SetTimer(timer, after_s):
                self.timers[timer] = now + after_s * DRIFT
                self.num_timers[timer.owner, timer.name] += 1
                if timer.owner == "learning":
                    self.token = timer.token
            case Fetch(token, _, ref):
                self.fetching[token] = _Asked(effect, now)
                self.fetch_token = max(token, self.fetch_token)
                self.partial.discard(ref.digest)
            case Train() | Aggregate() | Evaluate() | Estimate() | Replay():
                self._do_work(now, effect)
            case Forget(ref):
                self.held.discard(ref.digest)
                self.partial.discard(ref.digest)
            case Keep(ref):
                self.kept = ref
            case Emit(record):
                self._do_emit(now, record)
            case Dial(address):
                self.dialling[peer_of(address) or PeerId("")] = now
            case _:
                pass
        for beside in (self.scalars, self.sampled):
            if beside is not None:
                beside.do(effect)

    def _do_work(self, now: float, order: Train | Aggregate | Evaluate | Estimate | Replay) -> None:
        self.orders[order.token], self.token = _Asked(order, now), order.token
        if isinstance(order, Train):
            self.round = order.round
        elif isinstance(order, Aggregate) and order.rule == "final":
            self.final_peers.update(item.peer for item in order.inputs)

    def _do_emit(self, now: float, record: Record) -> None:
        match record:
            case RoundDone(round_):
                self.ended, self.ceiling, self.round_at_s = round_, round_ + MAX_JUMP + 1, now
            case CaughtUp(round_):
                self.ended, self.ceiling = round_ - 1, round_ + MAX_JUMP + 1
            case FinalMergeDone():
                self.merged = True
            case LearningDone():
                self.done = True
            case _:
                pass

    def in_use(self) -> set[bytes]:
        """The models that running work reads and running fetches write."""
        digests = {asked.effect.ref.digest for asked in self.fetching.values()}
        for order in (asked.effect for asked in self.orders.values()):
            if isinstance(order, Aggregate):
                digests.add(order.own.digest)
                digests.update(item.ref.digest for item in order.inputs)
            else:
                digests.add(order.ref.digest)
        return digests


def _accepted(peer: PeerId, effects: Sequence[Effect]) -> bool:
    """A brief link is accepted without a word to the operator."""
    return not any(isinstance(effect, Disconnect) and effect.peer == peer for effect in effects)


# --- rules on effects: "" where all is well -------------------------------------------------------------
def _verified(facts: Facts, order: Aggregate) -> str:
    for ref in (order.own, *(item.ref for item in order.inputs)):
        if ref.digest not in facts.held:
            return f"model {brief(ref.digest)} is merged without being held"
    return ""


def _offered(facts: Facts, order: Aggregate) -> str:
    if order.rule == "accept":
        return ""
    for item in order.inputs:
        if (item.peer, item.ref) not in facts.offers:
            return f"peer {item.peer} never offered model {brief(item.ref)}"
    return ""


def _counted_once(facts: Facts, order: Aggregate) -> str:
    peers = [item.peer for item in order.inputs]
    if order.rule == "accept":
        return (
            ""
            if peers == [facts.core.view._me]
            else f"a choice between its own model and {brief(order.inputs)}"
        )
    if order.rule == "final" and (again := facts.final_peers.intersection(peers)):
        return f"peer {min(again)} comes into the final merge a second time"
    if len(set(peers)) < len(peers):
        return f"a peer is counted twice among {', '.join(peers)}"
    if facts.core.view._me in peers:
        return "the node counts itself among its peers"
    return "" if peers else "nothing to merge"


def _staleness(facts: Facts, order: Aggregate) -> str:
    for item in order.inputs:
        expected = max(0, facts.round - item.ref.round)
        if item.staleness != expected:
            return f"{item.peer}'s model is {expected} rounds old, not {item.staleness}"
        if item.ref.num_samples < 1:
            return f"{item.peer}'s model has {item.ref.num_samples} samples"
    return ""


def _held(facts: Facts, effect: Train | Estimate | Replay | Evaluate | Keep) -> str:
    if effect.ref.digest in facts.held:
        return ""
    return f"{type(effect).__name__} of model {brief(effect.ref.digest)}, which is not held"


def _offer_held(facts: Facts, send: Send) -> str:
    if type(send.message) is Offer and send.message.ref.digest not in facts.held:
        return f"model {brief(send.message.ref.digest)} is offered without being held"
    return ""


def _forgets_once(facts: Facts, forget: Forget) -> str:
    digest = forget.ref.digest
    if digest in facts.held or digest in facts.partial:
        return ""
    return f"model {brief(digest)} is forgotten, and there is nothing of it"


def _forgets_unused(facts: Facts, forget: Forget) -> str:
    digest = forget.ref.digest
    return f"model {brief(digest)} is forgotten while it is in use" if digest in facts.in_use() else ""


def _one_order(facts: Facts, order: Train | Aggregate | Estimate | Replay | Evaluate) -> str:
    awaited = [asked.effect for asked in facts.orders.values()]
    if facts.sampled is not None and not isinstance(order, Estimate | Replay):
        return sampled_checkers.orders(facts.sampled, awaited, order)
    if awaited:
        return f"{type(order).__name__} while {brief(awaited[0])} is awaited"
    if facts.scalars is not None:  # what comes late still has its rounds replayed
        return ""
    return f"{type(order).__name__} after the last round" if facts.done else ""


def _work_token(facts: Facts, order: Train | Aggregate | Estimate | Replay | Evaluate) -> str:
    return "" if order.token > facts.token else f"token {order.token} after token {facts.token}"


def _timer_token(facts: Facts, effect: SetTimer) -> str:
    timer = effect.timer
    if timer in facts.timers:
        return f"timer {brief(timer)} is set while it runs"
    if timer.owner == "learning" and timer.token <= facts.token:
        return f"token {timer.token} after token {facts.token}"
    return "" if effect.after_s >= 0 else f"a timer {effect.after_s} s ago"


def _fetch_token(facts: Facts, fetch: Fetch) -> str:
    if fetch.token in facts.fetching:
        return f"fetch {fetch.token} is asked for while it is under way"
    if fetch.token > facts.fetch_token:
        return ""
    before, num_failed = facts.failed.get(fetch.token, (None, 0))
    if before is None or before.ref != fetch.ref:
        return f"fetch {fetch.token} has no failed one of the same model before it"
    allowed = facts.core.exchange._settings.max_attempts
    return "" if num_failed < allowed else f"fetch {fetch.token} is tried more than {allowed} times"


def _one_copy(facts: Facts, fetch: Fetch) -> str:
    for asked in facts.fetching.values():
        if asked.effect.ref.digest == fetch.ref.digest:
            return f"model {brief(fetch.ref.digest)} is being fetched from {asked.effect.peer} already"
        if asked.effect.peer == fetch.peer:
            return f"another model is being fetched from {fetch.peer}"
    return ""


def _linked(facts: Facts, effect: Send | Disconnect | Fetch) -> str:
    if effect.peer in facts.links:
        return ""
    return f"{type(effect).__name__} to {effect.peer}, with whom there is no link"


def _greeted(facts: Facts, effect: Send | Fetch) -> str:
    if isinstance(effect, Fetch):
        return "" if effect.peer in facts.greeted else f"a fetch from {effect.peer} before its hello"
    peer, message = effect.peer, effect.message
    if (type(message) is Hello) == (peer in facts.helloed):
        return f"the first message to {peer}, and only that, must be a hello: {brief(message)}"
    if isinstance(message, _AFTER_HELLO) and peer not in facts.greeted:
        return f"{brief(message)} to {peer} before its hello"
    return ""


_AFTER_HELLO = (
    Heartbeat,
    Shuffle,
    Ping,
    Pong,
    Probe,
    Probed,
    Suspects,
    Offer,
    Decline,
    Terms,
    *AFTER_TERMS,
    *OF_SAMPLING,
)


def _dials(facts: Facts, dial: Dial) -> str:
    peer = peer_of(dial.address)
    if peer is None or peer == facts.core.view._me:
        return f"a dial to {dial.address}"
    if peer in facts.links:
        return f"a dial to {peer}, who is linked"
    return f"a second dial to {peer} before the first was answered" if peer in facts.dialling else ""


def _train_round(facts: Facts, order: Train) -> str:
    return _in_reach(facts, order.round, "trains in round")


def _kept_round(facts: Facts, keep: Keep) -> str:
    if facts.kept is not None and keep.ref.round < facts.kept.round:
        return f"keeps round {keep.ref.round} after round {facts.kept.round}"
    # Stopped between merge and evaluation, a node keeps the model as that of the round to come.
    return "" if keep.ref.round <= facts.ceiling + 1 else _in_reach(facts, keep.ref.round, "keeps round")


def _gossip(facts: Facts) -> Gossip | None:
    return facts.core.learning if isinstance(facts.core.learning, Gossip) else None


def _told_round(facts: Facts, emit: Emit) -> str:
    learning = _gossip(facts)
    record, last = emit.record, learning._settings.rounds if learning else 0
    match record:
        case RoundDone(round_):
            if facts.done:
                return f"round {round_} ends after the last one"
            if last and round_ >= last:
                return f"round {round_} of {last} ends"
            return _in_reach(facts, round_, "ends round")
        case LearningDone(round_):
            if facts.done or not last or round_ < last:
                return f"is done in round {round_} of {last}" + ", again" * facts.done
            final = learning is not None and learning._settings.final_merge != "none"
            # A checkpoint of a later round has it behind itself.
            if final and not facts.merged and facts.round <= last:
                return "is done without its final merge"
            return _in_reach(facts, round_, "is done in round")
        case _:
            return ""


def _final_merged(facts: Facts, emit: Emit) -> str:
    if not isinstance(emit.record, FinalMergeDone):
        return ""
    if facts.merged or facts.done:
        return "a second final merge" if facts.merged else "a final merge after the end"
    learning = _gossip(facts)
    settings = learning._settings if learning is not None else None
    if settings is None or settings.final_merge == "none":
        return "a final merge, and its config has none"
    return "" if facts.core.round >= settings.rounds else f"a final merge in round {facts.core.round}"


def _result_merged(facts: Facts, send: Send) -> str:
    learning = _gossip(facts)
    if type(send.message) is not Offer or learning is None or learning._settings.final_merge == "none":
        return ""
    ref = send.message.ref
    if ref.round != learning._settings.rounds + 1 or ref.digest in facts.final_models:
        return ""
    return f"model {brief(ref.digest)} is offered as the result, and was not merged here"


def _in_reach(facts: Facts, round_: int, what: str) -> str:
    if facts.ended < round_ <= facts.ceiling:
        return ""
    return f"{what} {round_}, after {facts.ended} and at most {facts.ceiling}"


def _encodes(facts: Facts, send: Send) -> str:
    try:
        (read,) = link_decoder().feed(encode(send.message))
    except PeerError as error:
        return f"{brief(send.message)} cannot be read: {error}"
    return "" if read == send.message else f"{brief(send.message)} is read as {brief(read)}"


def _halts(facts: Facts, halt: Halt) -> str:
    return "" if isinstance(facts.event, StopRequested) else "halts without being asked to"


def _num_timers(facts: Facts, effect: SetTimer) -> str:
    timer = effect.timer
    num, core = facts.num_timers[timer.owner, timer.name], facts.core
    if timer.owner == "exchange":
        most = core.exchange._settings.max_parallel_fetches
    elif timer.name in ("beat", "flush", "repair"):
        most = 1
    elif timer.owner == "view":
        # An earlier one takes a later one's place, and the later one still runs out.
        most = 64 + 16 * core.view.num_known()
    else:
        most = _MOST_STALE
    return "" if num < most else f"{num + 1} timers {timer.owner}.{timer.name} run at once, allowed {most}"


_MOST_STALE = 1024
"""Deadlines of rounds that ended before them."""


# --- rules on the core after a step ---------------------------------------------------------------------
def _bounds(facts: Facts, now: float) -> str:
    core = facts.core
    exchange, settings = core.exchange, core.exchange._settings
    if len(exchange._waiting) > settings.max_waiting:
        return f"{len(exchange._waiting)} offers wait, allowed {settings.max_waiting}"
    if len(exchange._transfers) > settings.max_parallel_fetches:
        return f"{len(exchange._transfers)} transfers, allowed {settings.max_parallel_fetches}"
    if len(exchange._offered) > settings.num_generations:
        return f"{len(exchange._offered)} models are offered, allowed {settings.num_generations}"
    view = core.view._settings
    if len(facts.greeted) > (most := view.max_degree + view.max_brief):
        return f"{len(facts.greeted)} links accepted, allowed {most}"
    learning = core.learning
    if facts.sampled is not None:
        facts.sampled.note_ages(now)
        return sampled_checkers.bounds(facts.sampled)
    if learning is None or isinstance(learning, Sampling):
        return ""
    token = learning._token if isinstance(learning, Gossip) else learning._phase_token
    if token != facts.phase_token:
        facts.phase_token, facts.phase_at_s = token, now
    if isinstance(learning, ScalarLearning):
        return scalar_checkers.bounds(facts.scalars) if facts.scalars is not None else ""
    before, facts.inbox = facts.inbox, len(learning._inbox)
    # Links may end afterwards: the bound is on what it grows to.
    if facts.inbox > before and facts.inbox > (most := max(8, 2 * core.view.num_live())):
        return f"{facts.inbox} models in the inbox, allowed {most}"
    if (final := learning._final) is not None:
        before, facts.box = facts.box, len(final._box)
        if facts.box > before and facts.box > (most := max(8, 2 * core.view.num_live())):
            return f"{facts.box} models wait for the final merge, allowed {most}"
    return ""


def _leaks(facts: Facts) -> str:
    core = facts.core
    exchange, view = core.exchange, core.view
    in_transit = {transfer.ref.digest for transfer in exchange._transfers.values()}
    if lost := sorted((facts.held | facts.partial) - exchange._held.keys() - in_transit):
        return f"model {brief(lost[0])} is held, and the core has lost it without forgetting"
    if phantom := sorted(set(exchange._held) - facts.held):
        return f"the core counts on model {brief(phantom[0])}, which is not held"
    for token, transfer in exchange._transfers.items():
        if token not in facts.fetching and Timer("exchange", "retry", token) not in facts.timers:
            return f"transfer {token} from {transfer.peer} waits for nothing"
    if view._links.keys() != facts.links:
        return f"links with {sorted(view._links)} by the core, with {sorted(facts.links)} by the network"
    if view.num_known() > view._settings.max_known:
        return f"{view.num_known()} peers known, allowed {view._settings.max_known}"
    if facts.sampled is not None:
        most = sampled_checkers.most_held(facts.sampled)
        return f"{len(exchange._held)} models held, allowed {most}" if len(exchange._held) > most else ""
    inbox = max(8, 2 * view._settings.max_degree)
    # The inbox, what is being merged, the offered ones; own, trained and sound; and of a final merge as much again.
    most = 2 * inbox + exchange._settings.num_generations + 3
    if isinstance(core.learning, Gossip) and core.learning._final is not None:
        most += 2 * inbox + _most_stages(core) + 2
    return f"{len(exchange._held)} models held, allowed {most}" if len(exchange._held) > most else ""


def _stuck(facts: Facts, limits: Limits) -> str:
    core = facts.core
    if core.learning is None or core.model is None or core.phase is Phase.DONE:
        return ""
    if facts.sampled is not None:
        since_s = max(facts.since_s, limits.since_s)
        return sampled_checkers.waits(facts.sampled, facts.seen_at_s, since_s, limits.work_s)
    own_clock = _own_clock(core, limits)
    most = limits.work_s if own_clock is None else own_clock * DRIFT + 1
    lasts = facts.seen_at_s - max(facts.phase_at_s, facts.since_s, limits.since_s)
    return f"{core.phase.value} for {lasts:.1f} s, allowed {most:.1f} s" if lasts > most else ""


def _own_clock(core: NodeCore, limits: Limits) -> float | None:
    """How long the phase may last by the node's own timers; None where it waits for work."""
    learning = core.learning
    if isinstance(learning, ScalarLearning):
        own = learning._settings
        # With a quorum it waits a share of the time that that took.
        grace_s = GRACE * (own.deadline_s + limits.work_s)
        return {
            Phase.WAITING: max(own.wait_at_most_s, own.sync_s, 0.1),
            Phase.COLLECTING: max(own.deadline_s, grace_s),
            Phase.PAUSING: max(own.pause_s, _REST_S),
            Phase.SETTLING: own.deadline_s,
        }.get(core.phase)
    assert isinstance(learning, Gossip)
    settings = learning._settings
    return {
        Phase.WAITING: settings.wait_at_most_s,
        Phase.COLLECTING: settings.window_s or settings.deadline_s,
        Phase.PAUSING: max(settings.pause_s, _REST_S),
        Phase.CATCHING_UP: settings.catch_up_s + limits.work_s,
        # Each of its waits ends by the last stage's deadline; in between there is work.
        Phase.FINAL: (_most_stages(core) + 1) * settings.final_deadline_s + limits.work_s,
    }.get(core.phase)


def _most_stages(core: NodeCore) -> int:
    assert isinstance(core.learning, Gossip)
    mode = core.learning._settings.final_merge
    return num_stages(mode, core.view._settings.max_degree + 1) if mode != "none" else 0


_REST_S = 5.0
"""Of a node whose training failed."""


def _overdue(facts: Facts, limits: Limits) -> str:
    """As of the node's last event: one that is silent is told of nothing."""
    since_s = max(facts.since_s, limits.since_s)

    def late(at_s: float, limit_s: float) -> bool:
        return facts.seen_at_s - max(at_s, since_s) > limit_s

    for asked in facts.orders.values():
        if late(asked.at_s, limits.work_s):
            return f"{brief(asked.effect)} of {asked.at_s:.3f} s is not answered"
    for asked in facts.fetching.values():
        if late(asked.at_s, limits.fetch_s):
            return f"{brief(asked.effect)} of {asked.at_s:.3f} s is not answered"
    for peer, at_s in facts.dialling.items():
        if late(at_s, limits.dial_s):
            return f"the dial to {peer} of {at_s:.3f} s is not answered"
    for timer, due_s in facts.timers.items():
        if late(due_s, 1.0):
            return f"{brief(timer)} should have fired at {due_s:.3f} s"
    return ""


# --- rules on events: what the world promises -----------------------------------------------------------
def _answers_work(
    facts: Facts, answer: Trained | Aggregated | Estimated | Replayed | Evaluated | WorkFailed
) -> str:
    order = facts.orders[answer.token].effect if answer.token in facts.orders else None
    if order is None or not isinstance(answer, (WorkFailed, _ANSWER[type(order)])):
        awaited = tuple(asked.effect for asked in facts.orders.values())
        return f"it answers nothing: {brief(awaited) if awaited else 'nothing'} is awaited"
    return ""


_ANSWER: dict[type, type] = {
    Train: Trained,
    Aggregate: Aggregated,
    Estimate: Estimated,
    Replay: Replayed,
    Evaluate: Evaluated,
}


def _answers_fetch(facts: Facts, answer: Fetched | FetchFailed) -> str:
    return "" if answer.token in facts.fetching else "no such fetch is under way"


def _answers_timer(facts: Facts, fired: TimerFired) -> str:
    return "" if fired.timer in facts.timers else "no such timer runs"


def _link_up(facts: Facts, event: LinkUp) -> str:
    if event.peer == facts.core.view._me:
        return "a link with itself"
    return f"a second link with {event.peer}" if event.peer in facts.links else ""


def _has_link(facts: Facts, event: LinkDown | Received) -> str:
    return "" if event.peer in facts.links else f"there is no link with {event.peer}"


def _resumes(facts: Facts, event: Started) -> str:
    if facts.started:
        return "started twice in one life"
    if facts.scalars is not None:
        return _resumes_log(facts.scalars.disk, event)
    ref, kept = event.ref, facts.kept
    if ref is None or ref == kept or (kept is None and ref.round == 0):
        return ""
    return f"it begins with {brief(ref)}, and {'nothing' if kept is None else brief(kept)} was kept"


def _resumes_log(disk: Disk, event: Started) -> str:
    """The newest checkpoint, and every record that was kept of the rounds after it."""
    if event.checkpoint != disk.sealed:
        return f"it begins with {brief(event.checkpoint)}, and {brief(disk.sealed)} was kept"
    sealed = disk.sealed.round if disk.sealed is not None else 0
    wanted = {record for record in disk.records if record.round > sealed}
    if wanted != set(event.records):
        return f"it begins with {len(event.records)} records, and {len(wanted)} were kept"
    return ""


class Rule(NamedTuple):
    """A rule's name, the types that it looks at, and the function that looks."""

    name: str
    on: tuple[type, ...]
    check: Callable[[Facts, Any], str]


RULES = (
    Rule("answers", (Trained, Aggregated, Estimated, Replayed, Evaluated, WorkFailed), _answers_work),
    Rule("answers", (Fetched, FetchFailed), _answers_fetch),
    Rule("answers", (TimerFired,), _answers_timer),
    Rule("links", (LinkUp,), _link_up),
    Rule("links", (LinkDown, Received), _has_link),
    Rule("resumes", (Started,), _resumes),
    Rule("counted_once", (Aggregate,), _counted_once),
    Rule("verified", (Aggregate,), _verified),
    Rule("offered", (Aggregate,), _offered),
    Rule("staleness", (Aggregate,), _staleness),
    Rule("held", (Train, Estimate, Replay, Evaluate, Keep), _held),
    Rule("held", (Send,), _offer_held),
    Rule("forgets_unused", (Forget,), _forgets_unused),
    Rule("forgets_once", (Forget,), _forgets_once),
    Rule("one_order", (Train, Aggregate, Estimate, Replay, Evaluate), _one_order),
    Rule("new_token", (Train, Aggregate, Estimate, Replay, Evaluate), _work_token),
    Rule("new_token", (SetTimer,), _timer_token),
    Rule("new_token", (Fetch,), _fetch_token),
    Rule("one_copy", (Fetch,), _one_copy),
    Rule("linked", (Send, Disconnect, Fetch), _linked),
    Rule("greeted", (Send, Fetch), _greeted),
    Rule("dials", (Dial,), _dials),
    Rule("rounds", (Train,), _train_round),
    Rule("rounds", (Keep,), _kept_round),
    Rule("rounds", (Emit,), _told_round),
    Rule("final", (Emit,), _final_merged),
    Rule("final", (Send,), _result_merged),
    Rule("halts", (Halt,), _halts),
    Rule("timers", (SetTimer,), _num_timers),
)
"""Looked at before the facts take note of what they look at, in this order."""
_OF_GOSSIP = frozenset({"rounds", "final", "counted_once", "verified", "offered", "staleness"})
"""Rules that mean nothing where nodes learn by scalars or by sampling."""
_ENCODES = Rule("encodes", (Send,), _encodes)


class Checkers:
    """All rules over all nodes of one run. A broken one raises `Violation` there and then.

    encode: also encode every message that is sent. stride: steps between two looks at what takes longer to look at.
    """

    def __init__(self, limits: Limits | None = None, encode: bool = False, stride: int = 64) -> None:
        self.limits = limits or Limits()
        self.num_events = 0
        self._stride = stride
        self._now = 0.0
        self._online: dict[int, Facts] = {}
        self._kept: dict[int, ModelRef | None] = {}
        self._disks: dict[int, Disk] = {}
        self._states: States | None = None
        self._genuine: set[ScalarRecord] = set()
        always = (*RULES, _ENCODES) if encode else RULES
        self._rules = _by_kind(always)
        self._scalar_rules = _by_kind(
            [*(rule for rule in always if rule.name not in _OF_GOSSIP), *map(_on_scalars, SCALAR_RULES)]
        )
        self._sampled_rules = _by_kind(
            [*(r for r in always if r.name not in _OF_GOSSIP), *map(_on_sampled, sampled_checkers.RULES)]
        )

    def started(self, node: int, core: NodeCore, now: float, epoch: int) -> None:
        """A core was made; `Started` will be its first event."""
        self._now = now
        if node in self._online:
            raise Violation(now, node, "resumes", "a second core of a node that runs")
        facts = self._online[node] = Facts(core, epoch, now, self._kept.get(node))
        if isinstance(core.learning, ScalarLearning):
            self._states = self._states or States(core.learning._base)
            disk = self._disks.setdefault(node, Disk())
            facts.scalars = ScalarFacts(core, disk, self._states, self._genuine)

    def gone(self, node: int, wiped: bool = False) -> None:
        """It crashed or left. wiped: and lost its checkpoint."""
        facts = self._online.pop(node, None)
        if facts is None:
            return
        self._kept[node] = None if wiped else facts.kept
        if wiped:
            self._disks.pop(node, None)
        if what := _overdue(facts, self.limits):
            raise Violation(self._now, node, "overdue", what)

    def after(self, node: int, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """A core answered `event` with `effects`, none of which is performed yet.

        Raises:
            Violation: a rule does not hold.
        """
        facts = self._online.get(node)
        self._now = now
        self.num_events += 1
        if facts is None:
            raise Violation(now, node, "resumes", "an event for a node that is not online", event, effects)
        facts.heard(now)
        rules = self._rules_of(facts)
        for name, check in rules.get(type(event), ()):
            if what := check(facts, event):
                raise Violation(now, node, name, what, event, effects)
        if not facts.started and type(event) is not Started:
            raise Violation(now, node, "resumes", "an event before the node has started", event, effects)
        facts.see(event, effects)
        for number, effect in enumerate(effects, 1):
            for name, check in rules.get(type(effect), ()):
                if what := check(facts, effect):
                    raise Violation(now, node, name, what, event, effects[:number])
            facts.do(now, effect)
        if what := _bounds(facts, now):
            raise Violation(now, node, "bounds", what, event, effects)
        if self.num_events % self._stride == 0:
            self._look_closer(node, facts, now, event, effects)

    def _rules_of(self, facts: Facts) -> dict[type, list[tuple[str, Callable[[Facts, Any], str]]]]:
        if facts.sampled is not None:
            return self._sampled_rules
        return self._rules if facts.scalars is None else self._scalar_rules

    def finish(self, now: float) -> None:
        """The run is over: what is still awaited must not have waited long."""
        self._now = now
        for node, facts in self._online.items():
            self._look_closer(node, facts, now)

    def last_round_at(self, node: int) -> float:
        """When this node last ended a round, or began its life."""
        return self._online[node].round_at_s

    def _look_closer(
        self, node: int, facts: Facts, now: float, event: Event | None = None, effects: Sequence[Effect] = ()
    ) -> None:
        for name, what in (
            ("leaks", _leaks(facts)),
            ("stuck", _stuck(facts, self.limits)),
            ("overdue", _overdue(facts, self.limits)),
            ("log", scalar_checkers.log_holds(facts.scalars) if facts.scalars is not None else ""),
            ("let_go", sampled_checkers.let_go(facts.sampled) if facts.sampled is not None else ""),
            ("due", sampled_checkers.due(facts.sampled, facts.timers) if facts.sampled is not None else ""),
        ):
            if what:
                raise Violation(now, node, name, what, event, effects)


def _by_kind(rules: Iterable[Rule]) -> dict[type, list[tuple[str, Callable[[Facts, Any], str]]]]:
    found: dict[type, list[tuple[str, Callable[[Facts, Any], str]]]] = {}
    for rule in rules:
        for kind in rule.on:
            found.setdefault(kind, []).append((rule.name, rule.check))
    return found


def _on_scalars(rule: tuple[str, tuple[type, ...], Callable[[ScalarFacts, Any], str]]) -> Rule:
    name, kinds, check = rule

    def on_facts(facts: Facts, thing: Any) -> str:
        assert facts.scalars is not None
        return check(facts.scalars, thing)

    return Rule(name, kinds, on_facts)


def _on_sampled(rule: tuple[str, tuple[type, ...], Callable[[SampledFacts, Any], str]]) -> Rule:
    name, kinds, check = rule

    def on_facts(facts: Facts, thing: Any) -> str:
        assert facts.sampled is not None
        return check(facts.sampled, thing)

    return Rule(name, kinds, on_facts)


# --- liveness -------------------------------------------------------------------------------------------
class WatchedNode(Protocol):
    """What liveness looks at in a node. `core` is None while it is offline."""

    index: int
    peer: PeerId
    core: NodeCore | None

    @property
    def online(self) -> bool: ...


class WatchedClock(Protocol):
    """The world's."""

    def now(self) -> float: ...


class WatchedWorld(Protocol):
    """What liveness looks at in a world."""

    @property
    def nodes(self) -> Sequence[Any]: ...

    @property
    def clock(self) -> WatchedClock: ...


LATE_S = 10.0
"""The last event comes so long before the end of the time at most: heartbeats go on."""


class Liveness(Struct, frozen=True):
    """What must have come true at the end of a run in which the faults stopped at `stops_at_s`.

    rule `ends`: an online node has ended all its rounds, or, where there is no last one, one within `round_s`.
    Where the run ended early because all had, there is nothing to wait for.
    rule `one_log`: `settled_s` after the stop at the latest, nodes that learn by scalars and reach each other have one log of all rounds
        but the last few, and one state if they have ended all.
    rule `one_end`: nodes that learn by sampling and are done have one model, where `one_end` says that the network was whole.
    rule `neighbours`: `links_s` after the stop an online node that knows of an online node, or is looked for by
    one, has a greeted link.
    """

    stops_at_s: float
    round_s: float
    """The longest that one round may take."""
    links_s: float = inf
    """Left out, links are not looked at: not every pair of nodes can link behind NATs."""
    settled_s: float = inf
    """Left out, logs are not compared."""
    one_end: bool = False

    def check(self, world: WatchedWorld, checkers: Checkers) -> None:
        """Raises Violation, by the end of the run."""
        now = world.clock.now()
        online = {node.peer: node for node in world.nodes if node.online and node.core is not None}
        for node in online.values():
            if what := self._ends(node, now, checkers):
                raise Violation(now, node.index, "ends", what)
        if self.settled_s < inf:
            cores = {peer: node.core for peer, node in online.items() if node.core is not None}
            if what := scalar_checkers.apart(cores):
                raise Violation(now, next(iter(online.values())).index, "one_log", what)
        if self.one_end:
            cores = {peer: node.core for peer, node in online.items() if node.core is not None}
            ends = sampled_checkers.different_ends(cores.values())
            if len(ends) > 1:
                raise Violation(
                    now, next(iter(online.values())).index, "one_end", f"they end with {brief(tuple(ends))}"
                )
        if now + LATE_S < self.stops_at_s + self.links_s:
            return
        for node in online.values():
            if node.core.view.num_live() == 0 and (others := _could_link(node, online)):
                raise Violation(
                    now, node.index, "neighbours", f"no link, though there are {', '.join(others[:4])}"
                )

    def _ends(self, node: WatchedNode, now: float, checkers: Checkers) -> str:
        core = node.core
        if core is None or core.learning is None or core.phase is Phase.DONE:
            return ""
        if core.learning._settings.rounds:
            return f"{core.phase.value} in round {core.round} of {core.learning._settings.rounds} at the end"
        waited = now - max(checkers.last_round_at(node.index), self.stops_at_s)
        return f"no round ended for {waited:.1f} s, {core.phase.value}" if waited > self.round_s else ""


def _could_link(node: WatchedNode, online: dict[PeerId, Any]) -> list[str]:
    def looks_for(a: WatchedNode, b: PeerId) -> bool:
        assert a.core is not None
        view = a.core.view
        known = view._book.get(b)
        if known is None or not known.addresses:
            return False
        return known.bootstrap if view._settings.static else view._settings.target_degree > 0

    return [
        peer
        for peer, other in online.items()
        if peer != node.peer and (looks_for(node, peer) or (looks_for(other, node.peer) and _wants(other)))
    ]


def _wants(other: WatchedNode) -> bool:
    """Whether it dials those whom it knows: with a drawn topology always, else only while links are missing."""
    assert other.core is not None
    return other.core.view._settings.static or other.core.view._num_missing() > 0
