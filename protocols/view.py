"""Whom a node is linked with: greeting, liveness, target degree, shuffles, islands, bootstrap.

Decides nothing about models. Other machines ask `live_learners()` and get `PeerUp`/`PeerDown` for links that are kept;
who needs a certain peer for a moment asks `reach` and gets `Reached` or `Unreachable`.

Failure detection is SWIM's (Das, Gupta, Motivala 2002) on links: a neighbour that is silent is asked itself and through
others, then suspected aloud, which it can deny by raising its incarnation, and only then given up. What it costs a node
depends on its number of links alone. A link is only ever cut by a node's own evidence: what others say of a peer makes
nobody dial it first, and no more.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Annotated, ClassVar, get_args

from msgspec import Meta, Struct
from msgspec.structs import replace

from protocols.address_book import AddressBook, Entry
from protocols.admission import AdmissionPolicy, refusal
from protocols.events import (
    Dial,
    DialFailed,
    Disconnect,
    Discovered,
    Emit,
    KeepPeer,
    LinkChanged,
    LinkDown,
    LinkUp,
    PeerDown,
    PeerUp,
    Penalise,
    Reached,
    Received,
    RecordHeard,
    Rejected,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
    Unreachable,
)
from protocols.machine import Handler, Machine, Output
from protocols.messages import (
    Bye,
    Heartbeat,
    Hello,
    LinkMessage,
    Offer,
    Peers,
    Ping,
    Pong,
    Probe,
    Probed,
    Refuse,
    Shuffle,
    Suspects,
    Suspicion,
)
from protocols.signing import Signatures, is_genuine, is_newer, sign_record
from protocols.vocabulary import (
    HOSTILE,
    MAX_ADDRESSES,
    MAX_INCARNATION,
    MAX_PEERS_PER_MESSAGE,
    PROTOCOL_VERSION,
    PeerId,
    PeerRecord,
    Reason,
    one_line,
    peer_of,
)

NO_LEARNING = "none"
"""The learning protocol of a node that only helps others find each other."""


class ViewSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How a node keeps company. Times in seconds."""

    bootstrap: tuple[str, ...] = ()
    """Multiaddrs ending in /p2p/<peer id>. Tried for ever, with back-off, while links are missing."""
    target_degree: Annotated[int, Meta(ge=0, le=64)] = 6
    """Links to keep; of more than half as many again it ends some. 4 to 8 mixes a network well; each link costs one heartbeat
    per period."""
    max_degree: Annotated[int, Meta(ge=1, le=256)] = 24
    """Links to accept. Leave room above the target, or newcomers find no door."""
    max_brief: Annotated[int, Meta(ge=1, le=256)] = 64
    """Links to accept beside those, from peers that come for a single purpose and leave again."""
    static: bool = False
    """Keep links to every bootstrap address and look for nobody else: a topology drawn by hand."""
    heartbeat_s: Annotated[float, Meta(gt=0, le=600)] = 5.0
    dead_after_s: Annotated[float, Meta(gt=0, le=3600)] = 20.0
    """Silence after which a link is closed; a few heartbeats, so that one lost beat kills nobody. After half of it the
    neighbour is asked whether it is there, and so are others."""
    greeting_s: Annotated[float, Meta(gt=0, le=600)] = 10.0
    redial_base_s: Annotated[float, Meta(gt=0, le=600)] = 1.0
    redial_max_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait between two dials of one peer: a network whose bootstrap returns is joined within it."""
    max_known: Annotated[int, Meta(ge=8, le=100_000)] = 256
    """Peers to remember: the node's view of the network, which is larger than its links and smaller than a large network."""
    shuffle_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Time between two exchanges of known peers with a neighbour, which keep the views fresh and mixed."""
    rotate_s: Annotated[float, Meta(ge=0, le=86400)] = 300.0
    """Time after which one link gives way to one with another known peer, so that islands that touch grow together; 0 never."""
    rejoin_s: Annotated[float, Meta(ge=0, le=86400)] = 60.0
    """Time between two looks at a lost or a bootstrap peer while links suffice, which joins islands that do not touch. The
    more peers a node knows, the more often it leaves them to others, so that bootstrap peers are not stormed; 0 never looks."""
    helpers: Annotated[int, Meta(ge=0, le=16)] = 3
    """Neighbours that are asked to reach a silent one before it is given up."""
    brief_s: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    """A link that this node dialled for a single purpose is closed when it has served none for so long."""


class _Link:
    """A link that stands. Greeted once the other side's hello was accepted."""

    __slots__ = (
        "active",
        "asked_at",
        "brief",
        "closing",
        "heard_at",
        "hello",
        "learns",
        "outbound",
        "probed",
        "round",
        "since",
        "told",
        "used_at",
        "vouched",
    )

    def __init__(self, now: float, outbound: bool, brief: bool) -> None:
        self.since = now
        self.heard_at = now
        self.used_at = now
        self.outbound = outbound
        self.brief = brief
        """Not kept, and so no neighbour: whoever dialled it came for a single purpose."""
        self.hello: Hello | None = None
        self.learns = False
        """Whether its hello says that it learns at all; `active`, whether it still does."""
        self.active = True
        self.closing = False
        self.told = False
        """Whether its end is in the log already, with the peer's own reason."""
        """Refused or said goodbye: what still comes in until the link is down means nothing."""
        self.round = 0
        self.probed = False
        """Others have been asked to reach it since it was last heard."""
        self.vouched = False
        """And one of them can."""
        self.asked_at = 0.0
        """When it was last asked for something that it answers at once."""


class _Quest:
    """Somebody who asked us to reach a peer, and waits for the answer."""

    __slots__ = ("asker", "token")

    def __init__(self, asker: PeerId, token: int) -> None:
        self.asker = asker
        self.token = token


class PeerStatus(Struct, frozen=True):
    """One known peer, for the operator."""

    peer: str
    state: str
    """`live`, `brief`, `greeting`, `closing`, `dialling`, `known`, `suspected` or `left`."""
    addresses: tuple[str, ...]
    bootstrap: bool
    round: int
    failures: int
    last_reason: str
    latency_ms: float | None = None
    """Round trip of the last answer that was waited for; None where there was none."""


class View(Machine):
    """The peer view of one node. Pure: `rng` and every `now` come from outside."""

    def __init__(
        self,
        settings: ViewSettings,
        me: PeerId,
        hello: Hello,
        rng: random.Random,
        signatures: Signatures,
        policy: AdmissionPolicy = AdmissionPolicy(),  # noqa: B008 - frozen
    ) -> None:
        self._settings = settings
        self._me = me
        self._rng = rng
        self._signatures = signatures
        # Somebody may link up before this node is told that it runs.
        self._hello = replace(hello, record=sign_record(hello.network, hello.record, signatures))
        self._policy = policy
        self._book = AddressBook(me, settings.bootstrap, settings.max_known)
        self._links: dict[PeerId, _Link] = {}
        self._wanted: dict[PeerId, int] = {}
        """Whom machines want to reach, and how many times over."""
        self._quests: dict[PeerId, list[_Quest]] = {}
        self._awaited: dict[int, PeerId] = {}
        """Whom a probe of ours is about, by its token."""
        self._news: deque[PeerRecord | Suspicion] = deque(maxlen=MAX_NEWS)
        self._redial_token = 0
        self._redial_at = inf
        self._token = 0
        self._shuffle_at = inf
        self._rotate_at = inf
        self._rejoin_at = inf
        self._rotating: PeerId | None = None
        self._denied_at = -inf
        self._beat_by = inf
        self._epoch_s = inf  # until the clock is known every invitation that may expire has expired
        """The wall clock's time at `now` 0."""
        self._stopping = False
        self.round = 0
        self.active = True

    # --- what others ask --------------------------------------------------------------------------------
    @property
    def me(self) -> PeerId:
        return self._me

    @property
    def network(self) -> str:
        """Its name."""
        return self._hello.network

    @property
    def record(self) -> PeerRecord:
        """What this node says of itself."""
        return self._hello.record

    def live_learners(self) -> list[PeerId]:
        """Greeted neighbours that are still learning, in order of linking."""
        return [
            peer
            for peer, link in self._links.items()
            if link.active and link.learns and not link.closing and not link.brief
        ]

    def learners(self) -> list[PeerId]:
        """Neighbours with whom models can be exchanged, whether they still learn or not."""
        return [
            peer for peer, link in self._links.items() if link.learns and not link.closing and not link.brief
        ]

    def some_learners(self, expected: float) -> list[PeerId]:
        """So many of `live_learners()`, drawn; all of them where `expected` is 0 or there are no more.

        Of a fraction what stands behind the point is the chance of one more (arXiv 2507.06542).
        """
        peers = self.live_learners()
        if not 0 < expected < len(peers):
            return peers
        count = int(expected)
        if count != expected:
            count += self._rng.random() < expected - count
        return [self._rng.choice(peers)] if count == 1 else self._rng.sample(peers, count)

    def neighbours(self) -> list[PeerId]:
        """Greeted peers on links that are kept, in order of linking."""
        return [peer for peer in self._links if self.is_neighbour(peer)]

    def some_neighbours(self, count: int) -> list[PeerId]:
        """So many neighbours, drawn, or all there are."""
        peers = self.neighbours()
        return peers if len(peers) <= count else self._rng.sample(peers, count)

    def is_gone(self, peer: PeerId) -> bool:
        """Whether it has left or is suspected."""
        entry = self._book.get(peer)
        return entry is not None and entry.gone

    def ping(self, peer: PeerId, token: int) -> Output:
        """Ask a linked peer whether it is there. Its `Pong` has the same token."""
        return Send(peer, Ping(token))

    def is_live(self, peer: PeerId) -> bool:
        """Whether it has greeted, and neither side has said that the link ends. A brief link counts."""
        link = self._links.get(peer)
        return link is not None and link.hello is not None and not link.closing

    def is_neighbour(self, peer: PeerId) -> bool:
        """Whether it is live, on a link that is kept."""
        return self.is_live(peer) and not self._links[peer].brief

    def learns(self, peer: PeerId) -> bool:
        """Whether a model can be exchanged with this peer at all."""
        link = self._links.get(peer)
        return link is not None and link.learns and not link.closing

    def round_of(self, peer: PeerId) -> int:
        """The round that a linked peer was in when it last spoke of one; 0 where it has not, or there is no link."""
        link = self._links.get(peer)
        return link.round if link else 0

    def num_live(self) -> int:
        """How many neighbours there are."""
        return len(self.neighbours())

    def num_known(self) -> int:
        return len(self._book)

    def known_records(self) -> list[PeerRecord]:
        """All that known peers have signed last."""
        return [entry.record for _, entry in self._book.items() if entry.record is not None]

    def reachable(self) -> list[PeerId]:
        """Peers that `reach` may find: the neighbours, and all others that are known, can be dialled and are not gone."""
        near = dict.fromkeys(self.neighbours())
        others = self._book.items()
        return [
            *near,
            *(peer for peer, entry in others if entry.addresses and peer not in near and not entry.gone),
        ]

    def status(self) -> list[PeerStatus]:
        """Every known or linked peer."""
        rows = []
        for peer in dict.fromkeys((*self._book, *self._links)):
            entry, link = self._book.get(peer) or Entry(()), self._links.get(peer)
            rows.append(
                PeerStatus(
                    peer=peer,
                    state=_state(entry, link),
                    addresses=entry.addresses,
                    bootstrap=entry.bootstrap,
                    round=link.round if link else 0,
                    failures=entry.failures,
                    last_reason=entry.last_reason,
                    latency_ms=None if entry.rtt_s is None else round(entry.rtt_s * 1e3, 1),
                )
            )
        return rows

    # --- reaching a certain peer ------------------------------------------------------------------------
    def reach(self, now: float, peer: PeerId, addresses: tuple[str, ...] = ()) -> list[Output]:
        """See to it that there is a link to this peer, until `let_go` is called as often as this.

        Answered by `Reached` or `Unreachable`, at once where the link stands; `Unreachable` also comes when it ends later.
        addresses: where it can be dialled, of a peer that the view need not know.
        """
        self._wanted[peer] = self._wanted.get(peer, 0) + 1
        if self.is_live(peer):
            self._links[peer].used_at = now
            return [Reached(peer)]
        if peer in self._links:
            return []  # its hello is on the way, or its link is about to end
        entry = self._entry(peer, addresses)
        if entry is None or not entry.addresses or self._stopping:
            return [Unreachable(peer, Reason.UNREACHABLE)]
        return [] if entry.dialling else [self._dial(entry, self._is_brief(entry))]

    def _is_brief(self, entry: Entry) -> bool:
        """Whether a link to this peer would be one too many to keep."""
        return not entry.bootstrap if self._settings.static else self._num_missing() <= 0

    def let_go(self, now: float, peer: PeerId) -> None:
        """The caller of `reach` needs the peer no longer. A link dialled for it is closed after a while."""
        left = self._wanted.get(peer, 0) - 1
        assert left >= 0, "a peer was let go more often than it was reached for"
        if left:
            self._wanted[peer] = left
        else:
            del self._wanted[peer]
        if link := self._links.get(peer):
            link.used_at = now

    def _entry(self, peer: PeerId, addresses: tuple[str, ...]) -> Entry | None:
        for address in addresses:
            if peer_of(address) == peer:
                self._book.learn(address, keep=self._links)
        return self._book.get(peer)

    def _dial(self, entry: Entry, brief: bool) -> Output:
        entry.dialling, entry.brief = True, brief
        return Dial(entry.addresses[0])

    # --- events -----------------------------------------------------------------------------------------
    def _on_stop(self, now: float, event: StopRequested) -> list[Output]:
        self._stopping = True
        # Signed, so that it can be passed on: nobody else can say it.
        self._say(left=True)
        leave = Peers((self.record,))
        out: list[Output] = []
        for peer, link in self._links.items():
            if link.hello and not link.closing:
                out.append(Send(peer, leave))
            out += [Send(peer, Bye()), Disconnect(peer, Reason.LEAVING)]
        return out

    def _say(
        self, *, left: bool = False, addresses: tuple[str, ...] | None = None, at_least: int = 0
    ) -> None:
        """Sign a new record of this node, which counts more than any before."""
        now = self._hello.record
        record = PeerRecord(
            peer=self._me,
            addresses=now.addresses if addresses is None else addresses,
            incarnation=min(max(now.incarnation + 1, at_least), MAX_INCARNATION),
            left=left,
            round=self.round,
        )
        self._hello = replace(self._hello, record=sign_record(self.network, record, self._signatures))

    def refresh(self) -> PeerRecord:
        """Sign anew with the round that the node is in, which is a sign of life."""
        record = replace(self._hello.record, round=self.round)
        self._hello = replace(self._hello, record=sign_record(self.network, record, self._signatures))
        return self._hello.record

    def close(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        """End the link with a peer, and tell it why. What still comes from it means nothing."""
        self._links[peer].closing = True
        return [Send(peer, Refuse(reason, one_line(detail))), Disconnect(peer, reason)]

    def turn_away(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        """End the link with a peer that does not fit, and remember why for the operator."""
        if entry := self._book.get(peer):
            entry.last_reason = f"{reason.value}: {detail}"
        return self._refuse(peer, reason, detail)

    def heartbeat(self) -> list[Output]:
        """Tell every peer that we are linked with where we stand, now rather than at the next beat."""
        beat = Heartbeat(self.round, self.active)
        return [Send(peer, beat) for peer, link in self._links.items() if link.hello and not link.closing]

    def _on_started(self, now: float, event: Started) -> list[Output]:
        settings = self._settings
        self._epoch_s = event.unix_s - now
        self._say(addresses=event.addresses[:MAX_ADDRESSES], at_least=int(event.unix_s))
        if not settings.static:
            for record in event.peers:
                for address in record.addresses:
                    self._book.learn(address)
        # Drawn phases keep a thousand nodes that start together from beating together.
        self._shuffle_at = now + settings.shuffle_s * self._rng.random()
        self._rotate_at = now + self._spread(settings.rotate_s)
        self._rejoin_at = now + self._spread(settings.rejoin_s)
        phase = settings.heartbeat_s * (0.5 + self._rng.random() / 2)
        return [SetTimer(Timer("view", "beat", 0), phase), *self._maintain(now)]

    def _spread(self, period_s: float) -> float:
        """About a period, drawn; infinite where there is none."""
        return period_s * (0.5 + self._rng.random()) if period_s else inf

    def _on_discovered(self, now: float, event: Discovered) -> list[Output]:
        if self._settings.static:
            return []
        for address in event.addresses[:MAX_PEERS_PER_MESSAGE]:
            if self._book.get(peer_of(address) or self._me) is None:
                # Nobody here has told of it: it may be on an island of its own.
                self._rejoin_at = min(self._rejoin_at, now)
            self._book.learn(address, keep=self._links)
        return self._maintain(now)

    def _on_link_up(self, now: float, event: LinkUp) -> list[Output]:
        peer = event.peer
        brief = False
        if entry := self._book.get(peer):
            brief = event.outbound and entry.dialling and entry.brief
            entry.dialling = False
        self._links[peer] = _Link(now, event.outbound, brief)
        return [Send(peer, replace(self._hello, brief=brief))]

    def _on_link_down(self, now: float, event: LinkDown) -> list[Output]:
        peer, reason, detail = event.peer, event.reason, event.detail
        link = self._links.pop(peer, None)
        out: list[Output] = []
        if entry := self._book.get(peer):
            entry.dialling = False
            if reason is not Reason.DUPLICATE:
                # One that greets and goes, again and again, is waited for longer each time.
                lasted = link is None or now - link.since > self._settings.redial_max_s
                entry.short_lived = 0 if lasted else entry.short_lived + 1
                entry.last_reason = (
                    f"{reason.value}: {detail}" if detail else entry.last_reason or reason.value
                )
                self._back_off(now, entry, reason)
        if link and link.hello and not link.brief:
            if not link.told:
                out.append(
                    Emit(LinkChanged(peer=peer, up=False, reason=reason.value, num_live=self.num_live()))
                )
            out.append(PeerDown(peer, reason))
        if reason is not Reason.DUPLICATE:
            out += self._lost(now, peer, reason)
        return out + self._maintain(now)

    def _on_dial_failed(self, now: float, event: DialFailed) -> list[Output]:
        reason, detail = event.reason, event.detail
        peer = peer_of(event.address) or PeerId("")
        out: list[Output] = []
        if entry := self._book.get(peer):
            entry.dialling = False
            entry.last_reason = f"{reason.value}: {detail}" if detail else reason.value
            # Next time another of its addresses.
            entry.addresses = (*entry.addresses[1:], *entry.addresses[:1])
            self._back_off(now, entry, reason)
            if entry.met and entry.failures == FAILURES_TO_SUSPECT and peer not in self._links:
                out += self._suspect(peer, entry)
        # It may have linked up with us meanwhile.
        if peer not in self._links:
            out += self._lost(now, peer, reason)
        return out + self._maintain(now)

    def _lost(self, now: float, peer: PeerId, reason: Reason) -> list[Output]:
        """A peer cannot be reached: tell whoever in here or elsewhere wanted it to be."""
        out: list[Output] = [
            Send(quest.asker, Probed(quest.token, False))
            for quest in self._quests.pop(peer, [])
            if self.is_live(quest.asker)
        ]
        if peer == self._rotating:
            self._rotating = None
        if peer not in self._wanted:
            return out
        entry = self._book.get(peer)
        if entry is not None and self._is_free(peer, entry) and not self._stopping:
            # An idle link that ended as it was wanted again, or no room for a link that is kept.
            had_bad_luck = reason is Reason.SURPLUS or (reason is Reason.FULL and not entry.brief)
            if had_bad_luck:
                return [*out, self._dial(entry, brief=True)]
        return [*out, Unreachable(peer, reason)]

    def _on_rejected(self, now: float, event: Rejected) -> list[Output]:
        peer, reason, detail = event.peer, event.reason, event.detail
        out: list[Output] = [Penalise(peer, reason, detail)]
        if peer in self._links and not self._links[peer].closing:
            out += self.close(peer, reason, detail)
        return out

    # --- the beat ---------------------------------------------------------------------------------------
    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        timer = event.timer
        if timer.owner != "view" or self._stopping:
            return []
        if timer.name == "beat":
            if now > self._beat_by:
                # This process stood still, and what neighbours said meanwhile waits to be read.
                for link in self._links.values():
                    link.heard_at = now
            self._beat_by = now + STANDSTILL * self._settings.heartbeat_s
            return [
                SetTimer(Timer("view", "beat", 0), self._settings.heartbeat_s),
                *self.heartbeat(),
                *self._look_at_links(now),
                *self._spread_news(),
                *self._keep_mixed(now),
            ]
        if timer.token != self._redial_token:
            return []
        self._redial_at = inf
        return self._maintain(now)

    def _look_at_links(self, now: float) -> list[Output]:
        out: list[Output] = []
        settings = self._settings
        for peer, link in list(self._links.items()):
            if link.closing:
                continue
            silent_s = now - link.heard_at
            if link.hello is None and now - link.since > settings.greeting_s:
                out += [Penalise(peer, Reason.GREETING, "no hello"), Disconnect(peer, Reason.GREETING)]
            elif silent_s > settings.dead_after_s:
                link.closing = True
                out.append(Disconnect(peer, Reason.SILENT))
                # Where another reaches it, it is the link that is broken, and a new one may do better.
                if (entry := self._book.get(peer)) and not link.vouched:
                    out += self._suspect(peer, entry)
            elif silent_s > settings.dead_after_s / 2 and link.hello and not link.probed:
                link.probed = True
                out += self._ask_about(now, peer, link)
            elif self._is_spent(now, peer, link):
                out += self.close(peer, Reason.SURPLUS, "it has served its purpose")
        return out

    def _is_spent(self, now: float, peer: PeerId, link: _Link) -> bool:
        """Whoever has dialled a brief link ends it; who does not is not put up with for ever."""
        brief_s = self._settings.brief_s
        is_idle = now - link.used_at > brief_s * (1 if link.outbound else PUT_UP_WITH)
        is_old = not link.outbound and now - link.since > brief_s * PUT_UP_WITH**2
        return link.brief and (is_idle or is_old) and peer not in self._wanted

    def _ask_about(self, now: float, peer: PeerId, link: _Link) -> list[Output]:
        """SWIM's probe and indirect probes of a neighbour that is silent."""
        link.asked_at = now
        self._token += 1
        out: list[Output] = [Send(peer, Ping(self._token))]
        helpers = [helper for helper in self.neighbours() if helper != peer]
        for helper in self._rng.sample(helpers, min(self._settings.helpers, len(helpers))):
            self._await(peer)
            out.append(Send(helper, Probe(self._token, peer)))
        return out

    def _await(self, peer: PeerId) -> None:
        self._token += 1
        self._awaited[self._token] = peer
        while len(self._awaited) > MAX_AWAITED:
            del self._awaited[next(iter(self._awaited))]

    def _suspect(self, peer: PeerId, entry: Entry) -> list[Output]:
        """From own evidence: it is told to all neighbours, so that the peer hears of it if it is there."""
        if entry.suspected or entry.record is None:
            return []
        entry.suspected, entry.doubted = True, entry.incarnation
        self._tell(Suspicion(peer, entry.incarnation))
        return []

    def _tell(self, item: PeerRecord | Suspicion) -> None:
        if item not in self._news:
            self._news.append(item)

    def _spread_news(self) -> list[Output]:
        """What is new, to every neighbour, once: each of them passes on what is new to it."""
        if not self._news or not self.num_live():
            return []  # kept until somebody is there to hear it
        news = [self._news.popleft() for _ in range(min(len(self._news), MAX_PEERS_PER_MESSAGE))]
        records = tuple(item for item in news if isinstance(item, PeerRecord))
        suspicions = tuple(item for item in news if isinstance(item, Suspicion))
        messages: list[LinkMessage] = [Peers(records)] if records else []
        messages += [Suspects(suspicions)] if suspicions else []
        return [Send(peer, message) for peer in self.neighbours() for message in messages]

    def _keep_mixed(self, now: float) -> list[Output]:
        """Shuffles, and now and then another link, and a look at who was lost."""
        settings = self._settings
        if settings.static:
            return []
        out: list[Output] = []
        if now >= self._shuffle_at:
            self._shuffle_at = now + self._spread(settings.shuffle_s)
            neighbours = self.neighbours()
            if neighbours:
                out += self._shuffle(now, self._rng.choice(neighbours))
            out += self._thin_out()
        if now >= self._rotate_at:
            self._rotate_at = now + self._spread(settings.rotate_s)
            out += self._rotate(now)
        if now >= self._rejoin_at:
            self._rejoin_at = now + self._spread(settings.rejoin_s)
            out += self._rejoin(now)
        return out

    def _shuffle(self, now: float, peer: PeerId) -> list[Output]:
        self._links[peer].asked_at = now
        own = () if self._stopping or not self.record.addresses else (self.record,)
        others = self._book.sample(self._rng, SHUFFLED - len(own), (peer,))
        return [Send(peer, Shuffle((*own, *others)))]

    def _thin_out(self) -> list[Output]:
        """End the oldest link where others have linked up in such numbers that they are half as many again as wanted: what
        a node pays must not depend on how its network came together."""
        target = self._settings.target_degree
        if not target or self.num_live() <= target + max(target // 2, SLACK):
            return []
        spare = [
            peer
            for peer, link in self._links.items()
            # Whom this node has chosen itself no crowd of newcomers takes the place of.
            if self.is_neighbour(peer) and not link.outbound and peer not in self._wanted
        ]
        return self.close(spare[0], Reason.SURPLUS, "it makes room for newcomers") if spare else []

    def _rotate(self, now: float) -> list[Output]:
        """Dial one more peer; when it has greeted, an older link makes room (Cyclon's exchange of neighbours)."""
        if self._num_missing() > 0 or self._rotating is not None:
            return []
        free = [
            (peer, entry)
            for peer, entry in self._book.items()
            if self._is_free(peer, entry) and entry.next_dial_at <= now and not entry.gone
        ]
        if not free:
            return []
        # Who was never met, and heard of last, may be of a part of the network from which nobody here is.
        strangers = [pair for pair in free if not pair[1].met][-SHUFFLED:]
        return [self._swap(*self._rng.choice(strangers or free))]

    def _swap(self, peer: PeerId, entry: Entry) -> Output:
        self._rotating = peer
        return self._dial(entry, brief=False)

    def _make_room(self, now: float) -> list[Output]:
        """After a rotation: end the oldest link that this node has dialled, unless the operator wants it."""
        for peer, link in self._links.items():
            if (
                self.is_neighbour(peer)
                and link.outbound
                and peer != self._rotating
                and peer not in self._wanted
            ):
                if self._num_missing() >= 0:
                    return []
                return self.close(peer, Reason.SURPLUS, "it makes room for another link")
        return []

    def _rejoin(self, now: float) -> list[Output]:
        """Knock at a door of whose other side nothing was heard for a while: behind it may be the rest of the network."""
        if self._num_missing() > 0 or self._rotating is not None:
            return []  # then there is dialling enough
        free = [(peer, entry) for peer, entry in self._book.items() if self._is_free(peer, entry)]
        # Of some only an address is known: the operator, a discovery service or a former life has told of them.
        unheard = [pair for pair in free if pair[1].record is None and not pair[1].failures]
        if not unheard and self._rng.random() * len(self._book) >= LOOKS:
            return []
        lost = unheard or [
            (peer, entry)
            for peer, entry in free
            if (entry.bootstrap or entry.suspected or entry.failures) and not _left(entry)
        ]
        if not lost:
            return []
        peer, entry = self._rng.choice(lost)
        # Everybody has the same bootstrap peers: with them a word is enough.
        return [self._dial(entry, brief=True) if entry.bootstrap else self._swap(peer, entry)]

    def _is_free(self, peer: PeerId, entry: Entry) -> bool:
        return bool(entry.addresses) and not entry.dialling and peer not in self._links

    # --- messages ---------------------------------------------------------------------------------------
    def _on_message(self, now: float, event: Received) -> list[Output]:
        """Whatever it says, it is a sign of life."""
        link = self._links.get(event.peer)
        if link is None or link.closing:
            return []
        link.heard_at = now
        link.probed = link.vouched = False
        kind = type(event.message)
        if link.hello is None and kind is not Hello and kind is not Refuse:
            return self._refuse(event.peer, Reason.GREETING, "the first message on a link must be a hello")
        if kind is not Heartbeat:
            link.used_at = now
        handler = self.MESSAGES.get(kind)
        return handler(self, now, event.peer, link, event.message) if handler else []

    def _on_heartbeat(self, now: float, peer: PeerId, link: _Link, message: Heartbeat) -> list[Output]:
        link.round, link.active = message.round, message.active
        return []

    def _on_offer(self, now: float, peer: PeerId, link: _Link, message: Offer) -> list[Output]:
        # Its beats are far apart; what it offers says sooner where it stands.
        link.round = max(link.round, message.ref.round)
        return []

    def _on_shuffle(self, now: float, peer: PeerId, link: _Link, message: Shuffle) -> list[Output]:
        answer = Send(peer, Peers(self._book.sample(self._rng, SHUFFLED, (peer,))))
        return [answer, *self._take_records(now, peer, message.records)]

    def _on_peers(self, now: float, peer: PeerId, link: _Link, message: Peers) -> list[Output]:
        self._measure(now, peer, link)
        return self._take_records(now, peer, message.records)

    def _on_ping(self, now: float, peer: PeerId, link: _Link, message: Ping) -> list[Output]:
        return [Send(peer, Pong(message.token, self.round))]

    def _on_pong(self, now: float, peer: PeerId, link: _Link, message: Pong) -> list[Output]:
        self._measure(now, peer, link)
        link.round = max(link.round, message.round)
        return []

    def _measure(self, now: float, peer: PeerId, link: _Link) -> None:
        entry = self._book.get(peer)
        if link.asked_at and entry:
            entry.rtt_s, link.asked_at = now - link.asked_at, 0.0

    def _on_probe(self, now: float, peer: PeerId, link: _Link, message: Probe) -> list[Output]:
        """A neighbour has not heard a peer for a while, and asks whether we do."""
        target = PeerId(message.peer)
        other = self._links.get(target)
        if self.is_live(target) and other is not None:
            heard = now - other.heard_at <= 2 * self._settings.heartbeat_s
            return [Send(peer, Probed(message.token, heard))]
        entry = self._book.get(target)
        if entry is None or not entry.addresses or sum(map(len, self._quests.values())) >= MAX_QUESTS:
            return [Send(peer, Probed(message.token, False))]
        self._quests.setdefault(target, []).append(_Quest(peer, message.token))
        # A handshake is the best answer there is: only the holder of its key can complete it.
        return [self._dial(entry, brief=True)] if self._is_free(target, entry) else []

    def _on_probed(self, now: float, peer: PeerId, link: _Link, message: Probed) -> list[Output]:
        """Another reaches it. Its own answer may still come: the link has its full time for that."""
        target = self._awaited.pop(message.token, None)
        link_to_it = self._links.get(target) if target is not None else None
        if link_to_it is not None and link_to_it.probed and message.reached:
            link_to_it.vouched = True
        return []

    def _on_suspects(self, now: float, peer: PeerId, link: _Link, message: Suspects) -> list[Output]:
        out: list[Output] = []
        for suspicion in message.peers:
            if suspicion.peer == self._me:
                out += self._deny(now, peer, suspicion)
                continue
            entry = self._book.get(PeerId(suspicion.peer))
            if entry is None or entry.suspected or suspicion.incarnation < entry.incarnation:
                continue
            if suspicion.incarnation > entry.incarnation or suspicion.incarnation <= entry.doubted:
                continue  # or two that are linked with it would tell each other without end
            entry.doubted = suspicion.incarnation
            # Whoever has a link to it believes that; and passes it on, so that the suspected can deny it.
            entry.suspected = not self.is_live(PeerId(suspicion.peer))
            self._tell(suspicion)
        return out

    def _deny(self, now: float, peer: PeerId, suspicion: Suspicion) -> list[Output]:
        """SWIM's refutation. Once a beat at the most, whatever is said of us."""
        if suspicion.incarnation >= self.record.incarnation:
            if now - self._denied_at < self._settings.heartbeat_s:
                return []
            self._denied_at = now
            # No further than one on: who invents an incarnation of ours must not use them up.
            self._say()
            self._tell(self.record)
        # At once to who said it, whose link may be a brief one.
        return [Send(peer, Peers((self.record,)))]

    def _on_bye(self, now: float, peer: PeerId, link: _Link, message: Bye) -> list[Output]:
        link.active, link.closing = False, True
        return [Disconnect(peer, Reason.LEAVING)]

    def _on_hello(self, now: float, peer: PeerId, link: _Link, theirs: Hello) -> list[Output]:
        if link.hello is not None:
            return self._refuse(peer, Reason.GREETING, "a second hello on one link")
        if problem := mismatch(self._hello, theirs) or self._distrust(now, peer, theirs):
            return self.turn_away(peer, *problem)
        if not link.outbound:
            link.brief = theirs.brief
        if self._is_full(link.brief):
            # A newcomer is turned away with other doors to knock at, and becomes one for those who come after it: peers
            # that have been here for long are as full as this one.
            self._book.take(theirs.record, None, self._links)
            kind, limit = (
                ("brief ", self._settings.max_brief) if link.brief else ("", self._settings.max_degree)
            )
            return [
                Send(peer, Peers(self._book.sample(self._rng, MAX_PEERS_PER_MESSAGE, (peer,)))),
                *self._refuse(peer, Reason.FULL, f"this node keeps at most {limit} {kind}links"),
            ]
        link.hello, link.learns = theirs, _learns(theirs)
        out = self._meet(peer, theirs.record)
        if not link.brief:
            out.append(Send(peer, Heartbeat(self.round, self.active)))
            out.append(Emit(LinkChanged(peer=peer, up=True, reason="", num_live=self.num_live())))
            out.append(PeerUp(peer, theirs))
        errand = link.brief and (peer in self._wanted or peer in self._quests)
        if not self._settings.static and link.outbound and not errand:
            out += self._shuffle(now, peer)
        if peer in self._wanted:
            out.append(Reached(peer))
        for quest in self._quests.pop(peer, []):
            if self.is_live(quest.asker):
                out.append(Send(quest.asker, Probed(quest.token, True)))
        if peer == self._rotating:
            out += self._make_room(now)
            self._rotating = None
        return out

    def _is_full(self, brief: bool) -> bool:
        if brief:
            taken = sum(other.brief and other.hello is not None for other in self._links.values())
            return taken >= self._settings.max_brief
        return self.num_live() >= self._settings.max_degree

    def _distrust(self, now: float, peer: PeerId, theirs: Hello) -> tuple[Reason, str] | None:
        """Why what it says of itself is not believed, or not enough."""
        if theirs.record.peer != peer or not is_genuine(self.network, theirs.record, self._signatures):
            return Reason.FORGED, "its record is not signed by its key for this network"
        unix_s = self._epoch_s + now
        return refusal(self._policy, self.network, peer, theirs.admission, unix_s, self._signatures)

    def _meet(self, peer: PeerId, record: PeerRecord) -> list[Output]:
        """A greeted peer: what it says of itself counts most, and it is worth remembering."""
        before = self._book.get(peer)
        known = before.record if before else None
        self._book.take(record, None, self._links)
        entry = self._book.get(peer)
        out: list[Output] = [RecordHeard(record)]
        if known is not None and is_newer(known, record):
            # It has forgotten a former life of its own: told of it, it goes on from there.
            out.append(Send(peer, Peers((known,))))
        if entry is None:
            return out
        entry.failures, entry.last_reason, entry.met = 0, "", True
        if entry.suspected:
            # Only its own word counts with the others who suspect it.
            out.append(Send(peer, Suspects((Suspicion(peer, entry.incarnation),))))
        if entry.addresses and entry.record is not None:
            out.append(KeepPeer(entry.record))
        return out

    def _take_records(self, now: float, peer: PeerId, records: tuple[PeerRecord, ...]) -> list[Output]:
        """Third parties' records. A false one can only be this neighbour's doing: it never passes on what it has not checked."""
        out: list[Output] = []
        for record in records:
            if record.peer == self._me:
                if record.incarnation > self.record.incarnation or (record.left and not self._stopping):
                    if not is_genuine(self.network, record, self._signatures):
                        return self.turn_away(
                            peer, Reason.FORGED, "it told of this node what it has not signed"
                        )
                    self._outdo(now, record)
                continue
            if not self._book.is_known_newer(record):
                continue
            if not is_genuine(self.network, record, self._signatures):
                return [
                    *out,
                    *self.turn_away(peer, Reason.FORGED, "it told of a peer that has not signed this"),
                ]
            self._believe(record, peer)
            entry = self._book.get(PeerId(record.peer))
            if entry is not None and entry.record == record:  # what one neighbour may bring in has a bound
                out.append(RecordHeard(record))
        return out + self._maintain(now)

    def _outdo(self, now: float, record: PeerRecord) -> None:
        """A word of this node's own from a former life stands above the present one. Once a beat at the most: where two
        machines have the same key, each outdoes the other for ever."""
        if record.incarnation < self.record.incarnation or now - self._denied_at < self._settings.heartbeat_s:
            return
        self._denied_at = now
        self._say(at_least=record.incarnation + 1)
        self._tell(self.record)

    def _believe(self, record: PeerRecord, introducer: PeerId | None) -> None:
        entry = self._book.get(PeerId(record.peer))
        was_there = entry is not None and not entry.gone
        was_suspected = entry is not None and entry.suspected
        # Who was never heard of is no news to others, but who leaves is, and who denies.
        if self._book.take(record, introducer, self._links) and (
            (record.left and was_there) or (was_suspected and not record.left)
        ):
            self._tell(record)

    def _on_refused(self, now: float, peer: PeerId, link: _Link, message: Refuse) -> list[Output]:
        reason, detail = message.reason, message.detail
        link.closing = True
        if reason is Reason.DUPLICATE:
            # Only our own side finds duplicates; a peer's word for it would have us dial again without a wait.
            reason = Reason.LINK
        if reason is Reason.SURPLUS:
            return [Disconnect(peer, reason)]
        if entry := self._book.get(peer):
            entry.last_reason = f"refused by peer, {reason.value}: {detail}"
        link.told = True
        return [
            Emit(
                LinkChanged(
                    peer=peer,
                    up=False,
                    reason=f"refused by peer, {reason.value}: {detail}",
                    num_live=self.num_live(),
                )
            ),
            Disconnect(peer, reason),
        ]

    def _refuse(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        return [Penalise(peer, reason, detail), *self.close(peer, reason, detail)]

    # --- keeping the degree -----------------------------------------------------------------------------
    def _back_off(self, now: float, entry: Entry, reason: Reason) -> None:
        settings = self._settings
        # Another network or schema does not change in a second; a crashed peer may be back in one.
        patient = reason in HOSTILE or reason in _MISFIT
        if reason is not Reason.SURPLUS and reason is not Reason.FULL:  # it is there, and answers
            entry.failures += 1
        tries = max(entry.failures, entry.short_lived)
        wait = settings.redial_max_s if patient else settings.redial_base_s * 2 ** min(tries - 1, 16)
        entry.next_dial_at = now + min(wait, settings.redial_max_s) * (0.5 + self._rng.random() / 2)

    def _maintain(self, now: float) -> list[Output]:
        """Dial what is missing, and arm one timer for the next moment at which a dial may be due."""
        missing = self._num_missing()
        if self._stopping or missing <= 0:
            return []
        out: list[Output] = []
        free = [(peer, entry) for peer, entry in self._book.items() if self._is_free(peer, entry)]
        due = [(peer, entry) for peer, entry in free if entry.next_dial_at <= now]
        for _, entry in self._choose(due, missing):
            out.append(self._dial(entry, brief=False))
        waiting = [entry.next_dial_at for _, entry in free if not entry.dialling and entry.next_dial_at > now]
        # One timer at a time, whatever a talkative neighbour makes us look at.
        if waiting and self._num_missing() > 0 and min(waiting) < self._redial_at:
            self._redial_token += 1
            self._redial_at = min(waiting)
            out.append(SetTimer(Timer("view", "redial", self._redial_token), self._redial_at - now))
        return out

    def _num_missing(self) -> int:
        if self._settings.static:
            return sum(entry.bootstrap for _, entry in self._book.items())
        dialling = sum(entry.dialling and not entry.brief for _, entry in self._book.items())
        # Strangers who link up and say nothing must not keep us from dialling.
        counted = sum(
            not link.brief and (link.outbound or link.hello is not None) for link in self._links.values()
        )
        return self._settings.target_degree - counted - dialling

    def _choose(self, due: list[tuple[PeerId, Entry]], missing: int) -> Iterable[tuple[PeerId, Entry]]:
        if self._settings.static:
            return [(peer, entry) for peer, entry in due if entry.bootstrap]
        if not due:
            return []
        # Found peers first: bootstrap peers are everybody's, and are for when nobody else answers. Those that are said to
        # be gone come after them.
        found = [pair for pair in due if not pair[1].bootstrap and not pair[1].gone]
        rest = [pair for pair in due if pair[1].bootstrap]
        gone = [pair for pair in due if pair[1].gone and not pair[1].bootstrap and not _left(pair[1])]
        # All of the found may be gone for good, and hundreds that time out one by one keep every place taken.
        alone = not self._links and any(entry.failures for _, entry in self._book.items())
        reserved = 1 if rest and alone else 0
        chosen = self._rng.sample(found, min(missing - reserved, len(found)))
        for group in (rest, gone):
            chosen += self._rng.sample(group, min(missing - len(chosen), len(group)))
        return chosen

    # --- the tables -------------------------------------------------------------------------------------
    MESSAGES: ClassVar[Mapping[type, Callable[..., list[Output]]]] = {
        Hello: _on_hello,
        Refuse: _on_refused,
        Heartbeat: _on_heartbeat,
        Offer: _on_offer,
        Shuffle: _on_shuffle,
        Peers: _on_peers,
        Ping: _on_ping,
        Pong: _on_pong,
        Probe: _on_probe,
        Probed: _on_probed,
        Suspects: _on_suspects,
        Bye: _on_bye,
    }
    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        Started: _on_started,
        StopRequested: _on_stop,
        Discovered: _on_discovered,
        LinkUp: _on_link_up,
        LinkDown: _on_link_down,
        DialFailed: _on_dial_failed,
        Rejected: _on_rejected,
        TimerFired: _on_timer,
        **dict.fromkeys(get_args(LinkMessage), _on_message),
    }


SHUFFLED = 8
"""Records in a shuffle, each way."""
SLACK = 2
"""Links above the target that are never ended, however low that is."""
LOOKS = 8
"""Of all the peers that know each other, so many look for the rest of the network in each `rejoin_s`."""
MAX_NEWS = 256
MAX_QUESTS = 64
"""Answers that others wait for at one time, after they asked us to reach a peer."""
MAX_AWAITED = 256
STANDSTILL = 2
"""Beats without one of its own after which a node takes nobody's silence for theirs."""
PUT_UP_WITH = 6
"""How many times longer than its own a node leaves an idle brief link that another has dialled."""
FAILURES_TO_SUSPECT = 2
"""Dials in a row, of a peer that was once met, after which it is said to be gone."""

_MISFIT = frozenset(
    {
        Reason.VERSION,
        Reason.NETWORK,
        Reason.PROTOCOL,
        Reason.TASK,
        Reason.SCHEMA,
        Reason.FULL,
        Reason.SURPLUS,
        Reason.UNINVITED,
        Reason.EXPIRED,
        Reason.GENERATOR,
        Reason.BASE,
        Reason.TERMS,
    }
)


def _learns(hello: Hello) -> bool:
    return hello.learning != NO_LEARNING


def _left(entry: Entry) -> bool:
    return entry.record is not None and entry.record.left


def _state(entry: Entry, link: _Link | None) -> str:
    if link is not None:
        if link.closing:
            return "closing"
        return ("brief" if link.brief else "live") if link.hello else "greeting"
    if entry.dialling:
        return "dialling"
    if entry.suspected:
        return "suspected"
    return "left" if _left(entry) else "known"


def mismatch(ours: Hello, theirs: Hello) -> tuple[Reason, str] | None:
    """Why these two nodes cannot work together, in a sentence that both operators understand."""
    if theirs.version != PROTOCOL_VERSION:
        return Reason.VERSION, f"protocol version {theirs.version} met version {ours.version}"
    if theirs.network != ours.network:
        return Reason.NETWORK, f"network '{theirs.network}' met network '{ours.network}'"
    if not (_learns(ours) and _learns(theirs)):
        return None
    if theirs.learning != ours.learning:
        return Reason.PROTOCOL, f"learning protocol '{theirs.learning}' met '{ours.learning}'"
    if theirs.task != ours.task:
        return Reason.TASK, f"task '{theirs.task}' met task '{ours.task}'"
    if theirs.schema != ours.schema:
        return (
            Reason.SCHEMA,
            f"task '{ours.task}': parameters differ (schema {theirs.schema.hex()[:12]} met {ours.schema.hex()[:12]})",
        )
    return None
