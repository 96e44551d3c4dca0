"""The shape of every merge rule: a pair of pure functions, closed under `chain`.

Belongs here: the types that rules share and how rules are put together. A rule itself lives in the module
of its family; which rules exist is said in `rules.py`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

Params = dict[str, Tensor]
"""A model's parameters and buffers by name, as in `Module.state_dict()`."""

State = Any
"""What a rule remembers between merges. Held by the caller, never by the rule."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """A model that takes part in a merge.

    weight: positive, usually the number of samples it was trained on.
    staleness: rounds it lags behind the receiver, >= 0.
    variances: set once the contribution is itself the mean of others: for each floating tensor the weighted
        mean of their whole-tensor population variances, which variance correction needs.
    num_merged: how many received models it is the mean of; 0 for a model as it was received.
    """

    params: Params
    weight: float = 1.0
    staleness: int = 0
    source: str = ""
    variances: Mapping[str, float] | None = None
    num_merged: int = 0


class Rule(NamedTuple):
    """init(params) -> state; update(contributions, state, local) -> (contributions, state).

    `contributions` are the received models, `local` is the receiver's own. A rule never writes into a tensor
    it was given.
    """

    init: Callable[[Params], State]
    update: Callable[[Sequence[Contribution], State, Contribution], tuple[list[Contribution], State]]


def stateless(
    function: Callable[[Sequence[Contribution], Contribution], list[Contribution]],
) -> Rule:
    """A rule that remembers nothing."""
    return Rule(
        init=lambda params: (),
        update=lambda contributions, state, local: (function(contributions, local), state),
    )


def chain(*rules: Rule) -> Rule:
    """One rule after another, each on what the one before left. `chain()` changes nothing."""

    def update(
        contributions: Sequence[Contribution], state: State, local: Contribution
    ) -> tuple[list[Contribution], State]:
        current, states = list(contributions), []
        for rule, rule_state in zip(rules, state, strict=True):
            current, after = rule.update(current, rule_state, local)
            states.append(after)
        return current, tuple(states)

    return Rule(init=lambda params: tuple(rule.init(params) for rule in rules), update=update)


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; a bool is not a number here.

    >>> is_number(0.5), is_number(float("nan")), is_number(True), is_number("1")
    (True, False, False, False)
    """
    # The comparison is false for NaN too, and takes an int that no float could hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require(condition: bool, argument: str, allowed: str, value: object) -> None:
    """Check one argument of a rule's factory.

    Raises ValueError, with the argument's name, what is allowed and what was given, where `condition` is false.
    """
    if not condition:
        raise ValueError(f"{argument} must be {allowed}, not {value!r}")
