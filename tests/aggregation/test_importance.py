"""Fisher information against a loop of plain backward passes, and the mean that it weighs, by hand."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aggregation import importance
from aggregation.base import Contribution, Local, Params, Receiver
from aggregation.importance import diagonal_fisher, fisher, fisher_mean, normalised
from aggregation.probes import evenly_spaced
from aggregation.weighting import fedavg


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Small(nn.Module):
    """Convolution, BatchNorm, dropout, a tied layer, and a parameter that no output hangs on."""

    def __init__(self, num_outputs: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.bn = nn.BatchNorm1d(2)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, num_outputs)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).flatten(1)
        return self.scale * self.head(
            F.tanh(self.second(F.dropout(F.tanh(self.first(x)), 0.5, self.training)))
        )


def small(num_outputs: int = 3, seed: int = 1) -> tuple[nn.Module, Params]:
    model = Small(num_outputs).double()
    params = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        drawn = draw(seed + index, *tensor.shape).to(tensor.dtype)
        params[name] = drawn.abs() if name.endswith("running_var") else drawn
    params["second.weight"] = params["first.weight"].clone()
    return model, params


def by_loop(model: nn.Module, params: Params, inputs: Tensor) -> Params:
    """One plain backward pass for every example and class."""
    model.load_state_dict(params)
    model.eval()
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    for x in inputs:
        shares = model(x[None])[0].softmax(-1).detach()
        for index, share in enumerate(shares):
            answer = model(x[None])[0].log_softmax(-1)[index]
            gradients = torch.autograd.grad(answer, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    total[name] += share * gradient.square()
    return {name: (tensor / len(inputs)).detach() for name, tensor in total.items()}


# --- the information ------------------------------------------------------------------------------------
def test_the_information_is_that_of_a_loop_over_examples_and_classes() -> None:
    model, params = small()
    inputs = draw(7, 9, 1, 4)

    found = diagonal_fisher(model, params, inputs)

    expected = by_loop(model, params, inputs)
    assert set(found) == {*expected, "second.weight"}
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-10, atol=1e-14), name
    assert torch.equal(found["second.weight"], found["first.weight"])
    assert not found["unused"].any()


def test_the_square_of_a_batch_gradient_is_something_else() -> None:
    model, params = small()
    inputs = draw(7, 64, 1, 4)
    found = diagonal_fisher(model, params, inputs)["head.bias"]
    model.eval()
    outputs = model(inputs)
    (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, outputs.argmax(-1)), model.head.bias)

    # d log p / d bias is the scale times one-hot minus p, whose variance a class is p (1 - p)
    shares = outputs.softmax(-1)
    assert torch.allclose(found, params["scale"] ** 2 * (shares * (1 - shares)).mean(0))
    assert not torch.allclose(found, gradient.square(), rtol=0.5)


@pytest.mark.parametrize("entries", [1, 200])
def test_the_information_is_the_same_in_pieces(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = small()
    inputs = draw(7, 9, 1, 4)
    whole = diagonal_fisher(model, params, inputs)
    monkeypatch.setattr(importance, "WORKING_ENTRIES", entries)

    pieces = diagonal_fisher(model, params, inputs)

    assert all(torch.allclose(whole[name], pieces[name]) for name in whole)


def test_training_mode_and_contents_of_the_module_play_no_part() -> None:
    model, params = small()
    inputs = draw(7, 9, 1, 4)
    found = diagonal_fisher(model, params, inputs)
    model.train()
    model.load_state_dict(small(seed=50)[1])

    again = diagonal_fisher(model, params, inputs)

    assert all(torch.equal(found[name], again[name]) for name in found)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.state_dict()["bn.running_mean"], params["bn.running_mean"])


def test_of_many_classes_the_most_probable_are_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = small(num_outputs=40)
    params["head.bias"] = torch.where(torch.arange(40) < 32, 20.0, 0.0).double()
    inputs = draw(7, 5, 1, 4)
    most = diagonal_fisher(model, params, inputs)
    monkeypatch.setattr(importance, "MAX_OUTPUTS", 40)

    every = diagonal_fisher(model, params, inputs)

    assert all(torch.allclose(most[name], every[name], rtol=1e-3, atol=1e-6) for name in every)
    assert not torch.equal(most["head.bias"], every["head.bias"])


def test_of_a_regression_it_is_the_squared_jacobian() -> None:
    model = nn.Linear(2, 3).double()
    params = {"weight": draw(1, 3, 2), "bias": draw(2, 3)}
    inputs = draw(7, 11, 2)

    found = diagonal_fisher(model, params, inputs, is_classifier=False)

    # output k is weight_k . x + bias_k
    assert torch.allclose(found["bias"], torch.ones(3, dtype=torch.float64))
    assert torch.allclose(found["weight"], inputs.square().mean(0).expand(3, 2))


def test_outputs_without_a_class_axis_are_refused() -> None:
    model = nn.Linear(2, 3).double()

    with pytest.raises(ValueError, match=re.escape("outputs [samples, classes] where the targets are whole")):
        diagonal_fisher(model, dict(model.state_dict()), draw(1, 4, 5, 2))


# --- the mean -------------------------------------------------------------------------------------------
def mean_of(
    fishers: list[list[float]], models: list[list[float]], shares: list[float], **arguments: float
) -> list[float]:
    def params(values: list[float]) -> Params:
        return {"w": torch.tensor(values, dtype=torch.float64)}

    merged = fisher_mean(
        [params(each) for each in models], [params(each) for each in fishers], shares, **arguments
    )
    return merged["w"].tolist()


def test_the_mean_has_the_papers_number() -> None:
    assert mean_of([[4], [1]], [[1], [6]], [0.5, 0.5]) == pytest.approx([2.0])


def test_equal_information_gives_the_weighted_mean_and_much_of_it_the_one_model() -> None:
    assert mean_of([[3], [3]], [[1], [5]], [1, 3]) == pytest.approx([4.0])
    assert mean_of([[1e30], [1e-30]], [[1], [5]], [1, 3]) == [1.0]
    assert mean_of([[0], [1]], [[1], [5]], [1, 3]) == [5.0]
    assert mean_of([[0], [0]], [[1], [5]], [1, 3]) == pytest.approx([4.0])


def test_no_model_counts_more_than_the_cap_times_another() -> None:
    assert mean_of([[1e30], [1e-30]], [[1], [5]], [1, 1], at_most=3) == pytest.approx([(3 * 1 + 5) / 4])
    assert mean_of([[1e30], [0]], [[1], [5]], [1, 1], at_most=1) == pytest.approx([3.0])


def test_every_entry_lies_between_the_models() -> None:
    models = [draw(index, 200) for index in range(4)]
    fishers = [draw(10 + index, 200).square() for index in range(4)]

    merged = fisher_mean([{"w": each} for each in models], [{"w": each} for each in fishers], [1, 2, 3, 4])[
        "w"
    ]

    stacked, squares = torch.stack(models), torch.stack(fishers)
    shares = torch.tensor([1, 2, 3, 4], dtype=torch.float64)[:, None]
    assert torch.allclose(merged, (shares * squares * stacked).sum(0) / (shares * squares).sum(0))
    assert bool((merged >= stacked.amin(0) - 1e-12).all())
    assert bool((merged <= stacked.amax(0) + 1e-12).all())


def test_information_is_brought_to_unit_norm_and_floored() -> None:
    found = normalised({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0, 0.0]])}, floor=0.1)

    assert found["a"].tolist() == pytest.approx([0.6, 0.05])  # root mean square of four entries: 1/2
    assert found["b"].tolist() == [pytest.approx([0.8, 0.05])]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_information_that_says_nothing_is_equal_everywhere(value: float) -> None:
    assert normalised({"a": torch.full((4,), value)}, floor=0.1)["a"].tolist() == [0.5] * 4


# --- the rule -------------------------------------------------------------------------------------------
def receiver_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Receiver:
    return Receiver(model, F.cross_entropy, lambda outputs, targets: {}, (inputs, targets))


def merged_by(rule_arguments: dict[str, Any], models: list[Params], receiver: Receiver) -> Params:
    local = Local(models[0], 2.0, 0, "own", receiver=receiver)
    received = [Contribution(each, 1.0 + index, 0, str(index)) for index, each in enumerate(models[1:])]
    (merged,), _ = fisher(**rule_arguments).update(received, (), local)
    return merged.params


def test_a_model_counts_where_its_outputs_hang_on_the_weight() -> None:
    model = nn.Linear(2, 2, bias=False)
    # Each knows one input and saturates nothing: the other column has no bearing on its own certainty.
    own, other = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    inputs = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    receiver = receiver_of(model, inputs, torch.tensor([0, 0]))

    merged = merged_by({}, [{"weight": own}, {"weight": other}], receiver)["weight"]

    shares = [(inputs @ each.T).softmax(-1) for each in (own, other)]
    information = [(each * (1 - each) * inputs[:, :1].square()).mean(0) for each in shares]
    unit = [each / each.norm() for each in information]
    first = (2 * unit[0] * own[:, 0] + unit[1] * other[:, 0]) / (2 * unit[0] + unit[1])
    assert torch.allclose(merged[:, 0], first)
    assert merged[:, 1].tolist() == [0.0, 0.0]


def test_what_is_no_parameter_is_averaged_plainly_and_tied_names_stay_tied() -> None:
    model, own = small()
    models = [own, small(seed=30)[1], small(seed=60)[1]]
    receiver = receiver_of(model, draw(7, 9, 1, 4), torch.zeros(9, dtype=torch.int64))

    merged = merged_by({}, models, receiver)

    local = Contribution(own, 2.0)
    (plain,), _ = fedavg().update([Contribution(models[1], 1.0), Contribution(models[2], 2.0)], (), local)
    for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert torch.equal(merged[name], plain.params[name])
    assert torch.equal(merged["first.weight"], merged["second.weight"])
    assert not torch.allclose(merged["head.weight"], plain.params["head.weight"], rtol=1e-2)
    assert torch.allclose(merged["unused"], plain.params["unused"])


def test_with_everything_floored_and_capped_it_is_the_weighted_mean() -> None:
    model, own = small()
    models = [own, small(seed=30)[1]]
    receiver = receiver_of(model, draw(7, 9, 1, 4), torch.zeros(9, dtype=torch.int64))

    merged = merged_by({"at_most": 1.0}, models, receiver)

    (plain,), _ = fedavg().update([Contribution(models[1], 1.0)], (), Contribution(own, 2.0))
    assert all(torch.allclose(merged[name], tensor) for name, tensor in plain.params.items())


def test_samples_are_evenly_spaced_and_no_more_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        importance,
        "diagonal_fisher",
        lambda model, params, inputs, is_classifier: (
            seen.append(len(inputs)) or {"weight": params["weight"].square()}
        ),
    )
    model = nn.Linear(2, 2, bias=False)
    receiver = receiver_of(model, torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64))

    merged_by({"samples": 4}, [{"weight": torch.ones(2, 2)}, {"weight": torch.zeros(2, 2)}], receiver)

    assert seen == [4, 4]
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 4).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, not 0"),
        ({"floor": 0}, "floor must be a number above 0, up to 1, not 0"),
        ({"at_most": 0.5}, "at_most must be a number of at least 1, not 0.5"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fisher(**arguments)
