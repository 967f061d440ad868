"""Whole runs with adapters: reference, resume, export, and going on from an adapter."""

import contextlib
import json
import math
import pathlib
import statistics

import jax
import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config, models
from sage_jax.models import lora, peft_files, quantised, tensors
from sage_jax.runtime import interrupt, lowering, setup
from sage_jax.runtime import mesh as meshes

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "train.steps": 6, "train.batch_pairs": 8, "curriculum.pool_size": 48, "checkpoint.every": 3,
    "eval.count": 8, "eval.every": 3, "eval.batch": 8, "compare.uniform": False,
    "data.limit": 100, "loss.beta": 0.5, "loss.nll_weight": 0.0, "optim.lr": 1e-3,
    "eval.kl_prompts": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
    "selection.keep": 0.5, "selection.uniform_share": 0.5, "selection.refresh": 0.5,
    "selection.scoring_dtype": "bfloat16", "eval.max_new_tokens": 8,
}  # fmt: skip
QLORA = {"lora.base": "nf4", "optim.lr": 1e-2}
LORA = {"lora.rank": 4, "lora.targets": "attention/[qv]$|mlp/up"}


def command(mode, workdir, **changes):
    settings = [f"--config.{k}={v}" for k, v in (SMALL | changes).items()]
    return [mode, f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={workdir}", *settings]


def rows_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    where = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGE_JAX_CACHE", str(where))
        yield where


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    where = tmp_path_factory.mktemp("lora") / "run"
    assert launcher.main(command("train", where, **LORA)) == 0
    return where


@pytest.mark.slow
def test_the_first_loss_is_ln_2_and_the_reference_is_that_of_the_base(run, cache):
    rows = rows_of(run)
    # Two programs over rows that are packed in two ways, on eight devices; exact: test_lora.py.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)  # of two programs, on a mesh
    assert rows[0]["rewards/accuracies"] == 0
    assert rows[-2]["loss"] != rows[0]["loss"]
    assert rows[0]["eval_kl"] == 0 and rows[-1]["eval_kl"] > 0
    _, params = models.load("package:sage_jax/assets/quickstart")
    spaces = {file.parent.name for file in (cache / "reference").rglob("*.safetensors")}
    assert {name.split("-")[0] for name in spaces} == {models.fingerprint(params)[:12]}


@pytest.mark.slow
def test_what_is_exported_is_the_base_with_the_adapter_merged(run):
    model, params = models.load("package:sage_jax/assets/quickstart")
    exported, merged = models.load(run / "export")
    settings, adapter = peft_files.read(run / "adapter", model.spec)
    assert exported.spec == model.spec and settings.rank == 4
    changed = {
        path
        for (path, a), (_, b) in zip(tensors.leaves(params), tensors.leaves(merged), strict=True)
        if not np.array_equal(a, b)
    }
    assert changed == {f"layers/{at}/kernel" for at in ("attention/q", "attention/v", "mlp/up")}
    tokens = np.arange(20)[None] % model.spec.vocab
    adapted = jax.jit(model.logits)(lora.join(params, adapter, settings), tokens)
    np.testing.assert_allclose(jax.jit(model.logits)(merged, tokens), adapted, atol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_with_adapters_goes_on_the_same(run, tmp_path, monkeypatch):
    calls = []

    @contextlib.contextmanager
    def after_four():
        yield lambda: calls.append(1) or len(calls) >= 4

    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "stop_signal", after_four)
        assert launcher.main(command("train", tmp_path / "run", **LORA)) == 0
    assert not (tmp_path / "run" / "summary.json").exists()
    assert launcher.main(command("train", tmp_path / "run", **LORA)) == 0
    assert rows_of(tmp_path / "run") == rows_of(run)
    for file in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (run / file).read_bytes()


@pytest.mark.slow
def test_an_adapter_is_a_starting_point_and_its_own_reference(run, tmp_path, capsys):
    start = {"lora.path": run / "adapter"}
    assert launcher.main(command("train", tmp_path / "on", **start, **{"train.steps": 2})) == 0
    rows = rows_of(tmp_path / "on")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-6)
    last = rows_of(run)[-1]
    assert rows[0]["eval_accuracy"] == last["eval_accuracy"]
    assert launcher.main(command("score", tmp_path / "scored", **start, **{
        "selection.refresh": -1.0, "selection.scoring_dtype": "", "selection.guard": "off",
    })) == 0  # fmt: skip
    assert (tmp_path / "scored" / "selected.jsonl").read_text()


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    try:
        quantised.library()
    except ValueError as e:
        pytest.skip(str(e))
    where = tmp_path_factory.mktemp("nf4") / "run"
    assert launcher.main(command("train", where, **LORA, **QLORA)) == 0
    return where


@pytest.mark.slow
def test_a_run_on_a_base_in_four_bits_lowers_the_loss_from_ln_2(four_bits):
    rows = rows_of(four_bits)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["eval_kl"] == 0 and rows[-1]["eval_kl"] > 0
    losses = [row["loss"] for row in rows if "loss" in row]
    assert statistics.fmean(losses[2:]) < math.log(2) - 0.02


@pytest.mark.slow
def test_a_stopped_run_on_a_base_in_four_bits_goes_on_the_same(
    four_bits, tmp_path, monkeypatch, capsys
):
    calls = []

    @contextlib.contextmanager
    def after_four():
        yield lambda: calls.append(1) or len(calls) >= 4

    settings = LORA | QLORA
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "stop_signal", after_four)
        assert launcher.main(command("train", tmp_path / "run", **settings)) == 0
    assert not (tmp_path / "run" / "summary.json").exists()
    assert launcher.main(command("train", tmp_path / "run", **settings | {"lora.base": "int8"}))
    assert "config.lora.base was 'nf4', now 'int8'" in capsys.readouterr().err
    assert launcher.main(command("train", tmp_path / "run", **settings)) == 0
    assert rows_of(tmp_path / "run") == rows_of(four_bits)
    for file in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (four_bits / file).read_bytes()


@pytest.mark.slow
def test_the_export_of_a_base_in_four_bits_is_what_it_stands_for(four_bits):
    """And its adapter, laid over the same base again, computes the same."""
    where = "package:sage_jax/assets/quickstart"
    (model, plain), (_, base) = models.load(where), models.load(where, hold="nf4")
    _, merged = models.load(four_bits / "export")
    settings, adapter = peft_files.read(four_bits / "adapter", model.spec)
    tokens = np.arange(20)[None] % model.spec.vocab
    adapted = jax.jit(model.logits)(lora.join(base, adapter, settings), tokens)
    np.testing.assert_allclose(jax.jit(model.logits)(merged, tokens), adapted, atol=2e-4)
    same = {
        path
        for (path, a), (_, b) in zip(tensors.leaves(plain), tensors.leaves(merged), strict=True)
        if np.array_equal(a, b)
    }
    assert same == {p for p, _ in tensors.leaves(plain) if not quantised.QUANTISED.search(p)}


@pytest.mark.slow
def test_other_modes_take_an_adapter_on_a_base_in_four_bits(four_bits, tmp_path, capsys):
    start = {"lora.path": four_bits / "adapter", "lora.base": "nf4"}
    assert launcher.main(command("eval", tmp_path / "eval", **start)) == 0
    last = rows_of(four_bits)[-1]
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["eval_accuracy"] == last["eval_accuracy"]
    assert launcher.main(command("score", tmp_path / "scored", **start, **{
        "selection.refresh": -1.0, "selection.scoring_dtype": "", "selection.guard": "off",
    })) == 0  # fmt: skip
    assert (tmp_path / "scored" / "selected.jsonl").read_text()


@pytest.mark.slow
def test_a_base_in_eight_bits_is_scored_in_whole_numbers(four_bits, tmp_path):
    settings = LORA | {"lora.base": "int8", "selection.scoring_dtype": "int8", "train.steps": 4,
                       "eval.problems": "", "eval.every": 0, "eval.kl_prompts": 0}  # fmt: skip
    assert launcher.main(command("train", tmp_path / "run", **settings)) == 0
    rows = rows_of(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)


@pytest.mark.slow
def test_a_dry_run_compiles_the_steps_with_adapters():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    sizes = {}
    for rank in (0, 4):
        run = config.resolve({
            "model": {"path": str(ROOT / "sage_jax/assets/quickstart")}, "lora": {"rank": rank},
            "data": {"max_length": 64}, "train": {"batch_pairs": 8}, "eval": {"max_new_tokens": 8},
        })  # fmt: skip
        for name in ("train", "score", "sample"):
            lowered = lowering.make_step(name, run, mesh)
            program = lowered.lower().compile()
            sizes[rank, name] = program.memory_analysis().output_size_in_bytes
    assert sizes[4, "train"] < 0.3 * sizes[0, "train"]  # the state that a step returns
    with pytest.raises(ValueError, match=r"lora\.path='x' names an adapter"):
        lowering.abstract_policy(config.replace(run, lora=config.Lora(path="x")), mesh)


def test_settings_of_adapters_that_cannot_apply_are_refused():
    for settings, message in (
        ({"alpha": 8.0}, "lora.alpha=8.0 needs adapters: set config.lora.rank"),
        ({"rank": 4, "path": "somewhere"}, "lora.rank=4 is set, but the adapter of"),
    ):
        with pytest.raises(ValueError, match=message):
            config.resolve({"lora": settings})
    with pytest.raises(ValueError, match="'new' has none"):
        config.resolve({"lora": {"rank": 4}, "model": {"path": "new"}})
    with pytest.raises(ValueError, match=r"router_aux=-2\.0 has to be"):
        config.resolve({"model": {"router_aux": -2.0}})
    plain = config.resolve({"model": {"router_aux": 0.1, "path": "a"}})
    model = models.Model(models.ModelSpec(vocab=8, d_model=8, d_ff=8, layers=1, heads=1))
    with pytest.raises(ValueError, match=r"router_aux=0\.1 balances .* 'a' has none"):
        setup.router_aux(plain, model)
