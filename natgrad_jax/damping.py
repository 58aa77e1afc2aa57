"""Damping rules: G + λD, with D a metric of its own. A bare number means `relative`.

A rule is a frozen pytree of the strength λ ≥ 0 (dimensionless for `relative` and `trace`) and the way in which D
follows from G. `root(scale)` returns √D_ii from `scale` = √G_ii; both are flat vectors of shape (p,).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax._tree import concrete

Number = float | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Relative:
    """D = diag(G): covariant under a change of units of the parameters."""

    strength: Number

    def root(self, scale: Array) -> Array:
        """√D_ii = √G_ii."""
        return scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Absolute:
    """D = I: mixes units; λ has the units of G."""

    strength: Number

    def root(self, scale: Array) -> Array:
        """√D_ii = 1."""
        return jnp.ones_like(scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """D = tr(G)/p · I: mixes units, but does not depend on the scale of the loss."""

    strength: Number

    def root(self, scale: Array) -> Array:
        """√D_ii = √(tr(G)/p)."""
        largest = jnp.max(scale, initial=0.0)
        relative = scale / jnp.where(largest > 0, largest, 1)
        return jnp.full_like(scale, largest * jnp.sqrt(jnp.sum(jnp.square(relative)) / max(scale.size, 1)))


Rule = Relative | Absolute | Trace


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
    return Relative(_checked(strength))


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
    return Absolute(_checked(strength))


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
    return Trace(_checked(strength))


def as_rule(damping: "Rule | Number | None") -> Rule | None:
    """A rule as it is, a bare number as `relative`, None as None."""
    if damping is None or isinstance(damping, Relative | Absolute | Trace):
        return damping
    if callable(damping) or isinstance(damping, str):
        raise TypeError(
            f"damping: expected None, a number (relative) or a rule such as damping.absolute(1e-3), got {damping!r}"
        )
    return relative(damping)


def _checked(strength: Number) -> Number:
    if jnp.ndim(strength) != 0:
        raise ValueError(
            f"damping: expected one number λ ≥ 0, got an array of shape {jnp.shape(strength)}; vmap over the solve"
        )
    if concrete(strength) and not strength >= 0:
        raise ValueError(f"damping: expected a number λ ≥ 0, got {strength}")
    return strength
