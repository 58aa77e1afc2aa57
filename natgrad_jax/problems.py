"""Problems with known answers, on real data: what the demo, the tests and the benchmarks run on.

Each is a log-density in nats with every constant kept, so that an ELBO can be compared between coordinates.
"""

from collections.abc import Callable
from importlib import resources
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.stats import norm

# Effects and standard errors of coaching in eight schools: Rubin (1981), table 1.
SCHOOL_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SCHOOL_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


class Problem(NamedTuple):
    """A target.

    Attributes:
        log_density: log p̃(x) for one x of shape (d,).
        d: dimension.
        best: highest ELBO that a full-rank Gaussian is known to reach on 10,000 draws, nats.
    """

    log_density: Callable[[Array], Array]
    d: int
    best: float


def eight_schools() -> Problem:
    """Hierarchical model, non-centred: x = (μ, log τ, θ_1 … θ_8), y_j ~ N(μ + τθ_j, σ_j).

    μ ~ N(0, 5), τ ~ half-Cauchy(5), θ_j ~ N(0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> round(float(ng.problems.eight_schools().log_density(jnp.zeros(10))), 3)
        -43.436
    """

    def log_density(x: Array) -> Array:
        mu, log_tau, theta = x[0], x[1], x[2:]
        tau = jnp.exp(log_tau)
        effects, errors = jnp.asarray(SCHOOL_EFFECTS, x.dtype), jnp.asarray(SCHOOL_ERRORS, x.dtype)
        prior = norm.logpdf(mu, 0, 5) + jnp.sum(norm.logpdf(theta)) + jnp.log(2 / (5 * jnp.pi)) + log_tau
        prior -= jnp.log1p(jnp.square(tau / 5))
        return prior + jnp.sum(norm.logpdf(effects, mu + tau * theta, errors))

    return Problem(log_density, 10, -31.524)


def breast_cancer(units: str = "standardised") -> Problem:
    """Bayesian logistic regression on the Wisconsin breast-cancer data, prior N(0, I).

    569 cells; x = (intercept, 30 coefficients).

    Args:
        units: "standardised", coefficients per standard deviation of a feature; "raw", the same posterior with
            coefficients per unit of the feature (the prior is mapped, a diagonal change of coordinates);
            "uncentred", raw features whose mean is not subtracted either (a triangular one).

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> round(float(ng.problems.breast_cancer().log_density(jnp.zeros(31))), 3)
        -422.888
    """
    features, labels = load_breast_cancer()
    mean, spread = features.mean(0), features.std(0)
    design = np.concatenate([np.ones((len(features), 1)), (features - mean) / spread], axis=1)
    to_standard = np.eye(31)
    if units in ("raw", "uncentred"):
        to_standard[range(1, 31), range(1, 31)] = spread
    if units == "uncentred":
        to_standard[0, 1:] = mean
    if units not in ("standardised", "raw", "uncentred"):
        raise ValueError(f"units: expected 'standardised', 'raw' or 'uncentred', got {units!r}")
    signed = (2 * labels - 1)[:, None] * design @ to_standard
    log_det = float(np.linalg.slogdet(to_standard)[1])

    def log_density(x: Array) -> Array:
        standard = jnp.asarray(to_standard, x.dtype) @ x
        likelihood = jnp.sum(jax.nn.log_sigmoid(jnp.asarray(signed, x.dtype) @ x))
        return likelihood + jnp.sum(norm.logpdf(standard)) + log_det

    return Problem(log_density, 31, -55.449)


def load_breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Features (569, 30) and labels (569,), 1 = benign; see `data/README.md` for source and licence.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.problems.load_breast_cancer()[0].shape
        (569, 30)
    """
    with resources.files("natgrad_jax").joinpath("data/breast_cancer.csv").open() as file:
        table = np.loadtxt(file, delimiter=",", skiprows=1)
    return table[:, :30], table[:, 30]


class Ising(NamedTuple):
    """An Ising model on a torus: log p̃(s) = β Σ_⟨ij⟩ s_i s_j + h Σ s_i, its log Z and its best mean-field ELBO."""

    beta: float
    field: float
    log_z: float
    best: float

    def log_density(self, s: Array) -> Array:
        """log p̃ of one configuration s ∈ {−1, 1}¹⁶."""
        grid = jnp.reshape(s, (4, 4))
        bonds = jnp.sum(grid * (jnp.roll(grid, 1, 0) + jnp.roll(grid, 1, 1)))
        return self.beta * bonds + self.field * jnp.sum(grid)


def ising_4x4() -> tuple[Ising, ...]:
    """The 4×4 torus (32 bonds, 2¹⁶ states) at four temperatures, with known answers.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> round(float(ng.problems.ising_4x4()[0].log_density(jnp.ones(16))), 4)
        8.0
    """
    return (
        Ising(0.2, 0.1, 11.99074944, 11.43810411),
        Ising(0.3, 0.1, 13.20654638, 12.63341355),
        Ising(0.4406868, 0.0, 15.52191562, 14.62475680),
        Ising(0.6, 0.0, 20.05653288, 19.33669866),
    )
