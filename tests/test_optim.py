"""Schedules against closed forms, the update against AdamW written out in float64 numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import optim

JIT = pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])


def _closed_form(name, t, *, lr, warmup, steps, ratio):
    if t < warmup:
        return lr * t / warmup
    done = min(1.0, (t - warmup) / (steps - warmup))
    part = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return lr * (ratio + (1 - ratio) * part[name])


@JIT
@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize(("warmup", "ratio"), [(0, 0.0), (10, 0.0), (7, 0.1)])
def test_schedule_is_its_closed_form_at_every_step_and_stays_at_its_end(name, warmup, ratio, jit):
    rate = jit(optim.learning_rate(lr=3e-4, name=name, warmup=warmup, steps=50, min_lr_ratio=ratio))
    expected = [
        _closed_form(name, t, lr=3e-4, warmup=warmup, steps=50, ratio=ratio) for t in range(60)
    ]
    np.testing.assert_allclose([rate(t) for t in range(60)], expected, rtol=1e-5, atol=1e-10)


def _adamw(params, grads, rates, *, b1, b2, eps, decay, clip):
    """AdamW in float64; `decay` maps a name to its weight decay."""
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        for k, g in grad.items():
            g = g * min(1.0, clip / norm) if clip else g
            first[k] = b1 * first[k] + (1 - b1) * g
            second[k] = b2 * second[k] + (1 - b2) * g**2
            mean, square = first[k] / (1 - b1**t), second[k] / (1 - b2**t)
            params[k] = params[k] - rate * (mean / (np.sqrt(square) + eps) + decay[k] * params[k])
    return params


@JIT
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_adamw_with_clipping(jit, clip, weight_decay):
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 2)), "norm": rng.normal(size=(4, 2)), "b": np.ones(2)}
    grads = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(8)]
    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
    tx, rate = optim.make(
        lr=0.05, warmup=2, steps=8, weight_decay=weight_decay, clip_norm=clip, **settings
    )
    params = jax.tree.map(jnp.float32, start)
    state, update = tx.init(params), jit(tx.update)
    for grad in grads:
        updates, state = update(jax.tree.map(jnp.float32, grad), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    expected = _adamw(
        dict(start),
        grads,
        [_closed_form("cosine", t, lr=0.05, warmup=2, steps=8, ratio=0.0) for t in range(8)],
        decay={"kernel": weight_decay, "norm": 0.0, "b": 0.0},
        clip=clip,
        **settings,
    )
    for name, value in params.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6)
    assert float(rate(2)) == pytest.approx(0.05)


def test_decay_spares_norms_biases_and_vectors_even_when_layers_are_stacked():
    matrix, stacked_vector, vector = jnp.ones((3, 4)), jnp.ones((6, 4)), jnp.ones(4)
    params = {
        "embed": {"embedding": matrix},
        "layers": {
            "attention": {"q": {"kernel": jnp.ones((6, 4, 4)), "bias": stacked_vector}},
            "mlp": {"down": {"kernel": jnp.ones((6, 4, 4))}},
            "attention_norm": {"scale": stacked_vector},
            "post_norm": stacked_vector,
        },
        "final_norm": {"scale": vector},
        "lm_head": {"kernel": matrix},
        "gain": vector,
    }
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, decays in jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))
        if decays
    }
    assert kept == {
        "embed/embedding",
        "layers/attention/q/kernel",
        "layers/mlp/down/kernel",
        "lm_head/kernel",
    }


def test_own_decay_mask_is_used():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    tx, _ = optim.make(
        lr=1.0,
        schedule="constant",
        warmup=0,
        steps=1,
        weight_decay=0.5,
        decay_mask=lambda tree: {"a": False, "b": True},
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["a"], 0.0)
    np.testing.assert_array_equal(updates["b"], -0.5)


@JIT
def test_first_update_of_a_warm_up_changes_nothing(jit):
    tx, _ = optim.make(lr=1.0, warmup=5, steps=10, weight_decay=0.1)
    params = {"kernel": jnp.ones((2, 2))}
    updates, _ = jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], 0.0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"schedule": "cosin"}, "schedule='cosin' must be one of cosine, linear, constant"),
        ({"warmup": 10}, r"warmup=10 updates must lie in \[0, 10\)"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio=2.0"),
        ({"b1": 1.0}, "b1=1.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
    ],
)
def test_wrong_settings_are_named_with_rule_and_fix(wrong, words):
    with pytest.raises(ValueError, match=words):
        optim.make(**({"lr": 1e-3, "warmup": 1, "steps": 10} | wrong))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_smaller_states_take_nearly_the_same_steps(name):
    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(256, 128)))}
    target = jnp.float32(rng.normal(size=(256, 128)))
    settings = {"lr": 0.05, "schedule": "constant", "warmup": 0, "steps": 100, "name": name}

    def run(dtype):
        tx, _ = optim.make(**settings, moments_dtype=dtype)
        state, now = tx.init(params), params
        update = jax.jit(tx.update)
        for _ in range(40):
            updates, state = update(jax.tree.map(lambda w: w - target, now), state, now)
            now = jax.tree.map(jnp.add, now, updates)
        return float(jnp.mean((now["w"] - target) ** 2)), state

    (exact, whole), (rounded, small) = run("float32"), run("bfloat16")
    before = float(jnp.mean((params["w"] - target) ** 2))
    assert exact < 0.2 * before and abs(rounded - exact) < 0.01 * before

    def size(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    weights = params["w"].nbytes
    assert size(whole) - size(small) == weights // 2  # the mean of gradients, at half the bytes
    squares = size(small) - weights // 2
    assert squares > weights if name == "adamw" else squares < weights // 10


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="'lion'"):
        optim.make(lr=1.0, warmup=0, steps=2, name="lion")
