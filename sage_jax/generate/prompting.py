"""Prompts as a model expects them: text, or the messages of a chat; and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Prompt = str | Sequence[dict[str, Any]]  # text, or the messages of a chat


def is_chat(tokenizer: Any) -> bool:
    """True for a tokenizer with a chat template: its model is asked by messages."""
    return getattr(tokenizer, "chat_template", None) is not None


def as_chat(text: Prompt, role: str = "user") -> list[dict[str, Any]]:
    """One message that holds the text; messages stay as they are.

    >>> as_chat("7+5=")
    [{'role': 'user', 'content': '7+5='}]
    """
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def ask(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of problems as the model expects them: a user's turn for a chat model."""
    return [as_chat(prompt) for prompt in prompts] if is_chat(tokenizer) else list(prompts)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of one prompt, see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts: texts as the tokenizer encodes them, messages by its chat template.

    Raises:
        ValueError: a prompt has no tokens.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    of_texts = iter(tokenizer(texts)["input_ids"] if texts else ())
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = next(of_texts)
        else:
            ids = tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        if not ids:
            raise ValueError(
                f"prompt={prompt!r} has no tokens; a completion needs something to follow."
            )
        found.append(list(ids))
    return found


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends a completion, from the model's spec and the tokenizer.

    Raises:
        ValueError: neither of them names one.
    """
    spec = getattr(model, "spec", None)
    ids = (
        getattr(spec, "eos_id", None),
        tokenizer.eos_token_id,
        *getattr(spec, "other_eos_ids", ()),
    )
    found = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not found:
        raise ValueError(
            "Neither the model nor the tokenizer names an end-of-sequence token; set the "
            "tokenizer's eos_token."
        )
    return found
