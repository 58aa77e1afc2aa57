"""Operators: what a metric G is, as a small frozen pytree that exposes its structure.

Vectors are pytrees with the structure of the parameters; an operator that is built by hand on arrays acts on flat
vectors. Every operator has `mv(v)`, `dense()`, `diagonal()`, `inner(u, v)` = uᵀGv, `norm(v)` = √(vᵀGv) and `space`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax._tree import PyTree, Space, cast_like, leading_axis, norm

Operator = Any


def _norm(operator: Operator, v: PyTree) -> Array:
    """√(vᵀGv) with the largest entry of v divided out, so that v may be as small or as large as the floats allow."""
    leaves = jax.tree.leaves(v)
    if not leaves:
        return jnp.zeros(())
    dtype = operator.space.dtype
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x).astype(dtype), initial=0.0) for x in leaves]))
    unit = jnp.where(largest > 0, largest, 1)
    scaled = jax.tree.map(lambda x: x.astype(dtype) / unit, v)
    return largest * jnp.sqrt(jnp.maximum(operator.inner(scaled, scaled), 0))


@dataclass(frozen=True)
class Diagonal:
    """G = diag(entries). Products, solves and memory are O(p).

    Args:
        entries: pytree of the diagonal entries G_ii ≥ 0, in units of 1/parameter².

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Diagonal
        >>> float(Diagonal(jnp.array([4.0, 1.0])).norm(jnp.array([1.0, 0.0])))
        2.0
    """

    entries: PyTree

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return Space.of(self.entries)

    def mv(self, v: PyTree) -> PyTree:
        """Gv, with the dtypes of v."""
        self.space.check(v, "v")
        return cast_like(jax.tree.map(jnp.multiply, self.entries, v), v)

    def dense(self) -> Array:
        """The (p, p) matrix."""
        return jnp.diag(self.space.ravel(self.entries))

    def diagonal(self) -> PyTree:
        """The entries G_ii."""
        return self.entries

    def inner(self, u: PyTree, v: PyTree) -> Array:
        """uᵀGv."""
        space = self.space
        return jnp.sum(space.ravel(u) * space.ravel(self.entries) * space.ravel(v))

    def norm(self, v: PyTree) -> Array:
        """√(vᵀGv)."""
        return _norm(self, v)


@dataclass(frozen=True)
class Dense:
    """G as a matrix. Products cost O(p²), solves O(p³).

    Args:
        matrix: symmetric positive semi-definite, shape (p, p), in `ravel_pytree` order of the parameters.
        like: `Space` of the parameters; flat vectors of shape (p,) when left out.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Dense
        >>> Dense(jnp.array([[2.0, 1.0], [1.0, 2.0]])).mv(jnp.array([1.0, 0.0])).tolist()
        [2.0, 1.0]
    """

    matrix: Array
    like: Space | None = field(default=None)

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        shape = jnp.shape(self.matrix)
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"matrix: expected a square matrix (p, p), got shape {shape}")
        return self.like or Space.of(jax.ShapeDtypeStruct(shape[:1], self.matrix.dtype))

    def mv(self, v: PyTree) -> PyTree:
        """Gv, with the dtypes of v."""
        space = self.space
        space.check(v, "v")
        return cast_like(space.unravel(self.matrix @ space.ravel(v)), v)

    def dense(self) -> Array:
        """The (p, p) matrix."""
        return self.matrix

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters."""
        return self.space.unravel(jnp.diagonal(self.matrix))

    def inner(self, u: PyTree, v: PyTree) -> Array:
        """uᵀGv."""
        return self.space.ravel(u) @ (self.matrix @ self.space.ravel(v))

    def norm(self, v: PyTree) -> Array:
        """√(vᵀGv)."""
        return _norm(self, v)

    def unit_diagonal(self) -> tuple[Array, Array]:
        """`scale` (p,) and M (p, p) with unit diagonal, G = diag(scale) M diag(scale); a zero row stays zero."""
        scale = jnp.sqrt(jnp.diagonal(self.matrix))
        inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
        # One side at a time: the product of two inverse scales may overflow where the quotient does not.
        return scale, (self.matrix * inverse[:, None]) * inverse[None, :]


@dataclass(frozen=True)
class Gram:
    """G = AᵀA kept as its rows A, ‖Av‖² = vᵀGv. Products cost O(np), the matrix O(np²).

    Args:
        rows: pytree shaped like the parameters with one more, leading, axis of n rows; or one array (n, p).

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Gram
        >>> Gram(jnp.array([[1.0, 1.0], [0.0, 2.0]])).dense().tolist()
        [[1.0, 1.0], [1.0, 5.0]]
    """

    rows: PyTree

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return Space.of(jax.eval_shape(lambda rows: jax.tree.map(lambda x: x[0], rows), self.rows))

    def matrix(self) -> Array:
        """A as one (n, p) array, p in `ravel_pytree` order."""
        space = self.space
        leaves = jax.tree.leaves(self.rows)
        if not leaves:
            return jnp.zeros((0, 0), space.dtype)
        n = leading_axis(self.rows, "rows")
        return jnp.concatenate([jnp.reshape(x, (n, -1)).astype(space.dtype) for x in leaves], axis=1)

    def mv(self, v: PyTree) -> PyTree:
        """Gv = Aᵀ(Av), with the dtypes of v."""
        space, rows = self.space, self.matrix()
        space.check(v, "v")
        return cast_like(space.unravel(rows.T @ (rows @ space.ravel(v))), v)

    def dense(self) -> Array:
        """The (p, p) matrix AᵀA."""
        rows = self.matrix()
        return rows.T @ rows

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters."""
        return self.space.unravel(jnp.sum(jnp.square(self.matrix()), axis=0))

    def inner(self, u: PyTree, v: PyTree) -> Array:
        """uᵀGv = (Au)·(Av)."""
        rows = self.matrix()
        return (rows @ self.space.ravel(u)) @ (rows @ self.space.ravel(v))

    def norm(self, v: PyTree) -> Array:
        """√(vᵀGv) = ‖Av‖."""
        return norm(self.matrix() @ self.space.ravel(v))

    def unit_diagonal(self) -> tuple[Array, Array]:
        """`scale` (p,) and M (p, p) with unit diagonal, G = diag(scale) M diag(scale); a zero column stays zero."""
        rows = self.matrix()
        # Entries of 1e-30 are legal in float32, their squares are not: take the column maximum out first.
        largest = jnp.max(jnp.abs(rows), axis=0, initial=0.0)
        rows = rows / jnp.where(largest > 0, largest, 1)
        length = jnp.sqrt(jnp.sum(jnp.square(rows), axis=0))
        rows = rows / jnp.where(length > 0, length, 1)
        return largest * length, rows.T @ rows


@dataclass(frozen=True)
class Closed:
    """G whose products and solves are known in closed form; the (p, p) matrix is built only when `dense` is called.

    Args:
        mv: v ↦ Gv, a `jax.tree_util.Partial` (so that its arrays are data of the pytree).
        solve: g ↦ G⁺g, likewise.
        space: `Space` of the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(2)
        >>> params = family.init(scale=2.0)
        >>> family.fisher(params).solve(params).loc.tolist()
        [0.0, 0.0]
    """

    mv: Callable[[PyTree], PyTree]
    solve: Callable[[PyTree], PyTree]
    space: Space

    def dense(self) -> Array:
        """The (p, p) matrix, by p products: for tests and small problems."""
        columns = jax.vmap(lambda e: self.space.ravel(self.mv(self.space.unravel(e))))
        return columns(jnp.eye(self.space.size, dtype=self.space.dtype)).T

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters; costs p products."""
        return self.space.unravel(jnp.diagonal(self.dense()))

    def inner(self, u: PyTree, v: PyTree) -> Array:
        """uᵀGv."""
        return self.space.ravel(u) @ self.space.ravel(self.mv(v))

    def norm(self, v: PyTree) -> Array:
        """√(vᵀGv)."""
        return _norm(self, v)


jax.tree_util.register_dataclass(Diagonal, data_fields=["entries"], meta_fields=[])
jax.tree_util.register_dataclass(Dense, data_fields=["matrix"], meta_fields=["like"])
jax.tree_util.register_dataclass(Gram, data_fields=["rows"], meta_fields=[])
jax.tree_util.register_dataclass(Closed, data_fields=["mv", "solve"], meta_fields=["space"])
