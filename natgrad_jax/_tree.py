"""Pytree arithmetic: the flat view of a pytree, safe norms, sums in bounded memory."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

PyTree = Any


@jax.tree_util.register_static
@dataclass(frozen=True)
class Space:
    """Structure, shapes and dtypes of a pytree: what is needed to go to flat vectors and back.

    Hashable, so it may be static data of an operator. The order is that of `jax.flatten_util.ravel_pytree`.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Space":
        """The space in which `tree` is a vector."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(jnp.shape(x) for x in leaves), tuple(jnp.result_type(x) for x in leaves))

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return sum(map(math.prod, self.shapes))

    @property
    def dtype(self) -> Any:
        """The dtype of flat vectors: half precision is raised to float32."""
        return accumulator(*self.dtypes)

    def check(self, tree: PyTree, name: str) -> None:
        """Raise, naming `name`, unless `tree` is a vector: structure, shapes, real or complex as G is, no integers."""
        other = self.check_shapes(tree, name)
        for dtype, mine in zip(other.dtypes, self.dtypes, strict=True):
            if not jnp.issubdtype(dtype, jnp.inexact):
                raise TypeError(
                    f"{name}: expected floating-point numbers, got {dtype}; convert with jnp.asarray(x, float)"
                )
            if is_complex(mine) and not is_complex(dtype):
                raise TypeError(
                    f"{name}: the operator is complex, got {dtype}. For real parameters of a complex function take "
                    "real rows, Gram.from_samples(rows, real_parameters=True)."
                )

    def check_shapes(self, tree: PyTree, name: str) -> "Space":
        """The space of `tree`; raise, naming `name`, unless it has this structure and these shapes."""
        other = Space.of(tree)
        if (other.treedef, other.shapes) != (self.treedef, self.shapes):
            raise ValueError(
                f"{name}: expected the structure and shapes of the parameters, {self}, got {other}. "
                "Differentiate the loss with respect to the same pytree that the metric sees."
            )
        return other

    def ravel(self, tree: PyTree) -> Array:
        """The leaves of `tree`, concatenated to one flat vector of shape (p,)."""
        leaves = jax.tree.leaves(tree)
        if len({is_complex(jnp.result_type(x)) for x in leaves}) == 2:
            raise TypeError(
                "params: real and complex leaves in one vector, of which only a complex solve could make one. Write "
                "the complex leaves as real and imaginary parts, or give each kind an operator of its own (Blocks)."
            )
        dtype = accumulator(*self.dtypes, *(jnp.result_type(x) for x in leaves))
        parts = [jnp.ravel(x).astype(dtype) for x in leaves]
        return parts[0] if len(parts) == 1 else jnp.concatenate([jnp.zeros((0,), dtype), *parts])

    def unravel(self, vector: Array) -> PyTree:
        """A flat vector of shape (p,), cut into leaves of this structure and of the vector's dtype."""
        ends = list(itertools.accumulate(map(math.prod, self.shapes), initial=0))
        pieces = [vector[i:j] for i, j in itertools.pairwise(ends)] if len(self.shapes) > 1 else [vector]
        leaves = [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=False)]
        return jax.tree.unflatten(self.treedef, leaves)

    def structs(self) -> PyTree:
        """A `jax.ShapeDtypeStruct` in the place of each leaf."""
        leaves = [jax.ShapeDtypeStruct(*both) for both in zip(self.shapes, self.dtypes, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)

    def indices(self) -> PyTree:
        """The place of every entry in the flat vector, as numpy arrays."""
        ends = itertools.accumulate(map(math.prod, self.shapes), initial=0)
        leaves = [start + np.arange(math.prod(shape)).reshape(shape) for start, shape in zip(ends, self.shapes)]
        return jax.tree.unflatten(self.treedef, leaves)

    def __str__(self) -> str:
        return str(jax.tree.unflatten(self.treedef, self.shapes)) if self.shapes else str(self.treedef)


def accumulator(*dtypes: Any) -> Any:
    """The dtype to compute in: the widest of `dtypes`, and never narrower than float32."""
    return jnp.result_type(jnp.float32, *dtypes)


def is_complex(dtype: Any) -> bool:
    """Whether numbers of this dtype are complex."""
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


def real_dtype(dtype: Any) -> Any:
    """The dtype of |x|."""
    return jnp.finfo(dtype).dtype


def real_parts(tree: PyTree) -> PyTree:
    """`tree` with the pair (real part, imaginary part) in the place of each complex leaf."""
    return jax.tree.map(lambda x: (jnp.real(x), jnp.imag(x)) if is_complex(jnp.result_type(x)) else x, tree)


def complex_of(parts: PyTree, space: Space) -> PyTree:
    """The tree of `space` whose `real_parts` these are."""
    join = lambda s, part: jax.lax.complex(*part) if is_complex(s.dtype) else part  # noqa: E731
    return jax.tree.map(join, space.structs(), parts)


def raised(tree: PyTree) -> PyTree:
    """`tree` with half precision raised to float32."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(accumulator(jnp.result_type(x))), tree)


def seen(mask: PyTree, tree: PyTree) -> PyTree:
    """`tree` with `optax.MaskedNode()` where `mask`, a pytree of booleans or a prefix of one, is False."""
    return jax.tree.map(lambda keep, part: part if keep else optax.MaskedNode(), mask, tree)


def unmasked(tree: PyTree) -> PyTree:
    """The mask of a tree that `optax.masked` or `partition` made: False in the place of each `MaskedNode`."""
    is_hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda x: not is_hidden(x), tree, is_leaf=is_hidden)


def vdot(u: PyTree, v: PyTree) -> Array:
    """Re uᴴv."""
    parts = jax.tree.map(lambda x, y: jnp.real(jnp.vdot(x, y)), u, v)
    return jnp.asarray(sum(jax.tree.leaves(parts), start=0.0))


def ravel(tree: PyTree) -> Array:
    """`tree` as one flat vector."""
    return Space.of(tree).ravel(tree)


def root(x: Array) -> Array:
    """√x; its derivative at 0 is 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def diagonal(matrix: Array) -> Array:
    """The diagonal of a square matrix, as a slice: `jnp.diagonal` compiles to a gather, which XLA does not fuse."""
    return jax.lax.slice(jnp.reshape(matrix, -1), (0,), (matrix.size,), (matrix.shape[0] + 1,))


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(jnp.result_type(y)), tree, like)


def all_finite(tree: PyTree) -> Array:
    """Whether every entry of every leaf is finite; true for a tree without leaves."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def where(condition: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """`jnp.where` leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


def largest(tree: PyTree) -> Array:
    """max |x| over all entries of all leaves; 0 for an empty tree."""
    parts = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(parts)) if parts else jnp.zeros(())


def norm(vector: Array) -> Array:
    """Euclidean norm that neither overflows nor underflows: the largest entry is divided out before squaring."""
    largest = jnp.max(jnp.abs(vector), initial=0.0)
    unit = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(jnp.abs(vector / unit))))


def concrete(*arrays: Any) -> bool:
    """Whether the values can be read now, that is, outside `jit`, `vmap` and `grad`."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def surely(x: Any, condition: Callable[[Any], Any]) -> bool:
    """Whether the values of x can be read now and the condition holds for them, as numpy: inside `jit` operations on
    known arrays are traced too."""
    return concrete(x) and bool(condition(np.asarray(x)))


def leading_axis(tree: PyTree, name: str) -> int:
    """The common length of the leading axis of every leaf; a `ValueError` that names `name` if there is none."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if not shapes or None in lengths or len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"{name}: expected every leaf to hold all points on its leading axis, one common length n ≥ 1; "
            f"got leaf shapes {shapes}. For a single point x pass x[None]."
        )
    return next(iter(lengths))  # type: ignore[return-value]


@dataclass(frozen=True)
class OneExample:
    """(params, x) ↦ what f(params, batch) gives for a batch of x alone, without the leading axis."""

    f: Callable[[PyTree, PyTree], PyTree]
    name: str

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        """The output of one example."""
        out = self.f(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x))
        if not jax.tree.leaves(out) or any(jnp.shape(leaf)[:1] != (1,) for leaf in jax.tree.leaves(out)):
            raise ValueError(
                f"{self.name}: expected one output for each example on a leading axis, got "
                f"{jax.tree.map(jnp.shape, out)} for a batch of one example. Do not sum or average over the batch."
            )
        return jax.tree.map(lambda leaf: leaf[0], out)


def chunked_sum(f: Callable[[PyTree], PyTree], xs: PyTree, chunk_size: int | None) -> PyTree:
    """f(xs), for an f that sums over the leading axis of `xs`, evaluated `chunk_size` points at a time.

    Memory is that of one chunk, also under reverse-mode differentiation (each chunk is recomputed). On a CPU alone XLA
    makes a float32 copy of all of a bfloat16 array that is taken in parts.
    """
    n = leading_axis(xs, "support")
    if chunk_size is None or chunk_size >= n:
        return f(xs)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number of points or None, got {chunk_size}")
    return sum_of_parts(
        lambda start, size: f(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), xs)), n, chunk_size
    )


def sum_of_parts(part: Callable[[Array | int, int], PyTree], n: int, size: int, zero: PyTree | None = None) -> PyTree:
    """Σ part(start, length) over the stretches of `size` of 0 … n - 1, one after the other, after the shorter rest.

    The sum begins with `zero`, if it is given.
    """
    whole, rest = divmod(n, size)
    step = jax.checkpoint(lambda i: part(i * size, size))
    if rest:
        # First, since a part that is to be added at the end may be made, and kept, before the others.
        first = part(n - rest, rest)
        zero = first if zero is None else jax.tree.map(jnp.add, zero, first)
    elif zero is None:
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(step, 0))
    total, _ = jax.lax.scan(lambda acc, i: (jax.tree.map(jnp.add, acc, step(i)), None), zero, jnp.arange(whole))
    return total


def map_parts(part: Callable[[Array | int, int], Array], n: int, size: int) -> Array:
    """part(start, length) of the stretches of `size` of 0 … n - 1 and of the shorter rest, along the leading axis."""
    whole, rest = divmod(n, size)
    if whole == 1 and not rest:
        return part(0, size)
    parts = jax.lax.map(lambda i: part(i * size, size), jnp.arange(whole))
    parts = parts.reshape(-1, *parts.shape[2:])
    return jnp.concatenate([parts, part(n - rest, rest)]) if rest else parts


@jax.custom_batching.custom_vmap
def in_any_lane(flag: Array) -> Array:
    """The flag; under `vmap` whether it is set in any lane, one answer for all of them.

    A `cond` on a batched flag computes both branches: nothing would be saved.
    """
    return flag


@in_any_lane.def_vmap
def _in_any_lane(_: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return in_any_lane(jnp.any(flag)), False
