"""What a metric costs to build, over the floor: the same Jacobian rows written by hand, one reverse pass for each row.

The floor is `jax.vmap` of one `vjp` a row, jitted, rows as pytrees, nothing else: no weights, no centring, no checks.
For products alone it is one forward and one reverse pass of the same function, and for a Hessian `jax.hessian`. What is
above it is what the metric adds: draws, probabilities, roots of losses, centring. All in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import natgrad_jax as ng
from benchmarks.timing import interleaved

CLASSES = 4


def mlp(p: int) -> tuple[Any, Any]:
    """A network of one hidden layer with about p parameters, 16 inputs and 4 outputs, and its parameters."""
    width = max(p // (16 + CLASSES + 1), 1)
    key = iter(jax.random.split(jax.random.key(0), 4))
    normal = lambda *shape: jax.random.normal(next(key), shape, jnp.float32)
    params = {"w": normal(width, 16) / 4, "b": normal(width), "v": normal(CLASSES, width) / width**0.5}
    return lambda t, x: t["v"] @ jnp.tanh(t["w"] @ x + t["b"]), params


def rows(outputs: Any, k: int) -> Callable[[Any, Any], Any]:
    """The floor: the Jacobian of outputs(params, x), k rows for each x."""

    def of_one(params: Any, x: Any) -> Any:
        _, pull = jax.vjp(lambda t: outputs(t, x), params)
        if k == 1:
            return pull(jnp.ones((), jnp.float32))[0]
        return jax.vmap(lambda u: pull(u)[0])(jnp.eye(k, dtype=jnp.float32))

    return jax.vmap(of_one, in_axes=(None, 0))


def cases(n: int, p: int) -> dict[str, tuple[Any, Any]]:
    """For each metric the call that builds its operator, and its floor."""
    net, params = mlp(p)
    xs = jax.random.normal(jax.random.key(1), (n, 16), jnp.float32)
    labels = jnp.arange(n) % CLASSES
    log_prob = lambda t, y, x: jax.nn.log_softmax(net(t, x))[y]
    label = lambda t, xy: log_prob(t, xy[1], xy[0])
    outputs = lambda t, batch: jnp.tanh(batch[0] @ t["w"].T + t["b"]) @ t["v"].T
    draw = lambda t, key, x: jax.random.categorical(key, net(t, x))
    log_psi = lambda t, x: jnp.sum(net(t, x))
    complex_psi = lambda t, x: jax.lax.complex(net(t, x)[0], net(t, x)[1])
    pair = lambda t, x: net(t, x)[:2]
    field = lambda t, x: net(t, x)[0]
    slopes = lambda t, x: jnp.concatenate([field(t, x)[None], jax.grad(field, argnums=1)(t, x)])
    m, batch, key = ng.metrics, (xs, labels), jax.random.key(2)
    softmax = m.losses.softmax_cross_entropy()
    generic = lambda z, batch: jnp.mean(jnp.sum(jnp.logaddexp(z, -z), axis=-1))
    one, four = rows(label, 1), rows(net, CLASSES)
    whole = lambda t: outputs(t, batch)
    few = {
        "empirical_fisher": (lambda t: m.empirical_fisher(label)(t, batch=batch), lambda t: one(t, batch)),
        "monte_carlo_fisher": (
            lambda t: m.monte_carlo_fisher(log_prob, draw, 1, inputs=True)(t, batch=xs, key=key),
            lambda t: one(t, batch),
        ),
        "fisher, 4 labels": (
            lambda t: m.fisher(log_prob, jnp.arange(CLASSES), inputs=True)(t, batch=xs), lambda t: four(t, xs)
        ),
        "gauss_newton, softmax": (lambda t: m.gauss_newton(outputs, softmax)(t, batch=batch), lambda t: four(t, xs)),
        "gauss_newton, any loss": (lambda t: m.gauss_newton(outputs, generic)(t, batch=batch), lambda t: four(t, xs)),
        "least_squares": (lambda t: m.least_squares(outputs)(t, batch=batch), lambda t: four(t, xs)),
        "quantum_geometric, real": (
            lambda t: m.quantum_geometric(log_psi)(t, samples=xs), lambda t: rows(log_psi, 1)(t, xs)
        ),
        "quantum_geometric, complex": (
            lambda t: m.quantum_geometric(complex_psi)(t, samples=xs), lambda t: rows(pair, 2)(t, xs)
        ),
        "energy": (lambda t: m.energy(net)(t, points=xs), lambda t: four(t, xs)),
        "products, one": (
            lambda t: m.gauss_newton(outputs, softmax, matrix_free=True)(t, batch=batch).mv(t),
            lambda t: jax.vjp(whole, t)[1](jax.jvp(whole, (t,), (t,))[1])[0],
        ),
    }  # fmt: skip
    if n * p <= 2_000_000:
        few["sobolev, H¹"] = (lambda t: m.sobolev(field)(t, points=xs), lambda t: rows(slopes, 17)(t, xs))
    if p <= 1000:
        potential = lambda t: jnp.mean(jax.nn.logsumexp(outputs(t, batch), axis=-1))
        few["hessian"] = (lambda t: m.hessian(potential)(t).dense(), jax.hessian(potential))
    return {name: ((build, params), (floor, params)) for name, (build, floor) in few.items()}


def run(fast: bool) -> list[dict[str, Any]]:
    """One row for each metric and size."""
    sizes = [(32, 200)] if fast else [(64, 1000), (1024, 1000), (64, 30_000), (512, 30_000), (64, 300_000)]
    out = []
    for n, p in sizes:
        for name, ((build, params), (floor, _)) in cases(n, p).items():
            compiled = {"metric": jax.jit(build), "floor": jax.jit(floor)}
            calls: dict[str, Callable[[], Any]] = {key: functools.partial(f, params) for key, f in compiled.items()}
            times = interleaved(calls, repeats=2 if fast else 25)
            metric, plain = times["metric"], times["floor"]
            out.append({
                "metric": name,
                "n": n,
                "p": sum(x.size for x in jax.tree.leaves(params)),
                "over the floor, min": metric["min"] / plain["min"],
                "over the floor, median": metric["median"] / plain["median"],
                "floor, ms": 1e3 * plain["min"],
                "compile, s": metric["first"],
            })  # fmt: skip
    return out
