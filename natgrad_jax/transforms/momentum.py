"""Steps that remember the last one, or look at how the path bends, without a value of the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree, solvers
from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, all_finite, cast_like, concrete, where
from natgrad_jax.damping import Number
from natgrad_jax.operators import Dense, Gram, Operator, RealParts
from natgrad_jax.transforms.core import (
    Transformation,
    check_given,
    factored_once,
    of_metric,
    require_operator_argument,
    scaled,
    wrap,
)
from natgrad_jax.transforms.shared import (
    check_part,
    check_positive,
    check_step_size,
    data_for,
    gradient_of,
    merged,
    not_taken,
    zero_of,
)


class HeavyBallState(NamedTuple):
    """State of `heavy_ball`: the velocity, and the inner state."""

    velocity: PyTree
    inner: Any

    def at_rest(self) -> "HeavyBallState":
        """Without velocity."""
        return self._replace(velocity=jax.tree.map(jnp.zeros_like, self.velocity))


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

    def at_rest(self) -> "SpringState":
        """With φ = 0."""
        return self._replace(count=jnp.zeros_like(self.count), velocity=jax.tree.map(jnp.zeros_like, self.velocity))


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
    check_part(decay, "decay")

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
    check_part(decay, "decay")
    if max_norm is not None:
        check_positive(max_norm, "max_norm", "length")
    # 1 − μ²ᵗ from the logarithm of a Python number: near μ = 1 float32 would have lost most of it.
    smallest = float(np.finfo(np.float32).tiny)
    log_decay = np.log(np.maximum(decay, smallest)) if concrete(decay) else jnp.log(jnp.maximum(decay, smallest))

    def init_fn(params: PyTree) -> SpringState:
        start = jax.tree.map(jnp.zeros_like, params)
        return SpringState(jnp.zeros((), jnp.int32), start, inner.init(params))

    def update_fn(
        updates: PyTree, state: SpringState, params: PyTree | None = None, *, operator: Any = None,
        residual: Array | None = None, **extra_args: Any,
    ) -> tuple[PyTree, SpringState]:  # fmt: skip
        check_given(operator, "spring")
        old = scaled(state.velocity, decay)
        shifted = cast_like(jax.tree.map(jnp.subtract, _tree.raised(updates), operator.mv(_tree.raised(old))), updates)
        given = extra_args | {"operator": operator, "residual": _shifted_residual(operator, residual, old)}
        direction, inner_state = inner.update(shifted, state.inner, params, **given)
        momentum = jax.tree.map(lambda x, d: (x + d).astype(x.dtype), old, direction)
        lost = not_taken(shifted, direction)
        count = state.count + 1
        size = jnp.ones((), zero_of(updates).dtype)
        if bias_correction:
            size = size / jnp.sqrt(-jnp.expm1(2 * count * log_decay).astype(size.dtype))
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
    if isinstance(operator, RealParts):
        return _shifted_residual(operator.parts, residual, _tree.real_parts(old))
    if not isinstance(operator, Gram):
        return None
    residual = operator.residual if residual is None else residual
    return None if residual is None else residual - operator.times(_tree.raised(old)).astype(residual.dtype)


class QuadraticStepState(NamedTuple):
    """State of `quadratic_step`.

    Attributes:
        step: the last one.
        learning_rate: α of the last step.
        momentum: μ of the last step.
        predicted: the decrease of the loss by the quadratic model.
        inner: state of the inner transformation.
    """

    step: PyTree
    learning_rate: Array
    momentum: Array
    predicted: Array
    inner: Any

    def at_rest(self) -> "QuadraticStepState":
        """Without a last step."""
        return self._replace(step=jax.tree.map(jnp.zeros_like, self.step))


def quadratic_step(
    inner: Transformation, metric: Any = None, *, damping: Any = None, learning_rate: Number = 1.0
) -> Transformation:
    """Learning rate and momentum from the quadratic model: the best combination of the direction and of the last step.

        (α, μ) = argmax gᵀs − ½sᵀ(G + λD)s,    s = α d + μ s₋₁

    Two products with G and a 2 × 2 system. Its use is a cheap direction, from a diagonal or Kronecker-factored
    `inner`, whose length only exact products know. From the same G with the same damping it would find α = 1 and μ = 0,
    what d minimises already; from G without damping it takes back along d what the damping has shortened.

    Args:
        inner: takes `operator`.
        metric: metric(params, **data) -> the operator G of the model, such as `gauss_newton(..., matrix_free=True)`;
            None for the one that `inner` solves.
        damping: a number (relative) or a rule of `damping` for the model; None for none.
        learning_rate: multiplies s, > 0.

    No value of the loss is needed, but the last step is taken for granted: only `optax.scale(-1.0)` may follow.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> exact = lambda params: ng.operators.Dense(G)
        >>> tx = ng.transforms.quadratic_step(ng.transforms.precondition(), exact)
        >>> x, state = jnp.array([1.0, 0.0]), tx.init(jnp.zeros(2))
        >>> for _ in range(2):  # conjugate gradients: as many steps as dimensions
        ...     s, state = tx.update(G @ x, state, x, operator=ng.operators.Diagonal(jnp.array([2.0, 3.0])))
        ...     x = x - s
        >>> bool(jnp.all(jnp.abs(x) < 1e-6))
        True

    Reference: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015),
    section 7.
    """
    require_operator_argument(inner, "quadratic_step")
    check_step_size(learning_rate)
    source = None if metric is None else of_metric(metric)
    rule = damping_rules.as_rule(damping)

    def init_fn(params: PyTree) -> QuadraticStepState:
        zero = zero_of(params)
        return QuadraticStepState(jax.tree.map(jnp.zeros_like, params), zero, zero, zero, inner.init(params))

    def update_fn(
        updates: PyTree, state: QuadraticStepState, params: PyTree | None = None, *, operator: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, QuadraticStepState]:  # fmt: skip
        direction, inner_state = inner.update(updates, state.inner, params, operator=operator, **extra_args)
        if not jax.tree.leaves(updates):
            return direction, state._replace(inner=inner_state)
        model = operator if source is None else source.at((), updates, params, extra_args)[0]
        resolved = damping_rules.at(rule, params, extra_args.get("full_params"))
        strength = None if resolved is None else extra_args.get("damping")
        # Each vector by its largest entry: their products would leave the floats long before they do.
        (d, size), (last, last_size), (g, steepness) = map(
            _unit, (direction, state.step, gradient_of(updates, extra_args))
        )
        basis = jax.tree.map(lambda x, y: jnp.stack([x, y]), d, last)
        products = jax.vmap(solvers.damped_product(model, resolved, strength))(basis)
        dots = jax.vmap(_tree.vdot, (0, None))
        slopes = dots(basis, g)
        matrix = jax.vmap(lambda gv: dots(basis, gv))(products)
        # A direction that is zero is a dead coordinate, and two that are parallel share the step.
        best = solvers.solve(Dense((matrix + matrix.T) / 2), slopes, solver=solvers.eigh())
        fine = best.converged & all_finite(basis) & all_finite(slopes)
        weights = jnp.where(fine, best.value * learning_rate, 0)
        made = lambda x, d: (steepness * jnp.tensordot(weights.astype(x.dtype), x, 1)).astype(d.dtype)  # noqa: E731
        step = jax.tree.map(made, basis, direction)
        predicted = steepness * (steepness * (weights @ slopes - 0.5 * weights @ (matrix @ weights)))
        factors = steepness * weights / jnp.stack([size, last_size])
        return step, QuadraticStepState(
            step=where(fine, step, state.step),
            learning_rate=factors[0].astype(state.learning_rate.dtype),
            momentum=factors[1].astype(state.momentum.dtype),
            predicted=jnp.where(fine, predicted, 0).astype(state.predicted.dtype),
            inner=inner_state,
        )

    return wrap(inner, init_fn, update_fn)


def _unit(tree: PyTree) -> tuple[PyTree, Array]:
    """The vector by its largest entry, and that; 1 for a vector of zeros."""
    tree = _tree.raised(tree)
    largest = _tree.largest(tree)
    size = jnp.where(largest > 0, largest, 1)
    return jax.tree.map(lambda x: x / size.astype(_tree.real_dtype(x.dtype)), tree), size


class GeodesicState(NamedTuple):
    """State of `geodesic`.

    Attributes:
        bend: ‖½Γ(s, s)‖_G / ‖s‖_G at the last step, how far the path bends on the way.
        inner: state of the inner transformation.
    """

    bend: Array
    inner: Any


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
        >>> round(float(step[0]), 4)  # along the geodesic: −log(1 − 0.1) = 0.1054
        0.105

    Reference: Transtrum, Sethna, "Improvements to the Levenberg–Marquardt algorithm for nonlinear least-squares
    minimization" (2012), section 4; Song, Song, Ermon, "Accelerating natural gradient with higher-order invariance"
    (2018), section 4.
    """
    if not getattr(getattr(inner, "update", None), "innermost", False):
        raise TypeError(
            f"inner: geodesic expected precondition(solver, damping), got {inner!r}. It solves for a second right-hand "
            "side, which a wrapper would take for a gradient; put wrappers around geodesic, and learning_rate= in here."
        )
    check_step_size(learning_rate)
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
        check_given(operator, "geodesic")
        given = factored_once(inner, operator, params, extra_args)
        direction, inner_state = inner.update(updates, state.inner, params, **given)
        step = scaled(direction, learning_rate)
        full_params, data = extra_args.get("full_params"), data_for(f, "f", extra_args)
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
    residual = getattr(operator.parts if isinstance(operator, RealParts) else operator, "residual", None)
    return None if residual is None else jnp.zeros_like(residual)
