"""The log as a set: whatever comes in which order, how often, cut and sealed where, the same records give the same log."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.scalar_log import Outcome, ScalarLog, signed_bytes
from protocols.vocabulary import Checkpoint, ModelRef, ScalarRecord

BASE = bytes(32)
law = settings(deadline=None, max_examples=60, derandomize=True)


def author(number: int) -> bytes:
    return hashlib.sha256(f"author {number}".encode()).digest()


def record(number: int, round_: int, codes: bytes = b"\x40", built_on: bytes = bytes(16)) -> ScalarRecord:
    return ScalarRecord(author(number), round_, codes, built_on, bytes(64))


def log_of(*records: ScalarRecord, max_authors: int = 100) -> ScalarLog:
    log = ScalarLog(BASE, max_authors)
    for each in records:
        log.add(each)
    return log


records = st.lists(
    st.builds(
        record,
        st.integers(0, 4),
        st.integers(1, 6),
        st.sampled_from([b"\x40", b"\x41", b""]),
        st.sampled_from([bytes(16), b"x" * 16]),
    ),
    max_size=40,
)


@law
@given(records, st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(them: list[ScalarRecord], rng: random.Random) -> None:
    shuffled = [*them, *them]
    rng.shuffle(shuffled)
    one, other = log_of(*them), log_of(*shuffled)
    assert one.chain(6) == other.chain(6)
    assert one.range(1, 6) == other.range(1, 6)
    assert [one.counting(n) for n in range(1, 7)] == [other.counting(n) for n in range(1, 7)]
    assert (one.num_records, one.num_void) == (other.num_records, other.num_void)
    assert list(one.ids(1, 6)) == list(other.ids(1, 6))


@law
@given(records, st.lists(st.integers(1, 6), max_size=4))
def test_where_it_is_sealed_and_cut_does_not_change_the_digest(
    them: list[ScalarRecord], seals: list[int]
) -> None:
    whole, log = log_of(*them), log_of(*them)
    for round_ in sorted(seals):
        log.seal(round_)
        assert log.num_counted(6) == whole.count(1, 6)
        log.drop(round_ - 1)
    assert log.chain(6) == whole.chain(6)


@law
@given(records, records)
def test_the_digest_tells_apart_what_counts_differently(
    one: list[ScalarRecord], other: list[ScalarRecord]
) -> None:
    a, b = log_of(*one), log_of(*other)
    same = [a.counting(n) for n in range(1, 7)] == [b.counting(n) for n in range(1, 7)]
    slots = set(a.ids(1, 6)) == set(b.ids(1, 6))
    assert (a.chain(6) == b.chain(6)) == slots
    assert same or not slots


@law
@given(records, records)
def test_two_logs_become_equal_by_what_each_lacks(one: list[ScalarRecord], other: list[ScalarRecord]) -> None:
    a, b = log_of(*one), log_of(*other)
    for source, target in ((a, b), (b, a), (a, b)):
        lacking = set(source.ids(1, 6)) - set(target.ids(1, 6))
        for each in source.select(1, 6, lacking.__contains__, len(lacking)):
            target.add(each)
    assert a.chain(6) == b.chain(6)


def test_a_record_counts_until_it_is_contradicted() -> None:
    log = log_of(record(0, 3), record(1, 3))
    assert [each.author for each in log.counting(3)] == sorted([author(0), author(1)])
    assert log.add(record(0, 3, b"\x41")) is Outcome.VOIDED
    assert [each.author for each in log.counting(3)] == [author(1)]
    assert log.add(record(0, 3, b"\x42")) is Outcome.KNOWN
    assert log.count(3, 3) == 2, "the slot is taken"
    assert len(list(log.records())) == 3, "the proof stays"


def test_another_state_under_the_same_codes_is_a_contradiction_and_another_signature_is_none() -> None:
    log = log_of(record(0, 3))
    again = ScalarRecord(author(0), 3, b"\x40", bytes(16), b"s" * 64)
    assert log.add(again) is Outcome.KNOWN
    assert log.add(record(0, 3, built_on=b"y" * 16)) is Outcome.VOIDED


@given(st.integers(0, 20))
@law
def test_a_crowded_round_keeps_the_same_authors_in_any_order(seed: int) -> None:
    them = [record(number, 2) for number in range(20)]
    random.Random(seed).shuffle(them)
    log = log_of(*them, max_authors=7)
    kept = {each.author for each in log.counting(2)}
    assert kept == {each.author for each in log_of(*reversed(them), max_authors=7).counting(2)}
    assert len(kept) == 7
    other = {each.author for each in log_of(*(record(n, 3) for n in range(20)), max_authors=7).counting(3)}
    assert kept != other, "another round admits others"


def test_what_is_sealed_takes_no_more_and_still_serves() -> None:
    log = log_of(record(0, 1), record(0, 2), record(0, 3))
    log.seal(2)
    assert log.add(record(1, 2)) is Outcome.LATE
    assert log.holds(record(1, 1))
    assert log.add(record(1, 3)) is Outcome.NEW
    assert len(list(log.ids(1, 2))) == 2
    log.drop(2)
    assert (log.cut, log.num_records, list(log.ids(1, 2))) == (2, 2, [])


def test_a_state_of_others_replaces_what_was_held() -> None:
    log = log_of(*(record(0, round_) for round_ in range(1, 9)))
    log.adopt(Checkpoint(5, b"l" * 32, 77, ModelRef(b"d" * 32, 9, 5, 1)))
    assert (log.sealed, log.cut) == (5, 5)
    assert log.chain(5) == b"l" * 32
    assert log.num_counted(8) == 77 + 3
    assert log.chain(8) not in (b"l" * 32, log_of(*(record(0, r) for r in range(1, 9))).chain(8))


def test_a_huge_range_costs_what_is_held() -> None:
    log = log_of(*(record(0, round_) for round_ in range(1, 50)))
    assert log.range(1, 2**48).count == 49
    assert log.chain(2**48) == log.chain(49)


def test_the_newest_round_of_an_author_and_who_spoke() -> None:
    log = log_of(record(0, 3), record(0, 2), record(1, 5))
    assert (log.newest_of(author(0)), log.newest_of(author(1)), log.newest_of(author(2))) == (3, 5, 0)
    assert log.authors(4) == {author(1)}


@pytest.mark.parametrize("field", range(4))
def test_every_part_of_what_is_said_is_signed(field: int) -> None:
    parts: list[list[object]] = [[b"t" * 32, 7, b"\x01\x02", b"b" * 16]] * 2
    other = list(parts[1])
    other[field] = 8 if field == 1 else b"z" * len(other[field])  # type: ignore[arg-type]
    assert signed_bytes(*parts[0]) != signed_bytes(*other)  # type: ignore[arg-type]
