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
BLOCK = 2**19  # numbers that are made at a time, of explicit rows or of a kernel of positions
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

    Nothing of their size N·p is made; a part of the rows at a time is, for a kernel in units that differ from entry to
    entry, for squares at several positions, and where differences would lose their digits.

    Leaves with one and the same array `right`, as a weight and its bias, share a product in a kernel, and centred ones
    with the same roots their mean. Out of a `jit` they are known no more, and have one each.

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
        return self._apart(roots, *around_mean(self.left, roots), *around_mean(self.right, roots))

    def beside(self, left: Array, layout: Layout) -> "Outer":
        """The rows of a leaf with the same right sides, as those of a bias are."""
        if self.centre is None:
            return replace(self, left=left, layout=layout)
        roots, _, right, _ = self.centre
        return replace(self, layout=layout)._apart(roots, *around_mean(left, roots), right, self.right)

    def _apart(self, roots: Array, left: Array, d: Array, right: Array, e: Array) -> "Outer":
        """Of the mean factors and the differences to them."""
        weights = jnp.square(roots) / jnp.sum(jnp.square(roots))
        apart = replace(self, left=d, right=e, centre=Centre(roots, left, right, jnp.zeros(())))
        one_hot = weights[:, None, None] * jnp.eye(self.k, dtype=roots.dtype)
        shift = jax.vmap(lambda u: apart._summed(u, *apart.pairs()), in_axes=1)(one_hot)
        return replace(apart, centre=Centre(roots, left, right, shift))

    def pairs(self) -> list[tuple[Array, Array]]:
        """Factors whose outer products, summed over pairs and positions, are the rows before roots and shift.

        Of a centred one d ⊗ (δ₀ + e) and a₀ ⊗ e, where a₀ is there once for all examples.
        """
        if self.centre is None:
            return [(self.left, self.right)]
        return [(self.left, self.centre.right + self.right), (self.centre.left, self.right)]

    def terms(self) -> "Outer":
        """The pairs as one without a centre: those of a centred one are twice the positions."""
        if self.centre is None:
            return self
        left, right = zip(*self.pairs(), strict=True)
        first = jnp.broadcast_to(left[1], (len(self.left), *left[1].shape[1:]))
        return replace(self, left=jnp.concatenate([left[0], first], 3), right=jnp.concatenate(right, 3), centre=None)

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
        product = self.along(v)
        if self.centre is not None:
            roots, _, _, shift = self.centre
            product = roots[:, None] * (product - jnp.tensordot(shift, v, jnp.ndim(v)))
        return product.reshape(-1)

    def along(self, v: Array) -> Array:
        """Products of the rows before roots and shift with v, (n, k)."""
        matrices = self.layout.matrices(v)

        def seen(left: Array, right: Array) -> Array:
            if left.shape[1] <= right.shape[1]:
                return jnp.sum(jnp.einsum("nkgti,gio->nkgto", left, matrices) * right, axis=(2, 3, 4))
            return jnp.sum(jnp.einsum("nkgto,gio->nkgti", right, matrices) * left, axis=(2, 3, 4))

        product = sum(seen(*pair) for pair in self.pairs())
        return jnp.broadcast_to(product, (len(self.left), self.k))

    def transposed_times(self, u: Array) -> Array:
        """Aᵀu, shaped like the leaf."""
        u = u.reshape(-1, self.k)
        if self.centre is None:
            return self._summed(u, *self.pairs())
        u = self.centre.roots[:, None] * u
        return self._summed(u, *self.pairs()) - jnp.tensordot(jnp.sum(u, axis=0), self.centre.shift, 1)

    def squares(self) -> Array:
        """Σ over the rows of their squares, (*leaf,): the diagonal of AᵀA."""
        if self.left.shape[3] > 1:
            return self._squares_of_rows()
        if self.left.shape[4] == 1:
            return jnp.sum(jnp.square(self.explicit()), axis=0)
        repeated = self.k if self.left.shape[1] == self.right.shape[1] == 1 else 1
        n = len(self.left)
        if self.centre is None:
            ones = jnp.ones((n, 1), self.dtype)
            return repeated * self._summed(ones, (jnp.square(self.left), jnp.square(self.right)))
        # (dδ + a₀e)² term by term; Σ w (dδ + a₀e) = Σ w · shift, so that the cross term with it is twice its square.
        (d, delta), (first, e) = self.pairs()
        weights = repeated * jnp.square(self.centre.roots)[:, None]
        squares = self._summed(weights, *((jnp.square(x), jnp.square(y)) for x, y in self.pairs()))
        crossed = 2 * self._summed(weights, (d * first, delta * e))
        common = jnp.sum(jnp.square(self.centre.roots)) * jnp.sum(jnp.square(self.centre.shift), axis=0)
        centred = squares + crossed - common
        lost = _tree.in_any_lane(~jnp.all(remain(centred, squares)))
        return jax.lax.cond(lost, self._squares_of_rows, lambda: centred)

    def _summed(self, u: Array, *pairs: tuple[Array, Array]) -> Array:
        """Σ u[i, j] left[i, j, g, t, :] ⊗ right[i, j, g, t, :] over the pairs, shaped like the leaf.

        A left side for all examples is taken out of the sum. Apart from the others: a product, a sum over rows and an
        outer product in one, XLA for CPUs (jaxlib 0.10) has returned memory that nobody wrote.
        """

        def of_pair(left: Array, right: Array) -> Array:
            if len(left) < len(right):
                shape = (len(right), max(u.shape[1], right.shape[1]))
                every = jnp.broadcast_to(right, (*shape, *right.shape[2:]))
                right = jnp.einsum("nk,nkgto->kgto", jnp.broadcast_to(u, shape), every)[None]
            elif left.shape[1] > right.shape[1]:
                left = column(u, 5) * left
            else:
                right = column(u, 5) * right
            if left.shape[1] != right.shape[1]:
                left, right = (jnp.sum(x, axis=1, keepdims=True) for x in (left, right))
            return jnp.einsum("nkgti,nkgto->gio", left, right)

        products = [of_pair(*pair) for pair in pairs]
        if len(products) > 1:
            products = jax.lax.optimization_barrier(products)
        return self.layout.leaf(functools.reduce(jnp.add, products))

    def _squares_of_rows(self) -> Array:
        return self._over_examples(lambda rows: jnp.sum(jnp.square(rows), axis=0))

    def lengths(self) -> Array:
        """√squares, for rows of any size."""
        left, right, centre = self.left, self.right, self.centre
        if centre is None:
            # Of each example by itself first: what is large in one factor may be small in the other.
            size = jnp.max(jnp.abs(left), axis=(1, 2, 3, 4), keepdims=True, initial=0.0)
            left, right = unit(left, size), right * size
            inside, out = _largest(left), _largest(right)
        else:
            inside = jnp.maximum(_largest(left), _largest(centre.left))
            out = jnp.maximum(_largest(right), _largest(centre.right))
        frame = self.layout.leaf(inside[:, :, None] * out[:, None, :])
        if centre is not None:
            roots, first, other, shift = centre
            centre = Centre(roots, unit(first, inside[:, None]), unit(other, out[:, None]), unit(shift, frame))
        scaled = replace(self, left=unit(left, inside[:, None]), right=unit(right, out[:, None]), centre=centre)
        return frame * _tree.root(scaled.squares())

    def bound(self) -> Array:
        """A number that no row is longer than, from the largest of each factor of an example."""
        largest = lambda x: jnp.max(jnp.abs(x), axis=(1, 2, 3, 4), initial=0.0)  # noqa: E731
        entries = self.left.shape[3] * sum(largest(left) * largest(right) for left, right in self.pairs())
        if self.centre is not None:
            entries = self.centre.roots * (entries + jnp.max(jnp.abs(self.centre.shift), initial=0.0))
        return jnp.max(entries, initial=0.0) * math.prod(self.layout.shape) ** 0.5

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
        rows = self.layout.leaf(self.made())
        rows = jnp.broadcast_to(rows, (rows.shape[0], self.k, *self.layout.shape))
        if self.centre is not None:
            rows = column(self.centre.roots, rows.ndim) * (rows - self.centre.shift)
        return rows.reshape(-1, *self.layout.shape)

    def made(self) -> Array:
        """The rows before roots and shift, (n, k or 1, G, I, O)."""
        if self.left.shape[3] == 1:
            return sum(left[..., 0, :, None] * right[..., 0, None, :] for left, right in self.pairs())  # type: ignore[return-value]
        terms = self.terms()
        return jnp.einsum("nkgti,nkgto->nkgio", *paired(terms.left, terms.right))

    def _over_examples(self, f: Any) -> Array:
        """Σ f(rows) over the examples, a few at a time."""
        size = max(BLOCK // max(self.k * math.prod(self.layout.shape), 1), 1)
        roots = None if self.centre is None else self.centre.roots

        def part(data: tuple[Array, Array, Any]) -> Array:
            left, right, roots = data
            centre = None if self.centre is None else self.centre._replace(roots=roots)
            return f(replace(self, left=left, right=right, centre=centre).explicit())

        return _tree.chunked_sum(part, (self.left, self.right, roots), min(size, self.left.shape[0]))


def remain(sum: Array, terms: Array) -> Array:
    """Whether a sum has kept most of its digits, from the size of its terms: then rows need not be made for it."""
    return sum >= jnp.finfo(terms.dtype).eps ** LOST * terms


def paired(left: Array, right: Array) -> tuple[Array, Array]:
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


def unit(x: Array, size: Array) -> Array:
    """x / size, and x where size is 0."""
    return x / jnp.where(size > 0, size, 1)


jax.tree_util.register_dataclass(Outer, data_fields=["left", "right", "centre"], meta_fields=["layout", "k"])
