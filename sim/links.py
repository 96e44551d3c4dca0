"""The simulated network: the `Network` port in virtual time, with latency, bandwidth and loss.

Keeps the promises of the port (`node/ports.py`), which `tests/laws` checks on this and on the real one.
"""

import random
from collections.abc import Callable
from typing import Annotated

from msgspec import Meta, Struct

from node.ports import Deliver, NetworkEvent
from protocols.blob import num_chunks
from protocols.codec import encode
from protocols.errors import PeerError
from protocols.events import DialFailed, Fetched, FetchFailed, LinkDown, LinkUp, Received
from protocols.messages import LinkMessage
from protocols.vocabulary import DIGEST_BYTES, Digest, ModelRef, PeerId, Reason, peer_of
from sim.clock import VirtualClock

DIAL_ROUND_TRIPS = 4
"""TCP, multistream, Noise and yamux, the link's stream: what py-libp2p needs before the first message."""
FETCH_OVERHEAD_BYTES = 128
"""Request and header of a fetch, besides its chunk hashes."""


class LinkSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What lies between two nodes."""

    latency_s: Annotated[float, Meta(ge=0, le=60)] = 0.02
    """One way."""
    jitter_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    """Added to each message's latency, uniformly from 0 to this; the order on a link stays."""
    bandwidth_bytes_per_s: Annotated[float, Meta(gt=0)] = 12_500_000.0
    """Of each node's way out; its transfers take turns."""
    loss: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of link messages that never arrive. Fetches are repaired by their transport and only take longer."""


def sim_address(peer: PeerId) -> str:
    """The address of a simulated node."""
    return f"/memory/0/p2p/{peer}"


class _Link:
    """One link between two nodes. Each end counts as up from the moment its `LinkUp` was delivered."""

    __slots__ = ("arrives_at", "closing", "ends", "open", "up")

    def __init__(self, ends: tuple[PeerId, PeerId]) -> None:
        self.ends = ends
        self.open = True
        self.closing = False
        self.up: set[PeerId] = set()
        self.arrives_at: dict[PeerId, float] = {}

    def other(self, peer: PeerId) -> PeerId:
        return self.ends[0] if self.ends[1] == peer else self.ends[1]


class Endpoint:
    """One node's place in the network. `held` is what it can serve; `admit` is its gate for what arrives."""

    def __init__(self, deliver: Deliver, admit: Callable[[ModelRef, object], None]) -> None:
        self.deliver = deliver
        self.admit = admit
        self.held: dict[Digest, object] = {}
        self.free_at = 0.0
        self.messages_sent = 0
        self.bytes_sent = 0
        self.bytes_received = 0


class SimNetwork:
    """All nodes' networks at once."""

    def __init__(self, clock: VirtualClock, settings: LinkSettings, rng: random.Random) -> None:
        self._clock = clock
        self._settings = settings
        self._rng = rng
        self._endpoints: dict[PeerId, Endpoint] = {}
        self._links: dict[tuple[PeerId, PeerId], _Link] = {}

    def join(self, me: PeerId, deliver: Deliver, admit: Callable[[ModelRef, object], None]) -> "SimPort":
        """Bring a node online."""
        assert me not in self._endpoints, "a node is online once"
        self._endpoints[me] = Endpoint(deliver, admit)
        return SimPort(self, me, self._endpoints[me])

    def leave(self, me: PeerId) -> None:
        """Take a node offline at once, as a crash does: the others' kernels tell them after a latency."""
        del self._endpoints[me]
        for link in [link for link in self._links.values() if me in link.ends]:
            self._sever(link)
            self._tell_later(link.other(me), link)

    # --- dialling ---------------------------------------------------------------------------------------
    def dial(self, me: PeerId, address: str) -> None:
        peer = peer_of(address)
        if peer is None:
            self._soon(me, DialFailed(address, Reason.UNREACHABLE, "the address names no peer (/p2p/...)"))
            return
        trip, caller = DIAL_ROUND_TRIPS * 2 * self._latency(), self._endpoints.get(me)
        self._clock.after(trip, lambda: self._meet(me, peer, address, caller))

    def _meet(self, me: PeerId, peer: PeerId, address: str, caller: Endpoint | None) -> None:
        if caller is None or self._endpoints.get(me) is not caller:
            return
        if peer not in self._endpoints or peer == me:
            self._soon(me, DialFailed(address, Reason.UNREACHABLE, "connection refused"))
            return
        pair = _pair(me, peer)
        if standing := self._links.get(pair):
            if standing.closing:
                self._soon(me, DialFailed(address, Reason.LINK, "the link before it is still closing"))
            return
        link = self._links[pair] = _Link(pair)
        self._clock.after(0.0, lambda: self._come_up(link, me, LinkUp(peer, True, address)))
        self._in_order(link, peer, lambda: self._come_up(link, peer, LinkUp(me, False, "")))

    def _come_up(self, link: _Link, me: PeerId, event: LinkUp) -> None:
        endpoint = self._endpoints.get(me)
        if endpoint is not None and link.open:
            link.up.add(me)
            endpoint.deliver(event)

    # --- messages ---------------------------------------------------------------------------------------
    def send(self, me: PeerId, peer: PeerId, message: LinkMessage) -> None:
        link = self._links.get(_pair(me, peer))
        endpoint = self._endpoints.get(me)
        if link is None or endpoint is None or me not in link.up:
            return
        size = len(encode(message))
        endpoint.messages_sent += 1
        endpoint.bytes_sent += size
        lost = self._rng.random() < self._settings.loss
        if not lost:
            self._in_order(link, peer, lambda: self._arrive(link, me, peer, message, size))

    def _in_order(self, link: _Link, peer: PeerId, action: Callable[[], None]) -> None:
        """Do `action` one latency from now, but not before what was sent to `peer` earlier."""
        at = max(self._clock.now() + self._latency(), link.arrives_at.get(peer, 0.0))
        link.arrives_at[peer] = at
        self._clock.at(at, action)

    def _arrive(self, link: _Link, me: PeerId, peer: PeerId, message: LinkMessage, size: int) -> None:
        target = self._endpoints.get(peer)
        if target is None or not link.open or peer not in link.up:  # it has closed its end by now
            return
        target.bytes_received += size
        target.deliver(Received(me, message))

    # --- the end of a link ------------------------------------------------------------------------------
    def disconnect(self, me: PeerId, peer: PeerId, reason: Reason) -> None:
        link = self._links.get(_pair(me, peer))
        if link is None or me not in link.up:
            return
        link.up.discard(me)
        link.closing = True
        self._soon(me, LinkDown(peer, reason))
        self._in_order(link, peer, lambda: self._close(link, peer))

    def _close(self, link: _Link, peer: PeerId) -> None:
        if link.open:
            self._sever(link)
            self._tell(peer, link, "")

    def _sever(self, link: _Link) -> None:
        link.open = False
        del self._links[link.ends]

    def _tell_later(self, peer: PeerId, link: _Link) -> None:
        endpoint = self._endpoints.get(peer)

        def tell() -> None:
            if self._endpoints.get(peer) is endpoint:
                self._tell(peer, link, "the connection was reset")

        self._clock.after(self._latency(), tell)

    def _tell(self, peer: PeerId, link: _Link, detail: str) -> None:
        endpoint = self._endpoints.get(peer)
        if endpoint is not None and peer in link.up:
            link.up.discard(peer)
            endpoint.deliver(LinkDown(link.other(peer), Reason.LINK, detail))

    # --- fetching ---------------------------------------------------------------------------------------
    def fetch(self, me: PeerId, token: int, peer: PeerId, ref: ModelRef) -> None:
        link = self._links.get(_pair(me, peer))
        if link is None or me not in link.up:
            self._soon(me, FetchFailed(token, Reason.LINK, "no link to the peer"))
            return
        receiver = self._endpoints[me]
        self._clock.after(self._latency(), lambda: self._serve(link, me, receiver, token, peer, ref))

    def _serve(
        self, link: _Link, me: PeerId, receiver: Endpoint, token: int, peer: PeerId, ref: ModelRef
    ) -> None:
        if self._endpoints.get(me) is not receiver:
            return
        server = self._endpoints.get(peer)
        back = self._latency()
        if server is None or not link.open:
            self._later(back, me, FetchFailed(token, Reason.LINK, "the peer is gone"))
            return
        value = server.held.get(Digest(ref.digest))
        if value is None:
            self._later(back, me, FetchFailed(token, Reason.GONE))
            return
        size = ref.size_bytes + num_chunks(ref.size_bytes) * DIGEST_BYTES + FETCH_OVERHEAD_BYTES
        now = self._clock.now()
        server.free_at = max(now, server.free_at) + size / self._settings.bandwidth_bytes_per_s
        server.bytes_sent += size
        wait = server.free_at - now + back
        self._clock.after(wait, lambda: self._take(link, me, receiver, token, ref, value, size))

    def _take(
        self,
        link: _Link,
        me: PeerId,
        receiver: Endpoint,
        token: int,
        ref: ModelRef,
        value: object,
        size: int,
    ) -> None:
        if self._endpoints.get(me) is not receiver:
            return
        receiver.bytes_received += size
        if not link.open:
            receiver.deliver(FetchFailed(token, Reason.LINK, "the peer is gone"))
            return
        try:
            receiver.admit(ref, value)
        except PeerError as error:
            receiver.deliver(FetchFailed(token, error.reason, error.detail))
            return
        receiver.held[Digest(ref.digest)] = value
        receiver.deliver(Fetched(token))

    # --- helpers ----------------------------------------------------------------------------------------
    def _answer(self, peer: PeerId, event: NetworkEvent) -> None:
        if endpoint := self._endpoints.get(peer):
            endpoint.deliver(event)

    def _soon(self, peer: PeerId, event: NetworkEvent) -> None:
        """Not inside the command that caused it: a core is never entered twice at once."""
        self._later(0.0, peer, event)

    def _later(self, delay_s: float, peer: PeerId, event: NetworkEvent) -> None:
        """Deliver it, unless the peer crashes before: one that is back is another, and awaits nothing."""
        endpoint = self._endpoints.get(peer)
        self._clock.after(
            delay_s, lambda: self._answer(peer, event) if self._endpoints.get(peer) is endpoint else None
        )

    def _latency(self) -> float:
        jitter = self._rng.random() * self._settings.jitter_s if self._settings.jitter_s else 0.0
        return self._settings.latency_s + jitter


class SimPort:
    """One node's `Network`."""

    def __init__(self, network: SimNetwork, me: PeerId, endpoint: Endpoint) -> None:
        self._network = network
        self._me = me
        self.endpoint = endpoint

    def dial(self, address: str) -> None:
        self._network.dial(self._me, address)

    def disconnect(self, peer: PeerId, reason: Reason) -> None:
        self._network.disconnect(self._me, peer, reason)

    def send(self, peer: PeerId, message: LinkMessage) -> None:
        self._network.send(self._me, peer, message)

    def fetch(self, token: int, peer: PeerId, ref: ModelRef) -> None:
        self._network.fetch(self._me, token, peer, ref)


def _pair(a: PeerId, b: PeerId) -> tuple[PeerId, PeerId]:
    return (a, b) if a < b else (b, a)
