import concurrent.futures
import signal

import hypothesis
import pytest
from hypothesis import strategies as st

from sage_jax.generate import verify


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("12", "12", True),
        (" 12\n", "12", True),
        ("12.", "12", False),
        ("", "", True),
    ],
)
def test_exact_ignores_only_white_space_around(completion, answer, right):
    assert verify.verify("exact", completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("the answer is 42.", "42", True),
        ("3 and then 4", "3", False),
        ("-7", "-7", True),
        ("it is -7", "7", False),
        ("9-7", "7", True),
        ("x = \u22127", "-7", True),
        ("x = \u22127", "7", False),
        ("9\u22127", "7", True),
        ("1,234,567", "1234567", True),
        ("$1,250.50", "1250.5", True),
        ("3/4", "0.75", True),
        ("0.1", "1/10", True),
        (".5", "0.5", True),
        ("3/0", "3", False),
        ("no digits", "0", False),
        ("x = 3.0", "3", True),
        ("12 apples!", "12", True),
        ("1e3", "1000", False),  # not understood: it ends in the number 3
        ("12 km/5", "5", True),
        ("/5.", "5", True),
        ("٣", "3", False),  # digits of another script are not read
        ("9" * 5000, "9", False),
    ],
)
def test_number_compares_the_last_number_exactly(completion, answer, right):
    assert verify.verify("number", completion, answer) is right


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(st.sampled_from("0123456789+-.,/ ()a٣²")))
def test_whatever_a_model_writes_is_right_or_wrong(completion):
    assert verify.number(completion, "7") in (True, False)


MATH = [
    ("The answer is $\\frac{1}{2}$.", "0.5", True),
    ("\\boxed{0.5}", "\\frac{1}{2}", True),
    ("first 3, but \\boxed{\\dfrac{2}{4}}", "\\frac{1}{2}", True),
    ("\\boxed{12}", "12", True),
    ("\\boxed{13}", "12", False),
    ("so $1+x^2$", "x^2+1", True),
    ("so $1-x^2$", "x^2+1", False),
    ("$\\sqrt{8}$", "$2\\sqrt{2}$", True),
    ("$\\{2, 1\\}$", "\\{1,2\\}", True),
    ("I do not know", "12", False),
    ("", "12", False),
]


@pytest.mark.parametrize(("completion", "answer", "right"), MATH)
def test_math_recognises_equal_expressions(completion, answer, right):
    pytest.importorskip("math_verify")
    assert verify.verify("math", completion, answer) is right


def test_math_works_on_other_threads_where_signals_do_not():
    pytest.importorskip("math_verify")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = list(pool.map(lambda row: verify.math(row[0], row[1]), MATH))
    assert found == [right for _, _, right in MATH]


def test_math_leaves_the_alarm_handler_as_it_was():
    pytest.importorskip("math_verify")
    before = signal.getsignal(signal.SIGALRM)
    verify.math("1", "1")
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.alarm(0) == 0


def test_an_unusable_answer_or_kind_is_an_error():
    with pytest.raises(ValueError, match="exact, number, math"):
        verify.verify("fuzzy", "1", "1")
    with pytest.raises(ValueError, match="has no number"):
        verify.verify("number", "1", "one")


def test_math_refuses_an_answer_that_is_not_mathematics():
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="can parse"):
        verify.math("1", "")
