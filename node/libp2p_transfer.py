"""Models and contents over libp2p streams: pulled from several peers at once, served to several, within the node's limits.

Part of the adapter in `libp2p_network.py`, which knows the links; runs in its thread. What to ask of whom is decided in
`chunk_queue.py`, how fast bytes may pass in `rate_limit.py`.
"""

import logging
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import trio
from libp2p.abc import INetStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from node.chunk_queue import ChunkQueue
from node.ports import NetworkEvent, fetch_failure
from node.rate_limit import TokenBucket
from node.store import CONTENT_LANE, MODEL_LANE, Blob, Incoming
from protocols.blob import chunk_length, num_chunks
from protocols.codec import FrameDecoder, encode, fetch_decoder
from protocols.errors import LocalError, PeerError
from protocols.events import Fetched, FetchFailed, Rejected
from protocols.messages import FetchHeader, FetchMessage, FetchRefused, FetchRequest
from protocols.vocabulary import HOSTILE, ContentRef, ModelRef, PeerId, Reason, one_line

log = logging.getLogger(__name__)

STALL_TIMEOUT_S = 15.0
"""A peer that brings no byte for this long is dropped; what came stays and is not sent again."""
CHUNK_TIMEOUT_S = 60.0
"""A chunk (1 MiB) that takes longer, either way, ends the stream: the slowest line of use carries 17 kB/s."""
LINGER_S = 1.0
"""How long the end of a stream may take."""
MAX_SERVES = 8
"""Streams of models, and as many of contents: who takes an hour for a film keeps nobody from learning."""
MAX_SERVES_PER_PEER = 4
MAX_ASKED_CHUNKS = 4
"""Asked of one peer and not here yet: enough for a line of 40 MB/s and 0.1 s there and back."""
RANGE_CHUNKS = 2
"""Asked for in one request."""
READ_BYTES = 64 * 1024

_Chunk = tuple[PeerId, int, list[bytes]]
"""Who brought it, which it is, and its bytes in pieces."""


class Links(Protocol):
    """What transfers need of the network."""

    def is_linked(self, peer: PeerId) -> bool: ...

    async def open_fetch_stream(self, peer: PeerId) -> INetStream: ...

    async def post(self, event: NetworkEvent) -> None: ...

    def count(self, peer: PeerId, *, sent: int = 0, received: int = 0) -> None: ...

    def start_soon(self, work: Callable[..., Awaitable[object]], *args: object) -> None: ...


class Blobs(Protocol):
    """What transfers need of the store, whose blobs may be of several kinds."""

    def get(self, digest: bytes) -> Blob | None: ...

    def holds(self, ref: Any) -> bool: ...

    def incoming(self, ref: Any) -> Incoming: ...

    def admit(self, incoming: Incoming) -> None: ...


class Transfers:
    """All fetches and serves of one node."""

    def __init__(
        self,
        links: Links,
        store: Blobs,
        up: TokenBucket,
        down: TokenBucket,
        may_serve: Callable[[int], bool] = lambda num_bytes: True,
    ) -> None:
        """may_serve: whether so many more bytes may go out; asked before each range."""
        self._may_serve = may_serve
        self._links = links
        self._store = store
        self._serves: Counter[tuple[str, PeerId]] = Counter()
        """Streams that are being answered, by the lane of the blob and by peer."""
        self._opening = trio.Lock()
        """Two fetches of one blob must not begin at once."""
        self.places = {lane: trio.CapacityLimiter(math.inf) for lane in (MODEL_LANE, CONTENT_LANE)}
        """For the streams that are read from at once, however many fetches they are of. Contents have their own, or a model would
        wait until a film is here."""
        self.set_limits(up, down)

    def set_limits(self, up: TokenBucket, down: TokenBucket) -> None:
        """From now on, for what runs already too."""
        self.up, self.down = up, down
        most = down.max_streams
        self.places[MODEL_LANE].total_tokens = most
        self.places[CONTENT_LANE].total_tokens = most if math.isinf(most) else max(1, most // 2)

    # --- fetching ---------------------------------------------------------------------------------------
    async def fetch(
        self, token: int, peer: PeerId, ref: ModelRef | ContentRef, others: Sequence[PeerId]
    ) -> None:
        """Answered by one `Fetched` or `FetchFailed`."""
        event: NetworkEvent = Fetched(token)
        try:
            await self._fetch_blob(tuple(dict.fromkeys((peer, *others))), ref)
        except PeerError as error:
            event = FetchFailed(token, error.reason, one_line(error.detail))
        except LocalError as error:
            event = FetchFailed(token, Reason.BUSY, one_line(str(error)))
        except OSError as error:
            event = FetchFailed(token, Reason.BUSY, one_line(f"our disk: {error}"))
        except Exception as error:  # the task boundary: what one blob does must not end the thread for all
            event = FetchFailed(token, Reason.LINK, one_line(root_cause(error)))
        await self._links.post(event)

    async def _fetch_blob(self, sources: tuple[PeerId, ...], ref: ModelRef | ContentRef) -> None:
        async with self._opening:
            if await trio.to_thread.run_sync(self._store.holds, ref):
                return
            incoming = await trio.to_thread.run_sync(self._store.incoming, ref)
            if incoming.busy:
                raise PeerError(Reason.BUSY, "this is being fetched already")
            incoming.busy = True
        try:
            await trio.to_thread.run_sync(incoming.recover, abandon_on_cancel=True)  # type: ignore[call-arg]
            await _Download(self, self._links, sources, incoming).run()
            # Looking at every weight takes a while for a large model: not on the thread that moves bytes.
            await trio.to_thread.run_sync(
                self._store.admit,
                incoming,
                abandon_on_cancel=True,  # type: ignore[call-arg]
            )
        finally:
            incoming.busy = False

    # --- serving ----------------------------------------------------------------------------------------
    async def serve(self, stream: INetStream) -> None:
        """Answer what a peer asks for on a fetch stream, to its end."""
        peer = PeerId(stream.muxed_conn.peer_id.to_string())
        try:
            await self._answer(peer, stream)
            await stream.close()
        except PeerError as error:
            await self._links.post(Rejected(peer, error.reason, error.detail))
            await stream.reset()
        except Exception as error:  # the stream's task boundary: the peer left, or our file was forgotten
            log.debug("serving a fetch: %r", error)
            await stream.reset()

    async def _answer(self, peer: PeerId, stream: INetStream) -> None:
        decoder = fetch_decoder()
        request = await self._read_request(peer, stream, decoder)
        if request is None:
            return
        blob = None
        if self._links.is_linked(peer):
            blob = await trio.to_thread.run_sync(self._store.get, request.digest)
        if blob is not None and not self._may_serve(blob.size_bytes):
            blob = None
        if blob is None or not self._has_place(blob.lane, peer):
            await self._say(peer, stream, FetchRefused(Reason.GONE if blob is None else Reason.BUSY))
            return
        place = (blob.lane, peer)
        self._serves[place] += 1
        try:
            await self._say(peer, stream, FetchHeader(blob.size_bytes, blob.chunk_hashes))
            while request is not None:
                await self._serve_range(peer, stream, blob, request)
                last, request = request, await self._read_request(peer, stream, decoder)
                if request is not None and request.digest != last.digest:
                    raise PeerError(Reason.MALFORMED, "a fetch stream is for one blob")
        finally:
            self._serves -= Counter([place])

    def _has_place(self, lane: str, peer: PeerId) -> bool:
        max_serves = min(MAX_SERVES, self.up.max_streams)
        num_serves = sum(count for (other, _), count in self._serves.items() if other == lane)
        return num_serves < max_serves and self._serves[lane, peer] < MAX_SERVES_PER_PEER

    async def _serve_range(self, peer: PeerId, stream: INetStream, blob: Blob, request: FetchRequest) -> None:
        end = min(request.first_chunk + request.num_chunks, num_chunks(blob.size_bytes))
        for index in range(request.first_chunk, end):
            # A disk may take its time, and a content is hashed: not on the thread that moves bytes.
            chunk = await trio.to_thread.run_sync(blob.read, index)
            if not self._may_serve(len(chunk)):
                raise OSError("this device has spent its bytes of the month")
            # Whoever takes longer for one chunk holds a place that others wait for.
            with trio.fail_after(CHUNK_TIMEOUT_S):
                await self._send_chunk(peer, stream, chunk)

    async def _send_chunk(self, peer: PeerId, stream: INetStream, chunk: bytes) -> None:
        size = self.up.piece_bytes
        for start in range(0, len(chunk), size):
            piece = chunk[start : start + size]  # the whole chunk where there is no limit: not copied then
            await _wait_for(self.up, len(piece))
            await stream.write(piece)
            self._links.count(peer, sent=len(piece))

    async def _read_request(
        self, peer: PeerId, stream: INetStream, decoder: FrameDecoder[Any]
    ) -> FetchRequest | None:
        """The next request; none where the peer has no more, or thinks for too long."""
        try:
            message = await self.read_message(peer, stream, decoder)
        except trio.TooSlowError:
            return None
        if not isinstance(message, FetchRequest | None):
            raise PeerError(Reason.MALFORMED, "a fetch stream carries requests")
        return message

    # --- frames -----------------------------------------------------------------------------------------
    async def _say(self, peer: PeerId, stream: INetStream, message: FetchMessage) -> None:
        await self.write(peer, stream, encode(message))

    async def write(self, peer: PeerId, stream: INetStream, data: bytes) -> None:
        """A frame. The bytes of blobs alone are limited."""
        with trio.fail_after(STALL_TIMEOUT_S):
            await stream.write(data)
        self._links.count(peer, sent=len(data))

    async def read_message(
        self, peer: PeerId, stream: INetStream, decoder: FrameDecoder[Any]
    ) -> FetchMessage | None:
        """The next whole frame, or none where the stream ends before one; what follows it stays in the decoder."""
        data = b""
        while True:
            for message in decoder.feed(data):
                return message  # type: ignore[no-any-return]
            with trio.fail_after(STALL_TIMEOUT_S):
                data = await read(stream, READ_BYTES)
            self._links.count(peer, received=len(data))
            if not data:
                decoder.finish()
                return None


class _Download:
    """One blob on its way in.

    One task a source reads chunks, and `run` checks and writes them on another thread. In memory are at most a chunk a
    source and two more. No task is ever cancelled: inside the library that could break off a write, which leaves the cipher
    of the whole connection out of step. Each ends by itself once it is not needed.
    """

    def __init__(
        self, transfers: Transfers, links: Links, sources: tuple[PeerId, ...], incoming: Incoming
    ) -> None:
        self._transfers = transfers
        self._links = links
        self._sources = sources
        self._incoming = incoming
        self._queue = ChunkQueue(incoming.missing, len(sources))
        self._changed = trio.Event()
        self._failures: dict[PeerId, PeerError] = {}
        self._over = self._queue.finished

    async def run(self) -> None:
        """Until every chunk is held.

        Raises:
            PeerError: every source has failed.
            LocalError: a content is not wanted any more, or has no room.
            OSError: our disk refuses.
        """
        to_disk, chunks = trio.open_memory_channel[_Chunk](1)
        try:
            async with chunks:
                with to_disk:
                    for source in self._sources:
                        self._links.start_soon(self._pull, source, to_disk.clone())
                await self._write_chunks(chunks)
        finally:
            self._over = True
            self._tell_sources()
        first = self._sources[0]
        if not self._queue.finished:
            raise fetch_failure(first, self._failures)
        # Had the fetch failed, that would have told of the first source.
        if first in self._failures and self._failures[first].reason in HOSTILE:
            await self._accuse(first)

    async def _write_chunks(self, chunks: "trio.MemoryReceiveChannel[_Chunk]") -> None:
        async for source, index, pieces in chunks:
            try:
                await trio.to_thread.run_sync(self._write, index, pieces)
            except PeerError as error:
                self._queue.settle(index, right=False)
                await self._drop(source, error)
            else:
                self._queue.settle(index, right=True)
            if self._queue.finished:  # some may still send what others were quicker to bring
                return

    def _write(self, index: int, pieces: list[bytes]) -> None:
        self._incoming.write(index, b"".join(pieces))

    # --- one source -------------------------------------------------------------------------------------
    async def _pull(self, source: PeerId, to_disk: "trio.MemorySendChannel[_Chunk]") -> None:
        """Bring what is left to bring, as long as this source is good for it."""
        try:
            with to_disk:
                while self._needs(source):
                    if self._queue.has_work(source):
                        async with self._transfers.places[self._incoming.lane]:
                            await self._pull_stream(source, to_disk)
                    else:
                        await self._changed.wait()
        except Exception as error:  # py-libp2p raises many kinds here; all mean that this source failed
            if self._needs(source):
                await self._drop(source, failure_of(error))

    def _needs(self, source: PeerId) -> bool:
        return not self._over and source not in self._failures

    async def _pull_stream(self, source: PeerId, to_disk: "trio.MemorySendChannel[_Chunk]") -> None:
        """One stream: ask and read until there is nothing left to ask of this source."""
        if not self._links.is_linked(source):
            raise PeerError(Reason.LINK, "no link to the peer")
        with trio.fail_after(STALL_TIMEOUT_S):
            stream = await self._links.open_fetch_stream(source)
        try:
            owed = deque[int]()
            if await self._ask(source, stream, owed):
                rest = await self._read_header(source, stream)
                await self._read_chunks(source, stream, owed, rest, to_disk)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(LINGER_S):
                await stream.reset()

    async def _read_chunks(
        self,
        source: PeerId,
        stream: INetStream,
        owed: deque[int],
        rest: bytes,
        to_disk: "trio.MemorySendChannel[_Chunk]",
    ) -> None:
        """Read what the source owes and ask it for more, until there is nothing left or it ends the stream.

        It ends that of one who asks for nothing for long, as we do if our limit is low. Another stream then goes on.
        """
        num_brought = 0
        while owed and self._needs(source):
            length = chunk_length(self._incoming.ref.size_bytes, owed[0])
            with trio.fail_after(CHUNK_TIMEOUT_S):
                pieces, rest = await self._read_chunk(source, stream, length, rest)
            if not pieces:
                if not num_brought:
                    raise PeerError(Reason.LINK, "the peer ended the stream without a chunk")
                self._queue.drop(source)
                self._tell_sources()
                return
            num_brought += 1
            index = owed.popleft()
            if self._queue.bring(index):
                await to_disk.send((source, index, pieces))
            await self._ask(source, stream, owed)

    async def _ask(self, source: PeerId, stream: INetStream, owed: deque[int]) -> bool:
        """Keep some chunks asked for; whether any are owed."""
        while len(owed) <= MAX_ASKED_CHUNKS - RANGE_CHUNKS:
            chunks = self._queue.take(source, RANGE_CHUNKS)
            if not chunks:
                break
            owed.extend(chunks)
            request = FetchRequest(self._incoming.ref.digest, chunks.start, len(chunks))
            await self._transfers.write(source, stream, encode(request))
        return bool(owed)

    async def _read_header(self, source: PeerId, stream: INetStream) -> bytes:
        """Check the answer; what was read beyond it."""
        decoder = fetch_decoder()
        match await self._transfers.read_message(source, stream, decoder):
            case FetchRefused(reason):
                raise PeerError(reason, "the peer refused the fetch")
            case FetchHeader() as header:
                self._incoming.prove(header)
            case None:
                raise PeerError(Reason.LINK, "the stream ended without an answer")
            case _:
                raise PeerError(Reason.MALFORMED, "a fetch is answered by a header")
        return decoder.take_rest()

    async def _read_chunk(
        self, source: PeerId, stream: INetStream, length: int, rest: bytes
    ) -> tuple[list[bytes], bytes]:
        """The pieces of one chunk, none where the stream ends before it, and what was read beyond it.

        This thread is the bottleneck: it copies nothing.
        """
        pieces, missing = [rest], length - len(rest)
        while missing > 0:
            if not self._needs(source):
                raise PeerError(Reason.GONE, "not wanted any more")
            data = await self._read_piece(source, stream)
            if not data and missing == length:
                return [], b""
            if not data:
                raise PeerError(Reason.LINK, "the peer ended the stream inside a chunk")
            pieces.append(data)
            missing -= len(data)
        last = pieces[-1]
        beyond = len(last) + missing  # `missing` is how much too much came, below zero
        pieces[-1], rest = last[:beyond], last[beyond:]
        return pieces, rest

    async def _read_piece(self, source: PeerId, stream: INetStream) -> bytes:
        down = self._transfers.down
        try:
            with trio.fail_after(STALL_TIMEOUT_S):
                data = await read(stream, down.piece_bytes)
        except trio.TooSlowError:
            raise PeerError(Reason.TIMEOUT, f"no byte for {STALL_TIMEOUT_S:.0f} s") from None
        self._links.count(source, received=len(data))
        # Not reading is what slows the sender down: it may send no more than what we have made room for.
        await _wait_for(down, len(data))
        return data

    # --- sources that fail ------------------------------------------------------------------------------
    async def _drop(self, source: PeerId, failure: PeerError) -> None:
        already = source in self._failures
        if not already:
            self._failures[source] = failure
            self._queue.drop(source)
        self._tell_sources()  # what it owed, or brought wrong, is to be had
        if failure.reason in HOSTILE and source != self._sources[0] and not already:
            await self._accuse(source)

    def _tell_sources(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _accuse(self, source: PeerId) -> None:
        failure = self._failures[source]
        await self._links.post(Rejected(source, failure.reason, one_line(failure.detail)))


async def read(stream: INetStream, size: int) -> bytes:
    """Up to `size` bytes, or none at the end.

    Straight from the muxer: the library's stream object takes a lock around every read, which costs a turn of
    the scheduler each time (measured: 5 % of a large transfer).
    """
    try:
        data: bytes = await stream.muxed_stream.read(size)
    except MuxedStreamEOF:
        return b""
    return data


def failure_of(error: BaseException) -> PeerError:
    """What an exception on a fetch stream means."""
    match error:
        case PeerError():
            return error
        case trio.TooSlowError():
            return PeerError(
                Reason.TIMEOUT, f"nothing for {STALL_TIMEOUT_S:.0f} s, or no chunk in {CHUNK_TIMEOUT_S:.0f} s"
            )
        case _:
            return PeerError(Reason.LINK, root_cause(error))


def root_cause(error: BaseException) -> str:
    """The innermost reason of a chain, which is the one that says something."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, BaseExceptionGroup) and error.exceptions:
        return root_cause(error.exceptions[0])
    return str(error) or type(error).__name__


async def _wait_for(bucket: TokenBucket, num_bytes: int) -> None:
    wait_s = bucket.reserve(num_bytes, trio.current_time())
    if wait_s:
        await trio.sleep(wait_s)
