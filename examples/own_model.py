"""A model of one's own in three spellings: plain functions, Equinox, Flax NNX.

What a step needs of a model are two functions: hidden states of packed rows, in which no token
sees another segment, and the output matrix. Both get the parameters that are trained and whatever
else the model holds (`frozen`), so any framework fits that can part the two.

    python examples/own_model.py [plain|equinox|nnx]
"""

import sys

import jax
import jax.numpy as jnp

from sage_jax import logprobs
from sage_jax.models import attention

VOCABULARY, WIDTH, HEADS = 16, 24, 3


def block(embed, qkv, out, batch):
    """One layer of causal attention over packed rows, shared by the three models."""
    x = embed[batch.tokens_RT]
    q, k, v = jnp.split((x @ qkv).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
    seen = attention.causal(jnp.asarray(batch.segment_RT), jnp.asarray(batch.position_RT))
    return x + attention.attend(q, k, v, seen, scale=(WIDTH / HEADS) ** -0.5) @ out


def weights(key):
    e, q, o = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(e, (VOCABULARY, WIDTH)),
        "qkv": 0.2 * jax.random.normal(q, (WIDTH, 3 * WIDTH)),
        "out": 0.2 * jax.random.normal(o, (WIDTH, WIDTH)),
    }


def plain(key):
    """Parameters are a dict: nothing to adapt."""
    logps_fn = logprobs.make_logps_fn(
        lambda params, frozen, batch: block(**params, batch=batch),
        lambda params, frozen: params["embed"].T,
    )
    return logps_fn, weights(key), None


def equinox(key):
    """`partition` parts the arrays from the rest, `combine` puts them together again."""
    import equinox as eqx

    class Model(eqx.Module):
        embed: jax.Array
        qkv: jax.Array
        out: jax.Array
        name: str = "an attribute that is no array"

        def __call__(self, batch):
            return block(self.embed, self.qkv, self.out, batch)

    params, static = eqx.partition(Model(**weights(key)), eqx.is_inexact_array)
    logps_fn = logprobs.make_logps_fn(
        lambda params, frozen, batch: eqx.combine(params, static)(batch),
        lambda params, frozen: params.embed.T,
    )
    return logps_fn, params, None


def nnx(key):
    """`split` parts parameters from other state, which is the frozen part; `merge` joins them."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            first = weights(key)
            self.embed, self.qkv, self.out = (nnx.Param(first[k]) for k in ("embed", "qkv", "out"))
            self.calls = nnx.Variable(jnp.zeros(()))  # state that is not trained

        def __call__(self, batch):
            return block(self.embed[...], self.qkv[...], self.out[...], batch)

    graph, params, rest = nnx.split(Model(), nnx.Param, ...)
    logps_fn = logprobs.make_logps_fn(
        lambda params, frozen, batch: nnx.merge(graph, params, frozen)(batch),
        lambda params, frozen: params["embed"][...].T,
    )
    return logps_fn, params, rest


MODELS = {"plain": plain, "equinox": equinox, "nnx": nnx}


def main(name="plain", steps=10):
    import optax
    from custom_loop import pack

    from sage_jax import losses, step

    def digits(text, **_):  # the simplest tokenizer: a letter is its place in the alphabet
        return type("Encoded", (), {"input_ids": [ord(c) % VOCABULARY for c in text]})

    logps_fn, params, frozen = MODELS[name](jax.random.key(0))
    rows = pack(digits, [("1+2=", "3;", "4;"), ("7-3=", "4;", "5;")])
    reference = jax.jit(step.make_stats_step(logps_fn))(params, frozen, rows).logps
    tx = optax.adam(1e-2)
    train = jax.jit(step.make_train_step(logps_fn, losses.sigmoid(beta=0.3), tx))
    state, seen = step.init_state(params, tx), []
    for _ in range(steps):
        state, output = train(state, frozen, rows._replace(ref_logps_RS2=reference))
        seen.append(float(output.metrics["loss"]))
    print(f"{name}: loss {seen[0]:.4f} -> {seen[-1]:.4f}")
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
