"""Layer rows against the Jacobian: the same numbers, whatever the model and however its parameters are used."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, eps, error, named_mistakes
from jax.flatten_util import ravel_pytree
from layer_cases import CASES, LAYERS, X, mlp

import natgrad_jax as ng
from natgrad_jax import _tree, damping, layers, metrics, solvers
from natgrad_jax.operators import Gram, Outer, Picked, Pieces, add, kernels, scale

WIDE = [np.random.default_rng(3).normal(size=shape) / 4 for shape in ((20, 30), (30,), (30, 2), (2,))]
TOL = {np.dtype("float32"): 2e-5, np.dtype("float64"): 1e-11}


def typed(tree, dtype):
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype if np.issubdtype(np.asarray(x).dtype, np.floating) else None), tree
    )


def one_of(model):
    return lambda params, x: jax.tree.map(lambda y: y[0], model(params, jax.tree.map(lambda x: x[None], x)))


def jacobian(model, params, batch):
    """(n, k, p) in float64: of every example by itself."""
    outputs = lambda params, x: jnp.concatenate([jnp.ravel(y) for y in jax.tree.leaves(one_of(model)(params, x))])
    rows = jax.jit(jax.vmap(lambda x: jax.jacrev(lambda params: outputs(params, x))(params)))(batch)
    leaves = [np.asarray(x, float) for x in jax.tree.leaves(rows)]
    return np.concatenate([x.reshape(*x.shape[:2], -1) for x in leaves], axis=2)


def is_outer(x):
    return isinstance(x, Outer | Picked | Pieces)


@pytest.mark.parametrize("name", CASES)
def test_layer_rows_are_the_jacobian(name, dtype):
    """Rows, products, kernel (in one unit and in many), diagonal, matrix: all from the same factors."""
    check_rows_of(CASES[name], False, dtype)


@pytest.mark.parametrize("name", CASES)
def test_centred_layer_rows_are_the_centred_jacobian(name, float64):
    check_rows_of(CASES[name], True, float64)


@pytest.mark.parametrize(
    "name",
    ["dense layers", "tied to its transpose", "scan over layers", "recurrent", "attention", "convolution", "flat"],
)
def test_centred_layer_rows_in_float32(name):
    check_rows_of(CASES[name], True, np.dtype("float32"))


A_FEW = ["recurrent", "convolution", "tied to its transpose", "a small table", "dense layers", "a bias and more"]


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("name", A_FEW)
def test_rows_and_tables_are_made_a_few_at_a_time(name, examples, monkeypatch, float64):
    """Of four examples one, or three and the last."""
    monkeypatch.setattr("natgrad_jax.operators.outer.BLOCK", 60)
    map_parts = _tree.map_parts
    monkeypatch.setattr(_tree, "map_parts", lambda part, n, size: map_parts(part, n, examples))
    check_rows_of(CASES[name], name != "a small table", float64)


def check_rows_of(case, centred, dtype):
    params, batch = typed(case.params, dtype), typed(case.batch, dtype)
    n, rng = 4, np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(n))
    expected = jacobian(case.model, params, batch)
    if centred:
        expected = expected - np.tensordot(weights, expected, 1)
    expected = (np.sqrt(weights)[:, None, None] * expected).reshape(-1, expected.shape[2])

    @jax.jit
    def everything(params, batch, v, u, units, tables):
        plan = layers.Plan.of(one_of(case.model), params, jax.tree.map(lambda x: x[0], batch))
        rows = layers.rows(plan, params, batch, jnp.asarray(np.sqrt(weights), dtype), centred=centred, always=True)
        gram = Gram(rows)
        flat, v = gram.space.ravel, gram.space.unravel(v)
        return rows, {
            "rows": gram.matrix(), "times": gram.times(v), "transposed": flat(gram.transposed_times(u)),
            "kernel": gram.kernel(jnp.asarray(2.0, dtype)), "kernel in units": gram.kernel(units),
            "kernel in layered units": gram.kernel(flat(tables), rank_one=True),
            "diagonal": flat(gram.diagonal()), "lengths": gram.scale(), "matrix": gram.dense(),
            "scaled": scale(9.0, gram).times(v), "a sum": add(gram, gram).dense(),
        }, gram.bound()  # fmt: skip

    sizes = rng.normal(size=expected.shape[1]), rng.normal(size=len(expected)), rng.uniform(0.5, 2, expected.shape[1])
    v, u, units = (jnp.asarray(x, dtype) for x in sizes)
    tables = jax.tree.map(lambda x: layered_units(x.shape, rng, dtype), params)
    rows, got, bound = everything(params, batch, v, u, units, tables)
    v, u, units = (np.asarray(x, float) for x in (v, u, units))
    layered = np.concatenate([np.ravel(np.asarray(x, float)) for x in jax.tree.leaves(tables)])
    formulas = {
        "rows": expected, "times": expected @ v, "transposed": u @ expected, "kernel": 4 * expected @ expected.T,
        "kernel in units": (expected * units**2) @ expected.T,
        "kernel in layered units": (expected * layered**2) @ expected.T, "diagonal": np.sum(expected**2, 0),
        "lengths": np.sqrt(np.sum(expected**2, 0)), "matrix": expected.T @ expected, "scaled": 3 * expected @ v,
        "a sum": 2 * expected.T @ expected,
    }  # fmt: skip
    for what, value in formulas.items():
        assert error(got[what], value) < case.slack * TOL[np.dtype(dtype)], what
    length = np.linalg.norm(expected, 2)
    assert length <= bound * (1 + 4 * eps(dtype)) and (centred or bound < 1e3 * length)
    found = case.found if case.found_centred is None or not centred else case.found_centred
    assert [is_outer(x) for x in jax.tree.leaves(rows, is_leaf=is_outer)] == found
    assert {x.dtype for x in jax.tree.leaves(rows)} - {np.dtype("int32")} == {np.dtype(dtype)}


def layered_units(shape, rng, dtype):
    """Of rank one, between the last axis and the others; some are 0, and all of any."""
    table = rng.uniform(0.5, 2, shape[:-1] or shape) * rng.integers(0, 3, shape[:-1] or shape)
    return jnp.asarray(table[..., None] * rng.uniform(0.5, 2, shape[-1:]) if len(shape) > 1 else table, dtype)


def test_layered_damping_makes_no_rows(monkeypatch, dtype):
    """Of a weight on either side of a product, and of its transpose; but of a bias."""
    made = Outer.explicit
    of_bias = lambda rows: made(rows) if rows.left.shape[3:] == (1, 1) else None
    monkeypatch.setattr(Outer, "explicit", of_bias)
    monkeypatch.setattr(kernels, "_of_rows", None)
    for name in ("dense layers", "transposed", "on the left"):
        case = CASES[name]
        params, batch = typed(case.params, dtype), typed(case.batch, dtype)

        @jax.jit
        def solution(params, batch, case=case):
            gram = Gram(layers.capture(case.model)(params, batch).rows)
            assert any(map(is_outer, jax.tree.leaves(gram.rows, is_leaf=is_outer)))
            g = gram.transposed_times(jnp.ones(gram.n, dtype))
            return solvers.solve(gram, g, solver=solvers.row_space(), damping=damping.layered(0.1))

        assert bool(solution(params, batch).converged)


def energies(params, batch):
    return jnp.sum(jnp.tanh(mlp(params, batch)), axis=1)


METRICS = {
    "gauss_newton": (metrics.gauss_newton, (mlp, metrics.losses.squares()), {}),
    "softmax": (metrics.gauss_newton, (mlp, metrics.losses.softmax_cross_entropy()), {}),
    "any loss": (metrics.gauss_newton, (mlp, lambda z, batch: jnp.mean(jnp.sum(z**4, 1))), {}),
    "least_squares": (metrics.least_squares, (lambda params, batch: mlp(params, batch[0]),), {}),
    "empirical_fisher": (
        metrics.empirical_fisher,
        (lambda params, x: -jnp.sum((mlp(params, x[None])[0]) ** 2),),
        {},
    ),
    "quantum_geometric": (metrics.quantum_geometric, (lambda params, x: energies(params, x[None])[0],), {}),
    "complex quantum": (
        metrics.quantum_geometric,
        (lambda params, x: jax.lax.complex(*mlp(params, x[None])[0]),),
        {},
    ),
    "energy": (metrics.energy, (lambda params, x: mlp(params, x[None])[0],), {}),
}


def data_of(name, dtype):
    x = jnp.asarray(X, dtype)
    if name == "softmax":
        return {"batch": (x, jnp.array([0, 1, 1, 0]))}
    if name in ("gauss_newton", "any loss", "least_squares"):
        return {"batch": (x, jnp.zeros((4, 2), dtype))}
    return {"samples": x} if "quantum" in name else {"points" if name == "energy" else "batch": x}


def metric_of(name, rows):
    make, args, options = METRICS[name]
    if name in ("gauss_newton", "softmax", "any loss"):
        model = lambda params, batch: mlp(params, batch[0])
        args = (model, *args[1:])
    return make(*args, rows=rows, **options)


@jax.jit
def matrix_and_steps(operator, residual):
    """Compiled once for all metrics with as many outputs."""
    g = operator.transposed_times(residual)
    rules = damping.absolute(0.1), damping.trace(0.1), damping.relative(0.1), damping.layered(0.1)
    step = lambda rule: solvers.solve(operator, g, solver=solvers.row_space(), damping=rule)
    return operator.dense(), [step(rule) for rule in rules]


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_the_same_from_either_rows(name, dtype):
    """The matrix, the residual and a damped step, with layer rows and with plain ones."""
    params, data = cast(LAYERS, dtype), data_of(name, dtype)
    steps, matrices = [], []
    for rows in ("layers", "plain"):
        operator = jax.jit(metric_of(name, rows))(params, **data)
        held = [is_outer(x) for x in jax.tree.leaves(operator.rows, is_leaf=is_outer)]
        assert held == [rows == "layers"] * 6
        matrix, solutions = matrix_and_steps(operator, jnp.asarray(np.linspace(-1, 1, operator.n), dtype))
        assert all(bool(solution.converged) for solution in solutions)
        steps.append([solution.value for solution in solutions])
        matrices.append((matrix, operator.residual))
    assert error(matrices[0], matrices[1]) < TOL[np.dtype(dtype)]
    for layered, plain in zip(*steps, strict=True):
        assert error(layered, plain) < 100 * TOL[np.dtype(dtype)]


def test_a_bias_shares_the_product_of_its_weight(monkeypatch, float64):
    """One product of sensitivities for each layer, through the solver and through the optimizer."""
    found, products = [], kernels._products
    monkeypatch.setattr(kernels, "_products", lambda rows: found.append(rows.left.shape[-1]) or products(rows))
    log_psi = lambda p, x: jnp.sum(mlp(p, x[None]))
    params, x = cast(LAYERS, float64), jnp.asarray(X)
    metric = metrics.quantum_geometric(log_psi, rows="layers")

    @jax.jit
    def solved(params, x):
        return solvers.solve(metric(params, samples=x), params, solver=solvers.row_space(), damping=damping.trace(0.1))

    solved(params, x)
    assert found == [6, 8, 7]
    found.clear()
    rule = ng.natural_gradient(0.1, metric, damping=damping.trace(0.1))
    jax.jit(lambda params, x: rule.update(params, rule.init(params), params, samples=x))(params, x)
    assert found == [6, 8, 7]


def test_kernels_of_leaves_with_nothing_in_common(float64):
    """Means by other arrays, other numbers of examples and outputs, complex columns: each is made once."""
    rng = np.random.default_rng(0)
    metric = metrics.quantum_geometric(lambda p, x: jnp.sum(mlp(p, x[None])), rows="layers")
    one, layers_of_seven = jnp.ones((), float64), [(rng.normal(size=(5, 5)), rng.normal(size=5))] * 7
    gram = metric(cast(layers_of_seven, float64), samples=jnp.asarray(X))
    apart = jax.tree.map(lambda x: jnp.array(x), gram)
    assert error(scale(4.0, apart).kernel(one), 4 * gram.matrix() @ gram.matrix().T) < 1e-12
    assert str(jax.make_jaxpr(lambda gram: gram.kernel(one))(scale(4.0, gram))).count("= cond[") == 14
    layout = layers.Plan.of(lambda w, x: x @ w, jnp.zeros((3, 2)), jnp.zeros(3)).uses[0][0].layout
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    factors = lambda n, k: (draw(n, 1, 1, 1, 3), draw(n, k, 1, 1, 2))
    columns = draw(6, 2) + 1j * draw(6, 2)
    mixed = Gram([Outer(*factors(6, 1), layout, 1), Outer(*factors(3, 2), layout, 2), columns])
    np.testing.assert_allclose(mixed.kernel(one), mixed.matrix() @ mixed.matrix().conj().T, atol=1e-12)


@pytest.mark.parametrize("examples", [6, 4])
def test_a_kernel_of_factors_that_cancel_is_that_of_rows(examples, monkeypatch, float64):
    """Factors vary by much, and their product by 1e-7; kernels are made of all six examples, or of four and of two."""
    map_parts = _tree.map_parts
    monkeypatch.setattr(_tree, "map_parts", lambda part, n, size: map_parts(part, n, examples))
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=shape), float64) for shape in ((6, 5), 5, 7))
    size = jnp.exp(jnp.asarray(rng.normal(size=6), float64))

    def model(w, sample):
        size, x = sample
        return (size * (a + 1e-7 * x)) @ w["w"] @ (b / size) + w["c"] @ x

    metric = metrics.quantum_geometric(model, rows="layers")
    gram = jax.jit(metric)({"w": jnp.zeros((5, 7)), "c": jnp.zeros(5)}, samples=(size, x))
    assert [is_outer(rows) for rows in gram.rows.values()] == [True, True]
    centred = np.asarray((x - x.mean(0)) / 6**0.5)
    of_w = Gram({"w": gram.rows["w"]}).kernel(jnp.ones((), float64))
    expected = 1e-14 * float(b @ b) * centred @ centred.T
    assert error(of_w, expected) < 1e-7
    assert error(gram.kernel(jnp.ones((), float64)), expected + centred @ centred.T) < 1e-12


@pytest.mark.parametrize("name", ["dense layers", "attention", "convolution", "flat"])
def test_units_do_not_raise_the_precision_of_a_kernel(name, float64):
    case, roots = CASES[name], jnp.full(4, 0.5, np.float32)
    params, batch = typed(case.params, np.float32), typed(case.batch, np.float32)
    plan = layers.Plan.of(one_of(case.model), params, jax.tree.map(lambda x: x[0], batch))
    gram = Gram(layers.rows(plan, params, batch, roots, centred=False, always=True))
    for inverse in (jnp.ones(()), jnp.ones(gram.space.size)):
        assert inverse.dtype == float64
        program = str(jax.make_jaxpr(lambda rows, inverse: Gram(rows).kernel(inverse))(gram.rows, inverse))
        assert "f32[4," in program and not re.search(r"f64\[\d+,", program)


def test_a_number_that_no_norm_exceeds():
    """Of rows of ones it is the norm itself."""
    layout = layers.Plan.of(lambda w, x: x @ w, jnp.zeros((4, 5)), jnp.zeros(4)).uses[0][0].layout
    table = layers.Plan.of(lambda e, i: e[i], jnp.zeros((4, 5)), jnp.zeros(2, int)).uses[0][0].layout
    outer = Outer(jnp.ones((3, 1, 1, 2, 4)), jnp.ones((3, 1, 1, 2, 5)), layout, 1)
    picked = Picked(jnp.zeros((3, 1, 1), int), jnp.ones((3, 1, 1, 1, 5)), table)
    assert float(Gram(outer).bound()) == pytest.approx(2 * 60**0.5)
    assert float(Gram(picked).bound()) == pytest.approx(15**0.5)
    assert float(Gram([outer, picked, jnp.ones((3, 2))]).bound()) == pytest.approx((4 * 60 + 15 + 6) ** 0.5)
    assert float(Gram([]).bound()) == 0


def test_lanes_choose_between_factors_and_rows_together(float64):
    """One answer under `vmap`, so that a `cond` stays one; the lane where digits cancel has as many as alone."""
    rng = np.random.default_rng(0)
    samples = jnp.asarray(np.stack([rng.normal(size=(6, 5)), rng.choice([-1.0, 1.0], (6, 5))]), float64)
    w, e = jnp.asarray(rng.normal(size=(5, 5)), float64), jnp.asarray(rng.normal(size=6), float64)
    metric = metrics.quantum_geometric(lambda w, x: x @ w @ x, rows="layers")

    def step(samples):
        gram = metric(w, samples=samples)
        g = gram.transposed_times(e)
        solution = solvers.solve(Gram(gram.rows, e), g, solver=solvers.row_space(), damping=damping.trace(1e-3))
        return gram.kernel(jnp.ones((), float64)), gram.diagonal(), solution.value

    def made(samples):
        rows = (jnp.einsum("ni,nj->nij", samples, samples)).reshape(6, -1)
        return (rows - rows.mean(0)) / 6**0.5

    together = jax.jit(jax.vmap(step))(samples)
    for i, (kernel, diagonal, value) in enumerate(zip(*together, strict=True)):
        rows = made(samples[i])
        assert error(kernel, rows @ rows.T) < 1e-12
        assert error(diagonal.reshape(-1), jnp.sum(rows**2, 0)) < 1e-12
        assert error(value, step(samples[i])[2]) < 1e-10
    conditions = str(jax.make_jaxpr(jax.vmap(step))(samples)).count("= cond[")
    assert conditions == str(jax.make_jaxpr(step)(samples[0])).count("= cond[") > 2


def test_auto_takes_layers_where_they_are_smaller(float64):
    """Shapes alone decide: rows of n·k < p numbers, and leaves whose factors are at most half of them."""
    wide = [(np.zeros((20, 30)), np.zeros(30)), (np.zeros((30, 2)), np.zeros(2))]
    metric = metrics.gauss_newton(lambda p, batch: mlp(p, batch[0]), metrics.losses.squares())
    quantum = metrics.quantum_geometric(lambda p, x: jnp.sum(mlp(p, x[None])))
    for n, expected in ((10, [True] * 4), (1000, [False] * 4)):
        batch = (jnp.zeros((n, 20)), jnp.zeros((n, 2)))
        rows = metric(wide, batch=batch).rows
        assert [is_outer(x) for x in jax.tree.leaves(rows, is_leaf=is_outer)] == expected
        rows = quantum(cast(wide, jnp.float32), samples=batch[0]).rows  # one output: 60 numbers are not twice 32
        assert [is_outer(x) for x in jax.tree.leaves(rows, is_leaf=is_outer)] == [n == 10] * 2 + [False] * 2


def test_rows_of_several_terms_stay_in_factors(dtype):
    """A Laplacian inside, values on the boundary: as many positions as the longer of both has."""
    laplacian = lambda w, x: jnp.trace(jax.hessian(lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])))(x))
    terms = [jax.vmap(laplacian, (None, 0)), lambda w, x: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])[:, 0]]
    rng = np.random.default_rng(0)
    w = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 8), (8, 9))]
    batch = [jnp.asarray(rng.normal(size=(n, 3)), dtype) for n in (5, 4)]
    e, got, expected = rng.normal(size=9), *(
        jax.jit(metrics.least_squares(terms, [0.5, 2.0], rows=rows))(w, batch=batch) for rows in ("layers", "plain")
    )  # fmt: skip
    assert all(map(is_outer, got.rows)) and got.n == 9
    for f in (
        lambda gram: gram.matrix(), lambda gram: gram.kernel(jnp.ones((), dtype)), lambda gram: gram.scale(),
        lambda gram: gram.transposed_times(jnp.asarray(e, dtype)), lambda gram: gram.times(w),
        lambda gram: gram.residual,
    ):  # fmt: skip
        assert error(f(got), f(expected)) < 10 * TOL[np.dtype(dtype)]


def test_one_walk_serves_every_batch(float64):
    """New numbers do not trace again; vmap over parameters is a loop; the operator passes through jit as a pytree."""
    traces = []

    def model(params, x):
        traces.append(1)
        return mlp(params, x)

    metric = jax.jit(
        lambda params, x: metrics.energy(lambda p, x: model(p, x[None])[0], rows="layers")(params, points=x)
    )
    params = cast(LAYERS, float64)
    metric(params, jnp.asarray(X))
    before = len(traces)
    metric(params, jnp.asarray(X) + 1)
    assert len(traces) == before
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    together = jax.vmap(lambda params: metric(params, jnp.asarray(X)).dense())(many)
    for i in range(2):
        alone = metric(jax.tree.map(lambda x: x[i], many), jnp.asarray(X)).dense()  # noqa: B023
        np.testing.assert_allclose(together[i], alone, atol=1e-12)
    assert error(jax.jit(lambda g: g.dense())(metric(params, jnp.asarray(X))), together[0]) < 1e-12


def test_a_large_common_part_is_taken_out_of_rows(dtype):
    """Nearly equal samples: the mean outweighs what is left by a thousand, and its square by a million."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 10)) * 1e-2 + 10, dtype)
    w = jnp.asarray(rng.normal(size=(10, 8)) * 1e-3, dtype)
    metric = lambda rows: metrics.quantum_geometric(lambda w, x: jnp.sum(jnp.tanh(x @ w)), rows=rows)
    factored, plain = (jax.jit(metric(rows))(w, samples=x) for rows in ("layers", "plain"))
    assert is_outer(factored.rows)
    one = jnp.ones((), dtype)
    bound = 2e-3 if dtype == np.float32 else 1e-11
    for got, expected in (
        (factored.kernel(one), plain.kernel(one)), (factored.scale(), plain.scale()),
        (factored.space.ravel(factored.diagonal()), plain.space.ravel(plain.diagonal())),
    ):  # fmt: skip
        assert error(got, expected) < bound
    a, e = np.asarray(x, float), rng.normal(size=6)
    rows = np.einsum("ni,no->nio", a, 1 - np.tanh(a @ np.asarray(w, float)) ** 2).reshape(6, -1)
    rows = (rows - rows.mean(0)) / 6**0.5
    g = factored.transposed_times(jnp.asarray(e, dtype))
    for rule, d in ((damping.absolute(1e-6), 1e-6), (damping.relative(1e-2), 1e-2 * np.sum(rows**2, 0))):
        step = rows.T @ np.linalg.solve((rows / d) @ rows.T + np.eye(6), e) / d
        solution = solvers.solve(factored, g, solver=solvers.row_space(), damping=rule)
        assert error(solution.value.reshape(-1), step) < max(bound, 1e-9)
    equal = jax.jit(metric("layers"))(w, samples=jnp.repeat(x[:1], 3, axis=0))
    assert np.max(equal.scale()) == 0 and np.max(jnp.abs(equal.kernel(one))) == 0


@pytest.mark.parametrize("outlier", [None, 0, 63])
def test_single_precision_is_used_as_well_as_by_rows(outlier, float64):
    """Damping by about one rounding of the trace; nearly equal samples, one of them far from the others or none."""
    f = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)
    rng, errors = np.random.default_rng(0), {"auto": 0.0, "plain": 0.0}

    def step(w, x, e, rows):
        gram = metrics.quantum_geometric(f, rows=rows)(w, samples=x)
        rule = damping.trace(jnp.asarray(1e-4, w.dtype))
        return solvers.solve(gram, e, solver=solvers.row_space(), damping=rule).value

    step = jax.jit(step, static_argnums=3)
    for _ in range(4):
        centre, w = rng.normal(size=24), rng.normal(size=(24, 24)) * 0.2
        x = centre + 1e-2 * rng.normal(size=(64, 24))
        if outlier is not None:
            x[outlier] = -3 * np.roll(centre, 3)
        rows = np.asarray(jax.vmap(jax.grad(f), (None, 0))(w, x))
        g = np.tensordot(rng.normal(size=64) / 64, rows - rows.mean(0), 1)
        exact = step(jnp.asarray(w), jnp.asarray(x), jnp.asarray(g), "plain")
        for form in errors:
            single = step(*(jnp.asarray(v, jnp.float32) for v in (w, x, g)), form)
            errors[form] += float(np.linalg.norm(single - exact) / np.linalg.norm(exact))
    assert errors["auto"] < 1.5 * errors["plain"]


def test_entries_that_do_not_vary_have_no_curvature(dtype):
    """xᵀWx at x_i = ±a_i: the factors of W_ii change their sign together, and its rows, a_i², are all the same."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.choice([-1.0, 1.0], size=(9, 6)) * np.linspace(0.3, 1.7, 6), dtype)
    metric = metrics.quantum_geometric(lambda w, x: x @ w @ x, rows="layers")
    operator = jax.jit(metric)(jnp.zeros((6, 6), dtype), samples=x)
    assert is_outer(operator.rows)
    rows = np.einsum("ni,nj->nij", *(np.asarray(x, float),) * 2)
    expected = np.std(rows, axis=0)
    lengths = operator.space.unravel(operator.scale())
    np.testing.assert_allclose(lengths, expected, rtol=100 * eps(dtype), atol=10 * eps(dtype))
    np.testing.assert_allclose(operator.diagonal(), expected**2, rtol=100 * eps(dtype), atol=(10 * eps(dtype)) ** 2)


@pytest.fixture
def few_objects():
    """What was made before is out of sight of `gc.get_referrers`, by which JAX names whatever holds a leaked value."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_a_rule_that_closes_over_the_example_has_plain_rows(float64, few_objects):
    """It cannot be replayed outside of the trace that it was made in."""

    def f(w, x):
        @jax.custom_vjp
        def act(z):
            return jnp.tanh(z)

        act.defvjp(lambda z: (jnp.tanh(z), z), lambda z, g: (g * (1 + x[0] ** 2),))
        return jnp.sum(act(x @ w))

    w, x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 20))), jnp.ones((3, 20))
    for run in (jax.jit, lambda metric: metric):
        auto, plain = (run(metrics.energy(f, rows=rows))(w, points=x) for rows in ("auto", "plain"))
        assert not is_outer(auto.rows) and error(auto.rows, plain.rows) == 0
        with pytest.raises(TypeError, match=r"closes over its arguments.*rows='plain'"):
            run(metrics.energy(f, rows="layers"))(w, points=x)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_leaves_and_empty_loops_have_plain_rows(shape, float64):
    f = lambda p, x: jnp.sum(x @ p[1]) + jnp.sum(jnp.zeros(shape[0]) @ p[0]) + jnp.sum(jnp.zeros((0, 5)) @ p[2])
    params, x = [jnp.zeros(shape), jnp.ones((5, 7)), jnp.ones((5, 2))], jnp.asarray(X)
    operator = metrics.energy(f, rows="layers")(params, points=x)
    assert [is_outer(x) for x in jax.tree.leaves(operator.rows, is_leaf=is_outer)] == [False, True, False]
    assert error(operator.dense(), metrics.energy(f, rows="plain")(params, points=x).dense()) < 1e-14


def test_lengths_where_factors_trade_their_sizes(dtype):
    """Large in one factor, small in the other, and the other way round in the next example."""
    layout = layers.Plan.of(lambda w, x: x @ w, jnp.zeros((3, 4)), jnp.zeros(3)).uses[0][0].layout
    for big, small in ((1.0, 1e-22), (1e22, 1e-22)):
        left, right = np.zeros((2, 1, 1, 1, 3)), np.zeros((2, 1, 1, 1, 4))
        left[0], right[0], left[1], right[1] = small, big, big, small
        outer = Outer(jnp.asarray(left, dtype), jnp.asarray(right, dtype), layout, 1)
        np.testing.assert_allclose(outer.lengths(), 2**0.5 * big * small, rtol=1e-6)


def test_derivatives_go_through_layer_rows(float64):
    """d/dθ of vᵀG(θ)v, against central differences."""
    params, v = cast(LAYERS, float64), cast(LAYERS, float64)

    def length(params):
        operator = metrics.energy(lambda p, x: mlp(p, x[None])[0], rows="layers")(params, points=jnp.asarray(X))
        return operator.inner(v, v)

    gradient = jax.jit(jax.grad(length))(params)
    way = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape)), params)
    moved = lambda h: length(jax.tree.map(lambda x, d: x + h * d, params, way))
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6)


def test_a_flat_vector_costs_what_the_tree_does(float64):
    """The same numbers and as many operations; under vmap and differentiated too."""
    tree = cast([(w, b) for w, b in zip(WIDE[::2], WIDE[1::2], strict=True)], float64)
    theta, unravel = ravel_pytree(tree)
    x, one = jnp.asarray(np.random.default_rng(2).normal(size=(6, 20))), jnp.ones(())
    of = lambda model: metrics.energy(lambda p, x: model(p, x[None])[0], rows="layers")
    flat, layered = of(lambda theta, x: mlp(unravel(theta), x)), of(mlp)
    kernels = [jax.jit(lambda p, m=m: m(p, points=x).kernel(one)) for m in (flat, layered)]
    assert error(kernels[0](theta), kernels[1](tree)) < 1e-13
    operations = [k.lower(p).compile().cost_analysis()["flops"] for k, p in zip(kernels, (theta, tree), strict=True)]
    assert operations[0] < 1.2 * operations[1] < 0.25 * 2 * 12**2 * theta.size

    def values(p, metric, ravel, v):
        operator = metric(p, points=x)
        g = operator.transposed_times(jnp.linspace(-1.0, 1.0, 12))
        rule = {"solver": solvers.row_space(), "damping": damping.absolute(0.1)}
        step = solvers.solve(operator, g, **rule).value
        return operator.inner(v, v), ravel(step), ravel(operator.diagonal())

    first = lambda *args: values(*args)[0]
    flatten = lambda tree: ravel_pytree(tree)[0]
    together = jax.jit(jax.vmap(lambda c: values(c * theta, flat, flatten, theta)))(jnp.array([1.0, 2.0]))
    for i in range(2):
        alone = values(jax.tree.map(lambda x: (i + 1.0) * x, tree), layered, flatten, tree)  # noqa: B023
        assert max(error(a[i], b) for a, b in zip(together, alone, strict=True)) < 1e-11
    gradient = jax.jit(jax.grad(first), static_argnums=(1, 2))(theta, flat, flatten, theta)
    assert error(gradient, flatten(jax.grad(first)(tree, layered, flatten, tree))) < 1e-11


def test_a_large_table_is_kept_as_its_indices(float64):
    """No rows of the size of the table are made; the step, under vmap, and its derivative are those of plain rows."""
    rng = np.random.default_rng(0)
    params = {"e": jnp.asarray(rng.normal(size=(500, 8))), "w": jnp.asarray(rng.normal(size=(8, 3)))}
    tokens = jnp.asarray(rng.integers(0, 500, (4, 6)) // 40 * 40)
    model = lambda p, x: jnp.sum(jnp.tanh(p["e"][x] @ p["w"]), 0)

    def step(params, rows):
        operator = metrics.energy(model, rows=rows)(params, points=tokens)
        g = operator.transposed_times(jnp.linspace(-1.0, 1.0, 12))
        return solvers.solve(operator, g, solver=solvers.row_space(), damping=damping.absolute(0.1)).value

    rows = metrics.energy(model)(params, points=tokens).rows
    assert isinstance(rows["e"], Picked) and rows["e"].index.shape == (4, 1, 6)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    layered, plain = (jax.jit(jax.vmap(lambda p, rows=rows: step(p, rows)))(many) for rows in ("auto", "plain"))
    assert error(layered, plain) < 1e-11
    length = lambda params, rows: sum(jnp.sum(x**2) for x in jax.tree.leaves(step(params, rows)))
    slopes = [jax.jit(jax.grad(length), static_argnums=1)(params, rows) for rows in ("layers", "plain")]
    assert error(*slopes) < 1e-10


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_lengths_of_a_table_of_any_size(size, dtype):
    index, right = np.array([[[0, 2]], [[2, -1]]]), np.random.default_rng(0).normal(size=(2, 1, 1, 2, 3)) * size
    layout = layers.Plan.of(lambda e, i: e[i], jnp.zeros((4, 3)), jnp.zeros(2, int)).uses[0][0].layout
    rows = Picked.of(jnp.asarray(index), jnp.asarray(right, dtype), layout)
    expected = np.zeros((4, 3))
    expected[0], expected[2] = np.abs(right[0, 0, 0, 0]), np.hypot(right[0, 0, 0, 1], right[1, 0, 0, 0])
    assert error(rows.lengths(), expected) < 8 * eps(dtype)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_rows_of_any_size(size, dtype):
    """Lengths of columns, and a solve, where squares of the rows would leave the floats."""
    rows = Outer(
        jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 1, 1, 4)) * size, dtype),
        jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, 1, 1, 5)) * size, dtype),
        layers.Plan.of(lambda w, x: x @ w, jnp.zeros((4, 5)), jnp.zeros(4)).uses[0][0].layout,
        1,
    )
    expected = np.linalg.norm(
        np.einsum("ni,no->nio", *(np.asarray(x, float)[:, 0, 0, 0] for x in (rows.left, rows.right))), axis=0
    )
    assert error(rows.lengths(), expected) < 8 * eps(dtype)
    # The same of kernels in units in which the rows are of order one, whichever side is large.
    unit, sides = jnp.asarray(1 / np.sqrt(np.max(expected)) ** 2, dtype), [rows.left, rows.right]
    for left, right in (sides, (sides[0] * (1 / size), sides[1] * size), (sides[0] * size, sides[1] * (1 / size))):
        outer = Outer(left.astype(dtype), right.astype(dtype), rows.layout, 1)
        for form in (outer, outer.centred(jnp.asarray([0.6, 0.5, 0.4], dtype))):
            made = np.asarray(form.explicit(), float).reshape(3, -1) * float(unit)
            assert error(Gram(form).kernel(unit), made @ made.T) < 100 * eps(dtype)


def test_a_report_names_what_was_found():
    captured = layers.capture(lambda p, x: mlp(p[0], x) + jnp.sum(p[1] ** 2))((LAYERS, np.ones(3)), X)
    lines = captured.report().splitlines()
    assert len(lines) == 7
    assert "[0][0][0] (5, 7): factors; dot_general of 1 × (5, 7) at 1" in lines[0]
    assert "70 numbers in rows, 19 in factors" in lines[0]
    assert "[0][0][1] (7,): factors; a bias" in lines[1] and "14 numbers in rows, 1 in factors" in lines[1]
    assert "whole: integer_pow" in lines[6]
    case = CASES["a bias cut out beside slices that overlap"]
    assert "(5,) in whole: add, (25,) in dot_general" in layers.capture(case.model)(case.params, case.batch).report()


LABELS = metrics.fisher(
    lambda params, y, x: jax.nn.log_softmax(mlp(params, x[None])[0])[y], jnp.arange(2), inputs=True, rows="layers"
)
DIAGONALS = {
    "exact": (LABELS, {"batch": X}),
    "empirical": (
        metrics.empirical_fisher(lambda params, x: -jnp.sum(mlp(params, x[None])[0] ** 2), rows="layers"),
        {"batch": X},
    ),
    "by draws": (
        metrics.monte_carlo_fisher(
            lambda params, y, x: -0.5 * jnp.sum((y - mlp(params, x[None])[0]) ** 2),
            lambda params, key, x: mlp(params, x[None])[0] + jax.random.normal(key, (2,)),
            3,
            inputs=True,
            rows="layers",
        ),
        {"batch": X, "key": 3},
    ),
}


@pytest.mark.parametrize("name", DIAGONALS)
def test_the_fisher_diagonal_is_that_of_the_matrix(name, dtype):
    """Of squared scores of every example: the diagonal of the matrix from plain rows."""
    metric, data = DIAGONALS[name]
    params = cast(LAYERS, dtype)
    data = {k: jax.random.key(v) if k == "key" else jnp.asarray(v, dtype) for k, v in data.items()}
    diagonal = jax.jit(metrics.fisher_diagonal(metric))(params, **data)
    matrix = metric(params, **data).dense()
    assert error(diagonal.entries, jnp.diagonal(matrix)) < TOL[np.dtype(dtype)]
    assert jax.tree.map(jnp.shape, diagonal.entries) == jax.tree.map(jnp.shape, params)
    if name == "exact":  # F = Jᵀ(diag(q) − qqᵀ)J, the mean over inputs
        rows = jacobian(mlp, params, data["batch"])
        q = np.asarray(jax.nn.softmax(mlp(params, data["batch"])), float)
        roots = np.einsum("ni,ij->nij", q, np.eye(2)) - np.einsum("ni,nj->nij", q, q)
        expected = np.mean(np.einsum("nip,nij,njp->np", rows, roots, rows), axis=0)
        assert error(diagonal.entries, expected) < 10 * TOL[np.dtype(dtype)]


def test_rows_that_mix_the_batch_are_measured(float64):
    params, batch = cast(LAYERS, float64), jnp.asarray(X)
    assert metrics.check_rows(mlp, params, batch) < 1e-14
    mixing = lambda params, x: mlp(params, x) - jnp.mean(mlp(params, x), axis=0)
    assert metrics.check_rows(mixing, params, batch) == 1.0


MISTAKES = {
    "unknown rows": (lambda: metrics.energy(mlp, rows="factors"), ValueError, r"rows.*'auto', 'layers' or 'plain'"),
    "chunks of layers": (
        lambda: metrics.energy(mlp, rows="layers", chunk_size=3), ValueError, r"rows.*leave out chunk_size",
    ),
    "layers of complex numbers": (
        lambda: metrics.quantum_geometric(lambda w, x: jnp.sum(x @ w), holomorphic=True, rows="layers")(
            jnp.ones((5, 7)) + 1j, samples=X
        ),
        ValueError, r"rows.*real parameters.*'auto' or 'plain'",
    ),
    "no outputs of examples": (lambda: layers.capture(lambda w, x: jnp.sum(x @ w))(np.ones((5, 7)), X), ValueError,
                               r"f: expected one output for each example"),
    "no diagonal": (
        lambda: metrics.fisher_diagonal(metrics.energy(lambda p, x: p * x, matrix_free=True))(1.0, points=jnp.ones(2)),
        TypeError, r"metric.*leave matrix_free out",
    ),
    "one example": (lambda: metrics.check_rows(mlp, LAYERS, X[:1]), ValueError, r"batch.*at least two"),
    "outputs of a batch": (
        lambda: metrics.check_rows(lambda p, x: x[:2], LAYERS, X), ValueError, r"f: expected outputs",
    ),
    "complex outputs": (
        lambda: layers.capture(lambda w, x: x @ w + 1j * x @ w)(np.ones((5, 5)), X), TypeError, r"f: expected real",
    ),
    "no batch": (lambda: layers.capture(mlp)(LAYERS, jnp.zeros(())), ValueError, r"batch.*leading axis"),
}  # fmt: skip
test_mistakes_are_named = named_mistakes(MISTAKES)
