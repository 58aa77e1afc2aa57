"""Rows of a Jacobian, in factors where that is cheaper: what `capture` and the metrics build from one walk."""

import functools
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
from natgrad_jax.layers.walk import Mark, Marks, Piece, Route, Tape, Use
from natgrad_jax.operators.outer import Layout, Outer, around_mean, column
from natgrad_jax.operators.picked import Picked
from natgrad_jax.operators.pieces import OfPiece, Pieces, is_outer, places_of

FoundUse = tuple[Use, tuple[int, int, int, int]]
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
        refused: the pieces of leaves with a use that is not followed, and what it is.
        added_to: of a bias, the route of the weight to whose product it is added, and whose sensitivities it has.
    """

    jaxpr: Any
    marks: list[Marks]
    leaves: list[jax.ShapeDtypeStruct]
    k: int
    uses: list[FoundUse]
    outputs: list[jax.ShapeDtypeStruct]
    refused: dict[Piece, str]
    added_to: dict[Piece, Route]

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
        marks: list[Marks] = [_mark(i, leaf) for i, leaf in enumerate(leaves)] + [()] * len(points)
        tape = Tape()

        def first(*args: Array) -> tuple[list[Array], list[Any]]:
            out, out_marks = walk.run(jaxpr.jaxpr, jaxpr.consts, args, marks, tape)
            tape.refuse(out_marks, "an output")
            tape.read(out)
            return tape.others, tape.outputs

        others, outs = jax.eval_shape(first, *leaves, *points)
        uses: list[FoundUse] = []
        for use, other in zip(tape.uses, others, strict=True):
            moved = use.layout.steps[len(use.piece.steps) :]
            layout = Layout(_window(leaves, use.piece).shapes[-1], moved)
            box = _box(layout)
            if box is not None:
                layout = replace(layout, steps=(*moved, ("slice", box)))
                if math.prod(layout.shapes[-1]) != math.prod(layout.shape):
                    tape.refused.setdefault(use.piece, "a part of matrices that is none")
            use = replace(use, layout=layout, box=box)
            (g, i, o), t = use.layout.shapes[-1], other.shape[1]
            uses.append((use, (g, t, i, o)))
            if t == 0:
                tape.refused.setdefault(use.piece, "no position")
        added_to = _biases(uses, tape)
        return cls(jaxpr, marks, leaves, jaxpr.out_avals[0].size, uses, outs, tape.refused, added_to)

    def pieces(self, leaf: int) -> list[Piece]:
        """What of a leaf is used, the whole of it mostly; nothing if that are pieces that overlap."""
        found = dict.fromkeys([*(use.piece for use, _ in self.uses if not use.whole), *self.refused])
        pieces = [piece for piece in found if piece.leaf == leaf]
        if len(pieces) < 2:
            return pieces
        places = places_of(self.leaves[leaf].shape)
        seen = [np.ravel(self.window(piece).matrices(places)) for piece in pieces]
        return pieces if np.max(np.bincount(np.concatenate(seen))) == 1 else []

    def window(self, piece: Piece) -> Layout:
        """From the leaf to a piece."""
        return _window(self.leaves, piece)

    def size(self, piece: Piece) -> int:
        """Numbers that the rows of a piece hold for each example."""
        return self.k * math.prod(self.window(piece).shapes[-1])

    def of_route(self, route: Route) -> list[FoundUse]:
        """The uses of one piece, if all of its uses are followed; or those of it as a whole."""
        piece, whole = route
        return [] if piece in self.refused and not whole else [pair for pair in self.uses if pair[0].route == route]

    def factor_size(self, piece: Piece) -> float:
        """Numbers that the factors of a piece hold for each example; inf if it has none."""
        if self.orders((piece, False)) is None:
            return math.inf
        uses = self.of_route((piece, False))
        if piece in self.added_to:
            return uses[0][1][0]
        return sum(g * t * ((1 if use.picked else i) + self.k * o) for use, (g, t, i, o) in uses)

    def picked(self, piece: Piece) -> bool:
        """Whether a piece is a table of which rows are picked."""
        return any(use.picked for use, _ in self.of_route((piece, False)))

    def orders(self, route: Route) -> list[bool] | None:
        """Of each use, whether its two sides are exchanged with respect to the first; None if neither way fits."""
        uses = [use for use, _ in self.of_route(route)]
        if len(uses) < 2:
            return [False] if uses else None
        if len({use.picked for use in uses}) == 2:
            return None
        indices = places_of(uses[0].layout.shape)
        first, *rest = (use.layout.matrices(indices) for use in uses)
        orders = [False]
        for other in rest:
            if np.array_equal(first, other):
                orders.append(False)
            elif np.array_equal(first, other.swapaxes(1, 2)) and not uses[0].picked:
                orders.append(True)
            else:
                return None
        return orders

    def followed(self, always: bool = False, centred: bool = False) -> frozenset[Route]:
        """What is kept in factors: where they are smaller than the rows, or `always` where it can be.

        Of a leaf that is cut, some of the pieces; then the others are used as a whole. Rows that are picked are not,
        if they are centred: the mean is in every row.
        """
        alone: set[Piece] = set()  # biases whose weights are not followed, as where another piece of these is not
        while True:
            routes: list[Route] = []
            for leaf in range(len(self.leaves)):
                pieces = self.pieces(leaf)
                of_leaf = [(piece, piece in alone or not self._kept(piece, always, centred)) for piece in pieces]
                if not all(whole for _, whole in of_leaf) and all(self.orders(route) is not None for route in of_leaf):
                    routes += of_leaf
            followed = frozenset(routes)
            biases = {piece for piece, whole in routes if not whole and piece in self.added_to}
            lost = {piece for piece in biases if self.added_to[piece] not in followed}
            if not lost:
                return followed
            alone |= lost

    def _kept(self, piece: Piece, always: bool, centred: bool) -> bool:
        numbers = self.factor_size(piece)
        if not math.isfinite(numbers) or (centred and self.picked(piece)):
            return False
        if piece in self.added_to:
            return self._kept(self.added_to[piece][0], always, centred)
        return always or SAVED * numbers <= self.size(piece)

    def described(self, leaf: int) -> str:
        """The uses of a leaf, and what its rows and the kernel take in either form."""
        found, numbers, cost, followed = [], 0.0, 0, self.followed(always=True)
        pieces, reasons = self.pieces(leaf), [why for piece, why in self.refused.items() if piece.leaf == leaf]
        for piece in pieces:
            uses, window = self.of_route((piece, False)), self.window(piece).shapes[-1]
            what = ", ".join(f"{use.where} of {g} × ({a}, {b}) at {t}" for use, (g, t, a, b) in uses)
            kept = math.isfinite(self.factor_size(piece))
            if piece in self.added_to:
                kept = (piece, False) in followed
                what = "a bias, with the sensitivities of the product that it is added to" if kept else "whole: add"
            found.append((f"{window} in " if piece.steps else "") + (what or f"whole: {self.refused[piece]}"))
            numbers += self.factor_size(piece) if kept else self.size(piece)
            cost += self._products(piece) if kept else self.size(piece) // self.k
        if not pieces:
            found = [f"whole: {reasons[0] if reasons else self._unseen(leaf)}"]
        line, size = ", ".join(found), math.prod(self.leaves[leaf].shape)
        if any(math.isfinite(self.factor_size(piece)) for piece in pieces):
            line += f"; of an example {self.k * size} numbers in rows, {numbers:.0f} in factors"
            line += f"; of a kernel entry {size} products from rows, {cost} from factors"
        return line

    def _products(self, piece: Piece) -> int:
        """Of an entry of the kernel, from factors."""
        if piece in self.added_to:
            return 1
        uses = self.of_route((piece, False))
        return sum(g * t * t * ((1 if use.picked else a) + b) for use, (g, t, a, b) in uses)

    def _unseen(self, leaf: int) -> str:
        return "slices that overlap" if any(use.piece.leaf == leaf for use, _ in self.uses) else "no use"


def _box(layout: Layout) -> tuple[tuple[int, int], ...] | None:
    """Where the leaf is in matrices that hold other numbers too: from the first to the last on each axis."""
    if not any(kind == "pad" for kind, _ in layout.steps):
        return None
    held = np.nonzero(layout.matrices(np.ones(layout.shape, bool)))
    return tuple((int(where.min()), int(where.max()) + 1) for where in held)


def _cropped(use: Use, activation: Array, delta: Array) -> tuple[Array, Array]:
    """(n, G, T, I) and (n, k, G, T, O) of the box of a use."""
    if use.box is None:
        return activation, delta
    g, i, o = (slice(*ends) for ends in use.box)
    return activation[:, g, :, i], delta[:, :, g, :, o]


def _biases(uses: list[FoundUse], tape: Tape) -> dict[Piece, Route]:
    """The pieces that are added to a product which serves for nothing else, at one position; other sums are refused."""
    found: dict[Piece, Route] = {}
    routes = [use.route for use, _ in uses]
    for i, (use, _) in enumerate(uses):
        if use.where != "add":
            continue
        place = 0 if use.added_to is None else use.added_to
        weight, (g, t, _, o) = uses[place]
        alone = use.added_to is not None and tape.reads[place] == 1
        alone &= routes.count(use.route) == routes.count(weight.route) == 1
        alone &= not {use.piece, weight.piece} & set(tape.refused)
        if not alone or t > 1 or weight.box is not None or weight.where == "add" or weight.picked or weight.whole:
            tape.refused.setdefault(use.piece, "add")
            continue
        layout = replace(use.layout, steps=(*use.layout.steps[:-1], ("reshape", (g, 1, o))))
        uses[i] = (replace(use, layout=layout), (g, 1, 1, o))
        found[use.piece] = weight.route
    return found


def _window(leaves: list[jax.ShapeDtypeStruct], piece: Piece) -> Layout:
    return Layout(leaves[piece.leaf].shape, piece.steps)


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


def _mark(i: int, leaf: jax.ShapeDtypeStruct) -> Marks:
    usable = jnp.issubdtype(leaf.dtype, jnp.floating) and math.prod(leaf.shape) > 0
    return (Mark(i, (), leaf.shape),) if usable else ()


def rows(plan: Plan, params: PyTree, points: PyTree, roots: Array, *, centred: bool, always: bool = False) -> PyTree:
    """Rows √w_i ∂f(θ, x_i)/∂θ of a plan, shaped like params: (n·k, …) arrays, or factors where these are smaller.

    Args:
        plan: of f on params and one of the points.
        params: where to differentiate.
        points: the x_i on the leading axis, n of them.
        roots: √w_i, shape (n,) or (n, k); (n,) where `centred`.
        centred: take the mean with weights w out of the rows of each output.
        always: keep every leaf in factors that can be.
    """
    leaves, treedef = jax.tree.flatten(params)
    followed = plan.followed(always, centred)
    kept = [(place, use) for place, (use, _) in enumerate(plan.uses) if use.route in followed]
    whole = [i for i in range(len(leaves)) if i not in {piece.leaf for piece, _ in followed}]
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
        deltas = [jax.vmap(use.sensitivity)(delta) for (_, use), delta in zip(kept, deltas, strict=True)]
        return others, deltas, gradients

    try:
        others, deltas, gradients = jax.vmap(one)(points)
    except jax.errors.UnexpectedTracerError as error:
        raise BoundRuleError(BOUND) from error
    deltas, gradients = _tree.raised((deltas, gradients))
    others = [x if jnp.issubdtype(x.dtype, jnp.integer) else _tree.raised(x) for x in others]
    factors = [_cropped(use, x, delta) for (_, use), x, delta in zip(kept, others, deltas, strict=True)]
    built: dict[int, Any] = {}
    for i, gradient in zip(whole, gradients, strict=True):
        built[i] = _weighted(around_mean(gradient, roots)[1] if centred else gradient, roots)
    of_routes: dict[Route, OfPiece] = {}
    in_dtype = functools.cache(roots.astype)  # the same roots are known as such by their identity
    order = dict.fromkeys(use.route for _, use in kept)
    for route in sorted(order, key=lambda route: route[0] in plan.added_to and not route[1]):  # biases at the end
        places = [j for j, (_, use) in enumerate(kept) if use.route == route]
        pairs = [(x[:, None], delta) for x, delta in (factors[j] for j in places)]
        layout, weight = kept[places[0]][1].layout, plan.added_to.get(route[0])
        if weight is None or route[1]:
            of_routes[route] = _outer(plan, route, layout, pairs, in_dtype, centred)
        else:
            left = jnp.repeat(pairs[0][0], layout.shapes[-1][0] // pairs[0][0].shape[2], axis=2)
            of_routes[route] = of_routes[weight].beside(left, layout)  # type: ignore[union-attr]
    parts: dict[int, list[tuple[Layout, OfPiece]]] = {}
    for (piece, _), outer in of_routes.items():
        if piece.steps:
            parts.setdefault(piece.leaf, []).append((plan.window(piece), outer))
        else:
            built[piece.leaf] = outer
    built |= {i: Pieces.of(plan.leaves[i].shape, of_leaf) for i, of_leaf in parts.items()}
    return jax.tree.unflatten(treedef, [built[i] for i in range(len(leaves))])


def _outer(
    plan: Plan,
    route: Route,
    layout: Layout,
    pairs: list[tuple[Array, Array]],
    roots: Callable[[Any], Array],
    centred: bool,
) -> OfPiece:
    """The uses of a piece, one after the other along the positions."""
    orders = plan.orders(route)
    assert orders is not None
    sides = [pair[::-1] if exchanged else pair for pair, exchanged in zip(pairs, orders, strict=True)]
    left, right = (_along_positions([pair[side] for pair in sides]) for side in (0, 1))
    if route[1]:  # numbers times vectors: one position
        left, right = jnp.ones_like(left, shape=(*left.shape[:3], 1, 1)), jnp.sum(left * right, axis=3, keepdims=True)
    outer = Outer(left, right, layout, plan.k)
    if centred:
        return outer.centred(roots(outer.dtype))
    outer = outer.weighted(roots(outer.dtype))
    picked = plan.picked(route[0]) and not route[1]
    return Picked.of(outer.left[:, 0, :, :, 0], outer.right, layout) if picked else outer


def _along_positions(parts: list[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    k = max(part.shape[1] for part in parts)
    return jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:])) for x in parts], axis=3)


def _weighted(rows: Array, roots: Array) -> Array:
    rows = column(roots, rows.ndim).astype(rows.dtype) * rows
    return rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])


@dataclass(frozen=True)
class Captured:
    """What `capture` returns.

    Attributes:
        rows: like params; of each leaf the n·k rows of the Jacobian: factors (`operators.Outer`, `Picked`, `Pieces`),
            or an array (n·k, …).
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
            kind = "factors" if is_outer(row) else "rows"
            lines.append(f"{name} {self.plan.leaves[i].shape}: {kind}; {self.plan.described(i)}")
        return "\n".join(lines)


def capture(f: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], Captured]:
    """Activations and sensitivities of every product that a parameter enters, from any JAX function.

    The gradient of one output of one example in the weight W of y = xW is activation ⊗ sensitivity, x ⊗ ∂out/∂y, summed
    over the positions at which W is used. `capture` finds those products in the jaxpr of f: through jit, remat, vmap,
    scan, reshapes, slices, joins, casts and multiples by one number, matrix products, einsum, convolutions, and tables
    that are looked up (embeddings). A bias that is added to such a product, at one position, shares its sensitivities.
    A leaf with any other use has plain rows (scales of units always, for which they are the cheapest form). A flat
    vector of parameters, that f cuts into weights and biases, has rows for each piece.

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
