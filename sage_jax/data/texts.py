"""From the texts of a row to token ids: template, special tokens, and where the completion begins.

One text is tokenised for each side, prompt and completion together, so no BOS can slip in between.
The completion begins where the tokens of the prompt alone and of the whole text diverge, at the
smaller of both sides: a token that merges across the boundary then belongs to the completion of
both sides alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sage_jax.data import records


class Sides(NamedTuple):
    """One encoded row: ids of the sides, start of the completions, and whether tokens merged."""

    chosen: Sequence[int]
    rejected: Sequence[int] | None
    start: int
    lost: Sequence[int]  # end of the prompt that is not a prefix of the whole


def sides(rows: Sequence[records.Record], tokenizer: Any, append_eos: bool) -> Iterator[Sides]:
    """The encoded sides of each row; every distinct text is tokenised once."""
    texts = [None if row.ids else _render(row, tokenizer) for row in rows]
    ids: dict[bool, dict[str, list[int]]] = {}
    for special in (True, False):
        wanted = [
            text
            for row, side_texts in zip(rows, texts, strict=True)
            if side_texts is not None and row.conversational is not special
            for text in side_texts
            if text is not None
        ]
        ids[special] = _tokenize(tokenizer, wanted, special)
    for row, side_texts in zip(rows, texts, strict=True):
        if side_texts is None:
            assert row.ids is not None
            prompt = row.ids.prompt
            yield Sides(prompt + row.ids.chosen, prompt + row.ids.rejected, len(prompt), ())
            continue
        table = ids[not row.conversational]
        prompt, *whole = (table[text] for text in side_texts if text is not None)
        if append_eos and not row.conversational:
            whole = [_ended(side, tokenizer) for side in whole]
        start = min(_common_prefix(prompt, side) for side in whole)
        lost = prompt[start:]
        if start == 0:
            head = _first_token(tokenizer, row.origin)
            whole, start = [[head, *side] for side in whole], 1
        yield Sides(whole[0], whole[1] if len(whole) > 1 else None, start, lost)


def _render(row: records.Record, tokenizer: Any) -> tuple[str, str, str | None]:
    """The texts of the prompt alone, of the chosen and of the rejected sequence."""
    if not row.conversational:
        prompt = row.prompt
        rejected = None if row.rejected is None else prompt + row.rejected  # type: ignore[operator]
        return prompt, prompt + row.chosen, rejected  # type: ignore

    def render(turns: Any, **options: Any) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **row.template, **options)

    if not tokenizer.chat_template and "chat_template" not in row.template:
        raise ValueError(
            f"{row.origin}: the row is a chat and the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give prompt and completions as strings."
        )
    try:
        return (
            render(row.prompt, add_generation_prompt=True),
            render([*row.prompt, *row.chosen]),
            None if row.rejected is None else render([*row.prompt, *row.rejected]),
        )
    except Exception as e:  # templates raise errors of their own kinds
        raise ValueError(f"{row.origin}: the chat template refuses the row: {e}") from e


def _tokenize(tokenizer: Any, texts: Iterable[str], special: bool) -> dict[str, list[int]]:
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    encoded = tokenizer(
        unique, add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    return dict(zip(unique, encoded["input_ids"], strict=True))


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "The tokenizer has no EOS token to end completions with; set tokenizer.eos_token, or "
            "append_eos=False."
        )
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _first_token(tokenizer: Any, origin: str) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        f"{origin}: the prompt has no tokens and the tokenizer neither BOS nor EOS to put in its "
        "place; give the row a prompt."
    )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    ends = min(len(a), len(b))
    if a[:ends] == b[:ends]:  # the usual case, at the speed of C
        return ends
    return next(i for i in range(ends) if a[i] != b[i])
