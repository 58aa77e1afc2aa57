"""Known answers: zero probabilities, estimators, exponential families, quantum states, transport, learning."""

import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FISHERS, error, flat
from metric_cases import LABELS, PARAMS, X, Y, affine, curved

import natgrad_jax as ng
from natgrad_jax import metrics, operators, solvers
from natgrad_jax.metrics import losses

# The Fisher information.


@pytest.mark.parametrize("t", [0.0, 1e-8, 0.5, np.pi, 4.0])
def test_amplitudes_are_right_where_probabilities_are_zero(t, dtype):
    """p = (cos² t/2, sin² t/2): F = 1 for all t; without the zeros it would be 0 at t = 0."""
    double = lambda t: 2 * jnp.stack([jnp.cos(t / 2), jnp.sin(t / 2)])
    got = metrics.pullback(double)(jnp.asarray(t, dtype)).dense()
    np.testing.assert_allclose(got, [[1.0]], rtol=4 * cases.eps(dtype))


@pytest.mark.parametrize("name", FISHERS)
def test_the_three_builders_agree(name, float64):
    log_prob, params, support, expected, options = cases.fisher_case(name, float64)
    report = ng.check_fisher(log_prob, params, support, **options)
    assert error(report.matrices["scores"], expected) < 1e-10
    if name == "Laplace":
        assert not report.fine and report.differences["hessian"] > 0.9 and "FAILED hessian" in str(report)
        np.testing.assert_allclose(report.matrices["hessian"][0], 0, atol=1e-9)
        return
    assert report.fine, report
    assert max(report.differences.values()) < 1e-9 and report.mean_score < 1e-9 and abs(report.total - 1) < 1e-9


@pytest.mark.parametrize("name", ["categorical logits", "normal, natural", "gamma"])
def test_what_is_not_normalised_for_every_parameter_is_reported(name, float64):
    log_prob, params, support, _, options = cases.fisher_case(name, float64)
    shifted = lambda t, x: log_prob(t, x) + 3 * flat_sum(t) - 5
    assert not ng.check_fisher(shifted, params, support, **options).fine
    assert ng.check_fisher(shifted, params, support, normalized=False, **options).fine


def flat_sum(tree):
    return sum(jnp.sum(x) for x in jax.tree.leaves(tree))


def test_a_support_that_moves_is_reported(float64):
    """Uniform on [0, θ]: E[s] = −1/θ, and there is no Fisher information; the one of Wasserstein is 1/3."""
    nodes, weights = np.linspace(0.0005, 3.9995, 4000), np.full(4000, 0.001)
    uniform = lambda t, x: jnp.where(x < t, -jnp.log(t), -jnp.inf)
    report = ng.check_fisher(uniform, jnp.array(2.0), jnp.asarray(nodes), weights=jnp.asarray(weights))
    assert not report.fine and report.moved > 0
    assert any(failure.startswith("support:") for failure in report.failures)
    assert any(failure.startswith("mean score:") for failure in report.failures)
    for metric in (
        metrics.wasserstein_1d(lambda t, u: t * u),
        metrics.wasserstein_1d(cdf=lambda t, x: jnp.clip(x / t, 0, 1), bracket=lambda t: (jnp.zeros_like(t), t)),
    ):
        np.testing.assert_allclose(metric(jnp.array(2.0)).dense(), [[1 / 3]], rtol=1e-12)


def test_a_zero_of_probability_that_is_hidden_is_reported(dtype):
    """The circle at t = 0 with the zero left out by hand: the scores say 0, and the other builders do not."""
    pair = lambda t: jnp.stack([jnp.cos(t / 2) ** 2, jnp.sin(t / 2) ** 2])
    log_prob = lambda t, k: jnp.where(pair(t) > 0, jnp.log(jnp.where(pair(t) > 0, pair(t), 1)), -jnp.inf)[k]
    report = ng.check_fisher(log_prob, jnp.zeros((), dtype), jnp.arange(2))
    assert not report.fine and report.differences["hessian"] == pytest.approx(1)
    flat_top = lambda t, x: jnp.where(x < t, 0.0, -jnp.inf) + 0 * t
    nodes = jnp.arange(20, dtype=dtype) / 10
    assert ng.check_fisher(flat_top, jnp.asarray(1.05, dtype), nodes, normalized=False).moved > 0


def test_what_does_not_sum_to_one_is_reported(dtype):
    report = ng.check_fisher(lambda t, k: t[k], jnp.zeros(3, dtype), jnp.arange(3))
    assert not report.fine and report.total == pytest.approx(3) and "total probability" in report.failures[0]


def test_the_circle_at_a_zero_is_reported(float64):
    log_prob, _, support, *_ = cases.fisher_case("circle", np.float64)
    report = ng.check_fisher(log_prob, jnp.array(0.0), support)
    assert not report.fine and any("amplitude" in failure for failure in report.failures)


def test_blocks_are_laid_out_as_by_hessian(float64):
    """The Fisher information of a normal linear model is the Hessian of half its squares, block by block."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / np.sqrt(2 * np.pi)
    log_prob = lambda p, y: -0.5 * jnp.sum((y - affine(p, X[0])) ** 2)
    grid = np.array(list(itertools.product(nodes, repeat=3))) + np.asarray(affine(PARAMS, X[0]))
    product = np.prod(np.array(list(itertools.product(weights, repeat=3))), axis=1)
    density = np.exp([-0.5 * np.sum((y - affine(PARAMS, X[0])) ** 2) for y in grid])
    got = metrics.fisher_information(log_prob, cases.cast(PARAMS, float64), grid, weights=product / density)
    expected = jax.hessian(lambda p: 0.5 * jnp.sum(affine(p, X[0]) ** 2))(cases.cast(PARAMS, float64))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    for a in got:
        for b in got[a]:
            np.testing.assert_allclose(got[a][b], expected[a][b], atol=1e-12)


# Estimators: unbiased by enumeration, not by luck.


def test_monte_carlo_over_all_label_tuples_is_the_exact_matrix(float64):
    """The mean over the C^N ways to draw labels for N inputs, by a key that says which way."""
    n, ways = 3, list(itertools.product(range(3), repeat=3))
    log_prob = lambda p, y, x: jax.nn.log_softmax(affine(p, x))[y]
    params, batch = cases.cast(PARAMS, float64), jnp.asarray(X[:n])
    exact = metrics.fisher(log_prob, jnp.arange(3), inputs=True)(params, batch=batch).dense()
    p = np.exp([jax.nn.log_softmax(affine(params, x)) for x in batch])
    total = np.zeros((9, 9))
    for way in ways:
        # x carries its place, by which `sample` finds the label of this way.
        sample = lambda _p, _key, x, way=way: jnp.asarray(way)[x[2].astype(int)]
        placed = lambda q, y, x: log_prob(q, y, x[:2])
        metric = metrics.monte_carlo_fisher(placed, sample, 1, inputs=True)
        data = jnp.concatenate([batch, jnp.arange(n)[:, None]], axis=1)
        weight = np.prod([p[i, y] for i, y in enumerate(way)])
        total += weight * np.asarray(metric(params, key=jax.random.key(0), batch=data).dense())
    assert error(total, exact) < 1e-12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_monte_carlo_is_unbiased_and_of_low_rank(seed, float64):
    """Mean over 500 keys within five standard errors, rank at most the number of draws; another key, other draws."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    log_prob = lambda t, k: jax.nn.log_softmax(t)[k]
    metric = metrics.monte_carlo_fisher(log_prob, lambda t, key: jax.random.categorical(key, t), 2)
    keys = jax.random.split(jax.random.key(seed), 500)
    matrices = np.asarray(jax.vmap(lambda key: metric(logits, key=key).dense())(keys))
    p = np.array([0.5, 0.3, 0.2])
    spread = matrices.std(0) / np.sqrt(500)
    assert (np.abs(matrices.mean(0) - np.diag(p) + np.outer(p, p)) < 5 * spread + 1e-12).all()
    assert np.linalg.matrix_rank(matrices[0], tol=1e-12) <= 2
    assert error(metric(logits, key=keys[0]).dense(), matrices[0]) < 1e-14


def test_the_linear_gaussian_layer(float64):
    """Precision π, inputs x: the mean over 500 keys of the diagonal is π·mean x², within 5 %."""
    pi, x = 4.0, jnp.asarray(X)
    log_prob = lambda w, y, x: -0.5 * pi * (y - x @ w) ** 2
    sample = lambda w, key, x: x @ w + jax.random.normal(key) / pi**0.5
    metric = metrics.monte_carlo_fisher(log_prob, sample, 1, inputs=True)
    diagonal = jax.vmap(lambda key: metric(jnp.zeros(2), key=key, batch=x).diagonal())(
        jax.random.split(jax.random.key(0), 500)
    )
    np.testing.assert_allclose(diagonal.mean(0), pi * np.mean(X**2, axis=0), rtol=0.05)


def test_the_empirical_fisher_is_gradient_squared_plus_variance(float64):
    """diag = g² + Var over the data, and not the Fisher information."""
    log_prob = lambda p, xy: jax.nn.log_softmax(affine(p, xy[0]))[xy[1]]
    params, batch = cases.cast(PARAMS, float64), (jnp.asarray(X), jnp.asarray(LABELS))
    op = metrics.empirical_fisher(log_prob)(params, batch=batch)
    scores = np.stack([flat(jax.grad(log_prob)(params, (x, y))) for x, y in zip(*batch)])
    np.testing.assert_allclose(flat(op.diagonal()), scores.mean(0) ** 2 + scores.var(0), rtol=1e-12)
    gradient = jax.grad(lambda p: -jnp.mean(jax.vmap(lambda xy: log_prob(p, xy))(batch)))(params)
    value, g = metrics.value_and_grad(op)  # its residual is that of the mean negative log-likelihood
    assert error(g, gradient) < 1e-13 and value == pytest.approx(0.5)
    exact = metrics.fisher(lambda p, y, x: log_prob(p, (x, y)), jnp.arange(3), inputs=True)(params, batch=batch[0])
    assert error(op.dense(), exact.dense()) > 0.3


@pytest.mark.parametrize("matrix_free", [False, True])
@pytest.mark.parametrize("num_samples", [2, 20])
def test_centring_the_draws_of_each_input_is_unbiased(num_samples, matrix_free, float64):
    """F = x² for a normal of mean θx, up to a function of θ and x alone; once a sum was taken for the mean."""
    log_phi = lambda t, y, x: -0.5 * (y - t * x) ** 2 + 50 * t * x + t**2
    sample = lambda t, key, x: t * x + jax.random.normal(key)
    metric = metrics.monte_carlo_fisher(
        log_phi, sample, num_samples, inputs=True, centred=True, matrix_free=matrix_free
    )
    got = metric(jnp.array(1.0), key=jax.random.key(0), batch=2 * jnp.ones(4000)).dense()[0, 0]
    assert abs(got / 4 - 1) < 5 * np.sqrt(2 / (4000 * (num_samples - 1)))


def test_every_input_has_draws_of_its_own(float64):
    sample = lambda t, key, x: jax.random.normal(key)
    metric = metrics.monte_carlo_fisher(lambda t, y, x: t * y, sample, 2, inputs=True)
    rows = metric(jnp.array(1.0), key=jax.random.key(0), batch=jnp.ones(5)).rows
    assert len(np.unique(rows)) == 10


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"matrix_free": True}])
def test_what_is_centred_does_not_depend_on_an_outlier_without_weight(options):
    """float32, the first point at 1e8: differences to it have no digits left. Var(0, 1, 2) = 2/3."""
    x, w = jnp.array([1e8, 0.0, 1.0, 2.0]), jnp.array([0.0, 1.0, 1.0, 1.0])
    log_phi = lambda t, x: t * x
    got = metrics.fisher(log_phi, x, weights=w, normalized=False, **options)(jnp.float32(0.0))
    np.testing.assert_allclose(got.dense(), [[2 / 3]], rtol=1e-6)
    given = metrics.fisher(lambda t, y, _: t * y, x, weights=w, normalized=False, inputs=True, **options)
    np.testing.assert_allclose(given(jnp.float32(0.0), batch=jnp.ones(2)).dense(), [[2 / 3]], rtol=1e-6)


@pytest.mark.parametrize("jac", ["fwd", "rev"])
def test_data_in_double_precision_leave_the_precision_of_the_parameters(jac, float64):
    """float32 parameters, float64 data, in the mode in which both exist."""
    params, batch = jnp.ones(2, jnp.float32), (jnp.asarray(X), jnp.ones((7, 1)))
    model = lambda w, batch: (batch[0] @ w)[:, None]
    for metric in (
        metrics.least_squares(model, jac=jac), metrics.gauss_newton(model, losses.squares(), jac=jac),
        metrics.pullback(lambda w: X @ w, jac=jac),
    ):  # fmt: skip
        op = metric(params) if metric.__name__ == "pullback" else metric(params, batch=batch)
        assert op.rows.dtype == jnp.float32 and (op.residual is None or op.residual.dtype == jnp.float32)


def test_a_constant_column_is_no_curvature(dtype):
    """The normalisation of a wave function: exactly 0, or solvers that do not see units would step along it by 1e26."""
    log_psi = lambda p, x: p["w"] @ x + 50.3 * p["c"]
    params = {"c": jnp.ones((), dtype), "w": jnp.ones(2, dtype)}
    for options in ({}, {"chunk_size": 3}):
        op = metrics.quantum_geometric(log_psi, **options)(params, samples=jnp.asarray(X, dtype))
        assert float(op.diagonal()["c"]) == 0.0 and float(op.diagonal()["w"][0]) > 0


# Models.

LIKELIHOODS = {
    "squares": (losses.squares, lambda z, y: -0.5 * jnp.sum((y - z) ** 2), Y, None),
    "softmax": (losses.softmax_cross_entropy, lambda z, y: jax.nn.log_softmax(z)[y], LABELS, np.arange(3)),
    "sigmoid": (
        losses.sigmoid_cross_entropy, lambda z, y: jnp.sum(jax.nn.log_sigmoid((2 * y - 1) * z)), (Y > 0) * 1.0,
        np.array(list(itertools.product([0.0, 1.0], repeat=3))),
    ),
    "poisson": (
        losses.poisson, lambda z, y: jnp.sum(y * z - jnp.exp(z) - jax.scipy.special.gammaln(y + 1)),
        np.abs(np.round(Y)), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_for_canonical_links_three_things_are_one(name, float64):
    """Fisher = GGN; for a model that is linear in its parameters also −E[Hessian], whatever the labels."""
    loss, log_lik, targets, support = LIKELIHOODS[name]
    params, batch = cases.cast(PARAMS, float64), (jnp.asarray(X), jnp.asarray(targets))
    model = lambda p, batch: affine(p, batch[0])
    ggn = metrics.gauss_newton(model, loss())(params, batch=batch)
    total = lambda p: loss()(model(p, batch), batch)
    hessian = jax.hessian(lambda t: total(ggn.space.unravel(t)))(ggn.space.ravel(params))
    assert error(ggn.dense(), hessian) < 1e-12
    if support is not None:
        log_prob = lambda p, y, x: log_lik(affine(p, x), y)
        fisher = metrics.fisher(log_prob, jnp.asarray(support), inputs=True)(params, batch=batch[0])
        assert error(ggn.dense(), fisher.dense()) < 1e-12
    value, gradient = metrics.value_and_grad(ggn)
    assert error(gradient, jax.grad(total)(params)) < 1e-12 and value > 0


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_closed_form_root_is_the_one_of_automatic_differentiation(name, dtype):
    """The same loss as a plain function, whose Hessian is found by products."""
    loss, _, targets, _ = LIKELIHOODS[name]
    params, batch = cases.cast(PARAMS, dtype), (jnp.asarray(X, dtype), jnp.asarray(targets))
    model = lambda p, batch: curved(p, batch[0])
    closed = metrics.gauss_newton(model, loss())(params, batch=batch).dense()
    plain = metrics.gauss_newton(model, lambda z, batch: loss()(z, batch))
    assert error(plain(params, batch=batch).dense(), closed) < (1e-12 if dtype == np.float64 else 1e-5)


def test_the_probit_link_is_not_canonical(float64):
    """Fisher φ²/(Φ(1 − Φ)) against the second derivative of −log Φ, which knows the label."""
    cdf = jax.scipy.stats.norm.cdf
    log_prob = lambda w, y, x: jnp.log(jnp.where(y == 1, cdf(x * w), cdf(-x * w)))
    w, x = jnp.array(0.7), jnp.array([1.0, -0.5])
    fisher = metrics.fisher(log_prob, jnp.arange(2), inputs=True)(w, batch=x).dense()[0, 0]
    pdf = np.exp(-0.5 * (x * w) ** 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(fisher, np.mean(x**2 * pdf**2 / (cdf(x * w) * cdf(-x * w))), rtol=1e-12)
    ggn = metrics.gauss_newton(
        lambda w, batch: batch[:, None] * w, lambda z, batch: -jnp.mean(jnp.log(cdf(z))), chunk_size=1
    )
    assert abs(ggn(w, batch=x).dense()[0, 0] - fisher) > 0.02


@pytest.mark.parametrize("gap", [14.0, 30.0, 50.0, 80.0])
@pytest.mark.parametrize("solver", [None, solvers.qr()])
@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.1])
def test_a_saturated_example_does_not_spoil_the_step(decay, solver, gap):
    """float32, one example that is sure and wrong: its residual is e^gap/2 on a row of e^−gap/2."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(6, 4)), np.array([0, 1, 2, 0, 1, 2])
    shift = np.zeros((6, 3))
    shift[0, 1] = gap
    model = lambda w, batch: batch[0] @ w + batch[2]
    metric = metrics.gauss_newton(model, losses.softmax_cross_entropy())
    w = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    batch = (jnp.asarray(inputs, jnp.float32), labels, jnp.asarray(shift, jnp.float32))
    g = jax.grad(lambda w: losses.softmax_cross_entropy()(model(w, batch), batch))(w) + decay * w
    tx = ng.scale_by_metric(metric, solver=solver, damping=ng.damping.absolute(0.01))
    step, state = tx.update(g, tx.init(w), w, batch=batch)
    matrix = np.asarray(metric(w, batch=batch).dense(), float)
    expected = np.linalg.solve(matrix + 0.01 * np.eye(12), flat(g))
    assert error(step, expected) < (1e-5 if gap == 14 and solver is None else 2e-3) and bool(state.converged)


@pytest.mark.parametrize("gap", [0.0, 10.0, 40.0, 80.0])
@pytest.mark.parametrize("half", [False, True])
def test_a_plain_loss_of_saturated_outputs_is_not_refused(half, gap):
    """float32 and bfloat16 outputs; where one example is sure the others still count, exactly."""
    cross_entropy = lambda z, batch: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch[1]))
    z = np.where(np.arange(6)[:, None] == 0, [gap, 0, 0], Y[:6])
    model = lambda t, batch: (batch[0] + t).astype(jnp.bfloat16 if half else jnp.float32)
    batch = (jnp.asarray(z, jnp.float32), np.arange(6) % 3)
    plain = metrics.gauss_newton(model, cross_entropy)(jnp.zeros(3), batch=batch)
    closed = metrics.gauss_newton(model, losses.softmax_cross_entropy())(jnp.zeros(3), batch=batch)
    # Cotangents of bfloat16 outputs are bfloat16, 2⁻⁹.
    assert error(plain.dense(), closed.dense()) < (4e-3 if half else 1e-5)
    alone = (jnp.asarray(z[:1], jnp.float32), np.zeros(1, int))
    assert np.isfinite(metrics.gauss_newton(model, cross_entropy)(jnp.zeros(3), batch=alone).dense()).all()


def test_masked_logits_and_labels_out_of_range():
    loss = losses.softmax_cross_entropy()
    z = jnp.array([[0.0, -jnp.inf, 0.0]])
    np.testing.assert_allclose(loss(z, (None, jnp.array([0]))), np.log(2), rtol=1e-6)
    with pytest.raises(ValueError, match="targets: expected labels from 0 to 2, got 3"):
        loss(z, (None, jnp.array([3])))
    assert np.isnan(jax.jit(lambda y: loss(z, (None, y)))(jnp.array([-1])))
    assert np.isnan(loss(z, (None, jnp.array([[0.5, 0.0, 0.6]]))))


@pytest.mark.parametrize("gap", [50.0, 80.0])
def test_saturated_probabilities_keep_their_curvature(gap):
    """Softmax of (0, −gap): H = p(1 − p)[[1, −1], [−1, 1]] with p = e^−gap, far below eps, in float32."""
    metric = metrics.gauss_newton(lambda z, batch: z[None], losses.softmax_cross_entropy())
    op = metric(jnp.array([0.0, -gap], jnp.float32), batch=(jnp.zeros(1), jnp.array([0])))
    p = np.exp(-gap)
    rows = np.asarray(op.matrix(), float)
    np.testing.assert_allclose(rows.T @ rows, p * np.array([[1, -1], [-1, 1]]), rtol=1e-4)
    sigmoid = metrics.gauss_newton(lambda z, batch: z[None], losses.sigmoid_cross_entropy())
    op = sigmoid(jnp.array([-gap], jnp.float32), batch=(jnp.zeros(1), jnp.array([[1.0]])))
    np.testing.assert_allclose(np.asarray(op.matrix(), float) ** 2, [[p]], rtol=1e-4)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_losses_reject_targets_of_another_shape(name):
    loss, _, targets, _ = LIKELIHOODS[name]
    with pytest.raises(ValueError, match="targets: expected shape"):
        loss()(jnp.zeros((7, 4)) if name != "softmax" else jnp.zeros((6, 3)), (X, jnp.asarray(targets)))


def test_a_sequence_of_outputs_for_each_example(float64):
    """Tokens: the last axis is that of the classes, every other one is summed."""
    params = jnp.asarray(Y[:4])  # (token, class)
    batch = (jnp.asarray(X[:2]), jnp.asarray([[0, 1, 2, 0], [1, 1, 0, 2]]))
    model = lambda z, batch: batch[0][:, :1, None] * z[None]
    metric = metrics.gauss_newton(model, losses.softmax_cross_entropy(mean=False))
    p = np.exp(jax.nn.log_softmax(X[:2, :1, None] * Y[None, :4]))
    expected = np.zeros((12, 12))
    for t in range(4):
        at = slice(3 * t, 3 * t + 3)
        for i in range(2):
            expected[at, at] += X[i, 0] ** 2 * (np.diag(p[i, t]) - np.outer(p[i, t], p[i, t]))
    assert error(metric(params, batch=batch).dense(), expected) < 1e-12


def test_linear_least_squares_take_one_undamped_step(float64):
    rows, y = jnp.asarray(cases.ROWS), jnp.asarray(np.cos(np.arange(9.0)))
    metric = metrics.least_squares(lambda w, batch: batch[0] @ w - batch[1])
    for solver in (None, solvers.qr(), solvers.eigh()):
        tx = ng.natural_gradient(1.0, metric, solver=solver, damping=0.0)
        w = jnp.ones(5)
        op = metric(w, batch=(rows, y))
        _, g = metrics.value_and_grad(op)
        step, _ = tx.update(g, tx.init(w), w, batch=(rows, y))
        assert error(w + step, np.linalg.lstsq(cases.ROWS, y)[0]) < 1e-12


@pytest.mark.parametrize("start", [(-1.2, 1.0), (30.0, -7.0)])
def test_gauss_newton_solves_rosenbrock_in_two_steps(start, float64):
    metric = metrics.pullback(lambda z: jnp.stack([1 - z[0], 10 * (z[1] - z[0] ** 2)]))
    loss = lambda z: 0.5 * ((1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2)
    tx = ng.natural_gradient(1.0, metric, damping=0.0)
    z = jnp.array(start)
    for _ in range(2):
        step, _ = tx.update(jax.grad(loss)(z), tx.init(z), z)
        z = z + step
    np.testing.assert_allclose(z, [1, 1], atol=1e-9)


def test_value_gradient_and_rows_of_several_terms(dtype):
    terms = [
        lambda p, x: affine(p, x),
        lambda p, batch: {"u": curved(p, batch[0]) - batch[1], "b": batch[0] @ p["w"].T},
    ]
    metric = metrics.least_squares(terms, [2.0, 0.5])
    params = cases.cast(PARAMS, dtype)
    data = [jnp.asarray(X[:4], dtype), (jnp.asarray(X, dtype), jnp.asarray(Y, dtype))]
    op = metric(params, batch=data)

    def objective(p):
        second = terms[1](p, data[1])
        return jnp.sum(terms[0](p, data[0]) ** 2) + 0.25 * (jnp.sum(second["u"] ** 2) + jnp.sum(second["b"] ** 2))

    value, gradient = metrics.value_and_grad(op)
    assert error(value, objective(params)) < 20 * cases.eps(dtype)
    assert error(gradient, jax.grad(objective)(params)) < 50 * cases.eps(dtype)
    other = metric(params, batch=data, weights=[2.0 * jnp.ones(4, dtype), jnp.asarray(0.5, dtype)])
    assert error(other.dense(), op.dense()) < 20 * cases.eps(dtype)


def test_rows_are_per_example(dtype):
    """A model that mixes its batch is what it gives for batches of one: here the mean taken out leaves nothing."""
    metric = metrics.least_squares(lambda w, x: (x - jnp.mean(x, axis=0)) * w)
    assert not metric(jnp.ones((), dtype), batch=jnp.arange(3, dtype=dtype)).rows.any()


# Exponential families.


def test_the_hessian_of_the_log_partition_is_the_fisher_information(float64):
    """F = ∂η/∂θ = ∇²A, and F⁻¹∇_θL = ∇_ηL."""
    logits = jnp.array([0.3, -0.4, 0.9])
    log_prob = lambda t, k: jax.nn.log_softmax(t)[k]
    fisher = ng.fisher_matrix(log_prob, logits, jnp.arange(3))
    assert error(metrics.hessian(jax.nn.logsumexp)(logits).dense(), fisher) < 1e-14
    assert error(jax.jacfwd(jax.nn.softmax)(logits), fisher) < 1e-14
    minimal = lambda t, k: jax.nn.log_softmax(jnp.append(t, 0.0))[k]
    theta, cost = logits[:2] - logits[2], jnp.array([1.0, -2.0, 0.5])
    mean = lambda t: jax.nn.softmax(jnp.append(t, 0.0))[:2]
    in_mean = lambda eta: cost @ jnp.append(eta, 1 - jnp.sum(eta)) + jnp.sum(eta**3)
    g = jax.grad(lambda t: in_mean(mean(t)))(theta)
    step = solvers.solve(metrics.fisher(minimal, jnp.arange(3))(theta), g).value
    assert error(step, jax.grad(in_mean)(mean(theta))) < 1e-13


def test_the_softmax_metric_has_one_null_direction(dtype):
    """F = diag(p) − ppᵀ: rank k − 1, F·1 = 0, and F⁺ = C diag(1/p) C with C the centring."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    op = metrics.fisher(lambda t, k: jax.nn.log_softmax(t)[k], jnp.arange(4))(jnp.asarray(np.log(p), dtype))
    np.testing.assert_allclose(op.mv(jnp.ones(4, dtype)), 0, atol=8 * cases.eps(dtype))
    centring = np.eye(4) - 0.25
    inverse = centring @ np.diag(1 / p) @ centring
    g = np.array([1.0, -2.0, 0.5, 0.5])
    solved = solvers.solve(op, jnp.asarray(g, dtype), solver=solvers.eigh(), damping=ng.damping.absolute(0.0))
    assert error(solved.value, inverse @ g) < 200 * cases.eps(dtype) and int(solved.stats.rank) == 3


def test_a_redundant_parametrisation_moves_the_model_alike(float64):
    """θ = a + 2b: g is in the range of F, and what the step does to the model is that of one parameter."""
    log_prob = lambda t, x: jax.nn.log_sigmoid((2 * x - 1) * t)
    double = lambda p, x: log_prob(p[0] + 2 * p[1], x)
    loss = lambda t: (jax.nn.sigmoid(t) - 0.3) ** 2
    single, both = jnp.array(0.7), jnp.array([0.1, 0.3])
    one = solvers.solve(metrics.fisher(log_prob, jnp.arange(2.0))(single), jax.grad(loss)(single)).value
    op, g = metrics.fisher(double, jnp.arange(2.0))(both), jax.grad(lambda p: loss(p[0] + 2 * p[1]))(both)
    two = solvers.solve(op, g, solver=solvers.eigh()).value
    np.testing.assert_allclose(two[0] + 2 * two[1], one, rtol=1e-10)
    assert ng.report(op, g).outside < 1e-12


@pytest.mark.parametrize("r", [1, 2, 3])
def test_a_low_rank_covariance_has_rotations_for_null_directions(r, float64):
    """N(0, diag(d) + BBᵀ): ½tr(Σ⁻¹dΣΣ⁻¹dΣ) has nullity r(r − 1)/2."""
    n = 6
    params = {"b": jnp.asarray(np.random.default_rng(r).normal(size=(n, r))), "d": jnp.linspace(1.0, 2.0, n)}
    sigma = lambda p: jnp.diag(p["d"]) + p["b"] @ p["b"].T
    inverse = np.linalg.inv(np.linalg.cholesky(sigma(params)))
    metric = metrics.pullback(lambda p: inverse @ sigma(p) @ inverse.T / jnp.sqrt(2.0))
    assert ng.report(metric(params)).rank == n + n * r - r * (r - 1) // 2


def test_an_amplitude_by_logarithms_is_safe_where_a_root_is_not(float64):
    """∂(2√p) is NaN at p = 0; 2·exp(log p/2) of a log-softmax with a masked class is not."""
    mask = jnp.array([0.0, 0.0, -jnp.inf])
    logits = jnp.array([0.5, 0.0, 0.0])
    safe = metrics.pullback(lambda t: 2 * jnp.exp(jax.nn.log_softmax(t + mask) / 2))(logits).dense()
    p = np.append(np.exp([0.5, 0.0]) / np.exp([0.5, 0.0]).sum(), 0.0)
    assert error(safe, np.diag(p) - np.outer(p, p)) < 1e-14
    assert np.isnan(metrics.pullback(lambda t: 2 * jnp.sqrt(jax.nn.softmax(t + mask)))(logits).dense()).any()


def _mean_field(fields, couplings, rho, start, steps):
    """Natural-gradient descent of the exact KL of ±1 spins h to exp(½ sᵀJs + b·s)."""
    family = ng.families.bernoulli(len(fields), values=(-1, 1))
    log_p = lambda s: 0.5 * s @ couplings @ s + fields @ s
    kl = ng.inference.exact_kl(family.log_prob, log_p, family.support())
    tx = ng.natural_gradient(rho, family.fisher)

    def step(h, _):
        update, _ = tx.update(jax.grad(kl)(h), tx.init(h), h)
        return h + update, h + update

    return jax.lax.scan(step, jnp.asarray(start), None, length=steps)[1], kl


@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_spins_step_by_damped_mean_field_equations(rho, float64):
    """h⁺ = (1 − ρ)h + ρ(b + Jm), m = tanh h."""
    rng = np.random.default_rng(0)
    couplings, fields, start = rng.normal(size=(4, 4)), rng.normal(size=4), rng.normal(size=4)
    couplings = couplings + couplings.T - 2 * np.diag(np.diag(couplings))
    path, _ = _mean_field(jnp.asarray(fields), jnp.asarray(couplings), rho, start, 3)
    h = start
    for got in path:
        h = (1 - rho) * h + rho * (fields + couplings @ np.tanh(h))
        np.testing.assert_allclose(got, h, rtol=1e-10)


def test_two_spins_that_repel_oscillate_at_full_steps(float64):
    """J = −3: ρ = 1 ends at ±2.9847 in turn, ρ < ½ converges."""
    couplings, fields = jnp.array([[0.0, -3.0], [-3.0, 0.0]]), jnp.zeros(2)
    path, _ = _mean_field(fields, couplings, 1.0, [0.1, 0.1], 200)
    np.testing.assert_allclose(np.abs(path[-2:]), 2.9847, atol=1e-4)
    np.testing.assert_allclose(path[-1], -path[-2], atol=1e-6)
    path, _ = _mean_field(fields, couplings, 0.3, [0.1, 0.1], 200)
    np.testing.assert_allclose(path[-1], path[-2], atol=1e-10)


def test_the_ising_torus_reaches_its_best_mean_field(float64):
    """4×4, β = 0.2, field 0.1: best mean-field ELBO 11.43810411, by exact sums over 65,536 states."""
    place = np.arange(16).reshape(4, 4)
    couplings = np.zeros((16, 16))
    for axis in (0, 1):
        other = np.roll(place, -1, axis).ravel()
        couplings[place.ravel(), other] += 0.2
        couplings[other, place.ravel()] += 0.2
    path, kl = _mean_field(jnp.full(16, 0.1), jnp.asarray(couplings), 0.5, np.full(16, 0.1), 40)
    np.testing.assert_allclose(-kl(path[-1]), 11.43810411, atol=1e-8)


def test_a_full_pairwise_model_is_exact_in_one_step(float64):
    """q with every field and coupling holds the target: KL(q‖p) is 0 after one unit step in natural parameters."""
    spins = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=3)))
    statistics = jnp.concatenate([spins, spins[:, [0, 0, 1]] * spins[:, [1, 2, 2]]], axis=1)
    target = jnp.array([0.3, -0.2, 0.5, 0.4, -0.7, 0.2])
    log_z = lambda t: jax.nn.logsumexp(statistics @ t)
    log_q = lambda t, s: s @ t - log_z(t)
    kl = ng.inference.exact_kl(log_q, lambda s: log_q(target, s), statistics)
    start = jnp.array([0.1, 0.0, -0.3, 0.0, 0.2, 0.1])
    tx = ng.natural_gradient(1.0, metrics.fisher(log_q, statistics))
    step, _ = tx.update(jax.grad(kl)(start), tx.init(start), start)
    np.testing.assert_allclose(start + step, target, atol=1e-9)
    assert kl(start) > 0.1 and abs(kl(start + step)) < 1e-12


def test_the_steepest_unit_step(dtype):
    """G = diag(4, 1), g = (1, 1): dual norm 1.1180339887, and x* = −G⁻¹g/√(gᵀG⁻¹g) has length one."""
    op, g = operators.Diagonal(jnp.array([4.0, 1.0], dtype)), jnp.ones(2, dtype)
    np.testing.assert_allclose(ng.report(op, g).norm, 1.1180339887, rtol=4 * cases.eps(np.float32))
    tx = ng.natural_gradient(100.0, lambda params: op, max_kl=0.5)  # ½xᵀGx = ½
    step, _ = tx.update(g, tx.init(g), g)
    np.testing.assert_allclose(op.norm(step), 1, rtol=4 * cases.eps(dtype))
    np.testing.assert_allclose(step, np.array([-0.25, -1]) / 1.1180339887, rtol=1e-6)


def normal_natural(theta):
    variance = -0.5 / theta[1]
    return theta[0] * variance, variance


def kl_normal(m1, v1, m2, v2):
    return 0.5 * (v1 / v2 + (m1 - m2) ** 2 / v2 - 1 + jnp.log(v2 / v1))


def _log_partition(t):
    return -(t[0] ** 2) / (4 * t[1]) - 0.5 * jnp.log(-2 * t[1])


@pytest.mark.parametrize("rho", [1.0, 0.5, 0.1])
def test_reverse_kl_in_natural_parameters_contracts_exactly(rho, float64):
    """The error shrinks by (1 − ρ)^t; one unit step is exact. q: μ = −2, σ = .5, p: μ = 1, σ = 2."""
    target = jnp.array([0.25, -0.125])
    start = jnp.array([-8.0, -2.0])
    tx = ng.natural_gradient(rho, metrics.hessian(_log_partition))
    theta, state = start, tx.init(start)
    for t in range(1, 5):
        g = jax.grad(lambda t: kl_normal(*normal_natural(t), 1.0, 4.0))(theta)
        step, state = tx.update(g, state, theta)
        theta = theta + step
        np.testing.assert_allclose(theta, target + (1 - rho) ** t * (start - target), rtol=1e-10)
        if rho == 1.0:
            break


def test_forward_kl_in_mean_parameters_contracts_exactly(float64):
    """The same in mean parameters: the metric there is ∇² of the negative entropy."""
    entropy = lambda eta: -0.5 * jnp.log(eta[1] - eta[0] ** 2)
    target, eta = jnp.array([1.0, 5.0]), jnp.array([-2.0, 4.25])
    start = eta
    tx = ng.natural_gradient(0.25, metrics.hessian(entropy))
    for t in range(1, 4):
        g = jax.grad(lambda eta: kl_normal(1.0, 4.0, eta[0], eta[1] - eta[0] ** 2))(eta)
        step, _ = tx.update(g, tx.init(eta), eta)
        eta = eta + step
        np.testing.assert_allclose(eta, target + 0.75**t * (start - target), rtol=1e-10)


def test_coordinates_matter_at_finite_steps(float64):
    """In (μ, σ) one unit step gives (−1.8125, 0.734375)."""
    theta = jnp.array([-2.0, 0.5])
    log_prob = lambda t, x: -0.5 * ((x - t[0]) / t[1]) ** 2 - jnp.log(t[1]) - 0.5 * jnp.log(2 * jnp.pi)
    nodes = jnp.linspace(-9.0, 5.0, 281)
    tx = ng.natural_gradient(1.0, metrics.fisher(log_prob, nodes, weights=jnp.full(281, 0.05)))
    g = jax.grad(lambda t: kl_normal(t[0], t[1] ** 2, 1.0, 4.0))(theta)
    step, _ = tx.update(g, tx.init(theta), theta)
    np.testing.assert_allclose(theta + step, [-1.8125, 0.734375], rtol=1e-10)


@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_softmax_on_a_finite_set_is_a_geometric_mixture(rho, float64):
    """log q_t = (1 − ρ)^t log q_0 + (1 − (1 − ρ)^t) log p + const."""
    log_p = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    start = jnp.array([1.0, -1.0, 0.5, 0.0])
    log_q = lambda t, k: jax.nn.log_softmax(t)[k]
    kl = ng.inference.exact_kl(log_q, lambda k: log_p[k], jnp.arange(4))
    tx = ng.natural_gradient(rho, metrics.fisher(log_q, jnp.arange(4)), solver=solvers.eigh())
    theta = start
    for t in range(1, 4):
        step, _ = tx.update(jax.grad(kl)(theta), tx.init(theta), theta)
        theta = theta + step
        left = (1 - rho) ** t
        expected = jax.nn.log_softmax(left * start + (1 - left) * log_p)
        np.testing.assert_allclose(jax.nn.log_softmax(theta), expected, atol=1e-11)


def test_kl_is_half_the_length_to_second_order_and_a_sixth_of_the_third(float64):
    """In natural parameters KL(q_θ‖q_θ+δ) − ½δᵀFδ = A‴[δ³]/6, and a third in the other order."""
    theta, d = jnp.array([0.3, -0.4, 0.9]), jnp.array([1.0, -0.5, 0.25])
    log_q = jax.nn.log_softmax
    kl = lambda a, b: jnp.sum(jnp.exp(log_q(a)) * (log_q(a) - log_q(b)))
    fisher = metrics.fisher(lambda t, k: log_q(t)[k], jnp.arange(3))(theta)
    third = jax.jvp(lambda t: d @ jax.hessian(jax.nn.logsumexp)(t) @ d, (theta,), (d,))[1]
    h = 1e-3
    half = 0.5 * h**2 * float(fisher.norm(d)) ** 2
    for got, share in ((kl(theta, theta + h * d), 1 / 6), (kl(theta + h * d, theta), 1 / 3)):
        np.testing.assert_allclose((float(got) - half) / h**3, share * third, rtol=5e-3)


# Quantum states.


def _state_vector(angles):
    """Three qubits: RX and RY on each, CZ between neighbours, RZ; by numpy matrices."""
    x, y, z = np.array([[0, 1], [1, 0]]), np.array([[0, -1j], [1j, 0]]), np.diag([1.0, -1.0])

    def rotation(angle, axis, qubit):
        gate = np.cos(angle / 2) * np.eye(2) - 1j * np.sin(angle / 2) * axis
        out = np.eye(1)
        for q in range(3):
            out = np.kron(out, gate if q == qubit else np.eye(2))
        return out

    bits = np.array(list(itertools.product([0, 1], repeat=3)))
    entangle = np.diag((-1.0) ** (bits[:, 0] * bits[:, 1] + bits[:, 1] * bits[:, 2]))
    gates = [
        *(("r", i, axis, q) for i, (axis, q) in enumerate(itertools.product((x, y), range(3)))),
        ("e",),
        *(("r", 6 + q, y, q) for q in range(3)),
        *(("r", 9 + q, z, q) for q in range(3)),
    ]

    def run(derivative=None):
        psi = np.zeros(8, complex)
        psi[0] = 1
        for gate in gates:
            psi = entangle @ psi if gate[0] == "e" else rotation(angles[gate[1]], gate[2], gate[3]) @ psi
            if gate[0] == "r" and gate[1] == derivative:
                psi = -0.5j * rotation(np.pi, gate[2], gate[3]) * 1j @ psi  # RX(π) = −i X
        return psi

    return run, bits


def _jax_state(angles):
    """The same circuit on a (2, 2, 2) array, by another route: contractions of one axis."""
    psi = jnp.zeros((2, 2, 2), complex).at[0, 0, 0].set(1)
    paulis = [jnp.array([[0, 1], [1, 0]]), jnp.array([[0, -1j], [1j, 0]]), jnp.diag(jnp.array([1.0, -1.0]))]

    def rotate(psi, angle, axis, qubit):
        gate = jnp.cos(angle / 2) * jnp.eye(2) - 1j * jnp.sin(angle / 2) * paulis[axis]
        return jnp.moveaxis(jnp.tensordot(gate, psi, axes=(1, qubit)), 0, qubit)

    for i in range(6):
        psi = rotate(psi, angles[i], i // 3, i % 3)
    psi = psi.at[1, 1, :].multiply(-1).at[:, 1, 1].multiply(-1)
    for i in range(6, 12):
        psi = rotate(psi, angles[i], 1 if i < 9 else 2, i % 3)
    return psi.reshape(8)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_quantum_tensor_of_a_circuit(seed, float64):
    """Re[⟨∂ψ|∂ψ⟩ − ⟨∂ψ|ψ⟩⟨ψ|∂ψ⟩] from derivatives of the state vector, gate by gate."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, 12)
    run, _ = _state_vector(angles)
    psi, tangents = run(), np.stack([run(i) for i in range(12)], axis=1)
    expected = np.real(tangents.conj().T @ tangents - np.outer(tangents.conj().T @ psi, psi.conj() @ tangents))
    np.testing.assert_allclose(_jax_state(jnp.asarray(angles)), psi, atol=1e-12)
    metric = metrics.quantum_geometric(lambda t, k: jnp.log(_jax_state(t)[k]))
    op = metric(jnp.asarray(angles), samples=jnp.arange(8), weights=jnp.abs(psi) ** 2)
    assert error(op.dense(), expected) < 1e-10


def test_one_qubit(float64):
    """RY(b)RX(a)|0⟩ has tensor diag(1/4, cos²(a)/4)."""

    def log_psi(t, k):
        up, down = jnp.cos(t[0] / 2), -1j * jnp.sin(t[0] / 2)
        c, s = jnp.cos(t[1] / 2), jnp.sin(t[1] / 2)
        return jnp.log(jnp.stack([c * up - s * down, s * up + c * down]))[k]

    t = jnp.array([0.7, 1.1])
    weights = jnp.abs(jnp.exp(jax.vmap(lambda k: log_psi(t, k))(jnp.arange(2)))) ** 2
    got = metrics.quantum_geometric(log_psi)(t, samples=jnp.arange(2), weights=weights).dense()
    assert error(got, np.diag([0.25, np.cos(0.7) ** 2 / 4])) < 1e-12


def test_the_tensor_of_root_p_is_a_quarter_of_the_fisher_information(float64):
    log_prob, params, support, expected, _ = cases.fisher_case("product, two leaves", np.float64)
    weights = jnp.exp(jax.vmap(lambda x: log_prob(params, x))(support))
    got = metrics.quantum_geometric(lambda t, x: log_prob(t, x) / 2)(params, samples=support, weights=weights)
    assert error(got.dense(), expected / 4) < 1e-12


def _log_psi(p, x):
    return jnp.sum(jnp.log(jnp.cosh(p["w"] @ x + p["b"])))


def _complex_params(dtype):
    rng = np.random.default_rng(3)
    kind = np.complex64 if dtype == np.float32 else np.complex128
    z = lambda *shape: jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), kind)
    return {"w": z(2, 3), "b": z(2)}, jnp.asarray(rng.choice([-1.0, 1.0], size=(30, 3)), dtype)


def test_complex_parameters_are_two_real_ones_each(dtype):
    """Against the metric of a model that is written in real parameters, and the Hermitian form of a holomorphic one."""
    params, xs = _complex_params(dtype)
    mixed = lambda p, x: _log_psi(p, x) + jnp.real(p["b"][0]) * jnp.imag(p["w"][0, 0]) * x[0]  # not holomorphic
    real = lambda p, x: mixed(jax.tree.map(lambda a, b: a + 1j * b, p["re"], p["im"]), x)
    split = {"re": jax.tree.map(jnp.real, params), "im": jax.tree.map(jnp.imag, params)}
    v = jax.tree.map(lambda x: jnp.cos(x), params)

    @jax.jit
    def products(params, split, v, xs):
        op, whole = (metrics.quantum_geometric(f)(p, samples=xs) for f, p in ((mixed, params), (real, split)))
        halves = whole.mv({"re": jax.tree.map(jnp.real, v), "im": jax.tree.map(jnp.imag, v)})
        joined = jax.tree.map(lambda a, b: a + 1j * b, halves["re"], halves["im"])
        forms = {}, {"holomorphic": True}, {"holomorphic": True, "matrix_free": True}
        alike = [metrics.quantum_geometric(_log_psi, **form)(params, samples=xs).mv(v) for form in forms]
        return op.mv(v), joined, op.norm(v), op.inner(v, v), alike

    product, joined, norm, inner, (as_real, hermitian, free) = products(params, split, v, xs)
    parts = lambda tree: [(np.real(x), np.imag(x)) for x in jax.tree.leaves(tree)]
    assert error(parts(product), parts(joined)) < 100 * cases.eps(dtype)
    np.testing.assert_allclose(norm**2, inner, rtol=100 * cases.eps(dtype))
    assert error(parts(hermitian), parts(as_real)) < 100 * cases.eps(dtype)
    assert error(parts(free), parts(as_real)) < 100 * cases.eps(dtype)


@pytest.mark.parametrize("damping", [0.1, ng.damping.absolute(0.1), ng.damping.metric(0.1, metrics.scales(2.0))])
@pytest.mark.parametrize("solver", [None, solvers.eigh(), solvers.cholesky(), solvers.cg(1e-13, max_steps=400)])
def test_every_solver_solves_for_complex_parameters(solver, damping, float64):
    params, xs = _complex_params(float64)
    metric = metrics.quantum_geometric(_log_psi)
    g = jax.tree.map(jnp.sin, params)
    tx = ng.scale_by_metric(metric, solver=solver, damping=damping)
    step, state = jax.jit(tx.update)(g, tx.init(params), params, samples=xs)
    op = metric(params, samples=xs)
    flat_parts = lambda tree: np.concatenate(
        [np.concatenate([np.real(x).ravel(), np.imag(x).ravel()]) for x in jax.tree.leaves(tree)]
    )
    matrix = np.asarray(op.parts.dense())
    added = {float: np.diag(np.diag(matrix)) * 0.1}.get(type(damping))
    if added is None:
        added = np.eye(len(matrix)) * (0.1 if damping == ng.damping.absolute(0.1) else 0.1 / 4)
    expected = np.linalg.solve(matrix + added, flat_parts(g))
    assert error(flat_parts(step), expected) < 1e-9 and bool(state.converged)
    with pytest.raises(TypeError, match="no complex matrix"):
        op.dense()
    only_b = op.restrict({"w": False, "b": True})
    block = only_b.mv({"w": optax.MaskedNode(), "b": g["b"]})["b"]
    np.testing.assert_allclose(block, op.mv({"w": 0 * g["w"], "b": g["b"]})["b"], rtol=1e-12)


# Transport.

QUANTILES = {
    "normal": (lambda t, u: t[0] + t[1] * jax.scipy.special.ndtri(u), np.array([0.5, 2.0]), np.eye(2)),
    "exponential scale": (lambda t, u: -t[0] * jnp.log1p(-u), np.array([2.0]), np.array([[2.0]])),
    "uniform": (
        lambda t, u: t[0] + (t[1] - t[0]) * u, np.array([0.5, 2.0]), np.array([[1 / 3, 1 / 6], [1 / 6, 1 / 3]])
    ),
    "logistic": (
        lambda t, u: t[0] + t[1] * (jnp.log(u) - jnp.log1p(-u)), np.array([0.5, 2.0]), np.diag([1, np.pi**2 / 3])
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_nodes", [32, 64])
@pytest.mark.parametrize("name", QUANTILES)
def test_the_metric_of_quantiles(name, num_nodes, dtype):
    quantile, params, expected = QUANTILES[name]
    got = metrics.wasserstein_1d(quantile, num_nodes=num_nodes)(jnp.asarray(params, dtype)).dense()
    # In float32 nothing is known of the tail beyond 1 − eps: for the exponential eps·log²(eps) = 3e-5.
    assert error(got, expected) < (2e-12 if dtype == np.float64 else 5e-5)


def test_the_derivative_of_the_wasserstein_metric_by_a_distribution_function(float64):
    """d/dt of ∫ (∂Q)² for Q = t²·z: G = (2t)², its derivative 8t; the inverted quantile moves with t."""
    cdf = lambda t, x: jax.scipy.stats.norm.cdf(x / t**2)
    got = jax.grad(lambda t: metrics.wasserstein_1d(cdf=cdf, bracket=(-99.0, 99.0))(t).dense()[0, 0])(1.5)
    np.testing.assert_allclose(got, 12.0, rtol=1e-9)


# Learning, policies, evolution.


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("c", [1.0, 2.0])
def test_online_learning_reaches_cramer_rao(c, seed, float64):
    """θ_{t+1} = θ_t + (c/t)F⁻¹s(x_t): n·Var → c²/(2c − 1)·F⁻¹; 3000 runs of 200 steps, F⁻¹ = 4."""
    log_prob = lambda t, x: -0.5 * (x - t) ** 2 / 4 - 0.5 * jnp.log(8 * jnp.pi)
    nodes = jnp.linspace(-40.0, 40.0, 161)
    metric = metrics.fisher(log_prob, nodes, weights=jnp.full(161, 0.5))
    tx = ng.natural_gradient(lambda count: c / (count + 1.0), metric)

    def run(key):
        def step(carry, x):
            theta, state = carry
            update, state = tx.update(-jax.grad(log_prob)(theta, x), state, theta)
            return (theta + update, state), None

        xs = 2 * jax.random.normal(key, (200,))
        start = jnp.zeros(())
        return jax.lax.scan(step, (start, tx.init(start)), xs)[0][0]

    ends = jax.vmap(run)(jax.random.split(jax.random.key(seed), 3000))
    got, expected = 200 * np.var(ends), 4 * c**2 / (2 * c - 1)
    assert abs(got / expected - 1) < 5 * np.sqrt(2 / 3000) + 1 / 200


def test_a_bandit_and_the_step_of_trpo(float64):
    """F⁺∇ = r − mean(r); with max_kl the step's ½sᵀFs is the bound."""
    reward, logits = jnp.array([1.0, 3.0, -2.0, 0.5]), jnp.array([0.2, -0.5, 1.0, 0.0])
    log_prob = lambda t, k: jax.nn.log_softmax(t)[k]
    metric = metrics.fisher(log_prob, jnp.arange(4))
    gradient = jax.grad(lambda t: jax.nn.softmax(t) @ reward)(logits)
    tx = ng.scale_by_metric(metric, solver=solvers.eigh(), damping=ng.damping.absolute(0.0))
    step, _ = tx.update(gradient, tx.init(logits), logits)
    np.testing.assert_allclose(step, reward - reward.mean(), atol=1e-12)
    bounded = ng.natural_gradient(1.0, metric, solver=solvers.eigh(), max_kl=0.01)
    step, _ = bounded.update(-gradient, bounded.init(logits), logits)
    fisher = metric(logits)
    np.testing.assert_allclose(0.5 * fisher.norm(step) ** 2, 0.01, rtol=1e-12)
    direction = solvers.solve(fisher, gradient, solver=solvers.eigh()).value
    np.testing.assert_allclose(step, jnp.sqrt(0.02 / (gradient @ direction)) * direction, rtol=1e-9)


def test_a_search_distribution_on_a_quadratic(float64):
    """N(μ, Σ) on f = zᵀHz/2 + b·z: the natural gradient is (Σ(Hμ + b), ΣHΣ)."""
    rng = np.random.default_rng(0)
    h, b = rng.normal(size=(3, 3)), rng.normal(size=3)
    h, mean, lower = h + h.T, rng.normal(size=3), np.tril(rng.normal(size=(3, 3))) + 2 * np.eye(3)
    family = ng.families.gaussian_full_rank(3)
    params = family.init(loc=mean, scale=lower)
    expected_f = lambda p: 0.5 * jnp.trace(h @ p.scale_tril @ p.scale_tril.T) + 0.5 * p.loc @ h @ p.loc + b @ p.loc
    step = solvers.solve(family.fisher(params), jax.grad(expected_f)(params)).value
    sigma = lower @ lower.T
    change = step.scale_tril @ lower.T + lower @ step.scale_tril.T
    assert error(step.loc, sigma @ (h @ mean + b)) < 1e-12 and error(change, sigma @ h @ sigma) < 1e-12


def test_a_perceptron_with_gaussian_inputs(float64):
    """y = erf(w·x/√2) + noise of σ: G = 2/(πσ²√(1 + 2w²))·(I − 2wwᵀ/(1 + 2w²)), by quadrature over x."""
    w, sigma = jnp.array([0.3, -0.5]), 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    points = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    measure = np.outer(weights, weights).ravel() / (2 * np.pi)
    metric = metrics.energy(lambda w, x: jax.scipy.special.erf(x @ w / jnp.sqrt(2.0)), 1 / sigma**2)
    got = metric(w, points=jnp.asarray(points), quadrature=jnp.asarray(measure))
    square = float(w @ w)
    factor = 2 / (np.pi * sigma**2 * np.sqrt(1 + 2 * square))
    assert error(got.dense(), factor * (np.eye(2) - 2 * np.outer(w, w) / (1 + 2 * square))) < 1e-10
    inverse = np.eye(2) / factor + 2 * np.outer(w, w) / factor
    assert error(solvers.solve(got, jnp.array([1.0, 2.0])).value, inverse @ np.array([1.0, 2.0])) < 1e-9


@pytest.mark.parametrize("condition", [2.0, 2000.0])
def test_independent_components_do_not_see_the_mixing(condition, float64):
    """The trajectory of WM is that of M = 1, for the gradient of the maximum-likelihood objective of ICA."""
    sources = jnp.asarray(np.random.default_rng(0).laplace(size=(400, 3)))
    u, v = (np.linalg.qr(np.random.default_rng(i).normal(size=(3, 3)))[0] for i in (1, 2))
    mixing = jnp.asarray(u @ np.diag(np.geomspace(1, 1 / condition, 3)) @ v)
    tx = ng.natural_gradient(0.2, metrics.relative)

    def run(w, data):
        def loss(w):
            return jnp.mean(jnp.sum(jnp.log(jnp.cosh(data @ w.T)), axis=1)) - jnp.linalg.slogdet(w)[1]

        def step(carry, _):
            w, state = carry
            update, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + update, state), w + update

        return jax.lax.scan(step, ((w), tx.init(w)), None, length=30)[1]

    start = jnp.eye(3) + 0.3
    plain = run(start, sources)
    mixed = run(start @ jnp.linalg.inv(mixing), sources @ mixing.T)
    assert error(mixed @ mixing, plain) < 1e-12 * condition
    assert error(plain[-1], plain[0]) > 0.1


# Invariance of the quasi-diagonal.


def _two_layers(p, x):
    return jnp.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].T + p["b2"]


def test_a_quasi_diagonal_does_not_see_affine_maps_of_activities(float64):
    """x → Ax + c with diagonal A moves w1 and b1; the steps agree to rounding, those of a diagonal do not."""
    rng = np.random.default_rng(0)
    z = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"w1": z(4, 3), "b1": z(4), "w2": z(2, 4), "b2": z(2)}
    xs, ys = z(20, 3), z(20, 2)
    scale, shift = jnp.array([3.0, 0.1, 1.0]), jnp.array([5.0, -2.0, 0.5])
    moved = params | {"w1": params["w1"] / scale, "b1": params["b1"] - (params["w1"] / scale) @ shift}
    residual = metrics.least_squares(lambda p, batch: _two_layers(p, batch[0]) - batch[1])
    quasi = metrics.quasi_diagonal(residual, lambda p: [(p["w1"].T, p["b1"]), (p["w2"].T, p["b2"])])
    plain = lambda params, *, batch: operators.Diagonal(residual(params, batch=batch).diagonal())
    gaps = []
    for metric in (quasi, plain):
        outputs = []
        for p, inputs in ((params, xs), (moved, xs * scale + shift)):
            tx = ng.natural_gradient(0.1, metric)
            g = jax.grad(lambda p: 0.5 * jnp.sum((_two_layers(p, inputs) - ys) ** 2))(p)  # noqa: B023
            step, _ = tx.update(g, tx.init(p), p, batch=(inputs, ys))
            outputs.append(_two_layers(optax.apply_updates(p, step), inputs) - _two_layers(p, inputs))
        gaps.append(error(outputs[1], outputs[0]))
    assert gaps[0] < 1e-10 and gaps[1] > 1e-2


@pytest.mark.parametrize("offset", [0.0, 300.0, 3000.0])
def test_a_quasi_diagonal_keeps_the_spread_of_inputs_far_from_zero(offset):
    """float32: F_ii − c F_0i would lose it; and many weights do not make it less."""
    x = np.random.default_rng(0).normal(size=(50, 300))
    metric = metrics.quasi_diagonal(
        metrics.least_squares(lambda p, x: x @ p["w"] + p["b"]), lambda p: [(p["w"], p["b"])]
    )
    params = {"w": jnp.zeros(300), "b": jnp.zeros(())}
    step = metric(params, batch=jnp.asarray(x + offset, jnp.float32)).solve({"w": jnp.ones(300), "b": jnp.zeros(())})
    shifted = np.asarray(x + offset, np.float32).astype(float)
    expected = 1 / np.sum((shifted - shifted.mean(0)) ** 2, axis=0)
    assert error(step["w"], expected) < 1e-3
    constant = metric({"w": jnp.zeros(1), "b": jnp.zeros(())}, batch=jnp.full((7, 1), 3.3))
    assert float(constant.solve({"w": jnp.ones(1), "b": jnp.zeros(())})["w"][0]) == 0.0


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e15])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_quasi_diagonal_of_rows_of_any_size(chunk_size, size):
    """float32: rows of 1e-25 have no squares. The step of c·g on rows of √c is the same."""
    if chunk_size is not None and size == 1e-25:
        size = 1e-15  # a matrix holds squares
    metric = metrics.quasi_diagonal(
        metrics.least_squares(lambda p, x: size * (x @ p["w"] + p["b"]), chunk_size=chunk_size),
        lambda p: [(p["w"], p["b"])],
    )
    op = metric({"w": jnp.zeros(2), "b": jnp.zeros(())}, batch=jnp.asarray(X, jnp.float32))
    step = op.solve({"w": size * jnp.ones(2), "b": jnp.asarray(size)})
    matrix = np.concatenate([np.ones((7, 1)), X], axis=1)
    matrix = matrix.T @ matrix
    matrix[1, 2] = matrix[2, 1] = matrix[0, 1] * matrix[0, 2] / matrix[0, 0]
    assert error(np.array(flat(step)) * size, np.linalg.solve(matrix, np.ones(3))) < 1e-4


# Reports.


def test_a_report_names_what_cannot_be_learned(float64):
    """A duplicated parameter, an unused one, and the shift of a softmax, in units that differ by 1e4."""

    def log_prob(p, k):
        return jax.nn.log_softmax(1e4 * p["logits"] + jnp.array([1.0, 0.0, 0.0]) * (p["a"] + 2 * p["b"]))[k]

    params = {"a": jnp.array(0.1), "b": jnp.array(0.2), "logits": jnp.array([1e-4, 0.0, 2e-4]), "unused": jnp.ones(2)}
    op = metrics.fisher(log_prob, jnp.arange(3))(params)
    reward = jnp.array([1.0, 3.0, -2.0])
    q = jnp.exp(jax.vmap(lambda k: log_prob(params, k))(jnp.arange(3)))
    g = jax.grad(lambda p: jnp.exp(jax.vmap(lambda k: log_prob(p, k))(jnp.arange(3))) @ reward)(params)
    variance = float(q @ reward**2 - (q @ reward) ** 2)
    report = ng.report(op, g, variance=variance)
    assert report.rank == 2 and report.size == 7 and report.dead == ["['unused'][0]", "['unused'][1]"]
    assert len(report.null_directions) == 3
    matrix = np.asarray(op.dense())
    names = operators.reports.paths(op.space)
    for direction in report.null_directions:
        v = np.array([direction.get(name, 0.0) for name in names])
        assert v @ matrix @ v < 1e-12 * (v * np.diag(matrix)) @ v
    assert report.outside < 1e-7
    np.testing.assert_allclose(report.explained, 1.0, rtol=1e-9)  # every function of three outcomes is a score
    assert "without curvature: ['unused'][0], ['unused'][1]" in str(report)
    off = jax.tree.map(jnp.ones_like, g)
    assert ng.report(op, off).outside == 1.0
    assert 0.1 < ng.report(op, off | {"unused": jnp.zeros(2)}).outside < 1.0


def test_a_report_of_a_hermitian_operator_and_of_real_parts(float64):
    """I − vvᴴ with v = (1, i)/√2, and parts that a gradient reaches to a half."""
    v = np.array([1, 1j]) / np.sqrt(2)
    direction = ng.report(operators.Dense(jnp.eye(2) - jnp.outer(v, v.conj()))).null_directions[0]
    got = np.array([direction["[0]"], direction["[1]"]])
    assert abs(np.vdot(got, v)) == pytest.approx(np.linalg.norm(got))
    z = jnp.array([1.0 + 1.0j])
    parts = operators.RealParts(operators.Gram((jnp.array([[2.0]]), jnp.array([[2.0]]))), operators.Space.of(z))
    report = ng.report(parts, jnp.array([1.0 + 0.0j]))
    assert report.rank == 1 and report.outside == pytest.approx(np.sqrt(0.5)) and parts.trace() == 8.0
    assert parts.max_rank() == 1
    condition = ng.report(operators.Dense(jnp.diag(jnp.array([1.0, 1e6]))))
    assert condition.condition == pytest.approx(1) and condition.raw_condition == pytest.approx(1e6)


def test_sums_and_multiples_of_a_real_metric_of_complex_parameters(float64):
    params, xs = _complex_params(float64)
    op = metrics.quantum_geometric(_log_psi)(params, samples=xs)
    damped = operators.add(
        operators.scale(2.0, op), operators.Diagonal(jax.tree.map(lambda x: 0.5 * jnp.abs(x) ** 0, params))
    )
    g = jax.tree.map(jnp.sin, params)
    solution = solvers.solve(damped, g)
    back = jax.tree.map(lambda a, b: 2 * a + 0.5 * b, op.mv(solution.value), solution.value)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(g), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    both = operators.add(op, op)
    np.testing.assert_allclose(both.norm(g) ** 2, 2 * op.norm(g) ** 2, rtol=1e-12)


def test_the_natural_gradient_is_a_regression_on_the_scores(float64):
    """gᵀF⁻¹g ≤ Var f, and the ratio is the R² of the regression."""
    spins = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=3)))
    log_q = lambda h, s: jnp.sum(jax.nn.log_sigmoid(2 * s * h))
    h = jnp.array([0.3, -0.2, 0.5])
    f = jnp.asarray(np.random.default_rng(0).normal(size=8))
    q = jnp.exp(jax.vmap(lambda s: log_q(h, s))(spins))
    scores = jax.vmap(lambda s: jax.grad(log_q)(h, s))(spins)
    g = scores.T @ (q * f)
    variance = q @ f**2 - (q @ f) ** 2
    fit = np.linalg.lstsq(np.sqrt(q)[:, None] * scores, np.sqrt(q) * (f - q @ f))[0]
    report = ng.report(metrics.fisher(log_q, spins)(h), g, variance=variance)
    np.testing.assert_allclose(report.explained, q @ (scores @ fit) ** 2 / variance, rtol=1e-10)
    assert report.explained < 1


# Mistakes.

ONE = np.ones(3, np.float32)
HALF_NAN = np.array([1.0, np.nan], np.float32)
SCALAR_LOG = lambda p, x: -jnp.sum((x - p) ** 2)
LINEAR = lambda p, batch: batch[0] @ p
PAIR = (np.ones((4, 3), np.float32), np.ones(4, np.float32))
MISTAKES = {
    "support with NaN": (lambda: metrics.fisher(SCALAR_LOG, HALF_NAN), ValueError, "support.*NaN"),
    "weights too few": (
        lambda: metrics.fisher(SCALAR_LOG, ONE, weights=np.ones(2)), ValueError, r"weights.*\(3,\).*\(2,\)"
    ),
    "negative weights": (lambda: metrics.fisher(SCALAR_LOG, ONE, weights=-ONE), ValueError, "weights.*≥ 0.*-1"),
    "empty batch": (
        lambda: metrics.empirical_fisher(SCALAR_LOG)(ONE, batch=np.ones((0, 3))), ValueError, "batch.*n ≥ 1"
    ),
    "batches of two lengths": (
        lambda: metrics.gauss_newton(LINEAR, losses.squares())(ONE, batch=(PAIR[0], np.ones(3))), ValueError, "batch"
    ),
    "no draws": (lambda: metrics.monte_carlo_fisher(SCALAR_LOG, lambda p, k: p, 0), ValueError, "num_samples.*0"),
    "one centred draw": (
        lambda: metrics.monte_carlo_fisher(SCALAR_LOG, lambda p, k: p, 1, centred=True), ValueError, "num_samples.*≥ 2"
    ),
    "complex parameters": (
        lambda: metrics.gauss_newton(LINEAR, losses.squares())(ONE + 0j, batch=PAIR), TypeError, "params.*complex"
    ),
    "complex outputs": (
        lambda: metrics.pullback(lambda p: p + 0j)(ONE), TypeError, "f: expected real.*complex64.*as two"
    ),
    "integer parameters": (
        lambda: metrics.least_squares(LINEAR)(np.arange(3), batch=PAIR), TypeError, "params.*int"
    ),
    "a summed model": (
        lambda: metrics.gauss_newton(lambda p, batch: jnp.sum(batch[0] @ p), losses.squares())(ONE, batch=PAIR),
        ValueError, "model: expected one output for each example.*Do not sum",
    ),
    "a loss that is not called": (
        lambda: metrics.gauss_newton(LINEAR, losses.squares), TypeError, r"call it, losses.squares\(\)"
    ),
    "a model that is no function": (
        lambda: metrics.gauss_newton("mlp", losses.squares()), TypeError, "model: expected a function.*str"
    ),
    "a batch without targets": (
        lambda: metrics.gauss_newton(lambda p, b: b @ p, losses.squares())(ONE, batch=np.ones((3, 3), np.float32)),
        TypeError, "targets: expected a batch .x, y.",
    ),
    "data that are not keyword-only": (
        lambda: metrics.pullback(lambda params, batch: batch @ params), TypeError, r"batch: expected data.*\*, batch"
    ),
    "a vector loss": (
        lambda: metrics.gauss_newton(LINEAR, lambda z, batch: z)(ONE, batch=PAIR), ValueError, "loss.*real scalar"
    ),
    "a loss that is not convex": (
        lambda: metrics.gauss_newton(LINEAR, lambda z, batch: -jnp.sum(z**2))(ONE, batch=PAIR),
        ValueError, "convex function",
    ),
    "a saddle": (
        lambda: metrics.gauss_newton(
            lambda p, batch: jnp.stack([batch[0] @ p, batch[0] @ p], 1), lambda z, batch: jnp.sum(z[:, 0] * z[:, 1])
        )(ONE, batch=PAIR), ValueError, "convex",
    ),
    "a loss that couples examples": (
        lambda: metrics.gauss_newton(LINEAR, lambda z, batch: jnp.sum(z) ** 2)(ONE, batch=PAIR),
        ValueError, "couples the examples.*matrix_free",
    ),
    "no residuals": (lambda: metrics.least_squares([]), ValueError, "residuals"),
    "residuals that are no function": (lambda: metrics.least_squares([1.0]), ValueError, "residuals.*1.0"),
    "too few batches": (
        lambda: metrics.least_squares([LINEAR, LINEAR])(ONE, batch=[PAIR]), ValueError, "batch: expected one for each"
    ),
    "negative weight of a term": (
        lambda: metrics.least_squares(LINEAR, -1.0)(ONE, batch=PAIR), ValueError, "weights.*≥ 0"
    ),
    "value without a residual": (
        lambda: metrics.value_and_grad(operators.Gram(np.ones((2, 2)))), TypeError, "residual.*least_squares"
    ),
    "an inner matrix of another size": (
        lambda: metrics.pullback(lambda p: p, np.eye(2))(ONE), ValueError, r"inner.*\(3, 3\).*\(2, 2\)"
    ),
    "an inner matrix that is not positive": (
        lambda: metrics.pullback(lambda p: p, -np.eye(3, dtype=np.float32))(ONE), ValueError, "inner.*semi-definite"
    ),
    "an inner operator of another structure": (
        lambda: metrics.pullback(lambda p: {"a": p}, operators.Diagonal({"b": ONE}))(ONE), ValueError, "inner"
    ),
    "holomorphic in real parameters": (
        lambda: metrics.quantum_geometric(lambda p, x: jnp.sum(p * x), holomorphic=True)(ONE, samples=np.ones((2, 3))),
        TypeError, "holomorphic.*complex parameters",
    ),
    "a wave function with two values": (
        lambda: metrics.quantum_geometric(lambda p, x: p * x)(ONE, samples=np.ones((2, 3), np.float32)),
        ValueError, r"log_psi.*scalar.*\(3,\)",
    ),
    "chunks of centred products": (
        lambda: metrics.quantum_geometric(lambda p, x: jnp.sum(p * x), matrix_free=True, chunk_size=2)(
            ONE, samples=np.ones((2, 3), np.float32)
        ), ValueError, "chunk_size.*all samples",
    ),
    "quantile and cdf": (
        lambda: metrics.wasserstein_1d(lambda p, u: u, cdf=lambda p, x: x), TypeError, "exactly one"
    ),
    "cdf without a bracket": (lambda: metrics.wasserstein_1d(cdf=lambda p, x: x), TypeError, "bracket=.low, high."),
    "a bracket beside the distribution": (
        lambda: metrics.wasserstein_1d(cdf=lambda p, x: jax.nn.sigmoid(x - p), bracket=(0.0, 1.0))(np.float32(0.0)),
        ValueError, "bracket: expected low < high",
    ),
    "few nodes": (lambda: metrics.wasserstein_1d(lambda p, u: u, num_nodes=2), ValueError, "num_nodes.*8.*2"),
    "no order of derivative": (lambda: metrics.sobolev(lambda p, x: p * x, (0.0, 0.0)), ValueError, "weights"),
    "negative energy": (lambda: metrics.energy(lambda p, x: p * x, -1.0), ValueError, "weights.*≥ 0"),
    "quadrature too short": (
        lambda: metrics.energy(lambda p, x: p * x)(np.float32(1.0), points=ONE, quadrature=ONE[:2]),
        ValueError, r"quadrature.*\(3,\).*\(2,\)",
    ),
    "a vector potential": (lambda: metrics.hessian(lambda p: p)(ONE), ValueError, "potential.*real scalar"),
    "relative of a vector": (lambda: metrics.relative(ONE), ValueError, r"params.*square matrix.*\(3,\)"),
    "weights that do not end in their bias": (
        lambda: metrics.quasi_diagonal(
            metrics.least_squares(lambda p, x: x @ p["w"].T + p["b"]), lambda p: [(p["w"], p["b"])]
        )({"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}, batch=np.ones((4, 3), np.float32)),
        ValueError, r"biases.*\(2, 3\).*Transpose",
    ),
    "a quasi-diagonal of products": (
        lambda: metrics.quasi_diagonal(metrics.least_squares(lambda p, x: x * p, matrix_free=True), lambda p: [])(
            np.float32(1.0), batch=ONE
        ), TypeError, "rows or a matrix.*matrix_free",
    ),
    "a positive parameter that is not": (
        lambda: metrics.scales(1.0, positive=True)(np.array([1.0, -2.0])), ValueError, "positive.*-2"
    ),
    "a report of too much": (
        lambda: ng.report(operators.Diagonal(np.ones(5000, np.float32))), ValueError, "at most 4096.*5000"
    ),
    "a report of NaN": (
        lambda: ng.report(operators.Dense(np.full((2, 2), np.nan, np.float32))), ValueError, "finite entries"
    ),
    "a report of another gradient": (
        lambda: ng.report(operators.Diagonal(ONE), {"a": ONE}), ValueError, "gradient"
    ),
}  # fmt: skip


test_mistakes_are_named = cases.named_mistakes(MISTAKES)


@pytest.mark.parametrize(
    "loss", [lambda z, batch: -jnp.sum(z**2), lambda z, batch: jnp.sum(z) ** 2], ids=["concave", "coupled"]
)
def test_a_bad_loss_is_nan_where_it_cannot_be_read(loss):
    metric = metrics.gauss_newton(LINEAR, loss)
    assert np.isnan(jax.jit(lambda p: metric(p, batch=PAIR).dense())(jnp.ones(3))).any()
    coupled = metrics.gauss_newton(LINEAR, lambda z, batch: jnp.sum(z) ** 2, matrix_free=True)
    x = PAIR[0].sum(0)
    assert error(coupled(jnp.ones(3), batch=PAIR).dense(), 2 * np.outer(x, x)) < 1e-6
