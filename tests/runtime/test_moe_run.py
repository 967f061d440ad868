"""A whole run of a mixture of experts with the load-balancing loss."""

import contextlib
import json
import pathlib

import jax
import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import models
from sage_jax.runtime import interrupt

ROOT = pathlib.Path(__file__).resolve().parents[2]
ASSETS = ROOT / "sage_jax" / "assets" / "quickstart"
EXPERTS, CHOSEN = 4, 2
SETTINGS = {
    "train.steps": 8, "train.batch_pairs": 8, "curriculum.pool_size": 32, "data.limit": 64,
    "checkpoint.every": 4, "eval.problems": "", "eval.every": 0, "eval.kl_prompts": 0,
    "compare.uniform": False, "selection.keep": 0.5, "optim.lr": 5e-3, "loss.nll_weight": 0.0,
    "mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4,
}  # fmt: skip


def train(workdir, model, weight):
    changes = SETTINGS | {"model.path": model, "model.router_aux": weight}
    settings = [f"--config.{k}={v}" for k, v in changes.items()]
    config = f"--config={ROOT / 'configs/quickstart.py'}"
    return launcher.main(["train", config, f"--workdir={workdir}", *settings])


def rows_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines
    ]


def shares(directory):
    """What the routers of an export make of some answers: each expert's share of the load."""
    model, params = models.load(directory)
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab, (8, 32), dtype=np.int32)
    place = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    *_, balance = model._rows(
        params, tokens, place, np.ones_like(tokens), None, real_BT=np.ones_like(tokens, bool)
    )
    chosen = np.asarray(balance.chosen_X, np.float64).sum(axis=0)
    return chosen / chosen.sum()


@pytest.mark.slow
def test_a_run_balances_its_experts_and_goes_on_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_JAX_CACHE", str(tmp_path / "cache"))
    tokenizer = models.load_tokenizer(ASSETS)
    spec = models.ModelSpec(
        vocab=len(tokenizer), d_model=32, d_ff=32, layers=2, heads=4, kv_heads=2, tied=True,
        family="qwen3_moe", experts=EXPERTS, experts_per_token=CHOSEN, router_aux=0.5,
        eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = models.Model(spec)
    params = jax.jit(model.init)(jax.random.key(0))
    # Routers that prefer two experts: of what all tokens have in common they make a bias.
    params["embed"]["embedding"] += 0.03
    params["layers"]["mlp"]["router"]["kernel"] += 0.02 * np.arange(EXPERTS, dtype=np.float32)
    models.export(tmp_path / "model", model, params, tokenizer=tokenizer)

    assert train(tmp_path / "on", tmp_path / "model", -1) == 0  # the weight of config.json
    assert train(tmp_path / "off", tmp_path / "model", 0) == 0
    rows, without = rows_of(tmp_path / "on"), rows_of(tmp_path / "off")
    found = [row["router_aux"] for row in rows if "loss" in row]
    assert len(found) == SETTINGS["train.steps"] and found[0] > 1.2 * CHOSEN  # even: CHOSEN
    assert not any("router_aux" in row for row in without)
    # The pair loss is that of the first row in both; the penalty is what comes on top.
    first = rows[0]["loss"] - without[0]["loss"]
    assert first == pytest.approx(spec.router_aux * found[0], rel=1e-4)
    assert abs(found[-1] - CHOSEN) < 0.5 * (found[0] - CHOSEN)

    def uneven(directory):
        return float(np.std(shares(directory)))

    start, on, off = (uneven(tmp_path / at) for at in ("model", "on/export", "off/export"))
    assert on < 0.8 * off and on < 0.8 * start

    calls = []

    @contextlib.contextmanager
    def after_five():
        yield lambda: calls.append(1) or len(calls) >= 5

    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "stop_signal", after_five)
        assert train(tmp_path / "again", tmp_path / "model", -1) == 0
    assert not (tmp_path / "again" / "summary.json").exists()
    assert train(tmp_path / "again", tmp_path / "model", -1) == 0
    assert rows_of(tmp_path / "again") == rows
    weights = [tmp_path / at / "export" / "model.safetensors" for at in ("on", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
