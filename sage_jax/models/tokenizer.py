"""Tokenizers: from a Hugging Face directory, or rebuilt from a GGUF file's metadata."""

from __future__ import annotations

import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from sage_jax.models import gguf_reader, sources

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

# How text is cut before byte-pair merges, by GGUF's `tokenizer.ggml.pre`: the number of digits that
# stay together, and the regular expression (None: GPT-2's own).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, tuple[bool, str | None]] = {
    "default": (False, None),
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (False, _LLAMA3),
    "llama3": (False, _LLAMA3),
    "llama-v3": (False, _LLAMA3),
    "qwen2": (False, _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a model, chat template included.

    Args:
      path: a Hugging Face directory, a .gguf file, or `package:NAME[/INSIDE]`.

    Returns:
      A transformers tokenizer. No code that comes with the model is run.

    Raises:
      ValueError: if there is none, or a GGUF file's kind of tokenizer is not supported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is missing
    where = sources.resolve(path)
    if where.suffix == ".gguf":
        return _from_gguf(where)
    if not (where / "tokenizer.json").exists() and not (where / "tokenizer_config.json").exists():
        raise ValueError(
            f"{where} holds no tokenizer.json. Copy the tokenizer's files beside config.json."
        )
    import transformers

    if _is_generic(where):
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            str(where), local_files_only=True
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(where), local_files_only=True, trust_remote_code=False
    )
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise ValueError(
            f"{where}: {type(tokenizer).__name__} is not a fast tokenizer. Save the tokenizer with "
            f"its tokenizer.json."
        )
    return tokenizer


def _is_generic(where: pathlib.Path) -> bool:
    """Whether the files themselves name the class that reads tokenizer.json and nothing else.

    `AutoTokenizer` would find the same one, but only after it has imported every model's config,
    and with them torch where that is installed: seconds of every start.
    """
    file = where / "tokenizer_config.json"
    if not file.exists() or not (where / "tokenizer.json").exists():
        return False
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False  # transformers says what is wrong with it
    return fields.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in fields


def _from_gguf(file: pathlib.Path) -> PreTrainedTokenizerFast:
    import transformers

    _, fields = gguf_reader.metadata(file)
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    if "tokens" not in own:
        raise ValueError(f"{file} holds no tokenizer. Use the model's Hugging Face directory.")
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if own["model"] not in builders:
        raise ValueError(
            f"{file}: tokenizer.ggml.model={own['model']!r} is not supported. Supported are "
            f"{', '.join(sorted(builders))}."
        )
    backend = builders[own["model"]](file, own)
    tokens = own["tokens"]
    _mark_special(backend, tokens, own.get("token_type", []))
    special = {
        f"{name}_token": tokens[own[key]]
        for name, key in (
            ("bos", "bos_token_id"),
            ("eos", "eos_token_id"),
            ("unk", "unknown_token_id"),
            ("pad", "padding_token_id"),
        )
        if own.get(key) is not None
    }
    _add_ends(backend, own, special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(file: pathlib.Path, own: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-pair encoding over bytes, as in GPT-2, Llama 3, Qwen 2 and SmolLM."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    name = own.get("pre", "default")
    if name not in _CUTS:
        raise ValueError(
            f"{file}: tokenizer.ggml.pre={name!r} is not supported. Supported are "
            f"{', '.join(sorted(_CUTS))}."
        )
    single_digits, pattern = _CUTS[name]
    merges = [tuple(merge.split(" ")) for merge in own.get("merges", [])]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(own["tokens"])},
        merges=merges,
        ignore_merges=pattern is _LLAMA3,
    )
    backend = tokenizers.Tokenizer(model)
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    if pattern is not None:
        cuts.append(pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    space = bool(own.get("add_space_prefix", False))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentence_piece(file: pathlib.Path, own: dict[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback, as in Llama 1 and 2; merges follow from the scores."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(own["tokens"])}
    ranked = []
    for whole, i in vocab.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in vocab and right in vocab:
                ranked.append((-own["scores"][i], vocab[left], vocab[right], left, right))
    model = models.BPE(
        vocab=vocab,
        merges=[(left, right) for *_, left, right in sorted(ranked)],
        unk_token=own["tokens"][own.get("unknown_token_id", 0)],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    space = bool(own.get("add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def _mark_special(backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Control tokens are never split and can be skipped when decoding; added ones never split."""
    import tokenizers

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, its in zip(tokens, kinds, strict=False) if its == kind]
        added = [tokenizers.AddedToken(t, normalized=False, special=special) for t in found]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _add_ends(backend: tokenizers.Tokenizer, own: dict[str, Any], special: dict[str, str]) -> None:
    """Adds the begin and end tokens that the file asks for around every text."""
    from tokenizers import processors

    llama = own["model"] == "llama"  # llama.cpp's default when the file does not say
    parts = ["$A"]
    ids = []
    for name, wanted in (
        ("bos", own.get("add_bos_token", llama)),
        ("eos", own.get("add_eos_token", False)),
    ):
        token = special.get(f"{name}_token")
        if wanted and token is not None:
            parts = [token, *parts] if name == "bos" else [*parts, token]
            ids.append((token, own[f"{name}_token_id"]))
    if ids:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(parts), special_tokens=ids
        )
    elif own["model"] == "gpt2":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
