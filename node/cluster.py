"""Real daemons on this machine, each its own process: for the demo, the tests and the benchmarks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from node.api import API_FILE, call
from node.config import CONFIG_FILE, Config, convert_config, load_config, to_toml
from node.identity import KEY_FILE, create_key, load_key, peer_id_of
from protocols.errors import LocalError
from protocols.vocabulary import PeerId

POLL_S = 0.05
NODE = (sys.executable, "-m", "node")


class LocalNode:
    """One daemon and its home. The process is ended by its id, never by name."""

    def __init__(self, home: Path, settings: Mapping[str, Any] | None, program: Sequence[str] = NODE) -> None:
        """Make the home, unless it is left to another command to do so: then there are no settings.

        settings: the tables of `covey.toml`. program: what is run with what `covey` would be given.
        """
        self.home = home
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)
        if settings is None:
            return
        (home / CONFIG_FILE).write_text(to_toml(convert_config(dict(settings))), encoding="utf-8")
        if not (home / KEY_FILE).exists():
            create_key(home / KEY_FILE)

    @property
    def config(self) -> Config:
        return load_config(self.home, {})

    @property
    def peer(self) -> PeerId:
        return peer_id_of(load_key(self.home / KEY_FILE))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        return self.home / "daemon.log"

    def log(self) -> str:
        """All that the daemon wrote so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self, *command: str) -> None:
        """Start the daemon; it is up once `status` answers. command: `run`, unless told otherwise."""
        assert not self.running
        (self.home / API_FILE).unlink(missing_ok=True)
        # Two cores serve many daemons here: one thread each, or they fight.
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._program, *(command or ("run",)), "--home", str(self.home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
            )

    def kill(self) -> None:
        """SIGKILL: no goodbye, nothing flushed."""
        self._end(signal.SIGKILL)

    def stop(self, timeout_s: float = 10.0) -> int:
        """SIGTERM, and the exit code."""
        return self._end(signal.SIGTERM, timeout_s)

    def wait_for_exit(self, timeout_s: float) -> int:
        """The exit code of a daemon that was told to end by other means. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def _end(self, number: signal.Signals, timeout_s: float = 10.0) -> int:
        if self._process is None:
            return 0
        if self.running:
            self._process.send_signal(number)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise LocalError(
                f"the daemon of {self.home} ignored signal {number.name}; see {self.log_path}"
            ) from None

    def status(self) -> dict[str, Any] | None:
        """What the daemon says of itself, or None while it does not answer."""
        try:
            status: dict[str, Any] = call(self.home, "/status", timeout_s=2.0)
        except LocalError:
            return None
        return status

    def metric(self, name: str) -> float:
        """One sample of the running daemon's metrics, by its full name with labels; 0 where there is none yet."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", call(self.home, "/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def address(self) -> str:
        """Where others can dial it. The daemon must be up."""
        status = self.status()
        assert status is not None, f"the daemon of {self.home} is not up"
        address: str = status["addresses"][0]
        return address

    def rounds(self) -> list[dict[str, Any]]:
        """Every round record so far, over all runs of this home. A line cut short by a crash is left out."""
        path = self.home / "rounds.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def wait_for(
        self, condition: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """The first status that meets the condition.

        Raises:
            LocalError: the daemon ended, or time ran out; with the end of its log.
        """
        deadline = time.monotonic() + timeout_s  # noqa: TID251 - real processes, real time
        while time.monotonic() < deadline:  # noqa: TID251
            status = self.status()
            if status is not None and condition(status):
                return status
            if not self.running:
                raise LocalError(
                    f"the daemon of {self.home} ended while waiting for {what}:\n{self.log()[-2000:]}"
                )
            time.sleep(POLL_S)
        raise LocalError(f"{self.home}: no {what} within {timeout_s:.0f} s:\n{self.log()[-2000:]}")

    def wait_until_up(self, timeout_s: float = 60.0) -> dict[str, Any]:
        return self.wait_for(lambda status: True, "answer", timeout_s)


class Cluster:
    """Several daemons that end together, whatever happens."""

    def __init__(self, nodes: Iterable[LocalNode] = ()) -> None:
        self.nodes = list(nodes)

    def add(self, home: Path, settings: Mapping[str, Any] | None, program: Sequence[str] = NODE) -> LocalNode:
        node = LocalNode(home, settings, program)
        self.nodes.append(node)
        return node

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            if node.running and node.pid is not None:
                os.kill(node.pid, signal.SIGTERM)
        for node in self.nodes:
            try:
                node.stop()
            except LocalError:
                continue


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def local_settings(**tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of a daemon on loopback with quick timings, which looks for nobody; what is given goes on top."""
    settings: dict[str, dict[str, Any]] = {
        "network": {
            "listen": ["/ip4/127.0.0.1/tcp/0"],
            "mdns": False,
            "dht": False,
            "heartbeat_s": 1.0,
            "dead_after_s": 5.0,
            "redial_base_s": 0.2,
            "redial_max_s": 2.0,
        },
        "learning": {"pause_s": 0.25, "deadline_s": 5.0},
        "exchange": {"retry_s": 0.2},
    }
    for name, table in tables.items():
        settings[name] = {**settings.get(name, {}), **table}
    return settings
