"""Families of matrices: Wishart, matrix normal."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import digamma, multigammaln

from natgrad_jax.families.shared import (
    LOG_2PI,
    closed,
    covector,
    dimension,
    doubled_diagonal,
    filled,
    grown,
    half_lower,
    inside,
    inverse,
    inverse_lower,
    located,
    lower_of_inverse,
    no_scale,
    point,
    relative,
    retract_lower,
)
from natgrad_jax.families.special import excess_trigamma, log_minus_digamma
from natgrad_jax.operators import Closed


class WishartParams(NamedTuple):
    """df > d − 1 degrees of freedom; the scale matrix is V = LLᵀ, L = tril(scale_tril)."""

    df: Array
    scale_tril: Array


class MatrixNormalParams(NamedTuple):
    """X = loc + A Z Bᵀ with A = tril(row_tril) and B = tril(col_tril), Z standard normal of shape (n, p)."""

    loc: Array
    row_tril: Array
    col_tril: Array


def _log_det(lower: Array) -> Array:
    return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(lower))))


@dataclass(frozen=True)
class Wishart:
    """See `wishart`."""

    d: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> WishartParams:
        """Mean `loc`, shape (d, d), the identity unless given, with d + 2 degrees of freedom; there is no scale."""
        no_scale(scale, "a Wishart family", "build WishartParams(df, scale_tril) for other degrees of freedom")
        loc = jnp.eye(self.d) if loc is None else jnp.asarray(loc)
        if loc.shape != (self.d, self.d):
            raise ValueError(f"loc: expected a positive definite matrix of shape {(self.d, self.d)}, got {loc.shape}")
        loc = filled(loc, 0.0, (self.d, self.d), "loc")
        df = jnp.asarray(self.d + 2, loc.dtype)
        return WishartParams(df, jnp.linalg.cholesky(loc / df))

    def _halves(self, df: Array) -> Array:
        """(df − i)/2 for i = 0 … d − 1."""
        return (df[..., None] - jnp.arange(self.d, dtype=df.dtype)) / 2

    def sample(self, params: WishartParams, key: Array, n: int) -> Array:
        """n draws, shape (n, d, d), by Bartlett's decomposition."""
        chi, normal = jax.random.split(key)
        squares = inside(2 * jax.random.gamma(chi, self._halves(params.df), (n, self.d), params.df.dtype))
        below = jnp.tril(jax.random.normal(normal, (n, self.d, self.d), params.df.dtype), -1)
        factors = jnp.tril(params.scale_tril) @ (below + jax.vmap(jnp.diag)(jnp.sqrt(squares)))
        return factors @ jnp.swapaxes(factors, -1, -2)

    def log_prob(self, params: WishartParams, x: Array) -> Array:
        """½(ν − d − 1) log|X| − ½ tr V⁻¹X − ½ν log|V| − ½νd log 2 − log Γ_d(ν/2)."""
        x = point(x, (self.d, self.d), params.df.dtype)
        df, lower = params.df, jnp.tril(params.scale_tril)
        log_det = 2 * _log_det(jnp.linalg.cholesky(x))
        half = solve_triangular(lower, x, lower=True)
        trace = jnp.trace(solve_triangular(lower, half.T, lower=True))
        normaliser = df * _log_det(lower) + df * self.d / 2 * jnp.log(2.0) + multigammaln(df / 2, self.d)
        return (df - self.d - 1) / 2 * log_det - trace / 2 - normaliser

    def entropy(self, params: WishartParams) -> Array:
        """(d + 1)(log|L| + ½d log 2) + log Γ_d(ν/2) − ½(ν − d − 1)ψ_d(ν/2) + ½νd."""
        df, d = params.df, self.d
        digammas = jnp.sum(digamma(self._halves(df)))
        logs = (d + 1) * (_log_det(jnp.tril(params.scale_tril)) + d / 2 * jnp.log(2.0)) + multigammaln(df / 2, d)
        return logs - (df - d - 1) / 2 * digammas + df * d / 2

    def fisher(self, params: WishartParams) -> Closed:
        """¼ψ_d′(ν/2)δν² + 2δν tr S + ν(‖S‖² + ‖diag S‖²) with S = L⁻¹δL, in O(d³)."""
        return closed(self, params)

    def _spread(self, df: Array) -> Array:
        """ψ_d′(ν/2)/4 − d/2ν, what is left of δν at a given mean, of positive terms."""
        x = self._halves(df)
        return 0.25 * jnp.sum(excess_trigamma(x) / x + jnp.arange(self.d, dtype=df.dtype) / (df * x))

    def _mv(self, params: WishartParams, v: WishartParams) -> WishartParams:
        df, lower = params.df, jnp.tril(params.scale_tril)
        s = relative(lower, v.scale_tril)
        slope = df * doubled_diagonal(s) + v.df * jnp.eye(self.d, dtype=df.dtype)
        spread = self._spread(df) + self.d / (2 * df)
        return WishartParams(spread * v.df + jnp.trace(s), covector(lower, slope))

    def _solve(self, params: WishartParams, g: WishartParams) -> WishartParams:
        df, lower = params.df, jnp.tril(params.scale_tril)
        slope = jnp.tril(lower.T @ jnp.tril(g.scale_tril))
        change = (g.df - jnp.trace(slope) / (2 * df)) / self._spread(df)
        rest = slope - change * jnp.eye(self.d, dtype=df.dtype)
        return WishartParams(change, lower @ (half_lower(rest) / df))

    def retract(self, params: WishartParams, step: WishartParams) -> WishartParams:
        """ν − (d − 1) and the diagonal of L grow by exponentials: never leaves the family."""
        least = self.d - 1
        df = least + grown(params.df - least, step.df)
        # A change that rounding would swallow still leaves ν above d − 1.
        df = jnp.maximum(df, least * (1 + jnp.finfo(df.dtype).eps))
        return WishartParams(df, retract_lower(jnp.tril(params.scale_tril), step.scale_tril))

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """T(X) = (X, log|X|)."""
        return x, jnp.linalg.slogdet(x)[1]

    def to_natural(self, params: WishartParams) -> tuple[Array, Array]:
        """(−½V⁻¹, ν/2)."""
        root = inverse_lower(jnp.tril(params.scale_tril))
        return -0.5 * root.T @ root, params.df / 2

    def from_natural(self, natural: tuple[Array, Array]) -> WishartParams:
        """The inverse of `to_natural`."""
        return WishartParams(2 * natural[1], lower_of_inverse(-2 * natural[0]))

    def to_mean(self, params: WishartParams) -> tuple[Array, Array]:
        """(νV, ψ_d(ν/2) + d log 2 + log|V|)."""
        lower = jnp.tril(params.scale_tril)
        log_det = jnp.sum(digamma(self._halves(params.df))) + self.d * jnp.log(2.0) + 2 * _log_det(lower)
        return params.df * lower @ lower.T, log_det

    def from_mean(self, mean: tuple[Array, Array]) -> WishartParams:
        """The inverse of `to_mean`, by Newton's method for d log ν/2 − ψ_d(ν/2) = log|E X| − E log|X|."""
        lower = jnp.linalg.cholesky(mean[0])
        gap = 2 * _log_det(lower) - mean[1]

        def minus_log_gap(u: Array) -> Array:
            df = self.d - 1 + jnp.exp(u)
            x = self._halves(df)
            fraction = jnp.arange(self.d, dtype=df.dtype) / df
            return -jnp.log(jnp.sum(log_minus_digamma(x) - jnp.log1p(-fraction)))

        start = jnp.log(self.d * (self.d + 1) / 2) - jnp.log(gap)
        df = self.d - 1 + jnp.exp(inverse(minus_log_gap, -jnp.log(gap), start))
        return WishartParams(df, lower / jnp.sqrt(df))


@dataclass(frozen=True)
class MatrixNormal:
    """See `matrix_normal`."""

    n: int
    p: int
    reparameterised = True

    def init(self, loc: Any = None, scale: Any = None) -> MatrixNormalParams:
        """N(loc, scale²) entry by entry: loc 0, shape (n, p), and scale 1, a number, unless given."""
        if jnp.ndim(0.0 if scale is None else scale):
            raise ValueError(f"scale: expected a number, got shape {jnp.shape(scale)}")
        loc, scales = located(loc, scale, (self.n, self.p))
        scale = scales[0, 0]
        return MatrixNormalParams(loc, scale * jnp.eye(self.n, dtype=scale.dtype), jnp.eye(self.p, dtype=scale.dtype))

    def sample(self, params: MatrixNormalParams, key: Array, n: int) -> Array:
        """n draws, shape (n, rows, columns)."""
        z = jax.random.normal(key, (n, self.n, self.p), params.loc.dtype)
        return params.loc + jnp.tril(params.row_tril) @ z @ jnp.tril(params.col_tril).T

    def log_prob(self, params: MatrixNormalParams, x: Array) -> Array:
        """−½‖A⁻¹(X − M)B⁻ᵀ‖² − p log|A| − n log|B| − ½np log 2π."""
        x = point(x, (self.n, self.p), params.loc.dtype)
        z = self._standard(params, x - params.loc)
        return -0.5 * jnp.sum(jnp.square(z)) - self.entropy(params) + self.n * self.p / 2

    def _standard(self, params: MatrixNormalParams, x: Array) -> Array:
        half = solve_triangular(params.row_tril, x, lower=True)
        return solve_triangular(params.col_tril, half.T, lower=True).T

    def entropy(self, params: MatrixNormalParams) -> Array:
        """p log|A| + n log|B| + ½np(1 + log 2π)."""
        logs = self.p * _log_det(params.row_tril) + self.n * _log_det(params.col_tril)
        return logs + self.n * self.p / 2 * (1 + LOG_2PI)

    def fisher(self, params: MatrixNormalParams) -> Closed:
        """F in the coordinates (M, A, B), of nullity 1: A may be multiplied by what B is divided by. O(n³ + p³)."""
        return closed(self, params)

    def _mv(self, params: MatrixNormalParams, v: MatrixNormalParams) -> MatrixNormalParams:
        """With S = A⁻¹δA, R = B⁻¹δB: p(‖S‖² + ‖diag S‖²) + n(‖R‖² + ‖diag R‖²) + 4 tr S tr R."""
        a, b = jnp.tril(params.row_tril), jnp.tril(params.col_tril)
        s, r = relative(a, v.row_tril), relative(b, v.col_tril)
        eye = lambda size, x: x * jnp.eye(size, dtype=a.dtype)  # noqa: E731
        row = covector(a, self.p * doubled_diagonal(s) + eye(self.n, 2 * jnp.trace(r)))
        col = covector(b, self.n * doubled_diagonal(r) + eye(self.p, 2 * jnp.trace(s)))
        z = self._standard(params, v.loc)
        loc = solve_triangular(a, z, lower=True, trans=1)
        return MatrixNormalParams(solve_triangular(b, loc.T, lower=True, trans=1).T, row, col)

    def _solve(self, params: MatrixNormalParams, g: MatrixNormalParams) -> MatrixNormalParams:
        """The step in which rows and columns share what is common to both, p tr S = n tr R."""
        a, b = jnp.tril(params.row_tril), jnp.tril(params.col_tril)
        row, col = jnp.tril(a.T @ jnp.tril(g.row_tril)), jnp.tril(b.T @ jnp.tril(g.col_tril))
        common = (jnp.trace(row) + jnp.trace(col)) / 8  # p tr S = n tr R
        row = row - 2 * common / self.n * jnp.eye(self.n, dtype=a.dtype)
        col = col - 2 * common / self.p * jnp.eye(self.p, dtype=a.dtype)
        loc = a @ (a.T @ g.loc @ b) @ b.T
        return MatrixNormalParams(loc, a @ half_lower(row) / self.p, b @ half_lower(col) / self.n)

    def retract(self, params: MatrixNormalParams, step: MatrixNormalParams) -> MatrixNormalParams:
        """M + δM, and both factors with the diagonal multiplied by an exponential: never leaves the family."""
        row = retract_lower(jnp.tril(params.row_tril), step.row_tril)
        return MatrixNormalParams(params.loc + step.loc, row, retract_lower(jnp.tril(params.col_tril), step.col_tril))


def wishart(d: int) -> Wishart:
    """A positive definite matrix of shape (d, d) with parameters (df, scale_tril) = (ν, L), mean νLLᵀ.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.wishart(2)
        >>> [[round(float(x), 4) for x in row] for row in family.to_mean(family.init())[0]]
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return Wishart(dimension(d, "wishart"))


def matrix_normal(n: int, p: int) -> MatrixNormal:
    """A matrix of shape (n, p) whose rows covary by AAᵀ and whose columns by BBᵀ: parameters (loc, row_tril, col_tril).

    The covariance of the np entries, a Kronecker product, is never formed. As a curved family it has no natural
    coordinates of its own.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.matrix_normal(2, 3)
        >>> round(float(family.entropy(family.init())), 4)
        8.5136
    """
    return MatrixNormal(dimension(n, "matrix_normal", "n"), dimension(p, "matrix_normal", "p"))
