"""The protocol: G⁻¹g as optax gradient transformations. The operator flows inward, the direction flows outward.

    with_metric(metric, inner)      evaluates the metric, hands the operator to `inner`
    wrappers around `inner`         see g, d and the operator, and change what they name
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

from natgrad_jax import _tree, solvers
from natgrad_jax import damping as damping_rules
from natgrad_jax._tree import PyTree, Space, all_finite, cast_like, unmasked, where
from natgrad_jax.damping import Number, Rule
from natgrad_jax.metrics import Metric
from natgrad_jax.operators import Operator, is_operator
from natgrad_jax.transforms.shared import RESERVED

Transformation: TypeAlias = optax.GradientTransformationExtraArgs


class Source(NamedTuple):
    """Where the operator of a step comes from.

    Attributes:
        init: init(params) -> state.
        at: at(state, updates, params, data) -> (operator on the vectors of `updates`, state).
    """

    init: Callable[[PyTree], Any]
    at: Callable[..., tuple[Operator, Any]]


class Driven(NamedTuple):
    """What a transformation that evaluates a metric is made of.

    Attributes:
        source: how the operator is evaluated.
        inner: what it is handed to.
    """

    source: Source
    inner: Transformation


def driving(init: Any, update: Any, source: Source, inner: Transformation) -> Transformation:
    """A transformation that evaluates a metric, and can be asked how (`driven`)."""
    # On the function, since a transformation may be taken apart and put together again (flax.nnx does).
    update.driven = Driven(source, inner)
    return optax.GradientTransformationExtraArgs(init, update)


def driven(tx: Any) -> Driven | None:
    """How a transformation evaluates its metric; None for one that does not."""
    return getattr(getattr(tx, "update", None), "driven", None)


def factoring(init: Any, update: Any, factor: Callable[..., Any] | None) -> Transformation:
    """A transformation that takes `operator=`, and what it does to it first: factor(operator, params, full_params).

    `update` takes the result as `factored=` in place of doing it again.
    """
    update.factor = factor
    return optax.GradientTransformationExtraArgs(init, update)


def factor_of(inner: Transformation) -> Callable[..., Any] | None:
    """What `inner` does to an operator first; None where it is of somebody else's making, and unknown."""
    return getattr(inner.update, "factor", None)


def factored_once(
    inner: Transformation, operator: Operator, params: PyTree | None, extra_args: dict[str, Any]
) -> dict[str, Any]:
    """The extra arguments with the operator and its factorisation, for an `inner` that is called several times."""
    given, factor = extra_args | {"operator": operator}, factor_of(inner)
    if factor is not None and given.get("factored") is None:
        given["factored"] = factor(operator, params, extra_args.get("full_params"))
    return given


def wrap(inner: Transformation, init: Any, update: Any) -> Transformation:
    """A wrapper around `inner`, which factorises as `inner` does."""
    return factoring(init, update, factor_of(inner))


class PreconditionState(NamedTuple):
    """State of `precondition`.

    Attributes:
        count: steps taken.
        skipped: steps not taken, because the gradient, the operator or the solution was not finite.
        converged: whether the last solve was.
        dead: coordinates without curvature at the last solve; their step is 0.
        rank: numerical rank at the last solve, −1 where the solver does not know it.
        natural_norm: √(gᵀd) of the last solve, the dual norm of g in the damped metric; 0 for a step not taken.
        damping: λ of the last solve; 0 for damping=None, as little as the arithmetic allows.
        iterations: of the last solve, −1 where the solver does not iterate.
        residual: ‖g − (G + λD)d‖/‖g‖ at the end of an iterative solve, else −1, and for a step not taken.
        residual_used: whether the sample-space residual was found to belong to g, and used.
        direction: the last one that was taken, where the solver starts from it (`cg(warm_start=True)`); else None.
    """

    count: Array  # type: ignore[assignment]
    skipped: Array
    converged: Array
    dead: Array
    rank: Array
    natural_norm: Array
    damping: Array
    iterations: Array
    residual: Array
    residual_used: Array
    direction: PyTree = None


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
        >>> d.tolist(), round(float(state.natural_norm), 4)
        ([1.0, 1.0], 2.2361)
    """
    solver = solvers.check_solver(solvers.auto() if solver is None else solver)
    rule = damping_rules.as_rule(damping)
    warm = getattr(solver, "warm_start", False)

    def factor(operator: Operator, params: PyTree | None, full_params: PyTree | None = None) -> Any:
        return solvers.factor(solver, operator, damping_rules.at(rule, params, full_params))

    def init_fn(params: PyTree) -> PreconditionState:
        zero, real = jnp.zeros((), jnp.int32), jnp.zeros((), _tree.real_dtype(Space.of(params).dtype))
        start = jax.tree.map(jnp.zeros_like, params) if warm else None
        yes = jnp.asarray(True)
        return PreconditionState(zero, zero, yes, zero, zero - 1, real, real, zero - 1, real - 1, ~yes, start)

    def update_fn(
        updates: PyTree,
        state: PreconditionState,
        params: PyTree | None = None,
        *,
        operator: Any = None,
        damping: Number | None = None,
        residual: Array | None = None,
        factored: Any = None,
        full_params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PreconditionState]:
        del extra_args
        check_given(operator, "precondition")
        operator.space.check(updates, "grads")
        resolved = damping_rules.at(rule, params, full_params)
        damping = None if damping is None else damping_rules.checked(damping)
        given = {"residual": residual, "guess": state.direction}
        options = {name: x for name, x in given.items() if x is not None}
        factored = solvers.factor(solver, operator, resolved) if factored is None else factored
        solution = solvers.implicit(solver, factored, operator, resolved, updates, damping, **options)
        # A truncated solve is applied and flagged; one that is not finite is not taken.
        fine = all_finite(solution.value) & all_finite(updates)
        value = where(fine, solution.value, jax.tree.map(jnp.zeros_like, solution.value))
        strength = (0.0 if resolved is None else resolved.strength) if damping is None else damping
        stats = solution.stats
        like = lambda x, old: old * 0 - 1 if x is None else jnp.asarray(x, old.dtype)  # noqa: E731
        return value, PreconditionState(
            count=state.count + fine.astype(jnp.int32),
            skipped=state.skipped + (~fine).astype(jnp.int32),
            converged=solution.converged,
            dead=stats.dead,
            rank=like(stats.rank, state.rank),
            natural_norm=dual_norm(where(fine, updates, value), value).astype(state.natural_norm.dtype),
            damping=jnp.asarray(strength, state.damping.dtype),
            iterations=like(stats.iterations, state.iterations),
            residual=jnp.where(fine, like(stats.residual, state.residual), -1),
            residual_used=jnp.asarray(False if stats.residual_used is None else stats.residual_used),
            direction=where(fine, cast_like(value, state.direction), state.direction) if warm else None,
        )

    tx = factoring(init_fn, update_fn, factor)
    tx.update.innermost = True
    return tx


def check_given(operator: Any, name: str) -> None:
    """A `TypeError` unless there is an operator."""
    if not is_operator(operator):
        raise TypeError(
            f"operator: {name} needs update(..., operator=G) with one of natgrad_jax.operators, got "
            f"{type(operator).__name__}; wrap it in with_metric(metric, ...)"
        )


def dual_norm(g: PyTree, d: PyTree) -> Array:
    """√(gᵀd), for vectors of any size."""
    sizes = [_tree.largest(_tree.raised(x)) for x in (g, d)]
    units = [jnp.where(size > 0, size, 1) for size in sizes]
    one, other = (
        jax.tree.map(lambda x: x / unit.astype(_tree.real_dtype(x.dtype)), _tree.raised(tree))  # noqa: B023
        for tree, unit in zip((g, d), units, strict=True)
    )
    return jnp.sqrt(units[0]) * jnp.sqrt(units[1]) * jnp.sqrt(jnp.maximum(_tree.vdot(one, other), 0))


def with_metric(metric: Metric | None, inner: Transformation) -> Transformation:
    """Evaluates `metric(params, **data)` once per update and hands the operator to `inner`.

    The metric's keyword-only parameters name the data that `update` must be given; exactly those are forwarded.

    Inside `optax.masked` or `partition`, where a part of the parameters is hidden, `update` must also be given
    `full_params=params`: the metric is evaluated at all of them, and the block of G that belongs to the visible ones is
    solved.

    Args:
        metric: metric(params, **data) -> operator; None for a curvature of your own, given to each `update` as
            `operator=`.
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
    source = given_operator() if metric is None else of_metric(metric)
    require_operator_argument(inner, "with_metric")

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> tuple[PyTree, Any]:
        operator, _ = source.at((), updates, params, extra_args)
        return hand_to(inner, operator, updates, state, params, extra_args)

    return driving(inner.init, update_fn, source, inner)


def hand_to(
    inner: Transformation,
    operator: Operator,
    updates: PyTree,
    state: Any,
    params: PyTree | None,
    extra_args: dict[str, Any],
) -> tuple[PyTree, Any]:
    """`inner.update` with the operator, and the residual that rides on it unless one was given."""
    given = {"residual": getattr(operator, "residual", None)} | extra_args | {"operator": operator}
    return inner.update(updates, state, params, **given)


def of_metric(metric: Metric) -> Source:
    """The metric, evaluated anew for every step."""
    if not callable(metric):
        raise TypeError(
            f"metric: expected a function metric(params, **data) -> operator, got {type(metric).__name__}. An operator "
            "of your own goes into update(..., operator=G), with None for the metric."
        )
    name = getattr(metric, "__name__", type(metric).__name__)
    required, optional = _data_names(metric, name)

    def at(state: Any, updates: PyTree, params: PyTree | None, data: dict[str, Any]) -> tuple[Operator, Any]:
        if params is None:
            raise ValueError("params: a metric is evaluated at the parameters; call update(grads, state, params)")
        missing = [key for key in required if key not in data]
        if missing:
            raise TypeError(
                f"{missing[0]}: the metric {name} needs it; call update(grads, state, params, {missing[0]}=...)"
            )
        Space.of(params).check(updates, "grads")
        mask = unmasked(params)
        whole, full_params = all(jax.tree.leaves(mask)), data.get("full_params")
        if not whole and full_params is None:
            raise TypeError(
                f"full_params: a part of the parameters is hidden (optax.masked, partition), and the metric {name} is "
                "evaluated at all of them; call update(grads, state, params, full_params=params)"
            )
        everything = params if whole else full_params
        operator = metric(everything, **{key: data[key] for key in (*required, *optional) if key in data})
        _check_operator(operator, everything, name)
        return operator if whole else operator.restrict(mask), state

    return Source(lambda params: (), at)


def given_operator() -> Source:
    """The operator that `update` is given."""

    def at(state: Any, updates: PyTree, params: PyTree | None, data: dict[str, Any]) -> tuple[Operator, Any]:
        operator: Any = data.get("operator")
        if not is_operator(operator):
            raise TypeError(
                "operator: without a metric, expected one of natgrad_jax.operators in update(grads, state, params, "
                f"operator=G), got {type(operator).__name__}"
            )
        mask = unmasked(updates)
        hidden = not all(jax.tree.leaves(mask)) and operator.space.treedef != Space.of(updates).treedef
        return operator.restrict(mask) if hidden else operator, state

    return Source(lambda params: (), at)


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
    require_operator_argument(inner, "scale_step")

    def init_fn(params: PyTree) -> ScaleStepState:
        return ScaleStepState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(
        updates: PyTree, state: ScaleStepState, params: PyTree | None = None, *, operator: Any = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleStepState]:
        direction, inner_state = inner.update(updates, state.inner, params, operator=operator, **extra_args)
        size = step_size(state.count) if callable(step_size) else step_size
        return scaled(direction, size), ScaleStepState(optax.safe_increment(state.count), inner_state)

    return wrap(inner, init_fn, update_fn)


def scaled(direction: PyTree, size: Number) -> PyTree:
    """size·d, in the dtypes of d."""
    return jax.tree.map(lambda d: d * jnp.asarray(size, d.dtype), direction)


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


def require_operator_argument(inner: Any, name: str) -> None:
    """A `TypeError` unless the update of `inner` takes an operator."""
    update: Callable[..., Any] | None = getattr(inner, "update", None)
    if update is None or "operator" not in inspect.signature(update).parameters:
        raise TypeError(
            f"inner: {name} expected a transformation whose update takes operator=, got {inner!r}. "
            "Wrap the preconditioner, chain other optax transformations afterwards."
        )
