"""Rules by what they are for, and what a node holds out and gives to them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aggregation.base import Contribution, Local, Params
from node.merging import (
    build_rules,
    hold_out,
    judges,
    make_receiver,
    merge_usable,
    rehearse,
    rule_error,
)
from node.tasks import Task, build_model, initial_params, mlp


def toy(**changes: object) -> Task:
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2
    return Task("toy", **{"model": lambda: mlp(3, [4], 2), "train": data, "test": data, **changes})


# --- holding out ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "share", "expected"), [(100, 0.1, 10), (10, 0.1, 1), (3, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1)]
)
def test_samples_are_held_out_evenly_and_every_one_is_on_one_side(
    count: int, share: float, expected: int
) -> None:
    indices = np.arange(count) * 7
    own, held = hold_out(indices, share)

    assert len(held) == expected
    assert sorted([*own, *held]) == indices.tolist()
    assert expected == 1 or np.diff(held).min() >= 7 * (count // expected)


def test_a_single_sample_is_both() -> None:
    own, held = hold_out(np.array([5]), 0.1)

    assert own.tolist() == held.tolist() == [5]


def test_a_receiver_has_the_tasks_own_tensors() -> None:
    task = toy(probe=torch.ones(4, 3))

    receiver = make_receiver(task, build_model(task), None)

    assert receiver.samples is task.train, "no second copy of the data"
    assert receiver.probe is task.probe


# --- rules by what they are for -------------------------------------------------------------------------
def test_only_a_final_merge_needs_its_rules() -> None:
    assert list(build_rules(["mean"], None)) == ["round"]
    assert list(build_rules(["mean"], ["fedavg"])) == ["round", "final"]
    assert list(build_rules(["mean"], ["fedavg"], judges_final=True)) == ["round", "final", "accept"]


def test_samples_are_held_out_where_a_rule_judges() -> None:
    assert not judges(build_rules(["align.activation", "mean"], ["fedavg"]))
    assert judges(build_rules(["mean", "accept"], None))
    assert judges(build_rules(["mean"], ["fedavg"], judges_final=True))


def test_mistakes_are_told_at_the_field_they_are_about() -> None:
    with pytest.raises(ValueError, match="no rule is called 'krum'") as caught:
        build_rules(["krum"], ["fedavg"])
    assert rule_error(caught.value).path == "learning.rule"
    with pytest.raises(ValueError, match="no rule is called 'krum'") as caught:
        build_rules(["mean"], ["krum"])
    assert rule_error(caught.value).path == "learning.final_rule"
    assert rule_error(caught.value, table="").path == "final_rule"


# --- one bad model among good ones ----------------------------------------------------------------------
def given(params: Params, source: str) -> Contribution:
    return Contribution(params, source=source)


def test_one_model_that_makes_a_rule_raise_costs_the_others_nothing() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.abs().max() > 1e6:
            raise RuntimeError("all elements of input should be between 0 and 1")
        return torch.nn.functional.cross_entropy(outputs, targets)

    task = toy(loss=loss)
    own, other = initial_params(task, 1), initial_params(task, 2)
    bad = {name: torch.full_like(tensor, 1e9) for name, tensor in own.items()}
    rule = build_rules(["weight.metric", "mean"], None)["round"]
    local = Local(own, receiver=make_receiver(task, build_model(task), task.test))

    params, _, report = merge_usable(
        rule, [given(bad, "liar"), given(other, "honest")], rule.init(own), local
    )

    assert report["unusable"] == "liar"
    assert all(torch.allclose(params[name], (own[name] + other[name]) / 2) for name in own)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        merge_usable(rule, [given(bad, "liar")], rule.init(own), local)


def test_a_merge_that_fails_for_all_is_not_tried_without_some() -> None:
    task = toy(metrics=lambda outputs, targets: {"f1": 0.5})
    own = initial_params(task, 1)
    rule = build_rules(["mean", {"name": "accept", "by": "accuracy"}], None)["round"]
    local = Local(own, receiver=make_receiver(task, build_model(task), task.test))
    received = [given(initial_params(task, seed), f"p{seed}") for seed in (2, 3)]

    with pytest.raises(ValueError, match="accuracy"):
        merge_usable(rule, received, rule.init(own), local)


# --- rehearsal ------------------------------------------------------------------------------------------
class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) if inputs.sum().item() > 0 else -self.layer(inputs)


def rehearsed(task: Task, *rule: object, validation: tuple[Tensor, Tensor] | None = None) -> Params:
    rules = build_rules(rule, None)
    params = initial_params(task, 0)
    before = {name: tensor.clone() for name, tensor in params.items()}
    rehearse(rules, params, make_receiver(task, build_model(task), validation))
    assert all(torch.equal(params[name], before[name]) for name in params)
    return params


def test_rules_that_will_work_pass() -> None:
    rehearsed(toy(), "mean")
    rehearsed(toy(), "align.activation", "mean", "repair")
    rehearsed(toy(), {"name": "choose", "of": [["mean"], ["align.weight", "mean"]]}, validation=toy().test)


def test_a_network_that_cannot_be_traced_is_told_before_the_first_round() -> None:
    with pytest.raises(ValueError, match=r"cannot trace the network.*leave the rules out"):
        rehearsed(toy(model=Branching), "align.activation", "mean")
    rehearsed(toy(model=Branching), "mean")


def test_a_probe_that_the_task_has_not_is_told_before_the_first_round() -> None:
    rule = {"name": "align.activation", "probe": "shared"}
    with pytest.raises(ValueError, match=r"no shared probe inputs \(task.probe in the config"):
        rehearsed(toy(), rule, "mean")
    rehearsed(toy(probe=torch.randn(30, 3)), rule, "mean")


def test_a_metric_that_the_task_has_not_is_told_before_the_first_round() -> None:
    task = toy(metrics=lambda outputs, targets: {"f1": 0.5})
    with pytest.raises(ValueError, match="accuracy"):
        rehearsed(task, "mean", {"name": "accept", "by": "accuracy"}, validation=toy().test)
