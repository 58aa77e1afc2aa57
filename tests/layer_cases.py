"""Models whose parameters enter products in many ways, and in ways that are none: (params, batch) -> outputs."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

_rng = np.random.default_rng(5)


def normal(*shape):
    return _rng.normal(size=shape)


class Case(NamedTuple):
    """A model, its parameters and a batch of four; the leaves (in order) that are found in products; roundings lost."""

    model: Any
    params: Any
    batch: Any
    found: list
    slack: float = 1.0
    found_centred: list | None = None


def mlp(layers, x):
    for w, b in layers:
        x = jnp.tanh(x @ w + b)
    return x


LAYERS = [(normal(5, 7), normal(7)), (normal(7, 6), normal(6)), (normal(6, 2), normal(2))]
X = normal(4, 5)
BIASED = [normal(5, 7), normal(7)]


def squared(x, w):
    """A use of w that is followed, and one that is not."""
    return jnp.tanh(x @ w) + 0.1 * jnp.sum(w**2)


def through_calls(layers, x):
    return jax.jit(lambda layers, x: jax.checkpoint(lambda layers, x: jax.jit(mlp)(layers, x))(layers, x))(layers, x)


def recurrent(params, x):
    step = lambda h, x: (jnp.tanh(h @ params["h"] + x @ params["x"] + params["b"]), None)
    return jax.vmap(lambda xs: jax.lax.scan(step, jnp.zeros(6, x.dtype), xs)[0])(x)


def deep_recurrent(params, x):
    """A loop over layers within a loop over time: both axes of a leaf and of its activations."""
    layer = lambda c, w: (jnp.tanh(c @ w), None)
    step = lambda h, x: (jax.lax.scan(layer, h + x, params)[0], None)
    return jax.vmap(lambda xs: jax.lax.scan(step, jnp.zeros(5, x.dtype), xs)[0])(x)


def blocks_of_layers(params, x):
    """A loop over blocks of a loop over the layers of each."""
    layer = lambda c, w: (jnp.tanh(c @ w), None)
    return jax.lax.scan(lambda c, block: (jax.lax.scan(layer, c, block)[0], None), x, params)[0]


def attention(params, x):
    q, k, v = (jnp.einsum("bti,ihd->bthd", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    return jnp.einsum("bthd,hdi->bi", jnp.einsum("bhts,bshd->bthd", weights, v), params["o"])


def convolution(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["c"], (2, 1), "SAME", dimension_numbers=numbers)
    return jnp.tanh(y.reshape(len(y), -1)) @ params["w"]


def grouped_convolution(params, x):
    numbers = ("NCH", "OIH", "NCH")
    y = jax.lax.conv_general_dilated(
        x, params, (1,), "VALID", dimension_numbers=numbers, feature_group_count=2, rhs_dilation=(2,)
    )
    return jnp.sum(jnp.tanh(y), axis=-1)


def custom_rule(params, x):
    """A rule that is not the derivative: to walk into it would replace it."""

    @jax.custom_vjp
    def doubled(w, x):
        return x @ w

    doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (2 * jnp.outer(kept[1], g), g @ kept[0].T))
    return jax.vmap(lambda x: doubled(params[0], jnp.tanh(x @ params[1])))(x)


@jax.custom_jvp
def custom_activation(x):
    return jnp.tanh(x)


custom_activation.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 3 * tangents[0]))


def laplacian(params, x):
    """Nested derivatives, as in the residual of a differential equation."""
    u = lambda x: (jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]))[0]
    return jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(x)


def carried(params, x, factor):
    step = lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] if factor is None else c[1] * factor), None)
    return jax.lax.scan(step, (x, params), None, length=3)[0][0]


def multiples(params, x):
    a, b, c, d = params
    x = jnp.tanh(x @ (2 * a)) @ (b / 3)
    return jnp.tanh(jnp.tanh(x @ -c) @ (0.5 * -(d.T * 3).T))


def multiple_in_a_loop(params, x):
    """A multiple made outside of a scan over it, and in each step another one of a leaf that it closes over."""
    many, one = params
    step = lambda h, w: (jnp.tanh(h @ w[0] + h @ (one * w[1])), None)
    return jax.lax.scan(step, x, (many / jnp.sum(x**2), jnp.arange(1.0, 4.0, dtype=x.dtype)))[0]


def from_flat(make):
    """A model of one vector, and that vector: what `make` returns a model of, and parameters."""
    model, params = make
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    return lambda theta, x: model(unravel(theta), x), np.asarray(flat, float)


FLAT = from_flat((mlp, LAYERS))


def cut_by_hand(theta, x):
    """Pieces of pieces, in several orders, with gaps; one is multiplied, one added, one of a penalty."""
    first, rest = theta[3:38].reshape(7, 5), theta[40:]
    a, b = rest[:42].reshape(7, 2, 3).transpose(1, 2, 0), rest[44:]
    x = jnp.tanh(x @ first.T / theta[1])
    return jnp.tanh(x @ (2 * a[0].T) + b[:3]) + x @ a[1].T + jnp.sum(b[3:] ** 2)


def flat_layers(params, x):
    """Every layer is a vector, cut inside of the loop over them."""
    layer = lambda h, p: (jnp.tanh(h @ p[:25].reshape(5, 5) + p[25:]), None)
    return jax.lax.scan(layer, x, params)[0]


def flat_recurrent(theta, x):
    """A vector that a loop closes over, cut inside and outside of it, where the pieces are the same."""
    cut = lambda: jnp.split(theta, [36, 66])
    start = jnp.tanh(cut()[2])

    def step(h, x):
        a, b, c = cut()
        return jnp.tanh(h @ a.reshape(6, 6) / 2 + x @ b.reshape(5, 6) + c), None

    return jax.vmap(lambda xs: jax.lax.scan(step, start, xs)[0])(x)


def piece_in_a_carry(w, x):
    changed = jax.lax.scan(lambda c, _: (jnp.tanh(c), None), w[5:], None, length=2)[0]
    return jnp.tanh(x @ w[:5]) + jnp.sum(changed, 0)


def normalised(params, x):
    h = jnp.tanh(x @ params["w"])
    return params["g"] * (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)


def in_linen():
    model = nn.Sequential([nn.Dense(6), jnp.tanh, nn.Dense(3)])
    return Case(model.apply, model.init(jax.random.key(0), X), X, [True] * 4)


def in_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    graph, state = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    return Case(lambda state, x: nnx.merge(graph, state)(x), state, X, [True] * 4)


def in_equinox():
    network = eqx.nn.MLP(5, 3, 6, 1, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_array)
    return Case(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, X, [True] * 4)


def in_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 3])(x)))
    return Case(model.apply, model.init(jax.random.key(0), X), X, [True] * 4)


WORDS = {"e": normal(12, 3), "w": normal(3, 2)}
TOKENS = np.array([[0, 3, 3, 11, 3], [1, 0, 0, 3, -1], [5, 5, 5, 5, 5], [-12, 2, 11, 1, 0]])
STRANGE = np.array([[0, 3, 12, 11, 3], [1, -13, 0, 40, -1], [12, 12, 12, 12, -12], [-40, 2, 11, 1, 0]])


def embedded(take, params, x):
    return jnp.sum(jnp.tanh(take(params["e"], x, axis=0) @ params["w"]), axis=1)


def dropped(table, x):
    """Rows that begin beside the table are not there."""
    numbers = jax.lax.GatherDimensionNumbers((2,), (0,), (0, 1))
    starts = jnp.stack([x % 12, x % 2], -1)
    return jax.lax.gather(table, starts, numbers, (1, 3), mode="fill", fill_value=0.5)


def embedded_in_a_loop(params, x):
    """A table for all steps, and one for each."""
    one, many = params
    step = lambda h, table: (jnp.tanh(h + one[x] * jnp.sum(table[x], 1, keepdims=True)), None)
    return jnp.sum(jax.lax.scan(step, jnp.zeros((*x.shape, 3), one.dtype), many)[0], 1)


def in_linen_embed():
    model = nn.Sequential([nn.Embed(12, 4), nn.Dense(3), jnp.tanh, lambda h: jnp.sum(h, 1)])
    params = model.init(jax.random.key(0), abs(TOKENS))
    return Case(model.apply, params, abs(TOKENS) % 12, [True, False, True], found_centred=[False, False, True])


def in_equinox_embedding():
    table, static = eqx.partition(eqx.nn.Embedding(12, 4, key=jax.random.key(0)), eqx.is_array)
    model = lambda table, x: jnp.sum(jnp.tanh(jax.vmap(jax.vmap(eqx.combine(table, static)))(x)), 1)
    return Case(model, table, TOKENS, [True], found_centred=[False])


CASES = {
    "dense layers": Case(mlp, LAYERS, X, [True] * 6),
    "transposed": Case(lambda p, x: jnp.tanh(x @ p[0].T) @ p[1].T, [normal(7, 5), normal(2, 7)], X, [True, True]),
    "jit and remat": Case(through_calls, LAYERS, X, [True] * 6),
    "tied to its transpose": Case(lambda w, x: jnp.tanh(x @ w) @ w.T, normal(5, 7), X, [True]),
    "twice": Case(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w), normal(5, 5), X, [True]),
    "a bias in front": Case(lambda p, x: jnp.tanh(p[1] + x @ p[0]), BIASED, X, [True, True]),
    "a bias times a number": Case(
        lambda p, x: jnp.tanh(jnp.sum(x) * p[1] + 2 * (x @ p[0])) + (x @ (3 * p[2]) + p[3]),
        [*BIASED, normal(5, 7), normal(7)], X, [True, False, True, True],
    ),
    "half of a bias": Case(lambda p, x: jnp.tanh(x @ p[0] + 0.5 * p[1]), BIASED, X, [True, True]),
    "a bias of two layers": Case(lambda p, x: jnp.tanh(jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[1]),
                                 [*BIASED, normal(7, 7)], X, [True, False, True]),
    "a bias and more": Case(lambda p, x: jnp.tanh(x @ p[0] + p[1]) * p[1], BIASED, X, [True, False]),
    "a bias twice": Case(lambda p, x: jnp.tanh(x @ p[0] + p[1] + p[1]), BIASED, X, [True, False]),
    "a product that is also used": Case(lambda p, x: (lambda y: jnp.tanh(y + p[1]) * y)(x @ p[0]), BIASED, X,
                                        [True, False]),
    "a product that is also put out": Case(lambda p, x: (lambda y: (jnp.tanh(y + p[1]), y))(x @ p[0]), BIASED, X,
                                           [True, False]),
    "a product that is also used inside": Case(
        lambda p, x: (lambda y: jax.jit(lambda y: jnp.tanh(y + p[1]) + y)(y))(x @ p[0]), BIASED, X, [True, False]),
    "a product put out by a call": Case(
        lambda p, x: jnp.tanh(jax.jit(lambda x, w: jnp.einsum("bi,io->bo", x, w))(x, p[0])[:, None] + p[1])[:, 0],
        BIASED, X, [True, True]),
    "weights of two uses": Case(lambda p, x: jnp.tanh(jnp.tanh(x @ p[0] + p[1]) @ p[0] + p[2]),
                                [normal(5, 5), normal(5), normal(5)], X, [True, False, False]),
    "a bias of heads": Case(lambda p, x: jnp.tanh(jnp.einsum("bhi,hio->bho", x, p[0]) + p[1]),
                            [normal(3, 5, 2), normal(3, 2)], normal(4, 3, 5), [True, True]),
    "a bias of heads turned": Case(
        lambda p, x: jnp.tanh(jnp.swapaxes(jnp.einsum("bi,iho->bho", x, p[0]), 1, 2) + p[1]),
        [normal(5, 3, 2), normal(2, 3)], X, [True, False]),
    "a bias of one number": Case(lambda p, x: jnp.tanh(x @ p[0] + p[1]), [normal(5, 7), normal()], X, [True, False]),
    "a bias within a loop": Case(
        lambda p, x: jax.lax.scan(lambda c, q: (jnp.tanh(c @ q[0] + 2 * q[1] + p[2]), None), x, p[:2])[0],
        [normal(3, 5, 5), normal(3, 5), normal(5)], X, [True, True, False]),
    "a bias behind products that are not followed": Case(
        lambda p, x: jax.lax.scan(
            lambda c, q: (jnp.tanh(squared(squared(c, q[0]), q[1]) @ q[2] + q[3]), None), x, p)[0],
        [normal(3, 5, 5) / 5, normal(3, 5, 5) / 5, normal(3, 5, 5), normal(3, 5)], X, [False, False, True, True]),
    "a bias cut out beside slices that overlap": Case(
        lambda p, x: jnp.tanh(x @ p[0][:5] + p[1][:5]) + x @ p[0][3:8] + jnp.tanh(x @ p[1][5:].reshape(5, 5)),
        [normal(8, 5), normal(30)], X, [False, True]),
    "a bias of slices that overlap": Case(
        lambda p, x: jnp.tanh(x @ p[0][:5] + p[1]) + x @ p[0][3:8], [normal(8, 5), normal(5)], X, [False, False]),
    "a bias closed over": Case(
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w + p[1]), None), x, p[0])[0],
        [normal(3, 5, 5), normal(5)], X, [True, False]),
    "a product put out by a loop": Case(
        lambda p, x: (lambda c, ys: c + jnp.sum(ys, 0))(
            *jax.lax.scan(lambda c, q: (lambda y: (jnp.tanh(y + q[1]), y))(c @ q[0]), x, p)),
        [normal(3, 5, 5), normal(3, 5)], X, [True, False]),
    "a bias of one position": Case(
        lambda p, x: jnp.tanh(jax.lax.conv_general_dilated(
            x, p[0], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2) + p[1]),
        [normal(3, 2, 6), normal(6)], normal(4, 3, 4), [True, True]),
    "einsum over positions": Case(
        lambda p, x: jnp.sum(jnp.tanh(jnp.einsum("bti,io->bto", x, p["w"]) + p["b"]), axis=1),
        {"w": normal(5, 7), "b": normal(7)}, normal(4, 3, 5), [False, True],
    ),
    "einsum with its own heads": Case(
        lambda w, x: jnp.sum(jnp.tanh(jnp.einsum("bhd,hde->bhe", x, w)), axis=1), normal(3, 5, 6), normal(4, 3, 5),
        [True],
    ),
    "on the left": Case(lambda w, x: jax.vmap(lambda x: jnp.tanh(w @ x))(x), normal(7, 5), X, [True]),
    "lax.map": Case(lambda w, x: jax.lax.map(lambda x: jnp.tanh(x @ w), x), normal(5, 7), X, [True]),
    "reshaped": Case(lambda w, x: jnp.tanh(x @ w.reshape(7, 5).T[:, :, None].reshape(5, 7)), normal(35), X, [True]),
    "flat": Case(lambda w, x: jnp.tanh(x @ w.reshape(5, 7)), normal(35), X, [True]),
    "scan over layers": Case(lambda w, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0], normal(3, 5, 5),
                             X, [True]),
    "scan over blocks of layers": Case(blocks_of_layers, normal(2, 3, 5, 5), X, [True]),
    "recurrent": Case(recurrent, {"h": normal(6, 6) / 2, "x": normal(5, 6), "b": normal(6)}, normal(4, 7, 5),
                      [False, True, True]),
    "layers within time": Case(deep_recurrent, normal(2, 5, 5), normal(4, 3, 5), [True]),
    "carried along": Case(partial(carried, factor=None), normal(5, 5), X, [True]),
    "carried and changed": Case(partial(carried, factor=0.5), normal(5, 5), X, [False]),
    "attention": Case(attention, {name: normal(5, 2, 3) for name in "qkv"} | {"o": normal(2, 3, 5)}, normal(4, 3, 5),
                      [True] * 4),
    "convolution": Case(convolution, {"c": normal(3, 2, 2, 4), "w": normal(72, 2)}, normal(4, 6, 6, 2), [True, True]),
    "grouped, dilated": Case(grouped_convolution, normal(6, 2, 3), normal(4, 4, 9), [True]),
    "nested derivatives": Case(laplacian, [normal(3, 6), normal(6, 1)], normal(4, 3), [True, True], 10.0),
    "normalised": Case(normalised, {"g": normal(7), "w": normal(5, 7)}, X, [False, True]),
    "a rule for an activation": Case(lambda w, x: custom_activation(x @ w), normal(5, 7), X, [True]),
    "a rule of its own": Case(custom_rule, [normal(7, 3), normal(5, 7)], X, [False, True]),
    "a penalty beside it": Case(lambda w, x: jnp.tanh(x @ w) + jnp.sum(w**2), normal(5, 7), X, [False]),
    "also an output": Case(lambda w, x: (jnp.tanh(x @ w), jnp.broadcast_to(w, (len(x), 5, 7))), normal(5, 7), X,
                           [False]),
    "out of a scan, as it is": Case(
        lambda w, x: x @ jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), w.T), x[0], None, length=2)[1][0], normal(5, 5), X,
        [False],
    ),
    "into a carry": Case(
        lambda w, x: (lambda c: jnp.tanh(x @ w) @ c[1])(
            jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ w), w), None), (x, 0 * w), None, length=2)[0]
        ), normal(5, 5), X, [False],
    ),
    "a slice into a carry": Case(
        lambda w, x: x @ jax.lax.scan(lambda c, r: (r, x @ r), jnp.zeros((5, 5), x.dtype), w)[0], normal(2, 5, 5), X,
        [False],
    ),
    "a jit into a carry": Case(
        lambda w, x: jnp.sum(jax.lax.scan(lambda c, _: (jax.jit(lambda a: a.T)(w), x @ w), jnp.zeros((5, 5), x.dtype),
                                          None, length=2)[0], 0)[None] + x * 0 + x @ w, normal(5, 5), X, [False],
    ),
    "multiples": Case(multiples, [normal(5, 7), normal(7, 5), normal(5, 5), normal(5, 2)], X, [True] * 4),
    "a multiple by data": Case(lambda w, x: jax.vmap(lambda x: x @ (w.T / jnp.sum(x**2)).T)(x), normal(5, 7), X,
                               [True]),
    "tied to its multiple": Case(lambda w, x: jnp.tanh(x @ w) @ (-2 * w).T, normal(5, 7), X, [True]),
    "times another leaf": Case(lambda p, x: jnp.tanh(x @ (p["c"] * p["w"])) @ (p["v"] / jnp.exp(p["b"])),
                               {"b": normal(1), "c": normal(1, 1), "v": normal(7, 2), "w": normal(5, 7)}, X,
                               [False, False, True, True]),
    "times one of its products": Case(lambda w, x: jax.vmap(lambda x: x @ (w * jnp.sum(jnp.tanh(x @ w))))(x),
                                      normal(5, 7), X, [True]),
    "of its own length": Case(lambda w, x: jnp.tanh(x @ (w / jnp.linalg.norm(w))), normal(5, 7), X, [False]),
    "times its own entry": Case(lambda w, x: x @ (w * w[:1, :1]), normal(5, 7), X, [False]),
    "one number, times and in a product": Case(lambda p, x: x @ (p[0] * p[1]) + x[:, :1] @ p[0],
                                               [normal(1, 1), normal(5, 7)], X, [False, True]),
    "spread by a multiple": Case(lambda w, x: x[:, :1] @ (w * x[:1, :1]), normal(), X, [False]),
    "a multiple within a loop": Case(multiple_in_a_loop, [normal(3, 5, 5), normal(5, 5)], X, [True, True]),
    "flat vector": Case(*FLAT, X, [True]),
    "flat vector of a recurrence": Case(
        *from_flat((recurrent, {"h": normal(6, 6) / 2, "x": normal(5, 6), "b": normal(6)})), normal(4, 7, 5), [True]),
    "flat vector of tied weights": Case(
        *from_flat((lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T, {"w": normal(5, 7), "b": normal(7)})), X,
        [True]),
    "flat vector of a deeper one": Case(
        *from_flat((lambda p, x: FLAT[0](p["a"], x * p["b"]), {"a": FLAT[1], "b": normal(5)})), X, [True]),
    "cut by hand": Case(cut_by_hand, normal(95), X, [True]),
    "layers of a stack": Case(lambda p, x: mlp(list(zip(*p, strict=True)), x), [normal(3, 5, 5), normal(3, 5)], X,
                              [True, True]),
    "columns": Case(lambda w, x: jnp.tanh(jnp.tanh(x @ w[:, :3]) @ w[:3, 3:7] @ jnp.split(w[:, 7:], 2, 1)[1][:4]),
                    normal(5, 11), X, [True]),
    "unstacked": Case(lambda w, x: jnp.tanh(x @ w[:, 0]) @ jnp.unstack(w[:, 1:], axis=1)[1].T, normal(5, 3, 7), X,
                      [True]),
    "gaps": Case(lambda p, x: (lambda q: jnp.tanh(x @ q[3:38].reshape(5, 7) + q[40:47]))(2 * p), normal(50), X, [True]),
    "within a loop and without": Case(lambda p, x: flat_layers(p, x) + jnp.sum(p[:, 25:] ** 2), normal(3, 30), X,
                                      [False]),
    "flat layers": Case(flat_layers, normal(3, 30), X, [True]),
    "flat recurrence": Case(flat_recurrent, normal(72), normal(4, 3, 5), [True]),
    "a piece in a carry": Case(piece_in_a_carry, normal(8, 7), X, [True]),
    "a piece put out": Case(lambda w, x: (jnp.tanh(x @ w[:5]), jnp.broadcast_to(w[5:], (len(x), 3, 7))), normal(8, 7),
                            X, [True]),
    "pieces that overlap": Case(lambda w, x: jnp.tanh(x @ w[:5]) + x @ w[3:8], normal(8, 5), X, [False]),
    "a piece and the whole": Case(lambda w, x: jnp.tanh(x @ w) + x[:, :2] @ w[:2], normal(5, 7), X, [False]),
    "a piece of a piece": Case(lambda w, x: jnp.tanh(x @ w[:5]) + w[:5][0] + x[:, :3] @ w[5:], normal(8, 7), X,
                               [False]),
    "a piece in two ways": Case(lambda w, x: jnp.tanh(x @ w[:5] @ w[:5]) @ w[5:], normal(10, 5), X, [True]),
    "a piece in a product and otherwise": Case(
        lambda w, x: jnp.tanh(x @ w[:5]) @ w[5:] + jnp.sum(w[5:] ** 2), normal(12, 7), X, [True]),
    "pieces that disagree": Case(lambda w, x: x @ w[:15].reshape(5, 3) + x[:, :3] @ w[:15].reshape(3, 5)[:, :3],
                                 normal(20), X, [False]),
    "every other row": Case(lambda w, x: jnp.tanh(x @ jax.lax.slice(w, (0, 0), (10, 7), (2, 1))), normal(10, 7), X,
                            [False]),
    "an empty piece": Case(lambda w, x: jnp.tanh(x @ w[:5] + jnp.sum(w[5:])), normal(5, 7), X, [True]),
    "joined": Case(lambda w, x: jnp.tanh(x @ jnp.concatenate(w, 1)), [normal(5, 3), normal(5, 4)], X, [True, True]),
    "joined to a bias": Case(
        lambda p, x: jnp.tanh(jnp.append(x, jnp.ones_like(x[:, :1]), 1) @ jnp.concatenate([p["w"], p["b"][None]])),
        {"b": normal(7), "w": normal(5, 7)}, X, [True, True]),
    "joined to numbers": Case(
        lambda w, x: jnp.tanh(jnp.concatenate([jnp.ones((7, 2), w.dtype), w.T, 2 * w.T], 1)[:, :, None].reshape(7, 12)
                              @ jnp.concatenate([x, x, x[:, :2]], 1).T).T, normal(5, 7), X, [True]),
    "stacked": Case(lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack(w))[0],
                    [normal(5, 5), normal(5, 5), normal(5, 5)], X, [True] * 3),
    "stacked behind": Case(
        lambda w, x: jnp.sum(jnp.tanh(jnp.einsum("bi,ijo->bjo", x, jnp.stack([w[0], -w[1], w[0]], 1))), 1),
        [normal(5, 7), normal(5, 7)], X, [True, True]),
    "joined pieces": Case(*from_flat((lambda p, x: jnp.tanh(x @ jnp.concatenate([p["a"], p["b"].T], 1)) * p["c"],
                                      {"a": normal(5, 3), "b": normal(4, 5), "c": normal(7)})), X, [True]),
    "joined, then cut": Case(lambda w, x: jnp.tanh(x @ jnp.concatenate(w, 1)[:, 1:]), [normal(5, 3), normal(5, 4)], X,
                             [False, False]),
    "joined across the grain": Case(lambda w, x: jnp.tanh(x @ jnp.concatenate(w).reshape(5, 7)),
                                    [normal(17), normal(18)], X, [False, False]),
    "joined tables": Case(lambda e, x: jnp.sum(jnp.tanh(jnp.concatenate(e)[x]), 1), [normal(5, 3), normal(7, 3)],
                          TOKENS, [False, False]),
    "joined kernels": Case(lambda c, x: convolution({"c": jnp.concatenate(c, 3), "w": jnp.ones((72, 2), x.dtype)}, x),
                           [normal(3, 2, 2, 1), normal(3, 2, 2, 3)], normal(4, 6, 6, 2), [True, True]),
    "joined and alone": Case(lambda w, x: jnp.tanh(x @ jnp.concatenate(w, 1)) + jnp.sum(w[0] ** 2),
                             [normal(5, 3), normal(5, 4)], X, [False, True]),
    "embedded": Case(lambda p, x: jnp.tanh(p["e"][x] @ p["w"]), {"e": normal(9, 5), "w": normal(5, 7)},
                     np.array([0, 3, 3, 8]), [True, True], found_centred=[False, True]),
    "embedded words": Case(partial(embedded, jnp.take), WORDS, TOKENS, [True, True], found_centred=[False, True]),
    "embedded one by one": Case(lambda p, x: embedded(lambda e, x, axis: jax.vmap(jax.vmap(lambda i: e[i]))(x), p, x),
                                WORDS, TOKENS, [True, True], found_centred=[False, True]),
    "embedded, clipped": Case(partial(embedded, partial(jnp.take, mode="clip")), WORDS, STRANGE, [True, True],
                              found_centred=[False, True]),
    "embedded, filled": Case(partial(embedded, lambda e, x, axis: e.at[x].get(mode="fill", fill_value=0.3)), WORDS,
                             STRANGE, [True, True], found_centred=[False, True]),
    "embedded, promised": Case(partial(embedded, lambda e, x, axis: e.at[x].get(mode="promise_in_bounds")), WORDS,
                               TOKENS, [True, True], found_centred=[False, True]),
    "embedded in columns": Case(
        lambda e, x: jnp.sum(jnp.tanh(jnp.take(e.reshape(3, 12, 2), x, axis=1)), axis=(0, 2)), normal(36, 2), TOKENS,
        [True], found_centred=[False]),
    "embedded at one place": Case(lambda e, x: jax.lax.map(lambda i: jnp.tanh(e[i] + e[2 - i]), x[:, 0]), normal(12, 3),
                                  TOKENS % 3, [True], found_centred=[False]),
    "embedded in a loop": Case(embedded_in_a_loop, [normal(12, 3), normal(3, 12, 3)], TOKENS, [True, True],
                               found_centred=[False, False]),
    "a small table": Case(partial(embedded, jnp.take), {"e": normal(2, 3), "w": normal(3, 2)}, TOKENS % 2, [True, True],
                          found_centred=[False, True]),
    "embedded in a flat vector": Case(*from_flat((partial(embedded, jnp.take), WORDS)), TOKENS, [True]),
    "one-hot": Case(partial(embedded, lambda e, x, axis: jax.nn.one_hot(x, 12, dtype=e.dtype) @ e), WORDS, TOKENS,
                    [True, True]),
    "embedded and projected": Case(lambda e, x: jnp.sum(jnp.tanh(e[x]), 1) @ e.T, normal(12, 3), TOKENS, [False]),
    "embedded from a batch of one": Case(lambda e, x: jnp.sum(jnp.tanh(jax.vmap(lambda e, x: e[x])(e[None], x)), 1),
                                         normal(12, 3), TOKENS, [True], found_centred=[False]),
    "embedded and one-hot": Case(lambda e, x: jnp.sum(jnp.tanh(jax.nn.one_hot(x, 12, dtype=e.dtype) @ e + e[x]), 1),
                                 normal(12, 3), TOKENS, [False]),
    "embedded both ways": Case(lambda e, x: jnp.sum(jnp.tanh(e[x % 5]) + e.T[x % 5], 1), normal(5, 5), TOKENS, [False]),
    "dropped along another axis": Case(lambda e, x: jnp.sum(jnp.tanh(dropped(e, x)), 1), normal(12, 3), TOKENS,
                                       [False]),
    "embedded along two axes": Case(lambda e, x: jnp.sum(jnp.tanh(e[x, x % 3]), 1), normal(12, 3, 2), TOKENS, [False]),
    "a multiple of a table": Case(lambda e, x: jnp.sum(jnp.tanh((2 * e)[x]), 1), normal(12, 3), TOKENS, [False]),
    "a block of a table": Case(
        lambda e, x: jax.vmap(lambda i: jnp.tanh(jax.lax.dynamic_slice_in_dim(e, i[0], 2)))(x), normal(12, 3), TOKENS,
        [False]),
    "linen.Embed": in_linen_embed(),
    "equinox.Embedding": in_equinox_embedding(),
    "either branch": Case(lambda w, x: jax.vmap(lambda x: jax.lax.cond(x[0] > 0, lambda: x @ w, lambda: 2 * x @ w))(x),
                          normal(5, 7), X, [False]),
    "unused": Case(lambda p, x: jnp.tanh(x @ p[0]), [normal(5, 7), normal(3, 3)], X, [True, False]),
    "flax.linen": in_linen(),
    "flax.nnx": in_nnx(),
    "equinox": in_equinox(),
    "haiku": in_haiku(),
}  # fmt: skip
