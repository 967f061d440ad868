"""Checkpoints: exact round trips, other meshes, killed saves, errors in one line."""

import logging
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sage_jax.runtime import checkpoint as checkpoint_lib
from sage_jax.runtime import mesh as mesh_lib

ARRAYS = {
    "margin": np.float32([0.1, np.nan, -np.inf]),
    "visits": np.arange(3, dtype=np.int32),
    "pool": np.array([5, 2**40], np.int64),
    "mean": np.float64([1 / 3]),
    "seen": np.array([True, False]),
    "plan": np.full((2, 3, 4), -1, np.int32),
    "nothing": np.zeros((0, 2), np.int64),
    "scalar": np.float32(3.5),
}
META = {"round": 3, "position": 7, "config": {"loss": {"beta": 0.1}}, "names": ["a", "b"]}


def make_state(seed: int = 0, width: int = 16) -> dict:
    kernel, table = jax.random.normal(jax.random.key(seed), (2, 2, 8, width))
    params = {
        "embed": {"embedding": table[0]},
        "layers": {"mlp": {"up": {"kernel": kernel.astype(jnp.bfloat16)}}},
    }
    return {
        "step": jnp.int32(12),
        "params": params,
        "opt_state": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.split(jax.random.key(seed + 5), 3),
    }


def abstract(state) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def bits(x) -> bytes:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, bits(a)) == (b.shape, b.dtype, bits(b))


def test_everything_comes_back_bit_for_bit_in_a_new_manager(tmp_path):
    state = make_state()
    with checkpoint_lib.Checkpoints(tmp_path / "c") as first:
        assert first.latest() is None
        first.save(12, state, ARRAYS, META)
    with checkpoint_lib.Checkpoints(tmp_path / "c") as second:
        assert second.latest() == 12
        found, arrays, meta = second.restore(12, abstract(state))
    assert_same_bits(found, state)
    assert meta == META
    assert sorted(arrays) == sorted(ARRAYS)
    for name, value in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (value.dtype, value.shape)
        assert arrays[name].tobytes() == value.tobytes()


def test_no_arrays_and_no_meta_are_fine(tmp_path):
    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)}, {}, {})
        _, arrays, meta = checkpoints.restore(1, abstract({"step": jnp.int32(1)}))
    assert (arrays, meta) == ({}, {})


def test_later_writes_to_the_callers_arrays_do_not_reach_the_checkpoint(tmp_path):
    memory = np.zeros(1000)
    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)}, {"memory": memory}, {})
        memory += 1
        _, arrays, _ = checkpoints.restore(1, abstract({"step": jnp.int32(1)}))
    np.testing.assert_array_equal(arrays["memory"], np.zeros(1000))


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": -1}])
def test_a_state_of_one_mesh_restores_onto_another(tmp_path, sizes):
    state, tx = make_state(), optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    old, new = mesh_lib.make_mesh(data=1, fsdp=4, tensor=2), mesh_lib.make_mesh(**sizes)

    def placed(mesh):
        whole = mesh_lib.replicated(mesh)
        return {
            "step": whole,
            "params": mesh_lib.shardings(state["params"], mesh),
            "opt_state": mesh_lib.state_shardings(tx, state["params"], mesh),
            "key": whole,
        }

    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(state, placed(old)), {}, {})
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed(new)
        )
        found, _, _ = checkpoints.restore(1, target)
    assert_same_bits(found, state)
    for leaf, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(placed(new)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_only_the_newest_are_kept_and_old_steps_are_refused(tmp_path):
    state = {"step": jnp.int32(1)}
    with checkpoint_lib.Checkpoints(tmp_path, keep=2, every=5) as checkpoints:
        for step in (5, 10, 15):
            assert checkpoints.due(step)
            checkpoints.save(step, state, {}, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 15]
        assert checkpoints.restore(10, abstract(state))[2] == {"step": 10}
        for step in (15, 12):
            with pytest.raises(ValueError, match=f"checkpoint of step 15, so one of step {step}"):
                checkpoints.save(step, state, {}, {})
        with pytest.raises(ValueError, match="no complete checkpoint of step 5; it has: 10, 15"):
            checkpoints.restore(5, abstract(state))
        assert not checkpoints.due(0)
        assert not checkpoints.due(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["params"]["embed"].update(embedding=jnp.zeros((8, 9))),
         "params/embed/embedding is float32[8, 16] in the checkpoint and float32[8, 9] in the run"),
        (lambda s: s.update(step=jnp.float32(0)),
         "step is int32[] in the checkpoint and float32[] in the run"),
        (lambda s: s["params"].update(adapter=jnp.zeros(2)),
         "params/adapter is no such leaf in the checkpoint and float32[2] in the run"),
        (lambda s: s.pop("key"),
         "key is uint32[3, 2] in the checkpoint and no such leaf in the run"),
        (lambda s: s.update(opt_state=optax.sgd(0.1).init(s["params"])),
         "opt_state/1/0/count is int32[] in the checkpoint and no such leaf in the run (and 4 "),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_named_in_one_line(tmp_path, change, words):
    other = make_state()
    change(other)
    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {}, {})
        with pytest.raises(ValueError) as error:
            checkpoints.restore(1, abstract(other))
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("arrays", "meta", "words"),
    [
        ({"why": np.array(["score"])}, {}, "'why' of a checkpoint has the dtype <U5"),
        ({}, {"position": np.int64(3)}, "must be plain JSON values"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, arrays, meta, words):
    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=words):
            checkpoints.save(1, {"step": jnp.int32(1)}, arrays, meta)
        assert checkpoints.steps() == []


def run_python(code: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, timeout=120, capture_output=True, text=True, env=environment)


def test_a_checkpoint_with_damaged_metadata_is_named(tmp_path):
    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(), {}, {})
        checkpoints.wait()
        (tmp_path / "3" / "state" / "_METADATA").write_text("{")
        with pytest.raises(ValueError) as error:
            checkpoints.restore(3, abstract(make_state()))
    assert f"The checkpoint {tmp_path / '3'} cannot be read" in str(error.value)
    assert "\n" not in str(error.value)


RESTORE = """
    import sys, jax
    from sage_jax.runtime import checkpoint
    checkpoints = checkpoint.Checkpoints(sys.argv[1])
    try:
        checkpoints.restore(3, {"step": jax.ShapeDtypeStruct((4,), "int32")})
    except ValueError as e:
        print(e)
    checkpoints.close()
"""


def test_a_checkpoint_with_damaged_data_is_named(tmp_path):  # leaves threads behind: own process
    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"step": jnp.arange(4)}, {}, {})
    for file in (tmp_path / "3" / "state" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    run = run_python(RESTORE, tmp_path)
    (line,) = run.stdout.splitlines()
    assert line.startswith(f"The checkpoint {tmp_path / '3'} cannot be read")
    assert run.stderr == ""


FULL = """
    import resource, sys
    import jax.numpy as jnp
    from sage_jax.runtime import checkpoint

    checkpoints = checkpoint.Checkpoints(sys.argv[1])
    checkpoints.save(1, {"w": jnp.zeros(4)}, {}, {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # in place of a full disk
    import jax
    weights = {f"w{i}": jax.random.normal(jax.random.key(i), (100, 100)) for i in range(8)}
    checkpoints.save(2, weights, {}, {})
    for call in (checkpoints.wait, checkpoints.close):
        try:
            call()
        except OSError as e:
            print(e)
"""


def test_a_checkpoint_that_cannot_be_written_is_one_line_with_what_is_left(tmp_path):
    run = run_python(FULL, tmp_path)
    said = run.stdout.splitlines()[0]
    assert f"{tmp_path} could not be written" in said
    assert "File too large" in said and "last complete one, of step 1" in said
    assert run.stderr == ""


KILLED = """
    import os, pathlib, signal, sys
    import jax.numpy as jnp, numpy as np
    from sage_jax.runtime import checkpoint

    checkpoints = checkpoint.Checkpoints(sys.argv[1])
    checkpoints.save(1, {"step": jnp.int32(1)}, {"a": np.zeros(4)}, {"round": 1})
    checkpoints.wait()
    def killed(*args, **kw):    # the last act of a save is to rename its directory
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path.rename = pathlib.Path.replace = os.rename = os.replace = killed
    checkpoints.save(2, {"step": jnp.int32(2)}, {"a": np.ones(4)}, {"round": 2})
    checkpoints.wait()
"""


def test_a_save_that_was_killed_is_ignored_and_its_step_can_be_saved_again(tmp_path):
    run = run_python(KILLED, tmp_path)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert any("tmp" in path.name for path in tmp_path.iterdir())
    target = {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    with checkpoint_lib.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        state, arrays, meta = checkpoints.restore(1, target)
        assert (int(state["step"]), arrays["a"].tolist(), meta) == (1, [0.0] * 4, {"round": 1})
        checkpoints.save(2, {"step": jnp.int32(2)}, {}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_saving_and_restoring_logs_nothing(tmp_path, caplog):
    from absl import logging as absl_logging

    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        with caplog.at_level(logging.INFO), checkpoint_lib.Checkpoints(tmp_path, keep=1) as c:
            logging.getLogger("absl").info("a line of our own")
            for step in (1, 2):
                c.save(step, make_state(), ARRAYS, META)
            c.restore(2, abstract(make_state()))
    finally:
        absl_logging.set_verbosity(before)
    assert [record.getMessage() for record in caplog.records] == ["a line of our own"]


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"every": -1}])
def test_settings_out_of_range_are_named(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"checkpoint.{name}="):
        checkpoint_lib.Checkpoints(tmp_path, **wrong)
