"""How the gradient of the ELBO is estimated: values to pass to `fit`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array

from natgrad_jax.inference.draws import Draws, independent


@dataclass(frozen=True)
class Estimator:
    """An estimator of the gradient of the ELBO; `draws` None leaves them to the family."""

    draws: Draws | None = None

    @property
    def exact(self) -> bool:
        """Whether the ELBO itself is computed, and not only estimated."""
        return False


class Stl(Estimator):
    """See `stl`."""


class Reparameterised(Estimator):
    """See `reparameterised`."""


class Price(Estimator):
    """See `price`."""


class Score(Estimator):
    """See `score`."""


@dataclass(frozen=True)
class Exact(Estimator):
    """See `exact`."""

    chunk_size: int | None = None

    @property
    def exact(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class ClosedForm(Estimator):
    """See `closed_form`."""

    expected: Callable[..., Array] = lambda params: params

    @property
    def exact(self) -> bool:
        """True."""
        return True


def stl(draws: int | Draws | None = None) -> Estimator:
    """∇_θ E[log p̃(x_θ(ε)) − log q(x_θ(ε))] with log q held fixed: no variance where q = p̃.

    Args:
        draws: a number of independent draws, or draws of a kind (`antithetic`, `orthogonal`, `quasi_random`,
            `gauss_hermite`, `fixed`), for families whose draws are functions of normal ones. None: what `fit` takes.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.stl(16).draws.n
        16

    Reference: Roeder, Wu, Duvenaud, "Sticking the landing" (2017), equation 7.
    """
    return Stl(_as_draws(draws))


def reparameterised(draws: int | Draws | None = None) -> Estimator:
    """∇_θ (E log p̃(x_θ(ε)) + H(q_θ)) with the entropy in closed form. Arguments as those of `stl`.

    The variance at q = p̃ is not 0. Preferable where q is far from p̃ and its density is expensive, and with `fixed`
    draws, for which it is the gradient of the average.

    Example:
        >>> import natgrad_jax as ng
        >>> type(ng.inference.reparameterised(ng.inference.antithetic(32))).__name__
        'Reparameterised'

    Reference: Kingma and Welling, "Auto-encoding variational Bayes" (2014), equation 7.
    """
    return Reparameterised(_as_draws(draws))


def price(draws: int | Draws | None = None) -> Estimator:
    """Gradients in the mean from ∇log p̃ and in the covariance from ½∇²log p̃ (theorems of Bonnet and Price).

    For a full-rank, precision or mean-field Gaussian. One draw has no noise for a quadratic log-density. Costs d
    Hessian-vector products, jvp of grad, a draw. Arguments as those of `stl`.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.price(2).draws.n
        2

    Reference: Opper and Archambeau, "The variational Gaussian approximation revisited" (2009), section 2.
    """
    return Price(_as_draws(draws))


def score(draws: int | Draws | None = None) -> Estimator:
    """E[(log p̃ − log q − b) ∇_θ log q] with b the mean of the other draws: no gradient of log p̃ is taken.

    For discrete families, and for log-densities that cannot be differentiated. At least two draws. Arguments as those
    of `stl`; the noise is far larger.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.score(128).draws.n
        128

    Reference: Kool, van Hoof, Welling, "Buy 4 REINFORCE samples, get a baseline for free!" (2019), equation 4.
    """
    draws = _as_draws(draws)
    if draws is not None and draws.n < 2:
        raise ValueError(f"draws: expected at least 2 for a leave-one-out baseline, got {draws.n}")
    return Score(draws)


def exact(chunk_size: int | None = None) -> Estimator:
    """The sum over every x of a finite family (`family.support()`), in pieces of `chunk_size`.

    Example:
        >>> import natgrad_jax as ng
        >>> ng.inference.exact().exact
        True
    """
    return Exact(chunk_size=chunk_size)


def closed_form(expected: Callable[..., Array]) -> Estimator:
    """The ELBO as expected(params) + H(q), with expected(params[, data]) = E_q log p̃ in nats, by you.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> family = ng.families.gaussian_mean_field(1)
        >>> expected = lambda q: -0.5 * jnp.sum(q.loc**2 + jnp.exp(2 * q.log_scale)) / 9
        >>> log_density = lambda x: -0.5 * jnp.sum(x**2) / 9
        >>> options = {"estimator": ng.inference.closed_form(expected), "tol": 1e-5}
        >>> result = ng.fit(log_density, family, jax.random.key(0), **options)
        >>> round(float(jnp.exp(result.params.log_scale[0])), 2)
        3.0
    """
    if not callable(expected):
        raise TypeError(f"expected: expected a function of the parameters, got {type(expected).__name__}")
    return ClosedForm(expected=expected)


def _as_draws(draws: Any) -> Draws | None:
    if draws is None or isinstance(draws, Draws):
        return draws
    try:
        return independent(draws)
    except ValueError:
        raise ValueError(
            f"draws: expected a positive whole number or draws such as inference.antithetic(64), got {draws!r}"
        ) from None


def check_estimator(estimator: Any) -> None:
    """A `TypeError` unless it is one."""
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator: expected one of inference.stl, reparameterised, price, score, exact, closed_form, called; "
            f"got {estimator!r}"
        )
