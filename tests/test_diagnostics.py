"""PSIS against arviz, blackjax and known tails; tables against numpy; files against what went in."""

import json
import sys
import types
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import natgrad_jax as ng
from natgrad_jax.inference import diagnostics

psis = jax.jit(diagnostics.psis)

# psis.


def log_weights(shape, n):
    """log w of n draws: w generalised Pareto of this shape, or exp(0.32x²) with x ~ N(0, 1), as it is or with ties."""
    rng = np.random.default_rng(n)
    if isinstance(shape, float):
        e = -np.log1p(-rng.random(n))
        return np.log(np.expm1(shape * e) / shape) if shape else np.log(e)
    x = 0.32 * rng.standard_normal(n) ** 2
    return x if shape == "narrow" else np.round(4 * x) / 4


# (shape, n): k and 1/Σw² of the smoothed weights, by lw, k = arviz.psislw(log_weights(shape, n)) of arviz 0.23.4.
PSISLW = {
    (-0.5, 100): (-0.331749955146, 70.4440804692),
    (-0.5, 1000): (-0.321485190656, 659.327662866),
    (-0.5, 4000): (-0.493365747916, 2638.80599948),
    (0.0, 100): (0.128786164656, 48.5134855728),
    (0.0, 1000): (0.182710560544, 477.93929171),
    (0.0, 4000): (0.0415711558153, 1963.03279222),
    (0.3, 100): (0.407631378772, 30.3565750255),
    (0.3, 1000): (0.48142778523, 247.549156544),
    (0.3, 4000): (0.371561134981, 1140.4908217),
    (0.7, 100): (0.782321990909, 10.7422992452),
    (0.7, 1000): (0.875599843498, 32.3010173416),
    (0.7, 4000): (0.809148285447, 149.560335281),
    (1.2, 100): (1.25523300941, 3.2405709809),
    (1.2, 1000): (1.36740676925, 3.68768820728),
    (1.2, 4000): (1.34661555323, 10.8737022233),
    ("narrow", 100): (0.227494976247, 78.3485570275),
    ("narrow", 1000): (0.719647622969, 333.399472146),
    ("narrow", 4000): (0.668660693701, 1047.86937803),
    ("tied", 100): (-0.0618731966152, 78.2774194663),
    ("tied", 1000): (0.463332731038, 429.408548734),
    ("tied", 4000): (0.446506565839, 1386.68982457),
}


@pytest.mark.parametrize(("shape", "n"), PSISLW, ids=str)
def test_psis_agrees_with_arviz(shape, n, dtype):
    khat, size = PSISLW[shape, n]
    got = psis(jnp.asarray(log_weights(shape, n), dtype))
    tolerance = {"float32": 1e-4, "float64": 1e-9}[dtype.name]
    np.testing.assert_allclose(got.khat, khat, atol=tolerance)
    np.testing.assert_allclose(diagnostics.effective_sample_size(got.log_weights), size, rtol=tolerance)
    assert got.khat.dtype == got.log_weights.dtype == dtype


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("shape", [-0.5, 0.7, "tied"])
def test_every_weight_is_that_of_arviz(shape, float64):
    arviz = pytest.importorskip("arviz", exc_type=ImportError)
    if not hasattr(arviz, "psislw"):
        pytest.skip("arviz 1 has no psislw")
    expected, khat = arviz.psislw(log_weights(shape, 1000))
    got = psis(log_weights(shape, 1000))
    np.testing.assert_allclose(got.khat, khat, atol=1e-10)
    np.testing.assert_allclose(np.sort(got.log_weights), np.sort(expected), atol=1e-10)  # equal draws may swap


@pytest.mark.parametrize("n", [100, 3600])  # where M = n/5 and M = 3√n are whole: blackjax rounds M down
@pytest.mark.parametrize("shape", [0.0, 0.7, 1.2, "narrow"])
def test_psis_agrees_with_blackjax(shape, n, float64):
    blackjax = pytest.importorskip("blackjax.diagnostics")
    if not hasattr(blackjax, "psis_weights"):
        pytest.skip("this blackjax has no PSIS")
    given = jnp.asarray(log_weights(shape, n))
    expected, khat = jax.jit(blackjax.psis_weights)(given)
    got = psis(given)
    np.testing.assert_allclose(got.khat, khat, atol=1e-9)
    if khat >= 1 / 3:  # blackjax smooths no lighter tail
        np.testing.assert_allclose(got.log_weights, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [-0.5, 0.7, "narrow"])
def test_smoothing_keeps_the_order_the_body_and_the_maximum(shape, dtype):
    raw = log_weights(shape, 1000)
    raw[7] = -np.inf
    got = np.asarray(psis(jnp.asarray(raw, dtype)).log_weights, float)
    assert np.isneginf(got[7])
    np.testing.assert_allclose(np.exp(got).sum(), 1, rtol=1000 * cases.eps(dtype))
    places = np.argsort(raw)[1:]
    assert (np.diff(got[places]) >= 0).all()
    shift = got[places] - raw[places]
    body, tail = shift[:-95], shift[-95:]  # M = ⌈3√1000⌉ = 95
    np.testing.assert_allclose(body, body[0], atol=100 * cases.eps(dtype))
    assert tail[-1] <= body[0] + 100 * cases.eps(dtype)
    assert np.mean(np.abs(tail - body[0]) > 1000 * cases.eps(dtype)) > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variance", [0.8, 0.5, 0.2])
def test_khat_of_a_narrow_gaussian(variance, seed, float64):
    """N(0, σ²) for N(0, 1): log w = ½x²(1/σ² − 1) = ½kz² with z ~ N(0, 1), k = 1 − σ².

    P(w > t) = P(|z| > √(2 log t/k)) has −d log P/d log t = h(z)/(kz), h the hazard of |z|: the local shape kz/h rises
    from the cutoff to k at infinity, and the estimate, with its prior taken out, lies between the two.
    """
    n, k, m = 4000, 1 - variance, 190
    z = np.random.default_rng(seed).standard_normal((100, n))
    khat = np.asarray(jax.jit(jax.vmap(psis))(jnp.asarray(k * z**2 / 2)).khat)
    shape = ((m + 10) * khat - 5) / m
    cutoff = scipy.stats.norm.isf(m / n / 2)
    local = k * cutoff / (2 * scipy.stats.norm.pdf(cutoff) / (m / n))
    noise = shape.std(ddof=1) / np.sqrt(len(shape))
    assert local - 5 * noise < shape.mean() < k + 5 * noise


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wide_gaussian_mends_into_the_target(seed, dtype):
    """N(0, 2²) for N(0, 1): bounded weights, of n/E w² = n√(2 − ¼)/2 effective draws."""
    n = 4000
    x = 2 * np.random.default_rng(seed).standard_normal(n)
    weights, khat = psis(jnp.asarray(-0.375 * x**2, dtype))
    assert khat < 0 and diagnostics.reading(khat) == "good"
    w = np.exp(np.asarray(weights, float))
    noise = np.sqrt(np.sum(w**2 * (x**2 - 1) ** 2))
    assert abs(w @ x**2 - 1) < 5 * noise < 0.2
    # Var(w²)/E(w²)² + 4Var(w)/E(w)² − 4Cov/(E w² E w) of the ratio by the delta method, over n.
    raw = 2 * np.exp(-0.375 * x**2)
    noise = np.std(raw**2 / np.mean(raw**2) - 2 * raw / np.mean(raw)) / np.sqrt(n)
    expected = np.sqrt(1.75) / 2
    got = float(diagnostics.effective_sample_size(jnp.asarray(-0.375 * x**2, dtype))) / n
    assert abs(got / expected - 1) < 5 * noise < 0.1


def test_a_constant_an_order_and_a_batch_change_nothing(dtype):
    given = np.round(log_weights("narrow", 1000) * 2**10) / 2**10  # sums with 512 are exact in float32
    places = np.random.default_rng(0).permutation(1000)
    one = psis(jnp.asarray(given, dtype))
    batch = jnp.asarray(np.stack([given + 512, given - 256, given[places]]), dtype)
    many = jax.jit(jax.vmap(psis))(batch)
    np.testing.assert_allclose(many.khat, np.full(3, one.khat), rtol=1000 * cases.eps(dtype))
    expected = np.asarray(one.log_weights)
    for row, order in zip(np.asarray(many.log_weights), (slice(None), slice(None), places)):
        np.testing.assert_allclose(np.sort(row), np.sort(expected[order]), rtol=1000 * cases.eps(dtype))


def _spoilt(value, rest=0.0):
    x = np.full(100, rest)
    x[3] = value
    return x


def _top(count, value):
    """`count` of a hundred weights are `value` times the others."""
    return np.where(np.arange(100) < count, np.log(value), 0.0)


DEGENERATE = {
    "equal": (np.zeros(100), 0),
    "equal, far from 0": (np.full(100, -1e4), 0),
    "two values": (np.repeat([0.0, 3.0], 50), 0),
    "a draw outside the support": (_spoilt(-np.inf), 0),
    "half outside": (np.repeat([0.0, -np.inf], 50), 0),
    "rounding": (1e-9 * np.random.default_rng(0).standard_normal(100), 0),
    "four rare atoms, of little more": (_top(4, 1.9), 0),
    "four rare atoms, of much more": (_top(4, 2.1), np.inf),
    "one draw has it all": (_spoilt(0.0, -np.inf), np.inf),
    "one draw has it all, by underflow": (_spoilt(0.0, -1e4), np.inf),
    "NaN": (_spoilt(np.nan), np.inf),
    "+inf": (_spoilt(np.inf), np.inf),
    "all 0": (np.full(100, -np.inf), np.inf),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_perfect_fit_is_good_and_a_broken_one_unusable(name, dtype):
    given, expected = DEGENERATE[name]
    if dtype == "float64" and name == "rounding":
        given = given * 1e-6
    got = psis(jnp.asarray(given, dtype))
    assert float(got.khat) == expected and got.khat.dtype == dtype
    broken = name in ("NaN", "+inf", "all 0")
    size = float(diagnostics.effective_sample_size(jnp.asarray(given, dtype)))
    if broken:
        assert np.isnan(got.log_weights).all() and size == 0
    else:
        w = np.exp(given - given.max())
        np.testing.assert_allclose(np.exp(got.log_weights), w / w.sum(), rtol=100 * cases.eps(dtype), atol=1e-9)
        np.testing.assert_allclose(size, w.sum() ** 2 / (w @ w), rtol=100 * cases.eps(dtype))


@pytest.mark.parametrize("name", [name for name in DEGENERATE if name not in ("NaN", "+inf", "all 0")])
def test_no_intermediate_number_is_nan(name):
    """So that jax_debug_nans does not stop at a perfect fit."""
    with jax.debug_nans(True):
        diagnostics.psis(jnp.asarray(DEGENERATE[name][0], jnp.float32))


def test_a_tail_of_one_value(float64):
    """A hundred equal excesses: a point of the grid is b = 1 + (1 − √(40/2.5))/3 = 0, where k/b is 0/0."""
    khat = lambda x: diagnostics._pareto(x * jnp.pad(jnp.ones(100), (0, 90)), jnp.asarray(100))[0]
    (at, slope), (near, _) = map(jax.jit(jax.value_and_grad(khat)), (1.0, 1 + 1e-9))
    np.testing.assert_allclose(at, near, rtol=1e-6)
    assert at < 0 and np.isfinite(slope)


def test_draws_outside_the_support_stay_there_when_they_fill_the_tail(dtype):
    """Ten weights of 100 are not 0, and the tail is of twenty."""
    raw = np.full(100, -np.inf)
    raw[::10] = log_weights(0.7, 10)
    got = psis(jnp.asarray(raw, dtype))
    assert np.isfinite(got.khat)
    np.testing.assert_array_equal(np.isfinite(got.log_weights), np.isfinite(raw))


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.7])
def test_order_statistics_are_quantiles_of_the_fit(shape, float64):
    got = diagnostics._order_statistics(jnp.asarray(shape), jnp.asarray(2.0), jnp.asarray(10), 12)
    expected = scipy.stats.genpareto.ppf((np.arange(10)[::-1] + 0.5) / 10, shape, scale=2)
    np.testing.assert_allclose(got, [*expected, 0, 0], rtol=1e-12)
    with jax.debug_nans(True):
        diagnostics._order_statistics(jnp.asarray(shape), jnp.asarray(2.0), jnp.asarray(10), 12)


@pytest.mark.parametrize("narrow", ["float32", "float16", "bfloat16"])
def test_narrower_numbers_stay_narrow_in_double_precision(narrow, float64):
    given = jnp.asarray(log_weights("narrow", 1000), narrow)
    got, size = psis(given), diagnostics.effective_sample_size(given)
    exact = psis(given.astype(float))
    assert {x.dtype.name for x in (*got, size)} == {narrow}
    np.testing.assert_allclose(float(got.khat), float(exact.khat), rtol=4 * cases.eps(narrow), atol=1e-5)
    np.testing.assert_allclose(float(size), float(diagnostics.effective_sample_size(given.astype(float))), rtol=0.01)


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_a_perfect_fit_in_single_precision_is_good(scale):
    """log p̃ and log q of size `scale`, rounded: their difference is noise of a few quanta, with many ties."""
    rng = np.random.default_rng(0)
    exact = scale * (1 + rng.random((200, 1000)))
    noise = exact.astype(np.float32) - (exact + rng.random()).astype(np.float32)
    khat = jax.jit(jax.vmap(psis))(jnp.asarray(noise)).khat
    assert float(jnp.max(khat)) < 0.5


def test_the_derivative_of_khat_is_that_of_differences(float64):
    given, way = jnp.asarray(log_weights(0.7, 100)), np.random.default_rng(0).standard_normal(100)
    gradient = jax.jit(jax.grad(lambda x: psis(x).khat))
    khat = lambda step: float(psis(given + step * way).khat)
    np.testing.assert_allclose(gradient(given) @ way, (khat(1e-5) - khat(-1e-5)) / 2e-5, rtol=1e-6)
    assert not np.asarray(gradient(jnp.zeros(100))).any()


def test_effective_sample_size_of_known_weights(dtype):
    size = lambda w: float(diagnostics.effective_sample_size(jnp.asarray(np.array(w), dtype)))
    np.testing.assert_allclose(size(np.log([1, 2, 3, 4])), 100 / 30, rtol=20 * cases.eps(dtype))
    np.testing.assert_allclose(size([900.0, 900.0, -np.inf]), 2, rtol=4 * cases.eps(dtype))
    assert size([-5e4]) == 1


# threshold, reading.


@pytest.mark.parametrize(("n", "expected"), [(10, 0), (100, 0.5), (1000, 2 / 3), (2155, 0.7), (10**6, 0.7)])
def test_threshold(n, expected):
    assert diagnostics.threshold(n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("khat", "word"),
    [
        (-np.inf, "good"), (0.49, "good"), (0.5, "usable"), (0.69, "usable"), (0.7, "unreliable"),
        (0.99, "unreliable"), (1.0, "unusable"), (np.inf, "unusable"), (np.nan, "unusable"),
    ],
)  # fmt: skip
def test_reading(khat, word):
    assert diagnostics.reading(khat) == diagnostics.reading(np.float64(khat)) == word


# summary.


class Layer(NamedTuple):
    w: np.ndarray
    b: np.ndarray


def test_summary_is_numpy(dtype):
    rng = np.random.default_rng(0)
    draws = {"layer": Layer(rng.normal(size=(200, 2, 1)), rng.normal(size=200)), "count": rng.integers(0, 9, (200, 2))}
    draws["layer"] = cases.cast(draws["layer"], dtype)
    table = diagnostics.summary(draws)
    assert table.names == ["count[0]", "count[1]", "layer.w[0,0]", "layer.w[1,0]", "layer.b"]
    columns = np.concatenate([np.asarray(x, float).reshape(200, -1) for x in jax.tree.leaves(draws)], axis=1)
    np.testing.assert_allclose(table.mean, columns.mean(0), rtol=1e-12)
    np.testing.assert_allclose(table.sd, columns.std(0, ddof=1), rtol=1e-12)
    for name, level in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        np.testing.assert_allclose(getattr(table, name), np.quantile(columns, level, axis=0, method="hazen"))
    assert json.loads(json.dumps(table.to_dict()))["layer.b"] == {
        key: getattr(table, key)[4] for key in ("mean", "sd", "q05", "q50", "q95")
    }


def test_weighted_summary_by_hand():
    """Sorted 1, 2, 3 with ¼, ¼, ½: levels ⅛, ⅜, ¾; a draw without weight is as if it were not there."""
    draws, weights = np.array([3.0, np.inf, 1.0, 2.0]), np.array([np.log(2), -np.inf, 0, 0])
    table = diagnostics.summary(draws, log_weights=weights + 700)
    assert table.names == ["x"]
    np.testing.assert_allclose([table.mean[0], table.sd[0]], [2.25, np.sqrt(0.6875 / 0.625)])
    np.testing.assert_allclose([table.q05[0], table.q50[0], table.q95[0]], [1, 2 + (0.5 - 0.375) / 0.375, 3])


def test_equal_weights_are_no_weights():
    draws = np.random.default_rng(0).normal(size=(50, 2))
    one, other = diagnostics.summary(draws), diagnostics.summary(draws, log_weights=np.full(50, -3.0))
    assert one.names == ["x[0]", "x[1]"]
    assert one.to_dict() == other.to_dict()


def test_numbers_that_are_none_do_not_hide():
    table = diagnostics.summary({"a": np.array([1.0, np.nan, 2.0]), "b": np.array([1.0, np.inf, 2.0])})
    assert all(np.isnan(x) for x in table.to_dict()["a"].values())
    assert table.mean[1] == np.inf and table.q50[1] == 2 and table.q05[1] == 1
    assert np.isnan(diagnostics.summary(np.ones((1, 1))).sd[0])


def test_the_table_is_aligned():
    draws = {"a": np.array([-1.0, 1.0]), "long name": np.array([[1e10], [1e10]])}
    lines = str(diagnostics.summary(draws)).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 3
    assert lines[0].split() == ["mean", "sd", "5%", "50%", "95%"]
    assert lines[1].split() == ["a", "0", "1.414", "-1", "0", "1"]
    assert lines[2].split() == ["long", "name[0]", "1e+10", "0", "1e+10", "1e+10", "1e+10"]
    renamed = diagnostics.summary(draws, names=["μ", "σ"])
    assert renamed.names == ["μ", "σ"] and str(renamed).splitlines()[2].startswith("σ  1e+10")


# to_arviz.


def _before_1(posterior=None, *, observed_data=None, coords=None):
    return {"posterior": posterior, "observed_data": observed_data, "coords": coords}


def _since_1(data, *, coords=None):
    return {**data, "coords": coords}


@pytest.mark.parametrize("from_dict", [_before_1, _since_1])
def test_to_arviz_speaks_both_dialects(from_dict, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(from_dict=from_dict))
    draws = {"mu": jnp.arange(4.0), "layer": Layer(np.ones((4, 2, 3)), np.arange(4))}
    got = diagnostics.to_arviz(draws, {"observed_data": {"y": np.ones(5)}}, coords={"row": [0, 1]})
    assert {name: x.shape for name, x in got["posterior"].items()} == {
        "mu": (1, 4), "layer.w": (1, 4, 2, 3), "layer.b": (1, 4),
    }  # fmt: skip
    np.testing.assert_array_equal(got["posterior"]["mu"][0], np.arange(4))
    assert got["observed_data"]["y"].shape == (5,) and got["coords"] == {"row": [0, 1]}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_real_arviz_takes_the_draws():
    pytest.importorskip("arviz", exc_type=ImportError)
    draws = np.random.default_rng(0).normal(size=(50, 2))
    data = diagnostics.to_arviz({"beta": draws}, {"observed_data": {"y": np.ones(5)}}, dims={"beta": ["coefficient"]})
    beta = data["posterior"]["beta"]
    assert beta.dims == ("chain", "draw", "coefficient")
    np.testing.assert_array_equal(beta.values[0], draws)
    assert data["observed_data"]["y"].shape == (5,)


def test_without_arviz_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install arviz"):
        diagnostics.to_arviz(np.ones((3, 1)))


# save, load.


def test_a_fit_comes_back_as_it_was(tmp_path, float64):
    """`like` and, with numbers filled in, the result come from one abstract fit, so that none is compiled."""
    family = ng.families.gaussian_mean_field(2)
    fit = lambda key: ng.fit(lambda x: -0.5 * x @ x, family, key, max_steps=2, keep_path=True)
    like = jax.eval_shape(fit, jax.random.key(0))
    rng = np.random.default_rng(0)
    result = jax.tree.map(lambda s: jnp.asarray(9 * rng.normal(size=s.shape), s.dtype), like)
    path = diagnostics.save(result, tmp_path / "run.1")
    assert path == tmp_path / "run.1.npz" and path.exists()
    loaded = diagnostics.load(tmp_path / "run.1", like)
    assert jax.tree.structure(loaded) == jax.tree.structure(result)
    for got, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(result)):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype and isinstance(got, jax.Array)
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} >= {"float64", "int32"}
    assert loaded.sample(jax.random.key(1), 3).shape == (3, 2)


TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": (np.array([True, False]), np.int32(4)), "c": 0.1}


def test_the_file_reads_without_pickle_and_without_us(tmp_path):
    diagnostics.save(TREE, str(tmp_path / "tree.npz"))
    with np.load(tmp_path / "tree.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["['a']", "['b'][0]", "['b'][1]", "['c']"]
        np.testing.assert_array_equal(file["['a']"], TREE["a"])
    loaded = diagnostics.load(str(tmp_path / "tree"), TREE)
    assert loaded["b"][1] == 4 and loaded["c"] == jnp.asarray(0.1) and loaded["b"][0].dtype == bool


def test_a_bare_array_and_an_empty_tree_are_trees(tmp_path):
    diagnostics.save(np.arange(3, dtype=np.float32), tmp_path / "x")
    assert diagnostics.load(tmp_path / "x", jnp.zeros(3, jnp.float32)).tolist() == [0, 1, 2]
    diagnostics.save((), tmp_path / "nothing")
    assert diagnostics.load(tmp_path / "nothing", ()) == ()


LIKE = {
    "missing": ({"a": TREE["a"], "d": TREE["c"]}, r"lacks \[\"\['d'\]\"\]"),
    "missing alone": ({**TREE, "d": TREE["c"]}, r"lacks .*\['d'\].*has none more"),
    "foreign": ({"a": TREE["a"]}, r"has \[\"\['b'\]\[0\]\", .* more"),
    "a shape": ({**TREE, "a": TREE["a"].T}, r"like\['a'\].*\(2, 3\) and float32.*got \(3, 2\)"),
    "a dtype": ({**TREE, "b": (TREE["b"][0], np.float32(4))}, r"like\['b'\]\[1\].*int32.*got \(\) and float32"),
    "half": ({**TREE, "a": jnp.asarray(TREE["a"], jnp.bfloat16)}, r"float32.*bfloat16"),
}


@pytest.mark.parametrize("name", LIKE)
def test_another_structure_is_refused_by_what_differs(name, tmp_path):
    like, message = LIKE[name]
    diagnostics.save(TREE, tmp_path / "tree")
    with pytest.raises(ValueError, match=message):
        diagnostics.load(tmp_path / "tree", like)


def test_double_precision_is_not_rounded_in_silence(tmp_path):
    if jax.config.jax_enable_x64:
        pytest.skip("double precision is on")
    diagnostics.save(np.ones(3), tmp_path / "x")
    with pytest.raises(ValueError, match=r"float64 was saved.*jax_enable_x64"):
        diagnostics.load(tmp_path / "x", np.ones(3))


def test_what_no_file_can_hold_is_refused(tmp_path):
    for leaf in (jnp.ones(2, jnp.bfloat16), jax.random.key(0), "text", object()):
        with pytest.raises(TypeError, match=r"result\['a'\].*\.npz.*key_data"):
            diagnostics.save({"a": leaf}, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        diagnostics.load(tmp_path / "x", ())


MISTAKES = {
    "whole log weights": (lambda: diagnostics.psis(np.zeros(100, int)), TypeError, r"log_weights.*floating.*int"),
    "few log weights": (lambda: diagnostics.psis(np.zeros(24)), ValueError, r"log_weights.*25 draws.*\(24,\).*Draw"),
    "a batch of log weights": (
        lambda: diagnostics.psis(np.zeros((100, 2))), ValueError, r"log_weights.*\(100, 2\).*vmap",
    ),
    "no log weights": (lambda: diagnostics.effective_sample_size(np.zeros(0)), ValueError, r"log_weights.*\(0,\)"),
    "one draw": (lambda: diagnostics.threshold(1), ValueError, r"n: .*at least 2, got 1"),
    "readings": (lambda: diagnostics.reading(np.zeros(2)), ValueError, r"khat.*one number.*each element"),
    "a traced reading": (lambda: jax.jit(diagnostics.reading)(0.5), ValueError, r"khat.*outside jit"),
    "no leading axis": (lambda: diagnostics.summary({"a": 1.0}), ValueError, r"draws.*leading axis"),
    "different n": (lambda: diagnostics.to_arviz([np.ones(2), np.ones(3)]), ValueError, r"draws.*common length"),
    "complex draws": (lambda: diagnostics.summary({"a": np.ones(2, complex)}), TypeError, r"draws.*real.*in a"),
    "empty draws": (lambda: diagnostics.summary(np.ones((3, 0))), ValueError, r"draws.*at least one number"),
    "one name twice": (
        lambda: diagnostics.summary({"a": {"b": np.ones(2)}, "a.b": np.ones(2)}), ValueError, r"draws.*one name",
    ),
    "too few names": (lambda: diagnostics.summary(np.ones((3, 2)), ["a"]), ValueError, r"names.*2 .*x\[0\], x\[1\]"),
    "equal names": (lambda: diagnostics.summary(np.ones((3, 2)), ["a", "a"]), ValueError, r"names.*different"),
    "weights of other draws": (
        lambda: diagnostics.summary(np.ones((3, 2)), log_weights=np.zeros(2)), ValueError, r"log_weights.*3.*\(2,\)",
    ),
    "broken weights": (
        lambda: diagnostics.summary(np.ones((2, 2)), log_weights=[0, np.nan]), ValueError, r"log_weights.*nan.*leave",
    ),
}  # fmt: skip

test_a_mistake_is_named_with_its_cure = cases.named_mistakes(MISTAKES)
