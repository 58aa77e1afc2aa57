"""fit with its defaults against Adam at its best learning rate, to within 0.1 nat of the best ELBO.

Gradients are those of the log-density; ELBOs are judged on 10,000 fixed draws. The time to arrive is that of a whole
run times the share of its steps up to the arrival, both rules interleaved.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import natgrad_jax as ng
from benchmarks.timing import interleaved, seconds
from natgrad_jax.demo import ADAM_RATES, WITHIN, adam_curve, adam_path, judge, natural_curve
from natgrad_jax.problems import Problem

ADAM_STEPS = 4000
EVERY = 20


def run(fast: bool) -> list[dict[str, Any]]:
    """Rows: arrival on two data sets, units, 256 problems in one call, and draws of a mean field."""
    schools, cancer = ng.problems.eight_schools(), ng.problems.breast_cancer()
    return [
        arrival("breast cancer", cancer, seeds=2 if fast else 5, fast=fast),
        arrival("eight schools", schools, seeds=2 if fast else 21, fast=fast),
        units(fast),
        copies(schools, 8 if fast else 256),
        *(mean_field(d, fast) for d in ((40,) if fast else (50, 200, 500))),
    ]


def arrival(name: str, problem: Problem, seeds: int, fast: bool) -> dict[str, Any]:
    """Median over seeds of steps and gradients of fit to within 0.1 nat; time against Adam at its best rate."""
    score = judge(problem, 2000 if fast else 10_000)
    keys = jax.random.split(jax.random.key(0), seeds)
    family = ng.families.gaussian_full_rank(problem.d)
    fit = lambda: ng.fit(problem.log_density, family, keys[0], keep_path=True)
    first = seconds(fit)
    curves = [natural_curve(problem, key, score) for key in keys]
    gradients = [curve.arrival(problem.best)[0] for curve, _ in curves]
    per_step = curves[0][0].gradients[0]
    final = [float(score(jax.tree.map(lambda x: x[None], result.params))[0]) for _, result in curves]
    row: dict[str, Any] = {
        "problem": name,
        "steps to 0.1 nat": float(np.median(gradients)) / float(per_step),
        "gradients to 0.1 nat": float(np.median(gradients)),
        "Hessian products": int(curves[0][1].hessian_products),
        "gradients in all": float(np.median([int(result.gradients) for _, result in curves])),
        "ELBO at the end": float(np.median(final)),
        "lowest ELBO at the end": min(final),
    }
    steps = 200 if fast else ADAM_STEPS
    adams = {
        rate: adam_curve(problem, keys[0], score, rate=rate, steps=steps, every=EVERY)
        for rate in (ADAM_RATES[-1:] if fast else ADAM_RATES)
    }
    arrived = {rate: curve.arrival(problem.best)[0] for rate, curve in adams.items()}
    best = min(arrived, key=arrived.__getitem__)
    row |= {"Adam's best rate": best, "gradients of Adam": arrived[best]}
    path = adam_path(problem, best, steps, EVERY)
    times = interleaved({"fit": fit, "Adam": lambda: path(keys[0])}, repeats=1 if fast else 9)
    shares = {
        "fit": gradients[0] / int(curves[0][1].gradients),
        "Adam": arrived[best] / adams[best].gradients[-1],
    }
    for rule, share in shares.items():
        row |= {f"{rule}: {what} seconds": times[rule][what] * share for what in ("min", "median")}
    for what in ("min", "median"):
        row[f"Adam / fit, {what}"] = row[f"Adam: {what} seconds"] / row[f"fit: {what} seconds"]
    return row | {"fit: seconds of the first call": first}


def units(fast: bool) -> dict[str, Any]:
    """The same posterior in three systems of coordinates."""
    histories, finals = [], []
    for name in ("standardised", "raw", "uncentred"):
        problem = ng.problems.breast_cancer(name)
        result = ng.fit(problem.log_density, ng.families.gaussian_full_rank(31), jax.random.key(0))
        histories.append(np.asarray(result.elbo))
        score = judge(problem, 2000 if fast else 10_000)
        finals.append(float(score(jax.tree.map(lambda x: x[None], result.params))[0]))
    return {
        "problem": "breast cancer, units",
        "ELBO curves apart, raw against standardised": float(np.nanmax(np.abs(histories[0] - histories[1]))),
        "ELBO standardised": finals[0],
        "ELBO raw": finals[1],
        "ELBO raw, uncentred": finals[2],
    }


def copies(problem: Problem, lanes: int) -> dict[str, Any]:
    """Many seeds of one problem in one vmapped call, against a loop of the compiled single fit."""
    family = ng.families.gaussian_full_rank(problem.d)
    single = lambda key: ng.fit(problem.log_density, family, key)
    together, alone = jax.jit(jax.vmap(single)), jax.jit(single)
    keys = jax.random.split(jax.random.key(1), lanes)
    each = list(keys)
    loop = lambda: [jax.block_until_ready(alone(key)) for key in each]
    times = interleaved({"one call": lambda: together(keys), "loop": loop}, repeats=3)
    result = together(keys)
    gaps = problem.best - judge(problem)(result.params)
    row: dict[str, Any] = {
        "problem": f"eight schools, {lanes} copies in one call",
        "within 0.1 nat": float(np.mean(gaps < WITHIN)),
        "within 0.3 nat": float(np.mean(gaps < 0.3)),
        "largest gap": float(np.max(gaps)),
        "converged": float(np.mean(np.asarray(result.converged))),
        "gradients, median": float(np.median(result.gradients)),
        "gradients, most": int(np.max(result.gradients)),
        "seconds, min": times["one call"]["min"],
        "seconds, median": times["one call"]["median"],
        "seconds of the first call": times["one call"]["first"],
    }
    for what in ("min", "median"):
        row[f"loop: seconds, {what}"] = times["loop"][what]
        row[f"loop / one call, {what}"] = times["loop"][what] / times["one call"][what]
    return row


def mean_field(d: int, fast: bool) -> dict[str, Any]:
    """64 antithetic draws against 2d orthogonal ones, on a chain of d Gaussians, each tied to its neighbours."""
    precision = jnp.eye(d) - 0.45 * (jnp.eye(d, k=1) + jnp.eye(d, k=-1))
    mean = jnp.linspace(-3, 3, d)

    def gap(params: Any) -> Any:
        """KL(q‖p) above the least that a mean field can have, nats."""
        e, scale = params.loc - mean, jnp.exp(params.log_scale)
        return 0.5 * (jnp.sum(scale**2) + e @ precision @ e - d) - jnp.sum(params.log_scale)

    log_density, family = lambda x: -0.5 * (x - mean) @ precision @ (x - mean), ng.families.gaussian_mean_field(d)
    draws = {"antithetic": ng.inference.antithetic(64), "orthogonal": ng.inference.orthogonal(60)}
    calls: dict[str, Any] = {
        name: partial(
            ng.fit, log_density, family, jax.random.key(0), estimator=ng.inference.stl(points), keep_path=True
        )
        for name, points in draws.items()
    }
    times = interleaved(calls, repeats=1 if fast else 5)
    row: dict[str, Any] = {"problem": f"mean field, d = {d}"}
    for name, call in calls.items():
        result = call()
        steps = int(result.steps)
        near = np.flatnonzero(np.asarray(jax.vmap(gap)(result.path))[:steps] < 1)
        per_step = int(result.gradients) // steps
        row |= {
            f"{name}: gradients to 1 nat": (int(near[0]) + 1) * per_step if near.size else float("inf"),
            f"{name}: gradients in all": int(result.gradients),
            f"{name}: status": ng.inference.Status(int(result.status)).name,
            f"{name}: gap at the end": float(gap(result.params)),
            f"{name}: ms a step, min": 1e3 * times[name]["min"] / steps,
        }
    return row
