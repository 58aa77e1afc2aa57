"""What the pieces share: arguments of an update, checks, the step that was not taken."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, surely, unmasked

# What update is given for the transformations themselves, and never data of somebody's metric or loss.
RESERVED = {"value", "grad", "value_fn", "damping", "operator", "residual", "factored", "full_params"}


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


def data_for(f: Callable[..., Any], name: str, extra_args: dict[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments of an update that f names beyond its first; an error that names what is missing."""
    named = [
        p for p in list(inspect.signature(f).parameters.values())[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    data = {p.name: extra_args[p.name] for p in named if p.name in extra_args and p.name not in RESERVED}
    missing = [p.name for p in named if p.default is p.empty and p.name not in data]
    if missing:
        reserved = " (a reserved name; choose another)" if missing[0] in RESERVED else ""
        raise TypeError(f"{missing[0]}{reserved}: {name} needs it; call update(grads, state, params, {missing[0]}=...)")
    return data


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


def check_number(x: Any, name: str) -> None:
    """A `TypeError` or a `ValueError` unless x is one number."""
    if not isinstance(x, int | float | np.number | np.ndarray | Array):
        cure = "; a schedule of the step size goes into scale_step(inner, schedule)" if callable(x) else ""
        raise TypeError(f"{name}: expected a number, got {x!r}{cure}")
    if jnp.ndim(x) != 0:
        raise ValueError(f"{name}: expected one number, got an array of shape {jnp.shape(x)}")


def check_positive(x: Any, name: str, what: str) -> None:
    """An error if x can be seen not to be a positive number."""
    check_number(x, name)
    if surely(x, lambda x: not x > 0):
        raise ValueError(f"{name}: expected a positive {what}, got {x}")


def check_step_size(x: Any) -> None:
    """An error if the learning rate can be seen not to be a positive number."""
    check_number(x, "learning_rate")
    if surely(x, lambda x: not x > 0):
        raise ValueError(
            f"learning_rate: expected a positive number, got {x}; the minus sign of descent comes afterwards, "
            "optax.scale(-1.0)"
        )


def check_part(x: Any, name: str, *, least: bool = True) -> None:
    """An error if x can be seen not to lie between 0 and 1; with `least`, 0 is allowed."""
    check_number(x, name)
    if surely(x, lambda x: not (x >= 0 if least else x > 0) or not x < 1):
        raise ValueError(f"{name}: expected a number between 0 and 1, {'1' if least else 'both'} excluded, got {x}")


def check_count(k: Any, name: str, what: str) -> None:
    """A `ValueError` unless k is a positive whole number."""
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"{name}: expected a number of {what} ≥ 1, got {k!r}")


def restarted(state: Any) -> Any:
    """The state with every momentum in it at rest: one that led to a rejected step would lead to it again."""
    state = state.at_rest() if hasattr(state, "at_rest") else state
    return state._replace(inner=restarted(state.inner)) if hasattr(state, "inner") else state
