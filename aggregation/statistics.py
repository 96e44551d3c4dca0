"""The statistics of activations after a merge: re-estimating BatchNorm's, and REPAIR for networks without it.

Averaged networks have hidden units whose activations vary too little, and running statistics that belong to no network.
Belongs here: measuring a model on inputs and setting what depends on it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aggregation.base import (
    MODEL,
    SAMPLES,
    Contribution,
    Params,
    Receiver,
    Rule,
    receiver_of,
    require,
    require_count,
    stateless,
)
from aggregation.operations import name_of
from aggregation.probes import PROBES, batches, modes_kept, probe_of, same
from aggregation.symmetry import Symmetry, arguments_of, symmetry_of

BATCH = 256
SMALLEST = 1e-6
"""Of what a unit should vary by: one that varies by less is dead, and no factor would bring it back."""


@torch.no_grad()
def reestimated(model: nn.Module, params: Params, inputs: Tensor) -> Params:
    """`params` with BatchNorm's running statistics as the mean over the batches of `inputs` [samples, ...].

    model: of these parameters, to work in. `params` itself, where the network has no such statistics. Dropout stays
    off, so nothing is drawn. The last batch has between half and one and a half times BATCH samples.

    Source: arXiv 2404.08079, reset_bn: momentum None, one pass in training mode.
    """
    layers = [
        layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]
    if not layers or len(inputs) < 2:
        return params
    model.load_state_dict(params)
    with _measuring(model, layers):
        for batch in torch.tensor_split(inputs, max(1, round(len(inputs) / BATCH))):
            model(batch)
    measured = model.state_dict()
    return {
        name: measured[name].detach().clone() if name.endswith(("running_mean", "running_var")) else tensor
        for name, tensor in params.items()
    }


@contextmanager
def _measuring(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """BatchNorm alone in training mode, with a plain mean over batches; everything as before afterwards."""
    momenta = [layer.momentum for layer in layers]
    with modes_kept(model):
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        try:
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum


# --- REPAIR ---------------------------------------------------------------------------------------------
def repaired(
    symmetry: Symmetry, merged: Params, endpoints: Sequence[tuple[float, Params]], inputs: Tensor
) -> Params:
    """`merged` with each hidden unit's pre-activation rescaled to the mean and deviation it has in the endpoints.

    endpoints: share, which add up to 1, and parameters of each model that was averaged, in the merged one's order of
        units. inputs: [samples, ...], of which whole batches are used.

    Layers are taken from the input on, each on what the layers before it give once they are repaired, and the factors
    are folded into weight and bias. A layer without a bias gets the deviation only. Where GroupNorm or LayerNorm follows
    a layer, its weight and bias are taken instead, since it undoes what is done before it. Left as they are: the output
    layer, what a BatchNorm follows (re-estimate that), and weights that are used more than once.

    Source: Jordan et al. 2023, arXiv 2211.08403 (REPAIR).
    """
    layers = _hidden_layers(symmetry)
    goals: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(share: float) -> Callable[[fx.Node, list[Tensor]], list[Tensor]]:
        def look(node: fx.Node, values: list[Tensor]) -> list[Tensor]:
            mean, deviation = _moments(values, _channels(node))
            before = goals.get(node.name, (0.0, 0.0))
            goals[node.name] = (before[0] + share * mean, before[1] + share * deviation)
            return values

        return look

    for share, params in endpoints:
        _run_together(symmetry, params, inputs, layers, measure(share))
    out = dict(merged)

    def repair(node: fx.Node, values: list[Tensor]) -> list[Tensor]:
        weight, bias = layers[node]
        dim = _channels(node)
        mean, deviation = _moments(values, dim)
        goal_mean, goal_deviation = goals[node.name]
        alive = (deviation > SMALLEST * goal_deviation) & (goal_deviation > 0)
        scale = torch.where(alive, goal_deviation / deviation.clamp_min(1e-30), torch.ones_like(deviation))
        shift = goal_mean - mean * scale if bias else torch.zeros_like(mean)
        out[weight] = (out[weight].double() * _along(scale, 0, out[weight].ndim)).to(out[weight].dtype)
        if bias:
            out[bias] = (out[bias].double() * scale + shift).to(out[bias].dtype)
        return [
            (value.double() * _along(scale, dim, value.ndim) + _along(shift, dim, value.ndim)).to(value.dtype)
            for value in values
        ]

    _run_together(symmetry, merged, inputs, layers, repair)
    return out


_Layers = dict[fx.Node, tuple[str, str | None]]
"""Nodes with the names of their weight and bias."""
_NORMS = ("aten.batch_norm", "aten.group_norm", "aten.layer_norm")


def _hidden_layers(symmetry: Symmetry) -> _Layers:
    """Layers whose weight and bias set the scale of each unit: GroupNorm and LayerNorm with theirs, and linear layers
    and convolutions that no norm follows, which would undo it."""
    sources = {
        node: source
        for node, source in zip(symmetry.graph.graph.nodes, symmetry.placeholders, strict=False)
        if isinstance(source, str)
    }
    found: _Layers = {}
    for node in symmetry.graph.graph.nodes:
        weight, bias = _scaling(node)
        if weight not in sources or len(weight.users) > 1 or _is_last(node):
            continue
        if not _feeds_norm(node):
            found[node] = (sources[weight], sources.get(bias))
    return found


def _scaling(node: fx.Node) -> tuple[Any, Any]:
    """The nodes of a layer's weight and bias; None where it is no such layer."""
    target = str(node.target)
    if node.op != "call_function":
        return None, None
    if target.startswith("aten.group_norm") or (
        target.startswith("aten.layer_norm") and len(cast(Sequence[int], node.args[1])) == 1
    ):
        return _argument(node, 2), _argument(node, 3)
    if target.startswith(("aten.linear", "aten.conv")) and "transpose" not in target:
        return node.args[1], _argument(node, 2)
    return None, None


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index] if len(node.args) > index else None


def _is_last(node: fx.Node) -> bool:
    """Whether nothing but a change of shape or an activation function lies between it and the outputs."""
    return any(user.op == "output" or (_hands_on(user) and _is_last(user)) for user in node.users)


def _feeds_norm(node: fx.Node) -> bool:
    """Whether a norm follows, perhaps behind a change of shape or a dropout."""
    return any(
        str(user.target).startswith(_NORMS) or (_hands_on(user) and not _bends(user) and _feeds_norm(user))
        for user in node.users
    )


_MOVES = (
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "permute",
    "transpose",
    "contiguous",
)
_DROPS = ("dropout", "dropout_", "feature_dropout", "feature_dropout_", "clone", "detach", "alias")
_ENDS = ("softmax", "log_softmax", "sigmoid", "tanh", "relu", "softplus", "exp", "clamp")


def _hands_on(node: fx.Node) -> bool:
    return name_of(node) in (*_MOVES, *_DROPS, *_ENDS)


def _bends(node: fx.Node) -> bool:
    return name_of(node) in _ENDS


def _channels(node: fx.Node) -> int:
    """The dimension that a layer writes its units to."""
    value = node.meta["val"]
    return 1 if str(node.target).startswith(("aten.conv", "aten.group_norm")) else value.ndim - 1


def _moments(values: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Mean and population deviation of every unit over all else; float64."""
    rows = torch.cat([value.movedim(dim, 0).flatten(1) for value in values], dim=1).double()
    deviation, mean = torch.std_mean(rows, dim=1, correction=0)
    return mean, deviation


def _along(vector: Tensor, dim: int, num_dims: int) -> Tensor:
    shape = [1] * num_dims
    shape[dim] = -1
    return vector.reshape(shape)


@torch.no_grad()
def _run_together(
    symmetry: Symmetry,
    params: Params,
    inputs: Tensor,
    layers: _Layers,
    look: Callable[[fx.Node, list[Tensor]], list[Tensor]],
) -> None:
    """All batches node by node, so that `look` sees a layer's values on all inputs before the next layer is computed."""
    running = []
    for batch in batches(inputs, symmetry.batch_size):
        one = fx.Interpreter(symmetry.graph, garbage_collect_values=True)
        one.args_iter = iter(arguments_of(symmetry, params, batch))
        running.append(one)
    for node in symmetry.graph.graph.nodes:
        if node.op == "output":
            break
        values = [one.run_node(node) for one in running]
        if node in layers:
            values = look(node, values)
        for one, value in zip(running, values, strict=True):
            one.env[node] = value
            for gone in one.user_to_last_uses.get(node, []):
                del one.env[gone]


# --- the rules ------------------------------------------------------------------------------------------
def norm_reestimate(probe: str = "own", samples: int = 2048) -> Rule:
    """After a mean: BatchNorm's running statistics as the merged network has them on the receiver's data.

    Leaves a network without BatchNorm, and one that is the receiver's own to the bit, as it is.

    Args:
        probe: "own": the receiver's training samples. "shared": inputs that all nodes have (`Task.probe`).
        samples: inputs at most. The more, the better the statistics.

    Raises ValueError for an argument outside its range, and where more than one model comes in.

    Source: arXiv 2404.08079 (DIMAT), reset_bn after the merge.
    """

    def correct(receiver: Receiver, merged: Contribution, local: Contribution, inputs: Tensor) -> Params:
        return reestimated(receiver.model, merged.params, inputs)

    return _after_a_mean("norm.reestimate", correct, probe, samples)


def repair(probe: str = "own", samples: int = 512) -> Rule:
    """After a mean: each hidden unit varies again as much as it does in the models that were averaged.

    For networks without BatchNorm; layers that feed one are left to `norm.reestimate`. Align before the mean: units of
    models in different orders have nothing to do with each other. Not together with `variance.corrected`, which treats
    the same shrinkage by the weights.

    Args:
        probe: "own": the receiver's training samples. "shared": inputs that all nodes have (`Task.probe`).
        samples: inputs at most.

    Raises ValueError for an argument outside its range, and where more than one model comes in.

    Source: arXiv 2211.08403 (REPAIR).
    """

    def correct(receiver: Receiver, merged: Contribution, local: Contribution, inputs: Tensor) -> Params:
        if not merged.parts:
            return merged.params
        endpoints = [
            (merged.own_share, local.params),
            *((part.share * (1 - merged.own_share), part.params) for part in merged.parts),
        ]
        weighted = [(share, params) for share, params in endpoints if share > 0]
        symmetry = symmetry_of(receiver.model, inputs)
        return repaired(symmetry, merged.params, weighted, inputs)

    return _after_a_mean("repair", correct, probe, samples)


_Correct = Callable[[Receiver, Contribution, Contribution, Tensor], Params]


def _after_a_mean(name: str, correct: _Correct, probe: str, samples: int) -> Rule:
    require(probe in PROBES, "probe", f"one of {', '.join(PROBES)}", probe)
    require_count("samples", samples)

    def function(contributions: Sequence[Contribution], local: Contribution) -> list[Contribution]:
        if not contributions:
            return []
        if len(contributions) > 1:
            raise ValueError(f"{name} takes one model and got {len(contributions)}: put it behind a mean")
        (merged,) = contributions
        if same(merged.params, local.params):
            return [merged]
        receiver = receiver_of(local)
        params = correct(receiver, merged, local, probe_of(receiver, probe, samples))
        if not all(bool(tensor.isfinite().all()) for tensor in params.values()):
            return [merged]
        return [replace(merged, params=params)]

    return stateless(function, (MODEL, SAMPLES))
