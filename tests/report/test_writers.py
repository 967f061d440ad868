"""Files of a run: valid JSON, whole rows, and a resumed run that repeats none."""

import errno
import json
import os
import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax.report import writers


def strict(text: str):
    """Parses JSON as other languages do: NaN and Infinity are errors."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_are_on_disk_when_write_returns(tmp_path):
    writer = writers.MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 0, "loss": np.float32(0.5), "rewards/margins": jnp.float32(-0.25)})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0, "loss": 0.5, "rewards/margins": -0.25,
    }  # fmt: skip
    writer.close()


def test_numbers_survive_exactly(tmp_path):
    value = np.float32(0.1)
    with writers.MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"step": 1, "loss": value, "third": 1 / 3})
    (row,) = writers.read_rows(tmp_path / "m.jsonl")
    assert np.float32(row["loss"]) == value
    assert row["third"] == 1 / 3


def test_what_is_not_finite_becomes_null(tmp_path):
    with writers.MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write(
            {"step": 0, "a": float("nan"), "b": np.float32(np.inf), "c": jnp.float32(-np.inf)}
        )
    row = strict((tmp_path / "m.jsonl").read_text())
    assert row == {"step": 0, "a": None, "b": None, "c": None}
    path = writers.write_json(tmp_path / "s.json", {"x": [np.nan, 1.0], "y": {"z": np.inf}})
    assert strict(path.read_text()) == {"x": [None, 1.0], "y": {"z": None}}


def test_a_resumed_run_drops_the_rows_that_it_is_going_to_write_again(tmp_path):
    path = tmp_path / "m.jsonl"
    with writers.MetricsWriter(path) as writer:
        for step in range(10):
            writer.write({"step": step, "loss": step / 10})
    before = path.read_text().splitlines()
    with open(path, "a") as file:
        file.write('{"step": 10, "lo')  # killed in the middle of a row
    with writers.MetricsWriter(path, after_step=6) as writer:
        assert path.read_text().splitlines() == before[:7]
        writer.write({"step": 7, "loss": 0.7})
    assert path.read_text().splitlines() == before[:8]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 3}\n')
    with writers.MetricsWriter(tmp_path / "m.jsonl"):
        assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_row_needs_a_whole_step(tmp_path):
    with writers.MetricsWriter(tmp_path / "m.jsonl") as writer:
        with pytest.raises(ValueError, match=r"step=1\.5; it must be an int"):
            writer.write({"step": 1.5})
        with pytest.raises(ValueError, match="step=None"):
            writer.write({"loss": 1.0})


def test_what_json_cannot_hold_is_refused_by_value():
    with pytest.raises(TypeError, match="is a object; a JSON file holds"):
        writers.plain({"a": object()})
    assert writers.plain((1, pathlib.Path("a") / "b", np.bool_(True))) == [1, "a/b", True]


def test_a_bad_line_is_named_and_a_cut_last_line_is_not_an_error(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: .*one JSON object"):
        writers.read_rows(path)
    path.write_text('{"step": 0}\n[1]\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: '\[1\]' is not a JSON object"):
        writers.read_rows(path)
    path.write_text('{"step": 0}\n{"st')
    assert writers.read_rows(path) == [{"step": 0}]
    assert writers.read_rows(tmp_path / "missing.jsonl") == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = writers.write_json(tmp_path / "s.json", {"a": 1})
    with pytest.raises(TypeError):
        writers.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*config\.json"):
        writers.write_json(tmp_path / "config.json", {"steps": 3})
    assert list(tmp_path.iterdir()) == []  # what is left would make this a directory of another


def test_selections_are_one_file_a_round(tmp_path):
    rows = [
        {"pair": 4, "stratum": 1, "margin": np.float32(-2), "score": 3.5, "selected": True,
         "why": "score"},
        {"pair": 9, "stratum": 0, "margin": np.nan, "score": 0.1, "selected": False, "why": "rank"},
    ]  # fmt: skip
    writers.write_selection(tmp_path, 12, rows)
    found = writers.read_rows(tmp_path / "selection" / "round_00012.jsonl")
    assert found[0] == rows[0] | {"margin": -2.0}
    assert found[1] == rows[1] | {"margin": None}


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "first_process", lambda: False)
    with writers.MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"step": 0})
    writers.write_selection(tmp_path, 0, [{"pair": 1}])
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_mirrors_the_numbers(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            calls.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self): ...
        def close(self): ...

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    with writers.MetricsWriter(tmp_path / "m.jsonl", 4, tensorboard=tmp_path / "tb") as writer:
        writer.write({"step": 5, "loss": np.float32(0.5), "bad": np.nan, "name": "x"})
    assert calls == [(str(tmp_path / "tb"), 5), ("loss", 0.5, 5)]


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'sage_jax\[report\]'"):
        writers.MetricsWriter(tmp_path / "m.jsonl", tensorboard=tmp_path)
