"""The loops of blackjax and numpyro, with Adam at its best rate and with the adapter: draws and time to within 0.1 nat.

Nothing but the optimizer is exchanged. ELBOs are judged on 10,000 fixed draws of the package's own approximation. The
time to arrive is that of a whole run times the share of its steps up to the arrival, both interleaved.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax import Array
from numpyro.infer import SVI, Trace_ELBO, autoguide

import natgrad_jax as ng
from benchmarks.timing import interleaved
from natgrad_jax import adapters
from natgrad_jax.demo import WITHIN, judge
from natgrad_jax.families import FullRankParams
from natgrad_jax.problems import Problem

ADAM_RATES = (0.01, 0.03, 0.1, 0.3)
DRAWS = 16
POINTS = 80  # of a path that are judged

Path = Callable[[Array], FullRankParams]  # key -> the approximation at POINTS steps, evenly apart


def run(fast: bool) -> list[dict[str, Any]]:
    """Rows: each package on two problems."""
    problems = {"breast cancer": ng.problems.breast_cancer(), "eight schools": ng.problems.eight_schools()}
    loops = {"blackjax fullrank_vi": (through_blackjax, adapters.blackjax_fullrank),
             "numpyro AutoMultivariateNormal": (through_numpyro, None)}  # fmt: skip
    return [
        arrivals(loop, name, through, problem, natural, fast)
        for name, problem in problems.items()
        for loop, (through, natural) in loops.items()
    ]


def arrivals(loop: str, name: str, through: Any, problem: Problem, natural: Any, fast: bool) -> dict[str, Any]:
    """One package on one problem: medians over seeds, and the time side by side."""
    score = judge(problem, 2000 if fast else 10_000)
    keys = jax.random.split(jax.random.key(0), 1 if fast else 5)
    steps, longer = (POINTS, POINTS) if fast else (5 * POINTS, 100 * POINTS)

    def judged(path: Path, keys: Array, steps: int) -> tuple[float, float, float]:
        """Steps to within WITHIN, median and most over the keys, and the median gap at the end."""
        gaps = [problem.best - np.asarray(score(path(key))) for key in keys]
        first = [float(np.argmax(g < WITHIN) + 1) * steps / POINTS if (g < WITHIN).any() else np.inf for g in gaps]
        return float(np.median(first)), max(first), float(np.median([g[-1] for g in gaps]))

    ours = through(problem, natural(problem.d) if natural else None, steps)
    adam = adam_path(through, problem, longer)
    peers = {rate: partial(adam, rate=rate) for rate in (ADAM_RATES[1:2] if fast else ADAM_RATES)}
    own = judged(ours, keys, steps)
    others = {rate: judged(path, keys[:3], longer) for rate, path in peers.items()}
    best = min(others, key=lambda rate: (others[rate][0], others[rate][2]))
    row: dict[str, Any] = {
        "loop": loop,
        "problem": name,
        "draws a step": DRAWS,
        "steps, adapter": own[0],
        "most steps, adapter": own[1],
        f"gap after {steps} steps, adapter": own[2],
        "steps, Adam": others[best][0],
        f"gap after {longer} steps, Adam": others[best][2],
        "best rate of Adam": best,
    }
    calls = {"adapter": lambda: ours(keys[0]), "Adam": lambda: peers[best](keys[0])}
    times = interleaved(calls, repeats=1 if fast else 5)
    shares = {"adapter": row["steps, adapter"] / steps, "Adam": row["steps, Adam"] / longer}
    for what in ("min", "median"):
        spent = {rule: times[rule][what] * min(share, 1.0) for rule, share in shares.items()}
        row |= {f"{rule}: {what} seconds": value for rule, value in spent.items()}
        row[f"Adam / adapter, {what}"] = spent["Adam"] / spent["adapter"]
    return row


def adam_path(through: Any, problem: Problem, steps: int) -> Callable[..., FullRankParams]:
    """(key, rate) -> the path of a package's loop under Adam, compiled once for all rates."""
    return jax.jit(lambda key, rate: through(problem, optax.adam(rate), steps)(key))


def recorded(step: Callable[[Any, Array], Any], now: Callable[[Any], FullRankParams], start: Any, steps: int) -> Path:
    """The approximation at POINTS steps, evenly apart of a compiled loop."""

    @jax.jit
    def path(key: Array) -> FullRankParams:
        def some(state: Any, keys: Array) -> tuple[Any, FullRankParams]:
            state, _ = jax.lax.scan(lambda s, key: (step(s, key), None), state, keys)
            return state, now(state)

        keys = jax.random.split(key, steps)
        return jax.lax.scan(some, start, keys.reshape(POINTS, -1))[1]

    return path


def through_blackjax(problem: Problem, optimizer: Any, steps: int) -> Path:
    """`blackjax.vi.fullrank_vi`, from its own start."""
    d = problem.d
    algorithm = blackjax.vi.fullrank_vi.as_top_level_api(problem.log_density, optimizer, num_samples=DRAWS)

    def now(state: Any) -> FullRankParams:
        lower = jnp.diag(jnp.exp(state.chol_params[:d])).at[np.tril_indices(d, -1)].set(state.chol_params[d:])
        return FullRankParams(state.mu, lower)

    return recorded(lambda state, key: algorithm.step(key, state)[0], now, algorithm.init(jnp.zeros(d)), steps)


def through_numpyro(problem: Problem, optimizer: Any, steps: int) -> Path:
    """`numpyro.infer.SVI` with a full-rank guide, from its own start; the adapter where no optimizer is given."""

    def model() -> None:
        x = numpyro.sample("x", numpyro.distributions.ImproperUniform(
            numpyro.distributions.constraints.real, (), event_shape=(problem.d,)))  # fmt: skip
        numpyro.factor("log_density", problem.log_density(x))

    guide = autoguide.AutoMultivariateNormal(model, init_loc_fn=partial(numpyro.infer.init_to_value, values={
        "x": jnp.zeros(problem.d)}))  # fmt: skip
    optimizer = adapters.numpyro(guide) if optimizer is None else optimizer
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=DRAWS))
    start = svi.init(jax.random.key(0))

    def step(state: Any, key: Array) -> Any:
        return svi.update(state._replace(rng_key=key))[0]

    def now(state: Any) -> FullRankParams:
        params = svi.get_params(state)
        return FullRankParams(params["auto_loc"], params["auto_scale_tril"])

    return recorded(step, now, start, steps)
