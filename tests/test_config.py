"""Settings: every bad value is named with its key, its rule and a way out."""

import pytest

from sage_jax import config


def test_defaults_resolve_to_the_declared_run_but_for_the_value_that_follows_the_selection():
    run = config.resolve(config.default())
    assert config.replace(run, **{"curriculum.sharpness": -1.0}) == config.Run()
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
        ({"loss": {"name": "sft"}}, r"needs pairs, and loss.name='sft'"),
        ({"model": {"heads": 5}}, r"config.model.heads=5 has to divide"),
        ({"mesh": {"data": 0}}, r"config.mesh.data=0"),
        ({"curriculum": {"sharpness": -0.5}}, r"config.curriculum.sharpness=-0.5"),
    ],
)
def test_bad_values_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        config.resolve(changes)


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
