"""The node core: routes events to the machines that decide, and carries their notices between them.

Pure: `now`, the random generator and the identity come from outside. It performs nothing; `node/driver.py`
does so in real time, `sim/world.py` in virtual time.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from protocols.admission import Admission, AdmissionPolicy
from protocols.content import Content, ContentSettings
from protocols.events import Effect, Event, Halt, Notice, Phase, Received, StopRequested
from protocols.exchange import Exchange, ExchangeSettings
from protocols.gossip import Gossip, GossipSettings
from protocols.machine import Handler, Machine
from protocols.messages import Hello
from protocols.sampling import SampledSettings, Sampling
from protocols.scalar_terms import ScalarSettings
from protocols.scalars import ScalarLearning
from protocols.signing import Signatures
from protocols.view import NO_LEARNING, PeerStatus, View, ViewSettings
from protocols.vocabulary import (
    DIGEST_BYTES,
    PROTOCOL_VERSION,
    ModelRef,
    PeerId,
    PeerRecord,
    SchemaHash,
)


class CoreSettings(Struct, frozen=True):
    """All that a core needs to know before its first event.

    base, members: of a node that learns by scalars, the digest of the model that all begin with, and the author keys of
        `scalars.members`.
    policy: whom to link with; admission: what this node shows where others ask.
    content: how to exchange what is shared; None for a node that has no part in it.
    """

    network: str
    task: str
    schema: SchemaHash
    max_model_bytes: int
    learning: str = "gossip"
    view: ViewSettings = field(default_factory=ViewSettings)
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    gossip: GossipSettings = field(default_factory=GossipSettings)
    sampled: SampledSettings = field(default_factory=SampledSettings)
    scalars: ScalarSettings = field(default_factory=ScalarSettings)
    base: bytes = bytes(DIGEST_BYTES)
    members: frozenset[bytes] = frozenset()
    policy: AdmissionPolicy = AdmissionPolicy()
    admission: Admission | None = None
    content: ContentSettings | None = None


class NodeCore:
    """One node's decisions: `step(now, event)` gives the effects to perform, in order."""

    def __init__(
        self, settings: CoreSettings, me: PeerId, rng: random.Random, signatures: Signatures
    ) -> None:
        """signatures: in the node's own name."""
        hello = Hello(
            version=PROTOCOL_VERSION,
            network=settings.network,
            learning=settings.learning,
            task=settings.task,
            schema=settings.schema,
            record=PeerRecord(me, ()),
            brief=False,
            admission=settings.admission,
        )
        view = settings.view
        if settings.learning == "sampled":
            # The population learns from the view, and has to hold everybody.
            view = replace(view, max_known=max(view.max_known, settings.sampled.max_members))
        self.view = View(view, me, hello, rng, signatures, settings.policy)
        self.exchange = Exchange(settings.exchange, self.view, settings.max_model_bytes)
        self.learning = LEARNING[settings.learning](settings, self.view, self.exchange, signatures)
        if self.learning is None:
            self.exchange.open = False
            self.view.active = False
        self.content = Content(settings.content, self.view, rng, signatures) if settings.content else None
        machines = (self.view, self.exchange, self.learning, self.content)
        self._machines = tuple(machine for machine in machines if machine is not None)
        self._handlers = _handlers(tuple(type(machine) for machine in self._machines))

    def step(self, now: float, event: Event) -> list[Effect]:
        """Decide on one event. `now` is in seconds and never goes back."""
        effects: list[Effect] = []
        waiting: list[Any] = [event]
        machines, handlers = self._machines, self._handlers
        for happening in waiting:
            kind = type(happening)
            if kind is Received:  # `kind_of`, spelt out where every event passes
                kind = type(happening.message)
            for machine, handler in handlers.get(kind, ()):
                for output in handler(machines[machine], now, happening):
                    if type(output) in _NOTICES:
                        waiting.append(output)  # its turn comes when the event's own effects are complete
                    else:
                        effects.append(output)  # type: ignore[arg-type]
        if type(event) is StopRequested:
            effects.append(Halt())
        return effects

    # --- for the operator -------------------------------------------------------------------------------
    @property
    def model(self) -> ModelRef | None:
        """The node's current model."""
        return self.learning.own if self.learning else None

    @property
    def round(self) -> int:
        return self.learning.round if self.learning else 0

    @property
    def phase(self) -> Phase:
        return self.learning.phase if self.learning else Phase.DONE

    def peers(self) -> list[PeerStatus]:
        return self.view.status()


_NOTICES = frozenset(Notice.__subclasses__())


@cache
def _handlers(machines: tuple[type[Machine], ...]) -> Mapping[type, Sequence[tuple[int, Handler]]]:
    """Who deals with which kind of event, in the order of the machines. One table for all cores of a process."""
    kinds = dict.fromkeys(kind for machine in machines for kind in machine.HANDLERS)
    return {
        kind: tuple((i, m.HANDLERS[kind]) for i, m in enumerate(machines) if kind in m.HANDLERS)
        for kind in kinds
    }


Learning = Gossip | Sampling | ScalarLearning
_Make = Callable[[CoreSettings, View, Exchange, Signatures], Learning | None]


def _gossip(settings: CoreSettings, view: View, exchange: Exchange, signatures: Signatures) -> Gossip:
    return Gossip(settings.gossip, view, exchange)


def _sampled(settings: CoreSettings, view: View, exchange: Exchange, signatures: Signatures) -> Sampling:
    return Sampling(settings.sampled, view, exchange)


def _scalars(
    settings: CoreSettings, view: View, exchange: Exchange, signatures: Signatures
) -> ScalarLearning:
    return ScalarLearning(settings.scalars, settings.base, settings.members, view, exchange, signatures)


def _no_learning(settings: CoreSettings, view: View, exchange: Exchange, signatures: Signatures) -> None:
    return None


LEARNING: dict[str, _Make] = {
    "gossip": _gossip,
    "sampled": _sampled,
    "scalars": _scalars,
    NO_LEARNING: _no_learning,
}
"""The learning protocols by their name in the config. A new one is one more entry."""
