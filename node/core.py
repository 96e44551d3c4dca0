"""The node core: routes events to the machines that decide, and carries their notices between them.

Pure: `now`, the random generator and the identity come from outside. It performs nothing; `node/driver.py`
does so in real time, `sim/world.py` in virtual time.
"""

import random
from collections import deque

from msgspec import Struct, field

from protocols.events import Effect, Event, Halt, Notice, Phase, StopRequested
from protocols.exchange import Exchange, ExchangeSettings
from protocols.gossip import Gossip, GossipSettings
from protocols.messages import Hello
from protocols.view import NO_LEARNING, PeerStatus, View, ViewSettings
from protocols.vocabulary import PROTOCOL_VERSION, ModelRef, PeerId, SchemaHash


class CoreSettings(Struct, frozen=True):
    """All that a core needs to know before its first event."""

    network: str
    task: str
    schema: SchemaHash
    max_model_bytes: int
    learning: str = "gossip"
    view: ViewSettings = field(default_factory=ViewSettings)
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    gossip: GossipSettings = field(default_factory=GossipSettings)


class NodeCore:
    """One node's decisions: `step(now, event)` gives the effects to perform, in order."""

    def __init__(self, settings: CoreSettings, me: PeerId, rng: random.Random) -> None:
        hello = Hello(
            PROTOCOL_VERSION, settings.network, settings.learning, settings.task, settings.schema, ()
        )
        self.view = View(settings.view, me, hello, rng)
        self.exchange = Exchange(settings.exchange, self.view, settings.max_model_bytes)
        self.learning = LEARNING[settings.learning](settings, self.view, self.exchange)
        if self.learning is None:
            self.exchange.open = False
            self.view.active = False

    def step(self, now: float, event: Event) -> list[Effect]:
        """Decide on one event. `now` is in seconds and never goes back."""
        effects: list[Effect] = []
        pending: deque[Event | Notice] = deque((event,))
        while pending:
            for output in self._route(now, pending.popleft()):
                if isinstance(output, Notice):
                    pending.append(output)
                else:
                    effects.append(output)
        if isinstance(event, StopRequested):
            effects.append(Halt())
        return effects

    def _route(self, now: float, event: Event | Notice) -> list[Effect | Notice]:
        out = [] if isinstance(event, Notice) else self.view.step(now, event)
        out += self.exchange.step(now, event)
        if self.learning is not None:
            out += self.learning.step(now, event)
        return out

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


def _gossip(settings: CoreSettings, view: View, exchange: Exchange) -> Gossip:
    return Gossip(settings.gossip, view, exchange)


def _no_learning(settings: CoreSettings, view: View, exchange: Exchange) -> None:
    return None


LEARNING = {"gossip": _gossip, NO_LEARNING: _no_learning}
"""The learning protocols by their name in the config. A new one is one more entry."""
