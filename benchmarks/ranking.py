"""Searching and hearing at the size of a large network: a library of a million heard entries, and the paper's experiment.

    python benchmarks/ranking.py [--entries 1000000] [--items 100000] [--nodes 10000] [--no-experiment] [--json]

Words, items and authors are drawn from Zipf's law; every batch has its author's real Ed25519 signature. All runs on one
thread. What the figures mean (each a median of what `--repeats` says, or of as many parts of the whole):

    experiment_s, epic_sybil_s   `covey sim grank` end to end, evaluated every 100 steps
    query_p95_ms_warm            of 200 queries of one to three words, each asked before
    query_p95_ms_cold            each asked for the first time after a start (the system has the file in its memory)
    start_s                      until the library can be asked; start_after_kill_s: 1/20 of the clicks are not in its snapshot
    ingest_per_s                 entries a second from frame to disk: decode, check, take, keep; batches of 128
    signatures_per_s             bare Ed25519 checks of the same length of text
    ingest_ratio_to_bare_signatures
                                 entries taken in for each signature that could be checked in that time: what the
                                 running hash saves. Above 1 where a batch is long
    ingest_single_per_s, ingest_single_ratio_to_bare_signatures
                                 the same where each entry came with a signature of its own, the worst case: below 1, and
                                 what is missing to 1 is all the rest of the work
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.library import Library
from node.signatures import Ed25519Signatures
from protocols.codec import encode, link_decoder
from protocols.entries import Batch, Click, Entry, Feed, Kind, Shared
from protocols.events import KeepEntries
from protocols.feeds import FeedLimits, FeedSet, batch_bytes, chain_after, head_bytes
from protocols.messages import Entries
from protocols.vocabulary import MAX_BATCHES_PER_MESSAGE, MAX_FRAME_BYTES

NETWORK = "benchmark"
NOW_S = 1_700_000_000.0
DAY = int(NOW_S // 86_400)
LIMITS = FeedLimits(max_authors=1_000_000, max_entries=10**9, window=1_000_000, expire_days=90)
NUM_WORDS = 20_000
NUM_QUERIES = 200
BATCH = 128
NUM_SINGLE = 20_000
FRAME_BYTES = MAX_FRAME_BYTES - 256


def zipf(rng: np.random.Generator, size: int, count: int, exponent: float = 1.0) -> np.ndarray:
    """`count` numbers below `size`; the k-th of them comes up in proportion to 1 / (k + 1)^exponent."""
    weights = 1.0 / np.arange(1, size + 1) ** exponent
    return rng.choice(size, size=count, p=weights / weights.sum())


class Network:
    """Authors with keys, what they share and what they clicked, all drawn from one seed."""

    def __init__(self, nodes: int, items: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.authors = [
            Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(self.rng.bytes(32))) for _ in range(nodes)
        ]
        self.feeds = {
            feed: [FeedSet(NETWORK, feed, author, LIMITS) for author in self.authors] for feed in Feed
        }
        self.items = [self.rng.bytes(32) for _ in range(items)]
        self.words_of_item = zipf(self.rng, NUM_WORDS, items * 6).reshape(items, 6)
        order = np.argsort(self.words_of_item.ravel(), kind="stable")
        self.items_by_word = order // 6
        self.starts = np.searchsorted(self.words_of_item.ravel()[order], np.arange(NUM_WORDS + 1))

    def shares(self, start: int, stop: int) -> list[Entry]:
        """Items with a title of three words and three tags."""
        found: list[Entry] = []
        for item in range(start, stop):
            words = [word(number) for number in self.words_of_item[item].tolist()]
            found.append(
                Shared(
                    self.items[item],
                    DAY,
                    Kind.FILE,
                    " ".join(words[:3]),
                    "",
                    tuple(words[3:]),
                    "audio/flac",
                    1_000_000,
                    "",
                    (),
                )
            )
        return found

    def clicks(self, count: int) -> list[Entry]:
        """For a word that some item has, on one of those that have it."""
        words = zipf(self.rng, NUM_WORDS, 2 * count)
        words = words[self.starts[words] < self.starts[words + 1]][:count]
        counts = self.starts[words + 1] - self.starts[words]
        # Of a word's items the first are clicked most: the square of a uniform number falls low.
        places = self.starts[words] + (self.rng.random(len(words)) ** 2 * counts).astype(np.int64)
        ranks = self.rng.integers(1, 10, len(words)).tolist()
        return [
            Click(self.items[item], DAY, (word(number),), rank)
            for number, item, rank in zip(
                words.tolist(), self.items_by_word[places].tolist(), ranks, strict=True
            )
        ]

    def publish(self, feed: Feed, author: int, entries: Sequence[Entry]) -> list[Batch]:
        return self.feeds[feed][author].publish(entries, NOW_S)

    def queries(self, count: int) -> list[str]:
        """Of one to three words of one item each, all different."""
        found: dict[str, None] = {}
        while len(found) < count:
            item = int(self.rng.integers(len(self.items)))
            words = self.rng.permutation(self.words_of_item[item])[: int(self.rng.integers(1, 4))]
            found[" ".join(map(word, words.tolist()))] = None
        return list(found)


def word(number: int) -> str:
    """A word of its own for each number."""
    syllables = ("ka", "to", "mi", "re", "so", "lu", "ne", "pa", "vi", "do")
    return "".join(syllables[int(digit)] for digit in str(number + 100))


def frames(feed: Feed, batches: Iterable[Batch]) -> Iterator[bytes]:
    """The answers of a peer that brings these."""
    some: list[Batch] = []
    size_bytes = 0
    for batch in batches:
        more = batch_bytes(batch)
        if some and (size_bytes + more > FRAME_BYTES or len(some) == MAX_BATCHES_PER_MESSAGE):
            yield encode(Entries(1, feed, tuple(some), last=False))
            some, size_bytes = [], 0
        some.append(batch)
        size_bytes += more
    if some:
        yield encode(Entries(1, feed, tuple(some), last=True))


class Node:
    """The way of an entry from the wire to the disk, as a daemon has it, without the daemon."""

    def __init__(self, home: Path, me: Ed25519Signatures) -> None:
        self.home = home
        self.me = me
        self.feeds = {feed: FeedSet(NETWORK, feed, me, LIMITS) for feed in Feed}
        self.library = self.open()

    def open(self) -> Library:
        return Library(self.home, self.me.author, NETWORK, warn=say)

    def hear(self, arriving: Sequence[bytes]) -> None:
        decoder = link_decoder()
        for frame in arriving:
            for message in decoder.feed(frame):
                assert isinstance(message, Entries)
                feeds = self.feeds[message.feed]
                taken = [feeds.take(batch, NOW_S) for batch in message.batches]
                assert all(each.batch is not None for each in taken)
                self.library.keep(
                    KeepEntries(
                        message.feed,
                        tuple(each.batch for each in taken if each.batch is not None),
                        tuple(cut for each in taken for cut in each.cuts),
                    )
                )


def timed(call: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    call()
    return time.perf_counter() - began_at


def fill(network: Network, node: Node, entries: int) -> list[float]:
    """Hear of everything. Entries a second, for each part of the clicks."""
    nodes, items = len(network.authors), len(network.items)
    bounds = [items * place // nodes for place in range(nodes + 1)]
    shares: list[Batch] = []
    for author, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            shares += network.publish(Feed.CATALOGUE, author, network.shares(start, stop))
    arriving = list(frames(Feed.CATALOGUE, shares))
    took_s = timed(lambda: node.hear(arriving))
    say(f"{items} items heard of in {took_s:.1f} s, {items / took_s:.0f} a second")
    rates: list[float] = []
    turn, left = 0, entries - items
    while left > 0:
        batches: list[Batch] = []
        count = 0
        while count < min(left, 400 * BATCH):
            clicks = network.clicks(min(BATCH, left - count))
            batches += network.publish(Feed.CLICKS, turn % nodes, clicks)
            count += len(clicks)
            turn += 1
        arriving = list(frames(Feed.CLICKS, batches))
        chain_after.cache_clear()  # signing has hashed what is to be checked: a node has not
        took_s = timed(lambda arriving=arriving: node.hear(arriving))
        rates.append(count / took_s)
        left -= count
        say(f"{left} clicks to come, {rates[-1]:.0f} a second")
    return rates


def single(network: Network, node: Node, count: int) -> list[float]:
    """The same with a signature for every entry, one entry of each author by turns."""
    rates = []
    for _ in range(4):
        batches = [
            batch
            for at, click in enumerate(network.clicks(count // 4))
            for batch in network.publish(Feed.CLICKS, at % len(network.authors), [click])
        ]
        arriving = list(frames(Feed.CLICKS, batches))
        chain_after.cache_clear()
        rates.append(len(batches) / timed(lambda arriving=arriving: node.hear(arriving)))
    return rates


def signatures_per_s(network: Network, count: int = 5000) -> list[float]:
    """Bare checks of what an author signs under a batch."""
    rates = []
    for _ in range(4):
        signed = []
        for at in range(count // 4):
            author = network.authors[at % len(network.authors)]
            said = head_bytes(NETWORK, Feed.CLICKS, author.author, int(NOW_S), at, bytes(16))
            signed.append((author.author, said, author.sign(said)))
        verify = network.authors[0].verify
        rates.append(
            len(signed) / timed(lambda signed=signed, verify=verify: [verify(*each) for each in signed])
        )
    return rates


def p95_ms(library: Library, queries: Sequence[str]) -> float:
    took_s = [timed(lambda query=query: library.search(query)) for query in queries]
    return 1000 * statistics.quantiles(took_s, n=20)[-1]


def measure_library(entries: int, items: int, nodes: int, repeats: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        network = Network(nodes, items, seed)
        node = Node(Path(folder), network.authors[0])
        found: dict[str, Any] = {"entries": entries, "items": items, "nodes": nodes}
        bare = statistics.median(signatures_per_s(network))
        ingest = statistics.median(fill(network, node, entries))
        queries = network.queries(NUM_QUERIES)
        own = network.queries(50)
        for query in own:  # whoever has never clicked anything is like nobody
            results = node.library.search(query)
            node.library.click(query.split(), results[0].item, 1, NOW_S)
        node.library.close()
        starts, cold, warm, first = [], [], [], []
        for _ in range(repeats):
            began_at = time.perf_counter()
            node.library = node.open()
            starts.append(time.perf_counter() - began_at)
            first.append(1000 * timed(lambda: node.library.search(own[0])))
            cold.append(p95_ms(node.library, queries))
            warm.append(p95_ms(node.library, queries))
            node.library.close()
        found["start_s"] = statistics.median(starts)
        node.library = node.open()
        one_by_one = statistics.median(single(network, node, min(NUM_SINGLE, entries // 5)))
        found["start_after_kill_s"] = statistics.median(
            start_after_kill(network, node, entries // 20, repeats)
        )
        found["size_mb"] = node.library.counts().size_bytes / 1e6
        node.library.close()
        return found | {
            "query_p95_ms_warm": statistics.median(warm),
            "query_p95_ms_cold": statistics.median(cold),
            "first_query_ms": statistics.median(first),
            "signatures_per_s": bare,
            "ingest_per_s": ingest,
            "ingest_ratio_to_bare_signatures": ingest / bare,
            "ingest_single_per_s": one_by_one,
            "ingest_single_ratio_to_bare_signatures": one_by_one / bare,
        }


def start_after_kill(network: Network, node: Node, count: int, repeats: int) -> list[float]:
    """As after kill -9: from a copy of the files, with so many clicks that are in no snapshot."""
    node.library.close()
    node.library = node.open()
    nodes = len(network.authors)
    batches = [
        batch
        for at in range(0, count, BATCH)
        for batch in network.publish(
            Feed.CLICKS, (at // BATCH) % nodes, network.clicks(min(BATCH, count - at))
        )
    ]
    node.hear(list(frames(Feed.CLICKS, batches)))
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as copy:
            for file in node.home.glob("library.db*"):
                shutil.copy(file, copy)
            began_at = time.perf_counter()
            library = Library(Path(copy), node.me.author, NETWORK, warn=say)
            found.append(time.perf_counter() - began_at)
            library.close()
    return found


def measure_experiment(repeats: int) -> dict[str, float | None]:
    """None for both where the simulator's experiment is not there."""
    try:
        from sim.grank import baseline_s, epic_sybil_s
    except ImportError:
        return {"experiment_s": None, "epic_sybil_s": None}
    found = {}
    for name, run in (("experiment_s", baseline_s), ("epic_sybil_s", epic_sybil_s)):
        say(name)
        found[name] = statistics.median(run() for _ in range(repeats))
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=1_000_000, help="heard of, shares and clicks together")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-experiment", action="store_true", help="leave the two experiments out")
    parser.add_argument("--json", action="store_true", help="one object on one line")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = measure_library(
        arguments.entries, arguments.items, arguments.nodes, arguments.repeats, arguments.seed
    )
    if not arguments.no_experiment:
        found |= measure_experiment(arguments.repeats)
    found = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
    if arguments.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:40} {value}")


if __name__ == "__main__":
    main()
