"""Two groups of users mean different things by the same words: does each find its own meaning first, and how soon?

    python benchmarks/personal.py [--seeds 10] [--rounds 40] [--sizes FIRST SECOND]... [--json]

Each of 40 words is a tag of three items of either meaning, so that metadata cannot tell them apart. In every round each user
asks for a word drawn at random, looks down its results, and clicks the first item of its own meaning; one click in twenty
goes to any of the results. After the round all clicks are on every user's log. So rankers are judged on clicks that they
themselves led to.

first           share of the queries of the last quarter of the rounds with an item of the own meaning on top, for the first
                (larger) group and for the second
newcomer N      the same over all words, for one who comes then, with what the others know and N clicks of its own; of one group
                or the other as often as users are. Below it: over the words alone for which it has never clicked
Figures are means over seeds, +- the deviation between them, in per cent. 50 is chance. With `--json` newcomers are also by
group: `newcomer_N_1`, `newcomer_N_2`.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aggregation.ranking import ClickLog, Query, rank

NUM_WORDS = 40
ITEMS_PER_MEANING = 3
MISTAKES = 0.05
NEWCOMERS_PER_GROUP = 4
NEWCOMER_CLICKS = (0, 1, 10, 100)
GROUPS = (0, 1)
NETWORKS = ([20, 20], [30, 10], [45, 5])
RANKERS = (
    ("g-rank", 0.0),
    ("g-rank", 0.001),
    ("g-rank", 0.01),
    ("g-rank", 0.1),
    ("g-rank", 1.0),
    ("g-rank-capped", 0.001),
    ("popularity", 0.0),
    ("panache", 0.0),
    ("maay", 0.0),
    ("bm25", 0.0),
)
Click = tuple[bytes, list[str], bytes]


class Catalogue:
    """Words, each with items of both meanings. An item's number is that of every log here, and tells nothing of its group."""

    def __init__(self, generator: random.Random) -> None:
        self.words = [f"word{n:02d}" for n in range(NUM_WORDS)]
        meanings = [
            (word, group) for word in self.words for group in GROUPS for _ in range(ITEMS_PER_MEANING)
        ]
        generator.shuffle(meanings)
        self.items = [b"item%04d" % n for n in range(len(meanings))]
        self.group_of = [group for _, group in meanings]
        self._matching = {
            word: np.array([n for n, (has, _) in enumerate(meanings) if has == word]) for word in self.words
        }

    def log(self, me: bytes) -> ClickLog:
        """An empty one, in which items have the numbers that they have here."""
        log = ClickLog(me)
        for item in self.items:
            log.item_index(item)
        return log

    def query(self, word: str, seed: int) -> Query:
        matching = self._matching[word]
        return Query((word,), matching, np.ones(len(matching), dtype=np.int64), seed=seed)


@dataclass
class User:
    """One who asks and clicks; `clicked_for`: the words it has ever clicked for."""

    name: bytes
    group: int
    log: ClickLog
    ranker: tuple[str, float]
    catalogue: Catalogue
    clicked_for: set[str] = field(default_factory=set)

    def results(self, word: str, seed: int) -> list[int]:
        name, isolation = self.ranker
        items: list[int] = rank(name, self.log, self.catalogue.query(word, seed), isolation).items.tolist()
        return items

    def finds_own_first(self, word: str, seed: int) -> bool:
        return self.catalogue.group_of[self.results(word, seed)[0]] == self.group

    def ask(self, generator: random.Random) -> tuple[bool, Click]:
        """Whether an item of the own meaning was on top, and the click that followed."""
        word = generator.choice(self.catalogue.words)
        results = self.results(word, generator.getrandbits(32))
        own = [item for item in results if self.catalogue.group_of[item] == self.group]
        chosen = generator.choice(results) if generator.random() < MISTAKES else own[0]
        self.clicked_for.add(word)
        return results[0] == own[0], (self.name, [word], self.catalogue.items[chosen])


def run(ranker: tuple[str, float], sizes: Sequence[int], rounds: int, seed: int) -> dict[str, float]:
    """The figures of one network, by name, from 0 to 1."""
    generator = random.Random(seed)
    catalogue = Catalogue(generator)
    groups = [group for group in GROUPS for _ in range(sizes[group])]
    names = [b"user%03d" % n for n in range(len(groups))]
    users = [
        User(name, group, catalogue.log(name), ranker, catalogue)
        for name, group in zip(names, groups, strict=True)
    ]
    found: dict[int, list[bool]] = {group: [] for group in GROUPS}
    for number in range(rounds):
        clicks = []
        for user in users:
            own_first, click = user.ask(generator)
            clicks.append(click)
            if number >= rounds * 3 // 4:
                found[user.group].append(own_first)
        for user in users:
            for click in clicks:
                user.log.add(*click)
    figures = {f"first_{group + 1}": statistics.fmean(found[group]) for group in GROUPS}
    by_group = [_newcomers(users[0], group, generator) for group in GROUPS]
    for name in by_group[0].keys() & by_group[1].keys():
        each = [found[name] for found in by_group]
        figures |= {f"{name}_{group + 1}": each[group] for group in GROUPS}
        figures[name] = float(np.average(each, weights=sizes))
    return figures


def _newcomers(known: User, group: int, generator: random.Random) -> dict[str, float]:
    """Of one group, each alone, after what `known` knows."""
    arrays = known.log.to_arrays()
    shares: dict[str, list[float]] = {}
    for _ in range(NEWCOMERS_PER_GROUP):
        log = ClickLog.from_arrays(b"newcomer", arrays)
        user = User(b"newcomer", group, log, known.ranker, known.catalogue)
        done = 0
        for num_clicks in NEWCOMER_CLICKS:
            for _ in range(num_clicks - done):
                log.add(*user.ask(generator)[1])
            done = num_clicks
            for word in known.catalogue.words:
                own_first = user.finds_own_first(word, generator.getrandbits(32))
                shares.setdefault(f"newcomer_{num_clicks}", []).append(own_first)
                if word not in user.clicked_for:
                    shares.setdefault(f"newcomer_{num_clicks}_other_words", []).append(own_first)
    return {name: statistics.fmean(values) for name, values in shares.items()}


def summary(runs: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and deviation of each figure over seeds."""
    columns: dict[str, list[float]] = {}
    for figures in runs:
        for name, value in figures.items():
            columns.setdefault(name, []).append(value)
    return {
        name: {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values)}
        for name, values in columns.items()
    }


def print_table(sizes: Sequence[int], rows: list[dict[str, Any]]) -> None:
    print(f"\n{sizes[0]} users of the first group, {sizes[1]} of the second")
    names = ["first_1", "first_2", *(f"newcomer_{n}" for n in NEWCOMER_CLICKS)]
    titles = ["first, 1", "first, 2", *(f"newcomer {n}" for n in NEWCOMER_CLICKS)]
    print(f"{'ranker':<20}" + "".join(f"{title:>14}" for title in titles))
    for row in rows:
        figures = row["figures"]
        print(f"{row['ranker'] + row['label']:<20}" + "".join(_cell(figures.get(name)) for name in names))
        others = [figures.get(f"{name}_other_words") for name in names]
        print(f"{'  other words':<20}" + "".join(_cell(figure) for figure in others))


def _cell(figure: dict[str, float] | None) -> str:
    return (
        f"{'':>14}" if figure is None else f"{100 * figure['mean']:>8.1f} +-{100 * figure['deviation']:>4.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=10, help="networks for each figure")
    parser.add_argument("--rounds", type=int, default=40, help="queries of each user")
    parser.add_argument("--sizes", type=int, nargs=2, action="append", metavar=("FIRST", "SECOND"))
    parser.add_argument("--json", action="store_true", help="one object instead of tables")
    options = parser.parse_args()
    report = []
    for sizes in options.sizes or NETWORKS:
        rows = []
        for name, isolation in RANKERS:
            runs = [run((name, isolation), sizes, options.rounds, seed) for seed in range(options.seeds)]
            label = f" F={isolation:g}" if name.startswith("g-rank") else ""
            rows.append({"ranker": name, "isolation": isolation, "label": label, "figures": summary(runs)})
        report.append({"sizes": sizes, "rankers": rows})
        if not options.json:
            print_table(sizes, rows)
    if options.json:
        print(json.dumps({"seeds": options.seeds, "rounds": options.rounds, "networks": report}))


if __name__ == "__main__":
    main()
