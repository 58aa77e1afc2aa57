"""Pytree arithmetic: the flat view of a pytree, safe norms, sums in bounded memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any


class Space(NamedTuple):
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
        """Raise a `ValueError` that names `name` unless `tree` has this structure and these shapes."""
        other = Space.of(tree)
        if (other.treedef, other.shapes) != (self.treedef, self.shapes):
            raise ValueError(
                f"{name}: expected the structure and shapes of the parameters, {self}, got {other}. "
                "Differentiate the loss with respect to the same pytree that the metric sees."
            )

    def ravel(self, tree: PyTree) -> Array:
        """The leaves of `tree`, concatenated to one flat vector of shape (p,)."""
        parts = [jnp.ravel(x).astype(self.dtype) for x in jax.tree.leaves(tree)]
        return jnp.concatenate(parts) if parts else jnp.zeros((0,), self.dtype)

    def unravel(self, vector: Array) -> PyTree:
        """A flat vector of shape (p,), cut into leaves of this structure; inverse of `ravel`."""
        leaves, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + math.prod(shape)
            leaves.append(vector[start:stop].reshape(shape).astype(dtype))
            start = stop
        return jax.tree.unflatten(self.treedef, leaves)

    def __str__(self) -> str:
        return str(jax.tree.unflatten(self.treedef, self.shapes)) if self.shapes else str(self.treedef)


def accumulator(*dtypes: Any) -> Any:
    """The dtype to compute in: the widest of `dtypes`, and never narrower than float32."""
    return jnp.result_type(jnp.float32, *dtypes)


def ravel(tree: PyTree) -> Array:
    """`tree` as one flat vector."""
    return Space.of(tree).ravel(tree)


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


def norm(vector: Array) -> Array:
    """Euclidean norm that neither overflows nor underflows: the largest entry is divided out before squaring."""
    largest = jnp.max(jnp.abs(vector), initial=0.0)
    unit = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(jnp.abs(vector / unit))))


def concrete(*arrays: Any) -> bool:
    """Whether the values can be read now, that is, outside `jit`, `vmap` and `grad`."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


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


def chunked_sum(f: Callable[[PyTree], PyTree], xs: PyTree, chunk_size: int | None) -> PyTree:
    """f(xs), for an f that sums over the leading axis of `xs`, evaluated `chunk_size` points at a time.

    Memory is that of one chunk, also under reverse-mode differentiation (each chunk is recomputed).
    """
    n = leading_axis(xs, "support")
    if chunk_size is None or chunk_size >= n:
        return f(xs)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number of points or None, got {chunk_size}")
    whole = n // chunk_size * chunk_size
    chunks = jax.tree.map(lambda x: jnp.reshape(x[:whole], (-1, chunk_size, *jnp.shape(x)[1:])), xs)
    step = jax.checkpoint(f)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, jax.tree.map(lambda x: x[0], chunks)))
    total, _ = jax.lax.scan(lambda acc, chunk: (jax.tree.map(jnp.add, acc, step(chunk)), None), start, chunks)
    if whole < n:
        total = jax.tree.map(jnp.add, total, f(jax.tree.map(lambda x: x[whole:], xs)))
    return total
