import random
import re
import types
from collections import Counter

import pytest

from sage_jax.generate import arithmetic, tasks

TASK = tasks.resolve("arithmetic")


def _left_to_right(prompt: str) -> list[int]:
    """An evaluator that shares nothing with the task: Python's own, with brackets added."""
    tokens = re.findall(r"\d+|[-+*]", prompt.rstrip("="))
    expression, values = tokens[0], []
    for operation, digit in zip(tokens[1::2], tokens[2::2], strict=True):
        expression = f"({expression}){operation}{digit}"
        values.append(eval(expression))
    return values


def test_answers_and_written_steps_equal_an_independent_evaluation():
    for problem in tasks.problems(TASK, count=800, seed=3):
        values = _left_to_right(problem.prompt)
        assert len(values) == problem.level
        assert problem.answer == str(values[-1])
        assert [int(v) for v in re.findall(r"=(\d+)", problem.solution)] == values
        assert all(0 <= v <= arithmetic.LIMIT for v in values)
        assert TASK.check(problem.solution, problem.answer)


def test_texts_stay_inside_the_alphabet_and_64_tokens():
    for problem in tasks.problems(TASK, count=4000, seed=0):
        assert set(problem.prompt + problem.solution) <= set(TASK.alphabet)
        assert len(problem.prompt + problem.solution) < 64


@pytest.mark.parametrize("split", ["train", "eval", "test"])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_built_in_task_has_checked_problems_of_every_level_and_split(name, split):
    task = tasks.resolve(name)
    found = tasks.problems(task, count=40, seed=0, split=split)
    assert {p.level for p in found} == set(task.levels)
    assert all(task.check(p.solution, p.answer) for p in found)
    assert all(tasks.split_of(p.prompt) == split for p in found)
    assert set("".join(p.prompt + p.solution for p in found)) <= set(task.alphabet)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("7+5=12", True),
        ("7+5=12 ", True),
        ("12", False),
        ("7+5=1", False),
        ("7+5=112", False),
        ("7+5=12=", False),
        ("", False),
    ],
)
def test_check_reads_what_follows_the_last_equals_sign(completion, right):
    assert TASK.check(completion, "12") is right


def test_splits_of_different_seeds_share_no_problem():
    prompts = {
        split: {
            p.prompt
            for seed in (0, 1)
            for p in tasks.problems(TASK, count=600, seed=seed, split=split)
        }
        for split in ("train", "eval", "test")
    }
    assert not prompts["train"] & prompts["eval"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["eval"] & prompts["test"]


def test_split_shares_are_80_10_10():
    rng = random.Random(0)
    count = Counter(tasks.split_of(f"text {rng.random()}") for _ in range(10_000))
    assert count["train"] == pytest.approx(8000, abs=150)
    assert count["eval"] == pytest.approx(1000, abs=120)


def test_a_problem_depends_on_its_index_not_on_the_range_asked_for():
    whole = tasks.problems(TASK, count=40, seed=5)
    assert whole[:25] == tasks.problems(TASK, count=25, seed=5)
    assert whole[25:] == tasks.problems(TASK, count=15, seed=5, start=25)
    assert whole != tasks.problems(TASK, count=40, seed=6)


def test_levels_take_turns():
    levels = [p.level for p in tasks.problems(TASK, count=16, seed=0)]
    assert levels == list(range(1, 9)) * 2
    assert {p.level for p in tasks.problems(TASK, count=9, seed=0, levels=[2, 5])} == {2, 5}


def test_problems_and_faults_are_the_same_on_every_python_and_platform():
    assert [p.solution for p in tasks.problems(TASK, count=4, seed=0)] == GOLDEN_SOLUTIONS
    table = arithmetic.faults(0)
    assert [(fact, table[fact]) for fact in sorted(table)[:3]] == GOLDEN_FAULTS


GOLDEN_SOLUTIONS = ["8+2=10", "6*3=18+1=19", "5+4=9-6=3*4=12", "6-4=2-2=0+7=7-2=5"]
GOLDEN_FAULTS = [((0, "+", 2), (0, 0.6)), ((0, "+", 4), (3, 0.4)), ((0, "+", 7), (4, 0.6))]


def test_a_teacher_is_not_asked_the_problems_that_the_model_is_asked_later():
    asked = [p.prompt for p in tasks.problems(TASK, count=400, seed=0) if p.level > 3]
    taught = {r["prompt"] for r in tasks.supervised(TASK, count=400, seed=0, teacher={"seed": 0})}
    assert sum(prompt in taught for prompt in asked) < 5


def test_teacher_uses_each_faulty_fact_as_often_as_its_probability_says():
    settings = {"seed": 4, "share": 0.5, "odds": (1.0, 0.25)}
    table = arithmetic.faults(**settings)
    seen: dict = {}
    for problem in tasks.problems(TASK, count=6000, seed=0, draw=TASK.teacher(**settings)):
        values = [int(problem.prompt[0]), *map(int, re.findall(r"=(\d+)", problem.solution))]
        steps = re.findall(r"([-+*])(\d)", problem.prompt)
        for before, (operation, digit), after in zip(values, steps, values[1:], strict=False):
            fact = arithmetic.Fact(before, operation, int(digit))
            right, fault = arithmetic.apply(fact), table.get(fact)
            assert after == right or (fault is not None and after == fault.value)
            if fault is not None:
                seen.setdefault(fault.probability, []).append(after != right)
    # Chains that leave the range are drawn again, which favours a few outcomes slightly.
    assert sum(seen[1.0]) / len(seen[1.0]) > 0.999
    assert sum(seen[0.25]) / len(seen[0.25]) == pytest.approx(0.25, abs=0.04)


def test_faults_are_reproducible_and_as_many_as_asked_for():
    table = arithmetic.faults(7, share=0.4, odds=(0.9, 0.5))
    assert table == arithmetic.faults(7, share=0.4, odds=(0.9, 0.5))
    assert table != arithmetic.faults(8, share=0.4, odds=(0.9, 0.5))
    facts = sum(len(group) for group in arithmetic.FACTS.values())
    assert len(table) == round(0.4 * facts)
    assert all(fault.value != arithmetic.apply(fact) for fact, fault in table.items())
    assert Counter(f.probability for f in table.values())[0.9] == pytest.approx(
        len(table) / 2, abs=1
    )


def test_supervised_records_hold_exact_or_faulty_solutions():
    exact = tasks.supervised(TASK, count=80, seed=0)
    assert set(exact[0]) == {"prompt", "completion", "level"}
    assert all(TASK.check(r["completion"], str(_left_to_right(r["prompt"])[-1])) for r in exact)
    teacher = {"seed": 0, "share": 0.5, "odds": (1.0,)}
    faulty = tasks.supervised(TASK, count=80, seed=0, teacher=teacher)
    wrong = [not TASK.check(r["completion"], str(_left_to_right(r["prompt"])[-1])) for r in faulty]
    assert 0.4 < sum(wrong) / 80 < 1


def test_resolve_finds_a_users_own_task(monkeypatch):
    import sys

    own = TASK._replace(name="own")
    monkeypatch.setitem(sys.modules, "my_tasks", types.SimpleNamespace(own=own, other=3))
    assert tasks.resolve("my_tasks:own") is own
    with pytest.raises(ValueError, match="int; it must be"):
        tasks.resolve("my_tasks:other")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.resolve("arithmetics"), "not a built-in task"),
        (lambda: tasks.resolve("no_such_module:x"), "cannot be loaded"),
        (lambda: tasks.problems(TASK, count=1, seed=0, split="dev"), "not a split"),
        (lambda: tasks.problems(TASK, count=1, seed=0, levels=[9]), "has the levels"),
        (lambda: arithmetic.faults(0, share=1.5), "lie in"),
        (
            lambda: tasks.supervised(TASK._replace(teacher=None), count=1, seed=0, teacher={}),
            "no teacher",
        ),
    ],
)
def test_wrong_arguments_say_value_rule_and_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_level_without_problems_in_the_split_is_an_error_not_a_hang():
    only = TASK._replace(problem=lambda rng, level: tasks.Problem("7+5=", "7+5=12", "12", level))
    assert tasks.split_of("7+5=") == "train"
    with pytest.raises(ValueError, match="too few different problems"):
        tasks.problems(only, count=1, seed=0, split="eval")
