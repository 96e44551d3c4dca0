"""The merge rules of a node by what they are for, and what they may use of it.

Belongs here: from a config's rules to built ones, and from a task to the `Receiver` that rules see. One code for the
daemon and the simulator.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aggregation.base import VALIDATION, Contribution, Local, Params, Receiver, Report, Rule, State
from aggregation.probes import evenly_spaced
from aggregation.rules import build, merge
from node.partition import Indices
from node.tasks import Task
from protocols.errors import ConfigError

Specs = Sequence[str | Mapping[str, Any]]

ROUND, FINAL, ACCEPT = "round", "final", "accept"
"""As in `protocols.events.Aggregate`."""


_FINAL_PREFIX = "final: "


def build_rules(specs: Specs, final: Specs | None, judges_final: bool = False) -> dict[str, Rule]:
    """A rule for each kind of merge that this node will do.

    final: of the final merge; None where there is none. judges_final: whether it is judged before it is kept.

    Raises ValueError as `aggregation.rules.build` does, for the final rule with "final: " before it.
    """
    rules = {ROUND: build(specs)}
    if final is not None:
        try:
            rules[FINAL] = build(final)
        except ValueError as error:
            raise ValueError(f"{_FINAL_PREFIX}{error}") from error
        if judges_final:
            rules[ACCEPT] = build(("accept",))
    return rules


def rule_error(error: ValueError, table: str = "learning.") -> ConfigError:
    """What `build_rules` or `rehearse` raised, at the field that it is about."""
    text = str(error)
    if text.startswith(_FINAL_PREFIX):
        return ConfigError(f"{table}final_rule", text.removeprefix(_FINAL_PREFIX))
    return ConfigError(f"{table}rule", text)


def judges(rules: dict[str, Rule]) -> bool:
    """Whether one of the rules judges models on data that the node does not train on."""
    return any(VALIDATION in rule.needs for rule in rules.values())


def hold_out(indices: Indices, share: float) -> tuple[Indices, Indices]:
    """A node's samples as those it trains on and those it judges by: evenly spaced, at least one of each.

    A single sample is both.
    """
    count = min(max(1, round(share * len(indices))), len(indices) - 1)
    if count < 1:
        return indices, indices
    places = evenly_spaced(len(indices), count).numpy()
    return np.delete(indices, places), indices[places]


def rehearse(rules: Mapping[str, Rule], params: Params, receiver: Receiver) -> None:
    """Merge once with a slightly shaken copy of the node's own model, for rules that need more than models.

    What a rule misses (a network that can be traced, a shared probe, a metric it judges by) is told at the start, and
    not amid the first round.

    Raises ValueError, for a final rule with "final: " before it.
    """
    for kind, rule in rules.items():
        if not rule.needs:
            continue
        local = Local(params, source="own", receiver=receiver)
        try:
            merge(rule, [Contribution(_shaken(params), source="rehearsal")], rule.init(params), local)
        except Exception as error:  # a user's network, loss or metrics may raise anything
            raise ValueError(f"{_FINAL_PREFIX if kind == FINAL else ''}{error}") from error


def _shaken(params: Params) -> Params:
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return {
        name: tensor * (1 + 1e-3 * noise(tensor)) if tensor.is_floating_point() else tensor
        for name, tensor in params.items()
    }


def merge_usable(
    rule: Rule, contributions: Sequence[Contribution], state: State, local: Contribution
) -> tuple[Params, State, Report]:
    """Merge; where that raises, without the models that cannot be merged even alone with the receiver's.

    What a peer sent may be legal and still make a network, a loss or an assignment raise. One such model must not cost
    the others theirs, round after round. The report names the sources left out, in "unusable".

    Raises what the merge raised where no model is usable, or none is to blame.
    """
    try:
        params, after = merge(rule, contributions, state, local)
        return params, after, rule.report(after)
    except Exception:  # a user's network, loss or metrics may raise anything
        if len(contributions) < 2:
            raise
        usable = [other for other in contributions if _is_usable(rule, other, state, local)]
        if not usable or len(usable) == len(contributions):
            raise
        params, after = merge(rule, usable, state, local)
        left_out = [other.source for other in contributions if all(other is not kept for kept in usable)]
        return params, after, {**rule.report(after), "unusable": ", ".join(left_out)}


def _is_usable(rule: Rule, other: Contribution, state: State, local: Contribution) -> bool:
    try:
        merge(rule, [other], state, local)
    except Exception:  # as above
        return False
    return True


def make_receiver(task: Task, model: nn.Module, validation: tuple[Tensor, Tensor] | None) -> Receiver:
    """What rules may use of a node that trains on this task.

    model: a module of the task to work in. validation: inputs and targets that the node does not train on.
    """
    return Receiver(model, task.loss, task.metrics, task.train, validation, task.probe)
