"""Adapters: what they compute, their files, and PEFT's own opinion of both."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sage_jax import batch, logprobs, losses, models, step
from sage_jax.models import lora, peft_files, quantised, tensors
from sage_jax.runtime import mesh as meshes

SPEC = models.ModelSpec(
    vocab=50, d_model=32, d_ff=48, layers=3, heads=4, kv_heads=2, family="qwen2", tied=False
)
KINDS = {
    "plain": lora.Lora(rank=4, alpha=8.0),
    "stabilised": lora.Lora(rank=4, alpha=8.0, targets="attention/[qv]$", rank_stabilised=True),
    "dora": lora.Lora(rank=3, alpha=6.0, targets="q$|down", dora=True),
}
SCRIPT = pathlib.Path(__file__).parents[1] / "golden" / "peft_logits.py"


@pytest.fixture(scope="module")
def model():
    return models.Model(SPEC)


@pytest.fixture(scope="module")
def base(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return KINDS[request.param]


def _moved(adapter, seed=1):
    """An adapter after some training: nothing of it is 0 or 1."""
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12), dtype=np.int32)


def test_a_new_adapter_changes_no_bit(model, base, kind):
    adapter = lora.init(jax.random.key(1), base, kind)
    logits = jax.jit(model.logits)
    plain, adapted = logits(base, TOKENS), logits(lora.join(base, adapter, kind), TOKENS)
    if kind.dora:  # a length divided by itself, computed in two programs
        np.testing.assert_allclose(adapted, plain, atol=1e-5)
    else:
        np.testing.assert_array_equal(adapted, plain)


@pytest.mark.parametrize(
    ("kind", "hold"),
    [(kind, "float32") for kind in KINDS] + [("plain", how) for how in ("bfloat16", "int8", "nf4")],
    indirect=["kind"],
)
def test_the_first_loss_against_the_model_without_adapter_is_ln_2(model, base, kind, hold):
    """And its rewards are 0: the reference is the same model with the adapter left out."""
    if hold in quantised.KINDS:
        try:
            quantised.library()
        except ValueError as e:
            pytest.skip(str(e))
    base = quantised.hold(base, hold)
    adapter = lora.init(jax.random.key(1), base, kind)
    rows = batch.empty(2, 24, 1)
    for row in range(2):
        for side, ids in enumerate(TOKENS[:, : 8 + row]):
            here = slice(side * 12, side * 12 + len(ids))
            rows.tokens_RT[row, here], rows.position_RT[row, here] = ids, np.arange(len(ids))
            rows.segment_RT[row, here] = 1 + side
            rows.completion_RT[row, side * 12 + 4 : here.stop] = True
        rows.pair_RS[row], rows.weight_RS[row] = row, 1.0
    logps_fn = logprobs.make_logps_fn(
        lambda adapter, base, b: model.hidden(
            lora.join(base, adapter, kind), b.tokens_RT, b.position_RT, b.segment_RT
        ),
        lambda _, base: model.head(base),
    )
    reference = jax.jit(step.make_stats_step(logps_fn))({}, base, rows).logps
    loss, tx = losses.sigmoid(0.1), optax.adam(1e-2)
    train = jax.jit(step.make_train_step(logps_fn, loss, tx))
    state, output = train(
        step.init_state(adapter, tx), base, rows._replace(ref_logps_RS2=reference)
    )
    if kind.dora:
        assert float(output.metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert np.float32(output.metrics["loss"]) == np.float32(math.log(2))
    assert float(output.metrics["grad_norm"]) > 0
    assert state.params.keys() == adapter.keys()


def test_an_adapted_model_equals_its_merged_weights(model, base, kind):
    adapter = _moved(lora.init(jax.random.key(1), base, kind))
    logits = jax.jit(model.logits)
    adapted = logits(lora.join(base, adapter, kind), TOKENS)
    np.testing.assert_allclose(logits(lora.merge(base, adapter, kind), TOKENS), adapted, atol=2e-5)
    assert np.abs(adapted - logits(base, TOKENS)).max() > 0.05


def test_merged_weights_follow_the_definition(base, kind):
    """In float64 numpy, layer by layer."""
    adapter = _moved(lora.init(jax.random.key(1), base, kind))
    merged = lora.merge(base, adapter, kind)["layers"]["attention"]["q"]["kernel"]
    own = {k: np.asarray(v, np.float64) for k, v in adapter["layers"]["attention"]["q"].items()}
    scale = 8.0 / 2 if kind.rank_stabilised else 2.0  # alpha / sqrt(rank) or alpha / rank
    for layer in range(SPEC.layers):
        kernel = np.asarray(base["layers"]["attention"]["q"]["kernel"][layer], np.float64)
        kernel = kernel + scale * own["lora_a"][layer] @ own["lora_b"][layer]
        if kind.dora:
            kernel *= own["lora_norm"][layer] / np.linalg.norm(kernel, axis=0)
        np.testing.assert_allclose(merged[layer], kernel, atol=1e-5)


def test_targets_are_found_by_regular_expression(base):
    found = lora.targets(base, lora.Lora(rank=1, targets="attention/[qv]$|up"))
    assert list(found) == ["layers/attention/q", "layers/attention/v", "layers/mlp/up"]
    with pytest.raises(ValueError, match=r"'embed' matches none of attention/k.*mlp/up"):
        lora.targets(base, lora.Lora(rank=1, targets="embed"))
    for settings, message in (
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"rank": 1, "alpha": -1.0}, "lora.alpha=-1.0 positive"),
        ({"rank": 1, "targets": "("}, "is no regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.Lora(**settings)


def test_experts_and_routers_have_no_adapters():
    spec = dataclasses.replace(
        SPEC, family="mixtral", attention_bias=None, experts=3, experts_per_token=1
    )
    shapes = jax.eval_shape(models.Model(spec).init, jax.random.key(0))
    found = lora.targets(shapes, lora.Lora(rank=1, targets="."))
    assert [path.removeprefix("layers/attention/") for path in found] == ["k", "o", "q", "v"]


def test_gradients_reach_adapters_alone_and_decoding_uses_them(model, base):
    kind = KINDS["plain"]
    adapter = _moved(lora.init(jax.random.key(1), base, kind))
    whole = lora.join(base, adapter, kind)
    ones = jnp.ones((2, 12), bool)
    position = jnp.broadcast_to(jnp.arange(12), (2, 12))
    cache = model.init_cache(2, 12)
    hidden, _ = jax.jit(model.prefill)(whole, TOKENS, position, ones, cache)
    logits = jax.jit(model.logits)(whole, TOKENS)
    np.testing.assert_allclose(hidden @ model.head(whole), logits, atol=1e-4)


@pytest.mark.slow
def test_sharded_adapters_compute_what_one_device_computes(model, base):
    kind = KINDS["dora"]
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    adapter = _moved(lora.init(jax.random.key(1), base, kind))
    placed = [jax.device_put(tree, meshes.shardings(tree, mesh)) for tree in (base, adapter)]

    @jax.jit
    def gradient(base, adapter, tokens):
        def loss(adapter):
            return jnp.sum(model.logits(lora.join(base, adapter, kind), tokens) ** 2)

        return jax.grad(loss)(adapter)

    rows = np.repeat(TOKENS, 4, axis=0)
    found = gradient(*placed, jax.device_put(rows, meshes.batch_sharding(mesh)))
    expected = gradient(base, adapter, rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


# ------------------------------------------------------------------------------------------- files


def test_files_of_peft_keep_every_bit(base, kind, tmp_path):
    adapter = _moved(lora.init(jax.random.key(1), base, kind))
    peft_files.write(tmp_path, SPEC, adapter, kind, base="the-base")
    settings, read = peft_files.read(tmp_path, SPEC)
    assert (settings.rank, settings.scale, settings.dora) == (kind.rank, kind.scale, kind.dora)
    assert list(lora.targets(base, settings)) == list(lora.targets(base, kind))
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter, read))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]


def _change(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias='all' changes what the adapter computes"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 5}, r"r=5, but its tensors have rank \[4\]"),
        ({"use_dora": True}, "lora_magnitude_vector.*is missing"),
        ({"some_new_setting": 3}, "some_new_setting=3"),
    ],
)
def test_adapters_that_compute_otherwise_are_refused(base, tmp_path, changes, message):
    kind = KINDS["plain"]
    peft_files.write(tmp_path, SPEC, lora.init(jax.random.key(1), base, kind), kind)
    _change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        peft_files.read(tmp_path, SPEC)


def test_adapters_of_another_model_are_refused(base, tmp_path):
    kind = KINDS["plain"]
    peft_files.write(tmp_path, SPEC, lora.init(jax.random.key(1), base, kind), kind)
    for change, message in (
        ({"d_ff": 40}, "maps 32 to 48 channels, but the model 32 to 40"),
        ({"layers": 2}, "have no place in a qwen2 model of 2 layers"),
        ({"layers": 4}, r"layers\.3\.self_attn.*is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_files.read(tmp_path, dataclasses.replace(SPEC, **change))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        peft_files.read(tmp_path, SPEC)


# -------------------------------------------------------------------------------------------- peft


@pytest.fixture(scope="module")
def peft(golden, write_case, tmp_path_factory):
    """What PEFT says: logits of our adapters on our exports, and adapters of its own making."""
    for package in ("torch", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'sage_jax[parity]'")
    folder = tmp_path_factory.mktemp("peft")
    for name, (case, kind) in PEFT_CASES.items():
        model, params = models.load(write_case(case))
        adapter = _moved(lora.init(jax.random.key(1), params, kind))
        models.export(folder / name / "base", model, params)
        peft_files.write(folder / name / "ours", model.spec, adapter, kind)
        np.save(folder / name / "tokens.npy", golden.tokens(case))
        logits = jax.jit(model.logits)(lora.join(params, adapter, kind), golden.tokens(case))
        np.save(folder / name / "expected.npy", logits)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


PEFT_CASES = {
    "plain": ("llama_bias_linear", KINDS["plain"]),
    "stabilised": ("gemma3_v4_keys", KINDS["stabilised"]),
    "dora": ("qwen2_untied", KINDS["dora"]),
    "fused": ("phi3_window", dataclasses.replace(KINDS["plain"], targets="attention/[qvo]|mlp/")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PEFT_CASES))
def test_peft_computes_the_same_from_our_adapters(peft, name):
    found = np.load(peft / name / "found.npy")
    np.testing.assert_allclose(found, np.load(peft / name / "expected.npy"), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PEFT_CASES))
def test_adapters_made_by_peft_compute_the_same_here(golden, peft, name):
    model, params = models.load(peft / name / "base")
    settings, adapter = peft_files.read(peft / name / "theirs", model.spec)
    whole = lora.join(params, jax.tree.map(jnp.asarray, adapter), settings)
    tokens, theirs = np.load(peft / name / "tokens.npy"), np.load(peft / name / "theirs.npy")
    logits = jax.jit(model.logits)
    np.testing.assert_allclose(logits(whole, tokens), theirs, atol=2e-4, rtol=0)
    assert np.abs(theirs - logits(params, tokens)).max() > 0.01


def test_optimizer_state_is_as_large_as_the_adapters(base):
    kind = KINDS["plain"]
    adapter = lora.init(jax.random.key(1), base, kind)
    trees = {"base": base, "adapter": adapter, "adam": optax.adam(1e-3).init(adapter)}
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}
    assert sizes["adam"] == 2 * sizes["adapter"] + 1 < sizes["base"]
    per_layer = sum(
        kind.rank * (kernel.shape[1] + kernel.shape[2])
        for kernel in lora.targets(base, kind).values()
    )
    assert sizes["adapter"] == SPEC.layers * per_layer
    assert dict(tensors.leaves(adapter)).keys().isdisjoint(dict(tensors.leaves(base)))
