"""Rules that evaluate the objective: steps, dampings and momenta that are chosen by what the loss does.

They try θ − s for steps s with the sign of the gradient, and read what optax's own line searches read: `value_fn`, and,
where they are at hand, `value` (the loss at θ) and `grad` (its gradient, if the chain has changed the updates). Since
the step that was tried is the one that must be taken, only `optax.scale(-1.0)` may follow.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, all_finite, cast_like, surely, where
from natgrad_jax.damping import Number
from natgrad_jax.operators import Operator
from natgrad_jax.transforms.core import Transformation, factored_once, require_operator_argument, scaled, wrap
from natgrad_jax.transforms.shared import (
    check_count,
    check_part,
    check_positive,
    check_step_size,
    data_for,
    gradient_of,
    merged,
    restarted,
    zero_of,
)

Numbers = Sequence[float] | Array | np.ndarray

IDLE = 10  # steps in a row without progress that make a stall
PROGRESS = 1e-3  # of the decrease that the model promises, below which there is none
ROUNDINGS = 8  # in the difference of two values of the loss


class Progress(NamedTuple):
    """What the last step did to the loss.

    Attributes:
        predicted: its decrease by the quadratic model, gᵀs − ½sᵀGs with the undamped G; 0 where that is not finite.
        actual: its decrease; 0 for a step not taken.
        idle: steps in a row that brought less than a thousandth of what the model promised.
        stalled: ten such steps.
    """

    predicted: Array
    actual: Array
    idle: Array
    stalled: Array

    @classmethod
    def none(cls, params: PyTree) -> "Progress":
        """Before the first step."""
        zero = zero_of(params)
        return cls(zero, zero, jnp.zeros((), jnp.int32), jnp.asarray(False))

    def after(self, predicted: Array, actual: Array, promised: Array, noise: Array) -> "Progress":
        """With one step more; `promised` is the decrease that a full step would bring."""
        # A direction that leads uphill promises nothing, and is no progress either.
        idle = (jnp.abs(promised) > noise) & ~(actual > PROGRESS * jnp.abs(promised))
        idle = jnp.where(idle, self.idle + 1, 0)
        known = lambda x: jnp.where(jnp.isfinite(x), x, 0).astype(self.actual.dtype)  # noqa: E731
        return Progress(known(predicted), known(actual), idle, idle >= IDLE)


class Objective(NamedTuple):
    """The loss around the parameters.

    Attributes:
        value: L(θ).
        after: s ↦ L(θ − s).
    """

    value: Array
    after: Callable[[PyTree], Array]

    @classmethod
    def of(cls, name: str, params: PyTree | None, extra_args: dict[str, Any]) -> "Objective":
        """From the extra arguments of an update."""
        value_fn = extra_args.get("value_fn")
        if not callable(value_fn):
            raise TypeError(
                f"value_fn: {name} compares values of the loss; call update(grads, state, params, value_fn=loss), with "
                "loss(params, **data) on the same data as the gradient"
            )
        if params is None:
            raise ValueError(f"params: {name} evaluates the loss near them; call update(grads, state, params)")
        full_params = extra_args.get("full_params")
        data = data_for(value_fn, "value_fn", extra_args)

        def loss(params: PyTree) -> Array:
            return _scalar(value_fn(merged(params, full_params), **data), "value_fn")

        value = extra_args.get("value")
        value = loss(params) if value is None else _scalar(value, "value")
        # What optax.apply_updates will make of −s.
        return cls(value, lambda step: loss(cast_like(jax.tree.map(jnp.subtract, params, step), params)))

    def noise(self, operator: Operator, params: PyTree) -> Array:
        """A decrease that is all rounding: of L, and of the residuals r in it, ‖δr‖ ≈ eps ‖θ‖_G where L is ½‖r‖²."""
        size, eps = jnp.abs(self.value), float(jnp.finfo(self.value.dtype).eps)
        coarsest = max((float(jnp.finfo(kind).eps) for kind in Space.of(params).dtypes), default=eps)
        inside = jnp.sqrt(2 * size) * operator.norm(params).astype(size.dtype)
        return ROUNDINGS * (eps * size + max(eps, coarsest) * inside)


def _scalar(value: Any, name: str) -> Array:
    """The value as an array; a `ValueError` unless it is one real number."""
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name}: expected a real scalar, got shape {value.shape}, dtype {value.dtype}")
    return value


def predicted_decrease(operator: Operator, g: PyTree, step: PyTree) -> Array:
    """gᵀs − ½sᵀGs."""
    g, step = _tree.raised(g), _tree.raised(step)
    return _tree.vdot(g, step) - 0.5 * jnp.square(operator.norm(step))


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`.

    Attributes:
        damping: λ of the next step.
        growth: the factor by which the next rejection multiplies it.
        rejected: steps not taken, but for those whose effect is all rounding.
        ratio: the gain ratio of the last step, actual over predicted decrease; 1 where both are rounding, 0 for a step
            that is not finite.
        progress: `Progress`.
        inner: state of the inner transformation.
    """

    damping: Array
    growth: Array
    rejected: Array
    ratio: Array
    progress: Progress
    inner: Any


def levenberg_marquardt(
    inner: Transformation, damping: Number = 1e-3, *, learning_rate: Number = 1.0, accept: float = 1e-3
) -> Transformation:
    """Levenberg–Marquardt: λ follows the gain ratio, and a step that does not lower the loss is not taken.

        ratio = [L(θ) − L(θ − s)] / [gᵀs − ½sᵀGs],    s = learning_rate · (G + λD)⁻¹g

    The model is that of the undamped G: on a quadratic with Hessian G the ratio is 1 whatever λ. A step is taken if the
    ratio exceeds `accept`; then λ ← λ·max(⅓, 1 − (2·ratio − 1)³), else λ grows by 2, 4, 8, … until one is. Where the
    predicted decrease is below the rounding of L, a step is taken if L does not rise, and λ stays, or returns to where
    it began.

    Args:
        inner: `precondition(solver, damping)` or a wrapper around it; the rule of its damping says what D is, its λ is
            not used.
        damping: λ of the first step, > 0. Dimensionless for relative damping, which is what D is for damping=None.
        learning_rate: > 0.
        accept: the least gain ratio, between 0 and 1.

    `update` needs `value_fn`, and takes `value` and `grad` (see the module). One value of the loss, or two without
    `value`, and two products with G are what it costs beside the solve. A rejected step brings momenta inside to rest.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import natgrad_jax as ng
        >>> loss = lambda x: 50 * (x[1] - x[0] ** 2) ** 2 + 0.5 * (1 - x[0]) ** 2
        >>> residuals = lambda x: jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> rule = ng.transforms.levenberg_marquardt(ng.transforms.precondition())
        >>> tx = optax.chain(ng.transforms.with_metric(ng.metrics.pullback(residuals), rule), optax.scale(-1.0))
        >>> x = jnp.array([-1.2, 1.0])
        >>> state = tx.init(x)
        >>> for _ in range(40):
        ...     step, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        ...     x = optax.apply_updates(x, step)
        >>> x.round(3).tolist()
        [1.0, 1.0]

    Reference: Madsen, Nielsen, Tingleff, "Methods for non-linear least squares problems" (2004), algorithm 3.16.
    """
    name = "levenberg_marquardt"
    require_operator_argument(inner, name)
    check_positive(damping, "damping", "λ")
    check_step_size(learning_rate)
    check_part(accept, "accept")

    def init_fn(params: PyTree) -> LevenbergMarquardtState:
        one, zero = zero_of(params) + 1, jnp.zeros((), jnp.int32)
        start = jnp.asarray(damping, one.dtype)
        return LevenbergMarquardtState(start, 2 * one, zero, 0 * one, Progress.none(params), inner.init(params))

    def update_fn(
        updates: PyTree, state: LevenbergMarquardtState, params: PyTree | None = None, *, operator: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, LevenbergMarquardtState]:  # fmt: skip
        refuse_damping(name, extra_args)
        objective = Objective.of(name, params, extra_args)
        given = extra_args | {"operator": operator, "damping": state.damping}
        direction, inner_state = inner.update(updates, state.inner, params, **given)
        step = scaled(direction, learning_rate)
        g = gradient_of(updates, extra_args)
        trial = objective.after(step)
        predicted = predicted_decrease(operator, g, step)
        actual = objective.value - trial
        noise = objective.noise(operator, params)
        moved = _tree.largest(step) > 0
        # A solve that failed has moved nothing, which is no rest: it needs more damping.
        settled = moved & (predicted <= noise) & (jnp.abs(actual) <= noise)
        known = jnp.isfinite(trial) & jnp.isfinite(predicted) & (predicted > 0)
        ratio = jnp.where(known, actual / jnp.where(known, predicted, 1), 0)
        # Two numbers that are rounding have no ratio.
        ratio = jnp.where(settled, 1, jnp.where(jnp.isfinite(ratio), ratio, 0))
        taken = moved & jnp.where(settled, trial <= objective.value, known & (ratio > accept))
        # Neither a point of rest nor a bad batch says anything about the model.
        silent = (_tree.largest(updates) == 0) | ~all_finite(updates) | ~jnp.isfinite(objective.value)
        strength, growth = _next_damping(state, ratio, damping, taken, settled)
        gained, promised = jnp.where(taken, actual, 0), 0.5 * _tree.vdot(g, step)
        progress = state.progress.after(predicted, gained, promised, noise)
        return where(taken, step, jax.tree.map(jnp.zeros_like, step)), LevenbergMarquardtState(
            damping=jnp.where(silent, state.damping, strength),
            growth=jnp.where(silent, state.growth, growth),
            rejected=state.rejected + (~taken & ~settled & ~silent).astype(jnp.int32),
            ratio=ratio.astype(state.ratio.dtype),
            progress=progress,
            # What the rejected step left in a momentum, or a cache, belongs to a point that was never reached.
            inner=where(taken | ~moved, inner_state, restarted(state.inner)),
        )

    return wrap(inner, init_fn, update_fn)


def _next_damping(
    state: LevenbergMarquardtState, ratio: Array, first: Number, taken: Array, settled: Array
) -> tuple[Array, Array]:
    """λ and the factor of its next growth: by the gain ratio, or towards the first λ if there is nothing to measure."""
    old = state.damping
    shrunk = old * jnp.maximum(1 / 3, 1 - (2 * ratio.astype(old.dtype) - 1) ** 3)
    grown = old * state.growth
    # Neither nothing nor infinity would come back soon.
    least = jnp.asarray(first, old.dtype) * jnp.finfo(old.dtype).eps
    shrunk, grown = jnp.maximum(shrunk, jnp.minimum(least, old)), jnp.where(jnp.isfinite(grown), grown, old)
    # No further down: without damping null directions would be walked along.
    rest = jnp.where(old > first, jnp.maximum(old / 3, jnp.asarray(first, old.dtype)), old)
    growth = jnp.where(taken | settled, 2, 2 * state.growth)
    return jnp.where(settled, rest, jnp.where(taken, shrunk, grown)), growth


def refuse_damping(name: str, extra_args: dict[str, Any]) -> None:
    """A `TypeError` if λ is set from outside."""
    if extra_args.get("damping") is not None:
        raise TypeError(
            f"damping: {name} chooses λ by itself; leave damping= out of update, and do not put one rule that sets λ "
            "inside another"
        )


class DampingGridState(NamedTuple):
    """State of `damping_grid`.

    Attributes:
        damping: λ of the last step; that of the best of them where none was taken.
        progress: `Progress`.
        inner: state of the inner transformation.
    """

    damping: Array
    progress: Progress
    inner: Any


class StepSearchState(NamedTuple):
    """State of `grid_search` and of `backtracking`.

    Attributes:
        step_size: the factor of the last direction; 0 for a step not taken.
        progress: `Progress`.
        inner: state of the inner transformation.
    """

    step_size: Array
    progress: Progress
    inner: Any


def damping_grid(
    inner: Transformation,
    dampings: Numbers | None = None,
    *,
    learning_rate: Number = 1.0,
    chunk_size: int | None = None,
) -> Transformation:
    """The best by the loss itself of the steps for several λ; none, if none lowers it.

        λ* = argmin_λ L(θ − learning_rate · (G + λD)⁻¹g)

    It replaces a line search and a damping schedule at once: a long step along what the data know, a short one along
    what they do not. `solvers.eigh` and `qr` answer all λ from one factorisation; `cholesky` and `row_space` build
    their matrix once and factorise it for each.

    Args:
        inner: `precondition(solver, damping)` or a wrapper around it; the rule of its damping says what D is, its λ is
            not used.
        dampings: the λ ≥ 0, dimensionless for relative damping; None for every half decade from 10⁴ down to
            the precision of the parameters.
        learning_rate: > 0.
        chunk_size: values of the loss at a time; None for all at once. The steps are kept until the best is known, one
            for each λ.

    `update` needs `value_fn`, and takes `value` and `grad` (see the module).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> loss = lambda x: jnp.sum(jnp.log(jnp.cosh(x)))  # where a step of Newton from 2 is 13.6 long
        >>> tx = ng.transforms.damping_grid(ng.transforms.precondition(), [0.0, 1.0, 10.0])
        >>> x = jnp.array([2.0])
        >>> G = ng.operators.Diagonal(1 - jnp.tanh(x) ** 2)
        >>> d, state = tx.update(jax.grad(loss)(x), tx.init(x), x, operator=G, value_fn=loss)
        >>> float(state.damping), round(float(d[0]), 3)
        (10.0, 1.24)
    """
    name = "damping_grid"
    require_operator_argument(inner, name)
    _check_chunk(chunk_size)
    check_step_size(learning_rate)
    if dampings is not None:
        _check_numbers(dampings, "dampings", "λ ≥ 0", lambda x: np.all(x >= 0))

    def grid(dtype: Any) -> Array:
        if dampings is not None:
            return jnp.asarray(dampings, dtype)
        lowest = np.floor(2 * np.log10(float(jnp.finfo(dtype).eps))) / 2
        return jnp.asarray(10 ** np.arange(4, lowest, -0.5), dtype)

    def init_fn(params: PyTree) -> DampingGridState:
        return DampingGridState(zero_of(params), Progress.none(params), inner.init(params))

    def update_fn(
        updates: PyTree, state: DampingGridState, params: PyTree | None = None, *, operator: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, DampingGridState]:  # fmt: skip
        refuse_damping(name, extra_args)
        objective = Objective.of(name, params, extra_args)

        given = factored_once(inner, operator, params, extra_args)

        def tried(strength: Array) -> tuple[Array, PyTree, Any]:
            direction, inner_state = inner.update(updates, state.inner, params, **given | {"damping": strength})
            step = scaled(direction, learning_rate)
            return objective.after(step), step, inner_state

        strengths = grid(state.damping.dtype)
        values, steps, states = jax.lax.map(tried, strengths, batch_size=chunk_size or strengths.size)
        best, lower = _best(values, objective.value)
        step, reached = jax.tree.map(lambda x: x[best], (steps, states))
        g = gradient_of(updates, extra_args)
        predicted = predicted_decrease(operator, g, step)
        actual = jnp.where(lower, objective.value - values[best], 0)
        noise = objective.noise(operator, params)
        progress = state.progress.after(predicted, actual, 0.5 * _tree.vdot(g, step), noise)
        moved = _tree.largest(steps) > 0
        return where(lower, step, jax.tree.map(jnp.zeros_like, step)), DampingGridState(
            strengths[best], progress, where(lower | ~moved, reached, restarted(state.inner))
        )

    return wrap(inner, init_fn, update_fn)


def _check_numbers(numbers: Any, name: str, what: str, condition: Callable[[Any], Any]) -> None:
    known = isinstance(numbers, Sequence | np.ndarray | Array) and not isinstance(numbers, str)
    if not known or np.ndim(numbers) != 1 or not np.size(numbers) or surely(numbers, lambda x: not condition(x)):
        raise ValueError(f"{name}: expected a sequence of numbers {what}, got {numbers!r}")


def _check_chunk(chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_count(chunk_size, "chunk_size", "steps at a time")


def _best(values: Array, now: Array) -> tuple[Array, Array]:
    """The place of the lowest value, and whether that is lower than `now`."""
    finite = jnp.where(jnp.isfinite(values), values, jnp.inf)
    best = jnp.argmin(finite)
    return best, finite[best] < now


def grid_search(
    inner: Transformation, steps: Numbers | None = None, *, chunk_size: int | None = None
) -> Transformation:
    """The best by the loss itself of several lengths of the inner direction, 0 among them.

    Args:
        inner: takes `operator`.
        steps: the factors tried; None for 1, ½, ¼, …, 2⁻³⁰.
        chunk_size: of them at a time; None for all at once.

    `update` needs `value_fn`, and takes `value` and `grad` (see the module). A value that is not finite is never the
    best.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> loss = lambda x: jnp.sum(jnp.log(jnp.cosh(x)))
        >>> tx = ng.transforms.grid_search(ng.transforms.precondition())
        >>> x = jnp.array([2.0])
        >>> G = ng.operators.Diagonal(1 - jnp.tanh(x) ** 2)
        >>> d, state = tx.update(jax.grad(loss)(x), tx.init(x), x, operator=G, value_fn=loss)
        >>> float(state.step_size), round(float(d[0]), 3)
        (0.125, 1.706)
    """
    name = "grid_search"
    require_operator_argument(inner, name)
    _check_chunk(chunk_size)
    factors: Any = np.exp2(-np.arange(31.0)) if steps is None else steps
    _check_numbers(factors, "steps", "> 0 (0 is always among them)", lambda x: np.all(x > 0))

    def search(objective: Objective, direction: PyTree, slope: Array) -> tuple[Array, Array]:
        del slope
        sizes = jnp.asarray(factors, objective.value.dtype)
        after = lambda size: objective.after(scaled(direction, size))  # noqa: E731
        values = jax.lax.map(after, sizes, batch_size=chunk_size or sizes.size)
        best, lower = _best(values, objective.value)
        return jnp.where(lower, sizes[best], 0), jnp.where(lower, values[best], objective.value)

    return _search_of_length(name, inner, search)


def backtracking(
    inner: Transformation, learning_rate: Number = 1.0, *, shrink: float = 0.5, decrease: float = 1e-4,
    max_steps: int = 30,
) -> Transformation:  # fmt: skip
    """The first of the lengths 1, ½, ¼, … of the inner direction at which the loss falls enough (Armijo).

        L(θ − ηd) ≤ L(θ) − decrease · η gᵀd,    η = learning_rate · shrinkᵏ

    Args:
        inner: takes `operator`.
        learning_rate: the first length, > 0.
        shrink: between 0 and 1.
        decrease: the part of the slope that the loss has to fall by, between 0 and 1.
        max_steps: lengths tried; after them no step is taken.

    `update` needs `value_fn`, and takes `value` and `grad` (see the module). Under `vmap` all problems wait for the one
    that takes longest; `grid_search` tries all lengths at once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> loss = lambda x: jnp.sum(jnp.log(jnp.cosh(x)))
        >>> tx = ng.transforms.backtracking(ng.transforms.precondition())
        >>> x = jnp.array([2.0])
        >>> G = ng.operators.Diagonal(1 - jnp.tanh(x) ** 2)
        >>> d, state = tx.update(jax.grad(loss)(x), tx.init(x), x, operator=G, value_fn=loss)
        >>> float(state.step_size)
        0.25

    Reference: Nocedal, Wright, "Numerical optimization" (2006), algorithm 3.1.
    """
    name = "backtracking"
    require_operator_argument(inner, name)
    check_step_size(learning_rate)
    for what, x in (("shrink", shrink), ("decrease", decrease)):
        check_part(x, what, least=False)
    check_count(max_steps, "max_steps", "values of the loss")

    def search(objective: Objective, direction: PyTree, slope: Array) -> tuple[Array, Array]:
        def unfinished(state: tuple[Array, Array, Array]) -> Array:
            k, size, value = state
            enough = value <= objective.value - decrease * size * slope
            return (slope > 0) & (k < max_steps) & ~(enough & jnp.isfinite(value))

        def shorter(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            k, size, _ = state
            return k + 1, shrink * size, objective.after(scaled(direction, shrink * size))

        size = jnp.asarray(learning_rate, objective.value.dtype)
        start = jnp.zeros((), jnp.int32), size, objective.after(scaled(direction, size))
        found = jax.lax.while_loop(unfinished, shorter, start)
        # Uphill no length is short enough.
        failed = ~(slope > 0) | unfinished((jnp.zeros((), jnp.int32), *found[1:]))
        return jnp.where(failed, 0, found[1]), jnp.where(failed, objective.value, found[2])

    return _search_of_length(name, inner, search)


def _search_of_length(name: str, inner: Transformation, search: Callable[..., tuple[Array, Array]]) -> Transformation:
    """search(objective, direction, gᵀd) -> (factor of the direction, loss there)."""

    def init_fn(params: PyTree) -> StepSearchState:
        return StepSearchState(zero_of(params), Progress.none(params), inner.init(params))

    def update_fn(
        updates: PyTree, state: StepSearchState, params: PyTree | None = None, *, operator: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, StepSearchState]:  # fmt: skip
        objective = Objective.of(name, params, extra_args)
        direction, reached = inner.update(updates, state.inner, params, operator=operator, **extra_args)
        g = gradient_of(updates, extra_args)
        slope = _tree.vdot(_tree.raised(g), _tree.raised(direction))
        size, value = search(objective, direction, slope)
        step = where(size > 0, scaled(direction, size), jax.tree.map(jnp.zeros_like, direction))
        predicted = predicted_decrease(operator, g, step)
        noise = objective.noise(operator, params)
        progress = state.progress.after(predicted, objective.value - value, 0.5 * slope, noise)
        taken = (size > 0) | ~(_tree.largest(direction) > 0)
        kept = where(taken, reached, restarted(state.inner))
        return step, StepSearchState(size.astype(state.step_size.dtype), progress, kept)

    return wrap(inner, init_fn, update_fn)
