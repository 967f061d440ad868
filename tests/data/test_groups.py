"""Pairs of one problem in one row: nothing lost, everything once, what each token sees."""

import laid_out
import numpy as np
import pytest

from sage_jax import batch
from sage_jax.data import encode, groups, pack, records, steps


def make_problems(seed=0, problems=12, most=6):
    """Pairs in any order; a completion is often in several of a problem's pairs."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, 50, rng.integers(low, high)).tolist()  # noqa: E731
    rows = []
    for _ in range(problems):
        prompt = draw(3, 10)
        sides = [[draw(1, 9) for _ in range(n)] for n in rng.integers(1, 4, 2)]
        rows += [
            {"prompt_ids": prompt, "chosen_ids": sides[0][n % len(sides[0])],
             "rejected_ids": sides[1][n % len(sides[1])]}
            for n in range(rng.integers(1, most))
        ]  # fmt: skip
    rng.shuffle(rows)
    return encode.encode(records.read(rows), None, max_length=100)


def by_hand(pairs, pair_S):
    """Prompts and completions of a row's pairs, each once for a run of pairs with one prompt."""
    prompts, completions, before = [], [], None
    for i in pair_S[pair_S >= 0]:
        (chosen, start), (rejected, _) = pairs.sequence(i, 0), pairs.sequence(i, 1)
        prompt = tuple(chosen[:start])
        if prompt != before:
            prompts.append(prompt)
            completions.append(set())
        before = prompt
        completions[-1] |= {tuple(chosen[start:]), tuple(rejected[start:])}
    return prompts, completions


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("row_length", "keys"), [(40, 1.0), (60, 1.3), (200, 4.0)])
def test_a_plan_holds_each_pair_once_and_no_row_too_much(seed, row_length, keys):
    pairs, slots = make_problems(seed), 9
    order = np.random.default_rng(seed).permutation(len(pairs))[: len(pairs) - 3]
    plan = groups.plan(pairs, order, row_length=row_length, rows=2, slots=slots, keys=keys)
    np.testing.assert_array_equal(np.sort(plan[plan >= 0]), np.sort(order))
    work = groups.work(pairs, plan, grouped=True)
    assert work.tokens.max() <= row_length
    for k, r in np.ndindex(plan.shape[:2]):
        prompts, completions = by_hand(pairs, plan[k, r])
        own = [[len(c) for c in group] for group in completions]
        assert work.tokens[k, r] == sum(map(len, prompts)) + sum(map(sum, own))
        attended = sum(
            len(p) * (len(p) + 1) / 2 + sum(n * len(p) + n * (n + 1) / 2 for n in group)
            for p, group in zip(prompts, own, strict=True)
        )
        assert (work.attended[k, r], work.head[k, r]) == (attended, sum(map(sum, own)))
    rows = [pack.collate(pairs, one, row_length, share=True, keys=int(keys * row_length))
            for one in plan]  # fmt: skip
    assert sum((one.segment_RT > 0).sum() for one in rows) == work.tokens.sum()
    if row_length == 200:  # no problem had to be parted
        assert work.tokens.sum() < 0.7 * groups.work(pairs, plan, grouped=False).tokens.sum()


@pytest.mark.parametrize("seed", range(3))
def test_a_completion_sees_its_prompt_and_itself_and_nothing_else(seed):
    pairs = make_problems(seed)
    plan = groups.plan(pairs, range(len(pairs)), row_length=90, rows=2, slots=20, keys=2.0)
    shared = 0
    for pair_RS in plan:
        rows = pack.collate(pairs, pair_RS, 90, share=True, keys=180)
        told = rows.shared
        for r, s, side in np.argwhere(np.repeat((pair_RS >= 0)[..., None], 2, axis=2)):
            ids, start = pairs.sequence(int(pair_RS[r, s]), side)
            number = told.sequence_RS2[r, s, side]
            shared += number != 2 * s + side
            own = np.flatnonzero((rows.segment_RT[r] == number + 1) & rows.completion_RT[r])
            t = own[rows.position_RT[r, own].argmax()]  # the last token
            seen = told.key_RX[r, told.first_RT[r, t] : told.last_RT[r, t] + 1]
            in_order = laid_out.check_sequence(rows, r, seen, ids, start)
            # Every token of it sees those before it, and itself.
            for n, t in enumerate(in_order):
                seen = told.key_RX[r, told.first_RT[r, t] : told.last_RT[r, t] + 1]
                np.testing.assert_array_equal(np.sort(seen), np.sort(in_order[: n + 1]))
    assert shared > 5


def test_pairs_whose_sides_have_different_prompts_stay_by_themselves():
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [n]} for n in (5, 6, 6)]
    pairs = encode.encode(records.read(rows), None, max_length=9)
    assert pairs.problem_N.tolist() == [0, 0, 0]
    assert pairs.answer_N2.tolist() == [[0, 1], [0, 3], [0, 3]]
    pairs.tokens[pairs.offset[3] + 2] = 9  # the second pair's rejected side has another prompt
    changed = encode.take(pairs, [0, 1, 2])
    assert changed.common_N.tolist() == [3, 2, 3]
    assert changed.problem_N.tolist() == [0, 1, 0]


def test_rows_of_another_shape_are_refused():
    rows = [{"prompt_ids": [1] * 9, "chosen_ids": [4], "rejected_ids": [n]} for n in (5, 6, 7, 8)]
    pairs = encode.encode(records.read(rows), None, max_length=20)
    with pytest.raises(ValueError, match="more than 20 keys"):
        pack.collate(pairs, np.arange(4)[None], 20, share=True, keys=20)
    with pytest.raises(ValueError, match="needs 14 tokens"):
        pack.collate(pairs, np.arange(4)[None], 13, share=True, keys=99)


@pytest.mark.parametrize("rows_multiple", [1, 8])
def test_steps_train_the_pairs_that_they_would_train_each_by_itself(rows_multiple):
    pairs = make_problems(5, problems=8, most=12)
    lengths, order = pairs.row_lengths(True), np.random.default_rng(2).permutation(len(pairs))
    alone = steps.shape(lengths, batch_pairs=16, rows_multiple=rows_multiple, share=True, long=True)
    of_step, of_pass = steps.of_problems(pairs, alone, 16, least=0.02)
    assert of_step.every == alone.every and of_pass.keys > 1
    pair_KB = steps.split(lengths, order, alone.every, 16)
    grouped = alone._replace(keys=of_pass.keys)
    apart, together = (
        steps.place(lengths, pair_KB, one, pairs if one.keys else None) for one in (alone, grouped)
    )
    for a, b, step in zip(apart, together, pair_KB, strict=True):
        np.testing.assert_array_equal(np.sort(a[a >= 0]), np.sort(step[step >= 0]))
        np.testing.assert_array_equal(np.sort(b[b >= 0]), np.sort(step[step >= 0]))
    tokens = [steps.tokens(pairs, p, s) for p, s in ((apart, alone), (together, grouped))]
    assert tokens[1].sum() < 0.9 * tokens[0].sum()
    for one in (of_step, of_pass):
        found = steps.lengths(pairs, steps.plan_pass(pairs, order, one), one)
        assert set(found) <= {*one.sizes, one.row_length}
    assert pack.collate(
        pairs, together[0], grouped.row_length, share=True, keys=grouped.keys_of(grouped.row_length)
    ).pair_RS.tolist() == together[0].tolist()  # fmt: skip


def test_parts_of_one_problem_that_meet_in_a_row_have_room_for_their_keys():
    rng, rows = np.random.default_rng(0), []
    draw = lambda size: rng.integers(1, 50, size).tolist()  # noqa: E731
    for _ in range(4):  # so many short answers to a long prompt that they come in several parts
        prompt, answers = draw(200), [draw(2) for _ in range(30)]
        two = [rng.choice(30, 2, replace=False) for _ in range(60)]
        rows += [{"prompt_ids": prompt, "chosen_ids": answers[a], "rejected_ids": answers[b]}
                 for a, b in two]  # fmt: skip
    pairs = encode.encode(records.read(rows), None, max_length=300)
    lengths = pairs.row_lengths(True)
    alone = steps.shape(lengths, batch_pairs=64, share=True, long=True)
    of_step, of_pass = steps.of_problems(pairs, alone, 64, least=0.02)
    order = rng.permutation(len(pairs))
    in_steps = steps.place(lengths, steps.split(lengths, order, alone.every, 64), of_step, pairs)
    for one, plan in ((of_step, in_steps), (of_pass, steps.plan_pass(pairs, order, of_pass))):
        work = groups.work(pairs, plan, grouped=True)
        for k, length in enumerate(steps.lengths(pairs, plan, one).tolist()):
            keys = one.keys_of(length)
            told = pack.collate(pairs, plan[k], length, share=True, keys=keys).shared
            tokens = int(work.tokens[k, 0])
            assert work.keys[k, 0] == told.last_RT[0, :tokens].max() + 1 <= keys


def test_few_problems_that_meet_are_left_by_themselves():
    pairs = make_problems(1, problems=40, most=2)  # a pair each
    shape = steps.shape(pairs.row_lengths(True), batch_pairs=8, share=True, long=True)
    assert steps.of_problems(pairs, shape, 8) == (shape, shape)
    many = make_problems(1, problems=400, most=4)
    shape = steps.shape(many.row_lengths(True), batch_pairs=8, share=True, long=True)
    of_step, of_pass = steps.of_problems(many, shape, 8, least=0.02)
    assert of_step == shape and of_pass.keys > 0  # they meet in a pass, not in a step
    alone = shape._replace(slots=1)
    assert steps.of_problems(many, alone, 8) == (alone, alone)


def test_a_plan_of_no_pairs_has_no_rows():
    pairs = make_problems(2)
    plan = groups.plan(pairs, [], row_length=50, rows=2, slots=5, keys=2.0)
    assert plan.shape == (0, 2, 5)
    assert groups.work(pairs, plan, grouped=True).tokens.shape == (0, 2)


def test_empty_slots_belong_to_no_pair():
    pairs = make_problems(2)
    plan = groups.plan(pairs, range(3), row_length=200, rows=2, slots=5, keys=2.0)
    rows = pack.collate(pairs, plan[0], 200, share=True, keys=400)
    own = np.arange(10).reshape(5, 2)
    for r in range(2):
        empty = rows.pair_RS[r] < 0
        np.testing.assert_array_equal(rows.shared.sequence_RS2[r, empty], own[empty])
        used = rows.segment_RT[r][rows.segment_RT[r] > 0]
        assert not np.isin(used, [batch.segment_id(s, d) for s in np.flatnonzero(empty)
                                  for d in (0, 1)]).any()  # fmt: skip
