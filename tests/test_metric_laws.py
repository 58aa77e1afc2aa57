"""Every metric against numpy, in every form, and the laws: units, trees, jit, vmap, derivatives, dtypes, mistakes."""

import functools
import inspect

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import error, flat
from jax.flatten_util import ravel_pytree
from metric_cases import METRICS, metric_case

import natgrad_jax as ng
from natgrad_jax import operators

every_metric = pytest.mark.parametrize("name", METRICS)


def having(form):
    return pytest.mark.parametrize("name", [name for name, case in METRICS.items() if form in case.forms])


def bound(dtype):
    """1e-11 in float64; float32 rounds the data of a centred metric, with common parts of up to 1000, to 1000·eps."""
    return 1e-11 if dtype == np.float64 else 3000 * cases.eps(dtype)


@functools.cache
def compiled(name, dtype, **options):
    """(params, data, v) -> (operator, its matrix, its product with v): one program, shared by the laws.

    That jit changes nothing is a law of its own.
    """
    metric, _, _ = metric_case(name, dtype, **options)

    def everything(params, data, v):
        op = metric(params, **data)
        return op, None if options.get("matrix_free") else op.dense(), op.mv(v)

    return jax.jit(everything)


def matrix_of(name, dtype, params, data):
    return compiled(name, dtype)(params, data, params)[1]


def each(f, *trees):
    """A function of numpy, entry by entry."""
    return jax.tree.map(lambda *x: jnp.asarray(f(*map(np.asarray, x)), x[0].dtype), *trees)


@every_metric
def test_the_matrix_is_the_one_of_numpy(name, dtype):
    _, params, data = metric_case(name, dtype)
    v = each(np.cos, params)
    op, matrix, product = compiled(name, dtype)(params, data, v)
    assert error(matrix, METRICS[name].matrix) < bound(dtype)
    assert matrix.dtype == dtype
    assert operators.Space.of(params).treedef == op.space.treedef
    values = np.linalg.eigvalsh(np.asarray(matrix, float))
    assert values.min() > -bound(dtype) * values.max()
    assert error(product, METRICS[name].matrix @ flat(v)) < 10 * bound(dtype)


@having("jac")
@pytest.mark.parametrize("jac", ["fwd", "rev"])
def test_the_mode_of_differentiation_changes_nothing(name, jac, float64):
    _, params, data = metric_case(name, float64)
    assert error(compiled(name, float64, jac=jac)(params, data, params)[1], METRICS[name].matrix) < bound(float64)


@having("chunk")
def test_chunks_make_a_matrix(name, dtype):
    """3 divides no number of examples."""
    _, params, data = metric_case(name, dtype)
    op, matrix, _ = compiled(name, dtype, chunk_size=3)(params, data, params)
    assert not isinstance(op, operators.Gram)
    assert error(matrix, METRICS[name].matrix) < bound(dtype)


@having("free")
def test_products_alone(name, dtype):
    _, params, data = metric_case(name, dtype)
    v = each(np.cos, params)
    op, _, product = compiled(name, dtype, matrix_free=True)(params, data, v)
    assert not hasattr(op, "rows") and not hasattr(op, "matrix")
    assert error(product, METRICS[name].matrix @ flat(v)) < 10 * bound(dtype)
    if "chunk" in METRICS[name].forms and "any loss" not in name:
        _, _, product = compiled(name, dtype, matrix_free=True, chunk_size=3)(params, data, v)
        assert error(product, METRICS[name].matrix @ flat(v)) < 10 * bound(dtype)


@every_metric
def test_jit_and_new_data_without_a_new_trace(name, float64):
    metric, params, data = metric_case(name, float64)
    traces = []

    @jax.jit
    def matrix(params, data):
        traces.append(1)
        return metric(params, **data).dense()

    assert error(matrix(params, data), METRICS[name].matrix) < 1e-11
    other = jax.tree.map(lambda x: x if not jnp.issubdtype(x.dtype, jnp.floating) else x * 1.25, (params, data))
    assert error(matrix(*other), metric(other[0], **other[1]).dense()) < 1e-11
    assert len(traces) == 1


@every_metric
def test_vmap_is_a_loop(name, float64):
    metric, params, data = metric_case(name, float64)
    lanes = [each(lambda x: factor * x, params) for factor in (1, 1.25)]  # noqa: B023
    stacked = each(lambda *x: np.stack(x), *lanes)
    got = jax.jit(jax.vmap(lambda params, data: metric(params, **data).dense(), (0, None)))(stacked, data)
    for lane, alone in zip(np.asarray(got), lanes, strict=True):
        assert error(lane, matrix_of(name, float64, alone, data)) < 1e-11


@pytest.mark.parametrize("name", [name for name in METRICS if name != "quasi-diagonal"])
def test_a_flat_vector_is_the_same_problem(name, float64):
    params, unravel = ravel_pytree(metric_case(name, float64)[1])
    metric, _, data = metric_case(name, float64, unravel)
    if name == "relative":
        return  # its parameters are a matrix
    matrix = jax.jit(lambda params, data: metric(params, **data).dense())
    assert error(matrix(params, data), METRICS[name].matrix) < 1e-11


@pytest.mark.parametrize("name", [name for name, case in METRICS.items() if case.units])
def test_units_change_the_matrix_as_they_must(name, dtype):
    """θ = Dθ′ gives G′ = DGD, and the step of an optimizer with default settings in the new units is D⁻¹ the old."""
    _, params, data = metric_case(name, dtype)
    space = operators.Space.of(params)
    damping = None if name == "quasi-diagonal" else 0.1  # a closed form has none

    @jax.jit
    def matrix_and_step(units, theta, grads, data):
        """One program for all units."""
        metric, _, _ = metric_case(name, dtype, lambda p: jax.tree.map(jnp.multiply, p, units))
        tx = ng.natural_gradient(0.5, metric, max_kl=0.1, damping=damping)
        return metric(theta, **data).dense(), tx.update(grads, tx.init(theta), theta, **data)[0]

    ones = np.ones(len(flat(params)))
    factors = np.resize(2.0 ** np.array([13, -13, 3, 0, -7]), len(ones))  # 1e-4 … 1e4, exact
    steps = []
    for units in (ones, factors):
        d = space.unravel(jnp.asarray(units, dtype))
        primed, grads = each(np.divide, params, d), each(lambda x, s: np.cos(x) * s, params, d)
        matrix, step = matrix_and_step(d, primed, grads, data)
        assert error(matrix / np.outer(units, units), METRICS[name].matrix) < bound(dtype)
        assert jax.tree.map(jnp.shape, step) == jax.tree.map(jnp.shape, params)
        assert {x.dtype for x in jax.tree.leaves(step)} == {dtype}
        steps.append(flat(step))
    assert np.linalg.norm(steps[0]) > 0
    assert error(steps[1] * factors, steps[0]) < 100 * bound(dtype)


@every_metric
def test_the_matrix_has_a_derivative(name, float64):
    metric, params, data = metric_case(name, float64)
    direction = each(np.sin, params)
    slope = jax.jit(lambda x, v, data: jax.jvp(lambda x: metric(x, **data).dense(), (x,), (v,))[1])
    got = slope(params, direction, data)
    matrix = lambda t: np.asarray(matrix_of(name, float64, each(lambda x, v: x + t * v, params, direction), data))
    h = 1e-4
    differences = (8 * (matrix(h) - matrix(-h)) - (matrix(2 * h) - matrix(-2 * h))) / (12 * h)
    assert np.linalg.norm(got - differences) < 1e-8 * np.linalg.norm(METRICS[name].matrix)


# Not with a support that is float64 where that mode is on, or a bracket: their arithmetic is not the parameters'.
@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("fisher, unnormalised", "wasserstein, cdf")])
def test_half_precision_parameters_are_raised(name):
    """What the metric sees are the rounded parameters, in float32."""
    dtype = np.dtype(np.float32)
    metric, params, data = metric_case(name, dtype)
    half = jnp.bfloat16
    low = jax.tree.map(lambda x: x.astype(half), params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    op, matrix, _ = compiled(name, dtype)(low, data, low)
    assert matrix.dtype == jnp.float32
    assert error(matrix, matrix_of(name, dtype, rounded, data)) < 50 * cases.eps(np.float32)
    tx = ng.natural_gradient(0.1, metric, damping=None if isinstance(op, operators.Closed) else 0.1)
    step, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, low), jax.jit(tx.init)(low), low, **data)
    assert {x.dtype for x in jax.tree.leaves(step)} == {jnp.dtype(half)}


@every_metric
def test_the_data_that_are_missing_are_named(name, dtype):
    metric, params, data = metric_case(name, dtype)
    tx = ng.natural_gradient(0.1, metric)
    for key in data:
        if inspect.signature(metric).parameters[key].default is not inspect.Parameter.empty:
            continue
        rest = {other: value for other, value in data.items() if other != key}
        with pytest.raises(TypeError, match=f"{key}: the metric .* needs it"):
            tx.update(params, tx.init(params), params, **rest)


@every_metric
def test_a_parameter_that_is_not_a_number_takes_no_step(name, float64):
    if name == "scales of positive parameters":
        return  # refused by name
    metric, params, data = metric_case(name, float64)
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
    tx = ng.natural_gradient(0.1, metric)
    step, _ = jax.jit(tx.update)(each(np.ones_like, bad), jax.jit(tx.init)(bad), bad, **data)
    seen = np.isnan(matrix_of(name, float64, bad, data)).any()  # no Jacobian of a linear model sees its parameters
    assert np.all(flat(step) == 0) if seen else np.all(np.isfinite(flat(step)) & (np.abs(flat(step)) < 1e6))


def test_trees_without_leaves_and_with_none(dtype):
    """None is no leaf; a tree without any has no rows to make."""
    params = {"w": jnp.ones(2, dtype), "frozen": None}
    metric = ng.metrics.least_squares(lambda p, batch: batch @ p["w"])
    op = metric(params, batch=jnp.ones((3, 2), dtype))
    assert op.mv(params)["frozen"] is None and op.dense().shape == (2, 2)
    for params in ({}, {"w": jnp.ones((0, 2), dtype)}):
        empty = ng.metrics.least_squares(lambda p, batch: batch)(params, batch=jnp.ones((3, 2), dtype))
        assert empty.dense().shape == (0, 0) and jax.tree.map(jnp.shape, empty.mv(params)) == jax.tree.map(
            jnp.shape, params
        )


def test_a_changed_batch_is_the_batch_that_counts(float64):
    """Through the optimizer, compiled once: nothing of the first batch is left in the second step."""
    metric = ng.metrics.empirical_fisher(lambda p, x: -0.5 * jnp.sum((x - p) ** 2))
    tx = optax.chain(ng.scale_by_metric(metric), optax.scale(-1.0))
    params = jnp.array([0.0])
    update = jax.jit(tx.update)
    state = tx.init(params)
    for batch in (jnp.array([1.0, 3.0]), jnp.array([2.0, 6.0])):
        fisher = np.mean(np.asarray(batch) ** 2)
        metric_of_vector = update(jnp.array([1.0]), state, params, batch=batch[:, None])[0]
        np.testing.assert_allclose(metric_of_vector, [-1 / fisher], rtol=1e-12)
