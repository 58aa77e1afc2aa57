"""How far a fitted q can be trusted, what it says about the parameters, and where it is kept."""

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_jax._tree import PyTree, accumulator, concrete, leading_axis

FEWEST = 5  # exceedances that a shape is fitted to; so the tail, a fifth of the draws, wants 25 of them
SHOWN = {"mean": "mean", "sd": "sd", "q05": "5%", "q50": "50%", "q95": "95%"}


class Psis(NamedTuple):
    """See `psis`.

    Attributes:
        log_weights: smoothed and normalised, Σ exp = 1, shape (n,); NaN throughout if the raw ones were unusable.
        khat: shape k̂ of the tail, see `reading` and `threshold`.
    """

    log_weights: Array
    khat: Array


def psis(log_weights: Array) -> Psis:
    """Pareto-smoothed importance weights, and the shape k̂ of their tail: can expectations under q be mended into p?

    The M = ⌈min(n/5, 3√n)⌉ largest weights w = p̃(x)/q(x) are replaced by the expected order statistics of the
    generalised Pareto distribution fitted to their excess over the next one, cut off at the largest raw weight:
    w_i = c + σ(s_i^−k̂ − 1)/k̂, s_i = (i − ½)/M from the largest down. Weights have a finite mean for k < 1, and a
    finite variance for k < ½.

    Args:
        log_weights: log p̃(x) − log q(x) at draws x from q, up to any constant, nats, shape (n,), n ≥ 25. −inf is a
            draw outside the support of p.

    Returns:
        `Psis`, in the dtype of `log_weights`. k̂ = +inf, unusable, if one weight is NaN or +inf or all are 0. Weights
        that are flat as far as can be seen are a perfect fit and have k̂ = 0: the limit for q = p(1 + small polynomial).
        Flat is a heuristic: the largest is within a relative √ε of c, or within a factor of 2 where fewer than five
        weights differ from c (a finite support, or rounding) and no shape can be fitted; else those are +inf.
        On a finite support k̂ is rough, as the weights are few numbers many times: see `effective_sample_size` too.

    Raises:
        TypeError: `log_weights` are no real floating-point numbers.
        ValueError: not of shape (n,), or n < 25.

    Cost: O(n log n), and M(30 + √M) numbers of memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from natgrad_jax.inference import diagnostics
        >>> x = 2 * jax.random.normal(jax.random.key(0), (1000,))  # from N(0, 2²), for N(0, 1)
        >>> weights, khat = diagnostics.psis(-0.5 * x**2 + 0.5 * (x / 2) ** 2)
        >>> diagnostics.reading(khat), round(float(jnp.exp(weights) @ x**2), 1)
        ('good', 1.0)

    Reference: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling" (JMLR 25, 2024),
    algorithm 1; the fit is that of Zhang and Stephens (2009), with their prior for k̂ = (Mk + 5)/(M + 10).
    """
    given = _checked(log_weights, 5 * FEWEST)
    x, usable = _below_the_largest(given)
    size = math.ceil(min(len(x) / 5, 3 * math.sqrt(len(x))))
    places = jax.lax.top_k(x.astype(jnp.float32), size + 1)[1]  # on a CPU a selection in float64 is a whole sort
    places = places[jnp.argsort(-x[places], stable=True)]
    raw = x[places]
    tail, khat = _smoothed(raw[:-1], raw[-1])
    x = x.at[places[:-1]].set(tail)
    x = jnp.where(usable, x - jax.nn.logsumexp(x), jnp.nan)
    return Psis(x.astype(given.dtype), jnp.where(usable, khat, jnp.inf).astype(given.dtype))


def _checked(log_weights: Any, least: int) -> Array:
    x = jnp.asarray(log_weights)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"log_weights: expected real floating-point numbers, got {x.dtype}; pass jnp.asarray(x, float)")
    if x.ndim != 1 or len(x) < least:
        raise ValueError(
            f"log_weights: expected one number for each of at least {least} draws, got shape {x.shape}. "
            "Draw more, a thousand or so; for several sets of draws take jax.vmap."
        )
    return x


def _below_the_largest(given: Array) -> tuple[Array, Array]:
    """log w − max log w, and whether there is such a thing; 0 where not."""
    x = given.astype(accumulator(given.dtype))
    top = jnp.max(x)
    usable = jnp.isfinite(top)  # NaN and +inf show in the maximum
    return jnp.where(usable, x - jnp.where(usable, top, 0), 0), usable


def _smoothed(raw: Array, cut: Array) -> tuple[Array, Array]:
    """The tail `raw`, log-weights from 0 downwards and above `cut`, as order statistics of its fit; and k̂."""
    cut = jnp.maximum(cut, math.log(jnp.finfo(raw.dtype).tiny))  # smaller weights count as 0
    tail = jnp.maximum(raw, cut)
    excess = -jnp.exp(tail) * jnp.expm1(cut - tail)  # w − c without cancellation
    m = jnp.sum(excess > 0)
    few = m < FEWEST
    flat = excess[0] <= jnp.where(few, 1, math.sqrt(jnp.finfo(raw.dtype).eps)) * jnp.exp(cut)
    fitted = ~flat & ~few
    some = jnp.arange(len(raw), 0, -1, dtype=raw.dtype) / len(raw)  # keeps NaN away where there is nothing to fit
    excess, m = jnp.where(fitted, excess, some), jnp.where(fitted, m, len(raw))
    khat, sigma = _pareto(excess, m)
    smooth = cut + jnp.log1p(_order_statistics(khat, sigma, m, len(raw)) * jnp.exp(-cut))
    tail = jnp.where(fitted & (excess > 0), jnp.minimum(smooth, 0), raw)
    return tail, jnp.where(fitted, khat, jnp.where(flat, 0, jnp.inf))


def _pareto(excess: Array, m: Array) -> tuple[Array, Array]:
    """k̂ and σ for the m positive entries of `excess`, which descend to zeros."""

    def profile(b: Array) -> tuple[Array, Array]:
        """k and 1/σ of the likeliest distribution with k/σ = −b; at b = 0 it is the exponential one."""
        k = jnp.sum(jnp.log1p(-b * excess)) / m
        # Both, since XLA may compute b again where it is used, and round it otherwise.
        flat = (b == 0) | (k == 0)
        return k, jnp.where(flat, m / jnp.sum(excess), -b / jnp.where(flat, 1, k))

    points = 30 + jnp.floor(jnp.sqrt(m.astype(excess.dtype)))
    j = jnp.arange(1, 31 + math.isqrt(len(excess)), dtype=excess.dtype)
    quartile = excess[m - (m + 2) // 4]
    b = 1 / excess[0] + (1 - jnp.sqrt(points / (jnp.minimum(j, points) - 0.5))) / (3 * quartile)
    k, rate = jax.vmap(profile)(b)
    log_likelihood = m * (jnp.log(rate) - k - 1)
    k, rate = profile(jax.nn.softmax(jnp.where(j <= points, log_likelihood, -jnp.inf)) @ b)
    return (m * k + 5) / (m + 10), 1 / rate


def _order_statistics(k: Array, sigma: Array, m: Array, size: int) -> Array:
    """m quantiles of the generalised Pareto distribution, from the top down, and zeros up to `size`."""
    log_survival = jnp.log(jnp.minimum((jnp.arange(size, dtype=k.dtype) + 0.5) / m, 1))
    return sigma * jnp.where(k == 0, -log_survival, jnp.expm1(-k * log_survival) / jnp.where(k == 0, 1, k))


def effective_sample_size(log_weights: Array) -> Array:
    """(Σw)²/Σw²: how many equally weighted draws n weighted ones are worth, by their variance.

    Args:
        log_weights: raw or normalised, nats, shape (n,).

    Returns:
        Scalar between 1 and n; 0 if a weight is NaN or +inf or all are 0.

    Raises:
        TypeError: `log_weights` are no real floating-point numbers.
        ValueError: not of shape (n,), n ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.inference import diagnostics
        >>> round(float(diagnostics.effective_sample_size(jnp.log(jnp.array([1.0, 1.0, 2.0])))), 4)
        2.6667

    Reference: Kong, Liu, Wong (1994), section 4.1.
    """
    given = _checked(log_weights, 1)
    x, usable = _below_the_largest(given)
    size = jnp.square(jnp.sum(jnp.exp(x))) / jnp.sum(jnp.exp(2 * x))
    return jnp.where(usable, size, 0).astype(given.dtype)


def threshold(n: int) -> float:
    """The k̂ up to which smoothed estimates from n draws can be relied upon, min(1 − 1/log₁₀ n, 0.7).

    Args:
        n: number of draws, at least 2.

    Returns:
        The threshold; 0.7 from n = 2200 on, 0 at n = 10.

    Raises:
        ValueError: n < 2.

    Example:
        >>> from natgrad_jax.inference import diagnostics
        >>> diagnostics.threshold(100), diagnostics.threshold(4000)
        (0.5, 0.7)

    Reference: Vehtari et al. (2024), equation 13.
    """
    if not n >= 2:
        raise ValueError(f"n: expected a number of draws, at least 2, got {n}; pass len(log_weights)")
    return min(1 - 1 / math.log10(n), 0.7)


def reading(khat: Any) -> str:
    """The usual reading of one k̂: good (< 0.5), usable (< 0.7), unreliable (< 1) or unusable.

    Good: the weights have a finite variance. Usable: smoothed estimates have small errors, with 2200 draws or more;
    `threshold` says where fewer do. Unreliable: more draws hardly help. Unusable: the weights have no mean. In the last
    two p has mass where q has next to none; take a richer family, or a sampler.

    Args:
        khat: one number, not traced.

    Returns:
        "good", "usable", "unreliable" or "unusable"; NaN is unusable.

    Raises:
        ValueError: inside `jit`, or for an array.

    Example:
        >>> from natgrad_jax.inference import diagnostics
        >>> [diagnostics.reading(khat) for khat in (0.1, 0.6)], diagnostics.reading(1.2)
        (['good', 'usable'], 'unusable')

    Reference: Vehtari, Gelman, Gabry (2017), section 2.1, for the four bands; Vehtari et al. (2024), section 3.2, for
    what happens between 0.5 and 1.
    """
    if not concrete(khat) or np.ndim(khat):
        raise ValueError(
            f"khat: expected one number, got {khat}. Read each element of an array by itself, and outside jit and vmap."
        )
    bands = {"good": 0.5, "usable": 0.7, "unreliable": 1.0}
    return next((name for name, limit in bands.items() if float(khat) < limit), "unusable")


@dataclass(frozen=True, eq=False)
class Summary:
    """Means, deviations and quantiles by name, float64 numpy arrays of shape (d,); `print` shows a table."""

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    q05: np.ndarray
    q50: np.ndarray
    q95: np.ndarray

    def to_dict(self) -> dict[str, dict[str, float]]:
        """{name: {"mean": …, "sd": …, "q05": …, "q50": …, "q95": …}}, ready for JSON."""
        return {name: {key: float(getattr(self, key)[i]) for key in SHOWN} for i, name in enumerate(self.names)}

    def __str__(self) -> str:
        rows = [("", *SHOWN.values())]
        rows += [(name, *(f"{x:.4g}" for x in row.values())) for name, row in self.to_dict().items()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = (
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows
        )
        return "\n".join("  ".join(line) for line in lines)


def summary(draws: PyTree, names: Sequence[str] | None = None, log_weights: Array | None = None) -> Summary:
    """The posterior in one table: mean, standard deviation and the 5, 50 and 95 % quantiles of every parameter.

    With weights p_i ∝ exp(log_weights): Σpx, √(Σp(x − mean)²/(1 − Σp²)), which divides by n − 1 where they are equal,
    and quantiles of the sorted draws, interpolated between their levels Σ_{j≤i} p_j − p_i/2.

    Args:
        draws: (n, d), or a pytree of arrays (n, …), in the units wanted in the table.
        names: one for each number of a draw; None: from the pytree, such as "beta[0]" or "layer.w[0,1]", "x[0]" for an
            array.
        log_weights: shape (n,), up to a constant, of `psis`; None: equal ones.

    Returns:
        `Summary`. A parameter with a NaN draw is NaN; the deviation is NaN where all weight is on one draw.

    Raises:
        TypeError: complex draws.
        ValueError: no common leading axis, names or weights that do not match the draws, weights that are unusable.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.inference import diagnostics
        >>> table = diagnostics.summary({"mu": jnp.arange(101.0), "beta": jnp.zeros((101, 2))})
        >>> print(table)
                 mean    sd    5%  50%    95%
        beta[0]     0     0     0    0      0
        beta[1]     0     0     0    0      0
        mu         50  29.3  4.55   50  95.45
        >>> table.to_dict()["mu"]["q50"]
        50.0
    """
    columns = _columns(draws)
    names = list(columns) if names is None else list(names)
    if len(names) != len(columns) or len(set(names)) != len(names):
        raise ValueError(f"names: expected {len(columns)} different ones, for {', '.join(columns)}; got {names}")
    w = _weights(log_weights, len(next(iter(columns.values()))))
    rows = np.array([_moments_and_quantiles(x, w) for x in columns.values()])
    return Summary(names, *rows.T)


def _columns(draws: PyTree) -> dict[str, np.ndarray]:
    """The n draws of each number, by its name."""
    columns = {}
    for name, leaf in _named(draws).items():
        if np.iscomplexobj(leaf):
            raise TypeError(f"draws: expected real numbers, got {leaf.dtype} in {name}; pass real and imaginary parts")
        for index in np.ndindex(leaf.shape[1:]):
            place = f"[{','.join(map(str, index))}]" if index else ""
            columns[name + place] = leaf[(slice(None), *index)].astype(np.float64)
    if not columns:
        raise ValueError(f"draws: expected at least one number in a draw, got {jax.tree.map(jnp.shape, draws)}")
    return columns


def _named(draws: PyTree) -> dict[str, np.ndarray]:
    """The leaves by their paths, "layer.w"; "x" for a bare array."""
    leading_axis(draws, "draws")
    paths = jax.tree_util.tree_leaves_with_path(draws)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "x" for path, _ in paths]
    if len(set(names)) != len(names):
        raise ValueError(f"draws: two leaves have one name among {names}; rename a key, they are joined by dots")
    return {name: np.asarray(leaf) for name, (_, leaf) in zip(names, paths)}


def _weights(log_weights: Any, n: int) -> np.ndarray:
    x = np.zeros(n) if log_weights is None else np.asarray(log_weights, np.float64)
    if x.shape != (n,):
        raise ValueError(f"log_weights: expected one for each of {n} draws, got shape {x.shape}")
    if not np.isfinite(x.max()):
        raise ValueError(
            f"log_weights: expected numbers, not all of them −inf, got a largest one of {x.max()}. The log-density is "
            "not finite at some draws; leave those out, or look for the overflow."
        )
    return np.exp(x - x.max())


def _moments_and_quantiles(x: np.ndarray, w: np.ndarray) -> tuple[float, ...]:
    x, w = x[w > 0], w[w > 0]  # 0·inf is no part of a mean, and a draw without weight no quantile
    p = w / w.sum()
    with np.errstate(invalid="ignore"):  # of infinite draws, and of a single one
        mean = p @ x
        sd = np.sqrt(p @ (x - mean) ** 2 / (p @ (1 - p)))
    order = np.argsort(x)
    levels = (np.cumsum(w[order]) - w[order] / 2) / w.sum()
    quantiles = np.interp([0.05, 0.5, 0.95], levels, x[order]) if not np.isnan(x).any() else np.full(3, np.nan)
    return mean, sd, *quantiles


def to_arviz(draws: PyTree, groups: Mapping[str, Mapping[str, Any]] | None = None, **options: Any) -> Any:
    """The draws as arviz keeps them, one chain of n: for its plots, tables and comparisons.

    Independent draws of q carry no chain: R̂ and the like say nothing. Nor has arviz weights; resample by those of
    `psis` first, draws[jax.random.choice(key, n, (n,), p=jnp.exp(log_weights))].

    Args:
        draws: as of `summary`; each leaf is one variable, an array is "x".
        groups: further groups of arviz by name, such as {"observed_data": {"y": y}}; those with a value for each draw,
            such as "log_likelihood", have axes (1, n, …).
        **options: for `arviz.from_dict`, such as `coords` and `dims`.

    Returns:
        `arviz.InferenceData`; from arviz 1 on, an `xarray.DataTree`.

    Raises:
        ImportError: arviz is not installed.
        ValueError: no common leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.inference import diagnostics
        >>> data = diagnostics.to_arviz({"mu": jnp.arange(4.0)})  # doctest: +SKIP
        >>> float(data["posterior"]["mu"].mean())  # doctest: +SKIP
        1.5
    """
    data = {"posterior": {name: leaf[None] for name, leaf in _named(draws).items()}, **(groups or {})}
    try:
        import arviz
    except ImportError as error:
        raise ImportError(f"{error}. to_arviz hands the draws to arviz: pip install arviz") from error
    if "posterior" in inspect.signature(arviz.from_dict).parameters:  # before arviz 1 a keyword for each group
        return arviz.from_dict(**data, **options)
    return arviz.from_dict(data, **options)


def save(result: PyTree, path: str | os.PathLike[str]) -> Path:
    """Writes the arrays of any pytree to one .npz file, each under its path in the tree, without pickle.

    What is no array (a family, a function, the structure) is not in the file: `load` takes it from its `like`.

    Args:
        result: a `FitResult`, its params, or any other pytree of arrays and numbers.
        path: of the file; .npz is added where it is missing. A file that is there is overwritten.

    Returns:
        The path written.

    Raises:
        TypeError: a leaf that .npz cannot hold: bfloat16, a random key, a string.

    Example:
        >>> import os, tempfile
        >>> import jax.numpy as jnp
        >>> from natgrad_jax.inference import diagnostics
        >>> params = {"loc": jnp.arange(3.0)}
        >>> path = diagnostics.save(params, os.path.join(tempfile.mkdtemp(), "fit"))
        >>> path.name, float(diagnostics.load(path, like=params)["loc"][2])
        ('fit.npz', 2.0)
    """
    arrays = {name: _array(leaf, name) for name, leaf in _paths(result).items()}
    path = _file(path)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Reads what `save` wrote, into the structure of `like`.

    Args:
        path: of the file; .npz is added where it is missing.
        like: a pytree of the same structure, shapes and dtypes, whose values are not looked at: arrays, or
            `jax.ShapeDtypeStruct`s as of jax.eval_shape(lambda key: ng.fit(log_density, family, key), key), which
            runs no fit.

    Returns:
        A pytree as `like`, of JAX arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has other names, shapes or dtypes, or needs double precision while that is off.

    Example:
        >>> import os, tempfile
        >>> import jax, jax.numpy as jnp
        >>> from natgrad_jax.inference import diagnostics
        >>> path = diagnostics.save((jnp.ones(2), 3 * jnp.ones(())), os.path.join(tempfile.mkdtemp(), "pair.npz"))
        >>> like = jax.eval_shape(lambda: (jnp.zeros(2), jnp.zeros(())))
        >>> float(diagnostics.load(path, like)[1])
        3.0
    """
    expected = _paths(like)
    with np.load(_file(path), allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    missing, foreign = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or foreign:
        raise ValueError(
            f"like: expected the structure that was saved, {len(stored)} arrays; got {len(expected)}, of which the "
            f"file lacks {missing or 'none'}, and it has {foreign or 'none'} more. Pass a `like` made as `result` was."
        )
    leaves = [_same(stored[name], leaf, name) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def shapes(path: str | os.PathLike[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what a file of `save` holds, by name."""
    with np.load(_file(path), allow_pickle=False) as file:
        return {name: jax.ShapeDtypeStruct(file[name].shape, file[name].dtype) for name in file.files}


def _paths(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _array(leaf: Any, name: str) -> np.ndarray:
    kind = getattr(getattr(leaf, "dtype", None), "kind", None)
    if kind not in (*"biufc",) and not isinstance(leaf, bool | int | float | complex):
        raise TypeError(
            f"result{name}: expected numbers that a .npz file can hold, got {getattr(leaf, 'dtype', type(leaf))}. "
            "Cast bfloat16 to float32, take jax.random.key_data of a key, and leave other things out."
        )
    return np.asarray(leaf, _dtype(leaf))


def _same(stored: np.ndarray, leaf: Any, name: str) -> Array:
    if (stored.shape, stored.dtype) != (np.shape(leaf), _dtype(leaf)):
        raise ValueError(
            f"like{name}: expected shape {stored.shape} and {stored.dtype}, as saved, got {np.shape(leaf)} and "
            f"{_dtype(leaf)}. Pass a `like` made as `result` was, with the same jax_enable_x64."
        )
    array = jnp.asarray(stored)
    if array.dtype != stored.dtype:
        raise ValueError(
            f"like{name}: {stored.dtype} was saved, and JAX would round it to {array.dtype}; "
            "call jax.config.update('jax_enable_x64', True) before load"
        )
    return array
