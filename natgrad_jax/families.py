"""Families of distributions q_θ whose geometry is known in closed form.

A family is a small hashable value: its methods are pure functions of the parameters. Each has

    init(loc, scale)            parameters to start from
    sample(params, key, n)      n draws on the leading axis
    log_prob(params, x)         log-density of one x, in nats
    fisher(params)              the Fisher information as an operator; also a metric
    retract(params, step)       a point of the family, params + step to first order, for a step of any size
    entropy(params)             in nats
    reparameterised             whether draws are differentiable functions of the parameters
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.tree_util import Partial

from natgrad_jax._tree import Space
from natgrad_jax.operators import Closed, Diagonal

LOG_2PI = math.log(2 * math.pi)


class FullRankParams(NamedTuple):
    """x = loc + L ε, L = tril(scale_tril): the entries above the diagonal are ignored."""

    loc: Array
    scale_tril: Array


class MeanFieldParams(NamedTuple):
    """x = loc + exp(log_scale) ε."""

    loc: Array
    log_scale: Array


def _dimension(d: int, name: str) -> int:
    if not isinstance(d, int) or d < 1:
        raise ValueError(f"{name}: expected a dimension d ≥ 1, got {d!r}")
    return d


def _filled(value: Any, default: float, shape: tuple[int, ...], name: str) -> Array:
    value = jnp.asarray(default if value is None else value)
    value = value.astype(jnp.result_type(float, value.dtype))
    if value.shape not in ((), shape):
        raise ValueError(f"{name}: expected a number or an array of shape {shape}, got shape {value.shape}")
    return jnp.broadcast_to(value, shape)


@dataclass(frozen=True)
class GaussianFullRank:
    """See `gaussian_full_rank`."""

    d: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> FullRankParams:
        """N(loc, scale²): loc 0 and scale 1 unless given; scale is a number, (d,), or a lower triangle (d, d)."""
        if scale is not None and jnp.shape(scale) == (self.d, self.d):
            return FullRankParams(_filled(loc, 0.0, (self.d,), "loc"), jnp.tril(jnp.asarray(scale)))
        return FullRankParams(_filled(loc, 0.0, (self.d,), "loc"), jnp.diag(_filled(scale, 1.0, (self.d,), "scale")))

    def sample(self, params: FullRankParams, key: Array, n: int) -> Array:
        """n draws, shape (n, d)."""
        eps = jax.random.normal(key, (n, self.d), params.loc.dtype)
        return params.loc + eps @ jnp.tril(params.scale_tril).T

    def log_prob(self, params: FullRankParams, x: Array) -> Array:
        """−½‖L⁻¹(x − μ)‖² − Σ log|L_ii| − (d/2) log 2π."""
        eps = solve_triangular(params.scale_tril, x - params.loc, lower=True)
        return -0.5 * (eps @ eps) - self.entropy(params) + self.d / 2

    def entropy(self, params: FullRankParams) -> Array:
        """Σ log|L_ii| + (d/2)(1 + log 2π)."""
        return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(params.scale_tril)))) + self.d / 2 * (1 + LOG_2PI)

    def fisher(self, params: FullRankParams) -> Closed:
        """F in the coordinates (μ, L): products and solves in O(d³), the p×p matrix is never formed."""
        return Closed(Partial(_full_rank_mv, params), Partial(_full_rank_solve, params), Space.of(params))

    def retract(self, params: FullRankParams, step: FullRankParams) -> FullRankParams:
        """μ + δμ, and L·R with R lower triangular and diagonal exp((L⁻¹δL)_ii): never leaves the family."""
        lower = jnp.tril(params.scale_tril)
        relative = solve_triangular(lower, jnp.tril(step.scale_tril), lower=True)
        factor = jnp.tril(relative, -1) + jnp.diag(jnp.exp(jnp.diagonal(relative)))
        return FullRankParams(params.loc + step.loc, lower @ factor)


def _half_lower(matrix: Array) -> Array:
    """Φ: the lower triangle with halved diagonal."""
    return jnp.tril(matrix) - 0.5 * jnp.diag(jnp.diagonal(matrix))


def _full_rank_solve(params: FullRankParams, g: FullRankParams) -> FullRankParams:
    """F⁻¹g = (LLᵀ g_μ, L Φ(Lᵀ G_L))."""
    lower = jnp.tril(params.scale_tril)
    whitened = lower.T @ jnp.tril(g.scale_tril)
    return FullRankParams(lower @ (lower.T @ g.loc), lower @ _half_lower(whitened))


def _full_rank_mv(params: FullRankParams, v: FullRankParams) -> FullRankParams:
    """Fv: with S = L⁻¹V_L the norm is ‖L⁻¹v_μ‖² + ‖S‖² + ‖diag S‖², so Fv = (L⁻ᵀL⁻¹v_μ, tril L⁻ᵀ(S + diag S))."""
    lower = jnp.tril(params.scale_tril)
    adjoint = lambda x: solve_triangular(lower, x, lower=True, trans=1)  # noqa: E731
    relative = solve_triangular(lower, jnp.tril(v.scale_tril), lower=True)
    both = relative + jnp.diag(jnp.diagonal(relative))
    return FullRankParams(adjoint(solve_triangular(lower, v.loc, lower=True)), jnp.tril(adjoint(both)))


@dataclass(frozen=True)
class GaussianMeanField:
    """See `gaussian_mean_field`."""

    d: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> MeanFieldParams:
        """N(loc, diag(scale²)): loc 0 and scale 1 unless given."""
        scale = _filled(scale, 1.0, (self.d,), "scale")
        return MeanFieldParams(_filled(loc, 0.0, (self.d,), "loc"), jnp.log(scale))

    def sample(self, params: MeanFieldParams, key: Array, n: int) -> Array:
        """n draws, shape (n, d)."""
        return params.loc + jnp.exp(params.log_scale) * jax.random.normal(key, (n, self.d), params.loc.dtype)

    def log_prob(self, params: MeanFieldParams, x: Array) -> Array:
        """−½Σ((x − μ)/σ)² − Σ log σ − (d/2) log 2π."""
        eps = (x - params.loc) * jnp.exp(-params.log_scale)
        return -0.5 * jnp.sum(jnp.square(eps)) - self.entropy(params) + self.d / 2

    def entropy(self, params: MeanFieldParams) -> Array:
        """Σ log σ + (d/2)(1 + log 2π)."""
        return jnp.sum(params.log_scale) + self.d / 2 * (1 + LOG_2PI)

    def fisher(self, params: MeanFieldParams) -> Diagonal:
        """diag(σ⁻², 2) in the coordinates (μ, log σ)."""
        return Diagonal(MeanFieldParams(jnp.exp(-2 * params.log_scale), jnp.full_like(params.log_scale, 2.0)))

    def retract(self, params: MeanFieldParams, step: MeanFieldParams) -> MeanFieldParams:
        """params + step: (μ, log σ) is a global chart."""
        return jax.tree.map(jnp.add, params, step)


@dataclass(frozen=True)
class Bernoulli:
    """See `bernoulli`."""

    n: int
    values: tuple[float, float] = (0.0, 1.0)
    reparameterised = False

    @property
    def _gap(self) -> float:
        return self.values[1] - self.values[0]

    def init(self, loc: Any = None, scale: Any = None) -> Array:
        """Natural parameters θ, shape (n,): `loc` (0 unless given); there is no scale."""
        if scale is not None:
            raise ValueError("scale: a Bernoulli family has none, pass loc (the natural parameters) only")
        return _filled(loc, 0.0, (self.n,), "loc")

    def sample(self, params: Array, key: Array, n: int) -> Array:
        """n draws, shape (n, number of variables), with entries from `values`."""
        up = jax.random.bernoulli(key, jax.nn.sigmoid(self._gap * params), (n, self.n))
        return jnp.where(up, self.values[1], self.values[0]).astype(params.dtype)

    def log_prob(self, params: Array, x: Array) -> Array:
        """Σ log sigmoid(±(b − a)θ_i), plus where x_i = b, minus where x_i = a."""
        sign = (2 * jnp.asarray(x, params.dtype) - sum(self.values)) / self._gap
        return jnp.sum(jax.nn.log_sigmoid(sign * self._gap * params))

    def entropy(self, params: Array) -> Array:
        """Σ H(p_i)."""
        logit = self._gap * params
        return -jnp.sum(
            jax.nn.sigmoid(logit) * jax.nn.log_sigmoid(logit) + jax.nn.sigmoid(-logit) * jax.nn.log_sigmoid(-logit)
        )

    def fisher(self, params: Array) -> Diagonal:
        """diag((b − a)² p_i (1 − p_i)), the variances of x."""
        logit = self._gap * params
        return Diagonal(self._gap**2 * jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit))

    def retract(self, params: Array, step: Array) -> Array:
        """params + step: natural parameters are a global chart."""
        return params + step

    def support(self, dtype: Any = None) -> Array:
        """All 2ⁿ configurations, shape (2ⁿ, n)."""
        if self.n > 24:
            raise ValueError(f"n: the support of {self.n} variables has 2**{self.n} points; sample instead")
        return jnp.asarray(np.array(list(itertools.product(self.values, repeat=self.n))), dtype or float)


def gaussian_full_rank(d: int) -> GaussianFullRank:
    """N(μ, LLᵀ) on R^d with parameters (loc, scale_tril) = (μ, L), p = d + d(d+1)/2 of them in use.

    Fisher products and solves are closed-form, F⁻¹g = (LLᵀg_μ, LΦ(LᵀG_L)), O(d³) time and O(d²) memory.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(2)
        >>> round(float(family.log_prob(family.init(scale=2.0), family.init().loc)), 4)
        -3.2242
    """
    return GaussianFullRank(_dimension(d, "gaussian_full_rank"))


def gaussian_mean_field(d: int) -> GaussianMeanField:
    """N(μ, diag σ²) on R^d with parameters (loc, log_scale) = (μ, log σ) and Fisher information diag(σ⁻², 2).

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_mean_field(1)
        >>> round(float(family.fisher(family.init(scale=0.5)).entries.loc[0]), 4)
        4.0
    """
    return GaussianMeanField(_dimension(d, "gaussian_mean_field"))


def bernoulli(n: int, values: tuple[float, float] = (0.0, 1.0)) -> Bernoulli:
    """n independent two-valued variables, q(x) ∝ exp(θ·x) with x_i from `values`; θ is the parameter.

    values=(0, 1): θ is the logit, F = p(1 − p). values=(−1, 1): spins in a field h = θ, F = sech²h.

    Example:
        >>> import natgrad_jax as ng
        >>> spins = ng.families.bernoulli(2, values=(-1, 1))
        >>> spins.fisher(spins.init(0.0)).entries.tolist()
        [1.0, 1.0]
    """
    low, high = (float(v) for v in values)
    if not low < high:
        raise ValueError(f"values: expected two numbers, the smaller one first, got {values}")
    return Bernoulli(_dimension(n, "bernoulli"), (low, high))
