"""What a round knows from memory alone."""

import numpy as np
import pytest

from sage_jax import config, curriculum, losses, scores
from sage_jax.runtime import rounds


def _visited(margins: list[list[float]], error: float) -> curriculum.Memory:
    """A memory of pairs whose likelihood margins were seen one after the other."""
    memory = curriculum.init_memory(len(margins))
    for number, seen in enumerate(zip(*margins, strict=True)):
        margin = np.float32(seen)
        blank = {name: np.zeros_like(margin) for name in scores.PairScores._fields}
        pairs = scores.PairScores(
            **blank | {"likelihood_margin": margin, "margin_error": np.full_like(margin, error)}
        )
        memory = curriculum.remember(memory, np.arange(len(margins)), pairs, round=number)
    return memory


@pytest.mark.parametrize(
    ("stability", "want"),
    [
        ("rounds", lambda over_rounds: over_rounds),
        ("token_error", lambda over_rounds: np.full(2, 3.0)),
        ("token_error+rounds", lambda over_rounds: np.sqrt(9.0 + over_rounds**2)),
    ],
)
def test_remembered_errors_combine_tokens_and_rounds_as_asked(stability, want):
    margins = [[1.0, 2.0, 4.0], [-1.0, -1.0, -1.0]]
    chosen = {"stability": stability, "kappa": 1.0, "margin": "likelihood"}
    run = config.resolve({"selection": chosen})
    found = rounds.remembered_scores(
        _visited(margins, 3.0), np.arange(2), losses.sigmoid(run.loss.beta), run
    )
    error = want(np.std(margins, axis=1, ddof=1))
    np.testing.assert_allclose(found.margin_error, error, rtol=1e-6)
    np.testing.assert_allclose(found.pessimistic_margin, [4.0, -1.0] + error, rtol=1e-6)
