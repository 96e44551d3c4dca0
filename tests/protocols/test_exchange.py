"""How models change hands, and that each one is forgotten once, when nobody needs it any more."""

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.events import (
    Disconnect,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    FetchGaveUp,
    Forget,
    LinkUp,
    ModelArrived,
    Notice,
    PeerDown,
    PeerUp,
    Penalise,
    Received,
    Send,
    SetTimer,
    Timer,
    TimerFired,
)
from protocols.exchange import BAD_MODEL, MAX_SOURCES, Exchange, ExchangeSettings
from protocols.messages import Bye, Decline, Heartbeat, Offer, Refuse
from protocols.view import View, ViewSettings
from protocols.vocabulary import HOSTILE, ModelRef, PeerId, Reason
from tests.protocols.identities import FakeSignatures, hello_of

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
MAX_BYTES = 1_000
Output = Effect | Notice


def ref(number: int, size: int = 100, round_: int = 0) -> ModelRef:
    return ModelRef(number.to_bytes(32, "big"), size, round_, 10)


class Rig:
    """An exchange over a real view whose neighbours are greeted."""

    def __init__(self, *peers: str, **options: object) -> None:
        self.view = View(
            ViewSettings(max_degree=200), PeerId("me"), hello_of("me"), random.Random(0), FakeSignatures("me")
        )
        self.exchange = Exchange(ExchangeSettings(**options), self.view, MAX_BYTES)
        for peer in peers:
            self.link(peer)

    def link(self, peer: str, learning: str = "gossip") -> list[Output]:
        self.view.step(0, LinkUp(PeerId(peer), True, ""))
        self.view.step(0, Received(PeerId(peer), hello_of(peer, learning=learning)))
        return self.exchange.step(0, PeerUp(PeerId(peer), hello_of(peer, learning=learning)))

    def unlink(self, peer: str) -> list[Output]:
        self.view._links.pop(PeerId(peer))
        return self.exchange.step(0, PeerDown(PeerId(peer), Reason.LINK))

    def step(self, event: Event | Notice) -> list[Output]:
        return self.exchange.step(0, event)

    def offered(self, peer: str, model: ModelRef) -> list[Output]:
        return self.step(Received(PeerId(peer), Offer(model)))

    def picture(self) -> object:
        exchange = self.exchange
        return (
            list(exchange._offered),
            {peer: (item.ref, item.others, item.taken) for peer, item in exchange._waiting.items()},
            {
                token: (item.peer, item.ref, item.attempts, item.fetching)
                for token, item in exchange._transfers.items()
            },
            dict(exchange._held),
            exchange._next_token,
        )


def of(kind: type, out: Iterable[Output]) -> list:
    return [item for item in out if isinstance(item, kind)]


# --- offering -------------------------------------------------------------------------------------------
def test_an_own_model_is_offered_to_every_learning_neighbour() -> None:
    rig = Rig(A, B)
    rig.link(C, learning="none")
    assert rig.exchange.offer(ref(1), rig.view.live_learners()) == [
        Send(A, Offer(ref(1))),
        Send(B, Offer(ref(1))),
    ]


def test_a_neighbour_that_finished_is_not_disturbed() -> None:
    rig = Rig(A, B)
    rig.view.step(0, Received(A, Heartbeat(9, False)))
    assert rig.exchange.offer(ref(1), rig.view.live_learners()) == [Send(B, Offer(ref(1)))]


def test_whoever_links_up_later_is_offered_the_newest_model() -> None:
    rig = Rig(A)
    assert rig.link(B) == []
    rig.exchange.offer(ref(1), rig.view.live_learners())
    rig.exchange.present(ref(2))
    assert rig.link(C) == [Send(C, Offer(ref(2)))]
    assert rig.link("helper", learning="none") == []


def test_presenting_tells_nobody_now() -> None:
    assert Rig(A).exchange.present(ref(1)) == []


def test_the_oldest_offered_generation_is_let_go() -> None:
    rig = Rig(A, num_generations=2)
    rig.exchange.offer(ref(1), rig.view.live_learners())
    rig.exchange.offer(ref(2), rig.view.live_learners())
    assert of(Forget, rig.exchange.offer(ref(3), rig.view.live_learners())) == [Forget(ref(1))]
    assert of(Forget, rig.exchange.offer(ref(4), rig.view.live_learners())) == [Forget(ref(2))]


def test_a_generation_that_is_still_needed_is_kept_until_it_is_released() -> None:
    rig = Rig(num_generations=1)
    rig.exchange.hold(ref(1))
    rig.exchange.offer(ref(1), rig.view.live_learners())
    assert rig.exchange.offer(ref(2), rig.view.live_learners()) == []
    assert rig.exchange.release(ref(1)) == [Forget(ref(1))]


def test_releasing_what_nobody_holds_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        Rig().exchange.release(ref(1))


# --- taking ---------------------------------------------------------------------------------------------
def test_an_offer_is_fetched_and_handed_on() -> None:
    rig = Rig(A)
    assert rig.offered(A, ref(1)) == [Fetch(1, A, ref(1))]
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1))]
    assert rig.exchange.release(ref(1)) == [Forget(ref(1))]


def test_the_same_offer_twice_is_fetched_once() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    assert rig.offered(A, ref(1)) == []


def test_offers_of_strangers_and_helpers_are_ignored() -> None:
    rig = Rig(A)
    rig.link(B, learning="none")
    before = rig.picture()
    assert rig.offered("stranger", ref(1)) == []
    assert rig.offered(B, ref(1)) == []
    assert rig.picture() == before


def test_a_model_larger_than_any_honest_one_is_penalised() -> None:
    rig = Rig(A)
    before = rig.picture()
    assert rig.offered(A, ref(1, size=MAX_BYTES + 1)) == [
        Send(A, Decline(ref(1).digest, Reason.TOO_LARGE)),
        Penalise(A, Reason.TOO_LARGE, "offered 1001 bytes, at most 1000 fit the task"),
    ]
    assert rig.picture() == before
    assert of(Fetch, rig.offered(A, ref(2, size=MAX_BYTES)))


def test_a_node_that_is_not_learning_declines_as_idle() -> None:
    rig = Rig(A)
    rig.exchange.open = False
    assert rig.offered(A, ref(1)) == [Send(A, Decline(ref(1).digest, Reason.IDLE))]


def test_offers_that_still_wait_when_learning_ends_are_declined_not_fetched() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    rig.offered(B, ref(2))
    rig.exchange.open = False
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1)), Send(B, Decline(ref(2).digest, Reason.IDLE))]


def test_a_newer_offer_takes_the_place_of_one_that_waits() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    assert rig.offered(B, ref(2)) == []
    assert rig.offered(B, ref(3)) == []
    assert of(Fetch, rig.step(Fetched(1))) == [Fetch(2, B, ref(3))]


def test_a_newer_offer_waits_for_the_transfer_from_the_same_peer() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    assert rig.offered(A, ref(2)) == []
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1)), Fetch(2, A, ref(2))]


def test_a_superseded_model_is_not_tried_again() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    rig.offered(A, ref(2))
    assert rig.step(FetchFailed(1, Reason.TIMEOUT)) == [Forget(ref(1)), Fetch(2, A, ref(2))]


def test_parallel_fetches_are_bounded() -> None:
    peers = [f"p{number}" for number in range(10)]
    rig = Rig(*peers, max_parallel_fetches=4)
    out = [item for number, peer in enumerate(peers) for item in rig.offered(peer, ref(number + 1))]
    assert [fetch.peer for fetch in of(Fetch, out)] == peers[:4]
    assert [fetch.peer for fetch in of(Fetch, rig.step(Fetched(2)))] == [peers[4]]


def test_the_oldest_waiting_offer_is_declined_as_busy() -> None:
    rig = Rig(A, "w1", "w2", "w3", max_parallel_fetches=1, max_waiting=2)
    rig.offered(A, ref(1))
    rig.offered("w1", ref(2))
    rig.offered("w2", ref(3))
    assert rig.offered("w3", ref(4)) == [Send(PeerId("w1"), Decline(ref(2).digest, Reason.BUSY))]
    assert len(rig.exchange._waiting) == 2


def test_one_copy_of_the_same_bytes_is_enough() -> None:
    rig = Rig(A, B, C)
    rig.offered(A, ref(1))
    assert rig.offered(B, ref(1, round_=4)) == []
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1)), ModelArrived(B, ref(1, round_=4))]
    assert rig.offered(C, ref(1)) == [ModelArrived(C, ref(1))], "held already"
    assert rig.exchange.release(ref(1)) == []
    assert rig.exchange.release(ref(1)) == []
    assert rig.exchange.release(ref(1)) == [Forget(ref(1))]


def test_another_peer_brings_what_the_first_could_not() -> None:
    rig = Rig(A, B)
    rig.offered(A, ref(1))
    rig.offered(B, ref(1))
    assert rig.step(FetchFailed(1, Reason.GONE)) == [Forget(ref(1)), Fetch(2, B, ref(1))]


# --- trying again ---------------------------------------------------------------------------------------
def test_a_failed_fetch_is_tried_again_with_doubling_waits_and_then_given_up() -> None:
    rig = Rig(A, max_attempts=4, retry_s=1.5)
    out, waited = rig.offered(A, ref(1)), []
    while of(Fetch, out):
        out = rig.step(FetchFailed(1, Reason.TIMEOUT))
        if not of(SetTimer, out):
            break
        (timer,) = out
        assert timer.timer == Timer("exchange", "retry", 1)
        waited.append(timer.after_s)
        out = rig.step(TimerFired(timer.timer))
    assert waited == [1.5, 3, 6]
    assert out == [Forget(ref(1))]


def test_a_transfer_that_waits_for_its_retry_keeps_its_place() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    rig.offered(B, ref(2))
    assert not of(Fetch, rig.step(FetchFailed(1, Reason.BUSY)))
    assert rig.step(TimerFired(Timer("exchange", "retry", 1))) == [Fetch(1, A, ref(1))]


@pytest.mark.parametrize("reason", sorted(HOSTILE))
def test_a_hostile_failure_is_penalised_and_never_tried_again(reason: Reason) -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    assert rig.step(FetchFailed(1, reason, "why")) == [Penalise(A, reason, "why"), Forget(ref(1))]


def test_what_is_gone_is_not_tried_again_and_is_nobody_s_fault() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    assert rig.step(FetchFailed(1, Reason.GONE)) == [Forget(ref(1))]


@pytest.mark.parametrize("reason", sorted(set(Reason) - HOSTILE - {Reason.GONE}))
def test_every_other_failure_is_tried_again(reason: Reason) -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    assert len(of(SetTimer, rig.step(FetchFailed(1, reason)))) == 1


def test_a_peer_that_left_is_not_asked_again() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    rig.step(FetchFailed(1, Reason.LINK))
    rig.unlink(A)
    assert rig.step(TimerFired(Timer("exchange", "retry", 1))) == [Forget(ref(1))]


def test_a_peer_that_came_back_in_time_is_asked_again() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    rig.step(FetchFailed(1, Reason.LINK))
    rig.unlink(A)
    rig.link(A)
    assert rig.step(TimerFired(Timer("exchange", "retry", 1))) == [Fetch(1, A, ref(1))]


def test_the_waiting_offer_of_a_peer_that_left_is_dropped() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    rig.offered(B, ref(2))
    rig.unlink(B)
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1))]


def test_giving_up_on_bytes_that_are_held_otherwise_forgets_nothing() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    rig.exchange.hold(ref(1))
    assert rig.step(FetchFailed(1, Reason.GONE)) == []


# --- what means nothing ---------------------------------------------------------------------------------
def test_stale_and_foreign_events_leave_the_exchange_as_it_was() -> None:
    rig = Rig(A, B)
    rig.offered(A, ref(1))
    rig.offered(B, ref(2))
    rig.step(FetchFailed(2, Reason.TIMEOUT))
    before = rig.picture()
    for event in (
        Fetched(99),
        FetchFailed(99, Reason.GONE),
        Fetched(2),  # answered already; only its retry is awaited
        FetchFailed(2, Reason.WRONG_HASH),
        TimerFired(Timer("exchange", "retry", 1)),  # it is being fetched
        TimerFired(Timer("exchange", "retry", 99)),
        TimerFired(Timer("learning", "retry", 2)),
        Received(A, Decline(ref(1).digest, Reason.BUSY)),
        Received(A, Bye()),
        PeerDown(PeerId("stranger"), Reason.LINK),
    ):
        assert rig.step(event) == []
        assert rig.picture() == before


# --- several holders of one model -----------------------------------------------------------------------
def test_what_several_offer_is_pulled_from_all_of_them() -> None:
    peers = [A, B, C, PeerId("D"), PeerId("E")]
    rig = Rig(*peers, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    for peer in peers[1:]:
        rig.offered(peer, ref(2))
    first = [ModelArrived(A, ref(1)), Fetch(2, B, ref(2), (C, *peers[3:]))]
    assert rig.step(Fetched(1)) == first
    assert rig.step(Fetched(2)) == [ModelArrived(peer, ref(2)) for peer in peers[1:]]


def test_the_number_of_sources_is_bounded() -> None:
    peers = [PeerId(f"p{number:02}") for number in range(9)]
    rig = Rig(A, *peers)
    assert rig.exchange.take(A, ref(1), peers) == [Fetch(1, A, ref(1), tuple(peers[: MAX_SOURCES - 1]))]


def test_another_size_for_the_same_bytes_is_a_lie_and_no_source() -> None:
    rig = Rig(A, B, C, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    rig.offered(B, ref(2))
    rig.offered(C, ref(2, size=99))
    assert of(Fetch, rig.step(Fetched(1))) == [Fetch(2, B, ref(2))]


def test_who_offered_the_same_meanwhile_is_asked_too_at_the_next_attempt() -> None:
    rig = Rig(A, B)
    rig.offered(A, ref(1))
    rig.offered(B, ref(1))
    rig.step(FetchFailed(1, Reason.TIMEOUT))
    assert rig.step(TimerFired(Timer("exchange", "retry", 1))) == [Fetch(1, A, ref(1), (B,))]


# --- what the learning protocol takes -------------------------------------------------------------------
def test_a_model_that_is_taken_arrives_as_an_offered_one_does() -> None:
    rig = Rig(A, B)
    assert rig.exchange.take(A, ref(1), (B,)) == [Fetch(1, A, ref(1), (B,))]
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1))]
    assert rig.exchange.take(B, ref(1)) == [ModelArrived(B, ref(1))], "held already"


def test_a_taken_model_waits_its_turn() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    assert rig.exchange.take(B, ref(2)) == []
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1)), Fetch(2, B, ref(2))]


def test_sources_that_are_not_linked_are_left_out() -> None:
    rig = Rig(B, C)
    stranger = PeerId("stranger")
    assert rig.exchange.take(A, ref(1), (stranger, B, C, B)) == [Fetch(1, B, ref(1), (C,))]
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1))]
    assert rig.exchange.take(A, ref(2), (stranger,)) == [FetchGaveUp(A, ref(2))]


def test_what_is_taken_twice_is_fetched_and_answered_once() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.exchange.take(A, ref(1))
    rig.exchange.take(B, ref(2))
    assert rig.exchange.take(A, ref(1), (B,)) == []
    assert rig.exchange.take(B, ref(2)) == []
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1)), Fetch(2, B, ref(2))]
    assert rig.step(FetchFailed(2, Reason.GONE)) == [Forget(ref(2)), FetchGaveUp(B, ref(2))]


def test_an_offered_model_that_is_taken_while_it_comes_is_answered() -> None:
    rig = Rig(A)
    rig.offered(A, ref(1))
    assert rig.exchange.take(A, ref(1)) == []
    assert rig.step(FetchFailed(1, Reason.GONE)) == [Forget(ref(1)), FetchGaveUp(A, ref(1))]


def test_a_taken_model_is_tried_again_and_then_given_up_for_good() -> None:
    rig = Rig(A, max_attempts=2)
    rig.exchange.take(A, ref(1))
    assert of(SetTimer, rig.step(FetchFailed(1, Reason.TIMEOUT)))
    rig.step(TimerFired(Timer("exchange", "retry", 1)))
    assert rig.step(FetchFailed(1, Reason.TIMEOUT)) == [Forget(ref(1)), FetchGaveUp(A, ref(1))]


def test_after_a_lie_the_others_are_tried_without_the_liar() -> None:
    rig = Rig(A, B, C)
    rig.exchange.take(A, ref(1), (B, C))
    out = rig.step(FetchFailed(1, Reason.WRONG_HASH, "chunk 3"))
    assert of(Penalise, out) == [Penalise(A, Reason.WRONG_HASH, "chunk 3")]
    assert rig.step(TimerFired(of(SetTimer, out)[0].timer)) == [Fetch(1, B, ref(1), (C,))]
    out = rig.step(FetchFailed(1, Reason.WRONG_SIZE))
    assert of(Penalise, out) == [Penalise(B, Reason.WRONG_SIZE)], "whoever was asked first"
    rig.unlink(C)
    assert of(Forget, rig.step(TimerFired(of(SetTimer, out)[0].timer))) == [Forget(ref(1))]


@pytest.mark.parametrize("reason", sorted(BAD_MODEL))
def test_a_bad_model_is_not_asked_of_others(reason: Reason) -> None:
    rig = Rig(A, B)
    rig.exchange.take(A, ref(1), (B,))
    assert rig.step(FetchFailed(1, reason)) == [
        Penalise(A, reason),
        Forget(ref(1)),
        FetchGaveUp(A, ref(1)),
    ]


def test_a_taken_model_larger_than_any_honest_one_is_penalised_and_given_up() -> None:
    rig = Rig(A)
    large = ref(1, size=MAX_BYTES + 1)
    assert rig.exchange.take(A, large) == [
        Penalise(A, Reason.TOO_LARGE, "named 1001 bytes, at most 1000 fit the task"),
        FetchGaveUp(A, large),
    ]


def test_a_newer_model_of_the_same_peer_takes_the_place_of_one_that_waits() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.offered(A, ref(1))
    rig.exchange.take(B, ref(2))
    assert rig.exchange.take(B, ref(3)) == [FetchGaveUp(B, ref(2))]
    assert rig.offered(B, ref(4)) == [FetchGaveUp(B, ref(3))]


def test_the_oldest_that_waits_is_given_up_without_a_word_to_its_peer() -> None:
    rig = Rig(A, B, C, max_parallel_fetches=1, max_waiting=1)
    rig.offered(A, ref(1))
    rig.exchange.take(B, ref(2))
    assert rig.exchange.take(C, ref(3)) == [FetchGaveUp(B, ref(2))]


def test_a_waiting_model_outlives_its_peer_where_another_has_it() -> None:
    rig = Rig(A, B, C, "D", max_parallel_fetches=1)
    rig.offered(A, ref(1))
    rig.exchange.take(B, ref(2), (C,))
    rig.exchange.take(PeerId("D"), ref(3))
    assert rig.unlink(B) == []
    assert rig.unlink("D") == [FetchGaveUp(PeerId("D"), ref(3))]
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1)), Fetch(2, C, ref(2))]
    assert rig.step(Fetched(2)) == [ModelArrived(B, ref(2))]


def test_a_node_that_has_finished_takes_nothing_more() -> None:
    rig = Rig(A, B, max_parallel_fetches=1)
    rig.exchange.take(A, ref(1))
    rig.exchange.take(B, ref(2))
    rig.exchange.open = False
    assert rig.exchange.take(A, ref(3)) == [FetchGaveUp(A, ref(3))]
    assert rig.step(Fetched(1)) == [ModelArrived(A, ref(1)), FetchGaveUp(B, ref(2))]


# --- the account of holds -------------------------------------------------------------------------------
class Ledger:
    """A caller that takes each model which arrives, and a store that knows which bytes lie on its disk."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.taken: list[ModelRef] = []
        self.fetching: dict[int, ModelRef] = {}
        self.timers: list[Timer] = []
        self.on_disk: set[bytes] = set()
        self.forgotten: Counter[bytes] = Counter()
        self.saved: Counter[bytes] = Counter()
        self.asked: set[tuple[PeerId, ModelRef]] = set()

    def save(self, model: ModelRef) -> None:
        if model.digest not in self.on_disk:
            self.on_disk.add(model.digest)
            self.saved[model.digest] += 1

    def read(self, out: list[Output]) -> None:
        for item in out:
            match item:
                case Fetch(token, _, model):
                    assert token not in self.fetching, "one answer is awaited already"
                    assert model.digest not in {other.digest for other in self.fetching.values()}
                    self.fetching[token] = model
                    self.save(model)  # its first chunk comes
                case SetTimer(timer):
                    self.timers.append(timer)
                case ModelArrived(peer, model):
                    assert model.digest in self.on_disk
                    self.taken.append(model)
                    self.asked.discard((peer, model))
                case FetchGaveUp(peer, model):
                    self.asked.remove((peer, model))
                case Forget(model):
                    assert model.digest in self.on_disk, "forgotten twice, or never saved"
                    self.on_disk.remove(model.digest)
                    self.forgotten[model.digest] += 1
        exchange = self.rig.exchange
        assert len(self.fetching) <= exchange._settings.max_parallel_fetches
        assert len(exchange._waiting) <= exchange._settings.max_waiting
        needed = {model.digest for model in (*self.taken, *exchange._offered, *self.fetching.values())}
        waiting_for_retry = {item.ref.digest for item in exchange._transfers.values()}
        assert needed <= self.on_disk <= needed | waiting_for_retry

    def act(self, choice: int, peer: str, model: ModelRef, reason: Reason) -> None:
        rig = self.rig
        match choice:
            case 0 | 1 | 2:
                self.read(rig.offered(peer, model))
            case 3 if self.fetching:
                token = next(iter(self.fetching))
                del self.fetching[token]
                self.read(rig.step(Fetched(token)))
            case 4 if self.fetching:
                token = max(self.fetching)
                del self.fetching[token]
                self.read(rig.step(FetchFailed(token, reason)))
            case 5 if self.timers:
                self.read(rig.step(TimerFired(self.timers.pop(0))))
            case 6 if self.taken:
                self.read(rig.exchange.release(self.taken.pop(0)))
            case 7:
                self.save(model)
                self.read(rig.exchange.offer(model, rig.view.live_learners()))
            case 8 if peer in rig.view._links:
                self.read(rig.unlink(peer))
            case 9 if peer not in rig.view._links:
                self.read(rig.link(peer))
            case 10 | 11:
                self.asked.add((PeerId(peer), model))
                self.read(rig.exchange.take(PeerId(peer), model, (A, B)))

    def settle(self) -> None:
        """Let everything end: fetches fail, timers fire, holds are released."""
        self.rig.exchange.open = False
        while self.fetching or self.timers or self.taken:
            for choice in (4, 5, 6):
                self.act(choice, "A", ref(0), Reason.GONE)
        assert not self.asked, "whatever was asked for has come or was given up"


actions = st.tuples(
    st.integers(0, 11),
    st.sampled_from(["A", "B", "C", "D"]),
    st.builds(ref, st.integers(1, 6), st.just(100), st.integers(0, 3)),
    st.sampled_from([Reason.TIMEOUT, Reason.LINK, Reason.GONE, Reason.WRONG_HASH, Reason.BUSY]),
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(actions, max_size=60), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_every_saved_model_is_needed_or_forgotten_once(
    script: list[tuple[int, str, ModelRef, Reason]], parallel: int, waiting: int, generations: int
) -> None:
    rig = Rig("A", "B", "C", max_parallel_fetches=parallel, max_waiting=waiting, num_generations=generations)
    ledger = Ledger(rig)
    for action in script:
        ledger.act(*action)
    ledger.settle()
    assert ledger.on_disk == {model.digest for model in rig.exchange._offered}
    assert all(ledger.saved[digest] - ledger.forgotten[digest] in (0, 1) for digest in ledger.saved)


def test_the_account_holds_over_a_long_run() -> None:
    rng = random.Random(7)
    ledger = Ledger(Rig("A", "B", "C"))
    reasons = [Reason.TIMEOUT, Reason.LINK, Reason.GONE, Reason.WRONG_HASH]
    for number in range(20_000):
        fresh = ref(rng.choice([number + 10, rng.randrange(1, 10)]), round_=number)
        ledger.act(rng.randrange(12), rng.choice("ABCD"), fresh, rng.choice(reasons))
    ledger.settle()
    assert len(ledger.on_disk) == len({model.digest for model in ledger.rig.exchange._offered})
    assert sum(ledger.forgotten.values()) > 2_000


def test_bytes_that_are_coming_in_again_are_not_forgotten_under_way() -> None:
    """Two nodes that train alike make the same bytes."""
    for end, left in (
        (Fetched(1), [ModelArrived(A, ref(1))]),
        (FetchFailed(1, Reason.GONE), [Forget(ref(1))]),
    ):
        rig = Rig(A)
        rig.offered(A, ref(1))
        rig.exchange.hold(ref(1))
        assert rig.exchange.release(ref(1)) == []
        assert rig.step(end) == left


def test_giving_up_on_several_waiting_peers_at_once_is_no_trouble() -> None:
    """Their links were replaced unsaid, so that they wait without being live."""
    rig = Rig(A, B, C, "D", max_parallel_fetches=1)
    for number, peer in enumerate("ABCD"):
        rig.offered(peer, ref(number + 1))
    for peer in "BC":
        rig.view.step(0, LinkUp(PeerId(peer), False, ""))
    out = rig.step(Fetched(1))
    assert of(Forget, out) == [], "nothing of theirs was ever fetched"
    assert of(Fetch, out) == [Fetch(4, PeerId("D"), ref(4))]


def too_large(rig: Rig, peer: str, number: int) -> list[Output]:
    return rig.offered(peer, ref(number, size=MAX_BYTES + 1))


def test_the_third_refused_model_on_one_link_ends_it() -> None:
    rig = Rig(A, B)
    for number in (1, 2):
        assert not of(Disconnect, too_large(rig, A, number))
    too_large(rig, B, 9)
    out = too_large(rig, A, 3)
    assert of(Disconnect, out) == [Disconnect(A, Reason.TOO_LARGE)]
    assert isinstance(of(Send, out)[-1].message, Refuse)
    assert (rig.view.is_live(A), rig.view.is_live(B)) == (False, True), "the view knows that the link ends"
    assert too_large(rig, A, 4) == [], "what it still offers means nothing"
    assert rig.offered(A, ref(5)) == []


def test_refusals_of_every_kind_count_together_and_end_what_the_peer_still_owes() -> None:
    rig = Rig(A, max_attempts=9)
    rig.offered(A, ref(1))
    rig.offered(A, ref(2))
    too_large(rig, A, 7)
    out = rig.step(FetchFailed(1, Reason.WRONG_HASH, "junk"))
    assert of(Fetch, out) == [Fetch(2, A, ref(2))]
    out = rig.step(FetchFailed(2, Reason.MALFORMED, "junk"))
    assert of(Disconnect, out) == [Disconnect(A, Reason.MALFORMED)]
    assert of(Forget, out) == [Forget(ref(2))]


def test_strikes_are_counted_anew_on_a_new_link() -> None:
    rig = Rig(A)
    for number in (1, 2):
        too_large(rig, A, number)
    rig.unlink(A)
    assert dict(rig.exchange._strikes) == {}
    rig.link(A)
    for number in (3, 4):
        assert not of(Disconnect, too_large(rig, A, number))
    assert of(Disconnect, too_large(rig, A, 5))


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "going"])
def test_a_strike_of_a_peer_that_is_gone_is_told_but_not_kept(gone: bool) -> None:
    """Its fetch may end in a refusal after its link has; peers that come once would fill the memory."""
    rig = Rig(A)
    rig.offered(A, ref(1))
    if gone:
        rig.unlink(A)
    else:
        rig.view.close(A, Reason.LINK, "")
    out = rig.step(FetchFailed(1, Reason.WRONG_HASH, "junk"))
    assert out == [Penalise(A, Reason.WRONG_HASH, "junk"), Forget(ref(1))]
    assert dict(rig.exchange._strikes) == {}


def test_a_neighbour_whose_link_is_ending_is_offered_nothing_and_asked_for_nothing() -> None:
    rig = Rig(A, B, retry_s=1)
    rig.offered(A, ref(1))
    rig.step(FetchFailed(1, Reason.TIMEOUT))
    rig.view.close(A, Reason.FULL, "")
    assert rig.exchange.offer(ref(5), rig.view.live_learners()) == [Send(B, Offer(ref(5)))]
    assert rig.offered(A, ref(2)) == []
    assert rig.step(TimerFired(Timer("exchange", "retry", 1))) == [Forget(ref(1))]


def test_only_what_was_begun_is_forgotten() -> None:
    """Of an offer that only waited for its turn there is nothing on the disk."""
    rig = Rig(A, B, C, max_parallel_fetches=1)
    for number, peer in enumerate((A, B, C), 1):
        rig.offered(peer, ref(number))
    rig.view.close(B, Reason.FULL, "")
    assert rig.step(FetchFailed(1, Reason.GONE)) == [Forget(ref(1)), Fetch(3, C, ref(3))]
    assert rig.step(FetchFailed(3, Reason.GONE)) == [Forget(ref(3))]
