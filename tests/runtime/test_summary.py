"""summary.json and the closing tables: every cost by its name, and sums of what they say."""

import pytest

from sage_jax.runtime import counters, loop, summary


def outcome(warnings=(), accuracy=0.5, **spent):
    rows = [
        {"step": 0, "eval_accuracy": 0.25, "eval_accuracy_low": 0.2, "eval_accuracy_high": 0.3},
        {"step": 9, "eval_accuracy": accuracy, "eval_accuracy_low": 0.4, "eval_accuracy_high": 0.6,
         "eval_kl": 3.5, "eval_kl_per_token": 0.07},
    ]  # fmt: skip
    return loop.Outcome(None, counters.Counters(**spent), True, rows, tuple(warnings), 0.0)


@pytest.fixture
def found():
    mine = outcome(
        ["Step 7: they fall."], step=9, pairs=72, flops_scoring=2e9, flops_training=12e9,
        flops_reference=5e9, pairs_reference=40, seconds_reference=1.5, seconds_drawing=0.5,
        seconds_scoring=0.25, seconds_training=4.0, seconds_compiling=6.0,
    )  # fmt: skip
    twins = {
        "uniform": outcome(accuracy=0.4, step=10, pairs=80, flops_training=14e9,
                           seconds_training=5.0),
        "random": outcome(["Step 3: far."], accuracy=0.3, step=11, pairs=88, flops_training=14e9,
                          seconds_training=5.5),
    }  # fmt: skip
    return summary.make(mine, twins, 33.3, "sage", 40)


def test_the_summary_names_every_cost_of_the_run_and_of_its_twins(found):
    assert found["flops_reference"] == 5e9 and found["seconds_reference"] == 1.5
    for name, value in {"scoring": 0.25, "training": 4.0, "drawing": 0.5, "compiling": 6.0}.items():
        assert found[f"seconds_{name}"] == value
    assert (found["flops_scoring"], found["flops_training"]) == (2e9, 12e9)
    assert found["flops_training_uniform"] == found["flops_training_random"] == 14e9
    assert (found["accuracy_after"], found["accuracy_uniform"], found["accuracy_random"]) == (
        0.5, 0.4, 0.3,
    )  # fmt: skip
    assert found["warnings"] == ["Step 7: they fall."] and found["warnings_uniform"] == []
    assert found["warnings_random"] == ["Step 3: far."]
    assert found["eval_kl_per_token"] == 0.07


def test_the_closing_tables_show_sums_and_parts_and_repeat_warnings(found, tmp_path, capsys):
    summary.show(found, tmp_path)
    text = capsys.readouterr().out
    cells = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert cells["after SAGE"][-4:] == ["9", "72", "14.0", "4"]
    assert cells["after uniform DPO, equal FLOPs"][-4:] == ["10", "80", "14.0", "5"]
    assert cells["SAGE"][1:] == ["0.2", "(2.0)", "4.0", "(12.0)", "0.5", "6.0"]
    assert cells["random, equal FLOPs"][3:] == ["0.0", "(0.0)", "5.5", "(14.0)", "0.0", "0.0"]
    assert "40 pairs computed in 1.5 seconds, 5.0 GFLOPs." in text
    assert "Warning (sage). Step 7: they fall." in text
    assert "Warning (random). Step 3: far." in text
    assert text.index("SAGE") < text.index("Warning")


@pytest.mark.parametrize(
    ("count", "words"), [(0, "all known already, 0 GFLOPs"), (4, "the others were known already")]
)
def test_values_from_the_store_are_said_to_cost_nothing(found, count, words):
    assert words in summary.reference_text(found | {"pairs_reference": count})
