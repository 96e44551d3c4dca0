"""The simulated network: the `Network` port in virtual time, with latency, bandwidth, loss and worse.

Keeps the promises of the port (`node/ports.py`), which `tests/laws` checks on this and on the real one. Belongs here:
the life of links, messages and fetches, and what befalls them. How long a message takes is drawn in `latency.py`, how
long a transfer takes is worked out in `transfers.py`, and who can dial whom is decided in `nat.py`.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from node.ports import Deliver, NetworkEvent, fetch_failure
from protocols.blob import num_chunks
from protocols.codec import encode, link_decoder
from protocols.errors import ConfigError, PeerError
from protocols.events import DialFailed, Fetched, FetchFailed, LinkDown, LinkUp, Received, Rejected
from protocols.messages import Bye, Decline, Heartbeat, Hello, LinkMessage, Offer, Ping, Pong
from protocols.vocabulary import DIGEST_BYTES, HOSTILE, Digest, ModelRef, PeerId, Reason, peer_of
from sim.clock import VirtualClock
from sim.latency import OneWay, constant, lognormal, matrix, read_matrix
from sim.nat import Nat
from sim.transfers import Line, Transfer, Transfers

DIAL_ROUND_TRIPS = 4
"""TCP, multistream, Noise and yamux, the link's stream: what py-libp2p needs before the first message."""
FETCH_OVERHEAD_BYTES = 128
"""Request and header of a fetch, besides its chunk hashes."""

_DIGEST = bytes(DIGEST_BYTES)
TYPICAL_BYTES: dict[type, int] = {
    kind: len(encode(example))
    for kind, example in (
        (Heartbeat, Heartbeat(100, True)),
        (Ping, Ping(100)),
        (Pong, Pong(100, 100)),
        (Offer, Offer(ModelRef(_DIGEST, 100_000, 100, 100))),
        (Decline, Decline(_DIGEST, Reason.BUSY)),
        (Bye, Bye()),
    )
}
"""A frame's size for the kinds whose size hardly varies: numbers take 1 to 9 bytes on the wire and a reason 4 to 15, so
these are right within a few bytes. All other kinds are encoded to be counted."""

Share = Annotated[float, Meta(ge=0, le=1)]


class LinkSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What lies between two nodes. Messages on links take no bandwidth: they are small beside models."""

    latency_s: Annotated[float, Meta(ge=0, le=60)] = 0.02
    """One way. 0.02 is a continent, 0.1 the world, 0.001 one building. The median where it is drawn."""
    latency: Literal["constant", "lognormal", "matrix"] = "constant"
    """`lognormal` draws once per pair of nodes; `matrix` reads `matrix_path`."""
    sigma: Annotated[float, Meta(ge=0, le=3)] = 0.5
    """Of the lognormal: at 0.5 one pair in ten has 1.9 times the median or more, at 1 it is 3.6 times."""
    matrix_path: str | None = None
    """A square CSV file of measured round trips in ms; every node is put at one of its hosts."""
    jitter_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    """Added to each message's latency, uniformly from 0 to this; the order on a link stays. Wireless has 0.005 to 0.05."""
    up_bytes_per_s: Annotated[float, Meta(gt=0, le=1e15)] = 12_500_000.0
    """Each node's way out, shared by the models it sends. 12,500,000 is 100 Mbit/s; homes have a tenth of it."""
    down_bytes_per_s: Annotated[float, Meta(gt=0, le=1e15)] = 12_500_000.0
    """Each node's way in, shared by the models it fetches."""
    loss: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of link messages that never arrive, greetings too. The real transport repairs its losses, so anything above
    0 is worse than real. Fetches are repaired and never lost."""
    duplication: Share = 0.0
    """Share of link messages that are delivered twice. 0.01 finds most faults of counting."""
    reordering: Share = 0.0
    """Share of link messages that come late, without holding back those sent after them."""
    reorder_s: Annotated[float, Meta(ge=0, le=600)] = 0.5
    """How late at the most; uniform. Longer than the time between two messages, or nothing changes places."""
    corruption: Share = 0.0
    """Share of fetches whose bytes arrive damaged: the receiver's gate refuses them as a wrong hash. Nodes close a link
    after a few of these, as they should; 0.01 is much."""
    dial_timeout_s: Annotated[float, Meta(gt=0, le=600)] = 10.0
    """After which a dial that nobody answers fails. A daemon waits 10. Must be above 8 latencies, or no dial succeeds."""
    fetch_timeout_s: Annotated[float, Meta(gt=0, le=600)] = 15.0
    """Without a byte, after which a fetch fails. A daemon waits 15."""
    encode: bool = False
    """Write every message to bytes and read it again at the receiver, which proves that it can be done. A message then
    costs ten times as much computing; sizes are exact."""


def sim_address(peer: PeerId) -> str:
    """The address of a simulated node."""
    return f"/memory/0/p2p/{peer}"


class Endpoint:
    """One node's place in the network. `held` is what it can serve; `admit` is its gate for what arrives."""

    __slots__ = (
        "admit",
        "backlog",
        "bytes_received",
        "bytes_sent",
        "deliver",
        "fetching",
        "held",
        "line",
        "links",
        "messages_sent",
        "online",
        "peer",
        "serving",
        "silent",
    )

    def __init__(self, peer: PeerId, deliver: Deliver, admit: Callable[[ModelRef, object], None]) -> None:
        self.peer = peer
        self.deliver = deliver
        self.admit = admit
        self.held: dict[Digest, object] = {}
        self.links: dict[PeerId, _End] = {}
        self.line = Line()
        self.fetching: dict[_Fetch, None] = {}
        self.serving: dict[_Fetch, None] = {}
        self.online = True
        """False for good after a crash: who is back has a new endpoint, and hears nothing that its former life asked."""
        self.silent = False
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        """What a silent node will find out from its own machine once it wakes."""
        self.messages_sent = 0
        self.bytes_sent = 0
        self.bytes_received = 0


class _End:
    """One end of a link. Both ends of a link come together; an orphan has lost its other end and does not know."""

    __slots__ = ("arrives_at", "closed", "dialled", "endpoint", "far", "hears", "latency_s", "orphan", "up")

    far: "_End"

    def __init__(self, endpoint: Endpoint, latency_s: float) -> None:
        self.endpoint = endpoint
        self.latency_s = latency_s
        self.arrives_at = 0.0
        """Nothing sent from here arrives before this moment, so that the order stays."""
        self.dialled = ""
        """The address that its node has dialled, and waits for this end to answer: by coming up, or else by failing."""
        self.up = False
        """Its node was told of the link, and not yet of the link's end."""
        self.closed = False
        """Its node has closed it, or crashed."""
        self.orphan = False
        self.hears = False
        """Whether what arrives here is heard: `up`, and the way is open. Kept up to date, for it is asked most often."""


class _Fetch:
    """One fetch, or one source's part of it, from the command to its one answer."""

    __slots__ = (
        "answered",
        "end",
        "num_stalls",
        "ref",
        "shared",
        "size_bytes",
        "stalled",
        "token",
        "transfer",
        "unsent",
        "value",
    )

    def __init__(
        self, end: _End, token: int, ref: ModelRef, num_bytes: int, shared: "_SharedFetch | None" = None
    ) -> None:
        self.end = end
        """The receiver's."""
        self.token = token
        self.ref = ref
        self.size_bytes = num_bytes + num_chunks(ref.size_bytes) * DIGEST_BYTES + FETCH_OVERHEAD_BYTES
        self.shared = shared
        self.value: object = None
        self.transfer: Transfer | None = None
        """From the request's arrival until the last byte was sent."""
        self.unsent = num_bytes
        """Of the model's bytes, those that are still to come where it broke off."""
        self.stalled = False
        self.num_stalls = 0
        """Stalls begun and ended: a timeout that was set for an earlier one is out of date."""
        self.answered = False


class _SharedFetch:
    """One fetch from several sources: equal parts, each a transfer of its own. What a source that fails has not sent is
    shared out among those that are left."""

    __slots__ = ("failures", "parts", "peer", "receiver", "ref", "sources", "token", "value")

    def __init__(self, receiver: Endpoint, token: int, peer: PeerId, ref: ModelRef) -> None:
        self.receiver = receiver
        self.token = token
        self.peer = peer
        self.ref = ref
        self.sources: dict[PeerId, _End] = {}
        """Those that have not failed."""
        self.failures: dict[PeerId, PeerError] = {}
        self.parts: dict[_Fetch, None] = {}
        """Those that are on their way."""
        self.value: object = None


class SimNetwork:
    """All nodes' networks at once.

    rng: the seed of everything drawn here. Each concern has a generator of its own, so that switching one on leaves
        the others' draws as they were.
    nat: left out, everybody can dial everybody.
    base: the folder that a relative `matrix_path` starts from.

    Raises:
        ConfigError: at `links.matrix_path`.
    """

    def __init__(
        self,
        clock: VirtualClock,
        settings: LinkSettings,
        rng: random.Random,
        nat: Nat | None = None,
        base: Path = Path(),
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._nat = nat
        self._one_way = _latency_model(settings, base, rng.getrandbits(256).to_bytes(32, "big"))
        self._jitter, self._losses, self._duplicates, self._reorderings, self._corruptions = (
            random.Random(rng.getrandbits(64)) for _ in range(5)
        )
        self._transfers = Transfers(clock, settings.up_bytes_per_s, settings.down_bytes_per_s)
        self._endpoints: dict[PeerId, Endpoint] = {}
        self._vanished: set[PeerId] = set()
        """Nodes that left while they were silent: their machines do not even refuse a dial."""
        self._groups: dict[PeerId, int] = {}
        self._loss = settings.loss
        self._slowness = 1.0
        self._was_scaled = False
        self.typical_bytes = {} if settings.encode else TYPICAL_BYTES
        self.plain = True
        """Whether a message is simply there one latency later: the short way through `send`."""
        self._choose_way()
        self.counts: dict[type, int] = dict.fromkeys(get_args(LinkMessage), 0)
        self.control_bytes = 0
        """Of all link messages sent."""
        self.model_bytes = 0
        """Of all models sent, with what a fetch adds to them; of a fetch that broke off, the part that was sent."""
        self.num_links = 0
        """Links that are up at both ends."""

    # --- for whoever watches ----------------------------------------------------------------------------
    @property
    def messages(self) -> Counter[str]:
        """Link messages sent, by their tag on the wire."""
        return Counter(
            {str(kind.__struct_config__.tag): count for kind, count in self.counts.items() if count}  # type: ignore[attr-defined]
        )

    def links(self) -> list[tuple[PeerId, PeerId]]:
        """The links that are up at both ends, each once, the smaller peer id first."""
        return [
            (me, peer)
            for me, endpoint in self._endpoints.items()
            for peer, end in endpoint.links.items()
            if me < peer and end.up and end.far.up
        ]

    def nat_of(self, peer: PeerId) -> str:
        """The name of the peer's NAT class; empty where there are none."""
        return self._nat.class_of(peer) if self._nat else ""

    def reaches(self, me: PeerId, peer: PeerId) -> bool:
        """Whether their NAT classes let `me` dial `peer`."""
        return not (self._nat and self._nat.obstacle(me, peer))

    # --- coming and going -------------------------------------------------------------------------------
    def join(self, me: PeerId, deliver: Deliver, admit: Callable[[ModelRef, object], None]) -> "SimPort":
        """Bring a node online."""
        assert me not in self._endpoints, "a node is online once"
        self._vanished.discard(me)
        endpoint = self._endpoints[me] = Endpoint(me, deliver, admit)
        return SimPort(self, self._clock, endpoint)

    def leave(self, me: PeerId) -> None:
        """Take a node offline at once, as a crash does: the others' kernels tell them after a latency.

        Nobody is told of a node that was silent already: it is a machine that is gone.
        """
        endpoint = self._endpoints.pop(me)
        endpoint.online = False
        if endpoint.silent:
            self._vanished.add(me)
        for fetch in list(endpoint.fetching):
            self._end_fetch(fetch)
        for end in endpoint.links.values():
            end.closed = True
            self._lower(end)
            if not end.orphan:
                self._lose_touch(end.far)
                if not endpoint.silent:
                    self._clock.after(self._delay(end), self._hear_reset, end.far)

    def silence(self, me: PeerId) -> None:
        """Its machine vanishes or hangs: nothing of it arrives any more nor is heard by it, and nobody is told."""
        endpoint = self._endpoints[me]
        endpoint.silent = True
        self._review(endpoint)

    def wake(self, me: PeerId) -> None:
        """A silenced node goes on with what it had, and learns at once of links that the others have closed."""
        endpoint = self._endpoints[me]
        if endpoint.silent:
            endpoint.silent = False
            self._review(endpoint)
            self._clock.after(0.0, self._catch_up, endpoint)

    def _catch_up(self, endpoint: Endpoint) -> None:
        backlog, endpoint.backlog = endpoint.backlog, []
        for action, args in backlog:
            action(*args)
        for end in [end for end in endpoint.links.values() if end.orphan]:
            self._hear_reset(end)

    # --- weather ----------------------------------------------------------------------------------------
    def partition(self, groups: Sequence[Collection[PeerId]]) -> None:
        """Let nothing pass between these groups from now on; nodes in none of them are one more group.

        No link ends by this: nodes find out by their own timeouts.
        """
        assert sum(map(len, groups)) == len(set().union(*groups)), "a node is in one group"
        self._groups = {peer: number for number, group in enumerate(groups) for peer in group}
        for endpoint in self._endpoints.values():
            self._review(endpoint)

    def heal(self) -> None:
        """End the partition. What was swallowed stays lost; transfers that have not timed out go on."""
        self.partition(())

    def set_loss(self, loss: float) -> None:
        """From now on this share of link messages is lost."""
        assert 0 <= loss <= 1
        self._loss = loss
        self._choose_way()

    def scale_latency(self, factor: float) -> None:
        """From now on every latency is so many times the one in the settings. Jitter stays."""
        assert factor > 0
        now = self._clock.moment_s
        self._slowness = factor
        for endpoint in self._endpoints.values():
            for end in endpoint.links.values():
                # What is under way keeps its time; what is sent from now on must not overtake it.
                end.arrives_at = max(end.arrives_at, now + end.latency_s)
                end.latency_s = self._latency(endpoint.peer, end.far.endpoint.peer)
        self._was_scaled = True
        self._choose_way()

    def scale_bandwidth(self, factor: float) -> None:
        """From now on every line carries so many times what the settings say, each way."""
        assert factor > 0
        settings = self._settings
        self._transfers.set_bandwidth(settings.up_bytes_per_s * factor, settings.down_bytes_per_s * factor)

    def _choose_way(self) -> None:
        settings = self._settings
        self.plain = not (
            self._loss
            or settings.jitter_s
            or settings.duplication
            or settings.reordering
            or settings.encode
            or self._was_scaled
        )

    def _review(self, endpoint: Endpoint) -> None:
        """The way to or from this node has opened or closed."""
        for end in endpoint.links.values():
            self._set_hearing(end)
            self._set_hearing(end.far)
        for fetch in [*endpoint.fetching, *endpoint.serving]:
            if fetch.stalled and self._is_open(fetch.end):
                self._go_on(fetch)
            elif fetch.transfer and not fetch.stalled and not self._is_open(fetch.end):
                self._stall(fetch)

    def _is_open(self, end: _End) -> bool:
        """Whether bytes pass between this end and the other one."""
        here, there = end.endpoint, end.far.endpoint
        return not (end.orphan or here.silent or there.silent or self._are_parted(here.peer, there.peer))

    def _are_parted(self, a: PeerId, b: PeerId) -> bool:
        return bool(self._groups) and self._groups.get(a, -1) != self._groups.get(b, -1)

    # --- dialling ---------------------------------------------------------------------------------------
    def dial(self, caller: Endpoint, address: str) -> None:
        peer = peer_of(address)
        if peer is None:
            self._soon(
                caller, DialFailed(address, Reason.UNREACHABLE, "the address names no peer (/p2p/...)")
            )
            return
        timeout_s = self._settings.dial_timeout_s
        trip_s = DIAL_ROUND_TRIPS * 2 * self._draw_delay(self._latency(caller.peer, peer))
        if self._nat and (obstacle := self._nat.obstacle(caller.peer, peer)):
            failure = DialFailed(address, Reason.UNREACHABLE, obstacle)
            self._clock.after(timeout_s, self._fail_dial, caller, peer, failure)
        elif trip_s > timeout_s:
            self._clock.after(timeout_s, self._fail_dial, caller, peer, self._no_answer(address))
        else:
            self._clock.after(trip_s, self._meet, caller, peer, address, self._clock.moment_s + timeout_s)

    def _no_answer(self, address: str) -> DialFailed:
        return DialFailed(address, Reason.TIMEOUT, f"no answer within {self._settings.dial_timeout_s:g} s")

    def _fail_dial(self, caller: Endpoint, peer: PeerId, failure: DialFailed) -> None:
        """After its time. A link that the other side has made meanwhile was answer enough."""
        end = caller.links.get(peer)
        if end is None or not end.up:
            self._tell(caller, failure)

    def _meet(self, caller: Endpoint, peer: PeerId, address: str, fails_at: float) -> None:
        if not caller.online:
            return
        target = self._endpoints.get(peer)
        silent = caller.silent or (target.silent if target else peer in self._vanished)
        if silent or self._are_parted(caller.peer, peer):
            self._clock.at(fails_at, self._fail_dial, caller, peer, self._no_answer(address))
            return
        if target is None or target is caller:
            self._tell(caller, DialFailed(address, Reason.UNREACHABLE, "connection refused"))
            return
        mine, theirs = caller.links.get(peer), target.links.get(caller.peer)
        if mine and not mine.orphan:
            if mine.closed or mine.far.closed:
                self._tell(caller, DialFailed(address, Reason.LINK, "the link before it is still closing"))
            mine.dialled = address
            return
        # One that is left alone is an orphan: this link replaces it.
        assert theirs is None or theirs.orphan, "ends that are no orphans come in pairs"
        latency_s = self._latency(caller.peer, peer)
        end = caller.links[peer] = _End(caller, latency_s)
        far = target.links[caller.peer] = _End(target, latency_s)
        end.far, far.far = far, end
        end.dialled = address
        self._clock.after(0.0, self._come_up, end, LinkUp(peer, True, address), mine)
        self._clock.at(self._arrival(end), self._come_up, far, LinkUp(caller.peer, False, ""), theirs)

    def _come_up(self, end: _End, event: LinkUp, replaced: _End | None) -> None:
        endpoint = end.endpoint
        if not endpoint.online:
            return
        if endpoint.silent:
            endpoint.backlog.append((self._come_up, (end, event, replaced)))
            return
        if replaced:
            self._go_down(replaced, Reason.DUPLICATE)
        if end.orphan:
            self._forget(end)
            if end.dialled:
                endpoint.deliver(DialFailed(end.dialled, Reason.LINK, "the connection was reset"))
            return
        end.up = True
        self.num_links += end.far.up
        self._set_hearing(end)
        endpoint.deliver(event)

    # --- messages ---------------------------------------------------------------------------------------
    def send_with_care(self, end: _End, message: LinkMessage, size: int) -> None:
        """The long way of `SimPort.send`: whatever can befall a message.

        A greeting can be lost, but is neither doubled nor late, and nothing overtakes it: the real transport is a
        stream in order, and a greeting in the wrong place would be refused as hostile.
        """
        settings, clock = self._settings, self._clock
        if self._loss and self._losses.random() < self._loss:
            return
        data = encode(message) if settings.encode else None
        greeting = type(message) is Hello
        clock.at(self._arrival(end, may_be_late=not greeting), self.arrive, end.far, message, size, data)
        if settings.duplication and not greeting and self._duplicates.random() < settings.duplication:
            clock.at(self._arrival(end, may_be_late=True), self.arrive, end.far, message, size, data)

    def _arrival(self, end: _End, may_be_late: bool = False) -> float:
        """When what is sent from this end now arrives: not before what was sent earlier, or late by `reordering`."""
        at = max(self._clock.moment_s + self._delay(end), end.arrives_at)
        settings = self._settings
        if may_be_late and settings.reordering and self._reorderings.random() < settings.reordering:
            return at + self._reorderings.random() * settings.reorder_s
        end.arrives_at = at
        return at

    def arrive(self, end: _End, message: LinkMessage, size: int, data: bytes | None = None) -> None:
        """At this end, unless it has closed or the way has."""
        if not end.hears:
            if end.far.orphan and end.far.up:
                self._clock.after(self._delay(end), self._hear_reset, end.far)
            return
        if data is not None:
            (decoded,) = link_decoder().feed(data)
            assert decoded == message, f"{message} was decoded as {decoded}"
            message = decoded
        endpoint = end.endpoint
        endpoint.bytes_received += size
        endpoint.deliver(Received(end.far.endpoint.peer, message))

    # --- the end of a link ------------------------------------------------------------------------------
    def disconnect(self, me: Endpoint, peer: PeerId, reason: Reason) -> None:
        end = me.links.get(peer)
        if end is None or not end.up:
            return
        self._lower(end)
        end.closed = True
        self._soon(me, LinkDown(peer, reason))
        self._break_fetches(end)
        self._clock.at(self._arrival(end), self._hear_close, end.far)

    def _hear_close(self, end: _End) -> None:
        """The other end has closed: so it is over for this one."""
        self._forget(end.far)
        if end.closed:
            self._forget(end)
        elif end.up and self._is_open(end):
            self._go_down(end, Reason.LINK)
        elif not end.orphan:
            self._lose_touch(end)

    def _hear_reset(self, end: _End) -> None:
        """The other machine says that it knows of no such link, if it is there to say so."""
        here, peer = end.endpoint, end.far.endpoint.peer
        there = self._endpoints.get(peer, end.far.endpoint)
        if not (here.silent or there.silent or self._are_parted(here.peer, peer)):
            self._go_down(end, Reason.LINK, "the connection was reset")

    def _go_down(self, end: _End, reason: Reason, detail: str = "") -> None:
        """Tell its node, once."""
        if end.up:
            self._lower(end)
            self._forget(end)
            self._tell(end.endpoint, LinkDown(end.far.endpoint.peer, reason, detail))
            self._break_fetches(end)

    def _lose_touch(self, end: _End) -> None:
        """The other end is no more, and nothing says so here: now or ever."""
        end.orphan = True
        end.hears = False

    def _lower(self, end: _End) -> None:
        self.num_links -= end.up and end.far.up
        end.up = end.hears = False

    def _forget(self, end: _End) -> None:
        links, peer = end.endpoint.links, end.far.endpoint.peer
        if links.get(peer) is end:
            del links[peer]

    def _set_hearing(self, end: _End) -> None:
        end.hears = end.up and self._is_open(end)

    # --- fetching ---------------------------------------------------------------------------------------
    def fetch(
        self, receiver: Endpoint, token: int, peer: PeerId, ref: ModelRef, others: Sequence[PeerId]
    ) -> None:
        if others:
            self._fetch_shared(receiver, token, peer, ref, others)
            return
        end = receiver.links.get(peer)
        if end is None or not end.up:
            self._soon(receiver, FetchFailed(token, Reason.LINK, "no link to the peer"))
            return
        self._ask(_Fetch(end, token, ref, ref.size_bytes))

    def _ask(self, fetch: _Fetch) -> None:
        fetch.end.endpoint.fetching[fetch] = None
        self._clock.after(self._delay(fetch.end), self._serve, fetch, self._clock.moment_s)

    def _fetch_shared(
        self, receiver: Endpoint, token: int, peer: PeerId, ref: ModelRef, others: Sequence[PeerId]
    ) -> None:
        shared = _SharedFetch(receiver, token, peer, ref)
        for source in dict.fromkeys((peer, *others)):
            end = receiver.links.get(source)
            if end is not None and end.up:
                shared.sources[source] = end
            else:
                shared.failures[source] = PeerError(Reason.LINK, "no link to the peer")
        if shared.sources:
            self._share_out(shared, ref.size_bytes)
        else:
            failure = fetch_failure(peer, shared.failures)
            self._soon(receiver, FetchFailed(token, failure.reason, failure.detail))

    def _share_out(self, shared: _SharedFetch, num_bytes: int) -> None:
        """Ask every source for its part of these bytes."""
        ends = list(shared.sources.values())
        share, rest = divmod(num_bytes, len(ends))
        for number, end in enumerate(ends):
            part = _Fetch(end, shared.token, shared.ref, share + (number < rest), shared)
            shared.parts[part] = None
            self._ask(part)

    def _end_part(self, shared: _SharedFetch, part: _Fetch, event: Fetched | FetchFailed) -> None:
        del shared.parts[part]
        if isinstance(event, FetchFailed):
            self._lose_source(shared, part, PeerError(event.reason, event.detail))
        elif not shared.parts:
            first = shared.failures.get(shared.peer)
            if first is not None and first.reason in HOSTILE:
                self._tell(shared.receiver, Rejected(shared.peer, first.reason, first.detail))
            self._tell(shared.receiver, self._admit(shared.receiver, shared.token, shared.ref, shared.value))

    def _lose_source(self, shared: _SharedFetch, part: _Fetch, failure: PeerError) -> None:
        source = part.end.far.endpoint.peer
        del shared.sources[source]
        shared.failures[source] = failure
        missing = part.unsent
        for other in [other for other in shared.parts if other.end is part.end]:
            del shared.parts[other]
            self._end_fetch(other)
            missing += other.unsent
        if shared.sources:
            self._share_out(shared, missing)
        if failure.reason in HOSTILE and source != shared.peer:
            self._tell(shared.receiver, Rejected(source, failure.reason, failure.detail))
        if not shared.sources:
            last = fetch_failure(shared.peer, shared.failures)
            self._tell(shared.receiver, FetchFailed(shared.token, last.reason, last.detail))

    def _serve(self, fetch: _Fetch, asked_at: float) -> None:
        """The request arrives, unless the way there or the node itself is gone: then only time answers."""
        if fetch.answered:
            return
        end = fetch.end
        if not self._is_open(end):
            expires_at = max(self._clock.moment_s, asked_at + self._settings.fetch_timeout_s)
            self._clock.at(expires_at, self._expire, fetch, fetch.num_stalls)
            return
        server = end.far.endpoint
        server.serving[fetch] = None
        fetch.value = server.held.get(Digest(fetch.ref.digest))
        if fetch.value is None:
            self._clock.after(self._delay(end), self._take, fetch)
        else:
            fetch.transfer = self._transfers.start(
                server.line, end.endpoint.line, fetch.size_bytes, self._last_byte, fetch
            )

    def _last_byte(self, fetch: _Fetch) -> None:
        fetch.transfer = None
        self._count_sent(fetch, fetch.size_bytes)
        self._clock.after(self._delay(fetch.end), self._take, fetch)

    def _take(self, fetch: _Fetch) -> None:
        if fetch.answered:
            return
        if not self._is_open(fetch.end):
            self._stall(fetch)
            return
        if fetch.value is None:
            self._answer(fetch, FetchFailed(fetch.token, Reason.GONE))
            return
        receiver, ref = fetch.end.endpoint, fetch.ref
        receiver.bytes_received += fetch.size_bytes
        corruption = self._settings.corruption
        if corruption and self._corruptions.random() < corruption:
            self._answer(fetch, FetchFailed(fetch.token, Reason.WRONG_HASH, "the bytes arrived damaged"))
            return
        if fetch.shared is not None:
            fetch.shared.value = fetch.value
            self._answer(fetch, Fetched(fetch.token))
        else:
            self._answer(fetch, self._admit(receiver, fetch.token, ref, fetch.value))

    def _admit(self, receiver: Endpoint, token: int, ref: ModelRef, value: object) -> Fetched | FetchFailed:
        """Pass the receiver's gate."""
        try:
            receiver.admit(ref, value)
        except PeerError as error:
            return FetchFailed(token, error.reason, error.detail)
        receiver.held[Digest(ref.digest)] = value
        return Fetched(token)

    def _stall(self, fetch: _Fetch) -> None:
        """No byte passes; it fails after its time unless it goes on before."""
        fetch.stalled = True
        fetch.num_stalls += 1
        if fetch.transfer:
            self._transfers.pause(fetch.transfer)
        self._clock.after(self._settings.fetch_timeout_s, self._expire, fetch, fetch.num_stalls)

    def _go_on(self, fetch: _Fetch) -> None:
        fetch.stalled = False
        fetch.num_stalls += 1
        if fetch.transfer:
            self._transfers.resume(fetch.transfer)
        else:
            self._clock.after(self._delay(fetch.end), self._take, fetch)

    def _expire(self, fetch: _Fetch, num_stalls: int) -> None:
        if num_stalls == fetch.num_stalls:
            detail = f"no byte for {self._settings.fetch_timeout_s:g} s"
            self._answer(fetch, FetchFailed(fetch.token, Reason.TIMEOUT, detail))

    def _break_fetches(self, end: _End) -> None:
        """Not at once: this may be inside a command."""
        for fetch in end.endpoint.fetching:
            if fetch.end is end:
                failure = FetchFailed(fetch.token, Reason.LINK, "the peer is gone")
                self._clock.after(0.0, self._answer, fetch, failure)

    def _answer(self, fetch: _Fetch, event: Fetched | FetchFailed) -> None:
        if fetch.answered:
            return
        self._end_fetch(fetch)
        if fetch.shared is not None:
            self._end_part(fetch.shared, fetch, event)
        else:
            self._tell(fetch.end.endpoint, event)

    def _end_fetch(self, fetch: _Fetch) -> None:
        fetch.answered = True
        fetch.value = None  # what is still due for it would keep the model in memory
        del fetch.end.endpoint.fetching[fetch]
        fetch.end.far.endpoint.serving.pop(fetch, None)
        if fetch.transfer:
            unsent = int(self._transfers.pause(fetch.transfer))
            self._count_sent(fetch, fetch.size_bytes - unsent)
            fetch.unsent = min(fetch.unsent, unsent)
            fetch.transfer = None

    def _count_sent(self, fetch: _Fetch, num_bytes: int) -> None:
        self.model_bytes += num_bytes
        fetch.end.far.endpoint.bytes_sent += num_bytes

    # --- helpers ----------------------------------------------------------------------------------------
    def _tell(self, endpoint: Endpoint, event: NetworkEvent) -> None:
        """What its own machine has found out, even while nothing from outside reaches it."""
        if endpoint.silent:
            endpoint.backlog.append((self._tell, (endpoint, event)))
        elif endpoint.online:
            endpoint.deliver(event)

    def _soon(self, endpoint: Endpoint, event: NetworkEvent) -> None:
        """Not inside the command that caused it: a core is never entered twice at once."""
        self._clock.after(0.0, self._tell, endpoint, event)

    def _latency(self, a: PeerId, b: PeerId) -> float:
        return self._one_way(a, b) * self._slowness

    def _delay(self, end: _End) -> float:
        """One way between the ends of this link."""
        return self._draw_delay(end.latency_s)

    def _draw_delay(self, latency_s: float) -> float:
        jitter_s = self._settings.jitter_s
        return latency_s + self._jitter.random() * jitter_s if jitter_s else latency_s


class SimPort:
    """One node's `Network`."""

    __slots__ = ("_after", "_links", "_network", "endpoint")

    def __init__(self, network: SimNetwork, clock: VirtualClock, endpoint: Endpoint) -> None:
        self._network = network
        self._after = clock.after
        self._links = endpoint.links
        self.endpoint = endpoint

    def dial(self, address: str) -> None:
        self._network.dial(self.endpoint, address)

    def disconnect(self, peer: PeerId, reason: Reason) -> None:
        self._network.disconnect(self.endpoint, peer, reason)

    def send(self, peer: PeerId, message: LinkMessage) -> None:
        end = self._links.get(peer)
        if end is None or not end.up:
            return
        network, endpoint, kind = self._network, self.endpoint, type(message)
        size = network.typical_bytes.get(kind) or len(encode(message))
        network.counts[kind] += 1
        network.control_bytes += size
        endpoint.messages_sent += 1
        endpoint.bytes_sent += size
        if network.plain:
            self._after(end.latency_s, network.arrive, end.far, message, size)
        else:
            network.send_with_care(end, message, size)

    def fetch(self, token: int, peer: PeerId, ref: ModelRef, others: Sequence[PeerId] = ()) -> None:
        self._network.fetch(self.endpoint, token, peer, ref, others)


def _latency_model(settings: LinkSettings, base: Path, key: bytes) -> OneWay:
    if settings.latency == "constant":
        return constant(settings.latency_s)
    if settings.latency == "lognormal":
        return lognormal(settings.latency_s, settings.sigma, key)
    if settings.matrix_path is None:
        raise ConfigError("links.matrix_path", "the latency 'matrix' needs a file")
    return matrix(read_matrix(base / settings.matrix_path), key)
