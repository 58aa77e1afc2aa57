"""Damping rules: G + λD, with D a diagonal metric of its own. A bare number means `relative`.

A rule is a frozen pytree of the strength λ ≥ 0 (dimensionless for all but `absolute` and `metric`) and the way in which
D follows from G. `root(scale, space)` returns √D_ii from `scale` = √G_ii, both flat vectors of shape (p,); scale is
None where G shows no diagonal.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, real_dtype, surely, unmasked
from natgrad_jax.operators import Diagonal, Operator

Number = float | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Relative:
    """D = diag(G): covariant under a change of units of the parameters."""

    strength: Number

    def root(self, scale: Array | None, space: Space) -> Array:
        """√D_ii = √G_ii."""
        return _no_diagonal("relative") if scale is None else scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Absolute:
    """D = I: mixes units; λ has the units of G."""

    strength: Number

    def root(self, scale: Array | None, space: Space) -> Array:
        """√D_ii = 1."""
        return jnp.ones(space.size, jnp.finfo(space.dtype).dtype) if scale is None else jnp.ones_like(scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """D = tr(G)/p · I: mixes units, but does not depend on the scale of the loss.

    `mean` is √(tr(G)/p) where G is a part of a larger operator.
    """

    strength: Number
    mean: Array | None = None

    def root(self, scale: Array | None, space: Space) -> Array:
        """√D_ii = √(tr(G)/p)."""
        if scale is None:
            _no_diagonal("trace")
        return jnp.full_like(scale, root_mean_square(scale) if self.mean is None else self.mean)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layered:
    """D_ij = (Σ_j G_ij)(Σ_i G_ij)/ΣG over the diagonal of each leaf, a rank-one table with the trace of G."""

    strength: Number

    def root(self, scale: Array | None, space: Space) -> Array:
        """√D, leaf by leaf; vectors and scalars are damped by diag(G)."""
        if scale is None:
            _no_diagonal("layered")
        ends = itertools.accumulate(map(math.prod, space.shapes), initial=0)
        parts = [
            _rank_one(scale[start : start + math.prod(shape)], shape)
            for start, shape in zip(ends, space.shapes, strict=False)
        ]
        return jnp.concatenate([scale[:0], *parts])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metric:
    """D is an operator of its own, diagonal; λ has the units of G over those of D."""

    strength: Number
    operator: Operator

    def root(self, scale: Array | None, space: Space) -> Array:
        """√D_ii."""
        space.check_shapes(self.operator.entries, "damping")
        return jnp.sqrt(self.operator.space.ravel(self.operator.entries).astype(real_dtype(space.dtype)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class MetricFunction:
    """`metric` before it has seen parameters; `at` turns it into `Metric`."""

    strength: Number
    function: Callable[[PyTree], Operator]


Rule = Relative | Absolute | Trace | Layered | Metric
RULES = (Relative, Absolute, Trace, Layered, Metric, MetricFunction)


def relative(strength: Number) -> Relative:
    """λ·diag(G): the same trajectory in every choice of units. This is what a bare number means.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Diagonal(jnp.array([4.0, 1.0]))
        >>> solution = ng.solvers.solve(G, jnp.array([4.0, 1.0]), damping=ng.damping.relative(1.0))
        >>> [round(float(x), 6) for x in solution.value]
        [0.5, 0.5]
    """
    return Relative(checked(strength))


def absolute(strength: Number) -> Absolute:
    """λ·I, as in most papers: not covariant, since it adds 1 to entries that carry units.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Diagonal(jnp.array([3.0, 0.0]))
        >>> solution = ng.solvers.solve(G, jnp.array([4.0, 1.0]), damping=ng.damping.absolute(1.0))
        >>> [round(float(x), 6) for x in solution.value]
        [1.0, 1.0]
    """
    return Absolute(checked(strength))


def trace(strength: Number) -> Trace:
    """λ·tr(G)/p·I: follows the scale of the loss, not the units of single parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Diagonal(jnp.array([3.0, 1.0]))
        >>> solution = ng.solvers.solve(G, jnp.array([5.0, 3.0]), damping=ng.damping.trace(1.0))
        >>> [round(float(x), 6) for x in solution.value]
        [1.0, 1.0]
    """
    return Trace(checked(strength))


def layered(strength: Number) -> Layered:
    """λ·D with D_ij = (Σ_j G_ij)(Σ_i G_ij)/ΣG in each leaf of two or more axes (the last axis against the others).

    For a layer y = xW whose inputs x and sensitivities δ are uncorrelated this is E[x²] ⊗ E[δ²]: a table of rank one,
    and covariant under the units of inputs and of outputs. Correlations break the covariance by as much as they change
    E[x²δ²]; `relative` is covariant always. Other leaves are damped by diag(G).

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Diagonal(jnp.array([[1.0, 1.0], [1.0, 1.0]]))
        >>> solution = ng.solvers.solve(G, 2 * jnp.ones((2, 2)), damping=ng.damping.layered(1.0))
        >>> round(float(solution.value[0, 0]), 6)
        1.0
    """
    return Layered(checked(strength))


def metric(strength: Number, metric: Callable[[PyTree], Operator] | Operator) -> Metric | MetricFunction:
    """λ·D with D from a metric of your own: a diagonal operator, or a metric(params) that returns one.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> rule = ng.damping.metric(0.5, ng.metrics.scales(0.1))
        >>> tx = ng.scale_by_metric(ng.metrics.scales(1.0), damping=rule)
        >>> theta = jnp.array([1.0])
        >>> d, _ = tx.update(jnp.array([51.0]), tx.init(theta), theta)
        >>> round(float(d[0]), 6)
        1.0
    """
    if callable(metric):
        return MetricFunction(checked(strength), metric)
    if not isinstance(metric, Diagonal):
        raise TypeError(
            f"metric: expected a metric(params) or an operators.Diagonal, got {type(metric).__name__}. For damping by "
            "another operator add it to the metric: operators.add(G, operators.scale(strength, D))."
        )
    return Metric(checked(strength), metric)


def as_rule(damping: Any) -> Any:
    """A rule as it is, a bare number as `relative`, None as None."""
    if damping is None or isinstance(damping, RULES):
        return damping
    if callable(damping) or isinstance(damping, str):
        raise TypeError(
            f"damping: expected None, a number (relative) or a rule such as damping.absolute(1e-3), got {damping!r}"
        )
    return relative(damping)


def at(rule: Any, params: PyTree | None, full_params: PyTree | None = None) -> Rule | None:
    """The rule with its metric evaluated at the parameters; at all of them, where `params` is a masked part."""
    if not isinstance(rule, MetricFunction):
        return rule
    if params is None:
        raise TypeError("damping: this rule needs parameters; give damping.metric an operator, metric(params)")
    built = metric(rule.strength, rule.function(params if full_params is None else full_params))
    assert isinstance(built, Metric)
    return built if full_params is None else Metric(built.strength, built.operator.restrict(unmasked(params)))


def known_scale(operator: Operator) -> Array | None:
    """√G_ii where the operator shows its diagonal without p products; else None."""
    return operator.scale() if operator.shows_diagonal else None


def squares(rule: Rule, pivots: Array, space: Space) -> Array:
    """D_ii from G_ii, where no square leaves the floats."""
    return pivots if isinstance(rule, Relative) else jnp.square(rule.root(jnp.sqrt(pivots), space))


def root_mean_square(scale: Array) -> Array:
    """√(Σ scale²/p), for a scale of any size."""
    largest = jnp.max(scale, initial=0.0)
    relative = scale / jnp.where(largest > 0, largest, 1)
    return largest * _tree.root(jnp.sum(jnp.square(relative)) / max(scale.size, 1))


def _rank_one(scale: Array, shape: tuple[int, ...]) -> Array:
    if len(shape) < 2 or scale.size == 0:
        return scale
    largest = jnp.max(scale)
    unit = jnp.where(largest > 0, largest, 1)
    square = jnp.square(scale / unit).reshape(-1, shape[-1])
    rows, columns, total = jnp.sum(square, 1), jnp.sum(square, 0), jnp.sum(square)
    # Roots before the product, which may underflow.
    table = jnp.outer(_tree.root(rows), _tree.root(columns))
    return (unit * table / jnp.sqrt(jnp.where(total > 0, total, 1))).ravel()


def _no_diagonal(rule: str) -> NoReturn:
    raise TypeError(
        f"damping: {rule} damping follows the diagonal of G, and this operator shows none. Give it one "
        "(Implicit(..., diag=...)), or use damping.absolute(λ) or damping.metric(λ, D)."
    )


def checked(strength: Number) -> Number:
    """The strength λ; an error unless it is one number that cannot be seen to be negative."""
    if isinstance(strength, RULES):
        raise TypeError(f"damping: expected a number λ in place of the rule's own, got the rule {strength!r}")
    if jnp.ndim(strength) != 0:
        raise ValueError(
            f"damping: expected one number λ ≥ 0, got an array of shape {jnp.shape(strength)}; vmap over the solve"
        )
    if surely(strength, lambda x: not x >= 0):
        raise ValueError(f"damping: expected a number λ ≥ 0, got {strength}")
    return strength
