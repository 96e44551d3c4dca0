"""A network as a file that can be shared: what all its nodes agree on, signed by who made it.

Belongs here: the manifest's form, its id and its signature, which settings are the network's and which the device's, and how
they go into a node's config. Nothing here runs the task that a manifest names.
"""

import hashlib
import io
import math
import re
import tokenize
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta, Struct
from msgspec.structs import replace

from node.explain import explain
from node.signatures import author_of, is_signed, peer_of_author
from protocols.errors import ConfigError
from protocols.signing import Signatures
from protocols.view import NO_LEARNING
from protocols.vocabulary import MAX_ADDRESSES, Address, Name, WirePeerId, peer_of

MANIFEST_FILE = "manifest.toml"
TASK_FILE = "task.py"
"""What a task file is called beside a manifest, whatever its maker calls it."""
MAX_MANIFEST_BYTES = 64 * 1024
MAX_TASK_BYTES = 1024 * 1024
MAX_LISTED_PEERS = 256
MAX_DEPTH = 16
"""Of lists and tables within a setting."""
ID_DIGITS = 16
MAX_LABEL_CHARS = 64 - 1 - ID_DIGITS

Tables = dict[str, dict[str, Any]]
Label = Annotated[str, Meta(max_length=MAX_LABEL_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Listed = Annotated[tuple[WirePeerId, ...], Meta(max_length=MAX_LISTED_PEERS)]
_Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]

_WAITING = frozenset(
    {"quorum", "deadline_s", "pause_s", "evaluate_every", "keep_every", "wait_for_peers", "wait_at_most_s"}
)
OWN: Mapping[str, frozenset[str]] = {
    "learning": _WAITING | {"final_keep", "catch_up", "catch_up_after", "catch_up_s"},
    "scalars": _WAITING
    | {"samples", "epsilon", "rounding", "private_clip", "private_noise", "sync_s", "batch_s", "repair_s"}
    | {"keep_log"},
    "sampled": _WAITING
    | {"at_least", "ping_s", "stall_s", "follow_every", "wait_for_members", "max_members", "fanout"},
}
"""Settings of these tables that each device may choose for itself. Whatever is not listed has to agree, and of a table that
is not listed all but how long a node waits."""
_ALSO_FROM_LEARNING = {"sampled": frozenset({"protocol"}), "scalars": frozenset({"protocol"})}
"""Of the table `learning`, for a protocol with a table of its own; for others that do not stand here protocol and rule."""
_DEVICE = frozenset({"threads"})
"""Of the table `training`: what no maker can know of another's machine."""


class ManifestTask(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What the network learns."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    """A built-in, or `task.py:<function>` for the file beside the manifest."""
    options: dict[str, Any] = {}
    seed: int = 0
    """Of the model that all nodes begin with."""
    sha256: _Hash | None = None
    """SHA-256 of the task file; left out for a built-in."""
    schema: _Hash
    """As nodes compare it in the handshake: the task's name, its parameters' names, shapes and dtypes."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What all nodes of a network agree on."""

    covey: Literal[1]
    """Version of this form."""
    name: Label
    network: Name = "unsigned"
    """The name, a dash, and the first 16 hexadecimal digits of SHA-256 over `content_bytes`. Nodes with other manifests
    have another network, and refuse each other."""
    maker: WirePeerId
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")] = "0" * 128
    """By the maker's key, of `signed_bytes`."""
    bootstrap: Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)] = ()
    """Peers to ask first, beside those that a device knows itself. The only part that is not in the network's id, so that
    the maker may sign new ones."""
    members: Listed = ()
    inviters: Listed = ()
    """Who may invite. With neither members nor inviters anyone may join."""
    task: ManifestTask
    shared: Tables = {}
    """Settings that are the same on all nodes, by table."""
    suggested: Tables = {}
    """Settings that the maker advises, and that a device may change."""

    @property
    def is_open(self) -> bool:
        return not self.members and not self.inviters

    @property
    def protocol(self) -> str:
        return str(self.shared["learning"]["protocol"])


# --- which settings are whose ---------------------------------------------------------------------------
def is_shared(protocol: str, table: str, name: str) -> bool:
    """Whether a setting has to be the same on all nodes of a network that learns by this protocol."""
    if table not in ("learning", protocol) or name in OWN.get(table, _WAITING):
        return False
    if table == "learning" and protocol != "gossip":
        return name in _ALSO_FROM_LEARNING.get(protocol, {"protocol", "rule"})
    return True


def is_suggested(protocol: str, table: str, name: str) -> bool:
    """Whether a maker may advise on a setting."""
    if table == "training":
        return name not in _DEVICE
    return table in ("learning", protocol) and name in OWN.get(table, _WAITING)


def divide(tables: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Tables, Tables]:
    """A whole config as tables, into what is shared and what is suggested: of this only what is not the default."""
    protocol = tables["learning"]["protocol"]
    shared: Tables = {}
    suggested: Tables = {}
    for table in dict.fromkeys(("learning", protocol, "training")):
        for name, value in tables.get(table, {}).items():
            if value is None:
                continue
            if is_shared(protocol, table, name):
                shared.setdefault(table, {})[name] = _listed(value)
            elif is_suggested(protocol, table, name) and value != defaults[table][name]:
                suggested.setdefault(table, {})[name] = _listed(value)
    return shared, suggested


def _listed(value: Any) -> Any:
    """Tuples as lists, as they come out of a file."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def imposed(manifest: Manifest) -> Tables:
    """Every setting that the network decides, as tables of a config."""
    task = manifest.task
    return {
        **manifest.shared,
        "network": {
            "name": manifest.network,
            "members": list(manifest.members),
            "inviters": list(manifest.inviters),
        },
        "task": {"name": task.name, "seed": task.seed, **({"options": task.options} if task.options else {})},
    }


def layered(manifest: Manifest, data: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tables with the manifest below them: what they leave out comes from there."""
    found = _under(_under(data, imposed(manifest)), manifest.suggested)
    network = found["network"]
    if isinstance(network, dict) and isinstance(own := network.get("bootstrap", []), list):
        more = [address for address in manifest.bootstrap if address not in own]
        found["network"] = {**network, "bootstrap": [*own, *more]}
    return found


def _under(data: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    found = {**below, **data}
    for name, value in below.items():
        own = data.get(name)
        if isinstance(value, Mapping) and isinstance(own, Mapping):
            found[name] = _under(own, value)
    return found


def check_agreement(manifest: Manifest, tables: Mapping[str, Any]) -> None:
    """A whole config, as tables, sets nothing otherwise than the network. A node that only helps others find each other need
    not learn as they do.

    Raises:
        ConfigError: the first setting that differs.
    """
    only_helps = tables["learning"]["protocol"] == NO_LEARNING
    for path, value in _leaves(imposed(manifest)):
        if only_helps and path[0] != "network":
            continue
        ours: Any = tables
        for part in path:
            ours = ours[part] if isinstance(ours, Mapping) and part in ours else None
        if _listed(ours) != _listed(value):
            raise ConfigError(
                ".".join(path),
                f"is {ours!r} here, but {value!r} in the manifest of '{manifest.network}'; leave it out, or join "
                "another network with another --home",
            )


def _leaves(tables: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Settings by their path. Tables within a setting are part of its value, but options of the task are settings."""
    for name, value in tables.items():
        if isinstance(value, Mapping) and (not path or (*path, name) == ("task", "options")):
            yield from _leaves(value, *path, name)
        else:
            yield (*path, name), value


def without_imposed(manifest: Manifest, data: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tables without what the network decides, and without options of another task."""
    found = {name: dict(table) if isinstance(table, Mapping) else table for name, table in data.items()}
    task = found.get("task")
    if isinstance(task, dict) and isinstance(options := task.pop("options", None), Mapping):
        own = {name: value for name, value in options.items() if name not in manifest.task.options}
        if own and task.get("name") == manifest.task.name:
            task["options"] = own
    for (table, name, *inner), _ in _leaves(imposed(manifest)):
        settings = found.get(table)
        if not inner and isinstance(settings, dict):
            settings.pop(name, None)
    return {name: table for name, table in found.items() if table != {}}


# --- id and signature -----------------------------------------------------------------------------------
def content_bytes(manifest: Manifest) -> bytes:
    """What the network's id is made of: all but the id, the bootstrap addresses and the signature.

    MessagePack: maps with their keys sorted by code point, fields that have their default left out, integers in their
    shortest form, floats in 64 bits.
    """
    return _packed(manifest, "network", "bootstrap", "signature")


def signed_bytes(manifest: Manifest) -> bytes:
    """What the maker signs: all but the signature, in the same form."""
    return b"covey manifest 1\0" + _packed(manifest, "signature")


def _packed(manifest: Manifest, *without: str) -> bytes:
    fields = msgspec.to_builtins(manifest)
    return msgspec.msgpack.encode(
        {name: value for name, value in fields.items() if name not in without}, order="sorted"
    )


def network_id(manifest: Manifest) -> str:
    """At most 64 characters."""
    return f"{manifest.name}-{hashlib.sha256(content_bytes(manifest)).hexdigest()[:ID_DIGITS]}"


def sign_manifest(manifest: Manifest, signatures: Signatures) -> Manifest:
    """The manifest with its id and its maker's name and signature.

    Raises:
        ConfigError: it holds what no manifest may.
    """
    named = replace(manifest, maker=peer_of_author(signatures.author))
    _check_content(named, "manifest")
    named = replace(named, network=network_id(named))
    return replace(named, signature=signatures.sign(signed_bytes(named)).hex())


def check_manifest(manifest: Manifest, origin: str = MANIFEST_FILE) -> None:
    """All that a manifest says can be meant, and its maker has said it.

    Raises:
        ConfigError: with the field's path, or with `origin` where bytes were changed.
    """
    _check_content(manifest, origin)
    genuine = is_signed(author_of(manifest.maker), signed_bytes(manifest), bytes.fromhex(manifest.signature))
    if not genuine or manifest.network != network_id(manifest):
        raise ConfigError(
            origin,
            f"is not what its maker {manifest.maker} signed: it was changed on the way; get it anew from its maker",
        )


def _check_content(manifest: Manifest, origin: str) -> None:
    for field in ("maker", "members", "inviters"):
        value = getattr(manifest, field)
        for peer in [value] if isinstance(value, str) else value:
            try:
                author_of(peer)
            except ValueError as error:
                raise ConfigError(f"{origin}: {field}", str(error)) from error
    for address in manifest.bootstrap:
        if peer_of(address) is None:
            raise ConfigError(f"{origin}: bootstrap", f"'{address}' names no peer")
    _check_task(manifest.task, origin)
    _check_plain(manifest.task.options, f"{origin}: task.options")
    _check_tables(manifest, origin)


def _check_task(task: ManifestTask, origin: str) -> None:
    path = f"{origin}: task"
    if not -(2**63) <= task.seed < 2**63:
        raise ConfigError(f"{path}.seed", f"{task.seed} is no 64-bit integer")
    if task.sha256 is None:
        if not re.fullmatch(r"[a-z0-9-]+", task.name):
            raise ConfigError(f"{path}.name", f"'{task.name}' is no built-in, and no file is pinned")
    elif not re.fullmatch(re.escape(TASK_FILE) + r":[A-Za-z_][A-Za-z0-9_]*", task.name):
        raise ConfigError(f"{path}.name", f"'{task.name}'", [f"{TASK_FILE}:<function>"])


def _check_tables(manifest: Manifest, origin: str) -> None:
    protocol = manifest.shared.get("learning", {}).get("protocol")
    if not isinstance(protocol, str) or protocol == NO_LEARNING:
        raise ConfigError(f"{origin}: shared.learning.protocol", "must be given, and learn")
    for part, belongs in (("shared", is_shared), ("suggested", is_suggested)):
        for table, settings in getattr(manifest, part).items():
            for name, value in settings.items():
                path = f"{origin}: {part}.{table}.{name}"
                if not belongs(protocol, table, name):
                    raise ConfigError(path, "is nothing that a network decides")
                _check_plain(value, path)


def _check_plain(value: Any, path: str, depth: int = MAX_DEPTH) -> None:
    """What TOML and MessagePack both write, and read back as it was; no deeper than anybody needs."""
    if not depth:
        raise ConfigError(path, f"is nested more than {MAX_DEPTH} deep")
    match value:
        case bool() | str():
            fits = True
        case int():
            fits = -(2**63) <= value < 2**63
        case float():
            fits = math.isfinite(value)
        case Mapping():
            fits = all(isinstance(key, str) for key in value)
            for key, item in value.items():
                _check_plain(item, f"{path}.{key}", depth - 1)
        case list() | tuple():
            fits = True
            for item in value:
                _check_plain(item, path, depth - 1)
        case _:
            fits = False
    if not fits:
        raise ConfigError(path, f"{value!r} cannot be shared", ["finite numbers, text, lists and tables"])


# --- files ----------------------------------------------------------------------------------------------
HEAD = """\
# A covey network: join it with `covey join` and this file. It is signed: a changed byte is noticed, and a changed setting
# makes another network. Settings of your own go into the covey.toml of your home.

"""


def manifest_toml(manifest: Manifest) -> str:
    """As a file, which `read_manifest` reads back to an equal manifest."""
    return HEAD + tomli_w.dumps(msgspec.to_builtins(manifest), multiline_strings=False)


def parse_manifest(text: str, origin: str = MANIFEST_FILE) -> Manifest:
    """TOML text to a manifest, unchecked but for its form.

    Raises:
        ConfigError: not TOML, an unknown field, a wrong type; with the field's path.
    """
    try:
        return msgspec.convert(tomllib.loads(text), Manifest)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(origin, f"is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        found = explain(str(error), Manifest, "manifest")
        allowed = [found.allowed] if found.allowed else []
        raise ConfigError(f"{origin}: {found.path}", found.problem, allowed) from error


def read_manifest(path: Path) -> Manifest:
    """A manifest file, checked with its signature.

    Raises:
        ConfigError: it cannot be read, is no manifest, or not what its maker signed.
    """
    try:
        text = read_bounded(path, MAX_MANIFEST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not UTF-8 text") from error
    manifest = parse_manifest(text, path.name)
    check_manifest(manifest, path.name)
    return manifest


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A file's bytes. Raises ConfigError where it cannot be read or is larger."""
    try:
        with path.open("rb") as file:
            found = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    if len(found) > max_bytes:
        raise ConfigError(str(path), f"is larger than {max_bytes} bytes")
    return found


def check_task_code(manifest: Manifest, code: bytes, origin: str) -> None:
    """A task file's bytes are those that the manifest pins. Raises ConfigError where they are not."""
    found = hashlib.sha256(code).hexdigest()
    if found != manifest.task.sha256:
        raise ConfigError(
            origin,
            f"is not the task file of '{manifest.network}': its SHA-256 is {found[:16]}…, pinned is "
            f"{(manifest.task.sha256 or '')[:16]}…; put the file back as it came, or make another network of it with "
            "`covey network new`",
        )
    check_readable(code, origin)


def check_readable(code: bytes, origin: str) -> None:
    """What is shown of a task file is what Python runs. Raises ConfigError where it is not UTF-8, or says that it is not."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(code).readline)
        code.decode()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(origin, f"is not UTF-8 text: {error}") from error
    if encoding not in ("utf-8", "utf-8-sig"):
        raise ConfigError(
            origin, f"is written in {encoding}: what is shown of it would not be what runs", ["UTF-8"]
        )


def check_task_file(manifest: Manifest, folder: Path) -> None:
    """The same of the file beside a manifest; of a built-in there is none to check."""
    if manifest.task.sha256 is not None:
        path = folder / TASK_FILE
        check_task_code(manifest, read_bounded(path, MAX_TASK_BYTES), str(path))
