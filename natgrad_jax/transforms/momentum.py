"""Steps that remember the last one, or look at how the path bends."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, cast_like, where
from natgrad_jax.damping import Number
from natgrad_jax.operators import Operator
from natgrad_jax.transforms.core import Transformation, factor_of, require_operator_argument, scaled, wrap
from natgrad_jax.transforms.shared import check_decay, check_positive, data_for, merged, not_taken, zero_of


class HeavyBallState(NamedTuple):
    """State of `heavy_ball`: the velocity, and the inner state."""

    velocity: PyTree
    inner: Any


class SpringState(NamedTuple):
    """State of `spring`.

    Attributes:
        count: directions that went into φ.
        velocity: φ, before the bias correction and the bound.
        inner: state of the inner transformation.
    """

    count: Array  # type: ignore[assignment]
    velocity: PyTree
    inner: Any


class GeodesicState(NamedTuple):
    """State of `geodesic`.

    Attributes:
        bend: ‖½Γ(s, s)‖_G / ‖s‖_G at the last step, how far the path bends on the way.
        inner: state of the inner transformation.
    """

    bend: Array
    inner: Any


def heavy_ball(inner: Transformation, decay: float = 0.9, *, nesterov: bool = False) -> Transformation:
    """Momentum of natural directions, v ← decay·v + d: inside of a bound, where a chained one would be outside.

    v is a vector, as d is: it follows a change of units. Equal directions add up to 1/(1 − decay) times their length.

    Args:
        inner: takes `operator`.
        decay: between 0 and 1.
        nesterov: return d + decay·v, one step ahead.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.heavy_ball(ng.transforms.precondition(), 0.5)
        >>> g, G = jnp.array([4.0]), ng.operators.Diagonal(jnp.array([4.0]))
        >>> _, state = tx.update(g, tx.init(g), operator=G)
        >>> tx.update(g, state, operator=G)[0].tolist()
        [1.5]

    Reference: Polyak, "Some methods of speeding up the convergence of iteration methods" (1964).
    """
    require_operator_argument(inner, "heavy_ball")
    check_decay(decay)

    def init_fn(params: PyTree) -> HeavyBallState:
        return HeavyBallState(jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update_fn(
        updates: PyTree, state: HeavyBallState, params: PyTree | None = None, *, operator: Any = None, **extra_args: Any
    ) -> tuple[PyTree, HeavyBallState]:
        direction, inner_state = inner.update(updates, state.inner, params, operator=operator, **extra_args)
        fast = lambda v: jax.tree.map(lambda x, d: (decay * x + d).astype(x.dtype), v, direction)  # noqa: E731
        velocity = fast(state.velocity)
        step = cast_like(fast(velocity) if nesterov else velocity, direction)
        lost = not_taken(updates, direction)
        return (
            where(lost, jax.tree.map(jnp.zeros_like, step), step),
            HeavyBallState(where(lost, state.velocity, velocity), inner_state),
        )

    return wrap(inner, init_fn, update_fn)


def spring(
    inner: Transformation, decay: float = 0.99, *, bias_correction: bool = False, max_norm: Number | None = None
) -> Transformation:
    """SPRING: a momentum that the metric corrects, so that only what this batch does not see of it is kept.

        φ ← μφ + (G + λD)⁻¹(g − μGφ)

    The solution of min_φ ‖Aφ − e‖² + λ‖φ − μφ₋₁‖²_D, where g = Aᵀe: what G sees of the old φ is replaced, the rest
    decays. Its use is with few samples a step, for which G has less than full rank; with the same G and g again and
    again φ ends at (G + λD)⁻¹g, not at a multiple of it as an ordinary momentum would.

    Args:
        inner: `precondition(solver, damping)`, any solver, with λ > 0; it is called with the corrected gradient, and,
            for rows with a residual, with e − μAφ.
        decay: μ, between 0 and 1.
        bias_correction: return φ/√(1 − μ²ᵗ), which lengthens the first steps; a heuristic.
        max_norm: bound on ‖φ‖₂, as in the paper; it mixes units, `trust_region` around this does not.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.spring(ng.transforms.precondition(damping=ng.damping.absolute(1.0)), 0.5)
        >>> g, state = jnp.array([2.0, 2.0]), tx.init(jnp.zeros(2))
        >>> for entries in ([1.0, 0.0], [0.0, 1.0]):
        ...     G = ng.operators.Diagonal(jnp.array(entries))
        ...     step, state = tx.update(g * jnp.array(entries), state, operator=G)
        >>> [round(float(x), 4) for x in step]  # half of what the second batch does not see, and its own
        [0.5, 1.0]

    Cost: one product with G beside the solve.

    Reference: Goldshlager, Abrahamsen, Lin, "A Kaczmarz-inspired approach to accelerate the optimization of neural
    network wavefunctions" (2024), equation 30.
    """
    require_operator_argument(inner, "spring")
    check_decay(decay)
    if max_norm is not None:
        check_positive(max_norm, "max_norm", "length")

    def init_fn(params: PyTree) -> SpringState:
        start = jax.tree.map(jnp.zeros_like, params)
        return SpringState(jnp.zeros((), jnp.int32), start, inner.init(params))

    def update_fn(
        updates: PyTree, state: SpringState, params: PyTree | None = None, *, operator: Any = None,
        residual: Array | None = None, **extra_args: Any,
    ) -> tuple[PyTree, SpringState]:  # fmt: skip
        old = scaled(state.velocity, decay)
        shifted = cast_like(jax.tree.map(jnp.subtract, _tree.raised(updates), operator.mv(_tree.raised(old))), updates)
        given = extra_args | {"operator": operator, "residual": _shifted_residual(operator, residual, old)}
        direction, inner_state = inner.update(shifted, state.inner, params, **given)
        momentum = jax.tree.map(lambda x, d: (x + d).astype(x.dtype), old, direction)
        lost = not_taken(shifted, direction)
        count = state.count + 1
        size = jnp.ones((), zero_of(updates).dtype)
        if bias_correction:
            size = size / jnp.sqrt(1 - jnp.asarray(decay, size.dtype) ** (2 * count))
        if max_norm is not None:
            length = _tree.norm(_tree.ravel(_tree.raised(momentum)))
            size = jnp.minimum(size, jnp.where(length > 0, max_norm / jnp.where(length > 0, length, 1), size))
        step = cast_like(scaled(momentum, size), direction)
        return where(lost, jax.tree.map(jnp.zeros_like, step), step), SpringState(
            jnp.where(lost, state.count, count), where(lost, state.velocity, momentum), inner_state
        )

    return wrap(inner, init_fn, update_fn)


def _shifted_residual(operator: Operator, residual: Array | None, old: PyTree) -> Array | None:
    """e − Aφ, the residual of g − Gφ; None where there is none, or no rows."""
    residual = getattr(operator, "residual", None) if residual is None else residual
    if residual is None or not hasattr(operator, "times"):
        return None
    return residual - operator.times(_tree.raised(old)).astype(residual.dtype)


def geodesic(
    inner: Transformation,
    f: Callable[..., PyTree],
    *,
    learning_rate: Number = 1.0,
    max_bend: float = 0.75,
) -> Transformation:
    """The step bent along the geodesic: s + ½Γ(s, s), exact to second order in s under a change of coordinates.

        s = learning_rate · d,    Γ(s, s) = (JᵀJ + λD)⁻¹ Jᵀ f″[s, s],    J = ∂f/∂θ

    for a metric that is flat in the space of f, G = c·JᵀJ: least squares with f the residuals, a Fisher information
    with f = 2√q, `pullback` without an inner metric. Where the path bends by more than `max_bend` of its length, the
    quadratic correction means nothing and is left out.

    Args:
        inner: `precondition(solver, damping)`; it is called twice, and factorises once.
        f: f(params) -> array or pytree; of further arguments those are passed that `update` is given by name, such as
            f(params, batch).
        learning_rate: > 0; in here, since the correction is of second order in it.
        max_bend: the largest ‖½Γ‖_G/‖s‖_G.

    Cost: a second right-hand side, two directional derivatives of f and one transposed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> f = lambda x: jnp.exp(x)  # flat in eˣ
        >>> rule = ng.transforms.geodesic(ng.transforms.precondition(), f, learning_rate=0.1)
        >>> tx = ng.transforms.with_metric(ng.metrics.pullback(f), rule)
        >>> x = jnp.array([0.0])
        >>> step, state = tx.update(jax.grad(lambda x: jnp.sum(f(x)))(x), tx.init(x), x)
        >>> round(float(step[0]), 6)  # −log(1 − 0.1) = 0.105361
        0.105

    Reference: Transtrum, Sethna, "Improvements to the Levenberg–Marquardt algorithm for nonlinear least-squares
    minimization" (2012), section 4; Song, Song, Ermon, "Accelerating natural gradient with higher-order invariance"
    (2018), section 4.
    """
    require_operator_argument(inner, "geodesic")
    check_positive(learning_rate, "learning_rate", "step size")
    check_positive(max_bend, "max_bend", "ratio of lengths")
    if not callable(f) or isinstance(f, type):
        raise TypeError(f"f: expected a function f(params) with G = c·JᵀJ, got {f!r}")

    def init_fn(params: PyTree) -> GeodesicState:
        return GeodesicState(zero_of(params), inner.init(params))

    def update_fn(
        updates: PyTree, state: GeodesicState, params: PyTree | None = None, *, operator: Any = None, **extra_args: Any
    ) -> tuple[PyTree, GeodesicState]:
        if params is None:
            raise ValueError("params: geodesic differentiates f there; call update(grads, state, params)")
        factor = factor_of(inner)
        given = extra_args | {"operator": operator}
        if factor is not None and given.get("factored") is None:
            given["factored"] = factor(operator, params, extra_args.get("full_params"))
        direction, inner_state = inner.update(updates, state.inner, params, **given)
        step = scaled(direction, learning_rate)
        full_params, data = extra_args.get("full_params"), data_for(f, extra_args)
        theta = _tree.raised(params)
        along = lambda theta: f(merged(theta, full_params), **data)  # noqa: E731
        velocity = cast_like(step, theta)
        slope = lambda theta: jax.jvp(along, (theta,), (velocity,))[1]  # noqa: E731
        change, bent = jax.jvp(slope, (theta,), (velocity,))
        # c = sᵀGs/‖Js‖², whatever the normalisation of the metric.
        length, norm = _tree.norm(_tree.ravel(change)), operator.norm(step)
        ratio = jnp.square(norm / jnp.where(length > 0, length, 1)).astype(length.dtype)
        _, pull = jax.vjp(along, theta)
        covector = pull(jax.tree.map(lambda x: jnp.conj((ratio * x).astype(x.dtype)), bent))[0]
        covector = jax.tree.map(jnp.conj, covector)
        # A gradient of another function: no residual belongs to it, nor does its solve belong in the state.
        given["residual"] = _no_residual(operator)
        correction, _ = inner.update(cast_like(covector, updates), state.inner, params, **given)
        bend = 0.5 * operator.norm(correction) / jnp.where(norm > 0, norm, 1)
        kept = bend <= max_bend
        bent_step = jax.tree.map(lambda s, c: s + jnp.where(kept, 0.5 * c, 0).astype(s.dtype), step, correction)
        return bent_step, GeodesicState(bend.astype(state.bend.dtype), inner_state)

    return wrap(inner, init_fn, update_fn)


def _no_residual(operator: Operator) -> Array | None:
    """A residual that explains no gradient, in place of the operator's own."""
    residual = getattr(operator, "residual", None)
    return None if residual is None else jnp.zeros_like(residual)
