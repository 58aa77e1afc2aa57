"""Convex losses whose Hessian in the outputs has a square root in closed form, for `metrics.gauss_newton`.

A loss is called as loss(outputs, batch) -> scalar, and is what you minimise. Each takes

    targets    batch -> the targets, on the leading axis; when left out batch[1], for batches (x, y)
    mean       divide the sum over the examples by their number; what stands on other axes is always summed
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, concrete

Targets = Callable[[PyTree], Array]


def second(batch: PyTree) -> Array:
    """batch[1], of a batch (x, y)."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise TypeError(
            f"targets: expected a batch (x, y), whose batch[1] has the targets, got {type(batch).__name__}; "
            "say where they are, as in targets=lambda batch: batch['y']"
        )
    return batch[1]


@dataclass(frozen=True)
class Loss:
    """loss(outputs, batch) -> scalar; for one example with outputs z and targets y it knows

    value(z, y)    the loss, in nats
    root(z, u)     Ru, linear in u, with RᵀR = ∂²value/∂z²; no targets in it
    error(z, y)    e with Rᵀe = ∂value/∂z
    """

    value: Callable[[Array, Array], Array]
    root: Callable[[Array, Array], Array]
    error: Callable[[Array, Array], Array]
    targets: Targets
    mean: bool

    def __call__(self, outputs: Array, batch: PyTree) -> Array:
        """The sum or the mean over the examples."""
        values = jax.vmap(self.value)(_tree.raised(outputs), self.targets_for(outputs, batch))
        return jnp.mean(values) if self.mean else jnp.sum(values)

    def targets_for(self, outputs: Array, batch: PyTree) -> Array:
        """The targets; an error unless they fit the outputs."""
        if not hasattr(outputs, "shape"):
            raise TypeError(f"outputs: expected one array for a loss of metrics.losses, got {type(outputs).__name__}")
        given, softmax = self.targets(batch), self.value is _softmax_value
        y, shape = jnp.asarray(given), jnp.shape(outputs)
        seen = np.asarray(given) if concrete(given) else None
        if softmax and len(shape) < 2:
            raise ValueError(f"outputs: expected logits (n, …, classes), got shape {shape}")
        labels = softmax and jnp.issubdtype(y.dtype, jnp.integer)
        expected = shape[:-1] if labels else shape
        if y.shape != expected:
            hint = " Labels are integers." if softmax and y.shape == shape[:-1] else ""
            raise ValueError(f"targets: expected shape {expected} for outputs of {shape}, got {y.shape}.{hint}")
        if labels and seen is not None and seen.size and not 0 <= seen.min() <= seen.max() < shape[-1]:
            raise ValueError(f"targets: expected labels from 0 to {shape[-1] - 1}, got {seen.min()} to {seen.max()}")
        return y


def squares(targets: Targets = second, *, mean: bool = True) -> Loss:
    """½‖z − y‖² for each example. Hessian 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.metrics import losses
        >>> z, y = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [0.0]])
        >>> float(losses.squares()(z, (None, y)))
        2.5
    """
    return Loss(_squares_value, _squares_root, _squares_error, targets, mean)


def softmax_cross_entropy(targets: Targets = second, *, mean: bool = True) -> Loss:
    """−Σ_c y_c log softmax(z)_c for each example; targets are integer labels, or probabilities that sum to one.

    Hessian diag(p) − ppᵀ, root rows √p_c (e_c − p): no epsilon, right for probabilities down to the smallest float.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.metrics import losses
        >>> z, y = jnp.zeros((1, 4)), jnp.array([2])
        >>> round(float(losses.softmax_cross_entropy()(z, (None, y))), 4)
        1.3863
    """
    return Loss(_softmax_value, _softmax_root, _softmax_error, targets, mean)


def sigmoid_cross_entropy(targets: Targets = second, *, mean: bool = True) -> Loss:
    """−Σ y log σ(z) + (1 − y) log σ(−z) for each example, targets in [0, 1]. Hessian σ(z)σ(−z).

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.metrics import losses
        >>> z, y = jnp.zeros((2, 1)), jnp.array([[1.0], [0.0]])
        >>> round(float(losses.sigmoid_cross_entropy(mean=False)(z, (None, y))), 4)
        1.3863
    """
    return Loss(_sigmoid_value, _sigmoid_root, _sigmoid_error, targets, mean)


def poisson(targets: Targets = second, *, mean: bool = True) -> Loss:
    """Σ e^z − y z for each example: counts y of rate e^z, up to log y!. Hessian e^z.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.metrics import losses
        >>> float(losses.poisson()(jnp.zeros((1, 1)), (None, jnp.array([[3.0]]))))
        1.0
    """
    return Loss(_poisson_value, _poisson_root, _poisson_error, targets, mean)


def _squares_value(z: Array, y: Array) -> Array:
    return 0.5 * jnp.sum(jnp.square(z - y))


def _squares_root(z: Array, u: Array) -> Array:
    return u


def _squares_error(z: Array, y: Array) -> Array:
    return z - y


def _softmax_value(z: Array, y: Array) -> Array:
    y = _probabilities(z, y)
    # Not 0 · log 0 for a class that is masked by a logit of −∞.
    return -jnp.sum(jnp.where(y == 0, 0, y * jnp.where(y == 0, 0, jax.nn.log_softmax(z))))


def _softmax_root(z: Array, u: Array) -> Array:
    p = jax.nn.softmax(z)
    return jnp.sqrt(p) * (u - jnp.sum(p * u, axis=-1, keepdims=True))


def _softmax_error(z: Array, y: Array) -> Array:
    half = jax.nn.log_softmax(z) / 2
    return jnp.exp(half) - _divided(_probabilities(z, y), half)


def _probabilities(z: Array, y: Array) -> Array:
    """The targets as probabilities: NaN for a label out of range, and for what does not sum to one."""
    p = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype) if y.ndim < z.ndim else y.astype(z.dtype)
    total = jnp.sum(p, axis=-1, keepdims=True)
    # Selected, not multiplied: XLA takes a product with one_hot for a selection, and 0 · NaN for 0.
    return jnp.where(jnp.abs(total - 1) <= jnp.finfo(z.dtype).eps ** 0.5, p, jnp.nan)


def _sigmoid_value(z: Array, y: Array) -> Array:
    return -jnp.sum(y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z))


def _sigmoid_root(z: Array, u: Array) -> Array:
    return jnp.exp((jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z)) / 2) * u


def _sigmoid_error(z: Array, y: Array) -> Array:
    return _divided(1 - y, -z / 2) - _divided(y, z / 2)


def _poisson_value(z: Array, y: Array) -> Array:
    return jnp.sum(jnp.exp(z) - y * z)


def _poisson_root(z: Array, u: Array) -> Array:
    return jnp.exp(z / 2) * u


def _poisson_error(z: Array, y: Array) -> Array:
    return jnp.exp(z / 2) - _divided(y, z / 2)


def _divided(y: Array, log_scale: Array) -> Array:
    """y / exp(log_scale), 0 for y = 0 whatever the scale."""
    return jnp.where(y == 0, 0, y * jnp.exp(-log_scale))
