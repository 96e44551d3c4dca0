"""The shape of every merge rule: a pair of pure functions, closed under `chain`.

Belongs here: the types that rules share and how rules are put together. A rule itself lives in the module
of its family; which rules exist is said in `rules.py`.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

Params = dict[str, Tensor]
"""A model's parameters and buffers by name, as in `Module.state_dict()`."""

State = Any
"""What a rule remembers between merges. Held by the caller, never by the rule."""


Report = Mapping[str, str | float]
"""What a merge did, for the operator: a few names and figures, fit for one line of a log."""

MODEL, SAMPLES, VALIDATION = "model", "samples", "validation"
"""What a rule may need of the receiver: its network, its training samples, samples it does not train on."""


class Part(NamedTuple):
    """One received model behind a mean, and its share of the received ones; the shares of a mean add up to 1."""

    share: float
    params: Params


@dataclass(frozen=True, slots=True)
class Contribution:
    """A model that takes part in a merge.

    weight: positive, usually the number of samples it was trained on.
    staleness: rounds it lags behind the receiver, >= 0.
    parts: set once the contribution is itself a mean of others: the received models behind it, for the rules
        that correct a mean by what went into it. Empty for a model as it was received.
    own_share: of a mean, how much of it is the receiver's own model; the parts share the rest.
    """

    params: Params
    weight: float = 1.0
    staleness: int = 0
    source: str = ""
    parts: tuple[Part, ...] = ()
    own_share: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Receiver:
    """What a rule may use of the node that merges, besides its parameters.

    model: a module of the task, to work in: its contents are overwritten, and mean nothing.
    loss: (outputs, targets) -> the mean over the samples of what is to be made small.
    metrics: (outputs, targets) -> numbers by name.
    samples: inputs [samples, ...] and targets of the receiver's own training data.
    validation: the same, of own data that it does not train on; None where none is held out.
    probe: inputs that all nodes share; None where the task has none.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Tensor, Tensor], Mapping[str, float]]
    samples: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None = None
    probe: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Local(Contribution):
    """The receiver's own model, and where it is known, the receiver."""

    receiver: Receiver | None = None


def receiver_of(local: Contribution) -> Receiver:
    """Raises ValueError where the caller gave none: only a rule that names it in `needs` may ask."""
    receiver = local.receiver if isinstance(local, Local) else None
    if receiver is None:
        raise ValueError("this rule needs the receiver's network and data: pass a Local with a Receiver")
    return receiver


def _reports_nothing(state: State) -> Report:
    return {}


class Rule(NamedTuple):
    """init(params) -> state; update(contributions, state, local) -> (contributions, state).

    `contributions` are the received models, `local` is the receiver's own. A rule never writes into a tensor
    it was given.

    needs: of MODEL, SAMPLES and VALIDATION, what of the receiver it uses. Without any `local` may be a plain
        Contribution.
    report: of the state after an update: what that update did.
    """

    init: Callable[[Params], State]
    update: Callable[[Sequence[Contribution], State, Contribution], tuple[list[Contribution], State]]
    needs: frozenset[str] = frozenset()
    report: Callable[[State], Report] = _reports_nothing


def stateless(
    function: Callable[[Sequence[Contribution], Contribution], list[Contribution]],
    needs: Iterable[str] = (),
) -> Rule:
    """A rule that remembers nothing."""
    return Rule(
        init=lambda params: (),
        update=lambda contributions, state, local: (function(contributions, local), state),
        needs=frozenset(needs),
    )


def reporting(
    function: Callable[[Sequence[Contribution], Contribution], tuple[list[Contribution], Report]],
    needs: Iterable[str] = (),
) -> Rule:
    """A rule that remembers nothing but what it did last."""
    return Rule(
        init=lambda params: {},
        update=lambda contributions, state, local: function(contributions, local),
        needs=frozenset(needs),
        report=lambda state: state,
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

    def report(state: State) -> Report:
        reports = (rule.report(each) for rule, each in zip(rules, state, strict=True))
        return {name: value for each in reports for name, value in each.items()}

    return Rule(
        init=lambda params: tuple(rule.init(params) for rule in rules),
        update=update,
        needs=frozenset[str]().union(*(rule.needs for rule in rules)),
        report=report,
    )


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; a bool is not a number here.

    >>> is_number(0.5), is_number(float("nan")), is_number(True), is_number("1")
    (True, False, False, False)
    """
    # The comparison is false for NaN too, and takes an int that no float could hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require_count(argument: str, value: object, least: int = 1) -> None:
    """Check that an argument is a whole number of at least `least`. Raises ValueError as `require` does."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(is_count, argument, f"a whole number of at least {least}", value)


def require(condition: bool, argument: str, allowed: str, value: object) -> None:
    """Check one argument of a rule's factory.

    Raises ValueError, with the argument's name, what is allowed and what was given, where `condition` is false.
    """
    if not condition:
        raise ValueError(f"{argument} must be {allowed}, not {value!r}")
