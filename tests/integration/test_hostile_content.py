"""A daemon that hears of content from a peer without manners: whatever that one says, serves or asks is refused or harmless.

The victim meets one such peer after the other, and what one leaves behind the next one meets. An honest node stands by: after
each attack the two still serve each other.
"""

import asyncio
import io
import json
import os
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from node.api import RefusedError, call
from node.cluster import Cluster, LocalNode, free_port
from node.identity import KEY_FILE, load_key, peer_id_of
from node.libp2p_network import Libp2pNetwork
from node.ports import NetworkEvent
from node.signatures import Ed25519Signatures, author_of
from protocols.blob import hash_blob
from protocols.content import ASKS_PER_S, SEEKS_PER_S
from protocols.entries import Batch, Click, Entry, Feed, FeedMark, Kind, Shared, Withdrawn
from protocols.events import LinkDown, LinkUp, Received
from protocols.feeds import FeedLimits, FeedSet, chains, head_bytes
from protocols.messages import Ask, Entries, Found, Hello, LinkMessage, Ping, Pong, Refuse, Seek
from protocols.signing import sign_record
from protocols.terms import tokens
from protocols.vocabulary import (
    CHUNK_BYTES,
    PROTOCOL_VERSION,
    PeerId,
    PeerRecord,
    Reason,
    SchemaHash,
)
from tests.integration.content_nodes import (
    content_settings,
    covey,
    get,
    open_result,
    results,
    share,
    start_linked,
    titles,
    tree,
    wait_found,
    wait_got,
    wait_until,
)

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(180)]

NETWORK = "hostile"
DAY = int(time.time() // 86_400)
WINDOW = 300
"""Clicks that the victim keeps of one author."""
MAX_ITEM_BYTES = 32 * CHUNK_BYTES
LIMITS = FeedLimits(10, 1_000_000, 1_000_000, 365)
ESCAPES = "\x1b[31m\x1b]0;owned\x07\x9b2J"


class Honest(NamedTuple):
    """The node that is attacked, and one that is not."""

    victim: LocalNode
    witness: LocalNode
    folder: Path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Honest]:
    folder = tmp_path_factory.mktemp("hostile")
    with Cluster() as cluster:
        listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
        tables = content_settings(
            NETWORK,
            [],
            max_clicks_per_author=WINDOW,
            max_item_bytes=MAX_ITEM_BYTES,
            entries_per_answer=256,
            share_clicks="plain",
        )
        tables["network"]["listen"] = [listen]
        victim = cluster.add(folder / "victim", tables)
        door = f"{listen}/p2p/{victim.peer}"
        witness = cluster.add(folder / "witness", content_settings(NETWORK, [door], share_clicks="plain"))
        start_linked([victim, witness])
        yield Honest(victim, witness, folder)


@pytest.fixture(autouse=True)
def unharmed(honest: Honest) -> Iterator[None]:
    """After the attack both run as before, linked with each other, and nothing has reached the operator's terminal."""
    yield
    for node in (honest.victim, honest.witness):
        node.wait_for(lambda status: status["live_peers"] >= 1, "the link of the honest", 30)
        log = node.log()
        assert "Traceback" not in log
        assert "the node broke" not in log
        assert "work on shared content broke" not in log
        assert not escapes_in(log)


@pytest.fixture
def serving(honest: Honest) -> Iterator[None]:
    """And what either shares then, the other finds and gets."""
    yield
    number = len(list(honest.folder.glob("proof*")))
    path = honest.folder / f"proof{number}.txt"
    path.write_bytes(b"still here %d" % number)
    giver, taker = (honest.victim, honest.witness) if number % 2 else (honest.witness, honest.victim)
    item = share(giver, path, tags=[path.stem])["item"]
    wait_found(taker, path.stem)
    get(taker, item)
    assert Path(wait_got(taker, item)["path"]).read_bytes() == path.read_bytes()


def escapes_in(text: str) -> list[str]:
    return [char for char in text if (ord(char) < 32 and char not in "\n\t") or 127 <= ord(char) < 160]


# --- the peer without manners ---------------------------------------------------------------------------
class LyingBlob:
    """Whatever is to be sent for a digest."""

    lane = "content"

    def __init__(self, size_bytes: int, chunk_hashes: tuple[bytes, ...], data: bytes) -> None:
        self.size_bytes, self.chunk_hashes, self._data = size_bytes, chunk_hashes, data

    def read(self, index: int) -> bytes:
        return self._data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


class Store:
    """All that the peer serves, by digest."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, LyingBlob] = {}

    def get(self, digest: bytes) -> Any:
        return self.blobs.get(digest)

    def holds(self, ref: Any) -> bool:
        return False

    def incoming(self, ref: Any) -> Any:
        raise NotImplementedError

    def admit(self, incoming: Any) -> None:
        raise NotImplementedError


class Mallory:
    """Greets as it should, and then says what it is told to whenever it is asked."""

    def __init__(self, victim: LocalNode) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.signatures = Ed25519Signatures(self.key)
        self.feeds = {feed: FeedSet(NETWORK, feed, self.signatures, LIMITS) for feed in Feed}
        self.store = Store()
        self.said: dict[Feed, list[Batch]] = {feed: [] for feed in Feed}
        """What it answers with, each once."""
        self.answers: Callable[[Ask], Sequence[LinkMessage]] = self.answer
        self.asked: list[Ask] = []
        self.heard: list[NetworkEvent] = []
        self._changed = asyncio.Event()
        self._victim = victim
        self.network = Libp2pNetwork(self.key, ["/ip4/127.0.0.1/tcp/0"], self.store, self._hear)

    async def greet(self) -> None:
        await self.network.start()
        self.network.dial(await asyncio.to_thread(self._victim.address))
        await self.until(lambda: any(isinstance(message, Hello) for message in self.messages))

    @property
    def messages(self) -> list[LinkMessage]:
        return [event.message for event in self.heard if isinstance(event, Received)]

    @property
    def refusals(self) -> list[Reason]:
        """What it was told when it was turned out."""
        return [message.reason for message in self.messages if isinstance(message, Refuse)]

    @property
    def is_out(self) -> bool:
        return any(isinstance(event, LinkDown) for event in self.heard)

    def say(self, *messages: LinkMessage) -> None:
        for message in messages:
            self.network.send(self._victim.peer, message)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def asked_again(self) -> None:
        """Until the victim has asked for both feeds once more, and so taken in what it was told before."""
        count = len(self.asked) + 2
        await self.until(lambda: len(self.asked) >= count)

    def publish(self, feed: Feed, *entries: Entry) -> list[Batch]:
        """Say entries, well signed, at the next question."""
        batches = self.feeds[feed].publish(entries, time.time())
        self.said[feed] += batches
        return batches

    def say_next(self, *batches: Batch) -> None:
        """These and no others."""
        self.said[Feed.CATALOGUE] = list(batches)

    def offer(self, data: bytes, title: str = "x", tag: str = "x", **claims: Any) -> Shared:
        """Share bytes, well signed, with whatever else is claimed of them."""
        digest, hashes = hash_blob(data)
        self.store.blobs[digest] = LyingBlob(len(data), hashes, data)
        entry = shared(digest, title, tag, **{"size_bytes": len(data), **claims})
        self.publish(Feed.CATALOGUE, entry)
        return entry

    def answer(self, ask: Ask) -> Sequence[LinkMessage]:
        """A batch a message, all that is left to say, up to what was asked for."""
        left, parts = ask.limit, []
        while self.said[ask.feed] and len(self.said[ask.feed][0].entries) <= left:
            parts.append(self.said[ask.feed].pop(0))
            left -= len(parts[-1].entries)
        told = [Entries(ask.token, ask.feed, (part,), False) for part in parts]
        return [*told, Entries(ask.token, ask.feed, (), True)]

    def _hear(self, event: NetworkEvent) -> None:
        self.heard.append(event)
        match event:
            case LinkUp(peer):
                record = sign_record(NETWORK, PeerRecord(PeerId(peer_id_of(self.key)), ()), self.signatures)
                nothing = SchemaHash(bytes(32))
                self.network.send(
                    peer, Hello(PROTOCOL_VERSION, NETWORK, "none", "none", nothing, record, False, None)
                )
            case Received(_, Ask() as ask):
                self.asked.append(ask)
                self.say(*self.answers(ask))
            case Received(_, Ping(token)):
                self.say(Pong(token, 0))
            case Received(_, Seek(token, digest)):
                self.say(Found(token, digest in self.store.blobs))
            case _:
                pass
        self._changed.set()


@pytest.fixture
async def mallory(honest: Honest) -> AsyncIterator[Mallory]:
    mallory = Mallory(honest.victim)
    await mallory.greet()
    yield mallory
    await mallory.network.stop()


def shared(item: bytes, title: str = "x", tag: str = "x", **claims: Any) -> Shared:
    entry = Shared(item, DAY, Kind.FILE, title, "", (tag,), "", 10, "", ())
    return replace(entry, **claims)


def refused(node: LocalNode, reason: Reason) -> int:
    return int(call(node.home, "/status")["refused"].get(reason.value, 0))


async def wait_refused(node: LocalNode, reason: Reason, before: int, count: int = 1) -> None:
    await asyncio.to_thread(
        node.wait_for,
        lambda status: status["refused"].get(reason.value, 0) >= before + count,
        f"{count} more refusals for {reason.value}",
        30,
    )


async def finds(node: LocalNode, query: str, count: int = 1) -> list[dict[str, Any]]:
    return await asyncio.to_thread(wait_found, node, query, count)


# --- what is said ---------------------------------------------------------------------------------------
def resigned(mallory: Mallory, batch: Batch, *, network: str = NETWORK, feed: Feed = Feed.CATALOGUE) -> Batch:
    """The batch with a signature of Mallory's own under what it says now."""
    chain = chains(batch.prior, batch.entries)[-1]
    said = head_bytes(network, feed, batch.author, batch.epoch, batch.last, chain)
    return replace(batch, signature=mallory.signatures.sign(said))


def witness_key(honest: Honest) -> bytes:
    return author_of(peer_id_of(load_key(honest.witness.home / KEY_FILE)))


def with_entry(mallory: Mallory, batch: Batch, **changes: Any) -> Batch:
    (entry,) = batch.entries
    return resigned(mallory, replace(batch, entries=(replace(entry, **changes),)))


Forge = Callable[[Mallory, Batch, Honest], Batch]
BATCHES: dict[str, tuple[Forge, Reason]] = {
    "a wrong signature": (lambda m, b, h: replace(b, signature=bytes(64)), Reason.FORGED),
    "another's key as the author": (
        lambda m, b, h: resigned(m, replace(b, author=witness_key(h))),
        Reason.FORGED,
    ),
    "a title changed on the way": (
        lambda m, b, h: replace(b, entries=(replace(b.entries[0], title="forgery 2"),)),
        Reason.FORGED,
    ),
    "signed for another network": (lambda m, b, h: resigned(m, b, network="elsewhere"), Reason.FORGED),
    "signed for the other feed": (lambda m, b, h: resigned(m, b, feed=Feed.CLICKS), Reason.FORGED),
    "a running hash before the first entry": (
        lambda m, b, h: resigned(m, replace(b, prior=b"p" * 16)),
        Reason.MALFORMED,
    ),
    "a click in the catalogue": (
        lambda m, b, h: resigned(m, replace(b, entries=(Click(b"i" * 32, DAY, ("forgery",), 1),))),
        Reason.MALFORMED,
    ),
    "an entry of 15 kB": (
        lambda m, b, h: with_entry(m, b, details=tuple((f"k{i}", "\U0001f600" * 240) for i in range(16))),
        Reason.MALFORMED,
    ),
}


def nested(depth: int) -> Any:
    found: Any = ()
    for _ in range(depth):
        found = (found,)
    return found


@pytest.mark.parametrize("name", BATCHES)
async def test_an_entry_that_is_not_right_is_refused_and_found_by_nobody(
    honest: Honest, mallory: Mallory, name: str
) -> None:
    forge, reason = BATCHES[name]
    before = refused(honest.victim, reason)
    mallory.say_next(forge(mallory, *mallory.publish(Feed.CATALOGUE, shared(b"f" * 32, "forgery")), honest))
    await wait_refused(honest.victim, reason, before)
    assert await finds(honest.victim, "forgery", 0) == []


UNREADABLE: dict[str, dict[str, Any]] = {
    "a tag of 50 kB": {"tags": ("t" * 50_000,)},
    "five thousand tags": {"tags": ("t",) * 5000},
    "details without end": {"details": (("k", "v"),) * 5000},
    "details five hundred deep": {"details": nested(500)},
    "ten gigabytes": {"size_bytes": 10 * 1024**3},
    "escape sequences in the title": {"title": f"forgery {ESCAPES}"},
    "escape sequences in a tag": {"tags": (ESCAPES,)},
    "a title from right to left": {"title": "gpj.\u202e exe"},
    "a title of two lines": {"title": "forgery\nN 2"},
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_an_entry_that_no_entry_can_be_ends_the_link(
    honest: Honest, mallory: Mallory, name: str
) -> None:
    before = refused(honest.victim, Reason.MALFORMED)
    batch, *_ = mallory.publish(Feed.CATALOGUE, shared(b"f" * 32, "forgery"))
    mallory.say(Entries(1, Feed.CATALOGUE, (with_entry(mallory, batch, **UNREADABLE[name]),), True))
    await mallory.until(lambda: mallory.is_out)
    assert mallory.refusals == [Reason.MALFORMED]
    await wait_refused(honest.victim, Reason.MALFORMED, before)


async def test_the_third_forgery_on_a_link_ends_it(honest: Honest, serving: None, mallory: Mallory) -> None:
    before = refused(honest.victim, Reason.FORGED)
    batch, *_ = mallory.publish(Feed.CATALOGUE, shared(b"f" * 32, "forgery"))
    mallory.say_next(*[replace(batch, signature=bytes(64))] * 5)
    await mallory.until(lambda: mallory.is_out)
    assert mallory.refusals == [Reason.FORGED]
    await wait_refused(honest.victim, Reason.FORGED, before, 3)
    assert refused(honest.victim, Reason.FORGED) == before + 3


async def test_entries_that_nobody_asked_for_are_not_looked_at(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    before = refused(honest.victim, Reason.UNASKED)
    (batch,) = mallory.publish(Feed.CATALOGUE, shared(b"u" * 32, "unasked"))
    mallory.say_next()
    mallory.say(*[Entries(token, Feed.CATALOGUE, (batch,), True) for token in (0, 1, 2**48)])
    await wait_refused(honest.victim, Reason.UNASKED, before, 3)
    await mallory.asked_again()
    assert titles(honest.victim, "unasked") == []
    assert not mallory.is_out, "an honest answer may be late"
    # The right number, the other feed; then the right answer, twice.
    mallory.answers = lambda ask: [Entries(ask.token, other(ask.feed), (batch,), True)]
    await wait_refused(honest.victim, Reason.UNASKED, before, 4)
    assert titles(honest.victim, "unasked") == []


def other(feed: Feed) -> Feed:
    return Feed.CLICKS if feed is Feed.CATALOGUE else Feed.CATALOGUE


async def test_an_answer_with_more_than_was_asked_for_is_cut_off(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    before = refused(honest.victim, Reason.UNASKED)
    many = [shared(bytes(28) + at.to_bytes(4, "big"), "plenty") for at in range(1000)]
    batches = mallory.publish(Feed.CATALOGUE, *many)
    mallory.say_next()
    answered = []

    def answer(ask: Ask) -> Sequence[LinkMessage]:
        if ask.feed is Feed.CLICKS or answered:
            return [Entries(ask.token, ask.feed, (), True)]
        answered.append(ask)
        told = [Entries(ask.token, ask.feed, (batch,), False) for batch in batches]
        return [*told, Entries(ask.token, ask.feed, (), True)]

    mallory.answers = answer
    await wait_refused(honest.victim, Reason.UNASKED, before)
    await mallory.until(lambda: bool(answered))
    found = results(honest.victim, "plenty")
    assert 0 < len(found) <= 20
    known = call(honest.victim.home, "/library?limit=1000")["items"]
    assert sum(item["title"] == "plenty" for item in known) <= answered[0].limit < len(many)


async def test_who_tells_two_stories_is_believed_in_neither(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    before = refused(honest.victim, Reason.EQUIVOCATION)
    twin = FeedSet(NETWORK, Feed.CATALOGUE, mallory.signatures, LIMITS)
    (first,) = mallory.publish(Feed.CATALOGUE, shared(b"1" * 32, "twofaced"))
    (second,) = twin.publish([shared(b"2" * 32, "twofaced")], float(first.epoch))
    await finds(honest.victim, "twofaced")
    mallory.say_next(second)
    await wait_refused(honest.victim, Reason.EQUIVOCATION, before)
    await finds(honest.victim, "twofaced", 0)


async def test_what_is_said_of_the_future_or_of_anothers_item_changes_nothing(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    path = honest.folder / "theirs.txt"
    path.write_bytes(b"theirs")
    item = share(honest.witness, path, title="Theirs", tags=["theirs"])["item"]
    await finds(honest.victim, "theirs")
    nobody = Ed25519Signatures(Ed25519PrivateKey.generate())
    far = FeedSet(NETWORK, Feed.CATALOGUE, nobody, LIMITS)
    mallory.publish(Feed.CATALOGUE, Withdrawn(bytes.fromhex(item), DAY))
    mallory.said[Feed.CATALOGUE] += far.publish([shared(b"f" * 32, "future")], time.time() + 10 * 86_400)
    mallory.publish(Feed.CATALOGUE, shared(b"m" * 32, "future", "marker"))
    mallory.publish(Feed.CATALOGUE, shared(b"n" * 32, "future", day=DAY + 10))
    await finds(honest.victim, "marker")
    assert titles(honest.victim, "theirs") == ["Theirs"]
    assert len(results(honest.victim, "future")) == 1, "the marker alone"


# --- clicks ---------------------------------------------------------------------------------------------
async def test_a_flood_of_clicks_by_one_author_is_cut_to_the_window_and_is_one_vote_where_votes_are_capped(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    victim, witness = honest.victim, honest.witness
    items = {}
    for name in ("Blue", "Red"):
        path = honest.folder / f"{name}.txt"
        path.write_bytes(name.encode())
        items[name] = bytes.fromhex(share(witness, path, title=name, tags=["colour"])["item"])
    await finds(victim, "colour", 2)
    for node in (victim, witness):
        open_result(node, "colour", "Blue", fetch=False)
    await asyncio.to_thread(
        wait_until, victim, lambda: results(victim, "colour")[0]["clickers"] == 2, "both honest clicks"
    )
    assert titles(victim, "colour", "g-rank-capped") == ["Blue", "Red"]
    alike = Click(items["Blue"], DAY, ("colour",), 1)
    mallory.publish(Feed.CLICKS, alike, *[Click(items["Red"], DAY, ("colour",), 1)] * 700)
    await mallory.until(lambda: not mallory.said[Feed.CLICKS])

    def clicks_on_red() -> float:
        (red,) = [result for result in results(victim, "colour") if result["title"] == "Red"]
        return red["clicks"] if red["clickers"] == 1 else -1

    await asyncio.to_thread(wait_until, victim, lambda: clicks_on_red() == WINDOW, "the window")
    assert titles(victim, "colour", "popularity") == ["Red", "Blue"], "it was heard"
    assert titles(victim, "colour", "g-rank-capped") == ["Blue", "Red"]


# --- floods ---------------------------------------------------------------------------------------------
async def test_who_asks_without_end_is_answered_at_a_bounded_rate(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    before, began_at = refused(honest.victim, Reason.FLOOD), time.monotonic()
    mallory.say(*[Ask(token, Feed.CATALOGUE, 0, 0, (), 100) for token in range(200)])
    mallory.say(*[Seek(token, os.urandom(32)) for token in range(200)])
    await wait_refused(honest.victim, Reason.FLOOD, before, 100)
    answers = {message.token for message in mallory.messages if isinstance(message, Entries)}
    found = sum(isinstance(message, Found) for message in mallory.messages)
    seconds = 3 + time.monotonic() - began_at
    assert 1 <= len(answers) <= ASKS_PER_S * seconds
    assert 1 <= found <= SEEKS_PER_S * seconds
    assert not mallory.is_out, "it may not know how fast it may ask"


async def test_questions_that_make_no_sense_are_refused(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    before = refused(honest.victim, Reason.MALFORMED)
    mark = FeedMark(bytes(32), 2**48, 2**32)
    mallory.say(Ask(1, Feed.CLICKS, 0, 0, (mark,) * 500, 100_000))
    await mallory.until(lambda: any(isinstance(message, Entries) for message in mallory.messages))
    mallory.say(*[Ask(token, Feed.CLICKS, 3, 8, (), 1) for token in range(3)])
    await mallory.until(lambda: mallory.is_out)
    assert mallory.refusals == [Reason.MALFORMED]
    await wait_refused(honest.victim, Reason.MALFORMED, before, 3)


# --- bytes ----------------------------------------------------------------------------------------------
DATA = bytes(range(256)) * 8192  # 2 MiB
HASHES = hash_blob(DATA)[1]
BYTES: dict[str, tuple[LyingBlob, Reason]] = {
    "a hash too many": (
        LyingBlob(len(DATA), (*HASHES, bytes(32)), DATA),
        Reason.WRONG_SIZE,
    ),
    "hashes that make another digest": (LyingBlob(len(DATA), (bytes(32),) * 2, DATA), Reason.WRONG_HASH),
    "other bytes": (LyingBlob(len(DATA), HASHES, DATA[::-1]), Reason.WRONG_HASH),
    "eight gigabytes": (LyingBlob(8 * 1024**3, (bytes(32),) * 8192, DATA), Reason.WRONG_SIZE),
    "ten gigabytes": (LyingBlob(10 * 1024**3, (bytes(32),) * 10_240, DATA), Reason.MALFORMED),
}


@pytest.mark.parametrize("name", BYTES)
async def test_bytes_that_do_not_make_the_digest_are_refused_and_come_from_the_honest(
    honest: Honest, mallory: Mallory, name: str
) -> None:
    victim, (blob, reason) = honest.victim, BYTES[name]
    before = refused(victim, reason)
    data = name.encode() + DATA[len(name) :]
    digest, hashes = hash_blob(data)
    if blob.chunk_hashes == HASHES:
        blob = LyingBlob(len(data), hashes, data[::-1])
    mallory.publish(Feed.CATALOGUE, shared(digest, name, "liarsbytes", size_bytes=len(data)))
    mallory.store.blobs[digest] = blob
    item = digest.hex()
    await asyncio.to_thread(wait_until, victim, lambda: name in titles(victim, "liarsbytes"), name)
    get(victim, item)
    await wait_refused(victim, reason, before)
    await asyncio.to_thread(wait_got, victim, item, "waiting")
    assert home_bytes(victim) < 64 * CHUNK_BYTES
    path = honest.folder / f"{name}.bin"
    path.write_bytes(data)
    share(honest.witness, path)
    get(victim, item)
    got = await asyncio.to_thread(wait_got, victim, item)
    assert tree(Path(got["path"])) == {"": data}
    assert honest.witness.peer in got["sources"]


def home_bytes(node: LocalNode) -> int:
    return sum(path.lstat().st_size for path in node.home.rglob("*"))


async def test_what_is_larger_than_is_allowed_is_not_even_begun(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    victim = honest.victim
    file = mallory.offer(b"small", "Huge file", "huge", size_bytes=8 * 1024**3)
    listed = folder_list([(("part",), 1024**3, bytes(32)), (("parts",), 9 * 1024**3 - 1024**3, b"2" * 32)])
    folder = mallory.offer(listed, "Huge folder", "huge", kind=Kind.FOLDER)
    await finds(victim, "huge", 2)
    with pytest.raises(RefusedError, match="max_item_bytes"):
        get(victim, file.item.hex())
    get(victim, folder.item.hex())
    failed = await asyncio.to_thread(wait_got, victim, folder.item.hex(), "failed")
    assert "max_item_bytes" in failed["detail"]
    assert home_bytes(victim) < 64 * CHUNK_BYTES


# --- names ----------------------------------------------------------------------------------------------
def folder_list(files: Sequence[tuple[Sequence[str], int, bytes]]) -> bytes:
    """As a folder's list travels, whatever it says."""
    return msgspec.msgpack.encode([[list(parts), size, digest] for parts, size, digest in files])


EVIL = b"evil"
EVIL_DIGEST, _ = hash_blob(EVIL)
PATHS: list[list[Sequence[str]]] = [
    [("..", "evil")],
    [("a", "..", "..", "..", "evil")],
    [("/", "tmp", "evil")],
    [("/tmp/evil",)],
    [("../../evil",)],
    [("..\\..\\evil",)],
    [("C:\\evil",)],
    [("C:", "evil")],
    [("evil:stream",)],
    [("CON",)],
    [("nul.evil",)],
    [(".",)],
    [("",)],
    [()],
    [("evil\0.txt",)],
    [(f"evil{ESCAPES}",)],
    [("evil\u202egpj.exe",)],
    [("evil\nevil",)],
    [("evil ",)],
    [("evil.",)],
    [("evil" * 100,)],
    [("evil",) * 100],
    [("EVIL",), ("evil",)],
    [("evil",), ("evil", "evil")],
    [("evil",), ("evil",)],
]


AROUND = [Path("/"), Path("/tmp"), Path.cwd()]
"""Where such a path might lead."""


async def test_a_folders_list_names_no_place_outside_of_it(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    victim = honest.victim
    mallory.store.blobs[EVIL_DIGEST] = LyingBlob(len(EVIL), hash_blob(EVIL)[1], EVIL)
    before = tree(victim.home / "downloads")
    items = []
    for at, paths in enumerate(PATHS):
        listed = folder_list([(parts, len(EVIL), EVIL_DIGEST) for parts in paths])
        items.append(mallory.offer(listed, f"Walk {at}", "walk", kind=Kind.FOLDER).item.hex())
    rubbish = {
        "nested": b"\x91" * 1000,
        "no list": b"PK\x03\x04 and so on",
        "a map": msgspec.msgpack.encode({"a": 1}),
    }
    items += [
        mallory.offer(data, name, "walk", kind=Kind.FOLDER).item.hex() for name, data in rubbish.items()
    ]
    counted = refused(victim, Reason.WRONG_FORMAT)
    await asyncio.to_thread(
        wait_until, victim, lambda: len(search_all(victim, "walk")) == len(items), "all lists"
    )
    for item in items:
        get(victim, item)
    for item in items:
        failed = await asyncio.to_thread(wait_got, victim, item, "failed")
        assert "wrong_format" in failed["detail"], (item, failed)
        assert not escapes_in(failed["detail"])
    assert tree(victim.home / "downloads") == before
    assert not [path for folder in AROUND for path in folder.glob("*evil*")]
    assert not list(honest.folder.rglob("*evil*"))
    await wait_refused(victim, Reason.WRONG_FORMAT, counted, len(items))
    assert "\x1b" not in json.dumps(call(victim.home, "/gets"))


async def test_what_has_failed_fails_again_and_does_not_go_round(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    item = mallory.offer(b"no list", "Twice", "twice", kind=Kind.FOLDER).item.hex()
    await finds(honest.victim, "twice")
    for _ in range(2):
        get(honest.victim, item)
        await asyncio.to_thread(wait_got, honest.victim, item, "failed")
    lines = honest.victim.log().splitlines()
    assert len([line for line in lines if "content held" in line and item in line]) == 2


def search_all(node: LocalNode, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = call(node.home, f"/search?q={query}&limit=1000")["results"]
    return found


NAMES = [
    "../../evil",
    "/etc/evil",
    "C:\\Windows\\evil.exe",
    "\\\\server\\share\\evil",
    "evil:stream",
    "CON",
    "aux.txt",
    "..",
    ".",
    "~",
    ".bashrc",
    "-rf",
    "trap.txt",
    "dangling.txt",
    "e" * 200,
]


async def test_a_title_names_no_place_outside_the_downloads_and_follows_no_link_there(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    victim, downloads = honest.victim, honest.victim.home / "downloads"
    outside = honest.folder / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_bytes(b"precious")
    downloads.mkdir(exist_ok=True)
    (downloads / "trap.txt").symlink_to(outside / "precious.txt")
    (downloads / "dangling.txt").symlink_to(outside / "nothing.txt")
    (downloads / "Trap").symlink_to(outside, target_is_directory=True)
    wanted: dict[str, tuple[str, dict[str, bytes]]] = {}
    for name in NAMES:
        data = b"bytes of " + name.encode()
        for claims in ({}, {"details": (("name", name),)}):
            title = "Named elsewhere" if claims else name
            content = data + b"!" * len(claims)
            wanted[mallory.offer(content, title, "trapped", **claims).item.hex()] = (name, {"": content})
    mallory.store.blobs[EVIL_DIGEST] = LyingBlob(len(EVIL), hash_blob(EVIL)[1], EVIL)
    listed = folder_list([(("precious.txt",), len(EVIL), EVIL_DIGEST)])
    folder = mallory.offer(listed, "Trap", "trapped", kind=Kind.FOLDER).item.hex()
    wanted[folder] = ("Trap", {"precious.txt": EVIL})
    await asyncio.to_thread(
        wait_until, victim, lambda: len(search_all(victim, "trapped")) == len(wanted), "all titles"
    )
    for item in wanted:
        get(victim, item)
    for item, (name, files) in wanted.items():
        path = Path((await asyncio.to_thread(wait_got, victim, item))["path"])
        assert path.parent == downloads, name
        assert not path.name.startswith("."), name
        assert tree(path) == files, name
    assert tree(outside) == {"precious.txt": b"precious"}
    assert not [path for path in downloads.iterdir() if path.name.upper().split(".")[0] in ("CON", "AUX")]


async def test_what_is_packed_stays_packed(honest: Honest, serving: None, mallory: Mallory) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../evil.txt", b"0" * (128 * CHUNK_BYTES))
    item = mallory.offer(packed.getvalue(), "holiday.zip", "holiday", media_type="application/zip").item.hex()
    await finds(honest.victim, "holiday")
    get(honest.victim, item)
    path = Path((await asyncio.to_thread(wait_got, honest.victim, item))["path"])
    assert tree(path) == {"": packed.getvalue()}
    assert [each.name for each in path.parent.iterdir() if "holiday" in each.name] == ["holiday.zip"]
    assert home_bytes(honest.victim) < 64 * CHUNK_BYTES


# --- descriptions ---------------------------------------------------------------------------------------
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "another size": {"size_bytes": 1000},
    "a folder": {"kind": Kind.FOLDER},
}


def describe_wrongly(honest: Honest, mallory: Mallory, word: str, **lie: Any) -> tuple[str, bytes]:
    """What the witness shares, the other claims to be something else, as the last word on it."""
    data = f"what is meant by {word}".encode() * 100
    path = honest.folder / f"{word}.txt"
    path.write_bytes(data)
    item = share(honest.witness, path, title="As it is", tags=[word])["item"]
    claims = {"size_bytes": len(data), "day": DAY + 1}
    (batch,) = mallory.publish(Feed.CATALOGUE, shared(bytes.fromhex(item), "As it is not", word, **claims))
    mallory.say_next(with_entry(mallory, batch, **lie))
    return item, data


@pytest.mark.parametrize("name", DESCRIPTIONS)
async def test_who_describes_anothers_item_wrongly_takes_it_from_nobody(
    honest: Honest, serving: None, mallory: Mallory, name: str
) -> None:
    """A digest proves bytes, and nothing proves what anybody says of them."""
    word = name.replace(" ", "")
    item, data = describe_wrongly(honest, mallory, word, **DESCRIPTIONS[name])

    def both() -> bool:
        found = results(honest.victim, word)
        return bool(found) and len(found[0]["sharers"]) == 2

    await asyncio.to_thread(wait_until, honest.victim, both, "both who describe it")
    assert titles(honest.victim, word) == ["As it is not"]
    open_result(honest.victim, word, "As it is not")
    got = await asyncio.to_thread(wait_got, honest.victim, item)
    assert tree(Path(got["path"])) == {"": data}


async def test_nobody_makes_a_link_of_anothers_item(honest: Honest, serving: None, mallory: Mallory) -> None:
    before = refused(honest.victim, Reason.MALFORMED)
    item, _ = describe_wrongly(
        honest, mallory, "linked", kind=Kind.LINK, size_bytes=0, uri="https://elsewhere.example"
    )
    await wait_refused(honest.victim, Reason.MALFORMED, before)
    await finds(honest.victim, "linked")
    assert open_result(honest.victim, "linked", "As it is")["state"] != "link"
    await asyncio.to_thread(wait_got, honest.victim, item)


# --- words ----------------------------------------------------------------------------------------------
WORDS = [
    "'; DROP TABLE shares; --",
    '" OR "1"="1',
    'x") UNION SELECT body FROM entries; --',
    "NEAR(odd words, 5) AND NOT *",
    "text : ^odd* + {a b}",
    "[bold red]odd[/bold red] [link=https://odd.example]odd[/link]",
    "[/] [not closed",
    "\\x1b[31m \\u001b %s %n {0} ${PATH} $(reboot) `reboot`",
    "null\u200b\ufeff\U000e0001 zero width",
    "--json --help",
]


async def test_words_of_strangers_are_words_for_the_database_the_terminal_and_json(
    honest: Honest, serving: None, mallory: Mallory
) -> None:
    victim = honest.victim
    for at, words in enumerate(WORDS):
        entry = shared(
            bytes([at]) * 32, words, "oddity", creator=words, details=(("total_bytes", "9" * 240),)
        )
        mallory.publish(Feed.CATALOGUE, replace(entry, tags=("oddity", words[:40])))
    found = await finds(victim, "oddity", len(WORDS))
    assert {result["title"] for result in found} == set(WORDS)
    for words in WORDS:
        if tokens(words):
            assert words in titles(victim, words)
    assert len(results(victim, "oddity")) == len(WORDS), "no query has changed anything"

    own = honest.folder / f"oddity {ESCAPES[:-1]}.txt"
    own.write_bytes(b"a name of one's own")
    share(victim, own)
    for command in (("search", "oddity"), ("library", "--limit", "1000"), ("library", "--mine")):
        shown = (await run(victim, *command)).decode()
        assert "oddity" in shown
        assert not escapes_in(shown), command
        rows = json.loads(await run(victim, *command, "--json"))
        assert rows[{"search": "results"}.get(command[0], "items")]
        if command != ("library", "--mine"):
            assert "[bold red]odd[/bold red] [link=https://odd.example]odd[/link]" in shown
    said = await asyncio.to_thread(
        covey, victim.home, "share", f"none{ESCAPES}", "--home", str(victim.home), code=2
    )
    assert not escapes_in(said.stderr.decode())


async def run(node: LocalNode, *words: str) -> bytes:
    return (await asyncio.to_thread(covey, node.home, *words, "--home", str(node.home))).stdout
