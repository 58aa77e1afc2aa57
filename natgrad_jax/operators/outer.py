"""Rows that are sums of outer products, as the gradients of a weight are: kept as their factors."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import accumulator

Step = tuple[str, tuple[Any, ...]]
BLOCK = 2**21  # numbers that are made at a time, of explicit rows or of a kernel of positions
LOST = 0.25  # part of the digits that differences of products may take; where they would take more, rows are made


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """How a weight is seen as G matrices (I, O), or a piece of a leaf is cut out: step after step.

    Attributes:
        shape: of the leaf.
        steps: ("reshape", shape), ("transpose", permutation), ("slice", (start, end) of each axis) or ("pad", zeros
            before and after on each axis), which end at shape (G, I, O), or that of the piece.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the leaf, and after each step."""
        shapes = [self.shape]
        for kind, what in self.steps:
            if kind == "transpose":
                what = tuple(shapes[-1][i] for i in what)
            elif kind == "pad":
                what = tuple(size + before + after for size, (before, after) in zip(shapes[-1], what, strict=True))
            shapes.append(tuple(end - start for start, end in what) if kind == "slice" else what)
        return shapes

    def matrices(self, leaf: Any) -> Any:
        """The leaf as (G, I, O), of jax or numpy."""
        for kind, what in self.steps:
            if kind == "slice":
                leaf = leaf[tuple(slice(*ends) for ends in what)]
            elif kind == "pad":
                leaf = (np if isinstance(leaf, np.ndarray) else jnp).pad(leaf, what)
            else:
                leaf = leaf.reshape(what) if kind == "reshape" else leaf.transpose(what)
        return leaf

    def leaf(self, matrices: Array) -> Array:
        """The inverse, with zeros around slices, on the last axes of an array with any axes before them."""
        shapes = self.shapes
        lead = matrices.shape[: matrices.ndim - len(shapes[-1])]
        for (kind, what), shape in zip(reversed(self.steps), reversed(shapes[:-1])):
            if kind == "reshape":
                matrices = matrices.reshape(*lead, *shape)
            elif kind == "slice":
                around = [(start, size - end) for (start, end), size in zip(what, shape, strict=True)]
                matrices = jnp.pad(matrices, [(0, 0)] * len(lead) + around)
            elif kind == "pad":
                inside = (slice(before, before + size) for size, (before, _) in zip(shape, what, strict=True))
                matrices = matrices[(..., *inside)]
            else:
                back = [len(lead) + int(i) for i in np.argsort(what)]
                matrices = matrices.transpose(*range(len(lead)), *back)
        return matrices


class Centre(NamedTuple):
    """What is taken out of rows: the product of the mean factors, and then how far the mean row is from it.

    The rounding of a large common part stays in the common part, as it does in rows that are made.

    Attributes:
        roots: (n,), √w of the examples, which multiply what is left of their rows.
        left: (1, k or 1, G, T, I), the mean with weights w.
        right: (1, k or 1, G, T, O), likewise.
        shift: (k, *leaf), the mean of what is then left of the rows.
    """

    roots: Array
    left: Array
    right: Array
    shift: Array


@dataclass(frozen=True)
class Outer:
    """N = n·k rows of a leaf: row (i, j) = Σ_t left[i, j, g, t, :] ⊗ right[i, j, g, t, :], as G matrices (I, O).

    With a centre (a₀, δ₀, shift) left and right are the differences d, e to a₀ and δ₀, and
    row (i, j) = roots[i]·(Σ_t ((a₀ + d) ⊗ (δ₀ + e) − a₀ ⊗ δ₀) − shift[j]).

    Nothing of their size N·p is made, but for a kernel in units that differ from entry to entry.

    Attributes:
        left: (n, k or 1, G, T, I).
        right: (n, k or 1, G, T, O).
        layout: from the leaf to G matrices (I, O).
        k: rows for each example.
        centre: what is taken out, or None.
    """

    left: Array
    right: Array
    layout: Layout
    k: int
    centre: Centre | None = None

    def centred(self, roots: Array) -> "Outer":
        """Rows without their mean over the examples with weights roots², times roots."""
        roots = roots.astype(self.dtype)
        weights = jnp.square(roots) / jnp.sum(jnp.square(roots))
        (left, d), (right, e) = around_mean(self.left, roots), around_mean(self.right, roots)
        apart = replace(self, left=d, right=e)
        one_hot = weights[:, None, None] * jnp.eye(self.k, dtype=roots.dtype)
        terms = replace(apart, centre=Centre(roots, left, right, jnp.zeros(()))).terms()
        shift = jax.vmap(lambda u: terms.transposed_times(u.reshape(-1)), in_axes=1)(one_hot)
        return replace(apart, centre=Centre(roots, left, right, shift))

    def terms(self) -> "Outer":
        """Without a centre: of a centred one, d ⊗ (δ₀ + e) + a₀ ⊗ e as twice the positions, before roots and shift."""
        if self.centre is None:
            return self
        _, left, right, _ = self.centre
        first = jnp.broadcast_to(left, (len(self.left), *left.shape[1:]))
        return replace(
            self,
            left=jnp.concatenate([self.left, first], axis=3),
            right=jnp.concatenate([right + self.right, self.right], axis=3),
            centre=None,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *shape of the leaf)."""
        return (self.left.shape[0] * self.k, *self.layout.shape)

    @property
    def dtype(self) -> Any:
        """That of the numbers."""
        return accumulator(self.left.dtype, self.right.dtype)

    def times(self, v: Array) -> Array:
        """Av, shape (N,)."""
        if self.centre is not None:
            apart = self.terms().times(v).reshape(-1, self.k)
            return (self.centre.roots[:, None] * (apart - jnp.tensordot(self.centre.shift, v, jnp.ndim(v)))).reshape(-1)
        matrices = self.layout.matrices(v)
        if self.left.shape[1] <= self.right.shape[1]:
            seen = jnp.einsum("nkgti,gio->nkgto", self.left, matrices)
            product = jnp.sum(seen * self.right, axis=(2, 3, 4))
        else:
            seen = jnp.einsum("nkgto,gio->nkgti", self.right, matrices)
            product = jnp.sum(seen * self.left, axis=(2, 3, 4))
        return jnp.broadcast_to(product, (product.shape[0], self.k)).reshape(-1)

    def transposed_times(self, u: Array) -> Array:
        """Aᵀu, shaped like the leaf."""
        u = u.reshape(-1, self.k)
        if self.centre is not None:
            u = self.centre.roots[:, None] * u
            return self.terms().transposed_times(u) - jnp.tensordot(jnp.sum(u, axis=0), self.centre.shift, 1)
        left, right = self.left, self.right
        weights = u[:, :, None, None, None]
        if left.shape[1] == 1:
            right = jnp.sum(weights * right, axis=1, keepdims=True)
        else:
            left = jnp.sum(weights * left, axis=1, keepdims=True) if right.shape[1] == 1 else weights * left
        return self.layout.leaf(jnp.einsum("nkgti,nkgto->gio", left, right))

    def squares(self) -> Array:
        """Σ over the rows of their squares, (*leaf,): the diagonal of AᵀA."""
        if self.left.shape[3] > 1:
            return self._squares_of_rows()
        if self.centre is None:
            return self._sum_of_products(jnp.square(self.left), jnp.square(self.right))
        # (dδ + a₀e)² term by term; Σ w (dδ + a₀e) = Σ w · shift, so that the cross term with it is twice its square.
        terms, weights = self.terms(), jnp.square(self.centre.roots)
        (d, first), (delta, e) = (jnp.split(x, 2, axis=3) for x in (terms.left, terms.right))
        squares = self._sum_of_products(jnp.square(terms.left), column(weights, 5) * jnp.square(terms.right))
        crossed = 2 * self._sum_of_products(d * first, column(weights, 5) * delta * e)
        centred = squares + crossed - jnp.sum(weights) * jnp.sum(jnp.square(self.centre.shift), axis=0)
        kept = jnp.all(_remain(centred, squares))
        return jax.lax.cond(kept, lambda: centred, self._squares_of_rows)

    def _sum_of_products(self, left: Array, right: Array) -> Array:
        """Σ over rows and positions of left ⊗ right, shaped like the leaf."""
        if left.shape[1] != right.shape[1]:
            left, right = jnp.sum(left, axis=1, keepdims=True), jnp.sum(right, axis=1, keepdims=True)
        repeated = self.k if self.left.shape[1] == self.right.shape[1] == 1 else 1
        return repeated * self.layout.leaf(jnp.einsum("nkgti,nkgto->gio", left, right))

    def _squares_of_rows(self) -> Array:
        return self._over_examples(lambda rows: jnp.sum(jnp.square(rows), axis=0))

    def lengths(self) -> Array:
        """√squares, for rows of any size."""
        left, right, centre = self.left, self.right, self.centre
        if centre is None:
            # Of each example by itself first: what is large in one factor may be small in the other.
            size = jnp.max(jnp.abs(left), axis=(1, 2, 3, 4), keepdims=True, initial=0.0)
            left, right = _unit(left, size), right * size
            inside, out = _largest(left), _largest(right)
        else:
            inside = jnp.maximum(_largest(left), _largest(centre.left))
            out = jnp.maximum(_largest(right), _largest(centre.right))
        frame = self.layout.leaf(inside[:, :, None] * out[:, None, :])
        if centre is not None:
            roots, first, other, shift = centre
            centre = Centre(roots, _unit(first, inside[:, None]), _unit(other, out[:, None]), _unit(shift, frame))
        scaled = replace(self, left=_unit(left, inside[:, None]), right=_unit(right, out[:, None]), centre=centre)
        return frame * _tree.root(scaled.squares())

    def weighted(self, roots: Array) -> "Outer":
        """Rows times roots, (n,) or (n, k)."""
        return replace(self, right=column(roots, 5).astype(self.right.dtype) * self.right)

    def fits(self, other: "Outer") -> bool:
        """Whether the rows of both can be joined."""
        return self.centre is other.centre is None and (self.layout, self.k) == (other.layout, other.k)

    def joined(self, other: "Outer") -> "Outer":
        """The rows of both, one below the other; positions that one has and the other has not are 0 there."""

        def below(x: Array, y: Array) -> Array:
            k, t = (max(x.shape[axis], y.shape[axis]) for axis in (1, 3))
            spread = lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:]))  # noqa: E731
            pad = lambda x: jnp.pad(spread(x), [(0, t - x.shape[3] if axis == 3 else 0) for axis in range(5)])  # noqa: E731
            return jnp.concatenate([pad(x), pad(y)])

        return replace(self, left=below(self.left, other.left), right=below(self.right, other.right))

    def scaled(self, c: Any) -> "Outer":
        """c times the rows."""
        times = lambda x: (c * x).astype(x.dtype)  # noqa: E731
        if self.centre is not None:
            return replace(self, centre=self.centre._replace(roots=times(self.centre.roots)))
        return replace(self, right=times(self.right))

    def explicit(self) -> Array:
        """The rows, (N, *leaf)."""
        terms = self.terms()
        rows = self.layout.leaf(jnp.einsum("nkgti,nkgto->nkgio", *_paired(terms.left, terms.right)))
        rows = jnp.broadcast_to(rows, (rows.shape[0], self.k, *self.layout.shape))
        if self.centre is not None:
            rows = column(self.centre.roots, rows.ndim) * (rows - self.centre.shift)
        return rows.reshape(-1, *self.layout.shape)

    def _over_examples(self, f: Any) -> Array:
        """Σ f(rows) over the examples, a few at a time."""
        size = max(BLOCK // max(self.k * math.prod(self.layout.shape), 1), 1)
        roots = None if self.centre is None else self.centre.roots

        def part(data: tuple[Array, Array, Any]) -> Array:
            left, right, roots = data
            centre = None if self.centre is None else self.centre._replace(roots=roots)
            return f(replace(self, left=left, right=right, centre=centre).explicit())

        return _tree.chunked_sum(part, (self.left, self.right, roots), min(size, self.left.shape[0]))

    def kernel(self, inverse: Array, rank_one: bool = False) -> Array:
        """(A∘inverse)(A∘inverse)ᵀ, (N, N); `inverse` one number, or shaped like the leaf, which takes explicit rows.

        Not so if it is of `rank_one`, an outer product of the last axis of the leaf and the others, and that is one of
        the sides of the matrices too.
        """
        one = jnp.ndim(inverse) == 0
        if self._rows_are_cheaper() or not (one or (rank_one and self._last_axis_is_a_side())):
            return self._kernel_of_rows(inverse)
        sides = (jnp.ones((), self.dtype), inverse) if one else self._sides(inverse)
        return self._in_units(*sides, inverse)._kernel_of_factors()

    def _kernel_of_factors(self) -> Array:
        whole = self.terms()
        kernel = whole._kernel_of_pairs if self.left.shape[3] > 1 else self._kernel_of_products
        if self.centre is None:
            return kernel()
        # The trace alone says whether digits are left, so that only one of the two kernels is made.
        weights, shift = jnp.square(self.centre.roots), self.centre.shift
        trace = weights @ jnp.sum(whole._squared_rows(), axis=1) - jnp.sum(weights) * jnp.sum(jnp.square(shift))
        return jax.lax.cond(
            _remain(trace, weights @ jnp.sum(whole._squared_terms(), axis=1)),
            lambda: self._centred_kernel(kernel()),
            lambda: self._kernel_of_rows(jnp.ones((), self.dtype)),
        )

    def _last_axis_is_a_side(self) -> bool:
        """Whether the last axis of the leaf is one side of the matrices, and the other axes are the other side."""
        shape = self.layout.shape
        if len(shape) < 2:
            return False
        last, others = np.divmod(np.arange(math.prod(shape)).reshape(shape), shape[-1])[::-1]
        last, others = self.layout.matrices(last), self.layout.matrices(others)
        constant = lambda x, axis: bool(np.all(x == np.take(x, [0], axis)))  # noqa: E731
        return any(constant(last, axis) and constant(others, 3 - axis) for axis in (1, 2))

    def _sides(self, table: Array) -> tuple[Array, Array]:
        """(G, 1, I) of at most 1 and (G, 1, O), whose products are a table ≥ 0 of rank one on each of the matrices."""
        matrices = self.layout.matrices(table)
        inside, out = (jnp.max(matrices, axis=axis, initial=0.0)[:, None] for axis in (2, 1))
        return _unit(inside, jnp.max(inside, axis=2, keepdims=True, initial=0.0)), out

    def _in_units(self, inside: Array, out: Array, product: Array) -> "Outer":
        """The rows times inside ⊗ out, which is `product`; the left sides are then at most 1.

        For the squares of either side may leave the floats where those of the rows do not.
        """
        sides = [self.left] if self.centre is None else [self.left, self.centre.left]
        largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), axis=(0, 1, 3, 4), initial=0.0) for x in sides])
        size = largest[:, None, None]
        on_left, on_right = (lambda x: _unit(x, size) * inside), (lambda x: x * (out * jnp.where(size > 0, size, 1)))
        scaled = replace(self, left=on_left(self.left), right=on_right(self.right))
        if self.centre is None:
            return scaled
        roots, left, right, shift = self.centre
        return replace(scaled, centre=Centre(roots, on_left(left), on_right(right), shift * product))

    def _centred_kernel(self, kernel: Array) -> Array:
        """That of rows without their mean, times roots, from that of rows with any common part."""
        assert self.centre is not None
        n, k, roots = len(self.left), self.k, self.centre.roots
        weights, scale = jnp.square(roots) / jnp.sum(jnp.square(roots)), jnp.repeat(roots, k)
        means = jnp.tensordot(weights, kernel.reshape(n, k, n * k), 1).reshape(1, k, n, k)
        both = jnp.tensordot(means, weights, ((2,), (0,))).reshape(1, k, 1, k)
        centred = kernel.reshape(n, k, n, k) - (means - both / 2) - jnp.transpose(means - both / 2, (2, 3, 0, 1))
        return centred.reshape(n * k, -1) * scale * scale[:, None]

    def _squared_rows(self) -> Array:
        """Squared lengths of the rows, (n, k), without a centre."""
        left, right = (jnp.einsum("nkgti,nkgsi->nkgts", x, x) for x in (self.left, self.right))
        squares = jnp.sum(left * right, axis=(2, 3, 4))
        return jnp.broadcast_to(squares, (len(squares), self.k))

    def _squared_terms(self) -> Array:
        """Squared lengths of the terms of the rows, (n, k), of which products of rows have the rounding."""
        left, right = (jnp.sum(jnp.square(x), axis=4) for x in (self.left, self.right))
        squares = jnp.sum(left * right, axis=(2, 3))
        return jnp.broadcast_to(squares, (len(squares), self.k))

    def _rows_are_cheaper(self) -> bool:
        n, _, _, t, i = self.left.shape
        o, rows, terms = self.right.shape[-1], n * self.k, t if self.centre is None else 2 * t
        return t > 1 and (rows + terms) * i * o < rows * terms * terms * (i + o)

    def _kernel_of_products(self) -> Array:
        """Σ_g (left leftᵀ)∘(right rightᵀ), with a centre before roots and shift."""
        n, k = len(self.left), self.k

        def gram(x: Array) -> Array:
            """(n, k, n, k)."""
            flat = x.reshape(-1, x.shape[-1])
            product = jax.lax.dot_general(flat, flat, (((1,), (1,)), ((), ())))
            return jnp.broadcast_to(product.reshape(*x.shape[:2], *x.shape[:2]), (len(x), k, len(x), k))

        def one(left: Array, right: Array) -> Array:
            inside, out = gram(left), gram(right)
            if self.centre is None:
                return (inside * out).reshape(n * k, -1)
            # ⟨dδ + a₀e, d'δ' + a₀e'⟩ = ee'(aa') + dd'(δδ' − ee') + (da₀)(δ₀e') + (a₀d')(eδ₀), products of differences
            # throughout; the last row and column of either table are those with a₀ and δ₀.
            d, p, alpha = inside[:-1, :, :-1], inside[:-1, :, -1:], inside[-1:, :, -1:]
            e, q, beta = out[:-1, :, :-1], out[:-1, :, -1:], out[-1:, :, -1:]
            p_, q_ = inside[-1:, :, :-1], out[-1:, :, :-1]
            return (e * (d + p + p_ + alpha) + d * (q + q_ + beta) + p * q_ + p_ * q).reshape(n * k, -1)

        left, right = self.left, self.right
        if self.centre is not None:
            left = jnp.concatenate([left, self.centre.left])
            right = jnp.concatenate([right, self.centre.right])
        left, right = (jnp.moveaxis(x[:, :, :, 0], 2, 0) for x in (left, right))
        if len(left) == 1:
            return one(left[0], right[0])
        zero = jnp.zeros((n * k, n * k), self.dtype)
        return jax.lax.scan(lambda sum, pair: (sum + one(*pair), None), zero, (left, right))[0]

    def _kernel_of_pairs(self) -> Array:
        """Σ over pairs of positions, for a few examples at a time."""
        n, t = len(self.left), self.left.shape[3]
        left, right = _paired(self.left, self.right)
        k = left.shape[1]

        def block(pair: tuple[Array, Array]) -> Array:
            """One example against all."""
            one, other = (jnp.einsum("kgti,nlgsi->kgtnls", x, y) for x, y in zip(pair, (left, right), strict=True))
            return jnp.sum(one * other, axis=(1, 2, 5))

        size = max(BLOCK // max(n * k * k * t * t * left.shape[2], 1), 1)
        kernel = jax.lax.map(block, (left, right), batch_size=min(size, n))
        return jnp.broadcast_to(kernel, (n, self.k, n, self.k)).reshape(n * self.k, -1)

    def _kernel_of_rows(self, inverse: Array) -> Array:
        """From explicit rows, a part of the leaf at a time."""
        n, p = self.shape[0], math.prod(self.layout.shape)
        g, i, o = self.left.shape[2], self.left.shape[4], self.right.shape[4]
        inverse = self.layout.matrices(jnp.broadcast_to(inverse, self.layout.shape)).reshape(g, i, o)
        terms = self.terms()
        left, right = _paired(terms.left, terms.right)

        def part(start: Array | int, size: int) -> Array:
            taken = jax.lax.dynamic_slice_in_dim(left, start, size, axis=4)
            rows = jnp.einsum("nkgti,nkgto->nkgio", taken, right)
            rows = jnp.broadcast_to(rows, (rows.shape[0], self.k, *rows.shape[2:]))
            if self.centre is not None:
                shift = jax.vmap(self.layout.matrices)(self.centre.shift)
                rows = rows - jax.lax.dynamic_slice_in_dim(shift, start, size, axis=2)
                rows = column(self.centre.roots, rows.ndim) * rows
            rows = (rows * jax.lax.dynamic_slice_in_dim(inverse, start, size, axis=1)).reshape(n, -1)
            return jax.lax.dot_general(rows, rows, (((1,), (1,)), ((), ())))

        size = min(max(BLOCK // max(n * p // i, 1), 1), i)
        return _tree.sum_of_parts(part, i, size)


def _remain(sum: Array, terms: Array) -> Array:
    """Whether a sum has kept most of its digits, from the size of its terms: then rows need not be made for it."""
    return sum >= jnp.finfo(terms.dtype).eps ** LOST * terms


def _paired(left: Array, right: Array) -> tuple[Array, Array]:
    """Both with the same number of outputs."""
    k = max(left.shape[1], right.shape[1])
    return tuple(jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:])) for x in (left, right))  # type: ignore[return-value]


def _largest(x: Array) -> Array:
    """max |x| over everything but g and the last axis."""
    return jnp.max(jnp.abs(x), axis=(0, 1, 3), initial=0.0)


def column(roots: Array, ndim: int) -> Array:
    """(n,) or (n, k), ready to multiply (n, k, …)."""
    return roots.reshape(*roots.shape, *(1,) * (ndim - roots.ndim))


def around_mean(x: Array, roots: Array) -> tuple[Array, Array]:
    """The mean over the leading axis with weights roots², and the differences to it: of equal numbers exactly 0."""
    weights = jnp.square(roots) / jnp.sum(jnp.square(roots))
    first = jax.lax.dynamic_index_in_dim(x, jnp.argmax(roots), keepdims=True)
    mean = jnp.tensordot(weights.astype(x.dtype), x - first, 1)[None]
    return first + mean, (x - first) - mean


def _unit(x: Array, size: Array) -> Array:
    return x / jnp.where(size > 0, size, 1)


jax.tree_util.register_dataclass(Outer, data_fields=["left", "right", "centre"], meta_fields=["layout", "k"])
