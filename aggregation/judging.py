"""Models judged on the receiver's validation samples: which to average, and whether to take the result.

Belongs here: soups, and the rules that compare whole results. How a model is scored is said in `scoring.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from aggregation import averaging
from aggregation.base import (
    MODEL,
    VALIDATION,
    Contribution,
    Params,
    Report,
    Rule,
    State,
    is_number,
    receiver_of,
    reporting,
    require,
    stateless,
)
from aggregation.scoring import figure, require_measure, score


# --- soups ----------------------------------------------------------------------------------------------
def uniform_soup() -> Rule:
    """The plain mean of all models, the receiver's own among them; weights and staleness do not count.

    As `averaging.mean` treats dtypes, counters, agreement and `parts`. Running statistics of BatchNorm are
    averaged like the rest: re-estimate them afterwards if they matter.

    Source: arXiv 2203.05482, uniform soup.
    """
    return stateless(lambda contributions, local: [_mean_of(contributions, True, local)])


def greedy_soup(by: str = "loss") -> Rule:
    """The plain mean of the best model and of those others that do not make it worse.

    Candidates are the receiver's own model and the received ones, sorted by the receiver's validation score,
    equal ones by the name of their source, the own first. Beginning with the best, each next one stays in the
    mean if the mean then scores at least as well. On the validation samples the result is never worse than
    the best single model, the own one included; a model that spoils the mean is left out, which makes this a
    defence too.

    A model whose score is no finite number is no candidate. Running statistics of BatchNorm are averaged like
    the rest, when scores are taken too.

    Args:
        by: "loss" or "accuracy"; by accuracy ties are frequent, and let more models in.

    Raises ValueError for an argument outside its range.

    Source: arXiv 2203.05482, greedy soup. Among the candidates of a node are its own model and its peers'
    only.
    """
    require_measure(by)

    def function(
        contributions: Sequence[Contribution], local: Contribution
    ) -> tuple[list[Contribution], Report]:
        receiver = receiver_of(local)

        def judged(members: Sequence[Contribution | None]) -> float:
            return score(receiver, _soup(members, local).params, by)

        # None is the own model: not to be mistaken for a received one of the same source.
        ranked = sorted(
            ((judged([each]), each) for each in [None, *contributions]),
            key=lambda pair: (-pair[0], "" if pair[1] is None else pair[1].source),
        )
        soup: list[Contribution | None] = []
        best = -math.inf
        for single, candidate in ranked:
            mixed = judged([*soup, candidate]) if soup else single
            if mixed >= best and min(single, mixed) > -math.inf:
                soup.append(candidate)
                best = mixed
        report: Report = {"soup_size": len(soup), f"soup_{by}": figure(best, by)}
        return [_soup(soup, local)], report

    return reporting(function, needs={MODEL, VALIDATION})


def _soup(members: Sequence[Contribution | None], local: Contribution) -> Contribution:
    """The plain mean of `members`, where None stands for the local model; of none, the local model."""
    received = [member for member in members if member is not None]
    return _mean_of(received, None in members, local)


def _mean_of(contributions: Sequence[Contribution], with_own: bool, local: Contribution) -> Contribution:
    """The plain mean of `contributions`, and of the local model if so asked; of none, the local model."""
    share = 1 / (len(contributions) + 1) if with_own else 0.0
    equal = [replace(other, weight=1.0) for other in contributions]
    (merged,), _ = averaging.mean(share).update(equal, (), local)
    return merged


# --- accepting ------------------------------------------------------------------------------------------
def accept(by: str = "loss", tolerance: float = 0.0) -> Rule:
    """What was merged, if its score on the receiver's validation samples is no worse than the own model's.

    Otherwise the local model. Stands behind a mean. Given several contributions it averages them first, by
    `averaging.mean` as it is; a single one is judged as it came.

    Where nodes hold different data and merge seldom, a merged model often scores worse at first and better
    after some training; and where peers hold other classes, the receiver's samples cannot tell what they know.
    There this rule keeps nodes apart that should come together.

    Args:
        by: "loss" or "accuracy".
        tolerance: by how much the measure may be worse, at least 0, in the measure's own unit.

    Raises ValueError for an argument outside its range.

    Source: ours, after the greedy soup of arXiv 2203.05482, which keeps a candidate on the same condition.
    """
    require_measure(by)
    require(is_number(tolerance) and tolerance >= 0, "tolerance", "a number of at least 0", tolerance)

    def function(
        contributions: Sequence[Contribution], local: Contribution
    ) -> tuple[list[Contribution], Report]:
        receiver = receiver_of(local)
        (merged,) = contributions if len(contributions) == 1 else _averaged(contributions, local)
        after, before = score(receiver, merged.params, by), score(receiver, local.params, by)
        accepted = after > -math.inf and after >= before - tolerance
        report: Report = {
            "accepted": "yes" if accepted else "no",
            f"own_{by}": figure(before, by),
            f"merged_{by}": figure(after, by),
        }
        return [merged if accepted else _plain(local)], report

    return reporting(function, needs={MODEL, VALIDATION})


def _averaged(contributions: Sequence[Contribution], local: Contribution) -> list[Contribution]:
    merged, _ = averaging.mean().update(contributions, (), local)
    return merged


def _plain(local: Contribution) -> Contribution:
    """The local model as a contribution like any other, without the receiver."""
    return Contribution(local.params, local.weight, local.staleness, local.source)


# --- choosing -------------------------------------------------------------------------------------------
Specs = Sequence[str | Mapping[str, Any]]


class Choices(NamedTuple):
    """What every alternative remembers, and what was chosen last."""

    states: tuple[State, ...]
    report: Report


def choose(
    of: Sequence[Specs] = (("mean",), ("variance.corrected",)), by: str = "loss", own: bool = True
) -> Rule:
    """Runs several lists of rules on the same contributions and keeps the result that scores best.

    The score is the receiver's, on its validation samples; of equal ones the earlier counts, the own model
    last. Every list remembers its own merges, as if it had been chosen each time. Where no result has a
    finite score the local model stays. Costs what all the lists cost, and an evaluation for each.

    Args:
        of: one or more lists of rules, each as for `build` and each with a rule that reduces.
        by: "loss" or "accuracy".
        own: whether the local model is a candidate too: then no merge makes the score worse. Say false where peers
            hold other classes than the receiver: on its own ones its own model always wins, and nothing is learned.

    Raises ValueError for an argument outside its range, with the place of a mistake in a list.

    Source: ours.
    """
    from aggregation.rules import build  # the registry names this rule, so it cannot be asked for sooner

    is_list = isinstance(of, Sequence) and not isinstance(of, str) and len(of) > 0
    require(is_list, "of", "a list of one or more lists of rules", of)
    require_measure(by)
    require(isinstance(own, bool), "own", "true or false", own)
    rules = []
    for index, specs in enumerate(of):
        try:
            rules.append(build(specs))
        except ValueError as problem:
            raise ValueError(f"of[{index}]: {problem}") from problem

    def update(
        contributions: Sequence[Contribution], state: State, local: Contribution
    ) -> tuple[list[Contribution], State]:
        receiver = receiver_of(local)
        choices: Choices = state
        results, states = [], []
        for rule, before in zip(rules, choices.states, strict=True):
            (result,), after = rule.update(contributions, before, local)
            results.append(result)
            states.append(after)
        named = {f"of[{index}]": result for index, result in enumerate(results)}
        if own:
            named["own"] = _plain(local)
        scores = {name: score(receiver, candidate.params, by) for name, candidate in named.items()}
        chosen = max(scores, key=lambda name: scores[name])
        is_usable = scores[chosen] > -math.inf
        report: Report = {
            "chosen": chosen if is_usable else "own",
            **{f"{name}_{by}": figure(value, by) for name, value in scores.items()},
        }
        return [named[chosen] if is_usable else _plain(local)], Choices(tuple(states), report)

    def init(params: Params) -> Choices:
        return Choices(tuple(rule.init(params) for rule in rules), {})

    return Rule(
        init=init,
        update=update,
        needs=frozenset({MODEL, VALIDATION}).union(*(rule.needs for rule in rules)),
        report=lambda state: state.report,
    )
