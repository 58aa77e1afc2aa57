"""Solvers on the (p, p) matrix: Cholesky and eigenvectors."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve

from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, diagonal, is_complex
from natgrad_jax.damping import Number, Rule
from natgrad_jax.operators import Operator
from natgrad_jax.solvers import small
from natgrad_jax.solvers.shared import Frame, Solution, divide, least, solution, strength_of


class CholeskyFactored(NamedTuple):
    """G = diag(frame) M diag(frame), frame None for 1; `lower` is the factor for the rule's own λ, None for small p."""

    operator: Operator
    frame: Array | None
    matrix: Array
    rule: Rule
    lower: Array | None


@jax.tree_util.register_static
@dataclass(frozen=True)
class Cholesky:
    """See `cholesky`."""

    def factor(self, operator: Operator, rule: Rule | None) -> CholeskyFactored:
        """The Cholesky factor of the damped matrix; O(p³/3) and the cost of the matrix."""
        frame, matrix = operator.balanced()
        rule = least(matrix.shape[-1], matrix.dtype) if rule is None else rule
        factored = CholeskyFactored(operator, frame, matrix, rule, None)
        return factored if _small(matrix) else factored._replace(lower=_lower(*_damped(factored, None)[1:]))

    def apply(
        self, factored: CholeskyFactored, rhs: PyTree, strength: Number | None = None, **unused: object
    ) -> Solution:
        """d by two triangular solves; another `strength` than the rule's own factorises again."""
        space = factored.operator.space
        space.check(rhs, "rhs")
        total, damped, pivots = _damped(factored, strength)
        scaled = space.ravel(rhs) if total is None else divide(space.ravel(rhs), total)
        if _small(damped):
            direction = _one_or_many(damped, pivots, scaled)
        else:
            lower = factored.lower
            lower = _lower(damped, pivots) if lower is None or strength is not None else lower
            direction = _substituted(lower, pivots, scaled)
        direction = direction if total is None else divide(direction, total)
        return solution(space, direction, rhs, jnp.sum(pivots == 0))


def _substituted(lower: Array, pivots: Array, g: Array) -> Array:
    return cho_solve((lower, True), jnp.where(pivots == 0, 0, g))


@jax.custom_batching.custom_vmap
def _one_or_many(damped: Array, pivots: Array, g: Array) -> Array:
    """One small system by LAPACK, which compiles in no time; many of them, under `vmap`, by unrolled elimination."""
    return _substituted(_lower(damped, pivots), pivots, g)


@_one_or_many.def_vmap
def _many(_: int, in_batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
    return jax.vmap(small.solve, [0 if batched else None for batched in in_batched])(*arrays), True


def _small(matrix: Array) -> bool:
    return matrix.shape[-1] <= small.LARGEST and not is_complex(matrix.dtype)


def _damped(factored: CholeskyFactored, strength: Number | None) -> tuple[Array | None, Array, Array]:
    """`total`, M and `pivots` with G + λD = diag(total) (M, with `pivots` for its diagonal) diag(total); None for 1."""
    operator, frame, matrix, rule, _ = factored
    pivots = diagonal(matrix).real
    strength = strength_of(rule, strength, pivots.dtype)
    if frame is None:
        # The same relative change of the diagonal in every unit; elimination itself does not care about units.
        return None, matrix, pivots + strength * damping_rules.squares(rule, pivots, operator.space)
    added = jnp.sqrt(strength) * rule.root(frame * jnp.sqrt(pivots), operator.space)
    total = jnp.maximum(frame, added)
    ratio = divide(frame, total)
    damped = pivots * jnp.square(ratio) + jnp.square(divide(added, total))
    return total, matrix * ratio[:, None] * ratio[None, :], damped


def _lower(damped: Array, pivots: Array) -> Array:
    # A dead coordinate keeps its place with a pivot of 1. g/∞ is a plausible 0, and would hide that G is not finite.
    positive = jnp.where(pivots == 0, 1, jnp.where(pivots < jnp.inf, pivots, jnp.nan))
    # LAPACK walks along columns: the (conjugate) transpose, which is the same matrix, saves a copy.
    replaced = jnp.where(jnp.eye(pivots.size, dtype=bool), positive[:, None].astype(damped.dtype), damped.conj().T)
    return jax.lax.linalg.cholesky(replaced, symmetrize_input=False)


class EighFactored(NamedTuple):
    """V diag(w) Vᴴ in the frame, whatever λ is."""

    frame: Frame
    values: Array
    vectors: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class Eigh:
    """See `eigh`."""

    def factor(self, operator: Operator, rule: Rule | None) -> EighFactored:
        """Eigenvectors in the frame in which D is the identity; about 9p³ and the cost of the matrix."""
        frame = Frame.of(operator, damping_rules.Relative(0.0) if rule is None else rule)
        balance, matrix = operator.balanced()
        # Two factors near 1 where one product of scales might overflow.
        inverse = divide(divide(jnp.ones((), frame.size.dtype) if balance is None else balance, frame.root), frame.size)
        values, vectors = jnp.linalg.eigh(matrix * inverse[:, None] * inverse[None, :])
        return EighFactored(frame, values, vectors)

    def apply(self, factored: EighFactored, rhs: PyTree, strength: Number | None = None, **unused: object) -> Solution:
        """d for any λ in O(p²)."""
        frame, values, vectors = factored
        frame.space.check(rhs, "rhs")
        cut = values.size * jnp.finfo(values.dtype).eps * jnp.max(values, initial=0.0)
        damped = jnp.maximum(values, 0) + frame.damping(strength)
        kept = damped > cut
        scaled = vectors.conj().T @ frame.into(frame.space.ravel(rhs))
        inner = vectors @ jnp.where(kept, scaled / jnp.where(kept, damped, 1), 0)
        # An indefinite matrix is no metric: dropping the negative part would be a plausible step.
        definite = jnp.min(values + frame.damping(strength), initial=0.0) >= -8 * cut
        rank = jnp.sum(values > cut).astype(jnp.int32)
        return frame.finish(inner, rhs, strength, definite & jnp.all(jnp.isfinite(values)), rank=rank)


def cholesky() -> Cholesky:
    """Cholesky factorisation of G + λD, for any operator. O(p³/3), and the cost of the (p, p) matrix.

    Its rounding errors are those of the matrix scaled to unit diagonal, whatever the units (van der Sluis 1969).
    Default damping: relative(8·p·eps), the least that keeps a singular G factorisable; on a singular G use `eigh` for
    the minimum-norm answer to full precision. Under `vmap` the elimination is unrolled up to p = 14, which is several
    times faster on many small problems than a batched factorisation, and compiles in up to two seconds.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Gram(jnp.array([[2.0, 0.0], [0.0, 1.0]]))
        >>> [round(float(x), 4) for x in ng.solvers.solve(G, jnp.array([4.0, 1.0]), solver=ng.solvers.cholesky()).value]
        [1.0, 1.0]
    """
    return Cholesky()


def eigh() -> Eigh:
    """Minimum-norm solution by eigenvectors, for any operator; reports the rank. About 9p³.

    It acts in the frame in which the damping's D is the identity (`relative` and None: the unit-diagonal scaled G), so
    that on a singular G the answer has minimum norm in the damping's metric: Moore–Penrose for `absolute`. Directions
    with w + λ ≤ p·eps·max(w) are left out. Default damping: none. One factorisation serves every λ.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Dense(jnp.array([[1.0, 1.0], [1.0, 1.0]]))
        >>> solution = ng.solvers.solve(G, jnp.array([2.0, 2.0]), solver=ng.solvers.eigh())
        >>> [round(float(x), 4) for x in solution.value], int(solution.stats.rank)
        ([1.0, 1.0], 1)
    """
    return Eigh()
