"""The tasks of the experiments: right solutions, and mistakes that change how long an answer is."""

import math
import pathlib
import statistics
import sys

import pytest

from sage_jax.generate import tasks

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "selection"


@pytest.fixture
def resolve(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield tasks.resolve
    for name in ("euclid", "mixed"):
        sys.modules.pop(name, None)


def test_euclid_finds_the_common_divisor_of_all_three_numbers(resolve):
    task = resolve("euclid:TASK")
    found = tasks.problems(task, count=300, seed=0)
    for problem in found:
        numbers = [int(x) for x in problem.prompt[:-1].split(",")]
        assert int(problem.answer) == math.gcd(*numbers) > 1
        assert task.check(problem.solution, problem.answer)
        for step in problem.solution.replace(";", ",").split(",")[:-1]:
            high, low, rest = map(int, step.replace("=", "%").split("%"))
            assert high % low == rest
    assert not task.check(found[0].solution[:-1] + "0", found[0].answer)


def test_a_wrong_remainder_of_euclid_changes_the_number_of_divisions(resolve):
    task = resolve("euclid:TASK")
    rows = tasks.supervised(task, count=500, seed=0, teacher={"seed": 0, "share": 0.25})
    right, longer = 0, []
    for row in rows:
        numbers = [int(x) for x in row["prompt"][:-1].split(",")]
        right += task.check(row["completion"], str(math.gcd(*numbers)))
        longer.append(len(row["completion"]) - len(sys.modules["euclid"].work(numbers)[0]))
        assert len(row["prompt"] + row["completion"]) <= sys.modules["euclid"].LENGTH
    assert 0.3 < right / len(rows) < 0.6
    assert statistics.pstdev(longer) > 4


def test_a_level_of_the_mixed_task_is_a_kind_and_is_checked_as_that_kind(resolve):
    task = resolve("mixed:TASK")
    found = tasks.problems(task, count=80, seed=0)
    for problem in found:
        kind = sys.modules["mixed"].KINDS[problem.level]
        assert task.check(problem.solution, problem.answer)
        assert kind.check(problem.solution, problem.answer.partition("|")[2])
        assert set(problem.prompt + problem.solution) <= set(task.alphabet)
    others = [p for p in found if p.level != found[0].level]
    assert not any(task.check(p.solution, found[0].answer) for p in others)
