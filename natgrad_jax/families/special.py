"""Functions of gamma and Bessel type without the cancellation that their textbook forms have at large arguments."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import digamma, gammaln, i0e, i1e, polygamma

# B₂, B₄, … of the asymptotic series in 1/x², which are exact to rounding beyond LARGE.
BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
LARGE = 12.0


def trigamma(x: Array) -> Array:
    """ψ₁(x)."""
    return polygamma(1, x)


def _sides(x: Array, at: float) -> tuple[Array, Array]:
    """x below `at` and x above it, each held at `at` on the other side, with a derivative of 1 or 0 everywhere."""
    return jnp.where(x < at, x, at), jnp.where(x < at, at, x)


def _powers(x: Array, coefficients: Sequence[float], step: int) -> Array:
    """Σ_k c_k x^(−step·k); powers of 1/x may vanish, those of x would not be finite."""
    inverse = 1 / x
    return sum((c * inverse ** (step * k) for k, c in enumerate(coefficients, 1)), start=jnp.zeros_like(x))


def excess_trigamma(x: Array) -> Array:
    """xψ₁(x) − 1, about 1/2x."""
    small, large = _sides(x, LARGE)
    series = 0.5 / large + _powers(large, BERNOULLI_NUMBERS, 2)
    return jnp.where(x < LARGE, small * trigamma(small) - 1, series)


def log_minus_digamma(x: Array) -> Array:
    """log x − ψ(x), about 1/2x."""
    small, large = _sides(x, LARGE)
    series = 0.5 / large + _powers(large, [b / (2 * k) for k, b in enumerate(BERNOULLI_NUMBERS, 1)], 2)
    return jnp.where(x < LARGE, jnp.log(small) - digamma(small), series)


def defect(x: Array) -> Array:
    """x − 1/ψ₁(x), between 0 and ½."""
    return x / (1 + 1 / excess_trigamma(x))


# Coefficients of 1 − A, A = I₁/I₀, in powers of 1/κ, from A′ = 1 − A/κ − A².
BESSEL_GAP = (1 / 2, 1 / 8, 1 / 8, 25 / 128, 13 / 32, 1073 / 1024, 103 / 32, 375733 / 32768, 23797 / 512)
LARGE_KAPPA = 60.0


def bessel_gap(kappa: Array) -> Array:
    """1 − I₁(κ)/I₀(κ), about 1/2κ."""
    small, large = _sides(kappa, LARGE_KAPPA)
    return jnp.where(kappa < LARGE_KAPPA, 1 - i1e(small) / i0e(small), _powers(large, BESSEL_GAP, 1))


def bessel_ratio(kappa: Array) -> Array:
    """I₁(κ)/I₀(κ), about κ/2 for small κ."""
    small, large = _sides(kappa, LARGE_KAPPA)
    return jnp.where(kappa < LARGE_KAPPA, i1e(small) / i0e(small), 1 - _powers(large, BESSEL_GAP, 1))


def bessel_slope(kappa: Array) -> Array:
    """The derivative of I₁(κ)/I₀(κ): ½ at 0, about 1/2κ² beyond."""
    small, large = _sides(kappa, LARGE_KAPPA)
    series = _powers(large, [k * c for k, c in enumerate(BESSEL_GAP, 1)], 1) / large
    tiny = small < 1e-4
    ratio = i1e(small) / i0e(small)
    direct = 1 - jnp.where(tiny, 0.5 - small**2 / 16, ratio / jnp.where(tiny, 1, small)) - ratio**2
    return jnp.where(kappa < LARGE_KAPPA, direct, series)


@jax.custom_jvp
def log_bessel(kappa: Array) -> Array:
    """log I₀(κ) − κ, with the derivative I₁/I₀ − 1 at 0 and far out too."""
    return jnp.log(i0e(kappa))


log_bessel.defjvps(lambda tangent, value, kappa: -bessel_gap(kappa) * tangent)


def log_ways_mean(mean: Array, failures: float) -> Array:
    """E log Γ(x + r)/(Γ(r) x!) of negative binomial counts.

    By Malmstén's integral of log Γ it is ∫ (e⁻ᵗ − e^(−rt))/(1 − e⁻ᵗ) (1 − E e^(−xt)) dt/t, whose integrand has one sign
    and is smooth in log t, so that the trapezoidal rule is exact to rounding; E e^(−xt) = (1 + μ(1 − e⁻ᵗ)/r)^(−r).
    """
    step, r = 0.25, failures
    end = math.log(40 / min(r, 1.0)) + 1
    t = jnp.exp(jnp.arange(-45.0, end, step, dtype=mean.dtype))
    fall = -jnp.expm1(-t)
    missing = -jnp.expm1(-r * jnp.log1p(fall * mean[..., None] / r))
    # From the slower of the two exponentials, so that nothing overflows.
    between = -jnp.expm1(-(r - 1) * t) * jnp.exp(-t) if r >= 1 else jnp.expm1(-(1 - r) * t) * jnp.exp(-r * t)
    return step * jnp.sum(between / fall * missing, axis=-1)


def log_factorial_mean(rate: Array) -> Array:
    """E log x! of Poisson counts: the sum up to a mean of 100, Stirling's series beyond."""
    small, large = _sides(rate, 100.0)
    x = jnp.arange(300.0, dtype=rate.dtype)
    log_p = x * jnp.log(small)[..., None] - small[..., None] - gammaln(x + 1)
    direct = jnp.sum(jnp.exp(log_p) * gammaln(x + 1), axis=-1)
    entropy = 0.5 * jnp.log(2 * jnp.pi * jnp.e * large)
    entropy -= 1 / (12 * large) + 1 / (24 * large**2) + 19 / (360 * large**3) + 9 / (80 * large**4)
    return jnp.where(rate < 100.0, direct, entropy - large + large * jnp.log(large))
