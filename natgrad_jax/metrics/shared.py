"""What metrics share: Jacobian rows of a function of one example, and what may be wrong with an argument."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree, layers
from natgrad_jax._tree import PyTree, Space, chunked_sum, concrete, is_complex, leading_axis
from natgrad_jax.operators import Dense, Gram, Implicit

Metric = Callable[..., Any]
OfOne = Callable[[PyTree, PyTree], PyTree]  # f(params, one example) -> k numbers, in a pytree

# Rows of k outputs: up to this many parameters for each of them forward mode is no slower than reverse.
# `python -m benchmarks jacobian`
FORWARD_UP_TO = 1


class Form(NamedTuple):
    """How a Jacobian becomes an operator: mode of differentiation, examples at a time, products alone, layer rows."""

    jac: str
    chunk_size: int | None
    matrix_free: bool
    rows: str = "auto"

    @classmethod
    def of(
        cls, jac: str = "auto", chunk_size: int | None = None, matrix_free: bool = False, rows: str = "auto"
    ) -> "Form":
        """The options, checked."""
        if rows not in ("auto", "layers", "plain"):
            raise ValueError(f"rows: expected 'auto', 'layers' or 'plain', got {rows!r}")
        if rows == "layers" and (chunk_size is not None or matrix_free or jac != "auto"):
            raise ValueError("rows: 'layers' are rows, by reverse mode; leave out chunk_size, matrix_free and jac")
        if jac not in ("auto", "fwd", "rev"):
            raise ValueError(f"jac: expected 'auto', 'fwd' or 'rev', got {jac!r}")
        if chunk_size is not None and not (isinstance(chunk_size, int | np.integer) and chunk_size >= 1):
            raise ValueError(f"chunk_size: expected a positive number of points or None, got {chunk_size!r}")
        return cls(jac, chunk_size, matrix_free, rows)


def pulled_back(
    f: OfOne,
    params: PyTree,
    points: PyTree,
    roots: Array,
    form: Form,
    *,
    centre: int | None = None,
    residual: Array | None = None,
) -> Gram | Dense | Implicit:
    """G = Σ_i w_i J_iᵀJ_i for J_i = ∂f(θ, x_i)/∂θ, in the form that was asked for; n·k rows √w_i J_i.

    Args:
        f: f(params, x) for one x -> a pytree of k numbers.
        params: where to differentiate.
        points: the x_i on the leading axis, n of them.
        roots: √w_i, shape (n,), or (n, k) with one for each output.
        form: rows; with `chunk_size` the matrix, with `matrix_free` products alone.
        centre: take the weighted mean out of the rows before anything is contracted: 0, that over the points, or 1,
            that over the outputs of each.
        residual: e, shape (n·k,), for the g = Aᵀe that is likely to be solved for.
    """
    n = leading_axis(points, "points")
    if centre == 1:
        k = jax.eval_shape(lambda theta, x: flat(f(theta, x)), params, one_of(points)).size
        roots = jnp.broadcast_to(_by_example(roots), (n, k))
    if form.matrix_free:
        if centre == 0 and form.chunk_size is not None:
            raise ValueError("chunk_size: products of centred rows see all samples at once; leave it out")
        return Implicit(_Outputs(f, centre), params, (points, roots), chunk_size=form.chunk_size)
    theta = _tree.raised(params)
    factored = _layer_rows(f, theta, points, roots, form, centre)
    if factored is not None:
        return Gram(factored, residual)
    common = _common(f, theta, points, roots, form) if centre == 0 else None
    plain = lambda data: _rows(f, theta, data, form.jac, centre, common)  # noqa: E731
    if form.chunk_size is None:
        return Gram(plain((points, roots)), residual if jax.tree.leaves(theta) else None)
    gram = lambda data: Gram(plain(data)).dense()  # noqa: E731
    return Dense(chunked_sum(gram, (points, roots), min(form.chunk_size, n)), Space.of(params))


def _layer_rows(f: OfOne, theta: PyTree, points: PyTree, roots: Array, form: Form, centre: int | None) -> PyTree | None:
    """The rows in factors, where that is asked for or, by their shapes, smaller; else None."""
    if form.rows == "plain" or form.jac != "auto" or form.chunk_size is not None:
        return None
    n, leaves = leading_axis(points, "points"), jax.tree.leaves(theta)
    out = jax.eval_shape(lambda theta, x: flat(f(theta, x)), theta, one_of(points))
    real = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (out, *leaves))
    if form.rows == "layers" and (centre == 1 or not real):
        raise ValueError(
            "rows: 'layers' are for real parameters and outputs, and not for draws that are centred for each input; "
            "expected 'auto' or 'plain' here"
        )
    pays = n * out.size < sum(x.size for x in leaves)
    if centre == 1 or not real or (form.rows == "auto" and not pays):
        return None
    try:
        plan = layers.Plan.of(f, theta, one_of(points))
        if form.rows == "layers" or plan.followed():
            return layers.rows(plan, theta, points, roots, centred=centre == 0, always=form.rows == "layers")
    except layers.BoundRuleError:
        if form.rows == "layers":
            raise
    return None


Common = tuple[PyTree, PyTree]


def _rows(
    f: OfOne, theta: PyTree, data: tuple[PyTree, Array], jac: str, centre: int | None, common: Common | None
) -> PyTree:
    """The rows of all (points, roots), k after k, shaped like the parameters."""
    points, roots = data
    rows = jax.vmap(lambda x: rows_of(lambda t: flat(f(t, x)), theta, jac))(points)
    if centre is not None:
        # Centred first, weighted then: the rounding of a large common part stays in the common part.
        first, shift = common or _common_to_outputs(rows, roots)
        rows = jax.tree.map(lambda x, y, m: (x - y) - m, rows, first, shift)
    weighted = lambda x: _as_rows(roots, x) * x  # noqa: E731
    return jax.tree.map(lambda x: jnp.reshape(weighted(x), (x.shape[0] * x.shape[1], *x.shape[2:])), rows)


def _common(f: OfOne, theta: PyTree, points: PyTree, roots: Array, form: Form) -> Common:
    """What is taken out of every row: the row of largest weight, and how far the mean is from it.

    In two steps, so that a column of equal numbers becomes 0: rounding that is left there would pass for curvature. The
    mean costs a gradient, and so does the same sum over copies of that one point, whose rounding it shares.
    """
    weights = jnp.square(roots) / jnp.sum(jnp.square(roots), axis=0)
    first = jax.tree.map(lambda x: jnp.asarray(x)[jnp.argmax(roots)][None], points)

    def total(copied: Array) -> PyTree:
        def part(theta: PyTree, data: tuple[PyTree, Array]) -> Array:
            seen = jax.tree.map(lambda x, y: jnp.where(copied, y, x), data[0], first)
            return jnp.sum(_by_example(data[1]) * outputs(f, theta, seen), axis=0)

        whole = lambda theta: chunked_sum(lambda data: part(theta, data), (points, weights), form.chunk_size)  # noqa: E731
        return rows_of(whole, theta, form.jac)

    # A loop, so that one and the same compiled sum serves both.
    shift = jax.tree.map(lambda x: x[:1] - x[1:], jax.lax.map(total, jnp.array([False, True])))
    return jax.vmap(lambda x: rows_of(lambda t: flat(f(t, x)), theta, form.jac))(first), shift


def _common_to_outputs(rows: PyTree, roots: Array) -> Common:
    """The same for the outputs of each point, in the rows (n, k, …) themselves."""
    weights = jnp.square(roots) / jnp.sum(jnp.square(roots), axis=1, keepdims=True)
    first = jax.tree.map(lambda x: _heaviest(x, roots, 1), rows)
    mean = lambda x, y: jnp.sum(_as_rows(weights, x) * (x - y), axis=1, keepdims=True)  # noqa: E731
    return first, jax.tree.map(mean, rows, first)


def _heaviest(x: Array, roots: Array, axis: int) -> Array:
    """Along an axis of (n, k, …), which is kept, the entry of largest weight: one that the mean is not far from."""
    place = jnp.argmax(_by_example(roots), axis=axis, keepdims=True)
    return jnp.take_along_axis(x, jnp.reshape(place, place.shape + (1,) * (x.ndim - 2)), axis=axis)


def _as_rows(roots: Array, rows: Array) -> Array:
    """(n,) or (n, k), ready to multiply (n, k, …), in its dtype."""
    return jnp.reshape(roots, roots.shape + (1,) * (rows.ndim - roots.ndim)).astype(rows.dtype)


def rows_of(g: Callable[[PyTree], Array], theta: PyTree, jac: str) -> PyTree:
    """∂g/∂θ, (k, …) in the place of each leaf."""
    out = jax.eval_shape(g, theta)
    (k,), p = out.shape, sum(x.size for x in jax.tree.leaves(theta))
    if p == 0:
        return jax.tree.map(lambda x: jnp.zeros((k, *x.shape), x.dtype), theta)
    if jac == "fwd" or (jac == "auto" and p <= FORWARD_UP_TO * k):
        rows = jax.jacfwd(g, holomorphic=is_complex(out.dtype))(theta)
        # In the dtype of the parameters, as reverse mode has them, whatever the data make of the outputs.
        return _tree.cast_like(rows, theta)
    _, pull = jax.vjp(g, theta)
    if k == 1:
        return jax.tree.map(lambda x: x[None], pull(jnp.ones(1, out.dtype))[0])
    return jax.vmap(lambda u: pull(u)[0])(jnp.eye(k, dtype=out.dtype))


@dataclass(frozen=True)
class _Outputs:
    """(params, (points, roots)) ↦ the outputs whose Jacobian the rows are; equal for equal f, so it compiles once."""

    f: OfOne
    centre: int | None

    def __call__(self, params: PyTree, data: tuple[PyTree, Array]) -> Array:
        points, roots = data
        out, roots = outputs(self.f, params, points), _by_example(roots)
        if self.centre is not None:
            weights = jnp.square(roots)
            out = out - _heaviest(out, roots, self.centre)
            mean = jnp.sum(weights * out, axis=self.centre, keepdims=True)
            out = out - mean / jnp.sum(weights, axis=self.centre, keepdims=True)
        return roots.astype(out.dtype) * out


def outputs(f: OfOne, params: PyTree, points: PyTree) -> Array:
    """f(params, x_i) for every i as one array, (n, k)."""
    return jax.vmap(lambda point: flat(f(params, point)))(points)


def flat(tree: PyTree) -> Array:
    """The numbers in `tree`, in a row."""
    return _tree.ravel(tree)


def _by_example(roots: Array) -> Array:
    return roots[:, None] if roots.ndim == 1 else roots


@dataclass(frozen=True)
class HessianProduct:
    """(x, more, named, v) ↦ ∇²φ v, for φ(x, *more, **named)."""

    potential: Callable[..., Array]

    def __call__(self, x: PyTree, more: tuple[PyTree, ...], named: dict[str, PyTree], v: PyTree) -> PyTree:
        """∇²φ v, by forward over reverse mode."""
        gradient = jax.grad(lambda x: self.potential(x, *more, **named))
        return jax.jvp(gradient, (x,), (_tree.cast_like(v, x),))[1]


def one_each(treedef: Any, tree: PyTree, name: str) -> list[PyTree]:
    """What `tree` has in the place of each term; a `ValueError` if it has another structure."""
    try:
        return list(treedef.flatten_up_to(tree))
    except ValueError as error:
        expected = jax.tree.unflatten(treedef, ["…"] * treedef.num_leaves)
        raise ValueError(
            f"{name}: expected one for each term, as {expected}, got {type(tree).__name__} "
            f"{jax.tree.map(jnp.shape, tree)}"
        ) from error


def with_data_of(f: Callable[..., Any], metric: Metric) -> Metric:
    """`metric`, which forwards its keyword-only arguments to f, with those of f in its signature."""
    first, *rest = inspect.signature(f).parameters.values()
    for p in rest:
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty:
            name = getattr(f, "__name__", "f")
            raise TypeError(
                f"{p.name}: expected data as keyword-only parameters, whose names `update` forwards; write "
                f"def {name}({first.name}, *, {p.name})"
            )
    named = [p for p in inspect.signature(f).parameters.values() if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    metric.__signature__ = inspect.Signature([params, *named])  # type: ignore[attr-defined]
    return metric


def check_callable(f: Any, name: str, call: str) -> None:
    """Raise unless f is a function."""
    if not callable(f) or isinstance(f, type):
        raise TypeError(f"{name}: expected a function {call}, got {type(f).__name__}: {str(f)[:60]}")


def one_of(points: PyTree) -> PyTree:
    """Shape and dtype of one of the points."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), points)


def check_real(params: PyTree) -> None:
    """Raise unless the parameters are real floating point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)}: expected real floating-point numbers, "
                f"got {jnp.result_type(leaf)}. Convert with jnp.asarray(x, float); write a complex number as two."
            )


def check_log_prob(log_prob: Callable[..., Array], params: PyTree, *points: PyTree) -> None:
    """Raise unless the parameters are real floating point and log_prob(params, x) is a real scalar for one x."""
    check_real(params)
    check_scalar(
        jax.eval_shape(log_prob, params, *map(one_of, points)),
        "log_prob",
        "It takes one point of the support (and one input), without the leading axis; sum over the components of x.",
    )


def check_scalar(out: Any, name: str, cure: str) -> None:
    """Raise unless `out`, an array or its shape, is one real number."""
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: expected a real scalar, got shape {shape}, dtype {dtype}. {cure}")


def check_real_outputs(f: OfOne, params: PyTree, points: PyTree, name: str) -> Any:
    """The shapes of what f gives for one point; raise unless they are real numbers."""
    out = jax.eval_shape(f, params, one_of(points))
    for leaf in jax.tree.leaves(out):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name}: expected real floating-point outputs, got {leaf.dtype}. Return the real and the imaginary "
                "part of a complex number as two."
            )
    return out


def check_no_nan(tree: PyTree, name: str) -> None:
    """Raise if a NaN can be seen in `tree`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if concrete(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and np.isnan(np.asarray(leaf)).any():
            raise ValueError(f"{name}{jax.tree_util.keystr(path)}: expected numbers, got NaN; drop those points")


def check_weights(weights: Any, shapes: tuple[tuple[int, ...], ...], name: str) -> None:
    """Raise unless the weights have one of the shapes, and none of them can be seen to be negative or NaN."""
    if jnp.shape(weights) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected shape {expected}, one number for each point, got {jnp.shape(weights)}")
    if concrete(weights) and not np.all(np.asarray(weights) >= 0):
        raise ValueError(f"{name}: expected numbers ≥ 0, got a smallest one of {np.min(weights)}")


def nan_unless(fine: Array, dtype: Any) -> Array:
    """1 where `fine`, else NaN: multiplies what must not be used."""
    return jnp.where(fine, 1, jnp.nan).astype(dtype)
