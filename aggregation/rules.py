"""The merge rules there are, by name, and how a list of names becomes one rule.

Belongs here: the registry, building and running. To add a rule, write its factory in its family's module and
one entry in `RULES`; the laws in tests/aggregation/test_laws.py then hold for it too.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aggregation import alignment, averaging, importance, judging, momentum, statistics, variance, weighting
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
    takes_one: works on one contribution, so that a rule that reduces has to stand before it.
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
    takes_one: bool = False


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
    "align.activation": RuleEntry(
        factory=alignment.by_activation,
        summary="reorders each received model's units to do what the receiver's own do on probe data",
        source="arXiv 2404.08079, DIMAT",
        reduces=False,
        order_free=True,
        common_start="no",
        time="(n + 1) f + n C^3 a layer",
        memory="n d + activations of 256 samples",
        when="The models grew up apart, and there is data on which all of them know something: the nodes' classes "
        "overlap, or they share a probe.",
        scale_free=False,
    ),
    "align.weight": RuleEntry(
        factory=alignment.by_weight,
        summary="reorders each received model's units so that its weights lie nearest to the receiver's own",
        source="arXiv 2209.04836, Git Re-Basin",
        reduces=False,
        order_free=True,
        common_start="no",
        time="n k (d C + C^3 a layer), k = 10 to 50 passes",
        memory="n d",
        when="The same without such data; as good on MLPs, well behind on deep residual networks.",
        scale_free=False,
    ),
    "norm.reestimate": RuleEntry(
        factory=statistics.norm_reestimate,
        summary="re-estimates BatchNorm's statistics of a mean on the receiver's data",
        source="arXiv 2404.08079, reset_bn",
        reduces=False,
        order_free=True,
        common_start="alike",
        time="f",
        memory="d",
        when="The network has BatchNorm: without it every merge of unlike networks is near chance.",
        scale_free=False,
        takes_one=True,
    ),
    "repair": RuleEntry(
        factory=statistics.repair,
        summary="rescales each unit of a mean so that it varies as much as in the models averaged",
        source="arXiv 2211.08403, REPAIR",
        reduces=False,
        order_free=True,
        common_start="no",
        time="(n + 2) f",
        memory="d + activations of the whole probe",
        when="Models were aligned and averaged, and the network has no BatchNorm.",
        scale_free=False,
        takes_one=True,
    ),
    "fedavg": RuleEntry(
        factory=weighting.fedavg,
        summary="weighted mean of all models, the local one among them by its own weight",
        source="arXiv 1602.05629, FederatedAveraging",
        reduces=True,
        order_free=True,
        common_start="yes",
        time="n d",
        memory="d",
        when="As mean, where the local model should count by its samples like any other.",
    ),
    "weight.staleness": RuleEntry(
        factory=weighting.staleness,
        summary="lowers the weights of models that lag behind",
        source="arXiv 1903.03934, FedAsync's staleness functions",
        reduces=False,
        order_free=True,
        common_start="alike",
        time="n",
        memory="0",
        when="Nodes differ in speed, and old models hold the others back.",
    ),
    "weight.metric": RuleEntry(
        factory=weighting.metric,
        summary="raises the weights of models with a low loss on the receiver's validation samples",
        source="arXiv 2504.18580, metrics-weighted averaging",
        reduces=False,
        order_free=True,
        common_start="alike",
        time="n f, f of the validation samples",
        memory="d",
        when="Models differ in quality, the receiver's validation samples are like everyone's data.",
        scale_free=False,
    ),
    "weight.participation": RuleEntry(
        factory=weighting.participation,
        summary="raises the weights of sources that come seldom, by how seldom they came so far",
        source="arXiv 2306.03401, FedAU",
        reduces=False,
        order_free=True,
        common_start="alike",
        time="n",
        memory="four numbers for each of up to 1,024 sources",
        when="Some nodes come rarely or at unknown odds, and their data should not be lost for it.",
    ),
    "weight.window": RuleEntry(
        factory=weighting.window,
        summary="multiplies weights by the merges since the source's last contribution",
        source="arXiv 2206.10189, FedFix",
        reduces=False,
        order_free=True,
        common_start="alike",
        time="n",
        memory="a number for each of up to 1,024 sources",
        when="Merges happen at fixed times and every node comes in a steady rhythm of its own.",
    ),
    "fisher": RuleEntry(
        factory=importance.fisher,
        summary="mean of all models, each parameter weighed by its Fisher information on the receiver's samples",
        source="arXiv 2111.09832, Fisher-weighted averaging",
        reduces=True,
        order_free=True,
        common_start="yes",
        time="(n + 1) forward and backward passes for each class, of up to `samples` training samples, and 3 n d",
        memory="(n + 3) d, and 2^22 entries or one gradient",
        when="Few classes and a small model, fine-tuned from one start on different data.",
        scale_free=False,
    ),
    "soup.uniform": RuleEntry(
        factory=judging.uniform_soup,
        summary="plain mean of all models, the local one among them, without weights",
        source="arXiv 2203.05482, uniform soup",
        reduces=True,
        order_free=True,
        common_start="yes",
        time="n d",
        memory="d",
        when="Models fine-tuned from one start, none of them bad.",
    ),
    "soup.greedy": RuleEntry(
        factory=judging.greedy_soup,
        summary="plain mean of the best model and those that do not make it worse on validation samples",
        source="arXiv 2203.05482, greedy soup",
        reduces=True,
        order_free=True,
        common_start="yes",
        time="(2 n + 1) f + n^2 d / 2, f of the validation samples",
        memory="2 d",
        when="Some of the models may be bad or hostile, and there are validation samples to tell.",
        scale_free=False,
    ),
    "accept": RuleEntry(
        factory=judging.accept,
        summary="keeps what was merged only if it is not worse than the local model on validation samples",
        source="ours, after the greedy soup's condition",
        reduces=True,
        order_free=True,
        common_start="alike",
        time="2 f, f of the validation samples",
        memory="d",
        when="Last in the list, to be safe from bad merges. Not while models are still far apart.",
        scale_free=False,
    ),
    "choose": RuleEntry(
        factory=judging.choose,
        summary="runs several lists of rules and keeps the result that is best on validation samples",
        source="ours",
        reduces=True,
        order_free=True,
        common_start="alike",
        time="that of all its lists, n d for checks and f for each, f of the validation samples",
        memory="that of all its lists, and d for each",
        when="It is not known beforehand which rule suits, and merges are rare enough to try.",
        scale_free=False,
    ),
    "momentum.outer": RuleEntry(
        factory=momentum.outer,
        summary="goes on from the merged model in the direction of the merges before",
        source="arXiv 2311.08105, DiLoCo; arXiv 2306.16504, FedAvg-M",
        reduces=False,
        order_free=True,
        common_start="alike",
        time="4 d",
        memory="4 d, half of it between merges",
        when="Behind a mean with many local steps between merges, or with data that differ from node to node.",
        takes_one=True,
    ),
}


def build(specs: Sequence[str | Mapping[str, Any]]) -> Rule:
    """One rule from a list of specs, applied in the order given.

    A spec is a rule's name or a table {"name": ..., argument: value, ...}. At least one of the rules reduces.

    The built rule checks what it is given, once, before the first link: every contribution and the local model
    are finite, every contribution has the local model's names, shapes and dtypes, a finite weight above 0 and
    a staleness of at least 0. Its `update` raises ValueError naming the source and the tensor otherwise. Integer and
    bool tensors of the contributions are replaced by the receiver's.

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
    _check_order([entry for entry, _ in built])
    inner = chain(*(rule for _, rule in built))

    def update(
        contributions: Sequence[Contribution], state: State, local: Contribution
    ) -> tuple[list[Contribution], State]:
        _check(contributions, local)
        return inner.update([_with_own_integers(other, local) for other in contributions], state, local)

    return inner._replace(update=update)


def _with_own_integers(other: Contribution, local: Contribution) -> Contribution:
    """Counters, masks and index tables are the receiver's: those of a peer may point anywhere."""
    foreign = {
        name: own
        for name, own in local.params.items()
        if not own.is_floating_point() and not torch.equal(own, other.params[name])
    }
    return replace(other, params={**other.params, **foreign}) if foreign else other


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


def _check_order(entries: Sequence[RuleEntry]) -> None:
    for index, entry in enumerate(entries):
        if entry.takes_one and not any(before.reduces for before in entries[:index]):
            reducing = ", ".join(name for name, each in RULES.items() if each.reduces)
            raise ValueError(
                f"rules[{index}]: it takes exactly one contribution; put one of these before it: {reducing}"
            )


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
        if not _is_finite(tensor.detach()):
            raise ValueError(f"{who}: tensor {name!r} holds a value that is not finite")


def _is_finite(tensor: Tensor) -> bool:
    """Whether every entry is. Ten times as fast as to ask each, and without a copy."""
    # A sum of large entries may overflow, and then their ends have to tell; most of the time it suffices.
    return math.isfinite(tensor.sum()) or all(math.isfinite(end) for end in torch.aminmax(tensor))
