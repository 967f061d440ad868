"""Every way to compute attention gives what the dense form gives, and so do its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sage_jax.models import attention, attention_tpu

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 2, 200, 4, 2, 24
LAYOUTS = ("segments", "shared")
KERNELS = {
    "blocks": attention.Placement("blocks"),
    "short blocks": attention.Placement("blocks", block=attention.SHORT_BLOCK),
    "triton": attention.Placement("triton", interpret=True),
    "splash": attention.Placement("splash", interpret=True),
}


@functools.cache
def visible(layout: str, length: int = LENGTH, most: int = 20) -> attention.Visible:
    """Rows of segments with padding at the end; or of chosen reversed, prompt, rejected."""
    rng = np.random.default_rng(3)
    first = np.tile(np.arange(length), (ROWS, 1))
    last, position = first.copy(), np.zeros_like(first)
    for r in range(ROWS):
        at = 0
        while at < length - 3 * most:
            chosen, prompt, rejected = rng.integers(1, most, 3)
            if layout == "segments":
                chosen = 0
            start, end = at + chosen, at + chosen + prompt + rejected
            last[r, at:start] = start + prompt - 1
            first[r, start:end] = start
            position[r, at:start] = prompt + np.arange(chosen)[::-1]
            position[r, start:end] = np.arange(end - start)
            at = end
    arrays = [jnp.asarray(x, jnp.int32) for x in (first, last, position)]
    if layout == "shared":
        return attention.Visible(*arrays, ahead_RT=jax.lax.cummax(arrays[1], axis=1))
    return attention.Visible(*arrays)


def inputs(dtype=jnp.float32, rows=ROWS, length=LENGTH):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    arrays = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
    return arrays, jax.random.normal(keys[3], (rows, length, HEADS * WIDTH), dtype)


def with_gradients(place, seen, arrays, slope, **options):
    def run(*arrays):
        out, pull = jax.vjp(
            lambda *a: attention.attend(*a, seen, scale=0.2, place=place, **options), *arrays
        )
        return out, *pull(slope)

    return jax.jit(run)(*arrays)


def error(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 2.0}], ids=str)
def test_every_kernel_is_the_dense_form(name, layout, options):
    if name == "splash" and layout == "shared" and "window" in options:
        pytest.skip("refused, see below")
    arrays, slope = inputs()
    wanted = with_gradients(attention.Placement("dense"), visible(layout), arrays, slope, **options)
    found = with_gradients(KERNELS[name], visible(layout), arrays, slope, **options)
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_stays_within_its_rounding(name):
    arrays, slope = inputs(jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in arrays]
    wanted = with_gradients(
        attention.Placement("dense"), visible("shared"), exact, slope.astype(jnp.float32)
    )
    found = with_gradients(KERNELS[name], visible("shared"), arrays, slope)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16 and error(a, b) < 1e-2


@pytest.mark.parametrize("name", ["blocks", "splash", "triton"])
def test_rows_and_heads_over_eight_devices(name):
    check_over_eight_devices(name, {"fsdp": 4, "context": 1, "tensor": 2})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "sizes", "length"),
    [
        ("dense", (2, 4, 1), 256),
        ("blocks", (2, 2, 2), 256),
        ("blocks", (1, 8, 1), 256),
        ("splash", (2, 2, 2), 256),  # 128 tokens on a device, the least that the TPU kernel takes
    ],
    ids=str,
)
def test_tokens_of_a_row_over_several_devices(name, layout, sizes, length):
    sizes = dict(zip(("fsdp", "context", "tensor"), sizes, strict=True))
    check_over_eight_devices(name, sizes, layout=layout, length=length)


def test_a_window_reaches_over_the_border_between_devices():
    sizes = {"fsdp": 1, "context": 4, "tensor": 2}
    check_over_eight_devices("blocks", sizes, layout="segments", length=256, window=70)


def test_gpu_kernels_refuse_rows_that_are_not_whole():
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8), ("fsdp", "context"))
    place = attention.Placement("triton", mesh, ("fsdp",), (), ("context",), interpret=True)
    arrays, slope = inputs()
    with pytest.raises(ValueError, match="takes whole rows"):
        with_gradients(place, visible("segments"), arrays, slope)


@pytest.mark.parametrize(("name", "needed"), [("splash", "TPUs"), ("triton", "GPUs")])
def test_kernels_for_other_devices_are_refused(name, needed):
    arrays, slope = inputs()
    with pytest.raises(ValueError, match=f"{name!r} is a kernel for {needed}, .* kind 'cpu'"):
        with_gradients(attention.Placement(name), visible("segments"), arrays, slope)


def check_over_eight_devices(name, sizes, *, layout="shared", length=LENGTH, rows=8, **options):
    mesh = Mesh(
        np.array(jax.devices()).reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * 3,
    )
    place = attention.Placement(
        name, mesh, ("fsdp",), ("tensor",), ("context",), interpret=name != "dense"
    )
    rows = rows if length == LENGTH else max(2, sizes["fsdp"])
    arrays, slope = inputs(rows=rows, length=length)
    seen = jax.tree.map(lambda x: jnp.tile(x, (rows // ROWS, 1)), visible(layout, length))
    wanted = with_gradients(attention.Placement("dense"), seen, arrays, slope, **options)
    part = "context" if sizes["context"] > 1 else None
    split = NamedSharding(mesh, PartitionSpec("fsdp", part, "tensor"))
    found = with_gradients(
        place,
        jax.device_put(seen, NamedSharding(mesh, PartitionSpec("fsdp"))),
        jax.device_put(arrays, split),
        jax.device_put(slope, split),
        **options,
    )
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 1e-6


def test_blocks_hold_nothing_quadratic_in_the_row():
    length = 4096
    like = [jax.ShapeDtypeStruct((1, length, h, 8), jnp.float32) for h in (2, 1, 1)]

    def run(q, key, value):
        seen = attention.causal(jnp.ones((1, length), jnp.int32), jnp.zeros((1, length), jnp.int32))
        place = attention.Placement("blocks")
        return attention.attend(q, key, value, seen, scale=1.0, place=place).sum()

    compiled = jax.jit(jax.grad(run)).lower(*like).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length / 4


@pytest.mark.parametrize("longest", [256, 600])  # a row at a time; two, of three
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splash_takes_as_many_rows_at_a_time_as_its_integers_hold(layout, longest, monkeypatch):
    monkeypatch.setattr(attention_tpu, "LONGEST", longest)
    arrays, slope = inputs(rows=4)
    seen = jax.tree.map(lambda x: jnp.tile(x, (2, 1)), visible(layout))
    wanted = with_gradients(attention.Placement("dense"), seen, arrays, slope)
    for a, b in zip(with_gradients(KERNELS["splash"], seen, arrays, slope), wanted, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize(("layout", "window"), [("segments", 0), ("segments", 70), ("shared", 0)])
@pytest.mark.parametrize("context", [1, 2])
def test_splash_takes_rows_longer_than_its_integers(layout, window, context, monkeypatch):
    monkeypatch.setattr(attention_tpu, "LONGEST", 128)
    sizes = {"fsdp": 8 // context // 2, "context": context, "tensor": 2}
    check_over_eight_devices("splash", sizes, layout=layout, length=256, window=window)


def test_splash_refuses_a_window_where_positions_are_not_indices():
    arrays, slope = inputs()
    with pytest.raises(ValueError, match=r"no window \(7\)"):
        with_gradients(KERNELS["splash"], visible("shared"), arrays, slope, window=7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=str)
def test_splash_computes_the_blocks_that_are_seen_and_no_others(layout, part):
    block, length = 128, 1024
    seen = visible(layout, length, 200)
    own = slice(part.start * length // 2, part.stop * length // 2)  # the queries of a device
    ranges = [x[:, own] for x in (seen.first_RT, seen.last_RT)]
    mask = np.asarray(attention.mask(seen))[:, own]
    cut = mask.reshape(ROWS, -1, block, length // block, block)
    wanted_RIJ = cut.any(axis=(2, 4))
    queries, keys = wanted_RIJ.shape[1:]
    found = np.asarray(attention_tpu.seen_blocks(*ranges, length, block))
    np.testing.assert_array_equal(found, wanted_RIJ)
    assert found.mean() < 0.7
    by_query, by_key = attention_tpu.lists(jnp.asarray(found))
    for one in (by_query, by_key):
        assert int((one.block_mask != 0).sum()) == wanted_RIJ.sum()
        assert one.block_mask.shape == one.data_next.shape
    # In the order of the kernels' steps, each that runs has its own block, and no other fetches.
    steps = by_query.block_mask.reshape(ROWS, queries, keys)
    np.testing.assert_array_equal(steps, wanted_RIJ)
    fetched = np.asarray(by_query.data_next, int).reshape(-1)
    r, _, j = np.unravel_index(np.arange(fetched.size), wanted_RIJ.shape)
    assert_fetches(wanted_RIJ.reshape(-1), fetched, r * keys + j)
    for c in range(ROWS * keys):
        run = wanted_RIJ[c // keys, :, c % keys]
        np.testing.assert_array_equal(by_key.block_mask[0, :, c], run)
        own_blocks = c // keys * queries + np.arange(queries)
        assert_fetches(run, np.asarray(by_key.data_next[0, :, c], int), own_blocks)


def assert_fetches(run, fetched, own):
    np.testing.assert_array_equal(fetched[run], own[run])
    changes = np.count_nonzero(np.diff(fetched)) + 1
    assert changes <= max(1, np.count_nonzero(np.diff(own[run])) + 1)


def test_splash_does_not_touch_blocks_that_no_query_of_a_block_sees():
    length = 640
    assert attention_tpu.block_size(length) == 128
    segment = jnp.asarray(np.repeat([[1, 2, 3, 4, 5], [1, 1, 2, 2, 2]], 128, axis=1), jnp.int32)
    seen = attention.causal(segment, jnp.zeros_like(segment))
    (q, key, value), slope = inputs(length=length)
    poisoned = value.at[0, 128:256].set(jnp.nan)
    out, *gradients = with_gradients(KERNELS["splash"], seen, (q, key, poisoned), slope)
    # NaN times the zero of a mask is NaN: what is finite was not computed with it.
    theirs = np.zeros((ROWS, length), bool)
    theirs[0, 128:256] = True
    for x in (out, *gradients):
        bad = np.isnan(np.asarray(x)).reshape(ROWS, length, -1).any(axis=-1)
        assert not bad[~theirs].any()
        assert bad[theirs].all() or x is gradients[2]  # values are no part of their own gradient


@pytest.mark.parametrize("name", ["blocks", "triton"])
def test_what_fills_up_a_row_sees_no_more_blocks_than_its_last_token(name):
    (q, key, value), slope = inputs()
    value = value.at[0, :64].set(jnp.nan)  # which is in the sum of every block that is read
    slope = slope.at[1, 192:].set(jnp.nan)
    if name == "triton":  # of which rows lie side by side
        value = value.at[1, :64].set(jnp.nan)
    found = with_gradients(KERNELS[name], visible("segments"), [q, key, value], slope)
    assert np.isfinite(found[0][1, 192:]).all()
    assert np.isnan(found[0][0, :64]).any()
    assert np.isfinite(found[3][1, :64]).all()  # no query sees both ends of the row
    assert np.isnan(found[3][1, 192:]).any()


def test_the_platform_and_the_length_choose():
    assert attention.Placement().chosen(64) == "dense"
    assert attention.Placement().chosen(1024) == "blocks"
    assert attention.Placement("splash").chosen(64) == "splash"
    with pytest.raises(ValueError, match="unknown"):
        attention.Placement("fast")
