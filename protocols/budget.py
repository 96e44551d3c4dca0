"""How much one peer may ask of a node: tokens that come back with time."""


class Budget:
    """So many tokens a second, and twice as many at once after a rest."""

    __slots__ = ("_at", "_left", "_per_s")

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._left = 2.0 * per_s
        self._at = 0.0

    def take(self, now: float, tokens: float = 1) -> bool:
        """Whether there are as many; they are spent then."""
        if self.left(now) < tokens:
            return False
        self._left -= tokens
        return True

    def left(self, now: float) -> float:
        """How many there are. Below 0 after more was spent than there was."""
        self._left = min(2.0 * self._per_s, self._left + (now - self._at) * self._per_s)
        self._at = now
        return self._left

    def spend(self, now: float, tokens: float) -> None:
        """What cannot be helped any more: it is missing later."""
        self._left = self.left(now) - tokens
