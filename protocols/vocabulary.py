"""The words every part of covey shares, and the hard limits on what a peer may make us hold.

Belongs here: names of things that travel, their bounds, and nothing that acts.
"""

import hashlib
import re
from enum import StrEnum
from typing import Annotated, NewType

from msgspec import Meta, Struct

PROTOCOL_VERSION = 3

# --- limits (bytes, counts) -----------------------------------------------------------------------------
MAX_FRAME_BYTES = 64 * 1024
"""A control frame's body. The largest legal one, a full `Peers`, stays under 40 KiB."""
CHUNK_BYTES = 1024 * 1024
"""Weights travel and are hashed in chunks of this size (py-libp2p is fastest with large writes)."""
MAX_MODEL_BYTES = 8 * 1024**3
MAX_CHUNKS = MAX_MODEL_BYTES // CHUNK_BYTES
MAX_FETCH_HEADER_BYTES = 512 * 1024
"""A fetch header carries 32 bytes a chunk: 8 GiB of model make 256 KiB of header."""
MAX_ADDRESSES = 8
MAX_PEERS_PER_MESSAGE = 16
MAX_ROUND = 2**48
MAX_INCARNATION = 2**48
KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_CODES = 255
"""Scalars of one author in one round."""
MAX_RECORDS_PER_MESSAGE = 128
MAX_RANGES_PER_MESSAGE = 32
STATE_ID_BYTES = 16
RECORD_ID_BYTES = 16
"""So long that an author cannot find two records of its own with one id."""
MAX_IDS_PER_MESSAGE = 2048
MAX_SAMPLES = 2**40
MAX_SAMPLE = 256
"""Participants of one round."""
CENSUS_BYTES = 256
CHAIN_BYTES = 16
"""Of the running hash over an author's entries."""
MAX_EPOCH = 2**48
MAX_SEQ = 2**32
MAX_DAY = 2**20
MAX_ENTRIES_PER_BATCH = 128
MAX_ENTRY_BYTES = 8 * 1024
MAX_BATCH_BYTES = 48 * 1024
"""Encoded: a batch fits a frame with room for what goes around it."""
MAX_BATCHES_PER_MESSAGE = 128
MAX_MARKS_PER_MESSAGE = 1024
MAX_ENTRIES_PER_ANSWER = 100_000
MAX_AUTHOR_BITS = 20
MAX_TERMS = 8
MAX_TERM_CHARS = 64
MAX_TAGS = 16
MAX_DETAILS = 16
MAX_TITLE_CHARS = 200
MAX_TAG_CHARS = 40
MAX_CONTENT_BYTES = MAX_MODEL_BYTES
DIGEST_BYTES = 32

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58, derived from the peer's Ed25519 key."""
Digest = NewType("Digest", bytes)
"""SHA-256 over a blob's size and its chunks' SHA-256 (see `protocols/README.md`)."""
SchemaHash = NewType("SchemaHash", bytes)
"""SHA-256 over a task's name and its parameters' names, shapes and dtypes."""

_PRINTABLE = r"^[!-~]+\Z"
"""ASCII without blanks: a character is one byte, and none of them moves the operator's cursor."""

Address = Annotated[str, Meta(min_length=1, max_length=256, pattern=_PRINTABLE)]
"""A multiaddr that ends in `/p2p/<peer id>`."""
Round = Annotated[int, Meta(ge=0, le=MAX_ROUND)]
_BREAKERS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
ONE_LINE = rf"^[^{_BREAKERS}]*\Z"
"""Neither control characters nor such as end a line or turn the direction of writing."""
BREAKS_LINE = re.compile(rf"[{_BREAKERS}\ud800-\udfff]")
"""A character that `ONE_LINE` has no room for, or half a one, which stands for a byte that is no text."""
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=ONE_LINE)]
MAX_DETAIL_CHARS = 240
Detail = Annotated[str, Meta(max_length=MAX_DETAIL_CHARS, pattern=ONE_LINE)]
"""A sentence for the operator on the other side: no control characters, so that no peer writes to a terminal."""
WirePeerId = Annotated[str, Meta(min_length=1, max_length=128, pattern=_PRINTABLE)]
WireDigest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Reason(StrEnum):
    """Why something was refused, closed or given up. The label of every refusal counter."""

    # the handshake
    VERSION = "version"
    NETWORK = "network"
    PROTOCOL = "protocol"
    TASK = "task"
    SCHEMA = "schema"
    FULL = "full"
    GREETING = "greeting"  # no hello, a second hello, or something before it
    SECURITY = "security"  # the secure channel could not be made: a plaintext dial ends here
    UNINVITED = "uninvited"  # the network is private, and nothing that was presented opens it
    EXPIRED = "expired"  # an invitation that has run out
    # bytes
    OVERSIZED = "oversized_frame"
    TRUNCATED = "truncated_frame"
    MALFORMED = "malformed_frame"
    # weights
    TOO_LARGE = "too_large"
    WRONG_SIZE = "wrong_size"
    WRONG_HASH = "wrong_hash"
    WRONG_FORMAT = "wrong_format"
    WRONG_SHAPE = "wrong_shape"
    NON_FINITE = "non_finite"
    # shared-seed scalars
    GENERATOR = "generator"
    BASE = "base"
    TERMS = "terms"
    FORGED = "forged"
    STRANGER = "stranger"  # a record of an author that the terms do not admit
    EQUIVOCATION = "equivocation"
    FLOOD = "flood"
    # decentralised sampling
    LEAP = "leap"  # a round number far beyond any that neighbours know
    DISAGREES = "disagrees"  # an aggregate unlike that of most aggregators
    # shared content
    UNASKED = "unasked"  # entries that nobody asked for, or more than were asked for
    # no one's fault
    BUSY = "busy"
    GONE = "gone"
    IDLE = "idle"  # the other side is not learning now
    TIMEOUT = "timeout"
    SILENT = "silent"
    LINK = "link"
    UNREACHABLE = "unreachable"
    DUPLICATE = "duplicate"
    LEAVING = "leaving"
    SURPLUS = "surplus"  # a link that has done its service, or makes room for another


HOSTILE = frozenset(
    {
        Reason.GREETING,
        Reason.SECURITY,
        Reason.OVERSIZED,
        Reason.TRUNCATED,
        Reason.MALFORMED,
        Reason.TOO_LARGE,
        Reason.WRONG_SIZE,
        Reason.WRONG_HASH,
        Reason.WRONG_FORMAT,
        Reason.WRONG_SHAPE,
        Reason.NON_FINITE,
        Reason.FORGED,
        Reason.STRANGER,
        Reason.EQUIVOCATION,
    }
)
"""Reasons that a correct peer never gives: they are counted as refusals, and never retried."""


class ModelRef(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the core knows of a model: never a tensor."""

    digest: WireDigest
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)]
    round: Round
    num_samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)]


class ContentRef(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Shared content as the core knows it: bytes of no meaning to it."""

    digest: WireDigest
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_CONTENT_BYTES)]


AuthorKey = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
"""An author's raw Ed25519 public key, which is what its peer id is made of."""
RecordId = NewType("RecordId", bytes)
"""The first bytes of SHA-256 over what an author said in a round (see `protocols/README.md`)."""


class ScalarRecord(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All scalars of one author in one round, one byte each, signed by the author."""

    author: AuthorKey
    round: Annotated[int, Meta(ge=1, le=MAX_ROUND)]
    codes: Annotated[bytes, Meta(max_length=MAX_CODES)]
    built_on: Annotated[bytes, Meta(min_length=STATE_ID_BYTES, max_length=STATE_ID_BYTES)]
    """The sealed state that the author stands on (see `state_id`): its vote, where two parts of a network have parted."""
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class Checkpoint(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The state after a round, and the log that leads there."""

    round: Round
    log: WireDigest
    """Of all that counted in the rounds up to this one."""
    num_records: Annotated[int, Meta(ge=0, le=MAX_SAMPLES)]
    """That counted."""
    ref: ModelRef
    """The parameters, which equal logs make equal to the byte; `num_samples` is 1."""


StateId = NewType("StateId", bytes)


def state_id(checkpoint: Checkpoint) -> StateId:
    """A state in short: its round, its log and its parameters in one digest (see `protocols/README.md`)."""
    place = checkpoint.round.to_bytes(8, "big")
    hashed = hashlib.sha256(b"covey state 1\0" + place + checkpoint.log + checkpoint.ref.digest)
    return StateId(hashed.digest()[:STATE_ID_BYTES])


class PeerRecord(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer says of itself, signed by it (see `protocols/signing.py`)."""

    peer: WirePeerId
    addresses: Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)]
    """Where it can be dialled."""
    incarnation: Annotated[int, Meta(ge=0, le=MAX_INCARNATION)] = 0
    """Raised by the owner alone: to come back, to leave, to deny that it is dead."""
    left: bool = False
    round: Round = 0
    """The round that it knew of when it signed: its last sign of life, for `sampled`."""
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)] = bytes(
        SIGNATURE_BYTES
    )


def one_line(text: str, limit: int = MAX_DETAIL_CHARS) -> str:
    """Any text as a `Detail`, or as another field of so many characters: what is not allowed becomes spaces."""
    return BREAKS_LINE.sub(" ", text[:limit])


def peer_of(address: str) -> PeerId | None:
    """The peer id at the end of a multiaddr, or None where it names none."""
    _, marker, peer = address.rpartition("/p2p/")
    return PeerId(peer) if marker and peer and "/" not in peer else None
