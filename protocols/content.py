"""Shared content: what peers say of it spreads by being asked for, and whoever holds it is found by asking.

Pull only: every now and then a node asks one random peer for what it lacks of two feeds, the catalogue and the clicks,
its own and those it has heard from others (G-Rank, arXiv 2301.12530, section 3). Nothing is taken that was not asked for.
Getting content is asking who holds it, and pulling it from several of those at once.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta, Struct

from protocols.budget import Budget
from protocols.entries import Batch, Feed, Head
from protocols.errors import PeerError
from protocols.events import (
    BeginAnew,
    ContentHeld,
    ContentMissing,
    Drop,
    Emit,
    Fetch,
    Fetched,
    FetchFailed,
    Get,
    HeadsRead,
    Hold,
    KeepEntries,
    PeerDown,
    Penalise,
    Publish,
    Reached,
    Recall,
    Recalled,
    Received,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
    Trouble,
    Unreachable,
)
from protocols.feeds import DAY_S, FeedLimits, FeedSet, Taken, batch_bytes, begins_with
from protocols.machine import Handler, Machine, Output
from protocols.messages import Ask, Entries, Found, Seek
from protocols.signing import Signatures
from protocols.timers import Timers
from protocols.view import View
from protocols.vocabulary import (
    HOSTILE,
    MAX_AUTHOR_BITS,
    MAX_BATCH_BYTES,
    MAX_BATCHES_PER_MESSAGE,
    MAX_ENTRIES_PER_ANSWER,
    MAX_ENTRIES_PER_BATCH,
    MAX_MARKS_PER_MESSAGE,
    ContentRef,
    Digest,
    PeerId,
    Reason,
)

FIRST_TOKEN = 2**40
"""Fetches of models have tokens of their own, from 1; the two must not meet."""
ANSWER_S = 20.0
"""An answer that takes longer is not waited for."""
FIRST_PULL_S = 2.0
"""After the start: links come first."""
FOLLOW_S = 0.6
"""Between two questions in a row: those for both feeds together are fewer than `ASKS_PER_S`."""
MAX_FOLLOWS = 64
"""Questions to one peer in a row, while each brings much: a newcomer does not wait for the timer."""
MIN_ANSWER_BYTES = 64 * 1024
"""A batch fits, whatever the rate."""
MAX_ANSWER_BYTES = 1024 * 1024
REFUSED_S = 600.0
"""After the disk has refused entries nobody is asked for as long: the same would come, and be refused, again and again."""
MAX_PREFIXES = 2**MAX_AUTHOR_BITS
PEER_SHARE = 1 / 16
"""Of the bytes of answers, what one peer may have where others want some too."""
MAX_STRIKES = 3
"""Refusals after which a link is closed."""
ASKS_PER_S = 4.0
SEEKS_PER_S = 20.0
SEEK_S = 5.0
"""Within this a peer has to be dialled and has to say whether it holds something."""
GATHER_S = 0.5
"""After the first that holds it: others may, and are pulled from as well."""
MAX_SEEKERS = 24
"""Peers that are asked for one item at once."""
MAX_SOURCES = 4
MAX_TRIES = 3
BUSY_S = 1.0
"""Wait before others are asked where all who hold an item were busy; it doubles with each try."""
MAX_GETS = 256


class ContentSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How much is kept of what others say, and how often they are asked."""

    pull_s: Annotated[float, Meta(ge=0.5, le=86_400)] = 30.0
    """Between two questions to a random peer. Less spreads news faster; an idle question costs 40 bytes for each author known."""
    max_authors: Annotated[int, Meta(ge=1, le=1_000_000)] = 20_000
    """Peers whose entries are kept. Where there is no place a new one waits until another has said nothing for a month."""
    max_clicks: Annotated[int, Meta(ge=1, le=100_000_000)] = 2_000_000
    """Clicks kept of all authors. One takes some 150 bytes on the disk, and 2 kB where its author means ill."""
    max_items: Annotated[int, Meta(ge=1, le=100_000_000)] = 200_000
    """The same for what all authors share and withdraw. An item takes some 1 kB on the disk, and 10 kB where its author means ill."""
    max_clicks_per_author: Annotated[int, Meta(ge=1, le=1_000_000)] = 2_000
    """The newest are kept. Fewer blunt whoever clicks without end, and forget what people liked long ago."""
    max_items_per_author: Annotated[int, Meta(ge=1, le=1_000_000)] = 5_000
    """The same for what an author shares and withdraws."""
    entries_per_answer: Annotated[int, Meta(ge=MAX_ENTRIES_PER_BATCH, le=MAX_ENTRIES_PER_ANSWER)] = 2_000
    """Of all authors together, asked or answered."""
    entries_per_author: Annotated[int, Meta(ge=MAX_ENTRIES_PER_BATCH, le=MAX_ENTRIES_PER_ANSWER)] = 256
    """Of one author in one answer, so that one who says much does not crowd out the others."""
    answer_bytes_per_s: Annotated[int, Meta(ge=1_000, le=1_000_000_000)] = 100_000
    """For answers to all peers together; a fast line brings newcomers up to date sooner with more. A node with an upload limit
    takes no more than half of that."""
    expire_days: Annotated[int, Meta(ge=1, le=36_500)] = 180
    """Whoever has said nothing for longer is forgotten. A node renews what it shares itself in time."""


class _Question:
    """Entries that a peer has been asked for."""

    def __init__(self, peer: PeerId, feed: Feed, bits: int, prefix: int, left: int, follows: int) -> None:
        self.peer = peer
        self.feed = feed
        self.bits, self.prefix = bits, prefix
        self.left = left
        """Entries that it may still bring."""
        self.brought = 0
        self.follows = follows


class _Getting:
    """An item on its way: who was asked, who holds it."""

    def __init__(self, ref: ContentRef, hints: tuple[PeerId, ...]) -> None:
        self.ref = ref
        self.hints = hints
        self.asked: dict[PeerId, bool] = {}
        """Who has not answered yet, and whether they have been sent the question."""
        self.num_asked = 0
        self.reached: list[PeerId] = []
        """Peers that the view was asked to reach for this, to be let go."""
        self.holders: dict[PeerId, None] = {}
        self.sources: tuple[PeerId, ...] = ()
        """Holders that it is pulled from."""
        self.liars: set[PeerId] = set()
        self.tries = 0
        self.token = 0
        """Of the question, later of the fetch."""
        self.fetching = False


class Content(Machine):
    """The catalogue, the clicks and the contents of one node."""

    def __init__(
        self,
        settings: ContentSettings,
        view: View,
        rng: random.Random,
        signatures: Signatures,
    ) -> None:
        self._settings = settings
        self._view = view
        self._rng = rng
        limits = {
            Feed.CATALOGUE: (settings.max_items, settings.max_items_per_author),
            Feed.CLICKS: (settings.max_clicks, settings.max_clicks_per_author),
        }
        self.feeds = {
            feed: FeedSet(
                view.network,
                feed,
                signatures,
                FeedLimits(settings.max_authors, most, window, settings.expire_days),
            )
            for feed, (most, window) in limits.items()
        }
        self._signatures = signatures
        self._timers = Timers("content", "content", FIRST_TOKEN)
        self._unix_s = 0.0
        self._pulling: PeerId | None = None
        """Whom the view was asked to reach for a pull."""
        self._num_pulls = 0
        self._refused_until = 0.0
        self._questions: dict[int, _Question] = {}
        self._recalls: dict[int, tuple[PeerId, int, Feed]] = {}
        """Entries that are being brought for a peer: whose question, and which. One for each feed."""
        self._getting: dict[Digest, _Getting] = {}
        self._held: set[Digest] = set()
        self._answers = Budget(settings.answer_bytes_per_s)
        self._answered: dict[PeerId, Budget] = {}
        self._asks: dict[PeerId, Budget] = {}
        self._seeks: dict[PeerId, Budget] = {}
        self._strikes: dict[PeerId, int] = {}
        self._stopping = False
        self.takes_unasked = False
        """Whether entries are taken that nobody asked for. For experiments alone: that spreads faster, and so does what attackers
        say."""

    # --- the operator -----------------------------------------------------------------------------------
    def _on_started(self, now: float, event: Started) -> list[Output]:
        self._unix_s = event.unix_s - now
        self._load(event.heads)
        wait = min(FIRST_PULL_S, self._settings.pull_s)
        return [SetTimer(Timer("content", "pull", 0), wait * self._rng.uniform(0.5, 1.5))]

    def _load(self, heads: Sequence[tuple[Feed, Sequence[Head]]]) -> None:
        for feed, each in heads:
            self.feeds[feed].load(each)

    def _on_heads_read(self, now: float, event: HeadsRead) -> list[Output]:
        self._load(event.heads)
        self._questions = {}
        self._refused_until = now + REFUSED_S
        return []

    def _on_publish(self, now: float, event: Publish) -> list[Output]:
        try:
            batches = self.feeds[event.feed].publish(event.entries, self._unix_s + now)
        except ValueError as error:
            return [Emit(Trouble("content", str(error)))]
        return [KeepEntries(event.feed, tuple(batches))]

    def _on_begin_anew(self, now: float, event: BeginAnew) -> list[Output]:
        unix_s = self._unix_s + now
        batch, cut = self.feeds[event.feed].begin_anew(int(unix_s) // DAY_S, unix_s)
        return [KeepEntries(event.feed, (batch,), (cut,))]

    def _on_hold(self, now: float, event: Hold) -> list[Output]:
        if event.held:
            self._held.update(event.digests)
        else:
            self._held.difference_update(event.digests)
        return []

    def _on_stop(self, now: float, event: StopRequested) -> list[Output]:
        self._stopping = True
        return []

    # --- asking for entries -----------------------------------------------------------------------------
    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        if event.timer.owner != "content":
            return []
        if event.timer.name != "pull":
            return self._timers.fired(now, event)
        again = SetTimer(Timer("content", "pull", 0), self._settings.pull_s * self._rng.uniform(0.75, 1.25))
        return [*self._expire(now), *self._pull(now), again]

    def _expire(self, now: float) -> list[Output]:
        found = ((feed, tuple(feeds.expire(self._unix_s + now))) for feed, feeds in self.feeds.items())
        return [KeepEntries(feed, (), cuts) for feed, cuts in found if cuts]

    def _pull(self, now: float) -> list[Output]:
        """Ask one random known peer, unless the last one still has to be reached or to answer."""
        if self._pulling is not None or self._questions or self._stopping or now < self._refused_until:
            return []
        peers = self._view.reachable()
        if not peers:
            return []
        peer = self._pulling = self._rng.choice(peers)
        self._num_pulls += 1
        return [
            *self._view.reach(now, peer),
            self._timers.set(ANSWER_S, self._give_up_pull, peer, self._num_pulls),
        ]

    def _give_up_pull(self, now: float, peer: PeerId, number: int) -> list[Output]:
        """It was not reached in time."""
        if self._pulling == peer and self._num_pulls == number:
            self._pulling = None
            self._view.let_go(now, peer)
        return []

    def _on_reached(self, now: float, event: Reached) -> list[Output]:
        peer = event.peer
        out: list[Output] = []
        if self._pulling == peer:
            # The link was made for this and stays for a while; an answer is not worth holding it.
            self._pulling = None
            self._view.let_go(now, peer)
            out += [each for feed in Feed for each in self._ask(now, peer, feed, MAX_FOLLOWS)]
        for getting in self._getting.values():
            if getting.asked.get(peer) is False:
                out.append(self._seek(getting, peer))
        return out

    def _on_unreachable(self, now: float, event: Unreachable) -> list[Output]:
        peer = event.peer
        if self._pulling == peer:
            self._pulling = None
            self._view.let_go(now, peer)
        out: list[Output] = []
        for getting in list(self._getting.values()):
            if peer in getting.reached:
                getting.reached.remove(peer)
                self._view.let_go(now, peer)
            if getting.asked.pop(peer, None) is not None and not getting.asked and not getting.fetching:
                out += self._choose(now, getting, getting.token)
        return out

    def _ask(self, now: float, peer: PeerId, feed: Feed, follows: int) -> list[Output]:
        """Tell a peer how far this node is; of ever fewer authors where there are more than a message holds."""
        feeds = self.feeds[feed]
        drawn = self._rng.randrange(MAX_PREFIXES) if len(feeds) > MAX_MARKS_PER_MESSAGE else 0
        bits = feeds.bits_for(drawn, MAX_AUTHOR_BITS, MAX_MARKS_PER_MESSAGE)
        prefix = drawn >> (MAX_AUTHOR_BITS - bits)
        token = self._timers.new_token()
        question = _Question(peer, feed, bits, prefix, self._settings.entries_per_answer, follows)
        self._questions[token] = question
        return [
            Send(peer, Ask(token, feed, bits, prefix, feeds.marks(bits, prefix), question.left)),
            self._timers.set(ANSWER_S, self._give_up, token),
        ]

    def _give_up(self, now: float, token: int) -> list[Output]:
        self._questions.pop(token, None)
        return []

    def _on_entries(self, now: float, event: Received) -> list[Output]:
        peer, message = event.peer, event.message
        assert isinstance(message, Entries)
        if not self._view.is_live(peer):
            return []
        question = self._questions.get(message.token)
        if question is None or question.peer != peer or question.feed is not message.feed:
            if not self.takes_unasked:
                # An honest answer may be late, so the link stays; it is counted and not looked at.
                return [Penalise(peer, Reason.UNASKED, "entries that nobody asked for")]
            question = _Question(peer, message.feed, 0, 0, self._settings.entries_per_answer, 0)
        out = self._take(now, peer, question, message.batches)
        if (
            message.last
            and self._questions.pop(message.token, None) is not None
            # Many authors, one who says much, or long entries: each bounds an answer in its own way.
            and question.brought >= MAX_ENTRIES_PER_BATCH
            and question.follows
        ):
            out.append(self._timers.set(FOLLOW_S, self._follow, question))
        return out

    def _follow(self, now: float, question: _Question) -> list[Output]:
        if self._stopping or now < self._refused_until or not self._view.is_live(question.peer):
            return []
        return self._ask(now, question.peer, question.feed, question.follows - 1)

    def _take(
        self, now: float, peer: PeerId, question: _Question, batches: tuple[Batch, ...]
    ) -> list[Output]:
        feeds = self.feeds[question.feed]
        unix_s = self._unix_s + now
        keeps: list[KeepEntries] = []
        refusals: list[Output] = []
        for batch in batches:
            question.left -= len(batch.entries)
            try:
                bits = question.bits
                if question.left < 0 or (bits and not begins_with(batch.author, bits, question.prefix)):
                    raise PeerError(Reason.UNASKED, "more entries than were asked for")
                taken = feeds.take(batch, unix_s)
            except PeerError as error:
                refusals += self._strike(peer, error.reason, error.detail)
                break
            _add(keeps, question.feed, taken)
            if taken.batch is not None:
                question.brought += len(taken.batch.entries)
            if any(cut.void for cut in taken.cuts):
                refusals += self._tell_void(batch.author, question.feed)
        return [*keeps, *refusals]

    def _tell_void(self, author: bytes, feed: Feed) -> list[Output]:
        """Whoever brings the proof is not the one that it convicts."""
        detail = f"author {author.hex()[:12]} signed two stories"
        out: list[Output] = [Penalise(PeerId(""), Reason.EQUIVOCATION, detail)]
        if author == self._signatures.author:
            what = f"what this node said in its {feed.value} is void: its key is in use elsewhere, or its home is an old copy"
            out.append(Emit(Trouble("content", what)))
        return out

    def _strike(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        """Count a refusal; the third on one link ends it."""
        self._strikes[peer] = self._strikes.get(peer, 0) + 1
        out: list[Output] = [Penalise(peer, reason, detail)]
        if self._strikes[peer] >= MAX_STRIKES and self._view.is_live(peer):
            out += self._view.close(peer, reason, detail)
        return out

    # --- answering --------------------------------------------------------------------------------------
    def _on_ask(self, now: float, event: Received) -> list[Output]:
        peer, message = event.peer, event.message
        assert isinstance(message, Ask)
        if not self._view.is_live(peer):
            return []
        if not self._asks.setdefault(peer, Budget(ASKS_PER_S)).take(now):
            return [Penalise(peer, Reason.FLOOD, f"more than {ASKS_PER_S:.0f} questions a second")]
        if message.prefix >= 2**message.bits:
            return self._strike(peer, Reason.MALFORMED, "a prefix longer than its bits")
        settings = self._settings
        waits = any((to, feed) == (peer, message.feed) for to, _, feed in self._recalls.values())
        if waits or not self._may_answer(now, peer):
            return [Send(peer, Entries(message.token, message.feed, (), True))]  # others have more time
        wants = self.feeds[message.feed].lacking(
            {mark.author: mark for mark in message.marks},
            message.bits,
            message.prefix,
            offset=self._rng.randrange(2**32),
            per_author=settings.entries_per_author,
            max_entries=min(settings.entries_per_answer, message.limit),
        )
        if not wants:
            return [Send(peer, Entries(message.token, message.feed, (), True))]
        token = self._timers.new_token()
        self._recalls[token] = peer, message.token, message.feed
        # Of about a second, since heartbeats wait behind it.
        max_bytes = min(max(settings.answer_bytes_per_s, MIN_ANSWER_BYTES), MAX_ANSWER_BYTES)
        return [Recall(token, message.feed, wants, max_bytes)]

    def _may_answer(self, now: float, peer: PeerId) -> bool:
        """Whoever has had its share gets what others leave."""
        rate = self._settings.answer_bytes_per_s
        share = self._answered.setdefault(peer, Budget(PEER_SHARE * rate))
        return self._answers.left(now) > (0 if share.left(now) > 0 else rate)

    def _on_recalled(self, now: float, event: Recalled) -> list[Output]:
        peer, token, feed = self._recalls.pop(event.token)
        if not self._view.is_live(peer):
            return []
        sizes = [batch_bytes(batch) for batch in event.batches]
        self._answers.spend(now, sum(sizes))
        if (share := self._answered.get(peer)) is not None:
            share.spend(now, sum(sizes))
        return [Send(peer, message) for message in in_messages(token, feed, event.batches, sizes)]

    # --- getting content --------------------------------------------------------------------------------
    def _on_get(self, now: float, event: Get) -> list[Output]:
        digest = Digest(event.ref.digest)
        if digest in self._getting:
            return []
        if digest in self._held:
            return [Emit(ContentHeld(digest, ()))]
        if len(self._getting) >= MAX_GETS:
            return [Emit(ContentMissing(digest, f"{MAX_GETS} items are being got already"))]
        getting = self._getting[digest] = _Getting(event.ref, event.hints)
        likely = [peer for peer in event.likely if self._view.is_live(peer)]
        return self._fetch(getting, likely) if likely else self._look_around(now, getting)

    def _look_around(self, now: float, getting: _Getting) -> list[Output]:
        """Ask those who may hold it: its sharers, the neighbours, and some of all others."""
        getting.tries += 1
        getting.token = self._timers.new_token()
        getting.asked, getting.num_asked, getting.holders, getting.fetching = {}, 0, {}, False
        others = self._view.reachable()
        self._rng.shuffle(others)
        near = self._view.neighbours()
        peers = dict.fromkeys((*getting.hints[: MAX_SEEKERS // 2], *near[: MAX_SEEKERS // 2], *others))
        out: list[Output] = []
        chosen = [peer for peer in peers if peer != self._view.me and peer not in getting.liars]
        for peer in chosen[:MAX_SEEKERS]:
            if self._view.is_live(peer):
                out.append(self._seek(getting, peer))
            else:
                getting.asked[peer] = False
                getting.reached.append(peer)
                out += self._view.reach(now, peer)
        return [*out, self._timers.set(SEEK_S, self._choose, getting, getting.token)]

    def _seek(self, getting: _Getting, peer: PeerId) -> Output:
        getting.asked[peer] = True
        getting.num_asked += 1
        return Send(peer, Seek(getting.token, getting.ref.digest))

    def _on_seek(self, now: float, event: Received) -> list[Output]:
        peer, message = event.peer, event.message
        assert isinstance(message, Seek)
        if not self._view.is_live(peer):
            return []
        if not self._seeks.setdefault(peer, Budget(SEEKS_PER_S)).take(now):
            return [Penalise(peer, Reason.FLOOD, f"more than {SEEKS_PER_S:.0f} items sought a second")]
        return [Send(peer, Found(message.token, Digest(message.digest) in self._held))]

    def _on_found(self, now: float, event: Received) -> list[Output]:
        peer, message = event.peer, event.message
        assert isinstance(message, Found)
        for getting in list(self._getting.values()):
            if getting.token != message.token or getting.fetching or not getting.asked.pop(peer, False):
                continue
            if message.held:
                getting.holders[peer] = None
            if not getting.asked:
                return self._choose(now, getting, getting.token)
            if message.held and len(getting.holders) == 1:
                return [self._timers.set(GATHER_S, self._choose, getting, getting.token)]
        return []

    def _choose(self, now: float, getting: _Getting, token: int) -> list[Output]:
        """Pull from those who hold it, or give up: time to gather, or to answer at all, is over."""
        if (
            getting.token != token
            or getting.fetching
            or self._getting.get(self._name(getting)) is not getting
        ):
            return []
        live = [peer for peer in getting.holders if self._view.is_live(peer)]
        if not live:
            return self._end(now, getting, ContentMissing(self._name(getting), _nobody(getting)))
        return self._fetch(getting, live)

    def _fetch(self, getting: _Getting, holders: Sequence[PeerId]) -> list[Output]:
        getting.sources = tuple(holders[:MAX_SOURCES])
        getting.fetching = True
        getting.token = self._timers.new_token()
        return [Fetch(getting.token, getting.sources[0], getting.ref, getting.sources[1:])]

    @staticmethod
    def _name(getting: _Getting) -> Digest:
        return Digest(getting.ref.digest)

    def _end(self, now: float, getting: _Getting, record: ContentHeld | ContentMissing) -> list[Output]:
        del self._getting[self._name(getting)]
        self._let_go(now, getting)
        return [Emit(record)]

    def _let_go(self, now: float, getting: _Getting) -> None:
        for peer in getting.reached:
            self._view.let_go(now, peer)
        getting.reached = []

    def _by_fetch(self, token: int) -> _Getting | None:
        return next((g for g in self._getting.values() if g.fetching and g.token == token), None)

    def _on_fetched(self, now: float, event: Fetched) -> list[Output]:
        getting = self._by_fetch(event.token)
        if getting is None:
            return []
        digest = self._name(getting)
        self._held.add(digest)
        return self._end(now, getting, ContentHeld(digest, getting.sources))

    def _on_fetch_failed(self, now: float, event: FetchFailed) -> list[Output]:
        """Try others; what came so far is not fetched again."""
        getting = self._by_fetch(event.token)
        if getting is None:
            return []
        out: list[Output] = []
        if event.reason in HOSTILE:
            getting.liars.add(getting.sources[0])
            out += self._strike(getting.sources[0], event.reason, event.detail)
        elif event.reason is Reason.GONE:
            # They said that they held it: let others have their turn.
            getting.liars.update(getting.sources)
        if getting.tries >= MAX_TRIES or self._stopping:
            why = f"{event.reason.value}: {event.detail}" if event.detail else event.reason.value
            return [*out, *self._end(now, getting, ContentMissing(self._name(getting), why))]
        self._let_go(now, getting)
        if event.reason is not Reason.BUSY:
            return [*out, *self._look_around(now, getting)]
        # Who has not answered yet is not waited for any more.
        getting.fetching, getting.token, getting.asked = False, self._timers.new_token(), {}
        return [*out, self._timers.set(BUSY_S * 2**getting.tries, self._again, getting)]

    def _again(self, now: float, getting: _Getting) -> list[Output]:
        is_wanted = self._getting.get(self._name(getting)) is getting and not self._stopping
        return self._look_around(now, getting) if is_wanted else []

    def _on_drop(self, now: float, event: Drop) -> list[Output]:
        """What is on its way comes to its end all the same; nobody waits for it."""
        getting = self._getting.pop(event.digest, None)
        if getting is not None:
            self._let_go(now, getting)
        return []

    # --- links that end ---------------------------------------------------------------------------------
    def _on_peer_down(self, now: float, event: PeerDown) -> list[Output]:
        peer = event.peer
        self._questions = {t: q for t, q in self._questions.items() if q.peer != peer}
        for kept in (self._answered, self._asks, self._seeks, self._strikes):
            kept.pop(peer, None)
        return []

    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        Started: _on_started,
        Publish: _on_publish,
        BeginAnew: _on_begin_anew,
        Hold: _on_hold,
        Get: _on_get,
        Drop: _on_drop,
        TimerFired: _on_timer,
        Reached: _on_reached,
        Unreachable: _on_unreachable,
        PeerDown: _on_peer_down,
        Ask: _on_ask,
        Recalled: _on_recalled,
        HeadsRead: _on_heads_read,
        Entries: _on_entries,
        Seek: _on_seek,
        Found: _on_found,
        Fetched: _on_fetched,
        FetchFailed: _on_fetch_failed,
        StopRequested: _on_stop,
    }


def _nobody(getting: _Getting) -> str:
    """Why an item cannot be had."""
    if getting.num_asked:
        peers = "the one peer" if getting.num_asked == 1 else f"any of {getting.num_asked} peers"
        return f"it is not held by {peers} that could be asked"
    return "whoever held it does not serve it now" if getting.liars else "no peer can be reached"


def _add(keeps: list[KeepEntries], feed: Feed, taken: Taken) -> None:
    """One effect for many batches; but cuts come after what was kept before them."""
    batches = () if taken.batch is None else (taken.batch,)
    if taken.cuts or (batches and not keeps):
        keeps.append(KeepEntries(feed, batches, taken.cuts))
    elif batches:
        last = keeps[-1]
        keeps[-1] = KeepEntries(feed, last.batches + batches, last.cuts)


def in_messages(token: int, feed: Feed, batches: Sequence[Batch], sizes: Sequence[int]) -> list[Entries]:
    """An answer in as few messages as its batches allow. sizes: bytes of each, as it travels."""
    parts: list[list[Batch]] = [[]]
    size = 0
    for batch, more in zip(batches, sizes, strict=True):
        if parts[-1] and (size + more > MAX_BATCH_BYTES or len(parts[-1]) == MAX_BATCHES_PER_MESSAGE):
            parts.append([])
            size = 0
        parts[-1].append(batch)
        size += more
    last = len(parts) - 1
    return [Entries(token, feed, tuple(part), i == last) for i, part in enumerate(parts)]
