"""A name for weights by their content, computed where they lie: nothing is gathered.

Every element is mixed with its position into 128 bits, and these are added up modulo 2^32 in four
lanes. Whole numbers add up to the same in any order, so the sum does not depend on how an array is
split over devices, hosts or blocks. It tells contents apart; it is no protection against somebody
who looks for two with the same name.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax.models import tensors

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
# One for every lane, far from each other (golden-ratio sequence).
_LANES = [np.uint32((0x9E3779B9 * (2 * lane + 1)) & 0xFFFFFFFF) for lane in range(4)]


def fingerprint(params: Any) -> str:
    """A name for these weights: equal for equal bits, wherever and however they are sharded.

    Args:
      params: parameter tree; with several processes every one must call this.

    Returns:
      32 hexadecimal digits, over paths, shapes, dtypes and bits.

    >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.zeros(2)})
    True
    >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.ones(2)})
    False
    """
    named = list(tensors.leaves(params))
    sums = [_sum(_words(leaf)) for _, leaf in named]
    digest = hashlib.blake2b(digest_size=16)
    for (path, leaf), lanes in zip(named, jax.device_get(sums), strict=True):
        digest.update(f"{path} {leaf.dtype.name} {leaf.shape};".encode())
        digest.update(np.asarray(lanes, "<u4").tobytes())
    return digest.hexdigest()


def _words(leaf: Any) -> Any:
    """An array as it is, unless JAX would change its bits: then as 32-bit words, one axis more."""
    if isinstance(leaf, jax.Array) or leaf.dtype.itemsize in _WORDS:
        return leaf
    return np.ascontiguousarray(leaf).reshape(*leaf.shape, 1).view(np.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Spreads every bit over all 32, without loss. Source: the `lowbias32` hash of C. Wellons."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _lanes(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):  # one by one: more than 2^32 elements have places of their own
        place = _mixed(place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
    each = (_mixed(bits ^ _mixed(place ^ lane)) for lane in _LANES)
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in each])


def _sum(leaf: Any) -> jax.Array:
    whole = None
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # on every process
    return _program(whole)(leaf)


@functools.lru_cache(maxsize=8)
def _program(whole: NamedSharding | None) -> Any:
    return jax.jit(_lanes, out_shardings=whole)
