"""What a node signs of itself: nobody else can say it, nothing of it can be changed, and the newest of it wins."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from protocols.signing import is_genuine, is_newer, record_bytes, sign_record
from protocols.vocabulary import MAX_INCARNATION, MAX_ROUND, PeerId, PeerRecord
from tests.protocols.identities import KEYLESS, FakeSignatures, signed_record

law = settings(derandomize=True, deadline=None, max_examples=200)
VERIFIER = FakeSignatures("whoever")


def record(**changes: object) -> PeerRecord:
    fields = {"incarnation": 5, "round": 3}
    return signed_record("A", "/ip4/10.0.0.1/tcp/1/p2p/A", **fields | changes)


# Few values, so that two records often have a field in common.
records = st.builds(
    record,
    incarnation=st.sampled_from([0, 1, 2, MAX_INCARNATION]),
    left=st.booleans(),
    round=st.sampled_from([0, 1, MAX_ROUND]),
    signer=st.sampled_from(["A", "B"]),
)


def newest(*told: PeerRecord | None) -> PeerRecord | None:
    """What a node believes that has heard these, in this order."""
    believed: PeerRecord | None = None
    for item in told:
        if item is not None and is_newer(item, believed):
            believed = item
    return believed


# --- the newest wins ------------------------------------------------------------------------------------
@law
@given(st.lists(records, max_size=5), st.randoms(use_true_random=False))
def test_in_whatever_order_records_come_all_end_up_with_the_same(
    told: list[PeerRecord], rng: random.Random
) -> None:
    shuffled = rng.sample(told, len(told))
    assert newest(*told) == newest(*shuffled)
    assert newest(*told, *shuffled) == newest(*told), "and however often"


@law
@given(records, records, records)
def test_merging_is_associative_commutative_and_idempotent(
    a: PeerRecord, b: PeerRecord, c: PeerRecord
) -> None:
    assert newest(newest(a, b), c) == newest(a, newest(b, c))
    assert newest(a, b) == newest(b, a)
    assert newest(a, a) == a


@law
@given(records, records)
def test_of_two_records_one_is_newer_unless_they_are_the_same(a: PeerRecord, b: PeerRecord) -> None:
    assert is_newer(a, b) + is_newer(b, a) + (a == b) == 1


def test_a_later_incarnation_then_a_leave_then_a_later_round_is_newer() -> None:
    in_order = [
        record(incarnation=incarnation, left=left, round=round_)
        for incarnation, left, round_ in itertools.product([0, 1, 7], [False, True], [0, 1, 9])
    ]
    for older, newer in itertools.pairwise(in_order):
        assert is_newer(newer, older)
        assert not is_newer(older, newer)
    assert is_newer(in_order[0], None)


@law
@given(st.integers(0, MAX_INCARNATION - 1), st.integers(0, MAX_ROUND))
def test_a_leave_is_undone_by_a_later_incarnation_alone(incarnation: int, round_: int) -> None:
    leave = record(incarnation=incarnation, left=True)
    assert not is_newer(record(incarnation=incarnation, round=round_), leave)
    assert is_newer(record(incarnation=incarnation + 1), leave)


# --- who signed it --------------------------------------------------------------------------------------
def test_what_its_owner_signed_is_genuine() -> None:
    assert is_genuine("net", record(), VERIFIER)
    assert is_genuine("net", record(left=True), VERIFIER)


CHANGED = {
    "peer": "B",
    "addresses": ("/ip4/10.0.0.1/tcp/2/p2p/A",),
    "incarnation": 6,
    "left": True,
    "round": 4,
    "signature": bytes(64),
}


@pytest.mark.parametrize("field", CHANGED)
def test_a_record_with_a_changed_field_is_not(field: str) -> None:
    assert set(CHANGED) == set(PeerRecord.__struct_fields__)
    assert not is_genuine("net", replace(record(), **{field: CHANGED[field]}), VERIFIER)


@law
@given(st.integers(0, 511))
def test_a_signature_with_one_bit_changed_is_not(bit: int) -> None:
    signed = record()
    signature = bytearray(signed.signature)
    signature[bit // 8] ^= 1 << bit % 8
    assert not is_genuine("net", replace(signed, signature=bytes(signature)), VERIFIER)


def test_a_record_signed_by_another_or_for_another_network_is_not() -> None:
    assert not is_genuine("net", record(signer="B"), VERIFIER)
    assert not is_genuine("other", record(), VERIFIER)
    assert is_genuine("other", record(network="other"), VERIFIER)


def test_nobody_has_signed_what_a_peer_without_a_key_says() -> None:
    signed = sign_record("net", PeerRecord(KEYLESS, ()), FakeSignatures(KEYLESS))
    assert not is_genuine("net", signed, VERIFIER)


@law
@given(records, records, st.sampled_from(["net", "ne", ""]), st.sampled_from(["net", "ne", ""]))
def test_no_two_things_are_said_by_the_same_bytes(
    a: PeerRecord, b: PeerRecord, network: str, other: str
) -> None:
    same = (network, replace(a, signature=bytes(64))) == (other, replace(b, signature=bytes(64)))
    assert (record_bytes(network, a) == record_bytes(other, b)) == same


def test_real_keys_sign_and_verify_records() -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    signatures = pytest.importorskip("node.signatures")
    identity = pytest.importorskip("node.identity")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    mine = signatures.Ed25519Signatures(key)
    peer = PeerId(identity.peer_id_of(key))
    signed = sign_record("net", PeerRecord(peer, ("/ip4/10.0.0.1/tcp/1/p2p/" + peer,), 7), mine)
    assert is_genuine("net", signed, mine)
    assert not is_genuine("net", replace(signed, incarnation=8), mine)
    assert not is_genuine("net", replace(signed, peer="no peer id"), mine)
