"""Contents between real peers: from several at once, beside models, past liars, and on after a kill."""

import asyncio
import os
import random
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from node import libp2p_transfer
from node.config import ContentConfig
from node.content_blobs import ContentBlob
from node.content_store import ContentStore, Holdings
from node.ports import NetworkEvent
from node.rate_limit import MIN_BYTES_PER_S
from node.store import BlobStore
from protocols.blob import hash_blob
from protocols.entries import Kind
from protocols.events import Fetched, FetchFailed, Rejected
from protocols.vocabulary import CHUNK_BYTES, HOSTILE, ContentRef, ModelRef, PeerId, Reason
from tests.integration.network_peer import NetworkPeer, link, network_peers

DATA = random.Random(7).randbytes(12 * CHUNK_BYTES + 7)
REF = ContentRef(hash_blob(DATA)[0], len(DATA))


class Peer(NetworkPeer):
    """One node's network and stores, and what it heard."""

    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.models = BlobStore(home, lambda path: None)
        self.contents = ContentStore(home, ContentConfig(min_free_bytes=0))
        self.strangers: set[PeerId] = set()
        """Linked, and without a hello that lets them in."""
        super().__init__(
            Holdings(self.models, self.contents), has_greeted=lambda peer: peer not in self.strangers
        )

    async def stop(self) -> None:
        await super().stop()
        self.contents.close()

    async def fetch(self, token: int, ref: ModelRef | ContentRef, *sources: "Peer") -> NetworkEvent:
        """The answer, from the first source and the others."""
        self.network.fetch(token, sources[0].me, ref, tuple(source.me for source in sources[1:]))
        return await self.answer(token)

    async def answer(self, token: int) -> NetworkEvent:
        def found() -> list[NetworkEvent]:
            return [event for event in self.all(Fetched, FetchFailed) if event.token == token]  # type: ignore[union-attr]

        await self.until(lambda: bool(found()))
        (event,) = found()
        return event

    def share(self, data: bytes = DATA, name: str = "file") -> Path:
        path = self.home.parent / f"{self.home.name}-own" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        self.contents.share_file(path)
        return path

    async def get(self, ref: ContentRef, kind: Kind, title: str, *sources: "Peer") -> Path:
        """As the service does it: whatever is missing, until nothing is."""
        self.contents.want(ref, kind, title)
        token = 100
        while missing := self.contents.missing(ref.digest):
            for part in missing:
                token += 1
                assert isinstance(await self.fetch(token, part, *sources), Fetched)
        return self.contents.place(ref.digest, title)


MakePeer = Callable[[], Awaitable[Peer]]


@pytest.fixture
async def make_peer(tmp_path: Path) -> AsyncIterator[MakePeer]:
    async with network_peers(lambda number: Peer(tmp_path / str(number))) as make:
        yield make


async def linked(make_peer: MakePeer, count: int) -> tuple[Peer, list[Peer]]:
    client, *others = [await make_peer() for _ in range(count + 1)]
    await link(client, *others)
    return client, others


def forge(path: Path, at: int) -> None:
    """Change bytes so that only their hash tells."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"forged")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def unchecked(monkeypatch: pytest.MonkeyPatch, *liars: Peer) -> None:
    """These send what lies on their disk, right or not."""
    read = ContentBlob.read

    def lie(blob: ContentBlob, index: int) -> bytes:
        if not any(blob.path.parent.name == f"{liar.home.name}-own" for liar in liars):
            return read(blob, index)
        return blob.path.read_bytes()[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]

    monkeypatch.setattr(ContentBlob, "read", lie)


async def test_a_content_is_pulled_from_several_and_served_on(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, (a, b, c) = await linked(make_peer, 3)
    served: list[Path] = []
    read = ContentBlob.read

    def tell(blob: ContentBlob, index: int) -> bytes:
        served.append(blob.path)
        return read(blob, index)

    paths = {peer.share() for peer in (a, b, c)}
    for peer in (a, b, c):
        peer.network.set_limits(8_000_000, 0)
    monkeypatch.setattr(ContentBlob, "read", tell)
    path = await client.get(REF, Kind.FILE, "film.mkv", a, b, c)
    assert path.read_bytes() == DATA
    assert set(served) == paths
    assert len(served) <= 13 + 6, "hardly a chunk comes twice"
    d = await make_peer()
    await link(d, client)
    assert (await d.get(REF, Kind.FILE, "film.mkv", client)).read_bytes() == DATA


async def test_a_folder_comes_with_all_its_files(make_peer: MakePeer) -> None:
    client, (a, b) = await linked(make_peer, 2)
    files = {"album/1.ogg": DATA, "album/2.ogg": b"two", "cover.jpg": b"jpg"}
    for peer in (a, b):
        for name, data in files.items():
            path = peer.home.parent / f"{peer.home.name}-own" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        shared = peer.contents.share_folder(peer.home.parent / f"{peer.home.name}-own")
    path = await client.get(shared.ref, Kind.FOLDER, "Music", a, b)
    assert path.name == "Music"
    assert {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()} == files


async def test_a_liar_among_several_is_named_and_the_fetch_goes_on(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, (a, liar, c) = await linked(make_peer, 3)
    for peer in (a, c):
        peer.share()
        peer.network.set_limits(8_000_000, 0)
    path = liar.share()
    for index in range(13):
        forge(path, index * CHUNK_BYTES)
    unchecked(monkeypatch, liar)
    assert (await client.get(REF, Kind.FILE, "film", a, liar, c)).read_bytes() == DATA
    assert [(e.peer, e.reason) for e in client.all(Rejected)] == [(liar.me, Reason.WRONG_HASH)]  # type: ignore[union-attr]


async def test_who_shares_a_file_that_changed_lies_to_nobody(make_peer: MakePeer) -> None:
    client, (changed, b) = await linked(make_peer, 2)
    path = changed.share()
    b.share()
    forge(path, 5 * CHUNK_BYTES)
    client.contents.want(REF, Kind.FILE, "film")
    failure = await client.fetch(1, REF, changed)
    assert isinstance(failure, FetchFailed)
    assert failure.reason not in HOSTILE
    assert not client.all(Rejected)
    held, _ = client.contents.progress(REF.digest) or (0, 0)
    assert held > 0, "what was right until then stays"
    gone = await client.fetch(2, REF, changed)
    assert isinstance(gone, FetchFailed)
    assert gone.reason is Reason.GONE
    assert isinstance(await client.fetch(3, REF, b), Fetched)


async def test_an_entry_that_lies_about_the_size_costs_no_honest_peer_its_name(make_peer: MakePeer) -> None:
    client, (a, b) = await linked(make_peer, 2)
    a.share()
    b.share()
    lie = ContentRef(REF.digest, 1000)
    client.contents.want(lie, Kind.FILE, "small")
    failure = await client.fetch(1, lie, a, b)
    assert isinstance(failure, FetchFailed)
    assert failure.reason not in HOSTILE
    assert f"has {len(DATA)} bytes and not 1000" in failure.detail
    assert not client.all(Rejected)
    assert list((client.home / "content").iterdir()) == []


async def test_what_is_not_wanted_or_has_no_room_is_not_fetched(make_peer: MakePeer) -> None:
    client, (a,) = await linked(make_peer, 1)
    a.share()
    failure = await client.fetch(1, REF, a)
    assert isinstance(failure, FetchFailed)
    assert (failure.reason, "not wanted" in failure.detail) == (Reason.BUSY, True)
    client.contents.want(REF, Kind.FILE, "film")
    client.contents._settings = ContentConfig(min_free_bytes=2**60)
    failure = await client.fetch(2, REF, a)
    assert isinstance(failure, FetchFailed)
    assert (failure.reason, "min_free_bytes" in failure.detail) == (Reason.BUSY, True)
    assert list((client.home / "content").iterdir()) == []


async def test_whoever_has_not_greeted_is_served_nothing(make_peer: MakePeer) -> None:
    client, (a,) = await linked(make_peer, 1)
    a.share()
    client.contents.want(REF, Kind.FILE, "film")
    a.strangers.add(client.me)
    failure = await client.fetch(1, REF, a)
    assert isinstance(failure, FetchFailed)
    assert failure.reason is Reason.GONE
    a.strangers.clear()
    assert await client.fetch(2, REF, a) == Fetched(2)


async def test_a_fetch_of_what_is_given_up_ends(make_peer: MakePeer) -> None:
    client, (a,) = await linked(make_peer, 1)
    a.share()
    a.network.set_limits(1_000_000, 0)
    client.contents.want(REF, Kind.FILE, "film")
    client.network.fetch(1, a.me, REF)
    async with asyncio.timeout(30):
        while (client.contents.progress(REF.digest) or (0, 0))[0] == 0:  # noqa: ASYNC110 - nothing tells of a chunk
            await asyncio.sleep(0.01)
    client.contents.unwant(REF.digest)
    failure = await client.answer(1)
    assert isinstance(failure, FetchFailed)
    assert "not wanted" in failure.detail
    assert list((client.home / "content").iterdir()) == []


async def test_models_and_contents_travel_side_by_side(
    make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes contents, slowly and as many as may be, keeps no place that a model needs."""
    monkeypatch.setattr(libp2p_transfer, "MAX_SERVES", 2)
    client, (server,) = await linked(make_peer, 1)
    model = server.models.save(DATA[:1000], 1, 10)
    server.network.set_limits(MIN_BYTES_PER_S * 8, 0)
    for number in range(3):
        data = bytes([number]) * CHUNK_BYTES * 2
        server.share(data, str(number))
        ref = ContentRef(hash_blob(data)[0], len(data))
        client.contents.want(ref, Kind.FILE, str(number))
        client.network.fetch(number, server.me, ref)
    await client.until(lambda: bool(client.all(Fetched, FetchFailed)))
    (busy,) = client.all(Fetched, FetchFailed)
    assert isinstance(busy, FetchFailed)
    assert busy.reason is Reason.BUSY
    assert isinstance(await client.fetch(10, model, server), Fetched)
    assert client.models.path(model).read_bytes() == DATA[:1000]
    assert len(client.all(Fetched, FetchFailed)) == 2, "the two contents are still on their way"


async def test_a_model_does_not_wait_until_a_content_is_here(make_peer: MakePeer) -> None:
    client, others = await linked(make_peer, 2)
    for other in others:
        other.share()
    model = others[0].models.save(DATA[:50_000], 1, 10)
    client.network.set_limits(0, 2 * 32 * 1024)  # two streams at once, and the content would take a minute
    client.contents.want(REF, Kind.FILE, "film")
    client.network.fetch(1, others[0].me, REF, (others[1].me,))
    async with asyncio.timeout(30):
        while client.network.bytes_received < 30_000:  # noqa: ASYNC110 - nothing tells of bytes
            await asyncio.sleep(0.01)
    assert await client.fetch(2, model, others[0]) == Fetched(2)
    assert client.all(Fetched, FetchFailed) == [Fetched(2)]


async def test_a_killed_process_goes_on_where_it_was(make_peer: MakePeer, tmp_path: Path) -> None:
    """SIGKILL in the middle of a fetch; the next process fetches only what is missing."""
    server = await make_peer()
    server.share()
    server.network.set_limits(2_000_000, 0)
    home = tmp_path / "killed"
    code = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from node.config import ContentConfig
        from node.content_store import ContentStore, Holdings
        from node.libp2p_network import Libp2pNetwork
        from node.store import BlobStore
        from protocols.entries import Kind
        from protocols.events import LinkUp
        from protocols.vocabulary import ContentRef

        home, address, digest, size = Path(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3]), int(sys.argv[4])

        async def main():
            ref = ContentRef(digest, size)
            store = ContentStore(home, ContentConfig(min_free_bytes=0))
            store.want(ref, Kind.FILE, "film.mkv")
            up = asyncio.Event()
            network = Libp2pNetwork(
                Ed25519PrivateKey.generate(), ["/ip4/127.0.0.1/tcp/0"],
                Holdings(BlobStore(home, lambda path: None), store),
                lambda event: up.set() if isinstance(event, LinkUp) else None,
            )
            await network.start()
            network.dial(address)
            await up.wait()
            network.fetch(1, address.rpartition("/")[2], ref)
            while store.progress(digest)[0] < 4 * 2**20:
                await asyncio.sleep(0.01)
            print("half", flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    home.mkdir()
    run = [sys.executable, "-c", code, str(home), server.address, REF.digest.hex(), str(REF.size_bytes)]
    process = await asyncio.create_subprocess_exec(*run, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"half\n"
    finally:
        process.kill()
        await process.communicate()
    after = Peer(home)
    await after.network.start()
    try:
        assert after.contents.wanted() == ((REF, Kind.FILE, "film.mkv"),)
        assert (after.contents.progress(REF.digest) or (0, 0))[0] >= 4 * CHUNK_BYTES
        server.network.set_limits(0, 0)
        await link(after, server)
        path = await after.get(REF, Kind.FILE, "film.mkv", server)
        assert path.read_bytes() == DATA
        assert after.network.bytes_received < len(DATA) - 3 * CHUNK_BYTES
    finally:
        await after.network.stop()
        after.contents.close()


async def test_names_of_a_stranger_lead_nowhere(make_peer: MakePeer) -> None:
    """A list that its sharer's own code would never have made."""
    client, (evil,) = await linked(make_peer, 1)
    listed = msgspec.msgpack.encode([[["..", "..", "evil"], 3, hash_blob(b"bad")[0]]])
    evil.share(listed)
    ref = ContentRef(hash_blob(listed)[0], len(listed))
    client.contents.want(ref, Kind.FOLDER, "../../album")
    assert isinstance(await client.fetch(1, ref, evil), Fetched)
    with pytest.raises(Exception, match="wrong_format"):
        client.contents.missing(ref.digest)
    client.contents.unwant(ref.digest)
    assert not list(client.home.parent.rglob("evil"))
    assert not client.all(Rejected), "whoever serves bytes by their name need not understand them"
