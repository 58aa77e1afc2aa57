"""Solvers against the plain JAX program for the same answer: many small systems, dense, sample space, matrix-free.

Ratios are plain time over ours where ours should be faster, and ours over the floor where there is a floor.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.linalg import cho_factor, cho_solve

import natgrad_jax as ng
from benchmarks.timing import interleaved
from natgrad_jax import operators, solvers

SMALL = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 15, 16, 24, 32, 64, 128, 256)
PAUSE = 0.1


def run(fast: bool) -> list[dict[str, Any]]:
    """One row for each comparison."""
    repeats = 2 if fast else 15
    small = [many_small(p, 100 if fast else batch(p), repeats * 3) for p in ((2, 8) if fast else SMALL)]
    return [
        *small,
        whole_step(100 if fast else 10_000, repeats),
        dense(*((60, 30) if fast else (4000, 2000)), repeats),
        sample_space(*((8, 60) if fast else (512, 20_000)), repeats),
        iteration(*((8, 8) if fast else (256, 200)), repeats),
        compilation(3 if fast else 9),
        vectors(1000 if fast else 10_000_000),
        chunks(*((100, 10) if fast else (1_000_000, 64))),
    ]


def batch(p: int) -> int:
    """10,000 systems, or as many as fit into 256 MB."""
    return min(10_000, 2**26 // p**2)


def ratios(times: dict[str, dict[str, float]], over: str, under: str) -> dict[str, float]:
    """Quotient of two calls that were timed in turn."""
    return {f"{over} / {under}, {kind}": times[over][kind] / times[under][kind] for kind in ("min", "median")}


def plain(matrix: Array, g: Array) -> Array:
    """What one writes without this library."""
    return cho_solve(cho_factor(matrix), g)


def ours(matrix: Array, g: Array) -> Array:
    """The same by this library."""
    return solvers.solve(operators.Dense(matrix), g).value


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def many_small(p: int, systems: int, repeats: int) -> dict[str, Any]:
    """`vmap` of a solve; speed, compilation and the largest error of both against float64."""
    rows, g = normal(systems, p + 4, p), jnp.asarray(normal(systems, p, seed=1))
    matrices = jnp.asarray(np.swapaxes(rows, 1, 2) @ rows)
    programs = {"plain": plain, "ours": ours}
    compiled, seconds = {}, {}
    for name, f in programs.items():
        begin = time.perf_counter()
        compiled[name] = jax.jit(jax.vmap(f)).lower(matrices, g).compile()
        seconds[name] = time.perf_counter() - begin
    times = interleaved({name: lambda f=f: f(matrices, g) for name, f in compiled.items()}, repeats)  # type: ignore[misc]
    exact = np.linalg.solve(np.asarray(matrices, float), np.asarray(g, float)[..., None])[..., 0]
    size = np.linalg.norm(exact, axis=1)
    error = {
        name: np.max(np.linalg.norm(np.asarray(f(matrices, g)) - exact, axis=1) / size) for name, f in compiled.items()
    }
    return {
        "what": f"{systems} systems, p = {p}",
        **ratios(times, "plain", "ours"),
        "ours, ms": 1e3 * times["ours"]["min"],
        "compilation, s": seconds["ours"],
        "error, ours / plain": float(error["ours"] / error["plain"]),
    }


def whole_step(problems: int, repeats: int) -> dict[str, Any]:
    """Exact Fisher of five logits (six outcomes), solve, update, in every lane of a `vmap`."""
    support = jnp.arange(6)
    log_prob = lambda theta, k: jax.nn.log_softmax(jnp.concatenate([theta, jnp.zeros(1, theta.dtype)]))[k]
    target = jax.nn.log_softmax(jnp.asarray(normal(problems, 6)), axis=-1)
    theta = jnp.asarray(0.1 * normal(problems, 5, seed=1))
    tx = ng.natural_gradient(0.5, ng.metrics.fisher(log_prob, support))

    def loss(theta: Array, target: Array) -> Array:
        logs = jax.vmap(lambda k: log_prob(theta, k))(support)
        return jnp.sum(jnp.exp(logs) * (logs - target))

    def ours(theta: Array, target: Array) -> Array:
        updates, _ = tx.update(jax.grad(loss)(theta, target), tx.init(theta), theta)
        return optax.apply_updates(theta, updates)

    def naive(theta: Array, target: Array) -> Array:
        # Not jacfwd: at 10,000 lanes jax 0.10.2 gives wrong tangents of the indexed log_softmax on a CPU.
        scores = jax.vmap(lambda k: jax.grad(log_prob)(theta, k))(support)
        weights = jnp.exp(jax.vmap(lambda k: log_prob(theta, k))(support))
        fisher = jnp.einsum("n,ni,nj->ij", weights, scores, scores)
        return theta - 0.5 * plain(fisher, jax.grad(loss)(theta, target))

    calls = {name: jax.jit(jax.vmap(f)) for name, f in {"naive": naive, "ours": ours}.items()}
    times = interleaved({name: lambda f=f: f(theta, target) for name, f in calls.items()}, repeats)  # type: ignore[misc]
    gap = jnp.max(jnp.abs(calls["ours"](theta, target) - calls["naive"](theta, target)))
    return {
        "what": f"{problems} steps of five parameters: Fisher, solve, update",
        **ratios(times, "naive", "ours"),
        "ours, ms": 1e3 * times["ours"]["min"],
        "difference": float(gap),
    }


def dense(n: int, p: int, repeats: int) -> dict[str, Any]:
    """Rows, their Gram matrix, Cholesky, solve; the floor is one product and one factorisation."""
    rows, g = jnp.asarray(normal(n, p)), jnp.asarray(normal(p, seed=1))
    floor = jax.jit(lambda a: jax.lax.linalg.cholesky(a.T @ a, symmetrize_input=False))
    solve = jax.jit(lambda a, g: solvers.solve(operators.Gram(a), g, solver=solvers.cholesky()).value)
    times = interleaved({"ours": lambda: solve(rows, g), "floor": lambda: floor(rows)}, repeats, PAUSE)
    return {"what": f"cholesky, n = {n}, p = {p}", **ratios(times, "ours", "floor"), "ours, s": times["ours"]["min"]}


def sample_space(n: int, p: int, repeats: int) -> dict[str, Any]:
    """`row_space` with a known residual; the floor is one AAᵀ and one factorisation."""
    rows, e = jnp.asarray(normal(n, p)), jnp.asarray(normal(n, seed=1))
    g = rows.T @ e
    floor = jax.jit(lambda a: jax.lax.linalg.cholesky(a @ a.T + jnp.eye(n, dtype=a.dtype), symmetrize_input=False))
    solve = jax.jit(lambda a, e, g: solvers.solve(operators.Gram(a, e), g, damping=1e-3).value)
    times = interleaved({"ours": lambda: solve(rows, e, g), "floor": lambda: floor(rows)}, repeats, PAUSE)
    return {"what": f"row_space, n = {n}, p = {p}", **ratios(times, "ours", "floor"), "ours, s": times["ours"]["min"]}


def network(samples: int, width: int) -> tuple[Callable[[Any, Array], Array], Any, Array]:
    """A network with two hidden layers, its parameters and its inputs."""
    shapes = {"in": (32, width), "hidden": (width, width), "out": (width, 4)}
    params = {name: jnp.asarray(normal(*shape)) / shape[0] ** 0.5 for name, shape in shapes.items()}

    def outputs(params: Any, x: Array) -> Array:
        return jnp.tanh(jnp.tanh(x @ params["in"]) @ params["hidden"]) @ params["out"]

    return outputs, params, jnp.asarray(normal(samples, 32, seed=2))


def iteration(samples: int, width: int, repeats: int) -> dict[str, Any]:
    """One step of `cg` on a Gauss-Newton product: 40 steps less 20, against a loop of one jvp and one vjp a turn."""
    f, params, x = network(samples, width)
    g = jax.tree.map(lambda v: jnp.asarray(normal(*v.shape, seed=3)), params)

    def solve(steps: int) -> Callable[[], Any]:
        solver = solvers.cg(None, steps)
        program = jax.jit(
            lambda g, x: (
                solvers.solve(
                    operators.Implicit(f, params, x), g, solver=solver, damping=ng.damping.absolute(1.0)
                ).value
            )
        )
        return lambda: program(g, x)

    def loop(steps: int) -> Callable[[], Any]:
        def product(_: Array, v: Any) -> Any:
            out = jax.jvp(lambda q: f(q, x), (params,), (v,))[1]
            return jax.tree.map(lambda u: u / samples, jax.vjp(lambda q: f(q, x), params)[1](out)[0])

        program = jax.jit(lambda g: jax.lax.fori_loop(0, steps, product, g))
        return lambda: program(g)

    times = interleaved({"cg 20": solve(20), "cg 40": solve(40), "loop 20": loop(20), "loop 40": loop(40)}, repeats)
    one = {
        kind: (times["cg 40"][kind] - times["cg 20"][kind]) / (times["loop 40"][kind] - times["loop 20"][kind])
        for kind in ("min", "median")
    }
    size = sum(v.size for v in params.values())
    return {
        "what": f"cg, one step, network of p = {size}, {samples} samples",
        **{f"step / (jvp + vjp), {kind}": value for kind, value in one.items()},
        "step, ms": 1e3 * (times["cg 40"]["min"] - times["cg 20"]["min"]) / 20,
    }


def compilation(repeats: int) -> dict[str, Any]:
    """Trace and compile, p = 50: the solver alone and a whole update, against the plain program."""
    matrix, g = jnp.eye(50, dtype=jnp.float32), jnp.ones(50, jnp.float32)
    tx = ng.natural_gradient(0.1, lambda params: operators.Dense(matrix))
    state = tx.init(g)
    programs = {
        "plain": lambda m, g: plain(m, g),
        "solver": lambda m, g: ours(m, g),
        "update": lambda m, g: tx.update(g, state, g),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, f in programs.items():
            jax.clear_caches()
            begin = time.perf_counter()
            jax.jit(f).lower(matrix, g).compile()
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "what": "trace and compile, p = 50",
        "solver / plain": median["solver"] / median["plain"],
        "update / plain": median["update"] / median["plain"],
        "update - plain, s": median["update"] - median["plain"],
    }


def temporary(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def vectors(p: int) -> dict[str, Any]:
    """Memory of `cg` beside its arguments, in vectors of p numbers, and its time for twenty steps."""
    f = lambda theta, x: x * theta + jnp.roll(theta, 1)
    x, g = jnp.linspace(1.0, 2.0, p, dtype=jnp.float32), jnp.ones(p, jnp.float32)
    op = operators.Implicit(f, g, x, diag=jnp.square(x) + 1)
    program = jax.jit(lambda op, g: solvers.solve(op, g, solver=solvers.cg(None, 20), damping=1e-3).value)
    compiled = program.lower(op, g).compile()
    times = interleaved({"solve": lambda: compiled(op, g)}, 2)
    return {
        "what": f"cg, p = {p}",
        "memory, vectors": temporary(compiled) / (4 * p),
        "20 steps, s": times["solve"]["min"],
    }


def chunks(n: int, p: int) -> dict[str, Any]:
    """Memory of AᵀA from half-precision rows, beside the rows, in units of a float32 copy of them."""
    rows = {
        "a": jax.ShapeDtypeStruct((n, p // 2), jnp.float16),
        "b": jax.ShapeDtypeStruct((n, p - p // 2), jnp.float16),
    }
    compiled = jax.jit(lambda rows: operators.Gram(rows).dense()).lower(rows).compile()
    f = lambda theta, x: jnp.tanh(x @ theta)
    theta, x = jax.ShapeDtypeStruct((p,), jnp.float32), jax.ShapeDtypeStruct((n, p), jnp.float32)
    product = lambda size: jax.jit(
        lambda theta, x: operators.Implicit(f, theta, x, chunk_size=size).mv(theta)
    ).lower(theta, x).compile()  # fmt: skip
    return {
        "what": f"rows in chunks, n = {n}, p = {p}",
        "AᵀA: memory / copy of the rows": temporary(compiled) / (4 * n * p),
        "AᵀA: memory, MB": temporary(compiled) / 1e6,
        "product: memory, chunk of n/100 / whole": temporary(product(max(n // 100, 1))) / temporary(product(None)),
    }
