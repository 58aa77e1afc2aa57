"""Value, gradient and metric of an objective from one pass, with the residual of the gradient riding along.

The rows that make the metric make the gradient too, g = Aᴴe. Whoever has them needs no second pass:

    value, gradient, G = objective(params, ...)
    updates, state = optimizer.update(gradient, state, params, operator=G, value=value)

with an optimizer whose metric is None.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, leading_axis
from natgrad_jax.metrics.fields import quantum_geometric, sample_roots
from natgrad_jax.metrics.fisher import LogProb
from natgrad_jax.metrics.models import value_and_grad
from natgrad_jax.metrics.shared import (
    Form,
    Metric,
    check_callable,
    check_log_prob,
    pulled_back,
)
from natgrad_jax.operators import Gram, Operator, RealParts


class Evaluation(NamedTuple):
    """An objective at one point.

    Attributes:
        value: L(θ).
        gradient: ∇L, shaped like the parameters; for complex ones in the convention of optax.
        operator: G, rows with the residual e of the gradient.
    """

    value: Array
    gradient: PyTree
    operator: Operator


def one_pass(metric: Metric) -> Callable[..., Evaluation]:
    """½‖r‖², its gradient and its metric from one pass over the residuals: `metric` is one of `least_squares`.

    Args:
        metric: metric(params, **data) -> rows with a residual.

    Returns:
        objective(params, **data) -> `Evaluation`.

    Cost: that of the metric, and one product with its rows.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> objective = ng.metrics.one_pass(ng.metrics.least_squares(lambda w, batch: batch * w - 2.0))
        >>> value, gradient, G = objective(jnp.array(1.0), batch=jnp.array([1.0, 3.0]))
        >>> float(value), float(gradient), float(G.dense()[0, 0])
        (1.0, 2.0, 10.0)
    """
    check_callable(metric, "metric", "metric(params, **data), such as least_squares(residuals)")

    def objective(params: PyTree, **data: PyTree) -> Evaluation:
        operator = metric(params, **data)
        value, gradient = value_and_grad(operator)
        return Evaluation(value, _tree.cast_like(gradient, params), operator)

    return objective


def score_function(log_prob: LogProb, *, jac: str = "auto") -> Callable[..., Evaluation]:
    """L = E_q[f] from draws of q, with the score-function gradient and the Fisher information of the same draws.

        ∇L = Σ_i w_i (f_i − f̄) s_i,    G = Σ_i w_i s_i s_iᵀ,    s = ∂ log q/∂θ

    The baseline f̄ is the weighted mean. Rewards, energies, the integrand of an ELBO: G⁻¹∇L is the regression of f on
    the scores.

    Args:
        log_prob: log_prob(params, x) for one x, normalised.
        jac: "auto", "rev" or "fwd".

    Returns:
        objective(params, samples, values, weights=None) -> `Evaluation`. `samples` are draws of q, or the whole support
        with its probabilities as `weights`, which are made to sum to one; `values` are f at the samples, (n,).

    Raises:
        ValueError: values or weights that are not one number a sample.

    Cost: one gradient a sample.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_prob = lambda logits, k: jax.nn.log_softmax(logits)[k]
        >>> objective = ng.metrics.score_function(log_prob)
        >>> value, gradient, G = objective(jnp.zeros(2), jnp.arange(2), jnp.array([1.0, 3.0]))
        >>> round(float(value), 4), [round(float(x), 4) for x in gradient]
        (2.0, [-0.5, 0.5])

    Reference: Williams, "Simple statistical gradient-following algorithms" (1992); Kakade, "A natural policy gradient"
    (2001), theorem 1.
    """
    check_callable(log_prob, "log_prob", "log_prob(params, x)")
    form = Form.of(jac)

    def objective(params: PyTree, samples: PyTree, values: Array, weights: Array | None = None) -> Evaluation:
        n = leading_axis(samples, "samples")
        check_log_prob(log_prob, params, samples)
        roots = sample_roots(weights, n, _tree.Space.of(params).dtype)
        value, centred = _centred(values, roots, n, "values")
        operator = pulled_back(log_prob, params, samples, roots, form, residual=roots * centred)
        assert isinstance(operator, Gram)
        return Evaluation(value, _gradient_of(operator, params), operator)

    return objective


def variational_energy(
    log_psi: Callable[[PyTree, PyTree], Array], *, holomorphic: bool = False, jac: str = "auto"
) -> Callable[..., Evaluation]:
    """E = ⟨ψ|H|ψ⟩/⟨ψ|ψ⟩ from local energies, with its gradient and the quantum geometric tensor of the same samples.

        ∇E = 2 Re ⟨(O − ⟨O⟩)* (E_loc − E)⟩,    E_loc(x) = (Hψ)(x)/ψ(x),    O = ∂ log ψ/∂θ

    G⁻¹∇E is a step of stochastic reconfiguration, twice that of texts that leave out the 2.

    Args:
        log_psi: log_psi(params, x) for one x, real or complex.
        holomorphic: as in `quantum_geometric`.
        jac: "auto", "rev" or "fwd".

    Returns:
        objective(params, samples, local_energies, weights=None) -> `Evaluation`; samples and weights as in
        `quantum_geometric`, local_energies (n,), real or complex.

    Cost: that of `quantum_geometric`, and one product with its rows.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_psi = lambda t, k: jnp.log(jnp.stack([jnp.cos(t / 2), jnp.sin(t / 2)]))[k]
        >>> t, k = jnp.array(0.8), jnp.arange(2)
        >>> psi = jnp.array([jnp.cos(0.4), jnp.sin(0.4)])
        >>> value, gradient, G = ng.metrics.variational_energy(log_psi)(t, k, jnp.array([1.0, -1.0]), psi**2)
        >>> round(float(value), 4), round(float(gradient), 4)  # cos t and −sin t, for H = σ_z
        (0.6967, -0.7174)

    Reference: Sorella, "Green function Monte Carlo with stochastic reconfiguration" (1998).
    """
    metric = quantum_geometric(log_psi, holomorphic=holomorphic, jac=jac)

    def objective(params: PyTree, samples: PyTree, local_energies: Array, weights: Array | None = None) -> Evaluation:
        n = leading_axis(samples, "samples")
        operator = metric(params, samples=samples, weights=weights)
        parts = operator.parts if isinstance(operator, RealParts) else operator
        roots = sample_roots(weights, n, _tree.real_dtype(_tree.Space.of(params).dtype))
        value, centred = _centred(local_energies, roots, n, "local_energies")
        e = 2 * roots * centred
        if not holomorphic:
            # Rows of the real and of the imaginary part of log ψ, sample by sample.
            pair = parts.n == 2 * n
            e = jnp.stack([jnp.real(e), jnp.imag(e)], axis=1).reshape(-1) if pair else jnp.real(e)
        gram = Gram(parts.rows, residual=e.astype(parts.space.dtype) if parts.n else None)
        if isinstance(operator, RealParts):
            whole = RealParts(gram, operator.space)
            return Evaluation(value, _tree.complex_of(gram.transposed_times(e), operator.space), whole)
        return Evaluation(value, _gradient_of(gram, params), gram)

    return objective


def _centred(values: Array, roots: Array, n: int, name: str) -> tuple[Array, Array]:
    """The weighted mean (its real part), and what is left of the values."""
    values = jnp.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"{name}: expected one number for each of the n = {n} samples, got shape {values.shape}")
    mean = jnp.sum(jnp.square(roots) * values)
    return jnp.real(mean), values - mean


def _gradient_of(gram: Gram, params: PyTree) -> PyTree:
    if gram.residual is None:
        return params
    return _tree.cast_like(gram.transposed_times(gram.residual), params)
