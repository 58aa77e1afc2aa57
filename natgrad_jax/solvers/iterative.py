"""Conjugate gradients and preconditioners: solves by products alone, in the memory of a few vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax import _tree
from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, cast_like, surely
from natgrad_jax.damping import Number, Rule
from natgrad_jax.operators import Diagonal, LowRank, Operator
from natgrad_jax.operators.shared import Product
from natgrad_jax.solvers.rows import woodbury
from natgrad_jax.solvers.shared import Solution, Stats, divide, strength_of
from natgrad_jax.solvers.structured import diagonal

Preconditioner = Callable[[Operator], Operator]
ROUNDINGS = 32  # the least tolerance, in units of eps
RESTARTS = 4  # from the true residual, where the recursive one has drifted from it


class CGFactored(NamedTuple):
    """The operator, √D and √G_ii where they are known, and the factorised easier operator, None for Jacobi."""

    operator: Operator
    rule: Rule
    root: Array
    scale: Array | None
    easier: tuple[Operator, Any] | None


class _Inner(NamedTuple):
    spent: Array
    y: PyTree
    r: PyTree
    p: PyTree
    rz: Array
    steepest: Array
    fine: Array


class _Outer(NamedTuple):
    spent: Array
    restarts: Array
    y: PyTree
    r: PyTree
    rz: Array
    better: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class CG:
    """See `cg`."""

    tolerance: float | None
    max_steps: int
    preconditioner: Preconditioner | None
    warm_start: bool

    def factor(self, operator: Operator, rule: Rule | None) -> CGFactored:
        """√D, and the factorisation of the easier operator."""
        scale = damping_rules.known_scale(operator)
        rule = damping_rules.Relative(0.0) if rule is None else rule
        root = _no_damping(operator) if scale is None and _is_zero(rule.strength) else rule.root(scale, operator.space)
        easier = None
        if self.preconditioner is not None:
            approximation = self.preconditioner(operator)
            solver = _solver_of(approximation)
            easier = (approximation, solver.factor(approximation, rule))
        return CGFactored(operator, rule, root, scale, easier)

    def apply(
        self,
        factored: CGFactored,
        rhs: PyTree,
        strength: Number | None = None,
        *,
        guess: PyTree | None = None,
        **unused: object,
    ) -> Solution:
        """d by conjugate gradients from `guess` (0), in units in which G + λD has unit diagonal where it is known."""
        operator, rule, root, scale, _ = factored
        space = operator.space
        space.check(rhs, "rhs")
        if strength is not None and scale is None:
            rule.root(None, space)  # refuses a rule that was of no consequence while λ was 0
        root_strength = jnp.sqrt(strength_of(rule, strength, root.dtype))
        total = jnp.ones_like(root) if scale is None else jnp.hypot(scale, root_strength * root)
        inverse = space.unravel(divide(1, total))
        product, added = operator.product(), space.unravel(jnp.square(divide(root_strength * root, total)))

        def times(y: PyTree) -> PyTree:
            if scale is None:  # and `inverse` is 1
                return jax.tree.map(lambda x, a, v: x + a * v, product(y), added, y)
            gy = product(_multiply(inverse, y))
            return jax.tree.map(lambda x, u, a, v: x * u + a * v, gy, inverse, added, y)

        precondition = self._preconditioner(factored, strength, space.unravel(total))
        b = _multiply(inverse, _tree.raised(rhs))
        size = _tree.largest(b)
        b = jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1), b)
        if guess is None:
            start, r = jax.tree.map(jnp.zeros_like, b), b
        else:
            start = jax.tree.map(
                lambda x, s: x * s / jnp.where(size > 0, size, 1), _tree.raised(guess), space.unravel(total)
            )
            r = jax.tree.map(jnp.subtract, b, times(start))
            # A guess that is further away than 0, or than the floats reach, is none.
            closer = _tree.vdot(r, precondition(r)) < _tree.vdot(b, precondition(b))
            start = _tree.where(closer, start, jax.tree.map(jnp.zeros_like, b))
            r = _tree.where(closer, r, b)
        y, r, count = self._iterate(times, precondition, b, start, r)
        residual = jnp.sqrt(divide(_tree.vdot(r, precondition(r)), _tree.vdot(b, precondition(b))))
        value = cast_like(jax.tree.map(lambda x, u: size * (x * u), y, inverse), rhs)
        fine = _tree.all_finite(value) & jnp.isfinite(residual) & jnp.all(jnp.isfinite(total))
        converged = fine if self.tolerance is None else fine & (residual <= self._tolerance(residual.dtype))
        dead = jnp.sum(total == 0).astype(jnp.int32)
        return Solution(value, converged, Stats(dead, iterations=count, residual=residual))

    def _tolerance(self, dtype: Any) -> float:
        """The tolerance that was asked for, or what rounding allows of it."""
        assert self.tolerance is not None
        return max(self.tolerance, ROUNDINGS * float(jnp.finfo(dtype).eps))

    def _preconditioner(self, factored: CGFactored, strength: Number | None, total: PyTree) -> Product:
        """M⁻¹ in the frame; the identity is Jacobi."""
        if factored.easier is None:
            return lambda r: r
        approximation, inner = factored.easier
        solver = _solver_of(approximation)
        return lambda r: _multiply(total, solver.apply(inner, _multiply(total, r), strength).value)

    def _iterate(
        self, times: Product, precondition: Product, b: PyTree, start: PyTree, r: PyTree
    ) -> tuple[PyTree, PyTree, Array]:
        """Conjugate gradients, begun again from the true residual until that is small, or no longer falls."""
        bz = _tree.vdot(b, precondition(b))
        bound = jnp.zeros_like(bz) if self.tolerance is None else self._tolerance(bz.dtype) ** 2 * bz
        zero = jnp.zeros((), jnp.int32)

        def go_on(state: _Outer) -> Array:
            return (state.rz > bound) & (state.spent < self.max_steps) & state.better & (state.restarts < RESTARTS)

        def restart(state: _Outer) -> _Outer:
            z = precondition(state.r)
            inner = _Inner(state.spent, state.y, state.r, z, state.rz, jnp.zeros_like(state.rz), jnp.asarray(True))
            inner = jax.lax.while_loop(unfinished, step, inner)
            true = jax.tree.map(jnp.subtract, b, times(inner.y))
            rz = _tree.vdot(true, precondition(true))
            better = (rz < state.rz / 4) & (inner.spent > state.spent)
            # Exact steps lower the quadratic model, if not the residual; rounding need not. A comparison with NaN is
            # false, and leaves NaN to be seen.
            worse = descent(inner.y, true) < descent(state.y, state.r)
            y, true = _tree.where(worse, state.y, inner.y), _tree.where(worse, state.r, true)
            return _Outer(inner.spent, state.restarts + 1, y, true, jnp.where(worse, state.rz, rz), better & ~worse)

        def descent(y: PyTree, r: PyTree) -> Array:
            """yᴴb − ½yᴴ(G + λD)y, from the residual r of y."""
            return (_tree.vdot(y, b) + _tree.vdot(y, r)) / 2

        def unfinished(state: _Inner) -> Array:
            # A little below the bound, so that the true residual meets it.
            return (state.rz > bound / 4) & (state.spent < self.max_steps) & state.fine

        def step(state: _Inner) -> _Inner:
            ap = times(state.p)
            curvature = _tree.vdot(state.p, ap)
            # No curvature left along p, next to the largest seen: rounding has eaten it, or G is not positive. What
            # there is so far stands.
            length = _tree.vdot(state.p, state.p)
            steepest = jnp.maximum(state.steepest, divide(curvature, length))
            fine = (curvature > jnp.finfo(length.dtype).eps * steepest * length) & jnp.isfinite(curvature)
            rate = jnp.where(fine, state.rz / jnp.where(fine, curvature, 1), 0)
            y = _plus(state.y, rate, state.p)
            r = _plus(state.r, -rate, ap)
            z = precondition(r)
            rz = _tree.vdot(r, z)
            p = _plus(z, rz / state.rz, state.p)
            return _Inner(state.spent + 1, y, r, p, rz, steepest, fine)

        rz = _tree.vdot(r, precondition(r))
        done = jax.lax.while_loop(go_on, restart, _Outer(zero, zero, start, r, rz, jnp.asarray(True)))
        return done.y, done.r, done.spent


def _is_zero(strength: Number) -> bool:
    return surely(strength, lambda x: x == 0)


def _no_damping(operator: Operator) -> Array:
    return damping_rules.Absolute(0.0).root(None, operator.space)


def _multiply(factor: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, factor, tree)


def _plus(x: PyTree, rate: Array, p: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + rate.astype(jnp.finfo(a.dtype).dtype) * b, x, p)


def _solver_of(approximation: Operator) -> Any:
    for kind, solver in ((Diagonal, diagonal()), (LowRank, woodbury())):
        if isinstance(approximation, kind):
            return solver
    raise TypeError(
        "preconditioner: expected a function that returns a Diagonal or a LowRank, "
        f"got {type(approximation).__name__}. It is solved in every step, so it must be easier than G."
    )


@dataclass(frozen=True)
class PartialCholesky:
    """See `partial_cholesky`."""

    rank: int

    def __call__(self, operator: Operator) -> LowRank:
        """The approximation."""
        scale, product, space = _required_scale(operator, "partial_cholesky"), operator.product(), operator.space
        rank, inverse = min(self.rank, space.size), divide(1, scale)

        def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            rows, rest = state
            pivot = jnp.argmax(rest)
            unit = jnp.zeros(space.size, space.dtype).at[pivot].set(inverse[pivot])
            column = inverse * space.ravel(product(space.unravel(unit)))
            left = column - rows.conj().T @ rows[:, pivot]
            row = divide(left.conj(), jnp.sqrt(rest[pivot]))
            # The pivot's own remainder is 0 by construction, and stays out of later choices.
            return rows.at[i].set(row), jnp.maximum(rest - jnp.square(jnp.abs(row)), 0).at[pivot].set(0)

        start = jnp.zeros((rank, space.size), space.dtype), (scale > 0).astype(scale.dtype)
        rows, _ = jax.lax.fori_loop(0, rank, step, start)
        return _with_remainder(operator, rows, scale)


@dataclass(frozen=True)
class Nystrom:
    """See `nystrom`."""

    rank: int
    seed: int

    def __call__(self, operator: Operator) -> LowRank:
        """The approximation."""
        scale, product, space = _required_scale(operator, "nystrom"), operator.product(), operator.space
        rank, inverse = min(self.rank, space.size), divide(1, scale)
        test = jnp.linalg.qr(jax.random.normal(jax.random.key(self.seed), (space.size, rank), space.dtype))[0]
        sketch = jax.vmap(lambda v: inverse * space.ravel(product(space.unravel(inverse * v))))(test.T).T
        # A shift of the size of the rounding in the sketch keeps the small matrix positive (Frangella et al. 2023).
        shift = jnp.sqrt(jnp.asarray(max(space.size, 1), scale.dtype)) * jnp.finfo(scale.dtype).eps
        shift = shift * jnp.linalg.norm(sketch)
        sketch = sketch + shift * test
        small = test.conj().T @ sketch
        lower = jnp.linalg.cholesky((small + small.conj().T) / 2)
        rows = jax.scipy.linalg.solve_triangular(lower, sketch.conj().T, lower=True)
        return _with_remainder(operator, rows, scale)


def _required_scale(operator: Operator, name: str) -> Array:
    scale = damping_rules.known_scale(operator)
    if scale is None:
        raise TypeError(
            f"preconditioner: {name} needs the diagonal of G, which this operator does not show; "
            "give it one, Implicit(..., diag=...)"
        )
    return scale


def _with_remainder(operator: Operator, rows: Array, scale: Array) -> LowRank:
    """Rows in the unit-diagonal frame, and what is left of the diagonal, as an operator."""
    space = operator.space
    # On a singular G nothing is left but rounding: M⁻¹ would amplify what rounding puts into the null space of G.
    floor = jnp.sqrt(jnp.finfo(scale.dtype).eps)
    rest = jnp.maximum(1 - jnp.sum(jnp.square(jnp.abs(rows)), axis=0), floor)
    return LowRank(space.unravel(rest * jnp.square(scale)), jax.vmap(space.unravel)(rows * scale))


def cg(
    tolerance: float | None = 1e-5,
    max_steps: int = 1000,
    *,
    preconditioner: Preconditioner | None = None,
    warm_start: bool = False,
) -> CG:
    """Preconditioned conjugate gradients: products alone, for any operator.

    Memory is some nine vectors beside what a product needs.

    Stops when ‖g − (G + λD)d‖ ≤ tolerance·‖g‖ in the norm of the preconditioner, r ↦ √(rᴴM⁻¹r), which has no units
    where the operator shows its diagonal or M is given; or after `max_steps` steps; or where pᴴ(G + λD)p ≤ 0. The
    residual that is judged and reported is the true one, by one more product at the end. What is returned is never
    worse than the start in the quadratic model ½dᴴ(G + λD)d − gᴴd. Default damping: none (on a singular G with g in
    its range, and without a preconditioner of your own: minimum norm in the metric of diag G).

    Args:
        tolerance: relative, at least 32·eps of the dtype; None spends exactly the budget, a truncated solve, and then
            `converged` means finite.
        max_steps: the most steps, each of one product; a true residual and a guess take one more each.
        preconditioner: function from G to an easier operator M (`Diagonal` or `LowRank`), which is damped as G is; None
            is Jacobi, M = diag(G + λD), where the operator shows its diagonal, and no preconditioner where it does not.
        warm_start: `transforms.precondition` begins at the last direction, which its state then keeps.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Dense(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> solution = ng.solvers.solve(G, jnp.array([3.0, 3.0]), solver=ng.solvers.cg())
        >>> [round(float(x), 4) for x in solution.value], int(solution.stats.iterations)
        ([1.0, 1.0], 1)
    """
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a number between 0 and 1, or None for a fixed budget, got {tolerance}")
    if not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps: expected a number of products ≥ 1, got {max_steps!r}")
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(f"preconditioner: expected a function from G to an easier operator, got {preconditioner!r}")
    return CG(tolerance, max_steps, preconditioner, warm_start)


def jacobi(operator: Operator) -> Diagonal:
    """The diagonal of G as a preconditioner; what `cg` does without one.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> ng.solvers.jacobi(ng.operators.Dense(jnp.array([[2.0, 1.0], [1.0, 3.0]]))).entries.tolist()
        [2.0, 3.0]
    """
    return Diagonal(operator.diagonal())


def partial_cholesky(rank: int) -> PartialCholesky:
    """Preconditioner: `rank` steps of Cholesky with diagonal pivoting, and the diagonal that is left.

    r products and O(r²p). Pivots are chosen on the unit-diagonal scaled matrix: the choice does not depend on units.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Dense(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> [[round(float(x), 2) for x in row] for row in ng.solvers.partial_cholesky(2)(G).dense()]
        [[2.0, 1.0], [1.0, 2.0]]
    """
    return PartialCholesky(_rank(rank))


def nystrom(rank: int, seed: int = 0) -> Nystrom:
    """Preconditioner: a randomised approximation of G on `rank` directions, and the diagonal that is left. r products.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Gram(jnp.array([[1.0, 2.0]]))
        >>> [[round(float(x), 2) for x in row] for row in ng.solvers.nystrom(1)(G).dense()]
        [[1.0, 2.0], [2.0, 4.0]]

    Reference: Frangella, Tropp and Udell, "Randomized Nyström preconditioning" (2023), algorithm 2.1.
    """
    return Nystrom(_rank(rank), seed)


def _rank(rank: int) -> int:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected a number of directions ≥ 1, got {rank!r}")
    return rank
