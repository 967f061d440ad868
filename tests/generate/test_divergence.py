"""The KL divergence from the reference: against sums over a whole vocabulary and over sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax.generate import divergence
from sage_jax.models import decoder, spec


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
def test_token_kl_is_the_sum_over_the_vocabulary(chunk):
    rng = np.random.default_rng(0)
    hidden, other = rng.normal(size=(2, 3, 7, 5)) * 2
    head, other_head = rng.normal(size=(2, 5, 11))
    targets = rng.integers(0, 11, (3, 7))
    p, q = softmax(hidden @ head), softmax(other @ other_head)
    kl, ratio = divergence.token_kl(
        *map(jnp.float32, (hidden, head, other, other_head)), jnp.asarray(targets), chunk=chunk
    )
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-5)
    expected = np.take_along_axis(np.log(p / q), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(ratio, expected, rtol=1e-4, atol=1e-5)


LENGTH, END = 3, 2
VOCABULARY = 5


@pytest.fixture(scope="module")
def two():
    model = decoder.Model(spec.ModelSpec(vocab=VOCABULARY, d_model=8, d_ff=8, layers=1, heads=2))
    scale = lambda params, by: jax.tree.map(lambda x: by * x, params)  # noqa: E731
    return model, *(scale(model.init(jax.random.key(i)), 6.0) for i in (0, 1))


def all_completions():
    """Every completion of at most LENGTH tokens: ended by END, or cut."""
    others = [token for token in range(VOCABULARY) if token != END]
    for n in range(1, LENGTH + 1):
        for head in itertools.product(others, repeat=n - 1):
            yield [*head, END]
    yield from ([*tokens] for tokens in itertools.product(others, repeat=LENGTH))


def log_probs(model, params, prompt, completions):
    """One forward pass: what follows a sequence cannot be seen by what comes before."""
    rows = np.zeros((len(completions), len(prompt) + LENGTH), int)
    for row, completion in zip(rows, completions, strict=True):
        row[: len(prompt) + len(completion)] = prompt + completion
    p = softmax(np.asarray(jax.jit(model.logits)(params, rows), np.float64))
    first = len(prompt) - 1
    return np.array([
        sum(np.log(p[i, first + t, token]) for t, token in enumerate(completion))
        for i, completion in enumerate(completions)
    ])  # fmt: skip


def test_the_mean_over_samples_is_the_divergence_over_all_completions(two):
    model, params, other = two
    prompt = [3, 1]
    completions = list(all_completions())
    ours, theirs = (log_probs(model, p, prompt, completions) for p in (params, other))
    assert np.exp(ours).sum() == pytest.approx(1.0, rel=1e-4)  # all there are
    exact = np.sum(np.exp(ours) * (ours - theirs))

    measure = jax.jit(divergence.make_sampled_kl(model, model, max_new_tokens=LENGTH, eos_id=END))
    count = 4096
    tokens = np.tile([[0, 0, *prompt]], (count, 1))
    valid = np.tile([[False, False, True, True]], (count, 1))
    found = measure(params, other, tokens, valid, jax.random.split(jax.random.key(0), count))
    summary = divergence.summarise(found)
    assert summary["kl"] == pytest.approx(exact, abs=4 * summary["kl_error"])
    assert summary["kl_error"] < 0.1 * exact
    # Log-ratios of the samples have the same mean; but single ones may be negative.
    ratio = np.asarray(found.log_ratio_B, np.float64)
    assert ratio.mean() == pytest.approx(exact, abs=4 * ratio.std() / count**0.5)
    assert ratio.min() < 0 <= np.min(found.kl_B)


def test_a_policy_equal_to_its_reference_has_divergence_zero(two):
    model, params, _ = two
    measure = jax.jit(divergence.make_sampled_kl(model, model, max_new_tokens=LENGTH, eos_id=END))
    tokens = np.array([[0, 3, 1], [3, 1, 4]])
    found = measure(params, params, tokens, tokens > 0, jax.random.split(jax.random.key(0), 2))
    assert divergence.summarise(found)["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (np.asarray(found.tokens_B) >= 1).all()
