"""One address tried as a newcomer would: what answers at the port, and what a covey node there says to a greeting.

Belongs here: dialling, greeting, and leaving again without a trace. What the answers mean, `node/doctor.py` says.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from node.identity import peer_id_of
from node.ports import NetworkEvent
from node.signatures import Ed25519Signatures
from protocols.admission import Admission
from protocols.errors import PeerError
from protocols.events import DialFailed, LinkDown, LinkUp, Received, Rejected
from protocols.messages import Hello, Probe, Probed, Refuse
from protocols.signing import sign_record
from protocols.view import mismatch
from protocols.vocabulary import PROTOCOL_VERSION, PeerId, PeerRecord, Reason, SchemaHash, peer_of

GREETING_TIMEOUT_S = 12.0
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 2.0
MULTISTREAM = b"\x13/multistream/1.0.0\n"
"""What both ends of a libp2p connection say first."""


class Caller(Struct, frozen=True):
    """In whose name a peer is greeted. psk: as `network.psk`."""

    key: Ed25519PrivateKey
    network: str
    learning: str
    task: str
    schema: SchemaHash
    admission: Admission | None = None
    psk: str | None = None

    def hello(self) -> Hello:
        """Of one who does not stay: a first record, which says that it has left, brings nobody into anyone's view."""
        record = PeerRecord(peer_id_of(self.key), (), left=True)
        return Hello(
            version=PROTOCOL_VERSION,
            network=self.network,
            learning=self.learning,
            task=self.task,
            schema=self.schema,
            record=sign_record(self.network, record, Ed25519Signatures(self.key)),
            brief=True,
            admission=self.admission,
        )


async def first_words(host: str, port: int) -> bytes:
    """What answers at a TCP port when it is spoken to as libp2p does; empty where nothing comes.

    Raises:
        TimeoutError: nobody takes the connection. OSError: it cannot be made.
    """
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, port)
    try:
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(MULTISTREAM)
                return await reader.read(256)
        return b""
    finally:
        writer.close()


async def greet(address: str, caller: Caller) -> Sequence[NetworkEvent]:
    """All that comes of a greeting, up to the peer's first word on it: a refusal, or an answer as it gives to those that it
    has let in."""
    from node.libp2p_network import Libp2pNetwork
    from node.store import BlobStore

    events: list[NetworkEvent] = []
    settled = asyncio.Event()
    hello = caller.hello()
    network: Libp2pNetwork

    def deliver(event: NetworkEvent) -> None:
        events.append(event)
        match event:
            case LinkUp(peer):
                network.send(peer, hello)
                # Whoever was let in is told at once whether this peer can be reached, which it is.
                network.send(peer, Probe(1, hello.record.peer))
            case Received(_, Probed() | Refuse()) | DialFailed() | LinkDown() | Rejected():
                settled.set()
            case Received(_, Hello() as theirs) if mismatch(hello, theirs):
                settled.set()
            case _:
                return

    with tempfile.TemporaryDirectory() as folder:
        network = Libp2pNetwork(
            caller.key,
            ["/ip4/127.0.0.1/tcp/0"],
            BlobStore(Path(folder), _refuse_all),
            deliver,
            psk=caller.psk,
        )
        await network.start()
        network.dial(address)
        with suppress(TimeoutError):
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await settled.wait()
        network.disconnect(peer_of(address) or PeerId(""), Reason.LEAVING)
        await network.stop()
    return events


def _refuse_all(path: Path) -> None:
    raise PeerError(Reason.IDLE, "the doctor takes no models")
