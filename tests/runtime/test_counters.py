"""What is counted, against sums written out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import config
from sage_jax.data import encode, records
from sage_jax.models import decoder, lora, spec
from sage_jax.runtime import chips, counters, hlo

ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [4, 4, 4]},
]


@pytest.fixture
def pairs():
    return encode.encode(records.read(ROWS), None, max_length=8)


@pytest.fixture
def model():
    return decoder.Model(spec.ModelSpec(vocab=8, d_model=4, d_ff=6, layers=2, heads=2))


def test_a_pair_costs_what_its_two_sequences_cost(model, pairs):
    found = counters.pair_flops(model, pairs)
    starts = pairs.start_N2.tolist()
    by_hand = [
        sum(
            model.forward_flops(n, n * (n + 1) // 2, n - start)
            for n, start in zip(lengths, begin, strict=True)
        )
        for lengths, begin in zip(((4, 3), (2, 4)), starts, strict=True)
    ]
    np.testing.assert_allclose(found, by_hand)
    once = [model.forward_flops(n, n * (n + 1) // 2, 0) for n in pairs.common_N.tolist()]
    np.testing.assert_allclose(
        counters.pair_flops(model, pairs, shared=True), np.subtract(by_hand, once)
    )


def test_a_row_says_how_many_steps_pairs_and_operations_came_before_it(pairs):
    spent = counters.Counters(flops_scoring=7.0)
    spent.count(1, 30.0)
    assert spent.row(len(pairs)) == {
        "step": 1, "epoch": 0.5, "pairs": 1, "flops": 37.0,
        "flops_scoring": 7.0, "flops_training": 30.0,
    }  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_is_worth_the_forward_passes_that_its_compiled_gradient_has(rank):
    size = spec.ModelSpec(vocab=512, d_model=64, d_ff=192, layers=3, heads=4)
    model = dataclasses.replace(decoder.Model(size), remat="none")
    params = model.init(jax.random.key(0))
    settings = lora.Lora(rank or 1)
    adapter = lora.init(jax.random.key(1), params, settings)

    def loss(trained, tokens):
        weights = lora.join(params, trained, settings) if rank else trained
        return jnp.square(model.logits(weights, tokens)).sum()

    def operations(fn):
        trained, tokens = (adapter if rank else params), jnp.zeros((1, 64), jnp.int32)
        return hlo.Program(jax.jit(fn).lower(trained, tokens).compile().as_text()).totals().flops

    run = config.resolve({"lora": {"rank": rank}})
    ratio = operations(jax.grad(loss)) / operations(loss)
    assert ratio == pytest.approx(counters.train_passes(run), rel=0.1)


def test_sums_are_of_sampling_scoring_and_training_and_leave_out_what_every_method_needs():
    spent = counters.Counters(
        flops_reference=1.0, flops_sampling=20.0, flops_scoring=300.0, flops_training=4000.0,
        seconds_reference=0.1, seconds_compiling=0.2, seconds_drawing=0.3, seconds_sampling=5.0,
        seconds_scoring=6.0, seconds_training=7.0,
    )  # fmt: skip
    assert spent.row(10)["flops"] == 4320.0 and spent.row(10)["flops_sampling"] == 20.0
    assert spent.clock() == {
        "perf/seconds": 18.0, "perf/seconds_sampling": 5.0, "perf/seconds_drawing": 0.3,
        "perf/seconds_scoring": 6.0, "perf/seconds_training": 7.0,
    }  # fmt: skip
    spent.add_reference(counters.Counters(flops_reference=2.0, pairs_reference=3, pairs=9))
    assert (spent.flops_reference, spent.pairs_reference, spent.pairs) == (3.0, 3, 0)


def test_utilisation_is_told_only_where_the_peak_is_known(monkeypatch):
    assert "perf/mfu" not in counters.speed(10, 100.0, 2.0, None)
    assert counters.speed(10, 100.0, 2.0, 200.0) == {
        "perf/step_time": 2.0, "perf/tokens_per_second": 5.0, "perf/mfu": 0.25,
    }  # fmt: skip
    assert counters.peak_flops("bfloat16") is None  # a CPU
    monkeypatch.setitem(chips.PEAK_FLOPS, "cpu", 1e12)
    assert counters.peak_flops("bfloat16") == 8e12  # eight devices in the tests
    assert counters.peak_flops("float32") is None
