"""Any family by its own retraction, and any objective under a metric.

A gradient is kept as both of its faces: the covector g = ∇ELBO and the vector F⁻¹g, in the coordinates of the
parameters. A step is R(θ, sF⁻¹g), of length s²gᵀF⁻¹g = 2 KL to second order. Both are covariant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax._tree import PyTree, vdot
from natgrad_jax.families.composite import solved
from natgrad_jax.inference.descent import Estimate, Move
from natgrad_jax.inference.draws import Draws
from natgrad_jax.inference.estimators import ClosedForm, Estimator, Exact, Reparameterised, Score
from natgrad_jax.inference.objectives import exact_kl
from natgrad_jax.solvers import solve


class Gradient(NamedTuple):
    """∇L and F⁻¹∇L."""

    covector: PyTree
    vector: PyTree


class Retracted:
    """What both geometries share: lengths, steps and averages by a retraction."""

    first_radius = 0.5

    def retract(self, point: PyTree, step: PyTree) -> PyTree:
        """point + step to first order."""
        raise NotImplementedError

    def inner(self, a: Gradient, b: Gradient) -> Array:
        """aᵀF⁻¹b, symmetric although a and b come from two points."""
        return jnp.real(vdot(a.covector, b.vector) + vdot(b.covector, a.vector)) / 2

    def advance(self, point: PyTree, gradient: Gradient, rate: Array, radius: Array) -> Move:
        """The largest step with ½s²gᵀF⁻¹g ≤ radius."""
        norm = jnp.maximum(self.inner(gradient, gradient), 0)
        bound = jnp.sqrt(2 * radius / jnp.where(norm > 0, norm, 1))
        size = jnp.where(norm > 0, jnp.minimum(rate, bound), rate).astype(norm.dtype)
        step = jax.tree.map(lambda x: (size * x).astype(x.dtype), gradient.vector)
        return Move(self.retract(point, step), size * size * norm / 2, size, ())

    def narrower(self, point: PyTree) -> PyTree:
        """No other start is known."""
        return point

    def average(self, point: PyTree) -> PyTree:
        """The point."""
        return point

    def include(self, average: PyTree, point: PyTree, share: Array) -> PyTree:
        """From the average towards the point, by the retraction."""
        step = jax.tree.map(lambda x, y: (share * (y - x)).astype(x.dtype), average, point)
        moved = self.retract(average, step)
        return jax.tree.map(lambda x, y: jnp.where(share < 1, x, y), moved, point)

    def carry(self, average: PyTree, change: PyTree) -> PyTree:
        """It stands where it is."""
        return average

    def mean(self, average: PyTree, point: PyTree) -> PyTree:
        """The average."""
        return average


@dataclass(frozen=True)
class OfFamily(Retracted):
    """The ELBO of a family; `target` is log p̃ of one x, `expected` its mean in closed form."""

    target: Callable[[PyTree], Array]
    family: Any
    estimator: Estimator
    draws: Draws
    batch_error: Callable[[PyTree], Array] | None = None
    expected: Callable[[PyTree], Array] | None = None

    @property
    def noisy(self) -> bool:
        """Whether two evaluations at one point differ."""
        return (self.draws.random and not self.estimator.exact) or self.batch_error is not None

    def retract(self, point: PyTree, step: PyTree) -> PyTree:
        """The family's own."""
        return self.family.retract(point, step)

    def evaluate(self, params: PyTree, key: Array) -> Estimate:
        """ELBO (nats), its standard error, and both faces of its gradient."""
        covector, (value, error) = jax.grad(self._objective(), has_aux=True)(params, key)
        return Estimate(value, error, Gradient(covector, solved(self.family.fisher(params), covector)))

    def _objective(self) -> Callable[[PyTree, Array], tuple[Array, tuple[Array, Array]]]:
        """A function whose gradient is the estimator; beside it the ELBO and its standard error."""
        if isinstance(self.estimator, Exact):
            return lambda params, _: _certain(-self._exact_kl(params))
        if isinstance(self.estimator, ClosedForm):
            assert self.expected is not None
            expected = self.expected
            return lambda params, _: _certain(expected(params) + self.family.entropy(params))
        return self._sampled

    def _exact_kl(self, params: PyTree) -> Array:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        in_its_precision = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        support = jax.tree.map(in_its_precision, self.family.support())
        chunk_size = getattr(self.estimator, "chunk_size", None)
        return exact_kl(self.family.log_prob, self.target, support, chunk_size=chunk_size)(params)

    def _sampled(self, params: PyTree, key: Array) -> tuple[Array, tuple[Array, Array]]:
        fixed = jax.lax.stop_gradient(params)
        x, weights = self._points(params, key)
        log_q = jax.vmap(lambda x: self.family.log_prob(fixed, x))
        values = jax.vmap(self.target)(x)
        gaps = values - log_q(x)
        known = weights @ gaps, self._error(gaps, x)
        if isinstance(self.estimator, Reparameterised):
            return weights @ values + self.family.entropy(params), known
        if isinstance(self.estimator, Score):
            x, gaps = jax.lax.stop_gradient((x, gaps))
            advantage = (gaps - weights @ gaps) * len(gaps) / (len(gaps) - 1)
            return weights @ (advantage * jax.vmap(lambda x: self.family.log_prob(params, x))(x)), known
        return weights @ gaps, known

    def _error(self, gaps: Array, x: PyTree) -> Array:
        error = self.draws.error(gaps)
        if self.batch_error is None:
            return error
        return jnp.hypot(error, self.batch_error(jax.tree.map(lambda x: x[0], x)))

    def _points(self, params: PyTree, key: Array) -> tuple[PyTree, Array]:
        dtype = jnp.result_type(*(x.dtype for x in jax.tree.leaves(params)))
        if hasattr(self.family, "push"):
            d = self.family.noise
            return self.family.push(params, self.draws.points(key, d, dtype)), self.draws.weights(d, dtype)
        n = self.draws.n
        return self.family.sample(params, key, n), jnp.full(n, 1 / n, dtype)


def _certain(value: Array) -> tuple[Array, tuple[Array, Array]]:
    return value, (value, jnp.zeros_like(value))


@dataclass(frozen=True)
class OfObjective(Retracted):
    """Minus an objective, under a metric."""

    objective: Callable[[PyTree], Array]
    metric: Callable[[PyTree], Any]
    solver: Any
    damping: Any
    retraction: Callable[[PyTree, PyTree], PyTree] | None = None
    noisy = False
    first_radius = float("inf")

    def retract(self, point: PyTree, step: PyTree) -> PyTree:
        """point + step, unless another is given."""
        if self.retraction is not None:
            return self.retraction(point, step)
        return jax.tree.map(jnp.add, point, step)

    def evaluate(self, params: PyTree, key: Array) -> Estimate:
        """Minus the objective and both faces of its gradient."""
        value, grad = jax.value_and_grad(self.objective)(params)
        covector = jax.tree.map(lambda x: -jnp.conj(x), grad)  # as optax has it; JAX has the conjugate
        solution = solve(self.metric(params), covector, solver=self.solver, damping=self.damping)
        return Estimate(-value, jnp.zeros_like(value), Gradient(covector, solution.value))
