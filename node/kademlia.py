"""Provider records in the library's Kademlia DHT: who else takes part in a network?

Only `node/discovery.py` uses this, inside the trio thread. The library's KadDHT is used as it comes, but it sees the host
through a fence (docs/discovery.md says why): it speaks a protocol of our own, tells the addresses others can dial, opens
few connections, and every message is checked and cut before it reads it.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import BUCKET_SIZE, PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.kad_dht.provider_store import ProviderRecord, ProviderStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.peer.peerstore import PeerStore
from libp2p.utils.varint import encode_uvarint, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from node.identity import PEER_ID_PREFIX
from protocols.errors import PeerError
from protocols.vocabulary import DIGEST_BYTES, KEY_BYTES, PeerId, Reason

log = logging.getLogger(__name__)

KAD = TProtocol("/covey/kad/1")
"""Not the public /ipfs/kad/1.0.0: nothing here shall ever join, or be flooded by, the DHT of IPFS."""

MAX_MESSAGE_BYTES = 64 * 1024
"""An honest answer, 20 peers and 20 providers with their addresses, takes about 20 KiB."""
MAX_PEERS = 20
"""Peers of either kind that count in one message: Kademlia's k."""
MAX_ADDRESSES = 8
"""Addresses that count of one peer."""
MAX_ADDRESS_BYTES = 128
MAX_RECORD_BYTES = 2048
"""Of the signed address record that comes with each message."""
PEER_ID_BYTES = len(PEER_ID_PREFIX) + KEY_BYTES
"""Every covey node has an Ed25519 key, which its peer id holds."""
MAX_KEYS = 256
"""Networks whose records a node keeps for others, up to 20 records each."""
MAX_KNOWN = 1024
"""Peers whose addresses are remembered during one search."""
MAX_DIALS = 24
"""Connections that one search may open."""
DIALS_PER_PEER = 2
MAX_PROVIDERS = 100
"""A search that has heard of so many, counting repetitions, asks no further."""
MAX_REQUESTS = 300
"""Requests that are answered within a minute; what comes beyond is reset. An honest peer has about 4 in a search."""
MESSAGE_TIMEOUT_S = 10.0
PHASE_TIMEOUT_S = 30.0
"""For saying that we are there, and again for asking who else is."""
IDLE_S = 60.0
"""How long others may leave a connection without a link."""
RECORD_TTL_S = 3 * 3600.0
"""A provider that has not said again within this that it is there counts as gone."""

_TYPES = frozenset({Message.FIND_NODE, Message.PING, Message.ADD_PROVIDER, Message.GET_PROVIDERS})
"""What a network needs of the DHT. Values are none of it: a stranger could store 50,000 MiB of them here."""


class Answer(NamedTuple):
    """What somebody says about a peer: nothing of it is proved."""

    peer: str
    addresses: Sequence[str]


class Dht:
    """Our part in the DHT: a server from the beginning, and a client where `search` is called."""

    def __init__(self, host: IHost, addresses: Sequence[str], seeds: Sequence[str]) -> None:
        """
        addresses: of ours that others can dial. seeds: addresses, with peer ids, of nodes of any covey network; a search
            begins with them and with the peers that are connected.
        """
        self._fence = _Fence(host, [Multiaddr(address) for address in addresses])
        self._dht: Any = KadDHT(self._fence, DHTMode.SERVER)
        self._dht.provider_store = _Providers(self._fence, self._dht.peer_routing)
        self._seeds = [info for seed in seeds if (info := _peer_info(seed)) is not None]
        self._idle_since: dict[ID, float] = {}

    async def search(self, key: bytes, in_use: Callable[[PeerId], bool]) -> list[Answer]:
        """Say that we provide `key` (32 bytes), and ask who else does; about a minute at most.

        in_use: whether a peer's connection carries a link. Those that the search opened and nobody uses are closed.
        """
        own: Any = self._dht.provider_store
        self._fence.begin([*self._seeds, *self._dht.routing_table.get_peer_infos()])
        # An empty store for each search: where the library has one record, be it our own, it asks nobody.
        asked = ProviderStore(self._fence, self._dht.peer_routing)
        found: list[PeerInfo] = []
        try:
            with trio.move_on_after(PHASE_TIMEOUT_S):
                await own.provide(key)
            with trio.move_on_after(PHASE_TIMEOUT_S):
                found = await asked.find_providers(key, MAX_PROVIDERS)
        finally:
            await self._close(peer for peer in self._fence.dialled if not in_use(_text(peer)))
        answers = found or asked.get_providers(key)  # what came in before the time was up counts too
        return [_answer(info) for info in (*own.get_providers(key), *answers)]

    async def close_idle(self, in_use: Callable[[PeerId], bool]) -> None:
        """Close the connections that have had no link for a minute: somebody's search has left them."""
        now = trio.current_time()
        idle = [peer for peer in self._fence.get_connected_peers() if not in_use(_text(peer))]
        self._idle_since = {peer: self._idle_since.get(peer, now) for peer in idle}
        await self._close(peer for peer, since in self._idle_since.items() if now - since > IDLE_S)

    async def _close(self, peers: Iterable[ID]) -> None:
        for peer in list(peers):
            try:
                with trio.CancelScope(shield=True), trio.move_on_after(1):
                    await self._fence.network.close_peer(peer)
            except Exception as error:  # it is going anyway
                log.debug("closing a connection: %r", error)


class _Fence:
    """As much of a host as the DHT needs."""

    def __init__(self, host: Any, addresses: list[Multiaddr]) -> None:
        self._host = host
        self._addresses = addresses
        self._requests: deque[float] = deque()
        self.network = host.get_network()
        self.begin([])

    def begin(self, known: Iterable[PeerInfo]) -> None:
        """Before a search: forget what peers were said to have, but for these, and allow new dials."""
        self._peerstore: Any = PeerStore(max_peers=MAX_KNOWN)
        self.dialled: set[ID] = set()
        for info in known:
            self._peerstore.add_addrs(info.peer_id, info.addrs[:MAX_ADDRESSES], ttl=int(RECORD_TTL_S))

    # --- what the library calls ---------------------------------------------------------------------------
    def get_id(self) -> ID:
        return self._host.get_id()

    def get_private_key(self) -> Any:
        return self._host.get_private_key()

    def get_addrs(self) -> list[Multiaddr]:
        return self._addresses

    def get_peerstore(self) -> Any:
        return self._peerstore

    def get_connected_peers(self) -> list[ID]:
        return self._host.get_connected_peers()  # type: ignore[no-any-return]

    def set_stream_handler(self, protocol: TProtocol, handler: Callable[[Any], Awaitable[None]]) -> None:
        async def answer(stream: INetStream) -> None:
            try:
                if self._may_ask():
                    await handler(_CheckedStream(stream))
                else:
                    await stream.reset()
            except Exception as error:  # one that raises takes the host down
                log.debug("answering in the DHT: %r", error)

        self._host.set_stream_handler(_ours(protocol), answer)

    async def new_stream(self, peer: ID, protocols: Sequence[TProtocol]) -> Any:
        if not self.network.get_connections(peer):
            await self._dial(peer)
        stream = await self._host.new_stream(peer, [_ours(protocol) for protocol in protocols])
        return _CheckedStream(stream) if PROTOCOL_ID in protocols else stream

    # ------------------------------------------------------------------------------------------------------
    def _may_ask(self) -> bool:
        now = trio.current_time()
        while self._requests and now - self._requests[0] > 60:
            self._requests.popleft()
        if len(self._requests) >= MAX_REQUESTS:
            return False
        self._requests.append(now)
        return True

    async def _dial(self, peer: ID) -> None:
        """Connect to one of a peer's addresses: TCP at an IP. A name from a stranger is not looked up."""
        if len(self.dialled) >= MAX_DIALS:
            raise PeerError(Reason.BUSY, "this search has opened enough connections")
        self.dialled.add(peer)
        addresses = [address for address in self._peerstore.addrs(peer) if _is_tcp(address)]
        for address in addresses[:DIALS_PER_PEER]:
            try:
                await self.network.dial_addr(_without_peer(address), peer)
                return
            except Exception as error:  # py-libp2p raises many kinds here; all mean that the dial failed
                log.debug("dialling %s: %r", address, error)
        raise PeerError(Reason.UNREACHABLE, "no address of the peer answers")


class _CheckedStream:
    """A stream of the DHT whose incoming messages are bounded, checked and cut."""

    metric_send_channel = None

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._waiting = b""
        self.muxed_conn = stream.muxed_conn

    async def read(self, size: int) -> bytes:
        if not self._waiting:
            with trio.fail_after(MESSAGE_TIMEOUT_S):
                data = checked_message(
                    await read_varint_prefixed_bytes_limited(self._stream, MAX_MESSAGE_BYTES)
                )
            self._waiting = encode_uvarint(len(data)) + data
        part, self._waiting = self._waiting[:size], self._waiting[size:]
        return part

    async def write(self, data: bytes) -> None:
        with trio.fail_after(MESSAGE_TIMEOUT_S):
            await self._stream.write(data)

    async def close(self) -> None:
        await self._stream.close()

    async def reset(self) -> None:
        await self._stream.reset()


def checked_message(data: bytes) -> bytes:
    """A message of the DHT, with no more peers and addresses in it than count.

    Raises:
        PeerError: it is no such message, or of a kind that is not used here.
    """
    try:
        message = Message.FromString(data)
    except Exception as error:  # protobuf's own, whose place differs between its versions
        raise PeerError(Reason.MALFORMED, "not a message of the DHT") from error
    if message.type not in _TYPES:
        raise PeerError(Reason.MALFORMED, "the DHT keeps provider records, nothing else")
    if message.type == Message.ADD_PROVIDER and len(message.key) != DIGEST_BYTES:
        raise PeerError(Reason.MALFORMED, "the key of a network is a SHA-256 digest")
    message.ClearField("record")
    if len(message.senderRecord) > MAX_RECORD_BYTES:
        message.ClearField("senderRecord")
    for peers in (message.closerPeers, message.providerPeers):
        _cut(peers)
    return message.SerializeToString()


def _cut(peers: Any) -> None:
    """What counts of a list of peers. Their signed records do not: who is dialled has to prove its id all the same."""
    kept = [
        Message.Peer(
            id=peer.id,
            connection=peer.connection,
            addrs=[address for address in peer.addrs[:MAX_ADDRESSES] if len(address) <= MAX_ADDRESS_BYTES],
        )
        for peer in peers[:MAX_PEERS]
        if len(peer.id) == PEER_ID_BYTES and peer.id.startswith(PEER_ID_PREFIX)
    ]
    del peers[:]
    peers.extend(kept)


class _Providers(ProviderStore):  # type: ignore[misc]
    """As the library's, but bounded, and the newest records count: its own keeps the first 20 for two days."""

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        if key not in self.providers and len(self.providers) >= MAX_KEYS and key not in self.providing_keys:
            return
        records = self.providers.setdefault(key, {})
        records.pop(str(provider.peer_id), None)
        records[str(provider.peer_id)] = record = ProviderRecord(provider)
        record.timestamp = trio.current_time()
        while len(records) > BUCKET_SIZE:
            del records[next(iter(records))]

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        self.cleanup_expired()
        return [record.provider_info for record in self.providers.get(key, {}).values()]

    def cleanup_expired(self) -> None:
        oldest = trio.current_time() - RECORD_TTL_S
        for key, records in list(self.providers.items()):
            live = {peer: record for peer, record in records.items() if record.timestamp >= oldest}
            self.providers[key] = live
            if not live:
                del self.providers[key]


def _ours(protocol: TProtocol) -> TProtocol:
    return KAD if protocol == PROTOCOL_ID else protocol


def _text(peer: ID) -> PeerId:
    return PeerId(peer.to_string())


def _peer_info(address: str) -> PeerInfo | None:
    try:
        return info_from_p2p_addr(Multiaddr(address))
    except Exception as error:  # the library raises several kinds for a malformed address
        log.debug("not a seed of the DHT: %s: %r", address, error)
        return None


def _is_tcp(address: Multiaddr) -> bool:
    names = [protocol.name for protocol in address.protocols()]
    return names in (["ip4", "tcp"], ["ip6", "tcp"], ["ip4", "tcp", "p2p"], ["ip6", "tcp", "p2p"])


def _without_peer(address: Multiaddr) -> Multiaddr:
    return Multiaddr(str(address).partition("/p2p/")[0])


def _answer(info: PeerInfo) -> Answer:
    return Answer(info.peer_id.to_string(), [str(address) for address in info.addrs[:MAX_ADDRESSES]])
