"""The merge rules there are, by name, and how a list of names becomes one rule.

Belongs here: the registry, building and running. To add a rule, write its factory in its family's module and
one entry in `RULES`; the laws in tests/aggregation/test_laws.py then hold for it too.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aggregation import averaging, variance
from aggregation.base import Contribution, Params, Rule, State, chain, is_number


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """A rule that configuration can name.

    factory: makes the rule. Every argument has a default and can be given by keyword; a wrong value raises
        ValueError with the argument's name and the allowed range.
    summary: one line for lists and help.
    source: the paper and the section the rule comes from.
    reduces: leaves exactly one contribution however many come in. A rule that does not reduce may drop or
        change contributions, never make more of them.
    order_free: the order of the contributions does not matter, rounding apart.
    common_start: whether the models have to come from one start: "yes", "no", or "alike": it does not change that
        the others in the chain may need one.
    time, memory: of one merge, beyond the models themselves: n received models, d parameters, f one forward pass of
        the probe set through one model, C the widest hidden layer.
    when: in which case to take it, in one sentence.
    scale_free: a common factor on all models comes out as that factor.
    """

    factory: Callable[..., Rule]
    summary: str
    source: str
    reduces: bool
    order_free: bool
    common_start: str
    time: str
    memory: str
    when: str
    scale_free: bool = True


RULES: dict[str, RuleEntry] = {
    "mean": RuleEntry(
        factory=averaging.mean,
        summary="weighted mean of the received models, mixed with the local one",
        source="arXiv 2404.04616, conservative averaging",
        reduces=True,
        order_free=True,
        common_start="yes",
        time="n d",
        memory="d",
        when="The nodes began from one model, or something before it in the list has aligned them.",
    ),
    "variance.corrected": RuleEntry(
        factory=variance.corrected,
        summary="the mean, its weights stretched back to the variance of the received models",
        source="arXiv 2404.04616, variance-corrected averaging",
        reduces=True,
        order_free=True,
        common_start="no",
        time="(2 n + 3) d, behind a mean (n + 3) d",
        memory="d",
        when="The nodes began from different models and learn on together: it keeps signals alive until they agree.",
    ),
}


def build(specs: Sequence[str | Mapping[str, Any]]) -> Rule:
    """One rule from a list of specs, applied in the order given.

    A spec is a rule's name or a table {"name": ..., argument: value, ...}. At least one of the rules reduces.

    The built rule checks what it is given, once, before the first link: every contribution and the local model
    are finite, every contribution has the local model's names, shapes and dtypes, a finite weight above 0 and
    a staleness of at least 0. Its `update` raises ValueError naming the source and the tensor otherwise.

    Raises ValueError with the spec's index, the problem and what is allowed.

    >>> rule = build(["mean", {"name": "variance.corrected", "target": "own"}])
    """
    if isinstance(specs, str | Mapping):
        raise ValueError(f"rules must be a list of names or tables, not {specs!r}")
    built = [_build_one(index, spec) for index, spec in enumerate(specs)]
    if not any(entry.reduces for entry, _ in built):
        last = f"rules[{len(built) - 1}]" if built else "rules"
        reducing = ", ".join(name for name, entry in RULES.items() if entry.reduces)
        raise ValueError(
            f"{last}: the list ends with no rule having left exactly one contribution; add one of: {reducing}"
        )
    inner = chain(*(rule for _, rule in built))

    def update(
        contributions: Sequence[Contribution], state: State, local: Contribution
    ) -> tuple[list[Contribution], State]:
        _check(contributions, local)
        return inner.update(contributions, state, local)

    return inner._replace(update=update)


def merge(
    rule: Rule, contributions: Sequence[Contribution], state: State, local: Contribution
) -> tuple[Params, State]:
    """Run a rule from `build` on the received models; the merged parameters and the rule's next state.

    The result has the local model's names, shapes and dtypes, and may share tensors with it: copy it into the
    model (`load_state_dict` does) rather than train on it in place.

    Raises ValueError as said at `build`, or if the rule leaves another number of contributions than one.
    """
    merged, after = rule.update(contributions, state, local)
    if len(merged) != 1:
        raise ValueError(f"the rule left {len(merged)} contributions instead of one; make it with build()")
    return merged[0].params, after


def _build_one(index: int, spec: str | Mapping[str, Any]) -> tuple[RuleEntry, Rule]:
    name, arguments = _split(index, spec)
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"rules[{index}]: no rule is called {name!r}; there are: {', '.join(RULES)}")
    entry = RULES[name]
    signature = inspect.signature(entry.factory)
    where, allowed = f"rules[{index}] {name}", ", ".join(signature.parameters) or "no arguments"
    unknown = [str(key) for key in arguments if key not in signature.parameters]
    if unknown:
        raise ValueError(f"{where}: unknown argument {', '.join(unknown)}; it takes {allowed}")
    try:
        signature.bind(**arguments)
    except TypeError as problem:
        raise ValueError(f"{where}: {problem}; it takes {allowed}") from None
    try:
        return entry, entry.factory(**arguments)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from problem


def _split(index: int, spec: str | Mapping[str, Any]) -> tuple[object, dict[str, Any]]:
    """A spec's name and its arguments."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ValueError(
            f"rules[{index}]: must be a rule's name or a table with the key 'name', not {spec!r}"
        )
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def _check(contributions: Sequence[Contribution], local: Contribution) -> None:
    _check_finite("the local model", local.params)
    for contribution in contributions:
        who = f"contribution from {contribution.source!r}"
        if not (is_number(contribution.weight) and contribution.weight > 0):
            raise ValueError(f"{who}: weight must be finite and above 0, not {contribution.weight!r}")
        if not (is_number(contribution.staleness) and contribution.staleness >= 0):
            raise ValueError(f"{who}: staleness must be at least 0, not {contribution.staleness!r}")
        _check_layout(who, contribution.params, local.params)
        _check_finite(who, contribution.params)


def _check_layout(who: str, params: Params, expected: Params) -> None:
    for name in expected:
        if name not in params:
            raise ValueError(f"{who}: tensor {name!r} is missing")
    for name in params:
        if name not in expected:
            raise ValueError(f"{who}: tensor {name!r} is not in the local model")
    for name, tensor in params.items():
        if _layout(tensor) != _layout(expected[name]):
            raise ValueError(
                f"{who}: tensor {name!r} is {_layout(tensor)}, expected {_layout(expected[name])}"
            )


def _layout(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check_finite(who: str, params: Params) -> None:
    for name, tensor in params.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{who}: tensor {name!r} holds a value that is not finite")
