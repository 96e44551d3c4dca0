"""The gossip round: every line of its table, and what a late, lazy or lying neighbour can do to it."""

import random
from collections.abc import Iterable

import pytest

from protocols import gossip
from protocols.events import (
    Aggregate,
    Aggregated,
    Effect,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Fetched,
    Forget,
    Input,
    Keep,
    LearningDone,
    LinkUp,
    ModelArrived,
    Notice,
    PeerDown,
    PeerUp,
    Phase,
    Received,
    RoundDone,
    Send,
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
from protocols.exchange import Exchange, ExchangeSettings
from protocols.gossip import MAX_JUMP, Gossip, GossipSettings
from protocols.messages import Heartbeat, Offer
from protocols.view import View, ViewSettings
from protocols.vocabulary import MAX_ROUND, ModelRef, PeerId, Reason
from tests.protocols.identities import FakeSignatures, hello_of

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
Output = Effect | Notice


def ref(number: int, round_: int = 0) -> ModelRef:
    return ModelRef(number.to_bytes(32, "big"), 100, round_, 10)


class Rig:
    """Gossip over a real exchange and view, with the core's way of routing."""

    def __init__(self, *peers: str, **options: object) -> None:
        options = {"pause_s": 0, **options}
        self.view = View(ViewSettings(), PeerId("me"), hello_of("me"), random.Random(0), FakeSignatures("me"))
        self.exchange = Exchange(ExchangeSettings(), self.view, 1_000)
        self.gossip = Gossip(GossipSettings(**options), self.view, self.exchange)
        self.now = 0.0
        for peer in peers:
            self.link(peer)

    def link(self, peer: str, learning: str = "gossip") -> list[Output]:
        self.view.step(0, LinkUp(PeerId(peer), True, ""))
        self.view.step(0, Received(PeerId(peer), hello_of(peer, learning=learning)))
        notice = PeerUp(PeerId(peer), hello_of(peer, learning=learning))
        return self.exchange.step(0, notice) + self.gossip.step(self.now, notice)

    def step(self, event: Event | Notice) -> list[Output]:
        return self.gossip.step(self.now, event)

    def arrive(self, peer: str, model: ModelRef) -> list[Output]:
        self.exchange.hold(model)
        return self.step(ModelArrived(PeerId(peer), model))

    def beat(self, peer: str, active: bool) -> list[Output]:
        event = Received(PeerId(peer), Heartbeat(0, active))
        return self.view.step(self.now, event) + self.step(event)

    @property
    def token(self) -> int:
        return self.gossip._token

    def train(self, model: ModelRef) -> list[Output]:
        return self.step(Trained(self.token, model))

    def deadline(self) -> list[Output]:
        return self.step(TimerFired(Timer("learning", "deadline", self.token)))

    def picture(self) -> object:
        item = self.gossip
        return (
            (item.phase, item.round, item._token, item._own, item._trained, item._merging),
            (dict(item._inbox), dict(self.exchange._held), list(self.exchange._offered)),
            (self.view.round, self.view.active, self.exchange.open),
        )


def of(kind: type, out: Iterable[Output]) -> list:
    return [item for item in out if isinstance(item, kind)]


def record(out: Iterable[Output]) -> RoundDone:
    (found,) = [item.record for item in of(Emit, out) if isinstance(item.record, RoundDone)]
    return found


OWN = ref(1)


PHASES = [phase for phase in Phase if phase not in (Phase.ESTIMATING, Phase.REPLAYING, Phase.SETTLING)]
"""The others are of shared-seed scalars."""


def at(phase: Phase, **options: object) -> Rig:
    """A node with neighbours A and B, and A's model of round 0, brought to `phase` by events."""
    if phase in (Phase.FINAL, Phase.DONE):
        options["rounds"] = 1
    if phase is Phase.FINAL:
        options["final_merge"] = "butterfly"
    if phase is Phase.PAUSING:
        options["pause_s"] = 10
    if phase is Phase.WAITING:
        options["wait_for_peers"] = 3
    rig = Rig(A, B, **{"quorum": 1, **options})
    rig.step(Started((), (), OWN))
    if phase in (Phase.WAITING, Phase.TRAINING):
        return rig
    if phase is Phase.CATCHING_UP:
        for peer in (A, B):
            rig.view.step(0, Received(peer, Heartbeat(500, True)))
    rig.train(ref(2))
    if phase in (Phase.COLLECTING, Phase.CATCHING_UP):
        return rig
    rig.arrive(A, ref(3))
    rig.deadline()
    if phase is Phase.MERGING:
        return rig
    rig.step(Aggregated(rig.token, ref(4)))
    if phase is Phase.EVALUATING:
        return rig
    rig.step(Evaluated(rig.token, {}))
    return rig


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_can_be_reached(phase: Phase) -> None:
    assert at(phase).gossip.phase is phase


# --- the table, line by line ----------------------------------------------------------------------------
def test_waiting_begins_at_the_start_where_nobody_is_waited_for() -> None:
    rig = Rig()
    assert rig.step(Started((), (), OWN)) == [Train(1, OWN, 0)]
    assert rig.gossip.phase is Phase.TRAINING


def test_waiting_begins_once_enough_learners_are_here() -> None:
    rig = Rig(wait_for_peers=2, wait_at_most_s=60)
    assert rig.step(Started((), (), OWN)) == [SetTimer(Timer("learning", "company", 1), 60)]
    assert rig.link(A) == []
    assert rig.link("helper", learning="none") == []
    assert rig.beat(A, True) == []
    assert rig.link(B) == []
    assert rig.beat(B, True) == [Train(2, OWN, 0)], "its beat says where the others are"


def test_waiting_for_company_has_an_end() -> None:
    rig = Rig(wait_for_peers=2)
    rig.step(Started((), (), OWN))
    assert rig.step(TimerFired(Timer("learning", "company", 1))) == [Train(2, OWN, 0)]


def test_a_node_without_a_model_never_begins() -> None:
    rig = Rig(wait_for_peers=1)
    assert rig.step(Started((), (), None)) == []
    assert rig.link(A) == []
    assert rig.step(TimerFired(Timer("learning", "company", 0))) == []
    assert rig.gossip.phase is Phase.WAITING


def test_a_node_goes_on_where_it_was_and_says_so() -> None:
    rig = Rig()
    assert rig.step(Started((), (), ref(1, round_=7))) == [Train(1, ref(1, round_=7), 7)]
    assert (rig.gossip.round, rig.view.round) == (7, 7)


def test_training_ends_in_an_offer_to_all_and_a_deadline() -> None:
    rig = at(Phase.TRAINING, deadline_s=12)
    assert rig.train(ref(2)) == [
        Send(A, Offer(ref(2))),
        Send(B, Offer(ref(2))),
        SetTimer(Timer("learning", "deadline", rig.token), 12),
    ]
    assert rig.gossip.phase is Phase.COLLECTING


def test_collecting_ends_with_the_quorum() -> None:
    rig = at(Phase.COLLECTING)
    assert rig.arrive(A, ref(3)) == []
    assert rig.arrive(A, ref(4)) == [Forget(ref(3))], "two models of one peer are one"
    out = rig.arrive(B, ref(5))
    assert out == [Aggregate(rig.token, ref(2), (Input(A, ref(4), 0), Input(B, ref(5), 0)))]
    assert rig.gossip.phase is Phase.MERGING


@pytest.mark.parametrize(("quorum", "num"), [(0, 0), (0.2, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1, 4)])
def test_the_quorum_is_a_share_of_the_learning_neighbours(quorum: float, num: int) -> None:
    peers = ("p1", "p2", "p3", "p4")
    rig = Rig(*peers, quorum=quorum)
    rig.link("helper", learning="none")
    rig.step(Started((), (), OWN))
    out = rig.train(ref(2))
    for number, peer in enumerate(peers[:num]):
        assert rig.gossip.phase is Phase.COLLECTING
        out = rig.arrive(peer, ref(10 + number))
    assert rig.gossip.phase is (Phase.MERGING if num else Phase.EVALUATING)
    assert len(of(Aggregate, out)) == (num > 0)


@pytest.mark.parametrize("arrived", [False, True])
def test_without_a_quorum_nobody_is_awaited_and_no_deadline_is_set(arrived: bool) -> None:
    rig = at(Phase.TRAINING, quorum=0)
    if arrived:
        assert rig.arrive(A, ref(3)) == []
    out = rig.train(ref(2))
    assert of(SetTimer, out) == []
    assert [send.peer for send in of(Send, out)] == [A, B], "they are offered the model all the same"
    assert rig.gossip.phase is (Phase.MERGING if arrived else Phase.EVALUATING)
    next_step = (
        Aggregate(rig.token, ref(2), (Input(A, ref(3), 0),)) if arrived else Evaluate(rig.token, ref(2))
    )
    assert out[-1] == next_step


def offered(rig: Rig, rounds: int) -> list[list[str]]:
    """Whom each of so many rounds offers its model."""
    rig.step(Started((), (), OWN))
    told = []
    for number in range(rounds):
        out = rig.train(ref(100 + number))
        told.append([send.peer for send in of(Send, out) if isinstance(send.message, Offer)])
        rig.step(Evaluated(rig.token, {}))
    return told


def test_without_a_fanout_all_learning_neighbours_are_offered_the_model() -> None:
    rig = Rig(A, B, C, quorum=0, fanout=0)
    rig.link("helper", learning="none")
    assert offered(rig, 3) == [[A, B, C]] * 3


@pytest.mark.parametrize("fanout", [1, 2])
def test_a_fanout_offers_the_model_to_so_many_drawn_anew_each_round(fanout: int) -> None:
    rig = Rig(A, B, C, quorum=0, fanout=fanout)
    rig.link("helper", learning="none")
    told = offered(rig, 60)
    assert all(len(set(peers)) == len(peers) == fanout for peers in told)
    times = [sum(peer in peers for peers in told) for peer in (A, B, C)]
    assert sum(times) == 60 * fanout
    assert min(times) > 60 * fanout / 3 * 0.6, "everybody has its turn"


def test_a_fanout_no_smaller_than_the_neighbourhood_means_all() -> None:
    assert offered(Rig(A, B, quorum=0, fanout=2), 2) == [[A, B]] * 2
    assert offered(Rig(A, B, quorum=0, fanout=5), 2) == [[A, B]] * 2
    assert offered(Rig(quorum=0, fanout=1), 2) == [[], []]


def test_a_fanout_passes_by_who_has_finished() -> None:
    rig = Rig(A, B, C, quorum=0, fanout=1)
    for peer in (A, C):
        rig.beat(peer, active=False)
    assert offered(rig, 10) == [[B]] * 10


def test_models_that_came_during_training_count_at_once() -> None:
    rig = at(Phase.TRAINING)
    assert rig.arrive(A, ref(3)) == rig.arrive(B, ref(4)) == []
    assert of(Aggregate, rig.train(ref(2)))


def test_collecting_ends_when_those_missing_leave() -> None:
    rig = at(Phase.COLLECTING)
    rig.arrive(A, ref(3))
    del rig.view._links[B]
    assert of(Aggregate, rig.step(PeerDown(B, Reason.LINK)))


def test_collecting_ends_when_those_missing_have_finished() -> None:
    rig = at(Phase.COLLECTING)
    rig.arrive(A, ref(3))
    assert rig.beat(B, active=True) == []
    assert of(Aggregate, rig.beat(B, active=False))


def test_the_deadline_merges_what_is_there() -> None:
    rig = at(Phase.COLLECTING)
    rig.arrive(A, ref(3))
    assert rig.deadline() == [Aggregate(rig.token, ref(2), (Input(A, ref(3), 0),))]


def test_a_deadline_with_nothing_there_goes_on_with_the_own_model() -> None:
    rig = at(Phase.COLLECTING)
    assert rig.deadline() == [Evaluate(rig.token, ref(2))]
    assert record(rig.step(Evaluated(rig.token, {}))).num_merged == 0
    assert rig.gossip.own == ref(2, round_=1)


def test_a_node_alone_does_not_wait_for_anybody() -> None:
    rig = Rig(quorum=1)
    rig.step(Started((), (), OWN))
    assert of(Evaluate, rig.train(ref(2)))


def test_merging_ends_in_an_evaluation_of_the_merged_model() -> None:
    rig = at(Phase.MERGING)
    out = rig.step(Aggregated(rig.token, ref(4)))
    assert out == [Forget(ref(3)), Evaluate(rig.token, ref(4))]
    assert rig.gossip.own == ref(4)


def test_evaluating_ends_the_round() -> None:
    rig = at(Phase.EVALUATING, pause_s=2)
    rig.now = 0.5
    out = rig.step(Evaluated(rig.token, {"accuracy": 0.5}))
    assert record(out) == RoundDone(
        round=0, num_merged=1, staleness_max=0, metrics={"accuracy": 0.5}, duration_s=0.5
    )
    assert of(Keep, out) == [Keep(ref(4, round_=1))]
    assert of(SetTimer, out) == [SetTimer(Timer("learning", "pause", rig.token), 1.5)]
    assert (rig.gossip.phase, rig.gossip.round, rig.view.round) == (Phase.PAUSING, 1, 1)


def test_a_round_longer_than_the_pause_is_followed_at_once() -> None:
    rig = at(Phase.EVALUATING, pause_s=2)
    rig.now = 2.0
    out = rig.step(Evaluated(rig.token, {}))
    assert out[-1] == Train(rig.token, ref(4, round_=1), 1)
    assert rig.gossip.phase is Phase.TRAINING


def test_pausing_ends_in_the_next_round() -> None:
    rig = at(Phase.PAUSING)
    assert rig.step(TimerFired(Timer("learning", "pause", rig.token))) == [
        Train(rig.token, ref(4, round_=1), 1)
    ]


def test_evaluating_and_keeping_may_be_rare() -> None:
    rig = Rig(evaluate_every=3, keep_every=2)
    evaluated, kept = [], []
    out = rig.step(Started((), (), OWN))
    for round_ in range(12):
        out = rig.train(ref(10 + round_))
        if of(Evaluate, out):
            evaluated.append(round_)
            out = rig.step(Evaluated(rig.token, {}))
        kept += [keep.ref.round for keep in of(Keep, out)]
    assert evaluated == [2, 5, 8, 11]
    assert kept == [2, 4, 6, 8, 10, 12]


def test_a_jump_over_the_round_to_keep_keeps_all_the_same() -> None:
    rig = at(Phase.MERGING, keep_every=10)
    rig.exchange.hold(ref(5))
    rig.gossip._merging = (Input(A, ref(3, round_=11), 0), Input(B, ref(5, round_=11), 0))
    rig.step(Aggregated(rig.token, ref(4)))
    assert of(Keep, rig.step(Evaluated(rig.token, {}))) == [Keep(ref(4, round_=12))]


# --- rounds ---------------------------------------------------------------------------------------------
def merged_round(own: int, *rounds: int) -> int:
    """The round a node of round `own` enters after merging models of `rounds`."""
    peers = [f"p{number}" for number in range(len(rounds))]
    rig = Rig(*peers, quorum=1)
    rig.step(Started((), (), ref(1, round_=own)))
    rig.train(ref(2, round_=own))
    for number, (peer, round_) in enumerate(zip(peers, rounds, strict=True)):
        rig.arrive(peer, ref(10 + number, round_=round_))
    rig.step(Aggregated(rig.token, ref(3)))
    rig.step(Evaluated(rig.token, {}))
    assert rig.view.round == rig.gossip.own.round == rig.gossip.round
    return rig.gossip.round


@pytest.mark.parametrize(
    ("own", "rounds", "after"),
    [
        (5, (), 6),
        (5, (5, 5), 6),
        (5, (2, 3, 4), 6),
        (5, (9,), 6),
        (5, (9, 20), 10),
        (5, (7, 9, 20), 8),
        (5, (6, 7, 9, 20), 8),
        (5, (5, 6, 2**40), 6),
        (5, (2**40, 6), 7),
        (5, (2**40, 5, 2**40, 6, 7), 7),
    ],
)
def test_a_round_jumps_to_the_lower_median_of_its_own_and_the_merged(
    own: int, rounds: tuple[int, ...], after: int
) -> None:
    assert merged_round(own, *rounds) == after


def test_one_liar_of_three_does_not_move_the_round() -> None:
    assert merged_round(5, 5, 5, 2**40) == 6


def test_a_single_liar_alone_in_a_merge_does_not_move_the_round() -> None:
    assert merged_round(5, 2**40) == 6


def test_no_lie_takes_the_round_out_of_what_can_be_sent() -> None:
    assert merged_round(5, MAX_ROUND, MAX_ROUND) == 5 + MAX_JUMP + 1
    assert merged_round(MAX_ROUND - 3, MAX_ROUND, MAX_ROUND) == MAX_ROUND
    assert merged_round(MAX_ROUND) == MAX_ROUND


def test_staleness_is_counted_in_rounds_and_never_negative() -> None:
    rig = Rig(A, B, C, quorum=1)
    rig.step(Started((), (), ref(1, round_=10)))
    rig.train(ref(2, round_=10))
    for number, (peer, round_) in enumerate([(C, 12), (A, 7), (B, 10)]):
        out = rig.arrive(peer, ref(20 + number, round_=round_))
    assert [(item.peer, item.staleness) for item in of(Aggregate, out)[0].inputs] == [(A, 3), (B, 0), (C, 0)]
    rig.step(Aggregated(rig.token, ref(4)))
    assert record(rig.step(Evaluated(rig.token, {}))).staleness_max == 3


def test_inputs_come_in_an_order_that_does_not_depend_on_arrival() -> None:
    for order in ((A, B, C), (C, A, B)):
        rig = Rig(A, B, C, quorum=1)
        rig.step(Started((), (), OWN))
        rig.train(ref(2))
        for peer in order:
            out = rig.arrive(peer, ref(ord(peer)))
        assert [item.peer for item in of(Aggregate, out)[0].inputs] == [A, B, C]


# --- schedules ------------------------------------------------------------------------------------------
def run_rounds(rig: Rig, rounds: int) -> list[list[Output]]:
    """What each of so many rounds answers to its training; a merge and an evaluation follow where they are asked for."""
    rig.step(Started((), (), OWN))
    told = []
    for number in range(rounds):
        told.append(rig.train(ref(1000 + number, rig.gossip.round)))
        if rig.gossip.phase is Phase.COLLECTING:
            rig.deadline()
        if rig.gossip.phase is Phase.MERGING:
            rig.step(Aggregated(rig.token, ref(2000 + number, rig.gossip.round)))
        rig.step(Evaluated(rig.token, {}))
    return told


def asked(told: list[list[Output]], kind: type) -> list[int]:
    """The rounds that asked for something of this kind."""
    return [number for number, out in enumerate(told) if of(kind, out)]


def test_between_two_exchanges_a_node_only_trains() -> None:
    rig = Rig(A, B, quorum=1, exchange_every=3)
    told = run_rounds(rig, 9)
    assert asked(told, Send) == asked(told, SetTimer) == [2, 5, 8]


def test_what_comes_between_two_exchanges_waits_for_the_next() -> None:
    rig = Rig(A, B, quorum=1, exchange_every=2)
    rig.step(Started((), (), OWN))
    assert rig.arrive(A, ref(3)) == []
    assert rig.train(ref(2)) == [Evaluate(rig.token, ref(2))], "merges nothing, and says nothing of its model"
    rig.step(Evaluated(rig.token, {}))
    assert rig.arrive(A, ref(4)) == [Forget(ref(3))], "the newest of each peer"
    assert rig.arrive(B, ref(5)) == []
    out = rig.train(ref(6, 1))
    assert [send.peer for send in of(Send, out)] == [A, B]
    assert [item.ref for item in of(Aggregate, out)[0].inputs] == [ref(4), ref(5)]


def test_neighbours_out_of_phase_are_not_awaited_twice() -> None:
    """B offers in its rounds 3, 7, 11, which are ours 1, 5, 9: each of our exchanges finds one model of B."""
    rig = Rig(B, quorum=1, exchange_every=4)
    rig.step(Started((), (), OWN))
    merged = []
    for number in range(12):
        if number % 4 == 1:
            rig.arrive(B, ref(3000 + number, number + 2))
        out = rig.train(ref(1000 + number, rig.gossip.round))
        assert not of(SetTimer, out), "nobody waits"
        if of(Aggregate, out):
            merged.append(number)
            rig.step(Aggregated(rig.token, ref(2000 + number, number)))
        rig.step(Evaluated(rig.token, {}))
    assert merged == [3, 7, 11]


def test_a_fraction_of_a_fanout_is_an_expectation() -> None:
    rig = Rig(A, B, C, quorum=0, fanout=0.2)
    told = offered(rig, 1_000)
    assert {len(peers) for peers in told} == {0, 1}
    assert sum(map(len, told)) == pytest.approx(200, abs=40)
    told = offered(Rig(A, B, C, quorum=0, fanout=1.5), 1_000)
    assert {len(peers) for peers in told} == {1, 2}
    assert sum(map(len, told)) == pytest.approx(1_500, abs=50)
    assert all(len(set(peers)) == len(peers) for peers in told)


@pytest.mark.parametrize("fanout", [1, 2])
def test_a_whole_fanout_draws_the_same_as_a_whole_number(fanout: int) -> None:
    assert offered(Rig(A, B, C, quorum=0, fanout=fanout), 50) == offered(
        Rig(A, B, C, quorum=0, fanout=float(fanout)), 50
    )


def test_outside_the_dense_rounds_nobody_is_told_and_nobody_awaited() -> None:
    rig = Rig(A, B, quorum=1, rounds=10, dense_from=0.5, dense_until=0.8)
    for peer in (A, B):
        rig.view.step(0, Received(peer, Heartbeat(5, True)))
    told = run_rounds(rig, 10)
    assert asked(told, Send) == [5, 6, 7]
    assert asked(told, SetTimer) == [5, 6, 7]
    assert rig.gossip.phase is Phase.DONE


def test_who_trains_alone_first_keeps_what_comes_for_the_first_dense_round() -> None:
    """Merged early it would be missing there, and the node would lag by an exchange for good."""
    rig = Rig(A, quorum=1, rounds=10, dense_from=0.2)
    rig.step(Started((), (), OWN))
    rig.arrive(A, ref(3, 2))
    for number in range(2):
        out = rig.train(ref(10 + number, number))
        assert not of(Aggregate, out)
        assert not of(SetTimer, out)
        rig.step(Evaluated(rig.token, {}))
    out = rig.train(ref(12, 2))
    assert of(Aggregate, out) == [Aggregate(rig.token, ref(12, 2), (Input(A, ref(3, 2), 0),))]


def test_a_sparse_exchange_merges_what_has_come() -> None:
    rig = Rig(A, B, quorum=1, rounds=10, dense_from=0.5, sparse_fanout=1e-9)
    rig.step(Started((), (), OWN))
    rig.arrive(A, ref(3))
    out = rig.train(ref(2))
    assert out == [Aggregate(rig.token, ref(2), (Input(A, ref(3), 0),))]


def test_sparse_exchanges_have_a_fanout_of_their_own() -> None:
    rig = Rig(A, B, C, quorum=1, rounds=1_000, dense_from=0.5, sparse_fanout=0.5)
    told = [len([s for s in of(Send, out) if isinstance(s.message, Offer)]) for out in run_rounds(rig, 900)]
    assert set(told[:500]) == {0, 1}
    assert sum(told[:500]) == pytest.approx(250, abs=50)
    assert set(told[500:]) == {3}


@pytest.mark.parametrize(
    ("rounds", "dense_from", "dense_until", "dense"),
    [
        (100, 0.55, 1, range(55, 100)),
        (100, 0.29, 0.57, range(29, 57)),
        (10, 0.997, 1, range(9, 10)),
        (10, 0.5, 0.501, range(5, 6)),
        (1, 0, 0.5, range(1)),
        (40, 0, 1, range(40)),
    ],
)
def test_the_dense_rounds_are_those_that_the_window_touches(
    rounds: int, dense_from: float, dense_until: float, dense: range
) -> None:
    settings = GossipSettings(rounds=rounds, dense_from=dense_from, dense_until=dense_until)
    assert settings.dense_rounds() == dense


def test_every_round_of_a_node_that_learns_for_ever_is_dense() -> None:
    assert MAX_ROUND in GossipSettings().dense_rounds()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rounds": 5, "dense_from": 0.5, "dense_until": 0.5}, "below dense_until"),
        ({"rounds": 5, "dense_from": 1.0}, "below dense_until"),
        ({"dense_from": 0.5}, "shares of rounds"),
        ({"dense_until": 0.5}, "shares of rounds"),
        ({"final_merge": "butterfly"}, "after the last round"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        GossipSettings(**options)


def dense_rig(**rounds: int) -> Rig:
    """A node at the start of its dense rounds, 5 to 7 of 10; of its neighbours is known in which round they are."""
    rig = Rig(*rounds, quorum=1, rounds=10, dense_from=0.5, dense_until=0.8)
    for peer, round_ in rounds.items():
        rig.view.step(0, Received(PeerId(peer), Heartbeat(round_, True)))
    rig.step(Started((), (), ref(1, round_=5)))
    return rig


def test_who_has_left_the_dense_rounds_behind_is_not_awaited() -> None:
    rig = dense_rig(A=8, B=7)
    assert of(SetTimer, rig.train(ref(2, 5)))
    assert of(Aggregate, rig.arrive(B, ref(3, 5))), "A offers nothing any more"
    assert of(Evaluate, dense_rig(A=8).train(ref(2, 5)))


def test_who_comes_to_the_dense_rounds_is_awaited_for_one_deadline() -> None:
    rig = dense_rig(A=2)
    assert of(SetTimer, rig.train(ref(2, 5)))
    rig.deadline()
    rig.step(Evaluated(rig.token, {}))
    assert of(SetTimer, rig.train(ref(3, 6))) == [], "not in every round"
    rig.step(Evaluated(rig.token, {}))
    rig.view.step(0, Received(A, Offer(ref(9, round_=5))))
    assert of(SetTimer, rig.train(ref(4, 7))), "now it is there"


@pytest.mark.parametrize(("now", "after_s"), [(0.0, 10.0), (3.5, 6.5), (20.0, 10.0), (29.0, 1.0)])
def test_a_window_merges_at_the_next_multiple_of_its_length(now: float, after_s: float) -> None:
    rig = at(Phase.TRAINING, window_s=10, quorum=1)
    rig.now = now
    out = rig.train(ref(2))
    assert of(SetTimer, out) == [SetTimer(Timer("learning", "window", rig.token), after_s)]
    assert rig.arrive(A, ref(3)) == rig.arrive(B, ref(4)) == [], "whatever the quorum"
    rig.now += after_s
    out = rig.step(TimerFired(Timer("learning", "window", rig.token)))
    assert [item.peer for item in of(Aggregate, out)[0].inputs] == [A, B]


def test_a_window_holds_without_a_quorum_and_in_sparse_rounds() -> None:
    for options in ({"quorum": 0}, {"quorum": 1, "rounds": 10, "dense_from": 0.5, "sparse_fanout": 1e-9}):
        rig = at(Phase.TRAINING, window_s=10, **options)
        rig.arrive(A, ref(3))
        assert of(SetTimer, rig.train(ref(2)))
        assert rig.gossip.phase is Phase.COLLECTING


def test_between_two_exchanges_no_window_is_awaited() -> None:
    rig = at(Phase.TRAINING, window_s=10, exchange_every=2)
    assert of(Evaluate, rig.train(ref(2)))


# --- the end of learning --------------------------------------------------------------------------------
def test_the_last_round_ends_learning_and_says_so() -> None:
    rig = at(Phase.EVALUATING, rounds=1, keep_every=100, pause_s=10)
    out = rig.step(Evaluated(rig.token, {}))
    assert out[0] == Emit(record(out))
    assert out[1:] == [
        Keep(ref(4, round_=1)),
        Emit(LearningDone(round=1)),
        Send(A, Heartbeat(1, False)),
        Send(B, Heartbeat(1, False)),
        Forget(OWN),
    ]
    assert rig.gossip.phase is Phase.DONE
    assert not rig.exchange.open


def test_the_final_model_is_offered_to_whoever_links_up_later() -> None:
    rig = at(Phase.DONE)
    assert rig.link(C) == [Send(C, Offer(ref(4, round_=1)))]


def test_a_node_started_after_its_last_round_only_serves() -> None:
    rig = Rig(A, rounds=5)
    assert rig.step(Started((), (), ref(1, round_=5))) == [
        Emit(LearningDone(round=5)),
        Send(A, Heartbeat(5, False)),
    ]
    assert rig.gossip.phase is Phase.DONE


def test_models_that_arrive_after_the_end_are_let_go() -> None:
    rig = at(Phase.DONE)
    assert rig.arrive(A, ref(9)) == [Forget(ref(9))]
    assert rig.gossip._inbox == {}


def test_models_that_wait_at_the_end_are_let_go() -> None:
    rig = at(Phase.EVALUATING, rounds=1)
    rig.arrive(B, ref(9))
    assert Forget(ref(9)) in rig.step(Evaluated(rig.token, {}))


def test_rounds_that_are_skipped_end_learning_too() -> None:
    rig = at(Phase.MERGING, rounds=3)
    rig.exchange.hold(ref(5))
    rig.gossip._merging = (Input(A, ref(3, round_=8), 0), Input(B, ref(5, round_=8), 0))
    rig.step(Aggregated(rig.token, ref(4)))
    rig.step(Evaluated(rig.token, {}))
    assert (rig.gossip.phase, rig.gossip.round) == (Phase.DONE, 9)


# --- before the final merge (tests/protocols/test_final_merge.py has the rest) ----------------------------
def test_the_last_round_is_followed_by_the_final_merge() -> None:
    rig = at(Phase.EVALUATING, rounds=1, final_merge="butterfly", final_deadline_s=7)
    rig.arrive(B, ref(9))
    out = rig.step(Evaluated(rig.token, {}))
    assert out == [
        Emit(record(out)),
        Keep(ref(4, round_=1)),
        Forget(ref(9)),
        Forget(OWN),
        Send(A, Heartbeat(1, True)),
        Send(B, Heartbeat(1, True)),
        SetTimer(Timer("learning", "gather", rig.token), 7),
    ]
    assert rig.exchange.open
    assert rig.view.active


def test_models_of_rounds_mean_nothing_to_the_final_merge() -> None:
    rig = at(Phase.FINAL)
    assert rig.arrive(B, ref(70, round_=1)) == [Forget(ref(70, round_=1))]


@pytest.mark.parametrize(
    "phase", [phase for phase in PHASES if phase not in (Phase.FINAL, Phase.DONE, Phase.CATCHING_UP)]
)
def test_models_of_the_final_merge_mean_nothing_to_rounds(phase: Phase) -> None:
    rig = at(phase, rounds=5, final_merge="butterfly")
    assert rig.arrive(B, ref(70, round_=7)) == []
    assert B not in rig.gossip._inbox
    assert rig.gossip.phase is phase


def test_nobody_jumps_beyond_the_last_round_with_a_final_merge_ahead() -> None:
    rig = at(Phase.MERGING, rounds=3, final_merge="butterfly")
    rig.exchange.hold(ref(5))
    rig.gossip._merging = (Input(A, ref(3, round_=8), 0), Input(B, ref(5, round_=8), 0))
    rig.step(Aggregated(rig.token, ref(4)))
    rig.step(Evaluated(rig.token, {}))
    assert (rig.gossip.phase, rig.gossip.round, rig.gossip.own.round) == (Phase.FINAL, 3, 3)


def test_who_waits_for_the_final_merge_is_neither_awaited_nor_offered_models() -> None:
    rig = at(Phase.TRAINING, rounds=5, final_merge="butterfly")
    rig.beat(A, active=True)
    rig.view.step(0, Received(B, Heartbeat(5, True)))
    out = rig.train(ref(2))
    assert [send.peer for send in of(Send, out)] == [A]
    assert of(Aggregate, rig.arrive(A, ref(3)))


# --- what goes wrong ------------------------------------------------------------------------------------
def trouble(out: Iterable[Output]) -> list[Trouble]:
    return [item.record for item in of(Emit, out) if isinstance(item.record, Trouble)]


def test_failed_training_is_told_and_tried_again_after_a_rest() -> None:
    rig = at(Phase.TRAINING, pause_s=0)
    out = rig.step(WorkFailed(rig.token, "no memory"))
    assert trouble(out) == [Trouble(what="training", detail="no memory")]
    assert of(SetTimer, out) == [SetTimer(Timer("learning", "pause", rig.token), 5)]
    again = rig.step(TimerFired(Timer("learning", "pause", rig.token)))
    assert again == [Train(rig.token, ref(1, round_=1), 1)], (
        "the same round would draw the same batches and fail again"
    )


def test_a_model_that_cannot_be_trained_on_gives_way_to_the_last_one_that_could() -> None:
    rig = at(Phase.MERGING, pause_s=0)
    rig.step(Aggregated(rig.token, ref(4)))
    (train,) = of(Train, rig.step(Evaluated(rig.token, {})))
    assert train.ref.digest == ref(4).digest
    out = rig.step(WorkFailed(rig.token, "made 0.weight non-finite"))
    assert of(Forget, out) == [Forget(ref(4, round_=1))]
    (train,) = of(Train, rig.step(TimerFired(Timer("learning", "pause", rig.token))))
    assert (train.ref.digest, train.round) == (OWN.digest, 2)


def test_without_a_better_model_of_its_own_a_node_merges_what_it_was_given() -> None:
    rig = at(Phase.TRAINING)
    rig.arrive(A, ref(9))
    out = rig.step(WorkFailed(rig.token, "boom"))
    assert [item.peer for item in of(Aggregate, out)[0].inputs] == [A]
    assert rig.gossip.phase is Phase.MERGING


def test_a_failed_merge_goes_on_with_the_own_model_and_counts_nothing_as_merged() -> None:
    rig = at(Phase.MERGING)
    out = rig.step(WorkFailed(rig.token, "boom"))
    assert trouble(out) == [Trouble(what="merging", detail="boom")]
    assert set(of(Forget, out)) == {Forget(ref(3))}
    assert of(Evaluate, out) == [Evaluate(rig.token, ref(2))]
    assert record(rig.step(Evaluated(rig.token, {}))).num_merged == 0


def test_a_failed_evaluation_ends_the_round_without_metrics() -> None:
    rig = at(Phase.EVALUATING)
    out = rig.step(WorkFailed(rig.token, "boom"))
    assert trouble(out) == [Trouble(what="evaluating", detail="boom")]
    assert record(out).metrics == {}
    assert rig.gossip.phase is Phase.TRAINING


@pytest.mark.parametrize("phase", PHASES)
def test_stopping_keeps_the_model_in_every_phase(phase: Phase) -> None:
    rig = at(phase)
    (keep,) = rig.step(StopRequested())
    assert isinstance(keep, Keep)
    assert keep.ref.digest == rig.gossip.own.digest
    # Merged but not yet evaluated: further than the checkpoint with which the round began.
    assert keep.ref.round == rig.gossip.round + (phase is Phase.EVALUATING)


def test_stopping_without_a_model_keeps_nothing() -> None:
    assert Rig().step(StopRequested()) == []


def test_the_inbox_does_not_grow_with_everyone_who_ever_passed_by() -> None:
    rig = at(Phase.TRAINING)
    for number in range(100):
        out = rig.arrive(f"passer{number}", ref(100 + number))
        assert len(rig.gossip._inbox) <= 8
    assert out == [Forget(ref(191))]


# --- what is not in the table ---------------------------------------------------------------------------
def every_event(token: int) -> list[Event | Notice]:
    return [
        Started((), (), ref(90)),
        PeerUp(A, hello_of(A)),
        PeerDown(A, Reason.LINK),
        Received(A, Heartbeat(3, True)),
        TimerFired(Timer("learning", "deadline", token)),
        Trained(token, ref(91)),
        Aggregated(token, ref(92)),
        Evaluated(token, {}),
        WorkFailed(token, "boom"),
        Fetched(token),
        LinkUp(A, True, ""),
    ]


@pytest.mark.parametrize("phase", PHASES)
def test_what_the_table_does_not_list_changes_nothing(phase: Phase) -> None:
    rig = at(phase)
    before = rig.picture()
    unlisted = [event for event in every_event(rig.token) if (phase, type(event)) not in gossip._TABLE]
    assert unlisted
    for event in unlisted:
        assert rig.step(event) == []
        assert rig.picture() == before


@pytest.mark.parametrize("phase", PHASES)
def test_stale_tokens_change_nothing(phase: Phase) -> None:
    rig = at(phase)
    before = rig.picture()
    for token in (0, rig.token - 1, rig.token + 1):
        for event in every_event(token):
            if isinstance(event, TimerFired | Trained | Aggregated | Evaluated | WorkFailed):
                assert rig.step(event) == []
    assert rig.step(TimerFired(Timer("view", "deadline", rig.token))) == []
    assert rig.picture() == before


def test_a_second_start_changes_nothing() -> None:
    rig = at(Phase.WAITING)
    before = rig.picture()
    assert rig.step(Started((), (), ref(50))) == []
    assert rig.picture() == before


def test_a_model_that_arrives_is_kept_for_later_in_any_phase_but_the_last() -> None:
    for phase in set(Phase) - {Phase.FINAL, Phase.DONE, Phase.COLLECTING}:
        rig = at(phase)
        assert rig.arrive(B, ref(70)) == []
        assert rig.gossip._inbox[B] == ref(70)


# --- the account of holds -------------------------------------------------------------------------------
def test_after_many_rounds_only_what_is_needed_is_held() -> None:
    rng = random.Random(3)
    rig = Rig(A, B, C, quorum=0.5)
    rig.step(Started((), (), OWN))
    forgotten: list[bytes] = []
    fresh = iter(range(100, 10**6))
    for _ in range(5_000):
        match rng.randrange(4), rig.gossip.phase:
            case 0, _:
                out = rig.arrive(rng.choice("ABC"), ref(next(fresh), rig.gossip.round))
            case 1, Phase.COLLECTING:
                out = rig.deadline()
            case _, Phase.TRAINING:
                out = rig.train(ref(next(fresh), rig.gossip.round))
            case 1, Phase.MERGING | Phase.EVALUATING:
                out = rig.step(WorkFailed(rig.token, "boom"))
            case _, Phase.MERGING:
                out = rig.step(Aggregated(rig.token, ref(next(fresh), rig.gossip.round)))
            case _, Phase.EVALUATING:
                out = rig.step(Evaluated(rig.token, {}))
            case _:
                out = []
        forgotten += [item.ref.digest for item in of(Forget, out)]
        item = rig.gossip
        needed = [item._own, item._trained, item._sound, *item._inbox.values(), *rig.exchange._offered]
        if item.phase is Phase.MERGING:
            needed += [model.ref for model in item._merging]
        assert set(rig.exchange._held) == {model.digest for model in needed if model}
    assert len(forgotten) == len(set(forgotten)) > 1_000
    assert rig.gossip.round > 500


def test_nobody_waits_for_company_after_a_restart() -> None:
    rig = Rig(wait_for_peers=3)
    assert rig.step(Started((), (), ref(1, round_=4))) == [Train(1, ref(1, round_=4), 4)]
