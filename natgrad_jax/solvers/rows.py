"""Solvers on the rows A of G = AᴴA, which never form a (p, p) matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve

from natgrad_jax import _tree
from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, real_dtype
from natgrad_jax.damping import Number, Rule
from natgrad_jax.operators import Gram, LowRank, Operator
from natgrad_jax.solvers.shared import (
    Frame,
    Solution,
    diagonal_matrix,
    divide,
    least,
    require,
    solution,
    strength_of,
)

REFINEMENTS = 2  # of e, when it has to be recovered from g
PIVOT = 16  # roundings, below which a pivot of the kernel says nothing
SLACK = 16  # roundings, in units of eps times the root-mean-square size of the terms that cancel


class RowsInFrame(NamedTuple):
    """B = A diag(1/(root·size)), the rows in the frame in which D is the identity; kept as A and the frame."""

    gram: Gram
    frame: Frame

    @property
    def inverse(self) -> Array:
        """1/(root·size), (p,) or one number for all."""
        return self.frame.out(jnp.ones_like(self.frame.root))

    def times(self, y: Array) -> Array:
        """By, shape (n,)."""
        return self.gram.times(self.gram.space.unravel(self.frame.out(y)))

    def transposed_times(self, u: Array) -> Array:
        """Bᴴu, shape (p,)."""
        return self.gram.space.ravel(self.gram.transposed_times(u)) * self.inverse

    def seen(self, strength: Number | None) -> Frame:
        """The frame with its scale; where D is one number, λ = 0 alone asks for it: what has no curvature is dead."""
        if self.frame.scale is not None:
            return self.frame
        strength = self.frame.rule.strength if strength is None else strength
        ones = jnp.ones(self.gram.space.size, self.frame.size.dtype)
        if _tree.surely(strength, lambda x: x > 0):
            return self.frame._replace(scale=ones)
        needed = _tree.in_any_lane(jnp.asarray(strength) == 0)
        return self.frame._replace(scale=jax.lax.cond(needed, self.gram.scale, lambda: ones))

    def rounding(self, g: Array, e: Array, lengths: Array) -> Array:
        """The length that Bᴴe − g has from rounding alone, in the rows (of these lengths), in e and in g."""
        return SLACK * jnp.finfo(g.dtype).eps * (_tree.norm(g) + _tree.norm(e * lengths))

    def matching(self, g: Array, residual: Array | None, lengths: Array) -> tuple[Array, Array]:
        """c·e and whether g = c·Bᴴe: a chain may have changed g since e was computed, if only by a factor c.

        Nor is an e used that is large where its rows are small (a saturated loss): what a solver mixes it with would
        take up its rounding.
        """
        if residual is None:
            return jnp.zeros(self.gram.n, g.dtype), jnp.asarray(False)
        size = _tree.largest(residual)
        size = jnp.where(size > 0, size, 1)
        # Of the residual as it is: who made g from it has this product already, and XLA sees that they are one.
        e, h = residual.astype(g.dtype) / size, self.transposed_times(residual) / size
        c = divide(jnp.vdot(h, g), jnp.vdot(h, h).real)
        e = c * e
        mixed = _tree.norm(e) * _tree.norm(lengths) / max(self.gram.n, 1) ** 0.5
        harmless = jnp.finfo(g.dtype).eps ** 0.5 * mixed <= _tree.norm(g)
        return e, (_tree.norm(g - c * h) <= self.rounding(g, e, lengths)) & harmless


class RowSpaceFactored(NamedTuple):
    """K = BBᴴ, and the Cholesky factor of K + λ for the rule's own λ."""

    rows: RowsInFrame
    kernel: Array
    lower: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class RowSpace:
    """See `row_space`."""

    def factor(self, operator: Operator, rule: Rule | None) -> RowSpaceFactored:
        """The (n, n) matrix K = A D⁻¹Aᴴ, O(n²p), and its Cholesky factor, O(n³/3)."""
        require(operator, (Gram,), "row_space", "Rows are what it works on; for LowRank use solvers.woodbury().")
        if operator.n > operator.space.size:
            raise TypeError(
                f"solvers.row_space: {operator.n} rows on {operator.space.size} parameters make a singular kernel; use "
                " solvers.cholesky(), or solvers.qr() for accuracy"
            )
        rule = least(operator.space.size, operator.space.dtype) if rule is None else rule
        if isinstance(rule, damping_rules.Absolute | damping_rules.Trace):
            rows, kernel = _in_one_unit(operator, rule)
        else:
            rows = RowsInFrame(operator, Frame.of(operator, rule))
            kernel = operator.kernel(rows.inverse, rank_one=isinstance(rule, damping_rules.Layered))
        return RowSpaceFactored(rows, kernel, _shifted_lower(kernel, rows.frame.damping(None)))

    def apply(
        self,
        factored: RowSpaceFactored,
        rhs: PyTree,
        strength: Number | None = None,
        *,
        residual: Array | None = None,
        **unused: object,
    ) -> Solution:
        """d = D⁻¹Aᴴ(K + λ)⁻¹e; another `strength` than the rule's own factorises K + λ again."""
        rows, kernel, lower = factored
        frame = rows.frame
        frame.space.check(rhs, "rhs")
        damping = frame.damping(strength)
        lower = lower if strength is None else _shifted_lower(kernel, damping)
        solve = lambda u: cho_solve((lower, True), u)  # noqa: E731
        g = frame.into(frame.space.ravel(rhs))
        size = _tree.largest(g)
        g = g / jnp.where(size > 0, size, 1)
        lengths = jnp.sqrt(jnp.maximum(jnp.real(_tree.diagonal(kernel)), 0))
        residual = rows.gram.residual if residual is None else residual
        known, used = rows.matching(g, residual, lengths)
        given = known, jnp.zeros_like(g)

        def recover() -> tuple[Array, Array]:
            found = _recovered(rows, solve, g, damping, lengths)
            return jax.tree.map(lambda x, y: jnp.where(used, x, y), given, found)

        e, rest = recover() if residual is None else jax.lax.cond(_tree.in_any_lane(~used), recover, lambda: given)
        y = rows.transposed_times(solve(e)) + rest
        solution = rows.seen(strength).finish(size * y, rhs, strength, residual_used=used)
        # Dependent rows: a pivot that is all rounding makes a plausible step, of which nothing is known.
        pivots = jnp.square(jnp.real(_tree.diagonal(lower)))
        least_pivot = PIVOT * jnp.finfo(pivots.dtype).eps * (jnp.real(_tree.diagonal(kernel)) + damping)
        return solution._replace(converged=solution.converged & jnp.all(pivots >= least_pivot))


def _in_one_unit(gram: Gram, rule: damping_rules.Absolute | damping_rules.Trace) -> tuple[RowsInFrame, Array]:
    """Rows and kernel where D is one number: a bound is as good as the lengths of the columns, which take a pass.

    Rows that are outer products are not made in such units.
    """
    bound = gram.bound()
    kernel = gram.kernel(divide(1, bound))
    root = jnp.ones_like(bound)
    if isinstance(rule, damping_rules.Trace):
        relative = _tree.root(jnp.sum(jnp.real(_tree.diagonal(kernel))) / max(gram.space.size, 1))
        root = bound * relative if rule.mean is None else jnp.asarray(rule.mean, bound.dtype)
    return RowsInFrame(gram, Frame(gram.space, None, root, divide(bound, root), rule)), kernel


def _recovered(
    rows: RowsInFrame, solve: Callable[[Array], Array], g: Array, damping: Array, lengths: Array
) -> tuple[Array, Array]:
    """e with g ≈ Bᴴe, and (BᴴB + λ)⁻¹ of what of g is not of this form."""

    def refined(_: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
        # From what is left of g itself: the kernel has squared the condition number, and would stop short.
        e = found[0] + solve(rows.times(found[1]))
        return e, g - rows.transposed_times(e)

    e, rest = jax.lax.fori_loop(0, 1 + REFINEMENTS, refined, (jnp.zeros(rows.gram.n, g.dtype), g))
    # Woodbury on the rest alone: on all of g it would cancel, since 1/λ is large.
    outside = divide(rest - rows.transposed_times(solve(rows.times(rest))), jnp.broadcast_to(damping, rest.shape))
    return e, jnp.where(_tree.norm(rest) > rows.rounding(g, e, lengths), outside, 0)


def _shifted_lower(kernel: Array, shift: Array) -> Array:
    shifted = kernel + diagonal_matrix(jnp.broadcast_to(shift, kernel.shape[:1]), kernel.dtype)
    # Hermitian, and transposed in the layout that LAPACK takes: no pass to bring it there.
    return jax.lax.linalg.cholesky(shifted.conj().T, symmetrize_input=False)


class QRFactored(NamedTuple):
    """B = left diag(values) right, whatever λ is."""

    rows: RowsInFrame
    left: Array
    values: Array
    right: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class QR:
    """See `qr`."""

    def factor(self, operator: Operator, rule: Rule | None) -> QRFactored:
        """QR of the rows and singular values of the triangle; O(np·min(n, p))."""
        require(operator, (Gram,), "qr", "It works on rows; use solvers.eigh() on a matrix.")
        rows = RowsInFrame(operator, Frame.of(operator, damping_rules.Relative(0.0) if rule is None else rule))
        matrix = operator.matrix() * rows.inverse
        if 0 in matrix.shape:
            left, values, right = matrix[:, :0], jnp.zeros(0, real_dtype(matrix.dtype)), matrix[:0]
        elif matrix.shape[0] >= matrix.shape[1]:
            q, triangle = jnp.linalg.qr(matrix)
            u, values, right = jnp.linalg.svd(triangle)
            left = q @ u
        else:
            q, triangle = jnp.linalg.qr(matrix.conj().T)
            left, values, v = jnp.linalg.svd(triangle.conj().T)
            right = v @ q.conj().T
        return QRFactored(rows, left, values, right)

    def apply(
        self,
        factored: QRFactored,
        rhs: PyTree,
        strength: Number | None = None,
        *,
        residual: Array | None = None,
        **unused: object,
    ) -> Solution:
        """d for any λ in O((n + p)·min(n, p))."""
        rows, left, values, right = factored
        frame = rows.frame
        frame.space.check(rhs, "rhs")
        damping = frame.damping(strength)
        g = frame.into(frame.space.ravel(rhs))
        size = _tree.largest(g)
        g = g / jnp.where(size > 0, size, 1)
        lengths = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(left * values)), axis=1))
        e, used = rows.matching(g, rows.gram.residual if residual is None else residual, lengths)
        eps = jnp.finfo(values.dtype).eps
        cut = max(left.shape[0], right.shape[1]) * eps * jnp.max(values, initial=0.0)
        kept = (values > cut) | (damping > cut**2)
        damped = jnp.where(kept, jnp.square(values) + damping, 1)
        projected = right @ g
        along = jnp.where(used, values * (left.conj().T @ e), projected)
        # What is outside of the range has λ alone to divide by; none of it is there when e explains g.
        rest = g - right.conj().T @ projected
        outside = (damping > cut**2) & ~used & (_tree.norm(rest) > SLACK * eps * _tree.norm(g))
        y = right.conj().T @ jnp.where(kept, along / damped, 0)
        y = y + jnp.where(outside, divide(rest, jnp.broadcast_to(damping, rest.shape)), 0)
        rank = jnp.sum(values > cut).astype(jnp.int32)
        return frame.finish(size * y, rhs, strength, rank=rank, residual_used=used)


class WoodburyFactored(NamedTuple):
    """G + λD = diag(total)(I + BᴴB)diag(total) with B = R/total = left diag(values) rightᴴ, right (p, r)."""

    operator: LowRank
    rule: Rule
    root: Array
    total: Array
    values: Array
    right: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class Woodbury:
    """See `woodbury`."""

    def factor(self, operator: Operator, rule: Rule | None) -> WoodburyFactored:
        """Singular values and right vectors of R(D₀ + λD)^(−½), by QR; O(r²p)."""
        require(operator, (LowRank,), "woodbury", "For rows without a diagonal use solvers.row_space().")
        rule = damping_rules.Relative(0.0) if rule is None else rule
        root = rule.root(operator.scale(), operator.space)
        return WoodburyFactored(operator, rule, root, *self._factors(operator, rule, root, None))

    def apply(
        self, factored: WoodburyFactored, rhs: PyTree, strength: Number | None = None, **unused: object
    ) -> Solution:
        """d in O(rp); another `strength` than the rule's own factorises again."""
        operator, rule, root, total, values, right = factored
        space, gram = operator.space, operator.gram
        space.check(rhs, "rhs")
        if strength is not None:
            total, values, right = self._factors(operator, rule, root, strength)
        g = divide(space.ravel(rhs), total)
        along = right.conj().T @ g
        # Not g − Bᴴ(I + BBᴴ)⁻¹Bg: where rows outweigh the diagonal it cancels.
        rest = g - right @ along
        rest = rest - right @ (right.conj().T @ rest)
        y = rest + right @ divide(divide(along, jnp.hypot(1, values)), jnp.hypot(1, values))
        # A coordinate with rows and no diagonal of its own is not dead: only another solver can tell what it is.
        alone = total == 0
        lost = jnp.any(alone & (gram.scale() > 0)) | ~jnp.all(jnp.isfinite(total))
        return solution(space, divide(y, total) + jnp.where(lost, jnp.nan, 0), rhs, jnp.sum(alone))

    @staticmethod
    def _factors(operator: LowRank, rule: Rule, root: Array, strength: Number | None) -> tuple[Array, Array, Array]:
        base = jnp.sqrt(operator.space.ravel(operator.base).real)
        total = jnp.hypot(base, jnp.sqrt(strength_of(rule, strength, base.dtype)) * root)
        rows = operator.gram.matrix() * divide(1, total)
        if 0 in rows.shape:
            return total, jnp.zeros(0, total.dtype), rows.T[:, :0]
        right, triangle = jnp.linalg.qr(rows.conj().T)
        left, values, _ = jnp.linalg.svd(triangle, full_matrices=False)
        return total, values, right @ left


def row_space() -> RowSpace:
    """d = D⁻¹Aᴴ(AD⁻¹Aᴴ + λ)⁻¹e in the space of the n rows of a `Gram`: O(n²p + n³/3), memory n² beside the rows.

    e with g = Aᴴe is the operator's `residual`, or the `residual` of `apply`. It is used if g is still a multiple of
    Aᴴe to rounding, and `stats.residual_used` says so. Otherwise e is recovered from g, by six
    more products with the rows. For n ≤ p. Default damping: relative(8·p·eps), as in `cholesky`, of which this is the
    same answer. Without damping a part of g outside the range of G is left out, and dependent rows are flagged
    (`converged=False`).

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Gram(jnp.array([[3.0, 4.0]]))
        >>> solution = ng.solvers.solve(G, jnp.array([3.0, 4.0]), solver=ng.solvers.row_space(), damping=1.0)
        >>> [round(float(x), 4) for x in solution.value]
        [0.1111, 0.0833]

    Reference: Chen and Heyl, "Empowering deep neural quantum states through efficient optimization" (2024), eq. 6.
    """
    return RowSpace()


def qr() -> QR:
    """Least squares on the rows of a `Gram`, in the damping's frame; never squares the condition number.

    Minimises ‖Ad − e‖² + λ‖d‖²_D from A = QR and the singular values of R. Where the residual e (see `row_space`)
    belongs to g, the error is κ(A)·eps; from g alone it is κ(A)²·eps, since g = Aᴴe has forgotten the rest. Minimum
    norm on a singular G; reports the rank; singular values up to max(n, p)·eps of the largest are left out. Default
    damping: none. One factorisation serves every λ.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Gram(jnp.array([[2.0, 0.0], [0.0, 1.0]]))
        >>> solution = ng.solvers.solve(G, jnp.array([4.0, 1.0]), solver=ng.solvers.qr())
        >>> [round(float(x), 4) for x in solution.value], int(solution.stats.rank)
        ([1.0, 1.0], 2)
    """
    return QR()


def woodbury() -> Woodbury:
    """(D₀ + RᴴR + λD)⁻¹g for `LowRank`, by QR of its r rows. O(r²p), memory rp. Default damping: none.

    D₀ + λD must be positive wherever R is not zero; otherwise the solution is not finite, and `cholesky` is the cure.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.LowRank(jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0]]))
        >>> solution = ng.solvers.solve(G, jnp.array([2.0, 3.0]), solver=ng.solvers.woodbury())
        >>> [round(float(x), 4) for x in solution.value]
        [1.0, 3.0]
    """
    return Woodbury()
