"""The optax contract, exactness of natural gradients, trust region, units and scale of whole trajectories."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ROWS, UNITS, error, flat, tree

import natgrad_jax as ng
from natgrad_jax import metrics, operators, transforms


def gram(params, *, batch):
    """A metric with data: rows given from outside."""
    return operators.Gram(jax.tree.map(lambda x, p: x.astype(p.dtype), batch, params))


def params_and_data(dtype, scale=1.0):
    return tree(cases.VECTOR * scale, dtype), tree(cases.RHS, dtype), tree(ROWS, dtype)


def stepped(tx, theta, g, steps=1, **data):
    state, update = tx.init(theta), jax.jit(lambda g, state, theta: tx.update(g, state, theta, **data))
    for _ in range(steps):
        updates, state = update(g, state, theta)
        theta = optax.apply_updates(theta, updates)
    return theta, state


def expected_direction():
    return np.linalg.solve(ROWS.T @ ROWS, cases.RHS)


TOL = {np.dtype("float32"): 2e-4, np.dtype("float64"): 1e-11}  # c·κ·eps with κ = 20 and c = 80

TRANSFORMATIONS = {
    "scale_by_metric": lambda: ng.scale_by_metric(gram),
    "natural_gradient": lambda: ng.natural_gradient(0.5, gram),
    "with a bound": lambda: ng.natural_gradient(0.5, gram, max_kl=0.1),
    "with a schedule": lambda: ng.natural_gradient(optax.linear_schedule(1.0, 0.1, 10), gram, damping=0.1),
    "eigh": lambda: ng.natural_gradient(0.5, gram, solver=ng.solvers.eigh()),
    "cg from the last step": lambda: ng.natural_gradient(0.5, gram, solver=ng.solvers.cg(1e-12, warm_start=True)),
    "nested by hand": lambda: transforms.with_metric(
        gram, transforms.trust_region(transforms.scale_step(transforms.precondition(), 0.5), 0.1)
    ),
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


@every_transformation
def test_state_is_arrays_and_keeps_its_shape(name, dtype):
    tx, (theta, g, rows) = TRANSFORMATIONS[name](), params_and_data(dtype)
    state = tx.init(theta)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    updates, new = tx.update(g, state, theta, batch=rows)
    describe = lambda s: jax.tree.map(lambda x: (x.shape, x.dtype), s)
    assert describe(new) == describe(state)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, theta)


@every_transformation
def test_scan_is_a_loop_and_jit_traces_once(name, dtype):
    tx, (theta, g, rows) = TRANSFORMATIONS[name](), params_and_data(dtype)
    traces = []

    def body(carry, batch):
        traces.append(1)
        theta, state = carry
        updates, state = tx.update(g, state, theta, batch=batch)
        return (optax.apply_updates(theta, updates), state), None

    batches = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), rows)
    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, batches))((theta, tx.init(theta)))
    del traces[:]
    step, carry = jax.jit(body), (theta, tx.init(theta))
    for i in range(3):
        carry, _ = step(carry, jax.tree.map(lambda x: x[i], batches))  # noqa: B023
    assert len(traces) == 1
    assert error(carry[0], scanned) < TOL[dtype]
    assert error(scanned, theta) > 1e-3


@every_transformation
def test_vmap_is_a_loop(name, dtype):
    """Own parameters, own gradients, own data."""
    tx, (theta, g, rows) = TRANSFORMATIONS[name](), params_and_data(dtype)
    run = lambda theta, g, rows: stepped(tx, theta, g, steps=2, batch=rows)[0]
    lanes = [jax.tree.map(lambda x: x * c, (theta, g, rows)) for c in (1.0, -2.0, 3.0)]  # noqa: B023
    together, alone = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *x: jnp.stack(x), *lanes)), jax.jit(run)
    for i, lane in enumerate(lanes):
        assert error(jax.tree.map(lambda x: x[i], together), alone(*lane)) < TOL[dtype]  # noqa: B023


@every_transformation
def test_unknown_arguments_are_ignored(name, dtype):
    tx, (theta, g, rows) = TRANSFORMATIONS[name](), params_and_data(dtype)
    plain, _ = tx.update(g, tx.init(theta), theta, batch=rows)
    extra, _ = tx.update(g, tx.init(theta), theta, batch=rows, value=1.0, weather="rain")
    assert error(extra, plain) == 0


def test_the_direction_is_the_dense_solve(dtype):
    theta, g, rows = params_and_data(dtype)
    tx = ng.scale_by_metric(gram)
    d, state = tx.update(g, tx.init(theta), theta, batch=rows)
    assert error(d, expected_direction()) < TOL[dtype]
    assert int(state.count) == 1 and int(state.skipped) == 0 and bool(state.converged)
    assert int(state.dead) == 0 and int(state.rank) == -1
    eigh = ng.scale_by_metric(gram, solver=ng.solvers.eigh())
    assert int(eigh.update(g, eigh.init(theta), theta, batch=rows)[1].rank) == 5
    step, _ = ng.natural_gradient(0.5, gram).update(g, ng.natural_gradient(0.5, gram).init(theta), theta, batch=rows)
    assert error(step, -0.5 * expected_direction()) < TOL[dtype]


def test_chain_inject_multisteps_and_apply_if_finite(dtype):
    theta, g, rows = params_and_data(dtype)
    expected = flat(theta) - 0.25 * expected_direction()
    wrapped = {
        "chain": optax.chain(ng.scale_by_metric(gram), optax.scale(-0.25)),
        "chain after": optax.chain(optax.clip_by_global_norm(1e6), ng.natural_gradient(0.25, gram)),
        "inject": optax.inject_hyperparams(ng.natural_gradient, static_args=("metric",))(0.25, metric=gram),
        "apply_if_finite": optax.apply_if_finite(ng.natural_gradient(0.25, gram), 3),
    }
    for tx in wrapped.values():
        assert error(stepped(tx, theta, g, batch=rows)[0], expected) < TOL[dtype]
    tx = optax.MultiSteps(ng.natural_gradient(0.25, gram), 2)
    assert error(stepped(tx, theta, g, steps=1, batch=rows)[0], theta) == 0
    assert error(stepped(tx, theta, g, steps=2, batch=rows)[0], expected) < TOL[dtype]


def test_an_injected_learning_rate_can_be_changed_without_retracing(dtype):
    theta, g, rows = params_and_data(dtype)
    tx = optax.inject_hyperparams(ng.natural_gradient, static_args=("metric",))(0.25, metric=gram)
    traces = []

    @jax.jit
    def update(state):
        traces.append(1)
        return tx.update(g, state, theta, batch=rows)

    state = tx.init(theta)
    small, state = update(state)
    state.hyperparams["learning_rate"] = 2 * state.hyperparams["learning_rate"]
    large, _ = update(state)
    assert error(large, 2 * flat(small)) < 4 * cases.eps(dtype) and len(traces) == 1


def test_data_with_a_default_is_forwarded_only_if_given():
    def metric(params, *, batch, weight=2.0):
        del batch
        return operators.Diagonal(weight * jnp.ones_like(params))

    tx, theta = ng.scale_by_metric(metric), jnp.ones(2)
    for data, expected in (({}, 0.5), ({"weight": 4.0}, 0.25)):
        d, _ = tx.update(theta, tx.init(theta), theta, batch=0, **data)
        np.testing.assert_allclose(d, expected, rtol=4 * cases.eps(np.float32))


def test_the_last_word_on_damping_is_that_of_the_call():
    tx, theta = ng.scale_by_metric(metrics.scales(1.0), damping=1.0), jnp.ones(2)
    for call, expected in (({}, 0.5), ({"damping": 3.0}, 0.25)):
        d, _ = tx.update(theta, tx.init(theta), theta, **call)
        np.testing.assert_allclose(d, expected, rtol=4 * cases.eps(np.float32))


# Not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["gradient", "metric"])
def test_a_step_that_is_not_finite_is_not_taken(bad, where, dtype):
    theta, g, rows = params_and_data(dtype)
    tx = ng.natural_gradient(1.0, gram, max_kl=100.0)
    spoil = lambda t: t | {"b": t["b"] * bad}
    g_bad, rows_bad = (spoil(g), rows) if where == "gradient" else (g, spoil(rows))
    updates, state = jax.jit(tx.update)(g_bad, tx.init(theta), theta, batch=rows_bad)
    assert not flat(updates).any()
    inner = state.inner.inner
    assert int(inner.skipped) == 1 and int(inner.count) == 0 and not bool(inner.converged)
    updates, state = tx.update(g, state, theta, batch=rows)
    inner = state.inner.inner
    assert error(updates, -expected_direction()) < TOL[dtype]
    assert int(inner.skipped) == 1 and int(inner.count) == 1 and bool(inner.converged)


def test_a_zero_gradient_is_a_zero_step(dtype):
    theta, g, rows = params_and_data(dtype)
    zero = jax.tree.map(jnp.zeros_like, g)
    for make in TRANSFORMATIONS.values():
        assert not flat(make().update(zero, make().init(theta), theta, batch=rows)[0]).any()


@pytest.mark.parametrize("theta", [{}, {"a": None, "b": 1.0}, 1.0, [1.0]], ids=str)
def test_small_trees(theta, dtype):
    theta = cases.cast(theta, dtype)
    tx = ng.natural_gradient(0.5, metrics.scales(2.0), max_kl=1e3)
    updates, _ = tx.update(theta, tx.init(theta), theta)
    assert jax.tree.structure(updates) == jax.tree.structure(theta)
    np.testing.assert_allclose(flat(updates), -0.5 * 4 * flat(theta), rtol=8 * cases.eps(dtype))


# Trust region.


@pytest.mark.parametrize("max_kl", [1e-6, 0.1, 1e4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_bound_is_met_exactly_or_not_at_all(max_kl, size, dtype):
    theta, g, rows = params_and_data(dtype)
    g = jax.tree.map(lambda x: x * jnp.asarray(size, dtype), g)
    tx = ng.natural_gradient(0.5, gram, max_kl=max_kl)
    s = flat(tx.update(g, tx.init(theta), theta, batch=rows)[0])
    free = -0.5 * size * expected_direction()
    free_kl = 0.5 * np.linalg.norm(ROWS @ free) ** 2
    kl = 0.5 * np.linalg.norm(ROWS @ s) ** 2
    if free_kl > max_kl:
        np.testing.assert_allclose(kl, max_kl, rtol=TOL[dtype])
    assert error(s, free * min(1, np.sqrt(max_kl / free_kl))) < TOL[dtype]


@pytest.mark.parametrize("c", [1e-20, 1e20])
def test_the_bound_holds_for_gradients_of_any_size(c):
    """A norm computed by squaring would be 0 or infinite in float32."""
    theta, g, rows = params_and_data(np.float32)
    tx = ng.natural_gradient(1.0, gram, max_kl=0.1)
    s = tx.update(jax.tree.map(lambda x: x * np.float32(c), g), tx.init(theta), theta, batch=rows)[0]
    free = -expected_direction() * c
    scale = min(1, np.sqrt(0.1) / (np.linalg.norm(ROWS @ free) / np.sqrt(2)))
    assert error(flat(s) / (c * scale), -expected_direction()) < TOL[np.dtype("float32")]


def test_the_bound_uses_the_metric_without_its_damping(dtype):
    theta, g, rows = params_and_data(dtype)
    tx = ng.natural_gradient(1.0, gram, damping=5.0, max_kl=1e-3)
    s = flat(tx.update(g, tx.init(theta), theta, batch=rows)[0])
    np.testing.assert_allclose(0.5 * np.linalg.norm(ROWS @ s) ** 2, 1e-3, rtol=TOL[dtype])


def test_a_schedule_counts_steps(dtype):
    theta, g, rows = params_and_data(dtype)
    tx = ng.natural_gradient(optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.5}), gram)
    total = stepped(tx, theta, g, steps=3, batch=rows)[0]
    assert error(flat(total) - flat(theta), -1.75 * expected_direction()) < 2 * TOL[dtype]


# Exactness in exponential families.

TARGET = np.array([0.5, -1.5, 2.0])


def test_one_unit_step_is_exact_for_independent_bits(dtype):
    """Reverse KL to a member of the family, natural parameters."""
    family = ng.families.bernoulli(3)
    target, start = jnp.asarray(TARGET, dtype), jnp.asarray([0.0, 0.25, 1.0], dtype)
    kl = ng.inference.exact_kl(family.log_prob, lambda x: family.log_prob(target, x), family.support(dtype))
    for metric in (family.fisher, metrics.fisher(family.log_prob, family.support(dtype))):
        theta, _ = stepped(ng.natural_gradient(1.0, metric), start, jax.jit(jax.grad(kl))(start))
        # F is well conditioned (p(1−p) between .10 and .25); the gradient is a sum of 8 terms of size 1.
        assert error(theta, TARGET) < 400 * cases.eps(dtype)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_error_shrinks_by_the_same_factor_every_step(rate, float64):
    family = ng.families.bernoulli(3, values=(-1, 1))
    target, theta = jnp.asarray(TARGET), jnp.array([0.0, 0.25, 1.0])
    start = np.asarray(theta)
    kl = ng.inference.exact_kl(family.log_prob, lambda x: family.log_prob(target, x), family.support())
    tx = ng.natural_gradient(rate, family.fisher)
    state, gradient = tx.init(theta), jax.jit(jax.grad(kl))
    for t in range(1, 8):
        updates, state = tx.update(gradient(theta), state, theta)
        theta = theta + updates
        np.testing.assert_allclose(theta - TARGET, (1 - rate) ** t * (start - TARGET), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_softmax_logits_follow_the_geometric_path(rate, chunk_size, float64):
    """log q_t = (1−ρ)ᵗ log q_0 + (1−(1−ρ)ᵗ) log p + const, for any target on a finite set; F is singular."""
    log_p, logits = np.log([0.1, 0.2, 0.3, 0.4]), jnp.array([1.0, 0.0, -1.0, 0.5])
    start = np.asarray(logits)
    kl = ng.inference.exact_kl(cases._categorical, lambda k: jnp.asarray(log_p)[k], jnp.arange(4))
    for solver, tol in ((ng.solvers.eigh(), 1e-10), (None, 1e-9)):
        tx = ng.natural_gradient(
            rate, metrics.fisher(cases._categorical, jnp.arange(4), chunk_size=chunk_size), solver=solver
        )
        theta, state, update = logits, tx.init(logits), jax.jit(tx.update)
        gradient = jax.jit(jax.grad(kl))
        for t in range(1, 5):
            updates, state = update(gradient(theta), state, theta)
            theta = theta + updates
            left = (1 - rate) ** t
            expected = left * start + (1 - left) * log_p
            centred = lambda x: np.asarray(x) - np.mean(x)
            np.testing.assert_allclose(centred(theta), centred(expected), atol=tol)


def test_linear_least_squares_takes_one_step(dtype):
    y, rows = cases.rounded(np.linspace(-1, 2, len(ROWS))), tree(ROWS, dtype)
    theta = tree(cases.VECTOR, dtype)
    residuals = ROWS @ cases.VECTOR - y
    g = tree(ROWS.T @ residuals, dtype)
    solution = np.linalg.lstsq(ROWS, y, rcond=None)[0]
    got, _ = stepped(ng.natural_gradient(1.0, gram), theta, g, batch=rows)
    assert np.linalg.norm(flat(got) - solution) < TOL[dtype] * np.linalg.norm(cases.VECTOR)


# Units and scale of whole trajectories.


def trajectory(unit, dtype, loss_scale=1.0, rate=0.5, max_kl=0.05, steps=6, damping=None, learning=None):
    """Softplus regression with parameters measured in `unit`: θ' = unit·θ; the metric is that of its residuals."""
    rows = jnp.asarray(ROWS / unit, dtype)
    target = jnp.asarray(np.linspace(0.5, 2.0, len(ROWS)), dtype)

    def residuals(theta):
        return jax.nn.softplus(rows @ theta) - target

    metric = lambda theta: operators.Gram(jax.jacfwd(residuals)(theta))
    tx = ng.natural_gradient(rate, metric, max_kl=max_kl, damping=damping)
    gradient = jax.grad(lambda theta: 0.5 * loss_scale * jnp.sum(residuals(theta) ** 2))

    def body(carry, _):
        theta, state = carry
        updates, state = tx.update(gradient(theta), state, theta)
        theta = theta + updates
        return (theta, state), theta

    theta = jnp.asarray(cases.VECTOR * unit, dtype)
    path = jax.jit(lambda theta: jax.lax.scan(body, (theta, tx.init(theta)), None, length=steps)[1])(theta)
    return np.asarray(path, float) / unit


@pytest.mark.parametrize("damping", [None, 0.1])
@pytest.mark.parametrize("max_kl", [0.05, None])
def test_the_trajectory_does_not_depend_on_units(damping, max_kl, dtype):
    one = trajectory(np.ones(5), dtype, max_kl=max_kl, damping=damping)
    other = trajectory(UNITS, dtype, max_kl=max_kl, damping=damping)
    # Six steps, κ of the unit-diagonal Gram of the curved model up to 100 along the path.
    np.testing.assert_allclose(other, one, atol=6 * 40 * 100 * cases.eps(dtype) * np.abs(one).max())
    assert np.abs(one[-1] - one[0]).max() > 0.05


def test_absolute_damping_does_depend_on_units(dtype):
    paths = [trajectory(u, dtype, damping=ng.damping.absolute(0.1)) for u in (np.ones(5), UNITS)]
    assert np.abs(paths[0] - paths[1]).max() > 0.01


@pytest.mark.parametrize("c", [1e-2, 1e4, 1e20])
def test_the_scale_of_the_loss_does_not_change_a_step_of_fixed_kl(c, dtype):
    """With a rate at which the bound is active for every loss."""
    one = trajectory(np.ones(5), dtype, rate=1e4, max_kl=1e-3, steps=3)
    other = trajectory(np.ones(5), dtype, rate=1e4, max_kl=1e-3, steps=3, loss_scale=c)
    np.testing.assert_allclose(other, one, atol=3 * 40 * 100 * cases.eps(dtype) * np.abs(one).max())


def test_metres_and_centimetres_in_one_step(dtype):
    """L = ½Σ(θ_i/s_i)² is done in one step by the metric of its scales, in any units."""
    for size in (1.0, 0.01, 1e-6):
        s = jnp.asarray([1.0, 0.01 / size], dtype)
        theta = jnp.asarray([1.0, 1.0], dtype)
        tx = ng.natural_gradient(1.0, metrics.scales(s))
        g = jax.grad(lambda t: 0.5 * jnp.sum((t / s) ** 2))(theta)  # noqa: B023
        assert np.abs(stepped(tx, theta, g)[0]).max() < 8 * cases.eps(dtype)


# Retraction.


@pytest.mark.parametrize("size", [1.0, -1.0, 100.0, -100.0])
def test_retract_turns_any_step_into_a_member(size, float64):
    fam, params = cases.family("full rank", float64)
    tx = transforms.retract(fam)
    step = jax.tree.map(lambda x: size * jnp.ones_like(x), params)
    update, _ = tx.update(step, tx.init(params), params)
    target = fam.retract(params, step)
    reached = optax.apply_updates(params, update)
    scale = max(np.abs(flat(target)).max(), 1)
    assert np.abs(flat(reached) - flat(target)).max() <= 4 * cases.eps(float64) * scale
    # L·R with diag R = exp(L⁻¹δL): the determinant grows by the exponential of the trace.
    inverse_step = np.linalg.solve(cases.LOWER, size * np.tril(np.ones((2, 2))))
    log_diagonal = np.log(np.diag(cases.LOWER)) + np.clip(np.diag(inverse_step), -20, 20)
    np.testing.assert_allclose(np.log(np.diag(target.scale_tril)), log_diagonal, rtol=1e-12)


def test_retract_is_first_order_right(float64):
    fam, params = cases.family("full rank", float64)
    tx, gaps = transforms.retract(fam), []
    for h in (1e-3, 1e-4):
        step = jax.tree.map(lambda x: jnp.tril(h * jnp.ones_like(x)) if x.ndim == 2 else h * x, params)  # noqa: B023
        gaps.append(np.linalg.norm(flat(tx.update(step, tx.init(params), params)[0]) - flat(step)))
    assert 80 < gaps[0] / gaps[1] < 120  # quadratic


# Bad input.

THETA = np.ones(2, np.float32)


def _update(tx, g=THETA, params=THETA, **data):
    return lambda: tx.update(jnp.asarray(g) if isinstance(g, np.ndarray) else g, tx.init(THETA), params, **data)


def _with_kwargs(params, **data):
    return operators.Diagonal(params)


def _reserved(params, *, value):
    return operators.Diagonal(params)


_scales = ng.scale_by_metric(metrics.scales(1.0))
MISTAKES = {
    "params=None": (_update(_scales, params=None), ValueError, r"params.*update\(grads, state, params\)"),
    "params=None, natural_gradient": (
        _update(ng.natural_gradient(0.1, metrics.scales(1.0), max_kl=1.0), params=None), ValueError, "params"
    ),
    "gradients of another tree": (_update(_scales, g={"a": THETA}), ValueError, "grads.*structure"),
    "gradients of another shape": (_update(_scales, g=np.ones(3, np.float32)), ValueError, r"grads.*\(2,\).*\(3,\)"),
    "missing data": (_update(ng.scale_by_metric(gram)), TypeError, "batch: the metric gram needs it"),
    "a metric that returns an array": (
        _update(ng.scale_by_metric(lambda p: jnp.eye(2))), TypeError, r"wrap a \(p, p\) matrix"
    ),
    "a matrix of another size": (
        _update(ng.scale_by_metric(lambda p: ng.operators.Dense(jnp.eye(3)))),
        ValueError, r"operator on vectors \(3,\).*Space.of",
    ),
    "metric with **kwargs": (lambda: ng.scale_by_metric(_with_kwargs), TypeError, r"_with_kwargs takes \*\*kwargs"),
    "reserved name": (lambda: ng.scale_by_metric(_reserved), TypeError, "'value', a reserved name"),
    "wrapping adam": (lambda: transforms.with_metric(gram, optax.adam(0.1)), TypeError, "chain other optax"),
    "wrapping a chain": (
        lambda: transforms.with_metric(gram, optax.chain(transforms.precondition(), optax.scale(1.0))),
        TypeError, "with_metric.*Wrap the preconditioner",
    ),
    "bounding adam": (lambda: transforms.trust_region(optax.adam(0.1), 1.0), TypeError, "trust_region"),
    "scaling adam": (lambda: transforms.scale_step(optax.adam(0.1), 1.0), TypeError, "scale_step"),
    "no operator": (_update(transforms.precondition()), TypeError, "operator.*with_metric"),
    "max_kl": (lambda: ng.natural_gradient(1.0, gram, max_kl=0.0), ValueError, "max_kl.*got 0.0"),
    "learning rate": (lambda: ng.natural_gradient(-1.0, gram), ValueError, "learning_rate.*got -1.0"),
    "damping": (lambda: ng.natural_gradient(1.0, gram, damping=-1.0), ValueError, "damping.*got -1.0"),
    "solver not called": (lambda: ng.scale_by_metric(gram, solver="eigh"), TypeError, "solver.*eigh"),
    "retract without params": (
        _update(transforms.retract(ng.families.bernoulli(2)), params=None), ValueError, "params"
    ),
}  # fmt: skip


test_mistakes_are_named = cases.named_mistakes(MISTAKES)


# A part of the parameters.


def _masked(name):
    mask = {"a": True, "b": False, "c": True}
    rule = ng.damping.metric(0.25, ng.metrics.scales({"a": 1.0, "b": 2.0, "c": 0.5}))
    inner = ng.scale_by_metric(gram, damping=rule)
    labels = {"a": "natural", "b": "plain", "c": "natural"}
    return {
        "masked": optax.masked(inner, mask),
        "partition": optax.transforms.partition({"natural": inner, "plain": optax.identity()}, labels),
    }[name]


@pytest.mark.parametrize("name", ["masked", "partition"])
def test_a_part_of_the_parameters_is_solved_by_its_block(name, dtype):
    """F_SS⁻¹g_S, with the metric and the damping's metric evaluated at all parameters; the others pass."""
    theta, g, rows = params_and_data(dtype)
    tx = _masked(name)
    got, state = jax.jit(lambda g: tx.update(g, tx.init(theta), theta, batch=rows, full_params=theta))(g)
    seen = [0, 1, 3, 4]
    block = (ROWS.T @ ROWS)[np.ix_(seen, seen)] + 0.25 * np.diag([1.0, 1.0, 4.0, 4.0])
    assert error({"a": got["a"], "c": got["c"]}, np.linalg.solve(block, cases.RHS[seen])) < TOL[dtype]
    assert float(got["b"]) == float(g["b"])
    describe = lambda s: jax.tree.map(lambda x: (x.shape, x.dtype), s)
    assert describe(state) == describe(tx.init(theta))
    with pytest.raises(TypeError, match=r"full_params: .*hidden.*full_params=params"):
        tx.update(g, tx.init(theta), theta, batch=rows)


def test_a_residual_may_be_given_with_the_gradient(dtype):
    rows, e = jnp.asarray(ROWS[:3], dtype), jnp.asarray(cases.RHS[:3], dtype)
    g = rows.T @ e
    tx = transforms.precondition(ng.solvers.row_space(), damping=0.5)
    matrix = ROWS[:3].T @ ROWS[:3]
    expected = np.linalg.solve(matrix + 0.5 * np.diag(np.diag(matrix)), np.asarray(g, float))
    for residual in (None, e, 5 * e, e + 1):
        got, _ = tx.update(g, tx.init(g), operator=operators.Gram(rows), residual=residual)
        assert error(got, expected) < TOL[dtype]


def test_an_unconverged_step_is_taken_and_flagged(dtype):
    theta, g, rows = params_and_data(dtype)
    tx = ng.scale_by_metric(gram, solver=ng.solvers.cg(1e-5, max_steps=2))
    d, state = tx.update(g, tx.init(theta), theta, batch=rows)
    assert flat(d).any() and not bool(state.converged) and int(state.skipped) == 0 and int(state.count) == 1
