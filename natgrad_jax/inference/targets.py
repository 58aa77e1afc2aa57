"""What `fit` asks of a log-density: one scalar, the same every time; and sums over data, by minibatches."""

import dis
import functools
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import jaxpr_as_fun

from natgrad_jax._tree import PyTree, leading_axis
from natgrad_jax.families.shared import dimension

# What each function was seen to use when it was first fitted: what is compiled does not follow a change.
_seen: "weakref.WeakKeyDictionary[Any, dict[str, Any]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Minibatch:
    """See `minibatch`; called with (x, data), the sum over all of the data."""

    log_prior: Callable[[PyTree], Array]
    log_likelihood: Callable[[PyTree, PyTree], Array]
    batch_size: int

    def __call__(self, x: PyTree, data: PyTree) -> Array:
        """log p̃(x), all of it."""
        one = lambda example: self.log_likelihood(x, example)  # noqa: E731
        return self.log_prior(x) + jnp.sum(jax.lax.map(one, data, batch_size=4096))

    def at(self, data: PyTree, key: Array) -> tuple[Callable[[PyTree], Array], Callable[[PyTree], Array]]:
        """The log-density with N/B times the sum over B examples drawn without replacement, and its standard error."""
        total = leading_axis(data, "data")
        size = min(self.batch_size, total)
        chosen = jax.random.choice(key, total, (size,), replace=False)
        batch = jax.tree.map(lambda x: x[chosen], data)
        terms = lambda x: jax.vmap(lambda example: self.log_likelihood(x, example))(batch)  # noqa: E731

        def log_density(x: PyTree) -> Array:
            return self.log_prior(x) + total / size * jnp.sum(terms(x))

        def error(x: PyTree) -> Array:
            missing = total * ((1 - size / total) / max(size - 1, 1)) ** 0.5
            return missing * jnp.std(terms(x))

        return log_density, error


def minibatch(
    log_prior: Callable[[PyTree], Array], log_likelihood: Callable[[PyTree, PyTree], Array], batch_size: int
) -> Minibatch:
    """log p̃(x) = log_prior(x) + Σ_i log_likelihood(x, data_i), of which a step sees B examples, times N/B.

    Pass it to `fit` as the log-density, and the N examples, on the leading axis of every leaf, as `data`. Each step
    draws B of them without replacement, the same for all of its draws; what the final ELBO and k̂ see is the whole sum.
    The noise of a step is √(N/B − 1) posterior standard deviations in every direction: some 2(N/B − 1)/tol steps are
    averaged until it is below `tol`, so small batches want a larger `tol` and `max_steps`.

    Args:
        log_prior: log p(x), nats.
        log_likelihood: log p(y_i | x) of ONE example, nats: log_likelihood(x, example).
        batch_size: B, at least 2, which its standard error needs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> y = 3.0 + jax.random.normal(jax.random.key(1), (10_000,))
        >>> target = ng.inference.minibatch(lambda x: 0.0, lambda x, y: -0.5 * (x[0] - y) ** 2, batch_size=2500)
        >>> result = ng.fit(target, ng.families.gaussian_full_rank(1), jax.random.key(0), data=y)
        >>> abs(float(result.params.loc[0] - jnp.mean(y))) < 0.01  # one posterior standard deviation
        True
    """
    for name, f in (("log_prior", log_prior), ("log_likelihood", log_likelihood)):
        if not callable(f):
            raise TypeError(f"{name}: expected a function, got {type(f).__name__}")
    return Minibatch(log_prior, log_likelihood, dimension(batch_size, "minibatch", "batch_size", 2))


@dataclass(frozen=True, eq=False)
class _Hoisted:
    """A log-density whose closed-over tracers have become arguments, so that `vmap` sees them."""

    closed: Callable[..., Any]

    def __call__(self, x: PyTree, data: PyTree) -> Array:
        """log p̃(x)."""
        values, own = data
        return self.closed(own, x, values)


def checked(log_density: Any, x: PyTree, data: PyTree, what: str) -> tuple[Callable[..., Array], PyTree]:
    """The log-density and its data as a compiled program may take them.

    Args:
        log_density: of one x, or of one x and `data` unless that is None.
        x: one x, as shapes.
        data: its data.
        what: x in words, for the message.

    Raises:
        TypeError: not callable.
        ValueError: not a scalar; not the same when traced twice; a variable that it uses has changed since then.
    """
    if not callable(log_density):
        raise TypeError(f"log_density: expected a function of one x, got {type(log_density).__name__}")
    if isinstance(log_density, Minibatch):
        if data is None:
            raise ValueError("data: expected the examples of inference.minibatch, on the leading axis; got None")
        leading_axis(data, "data")
        one = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], data))
        _check_scalar(jax.eval_shape(log_density.log_likelihood, x, one), "one x and one example", "log_likelihood")
    arguments = (x,) if data is None else (x, data)
    jaxpr = checked_twice(log_density, arguments, "log_density", what)
    if jaxpr is None:
        return log_density, data
    if isinstance(log_density, Minibatch):
        raise ValueError(
            "log_density: inference.minibatch cannot close over what jit or vmap traces; pass it through `data`"
        )
    return _hoisted(jaxpr, jax.tree.structure(arguments)), (data, list(jaxpr.consts))


def checked_twice(f: Callable[..., Any], arguments: tuple[PyTree, ...], name: str, what: str) -> Any:
    """Raise unless f is a real scalar, and the same function whenever it is called; see `checked`.

    Returns:
        Its jaxpr if it closes over what jit or vmap traces; else None, and its variables are remembered.
    """
    try:
        hash(f)
    except TypeError:
        raise TypeError(
            f"{name}: expected a function that can be hashed, as a program is compiled for each; "
            f"got {type(f).__name__}. Wrap it, lambda x: f(x), once"
        ) from None
    if _unchanged(f, name):
        _check_scalar(jax.eval_shape(f, *arguments), what, name)
        return None
    # A new function each time: JAX would remember the trace of the same one.
    trace = lambda: jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*arguments)  # noqa: E731
    (jaxpr, out), (again, _) = trace(), trace()
    _check_scalar(out, what, name)
    if not _same(jaxpr, again):
        raise ValueError(
            f"{name}: expected the same function at every call, got two different ones when it was traced twice. "
            "It depends on Python state (a counter, numpy.random): pass what changes through `data`"
        )
    if any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts):
        return jaxpr
    _remember(f)
    return None


def _check_scalar(out: Any, what: str, name: str) -> None:
    if getattr(out, "shape", None) != ():
        got = jax.tree.map(lambda s: getattr(s, "shape", type(s).__name__), out)
        raise ValueError(
            f"{name}: expected a scalar for {what}, got {got}. "
            "Sum over data points and components; there is no batch axis."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{name}: expected a real floating-point number, got {out.dtype}")


def _hoisted(jaxpr: Any, structure: Any) -> _Hoisted:
    def closed(consts: list[Array], x: PyTree, data: PyTree) -> Array:
        arguments = structure.unflatten(jax.tree.leaves((x, data) if structure.num_leaves else (x,)))
        return jaxpr_as_fun(jaxpr.replace(consts=consts))(*jax.tree.leaves(arguments))[0]

    return _Hoisted(closed)


def _same(one: Any, other: Any) -> bool:
    """Whether two traces are the same program with the same constants."""
    text = lambda jaxpr: re.sub(r"0x[0-9a-f]+", "", str(jaxpr.jaxpr))  # noqa: E731
    if len(one.consts) != len(other.consts) or text(one) != text(other):
        return False
    return all(_equal(a, b) for a, b in zip(one.consts, other.consts, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True
    if jnp.issubdtype(jnp.asarray(a).dtype, jnp.inexact):
        return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
    return a.shape == b.shape and bool(jnp.all(a == b))


def _uses(f: Any, seen: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The variables that a function closes over or reads from its module, by name, but for those that it writes.

    Those of functions of the same module that it calls too. What it reads through objects is not seen, and what is
    changed in place neither.
    """
    if isinstance(f, Minibatch):
        return _uses(f.log_prior) | _uses(f.log_likelihood)
    if not isinstance(f, FunctionType) or f in seen:
        return {}
    cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
    local = {name: cell.cell_contents for name, cell in cells if _is_set(cell)}
    read, written = _names(f.__code__)
    known = {name: f.__globals__[name] for name in read if name in f.__globals__}
    used = known | {name: value for name, value in local.items() if name not in written}
    for other in list(used.values()):
        if isinstance(other, FunctionType) and other.__globals__ is f.__globals__:
            used = _uses(other, (*seen, f)) | used
    return used


@functools.cache
def _names(code: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that a function reads and does not write, and what it writes outside of itself."""
    steps = list(dis.get_instructions(code))
    written = frozenset(step.argval for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF"))
    return frozenset(step.argval for step in steps if step.opname == "LOAD_GLOBAL") - written, written


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _remember(f: Any) -> None:
    try:
        _seen[f] = _uses(f)
    except TypeError:  # cannot be weakly referenced, or has no hash
        return


def _unchanged(f: Any, name: str) -> bool:
    """Whether it was seen before; a `ValueError` if a variable that it uses is another one now."""
    try:
        before = _seen.get(f)
    except TypeError:
        return False
    if before is None:
        return False
    for variable, value in _uses(f).items():
        if not _identical(before.get(variable), value):
            raise ValueError(
                f"{name}: {variable!r}, which it uses, has changed since it was compiled, and the compiled program "
                "would not see it. Pass what changes through `data`, or define the function anew"
            )
    return True


def _identical(a: Any, b: Any) -> bool:
    """Whether a trace would see no difference."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic | Array):
        return a.shape == b.shape and a.dtype == b.dtype and _equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_identical, a, b))
    if isinstance(a, FunctionType):
        return a.__code__ == b.__code__ and _identical(list(_uses(a).values()), list(_uses(b).values()))
    return isinstance(a, int | float | str | bytes) and a == b
