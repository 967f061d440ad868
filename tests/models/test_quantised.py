"""Frozen weights in 16, 8 and 4 bits: what they stand for, what they take, how they are used."""

import dataclasses
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors import numpy as safetensors

from sage_jax import models
from sage_jax.models import lora, quantised, tensors
from sage_jax.runtime import mesh as meshes

SPEC = models.ModelSpec(
    vocab=50, d_model=128, d_ff=192, layers=3, heads=4, kv_heads=2, family="qwen2", tied=False
)
LORA = lora.Lora(rank=4, alpha=8.0, targets="attention/[qv]$|mlp/down")
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12), dtype=np.int32)


def _library_or_skip():
    try:
        return quantised.library()
    except ValueError as e:
        pytest.skip(str(e))


@pytest.fixture(autouse=True)
def qwix(request):
    return _library_or_skip()


@pytest.fixture(scope="module")
def model():
    return models.Model(SPEC)


@pytest.fixture(scope="module")
def base(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def held(base):
    _library_or_skip()
    hold = jax.jit(quantised.hold, static_argnums=(1, 2))
    return {how: hold(base, how, "float32") for how in quantised.HOLDS}


def _moved(adapter, seed=1):
    """An adapter after some training."""
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


# ------------------------------------------------------------------------------------- the scheme


def _paper_levels():
    """Appendix E of the QLoRA paper: quantiles of the normal distribution, and an exact 0."""
    quantile = statistics.NormalDist().inv_cdf
    upper = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    return np.sort(np.array([*lower, 0.0, *upper])) / max(upper)


def _weights(wide, narrow, seed=1):
    """Of each column the largest is positive: -127.5 is -127 or -128, whichever rounding says."""
    kernel = np.random.default_rng(seed).normal(size=(wide, narrow)).astype(np.float32) * 0.02
    largest = np.take_along_axis(kernel, np.abs(kernel).argmax(axis=0)[None], axis=0)
    return kernel * np.sign(largest)


def _by_hand(kernel, how):
    """Codes, scales and what they stand for, in float64."""
    kernel = np.asarray(kernel, np.float64)
    wide, narrow = kernel.shape
    size = wide if how == "int8" else quantised.block(wide)
    blocks = kernel.reshape(wide // size, size, narrow)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    if how == "int8":  # the largest level is 127.5, rounded to 127
        scale = largest / 127.5
        codes = np.clip(np.round(blocks / scale), -128, 127)
        value = codes * scale
    else:
        scale, levels = largest, _paper_levels()
        codes = np.abs(blocks[..., None] / scale[..., None] - levels).argmin(axis=-1)
        value = levels[codes] * scale
    shape = (wide, narrow)
    return codes.reshape(shape), scale[:, 0], value.reshape(shape)


def test_levels_are_those_of_the_paper():
    np.testing.assert_allclose(quantised.levels(), _paper_levels(), atol=2e-7)


@pytest.mark.parametrize("wide", [256, 192, 96, 34])
@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_values_and_scales_are_those_of_the_scheme(how, wide):
    kernel = _weights(wide, 40)
    kernel[:, 3] *= 50  # a large column spoils no other
    codes, scale, value = _by_hand(kernel, how)
    size = wide // len(scale)
    assert size == {"int8": wide, "nf4": {256: 64, 192: 64, 96: 48, 34: 34}[wide]}[how]
    node = jax.jit(quantised.quantise, static_argnums=1)(kernel, how)
    found = node[how]
    if how == "nf4":
        halves = np.asarray(found).reshape(wide // size, size // 2, -1)
        found = np.concatenate([halves & 15, halves >> 4], axis=1).reshape(wide, -1)
    assert found.shape == codes.shape and quantised.kernel_shape(node) == kernel.shape
    assert np.mean(np.asarray(found) != codes) < 1e-3  # halfway between two levels, in float32
    np.testing.assert_allclose(node["scale"], scale, rtol=1e-6)
    back = np.asarray(jax.jit(quantised.dequantise)(node), np.float64)
    off, least = np.abs(back - kernel), np.abs(value - kernel)
    np.testing.assert_allclose(off, least, atol=1e-6 * np.abs(kernel).max())


def test_the_error_of_a_round_trip_is_that_of_normal_weights():
    """Root mean square, of the weights': 0.8 % in 8 bits by column, 9 % in 4 bits by 64."""
    kernel = jax.random.normal(jax.random.key(0), (1024, 64))
    for how, bound in (("int8", 0.009), ("nf4", 0.1)):
        off = quantised.dequantise(quantised.quantise(kernel, how)) - kernel
        _, _, by_hand = _by_hand(kernel, how)
        error = float(jnp.sqrt(jnp.mean(off**2)))
        assert 0.3 * bound < error < bound
        assert error == pytest.approx(np.sqrt(np.mean((by_hand - kernel) ** 2)), rel=1e-4)


def test_what_a_node_stands_for_is_what_qwix_says(qwix):
    kernel = jax.random.normal(jax.random.key(0), (2, 128, 24))
    for how, name, tiles in (("int8", jnp.int8, {}), ("nf4", "nf4", {1: 64})):
        theirs = qwix.quantize(kernel, name, channelwise_axes=(0, 2), tiled_axes=tiles)
        ours = quantised.dequantise(quantised.quantise(kernel, how))
        np.testing.assert_array_equal(ours, qwix.dequantize(theirs))


def test_a_column_of_zeros_stays_zeros():
    kernel = jnp.zeros((64, 2)).at[:, 1].set(1.0)
    for how in ("int8", "nf4"):
        back = quantised.dequantise(quantised.quantise(kernel, how))
        np.testing.assert_array_equal(back[:, 0], 0)
        np.testing.assert_allclose(back[:, 1], 1, atol=0.01)


def test_what_cannot_be_quantised_is_refused(base, held, monkeypatch):
    with pytest.raises(ValueError, match="linear map of 33 input channels cannot be held in nf4"):
        quantised.quantise(jnp.ones((33, 2)), "nf4")
    with pytest.raises(ValueError, match="hold='int4' is unknown"):
        quantised.hold(base, "int4")
    with pytest.raises(ValueError, match="held in nf4 already"):
        quantised.for_scoring(held["nf4"])
    with pytest.raises(ValueError, match="held in int8 already"):
        quantised.hold(held["int8"], "nf4")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"need the package qwix.*sage_jax\[qlora\]"):
        quantised.quantise(jnp.ones((4, 2)), "int8")


# ---------------------------------------------------------------------------------- memory


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_linear_maps_take_a_quarter_and_an_eighth(base, held):
    linear = {how: {"layers": {k: tree["layers"][k] for k in ("attention", "mlp")}}
              for how, tree in held.items()}  # fmt: skip
    whole = _bytes(linear["float32"])
    shares = {how: _bytes(tree) / whole for how, tree in linear.items()}
    assert shares["bfloat16"] == 0.5
    # The scales: one in 4 bytes for a column of 128 or more, or for 64 weights; biases are whole.
    assert 0.25 < shares["int8"] < 0.27
    assert 0.125 + 1 / 64 < shares["nf4"] < 0.15
    everything = {k: v for k, v in tensors.leaves(held["nf4"]) if "norm" in k or "embed" in k}
    assert {leaf.dtype.name for leaf in everything.values()} == {"float32"}
    assert quantised.parameters(held["nf4"]) == sum(x.size for x in jax.tree.leaves(base))


def test_what_is_not_quantised_takes_the_compute_dtype(base):
    """The model casts it there anyway: the same bits come out, of an embedding that is rounded.
    (A CPU adds up what the layers give in float32, from the embedding on.)"""
    table = base["embed"]["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    base = base | {"embed": {"embedding": table}}
    mixed = quantised.hold(base, "nf4", "bfloat16")
    assert mixed["lm_head"]["kernel"].dtype == mixed["embed"]["embedding"].dtype == jnp.bfloat16
    assert mixed["final_norm"]["scale"].dtype == jnp.float32
    half = models.Model(SPEC, dtype="bfloat16")
    logits = jax.jit(half.logits)
    plain = logits(quantised.hold(base, "nf4", "float32"), TOKENS)
    np.testing.assert_array_equal(logits(mixed, TOKENS), plain)
    rounded = quantised.hold(base, "bfloat16")
    np.testing.assert_array_equal(logits(rounded, TOKENS), logits(base, TOKENS))


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_values_and_scales_are_split_by_the_rules_of_their_weights(held, how):
    mesh = meshes.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    where = dict(tensors.leaves(meshes.shardings(held[how], mesh)))
    assert where[f"layers/mlp/up/{how}"].spec == P(None, "fsdp", "tensor")
    assert where[f"layers/mlp/down/{how}"].spec == P(None, "tensor", "fsdp")
    # One scale a column is whole along the inputs, and so are 3 blocks of 64 over 2 devices.
    rows = "fsdp" if how == "nf4" else None
    assert where["layers/mlp/up/scale"].spec == P(None, rows, "tensor")
    assert where["layers/mlp/down/scale"].spec == P(None, None, "fsdp")
    placed = jax.device_put(held[how], meshes.shardings(held[how], mesh))
    on_first = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves({k: placed["layers"][k] for k in ("attention", "mlp")})
        for shard in leaf.addressable_shards
        if shard.device == mesh.devices.flat[0]
    )
    whole = _bytes({k: held["float32"]["layers"][k] for k in ("attention", "mlp")})
    assert on_first < whole / 4 * (0.28 if how == "int8" else 0.16)


DEEP = models.ModelSpec(vocab=16, d_model=64, d_ff=256, layers=16, heads=2)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_step_never_holds_all_weights_dequantised(remat):
    """Neither at once nor one after the other for the backward pass: a layer at a time.

    Beside its arguments it takes one layer more than the step with a float32 base.
    """
    model = models.Model(DEEP, remat=remat)
    settings = lora.Lora(rank=2, targets="attention/q")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    adapter = jax.eval_shape(lambda b: lora.init(jax.random.key(0), b, settings), shapes)
    spent = {}
    for how in ("float32", "nf4"):
        base = jax.eval_shape(lambda b: quantised.hold(b, how), shapes)  # noqa: B023

        def loss(adapter, base):
            return jnp.sum(model.logits(lora.join(base, adapter, settings), TOKENS[:, :4] % 16))

        program = jax.jit(jax.grad(loss)).lower(adapter, base).compile()
        spent[how] = program.memory_analysis()
        assert ("f32[16,64,256]" in program.as_text()) == (how == "float32")
    whole = 4 * sum(x.size for x in jax.tree.leaves(shapes))
    assert spent["nf4"].argument_size_in_bytes < 0.2 * whole
    temporary = {how: found.temp_size_in_bytes for how, found in spent.items()}
    assert temporary["nf4"] < temporary["float32"] + whole / DEEP.layers


def test_a_file_is_quantised_matrix_by_matrix(tmp_path, monkeypatch):
    """While it is read, no more than the quantised weights and one matrix are there."""
    model = models.Model(dataclasses.replace(DEEP, layers=6))
    params = model.init(jax.random.key(3))
    models.export(tmp_path / "model", model, params, check=False)
    whole, expected = _bytes(params), quantised.hold(params, "nf4")
    del params
    before, live = _live(), []
    read = tensors._cut

    def watched(*args, **kwargs):
        live.append(_live() - before)
        return read(*args, **kwargs)

    monkeypatch.setattr(tensors, "_cut", watched)
    mesh = meshes.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    for place in (None, lambda tree: meshes.shardings(tree, mesh)):
        _, found = models.load(tmp_path / "model", place=place, hold="nf4")
        for (path, a), (_, b) in zip(tensors.leaves(found), tensors.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path)
        if place is not None:
            assert found["layers"]["mlp"]["up"]["nf4"].sharding.spec == P(None, "fsdp", "tensor")
        del found, a, b
    assert len(live) > 2 * 6 * 7 and max(live) < 0.4 * whole


def _live():
    return sum(x.nbytes for x in jax.live_arrays())


# --------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize(("how", "bound"), [("bfloat16", 0.01), ("int8", 0.03), ("nf4", 0.3)])
def test_logits_are_near_those_of_float32(model, base, held, how, bound):
    """Root mean square of the difference, of the logits': of random weights, the hardest case."""
    logits = jax.jit(model.logits)
    exact, found = logits(base, TOKENS), logits(held[how], TOKENS)
    off = float(jnp.sqrt(jnp.mean((found - exact) ** 2) / jnp.mean(exact**2)))
    assert 0 < off < bound


def _dequantised(tree):
    """The float32 tree that a quantised one stands for."""
    if quantised.kind(tree):
        kept = {k: v for k, v in tree.items() if k not in quantised.LEAVES}
        return kept | {"kernel": quantised.dequantise(tree)}
    return {k: _dequantised(v) if isinstance(v, dict) else v for k, v in tree.items()}


@pytest.mark.parametrize(
    ("how", "dora", "remat"),
    [("int8", False, "dots"), ("nf4", False, "none"), ("nf4", True, "dots")],
)
def test_adapters_get_the_gradients_of_the_dequantised_base(held, how, dora, remat):
    model, settings = models.Model(SPEC, remat=remat), dataclasses.replace(LORA, dora=dora)
    plain = _dequantised(held[how])
    adapter = lora.init(jax.random.key(1), held[how], settings)
    for a, b in zip(
        jax.tree.leaves(adapter),
        jax.tree.leaves(lora.init(jax.random.key(1), plain, settings)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    adapter = _moved(adapter)

    @jax.jit
    def gradient(adapter, base):
        def loss(adapter):
            return jnp.mean(model.logits(lora.join(base, adapter, settings), TOKENS) ** 2)

        return jax.value_and_grad(loss)(adapter)

    (loss, found), (same, expected) = gradient(adapter, held[how]), gradient(adapter, plain)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_a_sharded_base_gives_what_one_device_gives(model, held):
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    adapter = _moved(lora.init(jax.random.key(1), held["nf4"], LORA))

    @jax.jit
    def gradient(adapter, base, tokens):
        def loss(adapter):
            return jnp.mean(model.logits(lora.join(base, adapter, LORA), tokens) ** 2)

        return jax.grad(loss)(adapter)

    rows = np.repeat(TOKENS, 4, axis=0)
    placed = [jax.device_put(x, meshes.shardings(x, mesh)) for x in (adapter, held["nf4"])]
    found = gradient(*placed, jax.device_put(rows, meshes.batch_sharding(mesh)))
    expected = gradient(adapter, held["nf4"], rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_experts_are_held_like_other_linear_maps_and_routers_are_not(how):
    spec = dataclasses.replace(
        SPEC, family="mixtral", attention_bias=None, experts=3, experts_per_token=2, d_ff=64
    )
    model = models.Model(spec)
    base = model.init(jax.random.key(0))
    tree = quantised.hold(base, how)
    assert tree["layers"]["mlp"]["experts"]["up"][how].shape[:2] == (3, 3)
    assert tree["layers"]["mlp"]["router"]["kernel"].dtype == jnp.float32
    assert _bytes(tree) < 0.45 * _bytes(base)
    logits = jax.jit(model.logits)
    np.testing.assert_allclose(logits(tree, TOKENS), logits(_dequantised(tree), TOKENS), atol=1e-5)


def test_whole_number_products_are_those_of_rounded_inputs(base):
    """Inputs by token, weights by column, both in float64."""
    x, kernel = _weights(96, 5, seed=2).T, _weights(96, 7)
    node = quantised.quantise(jnp.asarray(kernel), "w8a8")
    found = jax.jit(quantised.matmul, static_argnums=2)(x, node, "cpu")
    _, _, rounded = _by_hand(kernel, "int8")
    _, _, inputs = _by_hand(x.T, "int8")
    np.testing.assert_allclose(found, inputs.T @ rounded, atol=1e-7)
    assert np.abs(found - x @ rounded).max() > 1e-5
    tree = quantised.for_scoring(base)
    assert set(tree["layers"]["mlp"]["up"]) == {"w8a8", "scale"}
    assert tree["embed"] is not None and tree["embed"]["embedding"] is base["embed"]["embedding"]
    again = quantised.for_scoring(quantised.hold(base, "int8"))
    np.testing.assert_array_equal(
        again["layers"]["mlp"]["up"]["w8a8"], tree["layers"]["mlp"]["up"]["w8a8"]
    )


# --------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("how", "dtype"), [("bfloat16", "float32"), ("int8", "bfloat16"), ("nf4", "float32")]
)
def test_an_export_is_the_dequantised_base_with_the_adapter(model, held, how, dtype, tmp_path):
    adapter = _moved(lora.init(jax.random.key(1), held[how], LORA))
    whole = lora.join(held[how], adapter, LORA)
    if how == "bfloat16":
        merged, computes = lora.merge(held[how], adapter, LORA), None
    else:
        merged, computes = lora.merge_lazily(held[how], adapter, LORA), whole
    models.export(tmp_path / "out", model, merged, dtype=dtype, computes=computes)
    again, read = models.load(tmp_path / "out")
    expected = lora.merge(_dequantised(held[how]), adapter, LORA)
    for (path, a), (_, b) in zip(tensors.leaves(read), tensors.leaves(expected), strict=True):
        stored = jnp.asarray(b, dtype).astype(jnp.float32)
        np.testing.assert_allclose(a, stored, rtol=1e-2 if dtype == "bfloat16" else 1e-6,
                                   atol=1e-6, err_msg=path)  # fmt: skip
    if dtype == "float32":
        logits = jax.jit(again.logits)
        np.testing.assert_allclose(
            logits(read, TOKENS), jax.jit(model.logits)(whole, TOKENS), atol=1e-4
        )


def test_an_export_that_computes_something_else_is_not_written(model, held, tmp_path):
    adapter = _moved(lora.init(jax.random.key(1), held["nf4"], LORA))
    other = lora.join(held["nf4"], _moved(adapter, seed=2), LORA)
    merged = lora.merge_lazily(held["nf4"], adapter, LORA)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(RuntimeError, match="does not compute what the model computes"):
            models.export(tmp_path / "out", model, merged, dtype=dtype, computes=other)
    assert not (tmp_path / "out").exists()


def test_parts_of_fused_tensors_are_held_too(write_case):
    where = write_case("phi3_window")
    assert any("qkv" in name for name in safetensors.load_file(where / "model.safetensors"))
    _, plain = models.load(where)
    for how in ("bfloat16", "int8"):
        _, found = models.load(where, hold=how)
        expected = quantised.hold(plain, how)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
