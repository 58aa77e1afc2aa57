"""Bijectors against the Jacobians of their maps and densities in closed form; log-densities carried through them."""

import functools
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sc
import scipy.stats
from cases import flat

import natgrad_jax as ng
from natgrad_jax import constraints as c

full_rank = ng.families.gaussian_full_rank


def lower(x):
    """The entries on and below the diagonal."""
    return x[jnp.tril_indices(len(x))]


def strictly_lower(x):
    return x[jnp.tril_indices(len(x), -1)]


def is_factor(x):
    return (np.diag(x) > 0).all() and not np.triu(x, 1).any() and np.allclose((x**2).sum(1), 1, rtol=1e-5)


def is_correlation(x):
    """Of eigenvalues that rounding may have moved below 0, by what rounding of the entries explains."""
    rounding = 8 * len(x) * np.finfo(x.dtype).eps
    return (np.diag(x) == 1).all() and (x == x.T).all() and np.linalg.eigvalsh(x.astype(float))[0] > -rounding


def is_covariance(x):
    scale = np.sqrt(np.diag(x.astype(float)))
    return (x == x.T).all() and np.linalg.eigvalsh(x / np.outer(scale, scale))[0] > 0


# bijector, number of free numbers, free coordinates of x, whether x (numpy) lies in the set.
BIJECTORS = {
    "real": (c.real((2, 3)), 6, jnp.ravel, lambda x: np.isfinite(x).all()),
    "real, a number": (c.real(), 1, jnp.ravel, np.isfinite),
    "positive": (c.positive([2]), 2, jnp.ravel, lambda x: (x > 0).all() and np.isfinite(x).all()),
    "positive, none": (c.positive(0), 0, jnp.ravel, lambda x: x.shape == (0,)),
    "interval": (c.interval(-1.5, 4, (2, 2)), 4, jnp.ravel, lambda x: ((x > -1.5) & (x < 4)).all()),
    "interval from 0": (c.interval(0, 1), 1, jnp.ravel, lambda x: 0 < x < 1),
    "interval to 0": (c.interval(-3, 0), 1, jnp.ravel, lambda x: -3 < x < 0),
    "ordered": (c.ordered(4), 4, jnp.ravel, lambda x: (np.diff(x) >= 0).all()),
    "ordered, one": (c.ordered(1), 1, jnp.ravel, np.isfinite),
    "simplex": (c.simplex(5), 4, lambda x: x[1:], lambda x: (x > 0).all() and np.isclose(x.sum(), 1, rtol=1e-6)),
    "simplex, two": (c.simplex(2), 1, lambda x: x[:1], lambda x: (x > 0).all() and np.isclose(x.sum(), 1, rtol=1e-6)),
    "simplex, one": (c.simplex(1), 0, lambda x: x[:0], lambda x: x.tolist() == [1.0]),
    "factor": (c.correlation_cholesky(4), 6, strictly_lower, is_factor),
    "factor, one": (c.correlation_cholesky(1), 0, strictly_lower, lambda x: x.tolist() == [[1.0]]),
    "correlation": (c.correlation(4), 6, strictly_lower, is_correlation),
    "correlation, one": (c.correlation(1), 0, strictly_lower, lambda x: x.tolist() == [[1.0]]),
    "covariance": (c.covariance(3), 6, lower, is_covariance),
    "covariance, one": (c.covariance(1), 1, lower, lambda x: x.shape == (1, 1) and x > 0),
}  # fmt: skip

every_bijector = pytest.mark.parametrize("name", BIJECTORS)
NEAR, FAR, STEP = slice(0, 5), slice(5, 15), 1e-4


def points(size, dtype):
    """Free numbers: 0 and four draws of N(0, 1); ±30 in every entry or of random signs; pairs of small steps from 0."""
    rng = np.random.default_rng(0)
    near, signs = rng.normal(size=(4, size)), np.sign(rng.normal(size=(8, size)))
    far = 30 * np.concatenate([np.ones((1, size)), -np.ones((1, size)), signs])
    steps = STEP * np.concatenate([np.eye(size), -np.eye(size)])
    return jnp.asarray(np.concatenate([np.zeros((1, size)), near, far, steps]), dtype)


class Facts(NamedTuple):
    """What a bijector says at the points, as numpy; the last two are of c·x + log|det| with some c."""

    u: np.ndarray
    x: np.ndarray
    back: np.ndarray
    log_det: np.ndarray
    slope: np.ndarray
    jacobian: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray


@functools.cache
def facts(name, dtype):
    """One program for all laws of a bijector; second derivatives in double precision only."""
    bijector, size, free, _ = BIJECTORS[name]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=bijector.shape), dtype)
    value = lambda u: jnp.sum(weights * bijector.forward(u)) + bijector.log_det(u)

    def at(u):
        x = bijector.forward(u)
        first = x, bijector.inverse(x), *jax.value_and_grad(bijector.log_det)(u)
        if dtype == np.float32:
            return *first, (), jax.grad(value)(u), ()
        return *first, jax.jacfwd(lambda u: free(bijector.forward(u)))(u), jax.grad(value)(u), jax.hessian(value)(u)

    u = points(size, dtype)
    return Facts(*jax.tree.map(np.asarray, (u, *jax.jit(jax.vmap(at))(u))))


@every_bijector
def test_shapes_and_dtypes(name, dtype):
    bijector, size, _, _ = BIJECTORS[name]
    n = len(points(size, dtype))
    got = facts(name, dtype)
    assert bijector.size == size and got.x.shape == (n, *bijector.shape)
    assert got.back.shape == got.slope.shape == (n, size) and got.log_det.shape == (n,)
    assert {x.dtype for x in (got.x, got.back, got.log_det, got.slope, got.gradient)} == {dtype}


@every_bijector
def test_the_inverse_undoes_the_map(name, dtype):
    """The tolerance is that of the worst conditioned, a correlation near ±1: one over its smallest eigenvalue."""
    got = facts(name, dtype)
    np.testing.assert_allclose(got.back[NEAR], got.u[NEAR], atol=1e4 * cases.eps(dtype))


@every_bijector
def test_no_value_leaves_the_set(name, dtype):
    got = facts(name, dtype)
    assert all(BIJECTORS[name][3](x) for x in (*got.x[NEAR], *got.x[FAR]))


@every_bijector
def test_the_log_determinant_is_that_of_the_jacobian(name, float64):
    got, size = facts(name, float64), BIJECTORS[name][1]
    assert got.jacobian.shape[1:] == (size, size)
    expected = np.linalg.slogdet(got.jacobian[NEAR])[1]
    np.testing.assert_allclose(got.log_det[NEAR], expected, rtol=0, atol=1e-10)


@every_bijector
def test_derivatives_are_finite_far_out(name, dtype):
    got = facts(name, dtype)
    assert all(np.isfinite(x).all() for x in (got.log_det, got.slope, got.gradient))


@every_bijector
def test_second_derivatives_at_the_origin(name, float64):
    """`fit` starts from them there, where branches meet; against differences of the gradient."""
    got, size = facts(name, float64), BIJECTORS[name][1]
    after, before = got.gradient[15 : 15 + size], got.gradient[15 + size :]
    np.testing.assert_allclose(got.hessian[0], (after - before) / (2 * STEP), atol=1e-6)


@pytest.mark.parametrize("name", ["positive", "interval", "simplex, two", "factor"])
def test_what_rounds_to_nothing_has_a_logarithm(name, dtype):
    """e^−2000: log x, or of the diagonal, and log|det|, and the gradients of both."""
    bijector, size, _, _ = BIJECTORS[name]
    last = lambda x: x[-1, -1] if x.ndim == 2 else x[-1]
    low = jnp.asarray(-1.5 if name == "interval" else 0, dtype)
    value = lambda u: jnp.log(last(bijector.forward(u)) - low) + bijector.log_det(u)
    result = jax.jit(jax.value_and_grad(value))(jnp.full(size, 2000 if name == "simplex, two" else -2000, dtype))
    assert all(np.isfinite(x).all() for x in result)


@every_bijector
def test_bijectors_are_values(name):
    """Equal and of one hash when built alike: static arguments; and leaves."""
    bijector = BIJECTORS[name][0]
    again = type(bijector)(*(getattr(bijector, field) for field in type(bijector).__dataclass_fields__))
    assert bijector == again and hash(bijector) == hash(again) and again is not bijector
    assert jax.tree.leaves({"x": bijector}) == [bijector]


def test_the_inverse_has_a_gradient_at_the_middle(float64):
    """Where entries of the factor are 0: du/dx of correlation and factor is 1 there, arctanh′ = 1."""
    for bijector in (c.correlation(3), c.correlation_cholesky(3)):
        slopes = jax.jit(jax.jacrev(bijector.inverse))(jnp.eye(3))
        by_entry = slopes + (jnp.swapaxes(slopes, 1, 2) if bijector == c.correlation(3) else 0)
        i, j = np.tril_indices(3, -1)
        np.testing.assert_allclose(by_entry[:, i, j], np.eye(3), atol=1e-12)


@pytest.mark.parametrize("d", [2, 4])
def test_the_factor_survives_where_the_matrix_is_singular(d, float64):
    """tanh 12 = 1 − 8e−11: what is left of a row keeps its digits."""
    u = jnp.full(d * (d - 1) // 2, 12.0)
    factor = c.correlation_cholesky(d)
    np.testing.assert_allclose(factor.inverse(factor.forward(u)), u, rtol=1e-12)
    diagonal = np.cosh(12.0) ** -np.arange(d)
    np.testing.assert_allclose(np.diag(factor.forward(u)), diagonal, rtol=1e-12)


def test_known_values(float64):
    """By hand; on the simplex ‖u‖ is Aitchison's norm, whatever the basis."""
    x = np.array([0.5, 0.2, 0.2, 0.1])
    logs = np.log(x) - np.log(x).mean()
    np.testing.assert_allclose(np.linalg.norm(c.simplex(4).inverse(x)), np.linalg.norm(logs), rtol=1e-12)
    np.testing.assert_allclose(c.ordered(3).forward(jnp.log(jnp.array([np.e**2, 3.0, 0.5]))), [2, 5, 5.5], rtol=1e-12)
    np.testing.assert_allclose(c.interval(-1, 3).forward(jnp.log(jnp.array([3.0]))), 2.0, rtol=1e-12)
    partial, other = np.tanh([0.3, -0.8]), np.tanh(0.5)
    matrix = np.asarray(c.correlation(3).forward(jnp.array([0.3, -0.8, 0.5])))
    np.testing.assert_allclose(matrix[1:, 0], partial, rtol=1e-12)
    given = (matrix[2, 1] - partial.prod()) / np.sqrt((1 - partial**2).prod())
    np.testing.assert_allclose(given, other, rtol=1e-12)


def test_a_change_of_units_shifts_the_diagonal_of_a_covariance(float64):
    bijector, u = c.covariance(3), points(6, float64)[1]
    units = np.array([1e-3, 1.0, 1e4])
    moved = bijector.inverse(np.outer(units, units) * np.asarray(bijector.forward(u)))
    expected = np.zeros((3, 3))
    expected[np.diag_indices(3)] = np.log(units)
    np.testing.assert_allclose(moved - u, expected[np.tril_indices(3)], atol=1e-12)


# Measures: densities of the textbooks, pushed through.


def integral(log_density, low, high, n, axes):
    """By the trapezoidal rule on a grid in u, which converges to rounding."""
    nodes, step = np.linspace(low, high, n, retstep=True)
    grid = np.stack([x.ravel() for x in np.meshgrid(*[nodes] * axes)], 1)
    return float(jnp.sum(jnp.exp(jax.jit(jax.vmap(log_density))(jnp.asarray(grid)))) * step**axes)


def dirichlet(alpha):
    constant = sc.gammaln(np.sum(alpha)) - sc.gammaln(alpha).sum()
    return lambda x: jnp.sum((jnp.asarray(alpha) - 1) * jnp.log(x)) + constant


def two_sorted(x):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x)) + np.log(2)


DENSITIES = {
    "gamma": (c.positive(), lambda x: jax.scipy.stats.gamma.logpdf(x, 2.5), (-30, 6, 400, 1)),
    "beta": (c.interval(-1, 3), lambda x: jax.scipy.stats.beta.logpdf(x, 2.5, 1.5, -1, 4), (-30, 30, 400, 1)),
    "order statistics": (c.ordered(2), two_sorted, (-36, 8, 300, 2)),
    "uniform on the simplex": (c.simplex(3), dirichlet(np.ones(3)), (-50, 50, 300, 2)),
    "dirichlet": (c.simplex(3), dirichlet(np.array([2.0, 3.0, 4.5])), (-30, 30, 300, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_integrate_to_one(name, float64):
    bijector, log_density, grid = DENSITIES[name]
    np.testing.assert_allclose(integral(c.constrain(log_density, bijector).log_density, *grid), 1, rtol=1e-8)


@pytest.mark.parametrize("concentration", [1.0, 2.5])
def test_lkj_integrates_to_one(concentration, float64):
    distributions = pytest.importorskip("numpyro.distributions")
    for bijector, lkj in (
        (c.correlation_cholesky(2), distributions.LKJCholesky(2, concentration)),
        (c.correlation(2), distributions.LKJ(2, concentration)),
    ):
        model = c.constrain(lkj.log_prob, bijector)
        np.testing.assert_allclose(integral(model.log_density, -12, 12, 400, 1), 1, rtol=1e-8)


@pytest.mark.parametrize("concentration", [1.0, 2.5])
def test_partial_correlations_of_lkj_are_beta(concentration, float64):
    """(1 + tanh u_ij)/2 ~ Beta(a, a), a = η + (d − 1 − j)/2 for column j = 1 …, all independent."""
    distributions = pytest.importorskip("numpyro.distributions")
    u = points(6, float64)[NEAR]
    z, a = np.tanh(np.asarray(u)), concentration + (4 - 1 - np.tril_indices(4, -1)[1] - 1) / 2
    expected = (scipy.stats.beta(a, a).logpdf((1 + z) / 2) + np.log((1 - z**2) / 2)).sum(1)
    for bijector, lkj in (
        (c.correlation_cholesky(4), distributions.LKJCholesky(4, concentration)),
        (c.correlation(4), distributions.LKJ(4, concentration)),
    ):
        got = jax.jit(jax.vmap(c.constrain(lkj.log_prob, bijector).log_density))(u)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_the_factor_is_that_of_numpyro(float64):
    """The same map, in the same order of u, and the same determinant."""
    transform = pytest.importorskip("numpyro.distributions.transforms").CorrCholeskyTransform()
    u = points(6, float64)[1]
    expected = transform(u)
    np.testing.assert_allclose(c.correlation_cholesky(4).forward(u), expected, atol=1e-12)
    log_det = transform.log_abs_det_jacobian(u, expected)
    np.testing.assert_allclose(c.correlation_cholesky(4).log_det(u), log_det, rtol=1e-12)


def test_a_wishart_factor_is_that_of_bartlett(float64):
    """W(ν, I): L_ii² ~ χ²(ν − i + 1) and L_ij ~ N(0, 1), independent, so that those of u follow by hand."""
    df, u = 5.5, points(6, float64)[NEAR]
    log_prob = ng.families.wishart(3).log_prob
    params = ng.families.WishartParams(jnp.asarray(df), jnp.eye(3))
    got = jax.jit(jax.vmap(c.constrain(lambda x: log_prob(params, x), c.covariance(3)).log_density))(u)
    table = np.zeros((5, 3, 3))
    table[:, *np.tril_indices(3)] = u
    for one, value in zip(table, np.asarray(got)):
        scale = np.exp(np.diag(one))
        below = scipy.stats.norm.logpdf(scale[:, None] * one) + np.log(scale)[:, None]
        expected = below[np.tril_indices(3, -1)].sum()
        expected += (scipy.stats.chi2(df - np.arange(3)).logpdf(scale**2) + np.log(2 * scale**2)).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-10)


# constrain.

TREE = {"beta": c.real(2), "rest": (c.positive(), c.simplex(1), c.simplex(3))}


def tree_density(x, data):
    share = jnp.log(x["rest"][2])
    return -0.5 * jnp.sum((x["beta"] - data) ** 2) - x["rest"][0] + jnp.sum(share) + 0 * jnp.sum(x["rest"][1])


def test_a_tree_is_cut_in_its_order(dtype):
    model = c.constrain(tree_density, TREE)
    assert model.d == 5
    u, data = points(5, dtype)[1], jnp.asarray([1.0, -2.0], dtype)
    x = model.constrain(u)
    assert jax.tree.structure(x) == jax.tree.structure(TREE)
    parts = [u[:2], jnp.exp(u[2]), jnp.ones(1), c.simplex(3).forward(u[3:])]
    np.testing.assert_allclose(flat(x), flat(parts), rtol=1e-6)
    got = jax.jit(model.log_density)(u, data)
    assert got.dtype == dtype and got.shape == ()
    expected = float(tree_density(x, data)) + float(u[2]) + np.log(flat(x["rest"][2])).sum() + np.log(3) / 2
    np.testing.assert_allclose(got, expected, rtol=20 * cases.eps(dtype))
    slope = jax.grad(model.log_density)(u, data)
    np.testing.assert_allclose(slope[:3], flat([data - u[:2], 1 - jnp.exp(u[2])]), rtol=1e-5)
    back = model.unconstrain(x)
    assert back.dtype == dtype and back.shape == (5,)
    np.testing.assert_allclose(back, u, atol=50 * cases.eps(dtype))


@pytest.mark.parametrize("axes", [(), (7,), (0,), (2, 3)])
def test_draws_are_constrained_along_leading_axes(axes, dtype):
    model = c.constrain(tree_density, TREE)
    u = jnp.asarray(np.random.default_rng(0).normal(size=(*axes, 5)), dtype)
    x = model.constrain(u)
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    assert shapes == [(*axes, 2), axes, (*axes, 1), (*axes, 3)]
    for place in np.ndindex(*axes):
        alone = model.constrain(u[place])
        np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf[place], x)), flat(alone), rtol=1e-5)  # noqa: B023


def test_numbers_do_not_widen_their_neighbours(dtype):
    """A Python number beside arrays takes their dtype, and leaves a vector that compiles nothing anew."""
    model = c.constrain(tree_density, {"tau": c.positive(), "beta": c.real(2)})
    u = model.unconstrain({"tau": 2.0, "beta": jnp.ones(2, dtype)})
    assert u.dtype == dtype and not u.weak_type
    np.testing.assert_allclose(u, [1, 1, np.log(2)], rtol=4 * cases.eps(dtype))
    assert not c.constrain(tree_density, c.positive()).unconstrain(2.0).weak_type


def test_one_bijector_is_a_tree():
    model = c.constrain(lambda x: -x, c.positive())
    np.testing.assert_allclose(model.log_density(jnp.array([0.5])), 0.5 - np.exp(0.5), rtol=1e-6)
    np.testing.assert_allclose(model.unconstrain(np.e), [1.0], rtol=1e-6)
    assert model.constrain(jnp.zeros((4, 1))).shape == (4,)


def test_a_bijector_of_ones_own_will_do(float64):
    class Cube:
        size, shape = 1, ()

        def forward(self, u):
            return u[0] ** 3 + u[0]

        def inverse(self, x):
            raise NotImplementedError

        def log_det(self, u):
            return jnp.log1p(3 * u[0] ** 2)

    model = c.constrain(jax.scipy.stats.norm.logpdf, Cube())
    np.testing.assert_allclose(integral(model.log_density, -6, 6, 400, 1), 1, rtol=1e-8)


# fit.


@pytest.mark.parametrize("seed", [0, 1])
def test_the_posterior_of_a_scale(seed, float64):
    """y ~ N(0, σ²), p(σ) ∝ 1/σ: the best Gaussian in log σ has variance 1/2n and mean ½ log(Σy²/n) + 1/2n."""
    n, squares = 50, 50 * 9.0
    log_density = lambda x, data: -(n + 1) * jnp.log(x["sigma"]) - 0.5 * data / x["sigma"] ** 2
    model = c.constrain(log_density, {"sigma": c.positive()})
    start = full_rank(1).init(loc=model.unconstrain({"sigma": 30.0}))
    result = ng.fit(model.log_density, full_rank(1), jax.random.key(seed), data=jnp.asarray(squares), init=start)
    assert bool(result.converged)
    spread = 1 / np.sqrt(2 * n)
    assert abs(float(result.params.loc[0]) - np.log(3) - spread**2) < 0.1 * spread
    assert abs(float(result.params.scale_tril[0, 0]) / spread - 1) < 0.1
    # The posterior itself: Σy²/σ² ~ χ²(n).
    draws = np.asarray(model.constrain(result.sample(jax.random.key(7), 20_000))["sigma"])
    exact = np.sqrt(squares / 2) * np.exp(sc.gammaln((n - 1) / 2) - sc.gammaln(n / 2))
    assert abs(draws.mean() - exact) < 0.1 * 3 * spread
    log_z = 0.5 * n * np.log(2) - 0.5 * n * np.log(squares) + sc.gammaln(n / 2) - np.log(2)
    assert log_z - 0.05 < float(result.final_elbo) < log_z + 5 * float(result.final_error)


@pytest.mark.parametrize("seed", [0])
def test_the_posterior_of_shares(seed, dtype):
    """Counts with a uniform prior, a Dirichlet: its means, deviations and log Z."""
    alpha = np.array([60.0, 25, 10, 5]) + 1
    log_density = lambda x: jnp.sum(jnp.asarray(alpha - 1, x.dtype) * jnp.log(x))
    model = c.constrain(log_density, c.simplex(4))
    result = ng.fit(model.log_density, full_rank(3), jax.random.key(seed), init=cases.cast(full_rank(3).init(), dtype))
    assert bool(result.converged)
    draws = np.asarray(model.constrain(result.sample(jax.random.key(7), 20_000)))
    assert draws.dtype == dtype
    exact = scipy.stats.dirichlet(alpha)
    spread = np.sqrt(np.diag(exact.cov()))
    np.testing.assert_allclose((draws.mean(0) - exact.mean()) / spread, 0, atol=0.15)
    np.testing.assert_allclose(draws.std(0) / spread, 1, atol=0.15)
    log_z = sc.gammaln(alpha).sum() - sc.gammaln(alpha.sum())
    assert log_z - 0.1 < float(result.final_elbo) < log_z + 5 * float(result.final_error)


def test_the_same_model_compiles_once():
    """A model that is made again of equal parts is the same static argument."""
    traces = []

    def log_density(x, data):
        traces.append(1)
        return -0.5 * jnp.sum((jnp.log(x) - data) ** 2) - jnp.sum(jnp.log(x))

    def run(data):
        model = c.constrain(log_density, c.positive(2))
        return ng.fit(model.log_density, full_rank(2), jax.random.key(0), data=jnp.asarray(data, jnp.float32))

    first = run([0.0, 0.0])
    before = len(traces)
    second = run([5.0, 5.0])
    # One abstract evaluation outside the compiled program checks that the result is a scalar.
    assert before > 1 and len(traces) - before <= 1
    assert np.abs(second.params.loc - first.params.loc - 5).max() < 0.2
    model = c.constrain(log_density, c.positive(2))
    assert model.log_density is model.log_density and model == c.constrain(log_density, c.positive(2))


# Mistakes.


def one(x):
    return c.constrain(jnp.sum, {"a": c.positive(2), "b": c.simplex(2)}).unconstrain(x)


MISTAKES = {
    "length of u": (lambda: c.simplex(3).forward(jnp.zeros(3)), ValueError, r"u: expected shape \(2,\).*\(3,\).*vmap"),
    "u with an axis too many": (lambda: c.ordered(3).log_det(jnp.zeros((2, 3))), ValueError, r"u: .*\(3,\).*\(2, 3\)"),
    "complex u": (lambda: c.real(2).forward(jnp.zeros(2) * 1j), TypeError, "u: expected real.*complex"),
    "shape of x": (lambda: c.covariance(2).inverse(jnp.eye(3)), ValueError, r"x: .*\(2, 2\).*\(3, 3\)"),
    "infinite": (lambda: c.real(2).inverse(np.array([1, np.inf])), ValueError, "x: expected finite numbers.*inf"),
    "not positive": (lambda: c.positive().inverse(0.0), ValueError, "x: expected positive numbers, got 0.0.*inside"),
    "outside the interval": (lambda: c.interval(0, 2).inverse(3.0), ValueError, "x: .*between 0.0 and 2.0, got 3.0"),
    "on an end": (lambda: c.interval(0, 2).inverse(2.0), ValueError, "x: .*between 0.0 and 2.0, got 2.0.*edge"),
    "not increasing": (lambda: c.ordered(2).inverse(np.zeros(2)), ValueError, "x: expected increasing"),
    "sum": (lambda: c.simplex(2).inverse(np.array([0.5, 0.6])), ValueError, "x: .*sum to 1"),
    "diagonal": (lambda: c.correlation(2).inverse(np.diag([1.0, 2.0])), ValueError, "x: .*with diagonal 1"),
    "not definite": (lambda: c.correlation(2).inverse(np.ones((2, 2))), ValueError, "x: .*definite.*diagonal 1"),
    "not symmetric": (lambda: c.covariance(2).inverse(np.array([[2.0, 0.1], [1, 2]])), ValueError, "x: .*symmetric"),
    "negative diagonal": (lambda: c.correlation_cholesky(2).inverse(np.diag([1.0, -1.0])), ValueError, "x: .*triangle"),
    "upper triangle": (
        lambda: c.correlation_cholesky(2).inverse(np.array([[1.0, np.inf], [0, 1]])), ValueError, "x: .*lower triangle"
    ),
    "no entries": (lambda: c.ordered(0), ValueError, "ordered: expected a whole number k ≥ 1, got 0"),
    "a truth value": (lambda: c.simplex(True), ValueError, "simplex: .*got True"),
    "half a dimension": (lambda: c.correlation(2.5), ValueError, "correlation: .*d ≥ 1, got 2.5"),
    "no variables": (lambda: c.correlation_cholesky(0), ValueError, "correlation_cholesky: .*got 0"),
    "negative dimension": (lambda: c.covariance(-1), ValueError, "covariance: .*got -1"),
    "negative shape": (lambda: c.real((2, -1)), ValueError, r"shape: .*\(2, -1\)"),
    "shape of floats": (lambda: c.positive(2.0), ValueError, "shape: .*got 2.0"),
    "ends in disorder": (lambda: c.interval(2, 1), ValueError, "low, high: .*low < high, got 2, 1"),
    "an end that is not finite": (lambda: c.interval(0, np.inf), ValueError, "low, high: .*finite.*move positive"),
    "an end that is NaN": (lambda: c.interval(np.nan, 1), ValueError, "low, high: .*got nan"),
    "ends in arrays": (lambda: c.interval(np.zeros(2), np.ones(2)), TypeError, "low, high: expected two numbers"),
    "no function": (lambda: c.constrain(3.0, c.real()), TypeError, "log_density: expected a function.*3.0"),
    "a bijector not built": (
        lambda: c.constrain(jnp.sum, {"a": [c.real(), c.positive]}), TypeError, r"constraints\['a'\]\[1\]: .*bijector"
    ),
    "a class": (lambda: c.constrain(jnp.sum, c.Simplex), TypeError, "constraints: expected a bijector.*Simplex"),
    "None": (lambda: c.constrain(jnp.sum, {"a": None}), TypeError, r"constraints\['a'\]: .*real\(\), got None"),
    "nothing": (lambda: c.constrain(jnp.sum, {}), ValueError, r"constraints: expected at least one bijector, got \{\}"),
    "structure of x": (lambda: one({"a": jnp.ones(2)}), ValueError, "x: expected the structure of the constraints"),
    "length of all u": (
        lambda: c.constrain(jnp.sum, c.ordered(3)).log_density(jnp.zeros(2)), ValueError, r"u: .*\(3,\).*\(2,\).*d;"
    ),
    "last axis of draws": (
        lambda: c.constrain(jnp.sum, c.ordered(3)).constrain(jnp.zeros((9, 2))), ValueError, r"u: .*\(9, 3\).*last axis"
    ),
    "a number for draws": (lambda: c.constrain(jnp.sum, c.real()).constrain(0.0), ValueError, r"u: .*\(1,\), got"),
    "a vector for a log-density": (
        lambda: ng.fit(c.constrain(jnp.log, c.positive(2)).log_density, full_rank(2), jax.random.key(0)), ValueError,
        r"log_density.*scalar.*\(2,\)"
    ),
}  # fmt: skip

test_mistakes_are_named = cases.named_mistakes(MISTAKES)


def test_the_leaf_is_named():
    with pytest.raises(ValueError, match="x: expected positive") as caught:
        one({"a": np.array([1.0, -1.0]), "b": np.ones(2) / 2})
    assert "x['a']" in caught.value.__notes__[0]


def test_mistakes_inside_jit_give_no_number():
    """They cannot be seen there: the result is NaN, no number that looks like one."""
    for bijector, x in (
        (c.positive(), -1.0),
        (c.ordered(2), np.array([1.0, 0])),
        (c.correlation(2), np.array([[1.0, 2.0], [2.0, 1.0]])),
    ):
        assert np.isnan(jax.jit(bijector.inverse)(x)).any()
