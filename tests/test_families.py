"""Every family against scipy, against its own moments, and against the geometry of its two dual coordinates."""

import contextlib
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from cases import error, flat
from family_cases import FAMILIES, row

import natgrad_jax as ng
from natgrad_jax import solvers
from natgrad_jax.families import special

every_family = pytest.mark.parametrize("name", FAMILIES)
exponential = pytest.mark.parametrize("name", [name for name, one in FAMILIES.items() if one.exponential])
# What the coordinates are known to: digammas of 30, differences of logarithms, inverses of windows.
TOL = {np.dtype("float32"): 2e-4, np.dtype("float64"): 1e-11}
DRAWS = 4000


@functools.cache
def draws(name, dtype):
    fam, params, _ = row(name, dtype)
    return jax.jit(fam.sample, static_argnums=2)(params, jax.random.key(3), DRAWS)


def one(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def used(name, params):
    """A direction in which all of the parameters count: nothing above the diagonal, nothing beyond the end."""
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    return jax.jit(lambda params, v: FAMILIES[name].family.fisher(params).mv(v))(params, random)


@every_family
def test_the_density_and_the_entropy_are_those_of_scipy(name, dtype):
    fam, params, reference = row(name, dtype)
    x = draws(name, dtype)
    log_prob, entropy = jax.jit(fam.log_prob), jax.jit(fam.entropy)(params)
    got = [float(log_prob(params, one(x, i))) for i in range(5)]
    exact = [float(reference.logpdf(jax.tree.map(np.float64, one(x, i)))) for i in range(5)]
    # A density of float32 draws: x itself is rounded, near an edge of the support in particular.
    np.testing.assert_allclose(got, exact, rtol=TOL[dtype], atol=TOL[dtype])
    np.testing.assert_allclose(entropy, reference.entropy(), rtol=TOL[dtype], atol=TOL[dtype])
    assert entropy.dtype == dtype and jnp.result_type(log_prob(params, one(x, 0))) == dtype


@every_family
def test_draws_have_the_density(name, dtype):
    """−E log q is the entropy, and the mean of the statistics is η: within five standard errors."""
    fam, params, _ = row(name, dtype)
    x = draws(name, dtype)
    log_q = np.asarray(jax.jit(jax.vmap(fam.log_prob, (None, 0)))(params, x), float)
    assert abs(log_q.mean() + float(jax.jit(fam.entropy)(params))) < 5 * log_q.std() / DRAWS**0.5 + 1e-5
    if not FAMILIES[name].exponential:
        return
    statistics = jax.jit(jax.vmap(fam.statistics))(x)
    mean = jax.jit(fam.to_mean)(params)
    assert jax.tree.structure(mean) == jax.tree.structure(one(statistics, 0))
    assert jax.tree.structure(mean) == jax.tree.structure(jax.eval_shape(fam.to_natural, params))
    for t, expected in zip(jax.tree.leaves(statistics), jax.tree.leaves(mean), strict=True):
        t = np.asarray(t, float)
        assert (np.abs(t.mean(0) - expected) < 5 * t.std(0) / DRAWS**0.5 + 1e-4 * np.abs(expected) + 1e-6).all()


@every_family
def test_the_start_has_the_asked_mean_and_spread(name):
    fam, params, _ = row(name, np.dtype("float32"))
    start = fam.init()
    assert jax.tree.structure(start) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, params)
    assert np.isfinite(float(fam.entropy(start))) and hash(fam) == hash(fam)


def dual_fisher(fam, params, moments=None):
    """(∂θ/∂φ)ᵀ(∂η/∂φ); of a curved family of Gaussians ∂μᵀΣ⁻¹∂μ + ½tr(Σ⁻¹∂Σ Σ⁻¹∂Σ)."""
    space = ng.operators.Space.of(params)
    at = space.ravel(params)
    if moments is None:
        theta, eta = (
            jax.jacobian(
                lambda v, to=to: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(to(space.unravel(v)))])
            )(at)
            for to in (fam.to_natural, fam.to_mean)
        )
        return theta.T @ eta
    precision = jnp.linalg.inv(moments(params)[1])
    mean, cov = jax.jacobian(lambda v: moments(space.unravel(v)))(at)
    change = jnp.einsum("ij,jkp->ikp", precision, cov)
    return jnp.einsum("ip,ij,jq->pq", mean, precision, mean) + 0.5 * jnp.einsum("ijp,jiq->pq", change, change)


@every_family
def test_the_fisher_information_is_that_of_the_dual_coordinates(name, float64):
    """In units of its diagonal, so that no large entry hides a small one."""
    fam, params, _ = row(name, float64)
    expected = np.asarray(jax.jit(lambda params: dual_fisher(fam, params, FAMILIES[name].moments))(params))
    diagonal = np.diag(expected)
    unit = np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1)), 1)
    got = unit[:, None] * np.asarray(jax.jit(lambda params: fam.fisher(params).dense())(params)) * unit
    np.testing.assert_allclose(got, unit[:, None] * expected * unit, atol=1e-11)


@every_family
def test_the_solve_is_the_inverse_of_the_product(name, dtype):
    """F F⁺ g = g for g in the range, with what a solver makes of the operator."""
    fam, params, _ = row(name, dtype)
    g = used(name, params)

    @jax.jit
    def solved(params, g):
        operator = fam.fisher(params)
        solution = solvers.solve(operator, g)
        return solution, operator.mv(solution.value)

    solution, product = solved(params, g)
    assert bool(solution.converged)
    assert error(product, g) < 100 * TOL[dtype]
    # The step does not depend on a part of g that has no meaning.
    again = solved(params, product)[0].value
    assert error(again, solution.value) < 100 * TOL[dtype]


@exponential
def test_coordinates_have_exact_inverses(name, dtype):
    fam, params, _ = row(name, dtype)
    to_natural, to_mean, from_natural, from_mean = map(
        jax.jit, (fam.to_natural, fam.to_mean, fam.from_natural, fam.from_mean)
    )
    mean = to_mean(params)
    for to, fro in ((to_natural, from_natural), (to_mean, from_mean)):
        back = fro(to(params))
        assert jax.tree.structure(back) == jax.tree.structure(params)
        assert {x.dtype for x in jax.tree.leaves(back)} == {dtype}
        assert error(to_mean(back), mean) < 10 * TOL[dtype]
        assert error(to(back), to(params)) < 10 * TOL[dtype]
    # Out of one set of coordinates, into the parameters: up to what changes nothing (a shift of logits).
    if name != "categorical":
        expected = params if name != "banded" else params._replace(bands=fam._bands(params))
        back = from_mean(mean)
        assert error(jax.tree.map(np.abs, back), jax.tree.map(np.abs, expected)) < 1000 * TOL[dtype]


@exponential
def test_the_inverse_of_the_mean_has_derivatives(name, float64):
    """∂φ/∂η ∂η/∂φ v = v: through Newton's method by the implicit function theorem."""
    fam, params, _ = row(name, float64)
    weights = jax.tree.map(lambda x: jnp.asarray(np.cos(np.arange(x.size)).reshape(x.shape)), params)

    @jax.jit
    def derivatives(params, g):
        v = solvers.solve(fam.fisher(params), g).value
        mean, velocity = jax.jvp(fam.to_mean, (params,), (v,))
        around = jax.jvp(lambda eta: fam.to_mean(fam.from_mean(eta)), (mean,), (velocity,))[1]
        total = lambda eta: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, weights, fam.from_mean(eta))))
        forward = jax.jvp(total, (mean,), (velocity,))[1]
        backward = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(total)(mean), velocity)))
        return around, velocity, forward, backward

    around, velocity, forward, backward = derivatives(params, used(name, params))
    assert error(around, velocity) < 1e-8
    np.testing.assert_allclose(backward, forward, rtol=1e-9)


@every_family
def test_retraction_never_leaves_and_is_first_order_right(name, float64):
    fam, params, _ = row(name, float64)
    direction = solvers.solve(fam.fisher(params), used(name, params)).value
    size = fam.fisher(params).norm(direction)
    gaps = []
    for h in (1e-2, 1e-3):
        step = jax.tree.map(lambda x: h / size * x, direction)  # noqa: B023
        got, straight = fam.retract(params, step), jax.tree.map(jnp.add, params, step)
        gaps.append(np.linalg.norm(flat(fam.fisher(params).mv(jax.tree.map(jnp.subtract, got, straight)))))
    # Quadratic: a tenth of the step leaves a hundredth of the gap (exactly 0 in a global chart).
    assert gaps[0] < 1e-11 or 50 < gaps[0] / gaps[1] < 200
    x = one(draws(name, float64), 0)
    for far in (1e2, -1e2, 1e6, -1e6):
        step = jax.tree.map(lambda x: far * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)  # noqa: B023
        there = fam.retract(params, step)
        assert np.isfinite(flat(there)).all()
        assert not np.isnan(float(fam.log_prob(there, x))) and np.isfinite(float(fam.entropy(there)))


@every_family
def test_vmap_over_parameters_is_a_loop(name, float64):
    fam, params, _ = row(name, float64)
    many = jax.tree.map(lambda x: np.stack([x, 1.25 * x]), params)

    def whatever(params):
        v = jax.tree.map(jnp.ones_like, params)
        step = solvers.solve(fam.fisher(params), fam.fisher(params).mv(v)).value
        return fam.entropy(params), step, fam.retract(params, v), fam.sample(params, jax.random.key(0), 2)

    together = jax.jit(jax.vmap(whatever))(many)
    alone = jax.jit(whatever)
    for i in range(2):
        assert error(flat(one(together, i)), flat(alone(one(many, i)))) < 1e-9


@pytest.mark.parametrize("name", ["gamma", "inverse gamma", "beta", "dirichlet", "von mises", "wishart"])
def test_nothing_cancels_at_large_concentrations(name):
    """float32 against float64, where ψ₁(α) − 1/α and its like have lost all digits in the textbook form."""
    fam = FAMILIES[name].family
    steps = []
    for dtype in (jnp.float32, jnp.float64):
        with cases.x64() if dtype == jnp.float64 else contextlib.nullcontext():
            params = cases.cast(FAMILIES[name].params, np.dtype(dtype))
            params = params._replace(df=jnp.asarray(3e4, dtype)) if name == "wishart" else jax.tree.map(
                lambda x: jnp.abs(x) * 3e4, params)  # fmt: skip
            g = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=dtype)).reshape(x.shape), params)  # noqa: B023
            steps.append(flat(solvers.solve(fam.fisher(params), g).value))
    np.testing.assert_allclose(steps[0], steps[1], rtol=2e-4)


@pytest.mark.parametrize(("name", "size"), [("gamma", 30), ("inverse gamma", 30), ("wishart", 300), ("von mises", 30)])
def test_the_mean_is_inverted_far_out_in_float32(name, size):
    """Concentrations of 900: powers of x in a derivative of a series would not be floats."""
    fam, params, _ = row(name, np.dtype("float32"))
    params = jax.tree.map(lambda x: x * size if x.ndim < 2 and name != "von mises" else x, params)
    params = params._replace(concentration=30 * params.concentration) if name == "von mises" else params
    assert error(fam.to_mean(fam.from_mean(fam.to_mean(params))), fam.to_mean(params)) < 1e-5


@pytest.mark.parametrize("at", [12.0, 60.0])
@pytest.mark.parametrize("f", [special.excess_trigamma, special.log_minus_digamma, special.bessel_gap,
                               special.bessel_slope, special.defect, special.log_bessel])  # fmt: skip
def test_derivatives_join_where_the_series_begin(f, at, float64):
    slopes = [float(jax.grad(f)(jnp.asarray(at * (1 + side)))) for side in (-1e-9, 0, 1e-9)]
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_couplings_are_found_from_any_means(seed, float64):
    rng = np.random.default_rng(seed)
    family = ng.families.boltzmann(3)
    params = ng.families.BoltzmannParams(jnp.asarray(1.5 * rng.normal(size=3)), jnp.asarray(1.5 * rng.normal(size=3)))
    assert error(family.from_mean(family.to_mean(params)), params) < 1e-5


@pytest.mark.parametrize("kappa", [jnp.nan, jnp.inf, 1e30])
def test_angles_are_drawn_or_nan_but_not_for_ever(kappa):
    params = ng.families.VonMisesParams(jnp.zeros(2), jnp.array([kappa, 1.0]))
    x = ng.families.von_mises(2).sample(params, jax.random.key(0), 3)
    assert np.isfinite(x[:, 1]).all() and np.isfinite(x[:, 0]).all() == np.isfinite(kappa)


@pytest.mark.parametrize("name", ["full rank", "precision", "banded", "wishart", "matrix normal", "block diagonal"])
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_repeated_far_steps_stay_inside(name, far):
    fam, params, _ = row(name, np.dtype("float32"))
    for _ in range(8):
        step = jax.tree.map(lambda x: jnp.clip(far * x, -1e38, 1e38), params)
        params = fam.retract(params, step)
        assert np.isfinite(flat(params)).all()
    factor = {"banded": lambda p: p.bands[:, 0], "block diagonal": lambda p: jnp.diagonal(p[0].scale_tril)}
    assert (factor.get(name, lambda p: jnp.diagonal(p[-1]))(params) > 0).all()


def test_classes_without_probability_have_no_step():
    c, p = ng.families.categorical(3), jnp.array([0.0, 0.5, -95.0])
    g = jax.grad(c.entropy)(p)
    for family, params, slope in (
        (c, p, g), (ng.families.categorical(3, minimal=True), p[::2] - p[1], g[::2]),
    ):  # fmt: skip
        step = solvers.solve(family.fisher(params), slope)
        assert bool(step.converged) and np.isfinite(flat(step.value)).all() and float(step.value[-1]) == 0
    mixture = ng.families.gaussian_mixture(2, 3)
    params = mixture.init()._replace(logits=p)
    g = jax.grad(mixture.log_prob)(params, jnp.array([0.3, 0.4]))
    step = solvers.solve(mixture.fisher(params), g)
    assert bool(step.converged) and np.isfinite(flat(step.value)).all() and flat(step.value).any()


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_a_factor_that_is_far_larger_than_the_rest(scale):
    """log q of an x in the range of B, float32 against float64."""
    fam = ng.families.gaussian_low_rank(3, 1)
    results = []
    for dtype in (jnp.float32, jnp.float64):
        with cases.x64() if dtype == jnp.float64 else contextlib.nullcontext():
            factor = scale * jnp.asarray([[1.0], [-0.5], [0.25]], dtype)
            params = ng.families.LowRankParams(jnp.zeros(3, dtype), jnp.asarray([0.1, 0.2, -0.1], dtype), factor)
            x = 0.7 * factor[:, 0] + jnp.asarray([0.5, 0.0, -1.0], dtype)
            value, g = jax.value_and_grad(fam.log_prob)(params, x)
            results.append([float(value), *flat(g.log_scale)])
    np.testing.assert_allclose(results[0], results[1], rtol=0.02 * scale / 1e4, atol=2e-2)


def test_a_factor_with_a_small_column_keeps_it():
    """Columns of 1 and 5e-4 in float32: F F⁺ g = g for both."""
    fam, rng = ng.families.gaussian_low_rank(5, 2), np.random.default_rng(0)
    factor = jnp.asarray(rng.normal(size=(5, 2)) * np.array([1.0, 5e-4]), jnp.float32)
    params = ng.families.LowRankParams(jnp.zeros(5), jnp.zeros(5), factor)
    g = fam.fisher(params).mv(
        jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    )
    again = fam.fisher(params).mv(solvers.solve(fam.fisher(params), g).value)
    for column in range(2):
        assert error(again.factor[:, column], g.factor[:, column]) < 0.02


def test_angles_of_almost_no_concentration():
    family, zero = ng.families.von_mises(1), ng.families.VonMisesParams(jnp.zeros(1), jnp.zeros(1))
    small = zero._replace(concentration=jnp.full(1, 1e-6))
    np.testing.assert_allclose(family.fisher(small).entries.loc, 5e-13, rtol=1e-4)  # κ²/2
    np.testing.assert_allclose(family.from_mean(family.to_mean(small)).concentration, 1e-6, rtol=1e-4)
    assert not flat(family.retract(zero, zero)).any() and not flat(family.from_mean(family.to_mean(zero))).any()
    np.testing.assert_allclose(jax.grad(family.log_prob)(zero, jnp.zeros(1)).concentration, 1.0)


def test_concentrations_near_zero_have_a_step():
    family, alpha = ng.families.dirichlet(3), jnp.array([1e-26, 0.5, 2.0])
    assert np.isfinite(flat(solvers.solve(family.fisher(alpha), jnp.array([0.0, 1.0, -1.0])).value)).all()


def test_a_step_is_differentiable(float64):
    """Through the solve of a mean field, one of whose entries does not depend on the parameters."""
    family = ng.families.gaussian_mean_field(2)
    g = family.init(1.0)
    squares = lambda p: sum(jnp.sum(jnp.square(x)) for x in solvers.solve(family.fisher(p), g).value)
    slope = jax.grad(squares)(family.init(scale=2.0)).log_scale
    np.testing.assert_allclose(slope, 4 * 2.0**4)  # of σ⁴ in log σ


def test_a_product_keeps_single_precision(float64):
    family = FAMILIES["product"].family
    params = cases.cast(FAMILIES["product"].params, np.dtype("float32"))
    x = jax.tree.map(lambda x: x.astype(jnp.float32), one(family.sample(params, jax.random.key(0), 1), 0))
    assert family.log_prob(params, x).dtype == family.entropy(params).dtype == np.float32


def test_draws_lie_inside_the_support():
    for family, params in (
        (ng.families.gamma(1), ng.families.GammaParams(jnp.full(1, 0.01), jnp.full(1, 10.0))),
        (ng.families.inverse_gamma(1), ng.families.InverseGammaParams(jnp.full(1, 0.01), jnp.full(1, 10.0))),
        (ng.families.dirichlet(3), jnp.array([0.01, 0.01, 3.0])),
        (ng.families.wishart(3), ng.families.WishartParams(jnp.array(2.1), jnp.eye(3))),
    ):
        x = family.sample(params, jax.random.key(0), 1000)
        log_q = jax.vmap(lambda x: family.log_prob(params, x))(x)  # noqa: B023
        # A Wishart matrix of a condition beyond float32 has lost its smallest eigenvalue.
        assert np.isfinite(np.asarray(log_q)).mean() >= (0.6 if x.ndim == 3 else 1)


def test_equal_families_have_operators_of_one_structure(dtype):
    build = [one.family.fisher for one in FAMILIES.values()] + [ng.families.gaussian_mixture(2, 3).fisher]
    params = [row(name, dtype)[1] for name in FAMILIES] + [ng.families.gaussian_mixture(2, 3).init()]
    for fisher, p in zip(build, params, strict=True):
        assert jax.tree.structure(fisher(p)) == jax.tree.structure(fisher(p))
    assert jax.tree.structure(ng.families.wishart(2).fisher(ng.families.wishart(2).init())) == jax.tree.structure(
        ng.families.wishart(2).fisher(ng.families.wishart(2).init())
    )


def test_the_start_has_the_dtype_of_what_is_given(float64):
    f, loc = ng.families, np.zeros(2, np.float32)
    for start in (
        f.gaussian_full_rank(2).init(loc), f.gaussian_banded(2, 1).init(loc), f.gaussian_mixture(2, 2).init(loc),
        f.gaussian_full_rank(2).init(scale=np.eye(2, dtype=np.float32)), f.von_mises(2).init(loc),
    ):  # fmt: skip
        assert {x.dtype for x in jax.tree.leaves(start)} == {np.dtype("float32")}
    lower = f.gaussian_full_rank(2).init(scale=[[2, 0], [1, 1]]).scale_tril
    assert lower.dtype == float64


@pytest.mark.parametrize(("failures", "mean"), [(1e-6, 0.1), (0.01, 1e3), (1.0, 30.0), (1e3, 30.0), (1e5, 0.1)])
def test_the_entropy_of_counts_of_any_dispersion(failures, mean, dtype):
    """Against a sum of two million terms."""
    log_q = scipy.stats.nbinom(failures, failures / (failures + mean)).logpmf(np.arange(2_000_000))
    exact = -np.sum(np.where(log_q > -700, np.exp(log_q) * log_q, 0))
    got = ng.families.negative_binomial(1, failures).entropy(jnp.array([mean], dtype))
    np.testing.assert_allclose(got, exact, rtol=1e-7 if dtype == np.float64 else 2e-3)


def test_a_step_through_a_chart_is_that_of_the_family():
    """Where a variance has gone to 0 as well; the dual coordinates are those of the family."""
    family = ng.families.bernoulli(2)
    chart = ng.families.chart(family, lambda t: 2 * t, lambda t: t / 2)
    params, g = jnp.array([120.0, 0.5]), jnp.array([0.0, 1.0])
    inside = solvers.solve(family.fisher(params), g / 2).value
    np.testing.assert_allclose(solvers.solve(chart.fisher(params / 2), g).value, inside / 2, rtol=1e-6)
    np.testing.assert_allclose(chart.from_mean(chart.to_mean(params[1:] / 2)), params[1:] / 2, rtol=1e-6)


def test_special_functions_join_their_series(float64):
    """Against scipy on both sides of the switch, and at the ends."""
    x = np.array([1e-3, 0.5, 3.0, 11.999, 12.001, 40.0, 1e3])
    trigamma = scipy.special.polygamma(1, x)
    np.testing.assert_allclose(special.excess_trigamma(x), x * trigamma - 1, rtol=1e-11, atol=2e-13)
    np.testing.assert_allclose(
        special.log_minus_digamma(x), np.log(x) - scipy.special.digamma(x), rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(special.defect(x), x - 1 / trigamma, rtol=1e-9, atol=1e-12)
    kappa = np.array([1e-8, 1e-3, 0.5, 20.0, 59.9, 60.1, 500.0])
    ratio = scipy.special.ive(1, kappa) / scipy.special.ive(0, kappa)
    np.testing.assert_allclose(special.bessel_gap(kappa), 1 - ratio, rtol=1e-11)
    np.testing.assert_allclose(special.bessel_slope(kappa), 1 - ratio / kappa - ratio**2, rtol=1e-8)
    for f, at in ((special.excess_trigamma, 12.0), (special.log_minus_digamma, 12.0), (special.bessel_gap, 60.0),
                  (special.bessel_slope, 60.0)):  # fmt: skip
        low, high = (float(f(jnp.asarray(at * (1 + side)))) for side in (-1e-12, 1e-12))
        assert abs(high / low - 1) < 1e-10


@pytest.mark.parametrize("mean", [99.0, 101.0, 3e3])
def test_the_entropy_of_counts_joins_its_series(mean, float64):
    q = ng.families.poisson(1)
    np.testing.assert_allclose(q.entropy(jnp.array([mean])), scipy.stats.poisson(mean).entropy(), rtol=1e-9)


def test_angles_without_concentration_are_uniform():
    family = ng.families.von_mises(1)
    params = ng.families.VonMisesParams(jnp.zeros(1), jnp.zeros(1))
    x = np.sort(np.asarray(family.sample(params, jax.random.key(0), 2000))[:, 0])
    assert np.abs(x / (2 * np.pi) + 0.5 - np.arange(2000) / 2000).max() < 1.95 / 2000**0.5  # Kolmogorov, 0.1 %
    assert np.isfinite(flat(family.fisher(params).entries)).all()


def test_the_metric_of_a_mixture_is_that_of_the_labelled_draws(float64):
    """Σ_k π_k E_k[s sᵀ], s the score of (x, k), by Gauss–Hermite nodes."""
    family = ng.families.gaussian_mixture(1, 2)
    components = ng.families.FullRankParams(jnp.array([[0.5], [-1.0]]), jnp.array([[[0.7]], [[1.5]]]))
    params = ng.families.MixtureParams(jnp.array([0.3, -0.4]), components)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()

    def log_joint(params, x, k):
        component = jax.tree.map(lambda x: x[k], params.components)
        return jax.nn.log_softmax(params.logits)[k] + ng.families.gaussian_full_rank(1).log_prob(component, x)

    total, log_q = 0.0, []
    for k, pi in enumerate(np.exp(params.logits) / np.exp(params.logits).sum()):
        x = params.components.loc[k] + nodes[:, None] * params.components.scale_tril[k, 0]
        scores = np.array([flat(jax.grad(log_joint)(params, point, k)) for point in x])
        total = total + pi * np.einsum("n,ni,nj->ij", weights, scores, scores)
        log_q.append(float(log_joint(params, jnp.array([0.2]), k)))
    assert error(family.fisher(params).dense(), total) < 1e-12
    np.testing.assert_allclose(family.log_prob(params, jnp.array([0.2])), np.logaddexp(*log_q), rtol=1e-12)
    v = jax.tree.map(jnp.ones_like, params)
    g = family.fisher(params).mv(v)
    assert error(family.fisher(params).mv(solvers.solve(family.fisher(params), g).value), g) < 1e-12
    x = np.asarray(family.sample(params, jax.random.key(0), 4000))[:, 0]
    pi = np.exp(params.logits) / np.exp(params.logits).sum()
    mean = pi @ np.array([0.5, -1.0])
    second = pi @ (np.array([0.5, -1.0]) ** 2 + np.array([0.7, 1.5]) ** 2)
    assert abs(x.mean() - mean) < 5 * x.std() / 4000**0.5
    assert abs((x**2).mean() - second) < 5 * (x**2).std() / 4000**0.5
    moved = family.retract(params, jax.tree.map(lambda x: -1e3 * jnp.ones_like(x), params))
    assert np.isfinite(float(family.log_prob(moved, jnp.zeros(1))))


@pytest.mark.parametrize("name", ["bernoulli", "spins"])
def test_discrete_families_and_fisher_matrix_agree(name, dtype):
    fam, params = cases.family(name, dtype)
    gap = 1 if name == "bernoulli" else 2
    p = 1 / (1 + np.exp(-gap * flat(params)))
    expected = np.diag(gap**2 * p * (1 - p))
    tol = 50 * cases.eps(dtype)
    assert error(ng.fisher_matrix(fam.log_prob, params, fam.support(dtype)), expected) < tol
    assert error(fam.fisher(params).dense(), expected) < tol


def test_the_full_rank_natural_gradient_is_the_formula(dtype):
    """(LLᵀg_μ, LΦ(LᵀG_L)), Φ the lower triangle with halved diagonal."""
    fam, params = cases.family("full rank", dtype)
    lower = cases.LOWER
    g_mu, g_lower = np.array([0.5, -1.0]), np.array([[1.0, 0.0], [0.25, -2.0]])
    phi = np.tril(lower.T @ g_lower) - 0.5 * np.diag(np.diag(lower.T @ g_lower))
    g = ng.families.FullRankParams(jnp.asarray(g_mu, dtype), jnp.asarray(g_lower, dtype))
    got = solvers.solve(fam.fisher(params), g).value
    assert error(got, (lower @ lower.T @ g_mu, lower @ phi)) < 20 * cases.eps(dtype)
    used = [0, 1, 2, 4, 5]
    matrix = cases.full_rank_matrix(lower)[np.ix_(used, used)]
    expected = np.zeros(6)
    expected[used] = np.linalg.solve(matrix, flat(g)[used])
    assert error(got, expected) < 20 * np.linalg.cond(matrix) * cases.eps(dtype)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_dimensions_in_closed_form(seed, float64):
    """p = 10,100 with the unused triangle: the matrix of 0.8 GB is never formed."""
    d, rng = 100, np.random.default_rng(seed)
    lower = np.tril(rng.normal(size=(d, d)) / 10) + np.eye(d)
    fam = ng.families.gaussian_full_rank(d)
    params = fam.init(loc=rng.normal(size=d), scale=lower)
    v = ng.families.FullRankParams(jnp.asarray(rng.normal(size=d)), jnp.asarray(np.tril(rng.normal(size=(d, d)))))
    solve = jax.jit(lambda params, g: solvers.solve(fam.fisher(params), g).value)
    assert error(solve(params, fam.fisher(params).mv(v)), v) < 1e-14 * np.linalg.cond(lower) ** 2


MIXTURES = ng.families.product([ng.families.gaussian_mixture(1, 2)])
MISTAKES = {
    "no dimension": (lambda: ng.families.gaussian_full_rank(0), ValueError, "gaussian_full_rank.*0"),
    "fractional dimension": (lambda: ng.families.gaussian_mean_field(1.5), ValueError, "gaussian_mean_field.*1.5"),
    "loc of another length": (
        lambda: ng.families.gaussian_full_rank(2).init(loc=np.ones(3)),
        ValueError,
        r"loc.*\(2,\).*\(3,\)",
    ),
    "scale of another length": (lambda: ng.families.gaussian_mean_field(2).init(scale=np.ones(3)), ValueError, "scale"),
    "scale of a Bernoulli": (lambda: ng.families.bernoulli(2).init(scale=1.0), ValueError, "scale"),
    "values out of order": (lambda: ng.families.bernoulli(2, values=(1, 0)), ValueError, "values"),
    "support too large": (lambda: ng.families.bernoulli(30).support(), ValueError, "sample instead"),
    "rank beyond d": (lambda: ng.families.gaussian_low_rank(2, 3), ValueError, "rank: .*d = 2, got 3"),
    "band beyond d": (lambda: ng.families.gaussian_banded(3, 3), ValueError, "bandwidth: .*d = 3, got 3"),
    "no blocks": (lambda: ng.families.gaussian_block_diagonal(()), ValueError, "sizes: .*got ()"),
    "one class": (lambda: ng.families.categorical(1), ValueError, "categorical.*k ≥ 2, got 1"),
    "no failures": (lambda: ng.families.negative_binomial(1, 0.0), ValueError, "failures.*positive.*got 0"),
    "scale of counts": (lambda: ng.families.poisson(2).init(scale=1.0), ValueError, "scale: a Poisson family has none"),
    "a batch for a point": (
        lambda: ng.families.poisson(2).log_prob(ng.families.poisson(2).init(), jnp.zeros((5, 2))),
        ValueError,
        r"x: expected one point of shape \(2,\), got shape \(5, 2\).*vmap",
    ),
    "a negative scale": (lambda: ng.families.gaussian_mean_field(2).init(scale=-1.0), ValueError, "scale: .*positive"),
    "a negative mean": (lambda: ng.families.gamma(2).init(loc=-1.0), ValueError, "loc: .*positive"),
    "too wide for an interval": (lambda: ng.families.beta(1).init(0.5, 0.6), ValueError, "scale: .*less than"),
    "a number for a matrix": (lambda: ng.families.wishart(2).init(2.0), ValueError, r"loc: .*matrix.*\(2, 2\)"),
    "2³⁰ configurations": (lambda: ng.families.boltzmann(30), ValueError, "n: expected at most 16"),
    "three values": (lambda: ng.families.bernoulli(2, (0, 1, 2)), ValueError, "values: expected two"),
    "no entropy": (
        lambda: MIXTURES.entropy(MIXTURES.init()),
        TypeError,
        "families: GaussianMixture has no entropy",
    ),
    "product of nothing": (lambda: ng.families.product({}), ValueError, "families: .*empty"),
    "product of arrays": (lambda: ng.families.product([jnp.ones(2)]), TypeError, "families: .*leaves"),
    "chart of a string": (lambda: ng.families.chart("gamma", abs, abs), TypeError, "family: .*str"),
    "chart without a map": (lambda: ng.families.chart(ng.families.gamma(1), None, abs), TypeError, "to: .*NoneType"),
}

test_mistakes_are_named = cases.named_mistakes(MISTAKES)
