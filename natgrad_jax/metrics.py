"""Metrics: where G comes from. A metric is a function `metric(params, **data) -> operator`.

A metric's keyword-only parameters name the data that it needs; the ones here need none. Fisher matrices are kept in
square-root form, rows √q(x)·∂log q(x)/∂θ, so that whoever solves may avoid squaring.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from natgrad_jax._tree import PyTree, Space, accumulator, chunked_sum, concrete, leading_axis
from natgrad_jax.operators import Dense, Diagonal, Gram

LogProb = Callable[[PyTree, PyTree], Array]
Metric = Callable[..., Any]

# One output a point: up to this many parameters forward mode is no slower than reverse. `python -m benchmarks jacobian`
FORWARD_UP_TO = 1


def scales(s: PyTree) -> Metric:
    """Characteristic scales: g_ii = s_i⁻², so that a step of one scale has length one in every coordinate.

    Args:
        s: pytree of positive scales in the units of the parameters, or a prefix of the parameters' pytree (a bare
            number is one scale for all).

    Returns:
        metric(params) -> `Diagonal`.

    Raises:
        ValueError: a scale that is not positive, or that does not broadcast to its parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.scales({"length": 2.0, "time": 0.5})
        >>> metric({"length": jnp.array(1.0), "time": jnp.array(1.0)}).entries["time"].item()
        4.0
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(s):
        if concrete(leaf) and not np.all(np.asarray(leaf) > 0):
            raise ValueError(f"s{jax.tree_util.keystr(path)}: expected positive scales, got {leaf}")

    def scales(params: PyTree) -> Diagonal:
        def entries(scale: Any, subtree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: _inverse_square(jnp.asarray(scale), x), subtree)

        return Diagonal(jax.tree.map(entries, s, params))

    return scales


def _inverse_square(scale: Array, x: Array) -> Array:
    try:
        full = jnp.broadcast_to(scale, jnp.shape(x))
    except ValueError as error:
        raise ValueError(
            f"s: a scale of shape {scale.shape} does not fit a parameter of shape {jnp.shape(x)}"
        ) from error
    return jnp.square(1 / full.astype(accumulator(jnp.result_type(x))))


def fisher(
    log_prob: LogProb,
    support: PyTree,
    *,
    jac: str = "auto",
    normalized: bool = True,
    chunk_size: int | None = None,
) -> Metric:
    """Exact Fisher information, F = Σ_x q(x) s(x) s(x)ᵀ with s = ∂log q/∂θ, as a metric.

    The arguments are those of `fisher_matrix`. Without `chunk_size` the operator is a `Gram` of n rows (memory n·p),
    with it a `Dense` (memory p² + chunk_size·p).

    Returns:
        metric(params) -> operator. A q that does not sum to one raises outside `jit`, and is NaN inside (so that an
        optimizer skips the step and counts it).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_prob = lambda logits, k: jax.nn.log_softmax(logits)[k]
        >>> metric = ng.metrics.fisher(log_prob, jnp.arange(2))
        >>> [round(float(x), 4) for x in metric(jnp.zeros(2)).dense()[0]]
        [0.25, -0.25]
    """
    _check_options(jac, chunk_size)
    leading_axis(support, "support")

    def fisher(params: PyTree) -> Gram | Dense:
        space = Space.of(params)
        log_weights, rows = _fisher_rows(log_prob, params, support, jac, normalized, chunk_size)
        if chunk_size is None:
            flat = rows(support, log_weights)
            return Gram(jax.vmap(space.unravel)(flat.astype(space.dtype)))
        return Dense(_accumulate(rows, support, log_weights, chunk_size), space)

    return fisher


def fisher_matrix(
    log_prob: LogProb,
    params: PyTree,
    support: PyTree,
    *,
    jac: str = "auto",
    normalized: bool = True,
    chunk_size: int | None = None,
) -> Array:
    """The exact Fisher information matrix of q_θ over a finite support.

        F = Σ_x q(x) s(x) s(x)ᵀ,    s(x) = ∂ log q(x) / ∂θ

    Each row is ∂(2√q)/∂θ = √q·s, from `jax.jacfwd` or `jax.vmap(jax.grad)` of the log-densities. A point with
    q(x) = 0 and a finite score adds 0; where the score is not finite either, F is NaN, not a guess.

    Args:
        log_prob: log_prob(params, x) for one x: a real scalar, in nats.
        params: pytree of real floating-point leaves, p numbers in all.
        support: every x on the leading axis (of each leaf), n points.
        jac: "rev" (one gradient a point), "fwd" (p tangents; for a log_prob that has no reverse mode, such as one with
            a `while_loop`) or "auto" ("rev", but for a single parameter).
        normalized: whether Σ_x q(x) = 1. With False, log_prob is log φ and F = Cov_q(∂log φ), q = φ/Σφ: the scores
            are centred before they are contracted.
        chunk_size: points per chunk; memory O(p² + chunk_size·p) instead of O(n·p).

    Returns:
        F, shape (p, p), in `ravel_pytree` order; units 1/(θ_i θ_j), nats.

    Raises:
        ValueError: log_prob not scalar, support without a leading axis, q that does not sum to one. Inside `jit` the
            sum cannot be read: there such an F is NaN.
        TypeError: parameters that are not real floating point.

    Cost: n gradients ("rev") or n·p tangents ("fwd"), and n·p² for the product.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_prob = lambda logit, x: jax.nn.log_sigmoid(jnp.where(x, logit, -logit))
        >>> round(float(ng.fisher_matrix(log_prob, jnp.array(0.0), jnp.array([False, True]))[0, 0]), 4)
        0.25

    Reference: Amari, "Natural gradient works efficiently in learning" (1998), section 2.
    """
    _check_options(jac, chunk_size)
    leading_axis(support, "support")
    log_weights, rows = _fisher_rows(log_prob, params, support, jac, normalized, chunk_size)
    return _accumulate(rows, support, log_weights, chunk_size)


def _check_options(jac: str, chunk_size: int | None) -> None:
    if jac not in ("auto", "fwd", "rev"):
        raise ValueError(f"jac: expected 'auto', 'fwd' or 'rev', got {jac!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number of points or None, got {chunk_size}")


def check_log_prob(log_prob: LogProb, params: PyTree, support: PyTree) -> None:
    """Raise unless the parameters are real floating point and log_prob(params, x) is a real scalar for one x."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)}: expected real floating-point numbers, "
                f"got {jnp.result_type(leaf)}. Convert with jnp.asarray(x, float)."
            )
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), support)
    out = jax.eval_shape(log_prob, params, one)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"log_prob: expected log_prob(params, x) for one x to be a real scalar, got shape {shape}, dtype {dtype}. "
            "It takes one point of the support, without the leading axis; sum over the components of x."
        )


def _fisher_rows(
    log_prob: LogProb, params: PyTree, support: PyTree, jac: str, normalized: bool, chunk_size: int | None
) -> tuple[Array, Callable[[PyTree, Array], Array]]:
    """log q(x) for every x, (n,), and the function (xs, log q(xs)) -> rows √q·s, (n, p)."""
    check_log_prob(log_prob, params, support)
    # Half precision is raised before anything is differentiated or summed.
    params = jax.tree.map(lambda x: jnp.asarray(x).astype(accumulator(jnp.result_type(x))), params)
    theta, unravel = ravel_pytree(params)
    flat = lambda theta, x: log_prob(unravel(theta), x)  # noqa: E731
    log_values = jax.lax.map(partial(flat, theta), support, batch_size=chunk_size or leading_axis(support, "support"))
    if jac == "auto":
        jac = "fwd" if theta.size <= FORWARD_UP_TO else "rev"
    scores = {
        "fwd": lambda xs: jax.jacfwd(lambda t: jax.vmap(partial(flat, t))(xs))(theta),
        "rev": lambda xs: jax.vmap(lambda x: jax.grad(flat)(theta, x))(xs),
    }[jac]
    mean, unit = jnp.zeros_like(theta), jnp.ones((), theta.dtype)
    if normalized:
        log_weights, unit = log_values, _one_if_normalized(log_values)
    else:
        log_weights = jax.nn.log_softmax(log_values)
        weighted = lambda xw: jnp.exp(xw[1]) @ scores(xw[0])  # noqa: E731
        mean = chunked_sum(weighted, (support, log_weights), chunk_size)

    def rows(xs: PyTree, log_q: Array) -> Array:
        # The NaN enters behind exp: compiled for a CPU in float32, exp of a selected NaN may come out finite.
        return unit * jnp.exp(log_q / 2)[:, None] * (scores(xs) - mean)

    return log_weights, rows


def _one_if_normalized(log_values: Array) -> Array:
    """1 if the exponentials sum to one; else an error with the sum, or NaN under a transformation."""
    total = jnp.sum(jnp.exp(log_values))
    tolerance = math.sqrt(jnp.finfo(log_values.dtype).eps)
    if concrete(total) and bool(jnp.abs(total - 1) > tolerance):
        raise ValueError(
            f"log_prob: expected probabilities that sum to one over the support, got a sum of {float(total):.6g} "
            f"(off by {float(total) - 1:.3g}). Normalise it, complete the support, or pass normalized=False for "
            "log φ with q = φ/Σφ."
        )
    return jnp.where(jnp.abs(total - 1) > tolerance, jnp.nan, 1).astype(log_values.dtype)


def _accumulate(rows: Callable[[PyTree, Array], Array], support: PyTree, log_q: Array, chunk_size: int | None) -> Array:
    """AᵀA over chunks of the support."""

    def gram(chunk: tuple[PyTree, Array]) -> Array:
        a = rows(*chunk)
        return a.T @ a

    return chunked_sum(gram, (support, log_q), chunk_size)
