"""A real daemon among peers that break every rule: each attack is refused, counted by its reason, and survived."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from multiaddr import Multiaddr

from node.api import call
from node.cluster import Cluster, LocalNode, local_settings
from node.identity import peer_id_of
from node.libp2p_network import FETCH, LINK, Libp2pNetwork, _make_host
from node.ports import NetworkEvent
from node.signatures import Ed25519Signatures
from node.store import Blob, BlobStore
from node.task_loading import make_task
from node.tasks import initial_params
from node.weights import encode_params, schema_hash, schema_of
from protocols.codec import encode, link_decoder
from protocols.events import LinkDown, LinkUp, Received
from protocols.messages import Decline, Heartbeat, Hello, LinkMessage, Message, Offer, Peers, Refuse, Shuffle
from protocols.signing import sign_record
from protocols.vocabulary import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    ModelRef,
    PeerId,
    PeerRecord,
    Reason,
    SchemaHash,
)

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(180)]

TASK = make_task("digits", {}, Path())
PARAMS = initial_params(TASK, 3)
SCHEMA = schema_hash(TASK.name, schema_of(PARAMS))


def said_by(key: Ed25519PrivateKey, peer: str = "", **fields: Any) -> PeerRecord:
    """What the owner of a key says of itself, or claims of another."""
    record = PeerRecord(PeerId(peer or peer_id_of(key)), (), **fields)
    return sign_record("hostile", record, Ed25519Signatures(key))


def hello(
    key: Ed25519PrivateKey,
    network: str = "hostile",
    task: str = TASK.name,
    schema: SchemaHash = SCHEMA,
) -> Hello:
    return Hello(PROTOCOL_VERSION, network, "gossip", task, schema, said_by(key), False, None)


def greeted(key: Ed25519PrivateKey, *messages: LinkMessage) -> bytes:
    return b"".join(map(encode, (hello(key), *messages)))


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One daemon for all attacks: what one attack leaves behind, the next one meets."""
    tables = local_settings(
        network={"name": "hostile"},
        learning={"pause_s": 0.1, "deadline_s": 0.5},
        task={"shard": {"index": 0, "count": 4}},
    )
    with Cluster() as cluster:
        node = cluster.add(tmp_path_factory.mktemp("victim"), tables)
        node.start()
        node.wait_until_up()
        yield node


def refused(node: LocalNode) -> dict[str, int]:
    status = node.status()
    assert status is not None, node.log()[-2000:]
    counts: dict[str, int] = status["refused"]
    return counts


async def wait_refused(node: LocalNode, reason: Reason, before: dict[str, int]) -> None:
    """Until the daemon's own metrics count one more refusal for this reason."""
    wanted = before.get(reason.value, 0) + 1
    await asyncio.to_thread(
        node.wait_for, lambda s: s["refused"].get(reason.value, 0) >= wanted, f"refusal {reason}"
    )
    assert f'covey_refused_total{{reason="{reason.value}"}}' in await asyncio.to_thread(
        call, node.home, "/metrics"
    )


def raw_attack(
    address: str,
    protocol: Any,
    script: Callable[[Any], Awaitable[None]],
    key: Ed25519PrivateKey | None = None,
) -> None:
    """Run `script` on a fresh stream to the daemon, on a host of our own."""

    async def main() -> None:
        host = _make_host(key or Ed25519PrivateKey.generate(), [], lambda detail: None)
        info = info_from_p2p_addr(Multiaddr(address))
        async with host.run(listen_addrs=[]):
            await host.get_network().dial_addr(info.addrs[0], info.peer_id)  # type: ignore[attr-defined]
            stream = await host.new_stream(info.peer_id, [protocol])
            with trio.move_on_after(10):
                await script(stream)

    trio.run(main)


async def read_to_end(stream: Any) -> list[Message]:
    """Everything the daemon says until it ends the stream."""
    decoder, heard = link_decoder(), []
    while True:
        try:
            data = await stream.read(65536)
        except Exception:
            return heard
        heard += list(decoder.feed(data))


Make = Callable[[Ed25519PrivateKey], bytes]
"""What an attacker says, given its key."""


async def attack_link(victim: LocalNode, make: Make, close: bool = False) -> list[Message]:
    heard: list[Message] = []
    key = Ed25519PrivateKey.generate()

    async def script(stream: Any) -> None:
        await stream.write(make(key))
        if close:
            await stream.close_write()
        heard.extend(await read_to_end(stream))

    await asyncio.to_thread(raw_attack, victim.address(), LINK, script, key)
    return heard


STRANGER = Ed25519PrivateKey.generate()


def frame(*items: object) -> bytes:
    """An array that our own messages cannot hold."""
    body = msgspec.msgpack.encode(items)
    return struct.pack(">I", len(body) + 1) + bytes([PROTOCOL_VERSION]) + body


FRAMES: dict[str, tuple[bytes | Make, Reason]] = {
    "oversized frame": (struct.pack(">I", MAX_FRAME_BYTES + 1) + b"x" * 100, Reason.OVERSIZED),
    "length of four gigabytes": (b"\xff\xff\xff\xff", Reason.OVERSIZED),
    "random bytes": (b"\x00\x00\x00\x40" + bytes([PROTOCOL_VERSION]) + bytes(range(63)), Reason.MALFORMED),
    "empty frame": (b"\x00\x00\x00\x00", Reason.MALFORMED),
    "deep nesting": (
        struct.pack(">I", 60_001) + bytes([PROTOCOL_VERSION]) + b"\x91" * 60_000,
        Reason.MALFORMED,
    ),
    "another wire version": (struct.pack(">I", 5) + b"\x63\x91\xa3bye", Reason.VERSION),
    "a message before the greeting": (encode(Heartbeat(1, True)), Reason.GREETING),
    "two greetings": (lambda key: encode(hello(key)) * 2, Reason.GREETING),
    "another network": (lambda key: encode(hello(key, network="elsewhere")), Reason.NETWORK),
    "another task": (lambda key: encode(hello(key, task="cats")), Reason.TASK),
    "another schema": (lambda key: encode(hello(key, schema=SchemaHash(b"s" * 32))), Reason.SCHEMA),
    "a stolen record": (lambda key: encode(hello(STRANGER)), Reason.FORGED),
    "a record that it signed for another": (
        lambda key: greeted(key, Peers((said_by(key, peer_id_of(STRANGER)),))),
        Reason.FORGED,
    ),
    "a forged leave": (
        lambda key: greeted(
            key, Shuffle((said_by(key, peer_id_of(STRANGER), incarnation=2**40, left=True),))
        ),
        Reason.FORGED,
    ),
    "a record without a signature": (
        lambda key: greeted(key, Peers((PeerRecord(peer_id_of(STRANGER), ()),))),
        Reason.FORGED,
    ),
    "a round of 2**60": (lambda key: greeted(key) + frame("beat", 2**60, True), Reason.MALFORMED),
    "an incarnation of 2**60": (
        lambda key: greeted(key) + frame("suspects", [[peer_id_of(STRANGER), 2**60]]),
        Reason.MALFORMED,
    ),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_bad_bytes_on_a_link_are_refused_with_the_reason(victim: LocalNode, name: str) -> None:
    data, reason = FRAMES[name]
    before = refused(victim)
    heard = await attack_link(victim, (lambda key: data) if isinstance(data, bytes) else data)
    await wait_refused(victim, reason, before)
    refusals = [message for message in heard if isinstance(message, Refuse)]
    assert [refusal.reason for refusal in refusals] == [reason]
    assert refusals[0].detail


async def test_what_another_signs_in_the_daemon_s_name_is_refused_and_changes_nothing(
    victim: LocalNode,
) -> None:
    before = refused(victim)
    for claim in ({"incarnation": 2**48}, {"incarnation": 1, "left": True}):
        heard = await attack_link(
            victim, lambda key, c=claim: greeted(key, Peers((said_by(key, victim.peer, **c),)))
        )
        assert [message.reason for message in heard if isinstance(message, Refuse)] == [Reason.FORGED]
    await wait_refused(victim, Reason.FORGED, {**before, "forged": before.get("forged", 0) + 1})
    (now,) = {
        m.record
        for m in await attack_link(victim, lambda key: encode(hello(key)) * 2)
        if isinstance(m, Hello)
    }
    assert not now.left
    assert now.incarnation < 2**40, "seconds since 1970"


async def test_a_view_full_of_invented_peers_is_bounded(victim: LocalNode) -> None:
    """All of them well signed, by keys made for it; the last frame ends the link."""

    def invented(key: Ed25519PrivateKey) -> bytes:
        told = [Peers(tuple(records[at : at + 16])) for at in range(0, len(records), 16)]
        return greeted(key, *told) + encode(hello(key))

    records = [said_by(Ed25519PrivateKey.generate()) for _ in range(400)]
    before = refused(victim)
    await attack_link(victim, invented)
    await wait_refused(victim, Reason.GREETING, before)
    known = await asyncio.to_thread(call, victim.home, "/peers")
    assert len(known) <= 64 + 40, "a quarter of 256, and those who came themselves"
    assert victim.running


async def test_a_refusal_for_another_network_names_both_networks(victim: LocalNode) -> None:
    heard = await attack_link(victim, lambda key: encode(hello(key, network="elsewhere")))
    (refusal,) = [message for message in heard if isinstance(message, Refuse)]
    assert "elsewhere" in refusal.detail
    assert "hostile" in refusal.detail


async def test_a_truncated_frame_is_refused(victim: LocalNode) -> None:
    before = refused(victim)
    await attack_link(victim, lambda key: encode(hello(key))[:20], close=True)
    await wait_refused(victim, Reason.TRUNCATED, before)


async def test_rubbish_on_a_fetch_stream_is_refused(victim: LocalNode) -> None:
    before = refused(victim)

    async def script(stream: Any) -> None:
        await stream.write(b"\x00\x00\x00\x20" + bytes([PROTOCOL_VERSION]) + os.urandom(31))
        await read_to_end(stream)

    await asyncio.to_thread(raw_attack, victim.address(), FETCH, script)
    await wait_refused(victim, Reason.MALFORMED, before)


async def test_a_plaintext_dial_is_refused_and_counted(victim: LocalNode) -> None:
    before, address = refused(victim), victim.address()

    async def main() -> None:
        pair = create_new_key_pair()
        host = new_host(key_pair=pair, sec_opt={PLAINTEXT_PROTOCOL_ID: InsecureTransport(pair)})
        info = info_from_p2p_addr(Multiaddr(address))
        async with host.run(listen_addrs=[]):
            with pytest.raises(Exception):  # noqa: B017, PT011 - the library's own kinds
                await host.get_network().dial_addr(info.addrs[0], info.peer_id)  # type: ignore[attr-defined]

    await asyncio.to_thread(trio.run, main)
    await wait_refused(victim, Reason.SECURITY, before)


class Liar:
    """A peer that greets as it should and then offers what it should not."""

    def __init__(self, folder: Path, victim: LocalNode) -> None:
        self.victim = victim
        self.store = BlobStore(folder, lambda path: None)
        self.heard: list[NetworkEvent] = []
        self._changed = asyncio.Event()
        self.key = Ed25519PrivateKey.generate()
        self.network = Libp2pNetwork(self.key, ["/ip4/127.0.0.1/tcp/0"], self.store, self._hear)

    def _hear(self, event: NetworkEvent) -> None:
        self.heard.append(event)
        self._changed.set()
        match event:
            case LinkUp(peer):
                self.network.send(peer, hello(self.key))
            case _:
                pass

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def greet(self) -> None:
        await self.network.start()
        self.network.dial(self.victim.address())
        await self.until(
            lambda: any(isinstance(e, Received) and isinstance(e.message, Hello) for e in self.heard)
        )

    def offer(self, ref: ModelRef) -> None:
        self.network.send(PeerId(self.victim.peer), Offer(ref))

    def heartbeat(self) -> None:
        self.network.send(PeerId(self.victim.peer), Heartbeat(1, True))


@pytest.fixture
async def liar(victim: LocalNode, tmp_path: Path) -> AsyncIterator[Liar]:
    liar = Liar(tmp_path, victim)
    await liar.greet()
    yield liar
    await liar.network.stop()


def nan_weights() -> bytes:
    params = {name: tensor.clone() for name, tensor in PARAMS.items()}
    next(iter(params.values())).view(-1)[5] = float("nan")
    return encode_params(params)


def wrong_shapes() -> bytes:
    first = next(iter(PARAMS))
    return encode_params({**PARAMS, first: torch.zeros(3, 3)})


def wrong_dtype() -> bytes:
    return encode_params(
        {name: tensor.double() if tensor.numel() < 700 else tensor for name, tensor in PARAMS.items()}
    )


MODELS = {
    "NaN weights": (nan_weights, Reason.NON_FINITE),
    "wrong shapes": (wrong_shapes, Reason.WRONG_SHAPE),
    "wrong dtypes": (wrong_dtype, Reason.WRONG_SHAPE),
    "a missing tensor": (lambda: encode_params(dict(list(PARAMS.items())[1:])), Reason.WRONG_SHAPE),
    "no safetensors at all": (lambda: b"\x00" * 500, Reason.WRONG_FORMAT),
    "a pickle": (lambda: b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 20, Reason.WRONG_FORMAT),
    "a header that claims a terabyte": (lambda: struct.pack("<Q", 2**40) + b"{}" * 200, Reason.WRONG_FORMAT),
}


@pytest.mark.parametrize("name", MODELS)
async def test_a_model_that_is_not_one_is_fetched_checked_and_refused(
    liar: Liar, victim: LocalNode, name: str
) -> None:
    make, reason = MODELS[name]
    before = refused(victim)
    liar.offer(liar.store.save(make(), 1, 100))
    await wait_refused(victim, reason, before)


async def test_a_lying_size_is_refused(liar: Liar, victim: LocalNode) -> None:
    before = refused(victim)
    ref = liar.store.save(encode_params(PARAMS), 1, 100)
    liar.offer(ModelRef(ref.digest, ref.size_bytes - 1, 1, 100))
    await wait_refused(victim, Reason.WRONG_SIZE, before)


async def test_an_offer_too_large_for_the_task_is_declined_before_a_byte_is_fetched(
    liar: Liar, victim: LocalNode
) -> None:
    before = refused(victim)
    liar.offer(ModelRef(os.urandom(32), 2**33, 1, 100))
    await wait_refused(victim, Reason.TOO_LARGE, before)
    await liar.until(
        lambda: any(isinstance(e, Received) and isinstance(e.message, Decline) for e in liar.heard)
    )


async def test_bytes_other_than_the_promised_ones_are_refused(liar: Liar, victim: LocalNode) -> None:
    before = refused(victim)
    ref = liar.store.save(encode_params(PARAMS), 1, 100)
    blob = liar.store.get(ref.digest)
    assert isinstance(blob, Blob)
    blob.path.write_bytes(os.urandom(ref.size_bytes))
    liar.offer(ref)
    await wait_refused(victim, Reason.WRONG_HASH, before)


async def test_a_flood_of_frames_and_links_leaves_the_memory_bounded_and_the_node_learning(
    victim: LocalNode,
) -> None:
    assert victim.pid is not None
    process = psutil.Process(victim.pid)
    before_bytes = process.memory_info().rss
    status = victim.status()
    assert status is not None

    key = Ed25519PrivateKey.generate()

    async def script(stream: Any) -> None:
        await stream.write(encode(hello(key)))
        burst = encode(Heartbeat(1, True)) * 2000
        for _ in range(20):
            await stream.write(burst)
        await stream.close_write()
        await read_to_end(stream)

    for _ in range(5):
        await asyncio.to_thread(raw_attack, victim.address(), LINK, script, key)
    growth = process.memory_info().rss - before_bytes
    assert growth < 64 * 2**20, f"the daemon grew by {growth / 2**20:.0f} MiB"
    await asyncio.to_thread(victim.wait_for, lambda s: s["round"] >= status["round"] + 3, "more rounds")
    assert victim.running
    last = victim.status()
    assert last is not None
    assert last["loop_lateness_ms_max"] < 2000


async def test_after_all_this_an_honest_peer_is_still_welcome(liar: Liar, victim: LocalNode) -> None:
    liar.offer(liar.store.save(encode_params(PARAMS), 1, 100))
    await asyncio.to_thread(victim.wait_for, lambda s: s["merged"] >= 1, "a merge of an honest model")
    assert not [event for event in liar.heard if isinstance(event, LinkDown)]
