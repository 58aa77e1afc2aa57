"""Each rule against what it must do by hand: formulas in numpy, closed forms, counts of work, mistakes."""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ROWS, error, flat
from transform_cases import METRIC, data, descending, loss, residuals

import natgrad_jax as ng
from natgrad_jax import metrics, operators, solvers, transforms
from natgrad_jax.transforms import precondition, scale_step, with_metric

H = ROWS.T @ ROWS  # a Hessian with p = 5
G0 = cases.RHS


def quadratic(x):
    return 0.5 * x @ jnp.asarray(H, x.dtype) @ x


def log_cosh(x):
    """Its Newton step from x is ½ sinh 2x: too long beyond 1.09."""
    return jnp.sum(jnp.log(jnp.cosh(x)))


def curvature(x):
    return operators.Diagonal(1 - jnp.tanh(x) ** 2)


def run(tx, x, steps, value_fn, metric_of):
    """States and points of a loop with the curvature given from outside."""
    step = jax.jit(lambda x, s: tx.update(jax.grad(value_fn)(x), s, x, operator=metric_of(x), value_fn=value_fn))
    state, path, states = tx.init(x), [x], []
    for _ in range(steps):
        d, state = step(path[-1], state)
        path, states = [*path, path[-1] - d], [*states, state]
    return path, states


# Lengths.


def test_the_dual_norm_normalises(dtype):
    g, op = jnp.ones(2, dtype), operators.Diagonal(jnp.asarray([4.0, 1.0], dtype))
    tx = transforms.normalise(precondition())
    d, state = tx.update(g, tx.init(g), operator=op)
    np.testing.assert_allclose(float(state.norm), 1.1180339887, rtol=1e-6)
    np.testing.assert_allclose(float(state.inner.natural_norm), 1.1180339887, rtol=1e-6)
    np.testing.assert_allclose(d, np.array([0.25, 1.0]) / 1.1180339887, rtol=1e-6)
    for c in (1e-30, 1e30):
        again, _ = tx.update(c * g, tx.init(g), operator=op)
        np.testing.assert_allclose(again, d, rtol=1e-6)


def test_the_policy_step_of_a_bandit_has_the_asked_divergence(float64):
    """F⁺∇ = r − mean r, scaled by √(2δ/gᵀF⁺g): model KL δ exactly, the true one to O(δ^{3/2})."""
    logits, reward, delta = jnp.array([0.3, -0.2, 0.5]), np.array([1.0, 0.0, 2.0]), 1e-4
    policy = lambda t: jax.nn.softmax(t)
    metric = metrics.fisher(cases._categorical, jnp.arange(3))
    tx = ng.natural_gradient(1.0, metric, solver=solvers.eigh(), max_kl=delta)
    gain = jax.grad(lambda t: -policy(t) @ reward)(logits)
    step, _ = tx.update(gain, tx.init(logits), logits)
    natural = reward - reward.mean()
    scale = np.sqrt(2 * delta / (np.asarray(-gain) @ natural))
    np.testing.assert_allclose(step - step.mean(), scale * natural, rtol=1e-9, atol=1e-15)
    p, q = np.asarray(policy(logits)), np.asarray(policy(logits + step))
    np.testing.assert_allclose(np.sum(p * np.log(p / q)), delta, rtol=2e-2)


# Rules that look at the loss.


@pytest.mark.parametrize("damping", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rule", [None, ng.damping.absolute(1.0)])
def test_the_gain_ratio_is_one_on_a_quadratic(damping, rule, float64):
    x = jnp.asarray(G0)
    tx = transforms.levenberg_marquardt(precondition(damping=rule), damping)
    d, state = tx.update(
        jax.grad(quadratic)(x), tx.init(x), x, operator=operators.Dense(jnp.asarray(H)), value_fn=quadratic
    )
    added = np.eye(5) if rule is not None else np.diag(np.diag(H))
    assert error(d, np.linalg.solve(H + damping * added, H @ G0)) < 1e-10
    np.testing.assert_allclose(float(state.ratio), 1.0, rtol=1e-6)
    np.testing.assert_allclose(float(state.damping), damping / 3, rtol=1e-6)
    decrease = 0.5 * G0 @ H @ G0 - 0.5 * (G0 - flat(d)) @ H @ (G0 - flat(d))
    np.testing.assert_allclose([state.progress.predicted, state.progress.actual], decrease, rtol=1e-7)


def test_a_step_that_raises_the_loss_is_not_taken(dtype):
    """From 2 the step of λ = 10⁻³ is 13 long: rejected, λ by 2, 4, 8 … until (1 + λ) divides it enough."""
    tx = transforms.levenberg_marquardt(precondition(), 1e-3)
    path, states = run(tx, jnp.asarray([2.0], dtype), 12, log_cosh, curvature)
    values = [float(log_cosh(x)) for x in path]
    strengths = [1e-3, *(float(s.damping) for s in states)]
    first = next(i for i in range(12) if path[i + 1] != path[i])
    expected, growth = 1e-3, 2
    for i in range(first):
        expected, growth = expected * growth, growth * 2
        np.testing.assert_allclose(strengths[i + 1], expected, rtol=1e-5)
        assert int(states[i].rejected) == i + 1 and float(states[i].progress.actual) == 0
    assert first >= 3
    step = lambda x, strength: np.sinh(2 * x) / 2 / (1 + strength)
    np.testing.assert_allclose(float(path[first + 1][0]), 2 - step(2.0, strengths[first]), rtol=1e-4)
    assert all(after <= before for before, after in itertools.pairwise(values))
    assert values[-1] < 0.1


def test_levenberg_marquardt_rests_at_the_minimum_of_a_loss_that_is_not_zero():
    """float32: differences of the loss are rounding there. The loss does not rise, λ does not run away."""
    value_fn = lambda x: 3 + log_cosh(x)
    tx = transforms.levenberg_marquardt(precondition(), 0.1)
    path, states = run(tx, jnp.asarray([0.7, -0.3], jnp.float32), 60, value_fn, curvature)
    values = np.array([float(value_fn(x)) for x in path])
    assert (np.diff(values) <= 0).all() and np.abs(flat(path[-1])).max() < 2e-3
    assert 1e-8 < float(states[-1].damping) < 1 and not bool(states[-1].progress.stalled)


def test_the_rounding_of_small_residuals_of_large_outputs_is_no_failure_of_the_model(float64):
    """L = ½ mean r² of 1e-6 is known to 1e-18, not to eps·L = 1e-22: λ would run away at the minimum."""
    x = jnp.linspace(-1, 1, 50)
    target = jnp.sin(2 * x) + 1e-3 * jnp.cos(40 * x)
    f = lambda p: (p[0] * jnp.sin(p[1] * x) + p[2] - target) / 50**0.5
    value_fn = lambda p: 0.5 * jnp.sum(f(p) ** 2)
    tx = transforms.levenberg_marquardt(precondition(), 1e-2)
    _, states = run(tx, jnp.array([0.8, 1.7, 0.1]), 120, value_fn, metrics.pullback(f))
    assert max(float(s.damping) for s in states[20:]) < 1e-2
    assert not bool(states[-1].progress.stalled)


def test_parameters_that_are_coarser_than_the_loss_do_not_raise_the_damping(float64):
    """At the minimum of a loss in double precision, the rounding of bfloat16 parameters moves the residuals."""
    target = jnp.asarray([0.3, 0.7, -0.2, 0.4])
    rows = jnp.asarray(ROWS[:4, :3])
    f = lambda x: rows @ x.astype(float) - target
    value_fn = lambda x: 0.5 * jnp.sum(f(x) ** 2)
    tx, x = transforms.levenberg_marquardt(precondition(), 1e-2), jnp.zeros(3, jnp.bfloat16)
    _, states = run(tx, x, 60, value_fn, lambda x: operators.Gram(rows))
    assert max(float(s.damping) for s in states) < 1


def test_a_damping_that_has_run_up_is_let_down_again_at_the_minimum(dtype):
    tx, x = transforms.levenberg_marquardt(precondition(), 0.5), jnp.asarray([1e-9], dtype)
    value_fn = lambda x: 1 + log_cosh(x)
    state = tx.init(x)._replace(damping=jnp.asarray(40.0, dtype))
    for expected in (40 / 3, 40 / 9, 40 / 27, 0.5, 0.5):
        g = jax.grad(value_fn)(x)
        _, state = tx.update(g, state, x, operator=curvature(x), value_fn=value_fn)
        np.testing.assert_allclose(float(state.damping), expected, rtol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_rejected_step_left_behind_is_forgotten(wrapped, float64):
    inner = transforms.heavy_ball(precondition(), 0.5)
    tx = transforms.levenberg_marquardt(transforms.trust_region(inner, 1e3) if wrapped else inner, 1e-3)
    found = lambda state: state.inner if wrapped else state
    x, state = jnp.asarray([0.5]), tx.init(jnp.asarray([0.5]))
    update = lambda x, s: tx.update(jax.grad(log_cosh)(x), s, x, operator=curvature(x), value_fn=log_cosh)[1]
    state = update(x, state)
    assert int(state.rejected) == 0 and flat(found(state.inner).velocity).any()
    state = update(4 * x, state)
    assert int(state.rejected) == 1 and not flat(found(state.inner).velocity).any()


@pytest.mark.parametrize("solver", [None, solvers.eigh(), solvers.qr()])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_grid_takes_the_best_of_its_dampings(chunk_size, solver, float64):
    params, batch = data(float64, np.array([3.0, -2.0, 1.0, 2.0, -3.0]))
    batch = data(float64)[1]
    dampings = [0.0, 0.01, 0.1, 1.0, 10.0, 100.0]
    tx = with_metric(METRIC, transforms.damping_grid(precondition(solver), dampings, chunk_size=chunk_size))
    g = jax.grad(loss)(params, batch)
    d, state = jax.jit(lambda g, s: tx.update(g, s, params, batch=batch, value_fn=loss))(g, tx.init(params))
    matrix = np.asarray(METRIC(params, batch=batch).dense())
    steps = [np.linalg.solve(matrix + s * np.diag(np.diag(matrix)), flat(g)) for s in dampings]
    space = operators.Space.of(params)
    after = [float(loss(space.unravel(jnp.asarray(flat(params) - s)), batch)) for s in steps]
    best = int(np.argmin(after))
    assert 0 < best < 5, "the case is to have its best inside"
    assert error(d, steps[best]) < 1e-8 and float(state.damping) == dampings[best]
    np.testing.assert_allclose(float(state.progress.actual), float(loss(params, batch)) - after[best], rtol=1e-9)


def test_one_factorisation_serves_all_dampings(float64):
    params, batch = data(float64)
    tx = with_metric(METRIC, transforms.damping_grid(precondition(solvers.eigh())))
    jaxpr = jax.make_jaxpr(lambda g, s: tx.update(g, s, params, batch=batch, value_fn=loss))(params, tx.init(params))
    lines = [line for line in str(jaxpr).splitlines() if " = eigh[" in line]
    assert len(lines) == 1 and "[5,5]" in lines[0]  # of one matrix, not of a batch


def test_a_grid_that_holds_no_descent_stays(dtype):
    """Newton's step from 2 is 13.6 long, and half of it still leads to a higher loss. At the minimum it is no stall."""
    for rule in (
        transforms.grid_search(precondition(), [1.0, 0.5]),
        transforms.damping_grid(precondition(), [0.0, 0.5]),
    ):
        path, states = run(rule, jnp.asarray([2.0], dtype), 12, log_cosh, curvature)
        assert all(float(x[0]) == 2 for x in path)
        assert [int(s.progress.idle) for s in states[:3]] == [1, 2, 3]
        assert [bool(s.progress.stalled) for s in states] == [False] * 9 + [True] * 3
        path, states = run(rule, jnp.asarray([0.0], dtype), 12, log_cosh, curvature)
        assert not bool(states[-1].progress.stalled)


def test_grid_search_and_backtracking_are_safe_where_the_loss_is_not_finite(float64):
    """L = x − log x has no value beyond 0, where Newton's step from 3 leads."""
    value_fn = lambda x: jnp.sum(x - jnp.log(x))
    metric = lambda x: operators.Diagonal(x**-2)
    x = jnp.asarray([3.0])  # d = x² (1 − 1/x) = 6
    sizes = 0.5 ** np.arange(6)
    lower = lambda s: 3 - 6 * s - np.log(3 - 6 * s) if s < 0.5 else np.inf
    for rule, size in (
        (transforms.grid_search(precondition()), min(sizes, key=lower)),
        (transforms.backtracking(precondition()), next(s for s in sizes if lower(s) <= 3 - np.log(3) - 1e-4 * s * 4)),
    ):
        path, states = run(rule, x, 30, value_fn, metric)
        np.testing.assert_allclose(float(states[0].step_size), size)
        np.testing.assert_allclose(float(path[1][0]), 3 - 6 * size)
        np.testing.assert_allclose(float(path[-1][0]), 1.0, rtol=1e-9)


def test_backtracking_takes_no_step_uphill(float64):
    """A chain, or a momentum, has turned the direction: far away the loss is lower, but no model says so."""
    x, tx = jnp.asarray([1.0]), transforms.backtracking(precondition())
    value_fn = lambda x: jnp.sum(jnp.where(jnp.abs(x) < 2, x**2, -1.0))
    given = {"operator": operators.Diagonal(jnp.ones(1)), "value_fn": value_fn, "grad": jnp.asarray([2.0])}
    d, state = tx.update(jnp.asarray([-2.0]), tx.init(x), x, **given)
    assert float(d[0]) == 0 and float(state.step_size) == 0 and float(state.progress.actual) == 0
    d, _ = tx.update(jnp.asarray([2.0]), tx.init(x), x, **given)
    assert float(d[0]) != 0


def test_a_loss_of_minus_infinity_is_no_descent(float64):
    """Beyond 0, where Newton's step from 3 leads, log x has been continued wrongly."""
    value_fn = lambda x: jnp.sum(jnp.where(x > 0, x - jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf))
    x, op = jnp.asarray([3.0]), operators.Diagonal(jnp.asarray([1 / 9.0]))
    grid = [1.0, 0.25]
    for rule in (
        transforms.grid_search(precondition(), grid), transforms.backtracking(precondition()),
        transforms.levenberg_marquardt(precondition(), 1e-3), transforms.damping_grid(precondition(), [0.0, 4.0]),
    ):  # fmt: skip
        d, _ = rule.update(jnp.asarray([2 / 3]), rule.init(x), x, operator=op, value_fn=value_fn)
        assert np.isfinite(float(value_fn(x - d)))


@pytest.mark.parametrize("rule", ["levenberg_marquardt", "grid_search", "backtracking", "damping_grid"])
@pytest.mark.parametrize("memory", ["heavy_ball", "spring"])
def test_a_momentum_that_led_uphill_does_not_lead_there_for_ever(memory, rule, float64):
    """A rejected step is not tried again: the momentum in it is brought to rest."""
    inner = {
        "heavy_ball": transforms.heavy_ball(scale_step(precondition(), 0.9), 0.9),
        "spring": transforms.spring(scale_step(precondition(damping=0.1), 0.9), 0.9),
    }[memory]
    value_fn, metric = lambda x: 0.5 * jnp.sum(x**2), lambda x: operators.Diagonal(1 + 0 * x)
    path, states = run(getattr(transforms, rule)(inner), jnp.array([3.0]), 60, value_fn, metric)
    assert abs(float(path[-1][0])) < 1e-6 and not bool(states[-1].progress.stalled)


def test_a_solve_that_fails_is_given_more_damping(float64):
    """Dependent columns and λ = 1e-20: no factorisation, no direction, and no rest."""
    rows = jnp.array([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]])
    value_fn = lambda w: 0.5 * jnp.sum((rows @ w - jnp.array([1.0, 3.0])) ** 2)
    tx = transforms.levenberg_marquardt(precondition(), 1e-20)
    path, states = run(tx, jnp.zeros(3), 40, value_fn, lambda w: operators.Gram(rows))
    np.testing.assert_allclose(float(value_fn(path[-1])), 1.0, rtol=1e-6)
    assert int(states[-1].rejected) > 5


def test_an_objective_is_not_given_what_is_meant_for_the_rules(float64):
    x, seen = jnp.asarray(G0), []
    value_fn = lambda x, residual=True, damping=1.0: seen.append((residual, damping)) or quadratic(x)
    tx = transforms.grid_search(precondition())
    tx.update(jax.grad(quadratic)(x), tx.init(x), x, operator=operators.Dense(jnp.asarray(H)), value_fn=value_fn,
              residual=None, damping=0.5)  # fmt: skip
    assert set(seen) == {(True, 1.0)}


def test_the_value_and_the_gradient_of_the_loss_may_be_given(float64):
    """The chain has changed the updates: the model is that of `grad`."""
    x, op = jnp.asarray(G0), operators.Dense(jnp.asarray(H))
    g = jax.grad(quadratic)(x)
    tx = transforms.levenberg_marquardt(precondition(), 1.0)
    halved = 0.5 * g
    _, state = tx.update(halved, tx.init(x), x, operator=op, value_fn=quadratic, value=quadratic(x), grad=g)
    np.testing.assert_allclose(float(state.ratio), 1.0, rtol=1e-6)
    _, state = tx.update(halved, tx.init(x), x, operator=op, value_fn=quadratic)
    assert float(state.ratio) > 1.5
    calls = []
    counted = lambda x: calls.append(1) or quadratic(x)
    tx.update(g, tx.init(x), x, operator=op, value_fn=counted, value=quadratic(x))
    assert len(calls) == 1


def test_the_objective_takes_the_data_that_it_names(float64):
    x = jnp.asarray(G0)
    tx = transforms.grid_search(precondition())
    for value_fn in (
        lambda x, batch, *, c: c * batch * quadratic(x),
        functools.partial(lambda x, batch, c: c * batch * quadratic(x), c=2.0),
        jax.jit(lambda x, batch, c: c * batch * quadratic(x)),
    ):
        _, state = tx.update(
            jax.grad(quadratic)(x), tx.init(x), x, operator=operators.Dense(jnp.asarray(H)),
            value_fn=value_fn, batch=jnp.asarray(3.0), c=2.0, other=1,
        )  # fmt: skip
        np.testing.assert_allclose(float(state.progress.actual), 6 * float(quadratic(x)), rtol=1e-9)


def test_two_directions_are_combined_as_the_model_says(float64):
    """Against the 2 × 2 system in numpy, with G and with G + λD."""
    x, cheap = jnp.asarray(G0), operators.Diagonal(jnp.asarray(np.diag(H)))
    exact = lambda params: operators.Dense(jnp.asarray(H))
    for damping in (None, 0.5, ng.damping.absolute(2.0)):
        tx = transforms.quadratic_step(precondition(), exact, damping=damping)
        added = {None: 0 * np.eye(5), 0.5: 0.5 * np.diag(np.diag(H))}.get(damping, 2 * np.eye(5))
        state, at = tx.init(x), np.array(x)
        last = np.zeros(5)
        for i in range(3):
            g = H @ at
            basis = np.stack([g / np.diag(H), last])[: 1 if i == 0 else 2]
            weights = np.linalg.solve(basis @ (H + added) @ basis.T, basis @ g)
            last = weights @ basis
            d, state = tx.update(jnp.asarray(g), state, x, operator=cheap)
            assert error(d, last) < 1e-9
            np.testing.assert_allclose(
                [state.learning_rate, state.momentum], [*weights, 0.0][:2], rtol=1e-8, atol=1e-12
            )
            at = at - last
    # Without damping this is conjugate gradients, preconditioned: exact in as many steps as dimensions.
    tx = transforms.quadratic_step(precondition(), exact)
    state, at = tx.init(x), x
    for _ in range(5):
        d, state = tx.update(jnp.asarray(H) @ at, state, at, operator=cheap)
        at = at - d
    assert np.linalg.norm(at) < 1e-8 * np.linalg.norm(G0)
    d, state = tx.update(jnp.zeros(5), state, at, operator=cheap)
    assert np.isfinite(flat(d)).all()


@pytest.mark.parametrize("c", [1e-25, 1e-15, 1e15, 1e25])
def test_gradients_of_any_size_are_combined(c):
    """G is fixed and the gradients are not, in float32: squares of them would leave the floats."""
    g = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 2.0]], np.float32)
    matrix = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]], np.float32)
    tx = transforms.quadratic_step(precondition(), lambda params: operators.Dense(jnp.asarray(matrix)))
    cheap, steps = operators.Diagonal(jnp.asarray(np.diag(matrix))), []
    for factor in (1.0, c):
        state = tx.init(jnp.zeros(3))
        for x in g:
            d, state = tx.update(jnp.asarray(x * np.float32(factor)), state, jnp.zeros(3), operator=cheap)
        steps.append([*np.asarray(d, float) / factor, float(state.learning_rate), float(state.momentum)])
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-4)
    assert abs(steps[0][-1]) > 0.01


# Momentum.


def test_heavy_ball_adds_up_directions(dtype):
    op = operators.Diagonal(jnp.asarray([2.0], dtype))
    gradients = [1.0, -3.0, 2.0]
    for nesterov in (False, True):
        tx = transforms.heavy_ball(precondition(), 0.5, nesterov=nesterov)
        state, v = tx.init(jnp.ones(1, dtype)), 0.0
        for g in gradients:
            d, state = tx.update(jnp.asarray([g], dtype), state, operator=op)
            v = 0.5 * v + g / 2
            np.testing.assert_allclose(float(d[0]), g / 2 + 0.5 * v if nesterov else v, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gram", "gram, residual", "dense", "complex"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_spring_is_its_formula(bias_correction, kind, float64):
    """μφ + (G + λD)⁻¹(g − μGφ), another batch in every step."""
    mu, phi, rng = 0.8, np.zeros(5), np.random.default_rng(3)
    tx = transforms.spring(precondition(damping=ng.damping.absolute(0.1)), mu, bias_correction=bias_correction)
    kinds = complex if kind == "complex" else float
    state, phi = tx.init(jnp.zeros(5, kinds)), phi.astype(kinds)
    for t in range(1, 5):
        rows = rng.normal(size=(3, 5)) + (1j * rng.normal(size=(3, 5)) if kind == "complex" else 0)
        e = rng.normal(size=3)
        g, matrix = rows.conj().T @ e, rows.conj().T @ rows
        operator = {
            "dense": lambda m=matrix: operators.Dense(jnp.asarray(m)),
            "gram, residual": lambda r=rows, e=e: operators.Gram(jnp.asarray(r), residual=jnp.asarray(e)),
        }.get(kind, lambda r=rows: operators.Gram(jnp.asarray(r)))()
        d, state = tx.update(jnp.asarray(g), state, operator=operator)
        phi = mu * phi + np.linalg.solve(matrix + 0.1 * np.eye(5), g - mu * matrix @ phi)
        expected = phi / np.sqrt(1 - mu ** (2 * t)) if bias_correction else phi
        np.testing.assert_allclose(d, expected, rtol=1e-9, atol=1e-11)
        assert bool(state.inner.residual_used) == (kind == "gram, residual")
    np.testing.assert_allclose(state.velocity, phi, rtol=1e-9, atol=1e-11)


def test_spring_has_a_residual_for_a_real_metric_of_complex_parameters(float64):
    rng = np.random.default_rng(4)
    rows, e = rng.normal(size=(3, 4)), rng.normal(size=3)
    parts = operators.Gram((jnp.asarray(rows[:, :2]), jnp.asarray(rows[:, 2:])), residual=jnp.asarray(e))
    tx = transforms.spring(precondition(damping=ng.damping.absolute(0.1)), 0.8)
    g = (rows.T @ e).reshape(2, 2)
    operator = operators.RealParts(parts, operators.Space.of(jnp.zeros(2, complex)))
    state, phi = tx.init(jnp.zeros(2, complex)), np.zeros(4)
    for _ in range(3):
        d, state = tx.update(jnp.asarray(g[0] + 1j * g[1]), state, operator=operator)
        phi = 0.8 * phi + np.linalg.solve(rows.T @ rows + 0.1 * np.eye(4), g.ravel() - 0.8 * rows.T @ rows @ phi)
        np.testing.assert_allclose(d, phi[:2] + 1j * phi[2:], rtol=1e-9)
        assert bool(state.inner.residual_used)


def test_the_bias_of_a_long_memory_is_corrected():
    """1 − μ²ᵗ of μ = 1 − 10⁻⁵ has three digits in float32."""
    tx = transforms.spring(precondition(damping=1.0), 0.99999, bias_correction=True)
    d, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), operator=operators.Diagonal(jnp.ones(1)))
    np.testing.assert_allclose(float(d[0]), 0.5 / np.sqrt(1 - 0.99999**2), rtol=1e-6)


def test_spring_is_bounded_if_asked(dtype):
    tx = transforms.spring(precondition(), 0.5, max_norm=0.25)
    g = jnp.asarray([3.0, 4.0], dtype)
    d, state = tx.update(g, tx.init(g), operator=operators.Diagonal(jnp.ones(2, dtype)))
    np.testing.assert_allclose(d, [0.15, 0.2], rtol=1e-6)
    np.testing.assert_allclose(state.velocity, [3.0, 4.0], rtol=1e-6)


def test_a_residual_belongs_to_the_gradient_or_is_not_used(float64):
    """Intact, clipped, with weight decay, from MultiSteps: the solve is right, and the state says if e was used."""
    rows, e = ROWS[:3], np.array([0.3, -1.0, 0.7])
    metric = lambda params, *, batch: operators.Gram(batch[0], residual=batch[1])
    params, batch = jnp.asarray(cases.VECTOR), (jnp.asarray(rows), jnp.asarray(e))
    inner = ng.scale_by_metric(metric, damping=ng.damping.absolute(1e-6))
    exact = lambda g: np.linalg.solve(rows.T @ rows + 1e-6 * np.eye(5), g)
    g = rows.T @ e
    clipped = g / np.linalg.norm(g) * 1e-2
    decayed = g + 0.1 * cases.VECTOR
    for before, changed, used in (
        (optax.identity(), g, True),
        (optax.clip_by_global_norm(1e-2), clipped, True),  # still a multiple of Aᵀe
        (optax.clip(0.5), np.clip(g, -0.5, 0.5), False),
        (optax.add_decayed_weights(0.1), decayed, False),
    ):
        tx = optax.chain(before, inner)
        d, state = tx.update(jnp.asarray(g), tx.init(params), params, batch=batch)
        assert error(d, exact(changed)) < 1e-6
        assert bool(transforms.summary(state)["residual_used"]) == used
    tx = optax.MultiSteps(inner, 2)
    state = tx.init(params)
    other = ROWS[3:6].T @ e
    for gradient in (other, g):
        d, state = tx.update(jnp.asarray(gradient), state, params, batch=batch)
    assert error(d, exact((other + g) / 2)) < 1e-5
    assert not bool(transforms.summary(state)["residual_used"])


def test_what_stands_inside_is_handed_operator_and_residual(float64):
    """A piece of somebody else's making reads them, and may use no other name of ours."""
    seen = {}

    def update(updates, state, params=None, *, operator, residual=None, **extra_args):
        seen.update(extra_args, operator=operator, residual=residual)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params, batch = data(float64)
    tx = transforms.every_k(with_metric(METRIC, transforms.trust_region(inner, 1e3)), 2, like={"batch": batch})
    tx.update(params, tx.init(params), params, batch=batch)
    assert seen["batch"] is batch and "factored" not in seen
    np.testing.assert_allclose(seen["residual"], METRIC(params, batch=batch).residual, rtol=1e-12)
    np.testing.assert_allclose(seen["operator"].dense(), METRIC(params, batch=batch).dense(), rtol=1e-12)


# Geodesics.


def _in_other_coordinates(build, eta, to, fro, total=0.5):
    """Where a fixed time leads in the coordinates θ = fro(z), when steps are made in z."""
    tx, value = build(fro, eta), lambda z: jnp.sum(jnp.sin(fro(z)) + 0.5 * fro(z))
    z = to(jnp.array([0.4, 0.9]))
    step = jax.jit(lambda z, s: tx.update(jax.grad(value)(z), s, z))
    state = tx.init(z)
    for _ in range(round(total / eta)):
        d, state = step(z, state)
        z = z - d
    return np.asarray(fro(z))


def test_the_geodesic_step_sees_coordinates_in_second_order(float64):
    """The paths in θ and in z = eᶿ part as η for the plain step and as η² for the bent one, at fixed time."""
    flat_map = lambda theta: jnp.stack([theta[0] + 0.3 * theta[1] ** 2, theta[1], 0.5 * theta[0] * theta[1]])

    def plain(fro, eta):
        return with_metric(metrics.pullback(lambda z: flat_map(fro(z))), scale_step(precondition(), eta))

    def bent(fro, eta):
        f = lambda z: flat_map(fro(z))
        rule = transforms.geodesic(precondition(), f, learning_rate=eta)
        return with_metric(metrics.pullback(f), rule)

    maps = [(lambda x: x, lambda x: x), (jnp.exp, jnp.log)]
    for build, order in ((plain, 1), (bent, 2)):
        gaps = []
        for eta in (0.05, 0.025, 0.0125):
            one, other = (_in_other_coordinates(build, eta, *pair) for pair in maps)
            gaps.append(np.linalg.norm(one - other))
        orders = np.log2(np.array(gaps[:-1]) / gaps[1:])
        np.testing.assert_allclose(orders, order, atol=0.15)


def test_the_geodesic_of_complex_parameters_is_that_of_their_parts(float64):
    """Real outputs and complex ones, which are two real outputs each."""
    rng = np.random.default_rng(5)
    weights = jnp.asarray(rng.normal(size=(6, 2)) + 1j * rng.normal(size=(6, 2)))
    w = jnp.asarray(rng.normal(size=2) + 1j * rng.normal(size=2))
    halves = lambda z: jnp.concatenate([z.real, z.imag])
    for f in (lambda w: jnp.sin(weights @ w), lambda w: jnp.real(jnp.sin(weights @ w))):
        of_pair = lambda x: (lambda z: halves(z) if jnp.iscomplexobj(z) else z)(f(jax.lax.complex(x[:2], x[2:])))  # noqa: B023
        x, g = halves(w), jnp.asarray(rng.normal(size=4))
        rows = jax.jacobian(of_pair)(x)
        tx = transforms.geodesic(precondition(), of_pair, learning_rate=0.1)
        expected, state = tx.update(g, tx.init(x), x, operator=operators.Gram(rows))
        assert 1e-3 < float(state.bend) < 0.75
        operator = operators.RealParts(operators.Gram((rows[:, :2], rows[:, 2:])), operators.Space.of(w))
        tx = transforms.geodesic(precondition(), f, learning_rate=0.1)
        d, state = tx.update(jax.lax.complex(g[:2], g[2:]), tx.init(w), w, operator=operator)
        np.testing.assert_allclose(halves(d), expected, rtol=1e-9)


def test_the_bend_is_least_squares_of_the_second_derivative(float64):
    """½ lstsq(J, f″[s, s]), also if the metric is a mean where f gives a sum; a bend that is too large is left out."""
    params, batch = data(float64)
    g = jax.grad(loss)(params, batch)
    space = operators.Space.of(params)
    f = lambda v: residuals(space.unravel(v), batch)
    for weights in (None, 1 / 9):
        metric = metrics.least_squares(residuals, weights)
        c = 1.0 if weights is None else weights
        scaled = jax.tree.map(lambda x: c * x, g)  # noqa: B023
        for max_bend, kept in ((10.0, True), (1e-4, False)):
            rule = transforms.geodesic(precondition(), residuals, learning_rate=0.3, max_bend=max_bend)
            tx = with_metric(metric, rule)
            d, state = tx.update(scaled, tx.init(params), params, batch=batch)
            at = jnp.asarray(flat(params))
            jac, second = np.asarray(jax.jacobian(f)(at)), np.asarray(jax.jacobian(jax.jacobian(f))(at))
            s = 0.3 * np.linalg.solve(jac.T @ jac, flat(g))
            bend = 0.5 * np.linalg.lstsq(jac, np.einsum("kij,i,j->k", second, s, s), rcond=None)[0]
            assert error(d, s + (bend if kept else 0)) < 1e-9
            length = lambda v: np.linalg.norm(jac @ v)  # noqa: B023
            np.testing.assert_allclose(float(state.bend), length(bend) / length(s), rtol=1e-7)


def test_gauss_newton_solves_rosenbrock_in_two_steps(float64):
    """Linear in the residuals along its path: from anywhere, and whatever the bend."""
    f = lambda x: jnp.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])
    value = lambda x: 0.5 * jnp.sum(f(x) ** 2)
    for start in ([-1.2, 1.0], [3.0, -7.0]):
        tx, x = ng.natural_gradient(1.0, metrics.pullback(f)), jnp.array(start)
        state = tx.init(x)
        for _ in range(2):
            d, state = tx.update(jax.grad(value)(x), state, x)
            x = x + d
        np.testing.assert_allclose(x, [1.0, 1.0], rtol=1e-8)


# Reuse.


def test_the_average_is_unbiased_from_the_first_step_on(dtype):
    """First G exactly, then Σ βᵗ⁻ˢ G_s / Σ βᵗ⁻ˢ; an operator that is not finite is left out."""
    seen = [1.7, 0.3, np.nan, 2.9]
    metric = lambda params, *, batch: operators.Diagonal(batch)
    tx = transforms.average(ng.scale_by_metric(metric), 0.9, like={"batch": jnp.ones(1, dtype)})
    state, taken = tx.init(jnp.ones(1, dtype)), []
    for x in seen:
        d, state = tx.update(jnp.ones(1, dtype), state, jnp.ones(1, dtype), batch=jnp.full(1, x, dtype))
        taken += [] if np.isnan(x) else [float(np.asarray(x, dtype))]
        weights = 0.9 ** np.arange(len(taken))[::-1]
        mean = weights @ taken / weights.sum()
        np.testing.assert_allclose(float(state.operator.entries[0]), mean, rtol=0 if len(taken) == 1 else 1e-6)
        np.testing.assert_allclose(float(d[0]), 1 / mean, rtol=1e-6)
    assert int(state.count) == 3


def test_a_first_operator_that_is_not_finite_is_a_step_not_taken(dtype):
    metric = lambda params, *, batch: operators.Diagonal(batch)
    one, like = jnp.ones(1, dtype), {"batch": jnp.ones(1, dtype)}
    for tx in (
        transforms.average(ng.scale_by_metric(metric), 0.9, like=like),
        transforms.every_k(ng.scale_by_metric(metric), 5, like=like),
    ):
        d, state = tx.update(one, tx.init(one), one, batch=one * jnp.nan)
        assert float(d[0]) == 0 and int(transforms.summary(state)["skipped"]) == 1
        d, state = tx.update(one, state, one, batch=4 * one)
        np.testing.assert_allclose(float(d[0]), 0.25, rtol=1e-6)
    d, state = tx.update(one, state, one, batch=8 * one)  # every_k holds the 4
    np.testing.assert_allclose(float(d[0]), 0.25, rtol=1e-6)
    assert int(state.refreshed) == 2


def _counting(seen):
    def metric(params, *, batch):
        jax.debug.callback(lambda: seen.append(1))
        return operators.Gram(batch)

    return metric


@pytest.mark.parametrize("how", ["eager", "jit", "scan", "vmap"])
def test_a_period_saves_the_work_of_the_metric(how, float64):
    """Seven steps, k = 3: three evaluations, and no matrix is factorised in between."""
    seen, params, rows = [], jnp.asarray(cases.VECTOR), jnp.asarray(ROWS)
    tx = transforms.every_k(ng.natural_gradient(0.5, _counting(seen)), 3, like={"batch": rows})
    state = tx.init(params)
    assert not seen
    update = lambda g, state: tx.update(g, state, params, batch=rows)
    if how == "scan":
        jax.lax.scan(lambda s, _: (update(params, s)[1], None), state, None, length=7)
    else:
        many = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
        g, state = (many(params), many(state)) if how == "vmap" else (params, state)
        step = {"eager": update, "jit": jax.jit(update), "vmap": jax.jit(jax.vmap(update))}[how]
        for _ in range(7):
            _, state = step(g, state)
    jax.effects_barrier()
    assert len(seen) == 3


def test_lanes_out_of_phase_keep_their_own_curvature(float64):
    """Refreshed for all when one is due, and each lane takes only what is its own turn."""
    metric = lambda params, *, batch: operators.Diagonal(batch)
    tx = transforms.every_k(ng.scale_by_metric(metric), 3, like={"batch": jnp.ones(1)})
    one = jnp.ones(1)
    alone = [[], []]
    states = [tx.init(one), tx.init(one)]
    _, states[1] = tx.update(one, states[1], one, batch=7 * one)  # one step ahead
    together = jax.tree.map(lambda *x: jnp.stack(x), *states)
    step = jax.jit(jax.vmap(lambda s, b: tx.update(one, s, one, batch=b)))
    for t in range(1, 8):
        batches = [t * one, 10 * t * one]
        for i in range(2):
            d, states[i] = tx.update(one, states[i], one, batch=batches[i])
            alone[i] = float(d[0])
        d, together = step(together, jnp.stack(batches))
        np.testing.assert_allclose(d[:, 0], alone, rtol=1e-12)
    assert len({int(s.age) for s in states}) == 2


def test_a_curvature_of_your_own(dtype):
    """scale_by_metric(None): the operator is an argument of update; inside masked its block is taken."""
    params, g = (cases.tree(v, dtype) for v in (cases.VECTOR, cases.RHS))
    op = operators.Gram(cases.tree(ROWS, dtype))
    tx = ng.scale_by_metric(None, damping=0.1)
    d, _ = jax.jit(lambda op: tx.update(g, tx.init(params), params, operator=op))(op)
    damped = H + 0.1 * np.diag(np.diag(H))
    assert error(d, np.linalg.solve(damped, G0)) < 2e-5
    masked = optax.masked(tx, {"a": True, "b": False, "c": True})
    d, _ = masked.update(g, masked.init(params), params, operator=op)
    kept = [0, 1, 3, 4]
    expected = np.linalg.solve(damped[np.ix_(kept, kept)], G0[kept])
    assert error({"a": d["a"], "c": d["c"]}, expected) < 2e-5
    step = ng.natural_gradient(0.5, None, damping=0.1)
    d, _ = step.update(g, step.init(params), params, operator=op)
    assert error(d, -0.5 * np.linalg.solve(damped, G0)) < 2e-5


def test_a_summary_reads_any_state(dtype):
    params, batch = data(dtype)
    rule = transforms.levenberg_marquardt(transforms.heavy_ball(precondition(solvers.cg()), 0.5), 0.25)
    tx = optax.chain(optax.clip_by_global_norm(1e3), optax.apply_if_finite(descending(rule), 3))
    _, state = tx.update(jax.grad(loss)(params, batch), tx.init(params), params, batch=batch, value_fn=loss)
    report = transforms.summary(state)
    assert int(report["count"]) == 1 and float(report["damping"]) < 0.25  # that of the next step, not of the last
    assert "iterations" in report and "rank" not in report
    text = str(report)
    assert "gain ratio" in text and "solver converged" in text and "dead coordinates" in text
    tx = descending(rule)
    of = lambda c: tx.update(jax.tree.map(lambda x: c * x, params), tx.init(params), params, batch=batch, value_fn=loss)
    many = jax.vmap(lambda c: of(c)[1])
    text = str(transforms.summary(many(jnp.asarray([1.0, jnp.nan], dtype))))
    assert "0 … 1" in text and "1 of 2" in text
    assert str(transforms.summary(optax.adam(0.1).init(params))) == "no state of natgrad_jax in here"


# Bad input.

X = np.ones(2, np.float32)
IDENTITY = lambda params: operators.Diagonal(jnp.ones_like(params))
OF_BATCH = lambda params, *, batch: operators.Diagonal(batch)


def _update(rule, metric=IDENTITY, **given):
    def call():
        tx = with_metric(metric, rule) if metric else rule
        return tx.update(jnp.asarray(X), tx.init(X), jnp.asarray(X), **given)

    return call


_lm = transforms.levenberg_marquardt(precondition())
_pair = {"a": jnp.ones(2), "b": jnp.ones(2)}
_value = {"value_fn": lambda x: jnp.sum(x**2)}
_rows_of_two = transforms.every_k(
    ng.scale_by_metric(lambda p, *, batch: operators.Gram(batch)), 2, like={"batch": np.ones((4, 2), np.float32)}
)
MISTAKES = {
    "no value_fn": (_update(_lm), TypeError, r"value_fn: levenberg_marquardt compares.*value_fn=loss"),
    "a vector for a loss": (
        _update(transforms.grid_search(precondition()), value_fn=lambda x: x), ValueError, r"value_fn.*scalar.*\(2,\)"
    ),
    "a vector for its value": (
        _update(transforms.grid_search(precondition()), value=jnp.ones(2), **_value),
        ValueError, r"value: .*scalar.*\(2,\)",
    ),
    "two that set λ": (
        _update(transforms.damping_grid(_lm), **_value), TypeError, "damping: levenberg_marquardt chooses λ by itself"
    ),
    "damping to a rule that sets it": (_update(_lm, damping=0.1, **_value), TypeError, "damping: levenberg_marquardt"),
    "a rule for damping": (
        _update(precondition(), damping=ng.damping.absolute(1.0)), TypeError, "damping: expected a number λ.*the rule"
    ),
    "negative damping": (_update(precondition(), damping=-1.0), ValueError, "damping.*got -1.0"),
    "LM around adam": (lambda: transforms.levenberg_marquardt(optax.adam(1.0)), TypeError, "inner: levenberg_marq"),
    "damping 0": (lambda: transforms.levenberg_marquardt(precondition(), 0.0), ValueError, "damping.*λ, got 0"),
    "learning rate": (
        lambda: transforms.damping_grid(precondition(), learning_rate=-1.0), ValueError, "learning_rate.*got -1.0.*sign"
    ),
    "empty grid": (lambda: transforms.damping_grid(precondition(), []), ValueError, "dampings: expected a sequence"),
    "negative grid": (lambda: transforms.damping_grid(precondition(), [1.0, -1.0]), ValueError, "dampings"),
    "steps": (lambda: transforms.grid_search(precondition(), [0.0, 1.0]), ValueError, "steps.*0 is always among"),
    "accept": (lambda: transforms.levenberg_marquardt(precondition(), accept=1.0), ValueError, "accept.*got 1.0"),
    "accept as text": (
        lambda: transforms.levenberg_marquardt(precondition(), accept="yes"), TypeError, "accept: expected a number"
    ),
    "a schedule inside": (
        lambda: transforms.damping_grid(precondition(), learning_rate=optax.constant_schedule(1.0)), TypeError,
        "learning_rate: expected a number.*scale_step",
    ),
    "learning rates": (
        lambda: ng.natural_gradient(np.ones(2), IDENTITY), ValueError, r"learning_rate: expected one number.*\(2,\)"
    ),
    "a grid of text": (lambda: transforms.damping_grid(precondition(), "1e-3"), ValueError, "dampings.*'1e-3'"),
    "chunk_size": (lambda: transforms.grid_search(precondition(), chunk_size=0), ValueError, "chunk_size.*got 0"),
    "max_steps": (lambda: transforms.backtracking(precondition(), max_steps=2.5), ValueError, "max_steps.*got 2.5"),
    "spring without an operator": (
        _update(transforms.spring(precondition()), metric=None), TypeError, "operator: spring needs.*NoneType.*with_m"
    ),
    "geodesic without an operator": (
        _update(transforms.geodesic(precondition(), lambda x: x), metric=None), TypeError, "operator: geodesic needs"
    ),
    "a matrix for an operator": (
        _update(precondition(), metric=None, operator=np.eye(2)), TypeError, "operator: precondition needs.*ndarray"
    ),
    "geodesic around a wrapper": (
        lambda: transforms.geodesic(transforms.trust_region(precondition(), 0.1), lambda x: x), TypeError,
        "inner: geodesic expected precondition.*around geodesic",
    ),
    "an operator for a metric": (
        lambda: ng.scale_by_metric(IDENTITY(jnp.asarray(X))), TypeError, "metric: expected a function.*operator=G"
    ),
    "data of the loss": (
        _update(_lm, value_fn=lambda x, batch, weather: 0.0, batch=1), TypeError, "weather: value_fn needs it"
    ),
    "data of the loss with a reserved name": (
        _update(_lm, value_fn=lambda x, grad: 0.0), TypeError, r"grad \(a reserved name.*value_fn needs it"
    ),
    "data of f": (
        _update(transforms.geodesic(precondition(), lambda x, batch: x)), TypeError, "batch: f needs it"
    ),
    "a period of a period": (
        lambda: transforms.every_k(transforms.every_k(ng.scale_by_metric(IDENTITY), 2), 2), TypeError,
        "inner: every_k expected",
    ),
    "shrink": (lambda: transforms.backtracking(precondition(), shrink=1.0), ValueError, "shrink.*got 1.0"),
    "decay": (lambda: transforms.spring(precondition(), 1.0), ValueError, "decay.*got 1.0"),
    "max_norm": (lambda: transforms.spring(precondition(), max_norm=-1.0), ValueError, "max_norm.*got -1.0"),
    "geodesic of nothing": (lambda: transforms.geodesic(precondition(), 1.0), TypeError, "f: expected a function"),
    "k": (lambda: transforms.every_k(ng.scale_by_metric(IDENTITY), 0), ValueError, "k: expected.*got 0"),
    "k of accumulate": (lambda: transforms.accumulate(optax.sgd(1.0), 2.5), ValueError, "k: expected.*got 2.5"),
    "every_k inside": (lambda: transforms.every_k(precondition(), 2), TypeError, "inner: every_k expected what"),
    "every_k around a chain": (
        lambda: transforms.every_k(optax.chain(ng.scale_by_metric(IDENTITY)), 2), TypeError, "chain afterwards"
    ),
    "like": (
        lambda: transforms.every_k(ng.scale_by_metric(OF_BATCH), 2).init(X), TypeError,
        "like: every_k keeps an operator.*like=.*batch: the metric",
    ),
    "like is not a dictionary": (
        lambda: transforms.average(ng.scale_by_metric(OF_BATCH), like=[X]).init(X), TypeError, "like: expected a dict"
    ),
    "data unlike like": (
        lambda: _rows_of_two.update(jnp.asarray(X), _rows_of_two.init(X), jnp.asarray(X), batch=jnp.ones((3, 2))),
        ValueError, r"like: every_k was made for.*\(4, 2\).*\(3, 2\)",
    ),
    "an average of rows": (
        lambda: transforms.average(ng.scale_by_metric(lambda p: operators.Gram(p[None]))).init(X),
        TypeError, "average: the arrays of Gram.*chunk_size=",
    ),
    "no operator": (
        lambda: ng.scale_by_metric(None).update(jnp.asarray(X), ng.scale_by_metric(None).init(X), X), TypeError,
        r"operator: without a metric.*operator=G\), got NoneType",
    ),
    "a loss of hidden parameters": (
        lambda: optax.masked(with_metric(None, _lm), {"a": True, "b": False}).update(
            _pair, optax.masked(_lm, {"a": True, "b": False}).init(_pair), _pair, operator=operators.Diagonal(_pair),
            **_value,
        ),
        TypeError, "full_params: a part of the parameters is hidden.*the loss",
    ),
    "params of a rule": (
        lambda: transforms.grid_search(precondition()).update(
            jnp.asarray(X), transforms.grid_search(precondition()).init(X), operator=IDENTITY(jnp.asarray(X)), **_value
        ),
        ValueError, "params: grid_search evaluates",
    ),
}  # fmt: skip


test_mistakes_are_named = cases.named_mistakes(MISTAKES)


def test_a_bound_that_is_not_a_number_is_no_step():
    """Traced, so that no error can be raised: the factor in the state is 0."""
    tx = lambda bound: transforms.trust_region(precondition(), bound)
    g, op = jnp.ones(2), operators.Diagonal(jnp.ones(2))
    step = jax.jit(lambda bound: tx(bound).update(g, tx(bound).init(g), operator=op))
    for bound in (-1.0, 0.0, jnp.nan):
        d, state = step(bound)
        assert not flat(d).any() and float(state.scale) == 0
    assert flat(step(1.0)[0]).all()


def test_known_arrays_inside_jit_are_numbers(float64):
    """A damping that is an array, not traced: inside jit a comparison of it would be."""
    lam = jnp.asarray(0.5)
    for damping in (lam, ng.damping.absolute(lam)):
        tx = ng.scale_by_metric(IDENTITY, damping=damping)
        assert np.allclose(jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(jnp.ones(2)), 1 / 1.5)  # noqa: B023
    assert np.allclose(jax.jit(lambda g: ng.scale_by_metric(IDENTITY, damping=lam).init(g).count)(jnp.ones(2)), 0)
