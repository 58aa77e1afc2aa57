"""The main job: three problems with known answers, natural gradient beside gradient descent and Adam.

Prints a table, saves one picture, and fails if a figure misses its known answer.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from natgrad_jax import families, inference, metrics, problems, transforms
from natgrad_jax.inference import FitResult
from natgrad_jax.problems import Problem

ADAM_RATES = (0.001, 0.005, 0.03)
ADAM_DRAWS = 16
ISING_STEPS = 40
WITHIN = 0.1  # nats of the best ELBO: what counts as arrived


class Check(NamedTuple):
    """A figure beside its known answer."""

    name: str
    value: float
    expected: str
    passed: bool


class Curve(NamedTuple):
    """ELBO on the judge's draws, against what it cost to get there."""

    label: str
    gradients: np.ndarray
    elbo: np.ndarray
    seconds: float  # of the whole curve, compilation apart

    def arrival(self, best: float) -> tuple[float, float]:
        """Gradients and seconds at the first point within 0.1 nat of `best`; inf if there is none."""
        inside = np.flatnonzero(self.elbo >= best - WITHIN)
        if not len(inside):
            return np.inf, np.inf
        return float(self.gradients[inside[0]]), self.seconds * (inside[0] + 1) / len(self.elbo)


# Units: the same problem in metres and in centimetres.


def units_paths(steps: int = 40) -> dict[str, np.ndarray]:
    """Paths on L = ½Σ(θ_i/s_i)², both coordinates plotted in metres, with the second one measured in m or in cm."""
    paths = {}
    for unit, size in (("m", 1.0), ("cm", 0.01)):
        scale = jnp.array([1.0, 0.3 / size])
        loss = lambda theta, scale=scale: 0.5 * jnp.sum(jnp.square(theta / scale))  # noqa: E731
        start = jnp.array([1.0, 0.3 / size])
        # Gradient descent at half of its largest stable rate in these units.
        rate = float(jnp.min(scale) ** 2)
        rules = {"gradient descent": optax.sgd(rate), "metric": transforms.natural_gradient(1.0, metrics.scales(scale))}
        for name, rule in rules.items():
            paths[f"{name}, {unit}"] = np.asarray(descend(loss, rule, start, steps)[0]) * [1.0, size]
    return paths


def descend(loss: Callable[[Any], Array], rule: Any, start: Any, steps: int) -> tuple[Array, Array]:
    """The points of an optax rule from `start`, start included, and their losses: one compiled scan."""

    def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], tuple[Any, Array]]:
        theta, state = carry
        value, grad = jax.value_and_grad(loss)(theta)
        updates, state = rule.update(grad, state, theta)
        return (optax.apply_updates(theta, updates), state), (theta, value)

    run = jax.jit(lambda theta: jax.lax.scan(body, (theta, rule.init(theta)), None, length=steps + 1)[1])
    return run(start)


# Exact sums: mean-field spins on the Ising torus.


@partial(jax.jit, static_argnums=(1, 2))
def ising_losses(model: problems.Ising, steps: int, rates: tuple[float, ...]) -> dict[str, Array]:
    """KL(q‖p̃) in nats after each iteration, (rates, steps + 1), of gradient descent, Adam and natural gradient."""
    spins = families.bernoulli(16, values=(-1, 1))
    states = spins.support()
    kl = inference.exact_kl(spins.log_prob, model.log_density, states, chunk_size=1 << 14)
    fisher = metrics.fisher(spins.log_prob, states, jac="fwd", chunk_size=1 << 13)

    def losses(rule: Callable[[Any], Any], rates: tuple[float, ...]) -> Array:
        return jax.vmap(lambda rate: descend(kl, rule(rate), spins.init(0.1), steps)[1])(jnp.array(rates))

    return {
        "gradient descent": losses(optax.sgd, rates),
        "Adam": losses(optax.adam, rates),
        "natural gradient": losses(lambda rate: transforms.natural_gradient(rate, fisher), (1.0,)),
    }


def ising_curves(model: problems.Ising, steps: int, rates: tuple[float, ...]) -> dict[str, np.ndarray]:
    """KL(q‖p) in nats after each iteration, of each rule at its best rate."""
    losses = ising_losses(model, steps, rates)
    best = lambda curves: np.asarray(min(curves, key=lambda curve: float(curve[-1])))  # noqa: E731
    return {rule: best(losses[rule]) + model.log_z for rule in ("gradient descent", "Adam", "natural gradient")}


# Real data: full-rank Gaussians.


def judge(problem: Problem, draws: int = 10_000) -> Callable[[Any], np.ndarray]:
    """ELBO of every set of parameters on a leading axis, on the same fixed draws ε, x = μ + Lε."""
    eps = jax.random.normal(jax.random.key(2023), (draws, problem.d))
    family = families.gaussian_full_rank(problem.d)

    def elbo(params: Any) -> Array:
        density = lambda e: problem.log_density(params.loc + jnp.tril(params.scale_tril) @ e)  # noqa: E731
        return jnp.mean(jax.lax.map(density, eps, batch_size=1000)) + family.entropy(params)

    scan = jax.jit(lambda stack: jax.lax.map(elbo, stack))
    return lambda stack: np.asarray(scan(stack))


def natural_curve(problem: Problem, key: Array, score: Callable[[Any], np.ndarray]) -> tuple[Curve, FitResult]:
    """`fit` as it comes, its accepted point after every step judged."""
    family = families.gaussian_full_rank(problem.d)
    result, seconds = timed(lambda: inference.fit(problem.log_density, family, key, keep_path=True))
    steps = int(result.steps)
    gradients = int(result.gradients) // steps * np.arange(1, steps + 1)
    elbo = score(jax.tree.map(lambda x: x[:steps], result.path))
    return Curve("natural gradient", gradients, elbo, seconds), result


def adam_curve(problem: Problem, key: Array, score: Any, *, rate: float, steps: int, every: int = 100) -> Curve:
    """Adam on the same ELBO from N(0, I) with 16 draws a step, judged every `every` steps."""
    run = adam_path(problem, rate, steps, every)
    path, seconds = timed(lambda: run(key))
    return Curve(f"Adam {rate}", ADAM_DRAWS * every * np.arange(1, steps // every + 1), score(path), seconds)


def adam_path(problem: Problem, rate: float, steps: int, every: int) -> Callable[[Array], Any]:
    """key -> the parameters after every `every` steps of Adam, stacked."""
    family = families.gaussian_full_rank(problem.d)
    elbo = inference.elbo(family, problem.log_density, ADAM_DRAWS)
    rule, start = optax.adam(rate), family.init()

    def body(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        grad = jax.grad(lambda p: -elbo(p, key))(params)
        updates, state = rule.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    def block(carry: tuple[Any, Any], keys: Array) -> tuple[tuple[Any, Any], Any]:
        carry, _ = jax.lax.scan(body, carry, keys)
        return carry, carry[0]

    @jax.jit
    def run(key: Array) -> Any:
        keys = jax.random.split(key, (steps // every, every))
        return jax.lax.scan(block, (start, rule.init(start)), keys)[1]

    return run


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What the call returns, and its seconds: of a second call, since the first one compiles."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - begin


# The report.


def main(arguments: list[str] | None = None) -> int:
    """Runs the main job; 0 if every figure met its known answer."""
    parser = argparse.ArgumentParser(prog="python -m natgrad_jax", description=__doc__)
    parser.add_argument("--out", default="natgrad_jax_demo.png", help="where to save the picture (%(default)s)")
    parser.add_argument("--json", help="where to save the figures as JSON")
    parser.add_argument("--fast", action="store_true", help="fewer rates, steps and draws: for continuous integration")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        parser.exit(2, f"{error}. The demo draws a picture: pip install 'natgrad-jax[plot]'\n")
    with double_precision():
        figures = run(fast=options.fast)
    for line in table(figures):
        print(line)
    draw(figures, options.out)
    print(f"picture: {options.out}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1, default=lambda x: x.tolist())
        print(f"figures: {options.json}")
    missed = [check["name"] for check in figures["checks"] if not check["passed"]]
    print("every figure met its known answer" if not missed else f"missed: {', '.join(missed)}")
    return 1 if missed else 0


def double_precision() -> Any:
    """A context in which floats have 64 bits; its public name moved after JAX 0.6."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    return enable_x64(True)


def run(fast: bool) -> dict[str, Any]:
    """All figures of the main job, JSON-ready but for arrays."""
    from tqdm import tqdm

    checks: list[Check] = []
    paths = units_paths()
    split = float(np.max(np.abs(paths["gradient descent, m"] - paths["gradient descent, cm"])))
    same = float(np.max(np.abs(paths["metric, m"] - paths["metric, cm"])))
    left = float(np.max(np.abs(paths["metric, m"][1])))
    checks.append(Check("units: paths of gradient descent differ, m", split, "> 0.1", split > 0.1))
    checks.append(Check("units: paths of the metric differ, m", same, "< 1e-12", same < 1e-12))
    checks.append(Check("units: distance left after one step, m", left, "< 1e-12", left < 1e-12))

    models = problems.ising_4x4()
    rates = (0.1,) if fast else (0.03, 0.1, 0.3)
    ising: dict[str, dict[str, np.ndarray]] = {}
    for model in tqdm(models[2:] if fast else models, desc="Ising", leave=False):
        curves = ising_curves(model, ISING_STEPS, rates)
        ising[f"{model.beta:g}"] = curves
        elbo = model.log_z - float(curves["natural gradient"][-1])
        name = f"Ising β = {model.beta:g}: ELBO, nats"
        checks.append(Check(name, elbo, f"{model.best} ± 1e-6", abs(elbo - model.best) < 1e-6))

    targets = {
        "eight schools": problems.eight_schools(),
        "breast cancer": problems.breast_cancer(),
        "breast cancer, raw units": problems.breast_cancer("raw"),
        "breast cancer, raw, uncentred": problems.breast_cancer("uncentred"),
    }
    steps = 1000 if fast else 4000
    adam_rates = (0.03,) if fast else ADAM_RATES
    fits: dict[str, Any] = {}
    bar = tqdm(total=len(targets) * (1 + len(adam_rates)), desc="real data", leave=False)
    for name, problem in targets.items():
        score = judge(problem, 2000 if fast else 10_000)
        natural, result = natural_curve(problem, jax.random.key(0), score)
        bar.update()
        adam = []
        for rate in adam_rates:
            adam.append(adam_curve(problem, jax.random.key(1), score, rate=rate, steps=steps))
            bar.update()
        final = float(score(jax.tree.map(lambda x: x[None], result.params))[0])
        # 2,000 draws place the ELBO to about 0.03 nat, 10,000 to 0.015.
        low = problem.best - WITHIN - (0.03 if fast else 0.0)
        checks.append(Check(f"{name}: ELBO, nats", final, f"≥ {low:.3f}", final >= low))
        checks.append(Check(f"{name}: status", int(result.status), "0", int(result.status) == 0))
        fits[name] = {
            "best": problem.best,
            "final": final,
            "steps": int(result.steps),
            "hessian_products": int(result.hessian_products),
            "history": np.asarray(result.elbo),
            "curves": [curve._asdict() for curve in (natural, *adam)],
            "arrivals": {curve.label: curve.arrival(problem.best) for curve in (natural, *adam)},
        }
    bar.close()
    pair = [fits[name]["history"] for name in ("breast cancer", "breast cancer, raw units")]
    apart = float(np.nanmax(np.abs(pair[0] - pair[1])))
    checks.append(Check("breast cancer: ELBO curves apart, raw against standardised", apart, "< 1e-8", apart < 1e-8))
    return {"paths": paths, "ising": ising, "fits": fits, "checks": [check._asdict() for check in checks]}


def table(figures: dict[str, Any]) -> Iterable[str]:
    """The closing table, line by line."""
    title = "to within 0.1 nat of the best ELBO"
    yield f"\n{title:34s} {'rule':18s} {'gradients':>10s} {'seconds':>9s} {'ELBO at end':>12s}"
    for name, fit in figures["fits"].items():
        for curve in fit["curves"]:
            gradients, seconds = fit["arrivals"][curve["label"]]
            reached = f"{gradients:10.0f} {seconds:9.4f}" if np.isfinite(gradients) else f"{'never':>10s} {'-':>9s}"
            yield f"{name:34s} {curve['label']:18s} {reached} {curve['elbo'][-1]:12.3f}"
        note = f"{fit['steps']} steps in all, and {fit['hessian_products']} Hessian products for the start"
        yield f"{'':34s} {'natural gradient':18s} {note}"
    yield ""
    for beta, curves in figures["ising"].items():
        ends = ", ".join(f"{label} {curve[-1]:.8f}" for label, curve in curves.items())
        yield f"Ising β = {beta}: KL(q‖p) after {ISING_STEPS} iterations: {ends} nats"
    yield ""
    for check in figures["checks"]:
        mark = "ok    " if check["passed"] else "MISSED"
        yield f"{mark} {check['name']}: {check['value']:.9g} (expected {check['expected']})"


def draw(figures: dict[str, Any], path: str) -> None:
    """One picture: two paths and one, Ising, and ELBO gap against gradients on real data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), constrained_layout=True)
    _draw_units(axes[0, 0], figures["paths"])
    _draw_ising(axes[0, 1], figures["ising"])
    _draw_fits(axes[1, 0], figures["fits"], ("eight schools",))
    _draw_fits(axes[1, 1], figures["fits"], ("breast cancer", "breast cancer, raw units"))
    figure.savefig(path, dpi=130)
    plt.close(figure)


COLOURS = {"gradient descent": "tab:orange", "Adam": "tab:green", "natural gradient": "tab:blue", "metric": "tab:blue"}


def _draw_units(axis: Any, paths: dict[str, np.ndarray]) -> None:
    x, y = np.meshgrid(np.linspace(-0.1, 1.1, 200), np.linspace(-0.05, 0.35, 200))
    axis.contour(x, y, x**2 + (y / 0.3) ** 2, levels=8, colors="0.85")
    for label, points in paths.items():
        name, unit = label.split(", ")
        style = "o-" if unit == "m" else "x--"
        width = 7 if unit == "m" else 5
        axis.plot(*points.T, style, color=COLOURS[name], ms=width, mfc="none", label=f"{name}, θ₂ in {unit}")
    axis.set(title="Units: two paths and one", xlabel="θ₁, metres", ylabel="θ₂, metres")
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(0.84, 0.13))


def _draw_ising(axis: Any, ising: dict[str, dict[str, np.ndarray]]) -> None:
    first_and_last = list(ising.items())[:: max(len(ising) - 1, 1)]
    for style, (beta, curves) in zip(("-", "--"), first_and_last, strict=False):
        for label, curve in curves.items():
            excess = np.maximum(curve - min(float(np.min(c)) for c in curves.values()), 1e-13)
            axis.semilogy(excess, style, color=COLOURS[label], label=f"{label}, β = {beta}")
    axis.set(title="Exact sums: mean-field Ising, 2¹⁶ states", xlabel="iteration", ylabel="KL − best KL, nats")
    axis.legend(fontsize=7)


def _draw_fits(axis: Any, fits: dict[str, Any], names: tuple[str, ...]) -> None:
    for style, name in zip(("-", "--"), names, strict=False):
        for curve, alpha in zip(fits[name]["curves"], (1, 0.4, 0.7, 1), strict=False):
            gap = np.maximum(fits[name]["best"] - curve["elbo"], 1e-3)
            colour = COLOURS[curve["label"].split(" ")[0]] if "Adam" in curve["label"] else COLOURS[curve["label"]]
            unit = ", raw units" if "raw" in name else ""
            axis.loglog(curve["gradients"], gap, style, color=colour, alpha=alpha, label=curve["label"] + unit)
    axis.axhline(WITHIN, color="0.7", lw=0.8)
    axis.set(title=f"Real data: {names[0]}", xlabel="gradients of the log-density", ylabel="best ELBO − ELBO, nats")
    axis.legend(fontsize=7)
