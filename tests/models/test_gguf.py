"""GGUF files: every quantisation against the gguf package, every layout rule written out."""

import functools

import gguf
import jax
import numpy as np
import pytest

from sage_jax import models
from sage_jax.models import rope
from sage_jax.runtime import mesh as meshes

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
SHAPE = {"vocab": 64, "d_model": 64, "d_ff": 96, "layers": 2, "heads": 4, "kv_heads": 2}
PARTS = (  # GGUF name, path in our tree, whether files hold it transposed
    ("attn_q", "attention/q", True),
    ("attn_k", "attention/k", True),
    ("attn_v", "attention/v", True),
    ("attn_output", "attention/o", True),
    ("ffn_gate", "mlp/gate", True),
    ("ffn_up", "mlp/up", True),
    ("ffn_down", "mlp/down", True),
    ("attn_norm", "attention_norm", False),
    ("ffn_norm", "mlp_norm", False),
)


def _leaf(params, path):
    for key in path.split("/"):
        params = params[key]
    return np.asarray(params)


def _random(spec):
    model = models.Model(spec)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def _permute(weights, heads):
    """llama.cpp's own permutation (convert_hf_to_gguf.py), written as an index list."""
    width = weights.shape[0] // heads
    order = [
        head * width + half * (width // 2) + i
        for head in range(heads)
        for i in range(width // 2)
        for half in range(2)
    ]
    return weights[order]


def _tensors(spec, params):
    """(name, float32 values as a GGUF file holds them, is a matrix of a linear map)."""
    yield "token_embd.weight", _leaf(params, "embed/embedding")
    yield "output_norm.weight", _leaf(params, "final_norm/scale")
    if not spec.tied:
        yield "output.weight", _leaf(params, "lm_head/kernel").T
    for layer in range(spec.layers):
        for name, path, matrix in PARTS:
            heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}.get(name)
            swap = heads if heads and spec.family == "llama" else None
            leaf = "kernel" if matrix else "scale"
            value = _leaf(params, f"layers/{path}/{leaf}")[layer].T
            yield f"blk.{layer}.{name}.weight", _permute(value, swap) if swap else value
            if matrix and "bias" in params["layers"][path.split("/")[0]][path.split("/")[1]]:
                value = _leaf(params, f"layers/{path}/bias")[layer]
                yield f"blk.{layer}.{name}.bias", _permute(value, swap) if swap else value


def _write(file, spec, params, *, kind="F32", more=None, meta=None, arch=None, drop=None):
    writer = gguf.GGUFWriter(file, arch or spec.family)
    writer.add_block_count(spec.layers)
    writer.add_embedding_length(spec.d_model)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_context_length(spec.max_positions)
    if meta is not None:
        meta(writer)
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, value in [*_tensors(spec, params), *(more or {}).items()]:
        value = np.ascontiguousarray(value)
        if name == drop:
            continue
        if value.ndim == 2 and kind != "F32":
            writer.add_tensor(name, gguf.quantize(value, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "attention_bias": True, "norm_eps": 1e-5},
        {"family": "qwen2", "rope_theta": 1e6},
    ],
    ids=["llama", "llama-bias-untied", "qwen2"],
)
def test_a_float32_file_gives_the_model_it_was_written_from(tmp_path, changes):
    spec = models.ModelSpec(**SHAPE, **changes)
    _, params = _random(spec)
    model, read = models.load(_write(tmp_path / "m.gguf", spec, params))
    assert model.spec == spec
    _assert_equal(read, params)


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation_is_undone_as_the_gguf_package_does(tmp_path, kind):
    spec = models.ModelSpec(**SHAPE, family="qwen2")
    _, params = _random(spec)
    _, read = models.load(_write(tmp_path / "m.gguf", spec, params, kind=kind))
    quantisation = gguf.GGMLQuantizationType[kind]

    def through(value):
        return gguf.dequantize(
            gguf.quantize(np.ascontiguousarray(value), quantisation), quantisation
        )

    for _, path, matrix in PARTS:
        if matrix:
            want = [through(w.T).T for w in _leaf(params, f"layers/{path}/kernel")]
            np.testing.assert_array_equal(_leaf(read, f"layers/{path}/kernel"), want)
    np.testing.assert_array_equal(read["embed"]["embedding"], through(params["embed"]["embedding"]))
    np.testing.assert_array_equal(read["final_norm"]["scale"], params["final_norm"]["scale"])


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_a_file_loads_shard_by_shard_with_the_same_bits(tmp_path, kind):
    spec = models.ModelSpec(**SHAPE, attention_bias=True)  # q and k, biases too, are in its order
    _, params = _random(spec)
    file = _write(tmp_path / "m.gguf", spec, params, kind=kind)
    place = functools.partial(meshes.shardings, mesh=meshes.make_mesh(data=1, fsdp=2, tensor=4))
    _, found = models.load(file, place=place)
    _assert_equal(found, models.load(file)[1])
    q = found["layers"]["attention"]["q"]["kernel"]
    assert {shard.data.shape for shard in q.addressable_shards} == {(2, 32, 16)}


def test_a_llama3_scaling_is_recognised_from_its_stored_factors(tmp_path):
    scaling = models.RopeScaling("llama3", factor=32.0, original_max_positions=8192)
    spec = models.ModelSpec(**SHAPE, rope_theta=500000.0, rope_scaling=scaling)
    _, params = _random(spec)
    factors = scaling.divisors(rope.frequencies(500000.0, 16)).astype(np.float32)
    file = _write(tmp_path / "m.gguf", spec, params, more={"rope_freqs.weight": factors})
    assert models.load(file)[0].spec == spec


def test_unnamed_rotary_factors_are_used_as_they_are(tmp_path):
    spec = models.ModelSpec(**SHAPE)
    _, params = _random(spec)
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    file = _write(tmp_path / "m.gguf", spec, params, more={"rope_freqs.weight": factors})
    read = models.load(file)[0].spec
    plain = rope.scaled_frequencies(spec.rope_theta, spec.head_dim, spec.rope_scaling)
    np.testing.assert_allclose(
        rope.scaled_frequencies(read.rope_theta, read.head_dim, read.rope_scaling),
        plain / factors,
        rtol=1e-7,
    )


def test_linear_scaling_and_token_ids_are_read(tmp_path):
    def meta(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)
        writer.add_pad_token_id(0)

    spec = models.ModelSpec(**SHAPE)
    _, params = _random(spec)
    read = models.load(_write(tmp_path / "m.gguf", spec, params, meta=meta))[0].spec
    assert read.rope_scaling == models.RopeScaling("linear", factor=2.5)
    assert (read.bos_id, read.eos_ids, read.pad_id) == (1, (2, 7), 0)


def test_a_gguf_model_survives_export(tmp_path):
    spec = models.ModelSpec(**SHAPE)
    _, params = _random(spec)
    model, read = models.load(_write(tmp_path / "m.gguf", spec, params, kind="Q8_0"))
    again, back = models.load(models.export(tmp_path / "out", model, read))
    assert again == model
    _assert_equal(back, read)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "gemma3"}, "general.architecture='gemma3' is not supported.*llama, qwen2"),
        ({"drop": "blk.1.ffn_up.weight"}, "1 tensors are missing.*blk.1.ffn_up.weight"),
        ({"more": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}}, "have no place"),
        ({"meta": lambda w: w.add_expert_count(8)}, "llama.expert_count=8 changes"),
        (
            {"meta": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
            "rope.scaling.type='yarn' is not supported",
        ),
        ({"meta": lambda w: w.add_rope_dimension_count(8)}, "rope.dimension_count=8, but heads"),
        ({"meta": lambda w: w.add_uint16("split.count", 3)}, "one of 3 parts.*--merge"),
    ],
)
def test_files_that_would_be_misread_are_refused_by_name(tmp_path, arguments, message):
    spec = models.ModelSpec(**SHAPE)
    _, params = _random(spec)
    file = _write(tmp_path / "m.gguf", spec, params, **arguments)
    with pytest.raises(ValueError, match=message):
        models.load(file)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"not a model at all" * 10)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        models.load(file)
