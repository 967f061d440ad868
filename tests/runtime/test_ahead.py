"""Compiling for all row lengths of a plan before they are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax.data import encode, pipeline, records, steps
from sage_jax.runtime import ahead
from sage_jax.runtime import mesh as meshes


def _abstract(length):
    return jnp.float32(2.0), jax.ShapeDtypeStruct((3, length), jnp.float32)


def test_each_length_is_compiled_once_and_computes_what_the_function_does():
    traced = []

    def double(factor, x_RT):
        traced.append(x_RT.shape)
        return factor * x_RT.sum()

    programs = ahead.Programs(jax.jit(double))
    assert programs.missing([16, 8, 16]) == [8, 16]
    assert programs.compile([16, 8, 16], _abstract) > 0
    assert programs.known == {8, 16} and programs.missing([8, 24]) == [24]
    programs.compile([8, 24], _abstract)
    for length in (8, 16, 24):
        x_RT = np.arange(3 * length, dtype=np.float32).reshape(3, length)
        assert float(programs(length, jnp.float32(2.0), x_RT)) == 2 * x_RT.sum()
    assert sorted(traced) == [(3, 8), (3, 16), (3, 24)]
    with pytest.raises(KeyError):
        programs(32, jnp.float32(2.0), np.zeros((3, 32), np.float32))


def test_a_program_that_does_not_compile_is_an_error_and_leaves_nothing():
    programs = ahead.Programs(jax.jit(lambda factor, x_RT: factor @ x_RT))
    with pytest.raises(ValueError, match="matmul"):
        programs.compile([8], _abstract)
    assert programs.known == set()


@pytest.mark.parametrize("share", [False, True])
def test_lengths_and_shapes_are_those_of_the_batches_that_come(share):
    rng = np.random.default_rng(3)
    ids = lambda most: rng.integers(1, 50, rng.integers(1, most)).tolist()  # noqa: E731
    rows = [
        {"prompt_ids": ids(30), "chosen_ids": ids(90), "rejected_ids": ids(90)} for _ in range(64)
    ]
    pairs = encode.encode(records.read(rows), None, max_length=200)
    length_N = pairs.row_lengths(share)
    shape = steps.shape(length_N, batch_pairs=4, long=True, share=share)
    plan = steps.place(length_N, np.arange(64).reshape(16, 4), shape)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    found = set()
    for rows in pipeline.batches(pairs, plan, shape.row_length, shape=shape, threads=0):
        length = rows.tokens_RT.shape[1]
        given, planned = meshes.put(rows, mesh, shape.rows), ahead.rows_of(shape, length, mesh)
        assert jax.tree.map(jax.typeof, given) == jax.tree.map(jax.typeof, planned)
        assert all(
            a.sharding.is_equivalent_to(b.sharding, a.ndim)
            for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(planned), strict=True)
        )
        found.add(length)
    assert sorted(found) == ahead.lengths(plan, pairs, shape)
    assert len(found) > 1
