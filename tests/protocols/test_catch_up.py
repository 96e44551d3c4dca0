"""A node that comes late, or back after an absence, goes on from its neighbours' models and drags nobody back."""

import pytest

from protocols.events import (
    Aggregate,
    Aggregated,
    CaughtUp,
    Emit,
    Forget,
    Keep,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
    Train,
    WorkFailed,
)
from protocols.gossip import MAX_LEAP, Phase
from protocols.messages import Heartbeat
from protocols.vocabulary import MAX_ROUND, ModelRef, PeerId
from tests.protocols.test_gossip import OWN, A, B, C, Rig, of, ref

D = PeerId("D")


def tell(rig: Rig, round_: int, *peers: PeerId) -> None:
    for peer in peers:
        rig.view.step(rig.now, Received(peer, Heartbeat(round_, True)))


def late(*peers: PeerId, **options: object) -> Rig:
    """A newcomer whose neighbours are in round 500, and whose first training has just ended."""
    rig = Rig(*peers, **{"rounds": 1000, **options})
    rig.step(Started((), (), OWN))
    tell(rig, 500, *peers)
    return rig


def caught_up(out: list) -> CaughtUp:
    (found,) = [each.record for each in of(Emit, out) if isinstance(each.record, CaughtUp)]
    return found


def test_what_a_newcomer_trained_before_it_knew_is_offered_to_nobody() -> None:
    rig = late(A, B, C)
    out = rig.train(ref(2))
    assert not of(Send, out)
    assert of(Forget, out) == [Forget(ref(2))]
    assert rig.gossip.phase is Phase.CATCHING_UP


def test_it_goes_on_from_the_mean_of_three_neighbours() -> None:
    rig = late(A, B, C, D)
    rig.train(ref(2))
    assert rig.arrive(A, ref(10, 500)) == rig.arrive(B, ref(11, 499)) == []
    (merge,) = of(Aggregate, rig.arrive(C, ref(12, 501)))
    assert (merge.own, [item.peer for item in merge.inputs]) == (ref(10, 500), [B, C])
    assert all(item.staleness == 0 for item in merge.inputs)
    out = rig.step(Aggregated(rig.token, ref(20, 500)))
    assert caught_up(out) == CaughtUp(500, 0, 3, 0.0)
    (train,) = of(Train, out)
    assert (train.ref.digest, train.round) == (ref(20).digest, 500)
    assert of(Keep, out)[0].ref == train.ref
    assert {each.ref for each in of(Forget, out)} >= {OWN}
    assert rig.exchange._held == {ref(20).digest: 1}


def test_by_policy_its_own_model_is_merged_with_them() -> None:
    rig = late(A, catch_up="merge")
    rig.train(ref(2))
    (merge,) = of(Aggregate, rig.arrive(A, ref(10, 500)))
    assert (merge.own.digest, [item.peer for item in merge.inputs]) == (OWN.digest, [A])


def test_by_policy_it_goes_on_as_if_nothing_were() -> None:
    rig = late(A, catch_up="off")
    assert of(Send, rig.train(ref(2)))
    assert rig.gossip.phase is Phase.COLLECTING


def test_one_neighbour_is_enough_where_there_are_no_others() -> None:
    rig = late(A)
    rig.train(ref(2))
    out = rig.arrive(A, ref(10, 500))
    assert (caught_up(out).num_models, of(Train, out)[0].ref.digest) == (1, ref(10).digest)


def test_a_node_that_was_away_for_a_day_catches_up_before_it_trains() -> None:
    rig = Rig(A, rounds=0)
    tell(rig, 900, A)
    out = rig.step(Started((), (), ref(1, 400)))
    assert (rig.gossip.phase, of(Train, out)) == (Phase.CATCHING_UP, [])
    out = rig.arrive(A, ref(10, 900))
    assert (caught_up(out).from_round, of(Train, out)[0].round) == (400, 900)


def test_models_that_are_stale_themselves_do_not_count() -> None:
    rig = late(A, B, C)
    rig.train(ref(2))
    rig.arrive(A, ref(10, 3))
    assert rig.gossip._recent() == {}


def test_after_a_wait_in_vain_it_trains_alone_for_a_while() -> None:
    rig = late(A, catch_up_s=30)
    (timer,) = of(SetTimer, rig.train(ref(2)))
    rig.now = 30
    assert of(Train, rig.step(TimerFired(timer.timer)))
    assert of(Send, rig.train(ref(3)))
    assert rig.gossip.phase is Phase.COLLECTING


def test_it_takes_what_has_come_when_its_wait_is_over() -> None:
    rig = late(A, B, C)
    (timer,) = of(SetTimer, rig.train(ref(2)))
    rig.arrive(A, ref(10, 500))
    assert caught_up(rig.step(TimerFired(timer.timer))).num_models == 1


def test_a_merge_that_fails_loses_nothing() -> None:
    rig = late(A, B)
    rig.train(ref(2))
    rig.arrive(A, ref(10, 500))
    rig.arrive(B, ref(11, 500))
    out = rig.step(WorkFailed(rig.token, "the rule does not like them"))
    assert of(Train, out)[0].ref == OWN
    assert rig.exchange._held.keys() == {OWN.digest}


@pytest.mark.parametrize("liar_first", [True, False])
def test_a_liar_among_three_cannot_say_where_the_others_are(liar_first: bool) -> None:
    rig = Rig(A, B, C, rounds=0)
    rig.step(Started((), (), OWN))
    liar, *honest = (A, B, C) if liar_first else (C, A, B)
    tell(rig, MAX_ROUND, liar)
    tell(rig, 3, *honest)
    assert of(Send, rig.train(ref(2)))


def test_a_lone_liar_gains_a_bounded_leap() -> None:
    rig = Rig(A, rounds=0)
    rig.step(Started((), (), OWN))
    tell(rig, MAX_ROUND, A)
    rig.train(ref(2))
    assert caught_up(rig.arrive(A, ref(10, MAX_ROUND))).round == MAX_LEAP


def test_a_model_that_is_far_behind_is_not_merged() -> None:
    rig = Rig(A, B, quorum=1, max_staleness=50, rounds=0)
    rig.step(Started((), (), ref(1, 100)))
    rig.train(ref(2, 100))
    rig.arrive(A, ref(3, 49))
    rig.arrive(B, ref(4, 50))
    (merge,) = of(Aggregate, rig.deadline())
    assert [(item.peer, item.staleness) for item in merge.inputs] == [(B, 50)]


def test_a_network_that_is_done_is_caught_up_with_too() -> None:
    rig = Rig(A, rounds=100)
    rig.step(Started((), (), OWN))
    rig.view.step(0, Received(A, Heartbeat(100, False)))
    rig.train(ref(2))
    out = rig.arrive(A, ref(10, 100))
    assert (rig.gossip.phase, rig.gossip.own) == (Phase.DONE, ModelRef(ref(10).digest, 100, 100, 10))
    assert caught_up(out).round == 100
