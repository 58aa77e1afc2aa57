"""Curvature and gradients that are kept: refreshed every k steps, averaged over steps, added up over mini-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from natgrad_jax._tree import PyTree, all_finite, cast_like, in_any_lane, where
from natgrad_jax.operators import Blocks, Dense, Diagonal, Kronecker, Operator, RealParts
from natgrad_jax.transforms.core import Source, Transformation, driven, driving, factor_of, hand_to
from natgrad_jax.transforms.shared import check_count, check_part


@dataclass(frozen=True)
class Kept:
    """A pytree whose arrays are kept once each: a factorisation holds most of what its operator does."""

    arrays: list[Array]
    treedef: Any
    places: tuple[int, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Kept":
        """The tree, told apart by the identity of its arrays."""
        leaves, treedef = jax.tree.flatten(tree)
        order: dict[int, int] = {}
        places = tuple(order.setdefault(id(x), len(order)) for x in leaves)
        unique = [next(x for x, place in zip(leaves, places) if place == i) for i in range(len(order))]
        return cls(unique, treedef, places)

    def tree(self) -> PyTree:
        """The pytree."""
        return jax.tree.unflatten(self.treedef, [self.arrays[place] for place in self.places])


jax.tree_util.register_dataclass(Kept, data_fields=["arrays"], meta_fields=["treedef", "places"])


class EveryKState(NamedTuple):
    """State of `every_k`.

    Attributes:
        age: steps since the operator was evaluated.
        held: whether there is one that is finite.
        refreshed: evaluations so far.
        kept: the operator in use and its factorisation, `kept.tree()`.
        source: state of what evaluates it.
        inner: state of the inner transformation.
    """

    age: Array
    held: Array
    refreshed: Array
    kept: Kept
    source: Any
    inner: Any


class AverageState(NamedTuple):
    """State of `average`.

    Attributes:
        count: operators that went into the mean.
        operator: the mean.
        source: state of what evaluates them.
        inner: state of the inner transformation.
    """

    count: Array  # type: ignore[assignment]
    operator: Any
    source: Any
    inner: Any


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
        mini_step: mini-batches since the last step.
        added: those of them whose gradient was finite.
        total: the sum of their gradients.
        inner: state of the inner transformation.
    """

    mini_step: Array
    added: Array
    total: PyTree
    inner: Any


def every_k(inner: Transformation, k: int, *, like: dict[str, Any] | None = None) -> Transformation:
    """Evaluates the metric, and factorises it, on every k-th step only; in between both are kept.

    Nearly all of a step's cost is the metric and its factorisation, and G changes slowly. Both are left out in between,
    eagerly, under `jit`, `scan` and `vmap`, where they are refreshed for all lanes when one is due
    (`python -m benchmarks transforms`). The state holds the operator: donate it, or a loop copies it. An operator that
    is not finite does not replace one that is; it is asked for again on the next step.

    Args:
        inner: `scale_by_metric(...)`, `natural_gradient(...)`, `with_metric(...)` or `average(...)`.
        k: the period, ≥ 1.
        like: what `update` will be given by name and the metric needs, such as {"batch": batch}: arrays, or their
            `jax.ShapeDtypeStruct`. optax's `init` sees no data, and the state holds an operator of their size.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.every_k(ng.scale_by_metric(lambda x: ng.operators.Diagonal(x)), 2)
        >>> x, state = jnp.array([2.0]), tx.init(jnp.array([2.0]))
        >>> for _ in range(3):
        ...     d, state = tx.update(jnp.array([24.0]), state, x)
        ...     print(round(float(d[0]), 4))
        ...     x = x + 2
        12.0
        12.0
        4.0

    Memory: the operator and its factorisation, in the state.
    """
    source, handed = _driven(inner, "every_k")
    check_count(k, "k", "steps")
    factor = factor_of(handed)

    def evaluated(state: Any, updates: PyTree, params: PyTree | None, data: dict[str, Any]) -> tuple[Kept, Any]:
        operator, state = source.at(state, updates, params, data)
        factored = None if factor is None else factor(operator, params, data.get("full_params"))
        return Kept.of((operator, factored)), state

    def init_fn(params: PyTree) -> EveryKState:
        start = source.init(params)
        kept = _zeros_of(lambda data: evaluated(start, params, params, data)[0], like, "every_k")
        zero = jnp.zeros((), jnp.int32)
        return EveryKState(zero + k, jnp.asarray(False), zero, kept, start, handed.init(params))

    def update_fn(
        updates: PyTree, state: EveryKState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, EveryKState]:
        due = (state.age >= k) | ~state.held

        def refresh(own: tuple[Any, ...]) -> tuple[Any, ...]:
            age, held, count, kept, source_state = own
            new, new_source = evaluated(source_state, updates, params, extra_args)
            new = _like(new, kept, "every_k")
            fine = all_finite(new)
            # One that is not finite is used where there is no other, so that the step is skipped and counted.
            kept = where(due & (fine | ~held), new, kept)
            age = jnp.where(due & fine, 0, age)
            return age, held | (due & fine), count + due, kept, where(due, new_source, source_state)

        age, held, count, kept, source_state = _if_due(due, refresh, state[:-1])
        operator, factored = kept.tree()
        options = extra_args if factored is None else extra_args | {"factored": factored}
        direction, inner_state = hand_to(handed, operator, updates, state.inner, params, options)
        # No further than k: the age of one that cannot be had does not run over.
        return direction, EveryKState(jnp.minimum(age + 1, k), held, count, kept, source_state, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def average(inner: Transformation, decay: float = 0.95, *, like: dict[str, Any] | None = None) -> Transformation:
    """The mean of the operators of all steps, with weights that fall by `decay`, in place of the last one.

        Ḡ_t = Σ_s decayᵗ⁻ˢ G_s / Σ_s decayᵗ⁻ˢ

    The bias of the start is taken out: after one step Ḡ is G exactly. For operators whose arrays may be averaged:
    `Diagonal`, `Dense`, `Kronecker` (factor by factor, as K-FAC does, which is not the mean of the products), `Blocks`
    of these. Rows are not; `chunk_size=` makes a metric of rows a matrix. One that is not finite is left out.

    Args:
        inner: `scale_by_metric(...)`, `natural_gradient(...)` or `with_metric(...)`; `every_k(average(...), k)`
            averages those that are evaluated.
        decay: between 0 and 1; 0 for the last one alone.
        like: as in `every_k`.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.average(ng.scale_by_metric(lambda x: ng.operators.Diagonal(x)), 0.5)
        >>> state = tx.init(jnp.array([1.0]))
        >>> for x in (1.0, 4.0):
        ...     d, state = tx.update(jnp.array([6.0]), state, jnp.array([x]))
        ...     print(round(float(state.operator.entries[0]), 4), round(float(d[0]), 4))
        1.0 6.0
        3.0 2.0
    """
    source, handed = _driven(inner, "average")
    check_part(decay, "decay")

    def init_at(params: PyTree) -> tuple[Array, Operator, Any]:
        start = source.init(params)
        operator = _zeros_of(lambda data: source.at(start, params, params, data)[0], like, "average")
        _check_averages(operator)
        return jnp.zeros((), jnp.int32), operator, start

    def at(
        state: tuple[Array, Operator, Any], updates: PyTree, params: PyTree | None, data: dict[str, Any]
    ) -> tuple[Operator, tuple[Array, Operator, Any]]:
        count, mean, source_state = state
        new, source_state = source.at(source_state, updates, params, data)
        new = _like(new, mean, "average")
        fine = all_finite(new)
        # 1/(1 + decay + decay² + …), exactly 1 for the first.
        weight = jnp.where(count == 0, 1.0, (1 - decay) / (1 - decay ** (count + 1.0)))
        moved = jax.tree.map(lambda m, x: m + weight.astype(m.dtype) * (x - m), mean, new)
        # The first one is used as it is, so that the step is skipped and counted.
        used = where(fine, moved, where(count == 0, new, mean))
        return used, (count + fine, where(fine, moved, mean), source_state)

    def init_fn(params: PyTree) -> AverageState:
        return AverageState(*init_at(params), handed.init(params))

    def update_fn(
        updates: PyTree, state: AverageState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AverageState]:
        operator, own = at(state[:-1], updates, params, extra_args)
        direction, inner_state = hand_to(handed, operator, updates, state.inner, params, extra_args)
        return direction, AverageState(*own, inner_state)

    return driving(init_fn, update_fn, Source(init_at, at), handed)


def accumulate(inner: Transformation, k: int) -> Transformation:
    """One step of `inner` with the mean gradient of k mini-batches, and no cost of the metric in between.

    `optax.MultiSteps` runs the inner update, metric and solve included, at every mini-step, and throws away all but the
    last; here it runs on the k-th alone, with the data of that call (see `docs/chaining.md`): the metric sees the last
    mini-batch, the gradient all of them. A gradient that is not finite is left out of the mean. Updates are zero in
    between.

    Args:
        inner: any transformation.
        k: mini-batches for a step, ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.accumulate(ng.natural_gradient(1.0, ng.metrics.scales(1.0)), 2)
        >>> x, state = jnp.array([0.0]), tx.init(jnp.array([0.0]))
        >>> for g in (1.0, 3.0):
        ...     update, state = tx.update(jnp.array([g]), state, x)
        ...     print(update.tolist())
        [0.0]
        [-2.0]
    """
    check_count(k, "k", "mini-batches")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> AccumulateState:
        zero = jnp.zeros((), jnp.int32)
        return AccumulateState(zero, zero, jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update_fn(
        updates: PyTree, state: AccumulateState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AccumulateState]:
        fine = all_finite(updates)
        total = where(fine, jax.tree.map(jnp.add, state.total, cast_like(updates, state.total)), state.total)
        mini_step, added = state.mini_step + 1, state.added + fine
        due = mini_step >= k
        nothing = jax.tree.map(jnp.zeros_like, updates)

        def step(kept: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
            _, inner_state = kept
            mean = jax.tree.map(lambda x: x / jnp.maximum(added, 1).astype(x.dtype), total)
            new = inner.update(cast_like(mean, updates), inner_state, params, **extra_args)
            return where(due, cast_like(new, kept), kept)

        direction, inner_state = _if_due(due, step, (nothing, state.inner))
        return direction, AccumulateState(
            jnp.where(due, 0, mini_step), jnp.where(due, 0, added), where(due, nothing, total), inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _if_due(due: Array, act: Callable[[Any], Any], kept: Any) -> Any:
    """act(kept) if it is due in any lane, else `kept`."""
    return jax.lax.cond(in_any_lane(due), act, lambda kept: kept, kept)


def _driven(inner: Transformation, name: str) -> tuple[Source, Transformation]:
    """What evaluates the operator, and what it is handed to."""
    found = driven(inner)
    if found is None:
        raise TypeError(
            f"inner: {name} expected what evaluates a metric, scale_by_metric(...), natural_gradient(...) or "
            f"with_metric(...), got {type(inner).__name__}. Put it around that, and chain afterwards; what is averaged "
            "and kept is every_k(average(...), k)."
        )
    return found


def _zeros_of(evaluated: Callable[[dict[str, Any]], Any], like: dict[str, Any] | None, name: str) -> Any:
    """Zeros in the place of the arrays that `evaluated` returns for data that are like `like`."""
    if like is not None and not isinstance(like, dict):
        raise TypeError(f"like: expected a dictionary of what update is given by name, got {type(like).__name__}")
    try:
        shapes = jax.eval_shape(evaluated, like or {})
    except TypeError as error:
        if "the metric" not in str(error) and "without a metric" not in str(error):
            raise
        raise TypeError(
            f"like: {name} keeps an operator, and init sees no data to tell its size; pass "
            f"like={{'batch': batch}} with what update will be given ({error})"
        ) from error
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _like(new: Any, old: Any, name: str) -> Any:
    """`new` in the dtypes of `old`; a `ValueError` if the state was made for another."""
    (was, before), (now, after) = ((jax.tree.structure(x), [*map(jnp.shape, jax.tree.leaves(x))]) for x in (old, new))
    if (was, before) != (now, after):
        raise ValueError(
            f"like: {name} was made for arrays of shapes {before}, and the metric returned {after}; the data of "
            "update and those in like={...} must have equal shapes"
        )
    return cast_like(new, old)


def _check_averages(operator: Operator) -> None:
    match operator:
        case Diagonal() | Dense() | Kronecker():
            return
        case Blocks():
            for part in operator.operators:
                _check_averages(part)
        case RealParts():
            _check_averages(operator.parts)
        case _:
            raise TypeError(
                f"average: the arrays of {type(operator).__name__} may not be averaged. Pass chunk_size= to a metric "
                "of rows, which makes it a matrix, or average a diagonal."
            )
