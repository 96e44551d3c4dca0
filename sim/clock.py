"""Virtual time: a heap of what is due, in one total order.

Two things due at the same moment come out in the order in which they were put in, so a seed gives one run.
"""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class VirtualClock:
    """Time that only moves when the next thing is taken."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action]] = []
        self._sequence = 0
        self._now = 0.0

    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def after(self, delay_s: float, action: Action) -> None:
        """Have `action` called `delay_s` from now."""
        self.at(self._now + delay_s, action)

    def at(self, moment_s: float, action: Action) -> None:
        """Have `action` called at this moment, to the last bit: a delay would be rounded."""
        assert moment_s >= self._now, "time does not go back"
        heapq.heappush(self._heap, (moment_s, self._sequence, action))
        self._sequence += 1

    def step(self) -> bool:
        """Move to the next thing that is due and do it; False where nothing is."""
        if not self._heap:
            return False
        self._now, _, action = heapq.heappop(self._heap)
        action()
        return True

    def due_at(self) -> float | None:
        """When the next thing is due."""
        return self._heap[0][0] if self._heap else None
