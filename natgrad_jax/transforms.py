"""Transformations: G⁻¹g as optax gradient transformations. The operator flows inward, the direction flows outward.

    with_metric(metric, inner)      evaluates the metric, hands the operator to `inner`
    trust_region(inner, max_kl)     shortens what comes out
    precondition(solver, damping)   innermost: solves

Whatever stands inside `with_metric` takes `operator=` in its `update`; other optax pieces are chained afterwards.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

from natgrad_jax import damping as damping_rules
from natgrad_jax import solvers
from natgrad_jax._tree import PyTree, Space, all_finite, cast_like, concrete, unmasked, where
from natgrad_jax.damping import Number, Rule
from natgrad_jax.metrics import Metric

Transformation: TypeAlias = optax.GradientTransformationExtraArgs
RESERVED = {"value", "grad", "value_fn", "damping", "operator", "residual", "factored", "full_params"}


class PreconditionState(NamedTuple):
    """State of `precondition`.

    Attributes:
        count: steps taken.
        skipped: steps not taken, because the gradient, the operator or the solution was not finite.
        converged: whether the last solve was.
        dead: coordinates without curvature at the last solve; their step is 0.
        rank: numerical rank at the last solve, −1 where the solver does not know it.
        direction: the last one that was taken, where the solver starts from it (`cg(warm_start=True)`); else None.
    """

    count: Array  # type: ignore[assignment]
    skipped: Array
    converged: Array
    dead: Array
    rank: Array
    direction: PyTree = None


class TrustRegionState(NamedTuple):
    """State of `trust_region`.

    Attributes:
        norm: √(dᵀGd) of the last direction, before it was shortened.
        scale: the factor in (0, 1] by which it was shortened.
        inner: state of the inner transformation.
    """

    norm: Array
    scale: Array
    inner: Any


class ScaleStepState(NamedTuple):
    """State of `scale_step`: steps seen, for schedules, and the inner state."""

    count: Array  # type: ignore[assignment]
    inner: Any


def precondition(solver: Any = None, damping: "Rule | Number | None" = None) -> Transformation:
    """d = (G + λD)⁻¹g with the sign of the gradient: the innermost piece.

    `update` takes `operator` (G), `damping` (a number, the λ of this call in place of the rule's own) and `residual`
    (the sample-space e with g = Aᴴe, for a solver on rows; else the operator's own). A step that is not finite is not
    taken: zero direction, counted in `skipped`. One that has not converged is taken, and flagged in `converged`.

    Args:
        solver: one of `solvers`; None picks by structure.
        damping: None (as little as the arithmetic allows), a number (relative) or a rule of `damping`.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.precondition()
        >>> g = jnp.array([4.0, 1.0])
        >>> d, state = tx.update(g, tx.init(g), operator=ng.operators.Diagonal(jnp.array([4.0, 1.0])))
        >>> d.tolist()
        [1.0, 1.0]
    """
    solver = solvers.check_solver(solvers.auto() if solver is None else solver)
    rule = damping_rules.as_rule(damping)
    warm = getattr(solver, "warm_start", False)

    def init_fn(params: PyTree) -> PreconditionState:
        zero = jnp.zeros((), jnp.int32)
        start = jax.tree.map(jnp.zeros_like, params) if warm else None
        return PreconditionState(zero, zero, jnp.asarray(True), zero, zero - 1, start)

    def update_fn(
        updates: PyTree,
        state: PreconditionState,
        params: PyTree | None = None,
        *,
        operator: Any = None,
        damping: Number | None = None,
        residual: Array | None = None,
        full_params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PreconditionState]:
        del extra_args
        if operator is None:
            raise TypeError("operator: precondition needs update(..., operator=G); wrap it in with_metric(metric, ...)")
        operator.space.check(updates, "grads")
        resolved = damping_rules.at(rule, params, full_params)
        given = {"residual": residual, "guess": state.direction}
        options = {name: x for name, x in given.items() if x is not None}
        factored = solvers.factor(solver, operator, resolved)
        solution = solvers.implicit(solver, factored, operator, resolved, updates, damping, **options)
        # A truncated solve is applied and flagged; one that is not finite is not taken.
        fine = all_finite(solution.value) & all_finite(updates)
        value = where(fine, solution.value, jax.tree.map(jnp.zeros_like, solution.value))
        rank = jnp.asarray(-1, jnp.int32) if solution.stats.rank is None else solution.stats.rank
        return value, PreconditionState(
            count=state.count + fine.astype(jnp.int32),
            skipped=state.skipped + (~fine).astype(jnp.int32),
            converged=solution.converged,
            dead=solution.stats.dead,
            rank=rank,
            direction=where(fine, cast_like(value, state.direction), state.direction) if warm else None,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_metric(metric: Metric, inner: Transformation) -> Transformation:
    """Evaluates `metric(params, **data)` once per update and hands the operator to `inner`.

    The metric's keyword-only parameters name the data that `update` must be given; exactly those are forwarded.

    Inside `optax.masked` or `partition`, where a part of the parameters is hidden, `update` must also be given
    `full_params=params`: the metric is evaluated at all of them, and the block of G that belongs to the visible ones is
    solved.

    Args:
        metric: metric(params, **data) -> operator.
        inner: `precondition` or a wrapper around it.

    Raises:
        TypeError: a metric with **kwargs, an inner transformation that does not take an operator, missing data.
        ValueError: `update` without params, or gradients of another structure.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.with_metric(ng.metrics.scales(0.5), ng.transforms.precondition())
        >>> d, state = tx.update(jnp.array([4.0]), tx.init(jnp.array([1.0])), jnp.array([1.0]))
        >>> d.tolist()
        [1.0]
    """
    name = getattr(metric, "__name__", type(metric).__name__)
    required, optional = _data_names(metric, name)
    _require_operator_argument(inner, "with_metric")

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        full_params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params: a metric is evaluated at the parameters; call update(grads, state, params)")
        missing = [data for data in required if data not in extra_args]
        if missing:
            raise TypeError(
                f"{missing[0]}: the metric {name} needs it; call update(grads, state, params, {missing[0]}=...)"
            )
        Space.of(params).check(updates, "grads")
        mask = unmasked(params)
        whole = all(jax.tree.leaves(mask))
        if not whole and full_params is None:
            raise TypeError(
                f"full_params: a part of the parameters is hidden (optax.masked, partition), and the metric {name} is "
                "evaluated at all of them; call update(grads, state, params, full_params=params)"
            )
        everything = params if whole else full_params
        data = {key: extra_args[key] for key in (*required, *optional) if key in extra_args}
        operator = metric(everything, **data)
        _check_operator(operator, everything, name)
        given = {"residual": getattr(operator, "residual", None)} | extra_args
        if not whole:
            operator, given["full_params"] = operator.restrict(mask), full_params
        return inner.update(updates, state, params, **{**given, "operator": operator})

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def trust_region(inner: Transformation, max_kl: Number) -> Transformation:
    """Shortens the inner direction d to ½dᵀGd ≤ max_kl, the KL divergence of the step to second order, in nats.

    G is the operator without damping. A direction inside the bound is left as it is.

    Args:
        inner: takes `operator`; what it returns is the whole step (put the learning rate inside).
        max_kl: the bound, in nats; positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.trust_region(ng.transforms.precondition(), max_kl=0.5)
        >>> g = jnp.array([8.0])
        >>> d, state = tx.update(g, tx.init(g), operator=ng.operators.Diagonal(jnp.array([4.0])))
        >>> d.tolist()
        [0.5]
    """
    if concrete(max_kl) and not max_kl > 0:
        raise ValueError(f"max_kl: expected a positive number of nats, got {max_kl}")
    _require_operator_argument(inner, "trust_region")

    def init_fn(params: PyTree) -> TrustRegionState:
        dtype = Space.of(params).dtype
        return TrustRegionState(jnp.zeros((), dtype), jnp.ones((), dtype), inner.init(params))

    def update_fn(
        updates: PyTree,
        state: TrustRegionState,
        params: PyTree | None = None,
        *,
        operator: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, TrustRegionState]:
        direction, inner_state = inner.update(updates, state.inner, params, operator=operator, **extra_args)
        norm = operator.norm(direction).astype(state.norm.dtype)
        bound = jnp.sqrt(2 * jnp.asarray(max_kl, norm.dtype))
        # A norm that overflows, or is not a number, bounds nothing: no step, and the state shows why.
        scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1, bound / jnp.where(norm > 0, norm, bound)), 0)
        direction = cast_like(jax.tree.map(lambda d: d * scale.astype(d.dtype), direction), direction)
        return direction, TrustRegionState(norm, scale, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_step(inner: Transformation, step_size: optax.ScalarOrSchedule) -> Transformation:
    """Multiplies the inner direction by a number or a schedule of the count, inside of `with_metric`.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.scale_step(ng.transforms.precondition(), 0.5)
        >>> g = jnp.array([8.0])
        >>> d, state = tx.update(g, tx.init(g), operator=ng.operators.Diagonal(jnp.array([4.0])))
        >>> d.tolist()
        [1.0]
    """
    _require_operator_argument(inner, "scale_step")

    def init_fn(params: PyTree) -> ScaleStepState:
        return ScaleStepState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(
        updates: PyTree, state: ScaleStepState, params: PyTree | None = None, *, operator: Any = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleStepState]:
        direction, inner_state = inner.update(updates, state.inner, params, operator=operator, **extra_args)
        size = step_size(state.count) if callable(step_size) else step_size
        direction = jax.tree.map(lambda d: d * jnp.asarray(size, d.dtype), direction)
        return direction, ScaleStepState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_metric(metric: Metric, *, solver: Any = None, damping: "Rule | Number | None" = None) -> Transformation:
    """Replaces the gradient g by (G + λD)⁻¹g: `with_metric(metric, precondition(solver, damping))`.

    The sign is that of the gradient: chain `optax.scale(-learning_rate)` afterwards.

    Args:
        metric: metric(params, **data) -> operator.
        solver: one of `solvers`; None picks by structure.
        damping: None (as little as the arithmetic allows), a number (relative, λ·diag G) or a rule of `damping`.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.scale_by_metric(ng.metrics.scales(jnp.array([1.0, 0.5])))
        >>> theta = jnp.array([1.0, 1.0])
        >>> d, state = tx.update(jnp.array([1.0, 4.0]), tx.init(theta), theta)
        >>> d.tolist()
        [1.0, 1.0]
    """
    return with_metric(metric, precondition(solver, damping))


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    metric: Metric,
    *,
    solver: Any = None,
    damping: "Rule | Number | None" = None,
    max_kl: Number | None = None,
) -> Transformation:
    """Natural gradient descent: θ ← θ − η (G + λD)⁻¹ ∇L, with ½sᵀGs ≤ max_kl for the whole step s.

    Args:
        learning_rate: η > 0, a number or a schedule; dimensionless. 1 is exact for L quadratic with Hessian G.
        metric: metric(params, **data) -> operator, such as `metrics.fisher(log_prob, support)`.
        solver: one of `solvers`; None picks by structure.
        damping: None (as little as the arithmetic allows), a number (relative, λ·diag G) or a rule of `damping`.
        max_kl: bound on the KL divergence of one step, in nats; None for none.

    Returns:
        An optax transformation whose `update(grads, state, params, **data)` returns what `optax.apply_updates` adds.
        A step that is not finite is skipped and counted in the state.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import natgrad_jax as ng
        >>> loss = lambda theta: 0.5 * jnp.sum((theta / jnp.array([1.0, 0.01])) ** 2)
        >>> tx = ng.natural_gradient(1.0, ng.metrics.scales(jnp.array([1.0, 0.01])))
        >>> theta = jnp.array([1.0, 1.0])
        >>> updates, state = tx.update(jax.grad(loss)(theta), tx.init(theta), theta)
        >>> [round(float(x), 6) for x in optax.apply_updates(theta, updates)]
        [0.0, 0.0]

    Reference: Amari, "Natural gradient works efficiently in learning" (1998), theorem 1.
    """
    if not callable(learning_rate) and concrete(learning_rate) and not learning_rate >= 0:
        raise ValueError(
            f"learning_rate: expected a number ≥ 0 or a schedule, got {learning_rate}; "
            "the minus sign of descent is put in here"
        )
    inner = scale_step(precondition(solver, damping), learning_rate)
    if max_kl is not None:
        inner = trust_region(inner, max_kl)
    return optax.with_extra_args_support(optax.chain(with_metric(metric, inner), optax.scale(-1.0)))


def retract(family: Any) -> Transformation:
    """Turns the step s into R(θ, s) − θ, R the family's retraction, so that θ + update never leaves the family.

    Chain it last, after the sign. Where θ + (R − θ) would round away (a scale shrinking from 1 to 1e-9 in float32),
    call `family.retract(params, step)` instead of adding.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(1)
        >>> params, tx = family.init(), ng.transforms.retract(family)
        >>> update, _ = tx.update(family.init(scale=-2.0), tx.init(params), params)
        >>> round(float((params.scale_tril + update.scale_tril)[0, 0]), 4)
        0.1353
    """

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> tuple[PyTree, Any]:
        del extra_args
        if params is None:
            raise ValueError("params: retract needs the point to start from; call update(grads, state, params)")
        target = family.retract(params, updates)
        return cast_like(jax.tree.map(jnp.subtract, target, params), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def _check_operator(operator: Any, params: PyTree, name: str) -> None:
    space = getattr(operator, "space", None)
    if space is None:
        raise TypeError(
            f"metric: {name} returned {type(operator).__name__}, expected one of natgrad_jax.operators; "
            "wrap a (p, p) matrix as operators.Dense(matrix), rows as operators.Gram(rows)."
        )
    wanted = Space.of(params)
    if (space.treedef, space.shapes) != (wanted.treedef, wanted.shapes):
        raise ValueError(
            f"metric: {name} returned an operator on vectors {space}, the parameters are {wanted}. A matrix over a "
            "pytree is Dense(matrix, operators.Space.of(params)), in ravel_pytree order."
        )


def _data_names(metric: Metric, name: str) -> tuple[list[str], list[str]]:
    """Names of the keyword-only parameters of a metric: those without and those with a default."""
    parameters = inspect.signature(metric).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(
            f"metric: {name} takes **kwargs; name its data as keyword-only parameters, metric(params, *, batch)"
        )
    keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    taken = RESERVED & {p.name for p in keyword}
    if taken:
        raise TypeError(f"metric: {name} calls its data {sorted(taken)[0]!r}, a reserved name; choose another")
    required = [p.name for p in keyword if p.default is p.empty]
    return required, [p.name for p in keyword if p.default is not p.empty]


def _require_operator_argument(inner: Any, name: str) -> None:
    update: Callable[..., Any] | None = getattr(inner, "update", None)
    if update is None or "operator" not in inspect.signature(update).parameters:
        raise TypeError(
            f"inner: {name} expected a transformation whose update takes operator=, got {inner!r}. "
            "Wrap the preconditioner, chain other optax transformations afterwards."
        )
