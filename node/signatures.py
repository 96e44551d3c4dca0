"""Signing records in this node's name, checking anybody's, and an author's two names: its key and its peer id.

A libp2p peer id of an Ed25519 key holds the key itself, so that either follows from the other.
"""

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from node.identity import PEER_ID_PREFIX
from protocols.vocabulary import KEY_BYTES, SIGNATURE_BYTES, PeerId


class Ed25519Signatures:
    """Signs with one key; an author is a raw public key of 32 bytes. See `protocols.scalar_terms.Signatures`."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.author = key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(data)

    def verify(self, author: bytes, data: bytes, signature: bytes) -> bool:
        """Whether the author signed these bytes. Nothing that a peer may send raises."""
        return is_signed(author, data, signature)

    def author_of(self, peer: PeerId) -> bytes | None:
        """The key in a peer id; None where there is no Ed25519 key in it."""
        try:
            return author_of(peer)
        except ValueError:
            return None


def is_signed(author: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the author, a raw public key, signed these bytes. Nothing that a peer may send raises."""
    if len(author) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(author).verify(signature, data)
    except (InvalidSignature, ValueError):  # a key that is no point of the curve is a ValueError
        return False
    return True


def author_of(peer: str) -> bytes:
    """The raw public key in a peer id.

    Raises ValueError, in words for the operator, where it is not the id of an Ed25519 key as libp2p writes it.
    """
    try:
        raw = base58.b58decode(peer)
    except ValueError as error:
        raise ValueError(f"'{peer}' is no peer id: {error}") from error
    key = raw.removeprefix(PEER_ID_PREFIX)
    # Written anew: base58 also reads it with blanks around it.
    if len(raw) != len(PEER_ID_PREFIX) + KEY_BYTES or len(key) != KEY_BYTES or peer_of_author(key) != peer:
        raise ValueError(f"'{peer}' is not the peer id of an Ed25519 key")
    return key


def peer_of_author(key: bytes) -> PeerId:
    """The peer id of a raw public key."""
    assert len(key) == KEY_BYTES
    return PeerId(base58.b58encode(PEER_ID_PREFIX + key).decode())
