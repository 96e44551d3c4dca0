"""Finding peers of our network beside the bootstrap list: the DHT and the local network (docs/discovery.md).

Runs in the trio thread of `node/libp2p_network.py`. What is found are hints and nothing more: addresses that the core may
dial; who answers there has to prove its peer id, and its network in the handshake.
"""

import hashlib
import ipaddress
import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

import trio

from node import mdns
from node.addresses import split_tcp
from node.kademlia import Answer, Dht
from node.signatures import author_of
from protocols.errors import ConfigError
from protocols.vocabulary import PeerId, peer_of

log = logging.getLogger(__name__)

MAX_FOUND = 16
"""Addresses told at once."""
MAX_ADDRESSES = 8
"""Addresses looked at in one answer."""
MAX_PER_PEER = 2
"""Of these, those of one peer: nobody fills the list alone."""
SEARCH_S = 60.0
"""The pause after a search of the DHT that found somebody new, and after a link is won or lost."""
MAX_KNOWN = 1024
"""Addresses remembered, to tell what is new."""
MAX_PAUSE_S = 3600.0
"""Where nothing new is found the pause doubles up to this. Below the life of a provider record, three hours."""

Report = Callable[[Iterable[Answer]], tuple[str, ...]]
Found = Callable[[tuple[str, ...]], None]
"""Told the addresses of peers that may be of our network, each ending in its peer id."""


def network_key(network: str) -> bytes:
    """Under what a network is known to strangers: the SHA-256 of its id, which does not tell the id."""
    return hashlib.sha256(f"covey network {network}".encode()).digest()


def usable(answers: Iterable[Answer], me: str, loopback: bool = False) -> tuple[str, ...]:
    """The addresses among answers that can be dialled, at most 16: TCP at an IP, of the peer that the answer is about.

    loopback: take addresses that mean the machine itself, which only nodes on one machine can use.
    """
    found: dict[str, None] = {}
    for answer in answers:
        if answer.peer != me and _is_peer_id(answer.peer):
            found.update(dict.fromkeys(_dialable(answer, loopback)))
        if len(found) >= MAX_FOUND:
            break
    return tuple(found)[:MAX_FOUND]


def _dialable(answer: Answer, loopback: bool) -> list[str]:
    found = []
    for address in answer.addresses[:MAX_ADDRESSES]:
        ip = _ip_of(address)
        if ip is None or ip.is_multicast or ip.is_unspecified or (ip.is_loopback and not loopback):
            continue
        kind, _, port = split_tcp(address)
        if port and kind == f"ip{ip.version}" and peer_of(address) in (None, answer.peer):
            found.append(f"/{kind}/{ip}/tcp/{port}/p2p/{answer.peer}")
    return found[:MAX_PER_PEER]


def _ip_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Of a TCP multiaddr, unless it has a host name: a name from a stranger is not looked up."""
    try:
        return ipaddress.ip_address(split_tcp(address)[1])
    except (ConfigError, ValueError):
        return None


def _beyond_loopback(addresses: Iterable[str]) -> list[str]:
    return [address for address in addresses if (ip := _ip_of(address)) is not None and not ip.is_loopback]


def _is_peer_id(text: str) -> bool:
    try:
        author_of(text)
    except ValueError:
        return False
    return True


class Discovery:
    """How a node looks for peers. One object per node; `run` is for the network adapter."""

    def __init__(
        self,
        network: str,
        rng: random.Random,
        *,
        mdns: bool = True,
        dht: bool = True,
        seeds: Sequence[str] = (),
        search_s: float = SEARCH_S,
        interfaces: Sequence[str] = (),
    ) -> None:
        """
        network: the network's id. seeds: addresses at which nodes of any covey network may answer in the DHT, such as the
            bootstrap list. interfaces: IPs of the interfaces for mDNS; left out, all, and a node that listens on
            loopback alone has no part in it.
        """
        self._key = network_key(network)
        self._rng = rng
        self._mdns = mdns
        self._dht = dht
        self._seeds = seeds
        self._search_s = search_s
        self._interfaces = interfaces

    async def run(
        self,
        host: Any,
        addresses: Sequence[str],
        links: Collection[PeerId],
        dialling: Collection[PeerId],
        found: Found,
    ) -> None:
        """Look for peers until cancelled.

        host: the libp2p host, running. addresses: of ours that others can dial, with our peer id. links, dialling: the
            peers with a link and those being dialled, as they are at each moment.
        """
        me, outward = str(host.get_id()), _beyond_loopback(addresses)

        def report(answers: Iterable[Answer]) -> tuple[str, ...]:
            new = [answer for answer in answers if answer.peer not in links]
            self._rng.shuffle(new)  # one who gives many answers gets no more than his share of the 16
            if news := usable(new, me, loopback=not outward):
                found(news)
            return news

        async with trio.open_nursery() as nursery:
            if self._dht:
                nursery.start_soon(
                    _guarded, "in the DHT", self._use_dht, host, addresses, links, dialling, report
                )
            local = list(addresses) if self._interfaces else outward
            if self._mdns and local:
                nursery.start_soon(_guarded, "by mDNS", self._use_mdns, me, local, report)

    async def _use_dht(
        self,
        host: Any,
        addresses: Sequence[str],
        links: Collection[PeerId],
        dialling: Collection[PeerId],
        report: Report,
    ) -> None:
        dht = Dht(host, addresses, self._seeds)
        known: set[str] = set()
        pause = self._search_s / 4  # the first: time for the bootstrap list to be dialled

        def in_use(peer: PeerId) -> bool:
            return peer in links or peer in dialling

        while True:
            changed = await self._pause(dht, pause, links, in_use)
            news = set(report(await dht.search(self._key, in_use)))
            # Twice the pause while nothing changes, with a quarter of chance in it so that nodes do not search in step.
            fresh = changed or bool(news - known)
            pause = self._search_s if fresh else min(2 * pause, MAX_PAUSE_S)
            pause *= self._rng.uniform(0.8, 1.0)
            known = known | news if len(known) < MAX_KNOWN else news

    async def _pause(
        self, dht: Dht, pause: float, links: Collection[PeerId], in_use: Callable[[PeerId], bool]
    ) -> bool:
        """Wait, but no longer than until the first link comes or the last one goes; whether that was so."""
        linked, tick = bool(links), min(pause, self._search_s / 4)
        for _ in range(math.ceil(pause / tick)):
            await trio.sleep(tick)
            await dht.close_idle(in_use)
            if bool(links) != linked:
                return True
        return False

    async def _use_mdns(self, me: str, addresses: Sequence[str], report: Report) -> None:
        def hear(answer: Answer) -> None:
            report([answer])

        await mdns.run(self._key, me, addresses, hear, self._interfaces)


async def _guarded(where: str, work: Callable[..., Awaitable[None]], *args: object) -> None:
    """Looking for peers is an extra: where it fails, the node goes on without."""
    try:
        await work(*args)
    except* Exception as group:
        log.warning("peers are no longer looked for %s: %r", where, _first(group))


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
