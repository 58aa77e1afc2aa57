"""Rows of a table that is looked up, as an embedding is: which row of the table, and the sensitivity there."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import accumulator
from natgrad_jax.operators import outer
from natgrad_jax.operators.outer import Layout


@dataclass(frozen=True)
class Picked:
    """N = n·k rows of a leaf: row (i, j) = Σ_t one-hot(index[i, g, t]) ⊗ right[i, j, g, t, :], as G tables (V, O).

    Attributes:
        index: (n, G, T), no number twice in the T of an example, but where `right` is 0.
        right: (n, k, G, T, O).
        layout: from the leaf to G tables (V, O).
    """

    index: Array
    right: Array
    layout: Layout

    @classmethod
    def of(cls, index: Array, right: Array, layout: Layout) -> "Picked":
        """From indices of which some may be equal, and some -1 for none."""
        right = jnp.where((index >= 0)[:, None, :, :, None], right, 0)
        first = jnp.argmax(index[..., :, None] == index[..., None, :], axis=-1)
        gather = lambda x, first: jnp.zeros_like(x).at[first].add(x)  # noqa: E731
        if index.shape[-1] > 1:
            by_group = jax.vmap(gather)
            right = jax.vmap(lambda x, first: jax.vmap(by_group, (0, None))(x, first))(right, first)
        return cls(jnp.maximum(index, 0), right, layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *shape of the leaf)."""
        return (self.right.shape[0] * self.right.shape[1], *self.layout.shape)

    @property
    def dtype(self) -> Any:
        """That of the numbers."""
        return accumulator(self.right.dtype)

    def times(self, v: Array) -> Array:
        """Av, shape (N,)."""
        return jnp.sum(self._seen(v)[:, None] * self.right, axis=(2, 3, 4)).reshape(-1)

    def transposed_times(self, u: Array) -> Array:
        """Aᵀu, shaped like the leaf."""
        weights = u.reshape(self.right.shape[:2])
        return self._added(jnp.einsum("nk,nkgto->ngto", weights, self.right))

    def squares(self) -> Array:
        """Σ over the rows of their squares, (*leaf,): the diagonal of AᵀA."""
        return self._added(jnp.sum(jnp.square(self.right), axis=1))

    def lengths(self) -> Array:
        """√squares, for rows of any size."""
        largest = self.layout.leaf(self._tables(jnp.max(jnp.abs(self.right), axis=1), "max"))
        seen = self._seen(largest)[:, None]
        scaled = replace(self, right=self.right / jnp.where(seen > 0, seen, 1))
        return largest * _tree.root(scaled.squares())

    def bound(self) -> Array:
        """A number that no row is longer than."""
        return jnp.max(jnp.abs(self.right), initial=0.0) * math.prod(self.right.shape[2:]) ** 0.5

    def scaled(self, c: Any) -> "Picked":
        """c times the rows."""
        return replace(self, right=(c * self.right).astype(self.right.dtype))

    def explicit(self) -> Array:
        """The rows, (N, *leaf)."""
        return self.layout.leaf(self._rows(self.right)).reshape(self.shape)

    def kernel(self, inverse: Array) -> Array:
        """(A∘inverse)(A∘inverse)ᵀ, (N, N); `inverse` one number, or shaped like the leaf."""
        units = self._seen(inverse)[:, None] if jnp.ndim(inverse) else inverse
        right, (n, k, g, t, o) = self.right * units, self.right.shape
        values = self.layout.shapes[-1][1]
        if t * t > values:

            def part(start: Array | int, size: int) -> Array:
                rows = self._rows(jax.lax.dynamic_slice_in_dim(right, start, size, axis=4)).reshape(n * k, -1)
                return jax.lax.dot_general(rows, rows, (((1,), (1,)), ((), ())))

            return _tree.sum_of_parts(part, o, min(max(outer.BLOCK // max(n * k * g * values, 1), 1), o))

        def block(one: tuple[Array, Array]) -> Array:
            """One example against all."""
            same = one[0][:, :, None, None] == jnp.moveaxis(self.index, 0, 1)[:, None]  # (G, T, n, T)
            products = jnp.einsum("kgto,nlgso->kgtnls", one[1], right)
            return jnp.sum(jnp.where(same[None, :, :, :, None], products, 0), axis=(1, 2, 5))

        size = max(outer.BLOCK // max(n * k * k * t * t * g, 1), 1)
        return jax.lax.map(block, (self.index, right), batch_size=min(size, n)).reshape(n * k, -1)

    def _seen(self, leaf: Array) -> Array:
        """The entries that are picked of a leaf, (n, G, T, O)."""
        return jax.vmap(lambda table, index: table[index], (0, 1), 1)(self.layout.matrices(leaf), self.index)

    def _tables(self, x: Array, how: str) -> Array:
        """(n, G, T, O) brought to its places, (G, V, O)."""

        def table(index: Array, x: Array) -> Array:
            return getattr(jnp.zeros(self.layout.shapes[-1][1:], x.dtype).at[index], how)(x)

        return jax.vmap(table, 1)(self.index, x)

    def _added(self, x: Array) -> Array:
        return self.layout.leaf(self._tables(x, "add"))

    def _rows(self, right: Array) -> Array:
        """(n, k, G, V, O), also for some of the O alone."""
        shape = (self.layout.shapes[-1][1], right.shape[-1])
        table = lambda index, x: jnp.zeros(shape, x.dtype).at[index].add(x)  # noqa: E731
        groups = jax.vmap(table)
        return jax.vmap(lambda index, x: jax.vmap(groups, (None, 0))(index, x))(self.index, right)


jax.tree_util.register_dataclass(Picked, data_fields=["index", "right"], meta_fields=["layout"])
