"""Points for expectations over N(0, I): drawn in several ways, fixed, or the nodes of a rule."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import ndtri

from natgrad_jax.families.shared import dimension

MOST_NODES = 100_000


@dataclass(frozen=True)
class Draws:
    """n points in d dimensions, made from a key; points (n, d) and weights (n,) that sum to one.

    Attributes:
        random: whether a new key gives new points.
    """

    n: int
    random = True

    def count(self, d: int) -> int:
        """How many points in d dimensions."""
        return self.n

    def points(self, key: Array, d: int, dtype: Any) -> Array:
        """The points, shape (count(d), d)."""
        return jax.random.normal(key, (self.n, d), dtype)

    def weights(self, d: int, dtype: Any) -> Array:
        """Their weights."""
        n = self.count(d)
        return jnp.full(n, 1 / n, dtype)

    def error(self, values: Array) -> Array:
        """Standard error of the mean of the values at the points."""
        return jnp.std(values) / math.sqrt(max(len(values) - 1, 1))

    def radial_error(self, trace: Array, d: int) -> Array:
        """Standard error beside `error`, for a function of mean curvature `trace`, where points share their radii."""
        return jnp.zeros_like(trace)


def _pairs(values: Array) -> Array:
    half = len(values) // 2
    return (values[:half] + values[half:]) / 2


class Independent(Draws):
    """See `independent`."""


class Antithetic(Draws):
    """See `antithetic`."""

    def count(self, d: int) -> int:
        """How many points in d dimensions."""
        return self.n + self.n % 2

    def points(self, key: Array, d: int, dtype: Any) -> Array:
        """The points, shape (count(d), d)."""
        half = jax.random.normal(key, (self.count(d) // 2, d), dtype)
        return jnp.concatenate([half, -half])

    def error(self, values: Array) -> Array:
        """Standard error of the mean of the values at the points."""
        return super().error(_pairs(values))


class Orthogonal(Antithetic):
    """See `orthogonal`."""

    def count(self, d: int) -> int:
        """How many points in d dimensions."""
        return 2 * d * max(1, math.ceil(self.n / (2 * d)))

    def points(self, key: Array, d: int, dtype: Any) -> Array:
        """The points, shape (count(d), d)."""
        blocks = self.count(d) // (2 * d)
        directions, radii = jax.random.split(key)
        q = _rotation(jax.random.normal(directions, (d, d), dtype))[None]
        if blocks > 1:  # fixed rotations of one that is uniform are uniform too, and set apart
            q = jnp.concatenate([q, jnp.asarray(_apart(blocks - 1, d), dtype) @ q])
        radius = jnp.linalg.norm(jax.random.normal(radii, (blocks, d), dtype), axis=-1)
        half = (q * radius[:, None, None]).reshape(-1, d)
        return jnp.concatenate([half, -half])

    def radial_error(self, trace: Array, d: int) -> Array:
        """½ tr M · sd(χ²_d)/d, over the blocks: pairs of one block cannot show it."""
        return jnp.abs(trace) / math.sqrt(2 * d * (self.count(d) // (2 * d)))


def _apart(n: int, d: int) -> np.ndarray:
    """n rotations that never change, (n, d, d)."""
    rng = np.random.default_rng(0)
    return np.stack([np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(n)])


def _rotation(normal: Array) -> Array:
    """The orthogonal factor of a normal matrix, which is uniformly distributed: A L⁻ᵀ with LLᵀ = AᵀA, twice.

    Faster than Householder's. A ridge of the size of rounding keeps the first pass finite where A is singular to the
    digits at hand; the second removes what the ridge has taken from orthogonality.
    """

    def improved(rows: Array) -> Array:
        gram = rows @ rows.T
        ridge = 2 * jnp.finfo(gram.dtype).eps * jnp.trace(gram)
        lower = jnp.linalg.cholesky(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype))
        return solve_triangular(lower, rows, lower=True)

    return improved(improved(normal))


class QuasiRandom(Draws):
    """See `quasi_random`."""

    def points(self, key: Array, d: int, dtype: Any) -> Array:
        """The points, shape (count(d), d)."""
        from scipy.stats import qmc  # comes with jax

        grid = qmc.Sobol(d, scramble=False).random(self.n) + 0.5 / self.n
        shift = jax.random.uniform(key, (d,), dtype)
        inside = jnp.mod(jnp.asarray(grid, dtype) + shift, 1)
        edge = float(jnp.finfo(dtype).eps)
        return ndtri(jnp.clip(inside, edge, 1 - edge))


class GaussHermite(Draws):
    """See `gauss_hermite`."""

    random = False

    def count(self, d: int) -> int:
        """How many points in d dimensions."""
        return self.n**d

    def points(self, key: Array, d: int, dtype: Any) -> Array:
        """The points, shape (count(d), d)."""
        if self.count(d) > MOST_NODES:
            raise ValueError(
                f"gauss_hermite: {self.n} nodes in each of {d} dimensions are {self.n}**{d} points; "
                "expected at most 100,000. Take fewer, or draws: fixed(orthogonal(n))"
            )
        nodes = np.polynomial.hermite_e.hermegauss(self.n)[0]
        return jnp.asarray(list(itertools.product(nodes, repeat=d)), dtype)

    def weights(self, d: int, dtype: Any) -> Array:
        """Their weights."""
        one = np.polynomial.hermite_e.hermegauss(self.n)[1] / math.sqrt(2 * math.pi)
        product = [math.prod(w) for w in itertools.product(one, repeat=d)]
        return jnp.asarray(product, dtype)

    def error(self, values: Array) -> Array:
        """Standard error of the mean of the values at the points."""
        return jnp.zeros((), values.dtype)


@dataclass(frozen=True)
class Fixed(Draws):
    """See `fixed`."""

    inner: Draws = Draws(1)
    random = False

    def count(self, d: int) -> int:
        """How many points in d dimensions."""
        return self.inner.count(d)

    def points(self, key: Array, d: int, dtype: Any) -> Array:
        """The points, shape (count(d), d)."""
        points = self.inner.points(key, d, dtype)
        if len(points) < 2 * d:
            return points
        points = points - jnp.mean(points, axis=0)
        lower = jnp.linalg.cholesky(points.T @ points / len(points))
        return solve_triangular(lower, points.T, lower=True).T

    def error(self, values: Array) -> Array:
        """Standard error of the mean of the values at the points."""
        return jnp.zeros((), values.dtype)


def independent(n: int) -> Draws:
    """n independent draws.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.independent(16).count(3)
        16
    """
    return Independent(dimension(n, "independent", "n"))


def antithetic(n: int) -> Draws:
    """n draws in pairs ±ε: odd functions have no error. An odd n is raised by one.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.antithetic(15).count(3)
        16
    """
    return Antithetic(dimension(n, "antithetic", "n"))


def orthogonal(n: int) -> Draws:
    """Pairs ±ε along d orthogonal directions of one length (drawn from χ_d): at least n, a multiple of 2d.

    The second moment of a block is a multiple of I, so that for a quadratic log-density the only noise in a natural
    gradient is that multiple. Cost: O(d³) for each block of 2d.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.orthogonal(40).count(6)
        48
    """
    return Orthogonal(dimension(n, "orthogonal", "n"))


def quasi_random(n: int) -> Draws:
    """Sobol points with a random shift, through the normal quantile; n best a power of two.

    The error of a mean falls nearly as 1/n for smooth functions of few variables. The standard error that goes with it
    is that of independent draws, an upper bound.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.quasi_random(64).count(3)
        64
    """
    return QuasiRandom(dimension(n, "quasi_random", "n"))


def gauss_hermite(order: int) -> Draws:
    """The product rule of `order` Gauss–Hermite nodes in each dimension: orderᵈ points, exact for degree 2·order − 1.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.gauss_hermite(5).count(2)
        25
    """
    return GaussHermite(dimension(order, "gauss_hermite", "order"))


def fixed(draws: Draws) -> Draws:
    """The same draws in every step: the objective becomes a function, minimised to rounding instead of to noise.

    What is found is the optimum of an average over these draws, not of the expectation; its error falls with their
    number, and it says nothing about itself. From 2d draws on, their mean and second moment are made exact, which
    makes the result exact for a quadratic log-density.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.fixed(ng.inference.antithetic(64)).random
        False

    Reference: Giordano, Ingram, Broderick, "Black box variational inference with a deterministic objective" (2024).
    """
    if not isinstance(draws, Draws):
        raise TypeError(f"draws: expected draws such as inference.antithetic(64), got {type(draws).__name__}")
    return Fixed(draws.n, draws)
