"""Value, gradient and metric from one pass, against `jax.grad` of exact sums."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import error, flat
from transform_cases import METRIC, data, loss

import natgrad_jax as ng
from natgrad_jax import metrics

_rng = np.random.default_rng(5)
HAMILTONIAN = _rng.normal(size=(8, 8)) + 1j * _rng.normal(size=(8, 8))
HAMILTONIAN = HAMILTONIAN + HAMILTONIAN.conj().T
SPINS = np.array([[1 - 2 * (k >> i & 1) for i in range(3)] for k in range(8)], float)
WEIGHTS = _rng.normal(size=(2, 3)) * 0.3


def test_least_squares_in_one_pass(dtype):
    params, batch = data(dtype)
    value, gradient, op = jax.jit(metrics.one_pass(METRIC))(params, batch=batch)
    expected, g = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-5)
    assert error(gradient, flat(g)) < 2e-5 and error(op.dense(), METRIC(params, batch=batch).dense()) < 1e-6


def test_the_score_function_over_the_whole_support_is_the_gradient(dtype):
    """And G⁻¹∇L is the regression of f on the scores, found from e: no second pass."""
    logits, f = jnp.asarray([0.3, -0.2, 0.9], dtype), jnp.asarray([1.0, 5.0, -2.0], dtype)
    exact = lambda t: jax.nn.softmax(t) @ f
    objective = metrics.score_function(cases._categorical)
    value, gradient, op = objective(logits, jnp.arange(3), f, 3 * jax.nn.softmax(logits))
    np.testing.assert_allclose(float(value), float(exact(logits)), rtol=1e-5)
    assert error(gradient, flat(jax.grad(exact)(logits))) < 1e-5
    tx = ng.scale_by_metric(None, solver=ng.solvers.qr())
    d, state = tx.update(gradient, tx.init(logits), logits, operator=op)
    np.testing.assert_allclose(d - d.mean(), np.asarray(f) - np.mean(f), rtol=2e-5)
    assert bool(state.residual_used)


def real_psi(w, s):
    return jnp.sum(jnp.log(jnp.cosh(w @ s)))


def pair_psi(w, s):
    return jax.lax.complex(real_psi(w, s), jnp.sum(jnp.sin(w @ s)))


WAVES = {  # parameters of log ψ(w, s): real of a real one, real of a complex one, complex, holomorphic
    "real": (real_psi, WEIGHTS, {}),
    "real, complex log psi": (pair_psi, WEIGHTS, {}),
    "complex": (lambda w, s: pair_psi(jnp.real(w) + 0.5 * jnp.imag(w), s), WEIGHTS + 0.2j * WEIGHTS[::-1], {}),
    "holomorphic": (real_psi, WEIGHTS + 0.2j * WEIGHTS[::-1], {"holomorphic": True}),
}


@pytest.mark.parametrize("name", WAVES)
def test_the_variational_energy_is_that_of_the_matrix(name, float64):
    """E and ∇E of ⟨ψ|H|ψ⟩/⟨ψ|ψ⟩ over all states, and the residual explains the gradient."""
    log_psi, w, options = WAVES[name]
    w = jnp.asarray(w)

    def psi(w):
        amplitudes = jnp.exp(jax.vmap(lambda s: log_psi(w, s))(jnp.asarray(SPINS)))
        return jax.lax.complex(jnp.real(amplitudes), jnp.imag(amplitudes))

    def energy(w):
        return jnp.real(psi(w).conj() @ HAMILTONIAN @ psi(w)) / jnp.sum(jnp.abs(psi(w)) ** 2)

    local = (HAMILTONIAN @ psi(w)) / psi(w)
    objective = metrics.variational_energy(log_psi, **options)
    value, gradient, op = objective(w, jnp.asarray(SPINS), local, jnp.abs(psi(w)) ** 2)
    np.testing.assert_allclose(float(value), float(energy(w)), rtol=1e-10)
    expected = jnp.conj(jax.grad(energy)(w))
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-10)
    damping = ng.damping.absolute(1e-3)
    tx = ng.scale_by_metric(None, damping=damping, solver=ng.solvers.qr())
    d, state = tx.update(gradient, tx.init(w), w, operator=op)
    assert bool(state.residual_used) and bool(state.converged)
    # To first order the energy falls along −d by Re gᴴd.
    slope = (float(energy(w + 1e-5 * d)) - float(energy(w - 1e-5 * d))) / 2e-5
    np.testing.assert_allclose(slope, float(jnp.real(jnp.vdot(expected, d))), rtol=1e-5)


def test_energies_fall_to_the_ground_state(float64):
    """Stochastic reconfiguration by exact sums, in a loop that users would write."""
    w = jnp.asarray(WEIGHTS)
    rows = -np.eye(8)[:, [int("".join("01"[int(x < 0)] for x in s), 2) for s in SPINS]]
    h = rows + rows.T - np.diag(SPINS.sum(1))
    objective = metrics.variational_energy(pair_psi)
    tx = optax.chain(ng.scale_by_metric(None, damping=ng.damping.trace(1e-3)), optax.scale(-0.1))

    @jax.jit
    def step(w, state):
        psi = jnp.exp(jax.vmap(lambda s: pair_psi(w, s))(jnp.asarray(SPINS)))
        value, gradient, op = objective(w, jnp.asarray(SPINS), (h @ psi) / psi, jnp.abs(psi) ** 2)
        updates, state = tx.update(gradient, state, w, operator=op, value=value)
        return optax.apply_updates(w, updates), state, value

    state, values = tx.init(w), []
    for _ in range(60):
        w, state, value = step(w, state)
        values.append(float(value))
    assert values[-1] < values[0] and values[-1] >= np.linalg.eigvalsh(h)[0] - 1e-9


X = np.ones((2, 1), np.float32)
MISTAKES = {
    "values": (
        lambda: metrics.score_function(lambda t, x: t * x[0])(1.0, X, np.ones(3)), ValueError, r"values.*n = 2.*\(3,\)"
    ),
    "energies": (
        lambda: metrics.variational_energy(lambda t, x: t * x[0])(1.0, X, np.ones((2, 1))), ValueError,
        r"local_energies.*n = 2.*\(2, 1\)",
    ),
    "weights": (
        lambda: metrics.score_function(lambda t, x: t * x[0])(1.0, X, np.ones(2), np.ones(3)), ValueError, "weights"
    ),
    "no residual": (
        lambda: metrics.one_pass(metrics.scales(1.0))(np.ones(2, np.float32)), TypeError, "rows with a residual"
    ),
    "not a metric": (lambda: metrics.one_pass(1.0), TypeError, "metric: expected a function"),
}  # fmt: skip


test_mistakes_are_named = cases.named_mistakes(MISTAKES)
