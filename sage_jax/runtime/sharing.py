"""The rows of a run: which prompts are computed once, by data.share_prompts, and how many lengths
there are; the one place that decides."""

from __future__ import annotations

import jax
import numpy as np

from sage_jax import config
from sage_jax.data import encode, steps
from sage_jax.models import attention, attention_tpu, decoder
from sage_jax.runtime import chips, counters, setup

# What a row length has to win is the time in which its program compiles: a guess, as are FLOP/s.
COMPILES = 8.0  # seconds; 6 a program for the quickstart's decoder and 10 for SmolLM2 on two cores
# FLOP/s of a CPU, whatever devices it plays, and of an accelerator that no data sheet here knows,
# which so keeps more lengths than it needs; and the share of the peak that a known one reaches.
CPU_FLOPS, UTILISATION = 1e11, 0.4
LEAST_SHARED = 0.02  # of the tokens that sharing prompts has to save, else it is not done


def shapes(
    run: config.Run,
    model: decoder.Model,
    mesh: jax.sharding.Mesh,
    pairs: encode.EncodedPairs,
    *,
    share: bool | None = None,
    lengths_N: np.ndarray | None = None,
) -> tuple[steps.Shape, steps.Shape]:
    """The rows of steps over a data set and those of passes over it.

    Args:
        run: the settings.
        model: which is on the devices of `mesh`.
        mesh: the devices.
        pairs: the data set.
        share: whether a pair's completions share a prompt; None: by `shares_prompts`.
        lengths_N: tokens in a row of each pair that these rows may have to hold, of this data set
            or another; None: of `pairs`.

    Raises:
        ValueError: as `shares_prompts` and `problem_shapes`.
    """
    if share is None:
        share = shares_prompts(run, model, pairs)
    if lengths_N is None:
        lengths_N = pairs.row_lengths(share)
    price = program_tokens(run, model, mesh, pairs)
    shape = setup.row_shape(run, lengths_N, mesh, share=share, price=price)
    return problem_shapes(run, model, pairs, shape)


def program_tokens(
    run: config.Run, model: decoder.Model, mesh: jax.sharding.Mesh, pairs: encode.EncodedPairs
) -> float:
    """Tokens a step that a program saves if it saves the time in which it compiles.

    Many in a short run of a small model, where compilation takes longer than the steps; next to
    none where training takes hours.
    """
    peak = chips.PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    speed = CPU_FLOPS if peak is None else UTILISATION * peak * mesh.size
    of_token = counters.pair_flops(model, pairs).sum() / pairs.lengths_N2.sum()
    passes = counters.train_passes(run)
    return COMPILES * speed / (float(of_token) * passes * run.train.steps)


def shares_prompts(run: config.Run, model: decoder.Model, pairs: encode.EncodedPairs) -> bool:
    """Whether both completions of a pair share one prompt in their row, by data.share_prompts.

    Raises:
        ValueError: it is "pair" or "problem", and the model does not allow it.
    """
    setting = run.data.share_prompts
    spec = model.spec
    windows = any(getattr(spec, "windows", ()) or ()) or bool(getattr(spec, "window", 0))
    splash = attention.Placement(run.model.attention).chosen(2**20) == "splash"
    if setting in ("pair", "problem") and windows and splash:
        raise ValueError(
            f"config.data.share_prompts={setting!r} does not go with this model's sliding windows "
            f"on a TPU. Use 'auto'."
        )
    if setting == "off" or (setting == "auto" and windows) or not pairs.lengths_N2[:, 1].all():
        return False
    saved = pairs.common_N.sum() / max(int(pairs.lengths_N2.sum()), 1)
    return setting != "auto" or bool(saved >= LEAST_SHARED)


def problem_shapes(
    run: config.Run, model: decoder.Model, pairs: encode.EncodedPairs, shape: steps.Shape
) -> tuple[steps.Shape, steps.Shape]:
    """The rows of steps and those of passes, by data.share_prompts: alike, unless pairs of one
    problem lie together in one of them and share their prompt and their completions.

    This alone decides where they do: where it saves anything ("problem") or `LEAST_SHARED` of the
    tokens ("auto"), and neither the model nor the devices forbid it.

    Args:
        run: the settings.
        model: which is on the run's devices.
        pairs: the data set.
        shape: of rows in which each pair is by itself, from `row_shape`.

    Raises:
        ValueError: data.share_prompts is "problem", and the model or the devices do not allow it.
    """
    if run.data.share_prompts not in ("auto", "problem") or not shape.share:
        return shape, shape
    place, scaling = model.place, model.spec.rope_scaling
    longest = shape.packed.row_length
    reasons = {
        "data.packing=False": not run.data.packing,
        "mesh.context": place.size(place.context) > 1,
        "a model whose rotary factors depend on the length of a sequence": (
            scaling is not None and scaling.kind == "longrope"
        ),
        f"rows of {longest} tokens on a TPU": (
            place.chosen(longest) == "splash" and longest * steps.MOST_KEYS > attention_tpu.LONGEST
        ),
    }
    refused = [reason for reason, holds in reasons.items() if holds]
    if refused and run.data.share_prompts == "problem":
        raise ValueError(
            f"config.data.share_prompts='problem' does not go with {refused[0]}. Use 'auto', which "
            f"shares a prompt between both answers of a pair alone there."
        )
    if refused:
        return shape, shape
    least = LEAST_SHARED if run.data.share_prompts == "auto" else 0.0
    return steps.of_problems(pairs, shape, min(run.train.batch_pairs, len(pairs)), least=least)
