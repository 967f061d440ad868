"""Settings: every bad value is named with its key, its rule and a way out."""

import pytest

from sage_jax import config


def test_defaults_resolve_to_the_declared_run_but_for_the_value_that_follows_the_selection():
    run = config.resolve(config.default())
    followed = {"curriculum.sharpness": -1.0, "selection.guard": ""}
    assert config.replace(run, **followed) == config.Run()
    uniform = config.resolve({"selection": {"name": "uniform"}})
    assert uniform.curriculum.sharpness == 0.0 and run.curriculum.sharpness == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"name": "sigmod"}}, r"config.loss.name='sigmod' .* 'sigmoid'"),
        ({"selection": {"name": "sagee"}}, r"sagee.*sage"),
        ({"optim": {"lr": 0.0}}, r"config.optim.lr=0.0 has to be above 0"),
        ({"optim": {"lr": "fast"}}, r"config.optim.lr='fast' is not a float"),
        ({"train": {"steps": 1.5}}, r"config.train.steps=1.5 is not an int"),
        ({"data": {"packing": 1}}, r"config.data.packing=1 is not a bool"),
        ({"selection": {"keep": 0.0}}, r"config.selection.keep=0.0 has to be in \(0, 1\]"),
        ({"selection": {"keep": 1.1}}, r"config.selection.keep=1.1 has to be in \(0, 1\]"),
        ({"optimm": {"lr": 1.0}}, r"config.optimm.lr is not .* nearest is config.optim.lr"),
        ({"curriculum": {"pool_size": 100}}, r"keeps 50.0 pairs of a pool of 100.*size to 256"),
        ({"loss": {"name": "ipo", "label_smoothing": 0.1}}, r"label_smoothing=0.1 does nothing"),
        ({"loss": {"gamma": 1.0}}, r"config.loss.gamma=1.0 does nothing for loss.name='sigmoid'"),
        ({"selection": {"name": "uniform", "soft": 1.0}}, r"selection.soft=1.0 weighs .* by score"),
        ({"selection": {"refresh": 1.5}}, r"config.selection.refresh=1.5 has to be in \[0, 1\]"),
        ({"selection": {"refresh": 0.5, "name": "random"}}, r"which selection.name='random' does"),
        ({"selection": {"scoring_dtype": "bfloat16"}}, r"with selection.refresh=0 there is none"),
        ({"selection": {"scoring_tokens": 8}}, r"with selection.refresh=0 there is none"),
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
    import pathlib

    root = pathlib.Path(config.__file__).parent
    source = "\n".join(path.read_text() for path in root.rglob("*.py") if path.name != "config.py")
    for key in config.flatten(config.default()):
        section, _, name = key.rpartition(".")
        read = f".{name}" in source or (section == "optim" and "asdict(run.optim)" in source)
        assert read, f"config.{key} is read nowhere"


def test_a_resumed_run_may_change_housekeeping_but_not_the_objective():
    old = config.as_dict(config.Run())
    new = config.as_dict(config.replace(config.Run(), **{"loss.beta": 0.2, "checkpoint.every": 7}))
    assert config.changed_keys(old, new) == {"loss.beta": (0.1, 0.2)}
