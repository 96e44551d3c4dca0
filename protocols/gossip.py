"""Model gossip: one node's learning round as a transition table.

train -> offer -> collect until a quorum or a deadline -> merge -> evaluate -> (pause) -> train ... -> (final merge)

Nodes keep their own round counters; how far a received model lags is data (`staleness`), never a reason to
wait. Sources: the round arXiv 2404.04616 (train, send to all neighbours, merge what the buffer holds); exchanges
every few rounds DIMAT, arXiv 2404.08079; sparse and dense rounds arXiv 2507.06542; windows of time FedFix,
arXiv 2206.10189. A schedule is kept by a node's own counter, and all nodes of a network should have the same one.
"""

from collections.abc import Callable, Mapping
from math import ceil, floor
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.events import (
    Aggregate,
    Aggregated,
    CaughtUp,
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
from protocols.final_merge import FinalMerge
from protocols.machine import Handler, Machine, Output
from protocols.messages import Bye, Heartbeat
from protocols.view import View
from protocols.vocabulary import MAX_ROUND, ModelRef, PeerId

Share = Annotated[float, Meta(ge=0, le=1)]


class GossipSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How a gossip round runs. Times in seconds."""

    rounds: Annotated[int, Meta(ge=0)] = 0
    """Rounds after which the node stops training and only serves; 0 means for ever."""
    quorum: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Share of the learning neighbours whose model a merge waits for. 1 mixes best and is as slow as the slowest;
    0 waits for nobody and merges what has come by then."""
    exchange_every: Annotated[int, Meta(ge=1)] = 1
    """Rounds between two exchanges; in the others a node only trains, and what comes waits. Larger saves traffic, and
    costs accuracy where data differ: try 2 to 10. The same on all nodes, and `deadline_s` so many times longer."""
    fanout: Annotated[float, Meta(ge=0, le=64)] = 0.0
    """Learning neighbours, drawn in each exchange, that are offered the new model; 0 means all. 1 is push gossip: least
    traffic, slowest mixing. A fraction is an expectation: with 0.2 one exchange in five goes to one neighbour, the
    others to nobody. Choose quorum 0 with it, since nobody knows how many offers to await."""
    dense_from: Share = 0.0
    """Share of `rounds` after which exchanges are as `fanout` and `quorum` say; before it they are sparse. 0.9 talks
    late, where the same traffic buys most; 0.5 with `sparse_fanout` 0 trains alone first. The same on all nodes."""
    dense_until: Share = 1.0
    """Share of `rounds` after which exchanges are sparse again. Together with `dense_from` at least one round."""
    sparse_fanout: Annotated[float, Meta(ge=0, le=64)] = 0.0
    """As `fanout`, in exchanges outside the dense rounds, but 0 means nobody. They wait for nobody either, and merge what
    has come. 0.1 to 0.5 is enough to keep models mergeable; without any they part unless all start alike."""
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait for the quorum. Choose a few times a neighbour's training time."""
    window_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Merge at the next multiple of so many seconds of the node's clock, with what has come by then (FedFix); 0 merges
    at the quorum. It takes the place of `quorum` and `deadline_s` in every exchange, a sparse one too. Choose the time in
    which most neighbours train: the slower ones' models then come in a later window, and are stale."""
    pause_s: Annotated[float, Meta(ge=0, le=86400)] = 1.0
    """Least time from one round's start to the next: what keeps a tiny model from spinning."""
    evaluate_every: Annotated[int, Meta(ge=1)] = 1
    keep_every: Annotated[int, Meta(ge=1)] = 1
    """Rounds between checkpoints; a crash loses at most this many."""
    wait_for_peers: Annotated[int, Meta(ge=0, le=64)] = 0
    """Learning neighbours to have before the very first round begins; after a restart nobody waits. With 1 whoever joins a
    network that is under way takes its model before it trains; with 0 it first trains a round in vain."""
    wait_at_most_s: Annotated[float, Meta(gt=0, le=86400)] = 60.0
    """The first round begins after this long in any case."""
    catch_up: Literal["replace", "merge", "off"] = "replace"
    """What a node that comes late, or back after an absence, does about its own model once it has some of its neighbours':
    `replace` it by their mean, `merge` it with them by the rule, or go on as if nothing were (`off`)."""
    catch_up_after: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    """Rounds behind its neighbours from which a node catches up before it trains or offers anything."""
    catch_up_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait for the first of the neighbours' models then. Two more are waited for as long again as that one took."""
    max_staleness: Annotated[int, Meta(ge=0)] = 50
    """A model so many rounds behind is not merged: a newcomer's would drag the others back. 0 merges all. Slow devices are
    not behind in rounds, since they skip those that the others have done."""
    final_merge: Literal["none", "butterfly", "aggregator"] = "none"
    """After the last round all nodes merge once more; the node's own model and the merged one are both measured and told.
    Worth it after sparse exchanges from a common start, where nodes must be linked with all others for the mean over all of
    them. `butterfly` shares the work evenly: n log2 n models move. `aggregator` moves 2 n, most of them through one node's
    line: for few nodes or small models. The same on all nodes."""
    final_deadline_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait for the others to end their rounds, and for each stage of the final merge. Choose the time by which the
    slowest node may be behind the fastest in the end, and no less than a model takes to all who fetch it at once."""

    final_keep: Literal["merged", "better"] = "merged"
    """What a node goes on with after the final merge. `merged`: the network's model. `better`: whichever does better on the
    node's own validation samples, which keeps a spoilt merge out, and where data are very unequal keeps most nodes' own."""

    def __post_init__(self) -> None:
        """Raises ValueError where settings contradict each other."""
        if self.dense_from >= self.dense_until:
            raise ValueError(
                f"dense_from {self.dense_from:g} has to be below dense_until {self.dense_until:g}, or no round is dense"
            )
        if self.has_window and not self.rounds:
            raise ValueError("dense_from and dense_until are shares of rounds, which must then be 1 or more")
        if self.final_merge != "none" and not self.rounds:
            raise ValueError("a final_merge comes after the last round: rounds must then be 1 or more")

    @property
    def has_window(self) -> bool:
        """Whether some rounds are sparse."""
        return self.dense_from > 0 or self.dense_until < 1

    def dense_rounds(self) -> range:
        """Every round that the window touches: never none."""
        if not self.rounds:
            return range(MAX_ROUND + 1)
        first, end = self.dense_from * self.rounds, self.dense_until * self.rounds
        # 0.55 * 100 is a little more than 55.
        return range(floor(first + _ROUNDING), max(ceil(end - _ROUNDING), floor(first + _ROUNDING) + 1))


_ROUNDING = 1e-9
_WAITING, _TRAINING, _COLLECTING, _MERGING, _EVALUATING, _PAUSING, _FINAL, _DONE, _CATCHING_UP, *_ = Phase
"""By name, since looking a member up in its enum takes longer than most of a step."""


class Gossip(Machine):
    """The gossip rounds of one node."""

    def __init__(self, settings: GossipSettings, view: View, exchange: Exchange) -> None:
        self._settings = settings
        self._view = view
        self._exchange = exchange
        self._dense = settings.dense_rounds()
        self._has_window = settings.has_window
        self._final = _final_merge(settings, view, exchange, self._new_token)
        self._waited_in_vain = False
        self._told: set[PeerId] = set()
        """Who has said where it is, before the very first round."""
        self._token = 0
        self._own: ModelRef | None = None
        self._trained: ModelRef | None = None
        self._sound: ModelRef | None = None
        """The last model that training could start from."""
        self._inbox: dict[PeerId, ModelRef] = {}
        self._merging: tuple[Input, ...] = ()
        self._report: tuple[tuple[str, str | float], ...] = ()
        self._round_began_at = 0.0
        self._catching_up_since = 0.0
        self._hurries = False
        """A model has come to catch up with: others are not waited for as long as it was."""
        self._caught_in_vain_until = 0.0
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
        receive = self._receive
        if self._final is not None and self.phase is not _DONE:
            # Others may be ahead of this node, or still in their rounds.
            if event.ref.round > self._settings.rounds:
                receive = self._final.receive
            elif self.phase is _FINAL:
                return self._exchange.release(event.ref)
        return receive(event.peer, event.ref) + self._on_event(now, event)

    def _keep_at_stop(self, now: float, event: StopRequested) -> list[Output]:
        """The merged model of a round whose evaluation is cut short is further than the round's own checkpoint."""
        if self._own is None:
            return []
        round_ = max(self._own.round, self.round + (self.phase is _EVALUATING))
        return [Keep(msgspec.structs.replace(self._own, round=round_))]

    # --- waiting for company ----------------------------------------------------------------------------
    def _start(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Started)
        if event.ref is None or self._own is not None:
            return []
        self._own = event.ref
        self.round = self._view.round = event.ref.round
        self._exchange.hold(event.ref)
        if self._finished():
            return self._finish(now)
        if self.round or not self._settings.wait_for_peers:
            return self._begin(now, event)
        return [self._timer("company", self._settings.wait_at_most_s)]

    def _begin_in_company(self, now: float, event: Event | Notice) -> list[Output]:
        """Once most of enough neighbours have said where they are, which each does right after its greeting: where there is
        something to catch up with, a newcomer then trains no round in vain."""
        assert isinstance(event, Received)
        if self._own is None:
            return []
        self._told.add(event.peer)
        company = self._view.live_learners()
        told = sum(peer in self._told for peer in company)
        if told < self._settings.wait_for_peers or 2 * told <= len(company):
            return []
        return self._begin(now, event)

    # --- train ------------------------------------------------------------------------------------------
    def _begin(self, now: float, event: Event | Notice) -> list[Output]:
        assert self._own is not None
        self._round_began_at = now
        self._told.clear()
        self._exchange.hasten(0)
        if self._is_far_behind(now):
            return self._catch_up(now)
        self.phase = _TRAINING
        return [Train(self._new_token(), self._own, self.round)]

    def _offer_and_collect(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Trained)
        assert self._own is not None
        sound, self._sound = self._sound, self._own
        self._exchange.hold(self._own)
        out = self._exchange.release(sound) if sound else []
        self._exchange.hold(event.ref)
        if self._is_far_behind(now):
            # It trained while it did not know yet how far the others are: of use to nobody.
            return [*out, *self._exchange.release(event.ref), *self._catch_up(now)]
        self._trained = event.ref
        if self._is_quiet():
            return out + self._adopt(now, event.ref)
        self.phase = _COLLECTING
        out += self._offer(event.ref)
        if window_s := self._settings.window_s:
            return [*out, self._timer("window", window_s - now % window_s)]
        if self._has_enough():
            return out + self._merge(now, event)
        return [*out, self._timer("deadline", self._settings.deadline_s)]

    def _is_quiet(self) -> bool:
        """Whether this round only trains. What faster neighbours have sent by then waits for the first dense round: merged
        before it, it would leave this node an exchange behind for good."""
        settings = self._settings
        before_dense = self.round < self._dense.start and not settings.sparse_fanout
        return before_dense or bool((self.round + 1) % settings.exchange_every)

    def _offer(self, ref: ModelRef) -> list[Output]:
        settings = self._settings
        fanout = settings.fanout
        if self.round not in self._dense:
            if not settings.sparse_fanout:
                return []
            fanout = settings.sparse_fanout
        peers = self._view.some_learners(fanout)
        if self._final is not None:
            # Those who wait for the final merge go on learning, and want no model of a round any more.
            peers = [peer for peer in peers if self._view.round_of(peer) < settings.rounds]
        return self._exchange.offer(ref, peers)

    # --- catching up ------------------------------------------------------------------------------------
    def _front(self) -> int:
        """The round that the neighbours are in: the lower median, which a minority of liars cannot raise. Where there are
        too few of them to outvote one, a leap has a bound."""
        rounds = sorted(self._view.round_of(peer) for peer in self._view.learners())
        if not rounds:
            return 0
        front = rounds[(len(rounds) - 1) // 2]
        front = front if len(rounds) >= WITNESSES else min(front, self.round + MAX_LEAP)
        return min(front, self._settings.rounds or MAX_ROUND)

    def _is_far_behind(self, now: float) -> bool:
        if self._settings.catch_up == "off" or self._final is not None or now < self._caught_in_vain_until:
            return False
        return self._front() - self.round > self._settings.catch_up_after

    def _catch_up(self, now: float) -> list[Output]:
        """Wait for the neighbours' models, which each offers when it links up, and go on from those."""
        self.phase = _CATCHING_UP
        self._catching_up_since, self._hurries = now, False
        self._exchange.hasten(WITNESSES)
        deadline = self._timer("catch up", self._settings.catch_up_s)
        return [deadline, *self._catch_up_if_enough(now, _NOTHING)]

    def _recent(self) -> dict[PeerId, ModelRef]:
        """What has come from neighbours that are themselves where most are."""
        least = self._front() - self._settings.catch_up_after
        return {peer: ref for peer, ref in sorted(self._inbox.items()) if ref.round >= least}

    def _catch_up_if_enough(self, now: float, event: Event | Notice) -> list[Output]:
        if self._merging:
            return []  # their merge is under way
        if not self._is_far_behind(now):
            return self._begin(now, event)  # those who were ahead have gone
        num_recent = len(self._recent())
        enough = min(WITNESSES, len(self._view.learners()))
        if num_recent >= max(1, enough):
            return self._begin_anew(now)
        if not num_recent or self._hurries:
            return []
        # One that is slow, or whose bytes are wrong, must not hold up a newcomer that could begin.
        self._hurries = True
        took_s = max(now - self._catching_up_since, _PATIENCE_S)
        return [self._timer("catch up", min(took_s, self._settings.catch_up_s))]

    def _catch_up_in_time(self, now: float, event: Event | Notice) -> list[Output]:
        if self._merging:
            return []
        if self._recent():
            return self._begin_anew(now)
        # Nobody gave anything: better to train than to wait for ever.
        self._caught_in_vain_until = now + self._settings.catch_up_s
        return self._begin(now, event)

    def _begin_anew(self, now: float) -> list[Output]:
        assert self._own is not None
        recent = self._recent()
        self._merging = tuple(
            Input(peer, self._inbox.pop(peer), max(0, self.round - ref.round)) for peer, ref in recent.items()
        )
        front = self._front()
        if self._settings.catch_up == "merge":
            own = msgspec.structs.replace(self._own, round=front)
            return [Aggregate(self._new_token(), own, self._merging)]
        first, *rest = self._merging
        if not rest:
            return self._caught_up(now, first.ref)
        return [Aggregate(self._new_token(), first.ref, tuple(rest))]

    def _merged_anew(self, now: float, event: Event | Notice) -> list[Output]:
        assert isinstance(event, Aggregated)
        return self._caught_up(now, event.ref)

    def _caught_up(self, now: float, ref: ModelRef) -> list[Output]:
        """The network's model is this node's now."""
        assert self._own is not None
        before, num_models = self.round, len(self._merging)
        self._exchange.hold(ref)
        out = self._exchange.release(self._own)
        for item in self._merging:
            out += self._exchange.release(item.ref)
        if self._sound is not None:
            out += self._exchange.release(self._sound)
        self._merging, self._sound = (), None
        num_samples = self._own.num_samples
        self.round = max(self.round, self._front())
        self._own = ModelRef(ref.digest, ref.size_bytes, self.round, num_samples)
        self._view.round = self.round
        took_s = now - self._round_began_at
        out += [Emit(CaughtUp(self.round, before, num_models, took_s)), Keep(self._own)]
        return [*out, *(self._finish(now) if self._finished() else self._begin(now, _NOTHING))]

    def _catching_up_failed(self, now: float, event: Event | Notice) -> list[Output]:
        out = [_trouble("merging", event)]
        for item in self._merging:
            out += self._exchange.release(item.ref)
        self._merging = ()
        self._caught_in_vain_until = now + self._settings.catch_up_s
        return [*out, *self._begin(now, event)]

    # --- collect ----------------------------------------------------------------------------------------
    def _receive(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """Keep the newest model of each peer; `ModelArrived` handed us its hold."""
        if 0 < self._settings.max_staleness < self.round - ref.round:
            return self._exchange.release(ref)
        older = self._inbox.pop(peer, None)
        self._inbox[peer] = ref
        out = self._exchange.release(older) if older else []
        # Peers come and go; the inbox may not grow with everyone who ever passed by.
        while len(self._inbox) > 8 and len(self._inbox) > 2 * self._view.num_live():
            out += self._exchange.release(self._inbox.pop(next(iter(self._inbox))))
        return out

    def _has_enough(self) -> bool:
        quorum = self._settings.quorum
        if self._settings.window_s:
            return False
        if not quorum or self.round not in self._dense:
            return True
        return len(self._inbox) >= ceil(quorum * len(self._awaited()))

    def _awaited(self) -> list[PeerId]:
        """The neighbours that a quorum is a share of: all that learn, but for those whose schedule has them offer nothing.

        Every neighbour offers once in `exchange_every` of its rounds, and what came since the last merge counts: out of
        phase it is awaited no longer than in phase. Who has left the dense rounds behind offers no more in this window.
        Who has not reached them yet will, and is awaited, since a dense exchange is worth little alone; but once a
        deadline has passed in vain, only from the time it tells that it is there.
        """
        peers = self._view.live_learners()
        if not self._has_window and self._final is None:
            return peers
        first = self._dense.start if self._waited_in_vain else 0
        return [peer for peer in peers if first <= self._view.round_of(peer) < self._dense.stop]

    def _merge_if_enough(self, now: float, event: Event | Notice) -> list[Output]:
        return self._merge(now, event) if self._has_enough() else []

    def _merge_in_time(self, now: float, event: Event | Notice) -> list[Output]:
        self._waited_in_vain = True
        return self._merge(now, event)

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
        self._report = event.report
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
            report=dict(self._report),
        )
        self._merging, self._report = (), ()
        out: list[Output] = [Emit(record)]
        if self._finished():
            return [*out, Keep(self._own), *self._finish(now)]
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
        # Beyond the last round a number says where a node stands in the final merge.
        last = MAX_ROUND if self._final is None else self._settings.rounds
        return min(max(self.round, min(median, self.round + MAX_JUMP)) + 1, last)

    def _finished(self) -> bool:
        return 0 < self._settings.rounds <= self.round

    def _finish(self, now: float) -> list[Output]:
        """The rounds are over; a checkpoint of a later one has the final merge behind it."""
        assert self._own is not None
        if self._final is None or self.round > self._settings.rounds:
            return self._stop_learning()
        self.phase = _FINAL
        return self._let_go_of_rounds() + self._after_final(self._final.begin(now, self._own))

    def _stop_learning(self) -> list[Output]:
        assert self._own is not None
        self.phase = _DONE
        self._exchange.open = False
        offered = self._own
        if (final := self._final) is not None:
            # That the final merge is over is only the checkpoint's to say: it may have been one of nobody else's, and
            # after a restart nobody knows.
            last = self._settings.rounds
            self._view.round = last + final.took_part
            offered = msgspec.structs.replace(offered, round=last + final.made_result)
        else:
            self._view.round = offered.round
        self._view.active = False
        out: list[Output] = [Emit(LearningDone(round=self.round)), *self._view.heartbeat()]
        out += self._let_go_of_rounds()
        # Whoever links up later, a node back from a crash above all, is offered the final model.
        return out + self._exchange.present(offered)

    def _let_go_of_rounds(self) -> list[Output]:
        refs = [*self._inbox.values(), *([self._sound] if self._sound is not None else [])]
        self._inbox.clear()
        self._sound = None
        return [out for ref in refs for out in self._exchange.release(ref)]

    # --- the final merge --------------------------------------------------------------------------------
    def _in_final(self, now: float, event: Event | Notice) -> list[Output]:
        assert self._final is not None
        return self._after_final(self._final.step(now, event))

    def _after_final(self, out: list[Output]) -> list[Output]:
        """Take over what the final merge ended with, once it did."""
        assert self._final is not None
        assert self._own is not None
        chosen = self._final.chosen
        if chosen is None:
            return out
        before, own = self._own, msgspec.structs.replace(chosen, round=self.round + 1)
        # Of this node: the merged model's number says what is behind it. The round marks the checkpoint as of a node that
        # has its final merge behind itself, whatever came of it.
        self._own = msgspec.structs.replace(own, num_samples=before.num_samples)
        out = [*out, *self._exchange.release(before), Keep(self._own), *self._stop_learning()]
        linger_s = self._final.linger_s()
        return [*out, self._timer("linger", linger_s)] if linger_s else out

    def _let_go_of_final(self, now: float, event: Event | Notice) -> list[Output]:
        return self._final.let_go() if self._final is not None else []

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
            return [*out, *self._finish(now)]
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
_PATIENCE_S = 1.0
"""Least wait for further models to catch up with."""
WITNESSES = 3
"""Neighbours whose models a node catches up from, where it has as many."""
MAX_LEAP = 1024
"""Rounds that a node with fewer neighbours than that gains at most by catching up."""
MAX_JUMP = 16
"""Rounds that a counter may gain in one merge beyond its own step."""
_NOTHING = StopRequested()


def _final_merge(
    settings: GossipSettings, view: View, exchange: Exchange, new_token: Callable[[], int]
) -> FinalMerge | None:
    mode = settings.final_merge
    if mode == "none":
        return None
    return FinalMerge(
        mode,
        settings.rounds,
        settings.final_deadline_s,
        settings.final_keep,
        view,
        exchange,
        new_token,
    )


def _trouble(what: str, event: Event | Notice) -> Output:
    assert isinstance(event, WorkFailed)
    return Emit(Trouble(what=what, detail=event.detail))


_TABLE: dict[tuple[Phase, type], Handler] = {
    (_WAITING, Started): Gossip._start,
    (_WAITING, Received): Gossip._begin_in_company,
    (_WAITING, TimerFired): Gossip._begin,
    (_TRAINING, Trained): Gossip._offer_and_collect,
    (_TRAINING, WorkFailed): Gossip._training_failed,
    (_COLLECTING, ModelArrived): Gossip._merge_if_enough,
    (_COLLECTING, PeerDown): Gossip._merge_if_enough,
    (_COLLECTING, Received): Gossip._merge_if_enough,
    (_COLLECTING, TimerFired): Gossip._merge_in_time,
    (_MERGING, Aggregated): Gossip._adopt_merged,
    (_MERGING, WorkFailed): Gossip._merging_failed,
    (_EVALUATING, Evaluated): Gossip._evaluated,
    (_EVALUATING, WorkFailed): Gossip._evaluating_failed,
    (_PAUSING, TimerFired): Gossip._begin,
    (_CATCHING_UP, ModelArrived): Gossip._catch_up_if_enough,
    (_CATCHING_UP, Received): Gossip._catch_up_if_enough,
    (_CATCHING_UP, PeerDown): Gossip._catch_up_if_enough,
    (_CATCHING_UP, TimerFired): Gossip._catch_up_in_time,
    (_CATCHING_UP, Aggregated): Gossip._merged_anew,
    (_CATCHING_UP, WorkFailed): Gossip._catching_up_failed,
    **{
        (_FINAL, kind): Gossip._in_final
        for kind in (ModelArrived, PeerUp, PeerDown, Received, TimerFired, Aggregated, Evaluated, WorkFailed)
    },
    (_DONE, ModelArrived): Gossip._receive_when_done,
    (_DONE, TimerFired): Gossip._let_go_of_final,
}
"""The whole round: in this phase, on this event. What is not listed changes nothing (a model that arrives is
buffered in any phase)."""
