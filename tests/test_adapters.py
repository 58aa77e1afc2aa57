"""Natural gradients inside blackjax and numpyro: their own densities, their own loops."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
}  # fmt: skip

test_mistakes_are_named = cases.named_mistakes(MISTAKES)
