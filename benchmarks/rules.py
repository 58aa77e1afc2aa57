"""Every rule on problems with a known minimum: steps until the loss is within 1e-10 of it, a PINN, and what to chain.

Double precision. "never" is more than 300 steps, or a loss that is not finite. The PINN is Poisson's equation on the
unit square, u = sin πx sin πy, by a 2-32-1 tanh network that starts from 0.1·N(0, 1), 784 interior and 116 boundary
points, p = 129; its error is the relative L² error on a grid of 100 × 100.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgrad_jax as ng
from natgrad_jax import damping, metrics, operators, transforms
from natgrad_jax.transforms import precondition, scale_step, with_metric

STEPS = 300


class Problem(NamedTuple):
    """A loss, its metric, a start, the lowest value; residuals where there are any."""

    loss: Callable[[Any], Any]
    metric: Any
    start: Any
    lowest: float
    residuals: Callable[[Any], Any] | None = None


def of_residuals(residuals: Callable[[Any], Any], start: Any) -> Problem:
    """Least squares, of which 0 can be reached."""
    loss = lambda x: 0.5 * jnp.sum(residuals(x) ** 2)
    return Problem(loss, metrics.pullback(residuals), jnp.asarray(start), 0.0, residuals)


def rosenbrock() -> Problem:
    """(1 − x, 10(y − x²)) from (−1.2, 1)."""
    return of_residuals(lambda x: jnp.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)]), [-1.2, 1.0])


def powell() -> Problem:
    """Powell's singular function: the Jacobian loses two ranks at the minimum."""

    def residuals(x: Any) -> Any:
        return jnp.stack(
            [x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2]
        )

    return of_residuals(residuals, [3.0, -1.0, 0.0, 1.0])


def factorisation() -> Problem:
    """UVᵀ = M for a 12 × 8 matrix of rank 3: 60 parameters, of which 9 directions change nothing."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(12, 3)), rng.normal(size=(8, 3))
    matrix = jnp.asarray(u @ v.T)
    split = lambda x: (x[:36].reshape(12, 3), x[36:].reshape(8, 3))
    residuals = lambda x: (split(x)[0] @ split(x)[1].T - matrix).ravel()
    return of_residuals(residuals, rng.normal(size=60))


def logistic() -> Problem:
    """Logistic regression, 200 × 10, with a weak prior; features in units from 0.01 to 100."""
    rng = np.random.default_rng(1)
    units = np.logspace(-2, 2, 10)
    x = rng.normal(size=(200, 10))
    y = (rng.uniform(size=200) < 1 / (1 + np.exp(-x @ rng.normal(size=10)))).astype(float)
    batch, prior = (jnp.asarray(x * units), jnp.asarray(y)), jnp.asarray(1e-2 * units**2)
    fit = metrics.gauss_newton(lambda w, batch: batch[0] @ w, metrics.losses.sigmoid_cross_entropy(mean=False))
    metric = lambda w: operators.add(fit(w, batch=batch), operators.Diagonal(prior))
    logits = lambda w: batch[0] @ w
    loss = lambda w: jnp.sum(jax.nn.softplus(logits(w)) - batch[1] * logits(w)) + 0.5 * jnp.sum(prior * w**2)
    w = jnp.zeros(10)
    for _ in range(60):
        w = w - jnp.linalg.solve(metric(w).dense(), jax.grad(loss)(w))
    return Problem(loss, metric, jnp.asarray(3 / units), float(loss(w)))


PROBLEMS = {"Rosenbrock": rosenbrock, "Powell": powell, "factorisation": factorisation, "logistic": logistic}


def rules(problem: Problem) -> dict[str, Any]:
    """The rules in their defaults, where they have any."""
    loose, tight = precondition(), precondition(damping=1e-3)
    wrapped = {
        "trust_region, 1 nat": transforms.trust_region(loose, 1.0),
        "heavy_ball 0.5, half steps": transforms.heavy_ball(scale_step(loose, 0.5), 0.5),
        "spring 0.5": transforms.spring(tight, 0.5),
        "levenberg_marquardt": transforms.levenberg_marquardt(loose),
        "levenberg_marquardt, trace": transforms.levenberg_marquardt(precondition(damping=damping.trace(1.0))),
        "damping_grid": transforms.damping_grid(loose),
        "grid_search": transforms.grid_search(loose),
        "backtracking": transforms.backtracking(loose),
        "quadratic_step": transforms.quadratic_step(tight),
    }
    if problem.residuals is not None:
        wrapped["geodesic"] = transforms.geodesic(loose, problem.residuals)
        wrapped["levenberg_marquardt, geodesic"] = transforms.levenberg_marquardt(
            transforms.geodesic(loose, problem.residuals)
        )
    descending = lambda rule: optax.chain(with_metric(problem.metric, rule), optax.scale(-1.0))
    unit = ng.natural_gradient(1.0, problem.metric)
    return {
        "natural_gradient, 1": unit,
        "natural_gradient, 0.5": ng.natural_gradient(0.5, problem.metric),
        **{name: descending(rule) for name, rule in wrapped.items()},
        "every_k 3, unit steps": transforms.every_k(unit, 3),
        "L-BFGS (optax)": optax.lbfgs(),
    }


def steps_to(problem: Problem, tx: Any, gap: float = 1e-10) -> float:
    """Steps until the loss is within `gap` of the lowest."""

    def body(carry: Any, _: Any) -> Any:
        x, state = carry
        value, g = jax.value_and_grad(problem.loss)(x)
        updates, state = tx.update(g, state, x, value=value, grad=g, value_fn=problem.loss)
        x = optax.apply_updates(x, updates)
        return (x, state), problem.loss(x) - problem.lowest

    gaps = jax.jit(lambda x: jax.lax.scan(body, (x, tx.init(x)), None, length=STEPS)[1])(problem.start)
    done = np.flatnonzero(np.asarray(gaps) < gap)
    return float(done[0] + 1) if done.size else float("inf")


def run(fast: bool) -> list[dict[str, Any]]:
    """A row for each problem, then the PINN, then what to chain."""
    rows = []
    for name in list(PROBLEMS)[: 1 if fast else None]:
        problem = PROBLEMS[name]()
        row = {"problem": name, "p": problem.start.size}
        for rule, tx in list(rules(problem).items())[: 4 if fast else None]:
            row[rule] = steps_to(problem, tx)
        rows.append(row)
    return rows + pinn(fast) + chaining(fast)


# A PINN.


def network(params: Any, x: Any) -> Any:
    """2-32-1, tanh."""
    return params["w2"] @ jnp.tanh(params["w1"] @ x + params["b1"]) + params["b2"]


def start(seed: int) -> Any:
    """0.1·N(0, 1)."""
    shapes = {"b1": (32,), "b2": (), "w1": (32, 2), "w2": (32,)}
    keys = jax.random.split(jax.random.key(seed), 4)
    return {name: 0.1 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}


def solution(x: Any) -> Any:
    """sin πx sin πy."""
    return jnp.prod(jnp.sin(jnp.pi * x))


def laplacian(params: Any, x: Any) -> Any:
    """Δu at one point."""
    second = lambda v: jax.jvp(lambda y: jax.jvp(lambda z: network(params, z), (y,), (v,))[1], (x,), (v,))[1]
    return second(jnp.array([1.0, 0.0])) + second(jnp.array([0.0, 1.0]))


TERMS = {
    "interior": lambda p, points: jax.vmap(lambda x: laplacian(p, x) + 2 * jnp.pi**2 * solution(x))(points),
    "boundary": lambda p, points: jax.vmap(lambda x: network(p, x))(points),
}
WEIGHTS = {"interior": 1 / 784, "boundary": 1 / 116}


def points(inside: int = 28) -> Any:
    """28 × 28 inside, 29 on each side, or other numbers."""
    line, side = np.linspace(0, 1, inside + 2)[1:-1], np.linspace(0, 1, inside + 2)[:-1]
    corners = [(side, 0 * side), (0 * side + 1, side), (1 - side, 0 * side + 1), (0 * side, 1 - side)]
    square = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    return {"interior": jnp.asarray(square), "boundary": jnp.asarray(np.concatenate([np.stack(c, 1) for c in corners]))}


def pinn_loss(params: Any, batch: Any) -> Any:
    """½ mean of squares, inside and on the boundary."""
    return sum(0.5 * WEIGHTS[name] * jnp.sum(TERMS[name](params, batch[name]) ** 2) for name in TERMS)


def relative_error(params: Any) -> Any:
    """In L², on 100 × 100 points."""
    line = np.linspace(0, 1, 100)
    grid = jnp.asarray(np.stack(np.meshgrid(line, line), -1).reshape(-1, 2))
    exact = jax.vmap(solution)(grid)
    return jnp.linalg.norm(jax.vmap(lambda x: network(params, x))(grid) - exact) / jnp.linalg.norm(exact)


def pinn_rules() -> dict[str, Any]:
    """The grid of dampings and lengths, gain-ratio damping, and undamped Gauss–Newton with a line search."""
    inner = precondition(damping=damping.trace(1.0))
    lengths = 2.0 ** np.arange(3, -4, -0.5)
    return {
        "damping_grid of grid_search": transforms.damping_grid(
            transforms.grid_search(inner, lengths), 10 ** np.arange(4, -12, -0.5)
        ),
        "damping_grid": transforms.damping_grid(inner),
        "levenberg_marquardt": transforms.levenberg_marquardt(precondition()),
        "undamped, grid_search": transforms.grid_search(precondition(ng.solvers.qr())),
    }


def pinn(fast: bool) -> list[dict[str, Any]]:
    """One row for each rule: the worst of the seeds."""
    batch = points()
    metric = metrics.least_squares(TERMS, WEIGHTS)
    steps, seeds = (5, 1) if fast else (200, 8)
    rows = []
    for name, rule in pinn_rules().items():
        tx = optax.chain(with_metric(metric, rule), optax.scale(-1.0))

        def body(carry: Any, _: Any, tx: Any = tx) -> Any:
            params, state = carry
            value, g = jax.value_and_grad(pinn_loss)(params, batch)
            given = {"value": value, "grad": g, "value_fn": pinn_loss}
            updates, state = tx.update(g, state, params, batch=batch, **given)
            params = optax.apply_updates(params, updates)
            return (params, state), (value, relative_error(params), state[0].progress.stalled)

        path = jax.jit(lambda p, body=body, tx=tx: jax.lax.scan(body, (p, tx.init(p)), None, length=steps)[1])
        runs = [jax.block_until_ready(path(start(seed))) for seed in range(seeds)]
        values, errors, stalled = (np.stack([np.asarray(run[i]) for run in runs]) for i in range(3))
        rows.append({
            "problem": "PINN", "rule": name, "seeds": seeds,
            "worst error after half": float(errors[:, steps // 2 - 1].max()),
            "worst error at the end": float(errors[:, -1].max()),
            "median error at the end": float(np.median(errors[:, -1])),
            "highest last loss": float(values[:, -1].max()),
            "steps that raised the loss": int((np.diff(values, axis=1) > 0).sum()),
            "seeds that flagged a stall": int(stalled.any(axis=1).sum()),
            "seeds that end above 1e-2": int((errors[:, -1] > 1e-2).sum()),
        })  # fmt: skip
    return rows


# What to chain after a natural gradient.


def chained(metric: Any) -> dict[str, Any]:
    """One natural gradient, and things that people put behind it, or before it."""
    natural = lambda: ng.scale_by_metric(metric, damping=0.1)
    down = optax.scale(-0.3)
    inside = transforms.heavy_ball(scale_step(precondition(damping=0.1), 0.03), 0.9)
    bounded = transforms.trust_region(scale_step(precondition(damping=0.1), 0.3), 1e-2)
    return {
        "nothing": optax.chain(natural(), down),
        "a trust region inside": optax.chain(with_metric(metric, bounded), optax.scale(-1.0)),
        "momentum inside": optax.chain(with_metric(metric, inside), optax.scale(-1.0)),
        "momentum behind (trace)": optax.chain(natural(), optax.trace(0.9), optax.scale(-0.03)),
        "Adam behind": optax.chain(natural(), optax.scale_by_adam(), optax.scale(-0.03)),
        "clipping each entry behind": optax.chain(natural(), down, optax.clip(0.1)),
        "clipping each leaf behind": optax.chain(natural(), down, optax.clip_by_block_rms(0.1)),
        "clipping the norm behind": optax.chain(natural(), down, optax.clip_by_global_norm(0.1)),
        "weight decay before": optax.chain(optax.add_decayed_weights(1e-3), natural(), down),
        "weight decay behind": optax.chain(natural(), optax.add_decayed_weights(1e-3), down),
        "the gradient alone, Adam": optax.chain(optax.scale_by_adam(), optax.scale(-0.03)),
    }


def chaining(fast: bool) -> list[dict[str, Any]]:
    """Loss after 100 steps of a small regression, in natural units and with each parameter in another unit."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(100, 3))
    y = np.sin(x @ np.array([1.0, 0.5, -0.5])) + 0.1 * rng.normal(size=100)
    shapes = {"b1": (8,), "w1": (3, 8), "w2": (8,)}
    first = {name: jnp.asarray(rng.normal(size=shape) * 0.5) for name, shape in shapes.items()}
    units = {name: jnp.asarray(10.0 ** rng.uniform(-2, 2, size=shape)) for name, shape in shapes.items()}
    batch = jnp.asarray(x), jnp.asarray(y)

    def final(unit: Any, build: str) -> float:
        def residuals(scaled: Any, batch: Any) -> Any:
            p = jax.tree.map(jnp.divide, scaled, unit)
            return jnp.tanh(batch[0] @ p["w1"] + p["b1"]) @ p["w2"] - batch[1]

        loss = lambda p: 0.5 * jnp.mean(residuals(p, batch) ** 2)
        tx = chained(metrics.least_squares(residuals, 1 / 100))[build]

        def body(carry: Any, _: Any) -> Any:
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p, batch=batch)
            return (optax.apply_updates(p, updates), state), None

        p = jax.tree.map(jnp.multiply, first, unit)
        run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), None, length=5 if fast else 100)[0])
        return float(loss(run(p)[0]))

    ones = jax.tree.map(jnp.ones_like, units)
    names = list(chained(metrics.scales(1.0)))[: 2 if fast else None]
    return [
        {
            "problem": "what to chain",
            "chained": name,
            "loss": final(ones, name),
            "loss, other units": final(units, name),
        }
        for name in names
    ]
