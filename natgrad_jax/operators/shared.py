"""Methods that operators of different structure share: each is given its name in a class body."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, cast_like

Operator = Any
COLUMNS = 64  # of a matrix that are made in one product
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
    column = lambda e: space.ravel(product(space.unravel(e)))  # noqa: E731
    # In batches: a product with all p vectors at once would take p times the memory of one.
    return jax.lax.map(column, jnp.eye(space.size, dtype=space.dtype), batch_size=COLUMNS).T


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
    return _tree.root(operator.space.ravel(operator.diagonal()).real)


def balanced(operator: Operator) -> tuple[Array | None, Array]:
    """`frame` (p,) and M (p, p) with G = diag(frame) M diag(frame), M within the floats; None for 1: here M is G."""
    return None, operator.dense()


def joined_frames(parts: list[tuple[Array, Array | None, Array]]) -> tuple[Array | None, Array]:
    """The frame and the matrix of Σ (c_i)² diag(frame_i) M_i diag(frame_i), from (c_i, frame_i, M_i)."""
    if all(frame is None for _, frame, _ in parts):
        return None, sum(
            (jnp.square(c) * matrix for c, _, matrix in parts[1:]), start=jnp.square(parts[0][0]) * parts[0][2]
        )
    frames = [c * (jnp.ones(matrix.shape[-1]) if frame is None else frame) for c, frame, matrix in parts]
    total = functools.reduce(jnp.maximum, frames)
    ratios = [frame / jnp.where(total > 0, total, 1) for frame in frames]
    terms = [matrix * u[:, None] * u for u, (_, _, matrix) in zip(ratios, parts, strict=True)]
    return total, sum(terms[1:], start=terms[0])


def max_rank(operator: Operator) -> int:
    """An upper bound on the rank, from shapes alone."""
    return int(operator.space.size)


def submatrix(matrix: Array, space: Space, mask: PyTree) -> tuple[Array, Space]:
    """The rows and columns of a (p, p) matrix that belong to the leaves in `mask`, and their space."""
    kept = jax.tree.leaves(_tree.seen(mask, space.indices()))
    flat = np.concatenate([np.zeros(0, int), *(indices.ravel() for indices in kept)])
    return matrix[np.ix_(flat, flat)], Space.of(_tree.seen(mask, space.structs()))
