"""The decoder's own promises: packing, caching, recomputation, sharding, cost."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sage_jax import models
from sage_jax.models import attention, layers, rope
from sage_jax.runtime import mesh as meshes

SPECS = {
    "llama": models.ModelSpec(
        vocab=50,
        d_model=32,
        d_ff=48,
        layers=3,
        heads=4,
        kv_heads=2,
        tied=False,
        rope_scaling=models.RopeScaling("linear", factor=2.0),
    ),
    "qwen2": models.ModelSpec(
        vocab=50, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=1, head_dim=12, family="qwen2"
    ),
    "gemma3_text": models.ModelSpec(  # two windows, two rotary bases, caps, four norms
        vocab=50,
        d_model=32,
        d_ff=48,
        layers=3,
        heads=4,
        kv_heads=2,
        family="gemma3_text",
        activation="gelu_tanh",
        windows=(4, 0, 4),
        rope_theta=1000.0,
        local_rope_theta=50.0,
        attention_softcap=5.0,
        final_softcap=8.0,
    ),
    "mixtral": models.ModelSpec(
        vocab=50,
        d_model=32,
        d_ff=24,
        layers=2,
        heads=4,
        kv_heads=2,
        family="mixtral",
        windows=(5, 5),
        experts=4,
        experts_per_token=2,
    ),
}


@pytest.fixture(params=sorted(SPECS))
def model(request):
    return models.Model(SPECS[request.param])


@functools.cache
def _random_params(model):
    """Random weights whose biases and norms differ from their initial zeros and ones."""

    def make(key):
        fresh, treedef = jax.tree.flatten(model.init(key))
        keys = jax.random.split(key, len(fresh))
        moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, fresh, strict=True)]
        return jax.tree.unflatten(treedef, moved)

    return jax.jit(make)(jax.random.key(0))


@pytest.fixture
def params(model):
    return _random_params(model)


def _sequences(lengths, vocab=50):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, n, dtype=np.int32) for n in lengths]


def _pack(sequences, length, gap=0):
    """One row: sequences one after the other, `gap` padding tokens between them."""
    tokens, position, segment = (np.zeros((1, length), np.int32) for _ in range(3))
    at = 0
    for number, ids in enumerate(sequences, start=1):
        here = slice(at, at + len(ids))
        tokens[0, here], position[0, here], segment[0, here] = ids, np.arange(len(ids)), number
        at += len(ids) + gap
    return tokens, position, segment


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_packed_sequences_give_the_hidden_states_they_give_alone(model, params, jit):
    sequences = _sequences([7, 1, 12])
    row = _pack(sequences, 32, gap=2)
    packed = jit(model.hidden)(params, *row)[0]
    for number, ids in enumerate(sequences, start=1):
        alone = jax.jit(model.hidden)(params, *_pack([ids], len(ids)))[0]
        np.testing.assert_allclose(packed[row[2][0] == number], alone, atol=1e-5)


def test_padding_is_finite_and_passes_no_gradient(model, params):
    tokens, position, segment = _pack(_sequences([5, 4]), 16)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, tokens):
        hidden = model.hidden(params, tokens, position, segment)
        return jnp.sum(jnp.where(segment[..., None] > 0, hidden, 0.0) ** 2), hidden

    grads, hidden = gradient(params, tokens)
    assert np.isfinite(hidden).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    changed, _ = gradient(params, np.where(segment > 0, tokens, 9))
    assert all(map(np.array_equal, jax.tree.leaves(grads), jax.tree.leaves(changed)))


def test_greedy_decoding_with_the_cache_equals_full_forward_passes(model, params):
    prompts, new = _sequences([6, 3, 1]), 5
    rows, width = len(prompts), 8
    tokens = np.zeros((rows, width), np.int32)
    valid = np.zeros((rows, width + new), bool)
    for row, ids in enumerate(prompts):  # padded on the left
        tokens[row, width - len(ids) :], valid[row, width - len(ids) : width] = ids, True
    lengths = np.array([len(ids) for ids in prompts])
    position = np.maximum(np.arange(width) - (width - lengths)[:, None], 0)
    cache = model.init_cache(rows, width + new)
    hidden, cache = jax.jit(model.prefill)(params, tokens, position, valid[:, :width], cache)
    hidden, decode, found = hidden[:, -1], jax.jit(model.decode, donate_argnums=4), []
    for i in range(new):
        token = jnp.argmax(hidden @ model.head(params), -1)
        found.append(token)
        valid[:, width + i] = True
        # A copy: a call that still runs may read the very array it was given.
        hidden, cache = decode(params, token, lengths + i, valid.copy(), cache, width + i)
    assert decode._cache_size() == 1  # the slot is traced

    full = jax.jit(model.hidden)
    for row, ids in enumerate(prompts):
        expected = list(ids)
        for _ in range(new + 1):
            states = full(params, *_pack([np.array(expected)], width + new))[0]
            state = states[len(expected) - 1]
            expected.append(int((state @ model.head(params)).argmax()))
        assert [int(t[row]) for t in found] == expected[len(ids) : -1]
        np.testing.assert_allclose(hidden[row], state, atol=1e-5)


def test_prefill_refuses_a_cache_that_is_too_short(model, params):
    ones = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of 3"):
        model.prefill(params, ones, ones, ones > 0, model.init_cache(1, 3))


def test_recomputation_changes_no_gradient(model, params):
    row = _pack(_sequences([9, 7]), 16)

    def gradient(remat):
        other = dataclasses.replace(model, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(other.hidden(p, *row) ** 3)))(params)

    kept = gradient("none")
    for remat in ("dots", "full"):
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(gradient(remat)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_bfloat16_computes_in_bfloat16_from_float32_parameters(model, params):
    half = dataclasses.replace(model, dtype="bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    row = _pack(_sequences([9]), 9)
    hidden = jax.jit(half.hidden)(params, *row)
    assert hidden.dtype == jnp.bfloat16
    full = jax.jit(model.hidden)(params, *row)
    assert 1e-4 < np.abs(hidden - full).max() < 0.1
    assert jax.eval_shape(half.logits, params, row[0]).dtype == jnp.float32


def test_one_trace_serves_batches_that_are_packed_differently(model, params):
    hidden = jax.jit(model.hidden)
    hidden(params, *_pack(_sequences([9, 3]), 16))
    hidden(params, *_pack(_sequences([2, 2, 8]), 16))
    assert hidden._cache_size() == 1


def test_parameter_paths_are_those_the_sharding_rules_name(model):
    tree = jax.eval_shape(model.init, jax.random.key(0))
    paths = {
        "/".join(key.key for key in keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    spec = model.spec
    assert paths["embed/embedding"] == (50, 32)
    assert paths["layers/attention/k/kernel"] == (spec.layers, 32, spec.kv_heads * spec.head_dim)
    if spec.experts:
        assert paths["layers/mlp/experts/down/kernel"] == (spec.layers, 4, 24, 32)
    else:
        assert paths["layers/mlp/down/kernel"] == (spec.layers, 48, 32)
    assert paths["layers/mlp_norm/scale"] == (spec.layers, 32)
    assert paths["final_norm/scale"] == (32,)
    assert ("lm_head/kernel" in paths) == (not spec.tied)
    assert ("layers/attention/q/bias" in paths) == (spec.family == "qwen2")


def test_rows_stay_sharded_and_unchanged_over_eight_devices(model, params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    calls = []

    def constrain(x):
        calls.append(x.shape)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", None, None)))

    row = [np.repeat(x, 8, axis=0) for x in _pack(_sequences([9, 7]), 16)]
    sharded = dataclasses.replace(model, constrain=constrain)
    hidden = jax.jit(sharded.hidden)(params, *jax.device_put(row, rows))
    assert set(calls) == {(8, 16, 32)}
    assert hidden.sharding.is_equivalent_to(rows, 3)
    np.testing.assert_allclose(hidden, jax.jit(model.hidden)(params, *row), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_forward_flops_are_those_xla_counts(family):
    model = models.Model(SPECS[family])
    spec = dataclasses.replace(model.spec, layers=1, vocab=300, d_model=64, d_ff=96, head_dim=16)
    one = dataclasses.replace(model, spec=spec)  # XLA counts a loop's body once: one layer
    params = jax.eval_shape(one.init, jax.random.key(0))
    rows, length = 4, 32
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    cost = jax.jit(one.logits).lower(params, tokens).compile().cost_analysis()
    counted = one.forward_flops(rows * length, rows * length**2)
    assert counted == pytest.approx(cost["flops"], rel=0.06)
    deeper = dataclasses.replace(one, spec=dataclasses.replace(spec, layers=5))
    head = 2.0 * rows * length * 64 * 300
    expected = 5 * (counted - head) + head
    assert deeper.forward_flops(rows * length, rows * length**2) == expected
    assert deeper.forward_flops(rows * length, rows * length**2, head_tokens=0) == expected - head


def test_llama3_scaling_follows_its_definition():
    """transformers' loop over wavelengths, written out one frequency at a time."""
    scaling = models.RopeScaling(
        "llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=512
    )
    plain = rope.frequencies(10000.0, 64)
    kinds, expected = set(), []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < 512 / 4:
            expected.append(frequency)
            kinds.add("kept")
        elif wavelength > 512 / 1:
            expected.append(frequency / 8)
            kinds.add("slowed")
        else:
            smooth = (512 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
            kinds.add("blended")
    assert kinds == {"kept", "slowed", "blended"}
    np.testing.assert_allclose(plain / scaling.divisors(plain), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "not a multiple of kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"family": "mamba"}, "family='mamba' is unknown"),
        ({"family": "qwen2", "attention_bias": False}, "always has attention_bias=True"),
        ({"windows": (3, 4)}, "windows has 2 entries; a model of 1"),
        ({"experts": 4}, "experts=4 with experts_per_token=0 fits no llama model"),
        ({"family": "mixtral"}, "experts=0 .* fits no mixtral model: it has experts"),
        ({"activation": "relu"}, "activation='relu' is unknown"),
        ({"rotary_width": 4}, "rotary_width=4 is more than head_dim=2"),
        (
            {"rope_scaling": models.RopeScaling("longrope", factors=(1.0, 2.0))},
            "rope_scaling.factors has 2 numbers; 2 rotated channels need 1",
        ),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    shape = {"vocab": 8, "d_model": 8, "d_ff": 8, "layers": 1, "heads": 4}
    with pytest.raises(ValueError, match=message):
        models.ModelSpec(**{**shape, **change})


def test_unknown_rotary_scalings_are_refused():
    with pytest.raises(ValueError, match=r"kind='ntk' is unknown\. Use one of linear"):
        models.RopeScaling("ntk")


def test_longrope_takes_the_factors_of_each_sequence_in_a_row():
    scaling = models.RopeScaling(
        "longrope", factors=(1.0, 1.5), long_factors=(4.0, 9.0), original_max_positions=8
    )
    spec = dataclasses.replace(SPECS["llama"], heads=8, head_dim=4, rope_scaling=scaling)
    model = models.Model(spec)
    params = _random_params(model)
    sequences = _sequences([12, 8, 5])
    row = _pack(sequences, 32, gap=2)
    packed = jax.jit(model.hidden)(params, *row)[0]
    for number, (ids, long) in enumerate(zip(sequences, (True, False, False), strict=True), 1):
        factors = scaling.long_factors if long else scaling.factors
        fixed = dataclasses.replace(
            spec, rope_scaling=models.RopeScaling("factors", factors=factors)
        )
        alone = models.Model(fixed).hidden(params, *_pack([ids], len(ids)))[0]
        np.testing.assert_allclose(packed[row[2][0] == number], alone, atol=1e-5)


def test_the_program_does_not_grow_with_depth():
    """Layers that differ are one scan: eight times the layers, the same number of operations."""

    def size(layers):
        windows = tuple(0 if i % 6 == 5 else 4 for i in range(layers))
        spec = dataclasses.replace(SPECS["gemma3_text"], layers=layers, windows=windows)
        model = models.Model(spec)
        params = jax.eval_shape(model.init, jax.random.key(0))
        row = [jax.ShapeDtypeStruct((1, 16), jnp.int32)] * 3
        return jax.jit(model.hidden).lower(params, *row).as_text().count("\n")

    assert size(48) == size(6)


def test_load_balance_is_that_of_the_switch_transformer():
    """Written out token by token, over the real tokens of both layers."""
    model = models.Model(SPECS["mixtral"])
    params = _random_params(model)
    row = _pack(_sequences([9, 6]), 20, gap=2)
    _, penalty = jax.jit(model.hidden_and_penalty)(params, *row)
    chosen, probability, tokens = np.zeros(4), np.zeros(4), 0
    inputs = []

    def watch(next_fun, args, kwargs, context):
        if context.module.name == "router":
            inputs.append(args[0])
        return next_fun(*args, **kwargs)

    x = params["embed"]["embedding"][row[0]]
    seen, turns = attention.causal(row[2], row[1]), layers.rotation(model.spec, row[1])
    kinds = layers.kinds(model.spec, 20)
    block = layers.Block(model.spec, jnp.float32, False, None, attention.AUTO)
    with nn.intercept_methods(watch):
        for layer in range(2):
            own = jax.tree.map(lambda leaf: leaf[layer], params["layers"])  # noqa: B023
            kind = jax.tree.map(lambda leaf: leaf[layer], kinds)  # noqa: B023
            x, _ = block.apply({"params": own}, x, kind, None, turns, seen, None)
            logits = np.asarray(inputs[-1] @ own["mlp"]["router"]["kernel"], np.float64)
            for one in logits[row[2] > 0]:
                odds = np.exp(one - one.max()) / np.exp(one - one.max()).sum()
                chosen[np.argsort(-odds)[:2]] += 1
                probability += odds
                tokens += 1
    assert tokens == 2 * 15
    expected = 4 * np.sum(chosen / tokens * probability / tokens)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="A llama model has no experts"):
        models.Model(SPECS["llama"]).hidden_and_penalty(None, *row)


@pytest.mark.slow
def test_experts_on_eight_devices_equal_those_on_one():
    model = models.Model(SPECS["mixtral"])
    params = _random_params(model)
    mesh = meshes.make_mesh(data=1, fsdp=2, tensor=2, context=2)
    row = [np.repeat(x, 8, axis=0) for x in _pack(_sequences([9, 7]), 16)]
    place = attention.Placement("dense", mesh, meshes.ROWS, ("tensor",), (meshes.CONTEXT,))
    spread = dataclasses.replace(model, place=place)

    def loss(model):
        def of(params, row):
            hidden, penalty = model.hidden_and_penalty(params, *row)
            return jnp.sum(hidden**2 * (row[2] > 0)[..., None]) + penalty

        return jax.jit(jax.value_and_grad(of))

    placed = jax.device_put(params, meshes.shardings(params, mesh))
    found = loss(spread)(placed, jax.device_put(row, meshes.batch_sharding(mesh)))
    expected = loss(model)(params, row)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Of the whole array: a gradient's small entries are differences of large sums.
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"remat": "some"}])
def test_unknown_choices_of_a_model_are_refused(change):
    with pytest.raises(ValueError, match=r"is unknown\. Use one of"):
        models.Model(SPECS["llama"], **change)
