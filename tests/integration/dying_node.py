"""`covey` that kills itself, with the signal that nothing can catch, at the moment that a file in its home names.

Run as `python -m tests.integration.dying_node run --home HOME`. Once HOME/arm holds `<role> <phase>`, the process ends at
the next such moment. The file goes first, so that the next life goes on.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import node.store
from node.cli import main
from node.driver import Driver
from node.store import Blob
from protocols.events import Aggregate, Effect, Event, Received, Send, Train
from protocols.messages import Hello, Receipt, TrainedModel
from protocols.sampling import Sampling

ARM = "arm"
PHASES = ("handshake", "training", "sending", "aggregating", "checkpointing")
ROLES = ("bootstrap", "trainer", "aggregator", "newcomer")


class Fate:
    """Knows the moment, and what this node is at in it."""

    def __init__(self, home: Path) -> None:
        self._file = home / ARM
        self.learning: Sampling | None = None

    def comes(self, phase: str) -> None:
        """The process ends here if this is its moment."""
        try:
            role, at = self._file.read_text().split()
        except (OSError, ValueError):
            return
        if at != phase or not (phase == "handshake" or self._plays(role)):
            return
        self._file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    def _plays(self, role: str) -> bool:
        learning = self.learning
        if role not in ("trainer", "aggregator") or learning is None:
            return True
        if role == "trainer":
            return learning._trainer is not None
        return bool(learning._collects or learning._waiting_for)


def watch(fate: Fate) -> None:
    """Put the moments where they happen in a daemon."""
    do, handle, read, sync = Driver._do, Driver.handle, Blob.read, node.store._sync

    def doing(self: Driver, effect: Effect) -> None:
        if isinstance(self.core.learning, Sampling):
            fate.learning = self.core.learning
        do(self, effect)
        if isinstance(effect, Send) and isinstance(effect.message, Hello):
            fate.comes("handshake")

    def handling(self: Driver, event: Event) -> None:
        handle(self, event)
        match event:
            # A trainer while its model is being aggregated elsewhere; an aggregator while others train for it.
            case Received(_, Receipt()) if fate.learning and fate.learning._trainer:
                fate.comes("aggregating")
            case Received(_, TrainedModel()):
                fate.comes("training")
            case _:
                pass

    def reading(self: Blob, index: int) -> bytes:
        fate.comes("sending")
        return read(self, index)

    def syncing(path: Path) -> None:
        fate.comes("checkpointing")
        sync(path)

    Driver._do = doing  # type: ignore[method-assign]
    Driver.handle = handling  # type: ignore[method-assign]
    Blob.read = reading  # type: ignore[method-assign]
    node.store._sync = syncing
    watch_worker(fate)


def watch_worker(fate: Fate) -> None:
    """The worker's orders: they begin on a thread of their own."""
    start = Driver.__init__

    def starting(self: Driver, *args: Any, **options: Any) -> None:
        names = list(args)
        perform: Callable[[Any], Any] = names[PERFORM]

        def performing(order: Any) -> Any:
            if isinstance(order, Train):
                fate.comes("training")
            if isinstance(order, Aggregate):
                fate.comes("aggregating")
            return perform(order)

        names[PERFORM] = performing
        start(self, *names, **options)

    Driver.__init__ = starting  # type: ignore[method-assign]


PERFORM = 6
"""Place of `perform` among the arguments of a driver."""

if __name__ == "__main__":
    watch(Fate(Path(sys.argv[sys.argv.index("--home") + 1])))
    main()
