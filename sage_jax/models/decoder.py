"""A decoder-only language model: a scan over identical layers, and `Model`, its functional face.

`Model` holds Python choices only. Parameters are nested dicts of arrays with these paths (leading
axis of everything under `layers` = layer), which is what sharding rules and decay masks match:

    embed/embedding                                 [V, D]
    layers/attention/{q,k,v,o}/{kernel,bias}        [L, in, out], [L, out]
    layers/attention/{q_norm,k_norm}/scale          [L, E], [L, H * E] or [L, G * E]
    layers/mlp/{gate,up,down}/{kernel,bias}
    layers/mlp/router/kernel                        [L, D, X], mixtures of experts only
    layers/mlp/experts/{gate,up,down}/kernel        [L, X, in, out], in the place of mlp/gate ...
    layers/{attention,attention_post,mlp,mlp_post}_norm/scale    [L, D], those the family has
    final_norm/scale                                [D]
    lm_head/kernel                                  [D, V], untied models only
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_jax import batch, product
from sage_jax import head as heads
from sage_jax.models import attention, attention_blocks, layers, moe
from sage_jax.models import spec as spec_lib

Params = Any  # nested dict of arrays
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STORED = DTYPES | {"float16": jnp.float16}  # what weights may be written in
_policies = jax.checkpoint_policies
REMAT: dict[str, Any] = {
    "none": None,  # keep every intermediate
    "dots": _policies.save_from_both_policies(  # keep the outputs of linear maps and of attention
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(attention_blocks.SAVED, product.SAVED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the layer inputs only
}


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, in the compute dtype."""

    key: jax.Array  # [L, B, G, C, E], as the products of `decode` take them
    value: jax.Array  # [L, B, G, C, E]


class Decoder(nn.Module):
    """The network. Maps tokens to final-normed hidden states; the head is applied by the caller."""

    spec: spec_lib.ModelSpec
    dtype: Any
    remat: str
    constrain: Callable[[jax.Array], jax.Array] | None
    place: attention.Placement

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        position_BT: jax.Array,
        seen: layers.Seen,
        past: layers.KeyValue | None = None,
        keep: bool = False,
        long_BT: jax.Array | bool = False,
        real_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, layers.KeyValue | None, moe.Balance | None]:
        spec = self.spec
        # On a CPU the layers' sum stays float32: XLA would widen what is kept of it, see `product`.
        cpu = self.place.platform == "cpu"
        embed = nn.Embed(
            spec.vocab,
            spec.d_model,
            dtype=None if cpu else self.dtype,  # None: the table is not cast as a whole
            embedding_init=nn.initializers.normal(0.02),
            name="embed",
        )
        x_BTD = embed(tokens_BT).astype(jnp.float32 if cpu else self.dtype)
        if spec_lib.FAMILIES[spec.family].embed_scaled:
            x_BTD = x_BTD * jnp.asarray(spec.d_model**0.5, x_BTD.dtype)
        if self.constrain is not None:
            x_BTD = self.constrain(x_BTD)
        block: Any = layers.Block
        if self.remat != "none" and not keep:
            block = nn.remat(block, policy=REMAT[self.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            length=spec.layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
        )(spec, self.dtype, keep, self.constrain, self.place, name="layers")
        length = tokens_BT.shape[1] if past is None else past[0].shape[3]  # of [L, B, G, C, E]
        turns = layers.rotation(spec, position_BT, long_BT)
        x_BTD, (own, balance) = stack(x_BTD, layers.kinds(spec, length), past, turns, seen, real_BT)
        if not spec.tied and self.is_initializing():
            _Head(spec, name="lm_head")()
        return layers.norm(spec, self.dtype, "final_norm", self.place)(x_BTD), own, balance


class _Head(nn.Module):
    """Creates the untied output matrix; `Model.head` reads it."""

    spec: spec_lib.ModelSpec

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.spec.d_model, self.spec.vocab)
        return self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions of parameters and tokens, for one architecture and compute dtype.

    Attributes:
      spec: the architecture.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 either way.
      remat: what the backward pass recomputes: "none", "dots" (all but the linear maps; the fastest
        on CPU too, where storing every intermediate costs more than computing it) or "full".
      constrain: applied to the residual stream [R, T, D] after the embedding and after each layer;
        under a mesh, a function that calls `jax.lax.with_sharding_constraint`. None: nothing.
      place: how attention is computed, and over which devices; experts run over the same.
      gather: applied to the embedding, in the compute dtype, before tokens are looked up; under a
        mesh, a function that says where it lies. None: nothing.
      together: applied to the parameters by a sampler, once, before its loop over tokens. None:
        nothing.

    >>> spec = spec_lib.ModelSpec(vocab=32, d_model=16, d_ff=32, layers=2, heads=2)
    >>> model = Model(spec)
    >>> params = model.init(jax.random.key(0))
    >>> model.logits(params, jnp.array([[1, 2, 3]])).shape
    (1, 3, 32)
    """

    spec: spec_lib.ModelSpec
    dtype: str = "float32"
    remat: str = "dots"
    constrain: Callable[[jax.Array], jax.Array] | None = None
    place: attention.Placement = attention.AUTO
    gather: Callable[[jax.Array], jax.Array] | None = None
    together: Callable[[Params], Params] | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("dtype", self.dtype, DTYPES), ("remat", self.remat, REMAT)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown. Use one of {sorted(allowed)}.")

    @property
    def _module(self) -> Decoder:
        return Decoder(self.spec, DTYPES[self.dtype], self.remat, self.constrain, self.place)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters.

        Args:
          key: PRNG key.

        Returns:
          The nested dict described at the top of this module; works under `jax.eval_shape`.
        """
        one = jnp.zeros((1, 1), jnp.int32)
        model = dataclasses.replace(self, constrain=None, place=attention.Placement("dense"))
        variables = model._module.init(key, one, one, attention.causal(one, one))
        return variables["params"]

    def _apply(
        self, params: Params, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, layers.KeyValue | None, moe.Balance | None]:
        if self.gather is not None:
            table = self.gather(params["embed"]["embedding"].astype(DTYPES[self.dtype]))
            params = {**params, "embed": {**params["embed"], "embedding": table}}
        return self._module.apply({"params": params}, *args, **kwargs)  # type: ignore[return-value]

    def hidden(
        self,
        params: Params,
        tokens_RT: jax.Array,
        position_RT: jax.Array,
        segment_RT: jax.Array,
        shared: batch.Shared | None = None,
    ) -> jax.Array:
        """Final-normed hidden states of packed rows.

        Args:
          params: parameters.
          tokens_RT: int32 [R, T], token ids.
          position_RT: int32 [R, T], position of each token inside its sequence.
          segment_RT: int32 [R, T], 0 = padding; a token sees earlier tokens of its own segment.
          shared: what each token sees in rows with shared prompts; None: as `segment_RT` says.

        Returns:
          [R, T, D] in the compute dtype; finite but meaningless at padding. Where the rotary
          factors depend on the length of a sequence (longrope), two answers that share their prompt
          take those of the longer one.
        """
        return self._rows(params, tokens_RT, position_RT, segment_RT, shared)[0]

    def hidden_and_penalty(
        self,
        params: Params,
        tokens_RT: jax.Array,
        position_RT: jax.Array,
        segment_RT: jax.Array,
        shared: batch.Shared | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`hidden`, and the load-balancing loss of a mixture of experts over the real tokens.

        Returns:
          Hidden states [R, T, D], and float32 [], see `moe.balance_loss`.

        Raises:
          ValueError: the model has no experts.
        """
        if not self.spec.experts:
            raise ValueError(
                f"A {self.spec.family} model has no experts, whose load could be balanced. Use "
                f"`hidden`."
            )
        hidden_RTD, _, balance = self._rows(
            params, tokens_RT, position_RT, segment_RT, shared, real_BT=segment_RT > 0
        )
        assert balance is not None
        return hidden_RTD, moe.balance_loss(balance)

    def _rows(
        self,
        params: Params,
        tokens_RT: jax.Array,
        position_RT: jax.Array,
        segment_RT: jax.Array,
        shared: batch.Shared | None,
        **kwargs: Any,
    ) -> tuple[jax.Array, layers.KeyValue | None, moe.Balance | None]:
        seen, together_RT = attention.causal(segment_RT, position_RT), segment_RT
        if shared is not None:
            first_RT, last_RT = jnp.asarray(shared.first_RT), jnp.asarray(shared.last_RT)
            ahead_RT = jax.lax.cummax(last_RT, axis=1)
            key_RX = None if shared.key_RX is None else jnp.asarray(shared.key_RX)
            seen = attention.Visible(first_RT, last_RT, seen.position_RT, ahead_RT, key_RX)
            together_RT = (segment_RT + 1) // 2  # both sides of a pair
        long_RT: jax.Array | bool = False
        if self._context < tokens_RT.shape[1]:
            long_RT = _longest(position_RT, together_RT) >= self._context
        return self._apply(params, tokens_RT, position_RT, seen, long_BT=long_RT, **kwargs)

    @property
    def _context(self) -> float:
        """Tokens beyond which a sequence turns by longrope's other factors."""
        scaling = self.spec.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return math.inf
        return scaling.original_max_positions

    @property
    def softcap(self) -> float:
        """What the output logits are capped by, see `head.cap`; 0 = not at all."""
        return self.spec.final_softcap

    def head(self, params: Params) -> jax.Array:
        """The output matrix [D, V] in the compute dtype; logits are `hidden @ head`."""
        weight = params["embed"]["embedding"].T if self.spec.tied else params["lm_head"]["kernel"]
        return weight.astype(DTYPES[self.dtype])

    def logits(self, params: Params, tokens_BT: jax.Array) -> jax.Array:
        """Logits of unpacked sequences, for checks and small work: training never calls it.

        Args:
          params: parameters.
          tokens_BT: int32 [B, T], sequences from position 0, padded on the right if at all.

        Returns:
          float32 [B, T, V].
        """
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD = self.hidden(params, tokens_BT, position_BT, jnp.ones_like(tokens_BT))
        logits = jnp.matmul(hidden_BTD, self.head(params), preferred_element_type=jnp.float32)
        return heads.cap(logits, self.softcap)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty key-value cache for `batch` sequences of up to `length` tokens.

        A model whose rotary factors depend on the length of a sequence (longrope) takes those of
        long sequences from the first token on when `length` is beyond its original context:
        keys in the cache cannot be turned again when a sequence grows past it.
        """
        spec = self.spec
        shape = (spec.layers, batch, spec.kv_heads, length, spec.head_dim)
        dtype = DTYPES[self.dtype]
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))  # two: they may be donated

    def prefill(
        self,
        params: Params,
        tokens_BT: jax.Array,
        position_BT: jax.Array,
        valid_BT: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Runs prompts, padded on the left, and writes their keys to slots 0 .. T-1.

        Args:
          params: parameters.
          tokens_BT: int32 [B, T].
          position_BT: int32 [B, T], 0 at each prompt's first real token.
          valid_BT: bool [B, T], false at padding.
          cache: from `init_cache`, with at least T slots.

        Returns:
          Hidden states [B, T, D] and the cache.

        Raises:
          ValueError: if the cache has fewer than T slots.
        """
        length, slots = tokens_BT.shape[1], cache.key.shape[3]
        if length > slots:
            raise ValueError(
                f"Prompts of {length} tokens do not fit a cache of {slots} slots. "
                f"Call init_cache with length >= {length}."
            )
        seen = attention.causal(valid_BT.astype(jnp.int32), position_BT)
        hidden_BTD, own, _ = self._apply(
            params, tokens_BT, position_BT, seen, keep=True, long_BT=slots > self._context
        )
        return hidden_BTD, _write(cache, own, 0)

    def decode(
        self,
        params: Params,
        token_B: jax.Array,
        position_B: jax.Array,
        valid_BC: jax.Array,
        cache: Cache,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, Cache]:
        """Runs one token per sequence against the cache and writes its key to `slot`.

        Args:
          params: parameters.
          token_B: int32 [B].
          position_B: int32 [B], the token's position inside its sequence.
          valid_BC: bool [B, C], cache slots to attend to, in the order of their tokens; `slot`
            itself is always attended to.
          cache: from `prefill` or an earlier `decode`.
          slot: int or traced int32 scalar, the same for all sequences.

        Returns:
          Hidden states [B, D] and the cache.
        """
        slots = valid_BC.shape[1]
        mask_BC = valid_BC & (jnp.arange(slots) != slot)
        hidden_B1D, own, _ = self._apply(
            params,
            token_B[:, None],
            position_B[:, None],
            mask_BC,
            (cache.key, cache.value),
            keep=True,
            long_BT=slots > self._context,
        )
        return hidden_B1D[:, 0], _write(cache, own, slot)

    def forward_flops(self, tokens: int, attended: int, head_tokens: int | None = None) -> float:
        """Floating-point operations of a forward pass; a backward pass costs twice as many.

        Counts matrix products only (2 per multiply-add); norms, softmax and rotations are left out.

        Args:
          tokens: tokens that go through the layers.
          attended: query-key pairs in all, e.g. the sum of n (n + 1) / 2 over sequences.
          head_tokens: tokens whose logits are computed; None: all of them.

        Returns:
          The number of operations.
        """
        spec = self.spec
        qkv = spec.d_model * (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        output = spec.heads * spec.head_dim * spec.d_model
        mlp = 3 * spec.d_model * spec.d_ff * max(spec.experts_per_token, 1)
        mlp += spec.d_model * spec.experts  # the router
        linear = 2.0 * tokens * spec.layers * (qkv + output + mlp)
        attention = 4.0 * attended * spec.layers * spec.heads * spec.head_dim
        head = 2.0 * (tokens if head_tokens is None else head_tokens) * spec.d_model * spec.vocab
        return linear + attention + head


def _longest(position_RT: jax.Array, together_RT: jax.Array) -> jax.Array:
    """The largest position among the tokens of the same number in the row, [R, T]."""
    position_RT, together_RT = jnp.asarray(position_RT), jnp.asarray(together_RT)
    count = position_RT.shape[1] + 1

    def one(position_T: jax.Array, together_T: jax.Array) -> jax.Array:
        return jax.ops.segment_max(position_T, together_T, num_segments=count)[together_T]

    return jax.vmap(one)(position_RT, together_RT)


def _write(cache: Cache, own: layers.KeyValue | None, slot: jax.Array | int) -> Cache:
    """The cache with the keys and values of new tokens, [L, B, T, G, E], from `slot` on."""
    assert own is not None
    key, value = (x.swapaxes(2, 3) for x in own)
    start = (0, 0, 0, slot, 0)
    return Cache(
        jax.lax.dynamic_update_slice(cache.key, key, start),
        jax.lax.dynamic_update_slice(cache.value, value, start),
    )
