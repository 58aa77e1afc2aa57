"""fit: a log-density and a family in, the best approximation and an honest status out."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax import solvers
from natgrad_jax._tree import PyTree, accumulator, all_finite, real_dtype, surely
from natgrad_jax.families import GaussianFullRank, GaussianMeanField, GaussianPrecision
from natgrad_jax.families.shared import dimension
from natgrad_jax.inference import descent, diagnostics, estimators, lanes, progress, whitened
from natgrad_jax.inference.descent import Geometry, State
from natgrad_jax.inference.draws import Draws, Fixed, Independent, antithetic, independent, orthogonal
from natgrad_jax.inference.estimators import ClosedForm, Estimator, Exact, Price, Score
from natgrad_jax.inference.results import FitResult, Status
from natgrad_jax.inference.retracted import OfFamily, OfObjective
from natgrad_jax.inference.targets import Minibatch, checked, checked_twice

LEAST_DRAWS = 60  # of a Gaussian; with 40, four eight schools in a thousand stop more than 0.1 nat below their best
OTHER_DRAWS = 64  # of any other family, and of a mean field of more than LARGEST_ROTATION dimensions
LARGEST_ROTATION = 256  # of the draws of a mean field: a step of O(n·d) must not become one of O(d³)
LARGEST_SUM = 4096  # configurations of a finite family, up to which it is summed without being asked
WHITENED = (GaussianFullRank, GaussianPrecision, GaussianMeanField)


@dataclass(frozen=True)
class _Plan:
    """Everything about a fit that is no array."""

    log_density: Callable[..., Array]
    family: Any
    estimator: Estimator
    draws: Draws
    max_steps: int
    final_draws: int
    find_scale: bool
    keep_path: bool
    progress: bool
    dtype: Any


def fit(
    log_density: Callable[..., Array],
    family: Any,
    key: Array,
    *,
    data: PyTree = None,
    init: PyTree = None,
    estimator: Estimator | None = None,
    max_steps: int = 200,
    tol: float = 0.01,
    final_draws: int = 1000,
    keep_path: bool = False,
    show_progress: bool = False,
) -> FitResult:
    """Fits q to an unnormalised log-density: minimises KL(q‖p) by natural gradients.

    There is nothing to tune. A step has a bounded KL divergence, is taken back if the ELBO falls by three standard
    errors, and cannot leave the family. It stops when ½gᵀF⁻¹g, estimated without bias, and the noise of the average
    are below `tol`, and returns an average of the last iterates.

    Full-rank, precision and mean-field Gaussians move in the frame in which q is N(0, I), where a step is a straight
    line in natural parameters, with 2d draws a step, at least 60, in antithetic pairs along orthogonal directions (a
    mean field of more than 256 dimensions: 64 antithetic ones). The result does not depend on the units of x: rescaled
    coordinates give the same ELBO curve.
    Every other family moves by its own retraction: with 64 draws a step, or by the exact sum if it is finite and small.

    A mean field of a strongly correlated posterior is slow: its natural gradient is that of a diagonal metric, and
    ½gᵀF⁻¹g is then less than what is left to gain, by up to the condition number of the correlations: with independent
    draws a fit with tol = 0.01 may end 0.1 to 0.2 nat short.

    Under `vmap` (over keys, data, starts, tolerances) on a CPU each problem costs the steps that it needs: when one
    ends, the next takes its place. Other devices run all at once, until the slowest ends.

    Args:
        log_density: log p̃(x), or log p̃(x, data), for one x; nats, up to a constant. Compiled once per function: pass
            new data through `data`. `inference.minibatch` makes one that sees a part of the data in each step.
        family: one of `families`; x is what its `sample` draws.
        key: a JAX random key.
        data: pytree handed to log_density as the second argument; `vmap` may run over it.
        init: parameters to start from. None: `family.init()`, and for those three Gaussians the scales from the
            diagonal of the Hessian there.
        estimator: `inference.stl()` and its like. None: `exact` for finite families of at most 4096 configurations,
            `stl` where draws are differentiable, else `score`.
        max_steps: limit on evaluations of the gradient estimate.
        tol: nats of ELBO; relative error of a posterior scale is about √tol.
        final_draws: draws for `final_elbo` and `khat`.
        keep_path: keep the parameters after every step in `.path`; max_steps times their memory.
        show_progress: show a bar with the ELBO (of a single fit; needs tqdm).

    Returns:
        `FitResult`. Numerical trouble is in `.status`; under `vmap` one bad problem leaves its neighbours untouched.

    Raises:
        TypeError: what is no family or no estimator, or an estimator that the family does not allow.
        ValueError: log_density does not map one x to a scalar, or is not the same function at every call; `init` does
            not fit the family; max_steps, tol or final_draws not positive.

    Cost: per step n gradients, and O(d³) beside them (mean field of d > 256: O(n·d)).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_density = lambda x: -0.5 * jnp.sum((x / jnp.array([1.0, 100.0])) ** 2)
        >>> result = ng.fit(log_density, ng.families.gaussian_full_rank(2), jax.random.key(0))
        >>> ng.inference.Status(int(result.status)).name, round(float(result.params.scale_tril[1, 1]), 2)
        ('CONVERGED', 100.0)

    Reference: Khan and Rue, "The Bayesian learning rule" (2023), section 4.2, for the natural-parameter step; Roeder,
    Wu, Duvenaud (2017) for the score difference; the safeguards are ours.
    """
    _check_family(family)
    _check_tol(tol)
    _check_key(key)
    max_steps = dimension(max_steps, "max_steps", "n")
    final_draws = dimension(final_draws, "final_draws", "n", 5 * diagnostics.FEWEST)
    if show_progress:
        progress.check()
    estimator = _default_estimator(family) if estimator is None else estimator
    draws = _resolved(estimator, family)
    default = _initial(family, init)
    x = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], family.sample(default, jax.random.key(0), 1)))
    shapes = jax.tree.map(jnp.shape, x)
    what = f"one x of shape {shapes}" if isinstance(shapes, tuple) else f"one x of shapes {shapes}"
    given = data
    target, data = checked(log_density, x, data, what)
    if isinstance(estimator, ClosedForm) and data is not given:
        raise ValueError("log_density: with closed_form it cannot close over what vmap traces; pass it through `data`")
    plan = _Plan(
        target,
        family,
        estimator,
        draws,
        int(max_steps),
        final_draws,
        init is None,
        bool(keep_path),
        bool(show_progress),
        _dtype(default),
    )
    return _run(plan, key, data, default, jnp.asarray(tol, _dtype(default)))


def minimise(
    objective: Callable[..., Array],
    metric: Callable[..., Any],
    params: PyTree,
    *,
    data: PyTree = None,
    solver: Any = None,
    damping: Any = None,
    retract: Callable[[PyTree, PyTree], PyTree] | None = None,
    max_steps: int = 200,
    tol: float = 1e-6,
    keep_path: bool = False,
) -> FitResult:
    """Minimises a deterministic objective under a metric, by the same descent as `fit`.

    Steps θ − s·G⁻¹∇L, s = 1 unless the objective then falls by too little: s is cut until it does. It stops when
    ½∇LᵀG⁻¹∇L < tol, in the units of the objective.

    Args:
        objective: objective(params), or objective(params, data); a scalar. Compiled once per function, as the metric:
            pass new data through `data`. What is read through objects, and any change of the metric, is not seen.
        metric: metric(params) -> operator, of `metrics`; metrics that need data take it from `data`, a dictionary.
        params: where to start.
        data: pytree handed to the objective; if the metric names keyword-only parameters, a dictionary that has them.
        solver: see `solvers.solve`.
        damping: see `solvers.solve`.
        retract: retract(params, step), for parameters that must not leave a set; None adds.
        max_steps: limit on evaluations.
        tol: on ½∇LᵀG⁻¹∇L.
        keep_path: keep the parameters after every step.

    Returns:
        `FitResult`: `.elbo` is the history of −objective, `.final_elbo` its last value, `.khat` NaN, `.family` None.

    Raises:
        TypeError: an objective that is no function, or cannot be hashed.
        ValueError: one that is no real scalar, or not the same function at every call; max_steps or tol not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> objective = lambda x: 0.5 * jnp.sum((x / jnp.array([1.0, 1e4]) - 1) ** 2)
        >>> result = ng.inference.minimise(objective, ng.metrics.scales(jnp.array([1.0, 1e4])), jnp.zeros(2))
        >>> [round(float(x), 3) for x in result.params]
        [1.0, 10000.0]
    """
    for name, f in (("objective", objective), ("metric", metric)):
        if not callable(f):
            raise TypeError(f"{name}: expected a function, got {type(f).__name__}")
    _check_tol(tol)
    max_steps = dimension(max_steps, "max_steps", "n")
    params = jax.tree.map(jnp.asarray, params)
    arguments = (params,) if data is None else (params, data)
    checked_twice(objective, arguments, "objective", "params")
    solver = solvers.check_solver(solvers.auto() if solver is None else solver)
    return _minimise(objective, metric, solver, retract, int(max_steps), bool(keep_path), params, data, damping, tol)


# What fit takes where nothing is said, and what it refuses.


def _check_family(family: Any) -> None:
    missing = [name for name in ("init", "sample", "log_prob", "fisher", "retract") if not hasattr(family, name)]
    if isinstance(family, type) or callable(family) or missing:
        raise TypeError(
            f"family: expected one of natgrad_jax.families, such as families.gaussian_full_rank(d); got {family!r}"
        )


def _check_tol(tol: Any) -> None:
    if not isinstance(tol, int | float) and jnp.shape(tol) != ():
        raise ValueError(f"tol: expected one number, got shape {jnp.shape(tol)}; for several, vmap over it")
    if surely(tol, lambda x: not x > 0):
        raise ValueError(f"tol: expected a positive number, got {tol}")


def _check_key(key: Any) -> None:
    if not isinstance(key, jax.Array) or not (
        key.dtype == jnp.uint32 or jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    ):
        raise TypeError(f"key: expected a JAX random key, jax.random.key(seed); got {key!r}")


def _initial(family: Any, init: PyTree) -> PyTree:
    default = family.init()
    if init is None:
        return default
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    treedefs: list[Any] = [jax.tree.structure(init), jax.tree.structure(default)]
    if treedefs[0] != treedefs[1] or shapes(init) != shapes(default):
        raise ValueError(
            f"init: expected parameters like family.init() of {family}, shapes {shapes(default)}; got {shapes(init)}"
        )
    if surely(all_finite(jax.tree.map(jnp.asarray, init)), lambda finite: not finite):
        raise ValueError("init: expected finite parameters, got NaN or infinity")
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float, x)), init)


def _dtype(params: PyTree) -> Any:
    return jnp.result_type(*(x.dtype for x in jax.tree.leaves(params)))


def _support_size(family: Any) -> float:
    """Configurations of a finite family; inf of any other."""
    if not hasattr(family, "support"):
        return float("inf")
    return family.k if hasattr(family, "k") else 2.0**family.n


def _default_estimator(family: Any) -> Estimator:
    if _support_size(family) <= LARGEST_SUM:
        return estimators.exact()
    return estimators.stl() if family.reparameterised else estimators.score()


def _resolved(estimator: Any, family: Any) -> Draws:
    """The draws of an estimator; an error if the two do not go together."""
    estimators.check_estimator(estimator)
    name = type(estimator).__name__.lower()
    if isinstance(estimator, Exact) and not hasattr(family, "support"):
        raise TypeError(f"estimator: exact() needs a family with a finite support, got {family}; take stl() or score()")
    if isinstance(estimator, ClosedForm) and not hasattr(family, "entropy"):
        raise TypeError(f"estimator: closed_form() needs a family with an entropy, which {family} has not")
    if isinstance(estimator, Price) and not isinstance(family, WHITENED):
        raise TypeError(f"estimator: price() is for full-rank, precision and mean-field Gaussians, got {family}")
    if not isinstance(estimator, Exact | ClosedForm | Score) and not family.reparameterised:
        raise TypeError(f"estimator: {name}() needs differentiable draws, which {family} has not; take score()")
    normal = hasattr(family, "push")
    draws = estimator.draws
    if draws is None:
        # A diagonal M has d numbers only, which 64 draws tell; without noise between coordinates they tell more.
        few = isinstance(family, GaussianMeanField) and family.d > LARGEST_ROTATION
        if isinstance(family, WHITENED) and not few and not isinstance(estimator, Score):
            return orthogonal(LEAST_DRAWS)
        # Where no M is at hand, the error of a radius that orthogonal draws share would not be seen.
        return antithetic(OTHER_DRAWS) if normal and not isinstance(estimator, Score) else independent(OTHER_DRAWS)
    inner = draws.inner if isinstance(draws, Fixed) else draws
    if not normal and not isinstance(inner, Independent):
        raise TypeError(
            f"draws: {family} has no draws made from normal ones; expected a number or independent(n), got {draws!r}"
        )
    return draws


# The run.


@partial(jax.jit, static_argnums=0)
def _run(plan: _Plan, key: Array, data: PyTree, init: PyTree, tol: Array) -> FitResult:
    in_frame = isinstance(plan.family, WHITENED) and not plan.estimator.exact

    def begin(args: Any) -> State:
        key, data, init, _ = args
        point = whitened.to_frame(init) if in_frame else init
        if in_frame and plan.find_scale and not isinstance(plan.estimator, Score):
            point = whitened.curvature_start(_whole(plan, data), point)
        return descent.start(_geometry(plan, in_frame, data, key), point, key)

    def step(args: Any, state: State) -> State:
        key, data = args[:2]
        own = jax.random.fold_in(key, state.count)
        geometry = _geometry(plan, in_frame, data, own)
        new = descent.step(geometry, state, own if plan.draws.random else key)
        if plan.progress:
            jax.debug.callback(partial(progress.show, plan.max_steps), new.count, new.value, ~unfinished(args, new))
        return new

    def unfinished(args: Any, state: State) -> Array:
        key, data, _, tol = args
        ended = descent.converged(_geometry(plan, in_frame, data, key), state, tol) | descent.lost(state)
        return (state.count < plan.max_steps) & ~ended

    def shown(point: PyTree) -> PyTree:
        return whitened.from_frame(point, init) if in_frame else point

    def row(state: State) -> PyTree:
        return state.value, shown(state.base) if plan.keep_path else None

    def end(args: Any, state: State) -> FitResult:
        key, data, _, tol = args
        geometry = _geometry(plan, in_frame, data, key)
        params = shown(descent.mean_iterate(geometry, state))
        elbo, error, khat, ess = _judged(plan, data, params, jax.random.fold_in(key, plan.max_steps))
        status = _status(geometry, state, tol, jnp.isfinite(elbo))
        per_step, at_start = _products(plan, in_frame)
        n = _evaluations(plan)
        return FitResult(
            params=params,
            elbo=state.value,
            final_elbo=elbo,
            final_error=error,
            status=status,
            natural_norm=descent.natural_norm(state),
            khat=jnp.where(status >= Status.NON_FINITE, jnp.inf, khat),  # of a q that means nothing
            relative_ess=ess,
            steps=state.count,
            rejected=state.rejected,
            skipped=state.skipped,
            gradients=n * state.count,
            hessian_products=per_step * n * state.count + at_start,
            path=None,
            family=plan.family,
        )

    result, (history, path) = lanes.run(
        lanes.Iteration(begin, step, unfinished, row, end, plan.max_steps), (key, data, init, tol)
    )
    return replace(result, elbo=history, path=path)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _minimise(
    objective: Callable[..., Array],
    metric: Callable[..., Any],
    solver: Any,
    retract: Callable[[PyTree, PyTree], PyTree] | None,
    max_steps: int,
    keep_path: bool,
    params: PyTree,
    data: PyTree,
    damping: Any,
    tol: Array,
) -> FitResult:
    dtype = real_dtype(accumulator(*(x.dtype for x in jax.tree.leaves(params))))  # whatever that of the data

    def geometry(data: PyTree) -> OfObjective:
        own = _data_of(metric, data)
        given = () if data is None else (data,)
        value = lambda params: jnp.asarray(objective(params, *given), dtype)  # noqa: E731
        return OfObjective(value, lambda params: metric(params, **own), solver, damping, retract)

    key = jax.random.key(0)

    def end(args: Any, state: State) -> FitResult:
        at = geometry(args[1])
        return FitResult(
            params=state.base,
            elbo=state.value,
            final_elbo=state.value,
            final_error=jnp.zeros_like(state.value),
            status=_status(at, state, args[2], jnp.isfinite(state.value)),
            natural_norm=descent.natural_norm(state),
            khat=jnp.full_like(state.value, jnp.nan),
            relative_ess=jnp.full_like(state.value, jnp.nan),
            steps=state.count,
            rejected=state.rejected,
            skipped=state.skipped,
            gradients=state.count,
            hessian_products=jnp.zeros_like(state.count),
            path=None,
            family=None,
        )

    def unfinished(args: Any, state: State) -> Array:
        ended = descent.converged(geometry(args[1]), state, args[2]) | descent.lost(state)
        return (state.count < max_steps) & ~ended

    iteration = lanes.Iteration(
        begin=lambda args: descent.start(geometry(args[1]), args[0], key),
        step=lambda args, state: descent.step(geometry(args[1]), state, key),
        unfinished=unfinished,
        row=lambda state: (state.value, state.base if keep_path else None),
        end=end,
        max_steps=max_steps,
    )
    result, (history, path) = lanes.alone(iteration, (params, data, jnp.asarray(tol)))
    return replace(result, elbo=history, path=path)


def _data_of(metric: Callable[..., Any], data: PyTree) -> dict[str, PyTree]:
    """What the keyword-only parameters of a metric name, out of `data`."""
    keyword = [p for p in inspect.signature(metric).parameters.values() if p.kind is p.KEYWORD_ONLY]
    given = data if isinstance(data, dict) else {}
    missing = [p.name for p in keyword if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"data: expected a dictionary with {missing[0]!r}, which the metric asks for, got {data!r}")
    return {p.name: given[p.name] for p in keyword if p.name in given}


def _whole(plan: _Plan, data: PyTree) -> Callable[[PyTree], Array]:
    return _cast(plan, plan.log_density if data is None else lambda x: plan.log_density(x, data))


def _cast(plan: _Plan, target: Callable[[PyTree], Array]) -> Callable[[PyTree], Array]:
    """In the dtype of the parameters, whatever that of the data."""
    return lambda x: jnp.asarray(target(x), plan.dtype)


def _geometry(plan: _Plan, in_frame: bool, data: PyTree, key: Array) -> Geometry:
    """The geometry of a step; its key chooses the minibatch."""
    target, batch_error = _whole(plan, data), None
    if isinstance(plan.log_density, Minibatch):
        target, batch_error = plan.log_density.at(data, jax.random.fold_in(key, 1))
        target = _cast(plan, target)
    if in_frame:
        return whitened.Whitened(target, plan.estimator, plan.draws, batch_error)
    expected = None
    if isinstance(plan.estimator, ClosedForm):
        given = plan.estimator.expected
        expected = given if data is None else partial(_with, given, data)
    return OfFamily(target, plan.family, plan.estimator, plan.draws, batch_error, expected)


def _with(f: Any, data: PyTree, params: PyTree) -> Array:
    return f(params, data)


def _judged(plan: _Plan, data: PyTree, params: PyTree, key: Array) -> tuple[Array, Array, Array, Array]:
    """ELBO, its standard error, k̂ and relative ESS from fresh draws; the ELBO without error where it is a sum."""
    draws = antithetic(plan.final_draws) if hasattr(plan.family, "push") else independent(plan.final_draws)
    log_weights = _log_weights(plan, _whole(plan, data), params, draws, key)
    khat = diagnostics.psis(log_weights).khat
    ess = diagnostics.effective_sample_size(log_weights) / len(log_weights)
    if plan.estimator.exact:
        elbo, error, _ = _geometry(plan, False, data, key).evaluate(params, key)
        return elbo, error, khat, ess
    return jnp.mean(log_weights), draws.error(log_weights), khat, ess


def _log_weights(plan: _Plan, target: Any, params: PyTree, draws: Draws, key: Array) -> Array:
    """log p̃ − log q at draws from q; of a Gaussian in its frame the second is known from ε."""
    family = plan.family
    if isinstance(family, WHITENED):
        frame, eps = whitened.to_frame(params), draws.points(key, family.d, params.loc.dtype)
        return jax.lax.map(target, whitened.at(frame, eps), batch_size=256) - whitened.log_q(frame, eps)
    if isinstance(draws, Independent):
        x = family.sample(params, key, draws.n)
    else:
        x = family.push(params, draws.points(key, family.noise, _dtype(params)))
    return jax.lax.map(lambda x: target(x) - family.log_prob(params, x), x, batch_size=256)


def _status(geometry: Geometry, state: State, tol: Array, finite: Array) -> Array:
    held = (state.bound & (state.radius >= geometry.first_radius)) | (state.refused >= descent.GIVE_UP_AFTER)
    status = jnp.where(held, Status.TRUST_LIMITED, Status.STEP_LIMIT)
    status = jnp.where(descent.converged(geometry, state, tol), Status.CONVERGED, status)
    finite &= state.started & (state.in_a_row == 0)
    return jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32)


def _evaluations(plan: _Plan) -> int:
    """Of log p̃ in a step."""
    if isinstance(plan.estimator, Exact):
        return int(_support_size(plan.family))
    if isinstance(plan.estimator, ClosedForm):
        return 0
    return plan.draws.count(plan.family.noise) if hasattr(plan.family, "push") else plan.draws.n


def _products(plan: _Plan, in_frame: bool) -> tuple[int, int]:
    """Hessian-vector products for a draw, and at the start."""
    if not in_frame:
        return 0, 0
    d = plan.family.d
    searched = plan.find_scale and not isinstance(plan.estimator, Score)
    return d if isinstance(plan.estimator, Price) else 0, d if searched else 0
