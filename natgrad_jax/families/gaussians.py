"""Gaussians: full rank by covariance or by precision, mean field, blocks, low rank plus diagonal, banded precision."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.tree_util import Partial

from natgrad_jax._tree import Space
from natgrad_jax.families.shared import (
    LOG_2PI,
    bounded,
    closed,
    covector,
    dimension,
    doubled_diagonal,
    filled,
    grown,
    half_lower,
    inverse_lower,
    located,
    lower_of_inverse,
    point,
    relative,
    retract_lower,
)
from natgrad_jax.operators import Blocks, Closed, Diagonal


class FullRankParams(NamedTuple):
    """x = loc + L ε, L = tril(scale_tril): the entries above the diagonal are ignored."""

    loc: Array
    scale_tril: Array


class PrecisionParams(NamedTuple):
    """x = loc + L⁻ᵀ ε, L = tril(precision_tril), so that the precision is LLᵀ."""

    loc: Array
    precision_tril: Array


class MeanFieldParams(NamedTuple):
    """x = loc + exp(log_scale) ε."""

    loc: Array
    log_scale: Array


class LowRankParams(NamedTuple):
    """x = loc + exp(log_scale) ε + B η, B = factor of shape (d, r)."""

    loc: Array
    log_scale: Array
    factor: Array


class BandedParams(NamedTuple):
    """The precision is LLᵀ with L banded: bands[i, k] = L[i + k, i], shape (d, bandwidth + 1).

    What would stand beyond the last row is ignored.
    """

    loc: Array
    bands: Array


class GaussianCoordinates(NamedTuple):
    """What goes with x and with xxᵀ: T = (x, xxᵀ), its mean η = (μ, Σ + μμᵀ), and θ = (Pμ, −½P) with P = Σ⁻¹."""

    first: Array
    second: Array


def _normal_entropy(log_det: Array, d: int) -> Array:
    return log_det + d / 2 * (1 + LOG_2PI)


class _Normal:
    """Draws of a Gaussian: `push` maps standard normal numbers to them, `noise` for each."""

    d: Any
    reparameterised = True

    @property
    def noise(self) -> int:
        """d normal numbers for a draw."""
        return int(self.d)

    def push(self, params: Any, eps: Array) -> Array:
        """The draws, shape (n, d), that go with ε of shape (n, noise)."""
        raise NotImplementedError

    def sample(self, params: Any, key: Array, n: int) -> Array:
        """n draws, shape (n, d)."""
        return self.push(params, jax.random.normal(key, (n, self.noise), jax.tree.leaves(params)[0].dtype))


class _Full(_Normal):
    """What a full-rank Gaussian is in coordinates that do not depend on its parameters."""

    def statistics(self, x: Array) -> GaussianCoordinates:
        """T(x) = (x, xxᵀ)."""
        return GaussianCoordinates(x, jnp.outer(x, x))


@dataclass(frozen=True)
class GaussianFullRank(_Full):
    """See `gaussian_full_rank`."""

    d: int

    def init(self, loc: Any = None, scale: Any = None) -> FullRankParams:
        """N(loc, scale²): loc 0 and scale 1 unless given; scale is a number, (d,), or a lower triangle (d, d)."""
        scale = None if scale is None else jnp.asarray(scale)
        if scale is not None and scale.shape == (self.d, self.d):
            lower = jnp.tril(filled(scale, 1.0, scale.shape, "scale"))
            loc = jnp.zeros(self.d, lower.dtype) if loc is None else filled(loc, 0.0, (self.d,), "loc")
            dtype = jnp.promote_types(loc.dtype, lower.dtype)
            return FullRankParams(loc.astype(dtype), lower.astype(dtype))
        loc, scale = located(loc, scale, (self.d,))
        return FullRankParams(loc, jnp.diag(scale))

    def push(self, params: FullRankParams, eps: Array) -> Array:
        """μ + Lε for every ε, shape (n, d)."""
        return params.loc + eps @ jnp.tril(params.scale_tril).T

    def log_prob(self, params: FullRankParams, x: Array) -> Array:
        """−½‖L⁻¹(x − μ)‖² − Σ log|L_ii| − (d/2) log 2π."""
        x = point(x, (self.d,), params.loc.dtype)
        eps = solve_triangular(params.scale_tril, x - params.loc, lower=True)
        return -0.5 * (eps @ eps) - self.entropy(params) + self.d / 2

    def entropy(self, params: FullRankParams) -> Array:
        """Σ log|L_ii| + (d/2)(1 + log 2π)."""
        return _normal_entropy(jnp.sum(jnp.log(jnp.abs(jnp.diagonal(params.scale_tril)))), self.d)

    def fisher(self, params: FullRankParams) -> Closed:
        """F in the coordinates (μ, L): products and solves in O(d³), the p×p matrix is never formed."""
        return Closed(Partial(_full_rank_mv, params), Partial(_full_rank_solve, params), Space.of(params))

    def retract(self, params: FullRankParams, step: FullRankParams) -> FullRankParams:
        """μ + δμ, and L·R with R lower triangular and diagonal exp((L⁻¹δL)_ii): never leaves the family."""
        lower = jnp.tril(params.scale_tril)
        return FullRankParams(params.loc + step.loc, retract_lower(lower, step.scale_tril))

    def to_natural(self, params: FullRankParams) -> GaussianCoordinates:
        """(Pμ, −½P), P = (LLᵀ)⁻¹."""
        root = inverse_lower(jnp.tril(params.scale_tril))
        precision = root.T @ root
        return GaussianCoordinates(precision @ params.loc, -0.5 * precision)

    def from_natural(self, natural: GaussianCoordinates) -> FullRankParams:
        """The inverse of `to_natural`."""
        lower = lower_of_inverse(-2 * natural.second)
        return FullRankParams(lower @ (lower.T @ natural.first), lower)

    def to_mean(self, params: FullRankParams) -> GaussianCoordinates:
        """(μ, Σ + μμᵀ)."""
        lower = jnp.tril(params.scale_tril)
        return GaussianCoordinates(params.loc, lower @ lower.T + jnp.outer(params.loc, params.loc))

    def from_mean(self, mean: GaussianCoordinates) -> FullRankParams:
        """The inverse of `to_mean`."""
        return FullRankParams(mean.first, jnp.linalg.cholesky(mean.second - jnp.outer(mean.first, mean.first)))


def _full_rank_solve(params: FullRankParams, g: FullRankParams) -> FullRankParams:
    """F⁻¹g = (LLᵀ g_μ, L Φ(Lᵀ G_L))."""
    lower = jnp.tril(params.scale_tril)
    return FullRankParams(lower @ (lower.T @ g.loc), lower @ half_lower(lower.T @ jnp.tril(g.scale_tril)))


def _full_rank_mv(params: FullRankParams, v: FullRankParams) -> FullRankParams:
    """Fv: with S = L⁻¹V_L the norm is ‖L⁻¹v_μ‖² + ‖S‖² + ‖diag S‖², so Fv = (L⁻ᵀL⁻¹v_μ, tril L⁻ᵀ(S + diag S))."""
    lower = jnp.tril(params.scale_tril)
    both = doubled_diagonal(relative(lower, v.scale_tril))
    standard = solve_triangular(lower, v.loc, lower=True)
    return FullRankParams(solve_triangular(lower, standard, lower=True, trans=1), covector(lower, both))


@dataclass(frozen=True)
class GaussianPrecision(_Full):
    """See `gaussian_precision`."""

    d: int

    def init(self, loc: Any = None, scale: Any = None) -> PrecisionParams:
        """N(loc, diag(scale²)): loc 0 and scale 1 unless given; scale is a number or (d,)."""
        loc, scale = located(loc, scale, (self.d,))
        return PrecisionParams(loc, jnp.diag(1 / scale))

    def push(self, params: PrecisionParams, eps: Array) -> Array:
        """μ + L⁻ᵀε for every ε, shape (n, d)."""
        return params.loc + solve_triangular(params.precision_tril, eps.T, lower=True, trans=1).T

    def log_prob(self, params: PrecisionParams, x: Array) -> Array:
        """−½‖Lᵀ(x − μ)‖² + Σ log|L_ii| − (d/2) log 2π."""
        x = point(x, (self.d,), params.loc.dtype)
        eps = jnp.tril(params.precision_tril).T @ (x - params.loc)
        return -0.5 * (eps @ eps) - self.entropy(params) + self.d / 2

    def entropy(self, params: PrecisionParams) -> Array:
        """−Σ log|L_ii| + (d/2)(1 + log 2π)."""
        return _normal_entropy(-jnp.sum(jnp.log(jnp.abs(jnp.diagonal(params.precision_tril)))), self.d)

    def fisher(self, params: PrecisionParams) -> Closed:
        """F in the coordinates (μ, L): LLᵀ for μ, and for L what it is for a factor of the covariance."""
        return Closed(Partial(_precision_mv, params), Partial(_precision_solve, params), Space.of(params))

    def retract(self, params: PrecisionParams, step: PrecisionParams) -> PrecisionParams:
        """μ + δμ, and L·R with R lower triangular and diagonal exp((L⁻¹δL)_ii): never leaves the family."""
        lower = jnp.tril(params.precision_tril)
        return PrecisionParams(params.loc + step.loc, retract_lower(lower, step.precision_tril))

    def to_natural(self, params: PrecisionParams) -> GaussianCoordinates:
        """(Pμ, −½P), P = LLᵀ."""
        lower = jnp.tril(params.precision_tril)
        return GaussianCoordinates(lower @ (lower.T @ params.loc), -0.5 * lower @ lower.T)

    def from_natural(self, natural: GaussianCoordinates) -> PrecisionParams:
        """The inverse of `to_natural`."""
        lower = jnp.linalg.cholesky(-2 * natural.second)
        half = solve_triangular(lower, natural.first, lower=True)
        return PrecisionParams(solve_triangular(lower, half, lower=True, trans=1), lower)

    def to_mean(self, params: PrecisionParams) -> GaussianCoordinates:
        """(μ, P⁻¹ + μμᵀ)."""
        root = inverse_lower(jnp.tril(params.precision_tril))
        return GaussianCoordinates(params.loc, root.T @ root + jnp.outer(params.loc, params.loc))

    def from_mean(self, mean: GaussianCoordinates) -> PrecisionParams:
        """The inverse of `to_mean`."""
        return PrecisionParams(mean.first, lower_of_inverse(mean.second - jnp.outer(mean.first, mean.first)))


def _precision_solve(params: PrecisionParams, g: PrecisionParams) -> PrecisionParams:
    lower = jnp.tril(params.precision_tril)
    half = solve_triangular(lower, g.loc, lower=True)
    loc = solve_triangular(lower, half, lower=True, trans=1)
    return PrecisionParams(loc, lower @ half_lower(lower.T @ jnp.tril(g.precision_tril)))


def _precision_mv(params: PrecisionParams, v: PrecisionParams) -> PrecisionParams:
    lower = jnp.tril(params.precision_tril)
    both = doubled_diagonal(relative(lower, v.precision_tril))
    return PrecisionParams(lower @ (lower.T @ v.loc), covector(lower, both))


@dataclass(frozen=True)
class GaussianMeanField(_Normal):
    """See `gaussian_mean_field`."""

    d: int

    def init(self, loc: Any = None, scale: Any = None) -> MeanFieldParams:
        """N(loc, diag(scale²)): loc 0 and scale 1 unless given."""
        loc, scale = located(loc, scale, (self.d,))
        return MeanFieldParams(loc, jnp.log(scale))

    def push(self, params: MeanFieldParams, eps: Array) -> Array:
        """μ + σε for every ε, shape (n, d)."""
        return params.loc + jnp.exp(params.log_scale) * eps

    def log_prob(self, params: MeanFieldParams, x: Array) -> Array:
        """−½Σ((x − μ)/σ)² − Σ log σ − (d/2) log 2π."""
        x = point(x, (self.d,), params.loc.dtype)
        eps = (x - params.loc) * jnp.exp(-params.log_scale)
        return -0.5 * jnp.sum(jnp.square(eps)) - self.entropy(params) + self.d / 2

    def entropy(self, params: MeanFieldParams) -> Array:
        """Σ log σ + (d/2)(1 + log 2π)."""
        return _normal_entropy(jnp.sum(params.log_scale), self.d)

    def fisher(self, params: MeanFieldParams) -> Diagonal:
        """diag(σ⁻², 2) in the coordinates (μ, log σ)."""
        return Diagonal(MeanFieldParams(jnp.exp(-2 * params.log_scale), 2 + 0 * params.log_scale))

    def retract(self, params: MeanFieldParams, step: MeanFieldParams) -> MeanFieldParams:
        """params + step, with log σ changed by 20 at most: (μ, log σ) is a global chart."""
        return MeanFieldParams(params.loc + step.loc, params.log_scale + bounded(step.log_scale))

    def statistics(self, x: Array) -> GaussianCoordinates:
        """T(x) = (x, x²)."""
        return GaussianCoordinates(x, jnp.square(x))

    def to_natural(self, params: MeanFieldParams) -> GaussianCoordinates:
        """(μ/σ², −1/2σ²)."""
        precision = jnp.exp(-2 * params.log_scale)
        return GaussianCoordinates(precision * params.loc, -0.5 * precision)

    def from_natural(self, natural: GaussianCoordinates) -> MeanFieldParams:
        """The inverse of `to_natural`."""
        precision = -2 * natural.second
        return MeanFieldParams(natural.first / precision, -0.5 * jnp.log(precision))

    def to_mean(self, params: MeanFieldParams) -> GaussianCoordinates:
        """(μ, σ² + μ²)."""
        return GaussianCoordinates(params.loc, jnp.exp(2 * params.log_scale) + jnp.square(params.loc))

    def from_mean(self, mean: GaussianCoordinates) -> MeanFieldParams:
        """The inverse of `to_mean`."""
        return MeanFieldParams(mean.first, 0.5 * jnp.log(mean.second - jnp.square(mean.first)))


@dataclass(frozen=True)
class GaussianBlockDiagonal(_Normal):
    """See `gaussian_block_diagonal`."""

    sizes: tuple[int, ...]

    @property
    def d(self) -> int:
        """The dimension of x."""
        return sum(self.sizes)

    @property
    def _blocks(self) -> list[GaussianFullRank]:
        return [GaussianFullRank(size) for size in self.sizes]

    def _parts(self, x: Array) -> list[Array]:
        """x, cut along its last axis."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
        return jnp.split(x, ends, axis=-1)

    def init(self, loc: Any = None, scale: Any = None) -> tuple[FullRankParams, ...]:
        """N(loc, diag(scale²)): loc 0 and scale 1 unless given; a number or (d,)."""
        locs, scales = map(self._parts, located(loc, scale, (self.d,)))
        return tuple(block.init(loc, scale) for block, loc, scale in zip(self._blocks, locs, scales, strict=True))

    def push(self, params: tuple[FullRankParams, ...], eps: Array) -> Array:
        """The map of each block, for every ε, shape (n, d)."""
        members = zip(self._blocks, params, self._parts(eps), strict=True)
        return jnp.concatenate([block.push(p, own) for block, p, own in members], axis=-1)

    def log_prob(self, params: tuple[FullRankParams, ...], x: Array) -> Array:
        """The sum over the blocks."""
        x = point(x, (self.d,), params[0].loc.dtype)
        members = zip(self._blocks, params, self._parts(x), strict=True)
        return jnp.sum(jnp.stack([block.log_prob(p, part) for block, p, part in members]))

    def entropy(self, params: tuple[FullRankParams, ...]) -> Array:
        """The sum over the blocks."""
        return jnp.sum(jnp.stack([block.entropy(p) for block, p in zip(self._blocks, params, strict=True)]))

    def fisher(self, params: tuple[FullRankParams, ...]) -> Blocks:
        """A closed form for each block."""
        return Blocks(tuple(block.fisher(p) for block, p in zip(self._blocks, params, strict=True)))

    def retract(self, params: tuple[FullRankParams, ...], step: Any) -> tuple[FullRankParams, ...]:
        """Each block by itself."""
        return tuple(block.retract(p, s) for block, p, s in zip(self._blocks, params, step, strict=True))

    def statistics(self, x: Array) -> tuple[GaussianCoordinates, ...]:
        """T(x) = (x, xxᵀ) of every block."""
        return tuple(block.statistics(part) for block, part in zip(self._blocks, self._parts(x), strict=True))

    def to_natural(self, params: tuple[FullRankParams, ...]) -> tuple[GaussianCoordinates, ...]:
        """(Pμ, −½P) of every block."""
        return tuple(block.to_natural(p) for block, p in zip(self._blocks, params, strict=True))

    def from_natural(self, natural: tuple[GaussianCoordinates, ...]) -> tuple[FullRankParams, ...]:
        """The inverse of `to_natural`."""
        return tuple(block.from_natural(p) for block, p in zip(self._blocks, natural, strict=True))

    def to_mean(self, params: tuple[FullRankParams, ...]) -> tuple[GaussianCoordinates, ...]:
        """(μ, Σ + μμᵀ) of every block."""
        return tuple(block.to_mean(p) for block, p in zip(self._blocks, params, strict=True))

    def from_mean(self, mean: tuple[GaussianCoordinates, ...]) -> tuple[FullRankParams, ...]:
        """The inverse of `to_mean`."""
        return tuple(block.from_mean(p) for block, p in zip(self._blocks, mean, strict=True))


@dataclass(frozen=True)
class GaussianLowRank(_Normal):
    """See `gaussian_low_rank`."""

    d: int
    rank: int

    def init(self, loc: Any = None, scale: Any = None) -> LowRankParams:
        """Mean loc (0), standard deviations scale (1); half of each variance is in B, one entry a row."""
        loc, scale = located(loc, scale, (self.d,))
        # A column of zeros would have no direction to grow into.
        owner = jnp.arange(self.d)[:, None] % self.rank == jnp.arange(self.rank)
        factor = jnp.where(owner, math.sqrt(0.5) * scale[:, None], 0)
        return LowRankParams(loc, jnp.log(scale) - 0.5 * math.log(2), factor)

    @property
    def noise(self) -> int:
        """d + rank normal numbers for a draw."""
        return self.d + self.rank

    def push(self, params: LowRankParams, eps: Array) -> Array:
        """μ + σε₁ + Bε₂ for every ε, shape (n, d + rank)."""
        return params.loc + jnp.exp(params.log_scale) * eps[:, : self.d] + eps[:, self.d :] @ params.factor.T

    def log_prob(self, params: LowRankParams, x: Array) -> Array:
        """−½(x − μ)ᵀΣ⁻¹(x − μ) − ½ log|2πΣ|, in O(dr²)."""
        x = point(x, (self.d,), params.loc.dtype)
        y = (x - params.loc) * jnp.exp(-params.log_scale)
        basis = jnp.linalg.qr(_stacked(params))[0]
        # What no direction of B explains: a difference of squares would cancel where B is far larger than D.
        rest = jnp.append(y, jnp.zeros(self.rank, y.dtype)) - basis @ (basis[: self.d].T @ y)
        return -0.5 * (rest @ rest) - self.entropy(params) + self.d / 2

    def entropy(self, params: LowRankParams) -> Array:
        """½ log|Σ| + (d/2)(1 + log 2π)."""
        lower, _ = _capacitance(params)
        log_det = jnp.sum(params.log_scale) + jnp.sum(jnp.log(jnp.abs(jnp.diagonal(lower))))
        return _normal_entropy(log_det, self.d)

    def fisher(self, params: LowRankParams) -> Closed:
        """F in the coordinates (μ, log σ, B), singular: B and a rotation of its columns are one Σ.

        Products cost O(dr²); a solve O(d³), for the part of log σ that no change of B makes up for. Reverse-mode
        derivatives of a solve go through `solvers.solve`.
        """
        return Closed(Partial(_low_rank_mv, params), Partial(_low_rank_solve, params), Space.of(params))

    def retract(self, params: LowRankParams, step: LowRankParams) -> LowRankParams:
        """params + step, with log σ changed by 20 at most: (μ, log σ, B) is a global chart."""
        log_scale = params.log_scale + bounded(step.log_scale)
        return LowRankParams(params.loc + step.loc, log_scale, params.factor + step.factor)


def _capacitance(params: LowRankParams) -> tuple[Array, Array]:
    """L with LLᵀ = I + BᵀD⁻¹B, from a QR factorisation, however far B is beyond D; and D^(−½)B."""
    stacked = _stacked(params)
    return jnp.linalg.qr(stacked, mode="r").T, stacked[: len(params.loc)]


def _stacked(params: LowRankParams) -> Array:
    """D^(−½)B over the identity."""
    scaled = params.factor * jnp.exp(-params.log_scale)[:, None]
    return jnp.concatenate([scaled, jnp.eye(scaled.shape[1], dtype=scaled.dtype)])


# In the frame x/σ, where D = I: K = (I + BBᵀ)⁻¹ = I − VVᵀ with V = BC⁻ᵀ, and δΣ = diag(2δs) + XBᵀ + BXᵀ with X = δB.


def _scaled_frame(params: LowRankParams) -> tuple[Array, Array]:
    lower, b = _capacitance(params)
    return b, solve_triangular(lower, b.T, lower=True).T


def _low_rank_mv(params: LowRankParams, v: LowRankParams) -> LowRankParams:
    """(Σ⁻¹v_μ, 2 diag W, 2WB) with W = ½Kδ ΣK."""
    sigma = jnp.exp(params.log_scale)
    b, w = _scaled_frame(params)
    k = lambda x: x - w @ (w.T @ x)  # noqa: E731
    x = v.factor / sigma[:, None]
    kb, kx = k(b), k(x)
    a = 2 * v.log_scale
    # The diagonal and the product with B of KδΣK, of which neither needs a d × d matrix.
    diagonal = _square_entries(w, a) + 2 * jnp.sum(kx * kb, axis=1)
    product = k(a[:, None] * kb) + kx @ (b.T @ kb) + kb @ (x.T @ kb)
    return LowRankParams(k(v.loc / sigma) / sigma, diagonal, product / sigma[:, None])


def _square_entries(v: Array, a: Array) -> Array:
    """(K∘K)a for K = I − VVᵀ: a − 2h∘a + Σ_kl V_ik V_il (Σ_j V_jk V_jl a_j)."""
    inner = v.T @ (a[:, None] * v)
    return a - 2 * jnp.sum(jnp.square(v), axis=1) * a + jnp.sum((v @ inner) * v, axis=1)


def _low_rank_solve(params: LowRankParams, g: LowRankParams) -> LowRankParams:
    """One F⁺g: B explains what it can, and log σ the rest, by the Schur complement 2N∘N, N the projector beside B."""
    sigma = jnp.exp(params.log_scale)
    b, w = _scaled_frame(params)
    k = lambda x: x - w @ (w.T @ x)  # noqa: E731
    cov = lambda x: x + b @ (b.T @ x)  # noqa: E731
    kb = k(b)
    basis, lengths, axes = jnp.linalg.svd(b, full_matrices=True)
    used = lengths > len(b) * jnp.finfo(b.dtype).eps * lengths[0]
    weights = jnp.where(used, 1 + 1 / jnp.square(jnp.where(used, lengths, 1)), 0)
    inverse_size = (axes.T * weights) @ axes  # of S = BᵀKB

    def change_of_factor(r: Array) -> Array:
        """X with K(XBᵀ + BXᵀ)KB = r: the one without a rotation, X = ΣrS⁻¹ − BZ with Z = ½S⁻¹BᵀrS⁻¹ symmetric."""
        twice = inverse_size @ (b.T @ r) @ inverse_size
        return cov(r @ inverse_size) - b @ ((twice + twice.T) / 4)

    slope = g.factor * sigma[:, None]
    alone = change_of_factor(slope)
    rest = g.log_scale - 2 * jnp.sum(k(alone) * kb, axis=1)
    # The projector on what is orthogonal to the columns of B, in the frame x/σ, from a basis: small entries hold.
    beside = basis * ~jnp.concatenate([used, jnp.zeros(len(b) - len(used), bool)])
    log_scale = _pseudo_inverse(2 * jnp.square(beside @ beside.T)) @ rest
    x = change_of_factor(slope - k(2 * log_scale[:, None] * kb))
    return LowRankParams(sigma * cov(sigma * g.loc), log_scale, sigma[:, None] * x)


def _pseudo_inverse(matrix: Array) -> Array:
    """A⁺ of a symmetric positive semi-definite A."""
    values, vectors = jnp.linalg.eigh(matrix)
    kept = values > 4 * len(matrix) * jnp.finfo(matrix.dtype).eps * values[-1]
    return (vectors * jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)) @ vectors.T


@dataclass(frozen=True)
class GaussianBanded(_Normal):
    """See `gaussian_banded`."""

    d: int
    bandwidth: int

    @property
    def _inside(self) -> Array:
        """Which bands[i, k] are entries of L."""
        return jnp.arange(self.d)[:, None] + jnp.arange(self.bandwidth + 1) < self.d

    def _bands(self, params: BandedParams) -> Array:
        return jnp.where(self._inside, params.bands, 0)

    def _windows(self, y: Array) -> Array:
        """y_i, …, y_{i+b} for every i, zero beyond the end."""
        padded = jnp.concatenate([y, jnp.zeros(self.bandwidth, y.dtype)])
        return padded[jnp.arange(self.d)[:, None] + jnp.arange(self.bandwidth + 1)]

    def init(self, loc: Any = None, scale: Any = None) -> BandedParams:
        """N(loc, diag(scale²)): loc 0 and scale 1 unless given; a number or (d,)."""
        loc, scale = located(loc, scale, (self.d,))
        return BandedParams(loc, jnp.zeros((self.d, self.bandwidth + 1), scale.dtype).at[:, 0].set(1 / scale))

    def push(self, params: BandedParams, eps: Array) -> Array:
        """μ + L⁻ᵀε for every ε, shape (n, d)."""
        return params.loc + jax.vmap(lambda e: self._backward(params, e))(eps)

    def log_prob(self, params: BandedParams, x: Array) -> Array:
        """−½‖Lᵀ(x − μ)‖² + Σ log|L_ii| − (d/2) log 2π."""
        x = point(x, (self.d,), params.loc.dtype)
        eps = jnp.sum(self._bands(params) * self._windows(x - params.loc), axis=1)
        return -0.5 * (eps @ eps) - self.entropy(params) + self.d / 2

    def entropy(self, params: BandedParams) -> Array:
        """−Σ log|L_ii| + (d/2)(1 + log 2π)."""
        return _normal_entropy(-jnp.sum(jnp.log(jnp.abs(params.bands[:, 0]))), self.d)

    def fisher(self, params: BandedParams) -> Closed:
        """F in the coordinates (μ, L): LLᵀ for μ, and a block for each column ℓ of L, a regression on the next ones.

        The block is Cov(window) + e₀e₀ᵀ/ℓ₀². Products and solves cost O(d·bandwidth³), no d × d matrix is formed.
        """
        return closed(self, params)

    def retract(self, params: BandedParams, step: BandedParams) -> BandedParams:
        """μ + δμ, and the rest of δℓ added to a column before exp(δℓ₀/ℓ₀) multiplies it: the diagonal stays > 0."""
        bands, change = self._bands(params), jnp.where(self._inside, step.bands, 0)
        growth, most = bounded(change[:, :1] / bands[:, :1]), jnp.finfo(bands.dtype).max
        kept = jnp.clip((1 - growth) * bands, -most / 2, most / 2)
        moved = jnp.clip((kept + jnp.clip(change, -most / 2, most / 2)) * jnp.exp(growth), -most, most)
        diagonal = bands[:, 0]
        diagonal = jnp.sign(diagonal) * grown(jnp.abs(diagonal), jnp.abs(diagonal) * growth[:, 0])
        return BandedParams(params.loc + step.loc, moved.at[:, 0].set(diagonal))

    def statistics(self, x: Array) -> GaussianCoordinates:
        """T(x) = (x, x_i x_{i+k} for k ≤ bandwidth), shapes (d,) and (d, bandwidth + 1)."""
        return GaussianCoordinates(x, x[:, None] * self._windows(x))

    def to_natural(self, params: BandedParams) -> GaussianCoordinates:
        """Pμ, and −½P_ii, −P_{i,i+k}: the bands of P = LLᵀ, each entry off the diagonal standing for two."""
        bands = self._bands(params)
        # P_{j,j+k} = Σ_m L_{j,j−m} L_{j+k,j−m}
        padded = jnp.concatenate([jnp.zeros((self.bandwidth, self.bandwidth + 1), bands.dtype), bands])
        rows = jnp.arange(self.d)[:, None] - jnp.arange(self.bandwidth + 1) + self.bandwidth  # column j − m
        columns = padded[rows]  # (d, m, band)
        precision = jnp.zeros_like(bands)
        for k in range(self.bandwidth + 1):
            for m in range(self.bandwidth + 1 - k):
                precision = precision.at[:, k].add(columns[:, m, m] * columns[:, m, m + k])
        factor = jnp.where(jnp.arange(self.bandwidth + 1) > 0, 1.0, 0.5).astype(bands.dtype)
        return GaussianCoordinates(self._product(params, params.loc), -factor * jnp.where(self._inside, precision, 0))

    def from_natural(self, natural: GaussianCoordinates) -> BandedParams:
        """The inverse of `to_natural`: a banded Cholesky factorisation."""
        factor = jnp.where(jnp.arange(self.bandwidth + 1) > 0, 1.0, 2.0).astype(natural.first.dtype)
        precision = jnp.where(self._inside, -factor * natural.second, 0)
        b = self.bandwidth

        def column(trailing: Array, new: Array) -> tuple[Array, Array]:
            """One column of L from the (b + 1, b + 1) part of P that is left, of which the last row enters now."""
            bands = (trailing[0] + new) / jnp.sqrt(trailing[0, 0] + new[0])
            rest = trailing - jnp.outer(bands, bands)
            return jnp.zeros_like(trailing).at[:b, :b].set(rest[1:, 1:]), bands

        start = jnp.zeros((b + 1, b + 1), precision.dtype)
        bands = jax.lax.scan(column, start, precision)[1]
        params = BandedParams(natural.first, bands)
        return BandedParams(self._solve_precision(params, natural.first), bands)

    def to_mean(self, params: BandedParams) -> GaussianCoordinates:
        """(μ, E x_i x_{i+k})."""
        second = self._covariances(params)[:, 0] + params.loc[:, None] * self._windows(params.loc)
        return GaussianCoordinates(params.loc, jnp.where(self._inside, second, 0))

    def from_mean(self, mean: GaussianCoordinates) -> BandedParams:
        """The inverse of `to_mean`: ℓ = W⁻¹e₀/√(e₀ᵀW⁻¹e₀) with W the covariance of a window."""
        b = self.bandwidth
        bands = jnp.where(self._inside, mean.second - mean.first[:, None] * self._windows(mean.first), 0)
        padded = jnp.concatenate([bands, jnp.zeros((b, b + 1), bands.dtype)])
        i, j = jnp.meshgrid(jnp.arange(b + 1), jnp.arange(b + 1), indexing="ij")
        low, gap = jnp.minimum(i, j), jnp.abs(i - j)
        windows = padded[jnp.arange(self.d)[:, None, None] + low, gap] + self._beyond(bands.dtype)
        first = jnp.zeros((self.d, b + 1), bands.dtype).at[:, 0].set(1)
        columns = jnp.linalg.solve(windows, first[..., None])[..., 0]
        return BandedParams(mean.first, jnp.where(self._inside, columns / jnp.sqrt(columns[:, :1]), 0))

    def _beyond(self, dtype: Any) -> Array:
        """1 on the diagonal of what stands beyond the end, in every window."""
        return jnp.where(self._inside, 0, 1).astype(dtype)[:, :, None] * jnp.eye(self.bandwidth + 1, dtype=dtype)

    def _covariances(self, params: BandedParams) -> Array:
        """The covariance of every window, shape (d, b + 1, b + 1), with variance 1 beyond the end."""
        bands, b = self._bands(params), self.bandwidth

        def window(later: Array, column: Array) -> tuple[Array, Array]:
            slope = -column[1:] / column[0]
            shared = later @ slope
            variance = 1 / jnp.square(column[0]) + slope @ shared
            whole = jnp.block([[variance[None, None], shared[None]], [shared[:, None], later]])
            return whole[:b, :b], whole

        return jax.lax.scan(window, jnp.eye(b, dtype=bands.dtype), bands, reverse=True)[1]

    def _backward(self, params: BandedParams, eps: Array) -> Array:
        """L⁻ᵀε."""

        def one(later: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
            column, e = both
            y = (e - column[1:] @ later) / column[0]
            return jnp.concatenate([y[None], later])[: self.bandwidth], y

        start = jnp.zeros(self.bandwidth, eps.dtype)
        return jax.lax.scan(one, start, (self._bands(params), eps), reverse=True)[1]

    def _forward(self, params: BandedParams, v: Array) -> Array:
        """L⁻¹v."""

        def one(pending: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
            column, e = both
            z = (e - pending[0]) / column[0]
            return jnp.concatenate([pending[1:], jnp.zeros_like(pending[:1])]) + column[1:] * z, z

        return jax.lax.scan(one, jnp.zeros(self.bandwidth, v.dtype), (self._bands(params), v))[1]

    def _product(self, params: BandedParams, v: Array) -> Array:
        """LLᵀv."""
        bands = self._bands(params)
        half = jnp.sum(bands * self._windows(v), axis=1)
        places = jnp.arange(self.d)[:, None] + jnp.arange(self.bandwidth + 1)
        return jnp.zeros(self.d + self.bandwidth, v.dtype).at[places].add(bands * half[:, None])[: self.d]

    def _solve_precision(self, params: BandedParams, v: Array) -> Array:
        return self._backward(params, self._forward(params, v))

    def _mv(self, params: BandedParams, v: BandedParams) -> BandedParams:
        change = jnp.where(self._inside, v.bands, 0)
        product = jnp.einsum("ijk,ik->ij", self._covariances(params), change)
        product = product.at[:, 0].add(change[:, 0] / jnp.square(params.bands[:, 0]))
        return BandedParams(self._product(params, v.loc), jnp.where(self._inside, product, 0))

    def _solve(self, params: BandedParams, g: BandedParams) -> BandedParams:
        """(W + e₀e₀ᵀ/ℓ₀²)⁻¹ = W⁻¹ − ½ℓℓᵀ, since W⁻¹e₀ = ℓ₀ℓ."""
        bands, slope = self._bands(params), jnp.where(self._inside, g.bands, 0)
        plain = jnp.linalg.solve(self._covariances(params), slope[..., None])[..., 0]
        change = plain - 0.5 * bands * jnp.sum(bands * slope, axis=1, keepdims=True)
        return BandedParams(self._solve_precision(params, g.loc), jnp.where(self._inside, change, 0))


def gaussian_full_rank(d: int) -> GaussianFullRank:
    """N(μ, LLᵀ) on R^d with parameters (loc, scale_tril) = (μ, L), p = d + d(d+1)/2 of them in use.

    Fisher products and solves are closed-form, F⁻¹g = (LLᵀg_μ, LΦ(LᵀG_L)), O(d³) time and O(d²) memory.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(2)
        >>> round(float(family.log_prob(family.init(scale=2.0), family.init().loc)), 4)
        -3.2242
    """
    return GaussianFullRank(dimension(d, "gaussian_full_rank"))


def gaussian_precision(d: int) -> GaussianPrecision:
    """N(μ, (LLᵀ)⁻¹) on R^d with parameters (loc, precision_tril) = (μ, L).

    Where the precision is what is known, or sums up, as over the terms of a likelihood. Costs as `gaussian_full_rank`.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_precision(2)
        >>> params = family.from_natural(ng.families.GaussianCoordinates(jnp.array([4.0, 0.0]), -2 * jnp.eye(2)))
        >>> params.loc.tolist(), params.precision_tril.tolist()
        ([1.0, 0.0], [[2.0, 0.0], [0.0, 2.0]])
    """
    return GaussianPrecision(dimension(d, "gaussian_precision"))


def gaussian_mean_field(d: int) -> GaussianMeanField:
    """N(μ, diag σ²) on R^d with parameters (loc, log_scale) = (μ, log σ) and Fisher information diag(σ⁻², 2).

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_mean_field(1)
        >>> round(float(family.fisher(family.init(scale=0.5)).entries.loc[0]), 4)
        4.0
    """
    return GaussianMeanField(dimension(d, "gaussian_mean_field"))


def gaussian_block_diagonal(sizes: tuple[int, ...]) -> GaussianBlockDiagonal:
    """N(μ, Σ) on R^d, d = Σ sizes, with a full covariance within each block of coordinates and none between them.

    Parameters: one `FullRankParams` for each block. Costs O(Σ size³).

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_block_diagonal((2, 1))
        >>> [block.scale_tril.shape for block in family.init()]
        [(2, 2), (1, 1)]
    """
    if not isinstance(sizes, tuple | list) or not sizes:
        raise ValueError(f"sizes: expected the sizes of the blocks, such as (2, 3), got {sizes!r}")
    return GaussianBlockDiagonal(tuple(dimension(size, "gaussian_block_diagonal", "in sizes") for size in sizes))


def gaussian_low_rank(d: int, rank: int) -> GaussianLowRank:
    """N(μ, diag σ² + BBᵀ) on R^d with parameters (loc, log_scale, factor) = (μ, log σ, B), B of shape (d, rank).

    Draws, densities and Fisher products cost O(d·rank²); a solve O(d³). A rotation of the columns of B changes nothing:
    the Fisher information has nullity rank(rank − 1)/2, or more where Σ has fewer entries than there
    are parameters. The step is one without a rotation.

    Example:
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_low_rank(100, 3)
        >>> family.init().factor.shape
        (100, 3)
    """
    d = dimension(d, "gaussian_low_rank")
    rank = dimension(rank, "gaussian_low_rank", "rank")
    if rank > d:
        raise ValueError(f"rank: expected at most d = {d}, got {rank}; gaussian_full_rank(d) has them all")
    return GaussianLowRank(d, rank)


def gaussian_banded(d: int, bandwidth: int) -> GaussianBanded:
    """N(μ, (LLᵀ)⁻¹) on R^d with L banded: x_i depends on the next `bandwidth` variables, as along a time series.

    Parameters (loc, bands): see `BandedParams`. Everything costs O(d·bandwidth³), the Fisher information too: its
    columns are independent regressions.

    Example:
        >>> import jax
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_banded(1000, 1)
        >>> family.sample(family.init(), jax.random.key(0), 3).shape
        (3, 1000)
    """
    d = dimension(d, "gaussian_banded")
    bandwidth = dimension(bandwidth, "gaussian_banded", "bandwidth")
    if bandwidth >= d:
        raise ValueError(f"bandwidth: expected less than d = {d}, got {bandwidth}; gaussian_precision(d) has them all")
    return GaussianBanded(d, bandwidth)
