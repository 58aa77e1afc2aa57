"""What a fit returns: the approximation, how it ended, and what can be asked of it."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax._tree import PyTree, concrete
from natgrad_jax.inference import diagnostics


class Status(enum.IntEnum):
    """How a fit ended.

    CONVERGED: the estimated gap to the optimum is below the tolerance.
    STEP_LIMIT: `max_steps` evaluations were not enough.
    NON_FINITE: log_density or its gradient is NaN or infinite where q has mass.
    TRUST_LIMITED: the trust region stopped it: at the last step it still shortened every step (a start that is too far
        away, or a target without a maximum: an improper one), or no step was accepted twenty times in a row.
    """

    CONVERGED = 0
    STEP_LIMIT = 1
    NON_FINITE = 2
    TRUST_LIMITED = 3


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "params", "elbo", "final_elbo", "final_error", "status", "natural_norm", "khat", "relative_ess",
        "steps", "rejected", "skipped", "gradients", "hessian_products", "path",
    ],
    meta_fields=["family"],
)  # fmt: skip
@dataclass(frozen=True)
class FitResult:
    """What `fit` returns; arrays with a leading axis under `vmap`.

    Attributes:
        params: parameters of the family: the average of the last iterates.
        elbo: history, the estimate at the last accepted point after each step, in nats; NaN after the last step;
            shape (max_steps,). Minus the objective, from `minimise`.
        final_elbo: estimate at `params` from fresh draws, nats.
        final_error: its standard error.
        status: a `Status`, as an integer array.
        natural_norm: gᵀF⁻¹g near the end, nats (twice the estimated gap); may be slightly negative by noise.
        khat: Pareto k̂ of p̃/q at the fresh draws: how far q can be trusted, see `reading`. NaN from `minimise`.
        relative_ess: effective sample size of the weights p̃/q at those draws, as a part of their number. Near 1 q is p
            nearly everywhere, and k̂ is the shape of next to nothing: it may be large by chance. NaN from `minimise`.
        steps: evaluations of the gradient estimate.
        rejected: steps taken back because the ELBO fell.
        skipped: evaluations that were not finite, and led to no step.
        gradients: gradients of log_density in all (values, with `score`; terms of the sum, with `exact`).
        hessian_products: Hessian-vector products, for the start and for `price`.
        path: the accepted parameters after each step, stacked, 0 after the last; None unless `keep_path`.
        family: the family; None from `minimise`.
    """

    params: PyTree
    elbo: Array
    final_elbo: Array
    final_error: Array
    status: Array
    natural_norm: Array
    khat: Array
    relative_ess: Array
    steps: Array
    rejected: Array
    skipped: Array
    gradients: Array
    hessian_products: Array
    path: PyTree
    family: Any

    @property
    def converged(self) -> Array:
        """status == Status.CONVERGED."""
        return self.status == Status.CONVERGED

    def sample(self, key: Array, n: int) -> PyTree:
        """n draws from the fitted q; of a single fit, not of a vmapped one (vmap over it)."""
        self._single()
        return self.family.sample(self.params, key, n)

    def log_prob(self, x: PyTree) -> Array:
        """log q(x) for one x."""
        return self.family.log_prob(self.params, x)

    def summary(
        self,
        key: Array,
        n: int = 4000,
        constrain: Callable[[PyTree], PyTree] | None = None,
        names: list[str] | None = None,
    ) -> diagnostics.Summary:
        """A table of means, standard deviations and quantiles of n draws, after `constrain` if that is given."""
        return diagnostics.summary(self._draws(key, n, constrain), names)

    def to_arviz(self, key: Array, n: int = 1000, constrain: Callable[[PyTree], PyTree] | None = None) -> Any:
        """n draws, after `constrain` if that is given, as one chain of an ArviZ data set."""
        return diagnostics.to_arviz(self._draws(key, n, constrain))

    def _draws(self, key: Array, n: int, constrain: Callable[[PyTree], PyTree] | None) -> PyTree:
        draws = self.sample(key, n)
        return draws if constrain is None else constrain(draws)

    def _single(self) -> None:
        if self.status.ndim:
            raise ValueError(
                f"result: expected a single fit, got one with leading axes {self.status.shape}; "
                "take a lane, jax.tree.map(lambda x: x[i], result), or inference.best_of(result)"
            )

    def save(self, path: Any) -> None:
        """Writes every array to one .npz file; read it with `load`."""
        diagnostics.save(self, path)

    def __str__(self) -> str:
        if not concrete(self.status) or self.status.ndim:
            return f"FitResult({self.family}, status of shape {jnp.shape(self.status)})"
        return (
            f"{Status(int(self.status)).name.lower()} after {int(self.steps)} steps, {int(self.gradients)} gradients: "
            f"ELBO {float(self.final_elbo):.3f} ± {float(self.final_error):.3f} nats"
            + ("" if jnp.isnan(self.khat) else f", k̂ {float(self.khat):.2f} ({diagnostics.reading(self.khat)})")
            + ("" if jnp.isnan(self.khat) else f", effective sample size {float(self.relative_ess):.0%}")
            + (f", {int(self.skipped)} evaluations not finite" if int(self.skipped) else "")
        )


def best_of(result: FitResult) -> FitResult:
    """The fit with the highest final ELBO among those with one leading axis: restarts under `vmap`.

    What is not finite, or was stopped by the trust region (an ELBO that ran away), never wins; converged fits win over
    others.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(1)
        >>> log_density = lambda x: jnp.logaddexp(-0.5 * (x[0] - 4) ** 2, -1.0 - 0.5 * (x[0] + 4) ** 2)
        >>> start = lambda loc: ng.fit(log_density, family, jax.random.key(0), init=family.init(loc))
        >>> round(float(ng.inference.best_of(jax.vmap(start)(jnp.array([[-5.0], [5.0]]))).params.loc[0]))
        4
    """
    if result.status.ndim != 1:
        raise ValueError(f"result: expected fits along one leading axis, got a status of shape {result.status.shape}")
    value = jnp.where(jnp.isfinite(result.final_elbo), result.final_elbo, -jnp.inf)
    value = jnp.where(result.status >= Status.NON_FINITE, -jnp.inf, value)
    ended_well = result.converged & (value > -jnp.inf)
    value = jnp.where(ended_well | ~jnp.any(ended_well), value, -jnp.inf)
    best = jnp.argmax(value)
    return jax.tree.map(lambda x: x[best], result)


def load(path: Any, family: Any) -> FitResult:
    """Reads what `FitResult.save` wrote.

    Args:
        path: of the file; .npz is added where it is missing.
        family: the family of the fit, which is not in the file.

    Raises:
        ValueError: a file of another family.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_mean_field(2)
        >>> result = ng.fit(lambda x: -0.5 * x @ x, family, jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result.save(folder + "/fit.npz")
        ...     again = ng.inference.load(folder + "/fit.npz", family)
        >>> bool(again.final_elbo == result.final_elbo)
        True
    """
    if family is None:
        raise TypeError("family: expected the family of the fit; a result of minimise is read by diagnostics.load")
    stored = diagnostics.shapes(path)
    params = family.init()
    numbers: dict[str, Any] = dict.fromkeys((field.name for field in fields(FitResult)), 0.0)
    kept = any(name.startswith(".path") for name in stored)
    like = FitResult(**(numbers | {"params": params, "path": params if kept else None, "family": family}))
    found = lambda path, _: stored.get(jax.tree_util.keystr(path), jax.ShapeDtypeStruct((), jnp.float32))  # noqa: E731
    return diagnostics.load(path, jax.tree_util.tree_map_with_path(found, like))
