"""Making a network from a node's settings, and binding a home to a network: the files that say so.

Belongs here: what `covey network new` and `covey join` do, without their words and questions.
"""

import hashlib
import shutil
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from node.config import CONFIG_FILE, Config, Setting, override, parse_config
from node.explain import explain
from node.first_config import bound_config
from node.invitation import save_admission, write_private
from node.manifest import (
    MANIFEST_FILE,
    MAX_TASK_BYTES,
    TASK_FILE,
    Manifest,
    check_readable,
    divide,
    manifest_toml,
    read_bounded,
    read_manifest,
    sign_manifest,
    without_imposed,
)
from node.signatures import peer_of_author
from node.store import HomeLock
from protocols.admission import Admission
from protocols.errors import ConfigError, CoveyError, LocalError
from protocols.signing import Signatures
from protocols.view import NO_LEARNING

OLD_CONFIG_FILE = CONFIG_FILE + ".old"


# --- a new network --------------------------------------------------------------------------------------
def find_task_file(reference: str, folders: Sequence[Path]) -> Path | None:
    """The file of a task `file.py:function`, in the first folder that has it; None for a built-in.

    Raises:
        ConfigError: there is no such file.
    """
    file, colon, _ = reference.rpartition(":")
    if not colon:
        return None
    for folder in folders:
        path = folder / Path(file).expanduser()
        if path.is_file():
            return path.resolve()
    raise ConfigError("task.name", f"there is no file {file} in " + " or ".join(map(str, folders)))


def schema_of_task(config: Config, home: Path, task_file: Path | None) -> str:
    """The schema hash of a config's task, in hexadecimal. This runs the task's code.

    Raises:
        ConfigError: the task or its model cannot be made.
    """
    from node.task_loading import make_task
    from node.tasks import initial_params
    from node.weights import schema_hash, schema_of

    name = config.task.name
    if task_file is not None:
        name = f"{task_file}:{name.rpartition(':')[2]}"
    task = make_task(name, config.task.options, home)
    try:
        return schema_hash(task.name, schema_of(initial_params(task, config.task.seed or 0))).hex()
    except CoveyError:
        raise
    except Exception as error:  # the user's own model, which may raise anything
        raise ConfigError("task.name", f"the model of '{task.name}' cannot be made: {error!r}") from error


def make_manifest(
    config: Config,
    label: str,
    schema: str,
    code: bytes | None,
    signatures: Signatures,
    *,
    bootstrap: Sequence[str] = (),
    members: Sequence[str] = (),
    inviters: Sequence[str] = (),
    own_options: Collection[str] = (),
) -> Manifest:
    """A signed manifest of what a config says. code: of the task file.

    own_options: options of the task that each device chooses for itself.

    Raises:
        ConfigError: something in it cannot be shared.
    """
    if code is not None:
        check_readable(code, "task.name")
    shared, suggested = divide(msgspec.to_builtins(config), msgspec.to_builtins(Config()))
    name = config.task.name if code is None else f"{TASK_FILE}:{config.task.name.rpartition(':')[2]}"
    fields = {
        "covey": 1,
        "name": label,
        "maker": peer_of_author(signatures.author),
        "bootstrap": list(bootstrap),
        "members": list(members),
        "inviters": list(inviters),
        "task": {
            "name": name,
            "options": {key: value for key, value in config.task.options.items() if key not in own_options},
            "seed": config.task.seed or 0,
            "sha256": None if code is None else hashlib.sha256(code).hexdigest(),
            "schema": schema,
        },
        "shared": shared,
        "suggested": suggested,
    }
    try:
        manifest = msgspec.convert(fields, Manifest)
    except msgspec.ValidationError as error:
        raise explain(str(error), Manifest, "manifest") from error
    return sign_manifest(manifest, signatures)


# --- a home of a network --------------------------------------------------------------------------------
def network_of(home: Path) -> Manifest | None:
    """The manifest that a home is bound to. Raises ConfigError where it is damaged."""
    path = home / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        return read_manifest(path)
    except ConfigError as error:
        problem = f"{error.problem}; move {path} away and `covey join` again with the link or manifest"
        raise ConfigError(error.path, problem, [error.allowed] if error.allowed else []) from error


def check_unbound(home: Path, network: str) -> None:
    """Raises LocalError where a home belongs to another network than this."""
    bound = network_of(home)
    if bound is not None and bound.network != network:
        raise LocalError(f"{home} belongs to the network '{bound.network}'; choose another --home")


class Binding(msgspec.Struct, frozen=True):
    """A home's files as they will be. Nothing is written before all of it is known to fit."""

    manifest: Manifest
    code: bytes | None
    text: str
    """Of the config file."""
    config: Config

    def write(self, home: Path, admission: Admission | None) -> None:
        """Bind the home; its config before is kept beside the new one.

        Raises:
            LocalError: a node runs in this home, or another task file is in the way.
        """
        with _locked(home):
            task, config = home / TASK_FILE, home / CONFIG_FILE
            if self.code is not None:
                if task.exists() and read_bounded(task, MAX_TASK_BYTES) != self.code:
                    raise LocalError(f"{task} is another file than the network's; move it away")
                write_private(task, self.code)
            write_private(home / MANIFEST_FILE, manifest_toml(self.manifest).encode())
            if admission is not None:
                save_admission(home, admission)
            old = home / OLD_CONFIG_FILE
            # The first one is the user's own; those after it were written here.
            if config.exists() and not old.exists() and config.read_text(encoding="utf-8") != self.text:
                shutil.copy2(config, old)
            write_private(config, self.text.encode())


def check_stopped(home: Path) -> None:
    """Raises LocalError where a node runs in this home."""
    if home.exists():
        with _locked(home):
            return


def _locked(home: Path) -> HomeLock:
    try:
        return HomeLock(home)
    except LocalError as error:
        raise LocalError(
            f"{error}; stop it with `covey stop --home {home}`, or choose another --home"
        ) from error


def bind(
    home: Path,
    manifest: Manifest,
    code: bytes | None,
    settings: Sequence[Setting],
    environ: Mapping[str, str],
) -> Binding:
    """What a home needs to belong to a network. An existing config keeps what is its own and not a mere default.

    settings: the device's own, on top of that.

    Raises:
        ConfigError: a setting contradicts the manifest.
    """
    path = home / CONFIG_FILE
    told = [Setting(("network", "manifest"), MANIFEST_FILE), *settings]
    text = _rebound(path, manifest, told) if path.exists() else bound_config(told)
    return Binding(manifest, code, text, parse_config(text, environ, str(path), (), manifest))


def _rebound(path: Path, manifest: Manifest, settings: Sequence[Setting]) -> str:
    data = _read_toml(path)
    helps = isinstance(data.get("learning"), dict) and data["learning"].get("protocol") == NO_LEARNING
    data = without_imposed(manifest, _without_defaults(data))
    if helps:  # a device's own choice, whatever the network learns
        override(data, "learning.protocol", ("learning", "protocol"), NO_LEARNING)
    for setting in settings:
        override(data, ".".join(setting.path), setting.path, setting.value)
    return f"# Settings of this device; those of the network are in {MANIFEST_FILE}.\n\n" + tomli_w.dumps(
        data
    )


def known_bootstrap(home: Path) -> list[str]:
    """Of a home's config file, whatever became of the manifest beside it."""
    network = _read_toml(home / CONFIG_FILE).get("network")
    found = network.get("bootstrap") if isinstance(network, dict) else None
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not TOML: {error}") from error


def _without_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """`covey init` writes defaults out; they would hide what the network's maker suggests."""
    defaults = msgspec.json.decode(msgspec.json.encode(Config()))
    return {
        name: {key: value for key, value in table.items() if value != defaults.get(name, {}).get(key, ...)}
        if isinstance(table, dict)
        else table
        for name, table in data.items()
    }
