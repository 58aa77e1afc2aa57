"""Objectives of variational inference, in nats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax._tree import PyTree, chunked_sum, leading_axis
from natgrad_jax.metrics import LogProb, check_log_prob, check_weights

LogDensity = Callable[..., Array]


def exact_kl(
    log_prob: LogProb,
    log_density: LogDensity,
    support: PyTree,
    *,
    weights: Array | None = None,
    chunk_size: int | None = None,
) -> Callable[[PyTree], Array]:
    """KL(q_θ‖p̃) = Σ_x w(x) q(x) (log q(x) − log p̃(x)) over a finite support or quadrature nodes.

    For an unnormalised p̃ = Z·p this is KL(q‖p) − log Z, minus the ELBO.

    Args:
        log_prob: log q, log_prob(params, x) for one x, normalised over the support.
        log_density: log p̃(x) for one x; −inf is allowed, and gives +inf where q > 0.
        support: every x on the leading axis of each leaf.
        weights: quadrature weights w(x) ≥ 0, shape (n,), for densities on nodes; 1 when left out.
        chunk_size: points per chunk: bounds the memory of the sum and of its gradient.

    Returns:
        kl(params) -> scalar, nats. Cost: n evaluations of both. A q = 0 contributes 0.

    Raises:
        ValueError: `support` without a common leading axis, `log_prob` not scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_q = lambda logits, k: jax.nn.log_softmax(logits)[k]
        >>> kl = ng.inference.exact_kl(log_q, lambda k: jnp.log(0.5), jnp.arange(2))
        >>> float(kl(jnp.zeros(2)))
        0.0
    """
    n = leading_axis(support, "support")
    if weights is not None:
        check_weights(weights, ((n,),), "weights")

    def kl(params: PyTree) -> Array:
        check_log_prob(log_prob, params, support)

        def term(x: PyTree, weight: Array) -> Array:
            log_q = log_prob(params, x)
            massive = jnp.exp(log_q) > 0
            gap = jnp.where(massive, log_q, 0) - jnp.where(massive, log_density(x), 0)
            return jnp.where(massive, weight.astype(log_q.dtype) * jnp.exp(log_q) * gap, 0)

        points = (support, jnp.ones(n) if weights is None else jnp.asarray(weights))
        return chunked_sum(lambda chunk: jnp.sum(jax.vmap(term)(*chunk)), points, chunk_size)

    return kl


def elbo(family: Any, log_density: LogDensity, num_samples: int) -> Callable[[PyTree, Array], Array]:
    """Monte-Carlo estimate of the evidence lower bound, E_q[log p̃(x) − log q(x)], made for differentiation.

    Its gradient is the score-difference ("sticking the landing") estimator, which has no variance where q = p̃, for
    families with differentiable draws, and the score-function estimator with a leave-one-out baseline for others.

    Args:
        family: of `families`.
        log_density: log p̃(x) for one x.
        num_samples: number of draws; at least 2 for families without differentiable draws.

    Returns:
        elbo(params, key) -> scalar, nats, a mean over the draws. Maximise it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_mean_field(2)
        >>> elbo = ng.inference.elbo(family, lambda x: -0.5 * x @ x, num_samples=4)
        >>> round(float(elbo(family.init(), jax.random.key(0))), 4)
        1.8379

    Reference: Roeder, Wu, Duvenaud, "Sticking the landing" (2017), equation 7.
    """
    least = 1 if family.reparameterised else 2
    if num_samples < least:
        raise ValueError(f"num_samples: expected at least {least}, got {num_samples}")

    def estimate(params: PyTree, key: Array) -> Array:
        fixed = jax.lax.stop_gradient(params)
        draws = family.sample(params, key, num_samples)
        gaps = jax.vmap(lambda x: log_density(x) - family.log_prob(fixed, x))(draws)
        if family.reparameterised:
            return jnp.mean(gaps)
        gaps, draws = jax.lax.stop_gradient((gaps, draws))
        advantage = (gaps - jnp.mean(gaps)) * num_samples / (num_samples - 1)
        surrogate = jnp.mean(advantage * jax.vmap(lambda x: family.log_prob(params, x))(draws))
        return jnp.mean(gaps) + surrogate - jax.lax.stop_gradient(surrogate)

    return estimate
