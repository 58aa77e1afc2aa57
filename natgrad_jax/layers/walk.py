"""One walk over a jaxpr, which finds the products that a parameter leaf enters.

A leaf is followed through reshapes, transposes, slices, joins, casts and multiples, into jit, remat and scan. Where it
enters a `dot_general` or a convolution whose other operand is no leaf, or is a table that is looked up, the walk adds a
zero to the output and keeps the other operand: the derivative with respect to that zero is the sensitivity, the other
one is the activation. What is added to a product, a bias, has the sensitivities of the product. Any other use is named,
and the leaf, or the slice of it that is used so, is then differentiated as a whole: slower, never wrong.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from natgrad_jax.operators.outer import Layout, Step

Mode = jax.lax.GatherScatterMode
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}


@dataclass(frozen=True)
class Piece:
    """What steps, the last of which is a slice, leave of a leaf; all of it without."""

    leaf: int
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Mark:
    """A variable that is a view of a leaf: an array of this shape, after `steps`, times `factor`.

    Of several leaves that are joined, with each other or with numbers that are none, each is a view in the place of the
    sum of all: zeros stand where the others are.

    `scans` has an entry for every scan that the walk is in: whether it runs over the view, an axis of which is then
    in front of those that are seen, or closes over it. `factor` is one number, of shape (), or None for 1.
    """

    leaf: int
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    scans: tuple[bool, ...] = ()
    factor: Any = None

    @property
    def lead(self) -> int:
        """How many axes are not seen."""
        return sum(self.scans)

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape of the variable."""
        return self.shape[self.lead :]

    @property
    def piece(self) -> Piece:
        """What of the leaf is seen, before that is moved."""
        ends = [i + 1 for i, (kind, _) in enumerate(self.steps) if kind == "slice"]
        return Piece(self.leaf, self.steps[: max(ends, default=0)])

    def reshaped(self, shape: Sequence[int]) -> "Mark":
        """The same numbers in another shape."""
        full = (*self.shape[: self.lead], *shape)
        return replace(self, steps=(*self.steps, ("reshape", full)), shape=full)

    def transposed(self, permutation: Sequence[int]) -> "Mark":
        """The same numbers with their axes in another order."""
        full = (*range(self.lead), *(self.lead + i for i in permutation))
        return replace(self, steps=(*self.steps, ("transpose", full)), shape=tuple(self.shape[i] for i in full))

    def sliced(self, ends: Sequence[tuple[int, int]]) -> "Mark":
        """A part of the numbers."""
        full = (*((0, size) for size in self.shape[: self.lead]), *ends)
        shape = tuple(end - start for start, end in full)
        return self if shape == self.shape else replace(self, steps=(*self.steps, ("slice", full)), shape=shape)

    def padded(self, axis: int, before: int, after: int) -> "Mark":
        """The numbers as part of an array, of which they are one stretch along an axis."""
        full = tuple((before, after) if i == self.lead + axis else (0, 0) for i in range(len(self.shape)))
        shape = tuple(size + sum(zeros) for size, zeros in zip(self.shape, full, strict=True))
        return replace(self, steps=(*self.steps, ("pad", full)), shape=shape)

    @property
    def joined(self) -> bool:
        """Whether the variable holds other numbers too."""
        return any(kind == "pad" for kind, _ in self.steps)

    def times(self, factor: Any) -> "Mark":
        """The same numbers, multiplied."""
        return replace(self, factor=factor if self.factor is None else self.factor * factor)


Marks = tuple[Mark, ...]  # of one variable: of several if leaves are joined


@dataclass(frozen=True)
class Use:
    """One product that a piece of a leaf enters, as G matrices (I, O), at T positions.

    `sensitivity` brings the derivative with respect to the output of the product to (G, T, O). Where a leaf is cut, the
    piece itself may serve as the output of a product of 1 with it, with I = 1: then the use is `whole`. Where rows of a
    table are `picked`, the activation is one-hot, and kept as indices (G, T, 1), -1 for none.
    """

    piece: Piece
    layout: Layout
    scans: tuple[bool, ...]
    where: str
    sensitivity: Callable[[Array], Array]
    whole: bool = False
    picked: bool = False
    added_to: int | None = None  # the place of the product that a bias is added to
    box: tuple[tuple[int, int], ...] | None = None  # where the piece is in matrices that hold other numbers too

    @property
    def route(self) -> "Route":
        """What is followed, and how."""
        return (self.piece, self.whole)


Route = tuple[Piece, bool]


Found = tuple[Use, Callable[..., Array]]  # and what brings the other operands to (G, T, I)


@dataclass
class Tape:
    """What a walk sees: the uses in order, the pieces that are used otherwise, and the activations, `others`.

    `zeros` are added to the outputs of the uses of the routes in `followed`, in order; None on a first walk.
    """

    zeros: Sequence[Array] | None = None
    followed: frozenset[Route] = frozenset()
    uses: list[Use] = field(default_factory=list)
    others: list[Array] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    refused: dict[Piece, str] = field(default_factory=dict)
    reads: Counter[int] = field(default_factory=Counter)  # how often each output is used, by its place
    same: list[tuple[Any, int]] = field(default_factory=list)  # arrays of the numbers of an output in their order

    def record(self, use: Use, activation: Array, factor: Any, out: Array) -> Array:
        """The output of a product, with the zero of its place."""
        if self.zeros is not None and use.route not in self.followed:
            return out
        place = len(self.uses)
        self.uses.append(use)
        self.others.append(activation if factor is None else _times(activation, factor))
        self.outputs.append(out)
        self.same.append((out, place))
        return out if self.zeros is None else out + self.zeros[place]

    def place_of(self, value: Any) -> int | None:
        """Of which use a value is the output."""
        return next((place for out, place in self.same if out is value), None)

    def read(self, values: Sequence[Any]) -> None:
        """Count the outputs of uses among these."""
        self.reads.update(place for place in map(self.place_of, values) if place is not None)

    def refuse(self, marks: Sequence[Marks], reason: str) -> None:
        """Name the pieces that are used in a way that is not followed."""
        for mark in itertools.chain(*marks):
            self.refused.setdefault(mark.piece, reason)


Marked = tuple[list[Any], list[Marks]]


def run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], marks: Sequence[Marks], tape: Tape) -> Marked:
    """The outputs of a jaxpr and their marks."""
    values: dict[Any, Any] = {}
    marked: dict[Any, Marks] = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    def mark_of(v: Any) -> Marks:
        return () if isinstance(v, Literal) else marked.get(v, ())

    def write(v: Any, value: Any, mark: Marks) -> None:
        values[v] = value
        if mark:
            marked[v] = mark

    for v, value in zip(jaxpr.constvars, consts, strict=True):
        write(v, value, ())
    for v, value, mark in zip(jaxpr.invars, args, marks, strict=True):
        write(v, value, mark)
    for eqn in jaxpr.eqns:
        inputs, seen = [read(v) for v in eqn.invars], [mark_of(v) for v in eqn.invars]
        if any(seen):
            outs, out_marks = _follow(eqn, inputs, seen, tape)
        else:
            outs, out_marks = _bound(eqn, inputs), [()] * len(eqn.outvars)
        if tape.zeros is None and _keeps_order(eqn):
            tape.same += [(outs[0], place) for place in map(tape.place_of, inputs) if place is not None]
        elif tape.zeros is None and not (any(seen) and eqn.primitive.name in CALLS):
            tape.read(inputs)
        for v, value, mark in zip(eqn.outvars, outs, out_marks, strict=True):
            write(v, value, mark)
    return [read(v) for v in jaxpr.outvars], [mark_of(v) for v in jaxpr.outvars]


def holds(jaxpr: Jaxpr, names: Sequence[str]) -> bool:
    """Whether one of these primitives is in it, at any depth."""
    inner = [
        x for eqn in jaxpr.eqns for value in eqn.params.values() for x in jax.tree.leaves(value, is_leaf=_is_jaxpr)
    ]
    within = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in inner if _is_jaxpr(x)]
    return any(eqn.primitive.name in names for eqn in jaxpr.eqns) or any(holds(x, names) for x in within)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


def _bound(eqn: Any, inputs: list[Any]) -> list[Any]:
    """What the equation gives; the rules of custom derivatives stay in force."""
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, params = given if isinstance(given, tuple) else ([], given)  # a pair up to jax 0.9
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *inputs, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _follow(eqn: Any, inputs: list[Any], marks: list[Marks], tape: Tape) -> Marked:
    """One equation that a leaf enters."""
    name = eqn.primitive.name
    if name in CALLS:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        body, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        return run(body, consts, inputs, marks, tape)
    if name == "scan":
        return _scan(eqn, inputs, marks, tape)
    if len(inputs) == 1 and all(views := [_view(eqn, mark) for mark in marks[0]]):
        return _bound(eqn, inputs), [tuple(view for view in views if view)]
    cut = name in ("split", "unstack") or (name == "slice" and set(eqn.params["strides"] or (1,)) == {1})
    if cut and not any(mark.joined for mark in marks[0]):
        return _slices(eqn, inputs, marks[0][0], tape)
    if name in ("mul", "div", "neg"):
        return _bound(eqn, inputs), [_multiple(eqn, inputs, marks, tape)]
    if name in ("concatenate", "stack"):
        return _bound(eqn, inputs), [_joint(eqn, marks)]
    holders = [i for i, mark in enumerate(marks) if mark]
    outs = _bound(eqn, inputs)
    finds = [FIND[name](eqn, holders[0], mark) for mark in marks[holders[0]]] if name in FIND else [None]
    if len(holders) > 1 or not all(finds):
        tape.refuse(marks, name)
        return outs, [()] * len(outs)
    others = [x for i, x in enumerate(inputs) if i != holders[0]]
    for mark, found in zip(marks[holders[0]], finds, strict=True):
        use, activation = found  # type: ignore[misc]
        if name == "add":
            use = replace(use, added_to=tape.place_of(others[0]))
        outs[0] = tape.record(use, activation(*others), mark.factor, outs[0])
    return outs, [()]


def _joint(eqn: Any, marks: list[Marks]) -> Marks:
    """The marks of arrays that are joined along an axis."""
    stacked = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if stacked else "dimension"]
    ends = list(itertools.accumulate((1 if stacked else v.aval.shape[axis] for v in eqn.invars), initial=0))
    out: Marks = ()
    for (start, end), of_input in zip(itertools.pairwise(ends), marks, strict=True):
        for mark in of_input:
            part = mark.reshaped((*mark.seen[:axis], 1, *mark.seen[axis:])) if stacked else mark
            out = (*out, part.padded(axis, start, ends[-1] - end))
    return out


def _view(eqn: Any, mark: Mark) -> Mark | None:
    """The mark of the output, if the equation only moves the numbers of its input or casts them."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name == "convert_element_type" and jnp.issubdtype(out.dtype, jnp.floating):
        return mark
    if name == "transpose":
        return mark.transposed(eqn.params["permutation"])
    if _keeps_order(eqn):
        return mark.reshaped(out.shape)
    return mark if name in ("copy", "copy_p") else None


def _keeps_order(eqn: Any) -> bool:
    """Whether the output has the numbers of the one input in the same order."""
    name, dimensions = eqn.primitive.name, eqn.params.get("broadcast_dimensions")
    if name == "transpose":
        return _ascending([i for i in eqn.params["permutation"] if eqn.invars[0].aval.shape[i] != 1])
    if name == "broadcast_in_dim":
        return len(eqn.invars) == 1 and eqn.outvars[0].aval.size == eqn.invars[0].aval.size and _ascending(dimensions)
    return name in ("squeeze", "expand_dims") or (name == "reshape" and eqn.params["dimensions"] is None)


def _slices(eqn: Any, inputs: list[Any], mark: Mark, tape: Tape) -> Marked:
    """Parts of a leaf; each may be used as a whole."""
    outs, start = _bound(eqn, inputs), 0
    marks: list[Marks] = []
    for i, out in enumerate(outs):
        if eqn.primitive.name == "slice":
            ends = list(zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True))
        else:
            ends, axis = [(0, size) for size in mark.seen], eqn.params["axis"]
            size = out.shape[axis] if eqn.primitive.name == "split" else 1
            ends[axis] = (start, start + size)
            start += size
        part = mark.sliced([(int(a), int(b)) for a, b in ends])
        if part is not mark:
            lead = math.prod(part.shape[: part.lead])
            layout = Layout((), (*part.steps, ("reshape", (lead, 1, out.size))))
            use = Use(part.piece, layout, part.scans, eqn.primitive.name, lambda delta: delta.reshape(1, 1, -1), True)
            outs[i] = tape.record(use, jnp.ones((1, 1, 1), out.dtype), part.factor, out)
        marks.append((part.reshaped(out.shape),) if out.size else ())
    return outs, marks


def _multiple(eqn: Any, inputs: list[Any], marks: list[Marks], tape: Tape) -> Marks:
    """The marks of the output, if it is a leaf times one number. That may depend on other leaves, or on products.

    A number that is itself a leaf, or a part of the same one, is a use of it that is not followed.
    """
    if eqn.primitive.name == "neg":
        return tuple(mark.times(-jnp.ones((), eqn.outvars[0].aval.dtype)) for mark in marks[0])
    number = 0 if marks[1] and eqn.invars[0].aval.size == 1 and eqn.primitive.name == "mul" else 1
    kept, value, shape = marks[1 - number], eqn.invars[number].aval, eqn.outvars[0].aval.shape
    if not kept or value.size != 1 or shape != kept[0].seen:
        tape.refuse(marks, eqn.primitive.name)
        return ()
    tape.refuse([marks[number]], eqn.primitive.name)
    c = jnp.reshape(jnp.asarray(inputs[number], value.dtype), ())
    return tuple(mark.times(1 / c if eqn.primitive.name == "div" else c) for mark in kept)


def _times(x: Array, factor: Array) -> Array:
    dtype = jnp.promote_types(x.dtype, factor.dtype)
    return x.astype(dtype) * factor.astype(dtype)


def _ascending(dimensions: Any) -> bool:
    return dimensions is not None and all(a < b for a, b in itertools.pairwise(dimensions))


def _others(ndim: int, *taken: Sequence[int]) -> list[int]:
    return [i for i in range(ndim) if not any(i in axes for axes in taken)]


def _product(eqn: Any, side: int, mark: Mark) -> Found | None:
    """A `dot_general` whose operand `side` is a leaf."""
    contracting, batch = eqn.params["dimension_numbers"]
    other = eqn.invars[1 - side].aval
    if not jnp.issubdtype(other.dtype, jnp.floating):
        return None
    free = _others(len(mark.seen), contracting[side], batch[side])
    theirs = _others(other.ndim, contracting[1 - side], batch[1 - side])
    size = lambda shape, axes: math.prod(shape[i] for i in axes)  # noqa: E731
    groups, inside, out = (size(mark.seen, axes) for axes in (batch[side], contracting[side], free))
    positions = size(other.shape, theirs)
    order = (*batch[1 - side], *theirs, *contracting[1 - side])
    view = mark.transposed((*batch[side], *contracting[side], *free))
    lead = math.prod(mark.shape[: mark.lead])
    layout = Layout((), (*view.steps, ("reshape", (lead * groups, inside, out))))
    first, second = (out, positions) if side == 0 else (positions, out)

    def sensitivity(delta: Array) -> Array:
        delta = delta.reshape(groups, first, second)
        return jnp.swapaxes(delta, 1, 2) if side == 0 else delta

    activation = lambda x: jnp.transpose(x, order).reshape(groups, positions, inside)  # noqa: E731
    return Use(mark.piece, layout, mark.scans, "dot_general", sensitivity), activation


def _convolution(eqn: Any, side: int, mark: Mark) -> Found | None:
    """A convolution whose kernel is a leaf: the activations are the patches that it is laid on."""
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    image = eqn.invars[0].aval
    if side != 1 or eqn.params["batch_group_count"] != 1 or not jnp.issubdtype(image.dtype, jnp.floating):
        return None
    out_axis, in_axis, *window = numbers.rhs_spec
    out, channels, spatial = mark.seen[out_axis], mark.seen[in_axis], [mark.seen[i] for i in window]
    inside = channels * math.prod(spatial)
    view = mark.transposed((out_axis, in_axis, *window)).reshaped((groups, out // groups, inside)).transposed((0, 2, 1))
    lead = math.prod(mark.shape[: mark.lead])
    layout = Layout((), (*view.steps, ("reshape", (lead * groups, inside, out // groups))))
    options = {k: eqn.params[k] for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    positions = math.prod(eqn.outvars[0].aval.shape[i] for i in (numbers.out_spec[0], *numbers.out_spec[2:]))

    def activation(x: Array) -> Array:
        x = jnp.transpose(x, numbers.lhs_spec)  # (batch, channels, space)
        # A copy, in the form of a convolution: of full precision whatever that of the model.
        highest = jax.lax.Precision.HIGHEST
        patches = jax.lax.conv_general_dilated_patches(x, spatial, **options, precision=highest)
        patches = jnp.moveaxis(patches, 1, -1)  # (batch, space, channels · window)
        return jnp.moveaxis(patches.reshape(positions, groups, inside), 1, 0)

    def sensitivity(delta: Array) -> Array:
        delta = jnp.moveaxis(jnp.transpose(delta, numbers.out_spec), 1, -1)  # (batch, space, out)
        return jnp.moveaxis(delta.reshape(positions, groups, out // groups), 1, 0)

    return Use(mark.piece, layout, mark.scans, "conv_general_dilated", sensitivity), activation


def _lookup(eqn: Any, side: int, mark: Mark) -> Found | None:
    """A `gather`, or a `dynamic_slice`, of whole rows of a table along one axis."""
    sizes = eqn.params["slice_sizes"]
    axes = [i for i, (size, seen) in enumerate(zip(sizes, mark.seen)) if size != seen]
    if side != 0 or mark.joined or mark.factor is not None or len(axes) != 1 or sizes[axes[0]] != 1:
        return None
    axis, count, out = axes[0], mark.seen[axes[0]], eqn.outvars[0].aval
    if eqn.primitive.name == "dynamic_slice":
        mode, column, offset = Mode.CLIP, axis, range(out.ndim)
    else:
        numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
        # Along the other axes a slice starts at 0, or is dropped.
        alone = numbers.start_index_map == (axis,) or (axis in numbers.start_index_map and mode != Mode.FILL_OR_DROP)
        if not alone or mode not in (Mode.CLIP, Mode.FILL_OR_DROP, Mode.PROMISE_IN_BOUNDS):
            return None
        column, offset = numbers.start_index_map.index(axis), numbers.offset_dims
    lead, width = math.prod(mark.shape[: mark.lead]), math.prod(mark.seen) // count
    view = mark.transposed((axis, *_others(len(mark.seen), (axis,))))
    layout = Layout((), (*view.steps, ("reshape", (lead, count, width))))
    order = (*_others(out.ndim, offset), *offset)

    def activation(*indices: Array) -> Array:
        index = indices[column] if eqn.primitive.name == "dynamic_slice" else indices[0][..., column]
        index = jnp.clip(index, 0, count - 1) if mode == Mode.CLIP else index
        within = (index >= 0) & (index < count)
        return jnp.where(within, jnp.where(within, index, 0).astype(jnp.int32), -1).reshape(1, -1, 1)

    sensitivity = lambda delta: jnp.transpose(delta, order).reshape(1, -1, width)  # noqa: E731
    return Use(mark.piece, layout, mark.scans, eqn.primitive.name, sensitivity, picked=True), activation


def _addition(eqn: Any, side: int, mark: Mark) -> Found | None:
    """A bias. That the other operand is a product, at one position, is seen at the end of the walk."""
    if mark.joined or any(v.aval.shape != mark.seen for v in eqn.invars):
        return None
    matrices = (math.prod(mark.shape[: mark.lead]), 1, math.prod(mark.seen))
    layout = Layout((), (*mark.steps, ("reshape", matrices)))
    dtype = eqn.outvars[0].aval.dtype
    sensitivity = lambda delta: delta.reshape(1, 1, -1)  # noqa: E731
    return Use(mark.piece, layout, mark.scans, "add", sensitivity), lambda _: jnp.ones((1, 1, 1), dtype)


FIND: dict[str, Callable[[Any, int, Mark], Found | None]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _lookup,
    "dynamic_slice": _lookup,
    "add": _addition,
}


def _scan(eqn: Any, inputs: list[Any], marks: list[Marks], tape: Tape) -> Marked:
    """A loop: leaves that it closes over are used at every step, leaves that it runs over a slice at a time."""
    closed, params = eqn.params["jaxpr"], eqn.params
    n, m, length = params["num_consts"], params["num_carry"], params["length"]
    body = closed.jaxpr
    consts, carry, xs = inputs[:n], inputs[n : n + m], inputs[n + m :]
    changed = [n + i for i in range(m) if body.outvars[i] is not body.invars[n + i]]
    tape.refuse([marks[i] for i in changed], "the carry of a scan")
    inner = [
        () if i in changed else tuple(replace(mark, scans=(*mark.scans, i >= n + m)) for mark in of_input)
        for i, of_input in enumerate(marks)
    ]
    place = len(tape.uses)
    seen = Tape(None, tape.followed)
    structs = lambda xs: [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in xs]  # noqa: E731
    slices = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]

    def trial(*args: Any) -> list[Any]:
        outs, ends = run(body, closed.consts, args, inner, seen)
        # A view that leaves the loop is a use of its own, but for a carry that stays what it was.
        stays = [i < m and n + i not in changed and bool(inner[n + i]) for i in range(len(outs))]
        seen.refuse([() if same else end for end, same in zip(ends, stays, strict=True)], "an output of a scan")
        seen.read(outs)
        return outs

    jax.eval_shape(trial, *structs(consts), *structs(carry), *slices)
    kept = [use for use in seen.uses if tape.zeros is None or use.route in tape.followed]
    zeros = [] if tape.zeros is None else list(tape.zeros[place : place + len(kept)])

    def step(carry: list[Any], data: tuple[list[Any], list[Any]]) -> tuple[list[Any], tuple[list[Any], Any, Any]]:
        xs, zeros = data
        own = Tape(None if tape.zeros is None else zeros, tape.followed)
        outs, _ = run(body, closed.consts, [*consts, *carry, *xs], inner, own)
        return outs[:m], (outs[m:], own.others, own.outputs)

    carry, (ys, others, outputs) = jax.lax.scan(
        step, carry, (xs, zeros), length=length, reverse=params["reverse"], unroll=params["unroll"]
    )
    for piece, reason in seen.refused.items():
        tape.refused.setdefault(piece, reason)
    tape.reads.update({place + i: count for i, count in seen.reads.items()})
    for use, other, out in zip(kept, others, outputs, strict=True):
        *outside, over = use.scans
        added_to = use.added_to if tape.zeros is None else None  # asked for on the first walk alone
        if added_to is not None:
            added_to = place + added_to if seen.uses[added_to].scans == use.scans else None
        sensitivity = _stacked(use.sensitivity, over)
        tape.uses.append(replace(use, scans=tuple(outside), sensitivity=sensitivity, added_to=added_to))
        tape.others.append(_joined(other, over))
        tape.outputs.append(out)
    unchanged = [() if n + i in changed else marks[n + i] for i in range(m)]
    return [*carry, *ys], [*unchanged, *[()] * len(ys)]


def _joined(x: Array, over: bool) -> Array:
    """(L, G, T, I) with the L steps as further matrices, or as further positions."""
    steps, g, t, i = x.shape
    return x.reshape(steps * g, t, i) if over else jnp.moveaxis(x, 0, 1).reshape(g, steps * t, i)


def _stacked(sensitivity: Callable[[Array], Array], over: bool) -> Callable[[Array], Array]:
    return lambda delta: _joined(jax.vmap(sensitivity)(delta), over)
