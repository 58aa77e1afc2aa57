"""Variational inference: minimise KL(q_θ‖p) by exact sums or by samples."""

from natgrad_jax.inference.diagnostics import (
    Psis,
    Summary,
    effective_sample_size,
    psis,
    reading,
    summary,
    threshold,
    to_arviz,
)
from natgrad_jax.inference.draws import antithetic, fixed, gauss_hermite, independent, orthogonal, quasi_random
from natgrad_jax.inference.estimators import closed_form, exact, price, reparameterised, score, stl
from natgrad_jax.inference.fitting import fit, minimise
from natgrad_jax.inference.objectives import elbo, exact_kl
from natgrad_jax.inference.results import FitResult, Status, best_of, load
from natgrad_jax.inference.targets import minibatch

__all__ = [
    "FitResult",
    "Psis",
    "Status",
    "Summary",
    "antithetic",
    "best_of",
    "closed_form",
    "effective_sample_size",
    "elbo",
    "exact",
    "exact_kl",
    "fit",
    "fixed",
    "gauss_hermite",
    "independent",
    "load",
    "minibatch",
    "minimise",
    "orthogonal",
    "price",
    "psis",
    "quasi_random",
    "reading",
    "reparameterised",
    "score",
    "stl",
    "summary",
    "threshold",
    "to_arviz",
]
