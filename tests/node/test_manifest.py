"""The manifest: its form, id and signature, whose each setting is, and what comes of it in a node's config."""

import ast
import hashlib
import inspect
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from node import manifest as module
from node.config import CONFIG_FILE, Config, LearningConfig, SampledConfig, Setting, load_config, parse_config
from node.manifest import (
    MANIFEST_FILE,
    MAX_LABEL_CHARS,
    OWN,
    TASK_FILE,
    Manifest,
    ManifestTask,
    check_manifest,
    content_bytes,
    divide,
    is_shared,
    is_suggested,
    manifest_toml,
    network_id,
    parse_manifest,
    read_manifest,
    sign_manifest,
    signed_bytes,
    without_imposed,
)
from node.signatures import Ed25519Signatures, author_of, peer_of_author
from protocols.errors import ConfigError
from protocols.messages import Terms
from protocols.scalar_terms import ScalarSettings

ROOT = Path(__file__).parents[2]
MAKER = Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(bytes(32)))
ME, YOU = peer_of_author(MAKER.author), peer_of_author(OTHER.author)
ADDRESS = f"/ip4/10.0.0.1/tcp/4001/p2p/{ME}"
CODE = b"def make_task(): ...\n"


def manifest(**changes: Any) -> Manifest:
    """Signed by MAKER, with these fields in place of plain ones."""
    fields: dict[str, Any] = {
        "covey": 1,
        "name": "home",
        "maker": ME,
        "bootstrap": (ADDRESS,),
        "task": ManifestTask(name="digits", options={"hidden": [16], "rate": 0.5}, seed=3, schema="ab" * 32),
        "shared": {"learning": {"protocol": "gossip", "rule": ["mean"], "rounds": 40}},
        "suggested": {"learning": {"pause_s": 0.25}, "training": {"learning_rate": 0.05}},
    }
    return sign_manifest(Manifest(**{**fields, **changes}), MAKER)


def task(**changes: Any) -> ManifestTask:
    return replace(manifest().task, **changes)


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


def home_of(made: Manifest, folder: Path, text: str = "", code: bytes | None = None) -> Path:
    (folder / MANIFEST_FILE).write_text(manifest_toml(made))
    (folder / CONFIG_FILE).write_text(f'network.manifest = "{MANIFEST_FILE}"\n{text}')
    if code is not None:
        (folder / TASK_FILE).write_bytes(code)
    return folder


def refused(made: Manifest, folder: Path, text: str = "", **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(home_of(made, folder, text), environ)
    return caught.value


# --- form, id, signature --------------------------------------------------------------------------------
def test_a_manifest_comes_back_from_its_file(tmp_path: Path) -> None:
    made = manifest(members=(YOU,), inviters=(ME,))
    path = tmp_path / "any.toml"
    path.write_text(manifest_toml(made))
    assert read_manifest(path) == made


def test_the_id_is_the_name_and_16_digits_of_its_content() -> None:
    made = manifest(name="x" * MAX_LABEL_CHARS)
    digest = hashlib.sha256(content_bytes(made)).hexdigest()
    assert made.network == network_id(made) == f"{'x' * MAX_LABEL_CHARS}-{digest[:16]}"
    assert len(made.network) == 64


def test_the_bytes_that_are_hashed_and_signed_are_these() -> None:
    """A change here makes every network another one: it needs a new number in `covey`."""
    made = manifest()
    assert content_bytes(made) == bytes.fromhex(
        "86a5636f76657901a56d616b6572d934" + ME.encode().hex() + "a46e616d65a4686f6d65"
        "a673686172656481a86c6561726e696e6783a870726f746f636f6ca6676f73736970a6726f756e647328a472756c6591a46d65616e"
        "a973756767657374656482a86c6561726e696e6781a770617573655f73cb3fd0000000000000"
        "a8747261696e696e6781ad6c6561726e696e675f72617465cb3fa999999999999a"
        "a47461736b84a46e616d65a6646967697473a76f7074696f6e7382a668696464656e9110a472617465cb3fe0000000000000"
        "a6736368656d61d940" + ("ab" * 32).encode().hex() + "a47365656403"
    )  # fmt: skip
    assert signed_bytes(made).startswith(b"covey manifest 1\0\x88\xa9bootstrap")
    assert MAKER.verify(MAKER.author, signed_bytes(made), bytes.fromhex(made.signature))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"members": (YOU,)},
        {"inviters": (ME,)},
        {"task": ManifestTask(name="digits", schema="ab" * 32)},
        {"shared": {"learning": {"protocol": "gossip", "rule": ["median"]}}},
        {"suggested": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_content_is_another_network(change: dict[str, Any]) -> None:
    assert manifest(**change).network != manifest().network


def test_another_maker_is_another_network() -> None:
    assert sign_manifest(manifest(), OTHER).network != manifest().network


def test_new_addresses_are_signed_but_are_the_same_network() -> None:
    moved = manifest(bootstrap=())
    assert moved.network == manifest().network
    assert moved.signature != manifest().signature
    with pytest.raises(ConfigError, match="is not what its maker"):
        check_manifest(replace(manifest(), bootstrap=()))


def test_a_changed_byte_is_found_wherever_it_stands(tmp_path: Path) -> None:
    made = manifest(inviters=(ME,), suggested={})
    text = manifest_toml(made).encode()
    path = tmp_path / MANIFEST_FILE
    start, harmless = text.index(b"covey = 1"), 0
    for place in range(start, len(text)):
        for change in (b"", b"7"):
            path.write_bytes(text[:place] + change + text[place + 1 :])
            with suppress(ConfigError):
                assert read_manifest(path) == made, f"byte {place} may be {change!r}"
                harmless += 1
    assert harmless < len(text) / 4, "a blank more or less, and nothing else"


def test_who_changes_a_manifest_is_told_of_its_maker() -> None:
    changed = replace(manifest(), task=task(seed=4))
    with pytest.raises(ConfigError) as caught:
        check_manifest(changed)
    assert str(caught.value).startswith(f"manifest.toml: is not what its maker {ME} signed")
    assert "get it anew from its maker" in str(caught.value)


def test_nobody_can_put_his_name_under_anothers_network() -> None:
    stolen = replace(manifest(), maker=YOU)
    stolen = replace(stolen, signature=OTHER.sign(signed_bytes(stolen)).hex())
    with pytest.raises(ConfigError, match="is not what its maker"):
        check_manifest(stolen)


# --- what no manifest may say ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "path", "problem"),
    [
        ("colour = 1", "colour", "no such setting"),
        ("task.colour = 1", "task.colour", "no such setting"),
        ("covey = 2", "covey", "not one of the choices"),
        ("name = 'a b'", "name", "matching regex"),
        (f"name = '{'x' * 48}'", "name", "length <= 47"),
        ("task.schema = 'xyz'", "task.schema", "matching regex"),
        ("task.seed = 'x'", "task.seed", "expected `int`"),
        ("bootstrap = 'x'", "bootstrap", "expected `array`"),
        ("signature = '00'", "signature", "matching regex"),
        ("shared.learning = 3", "shared[...]", "expected `object`"),
    ],
)
def test_a_mistake_is_told_by_its_path(text: str, path: str, problem: str) -> None:
    key, _, value = text.partition(" = ")
    data = msgspec.to_builtins(manifest())
    table = data
    *tables, name = key.split(".")
    for each in tables:
        table = table[each]
    table[name] = module.tomllib.loads(f"v = {value}")["v"]
    with pytest.raises(ConfigError) as caught:
        parse_manifest(tomli_w.dumps(data), "m.toml")
    assert caught.value.path == f"m.toml: {path}"
    assert problem in caught.value.problem


@pytest.mark.parametrize("text", ["= 3", "a = " + "[" * 50_000])
def test_what_is_no_toml_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"m.toml: is not TOML"):
        parse_manifest(text, "m.toml")


def test_a_manifest_without_a_schema_is_none() -> None:
    with pytest.raises(ConfigError, match=r"m.toml: task.schema: must be given"):
        parse_manifest(f'covey = 1\nname = "n"\nmaker = "{ME}"\n[task]\nname = "digits"\n', "m.toml")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"shared": {}}, "shared.learning.protocol"),
        ({"shared": {"learning": {"protocol": "none"}}}, "shared.learning.protocol"),
        ({"shared": {"learning": {"protocol": "gossip"}, "api": {"port": 1}}}, "shared.api.port"),
        (
            {"shared": {"learning": {"protocol": "gossip"}, "network": {"listen": []}}},
            "shared.network.listen",
        ),
        ({"shared": {"learning": {"protocol": "gossip", "pause_s": 1.0}}}, "shared.learning.pause_s"),
        ({"shared": {"learning": {"protocol": "gossip"}, "scalars": {"pool": 1}}}, "shared.scalars.pool"),
        ({"suggested": {"training": {"threads": 64}}}, "suggested.training.threads"),
        ({"suggested": {"learning": {"rule": ["mean"]}}}, "suggested.learning.rule"),
        ({"suggested": {"network": {"bootstrap": []}}}, "suggested.network.bootstrap"),
        ({"members": ("12D3KooWabc",)}, "members"),
        ({"bootstrap": ("/ip4/10.0.0.1/tcp/1",)}, "bootstrap"),
        ({"task": task(options={"x": float("nan")})}, "task.options.x"),
        ({"task": task(options={"x": [{"y": float("inf")}]})}, "task.options.x.y"),
        ({"task": task(options={"x": b"bytes"})}, "task.options.x"),
        ({"task": task(options={"x": 2**63})}, "task.options.x"),
        ({"task": task(options={"x": nested(700)})}, "task.options.x"),
        ({"task": task(seed=2**63)}, "task.seed"),
        ({"task": task(name="my_task.py:make_task")}, "task.name"),
        ({"task": task(name="../x.py:f", sha256="ab" * 32)}, "task.name"),
        ({"task": task(name="task.py:f()", sha256="ab" * 32)}, "task.name"),
        ({"task": task(name="digits", sha256="ab" * 32)}, "task.name"),
    ],
)
def test_a_maker_cannot_impose_what_is_not_the_networks(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        manifest(**changes)
    assert caught.value.path == f"manifest: {path}"
    unsigned = replace(manifest(), **changes)
    signed = replace(unsigned, signature="0" * 128)
    with pytest.raises(ConfigError) as caught:
        check_manifest(signed)
    assert caught.value.path == f"manifest.toml: {path}", "the reader checks it too"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_FILE
    path.write_bytes(b"#" * (module.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than 65536 bytes"):
        read_manifest(path)


# --- whose a setting is ---------------------------------------------------------------------------------
TABLES = [
    ("gossip", "learning", LearningConfig),
    ("scalars", "scalars", ScalarSettings),
    ("sampled", "sampled", SampledConfig),
]


def test_what_scalars_share_are_their_terms() -> None:
    shared = {name for name in ScalarSettings.__struct_fields__ if is_shared("scalars", "scalars", name)}
    assert shared == set(Terms.__struct_fields__) - {"generator", "base"} | {"direction"}


@pytest.mark.parametrize(("table", "kind"), [("scalars", ScalarSettings), ("sampled", SampledConfig)])
def test_what_is_shared_is_what_its_docstring_marks(table: str, kind: type[msgspec.Struct]) -> None:
    """A star at the end says that it is the same on all nodes."""
    own = [each for each in kind.__mro__ if issubclass(each, msgspec.Struct) and each is not msgspec.Struct]
    trees = [tree for each in own for tree in ast.parse(inspect.getsource(each)).body]
    marked = {
        field.target.id
        for tree in trees
        if isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and str(text.value.value).rstrip().endswith("*")
    }
    assert marked == {name for name in kind.__struct_fields__ if is_shared(table, table, name)}


@pytest.mark.parametrize(("protocol", "table", "kind"), TABLES)
def test_every_setting_of_ones_own_exists(protocol: str, table: str, kind: type[msgspec.Struct]) -> None:
    unknown = OWN[table] - set(kind.__struct_fields__)
    assert unknown <= {"keep_every", "quorum", "wait_for_peers"}, "waiting settings of other protocols"


@pytest.mark.parametrize(("protocol", "table", "kind"), TABLES)
def test_a_setting_is_either_the_networks_or_a_piece_of_advice(
    protocol: str, table: str, kind: type[msgspec.Struct]
) -> None:
    for name in kind.__struct_fields__:
        assert is_shared(protocol, table, name) != is_suggested(protocol, table, name), name


def test_a_table_that_nobody_listed_is_shared_but_for_the_waiting() -> None:
    assert is_shared("future", "future", "anything")
    assert not is_shared("future", "future", "deadline_s")
    assert is_shared("future", "learning", "protocol")
    assert is_shared("future", "learning", "rule")
    assert not is_shared("future", "learning", "fanout")


@pytest.mark.parametrize(("protocol", "table", "kind"), TABLES)
def test_the_document_lists_the_settings_as_they_are(
    protocol: str, table: str, kind: type[msgspec.Struct]
) -> None:
    text = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{protocol}` |")]
    told = [set(re.findall(r"`(\w+)`", cell)) for cell in line.strip("|").split("|")[1:]]
    shared = {name for name in kind.__struct_fields__ if is_shared(protocol, table, name)}
    assert told == [shared | {"protocol"}, set(kind.__struct_fields__) - shared]


def test_a_config_divides_into_all_that_is_shared_and_what_was_chosen_besides() -> None:
    text = "[learning]\nrounds = 9\npause_s = 0.5\n[training]\nthreads = 3\nmomentum = 0.9\n[api]\nport = 9\n"
    shared, suggested = divide(msgspec.to_builtins(parse_config(text, {})), msgspec.to_builtins(Config()))
    assert set(shared) == {"learning"}
    assert shared["learning"]["rounds"] == 9
    assert shared["learning"]["rule"] == ["mean", "variance.corrected"]
    assert suggested == {"learning": {"pause_s": 0.5}, "training": {"momentum": 0.9}}


def test_of_scalars_the_table_learning_says_only_the_protocol() -> None:
    config = parse_config('learning.protocol = "scalars"\nscalars.samples = 3\n', {})
    shared, suggested = divide(msgspec.to_builtins(config), msgspec.to_builtins(Config()))
    assert shared["learning"] == {"protocol": "scalars"}
    assert set(shared) == {"learning", "scalars"}
    assert suggested == {"scalars": {"samples": 3}}


# --- in a node's config ---------------------------------------------------------------------------------
def test_a_bound_home_has_the_networks_settings(tmp_path: Path) -> None:
    made = manifest(members=(YOU,), inviters=(ME,))
    config = load_config(home_of(made, tmp_path), {})
    assert config.network.name == made.network
    assert config.network.bootstrap == (ADDRESS,)
    assert config.learning.rule == ("mean",)
    assert (config.learning.rounds, config.learning.pause_s) == (40, 0.25)
    assert config.training.learning_rate == 0.05
    assert config.task.name == "digits"
    assert config.task.options == {"hidden": [16], "rate": 0.5}
    assert config.task.seed == 3
    assert config.admission_policy.members == {author_of(YOU)}
    assert config.admission_policy.inviters == {author_of(ME)}


def test_without_lists_the_policy_is_open(tmp_path: Path) -> None:
    assert load_config(home_of(manifest(), tmp_path), {}).admission_policy.is_open


def test_what_is_the_devices_own_stays_its_own(tmp_path: Path) -> None:
    text = f"""
        network.bootstrap = ["/ip4/10.0.0.9/tcp/1/p2p/{YOU}"]
        learning.pause_s = 7
        training.learning_rate = 0.5
        training.threads = 2
        task.shard = {{ index = 0, count = 2 }}
    """
    config = load_config(home_of(manifest(), tmp_path, text), {"COVEY_LEARNING__QUORUM": "1"})
    assert config.network.bootstrap == (f"/ip4/10.0.0.9/tcp/1/p2p/{YOU}", ADDRESS)
    assert (config.learning.pause_s, config.learning.quorum) == (7, 1)
    assert (config.training.learning_rate, config.training.threads) == (0.5, 2)
    assert config.task.shard is not None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('network.name = "covey"', "network.name"),
        ('learning.rule = ["mean", "variance.corrected"]', "learning.rule"),
        ("learning.rounds = 41", "learning.rounds"),
        ('learning.protocol = "scalars"', "learning.protocol"),
        ('task.name = "csv"', "task.name"),
        ("task.seed = 4", "task.seed"),
        ("task.options.rate = 0.25", "task.options.rate"),
        (f'network.members = ["{YOU}"]', "network.members"),
        (f'network.inviters = ["{YOU}"]', "network.inviters"),
    ],
)
def test_a_setting_that_contradicts_the_network_is_refused(tmp_path: Path, text: str, path: str) -> None:
    error = refused(manifest(), tmp_path, text)
    assert error.path == path
    assert "leave it out, or join another network" in error.problem
    assert manifest().network in error.problem


def test_it_is_refused_from_the_environment_and_the_command_line_too(tmp_path: Path) -> None:
    assert refused(manifest(), tmp_path, COVEY_LEARNING__ROUNDS="2").path == "learning.rounds"
    with pytest.raises(ConfigError, match=r"task.seed: is 5 here, but 3 in the manifest"):
        load_config(tmp_path, {}, [Setting(("task", "seed"), 5)])


def test_to_say_the_same_is_no_contradiction(tmp_path: Path) -> None:
    text = 'learning.rule = ["mean"]\nlearning.rounds = 40\ntask.options.rate = 0.5\ntask.options.own = 1\n'
    config = load_config(home_of(manifest(), tmp_path, text), {})
    assert config.task.options == {"hidden": [16], "rate": 0.5, "own": 1}


def test_a_node_that_only_helps_need_not_learn_as_the_others(tmp_path: Path) -> None:
    config = load_config(home_of(manifest(), tmp_path, 'learning.protocol = "none"\nlearning.rounds = 1'), {})
    assert not config.learns
    assert config.network.name == manifest().network


def test_a_setting_of_another_version_is_told_as_the_manifests(tmp_path: Path) -> None:
    made = manifest(shared={"learning": {"protocol": "gossip", "gravity": 1}})
    error = refused(made, tmp_path)
    assert error.path == "learning.gravity of the network's manifest"
    assert "another version of covey" in error.problem


@pytest.mark.parametrize(
    ("name", "problem"), [("gone.toml", "cannot be read"), ("../manifest.toml", "does not lie in the home")]
)
def test_a_manifest_that_is_not_there_is_told(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(f'network.manifest = "{name}"')
    with pytest.raises(ConfigError, match=problem):
        load_config(tmp_path, {})


def test_a_manifest_that_was_edited_in_the_home_is_noticed(tmp_path: Path) -> None:
    home = home_of(manifest(), tmp_path)
    path = home / MANIFEST_FILE
    path.write_text(path.read_text().replace("rounds = 40", "rounds = 41"))
    with pytest.raises(ConfigError, match="is not what its maker"):
        load_config(home, {})


def test_a_task_file_that_was_changed_is_noticed(tmp_path: Path) -> None:
    pinned = hashlib.sha256(CODE).hexdigest()
    made = manifest(task=task(name=f"{TASK_FILE}:make_task", sha256=pinned))
    assert load_config(home_of(made, tmp_path, code=CODE), {}).task.name == "task.py:make_task"
    (tmp_path / TASK_FILE).write_bytes(CODE + b"#")
    with pytest.raises(ConfigError, match=r"task.py: is not the task file of .*put the file back"):
        load_config(tmp_path, {})
    (tmp_path / TASK_FILE).unlink()
    with pytest.raises(ConfigError, match=r"task.py: cannot be read"):
        load_config(tmp_path, {})


def test_a_config_is_stripped_of_what_the_network_decides() -> None:
    data = {
        "network": {"name": "covey", "listen": ["x"]},
        "learning": {"protocol": "gossip", "rule": ["mean"], "pause_s": 3},
        "task": {"name": "csv", "options": {"path": "x"}, "probe": "p"},
    }
    assert without_imposed(manifest(), data) == {
        "network": {"listen": ["x"]},
        "learning": {"pause_s": 3},
        "task": {"probe": "p"},
    }


def test_options_of_ones_own_survive_with_the_same_task() -> None:
    data = {"task": {"name": "digits", "options": {"rate": 9, "own": 1}}}
    assert without_imposed(manifest(), data) == {"task": {"options": {"own": 1}}}


_values = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(options=st.dictionaries(st.text(max_size=8), _values, max_size=4))
def test_any_options_survive_the_file_and_keep_the_signature(options: dict[str, Any]) -> None:
    made = manifest(task=task(options=options))
    found = parse_manifest(manifest_toml(made))
    check_manifest(found)
    assert found == made
    assert signed_bytes(msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Manifest)) == signed_bytes(
        made
    )
