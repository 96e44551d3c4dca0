"""A node that comes late, or back after an absence, goes on from its neighbours' models and drags nobody back."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from protocols.events import (
    Aggregate,
    Aggregated,
    CaughtUp,
    Effect,
    Emit,
    Fetch,
    Fetched,
    FetchFailed,
    FetchGaveUp,
    Forget,
    Keep,
    LinkDown,
    PeerDown,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
    Train,
    WorkFailed,
)
from protocols.gossip import MAX_LEAP, Phase
from protocols.messages import Heartbeat, LinkMessage, Offer
from protocols.vocabulary import MAX_ROUND, ModelRef, PeerId, Reason
from tests.protocols.sampled_network import Node, SampledNetwork
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
    assert not of(Aggregate, rig.arrive(A, ref(10, 500)))
    assert rig.arrive(B, ref(11, 499)) == []
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


def test_while_it_catches_up_no_more_models_are_fetched_than_it_needs() -> None:
    peers = [PeerId(name) for name in "ABCDEF"]
    rig = late(*peers)
    rig.train(ref(2))
    offers = [Received(peer, Offer(ref(10 + i, 500))) for i, peer in enumerate(peers)]
    first, *others = of(Fetch, [out for offer in offers for out in rig.exchange.step(0, offer)])
    assert [fetch.peer for fetch in (first, *others)] == peers[:3]
    failed = rig.exchange.step(0, FetchFailed(first.token, Reason.GONE))
    (instead,) = of(Fetch, failed)
    assert instead.peer == peers[3]
    arrived = [rig.exchange.step(0, Fetched(fetch.token)) for fetch in (*others, instead)]
    assert [len(of(Fetch, out)) for out in arrived] == [0, 0, 1], "three have come; the rest come one by one"
    out = [rig.step(notice) for notice, *_ in arrived][-1]
    rig.step(Aggregated(of(Aggregate, out)[0].token, ref(20, 500)))
    more = [Received(peer, Offer(ref(30 + i, 501))) for i, peer in enumerate(peers[:3])]
    assert len(of(Fetch, [out for offer in more for out in rig.exchange.step(0, offer)])) == 3, (
        "four at once again"
    )


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
    (deadline,) = of(SetTimer, rig.train(ref(2)))
    rig.now = 3
    (timer,) = of(SetTimer, rig.arrive(A, ref(10, 500)))
    assert timer.after_s == 3, "the others are waited for as long as the first took"
    assert rig.step(TimerFired(deadline.timer)) == []
    rig.now = 6
    assert caught_up(rig.step(TimerFired(timer.timer))).num_models == 1


@pytest.mark.parametrize(("took_s", "patience_s"), [(0.1, 1), (5, 5), (50, 20)])
def test_it_waits_no_longer_for_a_slow_neighbour_than_for_the_first(took_s: float, patience_s: float) -> None:
    rig = late(A, B, C, catch_up_s=20)
    rig.train(ref(2))
    rig.now = took_s
    (timer,) = of(SetTimer, rig.arrive(A, ref(10, 500)))
    assert timer.after_s == patience_s
    assert rig.arrive(B, ref(11, 500)) == []


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


@pytest.mark.parametrize("silent", [(), (B, C)])
def test_a_newcomer_that_waits_for_company_trains_nothing_in_vain(silent: tuple[PeerId, ...]) -> None:
    """Of those who have only just greeted it does not know where they are."""
    rig = Rig(rounds=0, wait_for_peers=1)
    rig.step(Started((), (), OWN))
    for peer in (A, *silent):
        assert rig.link(peer) == []
    for peer in (A, *silent):
        assert rig.gossip.phase is Phase.CATCHING_UP if peer == C else Phase.WAITING
        beat = Received(peer, Heartbeat(500, True))
        rig.view.step(0, beat)
        assert not of(Train, rig.step(beat))
    assert rig.gossip.phase is Phase.CATCHING_UP


# --- under `sampled` ------------------------------------------------------------------------------------
def joined(seed: int, pretend: Callable[[Offer], Offer] = lambda offer: offer) -> tuple[Node, list[Fetch]]:
    """A newcomer three seconds after it came to a network that is under way, and what it asked for.

    pretend: what becomes of the offers that it gets from `n0`, which every node dials first.
    """
    net = SampledNetwork(12, seed, degree=6, rounds=0, pause_s=6.0, sample_size=8, wait_for_members=12)
    assert net.run_to_round(4, 90)
    fetches: list[Fetch] = []

    def watch(node: Node, effect: Effect) -> None:
        if node.peer == "late" and isinstance(effect, Fetch):
            fetches.append(effect)

    def tamper(me: PeerId, peer: PeerId, message: LinkMessage) -> LinkMessage:
        lies = (me, peer) == ("n0", "late") and isinstance(message, Offer)
        return pretend(message) if lies else message  # type: ignore[arg-type]

    net.watch, net.tamper = watch, tamper
    newcomer = net.add("late", after_s=0)
    net.run(net.now + 3)
    return newcomer, fetches


def test_a_newcomer_pulls_one_aggregate_from_all_neighbours_that_have_it() -> None:
    for seed in range(4):
        newcomer, (first, *_) = joined(seed)
        assert len(first.others) >= 1, f"seed {seed}"
        assert newcomer.sampling.own is not None
        assert newcomer.sampling.own.round >= first.ref.round >= 3, f"seed {seed}"


def test_a_neighbour_that_offers_what_it_does_not_have_stops_no_newcomer() -> None:
    """It outbids the others by a round, and nobody has those bytes."""
    for seed in range(4):
        newcomer, _ = joined(
            seed, lambda offer: Offer(replace(offer.ref, digest=bytes(32), round=offer.ref.round + 9))
        )
        assert newcomer.sampling.own is not None
        assert newcomer.sampling.own.round >= 2, f"seed {seed}"


def test_after_the_only_offer_has_failed_another_one_is_taken() -> None:
    """No two neighbours have the same, so that the highest bid is taken first: a false one."""
    net = SampledNetwork(3, rounds=0)
    me = net.nodes[PeerId("n0")]
    assert net.run(30, lambda: len(me.core.view.learners()) == 2 and me.sampling.own is not None)  # type: ignore[union-attr]
    sampling = me.sampling
    sampling._own = ref(1)
    sampling._exchange.hold(ref(1))
    high, low = ref(10, sampling.round + 9), ref(11, sampling.round + 8)
    assert not of(Fetch, sampling.step(0, Received(PeerId("n1"), Offer(high))))
    assert not of(Fetch, sampling.step(0, Received(PeerId("n2"), Offer(low))))
    (fetch,) = of(Fetch, sampling._end_gathering(0))
    assert (fetch.peer, fetch.ref) == ("n1", high)
    out = sampling._exchange.step(0, FetchFailed(fetch.token, Reason.GONE))
    (gave_up,) = of(FetchGaveUp, out)
    (again,) = of(Fetch, sampling.step(0, gave_up))
    assert (again.peer, again.ref) == ("n2", low)


def test_who_waits_for_neighbours_that_have_gone_goes_on_alone() -> None:
    rig = late(A)
    rig.train(ref(2))
    assert rig.gossip.phase is Phase.CATCHING_UP
    down = LinkDown(A, Reason.LINK)
    for event in (down, PeerDown(A, Reason.LINK)):
        rig.view.step(1, event)
        out = rig.step(event)
    assert of(Train, out)[0].ref == OWN
