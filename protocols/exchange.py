"""How models change hands: offer, want, fetch, retry, decline, give up.

Holds the count of who still needs which model, so that `Forget` is said exactly once. Knows nothing of
rounds or merging: what arrives is handed on as a `ModelArrived` notice.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta, Struct

from protocols.events import (
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    ModelArrived,
    PeerDown,
    PeerUp,
    Penalise,
    Received,
    Send,
    SetTimer,
    Timer,
    TimerFired,
)
from protocols.machine import Handler, Machine, Output
from protocols.messages import Decline, Offer
from protocols.view import View
from protocols.vocabulary import HOSTILE, ModelRef, PeerId, Reason

MAX_STRIKES = 3
"""Refused models after which a link is closed; the view then backs off for its longest time."""


class ExchangeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How much a node takes in at once."""

    max_parallel_fetches: Annotated[int, Meta(ge=1, le=64)] = 4
    """More fills a fast line; fewer spares a slow one."""
    max_waiting: Annotated[int, Meta(ge=1, le=1024)] = 64
    """Offers that wait their turn, one a peer. Beyond it the oldest is declined as busy."""
    max_attempts: Annotated[int, Meta(ge=1, le=20)] = 3
    retry_s: Annotated[float, Meta(gt=0, le=600)] = 1.0
    """Wait before the second attempt; it doubles with each further one."""
    num_generations: Annotated[int, Meta(ge=1, le=16)] = 2
    """Own offered models kept for peers that have not fetched yet."""


class _Transfer:
    __slots__ = ("attempts", "fetching", "peer", "ref")

    def __init__(self, peer: PeerId, ref: ModelRef) -> None:
        self.peer = peer
        self.ref = ref
        self.attempts = 0
        self.fetching = False


class Exchange(Machine):
    """The model exchange of one node."""

    def __init__(self, settings: ExchangeSettings, view: View, max_model_bytes: int) -> None:
        self._settings = settings
        self._view = view
        self._max_model_bytes = max_model_bytes
        self._offered: list[ModelRef] = []
        self._waiting: dict[PeerId, ModelRef] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._held: dict[bytes, int] = {}
        self._strikes: Counter[PeerId] = Counter()
        self._next_token = 0
        self.open = True
        """Whether models are wanted at all; closed once the node has finished learning."""

    # --- what the learning protocol asks ----------------------------------------------------------------
    def offer(self, ref: ModelRef, peers: Sequence[PeerId]) -> list[Output]:
        """Tell these neighbours of a new own model; the oldest one offered is let go."""
        out = self.present(ref)
        message = Offer(ref)
        out += [Send(peer, message) for peer in peers]
        return out

    def present(self, ref: ModelRef) -> list[Output]:
        """As `offer`, but tell only those who link up from now on."""
        self.hold(ref)
        self._offered.append(ref)
        out: list[Output] = []
        while len(self._offered) > self._settings.num_generations:
            out += self.release(self._offered.pop(0))
        return out

    def is_coming(self, ref: ModelRef) -> bool:
        """Whether these bytes are being fetched, or wait for another attempt, from whichever peer; one copy is enough."""
        transfers = self._transfers
        return bool(transfers) and any(item.ref.digest == ref.digest for item in transfers.values())

    def want(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """Fetch this model from a neighbour that says it holds it, though it offered nothing. Asked for again while it is
        on its way, or while another comes from that peer, nothing happens."""
        if self.is_coming(ref) or ref.size_bytes > self._max_model_bytes:
            return []
        busy = any(transfer.peer == peer for transfer in self._transfers.values())
        if busy or len(self._transfers) >= self._settings.max_parallel_fetches:
            return []
        return self._begin(peer, ref)

    def hold(self, ref: ModelRef) -> None:
        """Somebody in the core needs this model."""
        self._held[ref.digest] = self._held.get(ref.digest, 0) + 1

    def release(self, ref: ModelRef) -> list[Output]:
        """One holder less; the last one lets it be forgotten."""
        digest = ref.digest
        left = self._held.get(digest, 0) - 1
        assert left >= 0, "a model was released more often than it was held"
        if left:
            self._held[digest] = left
            return []
        del self._held[digest]
        # The same bytes may be coming in from a peer: then the end of that transfer settles it.
        return [] if self.is_coming(ref) else [Forget(ref)]

    # --- events -----------------------------------------------------------------------------------------
    def _on_offer(self, now: float, event: Received) -> list[Output]:
        assert isinstance(event.message, Offer)
        peer, ref = event.peer, event.message.ref
        if not self._view.learns(peer):
            return []
        if ref.size_bytes > self._max_model_bytes:
            detail = f"offered {ref.size_bytes} bytes, at most {self._max_model_bytes} fit the task"
            return [
                Send(peer, Decline(ref.digest, Reason.TOO_LARGE)),
                *self._strike(peer, Reason.TOO_LARGE, detail),
            ]
        if not self.open:
            return [Send(peer, Decline(ref.digest, Reason.IDLE))]
        for transfer in self._transfers.values():
            if transfer.peer == peer and transfer.ref == ref:
                return []
        if ref.digest in self._held:
            return self._hand_on(peer, ref)
        out: list[Output] = []
        self._waiting.pop(peer, None)
        self._waiting[peer] = ref
        if len(self._waiting) > self._settings.max_waiting:
            oldest = next(iter(self._waiting))
            out.append(Send(oldest, Decline(self._waiting.pop(oldest).digest, Reason.BUSY)))
        return out + self._start_waiting()

    def _strike(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        """Count a refusal; the third on one link ends it."""
        out: list[Output] = [Penalise(peer, reason, detail)]
        if self._view.is_live(peer):  # else it is gone or going, and nothing would clear its count
            self._strikes[peer] += 1
            if self._strikes[peer] == MAX_STRIKES:
                out += self._view.close(peer, reason, detail)
        return out

    def _start_waiting(self) -> list[Output]:
        out: list[Output] = []
        if not self._waiting:
            return out
        if not self.open:
            out += [Send(peer, Decline(ref.digest, Reason.IDLE)) for peer, ref in self._waiting.items()]
            self._waiting.clear()
        busy = {transfer.peer for transfer in self._transfers.values()}
        for peer in [peer for peer in self._waiting if peer not in busy]:
            ref = self._waiting.get(peer)
            if ref is None:
                continue  # taken up while giving up on one before it
            if ref.digest in self._held:
                out += self._hand_on(peer, self._waiting.pop(peer))
            elif len(self._transfers) >= self._settings.max_parallel_fetches:
                break
            elif not self.is_coming(ref):
                out += self._begin(peer, self._waiting.pop(peer))
        return out

    def _hand_on(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """The learning protocol takes over this hold, and releases it."""
        self.hold(ref)
        return [ModelArrived(peer, ref)]

    def _begin(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        self._next_token += 1
        self._transfers[self._next_token] = _Transfer(peer, ref)
        return self._attempt(self._next_token)

    def _attempt(self, token: int) -> list[Output]:
        transfer = self._transfers[token]
        if not self._view.is_live(transfer.peer):
            return self._give_up(token)
        transfer.attempts += 1
        transfer.fetching = True
        return [Fetch(token, transfer.peer, transfer.ref)]

    def _on_fetched(self, now: float, event: Fetched) -> list[Output]:
        """`ModelArrived` hands one hold to whoever takes it."""
        transfer = self._transfers.get(event.token)
        if transfer is None or not transfer.fetching:
            return []
        del self._transfers[event.token]
        return [*self._hand_on(transfer.peer, transfer.ref), *self._start_waiting()]

    def _on_fetch_failed(self, now: float, event: FetchFailed) -> list[Output]:
        token, reason = event.token, event.reason
        transfer = self._transfers.get(token)
        if transfer is None or not transfer.fetching:
            return []
        transfer.fetching = False
        out: list[Output] = []
        if reason in HOSTILE:
            out += self._strike(transfer.peer, reason, event.detail)
        superseded = transfer.peer in self._waiting
        exhausted = transfer.attempts >= self._settings.max_attempts
        if reason in HOSTILE or reason is Reason.GONE or superseded or exhausted:
            return out + self._give_up(token)
        wait = self._settings.retry_s * 2 ** (transfer.attempts - 1)
        return [*out, SetTimer(Timer("exchange", "retry", token), wait)]

    def _give_up(self, token: int) -> list[Output]:
        transfer = self._transfers.pop(token)
        # Half of it may lie on the disk, kept for the attempt that will not come.
        begun = transfer.attempts > 0 and transfer.ref.digest not in self._held
        forget: list[Output] = [Forget(transfer.ref)] if begun else []
        return forget + self._start_waiting()

    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        token = event.timer.token
        transfer = self._transfers.get(token) if event.timer.owner == "exchange" else None
        return [] if transfer is None or transfer.fetching else self._attempt(token)

    def _on_peer_up(self, now: float, event: PeerUp) -> list[Output]:
        if self._offered and self._view.learns(event.peer):
            return [Send(event.peer, Offer(self._offered[-1]))]
        return []

    def _on_peer_down(self, now: float, event: PeerDown) -> list[Output]:
        del self._strikes[event.peer]
        self._waiting.pop(event.peer, None)
        return []

    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        Offer: _on_offer,
        Fetched: _on_fetched,
        FetchFailed: _on_fetch_failed,
        TimerFired: _on_timer,
        PeerUp: _on_peer_up,
        PeerDown: _on_peer_down,
    }
