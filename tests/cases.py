"""The tables that the laws run over: a new metric, solver, rule or family is one row and gets every law.

Numbers are numpy arrays whose entries are float32 numbers, so that both precisions see the same problem.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sc
import scipy.stats
from jax.nn import log_sigmoid
from jax.scipy.special import betaln, gammaln, i0e, xlog1py, xlogy

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


def named_mistakes(table):
    """A test that each call of {name: (call, kind of error, message)} is refused by such an error."""

    @pytest.mark.parametrize("mistake", table)
    def test(mistake):
        call, kind, message = table[mistake]
        with pytest.raises(kind, match=message):
            call()

    return test


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


# Distributions with a Fisher matrix known in closed form: on a finite (or truncated) support, or a density on nodes.


class FisherCase(NamedTuple):
    log_prob: Callable[[Any, Any], Any]
    params: Any
    support: np.ndarray
    fisher: np.ndarray
    weights: np.ndarray | None = None  # of the nodes


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


def _negative_binomial_2(t, x):
    mean, r = t
    constant = gammaln(x + r) - gammaln(r) - gammaln(x + 1)
    return constant + r * jnp.log(r / (r + mean)) + x * jnp.log(mean / (r + mean))


# Nodes for densities: the trapezoidal rule on a line that is mapped to the support converges to rounding.


def _line(low, high, n, x=lambda t: t, dx=lambda t: np.ones_like(t)):
    t, h = np.linspace(low, high, n, retstep=True)
    return {"support": x(t), "weights": h * dx(t)}


def _positive(low, high, n=200):
    return _line(low, high, n, np.exp, np.exp)


def _sides(centre, low, high, n=200):
    """Both sides of a kink."""
    y = _positive(low, high, n)
    return {
        "support": np.concatenate([centre - y["support"], centre + y["support"]]),
        "weights": np.concatenate([y["weights"], y["weights"]]),
    }


def _normal(mean, variance, x):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)


def _natural_normal(t, x):
    mean, variance = -t[0] / (2 * t[1]), -1 / (2 * t[1])
    return _normal(mean, variance, x)


def _gamma(t, x):
    return t[0] * jnp.log(t[1]) - gammaln(t[0]) + (t[0] - 1) * jnp.log(x) - t[1] * x


def _beta(t, x):
    """The node is logit(x), so that 1 − x keeps its digits."""
    return (t[0] - 1) * log_sigmoid(x) + (t[1] - 1) * log_sigmoid(-x) - betaln(t[0], t[1])


def _dirichlet(t, x):
    """By two logits: the first share, and the second one of what is left."""
    rest = log_sigmoid(-x[0])
    logs = jnp.stack([log_sigmoid(x[0]), rest + log_sigmoid(x[1]), rest + log_sigmoid(-x[1])])
    return (t - 1) @ logs + gammaln(jnp.sum(t)) - jnp.sum(gammaln(t))


def _dirichlet_nodes():
    t, h = np.linspace(-25, 25, 110, retstep=True)
    a, b = (x.ravel() for x in np.meshgrid(t, t))
    slope = lambda x: 1 / (2 + 2 * np.cosh(x))
    return {"support": np.stack([a, b], 1), "weights": h**2 * slope(a) * slope(b) / (1 + np.exp(a))}


def _von_mises(t, x):
    return t[1] * (jnp.cos(x - t[0]) - 1) - jnp.log(2 * jnp.pi * i0e(t[1]))


def _student(t, x):
    loc, scale, nu = t[0], t[1], 5.0
    z = (x - loc) / scale
    constant = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * np.log(nu * np.pi)
    return (constant - jnp.log(scale) - (nu + 1) / 2 * jnp.log1p(z * z / nu)).astype(t.dtype)


def _cauchy(t, x):
    z = (x - t[0]) / t[1]
    return -jnp.log(jnp.pi * t[1]) - jnp.log1p(z * z)


def _logistic(t, x):
    z = (x - t[0]) / t[1]
    return -jnp.log(t[1]) + log_sigmoid(z) + log_sigmoid(-z)


def _gumbel(t, x):
    z = (x - t[0]) / t[1]
    return -jnp.log(t[1]) - z - jnp.exp(-z)


def _weibull(t, x):
    k, scale = t[0], t[1]
    return jnp.log(k / scale) + (k - 1) * jnp.log(x / scale) - (x / scale) ** k


def _inverse_gaussian(t, x):
    mean, shape = t[0], t[1]
    return 0.5 * jnp.log(shape / (2 * jnp.pi * x**3)) - shape * (x - mean) ** 2 / (2 * mean**2 * x)


def _laplace(t, x):
    return -jnp.abs(x - t[0]) / t[1] - jnp.log(2 * t[1])


def _product(params, x):
    return _categorical(params["k"], x[0].astype(int)) + jax.nn.log_sigmoid((2 * x[1] - 1) * params["b"])


_p = np.array([0.5, 0.3, 0.2])
_product_p = np.exp([0.1, -0.4, 0.9]) / np.exp([0.1, -0.4, 0.9]).sum()
_sigmoid = lambda x: 1 / (1 + np.exp(-x))
_counts = np.arange(80.0)
_psi1 = lambda x: sc.polygamma(1, x)
_A = sc.i1(1.5) / sc.i0(1.5)
_euler = 1 - np.euler_gamma
_alpha = np.array([2.5, 1.5, 3.0])
_nb = scipy.stats.nbinom(3.0, 3.0 / 5.0)
_bell = _line(-12, 14, 300)

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
    "negative binomial": FisherCase(
        _negative_binomial_2, np.array([2.0, 3.0]), np.arange(150.0),
        np.diag([3 / (2 * 5), _psi1(3.0) - _nb.pmf(np.arange(300)) @ _psi1(np.arange(300) + 3.0) - 2 / (3 * 5)]),
    ),
    "normal, mean and deviation": FisherCase(
        lambda t, x: _normal(t[0], t[1] ** 2, x), np.array([0.5, 0.75]), fisher=np.diag([1, 2]) / 0.75**2, **_bell
    ),
    "normal, mean and variance": FisherCase(
        lambda t, x: _normal(t[0], t[1], x), np.array([0.5, 0.75]), fisher=np.diag([1 / 0.75, 0.5 / 0.75**2]), **_bell
    ),
    "normal, mean and log deviation": FisherCase(
        lambda t, x: _normal(t[0], jnp.exp(2 * t[1]), x), np.array([0.5, -0.25]),
        fisher=np.diag([np.exp(0.5), 2]), **_bell
    ),
    "normal, natural": FisherCase(
        _natural_normal, np.array([0.5, -1.0]),  # mean 0.25, variance 0.5
        fisher=np.array([[0.5, 0.25], [0.25, 2 * 0.5**2 + 4 * 0.25**2 * 0.5]]), **_bell
    ),
    "exponential": FisherCase(
        lambda rate, x: jnp.log(rate) - rate * x, 1.5, fisher=1 / 1.5**2, **_positive(-40, 4)
    ),
    "gamma": FisherCase(
        _gamma, np.array([2.5, 1.5]), fisher=np.array([[_psi1(2.5), -1 / 1.5], [-1 / 1.5, 2.5 / 1.5**2]]),
        **_positive(-18, 4.5)
    ),
    "beta": FisherCase(
        _beta, np.array([2.5, 1.5]), fisher=np.diag(_psi1(np.array([2.5, 1.5]))) - _psi1(4.0),
        **_line(-28, 28, 300, dx=lambda t: 1 / (2 + 2 * np.cosh(t)))
    ),
    "dirichlet": FisherCase(
        _dirichlet, _alpha, fisher=np.diag(_psi1(_alpha)) - _psi1(_alpha.sum()), **_dirichlet_nodes()
    ),
    "von Mises": FisherCase(
        _von_mises, np.array([0.5, 1.5]), fisher=np.diag([1.5 * _A, 1 - _A / 1.5 - _A**2]),
        support=np.arange(64) * 2 * np.pi / 64, weights=np.full(64, 2 * np.pi / 64)
    ),
    "Student t": FisherCase(
        _student, np.array([0.5, 0.75]), fisher=np.diag([6 / 8, 10 / 8]) / 0.75**2,
        **_line(-10, 10, 300, np.sinh, np.cosh)
    ),
    "Cauchy": FisherCase(
        _cauchy, np.array([0.5, 0.75]), fisher=np.eye(2) / (2 * 0.75**2), **_line(-36, 36, 900, np.sinh, np.cosh)
    ),
    "logistic": FisherCase(
        _logistic, np.array([0.5, 0.75]), fisher=np.diag([1 / 3, (3 + np.pi**2) / 9]) / 0.75**2, **_line(-40, 40, 400)
    ),
    "Gumbel": FisherCase(
        _gumbel, np.array([0.5, 0.75]),
        fisher=np.array([[1, -_euler], [-_euler, np.pi**2 / 6 + _euler**2]]) / 0.75**2, **_line(-4, 40, 400)
    ),
    "Weibull": FisherCase(
        _weibull, np.array([1.75, 2.0]),
        fisher=np.array([[(_euler**2 + np.pi**2 / 6) / 1.75**2, -_euler / 2], [-_euler / 2, (1.75 / 2) ** 2]]),
        **_positive(-28, 4)
    ),
    "inverse Gaussian": FisherCase(
        _inverse_gaussian, np.array([1.5, 2.0]), fisher=np.diag([2 / 1.5**3, 1 / (2 * 2.0**2)]), **_positive(-5, 5)
    ),
    "Laplace": FisherCase(
        _laplace, np.array([0.5, 0.75]), fisher=np.eye(2) / 0.75**2, **_sides(0.5, -40, 4)
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
    """log_prob, params, support in `dtype`, the formula, and the weights if there are any."""
    case = FISHERS[name]
    support = case.support if case.support.dtype.kind == "i" else case.support.astype(dtype)
    options = {} if case.weights is None else {"weights": jnp.asarray(case.weights, dtype)}
    return case.log_prob, cast(case.params, dtype), jnp.asarray(support), np.atleast_2d(case.fisher), options


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
