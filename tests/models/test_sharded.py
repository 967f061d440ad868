"""Weights are read shard by shard: the same bits on any mesh, and no more bytes than needed."""

import functools
import math

import jax
import numpy as np
import pytest

from sage_jax import models
from sage_jax.models import tensors
from sage_jax.runtime import mesh as meshes

NAME = "llama_tied_llama3"


def place_on(mesh):
    return functools.partial(meshes.shardings, mesh=mesh)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 4, "tensor": 2},
     {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", [NAME, "llama_bias_linear"])
def test_a_directory_loads_onto_a_mesh_with_the_bits_of_one_device(write_case, name, sizes):
    where = write_case(name)
    mesh = meshes.make_mesh(**sizes)
    _, whole = models.load(where)
    _, found = models.load(where, place=place_on(mesh))
    assert_same(found, whole)
    for leaf, sharding in zip(
        jax.tree.leaves(found), jax.tree.leaves(meshes.shardings(whole, mesh)), strict=True
    ):
        assert leaf.sharding == sharding
    assert models.fingerprint(found) == models.fingerprint(whole)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"fsdp": 8}, 8),
        ({"fsdp": 4, "tensor": 2}, 8),
        ({"data": 4, "fsdp": 2}, 2),
        ({"data": 8}, 1),
    ],
    ids=str,
)
def test_parts_are_asked_for_once_and_are_as_small_as_shards(sizes, parts):
    spec = models.ModelSpec(vocab=512, d_model=64, d_ff=128, layers=4, heads=8, tied=False)
    shapes, asked = tensors.shapes(spec), []

    def shape(row, layer):
        inner = shapes[row.path][row.stacked :]
        return inner[::-1] if row.transposed else inner

    def read(row, layer, index):
        asked.append((row.path, layer, tuple((s.start, s.stop) for s in index)))
        return np.zeros([s.stop - s.start for s in index], np.float32)

    mesh = meshes.make_mesh(**{"data": 1} | sizes)
    tensors.assemble(spec, tensors.Source(shape, read), "zeros", place_on(mesh))
    assert len(set(asked)) == len(asked)  # devices that hold copies share what was read
    size = dict.fromkeys(shapes, 0)
    for path, _, ends in asked:
        part = math.prod(stop - start for start, stop in ends)
        size[path] += part
        layers = spec.layers if path.startswith("layers/") else 1
        allowed = 1 if "norm" in path else parts
        assert part * layers * allowed == math.prod(shapes[path]), path
    assert size == {path: math.prod(shape) for path, shape in shapes.items()}


def test_sharded_weights_are_written_tensor_by_tensor_as_whole_ones_are(write_case, tmp_path):
    where = write_case(NAME)
    model, whole = models.load(where)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    _, found = models.load(where, place=place_on(mesh))
    first = models.export(tmp_path / "whole", model, whole, shard_bytes=20_000)
    second = models.export(tmp_path / "sharded", model, found, shard_bytes=20_000)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
