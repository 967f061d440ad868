import jax
import pytest

from sage_jax.generate import chars
from sage_jax.models import decoder, spec

ALPHABET = "0123456789+-*="


@pytest.fixture(scope="session")
def tokenizer():
    return chars.build(ALPHABET)


@pytest.fixture(scope="session")
def model(tokenizer):
    return decoder.Model(
        spec.ModelSpec(
            vocab=len(tokenizer), d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, eos_id=2
        )
    )


@pytest.fixture(scope="session")
def params(model):
    """Weights large enough for peaked, varied predictions: an untrained model repeats itself."""
    return jax.tree.map(lambda x: x * 2.5, model.init(jax.random.key(1)))
