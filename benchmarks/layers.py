"""Layer rows against explicit ones: stochastic reconfiguration, Fisher diagonals, networks, PINNs, growth.

Same samples and gradients for all, interleaved, float64 unless said. NetKet's exact solvers (`pip install netket`) run
where it is installed, else their cells say so. Memory is what XLA reserves beside arguments and results.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import natgrad_jax as ng
from benchmarks import rules
from benchmarks.timing import interleaved
from natgrad_jax import damping, metrics, solvers
from natgrad_jax._tree import PyTree
from natgrad_jax.demo import double_precision
from natgrad_jax.transforms import grid_search, precondition

try:
    import netket as nk
    from netket._src.ngd.srt import _compute_srt_update
    from netket._src.ngd.srt_onthefly import srt_onthefly
except ImportError:
    nk = None

SHIFT = 1e-3


def run(fast: bool) -> list[dict[str, Any]]:
    """Rows: each of the tables above."""
    n = 64 if fast else 1024
    repeats = 1 if fast else 15
    rows = [
        reconfiguration("RBM, 16 spins, α = 8", rbm(16, 8), 16, n, dtype, repeats) for dtype in ("float64", "float32")
    ]
    n = 64 if fast else 512
    rows += [
        reconfiguration("FFN 16-132-132-1", dense(16, 132, 132, 1), 16, n, dtype, repeats)
        for dtype in ("float64", "float32")
    ]
    rows.append(diagonal("MLP 784-256-128-10, 256 images", 32 if fast else 256, repeats))
    rows.append(kernel_and_diagonal("CNN of LeNet's size", *lenet(), 16 if fast else 128, repeats))
    rows.append(
        kernel_and_diagonal("transformer, 2 layers, d = 64, 32 positions", *transformer(), 8 if fast else 64, repeats)
    )
    rows.append(energy_step((32,), 28, ("auto",), repeats))
    rows.append(energy_step((64, 64, 48, 48), 6 if fast else 58, ("layers", "plain"), 1 if fast else 3))
    rows += [growth(width, 64 if fast else 256, repeats) for width in ((16,) if fast else (16, 64, 256, 1024, 3072))]
    return rows if fast else [*rows, large()]


class Network(NamedTuple):
    """log ψ of one configuration, and its parameters."""

    log_psi: Callable[[PyTree, Array], Array]
    params: PyTree


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of the size of weights."""
    return rng.normal(size=shape) / np.sqrt(shape[0])


def rbm(spins: int, alpha: int) -> Network:
    """Σ log cosh(xW + b) + a·x."""
    rng, hidden = np.random.default_rng(0), alpha * spins
    params = {"w": normal(rng, spins, hidden), "b": 0.1 * normal(rng, hidden), "a": 0.1 * normal(rng, spins)}
    return Network(lambda p, x: jnp.sum(jnp.log(jnp.cosh(x @ p["w"] + p["b"]))) + x @ p["a"], params)


def dense(*widths: int) -> Network:
    """A fully connected network with one output."""
    rng = np.random.default_rng(0)
    params = [(normal(rng, a, b), 0.1 * normal(rng, b)) for a, b in itertools.pairwise(widths)]

    def log_psi(params: PyTree, x: Array) -> Array:
        for w, b in params[:-1]:
            x = jax.nn.gelu(x @ w + b)
        w, b = params[-1]
        return (x @ w + b)[0]

    return Network(log_psi, params)


def reconfiguration(name: str, network: Network, spins: int, n: int, dtype: str, repeats: int) -> dict[str, Any]:
    """One step, (S + λ)⁻¹g with λ = 1e-3, from samples and local energies."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), network.params)
    x, energies = jnp.asarray(rng.choice([-1.0, 1.0], (n, spins)), dtype), jnp.asarray(rng.normal(size=n), dtype)
    expected = by_definition(network, params, np.asarray(x, float), np.asarray(energies, float))
    calls = {"layers": ours(network, "auto"), "plain rows": ours(network, "plain"), "plain JAX": by_hand(network)}
    calls |= {} if nk is None else netket_solvers(network)
    given = {key: jax.jit(call) for key, call in calls.items()}
    times = interleaved({key: partial(call, params, x, energies) for key, call in given.items()}, repeats)
    row: dict[str, Any] = {"problem": name, "p": expected.size, "n": n, "dtype": dtype}
    for key, call in given.items():
        step = np.asarray(jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(call(params, x, energies))]), float)
        error = np.linalg.norm(step - expected) / np.linalg.norm(expected)
        row |= {f"{key}: min ms": 1e3 * times[key]["min"], f"{key}: median ms": 1e3 * times[key]["median"]}
        row[f"{key}: relative error"] = float(error)
    peers = [key for key in given if key.startswith("netket")] or ["plain JAX"]
    best = min(peers, key=lambda key: times[key]["median"])
    ratio = {what: times["layers"][what] / times[best][what] for what in ("min", "median")}
    return row | {"layers / best peer, min": ratio["min"], "median": ratio["median"], "best peer": best}


def by_definition(network: Network, params: PyTree, x: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """The step in float64, by the rows, in sample space."""
    with double_precision():
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), float), params)
        grads = jax.jit(jax.vmap(jax.grad(network.log_psi), (None, 0)))(params, jnp.asarray(x))
        rows = np.concatenate([np.asarray(g).reshape(len(x), -1) for g in jax.tree.leaves(grads)], axis=1)
    rows = (rows - rows.mean(0)) / np.sqrt(len(x))
    e = 2 * (energies - energies.mean()) / np.sqrt(len(x))
    return rows.T @ np.linalg.solve(rows @ rows.T + SHIFT * np.eye(len(x)), e)


def ours(network: Network, rows: str, solver: Any = None) -> Callable[..., PyTree]:
    """Metric, gradient and solve; exact if no solver is given."""
    metric = metrics.quantum_geometric(network.log_psi, rows=rows)

    def step(params: PyTree, x: Array, energies: Array) -> PyTree:
        n = len(energies)
        e = 2 * (energies - jnp.mean(energies)) / n**0.5
        gram = ng.operators.Gram(metric(params, samples=x).rows, e)
        g = gram.transposed_times(e)
        return solvers.solve(gram, g, solver=solver or solvers.row_space(), damping=damping.absolute(SHIFT)).value

    return step


def by_hand(network: Network) -> Callable[..., PyTree]:
    """vmap(grad), a product, a Cholesky factorisation."""

    def step(params: PyTree, x: Array, energies: Array) -> PyTree:
        n = len(energies)
        grads = jax.vmap(jax.grad(network.log_psi), (None, 0))(params, x)
        rows = jnp.concatenate([g.reshape(n, -1) for g in jax.tree.leaves(grads)], axis=1)
        rows = (rows - jnp.mean(rows, axis=0)) / n**0.5
        e = 2 * (energies - jnp.mean(energies)) / n**0.5
        kernel = rows @ rows.T + SHIFT * jnp.eye(n, dtype=rows.dtype)
        return rows.T @ jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(kernel), e)

    return step


def netket_solvers(network: Network) -> dict[str, Callable[..., PyTree]]:
    """The two exact sample-space solvers of NetKet, as its drivers call them."""
    log_psi = lambda variables, x: jax.vmap(lambda x: network.log_psi(variables["params"], x))(x)

    def on_the_fly(params: PyTree, x: Array, energies: Array) -> PyTree:
        return srt_onthefly(
            log_psi, energies, params, {}, x, diag_shift=SHIFT, solver_fn=nk.optimizer.solver.cholesky, mode="real"
        )[0]

    def jacobian(params: PyTree, x: Array, energies: Array) -> PyTree:
        rows = nk.jax.jacobian(log_psi, params, x, {}, mode="real", dense=True, center=True)
        n = len(energies)
        e = 2 * (energies - jnp.mean(energies)) / n**0.5
        structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return _compute_srt_update(
            rows / n**0.5, e, diag_shift=SHIFT, solver_fn=nk.optimizer.solver.cholesky, mode="real",
            params_structure=structure,
        )[0]  # fmt: skip

    return {"netket on the fly": on_the_fly, "netket Jacobian": jacobian}


def memory(call: Callable[..., Any], *args: Any) -> int:
    """Bytes that XLA reserves beside arguments and results."""
    analysis = jax.jit(call).lower(*args).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else -1


def diagonal(name: str, n: int, repeats: int) -> dict[str, Any]:
    """The empirical Fisher diagonal beside a loss gradient and per-sample gradients, float32."""
    rng, widths = np.random.default_rng(0), (784, 256, 128, 10)
    shapes = itertools.pairwise(widths)
    params = [tuple(jnp.asarray(v, jnp.float32) for v in (normal(rng, a, b), normal(rng, b))) for a, b in shapes]
    x, y = jnp.asarray(rng.normal(size=(n, 784)), jnp.float32), jnp.asarray(rng.integers(0, 10, n))

    def log_prob(params: PyTree, example: tuple[Array, Array]) -> Array:
        h = example[0]
        for w, b in params[:-1]:
            h = jax.nn.relu(h @ w + b)
        return jax.nn.log_softmax(h @ params[-1][0] + params[-1][1])[example[1]]

    return {
        "problem": name,
        "p": sum(v.size for v in jax.tree.leaves(params)),
        "n": n,
        **beside(log_prob, params, (x, y), repeats),
    }


def beside(log_prob: Callable[..., Array], params: PyTree, batch: PyTree, repeats: int) -> dict[str, Any]:
    """Times and memory of a gradient, a diagonal from layer rows, and one from per-sample gradients."""
    metric = metrics.fisher_diagonal(metrics.empirical_fisher(log_prob, rows="layers"))
    rules = {
        "gradient": jax.grad(lambda params: jnp.mean(jax.vmap(lambda x: log_prob(params, x))(batch))),
        "diagonal": lambda params: metric(params, batch=batch).entries,
        "per-sample diagonal": lambda params: jax.tree.map(
            lambda g: jnp.mean(g**2, axis=0), jax.vmap(jax.grad(log_prob), (None, 0))(params, batch)
        ),
    }
    compiled = {key: jax.jit(rule) for key, rule in rules.items()}
    times = interleaved({key: partial(rule, params) for key, rule in compiled.items()}, repeats)
    row: dict[str, Any] = {f"{key}: {what} ms": 1e3 * times[key][what] for key in rules for what in ("min", "median")}
    row |= {f"{key}: MB": memory(rule, params) / 1e6 for key, rule in rules.items()}
    got, expected = compiled["diagonal"](params), compiled["per-sample diagonal"](params)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    row["largest relative error"] = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
    return row | {"diagonal / gradient, min": times["diagonal"]["min"] / times["gradient"]["min"]}


def kernel_and_diagonal(
    name: str, log_prob: Callable[..., Array], params: PyTree, batch: PyTree, n: int, repeats: int
) -> dict[str, Any]:
    """The sample-space kernel and the diagonal, against per-sample gradients, float32."""
    params, batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), (params, batch))
    batch = jax.tree.map(lambda x: x[:n], batch)
    metric = metrics.empirical_fisher(log_prob, rows="layers")

    def explicit(params: PyTree) -> Array:
        grads = jax.vmap(jax.grad(log_prob), (None, 0))(params, batch)
        return sum(g.reshape(n, -1) @ g.reshape(n, -1).T for g in jax.tree.leaves(grads)) / n

    rules = {
        "kernel": lambda params: metric(params, batch=batch).kernel(jnp.ones((), jnp.float32)),
        "per-sample kernel": explicit,
    }
    compiled = {key: jax.jit(rule) for key, rule in rules.items()}
    times = interleaved({key: partial(rule, params) for key, rule in compiled.items()}, repeats)
    row: dict[str, Any] = {"problem": name, "p": sum(v.size for v in jax.tree.leaves(params)), "n": n}
    row |= {f"{key}: {what} ms": 1e3 * times[key][what] for key in rules for what in ("min", "median")}
    row |= {f"{key}: MB": memory(rule, params) / 1e6 for key, rule in rules.items()}
    got, expected = (compiled[key](params) for key in rules)
    row["kernel: relative error"] = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
    return row | beside(log_prob, params, batch, repeats)


def lenet() -> tuple[Callable[..., Array], PyTree, PyTree]:
    """28 × 28 images, two convolutions with pooling, three dense layers."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(5, 5, 1, 6)) / 5, rng.normal(size=(5, 5, 6, 16)) / 12]
    params = (kernels, [normal(rng, 400, 120), normal(rng, 120, 84), normal(rng, 84, 10)])

    def log_prob(params: PyTree, example: tuple[Array, Array]) -> Array:
        h = example[0][None]
        for kernel, padding in zip(params[0], ("SAME", "VALID"), strict=True):
            numbers = ("NHWC", "HWIO", "NHWC")
            h = jax.nn.relu(jax.lax.conv_general_dilated(h, kernel, (1, 1), padding, dimension_numbers=numbers))
            h = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        h = h.reshape(-1)
        for w in params[1][:-1]:
            h = jax.nn.relu(h @ w)
        return jax.nn.log_softmax(h @ params[1][-1])[example[1]]

    return log_prob, params, (rng.normal(size=(128, 28, 28, 1)), rng.integers(0, 10, 128))


def transformer(d: int = 64, heads: int = 4, positions: int = 32) -> tuple[Callable[..., Array], PyTree, PyTree]:
    """Two layers of attention and a perceptron, on vectors at 32 positions, ten classes."""
    rng = np.random.default_rng(0)
    layer = lambda: {
        "qkv": normal(rng, d, 3 * d), "out": normal(rng, d, d), "scale": np.ones((2, d)),
        "up": normal(rng, d, 4 * d), "down": normal(rng, 4 * d, d),
    }  # fmt: skip
    params = {"layers": [layer(), layer()], "head": normal(rng, d, 10)}

    def normed(x: Array, scale: Array) -> Array:
        return scale * (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def log_prob(params: PyTree, example: tuple[Array, Array]) -> Array:
        x = example[0]
        for p in params["layers"]:
            q, k, v = jnp.split(normed(x, p["scale"][0]) @ p["qkv"], 3, axis=-1)
            q, k, v = (y.reshape(positions, heads, -1) for y in (q, k, v))
            weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k) / (d // heads) ** 0.5, axis=-1)
            x = x + jnp.einsum("hts,shd->thd", weights, v).reshape(positions, d) @ p["out"]
            x = x + jax.nn.gelu(normed(x, p["scale"][1]) @ p["up"]) @ p["down"]
        return jax.nn.log_softmax(x.mean(0) @ params["head"])[example[1]]

    return log_prob, params, (rng.normal(size=(64, positions, d)), rng.integers(0, 10, 64))


def energy_step(widths: tuple[int, ...], side: int, forms: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """A step on Poisson's equation, n = side² + 4(side + 1): rows, gradient, solve, the best of 31 lengths; float64."""
    rng, batch = np.random.default_rng(0), rules.points(side)
    params = [(jnp.asarray(normal(rng, a, b)), jnp.zeros(b)) for a, b in itertools.pairwise((2, *widths, 1))]
    value_at = lambda params, x: tanh_network(params, x)[0]

    def inside(params: PyTree, points: Array) -> Array:
        second = lambda x, v: jax.jvp(lambda y: jax.jvp(partial(value_at, params), (y,), (v,))[1], (x,), (v,))[1]
        return jax.vmap(lambda x: sum(second(x, v) for v in jnp.eye(2)) + 2 * jnp.pi**2 * rules.solution(x))(points)

    terms = {"interior": inside, "boundary": lambda params, points: jax.vmap(partial(value_at, params))(points)}
    weights = {name: 1 / len(points) for name, points in batch.items()}
    loss = lambda params, batch: sum(0.5 * weights[k] * jnp.sum(terms[k](params, batch[k]) ** 2) for k in terms)
    n, p = sum(map(len, batch.values())), sum(x.size for x in jax.tree.leaves(params))
    inner = precondition(solvers.cholesky() if n > p else solvers.row_space(), damping=damping.trace(1e-8))
    rule = grid_search(inner, chunk_size=None if n < 1000 else 4)

    def step(metric: Any, params: PyTree) -> PyTree:
        operator = metric(params, batch=batch)
        value, g = metrics.value_and_grad(operator)
        given = {"value": value, "grad": g, "value_fn": loss, "batch": batch}
        return rule.update(g, rule.init(params), params, operator=operator, **given)[0]

    calls = {rows: jax.jit(partial(step, metrics.least_squares(terms, weights, rows=rows))) for rows in forms}
    times = interleaved({rows: partial(call, params) for rows, call in calls.items()}, repeats)
    widths_in_words = "-".join(map(str, (2, *widths, 1)))
    row: dict[str, Any] = {"problem": f"energy natural gradient, {widths_in_words}", "p": p, "n": n}
    row |= {f"{rows}: {what} ms": 1e3 * times[rows][what] for rows in forms for what in ("min", "median")}
    return row | {f"{rows}: MB": memory(call, params) / 1e6 for rows, call in calls.items()}


def tanh_network(params: PyTree, x: Array) -> Array:
    """Fully connected."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def growth(width: int, n: int, repeats: int) -> dict[str, Any]:
    """One step of a network 64-width-width-1 in float32, exact or of 20 products: time and memory against p."""
    network = dense(64, width, width, 1)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), network.params)
    rng, p = np.random.default_rng(1), sum(x.size for x in jax.tree.leaves(params))
    x, energies = (jnp.asarray(v, jnp.float32) for v in (rng.normal(size=(n, 64)), rng.normal(size=n)))
    forms = {"layers": "auto"} | ({"plain rows": "plain"} if n * p < 3e8 else {})
    rules = {key: ours(network, rows) for key, rows in forms.items()}
    rules |= {f"{key}, cg": ours(network, rows, solvers.cg(None, max_steps=20)) for key, rows in forms.items()}
    compiled = {key: jax.jit(rule) for key, rule in rules.items()}
    times = interleaved({key: partial(rule, params, x, energies) for key, rule in compiled.items()}, repeats)
    row: dict[str, Any] = {"problem": f"growth, 64-{width}-{width}-1", "p": p, "n": n}
    row |= {f"{key}: {what} ms": 1e3 * times[key][what] for key in rules for what in ("min", "median")}
    return row | {f"{key}: MB": memory(rule, params, x, energies) / 1e6 for key, rule in rules.items()}


def large() -> dict[str, Any]:
    """n = 4096 samples of a network with a million parameters, float32: explicit rows would take 16 GB."""
    return growth(970, 4096, 2) | {"problem": "n = 4096, p = 10⁶"}
