"""What all replicas must have in common to stay equal, and how it is told: settings, terms, signatures.

Belongs here: the settings of learning by scalars, those of them that are compared when two nodes meet, and a round as
every replica applies it.
"""

import hashlib
from collections.abc import Iterable
from math import sqrt
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.events import RoundScalars
from protocols.messages import Terms
from protocols.scalar_log import ScalarLog
from protocols.vocabulary import DIGEST_BYTES, MAX_CODES, MAX_IDS_PER_MESSAGE, Reason, ScalarRecord

GENERATORS = {
    "rademacher": "philox4x64-10/rademacher/1",
    "gaussian": "philox4x64-10/gaussian/1",
}
"""Name and version of each way to make a direction: both ends of a link must have the same."""


class ScalarSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How a node learns by shared-seed scalars. Times in seconds.

    Fields marked * are terms: the same on all nodes, and compared when they meet.
    """

    rounds: Annotated[int, Meta(ge=0)] = 0
    """Rounds after which the node stops estimating and only serves; 0 means for ever. *"""
    samples: Annotated[int, Meta(ge=1, le=MAX_CODES)] = 8
    """Scalars of this node in each round, each from two forward passes on a batch of its own. More share one signature, so
    a scalar costs fewer bytes; fewer make shorter rounds. A slow device may have fewer than the others."""
    learning_rate: Annotated[float, Meta(gt=0, le=1e6)] = 1e-3
    """Of the step along one direction. It must fall as the number of trained parameters grows: 1e-6 for all of a language
    model, 1e-2 for a small head. *"""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls to 0 over `rounds`. *"""
    normalise: Literal["mean", "sqrt"] = "mean"
    """Divide a round's sum by the number of its scalars, or by the root of it, with which the step grows as more peers take
    part. *"""
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Times the learning rate: what trained parameters lose in a round, biases and norms apart. *"""
    epsilon: Annotated[float, Meta(gt=0, le=1)] = 2.0**-10
    """Length of the perturbation in each parameter. A power of two perturbs most parameters without rounding. Larger for
    half precision (2**-7), where smaller ones vanish."""
    direction: Literal["rademacher", "gaussian"] = "rademacher"
    """`rademacher` is +1 or -1, exact on every platform, and has the smaller variance. *"""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of the one-byte code: `stochastic` is right in the mean, `nearest` has the smaller error (at most 6.5 %)."""
    clip_quantile: Annotated[float, Meta(gt=0, le=1)] = 0.99
    """Scalars larger than this share of those in the last checkpoint interval count as its largest; 1 clips nothing. *"""
    private_clip: Annotated[float, Meta(gt=0)] | None = None
    """Each example's scalar is clipped to this before the mean of a batch is taken (DPZero); left out, it is not."""
    private_noise: Annotated[float, Meta(ge=0)] = 0.0
    """Gaussian noise on the scalar, in units of `private_clip` by the batch size."""
    pool: Annotated[int, Meta(ge=0, le=2**20)] = 0
    """All directions come from so many seeds, and the state is one number for each of them (FedKSeed): 4096 is usual. Each
    replay goes through all of them, so it is for small sets of parameters. 0 makes every direction new. *"""
    quorum: Annotated[float, Meta(ge=0, le=1)] = 0.8
    """Share of the last round's authors that a round waits for; for the others it waits a quarter longer than that took."""
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait for them. What comes later still counts until its round is sealed, and has it replayed."""
    pause_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Least time from one round's start to the next."""
    evaluate_every: Annotated[int, Meta(ge=1)] = 10
    checkpoint_every: Annotated[int, Meta(ge=1, le=2**20)] = 20
    """Rounds between checkpoints, on which neighbours agree and before which the log is cut. Fewer make late records and
    restarts cheaper; each costs a replay of its rounds, and a file of the trained parameters. *"""
    late_rounds: Annotated[int, Meta(ge=0, le=2**20)] = 2
    """Rounds by which a straggler may be late in any case: so long a checkpoint waits for its records. *"""
    max_authors: Annotated[int, Meta(ge=1, le=MAX_IDS_PER_MESSAGE)] = 1024
    """Of one round: a bound on what strangers can make a node hold and replay. *"""
    max_samples: Annotated[int, Meta(ge=1, le=MAX_CODES)] = 32
    """Of one author in one round. Its weight is that of its scalars, so this bounds what one can weigh beside others. *"""
    members: tuple[str, ...] = ()
    """Peer ids whose records count; left out, anyone's do. *"""
    wait_for_peers: Annotated[int, Meta(ge=0, le=64)] = 0
    """Neighbours to have before the very first round begins."""
    wait_at_most_s: Annotated[float, Meta(gt=0, le=86400)] = 60.0
    """The first round begins after this long in any case."""
    sync_s: Annotated[float, Meta(ge=0, le=600)] = 1.0
    """A node that starts listens for so long before its first round, to begin where the others are."""
    batch_s: Annotated[float, Meta(ge=0, le=60)] = 0.05
    """Records gather so long before they go out together."""
    repair_s: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    """Every so often the log is compared with one neighbour's."""
    keep_log: bool = True
    """Keep all records on the disk, some 150 bytes each, so that `covey verify` can replay them from the base model."""

    def __post_init__(self) -> None:
        """Raises ValueError where settings contradict each other."""
        if self.schedule == "linear" and not self.rounds:
            raise ValueError("schedule 'linear' falls to 0 over rounds, which must then be 1 or more")
        if self.samples > self.max_samples:
            raise ValueError(f"samples {self.samples} must be at most max_samples {self.max_samples}")
        if self.pool and self.weight_decay:
            raise ValueError("weight_decay cannot go with a pool: its state is one number a seed")
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                "learning_rate times weight_decay must be below 1, or nothing is left of a parameter"
            )
        if self.private_noise and self.private_clip is None:
            raise ValueError("private_noise is in units of private_clip, which must then be given")


def terms_of(settings: ScalarSettings, base: bytes, members: Iterable[bytes]) -> Terms:
    """What this node tells others of how it computes. members: the author keys of `settings.members`."""
    keys = sorted(members)
    return Terms(
        generator=GENERATORS[settings.direction],
        base=base,
        learning_rate=_number(settings.learning_rate),
        schedule=settings.schedule,
        rounds=settings.rounds,
        normalise=settings.normalise,
        weight_decay=_number(settings.weight_decay),
        clip_quantile=_number(settings.clip_quantile),
        pool=settings.pool,
        checkpoint_every=settings.checkpoint_every,
        late_rounds=settings.late_rounds,
        max_authors=settings.max_authors,
        max_samples=settings.max_samples,
        members=hashlib.sha256(b"".join(keys)).digest() if keys else bytes(DIGEST_BYTES),
    )


def _number(value: float) -> float:
    """One spelling for equal numbers: signatures are bound to the bytes."""
    return float(value) + 0.0


def terms_digest(terms: Terms) -> bytes:
    """What every signature is bound to."""
    return hashlib.sha256(msgspec.msgpack.encode(terms)).digest()


def misfit(ours: Terms, theirs: Terms) -> tuple[Reason, str] | None:
    """Why these two cannot share a log, in a sentence that both operators understand."""
    if theirs.generator != ours.generator:
        return Reason.GENERATOR, f"directions '{theirs.generator}' met '{ours.generator}'"
    if theirs.base != ours.base:
        what = f"base models differ ({theirs.base.hex()[:12]} met {ours.base.hex()[:12]})"
        return Reason.BASE, f"{what}: all nodes need the same model file, task options and dtype"
    for name in Terms.__struct_fields__:
        one, other = getattr(theirs, name), getattr(ours, name)
        if one != other:
            told = " differ" if isinstance(one, bytes) else f" {one} met {other}"
            return Reason.TERMS, f"scalars.{name}{told}"
    return None


def counting_rounds(
    settings: ScalarSettings, log: ScalarLog, after: int, last: int
) -> tuple[RoundScalars, ...]:
    """The rounds after one up to another as they are applied: those in which somebody measured something."""
    counting = [(number, log.counting(number)) for number in log.rounds(after + 1, last)]
    return tuple(
        round_scalars(settings, number, records)
        for number, records in counting
        if any(record.codes for record in records)
    )


def round_scalars(settings: ScalarSettings, number: int, records: tuple[ScalarRecord, ...]) -> RoundScalars:
    """A round as all replicas apply it: float64, and only operations that IEEE 754 rounds the same everywhere."""
    count = sum(len(record.codes) for record in records)
    rate = settings.learning_rate
    if settings.schedule == "linear":
        rate = rate * max(0.0, 1.0 - (number - 1) / settings.rounds)
    scale = rate / (count if settings.normalise == "mean" else sqrt(count)) if count else 0.0
    return RoundScalars(number, scale, rate * settings.weight_decay, records)
