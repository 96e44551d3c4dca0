"""What each operation of a traced network says about the order of units.

Belongs here: one handler for each kind of ATen operation, which takes the dimensions of what goes in, ties together
what has to have one order, holds what is looked at by position, and gives the dimensions of what comes out. A new
operation is one more entry of `HANDLERS`; one that is missing holds all that it meets, which costs freedom and is never
wrong.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx

from aggregation.factors import (
    POSITION,
    SLICED,
    Dim,
    Dims,
    Factor,
    cut,
    expand,
    hold,
    innermost,
    size_of,
    split,
    unify,
)


@dataclass
class Trace:
    """What is known of the graph so far."""

    values: dict[fx.Node, Any] = field(default_factory=dict)
    """Dimensions of each node's tensor, or a list of such."""
    mixed: list[tuple[Dims, Dims]] = field(default_factory=list)
    """Dimensions over which an operation mixes, and all those of the tensor."""

    def dims(self, argument: Any) -> Dims:
        """Of a node's tensor; of a number, none."""
        return cast(Dims, self.values[argument]) if isinstance(argument, fx.Node) else []


Handler = Callable[[Trace, fx.Node], Any]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _fresh(size: int, held: str = "") -> Dim:
    return [Factor(size, held=held)] if size != 1 else []


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _same(trace: Trace, node: fx.Node) -> Dims:
    """Entry by entry, of one tensor."""
    return trace.dims(node.args[0])


def _pointwise(trace: Trace, node: fx.Node) -> Dims:
    """Entry by entry, of several tensors, which are broadcast."""
    out: Dims = [[] for _ in _shape(node)]
    for argument in (*node.args, *node.kwargs.values()):
        dims = trace.dims(argument) if isinstance(argument, fx.Node) else []
        for place, dim in enumerate(dims, len(out) - len(dims)):
            if not out[place]:
                out[place] = dim
            elif dim:
                unify(out[place], dim)
    return out


def _linear(trace: Trace, node: fx.Node) -> Dims:
    inputs, weight = trace.dims(node.args[0]), trace.dims(node.args[1])
    bias = trace.dims(_argument(node, 2, "bias"))
    unify(inputs[-1], weight[1])
    if bias:
        unify(weight[0], bias[0])
    return [*inputs[:-1], weight[0]]


def _addmm(trace: Trace, node: fx.Node) -> Dims:
    bias, left, right = (trace.dims(argument) for argument in node.args[:3])
    unify(left[1], right[0])
    trace.mixed += [([left[0], right[1]], left), ([left[0], right[1]], right)]
    out = [left[0], right[1]]
    for dim, place in zip(reversed(bias), (1, 0), strict=False):
        if dim and out[place]:
            unify(dim, out[place])
    return out


def _matmul(trace: Trace, node: fx.Node) -> Dims:
    left, right = trace.dims(node.args[0]), trace.dims(node.args[1])
    rows = left[-2:-1] if len(left) > 1 else []
    columns = right[-1:] if len(right) > 1 else []
    unify(left[-1], right[-2] if len(right) > 1 else right[-1])
    batch = _broadcast(left[:-2], right[:-2])
    # Every row meets every column: what is summed over has one order for all of them.
    trace.mixed += [([*rows, *columns], left), ([*rows, *columns], right)]
    return [*batch, *rows, *columns]


def _broadcast(a: Dims, b: Dims) -> Dims:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    out = list(longer)
    for place, dim in enumerate(shorter, len(longer) - len(shorter)):
        if dim and out[place]:
            unify(dim, out[place])
        out[place] = out[place] or dim
    return out


def _convolution(trace: Trace, node: fx.Node, groups: int, transposed: bool = False) -> Dims:
    inputs, weight = trace.dims(node.args[0]), trace.dims(node.args[1])
    bias = trace.dims(_argument(node, 2, "bias"))
    shape = _shape(node)
    spatial = len(weight) - 2
    channels = inputs[-spatial - 1]
    for dim in (*inputs[len(inputs) - spatial :], *weight[2:]):
        hold(dim, POSITION)
    if groups == 1:
        read, written = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
        unify(channels, read)
    else:
        group = Factor(groups)
        grouped = weight[0]
        inner_in = [Factor(size_of(channels) // groups, within=group)] if size_of(channels) > groups else []
        num_out = shape[-spatial - 1]
        inner_out = [Factor(num_out // groups, within=group)] if num_out > groups else []
        written = [group, *inner_out]
        unify(channels, [group, *inner_in])
        unify(grouped, [group, *inner_in] if transposed else written)
        unify(weight[1], inner_out if transposed else inner_in)
    if bias:
        unify(bias[0], written)
    return [
        *inputs[: len(inputs) - spatial - 1],
        written,
        *(_fresh(size, POSITION) for size in shape[len(shape) - spatial :]),
    ]


def _convolve(transposed: bool) -> Handler:
    def handler(trace: Trace, node: fx.Node) -> Dims:
        groups = _argument(node, 6, "groups", 1)
        return _convolution(trace, node, groups, transposed)

    return handler


def _batch_norm(trace: Trace, node: fx.Node) -> Dims:
    dims = trace.dims(node.args[0])
    for argument in node.args[1:5]:
        for dim in trace.dims(argument):
            unify(dims[1], dim)
    return dims


def _layer_norm(trace: Trace, node: fx.Node) -> Dims:
    dims = trace.dims(node.args[0])
    normalised = dims[len(dims) - len(cast(Sequence[int], node.args[1])) :]
    for argument in node.args[2:4]:
        for dim, own in zip(trace.dims(argument), normalised, strict=False):
            unify(own, dim)
    trace.mixed.append((normalised, dims))
    return dims


def _group_norm(trace: Trace, node: fx.Node) -> Dims:
    dims = trace.dims(node.args[0])
    groups, channels = cast(int, node.args[1]), dims[1]
    if 1 < groups < size_of(channels):
        group = Factor(groups)
        unify(channels, [group, Factor(size_of(channels) // groups, within=group)])
    for argument in node.args[2:4]:
        for dim in trace.dims(argument):
            unify(channels, dim)
    return dims


def _embedding(trace: Trace, node: fx.Node) -> Dims:
    weight = trace.dims(node.args[0])
    hold(weight[0], POSITION)
    return [*trace.dims(node.args[1]), weight[1]]


def _softmax(trace: Trace, node: fx.Node) -> Dims:
    dims = trace.dims(node.args[0])
    trace.mixed.append(([dims[cast(int, node.args[1])]], dims))
    return dims


def _attention(trace: Trace, node: fx.Node) -> Dims:
    """softmax(q k^T) v. q: [..., T, d], k: [..., S, d], v: [..., S, e]."""
    query, key, value = (trace.dims(argument) for argument in node.args[:3])
    mask = trace.dims(_argument(node, 3, "attn_mask"))
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    trace.mixed += [([query[-2], key[-2]], dims) for dims in (query, key, value)]
    batch = _broadcast(_broadcast(query[:-2], key[:-2]), value[:-2])
    if mask:
        _broadcast(mask, [*batch, query[-2], key[-2]])
    if bool(_argument(node, 5, "is_causal", False)):
        hold(query[-2], POSITION)
        hold(key[-2], POSITION)
    return [*batch, query[-2], value[-1]]


def _reduced(trace: Trace, node: fx.Node) -> Dims:
    """Over some dimensions, or all; what is left has its axes."""
    dims = trace.dims(node.args[0])
    over = _argument(node, 1, "dim", ())
    over = [over] if isinstance(over, int) else list(over or range(len(dims)))
    gone = {place % len(dims) for place in over} if dims else set()
    keep = len(_shape(node)) == len(dims)
    return [[] if place in gone else dim for place, dim in enumerate(dims) if keep or place not in gone]


def _pooled(spatial: int) -> Handler:
    def handler(trace: Trace, node: fx.Node) -> Dims:
        dims = trace.dims(node.args[0])
        for dim in dims[len(dims) - spatial :]:
            hold(dim, POSITION)
        sizes = _shape(node)[len(dims) - spatial :]
        return [*dims[: len(dims) - spatial], *(_fresh(size, POSITION) for size in sizes)]

    return handler


def _padded(trace: Trace, node: fx.Node) -> Dims:
    dims, out = trace.dims(node.args[0]), []
    for dim, size in zip(dims, _shape(node), strict=True):
        if size_of(dim) != size:
            hold(dim, POSITION)
        out.append(dim if size_of(dim) == size else _fresh(size, POSITION))
    return out


def _reshaped(trace: Trace, node: fx.Node) -> Dims:
    """The axes, in order, dealt out to the new dimensions."""
    axes = expand([axis for dim in trace.dims(node.args[0]) for axis in dim])
    out: Dims = []
    for wanted in _shape(node):
        dim: Dim = []
        while (missing := wanted // max(1, size_of(dim))) > 1:
            if not axes or (missing % axes[0].size and axes[0].size % missing):
                hold([*dim, *axes], "is reshaped in a way that does not fit its parts")
                return [_fresh(size, "is reshaped") for size in _shape(node)]
            if axes[0].size > missing:
                split(axes[0], missing)
                axes = expand(axes)
            dim.append(axes.pop(0))
        out.append(dim)
    return out


def _permuted(trace: Trace, node: fx.Node) -> Dims:
    dims = trace.dims(node.args[0])
    return [dims[place] for place in cast(Sequence[int], node.args[1])]


def _transposed(trace: Trace, node: fx.Node) -> Dims:
    dims = list(trace.dims(node.args[0]))
    if len(dims) < 2:
        return dims
    a, b = cast(tuple[int, int], node.args[1:3]) if len(node.args) > 2 else (0, 1)
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _expanded(trace: Trace, node: fx.Node) -> Dims:
    dims, shape = trace.dims(node.args[0]), _shape(node)
    dims = [*([[]] * (len(shape) - len(dims))), *dims]
    return [dim or _fresh(size) for dim, size in zip(dims, shape, strict=True)]


def _concatenated(trace: Trace, node: fx.Node) -> Dims:
    parts = [trace.dims(part) for part in cast(Sequence[fx.Node], node.args[0])]
    place = cast(int, _argument(node, 1, "dim", 0)) % len(parts[0])
    out = list(parts[0])
    for part in parts[1:]:
        for other in range(len(out)):
            if other != place:
                unify(out[other], part[other])
    joined = Factor(sum(size_of(part[place]) for part in parts))
    joined.segments = [part[place] for part in parts]
    if all(axis.held for part in parts for axis in expand(part[place])):
        joined.held = POSITION
    out[place] = [joined]
    return out


def _narrowed(dim: Dim, begin: int, end: int) -> Dim:
    """Units begin to end of a dimension."""
    if (begin, end) == (0, size_of(dim)):
        return dim
    points = sorted({point for point in (begin, end, size_of(dim)) if point})
    segments = None if all(axis.held for axis in expand(dim)) else cut(dim, points)
    if segments is None:
        hold(dim, SLICED)
        return _fresh(end - begin, POSITION)
    at, chosen = 0, []
    for segment in segments:
        if begin <= at < end:
            chosen.append(segment)
        at += size_of(segment)
    if len(chosen) == 1:
        return chosen[0]
    joined = Factor(end - begin)
    joined.segments = chosen
    return [joined]


def _sliced(trace: Trace, node: fx.Node) -> Dims:
    dims = list(trace.dims(node.args[0]))
    place = cast(int, _argument(node, 1, "dim", 0)) % len(dims)
    begin, end, step = (_argument(node, 2 + i, name) for i, name in enumerate(("start", "end", "step")))
    size = size_of(dims[place])
    begin, end, step = slice(begin, end, step).indices(size)
    if step == 1:
        dims[place] = _narrowed(dims[place], begin, end)
    else:
        hold(dims[place], SLICED)
        dims[place] = _fresh(_shape(node)[place], SLICED)
    return dims


def _selected(trace: Trace, node: fx.Node) -> Dims:
    place, index = cast(tuple[int, int], node.args[1:3])
    return _pick(trace.dims(node.args[0]), place, index)


def _pick(dims: Dims, place: int, index: int) -> Dims:
    """One unit of a dimension: the rest, without that dimension."""
    place %= len(dims)
    picked = expand(dims[place])
    rest = [dim for other, dim in enumerate(dims) if other != place]
    hold(picked, POSITION)
    if len(picked) != 1:
        return rest
    return [_of_unit(dim, picked[0], index % picked[0].size) for dim in rest]


def _of_unit(dim: Dim, picked: Factor, index: int) -> Dim:
    """Where the units of `picked` each have something of their own in them (queries, keys and values in one matrix),
    that of unit `index`; else `dim` as it is."""
    return [_stacked(axis, picked)[index] if _is_inside(axis, picked) else axis for axis in expand(dim)]


def _is_inside(axis: Factor, picked: Factor) -> bool:
    """Whether the axis lies within `picked`, directly or not, and nothing is tied to it that knows no such units."""
    if axis.held or (axis.touched and axis.stack is None) or axis.within is None:
        return False
    around = innermost(axis.within)
    return around is picked or _is_inside(around, picked)


def _stacked(axis: Factor, picked: Factor) -> list[Factor]:
    """One axis for each unit of `picked`."""
    if axis.stack is None:
        assert axis.within is not None
        around = innermost(axis.within)
        outer: Sequence[Factor | None] = (
            [None] * picked.size if around is picked else _stacked(around, picked)
        )
        axis.stack = [Factor(axis.size, axis.name, within=within) for within in outer]
    return axis.stack


def _unbound(trace: Trace, node: fx.Node) -> list[Dims]:
    dims, place = trace.dims(node.args[0]), cast(int, _argument(node, 1, "dim", 0))
    return [_pick(dims, place, index) for index in range(len(node.meta["val"]))]


def _in_parts(trace: Trace, node: fx.Node, place: int) -> list[Dims]:
    """A dimension in parts, of the sizes that the graph tells."""
    dims, out, at = trace.dims(node.args[0]), [], 0
    for part in node.meta["val"]:
        size = int(part.shape[place])
        parts = list(dims)
        parts[place] = _narrowed(dims[place], at, at + size)
        out.append(parts)
        at += size
    return out


def _chunked(trace: Trace, node: fx.Node) -> list[Dims]:
    return _in_parts(trace, node, cast(int, _argument(node, 2, "dim", 0)))


def _item(trace: Trace, node: fx.Node) -> Any:
    values = trace.values[cast(fx.Node, node.args[0])]
    return values[cast(int, node.args[1])]


def _glu(trace: Trace, node: fx.Node) -> Dims:
    dims = list(trace.dims(node.args[0]))
    place = cast(int, _argument(node, 1, "dim", -1))
    half = size_of(dims[place]) // 2
    first, second = _narrowed(dims[place], 0, half), _narrowed(dims[place], half, 2 * half)
    unify(first, second)
    dims[place] = first
    return dims


def _prelu(trace: Trace, node: fx.Node) -> Dims:
    """One slope, or one for each channel."""
    dims, slopes = trace.dims(node.args[0]), trace.dims(node.args[1])
    if slopes and slopes[0]:
        unify(dims[1], slopes[0])
    return dims


def _along(trace: Trace, node: fx.Node) -> Dims:
    """Minds the order along one dimension, and is entry by entry along the others."""
    dims = trace.dims(node.args[0])
    over = node.args[1]
    places = [over] if isinstance(over, int) else cast(Sequence[int], over)
    trace.mixed.append(([dims[place] for place in places], dims))
    for place in places:
        hold(dims[place], f"meets {name_of(node)}, which minds the order of units")
    return dims


def unknown(trace: Trace, node: fx.Node) -> Any:
    """Nothing may be assumed: what goes in is held, and what comes out is."""
    reason = f"meets {str(node.target).removesuffix('.default')}, which is not known to keep the order of units free"
    for argument in nodes_in(node.args) + nodes_in(node.kwargs):
        for dim in all_dims(trace.values.get(argument)):
            hold(dim, reason)
    return held_like(node.meta.get("val"), reason)


def nodes_in(arguments: Any) -> list[fx.Node]:
    """Every node among the arguments of another, in order."""
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, lambda node: found.append(node))
    return found


def all_dims(value: Any) -> list[Dim]:
    """Of a tensor's dimensions, or those of several tensors."""
    if not value:
        return []
    if all(isinstance(axis, Factor) for dim in value for axis in dim):
        return cast(list[Dim], value)
    return [dim for each in value for dim in all_dims(each)]


def held_like(value: Any, reason: str) -> Any:
    """Dimensions of the shape of a value, or of several, all held."""
    if isinstance(value, Tensor):
        return [_fresh(int(size), reason) for size in value.shape]
    if isinstance(value, list | tuple):
        return [held_like(each, reason) for each in value]
    return []


_ENTRYWISE = [
    "relu",
    "relu_",
    "relu6",
    "leaky_relu",
    "leaky_relu_",
    "elu",
    "elu_",
    "selu",
    "celu",
    "gelu",
    "silu",
    "silu_",
    "mish",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "softplus",
    "hardtanh",
    "hardtanh_",
    "hardswish",
    "hardswish_",
    "hardsigmoid",
    "hardsigmoid_",
    "log_sigmoid",
    "threshold",
    "exp",
    "log",
    "log1p",
    "expm1",
    "sqrt",
    "rsqrt",
    "abs",
    "neg",
    "sign",
    "square",
    "reciprocal",
    "erf",
    "sin",
    "cos",
    "clamp",
    "clamp_",
    "clamp_min",
    "clamp_max",
    "round",
    "floor",
    "ceil",
    "dropout",
    "dropout_",
    "feature_dropout",
    "feature_dropout_",
    "alpha_dropout",
    "contiguous",
    "clone",
    "detach",
    "alias",
    "to",
    "_to_copy",
    "type_as",
    "zeros_like",
    "ones_like",
    "full_like",
    "isnan",
    "logical_not",
    "bitwise_not",
    "lift_fresh_copy",
    "_assert_tensor_metadata",
]
_BROADCAST = [
    "add",
    "add_",
    "sub",
    "sub_",
    "rsub",
    "mul",
    "mul_",
    "div",
    "div_",
    "pow",
    "pow_",
    "maximum",
    "minimum",
    "where",
    "masked_fill",
    "masked_fill_",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "bitwise_and",
    "bitwise_or",
    "lerp",
    "addcmul",
    "addcdiv",
    "fmod",
    "remainder",
    "atan2",
    "copy_",
]
_REDUCED = ["mean", "sum", "amax", "amin", "prod", "any", "all", "logsumexp"]
_RESHAPED = [
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
    "view_as",
    "reshape_as",
]
_ALONG = ["flip", "cumsum", "cumprod"]

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_ENTRYWISE, _same),
    **dict.fromkeys(_BROADCAST, _pointwise),
    **dict.fromkeys(_REDUCED, _reduced),
    **dict.fromkeys(_RESHAPED, _reshaped),
    **dict.fromkeys(_ALONG, _along),
    **{f"conv{n}d": _convolve(transposed=False) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolve(transposed=True) for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": _pooled(n) for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)},
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **{f"upsample_{kind}": _pooled(n) for n, kind in ((1, "nearest1d"), (2, "nearest2d"), (2, "bilinear2d"))},
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matmul),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _softmax),
    "scaled_dot_product_attention": _attention,
    "permute": _permuted,
    **dict.fromkeys(("transpose", "t", "swapaxes", "numpy_T"), _transposed),
    **dict.fromkeys(("expand", "expand_as"), _expanded),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenated),
    "slice": _sliced,
    "select": _selected,
    "unbind": _unbound,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _chunked),
    "getitem": _item,
    "glu": _glu,
    "prelu": _prelu,
}
"""What is known, by the operation's name. Whatever is not here holds the axes that it meets."""


def name_of(node: fx.Node) -> str:
    """The operation's name, without its overload."""
    target = node.target
    if target is operator.getitem:
        return "getitem"
    packet = getattr(target, "_opname", None) or getattr(
        getattr(target, "overloadpacket", None), "__name__", ""
    )
    return str(packet)
