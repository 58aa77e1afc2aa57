"""What families share: checks of what they are built from, positive numbers, triangular factors, inverses by Newton."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.tree_util import Partial

from natgrad_jax._tree import PyTree, Space, surely
from natgrad_jax.operators import Closed

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


def located(
    loc: Any, scale: Any, shape: tuple[int, ...], default: tuple[float, float] = (0.0, 1.0)
) -> tuple[Array, Array]:
    """loc and scale of that shape in the dtype of what is given; a `ValueError` for a scale that is not positive."""
    positive(scale, "scale")
    given = [jnp.asarray(x).dtype for x in (loc, scale) if x is not None]
    dtype = jnp.result_type(float) if not given else jnp.result_type(*given)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    both = filled(loc, default[0], shape, "loc"), filled(scale, default[1], shape, "scale")
    return both[0].astype(dtype), both[1].astype(dtype)


def positive(x: Any, name: str) -> None:
    """A `ValueError` if x can be seen to be not positive."""
    if x is not None and surely(x, lambda x: not np.all(x > 0)):
        raise ValueError(f"{name}: expected positive numbers, got {x}")


def point(x: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """One x of the family; a `ValueError` for any other shape."""
    x = jnp.asarray(x)
    if x.shape != shape:
        raise ValueError(f"x: expected one point of shape {shape}, got shape {x.shape}; use vmap for several")
    return x.astype(jnp.promote_types(dtype, x.dtype))


@dataclass(frozen=True)
class _Method:
    """A method of a family, equal for equal families: the operators that hold it are of one structure."""

    family: Any
    name: str

    def __call__(self, params: PyTree, v: PyTree) -> PyTree:
        return getattr(self.family, self.name)(params, v)


def closed(family: Any, params: PyTree, like: PyTree | None = None) -> Closed:
    """The operator of a family's `_mv` and `_solve`, on vectors like `params` or `like`."""
    space = Space.of(params if like is None else like)
    return Closed(Partial(_Method(family, "_mv"), params), Partial(_Method(family, "_solve"), params), space)


def no_scale(scale: Any, family: str, cure: str) -> None:
    """A `ValueError` if a scale is given to a family that has none."""
    if scale is not None:
        raise ValueError(f"scale: {family} has none; {cure}")


def grown(x: Array, step: Array) -> Array:
    """x·exp(step/x) for x > 0: x + step to first order, positive and finite for a step of any size."""
    range_, moves = jnp.finfo(x.dtype), x > 0
    far = x * jnp.exp(bounded(step / jnp.where(moves, x, 1)))
    return jnp.where(moves, jnp.clip(far, range_.tiny, range_.max), x)


def inside(x: Array, below: float = math.inf) -> Array:
    """Draws of positive numbers, with those that rounding has put on the edge of the support next to it."""
    range_ = jnp.finfo(x.dtype)
    return jnp.clip(x, range_.tiny, min(below - float(range_.epsneg), float(range_.max)))


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
    """L·R with R lower triangular and its diagonal exp(S_ii): signs on the diagonal stay, no entry is infinite."""
    most = jnp.finfo(lower.dtype).max
    diagonal, size = jnp.diagonal(lower), jnp.max(jnp.abs(lower), axis=1, keepdims=True)
    s = relative(lower / size, step / size)
    # So far out that infinities cancelled: no direction is known there. A step that is not finite is left to be seen.
    s = jnp.where(jnp.isnan(s) & jnp.all(jnp.isfinite(step)), 0, s)
    s = jnp.clip(s, -math.exp(FARTHEST), math.exp(FARTHEST))
    below = (lower / size) @ jnp.tril(s, -1) + lower / size * jnp.exp(bounded(jnp.diagonal(s)))
    moved = jnp.sign(diagonal) * grown(jnp.abs(diagonal), jnp.abs(diagonal) * bounded(jnp.diagonal(s)))
    return jnp.tril(jnp.clip(size * below, -most, most), -1) + jnp.diag(moved)


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
