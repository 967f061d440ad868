"""Scores between rounds: what is computed afresh, what is remembered, and what it costs."""

import dataclasses
import pathlib

import jax
import jobs
import numpy as np
import pytest

from sage_jax import curriculum, scores
from sage_jax.data import encode, records
from sage_jax.report import writers
from sage_jax.runtime import counters, dataset, forward, loop, rounds, setup

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "train.steps": 9, "train.batch_pairs": 8, "curriculum.pool_size": 48, "checkpoint.every": 100,
    "selection.kappa": 2.0,
    "selection.margin": "likelihood",
    "data.limit": 200, "loss.beta": 0.5, "loss.nll_weight": 0.0, "optim.lr": 1e-4,
    "compare.uniform": False,
    "selection.keep": 0.5, "selection.uniform_share": 0.5, "selection.refresh": 0.0,
}  # fmt: skip


def small_run(**changes):
    return jobs.small_run(SMALL, **changes)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A loaded model and its data, on eight virtual devices."""
    return jobs.loaded(small_run(), tmp_path_factory.mktemp("job"))


def make(job, workdir, run):
    workdir.mkdir(parents=True, exist_ok=True)
    return loop.Trainer(run, workdir, **job, evaluate=lambda _: {}, label="test")


def train(job, workdir, run):
    trainer = make(job, workdir, run)
    return trainer, trainer.train(lambda: False)


@pytest.fixture(scope="module")
def moved(job):
    """Weights and a memory that no longer agree: some pairs trained, by other weights than now."""
    run = small_run()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.02 * np.float32(rng.normal(size=x.shape)), job["policy"].params
    )
    first = jax.device_get(
        setup.make_score_fn(run, setup.make_loss(run))(job["start"], job["reference"])
    )
    memory = curriculum.remember(
        curriculum.init_memory(200), np.arange(200), first, round=-1, trained=False
    )
    last_round = np.int32(rng.integers(-1, 4, 200))
    return params, memory._replace(last_round=last_round)


def scorer_of(job, **changes):
    run = small_run(**changes)
    return forward.Scorer(
        run, job["policy"], job["passes"], job["pairs"], job["reference"], setup.make_loss(run)
    )


def flops_of(job, scorer):
    """Of a pass over each pair by itself."""
    shared = scorer.passes.shape.share
    return counters.pair_flops(job["policy"].model, scorer.pairs, shared=shared)


def fresh_by_hand(job, params, index):
    """The full statistics of a pass of its own, scored."""
    run = small_run()
    stats = job["passes"].stats(params, job["pairs"], index)
    score_fn = setup.make_score_fn(run, setup.make_loss(run))
    return jax.device_get(score_fn(stats, job["reference"][index]))


POOL = np.random.default_rng(1).permutation(200)[:48]


# -- one pool ------------------------------------------------------------------------------------


def test_the_whole_pool_afresh_equals_a_pass_of_its_own_and_is_remembered(job, moved):
    params, memory = moved
    found = scorer_of(job, **{"selection.refresh": 1.0})(params, memory, POOL, number=4)
    by_hand = fresh_by_hand(job, params, POOL)
    for name in scores.PairScores._fields:
        a, b = getattr(found.pairs, name), getattr(by_hand, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4, err_msg=name)
    np.testing.assert_array_equal(found.memory.last_round[POOL], 4)
    np.testing.assert_array_equal(
        found.memory.likelihood_margin[POOL], found.pairs.likelihood_margin
    )
    stale = memory.likelihood_margin[POOL]
    assert np.median(np.abs(stale - by_hand.likelihood_margin)) > 0.1  # or this shows nothing


def test_a_part_of_the_pool_is_the_longest_unseen_and_the_rest_is_remembered(job, moved):
    params, memory = moved
    scorer = scorer_of(job, **{"selection.refresh": 0.25})
    found = scorer(params, memory, POOL, number=4)
    now = np.flatnonzero(found.memory.last_round[POOL] == 4)
    assert len(now) == 12
    before = memory.last_round[POOL]
    assert before[now].max() <= np.delete(before, now).min()
    fresh, rest = fresh_by_hand(job, params, POOL), np.delete(np.arange(48), now)
    np.testing.assert_allclose(
        found.pairs.likelihood_margin[now], fresh.likelihood_margin[now], rtol=1e-4, atol=2e-4
    )
    np.testing.assert_array_equal(
        found.pairs.likelihood_margin[rest], memory.likelihood_margin[POOL[rest]]
    )
    assert found.flops == pytest.approx(flops_of(job, scorer)[POOL[now]].sum())


def test_the_choice_among_equally_stale_pairs_is_of_the_seed_and_the_round():
    last = np.zeros(40, int)
    one = rounds.stalest(last, 0.5, seed=0, number=3)
    np.testing.assert_array_equal(one, rounds.stalest(last, 0.5, seed=0, number=3))
    assert len(one) == 20 and one.tolist() != rounds.stalest(last, 0.5, seed=1, number=3).tolist()
    assert one.tolist() != rounds.stalest(last, 0.5, seed=0, number=4).tolist()
    assert len(rounds.stalest(last, 0.0, seed=0, number=0)) == 0
    assert rounds.stalest(last, 1.0, seed=0, number=0).tolist() == list(range(40))
    assert len(rounds.stalest(last, 0.01, seed=0, number=0)) == 1  # a share above 0 is at least one


def test_bfloat16_scores_are_close_and_are_those_of_a_bfloat16_model(job, moved):
    params, memory = moved
    found = scorer_of(
        job, **{"selection.refresh": 1.0, "selection.scoring_dtype": "bfloat16"}
    )(params, memory, POOL, number=4).pairs  # fmt: skip
    exact = fresh_by_hand(job, params, POOL)
    error = found.likelihood_margin - exact.likelihood_margin
    assert 1e-4 < np.median(np.abs(error)) < 0.05 * np.std(exact.likelihood_margin)
    # Weights that are cast before the pass give the numbers of a model that casts them itself.
    half = dataclasses.replace(
        job["policy"], model=dataclasses.replace(job["policy"].model, dtype="bfloat16")
    )
    passes = forward.Passes(half, job["passes"].mesh, job["passes"].shape)
    theirs = passes.stats(params, job["pairs"], POOL, light=True)
    ours = job["passes"].stats(params, job["pairs"], POOL, light=True, dtype="bfloat16")
    np.testing.assert_array_equal(ours.logps, theirs.logps)


# -- cut completions -----------------------------------------------------------------------------


def test_first_tokens_cuts_completions_and_nothing_else(job):
    pairs = job["pairs"]
    short = dataset.first_tokens(pairs, 7)
    for i in range(0, 200, 23):
        for side in range(2):
            ids, start = pairs.sequence(i, side)
            cut, same = short.sequence(i, side)
            assert cut.tolist() == ids[: start + 7].tolist() and same == start
    whole = (short.lengths_N2 == pairs.lengths_N2).all(axis=1)
    equal = (short.digest_N16 == pairs.digest_N16).all(axis=1)
    np.testing.assert_array_equal(equal, whole)  # another content, another identity


def cap_of(job):
    """A number of tokens that cuts some pairs and leaves others whole."""
    longest = (job["pairs"].lengths_N2 - job["pairs"].start_N2).max(axis=1)
    return int(np.median(longest[POOL])), longest


def test_cut_completions_rank_by_their_part_and_leave_the_memory_of_the_whole_alone(job, moved):
    params, memory = moved
    cap, longest = cap_of(job)
    scorer = scorer_of(job, **{"selection.refresh": 1.0, "selection.scoring_tokens": cap})
    found = scorer(params, memory, POOL, number=4)
    cut = longest[POOL] > cap
    assert 5 < cut.sum() < 43
    # By hand: a data set whose completions are the first tokens.
    rows = []
    for i in POOL:
        sides = [job["pairs"].sequence(i, side) for side in range(2)]
        start = sides[0][1]
        rows.append({"prompt_ids": sides[0][0][:start].tolist()} | {
            name: ids[start : start + cap].tolist()
            for name, (ids, _) in zip(("chosen_ids", "rejected_ids"), sides, strict=True)
        })  # fmt: skip
    short = encode.encode(records.read(rows), None, max_length=512)
    stats = job["passes"].stats(params, short, np.arange(48))
    margin = stats.logps[:, 0] - stats.logps[:, 1]
    np.testing.assert_allclose(found.pairs.likelihood_margin, margin, rtol=1e-4, atol=2e-4)
    error = np.sqrt(stats.spread.sum(axis=1))
    np.testing.assert_allclose(found.pairs.margin_error, error, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.pairs.margin, margin, rtol=1e-4, atol=2e-4)  # the rank's

    for name in curriculum.Memory._fields:  # nothing of a part enters the memory of wholes
        np.testing.assert_array_equal(
            getattr(found.memory, name)[POOL[cut]], getattr(memory, name)[POOL[cut]], err_msg=name
        )
    np.testing.assert_array_equal(found.pairs.reward_margin[cut], memory.reward_margin[POOL[cut]])
    np.testing.assert_array_equal(found.memory.last_round[POOL[~cut]], 4)  # these were read whole
    np.testing.assert_allclose(
        found.memory.likelihood_margin[POOL[~cut]], margin[~cut], rtol=1e-4, atol=2e-4
    )


def test_a_cut_pass_has_shorter_rows_and_counts_only_what_it_reads(job):
    cap, _ = cap_of(job)
    whole = scorer_of(job, **{"selection.refresh": 1.0})
    cut = scorer_of(job, **{"selection.refresh": 1.0, "selection.scoring_tokens": cap // 2})
    area = [s.passes.shape.row_length * s.passes.shape.rows for s in (cut, whole)]
    assert area[0] < area[1] and cut.passes.shape.row_length < whole.passes.shape.row_length
    less_N, flops_N = flops_of(job, cut), flops_of(job, whole)
    assert (less_N[~cut.whole_N] < flops_N[~cut.whole_N]).all()
    np.testing.assert_array_equal(less_N[cut.whole_N], flops_N[cut.whole_N])
    model, pairs = job["policy"].model, job["pairs"]
    by_hand = sum(
        model.forward_flops(n, n * (n + 1) // 2, n - pairs.start_N2[3, side])
        for side, n in enumerate(pairs.lengths_N2[3].tolist())
    )
    assert flops_N[3] == pytest.approx(by_hand)


# -- runs ----------------------------------------------------------------------------------------


def test_remembered_margins_take_no_forward_pass(job, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(forward.Passes, "stats", refuse)
    _, outcome = train(job, tmp_path / "run", small_run())
    assert outcome.counters.flops_scoring == outcome.counters.seconds_scoring == 0.0
    assert outcome.rows[-2]["perf/scoring_seconds_fraction"] == 0.0


def test_before_the_first_step_margins_are_exact_and_nothing_is_computed(job, tmp_path):
    run = small_run(**{"selection.refresh": 1.0, "train.steps": 3})
    _, outcome = train(job, tmp_path / "run", run)  # one round
    assert outcome.counters.flops_scoring == 0.0


def test_scoring_is_counted_in_operations_and_in_seconds(job, tmp_path):
    run = small_run(**{"selection.refresh": 0.5, "train.steps": 6})  # a second round of three steps
    trainer, outcome = train(job, tmp_path / "run", run)
    pool, spent = trainer.round.pool_P, outcome.counters
    at_most = np.sort(flops_of(job, trainer.scorer)[pool])[-24:].sum()
    assert 0 < spent.flops_scoring <= at_most * (1 + 1e-9)
    last = outcome.rows[-2]
    assert last["perf/scoring_fraction"] == pytest.approx(
        spent.flops_scoring / (spent.flops_scoring + spent.flops_training), rel=1e-6
    )
    assert 0 < last["perf/scoring_seconds_fraction"] < 1
    assert outcome.rows[2]["perf/scoring_seconds_fraction"] == 0.0


def test_a_run_with_partial_refresh_goes_on_bit_for_bit(job, tmp_path):
    run = small_run(**{"selection.refresh": 0.3, "checkpoint.every": 4})
    trainer, _ = train(job, tmp_path / "whole", run)
    first = make(job, tmp_path / "parts", run)
    polls = iter(range(100))
    assert not first.train(lambda: next(polls) > 5).finished  # stops inside the second round
    again, rest = train(job, tmp_path / "parts", run)
    assert rest.finished and 0 < first.counters.step < 9
    for a, b in zip(
        jax.tree.leaves((trainer.state, trainer.memory)),
        jax.tree.leaves((again.state, again.memory)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    names = sorted(p.name for p in (tmp_path / "whole/selection").iterdir())
    assert names == [*(f"round_{n:05d}.jsonl" for n in range(3)), "suspects.jsonl"]
    for name in names:
        one, two = (
            writers.read_rows(tmp_path / d / "selection" / name) for d in ("whole", "parts")
        )
        assert one == two


@pytest.mark.slow
def test_a_bfloat16_pass_leaves_the_train_step_alone(job, tmp_path):
    """With the same selection, weights are the same to the last bit."""
    keep_all = {"selection.keep": 1.0, "selection.refresh": 1.0, "curriculum.sharpness": 0.0,
                "curriculum.difficulty": "level", "train.steps": 12}  # fmt: skip
    exact, _ = train(job, tmp_path / "exact", small_run(**keep_all))
    half, outcome = train(
        job, tmp_path / "half", small_run(**keep_all, **{"selection.scoring_dtype": "bfloat16"})
    )
    assert outcome.counters.flops_scoring > 0
    for a, b in zip(jax.tree.leaves(exact.state), jax.tree.leaves(half.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
