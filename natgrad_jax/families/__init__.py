"""Families of distributions q_θ whose geometry is known in closed form.

A family is a small hashable value: its methods are pure functions of the parameters. Each has

    init(loc, scale)            parameters to start from
    sample(params, key, n)      n draws on the leading axis
    log_prob(params, x)         log-density of one x, in nats
    fisher(params)              the Fisher information as an operator; also a metric
    retract(params, step)       a point of the family, params + step to first order, for a step of any size
    entropy(params)             in nats, where it is known
    reparameterised             whether draws are differentiable functions of the parameters

and, where it is an exponential family q(x) ∝ h(x) exp(θ·T(x)),

    statistics(x)               T(x) of one x
    to_natural, from_natural    between the parameters and θ
    to_mean, from_mean          between the parameters and η = E T(x)

θ and η are pytrees of one structure, so that a gradient in η is a natural gradient in θ.
"""

from natgrad_jax.families.composite import MixtureParams, chart, gaussian_mixture, product
from natgrad_jax.families.continuous import (
    BetaParams,
    GammaParams,
    InverseGammaParams,
    VonMisesParams,
    beta,
    dirichlet,
    gamma,
    inverse_gamma,
    von_mises,
)
from natgrad_jax.families.discrete import (
    BoltzmannParams,
    bernoulli,
    boltzmann,
    categorical,
    negative_binomial,
    poisson,
)
from natgrad_jax.families.gaussians import (
    BandedParams,
    FullRankParams,
    GaussianCoordinates,
    GaussianFullRank,
    GaussianMeanField,
    GaussianPrecision,
    LowRankParams,
    MeanFieldParams,
    PrecisionParams,
    gaussian_banded,
    gaussian_block_diagonal,
    gaussian_full_rank,
    gaussian_low_rank,
    gaussian_mean_field,
    gaussian_precision,
)
from natgrad_jax.families.matrices import MatrixNormalParams, WishartParams, matrix_normal, wishart

__all__ = [
    "BandedParams",
    "BetaParams",
    "BoltzmannParams",
    "FullRankParams",
    "GammaParams",
    "GaussianCoordinates",
    "GaussianFullRank",
    "GaussianMeanField",
    "GaussianPrecision",
    "InverseGammaParams",
    "LowRankParams",
    "MatrixNormalParams",
    "MeanFieldParams",
    "MixtureParams",
    "PrecisionParams",
    "VonMisesParams",
    "WishartParams",
    "bernoulli",
    "beta",
    "boltzmann",
    "categorical",
    "chart",
    "dirichlet",
    "gamma",
    "gaussian_banded",
    "gaussian_block_diagonal",
    "gaussian_full_rank",
    "gaussian_low_rank",
    "gaussian_mean_field",
    "gaussian_mixture",
    "gaussian_precision",
    "inverse_gamma",
    "matrix_normal",
    "negative_binomial",
    "poisson",
    "product",
    "von_mises",
    "wishart",
]
