"""Signatures without cryptography: as hard to forge as a simulated node is honest, and cheap by the million.

Belongs here: who signs as whom. A forged signature can still be had, and is found out: any other bytes.
"""

import hashlib
from functools import cache

from protocols.vocabulary import PeerId


@cache
def author_of(peer: PeerId) -> bytes:
    """A simulated node's author key."""
    return hashlib.sha256(peer.encode()).digest()


class SimSignatures:
    """One node's `protocols.scalar_terms.Signatures`. A signature is a hash that anybody could make."""

    __slots__ = ("author",)

    def __init__(self, peer: PeerId) -> None:
        self.author = author_of(peer)

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return hashlib.sha512(self.author + data).digest()

    def verify(self, author: bytes, data: bytes, signature: bytes) -> bool:
        """Whether it is the author's."""
        return signature == hashlib.sha512(author + data).digest()

    def author_of(self, peer: PeerId) -> bytes:
        """Every simulated node has a key."""
        return author_of(peer)
