"""Models pulled from several real peers at once, and the limits and counters of what passes."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from libp2p.abc import INetStream

from node import libp2p_network, libp2p_transfer
from node.rate_limit import MIN_BYTES_PER_S
from node.store import Blob, BlobStore
from protocols.errors import ConfigError
from protocols.events import DialFailed, Fetched, FetchFailed, LinkDown, LinkUp, Received, Rejected
from protocols.messages import Heartbeat
from protocols.vocabulary import CHUNK_BYTES, ModelRef, PeerId, Reason
from tests.integration.network_peer import NetworkPeer, link, network_peers

UP = 8_000_000
"""Bytes per second of one server's uplink."""
MODEL = random.Random(6).randbytes(40_000_000)
SMALL = MODEL[: 12 * CHUNK_BYTES + 7]


class Peer(NetworkPeer):
    """One node's network and store, and what it heard."""

    def __init__(self, home: Path, psk: str | None = None) -> None:
        home.mkdir()
        self.store = BlobStore(home, lambda path: None)
        super().__init__(self.store, psk=psk)

    async def fetch(self, token: int, ref: ModelRef, *sources: "Peer") -> float:
        """The seconds until it was answered, from the first source and the others."""
        began_s = time.perf_counter()
        self.network.fetch(token, sources[0].me, ref, tuple(source.me for source in sources[1:]))
        await self.until(lambda: any(e.token == token for e in self.all(Fetched, FetchFailed)))  # type: ignore[union-attr]
        return time.perf_counter() - began_s


MakePeer = Callable[..., Awaitable[Peer]]


@pytest.fixture
async def make_peer(tmp_path: Path) -> AsyncIterator[MakePeer]:
    async with network_peers(lambda number, psk=None: Peer(tmp_path / str(number), psk)) as make:
        yield make


async def servers(
    make_peer: MakePeer, count: int, data: bytes, up: int = UP
) -> tuple[Peer, list[Peer], ModelRef]:
    """A node and others that serve one model to it, each with its limited uplink."""
    client, *others = [await make_peer() for _ in range(count + 1)]
    await link(client, *others)
    for other in others:
        ref = other.store.save(data, 1, 10)
        other.network.set_limits(up, 0)
    return client, others, ref


def watch_reads(monkeypatch: pytest.MonkeyPatch, seen: Callable[[Path, int], None]) -> None:
    """Call `seen` with the file and the chunk whenever a server reads one."""
    read = Blob.read

    def tell(blob: Blob, index: int) -> bytes:
        seen(blob.path, index)
        return read(blob, index)

    monkeypatch.setattr(Blob, "read", tell)


# --- several sources ------------------------------------------------------------------------------------
async def test_three_peers_together_are_faster_than_one_of_them(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, (a, b, c), ref = await servers(make_peer, 3, MODEL)
    served: list[tuple[Path, int]] = []
    watch_reads(monkeypatch, lambda path, index: served.append((path, index)))
    one_s = await client.fetch(1, ref, a)
    client.store.forget(ref.digest)
    served.clear()
    three_s = await client.fetch(2, ref, a, b, c)
    assert client.store.path(ref).read_bytes() == MODEL
    assert [type(event) for event in client.all(Fetched, FetchFailed, Rejected)] == [Fetched, Fetched]
    assert one_s > 0.9 * len(MODEL) / UP, "the uplink is limited"
    assert three_s < 0.6 * one_s, f"{one_s:.2f} s from one peer, {three_s:.2f} s from three"
    assert len({path for path, _ in served}) == 3
    assert len(served) <= 39 + 12, "hardly a chunk comes twice"


async def test_a_slow_peer_does_not_hold_up_the_end(make_peer: MakePeer) -> None:
    client, (slow, fast), ref = await servers(make_peer, 2, SMALL)
    slow.network.set_limits(MIN_BYTES_PER_S, 0)
    took_s = await client.fetch(1, ref, slow, fast)
    assert client.store.path(ref).read_bytes() == SMALL
    assert took_s < 10, "the slow peer alone takes half a minute for one chunk"


async def test_a_peer_that_lies_in_the_middle_is_named_and_the_fetch_goes_on(make_peer: MakePeer) -> None:
    client, (a, liar, c), ref = await servers(make_peer, 3, SMALL)
    with liar.store.path(ref).open("r+b") as file:
        file.seek(3 * CHUNK_BYTES)
        file.write(bytes(9 * CHUNK_BYTES))
    await client.fetch(1, ref, a, liar, c)
    assert client.all(Fetched, FetchFailed) == [Fetched(1)]
    assert client.store.path(ref).read_bytes() == SMALL
    assert [(e.peer, e.reason) for e in client.all(Rejected)] == [(liar.me, Reason.WRONG_HASH)]  # type: ignore[union-attr]


async def test_the_first_of_several_is_named_too_if_it_lies(make_peer: MakePeer) -> None:
    client, (liar, b), ref = await servers(make_peer, 2, SMALL)
    liar.store.path(ref).write_bytes(bytes(len(SMALL)))
    await client.fetch(1, ref, liar, b)
    assert [type(event) for event in client.all(Fetched, FetchFailed, Rejected)] == [Rejected, Fetched]
    assert [(e.peer, e.reason) for e in client.all(Rejected)] == [(liar.me, Reason.WRONG_HASH)]  # type: ignore[union-attr]
    assert client.store.path(ref).read_bytes() == SMALL


async def test_a_peer_that_dies_in_the_middle_is_made_up_for(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, (a, dying, c), ref = await servers(make_peer, 3, SMALL)
    loop, path, has_begun = asyncio.get_running_loop(), dying.store.path(ref), asyncio.Event()

    def seen(read: Path, index: int) -> None:
        if read == path:
            loop.call_soon_threadsafe(has_begun.set)

    watch_reads(monkeypatch, seen)
    fetch = asyncio.create_task(client.fetch(1, ref, a, dying, c))
    await has_begun.wait()
    await dying.network.stop()
    await fetch
    assert client.all(Fetched, FetchFailed) == [Fetched(1)]
    assert [e.peer for e in client.all(LinkDown)] == [dying.me]  # type: ignore[union-attr]
    assert not client.all(Rejected), "to die is no offence"
    assert client.store.path(ref).read_bytes() == SMALL


async def test_a_fetch_fails_only_when_all_have_failed_and_keeps_what_came(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, (a, b), ref = await servers(make_peer, 2, SMALL)
    broken, served = [True], []

    def seen(path: Path, index: int) -> None:
        if broken and index >= 6:
            raise OSError("the disk is gone")
        served.append(index)

    watch_reads(monkeypatch, seen)
    await client.fetch(1, ref, a, b)
    (failure,) = client.all(Fetched, FetchFailed)
    assert isinstance(failure, FetchFailed)
    assert failure.reason is Reason.LINK
    missing = client.store.incoming(ref).missing
    assert set(range(6, 13)) <= set(missing) < set(range(13))
    broken.clear()
    served.clear()
    await client.fetch(2, ref, b)
    assert served == missing
    assert client.store.path(ref).read_bytes() == SMALL


async def test_all_that_lie_are_named_each_once(make_peer: MakePeer) -> None:
    client, liars, ref = await servers(make_peer, 3, SMALL)
    for liar in liars:
        liar.store.path(ref).write_bytes(bytes(len(SMALL)))
    await client.fetch(1, ref, *liars)
    (failure,) = client.all(Fetched, FetchFailed)
    assert isinstance(failure, FetchFailed)
    assert failure.reason is Reason.WRONG_HASH
    assert sorted(e.peer for e in client.all(Rejected)) == sorted(liar.me for liar in liars[1:])  # type: ignore[union-attr]


# --- limits and counters ----------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_limit_holds_and_can_be_lifted_while_a_model_is_on_its_way(
    make_peer: MakePeer, way: str
) -> None:
    client, (server,), ref = await servers(make_peer, 1, SMALL[: CHUNK_BYTES + 1], up=0)
    limited = {"up": server, "down": client}[way]
    rate = 400_000
    limited.network.set_limits(*((rate, 0) if way == "up" else (0, rate)))
    took_s = await client.fetch(1, ref, server)
    expected_s = ref.size_bytes / rate
    assert 0.8 * expected_s < took_s < 1.5 * expected_s + 1
    client.store.forget(ref.digest)
    limited.network.set_limits(MIN_BYTES_PER_S, MIN_BYTES_PER_S)
    fetch = asyncio.create_task(client.fetch(2, ref, server))
    counted = limited.network.bytes_by_peer
    before = sum(map(sum, counted().values()))
    while sum(map(sum, counted().values())) == before:  # noqa: ASYNC110 - nothing tells of a byte
        await asyncio.sleep(0.01)
    limited.network.set_limits(0, 0)
    assert await fetch < 10, "at the old limit it would take half a minute"
    assert client.all(Fetched, FetchFailed) == [Fetched(1), Fetched(2)]


async def test_who_asks_so_slowly_that_the_server_ends_the_stream_opens_another(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_transfer, "STALL_TIMEOUT_S", 0.5)
    client, (server,), ref = await servers(make_peer, 1, SMALL, up=0)
    client.network.set_limits(0, 2_000_000)
    opened: list[PeerId] = []
    open_stream = client.network.open_fetch_stream

    async def count_and_open(peer: PeerId) -> INetStream:
        opened.append(peer)
        return await open_stream(peer)

    monkeypatch.setattr(client.network, "open_fetch_stream", count_and_open)
    await client.fetch(1, ref, server)
    assert client.all(Fetched, FetchFailed) == [Fetched(1)]
    assert client.store.path(ref).read_bytes() == SMALL
    assert len(opened) > 1, "the server never ended a stream: the test shows nothing"


async def test_messages_are_not_held_up_by_a_limit(make_peer: MakePeer) -> None:
    client, (server,), ref = await servers(make_peer, 1, SMALL, up=MIN_BYTES_PER_S)
    client.network.fetch(1, server.me, ref)
    began_s = time.perf_counter()
    for number in range(200):
        server.network.send(client.me, Heartbeat(number, True))
    await client.until(lambda: len(client.all(Received)) == 200)
    assert time.perf_counter() - began_s < 2
    assert not client.all(Fetched, FetchFailed)


@pytest.mark.parametrize("limits", [(1, 0), (0, MIN_BYTES_PER_S - 1)])
async def test_a_limit_that_no_peer_would_wait_for_is_refused(
    make_peer: MakePeer, limits: tuple[int, int]
) -> None:
    peer = await make_peer()
    with pytest.raises(ConfigError, match=r"network\.(up|down)_bytes_per_s.*too few"):
        peer.network.set_limits(*limits)


async def test_bytes_are_counted_by_peer_and_forgotten_with_the_link(make_peer: MakePeer) -> None:
    client, (a, b), ref = await servers(make_peer, 2, SMALL, up=0)
    await client.fetch(1, ref, a)
    b.network.send(client.me, Heartbeat(1, True))
    await client.until(lambda: bool(client.all(Received)))
    counted = client.network.bytes_by_peer()
    assert len(SMALL) < counted[a.me][1] < len(SMALL) + 10_000
    assert 0 < counted[a.me][0] < 10_000, "the requests"
    assert (counted[b.me][0], 0 < counted[b.me][1] < 100) == (0, True)
    assert a.network.bytes_by_peer()[client.me][0] == counted[a.me][1]
    assert client.network.bytes_received == sum(received for _, received in counted.values())
    client.network.disconnect(a.me, Reason.LEAVING)
    await client.until(lambda: bool(client.all(LinkDown)))
    assert set(client.network.bytes_by_peer()) == {b.me}


async def test_the_way_there_and_back_is_measured(make_peer: MakePeer) -> None:
    client, (a,), _ = await servers(make_peer, 1, SMALL)
    async with asyncio.timeout(10):
        while not client.network.round_trips_s():  # noqa: ASYNC110 - nothing tells of a ping
            await asyncio.sleep(0.01)
    assert 0 < client.network.round_trips_s()[a.me] < 1


# --- private networks -----------------------------------------------------------------------------------
KEY, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4


async def test_nodes_with_the_same_key_link_and_exchange(make_peer: MakePeer) -> None:
    a, b = await make_peer(KEY), await make_peer(KEY)
    await link(a, b)
    ref = b.store.save(SMALL, 1, 10)
    await a.fetch(1, ref, b)
    assert a.store.path(ref).read_bytes() == SMALL


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, OTHER), (KEY, None), (None, KEY)])
async def test_nodes_with_another_key_or_none_cannot_link(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch, ours: str | None, theirs: str | None
) -> None:
    monkeypatch.setattr(libp2p_network, "DIAL_TIMEOUT_S", 1.0)  # neither side can read what the other says
    a, b = await make_peer(ours), await make_peer(theirs)
    a.network.dial(b.address)
    await a.until(lambda: bool(a.heard))
    assert [type(event) for event in a.heard] == [DialFailed]
    assert not b.all(LinkUp)


@pytest.mark.parametrize("psk", ["", "secret", KEY[:-1], KEY[:-1] + "g"])
def test_a_key_that_is_none_is_a_config_error(tmp_path: Path, psk: str) -> None:
    with pytest.raises(ConfigError, match=r"network\.psk"):
        Peer(tmp_path / "peer", psk)
