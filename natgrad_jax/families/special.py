"""Functions of gamma and Bessel type without the cancellation that their textbook forms have at large arguments."""

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import digamma, gammaln, i0e, i1e, polygamma

# B₂, B₄, … of the asymptotic series in 1/x², which are exact to rounding beyond LARGE.
BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
LARGE = 12.0


def trigamma(x: Array) -> Array:
    """ψ₁(x)."""
    return polygamma(1, x)


def excess_trigamma(x: Array) -> Array:
    """xψ₁(x) − 1, about 1/2x."""
    small, large = jnp.minimum(x, LARGE), jnp.maximum(x, LARGE)
    series = 0.5 / large + sum(b / large ** (2 * k) for k, b in enumerate(BERNOULLI_NUMBERS, 1))
    return jnp.where(x < LARGE, small * trigamma(small) - 1, series)


def log_minus_digamma(x: Array) -> Array:
    """log x − ψ(x), about 1/2x."""
    small, large = jnp.minimum(x, LARGE), jnp.maximum(x, LARGE)
    series = 0.5 / large + sum(b / (2 * k * large ** (2 * k)) for k, b in enumerate(BERNOULLI_NUMBERS, 1))
    return jnp.where(x < LARGE, jnp.log(small) - digamma(small), series)


def defect(x: Array) -> Array:
    """x − 1/ψ₁(x), between 0 and ½."""
    excess = excess_trigamma(x)
    return x * excess / (1 + excess)


# Coefficients of A = I₁/I₀ in powers of 1/κ: 1 − A and, with each multiplied by its power, A′ = 1 − A/κ − A².
BESSEL_GAP = (1 / 2, 1 / 8, 1 / 8, 25 / 128, 13 / 32, 1073 / 1024, 103 / 32, 375733 / 32768, 23797 / 512)
LARGE_KAPPA = 60.0


def bessel_gap(kappa: Array) -> Array:
    """1 − I₁(κ)/I₀(κ), about 1/2κ."""
    small, large = jnp.minimum(kappa, LARGE_KAPPA), jnp.maximum(kappa, LARGE_KAPPA)
    series = sum(c / large**k for k, c in enumerate(BESSEL_GAP, 1))
    return jnp.where(kappa < LARGE_KAPPA, (i0e(small) - i1e(small)) / i0e(small), series)


def bessel_slope(kappa: Array) -> Array:
    """The derivative of I₁(κ)/I₀(κ): ½ at 0, about 1/2κ² beyond."""
    small, large = jnp.minimum(kappa, LARGE_KAPPA), jnp.maximum(kappa, LARGE_KAPPA)
    series = sum(k * c / large ** (k + 1) for k, c in enumerate(BESSEL_GAP, 1))
    safe = jnp.where(small > 0, small, 1)
    ratio = i1e(small) / i0e(small)
    direct = 1 - jnp.where(small > 1e-4, ratio / safe, 0.5 - small**2 / 16) - ratio**2
    return jnp.where(kappa < LARGE_KAPPA, direct, series)


def log_gamma_ratio_mean(mean: Array, failures: float) -> Array:
    """E[log Γ(x + r) − log x!] of negative binomial counts of r failures.

    Malmstén's integral of log Γ, whose mean needs E e^{−xt} = (1 + μ(1 − e^{−t})/r)^{−r} alone: smooth in log t,
    so that the trapezoidal rule is exact to rounding.
    """
    step = 0.25
    t = jnp.exp(jnp.arange(-45.0, 13.0, step, dtype=mean.dtype))
    mean, r = mean[..., None], jnp.asarray(failures, mean.dtype)
    generating = jnp.exp(-r * jnp.log1p(-jnp.expm1(-t) * mean / r))
    falling = -jnp.exp(-t) * jnp.expm1(-(r - 1) * t) / jnp.expm1(-t)
    # For r < 1 the exponential grows, more slowly than e⁻ᵗ falls.
    falling = jnp.where(t > 1, (jnp.exp(-t) - jnp.exp(-r * t)) / jnp.expm1(-t), falling)
    return step * jnp.sum((r - 1) * jnp.exp(-t) + falling * generating, axis=-1)


def log_factorial_mean(rate: Array) -> Array:
    """E log x! of Poisson counts: the sum up to a mean of 100, Stirling's series beyond."""
    small, large = jnp.minimum(rate, 100.0), jnp.maximum(rate, 100.0)
    x = jnp.arange(300.0, dtype=rate.dtype)
    log_p = x * jnp.log(small)[..., None] - small[..., None] - gammaln(x + 1)
    direct = jnp.sum(jnp.exp(log_p) * gammaln(x + 1), axis=-1)
    entropy = 0.5 * jnp.log(2 * jnp.pi * jnp.e * large)
    entropy -= 1 / (12 * large) + 1 / (24 * large**2) + 19 / (360 * large**3) + 9 / (80 * large**4)
    return jnp.where(rate < 100.0, direct, entropy - large + large * jnp.log(large))
