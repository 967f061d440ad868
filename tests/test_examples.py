"""What lies in examples/ runs, and the models of three frameworks are one model."""

import importlib.util
import math
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def one(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return one


def test_the_custom_loop_learns_and_is_short(load):
    rows = load("custom_loop").main(steps=12)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01
    assert rows[-1]["rewards/margins"] > 0
    code = (EXAMPLES / "custom_loop.py").read_text().splitlines()
    assert len([line for line in code if line.strip()]) <= 60


def _has_nnx():
    """Imported elsewhere: on some versions the import itself fails, halfway."""
    code = "from flax import nnx"
    return not subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


@pytest.mark.parametrize("name", ["equinox", "nnx"])
def test_models_of_other_frameworks_train_like_plain_functions(load, name):
    if name == "equinox":
        pytest.importorskip("equinox")
    elif not _has_nnx():
        pytest.skip("flax.nnx cannot be imported with this version of jax")
    examples = load("own_model")
    plain = examples.main("plain", steps=6)
    assert plain[0] == pytest.approx(math.log(2), abs=1e-6)
    assert plain[-1] < plain[0] - 0.05
    assert examples.main(name, steps=6) == pytest.approx(plain, rel=1e-5)
