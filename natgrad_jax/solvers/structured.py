"""Solvers that take the structure as it is: a diagonal, a closed form, Kronecker factors."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, all_finite, cast_like, surely
from natgrad_jax.damping import Number, Rule
from natgrad_jax.operators import Closed, Diagonal, Kronecker, Operator
from natgrad_jax.solvers.shared import Frame, Solution, Stats, divide, require, solution, strength_of


@jax.tree_util.register_static
@dataclass(frozen=True)
class DiagonalSolver:
    """See `diagonal`."""

    def factor(self, operator: Operator, rule: Rule | None) -> Any:
        """√G_ii, √D_ii and the rule; O(p)."""
        require(
            operator, (Diagonal,), "diagonal", "For the diagonal of any operator use Diagonal(operator.diagonal())."
        )
        rule, scale = damping_rules.Relative(0.0) if rule is None else rule, operator.scale()
        return operator, scale, rule.root(scale, operator.space), rule

    def apply(self, factored: Any, rhs: PyTree, strength: Number | None = None, **unused: object) -> Solution:
        """d_i = g_i / (G_ii + λD_ii); O(p)."""
        operator, scale, root, rule = factored
        space = operator.space
        space.check(rhs, "rhs")
        total = jnp.hypot(scale, jnp.sqrt(strength_of(rule, strength, scale.dtype)) * root)
        # g/∞ is a plausible 0, and would hide that G is not finite.
        inverse = jnp.where(jnp.isfinite(total), divide(1, total), jnp.nan)
        # Leaf by leaf, since real and complex parameters may stand side by side; twice, since a square may overflow.
        value = jax.tree.map(lambda g, u: g * u * u, rhs, space.unravel(inverse))
        value = cast_like(value, rhs)
        return Solution(value, all_finite(value), Stats(jnp.sum(total == 0).astype(jnp.int32)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class ClosedSolver:
    """See `closed`."""

    def factor(self, operator: Operator, rule: Rule | None) -> Any:
        """The operator itself."""
        require(operator, (Closed,), "closed", "Leave solver=None to have one chosen.")
        if operator.solve is None:
            raise TypeError("solvers.closed: this operator has products only; use solvers.cg() or solvers.cholesky()")
        if rule is not None and not surely(rule.strength, lambda x: x == 0):
            raise TypeError(
                f"damping: a closed-form solve has no damping, got {rule}. "
                "Use damping=None, solvers.cholesky(), which builds the matrix, or solvers.cg()."
            )
        return operator

    def apply(self, factored: Any, rhs: PyTree, strength: Number | None = None, **unused: object) -> Solution:
        """d = G⁺g by the operator's own formula."""
        if strength is not None:
            raise TypeError("damping: a closed-form solve has no damping; leave out damping= here")
        space = factored.space
        space.check(rhs, "rhs")
        return solution(space, space.ravel(factored.solve(rhs)), rhs, jnp.asarray(0))


class KroneckerFactored(NamedTuple):
    """For each leaf the eigenvalues and eigenvectors of both factors, in the frame in which D is the identity."""

    operator: Kronecker
    frame: Frame
    pairs: list[tuple[tuple[Array, Array], tuple[Array, Array]]]


@jax.tree_util.register_static
@dataclass(frozen=True)
class KroneckerSolver:
    """See `kronecker`."""

    def factor(self, operator: Operator, rule: Rule | None) -> KroneckerFactored:
        """Two eigenvector problems a leaf; O(a³ + b³)."""
        require(operator, (Kronecker,), "kronecker", "Leave solver=None to have one chosen.")
        if isinstance(rule, damping_rules.Metric):
            raise TypeError(
                "damping: a metric of your own need not be a product over the two factors; use relative, absolute, "
                "trace or layered damping, or solvers.cholesky(), which builds the matrix"
            )
        for (_, b), shape in zip(operator.blocks(), operator.space.shapes, strict=True):
            if isinstance(rule, damping_rules.Layered) and len(shape) > 1 and b != shape[-1]:
                raise TypeError(
                    f"damping: layered damping sets the last axis of a parameter of shape {shape} against the others, "
                    f"the right factor is of size {b}; use relative damping, or a factor for that axis"
                )
        frame = Frame.of(operator, damping_rules.Relative(0.0) if rule is None else rule)
        leaves = jax.tree.leaves(operator.space.unravel(frame.root))
        pairs = []
        for (left, right), leaf in zip(operator.factors(), leaves, strict=True):
            # The root of D is a product as well: a column times a row.
            table = leaf.reshape(left.shape[-1], right.shape[-1])
            column = jnp.max(table, axis=1, initial=0.0)
            row = divide(jnp.max(table, axis=0, initial=0.0), jnp.max(table, initial=0.0))
            pairs.append((_eigh(left, divide(1, column)), _eigh(right, divide(1, row))))
        return KroneckerFactored(operator, frame, pairs)

    def apply(
        self, factored: KroneckerFactored, rhs: PyTree, strength: Number | None = None, **unused: object
    ) -> Solution:
        """d for any λ in O(ab(a + b)) a leaf."""
        _, frame, pairs = factored
        frame.space.check(rhs, "rhs")
        scaled = jax.tree.leaves(frame.space.unravel(frame.into(frame.space.ravel(rhs))))
        # Two divisions, since the square may underflow.
        tables = [jnp.outer(divide(v, frame.size), divide(w, frame.size)) for (v, _), (w, _) in pairs]
        largest = jnp.max(jnp.stack([jnp.max(x, initial=0.0) for x in tables])) if tables else jnp.zeros(())
        cut = frame.space.size * jnp.finfo(frame.size.dtype).eps * largest
        parts, definite = [], jnp.asarray(True)
        for ((_, left), (_, right)), table, g in zip(pairs, tables, scaled, strict=True):
            damped = jnp.maximum(table, 0) + frame.damping(strength)
            kept = damped > cut
            inner = left.conj().T @ g.reshape(table.shape) @ right.conj()
            solved = jnp.where(kept, inner / jnp.where(kept, damped, 1), 0)
            parts.append(left @ solved @ right.T)
            definite &= jnp.min(table + frame.damping(strength), initial=0.0) >= -8 * cut
            definite &= jnp.all(jnp.isfinite(table))
        y = jnp.concatenate([frame.root[:0], *(part.ravel() for part in parts)])
        rank = sum((jnp.sum(table > cut) for table in tables), start=jnp.asarray(0))
        return frame.finish(y, rhs, strength, definite, rank=rank.astype(jnp.int32))


def _eigh(factor: Array, inverse: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(factor * inverse[:, None] * inverse[None, :])
    return values, vectors


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


def kronecker() -> KroneckerSolver:
    """Exact solve of A ⊗ B + λD for each leaf, by eigenvectors of both factors; for `Kronecker`. O(a³ + b³) a leaf.

    D is diag(A) ⊗ diag(B) (relative, layered) or a multiple of the identity (absolute, trace). Minimum norm and rank
    as in `eigh`. Default damping: none. One factorisation serves every λ.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Kronecker(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([[3.0]]))
        >>> solution = ng.solvers.solve(G, jnp.array([[6.0], [3.0]]), solver=ng.solvers.kronecker())
        >>> [round(float(x), 4) for x in solution.value.ravel()]
        [1.0, 0.0]
    """
    return KroneckerSolver()
