"""What a core promises that learns by scalars, beside what every core does (see `checkers.py`).

| rule | on | what holds |
| --- | --- | --- |
| `orders` | Train, Aggregate | there are none |
| `estimates` | Estimate | of the round to come, at the node's own state, and of no round in which it has spoken |
| `says` | KeepScalars | a record of the node's own has the codes that it has just measured, for the round that they were for |
| `signs_once` | KeepScalars | the node never signs two records of one round, in any life that has its disk |
| `genuine` | KeepScalars, Replay | every record is signed by its author, who is a member |
| `durable` | Send, Replay | what is passed on or counts was kept first |
| `applied_once` | Replay | rounds rise from where the state stands, and authors within each; none comes twice |
| `weighed` | Replay | scale and decay are those that follow from the terms |
| `one_state` | Replay | whoever calls a state by this name has applied the same to the same base |
| `sealed` | KeepScalars | a checkpoint goes on from the one before, or is one that a neighbour said it had sealed |
| `settled` | KeepScalars | no record comes of a round that is sealed |
| `terms` | Send | records and what compares them only go to whom the terms were heard of |
| `told` | RoundDone, LearningDone | rounds rise and end with the last; learning is done once, after it |
| `scalar bounds` | each step | records that wait to be passed on, voices and remembered states within their limits |
| `log` | now and then | the log counts its records right, and a node at rest is in the state that its log leads to |

Belongs here: these rules, and the facts that they rest on.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from node.core import NodeCore
from protocols.events import (
    Aggregate,
    Effect,
    Emit,
    Estimate,
    Estimated,
    Event,
    KeepScalars,
    LearningDone,
    LinkDown,
    Phase,
    Received,
    Replay,
    RoundDone,
    RoundScalars,
    Send,
    Started,
    Train,
)
from protocols.messages import Holding, Marks, Pull, Ranges, Scalars, Terms
from protocols.scalar_flood import RECORDS_PER_S
from protocols.scalar_log import signed_bytes
from protocols.scalar_terms import round_scalars
from protocols.scalar_votes import MAX_REMEMBERED
from protocols.scalars import ScalarLearning
from protocols.vocabulary import Checkpoint, PeerId, ScalarRecord

_DRIFT = 2.0
AFTER_TERMS = (Marks, Scalars, Ranges, Holding, Pull)


class States:
    """Of a whole run: what was applied to get to each state, by the state's digest."""

    def __init__(self, base: bytes) -> None:
        self._applied: dict[bytes, tuple[bytes, int]] = {base: (base, 0)}
        """A digest of all that was applied, in order, and its last round."""

    def last_round(self, digest: bytes) -> int | None:
        """None where nobody has made such a state."""
        found = self._applied.get(digest)
        return None if found is None else found[1]

    def add(self, source: bytes, name: bytes, rounds: Sequence[RoundScalars]) -> bool:
        """False where another history goes by this name."""
        history, last = self._applied[source]
        for each in rounds:
            entries = [(record.author, record.codes) for record in each.records]
            told = msgspec.msgpack.encode((history, each.round, each.scale, each.decay, entries))
            history, last = hashlib.sha256(told).digest(), each.round
        return self._applied.setdefault(name, (history, last))[0] == history


class Disk:
    """What one node has kept and said. It outlives a crash."""

    def __init__(self) -> None:
        self.records: dict[ScalarRecord, None] = {}
        self.ever: set[ScalarRecord] = set()
        """Kept, and perhaps cut since."""
        self.signed: dict[int, bytes] = {}
        self.sealed: Checkpoint | None = None


class ScalarFacts:
    """Of one node in one life."""

    def __init__(self, core: NodeCore, disk: Disk, states: States, genuine: set[ScalarRecord]) -> None:
        assert isinstance(core.learning, ScalarLearning)
        self.core, self.learning = core, core.learning
        self.disk, self.states = disk, states
        self.terms: set[PeerId] = set()
        """Neighbours whose terms were heard on the link that stands."""
        self.heard: set[Checkpoint] = set()
        """What neighbours said they had sealed."""
        self.saved: set[bytes] = set()
        self.ended = -1
        self.done = False
        self.event: Event | None = None
        self.measuring = 0
        self.measured: tuple[int, bytes] | None = None
        """In this step: the round, and the codes."""
        self._genuine = genuine
        """Records that were looked at, in the whole run."""

    def see(self, event: Event) -> None:
        """Take note of what the core was told."""
        self.event, self.measured = event, None
        match event:
            case Estimated(_, codes):
                self.measured = self.measuring, codes
            case Received(peer, Terms()):
                self.terms.add(peer)
            case Received(_, Marks() as marks):
                self.heard.add(marks.sealed)
            case LinkDown(peer):
                self.terms.discard(peer)
            case Started(_, _, ref):
                if ref is not None:
                    self.saved.add(ref.digest)
            case _:
                pass

    def do(self, effect: Effect) -> None:
        """Take note of what the core asked for."""
        match effect:
            case KeepScalars(records, checkpoint, cut):
                self._keep(records, checkpoint, cut)
            case Estimate(_, _, round_):
                self.measuring = round_
            case Replay() if effect.save:
                self.saved.add(effect.name)
            case Emit(RoundDone(round_)):
                self.ended = round_
            case Emit(LearningDone()):
                self.done = True
            case _:
                pass

    def _keep(self, records: Iterable[ScalarRecord], checkpoint: Checkpoint | None, cut: int) -> None:
        disk, me = self.disk, self.learning._signatures.author
        disk.records.update(dict.fromkeys(records))
        disk.ever.update(records)
        for record in records:
            if record.author == me:
                disk.signed.setdefault(record.round, record.codes)
        if checkpoint is not None:
            disk.sealed = checkpoint
            disk.records = {record: None for record in disk.records if record.round > cut}

    def problem_of(self, record: ScalarRecord) -> str:
        """Why this record is not one that its author has signed as a member."""
        learning, members = self.learning, self.learning._flood._members
        if members and record.author not in members:
            return f"author {record.author.hex()[:8]} is no member"
        if record in self._genuine:
            return ""
        data = signed_bytes(learning._signed_terms, record.round, record.codes, record.built_on)
        if not learning._signatures.verify(record.author, data, record.signature):
            return f"author {record.author.hex()[:8]} never signed this of round {record.round}"
        self._genuine.add(record)
        return ""


# --- rules on effects: "" where all is well -------------------------------------------------------------
def _no_orders(facts: ScalarFacts, order: Train | Aggregate) -> str:
    return f"{type(order).__name__}, where nobody exchanges models"


def _estimates(facts: ScalarFacts, order: Estimate) -> str:
    learning, round_ = facts.learning, order.round
    if facts.done:
        return "an estimate after the end"
    if round_ in facts.disk.signed:
        return f"an estimate of round {round_}, in which it has spoken"
    if learning.own is None or order.ref.digest != learning.own.digest or round_ != learning.round + 1:
        return f"an estimate of round {round_} at another state than that of round {learning.round}"
    last = learning._settings.rounds
    return f"an estimate of round {round_} of {last}" if last and round_ > last else ""


def _says(facts: ScalarFacts, keep: KeepScalars) -> str:
    me = facts.learning._signatures.author
    for record in keep.records:
        # Without codes it only says where its author stands; what others bring back of it was said in a former life.
        if record.author != me or not record.codes or isinstance(facts.event, Received):
            continue
        if facts.measured != (record.round, record.codes):
            what = "nothing" if facts.measured is None else f"round {facts.measured[0]}"
            return f"it speaks in round {record.round} and has measured {what}"
    return ""


def _signs_once(facts: ScalarFacts, keep: KeepScalars) -> str:
    me = facts.learning._signatures.author
    if isinstance(facts.event, Received):  # it has lost its disk, and others bring back what it said before
        return ""
    for record in keep.records:
        if record.author == me and facts.disk.signed.get(record.round, record.codes) != record.codes:
            return f"it has signed two records of round {record.round}"
    return ""


def _genuine(facts: ScalarFacts, effect: KeepScalars | Replay) -> str:
    return next((problem for record in _records(effect) if (problem := facts.problem_of(record))), "")


def _durable(facts: ScalarFacts, effect: Send | Replay) -> str:
    if isinstance(effect, Send):
        if not isinstance(effect.message, Scalars):
            return ""
        records: Iterable[ScalarRecord] = effect.message.records
    else:
        records = _records(effect)
    for record in records:
        if record not in facts.disk.ever:
            return f"a record of round {record.round} by {record.author.hex()[:8]} was not kept first"
    return ""


def _records(effect: KeepScalars | Replay) -> Iterator[ScalarRecord]:
    if isinstance(effect, KeepScalars):
        yield from effect.records
    else:
        for each in effect.rounds:
            yield from each.records


def _applied_once(facts: ScalarFacts, order: Replay) -> str:
    last = facts.states.last_round(order.ref.digest)
    if last is None:
        return f"nobody has made the state {order.ref.digest.hex()[:8]} that is replayed from"
    for each in order.rounds:
        if each.round <= last:
            return f"round {each.round} is applied to a state of round {last}"
        last = each.round
        authors = [record.author for record in each.records]
        if authors != sorted(set(authors)):
            return f"the authors of round {each.round} are out of order, or one comes twice"
        if any(record.round != each.round for record in each.records):
            return f"a record of another round stands in round {each.round}"
        if not authors:
            return f"round {each.round} is empty"
    return "" if order.rounds else "nothing to replay"


def _weighed(facts: ScalarFacts, order: Replay) -> str:
    settings = facts.learning._settings
    for each in order.rounds:
        if each != round_scalars(settings, each.round, each.records):
            return f"round {each.round} has scale {each.scale} and decay {each.decay}"
    return ""


def _one_state(facts: ScalarFacts, order: Replay) -> str:
    if facts.states.add(order.ref.digest, order.name, order.rounds):
        return ""
    return f"state {order.name.hex()[:8]} was reached otherwise by another node, or here before"


def _sealed(facts: ScalarFacts, keep: KeepScalars) -> str:
    checkpoint, before = keep.checkpoint, facts.disk.sealed
    if checkpoint is None or checkpoint in facts.heard:
        return ""
    if checkpoint.ref.digest not in facts.saved and not _is_of(before, checkpoint):
        return f"the state of round {checkpoint.round} was neither saved here nor sealed by a neighbour"
    if before is not None and checkpoint.round <= before.round:
        return f"round {checkpoint.round} is sealed after round {before.round}"
    return ""


def _is_of(before: Checkpoint | None, checkpoint: Checkpoint) -> bool:
    """Rounds in which nobody spoke leave the state as it was."""
    return before is not None and before.ref.digest == checkpoint.ref.digest


def _settled(facts: ScalarFacts, keep: KeepScalars) -> str:
    before = facts.disk.sealed
    for record in keep.records:
        if before is not None and record.round <= before.round:
            return f"a record of round {record.round} is taken, and round {before.round} is sealed"
    return ""


def _after_terms(facts: ScalarFacts, send: Send) -> str:
    if isinstance(send.message, AFTER_TERMS) and send.peer not in facts.terms:
        return f"{type(send.message).__name__} to {send.peer}, whose terms were not heard"
    return ""


def _told(facts: ScalarFacts, emit: Emit) -> str:
    last = facts.learning._settings.rounds
    match emit.record:
        case RoundDone(round_):
            if round_ <= facts.ended or (last and round_ > last):
                return f"round {round_} of {last} ends after round {facts.ended}"
        case LearningDone(round_):
            if facts.done or not last or round_ != last:
                return f"is done in round {round_} of {last}" + ", again" * facts.done
        case _:
            pass
    return ""


# --- rules on the core ----------------------------------------------------------------------------------
def bounds(facts: ScalarFacts) -> str:
    """After each step."""
    learning = facts.learning
    fresh, budget_s = len(learning._flood._fresh), 2 + learning._settings.batch_s * _DRIFT
    if fresh > (most := round(RECORDS_PER_S * budget_s) * (1 + len(facts.terms))):
        return f"{fresh} records wait to be passed on, allowed {most}"
    votes, most = learning._votes, learning._settings.max_authors
    if len(votes._voices) > most:
        return f"{len(votes._voices)} voices, allowed {most}"
    if len(votes._own_states) > MAX_REMEMBERED:
        return f"{len(votes._own_states)} states remembered, allowed {MAX_REMEMBERED}"
    if not learning._fellows.keys() <= facts.terms:
        return f"{sorted(learning._fellows.keys() - facts.terms)} taken for neighbours under the same terms"
    return ""


def log_holds(facts: ScalarFacts) -> str:
    """Now and then."""
    learning, log = facts.learning, facts.learning._log
    counted = log.count(log.cut + 1, learning.round + 10**6)
    if counted != log.num_records:
        return f"the log counts {log.num_records} records, and holds {counted}"
    if any(len(log._rounds[number].slots) > learning._settings.max_authors for number in log._rounds):
        return f"a round with more than {learning._settings.max_authors} authors"
    if learning.phase is Phase.DONE and not learning._working and not learning._stale:
        assert learning.own is not None
        if learning.own.digest != log.chain(learning.round):
            return f"it rests in state {learning.own.digest.hex()[:8]}, which its log does not lead to"
    return ""


SCALAR_RULES: tuple[tuple[str, tuple[type, ...], Any], ...] = (
    ("orders", (Train, Aggregate), _no_orders),
    ("estimates", (Estimate,), _estimates),
    ("says", (KeepScalars,), _says),
    ("signs_once", (KeepScalars,), _signs_once),
    ("genuine", (KeepScalars, Replay), _genuine),
    ("durable", (Send, Replay), _durable),
    ("applied_once", (Replay,), _applied_once),
    ("weighed", (Replay,), _weighed),
    ("one_state", (Replay,), _one_state),
    ("sealed", (KeepScalars,), _sealed),
    ("settled", (KeepScalars,), _settled),
    ("terms", (Send,), _after_terms),
    ("told", (Emit,), _told),
)


# --- liveness -------------------------------------------------------------------------------------------
def apart(cores: dict[PeerId, NodeCore]) -> str:
    """Of nodes that reach each other over links under the same terms: where two have not come to the same log."""
    left = dict(cores)
    while left:
        peer, core = next(iter(left.items()))
        group = _group(peer, cores)
        for other in group:
            left.pop(other, None)
        for other in sorted(group):
            if what := _differ(peer, core, other, cores[other]):
                return what
    return ""


def _group(peer: PeerId, cores: dict[PeerId, NodeCore]) -> set[PeerId]:
    found, waiting = {peer}, [peer]
    while waiting:
        learning = cores[waiting.pop()].learning
        assert isinstance(learning, ScalarLearning)
        for other in learning._fellows:
            if other in cores and other not in found:
                found.add(other)
                waiting.append(other)
    return found


def _differ(peer: PeerId, core: NodeCore, other: PeerId, theirs: NodeCore) -> str:
    one, two = core.learning, theirs.learning
    assert isinstance(one, ScalarLearning)
    assert isinstance(two, ScalarLearning)
    a, b, rounds = one._log, two._log, one._settings.rounds
    if not rounds and a.sealed != b.sealed:  # without a last round, one of them is always a moment ahead
        return ""
    round_ = max(a.sealed, b.sealed, rounds)
    if a.chain(round_) != b.chain(round_):
        return (
            f"{peer} and {other} have different logs of the rounds up to {round_}: sealed up to {a.sealed} and "
            f"{b.sealed}, {a.num_counted(round_)} and {b.num_counted(round_)} records"
        )
    finished = rounds and one.phase is two.phase is Phase.DONE
    if finished and one.own is not None and two.own is not None and one.own.digest != two.own.digest:
        return f"{peer} and {other} have the same log and different states"
    return ""
