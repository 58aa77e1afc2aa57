"""Forward against reverse mode for rows: from how many parameters on, for each output, is reverse cheaper?

`metrics.shared.FORWARD_UP_TO` is set from this table: 1, for one output (the Fisher matrices) and for several.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import natgrad_jax as ng
from benchmarks.timing import interleaved


def softmax(p: int, n: int) -> tuple[Any, Any, Any]:
    """Logits over p outcomes, linear in a feature of the point: q(x) ∝ exp(θ·φ(x)) over n points."""
    features = jnp.cos(jnp.outer(jnp.arange(1.0, n + 1), jnp.arange(1.0, p + 1)))
    return lambda theta, x: x @ theta - jnp.log(float(n)), 0.01 * jnp.ones(p), features


def network(p: int, n: int) -> tuple[Any, Any, Any]:
    """log φ of a network with one hidden layer of four units and about p parameters."""
    width = max(p // 4 - 1, 1)
    points = jnp.cos(jnp.outer(jnp.arange(1.0, n + 1), jnp.arange(1.0, width + 1)))
    params = {"w": 0.1 * jnp.ones((4, width)), "b": jnp.zeros(4)}
    return lambda theta, x: jnp.sum(jnp.tanh(theta["w"] @ x + theta["b"])), params, points


def several(p: int, n: int, k: int) -> tuple[Any, Any, Any]:
    """k outputs of p parameters: tanh of k mixtures of p features."""
    features = jnp.cos(jnp.outer(jnp.arange(1.0, n + 1), jnp.arange(1.0, p + 1)))
    mixture = jnp.sin(jnp.outer(jnp.arange(1.0, k + 1), jnp.arange(1.0, p + 1)))
    return lambda theta, xs: jnp.tanh((xs * theta) @ mixture.T), 0.1 * jnp.ones(p), features


def run(fast: bool) -> list[dict[str, Any]]:
    """One row for each model, number of points, of outputs and of parameters."""
    sizes = {softmax: (2,), network: (16,)} if fast else {softmax: (1, 2, 4, 8, 32, 128), network: (8, 32, 128)}
    points, repeats = ((64,), 2) if fast else ((64, 4096), 21)
    rows = [one(build, p, n, repeats) for build in sizes for n in points for p in sizes[build]]
    outputs = (4,) if fast else (4, 16)
    return rows + [
        of_outputs(k, p, n, repeats) for k in outputs for n in points for p in (k // 2, k, 2 * k, 4 * k, 8 * k)
    ]


def one(build: Any, p: int, n: int, repeats: int) -> dict[str, Any]:
    """Time of the matrix by each mode; the two agree to rounding."""
    log_prob, params, support = build(p, n)

    def call(mode: str) -> Callable[[], Any]:
        matrix = jax.jit(lambda theta, xs: ng.fisher_matrix(log_prob, theta, xs, jac=mode, normalized=False))
        return lambda: matrix(params, support)

    return compared({mode: call(mode) for mode in ("fwd", "rev")}, build.__name__, n, 1, p, repeats)


def of_outputs(k: int, p: int, n: int, repeats: int) -> dict[str, Any]:
    """Time of the rows of k outputs by each mode."""
    outputs, params, points = several(p, n, k)

    def call(mode: str) -> Callable[[], Any]:
        metric = ng.metrics.least_squares(outputs, jac=mode)
        rows = jax.jit(lambda theta, xs: metric(theta, batch=xs).matrix())
        return lambda: rows(params, points)

    return compared({mode: call(mode) for mode in ("fwd", "rev")}, "several", n, k, p, repeats)


def compared(calls: dict[str, Callable[[], Any]], name: str, n: int, k: int, p: int, repeats: int) -> dict[str, Any]:
    """The row of the table."""
    times = interleaved(calls, repeats)
    fwd, rev = (matrix() for matrix in calls.values())
    return {
        "model": name,
        "n": n,
        "k": k,
        "p": p,
        "fwd / rev, min": times["fwd"]["min"] / times["rev"]["min"],
        "fwd / rev, median": times["fwd"]["median"] / times["rev"]["median"],
        "rev, ms": 1e3 * times["rev"]["min"],
        "difference": float(jnp.max(jnp.abs(fwd - rev)) / jnp.max(jnp.abs(rev))),
    }
