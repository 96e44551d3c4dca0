"""Neighbours on the local network, by multicast DNS: what we advertise, and what others do.

Only `node/discovery.py` uses this. The library's own mDNS names every libp2p host alike and takes addresses at their word;
ours is one service type, whose TXT record holds a tag of the network (a hash, never its name), the peer id and addresses.
zeroconf works in threads of its own, and hands over to the trio thread.
"""

import ipaddress
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from uuid import uuid4

import trio
from zeroconf import InterfaceChoice, ServiceInfo, ServiceListener, Zeroconf

from node.addresses import split_tcp
from node.kademlia import Answer

log = logging.getLogger(__name__)

SERVICE = "_covey._tcp.local."
MAX_ADDRESSES = 8
MAX_VALUE_BYTES = 200
"""A string of a TXT record holds 255 bytes with its name."""
MAX_WAITING = 64
"""Neighbours not yet reported; what comes beyond is dropped, and multicast again by those who are there."""
REPORT_GAP_S = 1.0
"""At least so long between two reports, whoever floods the local network."""


def txt_record(tag: bytes, peer: str, addresses: Sequence[str]) -> dict[str, str]:
    """What we advertise. tag: of the network, see `node.discovery.network_key`; half of it is told."""
    found = [address.partition("/p2p/")[0] for address in addresses]
    told = [address for address in found if len(address) <= MAX_VALUE_BYTES][:MAX_ADDRESSES]
    return {
        "network": _short(tag),
        "peer": peer,
        **{f"address{index}": address for index, address in enumerate(told)},
    }


def read_txt_record(tag: bytes, record: Mapping[bytes, bytes | None]) -> Answer | None:
    """Whom a record names; None where it is of another network, or none of ours. Nothing in it is proved."""
    if record.get(b"network") != _short(tag).encode():
        return None
    names = [b"peer", *(b"address%d" % index for index in range(MAX_ADDRESSES))]
    values = [record.get(name) or b"" for name in names]
    peer, *addresses = (
        value.decode("ascii", "replace") if len(value) <= MAX_VALUE_BYTES else "" for value in values
    )
    return Answer(peer, [address for address in addresses if address]) if peer else None


def _short(tag: bytes) -> str:
    return tag[:16].hex()


async def run(
    tag: bytes,
    peer: str,
    addresses: Sequence[str],
    report: Callable[[Answer], None],
    interfaces: Sequence[str] = (),
) -> None:
    """Advertise us and report others of the network, until cancelled.

    addresses: of ours that others can dial: TCP at an IP, one at least. interfaces: IPs of those to use; left out, all.

    Raises:
        OSError: this machine has no multicast.
    """
    send, receive = trio.open_memory_channel[Answer](MAX_WAITING)
    trio_thread = trio.lowlevel.current_trio_token()

    def put(answer: Answer) -> None:
        with suppress(trio.WouldBlock):
            send.send_nowait(answer)

    def hear(answer: Answer) -> None:
        with suppress(trio.RunFinishedError):
            trio_thread.run_sync_soon(put, answer)

    def start() -> Zeroconf:
        service = Zeroconf(interfaces=list(interfaces) or InterfaceChoice.All)
        try:
            service.register_service(_service_info(tag, peer, addresses))
            service.add_service_listener(SERVICE, _Listener(tag, hear))
        except BaseException:
            service.close()
            raise
        return service

    service = await trio.to_thread.run_sync(start)
    try:
        async for answer in receive:
            report(answer)
            await trio.sleep(REPORT_GAP_S)
    finally:
        with trio.CancelScope(shield=True):  # the goodbye: others need not wait for the record to expire
            await trio.to_thread.run_sync(service.close)


def _service_info(tag: bytes, peer: str, addresses: Sequence[str]) -> ServiceInfo:
    _, host, port = split_tcp(addresses[0])
    # A random name: nobody can have taken it, and a node that comes back is news to all.
    name = uuid4().hex
    return ServiceInfo(
        SERVICE,
        f"{name}.{SERVICE}",
        addresses=[ipaddress.ip_address(host).packed],
        port=port,
        properties=txt_record(tag, peer, addresses),
        server=f"{name}.local.",
    )


class _Listener(ServiceListener):
    """Hears of services in a thread of zeroconf."""

    def __init__(self, tag: bytes, hear: Callable[[Answer], None]) -> None:
        self._tag = tag
        self._hear = hear

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        info = ServiceInfo(type_, name)
        # What came with the name, and nothing else: asking would wait seconds for each name that somebody invents.
        info.load_from_cache(zc)
        if answer := read_txt_record(self._tag, info.properties):
            self._hear(answer)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Silence on the local network is none on the link: the core finds out for itself."""
