"""The nodes' work in the simulator: the daemon's own training and merging, on models held in memory.

One order at a time for now. A model's digest here names who made it and when, not its bytes: the trace of a run
then depends on no rounding.
"""

import hashlib
from collections import Counter

from aggregation.base import Params
from protocols.errors import LocalError
from protocols.vocabulary import Digest, ModelRef


class SharedModels:
    """All nodes' models, each once, as long as any node holds it."""

    def __init__(self) -> None:
        self._params: dict[Digest, Params] = {}
        self._holders: Counter[Digest] = Counter()

    def get(self, digest: Digest) -> Params:
        """Raises LocalError where nobody holds it any more."""
        try:
            return self._params[digest]
        except KeyError:
            raise LocalError(f"model {digest.hex()[:12]} is not held") from None

    def add(self, digest: Digest, params: Params) -> None:
        """One more node holds it."""
        self._params[digest] = params
        self._holders[digest] += 1

    def drop(self, digest: Digest) -> None:
        """One node holds it no more."""
        self._holders[digest] -= 1
        if self._holders[digest] <= 0:
            del self._holders[digest], self._params[digest]

    def __len__(self) -> int:
        return len(self._params)


class NodeModels:
    """One node's `Models`. What it holds is what it can serve."""

    def __init__(self, shared: SharedModels, held: dict[Digest, object], node: int, size_bytes: int) -> None:
        self._shared = shared
        self._held = held
        self._node = node
        self._size_bytes = size_bytes
        self._num_saved = 0

    def load(self, ref: ModelRef) -> Params:
        return self._shared.get(Digest(ref.digest))

    def save(self, params: Params, round_: int, num_samples: int) -> ModelRef:
        self._num_saved += 1
        digest = Digest(hashlib.sha256(f"model {self._num_saved} of node {self._node}".encode()).digest())
        self._shared.add(digest, params)
        self._held[digest] = digest
        return ModelRef(digest, self._size_bytes, round_, num_samples)
