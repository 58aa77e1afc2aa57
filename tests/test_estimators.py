"""Estimators, draws and families of fit, against closed forms; minibatches, lanes, and objectives under a metric."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from cases import error, flat

import natgrad_jax as ng
from natgrad_jax import inference
from natgrad_jax.inference import Status, whitened

FAMILIES = ng.families
MEAN, COVARIANCE = np.array([1.0, -20.0]), np.array([[4.0, 15.0], [15.0, 100.0]])
SD = np.sqrt(np.diag(COVARIANCE))


def gaussian(x):
    e = x - jnp.asarray(MEAN, x.dtype)
    return -0.5 * e @ (jnp.asarray(np.linalg.inv(COVARIANCE), x.dtype) @ e)


LOG_Z = 0.5 * np.linalg.slogdet(2 * np.pi * COVARIANCE)[1]

# Draws.

DRAWS = {
    "independent": inference.independent(4096),
    "antithetic": inference.antithetic(4095),
    "orthogonal": inference.orthogonal(4095),
    "quasi-random": inference.quasi_random(4096),
    "fixed": inference.fixed(inference.independent(4096)),
    "Gauss-Hermite": inference.gauss_hermite(6),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_standard_normal(name, seed, dtype):
    """Moments up to the fourth, within six standard errors of independent draws; quadrature, to rounding."""
    draws = DRAWS[name]
    x = np.asarray(draws.points(jax.random.key(seed), 2, dtype), float)
    w = np.asarray(draws.weights(2, dtype), float)
    assert x.shape == (draws.count(2), 2) and abs(w.sum() - 1) < 1e-6
    bound = 6 / np.sqrt(4096) if name != "Gauss-Hermite" else 1e4 * cases.eps(dtype)
    for power, expected, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert np.abs(w @ x**power - expected).max() < spread * bound
    assert abs(w @ (x[:, 0] * x[:, 1])) < bound


def test_each_kind_of_draws_is_what_it_says(float64):
    key = jax.random.key(3)
    for kind in (inference.antithetic(8), inference.orthogonal(8)):
        x = kind.points(key, 4, float64)
        assert error(x[:4], -x[4:]) == 0
    x = np.asarray(inference.orthogonal(8).points(key, 4, float64))[:4]
    np.testing.assert_allclose(x @ x.T, (x[0] @ x[0]) * np.eye(4), atol=1e-12)
    # A further block has its own directions, no nearer to the first than by chance.
    blocks = np.asarray(inference.orthogonal(40).points(key, 10, float64))[:20].reshape(2, 10, 10)
    first, second = (block / np.linalg.norm(block, axis=1, keepdims=True) for block in blocks)
    np.testing.assert_allclose(second @ second.T, np.eye(10), atol=1e-12)
    assert np.abs(first @ second.T).max() < 0.95
    x = np.asarray(inference.fixed(inference.independent(9)).points(key, 4, float64))
    np.testing.assert_allclose(x.T @ x / 9, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    # Sobol points with a shift stay a net: a smooth mean is far better than that of as many independent draws.
    x = inference.quasi_random(1024).points(key, 2, float64)
    assert abs(float(jnp.mean(jnp.cos(x[:, 0]) * jnp.cos(x[:, 1]))) - np.exp(-1)) < 2e-3


def test_standard_errors_are_those_of_pairs(float64):
    """Antithetic pairs of an odd function have no error; of an even one, that of half as many draws."""
    x = inference.antithetic(4000).points(jax.random.key(0), 1, float64)[:, 0]
    assert float(inference.antithetic(4000).error(x)) < 1e-12
    np.testing.assert_allclose(inference.antithetic(4000).error(x**2), np.sqrt(2 / 2000), rtol=0.2)
    assert float(inference.gauss_hermite(3).error(x)) == float(inference.fixed(inference.independent(3)).error(x)) == 0


@pytest.mark.parametrize("d", [2, 10, 100])
def test_rotations_are_orthogonal(d, dtype):
    """Also where a normal matrix is nearly singular in single precision, d = 100: one in twenty by a lot."""
    x = np.asarray(inference.orthogonal(2 * d * 20).points(jax.random.key(0), d, dtype), float)
    for block in x[: 20 * d].reshape(20, d, d):
        unit = block / np.linalg.norm(block, axis=1, keepdims=True)
        assert np.abs(unit @ unit.T - np.eye(d)).max() < (0.05 if dtype == np.float32 else 1e-8)


@pytest.mark.parametrize("n", [1, 40])
def test_the_error_of_orthogonal_draws_counts_their_radii(n, float64):
    """ELBO of N(0, 2²I) for N(0, I), whose gap is a function of |ε|: reported and actual spread agree."""
    d, target = 10, lambda x: -0.5 * x @ x
    geometry = whitened.Whitened(target, inference.stl(), inference.orthogonal(n))
    frame = whitened.Frame(jnp.zeros(d), 2 * jnp.eye(d), d * jnp.log(2.0))
    values, errors, _ = jax.jit(jax.vmap(lambda key: geometry.evaluate(frame, key)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    np.testing.assert_allclose(np.mean(errors), np.std(values), rtol=0.1)


# Estimators.

ESTIMATORS = {
    "default": None,
    "stl": inference.stl(64),
    "quasi-random": inference.stl(inference.quasi_random(64)),
    "reparameterised": inference.reparameterised(inference.antithetic(256)),
    "price": inference.price(inference.antithetic(4)),
    "score": inference.score(512),
    "fixed": inference.reparameterised(inference.fixed(inference.orthogonal(8))),
    "Gauss-Hermite": inference.stl(inference.gauss_hermite(3)),
}
GAUSSIANS = {
    "full rank": FAMILIES.gaussian_full_rank(2),
    "precision": FAMILIES.gaussian_precision(2),
    "mean field": FAMILIES.gaussian_mean_field(2),
    "banded": FAMILIES.gaussian_banded(2, 1),
    "low rank": FAMILIES.gaussian_low_rank(2, 1),
}
# Every estimator once for a full matrix and once for a diagonal, and once on a family that moves by its retraction.
CELLS = (
    [("full rank", name) for name in ESTIMATORS]
    + [("mean field", name) for name in ("price", "score", "fixed")]
    + [("banded", name) for name in ("default", "score", "fixed", "reparameterised")]
    + [("precision", "default"), ("low rank", "default")]
)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_every_estimator_finds_the_gaussian(name, kind, float64):
    """Target N(m, S): moments within a tenth of a standard deviation, quadrature and fixed draws to rounding."""
    family, estimator = GAUSSIANS[name], ESTIMATORS[kind]
    certain = kind in ("fixed", "Gauss-Hermite")
    options = {"tol": 1e-12 if certain else 1e-3, "max_steps": 400}
    result = ng.fit(gaussian, family, jax.random.key(0), estimator=estimator, **options)
    assert int(result.status) == Status.CONVERGED, str(result)
    draws = np.asarray(family.sample(result.params, jax.random.key(1), 40_000))
    expected = 1 / np.sqrt(np.diag(np.linalg.inv(COVARIANCE))) if name == "mean field" else SD
    np.testing.assert_allclose((draws.mean(0) - MEAN) / SD, 0, atol=0.12)
    np.testing.assert_allclose(draws.std(0) / expected, 1, atol=0.1)
    if certain:
        np.testing.assert_allclose((result.params.loc - MEAN) / SD, 0, atol=1e-5)
        assert float(result.natural_norm) < 2e-12
    if name != "mean field":
        assert LOG_Z - 0.03 < float(result.final_elbo) < LOG_Z + 5 * float(result.final_error) + 1e-9


@pytest.mark.parametrize("kind", ["stl", "reparameterised", "price", "score"])
@pytest.mark.parametrize("name", ["full rank", "mean field"])
def test_the_gradient_in_the_frame_is_unbiased(name, kind, float64):
    """u = Cᵀ(E∇log p̃), M = I + CᵀE∇²log p̃ C for log p̃ = −Σx⁴/4 + x₁x₂/2, by moments of a Gaussian."""
    loc, factor = np.array([0.3, -0.5]), np.array([[0.8, 0.0], [0.3, 0.6]])
    factor = factor if name == "full rank" else np.diag(factor)
    target = lambda x: -jnp.sum(x**4) / 4 + x[0] * x[1] / 2
    log_det = jnp.sum(jnp.log(jnp.diagonal(factor) if factor.ndim == 2 else factor))
    frame = whitened.Frame(jnp.asarray(loc), jnp.asarray(factor), log_det)
    geometry = whitened.Whitened(target, getattr(inference, kind)(), inference.independent(16))
    evaluate = jax.jit(jax.vmap(lambda key: geometry.evaluate(frame, key)))
    values, _, gradient = evaluate(jax.random.split(jax.random.key(0), 4000))
    c = factor if name == "full rank" else np.diag(factor)
    variance = np.diag(c @ c.T)
    slope = -(loc**3 + 3 * loc * variance) + loc[::-1] / 2
    hessian = np.diag(-3 * (loc**2 + variance)) + 0.5 * np.array([[0, 1], [1, 0]])
    m = np.eye(2) + c.T @ hessian @ c
    for got, expected in ((gradient.u, c.T @ slope), (gradient.m, m if name == "full rank" else np.diag(m))):
        got = np.asarray(got)
        assert (np.abs(got.mean(0) - expected) <= 5 * got.std(0) / np.sqrt(4000) + 1e-12).all()
    fourth = np.sum(loc**4 + 6 * loc**2 * variance + 3 * variance**2)
    entropy = scipy.stats.multivariate_normal(loc, c @ c.T).entropy()
    elbo = -fourth / 4 + (loc[0] * loc[1] + (c @ c.T)[0, 1]) / 2 + entropy
    assert abs(values.mean() - elbo) < 5 * values.std() / np.sqrt(4000)


@pytest.mark.parametrize("tol", [1e-4, 1e-10])
def test_a_closed_form_is_maximised_to_rounding(tol, float64):
    """E log p̃ of N(μ, Σ): −½(tr PΣ + (μ − m)ᵀP(μ − m))."""
    precision = np.linalg.inv(COVARIANCE)

    def expected(q):
        lower = jnp.tril(q.scale_tril)
        shift = q.loc - MEAN
        return -0.5 * (jnp.sum(precision * (lower @ lower.T)) + shift @ precision @ shift)

    options = {"estimator": inference.closed_form(expected), "tol": tol}
    result = ng.fit(gaussian, FAMILIES.gaussian_full_rank(2), jax.random.key(0), **options)
    assert bool(result.converged) and float(result.final_error) == 0 and int(result.gradients) == 0
    assert 0 <= LOG_Z - float(result.final_elbo) < 2 * tol


# Families that move by their own retraction: the posterior is in the family, and known.

CONJUGATE = {
    "gamma": (FAMILIES.gamma(2), lambda x: jnp.sum(3 * jnp.log(x) - jnp.array([1.0, 50.0], x.dtype) * x),
              lambda p: p.concentration / p.rate, [4.0, 0.08]),
    "inverse gamma": (FAMILIES.inverse_gamma(1), lambda x: jnp.sum(-6 * jnp.log(x) - 3 / x),
                      lambda p: FAMILIES.inverse_gamma(1).to_mean(p)[1], [5 / 3]),
    "beta": (FAMILIES.beta(1), lambda x: jnp.sum(2 * jnp.log(x) + 6 * jnp.log1p(-x)),
             lambda p: p.alpha / (p.alpha + p.beta), [0.3]),
    "dirichlet": (FAMILIES.dirichlet(3), lambda x: jnp.array([2.0, 0.0, 5.0], x.dtype) @ jnp.log(x),
                  lambda p: p / jnp.sum(p), [0.3, 0.1, 0.6]),
    "von Mises": (FAMILIES.von_mises(1), lambda x: 3 * jnp.cos(x[0] - 1),
                  lambda p: p.loc, [1.0]),
    "Poisson": (FAMILIES.poisson(1), lambda x: jnp.sum(x * jnp.log(3.0) - jax.scipy.special.gammaln(x + 1)),
                lambda p: p, [3.0]),
    "Wishart": (FAMILIES.wishart(2), lambda x: 2.5 * jnp.linalg.slogdet(x)[1] - jnp.trace(x),
                lambda p: jnp.diagonal(p.scale_tril @ p.scale_tril.T) * p.df, [4.0, 4.0]),
    "product": (FAMILIES.product({"rate": FAMILIES.gamma(1), "w": FAMILIES.gaussian_full_rank(2)}),
                lambda x: jnp.sum(4 * jnp.log(x["rate"]) - x["rate"]) + gaussian(x["w"]),
                lambda p: jnp.concatenate([p["rate"].concentration / p["rate"].rate, p["w"].loc / SD + 1]),
                [5.0, *(MEAN / SD + 1)]),
    "categorical": (FAMILIES.categorical(3), lambda k: jnp.log(jnp.array([0.1, 0.2, 0.7]))[k],
                    jax.nn.softmax, [0.1, 0.2, 0.7]),
    "minimal categorical": (FAMILIES.categorical(3, minimal=True), lambda k: jnp.log(jnp.array([0.1, 0.2, 0.7]))[k],
                            lambda p: jax.nn.softmax(jnp.append(p, 0.0)), [0.1, 0.2, 0.7]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONJUGATE)
def test_a_posterior_of_the_family_is_found(name, float64):
    family, log_density, mean, expected = CONJUGATE[name]
    result = ng.fit(log_density, family, jax.random.key(0), tol=1e-4)
    assert int(result.status) == Status.CONVERGED, str(result)
    np.testing.assert_allclose(np.asarray(mean(result.params)), expected, rtol=0.05)
    assert float(result.final_error) < 0.02 and float(result.khat) < 0.7  # q is p: equal weights
    assert int(result.steps) <= 60


@pytest.mark.parametrize("index", range(4))
def test_spins_reach_their_best_mean_field(index, float64):
    """The sum over 2¹⁶ states in pieces, from a magnetised start; known to eight decimals."""
    model = ng.problems.ising_4x4()[index]
    family = FAMILIES.bernoulli(16, values=(-1, 1))
    options = {"estimator": inference.exact(chunk_size=1 << 14), "init": family.init(0.1), "tol": 1e-9}
    result = ng.fit(model.log_density, family, jax.random.key(0), **options)
    assert bool(result.converged) and float(result.final_error) == 0
    np.testing.assert_allclose(result.final_elbo, model.best, atol=1e-7)
    history = np.asarray(result.elbo)[: int(result.steps)]
    assert (np.diff(history) >= 0).all()  # natural gradient of size 1 alone may oscillate between two states


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spins_by_scores_come_near(seed, float64):
    model = ng.problems.ising_4x4()[1]
    family = FAMILIES.bernoulli(16, values=(-1, 1))
    assert type(ng.inference.fitting._default_estimator(family)).__name__ == "Score"
    result = ng.fit(model.log_density, family, jax.random.key(seed), init=family.init(0.1))
    assert int(result.status) == Status.CONVERGED
    assert abs(float(result.final_elbo) - model.best) < 0.05 + 5 * float(result.final_error)


def test_a_mixture_finds_two_modes(float64):
    """Half N(−4, 1), half N(4, 1): the single Gaussian loses log 2, the mixture nothing."""
    log_density = lambda x: jnp.logaddexp(*(jax.scipy.stats.norm.logpdf(x[0], m) for m in (-4.0, 4.0))) - np.log(2)
    result = ng.fit(log_density, FAMILIES.gaussian_mixture(1, 2), jax.random.key(0))
    assert int(result.status) == Status.CONVERGED
    assert float(result.final_elbo) > -0.05
    np.testing.assert_allclose(np.sort(flat(result.params.components.loc)), [-4, 4], atol=0.3)


# Minibatches.


def observations(n=2000):
    return np.random.default_rng(0).normal(3.0, 2.0, n)


LIKELIHOOD = lambda x, y: jax.scipy.stats.norm.logpdf(y, x[0], 2.0)
PRIOR = lambda x: jax.scipy.stats.norm.logpdf(x[0], 0.0, 10.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_minibatch_is_an_unbiased_part_of_the_sum(seed, float64):
    """Mean over batches, and its standard error against the spread over batches."""
    y = jnp.asarray(observations(50))
    target = inference.minibatch(PRIOR, LIKELIHOOD, batch_size=10)
    x = jnp.array([2.0])
    whole = scipy.stats.norm(0, 10).logpdf(2.0) + scipy.stats.norm(2.0, 2.0).logpdf(np.asarray(y)).sum()
    np.testing.assert_allclose(target(x, y), whole, rtol=1e-12)

    def batch(key):
        density, deviation = target.at(y, key)
        return density(x), deviation(x)

    values, errors = map(np.asarray, jax.vmap(batch)(jax.random.split(jax.random.key(seed), 2000)))
    assert abs(values.mean() - whole) < 5 * values.std() / np.sqrt(2000)
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), values.std(), rtol=0.1)


@pytest.mark.parametrize("estimator", [None, inference.reparameterised(inference.antithetic(32))])
def test_a_fit_by_minibatches_is_the_posterior(estimator, float64):
    y = jnp.asarray(observations())
    target = inference.minibatch(PRIOR, LIKELIHOOD, batch_size=1000)
    family = FAMILIES.gaussian_full_rank(1)
    result = ng.fit(target, family, jax.random.key(0), data=y, estimator=estimator, max_steps=400)
    precision = 1 / 100 + len(y) / 4
    assert int(result.status) == Status.CONVERGED
    np.testing.assert_allclose(result.params.scale_tril[0, 0] * np.sqrt(precision), 1, atol=0.1)
    assert abs(float(result.params.loc[0]) - float(y.sum()) / 4 / precision) * np.sqrt(precision) < 0.3
    whole = ng.fit(lambda x, y: target(x, y), family, jax.random.key(0), data=y)
    assert abs(float(result.final_elbo - whole.final_elbo)) < 0.1


# Lanes.


def shifted(x, data):
    return -0.5 * jnp.sum((x - data) ** 2) - 0.05 * jnp.sum((x - data) ** 4)


def test_lanes_are_refilled_and_agree_with_a_loop(float64, monkeypatch):
    """Thirteen problems through three lanes; starts at different distances end at different times."""
    monkeypatch.setattr(ng.inference.lanes, "LANES", 3)
    data = jnp.asarray(np.random.default_rng(0).normal(size=(13, 2)) * 10 ** np.linspace(-1, 2, 13)[:, None])
    keys = jax.random.split(jax.random.key(0), 13)
    options = {"keep_path": True, "max_steps": 90}
    run = lambda key, data: ng.fit(shifted, FAMILIES.gaussian_full_rank(2), key, data=data, **options)
    together = jax.vmap(run)(keys, data)
    assert len(set(np.asarray(together.steps).tolist())) > 3
    for i in (0, 5, 12):
        alone, lane = run(keys[i], data[i]), jax.tree.map(lambda x: x[i], together)  # noqa: B023
        assert int(alone.steps) == int(lane.steps) and int(alone.status) == int(lane.status)
        for name in ("params", "path", "final_elbo", "khat"):
            assert error(getattr(alone, name), getattr(lane, name)) < 1e-7, name
        np.testing.assert_allclose(alone.elbo, lane.elbo, rtol=1e-8)


def test_vmap_sees_what_a_function_closes_over(float64):
    centres = jnp.arange(4.0)
    fit = lambda m: ng.fit(lambda x: -0.5 * jnp.sum((x - m) ** 2), FAMILIES.gaussian_full_rank(1), jax.random.key(0))
    np.testing.assert_allclose(jax.vmap(fit)(centres).params.loc[:, 0], centres, atol=0.2)
    nested = jax.vmap(jax.vmap(fit))(centres.reshape(2, 2))
    assert nested.status.shape == (2, 2) and bool(jnp.all(nested.converged))
    np.testing.assert_allclose(nested.params.loc[..., 0].ravel(), centres, atol=0.2)


def test_the_best_of_several_starts(float64):
    """Two modes, the right one higher; what is not finite never wins."""
    log_density = lambda x: jnp.where(
        x[0] > 90, jnp.nan, jnp.logaddexp(-0.5 * (x[0] - 5) ** 2, -3 - 0.5 * (x[0] + 5) ** 2)
    )
    family = FAMILIES.gaussian_full_rank(1)
    fit = lambda loc: ng.fit(log_density, family, jax.random.key(0), init=family.init(loc))
    result = jax.vmap(fit)(jnp.array([[-6.0], [100.0], [6.0]]))
    assert np.asarray(result.status).tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    runaway = dataclasses.replace(
        result, status=jnp.array([1, 2, 3]), final_elbo=jnp.array([-5.0, jnp.nan, 1e30]), steps=jnp.arange(3)
    )
    assert int(inference.best_of(runaway).steps) == 0
    best = inference.best_of(result)
    assert best.status.shape == () and abs(float(best.params.loc[0]) - 5) < 0.2
    assert best.family == family and float(best.final_elbo) == float(result.final_elbo[2])


# What a log-density may not do.


def test_a_changed_global_is_an_error_not_an_old_answer(float64):
    scope = {"jnp": jnp, "centre": 1.0}
    exec("def log_density(x):\n    return -0.5 * jnp.sum((x - centre) ** 2)", scope)
    family = FAMILIES.gaussian_full_rank(1)
    first = ng.fit(scope["log_density"], family, jax.random.key(0))
    scope["centre"] = 5.0
    with pytest.raises(ValueError, match=r"log_density.*'centre'.*changed.*data"):
        ng.fit(scope["log_density"], family, jax.random.key(0))
    scope["centre"] = 1.0
    assert error(ng.fit(scope["log_density"], family, jax.random.key(0)).params, first.params) == 0


def test_a_changed_closure_is_an_error(float64):
    def make():
        centre = jnp.ones(1)

        def log_density(x):
            return -0.5 * jnp.sum((x - centre) ** 2)

        def move(to):
            nonlocal centre
            centre = to

        return log_density, move

    log_density, move = make()
    ng.fit(log_density, FAMILIES.gaussian_full_rank(1), jax.random.key(0))
    move(jnp.zeros(1))
    with pytest.raises(ValueError, match=r"log_density.*'centre'"):
        ng.fit(log_density, FAMILIES.gaussian_full_rank(1), jax.random.key(0))


def test_an_objective_whose_variables_have_changed_is_an_error(float64):
    metric, centre = ng.metrics.scales(jnp.ones(2)), jnp.ones(2)

    def objective(x):
        return jnp.sum((x - centre) ** 2)

    np.testing.assert_allclose(inference.minimise(objective, metric, jnp.zeros(2)).params, 1, atol=0.2)
    centre = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"objective: 'centre'.*has changed"):
        inference.minimise(objective, metric, jnp.zeros(2))


def test_a_key_used_twice_is_seen_by_jax():
    key = jax.random.key(0)
    with jax.debug_key_reuse(True), pytest.raises(Exception, match=r"reuse|consumed"):
        ng.fit(gaussian, FAMILIES.gaussian_full_rank(2), key)
        ng.fit(gaussian, FAMILIES.gaussian_full_rank(2), key)


def test_what_has_not_changed_is_no_error(float64):
    """A counter, an attribute named as a global, the same array or helper made again."""
    scope = {"jnp": jnp, "np": np, "mean": 1.0, "calls": 0, "data": (np.ones(1), [2.0])}
    source = """
def helper(x):
    return x - data[0]

def log_density(x):
    global calls
    calls += 1
    return -0.5 * jnp.sum(helper(x) ** 2) + 0 * x.mean()
"""
    exec(source, scope)
    log_density, family = scope["log_density"], FAMILIES.gaussian_full_rank(1)
    ng.fit(log_density, family, jax.random.key(0))
    exec(source.split("def log_density")[0], scope)
    scope |= {"mean": 2.0, "data": (np.ones(1), [2.0])}
    ng.fit(log_density, family, jax.random.key(0))
    scope["data"] = (np.zeros(1), [2.0])
    with pytest.raises(ValueError, match=r"log_density.*'data'"):
        ng.fit(log_density, family, jax.random.key(0))


def test_single_precision_parameters_and_double_data(float64):
    family = FAMILIES.gaussian_full_rank(2)
    start = cases.cast(family.init(), jnp.float32)
    log_density = lambda x, data: -0.5 * jnp.sum((x - data) ** 2)
    result = ng.fit(log_density, family, jax.random.key(0), data=jnp.array([1.0, 2.0]), init=start)
    assert bool(result.converged) and result.params.loc.dtype == jnp.float32
    np.testing.assert_allclose(result.params.loc, [1, 2], atol=0.2)
    spins = FAMILIES.bernoulli(2)  # summed over a support that is in double precision by itself
    result = ng.fit(lambda x: jnp.sum(x * jnp.arange(2.0)), spins, jax.random.key(0), init=jnp.zeros(2, jnp.float32))
    assert bool(result.converged) and result.params.dtype == jnp.float32
    np.testing.assert_allclose(result.params, [0, 1], atol=0.2)


# Status.


@pytest.mark.parametrize("family", [FAMILIES.gaussian_full_rank(2), FAMILIES.gaussian_mean_field(2)], ids=str)
def test_an_improper_target_is_limited_by_trust(family, float64):
    result = ng.fit(lambda x: -0.5 * x[0] ** 2 + 0.0 * x[1], family, jax.random.key(0))
    assert int(result.status) == Status.TRUST_LIMITED
    assert "trust_limited" in str(result)


def test_an_objective_that_never_rises_is_given_up(float64):
    """The gradient lies (stop_gradient): no step is accepted."""
    objective = lambda x: jnp.sum(2 * jax.lax.stop_gradient(x) ** 2 - x**2)
    result = inference.minimise(objective, ng.metrics.scales(jnp.ones(2)), jnp.ones(2))
    assert int(result.status) == Status.TRUST_LIMITED and int(result.steps) < 50
    assert error(result.params, jnp.ones(2)) == 0


# Objectives under a metric.


def test_minimise_is_newton_with_a_hessian_and_does_not_leave_it(float64):
    """Rosenbrock from (−1.2, 1) under its Gauss–Newton metric."""
    residuals = lambda x: jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    objective = lambda x: 0.5 * jnp.sum(residuals(x) ** 2)
    metric = ng.metrics.pullback(residuals)
    result = inference.minimise(objective, metric, jnp.array([-1.2, 1.0]), tol=1e-16, keep_path=True)
    assert bool(result.converged) and result.family is None and np.isnan(result.khat)
    np.testing.assert_allclose(result.params, 1, atol=1e-7)
    values = -np.asarray(result.elbo)[: int(result.steps)]
    np.testing.assert_allclose(values[-1], objective(result.params), atol=1e-15)
    assert (np.diff(values) <= 0).all()


def test_minimise_takes_data_and_a_retraction(float64):
    """Maximum likelihood of an exponential rate λ > 0 under the Fisher metric n/λ²: λ = 1/mean."""
    y = jnp.asarray(np.random.default_rng(0).exponential(0.02, 400))
    objective = lambda rate, data: -jnp.sum(jnp.log(rate) - rate * data["y"])
    metric = lambda rate, *, y: ng.operators.Diagonal(len(y) / rate**2)
    retract = lambda rate, step: rate * jnp.exp(step / rate)
    options = {"data": {"y": y}, "retract": retract, "tol": 1e-14}
    result = inference.minimise(objective, metric, jnp.asarray(1.0), **options)
    assert bool(result.converged)
    np.testing.assert_allclose(result.params, 1 / np.mean(y), rtol=1e-7)
    with pytest.raises(ValueError, match=r"data.*'y'"):
        inference.minimise(lambda rate: rate, metric, jnp.asarray(1.0))


def test_minimise_under_vmap_and_of_complex_parameters(float64):
    metric = ng.metrics.scales(jnp.ones(2))
    fit = lambda m: inference.minimise(lambda x: 0.5 * jnp.sum((x - m) ** 2), metric, jnp.zeros(2))
    np.testing.assert_allclose(jax.vmap(fit)(jnp.arange(3.0)).params, [[0, 0], [1, 1], [2, 2]], atol=1e-6)
    objective = lambda z: 0.5 * jnp.sum(jnp.abs(z - (1 + 2j)) ** 2)
    result = inference.minimise(objective, metric, jnp.zeros(2, complex))
    assert bool(result.converged)
    np.testing.assert_allclose(result.params, 1 + 2j, atol=1e-6)


def test_minimise_shortens_steps_that_overshoot(float64):
    """Curvatures 1 and 100 under the identity: a step of 1 diverges."""
    objective = lambda x: 0.5 * (x[0] ** 2 + 100 * x[1] ** 2)
    result = inference.minimise(objective, ng.metrics.scales(jnp.ones(2)), jnp.ones(2), max_steps=2000)
    assert bool(result.converged) and float(objective(result.params)) < 1e-5


# Results.


def test_a_result_comes_back_from_its_file(tmp_path, float64):
    family = FAMILIES.gaussian_full_rank(2)
    for keep_path in (False, True):
        result = ng.fit(gaussian, family, jax.random.key(0), keep_path=keep_path, max_steps=50)
        result.save(tmp_path / "fit")
        again = inference.load(tmp_path / "fit", family)
        assert jax.tree.structure(again) == jax.tree.structure(result)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (again, result))))
    with pytest.raises(ValueError, match="like"):
        inference.load(tmp_path / "fit", FAMILIES.gaussian_mean_field(2))


def test_a_summary_is_of_constrained_draws(float64):
    result = ng.fit(gaussian, FAMILIES.gaussian_full_rank(2), jax.random.key(0))
    table = result.summary(jax.random.key(1), n=20_000, constrain=lambda x: {"a": x[:, 0], "b": jnp.exp(x[:, 1] / 10)})
    np.testing.assert_allclose(table.mean[0], MEAN[0], atol=0.2)
    np.testing.assert_allclose(table.mean[1], np.exp(-2 + 0.5), rtol=0.1)
    fit = lambda key: ng.fit(gaussian, FAMILIES.gaussian_full_rank(2), key)
    many = jax.vmap(fit)(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"result.*single fit.*best_of"):
        many.summary(jax.random.key(0))


def test_a_bar_is_shown(capsys, float64):
    ng.fit(gaussian, FAMILIES.gaussian_full_rank(2), jax.random.key(0), show_progress=True).steps.block_until_ready()
    jax.effects_barrier()
    assert "ELBO" in capsys.readouterr().err and not ng.inference.progress._bars
