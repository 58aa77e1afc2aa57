"""What single solvers promise beyond the laws: accuracy, residuals, complex numbers, derivatives, structure."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import OPERATORS, RHS, ROWS, VECTOR, P, error, flat, tree

import natgrad_jax as ng
from natgrad_jax import damping, operators, solvers

WIDE = cases.rounded(np.random.default_rng(3).normal(size=(4, 12)))  # fewer rows than parameters
WIDE_RHS = cases.rounded(np.random.default_rng(4).normal(size=12))


# The table of cells: an answer, or a TypeError with the cure.

CELLS = {
    "cholesky": (solvers.cholesky(), set(OPERATORS)),
    "eigh": (solvers.eigh(), set(OPERATORS)),
    "cg": (solvers.cg(1e-12), set(OPERATORS)),
    "auto": (solvers.auto(), set(OPERATORS)),
    "qr": (solvers.qr(), {"gram", "square gram"}),
    "row_space": (solvers.row_space(), {"square gram"}),
    "woodbury": (solvers.woodbury(), {"low rank"}),
    "diagonal": (solvers.diagonal(), {"diagonal"}),
    "kronecker": (solvers.kronecker(), {"kronecker"}),
    "blockwise": (solvers.blockwise(), {"blocks"}),
    "closed": (solvers.closed(), set()),
}
DAMPINGS = {
    "layered": damping.layered(0.3),
    "metric": damping.metric(0.3, operators.Diagonal(tree(np.arange(1.0, 6), np.float32))),
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", CELLS)
def test_every_cell_of_the_table(name, kind, float64):
    solver, works = CELLS[name]
    op, matrix = OPERATORS[kind].build(ROWS, float64), OPERATORS[kind].matrix(ROWS)
    if kind not in works:
        with pytest.raises(TypeError, match=rf"solvers\.{name}: .*(use|Use|Leave|wrap)"):
            solvers.solve(op, tree(RHS, float64), solver=solver)
        return
    got = solvers.solve(op, tree(RHS, float64), solver=solver, damping=0.5)
    assert error(got.value, np.linalg.solve(matrix + 0.5 * np.diag(np.diag(matrix)), RHS)) < 1e-10


@pytest.mark.parametrize("rule", DAMPINGS)
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", [name for name in CELLS if name != "closed"])
def test_damping_by_layers_and_by_a_metric(name, kind, rule, float64):
    """layered: D is diag(G) on vectors, and the product of its marginals on the (1, 2) leaf, which is diag(G) again."""
    solver, works = CELLS[name]
    if kind not in works or (name, kind, rule) in {
        ("kronecker", "kronecker", "metric"),
        ("auto", "kronecker", "metric"),
    }:
        return
    matrix = OPERATORS[kind].matrix(ROWS)
    added = 0.3 * (np.diag(matrix) if rule == "layered" else np.arange(1.0, 6))
    op, g = OPERATORS[kind].build(ROWS, float64), tree(RHS, float64)
    got = solvers.solve(op, g, solver=solver, damping=DAMPINGS[rule])
    assert error(got.value, np.linalg.solve(matrix + np.diag(added), RHS)) < 1e-12


def test_layered_damping_is_the_product_of_the_marginals(dtype):
    g = cases.rounded(np.random.default_rng(1).uniform(0.5, 2, size=(3, 4)))
    root = damping.layered(1.0).root(jnp.sqrt(jnp.asarray(g.ravel(), dtype)), operators.Space.of(jnp.asarray(g, dtype)))
    expected = np.outer(g.sum(1), g.sum(0)) / g.sum()
    np.testing.assert_allclose(np.square(root).reshape(3, 4), expected, rtol=20 * cases.eps(dtype))
    assert expected.sum() == pytest.approx(g.sum())


@pytest.mark.parametrize("rule", ["none", "number", "trace", "absolute"])
@pytest.mark.parametrize("kind", ["matrix", "tensor"])
def test_kronecker_is_the_dense_matrix(rule, kind, float64):
    """A (3, 4) leaf, and one of shape (3, 2, 2) that is read as (3, 4)."""
    rng = np.random.default_rng(5)
    a, b = (x.T @ x for x in (rng.normal(size=(5, 3)), rng.normal(size=(6, 4))))
    v, dense = rng.normal(size=(3, 4)), np.kron(a, b)
    shape = (3, 4) if kind == "matrix" else (3, 2, 2)
    op = operators.Kronecker(jnp.asarray(a), jnp.asarray(b), operators.Space.of(jnp.zeros(shape)))
    np.testing.assert_allclose(flat(op.mv(jnp.asarray(v).reshape(shape))), dense @ v.ravel(), rtol=1e-10)
    np.testing.assert_allclose(op.dense(), dense, rtol=1e-12)
    damped = dense + np.diag(cases.RULES[rule].added(dense))
    got = solvers.solve(op, jnp.asarray(v).reshape(shape), damping=cases.RULES[rule].damping)
    assert got.value.shape == shape
    assert error(got.value, np.linalg.solve(damped, v.ravel())) < 1e-10


def test_kronecker_of_singular_factors_is_minimum_norm(float64):
    a, b = np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [0.0, 0.0]])
    op, dense = operators.Kronecker(jnp.asarray(a), jnp.asarray(b)), np.kron(a, b)
    g = dense @ np.arange(1.0, 5)
    got = solvers.solve(op, jnp.asarray(g.reshape(2, 2)), damping=damping.absolute(0.0))
    assert error(got.value, np.linalg.pinv(dense) @ g) < 1e-12
    assert int(got.stats.rank) == 1


# Sample space.


@pytest.mark.parametrize("rule", ["number", "trace", "absolute"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_push_through(rule, with_residual, dtype):
    """(AᵀA + λD)⁻¹Aᵀe = D⁻¹Aᵀ(AD⁻¹Aᵀ + λ)⁻¹e, and the same without knowing e."""
    case, e = cases.RULES[rule], cases.rounded(VECTOR[:4])
    matrix, g = WIDE.T @ WIDE, WIDE.T @ e
    damped = matrix + np.diag(case.added(matrix))
    op = operators.Gram(jnp.asarray(WIDE, dtype), jnp.asarray(e, dtype) if with_residual else None)
    for solver in (None, solvers.row_space(), solvers.qr()):
        got = solvers.solve(op, jnp.asarray(g, dtype), solver=solver, damping=case.damping)
        assert error(got.value, np.linalg.solve(damped, g)) < 100 * np.linalg.cond(damped) * cases.eps(dtype)
        assert bool(got.stats.residual_used) == with_residual
    other = solvers.solve(op, jnp.asarray(WIDE_RHS, dtype), solver=solvers.row_space(), damping=case.damping)
    assert error(other.value, np.linalg.solve(damped, WIDE_RHS)) < 100 * np.linalg.cond(damped) * cases.eps(dtype)
    assert not bool(other.stats.residual_used)


@pytest.mark.parametrize("solver", [solvers.row_space(), solvers.qr()], ids=["row_space", "qr"])
def test_a_residual_that_no_longer_belongs_is_not_used(solver):
    """float32, λ = 1e-6: with e the answer is exact; clipped g keeps it, weight decay must not."""
    rng = np.random.default_rng(8)
    rows, e = cases.rounded(rng.normal(size=(32, 200))), cases.rounded(rng.normal(size=32))
    op = operators.Gram(jnp.asarray(rows, jnp.float32), jnp.asarray(e, jnp.float32))
    decay = 0.01 * rng.normal(size=200)
    matrix = rows.T @ rows
    damped = matrix + 1e-6 * np.diag(np.diag(matrix))
    for g, belongs, tol in (
        (rows.T @ e, True, 2e-5), (0.125 * rows.T @ e, True, 2e-5), (rows.T @ e + decay, False, 5e-3),
    ):  # fmt: skip
        got = solvers.solve(op, jnp.asarray(g, jnp.float32), solver=solver, damping=1e-6)
        assert bool(got.stats.residual_used) == belongs
        assert error(got.value, np.linalg.solve(damped, g)) < tol


@pytest.mark.parametrize("strength", [1e-12, 1e-8, 1e-4])
def test_recovering_the_residual_is_as_good_as_knowing_it(strength, dtype):
    """κ(A) = 1e3. What rounding leaves of g outside of the range of G must not be divided by λ."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(m, 8)))[0] for m in (8, 24))
    rows, e = cases.rounded((u * np.geomspace(1, 1e-3, 8)) @ v.T), cases.rounded(rng.normal(size=8))
    scale = np.linalg.norm(rows, axis=0)
    scaled = rows / scale
    expected = (scaled.T @ np.linalg.solve(scaled @ scaled.T + strength * np.eye(8), e)) / scale
    got = {}
    for name, residual in (("known", jnp.asarray(e, dtype)), ("recovered", None)):
        op = operators.Gram(jnp.asarray(rows, dtype), residual)
        solution = solvers.solve(op, jnp.asarray(rows.T @ e, dtype), solver=solvers.row_space(), damping=strength)
        got[name] = error(solution.value, expected)
    assert max(got.values()) < 10 * np.linalg.cond(scaled) ** 2 * cases.eps(dtype)


def test_qr_does_not_square_the_condition_number():
    """κ = 1.7e3: its square is lost in float32, and the data's own rounding is worth 6e-5."""
    rows, truth = np.array([[1, 1], [1, 1 + 1e-3], [1, 1 - 1e-3]]), np.array([1.0, 2.0])
    j = jnp.asarray(rows, jnp.float32)
    e = jnp.asarray(rows @ truth, jnp.float32)
    op = operators.Gram(j, e)
    got = solvers.solve(op, j.T @ e, solver=solvers.qr())
    assert bool(got.stats.residual_used)
    np.testing.assert_allclose(got.value, truth, atol=3e-4)
    squared = solvers.solve(op, j.T @ e, solver=solvers.cholesky())
    assert np.abs(squared.value - truth).max() > 3e-4


@pytest.mark.parametrize("name", cases.SINGULAR)
def test_qr_has_minimum_norm_and_knows_the_rank(name, dtype):
    rows = cases.SINGULAR[name]
    matrix = rows.T @ rows
    g = matrix @ VECTOR
    values = np.linalg.eigvalsh(matrix)
    condition = values.max() / values[values > 1e-9 * values.max()].min()
    op = OPERATORS["gram"].build(rows, dtype)
    got = solvers.solve(op, tree(g, dtype), solver=solvers.qr(), damping=damping.absolute(0.0))
    assert error(got.value, np.linalg.pinv(matrix, rcond=1e-9, hermitian=True) @ g) < 40 * condition * cases.eps(dtype)
    assert int(got.stats.rank) == np.linalg.matrix_rank(rows)


def test_weights_and_centring(dtype):
    w = np.array([0.1, 0.4, 0.2, 0.3])
    op = operators.Gram.from_samples(
        jnp.asarray(WIDE, dtype), weights=jnp.asarray(w, dtype), residual=jnp.asarray(RHS[:4], dtype), centred=True
    )
    centred = WIDE - w @ WIDE
    np.testing.assert_allclose(op.dense(), centred.T @ (w[:, None] * centred), atol=20 * cases.eps(dtype))
    gradient = centred.T @ (w * (RHS[:4] - w @ RHS[:4]))
    np.testing.assert_allclose(op.transposed_times(op.residual), gradient, atol=20 * cases.eps(dtype))


# Complex numbers.

COMPLEX = {np.dtype("float32"): np.complex64, np.dtype("float64"): np.complex128}
_imaginary = np.random.default_rng(9).normal(size=(9, P))
C_ROWS = ROWS + 1j * cases.rounded(_imaginary)
C_RHS = RHS + 1j * VECTOR


def _complex_operator(kind, dtype):
    rows, dense = jnp.asarray(C_ROWS, dtype), jnp.asarray(C_ROWS.conj().T @ C_ROWS, dtype)
    return {
        "gram": lambda: operators.Gram(rows),
        "dense": lambda: operators.Dense(dense),
        "implicit": lambda: operators.Implicit(lambda v, a: a @ v, jnp.zeros(P, dtype), rows),
        "sum": lambda: operators.Sum((operators.Dense(dense / 4), operators.Gram(rows)), (1.0, 0.75)),
        "kronecker": lambda: operators.Kronecker(dense, jnp.ones((1, 1), dtype), operators.Space.of(rows[0])),
    }[kind]()


@pytest.mark.parametrize("kind", ["gram", "dense", "implicit", "sum", "kronecker"])
@pytest.mark.parametrize("name", ["auto", "cholesky", "eigh", "qr", "cg"])
def test_hermitian_metrics(name, kind, dtype):
    if name == "qr" and kind != "gram":
        return
    op, matrix = _complex_operator(kind, COMPLEX[dtype]), C_ROWS.conj().T @ C_ROWS
    g = jnp.asarray(C_RHS, COMPLEX[dtype])
    solver = CELLS[name][0]
    rule = None if kind == "implicit" and name in ("auto", "cholesky", "eigh") else damping.absolute(0.5)
    expected = np.linalg.solve(matrix + (0 if rule is None else 0.5) * np.eye(P), C_RHS)
    got = solvers.solve(op, g, solver=solver, damping=rule)
    assert got.value.dtype == COMPLEX[dtype] and bool(got.converged)
    assert np.linalg.norm(got.value - expected) < 8 * P * 20 * cases.eps(dtype) * np.linalg.norm(expected)
    np.testing.assert_allclose(op.mv(g), matrix @ C_RHS, rtol=200 * cases.eps(dtype))
    np.testing.assert_allclose(op.norm(g), np.sqrt((C_RHS.conj() @ matrix @ C_RHS).real), rtol=50 * cases.eps(dtype))
    assert op.diagonal().dtype == dtype


def test_row_space_of_complex_rows(dtype):
    rows = C_ROWS[:3]
    matrix, g = rows.conj().T @ rows, rows.conj().T @ C_RHS[:3]
    op = operators.Gram(jnp.asarray(rows, COMPLEX[dtype]), jnp.asarray(C_RHS[:3], COMPLEX[dtype]))
    got = solvers.solve(op, jnp.asarray(g, COMPLEX[dtype]), damping=damping.absolute(0.5))
    expected = np.linalg.solve(matrix + 0.5 * np.eye(P), g)
    assert bool(got.stats.residual_used)
    assert np.linalg.norm(got.value - expected) < 800 * cases.eps(dtype) * np.linalg.norm(expected)


def test_real_parameters_of_a_complex_function(dtype):
    """G = Re JᴴJ, by 2n real rows and by products."""
    matrix = (C_ROWS.conj().T @ C_ROWS).real
    rows = jnp.asarray(C_ROWS, COMPLEX[dtype])
    gram = operators.Gram.from_samples(rows, real_parameters=True)
    # The oldest jax warns when it transposes a product of a real and a complex array.
    implicit = operators.Implicit(lambda v, a: a @ v.astype(a.dtype), jnp.zeros(P, dtype), rows)
    tol = 40 * cases.eps(dtype) * np.linalg.norm(matrix)
    for op in (gram, implicit):
        np.testing.assert_allclose(op.dense(), matrix, rtol=0, atol=tol)
        got = solvers.solve(op, jnp.asarray(RHS, dtype), solver=solvers.cholesky(), damping=damping.absolute(0.5))
        assert error(got.value, np.linalg.solve(matrix + 0.5 * np.eye(P), RHS)) < 800 * cases.eps(dtype)
    with pytest.raises(TypeError, match=r"rhs: the operator is complex.*real_parameters"):
        solvers.solve(operators.Gram(rows), jnp.asarray(RHS, dtype))
    with pytest.raises(TypeError, match="real and complex leaves"):
        operators.Diagonal({"a": jnp.ones(1), "b": jnp.ones(1, jnp.complex64)}).dense()


# Derivatives.


@pytest.mark.parametrize(
    ("solver", "kind"),
    [("cholesky", "dense"), ("eigh", "gram"), ("qr", "gram"), ("cg", "gram"), ("row_space", "square gram"),
     ("woodbury", "low rank"), ("diagonal", "diagonal"), ("blockwise", "blocks"), ("kronecker", "kronecker")],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["zero", "number", "trace", "absolute"])
def test_derivatives_of_a_solve(solver, kind, rule, float64):
    """d/dt of vᵀ(G(t) + λ(t)D)⁻¹g(t), forward and reverse, against the formula on the dense matrix."""
    direction = cases.rounded(np.random.default_rng(2).normal(size=ROWS.shape))
    case, v = cases.RULES[rule], tree(VECTOR, float64)

    def value(t):
        op = OPERATORS[kind].build(ROWS, float64)
        moved = OPERATORS[kind].build(ROWS + direction, float64)
        op = jax.tree.map(lambda x, y: x + t * (y - x), op, moved)
        g = jax.tree.map(lambda x: x * (1 + t), tree(RHS, float64))
        rule = case.damping
        if isinstance(rule, (damping.Trace, damping.Absolute)):
            rule = type(rule)(rule.strength * (1 + t))
        elif rule:
            rule = damping.relative(rule * (1 + t))
        solved = solvers.solve(op, g, solver=CELLS[solver][0], damping=rule)
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), v, solved.value)))

    dense = jax.jit(lambda op: op.dense())

    def exact(t):
        op = jax.tree.map(
            lambda x, y: np.asarray(x) + t * (np.asarray(y) - np.asarray(x)),
            OPERATORS[kind].build(ROWS, float64), OPERATORS[kind].build(ROWS + direction, float64),
        )  # fmt: skip
        matrix = np.asarray(dense(op))
        return VECTOR @ np.linalg.solve(matrix + (1 + t) * np.diag(case.added(matrix)), RHS * (1 + t))

    step = 1e-4
    central = (8 * (exact(step) - exact(-step)) - (exact(2 * step) - exact(-2 * step))) / (12 * step)
    backward, forward = jax.jit(lambda t: (jax.grad(value)(t), jax.jvp(value, (t,), (1.0,))[1]))(0.0)
    np.testing.assert_allclose(backward, central, rtol=1e-8)
    np.testing.assert_allclose(forward, central, rtol=1e-8)


def test_the_gradient_of_a_complex_solve(float64):
    """Reverse mode once took the transpose of a Hermitian matrix for the matrix itself."""
    matrix, g = jnp.asarray(C_ROWS.conj().T @ C_ROWS), jnp.asarray(C_RHS)
    loss = lambda solve: lambda m, g: jnp.sum(jnp.asarray(VECTOR) * solve(m, g).real)
    expected = jax.grad(loss(jnp.linalg.solve), (0, 1))(matrix, g)
    for name in ("cholesky", "eigh", "cg"):
        solve = lambda m, g, name=name: solvers.solve(operators.Dense(m), g, solver=CELLS[name][0]).value
        for got, truth in zip(jax.grad(loss(solve), (0, 1))(matrix, g), expected, strict=True):
            assert np.linalg.norm(got - truth) < 1e-9 * np.linalg.norm(truth)


def _difference(f, x, step=1e-6):
    return (f(x + step) - f(x - step)) / (2 * step)


def test_the_derivative_knows_the_damping_that_acts(float64):
    """λ given in `update` to a rule of None, and the least damping of `row_space` on a singular G."""
    tx = ng.scale_by_metric(lambda params: operators.Dense(jnp.asarray(ROWS.T @ ROWS)))
    f = lambda strength: tx.update(jnp.asarray(RHS), tx.init(jnp.zeros(P)), jnp.zeros(P), damping=strength)[0].sum()
    np.testing.assert_allclose(jax.grad(f)(0.3), _difference(f, 0.3), rtol=1e-6)
    a = jnp.asarray(WIDE[:1])
    f = lambda t: (solvers.solve(operators.Gram(a.at[0, 0].add(t)), 2 * a[0], damping=None).value ** 2).sum()
    np.testing.assert_allclose(jax.grad(f)(1e-3), _difference(f, 1e-3, 1e-7), rtol=1e-2)


def test_a_coordinate_without_curvature_has_a_finite_derivative(dtype):
    """√0 has none; 0 is what stands for it."""
    entries = jnp.asarray([4.0, 0.0], dtype)
    for rule in (0.0, 0.1, damping.trace(0.1), damping.layered(0.1)):
        for build in (operators.Diagonal, lambda d: operators.Dense(jnp.diag(d))):
            f = lambda d, g, build=build, rule=rule: solvers.solve(
                build(d), g, damping=rule, solver=solvers.cg()
            ).value.sum()
            assert all(np.isfinite(x).all() for x in jax.grad(f, (0, 1))(entries, jnp.asarray([1.0, 0.0], dtype)))


# What a review found.


def test_dependent_rows_without_damping_are_a_flag():
    """The kernel is singular; where rounding lets its factorisation pass, the step is plausible and wrong."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.normal(size=(5, 60)).astype(np.float32)
        rows[-1] = rows[0]
        g = rows.T @ rng.normal(size=5).astype(np.float32)
        matrix = rows.T.astype(float) @ rows
        got = solvers.solve(operators.Gram(jnp.asarray(rows)), jnp.asarray(g))
        assert not bool(got.converged) or error(matrix @ flat(got.value), g) < 1e-3
        fine = solvers.solve(operators.Gram(jnp.asarray(rows)), jnp.asarray(g), damping=None)
        assert bool(fine.converged) and error(matrix @ flat(fine.value), g) < 1e-2


@pytest.mark.parametrize("base", [1e-3, 1e-6])
def test_rows_that_outweigh_the_diagonal(base):
    """g in the span of the rows: the textbook formula subtracts two numbers that agree to 1/base."""
    rows = cases.rounded(np.random.default_rng(0).normal(size=(4, 60)))
    op = operators.LowRank(jnp.full(60, base, jnp.float32), jnp.asarray(rows, jnp.float32))
    g = rows.T @ np.ones(4)
    got = flat(solvers.solve(op, jnp.asarray(g, jnp.float32)).value)
    assert error(base * got + rows.T @ (rows @ got), g) < 1e-5


def test_structures_made_of_tiny_rows(dtype):
    """Rows of 1e-25 in float32 have no squares; with as many rows as parameters a matrix is what is solved."""
    c = 1e-25 if dtype == np.float32 else 1e-200
    gram = operators.Gram(jnp.asarray(c * ROWS, dtype))
    expected = np.linalg.solve(ROWS.T @ ROWS, RHS)
    low_rank = operators.LowRank(jnp.zeros(P, dtype), jnp.asarray(c * ROWS, dtype))
    for op in (low_rank, operators.Sum((gram, gram), (0.25, 0.75)), operators.Blocks([gram])):
        g = jnp.asarray(c * RHS, dtype)
        g = [g] if isinstance(op, operators.Blocks) else g
        for solver in (solvers.cholesky(), solvers.eigh()):
            assert error(c * flat(solvers.solve(op, g, solver=solver).value), expected) < 4000 * cases.eps(dtype)


def test_damping_that_is_zero_where_curvature_is_not(dtype):
    """An answer, or a flag; once it was a step of 0."""
    op, rule = (
        operators.Gram(jnp.diag(jnp.asarray([2.0, 1.0], dtype))),
        operators.Diagonal(jnp.asarray([1.0, 0.0], dtype)),
    )
    for name in ("cholesky", "eigh", "qr", "row_space", "cg"):
        solver = CELLS[name][0]
        got = solvers.solve(op, jnp.asarray([5.0, 1.0], dtype), solver=solver, damping=damping.metric(1.0, rule))
        assert not bool(got.converged) or error(got.value, [1.0, 1.0]) < 20 * cases.eps(dtype)
        assert bool(got.converged) == (name in ("cholesky", "cg"))


def test_the_trace_of_nested_blocks_is_that_of_the_whole(dtype):
    parts = {"x": {"a": 100.0, "b": 1.0}, "y": 5.0}
    nested = lambda tree: operators.Diagonal(jnp.asarray([tree], dtype))
    op = operators.Blocks({"x": operators.Blocks({k: nested(v) for k, v in parts["x"].items()}), "y": nested(5.0)})
    got = solvers.solve(op, jax.tree.map(jnp.ones_like, op.diagonal()), damping=damping.trace(1.0))
    assert error(got.value, 1 / (np.array([100.0, 1.0, 5.0]) + 106 / 3)) < 20 * cases.eps(dtype)


def test_real_and_complex_operators_add_in_any_order(dtype):
    c = operators.Dense(jnp.asarray(C_ROWS.conj().T @ C_ROWS, COMPLEX[dtype]))
    real, g = operators.Diagonal(jnp.ones(P, dtype)), jnp.asarray(C_RHS, COMPLEX[dtype])
    expected = np.linalg.solve(C_ROWS.conj().T @ C_ROWS + np.eye(P), C_RHS)
    by_metric = solvers.solve(c, g, damping=damping.metric(1.0, real)).value
    sums = [solvers.solve(operators.add(*pair), g).value for pair in ((real, c), (c, real))]
    for got in (by_metric, *sums):
        assert np.linalg.norm(got - expected) < 800 * cases.eps(dtype) * np.linalg.norm(expected)
    with pytest.raises(TypeError, match="complex"):
        solvers.solve(operators.add(real, c), g.real)


def test_a_gradient_that_is_not_a_number_where_there_is_no_curvature(dtype):
    rows = np.zeros((2, 20))
    rows[:, 0] = [1.0, 2.0]
    op, g = operators.Gram(jnp.asarray(rows, dtype)), jnp.asarray([1.0] + 19 * [np.nan], dtype)
    for name in ("auto", "cholesky", "eigh", "qr", "row_space"):
        assert not bool(solvers.solve(op, g, solver=CELLS[name][0], damping=0.1).converged)


@pytest.mark.parametrize("operator", [operators.Diagonal(jnp.full(2, 1e-5)), operators.Dense(1e-5 * jnp.eye(2))])
def test_an_answer_that_half_precision_cannot_hold_is_a_flag(operator):
    """1e5 is fine in float32, in which it was judged, and infinite in the float16 of the gradient."""
    got = solvers.solve(operator, jnp.ones(2, jnp.float16))
    assert got.value.dtype == jnp.float16 and not bool(got.converged)


def test_leaves_and_rows_of_size_zero(dtype):
    rows = {"a": jnp.asarray(WIDE[:2, :3], dtype), "b": jnp.zeros((2, 0), dtype)}
    g = {"a": jnp.asarray(WIDE[2, :3], dtype), "b": jnp.zeros(0, dtype)}
    expected = np.linalg.solve(WIDE[:2, :3].T @ WIDE[:2, :3] + np.eye(3), WIDE[2, :3])
    ones = jax.tree.map(jnp.ones_like, g)
    for op, rule in ((operators.Gram(rows), damping.absolute(1.0)), (operators.LowRank(ones, rows), 0.0)):
        assert error(solvers.solve(op, g, damping=rule).value["a"], expected) < 400 * cases.eps(dtype)
    nothing = solvers.solve(operators.Gram(jnp.zeros((0, 3), dtype)), g["a"], damping=damping.absolute(2.0))
    assert error(nothing.value, WIDE[2, :3] / 2) < 8 * cases.eps(dtype)


@pytest.mark.parametrize("make", [solvers.partial_cholesky, solvers.nystrom], ids=["partial_cholesky", "nystrom"])
@pytest.mark.parametrize("rank", [3, 10])
def test_a_preconditioner_on_a_singular_metric_does_no_harm(make, rank):
    """Three rows on thirty parameters, no damping: rounding in the null space once grew to steps of 1e9."""
    rows = cases.rounded(np.random.default_rng(0).normal(size=(3, 30)))
    op, g = operators.Gram(jnp.asarray(rows, jnp.float32)), rows.T @ np.ones(3)
    got = flat(solvers.solve(op, jnp.asarray(g, jnp.float32), solver=solvers.cg(preconditioner=make(rank))).value)
    assert error(rows.T @ (rows @ got), g) < 1e-3
    assert np.linalg.norm(got) < 4 * np.linalg.norm(np.linalg.pinv(rows) @ np.ones(3))


# Structure.


@pytest.mark.parametrize("kind", OPERATORS)
def test_restriction_is_a_block_of_the_matrix(kind, dtype):
    op, matrix = OPERATORS[kind].build(ROWS, dtype), OPERATORS[kind].matrix(ROWS)
    for mask, kept in (
        ({"a": True, "b": False, "c": True}, [0, 1, 3, 4]), ({"a": False, "b": True, "c": False}, [2]),
    ):  # fmt: skip
        block, v = matrix[np.ix_(kept, kept)], VECTOR[kept]
        seen = jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), mask, tree(VECTOR, dtype))
        tol = 40 * cases.eps(dtype) * np.linalg.norm(block)

        @jax.jit
        def restricted(op, seen):
            part = op.restrict(mask)  # noqa: B023
            return part.dense(), part.mv(seen), part.diagonal(), solvers.solve(part, seen, damping=0.5)

        dense, product, diagonal, got = restricted(op, seen)
        np.testing.assert_allclose(dense, block, rtol=0, atol=tol)
        np.testing.assert_allclose(flat(product), block @ v, rtol=0, atol=tol * np.linalg.norm(v))
        np.testing.assert_allclose(flat(diagonal), np.diag(block), rtol=0, atol=tol)
        expected = np.linalg.solve(block + 0.5 * np.diag(np.diag(block)), v)
        assert error(got.value, expected) < 8 * P * 20 * cases.eps(dtype)


@pytest.mark.parametrize("one", OPERATORS)
@pytest.mark.parametrize("other", OPERATORS)
def test_sums_and_multiples(one, other, float64):
    dtype = float64
    whole = operators.add(
        OPERATORS[one].build(ROWS, dtype), operators.scale(0.5, OPERATORS[other].build(ROWS[::-1] * 2, dtype))
    )
    matrix = OPERATORS[one].matrix(ROWS) + 0.5 * OPERATORS[other].matrix(ROWS[::-1] * 2)
    tol = 40 * cases.eps(dtype) * np.linalg.norm(matrix)
    np.testing.assert_allclose(whole.dense(), matrix, rtol=0, atol=tol)
    np.testing.assert_allclose(flat(whole.mv(tree(VECTOR, dtype))), matrix @ VECTOR, rtol=0, atol=4 * tol)
    np.testing.assert_allclose(whole.trace(), np.trace(matrix), rtol=40 * cases.eps(dtype))
    assert isinstance(whole, operators.Sum) != (one == other and one in ("diagonal", "dense", "gram", "low rank")) or {
        one, other
    } <= {"diagonal", "gram", "square gram", "low rank"}  # fmt: skip


def test_the_residuals_of_a_sum_and_of_a_multiple_explain_the_gradient(dtype):
    pairs = (ROWS, RHS[[0] * 9]), (WIDE[:, :P], RHS[:4])
    one, other = (operators.Gram(jnp.asarray(rows, dtype), jnp.asarray(e, dtype)) for rows, e in pairs)
    both = operators.add(one, operators.scale(4.0, other))
    expected = ROWS.T @ RHS[[0] * 9] + WIDE[:, :P].T @ RHS[:4]
    np.testing.assert_allclose(both.transposed_times(both.residual), expected, atol=50 * cases.eps(dtype))
    with pytest.raises(ValueError, match=r"c: expected one number ≥ 0, got -1\.0"):
        operators.scale(-1.0, one)


def test_an_operator_without_a_diagonal_names_the_cure(dtype):
    op = operators.Implicit(lambda v, a: a @ v, jnp.zeros(P, dtype), jnp.asarray(ROWS, dtype))
    matrix, g = ROWS.T @ ROWS, jnp.asarray(RHS, dtype)
    for rule in (0.1, damping.trace(0.1), damping.layered(0.1)):
        with pytest.raises(TypeError, match=r"damping: .*diag=.*absolute"):
            solvers.solve(op, g, solver=solvers.cg(), damping=rule)
    double = damping.metric(0.5, operators.Diagonal(2 * jnp.ones(P, dtype)))
    for rule, added in ((damping.absolute(0.5), np.eye(P)), (double, 2 * np.eye(P))):
        got = solvers.solve(op, g, solver=solvers.cg(1e-12), damping=rule)
        assert error(got.value, np.linalg.solve(matrix + 0.5 * added, RHS)) < 800 * cases.eps(dtype)


def test_chunks_change_nothing(monkeypatch, dtype):
    whole, factors = OPERATORS["gram"].build(ROWS, dtype), jnp.arange(1.0, P + 1, dtype=dtype)
    views = lambda: (whole.dense(), whole.kernel(factors), whole.balanced()[1], whole.scale())
    expected = views()
    monkeypatch.setattr(operators.arrays, "CHUNK", 2 * P)
    monkeypatch.setattr(operators.arrays, "SHORTEST", 1)  # two rows, or one column, at a time
    for x, y in zip(views(), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=50 * cases.eps(dtype) * np.abs(y).max())
    products = [
        operators.Implicit(lambda v, a: a @ v, jnp.zeros(P, dtype), jnp.asarray(ROWS, dtype), chunk_size=size)
        for size in (None, 2, 9)
    ]
    for op in products:
        np.testing.assert_allclose(
            op.mv(jnp.asarray(VECTOR, dtype)), ROWS.T @ ROWS @ VECTOR, rtol=200 * cases.eps(dtype)
        )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_scale_of_rows_of_any_size_and_its_derivative(monkeypatch, size, dtype):
    """∂‖a_j‖/∂a_ij = a_ij/‖a_j‖, and 0 where a column is; all at once and a column at a time."""
    rows = ROWS.copy()
    rows[:, 2] = 0
    lengths, c = np.linalg.norm(rows, axis=0), np.arange(1.0, P + 1)
    expected = c * rows / np.where(lengths > 0, lengths, 1)
    for chunk in (operators.arrays.CHUNK, 1):
        monkeypatch.setattr(operators.arrays, "CHUNK", chunk)
        monkeypatch.setattr(operators.arrays, "NARROWEST", 1)
        given = jnp.asarray(size * rows, dtype)
        np.testing.assert_allclose(operators.Gram(given).scale(), size * lengths, rtol=20 * cases.eps(dtype))
        for derivative in (jax.grad, jax.jacfwd):
            got = derivative(lambda a: c @ operators.Gram(a).scale())(given)
            np.testing.assert_allclose(got, expected, atol=50 * cases.eps(dtype))


def test_an_inner_product_on_the_outputs(dtype):
    op = operators.Implicit(
        lambda v, a: a @ v, jnp.zeros(P, dtype), jnp.asarray(ROWS, dtype),
        inner_product=operators.Diagonal(jnp.arange(1.0, 10, dtype=dtype)),
    )  # fmt: skip
    expected = ROWS.T @ np.diag(np.arange(1.0, 10)) @ ROWS
    np.testing.assert_allclose(op.dense(), expected, atol=100 * cases.eps(dtype) * np.abs(expected).max())


# Many small systems: the elimination that is unrolled.


@pytest.mark.parametrize("p", [1, 2, 3, 6, 14, 15])
def test_small_systems_under_vmap(p, dtype):
    """Batched, batched in one argument, nested, and alone; more systems than a tile holds; one that is indefinite."""
    rng = np.random.default_rng(p)
    rows, g = rng.normal(size=(301, p + 3, p)), rng.normal(size=(301, p))
    matrices = np.swapaxes(rows, 1, 2) @ rows
    matrices[7, 0, 0] = -1.0
    solve = jax.jit(lambda m, b: solvers.solve(operators.Dense(m), b, solver=solvers.cholesky()))
    a, b = jnp.asarray(matrices, dtype), jnp.asarray(g, dtype)
    got = jax.vmap(solve)(a, b)
    good = np.arange(301) != 7
    assert not bool(got.converged[7]) and bool(got.converged[good].all())
    expected = np.linalg.solve(matrices[good], g[good][..., None])[..., 0]
    tol = 100 * p * np.linalg.cond(matrices[good]) * cases.eps(dtype)
    size = np.linalg.norm(expected, axis=1)
    assert (np.linalg.norm(got.value[good] - expected, axis=1) < tol * size).all()
    alone, nested = solve(a[0], b[0]).value, jax.vmap(jax.vmap(solve))(a[None, :3], b[None, :3]).value[0]
    assert error(alone, expected[0]) < tol[0]
    assert error(nested, expected[:3]) < tol[:3].max()
    one_matrix = jax.vmap(solve, (None, 0))(a[0], b[:4]).value
    expected = np.linalg.solve(matrices[0], g[:4].T).T
    assert error(one_matrix, expected) < tol[0]
    derivative = jax.vmap(jax.grad(lambda m, b: solve(m, b).value.sum(), 1))(a[:3], b[:3])
    assert error(derivative, np.linalg.solve(matrices[:3], np.ones((3, p, 1)))[..., 0]) < tol[:3].max()


# Conjugate gradients, where peers fail.


def spread(condition, p=60):
    """A matrix of unit diagonal scale and the given condition number, and the eigenvectors it is made of."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(p, p)))[0]
    return cases.rounded((q * np.logspace(-np.log10(condition), 0, p)) @ q.T)


def test_small_curvature_is_not_a_breakdown():
    """pᵀAp ≪ eps·n·|r|²: a matrix of size 1e-9, in float32."""
    matrix = 1e-9 * spread(100.0)
    g = np.ones(60)
    rows = jnp.asarray(np.linalg.cholesky(matrix).T, jnp.float32)
    op = operators.Implicit(lambda v, a: a @ v, jnp.zeros(60, jnp.float32), rows)
    got = solvers.solve(op, jnp.asarray(g, jnp.float32), solver=solvers.cg(1e-4))
    assert bool(got.converged) and np.isfinite(got.value).all()
    assert error(got.value, np.linalg.solve(matrix, g)) < 1e-2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_a_vector_of_less_precision_than_the_parameters(dtype):
    """The answer has the dtype of the vector, whatever f computes in."""
    inner = operators.Dense(2 * jnp.eye(2, dtype=jnp.float32))
    op = operators.Implicit(lambda v, a: a * v, jnp.ones(2), jnp.array([1.0, 3.0]), inner)
    got = op.mv(jnp.array([1, 2], dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, [2, 36])


@pytest.mark.parametrize("c", [2.0**-100, 2.0**-63, 0.0625, 2.0**100])
def test_a_zero_entry_and_a_shrinking_gradient(c):
    """The tolerance is reached with an entry of exactly 0, and at every size of the gradient, by the same steps."""
    matrix, g = spread(100.0), np.arange(60.0)
    op = operators.Dense(jnp.asarray(matrix, jnp.float32))
    got = solvers.solve(op, jnp.asarray(c * g, jnp.float32), solver=solvers.cg(1e-5))
    reference = solvers.solve(op, jnp.asarray(g, jnp.float32), solver=solvers.cg(1e-5))
    assert bool(got.converged) and int(got.stats.iterations) == int(reference.stats.iterations)
    assert error(np.asarray(got.value, float) / c, np.linalg.solve(matrix, g)) < 1e-3


def test_the_reported_residual_is_the_true_one(dtype):
    """Also where the recursive residual goes on falling: in float32 at a condition of 1e5."""
    matrix, g = spread(1e5), np.random.default_rng(1).normal(size=60)
    unit = np.sqrt(np.diag(matrix))
    for tolerance, budget in ((1e-3, 1000), (1e-12, 1000), (1e-12, 7)):
        got = solvers.solve(
            operators.Dense(jnp.asarray(matrix, dtype)), jnp.asarray(g, dtype), solver=solvers.cg(tolerance, budget)
        )
        true = np.linalg.norm((g - matrix @ flat(got.value)) / unit) / np.linalg.norm(g / unit)
        noise = (
            60
            * cases.eps(dtype)
            * np.linalg.norm(np.abs(matrix) @ np.abs(flat(got.value)) / unit)
            / np.linalg.norm(g / unit)
        )
        assert abs(float(got.stats.residual) - true) <= noise
        floor = max(tolerance, 32 * cases.eps(dtype))
        assert bool(got.converged) == (float(got.stats.residual) <= floor)
        assert int(got.stats.iterations) <= budget


def test_as_many_steps_as_distinct_eigenvalues(float64):
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))[0]
    matrix = (q * np.repeat([1.0, 5.0, 20.0], 10)) @ q.T
    op = operators.Implicit(lambda v, a: a @ v, jnp.zeros(30), jnp.asarray(np.linalg.cholesky(matrix).T))
    got = solvers.solve(op, jnp.asarray(q.sum(1)), solver=solvers.cg(1e-10))
    assert int(got.stats.iterations) == 3 and bool(got.converged)


def test_a_fixed_budget_is_a_truncated_solve(float64):
    matrix, g = spread(1e4), np.ones(60)
    op = operators.Dense(jnp.asarray(matrix))
    residuals = []
    for budget in (2, 5, 20):
        got = solvers.solve(op, jnp.asarray(g), solver=solvers.cg(None, budget))
        assert int(got.stats.iterations) == budget and bool(got.converged)
        residuals.append(float(got.stats.residual))
        loose = solvers.solve(op, jnp.asarray(g), solver=solvers.cg(1e-10, budget))
        assert not bool(loose.converged)
    assert residuals[0] > residuals[1] > residuals[2] > 0


@pytest.mark.parametrize("make", [solvers.partial_cholesky, solvers.nystrom], ids=["partial_cholesky", "nystrom"])
def test_preconditioners_save_steps_and_keep_the_answer(make, float64):
    """Ten large eigenvalues above a flat floor: Jacobi needs many steps, a rank of ten a few; units do not matter."""
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(10, 80)) * np.logspace(0, 2, 10)[:, None]
    matrix, g = rows.T @ rows + np.eye(80), rng.normal(size=80)
    units = np.logspace(-3, 3, 80)
    steps = []
    for u in (np.ones(80), units):
        op = operators.Dense(jnp.asarray(matrix / np.outer(u, u)))
        plain, helped = (
            solvers.solve(op, jnp.asarray(g / u), solver=solvers.cg(1e-10, preconditioner=m), damping=0.01)
            for m in (None, make(16))
        )
        damped = matrix + 0.01 * np.diag(np.diag(matrix))
        for got in (plain, helped):
            assert bool(got.converged)
            assert error(flat(got.value) / u, np.linalg.solve(damped, g)) < 1e-7
        steps.append((int(plain.stats.iterations), int(helped.stats.iterations)))
    assert steps[0][1] < steps[0][0] / 2
    assert abs(steps[0][1] - steps[1][1]) <= 2 and abs(steps[0][0] - steps[1][0]) <= 2


def test_a_warm_start_saves_steps_and_a_bad_one_does_no_harm(float64):
    matrix, g = spread(1e3), np.ones(60)
    op = operators.Dense(jnp.asarray(matrix))
    tx = ng.transforms.precondition(solvers.cg(1e-8, warm_start=True))
    exact = np.linalg.solve(matrix, g)
    first, state = tx.update(jnp.asarray(g), tx.init(jnp.zeros(60)), operator=op)
    again, _ = tx.update(jnp.asarray(g), state, operator=op)
    assert error(first, exact) < 1e-5 and error(again, exact) < 1e-5
    solver = solvers.cg(1e-8)
    steps = {
        name: solver.apply(solver.factor(op, None), jnp.asarray(g), guess=guess).stats.iterations
        for name, guess in {"none": None, "near": exact * (1 + 1e-6), "far": 1e9 * exact, "nan": exact * np.nan}.items()
    }
    assert steps["near"] < steps["none"] == steps["far"] == steps["nan"]
    nothing, _ = tx.update(jnp.zeros(60), state, operator=op)
    assert not np.asarray(nothing).any()
