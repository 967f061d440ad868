"""A character-level tokenizer for the procedural tasks, in Hugging Face's format."""

from __future__ import annotations

import pathlib
from typing import Any

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"  # ids 0, 1, 2, 3


def build(alphabet: str) -> Any:
    """A `transformers.PreTrainedTokenizerFast` with one token for each character.

    No token is ever added by itself: prompts start with their first character (there is a `<bos>`
    id, as configs expect one, but it is not inserted), and whoever encodes completions appends
    `<eos>`. Other characters become `<unk>`.

    Args:
        alphabet: the characters; ids follow their order, from 4. Repeated ones count once.

    >>> tokenizer = build("0123456789+-*=")
    >>> tokenizer("1+2=")["input_ids"], tokenizer.decode([5, 14, 6, 17, 7, 2])
    ([5, 14, 6, 17], '1+2=3<eos>')
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    if not alphabet:
        raise ValueError("alphabet='' has no characters; give every character of the task's texts.")
    vocabulary = [PAD, BOS, EOS, UNKNOWN, *dict.fromkeys(alphabet)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def write(directory: str | pathlib.Path, alphabet: str) -> None:
    """Writes the tokenizer of `alphabet` to a directory: tokenizer.json, tokenizer_config.json."""
    build(alphabet).save_pretrained(directory)
