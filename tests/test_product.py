"""The products of a linear map against float64, and what XLA makes of them on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import logprobs, product
from sage_jax.models import attention, decoder, layers
from sage_jax.models import spec as spec_lib

N, D, F = 40, 24, 56
RNG = np.random.default_rng(0)
X, KERNEL, SLOPE = (RNG.normal(size=shape) for shape in ((N, D), (D, F), (N, F)))


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x, dtype), np.float64)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradients_are_those_of_float64(platform, dtype):
    x, kernel, slope = jnp.asarray(X, dtype), jnp.asarray(KERNEL, "float32"), rounded(SLOPE, dtype)
    out, pull = jax.vjp(lambda *a: product.matmul(*a, platform), x, kernel)
    d_x, d_kernel = pull(jnp.asarray(slope, dtype))
    assert (out.dtype, d_x.dtype, d_kernel.dtype) == (jnp.dtype(dtype), x.dtype, jnp.float32)
    wide_x, wide_kernel = rounded(X, dtype), rounded(KERNEL, dtype)
    # One rounding to the dtype, of sums of up to 56 products of normal numbers.
    bound = {"float32": 1e-5, "bfloat16": 0.2}[dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), wide_x @ wide_kernel, atol=bound)
    np.testing.assert_allclose(np.asarray(d_x, np.float64), slope @ wide_kernel.T, atol=bound)
    np.testing.assert_allclose(d_kernel, wide_x.T @ slope, atol=bound)


def test_the_gradient_of_a_kernel_is_not_rounded_to_bfloat16_on_a_cpu():
    x, kernel = jnp.asarray(X, "bfloat16"), jnp.asarray(KERNEL, "float32")
    slope = jnp.asarray(SLOPE, "bfloat16")
    _, pull = jax.vjp(lambda *a: product.matmul(*a, "cpu"), x, kernel)
    wanted = rounded(X, "bfloat16").T @ rounded(SLOPE, "bfloat16")
    np.testing.assert_allclose(pull(slope)[1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_rows_is_the_transposed_product(dtype):
    a, b = jnp.asarray(X, dtype), jnp.asarray(SLOPE, dtype)
    wanted = rounded(X, dtype).T @ rounded(SLOPE, dtype)
    found = jax.jit(product.over_rows)(a, b)
    assert found.dtype == jnp.float32 and found.shape == (D, F)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("platform", "padded"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_cpus_get_the_form_of_cpus(platform, padded):
    a, b = jnp.asarray(X, "bfloat16"), jnp.asarray(SLOPE, "bfloat16")
    text = jax.export.export(jax.jit(product.over_rows), platforms=[platform])(a, b).mlir_module()
    assert ("stablehlo.pad" in text) == padded
    assert text.count("stablehlo.dot_general") == 1


def narrow_operands(fn, *args):
    """For every product of a compiled program: whether its operands are bfloat16."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    found = []
    for computation in text.split("\n\n"):
        types = dict(
            line.strip().removeprefix("ROOT ").split(" = ", 1)
            for line in computation.splitlines()
            if " = " in line
        )
        for definition in types.values():
            if " dot(" in definition:
                names = definition.split(" dot(", 1)[1].split(")", 1)[0].split(", ")
                found.append(all(types[name.split()[-1]].startswith("bf16") for name in names))
    return found


@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="says what XLA of 0.10 does")
def test_xla_multiplies_all_three_as_they_are():
    x, kernel = jnp.zeros((1024, 576), "bfloat16"), jnp.zeros((576, 1536))
    slope = jnp.zeros((1024, 1536), "bfloat16")

    def both(platform):
        def fn(x, kernel, slope):
            out, pull = jax.vjp(lambda *a: product.matmul(*a, platform), x, kernel)
            return out, pull(slope)

        return narrow_operands(fn, x, kernel, slope)

    assert both("cpu") == [True] * 3
    assert both("gpu") == [False] * 3  # the form of other platforms is widened on a CPU


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_bfloat16_model_learns_like_a_float32_one(remat):
    spec = spec_lib.ModelSpec(vocab=64, d_model=32, d_ff=96, layers=2, heads=4, kv_heads=2)
    tokens = jnp.asarray(RNG.integers(0, 64, (2, 24)))

    def gradient(dtype):
        model = decoder.Model(spec, dtype=dtype, remat=remat)
        params = model.init(jax.random.key(0))

        def loss(params):
            return jnp.mean(jnp.square(model.logits(params, tokens)))

        return jax.jit(jax.grad(loss))(params)

    narrow, wide = gradient("bfloat16"), gradient("float32")
    for a, b in zip(*map(jax.tree.leaves, (narrow, wide)), strict=True):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


def test_what_is_kept_for_the_backward_pass_are_the_16_bits():
    spec = spec_lib.ModelSpec(vocab=64, d_model=32, d_ff=96, layers=1, heads=4)
    block = layers.MLP(spec, jnp.bfloat16, attention.Placement("dense"))
    x = jnp.zeros((1, 16, 32), jnp.bfloat16)
    params = block.init(jax.random.key(0), x)

    def loss(params, x):
        out = jax.checkpoint(block.apply, policy=decoder.REMAT["dots"])(params, x)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    _, pull = jax.vjp(loss, params, x)
    wide = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32]
    kept = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.uint16]
    assert (16, 96) in kept
    assert (16, 96) not in wide and (1, 16, 96) not in wide


@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="says what XLA of 0.10 does")
def test_a_cpu_widens_neither_what_is_kept_of_all_layers_nor_a_product_of_the_step():
    spec = spec_lib.ModelSpec(vocab=512, d_model=64, d_ff=192, layers=3, heads=4, kv_heads=2)
    model = decoder.Model(spec, dtype="bfloat16")
    tokens = jnp.asarray(RNG.integers(0, 512, (1, 256)))
    position, segment = jnp.arange(256)[None], jnp.ones((1, 256), jnp.int32)

    def loss(params):
        hidden = model.hidden(params, tokens, position, segment)
        stats = logprobs.token_stats(hidden, model.head(params), tokens, chunk=64)
        return -stats.logp_RT.sum()

    params = jax.eval_shape(model.init, jax.random.key(0))
    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    assert "u16[3,256,192]" in text  # of the gate and up, for all layers
    assert "f32[3,256,192]" not in text and "bf16[3,256,192]" not in text
    assert all(narrow_operands(jax.grad(loss), params))
