"""The real network: py-libp2p on trio, in one thread of its own, behind the `Network` port.

Only this file imports libp2p or trio. In: `run_sync_soon` onto per-link outboxes, which are bounded. Out: a
bounded inbox that the asyncio loop drains. Bulk bytes go to and from the blob store and never through either.
"""

import asyncio
import logging
import socket
import threading
from collections import Counter, deque
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
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.addresses import check_free, dialable, split_tcp
from node.ports import Deliver, NetworkEvent
from node.store import Blob, BlobStore, Incoming
from protocols.blob import check_header, chunk_length, num_chunks
from protocols.codec import FrameDecoder, encode, fetch_decoder, link_decoder
from protocols.errors import ConfigError, LocalError, PeerError
from protocols.events import DialFailed, Fetched, FetchFailed, LinkDown, LinkUp, Received, Rejected
from protocols.messages import FetchHeader, FetchMessage, FetchRefused, FetchRequest, LinkMessage
from protocols.vocabulary import CHUNK_BYTES, ModelRef, PeerId, Reason, one_line, peer_of

log = logging.getLogger(__name__)

LINK = TProtocol("/covey/link/1")
FETCH = TProtocol("/covey/fetch/1")

DIAL_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 15.0
"""A fetch that brings no byte for this long is broken off; what came stays and is not sent again."""
CHUNK_TIMEOUT_S = 60.0
"""A chunk (1 MiB) that takes longer, either way, ends the transfer: the slowest line of use carries 17 kB/s."""
CLOSE_TIMEOUT_S = 3.0
"""A link that is told to end is cut after this, whatever it still had to say."""
LINGER_S = 1.0
"""How long a closing link waits for the other side to have read the last words."""
MAX_CONNECTIONS = 256
MAX_INBOX = 2048
"""Events that may wait for the asyncio loop. Beyond it the readers pause and TCP pushes back."""
MAX_OUTBOX = 512
"""Messages that may wait on one link. A peer that reads so slowly loses the link."""
MAX_SERVES = 8
MAX_SERVES_PER_PEER = 4
READ_BYTES = 64 * 1024


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

    def close(self, reason: Reason) -> Reason:
        """End after what is in the outbox has gone out; the first reason given stays."""
        self.closing = self.closing or reason
        self.wake.set()
        return self.closing


class Libp2pNetwork:
    """`Network` over TCP, Noise and yamux. Commands may be called from the loop that called `start`."""

    def __init__(
        self,
        key: Ed25519PrivateKey,
        listen: Sequence[str],
        store: BlobStore,
        deliver: Deliver,
        announce: Sequence[str] = (),
        on_crash: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._key = key
        self._listen = [_multiaddr("network.listen", text) for text in listen]
        self._announce = tuple(announce)
        self._store = store
        self._deliver = deliver
        self._on_crash = on_crash
        self._links: dict[PeerId, _Link] = {}
        self._dialling: set[PeerId] = set()
        self._serves: Counter[PeerId] = Counter()
        self._inbox: deque[NetworkEvent] = deque()
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
        self._command(self._close_link, peer, reason)

    def send(self, peer: PeerId, message: LinkMessage) -> None:
        self._command(self._enqueue, peer, message)

    def fetch(self, token: int, peer: PeerId, ref: ModelRef) -> None:
        self._command(self._start_fetch, token, peer, ref)

    def _command(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._trio.run_sync_soon(function, *args)
        except trio.RunFinishedError:  # a crash is already on its way through `on_crash`
            return

    # --- the way out: from the trio thread to the loop --------------------------------------------------
    async def _post(self, event: NetworkEvent) -> None:
        """Hand over an event; wait while the loop is behind."""
        while len(self._inbox) >= MAX_INBOX:  # noqa: ASYNC110 - rare; an event would cost each message
            await trio.sleep(0.005)
        self._post_now(event)

    def _post_now(self, event: NetworkEvent) -> None:
        self._inbox.append(event)
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        for _ in range(64):
            if not self._inbox:
                return
            self._deliver(self._inbox.popleft())
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
        self._host = _make_host(self._key, self._listen, self._on_insecure)
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
            failure = (Reason.UNREACHABLE, _root_cause(error))
        else:
            self._dialling.discard(peer)
            await self._run_link(peer, stream, outbound=True, address=address)
            return
        self._dialling.discard(peer)
        if peer not in self._links:
            await self._post(DialFailed(address, failure[0], one_line(failure[1])))

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
        self._post_now(LinkUp(peer, outbound, address))
        reason, detail = await self._converse(link)
        # The connection goes before the word of it does: a dial that follows must not find the dying one.
        await self._close_stream(stream)
        if self._links.get(peer) is link:
            del self._links[peer]
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
                outcome.append((link.closing or Reason.LINK, "" if link.closing else _root_cause(error)))
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
                data = await _read(link.stream, READ_BYTES)
                if not data:
                    if link.closing is None:
                        decoder.finish()
                    return
                self.bytes_received += len(data)
                for message in decoder.feed(data):
                    await self._post(Received(link.peer, message))
        except PeerError as error:
            await self._post(Rejected(link.peer, error.reason, error.detail))
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
            self.bytes_sent += len(data)
        await link.stream.close_write()
        await trio.sleep(LINGER_S)

    def _enqueue(self, peer: PeerId, message: LinkMessage) -> None:
        link = self._links.get(peer)
        if link is None or link.closing:
            return
        link.outbox.append(message)
        if len(link.outbox) > MAX_OUTBOX:
            link.closing = Reason.SILENT
            link.scope.cancel()
        link.wake.set()

    def _close_link(self, peer: PeerId, reason: Reason) -> None:
        if link := self._links.get(peer):
            link.close(reason)
            # A peer that has stopped reading would hold our last words, and the link, for ever.
            link.scope.deadline = trio.current_time() + CLOSE_TIMEOUT_S

    # --- fetching ---------------------------------------------------------------------------------------
    def _start_fetch(self, token: int, peer: PeerId, ref: ModelRef) -> None:
        self._nursery.start_soon(self._fetch, token, peer, ref)

    async def _fetch(self, token: int, peer: PeerId, ref: ModelRef) -> None:
        try:
            await self._fetch_blob(peer, ref)
        except PeerError as error:
            event: NetworkEvent = FetchFailed(token, error.reason, error.detail)
        except trio.TooSlowError:
            event = FetchFailed(token, Reason.TIMEOUT, f"no byte for {STALL_TIMEOUT_S:.0f} s")
        except OSError as error:
            event = FetchFailed(token, Reason.BUSY, one_line(f"our disk: {error}"))
        except Exception as error:  # py-libp2p raises many kinds here; all mean that the stream broke
            event = FetchFailed(token, Reason.LINK, one_line(_root_cause(error)))
        else:
            event = Fetched(token)
        await self._post(event)

    async def _fetch_blob(self, peer: PeerId, ref: ModelRef) -> None:
        if self._store.get(ref.digest):
            return
        incoming = self._store.incoming(ref)
        if incoming.busy:
            raise PeerError(Reason.BUSY, "this model is being fetched already")
        if peer not in self._links:
            raise PeerError(Reason.LINK, "no link to the peer")
        incoming.busy = True
        stream: INetStream | None = None
        try:
            with trio.fail_after(STALL_TIMEOUT_S):
                stream = await self._host.new_stream(ID.from_string(peer), [FETCH])
            header = await self._receive_blob(stream, incoming)
            # Looking at every weight takes a while for a large model: not on the thread that moves bytes.
            await trio.to_thread.run_sync(
                self._store.admit,
                incoming,
                header.chunk_hashes,
                abandon_on_cancel=True,  # type: ignore[call-arg]
            )
        finally:
            incoming.busy = False
            if stream is not None:
                with trio.CancelScope(shield=True), trio.move_on_after(LINGER_S):
                    await stream.reset()

    async def _receive_blob(self, stream: INetStream, incoming: Incoming) -> FetchHeader:
        ref = incoming.ref
        with trio.fail_after(STALL_TIMEOUT_S):
            await stream.write(encode(FetchRequest(ref.digest, incoming.next_chunk)))
        decoder = fetch_decoder()
        header = await _read_message(stream, decoder)
        match header:
            case FetchRefused(reason):
                raise PeerError(reason, "the peer refused the fetch")
            case FetchHeader():
                check_header(ref, header)
            case _:
                raise PeerError(Reason.MALFORMED, "a fetch is answered by a header")
        await self._receive_chunks(stream, incoming, header, decoder.take_rest())
        return header

    async def _receive_chunks(
        self, stream: INetStream, incoming: Incoming, header: FetchHeader, rest: bytes
    ) -> None:
        """Read chunk after chunk; check and write each on another thread while the next one comes in."""
        size = incoming.ref.size_bytes
        failure: list[PeerError | OSError] = []
        to_disk, chunks = trio.open_memory_channel[list[bytes]](1)

        def write(pieces: list[bytes]) -> None:
            incoming.write(b"".join(pieces), header.chunk_hashes[incoming.next_chunk])

        async def write_chunks() -> None:
            try:
                async for pieces in chunks:
                    await trio.to_thread.run_sync(write, pieces)
            except (PeerError, OSError) as error:
                failure.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_chunks)
            try:
                for index in range(incoming.next_chunk, num_chunks(size)):
                    with trio.fail_after(CHUNK_TIMEOUT_S):
                        pieces, rest = await self._read_chunk(stream, chunk_length(size, index), rest)
                    await to_disk.send(pieces)
            except PeerError as error:
                failure.append(error)
            except trio.TooSlowError:
                failure.append(PeerError(Reason.TIMEOUT, f"a chunk took more than {CHUNK_TIMEOUT_S:.0f} s"))
            to_disk.close()  # what is under way is still written: it need not be sent again
        if failure:
            raise failure[0]

    async def _read_chunk(self, stream: INetStream, length: int, rest: bytes) -> tuple[list[bytes], bytes]:
        """The pieces of one chunk, and what was read beyond it. This thread is the bottleneck: it copies nothing."""
        pieces, missing = [rest], length - len(rest)
        while missing > 0:
            try:
                with trio.fail_after(STALL_TIMEOUT_S):
                    data = await _read(stream, CHUNK_BYTES)
            except trio.TooSlowError:
                raise PeerError(Reason.TIMEOUT, f"no byte for {STALL_TIMEOUT_S:.0f} s") from None
            except MuxedStreamError as error:
                raise PeerError(Reason.LINK, _root_cause(error)) from error
            if not data:
                raise PeerError(Reason.LINK, "the peer ended the stream inside a chunk")
            pieces.append(data)
            missing -= len(data)
            self.bytes_received += len(data)
        last = pieces[-1]
        beyond = len(last) + missing  # `missing` is how much too much came, below zero
        pieces[-1], rest = last[:beyond], last[beyond:]
        return pieces, rest

    # --- serving ----------------------------------------------------------------------------------------
    async def _on_fetch_stream(self, stream: INetStream) -> None:
        await self._apart(self._serve_stream, stream)

    async def _serve_stream(self, stream: INetStream) -> None:
        peer = PeerId(stream.muxed_conn.peer_id.to_string())
        try:
            with trio.fail_after(STALL_TIMEOUT_S):
                request = await _read_message(stream, fetch_decoder())
            await self._answer(peer, stream, request)
            await stream.close()
        except PeerError as error:
            await self._post(Rejected(peer, error.reason, error.detail))
            await stream.reset()
        except Exception as error:  # the stream's task boundary: the peer left, or our file was forgotten
            log.debug("serving a fetch: %r", error)
            await stream.reset()

    async def _answer(self, peer: PeerId, stream: INetStream, request: FetchMessage) -> None:
        if not isinstance(request, FetchRequest):
            raise PeerError(Reason.MALFORMED, "a fetch stream begins with a request")
        blob = self._store.get(request.digest)
        refusal = None
        if peer not in self._links or blob is None:
            refusal = Reason.GONE
        elif self._serves.total() >= MAX_SERVES or self._serves[peer] >= MAX_SERVES_PER_PEER:
            refusal = Reason.BUSY
        if refusal is not None or blob is None:
            await stream.write(encode(FetchRefused(refusal or Reason.GONE)))
            return
        self._serves[peer] += 1
        try:
            await self._serve(stream, blob, request.first_chunk)
        finally:
            self._serves -= Counter([peer])

    async def _serve(self, stream: INetStream, blob: Blob, first_chunk: int) -> None:
        with trio.fail_after(STALL_TIMEOUT_S):
            await stream.write(encode(FetchHeader(blob.size_bytes, blob.chunk_hashes)))
        for index in range(first_chunk, num_chunks(blob.size_bytes)):
            chunk = blob.read(index)
            # Whoever takes longer for one chunk holds a place that others wait for.
            with trio.fail_after(CHUNK_TIMEOUT_S):
                await stream.write(chunk)
            self.bytes_sent += len(chunk)


async def _resolve(address: str) -> str:
    """A TCP multiaddr with its host name, if it has one, replaced by an IP: the library dials nothing else."""
    kind, host, port = split_tcp(address)
    if not kind.startswith("dns"):
        return f"/{kind}/{host}/tcp/{port}"
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(kind, socket.AF_UNSPEC)
    found = await trio.socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    family, *_, endpoint = found[0]
    return f"/{'ip6' if family == socket.AF_INET6 else 'ip4'}/{endpoint[0]}/tcp/{port}"


async def _read_message(stream: INetStream, decoder: FrameDecoder[Any]) -> FetchMessage:
    """The first whole frame of a fetch stream; what follows it stays in the decoder."""
    data = b""
    while True:
        for message in decoder.feed(data):
            return message  # type: ignore[no-any-return]
        with trio.fail_after(STALL_TIMEOUT_S):
            data = await _read(stream, READ_BYTES)
        if not data:
            decoder.finish()
            raise PeerError(Reason.LINK, "the stream ended without a message")


async def _read(stream: INetStream, size: int) -> bytes:
    """Up to `size` bytes, or none at the end.

    Straight from the muxer: the library's stream object takes a lock around every read, which costs a turn of
    the scheduler each time (measured: 5 % of a large transfer).
    """
    try:
        data: bytes = await stream.muxed_stream.read(size)
    except MuxedStreamEOF:
        return b""
    return data


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
                self._on_insecure(_root_cause(error))
            raise


def _make_host(
    key: Ed25519PrivateKey, listen: Sequence[Multiaddr], on_insecure: Callable[[str], None]
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


def _root_cause(error: BaseException) -> str:
    """The innermost reason of a chain, which is the one that says something."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, BaseExceptionGroup) and error.exceptions:
        return _root_cause(error.exceptions[0])
    return str(error) or type(error).__name__
