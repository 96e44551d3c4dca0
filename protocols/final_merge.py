"""One global merge once all rounds are done: who sends what to whom, and what a node does when others fall out.

gather the members -> stage by stage offer, collect, merge -> evaluate both models -> accept one of them

The members are a node and those of its learning neighbours that are ready with it, so only where all are linked with all
does everybody end with the mean over the whole network, weighted by samples; elsewhere what is linked is merged, some of
it perhaps twice. Source: arXiv 2507.06542 (many rounds of sparse gossip, one average at the end).

A node that is ready beats at once with round = rounds, one whose session has begun with rounds + 1. What a session
offers is told by the round of its reference: rounds + 1 + the number of the stage, from 1; rounds + 1 is a result.
Nobody can check a result. So a node calls only that one which it has merged itself, and takes one only from whom its
plan has it come, or where the others have left it behind.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum, auto
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from protocols.events import (
    Aggregate,
    Aggregated,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    FinalMergeDone,
    Input,
    ModelArrived,
    Notice,
    PeerDown,
    PeerUp,
    Received,
    SetTimer,
    Timer,
    TimerFired,
    Trouble,
    WorkFailed,
)
from protocols.exchange import Exchange
from protocols.machine import Output
from protocols.view import View
from protocols.vocabulary import ModelRef, PeerId

MAX_TURNS = 3
"""Members that are tried as aggregator, one after another."""
GRACE = 0.25
"""Of a deadline: for word of the last who became ready, once a neighbour has begun."""

Mode = Literal["butterfly", "aggregator"]
Keeping = Literal["merged", "better"]


# --- who sends what to whom -----------------------------------------------------------------------------
class Stage(Struct, frozen=True):
    """What one member does in one stage. Stages have the same number for all; who has no part in one has none."""

    number: int
    send_to: tuple[PeerId, ...] = ()
    """Offered what the member has merged so far."""
    receive_from: tuple[PeerId, ...] = ()
    sends_result: bool = False
    """What is offered is the mean of all: it is not merged but takes the receiver's place."""
    takes_result: bool = False


def in_order(members: Collection[PeerId], network: str) -> tuple[PeerId, ...]:
    """The same order for everybody. By a hash, so that nobody chooses its place by its id, nor keeps it in all networks."""
    return tuple(
        sorted(
            members, key=lambda peer: hashlib.sha256(f"{network}\n{peer}".encode()).digest() + peer.encode()
        )
    )


def butterfly(members: Sequence[PeerId], me: PeerId) -> list[Stage]:
    """Recursive doubling: after stage k everybody has the mean over its 2^k, and about n log2 n models have moved.

    Where n is no power of two the surplus members first give their models to a partner, and get the result at the end.
    """
    place, num_bits = members.index(me), len(members).bit_length() - 1
    core = 1 << num_bits
    surplus = len(members) - core
    fold = int(surplus > 0)
    last = fold + num_bits + 1
    if place >= core:
        partner = (members[place - core],)
        return [Stage(1, send_to=partner), Stage(last, receive_from=partner, takes_result=True)]
    guest = (members[core + place],) if place < surplus else ()
    stages = [Stage(1, receive_from=guest)] if guest else []
    for bit in range(num_bits):
        partner = (members[place ^ 1 << bit],)
        stages.append(Stage(fold + bit + 1, send_to=partner, receive_from=partner))
    return [*stages, Stage(last, send_to=guest, sends_result=True)] if guest else stages


def aggregator(members: Sequence[PeerId], me: PeerId, turn: int) -> list[Stage]:
    """All send to one, who merges and sends the result to all: 2 (n - 1) models, most of them through one node's line.

    turn: how many aggregators were lost before; the next in the order takes over.
    """
    head, gather, spread = members[turn], 2 * turn + 1, 2 * turn + 2
    if me != head:
        return [
            Stage(gather, send_to=(head,)),
            Stage(spread, receive_from=(head,), takes_result=True),
        ]
    others = tuple(peer for peer in members if peer != head)
    return [
        Stage(gather, receive_from=tuple(members[turn + 1 :])),
        Stage(spread, send_to=others, sends_result=True),
    ]


def num_stages(mode: Mode, num_members: int) -> int:
    """The highest number of a stage in a session of so many."""
    if mode == "aggregator":
        return 2 * min(MAX_TURNS, num_members)
    num_bits = num_members.bit_length() - 1
    return num_bits + 2 * (num_members > 1 << num_bits)


# --- one node's session ---------------------------------------------------------------------------------
class _At(Enum):
    GATHERING = auto()
    LATE = auto()
    EXCHANGING = auto()
    MERGING = auto()
    MEASURING_OWN = auto()
    MEASURING_MERGED = auto()
    CHOOSING = auto()
    ENDED = auto()


class FinalMerge:
    """The session of one node: a part of the learning machine, which hands it the events of that phase.

    rounds: after which a session begins. deadline_s, keep: see `GossipSettings.final_deadline_s` and `final_keep`.
    new_token: the learning machine's; it drops what answers an older one.

    Every stage ends by its number times the deadline, counted from the session's start: whoever waited in vain at one
    stage is not given up by its partner of the next.
    """

    def __init__(
        self,
        mode: Mode,
        rounds: int,
        deadline_s: float,
        keep: Keeping,
        view: View,
        exchange: Exchange,
        new_token: Callable[[], int],
    ) -> None:
        self._mode = mode
        self._rounds = rounds
        self._deadline_s = deadline_s
        self._keep = keep
        self._view = view
        self._exchange = exchange
        self._new_token = new_token
        self._at = _At.GATHERING
        self._box: dict[PeerId, ModelRef] = {}
        """What others offered for their session, the newest of each; it may come before this node is ready."""
        self._lent: list[ModelRef] = []
        """Offered in the session, and held until nobody can want it any more."""
        self._own: ModelRef | None = None
        self._running: ModelRef | None = None
        """The mean of what was merged so far."""
        self._inputs: tuple[Input, ...] = ()
        self._members: tuple[PeerId, ...] = ()
        self._stages: list[Stage] = []
        self._stage = Stage(0)
        self._turn = 0
        self._num_stages = 0
        self._has_result = False
        self._has_merged = False
        """Whether what it has is a merge made here."""
        self._in_time: set[PeerId] = set()
        """Neighbours that had not begun when this node was ready: they know of it, and it is in their plans."""
        self._graced = False
        self._ready_at = 0.0
        self._began_at = 0.0
        self._before: Mapping[str, float] = {}
        self._merged: Mapping[str, float] = {}
        self.chosen: ModelRef | None = None
        """What the session ended with. Who takes it over also takes its hold."""

    # --- what the learning machine asks -----------------------------------------------------------------
    def begin(self, now: float, own: ModelRef) -> list[Output]:
        """All rounds are done, and this is their model; its hold stays with the caller."""
        self._own = self._running = own
        self._exchange.hold(own)
        self._ready_at = now
        self._in_time.update(peer for peer in self._view.learners() if not self._has_begun(peer))
        if self._is_left_behind():
            return self._be_late(now)
        out = self._view.heartbeat()
        if self._all_are_ready():
            return out + self._start(now, _NOTHING)
        return [*out, self._timer("gather", self._deadline_s)]

    def step(self, now: float, event: Event | Notice) -> list[Output]:
        """What the event means for the session; looked up in the table of where it stands."""
        handler = _TABLE.get((self._at, type(event)))
        return handler(self, now, event) if handler else []

    def receive(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """A session's model; its hold comes along."""
        older = self._box.pop(peer, None)
        self._box[peer] = ref
        out = self._exchange.release(older) if older else []
        while len(self._box) > 8 and len(self._box) > 2 * self._view.num_live():
            out += self._exchange.release(self._box.pop(next(iter(self._box))))
        return out

    @property
    def took_part(self) -> bool:
        """Whether it has been in a session that came to something."""
        return len(self._members) > 1 and self._has_news

    @property
    def made_result(self) -> bool:
        """Whether what it ended with is a merge made here: on the word of another, and as its own, it is none."""
        own, chosen = self._own, self.chosen
        return self._has_merged and own is not None and chosen is not None and chosen.digest != own.digest

    def linger_s(self) -> float:
        """How long after its end others may still want what this node offered in its session; 0 where it did not."""
        return self._deadline_s * (self._stage.number + 1) if self._lent else 0.0

    def let_go(self) -> list[Output]:
        """Nobody wants any more what was offered in the session."""
        lent, self._lent = self._lent, []
        return [out for ref in lent for out in self._exchange.release(ref)]

    # --- gathering --------------------------------------------------------------------------------------
    def _look_around(self, now: float, event: Event | Notice) -> list[Output]:
        """Begin once all learning neighbours are ready. Who has none waits: after a restart links are yet to come."""
        if type(event) is Received and not self._has_begun(event.peer):
            self._in_time.add(event.peer)
        if self._is_left_behind():
            return self._be_late(now)
        if self._all_are_ready():
            return self._start(now, event)
        if self._graced or not any(map(self._has_begun, self._partners())):
            return []
        self._graced = True
        left_s = self._ready_at + self._deadline_s - now
        return [self._timer("gather", max(0.0, min(left_s, GRACE * self._deadline_s)))]

    def _is_ready(self, peer: PeerId) -> bool:
        return self._view.round_of(peer) >= self._rounds

    def _has_begun(self, peer: PeerId) -> bool:
        """Or is through."""
        return self._view.round_of(peer) > self._rounds

    def _partners(self) -> list[PeerId]:
        """Learning neighbours that can be in a session with this node: those who have not begun without it."""
        return [
            peer for peer in self._view.live_learners() if peer in self._in_time or not self._has_begun(peer)
        ]

    def _all_are_ready(self) -> bool:
        partners = self._partners()
        return bool(partners) and all(map(self._is_ready, partners))

    def _num_ahead(self) -> int:
        """Neighbours that are in a session without this node, or through."""
        partners = self._partners()
        return sum(self._has_begun(peer) and peer not in partners for peer in self._view.learners())

    def _is_left_behind(self) -> bool:
        """Whether nobody is left for a session, or more are ahead than it could have members.

        One neighbour's word for it takes nobody away from those who are still to come.
        """
        num_ahead, num_partners = self._num_ahead(), len(self._partners())
        return num_ahead > (num_partners + 1 if num_partners else 0)

    def _start(self, now: float, event: Event | Notice) -> list[Output]:
        """With those who are ready. Who is not by now stays out, and is offered the result."""
        ready = [peer for peer in self._partners() if self._is_ready(peer)]
        if not ready and self._num_ahead():
            return self._be_late(now)
        self._members = in_order((self._view.me, *ready), self._view.network)
        self._began_at = now
        if not ready:
            return self._measure(now)
        self._view.round = self._rounds + 1
        self._stages = (
            butterfly(self._members, self._view.me)
            if self._mode == "butterfly"
            else aggregator(self._members, self._view.me, 0)
        )
        return [*self._view.heartbeat(), *self._next_stage(now)]

    def _be_late(self, now: float) -> list[Output]:
        """The neighbours have begun without this node: nobody waits for it, and it waits for their result.

        Which it cannot verify, so it keeps that to itself.
        """
        self._at = _At.LATE
        self._members = (self._view.me,)
        self._view.active = False
        out = self._view.heartbeat()
        if self._result() is not None:
            return out + self._take_result(now, _NOTHING)
        longest = num_stages(self._mode, len(self._view.learners()) + 1) + 1
        return [*out, self._timer("result", self._deadline_s * longest)]

    def _take_result(self, now: float, event: Event | Notice) -> list[Output]:
        return self._measure(now, self._adopt_result()) if self._result() is not None else []

    def _give_up(self, now: float, event: Event | Notice) -> list[Output]:
        return self._measure(now)

    # --- stage by stage ---------------------------------------------------------------------------------
    def _next_stage(self, now: float) -> list[Output]:
        if not self._stages:
            self._stages = self._next_turn()
        if not self._stages:
            return self._measure(now)
        self._stage = self._stages.pop(0)
        self._num_stages += 1
        self._at = _At.EXCHANGING
        out = self._offer(self._stage.send_to, self._stage.sends_result)
        if self._is_complete():
            return out + self._take(now, _NOTHING)
        due_s = self._began_at + self._stage.number * self._deadline_s
        return [*out, self._timer("stage", max(0.0, due_s - now))]

    def _next_turn(self) -> list[Stage]:
        """The aggregator is lost: the next one takes over."""
        waited_in_vain = self._stage.takes_result and not self._has_result
        if self._mode == "butterfly" or not waited_in_vain:
            return []
        self._turn += 1
        if self._turn >= min(MAX_TURNS, len(self._members)):
            return []
        return aggregator(self._members, self._view.me, self._turn)

    def _offer(self, peers: Collection[PeerId], as_result: bool) -> list[Output]:
        assert self._running is not None
        live = [peer for peer in peers if self._view.is_live(peer)]
        if not live or (as_result and not self._has_merged):
            return []
        stage = 0 if as_result else self._stage.number
        ref = replace(self._running, round=self._rounds + 1 + stage)
        self._exchange.hold(ref)
        self._lent.append(ref)
        return self._exchange.offer(ref, live)

    @property
    def _has_news(self) -> bool:
        """Whether there is anything but the own model."""
        return self._has_merged or self._has_result

    def _is_complete(self) -> bool:
        """Whether all came who still can. The result makes every wait pointless."""
        if self._has_result or self._result() is not None:
            return True
        came = self._came()
        return all(peer in came or not self._view.is_live(peer) for peer in self._stage.receive_from)

    def _take_if_complete(self, now: float, event: Event | Notice) -> list[Output]:
        return self._take(now, event) if self._is_complete() else []

    def _take(self, now: float, event: Event | Notice) -> list[Output]:
        """Merge what has come for this stage, from partners or not: where not all are linked, plans differ."""
        assert self._running is not None
        if self._result() is not None:
            out = self._adopt_result()
            return out + self._next_stage(now)
        peers = [] if self._has_result or self._stage.takes_result else self._came()
        if not peers:
            return self._next_stage(now)
        self._inputs = tuple(Input(peer, self._box.pop(peer), 0) for peer in peers)
        self._at = _At.MERGING
        return [Aggregate(self._new_token(), self._running, self._inputs, "final")]

    def _came(self) -> list[PeerId]:
        """Members whose model of this stage is here."""
        round_ = self._rounds + 1 + self._stage.number
        return sorted(
            peer for peer, ref in self._box.items() if ref.round == round_ and peer in self._members
        )

    def _result(self) -> PeerId | None:
        """Who has sent the result: whom the own plan has it come from, now or later, or to one who is late anybody."""
        due = {
            peer
            for stage in (self._stage, *self._stages)
            if stage.takes_result
            for peer in stage.receive_from
        }
        for peer, ref in self._box.items():
            if ref.round == self._rounds + 1 and (self._at is _At.LATE or peer in due):
                return peer
        return None

    def _adopt_result(self) -> list[Output]:
        peer = self._result()
        assert peer is not None
        assert self._running is not None
        out = self._exchange.release(self._running)
        self._running = self._box.pop(peer)
        self._has_result, self._has_merged = True, False
        return out

    def _add_merged(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Aggregated)
        assert self._running is not None
        self._exchange.hold(event.ref)
        out = self._exchange.release(self._running) + self._release_inputs()
        self._running = event.ref
        self._has_merged = True
        return out + self._next_stage(now)

    def _merging_failed(self, now: float, event: Event | Notice) -> list[Output]:
        """As if they had not come."""
        return [_trouble("merging", event), *self._release_inputs(), *self._next_stage(now)]

    def _release_inputs(self) -> list[Output]:
        inputs, self._inputs = self._inputs, ()
        return [out for item in inputs for out in self._exchange.release(item.ref)]

    # --- the end ----------------------------------------------------------------------------------------
    def _measure(self, now: float, before: Sequence[Output] = ()) -> list[Output]:
        """Both models, so that the operator sees what the merge has brought."""
        assert self._own is not None
        if not self._has_news:
            return [*before, *self._end(now, self._own)]
        out = [*before]
        if self._members[0] == self._view.me:  # one is enough to tell those who are not in its plan
            out += self._offer([p for p in self._view.learners() if p not in self._members], as_result=True)
        self._at = _At.MEASURING_OWN
        return [*out, Evaluate(self._new_token(), self._own)]

    def _measured_own(self, now: float, event: Event | Notice) -> list[Output]:
        out = self._metrics_of(event)
        self._before = event.metrics if isinstance(event, Evaluated) else {}
        assert self._running is not None
        self._at = _At.MEASURING_MERGED
        return [*out, Evaluate(self._new_token(), self._running)]

    def _measured_merged(self, now: float, event: Event | Notice) -> list[Output]:
        out = self._metrics_of(event)
        self._merged = event.metrics if isinstance(event, Evaluated) else {}
        assert self._own is not None
        assert self._running is not None
        if self._keep == "merged":
            return [*out, *self._end(now, self._running)]
        self._at = _At.CHOOSING
        merged = (Input(self._view.me, self._running, 0),)
        return [*out, Aggregate(self._new_token(), self._own, merged, "accept")]

    def _metrics_of(self, event: Event | Notice) -> list[Output]:
        return [_trouble("evaluating", event)] if isinstance(event, WorkFailed) else []

    def _choose(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Aggregated)
        return self._end(now, event.ref)

    def _choosing_failed(self, now: float, event: Event | Notice) -> list[Output]:
        """A model that cannot even be judged is not taken over."""
        assert self._own is not None
        return [_trouble("accepting", event), *self._end(now, self._own)]

    def _end(self, now: float, chosen: ModelRef) -> list[Output]:
        assert self._own is not None
        assert self._running is not None
        self._at = _At.ENDED
        self._exchange.hold(chosen)
        self.chosen = chosen
        record = FinalMergeDone(
            num_members=len(self._members),
            num_stages=self._num_stages,
            num_samples=self._running.num_samples,
            before=self._before,
            merged=self._merged,
            kept="own" if chosen.digest == self._own.digest else "merged",
            duration_s=now - self._ready_at,
        )
        out: list[Output] = [Emit(record), *self._exchange.release(self._running)]
        self._running = None
        for ref in self._box.values():
            out += self._exchange.release(ref)
        self._box.clear()
        return out

    def _timer(self, name: str, after_s: float) -> Output:
        return SetTimer(Timer("learning", name, self._new_token()), after_s)


def _timer_of(name: str, token: int) -> TimerFired:
    return TimerFired(Timer("learning", name, token))


_NOTHING = _timer_of("", 0)


def _trouble(what: str, event: Event | Notice) -> Output:
    assert isinstance(event, WorkFailed)
    return Emit(Trouble(what=f"{what} at the end", detail=event.detail))


_TABLE: dict[tuple[_At, type], Callable[[FinalMerge, float, Event | Notice], list[Output]]] = {
    **dict.fromkeys(
        [(_At.GATHERING, kind) for kind in (ModelArrived, PeerUp, PeerDown, Received)],
        FinalMerge._look_around,
    ),
    (_At.GATHERING, TimerFired): FinalMerge._start,
    (_At.LATE, ModelArrived): FinalMerge._take_result,
    (_At.LATE, TimerFired): FinalMerge._give_up,
    **dict.fromkeys(
        [(_At.EXCHANGING, kind) for kind in (ModelArrived, PeerDown, Received)], FinalMerge._take_if_complete
    ),
    (_At.EXCHANGING, TimerFired): FinalMerge._take,
    (_At.MERGING, Aggregated): FinalMerge._add_merged,
    (_At.MERGING, WorkFailed): FinalMerge._merging_failed,
    **dict.fromkeys(
        [(_At.MEASURING_OWN, kind) for kind in (Evaluated, WorkFailed)], FinalMerge._measured_own
    ),
    **dict.fromkeys(
        [(_At.MEASURING_MERGED, kind) for kind in (Evaluated, WorkFailed)], FinalMerge._measured_merged
    ),
    (_At.CHOOSING, Aggregated): FinalMerge._choose,
    (_At.CHOOSING, WorkFailed): FinalMerge._choosing_failed,
}
"""Where the session stands, on this event. What is not listed changes nothing."""
