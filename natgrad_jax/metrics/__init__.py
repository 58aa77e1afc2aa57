"""Metrics: where G comes from. A metric is a function `metric(params, **data) -> operator`.

    fisher, monte_carlo_fisher, empirical_fisher     distributions: by exact sums, by draws of the model, from data
    gauss_newton, least_squares                      models with a convex loss, residuals
    pullback, hessian                                your own: the length of f(θ), the curvature of a potential
    quantum_geometric, wasserstein_1d                wave functions, distributions whose support moves
    energy, sobolev                                  fields u_θ(x)
    scales, relative, quasi_diagonal, fisher_diagonal    by formula, and parts of other metrics
    one_pass, score_function, variational_energy     value and gradient of an objective together with its metric

Nearly all are pullbacks G = JᵀHJ, kept as rows H^½J (a `Gram`); `chunk_size` makes the matrix in bounded memory, and
`matrix_free` leaves products alone. A metric's keyword-only parameters name the data that it needs; `update` of the
optimizer is given exactly those. For the matrix alone, `metric(params, **data).dense()`.
"""

from natgrad_jax.metrics import losses
from natgrad_jax.metrics.checks import FisherReport, check_fisher, check_rows
from natgrad_jax.metrics.closed import fisher_diagonal, hessian, quasi_diagonal, relative, scales
from natgrad_jax.metrics.fields import energy, quantum_geometric, sobolev, wasserstein_1d
from natgrad_jax.metrics.fisher import (
    LogProb,
    empirical_fisher,
    fisher,
    fisher_information,
    fisher_matrix,
    monte_carlo_fisher,
)
from natgrad_jax.metrics.models import gauss_newton, least_squares, pullback, value_and_grad
from natgrad_jax.metrics.objectives import Evaluation, one_pass, score_function, variational_energy
from natgrad_jax.metrics.shared import Metric, check_log_prob, check_weights

__all__ = [
    "Evaluation",
    "FisherReport",
    "LogProb",
    "Metric",
    "check_fisher",
    "check_log_prob",
    "check_rows",
    "check_weights",
    "empirical_fisher",
    "energy",
    "fisher",
    "fisher_diagonal",
    "fisher_information",
    "fisher_matrix",
    "gauss_newton",
    "hessian",
    "least_squares",
    "losses",
    "monte_carlo_fisher",
    "one_pass",
    "pullback",
    "quantum_geometric",
    "quasi_diagonal",
    "relative",
    "scales",
    "score_function",
    "sobolev",
    "value_and_grad",
    "variational_energy",
    "wasserstein_1d",
]
