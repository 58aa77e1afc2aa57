"""Rows that are sums of outer products, as the gradients of a weight are: kept as their factors."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import accumulator

Step = tuple[str, tuple[Any, ...]]
BLOCK = 2**21  # numbers that are made at a time, of explicit rows or of a kernel of positions
LOST = 0.25  # part of the digits that centring may take; where it would take more, rows are made first


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


@dataclass(frozen=True)
class Outer:
    """N = n·k rows of a leaf: row (i, j) = Σ_t left[i, j, g, t, :] ⊗ right[i, j, g, t, :], as G matrices (I, O).

    Nothing of their size N·p is made, but for a kernel in units that differ from entry to entry.

    Attributes:
        left: (n, k or 1, G, T, I).
        right: (n, k or 1, G, T, O).
        layout: from the leaf to G matrices (I, O).
        k: rows for each example.
        centre: roots (n,) and shift (k, *leaf): roots[i]·shift[j] is taken out of row (i, j). Or None.
    """

    left: Array
    right: Array
    layout: Layout
    k: int
    centre: tuple[Array, Array] | None = None

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
        matrices = self.layout.matrices(v)
        if self.left.shape[1] <= self.right.shape[1]:
            seen = jnp.einsum("nkgti,gio->nkgto", self.left, matrices)
            product = jnp.sum(seen * self.right, axis=(2, 3, 4))
        else:
            seen = jnp.einsum("nkgto,gio->nkgti", self.right, matrices)
            product = jnp.sum(seen * self.left, axis=(2, 3, 4))
        product = jnp.broadcast_to(product, (product.shape[0], self.k))
        if self.centre is not None:
            roots, shift = self.centre
            product = product - roots[:, None] * jnp.tensordot(shift, v, jnp.ndim(v))
        return product.reshape(-1)

    def transposed_times(self, u: Array) -> Array:
        """Aᵀu, shaped like the leaf."""
        u = u.reshape(-1, self.k)
        left, right = self.left, self.right
        weights = u[:, :, None, None, None]
        if left.shape[1] == 1:
            right = jnp.sum(weights * right, axis=1, keepdims=True)
        else:
            left = jnp.sum(weights * left, axis=1, keepdims=True) if right.shape[1] == 1 else weights * left
        product = self.layout.leaf(jnp.einsum("nkgti,nkgto->gio", left, right))
        if self.centre is None:
            return product
        roots, shift = self.centre
        return product - jnp.tensordot(roots @ u, shift, 1)

    def squares(self) -> Array:
        """Σ over the rows of their squares, (*leaf,): the diagonal of AᵀA."""
        if self.left.shape[3] > 1:
            return self._squares_of_rows()
        left, right = jnp.square(self.left[:, :, :, 0]), jnp.square(self.right[:, :, :, 0])
        if left.shape[1] != right.shape[1]:
            left, right = jnp.sum(left, axis=1, keepdims=True), jnp.sum(right, axis=1, keepdims=True)
        repeated = self.k if self.left.shape[1] == self.right.shape[1] == 1 else 1
        squares = repeated * self.layout.leaf(jnp.einsum("nkgi,nkgo->gio", left, right))
        if self.centre is None:
            return squares
        # Σ_i roots_i · row_i = Σ roots² · shift, so that the cross term is twice the last one.
        roots, shift = self.centre
        centred = squares - jnp.sum(jnp.square(roots)) * jnp.sum(jnp.square(shift), axis=0)
        return jax.lax.cond(_remain(centred, squares), lambda: centred, self._squares_of_rows)

    def _squares_of_rows(self) -> Array:
        return self._over_examples(lambda rows: jnp.sum(jnp.square(rows), axis=0))

    def lengths(self) -> Array:
        """√squares, for rows of any size."""
        # Of each example by itself first: what is large in one factor may be small in the other.
        unit = lambda x, size: x / jnp.where(size > 0, size, 1)  # noqa: E731
        size = jnp.max(jnp.abs(self.left), axis=(1, 2, 3, 4), keepdims=True, initial=0.0)
        left, right = unit(self.left, size), self.right * size
        inside, out = _largest(left), _largest(right)
        frame = self.layout.leaf(inside[:, :, None] * out[:, None, :])
        centre = None if self.centre is None else (self.centre[0], unit(self.centre[1], frame))
        scaled = replace(self, left=unit(left, inside[:, None]), right=unit(right, out[:, None]), centre=centre)
        return frame * _tree.root(scaled.squares())

    def scaled(self, c: Any) -> "Outer":
        """c times the rows."""
        times = lambda x: (c * x).astype(x.dtype)  # noqa: E731
        centre = None if self.centre is None else (times(self.centre[0]), self.centre[1])
        return replace(self, right=times(self.right), centre=centre)

    def explicit(self) -> Array:
        """The rows, (N, *leaf)."""
        rows = self.layout.leaf(jnp.einsum("nkgti,nkgto->nkgio", *_paired(self.left, self.right)))
        rows = jnp.broadcast_to(rows, (rows.shape[0], self.k, *self.layout.shape))
        if self.centre is not None:
            roots, shift = self.centre
            rows = rows - _column(roots, rows.ndim) * shift
        return rows.reshape(-1, *self.layout.shape)

    def _over_examples(self, f: Any) -> Array:
        """Σ f(rows) over the examples, a few at a time."""
        size = max(BLOCK // max(self.k * math.prod(self.layout.shape), 1), 1)
        roots, shift = (None, None) if self.centre is None else self.centre

        def part(data: tuple[Array, Array, Any]) -> Array:
            left, right, roots = data
            centre: Any = None if roots is None else (roots, shift)
            return f(replace(self, left=left, right=right, centre=centre).explicit())

        return _tree.chunked_sum(part, (self.left, self.right, roots), min(size, self.left.shape[0]))

    def kernel(self, inverse: Array) -> Array:
        """(A∘inverse)(A∘inverse)ᵀ, (N, N); `inverse` one number, or shaped like the leaf, which takes explicit rows."""
        if jnp.ndim(inverse) or self._rows_are_cheaper():
            return self._kernel_of_rows(inverse)
        kernel = self._kernel_of_pairs() if self.left.shape[3] > 1 else self._kernel_of_products()
        if self.centre is None:
            return jnp.square(inverse) * kernel
        # With r (N, k) the roots, (A − rs)(A − rs)ᵀ = AAᵀ − (As)rᵀ − r(As)ᵀ + r ssᵀ rᵀ: one product beside AAᵀ.
        roots, shift = self.centre
        roots, flat = jnp.kron(roots[:, None], jnp.eye(self.k, dtype=self.dtype)), shift.reshape(self.k, -1)
        means = jax.lax.map(replace(self, centre=None).times, shift).T - 0.5 * roots @ (flat @ flat.T)
        taken = jnp.concatenate([roots, means], axis=1) @ jnp.concatenate([means, roots], axis=1).T
        centred = kernel - taken
        kept = _remain(_tree.diagonal(centred), _tree.diagonal(kernel))
        centred = jax.lax.cond(kept, lambda: centred, lambda: self._kernel_of_rows(jnp.ones((), self.dtype)))
        return jnp.square(inverse) * centred

    def _rows_are_cheaper(self) -> bool:
        n, _, _, t, i = self.left.shape
        o, rows = self.right.shape[-1], n * self.k
        return t > 1 and (rows + t) * i * o < rows * t * t * (i + o)

    def _kernel_of_products(self) -> Array:
        """Σ_g (left leftᵀ)∘(right rightᵀ)."""
        n, k = len(self.left), self.k

        def gram(x: Array) -> Array:
            flat = x.reshape(-1, x.shape[-1])
            product = jax.lax.dot_general(flat, flat, (((1,), (1,)), ((), ())))
            if k == 1 or x.shape[1] == k:
                return product
            return jnp.broadcast_to(product[:, None, :, None], (n, k, n, k)).reshape(n * k, -1)

        one = lambda left, right: gram(left) * gram(right)  # noqa: E731
        left, right = (jnp.moveaxis(x[:, :, :, 0], 2, 0) for x in (self.left, self.right))
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
        left, right = _paired(self.left, self.right)

        def part(start: Array | int, size: int) -> Array:
            taken = jax.lax.dynamic_slice_in_dim(left, start, size, axis=4)
            rows = jnp.einsum("nkgti,nkgto->nkgio", taken, right)
            rows = jnp.broadcast_to(rows, (rows.shape[0], self.k, *rows.shape[2:]))
            if self.centre is not None:
                roots, shift = self.centre[0], jax.vmap(self.layout.matrices)(self.centre[1])
                rows = rows - _column(roots, rows.ndim) * jax.lax.dynamic_slice_in_dim(shift, start, size, axis=2)
            rows = (rows * jax.lax.dynamic_slice_in_dim(inverse, start, size, axis=1)).reshape(n, -1)
            return jax.lax.dot_general(rows, rows, (((1,), (1,)), ((), ())))

        size = min(max(BLOCK // max(n * p // i, 1), 1), i)
        return _tree.sum_of_parts(part, i, size)


def _remain(centred: Array, whole: Array) -> Array:
    """Whether differences have kept most of their digits: then rows need not be made to take the mean out of them."""
    return jnp.all(centred >= jnp.finfo(whole.dtype).eps ** LOST * whole)


def _paired(left: Array, right: Array) -> tuple[Array, Array]:
    """Both with the same number of outputs."""
    k = max(left.shape[1], right.shape[1])
    return tuple(jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:])) for x in (left, right))  # type: ignore[return-value]


def _largest(x: Array) -> Array:
    """max |x| over everything but g and the last axis."""
    return jnp.max(jnp.abs(x), axis=(0, 1, 3), initial=0.0)


def _column(roots: Array, ndim: int) -> Array:
    return roots.reshape(-1, *(1,) * (ndim - 1))


jax.tree_util.register_dataclass(Outer, data_fields=["left", "right", "centre"], meta_fields=["layout", "k"])
