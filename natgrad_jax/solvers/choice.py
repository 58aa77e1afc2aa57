"""The solver for an operator, by its structure and shapes, and a single solve."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax import _tree
from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, cast_like, surely
from natgrad_jax.damping import Number, Rule
from natgrad_jax.operators import (
    Blocks,
    Closed,
    Diagonal,
    Gram,
    Kronecker,
    LowRank,
    Operator,
    RealParts,
    is_operator,
)
from natgrad_jax.operators.shared import Product
from natgrad_jax.solvers.dense import Cholesky, cholesky
from natgrad_jax.solvers.rows import RowSpace, row_space, woodbury
from natgrad_jax.solvers.shared import Solution, Stats, least, require
from natgrad_jax.solvers.structured import closed, diagonal, kronecker

# An operator known by its products alone is made a matrix up to this size: 16 MB in float32.
DENSE_UP_TO = 2048


@jax.tree_util.register_static
@dataclass(frozen=True)
class Blockwise:
    """See `blockwise`."""

    inner: Any

    def factor(self, operator: Operator, rule: Rule | None) -> Any:
        """The factorisation of every part."""
        require(operator, (Blocks,), "blockwise", "Leave solver=None to have one chosen.")
        if isinstance(rule, damping_rules.Trace) and rule.mean is None:
            rule = replace(rule, mean=damping_rules.root_mean_square(operator.scale()))
        rules = [rule] * len(operator.operators)
        if isinstance(rule, damping_rules.Metric):
            operator.space.check_shapes(rule.operator.entries, "damping")
            split = operator.map(
                lambda _, part: damping_rules.Metric(rule.strength, Diagonal(part)), rule.operator.entries
            )
            rules = jax.tree.leaves(split, is_leaf=lambda x: isinstance(x, damping_rules.Metric))
        factors = [self.inner.factor(part, its) for part, its in zip(operator.operators, rules, strict=True)]
        return operator, factors

    def apply(self, factored: Any, rhs: PyTree, strength: Number | None = None, **options: Any) -> Solution:
        """d, part by part."""
        operator, factors = factored
        operator.space.check(rhs, "rhs")
        rest = iter(factors)
        options.pop("residual", None)
        solved = operator.map(lambda _, part: self.inner.apply(next(rest), part, strength), rhs)
        parts = jax.tree.leaves(solved, is_leaf=lambda x: isinstance(x, Solution))
        value = jax.tree.map(lambda x: x.value, solved, is_leaf=lambda x: isinstance(x, Solution))
        ranks = [part.stats.rank for part in parts]
        rank = None if None in ranks or not ranks else sum(ranks[1:], start=ranks[0])
        dead = sum((part.stats.dead for part in parts), start=jnp.zeros((), jnp.int32))
        converged = jnp.all(jnp.asarray([part.converged for part in parts], bool))
        return Solution(value, converged, Stats(dead, rank))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Auto:
    """See `auto`."""

    def choose(self, operator: Operator) -> Any:
        """The solver for this operator, by its structure and shapes alone."""
        match operator:
            case Diagonal():
                return diagonal()
            case Closed() if operator.solve is not None:
                return closed()
            case Kronecker():
                return kronecker()
            case Blocks():
                return blockwise()
            case Gram() if operator.n < operator.space.size:
                return row_space()
            case LowRank() if operator.gram.n < operator.space.size:
                return woodbury()
        check_operator(operator)
        if hasattr(operator, "rows") or hasattr(operator, "matrix") or operator.space.size <= DENSE_UP_TO:
            return cholesky()
        raise TypeError(
            f"solver: {type(operator).__name__} is known by its products, and its matrix of {operator.space.size} rows "
            f"is not built unasked (beyond {DENSE_UP_TO}). Pass solver=solvers.cg(), or solvers.cholesky() to build it."
        )

    def factor(self, operator: Operator, rule: Rule | None) -> Any:
        """The factorisation of the chosen solver."""
        return operator, self.choose(operator).factor(operator, rule)

    def apply(self, factored: Any, rhs: PyTree, strength: Number | None = None, **options: Any) -> Solution:
        """The solution of the chosen solver."""
        operator, inner = factored
        return self.choose(operator).apply(inner, rhs, strength, **options)


def solve(operator: Operator, rhs: PyTree, *, solver: Any = None, damping: "Rule | Number | None" = 0.0) -> Solution:
    """Solves (G + λD) d = g.

    Differentiable in G, g and λ by the implicit function theorem, not through the arithmetic of the solver: one more
    solve with the same factorisation. Where G + λD is singular the derivative in G holds on its range alone;
    the least damping that `blockwise` leaves to its parts (damping=None) is not differentiated.

    Args:
        operator: G.
        rhs: g, a vector of the operator's space.
        solver: one of this module; None picks by structure and shapes, see `auto`.
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
    solver = check_solver(auto() if solver is None else solver)
    check_operator(operator)
    operator.space.check(rhs, "rhs")
    rule = damping_rules.at(damping_rules.as_rule(damping), None)
    return implicit(solver, factor(solver, _stopped(operator), _stopped(rule)), operator, rule, rhs)


def check_solver(solver: Any) -> Any:
    """The solver; a `TypeError` unless it is one."""
    if isinstance(solver, type) or not (hasattr(solver, "factor") and hasattr(solver, "apply")):
        raise TypeError(f"solver: expected one of natgrad_jax.solvers, such as solvers.eigh(), got {solver!r}")
    return solver


def check_operator(operator: Operator) -> None:
    """A `TypeError` unless it is an operator."""
    if not is_operator(operator):
        raise TypeError(
            f"operator: expected one of natgrad_jax.operators, got {type(operator).__name__}. "
            "A metric returns an operator; wrap a matrix as operators.Dense(matrix)."
        )


def factor(solver: Any, operator: Operator, rule: Rule | None) -> Any:
    """`solver.factor`; of the real and imaginary parts, where the operator acts on those."""
    if isinstance(operator, RealParts):
        return solver.factor(operator.parts, _on_parts(rule, operator))
    return solver.factor(operator, rule)


def _on_parts(rule: Rule | None, operator: RealParts) -> Rule | None:
    """A rule on complex parameters, on their real and imaginary parts."""
    if not isinstance(rule, damping_rules.Metric):
        return rule
    return replace(rule, operator=operator.on_parts(rule.operator))


def implicit(
    solver: Any,
    factored: Any,
    operator: Operator,
    rule: Rule | None,
    rhs: PyTree,
    strength: Number | None = None,
    **options: Any,
) -> Solution:
    """`solver.apply`, with derivatives of d = (G + λD)⁻¹g by the implicit function theorem."""
    if isinstance(operator, RealParts):
        options = {key: _tree.real_parts(x) if key == "guess" else x for key, x in options.items()}
        parts = _tree.real_parts(rhs)
        solved = implicit(solver, factored, operator.parts, _on_parts(rule, operator), parts, strength, **options)
        return solved._replace(value=_tree.complex_of(solved.value, operator.space))
    if not jax.tree.leaves(rhs):
        return solver.apply(factored, rhs, strength, **options)
    fixed = _stopped((factored, strength, options))

    def apply(_: Any, g: PyTree) -> tuple[PyTree, tuple[Any, Stats]]:
        factored, strength, options = fixed
        solved = solver.apply(factored, g, strength, **options)
        return solved.value, (solved.converged, solved.stats)

    def transposed(_: Any, g: PyTree) -> tuple[PyTree, tuple[Any, Stats]]:
        # Hermitian: the transpose is the conjugate. No residual and no guess belong to a cotangent.
        solved = solver.apply(fixed[0], jax.tree.map(jnp.conj, g), fixed[1])
        return jax.tree.map(jnp.conj, solved.value), (solved.converged, solved.stats)

    acting = _acting(solver, operator, rule, strength)
    value, (converged, stats) = jax.lax.custom_linear_solve(
        lambda v: cast_like(damped_product(operator, acting, strength)(_tree.raised(v)), v),
        rhs,
        apply,
        transposed,
        has_aux=True,
    )
    return Solution(value, converged, stats)


def _acting(solver: Any, operator: Operator, rule: Rule | None, strength: Number | None) -> Rule | None:
    """The rule by which the solver damps: its least damping is a part of what is differentiated."""
    if rule is not None:
        return rule
    solver = solver.choose(operator) if isinstance(solver, Auto) else solver
    if isinstance(solver, Cholesky | RowSpace):
        return least(operator.space.size, operator.space.dtype)
    return None if strength is None else damping_rules.Relative(0.0)


def damped_product(operator: Operator, rule: Rule | None, strength: Number | None = None) -> Product:
    """v ↦ (G + λD)v; the operator is linearised once for all v."""
    if isinstance(operator, RealParts):
        on_parts = damped_product(operator.parts, _on_parts(rule, operator), strength)
        return lambda v: _tree.complex_of(on_parts(_tree.real_parts(v)), operator.space)
    product = operator.product()
    strength = strength if rule is None or strength is not None else rule.strength
    if rule is None or surely(strength, lambda x: x == 0):
        return product
    fixed = isinstance(rule, damping_rules.Absolute | damping_rules.Metric)
    root = operator.space.unravel(rule.root(None if fixed else operator.scale(), operator.space))
    return lambda v: jax.tree.map(lambda x, y, u: (x + strength * u * (u * y)).astype(x.dtype), product(v), v, root)


def _stopped(tree: PyTree) -> PyTree:
    found: dict[int, Any] = {}  # what is one array in several places stays one: rows may share a factor

    def stopped(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if id(x) not in found:
            found[id(x)] = jax.lax.stop_gradient(x)
        return found[id(x)]

    return jax.tree.map(stopped, tree)


def auto() -> Auto:
    """The exact solver, by structure and shapes alone; `auto().choose(operator)` tells which.

    `Diagonal` → diagonal; `Closed` → closed; `Kronecker` → kronecker; `Blocks` → blockwise; `Gram` of fewer rows than
    parameters → row_space; `LowRank` → woodbury; else cholesky, for operators known by products alone up to p = 2048.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> ng.solvers.auto().choose(ng.operators.Dense(jnp.eye(2)))
        Cholesky()
    """
    return Auto()


def blockwise(inner: Any = None) -> Blockwise:
    """Each part of a `Blocks` operator by itself: by `inner`, or by the solver that `auto` chooses for it.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Blocks([ng.operators.Diagonal(jnp.array([2.0])), ng.operators.Dense(4 * jnp.eye(1))])
        >>> solution = ng.solvers.solve(G, [jnp.ones(1), jnp.ones(1)], solver=ng.solvers.blockwise())
        >>> [round(float(x[0]), 4) for x in solution.value]
        [0.5, 0.25]
    """
    return Blockwise(auto() if inner is None else inner)
