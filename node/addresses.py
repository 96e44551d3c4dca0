"""TCP multiaddrs as the operator writes them: can this one be listened on, and where can others dial it?"""

import ipaddress
import re
import socket
from collections.abc import Iterable

import psutil

from protocols.errors import ConfigError, LocalError

MAX_PORT = 65_535
_TCP = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/([0-9]{1,5})(?:/p2p/[^/]+)?")


def split_tcp(address: str, path: str = "network.listen") -> tuple[str, str, int]:
    """Kind, host and port of a TCP multiaddr, with or without a peer id at its end.

    path: the setting it came from, for the error.

    Raises:
        ConfigError: it is not a TCP multiaddr.
    """
    found = _TCP.fullmatch(address)
    if not found or int(found[3]) > MAX_PORT:
        raise ConfigError(path, f"'{address}' is not a TCP multiaddr", ["/ip4/0.0.0.0/tcp/4001"])
    return found[1], found[2], int(found[3])


def check_free(address: str) -> None:
    """Nobody listens here yet, and the address is this machine's.

    py-libp2p listens with SO_REUSEPORT: without this check two daemons would share a port, and each get half of
    the other's connections.

    Raises:
        LocalError: what stands in the way, and what to do.
    """
    kind, host, port = split_tcp(address)
    family = socket.AF_INET6 if kind in ("ip6", "dns6") else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise LocalError(
            f"cannot listen on {address}: {error.strerror or error}; end the program that holds the port, "
            "or change network.listen"
        ) from error


def dialable(addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses with each wildcard replaced by this machine's own; loopback only where nothing else is."""
    found: dict[str, None] = {}
    for address in addresses:
        kind, host, _ = split_tcp(address)
        if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
            family = socket.AF_INET if kind == "ip4" else socket.AF_INET6
            for own in own_ips(family):
                found[address.replace(f"/{kind}/{host}/", f"/{kind}/{own}/", 1)] = None
        else:
            found[address] = None
    return tuple(found)


def own_ips(family: socket.AddressFamily) -> list[str]:
    """This machine's addresses of one family that others may reach, or loopback where there are none."""
    rows = [row.address for rows in psutil.net_if_addrs().values() for row in rows if row.family == family]
    # A link-local IPv6 address means nothing without its interface.
    reachable = [ip for ip in rows if "%" not in ip and not ipaddress.ip_address(ip).is_loopback]
    return reachable or ["127.0.0.1" if family == socket.AF_INET else "::1"]
