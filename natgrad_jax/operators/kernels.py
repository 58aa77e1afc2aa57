"""The kernel AAᵀ of rows, some of them in factors: by products of the factors, or from rows that are made."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax.operators import outer
from natgrad_jax.operators.outer import Centre, Outer, column, paired, remain, unit
from natgrad_jax.operators.picked import Picked
from natgrad_jax.operators.pieces import Pieces


class Part(NamedTuple):
    """Rows of a leaf, or of a piece of one, and their units.

    Attributes:
        rows: an array (n, …), or in factors.
        inverse: 1/units, one number, or shaped like the leaf.
        rank_one: whether these are an outer product of the last axis of the leaf and the others.
    """

    rows: Any
    inverse: Array
    rank_one: bool = False

    @property
    def in_factors(self) -> bool:
        """Whether a product of factors can be in these units, and is cheaper than one of rows that are made."""
        if not isinstance(self.rows, Outer) or _rows_are_cheaper(self.rows):
            return False
        return jnp.ndim(self.inverse) == 0 or (self.rank_one and _last_axis_is_a_side(self.rows))


def kernel(leaves: Sequence[Part], n: int, dtype: Any, width: int) -> Array:
    """Σ (A∘inverse)(A∘inverse)ᴴ over leaves, (n, n); a copy of `width` columns at a time."""
    total = jnp.zeros((n, n), dtype)
    factors: list[Outer] = []
    columns: list[tuple[Array, Array]] = []
    for part in _joined(leaves):
        rows, inverse, _ = part
        if isinstance(rows, Picked):
            total = total + rows.kernel(inverse)
        elif not isinstance(rows, Outer):
            columns.append(_in_columns(rows, inverse))
        elif part.in_factors:
            factors.append(_in_units(rows, inverse))
        elif rows.left.shape[3:] == (1, 1):
            columns.append(_in_columns(rows.explicit(), inverse))
        else:
            total = total + _of_rows(rows, inverse)
    for group in _side_by_side(columns, width):
        total = total + _of_columns(*group, dtype, width)
    with_roots = {id(x.centre.roots) if x.centre else None: x.centre for x in factors}
    for key, centre in with_roots.items():
        total = total + _of_factors([x for x in factors if (id(x.centre.roots) if x.centre else None) == key], centre)
    return total


def _joined(leaves: Sequence[Part]) -> list[Part]:
    """The parts of all leaves; side by side as one, where they share their right sides and one number."""
    parts: list[Part] = []
    for leaf in leaves:
        if not isinstance(leaf.rows, Pieces):
            parts.append(leaf)
        elif jnp.ndim(leaf.inverse):
            parts += [Part(*pair) for pair in leaf.rows.each(leaf.inverse)]
        else:
            parts += [Part(rows, leaf.inverse) for rows in leaf.rows.parts]
    out: list[Part] = []
    for part in (part for part in parts if math.prod(part.rows.shape)):
        alike = lambda other: other.inverse is part.inverse and jnp.ndim(part.inverse) == 0  # noqa: E731, B023
        place = next((i for i, x in enumerate(out) if alike(x) and _share_a_side(x.rows, part.rows)), None)
        if place is None:
            out.append(part)
        else:
            out[place] = part._replace(rows=_beside(out[place].rows, part.rows))
    return out


def _share_a_side(x: Any, y: Any) -> bool:
    if not (isinstance(x, Outer) and isinstance(y, Outer)) or x.right is not y.right or x.k != y.k:
        return False
    if x.left.shape[:4] != y.left.shape[:4] or x.left.dtype != y.left.dtype:
        return False
    if x.centre is None or y.centre is None:
        return x.centre is y.centre
    return x.centre.right is y.centre.right and x.centre.roots is y.centre.roots


def _beside(x: Outer, y: Outer) -> Outer:
    """Both as one leaf (G, I, O), whose I are those of one and then those of the other."""
    join = lambda a, b: jnp.concatenate([a, b], axis=-1)  # noqa: E731
    centre = x.centre
    if x.centre is not None and y.centre is not None:
        one, other = (jax.vmap(rows.layout.matrices)(c.shift) for rows, c in ((x, x.centre), (y, y.centre)))
        shift = jnp.concatenate([one, other], axis=2)
        centre = x.centre._replace(left=join(x.centre.left, y.centre.left), shift=shift)
    left = join(x.left, y.left)
    layout = replace(x.layout, shape=(left.shape[2], left.shape[4], x.right.shape[4]), steps=())
    return replace(x, left=left, layout=layout, centre=centre)


def _in_columns(rows: Array, inverse: Array) -> tuple[Array, Array]:
    columns = jnp.reshape(rows, (len(rows), -1))
    return columns, jnp.broadcast_to(jnp.ravel(inverse), columns.shape[1:])


def _side_by_side(parts: Sequence[tuple[Array, Array]], width: int) -> list[tuple[Array, Array]]:
    """Columns and their units; those of up to `width` in all as one, which are then one product."""
    groups: list[list[tuple[Array, Array]]] = []
    for part in parts:
        if groups and sum(len(inverse) for _, inverse in [*groups[-1], part]) <= width:
            groups[-1].append(part)
        else:
            groups.append([part])
    join = lambda arrays: arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)  # noqa: E731
    return [tuple(map(join, zip(*group, strict=True))) for group in groups]  # type: ignore[misc]


def _of_columns(columns: Array, inverse: Array, dtype: Any, width: int) -> Array:
    def part(start: Array | int, size: int) -> Array:
        taken = jax.lax.dynamic_slice_in_dim(columns, start, size, axis=1).astype(dtype)
        scaled = taken * jax.lax.dynamic_slice_in_dim(inverse, start, size)
        # Not `@`, which may copy the transpose.
        return jax.lax.dot_general(scaled, scaled.conj(), (((1,), (1,)), ((), ())))

    return _tree.sum_of_parts(part, inverse.size, min(width, inverse.size))


def _of_rows(rows: Outer, inverse: Array) -> Array:
    """From rows that are made, a part of the leaf at a time."""
    n, p = rows.shape[0], math.prod(rows.layout.shape)
    i = rows.left.shape[-1]
    inverse = rows.layout.matrices(jnp.broadcast_to(inverse, rows.layout.shape))

    def part(start: Array | int, size: int) -> Array:
        take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)  # noqa: E731
        centre = rows.centre
        if centre is not None:
            centre = centre._replace(left=take(centre.left, 4))
        made = replace(rows, left=take(rows.left, 4), centre=centre).made()
        made = jnp.broadcast_to(made, (made.shape[0], rows.k, *made.shape[2:]))
        if rows.centre is not None:
            made = made - take(jax.vmap(rows.layout.matrices)(rows.centre.shift), 2)
            made = column(rows.centre.roots, made.ndim) * made
        made = (made * take(inverse, 1)).reshape(n, -1)
        return jax.lax.dot_general(made, made, (((1,), (1,)), ((), ())))

    return _tree.sum_of_parts(part, i, min(max(outer.BLOCK // max(n * p // i, 1), 1), i))


def _rows_are_cheaper(rows: Outer) -> bool:
    """Whether making them saves more products of pairs of positions than it takes."""
    n, _, _, t, i = rows.left.shape
    o, made, terms = rows.right.shape[-1], n * rows.k, t if rows.centre is None else 2 * t
    return t > 1 and (made + terms) * i * o < made * terms * terms * (i + o)


def _last_axis_is_a_side(rows: Outer) -> bool:
    """Whether the last axis of the leaf is one side of the matrices, and the other axes are the other side."""
    shape = rows.layout.shape
    if len(shape) < 2:
        return False
    last, others = np.divmod(np.arange(math.prod(shape)).reshape(shape), shape[-1])[::-1]
    last, others = rows.layout.matrices(last), rows.layout.matrices(others)
    constant = lambda x, axis: bool(np.all(x == np.take(x, [0], axis)))  # noqa: E731
    return any(constant(last, axis) and constant(others, 3 - axis) for axis in (1, 2))


def _in_units(rows: Outer, inverse: Array) -> Outer:
    """The rows times `inverse`, one number or a table of rank one on each of the matrices; left sides are at most 1.

    For the squares of either side may leave the floats where those of the rows do not.
    """
    inside, out = (jnp.ones((), rows.dtype), inverse) if jnp.ndim(inverse) == 0 else _sides(rows, inverse)
    sides = [rows.left] if rows.centre is None else [rows.left, rows.centre.left]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), axis=(0, 1, 3, 4), initial=0.0) for x in sides])
    size = largest[:, None, None]
    on_left, on_right = (lambda x: unit(x, size) * inside), (lambda x: x * (out * jnp.where(size > 0, size, 1)))
    scaled = replace(rows, left=on_left(rows.left), right=on_right(rows.right))
    if rows.centre is None:
        return scaled
    roots, left, right, shift = rows.centre
    return replace(scaled, centre=Centre(roots, on_left(left), on_right(right), shift * inverse))


def _sides(rows: Outer, table: Array) -> tuple[Array, Array]:
    """(G, 1, I) of at most 1 and (G, 1, O), whose products are a table ≥ 0 of rank one on each of the matrices."""
    matrices = rows.layout.matrices(table)
    inside, out = (jnp.max(matrices, axis=axis, initial=0.0)[:, None] for axis in (2, 1))
    return unit(inside, jnp.max(inside, axis=2, keepdims=True, initial=0.0)), out


def _of_factors(group: Sequence[Outer], centre: Centre | None) -> Array:
    """Of leaves without a centre, or with the same roots: the mean is taken out once, of the sum over leaves."""
    at_one = [x for x in group if x.left.shape[3] == 1]
    at_many = [x for x in group if x.left.shape[3] > 1]

    def summed() -> Array:
        of_leaves = [_of_pairs(x.terms()) for x in at_many]
        return functools.reduce(jnp.add, [_of_products(at_one), *of_leaves] if at_one else of_leaves)

    if centre is None:
        return summed()
    # The trace alone says whether digits are left, so that only one of the two kernels is made.
    traces, terms = zip(*map(_traces, group), strict=True)
    one = jnp.ones((), group[0].dtype)
    return jax.lax.cond(
        remain(sum(traces), sum(terms)),
        lambda: _centred(summed(), centre.roots, group[0].k),
        lambda: functools.reduce(jnp.add, [_of_rows(x, one) for x in group]),
    )


def _traces(rows: Outer) -> tuple[Array, Array]:
    """The trace of a centred kernel without roots, and the sum of the sizes of the terms that it is made of."""
    assert rows.centre is not None
    weights, shift, pairs = jnp.square(rows.centre.roots), rows.centre.shift, rows.pairs()
    inner = lambda x, y: jnp.einsum("...ti,...si->...ts", *jnp.broadcast_arrays(x, y))  # noqa: E731
    squared = lambda a, b: jnp.sum(inner(a[0], b[0]) * inner(a[1], b[1]), axis=(-3, -2, -1))  # noqa: E731
    one, other = pairs
    squares = squared(one, one) + squared(other, other) + 2 * squared(one, other)
    lengths = lambda x: jnp.sum(jnp.square(x), axis=-1)  # noqa: E731
    terms = sum(jnp.sum(lengths(left) * lengths(right), axis=(-2, -1)) for left, right in pairs)
    over_rows = lambda x: weights @ jnp.sum(jnp.broadcast_to(x, (len(weights), rows.k)), axis=1)  # noqa: E731
    return over_rows(squares) - jnp.sum(weights) * jnp.sum(jnp.square(shift)), over_rows(terms)


def _centred(kernel: Array, roots: Array, k: int) -> Array:
    """That of rows without their mean, times roots, from that of rows with any common part."""
    n, scale = len(roots), jnp.repeat(roots, k)
    weights = jnp.square(roots) / jnp.sum(jnp.square(roots))
    means = jnp.tensordot(weights, kernel.reshape(n, k, n * k), 1).reshape(1, k, n, k)
    both = jnp.tensordot(means, weights, ((2,), (0,))).reshape(1, k, 1, k)
    centred = kernel.reshape(n, k, n, k) - (means - both / 2) - jnp.transpose(means - both / 2, (2, 3, 0, 1))
    return centred.reshape(n * k, -1) * scale * scale[:, None]


class _Side(NamedTuple):
    """One side of the outer products of a leaf, at one position: x, or x₀ + x.

    Attributes:
        x: (n, k or 1, G, I).
        along: ⟨x, x₀⟩, (n, k or 1, k or 1 of x₀, G), or None without x₀.
        first: x₀, (k or 1, G, I), or None.
    """

    x: Array
    along: Array | None
    first: Array | None

    @classmethod
    def of(cls, x: Array, first: Array | None) -> "_Side":
        """From the side of rows at one position, and that of their centre."""
        x = x[:, :, :, 0]
        if first is None:
            return cls(x, None, None)
        first = first[0, :, :, 0]
        return cls(x, jnp.einsum("nkgi,lgi->nklg", x, first), first)

    def products(self, x: Array, along: Array | None) -> tuple[Array, ...]:
        """⟨x, x'⟩, and with x₀ ⟨x, x₀⟩, ⟨x₀, x'⟩ and ⟨x₀, x₀⟩, of one example and all: (G, k, n, k), 1 for n or k."""
        inner = jnp.einsum("kgi,nlgi->gknl", x, self.x)
        if self.first is None or self.along is None or along is None:
            return (inner,)
        both = jnp.einsum("kgi,lgi->gkl", self.first, self.first)[:, :, None]
        return inner, jnp.moveaxis(along, 2, 0)[:, :, None], jnp.transpose(self.along, (3, 2, 0, 1)), both


def _of_products(group: Sequence[Outer]) -> Array:
    """Σ over leaves and matrices of (left leftᵀ)∘(right rightᵀ), a few examples at a time; before roots and mean."""
    n, k, dtype = len(group[0].left), group[0].k, jnp.result_type(*(x.dtype for x in group))
    pairs = [
        (_Side.of(x.left, x.centre and x.centre.left), _Side.of(x.right, x.centre and x.centre.right)) for x in group
    ]

    def block(examples: list[Any]) -> Array:
        """One example against all."""
        total = jnp.zeros((k, n, k), dtype)
        for pair, example in zip(pairs, examples, strict=True):
            (d, *left), (e, *right) = (side.products(*one) for side, one in zip(pair, example, strict=True))
            product = d * e
            if left:
                # ⟨dδ + a₀e, d'δ' + a₀e'⟩ = ee'(aa') + dd'(δδ' − ee') + (da₀)(δ₀e') + (a₀d')(eδ₀), products of
                # differences throughout.
                (p, p_, alpha), (q, q_, beta) = left, right
                product = e * (d + p + p_ + alpha) + d * (q + q_ + beta) + p * q_ + p_ * q
            total = total + jnp.sum(product, axis=0)
        return total

    examples = [tuple((side.x, side.along) for side in pair) for pair in pairs]
    size = max(outer.BLOCK // max(sum(2 * x.left.shape[2] for x in group) * n * k * k, 1), 1)
    kernel = jax.vmap(block)(examples) if size >= n else jax.lax.map(block, examples, batch_size=size)
    return kernel.reshape(n * k, -1)


def _of_pairs(rows: Outer) -> Array:
    """Σ over pairs of positions, for a few examples at a time."""
    n, t = len(rows.left), rows.left.shape[3]
    left, right = paired(rows.left, rows.right)
    k = left.shape[1]

    def block(pair: tuple[Array, Array]) -> Array:
        """One example against all."""
        one, other = (jnp.einsum("kgti,nlgsi->kgtnls", x, y) for x, y in zip(pair, (left, right), strict=True))
        return jnp.sum(one * other, axis=(1, 2, 5))

    size = max(outer.BLOCK // max(n * k * k * t * t * left.shape[2], 1), 1)
    kernel = jax.lax.map(block, (left, right), batch_size=min(size, n))
    return jnp.broadcast_to(kernel, (n, rows.k, n, rows.k)).reshape(n * rows.k, -1)
