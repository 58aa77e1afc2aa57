"""Natural-gradient descent of KL(q‖p) for Gaussians, in the frame in which the current q is N(0, I).

With z = μ + Cε, C any square factor of the covariance, and the whitened score difference r = Cᵀ∇log p̃(z) + ε, the
natural gradient in natural parameters is

    u = E[r],    M = sym E[r εᵀ] = I − Cᵀ(−E∇²log p̃)C,    ‖(u, M)‖²_F = uᵀu + ½ tr M²    (nats)

and a step of size s along the straight line in natural parameters is, exactly,

    C⁺ = C (I − sM)^(−½),    μ⁺ = μ + C (I − sM)⁻¹ s u.

Nothing here depends on the units of z. A full-rank factor has shape (d, d), a mean-field one (d,), for which M is the
diagonal only; the few functions that tell them apart stand at the end. Every constant below is dimensionless or in
nats, and is a heuristic unless a reason is given.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax._tree import where
from natgrad_jax.families.shared import LOG_2PI

FIRST_RADIUS = 0.5  # nats: KL of the first step, and the radius to fall back to
GROWTH = 4.0  # of the radius, while it binds and the gain is as predicted
SHRINK = 8.0  # of the KL, after a rejection
REJECT_AT = 3.0  # standard errors by which the ELBO must have fallen
ERROR_GROWTH = 3.0  # cap on the new standard error, relative to the old: heavy tails must not excuse everything
MEMORY = 0.8  # of the running means that decide when to stop
STALE = 10.0  # the running means are cut to this many times the larger of the last two ‖g‖²
CLIP = 4.0  # a gradient above CLIP × the running mean of ‖g‖² is shortened to that
NEAR = 0.35  # iterates are averaged while successive gradients have less than this part of ‖g‖² in common
GIVE_UP_AFTER = 20  # evaluations in a row that are not finite


class Frame(NamedTuple):
    """q = N(loc, CCᵀ): z = loc + Cε; C = factor is (d, d), or (d,) for a diagonal."""

    loc: Array
    factor: Array


class Gradient(NamedTuple):
    """Natural gradient in the whitened frame: u (d,), M like the factor."""

    u: Array
    m: Array


class Average(NamedTuple):
    """Mean of natural parameters, as seen from a frame: log q̄ = −½ ξᵀAξ + bᵀξ, ξ = C⁻¹(z − μ)."""

    precision: Array
    linear: Array
    count: Array  # type: ignore[assignment]


class State(NamedTuple):
    """Where the descent stands. `trial` is evaluated next; `base` is the last accepted point."""

    trial: Frame
    base: Frame
    gradient: Gradient
    elbo: Array
    error: Array
    radius: Array
    kl: Array
    predicted: Array
    bound: Array
    turns: Array
    weight: Array
    gap: Array
    norm: Array
    average: Average
    moved: Average
    count: Array  # type: ignore[assignment]
    rejected: Array
    skipped: Array
    in_a_row: Array
    started: Array


def start(frame: Frame) -> State:
    """The state before the first evaluation at `frame`."""
    zero = jnp.zeros((), frame.loc.dtype)
    none = jnp.zeros((), jnp.int32)
    no = jnp.asarray(False)
    gradient = Gradient(jnp.zeros_like(frame.loc), jnp.zeros_like(frame.factor))
    average = Average(_identity(frame.factor), jnp.zeros_like(frame.loc), zero)
    return State(
        trial=frame, base=frame, gradient=gradient, elbo=zero - jnp.inf, error=zero, radius=zero + FIRST_RADIUS,
        kl=zero + FIRST_RADIUS, predicted=zero, bound=no, turns=zero, weight=zero, gap=zero, norm=zero,
        average=average, moved=average, count=none, rejected=none, skipped=none, in_a_row=none, started=no,
    )  # fmt: skip


def step(log_density: Callable[[Array], Array], state: State, eps: Array) -> State:
    """One evaluation of the gradient at `state.trial` with the draws `eps` (n, d), and the choice of the next trial."""
    elbo, error, gradient = evaluate(log_density, state.trial, eps)
    finite = jnp.isfinite(elbo) & _finite(gradient)
    first = finite & ~state.started
    error = jnp.where(first, error, jnp.minimum(error, ERROR_GROWTH * state.error))
    noise = jnp.hypot(error, state.error)
    fell = state.elbo - elbo
    accept = finite & (first | (fell <= REJECT_AT * noise) | _unexplained(fell, gradient, state))
    later = accept & ~first

    gradient = _clipped(gradient, state)
    norm, last_norm = _inner(gradient, gradient), _inner(state.gradient, state.gradient)
    gap = _inner(gradient, state.gradient)
    # Where the radius bound, and where gradients were far longer, the past says nothing about the noise here.
    keep = jnp.where(_far(state.bound, state.radius), 0, MEMORY)
    limit = STALE * jnp.maximum(norm, last_norm) * state.weight
    cut = keep * jnp.where(state.norm > limit, limit / jnp.where(state.norm > 0, state.norm, 1), 1)
    blend = lambda keep, old, factor, new: jnp.where(later, factor * old + (1 - keep) * new, old)  # noqa: E731
    weight = blend(keep, state.weight, keep, 1.0)
    mean_gap, mean_norm = blend(keep, state.gap, cut, gap), blend(keep, state.norm, cut, norm)
    turns = state.turns + jnp.where(later & (gap < 0), 1, 0)

    as_predicted = elbo - state.elbo + noise > state.predicted / 2
    radius = jnp.where(
        state.bound,
        jnp.where(as_predicted, GROWTH, 1) * state.radius,
        jnp.maximum(FIRST_RADIUS, state.radius / 2),
    )
    radius = jnp.where(accept, jnp.where(first, state.radius, radius), state.kl / SHRINK)

    base = where(accept, state.trial, state.base)
    gradient = where(accept, gradient, state.gradient)
    rate = 1 / (1 + turns / 4)  # Kesten (1958): slow down when gradients begin to point against each other
    trial, kl, size, moved_by = _advance(base, gradient, rate, radius)
    bound = size < rate

    near = (turns >= 1) & ~_far(bound, radius) & (weight > 0) & (mean_gap < NEAR * mean_norm)
    average = where(accept, _include(state.moved, near), state.average)
    # Without an accepted point there is nothing to go back to: try a narrower start.
    narrower = Frame(state.trial.loc, state.trial.factor / 2)
    started = state.started | first
    return State(
        trial=where(started, trial, narrower),
        base=where(started, base, narrower),
        gradient=gradient,
        elbo=jnp.where(accept, elbo, state.elbo),
        # A lucky estimate must not stand for ever: each rejection makes the next one harder.
        error=jnp.where(accept, error, 2 * state.error),
        radius=radius,
        kl=kl,
        predicted=size * (1 - size / 2) * _inner(gradient, gradient),
        bound=bound,
        turns=turns,
        weight=jnp.where(finite, weight, 0),
        gap=jnp.where(finite, mean_gap, 0),
        norm=jnp.where(finite, mean_norm, 0),
        average=average,
        moved=_move(average, moved_by),
        count=state.count + 1,
        rejected=state.rejected + (finite & ~accept),
        skipped=state.skipped + ~finite,
        in_a_row=jnp.where(finite, 0, state.in_a_row + 1),
        started=started,
    )


def converged(state: State, tol: Array) -> Array:
    """Whether the gap to the optimum and the noise of the average are both below `tol` nats.

    Near the optimum KL(q‖q*) ≈ ½‖g‖². The product of two independent estimates of g has no bias from their noise.
    With weights that grow as k² the noise of a mean of n estimates is 9/5 · ½‖g‖²/n.
    """
    quiet = 0.9 * state.norm / jnp.maximum(state.average.count, 1) < tol * state.weight
    return (state.weight > 0) & (state.gap / 2 < tol * state.weight) & quiet


def natural_norm(state: State) -> Array:
    """gᵀF⁻¹g in nats: the running mean of the product of successive gradients."""
    return jnp.where(state.weight > 0, state.gap / jnp.where(state.weight > 0, state.weight, 1), jnp.inf)


def mean_iterate(state: State) -> Frame:
    """The average of the iterates near the optimum; the last accepted point if there were none."""
    precision, linear, _ = state.average
    loc, factor = state.base
    if factor.ndim == 1:
        scale = 1 / jnp.sqrt(precision)
        return Frame(loc + factor * scale * scale * linear, factor * scale)
    lower = jnp.linalg.cholesky(precision)
    inverse = jax.scipy.linalg.solve_triangular(lower, _identity(factor), lower=True)
    return Frame(loc + factor @ (inverse.T @ (inverse @ linear)), factor @ inverse.T)


def number_of_draws(d: int, least: int) -> int:
    """The smallest multiple of 2d that is at least `least`."""
    return 2 * d * max(1, math.ceil(least / (2 * d)))


def orthogonal_draws(key: Array, d: int, n: int, dtype: jnp.dtype) -> Array:
    """n standard normal draws (n, d), n a multiple of 2d: antithetic pairs along orthogonal directions.

    Each block of d directions shares one χ_d radius, so that its second moment is a multiple of I: for a quadratic
    target the only noise left in (u, M) is that multiple.
    """
    blocks = n // (2 * d)
    directions, radii = jax.random.split(key)
    q, r = jnp.linalg.qr(jax.random.normal(directions, (blocks, d, d), dtype))
    q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    radius = jnp.linalg.norm(jax.random.normal(radii, (blocks, d), dtype), axis=-1)
    half = (jnp.swapaxes(q, -1, -2) * radius[:, None, None]).reshape(-1, d)
    return jnp.concatenate([half, -half])


def evaluate(log_density: Callable[[Array], Array], frame: Frame, eps: Array) -> tuple[Array, Array, Gradient]:
    """ELBO (nats), its standard error, and the natural gradient, from the draws z = μ + Cε."""
    values, slopes = jax.vmap(jax.value_and_grad(log_density))(frame.loc + _apply(frame.factor, eps))
    r = _pull(frame.factor, slopes) + eps
    return *_elbo(values, frame, eps), Gradient(jnp.mean(r, axis=0), _moment(frame.factor, r, eps))


def estimate_elbo(log_density: Callable[[Array], Array], frame: Frame, eps: Array) -> tuple[Array, Array]:
    """ELBO (nats) and its standard error, without gradients; the second half of `eps` mirrors the first."""
    return _elbo(jax.vmap(log_density)(frame.loc + _apply(frame.factor, eps)), frame, eps)


def _elbo(values: Array, frame: Frame, eps: Array) -> tuple[Array, Array]:
    n, d = eps.shape
    log_q = -0.5 * jnp.sum(jnp.square(eps), axis=-1) - 0.5 * d * LOG_2PI - _log_det(frame.factor)
    gaps = values - log_q
    pairs = (gaps[: n // 2] + gaps[n // 2 :]) / 2
    return jnp.mean(gaps), jnp.std(pairs) / math.sqrt(max(n // 2 - 1, 1))


def _unexplained(fell: Array, gradient: Gradient, state: State) -> Array:
    """Whether a short step cannot have made the ELBO fall so far: then the estimate before it was a lucky one.

    A step of length √(2 KL) changes the ELBO by at most the mean of both gradients' lengths times its own, to second
    order. Heavy tails make lucky estimates, and too small standard errors, common.
    """
    lengths = jnp.sqrt(_inner(gradient, gradient)) + jnp.sqrt(_inner(state.gradient, state.gradient))
    return (state.kl <= FIRST_RADIUS / SHRINK) & (fell > jnp.sqrt(2 * state.kl) * lengths / 2)


def _far(bound: Array, radius: Array) -> Array:
    """Whether the radius shortens steps, and is not just small after a rejection."""
    return bound & (radius >= FIRST_RADIUS)


def _clipped(gradient: Gradient, state: State) -> Gradient:
    """Shortened to √CLIP times the root mean square of those before: one heavy-tailed draw must not decide."""
    norm = _inner(gradient, gradient)
    mean = state.norm / jnp.where(state.weight > 0, state.weight, 1)
    clip = (state.weight > 0) & (norm > CLIP * mean)
    factor = jnp.where(clip, jnp.sqrt(CLIP * mean / jnp.where(clip, norm, 1)), 1)
    return Gradient(gradient.u * factor, gradient.m * factor)


def _advance(
    base: Frame, gradient: Gradient, rate: Array, radius: Array
) -> tuple[Frame, Array, Array, tuple[Array, Array]]:
    """The point base + s·g with the largest s ≤ rate and KL(new‖base) ≤ radius; its KL, s, and the change of frame."""
    values, vectors = _spectrum(gradient.m)
    u = _to_eigen(vectors, gradient.u)
    size = _largest_step(values, u, rate, radius)
    shrink = 1 - size * values
    root = _function(vectors, 1 / jnp.sqrt(shrink))
    shift = _from_eigen(vectors, size * u / shrink)
    frame = Frame(base.loc + _apply(base.factor, shift), _times(base.factor, root))
    return frame, _kl(size, values, u), size, (root, shift)


def _kl(size: Array, values: Array, u: Array) -> Array:
    """KL(new‖old) of a step of size s: ½Σ(1/a − 1 + log a + (s u/a)²) with a = 1 − sλ; +inf where q⁺ does not exist."""
    a = 1 - size * values
    exists = jnp.all(a > 0)
    a = jnp.where(exists, a, 1)
    return jnp.where(exists, 0.5 * jnp.sum(1 / a - 1 + jnp.log(a) + jnp.square(size * u / a)), jnp.inf)


def _largest_step(values: Array, u: Array, rate: Array, radius: Array) -> Array:
    """The largest s ≤ rate with KL ≤ radius, by bisection: the KL grows with s."""

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        inside = _kl(middle, values, u) <= radius
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    low, _ = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(rate), rate))
    return jnp.where(_kl(rate, values, u) <= radius, rate, low)


def _include(average: Average, near: Array) -> Average:
    """The average with the frame's own q (A = I, b = 0) added, with weight k(k+1); that q alone when not near."""
    count = jnp.where(near, average.count + 1, 0)
    share = jnp.where(near, 3 / (count + 2), 1)
    precision = (1 - share) * average.precision + share * _identity(average.precision)
    return Average(precision, (1 - share) * average.linear, count)


def _move(average: Average, moved_by: tuple[Array, Array]) -> Average:
    """The same average seen from the frame ξ = Rξ⁺ + m."""
    root, shift = moved_by
    precision = _times(_times(root, average.precision), root)
    linear = _apply(root, average.linear - _apply(average.precision, shift))
    return Average(precision, linear, average.count)


def _inner(a: Gradient, b: Gradient) -> Array:
    """⟨a, b⟩ in the Fisher metric: u·u + ½ tr MM."""
    return a.u @ b.u + 0.5 * jnp.sum(a.m * b.m)


def _finite(gradient: Gradient) -> Array:
    return jnp.all(jnp.isfinite(gradient.u)) & jnp.all(jnp.isfinite(gradient.m))


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


def _log_det(factor: Array) -> Array:
    return jnp.linalg.slogdet(factor)[1] if factor.ndim == 2 else jnp.sum(jnp.log(jnp.abs(factor)))


def _moment(factor: Array, r: Array, eps: Array) -> Array:
    """sym E[r εᵀ], or its diagonal."""
    if factor.ndim == 1:
        return jnp.mean(r * eps, axis=0)
    m = r.T @ eps / len(eps)
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
