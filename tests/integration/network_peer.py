"""Real networks in one process, and what each of them heard: for tests that need links and transfers, and no core."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.libp2p_network import Libp2pNetwork
from node.libp2p_transfer import Blobs
from node.ports import NetworkEvent
from protocols.events import LinkUp
from protocols.vocabulary import PeerId


class NetworkPeer:
    """A network over somebody's blobs. options: of the network."""

    patience_s = 60.0

    def __init__(self, blobs: Blobs, listen: str = "/ip4/127.0.0.1/tcp/0", **options: Any) -> None:
        self.heard: list[NetworkEvent] = []
        self.changed = asyncio.Event()
        self.crash: list[BaseException] = []
        self.address = ""
        self.network = Libp2pNetwork(
            Ed25519PrivateKey.generate(), [listen], blobs, self.hear, on_crash=self.crash.append, **options
        )

    @property
    def me(self) -> PeerId:
        return self.network.me

    def hear(self, event: NetworkEvent) -> None:
        self.heard.append(event)
        self.changed.set()

    def all(self, *kinds: type) -> list[NetworkEvent]:
        return [event for event in self.heard if isinstance(event, kinds)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(self.patience_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def stop(self) -> None:
        await self.network.stop()


P = TypeVar("P", bound=NetworkPeer)


@asynccontextmanager
async def network_peers(create: Callable[..., P]) -> AsyncIterator[Callable[..., Awaitable[P]]]:
    """Makes and starts peers; all are stopped at the end, and none may have crashed. create: of a number from 0 on."""
    peers: list[P] = []

    async def make(*args: Any) -> P:
        peer = create(len(peers), *args)
        peers.append(peer)
        (peer.address, *_) = await peer.network.start()
        return peer

    yield make
    for peer in peers:
        await peer.stop()
        assert not peer.crash


async def link(peer: NetworkPeer, *others: NetworkPeer) -> None:
    """Dial others; back when both sides of each link know."""
    for other in others:
        peer.network.dial(other.address)
    await peer.until(lambda: {e.peer for e in peer.all(LinkUp)} >= {other.me for other in others})  # type: ignore[union-attr]
    for other in others:
        await other.until(lambda: bool(other.all(LinkUp)))  # noqa: B023
