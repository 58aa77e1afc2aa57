"""Operators held as arrays: a diagonal, a matrix, rows, a diagonal plus rows."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, accumulator, leading_axis, real_dtype
from natgrad_jax.operators import kernels, shared
from natgrad_jax.operators.pieces import explicit, is_outer
from natgrad_jax.operators.shared import Product

# A is copied, in the precision and the units of the arithmetic, so many numbers at a time: they stay in the cache. But
# no shorter than so many rows (or columns), or adding up the products would take a good part of the time.
CHUNK, SHORTEST = 2**20, 2048
# Columns whose lengths are taken at a time: XLA reduces wider arrays over their leading axis many times more slowly.
NARROWEST, WIDEST = 512, 2**14
# Up to so many rows and so many parameters AᴴA is a sum of outer products: under `vmap` it becomes arithmetic on whole
# batches, where a batched matrix product would spend half a microsecond on each. `python -m benchmarks solvers`
FEW_ROWS, FEW_PARAMETERS = 32, 16


@dataclass(frozen=True)
class Diagonal:
    """G = diag(entries). Products, solves and memory are O(p).

    Args:
        entries: pytree of the diagonal entries G_ii ≥ 0, in units of 1/parameter²; real, also for complex parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Diagonal
        >>> float(Diagonal(jnp.array([4.0, 1.0])).norm(jnp.array([1.0, 0.0])))
        2.0
    """

    entries: PyTree
    shows_diagonal: ClassVar[bool] = True

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return Space.of(self.entries)

    def product(self) -> Product:
        """v ↦ Gv."""
        return lambda v: jax.tree.map(jnp.multiply, _tree.raised(self.entries), v)

    def dense(self) -> Array:
        """The (p, p) matrix."""
        return jnp.diag(self.space.ravel(self.entries))

    def diagonal(self) -> PyTree:
        """The entries G_ii."""
        return _tree.raised(self.entries)

    def restrict(self, mask: PyTree) -> "Diagonal":
        """The block of the leaves in `mask`."""
        return Diagonal(_tree.seen(mask, self.entries))

    mv, inner, norm = shared.mv, shared.inner, shared.norm
    trace, max_rank, scale, balanced = shared.trace, shared.max_rank, shared.scale_of_diagonal, shared.balanced


@dataclass(frozen=True)
class Dense:
    """G as a matrix. Products cost O(p²), solves O(p³).

    Args:
        matrix: symmetric (Hermitian) positive semi-definite, shape (p, p), in `ravel_pytree` order of the parameters.
        like: `Space.of(params)`; flat vectors of shape (p,) when left out.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Dense
        >>> Dense(jnp.array([[2.0, 1.0], [1.0, 2.0]])).mv(jnp.array([1.0, 0.0])).tolist()
        [2.0, 1.0]
    """

    matrix: Array
    like: Space | None = None
    shows_diagonal: ClassVar[bool] = True

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return self.like or Space.of(jax.ShapeDtypeStruct(_square(self.matrix)[:1], self.matrix.dtype))

    def product(self) -> Product:
        """v ↦ Gv."""
        space, matrix = self.space, self.dense()
        return lambda v: space.unravel(matrix @ space.ravel(v))

    def dense(self) -> Array:
        """The (p, p) matrix."""
        _square(self.matrix)
        return self.matrix.astype(accumulator(self.matrix.dtype))

    def restrict(self, mask: PyTree) -> "Dense":
        """The block of the leaves in `mask`."""
        return Dense(*shared.submatrix(self.matrix, self.space, mask))

    mv, inner, norm = shared.mv, shared.inner, shared.norm
    diagonal, trace, max_rank = shared.diagonal_of_dense, shared.trace, shared.max_rank
    scale, balanced = shared.scale_of_diagonal, shared.balanced


@dataclass(frozen=True)
class Gram:
    """G = AᴴA kept as its rows A, ‖Av‖² = vᴴGv. Products cost O(np), the matrix O(np²).

    Args:
        rows: pytree shaped like the parameters with one more, leading, axis of n rows; or one array (n, p). In
            the place of a leaf there may be its rows as outer products, `Outer`, `Picked` or `Pieces`, as
            `layers.capture` finds them.
        residual: e, shape (n,), with g = Aᴴe for the gradient that is to be solved for, or None. A solver that works
            on rows then need not recover e from g; it checks that the two still belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Gram
        >>> Gram(jnp.array([[1.0, 1.0], [0.0, 2.0]])).dense().tolist()
        [[1.0, 1.0], [1.0, 5.0]]
    """

    rows: PyTree
    residual: Array | None = None
    shows_diagonal: ClassVar[bool] = True

    @classmethod
    def from_samples(
        cls,
        samples: PyTree,
        *,
        weights: Array | None = None,
        residual: Array | None = None,
        centred: bool = False,
        real_parameters: bool = False,
    ) -> "Gram":
        """G = Σ w_i conj(a_i) a_iᵀ from one vector a_i a sample; with `centred` the covariance of the a_i.

        Args:
            samples: the a_i on the leading axis of each leaf, n of them.
            weights: w_i ≥ 0, shape (n,); 1 when left out (a sum over samples: pass 1/n for a mean). Centring subtracts
                the weighted mean.
            residual: e, shape (n,), with g = Σ w_i e_i conj(a_i). Centring takes its weighted mean out as well.
            real_parameters: take the real part, G = Re Σ w_i conj(a_i) a_iᵀ, by 2n real rows.

        Example:
            >>> import jax.numpy as jnp
            >>> from natgrad_jax.operators import Gram
            >>> a = jnp.array([[1.0], [3.0]])
            >>> round(float(Gram.from_samples(a, weights=jnp.array([0.5, 0.5]), centred=True).dense()[0, 0]), 4)
            1.0
        """
        samples, n = _tree.raised(samples), leading_axis(samples, "samples")
        dtype = real_dtype(Space.of(samples).dtype)
        given = jnp.ones(n, dtype) if weights is None else jnp.asarray(weights, dtype)
        if given.shape != (n,) or (residual is not None and jnp.shape(residual) != (n,)):
            raise ValueError(
                f"weights, residual: expected one number for each of the n = {n} samples, "
                f"got shapes {given.shape} and {None if residual is None else jnp.shape(residual)}"
            )
        if _tree.surely(given, lambda x: np.any(x < 0)):
            raise ValueError(f"weights: expected numbers ≥ 0, got a smallest one of {jnp.min(given)}")
        total = jnp.sum(given)
        root = jnp.sqrt(given)

        def prepare(x: Array) -> Array:
            columns = jnp.reshape(x, (n, -1))
            if centred:
                columns = columns - (given / total) @ columns
            columns = root[:, None] * columns
            return jnp.reshape(columns, jnp.shape(x))

        rows = jax.tree.map(prepare, samples)
        residual = None if residual is None else prepare(_tree.raised(residual))
        if real_parameters:
            both = lambda x: jnp.concatenate([jnp.real(x), jnp.imag(x)])  # noqa: E731
            rows, residual = jax.tree.map(both, rows), None if residual is None else both(residual)
        return cls(rows, residual)

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return Space.of(_each(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.rows))

    @property
    def n(self) -> int:
        """The number of rows; 0 for a tree without leaves."""
        shapes = [np.shape(x) for x in jax.tree.leaves(self.rows, is_leaf=is_outer)]
        lengths = {shape[:1] for shape in shapes}
        if len(lengths) > 1 or () in lengths:
            raise ValueError(f"rows: expected n rows on the leading axis of every leaf, got {shapes}")
        n = next(iter(lengths))[0] if lengths else 0
        if self.residual is not None and jnp.shape(self.residual) != (n,):
            raise ValueError(
                f"residual: expected one number for each of the n = {n} rows, got {jnp.shape(self.residual)}"
            )
        return n

    def matrix(self) -> Array:
        """A as one (n, p) array, p in `ravel_pytree` order; a copy unless there is one leaf."""
        return _joined(explicit(self.rows), self.space.dtype)

    def times(self, v: PyTree) -> Array:
        """Av, shape (n,)."""
        parts = _each(lambda x, y: x.times(y) if is_outer(x) else jnp.tensordot(x, y, jnp.ndim(y)), self.rows, v)
        return sum(jax.tree.leaves(parts), start=jnp.zeros(self.n, self.space.dtype))

    def transposed_times(self, u: Array) -> PyTree:
        """Aᴴu, shaped like the parameters."""
        return _each(lambda x: x.transposed_times(u) if is_outer(x) else jnp.tensordot(u, jnp.conj(x), 1), self.rows)

    def product(self) -> Product:
        """v ↦ Gv = Aᴴ(Av)."""
        return lambda v: self.transposed_times(self.times(v))

    def dense(self) -> Array:
        """The (p, p) matrix AᴴA; memory p² and a copy of a chunk of the rows."""
        return self._contracted(jnp.ones((), real_dtype(self.space.dtype)))

    def _contracted(self, inverse: Array) -> Array:
        """BᴴB for B = A diag(inverse)."""

        def contracted(rows: PyTree) -> Array:
            part = _joined(rows, self.space.dtype) * inverse
            if 0 < part.shape[0] <= FEW_ROWS and 0 < part.shape[1] <= FEW_PARAMETERS:
                total = functools.reduce(jnp.add, [jnp.outer(row.conj(), row) for row in part])
                # Stacked, since XLA computes what it stacks once, and a sum again wherever it is used.
                return jnp.stack([total[i] for i in range(part.shape[1])])
            return jax.lax.dot_general(part.conj(), part, (((0,), (0,)), ((), ())))

        if not self.n:
            return contracted(self.rows)
        return _tree.chunked_sum(contracted, explicit(self.rows), _chunk(self.space.size))

    def kernel(self, inverse: Array, rank_one: bool = False) -> Array:
        """K = BBᴴ, (n, n), for B = A diag(inverse); memory n² and a copy of a chunk of the columns.

        `inverse` is (p,), or one number, with which rows that are outer products are not made; nor are they if it is
        of `rank_one` on each leaf, an outer product of its last axis and the others.
        """
        leaves, n = jax.tree.leaves(self.rows, is_leaf=is_outer), self.n
        inverse = jnp.asarray(inverse, real_dtype(self.space.dtype))  # which would raise the rows to its own precision
        units = jax.tree.leaves(self.space.unravel(inverse)) if jnp.ndim(inverse) else [inverse] * len(leaves)
        parts = [kernels.Part(rows, unit, rank_one) for rows, unit in zip(leaves, units, strict=True)]
        return kernels.kernel(parts, n, self.space.dtype, _chunk(n))

    def scale(self) -> Array:
        """√G_ii, the lengths of the columns of A, as a flat vector; safe for rows of any size."""
        length = lambda x: x.lengths() if is_outer(x) else _lengths(_tree.raised(x))  # noqa: E731
        return self.space.ravel(_each(length, self.rows)).real

    def bound(self) -> Array:
        """A number that ‖A‖ does not exceed, at the cost of a look at the numbers; a constant to derivatives."""
        largest = lambda x: jnp.max(jnp.abs(x), initial=0.0) * math.prod(x.shape[1:]) ** 0.5  # noqa: E731
        bounds = _each(lambda x: x.bound() if is_outer(x) else largest(_tree.raised(x)), self.rows)
        lengths = [jnp.zeros((), real_dtype(self.space.dtype)), *jax.tree.leaves(bounds)]
        return jax.lax.stop_gradient(self.n**0.5 * _tree.norm(jnp.stack(lengths)))

    def balanced(self) -> tuple[Array, Array]:
        """`frame` (p,) and M (p, p), G = diag(frame) M diag(frame): rows of 1e-30 are legal, their squares are not."""
        largest = self.space.ravel(jax.tree.map(_largest, _tree.raised(explicit(self.rows)))).real
        return largest, self._contracted(_inverse(largest))

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters."""
        squares = lambda x: jnp.sum(jnp.square(jnp.abs(_tree.raised(x))), axis=0)  # noqa: E731
        return _each(lambda x: x.squares() if is_outer(x) else squares(x), self.rows)

    def inner(self, u: PyTree, v: PyTree) -> Array:
        """Re uᴴGv = Re (Au)·(Av)."""
        return jnp.real(jnp.vdot(self.times(_tree.raised(u)), self.times(_tree.raised(v))))

    def norm(self, v: PyTree) -> Array:
        """√(vᴴGv) = ‖Av‖."""
        return _tree.norm(self.times(_tree.raised(v)))

    def max_rank(self) -> int:
        """An upper bound on the rank, from shapes alone."""
        return min(self.n, self.space.size)

    def restrict(self, mask: PyTree) -> "Gram":
        """The block of the leaves in `mask`; the part of g = Aᴴe that belongs to them has the same residual."""
        return Gram(_tree.seen(mask, self.rows), self.residual)

    mv, trace = shared.mv, shared.trace


@dataclass(frozen=True)
class LowRank:
    """G = D + RᴴR: a diagonal and r rows. Products cost O(rp), solves O(r²p).

    Args:
        base: pytree of the entries D_ii ≥ 0, real.
        rows: R, shaped like the parameters with one more, leading, axis of r rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import LowRank
        >>> LowRank(jnp.array([1.0, 2.0]), jnp.array([[1.0, 1.0]])).dense().tolist()
        [[2.0, 1.0], [1.0, 3.0]]
    """

    base: PyTree
    rows: PyTree
    shows_diagonal: ClassVar[bool] = True

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        self.gram.space.check_shapes(self.base, "base")
        return self.gram.space

    @property
    def gram(self) -> Gram:
        """RᴴR."""
        return Gram(self.rows)

    def product(self) -> Product:
        """v ↦ Dv + Rᴴ(Rv)."""
        one, other = Diagonal(self.base).product(), self.gram.product()
        return lambda v: jax.tree.map(jnp.add, one(v), other(v))

    def dense(self) -> Array:
        """The (p, p) matrix."""
        return jnp.diag(self.space.ravel(self.base)) + self.gram.dense()

    def balanced(self) -> tuple[Array | None, Array]:
        """`frame` (p,) and M (p, p), G = diag(frame) M diag(frame)."""
        base, one = Diagonal(self.base).scale(), jnp.ones(())
        return shared.joined_frames([(one, base, jnp.eye(base.size, dtype=base.dtype)), (one, *self.gram.balanced())])

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters."""
        return jax.tree.map(jnp.add, _tree.raised(self.base), self.gram.diagonal())

    def scale(self) -> Array:
        """√G_ii, as a flat vector."""
        return jnp.hypot(Diagonal(self.base).scale(), self.gram.scale())

    def restrict(self, mask: PyTree) -> "LowRank":
        """The block of the leaves in `mask`."""
        return LowRank(_tree.seen(mask, self.base), _tree.seen(mask, self.rows))

    mv, inner, norm = shared.mv, shared.inner, shared.norm
    trace, max_rank = shared.trace, shared.max_rank


def _square(matrix: Array) -> tuple[int, ...]:
    if jnp.ndim(matrix) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: expected a square matrix (p, p), got shape {jnp.shape(matrix)}")
    return matrix.shape


def _each(f: Any, rows: PyTree, *rest: PyTree) -> PyTree:
    """f of the rows of every leaf, arrays or in factors."""
    return jax.tree.map(f, rows, *rest, is_leaf=is_outer)


def _chunk(width: int) -> int:
    return max(CHUNK // max(width, 1), SHORTEST)


def _joined(rows: PyTree, dtype: Any) -> Array:
    leaves = jax.tree.leaves(rows)
    columns = [jnp.reshape(x, (jnp.shape(x)[0], math.prod(jnp.shape(x)[1:]))).astype(dtype) for x in leaves] or [
        jnp.zeros((0, 0), dtype)
    ]
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=0, initial=0.0)


@jax.custom_jvp
def _lengths(x: Array) -> Array:
    """The Euclidean norms over the leading axis; the derivative at a column of zeros is 0."""
    columns = jnp.reshape(x, (x.shape[0], math.prod(x.shape[1:])))
    width, size = columns.shape[1], min(max(CHUNK // max(4 * x.shape[0], 1), NARROWEST), WIDEST)
    whole, rest = divmod(width, size)
    if whole < 2:
        return _safe_lengths(columns).reshape(x.shape[1:])

    def part(i: Array) -> Array:
        taken = jax.lax.dynamic_slice_in_dim(columns, i * size, size, axis=1)
        squares = jnp.sum(jnp.square(jnp.abs(taken)), axis=0)
        limits = jnp.finfo(squares.dtype)
        exact = jnp.all((squares > limits.tiny / limits.eps**2) & (squares < limits.max))
        return jax.lax.cond(exact, lambda: jnp.sqrt(squares), lambda: _safe_lengths(taken))

    lengths = jax.lax.map(part, jnp.arange(whole)).reshape(-1)
    return jnp.concatenate([lengths, _safe_lengths(columns[:, width - rest :])]).reshape(x.shape[1:])


def _safe_lengths(columns: Array) -> Array:
    largest = _largest(columns)
    return largest * jnp.sqrt(jnp.sum(jnp.square(jnp.abs(columns * _inverse(largest))), axis=0))


@_lengths.defjvp
def _lengths_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    lengths = _lengths(x)
    return lengths, jnp.sum(jnp.real(jnp.conj(x * _inverse(lengths)) * dx), axis=0)


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


jax.tree_util.register_dataclass(Diagonal, data_fields=["entries"], meta_fields=[])
jax.tree_util.register_dataclass(Dense, data_fields=["matrix"], meta_fields=["like"])
jax.tree_util.register_dataclass(Gram, data_fields=["rows", "residual"], meta_fields=[])
jax.tree_util.register_dataclass(LowRank, data_fields=["base", "rows"], meta_fields=[])
