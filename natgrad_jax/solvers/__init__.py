"""Solvers: how (G + λD)⁻¹g is applied. A solver is a choice, an operator is data.

Every solver is a frozen static pytree with two parts, so that one factorisation can serve many right-hand sides:

    factored = solver.factor(operator, rule)            rule: a damping rule, or None for as little as possible
    solution = solver.apply(factored, rhs, strength)    strength: λ in place of the rule's own, or None

Structure that does not fit is a `TypeError` when the program is built; numerical trouble is data in the `Solution`.
"""

from natgrad_jax.solvers.choice import auto, blockwise, check_solver, damped_product, factor, implicit, solve
from natgrad_jax.solvers.dense import cholesky, eigh
from natgrad_jax.solvers.iterative import cg, jacobi, nystrom, partial_cholesky
from natgrad_jax.solvers.rows import qr, row_space, woodbury
from natgrad_jax.solvers.shared import Solution, Stats
from natgrad_jax.solvers.structured import closed, diagonal, kronecker

__all__ = [
    "Solution",
    "Stats",
    "auto",
    "blockwise",
    "cg",
    "check_solver",
    "cholesky",
    "closed",
    "damped_product",
    "diagonal",
    "eigh",
    "factor",
    "implicit",
    "jacobi",
    "kronecker",
    "nystrom",
    "partial_cholesky",
    "qr",
    "row_space",
    "solve",
    "woodbury",
]
