"""Finding peers beside the bootstrap list: over real sockets on loopback, and with answers that lie."""

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_uvarint
from multiaddr import Multiaddr
from zeroconf import Zeroconf

from node import discovery, kademlia
from node.config import Config, NetworkConfig
from node.daemon import Daemon
from node.discovery import MAX_FOUND, MAX_PER_PEER, Discovery, network_key, usable
from node.identity import peer_id_of
from node.kademlia import KAD, MAX_ADDRESSES, MAX_DIALS, MAX_KEYS, MAX_PEERS, Answer, checked_message
from node.libp2p_network import Libp2pNetwork
from node.mdns import SERVICE, read_txt_record, txt_record
from node.ports import NetworkEvent
from node.store import BlobStore
from protocols.errors import PeerError
from protocols.events import Discovered, LinkUp
from protocols.vocabulary import peer_of

LOOPBACK = "127.0.0.1"


def some_peer() -> str:
    return peer_id_of(Ed25519PrivateKey.generate())


class Node:
    """A network adapter that looks for peers."""

    def __init__(
        self,
        home: Path,
        network: str,
        *,
        mdns: bool = False,
        dht: bool = False,
        seeds: tuple[str, ...] = (),
        interfaces: tuple[str, ...] = (LOOPBACK,),
    ) -> None:
        home.mkdir()
        self.heard: list[NetworkEvent] = []
        self.changed = asyncio.Event()
        self.crash: list[BaseException] = []
        self.network = Libp2pNetwork(
            Ed25519PrivateKey.generate(),
            [f"/ip4/{LOOPBACK}/tcp/0"],
            BlobStore(home, lambda path: None),
            self.hear,
            on_crash=self.crash.append,
            discovery=Discovery(
                network,
                random.Random(1),
                mdns=mdns,
                dht=dht,
                seeds=seeds,
                search_s=0.2,
                interfaces=interfaces,
            ),
        )
        self.address = ""

    def hear(self, event: NetworkEvent) -> None:
        self.heard.append(event)
        self.changed.set()

    @property
    def found(self) -> set[str]:
        return {a for event in self.heard if isinstance(event, Discovered) for a in event.addresses}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def until_found(self, other: "Node") -> None:
        await self.until(lambda: other.address in self.found)

    async def link(self, other: "Node") -> None:
        self.network.dial(other.address)
        for node in (self, other):
            await node.until(lambda node=node: any(isinstance(event, LinkUp) for event in node.heard))

    async def on_trio(self, function: Callable[..., Awaitable[object]], *args: object) -> object:
        """Run something in the adapter's thread, with its host as the first argument."""
        return await asyncio.to_thread(
            trio.from_thread.run, function, self.network._host, *args, trio_token=self.network._trio
        )


def id_of(node: Node) -> ID:
    return ID.from_string(peer_of(node.address))


MakeNode = Callable[..., Awaitable[Node]]


@pytest.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[MakeNode]:
    nodes: list[Node] = []

    async def make(network: str = "ours", **options: object) -> Node:
        node = Node(tmp_path / str(len(nodes)), network, **options)  # type: ignore[arg-type]
        nodes.append(node)
        (node.address, *_) = await node.network.start()
        return node

    yield make
    for node in nodes:
        await node.network.stop()
        assert not node.crash


# --- the DHT ------------------------------------------------------------------------------------------------
async def test_a_peer_of_a_peer_is_found_in_the_dht(make_node: MakeNode) -> None:
    a, b, c = [await make_node(dht=True) for _ in range(3)]
    await b.link(a)
    await c.link(a)
    await c.until_found(b)
    await b.until_found(c)
    assert c.found <= {a.address, b.address}


async def test_a_node_of_another_network_is_enough_to_begin_with(make_node: MakeNode) -> None:
    """Nothing but an address of a node that would refuse the link: the DHT speaks with it all the same."""
    a = await make_node("theirs", dht=True)
    b, c, stranger = [
        await make_node(network, dht=True, seeds=(a.address,)) for network in ("ours", "ours", "a third")
    ]
    await c.until_found(b)
    await b.until_found(c)
    assert not stranger.found
    assert not a.found


async def put_record(host: object, server: ID, key: bytes, address: str) -> bool:
    """Tell a DHT server that we provide a key; whether it took that."""
    message = Message(type=Message.ADD_PROVIDER, key=key)
    message.providerPeers.add(id=host.get_id().to_bytes(), addrs=[Multiaddr(address).to_bytes()])  # type: ignore[attr-defined]
    data = message.SerializeToString()
    try:
        stream = await host.new_stream(server, [KAD])  # type: ignore[attr-defined]
        await stream.write(encode_uvarint(len(data)) + data)
        taken = bool(await stream.read(1))
        await stream.reset()
    except Exception:  # py-libp2p raises many kinds here; all mean that the other side has reset the stream
        return False
    return taken


async def test_a_record_that_only_another_node_holds_is_asked_for(make_node: MakeNode) -> None:
    """Its own record, which each searcher has, must not keep it from asking."""
    a, b = await make_node("theirs", dht=True), await make_node()
    await b.link(a)
    assert await b.on_trio(put_record, id_of(a), network_key("ours"), b.address)
    c = await make_node(dht=True, seeds=(a.address,))
    await c.until_found(b)


async def test_connections_that_a_search_opened_are_closed(make_node: MakeNode) -> None:
    a = await make_node(dht=True)
    b, c = [await make_node(dht=True, seeds=(a.address,)) for _ in range(2)]
    await c.until_found(b)

    async def none_left(host: object) -> None:
        # Others may be searching at this moment: what must come is a moment without any.
        with trio.fail_after(20):
            while host.get_connected_peers():  # type: ignore[attr-defined]  # noqa: ASYNC110
                await trio.sleep(0.02)

    await c.on_trio(none_left)
    await a.on_trio(none_left)


async def test_connections_that_others_leave_idle_are_closed(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kademlia, "IDLE_S", 0.5)
    a, idler = await make_node(dht=True), await make_node()

    async def connect_and_wait(host: object) -> None:
        network = host.get_network()  # type: ignore[attr-defined]
        await network.dial_addr(Multiaddr(a.address.partition("/p2p/")[0]), id_of(a))
        with trio.fail_after(20):
            while network.get_connections(id_of(a)):  # noqa: ASYNC110 - the library has no event for it
                await trio.sleep(0.02)

    await idler.on_trio(connect_and_wait)


async def test_both_can_be_switched_off(make_node: MakeNode) -> None:
    on, off = await make_node(dht=True, mdns=True), await make_node()
    await off.link(on)

    async def protocols(host: object) -> object:
        return [str(p) for p in host.get_mux().get_protocols()]  # type: ignore[attr-defined]

    assert KAD in await on.on_trio(protocols)  # type: ignore[operator]
    assert KAD not in await off.on_trio(protocols)  # type: ignore[operator]
    assert "/ipfs/kad/1.0.0" not in await on.on_trio(protocols)  # type: ignore[operator]
    assert not off.found


async def test_the_config_switches_both_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Host:
        def get_id(self) -> ID:
            return ID.from_string(some_peer())

    settings = NetworkConfig(mdns=False, dht=False)
    off = Daemon(Config(network=settings), tmp_path)._make_discovery()
    address = f"/ip4/10.0.0.1/tcp/1/p2p/{some_peer()}"
    # With nothing to do it ends, instead of running as long as the node.
    await asyncio.to_thread(trio.run, off.run, Host(), [address], [], [], lambda addresses: None)
    assert not caplog.records, "what was begun with this host has failed, and was said to"


async def test_peers_with_a_link_are_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    linked, other, told = some_peer(), some_peer(), []
    address = "/ip4/10.0.0.1/tcp/1"

    class Host:
        def get_id(self) -> ID:
            return ID.from_string(some_peer())

    async def report_both(
        tag: bytes, me: str, own: object, report: Callable[[Answer], None], *_: object
    ) -> None:
        for peer in (linked, other):
            report(Answer(peer, [address]))

    monkeypatch.setattr(discovery.mdns, "run", report_both)
    looking = Discovery("ours", random.Random(1), dht=False)
    await asyncio.to_thread(trio.run, looking.run, Host(), [address], [linked], [], told.append)
    assert told == [(f"{address}/p2p/{other}",)]


async def test_a_failing_search_ends_the_search_and_not_the_node(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def fail(*args: object) -> None:
        loop.call_soon_threadsafe(failed.set)
        raise RuntimeError("no such luck")

    monkeypatch.setattr(discovery.Dht, "search", fail)
    a, b = await make_node(dht=True), await make_node()
    await asyncio.wait_for(failed.wait(), 20)
    await b.link(a)
    assert [r.getMessage() for r in caplog.records if r.name == "node.discovery"] == [
        "peers are no longer looked for in the DHT: RuntimeError('no such luck')"
    ]


# --- answers that lie ---------------------------------------------------------------------------------------
def peers_message(count: int, addresses: int = 1, kind: int = Message.GET_PROVIDERS) -> Message:
    message = Message(type=kind, key=bytes(32))
    for number in range(count):
        peer = ID.from_string(some_peer()).to_bytes()[:-4] + number.to_bytes(4, "big")
        told = [Multiaddr(f"/ip4/127.0.0.1/tcp/{port + 1}").to_bytes() for port in range(addresses)]
        message.providerPeers.add(id=peer, addrs=told)
        message.closerPeers.add(id=peer, addrs=told, signedRecord=b"junk")
    return message


def test_a_message_is_cut_to_what_counts() -> None:
    message = Message.FromString(checked_message(peers_message(500, 50).SerializeToString()))
    assert len(message.providerPeers) == len(message.closerPeers) == MAX_PEERS
    assert all(len(peer.addrs) == MAX_ADDRESSES for peer in message.providerPeers)
    assert not any(peer.signedRecord for peer in message.closerPeers)


def test_what_is_no_peer_id_is_cut_and_honest_peers_stay() -> None:
    message = peers_message(1)
    message.providerPeers.add(id=b"x" * 38)
    message.providerPeers.add(id=b"")
    kept = Message.FromString(checked_message(message.SerializeToString()))
    assert [peer.id for peer in kept.providerPeers] == [message.providerPeers[0].id]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff",
        Message(type=Message.PUT_VALUE, key=bytes(32)).SerializeToString(),
        Message(type=Message.GET_VALUE, key=bytes(32)).SerializeToString(),
        Message(type=Message.ADD_PROVIDER, key=b"short").SerializeToString(),
    ],
    ids=["no message", "keeping a value", "asking for a value", "no key of a network"],
)
def test_messages_that_are_not_used_here_are_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        checked_message(data)


def test_of_what_is_answered_only_addresses_of_the_peer_itself_are_told() -> None:
    me, peer, other = some_peer(), some_peer(), some_peer()
    good = "/ip4/10.0.0.1/tcp/4001"
    answers = [
        Answer(me, [good]),
        Answer("not a peer id", [good]),
        Answer(
            peer,
            [
                "",
                "junk",
                "/ip4/10.0.0.1/udp/4001/quic-v1",
                "/dns4/victim.example/tcp/80",
                "/ip4/999.0.0.1/tcp/1",
                "/ip4/127.0.0.1/tcp/22",
                f"{good}/p2p/{other}",
                good,
            ],
        ),
        Answer(other, [f"/ip6/::1/tcp/1/p2p/{other}", f"/ip6/fd00::1/tcp/1/p2p/{other}"]),
    ]
    assert usable(answers, me) == (f"{good}/p2p/{peer}", f"/ip6/fd00::1/tcp/1/p2p/{other}")
    loop = Answer(peer, ["/ip4/127.0.0.1/tcp/22"])
    assert usable([loop], me, loopback=True) == (f"/ip4/127.0.0.1/tcp/22/p2p/{peer}",)


def test_ten_thousand_answers_are_sixteen_addresses() -> None:
    peers = [some_peer() for _ in range(20)]
    answers = (Answer(peers[n % 20], [f"/ip4/10.0.0.1/tcp/{n + 1}"] * 100) for n in range(10_000))
    found = usable(answers, some_peer())
    assert len(found) == MAX_FOUND
    crowd = usable([Answer(peers[0], [f"/ip4/10.0.0.1/tcp/{n + 1}" for n in range(10_000)])], some_peer())
    assert len(crowd) == MAX_PER_PEER


async def test_a_dht_server_that_lies_is_harmless(make_node: MakeNode) -> None:
    """It answers with 10,000 invented peers, and then with a message beyond the limit; an honest peer is found still."""
    honest = await make_node(dht=True)
    b = await make_node(dht=True)
    liar = await make_node()
    lies = itertools.cycle(
        [
            peers_message(300, kind=Message.FIND_NODE),
            peers_message(300, kind=Message.GET_PROVIDERS),
            peers_message(10_000),
            Message(type=Message.PUT_VALUE),
        ]
    )
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def serve(host: object) -> None:
        async def lie(stream: object) -> None:
            loop.call_soon_threadsafe(asked.set)
            data = next(lies).SerializeToString()
            # Whoever is lied to resets the stream; a handler that raises would take the liar's host down.
            with suppress(Exception):
                await stream.write(encode_uvarint(len(data)) + data)  # type: ignore[attr-defined]
                await stream.close()  # type: ignore[attr-defined]

        host.set_stream_handler(KAD, lie)  # type: ignore[attr-defined]

    await liar.on_trio(serve)
    victim = await make_node(dht=True, seeds=(liar.address, honest.address))
    await victim.link(liar)
    await b.link(honest)
    await asyncio.wait_for(asked.wait(), 20)
    await victim.until_found(b)
    assert all(len(e.addresses) <= MAX_FOUND for e in victim.heard if isinstance(e, Discovered))


async def test_a_search_dials_few_and_no_names() -> None:
    class Network:
        dialled: ClassVar[list[str]] = []

        def get_connections(self, peer: ID) -> list[object]:
            return []

        async def dial_addr(self, address: Multiaddr, peer: ID) -> None:
            self.dialled.append(str(address))
            raise OSError("nobody there")

    class Host:
        def get_network(self) -> Network:
            return Network()

    def known(address: str) -> kademlia.PeerInfo:
        return kademlia.PeerInfo(ID.from_string(some_peer()), [Multiaddr(address)])

    named = [known(a) for a in ("/dns4/victim.example/tcp/80", "/ip4/10.0.0.1/udp/1/quic-v1")]
    fence = kademlia._Fence(Host(), [])
    fence.begin([*named, *(known(f"/ip4/10.0.0.1/tcp/{n + 1}") for n in range(100))])
    for peer in fence.get_peerstore().peer_ids():
        with pytest.raises(PeerError):
            await fence.new_stream(peer, [KAD])
    assert Network.dialled == [f"/ip4/10.0.0.1/tcp/{n + 1}" for n in range(MAX_DIALS - len(named))]


async def test_a_client_that_floods_fills_nothing(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kademlia, "MAX_REQUESTS", 5)
    stores: list[kademlia._Providers] = []
    init = kademlia._Providers.__init__

    def remember(self: kademlia._Providers, *args: object, **options: object) -> None:
        init(self, *args, **options)
        stores.append(self)

    monkeypatch.setattr(kademlia._Providers, "__init__", remember)
    a, b = await make_node(dht=True), await make_node()
    await b.link(a)

    taken = [
        await b.on_trio(put_record, id_of(a), number.to_bytes(32, "big"), "/ip4/10.0.0.1/tcp/1")
        for number in range(20)
    ]
    assert sum(taken) == 5
    (store,) = stores
    assert len(store.providers.keys() - {network_key("ours")}) == 5


async def test_records_of_others_are_bounded_and_the_newest_count() -> None:
    class Host:
        def get_id(self) -> ID:
            return ID.from_string(some_peer())

    def info(peer: str) -> object:
        return kademlia.PeerInfo(ID.from_string(peer), [Multiaddr("/ip4/10.0.0.1/tcp/1")])

    async def keep() -> None:
        store = kademlia._Providers(Host())
        own = network_key("ours")
        for number in range(MAX_KEYS + 50):
            store.add_provider(number.to_bytes(32, "big"), info(some_peer()))
        assert len(store.providers) == MAX_KEYS
        store.providing_keys.add(own)
        peers = [some_peer() for _ in range(30)]
        for peer in peers:
            store.add_provider(own, info(peer))
        assert [str(i.peer_id) for i in store.get_providers(own)] == peers[10:]
        await trio.sleep(kademlia.RECORD_TTL_S + 1)
        assert not store.get_providers(own)
        assert not store.providers

    await asyncio.to_thread(trio.run, keep, clock=trio.testing.MockClock(autojump_threshold=0))


# --- the local network --------------------------------------------------------------------------------------
def as_bytes(record: dict[str, str]) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in record.items()}


def test_a_record_names_no_network_and_reads_back() -> None:
    peer, addresses = some_peer(), ["/ip4/10.0.0.1/tcp/1", "/ip6/fd00::1/tcp/2"]
    record = txt_record(network_key("secret plans"), peer, [f"{a}/p2p/{peer}" for a in addresses])
    assert "secret" not in str(record)
    assert all(len(key) + len(value) < 255 for key, value in record.items())
    assert read_txt_record(network_key("secret plans"), as_bytes(record)) == Answer(peer, addresses)
    assert read_txt_record(network_key("other plans"), as_bytes(record)) is None


def test_records_that_lie_or_are_broken_tell_little() -> None:
    tag, peer = network_key("ours"), some_peer()
    record = as_bytes(txt_record(tag, peer, []))
    assert read_txt_record(tag, {}) is None
    assert read_txt_record(tag, {b"network": None, b"peer": None}) is None
    assert read_txt_record(tag, {**record, b"peer": None}) is None
    crowd = {b"address%d" % n: b"/ip4/10.0.0.1/tcp/1" for n in range(10_000)}
    assert read_txt_record(tag, {**record, **crowd}) == Answer(peer, ["/ip4/10.0.0.1/tcp/1"] * 8)
    junk = {b"address0": b"\xff\x00", b"address1": b"x" * 10_000, b"address2": None}
    assert not usable([read_txt_record(tag, {**record, **junk}) or Answer("", [])], some_peer())


@pytest.fixture
def multicast() -> None:
    try:
        Zeroconf(interfaces=[LOOPBACK]).close()
    except OSError as error:
        pytest.skip(f"no multicast on loopback here: {error}")


@pytest.mark.usefixtures("multicast")
async def test_neighbours_of_one_network_find_each_other_by_mdns(make_node: MakeNode) -> None:
    ours = uuid4().hex  # other runs of this test may be heard too
    a, b, stranger = [await make_node(network, mdns=True) for network in (ours, ours, f"not {ours}")]
    await a.until_found(b)
    await b.until_found(a)
    assert a.found == {b.address}
    assert not stranger.found
    await asyncio.gather(*(node.network.stop() for node in (a, b, stranger)))
    assert not [thread for thread in threading.enumerate() if type(thread).__module__.startswith("zeroconf")]


async def test_a_node_on_loopback_alone_does_not_advertise(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*args: object) -> None:
        raise AssertionError(f"{SERVICE} was advertised")

    monkeypatch.setattr(discovery.mdns, "run", never)
    warned: list[object] = []
    monkeypatch.setattr(discovery.log, "warning", lambda *args: warned.append(args))
    a = await make_node(mdns=True, interfaces=())
    b = await make_node()
    await b.link(a)
    assert not warned


async def test_without_multicast_the_node_goes_on(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**options: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(discovery.mdns, "Zeroconf", refuse)
    a, b = await make_node(mdns=True), await make_node()
    await b.link(a)
    await a.network.stop()
    assert "peers are no longer looked for by mDNS: OSError('no such device')" in caplog.text
