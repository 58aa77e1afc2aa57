"""Laws 1, 2, 3, 4, 6 and 7 for operators × solvers × damping rules."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERATORS, RHS, ROWS, RULES, SINGULAR, SOLVERS, UNITS, VECTOR, P, error, flat, tree

import natgrad_jax as ng
from natgrad_jax import operators, solvers

every_operator = pytest.mark.parametrize("kind", OPERATORS)
every_solver = pytest.mark.parametrize(("solver", "kind"), SOLVERS, ids=lambda x: getattr(x, "__class__", str).__name__)
every_rule = pytest.mark.parametrize("rule", RULES)
some_rules = pytest.mark.parametrize("rule", ["none", "absolute"])


def reference(kind, rule, rows=ROWS, rhs=RHS):
    """(G + λD)⁻¹g by numpy in float64, and the condition number that the error bound takes."""
    matrix = OPERATORS[kind].matrix(rows)
    damped = matrix + np.diag(RULES[rule].added(matrix))
    return np.linalg.solve(damped, rhs), max(cases.unit_condition(damped), np.linalg.cond(damped))


@functools.cache
def _compiled(solver, rule):
    return jax.jit(lambda op, g: solvers.solve(op, g, solver=solver, damping=RULES[rule].damping))


def solve(solver, rule, op, g):
    """One program per solver, rule and shape, shared by the laws; that jit changes nothing is a law of its own."""
    return _compiled(solver, rule)(op, g)


def bound(condition, dtype, c=8 * P):
    """c·κ·eps: a backward-stable solve, c for the p-term sums and the least damping 8·p·eps of cholesky."""
    return c * condition * cases.eps(dtype)


# Law 1.


@every_operator
def test_an_operator_is_its_matrix(kind, dtype):
    op, matrix = OPERATORS[kind].build(ROWS, dtype), OPERATORS[kind].matrix(ROWS)
    tol = 4 * P * cases.eps(dtype) * np.linalg.norm(matrix)  # sums of at most 9 products
    dense, v, u = np.asarray(op.dense()), tree(VECTOR, dtype), tree(RHS, dtype)
    np.testing.assert_allclose(dense, matrix, rtol=0, atol=tol)
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=tol)
    assert np.linalg.eigvalsh(dense.astype(float)).min() >= -tol
    np.testing.assert_allclose(flat(op.mv(v)), matrix @ VECTOR, rtol=0, atol=tol * np.linalg.norm(VECTOR))
    np.testing.assert_allclose(flat(op.diagonal()), np.diag(matrix), rtol=0, atol=tol)
    size = np.linalg.norm(VECTOR) * np.linalg.norm(RHS)
    np.testing.assert_allclose(op.inner(u, v), RHS @ matrix @ VECTOR, rtol=0, atol=tol * size)
    np.testing.assert_allclose(op.norm(v), np.sqrt(VECTOR @ matrix @ VECTOR), rtol=50 * cases.eps(dtype))
    assert jax.tree.structure(op.mv(v)) == jax.tree.structure(v) == jax.tree.structure(op.diagonal())


def test_a_closed_operator_is_its_matrix(dtype):
    fam, params = cases.family("full rank", dtype)
    op, matrix = fam.fisher(params), cases.full_rank_matrix(cases.LOWER)
    tol = 20 * cases.eps(dtype) * np.linalg.norm(matrix)
    v = ng.families.FullRankParams(jnp.asarray([1.0, -2.0], dtype), jnp.asarray([[0.5, 0.0], [1.0, -0.25]], dtype))
    np.testing.assert_allclose(op.dense(), matrix, rtol=0, atol=tol)
    np.testing.assert_allclose(flat(op.mv(v)), matrix @ flat(v), rtol=0, atol=tol * 3)
    np.testing.assert_allclose(flat(op.diagonal()), np.diag(matrix), rtol=0, atol=tol)
    np.testing.assert_allclose(op.inner(v, v), flat(v) @ matrix @ flat(v), rtol=0, atol=tol * 9)
    np.testing.assert_allclose(op.norm(v), np.sqrt(flat(v) @ matrix @ flat(v)), rtol=50 * cases.eps(dtype))


@every_operator
def test_balanced_is_a_factorisation(kind, dtype):
    rows = ROWS * UNITS * [1, 1, 0, 1, 1]
    frame, balanced = OPERATORS[kind].build(rows, dtype).balanced()
    frame = np.ones(P) if frame is None else np.asarray(frame).astype(float)
    matrix = OPERATORS[kind].matrix(rows)
    size = np.sqrt(np.outer(np.diag(matrix), np.diag(matrix)))
    got = frame[:, None] * np.asarray(balanced).astype(float) * frame
    np.testing.assert_allclose(
        np.divide(got - matrix, size, where=size > 0, out=0 * size), 0, atol=20 * cases.eps(dtype)
    )


@every_operator
def test_trace_scale_and_rank_bound(kind, dtype):
    op, matrix = OPERATORS[kind].build(ROWS, dtype), OPERATORS[kind].matrix(ROWS)
    np.testing.assert_allclose(op.trace(), np.trace(matrix), rtol=20 * cases.eps(dtype))
    np.testing.assert_allclose(op.scale(), np.sqrt(np.diag(matrix)), rtol=20 * cases.eps(dtype))
    assert op.shows_diagonal and op.max_rank() == P


@every_solver
@every_rule
def test_solve_is_the_dense_solve(solver, kind, rule, dtype):
    expected, condition = reference(kind, rule)
    op = OPERATORS[kind].build(ROWS, dtype)
    got = solve(solver, rule, op, tree(RHS, dtype))
    assert error(got.value, expected) < (1e-10 if dtype == np.float64 else bound(condition, dtype))
    assert error(got.value, expected) < bound(condition, dtype)
    assert bool(got.converged) and int(got.stats.dead) == 0


@every_solver
@pytest.mark.parametrize("rule", ["number", "trace", "absolute"])
def test_one_factorisation_serves_other_strengths(solver, kind, rule, dtype):
    solver = solver or solvers.auto()
    factor = jax.jit(lambda op: solver.factor(op, ng.damping.as_rule(RULES[rule].damping)))
    factored, apply = factor(OPERATORS[kind].build(ROWS, dtype)), jax.jit(solver.apply)
    matrix = OPERATORS[kind].matrix(ROWS)
    weights = {"trace": np.full(P, np.trace(matrix) / P), "absolute": np.ones(P)}.get(rule, np.diag(matrix))
    for strength in (0.0, 0.03, 2.0):
        damped = matrix + strength * np.diag(weights)
        got = apply(factored, tree(RHS, dtype), strength).value
        assert error(got, np.linalg.solve(damped, RHS)) < bound(np.linalg.cond(damped), dtype)


def test_the_closed_solve_inverts_on_the_lower_triangle(dtype):
    fam, params = cases.family("full rank", dtype)
    op = fam.fisher(params)
    v = ng.families.FullRankParams(jnp.asarray([1.0, -2.0], dtype), jnp.asarray([[0.5, 0.0], [1.0, -0.25]], dtype))
    condition = np.linalg.cond(cases.full_rank_matrix(cases.LOWER)[np.ix_([0, 1, 2, 4, 5], [0, 1, 2, 4, 5])])
    for solver in (None, solvers.auto(), solvers.closed()):
        assert error(solvers.solve(op, op.mv(v), solver=solver).value, v) < bound(condition, dtype)


# Law 2.


@every_solver
@pytest.mark.parametrize("rule", [name for name in RULES if RULES[name].covariant])
def test_a_change_of_units_changes_nothing(solver, kind, rule, dtype):
    expected, condition = reference(kind, rule)
    op = OPERATORS[kind].build(ROWS / UNITS, dtype)
    got = solve(solver, rule, op, tree(RHS / UNITS, dtype)).value
    assert error(flat(got) / UNITS, expected) < bound(condition, dtype)


@every_solver
@pytest.mark.parametrize("rule", [name for name in RULES if not RULES[name].covariant])
def test_damping_that_mixes_units_is_not_covariant(solver, kind, rule, dtype):
    expected, _ = reference(kind, rule)
    op = OPERATORS[kind].build(ROWS / UNITS, dtype)
    got = solve(solver, rule, op, tree(RHS / UNITS, dtype)).value
    assert error(flat(got) / UNITS, expected) > 0.05


# Law 3.

EXTREMES = {np.dtype("float32"): (1e-30, 1e-10, 1e30), np.dtype("float64"): (1e-290, 1e-100, 1e290)}


@every_solver
@some_rules
def test_the_scale_of_the_gradient_passes_through(solver, kind, rule, dtype):
    expected, condition = reference(kind, rule)
    op = OPERATORS[kind].build(ROWS, dtype)
    for c in EXTREMES[dtype]:
        got = solve(solver, rule, op, tree(RHS * c, dtype))
        assert error(flat(got.value) / c, expected) < bound(condition, dtype)
        assert bool(got.converged)


@pytest.mark.parametrize("solver", [solvers.cholesky(), solvers.eigh(), None], ids=["cholesky", "eigh", "auto"])
@pytest.mark.parametrize("rule", [name for name in RULES if RULES[name].homogeneous])
def test_rows_whose_squares_underflow_still_solve(solver, rule, dtype):
    expected, condition = reference("gram", rule)
    for c in (1e-25, 1e25) if dtype == np.float32 else (1e-200, 1e200):
        op = OPERATORS["gram"].build(ROWS * c, dtype)
        got = solve(solver, rule, op, tree(RHS * c, dtype))
        assert error(flat(got.value) * c, expected) < bound(condition, dtype)


@pytest.mark.parametrize("solver", [solvers.diagonal(), None], ids=["diagonal", "auto"])
def test_a_diagonal_of_any_size_solves(solver, dtype):
    """Entries over most of the float range; λ·D, its root and g/G must neither overflow nor underflow on the way."""
    low, high = (1e-30, 1e30) if dtype == np.float32 else (1e-290, 1e290)
    entries, g = np.array([low, 1.0, high, low, high]), np.array([low, 3.0, high, 2 * low * 1e-5, 1e-5 * high])
    rules = {"relative": (0.5, 1.5 * entries), "absolute": (ng.damping.absolute(high), entries + high)}
    rules["none"] = (None, entries)
    for damping, total in rules.values():
        got = solvers.solve(ng.operators.Diagonal(tree(entries, dtype)), tree(g, dtype), solver=solver, damping=damping)
        kept = g / total >= float(jnp.finfo(dtype).tiny)  # results below it are flushed
        np.testing.assert_allclose(flat(got.value)[kept], (g / total)[kept], rtol=8 * cases.eps(dtype))
        assert bool(got.converged) and kept.sum() >= 3


@every_operator
def test_norms_neither_overflow_nor_underflow(kind, dtype):
    op, matrix = OPERATORS[kind].build(ROWS, dtype), OPERATORS[kind].matrix(ROWS)
    expected = np.sqrt(VECTOR @ matrix @ VECTOR)
    for c in EXTREMES[dtype]:
        np.testing.assert_allclose(float(op.norm(tree(VECTOR * c, dtype))) / c, expected, rtol=50 * cases.eps(dtype))


def test_the_norm_of_tiny_rows(dtype):
    expected = np.linalg.norm(ROWS @ VECTOR)
    for c in EXTREMES[dtype]:
        got = float(OPERATORS["gram"].build(ROWS * c, dtype).norm(tree(VECTOR, dtype)))
        np.testing.assert_allclose(got / c, expected, rtol=50 * cases.eps(dtype))


# Law 4.


@every_solver
@some_rules
def test_tree_and_flat_vector_agree(solver, kind, rule, dtype):
    if OPERATORS[kind].flat is None:
        return  # has parts by nature
    case = OPERATORS[kind]
    whole = solve(solver, rule, case.build(ROWS, dtype), tree(RHS, dtype))
    plain = solve(solver, rule, case.flat(ROWS, dtype), jnp.asarray(RHS, dtype))
    # The same arithmetic on the same flat numbers; only sums over parameters are taken leaf by leaf.
    assert error(whole.value, plain.value) < bound(reference(kind, rule)[1], dtype) / 4


@every_solver
@some_rules
def test_jit_and_vmap_change_nothing(solver, kind, rule, dtype):
    damping, case = RULES[rule].damping, OPERATORS[kind]
    problems = [(ROWS, RHS), (ROWS[:, ::-1] * 3, VECTOR), (ROWS[::-1] / UNITS, RHS / UNITS)]
    eagerly = lambda op, g: solvers.solve(op, g, solver=solver, damping=damping)
    inputs = [(case.build(rows, dtype), tree(g, dtype)) for rows, g in problems]
    eager = [eagerly(*pair) for pair in inputs]
    batched = jax.jit(jax.vmap(eagerly))(*jax.tree.map(lambda *x: jnp.stack(x), *inputs))
    for i, (rows, g) in enumerate(problems):
        covariant, mixed = cases.unit_condition(case.matrix(rows)), reference(kind, rule, rows, g)[1]
        unit = UNITS if i == 2 else np.ones(P)
        lane = jax.tree.map(lambda x: x[i], batched.value)  # noqa: B023
        if RULES[rule].covariant:
            assert error(flat(lane) / unit, flat(eager[i].value) / unit) < bound(covariant, dtype)
        if bound(mixed, dtype) < 1:
            assert error(solve(solver, rule, *inputs[i]).value, eager[i].value) < bound(mixed, dtype)
            assert error(lane, eager[i].value) < bound(mixed, dtype)


@every_solver
@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_dtype_in_is_dtype_out(solver, kind, half):
    """Half-precision leaves are computed with in float32, and come back as they were."""
    op = jax.tree.map(lambda x: x, OPERATORS[kind].build(ROWS, np.float32))
    g = tree(RHS, np.float32) | {"a": jnp.asarray(RHS[:2], half)}
    got = solvers.solve(op, g, solver=solver).value
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, g)
    exact = np.linalg.solve(OPERATORS[kind].matrix(ROWS), flat(g))
    assert error(got, exact) < float(jnp.finfo(half).eps)  # the rounding of the answer, not of the arithmetic
    assert jax.tree.map(lambda x: x.dtype, op.mv(g)) == jax.tree.map(lambda x: x.dtype, g)


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["diagonal", "gram"])
def test_half_precision_operators_accumulate_in_float32(kind, half):
    rows = np.asarray(jnp.asarray(ROWS, half)).astype(float)
    op = OPERATORS[kind].build(rows, half)
    assert op.dense().dtype == np.float32
    matrix = OPERATORS[kind].matrix(rows)
    if kind == "diagonal":
        matrix = np.diag(np.asarray(jnp.asarray(np.diag(matrix), half)).astype(float))
    np.testing.assert_allclose(op.dense(), matrix, atol=20 * cases.eps(np.float32) * matrix.max())
    got = solvers.solve(op, tree(RHS, half)).value
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(half)}


@every_solver
@some_rules
def test_precision_is_kept(solver, kind, rule, dtype):
    """float32 problems stay float32, also with x64 on."""
    op = OPERATORS[kind].build(ROWS, dtype)
    got = solve(solver, rule, op, tree(RHS, dtype)).value
    assert {x.dtype for x in jax.tree.leaves((got, op.mv(got), op.dense(), op.diagonal()))} == {dtype}
    assert op.norm(got).dtype == op.inner(got, got).dtype == dtype


@every_solver
@some_rules
def test_leaf_order_does_not_matter(solver, kind, rule, dtype):
    if OPERATORS[kind].flat is None:
        return  # has parts by nature
    order = [3, 4, 0, 1, 2]
    expected, condition = reference(kind, rule)
    op = OPERATORS[kind].flat(ROWS[:, order], dtype)
    got = solve(solver, rule, op, jnp.asarray(RHS[order], dtype)).value
    assert error(got, expected[order]) < bound(condition, dtype)


# Law 6.


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("kind", ["dense", "gram"])
@pytest.mark.parametrize(
    ("solver", "damping"),
    [
        (solvers.cholesky(), None),
        (None, None),
        (solvers.eigh(), None),
        (solvers.eigh(), ng.damping.relative(0.0)),
        (solvers.eigh(), ng.damping.absolute(0.0)),
    ],
    ids=["cholesky", "auto", "eigh", "eigh relative", "eigh absolute"],
)
def test_singular_problems_solve_on_the_range(name, kind, solver, damping, dtype):
    rows = SINGULAR[name]
    matrix = rows.T @ rows
    g = matrix @ VECTOR
    got = solvers.solve(OPERATORS[kind].build(rows, dtype), tree(g, dtype), solver=solver, damping=damping)
    assert np.isfinite(flat(got.value)).all() and bool(got.converged)
    # Residual of λ = 8·p·eps, of rounding in G and g, amplified by the smallest eigenvalue in the range.
    spread = np.linalg.cond(rows, 2) if name == "one sample" else _range_condition(matrix)
    assert np.linalg.norm(matrix @ flat(got.value) - g) < bound(spread, dtype) * np.linalg.norm(g)
    dead = int(np.sum(np.diag(matrix) == 0))
    assert int(got.stats.dead) == dead
    # Exactly 0 where D follows G; with D = I eigenvectors mix in a dead coordinate by rounding.
    idle = np.abs(flat(got.value)[np.diag(matrix) == 0])
    assert (idle <= (bound(spread, dtype) if isinstance(damping, ng.damping.Absolute) else 0)).all()


def _range_condition(matrix):
    values = np.linalg.eigvalsh(matrix)
    kept = values[values > 1e-9 * values.max()]
    return float(kept.max() / kept.min())


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("kind", ["dense", "gram"])
def test_eigh_has_minimum_norm_in_the_metric_of_the_damping(name, kind, dtype):
    rows = SINGULAR[name]
    matrix = rows.T @ rows
    g = matrix @ VECTOR
    op, tol = OPERATORS[kind].build(rows, dtype), bound(_range_condition(matrix), dtype)
    least = lambda damping: solvers.solve(op, tree(g, dtype), solver=solvers.eigh(), damping=damping)
    moore_penrose = least(ng.damping.absolute(0.0))
    assert error(moore_penrose.value, np.linalg.pinv(matrix, rcond=1e-9, hermitian=True) @ g) < tol
    root = np.sqrt(np.diag(matrix))
    inverse = np.divide(1, root, where=root > 0, out=np.zeros(P))
    scaled = inverse[:, None] * matrix * inverse
    expected = inverse * (np.linalg.pinv(scaled, rcond=1e-9, hermitian=True) @ (inverse * g))
    assert error(least(None).value, expected) < tol
    assert int(moore_penrose.stats.rank) == int(least(None).stats.rank) == np.linalg.matrix_rank(matrix, rtol=1e-9)


def test_only_eigh_reports_a_rank():
    op, g = OPERATORS["gram"].build(ROWS, np.float32), tree(RHS, np.float32)
    assert int(solvers.solve(op, g, solver=solvers.eigh()).stats.rank) == P
    assert solvers.solve(op, g, solver=solvers.cholesky()).stats.rank is None


def test_an_undamped_singular_cholesky_is_a_flag_not_an_answer(dtype):
    op = ng.operators.Dense(jnp.asarray([[1.0, 1.0], [1.0, 1.0]], dtype))
    got = solvers.solve(op, jnp.asarray([1.0, 2.0], dtype), solver=solvers.cholesky(), damping=0.0)
    assert not bool(got.converged)


@pytest.mark.parametrize("rule", [ng.damping.absolute, ng.damping.trace])
def test_one_number_for_all_damps_what_has_no_curvature(rule, dtype):
    """Dead coordinates where λ is 0, none elsewhere, in lanes and by themselves; rows of 1e±15; NaN among the rows."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 6)) * np.array([1, 1, 0, 1, 1, 1])
    e = rng.normal(size=3)

    def step(strength, rows):
        return solvers.solve(
            ng.operators.Gram(rows), rows.T @ jnp.asarray(e, dtype), solver=solvers.row_space(), damping=rule(strength)
        )

    rows, strengths = jnp.asarray(matrix, dtype), jnp.asarray([0.0, 0.3], dtype)
    lanes = jax.jit(jax.vmap(step, (0, None)))(strengths, rows)
    assert lanes.stats.dead.tolist() == [1, 0] == [int(step(x, rows).stats.dead) for x in (0.0, 0.3)]
    gram = matrix.T @ matrix
    unit = np.trace(gram) / 6 if rule is ng.damping.trace else 1.0
    for value, strength in zip(lanes.value, (0.0, 0.3), strict=True):
        expected = np.linalg.pinv(gram + strength * unit * np.eye(6), rcond=1e-9) @ (matrix.T @ e)
        assert error(value, expected) < 3e3 * cases.eps(dtype)
    for size in (1e-15, 1e15):
        found = step(jnp.asarray(0.3 if rule is ng.damping.trace else 0.3 * size**2, dtype), rows * size)
        assert bool(found.converged) and error(found.value, lanes.value[1] / size) < 300 * cases.eps(dtype)
    assert not np.isfinite(step(0.3, rows.at[0, 0].set(jnp.nan)).value).any()


@every_solver
def test_a_matrix_of_zeros(solver, kind, dtype):
    op = OPERATORS[kind].build(0 * ROWS, dtype)
    got = solve(solver, "none", op, tree(RHS, dtype))
    assert not flat(got.value).any() and int(got.stats.dead) == P
    damped = solve(solver, "absolute", op, tree(RHS, dtype))
    np.testing.assert_allclose(flat(damped.value), RHS / 0.5, rtol=4 * cases.eps(dtype))


# Law 7.


@every_solver
@some_rules
def test_zero_gradient_gives_zero(solver, kind, rule, dtype):
    op = OPERATORS[kind].build(ROWS, dtype)
    got = solve(solver, rule, op, tree(0 * RHS, dtype))
    assert not flat(got.value).any() and bool(got.converged)


@every_solver
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_flagged(solver, kind, bad, dtype):
    good = OPERATORS[kind].build(ROWS, dtype)
    spoiled = RHS.copy()
    spoiled[1] = bad
    assert not bool(solve(solver, "zero", good, tree(spoiled, dtype)).converged)
    rows = ROWS.copy()
    rows[0, 1] = bad
    assert not bool(solve(solver, "zero", OPERATORS[kind].build(rows, dtype), tree(RHS, dtype)).converged)


SHAPES = {
    "empty": ({}, {}),
    "None leaves": ({"a": None, "b": 2.0}, {"a": None, "b": 3.0}),
    "scalar": (2.0, 3.0),
    "p = 1": ([2.0], [3.0]),
    "an empty leaf": ({"a": np.zeros(0), "b": 2.0}, {"a": np.zeros(0), "b": 3.0}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_small_trees(name, dtype):
    """Diagonal 4 and a gradient of 3, in every shape that a tree with at most one number may have."""
    root, g = (cases.cast(x, dtype) for x in SHAPES[name])
    space = ng.operators.Diagonal(root).space
    for op in (
        operators.Diagonal(jax.tree.map(jnp.square, root)),
        operators.Gram(jax.tree.map(lambda x: x[None], root)),
        operators.Dense(4 * jnp.eye(space.size, dtype=dtype), space),
    ):
        for solver in (None, *([] if isinstance(op, operators.Diagonal) else [solvers.cholesky(), solvers.eigh()])):
            got = solvers.solve(op, g, solver=solver)
            assert jax.tree.structure(got.value) == jax.tree.structure(g)
            np.testing.assert_allclose(flat(got.value), flat(g) / 4, rtol=8 * cases.eps(dtype))
            assert bool(got.converged)
        np.testing.assert_allclose(op.norm(g), 2 * np.linalg.norm(flat(g)), rtol=8 * cases.eps(dtype))


# Bad input.


def _solve(op, g=RHS, **options):
    return lambda: solvers.solve(op(), jnp.asarray(g, jnp.float32), **options)


_diagonal = lambda: operators.Diagonal(jnp.ones(P))
_dense = lambda: operators.Dense(jnp.eye(P))


def _solve_closed(**options):
    fam = ng.families.gaussian_full_rank(1)
    return lambda: solvers.solve(fam.fisher(fam.init()), fam.init(), **options)


MISTAKES = {
    "diagonal solver, dense operator": (_solve(_dense, solver=solvers.diagonal()), TypeError, "diagonal.*Dense"),
    "qr, diagonal operator": (_solve(_diagonal, solver=solvers.qr()), TypeError, "qr.*Diagonal.*eigh"),
    "row_space, closed operator": (_solve_closed(solver=solvers.row_space()), TypeError, "row_space.*Closed"),
    "closed solver, dense operator": (_solve(_dense, solver=solvers.closed()), TypeError, "closed.*Dense"),
    "row_space, more rows than parameters": (
        _solve(lambda: operators.Gram(jnp.ones((6, P))), solver=solvers.row_space()),
        TypeError,
        "6 rows on 5.*cholesky",
    ),
    "a tolerance that is none": (lambda: solvers.cg(0.0), ValueError, "tolerance.*got 0.0"),
    "a budget that is none": (lambda: solvers.cg(max_steps=0), ValueError, "max_steps.*got 0"),
    "a preconditioner that is none": (lambda: solvers.cg(preconditioner=3), TypeError, "preconditioner.*got 3"),
    "a preconditioner as hard as G": (
        _solve(_dense, solver=solvers.cg(preconditioner=lambda op: op)),
        TypeError,
        "preconditioner.*Dense",
    ),
    "a rank of zero": (lambda: solvers.nystrom(0), ValueError, "rank.*got 0"),
    "damping by a matrix": (lambda: ng.damping.metric(1.0, _dense()), TypeError, "metric.*Dense.*operators.add"),
    "damping by a metric of another shape": (
        _solve(_dense, damping=ng.damping.metric(1.0, operators.Diagonal(jnp.ones(2)))),
        ValueError,
        "damping.*structure",
    ),
    "adding nothing": (lambda: operators.add(), ValueError, "operators.*none"),
    "adding different spaces": (
        lambda: operators.add(_dense(), operators.Diagonal(jnp.ones(2))),
        ValueError,
        "operators.*structure",
    ),
    "weights of another length": (
        lambda: operators.Gram.from_samples(jnp.ones((3, 2)), weights=jnp.ones(2)),
        ValueError,
        r"n = 3.*\(2,\)",
    ),
    "a matrix of 4096 rows unasked": (
        lambda: solvers.solve(operators.Implicit(lambda v, _: v, jnp.ones(4096)), jnp.ones(4096)),
        TypeError,
        "solvers.cg",
    ),
    "an array as operator, a solver given": (
        _solve(lambda: jnp.eye(P), solver=solvers.eigh()),
        TypeError,
        "wrap a matrix as operators.Dense",
    ),
    "a solver that was not called": (_solve(_dense, solver=solvers.eigh), TypeError, "solver: expected.*eigh"),
    "integers": (lambda: _dense().mv(jnp.ones(P, int)), TypeError, "v: expected floating-point.*int"),
    "a residual of another length": (
        _solve(lambda: operators.Gram(jnp.ones((2, P)), jnp.ones(3))),
        ValueError,
        r"residual.*n = 2.*\(3,\)",
    ),
    "rows of different lengths": (
        lambda: operators.Gram({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}).dense(),
        ValueError,
        "rows: expected n rows",
    ),
    "a base of another shape": (
        lambda: operators.LowRank(jnp.ones(1), jnp.ones((2, 3))).dense(),
        ValueError,
        "base.*structure",
    ),
    "negative weights": (
        lambda: operators.Gram.from_samples(jnp.ones((2, 2)), weights=-jnp.ones(2)),
        ValueError,
        "weights.*≥ 0",
    ),
    "a Kronecker factor that is not square": (
        lambda: operators.Kronecker(jnp.ones((2, 3)), jnp.eye(2)).dense(),
        ValueError,
        "left, right.*square",
    ),
    "an array as operator": (_solve(lambda: jnp.eye(P)), TypeError, "wrap a matrix as operators.Dense"),
    "damping a closed form": (_solve_closed(damping=0.1), TypeError, "damping.*cholesky"),
    "a matrix that is not square": (_solve(lambda: operators.Dense(jnp.ones((5, 2)))), ValueError, r"square.*\(5, 2\)"),
    "negative damping": (_solve(_dense, damping=-0.1), ValueError, "λ ≥ 0, got -0.1"),
    "negative absolute damping": (lambda: ng.damping.absolute(-1.0), ValueError, "λ ≥ 0"),
    "NaN damping": (lambda: ng.damping.trace(float("nan")), ValueError, "λ ≥ 0"),
    "a vector of dampings": (lambda: ng.damping.relative(jnp.ones(2)), ValueError, r"shape \(2,\)"),
    "a damping rule that was not called": (_solve(_dense, damping=ng.damping.relative), TypeError, "damping"),
    "wrong length": (_solve(_dense, g=RHS[:2]), ValueError, r"rhs.*\(5,\).*\(2,\)"),
    "wrong tree": (lambda: solvers.solve(_dense(), {"a": jnp.ones(P)}), ValueError, "rhs.*structure"),
    "wrong tree in mv": (lambda: _diagonal().mv({"a": jnp.ones(P)}), ValueError, "v.*structure"),
}


test_mistakes_are_named = cases.named_mistakes(MISTAKES)


def test_a_traced_negative_damping_is_a_flag(dtype):
    op, g = OPERATORS["dense"].build(ROWS, dtype), tree(RHS, dtype)
    for solver in (solvers.cholesky(), solvers.eigh()):
        fine = jax.jit(lambda strength: solvers.solve(op, g, solver=solver, damping=strength).converged)  # noqa: B023
        assert bool(fine(0.5)) and not bool(fine(-0.5))


def test_an_indefinite_matrix_is_a_flag(dtype):
    """Not a metric: no solver may make a plausible step of it, unless the damping makes it one."""
    op, g = operators.Dense(jnp.asarray([[1.0, 2.0], [2.0, 1.0]], dtype)), jnp.ones(2, dtype)
    for solver in (None, solvers.cholesky(), solvers.eigh()):
        assert not bool(solvers.solve(op, g, solver=solver).converged)
        assert bool(solvers.solve(op, g, solver=solver, damping=2.0).converged)


def test_choices_that_differ_compare_as_different():
    """Choices are static arguments: were two equal, `jit` would serve one with the program of the other."""
    plain = "diagonal closed cholesky eigh qr row_space woodbury kronecker blockwise auto cg"
    choices = [getattr(solvers, name)() for name in plain.split()]
    choices += [solvers.cg(1e-3), solvers.cg(None), solvers.cg(max_steps=5), solvers.cg(warm_start=True)]
    choices += [
        solvers.cg(preconditioner=f(rank)) for f in (solvers.nystrom, solvers.partial_cholesky) for rank in (2, 3)
    ]
    choices += [solvers.blockwise(solvers.eigh())]
    choices += [f(0.5) for f in (ng.damping.relative, ng.damping.absolute, ng.damping.trace, ng.damping.layered)]
    for i, a in enumerate(choices):
        for j, b in enumerate(choices):
            assert (a == b) == (i == j)
