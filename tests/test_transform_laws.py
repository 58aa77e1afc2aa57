"""Every transformation through the laws: optax contract, scan, vmap, units, numbers that are not finite, masks."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import UNITS, error, flat, tree
from transform_cases import HIDDEN, MATRIX, METRIC, RULES, compiled, data, descending, diagonal, loss, residuals

import natgrad_jax as ng
from natgrad_jax import transforms

every_rule = pytest.mark.parametrize("name", RULES)
# Six steps of condition number up to 100 in the unit-diagonal frame.
TOL = {np.dtype("float32"): 2e-3, np.dtype("float64"): 1e-10}


def as_matrix(path):
    """(steps, p) from a tree of paths, in float64."""
    leaves = [np.asarray(x, float).reshape(len(x), -1) for x in jax.tree.leaves(path)]
    return np.concatenate(leaves, axis=1)


@every_rule
def test_scan_is_a_loop_of_updates_that_lower_the_loss(name, dtype):
    tx, update, path, traces = compiled(name, dtype)
    params, batch = data(dtype)
    scanned, last = path(params, batch)
    state, now, before = tx.init(params), params, len(traces)
    describe = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    shape = describe(state)
    for i in range(6):
        updates, state = update(jax.grad(loss)(now, batch), state, now, batch)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        assert describe(state) == shape
        now = optax.apply_updates(now, updates)
        np.testing.assert_allclose(flat(now), as_matrix(scanned)[i], rtol=TOL[dtype], atol=TOL[dtype])
    assert len(traces) <= before + 1  # one program for the first step and for all others
    assert describe(last) == shape and all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert loss(now, batch) < 0.7 * loss(params, batch)


@every_rule
def test_the_path_does_not_depend_on_units(name, dtype):
    path = compiled(name, dtype).path
    one, other = (as_matrix(path(*data(dtype, unit))[0]) / unit for unit in (np.ones(5), UNITS))
    np.testing.assert_allclose(other, one, rtol=TOL[dtype], atol=TOL[dtype])


@every_rule
def test_vmap_is_a_loop(name, float64):
    """Own parameters, own data; periods in phase."""
    path = compiled(name, float64).path
    params, batch = data(float64)
    lanes = [(jax.tree.map(lambda x: c * x, params), (batch[0], c * batch[1])) for c in (1.0, 0.5, 0.9)]  # noqa: B023
    together, _ = jax.jit(jax.vmap(path))(*jax.tree.map(lambda *x: jnp.stack(x), *lanes))
    for i, lane in enumerate(lanes):
        got = as_matrix(jax.tree.map(lambda x: x[i], together))  # noqa: B023
        np.testing.assert_allclose(got, as_matrix(path(*lane)[0]), rtol=1e-10, atol=1e-10)


# The data of a mini-batch of which only the gradient is added are not looked at.
@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name in RULES for bad in ("gradient", "batch") if (name, bad) != ("accumulate", "batch")],
)
def test_a_bad_step_is_as_if_it_had_not_been(name, bad, dtype):
    """NaN in the gradient, or in the data of metric and loss: no step, and the next one is what it would have been."""
    tx, update, *_ = compiled(name, dtype)
    params, batch = data(dtype)
    g = jax.grad(loss)(params, batch)
    _, state = update(g, tx.init(params), params, batch)
    nan = lambda tree: jax.tree.map(lambda x: x * jnp.nan, tree)
    spoilt = (nan(g), batch) if bad == "gradient" else (g, nan(batch))
    updates, after = update(spoilt[0], state, params, spoilt[1])
    assert np.isfinite(flat(updates)).all()
    if name in ("schedule", "accumulate", "average") or (name.startswith("every_k") and bad == "batch"):
        return  # they count calls; what they hold is from before, and G⁻¹g is known without these data
    assert not flat(updates).any()
    if not name.startswith("damping_grid"):
        before = transforms.summary(state)
        assert int(transforms.summary(after)["skipped"]) == int(before["skipped"]) + 1
    expected, _ = update(g, state, params, batch)
    got, _ = update(g, after, params, batch)
    assert error(got, expected) < TOL[dtype]


@every_rule
def test_no_gradient_no_step(name, dtype):
    tx, update, *_ = compiled(name, dtype)
    params, batch = data(dtype)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        updates, state = update(zero, tx.init(params), params, batch)
        assert not flat(updates).any() and int(transforms.summary(state)["skipped"]) == 0


@every_rule
def test_wrapped_by_optax_it_is_the_same(name, float64):
    """chain, MultiSteps of one, apply_if_finite, unknown arguments, and a `cond` around the update."""
    tx, update, *_ = compiled(name, float64)
    params, batch = data(float64)
    g = jax.grad(loss)(params, batch)
    expected, _ = update(g, tx.init(params), params, batch)
    given = {"batch": batch, "value_fn": loss, "weather": "rain", "temperature": 3.0}
    # The oldest optax hands its extra arguments to a `cond`, which takes arrays alone.
    with_loss = lambda g, s, p, batch: tx.update(g, s, p, batch=batch, value_fn=loss)
    held = optax.GradientTransformationExtraArgs(tx.init, with_loss)
    wrapped = optax.chain(optax.identity(), optax.apply_if_finite(held, 2), optax.identity())
    multi = optax.MultiSteps(wrapped, 1)

    @jax.jit
    def both(g, params, take):
        one = multi.update(g, multi.init(params), params, batch=batch)[0]
        idle = jax.tree.map(jnp.zeros_like, params), tx.init(params)
        two = jax.lax.cond(take, lambda: tx.update(g, idle[1], params, **given), lambda: idle)[0]
        return one, two

    for got in both(g, params, True):
        assert error(got, expected) < 1e-10 or (name == "accumulate" and not flat(got).any())
    assert not flat(both(g, params, False)[1]).any()


@every_rule
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_a_part_of_the_parameters_is_a_smaller_problem(name, wrapper, float64):
    """F_SS⁻¹g_S, and with it bounds, models and values of the loss: the same as with the other leaves held fixed."""
    params, batch = data(float64)
    like = {"batch": batch, "full_params": params}
    inner = RULES[name](like)
    labels = {"a": "natural", "b": "none", "c": "natural"}
    tx = {
        "masked": optax.masked(inner, HIDDEN),
        "partition": optax.transforms.partition({"natural": inner, "none": optax.set_to_zero()}, labels),
    }[wrapper]

    @jax.jit
    def step(params, state):
        g = jax.grad(loss)(params, batch)
        given = {"batch": batch, "value_fn": loss, "full_params": params}
        updates, state = tx.update(g, state, params, **given)
        return {**updates, "b": jnp.zeros(())}, state

    small = {key: params[key] for key in ("a", "c")}
    whole = lambda small: {**small, "b": params["b"]}
    smaller = reduced(name, whole, like)

    @jax.jit
    def smaller_step(small, state):
        value_fn = lambda small, batch: loss(whole(small), batch)
        g = jax.grad(value_fn)(small, batch)
        return smaller.update(g, state, small, batch=batch, value_fn=value_fn)

    state, small_state = tx.init(params), smaller.init(small)
    for _ in range(3):
        updates, state = step(params, state)
        expected, small_state = smaller_step(small, small_state)
        got = {key: updates[key] for key in ("a", "c")}
        np.testing.assert_allclose(flat(got), flat(expected), rtol=1e-9, atol=1e-12)
        params = {**params, **optax.apply_updates({key: params[key] for key in ("a", "c")}, got)}
        small = optax.apply_updates(small, expected)


def reduced(name, whole, like):
    """The same rule on the metric of a function of fewer parameters."""
    of_small = lambda small, batch: residuals(whole(small), batch)
    metric, matrix = (ng.metrics.least_squares(of_small, chunk_size=size) for size in (None, 9))
    swapped = {METRIC: metric, MATRIX: matrix, diagonal: lambda small, *, batch: ng.operators.Diagonal(
        metric(small, batch=batch).diagonal())}  # fmt: skip
    original_metric, original_geodesic = transforms.core.of_metric, transforms.geodesic
    with pytest.MonkeyPatch.context() as patch:
        for module in (transforms.core, transforms.momentum):
            patch.setattr(module, "of_metric", lambda m: original_metric(swapped[m]))
        patch.setattr(transforms, "geodesic", lambda inner, f, **options: original_geodesic(inner, of_small, **options))
        return RULES[name]({"batch": like["batch"]})


@every_rule
def test_without_full_params_a_part_is_refused(name, float64):
    params, batch = data(float64)
    tx = optax.masked(RULES[name]({"batch": batch, "full_params": params}), HIDDEN)
    with pytest.raises(TypeError, match=r"full_params: a part .*hidden.*full_params=params"):
        tx.update(params, tx.init(params), params, batch=batch, value_fn=loss)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(set(RULES) - {"warm cg", "eigh", "schedule"}))
def test_half_precision_goes_in_and_comes_out(name, kind):
    dtype = jnp.dtype(kind)
    params, batch = data(np.dtype("float32"))
    params = cases.cast(params, dtype)
    tx = RULES[name]({"batch": batch})
    g = jax.grad(loss)(params, batch)
    state = tx.init(params)
    updates, after = jax.jit(lambda g, s, p: tx.update(g, s, p, batch=batch, value_fn=loss))(g, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {dtype}
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    assert np.isfinite(flat(updates)).all()


SCALED = [
    "natural_gradient", "heavy_ball", "spring", "geodesic", "levenberg_marquardt", "quadratic_step", "damping_grid",
    "grid_search", "backtracking", "every_k",
]  # fmt: skip


@pytest.mark.parametrize("c", [1e-18, 1e18])
@pytest.mark.parametrize("name", SCALED)
def test_the_scale_of_the_loss_changes_nothing(name, c):
    """c·L and c·G in float32, whose squares would leave the floats."""
    params, batch = data(np.dtype("float32"))
    steps = []
    for factor in (1.0, c):
        value_fn = lambda params, batch, weights: weights * loss(params, batch)
        weights = jnp.float32(factor)
        tx = RULES[name]({"batch": batch, "weights": weights})
        given = {"batch": batch, "weights": weights}
        g = jax.grad(value_fn)(params, **given)
        steps.append(jax.jit(lambda g, s: tx.update(g, s, params, value_fn=value_fn, **given))(g, tx.init(params))[0])  # noqa: B023
    assert error(steps[1], steps[0]) < 1e-4


@pytest.mark.parametrize("tree", [{}, {"a": None, "b": 1.5}, 2.0, [[1.0]]], ids=str)
@pytest.mark.parametrize("name", ["heavy_ball", "spring", "geodesic", "levenberg_marquardt", "quadratic_step",
                                  "damping_grid", "grid_search", "backtracking", "normalise"])  # fmt: skip
def test_small_trees(name, tree):
    """L = 2‖θ‖² and its Hessian: all of them go to the minimum, or half of the way, or a unit of length."""
    theta = jax.tree.map(jnp.asarray, tree)
    f = lambda p: jax.tree.map(lambda x: 2 * x, p)
    value_fn = lambda p: 0.5 * sum((jnp.sum(x**2) for x in jax.tree.leaves(f(p))), start=jnp.zeros(()))
    options = {"geodesic": (f,), "levenberg_marquardt": (1e-6,)}.get(name, ())
    rule = getattr(transforms, name)(transforms.precondition(), *options)
    tx = descending(rule, ng.metrics.scales(0.5))
    updates, _ = tx.update(jax.grad(value_fn)(theta), tx.init(theta), theta, value_fn=value_fn)
    assert jax.tree.structure(updates) == jax.tree.structure(theta)
    expected = -flat(theta) / (2 * np.linalg.norm(flat(theta)) if name == "normalise" and flat(theta).size else 1)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["trust_region", "geodesic", "levenberg_marquardt", "spring", "every_k", "average", "accumulate"]
)
def test_derivatives_pass_through_a_path(name, float64):
    """Reverse mode through three steps, against a finite difference: what hyperparameters are learnt by."""
    params, batch = data(float64)
    tx = RULES[name]({"batch": batch})

    @jax.jit
    def last(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params, batch=batch, value_fn=loss)
            return (optax.apply_updates(params, updates), state), None

        return loss(jax.lax.scan(step, (params, tx.init(params)), None, length=3)[0][0], batch)

    moved = lambda h: jax.tree.map(lambda x: x + h, params)
    slope = sum(jnp.sum(x) for x in jax.tree.leaves(jax.grad(last)(params)))
    np.testing.assert_allclose(slope, (last(moved(1e-6)) - last(moved(-1e-6))) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["natural_gradient", "every_k", "spring", "heavy_ball", "quadratic_step", "normalise",
                                  "levenberg_marquardt", "damping_grid"])  # fmt: skip
def test_complex_parameters(name, float64):
    """A real metric of complex parameters: the step is that of their real and imaginary parts."""
    rng = np.random.default_rng(2)
    samples = jnp.asarray(rng.choice([-1.0, 1.0], (16, 3)))
    parts = jnp.asarray(rng.normal(size=(2, 3)))
    log_psi = lambda p, s: jax.lax.complex(jnp.log(jnp.cosh(p[0] @ s)), jnp.sum(jnp.sin(p[1] * s)) + p[0, 0] * p[1, 2])
    of_complex = lambda w, s: log_psi(jnp.stack([jnp.real(w), jnp.imag(w)]), s)
    value_fn = lambda p: jnp.sum(jnp.cos(p[0]) + p[1] ** 2)
    of_complex_value = lambda w: value_fn(jnp.stack([jnp.real(w), jnp.imag(w)]))

    def steps(psi, value_fn, params, convention):
        metric, inner = ng.metrics.quantum_geometric(psi), transforms.precondition(damping=0.1)
        natural = transforms.with_metric(metric, transforms.scale_step(inner, -0.5))
        tx = {
            "natural_gradient": natural, "every_k": transforms.every_k(natural, 2, like={"samples": samples})
        }.get(name)  # fmt: skip
        # An undamped model of a singular metric takes steps of 10¹⁷, and their rounding with them.
        options = {"damping": 0.2} if name == "quadratic_step" else {}
        tx = tx or descending(getattr(transforms, name)(inner, **options), metric)
        state, g = tx.init(params), lambda p: convention(jax.grad(value_fn)(p))
        update = jax.jit(lambda p, s: tx.update(g(p), s, p, samples=samples, value_fn=value_fn))
        for _ in range(3):
            updates, state = update(params, state)
            params = params + updates
        return np.asarray(params)

    expected = steps(log_psi, value_fn, parts, lambda g: g)
    got = steps(of_complex, of_complex_value, jax.lax.complex(parts[0], parts[1]), jnp.conj)
    np.testing.assert_allclose(got, expected[0] + 1j * expected[1], rtol=1e-9)


def test_eager_is_jit(dtype):
    """For pieces that touch every line; the others are built of these."""
    for name in ("trust_region", "levenberg_marquardt", "every_k"):
        tx, update, *_ = compiled(name, dtype)
        params, batch = data(dtype)
        g = jax.grad(loss)(params, batch)
        eager, _ = tx.update(g, tx.init(params), params, batch=batch, value_fn=loss)
        assert error(eager, update(g, tx.init(params), params, batch)[0]) < TOL[dtype]


def _injected(hyperparameter):
    return {
        "max_kl": lambda h: ng.natural_gradient(0.5, METRIC, max_kl=h),
        "damping": lambda h: ng.natural_gradient(0.5, METRIC, damping=h),
        "learning_rate": lambda h: ng.natural_gradient(h, METRIC),
        "decay": lambda h: descending(transforms.spring(transforms.precondition(damping=0.1), h)),
        "step": lambda h: descending(transforms.geodesic(transforms.precondition(), residuals, learning_rate=h)),
    }[hyperparameter]


@pytest.mark.parametrize("hyperparameter", ["max_kl", "damping", "learning_rate", "decay", "step"])
def test_hyperparameters_may_be_injected(hyperparameter, float64):
    params, batch = data(float64)
    build = _injected(hyperparameter)
    tx = optax.inject_hyperparams(lambda h: build(h))(0.05)
    g = jax.grad(loss)(params, batch)
    traces = []
    step = jax.jit(lambda state: traces.append(1) or tx.update(g, state, params, batch=batch, value_fn=loss))
    state = tx.init(params)
    for value in (0.05, 0.02):
        state = state._replace(hyperparams={"h": jnp.asarray(value)})
        expected = build(value).update(g, build(value).init(params), params, batch=batch, value_fn=loss)[0]
        assert error(step(state)[0], expected) < 1e-10
    assert len(traces) == 1


def test_multisteps_keeps_the_last_data_and_accumulate_is_the_cheap_way(float64):
    """Both take the mean gradient of two mini-batches and the metric of the second."""
    params, batch = data(float64)
    other = jax.tree.map(lambda x: x[::-1] * 0.5, batch)
    gradients = [jax.grad(loss)(params, b) for b in (batch, other)]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *gradients)
    inner = ng.natural_gradient(0.5, METRIC)
    expected, _ = inner.update(mean, inner.init(params), params, batch=other)
    for tx in (optax.MultiSteps(inner, 2), transforms.accumulate(inner, 2)):
        state = tx.init(params)
        first, state = tx.update(gradients[0], state, params, batch=batch)
        second, state = tx.update(gradients[1], state, params, batch=other)
        assert not flat(first).any()
        assert error(second, expected) < 1e-6  # MultiSteps adds in float32


def test_accumulate_costs_nothing_in_between(float64):
    """The metric is not evaluated for mini-batches that only add their gradient."""
    params, batch = data(float64)
    seen = []

    def counted(params, *, batch):
        jax.debug.callback(lambda: seen.append(1))
        return METRIC(params, batch=batch)

    tx = transforms.accumulate(ng.natural_gradient(0.5, counted), 3)
    step, state = jax.jit(lambda s: tx.update(params, s, params, batch=batch)[1]), tx.init(params)
    for _ in range(7):
        state = step(state)
    jax.effects_barrier()
    assert len(seen) == 2
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    _, state = tx.update(bad, state, params, batch=batch)
    total, _ = tx.update(params, state, params, batch=batch)
    expected, _ = inner_step(params, batch)
    assert error(total, expected) < 1e-10  # the mean of the two that are finite


def inner_step(params, batch):
    tx = ng.natural_gradient(0.5, METRIC)
    return tx.update(params, tx.init(params), params, batch=batch)


def test_lookahead_and_schedule_free(float64):
    """lookahead forwards no data: for metrics without any. schedule_free forwards them."""
    params, batch = data(float64)
    tx = optax.lookahead(ng.natural_gradient(0.02, ng.metrics.scales(tree(np.ones(5), float64))), 2, 0.5)
    pair = optax.LookaheadParams.init_synced(params)
    state = tx.init(pair)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(pair.fast, batch), state, pair)
        pair = optax.apply_updates(pair, updates)
    assert loss(pair.slow, batch) < loss(params, batch)
    tx = optax.contrib.schedule_free(ng.natural_gradient(0.5, METRIC), 0.5, b1=0.9)
    state, now = tx.init(params), params
    step = jax.jit(lambda s, p: tx.update(jax.grad(loss)(p, batch), s, p, batch=batch))
    for _ in range(10):
        updates, state = step(state, now)
        now = optax.apply_updates(now, updates)
    assert loss(optax.contrib.schedule_free_eval_params(state, now), batch) < 0.7 * loss(params, batch)
