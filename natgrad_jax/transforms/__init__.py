"""Transformations: everything that turns G⁻¹g into a safe step, as optax gradient transformations."""

from natgrad_jax.transforms.core import (
    PreconditionState,
    ScaleStepState,
    precondition,
    scale_step,
    with_metric,
)
from natgrad_jax.transforms.lengths import NormaliseState, TrustRegionState, normalise, retract, trust_region
from natgrad_jax.transforms.momentum import (
    GeodesicState,
    HeavyBallState,
    QuadraticStepState,
    SpringState,
    geodesic,
    heavy_ball,
    quadratic_step,
    spring,
)
from natgrad_jax.transforms.optimizers import natural_gradient, scale_by_metric
from natgrad_jax.transforms.reports import Summary, summary
from natgrad_jax.transforms.reuse import (
    AccumulateState,
    AverageState,
    EveryKState,
    accumulate,
    average,
    every_k,
)
from natgrad_jax.transforms.search import (
    DampingGridState,
    LevenbergMarquardtState,
    Progress,
    StepSearchState,
    backtracking,
    damping_grid,
    grid_search,
    levenberg_marquardt,
)

__all__ = [
    "AccumulateState",
    "AverageState",
    "DampingGridState",
    "EveryKState",
    "GeodesicState",
    "HeavyBallState",
    "LevenbergMarquardtState",
    "NormaliseState",
    "PreconditionState",
    "Progress",
    "QuadraticStepState",
    "ScaleStepState",
    "SpringState",
    "StepSearchState",
    "Summary",
    "TrustRegionState",
    "accumulate",
    "average",
    "backtracking",
    "damping_grid",
    "every_k",
    "geodesic",
    "grid_search",
    "heavy_ball",
    "levenberg_marquardt",
    "natural_gradient",
    "normalise",
    "precondition",
    "quadratic_step",
    "retract",
    "scale_by_metric",
    "scale_step",
    "spring",
    "summary",
    "trust_region",
    "with_metric",
]
