"""How models change hands: offer, want, fetch, retry, decline, give up.

Holds the count of who still needs which model, so that `Forget` is said exactly once. Knows nothing of
rounds or merging: what arrives is handed on as a `ModelArrived` notice.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta, Struct

from protocols.events import (
    Fetch,
    Fetched,
    FetchFailed,
    FetchGaveUp,
    Forget,
    LinkDown,
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
MAX_SOURCES = 4
"""Peers that one model is pulled from at once."""
MAX_NAMED = 16
"""Holders remembered for one model, of whom those that are linked are asked."""
BAD_MODEL = frozenset({Reason.WRONG_FORMAT, Reason.WRONG_SHAPE, Reason.NON_FINITE})
"""What is wrong with the bytes that the digest names: another peer has no better ones."""


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


class _Wanted:
    """A model that waits its turn.

    others: named by the learning protocol as holders of the same bytes, besides `peer`.
    taken: the learning protocol asked for it, and is told if it does not come.
    """

    __slots__ = ("others", "peer", "ref", "taken")

    def __init__(
        self, peer: PeerId, ref: ModelRef, others: Sequence[PeerId] = (), taken: bool = False
    ) -> None:
        self.peer = peer
        self.ref = ref
        self.others = tuple(others[:MAX_NAMED])
        self.taken = taken

    def joined(self, again: "_Wanted") -> "_Wanted":
        """The same model, wanted once more."""
        others = dict.fromkeys((*self.others, *again.others))
        return _Wanted(self.peer, self.ref, tuple(others), self.taken or again.taken)


class _Transfer:
    __slots__ = ("attempts", "bad", "fetching", "source", "wanted")

    def __init__(self, wanted: _Wanted) -> None:
        self.wanted = wanted
        self.source = wanted.peer
        """Whom the last attempt asked first."""
        self.bad: set[PeerId] = set()
        """Not to be asked again."""
        self.attempts = 0
        self.fetching = False

    @property
    def peer(self) -> PeerId:
        return self.wanted.peer

    @property
    def ref(self) -> ModelRef:
        return self.wanted.ref


class Exchange(Machine):
    """The model exchange of one node."""

    def __init__(self, settings: ExchangeSettings, view: View, max_model_bytes: int) -> None:
        self._settings = settings
        self._view = view
        self._max_model_bytes = max_model_bytes
        self._offered: list[ModelRef] = []
        self._waiting: dict[PeerId, _Wanted] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._held: dict[bytes, int] = {}
        self._strikes: Counter[PeerId] = Counter()
        self._next_token = 0
        self._first_few = 0
        self.open = True
        """Whether models are wanted at all; closed once the node has finished learning."""
        self.heeds_offers = True
        """Whether what neighbours offer is fetched; else the learning protocol takes what it wants."""

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
        if busy or len(self._transfers) >= self._num_places():
            return []
        return self._begin(_Wanted(peer, ref))

    def take(self, peer: PeerId, ref: ModelRef, others: Sequence[PeerId] = ()) -> list[Output]:
        """Get this model as if the neighbour had offered it: it waits its turn, one a peer. Ends in `ModelArrived` for this
        peer and reference, or in `FetchGaveUp`.

        others: further neighbours that hold the same bytes.
        """
        wanted = _Wanted(peer, ref, others, taken=True)
        if ref.size_bytes > self._max_model_bytes:
            detail = f"named {ref.size_bytes} bytes, at most {self._max_model_bytes} fit the task"
            return [*self._strike(peer, Reason.TOO_LARGE, detail), *_gave_up(wanted)]
        if not self.open:
            return _gave_up(wanted)
        for transfer in self._transfers.values():
            if transfer.peer == peer and transfer.ref == ref:
                transfer.wanted = transfer.wanted.joined(wanted)
                return []
        return self._hand_on(peer, ref) if ref.digest in self._held else self._queue(wanted)

    def hasten(self, count: int) -> None:
        """Until told otherwise fetch the next so many models first, and the rest after them, one by one; 0 ends the haste."""
        self._first_few = count

    def _num_places(self) -> int:
        """Fetches that may run at once."""
        most = self._settings.max_parallel_fetches
        return min(self._first_few, most) if self._first_few else most

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
        if not self._view.learns(peer) or not self._view.is_neighbour(peer) or not self.heeds_offers:
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
        return self._queue(_Wanted(peer, ref))

    def _queue(self, wanted: _Wanted) -> list[Output]:
        """The newest that a peer has takes the place of an older one that waits."""
        out: list[Output] = []
        if replaced := self._waiting.pop(wanted.peer, None):
            if replaced.ref == wanted.ref:
                wanted = replaced.joined(wanted)
            else:
                out += _gave_up(replaced)
        self._waiting[wanted.peer] = wanted
        if len(self._waiting) > self._settings.max_waiting:
            oldest = next(iter(self._waiting))
            out += _turned_away(self._waiting.pop(oldest), Reason.BUSY)
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
            for wanted in self._waiting.values():
                out += _turned_away(wanted, Reason.IDLE)
            self._waiting.clear()
        busy = {transfer.peer for transfer in self._transfers.values()}
        for peer in [peer for peer in self._waiting if peer not in busy]:
            item = self._waiting.get(peer)
            if item is None:
                continue  # taken up while giving up on one before it
            if item.ref.digest in self._held:
                out += self._hand_on(peer, self._waiting.pop(peer).ref)
            elif len(self._transfers) >= self._num_places():
                break
            elif not self.is_coming(item.ref):
                out += self._begin(self._waiting.pop(peer))
        return out

    def _hand_on(self, peer: PeerId, ref: ModelRef) -> list[Output]:
        """The learning protocol takes over this hold, and releases it."""
        self.hold(ref)
        return [ModelArrived(peer, ref)]

    def _begin(self, wanted: _Wanted) -> list[Output]:
        self._next_token += 1
        self._transfers[self._next_token] = _Transfer(wanted)
        return self._attempt(self._next_token)

    def _attempt(self, token: int) -> list[Output]:
        transfer = self._transfers[token]
        sources = self._sources(transfer)
        if not sources:
            return self._give_up(token)
        transfer.attempts += 1
        transfer.fetching = True
        transfer.source = sources[0]
        return [Fetch(token, sources[0], transfer.ref, sources[1:])]

    def _named_and_live(self, wanted: _Wanted, bad: Collection[PeerId] = ()) -> list[PeerId]:
        named = dict.fromkeys((wanted.peer, *wanted.others))
        return [peer for peer in named if peer not in bad and self._view.is_live(peer)]

    def _sources(self, transfer: _Transfer) -> tuple[PeerId, ...]:
        """The neighbours to pull it from: whose it is, those named with it, and those whose offer of the same bytes waits."""
        ref = transfer.ref
        sources = dict.fromkeys(self._named_and_live(transfer.wanted, transfer.bad))
        for item in self._waiting.values():
            if (item.ref.digest, item.ref.size_bytes) == (ref.digest, ref.size_bytes):
                sources.update(dict.fromkeys(self._named_and_live(item, transfer.bad)))
        return tuple(sources)[:MAX_SOURCES]

    def _on_fetched(self, now: float, event: Fetched) -> list[Output]:
        """`ModelArrived` hands one hold to whoever takes it."""
        transfer = self._transfers.get(event.token)
        if transfer is None or not transfer.fetching:
            return []
        del self._transfers[event.token]
        if self._first_few > 1:
            self._first_few -= 1
        return [*self._hand_on(transfer.peer, transfer.ref), *self._start_waiting()]

    def _on_fetch_failed(self, now: float, event: FetchFailed) -> list[Output]:
        token, reason = event.token, event.reason
        transfer = self._transfers.get(token)
        if transfer is None or not transfer.fetching:
            return []
        transfer.fetching = False
        out: list[Output] = []
        if reason in HOSTILE:
            out += self._strike(transfer.source, reason, event.detail)
            transfer.bad.add(transfer.source)
        superseded = transfer.peer in self._waiting
        exhausted = transfer.attempts >= self._settings.max_attempts
        hopeless = reason in BAD_MODEL or reason is Reason.GONE
        if reason in HOSTILE:
            hopeless = hopeless or not self._named_and_live(transfer.wanted, transfer.bad)
        if hopeless or superseded or exhausted:
            return out + self._give_up(token)
        wait = self._settings.retry_s * 2 ** (transfer.attempts - 1)
        return [*out, SetTimer(Timer("exchange", "retry", token), wait)]

    def _give_up(self, token: int) -> list[Output]:
        transfer = self._transfers.pop(token)
        # Half of it may lie on the disk, kept for the attempt that will not come.
        begun = transfer.attempts > 0 and transfer.ref.digest not in self._held
        forget: list[Output] = [Forget(transfer.ref)] if begun else []
        return [*forget, *_gave_up(transfer.wanted), *self._start_waiting()]

    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        token = event.timer.token
        transfer = self._transfers.get(token) if event.timer.owner == "exchange" else None
        return [] if transfer is None or transfer.fetching else self._attempt(token)

    def _on_peer_up(self, now: float, event: PeerUp) -> list[Output]:
        if self._offered and self._view.learns(event.peer):
            return [Send(event.peer, Offer(self._offered[-1]))]
        return []

    def _on_link_down(self, now: float, event: LinkDown | PeerDown) -> list[Output]:
        """Of a brief link, which is no neighbour's, only the event tells."""
        del self._strikes[event.peer]
        wanted = self._waiting.get(event.peer)
        if wanted is None or (wanted.taken and self._named_and_live(wanted, {event.peer})):
            return []
        return _gave_up(self._waiting.pop(event.peer))

    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        Offer: _on_offer,
        Fetched: _on_fetched,
        FetchFailed: _on_fetch_failed,
        TimerFired: _on_timer,
        PeerUp: _on_peer_up,
        **dict.fromkeys((LinkDown, PeerDown), _on_link_down),
    }


def _gave_up(wanted: _Wanted) -> list[Output]:
    """Whoever offered is told nothing, whoever asked is."""
    return [FetchGaveUp(wanted.peer, wanted.ref)] if wanted.taken else []


def _turned_away(wanted: _Wanted, reason: Reason) -> list[Output]:
    return _gave_up(wanted) or [Send(wanted.peer, Decline(wanted.ref.digest, reason))]
