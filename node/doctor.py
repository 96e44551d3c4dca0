"""Every step of joining a network, tried one by one: which works, which fails, and what to do about it."""

import asyncio
import tempfile
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct
from msgspec.structs import replace

from node.addresses import check_free, split_tcp
from node.api import call
from node.config import CONFIG_FILE, Config, load_config
from node.identity import KEY_FILE, load_key, peer_id_of
from node.ports import NetworkEvent
from node.signatures import Ed25519Signatures
from protocols.errors import ConfigError, CoveyError, LocalError, PeerError
from protocols.events import DialFailed, LinkDown, LinkUp, Received
from protocols.messages import Hello, Refuse
from protocols.signing import sign_record
from protocols.view import mismatch
from protocols.vocabulary import PROTOCOL_VERSION, PeerId, PeerRecord, Reason, SchemaHash, peer_of

GREETING_TIMEOUT_S = 12.0


class Finding(Struct, frozen=True):
    """The outcome of one step."""

    step: str
    outcome: Literal["ok", "failed", "skipped"]
    detail: str
    remedy: str = ""


def examine(home: Path) -> list[Finding]:
    """All steps in the order in which joining takes them. A step that needs a failed one is skipped."""
    try:
        config = load_config(home)
    except CoveyError as error:
        return [
            Finding(
                "config", "failed", str(error), f"edit {home / CONFIG_FILE}, or run: covey init --home {home}"
            )
        ]
    findings = [Finding("config", "ok", str(home / CONFIG_FILE)), _examine_key(home)]
    running = _running_status(home)
    findings += [_examine_daemon(running), _examine_port(config, running)]
    hello, finding = _examine_task(config, home)
    findings.append(finding)
    if not config.network.bootstrap:
        findings.append(
            Finding("bootstrap", "skipped", "none configured: this node waits for others to dial it")
        )
    for address in config.network.bootstrap:
        findings.append(asyncio.run(_examine_bootstrap(address, hello)))
    return findings


def _examine_key(home: Path) -> Finding:
    try:
        peer = peer_id_of(load_key(home / KEY_FILE))
    except LocalError as error:
        problem, _, remedy = str(error).partition("; ")
        return Finding(
            "key", "failed", problem, remedy or "restore it from a copy; a new key is a new identity"
        )
    return Finding("key", "ok", f"this node is {peer}")


def _running_status(home: Path) -> dict[str, object] | None:
    try:
        status: dict[str, object] = call(home, "/status")
    except LocalError:
        return None
    return status


def _examine_daemon(running: dict[str, object] | None) -> Finding:
    if running is None:
        return Finding("daemon", "skipped", "not running")
    return Finding("daemon", "ok", f"running, round {running['round']}, {running['live_peers']} links")


def _examine_port(config: Config, running: dict[str, object] | None) -> Finding:
    if running is not None:
        addresses = running["addresses"]
        assert isinstance(addresses, list)
        return Finding("port", "ok", f"listening on {', '.join(addresses)}")
    for address in config.network.listen:
        try:
            check_free(address)
        except LocalError as error:
            problem, _, remedy = str(error).partition("; ")
            return Finding("port", "failed", problem, remedy)
    return Finding("port", "ok", f"free: {', '.join(config.network.listen)}")


def _examine_task(config: Config, home: Path) -> tuple[Hello | None, Finding]:
    name, schema = "none", SchemaHash(bytes(32))
    if config.learns:
        from aggregation.rules import build
        from node.task_loading import make_task
        from node.tasks import initial_params
        from node.weights import schema_hash, schema_of

        try:
            task = make_task(
                config.task.name, config.task.options, home, config.task.shard, config.task.probe
            )
            build(config.rule)
            name, schema = task.name, schema_hash(task.name, schema_of(initial_params(task, 0)))
        except Exception as error:  # a user's model may raise anything
            detail = str(error) if isinstance(error, CoveyError | ValueError) else repr(error)
            return None, Finding(
                "task", "failed", detail, f"correct [task] or learning.rule in {home / CONFIG_FILE}"
            )
        detail = f"{task.name}: {len(task.train[1])} training samples, schema {schema.hex()[:12]}"
    else:
        detail = "none: this node only helps others find each other"
    hello = Hello(
        version=PROTOCOL_VERSION,
        network=config.network.name,
        learning=config.learning.protocol,
        task=name,
        schema=schema,
        record=PeerRecord("unsigned", ()),
        brief=True,
        admission=None,
    )
    return hello, Finding("task", "ok", detail)


async def _examine_bootstrap(address: str, hello: Hello | None) -> Finding:
    step = f"bootstrap {address}"
    if hello is None:
        return Finding(step, "skipped", "the task must load first")
    if problem := await _connect_tcp(address):
        return problem
    events = await _greet(address, hello)
    for event in events:
        match event:
            case DialFailed(_, _, detail) if "Peer ID mismatch" in detail or "peer id" in detail.lower():
                return Finding(
                    step,
                    "failed",
                    f"another key answers there: {detail}",
                    "ask its operator for the address with the present peer id",
                )
            case DialFailed(_, reason, detail):
                return Finding(step, "failed", f"{reason.value}: {detail}", _NOT_COVEY)
            case Received(_, Refuse(reason, detail)):
                return Finding(
                    step,
                    "failed",
                    f"it refuses us, {reason.value}: {detail}",
                    _REMEDIES.get(reason, _NOT_COVEY),
                )
            case Received(_, Hello() as theirs):
                found = mismatch(hello, theirs)
                if found:
                    return Finding(step, "failed", f"{found[0].value}: {found[1]}", _REMEDIES[found[0]])
                return Finding(step, "ok", f"greeted: network '{theirs.network}', task '{theirs.task}'")
            case _:
                continue
    return Finding(step, "failed", "connected, but no greeting came", _NOT_COVEY)


_NOT_COVEY = "is it a covey node, and not too old?"
_REMEDIES = {
    Reason.VERSION: "bring both nodes to the same covey version",
    Reason.NETWORK: "set network.name to theirs",
    Reason.TASK: "set task.name to theirs",
    Reason.SCHEMA: "use the same model: same task options, same layer sizes",
    Reason.PROTOCOL: "set learning.protocol to theirs",
    Reason.FULL: "it has all the links it wants; add another bootstrap peer",
}


async def _connect_tcp(address: str) -> Finding | None:
    step = f"bootstrap {address}"
    try:
        _, host, port = split_tcp(address, "network.bootstrap")
    except ConfigError:
        return Finding(step, "failed", "not a TCP address", "use /ip4/<address>/tcp/<port>/p2p/<peer id>")
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return Finding(
            step,
            "failed",
            f"no answer from {host}:{port} within 5 s",
            "a firewall drops us, or the address is wrong",
        )
    except OSError as error:
        return Finding(
            step,
            "failed",
            f"{host}:{port} cannot be reached: {error.strerror or error}",
            "is that node running, and its port open? is the address right?",
        )
    writer.close()
    return None


async def _greet(address: str, hello: Hello) -> list[NetworkEvent]:
    """Dial as a stranger with a key for one use, so that a running daemon of this home is not disturbed."""
    from node.libp2p_network import Libp2pNetwork
    from node.store import BlobStore

    events: list[NetworkEvent] = []
    settled = asyncio.Event()
    network: Libp2pNetwork
    key = Ed25519PrivateKey.generate()
    record = sign_record(hello.network, PeerRecord(peer_id_of(key), ()), Ed25519Signatures(key))
    hello = replace(hello, record=record)

    def deliver(event: NetworkEvent) -> None:
        events.append(event)
        match event:
            case LinkUp(peer):
                network.send(peer, hello)
            case Received(_, Hello() | Refuse()) | DialFailed() | LinkDown():
                settled.set()
            case _:
                return

    with tempfile.TemporaryDirectory() as folder:
        network = Libp2pNetwork(
            key,
            ["/ip4/127.0.0.1/tcp/0"],
            BlobStore(Path(folder), _refuse_all),
            deliver,
        )
        await network.start()
        network.dial(address)
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await settled.wait()
        except TimeoutError:
            pass
        network.disconnect(peer_of(address) or PeerId(""), Reason.LEAVING)
        await network.stop()
    return events


def _refuse_all(path: Path) -> None:
    raise PeerError(Reason.IDLE, "the doctor takes no models")
