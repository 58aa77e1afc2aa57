"""The kernel AAᵀ of rows, some of them in factors: by products of the factors, or from rows that are made."""

import functools
import math
from collections.abc import Callable, Sequence
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

# Numbers in the tables of products that are alive at a time. A step within the 32 MiB that an allocator keeps finds its
# memory again; beyond, every page is new in every step.
TABLES = 2**19
AgainstAll = Callable[[Array | int, int], Array]  # from the first of some examples and their number, (size, k, n, k)


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
    factors: list[Outer] = []
    columns: list[tuple[Array, Array]] = []
    others: list[Callable[[], Array]] = []
    for part in _joined(leaves):
        rows, inverse, _ = part
        if isinstance(rows, Picked):
            others.append(functools.partial(rows.kernel, inverse))
        elif not isinstance(rows, Outer):
            columns.append(_in_columns(rows, inverse))
        elif part.in_factors:
            factors.append(_in_units(rows, inverse))
        elif rows.left.shape[3:] == (1, 1):
            columns.append(_in_columns(rows.explicit(), inverse))
        else:
            others.append(functools.partial(_of_rows(rows, inverse), 0, rows.left.shape[0]))
    groups: dict[Any, list[Outer]] = {}
    for x in factors:
        roots = None if x.centre is None else id(x.centre.roots)
        groups.setdefault((roots, len(x.left), x.k), []).append(x)
    few = None  # columns whose product is added in the same pass as those of the first factors
    for taken, inverse in _side_by_side(columns, width):
        if groups and few is None and taken.size <= outer.BLOCK:
            few = taken.astype(dtype) * inverse
        else:
            others.append(functools.partial(_of_columns, taken, inverse, dtype, width))
    parts = [_of_factors(group, None if i else few) for i, group in enumerate(groups.values())]
    parts += [other() for other in others]
    return functools.reduce(jnp.add, parts).astype(dtype) if parts else jnp.zeros((n, n), dtype)


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
    for part in parts:
        place = next((i for i, other in enumerate(out) if _share_a_side(other, part)), None)
        if place is not None:
            out[place] = part._replace(rows=_beside(out[place].rows, part.rows))
        elif math.prod(part.rows.shape):
            out.append(part)
    return out


def _share_a_side(one: Part, other: Part) -> bool:
    x, y = one.rows, other.rows
    if one.inverse is not other.inverse or jnp.ndim(one.inverse):
        return False
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


def _of_rows(rows: Outer, inverse: Array) -> AgainstAll:
    """From rows that are made, a part of the leaf at a time; with roots and mean, (size·k, n·k)."""
    n, p = rows.shape[0], math.prod(rows.layout.shape)
    i, k = rows.left.shape[-1], rows.k
    inverse = rows.layout.matrices(jnp.broadcast_to(inverse, rows.layout.shape))

    def made(start: Array | int, size: int) -> Array:
        take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)  # noqa: E731
        centre = rows.centre
        if centre is not None:
            centre = centre._replace(left=take(centre.left, 4))
        made = replace(rows, left=take(rows.left, 4), centre=centre).made()
        made = jnp.broadcast_to(made, (made.shape[0], k, *made.shape[2:]))
        if rows.centre is not None:
            made = made - take(jax.vmap(rows.layout.matrices)(rows.centre.shift), 2)
            made = column(rows.centre.roots, made.ndim) * made
        return (made * take(inverse, 1)).reshape(n, -1)

    def against_all(start: Array | int, size: int) -> Array:
        def part(first: Array | int, width: int) -> Array:
            all_rows = made(first, width)
            taken = jax.lax.dynamic_slice_in_dim(all_rows, start * k, size * k)
            return jax.lax.dot_general(taken, all_rows, (((1,), (1,)), ((), ())))

        return _tree.sum_of_parts(part, i, min(max(outer.BLOCK // max(n * p // i, 1), 1), i))

    return against_all


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


def _of_factors(group: Sequence[Outer], few: Array | None) -> Array:
    """Of leaves without a centre, or with the same roots: one mean, out of their sum; and of a few plain columns."""
    n, k, centre = len(group[0].left), group[0].k, group[0].centre
    tables = sum(x.left.shape[2] * x.left.shape[3] ** 2 for x in group)
    block = min(max(TABLES // max(2 * tables * n * k * k, 1), 1), n)
    against_all = [(_products if x.left.shape[3] == 1 else _pairs)(x) for x in group]

    def summed(start: Array | int, size: int) -> Array:
        """Some examples against all, (size, k, n, k) or narrow, before roots and mean."""
        shape = (size, n) if k == 1 else (size, k, n, k)
        return jnp.broadcast_to(functools.reduce(jnp.add, [of_leaf(start, size) for of_leaf in against_all]), shape)

    def with_few(part: AgainstAll) -> AgainstAll:
        def both(start: Array | int, size: int) -> Array:
            total = part(start, size).reshape(size * k, n * k)
            if few is None:
                return total
            taken = jax.lax.dynamic_slice_in_dim(few, start * k, size * k)
            return total + jax.lax.dot_general(taken, few.conj(), (((1,), (1,)), ((), ())))

        return both

    if centre is None:
        return _tree.map_parts(with_few(summed), n, block)

    def centred() -> Array:
        """Of ⟨r − r̄, r' − r̄⟩, with r̄ the mean row."""
        to_mean, of_mean = (functools.reduce(jnp.add, parts) for parts in zip(*map(_with_mean, group), strict=True))
        half = to_mean - of_mean / 2
        across, roots = jnp.transpose(half, (2, 0, 1))[None], centre.roots[:, None, None, None]

        def part(start: Array | int, size: int) -> Array:
            along, scale = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (half[:, :, None], roots))
            kernel = summed(start, size) - _narrow(along, k) - _narrow(across, k)
            return kernel * _narrow(scale, k) * _narrow(jnp.moveaxis(roots, 0, 2), k)

        return _tree.map_parts(with_few(part), n, block)

    def made() -> Array:
        of_leaves = [_of_rows(x, jnp.ones((), x.dtype)) for x in group]
        part = lambda start, size: functools.reduce(jnp.add, [f(start, size) for f in of_leaves])  # noqa: E731
        return _tree.map_parts(with_few(part), n, min(max(TABLES // max(4 * n * k * k, 1), 1), n))

    # The trace alone says whether digits are left, so that only one of the two kernels is made.
    traces, terms = (functools.reduce(jnp.add, parts) for parts in zip(*map(_traces, group), strict=True))
    return jax.lax.cond(_tree.in_any_lane(~remain(traces, terms)), made, centred)


def _narrow(x: Array, k: int) -> Array:
    """(…, n, k, n, k) without the axes of a single output: what is done entry by entry is then done in place."""
    return x.squeeze((-3, -1)) if k == 1 else x


def _with_mean(rows: Outer) -> tuple[Array, Array]:
    """⟨row (i, j), r̄_l⟩ before roots, (n, k, k), and ⟨r̄_j, r̄_l⟩, (k, k)."""
    assert rows.centre is not None
    shift = rows.centre.shift
    means = shift.reshape(rows.k, -1)
    return jax.vmap(rows.along, out_axes=2)(shift), means @ means.T


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


class _Side(NamedTuple):
    """One side of the outer products of a leaf, at one position: x, or x₀ + x.

    Attributes:
        x: (G, n, k or 1, I).
        first: x₀, (G, k or 1, I), or None.
        along: ⟨x, x₀⟩, (G, n, k or 1, k or 1 of x₀), or None without x₀.
    """

    x: Array
    first: Array | None
    along: Array | None

    @classmethod
    def of(cls, x: Array, first: Array | None) -> "_Side":
        """From the side of rows at one position, and that of their centre."""
        x = jnp.moveaxis(x[:, :, :, 0], 2, 0)
        if first is None:
            return cls(x, None, None)
        first = jnp.moveaxis(first[0, :, :, 0], 1, 0)
        return cls(x, first, _inner(x, first))

    def products(self, start: Array | int, size: int) -> tuple[Array, ...]:
        """⟨x, x'⟩, and with x₀ ⟨x, x₀⟩, ⟨x₀, x'⟩ and ⟨x₀, x₀⟩, of some examples and all: (G, size, k, n, k), or 1s."""
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
        inner = _inner(part(self.x), self.x)
        if self.first is None or self.along is None:
            return (inner,)
        along, all_along = part(self.along)[:, :, :, None], jnp.moveaxis(self.along, 3, 1)[:, None]
        return inner, along, all_along, _inner(self.first, self.first)[:, None, :, None]


def _inner(x: Array, y: Array) -> Array:
    """⟨x, y⟩ over the last axis, for each of the first; all axes of the one and then of the other are kept."""
    flat = [z.reshape(len(z), -1, z.shape[-1]) for z in (x, y)]
    if len(x) == 1:  # as a matrix, which XLA takes as it lies
        product = jax.lax.dot_general(flat[0][0], flat[1][0], (((1,), (1,)), ((), ())))
    else:
        product = jax.lax.dot_general(flat[0], flat[1], (((2,), (2,)), ((0,), (0,))))
    return product.reshape(len(x), *x.shape[1:-1], *y.shape[1:-1])


def _products(rows: Outer) -> AgainstAll:
    """Σ over matrices of (left leftᵀ)∘(right rightᵀ), at one position; before roots and mean."""
    centre, ones = rows.centre, () if rows.left.shape[2] > 1 else (0,)
    left, right = _Side.of(rows.left, centre and centre.left), _Side.of(rows.right, centre and centre.right)

    def part(start: Array | int, size: int) -> Array:
        (d, *with_a), (e, *with_delta) = (
            [_narrow(x.squeeze(ones), rows.k) for x in side.products(start, size)] for side in (left, right)
        )
        product = d * e
        if with_a:
            # ⟨dδ + a₀e, d'δ' + a₀e'⟩ = ee'(aa') + dd'(δδ' − ee') + (da₀)(δ₀e') + (a₀d')(eδ₀), products of differences
            # throughout.
            (p, p_, alpha), (q, q_, beta) = with_a, with_delta
            product = e * (d + p + p_ + alpha) + d * (q + q_ + beta) + p * q_ + p_ * q
        return product if ones else jnp.sum(product, axis=0)

    return part


def _pairs(rows: Outer) -> AgainstAll:
    """Σ over pairs of positions; before roots and mean."""
    terms = rows.terms()
    left, right = paired(terms.left, terms.right)

    def part(start: Array | int, size: int) -> Array:
        taken = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (left, right))
        one, other = (jnp.einsum("mkgti,nlgsi->mkgtnls", x, y) for x, y in zip(taken, (left, right), strict=True))
        return _narrow(jnp.sum(one * other, axis=(2, 3, 6)), rows.k)

    return part
