"""Natural gradients for JAX: any metric × any solver, as an optax transformation."""

from natgrad_jax import (
    adapters,
    constraints,
    damping,
    families,
    inference,
    layers,
    metrics,
    operators,
    problems,
    solvers,
    transforms,
)
from natgrad_jax.inference import fit
from natgrad_jax.metrics import check_fisher, fisher_matrix
from natgrad_jax.operators import report
from natgrad_jax.transforms import natural_gradient, scale_by_metric

__version__ = "0.1.0"

__all__ = [
    "adapters",
    "check_fisher",
    "constraints",
    "damping",
    "families",
    "fisher_matrix",
    "fit",
    "inference",
    "layers",
    "metrics",
    "natural_gradient",
    "operators",
    "problems",
    "report",
    "scale_by_metric",
    "solvers",
    "transforms",
]
