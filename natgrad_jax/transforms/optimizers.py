"""The ready optimizers: a metric, a solver and a learning rate in one line."""

from typing import Any

import optax

from natgrad_jax._tree import surely
from natgrad_jax.damping import Number, Rule
from natgrad_jax.metrics import Metric
from natgrad_jax.transforms.core import Transformation, precondition, scale_step, with_metric
from natgrad_jax.transforms.lengths import trust_region
from natgrad_jax.transforms.shared import check_number


def scale_by_metric(
    metric: Metric | None, *, solver: Any = None, damping: "Rule | Number | None" = None
) -> Transformation:
    """Replaces the gradient g by (G + λD)⁻¹g: `with_metric(metric, precondition(solver, damping))`.

    The sign is that of the gradient: chain `optax.scale(-learning_rate)` afterwards.

    Args:
        metric: metric(params, **data) -> operator; None for one that each `update` is given as `operator=`.
        solver: one of `solvers`; None picks by structure.
        damping: None (as little as the arithmetic allows), a number (relative, λ·diag G) or a rule of `damping`;
            `update(..., damping=λ)` replaces its strength for one step.

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
    metric: Metric | None,
    *,
    solver: Any = None,
    damping: "Rule | Number | None" = None,
    max_kl: Number | None = None,
) -> Transformation:
    """Natural gradient descent: θ ← θ − η (G + λD)⁻¹ ∇L, with ½sᵀGs ≤ max_kl for the whole step s.

    Args:
        learning_rate: η ≥ 0, a number or a schedule; dimensionless. 1 is exact for L quadratic with Hessian G.
        metric: metric(params, **data) -> operator, such as `metrics.fisher(log_prob, support)`; None for one that each
            `update` is given as `operator=`.
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
    if not callable(learning_rate):
        check_number(learning_rate, "learning_rate")
    if not callable(learning_rate) and surely(learning_rate, lambda x: not x >= 0):
        raise ValueError(
            f"learning_rate: expected a number ≥ 0 or a schedule, got {learning_rate}; "
            "the minus sign of descent is put in here"
        )
    # The sign stands inside, so that what comes out can still be wrapped, in `every_k` or `average`.
    downhill = (lambda count: -learning_rate(count)) if callable(learning_rate) else -learning_rate
    inner = scale_step(precondition(solver, damping), downhill)
    return with_metric(metric, inner if max_kl is None else trust_region(inner, max_kl))
