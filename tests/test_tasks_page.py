"""The task of docs/tasks.md runs as it stands there, and `sage-jax sft` trains on tasks by name."""

import doctest
import importlib
import pathlib
import re
import sys

import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config
from sage_jax.generate import chars, tasks
from sage_jax.report import writers
from sage_jax.runtime import dataset, setup

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/tasks.md"
TASKS = ["equations", "base_conversion", "my_tasks:TASK"]


@pytest.fixture
def my_tasks(tmp_path, monkeypatch):
    """The page's file beside the command, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path / "cache"))
    file, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_tasks.py").write_text(file)
    importlib.invalidate_caches()
    yield importlib.import_module("my_tasks")
    sys.modules.pop("my_tasks")


def test_the_task_of_the_page_draws_what_the_page_shows(my_tasks):
    _, session = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    examples = doctest.DocTestParser().get_doctest(session, {}, "tasks.md", str(PAGE), 0)
    assert len(examples.examples) == 4
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_the_task_of_the_page_is_right_and_its_teacher_sometimes_wrong(my_tasks):
    task = tasks.resolve("my_tasks:TASK")
    for problem in tasks.problems(task, count=200, seed=1):
        assert problem.answer == str(sum(map(int, problem.prompt[:-1])))[-1]
        assert task.check(problem.solution, problem.answer)
    taught = tasks.problems(task, count=200, seed=1, draw=task.teacher(0))
    assert 20 < sum(not task.check(p.solution, p.answer) for p in taught) < 180


def test_the_page_names_every_built_in_task_with_its_solution():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE))
    assert set(rows) == set(tasks.TASKS)
    for name in ("arithmetic", "equations", "base_conversion"):
        prompt, solution = re.findall(r"`(.*?)`", rows[name])
        final = re.findall(r"\d+", solution)[-1]
        assert tasks.resolve(name).check(solution, final)
        assert set(prompt + solution) <= set(tasks.resolve(name).alphabet)


@pytest.mark.parametrize("name", TASKS)
def test_a_new_models_tokenizer_knows_every_character_and_the_config_gives_the_odds(name, my_tasks):
    task = tasks.resolve(name)
    given = {"model": {"path": "new"}, "data": {"train": f"task:{name}"}, "seed": 3,
             "task": {"count": 64, "teacher": True, "faulty_share": 0.5, "fault_odds": "1.0"},
             "loss": {"name": "sft"}, "selection": {"name": "uniform"}}  # fmt: skip
    run = config.resolve(given)
    tokenizer = setup.load_tokenizer(run)
    assert len(tokenizer) == 4 + len(task.alphabet)
    pairs = dataset.load_pairs(run, tokenizer, run.data.train)
    assert len(pairs) == 64
    assert tokenizer.convert_tokens_to_ids(chars.UNKNOWN) not in pairs.tokens
    teacher = {"seed": 3, "share": 0.5, "odds": (1.0,)}
    (first, *_) = tasks.supervised(task, count=64, seed=3, teacher=teacher)
    ids = pairs.tokens[pairs.offset[0] : pairs.offset[1]]
    assert tokenizer.decode(ids) == first["prompt"] + first["completion"] + chars.EOS


@pytest.mark.slow
def test_sft_trains_a_new_model_on_a_task_by_name(my_tasks, tmp_path):
    settings = {
        "model.layers": 1, "model.d_model": 16, "model.d_ff": 16, "model.heads": 2,
        "model.kv_heads": 1, "data.train": "task:my_tasks:TASK", "task.count": 64,
        "optim.lr": 1e-2, "optim.warmup": 0.0, "train.steps": 6, "train.batch_pairs": 8,
        "eval.problems": "task:my_tasks:TASK", "eval.count": 8, "eval.max_new_tokens": 4,
    }  # fmt: skip
    argv = [f"--config.{key}={value}" for key, value in settings.items()]
    base = f"--config={ROOT / 'configs/quickstart_base.py'}"
    assert launcher.main(["sft", base, "--workdir=run", *argv]) == 0
    losses = [row["loss"] for row in writers.read_rows(tmp_path / "run/metrics.jsonl")[:-1]]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
