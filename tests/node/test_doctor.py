"""The doctor: each step of joining fails in its own way, with its own remedy. The bootstrap peers are real."""

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node import doctor, greeting
from node.cluster import free_port
from node.config import convert_config, to_toml
from node.doctor import Finding, examine
from node.identity import create_key, load_key, peer_id_of
from node.invitation import admit, invite, load_admission, save_admission
from node.libp2p_network import Libp2pNetwork
from node.ports import NetworkEvent
from node.signatures import Ed25519Signatures, peer_of_author
from node.store import BlobStore
from node.task_loading import make_task
from node.tasks import initial_params
from node.weights import schema_hash, schema_of
from protocols.errors import LocalError
from protocols.events import LinkUp, Received
from protocols.messages import Hello, LinkMessage, Probe, Probed, Refuse
from protocols.vocabulary import PROTOCOL_VERSION, PeerRecord, Reason, SchemaHash

STRANGER = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"


def make_home(home: Path, **network: object) -> Path:
    """A home in which every step is well, but for what `network` says."""
    home.mkdir()
    create_key(home / "identity.pem")
    tables = {"network": {"name": "net", "listen": ["/ip4/127.0.0.1/tcp/0"], **network}}
    (home / "covey.toml").write_text(to_toml(convert_config(tables)))
    return home


def add_to_config(home: Path, text: str) -> None:
    path = home / "covey.toml"
    kept = path.read_text().split("[learning]")[0]
    path.write_text(kept + text)


def failures(findings: list[Finding]) -> list[Finding]:
    failed = [finding for finding in findings if finding.outcome == "failed"]
    assert all(finding.remedy for finding in failed), "each says what to do"
    return failed


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path / "home")


# --- this machine ---------------------------------------------------------------------------------------
def test_a_home_without_a_config_ends_the_examination(tmp_path: Path) -> None:
    (finding,) = failures(examine(tmp_path))
    assert finding.step == "config"
    assert f"covey init --home {tmp_path}" in finding.remedy


def test_a_wrong_setting_is_found_with_its_path(home: Path) -> None:
    (home / "covey.toml").write_text("[network]\nprot = 1")
    (finding,) = examine(home)
    assert (finding.step, finding.outcome) == ("config", "failed")
    assert finding.detail.startswith("network.prot: no such setting")


def test_all_is_well_without_a_bootstrap_peer(home: Path) -> None:
    findings = examine(home)
    assert [(finding.step, finding.outcome) for finding in findings] == [
        ("config", "ok"),
        ("key", "ok"),
        ("daemon", "skipped"),
        ("port", "ok"),
        ("task", "ok"),
        ("bootstrap", "skipped"),
    ]
    assert findings[1].detail == f"this node is {peer_id_of(load_key(home / 'identity.pem'))}"
    assert "1438 training samples" in findings[4].detail


def test_a_key_that_others_can_read_is_found(home: Path) -> None:
    (home / "identity.pem").chmod(0o644)
    (finding,) = failures(examine(home))
    assert finding.step == "key"
    assert f"chmod 600 {home / 'identity.pem'}" in finding.remedy


def test_a_missing_key_is_found(home: Path) -> None:
    (home / "identity.pem").unlink()
    (finding,) = failures(examine(home))
    assert (finding.step, "covey init" in finding.remedy) == ("key", True)


def test_a_taken_port_is_found(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listen = f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"
        (finding,) = failures(examine(make_home(tmp_path / "home", listen=[listen])))
    assert finding.step == "port"
    assert f"{listen}: Address already in use" in finding.detail
    assert "end the program that holds the port, or change network.listen" in finding.remedy


def test_an_address_of_another_machine_is_found(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", listen=["/ip4/127.0.0.1/tcp/0", "/ip4/192.0.2.1/tcp/4001"])
    (finding,) = failures(examine(home))
    assert finding.step == "port"
    assert "/ip4/192.0.2.1/tcp/4001" in finding.detail


def test_a_running_daemon_holds_its_own_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"round": 7, "live_peers": 2, "addresses": ["/ip4/127.0.0.1/tcp/4001/p2p/x"]}
    with socket.socket() as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.listen()
        monkeypatch.setattr(doctor, "call", lambda home, path: status if path == "/status" else [])
        listen = f"/ip4/127.0.0.1/tcp/{daemon.getsockname()[1]}"
        findings = examine(make_home(tmp_path / "home", listen=[listen]))
    assert failures(findings) == []
    assert findings[2].detail == "running, round 7, 2 links"
    assert findings[3].detail == "listening on /ip4/127.0.0.1/tcp/4001/p2p/x"


OWN_TASK = """
import torch
from node.tasks import Task
def broken_model():
    raise KeyError("no such layer")
def make_task():
    data = torch.zeros(4, 2), torch.zeros(4).long()
    return Task("own", broken_model, data, data)
"""


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("[task]\nname = 'mnist'", "task.name: there is no task 'mnist'"),
        ("[task.options]\ndepth = 3", "task.options.depth: not an option of the task `digits`"),
        ("[task]\nname = 'own.py:nothing'", "has no function 'nothing'"),
        ("[task]\nname = 'own.py:make_task'", "KeyError('no such layer')"),
        ("[learning]\nrule = ['meen']", "meen"),
    ],
)
def test_a_task_that_cannot_begin_is_found_and_the_bootstrap_peers_must_wait(
    tmp_path: Path, text: str, detail: str
) -> None:
    home = make_home(tmp_path / "home", bootstrap=[f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{STRANGER}"])
    (home / "own.py").write_text(OWN_TASK)
    add_to_config(home, text)
    findings = examine(home)
    (finding,) = failures(findings)
    assert finding.step == "task"
    assert detail in finding.detail
    assert str(home / "covey.toml") in finding.remedy
    assert (findings[-1].outcome, findings[-1].detail) == ("skipped", "the task must load first")


def test_a_helper_needs_no_task(home: Path) -> None:
    add_to_config(home, "[learning]\nprotocol = 'none'\n[task]\nname = 'mnist'")
    findings = examine(home)
    assert failures(findings) == []
    assert findings[4].detail == "none: this node only helps others find each other"


# --- bootstrap peers ------------------------------------------------------------------------------------
class Bootstrap:
    """A real peer on loopback that answers every link with messages of the test's choice, and probes if told to."""

    def __init__(self, folder: Path, psk: str | None = None) -> None:
        self.answers: list[LinkMessage] = []
        self.greeted_by: list[Hello] = []
        self.reached = True
        self.network = Libp2pNetwork(
            Ed25519PrivateKey.generate(),
            ["/ip4/127.0.0.1/tcp/0"],
            BlobStore(folder, lambda path: None),
            self._hear,
            psk=psk,
        )
        self.address = ""

    def _hear(self, event: NetworkEvent) -> None:
        match event:
            case LinkUp(peer):
                for message in self.answers:
                    self.network.send(peer, message)
            case Received(_, Hello() as theirs):
                self.greeted_by.append(theirs)
            case Received(peer, Probe(token)) if self.reached:
                self.network.send(peer, Probed(token, True))
            case _:
                pass


@pytest.fixture
async def bootstrap(tmp_path: Path) -> AsyncIterator[Bootstrap]:
    (tmp_path / "bootstrap").mkdir()
    peer = Bootstrap(tmp_path / "bootstrap")
    (peer.address, *_) = await peer.network.start()
    yield peer
    await peer.network.stop()


def digits_schema() -> SchemaHash:
    task = make_task("digits", {}, Path())
    return schema_hash("digits", schema_of(initial_params(task, 0)))


def hello(
    version: int = PROTOCOL_VERSION,
    network: str = "net",
    learning: str = "gossip",
    task: str = "digits",
    schema: Callable[[], SchemaHash] = digits_schema,
    started_at: int = 0,
) -> Hello:
    # Of a peer that nobody asks for a signature.
    record = PeerRecord(STRANGER, (), incarnation=started_at)
    return Hello(version, network, learning, task, schema(), record, False, None)


async def examined(tmp_path: Path, address: str, **network: object) -> Finding:
    """What the doctor, in a loop and thread of its own, finds at the one bootstrap address."""
    home = make_home(tmp_path / "home", bootstrap=[address], **network)
    findings = await asyncio.to_thread(examine, home)
    failures(findings)
    assert [finding.outcome for finding in findings[:-1]] == ["ok", "ok", "skipped", "ok", "ok"]
    assert findings[-1].step == f"bootstrap {address}"
    return findings[-1]


async def test_a_bootstrap_peer_of_our_kind_is_greeted(tmp_path: Path, bootstrap: Bootstrap) -> None:
    bootstrap.answers = [hello()]
    finding = await examined(tmp_path, bootstrap.address)
    assert (finding.outcome, finding.detail) == ("ok", "greeted: network 'net', task 'digits'")


async def test_a_helper_as_bootstrap_peer_is_well(tmp_path: Path, bootstrap: Bootstrap) -> None:
    bootstrap.answers = [hello(learning="none", task="none", schema=lambda: SchemaHash(bytes(32)))]
    assert (await examined(tmp_path, bootstrap.address)).outcome == "ok"


@pytest.mark.parametrize(
    ("answer", "detail", "remedy"),
    [
        (lambda: hello(network="prod"), "network: network 'prod' met network 'net'", "network.name"),
        (lambda: hello(task="csv"), "task: task 'csv' met task 'digits'", "task.name"),
        (
            lambda: hello(schema=lambda: SchemaHash(b"x" * 32)),
            "schema: task 'digits': parameters differ",
            "same layer sizes",
        ),
        (lambda: hello(learning="scalars"), "protocol: learning protocol 'scalars'", "learning.protocol"),
        (
            lambda: hello(version=99),
            f"version: protocol version 99 met version {PROTOCOL_VERSION}",
            "same covey version",
        ),
        (
            lambda: Refuse(Reason.FULL, "24 links"),
            "it refuses us, full: 24 links",
            "add another bootstrap peer",
        ),
        (lambda: Refuse(Reason.NETWORK, "not yours"), "it refuses us, network: not yours", "network.name"),
        (lambda: Refuse(Reason.GREETING, "odd"), "it refuses us, greeting: odd", "covey"),
    ],
    ids=["network", "task", "schema", "protocol", "version", "full", "refused", "refused otherwise"],
)
async def test_a_bootstrap_peer_that_does_not_match_is_told_with_its_remedy(
    tmp_path: Path, bootstrap: Bootstrap, answer: Callable[[], LinkMessage], detail: str, remedy: str
) -> None:
    bootstrap.answers = [answer()]
    finding = await examined(tmp_path, bootstrap.address)
    assert finding.outcome == "failed"
    assert finding.detail.startswith(detail)
    assert remedy in finding.remedy


async def test_another_key_at_the_address_is_found(tmp_path: Path, bootstrap: Bootstrap) -> None:
    bootstrap.answers = [hello()]
    address = bootstrap.address.replace(bootstrap.network.me, STRANGER)
    finding = await examined(tmp_path, address)
    assert finding.outcome == "failed"
    assert finding.detail.startswith("another key answers there")
    assert "the present peer id" in finding.remedy


async def test_a_greeting_with_nothing_after_it_is_no_welcome(
    tmp_path: Path, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "GREETING_TIMEOUT_S", 0.5)
    bootstrap.answers, bootstrap.reached = [hello()], False
    finding = await examined(tmp_path, bootstrap.address)
    assert (finding.outcome, finding.detail) == ("failed", "it greeted, and then no answer came")


async def test_a_refusal_after_the_greeting_is_heard(tmp_path: Path, bootstrap: Bootstrap) -> None:
    bootstrap.answers = [hello(), Refuse(Reason.TERMS, "other terms")]
    finding = await examined(tmp_path, bootstrap.address)
    assert finding.detail == "it refuses us, terms: other terms"
    assert "table scalars" in finding.remedy


# --- the clock ------------------------------------------------------------------------------------------
async def test_a_clock_behind_that_of_the_peer_is_found(tmp_path: Path, bootstrap: Bootstrap) -> None:
    """What it says of itself counts from the second at which it started."""
    bootstrap.answers = [hello(started_at=int(time.time()) + 3600)]
    finding = await examined(tmp_path, bootstrap.address)
    assert finding.outcome == "failed"
    assert finding.detail in [f"clock: it started {n} minutes from now by its own clock" for n in (59, 60)]
    assert "set this device's clock" in finding.remedy


async def test_a_peer_that_has_just_started_has_the_right_clock(tmp_path: Path, bootstrap: Bootstrap) -> None:
    bootstrap.answers = [hello(started_at=int(time.time()) + 5)]
    assert (await examined(tmp_path, bootstrap.address)).outcome == "ok"


async def test_a_clock_ahead_of_the_peer_s_is_found_where_an_invitation_has_ended_here_alone(
    tmp_path: Path, bootstrap: Bootstrap
) -> None:
    bootstrap.answers = [hello()]
    home = private_home(tmp_path, bootstrap.address, expires_at=1_000_000)
    *_, invitation, greeted, clock = await asyncio.to_thread(examine, home)
    assert (invitation.outcome, greeted.outcome, clock.outcome) == ("failed", "ok", "failed")
    assert clock.detail.startswith("by this device's clock the invitation has ended")


# --- private networks -----------------------------------------------------------------------------------
MAKER = Ed25519Signatures(Ed25519PrivateKey.generate())


def private_home(tmp_path: Path, address: str, expires_at: int = 0, guest: str = "home") -> Path:
    """A home with an invitation, for the key of `guest`: its own, or another's that was copied."""
    home = make_home(tmp_path / "home", bootstrap=[address], inviters=[peer_of_author(MAKER.author)])
    key = load_key(home / "identity.pem") if guest == "home" else Ed25519PrivateKey.generate()
    own = Ed25519Signatures(key)
    invitation = invite("net", own.author, expires_at, MAKER)
    save_admission(home, admit(invitation, own, peer_id_of(key)))
    return home


async def test_it_greets_in_the_home_s_own_name_with_its_invitation_and_leaves_no_trace(
    tmp_path: Path, bootstrap: Bootstrap
) -> None:
    bootstrap.answers = [hello()]
    home = private_home(tmp_path, bootstrap.address, expires_at=4_000_000_000)
    *_, invitation, greeted = await asyncio.to_thread(examine, home)
    assert (invitation.outcome, greeted.outcome) == ("ok", "ok")
    assert invitation.detail == "this node may join 'net', until 2096-10-02 07:06 UTC"
    (theirs,) = bootstrap.greeted_by
    assert theirs.record.peer == peer_id_of(load_key(home / "identity.pem"))
    assert (theirs.brief, theirs.record.left, theirs.record.incarnation) == (True, True, 0)
    assert theirs.admission == load_admission(home)


@pytest.mark.parametrize(
    ("expires_at", "guest", "detail", "remedy"),
    [
        (1_000_000, "home", "expired: the invitation has expired", "set the clock of the device"),
        (0, "another", "forged: the invitation was not made for this peer", "of no use here"),
    ],
    ids=["expired", "stolen"],
)
async def test_an_invitation_that_opens_nothing_is_found_before_anybody_is_asked(
    tmp_path: Path, bootstrap: Bootstrap, expires_at: int, guest: str, detail: str, remedy: str
) -> None:
    home = private_home(tmp_path, bootstrap.address, expires_at, guest)
    bootstrap.answers = [Refuse(Reason(detail.partition(":")[0]), "no")]
    *_, invitation, greeted = await asyncio.to_thread(examine, home)
    for finding in (invitation, greeted):
        assert finding.outcome == "failed"
        assert remedy in finding.remedy
        assert f"covey invite --for {peer_id_of(load_key(home / 'identity.pem'))}" in finding.remedy
    assert invitation.detail.startswith(detail)


def test_who_was_never_invited_is_told(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", inviters=[peer_of_author(MAKER.author)])
    (finding,) = failures(examine(home))
    assert (finding.step, finding.detail.partition(":")[0]) == ("invitation", "uninvited")


def test_a_damaged_invitation_is_found(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", inviters=[peer_of_author(MAKER.author)])
    (home / "admission.msgpack").write_bytes(b"rubbish")
    (finding,) = failures(examine(home))
    assert finding.step == "invitation"
    assert "admission.msgpack is damaged" in finding.detail
    assert "join again with the link" in finding.remedy


@pytest.mark.parametrize(
    ("theirs", "ours", "detail"),
    [
        ("a" * 64, "b" * 64, "its secret (network.psk) is another"),
        ("a" * 64, None, "cannot be read: a network with a secret (network.psk)"),
        (None, "b" * 64, "answers without a secret, and this network has one (network.psk)"),
        ("a" * 64, "a" * 64, None),
    ],
    ids=["another", "theirs alone", "ours alone", "the same"],
)
async def test_the_network_s_secret_is_compared(
    tmp_path: Path, theirs: str | None, ours: str | None, detail: str | None
) -> None:
    (tmp_path / "bootstrap").mkdir()
    peer = Bootstrap(tmp_path / "bootstrap", theirs)
    peer.answers = [hello()]
    (peer.address, *_) = await peer.network.start()
    try:
        finding = await examined(tmp_path, peer.address, psk=ours)
    finally:
        await peer.network.stop()
    if detail is None:
        assert finding.outcome == "ok", finding
    else:
        assert finding.outcome == "failed"
        assert detail in finding.detail
        assert "join with a link of this very network" in finding.remedy


# --- while the daemon runs ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("state", "last_reason", "outcome", "detail"),
    [
        ("live", "", "ok", "the running node is linked with it: live"),
        (
            "known",
            "refused by peer, expired: the invitation has expired",
            "failed",
            "the running node was told: refused by peer, expired: the invitation has expired",
        ),
        (
            "closing",
            "refused by peer, uninvited: private",
            "failed",
            "the running node was told: refused by peer, uninvited: private",
        ),
        (
            "known",
            "network: network 'a' met network 'b'",
            "failed",
            "the running node was told: network: network 'a' met network 'b'",
        ),
        ("dialling", "", "ok", "greeted: network 'net', task 'digits'"),
        ("known", "unreachable: Connection refused", "ok", "greeted: network 'net', task 'digits'"),
    ],
)
async def test_a_running_daemon_is_asked_first(
    tmp_path: Path,
    bootstrap: Bootstrap,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    last_reason: str,
    outcome: str,
    detail: str,
) -> None:
    bootstrap.answers = [hello()]
    row = {"peer": bootstrap.network.me, "state": state, "last_reason": last_reason}
    status = {"round": 7, "live_peers": 0, "addresses": []}
    monkeypatch.setattr(doctor, "call", lambda home, path: status if path == "/status" else [row])
    home = make_home(tmp_path / "home", bootstrap=[bootstrap.address])
    finding = (await asyncio.to_thread(examine, home))[-1]
    assert (finding.outcome, finding.detail) == (outcome, detail)
    own = peer_id_of(load_key(home / "identity.pem"))
    assert own not in {theirs.record.peer for theirs in bootstrap.greeted_by}, "its link would be lost"


async def test_in_a_private_network_only_the_running_daemon_can_tell(
    tmp_path: Path, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = {"round": 7, "live_peers": 0, "addresses": []}
    monkeypatch.setattr(doctor, "call", lambda home, path: status if path == "/status" else [])
    home = private_home(tmp_path, bootstrap.address)
    finding = (await asyncio.to_thread(examine, home))[-1]
    assert finding.outcome == "skipped"
    assert "ask again" in finding.detail
    assert bootstrap.greeted_by == []


async def test_a_peer_that_never_greets_is_found(
    tmp_path: Path, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "GREETING_TIMEOUT_S", 0.5)
    finding = await examined(tmp_path, bootstrap.address)
    assert (finding.outcome, finding.detail) == ("failed", "connected, but no greeting came")


async def test_a_closed_port_is_found(tmp_path: Path) -> None:
    finding = await examined(tmp_path, f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{STRANGER}")
    assert finding.outcome == "failed"
    assert "cannot be reached" in finding.detail
    assert "is that node running" in finding.remedy


async def test_a_name_that_does_not_resolve_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = await examined(tmp_path, f"/dns4/no-such-host.invalid/tcp/4001/p2p/{STRANGER}")
    assert finding.outcome == "failed"
    assert finding.detail == "no-such-host.invalid:4001 cannot be reached: Name or service not known"


async def test_a_port_where_something_else_answers_is_found(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n" * 10)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        finding = await examined(tmp_path, f"/ip4/127.0.0.1/tcp/{port}/p2p/{STRANGER}")
    assert finding.outcome == "failed"
    assert finding.detail.startswith(f"another program answers at 127.0.0.1:{port}: 220 mail.example ESMTP")
    assert finding.remedy == "is it a covey node, and not too old?"


async def test_a_port_where_nobody_speaks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "ANSWER_TIMEOUT_S", 0.2)
    done = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        finding = await examined(tmp_path, f"/ip4/127.0.0.1/tcp/{port}/p2p/{STRANGER}")
        done.set()
    assert (finding.outcome, finding.detail) == (
        "failed",
        f"127.0.0.1:{port} takes connections and says nothing",
    )


async def test_an_address_to_which_no_way_leads_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_route(host: str, port: int) -> None:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr(doctor, "first_words", no_route)
    finding = await examined(tmp_path, f"/ip4/203.0.113.1/tcp/4001/p2p/{STRANGER}")
    assert (finding.outcome, finding.detail) == (
        "failed",
        "203.0.113.1:4001 cannot be reached: No route to host",
    )
    assert finding.remedy == "there is no way to this address: is it right, and is this device online?"


async def test_an_address_that_drops_everything_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dropped(host: str, port: int) -> None:
        raise TimeoutError

    monkeypatch.setattr(doctor, "first_words", dropped)
    finding = await examined(tmp_path, f"/ip4/203.0.113.1/tcp/4001/p2p/{STRANGER}")
    assert (finding.outcome, finding.detail) == ("failed", "no answer from 203.0.113.1:4001 within 5 s")
    assert "firewall" in finding.remedy


async def test_an_address_that_is_not_tcp_is_found(tmp_path: Path) -> None:
    finding = await examined(tmp_path, f"/ip4/127.0.0.1/udp/4001/quic-v1/p2p/{STRANGER}")
    assert (finding.outcome, finding.detail) == ("failed", "not a TCP address")


async def test_every_bootstrap_peer_is_examined(tmp_path: Path, bootstrap: Bootstrap) -> None:
    bootstrap.answers = [hello()]
    closed = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{STRANGER}"
    home = make_home(tmp_path / "home", bootstrap=[closed, bootstrap.address])
    first, second = (await asyncio.to_thread(examine, home))[-2:]
    assert (first.outcome, second.outcome) == ("failed", "ok")


def test_a_daemon_that_does_not_answer_is_not_running(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(home: Path, path: str) -> None:
        raise LocalError("does not answer")

    monkeypatch.setattr(doctor, "call", silent)
    assert examine(home)[2] == Finding("daemon", "skipped", "not running")
