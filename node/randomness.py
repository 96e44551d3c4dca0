"""Random numbers as a function of what they are for, never of what ran before.

Belongs here: how a seed and a purpose become a generator. What is drawn from it belongs to the one who draws.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray


def _digest(seed: int, path: tuple[str | int, ...]) -> bytes:
    # JSON keeps 1 and "1" apart, and ("a", "b") from ("ab",). It is the same text in every process.
    return hashlib.sha256(json.dumps([seed, *path]).encode()).digest()


def stream(seed: int, *path: str | int) -> np.random.Generator:
    """A generator of its own for one purpose, such as `stream(seed, node, "batches", round)`.

    Counter-based (Philox), its 128-bit key taken from SHA-256 over seed and path: streams do not overlap, and
    drawing more from one changes no other. Costs about 13 microseconds.
    """
    key = int.from_bytes(_digest(seed, path)[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def torch_seed(seed: int, *path: str | int) -> int:
    """63 bits for a torch generator, independent of `stream` over the same path."""
    return int.from_bytes(_digest(seed, path)[16:24], "little") >> 1


FEW_OF_MANY = 16
"""From so many times more items than are wanted, single draws are cheaper than a word for every item."""


class RoundStreams:
    """Random words by (name, round): one Philox stream for each name, entered where its round begins.

    The key is that of `stream(seed, name, purpose)`, the round stands in the third of the four counter words (Salmon et
    al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): each round has 2**130
    words of its own, and nothing depends on what was drawn before. One bit generator is moved about, which costs a
    tenth of making one.
    """

    def __init__(self, seed: int, names: Sequence[str | int], purpose: str) -> None:
        digests = b"".join(_digest(seed, (name, purpose))[:16] for name in names)
        self._keys = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        self._philox = np.random.Philox(key=0)
        self._state = self._philox.state
        self._state["buffer_pos"] = 4  # the buffer is used up: draw from the counter
        self._counter = np.zeros(4, dtype=np.uint64)
        self._place = self._state["state"] = {"counter": self._counter, "key": self._keys[:1]}

    def random_orders(
        self, places: Iterable[tuple[int, int]], num_items: int, count: int
    ) -> NDArray[np.int64]:
        """For each place (index of a name, round) the first `count` of a random order of 0 to num_items - 1.

        Shape [places, count]; `count` is at most `num_items`. Items stand in the order of their random words, the
        first word for item 0; two equal words among 64-bit ones do not occur in practice. Where `count` is small
        beside `num_items` the words are single draws (modulo num_items), and a repeated item is passed over.
        """
        assert 1 <= count <= num_items
        if num_items >= FEW_OF_MANY * count:
            return np.stack([self._first_distinct(*place, num_items, count) for place in places])
        words = np.array([self.words(index, round_, num_items) for index, round_ in places])
        return np.argsort(words, axis=1)[:, :count]

    def words(self, index: int, round_: int, count: int) -> NDArray[np.uint64]:
        """The first `count` words of a round."""
        self._counter[2] = round_
        self._place["key"] = self._keys[index]
        self._philox.state = self._state
        return self._philox.random_raw(count)

    def _first_distinct(self, index: int, round_: int, num_items: int, count: int) -> NDArray[np.int64]:
        words = self.words(index, round_, 2 * count)
        while True:
            items = (words % np.uint64(num_items)).astype(np.int64)
            firsts = np.unique(items, return_index=True)[1]
            if len(firsts) >= count:
                return items[np.sort(firsts)[:count]]
            words = np.concatenate([words, self._philox.random_raw(count)])


@contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """torch's global CPU generator starts from `seed` inside, and is as it was before afterwards.

    For code that can draw from nothing else: the start of a module's weights, dropout. The generator belongs to
    the process, so two threads must not be inside at once.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
