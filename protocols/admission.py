"""Who is let into a network that is not open to anyone: an allow-list, or invitations bound to a key.

Belongs here: what an inviter and a newcomer sign, and the check of both in the handshake. An invitation is worth nothing
to whoever hears it: it names a key, and only the holder of that key can sign the peer id under which it is presented.
"""

from typing import Annotated

from msgspec import Meta, Struct

from protocols.signing import Signatures
from protocols.vocabulary import SIGNATURE_BYTES, AuthorKey, Name, PeerId, Reason

MAX_EXPIRES_AT = 2**48
_Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class Invitation(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An inviter's word that the holder of a key may join."""

    network: Name
    inviter: AuthorKey
    holder: AuthorKey
    """The newcomer's own key, or a key made for the invitation, whose private half is given to the newcomer."""
    expires_at: Annotated[int, Meta(ge=0, le=MAX_EXPIRES_AT)]
    """Unix seconds from which on it opens no link; 0 is never."""
    signature: _Signature
    """By the inviter, of `invitation_bytes`."""


class Admission(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An invitation, and its holder's signature under the peer that presents it."""

    invitation: Invitation
    signature: _Signature
    """By the invitation's holder, of `admission_bytes`."""


class AdmissionPolicy(Struct, frozen=True):
    """Whom a node links with, by author keys. Both empty: anyone.

    inviters: who may invite others; each of them is let in as a member is.
    """

    members: frozenset[bytes] = frozenset()
    inviters: frozenset[bytes] = frozenset()

    @property
    def is_open(self) -> bool:
        return not self.members and not self.inviters


def invitation_bytes(network: str, holder: bytes, expires_at: int) -> bytes:
    """What the inviter signs. holder: 32 bytes; expires_at: Unix seconds."""
    return b"covey invitation 1\0" + holder + expires_at.to_bytes(8, "big") + network.encode()


def admission_bytes(network: str, peer: PeerId) -> bytes:
    """What the holder signs: that this peer, in this network, is the one that was invited."""
    return b"covey admission 1\0" + peer.encode() + b"\0" + network.encode()


def refusal(
    policy: AdmissionPolicy,
    network: str,
    peer: PeerId,
    admission: Admission | None,
    unix_s: float,
    signatures: Signatures,
) -> tuple[Reason, str] | None:
    """Why a peer is not let in, in a sentence for its operator; None where it is.

    peer: as the secure channel proved it, never as it calls itself.
    Nothing that a peer may send raises. At most two signatures are checked, and none before all else is in order.
    """
    if policy.is_open:
        return None
    author = signatures.author_of(peer)
    if author in policy.members or author in policy.inviters:
        return None
    if admission is None:
        return Reason.UNINVITED, "this network is private: ask one who may invite for a link"
    invitation = admission.invitation
    if invitation.network != network:
        return Reason.UNINVITED, f"the invitation is for the network '{invitation.network}'"
    if invitation.inviter not in policy.inviters:
        return Reason.UNINVITED, "who signed the invitation may not invite into this network"
    if 0 < invitation.expires_at <= unix_s:
        return Reason.EXPIRED, "the invitation has expired: ask for a new one"
    said = invitation_bytes(invitation.network, invitation.holder, invitation.expires_at)
    if not signatures.verify(invitation.inviter, said, invitation.signature):
        return Reason.FORGED, "the invitation was not signed by its inviter"
    if not signatures.verify(invitation.holder, admission_bytes(network, peer), admission.signature):
        return Reason.FORGED, "the invitation was not made for this peer, or is another's"
    return None
