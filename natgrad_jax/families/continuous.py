"""Families on half-lines, intervals, simplices and circles: Gamma, inverse Gamma, Beta, Dirichlet, von Mises."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import digamma, gammaln, xlog1py, xlogy
from jax.tree_util import Partial

from natgrad_jax._tree import Space, surely
from natgrad_jax.families.shared import (
    LOG_2PI,
    closed,
    dimension,
    filled,
    grown,
    inside,
    inverse,
    located,
    no_scale,
    point,
    positive,
)
from natgrad_jax.families.special import (
    bessel_gap,
    bessel_ratio,
    bessel_slope,
    defect,
    excess_trigamma,
    log_bessel,
    log_minus_digamma,
    trigamma,
)
from natgrad_jax.operators import Closed, Diagonal


class GammaParams(NamedTuple):
    """Density ∝ x^(concentration − 1) e^(−rate·x)."""

    concentration: Array
    rate: Array


class InverseGammaParams(NamedTuple):
    """Density ∝ x^(−concentration − 1) e^(−scale/x)."""

    concentration: Array
    scale: Array


class BetaParams(NamedTuple):
    """Density ∝ x^(alpha − 1)(1 − x)^(beta − 1)."""

    alpha: Array
    beta: Array


class VonMisesParams(NamedTuple):
    """Density ∝ exp(concentration·cos(x − loc))."""

    loc: Array
    concentration: Array


def _gamma_mv(params: Any, v: Any) -> Any:
    """With w = δα/α − δβ/β the norm is (ψ₁(α) − 1/α)δα² + αw²: the mean and α are orthogonal."""
    alpha, beta = params
    w = v[0] / alpha - v[1] / beta
    return type(params)(excess_trigamma(alpha) / alpha * v[0] + w, -alpha / beta * w)


def _gamma_solve(params: Any, g: Any) -> Any:
    alpha, beta = params
    change = (g[0] + g[1] * beta / alpha) * alpha / excess_trigamma(alpha)
    w = -g[1] * beta / alpha
    return type(params)(change, beta * (change / alpha - w))


def _gamma_fisher(params: Any) -> Closed:
    return Closed(Partial(_gamma_mv, params), Partial(_gamma_solve, params), Space.of(params))


def _gamma_concentration(gap: Array) -> Array:
    """α with log α − ψ(α) = gap, which is nearly −log gap on logarithmic scales."""
    log_alpha = inverse(lambda u: -jnp.log(log_minus_digamma(jnp.exp(u))), -jnp.log(gap), -jnp.log(gap))
    return jnp.exp(log_alpha)


def _gamma_draws(alpha: Array, key: Array, n: int) -> Array:
    return jax.random.gamma(key, alpha, (n, *alpha.shape), alpha.dtype)


class _PairOfPositives:
    """Both parameters are positive numbers."""

    def retract(self, params: Any, step: Any) -> Any:
        """Each parameter p exp(step/p)."""
        return jax.tree.map(grown, params, step)


@dataclass(frozen=True)
class Gamma(_PairOfPositives):
    """See `gamma`."""

    n: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> GammaParams:
        """Mean `loc` and standard deviation `scale`, 1 unless given."""
        positive(loc, "loc")
        loc, scale = located(loc, scale, (self.n,), (1.0, 1.0))
        return GammaParams(jnp.square(loc / scale), loc / jnp.square(scale))

    def sample(self, params: GammaParams, key: Array, n: int) -> Array:
        """n draws, shape (n, number of variables)."""
        return inside(_gamma_draws(params.concentration, key, n) / params.rate)

    def log_prob(self, params: GammaParams, x: Array) -> Array:
        """Σ α log β − log Γ(α) + (α − 1) log x − βx."""
        x = point(x, (self.n,), params.rate.dtype)
        alpha, beta = params
        return jnp.sum(xlogy(alpha, beta) - gammaln(alpha) + xlogy(alpha - 1, x) - beta * x)

    def entropy(self, params: GammaParams) -> Array:
        """Σ α − log β + log Γ(α) + (1 − α)ψ(α)."""
        alpha, beta = params
        return jnp.sum(alpha - jnp.log(beta) + gammaln(alpha) + (1 - alpha) * digamma(alpha))

    def fisher(self, params: GammaParams) -> Closed:
        """[[ψ₁(α), −1/β], [−1/β, α/β²]] for each variable, in O(n)."""
        return _gamma_fisher(params)

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """T(x) = (log x, x)."""
        return jnp.log(x), x

    def to_natural(self, params: GammaParams) -> tuple[Array, Array]:
        """(α, −β)."""
        return params.concentration, -params.rate

    def from_natural(self, natural: tuple[Array, Array]) -> GammaParams:
        """The inverse of `to_natural`."""
        return GammaParams(natural[0], -natural[1])

    def to_mean(self, params: GammaParams) -> tuple[Array, Array]:
        """(E log x, E x) = (ψ(α) − log β, α/β)."""
        alpha, beta = params
        return digamma(alpha) - jnp.log(beta), alpha / beta

    def from_mean(self, mean: tuple[Array, Array]) -> GammaParams:
        """The inverse of `to_mean`, by Newton's method for log α − ψ(α) = log E x − E log x."""
        alpha = _gamma_concentration(jnp.log(mean[1]) - mean[0])
        return GammaParams(alpha, alpha / mean[1])


@dataclass(frozen=True)
class InverseGamma(_PairOfPositives):
    """See `inverse_gamma`."""

    n: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> InverseGammaParams:
        """Mean `loc` and standard deviation `scale`, 1 unless given."""
        positive(loc, "loc")
        loc, scale = located(loc, scale, (self.n,), (1.0, 1.0))
        alpha = 2 + jnp.square(loc / scale)
        return InverseGammaParams(alpha, loc * (alpha - 1))

    def sample(self, params: InverseGammaParams, key: Array, n: int) -> Array:
        """n draws, shape (n, number of variables)."""
        return inside(params.scale / inside(_gamma_draws(params.concentration, key, n)))

    def log_prob(self, params: InverseGammaParams, x: Array) -> Array:
        """Σ α log β − log Γ(α) − (α + 1) log x − β/x."""
        x = point(x, (self.n,), params.scale.dtype)
        alpha, beta = params
        return jnp.sum(xlogy(alpha, beta) - gammaln(alpha) - xlogy(alpha + 1, x) - beta / x)

    def entropy(self, params: InverseGammaParams) -> Array:
        """Σ α + log β + log Γ(α) − (1 + α)ψ(α)."""
        alpha, beta = params
        return jnp.sum(alpha + jnp.log(beta) + gammaln(alpha) - (1 + alpha) * digamma(alpha))

    def fisher(self, params: InverseGammaParams) -> Closed:
        """[[ψ₁(α), −1/β], [−1/β, α/β²]] for each variable, in O(n)."""
        return _gamma_fisher(params)

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """T(x) = (−log x, 1/x)."""
        return -jnp.log(x), 1 / x

    def to_natural(self, params: InverseGammaParams) -> tuple[Array, Array]:
        """(α, −β)."""
        return params.concentration, -params.scale

    def from_natural(self, natural: tuple[Array, Array]) -> InverseGammaParams:
        """The inverse of `to_natural`."""
        return InverseGammaParams(natural[0], -natural[1])

    def to_mean(self, params: InverseGammaParams) -> tuple[Array, Array]:
        """(−E log x, E 1/x) = (ψ(α) − log β, α/β)."""
        alpha, beta = params
        return digamma(alpha) - jnp.log(beta), alpha / beta

    def from_mean(self, mean: tuple[Array, Array]) -> InverseGammaParams:
        """The inverse of `to_mean`, as for `gamma`."""
        alpha = _gamma_concentration(jnp.log(mean[1]) - mean[0])
        return InverseGammaParams(alpha, alpha / mean[1])


# Concentrations on the last axis, F = diag ψ₁(α) − ψ₁(Σα)11ᵀ. By Sherman and Morrison its inverse needs
# 1 − ψ₁(Σα) Σ 1/ψ₁(α), which is ψ₁(Σα)(Σ δ(α) − δ(Σα)) with δ(x) = x − 1/ψ₁(x) in [0, ½]: there nothing cancels.


def _dirichlet_mv(alpha: Array, v: Array) -> Array:
    return trigamma(alpha) * v - (trigamma(alpha.sum(-1)) * v.sum(-1))[..., None]


def _dirichlet_solve(alpha: Array, g: Array) -> Array:
    inverse_trigamma = 1 / trigamma(alpha)
    spread = defect(alpha).sum(-1) - defect(alpha.sum(-1))
    common = jnp.sum(inverse_trigamma * g, axis=-1) / spread
    return inverse_trigamma * (g + common[..., None])


def _dirichlet_to_mean(alpha: Array) -> Array:
    return digamma(alpha) - digamma(alpha.sum(-1))[..., None]


def _dirichlet_from_mean(mean: Array) -> Array:
    """Newton's method on the concave log-likelihood, each concentration changed by e² at most; differentiable."""

    def gap(alpha: Array) -> Array:
        return _dirichlet_to_mean(alpha) - mean

    def newton(gap: Any, alpha: Array) -> Array:
        def improved(_: int, alpha: Array) -> Array:
            return alpha * jnp.exp(jnp.clip(-_dirichlet_solve(alpha, gap(alpha)) / alpha, -2, 2))

        return jax.lax.fori_loop(0, 60, improved, alpha)

    def tangent(linear: Any, y: Array) -> Array:
        size = y.shape[-1]
        columns = [linear(jnp.zeros_like(y).at[..., i].set(1)) for i in range(size)]
        return jnp.linalg.solve(jnp.stack(columns, -1), y[..., None])[..., 0]

    return jax.lax.custom_root(gap, jnp.ones_like(mean), newton, tangent)


def _log_beta(alpha: Array) -> Array:
    """log of the normaliser ΠΓ(α)/Γ(Σα)."""
    return jnp.sum(gammaln(alpha), axis=-1) - gammaln(alpha.sum(-1))


def _dirichlet_entropy(alpha: Array) -> Array:
    return _log_beta(alpha) - jnp.sum((alpha - 1) * _dirichlet_to_mean(alpha), axis=-1)


@dataclass(frozen=True)
class Beta(_PairOfPositives):
    """See `beta`."""

    n: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> BetaParams:
        """Mean `loc` and standard deviation `scale`, that of a uniform distribution unless given."""
        loc, scale = located(loc, scale, (self.n,), (0.5, 12**-0.5))
        total = loc * (1 - loc) / jnp.square(scale) - 1
        if surely(total, lambda x: not np.all(x > 0)):
            raise ValueError(f"scale: expected less than √(loc(1 − loc)) with loc in (0, 1), got {scale} at {loc}")
        return BetaParams(loc * total, (1 - loc) * total)

    def sample(self, params: BetaParams, key: Array, n: int) -> Array:
        """n draws, shape (n, number of variables)."""
        return inside(jax.random.beta(key, params.alpha, params.beta, (n, self.n), params.alpha.dtype), 1.0)

    def log_prob(self, params: BetaParams, x: Array) -> Array:
        """Σ (α − 1) log x + (β − 1) log(1 − x) − log B(α, β)."""
        x = point(x, (self.n,), params.alpha.dtype)
        powers = xlogy(params.alpha - 1, x) + xlog1py(params.beta - 1, -x)
        return jnp.sum(powers - _log_beta(self._stacked(params)))

    def entropy(self, params: BetaParams) -> Array:
        """Σ log B − (α − 1)E log x − (β − 1)E log(1 − x)."""
        return jnp.sum(_dirichlet_entropy(self._stacked(params)))

    def _stacked(self, params: BetaParams) -> Array:
        return jnp.stack(params, axis=-1)

    def _split(self, alpha: Array) -> BetaParams:
        return BetaParams(alpha[..., 0], alpha[..., 1])

    def fisher(self, params: BetaParams) -> Closed:
        """diag(ψ₁(α), ψ₁(β)) − ψ₁(α + β)11ᵀ for each variable, in O(n)."""
        return closed(self, params)

    def _mv(self, params: BetaParams, v: BetaParams) -> BetaParams:
        return self._split(_dirichlet_mv(self._stacked(params), self._stacked(v)))

    def _solve(self, params: BetaParams, g: BetaParams) -> BetaParams:
        return self._split(_dirichlet_solve(self._stacked(params), self._stacked(g)))

    def statistics(self, x: Array) -> BetaParams:
        """T(x) = (log x, log(1 − x))."""
        return BetaParams(jnp.log(x), jnp.log1p(-x))

    def to_natural(self, params: BetaParams) -> BetaParams:
        """(α, β)."""
        return params

    def from_natural(self, natural: BetaParams) -> BetaParams:
        """(α, β)."""
        return natural

    def to_mean(self, params: BetaParams) -> BetaParams:
        """(E log x, E log(1 − x)) = (ψ(α), ψ(β)) − ψ(α + β)."""
        return self._split(_dirichlet_to_mean(self._stacked(params)))

    def from_mean(self, mean: BetaParams) -> BetaParams:
        """The inverse of `to_mean`, by Newton's method."""
        return self._split(_dirichlet_from_mean(self._stacked(mean)))


@dataclass(frozen=True)
class Dirichlet:
    """See `dirichlet`."""

    k: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> Array:
        """Concentrations k·loc with `loc` the mean, shape (k,): all 1 unless given; there is no scale."""
        no_scale(scale, "a Dirichlet family", "the parameters are the concentrations themselves, mean times their sum")
        return self.k * filled(loc, 1 / self.k, (self.k,), "loc")

    def sample(self, params: Array, key: Array, n: int) -> Array:
        """n draws, shape (n, k), each on the simplex."""
        return inside(jax.random.dirichlet(key, params, (n,), params.dtype))

    def log_prob(self, params: Array, x: Array) -> Array:
        """Σ (α − 1) log x − log B(α), with respect to the first k − 1 coordinates."""
        x = point(x, (self.k,), params.dtype)
        return jnp.sum(xlogy(params - 1, x)) - _log_beta(params)

    def entropy(self, params: Array) -> Array:
        """log B(α) − Σ (α − 1)E log x."""
        return _dirichlet_entropy(params)

    def fisher(self, params: Array) -> Closed:
        """diag ψ₁(α) − ψ₁(Σα)11ᵀ, in O(k)."""
        return Closed(Partial(_dirichlet_mv, params), Partial(_dirichlet_solve, params), Space.of(params))

    def retract(self, params: Array, step: Array) -> Array:
        """α exp(step/α)."""
        return grown(params, step)

    def statistics(self, x: Array) -> Array:
        """T(x) = log x."""
        return jnp.log(x)

    def to_natural(self, params: Array) -> Array:
        """α."""
        return params

    def from_natural(self, natural: Array) -> Array:
        """α."""
        return natural

    def to_mean(self, params: Array) -> Array:
        """E log x = ψ(α) − ψ(Σα)."""
        return _dirichlet_to_mean(params)

    def from_mean(self, mean: Array) -> Array:
        """The inverse of `to_mean`, by Newton's method."""
        return _dirichlet_from_mean(mean)


@dataclass(frozen=True)
class VonMises:
    """See `von_mises`."""

    n: int
    reparameterised = False

    def init(self, loc: Any = None, scale: Any = None) -> VonMisesParams:
        """Around the angle `loc` (0 unless given), of concentration 1/scale² (1 unless given)."""
        loc, scale = located(loc, scale, (self.n,))
        return VonMisesParams(loc, 1 / jnp.square(scale))

    def sample(self, params: VonMisesParams, key: Array, n: int) -> Array:
        """n angles in [−π, π), shape (n, number of variables): rejection from a wrapped Cauchy (Best, Fisher, 1979)."""
        loc, kappa = params
        root = jnp.hypot(1.0, 2 * kappa)
        tau = 1 + root
        sum_ = tau + jnp.sqrt(2 * tau)
        rho = 2 * kappa / sum_  # (τ − √2τ)/2κ
        below_one = (1 + 1 / (root + 2 * kappa) + jnp.sqrt(2 * tau)) / sum_  # 1 − ρ
        excess = jnp.square(below_one) / (2 * rho)  # s − 1 for s = (1 + ρ²)/2ρ
        shape = (n, self.n)

        def missing(carry: tuple[Array, Array, Array]) -> Array:
            return ~jnp.all(carry[2])

        def again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            key, kept, done = carry
            key, new = jax.random.split(key)
            u = jax.random.uniform(new, (3, *shape), kappa.dtype, minval=jnp.finfo(kappa.dtype).tiny)
            z = jnp.cos(jnp.pi * u[0])
            # cos x = (1 + sz)/(s + z): 1 − cos x = (s − 1)(1 − z)/(s + z).
            fall = excess * (1 - z) / (1 + excess + z)
            w = kappa * (excess + fall)
            inside = jnp.log(w / u[1]) + 1 - w >= 0
            angle = 2 * jnp.arcsin(jnp.sqrt(jnp.clip(fall / 2, 0, 1))) * jnp.where(u[2] < 0.5, -1, 1)
            angle = jnp.where(kappa > 1e-6, angle, 2 * jnp.pi * (u[0] - 0.5))
            take = ~done & (inside | (kappa <= 1e-6))
            return key, jnp.where(take, angle, kept), done | take

        lost = ~jnp.isfinite(jnp.broadcast_to(kappa, shape))  # would be drawn for ever
        start = key, jnp.where(lost, jnp.nan, jnp.zeros(shape, kappa.dtype)), lost
        return _wrapped(loc + jax.lax.while_loop(missing, again, start)[1])

    def log_prob(self, params: VonMisesParams, x: Array) -> Array:
        """Σ κ cos(x − μ) − log 2πI₀(κ)."""
        x = point(x, (self.n,), params.loc.dtype)
        loc, kappa = params
        return jnp.sum(-2 * kappa * jnp.square(jnp.sin((x - loc) / 2)) - LOG_2PI - log_bessel(kappa))

    def entropy(self, params: VonMisesParams) -> Array:
        """Σ log 2πI₀(κ) − κA(κ), A = I₁/I₀."""
        kappa = params.concentration
        return jnp.sum(LOG_2PI + log_bessel(kappa) + kappa * bessel_gap(kappa))

    def fisher(self, params: VonMisesParams) -> Diagonal:
        """diag(κA, A′(κ))."""
        kappa = params.concentration
        return Diagonal(VonMisesParams(kappa * bessel_ratio(kappa), bessel_slope(kappa)))

    def retract(self, params: VonMisesParams, step: VonMisesParams) -> VonMisesParams:
        """μ + step, back on the circle, and κ exp(step/κ)."""
        loc = _wrapped(params.loc + step.loc)
        return VonMisesParams(loc, grown(params.concentration, step.concentration))

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """T(x) = (cos x, sin x)."""
        return jnp.cos(x), jnp.sin(x)

    def to_natural(self, params: VonMisesParams) -> tuple[Array, Array]:
        """κ(cos μ, sin μ)."""
        return params.concentration * jnp.cos(params.loc), params.concentration * jnp.sin(params.loc)

    def from_natural(self, natural: tuple[Array, Array]) -> VonMisesParams:
        """The inverse of `to_natural`."""
        return VonMisesParams(jnp.arctan2(natural[1], natural[0]), jnp.hypot(*natural))

    def to_mean(self, params: VonMisesParams) -> tuple[Array, Array]:
        """A(κ)(cos μ, sin μ)."""
        length = bessel_ratio(params.concentration)
        return length * jnp.cos(params.loc), length * jnp.sin(params.loc)

    def from_mean(self, mean: tuple[Array, Array]) -> VonMisesParams:
        """The inverse of `to_mean`, by Newton's method for A(κ)."""
        length = jnp.hypot(*mean)

        def log_odds(u: Array) -> Array:
            kappa = jnp.exp(u)
            return jnp.log(bessel_ratio(kappa)) - jnp.log(bessel_gap(kappa))

        safe = jnp.where(length > 0, length, 0.5)
        target = jnp.log(safe) - jnp.log1p(-safe)
        log_kappa = inverse(log_odds, target, target + math.log(2) * (1 - 2 * safe))
        return VonMisesParams(jnp.arctan2(mean[1], mean[0]), jnp.where(length > 0, jnp.exp(log_kappa), 0))


def _wrapped(angle: Array) -> Array:
    """The angle in [−π, π)."""
    return jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi


def gamma(n: int) -> Gamma:
    """n independent Gamma variables with parameters (concentration, rate) = (α, β).

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gamma(1)
        >>> params = family.init(loc=4.0, scale=2.0)
        >>> params.concentration.tolist(), params.rate.tolist()
        ([4.0], [1.0])
    """
    return Gamma(dimension(n, "gamma"))


def inverse_gamma(n: int) -> InverseGamma:
    """n independent variables whose inverses are Gamma, with parameters (concentration, scale) = (α, β).

    Example:
        >>> import natgrad_jax as ng
        >>> ng.families.inverse_gamma(1).init(loc=1.0, scale=1.0).concentration.tolist()
        [3.0]
    """
    return InverseGamma(dimension(n, "inverse_gamma"))


def beta(n: int) -> Beta:
    """n independent Beta variables on (0, 1) with parameters (alpha, beta).

    Example:
        >>> import natgrad_jax as ng
        >>> [round(float(x[0]), 4) for x in ng.families.beta(1).init()]
        [1.0, 1.0]
    """
    return Beta(dimension(n, "beta"))


def dirichlet(k: int) -> Dirichlet:
    """A point of the simplex in R^k; the parameter is the array of concentrations α, shape (k,).

    Example:
        >>> import natgrad_jax as ng
        >>> round(float(ng.families.dirichlet(3).entropy(ng.families.dirichlet(3).init())), 4)  # uniform: −log 2
        -0.6931
    """
    return Dirichlet(dimension(k, "dirichlet", "k", 2))


def von_mises(n: int) -> VonMises:
    """n independent angles with parameters (loc, concentration) = (μ, κ); F = diag(κA, A′), A = I₁/I₀.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.von_mises(1)
        >>> round(float(family.to_mean(family.init(scale=0.5))[0][0]), 4)  # I₁(4)/I₀(4)
        0.8635
    """
    return VonMises(dimension(n, "von_mises"))
