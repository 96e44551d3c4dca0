"""Bandwidth, shared fairly: how long transfers take that share their ends' lines with others.

A fluid model: a node's upload is divided equally among its running uploads and its download among its downloads; a
transfer runs at the smaller of its two shares. What a share leaves over is not given to others, so a rate is known
from the two ends alone. Knows nothing of links or models.
"""

from collections.abc import Callable
from math import inf
from typing import Any

from sim.clock import VirtualClock


class Line:
    """One node's access to the network: what runs over it, each way."""

    __slots__ = ("downloads", "uploads")

    def __init__(self) -> None:
        self.uploads: dict[Transfer, None] = {}
        self.downloads: dict[Transfer, None] = {}


class Transfer:
    """Bytes on their way from one line to another."""

    __slots__ = ("args", "done", "due_at", "ends_at", "rate", "receiver", "remaining", "sender", "since")

    def __init__(
        self, sender: Line, receiver: Line, num_bytes: float, done: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        self.sender = sender
        self.receiver = receiver
        self.remaining = num_bytes
        """Bytes, at `since`."""
        self.since = 0.0
        self.rate = 0.0
        self.ends_at = inf
        self.due_at = inf
        """When the clock looks at it next: never after `ends_at`. A heap entry for another moment is out of date."""
        self.done = done
        self.args = args


class Transfers:
    """All transfers of a network.

    up_bytes_per_s, down_bytes_per_s: of every line.
    """

    def __init__(self, clock: VirtualClock, up_bytes_per_s: float, down_bytes_per_s: float) -> None:
        self._clock = clock
        self._up = up_bytes_per_s
        self._down = down_bytes_per_s
        self._running: dict[Transfer, None] = {}

    def start(
        self, sender: Line, receiver: Line, num_bytes: float, done: Callable[..., None], *args: Any
    ) -> Transfer:
        """Begin now; `done(*args)` is called once all bytes have passed."""
        transfer = Transfer(sender, receiver, num_bytes, done, args)
        self.resume(transfer)
        return transfer

    def pause(self, transfer: Transfer) -> float:
        """Take it off both lines; what has passed has passed. Returns the bytes that remain."""
        if transfer not in self._running:
            return transfer.remaining
        self._catch_up(transfer, self._clock.moment_s)
        self._leave(transfer)
        return transfer.remaining

    def resume(self, transfer: Transfer) -> None:
        """Go on with the bytes that remain."""
        self._running[transfer] = None
        transfer.sender.uploads[transfer] = None
        transfer.receiver.downloads[transfer] = None
        self._share(transfer.sender, transfer.receiver)

    def set_bandwidth(self, up_bytes_per_s: float, down_bytes_per_s: float) -> None:
        """From now on, for every line and for what runs already."""
        self._up, self._down = up_bytes_per_s, down_bytes_per_s
        for transfer in self._running:
            self._share(transfer.sender, transfer.receiver)

    def _leave(self, transfer: Transfer) -> None:
        transfer.rate, transfer.ends_at, transfer.due_at = 0.0, inf, inf
        del self._running[transfer]
        del transfer.sender.uploads[transfer]
        del transfer.receiver.downloads[transfer]
        self._share(transfer.sender, transfer.receiver)

    def _share(self, sender: Line, receiver: Line) -> None:
        """Bring the rates up to date of all whose share has changed."""
        now = self._clock.moment_s
        if sender.uploads:
            share = self._up / len(sender.uploads)
            for transfer in sender.uploads:
                self._set_rate(transfer, min(share, self._down / len(transfer.receiver.downloads)), now)
        if receiver.downloads:
            share = self._down / len(receiver.downloads)
            for transfer in receiver.downloads:
                if transfer.sender is not sender:
                    self._set_rate(transfer, min(share, self._up / len(transfer.sender.uploads)), now)

    def _set_rate(self, transfer: Transfer, rate: float, now: float) -> None:
        if rate == transfer.rate:
            return
        self._catch_up(transfer, now)
        transfer.rate = rate
        transfer.ends_at = now + transfer.remaining / rate
        # One that has become slower keeps its place in the heap, and is looked at again when that is due.
        if transfer.ends_at < transfer.due_at:
            self._look_again(transfer)

    def _catch_up(self, transfer: Transfer, now: float) -> None:
        left = transfer.remaining - transfer.rate * (now - transfer.since)
        transfer.remaining = left if left > 0 else 0.0
        transfer.since = now

    def _look_again(self, transfer: Transfer) -> None:
        transfer.due_at = transfer.ends_at
        self._clock.at(transfer.due_at, self._look, transfer, transfer.due_at)

    def _look(self, transfer: Transfer, due_at: float) -> None:
        if due_at != transfer.due_at:
            return
        if transfer.ends_at > due_at:
            self._look_again(transfer)
            return
        transfer.remaining = 0.0
        self._leave(transfer)
        transfer.done(*transfer.args)
