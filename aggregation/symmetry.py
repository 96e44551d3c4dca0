"""Which units of a network may be put in another order without changing what it computes, read from the network.

Belongs here: from a module to its `Symmetry`, and applying permutations to parameters. Which permutation makes two
networks alike is `alignment.py`'s matter.

How it works. `torch.export` gives the network as a graph of ATen operations. Every dimension of every tensor in it is
written as a product of *axes*, outermost first: a linear layer's output is one fresh axis, a flattened feature map is
(channels, height, width), a layer of attention is (heads, width of a head). Each operation says which axes have to be
one and the same: what is added has its axes in common, a layer reads the axes that another wrote. An axis that an
operation looks at by position (the kernel of a convolution, a slice, an input or output of the network) is *held*. So
is every axis that meets an operation not known here: nothing counts as free that is not proved so. What is left free
may be permuted, in all the tensors it occurs in alike.

An axis may lie *within* another: the units of a head within the heads, the channels of a group within the groups. Then
each head may have its own order, and the heads may change places.

Sources: Ainsworth et al. 2023 (arXiv 2209.04836) for the permutations themselves. To derive them from a traced graph is
ours; docs/decisions/0013 says why no library does it.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from aggregation.base import Params
from aggregation.factors import (
    INPUT,
    NATURAL,
    OUTPUT,
    UNUSED,
    Dim,
    Dims,
    Factor,
    expand,
    hold,
    innermost,
    root,
    size_of,
    unify,
    unstack,
)
from aggregation.operations import HANDLERS, Trace, all_dims, held_like, name_of, nodes_in, unknown
from aggregation.probes import CHUNK, modes_kept

# --- what comes out -------------------------------------------------------------------------------------
Permutations = dict[int, Tensor]
"""For each free axis an order of its units: new unit i is old unit order[i]. int64, [size], or for an axis within
another [size of the outer, size]: a row for each (new) position of the outer one."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension of hidden units, or a factor of one.

    within: the axis whose units each have an order of their own of this one's; None: one order for all.
    held: the reason why the order must stay, or "" where it is free.
    name: the tensor that it was first seen in, for reports.
    """

    size: int
    within: int | None
    held: str
    name: str


class Piece(NamedTuple):
    """A block of a tensor, and its dimensions as axes.

    slices: where the block lies. axes: of all dimensions, in order, each dimension outermost first; reshaped to their
    sizes, the block has one dimension an axis.
    """

    slices: tuple[slice, ...]
    axes: tuple[int, ...]

    def take(self, tensor: Tensor, axes: Mapping[int, Axis]) -> Tensor:
        """The block of `tensor`, with one dimension an axis."""
        return tensor[self.slices].reshape([axes[axis].size for axis in self.axes])


Layout = tuple[Piece, ...]
"""A tensor as pieces, which cover it."""


@dataclass(frozen=True, slots=True, eq=False)
class Symmetry:
    """What may be permuted in a network.

    axes: by number.
    tensors: how each entry of the state dict is laid out.
    nodes: the same for the activations, by the name of their node in `graph`.
    graph: the traced network.
    placeholders: what to give it, in order: the name of an entry of the state dict, a constant, or None for the inputs.
    batch_size: samples in a batch; the graph takes no other number.
    """

    axes: dict[int, Axis]
    tensors: dict[str, Layout]
    nodes: dict[str, Layout]
    graph: fx.GraphModule
    placeholders: tuple[str | Tensor | None, ...]
    batch_size: int

    @property
    def free(self) -> list[int]:
        """The axes that may be permuted."""
        return [number for number, axis in self.axes.items() if not axis.held]

    def left_alone(self) -> dict[str, str]:
        """Axes of parameters that are held for another reason than that inputs and outputs are, by name."""
        used = {axis for layout in self.tensors.values() for piece in layout for axis in piece.axes}
        return {
            f"{axis.name} ({axis.size})": axis.held
            for number, axis in self.axes.items()
            if number in used and axis.held and axis.held not in NATURAL
        }

    def identity(self) -> Permutations:
        """Everything stays where it is."""
        return {number: self._in_order(number) for number in self.free}

    def random(self, generator: torch.Generator) -> Permutations:
        """Every free axis in a random order, drawn uniformly."""

        def drawn(size: int) -> Tensor:
            return torch.randperm(size, generator=generator)

        return {
            number: torch.stack([drawn(order.shape[-1]) for _ in range(order.shape[0])])
            if order.ndim == 2
            else drawn(len(order))
            for number, order in self.identity().items()
        }

    def _in_order(self, number: int) -> Tensor:
        axis = self.axes[number]
        order = torch.arange(axis.size)
        return order if axis.within is None else order.repeat(self.axes[axis.within].size, 1)

    def permute(self, params: Params, permutations: Permutations) -> Params:
        """`params` with every axis in its new order. What does not change is handed on, not copied."""
        return {
            name: self._permute_tensor(tensor, self.tensors[name], permutations)
            if name in self.tensors
            else tensor
            for name, tensor in params.items()
        }

    def _permute_tensor(self, tensor: Tensor, layout: Layout, permutations: Permutations) -> Tensor:
        out: Tensor | None = None
        for piece in layout:
            block = piece.take(tensor, self.axes)
            moved = self.permute_block(block, piece.axes, permutations)
            if moved is not block:
                out = tensor.clone() if out is None else out
                out[piece.slices] = moved.reshape(out[piece.slices].shape)
        return tensor if out is None else out

    def permute_block(
        self, block: Tensor, axes: Sequence[int], permutations: Permutations, skip: Sequence[int] = ()
    ) -> Tensor:
        """A block with one dimension an axis, in its new order. `skip`: dimensions that stay as they are."""
        # Outer axes first: an order within one is given by its new positions.
        for dim in range(len(axes)):
            order = permutations.get(axes[dim])
            if order is not None and order.ndim == 1 and dim not in skip:
                block = block.index_select(dim, order)
        for dim in range(len(axes)):
            order = permutations.get(axes[dim])
            if order is not None and order.ndim == 2 and dim not in skip:
                outer = outer_dim(axes, dim, self.axes)
                shape = [1] * block.ndim
                shape[outer], shape[dim] = order.shape
                # The order of the two dimensions in the block may be either.
                index = (order if outer < dim else order.T).reshape(shape).expand(block.shape)
                block = block.gather(dim, index)
        return block


def outer_dim(axes: Sequence[int], dim: int, of: Mapping[int, Axis]) -> int:
    """Where the axis that the one at `dim` lies within stands: the nearest, those before it first."""
    wanted = of[axes[dim]].within
    places = [place for place, axis in enumerate(axes) if axis == wanted]
    return min(places, key=lambda place: (place > dim, abs(place - dim)))


# --- from a module --------------------------------------------------------------------------------------
class UntraceableError(ValueError):
    """The network cannot be traced."""


def derive(model: nn.Module, inputs: Tensor) -> Symmetry:
    """What may be permuted in `model`, found on a batch of example inputs [samples, ...].

    The module is as it was afterwards, and its values have no part in what is found. That is also tried: axes whose
    random permutation changes the outputs are held. Where some parameters serve in training alone, the training mode
    is looked into as well.

    Raises UntraceableError where torch.export cannot trace the module.
    """
    program = _exported(model, inputs, training=False)
    state = model.state_dict()
    entries: dict[str, Dims] = {
        name: [
            [Factor(size, f"{name}[{place}]")] if size != 1 else [] for place, size in enumerate(tensor.shape)
        ]
        for name, tensor in state.items()
    }
    aliases = _aliases(model)
    for names in aliases:
        first, *others = [entries[name] for name in names if name in entries] or [[]]
        for other in others:
            for one, dim in zip(first, other, strict=True):
                unify(one, dim)
    trace = Trace()
    _follow(trace, program, entries)
    in_training = Trace()
    used = _used(program, aliases)
    if any(name not in used for name, _ in model.named_parameters()):
        in_training_program = _exported(model, inputs, training=True)
        _follow(in_training, in_training_program, entries)
        used |= _used(in_training_program, aliases)
    for name, dims in entries.items():
        if name not in used or 0 in state[name].shape:
            for dim in dims:
                hold(dim, UNUSED)
    nodes = {node: dims for node, dims in trace.values.items() if _is_tensor(dims)}
    others_nodes = [dims for dims in in_training.values.values() if _is_tensor(dims)]
    _settle(trace.mixed + in_training.mixed, list(entries.values()), [*nodes.values(), *others_nodes])
    nodes = {node: dims for node, dims in nodes.items() if not any(_is_odd(dim) for dim in dims)}
    numbering = _Numbering()
    tensors = {name: numbering.layout(dims) for name, dims in entries.items()}
    layouts = {node.name: numbering.layout(dims) for node, dims in nodes.items()}
    found = Symmetry(
        axes=numbering.axes([*tensors.values(), *layouts.values()]),
        tensors=tensors,
        nodes=layouts,
        graph=program.graph_module,
        placeholders=tuple(
            source if source is None or source in state else program.constants[source]
            for source in _sources(program)
        ),
        batch_size=len(inputs),
    )
    return _tried(found, state, inputs)


def _follow(trace: Trace, program: Any, entries: dict[str, Dims]) -> None:
    """Go through a traced program, whose parameters and buffers have the dimensions in `entries`."""
    for node, source in zip(program.graph.nodes, _sources(program), strict=False):
        known = entries.get(source) if source is not None else None
        trace.values[node] = held_like(node.meta.get("val"), INPUT) if known is None else known
    outputs = {
        spec.arg.name
        for spec in program.graph_signature.output_specs
        if spec.kind.name == "USER_OUTPUT" and hasattr(spec.arg, "name")
    }
    for node in program.graph.nodes:
        if node.op == "output":
            for argument in nodes_in(node.args):
                # In training mode BatchNorm's new statistics come out as well.
                for dim in all_dims(trace.values[argument]) if argument.name in outputs else ():
                    hold(dim, OUTPUT)
        elif node.op != "placeholder":
            trace.values[node] = _handled(trace, node)


def _used(program: Any, aliases: Sequence[Sequence[str]]) -> set[str]:
    """Entries of the state dict that the program computes with, by all their names."""
    named = zip(program.graph.nodes, _sources(program), strict=False)
    used = {source for node, source in named if source is not None and node.users}
    return used.union(*(names for names in aliases if used & set(names)))


def _exported(model: nn.Module, inputs: Tensor, training: bool) -> Any:
    with modes_kept(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of recurrent layers' flat weights, which nothing here reads
        model.train(training)
        try:
            return torch.export.export(model, (inputs,), strict=False)
        except Exception as error:  # export raises a dozen kinds
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UntraceableError(f"torch.export cannot trace the network: {text}") from error


def _sources(program: Any) -> Iterator[str | None]:
    """Of each placeholder, the name of its parameter, buffer or constant; None for an input."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    for node in program.graph.nodes:
        if node.op == "placeholder":
            yield names.get(node.name)


def _handled(trace: Trace, node: fx.Node) -> Any:
    handler = HANDLERS.get(name_of(node), unknown)
    try:
        return handler(trace, node)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):  # not known in this form
        return unknown(trace, node)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(axis, Factor) for dim in value for axis in dim)


def _aliases(model: nn.Module) -> list[list[str]]:
    """Names in the state dict that are one tensor."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _settle(mixtures: Sequence[tuple[Dims, Dims]], entries: Sequence[Dims], nodes: Sequence[Dims]) -> None:
    """Let an axis lie within another, or be stacked, only where that is so in every tensor."""
    tensors = [*entries, *nodes]
    while True:
        before = _marks(tensors)
        for dims in tensors:
            here = {axis for dim in dims for axis in expand(dim)}
            for axis in here:
                _loosen(axis, here)
        for dim in (dim for dims in entries for dim in dims):
            if _is_odd(dim):
                _simplify(dim)
        for over, dims in mixtures:
            mixed = {axis for dim in over for axis in expand(dim)}
            for axis in {axis for dim in dims for axis in expand(dim)} - mixed:
                # What is mixed over the units around an axis knows all of their orders at once.
                if axis.within is not None and innermost(axis.within) in mixed:
                    unstack(axis)
                    root(axis).within = None
        if _marks(tensors) == before:
            return


def _marks(tensors: Sequence[Dims]) -> list[tuple[int, bool, bool, str]]:
    return [
        (id(axis), axis.within is None, axis.stack is None, axis.held)
        for dims in tensors
        for dim in dims
        for axis in expand(dim)
    ]


def _loosen(axis: Factor, here: set[Factor]) -> None:
    """In a tensor that has the axis without the one around it, all of the other's units have one order of it."""
    axis = root(axis)
    if axis.within is None:
        return
    around = innermost(axis.within)
    if around not in here:
        unstack(axis)
        root(axis).within = None
    elif around.within is not None and not around.held and axis.stack is None:
        around.within = None  # two levels are enough


def _is_odd(dim: Dim) -> bool:
    """Segments and stacks are only understood where a dimension is nothing else."""
    axes = expand(dim)
    joined = [axis for axis in axes if axis.segments is not None and not axis.held]
    stacked = [axis for axis in axes if axis.stack is not None and not axis.held]
    return bool((joined and len(axes) > 1) or (stacked and stacked != axes[1:]))


def _simplify(dim: Dim) -> None:
    axes = expand(dim)
    if any(axis.segments is not None for axis in axes):
        hold(axes, "is joined from parts inside of a product")
    for axis in axes:
        unstack(axis)


class _Numbering:
    """Gives axes their numbers."""

    def __init__(self) -> None:
        self._numbers: dict[Factor, int] = {}

    def layout(self, dims: Dims) -> Layout:
        per_dim = [list(self._segments(dim, 0)) for dim in dims]
        return tuple(
            Piece(
                slices=tuple(place for place, _ in choice),
                axes=tuple(self._number(axis) for _, axes in choice for axis in axes),
            )
            for choice in product(*per_dim)
        )

    def _segments(self, dim: Dim, at: int) -> Iterator[tuple[slice, Dim]]:
        axes = expand(dim)
        if len(axes) == 1 and axes[0].segments is not None and not axes[0].held:
            for segment in axes[0].segments:
                yield from self._segments(segment, at)
                at += size_of(segment)
        elif len(axes) > 1 and axes[1].stack is not None and not axes[1].held:
            size = size_of(axes[1:])
            for unit in range(axes[0].size):
                parts = [axis.stack[unit] for axis in axes[1:] if axis.stack is not None]
                yield slice(at + unit * size, at + (unit + 1) * size), expand(parts)
        else:
            yield slice(at, at + size_of(axes)), axes

    def _number(self, axis: Factor) -> int:
        return self._numbers.setdefault(axis, len(self._numbers))

    def axes(self, layouts: Iterable[Layout]) -> dict[int, Axis]:
        """All that were numbered. What lies within something that never was stands by itself."""
        found = {}
        for axis, number in self._numbers.items():
            around = None if axis.within is None else self._numbers.get(innermost(axis.within))
            found[number] = Axis(axis.size, around, axis.held, axis.name)
        for layout in layouts:
            for piece in layout:
                _hold_shared(piece, found)
        return found


def _hold_shared(piece: Piece, axes: dict[int, Axis]) -> None:
    """Where two axes of one tensor lie within a third (the channels that a grouped convolution reads and writes), that
    one stays: its units could only change places with both at once."""
    around = [axes[axis].within for axis in set(piece.axes)]
    for number in {one for one in around if one is not None and around.count(one) > 1}:
        if not axes[number].held:
            old = axes[number]
            axes[number] = Axis(old.size, old.within, "groups of a convolution keep their places", old.name)


# --- trying ---------------------------------------------------------------------------------------------
GIVEN_AWAY = "changes the outputs when it is permuted"
_TOLERANCE = 1e-3
"""Of outputs, relative to the largest: far above rounding, and far below what a wrong order does. Half precision rounds
more coarsely."""


_TRIALS = 4


def _tried(found: Symmetry, state: Mapping[str, Tensor], inputs: Tensor) -> Symmetry:
    """`found` without the axes that permutations of random parameters give away.

    state: of the module, for shapes and dtypes; only its integers are used.
    """
    generator = torch.Generator().manual_seed(0)
    params = {name: _drawn(name, tensor, generator) for name, tensor in state.items()}
    expected = run(found, params, inputs)
    if not bool(expected.double().isfinite().all()):
        return found  # nothing can be tried on such a network, and what was derived stands
    for _ in range(_TRIALS):
        orders = {number: _unlike(order) for number, order in found.random(generator).items()}
        if _agree(run(found, found.permute(params, orders), inputs), expected):
            continue
        wrong = {
            number
            for number in found.free
            if not _agree(run(found, found.permute(params, {number: orders[number]}), inputs), expected)
        }
        found = replace(
            found,
            axes={
                number: replace(axis, held=GIVEN_AWAY)
                if number in wrong or not (wrong or axis.held)
                else axis
                for number, axis in found.axes.items()
            },
        )
    return found


def _unlike(order: Tensor) -> Tensor:
    """Of two units a random order is the old one every other time: then the next."""
    stays = order == torch.arange(order.shape[-1])
    return torch.where(stays.all(-1, keepdim=True), order.roll(1, -1), order)


def _drawn(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random, of a size at which activations neither fade nor explode; nowhere zero or alike."""
    if not tensor.is_floating_point():
        return tensor
    noise: Tensor = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    if name.endswith("running_var"):
        return noise + 0.5
    if tensor.ndim < 2:
        return noise - 0.3  # no ReLU stays shut
    fan_in = max(1, tensor.numel() // max(1, len(tensor)))
    return (noise - 0.5) * math.sqrt(12 / fan_in)


def _agree(outputs: Tensor, expected: Tensor) -> bool:
    rounding = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    outputs, expected = outputs.double(), expected.double()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return bool((outputs - expected).abs().le(max(_TOLERANCE, 16 * rounding) * max(scale, 1e-30)).all())


# --- running --------------------------------------------------------------------------------------------
class _Watching(fx.Interpreter):
    """Runs the graph and shows the tensors of some nodes."""

    def __init__(self, graph: fx.GraphModule, show: Callable[[str, Any], Any]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._show = show

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        return self._show(node.name, value) if node.op == "call_function" else value


@torch.no_grad()
def run(
    symmetry: Symmetry,
    params: Params,
    inputs: Tensor,
    show: Callable[[str, Any], Any] = lambda name, value: value,
) -> Tensor:
    """The network's outputs on one batch, in eval mode.

    inputs: [batch_size, ...]. show: called with each node's name and value; what it returns takes the value's place.
    """
    outputs = _Watching(symmetry.graph, show).run(*arguments_of(symmetry, params, inputs))
    return cast(Tensor, outputs[0] if isinstance(outputs, tuple | list) else outputs)


def arguments_of(symmetry: Symmetry, params: Params, inputs: Tensor) -> list[Tensor]:
    """What the graph takes, in its order."""
    return [
        params[source] if isinstance(source, str) else inputs if source is None else source
        for source in symmetry.placeholders
    ]


# --- once for each network ------------------------------------------------------------------------------
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Symmetry]] = WeakKeyDictionary()
"""By module and shape of a batch: a network's structure never changes."""


def symmetry_of(model: nn.Module, inputs: Tensor) -> Symmetry:
    """What may be permuted in the module, traced with a batch of at most CHUNK of the inputs.

    Raises ValueError where the network cannot be traced, with the remedy.
    """
    batch = inputs[:CHUNK]
    key = (tuple(batch.shape), batch.dtype)
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        try:
            known[key] = derive(model, batch)
        except UntraceableError as error:
            raise ValueError(f"{error}; leave the rules out that look into it (align, repair)") from error
    return known[key]
