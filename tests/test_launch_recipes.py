"""The launch recipes of docs/launch, run with stand-ins for the clusters' own commands."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from sage_jax import __main__ as launcher
from sage_jax import config
from sage_jax.runtime import hosts

RECIPES = pathlib.Path(__file__).parent.parent / "docs" / "launch"


def stand_in(folder: pathlib.Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """Commands of SLURM that write down how they were called; srun runs what it is given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    stand_in(tools, "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    stand_in(tools, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    environ = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "WORKDIR": str(tmp_path / "run"),
        "SLURM_JOB_ID": "7",
    }
    return tmp_path, tools, environ


def start(environ, tools, training: str) -> subprocess.Popen:
    stand_in(tools, "fake_python", training)
    return subprocess.Popen(
        ["bash", str(RECIPES / "slurm.sbatch"), "--config=quickstart"],
        env=environ | {"PYTHON": str(tools / "fake_python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_slurm_ends_with_the_run(cluster):
    where, tools, environ = cluster
    job = start(environ, tools, f'echo "$@" > {where}/args; mkdir {where}/run; '
                                f"touch {where}/run/summary.json")  # fmt: skip
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and "finished" in out
    assert (where / "args").read_text().split() == [
        "-m", "sage_jax", "train", f"--workdir={where}/run", "--config=quickstart"
    ]  # fmt: skip
    assert not (where / "scontrol.log").exists()


def test_slurm_passes_a_failure_on_and_does_not_try_it_again(cluster):
    where, tools, environ = cluster
    job = start(environ, tools, "echo broken; exit 2")
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and "broken" in out
    assert not (where / "scontrol.log").exists()


def test_slurm_lets_a_preempted_run_save_and_queues_it_again(cluster):
    where, tools, environ = cluster
    # A run that takes a second to save, like ours on SIGTERM.
    trap = f"trap 'sleep 1; touch {where}/saved; exit 0' TERM"
    job = start(environ, tools, f"{trap}\ntouch {where}/started\nwhile true; do sleep 0.1; done")
    deadline = time.monotonic() + 20
    while not (where / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert (where / "saved").exists() and job.returncode == 0, out
    assert (where / "scontrol.log").read_text().split() == ["requeue", "7"]


def settings(arguments: list[str]) -> config.Run:
    """What the launcher makes of a command line: every flag and key exists and is checked."""
    rest, _, _ = hosts.take_flags(arguments, {})
    mode, found, _ = launcher.parse(rest)
    assert mode == "train"
    return config.resolve(found)


def test_the_kubernetes_job_is_a_command_that_the_launcher_takes():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((RECIPES / "gke.yaml").read_text())
    work = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = work["template"]["spec"]["containers"][0]
    run = settings(container["command"][1:] + container["args"])
    chips = work["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == run.mesh.data * run.mesh.fsdp * run.mesh.tensor * run.mesh.context == 256
    assert run.checkpoint.directory.startswith("gs://")


def dry_run(recipe: str, **environ: str) -> str:
    done = subprocess.run(
        ["bash", str(RECIPES / recipe), "--config.train.steps=5"],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **environ},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tpu_vm_recipe_starts_the_same_command_on_all_hosts():
    out = dry_run(
        "tpu_vm.sh", NAME="llama", ZONE="z", TYPE="v5litepod-256", BUCKET="gs://b",
        MODEL="gs://b/m", DATA="gs://b/d", CONFIG="llama3_8b_v5e256", SPOT="1",
    )  # fmt: skip
    lines = [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud")]
    create = next(line for line in lines if "create" in line)
    assert "--accelerator-type=v5litepod-256" in create and "--spot" in create
    sent = [line[-1].removeprefix("--command=") for line in lines if "--worker=all" in line]
    train = shlex.split(sent[-1].split(";")[0])
    run = settings(train[1:])
    assert run.train.steps == 5
    assert run.checkpoint.directory == "gs://b/llama/checkpoints"


def test_the_xpk_recipe_is_a_command_that_the_launcher_takes():
    out = dry_run("xpk.sh", CLUSTER="c", ZONE="z", TYPE="v5litepod-256", IMAGE="i", BUCKET="b",
                  NAME="llama", CONFIG="llama3_8b_v5e256")  # fmt: skip
    command = next(a for a in shlex.split(out) if a.startswith("--command="))
    assert settings(shlex.split(command.removeprefix("--command="))[1:]).train.steps == 5


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    files = [str(f) for f in RECIPES.iterdir() if f.suffix in (".sh", ".sbatch")]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
