"""Reading rows: every format gives the same record, and a bad row is named."""

import json

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from sage_jax.data import canonical, formats, records

USER = {"role": "user", "content": "2+2?"}
RIGHT = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Add."}

CHATS = {  # one pair, as everybody writes it
    "explicit": {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
    "implicit": {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    "explicit, full chats": {"prompt": [USER], "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    "string beside full chats": {
        "prompt": "something else",
        "chosen": [USER, RIGHT],
        "rejected": [USER, WRONG],
    },
    "string beside answers": {"prompt": "2+2?", "chosen": [RIGHT], "rejected": [WRONG]},
    "chat beside strings": {"prompt": [USER], "chosen": "4", "rejected": "5"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "nemo": {
        "context": [USER],
        "completions": [{"rank": 1, "completion": [WRONG]}, {"rank": 0, "completion": [RIGHT]}],
    },
    "alpaca": {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
    "intel": {"question": "2+2?", "system": "", "chosen": "4", "rejected": "5"},
    "argilla": {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"},
    "tunix": {
        "prompts": [USER],
        "chosen_responses": [RIGHT],
        "rejected_responses": [WRONG],
    },
}


@pytest.mark.parametrize("name", CHATS)
def test_every_conversational_format_gives_the_same_record(name):
    record = records.read([CHATS[name]]).rows[0]
    assert (record.prompt, record.chosen, record.rejected) == ([USER], [RIGHT], [WRONG])
    assert record.conversational


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"chosen": "2+2=4", "rejected": "2+2=5"},
        {"prompts": "2+2=", "chosen_responses": "4", "rejected_responses": "5"},
        {
            "context": "2+2=",
            "completions": [{"rank": 0, "completion": "4"}, {"rank": 3, "completion": "5"}],
        },
    ],
)
def test_every_standard_format_gives_the_same_record(row):
    record = records.read([row]).rows[0]
    assert (record.prompt, record.chosen, record.rejected) == ("2+2=", "4", "5")
    assert not record.conversational


def test_a_system_text_and_an_input_join_the_prompt():
    intel = {"system": "Add.", "question": "2+2?", "chosen": "4", "rejected": "5"}
    assert records.read([intel]).rows[0].prompt == [SYSTEM, USER]
    alpaca = {"instruction": "Add.", "input": "2+2?", "chosen": "4", "rejected": "5"}
    assert records.read([alpaca]).rows[0].prompt == [{"role": "user", "content": "Add.\n2+2?"}]


def test_supervised_rows_have_no_rejected_side():
    rows = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": [USER], "completion": [RIGHT]},
        {"messages": [SYSTEM, USER, RIGHT]},
    ]
    plain, chat, messages = records.read(rows).rows
    assert (plain.prompt, plain.chosen, plain.rejected) == ("2+2=", "4", None)
    assert (chat.prompt, chat.chosen, chat.rejected) == ([USER], [RIGHT], None)
    assert (messages.prompt, messages.chosen, messages.rejected) == ([SYSTEM, USER], [RIGHT], None)


def test_pretokenised_rows_keep_ids_and_log_probabilities():
    ids = {"prompt_ids": [1, 2], "chosen_ids": np.array([3]), "rejected_ids": [4, 5]}
    plain, scored = records.read(
        [ids, {**ids, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}]
    ).rows
    assert plain.ids == ([1, 2], [3], [4, 5], None)
    assert scored.ids.ref_logps == (-1.5, -2.0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "split"),
    [  # by hand, from the rule: longest common prefix, the space goes to the completions
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("aXb", "aYb", ("a", "Xb", "Yb")),
        ("abc", "abcd", ("ab", "c", "cd")),
        ("same", "same", ("sam", "e", "e")),
        ("a", "b", ("", "a", "b")),
    ],
)
def test_implicit_prompt_of_strings(chosen, rejected, split):
    assert canonical.split_text(chosen, rejected) == split


@hypothesis.given(st.text("ab ", min_size=1), st.text("ab ", min_size=1), st.text("ab "))
def test_implicit_prompt_loses_no_text_and_leaves_no_side_empty(left, right, shared):
    chosen, rejected = shared + left, shared + right
    prompt, a, b = canonical.split_text(chosen, rejected)
    assert (prompt + a, prompt + b) == (chosen, rejected)
    assert a and b
    if a[0] == b[0] and min(len(a), len(b)) > 1:  # more is shared: only a space before the split
        assert a[0] == " " and a[1] != b[1]


def test_implicit_prompt_of_chats_is_the_shared_turns():
    more = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]
    row = {"chosen": [USER, RIGHT, *more], "rejected": [USER, RIGHT, more[0], WRONG]}
    record = records.read([row]).rows[0]
    assert record.prompt == [USER, RIGHT, more[0]]
    assert (record.chosen, record.rejected) == ([more[1]], [WRONG])


def test_extra_columns_are_kept_or_counted():
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [{**row, "level": 3, "task": "sum", "note": "x", "nested": [1]}, {**row, "note": None}]
    found = records.read(rows)
    assert found.rows[0].columns == {"level": 3.0}
    assert found.rows[0].texts == {"task": "sum"}
    assert found.ignored_columns == {"note": 1, "nested": 1}
    beside = records.read([CHATS["string beside full chats"]])
    assert beside.ignored_columns == {"prompt": 1}
    alone = records.read([{**json.loads(f"{{{IDS}}}"), "ref_chosen_logps": -1.0}])
    assert alone.rows[0].ids.ref_logps is None
    assert alone.rows[0].columns == {"ref_chosen_logps": -1.0}


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
IDS = '"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]'
BAD = [
    ('{"prompt": "a", "chosen": "b"', "not valid JSON"),
    ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
    ('{"prompt": "a", "chosen": 5, "rejected": "b"}', "'chosen' is int 5, expected"),
    ('["a", "b"]', "list, expected an object"),
    ('{"chosen": "", "rejected": "b"}', "a side is empty"),
    ('{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "b"}', "chosen[0]['content']"),
    ('{"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}', "no 'prompt'"),
    ('{"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}', "'prompt_ids' is list []"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "tools": "{"}', "'tools' is not valid JSON"),
    (
        json.dumps({"chosen": [USER, RIGHT, USER], "rejected": [USER, RIGHT, WRONG]}),
        "begins with a turn of role 'user', expected 'assistant'",
    ),
    (
        json.dumps({"context": "a", "completions": [{"rank": 0, "completion": "b"}] * 2}),
        "all ranks are 0",
    ),
    (
        json.dumps({"context": "a", "completions": [{"rank": r, "completion": r} for r in "12"]}),
        "'rank' is str '1', expected a number",
    ),
    (
        json.dumps(
            {"context": "a", "completions": [{"rank": r, "completion": "b"} for r in (1, None)]}
        ),
        "'rank' is missing, expected a number",
    ),
    (f'{{{GOOD[1:-1]}, "level": 1{"0" * 400}}}', "'level' is int 1000"),
    (f'{{{GOOD[1:-1]}, "answer": "\\ud83d"}}', "'answer' has '\\ud83d' at character 0"),
    (GOOD.replace("b", "so\\ud83d"), "'chosen' has '\\ud83d' at character 2"),
    (
        json.dumps({"prompt": "a", "chosen": [{**RIGHT, "content": "\ud83d"}], "rejected": "b"}),
        "'chosen' has '\\ud83d' at character 0",
    ),
    (f'{{{IDS}, "ref_chosen_logps": "-1", "ref_rejected_logps": -2}}', "'ref_chosen_logps' is str"),
    (f'{{{IDS}, "ref_chosen_logps": -1, "ref_rejected_logps": [2]}}', "'ref_rejected_logps' is"),
    (f'{{{IDS}, "ref_chosen_logps": -Infinity, "ref_rejected_logps": -2}}', "a finite number"),
    (
        '{"conversations": [{"from": ["human"], "value": "a"}], "chosen": "b", "rejected": "c"}',
        "conversations[0]['role']' is list",
    ),
    ("[" * 100_000 + "]" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError) as error:
        records.read(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert message in str(error.value)
    skipped = records.read(file, on_bad_row="skip")
    assert [row.origin for row in skipped.rows] == [f"{file}:1", f"{file}:4"]
    assert sum(skipped.skipped.values()) == 1
    assert message in skipped.examples[0]


def test_a_file_without_a_good_row_is_an_error_even_when_skipping(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="no usable row"):
        records.read(file, on_bad_row="skip")


def test_jsonl_json_parquet_directory_and_dicts_give_the_same_rows(tmp_path):
    rows = [CHATS["explicit"] | {"level": i} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, rows)))  # lines in a .json file
    (tmp_path / "readme.txt").write_text("not data")

    def contents(source):
        return [(r.prompt, r.chosen, r.rejected, r.columns) for r in records.read(source).rows]

    expected = contents(rows)
    for name in ("a.jsonl", "b.json", "c.parquet", "d.json"):
        assert contents(tmp_path / name) == expected
    assert contents(tmp_path) == expected * 4
    assert contents([tmp_path / "a.jsonl", str(tmp_path / "c.parquet")]) == expected * 2


def test_json_arrays_name_the_line_a_row_begins_on(tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(f'[\n  {GOOD},\n\n  {{\n"prompt": "a"}}\n]')
    with pytest.raises(ValueError, match=r"pairs\.json:4: "):
        records.read(file)


def test_a_dict_is_no_list_of_rows():
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    for source in (row, {name: [text] for name, text in row.items()}):
        with pytest.raises(ValueError, match=r"one dict, with 'prompt', .* give a list of rows"):
            records.read(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("pairs.csv", "a", "suffix '.csv'"),
        ("pairs.json", "[1", "expected a JSON array"),
        ("pairs.json", '{\n"data": [\n]}', r"pairs\.json:1: column 'prompt' .*\['data'\]"),
        ("empty.jsonl", "", r"empty\.jsonl' holds no usable row; expected"),
        ("pairs.parquet", "x", "not a Parquet file"),
    ],
)
def test_a_wrong_source_is_one_clear_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / name)


def test_an_empty_directory_and_unknown_options_are_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no file"):
        records.read(tmp_path)
    with pytest.raises(ValueError, match="expected one of auto"):
        records.read([{}], format="jsonl")
    with pytest.raises(ValueError, match="expected 'error' or 'skip'"):
        records.read([{}], on_bad_row="warn")


def test_a_format_asked_for_by_name_refuses_other_rows():
    row = {"prompt": "2+2=", "completion": "4"}
    assert records.read([row], format="completion").rows
    with pytest.raises(ValueError, match="format 'intel'"):
        records.read([row], format="intel")


def test_the_table_lists_every_format_once():
    assert list(formats.FORMATS)[:2] == ["ids", "explicit"]
    assert len({f.needs for f in formats.FORMATS.values()}) == len(formats.FORMATS)


def test_fingerprint_without_parsing_equals_that_of_reading(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(GOOD)
    before = records.fingerprint(file)
    assert before == records.read(file).fingerprint
    file.write_text(GOOD.replace('"c"', '"d"'))
    assert records.fingerprint(file) != before
    assert records.fingerprint([{"a": 1}]) != records.fingerprint([{"a": 2}])


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"foo": 3}, "prompt, chosen, rejected"),
        ({"prompt": "a", "chosen": "b"}, r"'rejected' is missing.*prompt, chosen, rejected"),
        ({"instruction": "a", "chosen": "b"}, r"'rejected' is missing.*instruction, chosen"),
    ],
)
def test_a_row_without_a_format_is_told_of_the_one_it_is_nearest_to(row, named):
    with pytest.raises(ValueError, match=named):
        records.read([row])
