"""What only the real adapter does: resuming, its own limits, its life and its end."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from node.libp2p_transfer import MAX_SERVES_PER_PEER
from node.store import Blob, BlobStore
from protocols.errors import ConfigError, LocalError
from protocols.events import Fetched, FetchFailed, LinkDown, LinkUp, Received
from protocols.messages import Heartbeat
from protocols.vocabulary import CHUNK_BYTES, Reason
from tests.integration.network_peer import NetworkPeer, link, network_peers


class Peer(NetworkPeer):
    """One node's network and store, and what it heard."""

    patience_s = 30.0

    def __init__(self, home: Path, listen: str = "/ip4/127.0.0.1/tcp/0") -> None:
        home.mkdir()
        self.store = BlobStore(home, lambda path: None)
        super().__init__(self.store, listen)


MakePeer = Callable[[], Awaitable[Peer]]


@pytest.fixture
async def make_peer(tmp_path: Path) -> AsyncIterator[MakePeer]:
    async with network_peers(lambda number: Peer(tmp_path / str(number))) as make:
        yield make


async def linked(make_peer: MakePeer) -> tuple[Peer, Peer]:
    a, b = await make_peer(), await make_peer()
    await link(a, b)
    return a, b


async def test_a_fetch_that_breaks_off_goes_on_where_it_stopped(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await linked(make_peer)
    data = random.Random(1).randbytes(5 * CHUNK_BYTES + 17)
    ref = b.store.save(data, 1, 10)
    served: list[int] = []
    broken = [True]
    read = Blob.read

    def break_at_three(blob: Blob, index: int) -> bytes:
        if broken[0] and index == 3:
            raise OSError("the disk is gone")
        served.append(index)
        return read(blob, index)

    monkeypatch.setattr(Blob, "read", break_at_three)
    a.network.fetch(1, b.network.me, ref)
    await a.until(lambda: bool(a.all(FetchFailed)))
    (failure,) = a.all(FetchFailed)
    assert isinstance(failure, FetchFailed)
    assert failure.reason is Reason.LINK
    assert a.store.get(ref.digest) is None
    missing = a.store.incoming(ref).missing
    assert missing in ([1, 2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5])
    broken[0] = False
    served.clear()
    a.network.fetch(2, b.network.me, ref)
    await a.until(lambda: bool(a.all(Fetched)))
    assert served == missing
    assert a.store.path(ref).read_bytes() == data


async def test_more_fetches_than_the_server_allows_are_told_busy(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await linked(make_peer)
    refs = [b.store.save(bytes([i]) * 3_000_000, 1, 1) for i in range(MAX_SERVES_PER_PEER + 4)]
    for token, ref in enumerate(refs):
        a.network.fetch(token, b.network.me, ref)
    await a.until(lambda: len(a.all(Fetched)) + len(a.all(FetchFailed)) == len(refs))
    assert len(a.all(Fetched)) >= MAX_SERVES_PER_PEER
    assert {event.reason for event in a.all(FetchFailed)} <= {Reason.BUSY}  # type: ignore[union-attr]


async def test_a_taken_port_is_told_at_the_start(make_peer: MakePeer, tmp_path: Path) -> None:
    a = await make_peer()
    port = a.address.split("/tcp/")[1].split("/")[0]
    second = Peer(tmp_path / "second", f"/ip4/127.0.0.1/tcp/{port}")
    with pytest.raises(LocalError, match=r"cannot listen on .*network.listen"):
        await second.network.start()
    await second.network.stop()


def test_a_listen_address_that_is_none_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"network\.listen"):
        Peer(tmp_path / "p", "not an address")


async def test_messages_of_one_tick_share_their_writes(make_peer: MakePeer) -> None:
    a, b = await linked(make_peer)
    for number in range(200):
        a.network.send(b.network.me, Heartbeat(number, True))
    await b.until(lambda: len(b.all(Received)) == 200)
    assert [event.message.round for event in b.all(Received)] == list(range(200))  # type: ignore[union-attr]


async def test_a_message_to_nobody_is_dropped_and_harms_nothing(make_peer: MakePeer) -> None:
    a, b = await linked(make_peer)
    await b.network.stop()
    await a.until(lambda: bool(a.all(LinkDown)))
    a.network.send(b.network.me, Heartbeat(1, True))
    a.network.disconnect(b.network.me, Reason.SILENT)
    c = await make_peer()
    a.network.dial(c.address)
    await a.until(lambda: len(a.all(LinkUp)) == 2)
