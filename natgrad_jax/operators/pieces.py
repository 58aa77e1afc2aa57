"""Rows of a leaf that is cut into pieces, as a flat vector of parameters is: each piece has rows of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax._tree import PyTree, accumulator, norm
from natgrad_jax.operators.outer import Layout, Outer
from natgrad_jax.operators.picked import Picked

OfPiece = Outer | Picked


@dataclass(frozen=True)
class Pieces:
    """Rows of a leaf, of which the rows of disjoint pieces are known, and the rest is 0.

    Attributes:
        parts: rows of the pieces, `Outer` or `Picked`.
        layout: of the parts.
    """

    parts: tuple[OfPiece, ...]
    layout: "Cut"

    @classmethod
    def of(cls, shape: tuple[int, ...], parts: Sequence[tuple[Layout, OfPiece]]) -> "Pieces":
        """From the way that each piece is cut out of a leaf of this shape, and its rows."""
        places = places_of(shape)
        parts = sorted(parts, key=lambda part: int(part[0].matrices(places).min()))
        windows = tuple(window for window, _ in parts)
        runs = [np.ravel(window.matrices(places)) for window in windows]
        in_a_row = all(np.array_equal(run, np.arange(run[0], run[0] + run.size)) for run in runs)
        starts = tuple(int(run[0]) for run in runs) if in_a_row else None
        return cls(tuple(rows for _, rows in parts), Cut(shape, windows, starts))

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *shape of the leaf)."""
        return (self.parts[0].shape[0], *self.layout.shape)

    @property
    def dtype(self) -> Any:
        """That of the numbers."""
        return accumulator(*(part.dtype for part in self.parts))

    def times(self, v: Array) -> Array:
        """Av, shape (N,)."""
        return sum(part.times(x) for part, x in self.each(v))  # type: ignore[return-value]

    def transposed_times(self, u: Array) -> Array:
        """Aᵀu, shaped like the leaf."""
        return self.layout.leaf([part.transposed_times(u) for part in self.parts])

    def squares(self) -> Array:
        """Σ over the rows of their squares, (*leaf,): the diagonal of AᵀA."""
        return self.layout.leaf([part.squares() for part in self.parts])

    def lengths(self) -> Array:
        """√squares, for rows of any size."""
        return self.layout.leaf([part.lengths() for part in self.parts])

    def bound(self) -> Array:
        """A number that no row is longer than."""
        return norm(jnp.stack([part.bound() for part in self.parts]))

    def scaled(self, c: Any) -> "Pieces":
        """c times the rows."""
        return replace(self, parts=tuple(part.scaled(c) for part in self.parts))

    def explicit(self) -> Array:
        """The rows, (N, *leaf)."""
        return self.layout.leaf([part.explicit() for part in self.parts])

    def each(self, leaf: Array) -> list[tuple[OfPiece, Array]]:
        """The rows of each piece, and what of a leaf belongs to it."""
        return [(part, window.matrices(leaf)) for part, window in zip(self.parts, self.layout.windows, strict=True)]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Cut:
    """How a leaf is cut into pieces.

    Attributes:
        shape: of the leaf.
        windows: from the leaf to each piece, in the order of their first entries.
        starts: where each begins in the flat leaf, if each is a stretch of that; else None.
    """

    shape: tuple[int, ...]
    windows: tuple[Layout, ...]
    starts: tuple[int, ...] | None

    def leaf(self, parts: list[Array]) -> Array:
        """The leaf with these pieces, with zeros between them; any axes may stand before theirs."""
        lead = parts[0].shape[: parts[0].ndim - len(self.windows[0].shapes[-1])]
        if self.starts is None:
            return sum(window.leaf(x) for window, x in zip(self.windows, parts, strict=True))  # type: ignore[return-value]
        # One copy, where sums would be as many as there are pieces.
        row, end, dtype = [], 0, accumulator(*(x.dtype for x in parts))
        for start, x in zip(self.starts, parts, strict=True):
            flat = x.reshape(*lead, -1).astype(dtype)
            row += [jnp.zeros((*lead, start - end), dtype), flat]
            end = start + flat.shape[-1]
        row.append(jnp.zeros((*lead, math.prod(self.shape) - end), dtype))
        return jnp.concatenate(row, axis=-1).reshape(*lead, *self.shape)


def places_of(shape: tuple[int, ...]) -> Any:
    """The place of every entry in the flat leaf."""
    return np.arange(math.prod(shape)).reshape(shape)


def is_outer(x: Any) -> bool:
    """Whether x is rows in factors."""
    return isinstance(x, Outer | Picked | Pieces)


def explicit(rows: PyTree) -> PyTree:
    """The same rows, each leaf as one array."""
    return jax.tree.map(lambda x: x.explicit() if is_outer(x) else x, rows, is_leaf=is_outer)


jax.tree_util.register_dataclass(Pieces, data_fields=["parts"], meta_fields=["layout"])
