"""Operators known by what they do to a vector: a closed form, a Jacobian, a sum, a block, real and imaginary parts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, cast_like
from natgrad_jax.operators import shared
from natgrad_jax.operators.arrays import Diagonal
from natgrad_jax.operators.shared import Operator, Product


@dataclass(frozen=True)
class Closed:
    """G whose products and solves are known in closed form; the (p, p) matrix is built only when `dense` is called.

    Args:
        times: v ↦ Gv, a `jax.tree_util.Partial` (so that its arrays are data of the pytree).
        solve: g ↦ G⁺g, likewise; or None where only products are known.
        space: `Space.of(params)`.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_full_rank(2)
        >>> params = family.init(scale=2.0)
        >>> family.fisher(params).solve(params).loc.tolist()
        [0.0, 0.0]
    """

    times: Product
    solve: Product | None
    space: Space
    shows_diagonal: ClassVar[bool] = False

    def product(self) -> Product:
        """v ↦ Gv."""
        return self.times

    def restrict(self, mask: PyTree) -> "Restricted":
        """The block of the leaves in `mask`."""
        return Restricted.to(mask, self)

    mv, inner, norm = shared.mv, shared.inner, shared.norm
    dense, diagonal = shared.dense_by_products, shared.diagonal_by_products
    trace, max_rank, scale, balanced = shared.trace, shared.max_rank, shared.scale_of_diagonal, shared.balanced


@dataclass(frozen=True)
class Implicit:
    """G = JᴴHJ with J = ∂f(params, data)/∂params: products only, no rows and no matrix.

    One product costs one forward and one reverse pass; the linearisation is done once for many of them, where a
    solver asks for it, and never rests in the state of an optimizer.

    Args:
        f: f(params, data) -> pytree of outputs. A function that lives on: it is compared by identity, so one that is
            made anew on every call compiles anew.
        params: where to linearise.
        data: pytree of arrays that f needs.
        inner_product: H, an operator on the outputs; None for the identity.
        diag: pytree of the entries G_ii where they are known: relative damping and `cg` by Jacobi take it.
        chunk_size: f maps points on the leading axis of `data` to outputs one by one, so that G is a sum over chunks of
            this many of them: memory of one chunk, at the cost of linearising in every product. Excludes
            `inner_product`.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Implicit
        >>> G = Implicit(lambda theta, x: x * theta**2, jnp.array(3.0), jnp.array([1.0, 2.0]))
        >>> float(G.mv(jnp.array(1.0)))
        180.0
    """

    f: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    data: PyTree = None
    inner_product: Operator | None = None
    diag: PyTree | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.inner_product is not None:
            raise ValueError("chunk_size: an inner product may mix the points; put its square root into f instead")

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return Space.of(self.params)

    @property
    def shows_diagonal(self) -> bool:
        """Whether the diagonal comes without p products."""
        return self.diag is not None

    def product(self) -> Product:
        """v ↦ Jᴴ H J v, linearised once."""
        params = _tree.raised(self.params)

        def prepared(data: PyTree) -> Product:
            outputs, forward = jax.linearize(lambda theta: self.f(theta, data), params)
            reverse = jax.linear_transpose(forward, params)
            weigh = (lambda u: u) if self.inner_product is None else self.inner_product.product()
            # The transpose is Jᵀ; Jᴴ u is the conjugate of Jᵀ ū.
            conjugate = lambda tree: jax.tree.map(jnp.conj, tree)  # noqa: E731
            # Derivatives of f take and return the dtypes of f alone.
            weighed = lambda v: cast_like(weigh(forward(cast_like(v, params))), outputs)  # noqa: E731
            return lambda v: conjugate(reverse(conjugate(weighed(v)))[0])

        if self.chunk_size is None:
            return prepared(self.data)
        return lambda v: _tree.chunked_sum(lambda chunk: prepared(chunk)(v), self.data, self.chunk_size)

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters: `diag`, or else p products one after the other."""
        return shared.diagonal_by_products(self) if self.diag is None else _tree.raised(self.diag)

    def restrict(self, mask: PyTree) -> "Restricted":
        """The block of the leaves in `mask`."""
        return Restricted.to(mask, self)

    mv, inner, norm, dense = shared.mv, shared.inner, shared.norm, shared.dense_by_products
    trace, max_rank, scale, balanced = shared.trace, shared.max_rank, shared.scale_of_diagonal, shared.balanced


@dataclass(frozen=True)
class Sum:
    """G = Σ c_i G_i with c_i ≥ 0, for operators whose structures have nothing in common; see `add` and `scale`.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Dense, Diagonal, Sum
        >>> Sum((Dense(jnp.ones((2, 2))), Diagonal(jnp.ones(2))), (1.0, 2.0)).dense().tolist()
        [[3.0, 1.0], [1.0, 3.0]]
    """

    terms: tuple[Operator, ...]
    weights: tuple[float | Array, ...]

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on: complex where one of the terms is."""
        spaces = [term.space for term in self.terms]
        dtypes = zip(*(space.dtypes for space in spaces), strict=True)
        return Space(spaces[0].treedef, spaces[0].shapes, tuple(jnp.result_type(*kinds) for kinds in dtypes))

    @property
    def shows_diagonal(self) -> bool:
        """Whether the diagonal comes without p products."""
        return all(term.shows_diagonal for term in self.terms)

    def _sum(self, values: list[PyTree]) -> PyTree:
        weighted = [jax.tree.map(lambda x: c * x, value) for c, value in zip(self.weights, values, strict=True)]  # noqa: B023
        return jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *weighted)

    def product(self) -> Product:
        """v ↦ Σ c_i G_i v."""
        products = [term.product() for term in self.terms]
        return lambda v: self._sum([product(v) for product in products])

    def dense(self) -> Array:
        """The (p, p) matrix."""
        return self._sum([term.dense() for term in self.terms])

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the parameters."""
        return self._sum([term.diagonal() for term in self.terms])

    def scale(self) -> Array:
        """√G_ii, as a flat vector."""
        parts = [jnp.sqrt(c) * term.scale() for c, term in zip(self.weights, self.terms, strict=True)]
        return functools.reduce(jnp.hypot, parts)

    def balanced(self) -> tuple[Array | None, Array]:
        """`frame` (p,) and M (p, p), G = diag(frame) M diag(frame)."""
        parts = [term.balanced() for term in self.terms]
        return shared.joined_frames([(jnp.sqrt(c), *part) for c, part in zip(self.weights, parts, strict=True)])

    def restrict(self, mask: PyTree) -> "Sum":
        """The block of the leaves in `mask`."""
        return Sum(tuple(term.restrict(mask) for term in self.terms), self.weights)

    mv, inner, norm, trace, max_rank = shared.mv, shared.inner, shared.norm, shared.trace, shared.max_rank


@dataclass(frozen=True)
class Restricted:
    """The block of an operator that belongs to some of the leaves, when all that is known of it are its products.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Implicit, Restricted
        >>> G = Implicit(lambda p, _: p["a"] * p["b"], {"a": jnp.array(2.0), "b": jnp.array(3.0)})
        >>> Restricted.to({"a": True, "b": False}, G).dense().tolist()
        [[9.0]]
    """

    whole: Operator
    mask: Any  # (booleans, treedef): hashable

    @classmethod
    def to(cls, mask: PyTree, whole: Operator) -> "Restricted":
        """`mask` is a pytree of booleans over the parameters, or a prefix of one."""
        leaves, treedef = jax.tree.flatten(mask)
        return cls(whole, (tuple(map(bool, leaves)), treedef))

    def _seen(self, tree: PyTree) -> PyTree:
        leaves, treedef = self.mask
        return _tree.seen(jax.tree.unflatten(treedef, leaves), tree)

    @property
    def space(self) -> Space:
        """The space of the vectors that G acts on."""
        return Space.of(self._seen(self.whole.space.structs()))

    @property
    def shows_diagonal(self) -> bool:
        """Whether the diagonal comes without p products."""
        return bool(self.whole.shows_diagonal)

    def product(self) -> Product:
        """v ↦ what G makes of v on the seen leaves, zero on the others."""
        product, space = self.whole.product(), self.whole.space
        places = jax.tree.leaves(self._seen(jax.tree.unflatten(space.treedef, range(len(space.shapes)))))

        def restricted(v: PyTree) -> PyTree:
            full = jax.tree.leaves(jax.tree.map(lambda s: jnp.zeros(s.shape, space.dtype), space.structs()))
            for place, leaf in zip(places, jax.tree.leaves(v), strict=True):
                full[place] = leaf
            return self._seen(product(jax.tree.unflatten(space.treedef, full)))

        return restricted

    def diagonal(self) -> PyTree:
        """The entries G_ii, shaped like the seen parameters."""
        return self._seen(self.whole.diagonal())

    def scale(self) -> Array:
        """√G_ii, as a flat vector."""
        return _tree.ravel(self._seen(self.whole.space.unravel(self.whole.scale())))

    def restrict(self, mask: PyTree) -> "Restricted":
        """The block of the leaves in `mask`."""
        return Restricted.to(mask, self)

    mv, inner, norm, dense = shared.mv, shared.inner, shared.norm, shared.dense_by_products
    trace, max_rank, balanced = shared.trace, shared.max_rank, shared.balanced


@dataclass(frozen=True)
class RealParts:
    """A real metric of complex parameters: it acts on their real and imaginary parts, and is not complex-linear.

    Solvers solve `parts`, whatever they are; `parts.dense()` is the matrix, of twice the size.

    Args:
        parts: the operator on the pytree that has a pair (real, imaginary) in the place of each complex leaf.
        space: `Space.of(params)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.operators import Diagonal, RealParts, Space
        >>> z = jnp.array([1.0 + 1.0j])
        >>> RealParts(Diagonal((jnp.array([2.0]), jnp.array([3.0]))), Space.of(z)).mv(z).tolist()
        [(2+3j)]
    """

    parts: Operator
    space: Space
    shows_diagonal: ClassVar[bool] = False

    def product(self) -> Product:
        """v ↦ Gv, part by part."""
        product = self.parts.product()
        return lambda v: _tree.complex_of(product(_tree.real_parts(v)), self.space)

    def on_parts(self, diagonal: Diagonal) -> Diagonal:
        """A diagonal metric of the complex parameters, on their parts: |z|² = x² + y²."""
        both = lambda s, d: (d, d) if _tree.is_complex(s.dtype) else d  # noqa: E731
        return Diagonal(jax.tree.map(both, self.space.structs(), diagonal.entries))

    def max_rank(self) -> int:
        """An upper bound on the rank, in real dimensions."""
        return int(self.parts.max_rank())

    def trace(self) -> Array:
        """tr G, over real and imaginary parts."""
        return self.parts.trace()

    def dense(self) -> Array:
        """Refused: there is no complex matrix."""
        raise TypeError(
            "operator: a real metric of complex parameters is no complex matrix; operator.parts.dense() is the real "
            "one, on real and imaginary parts. If log ψ is holomorphic in the parameters, say holomorphic=True."
        )

    diagonal = scale = balanced = dense

    def restrict(self, mask: PyTree) -> "RealParts":
        """The block of the leaves in `mask`."""
        full = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: keep, part), mask, self.space.structs())
        return RealParts(self.parts.restrict(full), Space.of(_tree.seen(full, self.space.structs())))

    mv, inner, norm = shared.mv, shared.inner, shared.norm


jax.tree_util.register_dataclass(RealParts, data_fields=["parts"], meta_fields=["space"])
jax.tree_util.register_dataclass(Closed, data_fields=["times", "solve"], meta_fields=["space"])
jax.tree_util.register_dataclass(
    Implicit, data_fields=["params", "data", "inner_product", "diag"], meta_fields=["f", "chunk_size"]
)
jax.tree_util.register_dataclass(Sum, data_fields=["terms", "weights"], meta_fields=[])
jax.tree_util.register_dataclass(Restricted, data_fields=["whole"], meta_fields=["mask"])
