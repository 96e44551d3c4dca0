"""Real node cores that gossip step by step, for the experiment of G-Rank: there is no time, a step is what happens.

Belongs here: carrying messages between cores, and keeping what a node's shell keeps: how far it has every author's feed,
and its clicklog. Who clicks what, when, is said in `grank.py`.
"""

import random
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

import msgspec
import numpy as np
from numpy.typing import NDArray

from aggregation.ranking import ClickLog
from node.core import CoreSettings, NodeCore
from protocols.codec import encode
from protocols.content import MAX_ANSWER_BYTES, ContentSettings, in_messages
from protocols.entries import Batch, Click, Feed, FeedMark, Head, Want
from protocols.events import (
    Aggregate,
    Dial,
    Disconnect,
    Effect,
    Emit,
    Estimate,
    Evaluate,
    Event,
    Fetch,
    Forget,
    Halt,
    Keep,
    KeepEntries,
    KeepPeer,
    KeepScalars,
    LinkDown,
    LinkUp,
    Penalise,
    Publish,
    Recall,
    Recalled,
    Received,
    Replay,
    Send,
    SetTimer,
    Started,
    Timer,
    TimerFired,
    Train,
)
from protocols.feeds import FeedLimits, FeedSet, batch_bytes
from protocols.messages import Ask, Entries, Peers
from protocols.view import NO_LEARNING, ViewSettings
from protocols.vocabulary import (
    DIGEST_BYTES,
    MAX_ENTRIES_PER_BATCH,
    MAX_PEERS_PER_MESSAGE,
    Digest,
    PeerId,
    Reason,
    SchemaHash,
    peer_of,
)
from sim.links import sim_address
from sim.signing import SimSignatures

NETWORK = "g-rank"
DAY = 20_000
UNIX_S = DAY * 86_400.0
"""When everything begins. A step is a second: it all happens on one day."""
MAX_DEGREE = 256
_entry_size = msgspec.msgpack.Encoder().encode


class Archive:
    """What every author has said, once for all nodes: copies of a feed are equal, and a node's own is how far it has it."""

    def __init__(self) -> None:
        self._feeds: dict[bytes, _Said] = {}
        self._batches: dict[tuple[bytes, int, int], Batch] = {}

    def add(self, batch: Batch) -> None:
        """A batch as its author published it."""
        self._feeds.setdefault(batch.author, _Said()).add(batch)

    def size(self, author: bytes, last: int) -> int:
        """Bytes of the first `last` entries of an author, as they travel."""
        return self._feeds[author].sizes[last]

    def batches(self, wants: Iterable[Want], held: Mapping[bytes, int], max_bytes: int) -> tuple[Batch, ...]:
        """Answer a `Recall` for a node that has each author's feed as far as `held` says."""
        found: list[Batch] = []
        for want in wants:
            said = self._feeds[want.author]
            after, until = want.after, min(want.after + want.limit, held[want.author])
            while after < until:
                end = said.end(min(until, after + MAX_ENTRIES_PER_BATCH))
                max_bytes -= said.sizes[end] - said.sizes[after]
                if end <= after or max_bytes < 0:
                    break
                found.append(self._batch(said, want.author, after, end))
                after = end
            if max_bytes < 0:
                break
        return tuple(found)

    def _batch(self, said: "_Said", author: bytes, after: int, end: int) -> Batch:
        key = author, after, end
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = said.batch(author, after, end)
        return batch


class _Said:
    """One author's feed. Peers only ever have it up to an end that the author has signed."""

    def __init__(self) -> None:
        self.epoch = 0
        self.entries: list[Click] = []
        self.sizes = [0]
        self.ends = [0]
        self.priors: dict[int, bytes] = {}
        self.signatures: dict[int, bytes] = {}

    def add(self, batch: Batch) -> None:
        self.epoch = batch.epoch
        self.priors[batch.first - 1] = batch.prior
        self.signatures[batch.last] = batch.signature
        self.ends.append(batch.last)
        for entry in batch.entries:
            assert isinstance(entry, Click)
            self.entries.append(entry)
            self.sizes.append(self.sizes[-1] + len(_entry_size(entry)))

    def end(self, limit: int) -> int:
        """The last signed end that is not beyond the limit."""
        return self.ends[bisect_right(self.ends, limit) - 1]

    def batch(self, author: bytes, after: int, end: int) -> Batch:
        entries = tuple(self.entries[after:end])
        return Batch(author, self.epoch, after + 1, self.priors[after], entries, self.signatures[end])


class User:
    """A node and what its shell keeps.

    known: bool [items], the items that it has metadata of: its own, and those in the clicks that it has heard.
    """

    __slots__ = ("_known", "core", "held", "known", "log", "log_bytes", "peer", "pull_timer", "pushed", "rng")

    def __init__(
        self, peer: PeerId, core: NodeCore, rng: random.Random, log: ClickLog, num_items: int
    ) -> None:
        """rng: the core's own."""
        self.peer = peer
        self.rng = rng
        self.pushed: dict[PeerId, dict[bytes, FeedMark]] = {}
        """How far it has brought each author's feed to others."""
        self.core = core
        self.log = log
        self._known = bytearray(num_items)
        self.known: NDArray[np.bool_] = np.frombuffer(self._known, dtype=bool)
        self.held: dict[bytes, int] = {}
        """How far it has each author's feed."""
        self.log_bytes = 0
        self.pull_timer: Timer | None = None

    def own(self, items: Sequence[int]) -> None:
        """It has these itself."""
        for item in items:
            self._known[item] = True

    def hear(self, batch: Batch, archive: Archive, place: Mapping[bytes, int]) -> None:
        """Keep what an author has said. This is where an experiment spends its time."""
        author, add, known = batch.author, self.log.add, self._known
        for entry in batch.entries:
            item = entry.item  # type: ignore[union-attr]
            add(author, entry.terms, item)  # type: ignore[union-attr]
            known[place[item]] = True
        last = batch.last
        self.held[author] = last
        self.log_bytes += archive.size(author, last) - archive.size(author, batch.first - 1)

    @property
    def num_entries(self) -> int:
        return sum(self.held.values())


class Network:
    """Nodes of the experiment. Everything that a step sets off has come to its end before the next."""

    def __init__(
        self, digests: Sequence[Digest], *, seed: int, max_nodes: int, top_terms: int, pushes: bool
    ) -> None:
        """digests: of the items, in order. max_nodes: that there will ever be."""
        self.users: list[User] = []
        self.archive = Archive()
        self.now = 0.0
        self.answer_bytes: list[int] = []
        """Of each answer to a pull, or of each push, since this was emptied last."""
        self.ask_bytes: list[int] = []
        self._digests = digests
        self._place: dict[bytes, int] = {digest: index for index, digest in enumerate(digests)}
        self._seed = seed
        self._top_terms = top_terms
        self._by_peer: dict[PeerId, User] = {}
        self._waiting: deque[tuple[User, Event]] = deque()
        self._content = ContentSettings(
            # An answer is all that the other lacks, as in the paper.
            entries_per_answer=100_000,
            entries_per_author=100_000,
            max_clicks_per_author=100_000,
            answer_bytes_per_s=1_000_000_000,
        )
        self._pushes = pushes
        # Nobody links up but to pull. One neighbour tells of a quarter of what the view has room for, at most.
        self._view = ViewSettings(
            target_degree=0, max_degree=MAX_DEGREE, max_brief=MAX_DEGREE, max_known=max(8, 8 * max_nodes)
        )

    # --- nodes ------------------------------------------------------------------------------------------
    def start(self, clicks: Sequence[Sequence[Click]], given: int) -> list[User]:
        """Start nodes that have clicked before. Each has the first `given` clicks of the next one, the last one of the first.

        clicks: of each node.
        """
        first_index = len(self.users)
        feeds = [self._former_life(first_index + i, own, given) for i, own in enumerate(clicks)]
        for i, own in enumerate(feeds):
            theirs = feeds[(i + 1) % len(feeds)]
            kept = [*own.batches, *(theirs.batches[:1] if given and len(feeds) > 1 else [])]
            self._start(own.peer, kept, own.heads + (theirs.given if kept[len(own.batches) :] else ()))
        return self.users[first_index:]

    def _former_life(self, index: int, clicks: Sequence[Click], given: int) -> "_FormerLife":
        peer = PeerId(f"node{index:04d}")
        signatures = SimSignatures(peer)
        feeds = FeedSet(NETWORK, Feed.CLICKS, signatures, FeedLimits(1, len(clicks), len(clicks), 1))
        batches: list[Batch] = []
        heads: list[tuple[Head, ...]] = []
        for part in (clicks[:given], clicks[given:]):
            batches += feeds.publish(part, UNIX_S)
            heads.append(tuple(feeds.heads()))
        for batch in batches:
            self.archive.add(batch)
        return _FormerLife(peer, batches, heads[0], heads[1])

    def _start(self, peer: PeerId, kept: Sequence[Batch], heads: tuple[Head, ...]) -> None:
        settings = CoreSettings(
            network=NETWORK,
            task="",
            schema=SchemaHash(bytes(DIGEST_BYTES)),
            max_model_bytes=1,
            learning=NO_LEARNING,
            view=self._view,
            content=self._content,
        )
        signatures = SimSignatures(peer)
        rng = random.Random(f"{self._seed} {peer}")
        core = NodeCore(settings, peer, rng, signatures)
        assert core.content is not None
        core.content.takes_unasked = self._pushes
        log = ClickLog(signatures.author, top_terms=self._top_terms)
        for digest in self._digests:
            log.item_index(digest)  # an item's index is the same for every node
        user = User(peer, core, rng, log, len(self._digests))
        for batch in kept:
            user.hear(batch, self.archive, self._place)
        self.users.append(user)
        self._by_peer[peer] = user
        self._waiting.append(
            (
                user,
                Started(
                    (sim_address(peer),), (), None, unix_s=UNIX_S + self.now, heads=((Feed.CLICKS, heads),)
                ),
            )
        )
        self._run()

    def introduce(self, users: Sequence[User], others: Sequence[User]) -> None:
        """Tell nodes of others, by what these have signed. It stands for shuffles."""
        records = [other.core.view.record for other in others]
        for number, user in enumerate(users):
            tellers = [other for other in others[number % len(others) :][:2] or others if other is not user]
            teller = tellers[0] if tellers else others[number - 1]
            if not user.core.view.is_live(teller.peer):
                self._link(user, teller)
                self._run()
            for start in range(0, len(records), MAX_PEERS_PER_MESSAGE):
                told = Peers(tuple(records[start : start + MAX_PEERS_PER_MESSAGE]))
                self._waiting.append((user, Received(teller.peer, told)))
            self._run()

    def _link(self, caller: User, other: User) -> None:
        self._waiting.append((caller, LinkUp(other.peer, True, sim_address(other.peer))))
        self._waiting.append((other, LinkUp(caller.peer, False, "")))

    # --- steps ------------------------------------------------------------------------------------------
    def publish(self, user: User, clicks: tuple[Click, ...]) -> None:
        """Add to a node's own feed."""
        self._waiting.append((user, Publish(Feed.CLICKS, clicks)))
        self._run()

    def pull(self, user: User) -> None:
        """A node asks one random known peer for all that it lacks."""
        assert user.pull_timer is not None, "a node that runs has a timer for its next pull"
        before = len(self.answer_bytes)
        self._waiting.append((user, TimerFired(user.pull_timer)))
        self._run()
        self._join_answer(before)

    def push(self, user: User, other: User) -> None:
        """Bring another what it was not brought yet, unasked."""
        if not user.core.view.is_live(other.peer):
            self._link(user, other)
            self._run()
        assert user.core.content is not None
        before, pushed = len(self.answer_bytes), user.pushed.setdefault(other.peer, {})
        wants = user.core.content.feeds[Feed.CLICKS].lacking(
            pushed,
            0,
            0,
            offset=user.rng.randrange(2**32),
            per_author=self._content.entries_per_author,
            max_entries=self._content.entries_per_answer,
        )
        batches = self.archive.batches(wants, user.held, MAX_ANSWER_BYTES)
        pushed.update((batch.author, FeedMark(batch.author, batch.epoch, batch.last)) for batch in batches)
        messages = in_messages(0, Feed.CLICKS, batches, [batch_bytes(batch) for batch in batches])
        self._perform(user, [Send(other.peer, message) for message in messages] if batches else [])
        self._run()
        self._join_answer(before)

    def _join_answer(self, before: int) -> None:
        """An answer may come in several messages."""
        total = sum(self.answer_bytes[before:])
        self.answer_bytes[before:] = [total] if total else []

    def _run(self) -> None:
        waiting = self._waiting
        while waiting:
            user, event = waiting.popleft()
            self._perform(user, user.core.step(self.now, event))

    def _perform(self, user: User, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._deliver(user, effect)
                case KeepEntries():
                    self._keep(user, effect)
                case Recall():
                    batches = self.archive.batches(effect.wants, user.held, effect.max_bytes)
                    self._waiting.append((user, Recalled(effect.token, batches)))
                case SetTimer():
                    if effect.timer.owner == "content" and effect.timer.name == "pull":
                        user.pull_timer = effect.timer
                case Dial():
                    peer = peer_of(effect.address)
                    assert peer is not None
                    self._link(user, self._by_peer[peer])
                case Disconnect():
                    other = self._by_peer[effect.peer]
                    self._waiting.append((user, LinkDown(other.peer, effect.reason)))
                    self._waiting.append((other, LinkDown(user.peer, Reason.LINK)))
                case Penalise():
                    # Of a node's links there are only so many.
                    assert effect.reason is Reason.FULL, f"honest cores have nothing else to refuse: {effect}"
                case KeepPeer() | Emit():
                    pass
                case (
                    Fetch()
                    | Train()
                    | Aggregate()
                    | Evaluate()
                    | Estimate()
                    | Replay()
                    | KeepScalars()
                    | Keep()
                    | Forget()
                    | Halt()
                ):
                    raise AssertionError(f"nothing here learns or fetches: {effect}")
                case _:
                    assert_never(effect)

    def _deliver(self, user: User, effect: Send) -> None:
        message = effect.message
        if isinstance(message, Entries | Ask) and message.feed is Feed.CLICKS:
            sizes = self.ask_bytes if isinstance(message, Ask) else self.answer_bytes
            sizes.append(len(encode(message)))
        self._waiting.append((self._by_peer[effect.peer], Received(user.peer, message)))

    def _keep(self, user: User, effect: KeepEntries) -> None:
        assert not effect.cuts, "nothing expires, and nobody takes anything back"
        for batch in effect.batches:
            if batch.author == user.log.me:
                self.archive.add(batch)
            user.hear(batch, self.archive, self._place)


class _FormerLife:
    """What a node has said before the experiment begins, and where its feed stands: after what it gives, and at the end."""

    def __init__(
        self, peer: PeerId, batches: Sequence[Batch], given: tuple[Head, ...], heads: tuple[Head, ...]
    ) -> None:
        self.peer = peer
        self.batches = tuple(batches)
        self.given = given
        self.heads = heads
