"""Metrics by formula: characteristic scales, relative changes of a matrix, a Hessian, a quasi-diagonal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from natgrad_jax import _tree
from natgrad_jax._tree import PyTree, Space, accumulator, concrete
from natgrad_jax.metrics.shared import HessianProduct, Metric, check_callable, check_real, check_scalar, with_data_of
from natgrad_jax.operators import Closed, Dense, Diagonal, Gram


def scales(s: PyTree, *, positive: PyTree = False) -> Metric:
    """Characteristic scales: g_ii = s_i⁻², so that a step of one scale has length one in every coordinate.

    For a positive parameter the natural coordinate is its logarithm, and s_i a ratio: g_ii = (s_i θ_i)⁻².

    Args:
        s: pytree of positive scales in the units of the parameters, or a prefix of the parameters' pytree (a bare
            number is one scale for all).
        positive: booleans, a pytree like `s` or a prefix of it: True where the parameter is positive and s the scale of
            its logarithm. To first order only: keep the parameter positive, or write it as exp.

    Returns:
        metric(params) -> `Diagonal`.

    Raises:
        ValueError: a scale that is not positive, or that does not broadcast to its parameter; a parameter that is said
            to be positive and is not.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.scales({"length": 2.0, "time": 0.5})
        >>> metric({"length": jnp.array(1.0), "time": jnp.array(1.0)}).entries["time"].item()
        4.0
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(s):
        if concrete(leaf) and not np.all(np.asarray(leaf) > 0):
            raise ValueError(f"s{jax.tree_util.keystr(path)}: expected positive scales, got {leaf}")
    flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), positive, s)

    def scales(params: PyTree) -> Diagonal:
        def entries(scale: Any, flag: Any, subtree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: _inverse_square(jnp.asarray(scale), x, flag), subtree)

        return Diagonal(jax.tree.map(entries, s, flags, params))

    return scales


def _inverse_square(scale: Array, x: Array, positive: bool) -> Array:
    try:
        full = jnp.broadcast_to(scale, jnp.shape(x))
    except ValueError as error:
        raise ValueError(
            f"s: a scale of shape {scale.shape} does not fit a parameter of shape {jnp.shape(x)}"
        ) from error
    full = full.astype(accumulator(_tree.real_dtype(jnp.result_type(float, x))))
    if positive:
        if concrete(x) and np.any(np.asarray(x) <= 0):
            raise ValueError(f"positive: expected parameters > 0, got a smallest one of {np.min(x)}")
        full = full * x
    return jnp.square(1 / full)


def relative(params: PyTree) -> Closed:
    """Relative changes of a matrix, ‖dW W⁻¹‖²: the metric that does not see an invertible W multiplied from the right.

        G V = V W⁻¹W⁻ᵀ,    G⁻¹g = g WᵀW

    With it, independent component analysis from any mixing matrix follows the same trajectory (it is equivariant).

    Args:
        params: W, an invertible real (d, d), or a pytree of such; relative is itself the metric.

    Returns:
        `Closed`, dimensionless. Cost O(d³).

    Raises:
        ValueError: a leaf that is not a square matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> W = jnp.diag(jnp.array([2.0, 0.1]))
        >>> G = ng.metrics.relative(W)
        >>> [round(float(x), 4) for x in jnp.diag(G.solve(jnp.eye(2)))]
        [4.0, 0.01]

    Reference: Cardoso, Laheld, "Equivariant adaptive source separation" (1996), section III; Amari (1998), section 7.
    """
    check_real(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.ndim(leaf) != 2 or leaf.shape[0] != leaf.shape[1]:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)}: expected a square matrix, got shape {jnp.shape(leaf)}"
            )
    raised = _tree.raised(params)
    return Closed(Partial(_relative_product, raised), Partial(_relative_solve, raised), Space.of(params))


def _relative_product(params: PyTree, v: PyTree) -> PyTree:
    def product(w: Array, x: Array) -> Array:
        right = jnp.linalg.solve(w.T, x.T)  # (V W⁻¹)ᵀ
        return jnp.linalg.solve(w, right).T

    return jax.tree.map(product, params, v)


def _relative_solve(params: PyTree, g: PyTree) -> PyTree:
    return jax.tree.map(lambda w, x: x @ w.T @ w, params, g)


def hessian(potential: Callable[..., Array], *, matrix_free: bool = False) -> Metric:
    """The Hessian of a convex function: the metric of mirror descent, G = ∇²φ(θ).

    With φ the log-partition function of an exponential family in natural parameters it is the Fisher information. It is
    not checked that φ is convex: `cholesky` says `converged=False` where G is not positive, `eigh` cuts it off.

    Args:
        potential: φ(params) -> real scalar; its keyword-only parameters name data, which the metric takes too.
        matrix_free: a `Closed` that is known by its products, for `cg`; else a `Dense`.

    Returns:
        metric(params, **data) -> operator.

    Cost: p Hessian products, or one for each product of the operator.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.hessian(jax.nn.logsumexp)  # categorical, logits
        >>> [round(float(x), 4) for x in metric(jnp.zeros(2)).dense()[0]]
        [0.25, -0.25]

    Reference: Raskutti, Mukherjee, "The information geometry of mirror descent" (2015), theorem 1.
    """

    check_callable(potential, "potential", "potential(params)")

    def hessian(params: PyTree, **data: PyTree) -> Closed | Dense:
        check_real(params)
        check_scalar(jax.eval_shape(potential, params, **data), "potential", "It takes all parameters and gives φ.")
        space, theta = Space.of(params), _tree.raised(params)
        if matrix_free:
            return Closed(Partial(HessianProduct(potential), theta, (), data), None, space)
        column = lambda e: space.ravel(  # noqa: E731
            HessianProduct(potential)(theta, (), data, space.unravel(e))
        )
        matrix = jax.vmap(column)(jnp.eye(space.size, dtype=space.dtype))
        return Dense((matrix + matrix.T) / 2, space)

    return with_data_of(potential, hessian)


def quasi_diagonal(metric: Metric, biases: Callable[[PyTree], list[tuple[Array, Array]]]) -> Metric:
    """The diagonal of a metric and, for every unit of a network, the row of its bias: O(p), and nearly as invariant.

    For a unit with bias 0 and incoming weights i it keeps F_00, F_0i, F_ii; the rest becomes F_0i F_0j / F_00:

        vᵀGv = F_00 (v_0 + Σ_i c_i v_i)² + Σ_i (F_ii − c_i F_0i) v_i²,    c_i = F_0i / F_00

    Invariant to affine maps a_i → αa_i + β of the activity of every unit, which a diagonal is not (β moves the bias).

    Args:
        metric: one that shows its matrix or rows, such as `monte_carlo_fisher(...)`; its data are passed through.
        biases: biases(params) -> pairs (weights, bias); the last axes of the weights are those of the bias (transpose
            them if not): `lambda p: [(p["w"], p["b"])]`. It only picks, reshapes and transposes. What it does not pick
            has its diagonal.

    Returns:
        metric(params, **data) -> `Closed`, products and solves O(p). A weight or bias without curvature has step 0. The
        closed form takes no damping: bound the step by `max_kl`.

    Raises:
        TypeError: a metric without rows or a matrix.
        ValueError: weights that do not end in the axes of their bias.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> residuals = lambda p, x: x * p["w"] + p["b"] - x**2
        >>> metric = ng.metrics.quasi_diagonal(ng.metrics.least_squares(residuals), lambda p: [(p["w"], p["b"])])
        >>> G = metric({"w": jnp.array(0.0), "b": jnp.array(0.0)}, batch=jnp.array([1.0, 3.0]))
        >>> jnp.round(G.dense(), 4).tolist()  # one weight and its bias: nothing is left out
        [[2.0, 4.0], [4.0, 10.0]]

    Reference: Ollivier, "Riemannian metrics for neural networks I" (2015), section 2.3.
    """

    def quasi_diagonal(params: PyTree, **data: PyTree) -> Closed:
        operator = metric(params, **data)
        owner = _owners(biases, operator.space)
        arrays = (jnp.asarray(owner), *_conditioned(operator, owner))
        space = operator.space
        return Closed(Partial(_Quasi(space, False), *arrays), Partial(_Quasi(space, True), *arrays), space)

    return with_data_of(metric, quasi_diagonal)


def fisher_diagonal(metric: Metric) -> Metric:
    """The true diagonal of a metric: for Fisher information the mean of *squared per-example* scores.

        d_i = Σ_x w(x) s_i(x)²,    with the weights, mean or sum, of the metric

    Not the square of a mean gradient, which optimizers that keep second moments call by this name and which for a batch
    of n is too small by up to n. Where the metric has layer rows a dense weight costs (a²)ᵀ(δ²): no gradient of an
    example is made.

    Args:
        metric: one that shows its diagonal: `fisher` (exact over a finite set of labels), `monte_carlo_fisher`,
            `empirical_fisher`, `gauss_newton`, `least_squares` …; its data are passed through.

    Returns:
        metric(params, **data) -> `Diagonal`, whose `entries` are shaped like params.

    Raises:
        TypeError: a metric that shows no diagonal (matrix_free).

    Cost: with layer rows and one row an example about one weight-gradient pass beside the gradient. Memory n times the
    widths of the layers, and n times the number of biases. For more rows than parameters give the metric rows="layers":
    its "auto" would make plain rows there.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_prob = lambda mean, x: -0.5 * (x - mean) ** 2
        >>> metric = ng.metrics.fisher_diagonal(ng.metrics.empirical_fisher(log_prob))
        >>> round(float(metric(jnp.array(0.0), batch=jnp.array([1.0, 3.0])).entries), 4)  # the mean of 1 and 9
        5.0

    Reference: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation" (2019), for which is which.
    """
    check_callable(metric, "metric", "metric(params, **data)")

    def fisher_diagonal(params: PyTree, **data: PyTree) -> Diagonal:
        operator = metric(params, **data)
        if not operator.shows_diagonal:
            raise TypeError(
                f"metric: expected one that shows its diagonal, got {type(operator).__name__}; leave matrix_free out"
            )
        return Diagonal(operator.diagonal())

    return with_data_of(metric, fisher_diagonal)


def _owners(biases: Callable[[PyTree], list[tuple[Array, Array]]], space: Space) -> np.ndarray:
    """For every entry of a flat vector the place of its unit's bias; its own place where there is none."""
    owner = np.arange(space.size)
    for pair in biases(space.indices()):
        weight, bias = map(np.asarray, pair)
        if weight.shape[weight.ndim - bias.ndim :] != bias.shape or weight.ndim < bias.ndim:
            raise ValueError(
                f"biases: expected weights whose last axes are those of the bias, got shapes {weight.shape} and "
                f"{bias.shape}. Transpose the weights: (p['w'].T, p['b'])."
            )
        if weight.size and (owner[weight] != weight).any():
            raise ValueError("biases: expected each weight with one bias, got one of them with two")
        owner[weight] = np.broadcast_to(bias, weight.shape)
    return owner


def _conditioned(operator: Any, owner: np.ndarray) -> tuple[Array, Array, Array]:
    """√F_ii; in its units, c_i = F_0i and 1 − c_i², what is left of a weight once its bias has moved."""
    own = owner == np.arange(owner.size)
    if isinstance(operator, Gram):
        scale = operator.scale()
        columns = operator.matrix() * _inverse(scale)
        coupling = jnp.where(own, 0, jnp.sum(columns * columns[:, owner], axis=0))
        # Taken out of the rows, not of their squares: an input far from 0 would lose its spread.
        left = jnp.sum(jnp.square(columns - coupling * columns[:, owner]), axis=0)
        rounding = columns.shape[0] * (16 * jnp.finfo(left.dtype).eps) ** 2
    elif isinstance(operator, Dense):
        matrix, scale = operator.dense(), operator.scale()
        coupling = jnp.where(own, 0, _inverse(scale) * matrix[np.arange(owner.size), owner] * _inverse(scale)[owner])
        left = jnp.where(scale == 0, 0, 1 - jnp.square(coupling))
        rounding = 4 * jnp.finfo(left.dtype).eps
    else:
        raise TypeError(
            f"metric: expected one that returns rows or a matrix, got {type(operator).__name__}. "
            "Leave matrix_free out, or pass chunk_size for a matrix."
        )
    # A NaN stays one: it is not less than anything.
    return scale, coupling, jnp.where(left <= rounding, 0, left)


def _inverse(x: Array) -> Array:
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


@dataclass(frozen=True)
class _Quasi:
    """v ↦ Gv or G⁺v for G = S Lᵀ diag(left) L S, S = diag(scale), (Lv)_i = v_i, for a bias v_0 + Σ c_i v_i."""

    space: Space
    inverse: bool

    def __call__(self, owner: Array, scale: Array, coupling: Array, left: Array, v: PyTree) -> PyTree:
        to_biases = lambda x: jnp.zeros_like(x).at[owner].add(coupling * x)  # noqa: E731
        if self.inverse:
            x = _inverse(scale) * self.space.ravel(v)
            x = _inverse(left) * (x - coupling * x[owner])
            return self.space.unravel(_inverse(scale) * (x - to_biases(x)))
        x = scale * self.space.ravel(v)
        x = left * (x + to_biases(x))
        return self.space.unravel(scale * (x + coupling * x[owner]))
