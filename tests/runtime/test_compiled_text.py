"""What the compiled steps must not hold, read from their text: on 8 CPU devices, and for a TPU."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax import config, head
from sage_jax.data import pack, steps
from sage_jax.models import catalog, spec
from sage_jax.runtime import compile as compiler
from sage_jax.runtime import hlo, lowering, setup, targets
from sage_jax.runtime import mesh as meshes

# Each number is that of one thing only, so that a shape says what it is. The softmax of a row is
# more than the head may keep for its gradient (`head.Memory.kept`).
WIDTH, FF, VOCABULARY, LENGTH, ROWS = 256, 640, 151_936, 2048, 8
SPEC = spec.ModelSpec(
    vocab=VOCABULARY, d_model=WIDTH, d_ff=FF, layers=3, heads=2, kv_heads=2, tied=False
)
SHAPE = steps.Shape(LENGTH, ROWS, 1, (pack.RowShape(LENGTH * ROWS, 1, ROWS),))
SPLITS = {
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"data": 1, "fsdp": 4, "context": 2},
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(autouse=True, scope="module")
def named():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalog.SPECS, "of_this_test", SPEC)
        patch.setattr(lowering, "row_shape", lambda *_: SHAPE)
        patch.setattr(setup, "head_memory", lambda mesh: head.Memory())  # on every machine
        yield


@functools.cache
def program(topology: str, step: str, split: str) -> tuple[hlo.Program, jax.stages.Compiled]:
    machine = targets.target(topology)
    run = config.resolve(
        {
            "model": {"path": "spec:of_this_test", "dtype": "bfloat16", "remat": "full"},
            "data": {"max_length": LENGTH // 2},
            "train": {"batch_pairs": ROWS},
        }
    )
    mesh = meshes.make_mesh(**SPLITS[split], devices=machine.devices)
    lowered = lowering.make_step(step, run, mesh)
    compiled = lowered.lower().compile()
    text = compiled.as_text()
    return hlo.Program(text, unknown_trips=lowered.trips, keys=lowered.keys), compiled


def gathered_activations(found: hlo.Program, split: dict[str, int]) -> list[hlo.Collective]:
    """Collectives that bring together what tokens compute, other than keys and values of a row."""
    kinds = ("all-gather", "all-reduce", "all-to-all")
    widths = {WIDTH, FF, VOCABULARY, FF // 2, WIDTH // 2, VOCABULARY // 2}
    size = split.get("data", 1) * split.get("fsdp", 1)
    return [
        one
        for one in found.totals().collectives
        if one.kind in kinds
        and any(
            set(s.dims) & {LENGTH, LENGTH * ROWS // size, LENGTH * ROWS}
            and set(s.dims) & widths
            and s.size >= 2 * LENGTH * WIDTH * ROWS // size
            for s in one.shapes
        )
    ]


def full_logits(found: hlo.Program, parts: int) -> list[tuple[str, tuple[int, ...]]]:
    """Arrays of a quarter of a row and more, over the vocabulary."""
    return [
        (one.opcode, shape.dims)
        for one, shape in found.arrays()
        if shape.dims
        and set(shape.dims) & {VOCABULARY, VOCABULARY // parts}
        and shape.size >= LENGTH // 4 * (VOCABULARY // parts)
    ]


def large_constants(found: hlo.Program) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (one.name, shape.dims)
        for one, shape in found.arrays()
        if one.opcode == "constant" and shape.bytes > 2**16
    ]


def check(topology: str, step: str, split: str) -> hlo.Program:
    found, _ = program(topology, step, split)
    sizes = SPLITS[split]
    assert not gathered_activations(found, sizes)
    assert not full_logits(found, sizes.get("tensor", 1))
    assert not large_constants(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_train_step_on_virtual_devices(split):
    found = check("cpu:8", "train", split)
    heads = [  # the head's gradient is summed over devices once, however many chunks there are
        one.count
        for one in found.totals().collectives
        if one.kind in ("all-reduce", "reduce-scatter")
        and any(VOCABULARY in s.dims or VOCABULARY // 2 in s.dims for s in one.shapes)
    ]
    assert max(heads) == 1


@pytest.mark.slow
def test_the_score_step_on_virtual_devices():
    check("cpu:8", "score", "fsdp")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("step", ["train", "score"])
def test_the_steps_for_a_tpu(step):
    found = check("v5e:2x4", step, "fsdp")
    weights = [  # brought together in the dtype of the matmuls
        (s.dtype, s.dims)
        for one in found.totals().collectives
        if one.kind in ("all-gather", "collective-permute")
        for s in one.shapes
        if FF in s.dims
    ]
    assert weights and {dtype for dtype, _ in weights} == {"bf16"}
    assert not found.totals().opaque  # the attention's cost is known


@pytest.mark.slow
def test_state_is_split_over_all_devices_that_share_it():
    _, compiled = program("cpu:8", "train", "fsdp")
    parameters = 2 * VOCABULARY * WIDTH + 3 * (4 * WIDTH**2 + 3 * WIDTH * FF)
    one_device = 3 * 4 * parameters / 8  # weights and two moments, float32
    tokens = LENGTH * 4 * 4  # and the row
    assert (
        one_device < compiled.memory_analysis().argument_size_in_bytes < 1.1 * one_device + tokens
    )


def test_the_checks_see_what_they_look_for():
    mesh = meshes.make_mesh(data=1, fsdp=8)
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)), jnp.float32)

    def naive(hidden_RTD, head_DV):
        hidden = jax.lax.with_sharding_constraint(hidden_RTD @ table, whole)
        logits = jax.lax.with_sharding_constraint(
            hidden @ head_DV, NamedSharding(mesh, PartitionSpec(meshes.ROWS))
        )
        return jax.nn.logsumexp(logits, -1)

    given = (
        jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((WIDTH, VOCABULARY), jnp.float32),
    )
    jitted = jax.jit(naive, in_shardings=(rows, whole), out_shardings=rows)
    found = hlo.Program(jitted.lower(*given).compile().as_text())
    assert gathered_activations(found, SPLITS["fsdp"])
    assert full_logits(found, 1)
    assert large_constants(found)


def test_a_step_that_is_refused_for_its_size_says_how_much_it_needs():
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (1.64T) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert compiler.out_of_memory(said) == pytest.approx(1.64 * 2**40)
    assert compiler.out_of_memory("Used 20.03G of 15.75G hbm. Ran out of memory") == pytest.approx(
        20.03 * 2**30
    )
    assert compiler.out_of_memory("INVALID_ARGUMENT: something else") is None


def test_shapes_alone_are_what_a_run_has():
    machine = dataclasses.replace(targets.target("cpu:8"), name="cpu:8")
    mesh = meshes.make_mesh(data=1, fsdp=8, devices=machine.devices)
    run = config.resolve({"model": {"path": "spec:of_this_test"}, "train": {"batch_pairs": 8}})
    policy = lowering.abstract_policy(run, mesh)
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(policy.params))
    assert lowering.device_bytes(policy.params) == pytest.approx(total / 8, rel=0.01)
