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
    MAX_CODES,
    MAX_IDS_PER_MESSAGE,
    MAX_MODEL_BYTES,
    MAX_PEERS_PER_MESSAGE,
    MAX_RANGES_PER_MESSAGE,
    MAX_RECORDS_PER_MESSAGE,
    RECORD_ID_BYTES,
    Address,
    Checkpoint,
    Detail,
    ModelRef,
    Name,
    PeerRecord,
    Reason,
    Round,
    ScalarRecord,
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


# --- shared-seed scalars --------------------------------------------------------------------------------
class Terms(Message, frozen=True, tag="terms"):
    """What has to be equal for two replicas to stay equal. First after the hellos, from both ends."""

    generator: Name
    """Of the directions, with its version."""
    base: WireDigest
    """Of the model that everything starts from, frozen parameters and buffers included."""
    learning_rate: float
    schedule: Name
    rounds: Round
    normalise: Name
    weight_decay: float
    clip_quantile: float
    pool: Annotated[int, Meta(ge=0, le=2**20)]
    checkpoint_every: Annotated[int, Meta(ge=1, le=2**20)]
    late_rounds: Annotated[int, Meta(ge=0, le=2**20)]
    max_authors: Annotated[int, Meta(ge=1, le=MAX_IDS_PER_MESSAGE)]
    max_samples: Annotated[int, Meta(ge=1, le=MAX_CODES)]
    members: WireDigest
    """Of the authors that are admitted; 32 zeros where anyone is."""


class Scalars(Message, frozen=True, tag="scalars"):
    """Records that the receiver may lack, each passed on once. `round` is how many the sender has behind it."""

    round: Round
    records: Annotated[tuple[ScalarRecord, ...], Meta(max_length=MAX_RECORDS_PER_MESSAGE)]


class Marks(Message, frozen=True, tag="marks"):
    """How far the sender's log is settled."""

    round: Round
    cut: Round
    """Rounds up to this one it holds no records of any more."""
    sealed: Checkpoint
    """Agreed with its neighbours: no record of these rounds is taken any more."""
    proposed: Checkpoint | None
    """What it would seal next, once its neighbours have come to the same."""


class RoundRange(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The records of the rounds `first` to `last`, both included, in one digest."""

    first: Round
    last: Round
    count: Annotated[int, Meta(ge=0, le=2**48)]
    digest: WireDigest


class Ranges(Message, frozen=True, tag="ranges"):
    """What the sender has; the receiver answers where its own differs."""

    ranges: Annotated[tuple[RoundRange, ...], Meta(max_length=MAX_RANGES_PER_MESSAGE)]


Ids = Annotated[bytes, Meta(max_length=RECORD_ID_BYTES * MAX_IDS_PER_MESSAGE)]
"""Record ids, one after another."""


class Holding(Message, frozen=True, tag="holding"):
    """All that the sender has of these rounds: the receiver sends what is missing, and pulls what it lacks itself."""

    first: Round
    last: Round
    ids: Ids


class Pull(Message, frozen=True, tag="pull"):
    """Send me these, of these rounds."""

    first: Round
    last: Round
    ids: Ids


LinkMessage = (
    Hello
    | Refuse
    | Heartbeat
    | AskPeers
    | Peers
    | Offer
    | Decline
    | Bye
    | Terms
    | Scalars
    | Marks
    | Ranges
    | Holding
    | Pull
)


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
