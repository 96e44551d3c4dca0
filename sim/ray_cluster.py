"""A Ray cluster for as long as it is needed: found or started, and left as it was.

Belongs here: loading Ray, which nothing else imports, and reaching a cluster. What runs there is the affair of
`sweep_ray.py` and `ray_computer.py`.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from protocols.errors import ConfigError

ANSWERS_WITHIN_S = 5.0
"""For a cluster's port to accept. Ray itself would go on asking for minutes."""


@contextmanager
def ray_at(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected.

    address: `host:port` of a cluster, or `auto` for the one that this machine belongs to; None starts one here, which
        ends with the block. A cluster that this process is connected with already is used whatever the address is.

    Raises ConfigError at `--ray`: Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray", "ray is not installed", ["pip install 'covey[ray]'"]) from error
    if ray.is_initialized():
        yield ray
        return
    try:
        try:
            _knock(address)
            ray.init(
                address=address or "local",
                log_to_driver=False,
                include_dashboard=False,
                configure_logging=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                "--ray",
                f"no Ray cluster at {address or 'this machine'}: {error}",
                [
                    "local",
                    "auto",
                    "host:port, and RAY_AUTH_MODE=token in the environment where the cluster asks",
                ],
            ) from error
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Raises OSError where nothing listens."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_WITHIN_S).close()
