"""What families share: checks of what they are built from, positive numbers, triangular factors, inverses by Newton."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

LOG_2PI = math.log(2 * math.pi)
FARTHEST = 20.0  # a positive number grows or shrinks by no more than e²⁰ in one step


def dimension(d: Any, name: str, argument: str = "d", least: int = 1) -> int:
    """d as an int; a `ValueError` unless it is a whole number ≥ `least`."""
    if isinstance(d, bool) or not isinstance(d, numbers.Integral) or d < least:
        raise ValueError(f"{name}: expected a whole number {argument} ≥ {least}, got {d!r}")
    return int(d)


def filled(value: Any, default: float, shape: tuple[int, ...], name: str) -> Array:
    """`value`, or `default` where it is None, as floats of that shape."""
    value = jnp.asarray(default if value is None else value)
    value = value.astype(jnp.result_type(float, value.dtype))
    if value.shape not in ((), shape):
        raise ValueError(f"{name}: expected a number or an array of shape {shape}, got shape {value.shape}")
    return jnp.broadcast_to(value, shape)


def no_scale(scale: Any, family: str, cure: str) -> None:
    """A `ValueError` if a scale is given to a family that has none."""
    if scale is not None:
        raise ValueError(f"scale: {family} has none; {cure}")


def grown(x: Array, step: Array) -> Array:
    """x·exp(step/x) for x > 0: x + step to first order, positive and finite for a step of any size."""
    range_ = jnp.finfo(x.dtype)
    return jnp.clip(x * jnp.exp(bounded(step / x)), range_.tiny, range_.max)


def bounded(step: Array) -> Array:
    """A change of a logarithm, at most 20."""
    return jnp.clip(step, -FARTHEST, FARTHEST)


# Lower-triangular factors L of a symmetric matrix A = LLᵀ, with S = L⁻¹δL: tr(A⁻¹δA A⁻¹δA) = 2(‖S‖² + ‖diag S‖²).


def half_lower(matrix: Array) -> Array:
    """Φ: the lower triangle with halved diagonal."""
    return jnp.tril(matrix) - 0.5 * jnp.diag(jnp.diagonal(matrix))


def relative(lower: Array, step: Array) -> Array:
    """S = L⁻¹δL."""
    return solve_triangular(lower, jnp.tril(step), lower=True)


def covector(lower: Array, s: Array) -> Array:
    """The gradient in L of a gradient in S: tril(L⁻ᵀ s)."""
    return jnp.tril(solve_triangular(lower, s, lower=True, trans=1))


def doubled_diagonal(s: Array) -> Array:
    """S + diag S, half the gradient of ‖S‖² + ‖diag S‖²."""
    return s + jnp.diag(jnp.diagonal(s))


def retract_lower(lower: Array, step: Array) -> Array:
    """L·R with R lower triangular and its diagonal exp(S_ii): a factor with positive diagonal again."""
    s = relative(lower, step)
    one = jnp.ones((), lower.dtype)
    return lower @ (jnp.tril(s, -1) + jnp.diag(grown(one, jnp.diagonal(s))))


def inverse_lower(lower: Array) -> Array:
    """L⁻¹."""
    return solve_triangular(lower, jnp.eye(len(lower), dtype=lower.dtype), lower=True)


def lower_of_inverse(matrix: Array) -> Array:
    """The lower factor of A⁻¹, from the Cholesky factor of A turned by half a turn."""
    turned = jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]  # upper U with A = UUᵀ
    return inverse_lower(turned.T)


def inverse(f: Callable[[Array], Array], y: Array, start: Array) -> Array:
    """u with f(u) = y, entry by entry, for an increasing f that is nearly linear: Newton; differentiable in y."""
    ones = jnp.ones_like(start)

    def newton(residual: Callable[[Array], Array], u: Array) -> Array:
        def improved(_: int, u: Array) -> Array:
            value, slope = jax.jvp(residual, (u,), (ones,))
            return u - value / slope

        return jax.lax.fori_loop(0, 12, improved, u)

    return jax.lax.custom_root(lambda u: f(u) - y, start, newton, lambda slope, y: y / slope(ones))


def all_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices i < j of n things."""
    return np.triu_indices(n, 1)
