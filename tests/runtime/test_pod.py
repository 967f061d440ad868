"""Meshes and processes: the same run on one device, on eight, and as two processes of four."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pod_worker
import pytest

from sage_jax import __main__ as launcher
from sage_jax.report import writers
from sage_jax.runtime import mesh as meshes

HERE = pathlib.Path(__file__).parent
PARTS = {"data=8": 1, "fsdp=8": 8, "fsdp=4 x tensor=2": 8, "data=2 x fsdp=2 x tensor=2": 4}
ONE = "one device"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """Some processes of one command, which end with the test whatever happens."""

    def __init__(self, command, count, tmp_path, devices, env=None):
        port = free_port()
        self.files = [tmp_path / f"process{i}" for i in range(count)]
        self.all = []
        for i in range(count):
            one = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            # Killed, it must not leave half a program for others: it reads theirs, no more.
            one |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": str(2**40)}
            one |= (env or {}).get(i, {})
            flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}",
                     f"--process_id={i}"]  # fmt: skip
            argv = [sys.executable, *command, *(flags if count > 1 else [])]
            with self.files[i].open("w") as out:
                self.all.append(
                    subprocess.Popen(argv, env=one, stdout=out, stderr=subprocess.STDOUT)
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.all:
            process.kill()  # a SIGTERM is for the run to save; it does not end it
            process.wait()

    def wait(self, seconds):
        """Exit codes; those still running after that many seconds are an error."""
        end = time.monotonic() + seconds
        for process in self.all:
            try:
                process.wait(max(end - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {seconds} s: {self.said()}") from None
        return [process.returncode for process in self.all]

    def said(self):
        return [file.read_text()[-3000:] for file in self.files]

    def wait_for_rows(self, workdir, count, seconds=600):
        path, end = workdir / "metrics.jsonl", time.monotonic() + seconds
        while time.monotonic() < end:
            if path.exists() and path.read_text().count("\n") >= count:
                return
            if any(process.poll() is not None for process in self.all):
                raise AssertionError(f"ended early: {self.said()}")
            time.sleep(0.05)
        raise AssertionError(f"no {count} rows in {seconds} s: {self.said()}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory, cache):
    """The run by mesh, made when it is asked for."""
    base, known = tmp_path_factory.mktemp("one"), {}

    def train(name):
        if name not in known:
            one = {"devices": jax.devices()[:1]}
            mesh = meshes.make_mesh(**(one if name == ONE else pod_worker.MESHES[name]))
            workdir = base / name.replace(" ", "")
            workdir.mkdir()
            known[name] = pod_worker.train(mesh, workdir, cache)
        return known[name]

    return train


def assert_same_run(found, expected):
    assert len(expected["losses"]) == pod_worker.STEPS
    assert len({round(loss, 4) for loss in expected["losses"]}) > 10  # it does train
    assert found["selected"] == expected["selected"]
    assert found["trained"] == expected["trained"]
    assert found["plan"] == expected["plan"]
    assert found["fingerprint"] == expected["fingerprint"]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-5)


def assert_split(found, parts):
    for what in ("params", "opt_state"):
        mine, whole = found[what]
        assert whole / parts <= mine <= 1.1 * whole / parts, what


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PARTS))
def test_eight_devices_train_as_one_and_hold_their_part_each(in_one_process, name):
    found = in_one_process(name)
    assert_same_run(found, in_one_process(ONE))
    assert_split(found, PARTS[name])


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_and_read_their_part_each(
    in_one_process, tmp_path
):
    out = tmp_path / "found.json"
    command = [str(HERE / "pod_worker.py"), str(out)]
    with Processes(command, 2, tmp_path, devices=4) as processes:
        assert processes.wait(550) == [0, 0], processes.said()
    expected = in_one_process(ONE)
    for name, found in json.loads(out.read_text()).items():
        assert_same_run(found, expected)
        assert_split(found, PARTS[name])
        whole = found["params"][1]
        share = {"data=8": 1.0, "data=2 x fsdp=2 x tensor=2": 1.0}.get(name, 0.5)
        for read in found["read_by_all"]:
            assert share * whole <= read <= (share + 0.02) * whole, name


@pytest.mark.slow
def test_a_run_goes_on_under_another_mesh_with_the_same_pairs_and_losses(
    in_one_process, tmp_path, cache
):
    stops = ("fsdp=8", 4), ("data=2 x fsdp=2 x tensor=2", 13), (ONE, None)
    for name, after in stops:  # 3 steps a round: both stops lie inside of one
        one = {"devices": jax.devices()[:1]}
        mesh = meshes.make_mesh(**(one if name == ONE else pod_worker.MESHES[name]))
        found = pod_worker.train(mesh, tmp_path, cache, stop_after=after)
        assert found["finished"] == (after is None)
    assert_same_run(found, in_one_process(ONE))


def command(workdir, **changes):
    settings = {
        "train.steps": 400, "train.batch_pairs": 8, "curriculum.pool_size": 48, "data.limit": 96,
        "eval.count": 8, "eval.every": 4, "eval.batch": 8, "eval.max_new_tokens": 24,
        "checkpoint.every": 2, "compare.uniform": False, "eval.kl_prompts": 0,
        "selection.keep": 0.5, "mesh.data": 1, "mesh.fsdp": -1,
    } | changes  # fmt: skip
    return ["-m", "sage_jax", "train", "--config=quickstart", f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in settings.items())]  # fmt: skip


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_killing_one_of_two_ends_both_and_one_process_goes_on(tmp_path, own_cache):
    workdir = tmp_path / "run"
    with Processes(command(workdir), 2, tmp_path, devices=4) as processes:
        processes.wait_for_rows(workdir, 7)
        processes.all[1].send_signal(signal.SIGKILL)
        codes = processes.wait(60)
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
        assert re.search("of this run is gone|another task died", processes.said()[0])
    rows = writers.read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 4]
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")
                   if path.name.isdigit())  # fmt: skip
    assert saved and saved[-1] >= 4

    # The same command on one device. Only where it stops may be new, so that it ends in time.
    with Processes(command(workdir), 1, tmp_path, devices=1) as process:
        process.wait_for_rows(workdir, saved[-1] + 6)
        process.all[0].send_signal(signal.SIGTERM)
        assert process.wait(120) == [0], process.said()
        assert "Stopped after step" in process.said()[0]
    after = writers.read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in after] == list(range(len(after)))
    for old, new in zip(rows[: saved[-1]], after, strict=False):  # what was saved stays
        assert old == new
    for old, new in zip(rows[saved[-1] :], after[saved[-1] :], strict=False):  # what was not
        assert old["pairs"] == new["pairs"]
        np.testing.assert_allclose(new["loss"], old["loss"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_stop_or_a_failure_of_one_process_is_that_of_both(tmp_path, own_cache, monkeypatch):
    workdir = tmp_path / "run"
    with Processes(command(workdir), 2, tmp_path, devices=4) as processes:
        processes.wait_for_rows(workdir, 3)
        processes.all[1].send_signal(signal.SIGTERM)
        assert processes.wait(120) == [0, 0], processes.said()
        assert "Stopped after step" in processes.said()[0]
        assert "Stopped after step" not in processes.said()[1]  # the first speaks for both

    (tmp_path / "broken_rule.py").write_text(
        "import os\n"
        "def order(known, rng):\n"
        "    if os.environ.get('BREAKS'):\n"
        "        raise ValueError('the rule of this host is broken')\n"
        "    return rng.random(len(known.pair_P))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = command(tmp_path / "broken", **{"selection.name": "broken_rule:order"})
    with Processes(broken, 2, tmp_path, devices=4, env={1: {"BREAKS": "1"}}) as processes:
        codes = processes.wait(180)
        assert codes[0] == 1 and codes[1] in (1, 2)
        first, second = processes.said()
        assert "process 1 on" in first and "the rule of this host is broken" in first
        assert "the rule of this host is broken" in second


@pytest.mark.slow
def test_processes_with_other_commands_are_refused_everywhere(tmp_path, own_cache):
    port, processes = free_port(), []
    for i in range(2):
        argv = command(tmp_path / "run", seed=i)
        flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, *argv, *flags],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 2], said
    for text in said:
        assert "settings of this process are not those of the first process" in text
    assert not (tmp_path / "run").exists()


def test_flags_of_a_launch_are_checked(capsys):
    for flags, words in (
        (["--num_processes=2"], "--coordinator is missing"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "in \\[0, 2\\)"),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], "is not HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=two", "--process_id=0"], "whole numbers"),
    ):
        assert launcher.main(["train", "--config=quickstart", *flags]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.search(words, err), err
