"""A private network of real daemons among those who are not invited: refused, counted by the reason, and harmless.

Two honest daemons learn together by `sampled`; what one attack leaves behind, the next one meets, and after each the two are
still linked and their rounds go on.
"""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.api import call
from node.cluster import Cluster, LocalNode, free_port, local_settings
from node.doctor import examine
from node.identity import KEY_FILE, load_key, peer_id_of
from node.invitation import ADMISSION_FILE, admit, invite, load_admission, save_admission
from node.libp2p_network import LINK
from node.signatures import Ed25519Signatures
from node.task_loading import make_task
from node.tasks import initial_params
from node.weights import schema_hash, schema_of
from protocols.admission import Admission
from protocols.codec import encode
from protocols.messages import Heartbeat, Hello, LinkMessage, Message, Offer, Peers, Refuse
from protocols.signing import sign_record
from protocols.vocabulary import PROTOCOL_VERSION, ModelRef, PeerId, PeerRecord, Reason
from tests.integration.test_hostile import raw_attack, read_to_end

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(180)]

NETWORK = "private"
MAKER = Ed25519PrivateKey.generate()
TASK = make_task("digits", {}, Path())
SCHEMA = schema_hash(TASK.name, schema_of(initial_params(TASK, 0)))


def admission_for(
    key: Ed25519PrivateKey, expires_at: int = 0, inviter: Ed25519PrivateKey = MAKER
) -> Admission:
    """An invitation bound to a key, as `covey invite --for` and `covey join` make it."""
    own = Ed25519Signatures(key)
    invitation = invite(NETWORK, own.author, expires_at, Ed25519Signatures(inviter))
    return admit(invitation, own, peer_id_of(key))


def settings(index: int, port: int, bootstrap: list[str], **tables: Any) -> dict[str, Any]:
    return local_settings(
        network={
            "name": NETWORK,
            "inviters": [peer_id_of(MAKER)],
            "listen": [f"/ip4/127.0.0.1/tcp/{port}"],
            "bootstrap": bootstrap,
            **tables,
        },
        learning={"protocol": "sampled"},
        sampled={"sample_size": 2, "pause_s": 0.2, "ping_s": 1.0, "deadline_s": 5.0, "wait_for_members": 2},
        task={"shard": {"index": index, "count": 4}},
    )


class Private(NamedTuple):
    """Two who were invited: the one that is attacked, and a witness."""

    victim: LocalNode
    witness: LocalNode
    cluster: Cluster
    folder: Path

    def add(self, name: str, index: int, **network: Any) -> LocalNode:
        address = self.victim.address()
        return self.cluster.add(self.folder / name, settings(index, 0, [address], **network))


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Private]:
    folder = tmp_path_factory.mktemp("private")
    port = free_port()
    with Cluster() as cluster:
        victim = cluster.add(folder / "victim", settings(0, port, []))
        address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{victim.peer}"
        witness = cluster.add(folder / "witness", settings(1, 0, [address]))
        for node in (victim, witness):
            key = key_of(node)
            save_admission(node.home, admission_for(key))
            node.start()
        victim.wait_for(lambda s: s["live_peers"] == 1 and s["round"] >= 2, "a network that learns")
        yield Private(victim, witness, cluster, folder)


def key_of(node: LocalNode) -> Ed25519PrivateKey:
    return load_key(node.home / KEY_FILE)


@pytest.fixture
async def unharmed(private: Private) -> AsyncIterator[Callable[[], dict[str, int]]]:
    """After the attack the two are linked as before, and their rounds go on. Gives how often was refused so far."""
    before = status_of(private.victim)

    def refused() -> dict[str, int]:
        counts: dict[str, int] = before["refused"]
        return counts

    yield refused
    after = status_of(private.victim)
    assert after["round"] < 2**20, "no invented round is believed"
    await asyncio.to_thread(
        private.victim.wait_for, lambda s: s["round"] >= after["round"] + 2, "two rounds more", 30
    )
    rows = {row["peer"]: row["state"] for row in await asyncio.to_thread(call, private.victim.home, "/peers")}
    assert rows[private.witness.peer] == "live"
    log = private.victim.log()
    assert "the node broke" not in log
    assert f"link down                      live=0 peer={private.witness.peer}" not in log


def status_of(node: LocalNode) -> dict[str, Any]:
    status = node.status()
    assert status is not None, node.log()[-2000:]
    return status


async def wait_refused(node: LocalNode, reason: Reason, before: dict[str, int]) -> None:
    wanted = before.get(reason.value, 0) + 1
    await asyncio.to_thread(
        node.wait_for, lambda s: s["refused"].get(reason.value, 0) >= wanted, f"refusal {reason}", 30
    )


def said_by(key: Ed25519PrivateKey, peer: str = "", **fields: Any) -> PeerRecord:
    record = PeerRecord(PeerId(peer or peer_id_of(key)), (), **fields)
    return sign_record(NETWORK, record, Ed25519Signatures(key))


def hello(key: Ed25519PrivateKey, admission: Admission | None) -> bytes:
    return encode(
        Hello(PROTOCOL_VERSION, NETWORK, "sampled", TASK.name, SCHEMA, said_by(key), False, admission)
    )


async def say(victim: LocalNode, key: Ed25519PrivateKey, data: bytes) -> list[Message]:
    """Say this on a link of one's own, and hear the daemon out."""
    heard: list[Message] = []

    async def script(stream: Any) -> None:
        await stream.write(data)
        heard.extend(await read_to_end(stream))

    await asyncio.to_thread(raw_attack, victim.address(), LINK, script, key)
    return heard


# --- at the door ----------------------------------------------------------------------------------------
OTHER = Ed25519PrivateKey.generate()

KNOCKS: dict[str, tuple[Callable[[Ed25519PrivateKey], Admission | None], Reason]] = {
    "nothing to show": (lambda key: None, Reason.UNINVITED),
    "another's invitation": (lambda key: admission_for(OTHER), Reason.FORGED),
    "an invitation that has ended": (
        lambda key: admission_for(key, expires_at=int(time.time()) - 1),
        Reason.EXPIRED,
    ),
    "an end put off by the guest": (
        lambda key: msgspec.structs.replace(
            ended := admission_for(key, expires_at=1),
            invitation=msgspec.structs.replace(ended.invitation, expires_at=2**40),
        ),
        Reason.FORGED,
    ),
    "invited by oneself": (lambda key: admission_for(key, inviter=key), Reason.UNINVITED),
}


@pytest.mark.parametrize("name", KNOCKS)
async def test_who_is_not_invited_is_told_why_and_counted(
    private: Private, unharmed: Callable[[], dict[str, int]], name: str
) -> None:
    make, reason = KNOCKS[name]
    key = Ed25519PrivateKey.generate()
    heard = await say(private.victim, key, hello(key, make(key)))
    assert [message.reason for message in heard if isinstance(message, Refuse)] == [reason]
    await wait_refused(private.victim, reason, unharmed())


THIEVES: dict[str, tuple[Callable[[Private, LocalNode], None], str, str]] = {
    "uninvited": (lambda private, node: None, "uninvited: this network is private", "covey invite --for"),
    "stolen": (
        lambda private, node: save_admission(node.home, stolen(private.witness)),
        "forged: the invitation was not made for this peer",
        "of no use here",
    ),
    "expired": (
        lambda private, node: save_admission(node.home, admission_for(key_of(node), expires_at=1_000_000)),
        "expired: the invitation has expired",
        "set the clock",
    ),
}


def stolen(owner: LocalNode) -> Admission:
    admission = load_admission(owner.home)
    assert admission is not None
    return admission


@pytest.mark.parametrize("name", THIEVES)
async def test_a_daemon_that_was_not_invited_learns_nothing_and_its_doctor_says_why(
    private: Private, unharmed: Callable[[], dict[str, int]], name: str
) -> None:
    steal, told, remedy = THIEVES[name]
    node = private.add(name, 2)
    steal(private, node)
    node.start()
    try:
        await asyncio.to_thread(node.wait_until_up)
        await wait_refused(private.victim, Reason(told.partition(":")[0]), unharmed())

        def is_told(status: dict[str, Any]) -> bool:
            (row,) = call(node.home, "/peers")
            return (
                row["last_reason"].startswith(f"refused by peer, {told}")
                and "no link to anybody" in node.log()
            )

        await asyncio.to_thread(node.wait_for, is_told, "the reason in `covey peers` and the log", 30)
        running = {finding.step: finding for finding in await asyncio.to_thread(examine, node.home)}
        at_door = running[f"bootstrap {private.victim.address()}"]
        assert (at_door.outcome, running["invitation"].outcome) == ("failed", "failed")
        assert f"the running node was told: refused by peer, {told}" in at_door.detail
        assert remedy in at_door.remedy
        await asyncio.to_thread(node.wait_for, lambda s: s["live_peers"] == 0, "the end of the link")
    finally:
        await asyncio.to_thread(node.stop)
    *_, invitation, at_door = await asyncio.to_thread(examine, node.home)
    assert invitation.detail.startswith(told)
    assert at_door.detail.startswith(f"it refuses us, {told}")
    assert remedy in at_door.remedy
    if name == "stolen":
        assert (node.home / ADMISSION_FILE).read_bytes() == (
            private.witness.home / ADMISSION_FILE
        ).read_bytes()


# --- inside ---------------------------------------------------------------------------------------------
def frame(*items: object) -> bytes:
    """An array that our own messages cannot hold."""
    body = msgspec.msgpack.encode(items)
    return struct.pack(">I", len(body) + 1) + bytes([PROTOCOL_VERSION]) + body


def inside(key: Ed25519PrivateKey, *messages: LinkMessage) -> bytes:
    """A guest that was invited, and lies."""
    return hello(key, admission_for(key)) + b"".join(map(encode, messages))


@pytest.mark.parametrize("kind", ["signed by the liar", "not signed", "an old word, changed"])
async def test_nobody_can_say_that_another_has_left(
    private: Private, unharmed: Callable[[], dict[str, int]], kind: str
) -> None:
    key, witness = Ed25519PrivateKey.generate(), private.witness.peer
    leave = PeerRecord(PeerId(witness), (), incarnation=2**40, left=True)
    if kind == "signed by the liar":
        leave = said_by(key, witness, incarnation=2**40, left=True)
    elif kind == "an old word, changed":
        genuine = said_by(key_of(private.witness), incarnation=2**39)
        leave = msgspec.structs.replace(genuine, incarnation=2**40, left=True)
    heard = await say(private.victim, key, inside(key, Peers((leave,))))
    assert [message.reason for message in heard if isinstance(message, Refuse)] == [Reason.FORGED]
    await wait_refused(private.victim, Reason.FORGED, unharmed())


async def test_a_view_full_of_invented_peers_is_bounded_and_pushes_nobody_out(
    private: Private, unharmed: Callable[[], dict[str, int]]
) -> None:
    """All of them well signed, by keys made for it. The second greeting at the end has the daemon end the link."""
    key = Ed25519PrivateKey.generate()
    records = [said_by(Ed25519PrivateKey.generate(), incarnation=2**30) for _ in range(600)]
    told = [Peers(tuple(records[at : at + 16])) for at in range(0, len(records), 16)]
    await say(private.victim, key, inside(key, *told) + hello(key, admission_for(key)))
    await wait_refused(private.victim, Reason.GREETING, unharmed())
    known = await asyncio.to_thread(call, private.victim.home, "/peers")
    assert private.witness.peer in {row["peer"] for row in known}
    assert len(known) <= 4096 // 4 + 40, "a quarter of what is remembered, and who came"


@pytest.mark.parametrize(
    "said",
    [
        lambda key: frame("beat", 2**60, True),
        lambda key: frame("offer", [b"d" * 32, 1000, 2**60, 10]),
        lambda key: frame("pong", 1, 2**60),
    ],
    ids=["beat", "offer", "pong"],
)
async def test_a_round_of_2_to_the_60_is_no_round(
    private: Private, unharmed: Callable[[], dict[str, int]], said: Callable[[Any], bytes]
) -> None:
    key = Ed25519PrivateKey.generate()
    heard = await say(private.victim, key, inside(key) + said(key))
    assert [message.reason for message in heard if isinstance(message, Refuse)] == [Reason.MALFORMED]
    await wait_refused(private.victim, Reason.MALFORMED, unharmed())


async def test_a_round_of_2_to_the_47_is_believed_by_nobody(
    private: Private, unharmed: Callable[[], dict[str, int]]
) -> None:
    """It can be written, and so it is heard; a second greeting ends the link."""
    key = Ed25519PrivateKey.generate()
    far = 2**47
    lies = (
        Heartbeat(far, True),
        Offer(ModelRef(b"d" * 32, 1000, far, 10)),
        Peers((said_by(key, incarnation=2**31, round=far),)),
    )
    await say(private.victim, key, inside(key, *lies) + hello(key, admission_for(key)))
    await wait_refused(private.victim, Reason.GREETING, unharmed())
    for node in (private.victim, private.witness):
        assert status_of(node)["round"] < 2**20


async def test_after_all_this_an_invited_newcomer_is_welcome(private: Private) -> None:
    node = private.add("guest", 3)
    save_admission(node.home, admission_for(key_of(node)))
    node.start()
    await asyncio.to_thread(node.wait_for, lambda s: s["live_peers"] >= 1 and s["round"] >= 2, "its rounds")
    assert status_of(node)["refused"] == {}
