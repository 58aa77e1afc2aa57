"""Ax = b for positive definite A of a few unknowns, written so that `vmap` over many such systems is fast.

A batched LAPACK call spends microseconds a matrix on p = 2. An elimination that is unrolled over p is arithmetic on
whole batches. `python -m benchmarks solvers` measures where each form wins.
"""

import jax.numpy as jnp
from jax import Array

LARGEST = 14  # beyond, compilation takes more than two seconds


def solve(a: Array, pivots: Array, b: Array) -> Array:
    """x (p,) from a symmetric positive definite (p, p), whose diagonal is taken from `pivots` (p,), and b (p,).

    Not finite where a pivot of the elimination is not positive or an entry of `pivots` is not finite. A row of zeros
    gives 0, and leaves the others as they are without it.
    """
    p = b.shape[-1]
    # LDLᵀ by scalars: `scaled` is LD.
    scaled: dict[tuple[int, int], Array] = {}
    lower: dict[tuple[int, int], Array] = {}
    remaining, y, x = list[Array](), list[Array](), [jnp.zeros(())] * p
    for j in range(p):
        remaining.append(_checked(pivots[j] - sum(scaled[j, k] * lower[j, k] for k in range(j)), pivots[j]))
        inverse = 1 / remaining[j]
        for i in range(j + 1, p):
            scaled[i, j] = a[i, j] - sum(scaled[i, k] * lower[j, k] for k in range(j))
            lower[i, j] = scaled[i, j] * inverse
    for i in range(p):
        y.append(b[i] - sum(lower[i, k] * y[k] for k in range(i)))
    for i in reversed(range(p)):
        # A division last, which XLA computes once. What is cheap it computes again in each later entry, with other
        # roundings; along a nearly singular direction the entries would then not belong to one x.
        x[i] = (y[i] - sum(scaled[k, i] * x[k] for k in range(i + 1, p))) / remaining[i]
    return jnp.stack(x) if p else b


def _checked(pivot: Array, original: Array) -> Array:
    """∞ for a row of zeros, NaN for a matrix that is not positive definite or not finite."""
    return jnp.where(original == 0, jnp.inf, jnp.where((pivot > 0) & (pivot < jnp.inf), pivot, jnp.nan))
