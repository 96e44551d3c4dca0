"""How a population spreads: news to a few neighbours, and a census when two nodes link up, which repairs the rest.

Belongs here: the messages that keep populations alike. What a population is stands in `population.py`.
"""

from collections.abc import Sequence

from protocols.events import Send
from protocols.machine import Output
from protocols.messages import Census, Peers
from protocols.population import Population
from protocols.timers import Timers
from protocols.view import View
from protocols.vocabulary import MAX_PEERS_PER_MESSAGE, PeerId, PeerRecord

FLUSH_S = 1.0
"""For which news are gathered."""
TELL_S = 5.0
"""Between two records of one author that are passed on."""
CENSUS_S = 60.0
"""Between two comparisons with some neighbour."""
ANSWER_S = 10.0
"""Between two answers to one neighbour's census: an answer may be a thousand times as long."""


class Spreading:
    """fanout: neighbours that are told what is new."""

    def __init__(self, view: View, population: Population, timers: Timers, fanout: int) -> None:
        self._view = view
        self._population = population
        self._timers = timers
        self._fanout = fanout
        self._news: dict[PeerId, PeerRecord] = {}
        self._flushing = False
        self._told: dict[PeerId, float] = {}
        """By author, when its word was passed on last, oldest first."""
        self._compared_at = 0.0
        self._answered: dict[PeerId, float] = {}

    def tell(self, now: float, record: PeerRecord) -> list[Output]:
        """A few neighbours, soon; each passes on what is new to it. Who signs without end is passed on now and then, and
        what that leaves out a census repairs."""
        peer = PeerId(record.peer)
        if not record.left and now - self._told.get(peer, -TELL_S) < TELL_S:
            return []
        self._told.pop(peer, None)
        self._told[peer] = now
        while self._told and now - next(iter(self._told.values())) >= TELL_S:
            del self._told[next(iter(self._told))]
        self._news[peer] = record
        if self._flushing:
            return []
        self._flushing = True
        return [self._timers.set(FLUSH_S, self._flush)]

    def greet(self, peer: PeerId) -> list[Output]:
        """A new neighbour: one of the two begins to compare, the other answers."""
        return [self._census(peer, answers=False)] if self._view.me < peer else []

    def compare(self, now: float) -> list[Output]:
        """With some neighbour, now and then."""
        if now - self._compared_at < CENSUS_S:
            return []
        self._compared_at = now
        return [self._census(peer, answers=False) for peer in self._view.some_neighbours(1)]

    def on_census(self, now: float, peer: PeerId, theirs: Census) -> list[Output]:
        """What two neighbours do not know alike, each tells the other."""
        own = self._census(peer, answers=True)
        if theirs.digests == self._population.digests or not self._view.is_neighbour(peer):
            return []
        self._answered = {each: at for each, at in self._answered.items() if now - at < ANSWER_S}
        if peer in self._answered:
            return []
        self._answered[peer] = now
        out = [] if theirs.answers else [own]
        differing = self._population.differing(theirs.digests)
        return out + [Send(peer, message) for message in _in_messages(differing)]

    def _flush(self, now: float) -> list[Output]:
        self._flushing = False
        news, self._news = list(self._news.values()), {}
        peers = self._view.some_neighbours(self._fanout)
        return [Send(peer, message) for message in _in_messages(news) for peer in peers]

    def _census(self, peer: PeerId, answers: bool) -> Output:
        self._population.take(self._view.record)
        return Send(peer, Census(self._population.digests, answers))


def _in_messages(records: Sequence[PeerRecord]) -> list[Peers]:
    return [
        Peers(tuple(records[start : start + MAX_PEERS_PER_MESSAGE]))
        for start in range(0, len(records), MAX_PEERS_PER_MESSAGE)
    ]
