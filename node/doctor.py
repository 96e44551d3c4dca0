"""Every step of joining a network, tried one by one: which works, which fails, and what to do about it."""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from node.addresses import check_free, split_tcp
from node.api import call
from node.config import CONFIG_FILE, Config, load_config
from node.greeting import CONNECT_TIMEOUT_S, MULTISTREAM, Caller, first_words, greet
from node.identity import KEY_FILE, load_key, peer_id_of
from node.invitation import load_admission
from node.ports import NetworkEvent
from node.signatures import Ed25519Signatures
from protocols.admission import Admission, refusal
from protocols.errors import ConfigError, CoveyError, LocalError
from protocols.events import DialFailed, Received, Rejected
from protocols.messages import Hello, Probed, Refuse
from protocols.view import mismatch
from protocols.vocabulary import Reason, SchemaHash, one_line, peer_of

CLOCK_SLACK_S = 120
"""Clocks that differ by less than this hurt nobody: invitations end by the minute."""


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
        problem, _, remedy = str(error).partition("; ")
        edit = f"edit {home / CONFIG_FILE}, or run: covey init --home {home}"
        if not (home / CONFIG_FILE).exists() or not remedy:
            problem, remedy = str(error), edit
        return [Finding("config", "failed", problem, remedy)]
    key, key_finding = _examine_key(home)
    findings = [Finding("config", "ok", str(home / CONFIG_FILE)), key_finding]
    running = _asked(home, "/status")
    findings += [_examine_daemon(running), _examine_port(config, running)]
    made, finding = _examine_task(config, home)
    findings.append(finding)
    admission, invitation = _examine_invitation(config, home, key)
    findings += invitation
    if not config.network.bootstrap:
        findings.append(
            Finding("bootstrap", "skipped", "none configured: this node waits for others to dial it")
        )
        return findings
    caller = None
    if made is not None:
        # A second link in the home's own name would end that of a running daemon.
        own = key if running is None else None
        caller = Caller(
            own or Ed25519PrivateKey.generate(),
            config.network.name,
            config.learning.protocol,
            *made,
            admission if own else None,
            config.network.psk,
        )
    rows = {row["peer"]: row for row in _asked(home, "/peers") or ()} if running is not None else None
    me = peer_id_of(key) if key else "<this node's peer id>"
    greetings = [
        _examine_bootstrap(address, caller, rows, config, me) for address in config.network.bootstrap
    ]
    findings += greetings
    # A link that stands outlives its invitation: it says nothing of clocks.
    return findings + (_examine_clock(invitation, greetings) if running is None else [])


# --- this device ----------------------------------------------------------------------------------------
def _examine_key(home: Path) -> tuple[Ed25519PrivateKey | None, Finding]:
    try:
        key = load_key(home / KEY_FILE)
    except LocalError as error:
        problem, _, remedy = str(error).partition("; ")
        return None, Finding(
            "key", "failed", problem, remedy or "restore it from a copy; a new key is a new identity"
        )
    return key, Finding("key", "ok", f"this node is {peer_id_of(key)}")


def _asked(home: Path, path: str) -> Any:
    """What the running daemon says; None where there is none."""
    try:
        return call(home, path)
    except LocalError:
        return None


def _examine_daemon(running: Mapping[str, Any] | None) -> Finding:
    if running is None:
        return Finding("daemon", "skipped", "not running")
    return Finding("daemon", "ok", f"running, round {running['round']}, {running['live_peers']} links")


def _examine_port(config: Config, running: Mapping[str, Any] | None) -> Finding:
    if running is not None:
        return Finding("port", "ok", f"listening on {', '.join(running['addresses'])}")
    for address in config.network.listen:
        try:
            check_free(address)
        except LocalError as error:
            problem, _, remedy = str(error).partition("; ")
            return Finding("port", "failed", problem, remedy)
    return Finding("port", "ok", f"free: {', '.join(config.network.listen)}")


def _examine_task(config: Config, home: Path) -> tuple[tuple[str, SchemaHash] | None, Finding]:
    """The task's name and schema, as they go into the handshake."""
    if not config.learns:
        return ("none", SchemaHash(bytes(32))), Finding(
            "task", "ok", "none: this node only helps others find each other"
        )
    from aggregation.rules import build
    from node.task_loading import make_task
    from node.tasks import initial_params
    from node.weights import schema_hash, schema_of

    try:
        task = make_task(config.task.name, config.task.options, home, config.task.shard, config.task.probe)
        build(config.rule)
        schema = schema_hash(task.name, schema_of(initial_params(task, 0)))
    except Exception as error:  # a user's model may raise anything
        detail = str(error) if isinstance(error, CoveyError | ValueError) else repr(error)
        return None, Finding(
            "task", "failed", detail, f"correct [task] or learning.rule in {home / CONFIG_FILE}"
        )
    detail = f"{task.name}: {len(task.train[1])} training samples, schema {schema.hex()[:12]}"
    return (task.name, schema), Finding("task", "ok", detail)


def _examine_invitation(
    config: Config, home: Path, key: Ed25519PrivateKey | None
) -> tuple[Admission | None, list[Finding]]:
    """What this node shows in a private network, and what others will say to it. Of an open network nothing."""
    step, policy = "invitation", config.admission_policy
    if policy.is_open:
        return None, []
    if key is None:
        return None, [Finding(step, "skipped", "the key must load first")]
    try:
        admission = load_admission(home)
    except LocalError as error:
        problem, _, remedy = str(error).partition("; ")
        return None, [Finding(step, "failed", problem, remedy)]
    me = peer_id_of(key)
    found = refusal(policy, config.network.name, me, admission, _now(), Ed25519Signatures(key))
    if found is not None:
        reason, sentence = found
        return admission, [Finding(step, "failed", f"{reason.value}: {sentence}", _remedy(reason, me))]
    ends_at = admission.invitation.expires_at if admission else 0
    until = f", until {datetime.fromtimestamp(ends_at, UTC):%Y-%m-%d %H:%M} UTC" if ends_at else ""
    return admission, [Finding(step, "ok", f"this node may join '{config.network.name}'{until}")]


def _now() -> float:
    """Unix seconds."""
    return datetime.now(UTC).timestamp()


# --- bootstrap peers ------------------------------------------------------------------------------------
def _examine_bootstrap(
    address: str, caller: Caller | None, rows: Mapping[str, Any] | None, config: Config, me: str
) -> Finding:
    """rows: of the running daemon's peers, by peer id; None where none runs. me: the home's peer id."""
    step = f"bootstrap {address}"
    if caller is None:
        return Finding(step, "skipped", "the task must load first")
    row = (rows or {}).get(str(peer_of(address)))
    if row is not None and (told := _told_by_daemon(step, row, me)):
        return told
    if problem := asyncio.run(_examine_port_of(address, caller.psk is not None)):
        return Finding(step, "failed", *problem)
    if rows is not None and not config.admission_policy.is_open:
        return Finding(step, "skipped", "it answers; the running node has not heard from it yet: ask again")
    return _judge(step, asyncio.run(greet(address, caller)), caller, me)


def _told_by_daemon(step: str, row: Mapping[str, Any], me: str) -> Finding | None:
    """What the running node has found out already, in its own name."""
    if row["state"] in ("live", "brief"):
        return Finding(step, "ok", f"the running node is linked with it: {row['state']}")
    last = row["last_reason"]
    word = last.removeprefix("refused by peer, ").partition(":")[0]
    if word not in _REMEDIES:
        return None
    return Finding(step, "failed", f"the running node was told: {last}", _remedy(Reason(word), me))


async def _examine_port_of(address: str, has_secret: bool) -> tuple[str, str] | None:
    """What is wrong with the address or with what answers there, and the remedy."""
    try:
        _, host, port = split_tcp(address, "network.bootstrap")
    except ConfigError:
        return "not a TCP address", "use /ip4/<address>/tcp/<port>/p2p/<peer id>"
    where = f"{host}:{port}"
    try:
        said = await first_words(host, port)
    except TimeoutError:
        return (
            f"no answer from {where} within {CONNECT_TIMEOUT_S:.0f} s",
            "a firewall drops us, or the address is wrong",
        )
    except OSError as error:
        return f"{where} cannot be reached: {error.strerror or error}", _remedy_of(error)
    if said.startswith(MULTISTREAM):
        secret = f"{where} answers without a secret, and this network has one (network.psk)"
        return (secret, _OTHER_SECRET) if has_secret else None
    if has_secret:
        return None  # its words are not for who does not know the secret: the greeting will tell
    if not said:
        return f"{where} takes connections and says nothing", _NOT_COVEY
    text = said.decode("ascii", errors="replace")
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return f"another program answers at {where}: {one_line(text)[:80]}", _NOT_COVEY
    return (
        f"what answers at {where} cannot be read: a network with a secret (network.psk), or no covey node",
        _OTHER_SECRET,
    )


def _remedy_of(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "is the name in the address right, and is this device online?"
    if isinstance(error, ConnectionRefusedError):
        return "is that node running, and its port open? is the address right?"
    return "there is no way to this address: is it right, and is this device online?"


def _judge(step: str, events: Sequence[NetworkEvent], caller: Caller, me: str) -> Finding:
    """What came of a greeting, the gravest first."""
    hello = caller.hello()
    said = [event.message for event in events if isinstance(event, Received)]
    theirs = next((message for message in said if isinstance(message, Hello)), None)
    for event in events:
        match event:
            case DialFailed(_, _, detail) if "peer id" in detail.lower():
                detail = f"another key answers there: {detail}"
                return Finding(
                    step, "failed", detail, "ask its operator for the address with the present peer id"
                )
            case DialFailed(_, reason, detail) if caller.psk is not None:
                detail = (
                    f"{reason.value}: {detail}; its secret (network.psk) is another, or it is no covey node"
                )
                return Finding(step, "failed", detail, _OTHER_SECRET)
            case DialFailed(_, reason, detail) | Rejected(_, reason, detail):
                return Finding(step, "failed", f"{reason.value}: {detail}", _remedy(reason, me))
            case Received(_, Refuse(reason, detail)):
                return Finding(
                    step, "failed", f"it refuses us, {reason.value}: {detail}", _remedy(reason, me)
                )
            case _:
                continue
    if theirs is None:
        return Finding(step, "failed", "connected, but no greeting came", _NOT_COVEY)
    if found := mismatch(hello, theirs):
        return Finding(step, "failed", f"{found[0].value}: {found[1]}", _remedy(found[0], me))
    if not any(isinstance(message, Probed) for message in said):
        return Finding(step, "failed", "it greeted, and then no answer came", _NOT_COVEY)
    if (ahead_s := theirs.record.incarnation - _now()) > CLOCK_SLACK_S:
        # A record counts from the second at which its node started.
        behind = f"clock: it started {ahead_s / 60:.0f} minutes from now by its own clock"
        return Finding(step, "failed", behind, _SET_CLOCK)
    return Finding(step, "ok", f"greeted: network '{theirs.network}', task '{theirs.task}'")


def _examine_clock(invitation: Sequence[Finding], greetings: Sequence[Finding]) -> list[Finding]:
    """Others that let in what has ended by this device's clock say that it goes ahead."""
    ended = any(each.outcome == "failed" and each.detail.startswith(Reason.EXPIRED) for each in invitation)
    if ended and (took := next((each for each in greetings if each.outcome == "ok"), None)):
        detail = f"by this device's clock the invitation has ended, but not by that of {took.step}"
        return [Finding("clock", "failed", detail, _SET_CLOCK)]
    return []


# --- remedies -------------------------------------------------------------------------------------------
_NOT_COVEY = "is it a covey node, and not too old?"
_OTHER_SECRET = "join with a link of this very network: the secret (network.psk) is in it"  # noqa: S105 - a sentence
_SET_CLOCK = "set this device's clock, or have theirs set: one of the two is wrong"
_INVITE = "ask one who may invite for a link made with `covey invite --for {me}`, and `covey join` with it in this home"
_SCALARS = "use the settings of the network in the table scalars, and the same task options and seed"
_REMEDIES = {
    Reason.VERSION: "bring both nodes to the same covey version",
    Reason.NETWORK: "set network.name to theirs; in a home that belongs to a network, `covey join` theirs with another --home",
    Reason.TASK: "set task.name to theirs",
    Reason.SCHEMA: "use the same model: same task options, same layer sizes",
    Reason.PROTOCOL: "set learning.protocol to theirs",
    Reason.GENERATOR: _SCALARS,
    Reason.BASE: _SCALARS,
    Reason.TERMS: _SCALARS,
    Reason.FULL: "it has all the links it wants; add another bootstrap peer",
    Reason.UNINVITED: _INVITE,
    Reason.EXPIRED: _INVITE + "; or set the clock of the device where it is wrong",
    Reason.FORGED: "this invitation is of no use here: " + _INVITE,
}


def _remedy(reason: Reason, me: str) -> str:
    return _REMEDIES.get(reason, _NOT_COVEY).replace("{me}", me)
