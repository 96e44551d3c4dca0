"""Virtual time: a heap of what is due, in one total order.

Two things due at the same moment come out in the order in which they were put in, so a seed gives one run.
"""

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[..., None]


class VirtualClock:
    """Time that only moves when the next thing is taken."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._sequence = 0
        self.moment_s = 0.0
        """As `now()`, for those who ask at every event."""
        self.stopped = False
        """Ends `run` after the action it is at."""

    def now(self) -> float:
        """Virtual seconds since the start."""
        return self.moment_s

    def after(self, delay_s: float, action: Action, *args: Any) -> None:
        """Have `action(*args)` called `delay_s` from now."""
        assert delay_s >= 0, "time does not go back"
        self._sequence = sequence = self._sequence + 1
        heapq.heappush(self._heap, (self.moment_s + delay_s, sequence, action, args))

    def at(self, moment_s: float, action: Action, *args: Any) -> None:
        """Have `action(*args)` called at this moment, to the last bit: a delay would be rounded."""
        assert moment_s >= self.moment_s, "time does not go back"
        self._sequence = sequence = self._sequence + 1
        heapq.heappush(self._heap, (moment_s, sequence, action, args))

    def step(self) -> bool:
        """Move to the next thing that is due and do it; False where nothing is."""
        if not self._heap:
            return False
        self.moment_s, _, action, args = heapq.heappop(self._heap)
        action(*args)
        return True

    def run(self, until_s: float, num_actions: int) -> bool:
        """Do what is due up to `until_s`, at most so many actions; False once there is no more to do, or `stopped`."""
        heap, pop = self._heap, heapq.heappop
        for _ in range(num_actions):
            if self.stopped or not heap or heap[0][0] > until_s:
                return False
            self.moment_s, _, action, args = pop(heap)
            action(*args)
        return True

    def due_at(self) -> float | None:
        """When the next thing is due."""
        return self._heap[0][0] if self._heap else None
