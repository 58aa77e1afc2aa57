"""Variational inference: minimise KL(q_θ‖p) by exact sums or by samples."""

from natgrad_jax.inference.fitting import FitResult, Status, fit
from natgrad_jax.inference.objectives import elbo, exact_kl

__all__ = ["FitResult", "Status", "elbo", "exact_kl", "fit"]
