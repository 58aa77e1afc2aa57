"""Fisher matrices against closed forms, and scales."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FISHERS, error, flat

import natgrad_jax as ng
from natgrad_jax import metrics, operators

every_fisher = pytest.mark.parametrize("name", FISHERS)


def bound(name, dtype):
    """1e-10 in float64. In float32 log q has the rounding of numbers up to 200 (gammaln): absolute 200·eps in s."""
    return 1e-10 if dtype == np.float64 else 200 * cases.eps(dtype)


# fisher_matrix.


@every_fisher
@pytest.mark.parametrize("jac", ["fwd", "rev"])
def test_fisher_matrix_is_the_closed_form(name, jac, dtype):
    log_prob, params, support, expected, options = cases.fisher_case(name, dtype)
    matrix = jax.jit(lambda t, x, options: ng.fisher_matrix(log_prob, t, x, jac=jac, **options))
    got = matrix(params, support, options)
    assert got.dtype == dtype and got.shape == expected.shape
    assert error(got, expected) < bound(name, dtype)


@every_fisher
@pytest.mark.parametrize("chunk_size", [50])
def test_chunks_do_not_change_the_sum(name, chunk_size, float64):
    """50 divides few of the supports, and is more than some of them have."""
    log_prob, params, support, expected, options = cases.fisher_case(name, float64)

    @jax.jit
    def both(t, x, options):
        return [
            ng.fisher_matrix(log_prob, t, x, chunk_size=chunk_size, normalized=normalized, **options)
            for normalized in (True, False)
        ]

    for got in both(params, support, options):
        assert error(got, expected) < 1e-10


@every_fisher
def test_the_metric_is_the_matrix(name, dtype):
    log_prob, params, support, expected, options = cases.fisher_case(name, dtype)

    @jax.jit
    def both(params, support, options):
        forms = [metrics.fisher(log_prob, support, chunk_size=size, **options)(params) for size in (None, 64)]
        return [(op, op.dense(), op.mv(params)) for op in forms]

    plain, chunked = both(params, support, options)
    assert isinstance(plain[0], operators.Gram) and isinstance(chunked[0], operators.Dense)
    for _, matrix, product in (plain, chunked):
        assert error(matrix, expected) < bound(name, dtype)
        assert jax.tree.structure(product) == jax.tree.structure(params)
        assert matrix.dtype == dtype


@every_fisher
def test_fisher_matrix_under_jit_and_vmap(name, float64):
    log_prob, params, support, expected, options = cases.fisher_case(name, float64)
    whole = jax.jit(lambda t: ng.fisher_matrix(log_prob, t, support, **options))
    assert error(whole(params), expected) < 1e-10
    stacked = jax.tree.map(lambda x: np.stack([x, x]), params)
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
