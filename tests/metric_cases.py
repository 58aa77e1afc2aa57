"""Metrics of models, draws and fields: parameters, data, and the matrix found by numpy. A new metric is one row.

`build(view, **options)` makes the metric of functions that see `view(params)`: flat vectors, other units or another
precision are then the same case. Numbers are float32 numbers, so that both precisions see the same problem.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import rounded

import natgrad_jax as ng

metrics, losses, operators = ng.metrics, ng.metrics.losses, ng.operators


class MetricCase(NamedTuple):
    build: Callable[..., Any]  # (view, **options) -> metric
    params: Any
    data: dict[str, Any]
    matrix: np.ndarray
    forms: str = "jac chunk free"  # the options that it has
    units: bool = True  # covariant under a change of units of the parameters


_rng = np.random.default_rng(11)
X = rounded(_rng.normal(size=(7, 2)))  # 7 examples
Y = rounded(_rng.normal(size=(7, 3)))
LABELS = np.array([0, 2, 1, 1, 0, 2, 2])
COUNTS = np.abs(np.round(3 * Y))
W, B = rounded(_rng.normal(size=(3, 2))), rounded(_rng.normal(size=3))
PARAMS = {"b": B, "w": W}
U = X @ W.T + B  # (7, 3)
AFFINE = np.stack([np.concatenate([np.eye(3), np.kron(np.eye(3), x)], axis=1) for x in X])  # ∂u/∂(b, w), (7, 3, 9)


def affine(p, x):
    return x @ p["w"].T + p["b"]


def curved(p, x):
    u = affine(p, x)
    return u + 0.25 * u**2


Z = U + 0.25 * U**2
CURVED = (1 + 0.5 * U)[:, :, None] * AFFINE


def _pulled(jacobian, hessian, weights):
    """Σ w JᵀHJ."""
    return np.einsum("n,nkp,nkl,nlq->pq", weights, jacobian, hessian, jacobian)


def _diagonals(values):
    return np.einsum("nk,kl->nkl", values, np.eye(values.shape[1]))


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _multinomial(z):
    p = _softmax(z)
    return _diagonals(p) - p[:, :, None] * p[:, None, :]


_sigmoid = lambda z: 1 / (1 + np.exp(-z))
MEAN, SUM = np.full(7, 1 / 7), np.ones(7)


def _gauss_newton(model, loss):
    return lambda view, **options: metrics.gauss_newton(lambda p, batch: model(view(p), batch[0]), loss, **options)


def _of_sum(f):
    """A loss without a closed form, a sum over examples and outputs."""
    return lambda z, batch: jnp.sum(f(z))


def _log_cosh_pair(z, batch):
    """Convex, and couples the outputs: log cosh(z₀ + z₁) + (z₁ − 2z₂)²."""
    return jnp.mean(jnp.logaddexp(z[:, 0] + z[:, 1], -z[:, 0] - z[:, 1]) + (z[:, 1] - 2 * z[:, 2]) ** 2)


_a, _c = np.array([1.0, 1, 0]), np.array([0, 1.0, -2])
_pair = (1 - np.tanh(Z[:, 0] + Z[:, 1]) ** 2)[:, None, None] * np.outer(_a, _a) + 2 * np.outer(_c, _c)


# Distributions.


def _class_log_prob(p, y, x):
    return jax.nn.log_softmax(affine(p, x))[y]


def _conditional(view, **options):
    return metrics.fisher(lambda p, y, x: _class_log_prob(view(p), y, x), jnp.arange(3), inputs=True, **options)


def _unnormalised(view, **options):
    log_phi = lambda p, y, x: affine(view(p), x)[y] + 3 * jnp.sum(view(p)["b"]) + x[0]
    return metrics.fisher(log_phi, jnp.arange(3), inputs=True, normalized=False, **options)


def _boltzmann(view, **options):
    """Statistics 1000 + x: the mean of the scores is large, and no part of F."""
    log_phi = lambda p, x: x @ view(p) + 1000 * jnp.sum(view(p))
    return metrics.fisher(log_phi, jnp.asarray(X), normalized=False, **options)


THETA = np.array([0.5, -0.75])
_q = _softmax((X @ THETA)[None])[0]


def _weighted_labels(view, **options):
    """Four points, of which two are the same label: their weights ½ make it one."""
    log_prob = lambda p, y, x: jax.nn.log_softmax(affine(view(p), x))[jnp.array([0, 0, 1, 2])][y]
    support, weights = jnp.arange(4), jnp.array([0.5, 0.5, 1.0, 1.0])
    return metrics.fisher(log_prob, support, weights=weights, inputs=True, **options)


def _monte_carlo(view, **options):
    """`draws` that are known: what a key of any kind gives is the constant (1, −2)."""
    log_prob = lambda p, x: -0.5 * jnp.sum((x - view(p)) ** 2)
    sample = lambda p, key: jnp.array([1.0, -2.0])
    return metrics.monte_carlo_fisher(log_prob, sample, 3, **options)


def _monte_carlo_given(view, **options):
    log_prob = lambda p, y, x: -0.5 * jnp.sum((y - affine(view(p), x)) ** 2)
    sample = lambda p, key, x: jnp.array([1.0, -2.0, 0.5])
    return metrics.monte_carlo_fisher(log_prob, sample, 2, inputs=True, **options)


def _monte_carlo_centred(view, **options):
    """Two draws with scores ±1 about a common one: Σ(s − s̄)²/(2 − 1), up to a function of θ alone."""
    log_phi = lambda p, x: x * view(p) + 7 * view(p) ** 2
    sample = lambda p, key: 2.0 * jax.random.randint(key, (), 0, 2, jnp.int32) - 1
    return metrics.monte_carlo_fisher(log_phi, sample, 400, centred=True, **options)


def _bernoulli_spread():
    draws = jax.vmap(lambda k: 2 * jax.random.randint(k, (), 0, 2, jnp.int32) - 1)(
        jax.random.split(jax.random.key(0), 400)
    )
    return np.array([[np.var(np.asarray(draws, float), ddof=1)]])


_scores = np.einsum("nk,nkp->np", np.array([1.0, -2, 0.5]) - U, AFFINE)
_label_scores = np.einsum("nk,nkp->np", np.eye(3)[LABELS] - _softmax(U), AFFINE)


def _empirical(view, **options):
    return metrics.empirical_fisher(lambda p, xy: _class_log_prob(view(p), xy[1], xy[0]), **options)


# Least squares: two terms with batches of their own.


def _terms(view, **options):
    inside = lambda p, batch: curved(view(p), batch[0]) - batch[1]
    edge = lambda p, x: affine(view(p), x)[:, 0]
    return metrics.least_squares({"inside": inside, "edge": edge}, {"inside": 0.5, "edge": EDGE_WEIGHTS}, **options)


EDGE_WEIGHTS = np.array([1.0, 0.0, 2.0])
_terms_matrix = _pulled(CURVED, _diagonals(np.ones((7, 3))), 0.5 * SUM) + np.einsum(
    "n,np,nq->pq", EDGE_WEIGHTS, AFFINE[:3, 0], AFFINE[:3, 0]
)


# Pullbacks of the five numbers (b, 2 w[:, 0]·w[:, 1]).


def _features(p):
    return {"b": jnp.exp(p["b"]), "c": jnp.stack([jnp.sum(p["w"][:, 0] * p["w"][:, 1]), jnp.sum(p["w"] ** 2)])}


FEATURES = np.concatenate(
    [
        np.concatenate([np.diag(np.exp(B)), np.zeros((3, 6))], axis=1),
        np.concatenate([np.zeros(3), W[:, ::-1].ravel()])[None],
        np.concatenate([np.zeros(3), 2 * W.ravel()])[None],
    ]
)
LENGTH = rounded(_rng.normal(size=(6, 5)))


def _length_matrix(out):
    return operators.Dense(jnp.asarray(LENGTH.T @ LENGTH, out["b"].dtype), operators.Space.of(out))


def _pullback(inner):
    """Of a copy: JAX knows a constant by its identity, and would take the precision that it first was seen in."""
    return lambda view, **options: metrics.pullback(lambda p: _features(view(p)), deepcopy(inner), **options)


def _pullback_case(inner, matrix, forms="jac free"):
    return MetricCase(_pullback(inner), PARAMS, {}, FEATURES.T @ matrix @ FEATURES, forms)


def _with_data(view, **options):
    def f(p, *, batch):
        return curved(view(p), batch)

    return metrics.pullback(f, **options)


# Wave functions: log ψ = a·x + i b·tanh(x), and a real one.


def _complex_psi(view, **options):
    log_psi = lambda p, x: view(p)["w"][0] @ x + 1j * (view(p)["w"][1] @ jnp.tanh(x)) + 50 * jnp.sum(view(p)["b"])
    return metrics.quantum_geometric(log_psi, **options)


def _real_psi(view, **options):
    return metrics.quantum_geometric(lambda p, x: view(p) @ x + 30 * jnp.sum(view(p)), **options)


def _covariance(columns, weights):
    w = weights / weights.sum()
    centred = columns - w @ columns
    return np.real((centred.conj().T * w) @ centred)


_psi_columns = np.zeros((7, 9), complex)
_psi_columns[:, 3:5], _psi_columns[:, 5:7], _psi_columns[:, :3] = X, 1j * np.tanh(X), 50
AMPLITUDES = np.array([1.0, 2, 0, 4, 1, 3, 0.5])


# Fields u = w·(sin x₀, x₀ x₁) + b on the points X.

_value = np.stack([np.sin(X[:, 0]), X[:, 0] * X[:, 1]], 1)
_slope = np.stack([np.stack([np.cos(X[:, 0]), 0 * X[:, 0]], 1), X[:, ::-1]], 1)  # (n, parameter, direction)
QUADRATURE = np.array([0.5, 0.25, 0.25, 0.0, 1.0, 0.5, 0.5])


def field(p, x):
    return p @ jnp.stack([jnp.sin(x[0]), x[0] * x[1]])


def _energy(view, **options):
    fields = lambda p, x: {"slope": jax.grad(lambda x: field(view(p), x))(x), "value": field(view(p), x)}
    return metrics.energy(fields, {"slope": 0.5, "value": 2.0}, **options)


def _field_matrix(value, slope, measure):
    return value * np.einsum("n,np,nq->pq", measure, _value, _value) + slope * np.einsum(
        "n,npd,nqd->pq", measure, _slope, _slope
    )


_hess = np.zeros((7, 2, 2, 2))
_hess[:, 0, 0, 0], _hess[:, 1, 0, 1], _hess[:, 1, 1, 0] = -np.sin(X[:, 0]), 1, 1


def _mirror(view, **options):
    potential = lambda p, *, batch: jnp.mean(jax.nn.logsumexp(affine(view(p), batch), axis=-1))
    return metrics.hessian(potential, **options)


def _quasi(view, **options):
    inner = metrics.least_squares(lambda p, x: curved(view(p), x), **options)
    return metrics.quasi_diagonal(inner, lambda p: [(p["w"].T, p["b"])])


def _quasi_matrix():
    """Per unit: F_00, F_0i, F_ii kept, F_0i F_0j/F_00 elsewhere; zero between units."""
    full, out = np.einsum("nkp,nkq->pq", CURVED, CURVED), np.zeros((9, 9))
    for k in range(3):
        own = [k, 3 + 2 * k, 4 + 2 * k]
        block = full[np.ix_(own, own)]
        block[1, 2] = block[2, 1] = block[0, 1] * block[0, 2] / block[0, 0]
        out[np.ix_(own, own)] = block
    return out


_normal = {"loc": np.array(0.5), "scale": np.array(2.0)}
_batch = {"batch": (X, Y)}
_labelled = {"batch": (X, LABELS)}
_square = rounded(np.array([[2.0, 0.5], [-1.0, 1.5]]))
_inverse = np.linalg.inv(_square)

METRICS = {
    "fisher, inputs": MetricCase(_conditional, PARAMS, {"batch": X}, _pulled(AFFINE, _multinomial(U), MEAN)),
    "fisher, inputs, unnormalised": MetricCase(
        _unnormalised, PARAMS, {"batch": X}, _pulled(AFFINE, _multinomial(U), MEAN)
    ),
    "fisher, inputs, weights": MetricCase(
        _weighted_labels, PARAMS, {"batch": X}, _pulled(AFFINE, _multinomial(U), MEAN)
    ),
    "fisher, unnormalised": MetricCase(_boltzmann, THETA, {}, np.cov(X.T, aweights=_q, ddof=0), "jac chunk"),
    "monte carlo": MetricCase(
        _monte_carlo, THETA, {"key": 0}, np.outer(np.array([1, -2]) - THETA, np.array([1, -2]) - THETA)
    ),
    "monte carlo, inputs": MetricCase(_monte_carlo_given, PARAMS, {"key": 0, "batch": X}, _scores.T @ _scores / 7),
    "monte carlo, centred": MetricCase(
        _monte_carlo_centred, np.array(0.5), {"key": 0}, _bernoulli_spread(), "jac chunk"
    ),
    "empirical": MetricCase(_empirical, PARAMS, _labelled, _label_scores.T @ _label_scores / 7),
    "gauss-newton, squares": MetricCase(
        _gauss_newton(curved, losses.squares()), PARAMS, _batch, _pulled(CURVED, _diagonals(np.ones((7, 3))), MEAN)
    ),
    "gauss-newton, softmax": MetricCase(
        _gauss_newton(curved, losses.softmax_cross_entropy()), PARAMS, _labelled, _pulled(CURVED, _multinomial(Z), MEAN)
    ),
    "gauss-newton, sigmoid": MetricCase(
        _gauss_newton(curved, losses.sigmoid_cross_entropy(mean=False)), PARAMS, {"batch": (X, _sigmoid(Y))},
        _pulled(CURVED, _diagonals(_sigmoid(Z) * _sigmoid(-Z)), SUM),
    ),
    "gauss-newton, poisson": MetricCase(
        _gauss_newton(curved, losses.poisson()), PARAMS, {"batch": (X, COUNTS)},
        _pulled(CURVED, _diagonals(np.exp(Z)), MEAN),
    ),
    "gauss-newton, any loss": MetricCase(
        _gauss_newton(curved, _log_cosh_pair), PARAMS, _batch, _pulled(CURVED, _pair, MEAN)
    ),
    "gauss-newton, any loss, sum": MetricCase(
        _gauss_newton(curved, _of_sum(jnp.cosh)), PARAMS, _batch, _pulled(CURVED, _diagonals(np.cosh(Z)), SUM)
    ),
    "least squares": MetricCase(
        lambda view, **options: metrics.least_squares(lambda p, batch: curved(view(p), batch[0]) - batch[1], **options),
        PARAMS, _batch, _pulled(CURVED, _diagonals(np.ones((7, 3))), SUM),
    ),
    "least squares, one term of a list": MetricCase(
        lambda view, **options: metrics.least_squares([lambda p, x: affine(view(p), x)], [2.0], **options),
        PARAMS, {"batch": [X]}, _pulled(AFFINE, _diagonals(np.ones((7, 3))), 2 * SUM),
    ),
    "least squares, two terms": MetricCase(
        _terms, PARAMS, {"batch": {"inside": (X, Y), "edge": X[:3]}}, _terms_matrix
    ),
    "pullback": _pullback_case(None, np.eye(5)),
    "pullback, matrix": _pullback_case(LENGTH.T @ LENGTH, LENGTH.T @ LENGTH),
    "pullback, singular matrix": _pullback_case(LENGTH[:2].T @ LENGTH[:2], LENGTH[:2].T @ LENGTH[:2]),
    "pullback, diagonal": _pullback_case(
        operators.Diagonal({"b": np.arange(3.0), "c": np.array([2.0, 3.0])}), np.diag([0, 1.0, 2, 2, 3])
    ),
    "pullback, rows": _pullback_case(operators.Gram(LENGTH), LENGTH.T @ LENGTH),
    "pullback, products": _pullback_case(
        lambda out: operators.Sum((_length_matrix(out),), (2.0,)),
        2 * LENGTH.T @ LENGTH, "",
    ),
    "pullback, metric": _pullback_case(
        metrics.scales({"b": 0.5, "c": 2.0}, positive={"b": True, "c": False}),
        np.diag(np.concatenate([4 * np.exp(-2 * B), [0.25, 0.25]])),
    ),
    "pullback, data": MetricCase(
        _with_data, PARAMS, {"batch": X}, _pulled(CURVED, _diagonals(np.ones((7, 3))), SUM), "jac free"
    ),
    "quantum, complex": MetricCase(_complex_psi, PARAMS, {"samples": X}, _covariance(_psi_columns, MEAN), "jac chunk"),
    "quantum, complex, weights": MetricCase(
        _complex_psi, PARAMS, {"samples": X, "weights": AMPLITUDES}, _covariance(_psi_columns, AMPLITUDES), "jac chunk"
    ),
    "quantum, real": MetricCase(_real_psi, THETA, {"samples": X}, _covariance(X, MEAN), "jac chunk"),
    "wasserstein, quantile": MetricCase(
        lambda view, **options: metrics.wasserstein_1d(
            lambda p, u: view(p)["loc"] + view(p)["scale"] * jax.scipy.special.ndtri(u), **options
        ),
        _normal, {}, np.eye(2), "jac",
    ),
    "wasserstein, cdf": MetricCase(
        lambda view, **options: metrics.wasserstein_1d(
            cdf=lambda p, x: jax.scipy.stats.norm.cdf(x, view(p)["loc"], view(p)["scale"]),
            bracket=(-30.0, 30.0), **options
        ),
        _normal, {}, np.eye(2), "jac",
    ),
    "energy, two terms": MetricCase(
        lambda view, **options: metrics.energy([lambda p, x: field(view(p), x)] * 2, [2.0, 3.0], **options),
        THETA, {"points": [X, X[:2]], "quadrature": [QUADRATURE, QUADRATURE[:2]]},
        _field_matrix(2, 0, QUADRATURE) + _field_matrix(3, 0, QUADRATURE * (np.arange(7) < 2)),
    ),
    "energy": MetricCase(
        _energy, THETA, {"points": X, "quadrature": QUADRATURE}, _field_matrix(2.0, 0.5, QUADRATURE)
    ),
    "sobolev": MetricCase(
        lambda view, **options: metrics.sobolev(lambda p, x: field(view(p), x), **options),
        THETA, {"points": X}, _field_matrix(1, 1, MEAN),
    ),
    "sobolev, second order": MetricCase(
        lambda view, **options: metrics.sobolev(lambda p, x: field(view(p), x), (0.0, 2.0, 3.0), **options),
        THETA, {"points": X}, _field_matrix(0, 2, MEAN) + 3 * np.einsum("n,npde,nqde->pq", MEAN, _hess, _hess),
    ),
    "hessian": MetricCase(_mirror, PARAMS, {"batch": X}, _pulled(AFFINE, _multinomial(U), MEAN), "free"),
    "relative": MetricCase(
        lambda view: lambda params: metrics.relative(view(params)), _square, {},
        np.kron(np.eye(2), _inverse @ _inverse.T), "", units=False,
    ),
    "scales of positive parameters": MetricCase(
        lambda view: metrics.scales(0.5, positive=True), np.array([1.0, 4.0]), {}, np.diag([4, 0.25]), ""
    ),
    "quasi-diagonal": MetricCase(_quasi, PARAMS, {"batch": X}, _quasi_matrix(), "jac chunk"),
}  # fmt: skip


def identity(params):
    return params


def metric_case(name, dtype, view=identity, **options):
    """(metric, params, data) in `dtype`."""
    case = METRICS[name]
    inexact = lambda x: jnp.asarray(x, dtype if np.asarray(x).dtype.kind == "f" else None)
    data = {key: jax.random.key(x) if key == "key" else jax.tree.map(inexact, x) for key, x in case.data.items()}
    return case.build(view, **options), jax.tree.map(inexact, case.params), data
