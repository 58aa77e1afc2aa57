"""How long a step may be: bounded in nats, of unit length, or kept inside a family."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from natgrad_jax._tree import PyTree, cast_like
from natgrad_jax.damping import Number
from natgrad_jax.transforms.core import Transformation, require_operator_argument, scaled, wrap
from natgrad_jax.transforms.shared import check_positive, zero_of


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


class NormaliseState(NamedTuple):
    """State of `normalise`: √(dᵀGd) of the last direction, before it was divided out, and the inner state."""

    norm: Array
    inner: Any


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
    check_positive(max_kl, "max_kl", "number of nats")
    require_operator_argument(inner, "trust_region")

    def init_fn(params: PyTree) -> TrustRegionState:
        return TrustRegionState(zero_of(params), zero_of(params) + 1, inner.init(params))

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
        # A norm that overflows, or is not a number, bounds nothing, nor does a bound that is not: no step, and the
        # state shows why.
        known = jnp.isfinite(norm) & (bound > 0)
        scale = jnp.where(known, jnp.minimum(1, bound / jnp.where(norm > 0, norm, bound)), 0)
        return scaled(direction, scale), TrustRegionState(norm, scale, inner_state)

    return wrap(inner, init_fn, update_fn)


def normalise(inner: Transformation) -> Transformation:
    """The unit step d/‖d‖_G, ‖d‖_G = √(dᵀGd): steepest descent as the unit ball of the metric has it.

    Without damping this is G⁻¹g/√(gᵀG⁻¹g): what normalises is the dual norm of the gradient. A step then has the length
    of the learning rate, in √(2 nats) for a Fisher information, however long the gradient; it must shrink for the path
    to end. A zero direction stays zero, and one without a length (along the null space of G) is not taken.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> tx = ng.transforms.normalise(ng.transforms.precondition())
        >>> g, G = jnp.array([1.0, 1.0]), ng.operators.Diagonal(jnp.array([4.0, 1.0]))
        >>> d, state = tx.update(g, tx.init(g), operator=G)
        >>> round(float(state.norm), 4), round(float(G.norm(d)), 4)
        (1.118, 1.0)

    Reference: Amari, "Natural gradient works efficiently in learning" (1998), theorem 1.
    """
    require_operator_argument(inner, "normalise")

    def init_fn(params: PyTree) -> NormaliseState:
        return NormaliseState(zero_of(params), inner.init(params))

    def update_fn(
        updates: PyTree, state: NormaliseState, params: PyTree | None = None, *, operator: Any = None, **extra_args: Any
    ) -> tuple[PyTree, NormaliseState]:
        direction, inner_state = inner.update(updates, state.inner, params, operator=operator, **extra_args)
        norm = operator.norm(direction).astype(state.norm.dtype)
        known = jnp.isfinite(norm) & (norm > 0)
        safe = jnp.where(known, norm, 1)
        # By division: the inverse of a small norm may overflow.
        unit = jax.tree.map(lambda d: jnp.where(known, d / safe.astype(d.dtype), 0).astype(d.dtype), direction)
        return unit, NormaliseState(norm, inner_state)

    return wrap(inner, init_fn, update_fn)


def retract(family: Any) -> Transformation:
    """Turns the step s into R(θ, s) − θ, R the family's retraction, so that θ + update never leaves the family.

    Chain it last, after the sign. Where θ + (R − θ) would round away (a scale shrinking from 1 to 1e-9 in float32),
    call `family.retract(params, step)` instead of adding.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(1)
        >>> params, tx = family.init(), ng.transforms.retract(family)
        >>> step = ng.families.FullRankParams(jnp.zeros(1), jnp.array([[-2.0]]))
        >>> update, _ = tx.update(step, tx.init(params), params)
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
