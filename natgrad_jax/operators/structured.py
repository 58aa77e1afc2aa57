"""Operators that fall apart: Kronecker factors of each leaf, an operator for each part of the parameters."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import block_diag

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, accumulator
from natgrad_jax.operators import shared
from natgrad_jax.operators.shared import Product, is_operator


@dataclass(frozen=True)
class Kronecker:
    """G = left ⊗ right for each leaf, zero between leaves: V ↦ left V rightᵀ for a leaf of shape (a, b).

    Products cost O(ab(a + b)) a leaf, solves O(a³ + b³); the (ab, ab) matrix is never formed.

    Args:
        left: pytree like the parameters, (a, a) in the place of each leaf.
        right: likewise, (b, b).
        like: `Space.of(params)` for leaves of any shape with a·b entries, (a, b) after reshaping in row-major order;
            when left out leaves have shape (a, b).

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Kronecker
        >>> G = Kronecker(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([[3.0]]))
        >>> G.mv(jnp.array([[1.0], [0.0]])).tolist()
        [[6.0], [3.0]]
    """

    left: PyTree
    right: PyTree
    like: Space | None = None
    shows_diagonal: ClassVar[bool] = True

    def blocks(self) -> list[tuple[int, int]]:
        """(a, b) for each leaf."""
        pairs = zip(jax.tree.leaves(self.left), jax.tree.leaves(self.right), strict=True)
        return [(left.shape[-1], right.shape[-1]) for left, right in pairs]

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        if self.like is not None:
            for (a, b), shape in zip(self.blocks(), self.like.shapes, strict=True):
                if a * b != math.prod(shape):
                    raise ValueError(
                        f"left, right: factors of sizes {a} and {b} do not fit a parameter of shape {shape}"
                    )
            return self.like
        leaf = lambda x, y: jax.ShapeDtypeStruct((x.shape[-1], y.shape[-1]), jnp.result_type(x, y))  # noqa: E731
        return Space.of(jax.tree.map(leaf, self.left, self.right))

    def factors(self) -> list[tuple[Array, Array]]:
        """(left, right) for each leaf, in the precision of the arithmetic."""
        for factor in jax.tree.leaves((self.left, self.right)):
            if jnp.ndim(factor) != 2 or factor.shape[0] != factor.shape[1]:
                raise ValueError(f"left, right: expected square matrices, got shape {jnp.shape(factor)}")
        raised = lambda tree: jax.tree.leaves(_tree.raised(tree))  # noqa: E731
        return list(zip(raised(self.left), raised(self.right), strict=True))

    def product(self) -> Product:
        """V ↦ left V rightᵀ."""
        factors = self.factors()

        def product(v: PyTree) -> PyTree:
            leaves, treedef = jax.tree.flatten(v)
            out = [
                (left @ x.reshape(left.shape[-1], -1) @ right.T).reshape(x.shape)
                for (left, right), x in zip(factors, leaves, strict=True)
            ]
            return jax.tree.unflatten(treedef, out)

        return product

    def dense(self) -> Array:
        """The (p, p) matrix."""
        blocks = [jnp.kron(left, right) for left, right in self.factors()]
        return block_diag(*blocks) if blocks else jnp.zeros((0, 0))

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters."""
        flat = [jnp.outer(jnp.diagonal(left).real, jnp.diagonal(right).real) for left, right in self.factors()]
        return self.space.unravel(self.space.ravel(flat).real)

    def scale(self) -> Array:
        """√G_ii, as a flat vector."""
        root = lambda x: _tree.root(jnp.diagonal(x).real)  # noqa: E731
        return self.space.ravel([jnp.outer(root(left), root(right)) for left, right in self.factors()]).real

    def restrict(self, mask: PyTree) -> "Kronecker":
        """The blocks of the leaves in `mask`."""
        like = None if self.like is None else Space.of(_tree.seen(mask, self.like.structs()))
        return Kronecker(_tree.seen(mask, self.left), _tree.seen(mask, self.right), like)

    mv, inner, norm = shared.mv, shared.inner, shared.norm
    trace, max_rank, balanced = shared.trace, shared.max_rank, shared.balanced


@dataclass(frozen=True)
class Blocks:
    """One operator for each part of the parameters, zero between the parts.

    Args:
        parts: pytree of operators that is a prefix of the parameters; each acts on the subtree in its place.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Blocks, Dense, Diagonal
        >>> G = Blocks({"a": Dense(2 * jnp.eye(2)), "b": Diagonal(jnp.array(3.0))})
        >>> G.mv({"a": jnp.ones(2), "b": jnp.array(1.0)})["b"].item()
        3.0
    """

    parts: PyTree

    def map(self, f: Any, *trees: PyTree) -> PyTree:
        """f(operator, subtree, …) for every part, in its place."""
        return jax.tree.map(f, self.parts, *trees, is_leaf=is_operator)

    @property
    def shows_diagonal(self) -> bool:
        """Whether the diagonal comes without p products."""
        return all(operator.shows_diagonal for operator in self.operators)

    @property
    def operators(self) -> list[Any]:
        """The operators, in order."""
        return jax.tree.leaves(self.parts, is_leaf=is_operator)

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return Space.of(self.map(lambda operator: operator.space.structs()))

    def product(self) -> Product:
        """v ↦ each part's product with its subtree."""
        products = [operator.product() for operator in self.operators]

        def product(v: PyTree) -> PyTree:
            rest = iter(products)
            return self.map(lambda _, part: next(rest)(part), v)

        return product

    def dense(self) -> Array:
        """The (p, p) matrix."""
        blocks = [operator.dense() for operator in self.operators]
        return block_diag(*blocks).astype(self.space.dtype) if blocks else jnp.zeros((0, 0))

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters."""
        return self.map(lambda operator: operator.diagonal())

    def scale(self) -> Array:
        """√G_ii, as a flat vector."""
        return jnp.concatenate([jnp.zeros(0, accumulator()), *(operator.scale() for operator in self.operators)])

    def balanced(self) -> tuple[Array | None, Array]:
        """`frame` (p,) and M (p, p), G = diag(frame) M diag(frame)."""
        parts = [operator.balanced() for operator in self.operators]
        if all(frame is None for frame, _ in parts):
            return None, self.dense()
        frames = [jnp.ones(matrix.shape[-1]) if frame is None else frame for frame, matrix in parts]
        return jnp.concatenate(frames), block_diag(*(matrix for _, matrix in parts))

    def max_rank(self) -> int:
        """An upper bound on the rank, from shapes alone."""
        return sum(operator.max_rank() for operator in self.operators)

    def restrict(self, mask: PyTree) -> "Blocks":
        """The blocks of the leaves in `mask`."""
        full = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: keep, part), mask, self.space.structs())
        return Blocks(self.map(lambda operator, part: operator.restrict(part), full))

    mv, inner, norm, trace = shared.mv, shared.inner, shared.norm, shared.trace


jax.tree_util.register_dataclass(Kronecker, data_fields=["left", "right"], meta_fields=["like"])
jax.tree_util.register_dataclass(Blocks, data_fields=["parts"], meta_fields=[])
