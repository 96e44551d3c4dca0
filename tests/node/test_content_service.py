"""What a node does with content, on a real library and a real store; the driver is a fake that signs with a real feed."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node import content_gets
from node.config import RANKERS, ContentConfig
from node.content import ContentService
from node.content_api import OpenBody, ShareBody
from node.content_entries import check_entry, file_entry, name_of
from node.content_gets import WINDOW
from node.content_sharing import ModelSource
from node.content_store import ContentStore
from node.folders import Folder, FolderFile
from node.library import Library
from node.signatures import Ed25519Signatures, peer_of_author
from node.store import BlobStore, hash_pieces
from protocols.blob import num_chunks
from protocols.entries import Batch, Begun, Click, Cut, Entry, Feed, Head, Kind, Shared, Want, Withdrawn
from protocols.errors import ConfigError, LocalError, PeerError
from protocols.events import (
    BeginAnew,
    ContentHeld,
    ContentMissing,
    Drop,
    Event,
    Get,
    Hold,
    KeepEntries,
    LinkChanged,
    Publish,
    Recall,
)
from protocols.feeds import FeedLimits, FeedSet
from protocols.messages import FetchHeader
from protocols.terms import hashed, item_of_uri
from protocols.vocabulary import CHUNK_BYTES, ContentRef, Digest, PeerId, Reason, one_line

NETWORK = "net"
DAY = 20_000
NOW_S = DAY * 86_400.0
LIMITS = FeedLimits(100, 10_000, 1000, 180)


class Author:
    """Somebody with feeds of its own."""

    def __init__(self, seed: int = 1) -> None:
        self._signatures = Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))
        self.key = self._signatures.author
        self.peer = peer_of_author(self.key)
        self.feeds = {feed: FeedSet(NETWORK, feed, self._signatures, LIMITS) for feed in Feed}

    def says(self, feed: Feed, *entries: Entry) -> KeepEntries:
        return KeepEntries(feed, tuple(self.feeds[feed].publish(entries, NOW_S)))


class FakeDriver:
    """Signs and keeps as the core and the disk's thread would; what else it is told, the test answers."""

    def __init__(self, author: Author) -> None:
        self.author = author
        self.service: ContentService | None = None
        self.disk = ThreadPoolExecutor(1)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.told: list[Event] = []

    def handle(self, event: Event) -> None:
        assert self.service is not None
        self.told.append(event)
        match event:
            case Publish(feed, entries):
                self.disk.submit(self.keep, self.author.says(feed, *entries))
            case BeginAnew(feed):
                batch, cut = self.author.feeds[feed].begin_anew(DAY, NOW_S)
                self.disk.submit(self.keep, KeepEntries(feed, (batch,), (cut,)))
            case _:
                self.events.put_nowait(event)

    def keep(self, effect: KeepEntries) -> None:
        """On the disk's thread. What was not kept has not happened, so that the next goes on where the library stands."""
        assert self.service is not None
        try:
            self.service.keep(effect)
        except LocalError as error:
            self.service._loop.call_soon_threadsafe(self.load, self.service.heads())
            self.service.refused(effect, str(error))

    def load(self, heads: Sequence[tuple[Feed, Sequence[Head]]]) -> None:
        for feed, each in heads:
            self.author.feeds[feed].load(each)

    async def next(self, kind: type[Any]) -> Any:
        """The next event of this kind; none of another may come before it."""
        event = await self.event()
        assert isinstance(event, kind), event
        return event

    async def event(self) -> Event:
        async with asyncio.timeout(10):
            return await self.events.get()

    def published(self, feed: Feed) -> list[Entry]:
        said = [event for event in self.told if isinstance(event, Publish) and event.feed is feed]
        return [entry for event in said for entry in event.entries]


class Log:
    """A telemetry that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    warning = info

    def refusal(self, peer: PeerId, reason: Reason, detail: str) -> None:
        self.lines.append(("refused", {"peer": peer, "reason": reason, "detail": detail}))


class Node:
    """A service with all that it stands on, over one home."""

    def __init__(self, home: Path, learns: bool = False, **settings: Any) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.me = Author()
        self.log = Log()
        self.library = Library(home, self.me.key, NETWORK)
        config = ContentConfig(min_free_bytes=0, **settings)
        self.store = ContentStore(home, config, lambda digest, why: self.service.on_changed(digest, why))
        self.driver = FakeDriver(self.me)
        self.now_s = NOW_S
        self.service = ContentService(
            config,
            NETWORK,
            self.me.key,
            self.library,
            self.store,
            lambda: self.now_s,
            self.log,  # type: ignore[arg-type]
            ModelSource(home, "/home/me/digits", "gossip", "ab" * 32, NETWORK, rounds) if learns else None,
        )
        self.driver.service = self.service
        self.service.attach(self.driver)

    async def hear(self, effect: KeepEntries) -> None:
        await asyncio.to_thread(self.service.keep, effect)

    async def close(self) -> None:
        await self.service.stop()
        self.driver.disk.shutdown()
        self.library.close()
        self.store.close()

    async def arrives(self, get: Get, data: bytes) -> None:
        """A peer has sent what was asked for."""
        digest, size_bytes, hashes = hash_pieces([data])
        assert (get.ref.digest, get.ref.size_bytes) == (digest, size_bytes)
        incoming = self.store.incoming(get.ref)
        incoming.prove(FetchHeader(size_bytes, hashes))
        for index in range(num_chunks(size_bytes)):
            incoming.write(index, data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        self.store.admit(incoming)
        self.service.on_record(ContentHeld(digest, (PeerId("a peer"),)))

    async def proves(self, get: Get, data: bytes) -> None:
        """The same of what was asked for with whatever size: a core asks again where the bytes prove another."""
        _, size_bytes, hashes = hash_pieces([data])
        ref = ContentRef(get.ref.digest, size_bytes)
        if get.ref != ref:
            with pytest.raises(PeerError):
                self.store.incoming(get.ref).prove(FetchHeader(size_bytes, hashes))
            assert self.store.incoming(get.ref).ref == ref
        await self.arrives(Get(ref, (), ()), data)

    async def row(self, item: bytes) -> dict[str, Any]:
        """How getting an item stands."""
        rows = (await self.service.gets())["gets"]
        return next(row for row in rows if row["item"] == item.hex())


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make_node(name: str = "home", **settings: Any) -> Node:
        nodes.append(Node(tmp_path / name, **settings))
        return nodes[-1]

    yield make_node
    for node in nodes:
        await node.close()


@pytest.fixture
async def node(make: Callable[..., Node]) -> Node:
    return make()


def entry_for(data: bytes, title: str = "their file", kind: Kind = Kind.FILE, day: int = DAY) -> Shared:
    digest, size_bytes, _ = hash_pieces([data])
    return Shared(digest, day, kind, title, "", ("tag",), "", size_bytes, "", ())


def body(item: bytes, *terms: str, rank: int = 1, fetch: bool = True) -> OpenBody:
    return OpenBody(item.hex(), terms or ("jazz",), rank, fetch)


# --- sharing --------------------------------------------------------------------------------------------
async def test_a_shared_file_is_said_kept_and_served(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "Notes.txt"
    path.write_text("some notes")
    found = await node.service.share(ShareBody(str(path), tags=(" Jazz ", "JAZZ", "", "tips"), creator="Me"))
    digest, size_bytes, _ = hash_pieces([b"some notes"])
    entry = Shared(
        digest, DAY, Kind.FILE, "Notes.txt", "Me", ("jazz", "tips"), "text/plain", size_bytes, "", ()
    )
    assert node.driver.published(Feed.CATALOGUE) == [entry]
    assert node.library.entry(digest) == entry, "what was answered is on the disk"
    assert await node.driver.next(Hold) == Hold((digest,))
    assert node.store.get(digest) is not None
    assert (found["item"], found["title"], found["path"]) == (digest.hex(), "Notes.txt", str(path))


async def test_a_shared_folder_serves_its_list_and_files(node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "songs"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name)
    (folder / "empty").touch()
    found = await node.service.share(ShareBody(str(folder), title="My songs"))
    held = await node.driver.next(Hold)
    assert len(held.digests) == 3
    assert (found["kind"], found["skipped"]) == ("folder", 1)
    assert found["details"] == {"files": "2", "total_bytes": "2", "name": "songs"}
    assert found["size_bytes"] == node.library.entry(bytes.fromhex(found["item"])).size_bytes + 2


async def test_a_title_of_ones_own_keeps_the_files_name_for_whoever_gets_it(
    node: Node, tmp_path: Path
) -> None:
    path = tmp_path / "report.pdf"
    path.write_text("x")
    await node.service.share(ShareBody(str(path), title="Annual report"))
    (entry,) = node.driver.published(Feed.CATALOGUE)
    assert isinstance(entry, Shared)
    assert (entry.title, name_of(entry), entry.media_type) == (
        "Annual report",
        "report.pdf",
        "application/pdf",
    )


async def test_a_link_is_an_entry_alone(node: Node) -> None:
    uri = "https://example.org/x?y=1"
    found = await node.service.share(ShareBody(uri=uri, title="A page"))
    assert node.driver.published(Feed.CATALOGUE) == [
        Shared(item_of_uri(uri), DAY, Kind.LINK, "A page", "", (), "", 0, uri, ())
    ]
    assert found["uri"] == uri
    assert node.driver.events.empty(), "there is nothing to serve"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"title": "x" * 201}, "title"),
        ({"title": " "}, "title"),
        ({"title": "two\nlines"}, "title"),
        ({"title": "\x1b[31m"}, "title"),
        ({"title": "two\u2028lines"}, "title"),
        ({"title": "\u202etxt.exe"}, "title"),
        ({"title": "half a character \ud800"}, "title"),
        ({"creator": "x" * 101}, "creator"),
        ({"creator": "a\tb"}, "creator"),
        ({"tags": ("x" * 41,)}, "tag"),
        ({"tags": ("a\x00b",)}, "tag"),
        ({"tags": tuple(map(str, range(17)))}, "tags"),
    ],
)
async def test_what_no_peer_would_accept_is_said_before_anything_is_read(
    node: Node, tmp_path: Path, wrong: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        await node.service.share(ShareBody(str(tmp_path / "is not there"), **wrong))
    assert caught.value.path == field
    assert node.driver.told == []


@pytest.mark.parametrize(
    "uri", ["example.org", "//x", "https://exa mple.org", "https://bücher.example", "https://x/" + "y" * 1024]
)
async def test_what_is_no_uri_is_refused(node: Node, uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await node.service.share(ShareBody(uri=uri, title="t"))
    assert caught.value.path == "uri"


@pytest.mark.parametrize(
    "given",
    [ShareBody(), ShareBody("/x", uri="a:b"), ShareBody("/x", model=True), ShareBody("relative/path")],
)
async def test_one_thing_at_a_time_and_by_its_whole_path(node: Node, given: ShareBody) -> None:
    with pytest.raises(ConfigError):
        await node.service.share(given)


async def test_what_cannot_be_shared_says_why(node: Node, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "nothing", node.home / "library.db"):
        with pytest.raises(LocalError, match=str(path)):
            await node.service.share(ShareBody(str(path)))
    assert node.driver.told == []
    assert (await node.service.gets())["sharing"] == []


@pytest.mark.parametrize(
    "name", ["\u202etxt.exe", "a\nb", "a\x1b[2J", "x\u2029", "\udcff.bin", "x" * 250, " ", "é"]
)
def test_any_name_of_a_file_makes_a_title(name: str) -> None:
    check_entry(file_entry(ContentRef(bytes(32), 1), Path("/x") / name, DAY))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("x" * 250 + ".tar.gz", "x" * 197 + ".gz"),
        ("x" * 250, "x" * 200),
        ("." + "x" * 250, "." + "x" * 199),
        ("x." + "y" * 250, "x." + "y" * 198),
    ],
)
def test_a_long_name_is_cut_before_its_suffix(name: str, title: str) -> None:
    assert file_entry(ContentRef(bytes(32), 1), Path("/x") / name, DAY).title == title


def test_every_character_on_a_line_is_one_that_peers_accept() -> None:
    """What is checked here and what `protocols.entries` refuses must not drift apart."""
    for first in range(0, 0x110000, 128):
        title = one_line("a" + "".join(map(chr, range(first, first + 128))))
        check = Shared(bytes(32), DAY, Kind.FILE, title, "", (), "", 1, "", ())
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(check), type=Shared) == check, hex(first)


def test_the_longest_entry_there_can_be_passes() -> None:
    details = tuple((f"{index:02}" + "k" * 30, "v" * 240) for index in range(16))
    tags = tuple(f"{index:02}" + "t" * 38 for index in range(16))
    check_entry(
        Shared(bytes(32), DAY, Kind.FILE, "t" * 200, "c" * 100, tags, "m" * 100, 1, "u" * 1024, details)
    )
    wide = tuple((f"{index:02}" + "k" * 30, "\U0001f600" * 240) for index in range(16))
    with pytest.raises(ConfigError, match="entry: comes to"):
        check_entry(Shared(bytes(32), DAY, Kind.FILE, "t", "", (), "", 1, "", wide))


async def test_a_disk_that_refuses_is_told_to_whoever_shares(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(effect: KeepEntries) -> None:
        raise LocalError("the disk is full")

    monkeypatch.setattr(node.library, "keep", refuse)
    with pytest.raises(LocalError, match="could not be kept: the disk is full"):
        await node.service.share(ShareBody(uri="a:b", title="t"))


async def test_what_the_disk_has_refused_once_costs_nothing_else(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(effect: KeepEntries) -> None:
        raise LocalError("the disk is full")

    async def share(title: str) -> None:
        await node.service.share(ShareBody(uri=f"a:{title}", title=title))

    peer = Author(9).feeds[Feed.CATALOGUE]
    for title in ("one", "two"):
        await share(title)
    peer.take(kept(node), NOW_S)
    with monkeypatch.context() as patch:
        patch.setattr(node.library, "keep", refuse)
        with pytest.raises(LocalError, match="the disk is full"):
            await share("three")
    await share("four")
    assert peer.take(kept(node), NOW_S).batch is not None
    own = [node.library.entry(item) for item in node.library.items(node.me.key)]
    assert [entry.title for entry in own if entry is not None] == ["four", "two", "one"]


def kept(node: Node) -> Batch:
    """All that the node has said in its catalogue, as a peer gets it."""
    ((_, (head,)), _) = node.library.heads()
    (batch,) = node.service.recall(
        Recall(1, Feed.CATALOGUE, (Want(head.author, head.epoch, 0, 9),), 2**20)
    ).batches
    return batch


async def test_a_node_that_stops_hashes_no_further(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(3 * CHUNK_BYTES))
    await node.service.stop()
    with pytest.raises(LocalError, match="the node stops"):
        await node.service.share(ShareBody(str(path)))


async def test_however_much_is_hashed_everything_else_is_answered(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, store = threading.Event(), node.store
    share_file, path = store.share_file, tmp_path / "large"
    path.write_bytes(b"large")

    def share_slowly(path: Path, told: Callable[[int, int], None]) -> ContentRef:
        assert goes_on.wait(30)
        return share_file(path, told)

    monkeypatch.setattr(store, "share_file", share_slowly)
    shares = [asyncio.create_task(node.service.share(ShareBody(str(path)))) for _ in range(40)]
    async with asyncio.timeout(10):
        while len((await node.service.gets())["sharing"]) < len(shares):
            await node.service.counts()
    goes_on.set()
    await asyncio.gather(*shares)
    assert (await node.service.counts())["shared"] == 1


async def test_what_nobody_waits_for_is_neither_hashed_nor_shared(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, began, goes_on = tmp_path / "large", asyncio.Event(), threading.Event()
    path.write_bytes(bytes(3 * CHUNK_BYTES))
    share_file, ended = node.store.share_file, asyncio.Event()
    problems: list[Exception] = []

    def share_slowly(path: Path, told: Callable[[int, int], None]) -> ContentRef:
        def tell(done: int, total: int) -> None:
            node.service._loop.call_soon_threadsafe(began.set)
            assert goes_on.wait(10)
            told(done, total)

        try:
            return share_file(path, tell)
        except LocalError as error:
            problems.append(error)
            raise
        finally:
            node.service._loop.call_soon_threadsafe(ended.set)

    monkeypatch.setattr(node.store, "share_file", share_slowly)
    sharing = asyncio.create_task(node.service.share(ShareBody(str(path))))
    await began.wait()
    sharing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sharing
    goes_on.set()
    await ended.wait()
    assert [str(problem) for problem in problems] == ["nobody waits for it any more"]
    assert (node.driver.told, node.store.digests()) == ([], ())


# --- the model ------------------------------------------------------------------------------------------
def rounds(last: int) -> list[dict[str, Any]]:
    return [
        {"round": 6, "num_merged": 2, "metrics": {"accuracy": 0.75}},
        {"round": 7, "num_merged": 3, "metrics": {}},
        {"round": 8, "num_merged": 9, "metrics": {"accuracy": 0.1}},
    ]


async def test_the_newest_checkpoint_is_shared_with_what_is_known_of_it(make: Callable[..., Node]) -> None:
    node = make(learns=True)
    blobs = BlobStore(node.home, lambda path: None)
    before = blobs.keep(blobs.save(b"older weights", 6, 50))
    newest = blobs.keep(blobs.save(b"newer weights", 7, 60))
    found = await node.service.share(ShareBody(model=True, tags=("tiny",)))
    digest = hash_pieces([b"newer weights"])[0]
    assert (found["item"], found["kind"], found["title"]) == (
        digest.hex(),
        "model",
        "digits model, round 7",
    )
    assert found["tags"] == ["model", "digits", "tiny"]
    assert found["details"] == {
        "task": "digits",
        "round": "7",
        "protocol": "gossip",
        "schema": "ab" * 32,
        "network": NETWORK,
        "node": str(node.me.peer),
        "samples": "60",
        "metrics": "accuracy 0.75",
        "merged": "3 models of others in its last round",
        "parent": hash_pieces([b"older weights"])[0].hex(),
    }
    for path in (before, newest):
        path.unlink()
    blob = node.store.get(digest)
    assert blob is not None
    assert blob.read(0) == b"newer weights", "checkpoints go when newer ones come"


async def test_a_damaged_checkpoint_is_passed_over(make: Callable[..., Node]) -> None:
    node = make(learns=True)
    blobs = BlobStore(node.home, lambda path: None)
    blobs.keep(blobs.save(b"older weights", 6, 50))
    blobs.keep(blobs.save(b"newer weights", 7, 60)).write_bytes(b"damaged")
    found = await node.service.share(ShareBody(model=True))
    assert (found["details"]["round"], "parent" in found["details"]) == ("6", False)


async def test_without_a_model_it_says_so(node: Node, make: Callable[..., Node]) -> None:
    with pytest.raises(LocalError, match="does not learn"):
        await node.service.share(ShareBody(model=True))
    with pytest.raises(LocalError, match="finished a round"):
        await make("other", learns=True).service.share(ShareBody(model=True))


# --- unsharing ------------------------------------------------------------------------------------------
async def test_unsharing_withdraws_and_serves_no_more(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("x")
    item = bytes.fromhex((await node.service.share(ShareBody(str(path))))["item"])
    await node.driver.next(Hold)
    found = await node.service.unshare(item.hex()[:12].upper())
    assert found == {"item": item.hex(), "title": "x", "withdrawn": True}
    assert node.driver.published(Feed.CATALOGUE)[-1] == Withdrawn(item, DAY)
    assert await node.driver.next(Hold) == Hold((item,), held=False)
    assert node.library.entry(item) is None
    assert path.exists()


async def test_only_ones_own_can_be_unshared(node: Node) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    with pytest.raises(LocalError, match=r"no item is known .*covey library"):
        await node.service.unshare(theirs.item.hex())


# --- looking --------------------------------------------------------------------------------------------
async def test_the_library_says_who_shares_what_and_what_is_here(node: Node, tmp_path: Path) -> None:
    other = Author(2)
    theirs = entry_for(b"theirs")
    await node.hear(other.says(Feed.CATALOGUE, theirs))
    path = tmp_path / "mine"
    path.write_text("mine")
    mine = (await node.service.share(ShareBody(str(path))))["item"]
    data = await node.service.library(mine=False, limit=10)
    rows = {row["item"]: row for row in data["items"]}
    assert set(rows) == {theirs.item.hex(), mine}
    assert (rows[mine]["mine"], rows[mine]["sharers"]) == (True, [])
    assert (rows[mine]["state"], rows[mine]["path"]) == ("served", str(path))
    row = rows[theirs.item.hex()]
    assert (row["mine"], row["sharers"], row["state"]) == (False, [other.peer], "")
    assert (data["shared"], data["known"], data["clicks"], data["gets"]) == (1, 2, 0, [])
    own = await node.service.library(mine=True, limit=10)
    assert [row["item"] for row in own["items"]] == [mine]
    assert len((await node.service.library(mine=False, limit=1))["items"]) == 1


async def test_a_file_that_changes_is_not_served_and_shown_so(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("mine")
    item = bytes.fromhex((await node.service.share(ShareBody(str(path))))["item"])
    await node.driver.next(Hold)
    path.write_text("mine, changed")
    assert await asyncio.to_thread(node.store.get, item) is None
    assert await node.driver.next(Hold) == Hold((item,), held=False)
    (row,) = (await node.service.library(mine=True, limit=10))["items"]
    assert row["state"] == "changed"
    assert ("not served any more", item.hex()) in [(line, told.get("item")) for line, told in node.log.lines]


async def test_a_start_notices_what_has_changed_meanwhile(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("mine")
    await node.service.share(ShareBody(str(path)))
    await node.driver.next(Hold)
    path.unlink()
    await node.service.start()
    (row,) = (await node.service.library(mine=True, limit=10))["items"]
    assert row["state"] == "changed"
    assert await node.driver.next(Hold) == Hold((bytes.fromhex(row["item"]),), held=False), (
        "and nothing before it"
    )


async def test_of_two_copies_one_may_change(node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    copies = (tmp_path / "x", folder / "x")
    for path in copies:
        path.write_text("the same")
    item = bytes.fromhex((await node.service.share(ShareBody(str(copies[0]))))["item"])
    await node.driver.next(Hold)
    await node.service.share(ShareBody(str(folder)))
    await node.driver.next(Hold)
    for path in copies:
        path.write_text("changed")
        await asyncio.to_thread(node.store.get, item)
        await asyncio.gather(*node.service._tasks)
    assert await node.driver.next(Hold) == Hold((item,), held=False)
    assert node.driver.events.empty(), "only when the last is gone"


async def test_a_search_says_what_is_found_and_why(node: Node) -> None:
    other, third = Author(2), Author(3)
    theirs = entry_for(b"theirs", "Jazz notes")
    await node.hear(other.says(Feed.CATALOGUE, theirs, entry_for(b"more", "Rock")))
    await node.hear(third.says(Feed.CLICKS, Click(theirs.item, DAY, ("jazz",), 1)))
    found = await node.service.search("JAZZ jazz", 20, None)
    assert (found["terms"], found["ranker"]) == (["jazz"], "g-rank")
    (row,) = found["results"]
    assert (row["title"], row["rank"], row["matched"]) == ("Jazz notes", 1, ["jazz"])
    assert (row["clicks"], row["clickers"], row["sharers"]) == (1.0, 1, [other.peer])


async def test_a_search_without_words_or_with_no_such_ranker_is_wrong(node: Node) -> None:
    for text in ("", " ", "!?"):
        with pytest.raises(ConfigError, match="q: holds no word"):
            await node.service.search(text, 20, None)
    with pytest.raises(ConfigError, match="ranker"):
        await node.service.search("jazz", 20, "nonsense")


def test_the_rankers_of_the_config_are_those_that_there_are() -> None:
    from aggregation import ranking

    assert set(RANKERS) == set(ranking.RANKERS)
    assert ContentConfig().isolation == ranking.DEFAULT_ISOLATION


# --- choosing -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("share_clicks", "said"),
    [("off", None), ("plain", ("jazz",)), ("hashed", (hashed("jazz", NETWORK),))],
)
async def test_a_choice_counts_here_and_is_told_as_the_operator_wishes(
    make: Callable[..., Node], share_clicks: str, said: tuple[str, ...] | None
) -> None:
    node = make(share_clicks=share_clicks)
    theirs = entry_for(b"theirs", "Jazz notes")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    found = await node.service.open(body(theirs.item, rank=3, fetch=False))
    assert found["state"] == "chosen"
    assert [(click.item, click.rank, click.terms) for click in node.library.history()] == [
        (theirs.item, 3, ("jazz",))
    ]
    expected = [] if said is None else [Click(theirs.item, DAY, said, 3)]
    assert node.driver.published(Feed.CLICKS) == expected
    (row,) = (await node.service.search("jazz", 20, None))["results"]
    assert (row["clicks"], row["clickers"]) == (1.0, 1), "it counts once, told or not"


async def test_opening_a_link_tells_where_it_leads(node: Node) -> None:
    await node.service.share(ShareBody(uri="https://example.org", title="Jazz page"))
    item = item_of_uri("https://example.org")
    found = await node.service.open(body(item))
    assert (found["state"], found["uri"]) == ("link", "https://example.org")
    assert len(node.library.history()) == 1
    assert (await node.service.get(item.hex(), cancel=False))["state"] == "link"
    assert len(node.library.history()) == 1, "to get is not to choose"


async def test_opening_gets_the_item(node: Node) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    assert (await node.service.open(body(theirs.item)))["state"] == "getting"
    assert (await node.driver.next(Get)).ref.digest == theirs.item


async def test_forgetting_takes_back_what_was_said(make: Callable[..., Node]) -> None:
    node = make(share_clicks="plain")
    theirs = entry_for(b"theirs", "Jazz notes")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.open(body(theirs.item, fetch=False))
    assert await node.service.forget() == {"clicks": 1, "taken_back": True}
    assert node.library.history() == []
    assert node.driver.told[-1] == BeginAnew(Feed.CLICKS)
    (row,) = (await node.service.search("jazz", 20, None))["results"]
    assert row["clicks"] == 0
    heads = dict(node.library.heads())[Feed.CLICKS]
    assert [(head.author, head.last) for head in heads] == [(node.me.key, 1)], f"nothing but a {Begun}"


async def test_forgetting_what_was_never_said_says_nothing(node: Node) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.open(body(theirs.item, fetch=False))
    assert await node.service.forget() == {"clicks": 1, "taken_back": False}
    assert node.driver.told == []


# --- getting --------------------------------------------------------------------------------------------
async def test_a_file_is_asked_for_and_put_in_its_place(node: Node) -> None:
    other = Author(2)
    theirs = entry_for(b"theirs", "Their notes")
    await node.hear(other.says(Feed.CATALOGUE, theirs))
    found = await node.service.get(theirs.item.hex()[:6], cancel=False)
    assert (found["state"], found["done_bytes"], found["total_bytes"]) == ("getting", 0, 6)
    get = await node.driver.next(Get)
    assert get == Get(ContentRef(theirs.item, 6), (other.peer,))
    await node.arrives(get, b"theirs")
    assert await node.driver.next(Hold) == Hold((Digest(theirs.item),))
    row = await node.row(theirs.item)
    assert (row["state"], row["done_bytes"], row["sources"]) == ("held", 6, ["a peer"])
    path = Path(row["path"])
    assert (path.parent, path.name) == (node.home.resolve() / "downloads", "Their notes")
    assert path.read_bytes() == b"theirs"  # noqa: ASYNC240
    again = await node.service.get(theirs.item.hex(), cancel=False)
    assert (again["state"], again["path"]) == ("held", str(path))
    assert node.driver.events.empty(), "what is here is not asked for"
    assert (await node.service.unshare(theirs.item.hex()))["withdrawn"] is False
    assert await node.driver.next(Hold) == Hold((theirs.item,), held=False)
    assert node.driver.published(Feed.CATALOGUE) == []


def folder_of(files: dict[str, bytes]) -> Folder:
    hashes = {name: hash_pieces([data]) for name, data in files.items()}
    return Folder(tuple(FolderFile((name,), hashes[name][1], hashes[name][0]) for name in sorted(files)))


async def begin_folder(node: Node, files: dict[str, bytes]) -> tuple[Shared, dict[Digest, bytes]]:
    """Another's folder, of which the node gets the list: its entry, and the files that are asked for next."""
    listing = folder_of(files).to_bytes()
    folder = entry_for(listing, "Songs", Kind.FOLDER)
    await node.hear(Author(2).says(Feed.CATALOGUE, folder))
    await node.service.get(folder.item.hex(), cancel=False)
    await node.arrives(await node.driver.next(Get), listing)
    return folder, {hash_pieces([data])[0]: data for data in files.values()}


async def test_a_folder_is_its_list_then_its_files_few_at_a_time(node: Node) -> None:
    files = {f"song {index:02}": f"la {index}".encode() for index in range(20)}
    folder, by_digest = await begin_folder(node, files)
    outstanding: list[Get] = []
    num_asked = most = 0
    while num_asked < len(files):
        outstanding.append(await node.driver.next(Get))
        num_asked += 1
        most = max(most, len(outstanding))
        if len(outstanding) == WINDOW or num_asked == len(files):
            assert node.driver.events.empty(), "no more than so many at once"
            for get in outstanding:
                await node.arrives(get, by_digest[get.ref.digest])
            outstanding = []
    assert most == WINDOW
    await node.driver.next(Hold)
    row = await node.row(folder.item)
    total = folder.size_bytes + sum(map(len, files.values()))
    assert (row["state"], row["done_bytes"], row["total_bytes"]) == ("held", total, total)
    path = Path(row["path"])
    assert {each.name: each.read_bytes() for each in path.iterdir()} == files  # noqa: ASYNC240


async def test_a_folder_that_names_a_path_outside_fails_for_good(node: Node) -> None:
    digest, size_bytes, _ = hash_pieces([b"x"])
    listing = Folder((FolderFile(("..", "evil"), size_bytes, digest),)).to_bytes()
    folder = entry_for(listing, "Songs", Kind.FOLDER)
    await node.hear(Author(2).says(Feed.CATALOGUE, folder))
    await node.service.get(folder.item.hex(), cancel=False)
    await node.arrives(await node.driver.next(Get), listing)
    assert await node.driver.next(Drop) == Drop(folder.item)
    assert await node.driver.next(Hold) == Hold((folder.item,), held=False), "it is not here any more"
    row = await node.row(folder.item)
    assert row["state"] == "failed"
    assert "list" in row["detail"]
    assert node.store.wanted() == ()
    assert [fields["reason"] for event, fields in node.log.lines if event == "refused"] == [
        Reason.WRONG_FORMAT
    ]


async def test_several_gets_of_one_item_are_one(node: Node) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await asyncio.gather(*(node.service.get(theirs.item.hex(), cancel=False) for _ in range(5)))
    await node.arrives(await node.driver.next(Get), b"theirs")
    await node.driver.next(Hold)
    assert node.driver.events.empty()
    assert [row["state"] for row in (await node.service.gets())["gets"]] == ["held"]


async def test_what_is_here_and_wanted_several_times_is_placed_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash all may be here but for its place."""
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    node.store.want(ContentRef(theirs.item, theirs.size_bytes), Kind.FILE, theirs.title)
    await node.arrives(Get(ContentRef(theirs.item, theirs.size_bytes), (), ()), b"theirs")
    places, goes_on, place = list[bytes](), threading.Event(), node.store.place

    def place_slowly(digest: bytes, name: str) -> Path:
        places.append(digest)
        assert goes_on.wait(10)
        return place(digest, name)

    monkeypatch.setattr(node.store, "place", place_slowly)
    get = node.service.get
    await asyncio.gather(node.service.start(), *(get(theirs.item.hex(), cancel=False) for _ in range(3)))
    goes_on.set()
    await node.driver.next(Hold)
    await node.driver.next(Hold)
    assert places == [theirs.item]


async def test_a_look_that_takes_long_is_not_taken_all_the_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.get(theirs.item.hex(), cancel=False)
    looks, now_s = 0, node.service._loop.time() + 1

    def look(digest: bytes) -> tuple[int, int]:
        nonlocal looks, now_s
        looks += 1
        now_s += 2 * content_gets.QUICK_S
        return looks, 6

    monkeypatch.setattr(node.service._gets._loop, "time", lambda: now_s)
    monkeypatch.setattr(node.store, "progress", look)
    assert [(await node.row(theirs.item))["done_bytes"] for _ in range(4)] == [1, 1, 1, 1]


async def test_what_is_given_up_can_begin_anew_only_when_it_is_gone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.get(theirs.item.hex(), cancel=False)
    await node.driver.next(Get)
    began, goes_on, unwant = asyncio.Event(), threading.Event(), node.store.unwant

    def unwant_slowly(digest: bytes) -> tuple[Digest, ...]:
        node.service._loop.call_soon_threadsafe(began.set)
        assert goes_on.wait(10)
        return unwant(digest)

    monkeypatch.setattr(node.store, "unwant", unwant_slowly)
    cancelled = asyncio.create_task(node.service.get(theirs.item.hex(), cancel=True))
    await began.wait()
    await node.service.get(theirs.item.hex(), cancel=False)
    goes_on.set()
    assert (await cancelled)["state"] == "failed"
    await node.driver.next(Drop)
    await node.driver.next(Hold)
    assert node.store.wanted() == ()
    await node.service.get(theirs.item.hex(), cancel=False)
    await node.driver.next(Get)
    assert [wanted.ref.digest for wanted in node.store.wanted()] == [theirs.item]


@pytest.mark.parametrize(
    "lie",
    [
        {"size_bytes": 999},
        {"size_bytes": 2000},
        {"size_bytes": 0},
        {"kind": Kind.FOLDER},
        {"kind": Kind.FOLDER, "size_bytes": 2000},
        {"kind": Kind.MODEL},
    ],
    ids=str,
)
async def test_no_later_word_of_another_keeps_an_item_from_being_got(
    make: Callable[..., Node], lie: dict[str, Any]
) -> None:
    node = make(max_item_bytes=1000)
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.hear(Author(3).says(Feed.CATALOGUE, msgspec.structs.replace(theirs, day=DAY + 1, **lie)))
    found = await node.service.get(theirs.item.hex(), cancel=False)
    assert found["state"] == "getting"
    await node.proves(await node.driver.next(Get), b"theirs")
    await node.driver.next(Hold)
    row = await node.row(theirs.item)
    assert (row["state"], row["total_bytes"]) == ("held", 6)
    assert Path(row["path"]).read_bytes() == b"theirs"  # noqa: ASYNC240


async def test_a_folder_stays_one_whoever_calls_it_a_file(node: Node) -> None:
    listing = folder_of({"song": b"la"}).to_bytes()
    folder = entry_for(listing, "Songs", Kind.FOLDER)
    await node.hear(Author(2).says(Feed.CATALOGUE, folder))
    for liar in (3, 4):
        lie = msgspec.structs.replace(folder, day=DAY + 1, kind=Kind.FILE)
        await node.hear(Author(liar).says(Feed.CATALOGUE, lie))
    await node.service.get(folder.item.hex(), cancel=False)
    await node.proves(await node.driver.next(Get), listing)
    await node.arrives(await node.driver.next(Get), b"la")
    await node.driver.next(Hold)
    row = await node.row(folder.item)
    assert (Path(row["path"]) / "song").read_bytes() == b"la"


async def test_what_others_say_is_not_kept_where_the_disk_is_nearly_full(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(size_bytes: int) -> None:
        raise LocalError("the disk has 0 bytes free")

    monkeypatch.setattr(node.store, "check_disk", full)
    theirs, mine = entry_for(b"theirs"), Author(1)
    said = Author(2).says(Feed.CATALOGUE, theirs)
    with pytest.raises(LocalError, match="0 bytes free"):
        await node.hear(said)
    assert node.library.entry(theirs.item) is None
    await node.hear(mine.says(Feed.CATALOGUE, theirs))
    assert node.library.entry(theirs.item) == theirs
    batch = said.batches[0]
    await node.hear(KeepEntries(Feed.CATALOGUE, (), (Cut(batch.author, batch.epoch, 9),)))


async def test_what_nobody_has_is_asked_for_again_later(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_gets, "RETRY_S", 0.01)
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.get(theirs.item.hex(), cancel=False)
    for _ in range(2):
        get = await node.driver.next(Get)
        node.service.on_record(ContentMissing(theirs.item, "nobody holds it"))
    await node.arrives(await node.driver.next(Get), b"theirs")
    await node.driver.next(Hold)
    assert get.ref.digest == theirs.item


async def test_what_is_missing_of_a_folder_comes_after_the_rest(node: Node) -> None:
    files = {f"song {index}": f"la {index}".encode() for index in range(5)}
    folder, by_digest = await begin_folder(node, files)
    missed = await node.driver.next(Get)
    node.service.on_record(ContentMissing(missed.ref.digest, "busy"))
    for _ in range(len(files) - 1):
        get = await node.driver.next(Get)
        assert get.ref != missed.ref
        await node.arrives(get, by_digest[get.ref.digest])
    assert await node.driver.next(Get) == missed, "once more at once, since others came"
    assert (await node.row(folder.item))["state"] == "getting"
    node.service.on_record(ContentMissing(missed.ref.digest, "busy"))
    row = await node.row(folder.item)
    assert (row["state"], row["detail"]) == ("waiting", "busy"), "and then later"
    await node.service.get(folder.item.hex(), cancel=False)
    await node.arrives(await node.driver.next(Get), by_digest[missed.ref.digest])
    await node.driver.next(Hold)


async def test_so_much_is_asked_for_in_a_second(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers answer so many questions a second; whoever asks more is not answered."""
    now_s = 1000.0
    monkeypatch.setattr(node.service._gets._loop, "time", lambda: now_s)
    budget = node.service._gets._asks
    while budget.take(now_s):
        pass
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    found = await node.service.get(theirs.item.hex(), cancel=False)
    assert (found["state"], node.driver.told) == ("getting", [])
    now_s += 1
    node.service._gets._ask_on()
    await node.driver.next(Get)


async def test_waiting_is_told_with_its_reason_and_ends_with_a_new_link(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_gets, "LINK_RETRY_S", 0.01)
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.get(theirs.item.hex(), cancel=False)
    await node.driver.next(Get)
    node.service.on_record(ContentMissing(theirs.item, "nobody holds it"))
    row = await node.row(theirs.item)
    assert (row["state"], row["detail"]) == ("waiting", "nobody holds it")
    node.service.on_record(LinkChanged(PeerId("new"), up=True, reason="", num_live=1))
    await node.driver.next(Get)
    row = await node.row(theirs.item)
    assert (row["state"], row["detail"]) == ("getting", "")


async def test_asking_again_by_hand_does_not_wait(node: Node) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.get(theirs.item.hex(), cancel=False)
    await node.driver.next(Get)
    await node.service.get(theirs.item.hex(), cancel=False)
    assert node.driver.events.empty(), "it is asked for already"
    node.service.on_record(ContentMissing(theirs.item, "nobody holds it"))
    assert (await node.row(theirs.item))["state"] == "waiting"
    assert (await node.service.get(theirs.item.hex(), cancel=False))["state"] == "getting"
    await node.driver.next(Get)


async def test_a_get_can_be_cancelled(node: Node) -> None:
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    await node.service.get(theirs.item.hex(), cancel=False)
    await node.driver.next(Get)
    assert (await node.service.get(theirs.item.hex()[:8], cancel=True))["detail"] == "cancelled"
    assert await node.driver.next(Drop) == Drop(theirs.item)
    assert node.store.wanted() == ()
    assert (await node.service.gets())["gets"] == [], "nobody has to be told of it"
    with pytest.raises(LocalError, match="nothing is under way"):
        await node.service.get(theirs.item.hex()[:8], cancel=True)


async def test_what_is_too_large_or_unknown_is_refused_at_once(make: Callable[..., Node]) -> None:
    node = make(max_item_bytes=5)
    theirs = entry_for(b"theirs")
    await node.hear(Author(2).says(Feed.CATALOGUE, theirs))
    with pytest.raises(LocalError, match="6"):
        await node.service.get(theirs.item.hex(), cancel=False)
    with pytest.raises(LocalError, match=r"no item is known .*; `covey library` lists what is"):
        await node.service.get("00" * 32, cancel=False)
    nothing = Shared(bytes(31) + b"1", DAY, Kind.FILE, "t", "", (), "", 0, "", ())
    await node.hear(Author(3).says(Feed.CATALOGUE, nothing))
    with pytest.raises(LocalError, match="no bytes"):
        await node.service.get(nothing.item.hex(), cancel=False)
    assert node.driver.told == []


async def test_a_beginning_that_several_have_names_them(node: Node) -> None:
    items = [bytes([7]) * 31 + bytes([last]) for last in (1, 2)]
    entries = [Shared(item, DAY, Kind.FILE, "t", "", (), "", 1, "", ()) for item in items]
    await node.hear(Author(2).says(Feed.CATALOGUE, *entries))
    with pytest.raises(LocalError, match="several items begin with 070707"):
        await node.service.get("070707", cancel=False)


# --- beginning ------------------------------------------------------------------------------------------
async def test_a_start_serves_what_is_held_and_goes_on_with_what_was_wanted(
    make: Callable[..., Node], tmp_path: Path
) -> None:
    first = make()
    path = tmp_path / "mine"
    path.write_text("mine")
    mine = (await first.service.share(ShareBody(str(path))))["item"]
    other, theirs = Author(2), entry_for(b"theirs")
    await first.hear(other.says(Feed.CATALOGUE, theirs))
    await first.service.get(theirs.item.hex(), cancel=False)
    await first.close()
    second = make()
    await second.service.start()
    assert await second.driver.next(Hold) == Hold((Digest(bytes.fromhex(mine)),))
    get = await second.driver.next(Get)
    assert get == Get(ContentRef(theirs.item, 6), (other.peer,))
    await second.arrives(get, b"theirs")
    await second.driver.next(Hold)
    assert (await second.row(theirs.item))["state"] == "held"


async def test_what_was_said_long_ago_is_said_again_if_it_is_still_here(
    make: Callable[..., Node], tmp_path: Path
) -> None:
    node = make(expire_days=100)
    for name in ("kept", "gone"):
        (tmp_path / name).write_text(name)
        await node.service.share(ShareBody(str(tmp_path / name)))
        await node.driver.next(Hold)
    await node.service.share(ShareBody(uri="a:b", title="t"))
    kept, _, link = node.driver.published(Feed.CATALOGUE)
    node.driver.told.clear()
    (tmp_path / "gone").unlink()
    await asyncio.to_thread(node.store.get, hash_pieces([b"gone"])[0])
    await node.driver.next(Hold)
    node.now_s += 51 * 86_400
    await node.service._renew()
    said = {(entry.item, entry.day) for entry in node.driver.published(Feed.CATALOGUE)}
    assert said == {(kept.item, DAY + 51), (link.item, DAY + 51)}
    node.driver.told.clear()
    await node.service._renew()
    assert node.driver.told == [], "once is enough"


async def test_many_entries_said_at_once_are_all_kept_before_the_answer(node: Node) -> None:
    await asyncio.gather(
        *(node.service.share(ShareBody(uri=f"a:{number}", title=f"link {number}")) for number in range(50))
    )
    assert len((await node.service.library(mine=True, limit=100))["items"]) == 50
    assert not any(node.service._unkept.values()), os.getpid()
