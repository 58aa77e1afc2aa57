"""The table of transformations that the laws run over, and the problem that they minimise.

Residuals softplus(Aθ) − y, of which the metric is the Gauss–Newton matrix: a new rule is one row and gets every law.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import ROWS, tree

import natgrad_jax as ng
from natgrad_jax import metrics, transforms
from natgrad_jax.transforms import precondition, scale_step, with_metric

TARGET = cases.rounded(np.linspace(0.5, 2.0, len(ROWS)))
START = cases.rounded(0.5 * cases.VECTOR)


def residuals(params, batch):
    rows, target = batch
    parts = jax.tree.map(lambda row, x: jnp.tensordot(row, x, jnp.ndim(x)), rows, params)
    return jax.nn.softplus(sum(jax.tree.leaves(parts))) - target


def loss(params, batch):
    return 0.5 * jnp.sum(residuals(params, batch) ** 2)


METRIC = metrics.least_squares(residuals)
MATRIX = metrics.least_squares(residuals, chunk_size=len(ROWS))
HIDDEN = {"a": True, "b": False, "c": True}


def diagonal(params, *, batch):
    return ng.operators.Diagonal(METRIC(params, batch=batch).diagonal())


def data(dtype, unit=1.0):
    """(parameters, batch) in a unit for each parameter."""
    return tree(START * unit, dtype), (tree(ROWS / unit, dtype), jnp.asarray(TARGET, dtype))


def descending(rule, metric=METRIC):
    return optax.chain(with_metric(metric, rule), optax.scale(-1.0))


# name -> function of `like` that builds it
RULES = {
    "natural_gradient": lambda like: ng.natural_gradient(0.5, METRIC),
    "schedule": lambda like: ng.natural_gradient(optax.linear_schedule(1.0, 0.1, 10), METRIC, damping=0.1),
    "trust_region": lambda like: ng.natural_gradient(0.5, METRIC, max_kl=0.02),
    "eigh": lambda like: ng.natural_gradient(0.5, METRIC, solver=ng.solvers.eigh()),
    "warm cg": lambda like: ng.natural_gradient(0.5, METRIC, solver=ng.solvers.cg(1e-12, warm_start=True)),
    "normalise": lambda like: descending(scale_step(transforms.normalise(precondition()), 0.1)),
    "heavy_ball": lambda like: descending(transforms.heavy_ball(scale_step(precondition(), 0.2), 0.5)),
    "nesterov": lambda like: descending(transforms.heavy_ball(scale_step(precondition(), 0.2), 0.5, nesterov=True)),
    "spring": lambda like: descending(transforms.spring(scale_step(precondition(damping=0.5), 0.5), 0.5)),
    "spring, corrected": lambda like: descending(
        scale_step(transforms.spring(precondition(damping=0.5), 0.5, bias_correction=True), 0.5)
    ),
    "geodesic": lambda like: descending(transforms.geodesic(precondition(), residuals, learning_rate=0.5)),
    "levenberg_marquardt": lambda like: descending(transforms.levenberg_marquardt(precondition())),
    "levenberg_marquardt, bounded": lambda like: descending(
        transforms.levenberg_marquardt(transforms.trust_region(precondition(), 0.02))
    ),
    "quadratic_step": lambda like: descending(transforms.quadratic_step(precondition(damping=0.5))),
    "quadratic_step, from a diagonal": lambda like: descending(
        transforms.quadratic_step(precondition(), METRIC), diagonal
    ),
    "damping_grid": lambda like: descending(transforms.damping_grid(precondition(), [0.01, 0.1, 1.0, 10.0])),
    "damping_grid, from one factorisation": lambda like: descending(
        transforms.damping_grid(precondition(ng.solvers.qr()), [0.1, 1.0], chunk_size=1)
    ),
    "grid_search": lambda like: descending(transforms.grid_search(precondition(), [2.0, 1.0, 0.5, 0.25])),
    "backtracking": lambda like: descending(transforms.backtracking(precondition(), 4.0)),
    "average": lambda like: transforms.average(ng.natural_gradient(0.5, MATRIX), 0.5, like=like),
    "every_k": lambda like: transforms.every_k(ng.natural_gradient(0.5, METRIC), 2, like=like),
    "every_k of average": lambda like: transforms.every_k(
        transforms.average(ng.natural_gradient(0.5, MATRIX, solver=ng.solvers.eigh()), 0.5, like=like), 2, like=like
    ),
    "accumulate": lambda like: transforms.accumulate(ng.natural_gradient(0.5, METRIC), 2),
}


class Compiled(NamedTuple):
    """A transformation, its jitted update on this problem, and its jitted trajectory of six steps."""

    tx: optax.GradientTransformationExtraArgs
    update: Callable  # (grads, state, params, batch) -> (updates, state)
    path: Callable  # (params, batch) -> (every params, last state)
    traces: list  # one entry whenever the update is traced


@functools.cache
def compiled(name, dtype):
    """Each is compiled once for all laws (in one worker)."""
    _, batch = data(dtype)
    tx = RULES[name]({"batch": batch})
    traces = []

    def update(g, state, params, batch):
        traces.append(1)
        return tx.update(g, state, params, batch=batch, value_fn=loss)

    def step(carry, _, batch):
        params, state = carry
        updates, state = update(jax.grad(loss)(params, batch), state, params, batch)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def path(params, batch):
        start = params, tx.init(params)
        (_, state), all_params = jax.lax.scan(functools.partial(step, batch=batch), start, None, length=6)
        return all_params, state

    return Compiled(tx, jax.jit(update), path, traces)
