"""Who takes part in a run: what each kind of cluster tells a process, and what flags say."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from sage_jax.runtime import hosts

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),  # srun of one task
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # a shell of salloc, outside of srun
        (OMPI, "ompi"),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (POD, None),  # any container of a cluster
        (POD | {"JOB_COMPLETION_INDEX": "3"}, "kubernetes"),
    ],
)
def test_only_one_of_several_processes_joins_others(environ, kind):
    assert hosts.detect(environ | {"JAX_PLATFORMS": "cpu"}) == kind


def test_an_mpi_that_jax_cannot_ask_needs_mpi4py_or_flags(monkeypatch):
    environ = {"PMI_SIZE": "2", "PMI_RANK": "0", "JAX_PLATFORMS": "cpu"}
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Install mpi4py, or give --coordinator"):
        hosts.detect(environ)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "mpi4py")
    assert hosts.detect(environ) == "mpi4py"


def test_a_tpu_host_is_asked_unless_another_platform_is_wanted(monkeypatch):
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert hosts.detect({}) == "tpu"
    for other in ({"JAX_PLATFORMS": "cpu"}, {"TPU_SKIP_MDS_QUERY": "1"}):
        assert hosts.detect(other) is None


def test_what_flags_leave_out_the_environment_says():
    known = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
    assert hosts.take_flags(["eval"], known) == (
        ["eval"],
        hosts.Launch("a:1", 4, 2),
        hosts.JOIN,
    )
    assert hosts.take_flags(["--process-id=3"], known)[1] == hosts.Launch("a:1", 4, 3)
    alone = {"JAX_COORDINATOR_ADDRESS": "a:1"}  # the cluster says the rest
    assert hosts.take_flags(["eval"], alone) == (["eval"], None, hosts.JOIN)


@pytest.mark.parametrize(
    ("tasks", "whole"),
    [("1", True), ("1(x4)", True), ("1,1(x2)", True), ("8(x2)", False), ("2,1", False)],
)
def test_a_task_alone_on_its_node_has_all_of_its_devices(tasks, whole):
    assert hosts.whole_node({"SLURM_STEP_TASKS_PER_NODE": tasks}) == whole


def test_one_process_agrees_with_itself_and_prints_what_failed(capsys):
    assert hosts.on_first(lambda: 3) == hosts.agree(3) == 3
    hosts.same("settings", object())
    assert hosts.first() and not hosts.several()
    assert hosts.failed("no such file", 2) == 2
    assert capsys.readouterr().err == "sage-jax: no such file\n"


@pytest.mark.slow
def test_processes_end_in_words_when_one_of_them_never_comes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "sage_jax", "train", "--config=quickstart"]
    flags = [f"--workdir={tmp_path / 'run'}", f"--coordinator={at}", "--num_processes=3"]
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [*command, *flags, f"--process_id={i}", "--join_timeout=6"],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in (0, 2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], said
    assert time.monotonic() - began < 60
    for i, text in zip((0, 2), said, strict=True):
        waits, ends = text.splitlines()
        assert re.fullmatch(rf"sage-jax: process {i} on \S+ waits for the others at {at}", waits)
        assert f"not all of the 3 processes were there at {at} within 6 seconds" in ends
        assert "--join_timeout=SECONDS waits longer" in ends
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--join_timeout=0", "--join_timeout=soon", "--join_timeout"])
def test_how_long_to_wait_is_whole_seconds(flag):
    assert hosts.take_flags(["eval", "--join-timeout", "600"], {}) == (["eval"], None, 600)
    with pytest.raises(ValueError, match=r"--join_timeout=.* has to be whole seconds"):
        hosts.take_flags(["eval", flag], {})
