"""fit in float64 on 16 posteriors of posteriordb in raw units: the error of means and deviations, in deviations.

The log-densities are the Stan programs' own, on an unconstrained vector: exp for what is positive, sigmoid for a share,
the first place and log gaps for what is ordered. Also here: a funnel and a banana, whose best Gaussian is known, and
halves of the breast-cancer data.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import betaln, gammaln
from jax.scipy.stats import cauchy, gamma, norm

import natgrad_jax as ng
from natgrad_jax.demo import double_precision
from natgrad_jax.families import FullRankParams

DATA = Path(__file__).parent / "data" / "posteriors.json"
DRAWS = 20_000
LOG_2 = float(np.log(2.0))
FAST = ("kidscore_momhs", "gp_regr", "eight_schools_noncentered")

LogDensity = Callable[[Array], Array]


class Posterior(NamedTuple):
    """A target with moments of reference draws.

    Attributes:
        log_density: log p̃(u) for one unconstrained u of shape (d,), nats.
        d: dimension of u.
        quantities: u -> (k,), what the moments are of, in the units of the Stan program.
        names: of the quantities.
        mean: of the reference draws, (k,).
        sd: of the reference draws, (k,).
    """

    log_density: LogDensity
    d: int
    quantities: Callable[[Array], Array]
    names: Sequence[str]
    mean: np.ndarray
    sd: np.ndarray


class Target(NamedTuple):
    """A normalised density whose best full-rank Gaussian is known.

    Attributes:
        log_density: log p(x) for one x of shape (d,), nats.
        d: dimension.
        best: least KL(q‖p) of a full-rank Gaussian q, nats.
        kl: KL(q‖p) of the Gaussian with these parameters, exact, nats.
    """

    log_density: LogDensity
    d: int
    best: float
    kl: Callable[[FullRankParams], Array]


class Split(NamedTuple):
    """One half to learn from, the other to judge by.

    Attributes:
        log_density: log p̃(w) of the first half for one w = (bias, 30 coefficients), nats.
        d: 31.
        data: of `logistic`, that log_density comes from.
        held_out: w -> log-likelihood of each cell of the other half, nats.
    """

    log_density: LogDensity
    d: int
    data: dict[str, np.ndarray]
    held_out: Callable[[Array], Array]


Model = tuple[LogDensity, int, Callable[[Array], Array]]


def run(fast: bool) -> list[dict[str, Any]]:
    """Rows: each posterior with each seed, then the funnel and the banana."""
    rows = report(seeds=1, names=FAST) if fast else report()
    targets = {"funnel(1)": funnel(1), "banana": banana()} | ({} if fast else {"funnel(9)": funnel(9)})
    return rows + [excess(name, target, seed) for name, target in targets.items() for seed in range(1 if fast else 3)]


def report(
    tol: float = 0.001, seeds: int = 3, names: Sequence[str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Rows: `ng.fit` to each posterior (or to the named ones) from each seed, in float64."""
    with double_precision():
        chosen = posteriors()
        chosen = chosen if names is None else {name: chosen[name] for name in names}
        return [row for name, target in chosen.items() for row in fits(name, target, seeds, tol=tol, **options)]


def fits(name: str, target: Posterior, seeds: int, **options: Any) -> list[dict[str, Any]]:
    """One posterior: how each fit ended, and the worst of its moments over the quantities."""
    family = ng.families.gaussian_full_rank(target.d)

    @jax.jit
    def errors(params: FullRankParams) -> tuple[Array, Array]:
        draws = jax.vmap(target.quantities)(family.sample(params, jax.random.key(2023), DRAWS))
        shift = jnp.max(jnp.abs(jnp.mean(draws, 0) - target.mean) / target.sd)
        return shift, jnp.max(jnp.abs(jnp.std(draws, 0, ddof=1) / target.sd - 1))

    def row(seed: int) -> dict[str, Any]:
        result = ng.fit(target.log_density, family, jax.random.key(seed), **options)
        shift, stretch = errors(result.params)
        worst = {"worst |mean - reference| / sd": float(shift), "worst |sd / reference - 1|": float(stretch)}
        return {"posterior": name, "d": target.d, "seed": seed, **ending(result), **worst}

    return [row(seed) for seed in range(seeds)]


def excess(name: str, target: Target, seed: int, **options: Any) -> dict[str, Any]:
    """One target: how the fit ended, and its exact KL above the least that a Gaussian has."""
    result = ng.fit(target.log_density, ng.families.gaussian_full_rank(target.d), jax.random.key(seed), **options)
    gap = float(target.kl(result.params)) - target.best
    return {"target": name, "d": target.d, "seed": seed, **ending(result), "KL above the least, nats": gap}


def ending(result: Any) -> dict[str, Any]:
    """What a fit says of itself."""
    khat = getattr(result, "khat", None)
    return {
        "status": ng.inference.Status(int(result.status)).name,
        "steps": int(result.steps),
        "gradients": int(result.gradients),
        "final_elbo": float(result.final_elbo),
        "natural_norm": float(result.natural_norm),
        "khat": None if khat is None else float(khat),
    }


def posteriors() -> dict[str, Posterior]:
    """The 16 posteriors by the names of their Stan programs.

    Example:
        >>> import jax.numpy as jnp
        >>> from benchmarks.posteriors import posteriors
        >>> target = posteriors()["kidscore_momiq"]
        >>> target.names, target.quantities(jnp.zeros(3)).tolist()
        (['beta[1]', 'beta[2]', 'sigma'], [0.0, 0.0, 1.0])
    """
    stored = json.loads(DATA.read_text())
    data = {name: {key: np.asarray(value) for key, value in table.items()} for name, table in stored["data"].items()}
    models = {
        **earnings(data["earnings"]),
        **kidiq(data["kidiq"]),
        "arK": autoregression(data["arK"]),
        "kilpisjarvi": kilpisjarvi(data["kilpisjarvi_mod"]),
        "blr": blr(data["sblri"]),
        "eight_schools_noncentered": eight_schools(data["eight_schools"]),
        "gp_regr": gp_regression(data["gp_pois_regr"]),
        "gp_pois_regr": gp_poisson(data["gp_pois_regr"]),
        "low_dim_gauss_mix": mixture(data["low_dim_gauss_mix"]),
    }
    moments = {name.split("-")[1]: value for name, value in stored["moments"].items()}
    return {
        name: Posterior(*models[name], value["names"], np.array(value["mean"]), np.array(value["sd"]))
        for name, value in moments.items()
    }


# Linear regressions: u = (β, log σ).


def regression(
    columns: Sequence[Any], response: np.ndarray, log_prior: Callable[[Array, Array], Array | float] = lambda *_: 0.0
) -> Model:
    """response ~ N(Σ β_j column_j, σ), with log_prior(β, σ); flat on β and on σ > 0 unless given."""
    design = np.stack(np.broadcast_arrays(*columns), axis=1).astype(float)

    def log_density(u: Array) -> Array:
        beta, sigma = u[:-1], jnp.exp(u[-1])
        residual = jnp.asarray(response, u.dtype) - jnp.asarray(design, u.dtype) @ beta
        return jnp.sum(norm.logpdf(residual, 0, sigma)) + log_prior(beta, sigma) + u[-1]

    return log_density, design.shape[1] + 1, lambda u: jnp.append(u[:-1], jnp.exp(u[-1]))


def half_cauchy(x: Array, scale: float) -> Array:
    """Log-density for x > 0."""
    return cauchy.logpdf(x, 0, scale) + LOG_2


def half_normal(x: Array, scale: float) -> Array:
    """Log-density for x > 0."""
    return norm.logpdf(x, 0, scale) + LOG_2


def earnings(data: dict[str, np.ndarray]) -> dict[str, Model]:
    """Earnings by height, in inches, and sex: raw numbers, so that β is correlated up to 0.9999."""
    earn, height, male = data["earn"], data["height"], data["male"]
    z = (height - height.mean()) / height.std(ddof=1)
    return {
        "earn_height": regression([1, height], earn),
        "log10earn_height": regression([1, height], np.log10(earn)),
        "logearn_height": regression([1, height], np.log(earn)),
        "logearn_height_male": regression([1, height, male], np.log(earn)),
        "logearn_logheight_male": regression([1, np.log(height), male], np.log(earn)),
        "logearn_interaction_z": regression([1, z, male, z * male], np.log(earn)),
    }


def kidiq(data: dict[str, np.ndarray]) -> dict[str, Model]:
    """Scores of children by their mothers' schooling and IQ; σ ~ half-Cauchy(2.5)."""
    scored = partial(regression, response=data["kid_score"], log_prior=lambda _, sigma: half_cauchy(sigma, 2.5))
    return {
        "kidscore_momhs": scored([1, data["mom_hs"]]),
        "kidscore_momiq": scored([1, data["mom_iq"]]),
        "kidscore_momhsiq": scored([1, data["mom_hs"], data["mom_iq"]]),
    }


def autoregression(data: dict[str, np.ndarray]) -> Model:
    """y_t ~ N(α + Σ β_k y_{t−k}, σ) given the first K; α, β ~ N(0, 10), σ ~ half-Cauchy(2.5)."""
    y, lags = data["y"], int(data["K"])
    past = [y[lags - k : len(y) - k] for k in range(1, lags + 1)]
    prior = lambda beta, sigma: jnp.sum(norm.logpdf(beta, 0, 10)) + half_cauchy(sigma, 2.5)
    return regression([1, *past], y[lags:], prior)


def kilpisjarvi(data: dict[str, np.ndarray]) -> Model:
    """Summer temperature by year; normal priors on the line, at year 0."""
    loc = np.array([data["pmualpha"], data["pmubeta"]])
    scale = np.array([data["psalpha"], data["psbeta"]])
    prior = lambda beta, _: jnp.sum(norm.logpdf(beta, jnp.asarray(loc, beta.dtype), jnp.asarray(scale, beta.dtype)))
    return regression([1, data["x"]], data["y"], prior)


def blr(data: dict[str, np.ndarray]) -> Model:
    """Five inputs, no intercept; β ~ N(0, 10), σ ~ half-N(10)."""
    prior = lambda beta, sigma: jnp.sum(norm.logpdf(beta, 0, 10)) + half_normal(sigma, 10)
    return regression(list(data["X"].T), data["y"], prior)


# The others.


def eight_schools(data: dict[str, np.ndarray]) -> Model:
    """u = (z_1 … z_8, μ, log τ), θ = μ + τz; z ~ N(0, 1), μ ~ N(0, 5), τ ~ half-Cauchy(5)."""

    def quantities(u: Array) -> Array:
        return jnp.concatenate([u[8] + jnp.exp(u[9]) * u[:8], u[8:9], jnp.exp(u[9:])])

    def log_density(u: Array) -> Array:
        effects, errors = jnp.asarray(data["y"], u.dtype), jnp.asarray(data["sigma"], u.dtype)
        prior = jnp.sum(norm.logpdf(u[:8])) + norm.logpdf(u[8], 0, 5) + half_cauchy(jnp.exp(u[9]), 5) + u[9]
        return prior + jnp.sum(norm.logpdf(effects, quantities(u)[:8], errors))

    return log_density, 10, quantities


def squared_exponential(places: np.ndarray, u: Array) -> tuple[Array, Array]:
    """α² exp(−½(x − x′)²/ρ²) with u = (log ρ, log α, …), and its log-prior: ρ ~ Gamma(25, 4), α ~ half-N(2)."""
    x, (rho, alpha) = jnp.asarray(places, u.dtype), jnp.exp(u[:2])
    prior = gamma.logpdf(rho, 25, scale=1 / 4) + half_normal(alpha, 2) + u[0] + u[1]
    return jnp.square(alpha) * jnp.exp(-0.5 * jnp.square((x[:, None] - x) / rho)), prior


def gp_regression(data: dict[str, np.ndarray]) -> Model:
    """u = (log ρ, log α, log σ), y ~ N(0, K + σI), σ ~ half-N(1): σ is a variance here, as in the Stan program."""

    def log_density(u: Array) -> Array:
        kernel, prior = squared_exponential(data["x"], u)
        lower = jnp.linalg.cholesky(kernel + jnp.exp(u[2]) * jnp.eye(len(kernel), dtype=u.dtype))
        white = jax.scipy.linalg.solve_triangular(lower, jnp.asarray(data["y"], u.dtype), lower=True)
        likelihood = jnp.sum(norm.logpdf(white)) - jnp.sum(jnp.log(jnp.diagonal(lower)))
        return likelihood + prior + half_normal(jnp.exp(u[2]), 1) + u[2]

    return log_density, 3, jnp.exp


def gp_poisson(data: dict[str, np.ndarray]) -> Model:
    """u = (log ρ, log α, z), f = chol(K + 1e-10 I)z, counts ~ Poisson(eᶠ), z ~ N(0, I)."""

    def latent(u: Array) -> tuple[Array, Array]:
        kernel, prior = squared_exponential(data["x"], u)
        # The Stan program's own constant, part of the model: float32 has no digits left for it.
        lower = jnp.linalg.cholesky(kernel + 1e-10 * jnp.eye(len(kernel), dtype=u.dtype))
        return lower @ u[2:], prior + jnp.sum(norm.logpdf(u[2:]))

    def log_density(u: Array) -> Array:
        counts, (f, prior) = jnp.asarray(data["k"], u.dtype), latent(u)
        return prior + jnp.sum(counts * f - jnp.exp(f) - gammaln(counts + 1))

    return log_density, 2 + len(data["x"]), lambda u: jnp.append(jnp.exp(u[:2]), latent(u)[0])


def mixture(data: dict[str, np.ndarray]) -> Model:
    """u = (μ_1, log(μ_2 − μ_1), log σ_1, log σ_2, logit θ); μ, σ ~ N(0, 2), θ ~ Beta(5, 5) for the first part."""

    def quantities(u: Array) -> Array:
        places = jnp.stack([u[0], u[0] + jnp.exp(u[1])])
        return jnp.concatenate([places, jnp.exp(u[2:4]), jax.nn.sigmoid(u[4:])])

    def log_density(u: Array) -> Array:
        mu, sigma = quantities(u)[:2], quantities(u)[2:4]
        log_share = jax.nn.log_sigmoid(jnp.stack([u[4], -u[4]]))
        parts = log_share + norm.logpdf(jnp.asarray(data["y"], u.dtype)[:, None], mu, sigma)
        # log θ⁵(1 − θ)⁵: the exponents of Beta(5, 5) are 4, and the change of coordinates gives the fifth.
        prior = 5 * jnp.sum(log_share) - betaln(5.0, 5.0).astype(u.dtype) + jnp.sum(u[1:4])
        prior += jnp.sum(norm.logpdf(mu, 0, 2)) + LOG_2 + jnp.sum(half_normal(sigma, 2))  # one order of two
        return jnp.sum(jax.nn.logsumexp(parts, axis=1)) + prior

    return log_density, 5, quantities


# Targets whose best Gaussian is known.


def funnel(n: int) -> Target:
    """v ~ N(0, 9), x_i ~ N(0, eᵛ), variances, as (v, x_1 … x_n): the least KL is ½ log(1 + 9n/2).

    Example:
        >>> import jax.numpy as jnp
        >>> from benchmarks.posteriors import funnel
        >>> round(float(funnel(2).log_density(jnp.zeros(3))), 4)
        -3.8554
    """

    def log_density(x: Array) -> Array:
        return norm.logpdf(x[0], 0, 3) + jnp.sum(norm.logpdf(x[1:], 0, jnp.exp(x[0] / 2)))

    def kl(params: FullRankParams) -> Array:
        m, cov = moments(params)
        # Under q·e^{−v} the mean of x moves by −cov(v, x), its variance stays.
        squares = jnp.exp(cov[0, 0] / 2 - m[0]) * (jnp.square(m[1:] - cov[0, 1:]) + jnp.diagonal(cov)[1:])
        energy = jnp.square(m[0]) / 18 + cov[0, 0] / 18 + jnp.log(3.0) + n * m[0] / 2 + jnp.sum(squares) / 2
        return energy + negative_entropy(params, n + 1)

    return Target(log_density, n + 1, 0.5 * np.log1p(4.5 * n).item(), kl)


def banana() -> Target:
    """x₁ ~ N(0, 100), x₂ ~ N(−b(x₁² − 100), 1), variances, b = 0.03.

    Example:
        >>> import jax.numpy as jnp
        >>> from benchmarks.posteriors import banana
        >>> round(float(banana().log_density(jnp.zeros(2))), 4)
        -8.6405
    """
    b, variance = 0.03, 100.0

    def log_density(x: Array) -> Array:
        return norm.logpdf(x[0], 0, variance**0.5) + norm.logpdf(x[1], b * (variance - jnp.square(x[0])), 1)

    def kl(params: FullRankParams) -> Array:
        m, cov = moments(params)
        first = jnp.square(m[0]) + cov[0, 0]
        # E(x₂ + b(x₁² − σ²))²: squared mean and variance of a quadratic in a Gaussian.
        mean = m[1] + b * (first - variance)
        spread = cov[1, 1] + 4 * b * m[0] * cov[0, 1]
        spread += b**2 * (2 * jnp.square(cov[0, 0]) + 4 * jnp.square(m[0]) * cov[0, 0])
        energy = first / (2 * variance) + jnp.log(variance) / 2 + (jnp.square(mean) + spread) / 2
        return energy + negative_entropy(params, 2)

    return Target(log_density, 2, 0.72583720, kl)


def moments(params: FullRankParams) -> tuple[Array, Array]:
    """Mean and covariance."""
    lower = jnp.tril(params.scale_tril)
    return params.loc, lower @ lower.T


def negative_entropy(params: FullRankParams, d: int) -> Array:
    """E_q log q without the −d/2 log 2π, which the density's own cancels."""
    return -d / 2 - jnp.sum(jnp.log(jnp.abs(jnp.diagonal(params.scale_tril))))


def logistic_half_splits(seed: int, splits: int = 20) -> list[Split]:
    """Random halves of the breast-cancer data: coefficients ~ N(0, 1), bias with precision 1e-5.

    Features are standardised by the half that is learned from.

    Example:
        >>> import jax.numpy as jnp
        >>> from benchmarks.posteriors import logistic_half_splits
        >>> split = logistic_half_splits(seed=0)[0]
        >>> split.d, split.held_out(jnp.zeros(31)).shape, round(float(split.held_out(jnp.zeros(31))[0]), 4)
        (31, (285,), -0.6931)
    """
    features, labels = ng.problems.load_breast_cancer()
    rng = np.random.default_rng(seed)
    half = len(labels) // 2
    return [logistic_split(features, labels, order[:half], order[half:])
            for order in (rng.permutation(len(labels)) for _ in range(splits))]  # fmt: skip


def logistic_split(features: np.ndarray, labels: np.ndarray, seen: np.ndarray, unseen: np.ndarray) -> Split:
    """Logistic regression on the rows `seen`, judged on the rows `unseen`."""
    mean, spread = features[seen].mean(0), features[seen].std(0)
    design = np.concatenate([np.ones((len(labels), 1)), (features - mean) / spread], axis=1)
    signed = (2 * labels - 1)[:, None] * design

    data = {"signed": signed[seen], "precision": np.array([1e-5] + [1.0] * features.shape[1])}

    def held_out(w: Array) -> Array:
        return jax.nn.log_sigmoid(jnp.asarray(signed[unseen], w.dtype) @ w)

    return Split(partial(logistic, data=data), design.shape[1], data, held_out)


def logistic(w: Array, data: dict[str, Any]) -> Array:
    """Log-density of logistic regression: rows "signed" = ±(1, features), w ~ N(0, 1/"precision")."""
    signed, precision = jnp.asarray(data["signed"], w.dtype), jnp.asarray(data["precision"], w.dtype)
    prior = jnp.sum(norm.logpdf(w, 0, 1 / jnp.sqrt(precision)))
    return jnp.sum(jax.nn.log_sigmoid(signed @ w)) + prior
