"""Model gossip: one node's learning round as a transition table.

train -> offer -> collect until a quorum or a deadline -> merge -> evaluate -> (pause) -> train ...

Nodes keep their own round counters; how far a received model lags is data (`staleness`), never a reason to
wait. Source of the round: arXiv 2404.04616 (train, send to all neighbours, merge what the buffer holds).
"""

from collections.abc import Mapping
from math import ceil
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta, Struct

from protocols.events import (
    Aggregate,
    Aggregated,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Input,
    Keep,
    LearningDone,
    ModelArrived,
    Notice,
    PeerDown,
    PeerUp,
    Phase,
    Received,
    RoundDone,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
    Train,
    Trained,
    Trouble,
    WorkFailed,
)
from protocols.exchange import Exchange
from protocols.machine import Handler, Machine, Output
from protocols.messages import Bye, Heartbeat
from protocols.view import View
from protocols.vocabulary import MAX_ROUND, ModelRef, PeerId


class GossipSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How a gossip round runs. Times in seconds."""

    rounds: Annotated[int, Meta(ge=0)] = 0
    """Rounds after which the node stops training and only serves; 0 means for ever."""
    quorum: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Share of the learning neighbours whose model a merge waits for. 1 mixes best and is as slow as the slowest;
    0 waits for nobody and merges what has come by then."""
    fanout: Annotated[int, Meta(ge=0, le=64)] = 0
    """Learning neighbours, drawn each round, that are offered the new model; 0 means all. 1 is push gossip: least
    traffic, slowest mixing. Choose quorum 0 with it, since nobody knows how many offers to await."""
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait for the quorum. Choose a few times a neighbour's training time."""
    pause_s: Annotated[float, Meta(ge=0, le=86400)] = 1.0
    """Least time from one round's start to the next: what keeps a tiny model from spinning."""
    evaluate_every: Annotated[int, Meta(ge=1)] = 1
    keep_every: Annotated[int, Meta(ge=1)] = 1
    """Rounds between checkpoints; a crash loses at most this many."""
    wait_for_peers: Annotated[int, Meta(ge=0, le=64)] = 0
    """Learning neighbours to have before the very first round begins; after a restart nobody waits."""
    wait_at_most_s: Annotated[float, Meta(gt=0, le=86400)] = 60.0
    """The first round begins after this long in any case."""


_WAITING, _TRAINING, _COLLECTING, _MERGING, _EVALUATING, _PAUSING, _DONE = Phase
"""By name, since looking a member up in its enum takes longer than most of a step."""


class Gossip(Machine):
    """The gossip rounds of one node."""

    def __init__(self, settings: GossipSettings, view: View, exchange: Exchange) -> None:
        self._settings = settings
        self._view = view
        self._exchange = exchange
        self._token = 0
        self._own: ModelRef | None = None
        self._trained: ModelRef | None = None
        self._sound: ModelRef | None = None
        """The last model that training could start from."""
        self._inbox: dict[PeerId, ModelRef] = {}
        self._merging: tuple[Input, ...] = ()
        self._round_began_at = 0.0
        self.phase = _WAITING
        self.round = 0

    @property
    def own(self) -> ModelRef | None:
        """The node's current model."""
        return self._own

    # --- events -----------------------------------------------------------------------------------------
    def _on_event(self, now: float, event: Event | Notice) -> list[Output]:
        """Looked up in the table of this phase."""
        handler = _TABLE.get((self.phase, type(event)))
        return handler(self, now, event) if handler else []

    def _on_answer(self, now: float, event: Trained | Aggregated | Evaluated | WorkFailed) -> list[Output]:
        return self._on_event(now, event) if event.token == self._token else []

    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        timer = event.timer
        stale = timer.owner != "learning" or timer.token != self._token or self._own is None
        return [] if stale else self._on_event(now, event)

    def _on_arrived(self, now: float, event: ModelArrived) -> list[Output]:
        """A model is buffered in any phase."""
        return self._receive(event.peer, event.ref) + self._on_event(now, event)

    def _keep_at_stop(self, now: float, event: StopRequested) -> list[Output]:
        """The merged model of a round whose evaluation is cut short is further than the round's own checkpoint."""
        if self._own is None:
            return []
        merged = self.phase is _EVALUATING
        return [Keep(msgspec.structs.replace(self._own, round=self.round + merged))]

    # --- waiting for company ----------------------------------------------------------------------------
    def _start(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Started)
        if event.ref is None or self._own is not None:
            return []
        self._own = event.ref
        self.round = self._view.round = event.ref.round
        self._exchange.hold(event.ref)
        if self._finished():
            return self._stop_learning()
        if self.round or not self._settings.wait_for_peers:
            return self._begin(now, event)
        return [self._timer("company", self._settings.wait_at_most_s)]

    def _begin_in_company(self, now: float, event: Event | Notice) -> list[Output]:
        if self._own is None or len(self._view.live_learners()) < self._settings.wait_for_peers:
            return []
        return self._begin(now, event)

    # --- train ------------------------------------------------------------------------------------------
    def _begin(self, now: float, event: Event | Notice) -> list[Output]:
        assert self._own is not None
        self._round_began_at = now
        self.phase = _TRAINING
        return [Train(self._new_token(), self._own, self.round)]

    def _offer_and_collect(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Trained)
        assert self._own is not None
        sound, self._sound = self._sound, self._own
        self._exchange.hold(self._own)
        out = self._exchange.release(sound) if sound else []
        self._trained = event.ref
        self._exchange.hold(event.ref)
        self.phase = _COLLECTING
        out += self._exchange.offer(event.ref, self._view.some_learners(self._settings.fanout))
        if self._has_enough():
            return out + self._merge(now, event)
        return [*out, self._timer("deadline", self._settings.deadline_s)]

    # --- collect ----------------------------------------------------------------------------------------
    def _receive(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """Keep the newest model of each peer; `ModelArrived` handed us its hold."""
        older = self._inbox.pop(peer, None)
        self._inbox[peer] = ref
        out = self._exchange.release(older) if older else []
        # Peers come and go; the inbox may not grow with everyone who ever passed by.
        while len(self._inbox) > 8 and len(self._inbox) > 2 * self._view.num_live():
            out += self._exchange.release(self._inbox.pop(next(iter(self._inbox))))
        return out

    def _has_enough(self) -> bool:
        quorum = self._settings.quorum
        return not quorum or len(self._inbox) >= ceil(quorum * len(self._view.live_learners()))

    def _merge_if_enough(self, now: float, event: Event | Notice) -> list[Output]:
        return self._merge(now, event) if self._has_enough() else []

    # --- merge ------------------------------------------------------------------------------------------
    def _merge(self, now: float, event: Event | Notice) -> list[Output]:
        assert self._trained is not None
        self._merging = tuple(
            Input(peer, ref, max(0, self.round - ref.round)) for peer, ref in sorted(self._inbox.items())
        )
        self._inbox.clear()
        if not self._merging:
            return self._adopt(now, self._trained)
        self.phase = _MERGING
        return [Aggregate(self._new_token(), self._trained, self._merging)]

    def _adopt_merged(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Aggregated)
        assert self._trained is not None
        self._exchange.hold(event.ref)
        out = self._exchange.release(self._trained)
        return out + self._adopt(now, event.ref)

    def _adopt(self, now: float, ref: ModelRef) -> list[Output]:
        """The round's result becomes the node's model. Its hold moves along with it."""
        assert self._own is not None
        out = self._exchange.release(self._own)
        for item in self._merging:
            out += self._exchange.release(item.ref)
        self._own, self._trained = ref, None
        self.phase = _EVALUATING
        if (self.round + 1) % self._settings.evaluate_every:
            return [*out, *self._end_round(now, {})]
        return [*out, Evaluate(self._new_token(), ref)]

    # --- evaluate and go on -----------------------------------------------------------------------------
    def _evaluated(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Evaluated)
        return self._end_round(now, event.metrics)

    def _end_round(self, now: float, metrics: Mapping[str, float]) -> list[Output]:
        assert self._own is not None
        ended, self.round = self.round, self._next_round()
        # The digest stays; the reference says which round the model begins.
        self._own = ModelRef(self._own.digest, self._own.size_bytes, self.round, self._own.num_samples)
        self._view.round = self.round
        record = RoundDone(
            round=ended,
            num_merged=len(self._merging),
            staleness_max=max((item.staleness for item in self._merging), default=0),
            metrics=metrics,
            duration_s=now - self._round_began_at,
        )
        self._merging = ()
        out: list[Output] = [Emit(record)]
        if self._finished():
            return [*out, Keep(self._own), *self._stop_learning()]
        if self.round // self._settings.keep_every > ended // self._settings.keep_every:
            out.append(Keep(self._own))
        rest = self._settings.pause_s - (now - self._round_began_at)
        if rest <= 0:
            return [*out, *self._begin(now, _NOTHING)]
        self.phase = _PAUSING
        return [*out, self._timer("pause", rest)]

    def _next_round(self) -> int:
        """One on, or up to where the neighbours are: a node back from an absence does not lag for ever.

        The lower median over the own round and the merged models' rounds, and MAX_JUMP at the most: liars move
        it only where they are the larger part of what was merged, and not far.
        """
        rounds = sorted([self.round, *(item.ref.round for item in self._merging)])
        median = rounds[(len(rounds) - 1) // 2]
        return min(max(self.round, min(median, self.round + MAX_JUMP)) + 1, MAX_ROUND)

    def _finished(self) -> bool:
        return 0 < self._settings.rounds <= self.round

    def _stop_learning(self) -> list[Output]:
        assert self._own is not None
        self.phase = _DONE
        self._exchange.open = False
        self._view.round, self._view.active = self.round, False
        out: list[Output] = [Emit(LearningDone(round=self.round)), *self._view.heartbeat()]
        for ref in self._inbox.values():
            out += self._exchange.release(ref)
        self._inbox.clear()
        if self._sound is not None:
            out += self._exchange.release(self._sound)
            self._sound = None
        # Whoever links up later, a node back from a crash above all, is offered the final model.
        return out + self._exchange.present(self._own)

    def _receive_when_done(self, now: float, event: Event | Notice) -> list[Output]:
        """A fetch that was under way when the last round ended."""
        assert isinstance(event, ModelArrived)
        ref = self._inbox.pop(event.peer, None)
        return self._exchange.release(ref) if ref else []

    # --- when work fails --------------------------------------------------------------------------------
    def _training_failed(self, now: float, event: Event | Notice) -> list[Output]:
        """Training is deterministic: the same model and round would fail again. Something has to change."""
        assert self._own is not None
        out = [_trouble("training", event)]
        if self._sound is not None and self._sound.digest != self._own.digest:
            # What was merged since the last good training cannot be trained on: back to what could.
            out += self._exchange.release(self._own)
            self._own, self._sound = msgspec.structs.replace(self._sound, round=self.round), None
        self.round = min(self.round + 1, MAX_ROUND)
        self._own = msgspec.structs.replace(self._own, round=self.round)
        self._view.round = self.round
        if self._finished():
            return [*out, *self._stop_learning()]
        if self._sound is None and self._inbox:
            # Nothing better of our own: what the neighbours have may help.
            self._trained = self._own
            self._exchange.hold(self._own)
            return [*out, *self._merge(now, event)]
        self.phase = _PAUSING
        return [*out, self._timer("pause", max(self._settings.pause_s, _RETRY_S))]

    def _merging_failed(self, now: float, event: Event | Notice) -> list[Output]:
        assert self._trained is not None
        out = [_trouble("merging", event)]
        for item in self._merging:
            out += self._exchange.release(item.ref)
        self._merging = ()
        return [*out, *self._adopt(now, self._trained)]

    def _evaluating_failed(self, now: float, event: Event | Notice) -> list[Output]:
        return [_trouble("evaluating", event), *self._end_round(now, {})]

    # --- tokens -----------------------------------------------------------------------------------------
    def _new_token(self) -> int:
        """Only one thing is awaited at a time, so one counter marks every older answer as stale."""
        self._token += 1
        return self._token

    def _timer(self, name: str, after_s: float) -> Output:
        return SetTimer(Timer("learning", name, self._new_token()), after_s)

    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        StopRequested: _keep_at_stop,
        TimerFired: _on_timer,
        ModelArrived: _on_arrived,
        **dict.fromkeys((Trained, Aggregated, Evaluated, WorkFailed), _on_answer),
        # A neighbour that finishes (its beat says so) or leaves is awaited no longer.
        **dict.fromkeys((Started, PeerUp, PeerDown, Heartbeat, Bye), _on_event),
    }


_RETRY_S = 5.0
MAX_JUMP = 16
"""Rounds that a counter may gain in one merge beyond its own step."""
_NOTHING = StopRequested()


def _trouble(what: str, event: Event | Notice) -> Output:
    assert isinstance(event, WorkFailed)
    return Emit(Trouble(what=what, detail=event.detail))


_TABLE: dict[tuple[Phase, type], Handler] = {
    (_WAITING, Started): Gossip._start,
    (_WAITING, PeerUp): Gossip._begin_in_company,
    (_WAITING, TimerFired): Gossip._begin,
    (_TRAINING, Trained): Gossip._offer_and_collect,
    (_TRAINING, WorkFailed): Gossip._training_failed,
    (_COLLECTING, ModelArrived): Gossip._merge_if_enough,
    (_COLLECTING, PeerDown): Gossip._merge_if_enough,
    (_COLLECTING, Received): Gossip._merge_if_enough,
    (_COLLECTING, TimerFired): Gossip._merge,
    (_MERGING, Aggregated): Gossip._adopt_merged,
    (_MERGING, WorkFailed): Gossip._merging_failed,
    (_EVALUATING, Evaluated): Gossip._evaluated,
    (_EVALUATING, WorkFailed): Gossip._evaluating_failed,
    (_PAUSING, TimerFired): Gossip._begin,
    (_DONE, ModelArrived): Gossip._receive_when_done,
}
"""The whole round: in this phase, on this event. What is not listed changes nothing (a model that arrives is
buffered in any phase)."""
