"""The golden cases as Hugging Face directories."""

import importlib.util
import json
import pathlib
from typing import Any

import pytest
from safetensors import numpy as safetensors

SCRIPT = pathlib.Path(__file__).parents[1] / "golden" / "make_models.py"


def _load_script() -> Any:
    spec = importlib.util.spec_from_file_location("make_models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_SCRIPT = _load_script()


@pytest.fixture(scope="session")
def golden() -> Any:
    """The module that makes the golden numbers: cases, their weights and inputs."""
    return _SCRIPT


@pytest.fixture(params=sorted(_SCRIPT.CASES))
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def write_case(golden, tmp_path_factory):
    """Writes a case as a Hugging Face directory, with changes to its config or its weights."""

    def write(name, *, change=None, edit=None):
        directory = tmp_path_factory.mktemp(name)
        config = golden.CASES[name]
        weights = golden.weights(config)
        if edit is not None:
            edit(weights)
        (directory / "config.json").write_text(json.dumps({**config, **(change or {})}))
        safetensors.save_file(weights, directory / "model.safetensors")
        return directory

    return write
