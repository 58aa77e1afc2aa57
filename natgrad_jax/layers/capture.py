"""Rows of a Jacobian, in factors where that is cheaper: what `capture` and the metrics build from one walk."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree
from natgrad_jax._tree import OneExample, PyTree, concrete, leading_axis
from natgrad_jax.layers import walk
from natgrad_jax.layers.walk import Mark, Tape, Use
from natgrad_jax.operators.outer import Layout, Outer, is_outer

OfOne = Callable[[PyTree, PyTree], PyTree]
SAVED = 2  # a leaf is kept in factors if they are smaller than its rows by this


@dataclass(frozen=True)
class Plan:
    """What a walk over f(params, x), for one x, has found.

    Attributes:
        jaxpr: of the outputs in a row, as a function of the leaves of params and x.
        marks: of its arguments.
        leaves: shapes and dtypes of the leaves of params.
        k: number of outputs.
        uses: of all leaves, in the order of the walk, with G, T, I and O of each.
        outputs: of the products of these uses.
        refused: the leaves with a use that is not followed, and what it is.
    """

    jaxpr: Any
    marks: list[Mark | None]
    leaves: list[jax.ShapeDtypeStruct]
    k: int
    uses: list[tuple[Use, tuple[int, int, int, int]]]
    outputs: list[jax.ShapeDtypeStruct]
    refused: dict[int, str]

    @classmethod
    def of(cls, f: OfOne, params: PyTree, x: PyTree) -> "Plan":
        """One walk, on shapes alone."""
        known = concrete(*jax.tree.leaves(params))
        leaves, treedef = jax.tree.flatten(jax.tree.map(_struct, params))
        points, point_tree = jax.tree.flatten(jax.tree.map(_struct, x))

        def outputs(leaves: list[Array], points: list[Array]) -> Array:
            return _tree.ravel(f(jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(point_tree, points)))

        jaxpr = jax.make_jaxpr(outputs)(leaves, points)
        # With known numbers `rows` sees it at once, where the check would take longer than all the rest.
        if not known and walk.holds(jaxpr.jaxpr, ("custom_vjp_call", "custom_jvp_call")):
            # Another function, since a trace of the same one is remembered.
            _check_rules(lambda: jax.make_jaxpr(lambda *args: outputs(*args))(leaves, points))
        marks: list[Mark | None] = [_mark(i, leaf) for i, leaf in enumerate(leaves)] + [None] * len(points)
        tape = Tape()

        def first(*args: Array) -> tuple[list[Array], list[Any]]:
            _, out_marks = walk.run(jaxpr.jaxpr, jaxpr.consts, args, marks, tape)
            tape.refuse(out_marks, "an output")
            return tape.others, tape.outputs

        others, outs = jax.eval_shape(first, *leaves, *points)
        uses = []
        for use, other in zip(tape.uses, others, strict=True):
            use = replace(use, layout=replace(use.layout, shape=leaves[use.leaf].shape))
            g, t, i = other.shape
            uses.append((use, (g, t, i, math.prod(leaves[use.leaf].shape) // (g * i))))
            if t == 0:
                tape.refused.setdefault(use.leaf, "no position")
        return cls(jaxpr, marks, leaves, jaxpr.out_avals[0].size, uses, outs, tape.refused)

    def of_leaf(self, leaf: int) -> list[tuple[Use, tuple[int, int, int, int]]]:
        """The uses of one leaf, if all of its uses are followed."""
        return [] if leaf in self.refused else [pair for pair in self.uses if pair[0].leaf == leaf]

    def factor_size(self, leaf: int) -> float:
        """Numbers that the factors of a leaf hold for each example; inf if it has none."""
        uses = self.of_leaf(leaf)
        if not uses or self.orders(leaf) is None:
            return math.inf
        return sum(g * t * (i + self.k * o) for _, (g, t, i, o) in uses)

    def orders(self, leaf: int) -> list[bool] | None:
        """Of each use, whether its two sides are exchanged with respect to the first; None if neither way fits."""
        uses = [use for use, _ in self.of_leaf(leaf)]
        if len(uses) == 1:
            return [False]
        indices = np.arange(math.prod(self.leaves[leaf].shape)).reshape(self.leaves[leaf].shape)
        first, *rest = (use.layout.matrices(indices) for use in uses)
        orders = [False]
        for other in rest:
            if np.array_equal(first, other):
                orders.append(False)
            elif np.array_equal(first, other.swapaxes(1, 2)):
                orders.append(True)
            else:
                return None
        return orders

    def followed(self, always: bool = False) -> frozenset[int]:
        """The leaves that are kept in factors: where they are smaller than the rows, or `always` where it can be."""
        size = lambda leaf: self.k * math.prod(self.leaves[leaf].shape)  # noqa: E731
        pays = lambda leaf: always or SAVED * self.factor_size(leaf) <= size(leaf)  # noqa: E731
        return frozenset(
            leaf for leaf in range(len(self.leaves)) if math.isfinite(self.factor_size(leaf)) and pays(leaf)
        )


BOUND = (
    "f: a custom_vjp or custom_jvp that is made inside of f closes over its arguments; pass them to it as arguments of "
    "its own, or take rows='plain'"
)


class BoundRuleError(TypeError):
    """A rule for derivatives holds values of the trace that it was made in, and cannot be used in another."""


def _check_rules(trace: Callable[[], Any]) -> None:
    """A `BoundRuleError` if something that was traced outlives the trace: a rule that closes over the example."""
    try:
        with jax.checking_leaks():
            trace()
    except Exception as error:
        if "eaked" not in str(error):
            raise
        raise BoundRuleError(BOUND) from error


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _mark(i: int, leaf: jax.ShapeDtypeStruct) -> Mark | None:
    usable = jnp.issubdtype(leaf.dtype, jnp.floating) and math.prod(leaf.shape) > 0
    return Mark(i, (), leaf.shape) if usable else None


def rows(plan: Plan, params: PyTree, points: PyTree, roots: Array, *, centred: bool, always: bool = False) -> PyTree:
    """Rows √w_i ∂f(θ, x_i)/∂θ of a plan, shaped like params: (n·k, …) arrays, or `Outer` where that is smaller.

    Args:
        plan: of f on params and one of the points.
        params: where to differentiate.
        points: the x_i on the leading axis, n of them.
        roots: √w_i, shape (n,) or (n, k); (n,) where `centred`.
        centred: take the mean with weights w out of the rows of each output.
        always: keep every leaf in factors that can be.
    """
    leaves, treedef = jax.tree.flatten(params)
    followed = plan.followed(always)
    kept = [(place, pair) for place, pair in enumerate(plan.uses) if pair[0].leaf in followed]
    whole = [i for i in range(len(leaves)) if i not in followed]
    zeros = [jnp.zeros(plan.outputs[place].shape, plan.outputs[place].dtype) for place, _ in kept]

    def one(x: PyTree) -> tuple[list[Array], list[Array], list[Array]]:
        def outputs(zeros: list[Array], differentiated: list[Array]) -> tuple[Array, list[Array]]:
            args = list(leaves)
            for i, leaf in zip(whole, differentiated, strict=True):
                args[i] = leaf
            tape = Tape(zeros, followed)
            (out,), _ = walk.run(plan.jaxpr.jaxpr, plan.jaxpr.consts, [*args, *jax.tree.leaves(x)], plan.marks, tape)
            return out, tape.others

        out, pull, others = jax.vjp(outputs, zeros, [leaves[i] for i in whole], has_aux=True)
        deltas, gradients = jax.vmap(pull)(jnp.eye(plan.k, dtype=out.dtype))
        deltas = [jax.vmap(use.sensitivity)(delta) for (_, (use, _)), delta in zip(kept, deltas, strict=True)]
        return others, deltas, gradients

    try:
        others, deltas, gradients = _tree.raised(jax.vmap(one)(points))
    except jax.errors.UnexpectedTracerError as error:
        raise BoundRuleError(BOUND) from error
    built: dict[int, Any] = {}
    for i, gradient in zip(whole, gradients, strict=True):
        built[i] = _weighted(_centred(gradient, roots) if centred else gradient, roots)
    for leaf in followed:
        places = [j for j, (_, (use, _)) in enumerate(kept) if use.leaf == leaf]
        layout = kept[places[0]][1][0].layout
        pairs = [(others[j][:, None], _roots(roots, 5).astype(deltas[j].dtype) * deltas[j]) for j in places]
        built[leaf] = _outer(plan, leaf, layout, pairs, roots if centred else None)
    return jax.tree.unflatten(treedef, [built[i] for i in range(len(leaves))])


def _outer(plan: Plan, leaf: int, layout: Layout, pairs: list[tuple[Array, Array]], roots: Array | None) -> Outer:
    """The uses of a leaf, one after the other along the positions."""
    orders = plan.orders(leaf)
    assert orders is not None
    sides = [pair[::-1] if exchanged else pair for pair, exchanged in zip(pairs, orders, strict=True)]
    left, right = (_along_positions([pair[side] for pair in sides]) for side in (0, 1))
    outer = Outer(left, right, layout, plan.k)
    if roots is None:
        return outer
    total = jnp.sum(jnp.square(roots))
    one_hot = roots[:, None, None] * jnp.eye(plan.k, dtype=roots.dtype) / total
    shift = jax.vmap(lambda u: outer.transposed_times(u.reshape(-1)), in_axes=1)(one_hot)
    return replace(outer, centre=(roots.astype(outer.dtype), shift))


def _along_positions(parts: list[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    k = max(part.shape[1] for part in parts)
    return jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:])) for x in parts], axis=3)


def _roots(roots: Array, ndim: int) -> Array:
    """(n,) or (n, k), ready to multiply (n, k, …)."""
    return roots.reshape(*roots.shape, *(1,) * (ndim - roots.ndim))


def _centred(rows: Array, roots: Array) -> Array:
    """Without their mean over the examples, in two steps: a column of equal numbers becomes 0."""
    weights = jnp.square(roots) / jnp.sum(jnp.square(roots))
    rows = rows - jax.lax.dynamic_index_in_dim(rows, jnp.argmax(roots), keepdims=True)
    return rows - jnp.tensordot(weights.astype(rows.dtype), rows, 1)


def _weighted(rows: Array, roots: Array) -> Array:
    rows = _roots(roots, rows.ndim).astype(rows.dtype) * rows
    return rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])


@dataclass(frozen=True)
class Captured:
    """What `capture` returns.

    Attributes:
        rows: like params; of each leaf the n·k rows of the Jacobian, `operators.Outer` or an array (n·k, …).
        plan: what the walk over f found.
        names: of the leaves.
    """

    rows: PyTree
    plan: Plan
    names: list[str]

    def report(self) -> str:
        """A line for each leaf: the route, the uses, and the multiplications and numbers that both routes take.

        The kernel of n·k rows costs (n·k)² times the multiplications of an example.
        """
        lines = []
        for i, (name, row) in enumerate(zip(self.names, jax.tree.leaves(self.rows, is_leaf=is_outer), strict=True)):
            size = math.prod(self.plan.leaves[i].shape)
            uses = self.plan.of_leaf(i)
            found = ", ".join(f"{use.where} of {g} × ({a}, {b}) at {t}" for use, (g, t, a, b) in uses)
            if not uses:
                found = f"whole: {self.plan.refused.get(i, 'no use')}"
            line = f"{name} {self.plan.leaves[i].shape}: {'factors' if is_outer(row) else 'rows'}; {found}"
            if math.isfinite(numbers := self.plan.factor_size(i)):
                cost = sum(g * t * t * (a + b) for _, (g, t, a, b) in uses)
                line += f"; of an example {self.plan.k * size} numbers in rows, {numbers:.0f} in factors"
                line += f"; of a kernel entry {size} products from rows, {cost} from factors"
            lines.append(line)
        return "\n".join(lines)


def capture(f: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], Captured]:
    """Activations and sensitivities of every product that a parameter enters, from any JAX function.

    The gradient of one output of one example in the weight W of y = xW is activation ⊗ sensitivity, x ⊗ ∂out/∂y, summed
    over the positions at which W is used. `capture` finds those products in the jaxpr of f: through jit, remat, vmap,
    scan, reshapes, casts and multiples by one number, matrix products, einsum, convolutions. A leaf with any other use
    has plain rows (biases and scales of units always, for which they are the cheapest form).

    Args:
        f: f(params, batch) -> real outputs on the leading axis; row by row what it gives for a batch of one.

    Returns:
        captured(params, batch) -> `Captured`, with `.rows` (for `operators.Gram`; a sum over examples, scale by 1/n
        for a mean) and `.report()`.

    Raises:
        ValueError: outputs without a leading axis.
        TypeError: outputs that are not real; a custom rule, made inside of f, that closes over its arguments.

    Cost: one reverse pass for each output of an example, and no n × p array where factors are smaller.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> model = lambda w, x: jnp.tanh(x @ w)
        >>> captured = ng.layers.capture(model)(jnp.ones((8, 8)), jnp.ones((3, 8)))
        >>> captured.rows.shape, ng.operators.Gram(captured.rows).dense().shape
        ((24, 8, 8), (64, 64))
    """

    def captured(params: PyTree, batch: PyTree) -> Captured:
        n = leading_axis(batch, "batch")
        theta = _tree.raised(params)
        plan = Plan.of(OneExample(f, "f"), theta, jax.tree.map(lambda x: x[0], batch))
        if not jnp.issubdtype(plan.jaxpr.out_avals[0].dtype, jnp.floating):
            raise TypeError(
                f"f: expected real floating-point outputs, got {plan.jaxpr.out_avals[0].dtype}; return the real and "
                "the imaginary part of a complex number as two"
            )
        names = [jax.tree_util.keystr(path) or "params" for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        return Captured(rows(plan, theta, batch, jnp.ones(n), centred=False), plan, names)

    return captured
