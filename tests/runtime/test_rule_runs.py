"""Whole runs under other selection rules: their state is resumed, their order is kept."""

import dataclasses
import pathlib

import jax
import jobs
import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config, rules
from sage_jax.data import encode, records
from sage_jax.runtime import loop, rounds, scoring, setup

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "train.steps": 8, "train.batch_pairs": 8, "curriculum.pool_size": 48, "checkpoint.every": 100,
    "data.limit": 120, "loss.beta": 0.5, "loss.nll_weight": 0.0, "optim.lr": 3e-4,
    "compare.uniform": False, "curriculum.strata": 1, "curriculum.sharpness": 0.0,
    "selection.keep": 0.5, "selection.uniform_share": 0.0, "selection.refresh": 0.0,
    "selection.kappa": 2.0,
    "selection.margin": "likelihood",
}  # fmt: skip


def small_run(**changes):
    return jobs.small_run(SMALL, **changes)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A loaded model and its data; a column `loss` that is easy to recognise."""
    found = jobs.loaded(small_run(), tmp_path_factory.mktemp("job"))
    pairs = found["pairs"]
    column = np.random.default_rng(0).permutation(120).astype(np.float64)
    pairs = dataclasses.replace(pairs, columns=pairs.columns | {"loss": column})
    return found | {"pairs": pairs}


def train(job, workdir, run, *, until=None):
    workdir.mkdir(parents=True, exist_ok=True)
    trainer = loop.Trainer(run, workdir, **job, evaluate=lambda _: {}, label="test")
    outcome = trainer.train(lambda: until is not None and trainer.counters.step >= until)
    return trainer, outcome


def rows_of(outcome):
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in outcome.rows]


@pytest.mark.slow
def test_a_rule_with_a_state_and_an_adaptive_beta_go_on_bit_for_bit(job, tmp_path):
    run = small_run(**{"selection.name": "beta_dpo"})
    whole, ended = train(job, tmp_path / "whole", run)
    assert float(whole.round.rule["margin_std"]) > 0 and float(whole.state.beta.margin_mean) != 0
    _, stopped = train(job, tmp_path / "parts", run, until=4)  # inside the second round of three
    assert not stopped.finished
    resumed, finished = train(job, tmp_path / "parts", run)
    assert finished.finished and resumed.round.number == 2
    jax.tree.map(np.testing.assert_array_equal, whole.state, resumed.state)
    jax.tree.map(np.testing.assert_array_equal, whole.memory, resumed.memory)
    jax.tree.map(np.testing.assert_array_equal, whole.round, resumed.round)
    assert rows_of(ended) == rows_of(finished)
    for path in sorted((tmp_path / "whole" / "selection").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / "selection" / path.name).read_bytes()
    betas = [row["selection/beta"] for row in ended.rows[:-1]]
    assert betas[0] == pytest.approx(0.5, abs=1e-4) and np.ptp(betas) > 1e-3
    assert "selection/margin_std" in ended.rows[6] and "selection/margin_std" not in ended.rows[7]


def next_round(job, run, memory, state=None, number=0, score_pool=None):
    run = config.settle_data(run, job["pairs"].columns)
    return rounds.next_round(
        number, memory, None, state, run=run, loss=setup.make_loss(run), pairs=job["pairs"],
        shape=job["passes"].shape, score_pool=score_pool,
    )  # fmt: skip


@pytest.fixture(scope="module")
def memory(job):
    """What is known of the pairs before training."""
    trainer = loop.Trainer(
        small_run(), pathlib.Path("unused"), **job, evaluate=lambda _: {}, label=""
    )
    return trainer.memory


@pytest.mark.parametrize("name", [name for name in rules.RULES if name != "uniform"])
def test_every_rule_makes_a_round_of_its_share_and_the_one_after(job, memory, name):
    column = "" if rules.RULES[name].column == "unused" else "loss"
    run = small_run(**{"selection.name": name, "selection.column": column})
    loss = setup.make_loss(run)
    pool_of = lambda known: lambda pool: rounds.remembered_scores(known, pool, loss, run)  # noqa: E731
    first, _ = next_round(job, run, memory, score_pool=pool_of(memory))
    moved = np.float32(np.random.default_rng(1).normal(size=120))
    trained = memory._replace(reward_margin=moved, trained=memory.trained + 1)
    second, drawn = next_round(job, run, trained, first.rule, 1, pool_of(trained))
    for round_ in (first, second):
        assert len(round_.pair_KB) == 3  # of 8; the longest pairs may close one of them early
        assert 23 <= (round_.pair_KB >= 0).sum() <= 24
    assert np.isfinite(drawn.priority_P).all() and set(drawn.selection.reason_P) == {
        "score",
        "rank",
    }
    rows = rounds.log_rows(second, drawn, job["pairs"].origin)
    lowest = min(row["priority"] for row in rows if row["selected"])
    assert all(row["priority"] <= lowest for row in rows if not row["selected"])


def test_easy_half_trains_the_easiest_pairs_of_the_column_from_easy_to_hard(job, memory):
    run = small_run(**{"selection.name": "easy_half", "selection.column": "loss"})
    round_, drawn = next_round(job, run, memory)
    easiest = np.sort(job["pairs"].columns["loss"][round_.pool_P])[:24]
    batches = [job["pairs"].columns["loss"][k[k >= 0]] for k in round_.pair_KB]
    assert len(batches) == 3 and drawn.pairs is None  # nothing was scored
    for k, batch in enumerate(batches):
        np.testing.assert_array_equal(np.sort(batch), easiest[8 * k : 8 * (k + 1)])


def test_easy_half_without_a_column_goes_by_the_margins_of_the_start(job, memory):
    run = small_run(**{"selection.name": "easy_half"})
    first, _ = next_round(job, run, memory)
    later = memory._replace(likelihood_margin=-memory.likelihood_margin)
    again, drawn = next_round(job, run, later, first.rule, number=1)
    start = memory.likelihood_margin[again.pool_P]
    assert start[drawn.selection.selected_P].min() >= start[~drawn.selection.selected_P].max()


def test_random_and_rules_that_go_by_a_column_alone_score_nothing(job):
    for changes in ({"name": "random"}, {"name": "implicit_gap", "column": "loss"}):
        run = small_run(**{f"selection.{k}": v for k, v in changes.items()})
        assert not config.needs_scores(run)
    run = small_run(**{"selection.name": "random", "selection.keep": 0.25})
    assert config.kept_share(run) == 0.25  # the share of the rule that it twins


def lowest_column(known, rng):
    return -known.column_P


rule = rules.Rule(
    lambda known, rng: rules.Ranked(-known.column_P, {"rounds": known.state["rounds"] + 1}),
    init=lambda known: {"rounds": len(known.pair_P)},
    needs_scores=False,
    column="required",
)


@pytest.mark.parametrize("name", ["lowest_column", "rule"])
def test_own_rule_chooses_by_the_column_it_is_given(job, memory, name):
    run = small_run(**{"selection.name": f"test_rule_runs:{name}", "selection.column": "loss"})
    assert config.needs_scores(run) == (name == "lowest_column")
    round_, drawn = next_round(job, run, memory)
    column = job["pairs"].columns["loss"][round_.pool_P]
    np.testing.assert_array_equal(drawn.selection.selected_P, column <= np.sort(column)[23])
    assert round_.rule == ({} if name == "lowest_column" else {"rounds": 121})  # 120 pairs, once


def test_a_column_that_is_missing_or_has_gaps_is_refused(job):
    run = small_run(**{"selection.name": "rho", "selection.column": "lost"})
    with pytest.raises(ValueError, match=r"column='lost' is no numeric column .*has .*loss"):
        rounds.rule_column(run, job["pairs"])
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4], "lost": 1},
            {"prompt_ids": [1, 5], "chosen_ids": [3], "rejected_ids": [4]}]  # fmt: skip
    pairs = encode.encode(records.read(rows), None, max_length=8)
    with pytest.raises(ValueError, match="1 of 2 pairs have no value"):
        rounds.rule_column(run, pairs)


def test_nothing_is_written_before_the_column_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path / "cache"))
    for mode in ("train", "score"):
        command = [mode, f"--config={ROOT / 'configs/quickstart.py'}",
                   f"--workdir={tmp_path / 'w'}",
                   "--config.selection.name=rho", "--config.selection.column=lost",
                   "--config.reference.path=package:sage_jax/assets/quickstart"]  # fmt: skip
        assert launcher.main(command) == 2
        assert "config.selection.column='lost'" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_scoring_by_reward_margins_asks_for_a_reference(tmp_path):
    run = small_run(**{"selection.name": "beta_dpo"})
    with pytest.raises(ValueError, match="'beta_dpo' reads reward margins"):
        scoring.score(run, tmp_path)
