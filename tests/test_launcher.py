"""The command as a user meets it: every mode on the shipped model, and every wrong command."""

import datetime
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_jax import __main__ as launcher
from sage_jax import curriculum, models, rules, scores, selection
from sage_jax.generate import tasks
from sage_jax.report import writers
from sage_jax.runtime import modes

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT / 'configs/quickstart.py'}"
PAIRS = ROOT / "sage_jax/assets/quickstart/pairs.jsonl"
SMALL = {
    "train.steps": 2, "train.batch_pairs": 4, "curriculum.pool_size": 16, "data.limit": 40,
    "eval.count": 8, "eval.every": 0, "eval.batch": 8, "eval.max_new_tokens": 24,
    "checkpoint.every": 1, "compare.uniform": False, "eval.kl_prompts": 4,
}  # fmt: skip


def settings(**changes):
    return [f"--config.{k}={v}" for k, v in (SMALL | changes).items()]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Another directory than the repository, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAGE_JAX_TRACEBACK", raising=False)


@pytest.fixture
def rows(tmp_path):
    """Writes rows, as JSON or as they are, and returns the path."""

    def write(*lines, name="rows.jsonl"):
        text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
        (tmp_path / name).write_text(text)
        return name

    return write


def refused(argv, said, capsys, code=2):
    """The command ends with one line that says so, and leaves nothing behind."""
    before = sorted(pathlib.Path().rglob("*"))
    assert launcher.main(argv) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("sage-jax: "), err
    assert re.search(said, err), err
    after = [p for p in sorted(pathlib.Path().rglob("*")) if p.parts[0] != "cache"]
    assert after == [p for p in before if p.parts[0] != "cache"]


# -- wrong commands ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian", CONFIG], r"'trian' is not a mode .* Did you mean 'train'"),
        ([CONFIG, "train"], "the mode comes first: sage-jax MODE"),
        (["train", "--workdir=run"], "--config=FILE is missing"),
        (["train", CONFIG], "--workdir is missing"),
        (["train", "--config=configs/quikstart.py", "--workdir=run"], "Did you mean quickstart"),
        (["train", CONFIG, "--workdr=run"], "--workdr is not a flag. Did you mean --workdir"),
        (["train", CONFIG, "run"], "'run' is not a flag. Write --config.key=value"),
        (["train", CONFIG, "--workdir"], "--workdir needs a value"),
        (["train", CONFIG, "--workdir=run", "--config.optm.lr=1"], r"nearest is config.optim.lr"),
        (["train", CONFIG, "--workdir=run", "--config.lr=1"], r"nearest is config.optim.lr"),
        (["train", CONFIG, "--workdir=run", "--config.optim.lr=fast"], r"'fast' is not a float"),
        (["train", CONFIG, "--workdir=run", "--config.train.steps=1.5"], r"'1.5' is not an int"),
        (["train", CONFIG, "--workdir=run", "--config.data.packing=maybe"], "is not a bool"),
        (["report"], "--workdir is missing"),
        (["report", "--workdir=nowhere"], "nowhere holds no run"),
        (["export", "--workdir=nowhere"], "nowhere holds no run"),
        (["export", CONFIG, "--workdir=nowhere"], "nowhere holds no checkpoints"),
    ],
)
def test_a_mistyped_command_is_one_line(argv, said, capsys):
    refused(argv, said, capsys)


@pytest.mark.parametrize(
    ("mode", "changes", "said"),
    [
        ("train", {"optim.lr": -1}, r"config.optim.lr=-1.0 has to be above 0"),
        ("train", {"loss.name": "sigmod"}, r"Did you mean 'sigmoid'"),
        ("train", {"loss.name": "sft", "selection.name": "uniform"}, r"Use the mode: sage-jax sft"),
        ("train", {"model.path": "models/none"}, r"'models/none' does not exist"),
        ("train", {"model.path": ""}, "config.model.path is empty"),
        ("train", {"data.train": "none.jsonl"}, r"'none.jsonl' does not exist"),
        ("train", {"data.train": ""}, "config.data.train is empty"),
        ("train", {"data.eval": "none.jsonl"}, r"'none.jsonl' does not exist"),
        ("train", {"train.batch_pairs": 4000}, "config.train.batch_pairs=4000|of 4000"),
        ("train", {"curriculum.pool_size": 0, "train.batch_pairs": 30}, "30 is more than the 13"),
        ("train", {"curriculum.difficulty": "hardness"}, "no numeric column .* level"),
        ("train", {"eval.problems": "task:algebra"}, "not a built-in task"),
        ("train", {"eval.problems": "none.jsonl"}, "none.jsonl does not exist"),
        ("train", {"reference.path": "models/none"}, r"'models/none' does not exist"),
        ("train", {"mesh.tensor": 3}, "Choose sizes whose product is 8"),
        ("train", {"selection.name": "my_rules:best"}, "cannot be loaded"),
        ("train", {"export.dtype": "float8"}, "config.export.dtype='float8' is not one of"),
        ("sample", {"sample.per_problem": 1}, "config.sample.per_problem=1"),
        ("sample", {"eval.problems": "held_out.jsonl"}, "is for evaluation"),
        ("eval", {"eval.problems": ""}, "are both empty"),
        ("score", {"selection.name": "uniform"}, "does not score"),
        ("score", {"selection.margin": "reward"}, "Give config.reference.path"),
        ("score", {"selection.guard": "suspects"}, "Give config.reference.path"),
        ("score", {"selection.scoring_dtype": "bfloat16"}, "scores every pair once"),
        ("score", {"selection.refresh": 0.5}, "scores every pair once"),
        ("score", {"selection.stability": "rounds"}, "needs margins of several rounds"),
        ("doctor", {"data.train": "none.jsonl"}, r"'none.jsonl' does not exist"),
    ],
)
def test_a_wrong_value_is_one_line_and_nothing_is_written(mode, changes, said, capsys):
    refused([mode, CONFIG, "--workdir=run", *settings(**changes)], said, capsys)


def test_data_that_cannot_be_trained_on_is_refused_by_file_and_line(rows, capsys):
    good = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    command = ["train", CONFIG, "--workdir=run", "--config.train.batch_pairs=1"]
    single = rows(good, {"prompt": "1+2=", "completion": "3"}, name="single.jsonl")
    said = r"1 of 2 rows have no rejected answer, the first is single.jsonl:2.*sage-jax sft"
    refused([*command, f"--config.data.train={single}"], said, capsys)
    refused([*command, f"--config.data.eval={single}"], "config.data.eval: 1 of 2 rows", capsys)
    broken = rows(good, '{"prompt": "1+2="', name="broken.jsonl")
    refused([*command, f"--config.data.train={broken}"], r"broken.jsonl:2: not valid JSON", capsys)
    problems = rows({"prompt": "1+1="}, name="problems.jsonl")
    said = "problems.jsonl:1: KeyError: 'answer'. Expected a JSON object with 'prompt'"
    refused([*command, f"--config.eval.problems={problems}"], said, capsys)


def test_token_ids_that_the_model_does_not_have_are_refused_by_file_and_line(rows, capsys):
    good = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    bad = rows(good, good | {"rejected_ids": [4, 512]}, name="ids.jsonl")
    command = [CONFIG, "--workdir=run", *settings(**{"train.batch_pairs": 1})]
    for mode, key in (("train", "train"), ("score", "train"), ("eval", "eval")):
        refused([mode, *command, f"--config.data.{key}={bad}"], "ids.jsonl:2: token id 512", capsys)


def test_pairs_of_other_writers_keep_three_quarters_of_a_pool(rows, capsys):
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    long = {"prompt": "1+" * 600 + "1=", "chosen": "601", "rejected": "2"}
    data = {"data.train": rows(*[pair] * 40, *[long] * 2), "curriculum.pool_size": 50}
    said = r"31 is more than the 30 pairs selected from a pool of 40; left out: 2 prompt reaches"
    argv = ["train", CONFIG, "--workdir=run"]
    more = {"train.batch_pairs": 31, "data.limit": 0}
    refused([*argv, *settings(**data, **more)], said, capsys)


@pytest.mark.slow
def test_a_random_twin_keeps_the_share_of_the_run_whatever_the_data(rows, tmp_path):
    data = rows(*({"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "0"} for i in range(40)))
    changes = {"selection.name": "gradient", "compare.random": True, "data.train": data,
               "eval.problems": "", "eval.kl_prompts": 0}  # fmt: skip
    assert launcher.main(["train", CONFIG, "--workdir=run", *settings(**changes)]) == 0
    run, twin = (
        writers.read_rows(tmp_path / "run" / name / "metrics.jsonl") for name in ("", "random")
    )
    assert run[0]["selection/selected"] == twin[0]["selection/selected"] == 5


def test_a_kernel_of_other_devices_is_refused_before_anything_is_written(capsys):
    argv = ["train", CONFIG, "--workdir=w", "--config.model.attention=splash"]
    refused(argv, r"'splash' is a kernel for TPUs, .* Use 'auto', or 'blocks'", capsys)


def test_a_reference_of_another_vocabulary_is_refused(tmp_path, capsys):
    spec = models.spec.ModelSpec(vocab=11, d_model=8, d_ff=8, layers=1, heads=2, eos_id=0)
    model = models.decoder.Model(spec)
    models.export(tmp_path / "other", model, model.init(jax.random.key(0)))
    changes = settings(**{"reference.path": tmp_path / "other"})
    said = "has 11 tokens in its vocabulary, and config.model.path has"
    refused(["train", CONFIG, "--workdir=run", *changes], said, capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", r"mine.py:1: SyntaxError"),
        ("x = 1\ndef get_config():\n    return y\n", r"mine.py:3: NameError: name 'y'"),
        ("x = 1\n", r"defines no function get_config"),
        ("def get_config():\n    pass\n", r"get_config\(\) returns a NoneType"),
        (
            "from sage_jax import config\ndef get_config():\n    c = config.default()\n"
            "    c.optim.learning_rate = 1.0\n    return c\n",
            r"mine.py:4: .*learning_rate|config.optim.learning_rate is not a setting",
        ),
    ],
)
def test_a_mistake_in_a_config_file_is_told_with_its_line(text, said, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    refused(["train", "--config=mine.py", "--workdir=run"], said, capsys)


def test_a_directory_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("important")
    (tmp_path / "file").write_text("")
    argv = ["train", CONFIG, *settings()]
    refused([*argv, "--workdir=mine"], "is not empty and holds no run", capsys)
    refused([*argv, "--workdir=file"], "--workdir=file is a file", capsys)


def test_a_defect_is_not_disguised_as_a_message_for_the_user(monkeypatch, capsys):
    def broken(run, workdir):
        np.zeros(3).reshape(2, 2)

    monkeypatch.setattr(modes, "doctor", broken)
    with pytest.raises(ValueError, match="cannot reshape"):
        launcher.main(["doctor", CONFIG])
    monkeypatch.setenv("SAGE_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is not a mode"):
        launcher.main(["trian", CONFIG])


def test_running_out_of_memory_says_what_to_lower(monkeypatch, capsys):
    def greedy(run, workdir):
        raise RuntimeError("RESOURCE_EXHAUSTED: 9 GB asked for, 8 GB there")

    monkeypatch.setattr(modes, "doctor", greedy)
    refused(["doctor", CONFIG], "RESOURCE_EXHAUSTED.*Lower train.batch_pairs", capsys, code=1)


def test_help_names_every_mode_and_version_the_package(capsys):
    assert launcher.main(["--help"]) == launcher.main(["train", "--help"]) == 0
    assert launcher.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {mode} " in out for mode in launcher.MODES)
    assert all(callable(getattr(modes, mode)) for mode in launcher.MODES)
    assert out.splitlines()[-1].startswith("sage_jax ")


# -- the modes -----------------------------------------------------------------------------------


def test_doctor_reports_bad_rows_by_line_and_writes_nothing(rows, capsys):
    data = rows({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, '{"prompt"', [1, 2])
    assert launcher.main(["doctor", CONFIG, f"--config.data.train={data}", "--workdir=run"]) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl:2: not valid JSON" in out and "rows.jsonl:3: list" in out
    assert sorted(p.name for p in pathlib.Path().iterdir()) == ["rows.jsonl"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    base = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGE_JAX_CACHE", str(base / "cache"))
        assert launcher.main(["train", CONFIG, f"--workdir={base / 'run'}", *settings()]) == 0
    return base / "run"


def test_rows_carry_the_numbers_of_speed_selection_and_curriculum(trained):
    rows = writers.read_rows(trained / "metrics.jsonl")
    for row in rows[:-1]:
        found = {k for k in row if k.startswith("perf/")}
        assert found >= {f"perf/{name}" for name in (
            "step_time", "tokens_per_second", "padding_fraction", "scoring_fraction",
            "data_wait_fraction")}  # fmt: skip
        assert row["perf/step_time"] > 0 and 0 <= row["perf/padding_fraction"] < 1
        assert 0 <= row["perf/data_wait_fraction"] <= 1
    assert rows[-2]["perf/data_wait_fraction"] > 0  # no wait at all would not have been measured
    assert rows[0]["selection/pool"] == 16 and rows[0]["selection/selected"] == 5  # a third
    share = [v for k, v in rows[0].items() if k.startswith("curriculum/share_")]
    assert share and sum(share) == pytest.approx(1)


def test_export_and_report_need_only_the_workdir_and_repeat_what_the_run_wrote(
    trained, tmp_path, capsys
):
    own = (trained / "export/model.safetensors").read_bytes()
    page = (trained / "report.html").read_text()
    (trained / "export").rename(tmp_path / "export")
    (trained / "report.html").unlink()
    # As on another machine: a mesh that does not fit the devices, whose layout no file shows.
    assert launcher.main(["export", f"--workdir={trained}", "--config.mesh.tensor=3"]) == 0
    assert launcher.main(["report", f"--workdir={trained}"]) == 0
    assert (trained / "export/model.safetensors").read_bytes() == own
    assert "<html" in page and "<html" in (trained / "report.html").read_text()
    out = capsys.readouterr().out
    assert "does not fit the 8 devices here: mesh.fsdp=8" in out
    assert "step 2: " in out and str(trained / "report.html") in out


def test_other_data_under_the_same_name_does_not_continue_a_run(trained, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    lines = PAIRS.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:40]))
    command = ["train", CONFIG, "--workdir=run", *settings(**{"data.train": data})]
    assert launcher.main([*command, "--config.train.steps=1"]) == 0
    (tmp_path / "run/summary.json").unlink()
    data.write_text("".join(lines[1:41]))
    assert launcher.main([*command, "--config.train.steps=1"]) == 2
    assert "config.data.train has the same name" in capsys.readouterr().err


def test_settings_may_be_corrected_until_the_first_row(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    writers.write_json(run / "config.json", {"mode": "train", "seed": 5})
    command = ["train", CONFIG, "--workdir=run", "--config.model.path=none"]
    assert launcher.main(command) == 2
    assert "'none' does not exist" in capsys.readouterr().err  # so it came past the comparison
    assert launcher.main(["sft", *command[1:]]) == 2  # and the mode, too
    assert "'none' does not exist" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    assert launcher.main(command) == 2
    assert "config.seed was 5, now 0" in capsys.readouterr().err
    assert launcher.main(["sft", *command[1:]]) == 2
    assert "holds a run of the mode 'train', not 'sft'" in capsys.readouterr().err


def test_eval_agrees_with_decoding_without_cache_one_token_at_a_time(capsys):
    argv = ["eval", CONFIG, "--workdir=out", *settings(**{"data.eval": PAIRS})]
    assert launcher.main(argv) == 0
    found = json.loads(pathlib.Path("out/eval.json").read_text())
    model, params = models.load("package:sage_jax/assets/quickstart")
    tokenizer = models.load_tokenizer("package:sage_jax/assets/quickstart")
    task = tasks.resolve("arithmetic")
    trained = {row["prompt"] for row in writers.read_rows(PAIRS)}
    logits = jax.jit(model.logits)
    right = count = 0
    for problem in tasks.problems(task, count=8, seed=0, split="eval"):
        assert problem.prompt not in trained
        ids = list(tokenizer(problem.prompt)["input_ids"])
        start = len(ids)
        while len(ids) < start + SMALL["eval.max_new_tokens"]:
            padded = np.zeros((1, 80), np.int32)  # causal: what follows changes nothing
            padded[0, : len(ids)] = ids
            token = int(np.argmax(logits(params, jnp.asarray(padded))[0, len(ids) - 1]))
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        right, count = right + task.check(text, problem.answer), count + 1
    assert found["eval_accuracy"] == right / count
    assert 0 < found["eval_likelihood_accuracy"] < 1
    assert found["eval_rewards/accuracies"] == 0.0  # the reference is the model itself
    out = capsys.readouterr().out
    assert "greedy accuracy (95 %)" in out and "answers are likelier" in out


def test_eval_leaves_out_problems_that_were_trained_on(rows):
    task = tasks.resolve("arithmetic")
    problems = tasks.problems(task, count=4, seed=0, split="eval")
    data = rows(*({"prompt": p.prompt, "chosen": "1", "rejected": "2"} for p in problems[:3]))
    from sage_jax import config
    from sage_jax.runtime import dataset, evaluation, setup

    run = config.resolve({
        "model": {"path": "package:sage_jax/assets/quickstart"}, "data": {"train": data},
        "eval": {"problems": "task:arithmetic", "count": 4},
    })  # fmt: skip
    tokenizer = setup.load_tokenizer(run)
    held = evaluation.held_out(run, tokenizer, dataset.load_pairs(run, tokenizer, data))
    assert len(held.problems) == 4 and held.seen == 3
    assert not {p.prompt for p in held.problems} & {p.prompt for p in problems[:3]}
    alone = evaluation.held_out(run, tokenizer, None)
    assert alone.problems == problems and alone.seen == 0


def test_score_writes_the_rows_that_the_selection_rule_keeps_unchanged(tmp_path, capsys):
    source = [json.loads(line) for line in PAIRS.read_text().splitlines()[:40]]
    bad = [{"prompt": "1+1="}]
    (tmp_path / "all.json").write_text(json.dumps(bad + source))  # one line: no row has its own
    changes = {"data.train": "all.json", "data.limit": 0, "data.on_bad_row": "skip",
               "selection.keep": 0.3, "curriculum.difficulty": "level"}  # fmt: skip
    argv = ["score", CONFIG, "--workdir=out", *settings(**changes)]
    assert launcher.main(argv) == 0
    found = writers.read_rows(tmp_path / "out/scores.jsonl")
    kept = writers.read_rows(tmp_path / "out/selected.jsonl")
    assert [source[i] for i, row in enumerate(found) if row["selected"]] == kept
    assert len(found) == 40 and len(kept) == 12
    again = selection.select_pool(
        rules.sage(
            rules.candidates(scores.PairScores(*(
                np.array([row[name] for row in found], np.float32)
                for name in scores.PairScores._fields
            )), curriculum.init_memory(40)), None,
        ),
        np.array([row["stratum"] for row in found]), np.arange(40), keep=0.3, uniform_share=0.0,
        rng=np.random.default_rng(np.random.SeedSequence([0, 0, 1])),
    )  # fmt: skip
    assert [row["selected"] for row in found] == again.selected_P.tolist()
    assert all(row["reward_margin"] == 0 for row in found)
    assert launcher.main(argv) == 2
    assert "scores.jsonl exists. Name another --workdir" in capsys.readouterr().err


def test_score_leaves_the_directory_of_another_run_alone(trained, capsys):
    before = (trained / "config.json").read_text()
    assert launcher.main(["score", CONFIG, f"--workdir={trained}", *settings()]) == 2
    assert "config.json exists. Name another --workdir" in capsys.readouterr().err
    assert (trained / "config.json").read_text() == before


def test_score_says_before_the_pass_which_column_of_parquet_json_cannot_hold(tmp_path, capsys):
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()[:40]]
    rows = [row | {"when": datetime.date(2026, 1, 2)} for row in rows]
    pq.write_table(pa.Table.from_pylist([row | {"image": b"x"} for row in rows]), "a.parquet")
    argv = ["score", CONFIG, "--workdir=out", *settings()]
    said = "a.parquet:1: column 'image' is a bytes"
    refused([*argv, "--config.data.train=a.parquet"], said, capsys)
    pq.write_table(pa.Table.from_pylist(rows), "b.parquet")
    assert launcher.main([*argv, "--config.data.train=b.parquet"]) == 0
    kept = writers.read_rows(tmp_path / "out/selected.jsonl")
    assert kept and all(row["when"] == "2026-01-02" for row in kept)


def test_score_against_another_reference_gives_reward_margins(trained, tmp_path):
    changes = {"reference.path": "package:sage_jax/assets/quickstart",
               "model.path": trained / "export", "optim.lr": 1e-3}  # fmt: skip
    assert launcher.main(["score", CONFIG, "--workdir=out", *settings(**changes)]) == 0
    found = writers.read_rows(tmp_path / "out/scores.jsonl")
    assert np.abs([row["reward_margin"] for row in found]).max() > 1e-4


def test_a_selector_of_ones_own_is_given_scores(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "import numpy as np\n"
        "def best(known, rng):\n"
        "    assert np.std(known.pairs.score) > 0\n"
        "    return known.pairs.score\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"selection.name": "my_rules:best", "train.steps": 1, "eval.problems": "",
               "selection.soft": 0.5, "curriculum.sharpness": 0.0}  # fmt: skip
    assert launcher.main(["train", CONFIG, "--workdir=run", *settings(**changes)]) == 0


def test_sample_writes_verified_pairs_once(tmp_path, capsys):
    changes = {"sample.count": 16, "sample.per_problem": 4, "eval.batch": 64}
    argv = ["sample", CONFIG, "--workdir=out", *settings(**changes)]
    assert launcher.main(argv) == 0
    task = tasks.resolve("arithmetic")
    pairs = writers.read_rows(tmp_path / "out/pairs.jsonl")
    assert pairs
    for row in pairs:
        assert task.check(row["chosen"], row["answer"])
        assert not task.check(row["rejected"], row["answer"])
        assert tasks.split_of(row["prompt"]) == "train" and 0 < row["pass_rate"] < 1
    assert f"{len(pairs)} pairs from" in capsys.readouterr().out
    assert launcher.main(argv) == 2
    assert "pairs.jsonl exists" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_of_the_help_gets_no_traceback():
    for command in ("sage_jax --help", "sage_jax.config"):
        read, write = os.pipe()
        os.close(read)
        run = subprocess.run(
            [sys.executable, "-m", *command.split()], stdout=write, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
        )  # fmt: skip
        os.close(write)
        assert run.stderr == b""


@pytest.mark.slow
def test_sft_learns_a_users_own_rows(rows, tmp_path):
    data = rows(*({"prompt": f"{a}+{b}=", "completion": f"{a}+{b}={a + b}"}
                  for a in range(1, 5) for b in range(1, 5)))  # fmt: skip
    changes = {"data.train": data, "data.limit": 0, "train.steps": 6, "optim.lr": 1e-3,
               "optim.warmup": 0.0, "curriculum.pool_size": 0, "eval.problems": ""}  # fmt: skip
    assert launcher.main(["sft", CONFIG, "--workdir=run", *settings(**changes)]) == 0
    losses = [row["loss"] for row in writers.read_rows(tmp_path / "run/metrics.jsonl")[:-1]]
    assert losses[-1] < losses[0]
    logs = sorted(path.name for path in (tmp_path / "run/selection").iterdir())
    assert logs == [f"round_{n:05d}.jsonl" for n in range(2)]  # and nobody is suspected
    for row in writers.read_rows(tmp_path / "run/selection" / logs[-1]):
        assert row["selected"] and row["why"] == "all"
    model, params = models.load(tmp_path / "run/export")
    assert np.isfinite(model.logits(params, jnp.array([[1, 2, 3]]))).all()
