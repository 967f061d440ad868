"""The doctor counts what was planted."""

import json
import pathlib

import sage_jax
from sage_jax.data import doctor, encode, records

ROW = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


def examine(rows, tokenizer, max_length=16):
    found = records.read(rows, on_bad_row="skip")
    return doctor.report(found, encode.encode(found, tokenizer, max_length=max_length))


def test_every_planted_defect_is_counted_and_named(tokenizer):
    rows = [
        ROW,
        {**ROW, "level": 2},  # repeats the first
        {**ROW, "chosen": "5", "rejected": "4"},  # contradicts both
        {**ROW, "rejected": "4"},  # the same on both sides
        {**ROW, "prompt": "3+1=", "rejected": ""},  # an empty answer
        {**ROW, "rejected": "5" * 20},  # cut
        {**ROW, "prompt": "1+" * 20},  # dropped
        {"prompt": "x", "nonsense": [1]},  # skipped
    ]
    report, text = examine(rows, tokenizer)
    expected = {
        "rows": 7,
        "pairs": 6,
        "duplicates": 1,
        "contradictory": 3,
        "identical_sides": 1,
        "empty_answers": 1,
        "distinct_prompts": 2,
        "cut": {"rejected": 1},
        "dropped": {"prompt reaches max_length": 1},
        "skipped": {"missing columns": 1},
        "supervised": 0,
        "boundary_merges": 0,
    }
    assert {name: report[name] for name in expected} == expected
    assert report["columns"]["level"] == {"missing": 5, "min": 2.0, "mean": 2.0, "max": 2.0}
    assert len(report["warnings"]) == 7
    assert all(f"warning: {line}" in text for line in report["warnings"])
    json.dumps(report)


def test_lengths_are_those_of_the_tokens(tokenizer):
    report, _ = examine([ROW] * 3, tokenizer)
    quantiles = report["length_quantiles"]
    assert quantiles["prompt"] == [4.0] * 5
    assert quantiles["chosen"] == [2.0] * 5  # the answer and EOS
    assert quantiles["pair"] == [12.0] * 5


def test_a_length_bias_is_pointed_out(tokenizer):
    rows = [{**ROW, "prompt": f"{i}=", "chosen": "because"} for i in range(60)]
    report, text = examine(rows, tokenizer)
    assert report["chosen_longer"] == 1.0
    assert "longer one in 100% of pairs" in text


def test_a_clean_file_has_no_warnings(tokenizer):
    rows = [{**ROW, "prompt": f"{i}="} for i in range(4)]
    report, text = examine(rows, tokenizer)
    assert report["warnings"] == [] and text.endswith("no warnings")


def test_the_arithmetic_pairs_of_a_real_model_are_all_usable(tokenizer):
    file = pathlib.Path(sage_jax.__file__).parent / "assets/smollm2_arithmetic_pairs.jsonl"
    report, _ = examine(file, tokenizer, max_length=512)
    assert report["pairs"] == report["rows"] == report["conversational"] == 150
    assert report["skipped"] == report["ignored_columns"] == report["dropped"] == {}
    assert report["columns"]["pass_rate"]["missing"] == 0
