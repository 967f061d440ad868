"""The steps of a run from shapes alone, ready to be compiled for a machine that is not there.

Rows are planned as a run plans them, for pairs of stated lengths (`runtime/planned.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import config, logprobs
from sage_jax.data import steps as row_shapes
from sage_jax.models import (
    attention_tpu,
    catalog,
    decoder,
    hf,
    hf_config,
    lora,
    quantised,
    sources,
    spec,
    tensors,
)
from sage_jax.runtime import ahead, counters, forward, planned, programs, setup, state, targets
from sage_jax.runtime import mesh as meshes

STEPS = ("train", "score", "eval", "sample")


def make_mesh(run: config.Run, machine: targets.Target) -> jax.sharding.Mesh:
    """The mesh of the settings on the devices of a topology."""
    return meshes.make_mesh(**dataclasses.asdict(run.mesh), devices=machine.devices)


def abstract_policy(run: config.Run, mesh: jax.sharding.Mesh) -> setup.Policy:
    """The model of a run with shapes in place of weights.

    `model.path` may be "spec:NAME", a directory of which only config.json is read, or "new".
    """
    model = setup.on_mesh(run, decoder.Model(model_spec(run)), mesh)
    shapes = tensors.abstract(model.spec)
    base = placed(shapes, meshes.shardings(shapes, mesh))
    policy = setup.Policy(model, base, None, "", mesh)
    settings = setup.lora_settings(run)
    if run.lora.base != config.Lora.base:
        held = jax.eval_shape(lambda p: quantised.hold(p, run.lora.base, run.model.dtype), shapes)
        shapes, base = held, placed(held, meshes.shardings(held, mesh))
    if run.lora.path:
        raise ValueError(
            f"config.lora.path={run.lora.path!r} names an adapter, whose files a dry run does not "
            f"read. Set config.lora.rank and lora.targets to what it has."
        )
    if settings is None:
        return policy
    adapter = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, settings), shapes)
    return dataclasses.replace(
        policy,
        params=placed(adapter, meshes.shardings(adapter, mesh)),
        frozen=base,
        lora=settings,
    )


def model_spec(run: config.Run) -> spec.ModelSpec:
    """The architecture of `model.path`, from a name, a config.json or the settings.

    Raises:
        ValueError: none of these is there.
    """
    path = run.model.path
    named = catalog.named(path)
    if named is not None:
        return named
    if path == "new" or not path:
        return setup.new_spec(run, setup.load_tokenizer(run))
    where = sources.resolve(path)
    if (where / "config.json").is_file():
        file = where / "config.json"
        return hf_config.from_hf(hf.read_json(file), None, origin=str(file))
    model, _ = hf.load(path)  # a GGUF file: its header alone has no reader of its own
    return model.spec


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes that say where their arrays live."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def row_shape(
    run: config.Run, mesh: jax.sharding.Mesh, pairs: planned.Pairs, share: bool
) -> row_shapes.Shape:
    """The rows that a run with such pairs plans."""
    lengths_N = pairs.row_lengths(share)
    if len(lengths_N) < run.train.batch_pairs:  # all alike
        lengths_N = np.resize(lengths_N, run.train.batch_pairs)
    return setup.row_shape(run, lengths_N, mesh, share=share)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step ready to be compiled, and what its figures are held against."""

    name: str
    lower: Callable[[], Any]
    pairs: float  # that one run of it handles; prompts for `sample`
    tokens: float  # of these pairs that lie in the rows; prompts that they share count once
    model_flops: float  # of the whole batch, by the closed form, nothing recomputed
    beside_bytes: float  # on each device in a training, besides what the program sees
    trips: Callable[[str], float]  # of loops that end by a condition on data, by their path
    keys: float = 0.0  # that attention computes for a query, see `planned.keys_computed`
    rows: tuple[int, int] = (0, 0)  # their number and their length; `sample` has none
    longer: tuple[int, ...] = ()  # row lengths of the few steps whose pairs do not fit into these
    shared: bool = False  # both answers of a pair share one prompt in their row


def make_step(
    name: str, run: config.Run, mesh: jax.sharding.Mesh, pairs: planned.Pairs | None = None
) -> Lowered:
    """One of `STEPS`, as the run would run it on such pairs; None: on the longest there may be."""
    run = config.settle_data(run, {})
    policy = abstract_policy(run, mesh)
    if name == "sample":
        return _sample_step(run, policy, mesh)
    pairs = planned.pairs(run.data.max_length) if pairs is None else pairs
    policy = setup.fitted(policy, pairs.lengths_N2)
    share = planned.shares(run, policy.model, pairs)
    shape = row_shape(run, mesh, pairs, share)
    rows = ahead.rows_of(shape, shape.row_length, mesh)
    count = min(run.train.batch_pairs, shape.rows * shape.slots)
    flops_N = counters.pair_flops(policy.model, pairs, shared=share)  # type: ignore[arg-type]
    flops = count * float(flops_N.mean())
    tokens = count * float(pairs.row_lengths(share).mean())
    answers = count * float((pairs.lengths_N2 - pairs.start_N2).sum(axis=1).mean())
    keys = _keys(policy.model, mesh, pairs, shape, count)
    trips = _trips(policy, shape, mesh, answers, keys)
    about: dict[str, Any] = {
        "keys": keys,
        "rows": (shape.rows, shape.row_length),
        "longer": tuple(size for size in shape.sizes if size > shape.row_length),
        "shared": share,
    }
    tx, _ = state.make_optimizer(run)
    weights = device_bytes(policy.params)  # with adapters: these alone
    if name == "train":
        loss = setup.make_loss(run)
        program = programs.train_step(run, policy, mesh, tx, loss, setup.make_score_fn(run, loss))
        start = state.abstract_state(run, policy.params, mesh)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        now = programs.now(run, nll_weight=number, soft=number)
        # The weights that training started from stay: they are the reference of evaluations.
        return Lowered(
            name,
            lambda: program.lower(start, policy.frozen, rows, now),
            count,
            tokens,
            counters.train_passes(run) * flops,
            weights,
            trips,
            **about,
        )
    # In a training, the optimizer's state and the first weights lie beside a forward pass.
    beside = device_bytes(state.abstract_state(run, policy.params, mesh))
    params, frozen = policy.params, policy.frozen
    light = name == "score"
    dtype = run.selection.scoring_dtype if light else ""
    if dtype:
        beside += weights + device_bytes(frozen)
        cast = jax.eval_shape(functools.partial(forward.cast, dtype=dtype), (params, frozen))
        params, frozen = placed(cast, meshes.shardings(cast, mesh))
    program = programs.stats_step(
        policy, mesh, logit_norm="logit_norm" in run.selection.stability, light=light, dtype=dtype
    )
    return Lowered(
        name,
        lambda: program.lower(params, frozen, rows),
        count,
        tokens,
        flops,
        beside,
        trips,
        **about,
    )


def _sample_step(run: config.Run, policy: setup.Policy, mesh: jax.sharding.Mesh) -> Lowered:
    new = run.eval.max_new_tokens
    prompt = max(32, 1 << (max(run.data.max_length - new, 1).bit_length() - 1))
    parts = meshes.row_multiple(mesh)
    count = -(-run.eval.batch // parts) * parts
    program, arguments = programs.sampler(
        policy, prompts=count, prompt_length=prompt, max_new_tokens=new
    )
    lengths = np.full((count, 1), prompt + new)
    beside = device_bytes(state.abstract_state(run, policy.params, mesh))
    block = _block(policy.model, mesh, prompt)
    # of the last stretch of a prompt, which has the most
    keys = prompt - (prompt // mesh.shape[meshes.CONTEXT] - block) / 2 if block else prompt
    return Lowered(
        "sample", lambda: program.lower(*arguments), count, float(count * new),
        _forward_flops(policy.model, lengths), beside, lambda _: new, keys,
    )  # fmt: skip


def _block(model: decoder.Model, mesh: jax.sharding.Mesh, length: int) -> int | None:
    """Queries and keys of the blocks that the model's attention skips; None: it skips none."""
    kernel = model.place.chosen(length)
    if kernel == "dense":
        return None
    if kernel == "splash":
        return attention_tpu.block_size(length // mesh.shape[meshes.CONTEXT])
    return model.place.block


def _keys(
    model: decoder.Model,
    mesh: jax.sharding.Mesh,
    pairs: planned.Pairs,
    shape: row_shapes.Shape,
    batch_pairs: int,
) -> float:
    """Keys that the run's attention computes for a query."""
    block = _block(model, mesh, shape.row_length)
    if block is None:
        return shape.row_length
    splash = model.place.chosen(shape.row_length) == "splash"
    how: dict[str, Any] = {"passes": attention_tpu.passes} if splash else {}
    parts, stretches = meshes.row_multiple(mesh), mesh.shape[meshes.CONTEXT]
    return planned.keys_computed(
        pairs, shape, batch_pairs, parts=parts, stretches=stretches, block=block, **how
    )


def _trips(
    policy: setup.Policy,
    shape: row_shapes.Shape,
    mesh: jax.sharding.Mesh,
    answers: float,
    keys: float,
) -> Callable[[str], float]:
    """How often loops over data run: over the tokens of answers, evenly spread over the devices;
    and over the keys that attention in blocks computes for a query."""
    parts = mesh.size // mesh.shape["tensor"]
    tokens = shape.rows * shape.row_length // parts
    all_ = logprobs.head_chunks(tokens, policy.model.spec.vocab, setup.head_memory(mesh).chunk)
    head = math.ceil(all_ * min(answers / parts / tokens, 1.0))
    blocks = max(keys / policy.model.place.block, 1.0)
    return lambda path: blocks if "attention" in path else head


def _forward_flops(model: decoder.Model, lengths: np.ndarray) -> float:
    tokens = float(lengths.sum())
    attended = float((lengths.astype(np.float64) * (lengths + 1) / 2).sum())
    return model.forward_flops(tokens, attended)  # type: ignore[arg-type]


def device_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of placed shapes."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )
