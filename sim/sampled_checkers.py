"""What a core promises that learns by decentralised sampling, beside what every core does (see `checkers.py`).

| rule | on | what holds |
| --- | --- | --- |
| `sampled` | Aggregate | of one round, with no model twice and one of each peer; each was told of by the peer that trained it |
| `verified` | Aggregate | every model was fetched and found good, or trained here |
| `rounds` | Train, Aggregate, RoundDone, LearningDone | rise, and end with the last |
| `kept` | Keep | never a model of an earlier round |
| `orders` | Train, Aggregate, Evaluate | few are awaited at once, and of evaluations one |
| `sampled bounds` | each step | samples that are drawn, rounds that are collected, claims and held models are few |
| `let_go` | now and then | a peer is wanted exactly as often as a part of this node in a round needs it |
| `due` | now and then | every timer has a purpose, and every purpose a timer; every ping that is awaited belongs to a sample |
| `waits` | now and then | nothing that a node does in a round lasts longer than its timers |

Belongs here: these rules, and the facts that they rest on.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from node.core import NodeCore
from protocols import sampling
from protocols.events import (
    Aggregate,
    Emit,
    Evaluate,
    Event,
    Keep,
    LearningDone,
    Phase,
    Received,
    RoundDone,
    Started,
    Timer,
    Train,
    Trained,
)
from protocols.messages import AggregatedModel, Census, Closed, Receipt, TrainedModel
from protocols.sampling import Sampling
from protocols.vocabulary import ModelRef, PeerId

DRIFT = 2.0
"""As in `checkers.py`."""
OF_SAMPLING = (Census, TrainedModel, AggregatedModel, Receipt, Closed)
MAX_ORDERS = 8
MAX_CALLS = 16
"""Samples drawn at once: a round's trainers and aggregators, and looks at who is still there."""


class SampledFacts:
    """Of one node in one life."""

    def __init__(self, core: NodeCore) -> None:
        assert isinstance(core.learning, Sampling)
        self.core, self.learning = core, core.learning
        self.told: set[tuple[PeerId, bytes, int]] = set()
        """Who told of which model, of which round; the node itself of what it has trained."""
        self.held: set[bytes] = set()
        """The same set as that of `Facts`."""
        self.trained = 0
        self.aggregated = 0
        self.kept = 0
        self.done = False
        self.training: dict[int, int] = {}
        """The round of a training, by its token."""
        self.since: dict[object, float] = {}
        """When a sample or a part in a round was seen first."""

    def see(self, event: Event) -> None:
        """Take note of what the core was told."""
        match event:
            case Received(peer, TrainedModel(ref)):
                self.told.add((peer, ref.digest, ref.round))
            case Trained(token, ref):
                round_ = self.training.pop(token, 0)
                self.told.add((self.core.view.me, ref.digest, round_ + 1))
            case Started(_, _, ref) if ref is not None:
                self.trained = max(0, ref.round - 1)
                self.aggregated = self.kept = ref.round
            case _:
                pass

    def do(self, effect: Any) -> None:
        """Take note of what the core asked for."""
        match effect:
            case Train(token, _, round_):
                self.trained = round_
                self.training[token] = round_
            case Aggregate(_, own):
                self.aggregated = own.round
            case Keep(ref):
                self.kept = ref.round
            case Emit(LearningDone()):
                self.done = True
            case _:
                pass

    def note_ages(self, now: float) -> None:
        """Take note of what began since the last step."""
        learning = self.learning
        current: list[object] = [*learning._asking.calls, *learning._collects.values()]
        if learning._trainer is not None:
            current.append(learning._trainer)
        if self.since or current:
            self.since = {each: self.since.get(each, now) for each in current}


# --- rules on effects: "" where all is well -------------------------------------------------------------
def _sampled(facts: SampledFacts, order: Aggregate) -> str:
    if order.rule != "round":
        return f"a merge of the kind '{order.rule}'"
    refs = [order.own, *(item.ref for item in order.inputs)]
    if len({ref.round for ref in refs}) > 1:
        return f"rounds {sorted({ref.round for ref in refs})} are merged together"
    if len({ref.digest for ref in refs}) < len(refs):
        return "a model is counted twice"
    peers = [item.peer for item in order.inputs]
    if len(set(peers)) < len(peers):
        return f"a peer is counted twice among {', '.join(peers)}"
    for item in order.inputs:
        if (item.peer, item.ref.digest, item.ref.round) not in facts.told:
            return (
                f"peer {item.peer} never told of model {item.ref.digest.hex()[:8]} of round {item.ref.round}"
            )
        if item.staleness or item.ref.num_samples < 1:
            return f"{item.peer}'s model is stale or stands for nothing"
    # Who has trained the first is not said.
    firsts = {
        peer for peer, digest, round_ in facts.told if (digest, round_) == (order.own.digest, order.own.round)
    }
    return "" if firsts - set(peers) else f"model {order.own.digest.hex()[:8]} has nobody who trained it"


def _verified(facts: SampledFacts, order: Aggregate) -> str:
    for ref in (order.own, *(item.ref for item in order.inputs)):
        if ref.digest not in facts.held:
            return f"model {ref.digest.hex()[:8]} is merged without being held"
    return ""


def _train_round(facts: SampledFacts, order: Train) -> str:
    last = facts.learning._settings.rounds
    if last and order.round > last:
        return f"trains in round {order.round} of {last}"
    return "" if order.round > facts.trained else f"trains in round {order.round} after {facts.trained}"


def _aggregate_round(facts: SampledFacts, order: Aggregate) -> str:
    round_, last = order.own.round, facts.learning._settings.rounds
    if last and round_ > last + 1:
        return f"aggregates for round {round_} of {last}"
    return "" if round_ >= facts.aggregated else f"aggregates for round {round_} after {facts.aggregated}"


def _told_round(facts: SampledFacts, emit: Emit) -> str:
    last = facts.learning._settings.rounds
    match emit.record:
        case RoundDone(round_):
            return f"round {round_} of {last} ends" if last and round_ > last else ""
        case LearningDone(round_):
            if facts.done or not last or round_ < last:
                return f"is done in round {round_} of {last}" + ", again" * facts.done
    return ""


def _kept(facts: SampledFacts, keep: Keep) -> str:
    own = facts.learning.own
    if keep.ref.round < facts.kept:
        return f"keeps round {keep.ref.round} after round {facts.kept}"
    return "" if own is not None and keep.ref.digest == own.digest else "keeps what is not the node's model"


RULES: tuple[tuple[str, tuple[type, ...], Any], ...] = (
    ("sampled", (Aggregate,), _sampled),
    ("verified", (Aggregate,), _verified),
    ("rounds", (Train,), _train_round),
    ("rounds", (Aggregate,), _aggregate_round),
    ("rounds", (Emit,), _told_round),
    ("kept", (Keep,), _kept),
)


# --- rules on the core after a step ---------------------------------------------------------------------
def orders(facts: SampledFacts, awaited: Iterable[Any], order: Train | Aggregate | Evaluate) -> str:
    """awaited: the orders that are not answered yet."""
    kinds = Counter(type(each) for each in awaited)
    if isinstance(order, Evaluate) and kinds[Evaluate]:
        return "an evaluation while another is awaited"
    if facts.done and not isinstance(order, Evaluate):
        return f"{type(order).__name__} after the last round"
    return "" if kinds.total() < MAX_ORDERS else f"{kinds.total() + 1} orders at once"


def bounds(facts: SampledFacts) -> str:
    """What grows with what peers say is bounded."""
    learning = facts.learning
    settings = learning._settings
    size = settings.sample_size
    if len(learning._asking.calls) > MAX_CALLS:
        return f"{len(learning._asking.calls)} samples are drawn at once, allowed {MAX_CALLS}"
    if len(learning._collects) > (most := sampling._KEPT_COLLECTS):
        return f"{len(learning._collects)} rounds are collected, allowed {most}"
    if len(learning._claims) > (most := 2 * settings.aggregators + 4):
        return f"{len(learning._claims)} claims of a round, allowed {most}"
    for collect in learning._collects.values():
        if len(collect.models) + len(collect.coming) > (most := 2 * size):
            return (
                f"{len(collect.models) + len(collect.coming)} models of round {collect.round}, allowed {most}"
            )
    if len(learning.population) > settings.max_members:
        return f"{len(learning.population)} members, allowed {settings.max_members}"
    return ""


def most_held(facts: SampledFacts) -> int:
    """Models that a node may hold: of each round what comes and what was made of it, its own, and those offered."""
    offered = facts.core.exchange._settings.num_generations
    collected = sampling._KEPT_COLLECTS * (2 * facts.learning._settings.sample_size + 1)
    return collected + offered + MAX_HANDED_OUT


MAX_HANDED_OUT = 8
"""Aggregates that somebody may still have to fetch, the node's own model, what it has trained, and what is evaluated."""


def let_go(facts: SampledFacts) -> str:
    """Links are held for what a node does, and for nothing else."""
    learning, me = facts.learning, facts.core.view.me
    needed: Counter[PeerId] = Counter(list(learning._waiting_for))
    for call in learning._asking.calls:
        needed.update(list(call.reached))
    for collect in learning._collects.values():
        needed.update(collect.participants or ())
    for trainer in (learning._trainer, *learning._serving):
        if trainer is not None:
            needed.update(list(trainer.aggregators))
    del needed[me]
    wanted = facts.core.view._wanted
    if needed == Counter(wanted):
        return ""
    peer = min(peer for peer in {*needed, *wanted} if needed[peer] != wanted.get(peer, 0))
    return f"{peer} is wanted {wanted.get(peer, 0)} times, and needed {needed[peer]} times"


def due(facts: SampledFacts, timers: Iterable[Timer]) -> str:
    """timers: those that run."""
    learning = facts.learning
    running = {timer.token for timer in timers if timer.owner == "learning"}
    if running != set(learning._timers.due):
        return f"timers {sorted(running ^ set(learning._timers.due))[:4]} do not match what they are for"
    for token, peer in learning._asking.pings.items():
        if not any(call.draw.awaits(peer) for call in learning._asking.calls):
            return f"ping {token} of {peer} belongs to no sample"
    return ""


def waits(facts: SampledFacts, now: float, since_s: float, work_s: float) -> str:
    """since_s: from when on waiting counts. work_s: the longest that a piece of work may take."""
    learning = facts.learning
    settings = learning._settings
    # A sample may have to ask everybody, a few at a time.
    drawing_s = settings.ping_s * DRIFT * (2 + len(learning.population))
    part_s = work_s + drawing_s + (4 * settings.deadline_s + settings.pause_s) * DRIFT + 1
    for each, began_s in facts.since.items():
        lasts = now - max(began_s, since_s)
        most = drawing_s if each in learning._asking.calls else part_s
        if lasts > most:
            return f"a {type(each).__name__.strip('_').lower()} lasts {lasts:.1f} s, allowed {most:.1f} s"
    busy = learning._trainer is not None or learning._collects
    if learning.phase not in (Phase.WAITING, Phase.DONE) and not busy:
        return f"{learning.phase.value}, and there is nothing to do"
    return ""


# --- at the end -----------------------------------------------------------------------------------------
def different_ends(cores: Iterable[NodeCore]) -> list[ModelRef]:
    """The last aggregates of nodes that are done: one, where the network was whole."""
    ends = {core.model.digest: core.model for core in cores if core.phase is Phase.DONE and core.model}
    return list(ends.values())
