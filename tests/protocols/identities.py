"""Peers with keys that any test can sign with, and what they say of themselves."""

import hashlib
from typing import Any

from protocols.admission import Admission
from protocols.messages import Hello
from protocols.signing import sign_record
from protocols.vocabulary import PROTOCOL_VERSION, PeerId, PeerRecord, SchemaHash

KEYLESS = PeerId("no key in it")
"""A peer id that is none: nobody can sign as this one."""


class FakeSignatures:
    """Whoever knows a name can sign with it; a changed byte is found all the same."""

    def __init__(self, name: str) -> None:
        self.author = _author(name)

    def sign(self, data: bytes) -> bytes:
        return _signature(self.author, data)

    def verify(self, author: bytes, data: bytes, signature: bytes) -> bool:
        return signature == _signature(author, data)

    def author_of(self, peer: PeerId) -> bytes | None:
        return None if peer == KEYLESS else _author(peer)


def _author(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _signature(author: bytes, data: bytes) -> bytes:
    return hashlib.sha512(author + data).digest()


def signed_record(
    peer: str, *addresses: str, network: str = "net", signer: str = "", **fields: Any
) -> PeerRecord:
    """What a peer says of itself; or, with another `signer`, what that one says of it."""
    return sign_record(network, PeerRecord(PeerId(peer), addresses, **fields), FakeSignatures(signer or peer))


def hello_of(
    peer: str,
    *addresses: str,
    version: int = PROTOCOL_VERSION,
    network: str = "net",
    learning: str = "gossip",
    task: str = "task",
    schema: bytes = bytes(32),
    brief: bool = False,
    admission: Admission | None = None,
    **fields: Any,
) -> Hello:
    """A peer's hello. fields: of its record."""
    record = signed_record(peer, *addresses, network=network, **fields)
    return Hello(version, network, learning, task, SchemaHash(schema), record, brief, admission)
