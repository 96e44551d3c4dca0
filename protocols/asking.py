"""Finding out who is there: samples that are drawn by asking several peers at once and taking them in order.

Belongs here: links and pings of the peers that are asked, and the memory of who did not answer. In which order they come
is the population's affair, what a sample is for the round's.
"""

from collections.abc import Callable, Collection, Sequence

from protocols.machine import Output
from protocols.population import Draw, Population
from protocols.timers import Timers
from protocols.view import View
from protocols.vocabulary import PeerId

Then = Callable[[float, list[PeerId]], list[Output]]
"""(now, sample) -> what comes after a sample is found."""
FAILED_FOR = 20
"""Ping times for which a peer that did not answer counts as doubtful."""
MAX_MISSES = 6
MAX_REMEMBERED = 4096


class Call:
    """A sample that is being drawn, and what comes after."""

    def __init__(self, draw: Draw, then: Then) -> None:
        self.draw = draw
        self.then = then
        self.reached: dict[PeerId, None] = {}
        """Peers that the view was asked to reach, and that have not been let go."""


class Asking:
    """All samples that one node is drawing. ping_s: within this a peer has to be dialled and has to answer."""

    def __init__(self, view: View, population: Population, timers: Timers, ping_s: float) -> None:
        self._view = view
        self._population = population
        self._timers = timers
        self._ping_s = ping_s
        self.calls: list[Call] = []
        self.pings: dict[int, PeerId] = {}
        """Whose answer a token stands for."""
        self.failed: dict[PeerId, float] = {}
        """Peers that did not answer, and until when that is taken to be so."""
        self._misses: dict[PeerId, int] = {}
        """How often in a row, of those who were asked of late."""

    def draw(self, now: float, order: Sequence[PeerId], count: int, then: Then) -> list[Output]:
        """SAMPLE: find the first so many in order who are there, and go on with them. They stay linked until let go."""
        for peer in [peer for peer, until in self.failed.items() if until <= now]:
            del self.failed[peer]
        gone = [peer for peer in order if peer in self.failed or self._view.is_gone(peer)]
        call = Call(Draw(order, count, gone), then)
        self.calls.append(call)
        return self._go_on(now, call)

    def reached(self, peer: PeerId) -> list[Output]:
        """Linked is not yet alive: a machine that hangs keeps its links for a while."""
        if not self._is_awaited(peer):
            return []
        token = self._timers.new_token()
        self.pings[token] = peer
        return [self._view.ping(peer, token)]

    def answered(self, now: float, peer: PeerId, token: int) -> list[Output]:
        """A pong."""
        if self.pings.get(token) != peer:
            return []
        del self.pings[token]
        return self._answer(now, peer, True)

    def unreachable(self, now: float, peer: PeerId) -> list[Output]:
        """It could not be linked with, or the link has ended."""
        return self._answer(now, peer, False)

    def _fail(self, now: float, peer: PeerId) -> None:
        """Doubtful for twice as long each time. That costs one who is back nothing: the doubtful are still asked."""
        misses = min(self._misses.pop(peer, 0) + 1, MAX_MISSES)
        self._misses[peer] = misses
        while len(self._misses) > MAX_REMEMBERED:
            del self._misses[next(iter(self._misses))]
        self.failed[peer] = now + FAILED_FOR * self._ping_s * 2 ** (misses - 1)

    def _go_on(self, now: float, call: Call) -> list[Output]:
        """Ask as many as it takes, and end the call once its sample is found."""
        out: list[Output] = []
        while asked := call.draw.ask():
            if self._view.me in asked:
                call.draw.answered(self._view.me, True)
            others = [peer for peer in asked if peer != self._view.me]
            for peer in others:
                call.reached[peer] = None
                record = self._population.get(peer)
                out += self._view.reach(now, peer, record.addresses if record else ())
            if others:
                out.append(self._timers.set(self._ping_s, self._miss, call, others))
                out.append(self._timers.set(self._ping_s / 4, self._doubt, call))
        sample = call.draw.sample()
        if sample is None or call not in self.calls:
            return out
        self.calls.remove(call)
        self._forget_pings({peer for peer in call.reached if not self._is_awaited(peer)})
        for peer in call.reached:
            if peer not in sample:
                self._view.let_go(now, peer)
        out += call.then(now, sample)
        if not self.calls:
            # No sample is drawn any more that a newcomer would change under its feet.
            self._population.fold()
        return out

    def _miss(self, now: float, call: Call, asked: list[PeerId]) -> list[Output]:
        """Time is up for those who were asked together. Whoever answered after the sample was found counts as there."""
        late = [peer for peer in asked if call in self.calls and call.draw.awaits(peer)]
        for peer in late:
            self._fail(now, peer)
            call.draw.answered(peer, False)
        self._forget_pings({peer for peer in asked if not self._is_awaited(peer)})
        return self._go_on(now, call) if late else []

    def _doubt(self, now: float, call: Call) -> list[Output]:
        """Those who seem to be gone had their chance."""
        if call not in self.calls:
            return []
        call.draw.give_up_doubtful()
        self._forget_pings({peer for peer in call.reached if not self._is_awaited(peer)})
        return self._go_on(now, call)

    def _answer(self, now: float, peer: PeerId, alive: bool) -> list[Output]:
        out: list[Output] = []
        if alive:
            self.failed.pop(peer, None)
            self._misses.pop(peer, None)
        for call in list(self.calls):
            if call.draw.awaits(peer):
                if not alive:
                    self._fail(now, peer)
                call.draw.answered(peer, alive)
                out += self._go_on(now, call)
        self._forget_pings([peer])
        return out

    def _is_awaited(self, peer: PeerId) -> bool:
        return any(call.draw.awaits(peer) for call in self.calls)

    def _forget_pings(self, peers: Collection[PeerId]) -> None:
        """Their answers mean nothing any more."""
        self.pings = {token: peer for token, peer in self.pings.items() if peer not in peers}
