import itertools
import re
from collections import Counter

import pytest

from sage_jax.generate import base_conversion, tasks

TASK = tasks.resolve("base_conversion")


def _divisions(prompt: str, solution: str) -> tuple[int, list[tuple[int, int, int]]]:
    """The base, and (divided, quotient, remainder) of every written division."""
    value, base = map(int, re.fullmatch(r"(\d+)>(\d):", prompt).groups())
    written = [tuple(map(int, step.split("r"))) for step in solution.split(";")[0].split(",")]
    divided = [value, *(quotient for quotient, _ in written)]
    return base, [(v, q, r) for v, (q, r) in zip(divided, written, strict=False)]


def test_answers_are_the_number_in_that_base_and_every_division_holds():
    for problem in tasks.problems(TASK, count=1200, seed=3):
        base, divisions = _divisions(problem.prompt, problem.solution)
        assert int(problem.answer, base) == divisions[0][0]
        assert problem.solution.endswith(f";{problem.answer}")
        assert all(v == q * base + r and 0 <= r < base for v, q, r in divisions)
        assert 0 < divisions[-1][1] < base
        assert len(divisions) == problem.level == len(problem.answer) - 1
        assert TASK.check(problem.solution, problem.answer)


@pytest.mark.parametrize("base", base_conversion.BASES)
def test_long_division_agrees_with_pythons(base):
    for value in range(2000):
        assert base_conversion.divide(value, base) == divmod(value, base)


def test_every_number_has_one_level():
    listed = [pair for pairs in base_conversion.NUMBERS.values() for pair in pairs]
    assert len(set(listed)) == len(listed) > 7000
    some = {(n, b) for b in range(2, 10) for n in range(b, 1000) if n < b**7}
    assert set(listed) == some


@pytest.mark.parametrize("teacher", [None, {"seed": 2, "share": 0.5}, {"seed": 1, "share": 1.0}])
def test_texts_are_short_and_inside_the_alphabet(teacher):
    for record in tasks.supervised(TASK, count=3000, seed=0, teacher=teacher):
        text = record["prompt"] + record["completion"]
        assert set(text) <= set(TASK.alphabet)
        assert len(text) <= base_conversion.LENGTH


def test_every_level_fills_every_split_and_splits_share_nothing():
    found = {
        split: tasks.problems(TASK, count=count, seed=0, split=split)
        for split, count in (("train", 6000), ("eval", 1500), ("test", 1500))
    }
    for split, least in (("train", 150), ("eval", 15), ("test", 15)):
        prompts = Counter(level for _, level in {(p.prompt, p.level) for p in found[split]})
        assert min(prompts[level] for level in TASK.levels) >= least
    for a, b in itertools.combinations(found, 2):
        assert not {p.prompt for p in found[a]} & {p.prompt for p in found[b]}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("15r0,5r0,1r2;1200", True),
        (";1200 \n", True),
        ("1200", False),
        ("15r0,5r0,1r2;120", False),
        ("15r0,5r0,1r2;12000", False),
        ("15r0,5r0,1r2;1200;", False),
        ("", False),
    ],
)
def test_check_reads_what_follows_the_last_semicolon(completion, right):
    assert TASK.check(completion, "1200") is right


def test_problems_and_faults_are_the_same_on_every_python_and_platform():
    assert [p.prompt + p.solution for p in tasks.problems(TASK, count=4, seed=0)] == GOLDEN
    table = base_conversion.faults(0)
    assert [(fact, table[fact]) for fact in sorted(table)[:3]] == GOLDEN_FAULTS


GOLDEN = [
    "35>6:5r5;55",
    "403>8:50r3,6r2;623",
    "796>7:113r5,16r1,2r2;2215",
    "107>3:35r2,11r2,3r2,1r0;10222",
]
GOLDEN_FAULTS = [((0, 3, 2), (4, 0.4)), ((0, 4, 4), (7, 0.6)), ((0, 5, 3), (10, 0.6))]


def _paths(divided: int, quotient: int, remainder: int, base: int, table: dict) -> list[list]:
    """All ways to have worked out a written division: the facts used, each with what it gave."""
    paths: list = [(0, [])]
    for digit, part in zip(str(divided), str(quotient).zfill(len(str(divided))), strict=True):
        following = []
        for carried, facts in paths:
            fact, right = (carried, int(digit), base), 10 * carried + int(digit)
            believed = {right, table[fact].value} if fact in table else {right}
            following += [
                (value % base, [*facts, (fact, right, value)])
                for value in believed
                if value // base == int(part)
            ]
        paths = following
    return [facts for carried, facts in paths if carried == remainder]


def test_facts_are_some_hundreds_and_each_is_seen_often_enough_to_be_learned():
    seen: Counter = Counter()
    for problem in tasks.problems(TASK, count=6000, seed=0):
        base, divisions = _divisions(problem.prompt, problem.solution)
        for division in divisions:
            (facts,) = _paths(*division, base, {})
            seen.update(fact for fact, right, _ in facts if right >= base)
    assert set(seen) == set(base_conversion.FACTS) and 300 < len(seen) < 500
    assert min(seen.values()) >= 4


def test_teacher_uses_each_faulty_fact_as_often_as_its_probability_says():
    settings = {"seed": 4, "share": 0.4, "odds": (1.0, 0.25)}
    table = base_conversion.faults(**settings)
    seen: dict = {}
    for problem in tasks.problems(TASK, count=3000, seed=0, draw=TASK.teacher(**settings)):
        base, divisions = _divisions(problem.prompt, problem.solution)
        assert int(problem.answer, base) == divisions[0][0]
        for division in divisions:
            paths = _paths(*division, base, table)
            assert paths, f"{problem}: no facts and faults lead to {division}"
            for fact, right, value in paths[0] if len(paths) == 1 else []:
                if fact in table:
                    seen.setdefault(table[fact].probability, []).append(value != right)
    assert sum(seen[1.0]) / len(seen[1.0]) == 1
    assert sum(seen[0.25]) / len(seen[0.25]) == pytest.approx(0.25, abs=0.03)


def test_faults_are_reproducible_wrong_and_as_many_as_asked_for():
    table = base_conversion.faults(7, share=0.3, odds=(0.9, 0.5))
    assert table == base_conversion.faults(7, share=0.3, odds=(0.9, 0.5))
    assert table != base_conversion.faults(8, share=0.3, odds=(0.9, 0.5))
    assert len(table) == round(0.3 * len(base_conversion.FACTS))
    for (carried, digit, base), fault in table.items():
        assert 0 < abs(fault.value - (10 * carried + digit)) <= 5
        assert 1 <= fault.value // base <= 9


@pytest.mark.parametrize("seed", range(5))
def test_division_ends_even_if_every_fact_is_faulty_and_always_shows(seed):
    draw = TASK.teacher(seed, share=1.0, odds=(1.0,))
    found = tasks.problems(TASK, count=600, seed=seed, draw=draw)
    wrong = [not TASK.check(p.solution, p.answer) for p in found]
    assert sum(wrong) > 570
    assert all(divided > q > 0 for p in found for divided, q, _ in _divisions(*p[:2])[1])
