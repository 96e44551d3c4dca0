"""Learning by shared-seed scalars: one node's round as a transition table, and the log that all replicas share.

estimate -> sign, keep, flood -> collect until a quorum or a deadline -> replay -> evaluate -> (pause) -> estimate ...

A replica's parameters are a function of the log: whoever holds the same records has the same bytes. Nobody waits for all:
a record that comes after its round was replayed has the round replayed again, until the round is sealed. Sources: one byte
a gradient arXiv 2306.10015; flooding SeedFlood, arXiv 2602.18181; directions of a pool FedKSeed, arXiv 2312.06353; range
digests arXiv 2212.13567.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import ClassVar

import msgspec

from protocols.events import (
    Emit,
    Estimate,
    Estimated,
    Evaluate,
    Evaluated,
    Keep,
    KeepScalars,
    LearningDone,
    ModelArrived,
    PeerDown,
    PeerUp,
    Phase,
    Received,
    Replay,
    Replayed,
    RoundDone,
    RoundScalars,
    Send,
    SetTimer,
    Started,
    Timer,
    TimerFired,
    Trouble,
    WorkFailed,
)
from protocols.exchange import Exchange
from protocols.machine import Handler, Machine, Output
from protocols.messages import Holding, Marks, Pull, Ranges, Scalars, Terms
from protocols.scalar_flood import Flood
from protocols.scalar_log import LogStatus, Outcome, ScalarLog, log_status, signed_bytes
from protocols.scalar_terms import (
    ScalarSettings,
    counting_rounds,
    misfit,
    terms_digest,
    terms_of,
)
from protocols.scalar_votes import Patience, Votes, agreed, lower_median
from protocols.signing import Signatures
from protocols.view import View
from protocols.vocabulary import MAX_ROUND, Checkpoint, ModelRef, PeerId, Reason, ScalarRecord, state_id

MAX_AHEAD = 16
"""Rounds beyond the others' median from which records are taken."""
MAX_OPEN = 20
"""Checkpoint intervals that may be open; beyond them a node seals without its neighbours' consent."""
PATIENCE = 3
"""Repairs that a node gives its log to become that of its neighbours before it takes over their state."""
GRACE = 0.25
"""Of the time that a round took to come to its quorum: so much longer it waits for the rest."""
MARKS_EVERY = 4
"""Repairs between two marks that nothing has called for."""
NUM_SERVED = 2
"""Sealed states before the newest that are served, with the records after them."""
MAX_SETTLING = 10
"""Times `deadline_s` that a node waits at its end for the others to seal the last round as it has."""
HEARD_FOR = 3
"""Times `deadline_s` for which an author's last word counts."""


_SYNCING, _ESTIMATING, _COLLECTING, _REPLAYING = (
    Phase.WAITING,
    Phase.ESTIMATING,
    Phase.COLLECTING,
    Phase.REPLAYING,
)
_EVALUATING, _PAUSING, _SETTLING, _DONE = Phase.EVALUATING, Phase.PAUSING, Phase.SETTLING, Phase.DONE


class ScalarLearning(Machine):
    """The rounds of one node and its part in the common log. `round` is how many it has behind it."""

    def __init__(
        self,
        settings: ScalarSettings,
        base: bytes,
        members: frozenset[bytes],
        view: View,
        exchange: Exchange,
        signatures: Signatures,
    ) -> None:
        self._settings = settings
        self._view = view
        self._exchange = exchange
        self._signatures = signatures
        self._terms = terms_of(settings, base, members)
        self._signed_terms = terms_digest(self._terms)
        self._base = base
        self._is_guest = bool(members) and signatures.author not in members
        """No member: it follows the others, and its own word would not count."""
        self._log = ScalarLog(base, settings.max_authors)
        heard_for_s = HEARD_FOR * settings.deadline_s
        self._votes = Votes(signatures.author, heard_for_s, settings.max_authors, bool(members))
        self._flood = Flood(
            self._log, self._votes, view, signatures, self._signed_terms, members, settings.max_samples
        )
        self._patience = Patience()
        self._awaited: set[bytes] = set()
        self._fellows = self._flood.fellows
        self._counts = self._flood.counts
        self._token = 0
        self._phase_token = 0
        self._flush_token = 0
        self._repair_token = 0
        self._working = False
        self._head: ModelRef | None = None
        self._head_round = 0
        self._target = 0
        """The round of the state that is being replayed, or of the head."""
        self._stale = False
        """A record came for a round that the head has behind it."""
        self._sealed: Checkpoint | None = None
        self._proposed: Checkpoint | None = None
        self._sealed_before: list[Checkpoint] = []
        """Older sealed states that are still served, the oldest first: over a slow line it takes a while to fetch one."""
        self._proposed_at = 0.0
        self._proposing: Checkpoint | None = None
        self._asked_for = 0
        """A round that neighbours have sealed, with what is our log too."""
        self._adopting: Checkpoint | None = None
        self._apart_since: float | None = None
        self._to_evaluate = 0
        self._ended = 0
        """The last round that was told of."""
        self._lateness = 0
        self._settled_at: float | None = None
        self._done = False
        self._measuring = 0
        """The round whose scalars are being measured."""
        self._num_last = 0
        """Authors of the last round."""
        self._expected = 0
        """Records that the round may have; it waits for a quorum of them, and a little longer for all."""
        self._using: ModelRef | None = None
        """What the worker begins with."""
        self._timer_name = ""
        self._silent_until = 0
        self._spoken = 0
        """The last round that it has spoken in in this life, and in those that it kept records of."""
        self._silent_since = 0.0
        self._remembers = False
        """Whether it began with what it had kept."""
        self._repairs = 0
        self._round_began_at = 0.0
        self._last_round_began_at = 0.0
        self.phase = _SYNCING
        self.round = 0
        exchange.open = False  # models are fetched for the asking, never offered

    @property
    def own(self) -> ModelRef | None:
        """The state that this node has replayed."""
        return self._head

    def status(self) -> LogStatus:
        """The log at a glance."""
        return log_status(self._log, self.round, self._sealed, self._proposed, self._counts)

    # --- beginning --------------------------------------------------------------------------------------
    def _on_started(self, now: float, event: Started) -> list[Output]:
        if event.ref is None or self._head is not None:
            return []
        self._sealed = event.checkpoint or Checkpoint(0, self._base, 0, event.ref)
        if event.checkpoint is not None:
            self._log.adopt(event.checkpoint)
        self._remembers = event.checkpoint is not None or bool(event.records)
        for record in sorted(event.records, key=lambda record: record.round):
            self._log.add(record)
            self._votes.hear(now, record)
            if record.author == self._signatures.author:
                self._spoken = record.round
        self._votes.remember(Checkpoint(0, self._base, 0, event.ref))
        self._votes.remember(self._sealed)
        self._head = self._sealed.ref
        self._head_round = self._target = self._sealed.round
        self._exchange.hold(self._head)
        self._exchange.hold(self._sealed.ref)
        # One more than any round that it may have spoken in: a node never says two things about one.
        self._set_round(max(self._sealed.round, self._last_spoken()))
        fresh = self.round == 0 and self._settings.wait_for_peers > 0
        wait_s = self._settings.wait_at_most_s if fresh else self._settings.sync_s
        return [self._phase_timer("company" if fresh else "sync", wait_s), self._repair_timer()]

    def _set_round(self, round_: int) -> None:
        rounds = self._settings.rounds
        self.round = self._view.round = min(round_, rounds) if rounds else min(round_, MAX_ROUND)

    def _on_peer_up(self, now: float, event: PeerUp) -> list[Output]:
        return [Send(event.peer, self._terms)] if self._view.learns(event.peer) else []

    def _on_peer_down(self, now: float, event: PeerDown) -> list[Output]:
        if self._fellows.pop(event.peer, None) is None:
            return []
        return self._consider(now)

    def _on_terms(self, now: float, event: Received) -> list[Output]:
        peer, theirs = event.peer, event.message
        assert isinstance(theirs, Terms)
        if not self._view.learns(peer):
            return []
        if problem := misfit(self._terms, theirs):
            self._fellows.pop(peer, None)
            return self._view.turn_away(peer, *problem)
        if peer in self._fellows:
            return []
        self._flood.welcome(peer)
        return self._mark([peer])

    def _mark(self, peers: Iterable[PeerId]) -> list[Output]:
        """Say how far the own log is settled."""
        if self._sealed is None:
            return []
        marks = Marks(self.round, self._log.cut, self._sealed, self._proposed)
        return [Send(peer, marks) for peer in peers]

    def _in_company(self, now: float) -> list[Output]:
        """The first round of all waits for neighbours; once they are there, or time is up, for their marks."""
        return [self._phase_timer("sync", self._settings.sync_s)]

    def _synced(self, now: float) -> list[Output]:
        if self._adopting is not None and self._fellows:
            return [*self._consider(now), self._phase_timer("sync", max(self._settings.sync_s, 0.1))]
        where = lower_median(self._rounds_of_fellows() or [0])
        if where > 0 and not self._remembers:
            # It may have spoken in these rounds, and lost its disk since.
            self._silent_until, self._silent_since = where + 2, now
        return self._go_on(now)

    # --- the round --------------------------------------------------------------------------------------
    def _go_on(self, now: float) -> list[Output]:
        """The next piece of work: a checkpoint that is due, the head, its evaluation, the next estimate."""
        assert self._head is not None
        assert not self._working
        if (round_ := self._due(now)) is not None:
            return self._propose(now, round_)
        if self._stale or self._head_round != self.round:
            return self._replay(now)
        if self._finished() and not self._is_settled(now):
            return self._settle(now)
        if self._to_evaluate:
            self.phase = _EVALUATING
            return self._order(Evaluate(self._new_phase(), self._head))
        out = self._end_round(now, {})
        if self._finished():
            return [*out, *self._stop_learning()]
        rest = self._settings.pause_s - (now - self._round_began_at) if self.phase is not _SYNCING else 0.0
        if rest > 0 and self.phase is not _PAUSING:
            self.phase = _PAUSING
            return [*out, self._phase_timer("pause", rest)]
        return [*out, *self._begin(now)]

    def _begin(self, now: float) -> list[Output]:
        """Where others are rounds ahead, this node goes on where most of them are."""
        assert self._head is not None
        where = self._where(now)
        if where > self.round:
            self._set_round(where)
            return self._go_on(now)
        self._last_round_began_at, self._round_began_at = self._round_began_at, now
        if self._is_silent(now):
            return self._collect(now)
        self.phase, self._measuring = _ESTIMATING, self.round + 1
        return self._order(Estimate(self._new_phase(), self._head, self._measuring, self._settings.samples))

    def _is_silent(self, now: float) -> bool:
        """Whether it has spoken in this round before, or may have; or would measure at a state that is not the others'."""
        spoken = self._last_spoken()
        if now - self._silent_since <= HEARD_FOR * self._settings.deadline_s:
            spoken = max(spoken, self._silent_until)
        return spoken > self.round or self._is_guest or self._adopting is not None

    def _last_spoken(self) -> int:
        """The last round that it has said something of: what it said before it lost its disk may come back, and a crowded
        round may have no place for its record."""
        return max(self._log.newest_of(self._signatures.author), self._spoken)

    def _where(self, now: float) -> int:
        """Rounds that most have behind them."""
        return self._votes.median_round(now, self.round, self._rounds_of_fellows())

    def _rounds_of_fellows(self) -> list[int]:
        return [max(fellow.round, self._view.round_of(peer)) for peer, fellow in self._fellows.items()]

    def _order(self, work: Estimate | Replay | Evaluate) -> list[Output]:
        """One piece of work at a time; what it begins with is held until its answer."""
        self._working, self._using = True, work.ref
        self._exchange.hold(work.ref)
        return [work]

    def _answered(self) -> list[Output]:
        assert self._using is not None
        using, self._using, self._working = self._using, None, False
        return self._exchange.release(using)

    def _on_estimated(self, now: float, event: Estimated) -> list[Output]:
        if not self._is_answer(event.token):
            return []
        out = self._answered()
        if self._measuring != self.round + 1:  # overtaken while it measured
            return out + self._go_on(now)
        if self._last_spoken() >= self._measuring:
            return out + self._collect(now)  # others have brought back what it said before
        return out + self._speak(now, self._measuring, event.codes) + self._collect(now)

    def _speak(self, now: float, round_: int, codes: bytes) -> list[Output]:
        """Sign, keep, and pass on."""
        assert self._sealed is not None
        if self._is_guest or self._log.has_spoken(self._signatures.author, round_):
            return []  # what it said before it lost its disk has come back
        built_on = state_id(self._sealed)
        data = signed_bytes(self._signed_terms, round_, codes, built_on)
        record = ScalarRecord(self._signatures.author, round_, codes, built_on, self._signatures.sign(data))
        self._spoken = max(self._spoken, round_)
        if self._log.add(record) is not Outcome.NEW:
            return []
        self._counts["own"] += 1
        self._votes.hear(now, record)
        return [KeepScalars((record,)), *self._spread([record], None)]

    def _spread(self, records: Sequence[ScalarRecord], source: PeerId | None) -> list[Output]:
        if not self._flood.spread(records, source):
            return []
        self._flush_token = self._new_token()
        return [SetTimer(Timer("learning", "flush", self._flush_token), self._settings.batch_s)]

    def _is_answer(self, token: int) -> bool:
        return self._working and token == self._phase_token

    def _collect(self, now: float) -> list[Output]:
        """Whoever spoke since the last round began is awaited in this one, be it of an older round; after a round of silence,
        every neighbour."""
        self.phase = _COLLECTING
        since = min(self._last_round_began_at, now - self._settings.deadline_s)
        heard = self._votes.heard(since) if self._log.count(self.round, self.round) else []
        self._awaited = self._patience.awaited(heard)
        self._expected = len(self._awaited) if heard else 1 + len(self._view.live_learners())
        deadline = self._phase_timer("deadline", self._settings.deadline_s)
        return self._collected(now) or [deadline]

    def _collected(self, now: float) -> list[Output]:
        """On with all; with a quorum, after a little more of the time that it took: who comes then has no round replayed."""
        have = self._log.count(self.round + 1, self.round + 1)
        if have >= self._expected:
            return self._advance(now)
        if have < ceil(self._settings.quorum * self._expected) or self._timer_name == "grace":
            return []
        return [self._phase_timer("grace", GRACE * (now - self._round_began_at))]

    def _advance(self, now: float) -> list[Output]:
        came = {record.author for record in self._log.counting(self.round + 1)}
        self._patience.waited(self._awaited, came)
        self._set_round(self.round + 1)
        if self.round % self._settings.evaluate_every == 0 or self._finished():
            self._to_evaluate = self.round
        return self._go_on(now)

    def _replay(self, now: float) -> list[Output]:
        """Bring the head to the end of the rounds, from where it is, or anew from the last state that still holds."""
        assert self._head is not None
        assert self._sealed is not None
        start, at = self._head, self._head_round
        if self._stale or at > self.round:
            start, at = self._sealed.ref, self._sealed.round
            proposed = self._proposed
            if proposed is not None and at < proposed.round <= self.round and self._still_holds(proposed):
                start, at = proposed.ref, proposed.round
            self._counts["replays"] += 1
        self._stale = False
        self._target = self.round
        rounds = self._rounds(at, self.round)
        if not rounds:
            return self._take_head(start) + self._go_on(now)
        self.phase = _REPLAYING
        return self._order(Replay(self._new_phase(), start, rounds, self._log.chain(self.round), save=False))

    def _rounds(self, after: int, last: int) -> tuple[RoundScalars, ...]:
        return counting_rounds(self._settings, self._log, after, last)

    def _take_head(self, ref: ModelRef) -> list[Output]:
        assert self._head is not None
        self._exchange.hold(ref)
        before, self._head, self._head_round = self._head, ref, self._target
        return self._exchange.release(before)

    def _on_replayed(self, now: float, event: Replayed) -> list[Output]:
        if not self._is_answer(event.token):
            return []
        self._exchange.hold(event.ref)
        out = self._answered()
        if self._proposing is not None:
            out += self._proposed_now(now, event.ref)
        else:
            out += self._take_head(event.ref)
        return out + self._exchange.release(event.ref) + self._go_on(now)

    def _on_evaluated(self, now: float, event: Evaluated) -> list[Output]:
        if not self._is_answer(event.token):
            return []
        self._to_evaluate = 0
        return self._answered() + self._end_round(now, event.metrics) + self._go_on(now)

    def _end_round(self, now: float, metrics: Mapping[str, float]) -> list[Output]:
        if self._ended >= self.round:
            return []
        self._ended = self.round
        records = self._log.counting(self.round) if self.round > self._log.cut else ()
        lateness, self._lateness = self._lateness, 0
        return [
            Emit(
                RoundDone(
                    round=self.round,
                    num_merged=len(records),
                    staleness_max=lateness,
                    metrics=metrics,
                    duration_s=now - self._round_began_at,
                    report={"scalars": float(sum(len(record.codes) for record in records))},
                )
            )
        ]

    def _on_failed(self, now: float, event: WorkFailed) -> list[Output]:
        if not self._is_answer(event.token):
            return []
        out = self._answered()
        what = {_ESTIMATING: "estimating", _REPLAYING: "replaying"}.get(self.phase, "evaluating")
        out.append(Emit(Trouble(what=what, detail=event.detail)))
        if self.phase is _EVALUATING:
            self._to_evaluate = 0
            return [*out, *self._go_on(now)]
        if self.phase is _REPLAYING:
            # Whatever the worker holds now is no state of ours: from the last checkpoint again.
            self._proposing, self._stale = None, True
        self.phase = _PAUSING
        return [*out, self._phase_timer("pause", max(self._settings.pause_s, _RETRY_S))]

    def _finished(self) -> bool:
        return 0 < self._settings.rounds <= self.round

    # --- the end ----------------------------------------------------------------------------------------
    def _is_settled(self, now: float) -> bool:
        """Whether the last rounds are sealed, and most say so; or that took too long."""
        if self._done:
            return True
        if self._settled_at is None:
            return False
        late = now - self._settled_at > MAX_SETTLING * self._settings.deadline_s
        return late or self._most_have_closed()

    def _settle(self, now: float) -> list[Output]:
        """The own rounds are over. The last ones are sealed with the others before the result is measured."""
        if self._settled_at is None:
            self._settled_at = now
            self._num_last = self._log.count(self.round, self.round) if self.round > self._log.cut else 0
        out = self._close(now)
        if self._is_settled(now):
            return out + self._go_on(now)
        self.phase = _SETTLING
        return [*out, self._phase_timer("settle", self._settings.deadline_s)]

    def _stop_learning(self) -> list[Output]:
        self.phase = _DONE
        if self._done:
            return []
        self._done = True
        self._view.active = False
        return [Emit(LearningDone(round=self.round)), *self._view.heartbeat()]

    def _close(self, now: float) -> list[Output]:
        """After the last round, say with a record without scalars on what this node stands; where nothing gets settled,
        after a while on what it stands so far, so that those who have parted can count each other."""
        assert self._sealed is not None
        assert self._settled_at is not None
        last, me = self._settings.rounds, self._signatures.author
        said, is_last = self._votes.said(me), self._sealed.round >= last
        if said is not None and said[1] == state_id(self._sealed) and (said[0] > last or not is_last):
            return []
        if not is_last and now - self._settled_at < self._patience_s:
            return []
        round_ = max(last, self._last_spoken()) + 1
        return self._speak(now, round_, b"") if round_ <= last + MAX_AHEAD else []

    def _most_have_closed(self) -> bool:
        """Most of those that spoke in the last round stand on the same state."""
        assert self._sealed is not None
        if self._sealed.round < self._settings.rounds:
            return False
        return 2 * self._votes.num_on(state_id(self._sealed)) > self._num_last

    @property
    def _patience_s(self) -> float:
        return PATIENCE * self._settings.repair_s

    # --- checkpoints ------------------------------------------------------------------------------------
    def _due(self, now: float) -> int | None:
        """The round whose state is to be proposed now, if there is one."""
        assert self._sealed is not None
        settings = self._settings
        if self._adopting is not None:
            return None  # what comes replaces it
        round_ = self._next_checkpoint()
        if round_ is None:
            return None
        if self._asked_for > self._sealed.round:
            round_ = self._asked_for
        elif self._finished():
            # The last records have had time to come.
            if round_ + settings.late_rounds > self.round and not self._waited_in_settling(now):
                return None
        elif round_ + settings.late_rounds > self.round:
            return None
        if not self._fellows and not self._is_long_open() and not self._finished():
            return None  # alone: whoever comes may bring records of these rounds
        if (
            self._proposed is not None
            and self._proposed.round == round_
            and self._still_holds(self._proposed)
        ):
            return None
        return round_

    def _next_checkpoint(self) -> int | None:
        """The first one that has a record before it, or the last of all."""
        assert self._sealed is not None
        every, rounds = self._settings.checkpoint_every, self._settings.rounds
        sealed = self._sealed.round
        present = self._log.rounds(sealed + 1, self.round)
        round_ = sealed + every * ceil((present[0] - sealed) / every) if present else rounds
        if rounds:
            round_ = min(round_, rounds)
        return round_ if round_ > sealed else None

    def _waited_in_settling(self, now: float) -> bool:
        return self._settled_at is not None and now - self._settled_at >= self._settings.deadline_s

    def _is_long_open(self) -> bool:
        return self.round - self._log.sealed > MAX_OPEN * self._settings.checkpoint_every

    def _still_holds(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.round >= self._log.sealed and self._log.chain(checkpoint.round) == checkpoint.log

    def _propose(self, now: float, round_: int) -> list[Output]:
        """Replay the rounds of a checkpoint in order, from the one before, and save the state."""
        assert self._sealed is not None
        if self.round < round_:  # others have sealed what this node has the records of, and not got to yet
            self._set_round(round_)
        log, count = self._log.chain(round_), self._log.num_counted(round_)
        rounds = self._rounds(self._sealed.round, round_)
        self._proposing = Checkpoint(round_, log, count, self._sealed.ref)
        if not rounds:
            return self._proposed_now(now, self._sealed.ref) + self._go_on(now)
        self.phase = _REPLAYING
        return self._order(Replay(self._new_phase(), self._sealed.ref, rounds, log, save=True))

    def _proposed_now(self, now: float, ref: ModelRef) -> list[Output]:
        assert self._proposing is not None
        ref = ModelRef(ref.digest, ref.size_bytes, self._proposing.round, 1)
        proposed, self._proposing = msgspec.structs.replace(self._proposing, ref=ref), None
        # The worker is at this state now, and not at the head any more.
        ahead, self._stale = self._head_round > proposed.round, True
        if proposed.round <= self._log.sealed or not self._still_holds(proposed):
            return []  # the log went on meanwhile
        self._exchange.hold(ref)
        out = self._exchange.release(self._proposed.ref) if self._proposed is not None else []
        self._proposed, self._proposed_at = proposed, now
        if not ahead:
            self._stale, self._target = False, proposed.round
            out += self._take_head(ref)
        out += self._mark(self._fellows)
        return out + self._consider(now)

    def _consider(self, now: float) -> list[Output]:
        """Compare with what the others have settled: seal, catch up, or take over their state."""
        if self._sealed is None:
            return []
        out: list[Output] = []
        marks, proposed = self._flood.marks(), self._proposed
        if proposed is not None and self._still_holds(proposed) and self._is_agreed(now, proposed, marks):
            out += self._seal(proposed)
        last_round = self._settings.rounds if self._finished() else None
        if self._adopting is not None and self._exchange.is_coming(self._adopting.ref):
            # A line may be slower than checkpoints come: what is on its way is better than nothing.
            return out
        self._adopting = None
        found = self._votes.better(now, self._sealed, marks, last_round, self._remembers)
        if found is None:
            self._apart_since, self._asked_for = None, 0
            return out
        theirs, is_majority = found
        sealed = self._sealed
        if theirs.round > sealed.round and self._log.chain(theirs.round) == theirs.log:
            # The same log: the state follows from it, and nothing has to be fetched.
            self._apart_since, self._asked_for = None, theirs.round
            return out
        if self._apart_since is None:
            self._apart_since = now
        holders = [peer for peer, each in marks.items() if each.sealed == theirs]
        repairable = theirs.round > sealed.round and any(marks[p].cut <= sealed.round for p in holders)
        if (repairable or not is_majority) and now - self._apart_since < self._patience_s:
            return out
        fetch = self._exchange.want(holders[self._repairs % len(holders)], theirs.ref)
        self._adopting = theirs if fetch else None
        return out + fetch

    def _is_agreed(self, now: float, proposed: Checkpoint, marks: Mapping[PeerId, Marks]) -> bool:
        if self._is_long_open():
            return True
        if not self._fellows:
            return self._finished()
        patient = now - self._proposed_at < self._patience_s
        return agreed(proposed, marks, len(self._fellows), patient)

    def _seal(self, checkpoint: Checkpoint) -> list[Output]:
        assert self._sealed is not None
        before, self._sealed = self._sealed, checkpoint
        self._proposed = None  # its hold is the sealed one's now
        self._sealed_before.append(before)
        out: list[Output] = []
        while len(self._sealed_before) > NUM_SERVED:
            out += self._exchange.release(self._sealed_before.pop(0).ref)
        self._log.seal(checkpoint.round)
        self._remembers = True
        # Whoever seals later, or has fetched an older state, still lacks records of the rounds that are sealed here.
        cut = self._sealed_before[0].round
        self._log.drop(cut)
        self._votes.remember(checkpoint)
        self._counts["sealed"] += 1
        return out + self._keep(checkpoint, cut) + self._mark(self._fellows)

    def _keep(self, checkpoint: Checkpoint, cut: int) -> list[Output]:
        """The base model is nobody's to keep: where nothing was recorded yet, it is the checkpoint."""
        keep: list[Output] = [] if checkpoint.ref.digest == self._base else [Keep(checkpoint.ref)]
        return [*keep, KeepScalars((), checkpoint, cut)]

    def _on_arrived(self, now: float, event: ModelArrived) -> list[Output]:
        """The state that most neighbours have sealed: what this node held of those rounds does not count."""
        theirs = self._adopting
        if theirs is None or theirs.ref.digest != event.ref.digest or self._sealed is None:
            return self._exchange.release(event.ref)
        self._adopting, self._apart_since = None, None
        self._asked_for = 0
        before, self._sealed = [*self._sealed_before, self._sealed], theirs
        self._sealed_before, self._remembers = [], True
        out = [effect for each in before for effect in self._exchange.release(each.ref)]
        if self._proposed is not None:
            out += self._exchange.release(self._proposed.ref)
            self._proposed = None
        self._log.adopt(theirs)
        self._votes.remember(theirs, anew=True)
        self._counts["adopted"] += 1
        self._stale = True
        if self.round < theirs.round:
            self._set_round(theirs.round)
        out += self._keep(theirs, theirs.round) + self._mark(self._fellows)
        if event.peer in self._fellows:
            out += self._compare(event.peer)
        if self.phase is _SYNCING:  # the records after it are on their way
            return [*out, self._phase_timer("sync", self._settings.sync_s)]
        return out if self._working or self.phase is not _DONE else out + self._go_on(now)

    def _on_marks(self, now: float, event: Received) -> list[Output]:
        marks, fellow = event.message, self._fellows.get(event.peer)
        assert isinstance(marks, Marks)
        if fellow is None:
            return []
        if any(
            not self._is_possible(each, marks) for each in (marks.sealed, marks.proposed) if each is not None
        ):
            return self._flood.strike(event.peer, Reason.MALFORMED, "marks that no log leads to")
        first = fellow.marks is None
        fellow.marks, fellow.round = marks, marks.round
        out = self._consider(now)
        if first:
            out += self._compare(event.peer)
        if self.phase is _SYNCING and self._timer_name == "company" and self._is_company():
            out += self._in_company(now)
        return out

    def _is_possible(self, checkpoint: Checkpoint, marks: Marks) -> bool:
        every, rounds = self._settings.checkpoint_every, self._settings.rounds
        round_ = checkpoint.round
        in_step = round_ % every == 0 or round_ == rounds
        bounded = round_ <= marks.round and (not rounds or round_ <= rounds)
        return in_step and bounded and checkpoint.ref.round == round_

    def _is_company(self) -> bool:
        return len(self._fellows) >= self._settings.wait_for_peers

    # --- records ----------------------------------------------------------------------------------------
    def _on_scalars(self, now: float, event: Received) -> list[Output]:
        message, peer = event.message, event.peer
        assert isinstance(message, Scalars)
        fellow = self._fellows.get(peer)
        if fellow is None:
            return []
        fellow.round = max(fellow.round, message.round)
        horizon = self.round + MAX_AHEAD
        if any(record.round > horizon for record in message.records):
            horizon = self._where(now) + MAX_AHEAD
        out, taken = self._flood.take(now, peer, message.records, horizon)
        if not taken:
            return out
        for record in taken:
            if record.round <= max(self._head_round, self._target):
                self._stale = True
                self._lateness = max(self._lateness, self.round - record.round)
        out += [KeepScalars(tuple(taken)), *self._spread(taken, peer)]
        return out + self._collected(now) if self.phase is _COLLECTING else out

    def _repair(self, now: float) -> list[Output]:
        """Compare with one neighbour, each in its turn."""
        self._repairs += 1
        out: list[Output] = [self._repair_timer()]
        if self._fellows:
            peers = list(self._fellows)
            peer = peers[self._repairs % len(peers)]
            out += self._compare(peer)
            if self._repairs % MARKS_EVERY == 0:
                out += self._mark([peers[self._repairs // MARKS_EVERY % len(peers)]])
            out += self._consider(now)
        if self.phase is _DONE:
            out += self._close(now)
            if self._stale:
                out += self._go_on(now)
        return out

    def _compare(self, peer: PeerId) -> list[Output]:
        """Rounds that are still under way differ for a moment, and say nothing."""
        last = self.round if self.phase is _SYNCING else self.round - 1
        last = max(last, min(self._fellows[peer].round, self.round + MAX_AHEAD) - 1)
        if self._finished():
            last = self._settings.rounds + MAX_AHEAD
        return self._flood.compare(peer, last)

    def _on_ranges(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Ranges)
        if event.peer not in self._fellows:
            return []
        out, is_cut = self._flood.answer_ranges(now, event.peer, event.message.ranges)
        return out + self._mark([event.peer]) if is_cut else out

    def _on_holding(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Holding)
        known = event.peer in self._fellows
        return self._flood.answer_holding(now, event.peer, self.round, event.message) if known else []

    def _on_pull(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Pull)
        known = event.peer in self._fellows
        return self._flood.answer_pull(now, event.peer, self.round, event.message) if known else []

    # --- timers and tokens ------------------------------------------------------------------------------
    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        timer = event.timer
        if timer.owner != "learning" or self._head is None:
            return []
        if timer.token == self._flush_token:
            return self._flood.flush(self.round)
        if timer.token == self._repair_token:
            return self._repair(now)
        if timer.token != self._phase_token or self._working:
            return []
        match timer.name:
            case "company":
                return self._in_company(now)
            case "sync":
                return self._synced(now)
            case "deadline" | "grace":
                return self._advance(now)
            case "settle":
                return self._go_on(now)
            case _:
                return self._begin(now) if not self._stale else self._go_on(now)

    def _new_token(self) -> int:
        self._token += 1
        return self._token

    def _new_phase(self) -> int:
        """One order or one timer of the round is awaited at a time; an older answer is stale."""
        self._phase_token = self._new_token()
        return self._phase_token

    def _phase_timer(self, name: str, after_s: float) -> Output:
        self._timer_name = name
        return SetTimer(Timer("learning", name, self._new_phase()), after_s)

    def _repair_timer(self) -> Output:
        self._repair_token = self._new_token()
        return SetTimer(Timer("learning", "repair", self._repair_token), self._settings.repair_s)

    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        Started: _on_started,
        PeerUp: _on_peer_up,
        PeerDown: _on_peer_down,
        ModelArrived: _on_arrived,
        Estimated: _on_estimated,
        Replayed: _on_replayed,
        Evaluated: _on_evaluated,
        WorkFailed: _on_failed,
        TimerFired: _on_timer,
        Terms: _on_terms,
        Scalars: _on_scalars,
        Marks: _on_marks,
        Ranges: _on_ranges,
        Holding: _on_holding,
        Pull: _on_pull,
    }


_RETRY_S = 5.0
