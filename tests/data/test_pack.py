"""Packing: nothing lost, nothing split, one shape, the same plan every time."""

import time

import hypothesis
import jax.numpy as jnp
import laid_out
import numpy as np
import pytest
from hypothesis import strategies as st

from sage_jax import batch, losses
from sage_jax.data import encode, pack, records


def make_pairs(lengths_N2, seed=0):
    """Encoded pairs of the given lengths, with random ids."""
    rng = np.random.default_rng(seed)
    rows = []
    for chosen, rejected in lengths_N2:
        prompt = int(rng.integers(1, min(chosen, rejected)))
        draw = lambda n: rng.integers(1, 50, n).tolist()  # noqa: E731
        rows.append(
            {
                "prompt_ids": draw(prompt),
                "chosen_ids": draw(chosen - prompt),
                "rejected_ids": draw(rejected - prompt),
            }
        )
    return encode.encode(records.read(rows), None, max_length=10**6)


lengths = st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=40)
spaces = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 40))


def place(lengths_N2, space, batch_pairs):
    rows, slots, extra = space
    lengths_N2 = np.array(lengths_N2)
    row_length = int(lengths_N2.sum(1).max()) + extra
    order = np.random.default_rng(1).permutation(len(lengths_N2))
    plan = pack.plan(
        lengths_N2, order, row_length=row_length, rows=rows, slots=slots, batch_pairs=batch_pairs
    )
    assert plan.dtype == np.int32 and plan.shape[1:] == (rows, slots)
    used = np.where(plan >= 0, lengths_N2.sum(1)[plan], 0).sum(-1)
    assert (used <= row_length).all()
    return plan, order


@hypothesis.given(lengths, spaces)
@hypothesis.settings(deadline=None)
def test_filling_places_every_pair_once_and_respects_rows(lengths_N2, space):
    plan, order = place(lengths_N2, space, None)
    assert sorted(plan[plan >= 0].tolist()) == sorted(order.tolist())
    again, _ = place(lengths_N2, space, None)
    np.testing.assert_array_equal(plan, again)


@hypothesis.given(lengths, spaces, st.integers(1, 8))
@hypothesis.settings(deadline=None)
def test_batches_hold_the_pairs_in_order_and_exactly_as_many_as_fit(lengths_N2, space, batch_pairs):
    batch_pairs = min(batch_pairs, space[0] * space[1])
    plan, order = place(lengths_N2, space, batch_pairs)
    at = 0
    for step in plan:
        members = step[step >= 0]
        assert 1 <= len(members) <= batch_pairs
        assert set(members.tolist()) == set(order[at : at + len(members)].tolist())
        at += len(members)
    assert len(order) - at < batch_pairs


def test_a_batch_closes_early_only_when_its_rows_are_full():
    lengths_N2 = np.full((6, 2), 4)
    full = pack.plan(lengths_N2, range(6), row_length=8, rows=2, slots=3, batch_pairs=3)
    assert [sorted(s[s >= 0].tolist()) for s in full] == [[0, 1], [2, 3]]
    wide = pack.plan(lengths_N2, range(6), row_length=8, rows=3, slots=3, batch_pairs=3)
    assert [sorted(s[s >= 0].tolist()) for s in wide] == [[0, 1, 2], [3, 4, 5]]


def test_wrong_plans_are_refused():
    lengths_N2 = np.full((2, 2), 4)
    with pytest.raises(ValueError, match="has 8 tokens and a row 7"):
        pack.plan(lengths_N2, [0, 1], row_length=7, rows=2, slots=1)
    with pytest.raises(ValueError, match=r"rows \* slots = 2"):
        pack.plan(lengths_N2, [0, 1], row_length=8, rows=2, slots=1, batch_pairs=3)
    with pytest.raises(ValueError, match="gives no batch"):
        pack.shape(lengths_N2[:0], batch_pairs=2)
    with pytest.raises(ValueError, match="same row_length"):
        pack.collate(make_pairs([(4, 4)]), np.array([[0]]), row_length=7)


def test_an_empty_order_gives_no_batch():
    plan = pack.plan(np.full((2, 2), 4), [], row_length=8, rows=2, slots=1)
    assert plan.shape == (0, 2, 1)
    assert pack.padding_fraction(plan, np.full((2, 2), 4), 8) == 0.0


def test_without_reference_log_probs_a_loss_that_needs_them_is_no_number():
    rows = pack.collate(make_pairs([(4, 4)]), np.array([[0, -1]]), 16)
    logps, tokens = jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2))
    for loss, known in ((losses.sigmoid(), False), (losses.simpo(), True)):
        value = loss(*losses.rewards(loss, logps, rows.ref_logps_RS2, tokens))[0]
        assert np.isfinite(value).tolist() == [known, True]  # an empty slot is 0, as ever


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        ([[[0, 1]]], {}, r"\[1, 1, 2\] and has to be \[R, S\]"),
        ([[0, 1]], {"ref_logps_N2": np.zeros(2)}, r"ref_logps_N2 .*\[2\]; .* \[2, 2\]"),
        ([[0]], {"ref_logps_N2": np.zeros((1, 1, 2))}, r"ref_logps_N2 .*\[1, 1, 2\]"),
        ([[0]], {"weight_N": np.ones(1)}, r"weight_N .*\[1\]; for 2 pairs"),
    ],
)
def test_collate_refuses_arrays_of_other_shapes(pair, options, message):
    with pytest.raises(ValueError, match=message):
        pack.collate(make_pairs([(4, 4), (3, 3)]), np.array(pair), 16, **options)


@hypothesis.given(lengths, st.integers(1, 5))
@hypothesis.settings(deadline=None, max_examples=40)
def test_collating_and_reading_back_gives_every_sequence(lengths_N2, slots):
    pairs = make_pairs(lengths_N2)
    row_length = int(pairs.lengths_N2.sum(1).max()) + 9
    plan = pack.plan(
        pairs.lengths_N2, range(len(pairs)), row_length=row_length, rows=2, slots=slots
    )
    ref = np.random.default_rng(2).normal(size=(len(pairs), 2))
    weight = np.arange(1, len(pairs) + 1) / 7
    tokens = 0
    for pair_RS in plan:
        rows = pack.collate(pairs, pair_RS, row_length, ref_logps_N2=ref, weight_N=weight)
        for r, s in zip(*np.nonzero(pair_RS >= 0), strict=True):
            i = pair_RS[r, s]
            for side in (0, 1):
                here = rows.segment_RT[r] == batch.segment_id(s, side)
                ids, start = pairs.sequence(i, side)
                np.testing.assert_array_equal(rows.tokens_RT[r, here], ids)
                np.testing.assert_array_equal(rows.position_RT[r, here], np.arange(len(ids)))
                np.testing.assert_array_equal(
                    rows.completion_RT[r, here], np.arange(len(ids)) >= start
                )
            np.testing.assert_allclose(rows.ref_logps_RS2[r, s], ref[i], rtol=1e-6)
            np.testing.assert_allclose(rows.weight_RS[r, s], weight[i], rtol=1e-6)
        empty = pair_RS < 0
        assert not rows.weight_RS[empty].any() and not rows.ref_logps_RS2[empty].any()
        padding = rows.segment_RT == 0
        assert not rows.tokens_RT[padding].any() and not rows.completion_RT[padding].any()
        tokens += int((~padding).sum())
        expected = batch.empty(2, row_length, slots)
        assert all(
            a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(rows[:-1], expected[:-1], strict=True)
        )
    assert tokens == len(pairs.tokens)


def test_padding_fraction_counts_the_padding_of_the_batches():
    pairs = make_pairs([(4, 6), (3, 3), (8, 2), (5, 5)])
    plan = pack.plan(pairs.lengths_N2, range(4), row_length=16, rows=2, slots=2)
    padding = [pack.collate(pairs, pair_RS, 16).segment_RT == 0 for pair_RS in plan]
    assert pack.padding_fraction(plan, pairs.lengths_N2, 16) == pytest.approx(np.mean(padding))


def chat_lengths(count, seed=0):
    drawn = np.random.default_rng(seed).lognormal(4.5, 0.6, (count, 2))
    return np.clip(drawn.astype(int), 8, 512)


def planned(lengths, order, shape, batch_pairs=None):
    return pack.plan(lengths, order, **shape._asdict(), batch_pairs=batch_pairs)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_few_row_lengths_waste_under_three_percent(rows):
    lengths_N2 = chat_lengths(20_000)
    shape = pack.shape(
        lengths_N2, batch_pairs=128, rows_multiple=rows, factors=(pack.LONG,), sizes=4
    )
    assert shape.rows == rows and len(shape.sizes) == 4 and shape.sizes[-1] == shape.row_length
    order = np.random.default_rng(7).permutation(20_000)
    plan = planned(lengths_N2, order, shape, 128)
    full = (plan >= 0).sum((1, 2)) == 128
    assert full.mean() > 0.97
    np.testing.assert_array_equal(np.sort(plan[0][plan[0] >= 0]), np.sort(order[:128]))
    assert pack.padding_fraction(plan, lengths_N2, shape) < 0.03
    assert pack.padding_fraction(planned(lengths_N2, order, shape), lengths_N2, shape) < 0.03


@pytest.mark.parametrize("rows", [1, 8])
def test_a_row_length_has_to_save_what_its_program_costs(rows):
    lengths_N2 = chat_lengths(20_000)
    plan_of = np.random.default_rng(7).permutation(20_000)

    def tokens(price):  # computed a batch, and the row lengths in use
        shape = pack.even(lengths_N2, batch_pairs=128, rows=rows, price=price)
        whole = shape._replace(row_length=max((shape.row_length, *shape.sizes)))
        plan = planned(lengths_N2, plan_of, whole, 128)
        used = [pack.row_length(one, lengths_N2, whole) for one in plan]
        return rows * np.mean(used), len(set(used)), shape

    free, most, all_of = tokens(0.0)
    dear, one, single = tokens(1e9)
    assert most == 4 - (rows > 1) and one == 1
    assert single.row_length == all_of.row_length and single.slots == all_of.slots
    # Between both: every length but the first is worth the price, one more would not be.
    price = 0.5 * (dear - free)
    cost, count, _ = tokens(price)
    assert count == 2 and cost < dear - 0.8 * price
    assert free > cost - 1.2 * price


def shared_pairs():
    rng = np.random.default_rng(5)
    draw = lambda n: rng.integers(1, 50, n).tolist()  # noqa: E731
    rows = [
        {"prompt_ids": draw(rng.integers(1, 9)), "chosen_ids": draw(rng.integers(1, 9)),
         "rejected_ids": draw(rng.integers(1, 9))}
        for _ in range(12)
    ]  # fmt: skip
    return encode.encode(records.read(rows), None, max_length=100)


def test_shared_rows_hold_both_sequences_around_one_prompt():
    pairs = shared_pairs()
    lengths_N = pairs.row_lengths(True)
    plan = pack.plan(lengths_N, range(12), row_length=40, rows=2, slots=4)
    for pair_RS in plan:
        rows = pack.collate(pairs, pair_RS, 40, share=True)
        for r, s in np.argwhere(pair_RS >= 0):
            for side in (0, 1):
                ids, start = pairs.sequence(int(pair_RS[r, s]), side)
                last = np.flatnonzero(
                    (rows.segment_RT[r] == batch.segment_id(s, side)) & rows.completion_RT[r]
                )
                t = last[rows.position_RT[r, last].argmax()]  # the sequence's last token
                seen = np.arange(rows.shared.first_RT[r, t], rows.shared.last_RT[r, t] + 1)
                laid_out.check_sequence(rows, r, seen, ids, start)
    with pytest.raises(ValueError, match="with or without shared prompts"):
        pack.collate(pairs, np.arange(12)[None], 40, share=True)


def test_the_shape_holds_random_batches_nearly_always_and_wastes_little():
    lengths_N2 = chat_lengths(5000)
    shape = pack.shape(lengths_N2, batch_pairs=64, rows_multiple=4)
    assert shape.row_length % 8 == 0 and shape.rows % 4 == 0
    assert shape.row_length - 8 < lengths_N2.sum(1).max() <= shape.row_length
    order = np.random.default_rng(3).permutation(5000)
    plan = planned(lengths_N2, order, shape, 64)
    early = ((plan >= 0).sum((1, 2)) < 64).mean()
    assert early <= 0.05
    plain = pack.shape(lengths_N2, batch_pairs=64, packing=False)
    assert plain == (shape.row_length, 64, 1, ())
    alone = planned(lengths_N2, order, plain, 64)
    packed_padding = pack.padding_fraction(plan, lengths_N2, shape.row_length)
    assert packed_padding < 0.25 < 0.7 < pack.padding_fraction(alone, lengths_N2, plain.row_length)
    filled = planned(lengths_N2, order, shape)
    assert pack.padding_fraction(filled[:-1], lengths_N2, shape.row_length) < 0.02


def test_longer_rows_are_taken_only_where_they_save_tokens():
    lengths_N2 = np.full((100, 2), 30)  # a row of 64 holds one pair, a row of 120 two
    lengths_N2[0] = 32
    base = pack.shape(lengths_N2, batch_pairs=8)
    wide = pack.shape(lengths_N2, batch_pairs=8, factors=(1, 2, 3))
    assert base.row_length * base.rows >= wide.row_length * wide.rows
    odd = np.array([[40, 40]] + [[25, 25]] * 99)  # one in a row of 80, three in a row of 160
    assert pack.shape(odd, batch_pairs=9, factors=(1, 2)).row_length == 160


def test_sixty_thousand_pairs_are_planned_in_seconds():
    lengths_N2 = chat_lengths(60_000)
    shape = pack.shape(lengths_N2, batch_pairs=128)
    order = np.random.default_rng(4).permutation(60_000)
    began = time.process_time()
    planned(lengths_N2, order, shape, 128)
    planned(lengths_N2, order, shape)
    assert time.process_time() - began < 4  # a tenth of it on an idle machine


def test_supervised_rows_pack_like_pairs_with_an_empty_side(tokenizer):
    rows = [{"prompt": f"{i}=", "completion": str(i)} for i in range(5)]
    pairs = encode.encode(records.read(rows), tokenizer, max_length=16)
    plan = pack.plan(pairs.lengths_N2, range(5), row_length=10, rows=2, slots=2)
    seen = []
    for pair_RS in plan:
        rows_ = pack.collate(pairs, pair_RS, 10)
        assert (rows_.segment_RT[rows_.segment_RT > 0] % 2 == 1).all()  # chosen sides alone
        seen += rows_.pair_RS[rows_.weight_RS > 0].tolist()
    assert sorted(seen) == list(range(5))
