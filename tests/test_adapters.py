"""Natural gradients inside blackjax and numpyro: their own densities, their own loops; their distributions in ours."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special as sc
import scipy.stats
from cases import error, flat

import natgrad_jax as ng
from natgrad_jax import adapters

MEAN, COVARIANCE = np.array([1.0, -2.0, 30.0]), np.array([[4.0, 1.0, 0.5], [1.0, 1.0, -2.0], [0.5, -2.0, 25.0]])
PRECISION = np.linalg.inv(COVARIANCE)


def log_density(position):
    """A Gaussian of a position of some structure."""
    x = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(position)]) - MEAN
    return -0.5 * x @ jnp.asarray(PRECISION, x.dtype) @ x


POSITION = {"a": jnp.zeros(()), "b": jnp.zeros(2)}


def nodes(mean, factor):
    """Gauss–Hermite points and weights, exact for the quartic s sᵀ."""
    z, w = np.polynomial.hermite_e.hermegauss(5)
    z = np.stack(np.meshgrid(*[z] * len(mean), indexing="ij"), -1).reshape(-1, len(mean))
    w = np.prod(np.stack(np.meshgrid(*[w] * len(mean), indexing="ij"), -1), -1).ravel()
    return mean + z @ factor.T, w / w.sum()


def fisher_of(log_q, params, mean, factor):
    """Σ w s sᵀ over the points, of the package's own density."""
    points, weights = nodes(mean, factor)
    scores = jax.vmap(lambda x: jax.grad(log_q)(params, x))(jnp.asarray(points))
    rows = np.concatenate([np.asarray(s).reshape(len(points), -1) for s in jax.tree.leaves(scores)], axis=1)
    return (rows.T * weights) @ rows


def step_of(tx, params, g):
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
    return updates


def small(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(1e-7 * rng.normal(size=x.shape)), params)


@pytest.mark.parametrize("kind", ["fullrank", "meanfield"])
def test_a_small_step_in_blackjax_is_the_inverse_fisher_information_of_its_density(kind, float64):
    """A gradient so small that neither the bound nor the retraction matter."""
    vi = pytest.importorskip(f"blackjax.vi.{kind}_vi")
    mu, rng = {"a": jnp.asarray(0.3), "b": jnp.asarray([-1.0])}, np.random.default_rng(1)
    if kind == "fullrank":
        params = mu, jnp.asarray(0.5 * rng.normal(size=3))
        log_q = lambda params, x: vi.generate_fullrank_logdensity(*params)({"a": x[0], "b": x[1:]})
        factor = np.array([[np.exp(params[1][0]), 0], [params[1][2], np.exp(params[1][1])]])
        tx = adapters.blackjax_fullrank(2, 1.0)
    else:
        params = mu, jax.tree.map(lambda x: -0.5 * jnp.ones_like(x), mu)
        log_q = lambda params, x: vi.generate_meanfield_logdensity(*params)({"a": x[0], "b": x[1:]})
        factor = np.exp(-0.5) * np.eye(2)
        tx = adapters.blackjax_meanfield(2, 1.0)
    g = small(params)
    matrix = fisher_of(log_q, params, np.array([0.3, -1.0]), factor)
    assert error(step_of(tx, params, g), -np.linalg.solve(matrix, flat(g))) < 1e-6


@pytest.mark.parametrize("kind", ["fullrank", "meanfield"])
def test_blackjax_finds_a_gaussian(kind, dtype):
    """The one change is the optimizer; the target has a condition of 2,000 and is 30 away."""
    vi = pytest.importorskip(f"blackjax.vi.{kind}_vi")
    tx = getattr(adapters, f"blackjax_{kind}")(3)
    algorithm = vi.as_top_level_api(log_density, tx, num_samples=30)
    start = algorithm.init(cases.cast(POSITION, dtype))
    if kind == "fullrank":  # blackjax makes it in the default precision
        start = start._replace(chol_params=start.chol_params.astype(dtype), opt_state=tx.init(
            (start.mu, start.chol_params.astype(dtype))))  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 300)
    state, _ = jax.jit(lambda s, keys: jax.lax.scan(lambda s, key: algorithm.step(key, s), s, keys))(start, keys)
    draws = algorithm.sample(jax.random.key(1), state, 20_000)
    x = np.concatenate([np.asarray(x, float).reshape(20_000, -1) for x in jax.tree.leaves(draws)], axis=1)
    sd = np.sqrt(np.diag(COVARIANCE)) if kind == "fullrank" else np.diag(PRECISION) ** -0.5
    assert (np.abs(x.mean(0) - MEAN) < 0.06 * np.sqrt(np.diag(COVARIANCE))).all()
    np.testing.assert_allclose(x.std(0), sd, rtol=0.06)


# numpyro.


def conjugate(y=None):
    import numpyro
    import numpyro.distributions as dist

    x = numpyro.sample("x", dist.MultivariateNormal(jnp.asarray(MEAN), jnp.asarray(COVARIANCE)))
    return numpyro.sample("y", dist.Normal(x.sum(), 2.0), obs=y)


def posterior(y):
    precision = PRECISION + np.ones((3, 3)) / 4
    covariance = np.linalg.inv(precision)
    return covariance @ (PRECISION @ MEAN + y / 4 * np.ones(3)), covariance


GUIDES = ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]


@pytest.mark.parametrize("kind", GUIDES)
def test_numpyro_finds_the_posterior(kind, dtype):
    autoguide = pytest.importorskip("numpyro.infer.autoguide")
    from numpyro.infer import SVI, Trace_ELBO

    options = {"rank": 2} if kind == "AutoLowRankMultivariateNormal" else {}
    guide = getattr(autoguide, kind)(conjugate, **options)
    svi = SVI(conjugate, guide, adapters.numpyro(guide), Trace_ELBO(num_particles=30))
    result = svi.run(jax.random.key(0), 1000, jnp.asarray(25.0, dtype), progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(20_000,))["x"]
    mean, covariance = posterior(25.0)
    full = kind in ("AutoMultivariateNormal", "AutoLowRankMultivariateNormal")  # diagonal and rank 2: all of 3 × 3
    sd = np.sqrt(np.diag(covariance)) if full else np.diag(np.linalg.inv(covariance)) ** -0.5
    assert (np.abs(np.asarray(draws, float).mean(0) - mean) < 0.08 * np.sqrt(np.diag(covariance))).all()
    np.testing.assert_allclose(np.asarray(draws, float).std(0), sd, rtol=0.08)


@pytest.mark.parametrize("kind", GUIDES[2:])
def test_a_small_step_in_numpyro_is_the_inverse_fisher_information_of_its_guide(kind, float64):
    autoguide = pytest.importorskip("numpyro.infer.autoguide")
    from numpyro.infer import SVI, Trace_ELBO

    options = {"rank": 1} if kind == "AutoLowRankMultivariateNormal" else {}
    guide = getattr(autoguide, kind)(conjugate, **options)
    tx = adapters.numpyro(guide, 1.0)
    svi = SVI(conjugate, guide, tx, Trace_ELBO())
    params = svi.optim.get_params(svi.init(jax.random.key(0), jnp.asarray(25.0)).optim_state)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape)), params)
    q = guide.get_posterior(svi.constrain_fn(params))
    log_q = lambda params, x: guide.get_posterior(svi.constrain_fn(params)).log_prob(x)
    matrix = fisher_of(log_q, params, np.asarray(q.mean), np.linalg.cholesky(np.asarray(q.covariance_matrix)))
    g = small(params)
    assert error(step_of(tx, params, g), -np.linalg.solve(matrix, flat(g))) < 1e-6


def test_parameters_of_the_model_have_an_optimizer_of_their_own(float64):
    """Type II maximum likelihood: y ~ N(x, 1), x ~ N(m, 1), of which m is learnt by Adam: m = y."""
    numpyro = pytest.importorskip("numpyro")
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    def model(y):
        m = numpyro.param("m", jnp.zeros(()))
        x = numpyro.sample("x", numpyro.distributions.Normal(m, 1.0))
        numpyro.sample("y", numpyro.distributions.Normal(x, 1.0), obs=y)

    guide = autoguide.AutoNormal(model)
    svi = SVI(model, guide, adapters.numpyro(guide, others=optax.adam(0.05)), Trace_ELBO(num_particles=20))
    result = svi.run(jax.random.key(0), 600, jnp.asarray(2.0), progress_bar=False)
    assert abs(float(result.params["m"]) - 2.0) < 0.15
    np.testing.assert_allclose(float(result.params["x_auto_scale"]), 0.5**0.5, rtol=0.1)
    with pytest.raises(TypeError, match=r"others: m not of the guide.*optax.adam"):
        SVI(model, guide, adapters.numpyro(guide), Trace_ELBO()).init(jax.random.key(0), jnp.asarray(2.0))


def test_a_numpyro_model_is_a_log_density(float64):
    """HalfNormal scale by hand: log p(y|s) + log p(s) + log s with s = eᵘ; data under vmap; sites come back."""
    numpyro = pytest.importorskip("numpyro")

    def model(y, size=3, *, offset):
        sd = numpyro.sample("sd", numpyro.distributions.HalfNormal(2.0))
        with numpyro.plate("n", size):
            numpyro.sample("y", numpyro.distributions.Normal(offset, sd), obs=y)
        numpyro.deterministic("variance", sd**2)

    y = jnp.array([0.5, -1.0, 0.75])
    problem = adapters.numpyro_model(model, y, 3, offset=jnp.asarray(0.25))
    assert problem.d == 1 and len(problem.data) == 2

    def by_hand(u, y, offset):
        s = np.exp(u)
        prior = 0.5 * np.log(2 / np.pi) - np.log(2.0) - s**2 / 8 + u
        return prior - np.sum(0.5 * ((np.asarray(y) - offset) / s) ** 2 + u + 0.5 * np.log(2 * np.pi))

    for u in (-1.0, 0.3):
        np.testing.assert_allclose(problem.log_density(jnp.array([u]), problem.data), by_hand(u, y, 0.25), rtol=1e-12)
    many = tuple(jnp.stack([x, 2 * x]) for x in problem.data)
    both = jax.vmap(problem.log_density, (None, 0))(jnp.array([0.3]), many)
    np.testing.assert_allclose(both, [by_hand(0.3, y, 0.25), by_hand(0.3, 2 * y, 0.5)], rtol=1e-12)
    sites = problem.constrain(jnp.array([0.3]), problem.data)
    np.testing.assert_allclose(sites["variance"], np.exp(0.6), rtol=1e-12)
    family = ng.families.gaussian_full_rank(1)
    result = ng.fit(problem.log_density, family, jax.random.key(0), data=problem.data)
    assert bool(result.converged)


# Distributions as families.


def dist():
    return pytest.importorskip("numpyro.distributions")


def gamma(params):
    return dist().Gamma(jnp.exp(params["log_a"]), jnp.exp(params["log_b"]))


def normal(params):
    return dist().Normal(params["loc"], jnp.exp(params["log_scale"]))


def full_rank(params):
    lower = jnp.zeros((2, 2), params["loc"].dtype).at[(0, 1, 1), (0, 0, 1)].set(params["lower"])
    return dist().MultivariateNormal(params["loc"], scale_tril=lower + jnp.diag(jnp.exp(params["log_diagonal"])))


def classes(logits):
    return dist().Categorical(logits=logits)


def starts(kind, dtype):
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    return {
        gamma: {"log_a": zeros(), "log_b": zeros()},
        normal: {"loc": zeros(2), "log_scale": zeros(2)},
        full_rank: {"loc": zeros(2), "lower": zeros(3), "log_diagonal": zeros(2)},
        classes: zeros(2, 3),
    }[kind]


def family(kind, dtype=np.float32, **options):
    return adapters.distribution(kind, starts(kind, dtype), **options)


CENTRE, FACTOR = np.array([3.0, -20.0]), np.array([[2.0, 0.0], [-3.0, 0.5]])
LOG_P = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
# Unnormalised log-densities that the family has, and a summary of the answer.
KNOWN = {
    "gamma": (gamma, lambda x: 4 * jnp.log(x) - 200 * x, lambda q: np.exp([q["log_a"], q["log_b"]]), [5.0, 200.0]),
    "normal": (
        normal,
        lambda x: -0.5 * jnp.sum(jnp.square((x - CENTRE) / np.array([0.1, 40.0]))),
        lambda q: np.r_[q["loc"] / np.array([0.1, 40.0]), np.exp(q["log_scale"])],
        [30.0, -0.5, 0.1, 40.0],
    ),
    "full rank": (
        full_rank,
        lambda x: -0.5 * jnp.sum(jnp.square(jnp.asarray(np.linalg.inv(FACTOR), x.dtype) @ (x - CENTRE))),
        lambda q: np.ravel(full_rank(q).covariance_matrix),
        np.ravel(FACTOR @ FACTOR.T),
    ),
    "classes": (
        classes,
        lambda k: jnp.sum(jnp.asarray(LOG_P)[jnp.arange(2), k]),
        lambda q: sc.softmax(q, axis=1),
        np.exp(LOG_P),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_distribution_finds_a_posterior_of_its_kind(name):
    """Redundant parameters in two of the four: a diagonal that is counted twice, logits that a shift leaves alone."""
    kind, log_density, summary, expected = KNOWN[name]
    own = family(kind)
    result = ng.fit(log_density, own, jax.random.key(0), tol=1e-3)
    assert result.family == own and bool(result.converged) and own.reparameterised == (kind is not classes)
    got = summary(jax.tree.map(np.asarray, result.params))
    np.testing.assert_allclose(got, expected, rtol=0.05, atol=0.05 * np.abs(np.asarray(expected)).min())


def both(own, params, g):
    """F and F⁺g, in one compilation."""

    def of(params, g):
        operator = own.fisher(params)
        return operator.dense(), operator.solve(g)

    matrix, step = jax.jit(of)(params, g)
    return np.asarray(matrix), step


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fisher_information_of_draws_is_that_of_a_gamma(seed, float64):
    """F = [[a²ψ′(a), −a], [−a, a]] in log a and log b, to five standard errors of the products of scores."""
    a, b, n = 3.0, 0.01, 4000
    params = {"log_a": jnp.log(a), "log_b": jnp.log(b)}
    own = family(gamma, float64, num_samples=n, seed=seed)
    expected = np.array([[a**2 * sc.polygamma(1, a), -a], [-a, a]])
    x = scipy.stats.gamma(a, scale=1 / b).rvs(100_000, random_state=seed)
    scores = np.stack([a * (np.log(b * x) - sc.digamma(a)), a - b * x])
    errors = np.std(scores[:, None] * scores[None], axis=-1) / n**0.5
    g = {"log_a": jnp.asarray(0.3), "log_b": jnp.asarray(-2.0)}
    got, step = both(own, params, g)
    assert (np.abs(got - expected) < 5 * errors).all()
    assert error(step, np.linalg.solve(got, flat(g))) < 1e-9
    other = both(family(gamma, float64, num_samples=n, seed=seed + 2), params, g)[0]
    assert (got != other).any() and (got == both(own, params, g)[0]).all()


def test_the_fisher_information_of_a_finite_distribution_is_exact(dtype):
    """Blocks diag(p) − ppᵀ; a step along no logits' common shift; the density and the support of both entries."""
    own, params, p = family(classes, dtype), jnp.asarray(LOG_P, dtype) + 1, np.exp(LOG_P)
    expected = np.zeros((6, 6))
    for i in range(2):
        expected[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = np.diag(p[i]) - np.outer(p[i], p[i])
    g = jnp.asarray([[1.0, -2.0, 1.0], [0.5, 0.25, -0.75]], dtype)
    got, step = both(own, params, g)
    assert error(got, expected) < 20 * cases.eps(dtype)
    # Of all solutions the shortest in units of √F_ii.
    units = np.sqrt(np.diag(expected))
    unitless = np.linalg.pinv(expected / np.outer(units, units), hermitian=True, rcond=1e-9)
    assert error(step, unitless @ (flat(g) / units) / units) < 500 * cases.eps(dtype)
    assert error(got @ flat(step), g) < 500 * cases.eps(dtype) and step.dtype == dtype
    assert own.k == 9 and own.support().shape == (9, 2) and len(np.unique(np.asarray(own.support()), axis=0)) == 9
    log_q = jax.vmap(lambda x: own.log_prob(params, x))(own.support())
    assert abs(float(np.exp(np.asarray(log_q)).sum()) - 1) < 20 * cases.eps(dtype)
    np.testing.assert_allclose(own.entropy(params), -(p * LOG_P).sum(), rtol=50 * cases.eps(dtype))


def test_a_class_without_probability_does_not_move():
    """float32, in which exp(−10⁴) is 0."""
    params = jnp.asarray([[0.0, 0.0, -1e4], [0.0, 0.0, 0.0]])
    matrix, step = both(family(classes), params, jnp.asarray([[0.25, -0.25, 1.0], [0.0, 0.0, 0.0]]))
    expected = np.array([[0.25, -0.25, 0], [-0.25, 0.25, 0], [0, 0, 0]])
    np.testing.assert_allclose(matrix[:3, :3], expected, atol=1e-6)
    np.testing.assert_allclose(step, [[0.5, -0.5, 0], [0, 0, 0]], atol=1e-5)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_no_parameter_stands_still_in_other_units(size):
    """float32: F = diag(1/σ², 2), of which an unscaled pseudo-inverse would keep one entry."""
    own = family(normal, num_samples=100_000)
    params = {"loc": jnp.zeros(2), "log_scale": jnp.full(2, np.log(size), np.float32)}
    g = {"loc": jnp.full(2, 1 / size, np.float32), "log_scale": jnp.ones(2)}
    step = jax.jit(lambda params, g: own.fisher(params).solve(g))(params, g)
    np.testing.assert_allclose(step["loc"], size, rtol=0.05)
    np.testing.assert_allclose(step["log_scale"], 0.5, rtol=0.05)


def test_fewer_draws_than_parameters_leave_the_rest_alone(float64):
    own = family(full_rank, float64, num_samples=3)
    params = own.init()
    g = jax.tree.map(jnp.ones_like, params)
    matrix, step = both(own, params, g)
    units = np.sqrt(np.diag(matrix))
    expected = np.linalg.pinv(matrix / np.outer(units, units), hermitian=True, rcond=1e-9) @ (flat(g) / units) / units
    assert np.linalg.matrix_rank(matrix) == 3 and np.linalg.norm(expected) < 100
    assert error(step, expected) < 1e-9


def test_a_distribution_keeps_the_precision_and_the_protocol(dtype):
    own, params = family(gamma, dtype), {"log_a": jnp.asarray(0.7, dtype), "log_b": jnp.asarray(-0.2, dtype)}
    x = own.sample(params, jax.random.key(1), 20_000)
    a, b = np.exp(0.7), np.exp(-0.2)
    reference = scipy.stats.gamma(a, scale=1 / b)
    assert x.shape == (20_000,) and abs(np.asarray(x, float).mean() - a / b) < 5 * reference.std() / 20_000**0.5
    log_q, g = jax.jit(jax.value_and_grad(own.log_prob))(params, x[0])
    np.testing.assert_allclose(log_q, reference.logpdf(float(x[0])), rtol=200 * cases.eps(dtype))
    np.testing.assert_allclose(own.entropy(params), reference.entropy(), rtol=200 * cases.eps(dtype))
    everything = own.init(), x, log_q, own.entropy(params), own.fisher(params).solve(g), own.retract(params, g)
    assert {leaf.dtype for leaf in jax.tree.leaves(everything)} == {dtype}
    assert error(own.retract(params, g), flat(params) + flat(g)) < 2 * cases.eps(dtype)
    assert not hasattr(own, "support") and own.k == 0


def test_a_distribution_is_a_metric(float64):
    """A small step of natural_gradient is −F⁻¹g, under jit and vmap."""
    own = family(gamma, float64)
    many = {"log_a": jnp.asarray([0.0, 2.0]), "log_b": jnp.asarray([0.0, -5.0])}
    tx, g = ng.natural_gradient(1.0, own.fisher), {"log_a": 1e-7, "log_b": -2e-7}
    update = jax.jit(jax.vmap(lambda params: tx.update(jax.tree.map(jnp.asarray, g), tx.init(params), params)[0]))
    updates = update(many)
    for i in range(2):
        matrix = np.asarray(own.fisher(jax.tree.map(lambda x: x[i], many)).dense())  # noqa: B023
        assert error(jax.tree.map(lambda x: x[i], updates), -np.linalg.solve(matrix, flat(g))) < 1e-6  # noqa: B023


def test_equal_distributions_are_compiled_once():
    """Equal in function and numbers, and in nothing else."""
    assert family(gamma) == family(gamma) and hash(family(gamma)) == hash(family(gamma))
    other = {"log_a": jnp.ones(()), "log_b": jnp.zeros(())}
    assert family(gamma) != adapters.distribution(gamma, other)
    assert family(gamma) != family(gamma, seed=1) and family(gamma) != family(gamma, num_samples=10)
    assert float(adapters.distribution(gamma, other).init()["log_a"]) == 1.0


class Laplace:
    """By the convention of distrax: `seed` by its name, no word on what may be differentiated, no entropy."""

    def __init__(self, loc):
        self.loc = loc

    def sample(self, *, seed, sample_shape=()):
        return self.loc + jax.random.laplace(seed, (*sample_shape, *jnp.shape(self.loc)))

    def log_prob(self, x):
        return -jnp.abs(x - self.loc) - np.log(2)


@pytest.mark.parametrize("reparameterised", [None, True])
def test_a_distribution_by_the_other_convention(reparameterised):
    """Draws are not differentiated unless it is said that they may be; F = 1, as (±1)² is."""
    own = adapters.distribution(Laplace, jnp.zeros(2), reparameterised=reparameterised)
    assert own.reparameterised == bool(reparameterised) and not hasattr(own, "entropy")
    assert own.sample(own.init(), jax.random.key(0), 5).shape == (5, 2)
    np.testing.assert_allclose(own.fisher(own.init()).diagonal(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(own.log_prob(own.init(), jnp.array([1.0, -2.0])), -3 - 2 * np.log(2), rtol=1e-6)


def test_distrax_is_a_family():
    """A Gamma and classes against the closed forms of their Fisher information; a fit."""
    distrax = pytest.importorskip("distrax")
    logits = adapters.distribution(lambda logits: distrax.Categorical(logits=logits), jnp.zeros(2), num_samples=50_000)
    got = np.asarray(logits.fisher(jnp.log(jnp.array([0.2, 0.8]))).dense())
    np.testing.assert_allclose(got, 0.16 * np.array([[1, -1], [-1, 1]]), rtol=0.05)
    assert not logits.reparameterised
    make = lambda q: distrax.Normal(q["loc"], jnp.exp(q["log_scale"]))
    own = adapters.distribution(make, {"loc": 0.0, "log_scale": 0.0}, reparameterised=True)
    result = ng.fit(lambda x: -0.5 * ((x - 7) / 3) ** 2, own, jax.random.key(0))
    np.testing.assert_allclose([result.params["loc"], np.exp(result.params["log_scale"])], [7, 3], rtol=0.05)


def _guide():
    return pytest.importorskip("numpyro.infer.autoguide").AutoNormal(conjugate)


def _guide_of_another_kind():
    autoguide = pytest.importorskip("numpyro.infer.autoguide")
    return adapters.numpyro(autoguide.AutoDelta(conjugate))


THREE = jnp.zeros(3), jnp.zeros(6)
MISTAKES = {
    "d of another position": (
        lambda: adapters.blackjax_fullrank(2).update(THREE, adapters.blackjax_fullrank(2).init(THREE), THREE),
        ValueError, r"d: blackjax_fullrank\(2\).*3",
    ),
    "no pair": (
        lambda: adapters.blackjax_meanfield(2).update(jnp.zeros(2), adapters.blackjax_meanfield(2).init(jnp.zeros(2)),
                                                      jnp.zeros(2)), TypeError, "params: blackjax_meanfield.*pair"
    ),
    "a function for a guide": (
        lambda: pytest.importorskip("numpyro") and adapters.numpyro(conjugate), TypeError, "guide: expected.*function"
    ),
    "parameters of another guide": (
        lambda: adapters.numpyro(_guide()).init({"x": jnp.zeros(2)}), ValueError, "params: the guide's locs.*among x"
    ),
    "another guide": (_guide_of_another_kind, TypeError, "guide: expected AutoNormal.*AutoDelta"),
    "no function": (lambda: adapters.distribution(3, jnp.zeros(2)), TypeError, "make: expected a function.*got int"),
    "a distribution for a function": (
        lambda: adapters.distribution(Laplace(0.0), jnp.zeros(2)), TypeError, "make: expected a function.*got Laplace"
    ),
    "a function of something else": (
        lambda: adapters.distribution(jnp.sin, jnp.zeros(2)), TypeError, "make: expected it to return a distribution"
    ),
    "no parameters": (lambda: adapters.distribution(Laplace, {}), ValueError, "init: expected at least one parameter"),
    "whole numbers": (
        lambda: adapters.distribution(Laplace, jnp.arange(2)), TypeError, "init: expected floating.*int.*asarray"
    ),
    "not finite": (lambda: adapters.distribution(Laplace, jnp.array([np.nan])), ValueError, "init: expected finite"),
    "traced": (
        lambda: jax.jit(lambda x: adapters.distribution(Laplace, x).init())(jnp.zeros(2)), TypeError,
        "init: expected numbers, got values traced.*outside jit",
    ),
    "no draws": (
        lambda: adapters.distribution(Laplace, jnp.zeros(2), num_samples=0), ValueError, "whole number num_samples"
    ),
    "a loc": (
        lambda: adapters.distribution(Laplace, jnp.zeros(2)).init(1.0), ValueError, "loc: unknown.*fit"
    ),
    "a scale": (
        lambda: adapters.distribution(Laplace, jnp.zeros(2)).init(scale=1.0), ValueError, "scale: unknown.*fit"
    ),
    "a batch for a point": (
        lambda: adapters.distribution(Laplace, jnp.zeros(2)).log_prob(jnp.zeros(2), jnp.zeros((5, 2))), ValueError,
        r"x: expected one point of shape \(2,\), got shape \(5, 2\)",
    ),
    "an exact sum over the reals": (
        lambda: ng.fit(lambda x: -jnp.sum(x**2), adapters.distribution(Laplace, jnp.zeros(2)), jax.random.key(0),
                       estimator=ng.inference.exact()), TypeError, "finite support"
    ),
}  # fmt: skip

test_mistakes_are_named = cases.named_mistakes(MISTAKES)
