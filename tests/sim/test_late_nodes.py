"""What nodes that come late do to the others: with catching up nothing, without it their first models drag them back."""

from collections import defaultdict
from statistics import mean

import pytest

from protocols.events import CaughtUp, Record
from sim import scenario_files
from sim.results import RoundRow
from sim.world import Observer, World

NODES = 24
LATE = range(1, NODES // 3 * 2, 2)
"""A third of all, and every other node among the first two thirds."""
BACK_S, END_S = 42, 48
OFF = ("gossip.catch_up=off", "gossip.max_staleness=0")
SETTINGS = (
    f"nodes={NODES}",
    f"at_most_s={END_S}",
    # Two models to a merge: what is wrong with one of them shows.
    "gossip.fanout=1",
    "gossip.quorum=0",
    "gossip.rounds=0",
    "training.local_steps=2",
)
MOMENTS = {
    "newcomers": f'["at 40 s: wipe nodes {",".join(map(str, LATE))}", "at {BACK_S} s: restart all"]',
    "back": f'["at 1 s: crash nodes {",".join(map(str, LATE))}", "at {BACK_S} s: restart all"]',
}
"""`newcomers` begin from models of their own; who is `back` was away for sixty rounds, nearly since the first."""


class Accuracies(Observer):
    """Those of the nodes that were there all the time, by the second; and who has caught up."""

    def __init__(self) -> None:
        self.by_second: dict[int, list[float]] = defaultdict(list)
        self.caught_up: list[int] = []

    def round(self, row: RoundRow) -> None:
        if row.node not in LATE and "accuracy" in row.metrics:
            self.by_second[int(row.at_s)].append(row.metrics["accuracy"])

    def record(self, at_s: float, node: int, record: Record) -> None:
        if isinstance(record, CaughtUp):
            self.caught_up.append(node)

    def loss(self) -> float:
        """How far the worst second after their return is below the three before it."""
        before = mean(value for at_s in range(BACK_S - 3, BACK_S) for value in self.by_second[at_s])
        return before - min(mean(self.by_second[at_s]) for at_s in range(BACK_S, END_S))


def run(who: str, *overrides: str) -> Accuracies:
    chosen, _ = scenario_files.load("baseline", [*SETTINGS, f"timeline={MOMENTS[who]}", *overrides])
    seen = Accuracies()
    World(chosen, observer=seen).run()
    return seen


@pytest.mark.parametrize("who", MOMENTS)
def test_nodes_that_come_late_drag_nobody_back(who: str) -> None:
    seen = run(who)
    # Of those who are back some have mostly neighbours that are back too, and nothing to catch up with.
    assert set(seen.caught_up) <= {*LATE}
    assert len(seen.caught_up) >= len(LATE) / 2
    assert seen.loss() < 0.01


def test_without_catching_up_newcomers_do() -> None:
    """Those who are back do not, or hardly: a model that has begun to learn this task is no bad part of a mean."""
    seen = run("newcomers", *OFF)
    assert not seen.caught_up
    assert seen.loss() > 0.05
