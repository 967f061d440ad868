"""Settings: every bad value is named with its key, its rule and a way out."""

import pathlib

import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config

ROOT = pathlib.Path(__file__).resolve().parents[1]


# What is left to the selection, as it is declared: sharpness, guard, pool size, refresh.
FOLLOWS = {
    "curriculum.sharpness": -1.0, "selection.guard": "", "curriculum.pool_size": -1,
    "selection.refresh": -1.0,
}  # fmt: skip


def followed(**changes):
    run = config.replace(config.Run(), **changes)
    flat = config.flatten(config.as_dict(config.resolve(config.as_dict(run))))
    return [flat[key] for key in FOLLOWS]


def test_defaults_resolve_to_the_declared_run_but_for_what_follows_the_selection():
    run = config.resolve(config.default())
    assert config.replace(run, **FOLLOWS) == config.Run()
    chosen = run.selection
    assert (chosen.name, chosen.keep, chosen.uniform_share) == ("sage", -1.0, -1.0)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, [1.0, "auto", 16 * 128, 0.125]),
        ({"train.batch_pairs": 8}, [1.0, "auto", 16 * 8, 0.125]),
        ({"selection.name": "gradient"}, [1.0, "auto", 16 * 128, 0.125]),
        # Rules that read no scores gain nothing from short rounds; plain DPO knows no curriculum.
        ({"selection.name": "uniform"}, [0.0, "off", 0, 0.0]),
        ({"selection.name": "random"}, [1.0, "auto", 0, 0.0]),
        ({"selection.name": "max_curvature"}, [1.0, "auto", 16 * 128, 0.125]),
        ({"selection.name": "easy_half"}, [1.0, "auto", 0, 0.0]),
    ],
)
def test_settings_that_are_left_to_the_selection_follow_it(changes, found):
    assert followed(**changes) == found


@pytest.mark.parametrize("name", ["sage", "random", "uniform"])
def test_a_value_that_is_given_wins_over_what_the_selection_would_take(name):
    given = {"curriculum.sharpness": 0.5, "selection.guard": "suspects",
             "curriculum.pool_size": 700, "selection.refresh": 0.0}  # fmt: skip
    assert followed(**given, **{"selection.name": name}) == list(given.values())
    assert followed(**given | {"curriculum.pool_size": 0})[2] == 0  # the whole data set, asked for
    assert followed(**given | {"selection.refresh": 1.0})[3] == 1.0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_turns_into_plain_dpo_by_one_setting(path):
    words = ["train", f"--config={path}", "--config.selection.name=uniform"]
    run = config.resolve(launcher.parse(words)[1])
    assert config.kept_share(run) == 1.0 and run.selection.guard == "off"
    assert not config.needs_scores(run) and run.selection.refresh == 0.0
    assert run.curriculum.sharpness == 0.0
    assert not run.compare.uniform  # it would be its own twin
    # Where new pairs are sampled between rounds, a pool says how long these are.
    assert (run.curriculum.pool_size == 0) == (run.rounds.resample == 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"name": "sigmod"}}, r"config.loss.name='sigmod' .* 'sigmoid'"),
        ({"selection": {"name": "sagee"}}, r"sagee.*sage"),
        ({"optim": {"lr": 0.0}}, r"config.optim.lr=0.0 has to be above 0"),
        ({"optim": {"lr": "fast"}}, r"config.optim.lr='fast' is not a float"),
        ({"train": {"steps": 1.5}}, r"config.train.steps=1.5 is not an int"),
        ({"data": {"packing": 1}}, r"config.data.packing=1 is not a bool"),
        ({"selection": {"keep": 0.0}}, r"config.selection.keep=0.0 has to be in \(0, 1\], or -1"),
        (
            {"selection": {"uniform_share": -0.5}},
            r"uniform_share=-0.5 has to be in \[0, 1\], or -1",
        ),
        ({"selection": {"keep": 1.1}}, r"config.selection.keep=1.1 has to be in \(0, 1\]"),
        ({"optimm": {"lr": 1.0}}, r"config.optimm.lr is not .* nearest is config.optim.lr"),
        ({"curriculum": {"pool_size": 100}}, r"keeps 33.0 pairs of a pool of 100.*size to 388"),
        ({"loss": {"name": "ipo", "label_smoothing": 0.1}}, r"label_smoothing=0.1 does nothing"),
        ({"loss": {"gamma": 1.0}}, r"config.loss.gamma=1.0 does nothing for loss.name='sigmoid'"),
        ({"selection": {"name": "uniform", "soft": 1.0}}, r"selection.soft=1.0 weighs .* by score"),
        ({"selection": {"kappa": -0.5}}, r"config.selection.kappa=-0.5 has to be 0 or more, or -1"),
        ({"selection": {"refresh": 1.5}}, r"config.selection.refresh=1.5 has to be in \[0, 1\]"),
        ({"selection": {"refresh": 0.5, "name": "random"}}, r"which selection.name='random' does"),
        ({"selection": {"refresh": 0, "scoring_dtype": "bfloat16"}}, r"refresh=0 there is none"),
        ({"selection": {"name": "random", "scoring_dtype": "bfloat16"}}, r"refresh=0 there is no"),
        ({"selection": {"refresh": 0, "scoring_tokens": 8}}, r"refresh=0 there is none"),
        ({"selection": {"scoring_tokens": 8}}, r"first tokens.*refresh=1"),
        ({"selection": {"refresh": -0.5}}, r"config.selection.refresh=-0.5 has to be in \[0, 1\]"),
        ({"curriculum": {"pool_size": -2}}, r"config.curriculum.pool_size=-2 has to be 0 or more"),
        ({"selection": {"refresh": 1, "scoring_dtype": "float16"}}, r"scoring_dtype='float16'"),
        ({"selection": {"refresh": 0.5, "scoring_tokens": 8}}, r"first tokens.*refresh=1"),
        ({"selection": {"refresh": 1, "scoring_tokens": 8, "stability": "rounds"}}, r"'rounds'"),
        ({"selection": {"refresh": 1, "scoring_tokens": 8, "margin": "reward"}}, r"no reward mar"),
        ({"selection": {"refresh": 1, "scoring_tokens": 8, "name": "beta_dpo"}}, r"'beta_dpo'"),
        ({"loss": {"name": "sft"}}, r"needs pairs, and loss.name='sft'"),
        ({"model": {"heads": 5}}, r"config.model.heads=5 has to divide"),
        ({"mesh": {"data": 0}}, r"config.mesh.data=0"),
        ({"curriculum": {"sharpness": -0.5}}, r"config.curriculum.sharpness=-0.5"),
        ({"selection": {"column": "level"}}, r"column='level' does nothing .*'sage'.*easy_half"),
        ({"selection": {"name": "random", "column": "x"}}, r"column='x' does nothing"),
        ({"selection": {"name": "rho"}}, r"column='' names no data column.*'rho'"),
        ({"selection": {"name": "dual_margin"}}, r"column='' names no data column"),
        (
            {"selection": {"name": "beta_dpo"}, "loss": {"name": "ipo"}},
            r"'ipo'.*Use one of sigmoid",
        ),
        ({"selection": {"name": "beta_dpo"}, "train": {"accumulate": 2}}, r"accumulate=2 cuts"),
    ],
)
def test_bad_values_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        config.resolve(changes)


def test_rules_read_a_column_where_they_can_and_do_without_where_they_may():
    for name in ("implicit_gap", "easy_half"):
        for column in ("", "loss"):
            config.resolve({"selection": {"name": name, "column": column}})
    for name in ("dual_margin", "rho"):
        config.resolve({"selection": {"name": name, "column": "loss"}})


def test_a_config_that_tunes_the_selection_runs_as_its_uniform_baseline():
    tuned = {"keep": 0.3, "uniform_share": 0.1, "kappa": 4.0, "damping": 0.5, "margin": "reward"}
    run = config.resolve({"selection": tuned | {"name": "uniform"}})
    assert config.kept_share(run) == 1.0 and not config.needs_scores(run)


def test_every_setting_is_described_with_its_default():
    text = config.describe()
    for key, value in config.flatten(config.default()).items():
        assert f"config.{key} = {value!r}" in text


def test_every_setting_is_read_by_something():
    """A key that no module reads is a promise that nobody keeps."""
    own = pathlib.Path(config.__file__).parent
    others = [path for path in own.parent.rglob("*.py") if path.parent != own]
    source = "\n".join(path.read_text() for path in others)
    for key in config.flatten(config.default()):
        section, _, name = key.rpartition(".")
        read = f".{name}" in source or (section == "optim" and "asdict(run.optim)" in source)
        assert read, f"config.{key} is read nowhere"


def test_a_resumed_run_may_change_housekeeping_but_not_the_objective():
    old = config.as_dict(config.Run())
    new = config.as_dict(config.replace(config.Run(), **{"loss.beta": 0.2, "checkpoint.every": 7}))
    assert config.changed_keys(old, new) == {"loss.beta": (0.1, 0.2)}


def test_doubt_counts_where_the_policy_itself_wrote_the_pairs():
    rates = {"pass_rate": np.array([0.5, 0.125])}
    gaps = {"pass_rate": np.array([0.5, np.nan])}  # merged with pairs from elsewhere
    assert config.settle_data(config.resolve({}), rates).selection.kappa == 2.0
    assert config.settle_data(config.resolve({}), gaps).selection.kappa == 0.0
    told = config.resolve({"selection": {"kappa": 1.0, "keep": 0.2, "uniform_share": 0.1}})
    told = config.replace(told, **{"selection.margin": "reward"})
    assert config.settle_data(told, rates) == told


def test_a_policy_that_knows_little_is_ranked_by_reward_margins():
    def found(columns, loss="sigmoid", **selection):
        given = {"selection": selection, "loss": {"name": loss}}
        return config.settle_data(config.resolve(given), columns).selection.margin

    little = {"pass_rate": np.array([0.25, 0.125, 0.5])}
    assert found(little) == "reward"
    assert found({"pass_rate": np.array([0.25, 0.375])}) == "likelihood"  # it knows enough
    assert found({}) == found({"pass_rate": np.array([0.1, np.nan])}) == "likelihood"
    # What is said stays; other rules, and losses without a reference, are as they were published.
    assert found(little, margin="likelihood") == found(little, name="hard_first") == "likelihood"
    assert found(little, loss="simpo") == found(little, length_normalised=True) == "likelihood"
    assert found({"pass_rate": np.array([0.9])}, margin="reward") == "reward"


def test_of_pairs_of_other_writers_most_are_kept_and_half_of_them_by_chance():
    rates = {"pass_rate": np.array([0.5, 0.125])}

    def found(columns, **selection):
        chosen = config.settle_data(config.resolve({"selection": selection}), columns).selection
        return chosen.keep, chosen.uniform_share

    assert found(rates) == (0.33, 0.0)
    assert found({}) == found({}, name="random") == (0.75, 0.5)
    assert found({}, name="gradient") == (0.33, 0.0)  # a published rule keeps what it ranks highest
    assert found({}, keep=0.2) == (0.2, 0.5)  # one that is set stays
