"""How fast a node lets model bytes pass: a token bucket a direction. Reads no clock: the time is given."""

import math

from protocols.errors import ConfigError
from protocols.vocabulary import CHUNK_BYTES

MIN_BYTES_PER_S = 32 * 1024
"""The least limit, and the least share of one stream: a chunk then takes 32 s, about half of what the other side waits."""
MIN_PIECE_BYTES = 16 * 1024
PIECES_PER_S = 16
"""Into which a limited stream is cut, where that makes them larger than the smallest."""


class TokenBucket:
    """Lets bytes pass at an even rate, whoever asks first going first.

    bytes_per_s: 0 lets all of them pass at once.

    A bucket that was idle lets two pieces pass at once, no more.
    """

    def __init__(self, bytes_per_s: int = 0) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = -math.inf

    @property
    def piece_bytes(self) -> int:
        """How much to ask for at once."""
        if not self.bytes_per_s:
            return CHUNK_BYTES
        return min(CHUNK_BYTES, max(MIN_PIECE_BYTES, self.bytes_per_s // PIECES_PER_S))

    @property
    def max_streams(self) -> float:
        """How many may share the limit, so that none is so slow that the other side gives up."""
        return max(1, self.bytes_per_s // MIN_BYTES_PER_S) if self.bytes_per_s else math.inf

    def reserve(self, num_bytes: int, now_s: float) -> float:
        """Take so many bytes: the seconds to wait before they may pass."""
        if not self.bytes_per_s:
            return 0.0
        began_s = max(self._free_at, now_s - self.piece_bytes / self.bytes_per_s)
        self._free_at = began_s + num_bytes / self.bytes_per_s
        return max(0.0, began_s - now_s)


def check_limit(path: str, bytes_per_s: int) -> int:
    """A limit that transfers can live with.

    Raises:
        ConfigError: at `path`, it is below `MIN_BYTES_PER_S` and not 0.
    """
    if bytes_per_s and bytes_per_s < MIN_BYTES_PER_S:
        problem = f"{bytes_per_s} bytes per second are too few: a chunk of a model would take longer than peers wait"
        raise ConfigError(path, problem, ["0 (no limit)", f"{MIN_BYTES_PER_S} or more"])
    return bytes_per_s
