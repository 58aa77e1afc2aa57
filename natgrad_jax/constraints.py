"""Bijectors from flat vectors of free numbers to constrained parameters, and log-densities carried through them.

Each maps all of ℝ^size one to one onto its set, smoothly both ways; `log_det` is log|det ∂x/∂u| in nats for as many
coordinates of x as there are free numbers, and each says for which. Bijectors are static: hashable, without arrays,
leaves of a pytree. The parametrisations were chosen so that u = 0 is the middle of the set, the log-determinant is a
weighted sum of logarithms, and nothing cancels for large |u|.
"""

import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax._tree import PyTree, concrete, diagonal, is_complex

LOG_2 = math.log(2)


@runtime_checkable
class Bijector(Protocol):
    """What a leaf of the constraints must have; the classes below do, and so may one of your own."""

    @property
    def size(self) -> int:
        """Number of free numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the constrained value."""

    def forward(self, u: Array) -> Array:
        """x, of this shape, from u, of shape (size,)."""

    def inverse(self, x: Array) -> Array:
        """u, of shape (size,), from x, of this shape."""

    def log_det(self, u: Array) -> Array:
        """log|det ∂x/∂u|, nats."""


@dataclass(frozen=True)
class Real:
    """See `real`."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """One free number per entry."""
        return math.prod(self.shape)

    def forward(self, u: Array) -> Array:
        """x = u."""
        return _free(u, self.size).reshape(self.shape)

    def inverse(self, x: Array) -> Array:
        """u = x."""
        x = _floats(x, self.shape, "x")
        return _seen(self, x, jnp.ravel(x), "finite numbers")

    def log_det(self, u: Array) -> Array:
        """0, for the entries of x."""
        return jnp.zeros((), _free(u, self.size).dtype)


@dataclass(frozen=True)
class Positive:
    """See `positive`."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """One free number per entry."""
        return math.prod(self.shape)

    def forward(self, u: Array) -> Array:
        """x = exp(u)."""
        return _exp(_free(u, self.size)).reshape(self.shape)

    def inverse(self, x: Array) -> Array:
        """u = log x."""
        x = _floats(x, self.shape, "x")
        return _seen(self, x, jnp.log(jnp.ravel(x)), "positive numbers")

    def log_det(self, u: Array) -> Array:
        """Σ u, for the entries of x."""
        return jnp.sum(_free(u, self.size))


@dataclass(frozen=True)
class Interval:
    """See `interval`."""

    low: float
    high: float
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """One free number per entry."""
        return math.prod(self.shape)

    def forward(self, u: Array) -> Array:
        """x = low + (high − low) σ(u), counted from the nearer end."""
        u, width = _free(u, self.size), self.high - self.low
        x = jnp.where(u < 0, self.low + width * jax.nn.sigmoid(u), self.high - width * jax.nn.sigmoid(-u))
        return jnp.clip(x, *self._edges(u.dtype)).reshape(self.shape)

    def _edges(self, dtype: Any) -> tuple[Any, Any]:
        """The outermost numbers inside that are not subnormal: XLA takes those for 0."""
        low, high = np.asarray([self.low, self.high], dtype)
        tiny = jnp.finfo(dtype).tiny
        return max(np.nextafter(low, high), low + tiny), min(np.nextafter(high, low), high - tiny)

    def inverse(self, x: Array) -> Array:
        """u = log((x − low)/(high − x))."""
        x = _floats(x, self.shape, "x")
        u = jnp.log(jnp.ravel(x - self.low)) - jnp.log(jnp.ravel(self.high - x))
        return _seen(self, x, u, f"numbers between {self.low} and {self.high}")

    def log_det(self, u: Array) -> Array:
        """Σ log(high − low) + log σ(u) + log σ(−u), for the entries of x."""
        u = _free(u, self.size)
        return self.size * math.log(self.high - self.low) + jnp.sum(jax.nn.log_sigmoid(u) + jax.nn.log_sigmoid(-u))


@dataclass(frozen=True)
class Ordered:
    """See `ordered`."""

    k: int

    @property
    def size(self) -> int:
        """k."""
        return self.k

    @property
    def shape(self) -> tuple[int, ...]:
        """(k,)."""
        return (self.k,)

    def forward(self, u: Array) -> Array:
        """x_1 = u_1, x_i = x_(i−1) + exp(u_i)."""
        u = _free(u, self.size)
        return jnp.cumsum(jnp.concatenate([u[:1], _exp(u[1:])]))

    def inverse(self, x: Array) -> Array:
        """u_1 = x_1, u_i = log(x_i − x_(i−1))."""
        x = _floats(x, self.shape, "x")
        return _seen(self, x, jnp.concatenate([x[:1], jnp.log(jnp.diff(x))]), "increasing numbers")

    def log_det(self, u: Array) -> Array:
        """u_2 + … + u_k, for the entries of x."""
        return jnp.sum(_free(u, self.size)[1:])


@dataclass(frozen=True)
class Simplex:
    """See `simplex`."""

    # The logits are Vu with V orthonormal and orthogonal to 1: an isometric log-ratio. The additive one, softmax of
    # (u, 0), has |det| = Π x_i; here y_i = logit_i − logit_k are AVu with A = (I, −1), and det(AV)² = det AAᵀ = k, so
    # that |det| = √k Π x_i: as simple, the same for every order of the k entries, and a u ~ N(0, I) prefers none.
    # V = the reflection that takes e_k to −1/√k, without its last column: O(k), and nothing is stored.

    k: int

    @property
    def size(self) -> int:
        """k − 1."""
        return self.k - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(k,)."""
        return (self.k,)

    def _logits(self, u: Array) -> Array:
        u, root = _free(u, self.size), math.sqrt(self.k)
        total = jnp.sum(u, keepdims=True)
        return jnp.concatenate([u - total / (self.k + root), -total / root])

    def forward(self, u: Array) -> Array:
        """x = softmax(Vu)."""
        return _above_zero(jax.nn.softmax(self._logits(u)))

    def inverse(self, x: Array) -> Array:
        """u = Vᵀ log x."""
        x = _floats(x, self.shape, "x")
        logs = jnp.log(x) - jnp.mean(jnp.log(x))
        return _seen(self, x, logs[:-1] - logs[-1] / (1 + math.sqrt(self.k)), "positive numbers that sum to 1")

    def log_det(self, u: Array) -> Array:
        """Σ log x_i + ½ log k, for any k − 1 entries of x."""
        return jnp.sum(jax.nn.log_softmax(self._logits(u))) + math.log(self.k) / 2


@dataclass(frozen=True)
class CorrelationCholesky:
    """See `correlation_cholesky`."""

    d: int

    @property
    def size(self) -> int:
        """d(d − 1)/2."""
        return self.d * (self.d - 1) // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, d)."""
        return (self.d, self.d)

    def forward(self, u: Array) -> Array:
        """L_ij = tanh(u_ij) Π_(k<j) sech(u_ik), L_ii = Π_(k<i) sech(u_ik)."""
        u = _free(u, self.size)
        logs = jnp.cumsum(jnp.roll(_lower(_log_sech(u), self.d, -1), 1, axis=1), axis=1)
        return (_lower(jnp.tanh(u), self.d, -1) + jnp.eye(self.d, dtype=u.dtype)) * _exp(logs)

    def inverse(self, x: Array) -> Array:
        """sinh u_ij = L_ij/√(Σ_(k>j) L_ik²)."""
        x = _floats(x, self.shape, "x")
        return _seen(self, x, self._of_factor(x), "a lower triangle with rows of length 1 and a positive diagonal")

    def _of_factor(self, lower: Array) -> Array:
        """The length of what is left of a row, not √(1 − what is gone), which cancels."""
        i, j = np.tril_indices(self.d, -1)
        rest = jnp.cumsum(jnp.square(jnp.tril(lower))[:, ::-1], axis=1)[:, ::-1]
        return jnp.arcsinh(lower[i, j] / jnp.sqrt(rest[i, j + 1]))

    def log_det(self, u: Array) -> Array:
        """Σ (i − j + 1) log sech u_ij over i > j, for the entries of L below the diagonal."""
        i, j = np.tril_indices(self.d, -1)
        return _weighted(i - j + 1, _log_sech(_free(u, self.size)))


@dataclass(frozen=True)
class Correlation:
    """See `correlation`."""

    d: int

    @property
    def size(self) -> int:
        """d(d − 1)/2."""
        return self.d * (self.d - 1) // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, d)."""
        return (self.d, self.d)

    def forward(self, u: Array) -> Array:
        """x = LLᵀ, its diagonal 1 to the last bit."""
        lower = CorrelationCholesky(self.d).forward(u)
        return _symmetric(_gram(lower), jnp.eye(self.d, dtype=lower.dtype))

    def inverse(self, x: Array) -> Array:
        """That of the Cholesky factor of x."""
        x = _floats(x, self.shape, "x")
        u = CorrelationCholesky(self.d)._of_factor(jnp.linalg.cholesky(x))
        return _seen(self, x, u, "a symmetric positive definite matrix with diagonal 1")

    def log_det(self, u: Array) -> Array:
        """Σ (d − j + 1) log sech u_ij over i > j = 1 … d, for the entries of x below the diagonal."""
        j = np.tril_indices(self.d, -1)[1]
        return _weighted(self.d - j, _log_sech(_free(u, self.size)))


@dataclass(frozen=True)
class Covariance:
    """See `covariance`."""

    # The rows of L are counted in units of its diagonal. Then a change of units of one variable shifts one number of u,
    # and of what log-Cholesky has in place of (d + 1) Σ u_ii, a different weight on each, only one weight is left: the
    # density |x|^(−(d+1)/2), which no linear map changes, is flat in u.

    d: int

    @property
    def size(self) -> int:
        """d(d + 1)/2."""
        return self.d * (self.d + 1) // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, d)."""
        return (self.d, self.d)

    def forward(self, u: Array) -> Array:
        """x = LLᵀ, L_ii = exp(u_ii), L_ij = L_ii u_ij."""
        table = _lower(_free(u, self.size), self.d, 0)
        rows = jnp.tril(table, -1) + jnp.eye(self.d, dtype=table.dtype)
        x = _gram(_exp(diagonal(table))[:, None] * rows)
        return _symmetric(x, jnp.diag(diagonal(x)))

    def inverse(self, x: Array) -> Array:
        """That of the Cholesky factor of x."""
        x = _floats(x, self.shape, "x")
        lower = jnp.linalg.cholesky(x)
        scale = diagonal(lower)
        table = jnp.tril(lower / scale[:, None], -1) + jnp.diag(jnp.log(scale))
        return _seen(self, x, table[np.tril_indices(self.d)], "a symmetric positive definite matrix")

    def log_det(self, u: Array) -> Array:
        """(d + 1) Σ u_ii + d log 2, for the entries of x on and below the diagonal."""
        ends = np.cumsum(np.arange(1, self.d + 1)) - 1
        return (self.d + 1) * jnp.sum(_free(u, self.size)[ends]) + self.d * LOG_2


def _floats(value: Any, shape: tuple[int, ...], name: str, cure: str = "use vmap for several") -> Array:
    """`value` as real floats; raises, naming `name`, unless it has that shape."""
    value = jnp.asarray(value)
    if is_complex(value.dtype):
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}; pass real and imaginary parts")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got shape {value.shape}; {cure}")
    # Left alone where it can be: a Python float stays of weak type, and does not widen what stands beside it.
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


def _free(u: Any, size: int) -> Array:
    return _floats(u, (size,), "u")


def _seen(bijector: Bijector, x: Array, u: Array, kind: str) -> Array:
    """u, the inverse of x; a `ValueError` where x can be seen to lie outside the set, that is, where x(u) is not x."""
    if concrete(x, u) and not (np.all(np.isfinite(u)) and _near(np.asarray(bijector.forward(u)), np.asarray(x))):
        raise ValueError(f"x: expected {kind}, got {x}; a point of the edge has no finite u, move it inside")
    return u


def _near(back: np.ndarray, x: np.ndarray) -> bool:
    """Equal to half the digits of the largest entry: an x of the kind that was rounded still is of the kind."""
    return bool(np.all(np.abs(back - x) <= math.sqrt(jnp.finfo(x.dtype).eps) * np.max(np.abs(back), initial=0)))


def _above_zero(x: Array) -> Array:
    """x ≥ 0, kept off 0, where a logarithm has no gradient."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _exp(u: Array) -> Array:
    return _above_zero(jnp.exp(u))


def _log_sech(u: Array) -> Array:
    """−log cosh u, which overflows nowhere."""
    return LOG_2 - jnp.logaddexp(u, -u)


def _weighted(weights: np.ndarray, x: Array) -> Array:
    return jnp.sum(jnp.asarray(weights, x.dtype) * x)


def _lower(entries: Array, d: int, offset: int) -> Array:
    """The lower triangle up to that diagonal, filled row by row; 0 above."""
    return jnp.zeros((d, d), entries.dtype).at[np.tril_indices(d, offset)].set(entries)


def _gram(lower: Array) -> Array:
    """LLᵀ; some accelerators would multiply in fewer digits unless told."""
    return jnp.matmul(lower, lower.T, precision="highest")


def _symmetric(x: Array, on_diagonal: Array) -> Array:
    below = jnp.tril(x, -1)
    return below + below.T + on_diagonal


def real(shape: Sequence[int] | int = ()) -> Real:
    """Any real numbers: x = u.

    Args:
        shape: of x; a whole number means a vector.

    Raises:
        ValueError: `shape` is not made of whole numbers.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.constraints.real((2, 3)).size
        6
    """
    return Real(_shape(shape))


def positive(shape: Sequence[int] | int = ()) -> Positive:
    """Positive numbers, entry by entry: x = exp(u), log|det| = Σ u for the entries of x.

    Never 0; +∞ for a u beyond 88 in float32 and 709 in float64.

    Args:
        shape: of x; a whole number means a vector.

    Raises:
        ValueError: `shape` is not made of whole numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> float(ng.constraints.positive().forward(jnp.zeros(1)))
        1.0
    """
    return Positive(_shape(shape))


def interval(low: float, high: float, shape: Sequence[int] | int = ()) -> Interval:
    """Numbers between two others, entry by entry: x = low + (high − low) σ(u), for the entries of x.

    Rounding never puts x on an end.

    Args:
        low: the lower end, a number known outside `jit`, the same for every entry.
        high: the upper one.
        shape: of x; a whole number means a vector.

    Raises:
        TypeError: an end is not a number.
        ValueError: the ends are not finite or not in order, `shape` is not made of whole numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> float(ng.constraints.interval(-1, 3).forward(jnp.zeros(1)))
        1.0
    """
    return Interval(*_ends(low, high), _shape(shape))


def ordered(k: int) -> Ordered:
    """Increasing vectors: x_1 = u_1, x_i = x_(i−1) + exp(u_i); log|det| = u_2 + … + u_k for the entries of x.

    Neighbours closer than the rounding of x come out equal.

    Args:
        k: number of entries, at least 1.

    Raises:
        ValueError: k is not a whole number ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> ng.constraints.ordered(3).forward(jnp.zeros(3)).tolist()
        [0.0, 1.0, 2.0]
    """
    return Ordered(_whole(k, "ordered", "k", 1))


def simplex(k: int) -> Simplex:
    """k positive numbers that sum to 1, from k − 1: x = softmax(Vu), VᵀV = I, Vᵀ1 = 0.

    log|det| = Σ log x_i + ½ log k for any k − 1 of the entries, the measure of `jax.scipy.stats.dirichlet`.

    Args:
        k: number of entries, at least 1.

    Raises:
        ValueError: k is not a whole number ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> ng.constraints.simplex(4).forward(jnp.zeros(3)).tolist()
        [0.25, 0.25, 0.25, 0.25]

    Reference: Egozcue et al., "Isometric logratio transformations for compositional data analysis" (2003); the
    basis is ours, a reflection in the place of Gram-Schmidt.
    """
    return Simplex(_whole(k, "simplex", "k", 1))


def correlation_cholesky(d: int) -> CorrelationCholesky:
    """The lower factor L of a correlation matrix LLᵀ: rows of length 1, positive diagonal.

    L_ij = tanh(u_ij) Π_(k<j) sech(u_ik), u row by row below the diagonal: tanh u_ij is the partial correlation of i and
    j given those before j, so that u is on Fisher's z scale. log|det| = Σ (i − j + 1) log sech u_ij for the entries of
    L below the diagonal, the measure of LKJCholesky in numpyro and of lkj_corr_cholesky in Stan. The factor keeps its
    digits where the matrix would be singular by rounding: prefer it to `correlation`.

    Args:
        d: number of variables, at least 1.

    Raises:
        ValueError: d is not a whole number ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> [round(float(x), 4) for x in ng.constraints.correlation_cholesky(2).forward(jnp.ones(1))[1]]
        [0.7616, 0.6481]

    Reference: Lewandowski, Kurowicka, Joe, "Generating random correlation matrices based on vines and extended onion
    method" (2009).
    """
    return CorrelationCholesky(_whole(d, "correlation_cholesky", "d", 1))


def correlation(d: int) -> Correlation:
    """Correlation matrices: LLᵀ with L of `correlation_cholesky(d)` at the same u.

    log|det| = Σ (d − j + 1) log sech u_ij over i > j, counted from 1, for the entries below the diagonal. A u beyond
    about 8 in float32 and 18 in float64 gives a matrix that is singular by rounding.

    Args:
        d: number of variables, at least 1.

    Raises:
        ValueError: d is not a whole number ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> round(float(ng.constraints.correlation(2).forward(jnp.ones(1))[1, 0]), 4)
        0.7616

    Reference: as for `correlation_cholesky`.
    """
    return Correlation(_whole(d, "correlation", "d", 1))


def covariance(d: int) -> Covariance:
    """Symmetric positive definite matrices: LLᵀ with L_ii = exp(u_ii), L_ij = L_ii u_ij, u row by row of the triangle.

    log|det| = (d + 1) Σ u_ii + d log 2 for the entries on and below the diagonal, the measure of a Wishart density.

    Args:
        d: number of variables, at least 1.

    Raises:
        ValueError: d is not a whole number ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> ng.constraints.covariance(2).forward(jnp.array([0.0, 2.0, 0.0])).tolist()
        [[1.0, 2.0], [2.0, 5.0]]

    Reference: Pinheiro and Bates, "Unconstrained parametrizations for variance-covariance matrices" (1996), section
    2.2, the log-Cholesky parametrisation; that each row is in units of its diagonal is ours.
    """
    return Covariance(_whole(d, "covariance", "d", 1))


def _whole(n: Any, name: str, argument: str, least: int) -> int:
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < least:
        raise ValueError(f"{name}: expected a whole number {argument} ≥ {least}, got {n!r}")
    return int(n)


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if any(isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 0 for n in sizes):
        raise ValueError(f"shape: expected whole numbers ≥ 0, such as () or (2, 3), got {shape!r}")
    return tuple(map(int, sizes))


def _ends(low: Any, high: Any) -> tuple[float, float]:
    try:
        ends = float(low), float(high)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"low, high: expected two numbers known outside jit, the same for every entry, got {low!r}, {high!r}"
        ) from error
    if not (ends[0] < ends[1] and math.isfinite(ends[1] - ends[0])):
        raise ValueError(f"low, high: expected finite numbers low < high, got {low}, {high}; for one end move positive")
    return ends


@dataclass(frozen=True)
class Constrained:
    """A log-density of constrained parameters, on flat vectors of free numbers. See `constrain`.

    Attributes:
        target: the log-density that was given, of the constrained values.
        bijectors: one for each leaf.
        treedef: the structure of the constraints.
    """

    target: Callable[..., Array]
    bijectors: tuple[Bijector, ...]
    treedef: Any

    @property
    def d(self) -> int:
        """Number of free numbers."""
        return sum(bijector.size for bijector in self.bijectors)

    @cached_property
    def log_density(self) -> Callable[..., Array]:
        """log p̃(x(u)[, data]) + log|det ∂x/∂u| for one u of shape (d,), nats: what `fit` takes. Compiled once."""
        return _LogDensity(self)

    def pieces(self, u: Array) -> list[tuple[Bijector, Array]]:
        """Each bijector with its own part of u, shape (d,)."""
        ends = itertools.accumulate((bijector.size for bijector in self.bijectors), initial=0)
        return [(bijector, u[i:j]) for bijector, (i, j) in zip(self.bijectors, itertools.pairwise(ends))]

    def constrain(self, u: Array) -> PyTree:
        """x(u): the constrained values; u of shape (n, d), such as draws, gives leaves with a leading n, and so on."""
        cure = f"the last axis has the {self.d} free numbers"
        u = _floats(u, (*jnp.shape(u)[:-1], self.d), "u", cure)
        forward = self._values
        for _ in range(u.ndim - 1):
            forward = jax.vmap(forward)
        return forward(u)

    def _values(self, u: Array) -> PyTree:
        return self.treedef.unflatten([bijector.forward(part) for bijector, part in self.pieces(u)])

    def unconstrain(self, x: PyTree) -> Array:
        """u, shape (d,), of one x: for instance the place to start a fit, init=family.init(loc=u).

        Raises:
            ValueError: x has another structure, or a leaf that can be seen to lie outside its set.
        """
        leaves, treedef = jax.tree_util.tree_flatten_with_path(x)
        if treedef != self.treedef:
            raise ValueError(f"x: expected the structure of the constraints, {self.treedef}, got {treedef}; use arrays")
        parts = [_inverse(bijector, *leaf) for bijector, leaf in zip(self.bijectors, leaves)]
        u = jnp.concatenate(parts)
        return u.astype(u.dtype)  # no longer of weak type, which would compile a fit anew


def _inverse(bijector: Bijector, path: Any, x: Any) -> Array:
    try:
        return bijector.inverse(x)
    except (TypeError, ValueError) as error:
        error.add_note(f"in unconstrain, at x{jax.tree_util.keystr(path)}")
        raise


@dataclass(frozen=True)
class _LogDensity:
    """Equal for equal parts, so that `jit` knows it again."""

    of: Constrained

    def __call__(self, u: Array, *data: PyTree) -> Array:
        u = _floats(u, (self.of.d,), "u", "the family has this dimension, Constrained.d; use vmap for several")
        log_det = sum(bijector.log_det(part) for bijector, part in self.of.pieces(u))
        return self.of.target(self.of.constrain(u), *data) + log_det


def constrain(log_density: Callable[..., Array], constraints: PyTree) -> Constrained:
    """Carries a log-density of constrained parameters to flat vectors u of free numbers, on which it can be fitted.

    log p̃(u) = log p̃(x(u)) + log|det ∂x/∂u|, nats: the density of u whose x has the density given.

    Args:
        log_density: log p̃(x), or log p̃(x, data), for one x, a pytree like `constraints` with an array in the place of
            each bijector; with respect to the coordinates that the bijectors name.
        constraints: pytree of bijectors of this module; one alone will do.

    Returns:
        `Constrained`: `log_density`, `d`, `constrain`, `unconstrain`. Two that are made of the same function and equal
        constraints are equal, and compile once.

    Raises:
        TypeError: `log_density` cannot be called, a leaf is not a bijector.
        ValueError: there is no leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_density = lambda x: -0.5 * (jnp.log(x["scale"]) - 1) ** 2 - jnp.log(x["scale"])  # log-normal
        >>> model = ng.constraints.constrain(log_density, {"scale": ng.constraints.positive()})
        >>> family = ng.families.gaussian_full_rank(model.d)
        >>> start = family.init(loc=model.unconstrain({"scale": 1.0}))
        >>> result = ng.fit(model.log_density, family, jax.random.key(0), init=start)
        >>> round(float(result.params.loc[0]), 2)
        1.0
        >>> model.constrain(result.sample(jax.random.key(1), 500))["scale"].shape
        (500,)
    """
    if not callable(log_density):
        raise TypeError(f"log_density: expected a function of the constrained values, got {log_density!r}")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(constraints, is_leaf=lambda x: x is None)
    for path, leaf in leaves:
        if isinstance(leaf, type) or not isinstance(leaf, Bijector):
            where = f"constraints{jax.tree_util.keystr(path)}"
            raise TypeError(f"{where}: expected a bijector, such as natgrad_jax.constraints.real(), got {leaf!r}")
    if not leaves:
        raise ValueError(f"constraints: expected at least one bijector, got {constraints!r}")
    return Constrained(log_density, tuple(leaf for _, leaf in leaves), treedef)
