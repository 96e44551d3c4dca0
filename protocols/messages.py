"""What nodes say to each other on a link, and the two frames of a weight fetch.

Every struct is an array on the wire: the order of the fields is the format, and an extra or missing
field is refused. `protocols/README.md` is the same in prose, with the checks of each message.
"""

from typing import Annotated

from msgspec import Meta, Struct

from protocols.vocabulary import (
    CHUNK_BYTES,
    MAX_ADDRESSES,
    MAX_CHUNKS,
    MAX_MODEL_BYTES,
    MAX_PEERS_PER_MESSAGE,
    Address,
    Detail,
    ModelRef,
    Name,
    PeerRecord,
    Reason,
    Round,
    WireDigest,
)


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages; the tag is the first element of the array."""


class Hello(Message, frozen=True, tag="hello"):
    """First on every link, from both ends."""

    version: Annotated[int, Meta(ge=0, le=2**16)]
    network: Name
    learning: Name
    """The learning protocol, or `none` for a node that only helps others find each other."""
    task: Name
    schema: WireDigest
    addresses: Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)]


class Refuse(Message, frozen=True, tag="refuse"):
    """The link ends here, and why: for the operator on the other side."""

    reason: Reason
    detail: Detail


class Heartbeat(Message, frozen=True, tag="beat"):
    """Still here. `active` is false once the node has finished its rounds."""

    round: Round
    active: bool


class AskPeers(Message, frozen=True, tag="ask"):
    """Whom else do you know?"""


class Peers(Message, frozen=True, tag="peers"):
    """Some of the sender's live neighbours."""

    records: Annotated[tuple[PeerRecord, ...], Meta(max_length=MAX_PEERS_PER_MESSAGE)]


class Offer(Message, frozen=True, tag="offer"):
    """I have this model; fetch it if you want it."""

    ref: ModelRef


class Decline(Message, frozen=True, tag="decline"):
    """I shall not fetch what you offered."""

    digest: WireDigest
    reason: Reason


class Bye(Message, frozen=True, tag="bye"):
    """Leaving on purpose: do not wait for me."""


LinkMessage = Hello | Refuse | Heartbeat | AskPeers | Peers | Offer | Decline | Bye


class FetchRequest(Message, frozen=True, tag="fetch"):
    """First frame on a fetch stream. Chunks before `first_chunk` are already held."""

    digest: WireDigest
    first_chunk: Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]


class FetchHeader(Message, frozen=True, tag="header"):
    """Answer: the blob's size and every chunk's SHA-256, which together hash to the digest."""

    size_bytes: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)]
    chunk_hashes: Annotated[tuple[WireDigest, ...], Meta(min_length=1, max_length=MAX_CHUNKS)]


class FetchRefused(Message, frozen=True, tag="refused"):
    """Answer: no, and why."""

    reason: Reason


FetchMessage = FetchRequest | FetchHeader | FetchRefused

assert CHUNK_BYTES * MAX_CHUNKS == MAX_MODEL_BYTES
