"""Cores that learn nothing and share content, wired by a heap, with a disk in memory under each. One seed decides all."""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec.structs import replace

from node.core import CoreSettings, NodeCore
from protocols.codec import encode, link_decoder
from protocols.content import Content, ContentSettings
from protocols.entries import Entry, Feed, Head, Want
from protocols.events import (
    BeginAnew,
    ContentHeld,
    ContentMissing,
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Emit,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Get,
    Hold,
    KeepEntries,
    LinkDown,
    LinkUp,
    Penalise,
    Publish,
    Recall,
    Recalled,
    Received,
    Rejected,
    Send,
    SetTimer,
    Started,
    TimerFired,
    Trouble,
)
from protocols.feeds import FeedSet
from protocols.messages import Entries, LinkMessage
from protocols.view import ViewSettings
from protocols.vocabulary import MAX_ENTRIES_PER_BATCH, ContentRef, Digest, PeerId, Reason, SchemaHash
from tests.protocols.feed_copies import NOW, PLENTY, Story, click, shared
from tests.protocols.feed_store import FeedStore
from tests.protocols.identities import FakeSignatures

LATENCY_S = 0.01
FETCH_S = 0.2
QUICK = ContentSettings(pull_s=2.0, answer_bytes_per_s=100_000_000)


def address(peer: str) -> str:
    return f"/memory/{peer}/p2p/{peer}"


class Store(Protocol):
    """The disk, as far as feeds are on it."""

    def keep(self, effect: KeepEntries) -> object: ...

    def recall(self, effect: Recall) -> Recalled: ...

    def heads(self) -> tuple[tuple[Feed, tuple[Head, ...]], ...]: ...


class Node:
    """One core and the disk under it."""

    def __init__(self, name: str, settings: ContentSettings, make_store: Callable[[], Store]) -> None:
        self.peer = PeerId(name)
        self.settings = settings
        self.signatures = FakeSignatures(name)
        self.core: NodeCore | None = None
        self.life = 0
        self.clock_s = NOW
        """The wall clock's time at 0."""
        self.make_store = make_store
        self.store = make_store()
        self.blobs: set[Digest] = set()
        """What it can serve, whatever it says that it holds."""
        self.busy = False
        """It serves enough others."""
        self.wrong = False
        """What it serves is not what its hash says."""
        self.records: list[ContentHeld | ContentMissing] = []
        self.troubles: list[str] = []
        self.penalties: list[tuple[PeerId, Reason]] = []
        self.fetches: list[tuple[PeerId, ...]] = []
        self.sent: Counter[str] = Counter()

    @property
    def author(self) -> bytes:
        return self.signatures.author

    @property
    def content(self) -> Content:
        assert self.core is not None
        assert self.core.content is not None
        return self.core.content

    def feeds(self, feed: Feed = Feed.CLICKS) -> FeedSet:
        return self.content.feeds[feed]

    def heads(self, feed: Feed = Feed.CLICKS) -> dict[bytes, Head]:
        return {head.author: head for head in self.feeds(feed).heads()}

    def entries(self, author: bytes, feed: Feed = Feed.CLICKS) -> tuple[Entry, ...]:
        """What its disk has of an author."""
        head = next((head for head in dict(self.store.heads()).get(feed, ()) if head.author == author), None)
        if head is None:
            return ()
        wants = (Want(author, head.epoch, head.first - 1, PLENTY),)
        batches = self.store.recall(Recall(1, feed, wants, PLENTY)).batches
        return tuple(entry for batch in batches for entry in batch.entries)

    def reasons(self, peer: str | None = None) -> Counter[Reason]:
        """Why it has penalised this peer, or anybody."""
        return Counter(reason for who, reason in self.penalties if peer is None or who == peer)


class Link:
    """Both ends see it come up and go down; what is on its way when it ends means nothing to who has seen the end."""

    def __init__(self, *ends: PeerId) -> None:
        self.ends = frozenset(ends)
        self.up: set[PeerId] = set()


class ContentNetwork:
    """Nodes `n0` ...; all dial `n0`.

    settings: of all nodes, or by name. disks: what some of them have heard before they start.
    """

    def __init__(
        self,
        num: int,
        seed: int = 0,
        settings: ContentSettings | dict[str, ContentSettings] = QUICK,
        disks: dict[str, Sequence[Story]] | None = None,
        make_store: Callable[[], Store] = FeedStore,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now, self._pushed = 0.0, 0
        self.heap: list[tuple[float, int, PeerId, int, Event, Link | None]] = []
        self.links: dict[frozenset[PeerId], Link] = {}
        self.blocked: set[frozenset[PeerId]] = set()
        self.silent: set[PeerId] = set()
        """What these are sent is lost, and their links stand."""
        self.tamper: Callable[[PeerId, PeerId, LinkMessage], LinkMessage | None] = lambda a, b, message: (
            message
        )
        self.log: list[tuple[float, PeerId, Effect]] = []
        self.nodes: dict[PeerId, Node] = {}
        self._fetches: dict[tuple[PeerId, int, int], Fetch] = {}
        for number in range(num):
            name = f"n{number}"
            own = settings.get(name, QUICK) if isinstance(settings, dict) else settings
            node = self.nodes[PeerId(name)] = Node(name, own, make_store)
            for story in (disks or {}).get(name, ()):
                ends = range(0, story.last, MAX_ENTRIES_PER_BATCH if story.feed is Feed.CLICKS else 12)
                node.store.keep(KeepEntries(story.feed, tuple(story.batches(ends))))
            self.start(node)

    def __getitem__(self, name: str) -> Node:
        return self.nodes[PeerId(name)]

    def start(self, node: Node) -> None:
        node.life += 1
        view = ViewSettings(bootstrap=(address("n0"),), target_degree=4, heartbeat_s=2, dead_after_s=10)
        settings = CoreSettings(
            network="net",
            task="task",
            schema=SchemaHash(bytes(32)),
            max_model_bytes=1_000,
            learning="none",
            view=view,
            content=node.settings,
        )
        node.core = NodeCore(
            settings, node.peer, random.Random(f"{self.seed} {node.peer} {node.life}"), node.signatures
        )
        started = Started(
            (address(node.peer),), (), None, unix_s=node.clock_s + self.now, heads=node.store.heads()
        )
        self.happen(node.peer, started)
        self.happen(node.peer, Hold(tuple(sorted(node.blobs))))

    def crash(self, node: Node) -> None:
        """It is gone; its disk stays."""
        node.life += 1
        node.core = None
        for pair in [pair for pair in self.links if node.peer in pair]:
            self._cut(pair, node.peer, Reason.LINK)

    def cut(self, a: str, b: str) -> None:
        """Their link breaks."""
        self._cut(_pair(a, b), PeerId(a), Reason.LINK)

    def block(self, *names: str) -> None:
        """No link between any two of these."""
        for a in names:
            for b in names:
                if a != b:
                    pair = _pair(a, b)
                    self.blocked.add(pair)
                    self._cut(pair, PeerId(a), Reason.LINK)

    # --- what happens -----------------------------------------------------------------------------------
    def push(self, after_s: float, peer: PeerId, event: Event, link: Link | None = None) -> None:
        self._pushed += 1
        life = self.nodes[peer].life
        heapq.heappush(self.heap, (self.now + after_s, self._pushed, peer, life, event, link))

    def happen(self, name: str, event: Event) -> None:
        """At once."""
        node = self.nodes[PeerId(name)]
        assert node.core is not None
        for effect in node.core.step(self.now, event):
            self.log.append((self.now, node.peer, effect))
            self.perform(node, effect)

    def say(self, me: str, peer: str, message: LinkMessage) -> None:
        """A message that this node's core has not written."""
        (read,) = link_decoder().feed(encode(message))
        self.push(LATENCY_S, PeerId(peer), Received(PeerId(me), read), self.links[_pair(me, peer)])

    def run(self, for_s: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Until `stop` holds, or so long. Whether it holds."""
        until = self.now + for_s
        while self.heap and self.heap[0][0] <= until:
            if stop():
                return True
            self.now, _, peer, life, event, link = heapq.heappop(self.heap)
            node = self.nodes[peer]
            if node.core is None or node.life != life:
                continue
            if link is not None and not _reaches(link, peer, event):
                continue
            for happening in self._turned_out(node, event):
                self.happen(peer, happening)
        self.now = max(self.now, until) if not stop() else self.now
        return stop()

    def link(self, *names: str) -> None:
        """Run until all of these are linked with each other, dialling where they are not."""
        peers = [PeerId(name) for name in names]
        pairs = [(a, b) for i, a in enumerate(peers) for b in peers[i + 1 :]]
        for a, b in pairs:
            if _pair(a, b) not in self.links:
                self._dial(a, address(b))
        up = self.run(10, lambda: all(self.is_live(a, b) and self.is_live(b, a) for a, b in pairs))
        assert up, f"seed {self.seed}: no links among {names}"

    def is_live(self, a: PeerId, b: PeerId) -> bool:
        core = self.nodes[a].core
        return core is not None and core.view.is_live(b)

    def _turned_out(self, node: Node, event: Event) -> list[Event]:
        """What comes of a fetch is seen at its end."""
        if not isinstance(event, Fetched):
            return [event]
        fetch = self._fetches.pop((node.peer, node.life, event.token))
        sources = [self.nodes[peer] for peer in (fetch.peer, *fetch.others)]
        good = [s for s in sources if s.core and fetch.ref.digest in s.blobs and not (s.wrong or s.busy)]
        first, *others = sources
        lied: list[Event] = [Rejected(s.peer, Reason.WRONG_HASH) for s in others if s.core and s.wrong]
        if good:
            node.blobs.add(Digest(fetch.ref.digest))
            mine: list[Event] = [Rejected(first.peer, Reason.WRONG_HASH)] if first.wrong else []
            return [*mine, *lied, event]
        reason = Reason.WRONG_HASH if first.wrong else Reason.BUSY if first.busy else Reason.GONE
        return [*lied, FetchFailed(event.token, reason)]

    def _dial(self, me: PeerId, where: str) -> None:
        peer = PeerId(where.rpartition("/")[2])
        pair = _pair(me, peer)
        other = self.nodes.get(peer)
        if other is None or other.core is None or pair in self.blocked:
            self.push(LATENCY_S, me, DialFailed(where, Reason.UNREACHABLE))
        elif pair not in self.links:
            link = self.links[pair] = Link(me, peer)
            self.push(LATENCY_S, me, LinkUp(peer, True, where), link)
            self.push(LATENCY_S, peer, LinkUp(me, False, ""), link)

    def _cut(self, pair: frozenset[PeerId], first: PeerId, reason: Reason) -> None:
        link = self.links.pop(pair, None)
        if link is not None:
            (other,) = pair - {first}
            self.push(LATENCY_S, first, LinkDown(other, reason), link)
            self.push(2 * LATENCY_S, other, LinkDown(first, Reason.LINK), link)

    def perform(self, node: Node, effect: Effect) -> None:
        """What a node's shell would do."""
        me = node.peer
        match effect:
            case Dial(where):
                self._dial(me, where)
            case Disconnect(peer, reason):
                self._cut(_pair(me, peer), me, reason)
            case Send(peer, message):
                node.sent[str(type(message).__struct_config__.tag)] += 1
                (read,) = link_decoder().feed(encode(message))
                changed = self.tamper(me, peer, read)
                link = self.links.get(_pair(me, peer))
                if link is not None and changed is not None and peer not in self.silent:
                    self.push(LATENCY_S, peer, Received(me, changed), link)
            case SetTimer(timer, after_s):
                self.push(after_s, me, TimerFired(timer))
            case Fetch(token, peer, _, others):
                node.fetches.append((peer, *others))
                self._fetches[me, node.life, token] = effect
                self.push(FETCH_S, me, Fetched(token))
            case KeepEntries():
                node.store.keep(effect)
            case Recall():
                self.push(LATENCY_S, me, node.store.recall(effect))
            case Emit(ContentHeld() | ContentMissing() as record):
                node.records.append(record)
            case Emit(Trouble(_, detail)):
                node.troubles.append(detail)
            case Penalise(peer, reason):
                node.penalties.append((peer, reason))
            case _:
                pass

    # --- what tests do and ask --------------------------------------------------------------------------
    def publish(self, name: str, *entries: Entry, feed: Feed = Feed.CLICKS) -> None:
        self.happen(name, Publish(feed, entries))

    def hold(self, name: str, *digests: bytes, truly: bool = True) -> None:
        """It says that it holds these, and does unless it lies."""
        if truly:
            self[name].blobs.update(map(Digest, digests))
        self.happen(name, Hold(tuple(map(Digest, digests))))

    def get(self, name: str, digest: bytes, *hints: str, likely: Sequence[str] = ()) -> None:
        ref = ContentRef(digest, 1_000)
        self.happen(name, Get(ref, tuple(map(PeerId, hints)), tuple(map(PeerId, likely))))

    def live(self, num_deeds: int) -> None:
        """Nodes say things, take them back, crash and come back; in the end all are up."""
        everybody = list(self.nodes.values())
        for _ in range(num_deeds):
            node = self.rng.choice(everybody)
            deed = self.rng.choices(["click", "share", "begin anew", "crash"], weights=[5, 3, 1, 1])[0]
            feed = Feed.CATALOGUE if deed == "share" else Feed.CLICKS
            if node.core is None:
                self.start(node)
            elif deed == "crash":
                self.crash(node)
            elif deed == "begin anew":
                self.happen(node.peer, BeginAnew(self.rng.choice(list(Feed))))
            else:
                number = self.rng.randrange(1_000)
                said = shared(number) if feed is Feed.CATALOGUE else click(number)
                self.publish(node.peer, said, replace(said, item=bytes(32)), feed=feed)
            self.run(self.rng.uniform(0, 3))
        for node in everybody:
            if node.core is None:
                self.start(node)

    def up(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.core is not None]

    def all_equal(self, feed: Feed = Feed.CLICKS) -> bool:
        """Whether all that are up have every feed as far."""
        first, *others = [node.feeds(feed).heads() for node in self.up()]
        return all(heads == first for heads in others)

    def check(self) -> None:
        """Each node's disk has what its core believes that it has."""
        for node in self.up():
            for feed, heads in node.store.heads():
                kept = {head.author: head for head in heads}
                assert set(kept) == set(node.heads(feed)), f"seed {self.seed}, {node.peer}: other authors"
                for author, head in node.heads(feed).items():
                    mine = kept[author]
                    assert (head.epoch, head.void) == (mine.epoch, mine.void), (
                        f"seed {self.seed}, {node.peer}"
                    )
                    if not head.void:
                        assert (head.last, head.chain) == (mine.last, mine.chain), (
                            f"seed {self.seed}, {node.peer}"
                        )

    def answers(self, me: str, to: str) -> list[Entries]:
        """What one has answered another with, part by part."""
        return [
            effect.message
            for _, peer, effect in self.log
            if peer == me
            and isinstance(effect, Send)
            and effect.peer == to
            and isinstance(effect.message, Entries)
        ]


def _pair(a: str, b: str) -> frozenset[PeerId]:
    return frozenset((PeerId(a), PeerId(b)))


def _reaches(link: Link, me: PeerId, event: Event) -> bool:
    """Whether an event on a link means something to this end now."""
    if isinstance(event, LinkUp):
        link.up.add(me)
        return True
    was_up = me in link.up
    if isinstance(event, LinkDown):
        link.up.discard(me)
    return was_up
