"""Families on finite sets and on the whole numbers: two-valued variables, classes, pairwise models, counts."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import gammaln, xlogy

from natgrad_jax._tree import Space, ravel
from natgrad_jax.families.shared import all_pairs, closed, dimension, filled, grown, no_scale, point, positive
from natgrad_jax.families.special import log_factorial_mean, log_ways_mean
from natgrad_jax.operators import Closed, Dense, Diagonal


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
        no_scale(scale, "a Bernoulli family", "pass loc (the natural parameters) only")
        return filled(loc, 0.0, (self.n,), "loc")

    def sample(self, params: Array, key: Array, n: int) -> Array:
        """n draws, shape (n, number of variables), with entries from `values`."""
        up = jax.random.bernoulli(key, jax.nn.sigmoid(self._gap * params), (n, self.n))
        return jnp.where(up, self.values[1], self.values[0]).astype(params.dtype)

    def log_prob(self, params: Array, x: Array) -> Array:
        """Σ log sigmoid(±(b − a)θ_i), plus where x_i = b, minus where x_i = a."""
        x = point(x, (self.n,), params.dtype)
        sign = (2 * x - sum(self.values)) / self._gap
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

    def statistics(self, x: Array) -> Array:
        """T(x) = x."""
        return jnp.asarray(x)

    def to_natural(self, params: Array) -> Array:
        """θ, the parameters themselves."""
        return params

    def from_natural(self, natural: Array) -> Array:
        """θ."""
        return natural

    def to_mean(self, params: Array) -> Array:
        """E x = a + (b − a)p."""
        return self.values[0] + self._gap * jax.nn.sigmoid(self._gap * params)

    def from_mean(self, mean: Array) -> Array:
        """The inverse of `to_mean`: the logit of p, over b − a."""
        return (jnp.log(mean - self.values[0]) - jnp.log(self.values[1] - mean)) / self._gap

    def support(self, dtype: Any = None) -> Array:
        """All 2ⁿ configurations, shape (2ⁿ, n)."""
        return _configurations(self.n, self.values, dtype)


def _configurations(n: int, values: tuple[float, float], dtype: Any) -> Array:
    if n > 24:
        raise ValueError(f"n: the support of {n} variables has 2**{n} points; sample instead")
    return jnp.asarray(np.array(list(itertools.product(values, repeat=n))), dtype or float)


@dataclass(frozen=True)
class Categorical:
    """See `categorical`."""

    k: int
    minimal: bool = False
    reparameterised = False

    @property
    def _size(self) -> int:
        return self.k - 1 if self.minimal else self.k

    def init(self, loc: Any = None, scale: Any = None) -> Array:
        """Logits: `loc` (0 unless given); there is no scale."""
        no_scale(scale, "a categorical family", "pass loc (the logits) only")
        return filled(loc, 0.0, (self._size,), "loc")

    def _log_p(self, params: Array) -> Array:
        return jax.nn.log_softmax(jnp.append(params, 0.0) if self.minimal else params)

    def sample(self, params: Array, key: Array, n: int) -> Array:
        """n classes, shape (n,), whole numbers."""
        return jax.random.categorical(key, self._log_p(params), shape=(n,))

    def log_prob(self, params: Array, x: Array) -> Array:
        """log p_x; −inf for an x that is no class."""
        known = (x >= 0) & (x < self.k)
        return jnp.where(known, self._log_p(params)[point(x, (), int)], -jnp.inf)

    def entropy(self, params: Array) -> Array:
        """−Σ p log p."""
        log_p = self._log_p(params)
        return -jnp.sum(jnp.where(jnp.exp(log_p) > 0, jnp.exp(log_p) * log_p, 0))

    def fisher(self, params: Array) -> Closed:
        """diag(p) − ppᵀ; its inverse diag(1/p) + 11ᵀ/p_k, or with all logits C diag(1/p) C, C = I − 11ᵀ/k."""
        return closed(self, params)

    def _mv(self, params: Array, v: Array) -> Array:
        p = jnp.exp(self._log_p(params))[: self._size]
        return p * (v - p @ v)

    def _solve(self, params: Array, g: Array) -> Array:
        p = jnp.exp(self._log_p(params))
        present = p > jnp.finfo(p.dtype).tiny  # a class without probability has no step
        inverse = jnp.where(present, 1 / jnp.where(present, p, 1), 0)
        if self.minimal:
            return jnp.where(present[:-1], inverse[:-1] * g + inverse[-1] * jnp.sum(jnp.where(present[:-1], g, 0)), 0)
        centred = lambda x: jnp.where(present, x - jnp.sum(jnp.where(present, x, 0)) / jnp.sum(present), 0)  # noqa: E731
        return centred(inverse * centred(g))

    def retract(self, params: Array, step: Array) -> Array:
        """params + step: logits are a global chart."""
        return params + step

    def statistics(self, x: Array) -> Array:
        """T(x): 1 in the place of x, without the last place if minimal."""
        return jax.nn.one_hot(x, self.k)[..., : self._size]

    def to_natural(self, params: Array) -> Array:
        """The logits."""
        return params

    def from_natural(self, natural: Array) -> Array:
        """The logits."""
        return natural

    def to_mean(self, params: Array) -> Array:
        """p, without the last if minimal."""
        return jnp.exp(self._log_p(params))[: self._size]

    def from_mean(self, mean: Array) -> Array:
        """log p; minimal: minus that of the last class."""
        return jnp.log(mean) - jnp.log1p(-jnp.sum(mean)) if self.minimal else jnp.log(mean)

    def support(self) -> Array:
        """0 … k − 1."""
        return jnp.arange(self.k)


class BoltzmannParams(NamedTuple):
    """log q(x) = Σ field_i x_i + Σ_{i<j} coupling_ij x_i x_j − log Z, the couplings as in numpy.triu_indices."""

    field: Array
    coupling: Array


@dataclass(frozen=True)
class Boltzmann:
    """See `boltzmann`."""

    n: int
    values: tuple[float, float] = (-1.0, 1.0)
    reparameterised = False

    def init(self, loc: Any = None, scale: Any = None) -> BoltzmannParams:
        """Fields `loc` (0 unless given), no couplings; there is no scale."""
        no_scale(scale, "a Boltzmann family", "pass loc (the fields) only")
        field = filled(loc, 0.0, (self.n,), "loc")
        return BoltzmannParams(field, jnp.zeros(self.n * (self.n - 1) // 2, field.dtype))

    def _table(self, params: BoltzmannParams) -> tuple[Array, Array]:
        """The statistics of every configuration (2ⁿ, p), and its log-probability."""
        statistics = self._all_statistics(params.field.dtype)
        return statistics, jax.nn.log_softmax(statistics @ ravel(params))

    def _all_statistics(self, dtype: Any) -> Array:
        x = np.array(list(itertools.product(self.values, repeat=self.n)))
        i, j = all_pairs(self.n)
        return jnp.asarray(np.concatenate([x, x[:, i] * x[:, j]], axis=1), dtype)

    def sample(self, params: BoltzmannParams, key: Array, n: int) -> Array:
        """n independent draws, shape (n, number of variables), from the table of all 2ⁿ."""
        places = jax.random.categorical(key, self._table(params)[1], shape=(n,))
        return self.support(params.field.dtype)[places]

    def log_prob(self, params: BoltzmannParams, x: Array) -> Array:
        """θ·T(x) − log Z, with Z the sum over all configurations."""
        x = point(x, (self.n,), params.field.dtype)
        statistics = self._all_statistics(params.field.dtype)
        own = ravel(self.statistics(x))
        return own @ ravel(params) - jax.nn.logsumexp(statistics @ ravel(params))

    def entropy(self, params: BoltzmannParams) -> Array:
        """−Σ q log q."""
        log_q = self._table(params)[1]
        return -jnp.sum(jnp.where(jnp.exp(log_q) > 0, jnp.exp(log_q) * log_q, 0))

    def fisher(self, params: BoltzmannParams) -> Dense:
        """Cov T, a p × p matrix with p = n(n + 1)/2."""
        statistics, log_q = self._table(params)
        q = jnp.exp(log_q)
        centred = statistics - q @ statistics
        return Dense(centred.T @ (q[:, None] * centred), Space.of(params))

    def retract(self, params: BoltzmannParams, step: BoltzmannParams) -> BoltzmannParams:
        """params + step: natural parameters are a global chart."""
        return jax.tree.map(jnp.add, params, step)

    def statistics(self, x: Array) -> BoltzmannParams:
        """T(x) = (x, x_i x_j for i < j)."""
        i, j = all_pairs(self.n)
        return BoltzmannParams(x, x[i] * x[j])

    def to_natural(self, params: BoltzmannParams) -> BoltzmannParams:
        """The parameters themselves."""
        return params

    def from_natural(self, natural: BoltzmannParams) -> BoltzmannParams:
        """The parameters themselves."""
        return natural

    def to_mean(self, params: BoltzmannParams) -> BoltzmannParams:
        """E x and E x_i x_j."""
        statistics, log_q = self._table(params)
        return Space.of(params).unravel(jnp.exp(log_q) @ statistics)

    def from_mean(self, mean: BoltzmannParams) -> BoltzmannParams:
        """The inverse of `to_mean`: Newton's method, each step as long as brings the means closest."""
        target, space = ravel(mean), Space.of(mean)
        lengths = 0.5 ** jnp.arange(20, dtype=target.dtype)

        def gap(theta: Array) -> Array:
            return ravel(self.to_mean(space.unravel(theta))) - target

        def covariance(theta: Array) -> Array:
            return self.fisher(space.unravel(theta)).dense()

        def newton(gap: Any, theta: Array) -> Array:
            def improved(_: int, theta: Array) -> Array:
                curvature = covariance(theta)
                floor = len(theta) * jnp.finfo(theta.dtype).eps * jnp.trace(curvature)
                step = -jnp.linalg.solve(curvature + floor * jnp.eye(len(theta), dtype=theta.dtype), gap(theta))
                tried = theta + lengths[:, None] * step
                misses = jax.vmap(lambda theta: jnp.sum(jnp.square(gap(theta))))(tried)
                best = jnp.argmin(jnp.where(jnp.isfinite(misses), misses, jnp.inf))
                return jnp.where(misses[best] < jnp.sum(jnp.square(gap(theta))), tried[best], theta)

            return jax.lax.fori_loop(0, 60, improved, theta)

        def tangent(linear: Any, y: Array) -> Array:
            return jnp.linalg.solve(jax.jacobian(linear)(jnp.zeros_like(y)), y)

        return space.unravel(jax.lax.custom_root(gap, jnp.zeros_like(target), newton, tangent))

    def support(self, dtype: Any = None) -> Array:
        """All 2ⁿ configurations, shape (2ⁿ, n)."""
        return _configurations(self.n, self.values, dtype)


@dataclass(frozen=True)
class Poisson:
    """See `poisson`."""

    n: int
    reparameterised = False

    def init(self, loc: Any = None, scale: Any = None) -> Array:
        """Rates, shape (n,): `loc` (1 unless given); there is no scale."""
        no_scale(scale, "a Poisson family", "its variance is its mean, loc")
        positive(loc, "loc")
        return filled(loc, 1.0, (self.n,), "loc")

    def sample(self, params: Array, key: Array, n: int) -> Array:
        """n draws, shape (n, number of variables), whole numbers."""
        return jax.random.poisson(key, params, (n, self.n))

    def log_prob(self, params: Array, x: Array) -> Array:
        """Σ x log λ − λ − log x!."""
        x = point(x, (self.n,), params.dtype)
        return jnp.sum(xlogy(x, params) - params - gammaln(x + 1))

    def entropy(self, params: Array) -> Array:
        """Σ λ(1 − log λ) + E log x!."""
        return jnp.sum(params - xlogy(params, params) + log_factorial_mean(params))

    def fisher(self, params: Array) -> Diagonal:
        """diag(1/λ)."""
        return Diagonal(1 / params)

    def retract(self, params: Array, step: Array) -> Array:
        """λ exp(step/λ)."""
        return grown(params, step)

    def statistics(self, x: Array) -> Array:
        """T(x) = x."""
        return jnp.asarray(x)

    def to_natural(self, params: Array) -> Array:
        """log λ."""
        return jnp.log(params)

    def from_natural(self, natural: Array) -> Array:
        """The inverse of `to_natural`."""
        return jnp.exp(natural)

    def to_mean(self, params: Array) -> Array:
        """λ."""
        return params

    def from_mean(self, mean: Array) -> Array:
        """λ."""
        return mean


@dataclass(frozen=True)
class NegativeBinomial:
    """See `negative_binomial`."""

    n: int
    failures: float
    reparameterised = False

    def init(self, loc: Any = None, scale: Any = None) -> Array:
        """Means, shape (n,): `loc` (1 unless given); there is no scale."""
        no_scale(scale, "a negative binomial family", "its variance is loc + loc²/failures")
        positive(loc, "loc")
        return filled(loc, 1.0, (self.n,), "loc")

    def sample(self, params: Array, key: Array, n: int) -> Array:
        """n draws, shape (n, number of variables), whole numbers: Poisson with a rate from a Gamma."""
        rates, counts = jax.random.split(key)
        shape = jnp.asarray(self.failures, params.dtype)
        rate = jax.random.gamma(rates, shape, (n, self.n), params.dtype) * params / shape
        return jax.random.poisson(counts, rate)

    def log_prob(self, params: Array, x: Array) -> Array:
        """Σ log C(x + r − 1, x) + x log μ/(μ + r) − r log(1 + μ/r)."""
        x = point(x, (self.n,), params.dtype)
        r = self.failures
        ways = gammaln(x + r) - gammaln(x + 1) - gammaln(jnp.asarray(r, params.dtype))
        return jnp.sum(ways - x * jnp.log1p(r / params) - r * jnp.log1p(params / r))

    def entropy(self, params: Array) -> Array:
        """−E log q, of which E log C(x + r − 1, x) is an integral."""
        r = self.failures
        return jnp.sum(params * jnp.log1p(r / params) + r * jnp.log1p(params / r) - log_ways_mean(params, r))

    def fisher(self, params: Array) -> Diagonal:
        """diag(r/(μ(μ + r)))."""
        return Diagonal(self.failures / (params * (params + self.failures)))

    def retract(self, params: Array, step: Array) -> Array:
        """μ exp(step/μ)."""
        return grown(params, step)

    def statistics(self, x: Array) -> Array:
        """T(x) = x."""
        return jnp.asarray(x)

    def to_natural(self, params: Array) -> Array:
        """log μ/(μ + r), below 0."""
        return -jnp.log1p(self.failures / params)

    def from_natural(self, natural: Array) -> Array:
        """The inverse of `to_natural`."""
        return self.failures / jnp.expm1(-natural)

    def to_mean(self, params: Array) -> Array:
        """μ."""
        return params

    def from_mean(self, mean: Array) -> Array:
        """μ."""
        return mean


def bernoulli(n: int, values: tuple[float, float] = (0.0, 1.0)) -> Bernoulli:
    """n independent two-valued variables, q(x) ∝ exp(θ·x) with x_i from `values`; θ is the parameter.

    values=(0, 1): θ is the logit, F = p(1 − p). values=(−1, 1): spins in a field h = θ, F = sech²h.

    Example:
        >>> import natgrad_jax as ng
        >>> spins = ng.families.bernoulli(2, values=(-1, 1))
        >>> spins.fisher(spins.init(0.0)).entries.tolist()
        [1.0, 1.0]
    """
    return Bernoulli(dimension(n, "bernoulli"), _two(values))


def _two(values: tuple[float, float]) -> tuple[float, float]:
    low, high = map(float, values) if len(values) == 2 else (0.0, 0.0)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"values: expected two numbers, the smaller one first, got {values}")
    return low, high


def categorical(k: int, *, minimal: bool = False) -> Categorical:
    """One of k classes, q(x) = softmax(logits)_x; the logits are the parameter, x is a whole number.

    Redundant by default: all k logits, of which a common shift changes nothing, F = diag(p) − ppᵀ of rank k − 1 and
    steps of mean 0. With `minimal`, k − 1 logits against the last class.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.categorical(4, minimal=True)
        >>> family.to_mean(family.init()).tolist()
        [0.25, 0.25, 0.25]
    """
    return Categorical(dimension(k, "categorical", "k", 2), bool(minimal))


def boltzmann(n: int, values: tuple[float, float] = (-1.0, 1.0)) -> Boltzmann:
    """n two-valued variables with a field on each and a coupling on each pair, by sums over all 2ⁿ configurations.

    Parameters: `BoltzmannParams`, the natural ones, p = n(n + 1)/2. Everything costs O(2ⁿ n²),
    in memory too: n is at most 16.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.boltzmann(2)
        >>> params = ng.families.BoltzmannParams(jnp.zeros(2), jnp.array([1.0]))
        >>> round(float(family.to_mean(params).coupling[0]), 4)  # tanh 1
        0.7616
    """
    if dimension(n, "boltzmann", "n", 2) > 16:
        raise ValueError(f"n: expected at most 16 variables, got {n}: there is a table of 2**n configurations")
    return Boltzmann(int(n), _two(values))


def poisson(n: int) -> Poisson:
    """n independent counts with rates λ, which are the parameter; F = 1/λ.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.families.poisson(1).fisher(ng.families.poisson(1).init(4.0)).entries.tolist()
        [0.25]
    """
    return Poisson(dimension(n, "poisson"))


def negative_binomial(n: int, failures: float) -> NegativeBinomial:
    """n independent counts with means μ, which are the parameter, and variances μ + μ²/failures; F = r/(μ(μ + r)).

    `failures` = r > 0 is fixed: with it free there is no exponential family.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.negative_binomial(1, 2.0)
        >>> family.fisher(family.init(2.0)).entries.tolist()
        [0.25]
    """
    if not 0 < float(failures) < math.inf:
        raise ValueError(f"failures: expected a positive number, got {failures}; with infinitely many it is poisson(n)")
    return NegativeBinomial(dimension(n, "negative_binomial"), float(failures))
