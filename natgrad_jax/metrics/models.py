"""Metrics of models: Gauss–Newton, least squares, and the pullback of any metric along any function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from natgrad_jax import _tree, operators
from natgrad_jax._tree import OneExample, PyTree, Space, concrete, leading_axis
from natgrad_jax.metrics.losses import Loss
from natgrad_jax.metrics.shared import (
    Form,
    HessianProduct,
    Metric,
    check_callable,
    check_real,
    check_real_outputs,
    check_scalar,
    check_weights,
    flat,
    nan_unless,
    one_each,
    outputs,
    pulled_back,
    rows_of,
    with_data_of,
)
from natgrad_jax.operators import Closed, Dense, Diagonal, Gram, Implicit, Operator, is_operator

Model = Callable[[PyTree, PyTree], PyTree]


def gauss_newton(
    model: Model,
    loss: Callable[[PyTree, PyTree], Array],
    *,
    jac: str = "auto",
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """Generalised Gauss–Newton, G = Σ_i J_iᵀ H_i J_i: J of the model's outputs, H the Hessian of a convex loss in them.

    For the losses of `metrics.losses` the root of H is in closed form, and G is the Fisher information of the
    distribution that the loss is the negative logarithm of (squares: unit variance). For any other loss H comes from
    automatic differentiation, k Hessian products, and its root from a k × k eigendecomposition for each example.

    Args:
        model: model(params, batch) -> outputs on the leading axis, an array (n, …) or a pytree of such; row by row what
            it gives for a batch of one.
        loss: one of `metrics.losses`, or loss(outputs, batch) -> scalar, a sum or a mean over the examples of a convex
            function of the outputs of each; the metric has the same normalisation.
        jac: "auto" (reverse, but for no more parameters than outputs), "rev" or "fwd".
        chunk_size: examples at a time: a `Dense` in place of n·k rows.
        matrix_free: an `Implicit`, for `cg`; the Hessian of any loss is then used as it is, also one that mixes the
            examples.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params, *, batch) -> operator. With a loss of `metrics.losses` it carries the residual of the gradient.
        Where n·k is not much larger than p, or units saturate, directions without curvature are left: damp by 1e-2 or
        more, or by `damping.trace`, which does not vanish with the curvature of a coordinate.

    Raises:
        ValueError: a loss that is not scalar, not convex, or not a sum over examples; outputs without a leading axis.
            Inside `jit` the last two cannot be read, and G is NaN.
        TypeError: complex parameters or outputs.

    Cost: k gradients of the outputs an example ("rev").

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> model = lambda w, batch: batch[0] @ w
        >>> metric = ng.metrics.gauss_newton(model, ng.metrics.losses.squares())
        >>> batch = jnp.array([[1.0], [3.0]]), jnp.array([0.0, 0.0])
        >>> round(float(metric(jnp.array([2.0]), batch=batch).dense()[0, 0]), 4)  # mean of x²
        5.0

    Reference: Schraudolph, "Fast curvature matrix-vector products" (2002), section 3; Martens, "New insights and
    perspectives on the natural gradient method" (2020), section 9.
    """
    check_callable(model, "model", "model(params, batch)")
    check_callable(loss, "loss", "loss(outputs, batch), such as losses.squares()")
    if getattr(loss, "__module__", None) == Loss.__module__ and not isinstance(loss, Loss):
        raise TypeError(f"loss: expected a loss, got what makes one; call it, losses.{loss.__name__}()")
    form, one = Form.of(jac, chunk_size, matrix_free, rows), OneExample(model, "model")

    def gauss_newton(params: PyTree, *, batch: PyTree) -> Gram | Dense | Implicit:
        n = leading_axis(batch, "batch")
        check_real(params)
        check_real_outputs(one, params, batch, "model")
        theta = _tree.raised(params)
        z = jax.lax.map(lambda x: one(theta, x), batch, batch_size=form.chunk_size or n)
        check_scalar(
            jax.eval_shape(loss, z, batch), "loss", "loss(outputs, batch) is a sum or a mean over the examples."
        )
        if isinstance(loss, Loss):
            root = jnp.full(n, (1 / n if loss.mean else 1) ** 0.5, Space.of(params).dtype)
            y = loss.targets_for(z, batch)
            e = None
            if form.chunk_size is None and not matrix_free:
                e = root[:, None] * outputs(lambda _, zy: loss.error(*zy), None, (z, y))
                # An e beyond the floats would explain no g; without it g alone is used.
                e = jnp.where(jnp.all(jnp.isfinite(e)), e, 0).reshape(-1).astype(root.dtype)
            return pulled_back(_Rooted(one, loss.root), params, (batch, z), root, form, residual=e)
        if matrix_free and chunk_size is None:
            hessian = Closed(Partial(HessianProduct(loss), z, (batch,), {}), None, Space.of(z))
            return Implicit(_AllOutputs(one), params, batch, inner_product=hessian)
        root, unit = _hessian_roots(loss, z, batch)
        return pulled_back(_Rooted(one, _times_root), params, (batch, root), unit, form)

    return gauss_newton


@dataclass(frozen=True)
class _Rooted:
    """(params, (x, z)) ↦ R(z) applied to the outputs for x: what to differentiate with z held."""

    model: Callable[[PyTree, PyTree], PyTree]
    root: Callable[[Any, PyTree], PyTree]

    def __call__(self, params: PyTree, point: tuple[PyTree, Any]) -> PyTree:
        x, z = point
        return self.root(z, self.model(params, x))


@dataclass(frozen=True)
class _AllOutputs:
    """(params, batch) ↦ the outputs of every example."""

    model: OneExample

    def __call__(self, params: PyTree, batch: PyTree) -> PyTree:
        return jax.vmap(lambda x: self.model(params, x))(batch)


def _times_root(root: Array, u: PyTree) -> Array:
    return root @ flat(u)


def _hessian_roots(loss: Callable[[PyTree, PyTree], Array], z: PyTree, batch: PyTree) -> tuple[Array, Array]:
    """R_i with R_iᵀR_i = H_i for each example, (n, k, k), and n ones that are NaN if there is no such thing."""
    n, z = leading_axis(z, "outputs"), _tree.raised(z)
    space = Space.of(jax.tree.map(lambda x: x[0], z))
    k, eps = space.size, float(jnp.finfo(space.dtype).eps)
    product = lambda z, u: jax.vmap(space.ravel)(  # noqa: E731
        HessianProduct(loss)(z, (batch,), {}, jax.vmap(space.unravel)(u))
    )
    blocks = lambda z: jnp.moveaxis(  # noqa: E731
        jax.vmap(lambda e: product(z, jnp.broadcast_to(e, (n, k))))(jnp.eye(k, dtype=space.dtype)), 0, -1
    )
    hessian = blocks(z)
    hessian = (hessian + jnp.swapaxes(hessian, -1, -2)) / 2
    # The units of each output, and its rounding: what is left of a saturated loss are differences of terms as large as
    # its curvature at 0.
    at_zero = jnp.nan_to_num(_diagonals(blocks(jax.tree.map(jnp.zeros_like, z))), posinf=0.0, neginf=0.0)
    largest = jnp.max(jnp.maximum(jnp.abs(_diagonals(hessian)), jnp.abs(at_zero)), axis=0)
    inverse = jnp.where(largest > 0, 1 / jnp.where(largest > 0, jnp.sqrt(largest), 1), 0)
    scaled = hessian * inverse[:, None] * inverse
    # Signs that no symmetry of the batch cancels: what the blocks do not explain comes from other examples.
    probe = jnp.cos(jnp.arange(1.0, n * k + 1, dtype=space.dtype)).reshape(n, k)
    explained = jnp.einsum("nij,nj->ni", scaled, probe)
    gap = jnp.abs(product(z, probe * inverse) * inverse - explained)
    # A NaN is neither: it goes on as a number does, and no step is taken.
    alone = ~jnp.any(gap > 4 * k * eps**0.5 * jnp.max(jnp.abs(probe)))
    flat_but_coupled = (largest == 0)[:, None] & jnp.any(hessian != 0, axis=0)
    convex = ~(jnp.any(jnp.linalg.eigvalsh(scaled)[:, 0] < -4 * k * eps**0.5) | jnp.any(flat_but_coupled))
    if concrete(alone) and not bool(alone):
        raise ValueError(
            "loss: expected a sum or a mean of a function of each example's outputs, but its Hessian couples the "
            "examples. Pass matrix_free=True, which uses the Hessian as it is."
        )
    if concrete(convex) and not bool(convex):
        raise ValueError(
            "loss: expected a convex function of the outputs, got a Hessian with a negative eigenvalue. Take the "
            "convex part, or metrics.monte_carlo_fisher."
        )
    return jax.vmap(_root)(hessian), jnp.broadcast_to(nan_unless(alone & convex, space.dtype), (n,))


def _diagonals(matrices: Array) -> Array:
    return jnp.diagonal(matrices, axis1=-2, axis2=-1)


@jax.custom_jvp
def _root(matrix: Array) -> Array:
    """R with RᵀR = matrix, the positive semi-definite part of it, by eigenvectors of unit-diagonal scale."""
    return _rooted(matrix)[0]


def _rooted(matrix: Array) -> tuple[Array, Array]:
    """R, and its pseudo-inverse transposed."""
    scale = _tree.root(jnp.maximum(jnp.diagonal(matrix), 0))
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    values, vectors = jnp.linalg.eigh(matrix * inverse[:, None] * inverse)
    cut = values.size * jnp.finfo(matrix.dtype).eps * jnp.max(values, initial=0.0)
    root = jnp.sqrt(jnp.where(values <= cut, 0, values))
    return root[:, None] * vectors.T * scale, jnp.where(root == 0, 0, 1 / root)[:, None] * vectors.T * inverse


@_root.defjvp
def _root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """dR = R⁺ᵀ(dH − ½ dH P), P the projector on the range: RᵀdR + dRᵀR = dH, all that the metric sees of R.

    The derivative of eigenvectors would divide by differences of eigenvalues, which are 0 for H = 1.
    """
    (matrix,), (change,) = primals, tangents
    root, inverse = _rooted(matrix)
    return root, inverse @ (change - 0.5 * change @ (inverse.T @ root))


def least_squares(
    residuals: Any,
    weights: Any = None,
    *,
    jac: str = "auto",
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """Gauss–Newton of L = Σ_t ½ c_t ‖r_t(θ)‖²: rows √c ∂r/∂θ, and with them the residual √c r of ∇L.

    Value, gradient and rows come from one pass: see `value_and_grad`.

    Args:
        residuals: residuals(params, batch) -> r on the leading axis, an array (n, …) or a pytree of such, row by row
            what it gives for a batch of one; or a list or dictionary of such terms, each with a batch of its own.
        weights: c ≥ 0, a number, or for each term a number or (n,) for its examples; 1 when left out.
        jac: "auto", "rev" or "fwd".
        chunk_size: examples at a time: a `Dense`, without the residual, in place of the rows.
        matrix_free: products alone, for `cg`.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params, *, batch, weights=None) -> operator, a sum over examples (weights=1/n for a mean). `batch` has
        one batch for each term, in the same list or dictionary; `weights` replaces the ones above.

    Raises:
        ValueError: batches or weights that do not match the terms, negative weights.

    Cost: k gradients an example for r of k numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.least_squares(lambda w, batch: batch[0] * w - batch[1])
        >>> G = metric(jnp.array(1.0), batch=(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])))
        >>> [float(x) for x in (G.dense()[0, 0], *ng.metrics.value_and_grad(G))]
        [5.0, 2.5, 5.0]

    Reference: Nocedal, Wright, "Numerical optimization" (2006), section 10.3.
    """
    form = Form.of(jac, chunk_size, matrix_free, rows)
    terms, treedef = jax.tree.flatten(residuals, is_leaf=callable)
    if not terms or not all(map(callable, terms)):
        raise ValueError(f"residuals: expected residuals(params, batch) or a list or dict of such, got {residuals!r}")
    single = callable(residuals)
    ones = [OneExample(term, "residuals") for term in terms]
    given = weights

    def least_squares(params: PyTree, *, batch: PyTree, weights: Any = None) -> Operator:
        check_real(params)
        batches = one_each(treedef, batch, "batch")
        chosen = given if weights is None else weights
        shared = single or not isinstance(chosen, dict | list | tuple)
        factors = [chosen] * len(terms) if shared else one_each(treedef, chosen, "weights")
        parts = zip(ones, batches, factors, strict=True)
        return operators.add(*(_term(one, params, data, c, form) for one, data, c in parts))

    return least_squares


def _term(one: OneExample, params: PyTree, batch: PyTree, weight: Any, form: Form) -> Operator:
    n = leading_axis(batch, "batch")
    check_real_outputs(one, params, batch, "residuals")
    dtype = Space.of(params).dtype
    weight = 1.0 if weight is None else weight
    check_weights(weight, ((), (n,)), "weights")
    weight = jnp.asarray(weight, dtype)
    root = jnp.broadcast_to(_tree.root(weight), (n,))
    e = None
    if form.chunk_size is None and not form.matrix_free:
        e = (root[:, None] * outputs(one, _tree.raised(params), batch)).reshape(-1).astype(dtype)
    return pulled_back(one, params, batch, root, form, residual=e)


def value_and_grad(operator: Gram) -> tuple[Array, PyTree]:
    """½‖e‖² and Aᵀe from the rows A and the residual e of an operator: the objective of `least_squares`, ∇ included.

    For operators of `gauss_newton` and `empirical_fisher` the gradient is that of the loss, and the value is not.

    Args:
        operator: a `Gram` with a residual.

    Returns:
        (value, gradient); the gradient is shaped like the parameters, in the dtype of the rows.

    Cost: one pass over the rows, O(np).

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> G = ng.operators.Gram(jnp.array([[2.0], [0.0]]), residual=jnp.array([3.0, 4.0]))
        >>> value, gradient = ng.metrics.value_and_grad(G)
        >>> float(value), gradient.tolist()
        (12.5, [6.0])
    """
    if not isinstance(operator, Gram) or operator.residual is None:
        raise TypeError(
            f"operator: expected rows with a residual, got {type(operator).__name__}. "
            "metrics.least_squares makes them, without chunk_size and matrix_free."
        )
    return 0.5 * jnp.sum(jnp.square(jnp.abs(operator.residual))), operator.transposed_times(operator.residual)


def pullback(f: Callable[..., PyTree], inner: Any = None, *, jac: str = "auto", matrix_free: bool = False) -> Metric:
    """The metric of your own: G = JᵀHJ, the length H of the change of f(θ).

    f(θ) may be anything whose change you can measure: predictions at points of interest, moments, 2√q (whose flat
    metric is the Fisher information, also where probabilities are zero), the fields of a physical model.

    Args:
        f: f(params) -> pytree of real outputs; its keyword-only parameters name data, which the metric takes too.
        inner: H: None for the identity; a matrix (k, k) in `ravel_pytree` order of the outputs; an operator on them; or
            a metric on the space of the outputs, metric(outputs) -> operator.
        jac: "auto" (reverse, but for no more parameters than outputs), "rev" or "fwd".
        matrix_free: an `Implicit`, for `cg`: one forward and one reverse pass a product.

    Returns:
        metric(params, **data) -> `Gram` of k rows (H kept as its root), or `Implicit`.

    Raises:
        ValueError: an H that does not fit the outputs, or is not positive semi-definite (NaN inside `jit`).

    Cost: k reverse or p forward passes of f.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> amplitudes = lambda t: 2 * jnp.array([jnp.cos(t / 2), jnp.sin(t / 2)])  # twice √q of two outcomes
        >>> round(float(ng.metrics.pullback(amplitudes)(jnp.array(0.0)).dense()[0, 0]), 4)  # where one never happens
        1.0
    """
    check_callable(f, "f", "f(params)")
    form = Form.of(jac, None, matrix_free)

    def pullback(params: PyTree, **data: PyTree) -> Gram | Implicit:
        check_real(params)
        check_real_outputs(lambda theta, _: f(theta, **data), params, (), "f")
        theta = _tree.raised(params)
        length = _on_outputs(inner, jax.eval_shape(f, theta, **data), lambda: f(theta, **data))
        if matrix_free or not isinstance(length, Diagonal | Dense | Gram | None):
            return Implicit(_Called(f), params, data, inner_product=length)
        root = _root_map(length)
        return Gram(rows_of(lambda t: flat(root(f(t, **data))), theta, form.jac))

    return with_data_of(f, pullback)


@dataclass(frozen=True)
class _Called:
    """(params, data) ↦ f(params, **data)."""

    f: Callable[..., PyTree]

    def __call__(self, params: PyTree, data: dict[str, PyTree]) -> PyTree:
        return self.f(params, **data)


def _on_outputs(inner: Any, out: PyTree, value: Callable[[], PyTree]) -> Operator | None:
    """H as an operator on the outputs, or None for the identity."""
    space = Space.of(out)
    if inner is None:
        return None
    if callable(inner) and not is_operator(inner):
        inner = inner(value())
    if not is_operator(inner):
        matrix = jnp.asarray(inner, space.dtype)
        if matrix.shape == (space.size, space.size):
            matrix = (matrix + matrix.T) / 2
        else:
            raise ValueError(
                f"inner: expected a matrix of shape {(space.size, space.size)} for outputs of {space.size} numbers, "
                f"got {matrix.shape}"
            )
        inner = Dense(matrix, space)
    if isinstance(inner, Dense):
        fine = _is_positive(inner.dense())
        if concrete(fine) and not bool(fine):
            raise ValueError("inner: expected a positive semi-definite matrix, got one with a negative eigenvalue")
        inner = Dense(jnp.where(fine, inner.dense(), jnp.nan), inner.space)
    if isinstance(inner, Diagonal) and any(
        concrete(leaf) and np.any(np.asarray(leaf) < 0) for leaf in jax.tree.leaves(inner.entries)
    ):
        raise ValueError("inner: expected entries ≥ 0 of a Diagonal, got some that are negative")
    if inner.space.size == space.size and inner.space.treedef == Space.of(jnp.zeros(space.size)).treedef:
        return _on_flat(inner, space)
    if (inner.space.treedef, inner.space.shapes) != (space.treedef, space.shapes):
        raise ValueError(f"inner: expected an operator on the outputs of f, {space}, got one on {inner.space}")
    return inner


def _is_positive(matrix: Array) -> Array:
    """Whether no eigenvalue is negative, beyond rounding in the units of the diagonal; true for NaN."""
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(matrix)))
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    values = jnp.linalg.eigvalsh(matrix * inverse[:, None] * inverse)
    dead = (scale == 0)[:, None] & (matrix != 0)
    return ~(jnp.any(values < -(jnp.finfo(matrix.dtype).eps ** 0.5)) | jnp.any(dead))


def _on_flat(operator: Operator, space: Space) -> Operator:
    """An operator on flat vectors, on vectors of `space`."""
    if operator.space.shapes == space.shapes and operator.space.treedef == space.treedef:
        return operator
    match operator:
        case Diagonal():
            return Diagonal(space.unravel(operator.entries))
        case Dense():
            return Dense(operator.matrix, space)
        case Gram():
            return Gram(jax.vmap(space.unravel)(operator.rows))
    raise TypeError(f"inner: expected an operator on the outputs, {space}, got one on {operator.space}")


def _root_map(length: Operator | None) -> Callable[[PyTree], PyTree]:
    """u ↦ Ru with RᵀR = H."""
    match length:
        case Diagonal():
            return lambda u: jax.tree.map(lambda d, x: _tree.root(d) * x, length.entries, u)
        case Gram():
            return length.times
        case Dense():
            root = _root(length.dense())
            return lambda u: root @ length.space.ravel(u)
    return lambda u: u
