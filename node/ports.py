"""The ports between a core's shell and the world: each has a real and a simulated implementation.

`tests/laws/` runs one suite per port on both.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from protocols.entries import Feed, Head
from protocols.errors import PeerError
from protocols.events import (
    DialFailed,
    Discovered,
    Fetched,
    FetchFailed,
    KeepEntries,
    LinkDown,
    LinkUp,
    Recall,
    Recalled,
    Received,
    Record,
    Rejected,
)
from protocols.messages import LinkMessage
from protocols.vocabulary import HOSTILE, ContentRef, ModelRef, PeerId, Reason

NetworkEvent = LinkUp | LinkDown | DialFailed | Received | Rejected | Discovered | Fetched | FetchFailed

Deliver = Callable[[NetworkEvent], None]
"""How a network hands an event to its node."""


class Clock(Protocol):
    """Seconds that never go back."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's own."""

    def now(self) -> float:
        return time.monotonic()  # noqa: TID251 - the one place


class Network(Protocol):
    """Commands that return at once; whatever comes of them arrives as an event.

    Promises, tested in `tests/laws/test_network.py`: at most one link per peer, seen by both ends; messages on
    a link arrive whole, in order, at most once; every dial is answered by `LinkUp` or `DialFailed` unless the
    link already stands; a link's end is told once; what was sent before `disconnect` goes out first; a fetch is
    answered once, and `Fetched` only after every check. A fetch from several peers fails only when all of them have,
    and each that lies is named by `Rejected`, unless `FetchFailed` is about that one.
    """

    def dial(self, address: str) -> None: ...

    def disconnect(self, peer: PeerId, reason: Reason) -> None: ...

    def send(self, peer: PeerId, message: LinkMessage) -> None: ...

    def fetch(
        self, token: int, peer: PeerId, ref: ModelRef | ContentRef, others: Sequence[PeerId] = ()
    ) -> None: ...


class Contents(Protocol):
    """What a node keeps of shared content, and of what others say of it. All but `on_record` are called on the disk's thread, in
    the order of the effects; `on_record` on the loop."""

    def keep(self, effect: KeepEntries) -> None: ...

    def recall(self, effect: Recall) -> Recalled: ...

    def refused(self, effect: KeepEntries, problem: str) -> None:
        """`keep` has failed, and the core is told: whoever says something now says it anew."""

    def heads(self) -> tuple[tuple[Feed, tuple[Head, ...]], ...]: ...

    def on_record(self, record: Record) -> None: ...


def fetch_failure(peer: PeerId, failures: Mapping[PeerId, PeerError]) -> PeerError:
    """What to say of a fetch of which all sources failed: that `peer` lied, or else whatever is worth another try."""
    first = failures[peer]
    if first.reason in HOSTILE:
        return first
    harmless = [error for error in (first, *failures.values()) if error.reason not in HOSTILE]
    return next((error for error in harmless if error.reason is not Reason.GONE), first)
