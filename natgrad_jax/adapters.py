"""Natural gradients inside other packages: their parameters and their loop, our geometry.

An adapter is an optax transformation that is passed where the package expects its optimizer. It knows how the package
writes a Gaussian down (`families.chart`), takes F⁻¹g there, bounds the step in nats, and moves by the retraction of the
family. `distribution` goes the other way: a distribution of theirs as a family of ours. No package is needed to
import this module.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from natgrad_jax._tree import PyTree, Space, all_finite, concrete, norm, ravel
from natgrad_jax.families import (
    FullRankParams,
    LowRankParams,
    MeanFieldParams,
    chart,
    gaussian_full_rank,
    gaussian_low_rank,
    gaussian_mean_field,
)
from natgrad_jax.families.shared import closed, dimension
from natgrad_jax.operators import Closed
from natgrad_jax.transforms import natural_gradient, retract
from natgrad_jax.transforms.core import Transformation

Parameters = dict[str, Array]
Rate: TypeAlias = optax.ScalarOrSchedule


@dataclass(frozen=True)
class _Geometry:
    """Fisher information and retraction in coordinates that are known when the parameters are seen."""

    coordinates: Callable[[PyTree], Any]  # params -> an object with family, to and fro

    def _chart(self, params: PyTree) -> Any:
        own = self.coordinates(params)
        return chart(own.family, own.to, own.fro)

    def fisher(self, params: PyTree) -> Any:
        return self._chart(params).fisher(params)

    def retract(self, params: PyTree, step: PyTree) -> PyTree:
        return self._chart(params).retract(params, step)


def _falling(count: Array) -> Array:
    """(1 + t/4)^(−2/3): slow enough for what a diagonal metric leaves slow, and the noise of the draws falls."""
    return (1 + count / 4) ** (-2 / 3)


def _optimizer(coordinates: Callable[[PyTree], Any], learning_rate: Any, max_kl: float) -> Transformation:
    geometry = _Geometry(coordinates)
    learning_rate = _falling if learning_rate is None else learning_rate
    return optax.chain(natural_gradient(learning_rate, geometry.fisher, max_kl=max_kl), retract(geometry))


# blackjax: (mu, rho) and (mu, chol_params), mu of any structure.


@dataclass(frozen=True)
class _BlackjaxMeanField:
    space: Space

    @property
    def family(self) -> Any:
        return gaussian_mean_field(self.space.size)

    def to(self, params: tuple[PyTree, PyTree]) -> MeanFieldParams:
        return MeanFieldParams(ravel(params[0]), ravel(params[1]))

    def fro(self, params: MeanFieldParams) -> tuple[PyTree, PyTree]:
        return self.space.unravel(params.loc), self.space.unravel(params.log_scale)


@dataclass(frozen=True)
class _BlackjaxFullRank:
    space: Space

    @property
    def family(self) -> Any:
        return gaussian_full_rank(self.space.size)

    def to(self, params: tuple[PyTree, Array]) -> FullRankParams:
        loc, flat = ravel(params[0]), params[1]
        d = self.space.size
        lower = jnp.diag(jnp.exp(flat[:d])).at[np.tril_indices(d, -1)].set(flat[d:])
        return FullRankParams(loc, lower)

    def fro(self, params: FullRankParams) -> tuple[PyTree, Array]:
        diagonal = jnp.log(jnp.diagonal(params.scale_tril))
        flat = jnp.concatenate([diagonal, params.scale_tril[np.tril_indices(self.space.size, -1)]])
        return self.space.unravel(params.loc), flat


def _of_position(kind: Any, d: int, name: str) -> Callable[[PyTree], Any]:
    def coordinates(params: PyTree) -> Any:
        if not isinstance(params, tuple) or len(params) != 2:
            raise TypeError(f"params: {name} expected the pair that blackjax optimises, got {type(params).__name__}")
        space = Space.of(params[0])
        if space.size != d:
            raise ValueError(f"d: {name}({d}) was given a position of {space.size} numbers; pass that for d")
        return kind(space)

    return coordinates


def blackjax_fullrank(
    d: int, learning_rate: optax.ScalarOrSchedule | None = None, *, max_kl: float = 0.5
) -> Transformation:
    """A natural gradient for `blackjax.vi.fullrank_vi`: pass it as the optimizer.

    Args:
        d: how many numbers a position has, whatever its structure.
        learning_rate: a number or a schedule. None for (1 + t/4)^(−2/3) at step t: 1 is exact for a Gaussian target but
            for the noise of the draws, which later steps average out.
        max_kl: bound on the KL divergence of one step, in nats.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from natgrad_jax import adapters
        >>> optimizer = adapters.blackjax_fullrank(2)
        >>> params = jnp.zeros(2), jnp.zeros(3)  # as blackjax.vi.fullrank_vi.init makes them
        >>> updates, state = optimizer.update((jnp.ones(2), jnp.zeros(3)), optimizer.init(params), params)
        >>> updates[0].tolist()
        [-0.7071067690849304, -0.7071067690849304]
    """
    return _optimizer(_of_position(_BlackjaxFullRank, d, "blackjax_fullrank"), learning_rate, max_kl)


def blackjax_meanfield(
    d: int, learning_rate: optax.ScalarOrSchedule | None = None, *, max_kl: float = 0.5
) -> Transformation:
    """A natural gradient for `blackjax.vi.meanfield_vi`: pass it as the optimizer. See `blackjax_fullrank`.

    Example:
        >>> import jax.numpy as jnp
        >>> from natgrad_jax import adapters
        >>> optimizer = adapters.blackjax_meanfield(1)
        >>> params = jnp.zeros(1), jnp.full(1, -1.0)  # σ = 1/e
        >>> updates, state = optimizer.update((jnp.ones(1), jnp.zeros(1)), optimizer.init(params), params)
        >>> round(float(updates[0][0]), 4)  # −σ²
        -0.1353
    """
    return _optimizer(_of_position(_BlackjaxMeanField, d, "blackjax_meanfield"), learning_rate, max_kl)


# numpyro: a dictionary of unconstrained parameters, by name.


@dataclass(frozen=True)
class _NumpyroMeanField:
    loc_names: tuple[str, ...]
    scale_names: tuple[str, ...]
    space: Space  # of the list of locs
    bijector: Any

    @property
    def names(self) -> tuple[str, ...]:
        return self.loc_names + self.scale_names

    @property
    def family(self) -> Any:
        return gaussian_mean_field(self.space.size)

    def to(self, params: Parameters) -> MeanFieldParams:
        scales = [self.bijector(params[name]) for name in self.scale_names]
        return MeanFieldParams(ravel([params[name] for name in self.loc_names]), jnp.log(ravel(scales)))

    def fro(self, params: MeanFieldParams) -> Parameters:
        locs, scales = self.space.unravel(params.loc), self.space.unravel(jnp.exp(params.log_scale))
        free = [self.bijector.inv(scale) for scale in scales]
        return dict(zip(self.names, [*locs, *free], strict=True))


@dataclass(frozen=True)
class _NumpyroFullRank:
    prefix: str
    bijector: Any
    d: int

    @property
    def names(self) -> tuple[str, ...]:
        return f"{self.prefix}_loc", f"{self.prefix}_scale_tril"

    @property
    def family(self) -> Any:
        return gaussian_full_rank(self.d)

    def to(self, params: Parameters) -> FullRankParams:
        return FullRankParams(params[f"{self.prefix}_loc"], self.bijector(params[f"{self.prefix}_scale_tril"]))

    def fro(self, params: FullRankParams) -> Parameters:
        free = self.bijector.inv(jnp.tril(params.scale_tril))
        return {f"{self.prefix}_loc": params.loc, f"{self.prefix}_scale_tril": free}


@dataclass(frozen=True)
class _NumpyroLowRank:
    prefix: str
    bijector: Any
    d: int
    rank: int

    @property
    def names(self) -> tuple[str, ...]:
        return f"{self.prefix}_loc", f"{self.prefix}_scale", f"{self.prefix}_cov_factor"

    @property
    def family(self) -> Any:
        return gaussian_low_rank(self.d, self.rank)

    def to(self, params: Parameters) -> LowRankParams:
        scale, factor = self.bijector(params[f"{self.prefix}_scale"]), params[f"{self.prefix}_cov_factor"]
        # numpyro starts from a factor of zeros, where gradient and curvature are zero: a saddle, left from here.
        owner = np.arange(self.d)[:, None] % self.rank == np.arange(self.rank)
        factor = jnp.where(jnp.any(factor != 0), factor, jax.lax.stop_gradient(0.1 * owner).astype(factor.dtype))
        return LowRankParams(params[f"{self.prefix}_loc"], jnp.log(scale), factor * scale[:, None])

    def fro(self, params: LowRankParams) -> Parameters:
        scale = jnp.exp(params.log_scale)
        return {
            f"{self.prefix}_loc": params.loc,
            f"{self.prefix}_scale": self.bijector.inv(scale),
            f"{self.prefix}_cov_factor": params.factor / scale[:, None],
        }


def _of_guide(guide: Any) -> Callable[[Parameters], Any]:
    """Parameters of SVI -> the coordinates of the guide among them."""
    from numpyro.distributions import biject_to  # type: ignore[import-not-found, unused-ignore]
    from numpyro.infer import autoguide  # type: ignore[import-not-found, unused-ignore]

    prefix = getattr(guide, "prefix", "")  # every automatic guide has one
    if isinstance(guide, autoguide.AutoLowRankMultivariateNormal):
        names = [f"{prefix}_{part}" for part in ("loc", "scale", "cov_factor")]
        low_rank = partial(_NumpyroLowRank, prefix, biject_to(guide.scale_constraint))
        return lambda params: low_rank(*_all_of(params, names)[names[2]].shape)
    if isinstance(guide, autoguide.AutoMultivariateNormal):
        names = [f"{prefix}_loc", f"{prefix}_scale_tril"]
        full_rank = partial(_NumpyroFullRank, prefix, biject_to(guide.scale_tril_constraint))
        return lambda params: full_rank(len(_all_of(params, names)[names[0]]))
    if isinstance(guide, autoguide.AutoNormal | autoguide.AutoDiagonalNormal):
        by_site = isinstance(guide, autoguide.AutoNormal)
        bijector = biject_to(guide.scale_constraint)

        def mean_field(params: Parameters) -> Any:
            sites = sorted(name for name in params if name.endswith(f"_{prefix}_loc"))
            locs = tuple(sites) if by_site else (f"{prefix}_loc",)
            scales = tuple(name.removesuffix("loc") + "scale" for name in locs)
            own = _all_of(params, locs + scales)
            return _NumpyroMeanField(locs, scales, Space.of([own[name] for name in locs]), bijector)

        return mean_field
    raise TypeError(
        "guide: expected AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal or AutoLowRankMultivariateNormal, got "
        f"{type(guide).__name__}; for another one build families.chart and natural_gradient(lr, chart.fisher)"
    )


def _all_of(params: Parameters, names: Any) -> Parameters:
    """Those of the parameters; a `ValueError` that says which are there."""
    missing = [name for name in names if name not in params]
    if missing or not names:
        wanted, there = ", ".join(missing) or "locs", ", ".join(sorted(params)) or "none"
        raise ValueError(f"params: the guide's {wanted} not found among {there}; build SVI with the guide given here")
    return {name: params[name] for name in names}


class NumpyroState(NamedTuple):
    """State of `numpyro`.

    Attributes:
        guide: of the natural gradient.
        others: of the optimizer of the parameters that are not the guide's.
    """

    guide: Any
    others: Any


def numpyro(
    guide: Any,
    learning_rate: Rate | None = None,
    *,
    max_kl: float = 0.5,
    others: optax.GradientTransformation | None = None,
) -> Transformation:
    """A natural gradient for `numpyro.infer.SVI`: pass it as `optim`.

    Args:
        guide: `AutoNormal`, `AutoDiagonalNormal`, `AutoMultivariateNormal` or `AutoLowRankMultivariateNormal`.
        learning_rate: a number or a schedule; None for (1 + t/4)^(−2/3) at step t. SVI makes one draw a step unless
            told otherwise, which is little: try `Trace_ELBO(num_particles=16)`.
        max_kl: bound on the KL divergence of one step, in nats.
        others: an optimizer for the parameters that are not the guide's, such as hyperparameters of the model; None
            where there are none.

    A low-rank guide starts from a factor of zeros, a saddle that no gradient leaves: the first step puts a tenth of the
    scale in its place.

    Example:
        >>> import jax
        >>> from natgrad_jax import adapters
        >>> numpyro = __import__("pytest").importorskip("numpyro")
        >>> from numpyro.infer import SVI, Trace_ELBO, autoguide
        >>> model = lambda: numpyro.sample("x", numpyro.distributions.Normal(3.0, 0.5))
        >>> guide = autoguide.AutoNormal(model)
        >>> svi = SVI(model, guide, adapters.numpyro(guide), Trace_ELBO(num_particles=8))
        >>> result = svi.run(jax.random.key(0), 200, progress_bar=False)
        >>> bool(abs(result.params["x_auto_loc"] - 3.0) < 0.1), bool(abs(result.params["x_auto_scale"] - 0.5) < 0.1)
        (True, True)
    """
    coordinates = _of_guide(guide)
    natural = _optimizer(coordinates, learning_rate, max_kl)

    def split(params: Parameters) -> tuple[Parameters, Parameters]:
        names = coordinates(params).names
        return {n: params[n] for n in names}, {n: x for n, x in params.items() if n not in names}

    def init_fn(params: Parameters) -> NumpyroState:
        own, rest = split(params)
        if rest and others is None:
            raise TypeError(
                f"others: {', '.join(rest)} not of the guide; pass an optimizer for them, others=optax.adam(…)"
            )
        return NumpyroState(natural.init(own), others.init(rest) if others else ())

    def update_fn(
        updates: Parameters, state: NumpyroState, params: Parameters | None = None, **extra_args: Any
    ) -> tuple[Parameters, NumpyroState]:
        if params is None:
            raise ValueError("params: the natural gradient needs them; call update(grads, state, params)")
        own, rest = split(params)
        slopes, rest_slopes = ({n: updates[n] for n in part} for part in (own, rest))
        step, guide_state = natural.update(slopes, state.guide, own)
        if others is None:
            return step, NumpyroState(guide_state, state.others)
        wrapped = optax.with_extra_args_support(others)
        rest_step, rest_state = wrapped.update(rest_slopes, state.others, rest, **extra_args)
        return step | rest_step, NumpyroState(guide_state, rest_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Model(NamedTuple):
    """A model as `fit` takes it.

    Attributes:
        log_density: log_density(x, data) of one unconstrained x of shape (d,), with the log-determinants of the
            constraints, nats.
        d: dimension.
        data: the arrays among the arguments of the model; others of the same shapes may be passed, under `vmap` too.
        constrain: constrain(x, data) -> the sites of the model by name, deterministic ones included.
    """

    log_density: Callable[[Array, Any], Array]
    d: int
    data: Any
    constrain: Callable[[Array, Any], dict[str, Array]]


def numpyro_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Model:
    """The log-density of a numpyro model on unconstrained vectors, for `fit`.

    Args:
        model: a numpyro model without discrete latent variables.
        args, kwargs: of the model. Arrays among them become `data`; all else (sizes, flags) stays as it is.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> from natgrad_jax import adapters
        >>> numpyro = __import__("pytest").importorskip("numpyro")
        >>> def model(y):
        ...     sd = numpyro.sample("sd", numpyro.distributions.HalfNormal(1.0))
        ...     numpyro.sample("y", numpyro.distributions.Normal(0.0, sd), obs=y)
        >>> problem = adapters.numpyro_model(model, jnp.array([0.5, -1.0, 0.75]))
        >>> family = ng.families.gaussian_full_rank(problem.d)
        >>> result = ng.fit(problem.log_density, family, jax.random.key(0), data=problem.data)
        >>> draws = jax.vmap(lambda x: problem.constrain(x, problem.data))(result.sample(jax.random.key(1), 1000))
        >>> draws["sd"].shape, bool((draws["sd"] > 0).all())
        ((1000,), True)
    """
    from numpyro.infer.util import initialize_model  # type: ignore[import-not-found, unused-ignore]

    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def arguments(data: Any) -> tuple[Any, Any]:
        whole = list(leaves)
        for i, x in zip(places, data, strict=True):
            whole[i] = x
        return jax.tree.unflatten(structure, whole)

    info = initialize_model(jax.random.key(0), model, model_args=args, model_kwargs=kwargs, dynamic_args=True)
    space = Space.of(info.param_info.z)

    def log_density(x: Array, data: Any) -> Array:
        given, named = arguments(data)
        return -info.potential_fn(*given, **named)(space.unravel(x))

    def constrain(x: Array, data: Any) -> dict[str, Array]:
        given, named = arguments(data)
        return info.postprocess_fn(*given, **named)(space.unravel(x))

    return Model(log_density, space.size, tuple(jnp.asarray(leaves[i]) for i in places), constrain)


# Distributions of numpyro and distrax as families.

LARGEST_SUM = 4096  # points of a finite support that are summed over, as in `fit`
FEWEST_DRAWS, DRAWS_PER_PARAMETER = 1024, 10  # ½F ≤ F̂ ≤ 2F, roughly, in every direction


@dataclass(frozen=True)
class Distribution:
    """See `distribution`."""

    make: Callable[[PyTree], Any]
    start: bytes  # the flat vector of the first parameters: arrays have no hash
    space: Space  # of the parameters
    draw: Space  # of one x
    batch_shape: tuple[int, ...]
    values: tuple[float, ...] | None  # of each entry of x, where they are finitely many
    has_entropy: bool
    reparameterised: bool
    num_samples: int
    seed: int

    def init(self, loc: Any = None, scale: Any = None) -> PyTree:
        """The parameters that `distribution` was given; loc and scale mean nothing here."""
        for name, given in (("loc", loc), ("scale", scale)):
            if given is not None:
                raise ValueError(
                    f"{name}: unknown to adapters.distribution; pass the parameters themselves, fit(init=…)"
                )
        flat = self.space.unravel(jnp.asarray(np.frombuffer(self.start, self.space.dtype)))
        return jax.tree.map(lambda x, s: x.astype(s.dtype), flat, self.space.structs())

    def sample(self, params: PyTree, key: Array, n: int) -> PyTree:
        """n draws on the leading axis, in the precision of the parameters."""
        dtype = _precision(params)
        draws = _drawn(self.make(params), key, n)
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, draws)

    def log_prob(self, params: PyTree, x: PyTree) -> Array:
        """log q(x), the sum over the batch of the distribution."""
        got = Space.of(x)
        if (got.treedef, got.shapes) != (self.draw.treedef, self.draw.shapes):
            raise ValueError(f"x: expected one point of shape {self.draw}, got shape {got}; use vmap for several")
        return jnp.sum(self.make(params).log_prob(x)).astype(_precision(params))

    def fisher(self, params: PyTree) -> Closed:
        """Σ q s sᵀ over the support, or the mean of s sᵀ over draws of one key; s = ∂log q/∂θ.

        Its inverse leaves alone what no s sees: it is that of the range, in units of √F_ii. NaN where an s is not
        finite, not a guess.
        """
        return closed(self, params)

    def _rows(self, params: PyTree) -> Array:
        """A with F = AᵀA, shape (rows, p)."""
        x, space = self._points(params), Space.of(params)
        log_q, scores = jax.vmap(lambda x: (self._terms(params, x), jax.jacrev(self._terms)(params, x)))(x)
        weights = jnp.exp(log_q) if self.values else jnp.full_like(log_q, 1 / self.num_samples)
        rows = jnp.sqrt(weights)[..., None] * jax.vmap(jax.vmap(space.ravel))(scores)
        return rows.reshape(-1, space.size)

    def _points(self, params: PyTree) -> PyTree:
        if self.values is None:
            return self.sample(params, jax.random.key(self.seed), self.num_samples)
        return jnp.asarray(self.values, self.draw.dtypes[0])

    def _terms(self, params: PyTree, x: PyTree) -> Array:
        """Logarithms of independent factors of q; of a finite one, of each entry at the value x."""
        if self.values is None:
            return self.log_prob(params, x)[None]
        log_q = self.make(params).log_prob(jnp.broadcast_to(x, self.batch_shape))
        return jnp.ravel(log_q).astype(_precision(params))

    def _mv(self, params: PyTree, v: PyTree) -> PyTree:
        rows, space = self._rows(params), Space.of(params)
        return space.unravel((rows @ space.ravel(v)) @ rows)

    def _solve(self, params: PyTree, g: PyTree) -> PyTree:
        rows, space = self._rows(params), Space.of(params)
        # F⁺ cuts off what is small beside the largest: without units, or a parameter in small ones would stand still.
        units = jax.lax.stop_gradient(jax.vmap(norm, 1)(rows))
        inverse = jnp.where(units > 0, 1 / jnp.where(units > 0, units, 1), 0)
        matrix = (rows * inverse).T @ (rows * inverse)
        return space.unravel(inverse * (jnp.linalg.pinv(matrix, hermitian=True) @ (inverse * space.ravel(g))))

    def retract(self, params: PyTree, step: PyTree) -> PyTree:
        """params + step: the parameters are free."""
        return jax.tree.map(jnp.add, params, step)

    @property
    def k(self) -> int:
        """Number of configurations of a finite support; 0 of any other."""
        return len(self.values) ** math.prod(self.batch_shape) if self.values else 0

    # What a family lacks it must not have, since `fit` asks with hasattr: a property may raise, a method is there.

    @property
    def entropy(self) -> Callable[[PyTree], Array]:
        """entropy(params), in nats, where the distribution has one."""
        if not self.has_entropy:
            raise AttributeError("entropy: the distribution has none")
        return lambda params: jnp.sum(self.make(params).entropy()).astype(_precision(params))

    @property
    def support(self) -> Callable[[], Array]:
        """support(), every x on the leading axis, where there are at most 4096."""
        if not 0 < self.k <= LARGEST_SUM:
            raise AttributeError("support: not known to be finite and small")
        return self._configurations

    def _configurations(self) -> Array:
        assert self.values is not None
        every = list(itertools.product(self.values, repeat=math.prod(self.batch_shape)))
        return jnp.asarray(np.reshape(every, (-1, *self.batch_shape)), self.draw.dtypes[0])


def _precision(params: PyTree) -> Any:
    return jnp.result_type(*jax.tree.leaves(params))


def _drawn(distribution: Any, key: Array, n: int) -> PyTree:
    """n draws, by either of the two conventions."""
    if "seed" in inspect.signature(distribution.sample).parameters:
        return distribution.sample(seed=key, sample_shape=(n,))
    return distribution.sample(key, (n,))


def _values(distribution: Any) -> tuple[float, ...] | None:
    """The values of every entry of x, if each has the same, and few."""
    if not getattr(distribution, "has_enumerate_support", False) or distribution.event_shape:
        return None
    try:
        values = np.asarray(distribution.enumerate_support(expand=False))
    except NotImplementedError:  # numpyro: values that differ along the batch
        return None
    few = values.size == len(values) and len(values) * math.prod(distribution.batch_shape) <= LARGEST_SUM
    return tuple(values.ravel().tolist()) if few else None


def _has_entropy(distribution: Any) -> bool:
    try:
        distribution.entropy()
    except (AttributeError, NotImplementedError):
        return False
    return True


def distribution(
    make: Callable[[PyTree], Any],
    init: PyTree,
    *,
    reparameterised: bool | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> Distribution:
    """A family from a numpyro or distrax distribution, for `fit` and `natural_gradient`.

    The Fisher information is the exact sum Σ q s sᵀ where numpyro enumerates the support of each entry (up to 4096
    points over the batch), else the mean of s sᵀ over draws of one key: the same operator at the same parameters. Its
    inverse is a pseudo-inverse, so parameters may be redundant. A step is added to the parameters.

    Args:
        make: make(params) -> a distribution: `log_prob(x)`, and `sample(key, shape)` as in numpyro or
            `sample(seed=…, sample_shape=…)` as in distrax. Batch axes are independent entries of one x, and log q is
            the sum over them. A function that lives on: families are compared by it, and compiled once for each.
        init: pytree of numbers, the parameters to start from. They must be free, any real number legal: make takes the
            exponential of what has to be positive.
        reparameterised: whether draws are differentiable functions of the parameters. None: what numpyro says
            (`has_rsample`); False for a distribution that does not say, where `fit` then takes the noisy `score`.
            True for one whose draws are not gives wrong gradients.
        num_samples: draws for the Fisher information, where it is no sum; more than parameters, or what they leave
            out stands still. None: 1024, or ten a parameter if that is more. Relative error about √(10/num_samples).
        seed: of those draws.

    Returns:
        A family. `entropy` and `support` are there where the distribution has them. Parameters p, draws n: a solve
        costs n gradients of log q, O(np²) and O(p³).

    Raises:
        TypeError: make is no function, or returns no distribution; init has no floating-point numbers, or is traced.
        ValueError: init empty or not finite; num_samples not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> from natgrad_jax import adapters
        >>> dist = __import__("pytest").importorskip("numpyro.distributions")
        >>> make = lambda params: dist.Gamma(jnp.exp(params["log_shape"]), jnp.exp(params["log_rate"]))
        >>> family = adapters.distribution(make, {"log_shape": 0.0, "log_rate": 0.0})
        >>> result = ng.fit(lambda x: 4 * jnp.log(x) - 2 * x, family, jax.random.key(0))  # Gamma(5, 2)
        >>> [round(float(jnp.exp(x)), 1) for x in (result.params["log_shape"], result.params["log_rate"])]
        [5.0, 2.0]
    """
    params = _checked_start(init)
    made = _made(make, params)
    space = Space.of(params)
    x = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], _drawn(make(params), jax.random.key(0), 1)))
    differentiable = getattr(made, "has_rsample", False) if reparameterised is None else reparameterised
    least = max(FEWEST_DRAWS, DRAWS_PER_PARAMETER * space.size)
    return Distribution(
        make,
        np.asarray(space.ravel(params)).tobytes(),
        space,
        Space.of(x),
        tuple(getattr(made, "batch_shape", ())),
        _values(made),
        _has_entropy(made),
        bool(differentiable),
        least if num_samples is None else dimension(num_samples, "distribution", "num_samples"),
        int(seed),
    )


def _checked_start(init: PyTree) -> PyTree:
    """init as arrays; an error unless they are known, real and finite."""
    params = jax.tree.map(jnp.asarray, init)
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise ValueError("init: expected at least one parameter, got an empty pytree")
    if not concrete(*leaves):
        raise TypeError("init: expected numbers, got values traced by JAX; build the family outside jit, vmap and grad")
    for x in leaves:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"init: expected floating-point numbers, got {x.dtype}; convert with jnp.asarray(x, float)")
    if not bool(all_finite(params)):
        raise ValueError("init: expected finite parameters, got NaN or infinity")
    return params


def _made(make: Any, params: PyTree) -> Any:
    """make(params); a `TypeError` unless it is a distribution."""
    instance = hasattr(make, "log_prob") and not isinstance(make, type)  # those of numpyro are callable
    if instance or not callable(make):
        raise TypeError(
            f"make: expected a function from parameters to a distribution, got {type(make).__name__}; "
            'pass such as lambda params: Normal(params["loc"], jnp.exp(params["log_scale"]))'
        )
    made = make(params)
    if not (callable(getattr(made, "log_prob", None)) and callable(getattr(made, "sample", None))):
        raise TypeError(
            f"make: expected it to return a distribution with sample and log_prob, got {type(made).__name__}; "
            "return one of numpyro.distributions or distrax"
        )
    return made
