"""What nodes say to each other on a link, and the two frames of a weight fetch.

Every struct is an array on the wire: the order of the fields is the format, and an extra or missing
field is refused. `protocols/README.md` is the same in prose, with the checks of each message.
"""

from typing import Annotated

from msgspec import Meta, Struct

from protocols.admission import Admission
from protocols.entries import Batch, Feed, FeedMark
from protocols.vocabulary import (
    CENSUS_BYTES,
    CHUNK_BYTES,
    MAX_AUTHOR_BITS,
    MAX_BATCHES_PER_MESSAGE,
    MAX_CHUNKS,
    MAX_CODES,
    MAX_ENTRIES_PER_ANSWER,
    MAX_IDS_PER_MESSAGE,
    MAX_INCARNATION,
    MAX_MARKS_PER_MESSAGE,
    MAX_MODEL_BYTES,
    MAX_PEERS_PER_MESSAGE,
    MAX_RANGES_PER_MESSAGE,
    MAX_RECORDS_PER_MESSAGE,
    MAX_SAMPLE,
    RECORD_ID_BYTES,
    Checkpoint,
    Detail,
    ModelRef,
    Name,
    PeerRecord,
    Reason,
    Round,
    ScalarRecord,
    WireDigest,
    WirePeerId,
)

Token = Annotated[int, Meta(ge=0, le=2**48)]
"""Names a question, so that its answer finds back."""


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
    record: PeerRecord
    """Of the sender."""
    brief: bool
    """The sender has linked up for a single purpose and will not keep this link."""
    admission: Admission | None
    """What lets it into a network that is not open to anyone."""


class Refuse(Message, frozen=True, tag="refuse"):
    """The link ends here, and why: for the operator on the other side."""

    reason: Reason
    detail: Detail


class Heartbeat(Message, frozen=True, tag="beat"):
    """Still here. `active` is false once the node has finished its rounds."""

    round: Round
    active: bool


Records = Annotated[tuple[PeerRecord, ...], Meta(max_length=MAX_PEERS_PER_MESSAGE)]


class Shuffle(Message, frozen=True, tag="shuffle"):
    """Some of the peers that the sender knows, for as many of the receiver's (`Peers`)."""

    records: Records


class Peers(Message, frozen=True, tag="peers"):
    """Peers that the sender knows: an answer to `Shuffle`, news of some, or other doors for one that is turned away."""

    records: Records


class Ping(Message, frozen=True, tag="ping"):
    """Are you there?"""

    token: Token


class Pong(Message, frozen=True, tag="pong"):
    """Yes, and this is the round that I know of."""

    token: Token
    round: Round


class Probe(Message, frozen=True, tag="probe"):
    """Can you reach this peer? I have not heard it for a while."""

    token: Token
    peer: WirePeerId


class Probed(Message, frozen=True, tag="probed"):
    """Whether I can."""

    token: Token
    reached: bool


class Suspicion(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A peer that did not answer, as it called itself last: a later incarnation refutes it."""

    peer: WirePeerId
    incarnation: Annotated[int, Meta(ge=0, le=MAX_INCARNATION)]


class Suspects(Message, frozen=True, tag="suspects"):
    """Peers that seem to be gone. Nobody's word is enough to cut a link; see `protocols/view.py`."""

    peers: Annotated[tuple[Suspicion, ...], Meta(max_length=MAX_PEERS_PER_MESSAGE)]


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


# --- decentralised sampling -----------------------------------------------------------------------------
class Census(Message, frozen=True, tag="census"):
    """Whom the sender knows, in digests of a few each: the receiver tells of those in which it differs."""

    digests: Annotated[bytes, Meta(min_length=CENSUS_BYTES, max_length=CENSUS_BYTES)]
    answers: bool
    """Whether it is said in answer to one: then it needs none."""


Sample = Annotated[tuple[WirePeerId, ...], Meta(max_length=MAX_SAMPLE)]


class TrainedModel(Message, frozen=True, tag="trained"):
    """From a participant of a round to an aggregator of the next, whose number is `ref.round`."""

    ref: ModelRef
    beacon: WireDigest
    """By which the sender found this aggregator: the participants of the next round are found by it too."""
    heard: WireDigest
    """The smallest digest among the aggregates that began the sender's round: the beacon after this one."""
    sample: Sample
    """Who else trained in the sender's round."""


class AggregatedModel(Message, frozen=True, tag="aggregated"):
    """From an aggregator to a participant of the round that this model begins, `ref.round`."""

    ref: ModelRef
    beacon: WireDigest
    """By which the aggregators of the next round are found."""
    sample: Sample
    """All participants."""


class Receipt(Message, frozen=True, tag="receipt"):
    """The receiver's model has been fetched, or is not needed any more: the sender need not keep it for me."""

    round: Round
    digest: WireDigest


class Closed(Message, frozen=True, tag="closed"):
    """From an aggregator to who trained for it: the round has its aggregate, and the next one its participants."""

    round: Round


# --- shared content -------------------------------------------------------------------------------------
class Ask(Message, frozen=True, tag="ask"):
    """Send me entries of this feed that I lack, of authors whose keys begin with these bits."""

    token: Token
    feed: Feed
    bits: Annotated[int, Meta(ge=0, le=MAX_AUTHOR_BITS)]
    """How many bits of the key count; 0 means all authors."""
    prefix: Annotated[int, Meta(ge=0, le=2**MAX_AUTHOR_BITS)]
    """Their value, most significant bit first."""
    marks: Annotated[tuple[FeedMark, ...], Meta(max_length=MAX_MARKS_PER_MESSAGE)]
    """All authors among these that the asker knows of, and how far."""
    limit: Annotated[int, Meta(ge=1, le=MAX_ENTRIES_PER_ANSWER)]
    """Entries that the asker takes, all authors together."""


class Entries(Message, frozen=True, tag="entries"):
    """An answer, or one part of it."""

    token: Token
    feed: Feed
    batches: Annotated[tuple[Batch, ...], Meta(max_length=MAX_BATCHES_PER_MESSAGE)]
    last: bool
    """No part comes after this one."""


class Seek(Message, frozen=True, tag="seek"):
    """Do you hold this content?"""

    token: Token
    digest: WireDigest


class Found(Message, frozen=True, tag="found"):
    """Whether I do, whole, and will serve it."""

    token: Token
    held: bool


LinkMessage = (
    Hello
    | Refuse
    | Heartbeat
    | Shuffle
    | Peers
    | Ping
    | Pong
    | Probe
    | Probed
    | Suspects
    | Offer
    | Decline
    | Bye
    | Terms
    | Scalars
    | Marks
    | Ranges
    | Holding
    | Pull
    | Census
    | TrainedModel
    | AggregatedModel
    | Receipt
    | Closed
    | Ask
    | Entries
    | Seek
    | Found
)


class FetchRequest(Message, frozen=True, tag="fetch"):
    """Some consecutive chunks. First frame on a fetch stream; more for the same digest may follow, before or after the answer."""

    digest: WireDigest
    first_chunk: Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]
    num_chunks: Annotated[int, Meta(ge=1, le=MAX_CHUNKS)]


class FetchHeader(Message, frozen=True, tag="header"):
    """Answer to the first: the blob's size and every chunk's SHA-256, which together hash to the digest."""

    size_bytes: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)]
    chunk_hashes: Annotated[tuple[WireDigest, ...], Meta(min_length=1, max_length=MAX_CHUNKS)]


class FetchRefused(Message, frozen=True, tag="refused"):
    """Answer: no, and why."""

    reason: Reason


FetchMessage = FetchRequest | FetchHeader | FetchRefused

assert CHUNK_BYTES * MAX_CHUNKS == MAX_MODEL_BYTES
