"""Who signs what a node says of itself, and how a signed record is told from a forged one.

Belongs here: the port through which pure code signs and verifies, and the signed peer record. A record is its owner's
word: nobody else can bring a peer in, change what is known of it, or throw it out.
"""

from typing import Protocol

import msgspec
from msgspec.structs import replace

from protocols.vocabulary import SIGNATURE_BYTES, PeerId, PeerRecord


class Signatures(Protocol):
    """Signs with this node's key and checks anybody's. `author` is the node's raw public key, 32 bytes."""

    author: bytes

    def sign(self, data: bytes) -> bytes: ...

    def verify(self, author: bytes, data: bytes, signature: bytes) -> bool: ...

    def author_of(self, peer: PeerId) -> bytes | None:
        """The key in a peer id; None where there is none."""


_encode = msgspec.msgpack.Encoder().encode


def record_bytes(network: str, record: PeerRecord) -> bytes:
    """What the owner signs: all but the signature, and the network, so that a record of one is none of another."""
    said = (network, record.peer, record.addresses, record.incarnation, record.left, record.round)
    return b"covey peer 1\0" + _encode(said)


def sign_record(network: str, record: PeerRecord, signatures: Signatures) -> PeerRecord:
    """The record with its owner's signature."""
    return replace(record, signature=signatures.sign(record_bytes(network, record)))


def is_genuine(network: str, record: PeerRecord, signatures: Signatures) -> bool:
    """Whether the peer that the record is of has signed it, for this network."""
    author = signatures.author_of(PeerId(record.peer))
    return author is not None and signatures.verify(author, record_bytes(network, record), record.signature)


def is_newer(record: PeerRecord, than: PeerRecord | None) -> bool:
    """A total order on one peer's records, so that taking the newer one is a join-semilattice (Plexus' membership
    counter, arXiv 2302.13837): incarnation first, then leaving before staying, then the later round. Between two that
    an owner signed for the same moment the signature decides, the same way on every node."""
    return than is None or _place(record) > _place(than)


def _place(record: PeerRecord) -> tuple[int, bool, int, bytes]:
    return record.incarnation, record.left, record.round, record.signature


UNSIGNED = bytes(SIGNATURE_BYTES)
