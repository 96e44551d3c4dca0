"""Multiaddrs as operators write them: what can be listened on, what others are told to dial."""

import socket

import pytest

from node.addresses import check_free, dialable, own_ips, split_tcp
from protocols.errors import ConfigError, LocalError


def test_a_tcp_multiaddr_is_split_with_and_without_a_peer_id() -> None:
    assert split_tcp("/ip4/127.0.0.1/tcp/4001") == ("ip4", "127.0.0.1", 4001)
    assert split_tcp("/ip6/::1/tcp/0/p2p/abc") == ("ip6", "::1", 0)
    assert split_tcp("/dns4/door.example/tcp/4001/p2p/abc") == ("dns4", "door.example", 4001)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:4001",
        "/ip4/127.0.0.1/udp/4001",
        "/ip4/127.0.0.1/tcp/70000",
        "/ip4/1.2.3.4/tcp/1/ws",
        "/ip4//tcp/1",
    ],
)
def test_anything_else_is_refused_with_the_setting_it_came_from(address: str) -> None:
    with pytest.raises(ConfigError, match=r"network\.announce\[2\].*is not a TCP multiaddr"):
        split_tcp(address, "network.announce[2]")


def test_a_port_that_somebody_listens_on_is_not_free_even_if_he_would_share_it() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LocalError, match=r"cannot listen on .*change network\.listen"):
            check_free(f"/ip4/127.0.0.1/tcp/{port}")
    check_free(f"/ip4/127.0.0.1/tcp/{port}")


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(LocalError, match="cannot listen"):
        check_free("/ip4/192.0.2.200/tcp/0")


def test_a_wildcard_is_told_as_this_machines_own_addresses() -> None:
    told = dialable(["/ip4/0.0.0.0/tcp/4001/p2p/me"])
    assert told == tuple(f"/ip4/{ip}/tcp/4001/p2p/me" for ip in own_ips(socket.AF_INET))
    assert told
    assert not any("0.0.0.0" in address for address in told)


def test_an_address_that_is_one_is_told_as_it_is_and_once() -> None:
    assert dialable(["/ip4/127.0.0.1/tcp/1/p2p/me"] * 2) == ("/ip4/127.0.0.1/tcp/1/p2p/me",)
