"""G-Rank's experiment (arXiv 2301.12530, section 5), with the node's own core and ranking: who clicks what, and how well
nodes come to agree on the order of results, with and without attackers.

Belongs here: the experiments, their steps and what is measured. Nodes and messages are `grank_network.py`'s affair, the
page is `grank_report.py`'s.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from aggregation.ranking import RANKERS, ClickLog, Query, rank, scores
from protocols.entries import Click
from protocols.errors import ConfigError
from protocols.vocabulary import PeerId
from sim.garbage import fewer_collections
from sim.grank_catalogue import Catalogue, synthetic
from sim.grank_network import DAY, Network, User

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LIBRARY_SHARE = 0.1
"""Of the catalogue, that each node has itself."""
GIVEN_SHARE = 0.1
"""Of what a node has clicked before the experiment begins, that its neighbour has heard."""
TOP_TERMS = 10
"""K of the similarity."""
ARRIVAL, ATTACK, ATTACK_SHARE = 0.25, 0.5, 0.1
"""When attackers come, when they begin to click, and for how long they do: shares of all steps."""
ATTACKER_PUSHES = 2
"""Peers that an attacker brings each of its clicks to, where pushes are taken. An honest node brings its own to one."""


class Experiment(Struct, frozen=True):
    """What happens beside honest nodes' clicks.

    attackers: for each honest node. queries: of each attacker. targeted: whether they all click the last result of one
    term, or anything.
    """

    summary: str
    attackers: float = 0.0
    queries: int = 0
    targeted: bool = True
    pushes: bool = False


EXPERIMENTS = {
    "baseline": Experiment("Nobody attacks."),
    "targeted-sybil": Experiment(
        "One attacker for ten nodes: 100 clicks each on one term's last result.", 0.1, 100
    ),
    "inflation": Experiment(
        "One attacker for ten nodes: 1,000 random clicks each.", 0.1, 1000, targeted=False
    ),
    "epic-sybil": Experiment(
        "Three attackers for each node: 100 clicks each on one term's last result.", 3.0, 100
    ),
    "push": Experiment(
        "As targeted-sybil, but nodes bring what they know to others instead of asking for it: honest ones to one peer, "
        "attackers to two.",
        0.1,
        100,
        pushes=True,
    ),
}
WITH_ISOLATION = ("g-rank", "g-rank-capped")
"""The rankers that know F."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """One run."""

    experiment: str = "baseline"
    ranker: str = "g-rank"
    isolation: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """F."""
    nodes: Annotated[int, Meta(ge=2, le=1000)] = 100
    """Honest ones."""
    steps: Annotated[int, Meta(ge=1, le=10_000_000)] = 10_000
    seed: int = 0
    evaluate_every: Annotated[int, Meta(ge=1)] = 100
    """Steps."""

    @property
    def name(self) -> str:
        """See `run_name`."""
        return run_name(self.ranker, self.isolation)


def run_name(ranker: str, isolation: float) -> str:
    """The ranker, with its F where it has one."""
    return f"{ranker}, F = {isolation:g}" if ranker in WITH_ISOLATION else ranker


# --- what is measured -----------------------------------------------------------------------------------
class Spread(Struct, frozen=True):
    """Over nodes and terms."""

    mean: float
    low: float
    """Below it is one in ten."""
    median: float
    high: float
    """Above it is one in ten."""
    max: float


class Quartiles(Struct, frozen=True):
    """Over terms."""

    mean: float
    low: float
    median: float
    high: float


class Against(Struct, frozen=True):
    """Nodes' rankings against one global ranking.

    distance: positional distance of a term's items, in places. beyond_ties: its mean, were items with equally many clicks
    globally right in any order among themselves. agreement: share of nodes that show first what is globally first.
    """

    distance: Spread
    beyond_ties: float
    agreement: Quartiles


class Target(Struct, frozen=True):
    """What became of the attacked term on honest nodes.

    place: of the attacked item among the term's results, mean, from 0 for the first to 1 for the last. first: share of
    nodes that show it first. distance: of this term, mean.
    """

    place: float
    first: float
    distance: float


class Row(Struct, frozen=True):
    """One evaluation, over the honest nodes. Bytes of messages are of those since the last one."""

    step: int
    honest: Against
    """The global ranking is by all clicks of honest nodes."""
    all: Against
    """The global ranking is by all clicks there are, attackers' too, as in the paper."""
    target: Target | None
    answer_bytes_mean: float
    answer_bytes_max: int
    ask_bytes_mean: float
    log_entries: float
    """Held by a node, mean."""
    log_bytes: float
    """Of these as they travel, without signatures; mean."""


class Judge:
    """Compares rankings of a term's items: those that carry the term as a tag, in the order of their indices.

    The lists of all terms are put into one table, [terms, places]; shorter ones are padded.
    """

    def __init__(self, tagged: NDArray[np.bool_]) -> None:
        """tagged: bool [terms, items], with an item at least for each term."""
        lengths = tagged.sum(axis=1)
        self.items: Ints = np.argsort(~tagged, axis=1, kind="stable")[:, : lengths.max()]
        """int [terms, places]: the padding is other items."""
        self.real: NDArray[np.bool_] = np.arange(self.items.shape[1]) < lengths[:, None]
        self.lengths: Ints = lengths
        self._terms = np.arange(len(tagged))[:, None]

    def table(self, values: NDArray[Any]) -> NDArray[Any]:
        """[..., terms, items] -> [..., terms, places]."""
        return values[..., self._terms, self.items]

    def places(self, scores: Floats, known: NDArray[np.bool_]) -> Ints:
        """Each item's place in the ranking, from 0, [..., terms, places]: by score, then by index.

        known: [..., terms, places]. An item that a node does not know, and padding, comes after all others.
        """
        order = np.argsort(np.where(known & self.real, -scores, np.inf), axis=-1, kind="stable")
        places = np.empty_like(order)
        np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), axis=-1)
        return places

    def distance(self, places: Ints, known: NDArray[np.bool_], first: Ints, last: Ints | None = None) -> Ints:
        """Positional distance, [..., terms]: the sum of how far each item is from its place in the reference, or from the
        places `first` to `last`, where it has the choice. A missing one counts as far as the list is long."""
        apart = np.maximum(np.maximum(first - places, places - (first if last is None else last)), 0)
        return np.asarray(np.where(self.real, np.where(known, apart, self.lengths[:, None]), 0).sum(axis=-1))

    def global_places(self, counts: Floats) -> tuple[Ints, Ints, Ints]:
        """By clicks [terms, items]: each item's place, and the first and the last that it could have as well as those with
        equally many clicks, [terms, places] each."""
        table = self.table(counts)
        rows, columns = table[:, :, None], np.where(self.real, table, -1.0)[:, None, :]
        first = (columns > rows).sum(axis=-1)
        last = first + (columns == rows).sum(axis=-1) - 1
        return self.places(table, self.real), first, last

    def against(self, places: Ints, known: NDArray[np.bool_], counts: Floats) -> Against:
        """places, known: [nodes, terms, places]. counts: [terms, items], the clicks that the global ranking is by."""
        reference, first, last = self.global_places(counts)
        distance = self.distance(places, known, reference)
        same = ((places == 0) & (reference == 0) & known).any(axis=-1).mean(axis=0)
        low, median, high = np.quantile(distance, (0.1, 0.5, 0.9)).tolist()
        return Against(
            Spread(float(distance.mean()), low, median, high, float(distance.max())),
            float(self.distance(places, known, first, last).mean()),
            Quartiles(float(same.mean()), *np.quantile(same, (0.25, 0.5, 0.75)).tolist()),
        )


# --- one run --------------------------------------------------------------------------------------------
class Trial:
    """One experiment with one ranker. `rows()` runs it; what is measured comes as it goes."""

    def __init__(self, settings: Settings, catalogue: Catalogue) -> None:
        """Raises ConfigError where the settings name what there is not."""
        check(settings)
        self.settings = settings
        self.experiment = EXPERIMENTS[settings.experiment]
        self.catalogue = catalogue
        self.num_attackers = round(self.experiment.attackers * settings.nodes)
        self.target: tuple[int, int] | None = None
        """Term and item, once the attack has begun."""
        self._judge = Judge(catalogue.tagged)
        self._drawn = self._draw_order() if settings.ranker == "bm25" else None
        self._counts: Floats = np.zeros(catalogue.tagged.shape)
        self._attackers_counts = self._counts.copy()
        # The same nodes make the same queries whichever ranker answers them.
        self._libraries = random.Random(f"{settings.seed} libraries")
        self._draw = random.Random(f"{settings.seed} steps")
        self._attack = random.Random(f"{settings.seed} attack")
        self.network = Network(
            catalogue.digests,
            seed=settings.seed,
            max_nodes=settings.nodes + self.num_attackers,
            top_terms=TOP_TERMS,
            pushes=self.experiment.pushes,
        )
        self.honest = self._arrive(settings.nodes, self._counts)
        self.network.introduce(self.honest, self.honest)
        self.attackers: list[User] = []
        self._measured: dict[PeerId, tuple[int, Floats]] = {}
        """Entries that a node held when its scores were asked for last, and these."""

    def rows(self) -> Iterator[Row]:
        """Take all steps; a row before the first of them, and then one for each `evaluate_every`."""
        settings, network = self.settings, self.network
        arrival, attack = round(ARRIVAL * settings.steps), round(ATTACK * settings.steps)
        length = max(1, round(ATTACK_SHARE * settings.steps))
        total = self.num_attackers * self.experiment.queries
        yield self._evaluate(0)
        for step in range(settings.steps):
            network.now = float(step)
            if step == arrival and self.num_attackers:
                self.attackers = self._arrive(self.num_attackers, self._attackers_counts)
                network.introduce(self.honest, self.attackers)
            if attack <= step < attack + length:
                done = step - attack
                for number in range(total * done // length, total * (done + 1) // length):
                    self._strike(self.attackers[number % self.num_attackers])
            self._step()
            if (step + 1) % settings.evaluate_every == 0:
                yield self._evaluate(step + 1)

    def _draw_order(self) -> Floats:
        """For a ranker that knows no clicks: where every item's text matches equally well, the order is drawn."""
        log = ClickLog(b"")
        everything = np.array([log.item_index(digest) for digest in self.catalogue.digests])
        query = Query(("any",), everything, np.ones_like(everything), seed=self.settings.seed)
        score = np.empty(len(everything))
        score[rank(self.settings.ranker, log, query).items] = -np.arange(len(everything))
        return np.broadcast_to(score, self.catalogue.tagged.shape)

    def _arrive(self, count: int, counts: Floats) -> list[User]:
        """New nodes, each with a library and a click for every tag, a share of which its neighbour has heard."""
        num_items, num_tags = len(self.catalogue), len(self.catalogue.tags)
        libraries = [
            self._libraries.sample(range(num_items), max(1, round(LIBRARY_SHARE * num_items)))
            for _ in range(count)
        ]
        clicks = []
        for library in libraries:
            # In any order: the first of them are a random share.
            terms = self._libraries.sample(range(num_tags), num_tags)
            chosen = [self._from_library(library, term) for term in terms]
            np.add.at(counts, (terms, chosen), 1)
            clicks.append([self._click(term, item) for term, item in zip(terms, chosen, strict=True)])
        users = self.network.start(clicks, round(GIVEN_SHARE * num_tags))
        for user, library in zip(users, libraries, strict=True):
            user.own(library)
        return users

    def _from_library(self, library: Sequence[int], term: int) -> int:
        tagged = self.catalogue.tagged[term]
        return self._libraries.choice([item for item in library if tagged[item]] or library)

    def _click(self, term: int, item: int, place: int = 0) -> Click:
        return Click(self.catalogue.digests[item], DAY, (self.catalogue.tags[term],), place + 1)

    def _step(self) -> None:
        """A random node makes a random query, clicks the first result, and hears from another, or tells it."""
        user = self._draw.choice(self.honest)
        term = self._draw.randrange(len(self.catalogue.tags))
        item = self.first_result(user, term)
        if item is not None:
            self._counts[term, item] += 1
            self.network.publish(user, (self._click(term, item),))
        if self.experiment.pushes:
            self._push(user, 1, self._draw)
        else:
            self.network.pull(user)

    def first_result(self, user: User, term: int) -> int | None:
        """The item that a node's ranking puts first; None where it has no result."""
        matching = np.flatnonzero(user.known & self.catalogue.tagged[term])
        query = Query((self.catalogue.tags[term],), matching, np.ones_like(matching), seed=self.settings.seed)
        results = rank(self.settings.ranker, user.log, query, self.settings.isolation, limit=1)
        return int(results.items[0]) if len(results.items) else None

    def _push(self, user: User, count: int, rng: random.Random) -> None:
        others = [other for other in self.network.users if other is not user]
        for other in rng.sample(others, min(count, len(others))):
            self.network.push(user, other)

    # --- attackers --------------------------------------------------------------------------------------
    def _strike(self, attacker: User) -> None:
        """One click of an attacker."""
        if self.experiment.targeted:
            self.target = self.target or self._choose_target()
            term, item = self.target
        else:
            term = self._attack.randrange(len(self.catalogue.tags))
            item = int(self._attack.choice(np.flatnonzero(self.catalogue.tagged[term])))
        self._attackers_counts[term, item] += 1
        place = int(self._judge.lengths[term]) - 1 if self.experiment.targeted else 0
        self.network.publish(attacker, (self._click(term, item, place),))
        if self.experiment.pushes:
            self._push(attacker, ATTACKER_PUSHES, self._attack)

    def _choose_target(self) -> tuple[int, int]:
        """A term and the last of its results by all honest clicks."""
        term = self._attack.randrange(len(self.catalogue.tags))
        places = self._judge.global_places(self._counts)[0][term]
        last = int(np.flatnonzero(places == self._judge.lengths[term] - 1)[0])
        return term, int(self._judge.items[term, last])

    # --- measuring --------------------------------------------------------------------------------------
    def _evaluate(self, step: int) -> Row:
        judge = self._judge
        found = [self._table(user) for user in self.honest]
        known = np.stack([user.known for user in self.honest])[:, judge.items] & judge.real
        places = judge.places(np.stack(found), known)
        network = self.network
        answers, asks = network.answer_bytes or [0], network.ask_bytes or [0]
        honest = judge.against(places, known, self._counts)
        everybody = self._counts + self._attackers_counts
        row = Row(
            step=step,
            honest=honest,
            all=judge.against(places, known, everybody) if self.attackers else honest,
            target=self._target(places, known),
            answer_bytes_mean=_mean(answers),
            answer_bytes_max=max(answers),
            ask_bytes_mean=_mean(asks),
            log_entries=_mean([user.num_entries for user in self.honest]),
            log_bytes=_mean([user.log_bytes for user in self.honest]),
        )
        network.answer_bytes, network.ask_bytes = [], []
        return row

    def _table(self, user: User) -> Floats:
        """Its scores, [terms, places]. A third of the nodes have heard nothing since the last evaluation."""
        num_entries, table = self._measured.get(user.peer, (0, None))
        if table is None or num_entries != user.num_entries:
            table = self._judge.table(self.scores(user))
            self._measured[user.peer] = user.num_entries, table
        return table

    def scores(self, user: User) -> Floats:
        """Of all items for all terms, [terms, items]."""
        if self._drawn is not None:
            return self._drawn
        return scores(self.settings.ranker, user.log, self.catalogue.tags, self.settings.isolation)

    def _target(self, places: Ints, known: NDArray[np.bool_]) -> Target | None:
        if self.target is None:
            return None
        term, item = self.target
        judge = self._judge
        column = int(np.flatnonzero(judge.items[term] == item)[0])
        last = int(judge.lengths[term]) - 1
        at = np.where(known[:, term, column], places[:, term, column], last)
        distance = judge.distance(places, known, judge.global_places(self._counts)[0])[:, term]
        return Target(float(at.mean()) / max(1, last), float((at == 0).mean()), float(distance.mean()))


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 3)


def check(settings: Settings) -> None:
    """Raises ConfigError for an experiment or a ranker that there is not."""
    if settings.experiment not in EXPERIMENTS:
        raise ConfigError("--experiment", f"there is no '{settings.experiment}'", EXPERIMENTS)
    if settings.ranker not in RANKERS:
        raise ConfigError("--ranker", f"there is no '{settings.ranker}'", RANKERS)


# --- many runs ------------------------------------------------------------------------------------------
class Run(Struct):
    """A run and what came of it. `finished` is false where it was interrupted."""

    settings: Settings
    rows: list[Row]
    target: tuple[str, int] | None = None
    """The attacked term and the item's index."""
    finished: bool = False


def run_trial(settings: Settings, catalogue: Catalogue, tell: Callable[[Row], None], run: Run) -> None:
    """Fill `run` as it goes, so that what there is stays where it is interrupted."""
    trial = Trial(settings, catalogue)
    with fewer_collections():
        for row in trial.rows():
            run.rows.append(row)
            tell(row)
            if trial.target is not None:
                run.target = catalogue.tags[trial.target[0]], trial.target[1]
    run.finished = True


def plan(
    experiments: Iterable[str],
    rankers: Iterable[str],
    isolations: Iterable[float],
    settings: Settings,
) -> list[Settings]:
    """Every experiment with every ranker and every F, each once: a ranker without F runs once."""
    isolations = tuple(isolations)
    planned = [
        Settings(
            experiment,
            ranker,
            isolation if ranker in WITH_ISOLATION else 0.0,
            settings.nodes,
            settings.steps,
            settings.seed,
            settings.evaluate_every,
        )
        for experiment in experiments
        for ranker in rankers
        for isolation in isolations
    ]
    planned = list(dict.fromkeys(planned))
    for each in planned:
        check(each)
    return planned


def baseline_s(settings: Settings | None = None) -> float:
    """Wall seconds of the baseline at full size, evaluation included."""
    return _seconds(settings or Settings())


def epic_sybil_s(settings: Settings | None = None) -> float:
    """Wall seconds of the epic sybil attack at full size, evaluation included."""
    return _seconds(settings or Settings(experiment="epic-sybil"))


def _seconds(settings: Settings) -> float:
    began_at = time.perf_counter()
    with fewer_collections():
        for _ in Trial(settings, synthetic(settings.seed)).rows():
            pass
    return time.perf_counter() - began_at
