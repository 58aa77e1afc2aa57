"""What solvers share: the result, the frame in which the damping is the identity, guarded quotients."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, Space, all_finite, cast_like
from natgrad_jax.damping import Number, Rule
from natgrad_jax.operators import Operator


class Stats(NamedTuple):
    """What a solve noticed.

    Attributes:
        dead: number of coordinates with (G + λD)_ii = 0; their step is 0.
        rank: numerical rank of G, or None from a solver that does not know it.
        iterations: steps taken, from an iterative solver.
        residual: ‖g − (G + λD)d‖ / ‖g‖ at the end in the norm of the preconditioner, from an iterative solver.
        residual_used: whether the sample-space residual e was found to belong to g, and used.
    """

    dead: Array
    rank: Array | None = None
    iterations: Array | None = None
    residual: Array | None = None
    residual_used: Array | None = None


class Solution(NamedTuple):
    """The result of a solve.

    Attributes:
        value: the direction d = (G + λD)⁻¹g, with the structure and dtypes of g.
        converged: whether d is finite and, from an iterative solver, within its tolerance.
        stats: `Stats`.
    """

    value: PyTree
    converged: Array
    stats: Stats


def solution(space: Space, direction: Array, rhs: PyTree, dead: Array, **stats: Any) -> Solution:
    """The flat direction as a `Solution` shaped like the right-hand side."""
    value = cast_like(space.unravel(direction), rhs)
    # Of g as well: a coordinate without curvature would hide that its entry is not finite.
    fine = all_finite(value) & all_finite(rhs)
    return Solution(value, fine, Stats(jnp.asarray(dead, jnp.int32), **stats))


def divide(numerator: Array | float, denominator: Array) -> Array:
    """numerator / denominator, and 0 where the denominator is 0."""
    return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


def diagonal_matrix(entries: Array, dtype: Any) -> Array:
    """diag(entries), written so that XLA fuses it with what it is added to instead of storing it."""
    return jnp.where(jnp.eye(entries.shape[0], dtype=bool), entries[:, None], 0).astype(dtype)


def strength_of(rule: Rule, strength: Number | None, dtype: Any) -> Array:
    """λ: the one of this call, or else the rule's own; NaN for a traced one that is negative."""
    strength = jnp.asarray(rule.strength if strength is None else strength, dtype)
    return jnp.where(strength >= 0, strength, jnp.nan)


def least(size: int, dtype: Any) -> Rule:
    """relative(8·p·eps), the least that keeps a singular G factorisable."""
    return damping_rules.Relative(8 * max(size, 1) * float(jnp.finfo(dtype).eps))


def require(operator: Operator, kinds: tuple[type, ...], solver: str, cure: str) -> None:
    """A `TypeError` with the cure unless the operator is one of `kinds`."""
    if not isinstance(operator, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"solvers.{solver}: expected an operator {wanted}, got {type(operator).__name__}. {cure}")


class Frame(NamedTuple):
    """Coordinates y = size·root·x in which the damping's D is the identity and G has diagonal entries of at most 1.

    G = diag(root) M diag(root)·size², (M + λ/size²) y = into(g), x = out(y).

    Attributes:
        space: of the parameters.
        scale: √G_ii.
        root: √D_ii, (p,); or one number for all, if `scale` is left for `apply` to find.
        size: what the units of G and λ have that those of M have not.
        rule: the damping.
    """

    space: Space
    scale: Array | None
    root: Array
    size: Array
    rule: Rule

    @classmethod
    def of(cls, operator: Operator, rule: Rule) -> "Frame":
        """The frame of an operator and a rule."""
        scale = operator.scale()
        root = rule.root(scale, operator.space)
        return cls(operator.space, scale, root, jnp.max(divide(scale, root), initial=0.0), rule)

    def into(self, g: Array) -> Array:
        """A gradient in this frame."""
        return divide(divide(g, self.root), self.size)

    def out(self, y: Array) -> Array:
        """A direction of this frame in the parameters' own units."""
        return divide(divide(y, self.size), self.root)

    def damping(self, strength: Number | None) -> Array:
        """λ/size²; by two divisions, since the square may underflow."""
        return divide(divide(strength_of(self.rule, strength, self.size.dtype), self.size), self.size)

    def finish(self, y: Array, rhs: PyTree, strength: Number | None, fine: Any = True, **stats: Any) -> Solution:
        """The solution from its coordinates in this frame; not finite unless `fine` and λ is a number ≥ 0."""
        assert self.scale is not None
        strength = strength_of(self.rule, strength, self.size.dtype)
        # A matrix of zeros: no curvature to divide by but λ itself.
        g = self.space.ravel(rhs)
        empty = divide(divide(divide(g, self.root), self.root), jnp.broadcast_to(strength, g.shape))
        # Comparisons with NaN are false, and would keep no direction: a plausible 0. A coordinate with curvature and
        # without a D is not to be seen in this frame.
        fine = fine & jnp.isfinite(strength) & jnp.isfinite(self.size) & jnp.all(jnp.isfinite(self.scale))
        fine = fine & ~jnp.any((self.root == 0) & (self.scale > 0))
        direction = jnp.where(self.size > 0, self.out(y), empty) + jnp.where(fine, 0, jnp.nan).astype(self.size.dtype)
        dead = jnp.sum((self.root == 0) | ((self.scale == 0) & (strength == 0)))
        return solution(self.space, direction, rhs, dead, **stats)
