"""The same step from plain JAX, flax nnx, flax linen, equinox and haiku; checkpoints that resume bit by bit."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import error, flat
from flax import nnx
from flax.training.train_state import TrainState
from transform_cases import compiled, data, loss

import natgrad_jax as ng
from natgrad_jax import metrics, transforms

_rng = np.random.default_rng(11)
WEIGHTS = {"w1": _rng.normal(size=(3, 4)), "b1": _rng.normal(size=4), "w2": _rng.normal(size=(4, 2))}
WEIGHTS["b2"] = _rng.normal(size=2)
BATCH = (_rng.normal(size=(20, 3)), _rng.normal(size=(20, 2)))
TOL = {np.dtype("float32"): 2e-4, np.dtype("float64"): 1e-10}


def optimizer(model):
    """One natural gradient of ½ mean ‖f(x) − y‖², damped, since 20 × 2 rows see no more than 40 directions."""
    metric = metrics.gauss_newton(lambda params, batch: model(params, batch[0]), metrics.losses.squares())
    return ng.natural_gradient(0.5, metric, damping=1e-2)


def objective(model):
    return lambda params, batch: 0.5 * jnp.mean(jnp.sum((model(params, batch[0]) - batch[1]) ** 2, axis=1))


def plain(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def typed(dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (WEIGHTS, BATCH))


def expected_step(dtype):
    """W1, b1, W2, b2 after one step in plain JAX."""
    params, batch = typed(dtype)
    tx = optimizer(plain)
    updates, _ = tx.update(jax.grad(objective(plain))(params, batch), tx.init(params), params, batch=batch)
    new = optax.apply_updates(params, updates)
    assert error(new, params) > 1e-3
    return [new[name] for name in ("w1", "b1", "w2", "b2")]


def in_nnx(dtype):
    """`nnx.Optimizer` hands what it is given by name to the transformation."""

    class Network(nnx.Module):
        def __init__(self):
            self.w1, self.b1, self.w2, self.b2 = (nnx.Param(typed(dtype)[0][k]) for k in ("w1", "b1", "w2", "b2"))

        def __call__(self, x):
            return jnp.tanh(x @ self.w1[...] + self.b1[...]) @ self.w2[...] + self.b2[...]

    network, batch = Network(), typed(dtype)[1]
    graph, _ = nnx.split(network, nnx.Param)
    model = lambda params, x: nnx.merge(graph, params)(x)
    holder = nnx.Optimizer(network, optimizer(model), wrt=nnx.Param)

    @nnx.jit
    def step(network, holder, batch):
        grads = nnx.grad(lambda network: objective(lambda _, x: network(x))(None, batch))(network)
        holder.update(network, grads, batch=batch)

    step(network, holder, batch)
    return [network.w1[...], network.b1[...], network.w2[...], network.b2[...]]


def in_linen(dtype):
    """A `TrainState` whose gradients are applied by hand: its own method forwards nothing."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.Dense(4, param_dtype=dtype, name="first")(x)
            return nn.Dense(2, param_dtype=dtype, name="second")(jnp.tanh(hidden))

    weights, batch = typed(dtype)
    params = {
        "first": {"kernel": weights["w1"], "bias": weights["b1"]},
        "second": {"kernel": weights["w2"], "bias": weights["b2"]},
    }
    model = lambda params, x: Network().apply({"params": params}, x)
    state = TrainState.create(apply_fn=model, params=params, tx=optimizer(model))

    @jax.jit
    def step(state, batch):
        grads = jax.grad(objective(model))(state.params, batch)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, batch=batch)
        return state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )

    new = step(state, batch).params
    return [new[layer][kind] for layer in ("first", "second") for kind in ("kernel", "bias")]


def in_equinox(dtype):
    """A module of arrays, functions and None leaves; weights are the transposes."""
    weights, batch = typed(dtype)
    network = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0), dtype=dtype)
    where = lambda net: [part for layer in net.layers for part in (layer.weight, layer.bias)]
    network = eqx.tree_at(where, network, [weights["w1"].T, weights["b1"], weights["w2"].T, weights["b2"]])
    params, static = eqx.partition(network, eqx.is_inexact_array)
    assert None in jax.tree.leaves(params, is_leaf=lambda x: x is None)
    model = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    tx = optimizer(model)

    @eqx.filter_jit
    def step(params, state, batch):
        grads = eqx.filter_grad(objective(model))(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return eqx.apply_updates(params, updates), state

    new, _ = step(params, tx.init(params), batch)
    return [x.T if x.ndim == 2 else x for x in where(eqx.combine(new, static))]


def in_haiku(dtype):
    weights, batch = typed(dtype)
    network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(jnp.tanh(hk.Linear(4)(x)))))
    model, tx = network.apply, optimizer(network.apply)
    params = {
        "linear_1": {"w": weights["w1"], "b": weights["b1"]}, "linear": {"w": weights["w2"], "b": weights["b2"]}
    }  # fmt: skip
    # haiku names the layers in the order of their construction: the outer one is the first.
    assert jax.tree.structure(network.init(jax.random.key(0), batch[0])) == jax.tree.structure(params)
    step = jax.jit(
        lambda params, state: tx.update(jax.grad(objective(model))(params, batch), state, params, batch=batch)
    )
    new = optax.apply_updates(params, step(params, tx.init(params))[0])
    return [new[layer][kind] for layer in ("linear_1", "linear") for kind in ("w", "b")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the frameworks themselves
@pytest.mark.parametrize("framework", [in_nnx, in_linen, in_equinox, in_haiku])
def test_the_same_step_in_every_framework(framework, dtype):
    for got, expected in zip(framework(dtype), expected_step(dtype)):
        assert got.dtype == dtype and error(got, expected) < TOL[dtype]


# Checkpoints.


@pytest.mark.parametrize(
    "name",
    [
        "natural_gradient",
        "warm cg",
        "spring",
        "levenberg_marquardt",
        "damping_grid",
        "every_k",
        "average",
        "accumulate",
    ],
)
def test_resumed_is_bit_by_bit_as_uninterrupted(name, tmp_path, float64):
    """Saved after three steps, restored into the state of a new optimizer, continued: the same bits."""
    params, batch = data(float64)
    tx, update, *_ = compiled(name, float64)

    def run(params, state, steps):
        for _ in range(steps):
            updates, state = update(jax.grad(loss)(params, batch), state, params, batch)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = run(params, tx.init(params), 6)
    half = run(params, tx.init(params), 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(jnp.zeros_like, (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "half", blank)
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    resumed = run(*restored, 3)
    for got, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole)):
        np.testing.assert_array_equal(got, expected)
    assert (flat(whole[0]) != flat(half[0])).any() or name == "levenberg_marquardt"


def test_rules_that_need_more_in_a_training_loop(float64):
    """A period, with the shapes of the data known from the start, and a rule that looks at the loss."""
    params, batch = typed(float64)
    metric = metrics.gauss_newton(lambda params, batch: plain(params, batch[0]), metrics.losses.squares())
    rule = transforms.levenberg_marquardt(transforms.precondition())
    inner = transforms.with_metric(metric, rule)
    tx = optax.chain(transforms.every_k(inner, 2, like={"batch": batch}), optax.scale(-1.0))
    state = TrainState.create(apply_fn=plain, params=params, tx=tx)

    @jax.jit
    def step(state, batch):
        value, grads = jax.value_and_grad(objective(plain))(state.params, batch)
        given = {"batch": batch, "value": value, "value_fn": objective(plain)}
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **given)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), value

    values = []
    for _ in range(30):
        state, value = step(state, batch)
        values.append(float(value))
    assert (np.diff(values) <= 0).all() and values[-1] < 0.5 * values[0]
