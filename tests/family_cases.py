"""The table of families that the laws run over: a new family is one row and gets every law."""

from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from cases import rounded

from natgrad_jax import families as f

RNG = np.random.default_rng(7)
LOW2, LOW3 = (rounded(np.tril(0.4 * RNG.normal(size=(d, d))) + np.diag(0.5 + RNG.random(d))) for d in (2, 3))
LOC = rounded(np.array([0.3, -1.0, 2.0]))
CONCENTRATIONS = rounded(np.array([0.4, 4.0, 30.0]))
RATES = rounded(np.array([2.0, 0.5, 10.0]))
MEANS = rounded(np.array([0.3, 4.0, 120.0]))


class Row(NamedTuple):
    """A family and parameters away from its start.

    reference: params in numpy -> frozen distribution of scipy, or anything with logpdf and entropy.
    moments: params -> mean and covariance of a Gaussian: how the Fisher information of curved families is checked.
    exponential: whether it has natural and mean coordinates.
    """

    family: Any
    params: Any
    reference: Callable | None = None
    moments: Callable | None = None
    exponential: bool = True


class Sum(NamedTuple):
    """Independent distributions of scipy."""

    q: Any

    def logpdf(self, x):
        discrete = isinstance(self.q.dist, scipy.stats.rv_discrete)
        return np.sum(self.q.logpmf(x) if discrete else self.q.logpdf(x))

    def entropy(self):
        if not isinstance(self.q.dist, scipy.stats.rv_discrete):
            return np.sum(self.q.entropy())
        log_p = self.q.logpmf(np.arange(20_000)[:, None])
        return -np.sum(np.where(log_p > -700, np.exp(log_p) * log_p, 0))


class Table(NamedTuple):
    """A finite distribution by its log-probabilities, looked up by `place`."""

    log_p: np.ndarray
    place: Callable

    def logpdf(self, x):
        return self.log_p[self.place(x)]

    def entropy(self):
        return -np.sum(np.exp(self.log_p) * self.log_p)


def normal(mean, cov):
    return scipy.stats.multivariate_normal(mean, cov)


def banded_precision(params):
    d, width = params.bands.shape
    lower = np.zeros((d, d))
    for i in range(d):
        for k in range(min(width, d - i)):
            lower[i + k, i] = params.bands[i, k]
    return lower @ lower.T


def low_rank_moments(params):
    return params.loc, jnp.diag(jnp.exp(2 * params.log_scale)) + params.factor @ params.factor.T


def matrix_moments(params):
    a, b = jnp.tril(params.row_tril), jnp.tril(params.col_tril)
    return params.loc.ravel(), jnp.kron(a @ a.T, b @ b.T)


def blocks_of(params):
    cov = np.zeros((3, 3))
    cov[:2, :2], cov[2:, 2:] = (np.tril(p.scale_tril) @ np.tril(p.scale_tril).T for p in params)
    return np.concatenate([p.loc for p in params]), cov


def boltzmann_table(params):
    states = np.array(np.meshgrid(*[[-1, 1]] * 3, indexing="ij")).reshape(3, -1).T
    i, j = np.triu_indices(3, 1)
    energy = states @ params.field + (states[:, i] * states[:, j]) @ params.coupling
    place = lambda x: int(np.flatnonzero((states == np.asarray(x)).all(1))[0])
    return Table(energy - np.logaddexp.reduce(energy), place)


def two_valued_table(theta, low, high):
    q = [np.array([low, high]) * t - np.logaddexp(low * t, high * t) for t in theta]
    return _Independent([Table(p, lambda x: int(x == high)) for p in q])


class _Independent(NamedTuple):
    parts: list

    def logpdf(self, x):
        return sum(part.logpdf(y) for part, y in zip(self.parts, x, strict=True))

    def entropy(self):
        return sum(part.entropy() for part in self.parts)


def from_sd(phi):
    return f.MeanFieldParams(phi["mean"], jnp.log(phi["sd"]))


def to_sd(params):
    return {"mean": params.loc, "sd": jnp.exp(params.log_scale)}


def softmax_table(logits):
    logits = np.asarray(logits, float)
    return Table(logits - np.logaddexp.reduce(logits), int)


class _Flat(NamedTuple):
    q: Any

    def logpdf(self, x):
        return self.q.logpdf(np.ravel(x))

    def entropy(self):
        return self.q.entropy()


class _Simplex(NamedTuple):
    q: Any

    def logpdf(self, x):
        return self.q.logpdf(x / np.sum(x))

    def entropy(self):
        return self.q.entropy()


class _Pair(NamedTuple):
    rate: Any
    w: Any

    def logpdf(self, x):
        return self.rate.logpdf(x["rate"]) + self.w.logpdf(x["w"])

    def entropy(self):
        return self.rate.entropy() + self.w.entropy()


FACTOR = RNG.normal(size=(5, 2))
BANDS = rounded(np.concatenate([np.exp(RNG.normal(size=(5, 1)) / 2), 0.5 * RNG.normal(size=(5, 2))], 1))
FAMILIES = {
    "full rank": Row(
        f.gaussian_full_rank(3), f.FullRankParams(LOC, LOW3),
        lambda p: normal(p.loc, np.tril(p.scale_tril) @ np.tril(p.scale_tril).T),
    ),
    "precision": Row(
        f.gaussian_precision(3), f.PrecisionParams(LOC, LOW3),
        lambda p: normal(p.loc, np.linalg.inv(np.tril(p.precision_tril) @ np.tril(p.precision_tril).T)),
    ),
    "mean field": Row(
        f.gaussian_mean_field(3), f.MeanFieldParams(LOC, rounded(np.array([0.5, -0.75, 0.1]))),
        lambda p: normal(p.loc, np.diag(np.exp(2 * p.log_scale))),
    ),
    "block diagonal": Row(
        f.gaussian_block_diagonal((2, 1)),
        (f.FullRankParams(LOC[:2], LOW2), f.FullRankParams(LOC[2:], np.array([[0.5]]))),
        lambda p: normal(*blocks_of(p)),
    ),
    "banded": Row(
        f.gaussian_banded(5, 2), f.BandedParams(rounded(np.linspace(-1, 1, 5)), BANDS),
        lambda p: normal(p.loc, np.linalg.inv(banded_precision(p))),
    ),
    "low rank": Row(
        f.gaussian_low_rank(5, 2),
        f.LowRankParams(rounded(np.linspace(-1, 1, 5)), rounded(0.3 * RNG.normal(size=5)), rounded(FACTOR)),
        lambda p: normal(*low_rank_moments(p)), low_rank_moments, exponential=False,
    ),
    "low rank, more than there is": Row(
        f.gaussian_low_rank(3, 2),
        f.LowRankParams(LOC, rounded(0.3 * RNG.normal(size=3)), rounded(RNG.normal(size=(3, 2)))),
        lambda p: normal(*low_rank_moments(p)), low_rank_moments, exponential=False,
    ),
    "bernoulli": Row(f.bernoulli(3), LOC, lambda t: two_valued_table(t, 0, 1)),
    "spins": Row(f.bernoulli(3, values=(-1, 1)), LOC, lambda t: two_valued_table(t, -1, 1)),
    "categorical": Row(f.categorical(3), LOC, softmax_table),
    "categorical, minimal": Row(f.categorical(4, minimal=True), LOC, lambda t: softmax_table(np.append(t, 0))),
    "boltzmann": Row(
        f.boltzmann(3), f.BoltzmannParams(LOC / 2, rounded(np.array([0.5, -0.25, 0.75]))), boltzmann_table
    ),
    "poisson": Row(f.poisson(3), MEANS, lambda p: Sum(scipy.stats.poisson(p))),
    "negative binomial": Row(
        f.negative_binomial(3, 2.5), MEANS, lambda p: Sum(scipy.stats.nbinom(2.5, 2.5 / (2.5 + p))),
    ),
    "negative binomial, few": Row(
        f.negative_binomial(3, 0.25), MEANS, lambda p: Sum(scipy.stats.nbinom(0.25, 0.25 / (0.25 + p))),
    ),
    "gamma": Row(
        f.gamma(3), f.GammaParams(CONCENTRATIONS, RATES),
        lambda p: Sum(scipy.stats.gamma(p.concentration, scale=1 / p.rate)),
    ),
    "inverse gamma": Row(
        f.inverse_gamma(3), f.InverseGammaParams(CONCENTRATIONS, RATES),
        lambda p: Sum(scipy.stats.invgamma(p.concentration, scale=p.scale)),
    ),
    "beta": Row(
        f.beta(3), f.BetaParams(CONCENTRATIONS, RATES), lambda p: Sum(scipy.stats.beta(p.alpha, p.beta)),
    ),
    "dirichlet": Row(f.dirichlet(3), CONCENTRATIONS, lambda alpha: _Simplex(scipy.stats.dirichlet(alpha))),
    "von mises": Row(
        f.von_mises(3), f.VonMisesParams(LOC, CONCENTRATIONS),
        lambda p: Sum(scipy.stats.vonmises(p.concentration, loc=p.loc)),
    ),
    "wishart": Row(
        f.wishart(3), f.WishartParams(np.array(4.5), LOW3),
        lambda p: scipy.stats.wishart(float(p.df), np.tril(p.scale_tril) @ np.tril(p.scale_tril).T),
    ),
    "matrix normal": Row(
        f.matrix_normal(2, 3), f.MatrixNormalParams(rounded(RNG.normal(size=(2, 3))), LOW2, LOW3),
        lambda p: _Flat(normal(*matrix_moments(p))), matrix_moments, exponential=False,
    ),
    "product": Row(
        f.product({"rate": f.gamma(2), "w": f.gaussian_mean_field(2)}),
        {"rate": f.GammaParams(CONCENTRATIONS[:2], RATES[:2]), "w": f.MeanFieldParams(LOC[:2], LOC[1:] / 4)},
        lambda p: _Pair(
            Sum(scipy.stats.gamma(p["rate"].concentration, scale=1 / p["rate"].rate)),
            normal(p["w"].loc, np.diag(np.exp(2 * p["w"].log_scale))),
        ),
    ),
    "chart": Row(
        f.chart(f.gaussian_mean_field(3), from_sd, to_sd), {"mean": LOC, "sd": rounded(np.array([0.5, 2.0, 1.5]))},
        lambda p: normal(p["mean"], np.diag(p["sd"] ** 2)),
        lambda p: (p["mean"], jnp.diag(p["sd"] ** 2)), exponential=False,
    ),
}  # fmt: skip


def row(name, dtype):
    """The family, its parameters in `dtype`, and the distribution of scipy at them."""
    one = FAMILIES[name]
    return one.family, cases.cast(one.params, dtype), one.reference(jax.tree.map(np.float64, one.params))
