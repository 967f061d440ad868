"""Figures read from compiled text, against closed forms and counts by hand."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sage_jax.runtime import chips, hlo
from sage_jax.runtime import mesh as meshes

KERNEL = 'custom_call_target="tpu_custom_call"'


def text(fn, *shapes, **options) -> str:
    given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(fn, **options).lower(*given).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    once = hlo.Program(text(lambda w, x: jnp.tanh(x @ w), (64, 64), (32, 64))).totals()
    many = hlo.Program(text(run, (7, 64, 64), (32, 64))).totals()
    assert once.flops == 2 * 32 * 64 * 64
    assert many.flops == 7 * once.flops
    compiled = jax.jit(run).lower(
        jax.ShapeDtypeStruct((7, 64, 64), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)
    )
    xla = compiled.compile().cost_analysis()["flops"]
    assert xla < 2 * once.flops  # the compiler's own total, which is why this module exists


def test_loops_inside_loops_multiply_and_gradients_count_both_products():
    def run(weights, x):
        def outer(x, w):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x, weights)[0].sum()

    one = 2 * 16 * 32 * 32
    assert hlo.Program(text(run, (5, 32, 32), (16, 32))).totals().flops == 5 * 3 * one
    # forward once, and two products of the backward pass
    gradient = hlo.Program(text(jax.grad(run), (5, 32, 32), (16, 32))).totals()
    assert gradient.flops == 3 * 5 * 3 * one


def test_a_loop_that_ends_on_data_counts_as_told():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ x, x)

    found = hlo.Program(text(run, (16, 16)), unknown_trips=lambda path: 11.0)
    totals = found.totals()
    assert totals.flops == 11 * 2 * 16**3
    assert len(totals.unknown_loops) == 1


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_collectives_have_their_size_their_count_and_their_group(axis):
    mesh = meshes.make_mesh(data=1, fsdp=4, tensor=2)

    def run(x):
        def body(x, _):
            whole = jax.lax.all_gather(x, axis, tiled=True)
            return x + whole[: x.shape[0]] * jax.lax.psum(x, axis), None

        return jax.lax.scan(body, x, None, length=6)[0]

    split = jax.shard_map(run, mesh=mesh, in_specs=P(axis), out_specs=P(axis), check_vma=False)
    found = hlo.Program(text(split, (256, 8))).totals()
    kinds = {one.kind: one for one in found.collectives}
    assert set(kinds) == {"all-gather", "all-reduce"}
    size = mesh.shape[axis]
    gather, reduce = kinds["all-gather"], kinds["all-reduce"]
    assert gather.count == reduce.count == 6
    assert gather.bytes == 256 * 8 * 4 and reduce.bytes == 256 * 8 * 4 / size
    assert gather.groups == reduce.groups == size
    places = np.arange(8).reshape(4, 2)
    wanted = places[:, 0] if axis == "fsdp" else places[0]
    assert list(gather.group) == list(wanted)


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ],
)
def test_groups_are_read_in_every_form(attributes, group):
    assert hlo._group(attributes) == group


def convolution(lhs, rhs, out, window, labels):
    return f"""HloModule m
ENTRY %main (a: f32[{lhs}], b: f32[{rhs}]) -> f32[{out}] {{
  %a = f32[{lhs}] parameter(0)
  %b = f32[{rhs}] parameter(1)
  ROOT %c = f32[{out}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}"""


def test_products_that_a_tpu_writes_as_convolutions_count_real_elements_alone():
    # Two independent products of [32, 16] and [16, 8], as the TPU compiler writes them: a dilated
    # window in which half of the taps fall between elements.
    batched = convolution("2,32,16", "2,16,8", "2,32,8", "size=2 pad=0_1 lhs_dilate=2",
                          "0bf_0io->0bf")  # fmt: skip
    flops = hlo.Program(batched).totals().flops
    direct = sum(  # every place, every tap, by hand
        2 * 32 * 8 * 16 for place in range(2) for tap in range(2) if 0 <= place + tap < 3
        and (place + tap) % 2 == 0
    )  # fmt: skip
    assert flops == direct
    summed = convolution("32,2,16", "2,16,8", "32,8,1", "size=2", "b0f_0io->bf0")
    assert hlo.Program(summed).totals().flops == 2 * 32 * 8 * 2 * 16


def test_instructions_over_several_lines_are_one():
    lines = """HloModule m
ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %k = f32[4,4]{1,0} custom-call(%a), custom_call_target="x", frontend_attributes={meta={
"block":"{}"
}}
  ROOT %d = f32[4,4]{1,0} dot(%k, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""
    assert hlo.Program(lines).totals().flops == 2 * 4**3


def test_slices_are_read_in_part_and_updates_written_in_place():
    def run(table, x):
        return jax.lax.dynamic_update_slice(table, x * 2, (3, 0))

    found = hlo.Program(text(run, (1000, 128), (1, 128), donate_argnums=0)).totals()
    assert found.main_bytes < 10 * 128 * 4  # not the 512 KB of the table


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("HloModule empty")


def test_a_group_over_two_axes_of_the_torus_has_the_links_of_both():
    chip = chips.TPUS["v5e"]
    row = [(0, i) for i in range(16)]
    square = [(i, j) for i in range(16) for j in range(16)]
    one, two = (chips.ring_bandwidth(chip, c, (16, 16)) for c in (row, square))
    assert two == 2 * one == 4 * chip.link_bandwidth


def test_clocks_follow_from_the_peaks():
    # FLOP/s = matrix units x side^2 x 2 x clock, by the makers' pages.
    for name, units in {"v5e": 4, "v5p": 8}.items():
        chip = chips.TPUS[name]
        assert chip.flops == pytest.approx(2 * units * 128**2 * chip.clock, rel=0.01)


def test_attention_counts_the_keys_that_it_is_told_of():
    heads, queries, width = 3, 128, 64
    text = f"""
    HloModule m

    ENTRY %main (i: s8[1,4,4], q: bf16[3,128,64], k: bf16[3,512,64]) -> bf16[3,128,64] {{
      %i = s8[1,4,4]{{2,1,0}} parameter(0)
      %q = bf16[{heads},{queries},{width}]{{2,1,0}} parameter(1)
      %k = bf16[{heads},512,{width}]{{2,1,0}} parameter(2)
      %splash_mha_fwd.1 = bf16[3,128,64]{{2,1,0}} custom-call(%i, %q, %k, %k), {KERNEL}
      %splash_mha_dq.1 = bf16[3,128,64]{{2,1,0}} custom-call(%i, %q, %k, %k), {KERNEL}
      ROOT %splash_mha_dkv.2 = bf16[3,512,64]{{2,1,0}} custom-call(%i, %q, %k, %k), {KERNEL}
    }}"""
    text = textwrap.dedent(text).lstrip()
    found = hlo.Program(text, keys=100.0).totals()
    assert found.flops == (2 + 3 + 4) * 2 * width * heads * queries * 100 and not found.opaque
    assert len(hlo.Program(text).totals().opaque) == 3
