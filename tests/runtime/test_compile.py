"""`sage-jax compile` from the command line on, on virtual devices; architectures by name."""

import dataclasses
import functools
import json
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import __main__ as launcher
from sage_jax import config
from sage_jax.data import steps
from sage_jax.models import catalog, decoder, sources
from sage_jax.models import spec as specs
from sage_jax.runtime import chips, compile_report, hlo, lowering, planned, targets
from sage_jax.runtime import compile as compiler

TINY = specs.ModelSpec(vocab=64, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2)
CONFIG = """
from sage_jax import config
def get_config():
    c = config.default()
    c.model.path = "spec:tiny"
    c.data.max_length, c.train.batch_pairs = 32, 16
    c.mesh.data, c.mesh.fsdp = 2, 4
    c.eval.batch, c.eval.max_new_tokens = 8, 8
    return c
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.setitem(catalog.SPECS, "tiny", TINY)
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return file


@pytest.mark.slow
def test_json_says_what_each_step_takes(config_file, capsys):
    code = launcher.main(
        ["compile", f"--config={config_file}", "--topology=cpu:8", "--json", "--search=false"]
    )
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["fits"] and found["devices"] == 8
    assert set(found["steps"]) == {"train", "score", "sample"}
    train, score = found["steps"]["train"], found["steps"]["score"]
    weights = sum(math.prod(leaf.shape) for leaf in leaves())
    # weights and two moments of float32, split over fsdp = 4, and the rows
    assert train["argument_bytes"] == pytest.approx(3 * 4 * weights / 4, rel=0.25)
    assert train["alias_bytes"] > 0.9 * 3 * 4 * weights / 4  # the state is donated
    assert train["flops"] > 2.5 * score["flops"] > 0
    model = decoder.Model(TINY)
    tokens, pairs = 16 * 2 * 32, 16 * 2 * 32 * 33 / 2
    assert train["model_flops"] == 3 * model.forward_flops(tokens, pairs)
    assert found["pairs"].startswith("every sequence 32 tokens long")
    assert train["computed_per_pair"] == 2 * 32 and train["padding"] == 0
    assert {"all-gather", "all-reduce"} <= {c["kind"] for c in train["collectives"]}


def leaves():
    return jax.tree.leaves(jax.eval_shape(decoder.Model(TINY).init, jax.random.key(0)))


def test_what_does_not_fit_ends_with_3_and_says_what_to_change(config_file, capsys, monkeypatch):
    small = property(lambda self: 150e3)  # bytes
    monkeypatch.setattr(targets.Target, "usable_bytes", small)
    command = ["compile", f"--config={config_file}", "--topology=cpu:8", "--steps=train"]
    assert launcher.main([*command, "--search=false"]) == 3
    said = capsys.readouterr().out
    for change in ("config.model.remat=full", "config.model.dtype=bfloat16", "config.mesh.fsdp=8",
                   "config.train.batch_pairs=8", "config.mesh.context=2",
                   "config.optim.moments_dtype=bfloat16"):  # fmt: skip
        assert change in said


@pytest.mark.parametrize(
    ("needed", "said"),
    [(math.inf, "did not say what it needs"), (300 * 2**30, "it needs 300.00 GiB")],
)
def test_a_step_that_the_compiler_refuses_shows_no_figures_of_it(
    config_file, capsys, monkeypatch, needed, said
):
    def refused(lowered, machine):
        return compile_report.too_large(lowered, machine, needed, 1.0, compiler.MARGIN)

    monkeypatch.setattr(compiler, "compile_step", refused)
    monkeypatch.setattr(targets.Target, "usable_bytes", property(lambda self: 2**34))
    command = ["compile", f"--config={config_file}", "--topology=cpu:8", "--steps=train"]
    assert launcher.main(command) == 3
    found = capsys.readouterr().out
    assert said in found and "of 16.00 GiB that a program may use, 5% have to stay free" in found
    lines = {line[:26].strip(): line.split()[-1] for line in found.splitlines() if line.strip()}
    assert lines["arguments"] == lines["free"] == "-" and lines["fits"] == "NO"
    assert lines["largest batch that fits"] == "none" and "TFLOP" not in found
    assert "config.model.remat=full" in found


def test_a_compiler_that_fails_on_another_batch_leaves_the_report(config_file, capsys, monkeypatch):
    def fragile(lowered, machine):
        if lowered.pairs != 16:
            raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: a reshape\nand its stack")
        return dataclasses.replace(report(1e6, machine), name=lowered.name)

    monkeypatch.setattr(compiler, "compile_step", fragile)
    command = ["compile", f"--config={config_file}", "--topology=cpu:8", "--steps=train"]
    assert launcher.main(command) == 0
    found = capsys.readouterr().out
    assert "The largest batch is not known" in found and "FAILED_PRECONDITION: a reshape" in found
    assert "stack" not in found


def test_the_largest_batch_fits_and_one_step_more_does_not(config_file, monkeypatch):
    run = config.resolve(launcher.parse(["compile", f"--config={config_file}"])[1])
    machine = targets.target("cpu:8")
    mesh = lowering.make_mesh(run, machine)
    sizes = {}

    def fake(lowered, machine):  # bytes that grow with the pairs, and 30 of other things
        sizes[lowered.pairs] = 30.0 + 2.5 * lowered.pairs
        return report(sizes[lowered.pairs], machine)

    monkeypatch.setattr(compiler, "compile_step", fake)
    monkeypatch.setattr(targets.Target, "usable_bytes", property(lambda self: 1000.0))
    known = fake(lowering.make_step("train", run, mesh), machine)
    most, tried, more = compiler.largest("train", run, mesh, machine, known)
    limit = 1000 * (1 - compiler.MARGIN)
    assert most % 8 == 0 and 30 + 2.5 * most <= limit < 30 + 2.5 * (most + 8)
    assert tried <= 3 and not more
    monkeypatch.setattr(compiler, "LARGEST", 64)
    assert compiler.largest("train", run, mesh, machine, known)[::2] == (64, True)


def steps_of(config_file, **settings) -> lowering.Lowered:
    run = config.resolve(launcher.parse(["compile", f"--config={config_file}"])[1])
    run = config.replace(run, **{"data.max_length": 512, "train.batch_pairs": 256, **settings})
    mesh = lowering.make_mesh(run, targets.target("cpu:8"))
    pairs = planned.pairs(512, length_mean=100.0, prompt_share=0.4)
    return lowering.make_step("train", run, mesh, pairs)


def test_rows_are_planned_for_the_stated_lengths(config_file):
    padded = steps_of(config_file, **{"data.packing": False, "data.share_prompts": "off"})
    packed = steps_of(config_file, **{"data.share_prompts": "off"})
    shared = steps_of(config_file)
    assert [one.pairs for one in (padded, packed, shared)] == [256] * 3
    assert (padded.shared, packed.shared, shared.shared) == (False, False, True)
    # a pair has two answers of 60 tokens and one or two prompts of 40; a few are cut
    assert packed.tokens == padded.tokens == pytest.approx(256 * 200, rel=0.01)
    assert shared.tokens == pytest.approx(256 * 160, rel=0.01)
    assert padded.rows[0] == 256 and 600 < padded.rows[1] <= 1024
    for one in (packed, shared):  # 32 pairs on each of the 8 devices
        assert one.rows[0] % 8 == 0 and 1 < math.prod(one.rows) / one.tokens < 1.25
    ratio = shared.model_flops / packed.model_flops
    # of the linear maps alone 0.8 of the layers, but all of the answers' logits
    assert 0.8 < ratio < 0.95 and padded.model_flops == packed.model_flops


def test_without_a_mean_every_sequence_is_as_long_as_it_may_be(config_file):
    run = config.resolve(launcher.parse(["compile", f"--config={config_file}"])[1])
    mesh = lowering.make_mesh(run, targets.target("cpu:8"))
    whole = lowering.make_step("train", run, mesh)
    assert whole.tokens == math.prod(whole.rows) == 16 * 2 * 32 and not whole.shared
    half = lowering.make_step("train", run, mesh, planned.pairs(32, prompt_share=0.5))
    assert half.shared and half.tokens == 16 * (32 + 16)


def test_lengths_are_those_that_were_asked_for():
    found = planned.pairs(4096, length_mean=1000.0, length_sigma=0.5, prompt_share=0.4)
    answer_N2 = found.lengths_N2 - found.start_N2
    assert found.lengths_N2.mean() == pytest.approx(1000, rel=0.02)
    assert found.start_N2.mean() == pytest.approx(400, rel=0.02)
    assert np.log(answer_N2).std() == pytest.approx(0.5, rel=0.02)
    assert found.lengths_N2.max() == 4096 and answer_N2.min() >= 1
    np.testing.assert_array_equal(
        found.lengths_N2, planned.pairs(4096, length_mean=1000.0, prompt_share=0.4).lengths_N2
    )


@pytest.mark.parametrize("share", [False, True])
def test_attention_is_counted_in_the_blocks_of_the_planned_rows(share):
    found = planned.pairs(256, length_mean=100.0, prompt_share=0.4)
    length_N, batch_pairs, block = found.row_lengths(share), 12, 32
    shape = steps.shape(length_N, batch_pairs=batch_pairs, rows_multiple=2, unit=64, share=share)
    pair_KB = steps.split(length_N, range(planned.STEPS * 12), shape.every, batch_pairs)
    wanted = []
    placed = steps.place(length_N, pair_KB, shape)
    for pair_RS, needed in zip(placed, steps.lengths(found, placed, shape), strict=True):
        length = max(shape.row_length, needed)
        mask_RTT = np.tile(np.eye(length, dtype=bool), (shape.rows, 1, 1))  # padding sees itself
        for r in range(shape.rows):
            at = 0
            for i in pair_RS[r][pair_RS[r] >= 0]:
                prompt = found.start_N2[i, 0]
                chosen, rejected = found.lengths_N2[i] - prompt
                if share:  # the chosen answer lies from right to left, before the prompt
                    middle = at + chosen + np.arange(prompt)
                    first = np.concatenate([middle, at + np.arange(chosen)[::-1]])
                    second = at + chosen + np.arange(prompt + rejected)
                else:
                    first = at + np.arange(prompt + chosen)
                    second = at + prompt + chosen + np.arange(prompt + rejected)
                for place in (first, second):
                    mask_RTT[r][np.ix_(place, place)] |= np.tri(len(place), dtype=bool)
                at = second[-1] + 1
        # devices, their rows, stretches, blocks of queries, queries, blocks of keys, keys
        cut = (2, shape.rows // 2, 2, length // 2 // block, block, length // block, block)
        seen = mask_RTT.reshape(cut).any(axis=(4, 6)).sum(axis=4).mean(axis=(1, 3))
        wanted.append(block * seen.max())
    count = functools.partial(
        planned.keys_computed, found, shape, batch_pairs, parts=2, stretches=2, block=block
    )
    assert count() == pytest.approx(np.mean(wanted), rel=1e-9)
    # Twice the same, and a run in which each query sees itself alone.
    itself = lambda seen: (jnp.arange(seen.first_RT.shape[1]) + 0 * seen.first_RT,) * 2  # noqa: E731
    assert count(passes=lambda seen: [seen, seen]) == count()
    assert count(passes=lambda seen: [itself(seen)]) == block


def report(used: float, machine: targets.Target) -> compile_report.StepReport:
    one = lowering.Lowered("train", lambda: None, 1, 1, 1.0, 0.0, lambda _: 1.0)
    return dataclasses.replace(
        compile_report.too_large(one, machine, used, 0.0, compiler.MARGIN),
        usable_bytes=machine.usable_bytes,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology=v5e"], "is not a topology"),
        (["--topology=h100:8"], "is not a topology"),
        (["--topology=cpu:8", "--steps=train,fly"], "'fly' is none of"),
        (["--topology=cpu:8", "--search=perhaps"], "not a bool"),
        ([], "--topology is missing"),
        (["--topology=cpu:8", "--workdir=runs/x"], "writes nothing"),
        (["--topology=cpu:6"], "number of devices"),
        (["--topology=cpu:8", "--length_mean=long"], "not a number"),
        (["--topology=cpu:8", "--length_mean=99"], "data.max_length=32"),
        (["--topology=cpu:8", "--length_sigma=0.3"], "needs --length_mean"),
        (["--topology=cpu:8", "--prompt_share=1"], "not in [0, 1)"),
    ],
    ids=str,
)
def test_mistakes_are_named(config_file, capsys, words, said):
    assert launcher.main(["compile", f"--config={config_file}", *words]) == 2
    assert said in capsys.readouterr().err


def test_only_compile_takes_its_flags(config_file, capsys):
    assert launcher.main(["train", f"--config={config_file}", "--topology=cpu:8"]) == 2
    assert "not a flag" in capsys.readouterr().err


def test_the_document_has_the_tables_of_the_benchmark():
    root = pathlib.Path(__file__).parents[2]
    name = root / "benchmarks" / "compile_scaling.py"
    benchmark = runpy.run_path(str(name))
    found = json.loads(benchmark["RESULTS"].read_text())
    lines = [line for _, lines in benchmark["tables"](found) for line in lines]
    document = (root / "docs" / "scaling.md").read_text().splitlines()
    assert [line for line in document if line.startswith("|")] == lines


def test_a_name_has_shapes_and_no_weights():
    with pytest.raises(ValueError, match="has no weights"):
        sources.resolve("spec:llama3_8b")
    with pytest.raises(ValueError, match="mean spec:llama3_8b"):
        catalog.named("spec:llama_8b")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the publishers count them
        ("smollm2_135m", 134_515_008),
        ("qwen2p5_1p5b", 1_543_714_304),
        ("qwen2p5_7b", 7_615_616_512),
        ("llama3_8b", 8_030_261_248),
        ("llama3p1_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
    ],
)
def test_named_architectures_have_the_published_number_of_parameters(name, parameters):
    model = decoder.Model(catalog.SPECS[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_collectives_take_the_time_of_their_links():
    devices = [(i, j) for i in range(16) for j in range(16)]
    machine = targets.Target("v5e:16x16", devices, chips.TPUS["v5e"], tuple(devices), (16, 16))
    gather = hlo.Collective(
        "all-gather", (hlo.Shape("bf16", (1,)),), tuple(range(0, 256, 16)), 16, 3.0, 1e9, ""
    )
    # three times 15/16 of a GB, over the two directions of one ring of 50 GB/s links
    assert compile_report.collective_seconds(gather, machine) == pytest.approx(3 * 15 / 16 / 100)
    permute = dataclasses.replace(gather, kind="collective-permute", group=(0, 1), groups=2)
    assert compile_report.collective_seconds(permute, machine) == pytest.approx(3 / 50)
