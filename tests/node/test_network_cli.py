"""Networks from the command line: making one, inviting, joining, and what each failure says and leaves behind."""

import base64
import io
import json
import os
import socket
import stat
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from node import api, network_cli
from node.config import CONFIG_FILE, Config, load_config
from node.founding import OLD_CONFIG_FILE
from node.identity import create_key, load_key, peer_id_of
from node.invitation import (
    ADMISSION_FILE,
    MAX_CONTENT_BYTES,
    MAX_LINK_CHARS,
    PREFIX,
    TASK_IN_LINK_BYTES,
    Link,
    decode_link,
    encode_link,
    load_admission,
)
from node.manifest import MANIFEST_FILE, TASK_FILE, Manifest, ManifestTask, read_manifest, sign_manifest
from node.signatures import Ed25519Signatures
from node.store import HomeLock
from protocols.admission import refusal
from protocols.errors import ConfigError, LocalError
from protocols.vocabulary import PeerId
from tests.node.test_cli import Covey, Outcome

TASK = """\
from pathlib import Path

import torch

from node.tasks import Task

Path(__file__).with_name("it_ran").touch()


def make_task(width: int = 3, rows: int = 8) -> Task:
    data = torch.zeros(rows, width), torch.zeros(rows, dtype=torch.long)
    return Task("mine", lambda: torch.nn.Linear(width, 2), data, data)
"""
ADDRESS = "/ip4/10.0.0.1/tcp/4001/p2p/12D3KooWAbc"


@pytest.fixture
def covey(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Covey:
    for name in [name for name in os.environ if name.startswith("COVEY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return Covey(monkeypatch, capsys)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Config]]:
    """The configs with which a daemon would have been started."""
    found: list[Config] = []
    monkeypatch.setattr(network_cli, "run_node", lambda config, home: found.append(config))
    return found


def new(covey: Covey, home: Path, *arguments: object) -> Manifest:
    outcome = covey("network", "new", "--home", home, *arguments)
    assert outcome.code == 0, outcome.err
    return read_manifest(home / MANIFEST_FILE)


def link_of(covey: Covey, home: Path, *arguments: object) -> str:
    outcome = covey("invite", "--home", home, *arguments)
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 1, "a pipe gets the link and nothing else"
    return outcome.out.strip()


def join(covey: Covey, source: object, home: Path, *arguments: object) -> Outcome:
    return covey("join", source, "--home", home, "--yes", "--no-run", *arguments)


def peer_in(home: Path) -> PeerId:
    return peer_id_of(load_key(home / "identity.pem"))


def files_in(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir()} if home.exists() else {}


def failed(outcome: Outcome, *told: str, code: int = 1) -> None:
    assert outcome.code == code, outcome
    for each in told:
        assert each in outcome.err, outcome.err


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- new ------------------------------------------------------------------------------------------------
def test_a_new_network_has_the_settings_it_was_given_and_its_maker_keeps_to_them(
    covey: Covey, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    made = new(
        covey,
        home,
        *("--name", "trial", "--task", "digits", "--protocol", "gossip", "--bootstrap", ADDRESS),
        *("--set", "learning.rounds=7", "--set", "training.learning_rate=0.05", "--set", "task.seed=11"),
        *("--set", "training.threads=2", "--set", "network.listen=['/ip4/127.0.0.1/tcp/0']"),
    )
    assert made.network.startswith("trial-")
    assert made.maker == peer_in(home)
    assert made.is_open
    assert made.bootstrap == (ADDRESS,)
    assert made.shared["learning"]["rounds"] == 7
    assert made.suggested == {"training": {"learning_rate": 0.05}}
    assert made.task.seed == 11
    config = load_config(home, {})
    assert config.network.name == made.network
    assert config.learning.rounds == 7
    assert (config.training.threads, config.training.learning_rate) == (2, 0.05)
    assert config.network.listen == ("/ip4/127.0.0.1/tcp/0",)


def test_the_schema_is_what_a_node_says_in_the_handshake(covey: Covey, tmp_path: Path) -> None:
    from node.task_loading import make_task
    from node.tasks import initial_params
    from node.weights import schema_hash, schema_of

    made = new(covey, tmp_path / "home", "--task", "digits")
    task = make_task("digits", {}, tmp_path)
    assert made.task.schema == schema_hash(task.name, schema_of(initial_params(task, 0))).hex()


def test_a_private_network_lets_its_maker_invite_and_its_members_in(covey: Covey, tmp_path: Path) -> None:
    member, inviter = (peer_id_of(create_key(tmp_path / name)) for name in ("m", "i"))
    home = tmp_path / "home"
    made = new(covey, home, "--member", member, "--inviter", inviter)
    assert made.members == (member,)
    assert made.inviters == (peer_in(home), inviter)
    assert new(covey, tmp_path / "other", "--private").inviters == (peer_in(tmp_path / "other"),)


def test_an_existing_home_becomes_the_networks_and_keeps_what_is_its_own(
    covey: Covey, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    covey("init", "--home", home, "--set", "training.momentum=0.9", "--set", "learning.rounds=5")
    before = (home / CONFIG_FILE).read_text()
    peer = peer_in(home)
    made = new(covey, home, "--set", "learning.quorum=0.75")
    assert made.maker == peer
    assert made.shared["learning"]["rounds"] == 5
    assert made.suggested == {"learning": {"quorum": 0.75}, "training": {"momentum": 0.9}}
    assert (home / OLD_CONFIG_FILE).read_text() == before
    assert load_config(home, {}).learning.quorum == 0.75


def test_new_answers_in_json_and_writes_where_it_is_told(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    out = tmp_path / "shared" / "net.toml"
    out.parent.mkdir()
    home = tmp_path / "home"
    outcome = covey(
        "network", "new", "--home", home, "--task", "mine.py:make_task", "--out", out, "--private", "--json"
    )
    made = read_manifest(out)
    assert outcome.json == {
        "network": made.network,
        "home": str(home),
        "peer": peer_in(home),
        "private": True,
    }
    assert made == read_manifest(home / MANIFEST_FILE)
    assert made.name == "mine"
    assert made.task.name == "task.py:make_task"
    for folder in (out.parent, home):
        assert (folder / TASK_FILE).read_text() == TASK


def test_options_of_ones_own_are_in_no_manifest(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    home = tmp_path / "home"
    arguments = ("--task", "mine.py:make_task", "--option", "width=5", "--option", "rows=9")
    made = new(covey, home, *arguments, "--own-option", "rows")
    assert made.task.options == {"width": 5}
    assert load_config(home, {}).task.options == {"width": 5, "rows": 9}
    guest = tmp_path / "guest"
    link = link_of(covey, home)
    assert join(covey, link, guest, "--option", "rows=4").code == 0
    assert load_config(guest, {}).task.options == {"width": 5, "rows": 4}
    failed(
        join(covey, link, tmp_path / "x", "--option", "width=4"),
        "task.options.width: is 4 here, but 5",
        code=2,
    )


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (("--protocol", "none"), "a network has to learn something", 2),
        (("--task", "gone.py:make_task"), "there is no file gone.py", 2),
        (("--task", "nonsense"), "there is no task 'nonsense'", 2),
        (("--member", "12D3KooWabc"), "12D3KooWabc", 2),
        (("--bootstrap", "/ip4/10.0.0.1/tcp/1"), "names no peer", 2),
        (("--name", "a b"), "name: expected `str` matching", 2),
        (("--set", "learning.rule=['nonsense']"), "nonsense", 2),
        (("--option", "colour=1"), "task.options.colour", 2),
    ],
)
def test_what_no_network_can_be_made_of_is_refused(
    covey: Covey, tmp_path: Path, arguments: tuple[str, ...], told: str, code: int
) -> None:
    home = tmp_path / "home"
    failed(covey("network", "new", "--home", home, *arguments), told, code=code)
    assert set(files_in(home)) <= {"identity.pem"}, "no half-made network is left"


def test_nothing_is_overwritten(covey: Covey, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "net.toml"
    out.write_text("mine")
    failed(covey("network", "new", "--home", home, "--out", out), "exists already; choose another --out")
    assert out.read_text() == "mine"
    new(covey, home)
    failed(covey("network", "new", "--home", home), "belongs to the network 'digits-", "another --home")


# --- show -----------------------------------------------------------------------------------------------
def test_show_tells_all_that_is_in_it(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    home = tmp_path / "home"
    made = new(covey, home, "--task", "mine.py:make_task", "--option", "width=5", "--private")
    (tmp_path / "it_ran").unlink()
    for source in ((home / MANIFEST_FILE,), ("--home", home), (link_of(covey, home),)):
        outcome = covey("network", "show", *source)
        assert outcome.code == 0
        for told in (
            made.network,
            made.maker,
            "CODE",
            made.task.sha256,
            "width = 5",
            "gossip",
            "learning.rule",
        ):
            assert str(told) in outcome.out
    data = covey("network", "show", home / MANIFEST_FILE, "--json").json
    assert msgspec.convert(data, Manifest) == made
    assert not (home / "it_ran").exists(), "to look is not to run"


def test_show_without_a_network_says_how_to_make_one(covey: Covey, tmp_path: Path) -> None:
    failed(covey("network", "show", "--home", tmp_path), "make one with `covey network new`")
    failed(covey("network", "show", "gone.toml"), "gone.toml: is no file, and no link", code=2)
    failed(covey("network", "show", tmp_path), "is a folder", code=2)
    failed(covey("network", "show", "x" * 5000), "is no file, and no link", code=2)


def test_what_strangers_wrote_cannot_move_the_cursor(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK + "# \x1b[2J\u202e gone\n")
    home = tmp_path / "home"
    made = new(covey, home, "--task", "mine.py:make_task", "--private")
    options = {"x": "\x1b[31mred\u202e"}
    signed = sign_manifest(
        replace(made, task=replace(made.task, options=options)),
        Ed25519Signatures(load_key(home / "identity.pem")),
    )
    link = encode_link(Link(manifest=signed, task_file=(home / TASK_FILE).read_bytes()))
    outcome = covey("network", "show", link)
    assert "\x1b" not in outcome.out
    outcome = covey("join", link, "--home", tmp_path / "b", "--no-run", "--yes")
    assert "\x1b" not in outcome.out
    assert "\u202e" not in outcome.out
    assert "<U+001B>[2J<U+202E> gone" in outcome.out


# --- invite ---------------------------------------------------------------------------------------------
def test_a_link_of_an_open_network_has_no_invitation(covey: Covey, tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = new(covey, home)
    outcome = covey("invite", "--home", home)
    link = decode_link(outcome.out)
    assert link.manifest == made
    assert (link.invitation, link.holder_key, link.psk, link.task_file) == (None, None, None, None)
    assert link.bootstrap
    assert all(address.endswith(f"/tcp/4001/p2p/{peer_in(home)}") for address in link.bootstrap)
    assert f"{len(outcome.out.strip())} characters" in outcome.err


def test_a_link_has_the_addresses_of_the_running_node_first(
    covey: Covey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    new(covey, home, "--bootstrap", ADDRESS)
    running = f"/ip4/192.168.1.7/tcp/39999/p2p/{peer_in(home)}"
    monkeypatch.setattr(api, "call", lambda home, path: {"addresses": [running]})
    outcome = covey("invite", "--home", home)
    assert decode_link(outcome.out).bootstrap == (running, ADDRESS)
    assert "does not run" not in outcome.err


def test_a_node_without_an_address_invites_nobody(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path, "--set", "network.listen=['/ip4/127.0.0.1/tcp/0']")
    failed(covey("invite", "--home", tmp_path), "start it with `covey run", "network.announce")


def test_invite_answers_in_json(covey: Covey, tmp_path: Path) -> None:
    made = new(covey, tmp_path, "--private")
    guest = peer_id_of(create_key(tmp_path / "guest"))
    data = covey("invite", "--home", tmp_path, "--for", guest, "--json").json
    assert data["characters"] == len(data["link"])
    assert (data["network"], data["for"], data["expires_at"]) == (made.network, guest, 0)
    assert covey("invite", "--home", tmp_path, "--json").json["expires_at"] > 1_700_000_000


def test_the_qr_code_is_drawn_where_it_fits(
    covey: Covey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new(covey, tmp_path)
    outcome = covey("invite", "--home", tmp_path, "--qr")
    assert len(outcome.out.splitlines()) == 1
    assert "█" in outcome.err
    assert "█" not in covey("invite", "--home", tmp_path).err, "not where the output is no terminal"
    monkeypatch.setenv("COLUMNS", "40")
    outcome = covey("invite", "--home", tmp_path, "--qr")
    assert "and the terminal has 40" in outcome.err
    assert "█" not in outcome.err


def test_a_link_too_long_for_a_qr_code_says_so(covey: Covey, tmp_path: Path) -> None:
    noise = base64.b85encode(os.urandom(5000)).decode()
    (tmp_path / "mine.py").write_text(TASK + f"# {noise}\n")
    new(covey, tmp_path / "home", "--task", "mine.py:make_task")
    outcome = covey("invite", "--home", tmp_path / "home", "--qr")
    assert outcome.code == 0
    assert "too long for a QR code" in outcome.err


def test_only_who_may_invite_does(covey: Covey, tmp_path: Path) -> None:
    made = new(covey, tmp_path / "home", "--private")
    assert join(covey, link_of(covey, tmp_path / "home"), tmp_path / "guest").code == 0
    failed(covey("invite", "--home", tmp_path / "guest"), "may not invite", made.maker)
    failed(covey("invite", "--home", tmp_path / "home", "--for", "me"), "'me' is no", code=2)
    failed(covey("invite", "--home", tmp_path / "none"), CONFIG_FILE, "covey init", code=2)


def test_every_member_of_an_open_network_may_pass_it_on(covey: Covey, tmp_path: Path) -> None:
    made = new(covey, tmp_path / "home")
    assert join(covey, link_of(covey, tmp_path / "home"), tmp_path / "guest").code == 0
    assert join(covey, link_of(covey, tmp_path / "guest"), tmp_path / "third").code == 0
    assert load_config(tmp_path / "third", {}).network.name == made.network


# --- join -----------------------------------------------------------------------------------------------
def test_from_nothing_to_a_home_that_is_ready(covey: Covey, tmp_path: Path, ran: list[Config]) -> None:
    made = new(covey, tmp_path / "home", "--set", "learning.rounds=7", "--private")
    link = link_of(covey, tmp_path / "home")
    guest = tmp_path / "deep" / "guest"
    port = free_port()
    outcome = covey("join", link, "--home", guest, "--yes", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
    assert outcome.code == 0, outcome.err
    (config,) = ran
    assert config == load_config(guest, {})
    assert config.network.name == made.network
    assert config.network.bootstrap == decode_link(link).bootstrap
    assert config.network.listen == (f"/ip4/127.0.0.1/tcp/{port}",)
    assert config.learning.rounds == 7
    assert made.network in outcome.out
    assert peer_in(guest) in outcome.out
    assert {mode_of(guest / name) for name in ("identity.pem", ADMISSION_FILE, CONFIG_FILE)} == {0o600}
    shown = load_admission(guest)
    maker = Ed25519Signatures(load_key(tmp_path / "home" / "identity.pem"))
    assert refusal(config.admission_policy, made.network, peer_in(guest), shown, 0.0, maker) is None
    assert refusal(config.admission_policy, made.network, peer_in(guest), None, 0.0, maker) is not None
    assert covey("config", "check", "--home", guest).code == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("protocol", ["gossip", "scalars", "sampled"])
def test_every_protocol_makes_a_network(covey: Covey, tmp_path: Path, protocol: str) -> None:
    new(covey, tmp_path / "home", "--protocol", protocol)
    assert join(covey, link_of(covey, tmp_path / "home"), tmp_path / "guest").code == 0
    maker, guest = load_config(tmp_path / "home", {}), load_config(tmp_path / "guest", {})
    assert guest.learning == maker.learning
    assert guest.learning.protocol == protocol
    assert getattr(guest, protocol, None) == getattr(maker, protocol, None)


def test_a_manifest_file_is_as_good_as_a_link(covey: Covey, tmp_path: Path) -> None:
    out = tmp_path / "net.toml"
    made = new(covey, tmp_path / "home", "--out", out, "--bootstrap", ADDRESS)
    assert join(covey, out, tmp_path / "guest").code == 0
    config = load_config(tmp_path / "guest", {})
    assert (config.network.name, config.network.bootstrap) == (made.network, (ADDRESS,))


def test_a_link_may_lie_in_a_file_and_have_line_breaks(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home")
    link = link_of(covey, tmp_path / "home")
    (tmp_path / "link.txt").write_text("\n".join([link[:70], link[70:200], link[200:]]) + "\n")
    assert join(covey, tmp_path / "link.txt", tmp_path / "guest").code == 0


def test_code_is_shown_and_not_run_before_the_user_says_so(
    covey: Covey, tmp_path: Path, ran: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    new(covey, tmp_path / "home", "--task", "mine.py:make_task")
    link, guest = link_of(covey, tmp_path / "home"), tmp_path / "guest"
    for answer in ("n\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        outcome = covey("join", link, "--home", guest, "--no-run")
        assert outcome.code == 1
        assert "run this code here?" in outcome.out
        assert '| Path(__file__).with_name("it_ran").touch()' in outcome.out
        assert not guest.exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert covey("join", link, "--home", guest, "--no-run").code == 0
    assert (guest / "it_ran").exists(), "the schema was checked"
    assert ran == []


def test_a_long_task_file_travels_beside_the_link(covey: Covey, tmp_path: Path) -> None:
    code = TASK + "#" * TASK_IN_LINK_BYTES
    (tmp_path / "mine.py").write_text(code)
    new(covey, tmp_path / "home", "--task", "mine.py:make_task")
    outcome = covey("invite", "--home", tmp_path / "home")
    link, guest = outcome.out.strip(), tmp_path / "guest"
    assert "pass it on too, for `covey join --task-file`" in outcome.err
    assert decode_link(link).task_file is None
    failed(join(covey, link, guest), "--task-file: the network's task file does not come with this", code=2)
    assert join(covey, link, guest, "--task-file", tmp_path / "mine.py").code == 0
    assert (guest / TASK_FILE).read_text() == code


def test_a_task_that_makes_another_model_here_is_told_before_the_peers_do(
    covey: Covey, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    arguments = ("--task", "mine.py:make_task", "--option", "width=5", "--own-option", "width")
    new(covey, tmp_path / "home", *arguments)
    link = link_of(covey, tmp_path / "home")
    failed(join(covey, link, tmp_path / "guest"), "the task makes another model here", "covey network show")
    assert join(covey, link, tmp_path / "guest", "--option", "width=5").code == 0


def test_a_secret_of_the_network_travels_in_the_link_alone(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home", "--psk")
    secret = load_config(tmp_path / "home", {}).network.psk
    assert secret is not None
    assert len(bytes.fromhex(secret)) == 32
    assert secret not in (tmp_path / "home" / MANIFEST_FILE).read_text()
    outcome = covey("invite", "--home", tmp_path / "home")
    assert "the network's secret" in outcome.err
    assert secret not in covey("network", "show", outcome.out.strip()).out
    shown = join(covey, outcome.out.strip(), tmp_path / "guest")
    assert secret not in shown.out
    assert load_config(tmp_path / "guest", {}).network.psk == secret
    assert mode_of(tmp_path / "guest" / CONFIG_FILE) == mode_of(tmp_path / "home" / CONFIG_FILE) == 0o600


def test_an_invitation_for_one_peer_is_used_from_its_home(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home", "--private", "--set", "training.learning_rate=0.03")
    guest = tmp_path / "guest"
    covey("init", "--home", guest, "--set", "training.momentum=0.5")
    link = link_of(covey, tmp_path / "home", "--for", peer_in(guest))
    failed(
        join(covey, link, tmp_path / "thief"),
        "the invitation is for another peer than this one, which is",
        "ask for one with `covey invite --for 12D3KooW",
    )
    assert not (tmp_path / "thief" / CONFIG_FILE).exists()
    assert join(covey, link, guest).code == 0
    config = load_config(guest, {})
    assert (config.training.momentum, config.training.learning_rate) == (0.5, 0.03)


def test_a_member_needs_no_invitation_and_a_stranger_is_told_what_to_ask_for(
    covey: Covey, tmp_path: Path
) -> None:
    guest, stranger, out = tmp_path / "guest", tmp_path / "stranger", tmp_path / "net.toml"
    covey("init", "--home", guest)
    made = new(covey, tmp_path / "home", "--member", peer_in(guest), "--out", out)
    assert join(covey, out, guest).code == 0
    assert load_admission(guest) is None
    outcome = join(covey, out, stranger)
    failed(outcome, "is private", made.maker, f"covey invite --for {peer_in(stranger)}")
    assert not (stranger / CONFIG_FILE).exists()
    link = link_of(covey, tmp_path / "home", "--for", peer_in(stranger))
    assert join(covey, link, stranger).code == 0


def test_a_new_invitation_takes_the_place_of_the_old(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home", "--private")
    guest = tmp_path / "guest"
    assert join(covey, link_of(covey, tmp_path / "home"), guest).code == 0
    first = load_admission(guest)
    assert join(covey, link_of(covey, tmp_path / "home", "--for", peer_in(guest)), guest).code == 0
    second = load_admission(guest)
    assert first is not None
    assert second is not None
    assert first.invitation.expires_at > second.invitation.expires_at == 0


def test_settings_of_the_device_are_taken_and_those_of_the_network_are_not(
    covey: Covey, tmp_path: Path
) -> None:
    new(covey, tmp_path / "home")
    link, guest = link_of(covey, tmp_path / "home"), tmp_path / "guest"
    outcome = join(covey, link, guest, "--set", "learning.rounds=3")
    failed(outcome, "learning.rounds: is 3 here, but 0 in the manifest of 'digits-", code=2)
    assert not guest.exists()
    assert join(covey, link, guest, "--set", "training.threads=3").code == 0
    assert load_config(guest, {}).training.threads == 3


# --- what goes wrong ------------------------------------------------------------------------------------
def test_an_invitation_that_has_run_out_is_told_with_its_date(
    covey: Covey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new(covey, tmp_path / "home", "--private")
    link = decode_link(link_of(covey, tmp_path / "home"))
    assert link.invitation is not None
    old = encode_link(replace(link, invitation=replace(link.invitation, expires_at=86_400)))
    failed(join(covey, old, tmp_path / "guest"), "until 1970-01-02 00:00 UTC", "ask for a new one", "clock")
    assert not (tmp_path / "guest").exists()


def test_an_invitation_that_its_inviter_did_not_sign_is_told(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home", "--private")
    link = decode_link(link_of(covey, tmp_path / "home"))
    assert link.invitation is not None
    longer = replace(link.invitation, expires_at=link.invitation.expires_at + 1)
    failed(
        join(covey, encode_link(replace(link, invitation=longer)), tmp_path / "guest"),
        "was not signed by its inviter; ask for another link",
    )
    assert not (tmp_path / "guest" / CONFIG_FILE).exists()


def test_a_manifest_that_was_changed_is_told(covey: Covey, tmp_path: Path) -> None:
    out = tmp_path / "net.toml"
    new(covey, tmp_path / "home", "--out", out)
    out.write_text(out.read_text().replace('rule = [\n    "mean",', 'rule = [\n    "median",'))
    failed(join(covey, out, tmp_path / "guest"), "net.toml: is not what its maker", "get it anew", code=2)


def test_a_link_around_a_changed_manifest_is_told(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home")
    link = decode_link(link_of(covey, tmp_path / "home"))
    forged = replace(link, manifest=replace(link.manifest, inviters=(link.manifest.maker,)))
    failed(join(covey, encode_link(forged), tmp_path / "guest"), "link: is not what its maker", code=2)


def test_another_task_file_than_the_pinned_is_told(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    out = tmp_path / "shared" / "net.toml"
    out.parent.mkdir()
    new(covey, tmp_path / "home", "--task", "mine.py:make_task", "--out", out)
    for folder in (tmp_path, tmp_path / "home"):
        (folder / "it_ran").unlink(missing_ok=True)
    beside = out.with_name(TASK_FILE)
    beside.write_text(TASK + "\n")
    failed(
        join(covey, out, tmp_path / "guest"), "is not the task file of 'mine-", "put the file back", code=2
    )
    link = decode_link(link_of(covey, tmp_path / "home"))
    swapped = encode_link(replace(link, task_file=b"import os"))
    failed(join(covey, swapped, tmp_path / "guest"), "link: is not the task file of 'mine-", code=2)
    beside.unlink()
    failed(join(covey, out, tmp_path / "guest"), "there is none at", code=2)
    assert not (tmp_path / "guest").exists()


def test_a_task_file_for_a_built_in_task_is_refused(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home")
    (tmp_path / "mine.py").write_text(TASK)
    outcome = join(covey, link_of(covey, tmp_path / "home"), tmp_path / "guest", "--task-file", "mine.py")
    failed(outcome, "learns 'digits', which needs none", code=2)


def test_a_taken_port_is_told_before_anything_is_made(
    covey: Covey, tmp_path: Path, ran: list[Config]
) -> None:
    new(covey, tmp_path / "home")
    link = link_of(covey, tmp_path / "home")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"/ip4/127.0.0.1/tcp/{holder.getsockname()[1]}"
        outcome = covey("join", link, "--home", tmp_path / "guest", "--yes", "--listen", address)
    failed(outcome, f"cannot listen on {address}", "choose another with --listen")
    assert not (tmp_path / "guest").exists()
    assert ran == []


def test_a_home_in_use_is_left_alone(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home")
    guest = tmp_path / "guest"
    covey("init", "--home", guest)
    with HomeLock(guest):
        before = files_in(guest)
        outcome = join(covey, link_of(covey, tmp_path / "home"), guest)
        failed(outcome, "is in use by another covey daemon", f"covey stop --home {guest}")
        assert files_in(guest) == before


def test_a_home_of_another_network_is_left_alone(covey: Covey, tmp_path: Path) -> None:
    made = new(covey, tmp_path / "home", "--name", "one")
    new(covey, tmp_path / "other", "--name", "two")
    before = files_in(tmp_path / "home")
    outcome = join(covey, link_of(covey, tmp_path / "other"), tmp_path / "home")
    failed(outcome, f"belongs to the network '{made.network}'; choose another --home")
    assert files_in(tmp_path / "home") == before


def test_a_file_in_the_way_of_the_task_is_not_overwritten(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    new(covey, tmp_path / "home", "--task", "mine.py:make_task")
    guest = tmp_path / "guest"
    guest.mkdir()
    (guest / TASK_FILE).write_text("mine")
    failed(
        join(covey, link_of(covey, tmp_path / "home"), guest),
        "is another file than the network's; move it away",
    )
    assert (guest / TASK_FILE).read_text() == "mine"
    assert not (guest / CONFIG_FILE).exists()


def test_a_damaged_admission_says_to_join_again(tmp_path: Path) -> None:
    (tmp_path / ADMISSION_FILE).write_bytes(b"\x92\x91")
    with pytest.raises(LocalError, match=r"is damaged: .*join again with the link"):
        load_admission(tmp_path)
    (tmp_path / ADMISSION_FILE).write_bytes(bytes(100_000))
    with pytest.raises(LocalError, match="is damaged"):
        load_admission(tmp_path)
    (tmp_path / ADMISSION_FILE).unlink()
    assert load_admission(tmp_path) is None


# --- links from anywhere --------------------------------------------------------------------------------
def _link() -> Link:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    maker = Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    task = ManifestTask(name="digits", schema="ab" * 32)
    shared = {"learning": {"protocol": "gossip"}}
    made = sign_manifest(Manifest(covey=1, name="n", maker="x", task=task, shared=shared), maker)
    return Link(manifest=made)


LINK = _link()
TEXT = encode_link(LINK)


def wrapped(content: bytes) -> str:
    return PREFIX + base64.urlsafe_b64encode(zlib.compress(content)).rstrip(b"=").decode()


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        decode_link(text)
    assert caught.value.path.startswith("link")
    return str(caught.value)


def test_a_link_comes_back() -> None:
    assert decode_link(TEXT) == LINK
    assert " " not in TEXT
    assert TEXT.isascii()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "does not begin as a link does"),
        ("https://example.org", "does not begin as a link does"),
        (PREFIX, "cut short"),
        (TEXT[:-1], "is damaged"),
        (TEXT[:-40], "cut short"),
        (TEXT + "AAAA", "something follows it"),
        (TEXT[:30] + "!" + TEXT[31:], "a character is wrong or missing"),
        (TEXT[:60] + ("A" if TEXT[60] != "A" else "B") + TEXT[61:], "is damaged"),
        (PREFIX + "A" * MAX_LINK_CHARS, f"at most {MAX_LINK_CHARS} are allowed"),
        (wrapped(b"\x91" * 10_000), "its content is not a link's"),
        (wrapped(msgspec.msgpack.encode([2, *msgspec.to_builtins(LINK)[1:]])), "another version of covey"),
        (wrapped(msgspec.msgpack.encode(replace(LINK, bootstrap=("/ip4/1.2.3.4/tcp/1",)))), "names no peer"),
    ],
)
def test_a_damaged_link_is_told_with_a_remedy(text: str, told: str) -> None:
    found = refused(text)
    assert told in found
    assert "covey invite" in found or "copy the whole of it again, or ask for another" in found


def test_a_small_link_cannot_fill_the_memory() -> None:
    bomb = wrapped(bytes(60_000_000))
    assert len(bomb) < MAX_LINK_CHARS
    tracemalloc.start()
    try:
        assert f"more than {MAX_CONTENT_BYTES} bytes" in refused(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_CONTENT_BYTES
    finally:
        tracemalloc.stop()


def decodes_or_is_refused(text: str) -> None:
    with suppress(ConfigError):
        decode_link(text)


@given(st.text() | st.binary().map(lambda raw: PREFIX + base64.urlsafe_b64encode(raw).decode()))
def test_no_text_raises_anything_else(text: str) -> None:
    decodes_or_is_refused(text)
    decodes_or_is_refused(PREFIX + text)


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(_plain)
def test_no_content_raises_anything_else(content: Any) -> None:
    decodes_or_is_refused(wrapped(msgspec.msgpack.encode(content)))


@given(st.data())
def test_no_link_with_a_wrong_part_raises_anything_else(data: st.DataObject) -> None:
    fields = json.loads(msgspec.json.encode(LINK))
    place: Any = fields
    while True:
        keys = list(range(len(place))) if isinstance(place, list) else sorted(place)
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(_plain)
        break
    decodes_or_is_refused(wrapped(msgspec.msgpack.encode(fields)))


@given(st.data())
def test_no_byte_of_a_link_can_be_changed_unseen(data: st.DataObject) -> None:
    content = bytearray(msgspec.msgpack.encode(LINK))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        found = decode_link(wrapped(bytes(content)))
    except ConfigError:
        return
    assert found.manifest == LINK.manifest


def test_a_home_may_be_named_from_here(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    new(covey, Path("home"), "--task", "mine.py:make_task")
    assert join(covey, link_of(covey, Path("home")), Path("guest")).code == 0
    assert (tmp_path / "guest" / TASK_FILE).read_text() == TASK


def test_a_task_file_that_reads_otherwise_than_it_runs_is_refused(covey: Covey, tmp_path: Path) -> None:
    """Shown as UTF-8 this is a comment; Python, told of another encoding, would run what is in it."""
    hidden = "# -*- coding: utf-7 -*-\n# thanks +AAo-print('hidden')+AAo-\n" + TASK
    (tmp_path / "mine.py").write_text(hidden)
    failed(
        covey("network", "new", "--home", tmp_path / "home", "--task", "mine.py:make_task"), "UTF-8", code=2
    )


def test_an_option_kept_back_has_to_be_one(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    arguments = ("--task", "mine.py:make_task", "--option", "rows=9", "--own-option", "row")
    outcome = covey("network", "new", "--home", tmp_path / "home", *arguments)
    failed(outcome, "--own-option: 'row' is no option that is set here (allowed: rows)", code=2)


def test_the_users_own_config_survives_every_join(covey: Covey, tmp_path: Path) -> None:
    for name in ("one", "other"):
        new(covey, tmp_path / name, "--name", name)
    guest = tmp_path / "guest"
    covey("init", "--home", guest)
    mine = (guest / CONFIG_FILE).read_text() + "\n# my own words\n"
    (guest / CONFIG_FILE).write_text(mine)
    assert join(covey, link_of(covey, tmp_path / "one"), guest).code == 0
    join(covey, link_of(covey, tmp_path / "one"), guest)
    assert (guest / f"{CONFIG_FILE}.old").read_text() == mine


def test_what_is_shown_of_a_config_is_fit_to_be_pasted(covey: Covey, tmp_path: Path) -> None:
    new(covey, tmp_path / "home", "--psk")
    secret = load_config(tmp_path / "home", {}).network.psk
    assert secret is not None
    for arguments in ((), ("--json",)):
        told = covey("config", "show", "--home", tmp_path / "home", *arguments).out
        assert secret not in told
        assert "a secret" in told
