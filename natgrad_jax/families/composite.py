"""Families made of others: products over a pytree, mixtures of Gaussians, and the same family in other coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import PyTreeDef

from natgrad_jax._tree import PyTree
from natgrad_jax.families.discrete import Categorical
from natgrad_jax.families.gaussians import FullRankParams, GaussianFullRank
from natgrad_jax.families.shared import closed, dimension, located, point
from natgrad_jax.operators import Blocks, Closed


def solved(operator: Any, g: PyTree) -> PyTree:
    """F⁻¹g of the operators that families return."""
    if isinstance(operator, Closed) and operator.solve is not None:
        return operator.solve(g)
    if isinstance(operator, Blocks):
        return operator.map(solved, g)
    if hasattr(operator, "entries"):
        return jax.tree.map(lambda x, d: jnp.where(d > 0, x / jnp.where(d > 0, d, 1), 0), g, operator.entries)
    inverse = jnp.linalg.pinv(operator.dense(), hermitian=True)
    return operator.space.unravel(inverse @ operator.space.ravel(g))


@dataclass(frozen=True)
class Product:
    """See `product`."""

    members: tuple[Any, ...]
    structure: PyTreeDef

    @property
    def reparameterised(self) -> bool:
        """Whether the draws of every member are differentiable."""
        return all(member.reparameterised for member in self.members)

    def _each(self, method: str, *trees: PyTree) -> PyTree:
        """The method of every member, on its own parts."""
        lacking = [type(member).__name__ for member in self.members if not hasattr(member, method)]
        if lacking:
            raise TypeError(f"families: {lacking[0]} has no {method}")
        parts = zip(*(self.structure.flatten_up_to(tree) for tree in trees), strict=True)
        results = [getattr(m, method)(*own) for m, own in zip(self.members, parts, strict=True)]
        return self.structure.unflatten(results)

    def init(self, loc: Any = None, scale: Any = None) -> PyTree:
        """Parameters of every member; `loc` and `scale` are pytrees like the families, or None for the defaults."""

        def spread(given: Any) -> list[Any]:
            return [None] * len(self.members) if given is None else self.structure.flatten_up_to(given)

        both = zip(self.members, spread(loc), spread(scale), strict=True)
        return self.structure.unflatten([member.init(x, y) for member, x, y in both])

    def sample(self, params: PyTree, key: Array, n: int) -> PyTree:
        """A pytree of n draws of every member."""
        members = zip(self.members, self.structure.flatten_up_to(params), strict=True)
        keys = jax.random.split(key, len(self.members))
        return self.structure.unflatten([m.sample(p, k, n) for (m, p), k in zip(members, keys, strict=True)])

    def log_prob(self, params: PyTree, x: PyTree) -> Array:
        """The sum over the members."""
        return jnp.sum(jnp.stack(self.structure.flatten_up_to(self._each("log_prob", params, x))))

    def entropy(self, params: PyTree) -> Array:
        """The sum over the members."""
        return jnp.sum(jnp.stack(self.structure.flatten_up_to(self._each("entropy", params))))

    def fisher(self, params: PyTree) -> Blocks:
        """The Fisher information of each member, in its place."""
        return Blocks(self._each("fisher", params))

    def retract(self, params: PyTree, step: PyTree) -> PyTree:
        """Each member by itself."""
        return self._each("retract", params, step)

    def statistics(self, x: PyTree) -> PyTree:
        """T(x) of every member."""
        return self._each("statistics", x)

    def to_natural(self, params: PyTree) -> PyTree:
        """The natural parameters of every member."""
        return self._each("to_natural", params)

    def from_natural(self, natural: PyTree) -> PyTree:
        """The inverse of `to_natural`."""
        return self._each("from_natural", natural)

    def to_mean(self, params: PyTree) -> PyTree:
        """The mean parameters of every member."""
        return self._each("to_mean", params)

    def from_mean(self, mean: PyTree) -> PyTree:
        """The inverse of `to_mean`."""
        return self._each("from_mean", mean)


def product(families: PyTree) -> Product:
    """Independent families, one at each leaf of a pytree; x, parameters and Fisher information have its shape.

    Args:
        families: pytree of families.

    Example:
        >>> import jax
        >>> import natgrad_jax as ng
        >>> family = ng.families.product({"rate": ng.families.gamma(1), "w": ng.families.gaussian_mean_field(3)})
        >>> jax.tree.map(lambda x: x.shape, family.sample(family.init(), jax.random.key(0), 5))
        {'rate': (5, 1), 'w': (5, 3)}
    """
    members, structure = jax.tree.flatten(families)
    if not members:
        raise ValueError("families: expected at least one family, got an empty pytree")
    for member in members:
        if not callable(getattr(member, "log_prob", None)):
            raise TypeError(f"families: expected families at the leaves, got {type(member).__name__}")
    return Product(tuple(members), structure)


class MixtureParams(NamedTuple):
    """Weights softmax(logits), shape (k,); locs (k, d) and lower triangles (k, d, d) of the components."""

    logits: Array
    components: FullRankParams


@dataclass(frozen=True)
class GaussianMixture:
    """See `gaussian_mixture`."""

    d: int
    k: int
    reparameterised = False

    @property
    def _weights(self) -> Categorical:
        return Categorical(self.k)

    @property
    def _component(self) -> GaussianFullRank:
        return GaussianFullRank(self.d)

    def init(self, loc: Any = None, scale: Any = None) -> MixtureParams:
        """Equal weights. loc: (k, d), or (d,) or None (0) for components spread along the first axis by `scale` (1)."""
        several = jnp.ndim(0.0 if loc is None else loc) == 2
        loc, scale = located(loc, scale, (self.k, self.d) if several else (self.d,))
        scale = scale[0] if several else scale
        if not several:
            # Components in one place would have one gradient, and stay together.
            places = jnp.linspace(-1, 1, self.k, dtype=loc.dtype) if self.k > 1 else jnp.zeros(1, loc.dtype)
            loc = loc + places[:, None] * scale * (jnp.arange(self.d) == 0)
        factor = jnp.broadcast_to(jnp.diag(scale), (self.k, self.d, self.d))
        return MixtureParams(jnp.zeros(self.k, scale.dtype), FullRankParams(loc, factor))

    def sample(self, params: MixtureParams, key: Array, n: int) -> Array:
        """n draws, shape (n, d)."""
        which, normal = jax.random.split(key)
        chosen = self._weights.sample(params.logits, which, n)
        eps = jax.random.normal(normal, (n, self.d), params.logits.dtype)
        factors = jnp.tril(params.components.scale_tril)[chosen]
        return params.components.loc[chosen] + jnp.einsum("nij,nj->ni", factors, eps)

    def log_prob(self, params: MixtureParams, x: Array) -> Array:
        """log Σ_k π_k N(x; μ_k, L_k L_kᵀ)."""
        x = point(x, (self.d,), params.logits.dtype)
        inside = jax.vmap(lambda component: self._component.log_prob(component, x))(params.components)
        return jax.nn.logsumexp(jax.nn.log_softmax(params.logits) + inside)

    def fisher(self, params: MixtureParams) -> Blocks:
        """The Fisher information of x together with the number of its component: π_k F_k for each, diag(π) − ππᵀ.

        An upper bound of that of x alone, which has no closed form.
        """
        components: Any = closed(self, params, params.components)
        weights: Any = self._weights.fisher(params.logits)
        return Blocks(MixtureParams(weights, components))

    def _mv(self, params: MixtureParams, v: FullRankParams) -> FullRankParams:
        products = jax.vmap(lambda component, v: self._component.fisher(component).times(v))(params.components, v)
        return self._by_weight(jnp.exp(jax.nn.log_softmax(params.logits)), products)

    def _solve(self, params: MixtureParams, g: FullRankParams) -> FullRankParams:
        steps = jax.vmap(lambda component, g: solved(self._component.fisher(component), g))(params.components, g)
        weights = jnp.exp(jax.nn.log_softmax(params.logits))
        present = weights > jnp.finfo(weights.dtype).tiny  # a component without weight has no step
        return self._by_weight(jnp.where(present, 1 / jnp.where(present, weights, 1), 0), steps)

    def _by_weight(self, weights: Array, v: FullRankParams) -> FullRankParams:
        return jax.vmap(lambda weight, v: jax.tree.map(lambda x: weight * x, v))(weights, v)

    def retract(self, params: MixtureParams, step: MixtureParams) -> MixtureParams:
        """logits + step, and the retraction of every component."""
        components = jax.vmap(self._component.retract)(params.components, step.components)
        return MixtureParams(params.logits + step.logits, components)


def gaussian_mixture(d: int, k: int) -> GaussianMixture:
    """Σ_k π_k N(μ_k, L_k L_kᵀ) on R^d with parameters `MixtureParams`.

    The metric is the Fisher information of (x, component), which is block diagonal and solved in closed form. There is
    no entropy in closed form: `inference.elbo` estimates it with the rest.

    Reference: Lin, Khan, Schmidt, "Fast and simple natural-gradient variational inference with mixture of exponential-
    family approximations" (2019), section 3.

    Example:
        >>> import jax
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_mixture(2, 3)
        >>> family.sample(family.init(), jax.random.key(0), 5).shape
        (5, 2)
    """
    return GaussianMixture(dimension(d, "gaussian_mixture"), dimension(k, "gaussian_mixture", "k"))


@dataclass(frozen=True)
class Chart:
    """See `chart`."""

    family: Any
    to: Callable[[PyTree], PyTree]
    fro: Callable[[PyTree], PyTree]

    @property
    def reparameterised(self) -> bool:
        """Whether the draws are differentiable."""
        return self.family.reparameterised

    def init(self, loc: Any = None, scale: Any = None) -> PyTree:
        """What the family starts from, in these coordinates."""
        return self.fro(self.family.init(loc, scale))

    def sample(self, params: PyTree, key: Array, n: int) -> PyTree:
        """n draws."""
        return self.family.sample(self.to(params), key, n)

    def log_prob(self, params: PyTree, x: PyTree) -> Array:
        """log q(x)."""
        return self.family.log_prob(self.to(params), x)

    def entropy(self, params: PyTree) -> Array:
        """In nats."""
        return self.family.entropy(self.to(params))

    def statistics(self, x: PyTree) -> PyTree:
        """T(x) of the family."""
        return self.family.statistics(x)

    def to_natural(self, params: PyTree) -> PyTree:
        """The natural parameters of the family."""
        return self.family.to_natural(self.to(params))

    def from_natural(self, natural: PyTree) -> PyTree:
        """The inverse of `to_natural`."""
        return self.fro(self.family.from_natural(natural))

    def to_mean(self, params: PyTree) -> PyTree:
        """The mean parameters of the family."""
        return self.family.to_mean(self.to(params))

    def from_mean(self, mean: PyTree) -> PyTree:
        """The inverse of `to_mean`."""
        return self.fro(self.family.from_mean(mean))

    def fisher(self, params: PyTree) -> Closed:
        """JᵀFJ with J the derivative of `to`; its inverse is (J⁻¹)F⁻¹(J⁻¹)ᵀ with J⁻¹ that of `fro`."""
        return closed(self, params)

    def _mv(self, params: PyTree, v: PyTree) -> PyTree:
        inside, velocity = jax.jvp(self.to, (params,), (v,))
        return jax.vjp(self.to, params)[1](self.family.fisher(inside).mv(velocity))[0]

    def _solve(self, params: PyTree, g: PyTree) -> PyTree:
        inside = self.to(params)
        pulled = jax.vjp(self.fro, inside)[1](g)[0]
        operator = self.family.fisher(inside)
        return jax.jvp(self.fro, (inside,), (solved(operator, pulled),))[1]

    def retract(self, params: PyTree, step: PyTree) -> PyTree:
        """fro(R(to(φ), Jδφ)): the family's own retraction, seen from here."""
        inside, velocity = jax.jvp(self.to, (params,), (step,))
        return self.fro(self.family.retract(inside, velocity))


def chart(family: Any, to: Callable[[PyTree], PyTree], fro: Callable[[PyTree], PyTree]) -> Chart:
    """The same family, with its geometry, in somebody else's coordinates.

    Args:
        family: of `families`.
        to: from these coordinates to the parameters of the family, differentiable.
        fro: its inverse, differentiable.

    Functions that live on: families are compared by them, and compiled once for each.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> normal = ng.families.gaussian_mean_field(1)
        >>> to = lambda phi: ng.families.MeanFieldParams(phi["mean"], jnp.log(phi["sd"]))
        >>> fro = lambda params: {"mean": params.loc, "sd": jnp.exp(params.log_scale)}
        >>> family = ng.families.chart(normal, to, fro)
        >>> round(float(family.fisher(family.init(scale=2.0)).dense()[1, 1]), 4)  # 2/σ²
        0.5
    """
    if not callable(getattr(family, "log_prob", None)):
        raise TypeError(f"family: expected one of natgrad_jax.families, got {type(family).__name__}")
    for name, f in (("to", to), ("fro", fro)):
        if not callable(f):
            raise TypeError(f"{name}: expected a function between coordinates, got {type(f).__name__}")
    return Chart(family, to, fro)
