"""What the machines inside a core have in common: a table from what happens to the method that deals with it.

A table, and not a `match`, because a network of thousands of cores goes through it several times an event.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from protocols.events import Effect, Event, Notice, Received

Output = Effect | Notice
Handler = Callable[[Any, float, Any], list[Output]]
"""(machine, now, event) -> what the machine wants done. The event is of the kind that the handler stands for."""


def kind_of(event: Event | Notice) -> type:
    """What an event is looked up by: its type, or for `Received`, the type of the message."""
    return type(event.message) if type(event) is Received else type(event)


class Machine:
    """One concern of a node core. Pure: `now` and what happened go in, outputs come out."""

    HANDLERS: ClassVar[Mapping[type, Handler]]
    """Who deals with which kind; of other kinds the machine takes no notice."""

    def step(self, now: float, event: Event | Notice) -> list[Output]:
        """What the event means for this machine."""
        handler = self.HANDLERS.get(kind_of(event))
        return handler(self, now, event) if handler else []
