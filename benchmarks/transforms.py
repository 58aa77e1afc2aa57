"""What a transformation costs beside its metric and its solve, and what a period saves.

The floor is metric and solve alone, in one compiled function. Rules that look at the loss are given its value, as a
training loop has it. Periods are timed as time per step over whole periods, in a loop of donated updates, in a scan,
and for many problems under `vmap`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import natgrad_jax as ng
from benchmarks.timing import interleaved
from natgrad_jax import transforms
from natgrad_jax.transforms import precondition, scale_step, with_metric

DAMPING = 1e-2


def model(params: Any, batch: Any) -> Any:
    """A tanh network with one output."""
    return (jnp.tanh(batch[0] @ params["w1"] + params["b1"]) @ params["w2"])[:, 0] - batch[1]


METRIC = ng.metrics.least_squares(model)


def loss(params: Any, batch: Any) -> Any:
    """½‖r‖²."""
    return 0.5 * jnp.sum(model(params, batch) ** 2)


def problem(n: int, width: int, inputs: int = 20) -> tuple[Any, Any]:
    """(params, batch) in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)
    params = {
        "w1": normal(keys[0], inputs, width) / inputs**0.5,
        "b1": jnp.zeros(width, jnp.float32),
        "w2": normal(keys[1], width, 1) / width**0.5,
    }
    return params, (normal(keys[2], n, inputs), normal(keys[3], n))


def rules() -> dict[str, Any]:
    """The transformations that have the cost of one metric and one solve."""
    inner = lambda: precondition(damping=DAMPING)
    wrapped = {
        "trust_region": transforms.trust_region(scale_step(inner(), 0.1), 1e-3),
        "normalise": transforms.normalise(inner()),
        "heavy_ball": transforms.heavy_ball(scale_step(inner(), 0.1)),
        "spring": transforms.spring(inner(), 0.9),
        "levenberg_marquardt": transforms.levenberg_marquardt(inner(), DAMPING),
        "quadratic_step": transforms.quadratic_step(inner()),
        "grid_search, 8 steps": transforms.grid_search(inner(), [2.0**-i for i in range(8)]),
        "backtracking": transforms.backtracking(inner()),
        "geodesic": transforms.geodesic(inner(), model),
    }
    made = {name: with_metric(METRIC, rule) for name, rule in wrapped.items()}
    return {"natural_gradient": ng.natural_gradient(0.1, METRIC, damping=DAMPING)} | made


def run(fast: bool) -> list[dict[str, Any]]:
    """Overheads at two sizes, then periods."""
    sizes = ((200, 10), (50, 60)) if fast else ((2000, 60), (512, 900))
    repeats = 2 if fast else 9
    rows = [row for n, width in sizes for row in overheads(n, width, repeats)]
    rows += [period(n, width, 10, 2 if fast else 5) for n, width in sizes]
    return [*rows, period_of_many(20 if fast else 300, 2 if fast else 5)]


def overheads(n: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each rule."""
    params, batch = problem(n, width)
    g, value = jax.grad(loss)(params, batch), loss(params, batch)
    floor = jax.jit(lambda p, g: ng.solvers.solve(METRIC(p, batch=batch), g, damping=DAMPING).value)

    def call(tx: Any) -> Callable[[], Any]:
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, batch=batch, value_fn=loss, value=value))
        state = tx.init(params)
        return lambda: update(g, state, params)

    calls = {"metric and solve": lambda: floor(params, g)} | {name: call(tx) for name, tx in rules().items()}
    calls["metric and solve, again"] = lambda: floor(params, g)  # how far two of the same are apart
    times = interleaved(calls, repeats, pause=0.05)
    base = times["metric and solve"]
    return [
        {"what": name, "n": n, "p": size(params), "ms, median": 1e3 * t["median"]}
        | {f"over metric and solve, {what}": t[what] / base[what] for what in ("min", "median")}
        for name, t in times.items()
    ]


def period(n: int, width: int, k: int, repeats: int) -> dict[str, Any]:
    """Time per step of a loop and of a scan with the metric every step, and every k-th."""
    params, batch = problem(n, width)
    g = jax.grad(loss)(params, batch)
    plain = ng.natural_gradient(1e-3, METRIC, damping=DAMPING)
    periodic = transforms.every_k(plain, k, like={"batch": batch})
    # What is left of a step when metric and factorisation are at hand.
    rest = transforms.every_k(plain, 10**6, like={"batch": batch})
    states = {"every step": plain.init(params), "every k": periodic.init(params)}
    states["never"] = jax.jit(lambda p, s: rest.update(g, s, p, batch=batch)[1])(params, rest.init(params))
    calls: dict[str, Callable[[], Any]] = {}
    for name, tx in {"every step": plain, "every k": periodic, "never": rest}.items():
        step = functools.partial(_step, tx, g, batch)
        calls[f"loop, {name}"] = _loop(jax.jit(step, donate_argnums=0), (params, states[name]), 2 * k)
        calls[f"scan, {name}"] = _scan(step, (params, states[name]), 2 * k)
    times = interleaved(calls, repeats, pause=0.05)
    ms = {name: 1e3 * t["median"] / (2 * k) for name, t in times.items()}
    row = {"what": f"every_k({k})", "n": n, "p": size(params)} | {f"{name}, ms a step": x for name, x in ms.items()}
    for how in ("loop", "scan"):
        each, kth, never = (ms[f"{how}, {name}"] for name in ("every step", "every k", "never"))
        row[f"{how}: times cheaper"] = each / kth
        row[f"{how}, curvature part: times cheaper"] = (each - never) / max(kth - never, 1e-9)
    return row


def period_of_many(lanes: int, repeats: int, k: int = 10) -> dict[str, Any]:
    """The same for many problems in one call."""
    params, batch = problem(200, 4)
    plain = ng.natural_gradient(1e-3, METRIC, damping=DAMPING)
    many = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * lanes), tree)
    g, all_batches = jax.grad(loss)(params, batch), many(batch)

    def call(tx: Any, warm: bool = False) -> Callable[[], Any]:
        one = lambda carry, batch: jax.lax.scan(
            lambda carry, _: (_step(tx, g, batch, carry), None), carry, None, length=2 * k
        )[0]
        state = tx.update(g, tx.init(params), params, batch=batch)[1] if warm else tx.init(params)
        run, start = jax.jit(jax.vmap(one)), many((params, state))
        return lambda: run(start, all_batches)

    periodic, rest = (transforms.every_k(plain, period, like={"batch": batch}) for period in (k, 10**6))
    calls = {"every step": call(plain), "every k": call(periodic), "never": call(rest, warm=True)}
    ms = {name: 1e3 * t["median"] / (2 * k) for name, t in interleaved(calls, repeats).items()}
    row: dict[str, Any] = {"what": f"every_k({k}) under vmap", "problems": lanes, "n": 200, "p": size(params)}
    row |= {f"{name}, ms a step": value for name, value in ms.items()}
    row["times cheaper"] = ms["every step"] / ms["every k"]
    row["curvature part: times cheaper"] = (ms["every step"] - ms["never"]) / max(ms["every k"] - ms["never"], 1e-9)
    return row


def size(params: Any) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def _step(tx: Any, g: Any, batch: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
    params, state = carry
    updates, state = tx.update(g, state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def _scan(step: Any, start: Any, steps: int) -> Callable[[], Any]:
    run = jax.jit(lambda carry: jax.lax.scan(lambda carry, _: (step(carry), None), carry, None, length=steps)[0])
    return lambda: run(start)


def _loop(step: Any, start: Any, steps: int) -> Callable[[], Any]:
    def run() -> Any:
        carry = jax.tree.map(jnp.copy, start)
        for _ in range(steps):
            carry = step(carry)
        return carry

    return run
