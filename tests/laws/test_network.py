"""The promises of the `Network` port, kept by the simulated and by the libp2p network alike."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.libp2p_network import Libp2pNetwork
from node.ports import Network, NetworkEvent
from node.store import BlobStore
from protocols.blob import hash_blob
from protocols.errors import PeerError
from protocols.events import DialFailed, Fetched, FetchFailed, LinkDown, LinkUp, Received, Rejected
from protocols.messages import Bye, Heartbeat, Refuse
from protocols.vocabulary import CHUNK_BYTES, Digest, ModelRef, PeerId, Reason
from sim.clock import VirtualClock
from sim.links import LinkSettings, SimNetwork, sim_address

BAD = b"not a model"
"""The gate of every node in these tests refuses a blob that begins with this."""


def gate(data: bytes) -> None:
    if data.startswith(BAD):
        raise PeerError(Reason.WRONG_FORMAT, "refused by the gate")


class Node(Protocol):
    """One node under test: its network, what it heard, what it holds."""

    peer: PeerId
    address: str
    network: Network
    heard: list[NetworkEvent]

    def serve(self, data: bytes) -> ModelRef: ...

    def held(self, ref: ModelRef) -> bytes | None: ...


class World(Protocol):
    async def node(self) -> Node: ...

    async def until(self, condition: Callable[[], bool]) -> None: ...

    async def vanish(self, node: Node) -> None: ...

    async def settle(self) -> None: ...


class SimulatedNode:
    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.address = sim_address(peer)
        self.heard: list[NetworkEvent] = []
        self.network: Any = None

    def serve(self, data: bytes) -> ModelRef:
        digest, _ = hash_blob(data)
        self.network.endpoint.held[digest] = data
        return ModelRef(digest, len(data), 1, 10)

    def held(self, ref: ModelRef) -> bytes | None:
        return self.network.endpoint.held.get(Digest(ref.digest))


class SimulatedWorld:
    def __init__(self, tmp_path: Path) -> None:
        self._clock = VirtualClock()
        self._net = SimNetwork(self._clock, LinkSettings(jitter_s=0.01), random.Random(1))
        self._names = iter(f"peer{number}" for number in range(100))

    async def node(self) -> SimulatedNode:
        node = SimulatedNode(PeerId(next(self._names)))
        node.network = self._net.join(node.peer, node.heard.append, lambda ref, data: gate(data))  # type: ignore[arg-type]
        return node

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self._clock.step(), "nothing is due any more, and the condition does not hold"

    async def vanish(self, node: SimulatedNode) -> None:
        self._net.leave(node.peer)

    async def settle(self) -> None:
        while self._clock.step():
            pass

    async def close(self) -> None:
        pass


class RealNode:
    def __init__(self, home: Path, changed: Callable[[], None]) -> None:
        def admit(path: Path) -> None:
            gate(path.read_bytes())

        home.mkdir()
        self.heard: list[NetworkEvent] = []
        self.store = BlobStore(home, admit)
        self._changed = changed
        self.network = Libp2pNetwork(
            Ed25519PrivateKey.generate(), ["/ip4/127.0.0.1/tcp/0"], self.store, self._hear
        )
        self.peer = PeerId("")
        self.address = ""

    def _hear(self, event: NetworkEvent) -> None:
        self.heard.append(event)
        self._changed()

    def serve(self, data: bytes) -> ModelRef:
        return self.store.save(data, 1, 10)

    def held(self, ref: ModelRef) -> bytes | None:
        blob = self.store.get(ref.digest)
        return blob.path.read_bytes() if blob else None


class RealWorld:
    def __init__(self, tmp_path: Path) -> None:
        self._folder = tmp_path
        self._nodes: list[RealNode] = []
        self._count = 0
        self._changed = asyncio.Event()

    async def node(self) -> RealNode:
        self._count += 1
        node = RealNode(self._folder / f"node{self._count}", self._changed.set)
        self._nodes.append(node)
        (node.address, *_) = await node.network.start()
        node.peer = node.network.me
        return node

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def vanish(self, node: RealNode) -> None:
        self._nodes.remove(node)
        await node.network.stop()

    async def settle(self) -> None:
        """A last word on every link, both ways: whatever was under way before it has arrived."""
        peers = {node.peer for node in self._nodes}
        pairs = [
            (node, event.peer) for node in self._nodes for event in of(LinkUp, node) if event.peer in peers
        ]
        for node, peer in pairs:
            node.network.send(peer, Bye())
        await self.until(lambda: all(Received(peer, Bye()) in node.heard for node, peer in pairs))

    async def close(self) -> None:
        for node in self._nodes:
            await node.network.stop()


@pytest.fixture(params=[SimulatedWorld, RealWorld], ids=["simulated", "libp2p"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    world = request.param(tmp_path)
    yield world
    await world.close()


def of(kind: type, node: Node) -> list[Any]:
    return [event for event in node.heard if isinstance(event, kind)]


async def linked(world: World) -> tuple[Node, Node]:
    """Two nodes with a link, dialled by the first."""
    a, b = await world.node(), await world.node()
    a.network.dial(b.address)
    await world.until(lambda: bool(of(LinkUp, a) and of(LinkUp, b)))
    return a, b


async def test_a_dial_links_both_ends_and_tells_who_dialled(world: World) -> None:
    a, b = await linked(world)
    assert of(LinkUp, a) == [LinkUp(b.peer, True, b.address)]
    assert of(LinkUp, b) == [LinkUp(a.peer, False, "")]


async def test_a_dial_to_nobody_fails_and_says_which_address(world: World) -> None:
    a, b = await world.node(), await world.node()
    await world.vanish(b)
    a.network.dial(b.address)
    await world.until(lambda: bool(a.heard))
    (failure,) = a.heard
    assert isinstance(failure, DialFailed)
    assert (failure.address, failure.reason) == (b.address, Reason.UNREACHABLE)
    assert failure.detail


async def test_an_address_without_a_peer_id_fails_at_once(world: World) -> None:
    a = await world.node()
    a.network.dial("/ip4/127.0.0.1/tcp/9")
    await world.until(lambda: bool(a.heard))
    assert [type(event) for event in a.heard] == [DialFailed]


async def test_a_failed_dial_can_be_tried_again_at_once(world: World) -> None:
    a, gone, b = await world.node(), await world.node(), await world.node()
    await world.vanish(gone)
    for count in (1, 2):
        a.network.dial(gone.address)
        await world.until(lambda: len(of(DialFailed, a)) == count)  # noqa: B023
    a.network.dial(b.address)
    await world.until(lambda: bool(of(LinkUp, a)))


async def test_messages_arrive_whole_in_order_and_once(world: World) -> None:
    a, b = await linked(world)
    sent = [Heartbeat(number, True) for number in range(300)]
    for message in sent:
        a.network.send(b.peer, message)
        b.network.send(a.peer, message)
    await world.until(lambda: len(of(Received, a)) >= 300 and len(of(Received, b)) >= 300)
    await world.settle()
    for node in (a, b):
        assert [e.message for e in of(Received, node) if isinstance(e.message, Heartbeat)] == sent


async def test_a_second_dial_of_a_linked_peer_makes_no_second_link(world: World) -> None:
    a, b = await linked(world)
    a.network.dial(b.address)
    a.network.send(b.peer, Heartbeat(1, True))
    await world.until(lambda: bool(of(Received, b)))
    await world.settle()
    assert len(of(LinkUp, a)) == len(of(LinkUp, b)) == 1


async def test_two_that_dial_each_other_at_once_end_with_one_link_that_works(world: World) -> None:
    a, b = await world.node(), await world.node()
    a.network.dial(b.address)
    b.network.dial(a.address)

    def up(node: Node) -> bool:
        return len(of(LinkUp, node)) == len(of(LinkDown, node)) + 1

    await world.until(lambda: up(a) and up(b))

    def heard_last(node: Node) -> bool:
        return any(event.message == Heartbeat(7, True) for event in of(Received, node))

    def both_heard() -> bool:
        return heard_last(a) and heard_last(b)

    def num_down() -> int:
        return len(of(LinkDown, a)) + len(of(LinkDown, b))

    # A link that is about to be replaced may swallow a word; the one that stays does not.
    while not both_heard():
        before = num_down()
        a.network.send(b.peer, Heartbeat(7, True))
        b.network.send(a.peer, Heartbeat(7, True))
        await world.until(lambda: both_heard() or (num_down() > before and up(a) and up(b)))  # noqa: B023
    assert up(a)
    assert up(b)
    for node in (a, b):
        assert all(event.reason in (Reason.DUPLICATE, Reason.LINK) for event in of(LinkDown, node))


async def test_what_was_sent_before_a_disconnect_arrives_before_the_link_ends(world: World) -> None:
    a, b = await linked(world)
    for number in range(50):
        a.network.send(b.peer, Heartbeat(number, True))
    a.network.send(b.peer, Refuse(Reason.TASK, "the last word"))
    a.network.disconnect(b.peer, Reason.TASK)
    await world.until(lambda: bool(of(LinkDown, a) and of(LinkDown, b)))
    received = [event.message for event in of(Received, b)]
    assert received == [
        *(Heartbeat(number, True) for number in range(50)),
        Refuse(Reason.TASK, "the last word"),
    ]
    assert [event.reason for event in of(LinkDown, a)] == [Reason.TASK]
    assert b.heard.index(of(LinkDown, b)[0]) == len(b.heard) - 1


async def test_a_closed_link_can_be_dialled_again(world: World) -> None:
    a, b = await linked(world)
    a.network.disconnect(b.peer, Reason.LEAVING)
    await world.until(lambda: bool(of(LinkDown, a) and of(LinkDown, b)))
    b.network.dial(a.address)
    await world.until(lambda: len(of(LinkUp, a)) == 2 and len(of(LinkUp, b)) == 2)
    b.network.send(a.peer, Heartbeat(3, True))
    await world.until(lambda: bool(of(Received, a)))


async def test_the_end_of_a_vanished_peer_is_told_once(world: World) -> None:
    a, b = await linked(world)
    await world.vanish(b)
    await world.until(lambda: bool(of(LinkDown, a)))
    a.network.send(b.peer, Heartbeat(1, True))
    a.network.disconnect(b.peer, Reason.SILENT)
    c = await world.node()
    a.network.dial(c.address)
    await world.until(lambda: len(of(LinkUp, a)) == 2)
    assert len(of(LinkDown, a)) == 1


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
async def test_a_fetch_brings_the_exact_bytes(world: World, size: int) -> None:
    a, b = await linked(world)
    data = random.Random(size).randbytes(size)
    ref = b.serve(data)
    a.network.fetch(1, b.peer, ref)
    await world.until(lambda: bool(of(Fetched, a)))
    assert a.held(ref) == data
    assert of(Fetched, a) == [Fetched(1)]


async def test_both_ends_of_a_link_can_fetch_at_once(world: World) -> None:
    a, b = await linked(world)
    of_a, of_b = a.serve(b"a" * 100_000), b.serve(b"b" * 100_000)
    a.network.fetch(1, b.peer, of_b)
    b.network.fetch(1, a.peer, of_a)
    await world.until(lambda: bool(of(Fetched, a) and of(Fetched, b)))
    assert a.held(of_b) == b"b" * 100_000
    assert b.held(of_a) == b"a" * 100_000


async def test_a_fetch_of_what_the_peer_does_not_hold_is_answered_gone(world: World) -> None:
    a, b = await linked(world)
    digest, _ = hash_blob(b"never seen")
    a.network.fetch(9, b.peer, ModelRef(digest, 10, 1, 1))
    await world.until(lambda: bool(of(FetchFailed, a)))
    assert [(e.token, e.reason) for e in of(FetchFailed, a)] == [(9, Reason.GONE)]


async def test_what_the_gate_refuses_is_not_held_and_says_why(world: World) -> None:
    a, b = await linked(world)
    ref = b.serve(BAD + os.urandom(100))
    a.network.fetch(4, b.peer, ref)
    await world.until(lambda: bool(of(FetchFailed, a)))
    (failure,) = of(FetchFailed, a)
    assert (failure.token, failure.reason, failure.detail) == (4, Reason.WRONG_FORMAT, "refused by the gate")
    assert a.held(ref) is None


async def test_a_fetch_without_a_link_fails(world: World) -> None:
    a, b = await world.node(), await world.node()
    a.network.fetch(2, b.peer, b.serve(b"data"))
    await world.until(lambda: bool(of(FetchFailed, a)))
    assert [(e.token, e.reason) for e in of(FetchFailed, a)] == [(2, Reason.LINK)]


# --- a fetch from several peers ---------------------------------------------------------------------------
async def holders(world: World, count: int, data: bytes) -> tuple[Node, list[Node], ModelRef]:
    """A node that is linked to others, each of which holds the same model."""
    a, *others = [await world.node() for _ in range(count + 1)]
    for other in others:
        a.network.dial(other.address)
        ref = other.serve(data)
    await world.until(lambda: len(of(LinkUp, a)) == count and all(of(LinkUp, other) for other in others))
    return a, others, ref


def peers(nodes: list[Node]) -> tuple[PeerId, ...]:
    return tuple(node.peer for node in nodes)


def answers(node: Node) -> list[Any]:
    return [event for event in node.heard if isinstance(event, Fetched | FetchFailed | Rejected)]


@pytest.mark.parametrize("size", [1, CHUNK_BYTES + 1, 7 * CHUNK_BYTES + 5])
async def test_a_fetch_from_several_brings_the_exact_bytes_and_one_answer(world: World, size: int) -> None:
    data = random.Random(size).randbytes(size)
    a, others, ref = await holders(world, 3, data)
    first, *rest = peers(others)
    a.network.fetch(1, first, ref, rest)
    await world.until(lambda: bool(answers(a)))
    await world.settle()
    assert answers(a) == [Fetched(1)]
    assert a.held(ref) == data


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_it_goes_on_without_one_that_does_not_hold_the_model(world: World, place: int) -> None:
    data = random.Random(1).randbytes(5 * CHUNK_BYTES)
    a, others, ref = await holders(world, 2, data)
    empty = await world.node()
    a.network.dial(empty.address)
    await world.until(lambda: len(of(LinkUp, a)) == 3)
    others.insert(place, empty)
    first, *rest = peers(others)
    a.network.fetch(1, first, ref, rest)
    await world.until(lambda: bool(answers(a)))
    assert answers(a) == [Fetched(1)]
    assert a.held(ref) == data


@pytest.mark.parametrize("place", [0, 1])
async def test_it_goes_on_without_one_that_is_not_linked(world: World, place: int) -> None:
    a, others, ref = await holders(world, 1, b"data")
    others.insert(place, await world.node())
    first, *rest = peers(others)
    a.network.fetch(1, first, ref, rest)
    await world.until(lambda: bool(answers(a)))
    assert answers(a) == [Fetched(1)]
    assert a.held(ref) == b"data"


async def test_it_goes_on_without_one_that_leaves(world: World) -> None:
    data = random.Random(2).randbytes(20 * CHUNK_BYTES)
    a, others, ref = await holders(world, 3, data)
    first, *rest = peers(others)
    a.network.fetch(1, first, ref, rest)
    a.network.disconnect(rest[0], Reason.LEAVING)
    await world.until(lambda: bool(answers(a)))
    assert answers(a) == [Fetched(1)]
    assert a.held(ref) == data


async def test_it_fails_once_when_none_holds_the_model(world: World) -> None:
    a, others, _ = await holders(world, 3, b"something else")
    digest, _ = hash_blob(b"never seen")
    first, *rest = peers(others)
    a.network.fetch(1, first, ModelRef(digest, 10, 1, 1), rest)
    await world.until(lambda: bool(answers(a)))
    await world.settle()
    assert [(e.token, e.reason) for e in answers(a)] == [(1, Reason.GONE)]


async def test_it_fails_once_when_none_is_linked(world: World) -> None:
    a, b, c = [await world.node() for _ in range(3)]
    a.network.fetch(1, b.peer, b.serve(b"data"), (c.peer,))
    await world.until(lambda: bool(answers(a)))
    assert [(e.token, e.reason) for e in answers(a)] == [(1, Reason.LINK)]


async def test_what_the_gate_refuses_is_refused_once_from_however_many(world: World) -> None:
    a, others, ref = await holders(world, 3, BAD + bytes(2 * CHUNK_BYTES))
    first, *rest = peers(others)
    a.network.fetch(1, first, ref, rest)
    await world.until(lambda: bool(answers(a)))
    await world.settle()
    assert [(e.token, e.reason) for e in answers(a)] == [(1, Reason.WRONG_FORMAT)]
    assert a.held(ref) is None
