"""The command line: what it prints, its exit codes, and the remedy in every refusal."""

import json
import os
import shutil
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.core import TyperGroup, TyperOption

from node import api, cli
from node.cli import app
from node.config import load_config
from node.identity import create_key, load_key, peer_id_of
from node.store import BlobStore, HomeLock, newest_checkpoints
from protocols.errors import LocalError
from protocols.vocabulary import ModelRef
from tests.node.scalar_home import PEERS as PEERS_OF_HOMES
from tests.node.scalar_home import Home, configure

ADDRESS = "/ip4/10.0.0.1/tcp/4001/p2p/12D3KooWAbc"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert len(self.out.splitlines()) == 1, "one value, one line, nothing else"
        return json.loads(self.out)


class Covey:
    """Runs `covey ...` in this process, as the installed script does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["covey", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = self._capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)


@pytest.fixture
def covey(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Covey:
    for name in [name for name in os.environ if name.startswith("COVEY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return Covey(monkeypatch, capsys)


@pytest.fixture
def home(covey: Covey, tmp_path: Path) -> Path:
    assert covey("init", "--home", tmp_path / "home").code == 0
    return tmp_path / "home"


def write_config(home: Path, text: str) -> None:
    (home / "covey.toml").write_text(text)


# --- help -----------------------------------------------------------------------------------------------
def commands(group: TyperGroup, *path: str) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        inner = isinstance(command, TyperGroup)
        found += commands(command, *path, name) if inner else [(*path, name)]
    return found


def root() -> TyperGroup:
    cli._add_plugins()
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def test_the_commands_are_the_ones_the_readme_promises() -> None:
    assert set(commands(root())) == {
        ("init",),
        ("run",),
        ("status",),
        ("peers",),
        ("log",),
        ("verify",),
        ("stop",),
        ("export",),
        ("config", "check"),
        ("config", "show"),
        ("network", "new"),
        ("network", "show"),
        ("invite",),
        ("join",),
        ("share",),
        ("unshare",),
        ("library",),
        ("search",),
        ("open",),
        ("get",),
        ("forget",),
        ("rules",),
        ("doctor",),
        ("demo",),
        ("sim", "grank"),
        ("sim", "run"),
        ("sim", "show"),
        ("sim", "swarm"),
        ("sweep",),
        ("replay",),
        ("diff",),
    }


@pytest.mark.parametrize("path", commands(root()), ids=" ".join)
def test_the_help_of_every_command_tells_each_of_its_options(covey: Covey, path: tuple[str, ...]) -> None:
    command: Any = root()
    for name in path:
        command = command.commands[name]
    outcome = covey(*path, "--help")
    assert outcome.code == 0
    for parameter in command.params:
        shown = parameter.opts[0] if isinstance(parameter, TyperOption) else parameter.name
        assert shown.lower() in outcome.out.lower()
    assert command.help.split(".")[0].replace("\n", " ") in " ".join(outcome.out.split())


@pytest.mark.parametrize(
    "path",
    [
        ("status",),
        ("peers",),
        ("log",),
        ("verify",),
        ("config", "check"),
        ("config", "show"),
        ("network", "new"),
        ("network", "show"),
        ("invite",),
        ("export",),
        ("share",),
        ("unshare",),
        ("library",),
        ("search",),
        ("open",),
        ("get",),
        ("forget",),
        ("doctor",),
    ],
)
def test_every_command_that_reads_can_answer_in_json(covey: Covey, path: tuple[str, ...]) -> None:
    assert "--json" in covey(*path, "--help").out


def test_the_exit_codes_are_in_the_help(covey: Covey) -> None:
    outcome = covey("--help")
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted." in outcome.out


def test_the_version_is_the_installed_one(covey: Covey) -> None:
    assert covey("--version") == Outcome(0, version("covey") + "\n", "")


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("status", "--colour"), ("export",), ("demo", "--nodes", 1)]
)
def test_wrong_usage_ends_with_2(covey: Covey, arguments: tuple[object, ...]) -> None:
    outcome = covey(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: ")


# --- init -----------------------------------------------------------------------------------------------
def test_init_makes_a_private_key_and_a_config_that_load(covey: Covey, tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    outcome = covey(
        "init", "--home", home, "--network", "net", "--bootstrap", ADDRESS, "--bootstrap", ADDRESS
    )
    assert outcome.code == 0
    assert stat.S_IMODE((home / "identity.pem").stat().st_mode) == 0o600
    peer = peer_id_of(load_key(home / "identity.pem"))
    config = load_config(home, {})
    assert (config.network.name, config.network.bootstrap) == ("net", (ADDRESS, ADDRESS))
    assert peer in outcome.out
    assert f"covey run --home {home}" in outcome.out
    assert f"/tcp/<port>/p2p/{peer}" in outcome.out


def test_init_answers_in_json(covey: Covey, tmp_path: Path) -> None:
    data = covey("init", "--home", tmp_path, "--json").json
    peer = peer_id_of(load_key(tmp_path / "identity.pem"))
    assert data == {"home": str(tmp_path), "peer": peer, "config": str(tmp_path / "covey.toml")}


def test_init_takes_its_home_from_the_environment(
    covey: Covey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVEY_HOME", str(tmp_path / "there"))
    assert covey("init").code == 0
    assert (tmp_path / "there" / "covey.toml").exists()


def test_a_second_init_is_refused_and_changes_nothing(covey: Covey, home: Path) -> None:
    before = {path: path.read_bytes() for path in home.iterdir()}
    outcome = covey("init", "--home", home, "--network", "other")
    assert outcome.code == 1
    assert "exists already; edit it, or choose another --home" in outcome.err
    assert {path: path.read_bytes() for path in home.iterdir()} == before


def test_init_keeps_a_key_that_is_there(covey: Covey, tmp_path: Path) -> None:
    peer = peer_id_of(create_key(tmp_path / "identity.pem"))
    assert covey("init", "--home", tmp_path, "--json").json["peer"] == peer


@pytest.mark.parametrize(
    ("option", "value", "path"),
    [
        ("--bootstrap", "/ip4/1.2.3.4/tcp/1", "network.bootstrap[0]"),
        ("--listen", "4001", "network.listen[0]"),
        ("--protocol", "federated", "learning.protocol"),
        ("--network", "", "network.name"),
        ("--set", "scalars.samples=0", "scalars.samples"),
        ("--set", "samples=0", "--set"),
        ("--option", "=0", "--option"),
    ],
)
def test_init_refuses_what_would_not_run_and_leaves_no_files(
    covey: Covey, tmp_path: Path, option: str, value: str, path: str
) -> None:
    outcome = covey("init", "--home", tmp_path, option, value)
    assert (outcome.code, outcome.out) == (2, "")
    assert path in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_init_where_no_folder_can_be_made_says_so(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = covey("init", "--home", tmp_path / "file" / "home")
    assert outcome.code == 1
    assert "cannot be made: Not a directory" in outcome.err


# --- without a daemon -----------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["status", "peers", "stop"])
def test_without_a_daemon_a_question_fails_with_the_way_to_start_one(
    covey: Covey, home: Path, command: str
) -> None:
    outcome = covey(command, "--home", home)
    assert (outcome.code, outcome.out) == (1, "")
    assert f"no daemon runs in {home}; start it with `covey run --home {home}`" in outcome.err


@pytest.mark.parametrize("command", [("run",), ("config", "check"), ("config", "show")])
def test_without_a_home_the_way_to_make_one_is_told(
    covey: Covey, tmp_path: Path, command: tuple[str, ...]
) -> None:
    outcome = covey(*command, "--home", tmp_path)
    assert outcome.code == 2
    assert str(tmp_path / "covey.toml") in outcome.err
    assert "make a home with `covey init`" in outcome.err


@pytest.mark.parametrize("command", [("run",), ("config", "check"), ("config", "show")])
def test_a_wrong_config_ends_with_2_and_the_fields_path(
    covey: Covey, home: Path, command: tuple[str, ...]
) -> None:
    write_config(home, "[network]\ntarget_degre = 3\n")
    outcome = covey(*command, "--home", home)
    assert (outcome.code, outcome.out) == (2, "")
    assert "network.target_degre: no such setting (allowed: announce, bootstrap" in outcome.err


@pytest.mark.parametrize("command", [("run",), ("config", "check")])
def test_a_wrong_merge_rule_is_a_mistake_in_the_config(
    covey: Covey, home: Path, command: tuple[str, ...]
) -> None:
    write_config(home, "[learning]\nrule = ['meen']\n")
    outcome = covey(*command, "--home", home)
    assert (outcome.code, outcome.out) == (2, "")
    assert "learning.rule: " in outcome.err
    assert "meen" in outcome.err
    assert "variance.corrected" in outcome.err, "what is allowed"


def test_a_helper_needs_no_merge_rule(covey: Covey, home: Path) -> None:
    write_config(home, "[learning]\nprotocol = 'none'\nrule = ['meen']\n")
    assert covey("config", "check", "--home", home).code == 0


def test_a_home_in_use_is_refused_with_the_process_that_holds_it(covey: Covey, home: Path) -> None:
    with HomeLock(home):
        outcome = covey("run", "--home", home)
    assert outcome.code == 1
    assert f"in use by another covey daemon (process {os.getpid()})" in outcome.err


# --- config ---------------------------------------------------------------------------------------------
def test_config_check_says_that_all_is_well(covey: Covey, home: Path) -> None:
    assert covey("config", "check", "--home", home).out == f"{home / 'covey.toml'} is fine\n"
    assert covey("config", "check", "--home", home, "--json").json == {"ok": True}


def test_config_show_is_a_config_again(covey: Covey, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_NETWORK__TARGET_DEGREE", "9")
    shown = covey("config", "show", "--home", home).out
    data = covey("config", "show", "--home", home, "--json").json
    assert data["network"]["target_degree"] == 9
    write_config(home, shown)
    assert load_config(home, {}).network.target_degree == 9


# --- export ---------------------------------------------------------------------------------------------
def checkpoint(home: Path, data: bytes, round_: int) -> ModelRef:
    store = BlobStore(home, lambda path: None)
    ref = store.save(data, round_, 10)
    store.keep(ref)
    return ref


def test_export_writes_the_newest_checkpoint(covey: Covey, home: Path, tmp_path: Path) -> None:
    checkpoint(home, b"old", 3)
    ref = checkpoint(home, b"new model", 4)
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"something else")
    data = covey("export", target, "--home", home, "--json").json
    assert data == {"path": str(target), "round": 4, "size_bytes": 9, "digest": ref.digest.hex()}
    assert target.read_bytes() == b"new model"
    outcome = covey("export", target, "--home", home)
    assert outcome == Outcome(0, f"{target}: model after round 4, 9 B\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model.safetensors"]


def test_export_falls_back_over_a_damaged_checkpoint_and_leaves_it_in_its_place(
    covey: Covey, home: Path, tmp_path: Path
) -> None:
    checkpoint(home, b"old model", 3)
    checkpoint(home, b"new model", 4)
    (newest, *_) = newest_checkpoints(home)
    newest.write_bytes(b"nEw model")
    outcome = covey("export", tmp_path / "model", "--home", home, "--json")
    assert outcome.json["round"] == 3
    assert f"{newest.name} is damaged" in outcome.err.replace("\n", "")
    assert (tmp_path / "model").read_bytes() == b"old model"
    assert newest.exists()


def test_export_without_a_whole_checkpoint_fails_and_writes_nothing(
    covey: Covey, home: Path, tmp_path: Path
) -> None:
    checkpoint(home, b"model", 3)
    newest_checkpoints(home)[0].write_bytes(b"")
    for folder in (home, tmp_path / "nowhere"):
        outcome = covey("export", tmp_path / "model", "--home", folder)
        assert (outcome.code, outcome.out) == (1, "")
        assert f"no whole checkpoint in {folder}" in outcome.err
    assert not (tmp_path / "model").exists()


def test_export_to_a_folder_that_is_not_there_says_so(covey: Covey, home: Path, tmp_path: Path) -> None:
    checkpoint(home, b"model", 3)
    outcome = covey("export", tmp_path / "no" / "model", "--home", home)
    assert outcome.code == 1
    assert "cannot be written: No such file or directory" in outcome.err


# --- with a daemon, or one that answers like it ---------------------------------------------------------
STATUS: dict[str, Any] = {
    "peer": "12D3KooWMe",
    "network": "net",
    "task": "digits",
    "learning": "gossip",
    "addresses": ["/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWMe", "/ip6/::1/tcp/4001/p2p/12D3KooWMe"],
    "pid": 77,
    "uptime_s": 12.3,
    "phase": "collecting",
    "round": 5,
    "metrics": {"accuracy": 0.91234, "loss": None},
    "merged": 3,
    "report": {"align.activation.probe": "256 own samples", "align.activation.moved": 0.87654},
    "live_peers": 2,
    "bytes_sent": 1_500,
    "bytes_received": 2_500_000_000,
    "month_bytes": 7_000_000,
    "waiting": "on battery power",
    "refused": {"schema": 2},
}
LOG: dict[str, Any] = {
    "running": True,
    "round": 31,
    "log": "ab" * 32,
    "records": 12,
    "void": 1,
    "cut": 20,
    "sealed": {"round": 28, "records": 60, "log": "cd" * 32, "digest": "ef" * 32},
    "proposed": {"round": 30, "records": 70, "log": "cd" * 32, "digest": "01" * 32},
    "authors": {"12D3KooWA": 31, "12D3KooWB": 29},
    "missing": [[29, 29], [31, 32]],
    "counts": {"new": 40},
    "on_disk": {"records": 75, "cut": 4},
}
PEERS: list[dict[str, Any]] = [
    {
        "peer": "12D3KooWb[red]",
        "state": "backing off",
        "round": 0,
        "failures": 3,
        "last_reason": "refused by peer [bold]",
        "addresses": ["/ip4/[blink]/tcp/1/p2p/12D3KooWb[red]"],
        "bootstrap": False,
        "latency_ms": None,
        "bytes_sent": 0,
        "bytes_received": 0,
    },
    {
        "peer": "12D3KooWA",
        "state": "live",
        "round": 4,
        "failures": 0,
        "last_reason": "",
        "addresses": [f"/ip4/10.0.0.{number}/tcp/4001/p2p/12D3KooWA" for number in range(9)],
        "bootstrap": True,
        "latency_ms": 12.34,
        "bytes_sent": 900,
        "bytes_received": 12_000,
    },
]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was asked of the daemon, which answers with the examples above."""
    asked: list[tuple[str, str]] = []

    def call(home: Path, path: str, method: str = "GET") -> object:
        asked.append((method, path))
        return {"/status": STATUS, "/peers": PEERS, "/log": LOG}.get(path, {})

    monkeypatch.setattr(api, "call", call)
    return asked


def test_status_tells_what_the_daemon_does(covey: Covey, answers: list[tuple[str, str]]) -> None:
    assert covey("status", "--json").json == STATUS
    shown = covey("status").out
    for text in (
        "12D3KooWMe",
        "round    5 (collecting), merged 3 models last",
        "merge    align.activation.probe: 256 own samples",
        "merge    align.activation.moved: 0.8765",
        "accuracy 0.9123  loss not finite",
        "waiting  on battery power",
        "1.5 kB sent, 2.50 GB received, 7.0 MB this month",
        "2 schema",
        "12 s, process 77",
    ):
        assert text in shown


def test_peers_lists_the_live_ones_first_and_takes_no_markup_from_strangers(
    covey: Covey, answers: list[tuple[str, str]]
) -> None:
    assert covey("peers", "--json").json == PEERS
    lines = covey("peers").out.splitlines()
    assert lines[0] == "12D3KooWA live, bootstrap, round 4, 12.3 ms, 900 B sent, 12.0 kB received"
    assert lines[1].strip() == " ".join(PEERS[1]["addresses"]), "whole, to be copied"
    assert lines[2] == "12D3KooWb[red] backing off, round 0, 3 failures, last: refused by peer [bold]"
    assert lines[3].strip() == "/ip4/[blink]/tcp/1/p2p/12D3KooWb[red]"


def test_status_of_a_node_that_learns_by_scalars_tells_of_its_log(
    covey: Covey, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = {**STATUS, "learning": "scalars", "log": LOG}
    monkeypatch.setattr(api, "call", lambda *args: status)
    shown = covey("status").out
    assert "merged 3 authors' scalars last" in shown
    assert f"log      75 records, sealed up to round 28, digest {'ab' * 8}" in shown


def test_log_of_a_running_node_comes_from_the_daemon(
    covey: Covey, home: Path, answers: list[tuple[str, str]]
) -> None:
    (home / api.API_FILE).write_text("{}")
    assert covey("log", "--home", home, "--json").json == LOG
    assert answers == [("GET", "/log")]
    shown = covey("log", "--home", home).out
    for text in (
        "round     31\n",
        f"digest    {'ab' * 32}",
        "records   12 in memory, 75 on the disk, from after round 4; what was before is gone",
        "void      1: their authors contradicted themselves",
        f"sealed    round 28, 60 records, state {'ef' * 32}",
        f"proposed  round 30, 70 records, state {'01' * 32}",
        "missing   29, 31 to 32",
        "author    12D3KooWB up to round 29",
    ):
        assert text in shown


def test_log_of_a_daemon_that_learns_otherwise_says_so(
    covey: Covey, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise LocalError("the daemon of x refused: this node does not learn by scalars")

    monkeypatch.setattr(api, "call", refuse)
    (home / api.API_FILE).write_text("{}")
    outcome = covey("log", "--home", home)
    assert outcome.code == 1
    assert "does not learn by scalars" in outcome.err


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("logged") / "home")


def test_log_of_a_stopped_node_comes_from_its_disk(covey: Covey, logged: Home) -> None:
    data = covey("log", "--home", logged.home, "--json").json
    assert (data["running"], data["round"], data["sealed"]["round"]) == (False, 10, 8)
    (logged.home / api.API_FILE).write_text('{"port": 1, "pid": 1}')  # left behind by a crash
    (logged.home / api.TOKEN_FILE).write_text("x")
    shown = covey("log", "--home", logged.home).out
    assert "round     10 (not running)" in shown
    assert "records   20 on the disk" in shown


@pytest.mark.parametrize("command", ["log", "verify"])
def test_without_a_log_the_commands_on_it_say_so(covey: Covey, home: Path, command: str) -> None:
    more = ["--protocol", "scalars"] if command == "verify" else []
    outcome = covey(command, "--home", home, *more)
    assert (outcome.code, outcome.out) == (1, "")
    assert "no log of scalars" in outcome.err


def test_verify_tells_that_all_is_well(covey: Covey, logged: Home) -> None:
    outcome = covey("verify", "--home", logged.home)
    assert outcome.code == 0, outcome.err
    assert (
        "20 records checked, replayed from the base model up to round 10; 2 checkpoints compared"
        in outcome.out
    )
    assert f"log     {logged.log.chain(10).hex()}\nstate   " in outcome.out
    data = covey("verify", "--home", logged.home, "--json").json
    assert (data["ok"], data["problem"], data["differs_at"]) == (True, "", None)


def test_verify_fails_with_the_round_that_differs(covey: Covey, tmp_path: Path, logged: Home) -> None:
    shutil.copytree(logged.home, tmp_path / "home")
    newest = newest_checkpoints(tmp_path / "home")[0]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    outcome = covey("verify", "--home", tmp_path / "home")
    assert outcome.code == 1
    assert "covey: round 8: " in outcome.err
    assert covey("verify", "--home", tmp_path / "home", "--json").json["differs_at"] == 8


def test_verify_says_where_a_cut_log_begins(covey: Covey, tmp_path: Path) -> None:
    home = Home(tmp_path / "home", configure(keep_log=False))
    outcome = covey("verify", "--home", home.home)
    assert outcome.code == 0
    assert "from the checkpoint of round 4, since the log before it was cut" in outcome.out


def test_verify_takes_the_settings_of_the_run(covey: Covey, logged: Home) -> None:
    outcome = covey("verify", "--home", logged.home, "--set", "scalars.learning_rate=0.5")
    assert outcome.code == 1
    assert "scalars.learning_rate 0.001 met 0.5" in outcome.err
    assert covey("verify", "--home", logged.home, "--protocol", "gossip").code == 2


# --- settings on the command line -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--protocol", "fed"], "learning.protocol"),
        (["--set", "scalars.samples=0"], "scalars.samples"),
        (["--set", "scalars.pol=0"], "scalars.pol"),
        (["--set", "scalars"], "--set"),
        (["--option", "model"], "--option"),
        (["--task", "nonsense"], "task.name"),
        (["--option", "hiden=[3]"], "task.options.hiden"),
        (["--protocol", "scalars", "--option", "hiden=[3]"], "task.options.hiden"),
        (["--task", "hf-classifier", "--protocol", "scalars"], "task.options.model"),
        (["--protocol", "scalars", "--set", f"scalars.members=['{PEERS_OF_HOMES[0]}']"], "scalars.members"),
    ],
)
def test_run_refuses_wrong_settings_as_it_refuses_a_wrong_file(
    covey: Covey, home: Path, words: list[str], path: str
) -> None:
    before = (home / "covey.toml").read_text()
    outcome = covey("run", "--home", home, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"covey: {path}: " in outcome.err
    assert (home / "covey.toml").read_text() == before


def test_init_writes_what_it_is_told_into_the_file(covey: Covey, tmp_path: Path) -> None:
    words = [
        "--task",
        "hf-classifier",
        "--protocol",
        "scalars",
        "--option",
        "model=gpt2",
        "--option",
        "path=x.tsv",
    ]
    more = ["--set", "scalars.samples=4", "--set", "network.target_degree=3"]
    assert covey("init", "--home", tmp_path, *words, *more).code == 0
    config = load_config(tmp_path, {})
    assert (config.task.name, config.task.options) == ("hf-classifier", {"model": "gpt2", "path": "x.tsv"})
    assert (config.learning.protocol, config.scalars.samples) == ("scalars", 4)
    assert config.network.target_degree == 3


def test_stop_posts(covey: Covey, answers: list[tuple[str, str]]) -> None:
    assert covey("stop").out == "stopping\n"
    assert answers == [("POST", "/stop")]


def test_no_peer_is_said_in_words(covey: Covey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "call", lambda *args: [])
    assert covey("peers").out == "no peer known yet\n"


def test_the_doctor_fails_where_a_step_fails(covey: Covey, tmp_path: Path) -> None:
    outcome = covey("doctor", "--home", tmp_path)
    assert outcome.code == 1
    assert "FAIL config" in outcome.out
    assert f"do: edit {tmp_path / 'covey.toml'}, or run: covey init --home {tmp_path}" in outcome.out
    (finding,) = covey("doctor", "--home", tmp_path, "--json").json
    assert (finding["step"], finding["outcome"]) == ("config", "failed")


def test_a_demo_never_writes_over_an_earlier_one(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "node-0").mkdir()
    outcome = covey("demo", "--keep", tmp_path)
    assert outcome.code == 1
    assert "holds an earlier demo; choose an empty folder" in outcome.err


# --- the end of the process -----------------------------------------------------------------------------
def test_an_error_is_one_line_without_a_traceback(
    covey: Covey, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise LocalError("a [very] long story " + "x" * 300)

    monkeypatch.setattr(api, "call", fail)
    outcome = covey("status", "--home", home)
    assert outcome == Outcome(1, "", "covey: a [very] long story " + "x" * 300 + "\n")


def test_an_interrupt_ends_with_130(covey: Covey, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "call", interrupt)
    outcome = covey("status")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


def test_a_reader_that_leaves_early_gets_no_traceback(home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "node", "config", "show", "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    process.stderr.close()
    process.wait(timeout=60)
    assert errors == ""


def test_python_m_node_is_covey() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "node", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert outcome.stdout.strip() == version("covey")


# --- rules ----------------------------------------------------------------------------------------------
def test_rules_are_listed_with_one_line_each(covey: Covey) -> None:
    from aggregation.rules import RULES

    lines = covey("rules").out.splitlines()

    assert [line.split()[0] for line in lines] == list(RULES)
    assert all(entry.summary in line for entry, line in zip(RULES.values(), lines, strict=True))


def test_one_rule_is_told_in_full(covey: Covey) -> None:
    text = covey("rules", "align.activation").out

    assert "needs          network, own samples" in text
    assert (
        'rule = [..., {name = "align.activation", probe = "own", samples = 512, places = "all", stay = 0.0, reestimate = true}, ...]'
        in text
    )
    assert "arXiv 2404.08079" in text


def test_rules_as_json_are_whole(covey: Covey) -> None:
    everything, one = covey("rules", "--json").json, covey("rules", "choose", "--json").json

    assert one in everything
    assert one["needs"] == ["network", "validation samples"]
    assert one["arguments"]["by"] == "loss"


def test_a_rule_that_there_is_not_is_refused_with_those_there_are(covey: Covey) -> None:
    ended = covey("rules", "krum")

    assert ended.code == 2
    assert "no rule is called 'krum' (allowed: mean, variance.corrected, " in ended.err
