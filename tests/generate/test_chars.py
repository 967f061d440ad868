import pytest

from sage_jax.generate import chars


def test_a_written_tokenizer_loads_and_round_trips(tmp_path):
    import transformers

    chars.write(tmp_path, "0123456789+-*=")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in tmp_path.iterdir()}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "7+5-9*2=7+5=12-9=3*2=6"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == text


def test_ids_of_special_tokens_are_fixed_and_none_is_inserted():
    tokenizer = chars.build("ab c\n")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("ab c\n")["input_ids"] == [4, 5, 6, 7, 8]
    assert tokenizer("a?")["input_ids"] == [4, tokenizer.unk_token_id]
    assert tokenizer.decode([4, 6, 5]) == "a b"
    assert tokenizer("a<eos>")["input_ids"] == [4, 2]


def test_an_empty_alphabet_is_an_error():
    with pytest.raises(ValueError, match="every character"):
        chars.build("")
