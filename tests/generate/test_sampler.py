import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax.generate import prompting, sampler
from sage_jax.runtime import mesh as meshes

PROMPTS = ["7+5=", "1", "8*2-5+3=", "9-9", "3+4*2-1+6="]


@pytest.fixture(scope="module")
def naive_greedy(model, params):
    """Full forward passes, one sequence at a time: no cache, no left padding, no batch."""
    logits_fn = jax.jit(model.logits)

    def run(ids, max_new_tokens, end):
        out = []
        while len(out) < max_new_tokens:
            row = np.zeros((1, 32), np.int32)  # what follows cannot be seen by what comes before
            row[0, : len(ids) + len(out)] = ids + out
            token = int(logits_fn(params, row)[0, len(ids) + len(out) - 1].argmax())
            if token == end:
                return out, True
            out.append(token)
        return out, False

    return run


def _generate(model, params, tokenizer, prompts=PROMPTS, **settings):
    settings = {"max_new_tokens": 12, "batch": 4} | settings
    return sampler.generate(model, params, tokenizer, prompts, **settings)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_greedy_equals_a_naive_loop_of_full_forwards(model, params, tokenizer, naive_greedy, jit):
    ids = [prompting.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    # An end token that greedy decoding does reach, so that both ways of stopping are seen.
    end = naive_greedy(ids[0], 6, None)[0][3]
    sample = sampler.make_sampler(model, max_new_tokens=10, eos_id=end, temperature=0)
    tokens_BT, valid_BT = sampler.left_pad(ids, 16)
    found = jit(sample)(params, tokens_BT, valid_BT, jax.random.split(jax.random.key(0), len(ids)))
    finished = []
    for row, prompt in enumerate(ids):
        expected, ended = naive_greedy(prompt, 10, end)
        length = int(found.length_B[row])
        assert found.tokens_BN[row, :length].tolist() == expected
        assert bool(found.finished_B[row]) == ended
        finished.append(ended)
    assert True in finished


def test_nothing_follows_the_end_token(model, params, tokenizer, naive_greedy):
    ids = [prompting.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    end = naive_greedy(ids[0], 6, None)[0][1]
    sample = sampler.make_sampler(model, max_new_tokens=10, eos_id=[end, 2], temperature=0)
    tokens_BT, valid_BT = sampler.left_pad(ids, 16)
    keys = jax.random.split(jax.random.key(0), len(ids))
    found = jax.jit(sample)(params, tokens_BT, valid_BT, keys)
    length = int(found.length_B[0])
    assert length <= 1 and found.finished_B[0]
    assert int(found.tokens_BN[0, length]) in (end, 2)
    assert not found.tokens_BN[0, length + 1 :].any()


def test_the_loop_ends_when_all_sequences_have_ended(model, params):
    """With every token an end token, one prefill answers; the decode step is never entered."""
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(model, name)

        def decode(self, params, token_B, position_B, valid_BC, cache, slot):
            jax.debug.callback(lambda: calls.append(1))
            return model.decode(params, token_B, position_B, valid_BC, cache, slot)

    tokens_BT, valid_BT = sampler.left_pad([[5, 6], [7, 8]], 8)
    keys = jax.random.split(jax.random.key(0), 2)
    every = list(range(model.spec.vocab))
    sample = sampler.make_sampler(Counting(), max_new_tokens=6, eos_id=every)
    jax.jit(sample)(params, tokens_BT, valid_BT, keys)
    jax.effects_barrier()
    assert calls == []
    sample = sampler.make_sampler(Counting(), max_new_tokens=6, eos_id=-1)
    jax.jit(sample)(params, tokens_BT, valid_BT, keys)
    jax.effects_barrier()
    assert len(calls) == 5


def _softmax(logits):
    logits = np.asarray(logits, np.float64)
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def _assert_frequencies(token_B, expected_V):
    observed_V = np.bincount(token_B, minlength=len(expected_V)) / len(token_B)
    deviation_V = np.sqrt(expected_V * (1 - expected_V) / len(token_B))
    assert np.all(np.abs(observed_V - expected_V) <= 4.5 * deviation_V)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_frequencies_follow_the_tempered_softmax(temperature):
    logits_V = np.random.default_rng(1).normal(scale=1.5, size=12).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 5000)
    choose = sampler.make_chooser(temperature, 1.0)
    token_B = choose(jnp.broadcast_to(logits_V, (5000, 12)), keys)
    _assert_frequencies(token_B, _softmax(logits_V / temperature))


def test_the_models_tokens_follow_its_tempered_nucleus(model, params, tokenizer):
    count, ids = 3000, prompting.encode_prompt(tokenizer, "7+5=")
    sample = sampler.make_sampler(model, max_new_tokens=1, eos_id=2, temperature=1.5, top_p=0.6)
    tokens_BT, valid_BT = sampler.left_pad([ids] * count, 8)
    keys = jax.random.split(jax.random.key(3), count)
    found = jax.jit(sample)(params, tokens_BT, valid_BT, keys)
    expected_V = _softmax(model.logits(params, jnp.asarray([ids]))[0, -1] / 1.5)
    order = np.argsort(-expected_V)
    outside = order[int(np.searchsorted(np.cumsum(expected_V[order]), 0.6)) + 1 :]
    assert 0 < len(outside) < len(order) - 1
    expected_V[outside] = 0
    _assert_frequencies(found.tokens_BN[:, 0], expected_V / expected_V.sum())


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.77, 0.95, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(jit, top_p):
    logits_BV = np.random.default_rng(0).normal(scale=2, size=(20, 30)).astype(np.float32)
    kept_BV = np.isfinite(jit(lambda x: sampler.keep_top_p(x, top_p))(logits_BV))
    for logits, kept in zip(logits_BV.astype(np.float64), kept_BV, strict=True):
        probability = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-probability)
        need = int(np.searchsorted(np.cumsum(probability[order]), top_p - 1e-7)) + 1
        assert set(np.flatnonzero(kept)) == set(order[:need])


def test_samples_depend_on_neither_batch_size_nor_neighbours(model, params, tokenizer):
    one = _generate(model, params, tokenizer, temperature=1.0, samples=3, batch=1)
    many = _generate(model, params, tokenizer, temperature=1.0, samples=3, batch=4)
    fewer = _generate(model, params, tokenizer, PROMPTS[:2], temperature=1.0, samples=3, batch=4)
    assert one == many
    assert one[:2] == fewer
    other = _generate(model, params, tokenizer, temperature=1.0, samples=3, seed=1)
    assert one != other
    assert len({c.text for c in one[0]}) > 1


def test_more_samples_keep_the_first_ones(model, params, tokenizer):
    two = _generate(model, params, tokenizer, temperature=1.0, samples=2)
    four = _generate(model, params, tokenizer, temperature=1.0, samples=4)
    assert [answers[:2] for answers in four] == two


def test_results_keep_the_order_of_prompts_of_mixed_lengths(model, params, tokenizer):
    prompts = ["1+" * 30 + "1=", "2=", "3+4=", "5*" * 20 + "5="]
    together = _generate(model, params, tokenizer, prompts, batch=2)
    apart = [_generate(model, params, tokenizer, [prompt] * 2, batch=2)[0] for prompt in prompts]
    assert together == apart


def test_progress_reports_every_sequence_once(model, params, tokenizer):
    seen = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    _generate(model, params, tokenizer, samples=2, temperature=1.0, progress=progress)
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_a_chat_prompt_goes_through_the_template(model, params, tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    messages = [{"role": "user", "content": "7+5"}]
    assert prompting.encode_prompt(chat, messages) == prompting.encode_prompt(tokenizer, "7+5=")
    assert _generate(model, params, chat, [messages] * 4) == _generate(
        model, params, tokenizer, ["7+5="] * 4
    )


def test_batches_hold_every_prompt_once_in_few_shapes():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 500, 300).tolist()
    plan = sampler.plan_batches(lengths, 16)
    assert sorted(i for _, members in plan for i in members) == list(range(300))
    assert all(len(members) <= 16 for _, members in plan)
    assert all(lengths[i] <= padded for padded, members in plan for i in members)
    assert len({padded for padded, _ in plan}) <= 5
    assert sum(len(members) < 16 for _, members in plan) == 1


def test_repeated_calls_of_one_shape_compile_once(model, params, tokenizer):
    run = sampler.compiled(model, 12, (2,), 1.0, 1.0, None)
    sizes = []
    for seed in range(2):
        _generate(model, params, tokenizer, PROMPTS[:4], seed=seed, temperature=1.0)
        sizes.append(run._cache_size())
    assert sizes[0] == sizes[1] >= 1


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 8}, {"data": 2, "context": 2, "tensor": 2}],
                         ids=str)  # fmt: skip
def test_eight_devices_answer_as_one_does(model, params, tokenizer, sizes):
    mesh = meshes.make_mesh(**sizes)
    rows = meshes.batch_sharding(mesh)
    spread = jax.device_put(params, meshes.shardings(params, mesh))
    on_mesh = dataclasses.replace(
        model, constrain=meshes.residual(mesh), together=meshes.together(mesh, jnp.float32)
    )
    for settings in ({}, {"temperature": 1.0, "samples": 2, "batch": 8}):
        expected = _generate(model, params, tokenizer, **settings)
        found = _generate(on_mesh, spread, tokenizer, rows=rows, **settings)
        assert found == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "at least 0"),
        ({"top_p": 0.0}, r"lies in \(0, 1\]"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"samples": 0}, "both must be at least 1"),
        ({"prompts": [""]}, "has no tokens"),
    ],
)
def test_wrong_settings_say_value_rule_and_fix(model, params, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        _generate(model, params, tokenizer, **settings)


def test_no_prompts_give_no_completions(model, params, tokenizer):
    assert _generate(model, params, tokenizer, []) == []
