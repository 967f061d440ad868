"""The claim, at the smallest size at which it is robust: SAGE's mean curve lies above uniform's."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_mean_curve_of_sage_lies_above_that_of_uniform(tmp_path):
    out = tmp_path / "compare.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/quickstart_compare.py", "--world=shipped",
         "--seeds=0,1", "--steps=75", "--methods=sage,uniform", "--set", "eval.count=400",
         f"--out={out}"],
        check=True, capture_output=True, timeout=900, cwd=tmp_path,
        env=os.environ | {
            "SAGE_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",  # it trains for minutes: here optimised programs pay
        },
    )  # fmt: skip
    found = json.loads(out.read_text())
    sage, uniform = found["summary"]["sage"], found["summary"]["uniform"]
    assert sage["accuracy_before"] == uniform["accuracy_before"]
    assert sage["minus_uniform_over_step"]["mean"] > 0
    assert sage["minus_uniform_over_flops"]["mean"] > 0  # with what scoring costs
    assert uniform["minus_uniform_over_step"]["mean"] == 0
    for curves in found["curves"].values():
        for points in curves.values():
            assert [p["step"] for p in points] == [0, 25, 50, 75]
            assert points[-1]["accuracy"] > points[0]["accuracy"]
    assert "| sage |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000
