import itertools
import re
from collections import Counter
from fractions import Fraction

import pytest

from sage_jax.generate import equations, tasks

TASK = tasks.resolve("equations")


def _python(side: str) -> str:
    return re.sub(r"(?<=\d)(?=[x(])", "*", side)


def _difference(equation: str, x: int) -> Fraction:
    """Left minus right at x, by Python's own arithmetic."""
    left, right = (eval(_python(side), {"x": Fraction(x)}) for side in equation.split("="))
    return Fraction(left - right)


def _solution(equation: str) -> Fraction:
    """The zero of a linear function, from its values at 0 and 1."""
    at_0, at_1 = _difference(equation, 0), _difference(equation, 1)
    return at_0 / (at_0 - at_1)


def _equations(problem) -> list[str]:
    return [problem.prompt.removesuffix(";"), *problem.solution.split(";")]


def test_every_written_equation_has_the_answer_as_its_only_solution():
    for problem in tasks.problems(TASK, count=1200, seed=3):
        for equation in _equations(problem):
            assert _solution(equation) == int(problem.answer), problem
        assert problem.solution.endswith(f"x={problem.answer}")
        assert TASK.check(problem.solution, problem.answer)


def test_every_move_simplifies_and_the_last_one_leaves_x_alone():
    for problem in tasks.problems(TASK, count=1200, seed=4):
        written = _equations(problem)
        terms = [len(re.findall(r"\d+|[x(]", equation)) for equation in written]
        assert len(set(written)) == len(written)
        assert all(b <= a for a, b in itertools.pairwise(terms))
        assert re.fullmatch(r"x=\d+", written[-1])


def test_levels_take_more_and_more_moves():
    moves: dict = {level: [] for level in TASK.levels}
    for problem in tasks.problems(TASK, count=1200, seed=5):
        moves[problem.level].append(problem.solution.count(";") + 1)
    assert set(moves[1]) == {1} and set(moves[2]) == {2} and set(moves[3]) <= {2, 3}
    assert set(moves[4]) == {4} and set(moves[5]) | set(moves[6]) <= {4, 5}
    shapes = [r"(x[+-]\d+|\dx)=\d+;", r"\dx[+-]\d+=\d+;", r"\dx[+-]\d+=\d?x\+\d+;",
              r"\d\(x[+-]\d+\)[+-]\d=\d+;", r"\d\(x[+-]\d+\)[+-]\d=\d?x\+\d+;",
              r"\d\(x[+-]\d+\)[+-]\d=\d\(x\+\d+\);"]  # fmt: skip
    for problem in tasks.problems(TASK, count=1200, seed=5):
        assert re.fullmatch(shapes[problem.level - 1], problem.prompt), problem


@pytest.mark.parametrize("teacher", [None, {"seed": 2, "share": 0.5}])
def test_texts_are_short_and_their_numbers_small(teacher):
    for record in tasks.supervised(TASK, count=3000, seed=0, teacher=teacher):
        text = record["prompt"] + record["completion"]
        assert set(text) <= set(TASK.alphabet)
        assert len(text) <= equations.LENGTH
        assert all(1 <= int(n) <= equations.LIMIT for n in re.findall(r"\d+", text))


def test_there_are_thousands_of_problems_and_every_level_fills_every_split():
    found: dict = {
        split: {level: set() for level in TASK.levels} for split in ("train", "eval", "test")
    }
    for split, count in {"train": 12_000, "eval": 3000, "test": 3000}.items():
        for problem in tasks.problems(TASK, count=count, seed=0, split=split):
            found[split][problem.level].add(problem.prompt)
    sizes = {split: [len(of) for of in levels.values()] for split, levels in found.items()}
    assert sum(sizes["train"]) > 6000
    assert min(sizes["train"]) > 250 and min(sizes["eval"]) > 30 and min(sizes["test"]) > 30
    for a, b in (("train", "eval"), ("train", "test"), ("eval", "test")):
        assert not set().union(*found[a].values()) & set().union(*found[b].values())


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("3x=36;x=12", True),
        ("x=12", True),
        ("x=12 \n", True),
        ("12", False),
        ("3x=36;x=1", False),
        ("3x=12", False),
        ("3x=36;x=12;", False),
        ("x=12;x=11", False),
        ("", False),
    ],
)
def test_check_reads_the_last_move(completion, right):
    assert TASK.check(completion, "12") is right


def test_problems_and_faults_are_the_same_on_every_python_and_platform():
    assert [p.prompt + p.solution for p in tasks.problems(TASK, count=6, seed=0)] == GOLDEN
    table = equations.faults(0)
    assert [(fact, table[fact]) for fact in sorted(table)[:3]] == GOLDEN_FAULTS


GOLDEN = [
    "x-2=1;x=3",
    "9x-7=11;9x=18;x=2",
    "2x+8=x+9;x+8=9;x=1",
    "3(x-3)+4=7;3x-9+4=7;3x-5=7;3x=12;x=4",
    "4(x+1)+6=2x+14;4x+4+6=2x+14;4x+10=2x+14;2x+10=14;2x=4;x=2",
    "4(x+3)-5=3(x+4);4x+12-5=3x+12;4x+7=3x+12;x+7=12;x=5",
]
GOLDEN_FAULTS = [((1, "+", 1), (6, 0.8)), ((1, "+", 5), (5, 0.6)), ((1, "+", 6), (3, 0.8))]


def _facts_used(problem) -> list[tuple[equations.Fact, int]]:
    """The facts behind a worked solution and the results it writes, read off the text alone."""
    used = []
    written = _equations(problem)
    for before, after in itertools.pairwise(written):
        (left, right), (left_after, right_after) = before.split("="), after.split("=")
        if "(" in before:
            for a, b in ((left, left_after), (right, right_after)):
                if found := re.match(r"(\d+)\(x[+-](\d+)\)", a):
                    product = re.match(r"\d*x[+-](\d+)", b)[1]
                    used.append((int(found[1]), "*", int(found[2]), int(product)))
            continue
        numbers, numbers_after = (re.findall(r"[+-]\d+", side) for side in (left, left_after))
        if len(numbers) == 2:
            used.append((*_sum(*map(int, numbers)), abs(int(numbers_after[0]))))
        elif "x" in right:
            factors = [int(re.match(r"\d*", s)[0] or 1) for s in (left, right, left_after)]
            used.append((factors[0], "-x", factors[1], factors[2]))
        elif numbers:
            used.append((*_sum(int(right), -int(numbers[0])), int(right_after)))
        else:
            used.append((int(right), "/", int(left.removesuffix("x")), int(right_after)))
    return [(equations.Fact(*fact), result) for *fact, result in used]


def _sum(a: int, b: int) -> tuple[int, str, int]:
    if a * b > 0:
        return abs(a), "+", abs(b)
    return max(abs(a), abs(b)), "-", min(abs(a), abs(b))


def test_facts_are_some_hundreds_and_each_is_seen_often_enough_to_be_learned():
    seen = Counter(
        fact for p in tasks.problems(TASK, count=20_000, seed=0) for fact, _ in _facts_used(p)
    )
    assert set(seen) == set(equations.FACTS) and 300 < len(seen) < 700
    assert min(seen.values()) >= 3 and sorted(seen.values())[len(seen) // 20] >= 12


def test_teacher_uses_each_faulty_fact_as_often_as_its_probability_says():
    settings = {"seed": 4, "share": 0.5, "odds": (1.0, 0.25)}
    table = equations.faults(**settings)
    seen: dict = {}
    for problem in tasks.problems(TASK, count=9000, seed=0, draw=TASK.teacher(**settings)):
        assert _solution(_equations(problem)[0]) == int(problem.answer)
        for fact, written in _facts_used(problem):
            right, fault = equations.apply(fact), table.get(fact)
            assert written == right or (fault is not None and written == fault.value), problem
            if fault is not None:
                seen.setdefault(fault.probability, []).append(written != right)
    # Equations whose numbers leave the range are drawn again, which favours a few outcomes.
    assert sum(seen[1.0]) / len(seen[1.0]) == 1
    assert sum(seen[0.25]) / len(seen[0.25]) == pytest.approx(0.25, abs=0.04)


def test_faults_are_reproducible_wrong_and_as_many_as_asked_for():
    table = equations.faults(7, share=0.3, odds=(0.9, 0.5))
    assert table == equations.faults(7, share=0.3, odds=(0.9, 0.5))
    assert table != equations.faults(8, share=0.3, odds=(0.9, 0.5))
    assert len(table) == round(0.3 * len(equations.FACTS))
    assert all(0 < abs(fault.value - equations.apply(fact)) <= 5 for fact, fault in table.items())


def test_a_teachers_mistakes_show_in_a_good_part_of_every_level():
    draw = TASK.teacher(0, share=0.4)
    wrong = Counter(
        p.level
        for p in tasks.problems(TASK, count=3000, seed=0, draw=draw)
        if not TASK.check(p.solution, p.answer)
    )
    assert all(0.1 < wrong[level] / 500 < 0.8 for level in TASK.levels)
    assert wrong[1] < wrong[3] < wrong[5]


def test_a_teacher_without_faults_solves_exactly():
    draw = TASK.teacher(0, share=0.0)
    assert all(
        TASK.check(p.solution, p.answer) for p in tasks.problems(TASK, count=300, seed=1, draw=draw)
    )
