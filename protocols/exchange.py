"""How models change hands: offer, want, fetch, retry, decline, give up.

Holds the count of who still needs which model, so that `Forget` is said exactly once. Knows nothing of
rounds or merging: what arrives is handed on as a `ModelArrived` notice.
"""

from collections import Counter
from typing import Annotated

from msgspec import Meta, Struct

from protocols.events import (
    Disconnect,
    Effect,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    ModelArrived,
    Notice,
    PeerDown,
    PeerUp,
    Penalise,
    Received,
    Send,
    SetTimer,
    Timer,
    TimerFired,
)
from protocols.messages import Decline, Offer, Refuse
from protocols.view import View
from protocols.vocabulary import HOSTILE, Digest, ModelRef, PeerId, Reason, one_line

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


Output = Effect | Notice


class Exchange:
    """The model exchange of one node."""

    def __init__(self, settings: ExchangeSettings, view: View, max_model_bytes: int) -> None:
        self._settings = settings
        self._view = view
        self._max_model_bytes = max_model_bytes
        self._offered: list[ModelRef] = []
        self._waiting: dict[PeerId, ModelRef] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._held: Counter[Digest] = Counter()
        self._strikes: Counter[PeerId] = Counter()
        self._next_token = 0
        self.open = True
        """Whether models are wanted at all; closed once the node has finished learning."""

    # --- what the learning protocol asks ----------------------------------------------------------------
    def offer(self, ref: ModelRef) -> list[Output]:
        """Tell every learning neighbour of a new own model; the oldest one offered is let go."""
        out = self.present(ref)
        out += [Send(peer, Offer(ref)) for peer in self._view.live_learners()]
        return out

    def present(self, ref: ModelRef) -> list[Output]:
        """As `offer`, but tell only those who link up from now on."""
        self.hold(ref)
        self._offered.append(ref)
        out: list[Output] = []
        while len(self._offered) > self._settings.num_generations:
            out += self.release(self._offered.pop(0))
        return out

    def hold(self, ref: ModelRef) -> None:
        """Somebody in the core needs this model."""
        self._held[Digest(ref.digest)] += 1

    def release(self, ref: ModelRef) -> list[Output]:
        """One holder less; the last one lets it be forgotten."""
        digest = Digest(ref.digest)
        assert self._held[digest] > 0, "a model was released more often than it was held"
        self._held[digest] -= 1
        if self._held[digest]:
            return []
        del self._held[digest]
        # The same bytes may be coming in from a peer: then the end of that transfer settles it.
        return [] if self._in_transit(ref) else [Forget(ref)]

    # --- events -----------------------------------------------------------------------------------------
    def step(self, now: float, event: Event | Notice) -> list[Output]:
        """What the event means for the exchange; `ModelArrived` hands one hold to whoever takes it."""
        match event:
            case Received(peer, Offer(ref)):
                return self._on_offer(peer, ref)
            case Fetched(token):
                return self._on_fetched(token)
            case FetchFailed(token, reason, detail):
                return self._on_fetch_failed(token, reason, detail)
            case TimerFired(Timer("exchange", _, token)):
                transfer = self._transfers.get(token)
                return [] if transfer is None or transfer.fetching else self._attempt(token)
            case PeerUp(peer):
                if self._offered and self._view.learns(peer):
                    return [Send(peer, Offer(self._offered[-1]))]
                return []
            case PeerDown(peer):
                del self._strikes[peer]
                self._waiting.pop(peer, None)
                return []
            case _:
                return []

    def _on_offer(self, peer: PeerId, ref: ModelRef) -> list[Output]:
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
        if any(transfer.peer == peer and transfer.ref == ref for transfer in self._transfers.values()):
            return []
        if Digest(ref.digest) in self._held:
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
        self._strikes[peer] += 1
        out: list[Output] = [Penalise(peer, reason, detail)]
        if self._strikes[peer] == MAX_STRIKES:
            out += [Send(peer, Refuse(reason, one_line(detail))), Disconnect(peer, reason)]
        return out

    def _start_waiting(self) -> list[Output]:
        out: list[Output] = []
        if not self.open:
            out += [Send(peer, Decline(ref.digest, Reason.IDLE)) for peer, ref in self._waiting.items()]
            self._waiting.clear()
        busy = {transfer.peer for transfer in self._transfers.values()}
        for peer in [peer for peer in self._waiting if peer not in busy]:
            ref = self._waiting.get(peer)
            if ref is None:
                continue  # taken up while giving up on one before it
            if Digest(ref.digest) in self._held:
                out += self._hand_on(peer, self._waiting.pop(peer))
            elif len(self._transfers) >= self._settings.max_parallel_fetches:
                break
            elif not self._in_transit(ref):
                self._next_token += 1
                self._transfers[self._next_token] = _Transfer(peer, self._waiting.pop(peer))
                out += self._attempt(self._next_token)
        return out

    def _in_transit(self, ref: ModelRef) -> bool:
        """The same bytes may be on their way from another peer; one copy is enough."""
        return any(transfer.ref.digest == ref.digest for transfer in self._transfers.values())

    def _hand_on(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """The learning protocol takes over this hold, and releases it."""
        self.hold(ref)
        return [ModelArrived(peer, ref)]

    def _attempt(self, token: int) -> list[Output]:
        transfer = self._transfers[token]
        if not self._view.is_live(transfer.peer):
            return self._give_up(token)
        transfer.attempts += 1
        transfer.fetching = True
        return [Fetch(token, transfer.peer, transfer.ref)]

    def _on_fetched(self, token: int) -> list[Output]:
        transfer = self._transfers.get(token)
        if transfer is None or not transfer.fetching:
            return []
        del self._transfers[token]
        return [*self._hand_on(transfer.peer, transfer.ref), *self._start_waiting()]

    def _on_fetch_failed(self, token: int, reason: Reason, detail: str) -> list[Output]:
        transfer = self._transfers.get(token)
        if transfer is None or not transfer.fetching:
            return []
        transfer.fetching = False
        out: list[Output] = []
        if reason in HOSTILE:
            out += self._strike(transfer.peer, reason, detail)
        superseded = transfer.peer in self._waiting
        exhausted = transfer.attempts >= self._settings.max_attempts
        if reason in HOSTILE or reason is Reason.GONE or superseded or exhausted:
            return out + self._give_up(token)
        wait = self._settings.retry_s * 2 ** (transfer.attempts - 1)
        return [*out, SetTimer(Timer("exchange", "retry", token), wait)]

    def _give_up(self, token: int) -> list[Output]:
        ref = self._transfers.pop(token).ref
        # Half of it may lie on the disk, kept for the attempt that will not come.
        forget: list[Output] = [] if Digest(ref.digest) in self._held else [Forget(ref)]
        return forget + self._start_waiting()
