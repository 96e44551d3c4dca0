"""Everything that can happen to a node core, and everything it can ask for: the one seam, on one page.

Time (`now`, seconds) is an argument of `NodeCore.step`, never a field. Every piece of work and every timer
carries a token; an answer whose token is no longer awaited is dropped, so nothing is ever cancelled.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

from msgspec import Struct

from protocols.entries import Batch, Cut, Entry, Feed, Head, Want
from protocols.messages import Hello, LinkMessage
from protocols.vocabulary import (
    Checkpoint,
    ContentRef,
    Detail,
    Digest,
    ModelRef,
    PeerId,
    PeerRecord,
    Reason,
    ScalarRecord,
)


class _Fact(Struct, frozen=True, tag=True):
    """Frozen, and tagged with its class name when it is written to a trace."""


# --- events in ------------------------------------------------------------------------------------------
class Started(_Fact, frozen=True, omit_defaults=True):
    """The node runs: where it listens, whom it knew, and the model it begins or goes on with.

    checkpoint, records: of a node that learns by scalars, what it kept; `ref` is then the base model.
    unix_s: the wall clock's time now. A node's incarnation begins with it, so that its word of today counts more than that
        of its former lives, and invitations end by it.
    heads: where the feeds stand that the node keeps, its own among them.
    """

    addresses: tuple[str, ...]
    peers: tuple[PeerRecord, ...]
    ref: ModelRef | None
    checkpoint: Checkpoint | None = None
    records: tuple[ScalarRecord, ...] = ()
    unix_s: float = 0.0
    heads: tuple[tuple[Feed, tuple[Head, ...]], ...] = ()


class LinkUp(_Fact, frozen=True):
    """A secured link stands. At most one per peer: the adapter settles simultaneous dials."""

    peer: PeerId
    outbound: bool
    address: str


class LinkDown(_Fact, frozen=True):
    peer: PeerId
    reason: Reason
    detail: Detail = ""


class DialFailed(_Fact, frozen=True):
    address: str
    reason: Reason
    detail: Detail = ""


class Received(_Fact, frozen=True):
    peer: PeerId
    message: LinkMessage


class Rejected(_Fact, frozen=True):
    """The adapter threw away bytes before they became a message. `peer` is empty where none was proved."""

    peer: PeerId
    reason: Reason
    detail: Detail = ""


class Discovered(_Fact, frozen=True):
    """A discovery service heard of these addresses. Nothing proves them before the handshake."""

    addresses: tuple[str, ...]


class TimerFired(_Fact, frozen=True):
    timer: "Timer"


class Fetched(_Fact, frozen=True):
    """The model is held locally; hashes, schema and finiteness are checked."""

    token: int


class FetchFailed(_Fact, frozen=True):
    token: int
    reason: Reason
    detail: Detail = ""


class Trained(_Fact, frozen=True):
    token: int
    ref: ModelRef


class Aggregated(_Fact, frozen=True, omit_defaults=True):
    """report: what the merge did, name by name, for the operator (see `aggregation.base.Report`)."""

    token: int
    ref: ModelRef
    report: tuple[tuple[str, str | float], ...] = ()


class Evaluated(_Fact, frozen=True):
    token: int
    metrics: Mapping[str, float]


class Estimated(_Fact, frozen=True):
    """One byte a scalar, in the order of the samples (see `aggregation/scalar_code.py`). The core does not look inside."""

    token: int
    codes: bytes


class Replayed(_Fact, frozen=True):
    token: int
    ref: ModelRef


class WorkFailed(_Fact, frozen=True):
    """Training, merging, evaluating, estimating or replaying raised; the detail is the exception's text."""

    token: int
    detail: Detail


class Publish(_Fact, frozen=True):
    """The operator says something to all: entries of one feed, in order."""

    feed: Feed
    entries: tuple[Entry, ...]


class BeginAnew(_Fact, frozen=True):
    """The operator takes back all that it has said in a feed."""

    feed: Feed


class Get(_Fact, frozen=True):
    """The operator wants content. Answered by the record `ContentHeld` or `ContentMissing`, once; what is asked for already is
    asked for once.

    hints: peers that may hold it, such as its sharers. likely: peers that hold what it belongs to: those of them that are linked
    need not be asked first.
    """

    ref: ContentRef
    hints: tuple[PeerId, ...] = ()
    likely: tuple[PeerId, ...] = ()


class Drop(_Fact, frozen=True):
    """The operator wants it no more."""

    digest: Digest


class Hold(_Fact, frozen=True):
    """The node's shell serves these contents from now on, or does not any more."""

    digests: tuple[Digest, ...]
    held: bool = True


class Recalled(_Fact, frozen=True):
    """What a `Recall` brought: whole batches, in the order of the wants."""

    token: int
    batches: tuple[Batch, ...]


class HeadsRead(_Fact, frozen=True):
    """Where the feeds stand that are kept: something that the core gave to be kept was not, and did not happen."""

    heads: tuple[tuple[Feed, tuple[Head, ...]], ...]


class StopRequested(_Fact, frozen=True):
    """The operator wants out: say goodbye, keep what is worth keeping, halt."""


Event = (
    Started
    | LinkUp
    | LinkDown
    | DialFailed
    | Received
    | Rejected
    | Discovered
    | TimerFired
    | Fetched
    | FetchFailed
    | Trained
    | Aggregated
    | Evaluated
    | Estimated
    | Replayed
    | WorkFailed
    | Publish
    | BeginAnew
    | Get
    | Drop
    | Hold
    | Recalled
    | HeadsRead
    | StopRequested
)


# --- notices: what one machine inside the core tells the others -----------------------------------------
class Notice(_Fact, frozen=True):
    """Stays inside the core: the router hands it to the machines in the same step."""


class PeerUp(Notice, frozen=True):
    """The handshake succeeded."""

    peer: PeerId
    hello: Hello


class PeerDown(Notice, frozen=True):
    peer: PeerId
    reason: Reason


class Reached(Notice, frozen=True):
    """A peer that a machine asked the view to reach is there, on a link of whichever kind."""

    peer: PeerId


class Unreachable(Notice, frozen=True):
    """It is not; or it was, and the link to it has ended."""

    peer: PeerId
    reason: Reason


class RecordHeard(Notice, frozen=True):
    """What a peer says of itself, its signature checked, and newer than what the view knew."""

    record: PeerRecord


class ModelArrived(Notice, frozen=True):
    peer: PeerId
    ref: ModelRef


class FetchGaveUp(Notice, frozen=True):
    """A model that a learning protocol asked for by `Exchange.take` will not come."""

    peer: PeerId
    ref: ModelRef


# --- effects out ----------------------------------------------------------------------------------------
Owner = Literal["view", "exchange", "learning", "content"]
"""The machine that a timer belongs to."""


class Timer(_Fact, frozen=True):
    owner: Owner
    name: str
    token: int


class Dial(_Fact, frozen=True):
    """Answered by `LinkUp` or `DialFailed`."""

    address: str


class Disconnect(_Fact, frozen=True):
    """What was sent before goes out first. Answered by `LinkDown`."""

    peer: PeerId
    reason: Reason


class Send(_Fact, frozen=True):
    peer: PeerId
    message: LinkMessage


class SetTimer(_Fact, frozen=True):
    timer: Timer
    after_s: float


class Fetch(_Fact, frozen=True, omit_defaults=True):
    """Answered by `Fetched` or `FetchFailed`, once.

    others: further linked peers that said they hold the same bytes; all are pulled from at once. One that lies is told by
        `Rejected` while the fetch goes on. What `FetchFailed` says is about `peer`, unless that one is not to blame.
    """

    token: int
    peer: PeerId
    ref: ModelRef | ContentRef
    others: tuple[PeerId, ...] = ()


class Train(_Fact, frozen=True):
    """Local steps from `ref`; the round selects the batches. Answered by `Trained` or `WorkFailed`."""

    token: int
    ref: ModelRef
    round: int


class Input(Struct, frozen=True):
    """One received model in a merge. Staleness is counted in rounds, never negative."""

    peer: PeerId
    ref: ModelRef
    staleness: int


class Aggregate(_Fact, frozen=True):
    """Answered by `Aggregated` or `WorkFailed`.

    rule: "round" merges by the configured rules. "final" adds to a mean over all samples: the answer's `num_samples` is
        that of own and all inputs together. "accept" takes whichever of own and the one input does better on the node's
        validation data; the answer may then be own, or the input.
    """

    token: int
    own: ModelRef
    inputs: tuple[Input, ...]
    rule: Literal["round", "final", "accept"] = "round"


class Evaluate(_Fact, frozen=True):
    """Answered by `Evaluated` or `WorkFailed`."""

    token: int
    ref: ModelRef


class RoundScalars(Struct, frozen=True, array_like=True):
    """All that counts in one round, and how: equal on all replicas.

    scale: of the sum over the round's scalars, learning rate and normalisation together. decay: the share that decayed
    parameters lose first. records: in the order of their authors' keys.
    """

    round: int
    scale: float
    decay: float
    records: tuple[ScalarRecord, ...]


class Estimate(_Fact, frozen=True):
    """Measure so many scalars at the state `ref`; author, round and sample select the directions. Answered by `Estimated`
    or `WorkFailed`."""

    token: int
    ref: ModelRef
    round: int
    num_samples: int


class Replay(_Fact, frozen=True):
    """Apply rounds to the state `ref`, in order. Answered by `Replayed` or `WorkFailed`.

    name: of the resulting state, equal for equal logs, and the answer's digest unless it is saved. save: whether the result
    has to outlive the next replay, and be fit to be served; its digest then is that of its bytes. Of states that are
    not saved only the newest can be used.
    """

    token: int
    ref: ModelRef
    rounds: tuple[RoundScalars, ...]
    name: bytes
    save: bool


class KeepScalars(_Fact, frozen=True):
    """Make these records durable, before any effect after this one; and where the log now begins, if that changed.

    checkpoint: sealed; records of rounds up to `cut` are not needed any more to go on.
    """

    records: tuple[ScalarRecord, ...]
    checkpoint: Checkpoint | None = None
    cut: int = 0


class KeepEntries(_Fact, frozen=True):
    """Make these entries durable; those of `cuts` go first.

    They are checked: a batch goes on where the author's feed ends, or comes after a cut.
    """

    feed: Feed
    batches: tuple[Batch, ...]
    cuts: tuple[Cut, ...] = ()


class Recall(_Fact, frozen=True):
    """Bring entries for a peer, each author's up to an entry that has its signature. Answered by `Recalled`.

    max_bytes: of all together, encoded; what does not fit is left out at the end.
    """

    token: int
    feed: Feed
    wants: tuple[Want, ...]
    max_bytes: int


class Keep(_Fact, frozen=True):
    """Make this model the newest durable checkpoint."""

    ref: ModelRef


class Forget(_Fact, frozen=True):
    """Nothing in the core refers to this model any more."""

    ref: ModelRef


class KeepPeer(_Fact, frozen=True):
    """A peer worth remembering across restarts."""

    record: PeerRecord


class Penalise(_Fact, frozen=True):
    """Count a refusal. `peer` is empty where none was proved."""

    peer: PeerId
    reason: Reason
    detail: Detail = ""


class Emit(_Fact, frozen=True):
    """A record for the operator: one JSON line."""

    record: "Record"


class Halt(_Fact, frozen=True):
    """The core is done; the shell may close everything."""


Effect = (
    Dial
    | Disconnect
    | Send
    | SetTimer
    | Fetch
    | Train
    | Aggregate
    | Evaluate
    | Estimate
    | Replay
    | KeepScalars
    | KeepEntries
    | Recall
    | Keep
    | Forget
    | KeepPeer
    | Penalise
    | Emit
    | Halt
)


# --- records --------------------------------------------------------------------------------------------
class Phase(StrEnum):
    """Where in its round a learning node stands."""

    WAITING = "waiting"
    TRAINING = "training"
    COLLECTING = "collecting"
    MERGING = "merging"
    EVALUATING = "evaluating"
    PAUSING = "pausing"
    FINAL = "final merge"
    DONE = "done"
    CATCHING_UP = "catching up"
    # of shared-seed scalars alone
    ESTIMATING = "estimating"
    REPLAYING = "replaying"
    SETTLING = "settling"


class RoundDone(_Fact, frozen=True, omit_defaults=True):
    """One learning round ended."""

    round: int
    num_merged: int
    """Received models that went into the merge."""
    staleness_max: int
    metrics: Mapping[str, float]
    duration_s: float
    report: Mapping[str, str | float] = {}
    """What the merge did, where its rules have something to say."""


class FinalMergeDone(_Fact, frozen=True):
    """The merge after the last round ended for this node."""

    num_members: int
    """Nodes in its session, itself included. 1 where it was alone, or late and at most given the others' result."""
    num_stages: int
    """Of the session, those that it had a part in."""
    num_samples: int
    """Behind the merged model: where all were reached, those of all members."""
    before: Mapping[str, float]
    """Metrics of the node's own model; empty where there was nothing to compare it with."""
    merged: Mapping[str, float]
    """Metrics of the merged model."""
    kept: Literal["own", "merged"]
    duration_s: float
    """With the wait for the others."""


class LinkChanged(_Fact, frozen=True):
    peer: PeerId
    up: bool
    reason: str
    num_live: int


class Trouble(_Fact, frozen=True):
    """Something failed here that an operator should know of."""

    what: str
    detail: str


class CaughtUp(_Fact, frozen=True):
    """A node that came late, or back after an absence, has the network's model now."""

    round: int
    """That it goes on with."""
    from_round: int
    num_models: int
    """Of neighbours, that it began anew from."""
    duration_s: float


class LearningDone(_Fact, frozen=True):
    """All configured rounds are finished; the node goes on serving."""

    round: int


class ContentHeld(_Fact, frozen=True):
    """Content that the operator wanted is here, whole and checked."""

    digest: Digest
    sources: tuple[PeerId, ...]
    """Whom it was asked of."""


class ContentMissing(_Fact, frozen=True):
    """Content that the operator wanted cannot be had now."""

    digest: Digest
    detail: Detail


Record = (
    ContentHeld
    | ContentMissing
    | RoundDone
    | FinalMergeDone
    | CaughtUp
    | LinkChanged
    | Trouble
    | LearningDone
)
