"""The peers that a node knows: bounded, hard to fill with lies, and the same whatever the order of news."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.address_book import INTRODUCED_SHARE, KEPT_ADDRESSES, AddressBook
from protocols.vocabulary import MAX_ADDRESSES, PeerId, PeerRecord
from tests.protocols.identities import signed_record

law = settings(derandomize=True, deadline=None, max_examples=200)
ME, A, B = PeerId("me"), PeerId("A"), PeerId("B")


def address(peer: str, port: int = 1) -> str:
    return f"/ip4/10.0.0.1/tcp/{port}/p2p/{peer}"


def told(peer: str, *ports: int, **fields: object) -> PeerRecord:
    return signed_record(peer, *(address(peer, port) for port in ports or (1,)), **fields)


def make(max_known: int = 16, *fixed: str) -> AddressBook:
    return AddressBook(ME, [address(peer) for peer in fixed], max_known)


def meet(book: AddressBook, peer: PeerId) -> None:
    book.take(told(peer), None, ())
    entry = book.get(peer)
    assert entry
    entry.met = True


names = st.sampled_from([PeerId(f"p{number}") for number in range(30)])
news = st.builds(
    told,
    names,
    st.integers(1, 3),
    incarnation=st.integers(0, 3),
    left=st.booleans(),
    round=st.integers(0, 2),
)


# --- laws -----------------------------------------------------------------------------------------------
@law
@given(st.lists(news, max_size=20), st.randoms(use_true_random=False))
def test_the_order_of_news_does_not_matter_to_what_is_believed(
    records: list[PeerRecord], rng: random.Random
) -> None:
    believed = []
    for order in (records, rng.sample(records, len(records)), records * 2):
        book = make(max_known=64)
        for peer in {record.peer for record in records}:
            book.learn(address(peer))
        for record in order:
            book.take(record, A, ())
        believed.append({peer: entry.record for peer, entry in book.items()})
    assert believed[0] == believed[1] == believed[2]


@law
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), news, st.sampled_from([A, B, None])),
            st.tuples(st.just("learn"), names, st.none()),
            st.tuples(st.just("meet"), names, st.none()),
        ),
        max_size=80,
    ),
    st.sets(names, max_size=3),
)
def test_a_book_stays_in_its_bounds_and_keeps_whom_it_must(
    script: list[tuple[str, object, PeerId | None]], keep: set[PeerId]
) -> None:
    book, most = make(8, "boot"), 8
    for what, item, introducer in script:
        held = {peer: (entry.met and not entry.gone) for peer, entry in book.items()}
        if what == "take":
            book.take(item, introducer, keep)
        elif what == "learn":
            book.learn(address(item), keep=keep)
        else:
            meet(book, item) if book.take(told(item), None, keep) else None
        assert len(book) <= most
        assert "boot" in list(book)
        lost = set(held) - set(book)
        assert not lost & keep
        if what == "learn" or introducer:
            assert not any(held[peer] for peer in lost), "hearsay pushes out nobody who was met"
        for liar in (A, B):
            assert book.count(liar) <= max(1, most // INTRODUCED_SHARE)


# --- who goes -------------------------------------------------------------------------------------------
def test_a_neighbour_fills_a_quarter_with_peers_that_nobody_met_and_no_more() -> None:
    book = make(max_known=40)
    for number in range(100):
        book.take(told(f"p{number}"), A, ())
    assert book.count(A) == len(book) == 10
    for number in range(100):
        book.take(told(f"q{number}"), B, ())
    assert (book.count(A), book.count(B), len(book)) == (10, 10, 20)


def test_one_who_was_met_is_nobody_s_hearsay_any_more() -> None:
    book = make(max_known=8)
    for number in range(6):
        book.take(told(f"p{number}"), A, ())
        entry = book.get(PeerId(f"p{number}"))
        assert entry
        entry.met = True
    assert len(book) == 6
    assert book.count(A) == 0


def test_who_left_goes_before_who_was_never_met_and_they_before_who_failed() -> None:
    book = make(max_known=8)
    for number in range(8):
        meet(book, PeerId(f"p{number}"))
    book.take(told("p3", incarnation=1, left=True), A, ())
    for peer, failures in (("p5", 2), ("p6", 1)):
        entry = book.get(PeerId(peer))
        assert entry
        entry.failures = failures
    gone = []
    for number in range(4):
        before = set(book)
        meet(book, PeerId(f"new{number}"))
        gone += before - set(book)
    assert gone[:3] == ["p3", "p5", "p6"]
    book.take(told("unmet"), A, ())
    assert "unmet" not in set(book), "all were met, and seem to be there"


def test_one_who_has_left_and_was_never_known_is_not_remembered() -> None:
    book = make()
    assert not book.take(told("p", left=True), A, ())
    assert len(book) == 0


# --- addresses ------------------------------------------------------------------------------------------
def test_an_address_of_another_peer_or_of_nobody_is_not_taken() -> None:
    book = make()
    book.learn("/ip4/10.0.0.1/tcp/1")
    book.learn(address(ME))
    assert len(book) == 0
    book.take(signed_record(A, address(B), "nonsense", address(A, 2)), None, ())
    entry = book.get(A)
    assert entry
    assert entry.addresses == (address(A, 2),)


def test_the_operator_s_addresses_stay_and_of_others_the_newest_few() -> None:
    book = make(16, "A")
    for number in range(1, 9):
        book.take(told(A, *range(10 * number, 10 * number + 6), incarnation=number), None, ())
        entry = book.get(A)
        assert entry
        assert address(A) in entry.addresses
        assert len(entry.addresses) <= KEPT_ADDRESSES + 1 <= MAX_ADDRESSES
        assert entry.addresses[0] == address(A, 10 * number)


def test_a_newer_word_clears_a_suspicion_and_an_equal_incarnation_does_not() -> None:
    book = make()
    meet(book, A)
    entry = book.get(A)
    assert entry
    entry.suspected = True
    book.take(told(A, round=5), B, ())
    assert entry.suspected
    book.take(told(A, incarnation=1), B, ())
    assert not entry.suspected


# --- samples --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "num_met"), [(0, 0), (3, 2), (4, 2), (6, 3), (100, 3)])
def test_half_of_a_sample_was_met_and_all_of_it_seems_to_be_there(count: int, num_met: int) -> None:
    book = make(max_known=64)
    for number in range(5):
        meet(book, PeerId(f"met{number}"))
    for number in range(5):
        book.take(told(f"heard{number}"), A, ())
    book.take(signed_record("hidden"), A, ())
    book.take(told("met0", incarnation=1, left=True), A, ())
    suspect = book.get(PeerId("heard0"))
    assert suspect
    suspect.suspected = True
    book.learn(address("found"))
    drawn = [record.peer for record in book.sample(random.Random(1), count, ("met1",))]
    assert len(drawn) == len(set(drawn)) == min(count, 7)
    assert not {"hidden", "met0", "met1", "heard0", "found"} & set(drawn)
    assert sum(peer.startswith("met") for peer in drawn) == num_met
    assert count < 4 or "heard4" in drawn, "whoever was heard of last gets around"
