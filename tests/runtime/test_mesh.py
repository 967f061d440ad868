"""The mesh and the table of rules, on 8 virtual devices."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from sage_jax.runtime import mesh as mesh_lib

P = PartitionSpec


def weights(heads: int = 4, layers: int = 2) -> dict:
    """The names and layouts of a decoder of width 16 with a vocabulary of 24."""

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    return {
        "embed": {"embedding": zeros(24, 16)},
        "layers": {
            "attention": {
                "q": {"kernel": zeros(layers, 16, heads), "bias": zeros(layers, heads)},
                "o": {"kernel": zeros(layers, heads, 16)},
            },
            "mlp": {
                "up": {"kernel": zeros(layers, 16, 32)},
                "down": {"kernel": zeros(layers, 32, 16)},
            },
            "attention_norm": {"scale": zeros(layers, 16)},
        },
        "final_norm": {"scale": zeros(16)},
        "lm_head": {"kernel": zeros(16, 24)},
    }


def specs(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {mesh_lib.leaf_name(path): sharding.spec for path, sharding in leaves}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1, 1)),
        ({"data": 2, "fsdp": 1, "tensor": -1}, (2, 1, 1, 4)),
        ({"data": 1, "fsdp": 2, "context": 4}, (1, 2, 4, 1)),
    ],
)
def test_the_mesh_has_four_auto_axes_and_minus_one_takes_the_rest(sizes, shape):
    mesh = mesh_lib.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_device_has_the_same_three_axes():
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert mesh_lib.row_multiple(mesh) == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 0}, "mesh.data=0 must be a positive number"),
        ({"fsdp": -2}, "mesh.fsdp=-2"),
        ({"fsdp": -1}, "mesh.data and mesh.fsdp are both -1"),
        ({"fsdp": 3}, "fsdp=3 x context=1 x tensor=1 = 3 does not divide the number of devices, 8"),
        ({"fsdp": 16}, "does not divide the number of devices, 8"),
        ({"data": 2, "fsdp": 2}, "is not the number of devices, 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_rule(sizes, words):
    with pytest.raises(ValueError) as error:
        mesh_lib.make_mesh(**sizes)
    assert words in str(error.value)


def test_every_weight_is_split_by_its_rule():
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
    assert specs(mesh_lib.shardings(weights(), mesh)) == {
        "embed/embedding": P("tensor", "fsdp"),
        "lm_head/kernel": P("fsdp", "tensor"),
        "layers/attention/q/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/q/bias": P(),
        "layers/attention/o/kernel": P(None, "tensor", "fsdp"),
        "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
        "layers/attention_norm/scale": P(),
        "final_norm/scale": P(),
    }


def test_an_adapter_is_split_as_its_weight_but_for_the_rank():
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)

    def pair(rows, columns):  # a rank of 4 would divide, and stays whole all the same
        return {"lora_a": np.zeros((2, rows, 4)), "lora_b": np.zeros((2, 4, columns))}

    adapters = {"layers": {"attention": {"q": pair(16, 8), "o": pair(8, 16)},
                           "mlp": {"up": pair(16, 32), "down": pair(32, 16)}}}  # fmt: skip
    assert specs(mesh_lib.shardings(adapters, mesh)) == {
        "layers/attention/q/lora_a": P(None, "fsdp", None),
        "layers/attention/q/lora_b": P(None, None, "tensor"),
        "layers/attention/o/lora_a": P(None, "tensor", None),
        "layers/attention/o/lora_b": P(None, None, "fsdp"),
        "layers/mlp/up/lora_a": P(None, "fsdp", None),
        "layers/mlp/up/lora_b": P(None, None, "tensor"),
        "layers/mlp/down/lora_a": P(None, "tensor", None),
        "layers/mlp/down/lora_b": P(None, None, "fsdp"),
    }


def test_a_leaf_without_a_rule_is_named():
    mesh = mesh_lib.make_mesh()
    with pytest.raises(ValueError, match="No sharding rule matches the parameter 'tower/weights'"):
        mesh_lib.shardings({"tower": {"weights": np.zeros(3)}}, mesh)


def test_a_rule_of_too_many_dimensions_names_leaf_and_shape():
    mesh = mesh_lib.make_mesh()
    with pytest.raises(ValueError, match=r"'embed/embedding'.*2 dimensions.*\(24,\)"):
        mesh_lib.shardings({"embed": {"embedding": np.zeros(24)}}, mesh)


def test_a_dimension_that_does_not_divide_is_left_whole_and_logged_once(caplog):
    mesh = mesh_lib.make_mesh(data=1, fsdp=2, tensor=4)
    with caplog.at_level(logging.INFO, logger=mesh_lib.__name__):
        for _ in range(2):
            found = specs(mesh_lib.shardings(weights(heads=9), mesh))
    assert found["layers/attention/q/kernel"] == P(None, "fsdp", None)
    assert found["layers/attention/o/kernel"] == P(None, None, "fsdp")
    assert found["layers/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    lines = [r.getMessage() for r in caplog.records if "attention/q/kernel" in r.getMessage()]
    assert len(lines) == 1
    assert "dimension 2 of (2, 16, 9)" in lines[0]


def chain() -> optax.GradientTransformation:
    decayed = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree)  # noqa: E731
    schedule = optax.linear_schedule(0.0, 1e-3, 10)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=decayed)
    )


def test_adam_moments_live_where_their_weights_live_and_steps_keep_it_so():
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
    where = mesh_lib.shardings(weights(), mesh)
    params, tx = jax.device_put(weights(), where), chain()
    state_where = mesh_lib.state_shardings(tx, params, mesh)
    state = jax.jit(tx.init, out_shardings=state_where)(params)
    adam = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    for moments in adam:
        jax.tree.map(
            lambda m, w: pytest.fail(str(m.sharding)) if m.sharding != w else None, moments, where
        )
    kernel = adam[0]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 16)

    update = jax.jit(
        lambda p, s: (optax.apply_updates(p, tx.update(p, s, p)[0]), tx.update(p, s, p)[1]),
        out_shardings=(where, state_where),
    )
    stepped = update(params, state)
    assert jax.tree.map(lambda a: a.sharding, stepped) == (where, state_where)


def test_state_shardings_need_only_shapes():
    mesh = mesh_lib.make_mesh(fsdp=4)
    abstract = jax.eval_shape(weights)
    found = mesh_lib.state_shardings(chain(), abstract, mesh)
    concrete = mesh_lib.state_shardings(chain(), weights(), mesh)
    assert jax.tree.leaves(found) == jax.tree.leaves(concrete)


def test_rows_are_split_over_data_and_fsdp_and_repeated_over_tensor():
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
    assert mesh_lib.row_multiple(mesh) == 4
    tokens_RT = np.arange(8 * 5, dtype=np.int32).reshape(8, 5)
    placed = mesh_lib.put({"tokens_RT": tokens_RT, "weight_R": np.ones(8)}, mesh)
    np.testing.assert_array_equal(placed["tokens_RT"], tokens_RT)
    assert {s.data.shape for s in placed["tokens_RT"].addressable_shards} == {(2, 5)}
    with pytest.raises(ValueError, match="6 rows cannot be split over the 4 devices"):
        mesh_lib.put({"tokens_RT": tokens_RT[:6]}, mesh)


@pytest.mark.parametrize(("length", "part"), [(4, 2), (3, 3)], ids=["split", "whole"])
def test_the_residual_constraint_keeps_rows_and_tokens_split_inside_jit(length, part):
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, context=2)
    hidden_RTD = mesh_lib.put(np.ones((4, length, 8), np.float32), mesh)

    @jax.jit
    def block(x):
        return mesh_lib.residual(mesh)(x @ jnp.ones((8, 8)))

    assert {s.data.shape for s in block(hidden_RTD).addressable_shards} == {(1, part, 8)}
