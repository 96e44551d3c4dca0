"""Who gets into a private network: members, inviters and the invited, and none that shows what was given to another."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from node.signatures import Ed25519Signatures, peer_of_author
from protocols.admission import (
    MAX_EXPIRES_AT,
    Admission,
    AdmissionPolicy,
    Invitation,
    admission_bytes,
    invitation_bytes,
    refusal,
)
from protocols.vocabulary import HOSTILE, PeerId, Reason

NETWORK = "home-0123456789abcdef"
NOW = 1_800_000_000.0


def node(number: int) -> Ed25519Signatures:
    return Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


def peer_of(signatures: Ed25519Signatures) -> PeerId:
    return peer_of_author(signatures.author)


MAKER, MEMBER, GUEST, THIEF, ONE_TIME = map(node, range(1, 6))
POLICY = AdmissionPolicy(frozenset({MEMBER.author}), frozenset({MAKER.author}))


def invitation(
    holder: Ed25519Signatures, expires_at: int = 0, inviter: Ed25519Signatures = MAKER, network: str = NETWORK
) -> Invitation:
    signature = inviter.sign(invitation_bytes(network, holder.author, expires_at))
    return Invitation(network, inviter.author, holder.author, expires_at, signature)


def admission(
    holder: Ed25519Signatures = GUEST, guest: Ed25519Signatures = GUEST, **settings: Any
) -> Admission:
    """Under one guest, signed by the holder."""
    network = settings.get("network", NETWORK)
    return Admission(invitation(holder, **settings), holder.sign(admission_bytes(network, peer_of(guest))))


def asked(
    shown: Admission | None,
    guest: Ed25519Signatures = GUEST,
    policy: AdmissionPolicy = POLICY,
    unix_s: float = NOW,
    signatures: Any = MEMBER,
) -> Reason | None:
    found = refusal(policy, NETWORK, peer_of(guest), shown, unix_s, signatures)
    return found and found[0]


# --- who gets in ----------------------------------------------------------------------------------------
def test_into_an_open_network_anyone_gets() -> None:
    assert AdmissionPolicy().is_open
    assert asked(None, THIEF, AdmissionPolicy()) is None


def test_a_peer_without_a_key_in_its_id_gets_only_into_an_open_network() -> None:
    peer = PeerId("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
    assert refusal(AdmissionPolicy(), NETWORK, peer, None, NOW, MEMBER) is None
    found = refusal(POLICY, NETWORK, peer, None, NOW, MEMBER)
    assert found is not None
    assert found[0] is Reason.UNINVITED


@pytest.mark.parametrize(
    "policy", [POLICY, replace(POLICY, members=frozenset()), replace(POLICY, inviters=frozenset())]
)
def test_one_list_is_enough_to_close_a_network(policy: AdmissionPolicy) -> None:
    assert not policy.is_open
    assert asked(None, GUEST, policy) is Reason.UNINVITED


@pytest.mark.parametrize("guest", [MAKER, MEMBER])
def test_members_and_inviters_need_no_invitation(guest: Ed25519Signatures) -> None:
    assert asked(None, guest) is None


def test_an_invitation_for_a_known_peer_lets_that_peer_in() -> None:
    assert asked(admission()) is None


def test_a_key_that_came_in_a_link_lets_in_whom_it_signs() -> None:
    assert asked(admission(holder=ONE_TIME)) is None


def test_a_member_may_not_invite() -> None:
    assert asked(admission(inviter=MEMBER)) is Reason.UNINVITED


def test_an_invitation_into_another_network_opens_nothing() -> None:
    assert asked(admission(network="other")) is Reason.UNINVITED


@pytest.mark.parametrize(
    ("expires_at", "reason"),
    [
        (0, None),
        (int(NOW) + 1, None),
        (int(NOW), Reason.EXPIRED),
        (1, Reason.EXPIRED),
        (MAX_EXPIRES_AT, None),
    ],
)
def test_an_invitation_ends_at_its_second_and_0_never(expires_at: int, reason: Reason | None) -> None:
    assert asked(admission(expires_at=expires_at)) is reason


# --- what is stolen or forged ---------------------------------------------------------------------------
@pytest.mark.parametrize("holder", [GUEST, ONE_TIME])
def test_a_thief_cannot_show_what_was_made_for_another(holder: Ed25519Signatures) -> None:
    stolen = admission(holder=holder)
    assert asked(stolen) is None
    assert asked(stolen, THIEF) is Reason.FORGED
    own_signature = THIEF.sign(admission_bytes(NETWORK, peer_of(THIEF)))
    assert asked(replace(stolen, signature=own_signature), THIEF) is Reason.FORGED


@pytest.mark.parametrize(
    "change",
    [{"holder": THIEF.author}, {"expires_at": int(NOW) + 9}, {"signature": bytes(64)}],
    ids=str,
)
def test_an_invitation_that_was_changed_is_forged(change: dict[str, Any]) -> None:
    changed = Admission(
        replace(invitation(GUEST, int(NOW) + 5), **change),
        THIEF.sign(admission_bytes(NETWORK, peer_of(THIEF))),
    )
    assert asked(changed, THIEF) is Reason.FORGED


def test_nobody_can_name_an_inviter_who_did_not_sign() -> None:
    forged = replace(invitation(THIEF, inviter=THIEF), inviter=MAKER.author)
    shown = Admission(forged, THIEF.sign(admission_bytes(NETWORK, peer_of(THIEF))))
    assert asked(shown, THIEF) is Reason.FORGED


def test_one_signature_never_passes_for_another() -> None:
    """An inviter that presents itself has not invited anybody by that."""
    said = [
        invitation_bytes(NETWORK, GUEST.author, 0),
        invitation_bytes(NETWORK, GUEST.author, 1),
        invitation_bytes(NETWORK, THIEF.author, 0),
        admission_bytes(NETWORK, peer_of(GUEST)),
        admission_bytes(NETWORK, peer_of(THIEF)),
        admission_bytes("other", peer_of(GUEST)),
    ]
    assert len(set(said)) == len(said)
    assert all(one.split(b"\0")[0] in (b"covey invitation 1", b"covey admission 1") for one in said)


class Counting:
    """Signatures that count how many were checked."""

    author = MEMBER.author
    sign = MEMBER.sign
    author_of = MEMBER.author_of

    def __init__(self) -> None:
        self.checked = 0

    def verify(self, author: bytes, data: bytes, signature: bytes) -> bool:
        self.checked += 1
        return MEMBER.verify(author, data, signature)


@pytest.mark.parametrize(
    ("shown", "checked"),
    [
        (None, 0),
        (admission(network="other"), 0),
        (admission(inviter=THIEF), 0),
        (admission(expires_at=1), 0),
        (Admission(replace(invitation(GUEST), signature=bytes(64)), bytes(64)), 1),
        (admission(), 2),
    ],
)
def test_a_stranger_costs_at_most_two_signatures(shown: Admission | None, checked: int) -> None:
    signatures = Counting()
    asked(shown, signatures=signatures)
    assert signatures.checked == checked


@given(
    keys=st.tuples(*[st.binary(min_size=32, max_size=32)] * 2),
    signatures=st.tuples(*[st.binary(min_size=64, max_size=64)] * 2),
    network=st.sampled_from([NETWORK, "other"]),
    expires_at=st.integers(0, MAX_EXPIRES_AT),
)
def test_whatever_a_stranger_shows_is_refused_and_raises_nothing(
    keys: tuple[bytes, bytes], signatures: tuple[bytes, bytes], network: str, expires_at: int
) -> None:
    for inviter in (keys[0], MAKER.author):
        shown = Admission(Invitation(network, inviter, keys[1], expires_at, signatures[0]), signatures[1])
        assert asked(shown, THIEF) in (Reason.UNINVITED, Reason.EXPIRED, Reason.FORGED)


# --- on the wire ----------------------------------------------------------------------------------------
def test_an_admission_travels_as_nested_arrays() -> None:
    shown = admission(expires_at=int(NOW))
    packed = msgspec.msgpack.encode(shown)
    assert msgspec.msgpack.decode(packed, type=Admission) == shown
    inner = shown.invitation
    assert msgspec.msgpack.decode(packed) == [
        [NETWORK, MAKER.author, GUEST.author, int(NOW), inner.signature],
        shown.signature,
    ]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, ""),
        (0, "x" * 65),
        (0, "a\nb"),
        (1, b"x" * 31),
        (2, b"x" * 33),
        (3, -1),
        (3, 2**48 + 1),
        (4, b""),
        (4, b"x" * 65),
    ],
)
def test_what_has_no_legal_form_is_refused_before_it_is_looked_at(place: int, value: object) -> None:
    fields = msgspec.to_builtins(invitation(GUEST), builtin_types=(bytes,))
    fields = [*fields[:place], value, *fields[place + 1 :]]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, Invitation)


def test_a_field_too_many_is_refused() -> None:
    fields = msgspec.to_builtins(invitation(GUEST), builtin_types=(bytes,))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert([*fields, 1], Invitation)


def test_to_be_uninvited_is_no_hostility_but_to_forge_is() -> None:
    """The operator of an uninvited node may have dialled the wrong address; nobody shows a stolen invitation by mistake."""
    assert not {Reason.UNINVITED, Reason.EXPIRED} & HOSTILE
    assert Reason.FORGED in HOSTILE


def test_every_refusal_tells_the_other_operator_something_else() -> None:
    shown = [None, admission(network="other"), admission(inviter=THIEF), admission(expires_at=1)]
    shown.append(Admission(replace(invitation(GUEST), signature=bytes(64)), bytes(64)))
    shown.append(replace(admission(), signature=bytes(64)))
    told = [refusal(POLICY, NETWORK, peer_of(GUEST), each, NOW, MEMBER) for each in shown]
    assert all(one is not None and 20 < len(one[1]) <= 240 for one in told)
    assert all(one != other for one, other in pairwise(sorted(told, key=str)))
