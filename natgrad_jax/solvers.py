"""Solvers: how (G + λD)⁻¹g is applied. A solver is a choice, an operator is data.

Every solver is a frozen static pytree with two parts, so that one factorisation can serve many right-hand sides:

    factored = solver.factor(operator, rule)            rule: a damping rule, or None for as little as possible
    solution = solver.apply(factored, rhs, strength)    strength: λ in place of the rule's own, or None

Structure that does not fit is a `TypeError` when the program is built; numerical trouble is data in the `Solution`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve

from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, Space, cast_like, concrete
from natgrad_jax.damping import Number, Rule
from natgrad_jax.operators import Closed, Dense, Diagonal, Gram, Operator


class Stats(NamedTuple):
    """What a solve noticed.

    Attributes:
        dead: number of coordinates with (G + λD)_ii = 0; their step is 0.
        rank: numerical rank of G, or None from a solver that does not know it.
    """

    dead: Array
    rank: Array | None


class Solution(NamedTuple):
    """The result of a solve.

    Attributes:
        value: the direction d = (G + λD)⁻¹g, with the structure and dtypes of g.
        converged: whether d is finite.
        stats: `Stats`.
    """

    value: PyTree
    converged: Array
    stats: Stats


def solve(operator: Operator, rhs: PyTree, *, solver: Any = None, damping: "Rule | Number | None" = 0.0) -> Solution:
    """Solves (G + λD) d = g.

    Args:
        operator: G.
        rhs: g, a vector of the operator's space.
        solver: one of this module; None picks by structure, see `auto`.
        damping: a number means `relative`; None means as little as the solver's arithmetic allows.

    Returns:
        `Solution(value, converged, stats)`; a singular system gives `converged=False`, never an exception.

    Raises:
        TypeError: the solver cannot use this operator or this damping; the message names the cure.
        ValueError: `rhs` does not have the structure of the operator's space.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Dense(jnp.array([[2.0, 0.0], [0.0, 4.0]]))
        >>> [round(float(x), 6) for x in ng.solvers.solve(G, jnp.array([2.0, 2.0])).value]
        [1.0, 0.5]
    """
    solver = auto() if solver is None else solver
    getattr(operator, "space", Space.of(rhs)).check(rhs, "rhs")
    return solver.apply(solver.factor(operator, damping_rules.as_rule(damping)), rhs)


def _solution(space: Space, direction: Array, rhs: PyTree, dead: Array, rank: Array | None = None) -> Solution:
    value = cast_like(space.unravel(direction), rhs)
    return Solution(value, jnp.all(jnp.isfinite(direction)), Stats(jnp.asarray(dead, jnp.int32), rank))


def _divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0 where the denominator is 0."""
    return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


def _damped_scale(scale: Array, rule: Rule | None, strength: Number | None) -> Array:
    """√(G_ii + λD_ii), without squaring either."""
    if rule is None:
        rule = damping_rules.Relative(0.0)
    strength = rule.strength if strength is None else strength
    return jnp.hypot(scale, jnp.sqrt(jnp.asarray(strength, scale.dtype)) * rule.root(scale))


def _require(operator: Operator, kinds: tuple[type, ...], solver: str, cure: str) -> None:
    if not isinstance(operator, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"solvers.{solver}: expected an operator {wanted}, got {type(operator).__name__}. {cure}")


@jax.tree_util.register_static
@dataclass(frozen=True)
class DiagonalSolver:
    """See `diagonal`."""

    def factor(self, operator: Operator, rule: Rule | None) -> Any:
        """√G_ii and the rule; O(p)."""
        _require(
            operator, (Diagonal,), "diagonal", "For the diagonal of any operator use Diagonal(operator.diagonal())."
        )
        return operator, jnp.sqrt(operator.space.ravel(operator.entries)), rule

    def apply(self, factored: Any, rhs: PyTree, strength: Number | None = None) -> Solution:
        """d_i = g_i / (G_ii + λD_ii); O(p)."""
        operator, scale, rule = factored
        space = operator.space
        space.check(rhs, "rhs")
        total = _damped_scale(scale, rule, strength)
        direction = _divide(_divide(space.ravel(rhs), total), total)
        # g/∞ is a plausible 0, and would hide that G is not finite.
        return _solution(space, jnp.where(jnp.isfinite(total), direction, jnp.nan), rhs, jnp.sum(total == 0))


@jax.tree_util.register_static
@dataclass(frozen=True)
class ClosedSolver:
    """See `closed`."""

    def factor(self, operator: Operator, rule: Rule | None) -> Any:
        """The operator itself."""
        _require(operator, (Closed,), "closed", "Leave solver=None to have one chosen.")
        if rule is not None and not (concrete(rule.strength) and rule.strength == 0):
            raise TypeError(
                "damping: a closed-form solve has no damping, got "
                f"{rule}. Use damping=None, or solvers.cholesky() on operators.Dense(operator.dense(), operator.space)."
            )
        return operator

    def apply(self, factored: Any, rhs: PyTree, strength: Number | None = None) -> Solution:
        """d = G⁺g by the operator's own formula."""
        if strength is not None:
            raise TypeError("damping: a closed-form solve has no damping; leave out damping= here")
        space = factored.space
        space.check(rhs, "rhs")
        return _solution(space, space.ravel(factored.solve(rhs)), rhs, jnp.asarray(0))


class CholeskyFactored(NamedTuple):
    """(G + λD) = diag(total) L Lᵀ diag(total), beside what another λ needs."""

    operator: Operator
    scale: Array
    unit: Array
    rule: Rule
    total: Array
    lower: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class Cholesky:
    """See `cholesky`."""

    def factor(self, operator: Operator, rule: Rule | None) -> CholeskyFactored:
        """The Cholesky factor of the damped, unit-diagonal matrix; O(p³/3) and the cost of the matrix."""
        _require(
            operator, (Dense, Gram), "cholesky", "Leave solver=None, or pass Dense(operator.dense(), operator.space)."
        )
        scale, unit = operator.unit_diagonal()
        if rule is None:
            rule = damping_rules.Relative(8 * max(scale.size, 1) * float(jnp.finfo(scale.dtype).eps))
        return CholeskyFactored(operator, scale, unit, rule, *self._lower(scale, unit, rule, None))

    def apply(self, factored: CholeskyFactored, rhs: PyTree, strength: Number | None = None) -> Solution:
        """d by two triangular solves; another `strength` than the rule's own factorises again."""
        space, total, lower = factored.operator.space, factored.total, factored.lower
        space.check(rhs, "rhs")
        if strength is not None:
            total, lower = self._lower(factored.scale, factored.unit, factored.rule, strength)
        scaled = _divide(space.ravel(rhs), total)
        return _solution(space, _divide(cho_solve((lower, True), scaled), total), rhs, jnp.sum(total == 0))

    @staticmethod
    def _lower(scale: Array, unit: Array, rule: Rule, strength: Number | None) -> tuple[Array, Array]:
        total = _damped_scale(scale, rule, strength)
        ratio = _divide(scale, total)
        damped = unit * ratio[:, None] * ratio[None, :]
        diagonal = jnp.where(jnp.isfinite(total), 1, jnp.nan).astype(damped.dtype)
        return total, jnp.linalg.cholesky(jnp.fill_diagonal(damped, diagonal, inplace=False))


class EighFactored(NamedTuple):
    """G = diag(root) V diag(w) Vᵀ diag(root) · size², whatever λ is."""

    operator: Operator
    scale: Array
    root: Array
    size: Array
    values: Array
    vectors: Array
    rule: Rule


@jax.tree_util.register_static
@dataclass(frozen=True)
class Eigh:
    """See `eigh`."""

    def factor(self, operator: Operator, rule: Rule | None) -> EighFactored:
        """Eigenvectors in the frame in which D is the identity; about 9p³ and the cost of the matrix."""
        _require(operator, (Dense, Gram), "eigh", "Leave solver=None, or pass Dense(operator.dense(), operator.space).")
        rule = damping_rules.Relative(0.0) if rule is None else rule
        scale, unit = operator.unit_diagonal()
        root = rule.root(scale)
        ratio = _divide(scale, root)
        size = jnp.max(ratio, initial=0.0)
        ratio = _divide(ratio, size)
        values, vectors = jnp.linalg.eigh(unit * ratio[:, None] * ratio[None, :])
        return EighFactored(operator, scale, root, size, values, vectors, rule)

    def apply(self, factored: EighFactored, rhs: PyTree, strength: Number | None = None) -> Solution:
        """d for any λ in O(p²)."""
        operator, scale, root, size, values, vectors, rule = factored
        space = operator.space
        space.check(rhs, "rhs")
        strength = jnp.asarray(rule.strength if strength is None else strength, values.dtype)
        cut = values.size * jnp.finfo(values.dtype).eps * jnp.max(values, initial=0.0)
        # λ in units of size², by two divisions: the square may underflow.
        damped = jnp.maximum(values, 0) + _divide(_divide(strength, size), size)
        scaled = _divide(_divide(space.ravel(rhs), root), size)
        kept = damped > cut
        inner = jnp.where(kept, (vectors.T @ scaled) / jnp.where(kept, damped, 1), 0)
        direction = _divide(_divide(vectors @ inner, size), root)
        # A matrix of zeros: no curvature to divide by but λ itself.
        empty = _divide(_divide(_divide(space.ravel(rhs), root), root), jnp.broadcast_to(strength, root.shape))
        # Comparisons with NaN are false, and would keep no direction: a plausible 0. So would an indefinite matrix.
        definite = jnp.min(values + _divide(_divide(strength, size), size), initial=0.0) >= -8 * cut
        bad = jnp.where(definite & jnp.isfinite(strength) & (strength >= 0) & jnp.all(jnp.isfinite(values)), 0, jnp.nan)
        dead = jnp.sum((root == 0) | ((scale == 0) & (strength == 0)))
        return _solution(
            space, jnp.where(size > 0, direction, empty) + bad, rhs, dead, jnp.sum(values > cut).astype(jnp.int32)
        )


@jax.tree_util.register_static
@dataclass(frozen=True)
class Auto:
    """See `auto`."""

    def choose(self, operator: Operator) -> Any:
        """The solver for this operator, by its structure alone."""
        for kind, solver in ((Diagonal, diagonal()), (Closed, closed()), ((Dense, Gram), cholesky())):
            if isinstance(operator, kind):
                return solver
        raise TypeError(
            f"operator: expected Diagonal, Dense, Gram or Closed of natgrad_jax.operators, "
            f"got {type(operator).__name__}. A metric returns an operator; wrap a matrix as operators.Dense(matrix)."
        )

    def factor(self, operator: Operator, rule: Rule | None) -> Any:
        """The factorisation of the chosen solver."""
        return operator, self.choose(operator).factor(operator, rule)

    def apply(self, factored: Any, rhs: PyTree, strength: Number | None = None) -> Solution:
        """The solution of the chosen solver."""
        operator, inner = factored
        return self.choose(operator).apply(inner, rhs, strength)


def diagonal() -> DiagonalSolver:
    """d_i = g_i / (G_ii + λD_ii), for `Diagonal`. Exact, O(p). Default damping: none.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Diagonal(jnp.array([4.0, 0.0]))
        >>> solution = ng.solvers.solve(G, jnp.array([4.0, 1.0]), solver=ng.solvers.diagonal())
        >>> solution.value.tolist(), int(solution.stats.dead)
        ([1.0, 0.0], 1)
    """
    return DiagonalSolver()


def closed() -> ClosedSolver:
    """d = G⁺g by the formula that a `Closed` operator brings along. No damping.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(1)
        >>> params = family.init(scale=2.0)
        >>> solution = ng.solvers.solve(family.fisher(params), params, solver=ng.solvers.closed())
        >>> solution.value.scale_tril.tolist()
        [[4.0]]
    """
    return ClosedSolver()


def cholesky() -> Cholesky:
    """Cholesky factorisation of the unit-diagonal scaled G + λD, for `Dense` and `Gram`. O(p³/3).

    The scaling makes the result independent of units to rounding. Default damping: relative(8·p·eps), the least that
    keeps a singular G factorisable; on a singular G use `eigh` for the minimum-norm answer to full precision.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Gram(jnp.array([[2.0, 0.0], [0.0, 1.0]]))
        >>> ng.solvers.solve(G, jnp.array([4.0, 1.0]), solver=ng.solvers.cholesky()).value.tolist()
        [1.0, 1.0]
    """
    return Cholesky()


def eigh() -> Eigh:
    """Minimum-norm solution by eigenvectors, for `Dense` and `Gram`; reports the rank. About 9p³.

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


def auto() -> Auto:
    """The exact solver for the operator's structure: `Diagonal` → diagonal, `Closed` → closed, else cholesky.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> ng.solvers.auto().choose(ng.operators.Dense(jnp.eye(2)))
        Cholesky()
    """
    return Auto()
