"""The registry: what `build` accepts and refuses, what a built rule checks, what `merge` gives back."""

import math
import re
from typing import Any

import pytest
import torch

from aggregation.averaging import mean
from aggregation.base import Contribution, Rule, chain, stateless
from aggregation.rules import RULES, RuleEntry, build, merge

LOCAL = Contribution({"w": torch.zeros(2, 2), "b": torch.zeros(2)}, source="me")


def passing_entry(factory: Any = lambda: chain()) -> RuleEntry:
    return RuleEntry(
        factory=factory,
        summary="changes nothing",
        source="none",
        reduces=False,
        order_free=True,
        common_start="alike",
        time="1",
        memory="0",
        when="Never.",
    )


def contribution(**changes: Any) -> Contribution:
    return Contribution(
        **{"params": {"w": torch.ones(2, 2), "b": torch.ones(2)}, "source": "peer-7", **changes}
    )


@pytest.mark.parametrize("name", RULES)
def test_every_entry_says_what_it_is(name: str) -> None:
    entry = RULES[name]

    assert entry.summary
    assert "\n" not in entry.summary
    assert entry.source


def test_a_name_and_a_table_without_arguments_are_the_same_rule() -> None:
    by_name, _ = merge(build(["mean"]), [contribution()], ((),), LOCAL)
    by_table, _ = merge(build([{"name": "mean"}]), [contribution()], ((),), LOCAL)

    assert torch.equal(by_name["w"], by_table["w"])


def test_a_tables_other_keys_reach_the_factory() -> None:
    rule = build([{"name": "mean", "conservative": 0.75}])

    params, _ = merge(rule, [contribution()], rule.init(LOCAL.params), LOCAL)

    assert params["w"].unique().tolist() == [0.25]


def test_a_built_chain_does_what_its_links_do_one_after_the_other() -> None:
    rule = build([{"name": "mean", "conservative": 0.5}, {"name": "mean", "conservative": 0.0}])

    params, _ = merge(rule, [contribution()], rule.init(LOCAL.params), LOCAL)

    assert params["w"].unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["mean", "krum"], "rules[1]: no rule is called 'krum'; there are: mean, variance.corrected"),
        ([{"name": 3}], "rules[0]: no rule is called 3; there are: mean"),
        ([{"conservative": 0.5}], "rules[0]: must be a rule's name or a table with the key 'name'"),
        (["mean", 5], "rules[1]: must be a rule's name or a table with the key 'name', not 5"),
        (
            ["mean", {"name": "mean", "share": 1, "x": 2}],
            "rules[1] mean: unknown argument share, x; it takes conservative, staleness_half_life",
        ),
        (
            [{"name": "mean", "conservative": 2}],
            "rules[0] mean: conservative must be a number from 0 to 1, not 2",
        ),
        (
            [{"name": "variance.corrected", "target": "all"}],
            "rules[0] variance.corrected: target must be one of received, median, own, mixed, not 'all'",
        ),
        ([], "rules: the list ends with no rule having left exactly one contribution; add one of: mean"),
        ("mean", "rules must be a list of names or tables, not 'mean'"),
        ({"name": "mean"}, "rules must be a list of names or tables"),
    ],
)
def test_a_bad_list_is_refused_with_its_place_and_what_is_allowed(specs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(specs)


def test_a_list_without_a_reducing_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "pass", passing_entry())

    with pytest.raises(ValueError, match=re.escape("rules[1]: the list ends with no rule having left")):
        build(["pass", "pass"])

    assert isinstance(build(["pass", "mean"]), Rule)


def test_a_missing_argument_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(limit: float) -> Rule:
        return mean(limit)

    monkeypatch.setitem(RULES, "limited", passing_entry(factory))

    with pytest.raises(ValueError, match=re.escape("rules[0] limited: missing a required argument: 'limit'")):
        build(["limited", "mean"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0}, "weight must be finite and above 0, not 0"),
        ({"weight": -1.0}, "weight must be finite and above 0, not -1.0"),
        ({"weight": math.nan}, "weight must be finite and above 0, not nan"),
        ({"weight": math.inf}, "weight must be finite and above 0, not inf"),
        ({"weight": 10**400}, "weight must be finite and above 0"),
        ({"staleness": -1}, "staleness must be at least 0, not -1"),
        ({"staleness": math.nan}, "staleness must be at least 0, not nan"),
        ({"params": {"w": torch.ones(2, 2)}}, "tensor 'b' is missing"),
        (
            {"params": {"w": torch.ones(2, 2), "b": torch.ones(2), "x": torch.ones(1)}},
            "tensor 'x' is not in the local model",
        ),
        (
            {"params": {"w": torch.ones(2, 3), "b": torch.ones(2)}},
            "tensor 'w' is float32[2, 3], expected float32[2, 2]",
        ),
        (
            {"params": {"w": torch.ones(2, 2), "b": torch.ones(2).half()}},
            "tensor 'b' is float16[2], expected float32[2]",
        ),
        (
            {"params": {"w": torch.ones(2, 2), "b": torch.tensor([1.0, math.nan])}},
            "tensor 'b' holds a value that is not finite",
        ),
    ],
)
def test_a_bad_contribution_is_refused_by_source_and_tensor(changes: dict[str, Any], message: str) -> None:
    rule = build(["mean"])

    with pytest.raises(ValueError, match=re.escape(f"contribution from 'peer-7': {message}")):
        rule.update([contribution(source="fine"), contribution(**changes)], rule.init(LOCAL.params), LOCAL)


def test_a_local_model_that_is_not_finite_is_refused() -> None:
    rule = build(["mean"])
    local = Contribution({"w": torch.full((2, 2), math.inf), "b": torch.zeros(2)})

    with pytest.raises(ValueError, match="the local model: tensor 'w' holds a value that is not finite"):
        rule.update([contribution()], rule.init(local.params), local)


def test_integers_of_a_peer_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def looks(contributions: Any, local: Contribution) -> list[Contribution]:
        seen.extend(contributions)
        return list(contributions)

    monkeypatch.setitem(RULES, "looks", passing_entry(lambda: stateless(looks)))
    rule = build(["looks", "mean"])
    local = Contribution({"w": torch.zeros(2), "ids": torch.arange(3)})
    foreign = Contribution({"w": torch.ones(2), "ids": torch.full((3,), 10**12)})

    merge(rule, [foreign], rule.init(local.params), local)

    assert torch.equal(seen[0].params["ids"], torch.arange(3))
    assert torch.equal(foreign.params["ids"], torch.full((3,), 10**12)), "what came in stays as it is"


def test_contributions_are_checked_once_and_before_the_first_link(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoils(contributions: Any, local: Contribution) -> list[Contribution]:
        return [contribution(params={"w": torch.full((2, 2), math.nan)})]

    monkeypatch.setitem(RULES, "spoils", passing_entry(lambda: stateless(spoils)))
    rule = build(["mean", "spoils"])

    params, _ = merge(rule, [contribution()], rule.init(LOCAL.params), LOCAL)

    assert params["w"].isnan().all()


def test_merge_with_nothing_received_gives_the_local_parameters() -> None:
    rule = build(["mean", "variance.corrected"])

    params, _ = merge(rule, [], rule.init(LOCAL.params), LOCAL)

    assert list(params) == list(LOCAL.params)
    assert all(params[name] is LOCAL.params[name] for name in params)


def test_merge_hands_on_the_rules_state() -> None:
    counting = Rule(
        init=lambda params: 0,
        update=lambda contributions, state, local: ([local], state + len(contributions)),
    )

    params, state = merge(counting, [contribution(), contribution()], 5, LOCAL)

    assert params is LOCAL.params
    assert state == 7


@pytest.mark.parametrize("count", [0, 2])
def test_merge_refuses_a_rule_that_does_not_leave_one(count: int) -> None:
    with pytest.raises(ValueError, match=f"the rule left {count} contributions instead of one"):
        merge(chain(), [contribution()] * count, (), LOCAL)
