"""Iterations that end at different times: one at a time, or a thousand in lanes that are refilled.

Under `vmap` a `while_loop` runs every problem until the last one ends. Here `vmap` over N problems becomes W lanes:
when the problem in a lane ends, the next one that waits takes its place. The work is that of the steps that are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from natgrad_jax._tree import PyTree, where

LANES = 64  # on a CPU, whose caches they fit; other devices are filled by all problems at once


@dataclass(frozen=True)
class Iteration:
    """begin(args) -> state, step(args, state) -> state, unfinished(args, state), end(args, state), row(state): kept.

    The state counts its steps in `count`, at most `max_steps`.
    """

    begin: Callable[[PyTree], Any]
    step: Callable[[PyTree, Any], Any]
    unfinished: Callable[[PyTree, Any], Array]
    row: Callable[[Any], PyTree]
    end: Callable[[PyTree, Any], PyTree]
    max_steps: int


def run(iteration: Iteration, args: PyTree) -> tuple[PyTree, PyTree]:
    """What `end` makes of the last state, and the rows that were kept, (max_steps, …), NaN or 0 after the last."""
    call = custom_vmap(lambda args: alone(iteration, args))

    @call.def_vmap
    def together(axis_size: int, in_batched: Any, args: PyTree) -> Any:
        outputs = _in_lanes(iteration, axis_size, in_batched[0], args)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return call(args)


def alone(iteration: Iteration, args: PyTree) -> tuple[PyTree, PyTree]:
    """The same for one problem; under `vmap` every lane waits for the slowest, but closures may hold its tracers."""
    state = iteration.begin(args)
    table = _empty(iteration, state, ())

    def advance(carry: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
        state, table = carry
        new = iteration.step(args, state)
        return new, jax.tree.map(lambda rows, x: rows.at[state.count].set(x), table, iteration.row(new))

    state, table = jax.lax.while_loop(lambda carry: iteration.unfinished(args, carry[0]), advance, (state, table))
    return iteration.end(args, state), table


def _empty(iteration: Iteration, state: Any, lead: tuple[int, ...]) -> PyTree:
    """No rows yet: NaN for scalars, the history, and 0 for the rest."""
    shapes = jax.eval_shape(iteration.row, state)
    filled = lambda s: jnp.full((*lead, iteration.max_steps, *s.shape), 0 if s.shape else jnp.nan, s.dtype)  # noqa: E731
    return jax.tree.map(filled, shapes)


def _in_lanes(iteration: Iteration, n: int, batched: PyTree, args: PyTree) -> tuple[Any, PyTree]:
    """All n problems, in lanes. `place` says which problem each lane holds, n for none."""
    width = min(n, LANES) if jax.default_backend() == "cpu" else n
    pick = lambda i: jax.tree.map(lambda x, many: x[i] if many else x, args, batched)  # noqa: E731
    begin = lambda i: iteration.begin(pick(i))  # noqa: E731
    starts = jax.lax.map(lambda i: _pack(begin(i)), jnp.arange(n), batch_size=width)
    unpack = _unpacker(jax.eval_shape(begin, 0))
    at = lambda tree, places: jax.tree.map(lambda x: x[jnp.minimum(places, n - 1)], tree)  # noqa: E731

    def one(place: Array, state: Any) -> tuple[Any, PyTree, Array]:
        own = pick(jnp.minimum(place, n - 1))
        new = iteration.step(own, state)
        going = iteration.unfinished(own, new)
        return new, iteration.row(new), going

    def advance(carry: Any) -> Any:
        place, waiting, state, results, table = carry
        new, rows, going = jax.vmap(one)(place, state)
        write = lambda rows, x: rows.at[place, state.count].set(x, mode="drop")  # noqa: E731
        table = jax.tree.map(write, table, rows)
        packed = jax.vmap(_pack)(new)
        results = jax.tree.map(lambda rows, x: rows.at[place].set(x, mode="drop"), results, packed)
        ended = ~going & (place < n)
        following = waiting + jnp.cumsum(ended) - 1
        place = jnp.where(ended, jnp.minimum(following, n), place)
        state = jax.vmap(where)(ended, jax.vmap(unpack)(at(starts, place)), new)
        return place, waiting + jnp.sum(ended), state, results, table

    place = jnp.arange(width)
    first = jax.vmap(unpack)(jax.tree.map(lambda x: x[:width], starts))
    table = _empty(iteration, jax.tree.map(lambda x: x[0], first), (n,))
    going = lambda carry: jnp.any(carry[0] < n)  # noqa: E731
    carry = (place, jnp.asarray(width), first, starts, table)
    results, table = jax.lax.while_loop(going, advance, carry)[3:]
    ends = lambda i: iteration.end(pick(i), unpack(at(results, i)))  # noqa: E731
    return jax.lax.map(ends, jnp.arange(n), batch_size=width), table


def _pack(state: PyTree) -> dict[str, Array]:
    """All leaves of a dtype in one vector: a gather or a scatter by lane costs a loop over the lanes for each array."""
    kinds: dict[str, list[Array]] = {}
    for leaf in jax.tree.leaves(state):
        leaf = leaf.astype(jnp.int32) if leaf.dtype == bool else leaf
        kinds.setdefault(str(leaf.dtype), []).append(jnp.ravel(leaf))
    return {kind: jnp.concatenate(leaves) for kind, leaves in kinds.items()}


def _unpacker(shapes: PyTree) -> Callable[[dict[str, Array]], PyTree]:
    """The inverse of `_pack`, for a state of these shapes."""

    def unpack(packed: dict[str, Array]) -> PyTree:
        used = dict.fromkeys(packed, 0)
        leaves = []
        for shape in jax.tree.leaves(shapes):
            kind = "int32" if shape.dtype == bool else str(shape.dtype)
            flat = packed[kind][used[kind] : used[kind] + shape.size]
            used[kind] += shape.size
            leaves.append(flat.reshape(shape.shape).astype(shape.dtype))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return unpack
