"""The container files, as far as they can be checked without a container engine.

The entry point runs for real, on a PATH where `covey` is a stand-in that writes down what it was asked to do.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from node.config import parse_config
from node.identity import KEY_FILE, create_key, load_key, peer_id_of
from protocols.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
ENTRYPOINT = DOCKER / "entrypoint.sh"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

NOT_SETTINGS = {"COVEY_HOME"}
ENTRYPOINT_VARIABLES = {"ADDRESS_FILE", "BOOTSTRAP_FILE", "WAIT_S", "DRAW_SHARD_OF"}


# --- the Dockerfile -------------------------------------------------------------------------------------
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continuation lines joined, comments gone."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    starts = [index for index, (name, _) in enumerate(found) if name == "FROM"]
    return found[starts[-1] :]


def copied() -> list[str]:
    """Sources of COPY that come from the project, not from another stage."""
    sources = []
    for name, arguments in instructions():
        words = shlex.split(arguments)
        if name == "COPY" and not any(word.startswith("--from=") for word in words):
            sources += [word for word in words[:-1] if not word.startswith("--")]
    return sources


def in_build_context(path: str) -> bool:
    """Whether .dockerignore lets it through: the last line that matches decides."""
    included = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").strip()
        if pattern and not line.startswith("#") and fnmatch.fnmatch(path, pattern):
            included = line.startswith("!")
    return included


def test_only_known_instructions_are_used() -> None:
    known = {"FROM", "RUN", "ENV", "ARG", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE"}
    known |= {"HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT"}
    assert {name for name, _ in instructions()} <= known


def test_all_that_is_copied_exists_and_is_in_the_build_context() -> None:
    assert copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert in_build_context(source), source
    assert not in_build_context(".git")
    assert not in_build_context("tests")


def test_all_that_the_build_needs_is_copied() -> None:
    needed = {
        *PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
        PROJECT["project"]["readme"],
    }
    needed |= {"pyproject.toml", "constraints.txt", *PROJECT["project"]["license-files"]}
    assert needed <= set(copied())


def test_torch_is_the_cpu_build_of_the_pinned_version() -> None:
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    assert ("ARG", f"TORCH_VERSION={pinned[1]}") in instructions()
    torch, *others = [arguments for name, arguments in instructions() if "pip install" in arguments]
    assert "https://download.pytorch.org/whl/cpu" in torch
    assert "torch==${TORCH_VERSION}" in torch
    assert any("--constraint constraints.txt" in other for other in others)


def test_python_is_new_enough() -> None:
    version = dict(argument.split("=") for name, argument in instructions() if name == "ARG")[
        "PYTHON_VERSION"
    ]
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))


def test_the_image_runs_as_a_fixed_user_that_is_not_root() -> None:
    users = [arguments for name, arguments in last_stage() if name == "USER"]
    assert len(users) == 1
    uid, gid = users[0].split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert f"--uid {uid}" in DOCKERFILE
    assert f"--gid {gid}" in DOCKERFILE


def test_the_home_is_a_volume_of_the_user() -> None:
    stage = dict(last_stage())
    assert stage["VOLUME"] == "/data"
    assert "COVEY_HOME=/data" in stage["ENV"]
    assert any("install --directory --owner=covey" in arguments for name, arguments in last_stage())
    assert stage["EXPOSE"] == "4001"


def test_health_is_what_the_daemon_says_itself() -> None:
    health = dict(last_stage())["HEALTHCHECK"]
    command = json.loads(health.split("CMD ", 1)[1])
    assert command == ["covey", "status", "--json"]
    assert PROJECT["project"]["scripts"]["covey"] == "node.cli:main"


def test_the_entry_point_is_the_script_in_exec_form() -> None:
    (command,) = json.loads(dict(last_stage())["ENTRYPOINT"])
    assert re.search(rf"^COPY .*docker/entrypoint\.sh \S*/{command}$", DOCKERFILE, re.MULTILINE)
    assert ENTRYPOINT.stat().st_mode & stat.S_IXUSR
    subprocess.run(["sh", "-n", str(ENTRYPOINT)], check=True)


# --- compose --------------------------------------------------------------------------------------------
SERVICE_KEYS = {
    "image", "build", "restart", "networks", "cap_drop", "security_opt", "environment", "volumes", "healthcheck",
    "depends_on", "deploy",
}  # fmt: skip


def test_compose_has_a_bootstrap_and_nodes() -> None:
    assert set(COMPOSE) == {"name", "x-covey", "services", "networks", "volumes"}
    assert set(COMPOSE["services"]) == {"bootstrap", "node"}
    assert COMPOSE["services"]["bootstrap"]["environment"]["COVEY_LEARNING__PROTOCOL"] == "none"
    assert COMPOSE["services"]["node"]["deploy"]["replicas"] > 1


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_well_formed(name: str) -> None:
    service = COMPOSE["services"][name]
    assert set(service) <= SERVICE_KEYS
    context = (DOCKER / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert all(isinstance(value, str) for value in service["environment"].values())
    assert service["healthcheck"]["test"][:2] == ["CMD", "covey"]
    for dependency in service.get("depends_on", {}):
        assert "healthcheck" in COMPOSE["services"][dependency]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_named_volumes_are_declared_and_the_home_is_one_of_its_mounts(name: str) -> None:
    targets = []
    for volume in COMPOSE["services"][name]["volumes"]:
        if volume.startswith("/"):  # without a name: one for each container
            targets.append(volume)
            continue
        source, target = volume.split(":")[:2]
        assert source in COMPOSE["volumes"]
        targets.append(target)
    assert "/data" in targets


def test_replicas_share_no_home_and_cannot_write_the_bootstrap_address() -> None:
    assert "/data" in COMPOSE["services"]["node"]["volumes"]
    assert "rendezvous:/rendezvous:ro" in COMPOSE["services"]["node"]["volumes"]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_no_privileges_and_publishes_nothing(name: str) -> None:
    service = COMPOSE["services"][name]
    assert not {"privileged", "ports", "network_mode", "pid", "user"} & set(service)
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def settings_of(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("COVEY_")}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_the_variables_of_a_service_are_settings_or_the_entry_points(name: str) -> None:
    environment = COMPOSE["services"][name]["environment"]
    assert set(environment) - set(settings_of(environment)) <= ENTRYPOINT_VARIABLES
    drawn = {"COVEY_TASK__SHARD__COUNT": "8", "COVEY_TASK__SHARD__INDEX": "7"} if name == "node" else {}
    config = parse_config("", {**settings_of(environment), **drawn})
    assert config.network.name == "compose"
    assert config.learns == (name == "node")


def test_a_variable_that_is_no_setting_is_noticed() -> None:
    with pytest.raises(ConfigError, match="no such setting"):
        parse_config("", {"COVEY_NETWORK__NAMES": "compose"})


def test_compose_itself_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here")
    subprocess.run(
        [docker, "compose", "--file", str(DOCKER / "compose.yaml"), "config", "--quiet"], check=True
    )


# --- the entry point, run -------------------------------------------------------------------------------
FAKE_COVEY = """\
#!{python}
import json, os, sys
from pathlib import Path

shown = {{name: value for name, value in os.environ.items() if name.startswith("COVEY_")}}
with open({calls!r}, "a") as file:
    file.write(json.dumps({{"pid": os.getpid(), "arguments": sys.argv[1:], "environment": shown}}) + "\\n")
if sys.argv[1] == "init":
    from node.identity import KEY_FILE, create_key

    home = Path(sys.argv[sys.argv.index("--home") + 1])
    create_key(home / KEY_FILE)
    (home / "covey.toml").touch()
"""


class Container:
    """A home, a shared folder, and the entry point with the stand-in on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.home, self.shared, self._calls = folder / "data", folder / "rendezvous", folder / "calls"
        programs = folder / "bin"
        for made in (self.home, self.shared, programs):
            made.mkdir()
        fake = programs / "covey"
        fake.write_text(FAKE_COVEY.format(python=sys.executable, calls=str(self._calls)))
        fake.chmod(0o755)
        # `python` as in the image: the interpreter of the environment that covey is installed in.
        python = programs / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVEY_")}
        self._environ = {
            **inherited,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "COVEY_HOME": str(self.home),
        }

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(ENTRYPOINT), *arguments],
            env={**self._environ, **environ},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, **environ: str) -> int:
        with self.start(*arguments, **environ) as process:
            self.errors = process.communicate(timeout=60)[1]
            return process.returncode

    def calls(self) -> list[dict[str, Any]]:
        text = self._calls.read_text() if self._calls.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def commands(self) -> list[str]:
        return [call["arguments"][0] for call in self.calls()]

    def peer(self) -> str:
        return peer_id_of(load_key(self.home / KEY_FILE))


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


def test_the_first_start_makes_the_home_and_later_ones_keep_it(container: Container) -> None:
    assert container.run() == 0, container.errors
    assert container.commands() == ["init", "run"]
    assert container.run() == 0
    assert container.commands() == ["init", "run", "run"]
    assert container.calls()[-1]["arguments"] == ["run", "--home", str(container.home)]
    assert set(container.calls()[-1]["environment"]) == NOT_SETTINGS


def test_the_daemon_takes_the_place_of_the_shell(container: Container) -> None:
    with container.start() as process:
        process.communicate(timeout=60)
    init, run = container.calls()
    assert run["pid"] == process.pid
    assert init["pid"] != process.pid


def test_arguments_become_another_command(container: Container) -> None:
    assert container.run("sim", "digits", "--nodes", "4") == 0
    assert [call["arguments"] for call in container.calls()] == [["sim", "digits", "--nodes", "4"]]


def test_the_exit_code_of_a_failed_init_comes_through(container: Container) -> None:
    container.home.rmdir()
    assert container.run() != 0
    assert container.commands() == ["init"]


def test_the_bootstrap_node_writes_down_where_it_is(container: Container) -> None:
    file = container.shared / "bootstrap"
    assert container.run(ADDRESS_FILE=str(file)) == 0, container.errors
    address = file.read_text().strip()
    assert re.fullmatch(rf"/ip4/[0-9.]+/tcp/4001/p2p/{container.peer()}", address)
    assert [path.name for path in container.shared.iterdir()] == ["bootstrap"]


def test_a_node_takes_the_bootstrap_address_from_the_file(container: Container, tmp_path: Path) -> None:
    other = peer_id_of(create_key(tmp_path / "other.pem"))
    address = f"/ip4/10.1.2.3/tcp/4001/p2p/{other}"
    file = container.shared / "bootstrap"
    file.write_text(address + "\n")
    assert container.run(BOOTSTRAP_FILE=str(file)) == 0, container.errors
    environment = container.calls()[-1]["environment"]
    environment = {name: value for name, value in environment.items() if name not in NOT_SETTINGS}
    assert parse_config("", environment).network.bootstrap == (address,)
    assert "waiting" not in container.errors


def test_a_node_waits_for_the_file(container: Container) -> None:
    file = container.shared / "bootstrap"
    with container.start(BOOTSTRAP_FILE=str(file)) as process:
        assert process.stderr is not None
        assert "waiting for the bootstrap address" in process.stderr.readline()
        assert container.commands() == ["init"]
        file.write_text("/ip4/10.1.2.3/tcp/4001/p2p/12D3KooW\n")
        assert process.wait(60) == 0
    assert container.commands() == ["init", "run"]


def test_a_node_gives_up_waiting_and_says_for_what(container: Container) -> None:
    file = container.shared / "bootstrap"
    assert container.run(BOOTSTRAP_FILE=str(file), WAIT_S="0") == 1
    assert f"no bootstrap address in {file} after 0 s" in container.errors
    assert container.commands() == ["init"]


def test_a_node_that_waits_can_be_stopped(container: Container) -> None:
    with container.start(BOOTSTRAP_FILE=str(container.shared / "bootstrap")) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert container.commands() == ["init"]


def test_a_node_draws_the_same_part_of_the_data_at_each_start(container: Container) -> None:
    for _ in range(2):
        assert container.run(DRAW_SHARD_OF="8") == 0, container.errors
    first, second = (call["environment"] for call in container.calls() if call["arguments"][0] == "run")
    assert first == second
    shard = parse_config("", {k: v for k, v in first.items() if k not in NOT_SETTINGS}).task.shard
    assert shard is not None
    assert (shard.count, 0 <= shard.index < 8) == (8, True)
