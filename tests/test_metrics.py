"""Fisher matrices against closed forms, scales, and the closed-form geometry of the families."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILIES, FISHERS, error, flat

import natgrad_jax as ng
from natgrad_jax import metrics, operators, solvers

every_fisher = pytest.mark.parametrize("name", FISHERS)


def bound(name, dtype):
    """1e-10 in float64. In float32 log q has the rounding of numbers up to 200 (gammaln): absolute 200·eps in s."""
    return 1e-10 if dtype == np.float64 else 200 * cases.eps(dtype)


# fisher_matrix.


@every_fisher
@pytest.mark.parametrize("jac", ["fwd", "rev"])
def test_fisher_matrix_is_the_closed_form(name, jac, dtype):
    log_prob, params, support, expected, options = cases.fisher_case(name, dtype)
    got = ng.fisher_matrix(log_prob, params, support, jac=jac, **options)
    assert got.dtype == dtype and got.shape == expected.shape
    assert error(got, expected) < bound(name, dtype)


@every_fisher
@pytest.mark.parametrize("chunk_size", [50])
def test_chunks_do_not_change_the_sum(name, chunk_size, float64):
    """50 divides few of the supports, and is more than some of them have."""
    log_prob, params, support, expected, options = cases.fisher_case(name, float64)
    for normalized in (True, False):
        got = ng.fisher_matrix(log_prob, params, support, chunk_size=chunk_size, normalized=normalized, **options)
        assert error(got, expected) < 1e-10


@every_fisher
def test_the_metric_is_the_matrix(name, dtype):
    log_prob, params, support, expected, options = cases.fisher_case(name, dtype)
    plain = metrics.fisher(log_prob, support, **options)(params)
    chunked = metrics.fisher(log_prob, support, chunk_size=64, **options)(params)
    assert isinstance(plain, operators.Gram) and isinstance(chunked, operators.Dense)
    for op in (plain, chunked):
        assert error(op.dense(), expected) < bound(name, dtype)
        assert jax.tree.structure(op.mv(params)) == jax.tree.structure(params)
        assert op.dense().dtype == dtype


@every_fisher
def test_fisher_matrix_under_jit_and_vmap(name, float64):
    log_prob, params, support, expected, options = cases.fisher_case(name, float64)
    whole = jax.jit(lambda t: ng.fisher_matrix(log_prob, t, support, **options))
    assert error(whole(params), expected) < 1e-10
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    assert error(jax.vmap(whole)(stacked), np.stack([expected, expected])) < 1e-10


@every_fisher
def test_the_mean_of_the_score_is_no_part_of_the_matrix(name, float64):
    """An unnormalised q: multiplying φ by a function of θ alone, exp(3θ₁ − 5), changes nothing."""
    log_prob, params, support, expected, options = cases.fisher_case(name, float64)
    shifted = lambda t, x: log_prob(t, x) + 3 * jax.tree.leaves(t)[0].ravel()[0] - 5
    assert error(ng.fisher_matrix(shifted, params, support, normalized=False, **options), expected) < 1e-10


def _boltzmann():
    """Three spins with fields and couplings; the statistics are s_i and s_i s_j, so F is their covariance."""
    spins = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], float)
    pairs = spins[:, [0, 0, 1]] * spins[:, [1, 2, 2]]
    return spins, np.concatenate([pairs, spins], axis=1)  # ravel order: couplings, fields


def test_an_unnormalised_boltzmann_model_has_the_covariance_of_its_statistics(dtype):
    spins, statistics = _boltzmann()
    theta = np.array([0.5, -0.25, 1.0, 0.125, -0.5, 0.25])
    q = np.exp(statistics @ theta)
    q /= q.sum()
    expected = np.cov(statistics.T, aweights=q, ddof=0)
    params = {"J": jnp.asarray(theta[:3], dtype), "h": jnp.asarray(theta[3:], dtype)}

    def log_phi(t, s):
        return s @ t["h"] + t["J"] @ (s[jnp.array([0, 0, 1])] * s[jnp.array([1, 2, 2])])

    support = jnp.asarray(spins, dtype)
    for chunk_size in (None, 3):
        got = ng.fisher_matrix(log_phi, params, support, normalized=False, chunk_size=chunk_size)
        assert error(got, expected) < 200 * cases.eps(dtype)
    log_q = lambda t, s: log_phi(t, s) - jax.nn.logsumexp(jax.vmap(lambda x: log_phi(t, x))(support))
    assert error(ng.fisher_matrix(log_q, params, support), expected) < 200 * cases.eps(dtype)


def test_a_large_common_score_is_centred_before_it_is_contracted():
    """F = 0.25 beside a common score of 1000: in float32, contracting first leaves 1e6·eps ≈ 0.1 of error."""
    log_phi = lambda t, x: (x + 1000) * t
    got = ng.fisher_matrix(log_phi, jnp.float32(0.0), jnp.arange(2, dtype=jnp.float32), normalized=False)
    np.testing.assert_allclose(got, [[0.25]], rtol=1e-4)  # 1000·eps in the centred score


def test_points_without_mass_add_nothing(dtype):
    """A masked category: log q = −∞, and a finite score."""
    mask = jnp.array([True, True, False, True])

    def log_prob(logits, k):
        return jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, logits, -jnp.inf)), -jnp.inf)[k]

    logits = jnp.asarray(np.log([0.5, 0.3, 7.0, 0.2]), dtype)
    expected = np.zeros((4, 4))
    p = np.array([0.5, 0.3, 0.2])
    expected[np.ix_([0, 1, 3], [0, 1, 3])] = np.diag(p) - np.outer(p, p)
    for options in ({}, {"jac": "rev"}, {"jac": "fwd"}, {"chunk_size": 3}, {"normalized": False}):
        got = ng.fisher_matrix(log_prob, logits, jnp.arange(4), **options)
        assert error(got, expected) < 20 * cases.eps(dtype)


def test_a_score_that_does_not_exist_is_nan_not_a_guess():
    """The circle at t = 0: F = 1 for every t, but log q there has no finite score."""
    log_prob, _, support, *_ = cases.fisher_case("circle", np.float32)
    assert np.isnan(ng.fisher_matrix(log_prob, jnp.float32(0.0), support)).all()


@pytest.mark.parametrize("half", [jnp.float16, jnp.bfloat16])
def test_half_precision_parameters_are_raised(half):
    log_prob, params, support, *_ = cases.fisher_case("categorical logits", np.float32)
    low = params.astype(half)
    p = np.exp(np.asarray(low, float)) / np.exp(np.asarray(low, float)).sum()
    got = ng.fisher_matrix(log_prob, low, support)
    assert got.dtype == np.float32
    assert error(got, np.diag(p) - np.outer(p, p)) < 20 * cases.eps(np.float32)


def test_one_compilation_for_all_parameters():
    traces = []

    def log_prob(t, x):
        traces.append(1)
        return jax.nn.log_sigmoid((2 * x - 1) * t)

    matrix = jax.jit(lambda t: ng.fisher_matrix(log_prob, t, jnp.arange(2.0)))
    matrix(0.0)
    before = len(traces)
    matrix(1.0)
    assert before > 0 and len(traces) == before


LOGITS, THREE = np.zeros(3, np.float32), np.arange(3)
MISTAKES = {
    "integer parameters": (lambda: ng.fisher_matrix(cases._categorical, jnp.arange(3), THREE), TypeError, "int"),
    "named integer leaf": (lambda: ng.fisher_matrix(lambda t, x: t["a"], {"a": 1}, THREE), TypeError, r"params\['a'\]"),
    "complex parameters": (
        lambda: ng.fisher_matrix(cases._categorical, LOGITS.astype(np.complex64), THREE), TypeError, "complex64"
    ),
    "vector log_prob": (
        lambda: ng.fisher_matrix(lambda t, k: jax.nn.log_softmax(t), LOGITS, THREE), ValueError, r"scalar.*shape \(3,\)"
    ),
    "integer log_prob": (lambda: ng.fisher_matrix(lambda t, k: k, LOGITS, THREE), ValueError, "log_prob.*real scalar"),
    "scalar support": (lambda: ng.fisher_matrix(cases._categorical, LOGITS, 3), ValueError, "support.*leading axis"),
    "empty support": (lambda: ng.fisher_matrix(cases._categorical, LOGITS, THREE[:0]), ValueError, "support"),
    "ragged support": (
        lambda: ng.fisher_matrix(cases._categorical, LOGITS, (THREE, np.arange(2))), ValueError, "support.*common"
    ),
    "not normalised": (
        lambda: ng.fisher_matrix(lambda t, k: t[k], LOGITS, THREE), ValueError, "sum of 3 .*off by 2.*normalized=False"
    ),
    "support incomplete": (
        lambda: ng.fisher_matrix(cases._categorical, LOGITS, np.arange(2)), ValueError, r"0\.66.*off by -0\.33"
    ),
    "not normalised, metric": (
        lambda: metrics.fisher(lambda t, k: t[k], THREE)(LOGITS), ValueError, "normalized=False"
    ),
    "jac": (lambda: ng.fisher_matrix(cases._categorical, LOGITS, THREE, jac="forward"), ValueError, "jac.*forward"),
    "chunk_size": (lambda: metrics.fisher(cases._categorical, THREE, chunk_size=0), ValueError, "chunk_size.*0"),
    "negative scale": (lambda: metrics.scales({"a": 1.0, "b": -1.0}), ValueError, r"s\['b'\].*positive"),
    "zero scale": (lambda: metrics.scales(np.array([1.0, 0.0])), ValueError, "positive"),
    "scale of another shape": (lambda: metrics.scales(np.ones(2))(LOGITS), ValueError, r"\(2,\).*\(3,\)"),
    "scales of another tree": (lambda: metrics.scales({"a": 1.0})({"b": LOGITS}), ValueError, "a|b"),
}  # fmt: skip


test_mistakes_are_named = cases.named_mistakes(MISTAKES)


@pytest.mark.parametrize("jac", ["fwd", "rev"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_not_normalised_is_nan_where_it_cannot_be_read(chunk_size, jac, dtype):
    """Compilers fold selections of constants into what follows: the NaN must reach the result, and only it."""
    free = lambda t, k: t[k]
    options = {"chunk_size": chunk_size, "jac": jac}
    matrix = jax.jit(lambda t: ng.fisher_matrix(free, t, THREE, **options))
    dense = jax.jit(lambda t: metrics.fisher(free, THREE, **options)(t).dense())
    for logits in (LOGITS, np.array([0.1, 0.2, 0.3])):
        # Rows are multiples of unit vectors, so that off the diagonal NaN meets an exact zero.
        assert np.isnan(np.diag(matrix(jnp.asarray(logits, dtype)))).all()
        assert np.isnan(np.diag(dense(jnp.asarray(logits, dtype)))).all()
    p = np.array([0.5, 0.3, 0.2])
    assert error(matrix(jnp.asarray(np.log(p), dtype)), np.diag(p)) < 8 * cases.eps(dtype)


# scales.


def test_scales_are_inverse_squares_on_every_prefix(dtype):
    params = cases.cast({"x": np.ones(2), "y": {"u": np.ones((2, 2)), "v": np.ones(())}}, dtype)
    prefixes = {
        "one number": (0.5, [4.0] * 7),
        "by branch": ({"x": 0.5, "y": 2.0}, [4, 4, 0.25, 0.25, 0.25, 0.25, 0.25]),
        "by leaf": ({"x": 0.5, "y": {"u": 2.0, "v": 0.1}}, [4, 4, 0.25, 0.25, 0.25, 0.25, 100]),
        "by entry": (
            {"x": np.array([0.5, 0.25]), "y": {"u": np.array([1.0, 2.0]), "v": 0.1}}, [4, 16, 1, 0.25, 1, 0.25, 100]
        ),
    }  # fmt: skip
    for s, expected in prefixes.values():
        op = metrics.scales(s)(params)
        np.testing.assert_allclose(flat(op.entries), expected, rtol=8 * cases.eps(dtype))
        assert jax.tree.structure(op.entries) == jax.tree.structure(params)
        assert {x.dtype for x in jax.tree.leaves(op.entries)} == {dtype}


def test_scales_of_half_precision_parameters_do_not_overflow():
    """1e-4⁻² = 1e8 is beyond float16."""
    op = metrics.scales(1e-4)(jnp.ones(2, jnp.float16))
    np.testing.assert_allclose(op.entries, 1e8, rtol=1e-6)


# Families.


@pytest.mark.parametrize("name", FAMILIES)
def test_families_know_their_fisher_information(name, float64):
    """Against Σ q s sᵀ: enumeration, or Gauss–Hermite nodes, exact for the quartic s sᵀ."""
    fam, params = cases.family(name, float64)
    if name in ("bernoulli", "spins"):
        points = fam.support()
        weights = np.exp(jax.vmap(lambda x: fam.log_prob(params, x))(points))
    else:
        nodes, w = np.polynomial.hermite_e.hermegauss(5)
        z = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
        weights = np.outer(w, w).ravel() / (2 * np.pi)
        factor = cases.LOWER if name == "full rank" else np.diag(np.exp(params.log_scale))
        points = jnp.asarray(params.loc) + z @ factor.T
    scores = jax.vmap(lambda x: jax.jacfwd(fam.log_prob)(params, x))(points)
    s = np.concatenate([np.asarray(x).reshape(len(weights), -1) for x in jax.tree.leaves(scores)], axis=1)
    assert abs(weights.sum() - 1) < 1e-12
    assert error(fam.fisher(params).dense(), (s.T * weights) @ s) < 1e-12


@pytest.mark.parametrize("name", ["bernoulli", "spins"])
def test_discrete_families_and_fisher_matrix_agree(name, dtype):
    fam, params = cases.family(name, dtype)
    gap = 1 if name == "bernoulli" else 2
    p = 1 / (1 + np.exp(-gap * flat(params)))
    expected = np.diag(gap**2 * p * (1 - p))
    tol = 50 * cases.eps(dtype)
    assert error(ng.fisher_matrix(fam.log_prob, params, fam.support(dtype)), expected) < tol
    assert error(fam.fisher(params).dense(), expected) < tol
    entropy = -np.sum(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(fam.entropy(params), entropy, rtol=tol)


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


@pytest.mark.parametrize("name", FAMILIES)
def test_log_prob_and_entropy_are_normalised(name, dtype):
    fam, params = cases.family(name, dtype)
    if name in ("bernoulli", "spins"):
        log_q = jax.vmap(lambda x: fam.log_prob(params, x))(fam.support(dtype))
        np.testing.assert_allclose(np.exp(log_q).sum(), 1, rtol=50 * cases.eps(dtype))
        np.testing.assert_allclose(fam.entropy(params), -np.sum(np.exp(log_q) * log_q), rtol=50 * cases.eps(dtype))
        return
    from scipy.stats import multivariate_normal

    factor = cases.LOWER if name == "full rank" else np.diag(np.exp(flat(params.log_scale)))
    q = multivariate_normal(flat(params.loc), factor @ factor.T)
    x = np.array([0.75, -1.5])
    np.testing.assert_allclose(fam.log_prob(params, jnp.asarray(x, dtype)), q.logpdf(x), rtol=50 * cases.eps(dtype))
    np.testing.assert_allclose(fam.entropy(params), q.entropy(), rtol=50 * cases.eps(dtype))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_draws_have_the_moments_of_the_family(name, seed, dtype):
    fam, params = cases.family(name, dtype)
    n = 4000
    draws = np.asarray(fam.sample(params, jax.random.key(seed), n), float)
    if name in ("bernoulli", "spins"):
        low, gap = (0, 1) if name == "bernoulli" else (-1, 2)
        p = 1 / (1 + np.exp(-gap * flat(params)))
        mean, cov = low + gap * p, np.diag(gap**2 * p * (1 - p))
        assert set(np.unique(draws)) == {low, low + gap}
    else:
        factor = cases.LOWER if name == "full rank" else np.diag(np.exp(flat(params.log_scale)))
        mean, cov = flat(params.loc), factor @ factor.T
    z = (draws.mean(0) - mean) / np.sqrt(np.diag(cov) / n)
    assert np.abs(z).max() < 5  # five standard errors
    spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
    # Two-valued variables far from ½ have heavier fourth moments, at most Var/min(p, 1 − p): a factor of 3 here.
    assert (np.abs(np.cov(draws.T) - cov) < 5 * spread * 3).all()
    assert draws.shape == (n, len(mean))


@pytest.mark.parametrize("name", FAMILIES)
def test_retraction_never_leaves_and_is_first_order_right(name, float64):
    fam, params = cases.family(name, float64)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    if name == "full rank":
        direction = direction._replace(scale_tril=jnp.tril(direction.scale_tril))
    gaps = []
    for h in (1e-2, 1e-3):
        step = jax.tree.map(lambda x: h * x, direction)  # noqa: B023
        straight = jax.tree.map(jnp.add, params, step)
        gaps.append(np.linalg.norm(flat(fam.retract(params, step)) - flat(straight)))
    # Quadratic: a tenth of the step leaves a hundredth of the gap (exactly 0 in a global chart).
    assert gaps[0] < 1e-13 or 50 < gaps[0] / gaps[1] < 200
    for sign in (1, -1):
        far = fam.retract(params, jax.tree.map(lambda x: sign * 100 * jnp.ones_like(x), params))  # noqa: B023
        assert np.isfinite(flat(far)).all()
        if name == "full rank":
            assert (np.diag(far.scale_tril) > 0).all()


FAMILY_MISTAKES = {
    "no dimension": (lambda: ng.families.gaussian_full_rank(0), "gaussian_full_rank.*0"),
    "fractional dimension": (lambda: ng.families.gaussian_mean_field(1.5), "gaussian_mean_field.*1.5"),
    "loc of another length": (lambda: ng.families.gaussian_full_rank(2).init(loc=np.ones(3)), r"loc.*\(2,\).*\(3,\)"),
    "scale of another length": (lambda: ng.families.gaussian_mean_field(2).init(scale=np.ones(3)), "scale"),
    "scale of a Bernoulli": (lambda: ng.families.bernoulli(2).init(scale=1.0), "scale"),
    "values out of order": (lambda: ng.families.bernoulli(2, values=(1, 0)), "values"),
    "support too large": (lambda: ng.families.bernoulli(30).support(), "sample instead"),
}


@pytest.mark.parametrize("name", FAMILY_MISTAKES)
def test_mistakes_with_families_are_named(name):
    call, message = FAMILY_MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()
