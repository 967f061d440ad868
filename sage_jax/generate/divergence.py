"""How far a policy has moved from its reference: the KL divergence, on the policy's own samples.

The mean of log pi - log pi_ref over the completions of a data set is no KL divergence: those were
not drawn from pi, and it can even be negative. So prompts are answered anew, at temperature 1, and
at every token drawn the two next-token distributions are compared whole, not by the token alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sage_jax import head, logprobs
from sage_jax.generate import sampler


class SampledKL(NamedTuple):
    """Of one sampled completion for each prompt, float32 [B]."""

    kl_B: jax.Array | np.ndarray  # sum over its tokens of KL(pi || pi_ref) at that place, nats
    log_ratio_B: jax.Array | np.ndarray  # log pi - log pi_ref of the completion itself, nats
    tokens_B: jax.Array | np.ndarray  # its tokens, the end token counted


def _of_chunk(
    hidden, head_DV, ref_hidden, ref_head_DV, targets, softcaps
) -> tuple[jax.Array, jax.Array]:
    def log_probs(hidden, head_DV, softcap):
        logits = jnp.matmul(hidden, head_DV, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(head.cap(logits, softcap), axis=-1)

    ours = log_probs(hidden, head_DV, softcaps[0])
    theirs = log_probs(ref_hidden, ref_head_DV, softcaps[1])
    ratio = ours - theirs
    kl = jnp.sum(jnp.exp(ours) * ratio, axis=-1)
    return kl, jnp.take_along_axis(ratio, targets[..., None], axis=-1)[..., 0]


def token_kl(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    ref_hidden_BTD: jax.Array,
    ref_head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int | None = None,
    softcaps: tuple[float, float] = (0.0, 0.0),
) -> tuple[jax.Array, jax.Array]:
    """Compares two next-token distributions at every position, without whole logits in memory.

    Args:
        hidden_BTD, head_DV: final hidden states and output projection of the policy.
        ref_hidden_BTD, ref_head_DV: those of the reference, over the same vocabulary.
        targets_BT: int32, the token that came next.
        chunk: positions at a time; None chooses by `logprobs.chunk_length`.
        softcaps: bounds of the two models' logits, see `head.cap`.

    Returns:
        float32 [B, T]: KL(pi || pi_ref) over the vocabulary, and log pi - log pi_ref of the token.

    >>> head = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))  # two models with a hidden unit each
    >>> one, two = jnp.array([[[1.0, 0.0]]]), jnp.array([[[0.0, 1.0]]])
    >>> kl, ratio = token_kl(one, head, two, head, jnp.array([[0]]))
    >>> round(float(kl[0, 0]), 4), round(float(ratio[0, 0]), 4)  # ln(5/9)/2 + ln(5)/2, ln(5/9)
    (0.5108, -0.5878)
    """
    rows, length, _ = hidden_BTD.shape
    # Two models' logits are alive at a time.
    chunk = chunk or logprobs.chunk_length(2 * rows, length, head_DV.shape[-1])
    count = math.ceil(length / chunk)
    fill = count * chunk - length

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, fill)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    found = jax.lax.map(
        lambda part: _of_chunk(part[0], head_DV, part[1], ref_head_DV, part[2], softcaps),
        (cut(hidden_BTD), cut(ref_hidden_BTD), cut(targets_BT)),
    )
    kl, ratio = (jnp.moveaxis(x, 0, 1).reshape(rows, count * chunk)[:, :length] for x in found)
    return kl, ratio


def make_sampled_kl(
    model: Any,
    reference: Any,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    rows: NamedSharding | None = None,
) -> Callable[..., SampledKL]:
    """Makes `measure(params, ref_params, tokens_BT, valid_BT, key_B) -> SampledKL`.

    A completion y is drawn from the policy at temperature 1, up to its end token or
    `max_new_tokens`; its KL is the sum over t of KL(pi(.|x, y_<t) || pi_ref(.|x, y_<t)). The mean
    over prompts estimates E_x KL(pi(.|x) || pi_ref(.|x)) of completions of that length without
    bias. Unlike the mean of log pi - log pi_ref over the same samples it is never negative: the
    next token is averaged over, not drawn.

    Args:
        model: the policy's `models.Model`.
        reference: the reference's.
        max_new_tokens: the most tokens of a completion.
        eos_id: the token that ends a completion, or several such.
        rows: how sequences are split over devices; None: not at all.

    Source: Amini, Vieira and Cotterell 2025, "Better estimation of the KL divergence between
    language models", arXiv 2504.10637; the term that DPO holds back, arXiv 2305.18290 eq. 3.
    """
    if rows is None:
        model, reference = (dataclasses.replace(m, constrain=None) for m in (model, reference))
    sample = sampler.make_sampler(model, max_new_tokens=max_new_tokens, eos_id=eos_id, rows=rows)

    def measure(params, ref_params, tokens_BT, valid_BT, key_B) -> SampledKL:
        drawn = sample(params, tokens_BT, valid_BT, key_B)
        tokens_B = drawn.length_B + drawn.finished_B
        counted_BN = jnp.arange(max_new_tokens) < tokens_B[:, None]
        whole_BT = jnp.concatenate([tokens_BT, drawn.tokens_BN], axis=1)
        segment_BT = jnp.concatenate([valid_BT, counted_BN], axis=1).astype(jnp.int32)
        position_BT = jnp.maximum(jnp.cumsum(segment_BT, axis=1) - 1, 0).astype(jnp.int32)
        where = slice(tokens_BT.shape[1] - 1, -1)  # the position before each new token
        hidden, ref_hidden = (
            m.hidden(p, whole_BT, position_BT, segment_BT)[:, where]
            for m, p in ((model, params), (reference, ref_params))
        )
        kl_BN, ratio_BN = token_kl(
            hidden,
            model.head(params),
            ref_hidden,
            reference.head(ref_params),
            drawn.tokens_BN,
            softcaps=(model.softcap, reference.softcap),
        )
        kl_B, ratio_B = (jnp.where(counted_BN, x, 0.0).sum(axis=1) for x in (kl_BN, ratio_BN))
        return SampledKL(kl_B, ratio_B, tokens_B.astype(jnp.float32))

    return measure


def summarise(found: SampledKL) -> dict[str, float]:
    """Means over prompts, with the standard error of the first.

    Returns:
        `kl` nats a completion, `kl_error` its standard error over prompts, `kl_per_token`.

    >>> two = SampledKL(np.array([1.0, 3.0]), np.zeros(2), np.array([4.0, 4.0]))
    >>> summarise(two)
    {'kl': 2.0, 'kl_error': 1.0, 'kl_per_token': 0.5}
    """
    kl_B, tokens_B = (np.asarray(x, np.float64) for x in (found.kl_B, found.tokens_B))
    error = float(kl_B.std(ddof=1) / math.sqrt(len(kl_B))) if len(kl_B) > 1 else 0.0
    return {
        "kl": float(kl_B.mean()),
        "kl_error": error,
        "kl_per_token": float(kl_B.sum() / tokens_B.sum()),
    }
