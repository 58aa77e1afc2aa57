"""The closed-form natural gradient of a full-rank Gaussian in d dimensions: O(d³), no p × p matrix.

Beside it the dense Fisher matrix of the same family, p = d + d², for the sizes at which it still fits, and three
(d, d) matrix products, the least that F⁻¹g = (LLᵀg_μ, LΦ(LᵀG_L)) takes.
"""

from typing import Any

import jax
import jax.numpy as jnp

import natgrad_jax as ng
from benchmarks.timing import interleaved


def run(fast: bool) -> list[dict[str, Any]]:
    """One row for each dimension."""
    return [one(d, repeats=2 if fast else 9) for d in ((5, 10) if fast else (10, 30, 100, 300))]


def one(d: int, repeats: int) -> dict[str, Any]:
    """Times of F⁻¹g, of one step of fit, and of its floor."""
    family = ng.families.gaussian_full_rank(d)
    keys = jax.random.split(jax.random.key(d), 3)
    lower = jnp.tril(jax.random.normal(keys[0], (d, d))) / d + jnp.eye(d)
    params = family.init(scale=lower)
    grad = family.init(loc=jax.random.normal(keys[1], (d,)), scale=jnp.tril(jax.random.normal(keys[2], (d, d))))
    solve = jax.jit(lambda params, grad: ng.solvers.solve(family.fisher(params), grad).value)
    three = jax.jit(lambda a, b: a @ (a.T @ (a @ b)))
    precision = jnp.linspace(0.5, 2.0, d)
    log_density = lambda x: -0.5 * x @ (precision * x) - 0.1 * jnp.sum(jnp.square(x) ** 2)
    steps = 5
    calls = {
        "closed form": lambda: solve(params, grad),
        "three products": lambda: three(lower, grad.scale_tril),
        "fit": lambda: ng.fit(log_density, family, keys[0], max_steps=steps, tol=1e-9),
    }
    if d <= 30:
        dense = jax.jit(lambda params, grad: _dense(family, params, grad))
        calls["dense"] = lambda: dense(params, grad)
    times = interleaved(calls, repeats)
    row: dict[str, Any] = {"d": d, "p": d + d * d, "draws a step": max(2 * d, 40)}
    for what in ("min", "median"):
        row[f"closed form, ms, {what}"] = 1e3 * times["closed form"][what]
        row[f"closed form / three products, {what}"] = times["closed form"][what] / times["three products"][what]
        row[f"fit, ms a step, {what}"] = 1e3 * times["fit"][what] / steps
        if "dense" in times:
            row[f"dense / closed form, {what}"] = times["dense"][what] / times["closed form"][what]
    if "dense" in times:
        closed, matrix = (family.fisher(params).space.ravel(f(params, grad)) for f in (solve, dense))
        row["largest difference from dense"] = float(jnp.max(jnp.abs(closed - matrix)))
    return row


def _dense(family: Any, params: Any, grad: Any) -> Any:
    operator = family.fisher(params)
    dense = ng.operators.Dense(operator.dense(), operator.space)
    return ng.solvers.solve(dense, grad, solver=ng.solvers.eigh(), damping=None).value
