"""Whom a node knows and whom it is linked with: greeting, liveness, target degree, back-off, bootstrap.

Decides nothing about models. Other machines ask `live_learners()` and get `PeerUp`/`PeerDown`.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Annotated, ClassVar, get_args

from msgspec import Meta, Struct

from protocols.events import (
    Dial,
    DialFailed,
    Disconnect,
    Emit,
    KeepPeer,
    LinkChanged,
    LinkDown,
    LinkUp,
    PeerDown,
    PeerUp,
    Penalise,
    Received,
    Rejected,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
)
from protocols.machine import Handler, Machine, Output
from protocols.messages import AskPeers, Bye, Heartbeat, Hello, LinkMessage, Offer, Peers, Refuse
from protocols.vocabulary import (
    HOSTILE,
    MAX_ADDRESSES,
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
    """Links to keep. 4 to 8 mixes a network well; each link costs one heartbeat per period."""
    max_degree: Annotated[int, Meta(ge=1, le=256)] = 24
    """Links to accept. Leave room above the target, or newcomers find no door."""
    static: bool = False
    """Keep links to every bootstrap address and look for nobody else: a topology drawn by hand."""
    heartbeat_s: Annotated[float, Meta(gt=0, le=600)] = 5.0
    dead_after_s: Annotated[float, Meta(gt=0, le=3600)] = 20.0
    """Silence after which a link is closed; a few heartbeats, so that one lost beat kills nobody."""
    greeting_s: Annotated[float, Meta(gt=0, le=600)] = 10.0
    redial_base_s: Annotated[float, Meta(gt=0, le=600)] = 1.0
    redial_max_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """Longest wait between two dials of one peer: a network whose bootstrap returns is joined within it."""
    max_known: Annotated[int, Meta(ge=8, le=100_000)] = 512


class _Known:
    """A peer that could be dialled, and how that went so far."""

    __slots__ = ("addresses", "bootstrap", "dialling", "failures", "last_reason", "next_dial_at")

    def __init__(self, addresses: tuple[str, ...], bootstrap: bool = False) -> None:
        self.addresses = addresses
        self.bootstrap = bootstrap
        self.dialling = False
        self.failures = 0
        self.next_dial_at = 0.0
        self.last_reason = ""


class _Link:
    """A link that stands. Greeted once the other side's hello was accepted."""

    __slots__ = ("active", "closing", "heard_at", "hello", "learns", "outbound", "round", "since")

    def __init__(self, now: float, outbound: bool) -> None:
        self.since = now
        self.heard_at = now
        self.outbound = outbound
        self.hello: Hello | None = None
        self.learns = False
        """Whether its hello says that it learns at all; `active`, whether it still does."""
        self.active = True
        self.closing = False
        """Refused or said goodbye: what still comes in until the link is down means nothing."""
        self.round = 0


class PeerStatus(Struct, frozen=True):
    """One known peer, for the operator."""

    peer: str
    state: str
    """`live`, `greeting`, `dialling` or `known`."""
    addresses: tuple[str, ...]
    bootstrap: bool
    round: int
    failures: int
    last_reason: str


class View(Machine):
    """The peer view of one node. Pure: `rng` and every `now` come from outside."""

    def __init__(self, settings: ViewSettings, me: PeerId, hello: Hello, rng: random.Random) -> None:
        self._settings = settings
        self._me = me
        self._hello = hello
        self._rng = rng
        self._known: dict[PeerId, _Known] = {}
        self._links: dict[PeerId, _Link] = {}
        self._redial_token = 0
        self._redial_at = inf
        self._stopping = False
        self.round = 0
        self.active = True
        for address in settings.bootstrap:
            self._learn(address, bootstrap=True)

    # --- what others ask --------------------------------------------------------------------------------
    @property
    def me(self) -> PeerId:
        return self._me

    @property
    def network(self) -> str:
        """Its name."""
        return self._hello.network

    def live_learners(self) -> list[PeerId]:
        """Greeted neighbours that are still learning, in order of linking."""
        return [
            peer for peer, link in self._links.items() if link.active and link.learns and not link.closing
        ]

    def learners(self) -> list[PeerId]:
        """Neighbours with whom models can be exchanged, whether they still learn or not."""
        return [peer for peer, link in self._links.items() if link.learns and not link.closing]

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

    def is_live(self, peer: PeerId) -> bool:
        """Whether it has greeted, and neither side has said that the link ends."""
        link = self._links.get(peer)
        return link is not None and link.hello is not None and not link.closing

    def learns(self, peer: PeerId) -> bool:
        """Whether a model can be exchanged with this neighbour at all."""
        link = self._links.get(peer)
        return link is not None and link.learns and not link.closing

    def round_of(self, peer: PeerId) -> int:
        """The round that a neighbour was in when it last spoke of one; 0 where it has not, or there is no link."""
        link = self._links.get(peer)
        return link.round if link else 0

    def num_live(self) -> int:
        return sum(link.hello is not None for link in self._links.values())

    def status(self) -> list[PeerStatus]:
        """Every known or linked peer."""
        rows = []
        for peer in {**self._known, **self._links}:
            known, link = self._known.get(peer, _Known(())), self._links.get(peer)
            state = "dialling" if known.dialling else "known"
            if link:
                state = "live" if link.hello else "greeting"
            rows.append(
                PeerStatus(
                    peer=peer,
                    state=state,
                    addresses=known.addresses,
                    bootstrap=known.bootstrap,
                    round=link.round if link else 0,
                    failures=known.failures,
                    last_reason=known.last_reason,
                )
            )
        return rows

    # --- events -----------------------------------------------------------------------------------------
    def _on_stop(self, now: float, event: StopRequested) -> list[Output]:
        self._stopping = True
        return [out for peer in self._links for out in (Send(peer, Bye()), Disconnect(peer, Reason.LEAVING))]

    def close(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        """End the link with a neighbour, and tell it why. What still comes from it means nothing."""
        self._links[peer].closing = True
        return [Send(peer, Refuse(reason, one_line(detail))), Disconnect(peer, reason)]

    def turn_away(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        """End the link with a neighbour that does not fit, and remember why for the operator."""
        if known := self._known.get(peer):
            known.last_reason = f"{reason.value}: {detail}"
        return self._refuse(peer, reason, detail)

    def heartbeat(self) -> list[Output]:
        """Tell every neighbour where we stand, now rather than at the next beat."""
        beat = Heartbeat(self.round, self.active)
        return [Send(peer, beat) for peer, link in self._links.items() if link.hello and not link.closing]

    def _on_started(self, now: float, event: Started) -> list[Output]:
        self._hello = _with_addresses(self._hello, event.addresses)
        if not self._settings.static:
            for record in event.peers:
                for address in record.addresses:
                    self._learn(address)
        # A drawn phase keeps a thousand nodes that start together from beating together.
        phase = self._settings.heartbeat_s * (0.5 + self._rng.random() / 2)
        return [SetTimer(Timer("view", "beat", 0), phase), *self._maintain(now)]

    def _on_link_up(self, now: float, event: LinkUp) -> list[Output]:
        peer = event.peer
        self._links[peer] = _Link(now, event.outbound)
        if known := self._known.get(peer):
            known.dialling = False
        return [Send(peer, self._hello)]

    def _on_link_down(self, now: float, event: LinkDown) -> list[Output]:
        peer, reason, detail = event.peer, event.reason, event.detail
        link = self._links.pop(peer, None)
        out: list[Output] = []
        if known := self._known.get(peer):
            known.dialling = False
            if reason is not Reason.DUPLICATE:
                known.last_reason = (
                    f"{reason.value}: {detail}" if detail else known.last_reason or reason.value
                )
                self._back_off(now, known, reason)
        if link and link.hello:
            out += [
                Emit(LinkChanged(peer=peer, up=False, reason=reason.value, num_live=self.num_live())),
                PeerDown(peer, reason),
            ]
        return out + self._maintain(now)

    def _on_dial_failed(self, now: float, event: DialFailed) -> list[Output]:
        reason, detail = event.reason, event.detail
        known = self._known.get(peer_of(event.address) or PeerId(""))
        if known:
            known.dialling = False
            known.last_reason = f"{reason.value}: {detail}" if detail else reason.value
            # Next time another of its addresses.
            known.addresses = (*known.addresses[1:], *known.addresses[:1])
            self._back_off(now, known, reason)
        return self._maintain(now)

    def _on_rejected(self, now: float, event: Rejected) -> list[Output]:
        peer, reason, detail = event.peer, event.reason, event.detail
        out: list[Output] = [Penalise(peer, reason, detail)]
        if peer in self._links and not self._links[peer].closing:
            out += self.close(peer, reason, detail)
        return out

    def _on_timer(self, now: float, event: TimerFired) -> list[Output]:
        timer = event.timer
        if timer.owner != "view" or self._stopping:
            return []
        if timer.name == "beat":
            return [
                SetTimer(Timer("view", "beat", 0), self._settings.heartbeat_s),
                *self.heartbeat(),
                *self._close_silent(now),
            ]
        if timer.token != self._redial_token:
            return []
        self._redial_at = inf
        return self._maintain(now)

    def _close_silent(self, now: float) -> list[Output]:
        out: list[Output] = []
        for peer, link in self._links.items():
            if link.closing:
                continue
            if link.hello is None and now - link.since > self._settings.greeting_s:
                out += [Penalise(peer, Reason.GREETING, "no hello"), Disconnect(peer, Reason.GREETING)]
            elif now - link.heard_at > self._settings.dead_after_s:
                out.append(Disconnect(peer, Reason.SILENT))
        return out

    # --- messages ---------------------------------------------------------------------------------------
    def _on_message(self, now: float, event: Received) -> list[Output]:
        """Whatever it says, it is a sign of life."""
        link = self._links.get(event.peer)
        if link is None or link.closing:
            return []
        link.heard_at = now
        kind = type(event.message)
        if link.hello is None and kind is not Hello and kind is not Refuse:
            return self._refuse(event.peer, Reason.GREETING, "the first message on a link must be a hello")
        handler = self.MESSAGES.get(kind)
        return handler(self, now, event.peer, link, event.message) if handler else []

    def _on_heartbeat(self, now: float, peer: PeerId, link: _Link, message: Heartbeat) -> list[Output]:
        link.round, link.active = message.round, message.active
        return []

    def _on_offer(self, now: float, peer: PeerId, link: _Link, message: Offer) -> list[Output]:
        # Its beats are far apart; what it offers says sooner where it stands.
        link.round = max(link.round, message.ref.round)
        return []

    def _on_ask(self, now: float, peer: PeerId, link: _Link, message: AskPeers) -> list[Output]:
        return [Send(peer, Peers(self._sample(excluding=peer)))]

    def _on_bye(self, now: float, peer: PeerId, link: _Link, message: Bye) -> list[Output]:
        link.active, link.closing = False, True
        return [Disconnect(peer, Reason.LEAVING)]

    def _on_hello(self, now: float, peer: PeerId, link: _Link, theirs: Hello) -> list[Output]:
        if link.hello is not None:
            return self._refuse(peer, Reason.GREETING, "a second hello on one link")
        if problem := mismatch(self._hello, theirs):
            return self.turn_away(peer, *problem)
        if self.num_live() >= self._settings.max_degree:
            # A newcomer is turned away with other doors to knock at.
            return [
                Send(peer, Peers(self._sample(excluding=peer))),
                *self._refuse(
                    peer, Reason.FULL, f"this node keeps at most {self._settings.max_degree} links"
                ),
            ]
        link.hello, link.learns = theirs, _learns(theirs)
        for address in theirs.addresses:
            if peer_of(address) == peer:
                self._learn(address)
        known = self._known.get(peer)
        if known:
            known.failures, known.last_reason = 0, ""
        out: list[Output] = []
        if known and known.addresses:
            out.append(KeepPeer(PeerRecord(peer, known.addresses)))
        if not self._settings.static:
            out.append(Send(peer, AskPeers()))
        out.append(Send(peer, Heartbeat(self.round, self.active)))
        out.append(Emit(LinkChanged(peer=peer, up=True, reason="", num_live=self.num_live())))
        out.append(PeerUp(peer, theirs))
        return out

    def _on_refused(self, now: float, peer: PeerId, link: _Link, message: Refuse) -> list[Output]:
        reason, detail = message.reason, message.detail
        link.closing = True
        if reason is Reason.DUPLICATE:
            # Only our own side finds duplicates; a peer's word for it would have us dial again without a wait.
            reason = Reason.LINK
        if known := self._known.get(peer):
            known.last_reason = f"refused by peer, {reason.value}: {detail}"
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

    def _on_peers(self, now: float, peer: PeerId, link: _Link, message: Peers) -> list[Output]:
        if self._settings.static:
            return []
        for record in message.records:
            for address in record.addresses:
                # A neighbour has told us its addresses itself.
                if peer_of(address) == record.peer and record.peer not in self._links:
                    self._learn(address)
        return self._maintain(now)

    def _refuse(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        return [Penalise(peer, reason, detail), *self.close(peer, reason, detail)]

    # --- keeping the degree -----------------------------------------------------------------------------
    def _learn(self, address: str, bootstrap: bool = False) -> None:
        peer = peer_of(address)
        if peer is None or peer == self._me:
            return
        known = self._known.get(peer)
        if known is None:
            if len(self._known) >= self._settings.max_known and not self._evict():
                return
            self._known[peer] = _Known((address,), bootstrap)
        elif address not in known.addresses:
            known.addresses = self._kept((address, *known.addresses))

    def _kept(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        """The newest first; an old one that stopped working falls off the end. The operator's never do."""
        others = [address for address in addresses if address not in self._settings.bootstrap][:4]
        kept = [address for address in addresses if address in self._settings.bootstrap or address in others]
        return tuple(kept[:MAX_ADDRESSES])

    def _evict(self) -> bool:
        """Make room: the unlinked peer that failed most goes. Bootstrap peers never do, nor one that is being dialled."""
        candidates = [
            peer
            for peer, known in self._known.items()
            if not known.bootstrap and not known.dialling and peer not in self._links
        ]
        if not candidates:
            return False
        del self._known[max(candidates, key=lambda peer: self._known[peer].failures)]
        return True

    def _back_off(self, now: float, known: _Known, reason: Reason) -> None:
        settings = self._settings
        # Another network or schema does not change in a second; a crashed peer may be back in one.
        patient = reason in HOSTILE or reason in _MISFIT
        known.failures += 1
        wait = settings.redial_max_s if patient else settings.redial_base_s * 2 ** min(known.failures - 1, 16)
        known.next_dial_at = now + min(wait, settings.redial_max_s) * (0.5 + self._rng.random() / 2)

    def _maintain(self, now: float) -> list[Output]:
        """Dial what is missing, and arm one timer for the next moment at which a dial may be due."""
        if self._stopping:
            return []
        out: list[Output] = []
        free = [
            (peer, known)
            for peer, known in self._known.items()
            if known.addresses and not known.dialling and peer not in self._links
        ]
        due = [(peer, known) for peer, known in free if known.next_dial_at <= now]
        for _, known in self._choose(due):
            known.dialling = True
            out.append(Dial(known.addresses[0]))
        waiting = [known.next_dial_at for _, known in free if not known.dialling and known.next_dial_at > now]
        # One timer at a time, whatever a talkative neighbour makes us look at.
        if waiting and self._num_missing() > 0 and min(waiting) < self._redial_at:
            self._redial_token += 1
            self._redial_at = min(waiting)
            out.append(SetTimer(Timer("view", "redial", self._redial_token), self._redial_at - now))
        return out

    def _num_missing(self) -> int:
        if self._settings.static:
            return sum(known.bootstrap for known in self._known.values())
        dialling = sum(known.dialling for known in self._known.values())
        # Strangers who link up and say nothing must not keep us from dialling.
        counted = sum(link.outbound or link.hello is not None for link in self._links.values())
        return self._settings.target_degree - counted - dialling

    def _choose(self, due: list[tuple[PeerId, _Known]]) -> Iterable[tuple[PeerId, _Known]]:
        if self._settings.static:
            return [(peer, known) for peer, known in due if known.bootstrap]
        missing = self._num_missing()
        if missing <= 0 or not due:
            return []
        # Found peers first: bootstrap peers are everybody's, and are for when nobody else answers.
        found = [pair for pair in due if not pair[1].bootstrap]
        rest = [pair for pair in due if pair[1].bootstrap]
        # All of the found may be gone for good, and hundreds that time out one by one keep every place taken.
        alone = not self._links and any(known.failures for known in self._known.values())
        reserved = 1 if rest and alone else 0
        chosen = self._rng.sample(found, min(missing - reserved, len(found)))
        return chosen + self._rng.sample(rest, min(missing - len(chosen), len(rest)))

    def _sample(self, excluding: PeerId) -> tuple[PeerRecord, ...]:
        records = [
            PeerRecord(peer, self._known[peer].addresses)
            for peer, link in self._links.items()
            if link.hello and peer != excluding and peer in self._known and self._known[peer].addresses
        ]
        return tuple(self._rng.sample(records, min(MAX_PEERS_PER_MESSAGE, len(records))))

    # --- the tables -------------------------------------------------------------------------------------
    MESSAGES: ClassVar[Mapping[type, Callable[..., list[Output]]]] = {
        Hello: _on_hello,
        Refuse: _on_refused,
        Heartbeat: _on_heartbeat,
        Offer: _on_offer,
        AskPeers: _on_ask,
        Peers: _on_peers,
        Bye: _on_bye,
    }
    HANDLERS: ClassVar[Mapping[type, Handler]] = {
        Started: _on_started,
        StopRequested: _on_stop,
        LinkUp: _on_link_up,
        LinkDown: _on_link_down,
        DialFailed: _on_dial_failed,
        Rejected: _on_rejected,
        TimerFired: _on_timer,
        **dict.fromkeys(get_args(LinkMessage), _on_message),
    }


_MISFIT = frozenset(
    {
        Reason.VERSION,
        Reason.NETWORK,
        Reason.PROTOCOL,
        Reason.TASK,
        Reason.SCHEMA,
        Reason.FULL,
        Reason.GENERATOR,
        Reason.BASE,
        Reason.TERMS,
    }
)


def _learns(hello: Hello) -> bool:
    return hello.learning != NO_LEARNING


def _with_addresses(hello: Hello, addresses: tuple[str, ...]) -> Hello:
    told = addresses[:MAX_ADDRESSES]  # a machine with many interfaces listens on more
    return Hello(hello.version, hello.network, hello.learning, hello.task, hello.schema, told)


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
