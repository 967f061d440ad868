"""The experiment on a real model: its stages at toy size, its worked solutions, its report."""

import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from sage_jax.generate import verify

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/selection/medium.py"

# Entries as reasoning-gym 0.1.25 gives them: question, answer, what the working is made of.
ENTRIES = [
    ("chain_sum", 1, "State the final answer to the following arithmetic problem: 43 + 19 =", "62",
     {"expression": "43 + 19"}),
    ("chain_sum", 5, "State the final answer to the following arithmetic problem: "
     "111 - 372 - 592 - 535 + 862 - 160 =", "-686",
     {"expression": "111 - 372 - 592 - 535 + 862 - 160"}),
    ("basic_arithmetic", 3, "Calculate -8 * -2 - 4 - 7.", "5", {"expression": "-8 * -2 - 4 - 7"}),
    ("basic_arithmetic", 5, "Calculate -( 7 - -3 ) * 8 * 9 - -( -2 - -3 ).", "-719",
     {"expression": "-( 7 - -3 ) * 8 * 9 - -( -2 - -3 )"}),
    ("simple_equations", 1, "Solve for p: 8 - p = 4", "4",
     {"equation": "8 - p = 4", "variable": "p"}),
    ("simple_equations", 3, "Find the value of r in the equation: 10*r + 2 = 132", "13",
     {"equation": "10*r + 2 = 132", "variable": "r"}),
    ("products", 1, "Solve the following multiplication: 1 * 6 * 2. Give only the result as your "
     "final answer.", "12", {"expression": "1 * 6 * 2"}),
    ("products", 5, "Solve the following multiplication: 9123 * 7684. Give only the result as your "
     "final answer.", "70101132", {"expression": "9123 * 7684"}),
    ("gcd", 3, "Find the Greatest Common Divisor (GCD) of these numbers: 233, 140. Give only the "
     "GCD as your final answer.", "1", {"numbers": [233, 140]}),
    ("gcd", 5, "Find the Greatest Common Divisor (GCD) of these numbers: 1732, 1982. Give only the "
     "GCD as your final answer.", "2", {"numbers": [1732, 1982]}),
    ("gsm_symbolic", 1, "A fog bank rolls in. Give the result as your final answer. Do not include "
     "units.", "358",
     {"answer_cot": "The city will be covered in 88 / 44 = 2 intervals of 179 minutes.\nThus, it "
                    "will take 2 * 179 = 358 minutes.\n#### 358"}),
]  # fmt: skip


@pytest.fixture
def modules(monkeypatch):
    """The modules of the experiment, which lie beside the library."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/selection"))
    names = ("gym_tasks", "medium_files", "medium_report")
    return {name: importlib.import_module(name) for name in names}


def entry(question, answer, metadata):
    return {"question": question, "answer": answer, "metadata": metadata}


@pytest.mark.parametrize(("name", "level", "question", "answer", "metadata"), ENTRIES)
def test_every_equation_of_the_working_holds(modules, name, level, question, answer, metadata):
    gym_tasks = modules["gym_tasks"]
    found = gym_tasks.problem(entry(question, answer, metadata), gym_tasks.SOURCES[name], level)
    *lines, last = found.solution.split("\n")
    assert last == f"The answer is {answer}." and found.level == level and lines
    assert "Give only" not in found.prompt and found.prompt in question
    assert verify.math(found.solution, answer) and gym_tasks.check(found.solution, answer)
    first = metadata["expression"] if name == "basic_arithmetic" else ""
    for line in lines if name != "gsm_symbolic" else []:
        text = re.sub(rf"\b{metadata.get('variable', '_')}\b", f"({answer})", line)
        values = {eval(side) for side in (first + text).split("=") if side.strip()}
        assert len(values) == 1, line  # Python's own arithmetic, with the unknown put in
    if name == "basic_arithmetic":
        assert eval(lines[-1].removeprefix("=")) == int(answer)


def test_an_equation_without_one_answer_is_left_out(modules):
    gym_tasks = modules["gym_tasks"]
    about = {"equation": "5*n - 5*n = 0", "variable": "n"}  # as drawn once in some 10,000
    one = entry("Solve for n: 5*n - 5*n = 0", "7", about)
    assert gym_tasks.problem(one, gym_tasks.SOURCES["simple_equations"], 1) is None
    about["equation"] = "n*n = 4"  # not linear: the package has changed, and that has to show
    with pytest.raises(ValueError, match="not linear"):
        gym_tasks.problem(one, gym_tasks.SOURCES["simple_equations"], 1)


def test_working_that_misses_the_answer_of_the_package_is_refused(modules):
    gym_tasks = modules["gym_tasks"]
    wrong = entry("43 + 19 =", "63", {"expression": "43 + 19"})
    with pytest.raises(ValueError, match=r"arrives at 62.*is 63"):
        gym_tasks.problem(wrong, gym_tasks.SOURCES["chain_sum"], 1)
    theirs = entry("How many?", "8", {"answer_cot": "3 + 4 = 7\nand one\n#### 7"})
    assert gym_tasks.problem(theirs, gym_tasks.SOURCES["gsm_symbolic"], 1) is None


def points(steps, accuracy, flops):
    return [
        {"step": s, "pairs": 4 * s, "flops": flops * s, "accuracy": a, "tasks": {"one": a}}
        for s, a in zip(steps, accuracy, strict=True)
    ]


def result(method, seed, curve):
    return {"method": method, "seed": seed, "lr": 1e-5, "tasks": ["one"], "settings": {},
            "curve": curve}  # fmt: skip


def test_the_report_compares_at_equal_steps_pairs_and_flops(modules):
    report = modules["medium_report"]
    runs = {
        "uniform": {s: result("uniform", s, points([0, 10, 20], [0.2, 0.4, 0.6], 3.0))
                    for s in (0, 1)},
        "sage": {s: result("sage", s, points([0, 10, 20], [0.2, 0.6, 0.6 + 0.1 * s], 6.0))
                 for s in (0, 1)},
    }  # fmt: skip
    table = report.summarise(runs)
    # 60 FLOPs are uniform's whole run, and half of SAGE's, which costs twice as much a step.
    assert table["sage"]["at_equal_flops"]["mean"] == pytest.approx(0.6)
    assert table["sage"]["at_equal_step"]["mean"] == pytest.approx(0.65)
    assert table["sage"]["at_equal_step_minus_uniform"]["error"] == pytest.approx(0.05)
    assert table["sage"]["tasks"]["one"]["at_equal_pairs"]["mean"] == pytest.approx(0.65)
    # 95 % of uniform's gain is 0.58: at 19 steps, and at 9.5 with SAGE.
    assert table["sage"]["need_step"]["mean"] == pytest.approx(0.5)
    assert table["sage"]["need_flops"]["mean"] == pytest.approx(1.0)
    # Means of straight lines: 0.4 for uniform; SAGE 0.4 to half, then 0.6 to 0.6 or 0.7.
    assert table["uniform"]["mean_over_step"]["mean"] == pytest.approx(0.4)
    assert table["sage"]["mean_over_step"]["mean"] == pytest.approx(np.mean([0.5, 0.525]))
    assert "0.50" not in report.markdown(table, 2).split("\n")[4]


def test_a_limit_that_is_over_before_the_training_listens_is_told_again(modules):
    heard = []
    limit = modules["medium_files"].Limit(1e-9)
    with limit.armed():
        before = signal.getsignal(signal.SIGTERM)
        while not limit._told:  # the first signal comes while nothing of the training listens
            signal.sigtimedwait([], 0.01)
        signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
        signal.sigtimedwait([], 2.0) if not heard else None
        while not heard:
            signal.sigtimedwait([], 0.01)
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(SystemExit):
        limit.stop_if_over()


def run(workdir, *flags, check=True):
    return subprocess.run(
        [sys.executable, SCRIPT, "--size=toy", f"--workdir={workdir}", *flags],
        check=check, capture_output=True, text=True, timeout=1500, cwd=workdir.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_stages_lead_from_problems_to_a_report(tmp_path, modules):
    workdir = tmp_path / "toy"
    assert "--stage=problems" in run(workdir, "--stage=sft", check=False).stderr
    run(workdir, "--stage=problems,sft,sample")
    # A limit in the middle of the grid: saved, and taken up by the same command.
    flags = ("--method=sage,uniform", "--lrs=4e-4")
    stopped = run(workdir, "--stage=grid", *flags, "--minutes=0.001", check=False)
    assert stopped.returncode and "goes on from there" in stopped.stderr
    run(workdir, "--stage=grid,train,report", *flags)

    found = json.loads((workdir / "report/medium.json").read_text())
    for method in ("sage", "uniform"):
        curve = found["curves"][method]["0"]
        assert [p["step"] for p in curve] == [0, 4, 8, 12]
        # A step of eight pairs that are too long together closes a pair early.
        assert all(0 <= 8 * p["step"] - p["pairs"] <= 2 for p in curve)
        for p in curve:  # as many problems of each task
            assert np.mean(list(p["tasks"].values())) == pytest.approx(p["accuracy"])
            assert set(p["levels"]) == set(p["tasks"]) == {"arithmetic", "equations"}
    first = [found["curves"][m]["0"][0] for m in ("sage", "uniform")]
    assert first[0]["tasks"] == first[1]["tasks"] and 0 < first[0]["accuracy"] < 1
    assert found["summary"]["sage"]["lr"]["mean"] == 4e-4
    assert "| arithmetic | equations |" in (workdir / "report/medium.md").read_text()
    assert (workdir / "report/medium.png").stat().st_size > 10_000

    rows = {}
    for name in ("sft", "sample", "eval", "test"):
        path = workdir / f"problems/seed_0/{name}.jsonl"
        rows[name] = [row["prompt"] for row in modules["medium_files"].read_rows(path)]
    assert not set(rows["eval"]) & set(rows["test"])
    assert not (set(rows["sft"]) | set(rows["sample"])) & (set(rows["eval"]) | set(rows["test"]))
    pairs = modules["medium_files"].read_rows(workdir / "worlds/seed_0/pairs/data.jsonl")
    assert {p["task"] for p in pairs} <= {"arithmetic", "equations"}
    assert {p["level"] for p in pairs} <= {1, 2} and {p["prompt"] for p in pairs} <= set(
        rows["sample"]
    )

    # What is there is not made again, and the test split is for one learning rate a method.
    again = run(workdir, *flags)
    assert "steps" not in again.stderr
    other = run(workdir, "--stage=train", "--method=sage", "--lr=1e-4", check=False)
    assert other.returncode and "one learning rate a method" in other.stderr
