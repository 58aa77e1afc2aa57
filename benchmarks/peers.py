"""fit with its defaults against Adam in blackjax and numpyro, on every target, by one judge.

Full-rank Gaussians, one seed, float64 but for one row. A package runs its own loop for 4000 steps of Adam, 16 draws a
step, at the best of four rates, from its own start at 0. ELBOs are judged on the same 10,000 fixed draws; where the
exact KL is known it is taken instead. A gap is to the best value: the known one, else the highest that any of them
reached, a fit with tol=1e-4 and 1000 steps included. Seconds of fit are those of a whole run, of the others those of a
run times the share of its steps to within 0.1 nat (looked for every 50 steps), all interleaved and without compilation:
the ratio stands against fit, which goes on until it knows that it has arrived. "fit: to 0.1 nat" is like for like.
Also here: 20 halves of the breast-cancer data, separable data under a prior that is all but flat, and 1000 problems in
one call against a loop.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import natgrad_jax as ng
from benchmarks.adapters import ADAM_RATES, DRAWS, POINTS, adam_path, through_blackjax, through_numpyro
from benchmarks.inference import copies
from benchmarks.posteriors import Split, Target, banana, funnel, logistic, logistic_half_splits, posteriors
from benchmarks.timing import interleaved
from natgrad_jax.demo import WITHIN, judge
from natgrad_jax.families import FullRankParams
from natgrad_jax.inference import FitResult, Status
from natgrad_jax.problems import Problem

ADAM_STEPS = 4000
KILPISJARVI = -103.264  # highest ELBO that a full-rank Gaussian is known to reach, nats
# The points of a path at which the rates are compared, nearly a fifth apart; the best rate is judged at all of them.
COARSE = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 29, 35, 42, 51, 63, POINTS]) - 1
PACKAGES = {"blackjax": through_blackjax, "numpyro": through_numpyro}

Score = Callable[[FullRankParams], np.ndarray]


class Case(NamedTuple):
    """A target and its judge.

    Attributes:
        problem: `best` is NaN where nobody knows it.
        score: ELBO of every set of parameters on a leading axis, nats.
    """

    problem: Problem
    score: Score


class Peer(NamedTuple):
    """Adam in a package, at one rate.

    Attributes:
        rate: of Adam.
        steps: of a run.
        run: all of them.
        elbos: at POINTS steps, evenly apart, nats.
    """

    rate: float
    steps: int
    run: Callable[[], Any]
    elbos: np.ndarray


def run(fast: bool) -> list[dict[str, Any]]:
    """Rows: every target, then float32, half-splits, separable data, and many problems in one call."""
    rows = [compared(name, case, fast) for name, case in cases(fast).items()]
    if fast:  # separable data in the shape of the halves: nothing to compile; copies are run by `inference`
        return [*rows, half_splits(fast), separable(features=30, sets=2, size=284)]
    rows += [single_precision(), half_splits(fast)]
    rows += [separable(features, sets=20, size=100) for features in (2, 3, 4, 5)]
    return [*rows, copies(ng.problems.eight_schools(), 1000)]


# One table over all targets.


def cases(fast: bool) -> dict[str, Case]:
    """Targets by name; one in fast mode."""
    if fast:
        problem = of_posterior("kidscore_momhs")
        return {"kidscore_momhs": Case(problem, judge(problem, 2000))}
    problems = {
        "breast cancer": ng.problems.breast_cancer(),
        "breast cancer, raw units": ng.problems.breast_cancer("raw"),
        "eight schools": ng.problems.eight_schools(),
        **{name: of_posterior(name) for name in posteriors()},
    }
    exact = {"funnel(1)": funnel(1), "funnel(9)": funnel(9), "banana": banana()}
    judged = {name: Case(problem, judge(problem)) for name, problem in problems.items()}
    return judged | {name: exactly(target) for name, target in exact.items()}


def of_posterior(name: str) -> Problem:
    """One of `posteriors()`, with its best ELBO where that is known."""
    posterior = posteriors()[name]
    return Problem(posterior.log_density, posterior.d, KILPISJARVI if name == "kilpisjarvi" else np.nan)


def exactly(target: Target) -> Case:
    """A target whose log Z is 0 and whose KL is exact: the ELBO is −KL."""
    kl = jax.jit(jax.vmap(target.kl))
    return Case(Problem(target.log_density, target.d, -target.best), lambda stack: -np.asarray(kl(stack)))


def compared(name: str, case: Case, fast: bool) -> dict[str, Any]:
    """One row: fit, and each package at its best rate."""
    problem, score = case
    fit = partial(fitted, problem, keep_path=True)
    result, longer = fit(), fit(**long(fast))
    ends, path = stacked([result.params, longer.params]), jax.tree.map(lambda x: x[: result.steps], result.path)
    end, longer_end, *curve = score(joined([ends, path]))
    reached = highest(problem.best, [end, longer_end, *curve])
    peers = {package: at_best_rate(through, case, reached, fast) for package, through in PACKAGES.items()}
    best = highest(problem.best, [reached], *(peer.elbos for peer in peers.values()))
    share = arrival(best - np.array(curve))

    calls = {"fit": fit} | {package: peer.run for package, peer in peers.items() if arrival(best - peer.elbos) <= 1}
    times = interleaved(calls, repeats=1 if fast else 3)
    row = {"target": name, "d": problem.d, "best": best, **ours(result, best - end)}
    row |= {"longer fit: gap, nats": best - longer_end, "fit: to 0.1 nat, steps": share * int(result.steps)}
    for what in ("min", "median"):
        row |= {f"fit: seconds, {what}": times["fit"][what]}
        row |= {f"fit: to 0.1 nat, seconds, {what}": times["fit"][what] * share}
    for package, peer in peers.items():
        row |= theirs(package, peer, best, times)
    return row


def fitted(problem: Problem, **options: Any) -> FitResult:
    """fit with its defaults but for these options."""
    return ng.fit(problem.log_density, ng.families.gaussian_full_rank(problem.d), jax.random.key(0), **options)


def at_best_rate(through: Any, case: Case, best: float, fast: bool) -> Peer:
    """Adam in a package, at the rate that is first within 0.1 nat of `best`, or ends nearest."""
    steps, key = POINTS if fast else ADAM_STEPS, jax.random.key(0)
    adam = adam_path(through, case.problem, steps)
    paths = [adam(key, rate) for rate in ADAM_RATES]
    coarse = case.score(joined([jax.tree.map(lambda leaf: leaf[COARSE], path) for path in paths]))
    chosen = earliest(best - coarse.reshape(len(paths), -1))
    return Peer(ADAM_RATES[chosen], steps, partial(adam, key, ADAM_RATES[chosen]), case.score(paths[chosen]))


def long(fast: bool) -> dict[str, Any]:
    """Options of the longer fit."""
    return {"tol": 1e-4, "max_steps": 200 if fast else 1000}


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of one structure on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def joined(trees: Sequence[Any]) -> Any:
    """Trees of one structure, one behind the other on their leading axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def highest(known: float, *elbos: Any) -> float:
    """The known best, else the highest finite value."""
    if np.isfinite(known):
        return known
    values = np.concatenate([np.ravel(curve) for curve in elbos])
    return float(np.max(values[np.isfinite(values)]))


def arrival(gaps: np.ndarray) -> float:
    """The share of a run up to the first point within 0.1 nat; inf if there is none."""
    inside = np.flatnonzero(gaps < WITHIN)
    return (inside[0] + 1) / len(gaps) if len(inside) else np.inf


def earliest(gaps: np.ndarray) -> int:
    """Index of the curve that arrives first, or of the one that ends nearest if none arrives."""
    ends = np.nan_to_num(gaps[:, -1], nan=np.inf)
    return min(range(len(gaps)), key=lambda i: (arrival(gaps[i]), ends[i]))


def ours(result: FitResult, gap: float) -> dict[str, Any]:
    """The columns of fit but for its times."""
    return {
        "fit: status": Status(int(result.status)).name,
        "fit: steps": int(result.steps),
        "fit: gradients": int(result.gradients),
        "fit: Hessian products": int(result.hessian_products),
        "fit: gap, nats": gap,
    }


def theirs(package: str, peer: Peer, best: float, times: dict[str, Any]) -> dict[str, Any]:
    """The columns of a package at its best rate: cost to within 0.1 nat, the gap at the end, and time over fit's."""
    share, gap = arrival(best - peer.elbos), best - float(peer.elbos[-1])
    row: dict[str, Any] = {"rate": peer.rate, "steps": share * peer.steps, "gradients": share * peer.steps * DRAWS}
    row |= {"gap, nats": gap if np.isfinite(gap) else None}
    row = {f"{package}: {name}": value for name, value in row.items()}
    for what in ("min", "median"):
        spent = share * times[package][what] if package in times else np.inf
        row |= {f"{package}: seconds, {what}": spent, f"{package} / fit, {what}": spent / times["fit"][what]}
    return row


def single_precision() -> dict[str, Any]:
    """fit on kilpisjarvi, raw years, in float32, judged in float64."""
    problem = of_posterior("kilpisjarvi")
    with float32():
        result = fitted(problem)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64)[None], result.params)
    gap = KILPISJARVI - float(judge(problem)(params)[0])
    row = {"target": "kilpisjarvi, float32", "d": problem.d, "best": KILPISJARVI}
    return row | ours(result, gap) | {"fit: within 0.1 nat": abs(gap) < WITHIN}


def float32() -> Any:
    """A context in which floats have 32 bits; its public name moved after JAX 0.6."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    return enable_x64(False)


# Many data sets of one shape: all in one call.


def fits(data: dict[str, Any], **options: Any) -> FitResult:
    """fit to logistic regressions on a leading axis of the data, each with its own key."""
    family = ng.families.gaussian_full_rank(data["signed"].shape[-1])
    keys = jax.random.split(jax.random.key(0), len(data["signed"]))
    return jax.vmap(lambda key, data: ng.fit(logistic, family, key, data=data, **options))(keys, data)


def half_splits(fast: bool) -> dict[str, Any]:
    """Halves of the breast-cancer data: fit, a longer fit, and a natural-gradient step of constant length 1."""
    splits = logistic_half_splits(seed=0, splits=2 if fast else 20)
    data = stacked([split.data for split in splits])
    result, longer = fits(data), fits(data, **long(fast))
    steps = 3 if fast else 40
    constant = jax.jit(jax.vmap(partial(unguarded, steps=steps)))(data)
    elbos = elbos_of(splits, [result.params, longer.params, constant], 2000 if fast else 10_000)
    gaps, gaps_constant = elbos[:, 1] - elbos[:, 0], elbos[:, 1] - elbos[:, 2]
    return {
        "target": f"{len(splits)} half-splits of breast cancer",
        "converged": int(np.sum(result.converged)),
        "within 0.1 nat of a longer fit": int(np.sum(gaps < WITHIN)),
        "largest gap": float(np.max(gaps)),
        "steps, median": float(np.median(result.steps)),
        "steps, most": int(np.max(result.steps)),
        "longer fit: converged": int(np.sum(longer.converged)),
        f"constant step of 1, {steps} steps: within 0.1 nat": int(np.sum(gaps_constant < WITHIN)),
        f"constant step of 1, {steps} steps: not finite": int(np.sum(~np.isfinite(gaps_constant))),
        f"constant step of 1, {steps} steps: gap, median": float(np.median(np.nan_to_num(gaps_constant, nan=np.inf))),
    }


def elbos_of(splits: Sequence[Split], fitted: Sequence[FullRankParams], draws: int) -> np.ndarray:
    """ELBO on the judge's draws of each split under each way of fitting, (splits, ways)."""
    of_split = lambda i: stacked([jax.tree.map(lambda leaf: leaf[i], params) for params in fitted])
    score = lambda split: judge(Problem(split.log_density, split.d, np.nan), draws)
    return np.stack([score(split)(of_split(i)) for i, split in enumerate(splits)])


def unguarded(data: dict[str, Array], steps: int) -> FullRankParams:
    """Natural-gradient steps of length 1 in natural parameters from N(0, I): nothing shortens or takes back a step.

    Precision ← −E ∇²log p̃, mean ← mean + precision⁻¹ E ∇log p̃, 62 draws a step: variational Newton.
    """
    d = data["signed"].shape[-1]
    log_density = partial(logistic, data=data)

    def step(params: FullRankParams, key: Array) -> tuple[FullRankParams, None]:
        draws = params.loc + jax.random.normal(key, (62, d)) @ params.scale_tril.T
        precision = -jnp.mean(jax.lax.map(jax.hessian(log_density), draws), 0)
        covariance = jnp.linalg.inv(precision)
        loc = params.loc + covariance @ jnp.mean(jax.vmap(jax.grad(log_density))(draws), 0)
        return FullRankParams(loc, jnp.linalg.cholesky(covariance)), None

    start = FullRankParams(jnp.zeros(d), jnp.eye(d))
    return jax.lax.scan(step, start, jax.random.split(jax.random.key(0), steps))[0]


def separable(features: int, sets: int, size: int) -> dict[str, Any]:
    """Data that a plane separates, every precision 1e-5: how fit ends, and whether all of it is finite."""
    result = fits(separable_data(features, sets, size))
    names = [Status(int(status)).name for status in result.status]
    inside = np.arange(result.elbo.shape[1]) < np.asarray(result.steps)[:, None]
    values = [*jax.tree.leaves(result.params), result.final_elbo, result.final_error, result.natural_norm]
    return {
        "target": f"{sets} separable data sets, {features} features, precision 1e-5",
        **{name: names.count(name) for name in Status.__members__},
        "finite": bool(all(np.isfinite(x).all() for x in [*values, np.asarray(result.elbo)[inside]])),
        "steps, most": int(np.max(result.steps)),
        "evaluations not finite": int(np.sum(result.skipped)),
        "khat, median": float(np.median(result.khat)),
    }


def separable_data(features: int, sets: int, size: int) -> dict[str, Any]:
    """`logistic`'s data: rows of N(0, I), labelled by the side of a random plane."""
    rng = np.random.default_rng(features)
    design = np.concatenate([np.ones((sets, size, 1)), rng.normal(size=(sets, size, features))], axis=2)
    plane = rng.normal(size=(sets, features + 1, 1))
    return {"signed": np.sign(design @ plane) * design, "precision": np.full((sets, features + 1), 1e-5)}
