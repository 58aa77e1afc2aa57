"""What the pieces share: arguments of an update, checks, the step that was not taken."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, surely, unmasked

# What update is given for the transformations themselves, never data of somebody's function.
OURS = {"value", "grad", "value_fn", "damping", "operator", "residual", "factored"}


MOMENTA = {"velocity", "step"}  # fields of states that carry the last step on


def zero_of(params: PyTree) -> Array:
    """0 as a real number of the parameters' precision."""
    return jnp.zeros((), jnp.finfo(Space.of(params).dtype).dtype)


def gradient_of(updates: PyTree, extra_args: dict[str, Any]) -> PyTree:
    """The gradient of the objective: the chain may have changed the updates."""
    grad = extra_args.get("grad")
    return updates if grad is None else grad


def not_taken(g: PyTree, direction: PyTree) -> Array:
    """Whether the inner transformation gave no direction for a gradient that is not zero."""
    # NaN is neither zero nor larger than it.
    return (_tree.largest(direction) == 0) & ~(_tree.largest(g) == 0)


def data_for(f: Callable[..., Any], extra_args: dict[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments of an update that f names beyond its first."""
    names = [name for name in list(inspect.signature(f).parameters)[1:] if name not in OURS]
    return {name: extra_args[name] for name in names if name in extra_args}


def merged(params: PyTree, full_params: PyTree | None) -> PyTree:
    """`params` with what optax.masked hides of them."""
    if full_params is None:
        if not all(jax.tree.leaves(unmasked(params))):
            raise TypeError(
                "full_params: a part of the parameters is hidden (optax.masked, partition), and the loss is one of all "
                "of them; call update(grads, state, params, full_params=params)"
            )
        return params
    hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda x, y: y if hidden(x) else x, params, full_params, is_leaf=hidden)


def check_decay(decay: float) -> None:
    """A `ValueError` unless the decay is between 0 and 1."""
    if jnp.ndim(decay) != 0 or surely(decay, lambda x: not 0 <= x < 1):
        raise ValueError(f"decay: expected a number between 0 and 1, 1 excluded, got {decay}")


def check_positive(x: Any, name: str, what: str) -> None:
    """A `ValueError` if x can be seen not to be a positive number."""
    if jnp.ndim(x) != 0 or surely(x, lambda x: not x > 0):
        raise ValueError(f"{name}: expected a positive {what}, got {x}; the minus sign of descent comes afterwards")


def check_count(k: Any, name: str, what: str) -> None:
    """A `ValueError` unless k is a positive whole number."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{name}: expected a number of {what} ≥ 1, got {k!r}")


def restarted(state: Any) -> Any:
    """The state with every momentum in it at rest: one that led to a rejected step would lead to it again."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        kept: Any = type(state)(*map(restarted, state))
        rest = {name: jax.tree.map(jnp.zeros_like, getattr(kept, name)) for name in kept._fields if name in MOMENTA}
        return kept._replace(**rest)
    return type(state)(map(restarted, state)) if isinstance(state, tuple | list) else state
