"""Natural-gradient descent with a trust region, an honest acceptance and an end, on any geometry.

A geometry says what a point is, how the objective and its natural gradient are estimated there, how far a step leads
and what the mean of points is. What is here does not see the difference: it works with lengths ‖g‖² = gᵀF⁻¹g,
divergences and values in nats, none of which has units. Every constant below is a heuristic unless a reason is given.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax._tree import PyTree, all_finite, where

GROWTH = 4.0  # of the radius, while it binds and the gain is as predicted
SHRINK = 8.0  # of the KL, after a rejection
REJECT_AT = 3.0  # standard errors by which the value must have fallen
GAIN = 0.1  # of the predicted gain, that a value without noise must reach
ERROR_GROWTH = 3.0  # cap on the new standard error, relative to the old: heavy tails must not excuse everything
MEMORY = 0.8  # of the running means that decide when to stop
STALE = 2.0  # the running mean of ‖g‖² is cut to this many times the larger of the last two
CLIP = 4.0  # a gradient above CLIP × the running mean of ‖g‖² is shortened to that
FALLING = 8.0  # the average begins anew when ‖g‖² has fallen by this since it began
NEAR = 0.35  # iterates are averaged while successive gradients have less than this part of ‖g‖² in common
RUNAWAY = 1e15  # nats: 25 steps in a row that the radius shortened, and that gained what was predicted
GIVE_UP_AFTER = 20  # evaluations in a row that are not finite, or steps in a row that are rejected


class Estimate(NamedTuple):
    """The value to be maximised, its standard error, and the natural gradient, in the geometry's own form."""

    value: Array
    error: Array
    gradient: PyTree


class Move(NamedTuple):
    """Where a step leads: the point, KL(new‖old), the size of the step, and what carries an average along."""

    point: PyTree
    kl: Array
    size: Array
    change: PyTree


class Geometry(Protocol):
    """What a descent needs to know."""

    @property
    def noisy(self) -> bool:
        """Whether two evaluations at one point differ."""

    @property
    def first_radius(self) -> float:
        """KL of the first step, and the radius to fall back to, in nats."""

    def evaluate(self, point: PyTree, key: Array) -> Estimate:
        """The estimate at a point."""

    def inner(self, a: PyTree, b: PyTree) -> Array:
        """⟨a, b⟩ of two gradients in the metric."""

    def advance(self, point: PyTree, gradient: PyTree, rate: Array, radius: Array) -> Move:
        """The largest step of size ≤ rate with KL ≤ radius."""

    def narrower(self, point: PyTree) -> PyTree:
        """Another start, with less spread."""

    def average(self, point: PyTree) -> PyTree:
        """The average of one point."""

    def include(self, average: PyTree, point: PyTree, share: Array) -> PyTree:
        """(1 − share)·average + share·point."""

    def carry(self, average: PyTree, change: PyTree) -> PyTree:
        """The same average, seen from the point that a move leads to."""

    def mean(self, average: PyTree, point: PyTree) -> PyTree:
        """The average as a point."""


class State(NamedTuple):
    """Where the descent stands. `trial` is evaluated next; `base` is the last accepted point."""

    trial: PyTree
    base: PyTree
    gradient: PyTree
    value: Array
    error: Array
    radius: Array
    kl: Array
    predicted: Array
    bound: Array
    turns: Array
    weight: Array
    cosine: Array
    norm: Array
    average: PyTree
    averaged: Array
    level: Array
    moved: PyTree
    count: Array  # type: ignore[assignment]
    rejected: Array
    skipped: Array
    in_a_row: Array
    refused: Array
    started: Array


def start(geometry: Geometry, point: PyTree, key: Array) -> State:
    """The state before the first evaluation at `point`."""
    shapes = jax.eval_shape(geometry.evaluate, point, key)
    zero = jnp.zeros((), shapes.value.dtype)
    none = jnp.zeros((), jnp.int32)
    no = jnp.asarray(False)
    radius = zero + geometry.first_radius
    average = geometry.average(point)
    return State(
        trial=point, base=point, gradient=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.gradient),
        value=zero - jnp.inf, error=zero, radius=radius, kl=radius, predicted=zero, bound=no, turns=zero, weight=zero,
        cosine=zero, norm=zero, average=average, averaged=zero, level=zero, moved=average, count=none, rejected=none,
        skipped=none, in_a_row=none, refused=none, started=no,
    )  # fmt: skip


def step(geometry: Geometry, state: State, key: Array) -> State:
    """One evaluation at `state.trial`, and the choice of the next trial."""
    value, error, gradient = geometry.evaluate(state.trial, key)
    finite = jnp.isfinite(value) & all_finite(gradient)
    first = finite & ~state.started
    error = jnp.where(first, error, jnp.minimum(error, ERROR_GROWTH * state.error))
    noise = jnp.hypot(error, state.error)
    accept = finite & (first | _acceptable(geometry, state, value, noise, gradient))
    later = accept & ~first

    gradient = _clipped(geometry, gradient, state)
    norm, last_norm = geometry.inner(gradient, gradient), geometry.inner(state.gradient, state.gradient)
    lengths = jnp.sqrt(norm) * jnp.sqrt(last_norm)
    cosine = geometry.inner(gradient, state.gradient) / jnp.where(lengths > 0, lengths, 1)
    # Where the radius bound, and where gradients were far longer, the past says nothing about the noise here.
    keep = jnp.where(_far(geometry, state.bound, state.radius), 0, MEMORY)
    blend = lambda old, new: jnp.where(later, keep * old + (1 - keep) * new, old)  # noqa: E731
    weight, mean_cosine = blend(state.weight, 1.0), blend(state.cosine, cosine)
    mean_norm = blend(jnp.minimum(state.norm, STALE * jnp.maximum(norm, last_norm) * state.weight), norm)
    turns = state.turns + jnp.where(later & (cosine < 0), 1, 0)
    if not geometry.noisy:  # the gradient is what it is, and so is its length
        weight, mean_cosine = (jnp.where(accept, 1, old) for old in (state.weight, state.cosine))
        mean_norm = jnp.where(accept, norm, state.norm)
        turns = state.turns

    as_predicted = value - state.value + noise > state.predicted / 2
    radius = jnp.where(
        state.bound,
        jnp.where(as_predicted, GROWTH, 1) * state.radius,
        jnp.maximum(geometry.first_radius, state.radius / 2),
    )
    radius = jnp.where(accept, jnp.where(first, state.radius, radius), state.kl / SHRINK)

    base = where(accept, state.trial, state.base)
    gradient = where(accept, gradient, state.gradient)
    rate = 1 / (1 + turns / 4)  # Kesten (1958): slow down when gradients begin to point against each other
    move = geometry.advance(base, gradient, rate, radius)
    bound = move.size < rate

    near = (turns >= 1) & ~_far(geometry, bound, radius) & (weight > 0) & (mean_cosine < NEAR * weight)
    mean = mean_norm / jnp.where(weight > 0, weight, 1)
    anew = accept & (~near | (state.averaged == 0) | (FALLING * mean < state.level))
    averaged = jnp.where(anew, jnp.where(near, 1.0, 0.0), state.averaged + accept).astype(weight.dtype)
    share = jnp.where(anew, 1, 3 / (averaged + 2))  # a mean with weights k(k + 1)
    average = where(accept, geometry.include(state.moved, base, share), state.average)
    # Without an accepted point there is nothing to go back to.
    narrower = geometry.narrower(state.trial)
    started = state.started | first
    return State(
        trial=where(started, move.point, narrower),
        base=where(started, base, narrower),
        gradient=gradient,
        value=jnp.where(accept, value, state.value),
        # A lucky estimate must not stand for ever: each rejection makes the next one harder.
        error=jnp.where(accept, error, 2 * state.error),
        radius=radius,
        kl=move.kl,
        predicted=move.size * (1 - move.size / 2) * geometry.inner(gradient, gradient),
        bound=bound,
        turns=turns,
        weight=jnp.where(finite, weight, 0),
        cosine=jnp.where(finite, mean_cosine, 0),
        norm=jnp.where(finite, mean_norm, 0),
        average=average,
        averaged=averaged,
        level=jnp.where(anew, mean, state.level),
        moved=geometry.carry(average, move.change),
        count=state.count + 1,
        rejected=state.rejected + (finite & ~accept),
        skipped=state.skipped + ~finite,
        in_a_row=jnp.where(finite, 0, state.in_a_row + 1),
        refused=jnp.where(accept, 0, state.refused + finite),
        started=started,
    )


def converged(geometry: Geometry, state: State, tol: Array) -> Array:
    """Whether the gap to the optimum and the noise of the average are both below `tol` nats.

    Near the optimum KL(q‖q*) ≈ ½‖g‖². The noise of two independent estimates of g has no part in their product, nor in
    the sign of their cosine; the mean of cosines is free of the lengths of long ago.
    With weights that grow as k² the noise of a mean of n estimates is 9/5 · ½‖g‖²/n.
    """
    small = (state.weight > 0) & (natural_norm(state) / 2 < tol)
    if not geometry.noisy:
        return small
    return small & (0.9 * state.norm / jnp.maximum(state.averaged, 1) < tol * state.weight)


def lost(state: State) -> Array:
    """Whether to give up: nothing is finite, no step is acceptable, or the radius has grown without end."""
    return (state.in_a_row >= GIVE_UP_AFTER) | (state.refused >= GIVE_UP_AFTER) | ran_away(state)


def ran_away(state: State) -> Array:
    """Whether q moves ever faster and is rewarded for it: there is no maximum."""
    return state.bound & (state.radius > RUNAWAY)


def natural_norm(state: State) -> Array:
    """gᵀF⁻¹g in nats: the running means of ‖g‖² and of the cosine of successive gradients, multiplied."""
    weight = jnp.where(state.weight > 0, state.weight, 1)
    return jnp.where(state.weight > 0, state.cosine / weight * state.norm / weight, jnp.inf)


def mean_iterate(geometry: Geometry, state: State) -> PyTree:
    """The average of the iterates near the optimum; the last accepted point if there were none."""
    return geometry.mean(state.average, state.base) if geometry.noisy else state.base


def _acceptable(geometry: Geometry, state: State, value: Array, noise: Array, gradient: PyTree) -> Array:
    """Whether the value has not fallen, as far as one can know; without noise, whether it has risen."""
    fell = state.value - value
    if geometry.noisy:
        return (fell <= REJECT_AT * noise) | _unexplained(geometry, fell, gradient, state)
    rounding = 8 * jnp.finfo(value.dtype).eps * jnp.abs(value)
    return -fell >= GAIN * state.predicted - rounding


def _unexplained(geometry: Geometry, fell: Array, gradient: PyTree, state: State) -> Array:
    """Whether a short step cannot have made the value fall so far: then the estimate before it was a lucky one.

    A step of length √(2 KL) changes the value by at most the mean of both gradients' lengths times its own, to second
    order. Heavy tails make lucky estimates, and too small standard errors, common.
    """
    lengths = jnp.sqrt(geometry.inner(gradient, gradient)) + jnp.sqrt(geometry.inner(state.gradient, state.gradient))
    short = state.kl <= geometry.first_radius / SHRINK
    return short & (fell > jnp.sqrt(2 * state.kl) * lengths / 2)


def _far(geometry: Geometry, bound: Array, radius: Array) -> Array:
    """Whether the radius shortens steps, and is not just small after a rejection."""
    return bound & (radius >= geometry.first_radius)


def _clipped(geometry: Geometry, gradient: PyTree, state: State) -> PyTree:
    """Shortened to √CLIP times the root mean square of those before: one heavy-tailed draw must not decide."""
    if not geometry.noisy:
        return gradient
    norm = geometry.inner(gradient, gradient)
    mean = state.norm / jnp.where(state.weight > 0, state.weight, 1)
    clip = (state.weight > 0) & (norm > CLIP * mean)
    factor = jnp.where(clip, jnp.sqrt(CLIP * mean / jnp.where(clip, norm, 1)), 1)
    return jax.tree.map(lambda x: x * factor, gradient)
