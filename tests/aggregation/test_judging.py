"""Scores, soups, acceptance and choice: what is kept by hand, and that it is never worse than promised."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aggregation import scoring
from aggregation.base import MODEL, SAMPLES, VALIDATION, Contribution, Local, Params, Receiver, Rule
from aggregation.judging import accept, choose, greedy_soup, uniform_soup
from aggregation.rules import build, merge
from aggregation.scoring import score


class Constant(nn.Module):
    """Says w whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x))


def close(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"accuracy": ((outputs - targets).abs() < 1).double().mean().item()}


def at(value: float) -> Params:
    return {"w": torch.tensor([value], dtype=torch.float64)}


def one(value: float, weight: float = 1.0, source: str = "peer") -> Contribution:
    return Contribution(at(value), weight, 0, source)


def local_at(value: float, *targets: float) -> Local:
    """A receiver at w = value, whose loss is the mean absolute difference to `targets`."""
    held_out = torch.zeros(len(targets)), torch.tensor(targets, dtype=torch.float64)
    receiver = Receiver(Constant(), F.l1_loss, close, (torch.zeros(1), torch.zeros(1)), held_out)
    return Local(at(value), 1.0, 0, "me", receiver=receiver)


def kept(rule: Rule, received: list[Contribution], local: Local) -> tuple[float, dict[str, Any]]:
    (result,), state = rule.update(received, rule.init(local.params), local)
    return result.params["w"].item(), dict(rule.report(state))


# --- scores ---------------------------------------------------------------------------------------------
class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.fc = nn.Linear(3, 2)
        self.fc.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(self.bn(x), 0.5, self.training))


def accuracy(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"accuracy": (outputs.argmax(-1) == targets).float().mean().item()}


def normed_receiver(num_samples: int = 50) -> Receiver:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        held_out = torch.randn(num_samples, 3), torch.arange(num_samples) % 2
        model = Normed()
    return Receiver(model, F.cross_entropy, accuracy, held_out, held_out)


def test_a_score_is_the_measure_in_evaluation_the_larger_the_better() -> None:
    receiver = normed_receiver()
    params = {name: tensor.clone() for name, tensor in receiver.model.state_dict().items()}
    inputs, targets = receiver.samples  # its validation samples too
    fresh = Normed().eval()
    fresh.load_state_dict(params)
    expected = fresh(inputs)

    assert score(receiver, params, "loss") == pytest.approx(-F.cross_entropy(expected, targets).item())
    assert score(receiver, params, "accuracy") == pytest.approx(
        (expected.argmax(-1) == targets).float().mean().item()
    )


def test_a_score_in_batches_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = normed_receiver()
    params = {name: tensor.clone() for name, tensor in receiver.model.state_dict().items()}
    whole = score(receiver, params, "loss")
    monkeypatch.setattr(scoring, "BATCH", 7)

    assert score(receiver, params, "loss") == pytest.approx(whole, rel=1e-6)


def test_scoring_leaves_nothing_behind_but_the_models_contents() -> None:
    receiver = normed_receiver()
    params = {name: tensor.clone() for name, tensor in receiver.model.state_dict().items()}
    before, state = {name: tensor.clone() for name, tensor in params.items()}, torch.get_rng_state()

    score(receiver, params, "loss")

    assert all(torch.equal(params[name], before[name]) for name in before)
    assert all(torch.equal(receiver.model.state_dict()[name], before[name]) for name in before)
    assert [module.training for module in receiver.model.modules()] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_score_that_is_no_number_is_the_worst() -> None:
    local = local_at(0.0, 1e308, 1e308)
    assert local.receiver is not None

    assert score(local.receiver, at(-1e308), "loss") == -math.inf


def test_a_measure_the_task_does_not_have_is_named() -> None:
    receiver = Receiver(
        Constant(), F.l1_loss, lambda *_: {"rmse": 1.0}, *[(torch.zeros(1), torch.zeros(1))] * 2
    )

    with pytest.raises(ValueError, match=re.escape("(rmse) or loss, not 'accuracy'")):
        score(receiver, at(0.0), "accuracy")


# --- soups ----------------------------------------------------------------------------------------------
def test_the_uniform_soup_is_the_mean_without_weights() -> None:
    received = [one(3.0, weight=100.0), one(8.0, weight=1.0)]

    (result,), _ = uniform_soup().update(received, (), one(1.0, weight=50.0))

    assert result.params["w"].item() == pytest.approx(4.0)
    assert [part.share for part in result.parts] == [0.5, 0.5]


def test_the_greedy_soup_takes_what_does_not_make_it_worse() -> None:
    # Losses: 3, 1, 5, 40. From 1 the mean with -3 is -1, no worse; then 5 gives 1 (no worse); then 40 spoils it.
    received = [one(40.0, source="d"), one(5.0, source="c"), one(1.0, source="b")]

    value, report = kept(greedy_soup(), received, local_at(-3.0, 0.0))

    assert value == pytest.approx(1.0)
    assert report == {"soup_size": 3, "soup_loss": pytest.approx(1.0)}


def test_the_greedy_soup_of_one_is_that_model_to_the_bit() -> None:
    value, report = kept(greedy_soup(), [one(0.1), one(9.0)], local_at(7.0, 0.1))

    assert value == 0.1
    assert report["soup_size"] == 1


def test_the_greedy_soups_parts_are_the_received_models_in_it() -> None:
    local = local_at(2.0, 0.0)

    (result,), _ = greedy_soup().update([one(-2.0), one(50.0)], {}, local)

    assert result.params["w"].item() == 0.0
    assert [(part.share, part.params["w"].item()) for part in result.parts] == [(1.0, -2.0)]


@pytest.mark.parametrize("by", ["loss", "accuracy"])
@pytest.mark.parametrize("seed", range(20))
def test_the_greedy_soup_is_never_worse_than_the_best_single_model(by: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    receiver = normed_receiver()

    def params() -> Params:
        drawn = {
            name: torch.randn(tensor.shape, generator=generator)
            for name, tensor in receiver.model.state_dict().items()
            if tensor.is_floating_point()
        }
        drawn["bn.running_var"] = drawn["bn.running_var"].abs() + 0.1
        return drawn | {"bn.num_batches_tracked": torch.randint(0, 99, (), generator=generator)}

    local = Local(params(), source="me", receiver=receiver)
    received = [Contribution(params(), source=str(index)) for index in range(5)]

    (result,), state = greedy_soup(by).update(received, {}, local)

    best = max(score(receiver, each.params, by) for each in [local, *received])
    found = score(receiver, result.params, by)
    assert found >= best, f"seed {seed}"
    assert abs(state[f"soup_{by}"]) == abs(found)


def test_models_without_a_finite_score_are_no_candidates() -> None:
    broken = 1e308
    fine, _ = kept(greedy_soup(), [one(broken), one(-1e307)], local_at(0.0, -1e308))
    none, report = kept(greedy_soup(), [one(broken)], local_at(broken, -1e308, -1e308))

    assert fine == -1e307
    assert none == broken
    assert report == {"soup_size": 0, "soup_loss": math.inf}


# --- accept ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("merged", "tolerance", "accepted"),
    [(1.0, 0.0, True), (-2.0, 0.0, True), (2.5, 0.0, False), (2.5, 0.5, True), (2.5, 0.4, False)],
)
def test_a_merged_model_is_kept_unless_it_is_worse(merged: float, tolerance: float, accepted: bool) -> None:
    value, report = kept(accept(tolerance=tolerance), [one(merged)], local_at(2.0, 0.0))

    assert value == (merged if accepted else 2.0)
    assert report == {"accepted": "yes" if accepted else "no", "own_loss": 2.0, "merged_loss": abs(merged)}


def test_by_accuracy_more_is_better() -> None:
    better, _ = kept(accept("accuracy"), [one(5.5)], local_at(0.0, 0.0, 5.0, 6.0))
    worse, _ = kept(accept("accuracy"), [one(0.0)], local_at(5.5, 0.0, 5.0, 6.0))

    assert better == 5.5
    assert worse == 5.5


def test_several_contributions_are_averaged_before_they_are_judged() -> None:
    value, _ = kept(accept(), [one(-5.0), one(1.0)], local_at(2.0, 0.0))

    assert value == 0.0


def test_a_merged_model_without_a_finite_score_is_not_accepted_even_for_another_such() -> None:
    value, _ = kept(accept(tolerance=5.0), [one(1e308)], local_at(1e307, -1e308, -1e308))
    still, _ = kept(accept(), [one(1.1e308)], local_at(1e308, -1e308, -1e308))

    assert (value, still) == (1e307, 1e308)


# --- choose ---------------------------------------------------------------------------------------------
MEANS = [[{"name": "mean", "conservative": share}] for share in (0.0, 0.25, 0.75)]


def test_the_list_whose_result_is_best_is_chosen_and_the_scores_are_told() -> None:
    value, report = kept(choose(MEANS), [one(8.0)], local_at(0.0, 6.5))

    assert value == 6.0
    assert report == {
        "chosen": "of[1]",
        "of[0]_loss": 1.5,
        "of[1]_loss": 0.5,
        "of[2]_loss": 4.5,
        "own_loss": 6.5,
    }


def test_the_own_model_is_a_candidate_if_so_asked() -> None:
    with_own, report = kept(choose(MEANS), [one(8.0)], local_at(0.0, -1.0))
    without, _ = kept(choose(MEANS, own=False), [one(8.0)], local_at(0.0, -1.0))

    assert (with_own, report["chosen"]) == (0.0, "own")
    assert without == 2.0


def test_of_equal_scores_the_earlier_list_counts_and_the_own_model_last() -> None:
    value, report = kept(choose(MEANS, by="accuracy"), [one(0.5)], local_at(0.0, 0.2))

    assert (value, report["chosen"]) == (0.5, "of[0]")


def test_where_no_result_has_a_finite_score_the_local_model_stays() -> None:
    value, report = kept(choose(MEANS, own=False), [one(1e308)], local_at(1e308, -1e308, -1e308))

    assert (value, report["chosen"]) == (1e308, "own")


def test_every_list_remembers_its_own_merges() -> None:
    specs = [["mean"], ["mean", {"name": "momentum.outer", "form": "heavy-ball", "mu": 0.5, "lr": 1.0}]]
    rule = build([{"name": "choose", "of": specs, "own": False}])
    places, state = [], rule.init(at(0.0))
    for value in (10.0, 9.0, 8.0):
        params, state = merge(rule, [one(value)], state, local_at(value + 1e-9, 0.0))
        places.append(params["w"].item())

    # The second and the third time momentum has taken its list further towards 0: 9 - 0 and 9 - (1 + 0.5).
    assert places == pytest.approx([10.0, 9.0, 7.5])
    assert rule.report(state)["chosen"] == "of[1]"


def test_it_needs_what_its_lists_need() -> None:
    assert choose([["mean"]]).needs == {MODEL, VALIDATION}
    assert choose([["mean"], ["fisher"]]).needs == {MODEL, VALIDATION, SAMPLES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"of": [["mean"], ["x"]]},
            "rules[0] choose: of[1]: rules[0]: no rule is called 'x'",
        ),
        (
            {"of": [[{"name": "mean", "conservative": 2}]]},
            "rules[0] choose: of[0]: rules[0] mean: conservative must be a number from 0 to 1, not 2",
        ),
        (
            {"of": [["mean"], [{"name": "choose", "of": [["weight.window"]]}]]},
            "rules[0] choose: of[1]: rules[0] choose: of[0]: rules[0]: the list ends with no rule",
        ),
        ({"of": ["mean"]}, "rules[0] choose: of[0]: rules must be a list of names or tables, not 'mean'"),
        ({"of": []}, "rules[0] choose: of must be a list of one or more lists of rules, not []"),
        ({"of": "mean"}, "rules[0] choose: of must be a list of one or more lists of rules, not 'mean'"),
        ({"by": "f1"}, "rules[0] choose: by must be one of loss, accuracy, not 'f1'"),
        ({"own": 1}, "rules[0] choose: own must be true or false, not 1"),
    ],
)
def test_a_mistake_in_a_list_is_told_with_its_place(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build([{"name": "choose", **arguments}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accept(tolerance=-1), "tolerance must be a number of at least 0, not -1"),
        (lambda: accept(by="f1"), "by must be one of loss, accuracy, not 'f1'"),
        (lambda: greedy_soup(by="f1"), "by must be one of loss, accuracy, not 'f1'"),
    ],
)
def test_an_argument_out_of_range_is_refused(make: Callable[[], Rule], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
