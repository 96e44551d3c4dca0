"""The config file: every mistake by its path and with what is allowed, the environment on top, and there and back."""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from node.cli import app
from node.config import (
    CONFIG_FILE,
    Config,
    Setting,
    TrainingConfig,
    convert_config,
    load_config,
    parse_config,
    parse_setting,
    to_toml,
    toml_value,
)
from node.first_config import first_config
from node.signatures import peer_of_author
from protocols.errors import ConfigError
from protocols.vocabulary import SchemaHash

MEMBER = peer_of_author(bytes(range(32)))
ADDRESS = "/ip4/10.0.0.1/tcp/4001/p2p/12D3KooWAbc"


def refused(text: str, **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, environ, "covey.toml")
    return caught.value


# --- mistakes in the file -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "path", "problem", "allowed"),
    [
        (
            "netwrok = 1",
            "netwrok",
            "no such setting",
            "api, content, device, exchange, learning, log, network, sampled, scalars, task, training",
        ),
        (
            "[log]\ncolour = true",
            "log.colour",
            "no such setting",
            "json, level",
        ),
        ("[network]\nporrt = 1", "network.porrt", "no such setting", "heartbeat_s"),
        ("[learning]\nround = 3", "learning.round", "no such setting", "rounds"),
        ("[exchange]\nretries = 3", "exchange.retries", "no such setting", "max_attempts"),
        ("[training]\nlr = 0.1", "training.lr", "no such setting", "learning_rate"),
        ("[api]\nhost = '0.0.0.0'", "api.host", "no such setting", "enabled, port"),
        ("[task]\noption = {}", "task.option", "no such setting", "name, options, probe, seed, shard"),
        (
            "[task.shard]\nindex = 0\ncount = 2\nof = 3",
            "task.shard.of",
            "no such setting",
            "alpha, count, index, partitioner, samples_per_node, seed, shards_per_node",
        ),
        ("network = 3", "network", "expected `object`, got `int`", ""),
        ("[network]\nname = 3", "network.name", "expected `str`, got `int`", ""),
        ("[network]\nbootstrap = [1]", "network.bootstrap[0]", "expected `str`, got `int`", ""),
        ("[network]\nstatic = 1", "network.static", "expected `bool`, got `int`", ""),
        ("[learning]\nrule = 'mean'", "learning.rule", "expected `array`, got `str`", ""),
        ("[learning]\nrule = ['mean', 3]", "learning.rule[1]", "expected `str | object`, got `int`", ""),
        ("[task]\nseed = 'x'", "task.seed", "expected `int | null`, got `str`", ""),
        ("[network]\ntarget_degree = 65", "network.target_degree", "expected `int` <= 64", ""),
        ("[network]\nname = ''", "network.name", "expected `str` of length >= 1", ""),
        ("[training]\nlearning_rate = 0", "training.learning_rate", "expected `float` > 0.0", ""),
        ("[training]\nlearning_rate = nan", "training.learning_rate", "expected `float` > 0.0", ""),
        ("[learning]\nquorum = 1.5", "learning.quorum", "expected `float` <= 1.0", ""),
        ("[device]\nonly_idle = true", "device.only_idle", "no such setting", "others_busy_at_most"),
        ("[device]\nnice = -1", "device.nice", "expected `int` >= 0", ""),
        ("[device]\nskip = 1.0", "device.skip", "expected `float` <= 0.99", ""),
        ("[device]\nhours = '22-7'", "device", "hours '22-7' are not written as 22:00-07:00", ""),
        ("[device]\nupload_bytes_per_s = 10", "device", "upload_bytes_per_s 10 is below", ""),
        ("[content]\nshare_clicks = 'yes'", "content.share_clicks", "'yes' is not", "off, hashed, plain"),
        (
            "[content]\nranker = 'best'",
            "content.ranker",
            "'best' is not",
            "g-rank, g-rank-capped, popularity",
        ),
        ("[content]\nisolation = 2", "content.isolation", "expected `float` <= 1.0", ""),
        ("[content]\npull_s = 0", "content.pull_s", "expected `float` >= 0.5", ""),
        ("[content]\ndownloads = 'there'", "content.downloads", "'there' is not absolute", "/…, ~/…"),
        ("[api]\nport = 70000", "api.port", "expected `int` <= 65535", ""),
        ("[log]\nlevel = 'loud'", "log.level", "'loud' is not one", "debug, info, warning, error"),
        (
            "[learning]\nprotocol = 'fed'",
            "learning.protocol",
            "'fed' is not one",
            "gossip, sampled, scalars, none",
        ),
        ("[scalars]\nsample = 3", "scalars.sample", "no such setting", "samples"),
        ("[scalars]\nsamples = 0", "scalars.samples", "expected `int` >= 1", ""),
        ("[scalars]\nsamples = 256", "scalars.samples", "expected `int` <= 255", ""),
        ("[scalars]\nlearning_rate = 0", "scalars.learning_rate", "expected `float` > 0.0", ""),
        ("[scalars]\ndirection = 'x'", "scalars.direction", "'x' is not one", "rademacher, gaussian"),
        ("[scalars]\nprivate_clip = 0", "scalars.private_clip", "expected `float` > 0.0", ""),
        ("[scalars]\nschedule = 'linear'", "scalars", "schedule 'linear' falls to 0 over rounds", ""),
        ("[scalars]\npool = 9\nweight_decay = 0.1", "scalars", "weight_decay cannot go with a pool", ""),
        ("[scalars]\nprivate_noise = 1", "scalars", "private_noise is in units of private_clip", ""),
        (
            f"[scalars]\nmembers = ['{MEMBER}', '12D3KooWAbc']",
            "scalars.members[1]",
            "'12D3KooWAbc' is not the peer id of an Ed25519 key",
            "a peer id, as printed by `covey init`",
        ),
        ("[scalars]\nmembers = ['0OIl']", "scalars.members[0]", "'0OIl' is no peer id", "a peer id"),
        (
            "[task.shard]\nindex = 0\ncount = 2\npartitioner = 'x'",
            "task.shard.partitioner",
            "'x' is not one of the choices",
            "iid, dirichlet, shard",
        ),
        ("[task.shard]\nindex = 1", "task.shard.count", "must be given", ""),
        ("[task.shard]\nindex = 4\ncount = 4", "task.shard.index", "4 of 4", "0 to 3"),
        (
            f"[network]\nbootstrap = ['{ADDRESS}', '/ip4/10.0.0.1/tcp/4001']",
            "network.bootstrap[1]",
            "'/ip4/10.0.0.1/tcp/4001' names no peer",
            "/ip4/<address>/tcp/<port>/p2p/<peer id>",
        ),
        (
            f"[network]\nannounce = ['{ADDRESS}']",
            "network.announce[0]",
            f"'{ADDRESS}' ends in a peer id; the node adds its own",
            "/ip4/10.0.0.1/tcp/4001",
        ),
        (
            "[network]\nlisten = ['/dns4/a.example/tcp/4001']",
            "network.listen[0]",
            "'/dns4/a.example/tcp/4001' is a name; a node listens on an IP",
            "/ip4/0.0.0.0/tcp/4001",
        ),
        ("[network]\ntarget_degree = 25", "network.target_degree", "is more than max_degree", "0 to 24"),
        (
            "[network]\ndead_after_s = 9\nheartbeat_s = 5",
            "network.dead_after_s",
            "would take one lost heartbeat for a death",
            ">= 2 * heartbeat_s",
        ),
    ],
)
def test_a_mistake_is_told_with_its_path_and_what_is_allowed(
    text: str, path: str, problem: str, allowed: str
) -> None:
    error = refused(text)
    assert error.path == path
    assert error.problem.startswith(problem)
    assert allowed in error.allowed
    assert str(error).startswith(f"{path}: {problem}")
    assert allowed in str(error)


@pytest.mark.parametrize(
    "address",
    [
        "4001",
        "/ip4/0.0.0.0/udp/4001",
        "/ip4/0.0.0.0/tcp/4001/ws",
        "/ip4/0.0.0.0/tcp/",
        "/ip4/0.0.0.0/tcp/65536",
    ],
)
@pytest.mark.parametrize("setting", ["listen", "announce"])
def test_an_address_is_tcp_with_a_port_that_exists(setting: str, address: str) -> None:
    error = refused(f"[network]\n{setting} = ['/ip6/::/tcp/0', '{address}']")
    assert (error.path, error.allowed) == (f"network.{setting}[1]", "/ip4/0.0.0.0/tcp/4001")
    assert address in str(error)


def test_a_name_may_be_announced() -> None:
    config = parse_config("[network]\nannounce = ['/dns4/a.example/tcp/4001']", {})
    assert config.network.announce == ("/dns4/a.example/tcp/4001",)


def test_text_that_is_not_toml_is_told_with_the_file_and_line() -> None:
    error = refused("[network\nname = 1")
    assert error.path == "covey.toml"
    assert "is not TOML" in str(error)
    assert "line 1" in str(error)


def test_a_missing_file_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*covey init") as caught:
        load_config(tmp_path, {})
    assert caught.value.path == str(tmp_path / CONFIG_FILE)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes("[network]\nname = 'café'".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path, {})


def test_an_empty_file_is_every_default() -> None:
    assert parse_config("", {}) == Config()


# --- the environment ------------------------------------------------------------------------------------
def test_the_environment_goes_on_top_of_the_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("[network]\nname = 'file'\ntarget_degree = 3\n")
    config = load_config(tmp_path, {"COVEY_NETWORK__NAME": "env", "HOME": "/x", "COVEY_HOME": "/y"})
    assert (config.network.name, config.network.target_degree) == ("env", 3)


def test_the_environment_sets_numbers_flags_lists_and_nested_tables() -> None:
    config = parse_config(
        "",
        {
            "COVEY_NETWORK__TARGET_DEGREE": "4",
            "COVEY_NETWORK__BOOTSTRAP": f'["{ADDRESS}"]',
            "COVEY_LEARNING__QUORUM": "0.75",
            "COVEY_LEARNING__RULE": '["mean", {name = "variance.corrected"}]',
            "COVEY_LOG__JSON": "true",
            "COVEY_TASK__NAME": "my_task.py:make_task",
            "COVEY_TASK__OPTIONS__HIDDEN": "[8, 8]",
            "COVEY_TASK__SHARD__INDEX": "1",
            "COVEY_TASK__SHARD__COUNT": "3",
        },
    )
    assert config.network.target_degree == 4
    assert config.network.bootstrap == (ADDRESS,)
    assert config.learning.quorum == 0.75
    assert config.learning.rule == ("mean", {"name": "variance.corrected"})
    assert config.log.json
    assert config.task.name == "my_task.py:make_task"
    assert config.task.options == {"hidden": [8, 8]}
    assert config.task.shard is not None
    assert (config.task.shard.index, config.task.shard.count) == (1, 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("COVEY_NETWORK__DEGREE", "4", "network.degree: no such setting"),
        ("COVEY_NETWORK", "4", "network: expected `object`, got `int`"),
        ("COVEY_TYPO", "4", "typo: no such setting"),
        ("COVEY_NETWORK__TARGET_DEGREE", "four", "network.target_degree: expected `int`, got `str`"),
        ("COVEY_NETWORK__NAME__X", "1", "COVEY_NETWORK__NAME__X: 'name' is a value, not a table"),
        ("COVEY_LOG__LEVEL", "loud", "log.level: 'loud' is not one of the choices"),
    ],
)
def test_a_mistake_in_the_environment_is_told_like_one_in_the_file(
    name: str, value: str, message: str
) -> None:
    assert str(refused("[network]\nname = 'net'", **{name: value})).startswith(message)


# --- there and back -------------------------------------------------------------------------------------
keys = st.text(st.characters(codec="utf-8"), max_size=8)
plain = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
tables = st.fixed_dictionaries(
    {},
    optional={
        "network": st.fixed_dictionaries(
            {},
            optional={
                "name": st.text(
                    st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=64
                ),
                "bootstrap": st.lists(st.sampled_from([ADDRESS, "/dns/a.example/tcp/1/p2p/x"]), max_size=2),
                "target_degree": st.integers(0, 24),
                "heartbeat_s": st.floats(0.001, 10),
                "static": st.booleans(),
            },
        ),
        "learning": st.fixed_dictionaries(
            {},
            optional={
                "quorum": st.floats(0, 1),
                "rule": st.lists(
                    st.sampled_from(["mean", {"name": "mean"}, {"name": "variance.corrected", "c": 0.5}]),
                    max_size=2,
                ),
            },
        ),
        "task": st.fixed_dictionaries(
            {},
            optional={
                "options": st.dictionaries(keys, values, max_size=3),
                "seed": st.integers(0, 2**62),
                "shard": st.fixed_dictionaries({"index": st.integers(0, 3), "count": st.integers(4, 9)}),
            },
        ),
        "log": st.fixed_dictionaries({}, optional={"level": st.sampled_from(["debug", "error"])}),
    },
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(tables)
def test_a_config_written_as_toml_loads_back_equal(data: dict[str, Any]) -> None:
    config = convert_config(data)
    assert parse_config(to_toml(config), {}) == config


@pytest.mark.parametrize(
    "text", ["plain", 'with "quotes"', "back\\slash", "line\nbreak", "\x7f\x00\x1f", "é😀"]
)
def test_any_text_is_a_toml_value(text: str) -> None:
    assert tomllib.loads(f"x = {toml_value(text)}")["x"] == text


def test_a_written_config_shows_every_default() -> None:
    shown = tomllib.loads(to_toml(Config()))
    assert set(shown) == set(Config.__struct_fields__)
    assert set(shown["network"]) == set(Config().network.__struct_fields__) - {"manifest", "psk"}
    assert msgspec.convert(shown["training"], TrainingConfig) == Config().training
    assert set(shown["training"]) == set(TrainingConfig.__struct_fields__)


@pytest.mark.parametrize("protocol", ["gossip", "scalars", "none"])
def test_what_init_writes_loads(tmp_path: Path, protocol: str) -> None:
    arguments = ["--home", str(tmp_path), "--bootstrap", ADDRESS, "--protocol", protocol]
    result = CliRunner().invoke(app, ["init", *arguments, "--network", 'a "quoted" name'])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path, {})
    assert config.network.bootstrap == (ADDRESS,)
    assert config.network.name == 'a "quoted" name'
    assert config.learning.protocol == protocol
    assert config.learns == (protocol != "none")


def test_the_core_is_told_what_the_config_says() -> None:
    config = parse_config("[network]\nname = 'net'\n[learning]\nrounds = 5\n[exchange]\nretry_s = 2", {})
    core = config.core_settings("digits", SchemaHash(bytes(32)), 1000)
    assert (core.network, core.task, core.max_model_bytes) == ("net", "digits", 1000)
    assert (core.gossip.rounds, core.exchange.retry_s, core.learning) == (5, 2.0, "gossip")


def test_the_core_of_a_node_that_learns_by_scalars_is_told_of_them() -> None:
    config = parse_config(
        f"[scalars]\nsamples = 3\nmembers = ['{MEMBER}']\n[learning]\nprotocol = 'scalars'", {}
    )
    core = config.core_settings("digits", SchemaHash(bytes(32)), 1000, b"b" * 32)
    assert (core.learning, core.scalars.samples, core.base) == ("scalars", 3, b"b" * 32)
    assert core.members == config.members == {bytes(range(32))}


# --- the command line on top ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("network.target_degree=4", ("network", "target_degree"), 4),
        ("network.name=my net", ("network", "name"), "my net"),
        ("network.name='4'", ("network", "name"), "4"),
        ("network.static=true", ("network", "static"), True),
        ("scalars.epsilon=0.01", ("scalars", "epsilon"), 0.01),
        ("task.shard.index=1", ("task", "shard", "index"), 1),
        ("network.bootstrap=['a', 'b']", ("network", "bootstrap"), ["a", "b"]),
        ("task.shard={index=0, count=2}", ("task", "shard"), {"index": 0, "count": 2}),
        ("network.name=", ("network", "name"), ""),
        ("network.name=a=b", ("network", "name"), "a=b"),
        ("network.name=2020-01-01", ("network", "name"), "2020-01-01"),
    ],
)
def test_a_setting_is_a_name_and_a_value_in_toml_or_text(
    text: str, path: tuple[str, ...], value: object
) -> None:
    assert parse_setting(text) == Setting(path, value)


@pytest.mark.parametrize(
    "text", ["", "network", "network=1", "network.", ".name=1", "network..name=1", "=1", "a.b"]
)
def test_a_setting_without_a_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting(text)
    assert (caught.value.path, caught.value.allowed) == ("--set", "<table>.<name>=<value>")


def test_settings_go_on_top_of_the_environment_and_in_their_order() -> None:
    told = [parse_setting(text) for text in ("network.name=c", "network.name=d", "task.options.hidden=[8]")]
    environ = {"COVEY_NETWORK__NAME": "b"}
    config = parse_config("[network]\nname = 'a'", environ, "covey.toml", told)
    assert config.network.name == "d"
    assert config.task.options == {"hidden": [8]}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("scalars.sample=4", "scalars.sample"),
        ("scalars.samples=many", "scalars.samples"),
        ("colour.of=4", "colour"),
        ("network.name.first=x", "network.name.first"),
    ],
)
def test_a_mistake_in_a_setting_is_told_like_one_in_the_file(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("[network]\nname = 'a'", {}, "covey.toml", [parse_setting(text)])
    assert caught.value.path == path


def test_another_task_leaves_the_options_of_the_files_behind() -> None:
    text = "[task]\nname = 'digits'\noptions = {hidden = [8]}"
    own = [Setting(("task", "name"), "csv"), Setting(("task", "options", "path"), "x.csv")]
    assert parse_config(text, {}, "covey.toml", own).task.options == {"path": "x.csv"}
    same = [Setting(("task", "name"), "digits")]
    assert parse_config(text, {}, "covey.toml", same).task.options == {"hidden": [8]}
    default = "[task]\noptions = {hidden = [8]}"
    assert parse_config(default, {}, "covey.toml", own[:1]).task.options == {}


@pytest.mark.parametrize("protocol", ["gossip", "scalars", "none"])
def test_the_first_config_has_what_the_command_line_set(protocol: str) -> None:
    told = [
        Setting(("learning", "protocol"), protocol),
        Setting(("task", "options", 'an odd "name"'), [1, {"a": "b"}]),
        Setting(("task", "shard", "index"), 1),
        Setting(("task", "shard", "count"), 2),
        Setting(("scalars", "samples"), 4),
        Setting(("api", "enabled"), False),
        Setting(("network", "listen"), ["/ip4/0.0.0.0/tcp/1"]),
    ]
    config = parse_config(first_config(protocol, told), {})
    assert config.learning.protocol == protocol
    assert config.task.options == {'an odd "name"': [1, {"a": "b"}]}
    assert config.task.shard is not None
    assert (config.task.shard.count, config.scalars.samples, config.api.enabled) == (2, 4, False)


def test_content_is_shared_unless_it_is_switched_off_and_clicks_are_not_unless_asked_for() -> None:
    for text, shares in (
        ("", True),
        ("[content]\nenabled = false", False),
        ("[learning]\nprotocol = 'none'", True),
    ):
        config = parse_config(text, {})
        settings = config.core_settings("t", SchemaHash(bytes(32)), 1)
        assert (settings.content is not None) == shares
        assert config.content.share_clicks == "off"
