"""Methods that operators of different structure share: each is given its name in a class body."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, cast_like

Operator = Any
Product = Callable[[PyTree], PyTree]


def is_operator(x: Any) -> bool:
    """Whether x is an operator: it has a space and a product."""
    return hasattr(x, "space") and hasattr(x, "product")


def mv(operator: Operator, v: PyTree) -> PyTree:
    """Gv, with the dtypes of v."""
    operator.space.check(v, "v")
    return cast_like(operator.product()(_tree.raised(v)), v)


def inner(operator: Operator, u: PyTree, v: PyTree) -> Array:
    """Re uᴴGv."""
    operator.space.check(u, "u")
    operator.space.check(v, "v")
    return _tree.vdot(_tree.raised(u), operator.product()(_tree.raised(v)))


def norm(operator: Operator, v: PyTree) -> Array:
    """√(vᴴGv), with the largest entry of v divided out, so that v may be as small or as large as the floats allow."""
    v = _tree.raised(v)
    largest = _tree.largest(v)
    scaled = jax.tree.map(lambda x: x / jnp.where(largest > 0, largest, 1), v)
    return largest * jnp.sqrt(jnp.maximum(operator.inner(scaled, scaled), 0))


def dense_by_products(operator: Operator) -> Array:
    """The (p, p) matrix, by p products."""
    space, product = operator.space, operator.product()
    columns = jax.vmap(lambda e: space.ravel(product(space.unravel(e))))
    return columns(jnp.eye(space.size, dtype=space.dtype)).T


def diagonal_by_products(operator: Operator) -> PyTree:
    """The diagonal of G, shaped like the parameters: p products, one after the other, in the memory of one."""
    space, product = operator.space, operator.product()

    def entry(i: Array) -> Array:
        e = jnp.zeros(space.size, space.dtype).at[i].set(1)
        return jnp.real(space.ravel(product(space.unravel(e)))[i])

    return space.unravel(jax.lax.map(entry, jnp.arange(space.size)))


def diagonal_of_dense(operator: Operator) -> PyTree:
    """The diagonal of G, shaped like the parameters, at the cost of the matrix."""
    return operator.space.unravel(jnp.real(_tree.diagonal(operator.dense())))


def trace(operator: Operator) -> Array:
    """tr G, the sum of the diagonal."""
    return jnp.sum(operator.space.ravel(operator.diagonal()).real)


def scale_of_diagonal(operator: Operator) -> Array:
    """√G_ii, as a flat vector."""
    return jnp.sqrt(operator.space.ravel(operator.diagonal()).real)


def balanced(operator: Operator) -> tuple[Array | None, Array]:
    """`frame` (p,) and M (p, p) with G = diag(frame) M diag(frame), M within the floats; None for 1: here M is G."""
    return None, operator.dense()


def max_rank(operator: Operator) -> int:
    """An upper bound on the rank, from shapes alone."""
    return int(operator.space.size)


def submatrix(matrix: Array, space: Space, mask: PyTree) -> tuple[Array, Space]:
    """The rows and columns of a (p, p) matrix that belong to the leaves in `mask`, and their space."""
    kept = jax.tree.leaves(_tree.seen(mask, space.indices()))
    flat = np.concatenate([np.zeros(0, int), *(indices.ravel() for indices in kept)])
    return matrix[np.ix_(flat, flat)], Space.of(_tree.seen(mask, space.structs()))
