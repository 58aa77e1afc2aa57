"""The tables that the laws run over: a new metric, solver, rule or family is one row and gets every law.

Numbers are numpy arrays whose entries are float32 numbers, so that both precisions see the same problem.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, xlog1py, xlogy

import natgrad_jax as ng


def x64():
    """Context manager that turns double precision on; its public name moved between JAX releases."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64(True)


def rounded(x):
    return np.asarray(x, np.float32).astype(np.float64)


def eps(dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def flat(tree) -> np.ndarray:
    """Leaves in ravel order, as float64 numpy: not by the library's own ravel."""
    leaves = [np.asarray(x).astype(np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def error(got, expected) -> float:
    """Relative error in the Euclidean norm."""
    got, expected = flat(got), flat(expected)
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), np.finfo(float).tiny))


def unit_condition(matrix) -> float:
    """Condition number after scaling to unit diagonal: what the covariant solvers see."""
    s = np.sqrt(np.diag(matrix))
    return float(np.linalg.cond(matrix / np.outer(s, s)))


# Parameters: a vector, a scalar and a matrix; p = 5.

P = 5
UNITS = np.logspace(-4, 4, P)[[3, 0, 4, 1, 2]]


def tree(vectors, dtype):
    """(..., 5) cut into a pytree, whatever stands in front of the last axis."""
    v = np.asarray(vectors)
    parts = {"a": v[..., :2], "b": v[..., 2], "c": v[..., 3:].reshape(*v.shape[:-1], 1, 2)}
    return cast(parts, dtype)


_rng = np.random.default_rng(7)
ROWS = rounded(_rng.normal(size=(9, P)))  # condition number of the Gram matrix about 20
RHS = rounded(_rng.normal(size=P))
VECTOR = rounded(_rng.normal(size=P))


class OperatorCase(NamedTuple):
    """An operator from its rows, and the same matrix in numpy."""

    build: Callable[[np.ndarray, Any], Any]  # (rows, dtype) -> operator on trees
    flat: Callable[[np.ndarray, Any], Any] | None  # the same on flat vectors
    matrix: Callable[[np.ndarray], np.ndarray]


def _space(dtype):
    return ng.operators.Diagonal(tree(np.ones(P), dtype)).space


def _linear(params, rows):
    parts = jax.tree.map(lambda x, row: jnp.tensordot(row, x, jnp.ndim(x)), params, rows)
    return sum(jax.tree.leaves(parts))


def _squares(rows):
    return (rows**2).sum(0)


def _sum(whole, half):
    return ng.operators.add(ng.operators.scale(2.0, half), whole)


def _blocks(rows, dtype):
    a, b, c = rows[:, :2], rows[:, 2], rows[:, 3:]
    space = ng.operators.Space.of(jnp.zeros((1, 2), dtype))
    return ng.operators.Blocks({
        "a": ng.operators.Gram(jnp.asarray(a, dtype)),
        "b": ng.operators.Diagonal(jnp.asarray(b @ b, dtype)),
        "c": ng.operators.Dense(jnp.asarray(c.T @ c, dtype), space),
    })  # fmt: skip


def _kronecker(rows, dtype):
    a, b, c = rows[:, :2], rows[:, 2:3], rows[:, 3:]
    left, right = (
        {"a": a.T @ a, "b": b.T @ b, "c": np.ones((1, 1))},
        {"a": np.ones((1, 1)), "b": np.ones((1, 1)), "c": c.T @ c},
    )
    return ng.operators.Kronecker(cast(left, dtype), cast(right, dtype), _space(dtype))


def _block_diagonal(rows):
    matrix = rows.T @ rows
    return matrix * (np.array([0, 0, 1, 2, 2])[:, None] == np.array([0, 0, 1, 2, 2]))


def _of_rows(build, n=None):
    """Operators that are built on rows alone: on a tree, on flat vectors, and their matrix."""
    return OperatorCase(
        lambda rows, dtype: build(tree(rows[:n], dtype)),
        lambda rows, dtype: build(jnp.asarray(rows[:n], dtype)),
        lambda rows: rows[:n].T @ rows[:n],
    )


def _implicit(rows):
    squares = jax.tree.map(lambda x: jnp.sum(x**2, axis=0), rows)
    return ng.operators.Implicit(_linear, jax.tree.map(jnp.zeros_like, squares), rows, diag=squares)


OPERATORS = {
    "diagonal": OperatorCase(
        lambda rows, dtype: ng.operators.Diagonal(tree(_squares(rows), dtype)),
        lambda rows, dtype: ng.operators.Diagonal(jnp.asarray(_squares(rows), dtype)),
        lambda rows: np.diag(_squares(rows)),
    ),
    "dense": OperatorCase(
        lambda rows, dtype: ng.operators.Dense(jnp.asarray(rows.T @ rows, dtype), _space(dtype)),
        lambda rows, dtype: ng.operators.Dense(jnp.asarray(rows.T @ rows, dtype)),
        lambda rows: rows.T @ rows,
    ),
    "gram": _of_rows(ng.operators.Gram),
    "square gram": _of_rows(ng.operators.Gram, P),  # as many rows as parameters: the least for a unique solution
    "implicit": _of_rows(_implicit),
    "low rank": OperatorCase(
        lambda rows, dtype: ng.operators.LowRank(tree(_squares(rows[3:]), dtype), tree(rows[:3], dtype)),
        lambda rows, dtype: ng.operators.LowRank(jnp.asarray(_squares(rows[3:]), dtype), jnp.asarray(rows[:3], dtype)),
        lambda rows: np.diag(_squares(rows[3:])) + rows[:3].T @ rows[:3],
    ),
    "sum": OperatorCase(
        lambda rows, dtype: _sum(*(OPERATORS[kind].build(rows, dtype) for kind in ("dense", "gram"))),
        lambda rows, dtype: _sum(*(OPERATORS[kind].flat(rows, dtype) for kind in ("dense", "gram"))),
        lambda rows: 3 * rows.T @ rows,
    ),
    "blocks": OperatorCase(_blocks, None, _block_diagonal),
    "kronecker": OperatorCase(_kronecker, None, _block_diagonal),
}  # fmt: skip

# (solver, operator) that go together; None is the choice by structure.
_cg = ng.solvers.cg(1e-12)
SOLVERS = [
    (ng.solvers.diagonal(), "diagonal"),
    (ng.solvers.cholesky(), "dense"),
    (ng.solvers.cholesky(), "gram"),
    (ng.solvers.cholesky(), "implicit"),
    (ng.solvers.eigh(), "dense"),
    (ng.solvers.eigh(), "gram"),
    (ng.solvers.qr(), "gram"),
    (ng.solvers.row_space(), "square gram"),
    (ng.solvers.woodbury(), "low rank"),
    (ng.solvers.kronecker(), "kronecker"),
    (ng.solvers.blockwise(), "blocks"),
    (_cg, "gram"),
    (_cg, "implicit"),
    (ng.solvers.auto(), "diagonal"),
    (None, "gram"),
    (None, "sum"),
]


class RuleCase(NamedTuple):
    """A damping argument, and λD as a vector, in numpy."""

    damping: Any
    added: Callable[[np.ndarray], np.ndarray]
    covariant: bool  # under a change of units
    homogeneous: bool  # of degree one in G


RULES = {
    "none": RuleCase(None, lambda g: np.zeros(len(g)), True, True),
    "zero": RuleCase(0.0, lambda g: np.zeros(len(g)), True, True),
    "number": RuleCase(0.25, lambda g: 0.25 * np.diag(g), True, True),
    "trace": RuleCase(ng.damping.trace(0.5), lambda g: 0.5 * np.full(len(g), np.trace(g) / len(g)), False, True),
    "absolute": RuleCase(ng.damping.absolute(0.5), lambda g: np.full(len(g), 0.5), False, False),
}

# Singular G: rows, and what makes it singular.
SINGULAR = {
    "softmax": rounded(np.sqrt(np.arange(1, 6) / 15))[:, None] * (np.eye(P) - np.arange(1, 6) / 15),
    "fewer samples than parameters": ROWS[:3],
    "one sample": ROWS[:1],
    "duplicated parameter": ROWS[:, [0, 1, 2, 2, 4]],
    "zero column": ROWS * [1, 1, 0, 1, 1],
    "zero column and fewer samples": ROWS[:2] * [1, 0, 1, 1, 1],
}


# Distributions with finite (or truncated) support and a Fisher matrix known in closed form.


class FisherCase(NamedTuple):
    log_prob: Callable[[Any, Any], Any]
    params: Any
    support: np.ndarray
    fisher: np.ndarray


def _categorical(logits, k):
    return jax.nn.log_softmax(logits)[k]


def _free(q, k):
    return jnp.log(jnp.concatenate([q, 1 - jnp.sum(q, keepdims=True)]))[k]


def _binomial(p, x):
    choose = gammaln(7.0) - gammaln(x + 1) - gammaln(7 - x)
    return (choose + xlogy(x, p) + xlog1py(6 - x, -p)).astype(p.dtype)


def _negative_binomial(mean, x):
    r = 3.0
    constant = gammaln(x + r) - gammaln(r) - gammaln(x + 1)
    return constant + r * jnp.log(r / (r + mean)) + x * jnp.log(mean / (r + mean))


def _product(params, x):
    return _categorical(params["k"], x[0].astype(int)) + jax.nn.log_sigmoid((2 * x[1] - 1) * params["b"])


_p = np.array([0.5, 0.3, 0.2])
_product_p = np.exp([0.1, -0.4, 0.9]) / np.exp([0.1, -0.4, 0.9]).sum()
_sigmoid = lambda x: 1 / (1 + np.exp(-x))
_counts = np.arange(80.0)

FISHERS = {
    "categorical logits": FisherCase(_categorical, np.log(_p), np.arange(3), np.diag(_p) - np.outer(_p, _p)),
    "categorical free probabilities": FisherCase(_free, _p[:2], np.arange(3), np.array([[7, 5], [5, 25 / 3]])),
    "bernoulli logit": FisherCase(
        lambda t, x: jax.nn.log_sigmoid((2 * x - 1) * t), 0.7, np.arange(2.0), _sigmoid(0.7) * _sigmoid(-0.7)
    ),
    "spin": FisherCase(
        lambda h, s: s * h - jnp.logaddexp(h, -h), 0.7, np.array([-1.0, 1.0]), 1 / np.cosh(0.7) ** 2
    ),
    "binomial": FisherCase(_binomial, 0.3, np.arange(7.0), 6 / (0.3 * 0.7)),
    "poisson mean": FisherCase(
        lambda m, x: x * jnp.log(m) - m - gammaln(x + 1), 2.5, _counts, 1 / 2.5
    ),
    "poisson log mean": FisherCase(
        lambda t, x: x * t - jnp.exp(t) - gammaln(x + 1), np.log(2.5), _counts, 2.5
    ),
    "geometric": FisherCase(
        lambda p, x: jnp.log(p) + (x - 1) * jnp.log1p(-p), 0.4, np.arange(1.0, 101), 1 / (0.4**2 * 0.6)
    ),
    "negative binomial mean": FisherCase(
        _negative_binomial, 2.0, np.arange(150.0), 3 / (2 * (2 + 3))
    ),
    "circle": FisherCase(
        lambda t, k: 2 * jnp.log(jnp.stack([jnp.cos(t / 2), jnp.sin(t / 2)]))[k], 0.8, np.arange(2), 1.0
    ),
    "product, two leaves": FisherCase(
        _product,
        {"k": np.array([0.1, -0.4, 0.9]), "b": np.array(0.7)},
        np.array([[k, b] for k in range(3) for b in range(2)], float),
        np.block([
            [np.array([[_sigmoid(0.7) * _sigmoid(-0.7)]]), np.zeros((1, 3))],
            [np.zeros((3, 1)), np.diag(_product_p) - np.outer(_product_p, _product_p)],
        ]),
    ),
}  # fmt: skip


def fisher_case(name, dtype):
    """log_prob, params, support in `dtype`, and the formula."""
    case = FISHERS[name]
    support = case.support if case.support.dtype.kind == "i" else case.support.astype(dtype)
    return case.log_prob, cast(case.params, dtype), jnp.asarray(support), np.atleast_2d(case.fisher)


# Families of Gaussians with parameters away from the standard ones; p3 is enough for every block to show.


def full_rank_matrix(lower):
    """Fisher information in (μ, L), the strict upper triangle unused: from ½tr(Σ⁻¹∂ΣΣ⁻¹∂Σ)."""
    d = len(lower)
    inverse = np.linalg.inv(lower @ lower.T)
    tangents = []
    for i in range(d):
        for j in range(d):
            e = np.zeros((d, d))
            e[i, j] = j <= i
            tangents.append(inverse @ (e @ lower.T + lower @ e.T))
    block = np.array([[0.5 * np.trace(a @ b) for b in tangents] for a in tangents])
    return np.block([[inverse, np.zeros((d, d * d))], [np.zeros((d * d, d)), block]])


LOWER = rounded(np.array([[1.5, 0.0], [-0.7, 0.4]]))
FAMILIES = {
    "full rank": (ng.families.gaussian_full_rank(2), ng.families.FullRankParams(np.array([0.3, -1.0]), LOWER)),
    "mean field": (
        ng.families.gaussian_mean_field(2),
        ng.families.MeanFieldParams(np.array([0.3, -1.0]), np.array([0.5, -0.75])),
    ),
    "bernoulli": (ng.families.bernoulli(3), np.array([0.5, -1.0, 2.0])),
    "spins": (ng.families.bernoulli(3, values=(-1, 1)), np.array([0.5, -1.0, 2.0])),
}


def family(name, dtype):
    fam, params = FAMILIES[name]
    return fam, cast(params, dtype)
