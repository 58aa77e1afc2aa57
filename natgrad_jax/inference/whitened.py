"""Gaussians, in the frame in which the current q is N(0, I).

With z = μ + Cε, C any square factor of the covariance, and the whitened score difference r = Cᵀ∇log p̃(z) + ε, the
natural gradient in natural parameters is

    u = E[r],    M = sym E[r εᵀ] = I − Cᵀ(−E∇²log p̃)C,    ‖(u, M)‖²_F = uᵀu + ½ tr M²    (nats)

and a step of size s along the straight line in natural parameters is, exactly,

    C⁺ = C (I − sM)^(−½),    μ⁺ = μ + C (I − sM)⁻¹ s u.

Nothing here depends on the units of z. A full-rank factor has shape (d, d), a mean-field one (d,), for which M is the
diagonal only; the few functions that tell them apart stand at the end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax.families import FullRankParams, MeanFieldParams, PrecisionParams
from natgrad_jax.families.shared import LOG_2PI, inverse_lower, lower_of_inverse
from natgrad_jax.inference.descent import Estimate, Move
from natgrad_jax.inference.draws import Draws
from natgrad_jax.inference.estimators import Estimator, Price, Reparameterised, Score

TRIALS = 10  # of a step size
AIM = 1 - 1e-5  # of the radius, so that what converges to it from above ends inside


class Frame(NamedTuple):
    """q = N(loc, CCᵀ): z = loc + Cε; C = factor is (d, d), or (d,) for a diagonal; log_det is log|det C|."""

    loc: Array
    factor: Array
    log_det: Array


class Gradient(NamedTuple):
    """Natural gradient in the whitened frame: u (d,), M like the factor."""

    u: Array
    m: Array


class Average(NamedTuple):
    """Mean of natural parameters, as seen from a frame: log q̄ = −½ ξᵀAξ + bᵀξ, ξ = C⁻¹(z − μ)."""

    precision: Array
    linear: Array


@dataclass(frozen=True)
class Whitened:
    """The geometry: `target` is log p̃ of one x, `draws` those of ε."""

    target: Callable[[Array], Array]
    estimator: Estimator
    draws: Draws
    batch_error: Callable[[Array], Array] | None = None
    first_radius = 0.5

    @property
    def noisy(self) -> bool:
        """Whether two evaluations at one point differ."""
        return self.draws.random or self.batch_error is not None

    def evaluate(self, frame: Frame, key: Array) -> Estimate:
        """ELBO (nats), its standard error, and the natural gradient, from the draws z = μ + Cε."""
        d, dtype = len(frame.loc), frame.loc.dtype
        eps, weights = self.draws.points(key, d, dtype), self.draws.weights(d, dtype)
        z = at(frame, eps)
        if isinstance(self.estimator, Score):
            gaps = jax.vmap(self.target)(z) - log_q(frame, eps)
            gradient = _score(frame, gaps, eps, weights)
            return Estimate(weights @ gaps, self._error(gaps, z, gradient), gradient)
        values, slopes = jax.vmap(jax.value_and_grad(self.target))(z)
        gaps = values - log_q(frame, eps)
        pulled = _pull(frame.factor, slopes)
        if isinstance(self.estimator, Reparameterised):
            m = _moment(frame.factor, pulled, eps, weights) + _identity(frame.factor)
            gradient = Gradient(weights @ pulled, m)
        elif isinstance(self.estimator, Price):
            gradient = Gradient(weights @ (pulled + eps), _identity(frame.factor) + self._curvature(frame, z, weights))
        else:
            r = pulled + eps
            gradient = Gradient(weights @ r, _moment(frame.factor, r, eps, weights))
        return Estimate(weights @ gaps, self._error(gaps, z, gradient), gradient)

    def _error(self, gaps: Array, z: Array, gradient: Gradient) -> Array:
        trace = jnp.sum(gradient.m) if gradient.m.ndim == 1 else jnp.trace(gradient.m)
        error = jnp.hypot(self.draws.error(gaps), self.draws.radial_error(trace, len(gradient.u)))
        return error if self.batch_error is None else jnp.hypot(error, self.batch_error(z[0]))

    def _curvature(self, frame: Frame, z: Array, weights: Array) -> Array:
        """E[Cᵀ∇²log p̃ C], or its diagonal, by products with the columns of C."""
        full = frame.factor.ndim == 2
        columns = frame.factor.T if full else jnp.diag(frame.factor)

        def one(z: Array) -> Array:
            products = jax.vmap(lambda c: jax.jvp(jax.grad(self.target), (z,), (c,))[1])(columns)
            return products @ frame.factor if full else jnp.sum(products * columns, axis=-1)

        mean = jnp.tensordot(weights, jax.lax.map(one, z), 1)
        return (mean + mean.T) / 2 if full else mean

    def inner(self, a: Gradient, b: Gradient) -> Array:
        """u·u + ½ tr MM."""
        return a.u @ b.u + 0.5 * jnp.sum(a.m * b.m)

    def advance(self, point: Frame, gradient: Gradient, rate: Array, radius: Array) -> Move:
        """Along natural parameters; the KL is exact."""
        values, vectors = _spectrum(gradient.m)
        u = _to_eigen(vectors, gradient.u)
        size = _largest_step(values, u, rate, radius)
        shrink = 1 - size * values
        root = _function(vectors, 1 / jnp.sqrt(shrink))
        shift = _from_eigen(vectors, size * u / shrink)
        log_det = point.log_det - 0.5 * jnp.sum(jnp.log(shrink))
        frame = Frame(point.loc + _apply(point.factor, shift), _times(point.factor, root), log_det)
        return Move(frame, _kl(size, values, u), size, (root, shift))

    def narrower(self, point: Frame) -> Frame:
        """Half the scales."""
        return Frame(point.loc, point.factor / 2, point.log_det - len(point.loc) * math.log(2))

    def average(self, point: Frame) -> Average:
        """A = I, b = 0: q seen from its own frame."""
        return Average(_identity(point.factor), jnp.zeros_like(point.loc))

    def include(self, average: Average, point: Frame, share: Array) -> Average:
        """In natural parameters."""
        precision = (1 - share) * average.precision + share * _identity(average.precision)
        return Average(precision, (1 - share) * average.linear)

    def carry(self, average: Average, change: tuple[Array, Array]) -> Average:
        """The same average seen from the frame ξ = Rξ⁺ + m."""
        root, shift = change
        precision = _times(_times(root, average.precision), root)
        return Average(precision, _apply(root, average.linear - _apply(average.precision, shift)))

    def mean(self, average: Average, point: Frame) -> Frame:
        """N(A⁻¹b, A⁻¹) in the frame of the point."""
        precision, linear = average
        loc, factor, log_det = point
        if factor.ndim == 1:
            scale = 1 / jnp.sqrt(precision)
            return Frame(loc + factor * scale * scale * linear, factor * scale, log_det + jnp.sum(jnp.log(scale)))
        inverse = inverse_lower(jnp.linalg.cholesky(precision))
        log_det += jnp.sum(jnp.log(jnp.diagonal(inverse)))
        return Frame(loc + factor @ (inverse.T @ (inverse @ linear)), factor @ inverse.T, log_det)


def to_frame(params: Any) -> Frame:
    """A frame of a full-rank, precision or mean-field Gaussian."""
    if isinstance(params, MeanFieldParams):
        return Frame(params.loc, jnp.exp(params.log_scale), jnp.sum(params.log_scale))
    if isinstance(params, PrecisionParams):
        return _triangular(params.loc, inverse_lower(jnp.tril(params.precision_tril)).T)
    return _triangular(params.loc, jnp.tril(params.scale_tril))


def _triangular(loc: Array, factor: Array) -> Frame:
    return Frame(loc, factor, jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor)))))


def from_frame(frame: Frame, like: Any) -> Any:
    """The family's own coordinates: triangular factors have a positive diagonal."""
    if isinstance(like, MeanFieldParams):
        return MeanFieldParams(frame.loc, jnp.log(frame.factor))
    lower = jnp.linalg.qr(frame.factor.T, mode="r").T
    lower = lower * jnp.sign(jnp.diagonal(lower))
    if isinstance(like, PrecisionParams):
        return PrecisionParams(frame.loc, lower_of_inverse(lower @ lower.T))
    return FullRankParams(frame.loc, lower)


def curvature_start(target: Callable[[Array], Array], frame: Frame) -> Frame:
    """Scales |∂²log p̃/∂x_i²|^(−½) at the start: covariant under units. A coordinate without curvature keeps its own."""

    def curvature(e: Array) -> Array:
        return jax.jvp(jax.grad(target), (frame.loc,), (e,))[1] @ e

    scale = 1 / jnp.sqrt(jnp.abs(jax.vmap(curvature)(jnp.eye(len(frame.loc), dtype=frame.loc.dtype))))
    own = frame.factor if frame.factor.ndim == 1 else jnp.diagonal(frame.factor)
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, own)
    return Frame(frame.loc, scale if frame.factor.ndim == 1 else jnp.diag(scale), jnp.sum(jnp.log(scale)))


def at(frame: Frame, eps: Array) -> Array:
    """z = μ + Cε for every ε."""
    return frame.loc + _apply(frame.factor, eps)


def log_q(frame: Frame, eps: Array) -> Array:
    """log q(z) at every z = μ + Cε."""
    return -0.5 * jnp.sum(jnp.square(eps), axis=-1) - frame.log_det - 0.5 * len(frame.loc) * LOG_2PI


def _score(frame: Frame, gaps: Array, eps: Array, weights: Array) -> Gradient:
    """u = E[(f − b)ε], M = E[(f − b)(εεᵀ − I)] with b the mean of the other draws."""
    n = len(gaps)
    advantage = (gaps - weights @ gaps) * n / (n - 1)
    scaled = advantage[:, None] * eps
    m = _moment(frame.factor, scaled, eps, weights) - (weights @ advantage) * _identity(frame.factor)
    return Gradient(weights @ scaled, m)


def _kl(size: Array, values: Array, u: Array) -> Array:
    """KL(new‖old) of a step of size s: ½Σ(1/a − 1 + log a + (s u/a)²) with a = 1 − sλ; +inf where q⁺ does not exist."""
    a = 1 - size * values
    exists = jnp.all(a > 0)
    a = jnp.where(exists, a, 1)
    return jnp.where(exists, 0.5 * jnp.sum(1 / a - 1 + jnp.log(a) + jnp.square(size * u / a)), jnp.inf)


def _largest_step(values: Array, u: Array, rate: Array, radius: Array) -> Array:
    """The largest s ≤ rate with KL ≤ radius: the KL grows with s, nearly as a power of it.

    With λ the largest eigenvalue or 0, KL ≤ ½‖g‖²(s/(1 − sλ))², which gives a lower bound; where s = 1/λ q⁺ ceases to
    exist. Between the two, tangents of log KL over log s; where they leave the interval, its geometric mean.
    """
    norm = jnp.sqrt(u @ u + 0.5 * jnp.sum(jnp.square(values)))
    reach = jnp.sqrt(2 * radius) / jnp.where(norm > 0, norm, 1)
    most = jnp.maximum(jnp.max(values), 0)
    least = jnp.minimum(rate, reach / (1 + reach * most))
    pole = jnp.where(rate * most < 1, rate, 1 / jnp.where(most > 0, most, 1))

    def narrow(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, s = carry
        kl = _kl(s, values, u)
        inside = kl <= radius
        low, high = jnp.where(inside, s, low), jnp.where(inside, high, s)
        slope = _slope(s, values, u) * s / jnp.where(kl > 0, kl, 1)  # d log KL / d log s
        step = jnp.log(AIM * radius / jnp.where(kl > 0, kl, 1)) / jnp.where(slope > 0, slope, 1)
        proposal = s * jnp.exp(jnp.where(jnp.isfinite(kl), step, -jnp.inf))
        return low, high, jnp.where((proposal > low) & (proposal < high), proposal, jnp.sqrt(low * high))

    low, _, _ = jax.lax.fori_loop(0, TRIALS, narrow, (least, pole, least))
    return jnp.where(_kl(rate, values, u) <= radius, rate, low)


def _slope(size: Array, values: Array, u: Array) -> Array:
    """d KL / ds = ½Σ sλ²/a² + 2su²/a³ with a = 1 − sλ."""
    a = 1 - size * values
    return 0.5 * jnp.sum(size * jnp.square(values / a) + 2 * size * jnp.square(u / a) / a)


# What differs between a full factor (d, d) and a diagonal one (d,).


def _identity(like: Array) -> Array:
    return jnp.eye(len(like), dtype=like.dtype) if like.ndim == 2 else jnp.ones_like(like)


def _apply(factor: Array, x: Array) -> Array:
    """C x for every x on the last axis."""
    return x @ factor.T if factor.ndim == 2 else x * factor


def _pull(factor: Array, g: Array) -> Array:
    """Cᵀ g for every g on the last axis."""
    return g @ factor if factor.ndim == 2 else g * factor


def _times(a: Array, b: Array) -> Array:
    return a @ b if a.ndim == 2 else a * b


def _moment(factor: Array, r: Array, eps: Array, weights: Array) -> Array:
    """sym E[r εᵀ], or its diagonal."""
    if factor.ndim == 1:
        return weights @ (r * eps)
    m = (weights[:, None] * r).T @ eps
    return (m + m.T) / 2


def _spectrum(m: Array) -> tuple[Array, Array | None]:
    if m.ndim == 1:
        return m, None
    values, vectors = jnp.linalg.eigh(m)
    return values, vectors


def _to_eigen(vectors: Array | None, x: Array) -> Array:
    return x if vectors is None else vectors.T @ x


def _from_eigen(vectors: Array | None, x: Array) -> Array:
    return x if vectors is None else vectors @ x


def _function(vectors: Array | None, values: Array) -> Array:
    return values if vectors is None else (vectors * values) @ vectors.T
