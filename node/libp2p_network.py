"""The real network: py-libp2p on trio, in one thread of its own, behind the `Network` port.

Only this file, `libp2p_transfer.py` and those of discovery import libp2p or trio. In: `run_sync_soon` onto per-link
outboxes, which are bounded. Out: a bounded inbox that the asyncio loop drains. Bulk bytes go to and from the blob store
and never through either.
"""

import asyncio
import logging
import socket
import string
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.addresses import check_free, dialable, split_tcp
from node.discovery import Discovery
from node.libp2p_transfer import LINGER_S, READ_BYTES, STALL_TIMEOUT_S, Blobs, Transfers, read, root_cause
from node.ports import Deliver, NetworkEvent
from node.rate_limit import TokenBucket, check_limit
from protocols.codec import encode, link_decoder
from protocols.errors import ConfigError, LocalError, PeerError
from protocols.events import (
    DialFailed,
    Discovered,
    LinkDown,
    LinkUp,
    Received,
    Rejected,
)
from protocols.messages import LinkMessage
from protocols.vocabulary import ContentRef, ModelRef, PeerId, Reason, one_line, peer_of

log = logging.getLogger(__name__)

LINK = TProtocol("/covey/link/1")
FETCH = TProtocol("/covey/fetch/1")

DIAL_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 3.0
"""A link that is told to end is cut after this, whatever it still had to say."""
MAX_CONNECTIONS = 256
MAX_INBOX = 2048
"""Events that may wait for the asyncio loop. Beyond it the readers pause and TCP pushes back."""
MAX_OUTBOX = 512
"""Messages that may wait on one link. A peer that reads so slowly loses the link."""


class _Link:
    """One long-lived stream to one neighbour."""

    def __init__(self, peer: PeerId, stream: INetStream, outbound: bool) -> None:
        self.peer = peer
        self.stream = stream
        self.outbound = outbound
        self.outbox: deque[LinkMessage] = deque()
        self.wake = trio.Event()
        self.closing: Reason | None = None
        self.scope = trio.CancelScope()
        self.bytes_sent = 0
        self.bytes_received = 0

    def close(self, reason: Reason) -> Reason:
        """End after what is in the outbox has gone out; the first reason given stays."""
        self.closing = self.closing or reason
        self.wake.set()
        return self.closing


class Libp2pNetwork:
    """`Network` over TCP, Noise and yamux. Commands may be called from the loop that called `start`.

    announce: addresses to tell others instead of those in use.
    on_crash: called on the loop if the thread ends by itself.
    up_bytes_per_s, down_bytes_per_s: see `set_limits`.
    psk: 64 hex digits, the key of a private network: nodes with another key or none cannot link.
    has_greeted: whether a linked peer has shown what lets it in; whoever has not is served nothing. Called on any thread.

    Raises:
        ConfigError: at `network.listen`, `network.psk`, `network.up_bytes_per_s` or `network.down_bytes_per_s`.
    """

    def __init__(
        self,
        key: Ed25519PrivateKey,
        listen: Sequence[str],
        store: Blobs,
        deliver: Deliver,
        announce: Sequence[str] = (),
        on_crash: Callable[[BaseException], None] = lambda error: None,
        discovery: Discovery | None = None,
        up_bytes_per_s: int = 0,
        down_bytes_per_s: int = 0,
        psk: str | None = None,
        may_serve: Callable[[int], bool] = lambda num_bytes: True,
        has_greeted: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        self._key = key
        self._has_greeted = has_greeted
        self._psk = None if psk is None else _checked_psk(psk)
        self._listen = [_multiaddr("network.listen", text) for text in listen]
        self._announce = tuple(announce)
        self._deliver = deliver
        self._on_crash = on_crash
        self._discovery = discovery
        self._links: dict[PeerId, _Link] = {}
        self._dialling: set[PeerId] = set()
        self._transfers = Transfers(self, store, *_buckets(up_bytes_per_s, down_bytes_per_s), may_serve)
        self._inbox: deque[tuple[NetworkEvent, _Link | None]] = deque()
        """Events, and with a `LinkUp` the link."""
        self._told: dict[PeerId, _Link] = {}
        """The links that the core was told of. What it says is for these: the next link with a peer may stand already, and
        a word meant for the last one would come before its hello."""
        self._drain_scheduled = False
        self._thread: threading.Thread | None = None
        self.bytes_sent = 0
        self.bytes_received = 0

    # --- life: called on the asyncio loop ---------------------------------------------------------------
    async def start(self) -> tuple[str, ...]:
        """Listen; the addresses others can dial, each ending in our peer id.

        Raises:
            LocalError: the port is taken, or the address is not ours.
        """
        for address in self._listen:
            check_free(str(address))
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[tuple[str, ...]] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run_thread, name="libp2p", daemon=True)
        self._thread.start()
        return await self._ready

    async def stop(self) -> None:
        """Cancel everything and wait for the thread. Half-fetched blobs stay where they are."""
        if self._thread is None:
            return
        if not self._ended.done():
            self._command(self._stop.set)
        await self._ended
        self._thread.join()

    # --- commands: called on the asyncio loop -----------------------------------------------------------
    def dial(self, address: str) -> None:
        self._command(self._start_dial, address)

    def disconnect(self, peer: PeerId, reason: Reason) -> None:
        if link := self._told.get(peer):
            self._command(self._close_link, link, reason)

    def send(self, peer: PeerId, message: LinkMessage) -> None:
        if link := self._told.get(peer):
            self._command(self._enqueue, link, message)

    def fetch(
        self, token: int, peer: PeerId, ref: ModelRef | ContentRef, others: Sequence[PeerId] = ()
    ) -> None:
        self._command(self._start_fetch, token, peer, ref, tuple(others))

    def set_limits(self, up_bytes_per_s: int, down_bytes_per_s: int) -> None:
        """How fast models and contents may go out and come in from now on; 0 is no limit. Messages are counted, not limited.

        Raises:
            ConfigError: a limit is below `rate_limit.MIN_BYTES_PER_S`.
        """
        self._command(self._transfers.set_limits, *_buckets(up_bytes_per_s, down_bytes_per_s))

    # --- for whoever watches: called on the asyncio loop --------------------------------------------------
    def bytes_by_peer(self) -> dict[PeerId, tuple[int, int]]:
        """Bytes sent to and received from each linked peer since it linked up, all that passes."""
        return {peer: (link.bytes_sent, link.bytes_received) for peer, link in list(self._links.items())}

    def round_trips_s(self) -> dict[PeerId, float]:
        """Seconds there and back, smoothed, of the linked peers that yamux has measured already."""
        measured = ((peer, link.stream.muxed_conn.rtt()) for peer, link in list(self._links.items()))
        return {peer: round_trip_s for peer, round_trip_s in measured if round_trip_s > 0}

    def _command(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._trio.run_sync_soon(function, *args)
        except trio.RunFinishedError:  # a crash is already on its way through `on_crash`
            return

    # --- the way out: from the trio thread to the loop --------------------------------------------------
    async def post(self, event: NetworkEvent) -> None:
        """Hand over an event; wait while the loop is behind."""
        while len(self._inbox) >= MAX_INBOX:  # noqa: ASYNC110 - rare; an event would cost each message
            await trio.sleep(0.005)
        self._post_now(event)

    def _post_now(self, event: NetworkEvent, link: _Link | None = None) -> None:
        self._inbox.append((event, link))
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        for _ in range(64):
            if not self._inbox:
                return
            event, link = self._inbox.popleft()
            if link is not None:
                self._told[link.peer] = link
            elif isinstance(event, LinkDown):
                self._told.pop(event.peer, None)
            self._deliver(event)
        # The loop has other guests: let them run before the next 64.
        if self._inbox and not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    # --- the trio thread --------------------------------------------------------------------------------
    def _run_thread(self) -> None:
        failure: BaseException | None = None
        try:
            trio.run(self._main)
        except BaseException as error:  # the task boundary: reported, and ends the daemon
            failure = error
            while isinstance(failure, BaseExceptionGroup) and len(failure.exceptions) == 1:
                failure = failure.exceptions[0]
        self._loop.call_soon_threadsafe(self._finish, failure)

    def _finish(self, failure: BaseException | None) -> None:
        if not self._ready.done():
            self._ready.set_exception(failure or LocalError("the network ended before it began"))
        elif failure is not None:
            self._on_crash(failure)
        self._ended.set_result(None)

    async def _main(self) -> None:
        self._trio = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        self._host = _make_host(self._key, self._listen, self._on_insecure, self._psk)
        self.me = PeerId(self._host.get_id().to_string())
        swarm: Any = self._host.get_network()
        async with self._host.run(listen_addrs=self._listen), trio.open_nursery() as nursery:
            self._nursery = nursery
            # It would dial whomever it has heard of, up to half of the connection limit.
            await swarm.auto_connector.stop()
            self._host.set_stream_handler(LINK, self._on_link_stream)
            self._host.set_stream_handler(FETCH, self._on_fetch_stream)
            addresses = tuple(f"{a}/p2p/{self.me}" for a in self._announce) or self._listening()
            self._loop.call_soon_threadsafe(self._ready.set_result, addresses)
            if self._discovery is not None:
                near = (self._links, self._dialling)
                nursery.start_soon(self._discovery.run, self._host, addresses, *near, self._on_discovered)
            await self._stop.wait()
            # A goodbye that was just sent is worth a moment.
            for link in list(self._links.values()):
                link.close(Reason.LEAVING)
            # And a dial that is cancelled half-way leaves its socket open in the library.
            with trio.move_on_after(LINGER_S):
                while self._links or self._dialling:  # noqa: ASYNC110 - once, at the end
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    def _listening(self) -> tuple[str, ...]:
        """The addresses in use. The library only logs what it could not listen on."""
        if len(self._host.get_network().listeners) < len(set(self._listen)):
            raise LocalError(f"cannot listen on {', '.join(map(str, self._listen))}; change network.listen")
        return dialable(str(address) for address in self._host.get_addrs())

    def _on_insecure(self, detail: str) -> None:
        self._post_now(Rejected(PeerId(""), Reason.SECURITY, one_line(detail)))

    def _on_discovered(self, addresses: tuple[str, ...]) -> None:
        self._post_now(Discovered(addresses))

    # --- links ------------------------------------------------------------------------------------------
    def _start_dial(self, address: str) -> None:
        peer = peer_of(address)
        if self._stop.is_set():
            return
        if peer is None:
            self._post_now(DialFailed(address, Reason.UNREACHABLE, "the address names no peer (/p2p/...)"))
        elif peer not in self._links and peer not in self._dialling:
            self._dialling.add(peer)
            self._nursery.start_soon(self._dial, address, peer)

    async def _dial(self, address: str, peer: PeerId) -> None:
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                stream = await self._open(address)
        except trio.TooSlowError:
            failure = (Reason.TIMEOUT, f"no answer within {DIAL_TIMEOUT_S:.0f} s")
        except Exception as error:  # py-libp2p raises many kinds here; all mean that the dial failed
            failure = (Reason.UNREACHABLE, root_cause(error))
        else:
            self._dialling.discard(peer)
            await self._run_link(peer, stream, outbound=True, address=address)
            return
        self._dialling.discard(peer)
        if peer not in self._links:
            await self.post(DialFailed(address, failure[0], one_line(failure[1])))

    async def _open(self, address: str) -> INetStream:
        info = info_from_p2p_addr(Multiaddr(address))
        if info.peer_id.to_string() != peer_of(address):
            raise PeerError(Reason.UNREACHABLE, "the peer id is not in its usual form (base58)")
        swarm = self._host.get_network()
        if not swarm.get_connections(info.peer_id):
            # `connect` would remember a failed peer for a minute and try one address of several.
            await swarm.dial_addr(Multiaddr(await _resolve(address)), info.peer_id)
        return await self._host.new_stream(info.peer_id, [LINK])

    async def _on_link_stream(self, stream: INetStream) -> None:
        peer = PeerId(stream.muxed_conn.peer_id.to_string())
        await self._apart(self._run_link, peer, stream, False, "")

    async def _apart(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Do `work` in our own nursery, and wait for it.

        The library cancels a connection's handlers when the connection ends, and takes the host down with a
        handler that raises. Neither may keep us from telling the core.
        """
        done = trio.Event()

        async def run() -> None:
            try:
                await work(*args)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()

    async def _run_link(self, peer: PeerId, stream: INetStream, outbound: bool, address: str) -> None:
        old = self._links.get(peer)
        if old is not None:
            # Both dialled at once: both ends keep the link that the smaller peer id dialled. A second link
            # in the same direction means that the other side has lost the first.
            preferred = outbound == (self.me < peer)
            if old.outbound != outbound and not preferred and old.closing is None:
                await self._close_stream(stream)
                return
            del self._links[peer]
            reason = old.close(Reason.DUPLICATE)
            old.scope.cancel()
            self._post_now(LinkDown(peer, reason))
        link = self._links[peer] = _Link(peer, stream, outbound)
        self._post_now(LinkUp(peer, outbound, address), link)
        reason, detail = await self._converse(link)
        # The connection goes before the word of it does: a dial that follows must not find the dying one.
        await self._close_stream(stream)
        if self._links.get(peer) is link:
            del self._links[peer]
            # What the peer said last may have been understood only while the connection was closed.
            if link.closing:
                reason, detail = link.closing, ""
            self._post_now(LinkDown(peer, reason, one_line(detail)))

    async def _close_stream(self, stream: INetStream) -> None:
        """End a stream, and its connection unless another link lives on it."""
        connection = stream.muxed_conn
        shared = any(
            link.stream.muxed_conn is connection and link.stream is not stream
            for link in self._links.values()
        )
        with trio.CancelScope(shield=True), trio.move_on_after(LINGER_S):
            try:
                await (stream.reset() if shared else stream.swarm_conn.close())
                return
            except Exception as error:  # already broken: all the better
                log.debug("closing a stream: %r", error)
        if shared:
            return
        # The other side does not even take a goodbye: the socket is closed under it.
        try:
            with trio.CancelScope(shield=True), trio.move_on_after(LINGER_S):
                await connection.secured_conn.close()
            self._host.get_network().remove_conn(stream.swarm_conn)
        except Exception as error:  # what is broken for one peer must not end the thread for all
            log.debug("closing a connection: %r", error)

    async def _converse(self, link: _Link) -> tuple[Reason, str]:
        """Read and write until either side ends it; why it ended."""
        outcome: list[tuple[Reason, str]] = []

        async def until_done(work: Callable[[_Link], Awaitable[None]]) -> None:
            try:
                await work(link)
            except trio.TooSlowError:
                outcome.append((link.closing or Reason.SILENT, "the peer does not read"))
            except Exception as error:  # the link's task boundary: py-libp2p raises many kinds
                outcome.append((link.closing or Reason.LINK, "" if link.closing else root_cause(error)))
            link.scope.cancel()

        with link.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_done, self._read_link)
                nursery.start_soon(until_done, self._write_link)
        return outcome[0] if outcome else (link.closing or Reason.LINK, "")

    async def _read_link(self, link: _Link) -> None:
        decoder = link_decoder()
        try:
            while True:
                data = await read(link.stream, READ_BYTES)
                if not data:
                    if link.closing is None:
                        decoder.finish()
                    return
                self.count(link.peer, received=len(data))
                for message in decoder.feed(data):
                    await self.post(Received(link.peer, message))
        except PeerError as error:
            await self.post(Rejected(link.peer, error.reason, error.detail))
            # The core now sends its refusal and disconnects; nothing more is read from this peer.
            await trio.sleep(STALL_TIMEOUT_S)

    async def _write_link(self, link: _Link) -> None:
        while link.outbox or link.closing is None:
            if not link.outbox:
                await link.wake.wait()
                link.wake = trio.Event()
                continue
            # Everything that waits goes out in one write: messages of one tick share their overhead.
            data = b"".join(encode(message) for message in link.outbox)
            link.outbox.clear()
            with trio.fail_after(STALL_TIMEOUT_S):
                await link.stream.muxed_stream.write(data)
            self.count(link.peer, sent=len(data))
        await link.stream.close_write()
        await trio.sleep(LINGER_S)

    def _enqueue(self, link: _Link, message: LinkMessage) -> None:
        if link.closing:
            return
        link.outbox.append(message)
        if len(link.outbox) > MAX_OUTBOX:
            link.closing = Reason.SILENT
            link.scope.cancel()
        link.wake.set()

    def _close_link(self, link: _Link, reason: Reason) -> None:
        link.close(reason)
        # A peer that has stopped reading would hold our last words, and the link, for ever.
        link.scope.deadline = trio.current_time() + CLOSE_TIMEOUT_S

    # --- transfers: what `Transfers` needs of the links ----------------------------------------------
    def _start_fetch(
        self, token: int, peer: PeerId, ref: ModelRef | ContentRef, others: tuple[PeerId, ...]
    ) -> None:
        self.start_soon(self._transfers.fetch, token, peer, ref, others)

    async def _on_fetch_stream(self, stream: INetStream) -> None:
        await self._apart(self._transfers.serve, stream)

    def start_soon(self, work: Callable[..., Awaitable[object]], *args: object) -> None:
        self._nursery.start_soon(work, *args)

    def is_linked(self, peer: PeerId) -> bool:
        return peer in self._links and self._has_greeted(peer)

    async def open_fetch_stream(self, peer: PeerId) -> INetStream:
        return await self._host.new_stream(ID.from_string(peer), [FETCH])

    def count(self, peer: PeerId, *, sent: int = 0, received: int = 0) -> None:
        self.bytes_sent += sent
        self.bytes_received += received
        if link := self._links.get(peer):
            link.bytes_sent += sent
            link.bytes_received += received


async def _resolve(address: str) -> str:
    """A TCP multiaddr with its host name, if it has one, replaced by an IP: the library dials nothing else."""
    kind, host, port = split_tcp(address)
    if not kind.startswith("dns"):
        return f"/{kind}/{host}/tcp/{port}"
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(kind, socket.AF_UNSPEC)
    found = await trio.socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    family, *_, endpoint = found[0]
    return f"/{'ip6' if family == socket.AF_INET6 else 'ip4'}/{endpoint[0]}/tcp/{port}"


class _CountingUpgrader(TransportUpgrader):  # type: ignore[misc]
    """As the library's, but tells of inbound connections that did not become secure."""

    def __init__(self, *args: Any, on_insecure: Callable[[str], None]) -> None:
        super().__init__(*args)
        self._on_insecure = on_insecure

    async def upgrade_security(self, raw_conn: Any, is_initiator: bool, peer_id: ID | None = None) -> Any:
        try:
            return await super().upgrade_security(raw_conn, is_initiator, peer_id)
        except Exception as error:
            if not is_initiator:
                self._on_insecure(root_cause(error))
            raise


def _make_host(
    key: Ed25519PrivateKey,
    listen: Sequence[Multiaddr],
    on_insecure: Callable[[str], None],
    psk: str | None = None,
) -> IHost:
    """A host with every default that would bite a learning node set by hand (docs/decisions/0002)."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    seed = key.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    pair = create_new_key_pair(seed)
    noise = NoiseTransport(pair, noise_privkey=create_noise_key_pair().private_key)
    security, muxer = {NOISE: noise}, {TProtocol(YAMUX): Yamux}
    host = new_host(
        key_pair=pair,
        sec_opt=security,
        muxer_opt=muxer,
        listen_addrs=listen,
        psk=psk,
        connection_config=ConnectionConfig(
            max_connections=MAX_CONNECTIONS,
            high_watermark=MAX_CONNECTIONS,
            low_watermark=0,
            min_connections=0,
            # Shorter than our own limit on a dial, so that the library cleans up what it gave up.
            dial_timeout=0.8 * DIAL_TIMEOUT_S,
            outbound_upgrade_timeout=0.8 * DIAL_TIMEOUT_S,
        ),
        # Its circuit breaker and graceful degradation let one misbehaving peer close the node to all.
        resource_manager=ResourceManager(
            limits=ResourceLimits(max_connections=MAX_CONNECTIONS, max_streams=4096),
            enable_prometheus=False,
            enable_metrics=False,
            enable_circuit_breaker=False,
            enable_graceful_degradation=False,
        ),
    )
    swarm: Any = host.get_network()
    # Redialling, with back-off and for ever, is the core's business.
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm.upgrader = _CountingUpgrader(security, muxer, on_insecure=on_insecure)
    return host


def _multiaddr(path: str, text: str) -> Multiaddr:
    try:
        return Multiaddr(text)
    except Exception as error:  # the library raises several kinds for a malformed address
        raise ConfigError(path, f"'{text}' is not a multiaddr: {error}", ["/ip4/0.0.0.0/tcp/4001"]) from error


def _buckets(up_bytes_per_s: int, down_bytes_per_s: int) -> tuple[TokenBucket, TokenBucket]:
    return (
        TokenBucket(check_limit("network.up_bytes_per_s", up_bytes_per_s)),
        TokenBucket(check_limit("network.down_bytes_per_s", down_bytes_per_s)),
    )


def _checked_psk(psk: str) -> str:
    """The library takes any 64 characters and fails at the first connection."""
    if len(psk) != 64 or not all(digit in string.hexdigits for digit in psk):
        raise ConfigError("network.psk", "the key of a private network has 64 hexadecimal digits")
    return psk
