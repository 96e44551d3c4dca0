"""Decentralised sampling: in each round a few nodes train and a few of the others' models are averaged, with no server.

Every node works out from the population, the round and a beacon who trains and who aggregates; whoever does not answer
is passed over. Sources: MoDeST and Plexus (arXiv 2302.13837). What is our own: several peers are asked at once and
taken in order, the order depends on a beacon that nobody can foresee, records are signed by their owners, aggregators
are compared where there are three or more, a round number that leaps is not believed, and a network whose whole sample
vanished goes on by itself (docs/decisions/0021).

    aggregate k --> its participants train round k --> aggregators of k + 1 --> aggregate k + 1 --> ...
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from protocols.asking import Asking
from protocols.events import (
    Aggregate,
    Aggregated,
    Emit,
    Evaluate,
    Evaluated,
    FetchGaveUp,
    Input,
    Keep,
    LearningDone,
    ModelArrived,
    PeerUp,
    Penalise,
    Phase,
    Reached,
    Received,
    RecordHeard,
    RoundDone,
    Send,
    Started,
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Trouble,
    Unreachable,
    WorkFailed,
)
from protocols.exchange import Exchange
from protocols.machine import Handler, Machine, Output
from protocols.messages import (
    AggregatedModel,
    Census,
    Closed,
    Heartbeat,
    Offer,
    Pong,
    Receipt,
    TrainedModel,
)
from protocols.population import ORDERS, Population
from protocols.spreading import Spreading
from protocols.timers import Timers
from protocols.view import View
from protocols.vocabulary import (
    DIGEST_BYTES,
    MAX_SAMPLE,
    ModelRef,
    PeerId,
    PeerRecord,
    Reason,
)

Share = Annotated[float, Meta(gt=0, le=1)]


class SampledSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How rounds of decentralised sampling run. Times in seconds. Fields marked * are the same on all nodes."""

    rounds: Annotated[int, Meta(ge=0)] = 0
    """Rounds after which all take the last aggregate and only serve; 0 means for ever. *"""
    sample_size: Annotated[int, Meta(ge=1, le=MAX_SAMPLE)] = 10
    """Nodes that train in each round (s). More make a round's model better and cost as much more traffic. *"""
    aggregators: Annotated[int, Meta(ge=1, le=16)] = 1
    """Nodes that average what the others of a round have trained (a). With 1 there is one model a round; 3 or more are compared
    with each other, so that one that lies is found out, at so many times the traffic. *"""
    success_fraction: Share = 0.8
    """Share of the sample whose models an aggregator waits for (sf); the slowest others are not waited for. *"""
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait for a sample's models, and for word that a round went on. Choose a few times a slow device's training."""
    at_least: Annotated[int, Meta(ge=1, le=1024)] = 3
    """Models that an aggregator goes on with at the deadline; with fewer it waits once more."""
    ping_s: Annotated[float, Meta(gt=0, le=600)] = 3.0
    """Within this a peer has to be dialled and has to answer, or the next in order takes its place."""
    window: Annotated[int, Meta(ge=2, le=100_000)] = 100
    """Rounds without a sign of life after which a node is not drawn any more; also how far a round number may leap. Each
    node gives one every half window. *"""
    order: Literal["beacon", "md5"] = "beacon"
    """`beacon` mixes an earlier aggregate into the order, so that nobody can choose a key that is drawn. `md5` is the papers'. *"""
    pause_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Least time between two aggregates: what keeps a tiny model from spinning."""
    stall_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Without a new round for so long the nodes with the latest model begin one; 0 means twice the longest of late, between
    half of `deadline_s` and the whole of it."""
    evaluate_every: Annotated[int, Meta(ge=1)] = 1
    """Rounds; an aggregator evaluates the model it has made."""
    keep_every: Annotated[int, Meta(ge=1)] = 1
    """Rounds between two checkpoints of a node that takes part."""
    follow_every: Annotated[int, Meta(ge=0)] = 0
    """A node that was not drawn for so many rounds fetches a newer model from a neighbour all the same; 0 means only when it
    links up, and at the end."""
    wait_for_members: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """Nodes to know before the very first round; 0 means a whole sample."""
    wait_at_most_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """The first round begins after this long in any case."""
    max_members: Annotated[int, Meta(ge=8, le=100_000)] = 4096
    """Nodes that a population holds: all nodes of the network have to be known to each."""
    fanout: Annotated[int, Meta(ge=1, le=64)] = 3
    """Neighbours that are told what is new of others. The rest is repaired when neighbours compare what they know."""


class _Trainer:
    """This node's part in a round as a participant."""

    def __init__(self, round_: int, beacon: bytes, heard: bytes, sample: tuple[str, ...]) -> None:
        self.round = round_
        self.beacon = beacon
        self.heard = heard
        """The smallest digest among the aggregates that began this round."""
        self.sample = sample
        self.token = 0
        self.trained: ModelRef | None = None
        self.drawing = False
        self.aggregators: dict[PeerId, bool] = {}
        """Of the next round, while they are linked: whether they were told."""
        self.served: set[PeerId] = set()
        """Of those, the ones that have the model, or do not want it any more."""
        self.lacking = False
        """One of them went before it was told."""
        self.tried: set[PeerId] = set()
        self.attempts = 0


class _Collect:
    """A round's models on their way together, at one of its aggregators."""

    def __init__(self, round_: int, now: float, beacon: bytes) -> None:
        self.round = round_
        self.began_at = now
        self.beacon = beacon
        self.heard: dict[PeerId, bytes] = {}
        self.models: dict[PeerId, ModelRef] = {}
        self.coming: dict[PeerId, ModelRef] = {}
        self.expected: set[PeerId] = set()
        """Who trained, by the word of those who came."""
        self.gone: set[PeerId] = set()
        self.token = 0
        self.overdue = False
        self.participants: list[PeerId] | None = None
        """Of the round that begins, linked and waiting, once they are drawn."""
        self.result: ModelRef | None = None
        self.dropped = False
        self.closed = False
        self.pause_s = 0.0
        """Between its beginning and the next round's."""


class _Claim:
    """What an aggregator says a round begins with."""

    def __init__(self, peer: PeerId, message: AggregatedModel) -> None:
        self.peer = peer
        self.message = message


def _of_learners(handler: Handler) -> Handler:
    """For messages: what comes from a peer that has not been let in, or that does not learn, means nothing."""

    def heeded(sampling: "Sampling", now: float, event: Received) -> list[Output]:
        return handler(sampling, now, event) if sampling._view.learns(event.peer) else []

    return heeded


class Sampling(Machine):
    """The rounds of one node."""

    def __init__(self, settings: SampledSettings, view: View, exchange: Exchange) -> None:
        self._settings = settings
        self._view = view
        self._exchange = exchange
        exchange.heeds_offers = False
        self.population = Population(view.me, settings.max_members, settings.window, ORDERS[settings.order])
        self._own: ModelRef | None = None
        self._timers = Timers("learning", "sampling")
        self._asking = Asking(view, self.population, self._timers, settings.ping_s)
        self._spreading = Spreading(view, self.population, self._timers, settings.fanout)
        self._trainer: _Trainer | None = None
        self._serving: list[_Trainer] = []
        """Earlier ones, whose model an aggregator may still be fetching."""
        self._trained_round = 0
        self._claims: dict[PeerId, _Claim] = {}
        """The last of each aggregator, of rounds that have not begun here."""
        self._taking: dict[bytes, list[_Claim]] = {}
        """Those whose models are being fetched, by digest. Of several rounds at once, for any of them may be invented."""
        self._collects: dict[int, _Collect] = {}
        self._closed_round = 0
        self._handing_out: dict[bytes, ModelRef] = {}
        """Aggregates that are held for others to fetch, by their digests."""
        self._waiting_for: dict[PeerId, bytes] = {}
        """Participants that have not said yet that they have the model."""
        self._reading: dict[int, list[ModelRef]] = {}
        """The models that a piece of work reads, by its token."""
        self._closing: dict[bytes, tuple[int, list[PeerId]]] = {}
        """Who trained for an aggregate that nobody else has yet, by its digest, and its round."""
        self._evaluating: tuple[int, ModelRef, int, float] | None = None
        self._evaluate_token = 0
        self._following: ModelRef | None = None
        self._offers: dict[PeerId, ModelRef] = {}
        """What neighbours have that this node wants, and has not asked for."""
        self._gathering = False
        self._watched_at = 0.0
        self._progress_at = 0.0
        self._longest_s = settings.deadline_s
        """Between two rounds, of late."""
        self._settle_token = 0
        self._began = False
        self.round = 0
        """The highest round that this node believes to be under way: the papers' round estimate."""
        self.phase = Phase.WAITING

    @property
    def own(self) -> ModelRef | None:
        """The latest aggregate that this node has, or its first model."""
        return self._own

    # --- beginning --------------------------------------------------------------------------------------
    def _on_started(self, now: float, event: Started) -> list[Output]:
        if event.ref is None or self._own is not None:
            return []
        self._own = event.ref
        self._exchange.hold(event.ref)
        self._trained_round = max(0, event.ref.round - 1)
        self._closed_round = event.ref.round
        self._progress_at = self._watched_at = now
        out = self._exchange.present(event.ref) if event.ref.round else []
        out += self._see_round(now, event.ref.round)
        for record in self._view.known_records():
            self.population.take(record)
        self.population.take(self._view.record)
        if self._is_over(event.ref.round):
            return [*out, *self._finish(now, event.ref)]
        out.append(self._timers.set(self._settings.ping_s, self._watch))
        if not event.ref.round:
            out.append(self._timers.set(self._settings.wait_at_most_s, self._begin))
        return out

    def _begin(self, now: float) -> list[Output]:
        """The very first round, which nobody began: whoever is in the sample of round 1 trains its first model."""
        if self._began or self.round > 1 or self._own is None or self.phase is Phase.DONE:
            return []
        self._began = True
        sample = self.population.order(1, _NO_BEACON)[: self._settings.sample_size]
        if self._view.me not in sample:
            return []
        first = replace(self._own, round=1)
        return self._train(now, first, _NO_BEACON, first.digest, tuple(sample))

    def _begin_when_settled(self, now: float) -> list[Output]:
        """Enough are known, and for a while nobody was added."""
        wanted = self._settings.wait_for_members or self._settings.sample_size
        if self._began or self.round > 1 or len(self.population) < wanted:
            return []
        self._settle_token += 1
        current = self._settle_token

        def settled(then: float) -> list[Output]:
            return self._begin(then) if current == self._settle_token else []

        return [self._timers.set(_SETTLE_S, settled)]

    def _on_stop(self, now: float, event: StopRequested) -> list[Output]:
        return [Keep(self._own)] if self._own is not None else []

    # --- the round estimate -----------------------------------------------------------------------------
    def _on_heartbeat(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Heartbeat)
        if self.phase is Phase.DONE and self._own is not None and event.message.active:
            return [Send(event.peer, Offer(self._own))]  # the first one may have been lost
        return self._see_round(now, self._front())

    def _front(self) -> int:
        """The latest round that several neighbours are in, or half of them where there are few: no liar alone moves it.

        Where only half of a few say so, a node that has been in rounds goes there a window at a time: they may be the ones who
        are right, when a network of three has parted, but what one of two says in one beat must not count for ever.
        """
        rounds = sorted(map(self._view.round_of, self._view.learners()), reverse=True)
        if not rounds:
            return 0
        some = rounds[min(_WITNESSES, max(1, len(rounds) // 2)) - 1]
        most = rounds[min(_WITNESSES, len(rounds)) - 1]
        is_new_here = self._own is not None and not self._own.round
        front = some if is_new_here else max(min(some, self.round + self._settings.window), most)
        return min(front, self._settings.rounds + 1 if self._settings.rounds else self.round + _MAX_LEAP)

    def _is_plausible(self, round_: int) -> bool:
        """Within a window of where the neighbours are."""
        if 0 < self._settings.rounds < round_ - 1:
            return False
        return round_ <= max(self.round, self._front()) + self._settings.window

    def _see_round(self, now: float, round_: int) -> list[Output]:
        """A later round is said to be under way. Any neighbour can say so: no work is thrown away for it that goes on well."""
        if round_ <= self.round:
            return []
        if self.round:
            self._longest_s = max(_FORGETS * self._longest_s, now - self._progress_at)
        leapt = round_ > self.round + self._settings.window
        self.round, self._progress_at = round_, now
        self._view.round = round_
        out: list[Output] = []
        if leapt:  # what was signed in rounds that were not believed then
            for record in self._view.known_records():
                out += self._heard(now, record)
        # A sign of life before others take this node for gone. A record of round 0 is as good as new in the first window.
        if round_ - self._view.record.round >= self._settings.window // 2:
            out += self._heard(now, self._view.refresh())
        return out

    # --- the population ---------------------------------------------------------------------------------
    def _on_record(self, now: float, event: RecordHeard) -> list[Output]:
        """The view has checked the signature."""
        return self._heard(now, event.record)

    def _heard(self, now: float, record: PeerRecord) -> list[Output]:
        if record.round > self.round + self._settings.window and not self._is_plausible(record.round):
            return []  # it would count as active for as long as it likes
        if not self.population.take(record, hold=not self._is_idle()):
            return []
        return self._begin_when_settled(now) + self._spreading.tell(now, record)

    def _is_idle(self) -> bool:
        """Whether no sample is drawn that a newcomer would change under its feet."""
        return not self._asking.calls and not self._collects

    def _on_peer_up(self, now: float, event: PeerUp) -> list[Output]:
        return self._spreading.greet(event.peer) + self._begin_when_settled(now)

    def _on_census(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Census)
        return self._spreading.on_census(now, event.peer, event.message)

    # --- who is there -----------------------------------------------------------------------------------
    def _on_reached(self, now: float, event: Reached) -> list[Output]:
        return self._asking.reached(event.peer)

    def _on_pong(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Pong)
        return self._asking.answered(now, event.peer, event.message.token)

    def _on_unreachable(self, now: float, event: Unreachable) -> list[Output]:
        peer = event.peer
        out = self._asking.unreachable(now, peer)
        if self._waiting_for.pop(peer, None) is not None:
            self._view.let_go(now, peer)
        trainer = self._trainer
        if trainer is not None and peer in trainer.aggregators:
            # Its link has ended, which need not mean more than that its other end makes room: it is asked once again.
            if trainer.aggregators[peer]:
                trainer.aggregators[peer] = False
                out += self._check_aggregator(now, trainer, peer)
            else:
                self._miss_aggregator(now, trainer, peer)
                out += self._deliver(now, trainer)
        for each in [each for each in self._serving if peer in each.aggregators]:
            out += self._stop_serving(now, each, peer)
        return out

    # --- training ---------------------------------------------------------------------------------------
    def _on_aggregated_model(self, now: float, event: Received) -> list[Output]:
        """TRAIN: an aggregator says that this node is in a round's sample, and what the round begins with."""
        assert isinstance(event.message, AggregatedModel)
        peer, message = event.peer, event.message
        round_, digest = message.ref.round, message.ref.digest
        if self._own is None or self.phase is Phase.DONE:
            return [Send(peer, Receipt(round_, digest))]
        if not self._is_plausible(round_):
            return self._disbelieve(peer, round_)
        trainer = self._trainer
        if round_ <= self._trained_round or round_ < self._own.round or self._is_over(round_):
            # Aggregators that are compared have been, and one that comes late has no say.
            if trainer is not None and trainer.round == round_ and self._settings.aggregators < _COMPARED:
                trainer.heard = min(trainer.heard, digest)
                trainer.beacon = min(trainer.beacon, message.beacon)
            return [Send(peer, Receipt(round_, digest))]
        self._claims[peer] = _Claim(peer, message)
        while len(self._claims) > 2 * self._settings.aggregators + _SPARE_CLAIMS:
            # A number far ahead displaces none that is near.
            del self._claims[max(self._claims, key=lambda each: self._claims[each].message.ref.round)]
        return self._choose_claim(now, round_, in_time=True)

    def _choose_claim(self, now: float, round_: int, in_time: bool) -> list[Output]:
        """Three or more aggregators have to agree on the bytes, by more than half of them; with fewer whichever model of the
        round is here first counts."""
        by_digest: dict[bytes, list[_Claim]] = {}
        for claim in self._claims.values():
            if claim.message.ref.round == round_:
                by_digest.setdefault(claim.message.ref.digest, []).append(claim)
        if not by_digest or self._settings.aggregators < _COMPARED:
            return [each for claims in by_digest.values() for each in self._take_claimed(now, claims)]
        if any(digest in self._taking for digest in by_digest):
            return []
        most = max(by_digest, key=lambda digest: (len(by_digest[digest]), bytes(255 - b for b in digest)))
        agreed = 2 * len(by_digest[most]) > self._settings.aggregators
        if in_time and not agreed:
            if sum(map(len, by_digest.values())) > 1:
                return []  # there is a timer already
            return [self._timers.set(self._settings.ping_s, self._choose_claim, round_, False)]
        if self._settings.aggregators >= _COMPARED and not agreed and round_ > self.round + 1:
            return self._drop_claims(round_)  # a lone aggregator leads nobody further than neighbours say
        liars = [claim for digest in by_digest if digest != most and agreed for claim in by_digest[digest]]
        out: list[Output] = [Penalise(each.peer, Reason.DISAGREES, f"round {round_}") for each in liars]
        return out + self._take_claimed(now, by_digest[most])

    def _take_claimed(self, now: float, claims: list[_Claim]) -> list[Output]:
        """A model that these have."""
        ref = claims[0].message.ref
        if ref.digest in self._taking:
            return []
        if self._own is not None and self._own.digest == ref.digest:
            return self._start_round(now, ref.digest)
        self._taking[ref.digest] = claims
        return self._exchange.take(claims[0].peer, ref, tuple(claim.peer for claim in claims[1:]))

    def _start_round(self, now: float, digest: bytes) -> list[Output]:
        """The claimed model is here."""
        refs = [each.message.ref for each in self._claims.values() if each.message.ref.digest == digest]
        if not refs:
            return []
        ref = max(refs, key=lambda each: each.round)
        claims = [each.message for each in self._claims.values() if each.message.ref.round == ref.round]
        same = [message for message in claims if message.ref.digest == digest]
        beacon = _agreed(message.beacon for message in same)
        heard = _agreed(message.ref.digest for message in claims)
        return self._train(now, ref, beacon, heard, same[0].sample)

    def _train(
        self, now: float, ref: ModelRef, beacon: bytes, heard: bytes, sample: tuple[str, ...]
    ) -> list[Output]:
        """Local steps from a round's model; an earlier round's, if still under way, come to nothing."""
        out = self._end_training(now) + self._adopt(ref) + self._drop_claims(ref.round)
        self._trained_round = ref.round
        out += self._see_round(now, ref.round)
        trainer = self._trainer = _Trainer(ref.round, beacon, heard, sample)
        trainer.token = self._timers.new_token()
        self.phase = Phase.TRAINING
        # Its aggregators are looked for while it trains.
        train = self._work(Train(trainer.token, ref, ref.round), [ref])
        return [*out, train, *self._find_aggregators(now, trainer)]

    def _adopt(self, ref: ModelRef) -> list[Output]:
        """An aggregate becomes the node's model, and is offered to whoever links up."""
        assert self._own is not None
        if ref.digest == self._own.digest:
            self._own = ref
            return []
        self._exchange.hold(ref)
        out = self._exchange.release(self._own) + self._drop_claims(ref.round - 1)
        self._own = ref
        out += self._exchange.present(ref)
        return [*out, Keep(ref)] if ref.round % self._settings.keep_every == 0 else out

    def _drop_claims(self, round_: int) -> list[Output]:
        """What is claimed of rounds up to this one comes too late."""
        late = [each for each in self._claims.values() if each.message.ref.round <= round_]
        for claim in late:
            del self._claims[claim.peer]
            self._taking.pop(claim.message.ref.digest, None)
        return [each for claim in late for each in self._receipt(claim.peer, claim.message.ref)]

    def _receipt(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """It need not wait for this node any longer."""
        return [Send(peer, Receipt(ref.round, ref.digest))] if self._view.is_live(peer) else []

    def _on_trained(self, now: float, event: Trained) -> list[Output]:
        trainer = self._trainer
        if trainer is None or event.token != trainer.token or trainer.trained is not None:
            return self._discard(event.ref) + self._worked(event.token)
        trainer.trained = replace(event.ref, round=trainer.round + 1)
        self._exchange.hold(trainer.trained)
        self.phase = Phase.COLLECTING
        record = RoundDone(
            round=trainer.round, num_merged=0, staleness_max=0, metrics={}, duration_s=now - self._progress_at
        )
        deadline = self._timers.set(self._settings.deadline_s, self._overdue, trainer)
        return [Emit(record), deadline, *self._worked(event.token), *self._deliver(now, trainer)]

    def _find_aggregators(self, now: float, trainer: _Trainer) -> list[Output]:
        """Of the next round: the first in its order who are there and have not failed at it."""
        if trainer.drawing:
            return []
        trainer.attempts += 1
        if trainer.attempts > _MAX_ATTEMPTS:
            return self._end_training(now)
        trainer.drawing, trainer.lacking = True, False
        order = self.population.order(trainer.round + 1, trainer.beacon)
        order = [peer for peer in order if peer not in trainer.tried]

        def found(then: float, sample: list[PeerId]) -> list[Output]:
            trainer.drawing = False
            if trainer is not self._trainer:
                self._let_go_all(then, sample)
                return []
            for peer in sample:
                if peer in trainer.aggregators:
                    self._let_go(then, peer)
                trainer.aggregators.setdefault(peer, False)
            return self._deliver(then, trainer)

        told = sum(trainer.aggregators.values())
        return self._asking.draw(now, order, max(1, self._settings.aggregators - told), found)

    def _deliver(self, now: float, trainer: _Trainer) -> list[Output]:
        """Tell the aggregators of the trained model, once both are there."""
        if trainer.trained is None or trainer.drawing:
            return []
        for peer in [
            peer for peer, told in trainer.aggregators.items() if not told and peer != self._view.me
        ]:
            if not self._view.is_live(peer):  # it went while others were still asked
                self._miss_aggregator(now, trainer, peer)
        if trainer.lacking or not trainer.aggregators:
            return self._find_aggregators(now, trainer)
        message = TrainedModel(trainer.trained, trainer.beacon, trainer.heard, trainer.sample)
        out: list[Output] = []
        for peer in [peer for peer, told in trainer.aggregators.items() if not told]:
            trainer.aggregators[peer] = True
            trainer.tried.add(peer)
            if peer != self._view.me:
                out.append(Send(peer, message))
                out.append(self._timers.set(self._settings.ping_s, self._check_aggregator, trainer, peer))
        if self._view.me in trainer.aggregators:
            out += self._contribute(now, self._view.me, message)
        return out

    def _check_aggregator(self, now: float, trainer: _Trainer, peer: PeerId) -> list[Output]:
        """Whether the one who was told is still there, for as long as the round has not gone on."""

        def answered(then: float, alive: list[PeerId]) -> list[Output]:
            self._let_go_all(then, alive)
            if trainer is not self._trainer or peer not in trainer.aggregators:
                return []
            if not alive:
                self._miss_aggregator(then, trainer, peer)
                trainer.tried.add(peer)
                return self._deliver(then, trainer)
            if not trainer.aggregators[peer]:
                return self._deliver(then, trainer)
            return [self._timers.set(self._settings.ping_s, self._check_aggregator, trainer, peer)]

        current = trainer is self._trainer and peer in trainer.aggregators
        return self._asking.draw(now, [peer], 1, answered) if current else []

    def _miss_aggregator(self, now: float, trainer: _Trainer, peer: PeerId) -> None:
        del trainer.aggregators[peer]
        trainer.lacking = True
        self._let_go(now, peer)

    def _overdue(self, now: float, trainer: _Trainer) -> list[Output]:
        """Nobody said that the round went on, though its aggregators answer: others get the model too (Plexus)."""
        if trainer is not self._trainer:
            return []
        if self.round > trainer.round:
            return self._end_training(now)
        deadline = self._timers.set(self._settings.deadline_s, self._overdue, trainer)
        return [deadline, *self._find_aggregators(now, trainer)]

    def _on_closed(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Closed)
        peer, round_ = event.peer, event.message.round
        for each in [each for each in self._serving if each.round + 1 == round_ and peer in each.aggregators]:
            return self._stop_serving(now, each, peer)
        trainer = self._trainer
        if trainer is None or peer not in trainer.tried or round_ != trainer.round + 1:
            return []
        trainer.served.add(peer)
        return [*self._end_training(now), *self._see_round(now, round_)]

    def _end_training(self, now: float) -> list[Output]:
        """Let go of all that this node's part in a round has held."""
        trainer, self._trainer = self._trainer, None
        if trainer is None:
            return []
        self.phase = Phase.WAITING
        if trainer.trained is None:
            self._let_go_all(now, trainer.aggregators)
            return []
        for peer in [peer for peer in trainer.aggregators if peer == self._view.me or peer in trainer.served]:
            self._let_go(now, peer)
            del trainer.aggregators[peer]
        if not trainer.aggregators:
            return self._exchange.release(trainer.trained)
        self._serving.append(trainer)
        return [self._timers.set(self._settings.deadline_s, self._stop_serving, trainer)]

    def _serve(self, now: float, peer: PeerId, digest: bytes) -> list[Output]:
        """An aggregator has a trained model."""
        current = self._trainer
        if current is not None and current.trained is not None and current.trained.digest == digest:
            current.served.add(peer)
        for trainer in self._serving:
            if (
                trainer.trained is not None
                and trainer.trained.digest == digest
                and peer in trainer.aggregators
            ):
                return self._stop_serving(now, trainer, peer)
        return []

    def _stop_serving(self, now: float, trainer: _Trainer, *peers: PeerId) -> list[Output]:
        """These aggregators, or all, are not waited for any more."""
        if trainer not in self._serving:
            return []
        for peer in peers or list(trainer.aggregators):
            self._let_go(now, peer)
            del trainer.aggregators[peer]
        if trainer.aggregators:
            return []
        self._serving.remove(trainer)
        assert trainer.trained is not None
        return self._exchange.release(trainer.trained)

    # --- aggregating ------------------------------------------------------------------------------------
    def _on_trained_model(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, TrainedModel)
        return self._contribute(now, event.peer, event.message)

    def _contribute(self, now: float, peer: PeerId, message: TrainedModel) -> list[Output]:
        """AGGREGATE: one of a round's models, at one of its aggregators."""
        round_ = message.ref.round
        if self._own is None or self.phase is Phase.DONE:
            return []
        if not self._is_plausible(round_):
            return self._disbelieve(peer, round_)
        aggregating = max((each.round for each in self._collects.values() if each.token), default=0)
        if round_ <= self._closed_round or round_ < max(aggregating, self._own.round):
            return [] if peer == self._view.me else [Send(peer, Closed(round_))]
        out: list[Output] = []
        collect = self._collects.get(round_)
        if collect is None:
            if len(self._collects) >= _KEPT_COLLECTS:
                least = min(self._collects.values(), key=self._worth)
                if self._worth(_Collect(round_, now, message.beacon)) <= self._worth(least):
                    return []
                out += self._drop_collect(now, least.round)
            collect = self._collects[round_] = _Collect(round_, now, message.beacon)
            collect.pause_s = self._settings.pause_s
            out += self._begin_collecting(now, collect)
        if peer in collect.models or collect.token or self._has_most(collect):
            return out
        if len(collect.expected) < 2 * self._settings.sample_size:
            named = (PeerId(each) for each in message.sample[: self._settings.sample_size])
            collect.expected.update(each for each in named if self.population.get(each) is not None)
        collect.heard[peer] = message.heard
        if peer == self._view.me:
            self._exchange.hold(message.ref)
            collect.models[peer] = message.ref
            return out + self._aggregate_if_enough(now, collect)
        collect.coming[peer] = message.ref
        return out + self._exchange.take(peer, message.ref)

    def _begin_collecting(self, now: float, collect: _Collect) -> list[Output]:
        """Who will train next is looked for while this round's models come in."""
        out = [
            self._timers.set(self._settings.deadline_s, self._go_on_with_few, collect),
            self._timers.set(self._settings.ping_s, self._check_participants, collect),
        ]
        if self._is_over(collect.round):
            collect.participants = []
            return out

        def found(then: float, sample: list[PeerId]) -> list[Output]:
            if collect.dropped:
                self._let_go_all(then, sample)
                return []
            collect.participants = sample
            if len(sample) < min(self._settings.sample_size, len(order)):
                # Others are out of reach, and may be the larger part: whoever has a whole sample is to be ahead of this one.
                collect.pause_s = max(collect.pause_s, self._settings.deadline_s)
                left_s = collect.pause_s - (then - collect.began_at)
                if left_s > 0 and collect.result is not None:
                    return [self._timers.set(left_s, self._hand_out_if_ready, collect)]
            return self._hand_out_if_ready(then, collect)

        order = self.population.order(collect.round, collect.beacon)
        return out + self._asking.draw(now, order, self._settings.sample_size, found)

    def _worth(self, collect: _Collect) -> tuple[int, int]:
        """Which of too many collections is kept: those of the rounds that are due, then the one with more models."""
        return -abs(collect.round - self.round - 1), len(collect.models)

    def _has_most(self, collect: _Collect) -> bool:
        return len(collect.models) + len(collect.coming) >= 2 * self._settings.sample_size

    def _needed(self, collect: _Collect) -> int:
        """Plexus: the whole part of the sample size and the success fraction, but at least one. Of those who trained the
        ones found gone are not waited for."""
        there = len(collect.expected - collect.gone - collect.models.keys()) + len(collect.models)
        size = self._settings.sample_size
        # A trainer's word is not enough to make a sample smaller: all are named, or others say that the round has come.
        is_whole = len(collect.expected) >= min(size, len(self.population.active(collect.round)))
        if collect.expected and (is_whole or self._is_due(collect)):
            size = min(size, there)
        # 0.58 * 50 is a little less than 29.
        return max(1, int(size * self._settings.success_fraction + 1e-9))

    def _is_due(self, collect: _Collect) -> bool:
        """Whether the round is the one that neighbours lead to expect, or several have trained for it: what a node hears of
        rounds that it has no part in comes late."""
        return collect.round <= self.round + _EARLY or len(collect.models) >= self._settings.at_least

    def _check_participants(self, now: float, collect: _Collect) -> list[Output]:
        """Whether those who still owe their model are there."""
        if collect.dropped or collect.token:
            return []
        missing = sorted(collect.expected - collect.gone - collect.models.keys() - {self._view.me})

        def answered(then: float, alive: list[PeerId]) -> list[Output]:
            self._let_go_all(then, alive)
            if collect.dropped or collect.token:
                return []
            collect.gone.update(peer for peer in missing if peer not in alive)
            again = self._timers.set(self._settings.ping_s, self._check_participants, collect)
            return [again, *self._aggregate_if_enough(then, collect)]

        if not missing:
            return [self._timers.set(self._settings.ping_s, self._check_participants, collect)]
        return self._asking.draw(now, missing, len(missing), answered)

    def _aggregate_if_enough(self, now: float, collect: _Collect) -> list[Output]:
        enough = len(collect.models) >= self._needed(collect)
        return self._aggregate(now, collect) if enough and collect.models and not collect.token else []

    def _go_on_with_few(self, now: float, collect: _Collect) -> list[Output]:
        """The deadline of a round, at an aggregator that still waits."""
        if collect.dropped or collect.token:
            return []
        if collect.round < self.round - _LATE or not self._is_due(collect):
            return self._drop_collect(now, collect.round)
        few = min(self._settings.at_least, self._needed(collect))
        if collect.models and (len(collect.models) >= few or collect.overdue):
            return self._aggregate(now, collect)
        if collect.overdue:
            return self._drop_collect(now, collect.round)
        collect.overdue = True
        return [self._timers.set(self._settings.deadline_s, self._go_on_with_few, collect)]

    def _aggregate(self, now: float, collect: _Collect) -> list[Output]:
        """A uniform mean, in the order of the peers' ids: FedAvg to the last bit where all take part."""
        if self._own is None or collect.round < self._own.round:  # the round is over
            return self._drop_collect(now, collect.round)
        out = [each for old in self._collects_before(collect.round) for each in self._drop_collect(now, old)]
        (_, first), *rest = sorted(collect.models.items())
        collect.token = self._timers.new_token()
        self.phase = Phase.MERGING
        if not rest:
            return out + self._close(now, collect, first)
        # All count alike (MoDeST takes the uniform mean), whatever numbers of samples they claim.
        inputs = tuple(Input(peer, replace(ref, num_samples=1), 0) for peer, ref in rest)
        order = Aggregate(collect.token, replace(first, num_samples=1), inputs)
        return [*out, self._work(order, [first, *(ref for _, ref in rest)])]

    def _collects_before(self, round_: int) -> list[int]:
        return [each for each in self._collects if each < round_]

    def _on_aggregated(self, now: float, event: Aggregated) -> list[Output]:
        collect = next((each for each in self._collects.values() if each.token == event.token), None)
        if collect is None or self._own is None:
            out = self._discard(event.ref)
        elif collect.round < self._own.round:
            out = self._discard(event.ref) + self._drop_collect(now, collect.round)
        else:
            out = self._close(now, collect, event.ref)
        return out + self._worked(event.token)

    def _close(self, now: float, collect: _Collect, ref: ModelRef) -> list[Output]:
        """A round's aggregate is made: it begins the next."""
        round_ = collect.round
        ref = collect.result = replace(ref, round=round_)
        collect.closed = True
        self._closed_round = max(self._closed_round, round_)
        self.phase = Phase.WAITING
        out = [o for old in sorted(self._collects) if old < round_ for o in self._drop_collect(now, old)]
        out += self._adopt(ref)
        self._exchange.hold(ref)
        for model in collect.models.values():
            out += self._exchange.release(model)
        out += self._see_round(now, round_)
        is_over = self._is_over(round_)
        if self._evaluating is None and not is_over and round_ % self._settings.evaluate_every == 0:
            out += self._evaluate(round_ - 1, ref, len(collect.models), now - collect.began_at)
        rest = collect.pause_s - (now - collect.began_at)
        if rest > 0 and not is_over:
            return [*out, self._timers.set(rest, self._hand_out_if_ready, collect)]
        return out + self._hand_out_if_ready(now, collect)

    def _evaluate(self, round_: int, ref: ModelRef, num_merged: int, duration_s: float) -> list[Output]:
        self._evaluate_token = self._timers.new_token()
        self._evaluating = (round_, ref, num_merged, duration_s)
        self._exchange.hold(ref)
        return [Evaluate(self._evaluate_token, ref)]

    def _hand_out_if_ready(self, now: float, collect: _Collect) -> list[Output]:
        """Once the aggregate, its pause and its participants are there."""
        ref, sample = collect.result, collect.participants
        resting = now - collect.began_at < collect.pause_s - 1e-9
        if collect.dropped or ref is None or sample is None or (resting and not self._is_over(ref.round)):
            return []
        contributors = [peer for peer in {**collect.models, **collect.coming} if peer != self._view.me]
        collect.participants = collect.result = None
        self._drop_collect(now, collect.round)
        if self._is_over(ref.round):
            out = self._finish(now, ref)
        else:
            out = self._hand_out(now, ref, _agreed(collect.heard[peer] for peer in collect.models), sample)
        # Said only once somebody else has the model: until then those who trained are the ones to set it right.
        self._closing[ref.digest] = ref.round, contributors
        if ref.digest not in self._waiting_for.values():
            out += self._say_closed(ref.digest)
        return out + self._exchange.release(ref)

    def _say_closed(self, digest: bytes) -> list[Output]:
        round_, peers = self._closing.pop(digest, (0, []))
        return [Send(peer, Closed(round_)) for peer in peers if self._view.is_live(peer)]

    def _hand_out(self, now: float, ref: ModelRef, beacon: bytes, sample: list[PeerId]) -> list[Output]:
        """To the participants of the round that the model begins; their links are held until they have it."""
        message = AggregatedModel(ref, beacon, tuple(sample))
        out: list[Output] = []
        if ref.digest not in self._handing_out:
            self._handing_out[ref.digest] = ref
            self._exchange.hold(ref)
        for peer in sample:
            if peer == self._view.me:
                continue
            if peer in self._waiting_for or not self._view.is_live(peer):
                self._view.let_go(now, peer)
            if self._view.is_live(peer):
                self._waiting_for[peer] = ref.digest
                out.append(Send(peer, message))
        out.append(self._timers.set(self._settings.deadline_s, self._stop_waiting, ref))
        takes_part = self._view.me in sample and self._trained_round < ref.round
        if takes_part and self._own is not None and self._own.round <= ref.round:
            out += self._train(now, ref, beacon, ref.digest, message.sample)
        return out

    def _stop_waiting(self, now: float, ref: ModelRef) -> list[Output]:
        for peer in [peer for peer, digest in self._waiting_for.items() if digest == ref.digest]:
            del self._waiting_for[peer]
            self._view.let_go(now, peer)
        return self._say_closed(ref.digest) + self._end_handing_out(ref.digest)

    def _end_handing_out(self, digest: bytes) -> list[Output]:
        """Once nobody is waited for any more."""
        if digest not in self._handing_out or digest in self._waiting_for.values():
            return []
        return self._exchange.release(self._handing_out.pop(digest))

    def _on_receipt(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Receipt)
        if self._waiting_for.get(event.peer) == event.message.digest:
            del self._waiting_for[event.peer]
            self._view.let_go(now, event.peer)
            return self._say_closed(event.message.digest) + self._end_handing_out(event.message.digest)
        return self._serve(now, event.peer, event.message.digest)

    def _drop_collect(self, now: float, round_: int) -> list[Output]:
        collect = self._collects.pop(round_)
        collect.dropped = True
        self._let_go_all(now, collect.participants or ())
        if collect.closed:  # the models were let go when the result was made
            return self._exchange.release(collect.result) if collect.result is not None else []
        return [out for ref in collect.models.values() for out in self._exchange.release(ref)]

    def _on_evaluated(self, now: float, event: Evaluated) -> list[Output]:
        if self._evaluating is None or event.token != self._evaluate_token:
            return []
        (round_, ref, num_merged, duration_s), self._evaluating = self._evaluating, None
        record = RoundDone(
            round=round_, num_merged=num_merged, staleness_max=0, metrics=event.metrics, duration_s=duration_s
        )
        return [Emit(record), *self._exchange.release(ref)]

    # --- models that arrive -----------------------------------------------------------------------------
    def _on_arrived(self, now: float, event: ModelArrived) -> list[Output]:
        """`ModelArrived` hands over one hold."""
        peer, ref = event.peer, event.ref
        for collect in self._collects.values():
            if collect.coming.get(peer) == ref:
                del collect.coming[peer]
                if collect.token or peer in collect.models:
                    break
                collect.models[peer] = ref
                return [*self._receipt(peer, ref), *self._aggregate_if_enough(now, collect)]
        out: list[Output] = []
        if self._taking.pop(ref.digest, None):
            out = self._start_round(now, ref.digest)
        elif self._following is not None and self._following.digest == ref.digest:
            out = self._follow(now, ref)
        return out + self._exchange.release(ref)

    def _on_gave_up(self, now: float, event: FetchGaveUp) -> list[Output]:
        for collect in self._collects.values():
            if collect.coming.get(event.peer) == event.ref:
                del collect.coming[event.peer]
        out: list[Output] = []
        if self._following is not None and self._following.digest == event.ref.digest:
            self._following = None
            out = self._take_offered()
        # Another aggregator may still have it, or the same one try again.
        failed = self._taking.pop(event.ref.digest, [])
        for claim in failed:
            if self._claims.get(claim.peer) is claim:
                del self._claims[claim.peer]
        for round_ in sorted({claim.message.ref.round for claim in failed}):
            out += self._choose_claim(now, round_, in_time=False)
        return out

    # --- keeping up -------------------------------------------------------------------------------------
    def _on_offer(self, now: float, event: Received) -> list[Output]:
        """A neighbour has an aggregate. For a moment offers are gathered, since several have the same one."""
        assert isinstance(event.message, Offer)
        ref = event.message.ref
        if not self._is_ahead(ref) or not self._is_plausible(ref.round):
            return []
        out = self._see_round(now, min(ref.round, self._front()))
        if not self._is_wanted(ref) or (self._is_over(ref.round) and self.round < self._settings.rounds):
            return out  # the last one is offered again with every beat
        self._offers[event.peer] = ref
        if self._gathering:
            return out
        self._gathering = True
        return [*out, self._timers.set(_GATHER_S, self._end_gathering)]

    def _is_ahead(self, ref: ModelRef) -> bool:
        return self._own is not None and self.phase is not Phase.DONE and ref.round > self._own.round

    def _is_wanted(self, ref: ModelRef) -> bool:
        """An aggregate is fetched that is far ahead of this node's model, or the last."""
        if self._own is None or not self._is_ahead(ref):
            return False
        behind = ref.round - self._own.round
        is_new_here = self._own.round == 0 or behind > self._settings.window
        is_due = 0 < self._settings.follow_every <= behind
        return is_new_here or is_due or self._is_over(ref.round)

    def _end_gathering(self, now: float) -> list[Output]:
        self._gathering = False
        return self._take_offered()

    def _take_offered(self) -> list[Output]:
        """The newest that two neighbours have, which no one liar can outbid, or else the newest; from all who have it."""
        offers = {
            peer: ref
            for peer, ref in self._offers.items()
            if self._view.is_live(peer) and self._is_wanted(ref)
        }
        holders: dict[ModelRef, list[PeerId]] = {}
        for peer, ref in offers.items():
            holders.setdefault(ref, []).append(peer)
        self._offers = offers
        if not holders:
            return []
        best = max(holders, key=lambda ref: (len(holders[ref]) > 1, ref.round))
        if self._following is not None and self._following.round >= best.round:
            return []
        self._following = best
        # The others' offers are kept for the case that these do not give it.
        self._offers = {peer: ref for peer, ref in offers.items() if ref != best}
        first, *others = holders[best]
        return self._exchange.take(first, best, others)

    def _follow(self, now: float, ref: ModelRef) -> list[Output]:
        self._following = None
        if self._own is None or ref.round <= self._own.round:
            return []
        out: list[Output] = []
        if self._is_over(ref.round):
            return self._finish(now, ref)
        out += self._adopt(ref)
        if self._settings.follow_every:
            out += [Send(peer, Offer(ref)) for peer in self._view.some_neighbours(self._settings.fanout)]
        return out

    # --- the end ----------------------------------------------------------------------------------------
    def _is_over(self, round_: int) -> bool:
        """Whether the aggregate that would begin this round is the last one."""
        return 0 < self._settings.rounds < round_

    def _finish(self, now: float, ref: ModelRef) -> list[Output]:
        """The last aggregate: every node takes it from a neighbour and tells the others."""
        out = self._end_training(now) + self._adopt(ref)
        self._claims, self._taking, self._following = {}, {}, None
        for round_ in list(self._collects):
            out += self._drop_collect(now, round_)
        out += self._see_round(now, ref.round)
        self.phase = Phase.DONE
        self._view.active = self._exchange.open = False
        out += [Keep(ref), Emit(LearningDone(round=self._settings.rounds)), *self._view.heartbeat()]
        if self._evaluating is None:
            out += self._evaluate(ref.round - 1, ref, 0, 0.0)
        return out + [Send(peer, Offer(ref)) for peer in self._view.learners()]

    # --- when all is still ------------------------------------------------------------------------------
    def _watch(self, now: float) -> list[Output]:
        """A network whose whole sample is gone: whoever is first in order among those with the latest model goes on."""
        if self.phase is Phase.DONE:
            return []
        out: list[Output] = [self._timers.set(self._settings.ping_s, self._watch)]
        if self._is_idle():
            self.population.fold()
        out += self._spreading.compare(now)
        # A brief link that only serves a long fetch would be taken for idle at its other end.
        served = {*self._waiting_for, *(peer for each in self._serving for peer in each.aggregators)}
        out += [
            self._view.ping(peer, self._timers.new_token())
            for peer in sorted(served)
            if self._view.is_live(peer)
        ]
        self._progress_at = min(self._progress_at, now)
        if now - self._watched_at > 2 * self._settings.ping_s:
            self._progress_at = now  # this node was asleep, and others may have gone on
        self._watched_at = now
        stalled_s = now - self._progress_at
        patience_s = self._patience_s()
        if self._own is None or self._busy() or not self.round or stalled_s <= patience_s:
            return out
        order = [
            peer for peer in self.population.order(self.round + 1, _NO_BEACON) if not self._view.is_gone(peer)
        ]
        behind = min(self.round - self._own.round, self._settings.window)
        turn_s = self._settings.ping_s * (order.index(self._view.me) / 4 + behind / 8)
        if stalled_s > patience_s + turn_s:
            self._progress_at = now
            if self._is_over(self.round + 1):
                if len(self._view.live_learners()) < len(self._view.learners()):
                    return out  # somebody is done, and will offer the last aggregate
                return out + self._finish(now, replace(self._own, round=self._settings.rounds + 1))
            ref = replace(self._own, round=self.round + 1)
            self._closed_round = max(self._closed_round, ref.round)
            self._own = ref
            out += self._see_round(now, ref.round)

            self._exchange.hold(ref)

            def found(then: float, sample: list[PeerId]) -> list[Output]:
                if self._own is None or self._own.round > ref.round:
                    self._let_go_all(then, sample)
                    return self._exchange.release(ref)
                return self._hand_out(then, ref, ref.digest, sample) + self._exchange.release(ref)

            order = self.population.order(ref.round, ref.digest)
            out += self._asking.draw(now, order, self._settings.sample_size, found)
        return out

    def _patience_s(self) -> float:
        settings = self._settings
        return settings.stall_s or min(max(2 * self._longest_s, settings.deadline_s / 2), settings.deadline_s)

    def _busy(self) -> bool:
        trains = self._trainer is not None and self._trainer.trained is None
        return trains or not self._is_idle()

    # --- when work fails --------------------------------------------------------------------------------
    def _on_work_failed(self, now: float, event: WorkFailed) -> list[Output]:
        if self._evaluating is not None and event.token == self._evaluate_token:
            (_, ref, _, _), self._evaluating = self._evaluating, None
            return [Emit(Trouble(what="evaluating", detail=event.detail)), *self._exchange.release(ref)]
        out = self._worked(event.token)
        trainer = self._trainer
        if trainer is not None and event.token == trainer.token and trainer.trained is None:
            return [Emit(Trouble(what="training", detail=event.detail)), *self._end_training(now), *out]
        for round_, collect in self._collects.items():
            if collect.token == event.token:
                trouble = Emit(Trouble(what="merging", detail=event.detail))
                return [trouble, *self._drop_collect(now, round_), *out]
        return out

    # --- small things -----------------------------------------------------------------------------------
    def _disbelieve(self, peer: PeerId, round_: int) -> list[Output]:
        detail = f"round {round_} where this node knows of {self.round}"
        return [Penalise(peer, Reason.LEAP, detail)]

    def _work(self, order: Train | Aggregate, refs: list[ModelRef]) -> Output:
        """What an order reads stays until it is answered, whatever becomes of the round meanwhile."""
        for ref in refs:
            self._exchange.hold(ref)
        self._reading[order.token] = refs
        return order

    def _worked(self, token: int) -> list[Output]:
        return [out for ref in self._reading.pop(token, ()) for out in self._exchange.release(ref)]

    def _discard(self, ref: ModelRef) -> list[Output]:
        """The result of work that nobody waits for any more."""
        self._exchange.hold(ref)
        return self._exchange.release(ref)

    def _let_go_all(self, now: float, peers: Iterable[PeerId]) -> None:
        for peer in peers:
            self._let_go(now, peer)

    def _let_go(self, now: float, peer: PeerId) -> None:
        if peer != self._view.me:
            self._view.let_go(now, peer)

    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        return self._timers.fired(now, event)

    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        Started: _on_started,
        StopRequested: _on_stop,
        TimerFired: _on_timer,
        PeerUp: _on_peer_up,
        RecordHeard: _on_record,
        Reached: _on_reached,
        Unreachable: _on_unreachable,
        ModelArrived: _on_arrived,
        FetchGaveUp: _on_gave_up,
        Trained: _on_trained,
        Aggregated: _on_aggregated,
        Evaluated: _on_evaluated,
        WorkFailed: _on_work_failed,
        Heartbeat: _of_learners(_on_heartbeat),
        Census: _of_learners(_on_census),
        Pong: _of_learners(_on_pong),
        Offer: _of_learners(_on_offer),
        TrainedModel: _of_learners(_on_trained_model),
        AggregatedModel: _of_learners(_on_aggregated_model),
        Receipt: _of_learners(_on_receipt),
        Closed: _of_learners(_on_closed),
    }


def _agreed(said: Iterable[bytes]) -> bytes:
    """What more than half say, so that one who lies changes nothing; where there is no such thing, the smallest, on which
    parts of a network that have parted come together again."""
    values = sorted(said)
    middle = values[len(values) // 2]
    return middle if 2 * values.count(middle) > len(values) else values[0]


_NO_BEACON = bytes(DIGEST_BYTES)
_WITNESSES = 3
"""Neighbours that have to be in a round before a leap to it is believed."""
_COMPARED = 3
"""Aggregators from which on their models are compared."""
_MAX_LEAP = 2**20
"""Rounds that neighbours can move a node on at a time: far from where numbers end on the wire."""
_SPARE_CLAIMS = 4
_KEPT_COLLECTS = 4
_EARLY = 2
"""Rounds that a lone model may be ahead of what an aggregator knows."""
_LATE = 2
"""Rounds that the others may be ahead of an aggregator at its deadline before it gives its own up."""
_MAX_ATTEMPTS = 3
_SETTLE_S = 3.0
_GATHER_S = 0.25
"""For so long offers are gathered: links of a newcomer come up within it."""
_FORGETS = 0.8
"""With each round, of the longest wait for one."""
