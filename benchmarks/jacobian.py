"""Forward against reverse mode for the rows of a Fisher matrix: from how many parameters on is reverse cheaper?

`metrics.FORWARD_UP_TO` is set from this table.
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


def run(fast: bool) -> list[dict[str, Any]]:
    """One row for each model, number of points and of parameters."""
    sizes = {softmax: (2,), network: (16,)} if fast else {softmax: (1, 2, 4, 8, 32, 128), network: (8, 32, 128)}
    points = (64,) if fast else (64, 4096)
    return [one(build, p, n, repeats=2 if fast else 21) for build in sizes for n in points for p in sizes[build]]


def one(build: Any, p: int, n: int, repeats: int) -> dict[str, Any]:
    """Time of the matrix by each mode; the two agree to rounding."""
    log_prob, params, support = build(p, n)

    def call(mode: str) -> Callable[[], Any]:
        matrix = jax.jit(lambda theta, xs: ng.fisher_matrix(log_prob, theta, xs, jac=mode, normalized=False))
        return lambda: matrix(params, support)

    calls = {mode: call(mode) for mode in ("fwd", "rev")}
    times = interleaved(calls, repeats)
    fwd, rev = (matrix() for matrix in calls.values())
    return {
        "model": build.__name__,
        "n": n,
        "p": fwd.shape[0],
        "fwd / rev, min": times["fwd"]["min"] / times["rev"]["min"],
        "fwd / rev, median": times["fwd"]["median"] / times["rev"]["median"],
        "rev, ms": 1e3 * times["rev"]["min"],
        "difference": float(jnp.max(jnp.abs(fwd - rev)) / jnp.max(jnp.abs(rev))),
    }
