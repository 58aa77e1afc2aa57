"""Transformations: everything that turns G⁻¹g into a safe step, as optax gradient transformations."""

from natgrad_jax.transforms.core import (
    PreconditionState,
    ScaleStepState,
    precondition,
    scale_step,
    with_metric,
)
from natgrad_jax.transforms.lengths import NormaliseState, TrustRegionState, normalise, retract, trust_region
from natgrad_jax.transforms.optimizers import natural_gradient, scale_by_metric

__all__ = [
    "NormaliseState",
    "PreconditionState",
    "ScaleStepState",
    "TrustRegionState",
    "natural_gradient",
    "normalise",
    "precondition",
    "retract",
    "scale_by_metric",
    "scale_step",
    "trust_region",
    "with_metric",
]
