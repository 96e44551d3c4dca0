"""The node's one config file: TOML into frozen structs, `COVEY_…` from the environment on top, checked once.

Every mistake is a `ConfigError` with the field's path and what is allowed.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta, Struct, field
from msgspec.structs import replace

from node.addresses import MAX_PORT, split_tcp
from node.core import LEARNING, CoreSettings
from node.explain import explain
from node.manifest import MANIFEST_FILE, Manifest, check_agreement, check_task_file, layered, read_manifest
from node.manners import DeviceSettings
from node.settings import Shard, TrainingSettings
from node.signatures import author_of
from protocols.admission import Admission, AdmissionPolicy
from protocols.content import ContentSettings
from protocols.errors import ConfigError
from protocols.exchange import ExchangeSettings
from protocols.gossip import GossipSettings
from protocols.sampling import SampledSettings
from protocols.scalar_terms import ScalarSettings
from protocols.view import NO_LEARNING, ViewSettings
from protocols.vocabulary import DIGEST_BYTES, Name, SchemaHash, peer_of

CONFIG_FILE = "covey.toml"
_ENV_PREFIX = "COVEY_"


class NetworkConfig(ViewSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the node listens, whom it asks first, how many links it keeps."""

    name: Name = "covey"
    """Nodes with another network name refuse each other."""
    manifest: str | None = None
    """The file beside this one that says what all nodes of the network agree on, as `covey join` puts it there."""
    psk: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    """A secret that all nodes of the network share, 64 hexadecimal digits: connections without it are cut before a word
    is said. It comes with the link of `covey invite`."""
    members: tuple[str, ...] = ()
    """Peer ids that may join; with `inviters` left out too, anyone may. The same on all nodes."""
    inviters: tuple[str, ...] = ()
    """Peer ids that may join, and may invite others with `covey invite`. The same on all nodes."""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4001",)
    """Multiaddrs to listen on; TCP only. Port 0 takes a free one."""
    announce: tuple[str, ...] = ()
    """Multiaddrs to tell others instead of the ones listened on: for a node behind a forwarded port."""
    mdns: bool = True
    """Find nodes of this network on the local network, and be found there. Switch it off where the others on it need not
    know that a node runs here. A node that listens on loopback alone has no part in it."""
    dht: bool = True
    """Find nodes of this network through nodes of any covey network, starting with the bootstrap list, and help others do
    the same. Switch it off where a node shall speak to none but its peers. What it costs stands in docs/discovery.md."""


class LearningConfig(GossipSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How rounds run and how received models are merged."""

    protocol: Literal["gossip", "sampled", "scalars", "none"] = "gossip"
    """`gossip`: exchange models with neighbours. `sampled`: a few nodes, drawn anew, train in each round, see the table
    `sampled`; of this table only this setting counts then. `scalars`: exchange one byte a gradient estimate, see the table `scalars`; of this table
    only this setting counts then. `none`: help others find each other, learn nothing."""
    rule: tuple[str | dict[str, Any], ...] = ("mean", "variance.corrected")
    """The merge rules in order: a name, or a table with `name` and its arguments; `covey rules` lists them."""
    final_rule: tuple[str | dict[str, Any], ...] = ("fedavg",)
    """The same for the final merge, which is a mean over all samples of all nodes. Where nodes began apart, put an
    alignment before it."""


class SampledConfig(SampledSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Learning with `protocol = "sampled"`: who is drawn, and how a round's models are merged."""

    rule: tuple[str | dict[str, Any], ...] = ("fedavg",)
    """The merge rules in order, as `learning.rule`. All models of a round have equal weights, and none of them is the
    aggregator's own: what a rule calls so is the first by peer id. `fedavg` is their mean. *"""


RankerName = Literal["g-rank", "g-rank-capped", "popularity", "panache", "maay", "bm25"]
RANKERS: tuple[str, ...] = get_args(RankerName)
"""The names of `aggregation.ranking.RANKERS`, without its numpy."""


class ContentConfig(ContentSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the node shares and hears of shared content, how it ranks what it finds, and how much it takes in."""

    enabled: bool = True
    """Take part in sharing: serve what is shared here, and hear what others share. It needs no learning."""
    share_clicks: Literal["off", "hashed", "plain"] = "off"
    """Tell others which results you choose, signed with your name, so that who searches alike finds alike. `hashed` hides the
    words from whoever does not guess them, and there are not that many words. `covey forget` takes all of it back."""
    ranker: RankerName = "g-rank"
    """How results are ranked. `g-rank`: by the clicks of those who search and click as you do (arXiv 2301.12530).
    `g-rank-capped`: the same with one vote a peer, word and item. `bm25`: by the text alone. The others are for comparison."""
    isolation: Annotated[float, Meta(ge=0, le=1)] = 0.001
    """Of the two `g-rank`: what a click counts beside the similarity of who made it, which is 1 at most. So little of it
    decides where nobody like you has clicked; with 0 nothing does, and with 1 nearly all count alike, attackers too."""
    top_terms: Annotated[int, Meta(ge=1, le=1000)] = 10
    """Words that a peer searches for most often, by which it is compared with you."""
    position_weights: bool = False
    """Count a click for more where its result stood further down: nobody gets there by chance."""
    downloads: str | None = None
    """The folder for what you get, from the root or from `~`. Left out, `downloads` in the home."""
    max_item_bytes: Annotated[int, Meta(ge=1)] = 16 * 1024**3
    """What is larger is not fetched, be it one file or all files of a folder."""
    max_total_bytes: Annotated[int, Meta(ge=1)] = 64 * 1024**3
    """All that was got and is still served from the downloads, with what is on its way."""
    min_free_bytes: Annotated[int, Meta(ge=0)] = 1024**3
    """So much of the disk stays free: nothing is fetched beyond it."""


class TaskConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What is learnt: a built-in by name, or `my_task.py:make_task`."""

    name: Annotated[str, Meta(min_length=1)] = "digits"
    options: dict[str, Any] = {}
    seed: int | None = None
    """Of the first model and the batches; left out, it follows from the node's key, but with `scalars` and `sampled` the
    first model is the same on all nodes, which it has to be."""
    probe: str | None = None
    """An .npz file with inputs that all nodes have, an array `x` [samples, ...] as the network takes them, for merge
    rules with `probe = "shared"`. The file must be the same on every node; it never travels."""
    shard: Shard | None = None
    """Which part of one shared data set is this node's: for trials. With own data leave it out."""


class TrainingConfig(TrainingSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Local training in each round."""

    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    """CPU threads for torch. More than the physical cores helps nobody."""


class ApiConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The HTTP API, on this machine only."""

    enabled: bool = True
    port: Annotated[int, Meta(ge=0, le=MAX_PORT)] = 0
    """0 takes a free one; `api.json` in the home says which."""


class LogConfig(Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    json: bool = False
    """One JSON object a line instead of text for people."""


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole `covey.toml`."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    sampled: SampledConfig = field(default_factory=SampledConfig)
    scalars: ScalarSettings = field(default_factory=ScalarSettings)
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    task: TaskConfig = field(default_factory=TaskConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    device: DeviceSettings = field(default_factory=DeviceSettings)
    content: ContentConfig = field(default_factory=ContentConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def learns(self) -> bool:
        return self.learning.protocol != NO_LEARNING

    @property
    def rule(self) -> tuple[str | dict[str, Any], ...]:
        """By which received models are merged."""
        return self.sampled.rule if self.learning.protocol == "sampled" else self.learning.rule

    @property
    def members(self) -> frozenset[bytes]:
        """The author keys of `scalars.members`."""
        return frozenset(author_of(peer) for peer in self.scalars.members)

    @property
    def admission_policy(self) -> AdmissionPolicy:
        """Whom the node links with, of `network.members` and `network.inviters`."""
        members, inviters = self.network.members, self.network.inviters
        return AdmissionPolicy(frozenset(map(author_of, members)), frozenset(map(author_of, inviters)))

    @property
    def _content_settings(self) -> ContentSettings | None:
        """None where content is switched off. An upload limit holds for answers too, and leaves half of it for the rest."""
        content, limit = self.content, self.device.upload_bytes_per_s
        if limit:
            content = replace(content, answer_bytes_per_s=min(content.answer_bytes_per_s, limit // 2))
        return content if content.enabled else None

    def core_settings(
        self,
        task: str,
        schema: SchemaHash,
        max_model_bytes: int,
        base: bytes = bytes(DIGEST_BYTES),
        admission: Admission | None = None,
    ) -> CoreSettings:
        """What the core is told. base: of a node that learns by scalars, the digest of the model that all begin with.
        admission: what the node shows in a private network."""
        return CoreSettings(
            network=self.network.name,
            task=task,
            schema=schema,
            max_model_bytes=max_model_bytes,
            learning=self.learning.protocol,
            view=self.network,
            exchange=self.exchange,
            gossip=self.learning,
            sampled=self.sampled,
            scalars=self.scalars,
            base=base,
            members=self.members,
            policy=self.admission_policy,
            admission=admission,
            content=self._content_settings,
        )


class Setting(NamedTuple):
    """One value that goes on top of file and environment: the names of its tables and its own, such as
    ("network", "target_degree")."""

    path: tuple[str, ...]
    value: Any


def parse_setting(text: str, option: str = "--set", table: tuple[str, ...] = ()) -> Setting:
    """A setting as it is written on the command line: `network.target_degree=4`.

    The value is read as TOML; what is none is taken as text.

    table: what the name on the left is in; then it is one name, dots and all.
    Raises ConfigError, with `option` as the path, where there is no name.
    """
    name, equals, value = text.partition("=")
    parts = (*table, name) if table else tuple(name.split("."))
    if not equals or len(parts) < 2 or not all(parts):
        wanted = "<name>=<value>" if table else "<table>.<name>=<value>"
        raise ConfigError(option, f"'{text}' sets nothing", [wanted])
    return Setting(parts, _toml_or_text(value))


def load_config(
    home: Path, environ: Mapping[str, str] = os.environ, settings: Sequence[Setting] = ()
) -> Config:
    """A home's config with the environment on top, and settings on top of that. Below them all is the network's manifest,
    where the home has one.

    Raises:
        ConfigError: missing or malformed file, unknown field, wrong type or value, or one that the network sets otherwise.
    """
    path = home / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be read ({error.strerror}); make a home with `covey init`"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not UTF-8 text") from error
    data = _tables(text, environ, str(path), settings)
    return _settled(data, _manifest_of(data, home))


def parse_config(
    text: str,
    environ: Mapping[str, str],
    origin: str = CONFIG_FILE,
    settings: Sequence[Setting] = (),
    manifest: Manifest | None = None,
) -> Config:
    """TOML text, environment and settings to a checked config, with what a manifest sets below them."""
    return _settled(_tables(text, environ, origin, settings), manifest)


def _tables(
    text: str, environ: Mapping[str, str], origin: str, settings: Sequence[Setting]
) -> dict[str, Any]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(origin, f"is not TOML: {error}") from error
    for name in sorted(environ):
        if name.startswith(_ENV_PREFIX) and name not in _OTHER_VARIABLES:
            path = name.removeprefix(_ENV_PREFIX).lower().split("__")
            override(data, name, path, _toml_or_text(environ[name]))
    for setting in settings:
        if setting.path == ("task", "name"):
            _leave_options(data, setting.value)
        override(data, ".".join(setting.path), setting.path, setting.value)
    return data


def _manifest_of(data: Mapping[str, Any], home: Path) -> Manifest | None:
    """What the home's network agrees on, its task file checked too; None where nothing names a manifest."""
    table = data.get("network")
    name = table.get("manifest") if isinstance(table, dict) else None
    if not isinstance(name, str):
        return None
    if Path(name).name != name:
        raise ConfigError("network.manifest", f"'{name}' does not lie in the home", [MANIFEST_FILE])
    manifest = read_manifest(home / name)
    check_task_file(manifest, home)
    return manifest


def _settled(data: dict[str, Any], manifest: Manifest | None) -> Config:
    if manifest is None:
        return convert_config(data)
    try:
        convert_config(layered(manifest, {}))
    except ConfigError as error:
        problem = f"{error.problem}; does it come from another version of covey?"
        raise ConfigError(f"{error.path} of the network's manifest", problem) from error
    config = convert_config(layered(manifest, data))
    check_agreement(manifest, msgspec.to_builtins(config))
    return config


def convert_config(data: dict[str, Any]) -> Config:
    """Plain tables to a checked config."""
    try:
        config = msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        raise explain(str(error), Config) from error
    _check(config)
    return config


_OTHER_VARIABLES = frozenset({"COVEY_HOME", "COVEY_REWRITE_TRACES"})


def override(data: dict[str, Any], origin: str, path: Sequence[str], value: Any) -> None:
    """Set one value in plain tables; `origin` is what an error names.

    Raises ConfigError where a value stands in the place of a table.
    """
    *tables, key = path
    table = data
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(origin, f"'{part}' is a value, not a table")
    table[key] = value


def _leave_options(data: dict[str, Any], task: Any) -> None:
    """Another task has other options than that of the file."""
    table = data.get("task")
    if isinstance(table, dict) and table.get("name", TaskConfig().name) != task:
        table.pop("options", None)


def _toml_or_text(value: str) -> Any:
    try:
        found = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value  # a bare word
    return found if isinstance(found, bool | int | float | str | list | dict) else value


def _check(config: Config) -> None:
    """What types cannot say."""
    for index, address in enumerate(config.network.bootstrap):
        if peer_of(address) is None:
            raise ConfigError(
                f"network.bootstrap[{index}]",
                f"'{address}' names no peer",
                ["/ip4/<address>/tcp/<port>/p2p/<peer id>, as printed by `covey init` and `covey status`"],
            )
    for name in ("listen", "announce"):
        for index, address in enumerate(getattr(config.network, name)):
            path = f"network.{name}[{index}]"
            kind, _, _ = split_tcp(address, path)
            if peer_of(address) is not None:
                raise ConfigError(
                    path,
                    f"'{address}' ends in a peer id; the node adds its own",
                    [address.partition("/p2p/")[0]],
                )
            if name == "listen" and kind.startswith("dns"):
                raise ConfigError(
                    path, f"'{address}' is a name; a node listens on an IP", ["/ip4/0.0.0.0/tcp/4001"]
                )
    if config.network.target_degree > config.network.max_degree:
        raise ConfigError(
            "network.target_degree", "is more than max_degree", [f"0 to {config.network.max_degree}"]
        )
    if config.network.dead_after_s < 2 * config.network.heartbeat_s:
        raise ConfigError(
            "network.dead_after_s", "would take one lost heartbeat for a death", [">= 2 * heartbeat_s"]
        )
    shard = config.task.shard
    if shard is not None and shard.index >= shard.count:
        raise ConfigError("task.shard.index", f"{shard.index} of {shard.count}", [f"0 to {shard.count - 1}"])
    downloads = config.content.downloads
    if downloads is not None and not downloads.startswith(("/", "~")):
        raise ConfigError("content.downloads", f"'{downloads}' is not absolute", ["/…", "~/…"])
    _check_peers("scalars.members", config.scalars.members)
    _check_peers("network.members", config.network.members)
    _check_peers("network.inviters", config.network.inviters)
    assert config.learning.protocol in LEARNING


def _check_peers(path: str, peers: Sequence[str]) -> None:
    for index, peer in enumerate(peers):
        try:
            author_of(peer)
        except ValueError as error:
            raise ConfigError(
                f"{path}[{index}]", str(error), ["a peer id, as printed by `covey init`"]
            ) from error


def to_toml(config: Config) -> str:
    """The whole config as TOML, defaults included; it loads back to an equal config."""
    return _render(msgspec.to_builtins(config))


def shown(config: Config) -> dict[str, Any]:
    """The whole config as plain tables, to be shown: people paste them."""
    tables: dict[str, Any] = msgspec.to_builtins(config)
    if tables["network"]["psk"] is not None:
        tables["network"]["psk"] = "(a secret, see the file)"
    return tables


def shown_as_toml(config: Config) -> str:
    """The same as TOML."""
    return _render(shown(config))


def _render(data: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for name, table in data.items():
        lines += [f"[{name}]", *_render_table(name, table), ""]
    return "\n".join(lines)


def _render_table(path: str, table: Mapping[str, Any]) -> list[str]:
    plain = {
        key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)
    }
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{toml_key(key)} = {toml_value(value)}" for key, value in plain.items()]
    for key, value in nested.items():
        inner = f"{path}.{toml_key(key)}"
        lines += ["", f"[{inner}]", *_render_table(inner, value)]
    return lines


def toml_key(key: str) -> str:
    """One name as TOML."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: Any) -> str:
    """One value as TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # A JSON string is a TOML basic string, but for one control character.
            return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
        case int() | float():
            return repr(value)
        case Mapping():
            return (
                "{" + ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
            )
        case _:
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
