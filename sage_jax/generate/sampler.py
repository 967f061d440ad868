"""Sampling: one batched prefill, then a while-loop of single-token steps over a key-value cache.

`make_sampler` gives the pure function; `generate` is the host side that encodes prompts, groups
them by length into a few static shapes, and decodes the text.

What a sequence samples depends on its own key and tokens, not on its neighbours: the key is
`fold_in(fold_in(key, prompt number), sample number)`, folded again with the position of the token.
(Batches of other shapes may round logits differently in the last bit, as everywhere.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax import head
from sage_jax.generate import prompting

Params = Any


class Sampled(NamedTuple):
    """What a sampler returns."""

    tokens_BN: jax.Array  # int32, new tokens; 0 after the end
    length_B: jax.Array  # int32, new tokens, the end token not counted
    finished_B: jax.Array  # bool, the end token came (false: cut at max_new_tokens)


class Completion(NamedTuple):
    """One sampled answer."""

    text: str  # without special tokens
    tokens: int  # new tokens, the end token not counted
    finished: bool  # it ended by itself


def keep_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Logits with everything outside the nucleus at minus infinity.

    The nucleus is the smallest set of most probable tokens whose probabilities sum to at least
    `top_p`; tokens that tie with its least probable member stay too.

    Args:
        logits_BV: float32 [B, V], temperature applied.
        top_p: in (0, 1].

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.

    >>> keep_top_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.7)[0, 2]
    Array(-inf, dtype=float32)
    """
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # The first token is always kept: nothing comes before it.
    last_B1 = jnp.sum(before_BV < top_p, axis=-1, keepdims=True) - 1
    cut_B1 = jnp.take_along_axis(sorted_BV, jnp.maximum(last_B1, 0), axis=-1)
    return jnp.where(logits_BV >= cut_B1, logits_BV, -jnp.inf)


def make_chooser(temperature: float, top_p: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns `choose(logits_BV, key_B) -> token_B`; temperature 0 takes the most probable token.

    Raises:
        ValueError: a negative temperature, or a top_p outside (0, 1].
    """
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: temperature is at least 0 (0 = greedy) and "
            "top_p lies in (0, 1] (1 = off)."
        )

    def choose(logits_BV: jax.Array, key_B: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        scaled_BV = logits_BV / temperature
        if top_p < 1:
            scaled_BV = keep_top_p(scaled_BV, top_p)
        return jax.vmap(jax.random.categorical)(key_B, scaled_BV).astype(jnp.int32)

    return choose


def make_sampler(
    model: Any,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    rows: NamedSharding | None = None,
) -> Callable[[Params, jax.Array, jax.Array, jax.Array], Sampled]:
    """Returns the pure function `sample(params, tokens_BT, valid_BT, key_B) -> Sampled`.

    tokens_BT are prompts padded on the left (int32), valid_BT is false at padding (bool; the last
    column is true), key_B one PRNG key per sequence. The loop ends as soon as all have ended.

    Args:
        model: a `models.Model`, or anything with its `init_cache`, `prefill`, `decode`, `head` and
            `softcap`.
        max_new_tokens: the most tokens a completion may have, end token included.
        eos_id: the token that ends a completion, or several such.
        temperature: divides the logits; 0 = greedy.
        top_p: nucleus sampling, 1 = off.
        rows: how arrays of sequences are split, which keeps the cache split like them.

    Raises:
        ValueError: max_new_tokens below 1, or as `make_chooser`.
    """
    if max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves nothing to sample; use at least 1."
        )
    choose = make_chooser(temperature, top_p)
    together = getattr(model, "together", None)  # a user's own model need not have it
    end_E = np.atleast_1d(np.asarray(eos_id, np.int32))

    def sample(
        params: Params, tokens_BT: jax.Array, valid_BT: jax.Array, key_B: jax.Array
    ) -> Sampled:
        count, length = tokens_BT.shape
        if together is not None:
            params = together(params)
        head_DV = model.head(params)

        def next_token(hidden_BD: jax.Array, t: jax.Array | int, done_B: jax.Array) -> jax.Array:
            logits_BV = jnp.matmul(hidden_BD, head_DV, preferred_element_type=jnp.float32)
            logits_BV = head.cap(logits_BV, model.softcap)
            step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, t)
            return jnp.where(done_B, 0, choose(logits_BV, step_key_B))

        def is_end(token_B: jax.Array) -> jax.Array:
            return jnp.any(token_B[:, None] == end_E, axis=-1)

        position_BT = jnp.maximum(jnp.cumsum(valid_BT, axis=-1) - 1, 0).astype(jnp.int32)
        cache = _split_cache(model.init_cache(count, length + max_new_tokens), rows)
        hidden_BTD, cache = model.prefill(params, tokens_BT, position_BT, valid_BT, cache)
        nobody_B = jnp.zeros(count, bool)
        first_B = next_token(hidden_BTD[:, -1], 0, nobody_B)
        slots = jnp.pad(valid_BT, ((0, 0), (0, max_new_tokens)), constant_values=True)

        def unfinished(carry: tuple) -> jax.Array:
            t, _, done_B, _, _ = carry
            return (t < max_new_tokens) & ~jnp.all(done_B)

        def step(carry: tuple) -> tuple:
            t, token_B, done_B, cache, tokens_BN = carry
            slot = length + t - 1
            valid_BC = slots & (jnp.arange(length + max_new_tokens) <= slot)
            position_B = position_BT[:, -1] + t
            hidden_BD, cache = model.decode(params, token_B, position_B, valid_BC, cache, slot)
            token_B = next_token(hidden_BD, t, done_B)
            tokens_BN = tokens_BN.at[:, t].set(token_B)
            return t + 1, token_B, done_B | is_end(token_B), cache, tokens_BN

        tokens_BN = jnp.zeros((count, max_new_tokens), jnp.int32).at[:, 0].set(first_B)
        carry = (jnp.int32(1), first_B, is_end(first_B), cache, tokens_BN)
        _, _, done_B, _, tokens_BN = jax.lax.while_loop(unfinished, step, carry)
        end_BN = jnp.any(tokens_BN[..., None] == end_E, axis=-1)
        # After the end a row holds 0, which may itself be an end token: the first one counts.
        length_B = jnp.where(done_B, jnp.argmax(end_BN, axis=-1), max_new_tokens)
        return Sampled(tokens_BN, length_B.astype(jnp.int32), done_B)

    return sample


def _split_cache(cache: Any, rows: NamedSharding | None) -> Any:
    if rows is None:
        return cache

    def one(leaf: jax.Array) -> jax.Array:  # [L, B, ...]; heads follow their weights
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 2)
        spec = PartitionSpec(None, rows.spec[0], *free)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(rows.mesh, spec))

    return jax.tree.map(one, cache)


@functools.lru_cache(maxsize=16)
def compiled(
    model: Any,
    max_new_tokens: int,
    eos_id: tuple[int, ...],
    temperature: float,
    top_p: float,
    rows: NamedSharding | None = None,
) -> Callable[..., Sampled]:
    """The jitted sampler of `(params, tokens_BT, valid_BT, key data)`, once for each setting."""
    sample = make_sampler(
        model, max_new_tokens=max_new_tokens, eos_id=eos_id, temperature=temperature, top_p=top_p,
        rows=rows,
    )  # fmt: skip
    return jax.jit(
        lambda params, tokens, valid, bits: sample(
            params, tokens, valid, jax.random.wrap_key_data(bits)
        ),
        out_shardings=everywhere(rows),
    )


def everywhere(rows: NamedSharding | None) -> NamedSharding | None:
    """Where results go that every process reads: a copy on each device."""
    return None if rows is None else NamedSharding(rows.mesh, PartitionSpec())


def parts(rows: NamedSharding | None) -> int:
    """Into how many parts sequences are split: a batch has a multiple of that."""
    return 1 if rows is None else rows.mesh.size // rows.shard_shape((rows.mesh.size,))[0]


def spread(arrays: Any, rows: NamedSharding | None) -> Any:
    """Host arrays [B, ...] that every process has, split over the devices."""
    if rows is None:
        return arrays
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, rows, lambda index: x[index]), arrays
    )


def plan_batches(length_P: Sequence[int], batch: int, smallest: int = 32) -> list[tuple[int, list]]:
    """Groups prompts by length into few static shapes.

    Prompt lengths are rounded up to powers of two, `smallest` at least; a group that does not fill
    a batch moves up into the next one rather than compile a shape of its own.

    Args:
        length_P: tokens of each prompt.
        batch: prompts in a batch.
        smallest: smallest padded length in tokens.

    Returns:
        (padded length, indices of at most `batch` prompts) for each batch; every prompt once.

    >>> plan_batches([3, 70, 40, 5], batch=2)
    [(32, [0, 3]), (128, [2, 1])]
    """
    order = sorted(range(len(length_P)), key=lambda i: (length_P[i], i))
    groups: dict[int, list[int]] = {}
    for i in order:
        padded = max(smallest, 1 << (length_P[i] - 1).bit_length())
        groups.setdefault(padded, []).append(i)
    plan, waiting = [], []
    for n, (padded, group) in enumerate(groups.items(), 1):
        waiting += group
        whole = len(waiting) if n == len(groups) else len(waiting) // batch * batch
        plan += [(padded, waiting[at : at + batch]) for at in range(0, whole, batch)]
        waiting = waiting[whole:]
    return plan


def generate(
    model: Any,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[prompting.Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    rows: NamedSharding | None = None,
) -> list[list[Completion]]:
    """Samples completions of prompts.

    Args:
        model, params: the model, see `models.load`.
        tokenizer: its tokenizer.
        prompts: texts, or lists of chat messages.
        max_new_tokens: the most tokens of a completion, end token included.
        temperature: 0 = greedy.
        top_p: nucleus sampling, 1 = off.
        samples: completions of each prompt (1 when greedy: more would be copies).
        seed: other seeds give other samples.
        batch: sequences decoded at a time; the last batch is filled up with copies, so that every
            batch of one prompt length has the same shape.
        progress: called as `progress(sequences done, sequences in all)` after each batch.
        rows: how sequences are split over the devices of the mesh that `params` lie on; batches are
            rounded up to a multiple of them. With several processes all of them call this, with the
            same arguments, and all get the same answers. None: not at all.

    Returns:
        For each prompt, in order, its `samples` completions.

    Raises:
        ValueError: an empty prompt, samples or batch below 1, or as `make_sampler`.
    """
    if samples < 1 or batch < 1:
        raise ValueError(f"samples={samples}, batch={batch}: both must be at least 1.")
    ends = prompting.end_ids(model, tokenizer)
    run = compiled(model, max_new_tokens, ends, float(temperature), float(top_p), rows)
    ids = prompting.encode_prompts(tokenizer, prompts)
    total = len(prompts) * samples
    bits = np.asarray(jax.random.key_data(_sequence_keys(seed, len(prompts), samples)))
    out: list[Completion | None] = [None] * total
    done, batch = 0, -(-min(batch, total) // parts(rows)) * parts(rows)
    for padded, members in plan_batches([len(ids[q // samples]) for q in range(total)], batch):
        filled = members + [members[-1]] * (batch - len(members))
        tokens_BT, valid_BT = left_pad([ids[q // samples] for q in filled], padded)
        given = spread((tokens_BT, valid_BT, bits[np.asarray(filled)]), rows)
        result = jax.device_get(run(params, *given))
        for row, q in enumerate(members):
            length, finished = int(result.length_B[row]), bool(result.finished_B[row])
            text = tokenizer.decode(result.tokens_BN[row, :length], skip_special_tokens=True)
            out[q] = Completion(text, length, finished)
        done += len(members)
        if progress is not None:
            progress(done, total)
    return [out[p * samples : (p + 1) * samples] for p in range(len(prompts))]  # type: ignore[misc]


def _sequence_keys(seed: int, prompts: int, samples: int) -> jax.Array:
    """One key per sequence, sequence = prompt * samples + sample."""
    prompt_P = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.arange(prompts)
    )
    key_PK = jax.vmap(
        lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(samples))
    )(prompt_P)
    return key_PK.reshape(prompts * samples)


def left_pad(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as a sampler takes them: int32 tokens [B, length], and where they are valid.

    >>> left_pad([[5], [6, 7]], 2)[0].tolist()
    [[0, 5], [6, 7]]
    """
    tokens_BT = np.zeros((len(ids), length), np.int32)
    valid_BT = np.zeros((len(ids), length), bool)
    for row, prompt in enumerate(ids):
        tokens_BT[row, length - len(prompt) :] = prompt
        valid_BT[row, length - len(prompt) :] = True
    return tokens_BT, valid_BT
