"""Averaging parameter by parameter, each model counting by how much its outputs hang on the parameter.

Belongs here: the diagonal Fisher information and the mean that it weighs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from aggregation import weighting
from aggregation.base import (
    MODEL,
    SAMPLES,
    Contribution,
    Params,
    Receiver,
    Rule,
    is_number,
    receiver_of,
    require,
    require_count,
    stateless,
)
from aggregation.probes import evenly_spaced
from aggregation.scoring import evaluating

MAX_OUTPUTS = 32
"""Classes, or numbers a model puts out, that the expectation over its own answers goes through."""

WORKING_ENTRIES = 2**22
"""Entries of the per-example gradients held at once, 16 MiB of float32: more is slower. One example at least."""


# --- the rule -------------------------------------------------------------------------------------------
def fisher(samples: int = 256, floor: float = 1e-6, at_most: float = 100.0) -> Rule:
    """The mean of all models, the receiver's among them, weighed in each coordinate d by Fisher information.

        out_d = sum_m lambda_m F_m,d x_m,d / sum_m lambda_m F_m,d        lambda_m: the contributions' weights

    F_m is the diagonal of `diagonal_fisher`, brought to unit norm (see `normalised`), so that no model counts
    more for being steep everywhere. Tensors that are no parameters, such as BatchNorm's running statistics,
    and whatever holds no gradient are averaged by `weighting.fedavg`, whose treatment of dtypes, counters,
    agreement, `parts` and of nothing received holds here.

    The receiver finds every F itself, on its own training samples. A peer's own F would have to be believed,
    and would double the upload; the price is a view of the other models through the receiver's data.

    Args:
        samples: how many training samples at most, evenly spaced among all; 1 or more.
        floor: least F as a part of its root mean square, above 0 up to 1.
        at_most: in no coordinate does one model's F count more than so many times another's, 1 or more. At 1
            this is the plain weighted mean.

    Raises ValueError for an argument outside its range; in a merge, where the model's outputs are not as
    `diagonal_fisher` takes them.

    Source: arXiv 2111.09832. Floor, norm and cap are ours, and that one node computes all F.
    """
    require_count("samples", samples)
    require(is_number(floor) and 0 < floor <= 1, "floor", "a number above 0, up to 1", floor)
    require(is_number(at_most) and at_most >= 1, "at_most", "a number of at least 1", at_most)
    average = weighting.fedavg()

    def function(contributions: Sequence[Contribution], local: Contribution) -> list[Contribution]:
        receiver = receiver_of(local)
        (merged,), _ = average.update(contributions, (), local)
        if not contributions:
            return [merged]
        everyone = [local, *contributions]
        models = [each.params for each in everyone]
        fishers = [normalised(_seen_by(receiver, params, samples), floor) for params in models]
        weighed = fisher_mean(models, fishers, [each.weight for each in everyone], at_most)
        return [replace(merged, params=merged.params | weighed)]

    return stateless(function, needs={MODEL, SAMPLES})


def _seen_by(receiver: Receiver, params: Params, samples: int) -> Params:
    """The Fisher information of a model on the receiver's samples; integer targets are taken for classes."""
    inputs, targets = receiver.samples
    chosen = evenly_spaced(len(inputs), samples)
    is_classifier = not targets.is_floating_point()
    return diagonal_fisher(receiver.model, params, inputs[chosen], is_classifier)


# --- the mean -------------------------------------------------------------------------------------------
@torch.no_grad()
def fisher_mean(
    models: Sequence[Params], fishers: Sequence[Params], shares: Sequence[float], at_most: float = math.inf
) -> Params:
    """sum_m share_m F_m x_m / sum_m share_m F_m, entry by entry, for the tensors that `fishers` name.

    models: of one layout. Where all agree on a tensor, the first one's is handed on.
    fishers: one a model, finite and >= 0, each the shape of the model's tensor of that name.
    shares: above 0, up to a common factor.
    at_most: F is raised to 1 / at_most of the largest F of that entry. Where every F is 0 all count by their
        shares.

    Sums are taken in float64 and rounded once.

    >>> fisher_mean([{"w": torch.tensor([1.0])}, {"w": torch.tensor([6.0])}],
    ...             [{"w": torch.tensor([4.0])}, {"w": torch.tensor([1.0])}], [0.5, 0.5])
    {'w': tensor([2.])}
    """
    largest = max(shares)
    return {
        name: _weighed(
            [params[name] for params in models],
            [fisher[name] for fisher in fishers],
            [share / largest for share in shares],
            at_most,
        )
        for name in fishers[0]
    }


def _weighed(
    tensors: Sequence[Tensor], fishers: Sequence[Tensor], shares: Sequence[float], at_most: float
) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point() or all(torch.equal(other, first) for other in tensors[1:]):
        return first
    highest = fishers[0].double()
    for fisher in fishers[1:]:
        highest = torch.maximum(highest, fisher.double())
    # Relative to the largest, and 1 where all are 0: neither underflows, and the shares alone decide.
    weights = [
        torch.where(highest > 0, fisher.double() / highest, 1.0).clamp_(min=1 / at_most) * share
        for fisher, share in zip(fishers, shares, strict=True)
    ]
    average, total = first.double(), weights[0].clone()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight
        step = torch.where(total > 0, weight / total, 0.0)
        average = average.lerp(tensor.double(), step)
    return average.to(first.dtype)


def normalised(fisher: Params, floor: float) -> Params:
    """Of unit norm over all entries together, none below `floor` times the root mean square.

    The norm is taken before the floor. A Fisher that is 0 everywhere or not finite says nothing: equal
    entries.
    """
    num_entries = max(sum(tensor.numel() for tensor in fisher.values()), 1)
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in fisher.values()))
    typical = 1 / math.sqrt(num_entries)
    if not (0 < norm < math.inf):
        return {name: torch.full_like(tensor, typical) for name, tensor in fisher.items()}
    return {
        name: (tensor.double() / norm).clamp_(min=floor * typical).to(tensor.dtype)
        for name, tensor in fisher.items()
    }


# --- the information ------------------------------------------------------------------------------------
def diagonal_fisher(model: nn.Module, params: Params, inputs: Tensor, is_classifier: bool = True) -> Params:
    """mean over x of E_y [(d log p(y | x) / d theta)^2], y as the model itself says, by parameter name.

    Squares are taken example by example: the square of a batch's gradient is something else. The expectation
    is exact: it goes through the classes, or through the outputs of a regression.

    model: to work in; holds `params` afterwards. Evaluated in eval mode, so dropout and batches play no part.
    params: as its state dict. Of the names of a tied parameter each gets its information.
    inputs: [samples, ...], at least one.
    is_classifier: outputs are scores [samples, classes]. Beyond MAX_OUTPUTS classes only each example's most
        probable ones are gone through, each by its probability: what is left out has little. Otherwise p is a
        normal distribution of unit variance around the outputs [samples, ...], and E_y is the sum of their
        squared derivatives; beyond MAX_OUTPUTS of them, of evenly spaced ones.

    Gives float32 tensors (float64 for float64 parameters) of the parameters' shapes. Takes as much memory as
    one gradient for each of as many examples as fit into WORKING_ENTRIES.

    Raises ValueError where a classifier's outputs have another shape.

    Source: arXiv 2111.09832; the limits are ours.
    """
    with evaluating(model, params):
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        num_entries = sum(tensor.numel() for tensor in tensors.values())
        total = {name: torch.zeros_like(tensor, dtype=_wide(tensor)) for name, tensor in tensors.items()}
        for chunk in torch.split(inputs, max(1, WORKING_ENTRIES // max(num_entries, 1))):
            for which, share in _answers(model, chunk, is_classifier):
                gradients = _gradients(model, tensors, chunk, which, is_classifier)
                for name, gradient in gradients.items():
                    squares = gradient.to(total[name].dtype).reshape(len(chunk), -1).square()
                    total[name] += (share.to(squares.dtype) @ squares).view_as(total[name])
        first_names = {id(tensor): name for name, tensor in model.named_parameters()}
        return {
            name: total[first_names[id(tensor)]] / len(inputs)
            for name, tensor in model.named_parameters(remove_duplicate=False)
        }


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def _answers(model: nn.Module, inputs: Tensor, is_classifier: bool) -> list[tuple[Tensor, Tensor]]:
    """The answers to go through: which output of every example, and how much it counts, both [samples]."""
    outputs = model(inputs)
    if not is_classifier:
        indices = evenly_spaced(outputs[0].numel(), MAX_OUTPUTS).to(outputs.device)
        return [(index.expand(len(inputs)), outputs.new_ones(len(inputs))) for index in indices]
    if outputs.ndim != 2:
        raise ValueError(
            "fisher takes outputs [samples, classes] where the targets are whole numbers, "
            f"not {list(outputs.shape)}"
        )
    shares, indices = outputs.softmax(-1).topk(min(outputs.shape[1], MAX_OUTPUTS), dim=-1)
    return list(zip(indices.unbind(1), shares.unbind(1), strict=True))


def _gradients(
    model: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor, which: Tensor, is_classifier: bool
) -> dict[str, Tensor]:
    """[samples, *shape] a parameter: of each example's chosen log-probability, or output."""

    def answer(parameters: Mapping[str, Tensor], x: Tensor, index: Tensor) -> Tensor:
        outputs = functional_call(model, dict(parameters), (x.unsqueeze(0),))[0]
        values = outputs.log_softmax(-1) if is_classifier else outputs.flatten()
        chosen: Tensor = values.gather(-1, index.unsqueeze(0)).squeeze(0)
        return chosen

    gradients: dict[str, Tensor] = vmap(grad(answer), in_dims=(None, 0, 0))(dict(tensors), inputs, which)
    return gradients
