"""Is a completion right? Checks of a completion's text against a known answer.

>>> VERIFIERS["number"]("5 apples and 7 make 12.", "12")
True
"""

from __future__ import annotations

import fractions
import re
import threading
from collections.abc import Callable

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?", re.ASCII)
_DIGITS = 1000  # a longer "number" is a model repeating itself, and Python refuses to convert it
_SECONDS = 5  # per parse and per comparison of math-verify


def exact(completion: str, answer: str) -> bool:
    """The completion is the answer, white space around both apart.

    >>> exact(" 12\\n", "12"), exact("=12", "12")
    (True, False)
    """
    return completion.strip() == answer.strip()


def number(completion: str, answer: str) -> bool:
    """The last number in the completion equals the answer, exactly.

    Understands signs, decimals, thousands separated by commas, and fractions like 3/4; "7-5" ends
    in the number 5, "= -5" in -5.

    >>> number("so 1,250.50 in all", "1250.5"), number("1/2", "0.5"), number("none", "1")
    (True, True, False)

    Raises:
        ValueError: the answer itself has no number.
    """
    expected = _last_number(answer)
    if expected is None:
        raise ValueError(f"answer={answer!r} has no number; verify such answers with 'exact'.")
    return _last_number(completion) == expected


def _last_number(text: str) -> fractions.Fraction | None:
    text = text.replace("\N{MINUS SIGN}", "-")  # as typesetters write it, and models do
    matches = list(_NUMBER.finditer(text))
    if not matches or len(matches[-1].group()) > _DIGITS:
        return None
    found, start = matches[-1].group(), matches[-1].start()
    if found[0] in "+-" and start and (text[start - 1].isalnum() or text[start - 1] == ")"):
        found = found[1:]  # "7-5": an operation, not a sign
    top, _, bottom = found.replace(",", "").partition("/")
    if bottom and int(bottom) == 0:
        return None
    return fractions.Fraction(top) / int(bottom or 1)


def math(completion: str, answer: str) -> bool:
    """The completion's final expression equals the answer as mathematics, by `math-verify`.

    LaTeX (`\\boxed{}` first), plain numbers, fractions, sets, intervals. Parsing and comparing stop
    after a few seconds each, on the main thread: the limit of math-verify is a signal, which only
    works there, so on other threads there is no limit.

    Raises:
        ValueError: the answer itself cannot be parsed.
        ImportError: math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError as e:
        raise ImportError(
            "Verifying mathematics needs math-verify: pip install 'sage_jax[math]'"
        ) from e
    # With a limit set, math-verify calls signal.signal, which raises on any other thread.
    main = threading.current_thread() is threading.main_thread()
    seconds = _SECONDS if main else None
    is_marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = math_verify.parse(answer if is_marked else f"${answer}$", parsing_timeout=seconds)
    if not gold:
        raise ValueError(
            f"answer={answer!r} is not mathematics that math-verify can parse; verify such answers "
            "with 'exact'."
        )
    found = math_verify.parse(completion, parsing_timeout=seconds)
    return bool(found) and bool(math_verify.verify(gold, found, timeout_seconds=seconds))


VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "number": number,
    "math": math,
}


def verify(kind: str, completion: str, answer: str) -> bool:
    """Checks a completion with the verifier called `kind`.

    Raises:
        ValueError: an unknown kind, or an answer which that kind cannot use.
    """
    if kind not in VERIFIERS:
        raise ValueError(f"verify={kind!r} is unknown; use one of {', '.join(VERIFIERS)}.")
    return VERIFIERS[kind](completion, answer)
