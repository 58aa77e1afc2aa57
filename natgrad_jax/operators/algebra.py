"""Sums and positive multiples of operators, in the simplest structure that holds the result."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, surely
from natgrad_jax.operators.arrays import Dense, Diagonal, Gram, LowRank
from natgrad_jax.operators.outer import Outer
from natgrad_jax.operators.pieces import explicit, is_outer
from natgrad_jax.operators.products import Closed, RealParts, Sum
from natgrad_jax.operators.shared import Operator, Product
from natgrad_jax.operators.structured import Blocks, Kronecker


def add(*operators: Operator) -> Operator:
    """G₁ + G₂ + …: rows are joined, a diagonal and rows make a `LowRank`, matrices add; else a `Sum`.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax import operators
        >>> type(operators.add(operators.Diagonal(jnp.ones(2)), operators.Gram(jnp.ones((1, 2))))).__name__
        'LowRank'
    """
    if not operators:
        raise ValueError("operators: expected at least one to add, got none")
    for operator in operators[1:]:
        operators[0].space.check_shapes(operator.space.structs(), "operators")
    return functools.reduce(_plus, operators)


def _plus(one: Operator, other: Operator) -> Operator:
    match one, other:
        case Diagonal(), Diagonal():
            return Diagonal(jax.tree.map(jnp.add, one.entries, other.entries))
        case Dense(), Dense():
            return Dense(one.matrix + other.matrix, one.space)
        case Gram(), Gram():
            # The joined rows explain the sum of the two gradients; a residual of one alone explains neither.
            if one.residual is None or other.residual is None:
                return Gram(_joined(one.rows, other.rows))
            return Gram(_joined(one.rows, other.rows), jnp.concatenate([one.residual, other.residual]))
        case Diagonal(), Gram():
            return LowRank(one.entries, explicit(other.rows))
        case Diagonal(), LowRank():
            return LowRank(jax.tree.map(jnp.add, one.entries, other.base), other.rows)
        case Gram(), LowRank():
            return LowRank(other.base, explicit(_joined(one.rows, other.rows)))
        case LowRank(), LowRank():
            return LowRank(jax.tree.map(jnp.add, one.base, other.base), _joined(one.rows, other.rows))
        case (Gram() | LowRank(), Diagonal()) | (LowRank(), Gram()):
            return _plus(other, one)
        case RealParts(), RealParts():
            return RealParts(_plus(one.parts, other.parts), one.space)
        case RealParts(), Diagonal():
            return RealParts(_plus(one.parts, one.on_parts(other)), one.space)
        case Diagonal(), RealParts():
            return _plus(other, one)
    terms = [(x.terms, x.weights) if isinstance(x, Sum) else ((x,), (1.0,)) for x in (one, other)]
    return Sum(terms[0][0] + terms[1][0], terms[0][1] + terms[1][1])


def scale(c: float | Array, operator: Operator) -> Operator:
    """c·G for c ≥ 0, in the structure of G.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax import operators
        >>> operators.scale(3.0, operators.Diagonal(jnp.ones(2))).entries.tolist()
        [3.0, 3.0]
    """
    if jnp.ndim(c) != 0 or surely(c, lambda x: not x >= 0):
        raise ValueError(f"c: expected one number ≥ 0, got {c}; a metric has no negative lengths")
    root = jnp.sqrt(c)
    match operator:
        case Diagonal():
            return Diagonal(_times(c, operator.entries))
        case Dense():
            return Dense(c * operator.matrix, operator.space)
        case Gram():
            residual = None if operator.residual is None else operator.residual / root
            times = lambda x: x.scaled(root) if is_outer(x) else _times(root, x)  # noqa: E731
            return Gram(jax.tree.map(times, operator.rows, is_leaf=is_outer), residual)
        case LowRank():
            return LowRank(_times(c, operator.base), _times(root, operator.rows))
        case Kronecker():
            return Kronecker(_times(c, operator.left), operator.right, operator.like)
        case Blocks():
            return Blocks(operator.map(lambda part: scale(c, part)))
        case Closed():
            solve = None if operator.solve is None else Partial(_divided, c, operator.solve)
            return Closed(Partial(_multiplied, c, operator.times), solve, operator.space)
        case RealParts():
            return RealParts(scale(c, operator.parts), operator.space)
        case Sum():
            return Sum(operator.terms, tuple(c * weight for weight in operator.weights))
    return Sum((operator,), (c,))


def _joined(one: PyTree, other: PyTree) -> PyTree:
    """The rows of both, one below the other; in factors where both are, of the same matrices."""

    def below(x: Any, y: Any) -> Any:
        if isinstance(x, Outer) and isinstance(y, Outer) and x.fits(y):
            return x.joined(y)
        return jnp.concatenate([explicit(x), explicit(y)])

    return jax.tree.map(below, one, other, is_leaf=is_outer)


def _times(c: float | Array, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (c * x).astype(jnp.result_type(x)), tree)


def _multiplied(c: Array, f: Product, v: PyTree) -> PyTree:
    return _tree.cast_like(_times(c, f(v)), v)


def _divided(c: Array, f: Product, g: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x / c, f(g))
