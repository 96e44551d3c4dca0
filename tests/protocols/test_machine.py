"""How events find the method that deals with them."""

from typing import get_args

import pytest

from protocols.content import Content
from protocols.events import Event, Notice, Received, StopRequested, Trained
from protocols.exchange import Exchange
from protocols.gossip import Gossip
from protocols.machine import Machine, Output, kind_of
from protocols.messages import Bye, Heartbeat, LinkMessage
from protocols.sampling import Sampling
from protocols.scalars import ScalarLearning
from protocols.view import View
from protocols.vocabulary import PeerId

PEER = PeerId("peer")


class Counts(Machine):
    """Deals with goodbyes and ends, and says how often it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, object]] = []

    def _on_any(self, now: float, event: object) -> list[Output]:
        self.seen.append((now, event))
        return []

    HANDLERS = {Bye: _on_any, StopRequested: _on_any}  # noqa: RUF012 - as in the real ones, less the annotation


def test_a_message_is_looked_up_by_its_own_type() -> None:
    assert kind_of(Received(PEER, Heartbeat(0, True))) is Heartbeat
    assert kind_of(StopRequested()) is StopRequested


def test_a_machine_deals_with_what_is_in_its_table_and_takes_no_notice_of_the_rest() -> None:
    machine = Counts()
    for event in (Received(PEER, Bye()), Received(PEER, Heartbeat(0, True)), StopRequested()):
        assert machine.step(3.0, event) == []
    assert machine.seen == [(3.0, Received(PEER, Bye())), (3.0, StopRequested())]


@pytest.mark.parametrize("machine", [View, Exchange, Gossip, Sampling, ScalarLearning, Content])
def test_the_tables_name_only_what_can_happen(machine: type[Machine]) -> None:
    """A message in its envelope is looked up by its own type, so the envelope itself never is."""
    possible = {*get_args(Event), *Notice.__subclasses__(), *get_args(LinkMessage)} - {Received}
    assert set(machine.HANDLERS) <= possible


def test_everything_that_can_happen_is_somebodys() -> None:
    dealt_with = {
        kind
        for machine in (View, Exchange, Gossip, Sampling, ScalarLearning, Content)
        for kind in machine.HANDLERS
    }
    assert {*get_args(Event), *get_args(LinkMessage), *Notice.__subclasses__()} - dealt_with == {Received}
    assert Trained in Gossip.HANDLERS
