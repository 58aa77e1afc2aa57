"""Is it a Fisher matrix? Three builders that must agree, and the conditions under which they do."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import OneExample, PyTree, Space, leading_axis
from natgrad_jax.metrics.fisher import LogProb, log_weights
from natgrad_jax.metrics.shared import check_log_prob


class FisherReport(NamedTuple):
    """What `check_fisher` found. Numbers are relative: F_ij is measured in units of √(F_ii F_jj).

    Attributes:
        fine: whether nothing is wrong.
        failures: what is, a sentence for each.
        matrices: F by each builder, (p, p): "scores" E[ssᵀ], "hessian" −E[∇² log q], "divergence" ∇²KL(q_θ'‖q_θ).
        differences: the largest entry of the difference between each of the other two and "scores".
        mean_score: the largest |E[s_i]|/√F_ii.
        total: Σ w q.
        moved: points of the support that gain or lose all probability when θ moves a little.
        tolerance: what the numbers are compared with.
    """

    fine: bool
    failures: list[str]
    matrices: dict[str, np.ndarray]
    differences: dict[str, float]
    mean_score: float
    total: float
    moved: int
    tolerance: float

    def __str__(self) -> str:
        head = "Fisher information: " + ("fine" if self.fine else f"{len(self.failures)} of the checks failed")
        numbers = [
            f"total probability {self.total:.12g}",
            f"mean score {self.mean_score:.2e} (of √F_ii)",
            *(f"{name} differs from scores by {gap:.2e}" for name, gap in self.differences.items()),
            f"support moves at {self.moved} points",
        ]
        return "\n".join([head, *(f"  FAILED {failure}" for failure in self.failures), *(f"  {x}" for x in numbers)])


def check_fisher(
    log_prob: LogProb,
    params: PyTree,
    support: PyTree,
    *,
    weights: Array | None = None,
    normalized: bool = True,
    tolerance: float | None = None,
) -> FisherReport:
    """Whether a log-density has a Fisher information, and the three ways to build it agree.

        F = E[s sᵀ] = −E[∇² log q] = ∇²_θ' KL(q_θ'‖q_θ) at θ' = θ,    with Σ q = 1, E[s] = 0, a support without θ

    The first is what this library builds. A density with a kink (Laplace, in its location) has the first and not the
    second; one whose support moves with θ (uniform on [0, θ]) has none: try `wasserstein_1d`. The report says which
    failed and by how much, and averages nothing away.

    Args:
        log_prob: log_prob(params, x) for one x.
        params: pytree of real floating-point leaves.
        support: every x on the leading axis, or quadrature nodes.
        weights: quadrature weights, (n,).
        normalized: False for log φ; then q = φ/Σwφ is checked.
        tolerance: of relative differences; the square root of the machine epsilon when left out.

    Returns:
        `FisherReport`; print it.

    Cost: n gradients and n·p Hessian products; p up to hundreds.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> y = jnp.exp(jnp.linspace(-20.0, 3.0, 200))  # both sides of the kink, with weights |dx|
        >>> x, weights = jnp.concatenate([-y, y]), 23 / 199 * jnp.concatenate([y, y])
        >>> laplace = lambda loc, x: -jnp.abs(x - loc) - jnp.log(2.0)
        >>> report = ng.check_fisher(laplace, jnp.array(0.0), x, weights=weights)
        >>> [failure.split(":")[0] for failure in report.failures]
        ['hessian', 'divergence']
        >>> [round(abs(float(F[0, 0])), 2) for F in report.matrices.values()]
        [1.0, 0.0, 2.0]

    Reference: Lehmann, Casella, "Theory of point estimation" (1998), lemma 2.5.3.
    """
    leading_axis(support, "support")
    check_log_prob(log_prob, params, support)
    log_w = log_weights(weights, support)
    space, theta = Space.of(params), _tree.raised(params)
    log_q = _log_q(log_prob, space, support, log_w, normalized)
    found = jax.device_get(jax.jit(lambda t: _measure(log_q, t))(space.ravel(theta)))
    eps = float(jnp.finfo(space.dtype).eps)
    limit = eps**0.5 if tolerance is None else tolerance
    matrices = {name: np.asarray(found[name]) for name in ("scores", "hessian", "divergence")}
    # Where the scores say 0 and another builder does not, that is no agreement: then its units.
    own = np.diagonal(matrices["scores"])
    largest = np.max([np.abs(np.diagonal(matrix)) for matrix in matrices.values()], axis=0)
    unit = np.sqrt(np.where(own > 0, own, largest))
    inverse = np.where(unit > 0, 1 / np.where(unit > 0, unit, 1), 0)
    differences = {
        name: float(np.max(np.abs(matrices[name] - matrices["scores"]) * inverse * inverse[:, None], initial=0))
        for name in ("hessian", "divergence")
    }
    mean_score = float(np.max(np.abs(found["mean"]) * inverse, initial=0))
    moved = _moved(log_q, np.asarray(space.ravel(theta)), inverse)
    total = float(found["total"])
    failures = list(_failures(matrices, differences, mean_score, total, moved, limit))
    return FisherReport(not failures, failures, matrices, differences, mean_score, total, moved, limit)


def check_rows(f: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree) -> float:
    """How far f(params, batch) is from what f gives for each example by itself, which is what the metrics use.

    0 to rounding for a model that treats examples alike; batch normalisation, in-batch negatives and the like mix them,
    and a metric built from their rows is that of another model: use their evaluation mode.

    Args:
        f: f(params, batch) -> outputs on the leading axis, or a pytree of such.
        params: where.
        batch: n ≥ 2 examples.

    Returns:
        The largest |f(params, batch)_i − f(params, batch[i:i+1])_0| over the largest |f|.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> centred = lambda w, x: w * (x - jnp.mean(x))
        >>> float(ng.metrics.check_rows(centred, jnp.array(2.0), jnp.array([1.0, 3.0])))
        1.0
    """
    n, one = leading_axis(batch, "batch"), OneExample(f, "f")
    if n < 2:
        raise ValueError("batch: expected at least two examples, got one; by itself nothing can be mixed")
    together, alone = f(params, batch), jax.vmap(lambda x: one(params, x))(batch)
    shapes = [jax.tree.map(jnp.shape, x) for x in (together, alone)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"f: expected outputs {shapes[1]}, one for each example, got {shapes[0]} for the whole batch")
    gap = _tree.largest(jax.tree.map(jnp.subtract, together, alone))
    size = _tree.largest(together)
    return float(gap / jnp.where(size > 0, size, 1))


def _log_q(
    log_prob: LogProb, space: Space, support: PyTree, log_w: Array, normalized: bool
) -> Callable[[Array], Array]:
    """θ ↦ log(wq) at every point, θ flat."""

    def log_q(theta: Array) -> Array:
        values = jax.vmap(lambda x: log_prob(space.unravel(theta), x))(support)
        values = values + log_w.astype(values.dtype)
        return values if normalized else jax.nn.log_softmax(values)

    return log_q


def _measure(log_q: Callable[[Array], Array], theta: Array) -> dict[str, Array]:
    at = log_q(theta)
    q = jnp.exp(at)
    massive = q > 0
    only = lambda x: jnp.where(massive.reshape(-1, *[1] * (x.ndim - 1)), x, 0)  # noqa: E731
    scores = only(jax.jacrev(log_q)(theta))
    # Points without mass have log q = −inf: what they are worth is 0 · log 0 = 0, and so are its derivatives.
    expected = lambda t: jnp.sum(jnp.where(massive, q * jnp.where(massive, log_q(t), 0), 0))  # noqa: E731

    def divergence(t: Array) -> Array:
        moved = jnp.where(massive, log_q(t), 0)
        return jnp.sum(jnp.where(massive, jnp.exp(moved) * (moved - jnp.where(massive, at, 0)), 0))

    return {
        "total": jnp.sum(q),
        "mean": q @ scores,
        "scores": (scores * q[:, None]).T @ scores,
        "hessian": -jax.hessian(expected)(theta),
        "divergence": jax.hessian(divergence)(theta),
    }


def _moved(log_q: Callable[[Array], Array], theta: np.ndarray, unit: np.ndarray) -> int:
    """The number of points that gain or lose all probability when one parameter moves a little.

    By a hundredth of its scale 1/√F_ii; where there is none by a tenth of itself, or of one.
    """
    empty = jax.jit(lambda t: jnp.isneginf(log_q(t)))
    here = np.asarray(empty(jnp.asarray(theta)))
    step = np.where(unit > 0, 0.01 * unit, 0.1 * np.where(theta != 0, np.abs(theta), 1))
    moves = [sign * step[i] * np.eye(theta.size)[i] for i in range(theta.size) for sign in (1, -1)]
    changed = [np.asarray(empty(jnp.asarray(theta + move, theta.dtype))) != here for move in moves]
    return int(np.sum(np.any(changed, axis=0))) if moves else 0


def _failures(
    matrices: dict[str, np.ndarray],
    differences: dict[str, float],
    mean_score: float,
    total: float,
    moved: int,
    limit: float,
) -> Iterator[str]:
    # Written so that NaN fails.
    if not abs(total - 1) <= limit:
        yield f"total probability: expected 1, got {total:.6g} (off by {total - 1:.2e}); normalise, or normalized=False"
    if not all(np.isfinite(matrix).all() for matrix in matrices.values()):
        yield (
            "scores: not finite at some point with probability; where a probability is zero, use its amplitude: "
            "pullback(lambda params: 2 * root_q(params))"
        )
    if moved:
        yield (
            f"support: {moved} points gain or lose all probability when θ moves, so that there is no Fisher "
            "information; measure by wasserstein_1d"
        )
    if not mean_score <= limit:
        yield (
            f"mean score: expected E[s] = 0, got up to {mean_score:.2e} of √F_ii; log q may not be normalised for "
            "every θ, its support may move, or the nodes may be too coarse"
        )
    names = {"hessian": "−E[∇² log q]", "divergence": "∇²KL(q_θ'‖q_θ)"}
    for name, gap in differences.items():
        if not gap <= limit:
            yield f"{name}: {names[name]} differs from E[ssᵀ] by {gap:.2e} of √(F_ii F_jj); log q may have a kink"
