"""What a machine's timers are for: each carries a token, and the token stands for a thing to do.

For machines in which many things wait at once; where only one does, a counter is enough.
"""

from collections.abc import Callable
from typing import Any

from protocols.events import Owner, SetTimer, Timer, TimerFired
from protocols.machine import Output

Later = Callable[[float], list[Output]]
"""What to do at a later `now`."""


class Timers:
    """The timers and the tokens of one machine. name: what traces call them by; tokens are counted from `first_token` on."""

    def __init__(self, owner: Owner, name: str, first_token: int = 0) -> None:
        self._owner = owner
        self._name = name
        self._token = first_token
        self.due: dict[int, Later] = {}
        """What is still to come, by token."""

    def new_token(self) -> int:
        """For a timer, a question or a piece of work: none has that of another."""
        self._token += 1
        return self._token

    def set(self, after_s: float, then: Callable[..., list[Output]], *args: Any) -> Output:
        """Call `then(now, *args)` after so many seconds."""
        token = self.new_token()
        self.due[token] = later(then, *args)
        return SetTimer(Timer(self._owner, self._name, token), after_s)

    def fired(self, now: float, event: TimerFired) -> list[Output]:
        """One that is not known, or another machine's, means nothing."""
        then = self.due.pop(event.timer.token, None) if event.timer.owner == self._owner else None
        return then(now) if then is not None else []


def later(then: Callable[..., list[Output]], *args: Any) -> Later:
    """What to do, with all that is known now."""

    def at(now: float) -> list[Output]:
        return then(now, *args)

    return at
