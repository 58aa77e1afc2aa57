"""What the last step was, read from anywhere in the state of an optimizer."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# Fields that a person wants to see, in this order, and what to call them.
SHOWN = {
    "count": "steps",
    "skipped": "skipped",
    "rejected": "rejected",
    "natural_norm": "natural norm",
    "norm": "length",
    "scale": "shortened to",
    "step_size": "step size",
    "learning_rate": "learning rate",
    "momentum": "momentum",
    "damping": "damping",
    "ratio": "gain ratio",
    "predicted": "predicted decrease",
    "actual": "actual decrease",
    "idle": "steps without progress",
    "stalled": "stalled",
    "bend": "bend",
    "age": "age of the metric",
    "refreshed": "evaluations of the metric",
    "converged": "solver converged",
    "iterations": "solver iterations",
    "residual": "solver residual",
    "residual_used": "residual used",
    "rank": "rank",
    "dead": "dead coordinates",
}
UNKNOWN = {"iterations", "residual", "rank"}  # −1 where the solver does not say


@dataclass(frozen=True)
class Summary:
    """The numbers of a state by their names; `print` shows them. Indexed like a dictionary."""

    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __str__(self) -> str:
        if not self.values:
            return "no state of natgrad_jax in here"
        width = max(len(SHOWN[name]) for name in self.values)
        return "\n".join(f"{SHOWN[name]:{width}}  {_shown(value)}" for name, value in self.values.items())


def summary(state: Any) -> Summary:
    """The numbers of the last step, found inside whatever optax has put around them.

    Where several pieces have a field of one name, the outermost that set it counts (the λ of `levenberg_marquardt`, not
    the one that its `precondition` was given). For many problems in one state, by `vmap`, it prints the range.

    Args:
        state: the state of any optax transformation with pieces of this library inside.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import natgrad_jax as ng
        >>> tx = optax.chain(ng.natural_gradient(0.5, ng.metrics.scales(1.0), max_kl=0.5), optax.add_noise(0, 0, 0))
        >>> x = jnp.array([4.0])
        >>> _, state = tx.update(x, tx.init(x), x)
        >>> report = ng.transforms.summary(state)
        >>> int(report["count"]), float(report["natural_norm"]), float(report["scale"])
        (1, 4.0, 0.5)
        >>> print(report)
        steps             1
        skipped           0
        natural norm      4
        length            2
        shortened to      0.5
        damping           0
        solver converged  yes
        residual used     no
        dead coordinates  0
    """
    found: dict[str, Any] = {}
    _collect(state, found)
    known = {name: found[name] for name in SHOWN if name in found}
    return Summary({name: x for name, x in known.items() if not (name in UNKNOWN and np.all(x == -1))})


def _collect(state: Any, found: dict[str, Any]) -> None:
    """Our own states, outermost first."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        ours = type(state).__module__.startswith(__name__.rpartition(".")[0])
        for name, value in zip(state._fields, state):
            if ours and name in SHOWN and isinstance(value, jax.Array | np.ndarray):
                # Steps are counted by the innermost, which knows which of them were taken.
                found[name] = np.asarray(value) if name == "count" else found.get(name, np.asarray(value))
        for value in state:
            _collect(value, found)
    elif isinstance(state, tuple | list):
        for value in state:
            _collect(value, found)
    elif isinstance(state, dict):
        for value in state.values():
            _collect(value, found)


def _shown(value: np.ndarray) -> str:
    if value.dtype == bool:
        if value.ndim == 0:
            return "yes" if value else "no"
        return f"{int(value.sum())} of {value.size}"
    if value.ndim == 0 or np.all(value == value.flat[0]):
        return f"{value.flat[0]:.4g}"
    return f"{np.nanmin(value):.4g} … {np.nanmax(value):.4g}"
