"""Fisher information: the covariance of the scores ∂log q/∂θ, by exact sums, by draws of the model, from data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, concrete, leading_axis
from natgrad_jax.metrics.shared import (
    Form,
    Metric,
    check_callable,
    check_log_prob,
    check_no_nan,
    check_weights,
    nan_unless,
    pulled_back,
)
from natgrad_jax.operators import Dense, Gram, Implicit

LogProb = Callable[..., Array]


def fisher(
    log_prob: LogProb,
    support: PyTree,
    *,
    weights: Array | None = None,
    inputs: bool = False,
    jac: str = "auto",
    normalized: bool = True,
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """Exact Fisher information, F = Σ_x w(x) q(x) s(x) s(x)ᵀ with s = ∂log q/∂θ, as a metric.

    The arguments are those of `fisher_matrix`, with the batch of a conditional model given later, by its name.

    Args:
        log_prob: log_prob(params, x) for one x, in nats; with `inputs` log_prob(params, y, x), the support holds the y.
        support: every x (or y) on the leading axis, n points.
        weights: quadrature weights w(x) ≥ 0, shape (n,), for a density on nodes; 1 when left out.
        inputs: a conditional model log q(y | x): the metric takes `batch`, the x on the leading axis, and F is the mean
            over them.
        jac: "auto", "rev" or "fwd".
        normalized: whether Σ_x w q = 1; if not, q = φ/Σwφ and the scores are centred.
        chunk_size: points (with `inputs`: of the batch) at a time: a `Dense`, memory p² + chunk_size·p. A `Gram` of n
            rows, memory n·p, when left out.
        matrix_free: an `Implicit` that is known by its products, for `cg`: neither rows nor a matrix.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params) or metric(params, *, batch) -> operator. A q that does not sum to one raises outside `jit`, and
        is NaN inside (so that an optimizer skips the step and counts it).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_prob = lambda logits, k: jax.nn.log_softmax(logits)[k]
        >>> metric = ng.metrics.fisher(log_prob, jnp.arange(2))
        >>> [round(float(x), 4) for x in metric(jnp.zeros(2)).dense()[0]]
        [0.25, -0.25]
    """
    check_callable(log_prob, "log_prob", "log_prob(params, x)")
    form = Form.of(jac, chunk_size, matrix_free, rows)
    log_w = log_weights(weights, support)

    def fisher(params: PyTree) -> Gram | Dense | Implicit:
        return _exact(log_prob, params, support, log_w, normalized, form)

    def conditional(params: PyTree, *, batch: PyTree) -> Gram | Dense | Implicit:
        return _exact_conditional(log_prob, params, support, log_w, normalized, form, batch)

    return _named(conditional, "fisher") if inputs else fisher


def fisher_matrix(
    log_prob: LogProb,
    params: PyTree,
    support: PyTree,
    *,
    weights: Array | None = None,
    batch: PyTree = None,
    jac: str = "auto",
    normalized: bool = True,
    chunk_size: int | None = None,
) -> Array:
    """The exact Fisher information matrix of q_θ over a finite support or quadrature nodes.

        F = Σ_x w(x) q(x) s(x) s(x)ᵀ,    s(x) = ∂ log q(x) / ∂θ

    Each row is √(wq)·s, from `jax.jacfwd` or `jax.vjp` of the log-densities. A point with q(x) = 0 and a finite score
    adds 0; where the score is not finite either, F is NaN, not a guess. There give the amplitudes instead, which are
    smooth: `metrics.pullback(lambda params: 2 * root_q(params))`.

    Args:
        log_prob: log_prob(params, x) for one x: a real scalar, in nats. With `batch`, log_prob(params, y, x).
        params: pytree of real floating-point leaves, p numbers in all.
        support: every x (with `batch`: every y) on the leading axis (of each leaf), n points.
        weights: quadrature weights w(x) ≥ 0, shape (n,), where log_prob is a density; 1 when left out.
        batch: inputs x of a conditional model on the leading axis; F is the mean over them.
        jac: "rev" (one gradient a point), "fwd" (p tangents; for a log_prob that has no reverse mode, such as one with
            a `while_loop`) or "auto" ("rev", but for a single parameter).
        normalized: whether Σ_x w q = 1. With False, log_prob is log φ and F = Cov_q(∂log φ), q = φ/Σwφ: the scores
            are centred before they are contracted.
        chunk_size: points (with `batch`: inputs) per chunk; memory O(p² + chunk_size·p) instead of O(n·p).

    Returns:
        F, shape (p, p), in `ravel_pytree` order; units 1/(θ_i θ_j), nats.

    Raises:
        ValueError: log_prob not scalar, support without a leading axis or with a NaN, negative weights, q that does not
            sum to one. Inside `jit` the sum cannot be read: there such an F is NaN.
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
    metric = fisher(
        log_prob,
        support,
        weights=weights,
        inputs=batch is not None,
        jac=jac,
        normalized=normalized,
        chunk_size=chunk_size,
    )
    operator = metric(params) if batch is None else metric(params, batch=batch)
    return operator.dense()


def fisher_information(log_prob: LogProb, params: PyTree, support: PyTree, **options: Any) -> PyTree:
    """The exact Fisher information in blocks, laid out as by `jax.hessian`: a pytree of params-shaped pytrees.

    The block of leaves a and b has shape a.shape + b.shape; for a single vector it is `fisher_matrix`.

    Args:
        log_prob: log_prob(params, x) for one x.
        params: pytree of real floating-point leaves.
        support: every x on the leading axis.
        options: those of `fisher_matrix`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> normal = lambda t, x: jax.scipy.stats.norm.logpdf(x, t["loc"], t["scale"])
        >>> nodes = jnp.linspace(-8.0, 8.0, 101)
        >>> params = {"loc": jnp.array(0.0), "scale": jnp.array(1.0)}
        >>> F = ng.metrics.fisher_information(normal, params, nodes, weights=jnp.full(101, 0.16))
        >>> round(float(F["scale"]["scale"]), 4)
        2.0
    """
    matrix, space = fisher_matrix(log_prob, params, support, **options), Space.of(params)

    def blocks(columns: Array) -> PyTree:
        shape = columns.shape[:-1]
        by_leaf = jax.vmap(space.unravel)(jnp.reshape(columns, (-1, space.size)))
        return jax.tree.map(lambda x: jnp.reshape(x, shape + x.shape[1:]), by_leaf)

    return jax.tree.map(blocks, jax.vmap(space.unravel, in_axes=1, out_axes=-1)(matrix))


def monte_carlo_fisher(
    log_prob: LogProb,
    sample: Callable[..., PyTree],
    num_samples: int,
    *,
    inputs: bool = False,
    centred: bool = False,
    jac: str = "auto",
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """Fisher information from draws of the model's own distribution, F ≈ mean of s(x) s(x)ᵀ over x ~ q_θ.

    Unbiased: every draw gives a row, and the mean is taken over products of scores, never over scores. The draws belong
    to the operator, so that a solver sees one symmetric matrix, and the next `key` gives the next. The rank is at most
    the number of draws.

    Args:
        log_prob: log_prob(params, x) for one x, in nats; with `inputs` log_prob(params, y, x).
        sample: sample(params, key) draws one x from q_θ; with `inputs` sample(params, key, x) draws one y given x.
        num_samples: number of draws; with `inputs` for each input. Fewer draws than parameters leave directions without
            curvature: damp by `damping.trace` or `absolute`, since what is relative to no curvature is nothing.
        inputs: a conditional model: the metric also takes `batch`, inputs on the leading axis, and F is the mean over
            them.
        centred: take the mean of the scores (of one input) out; for log_prob up to a function of θ alone. Unbiased, by
            num_samples − 1.
        jac: "auto", "rev" or "fwd", as in `fisher_matrix`.
        chunk_size: draws (with `inputs`: inputs) at a time: a `Dense` in place of the rows.
        matrix_free: an `Implicit`, for `cg`.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params, *, key) or metric(params, *, key, batch) -> operator; a mean over draws and inputs, nats.

    Cost: one gradient a draw.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_prob = lambda log_rate, x: jax.scipy.stats.poisson.logpmf(x, jnp.exp(log_rate))
        >>> sample = lambda log_rate, key: jax.random.poisson(key, jnp.exp(log_rate))
        >>> metric = ng.metrics.monte_carlo_fisher(log_prob, sample, 10_000)
        >>> round(float(metric(jnp.array(0.0), key=jax.random.key(0)).dense()[0, 0]), 1)
        1.0

    Reference: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation" (2019), equation 3.
    """
    check_callable(log_prob, "log_prob", "log_prob(params, x)")
    check_callable(sample, "sample", "sample(params, key) that draws one x")
    form, least = Form.of(jac, chunk_size, matrix_free, rows), 1 + centred
    if not isinstance(num_samples, int | np.integer) or num_samples < least:
        raise ValueError(f"num_samples: expected an integer ≥ {least}, got {num_samples!r}")

    def monte_carlo_fisher(params: PyTree, *, key: Array) -> Gram | Dense | Implicit:
        draws = jax.vmap(lambda k: sample(params, k))(jax.random.split(key, num_samples))
        check_log_prob(log_prob, params, draws)
        roots = _equal_roots(num_samples, num_samples - centred, params)
        return pulled_back(log_prob, params, draws, roots, form, centre=0 if centred else None)

    def conditional(params: PyTree, *, key: Array, batch: PyTree) -> Gram | Dense | Implicit:
        n = leading_axis(batch, "batch")
        keys = jax.random.split(key, (n, num_samples))
        given = lambda one: jax.vmap(lambda k: sample(params, k, one[1]))(one[0])  # noqa: E731
        draws = jax.lax.map(given, (keys, batch), batch_size=form.chunk_size or n)
        check_log_prob(log_prob, params, jax.tree.map(lambda y: y[0], draws), batch)
        roots = _equal_roots(n, n * (num_samples - centred), params)
        centre = 1 if centred else None
        return pulled_back(_GivenInput(log_prob), params, (draws, batch), roots, form, centre=centre)

    return _named(conditional, "monte_carlo_fisher") if inputs else monte_carlo_fisher


def empirical_fisher(
    log_prob: LogProb,
    *,
    jac: str = "auto",
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """The mean of s(x) s(x)ᵀ over the data: the covariance of the scores, about zero, *not* under the model.

    It is the Fisher information only where the model has become the distribution of the data. Elsewhere it misleads: it
    has no definite relation to curvature. It grows with the square of the misfit, so that the steps shrink the further
    the model is off, and are longest where misfit and noise are alike. For steps use `fisher`, `monte_carlo_fisher` or
    `gauss_newton`; the place for this one is the variance of gradients.

    Args:
        log_prob: log_prob(params, x) for one example x, labels included, in nats.
        jac: "auto", "rev" or "fwd", as in `fisher_matrix`.
        chunk_size: examples at a time: a `Dense` in place of the rows.
        matrix_free: an `Implicit`, for `cg`.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params, *, batch) -> operator, a mean over the n examples. Its residual is that of the loss
        −mean log_prob.

    Cost: one gradient an example.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.empirical_fisher(lambda mean, x: -0.5 * (x - mean) ** 2)
        >>> G = metric(jnp.array(0.0), batch=jnp.array([1.0, 3.0]))
        >>> round(float(G.dense()[0, 0]), 4)  # where the Fisher information is 1
        5.0

    Reference: Kunstner, Balles, Hennig (2019), section 3.
    """
    check_callable(log_prob, "log_prob", "log_prob(params, x)")
    form = Form.of(jac, chunk_size, matrix_free, rows)

    def empirical_fisher(params: PyTree, *, batch: PyTree) -> Gram | Dense | Implicit:
        n = leading_axis(batch, "batch")
        check_log_prob(log_prob, params, batch)
        roots = _equal_roots(n, n, params)
        return pulled_back(log_prob, params, batch, roots, form, residual=-roots)

    return empirical_fisher


@dataclass(frozen=True)
class _GivenInput:
    """(params, (ys, x)) ↦ log q(y | x) for every y."""

    log_prob: LogProb

    def __call__(self, params: PyTree, point: tuple[PyTree, PyTree]) -> Array:
        ys, x = point
        return jax.vmap(lambda y: self.log_prob(params, y, x))(ys)


def _exact(
    log_prob: LogProb, params: PyTree, support: PyTree, log_w: Array, normalized: bool, form: Form
) -> Gram | Dense | Implicit:
    check_log_prob(log_prob, params, support)
    theta = _tree.raised(params)
    values = jax.lax.map(lambda x: log_prob(theta, x), support, batch_size=form.chunk_size or log_w.size)
    values = values + log_w.astype(values.dtype)
    return pulled_back(log_prob, params, support, _roots(values, normalized), form, centre=None if normalized else 0)


def _exact_conditional(
    log_prob: LogProb, params: PyTree, support: PyTree, log_w: Array, normalized: bool, form: Form, batch: PyTree
) -> Gram | Dense | Implicit:
    n = leading_axis(batch, "batch")
    check_log_prob(log_prob, params, support, batch)
    theta = _tree.raised(params)
    each = lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x)))  # noqa: E731
    points, of_input = (jax.tree.map(each, support), batch), _GivenInput(log_prob)
    values = jax.lax.map(lambda point: of_input(theta, point), points, batch_size=form.chunk_size or n)
    roots = _roots(values + log_w.astype(values.dtype), normalized) / math.sqrt(n)
    return pulled_back(of_input, params, points, roots, form, centre=None if normalized else 1)


def log_weights(weights: Array | None, support: PyTree) -> Array:
    """log w(x), (n,); the support and the weights are checked."""
    n = leading_axis(support, "support")
    check_no_nan(support, "support")
    if weights is None:
        return jnp.zeros(n)
    check_weights(weights, ((n,),), "weights")
    return jnp.log(jnp.asarray(weights))


def _roots(log_values: Array, normalized: bool) -> Array:
    """√(wq) from log(wq), made to sum to one over the last axis; if they must already, an error or NaN where not."""
    if not normalized:
        return jnp.exp(jax.nn.log_softmax(log_values) / 2)
    # The NaN enters behind exp: compiled for a CPU in float32, exp of a selected NaN may come out finite.
    return _one_if_normalized(log_values) * jnp.exp(log_values / 2)


def _one_if_normalized(log_values: Array) -> Array:
    """1 if the exponentials sum to one over the last axis; else an error with the sum, or NaN if it cannot be read."""
    total = jnp.sum(jnp.exp(log_values), axis=-1, keepdims=True)
    off = jnp.abs(total - 1)
    tolerance = math.sqrt(jnp.finfo(log_values.dtype).eps)
    if concrete(total) and bool(jnp.any(off > tolerance)):
        worst = float(total.ravel()[jnp.argmax(off)])
        raise ValueError(
            f"log_prob: expected probabilities that sum to one over the support, got a sum of {worst:.6g} "
            f"(off by {worst - 1:.3g}). Normalise it, complete the support, pass weights= for a density on quadrature "
            "nodes, or normalized=False for log φ with q = φ/Σφ."
        )
    return nan_unless(~(off > tolerance), log_values.dtype)


def _equal_roots(n: int, total: int, params: PyTree) -> Array:
    """√(1/total), n times."""
    return jnp.full(n, 1 / math.sqrt(total), Space.of(params).dtype)


def _named(f: Metric, name: str) -> Metric:
    f.__name__ = name
    return f
