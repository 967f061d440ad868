"""One row in canonical form: a prompt and two sides, as strings or as turns of a chat.

Here live the rules that find the prompt where a row does not name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Turns = list[dict[str, Any]]
Text = str | Turns

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}


class BadRowError(ValueError):
    """A row that no pair can be made of; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Ids(NamedTuple):
    """A pre-tokenised row; the completions do not repeat the prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    ref_logps: tuple[float, float] | None  # nats, summed over the completion tokens


class Pair(NamedTuple):
    """One row in canonical form; `rejected` is None for a supervised example."""

    prompt: Text
    chosen: Text
    rejected: Text | None
    ids: Ids | None = None
    unused: tuple[str, ...] = ()  # columns of the format that this row made no use of


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits two full texts into their shared prompt and the two completions.

    The prompt is the longest common prefix of characters. A space just before the split goes to
    the completions, and if one text is a prefix of the other, its last character stays in the
    completion, so that no completion is empty.

    Args:
      chosen: prompt and chosen completion as one text.
      rejected: prompt and rejected completion as one text.

    Returns:
      prompt, chosen completion, rejected completion.

    Raises:
      BadRowError: if either text is empty.

    Source: the implicit-prompt rule of TRL's `extract_prompt`.

    >>> split_text("The sky is blue.", "The sky is green.")
    ('The sky is', ' blue.', ' green.')
    >>> split_text("ab", "abc")
    ('a', 'b', 'bc')
    """
    split = _common_prefix(chosen, rejected)
    ends = min(len(chosen), len(rejected))
    if split == ends:
        split -= 1
    elif split and chosen[split - 1] == " ":
        split -= 1
    return chosen[:split], chosen[split:], rejected[split:]


def split_turns(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Splits two full chats into their shared turns and the two completions.

    >>> question = {"role": "user", "content": "2 + 2?"}
    >>> right, wrong = ({"role": "assistant", "content": answer} for answer in "45")
    >>> split_turns([question, right], [question, wrong])[0]
    [{'role': 'user', 'content': '2 + 2?'}]
    """
    split = min(_common_prefix(chosen, rejected), min(len(chosen), len(rejected)) - 1)
    return chosen[:split], chosen[split:], rejected[split:]


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    if not a or not b:
        raise BadRowError(
            "empty side",
            "a side is empty, so the shared prompt cannot be found; expected two non-empty sides, "
            "or a 'prompt' column",
        )
    ends = min(len(a), len(b))
    return next((i for i in range(ends) if a[i] != b[i]), ends)


def turns(value: Any, column: str, role: str) -> Turns:
    """A list of `{"role", "content"}` turns; a string becomes one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or not value:
        raise wrong_type(column, value, "a string or a non-empty list of turns")
    return [_turn(item, column, i) for i, item in enumerate(value)]


def _turn(item: Any, column: str, index: int) -> dict[str, Any]:
    where = f"{column}[{index}]"
    if not isinstance(item, Mapping):
        raise wrong_type(where, item, 'a turn {"role", "content"}')
    turn = {key: value for key, value in item.items() if value is not None}
    if "from" in turn and "value" in turn:
        said = turn.pop("from")
        role = SHAREGPT_ROLES.get(said, said) if isinstance(said, str) else said
        turn = {"role": role, "content": turn.pop("value"), **turn}
    if not isinstance(turn.get("role"), str):
        raise wrong_type(f"{where}['role']", turn.get("role"), "a string")
    if not isinstance(turn.get("content"), str | list) and "tool_calls" not in turn:
        raise wrong_type(f"{where}['content']", turn.get("content"), "a string")
    return turn


def wrong_type(column: str, value: Any, expected: str) -> BadRowError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    what = "missing" if value is None else f"{type(value).__name__} {shown}"
    return BadRowError("wrong type", f"'{column}' is {what}, expected {expected}")


def string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(column, value, "a string")
    return value


def pair(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    """The canonical pair of a prompt (None: to be found) and two sides, strings or chats.

    Full chats carry the prompt themselves: a string beside them is left unused. Chats that begin
    with the assistant are completions of the prompt.
    """
    if all(value is None or isinstance(value, str) for value in (prompt, chosen, rejected)):
        chosen, rejected = string(chosen, "chosen"), string(rejected, "rejected")
        if prompt is None:
            prompt, chosen, rejected = split_text(chosen, rejected)
        return Pair(prompt, chosen, rejected)
    chosen = turns(chosen, "chosen", "assistant")
    rejected = turns(rejected, "rejected", "assistant")
    full = [side[0]["role"] != "assistant" for side in (chosen, rejected)]
    if any(full):
        return _from_full_chats(prompt, chosen, rejected)
    if prompt is None:
        raise BadRowError(
            "no prompt",
            "both chats begin with an assistant turn and there is no 'prompt'; expected full chats "
            "that share their first turns, or a 'prompt' column",
        )
    return answered(Pair(turns(prompt, "prompt", "user"), chosen, rejected))


def _from_full_chats(prompt: Any, chosen: Turns, rejected: Turns) -> Pair:
    if prompt is None or isinstance(prompt, str):
        unused = () if prompt is None else ("prompt",)
        return answered(Pair(*split_turns(chosen, rejected), unused=unused))
    shared = turns(prompt, "prompt", "user")
    k = len(shared)
    if chosen[:k] == shared and rejected[:k] == shared and min(len(chosen), len(rejected)) > k:
        return answered(Pair(shared, chosen[k:], rejected[k:]))
    return answered(Pair(shared, chosen, rejected))


def answered(result: Pair) -> Pair:
    """Checks that a conversational pair has a prompt, and that the assistant speaks next."""
    if not result.prompt:
        raise BadRowError(
            "no prompt",
            "the two chats share no first turn; expected the same first turns on both sides",
        )
    for column, side in (("chosen", result.chosen), ("rejected", result.rejected)):
        if side is not None and side[0]["role"] != "assistant":  # type: ignore[index]
            raise BadRowError(
                "not an answer",
                f"the completion of '{column}' begins with a turn of role "
                f"'{side[0]['role']}', expected 'assistant'",  # type: ignore[index]
            )
    return result
