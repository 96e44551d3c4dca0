"""Who is drawn: the same everywhere, fairly, from records that come in any order."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import protocols
from protocols.population import MAX_ASKED_TIMES, ORDERS, Draw, Population, beacon_order, md5_order, ordered
from protocols.signing import is_newer
from protocols.vocabulary import CENSUS_BYTES, DIGEST_BYTES, MAX_SAMPLE, PeerId, PeerRecord

law = settings(derandomize=True, deadline=None, max_examples=200)
README = (Path(protocols.__file__).parent / "README.md").read_text(encoding="utf-8")
ME = PeerId("me")
BEACON = bytes(DIGEST_BYTES)


def population(max_members: int = 100, window: int = 10) -> Population:
    return Population(ME, max_members, window, md5_order)


def record(peer: str, incarnation: int = 0, left: bool = False, round_: int = 0, mark: int = 0) -> PeerRecord:
    return PeerRecord(peer, (), incarnation, left, round_, bytes([mark]) * 64)


def filled(records: list[PeerRecord], **kinds: int) -> Population:
    made = population(**kinds)
    for each in records:
        made.take(each)
    return made


def names(count: int) -> list[PeerId]:
    return [PeerId(f"n{i}") for i in range(count)]


# --- the order ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("round_", "expected"), [(1, "dceab"), (2, "deacb"), (3, "bdaec")])
def test_the_order_of_the_papers(round_: int, expected: str) -> None:
    """MD5 of id, dash and round."""
    assert "".join(ordered(map(PeerId, "abcde"), round_, BEACON, md5_order)) == expected


def test_the_order_of_the_wire_specification() -> None:
    (told,) = re.findall(r"sampling order: ([a-e ]+)", README)
    assert " ".join(ordered(map(PeerId, "abcde"), 1, BEACON, beacon_order)) == told


@pytest.mark.parametrize("order", sorted(ORDERS))
@given(seed=st.integers(0, 2**32), round_=st.integers(0, 2**48), beacon=st.binary(min_size=32, max_size=32))
@law
def test_the_order_does_not_depend_on_who_came_first(
    order: str, seed: int, round_: int, beacon: bytes
) -> None:
    peers = names(12)
    mixed = random.Random(seed).sample(peers, len(peers))
    assert ordered(mixed, round_, beacon, ORDERS[order]) == ordered(peers, round_, beacon, ORDERS[order])


@pytest.mark.parametrize("order", sorted(ORDERS))
@given(round_=st.integers(0, 2**48), dropped=st.integers(0, 19))
@law
def test_without_one_each_other_moves_up_one_place_at_the_most(order: str, round_: int, dropped: int) -> None:
    peers = names(20)
    all_ = ordered(peers, round_, BEACON, ORDERS[order])
    rest = ordered([peer for peer in peers if peer != peers[dropped]], round_, BEACON, ORDERS[order])
    moved = {all_.index(peer) - rest.index(peer) for peer in rest}
    assert moved <= {0, 1}
    # Whoever stood before it stays.
    place = all_.index(peers[dropped])
    assert rest[:place] == all_[:place]


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_samples_under_views_that_differ_overlap(order: str) -> None:
    """Two views of 100 nodes that lack other three each: of ten drawn, at most so many differ as are lacking."""
    peers, rng = names(100), random.Random(1)
    common = []
    for round_ in range(1, 301):
        lacking = rng.sample(peers, 6)
        here = ordered([p for p in peers if p not in lacking[:3]], round_, BEACON, ORDERS[order])[:10]
        there = ordered([p for p in peers if p not in lacking[3:]], round_, BEACON, ORDERS[order])[:10]
        common.append(len({*here} & {*there}))
        assert common[-1] >= 10 - 3
    assert sum(common) / len(common) > 9.4  # three in a hundred of ten, on either side


def test_another_beacon_is_another_order() -> None:
    peers = names(30)
    assert ordered(peers, 5, BEACON, beacon_order) != ordered(peers, 5, b"x" * 32, beacon_order)
    assert ordered(peers, 5, BEACON, md5_order) == ordered(peers, 5, b"x" * 32, md5_order)


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_all_are_drawn_alike(order: str) -> None:
    """10,000 rounds among 20 nodes: the first in order, and the first four, against what chance gives."""
    rng = random.Random(7)
    num, rounds, drawn = 20, 10_000, 4
    firsts: Counter[PeerId] = Counter()
    samples: Counter[PeerId] = Counter()
    for round_ in range(rounds):
        found = ordered(names(num), round_, rng.randbytes(32), ORDERS[order])
        firsts[found[0]] += 1
        samples.update(found[:drawn])
    assert stats.chisquare([firsts[peer] for peer in names(num)]).pvalue > 1e-3
    # Nobody is in one sample twice: the counts vary less, by (n - s) / (n - 1).
    expected = rounds * drawn / num
    spread = sum((samples[peer] - expected) ** 2 for peer in names(num)) / expected
    spread /= (num - drawn) / (num - 1)
    assert stats.chi2.sf(spread, num - 1) > 1e-3
    assert stats.chi2.cdf(spread, num - 1) > 1e-3  # nor too even to be chance


def test_who_is_drawn_can_be_told_from_who_cheats() -> None:
    """The uniformity test has teeth: one that is first four times in ten more often is found."""
    counts = [500] * 19 + [700]
    assert stats.chisquare(counts).pvalue < 1e-3


# --- the records ----------------------------------------------------------------------------------------
records = st.builds(
    record,
    peer=st.sampled_from("abc"),
    incarnation=st.integers(0, 2),
    left=st.booleans(),
    round_=st.integers(0, 2),
    mark=st.integers(0, 1),
)
lists = st.lists(records, max_size=8)


@given(lists, st.randoms(use_true_random=False))
@law
def test_in_whatever_order_records_come(said: list[PeerRecord], rng: random.Random) -> None:
    """Commutative and associative: all ways of taking the same records end alike, also by way of another's view."""
    mixed = said[:]
    rng.shuffle(mixed)
    there = filled(mixed[: len(mixed) // 2])
    by_way = filled(mixed[len(mixed) // 2 :])
    for each in there.records():
        by_way.take(each)
    assert filled(said).records() == filled(mixed).records() == by_way.records()
    assert filled(said).digests == filled(mixed).digests == by_way.digests


@given(lists)
@law
def test_what_is_known_is_no_news(said: list[PeerRecord]) -> None:
    once = filled(said)
    before = once.records()
    assert not any(once.take(each) for each in said)
    assert once.records() == before


@given(lists)
@law
def test_what_is_held_back_comes_to_the_same(said: list[PeerRecord]) -> None:
    held = population()
    for i, each in enumerate(said):
        held.take(each, hold=i % 3 != 0)
    held.fold()
    assert held.records() == filled(said).records()
    assert held.digests == filled(said).digests


@given(records, records, records)
@law
def test_of_one_peers_records_one_is_newest(a: PeerRecord, b: PeerRecord, c: PeerRecord) -> None:
    if a.peer == b.peer == c.peer:
        assert (is_newer(a, b) + is_newer(b, a) == 1) or a == b
        assert not (is_newer(a, b) and is_newer(b, c)) or is_newer(a, c)


def test_leaving_is_undone_by_a_later_incarnation_alone() -> None:
    here = filled([record("a", 4, left=True)])
    assert not here.take(record("a", 4, round_=99))
    assert here.active(0) == [ME]
    assert here.take(record("a", 5))
    assert here.active(0) == ["a", ME]


def test_who_comes_is_held_back_and_who_leaves_is_not() -> None:
    here = filled([record("a"), record("b")])
    assert here.take(record("c"), hold=True)
    assert here.take(record("a", 0, left=True), hold=True)
    assert here.active(0) == ["b", ME]
    here.fold()
    assert here.active(0) == ["b", "c", ME]


def test_who_is_held_back_and_leaves_does_not_come() -> None:
    here = population()
    here.take(record("c", 1), hold=True)
    here.take(record("c", 1, left=True), hold=True)
    here.fold()
    assert here.active(0) == [ME]


def test_who_gives_no_sign_of_life_for_a_window_is_not_drawn() -> None:
    here = filled([record("a", round_=5), record("b", round_=9)], window=10)
    assert here.active(15) == ["a", "b", ME]
    assert here.active(16) == ["b", ME]
    assert sorted(here.order(16, BEACON)) == here.active(16)


# --- bounds ---------------------------------------------------------------------------------------------
def test_a_full_population_takes_nobody_in_while_all_are_there() -> None:
    here = filled([record(f"n{i}") for i in range(8)], max_members=8)
    assert not here.take(record("late"))
    assert len(here) == 8
    here.take(record("n3", 1, left=True))
    assert here.take(record("late"))
    assert len(here) == 8
    assert here.get(PeerId("n3")) is None


def test_whoever_was_not_active_for_a_window_makes_room() -> None:
    """Else those who crashed and never said that they leave would keep newcomers out for ever."""
    here = filled([record(f"n{i}", round_=20 + i) for i in range(8)], max_members=8, window=10)
    assert not here.take(record("late", round_=30))
    assert here.take(record("later", round_=31))
    assert here.get(PeerId("n0")) is None


def test_this_node_makes_room_for_nobody() -> None:
    here = filled([record(ME), *(record(f"n{i}", round_=50) for i in range(7))], max_members=8, window=10)
    assert not here.take(record("late", round_=55))
    assert here.get(ME) is not None


def test_no_more_are_held_back_than_have_room() -> None:
    here = population(max_members=8)
    for i in range(50):
        here.take(record(f"n{i}"), hold=True)
    here.fold()
    assert len(here) == 8


# --- the census -----------------------------------------------------------------------------------------
def test_digests_tell_where_two_differ() -> None:
    said = [record(f"n{i}") for i in range(60)]
    here, there = filled(said), filled(said[:-1])
    assert len(here.digests) == CENSUS_BYTES
    assert here.digests != there.digests
    told = here.differing(there.digests)
    assert said[-1] in told
    assert len(told) < 15
    for each in told:
        there.take(each)
    assert here.digests == there.digests
    assert here.differing(there.digests) == []


def test_a_sign_of_life_changes_no_digest() -> None:
    """Or populations would be compared anew in every window."""
    here = filled([record("a", round_=3)])
    before = here.digests
    here.take(record("a", round_=80))
    assert here.digests == before


# --- drawing --------------------------------------------------------------------------------------------
def drawn(draw: Draw, alive: set[PeerId], rng: random.Random) -> tuple[list[PeerId] | None, int, int]:
    """Answers come in any order. The sample, how many were asked, and in how many goes."""
    asked: list[PeerId] = []
    outstanding: list[PeerId] = []
    goes = 0
    while (sample := draw.sample()) is None:
        if more := draw.ask():
            goes += 1
            asked += more
            outstanding += more
        if draw.sample() is not None:
            continue
        assert outstanding, "nobody is asked, and there is no sample"
        peer = outstanding.pop(rng.randrange(len(outstanding)))
        draw.answered(peer, peer in alive)
    assert len(asked) == len(set(asked))
    return sample, len(asked), goes


@given(
    num=st.integers(0, 40),
    count=st.integers(1, 12),
    share=st.floats(0, 1),
    doubtful=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
@law
def test_the_first_who_are_there_are_drawn_in_whatever_order_they_answer(
    num: int, count: int, share: float, doubtful: float, seed: int
) -> None:
    rng = random.Random(seed)
    order = names(num)
    alive = {peer for peer in order if rng.random() < share}
    doubted = [peer for peer in order if rng.random() < doubtful]
    sample, _, _ = drawn(Draw(order, count, doubted), alive, rng)
    assert sample == [peer for peer in order if peer in alive][:count]


def test_where_all_are_there_few_more_are_asked_than_drawn() -> None:
    order = names(1_000)
    sample, asked, goes = drawn(Draw(order, 10), {*order}, random.Random(1))
    assert sample == order[:10]
    assert asked == 12
    assert goes == 1


def test_where_four_in_five_are_gone_it_takes_few_goes() -> None:
    """One after another would be about fifty waits."""
    rng = random.Random(2)
    worst = 0
    for _ in range(200):
        order = names(300)
        alive = set(rng.sample(order, 60))
        _, asked, goes = drawn(Draw(order, 10), alive, rng)
        worst = max(worst, goes)
        assert asked < 150
    assert worst <= 12


def test_at_no_time_is_the_whole_network_asked() -> None:
    order = names(5_000)
    draw = Draw(order, 10)
    while asked := draw.ask():
        assert len(asked) <= MAX_ASKED_TIMES * 11
        for peer in asked:
            draw.answered(peer, False)
    assert draw.sample() == []


def test_those_who_seem_to_be_gone_are_not_waited_for_long() -> None:
    order = names(10)
    draw = Draw(order, 2, doubtful=order[:3])
    assert draw.ask() == order[:6]  # three in place of the doubtful
    for peer in order[3:6]:
        draw.answered(peer, True)
    assert draw.sample() is None  # one of the first three may still answer
    draw.answered(order[1], True)
    draw.give_up_doubtful()
    assert draw.sample() == [order[1], order[3]]


def test_an_answer_that_was_not_asked_for_means_nothing() -> None:
    draw = Draw(names(5), 1)
    draw.answered(PeerId("n0"), True)
    assert draw.sample() is None
    draw.ask()
    draw.answered(PeerId("n0"), False)
    draw.answered(PeerId("n0"), True)  # too late
    draw.answered(PeerId("n1"), True)
    assert draw.sample() == ["n1"]


def test_a_sample_fits_a_message() -> None:
    assert MAX_SAMPLE * 128 < 64 * 1024
