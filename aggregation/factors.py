"""The factors of which a traced network's dimensions are products, while it is being found out which are one and the same.

Belongs here: making factors one, splitting and joining them, and holding those whose order has to stay. A `Factor` ends
up as an `Axis` of `symmetry.py`, where what a product, a held axis and "within" mean is said. Which operation ties what
is said in `operations.py`.
"""

import math
from collections.abc import Sequence

INPUT, OUTPUT, POSITION = "is an input", "is an output", "is looked at by position"
UNUSED = "is used nowhere"
SLICED = "is sliced by position"
NATURAL = (INPUT, OUTPUT, POSITION, UNUSED)
"""Reasons that nobody has to hear of."""


class Factor:
    """An axis in the making: perhaps one with others, perhaps a product or a sequence of further ones."""

    __slots__ = ("factors", "held", "name", "same", "segments", "size", "stack", "touched", "within")

    def __init__(self, size: int, name: str = "", held: str = "", within: "Factor | None" = None) -> None:
        self.size = size
        self.name = name
        self.held = held
        self.within = within
        self.same: Factor | None = None
        """The one that stands for this."""
        self.factors: list[Factor] | None = None
        """Outermost first, where it is a product."""
        self.segments: list[Dim] | None = None
        """In order, where it is others side by side."""
        self.stack: list[Factor] | None = None
        """Where each unit of the axis around it has another one in its place: those others."""
        self.touched = False
        """Tied to something."""


Dim = list[Factor]
"""A dimension: a product of factors, outermost first. Empty for a dimension of one."""
Dims = list[Dim]
"""A tensor: its dimensions."""


def root(axis: Factor) -> Factor:
    """The factor that stands for it and all that are one with it."""
    while axis.same is not None:
        axis = axis.same
    return axis


def expand(dim: Dim) -> Dim:
    """In axes that are no product."""
    out: Dim = []
    for axis in dim:
        axis = root(axis)
        out += expand(axis.factors) if axis.factors is not None else [axis]
    return out


def size_of(dim: Dim) -> int:
    """Units of a dimension."""
    return math.prod(axis.size for axis in dim)


def hold(dim: Dim, reason: str) -> None:
    """Its order must stay."""
    for axis in expand(dim):
        if not axis.held:
            axis.held = reason
            for segment in axis.segments or ():
                hold(segment, reason)
            hold(axis.stack or [], reason)


def split(axis: Factor, outer: int) -> None:
    """Make it a product of `outer` times the rest."""
    unstack(axis)
    axis = root(axis)
    if axis.segments is not None:
        hold([axis], "is joined from parts and then split otherwise")
        axis.segments = None
    first = Factor(outer, axis.name, axis.held, axis.within)
    rest = Factor(axis.size // outer, axis.name, axis.held, first)
    axis.factors = [first, rest]


def unstack(axis: Factor) -> None:
    """One order for all units of the axis around it after all."""
    stack, axis.stack = axis.stack, None
    for other in stack or ():
        join(axis, other)


def unify(a: Dim, b: Dim) -> None:
    """The two dimensions are one."""
    a, b = expand(a), expand(b)
    while a and b:
        one, other = a[0], b[0]
        if one.size == other.size:
            join(one, other)
            a, b = a[1:], b[1:]
        elif max(one.size, other.size) % min(one.size, other.size) == 0:
            larger = one if one.size > other.size else other
            split(larger, min(one.size, other.size))
            a, b = expand(a), expand(b)
        else:
            hold([*a, *b], "is split in two ways that do not fit")
            return
    assert not a
    assert not b


def join(a: Factor, b: Factor) -> None:
    """The two factors are one. What holds one holds both; where their parts do not fit, both are held."""
    unstack(root(a))
    unstack(root(b))
    a, b = root(a), root(b)
    if a is b:
        return
    if a.factors is not None or b.factors is not None:
        unify([a], [b])
        return
    if b.segments is not None and a.segments is None:
        a, b = b, a
    if a.segments is not None and b.segments is not None:
        if [size_of(part) for part in a.segments] == [size_of(part) for part in b.segments]:
            for one, other in zip(a.segments, b.segments, strict=True):
                unify(one, other)
        else:
            hold([a, b], "is joined from parts in two ways that do not fit")
    a.touched = b.touched = True
    if a.held or b.held:
        hold([a, b], a.held or b.held)
    if a.within is None:
        a.within = b.within
    a.name = a.name or b.name
    b.same = a


def cut(dim: Dim, points: Sequence[int]) -> list[Dim] | None:
    """A dimension as segments that end at `points`; None where it has another structure."""
    axes = expand(dim)
    if len(axes) != 1:
        return None
    (axis,) = axes
    unstack(axis)
    axis = root(axis)
    if axis.segments is None:
        bounds = [0, *points]
        axis.segments = [
            [Factor(end - begin, axis.name, axis.held, axis.within)] if end - begin > 1 else []
            for begin, end in zip(bounds, points, strict=False)
        ]
        return axis.segments
    segments: list[Dim] = []
    at = 0
    for segment in axis.segments:
        inside = [point - at for point in points if at < point < at + size_of(segment)]
        if inside:
            parts = cut(segment, [*inside, size_of(segment)])
            if parts is None:
                return None
            segments += parts
        else:
            segments.append(segment)
        at += size_of(segment)
    axis.segments = segments
    return segments


def innermost(axis: Factor) -> Factor:
    """Of a product its last factor, whose units follow each other."""
    return expand([axis])[-1]
