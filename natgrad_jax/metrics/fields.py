"""Metrics of functions: the quantum geometric tensor, Wasserstein distance in one dimension, norms of fields."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax import _tree, operators
from natgrad_jax._tree import PyTree, Space, concrete, is_complex, leading_axis, surely
from natgrad_jax.metrics.shared import (
    Form,
    Metric,
    check_callable,
    check_no_nan,
    check_real,
    check_real_outputs,
    check_scalar,
    check_weights,
    nan_unless,
    one_each,
    one_of,
    pulled_back,
)
from natgrad_jax.operators import Operator, RealParts


def quantum_geometric(
    log_psi: Callable[[PyTree, PyTree], Array],
    *,
    holomorphic: bool = False,
    jac: str = "auto",
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """Quantum geometric tensor of an unnormalised wave function ψ_θ, as in stochastic reconfiguration.

        G = Re [⟨O* Oᵀ⟩ − ⟨O⟩* ⟨O⟩ᵀ],    O(x) = ∂ log ψ(x) / ∂θ,    ⟨·⟩ over |ψ|²

    It is the Fubini–Study metric, and a quarter of the Fisher information of |ψ|² where ψ is real. The O are centred
    before they are contracted.

    Real parameters have real rows, two a sample if log ψ is complex. Complex ones are two real parameters each
    (`operators.RealParts`), unless log ψ is `holomorphic` in them: then G is the Hermitian matrix without Re. The
    gradient of a real loss in complex parameters that such a G expects is that of optax, `jnp.conj(jax.grad(...))`.

    Args:
        log_psi: log_psi(params, x) for one x, a real or complex scalar.
        holomorphic: log ψ is complex-differentiable in all, complex, parameters.
        jac: "auto", "rev" or "fwd".
        chunk_size: samples at a time: a `Dense` in place of the rows.
        matrix_free: an `Implicit`, for `cg`.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params, *, samples, weights=None) -> operator. `samples` are drawn from |ψ|², a mean over them; or they
        are every x, with `weights` |ψ(x)|² that need not be normalised (full summation).

    Raises:
        ValueError: weights that are negative or of another length; log_psi not scalar. A sample with ψ = 0 has no
            log ψ: leave it out, or G is NaN, whatever its weight.
        TypeError: `holomorphic` with real parameters.

    Cost: one gradient a sample, two if log ψ is complex and not holomorphic.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> log_psi = lambda t, k: jnp.log(jnp.stack([jnp.cos(t / 2), jnp.sin(t / 2)]))[k]  # a rotated qubit
        >>> metric = ng.metrics.quantum_geometric(log_psi)
        >>> weights = jnp.array([jnp.cos(0.4), jnp.sin(0.4)]) ** 2
        >>> round(float(metric(jnp.array(0.8), samples=jnp.arange(2), weights=weights).dense()[0, 0]), 4)
        0.25

    Reference: Stokes, Izaac, Killoran, Carleo, "Quantum natural gradient" (2020), equation 8; Sorella, "Green function
    Monte Carlo with stochastic reconfiguration" (1998).
    """
    check_callable(log_psi, "log_psi", "log_psi(params, x)")
    form = Form.of(jac, chunk_size, matrix_free, rows)

    def quantum_geometric(params: PyTree, *, samples: PyTree, weights: Array | None = None) -> Operator:
        n, space = leading_axis(samples, "samples"), Space.of(params)
        out = _check_amplitude(log_psi, params, samples, holomorphic)
        roots = sample_roots(weights, n, _tree.real_dtype(space.dtype))
        if holomorphic:
            return pulled_back(log_psi, params, samples, roots, form, centre=0)
        pair = is_complex(out.dtype)
        if not any(map(is_complex, space.dtypes)):
            f = _RealAndImaginary(log_psi) if pair else log_psi
            return pulled_back(f, params, samples, roots, form, centre=0)
        joined = _OfParts(log_psi, space)
        f = _RealAndImaginary(joined) if pair else joined
        parts = pulled_back(f, _tree.real_parts(params), samples, roots, form, centre=0)
        return RealParts(parts, space)

    return quantum_geometric


@dataclass(frozen=True)
class _RealAndImaginary:
    """(params, x) ↦ the two real numbers of f(params, x)."""

    f: Callable[[PyTree, PyTree], Array]

    def __call__(self, params: PyTree, x: PyTree) -> Array:
        value = self.f(params, x)
        return jnp.stack([jnp.real(value), jnp.imag(value)])


@dataclass(frozen=True)
class _OfParts:
    """f as a function of the real and imaginary parts of its complex parameters."""

    f: Callable[[PyTree, PyTree], Array]
    space: Space

    def __call__(self, parts: PyTree, x: PyTree) -> Array:
        return self.f(_tree.complex_of(parts, self.space), x)


def _check_amplitude(log_psi: Callable[..., Array], params: PyTree, samples: PyTree, holomorphic: bool) -> Any:
    kinds = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    if holomorphic and not all(map(is_complex, kinds)):
        raise TypeError(f"holomorphic: expected complex parameters, got {kinds}; leave it out for real ones")
    if not all(jnp.issubdtype(kind, jnp.inexact) for kind in kinds):
        raise TypeError(f"params: expected floating-point or complex numbers, got {kinds}")
    out = jax.eval_shape(log_psi, params, one_of(samples))
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"log_psi: expected a real or complex scalar for one sample, got shape {shape}, dtype {dtype}. "
            "It takes one sample without the leading axis."
        )
    if holomorphic and not is_complex(dtype):
        raise TypeError("holomorphic: a real log_psi is not holomorphic; leave it out")
    return out


def sample_roots(weights: Array | None, n: int, dtype: Any) -> Array:
    """√w, (n,), for weights that are made to sum to one; 1/n when left out."""
    if weights is None:
        return jnp.full(n, n**-0.5, dtype)
    check_weights(weights, ((n,),), "weights")
    weights = jnp.asarray(weights, dtype)
    weights = weights / jnp.max(weights)
    return _tree.root(weights / jnp.sum(weights))


def wasserstein_1d(
    quantile: Callable[[PyTree, Array], Array] | None = None,
    *,
    cdf: Callable[[PyTree, Array], Array] | None = None,
    bracket: Any = None,
    num_nodes: int = 64,
    jac: str = "auto",
) -> Metric:
    """Wasserstein-2 metric of distributions on the line: the flat metric of the quantile function Q_θ.

        G = ∫₀¹ ∂Q_θ(u) ∂Q_θ(u)ᵀ du,    ∂Q = −∂F / ∂ₓF for a distribution function F

    It is the kinetic energy of moving the mass, in squared units of x, and exists where supports move with θ (uniform
    on [0, θ]: 1/3), or are disjoint, and the Fisher information does not. In the mean and the deviation of a location
    and scale family it is the identity: the ordinary gradient there is this one.

    Args:
        quantile: quantile(params, u) for one u in (0, 1).
        cdf: in place of it, cdf(params, x) for one x, continuous; inverted by bisection within the bracket.
        bracket: (low, high), or bracket(params) -> (low, high), with F(low) ≈ 0 and F(high) ≈ 1; for `cdf`.
        num_nodes: of the quadrature over u (tanh-sinh, for quantiles that are smooth within and singular at the ends).
            What is nearer to 1 than eps is not seen: 1e-5 of an exponential in float32, nothing of it in float64; of a
            tail x^-3.5 4 % and 0.1 %. Where ∂Q has no second moment the integral does not exist, and this is not said.
        jac: "auto", "rev" or "fwd".

    Returns:
        metric(params) -> `Gram` of num_nodes rows.

    Raises:
        TypeError: neither or both of quantile and cdf; a cdf without a bracket.
        ValueError: a bracket that does not hold the distribution. A cdf with jumps has a quantile with plateaus, which
            is not seen: give the quantile.

    Cost: num_nodes gradients; with `cdf` some 60 more evaluations at each node.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.wasserstein_1d(lambda theta, u: theta * u)  # uniform on [0, θ]
        >>> round(float(metric(jnp.array(2.0)).dense()[0, 0]), 4)
        0.3333

    Reference: Villani, "Topics in optimal transportation" (2003), theorem 2.18.
    """
    if (quantile is None) == (cdf is None):
        raise TypeError("quantile, cdf: expected exactly one of the two")
    if cdf is not None and bracket is None:
        raise TypeError("bracket: a cdf is inverted within (low, high); pass bracket=(low, high)")
    if num_nodes < 8:
        raise ValueError(f"num_nodes: expected at least 8, got {num_nodes}")
    form = Form.of(jac)

    def wasserstein_1d(params: PyTree) -> Operator:
        check_real(params)
        dtype = Space.of(params).dtype
        u, w = (jnp.asarray(x, dtype) for x in _tanh_sinh(num_nodes, float(jnp.finfo(dtype).eps)))
        one = "It takes one number, and gives one."
        if quantile is not None:
            check_scalar(jax.eval_shape(quantile, params, u[0]), "quantile", one)
            return pulled_back(quantile, params, u, jnp.sqrt(w), form)
        assert cdf is not None
        check_scalar(jax.eval_shape(cdf, params, u[0]), "cdf", one)
        theta = _tree.raised(params)
        x, density = _inverted(cdf, theta, u, *(bracket(theta) if callable(bracket) else bracket))
        return pulled_back(_Divided(cdf), params, (x, density), jnp.sqrt(w), form)

    return wasserstein_1d


@dataclass(frozen=True)
class _Divided:
    """(params, (x, f)) ↦ −F(x)/f, whose derivative in θ is that of the quantile."""

    cdf: Callable[[PyTree, Array], Array]

    def __call__(self, params: PyTree, point: tuple[Array, Array]) -> Array:
        x, density = point
        return -self.cdf(params, x) / density


def _tanh_sinh(n: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1) that bear singularities at the ends; nodes that would round to 1 are left out."""
    # Beyond ±3.2 the nodes are nearer to the ends than 1e-16.
    t, step = np.linspace(-3.2, 3.2, n, retstep=True)
    angle = np.pi / 2 * np.sinh(t)
    u = 1 / (1 + np.exp(-2 * angle))
    w = step * np.pi / 4 * np.cosh(t) / np.cosh(angle) ** 2
    kept = (u > 0) & (1 - u >= eps)
    return u[kept], w[kept] / np.sum(w[kept])


def _inverted(cdf: Callable[..., Array], theta: PyTree, u: Array, low: Any, high: Any) -> tuple[Array, Array]:
    """x with F(x) = u, and the density there."""
    low, high = jnp.asarray(low, u.dtype), jnp.asarray(high, u.dtype)
    # Nodes in what little is outside are put to the ends.
    little = jnp.finfo(u.dtype).eps ** 0.5
    held = ~((low >= high) | (cdf(theta, low) > little) | (cdf(theta, high) < 1 - little))
    if concrete(held) and not bool(held):
        raise ValueError(
            f"bracket: expected low < high with F(low) ≤ {float(little):.1g} and F(high) ≥ 1 − {float(little):.1g}, "
            f"got F({low}) = {cdf(theta, low)}, F({high}) = {cdf(theta, high)}"
        )
    frozen = jax.lax.stop_gradient(theta)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) / 2
        below = jax.vmap(lambda x: cdf(frozen, x))(middle) < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    start = (jnp.full_like(u, low), jnp.full_like(u, high))
    lower, upper = jax.lax.fori_loop(0, jnp.finfo(u.dtype).nmant + 8, halve, jax.lax.stop_gradient(start))
    x = lower + (upper - lower) / 2
    density = lambda x: jax.vmap(jax.grad(lambda x: cdf(theta, x)))(x)  # noqa: E731
    # One step of Newton's method, which also carries the derivative of x in θ.
    x = x - (jax.vmap(lambda x: cdf(theta, x))(x) - u) / density(x)
    return x, nan_unless(held, u.dtype) * density(x)


def energy(
    fields: Any,
    weights: PyTree = 1.0,
    *,
    jac: str = "auto",
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """Energy norm of what θ does to the fields of a model: G = ∫ Σ_m c_m ∂f_m(x) ∂f_m(x)ᵀ dx, by quadrature.

    With f = ∇u it is the Dirichlet energy, the natural metric for the Deep Ritz method; with f the linearised residual
    of an equation, Gauss–Newton. See `sobolev` for a field and its derivatives.

    Args:
        fields: fields(params, x) at one point x -> pytree of real numbers f_m; or a list or dictionary of such, each on
            points of its own: inside and boundary.
        weights: c_m ≥ 0, a prefix of the pytree of fields (one for each term): what makes their units comparable.
        jac: "auto", "rev" or "fwd".
        chunk_size: points at a time: a `Dense` in place of the rows.
        matrix_free: an `Implicit`, for `cg`.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params, *, points, quadrature=None) -> operator. `quadrature` holds the weights ≥ 0 of the n points, 1/n
        when left out; of several terms each has its points and quadrature, in the same list or dictionary. The norm has
        to see what the loss sees: with a penalty on a boundary, a term there.

    Cost: k gradients of the fields a point.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.energy(lambda a, x: a * jnp.cos(x))
        >>> round(float(metric(jnp.array(1.0), points=jnp.arange(4) * jnp.pi / 2).dense()[0, 0]), 4)  # mean of cos²
        0.5

    Reference: Müller, Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradients" (2023), section 3.
    """
    form = Form.of(jac, chunk_size, matrix_free, rows)
    for leaf in jax.tree.leaves(weights):
        check_weights(leaf, (jnp.shape(leaf),), "weights")
    terms, treedef = jax.tree.flatten(fields, is_leaf=callable)
    for term in terms or [fields]:
        check_callable(term, "fields", "fields(params, x), or a list or dict of such")
    shared = callable(fields) or not isinstance(weights, dict | list | tuple)
    factors = [weights] * len(terms) if shared else one_each(treedef, weights, "weights")
    metrics = [_energy(term, c, form) for term, c in zip(terms, factors, strict=True)]

    def energy(params: PyTree, *, points: PyTree, quadrature: PyTree = None) -> Operator:
        places = one_each(treedef, points, "points")
        measures = [None] * len(terms) if quadrature is None else one_each(treedef, quadrature, "quadrature")
        parts = zip(metrics, places, measures, strict=True)
        return operators.add(*(metric(params, at, measure) for metric, at, measure in parts))

    return energy


def _energy(fields: Callable[[PyTree, PyTree], PyTree], weights: PyTree, form: Form) -> Callable[..., Operator]:
    """The metric of one term."""

    def energy(params: PyTree, points: PyTree, quadrature: Array | None) -> Operator:
        n = leading_axis(points, "points")
        check_no_nan(points, "points")
        check_real(params)
        out, dtype = check_real_outputs(fields, params, points, "fields"), Space.of(params).dtype
        if quadrature is not None:
            check_weights(quadrature, ((n,),), "quadrature")
        measure = jnp.full(n, 1 / n, dtype) if quadrature is None else jnp.asarray(quadrature, dtype)
        full = jax.tree.map(lambda c, part: jax.tree.map(lambda x: jnp.broadcast_to(c, x.shape), part), weights, out)
        roots = _tree.root(measure)[:, None] * _tree.root(_tree.ravel(full).astype(dtype))
        return pulled_back(fields, params, points, roots, form)

    return energy


def sobolev(
    field: Callable[[PyTree, Array], Array],
    weights: tuple[float, ...] = (1.0, 1.0),
    *,
    jac: str = "auto",
    chunk_size: int | None = None,
    matrix_free: bool = False,
    rows: str = "auto",
) -> Metric:
    """Sobolev metric of a field u_θ(x): G = Σ_m c_m ∫ ‖∂_θ ∇ᵐu‖² dx, the length of a change of u in H^m.

    weights=(1,) is L², (1, 1) is H¹, (0, 1) the Dirichlet energy, (1, 1, 1) H². ∇ᵐu has all partial derivatives of
    order m, mixed ones in every order.

    Args:
        field: field(params, x) at one point x, a number or (d,) -> a number or an array.
        weights: c_0, c_1, … ≥ 0; they carry the units, length^2m.
        jac: "auto", "rev" or "fwd".
        chunk_size: points at a time: a `Dense` in place of the rows.
        matrix_free: an `Implicit`, for `cg`.
        rows: "auto": in factors (see `layers.capture`) where these are smaller, for fewer rows than parameters, with
            jac="auto" and without chunk_size; "layers": wherever it can be; "plain": never.

    Returns:
        metric(params, *, points, quadrature=None) -> operator, as for `energy`.

    Cost: for u a number on R^d one gradient for L², 1 + d for H¹, 1 + d + d² for H², at every point.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> metric = ng.metrics.sobolev(lambda a, x: a * jnp.sin(2 * x))  # ∫ sin² + (2 cos)²
        >>> round(float(metric(jnp.array(1.0), points=jnp.arange(8) * jnp.pi / 4).dense()[0, 0]), 4)
        2.5

    Reference: Müller, Zeinhofer (2023), section 3.
    """
    check_callable(field, "field", "field(params, x)")
    if not isinstance(weights, tuple | list):
        raise ValueError(f"weights: expected a tuple with one number for each order of derivative, got {weights!r}")
    if not weights or not any(jnp.ndim(c) == 0 and (not surely(c, lambda x: not x > 0)) for c in weights):
        raise ValueError(f"weights: expected one number for each order of derivative, one of them > 0, got {weights}")
    orders = tuple(m for m, c in enumerate(weights) if not surely(c, lambda x: x == 0))
    chosen = tuple(weights[m] for m in orders)
    fields = _Derivatives(field, orders)
    return energy(fields, chosen, jac=jac, chunk_size=chunk_size, matrix_free=matrix_free, rows=rows)


@dataclass(frozen=True)
class _Derivatives:
    """(params, x) ↦ the derivatives of the field in x, of the orders given."""

    field: Callable[[PyTree, Array], Array]
    orders: tuple[int, ...]

    def __call__(self, params: PyTree, x: Array) -> tuple[Array, ...]:
        derivative, out = (lambda x: self.field(params, x)), []
        for m in range(self.orders[-1] + 1):
            if m in self.orders:
                out.append(derivative(x))
            smaller = math.prod(jax.eval_shape(derivative, x).shape) < jnp.size(x)
            derivative = (jax.jacrev if smaller else jax.jacfwd)(derivative)
        return tuple(out)
