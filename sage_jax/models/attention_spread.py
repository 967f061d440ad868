"""Attention of rows whose tokens, rows and heads lie on several devices.

Queries stay where they are. The keys and values of a row are brought together over the devices that
share it, which with grouped heads is a fraction of the residual stream; their gradients are summed
back. A range of keys counts in the whole row, so what a query sees needs no change.

The other choice, passing keys around in a ring, holds fewer of them at a time but has to combine
partial softmaxes; with 8 key heads of 128 channels, 64k tokens of keys and values are 256 MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec


class Split(NamedTuple):
    """Mesh axes of each axis of the queries; () where they do not divide."""

    rows: tuple[str, ...]
    context: tuple[str, ...]
    heads: tuple[str, ...]

    def spec(self, *, heads_at: int | None = None, whole: bool = False) -> PartitionSpec:
        """Of an array [R, T, ...] whose heads are at an axis; `whole` keeps the tokens together."""
        axes: list[Any] = [self.rows or None, None if whole else self.context or None]
        if heads_at is not None:
            axes += [None] * (heads_at - 2) + [self.heads or None]
        return PartitionSpec(*axes)


def split(place: Any, *, rows: int, length: int, heads: int, groups: int, unit: int = 1) -> Split:
    """How a call is split over the devices of its placement.

    Args:
      place: an `attention.Placement` with a mesh.
      rows: of the batch.
      length: tokens of a row.
      heads: of the queries.
      groups: key-value heads.
      unit: a device's part of a row is a multiple of so many tokens.
    """

    def fitting(axes: tuple[str, ...], *sizes: int) -> tuple[str, ...]:
        return axes if all(size % place.size(axes) == 0 for size in sizes) else ()

    context = fitting(place.context, length)
    if context and (length // place.size(context)) % unit:
        context = ()
    return Split(fitting(place.rows, rows), context, fitting(place.heads, heads, groups))


def gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """All tokens of this device's rows, in their order; inside a `jax.shard_map`."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def attend(
    q_RTHE: jax.Array,
    key_RTGE: jax.Array,
    value_RTGE: jax.Array,
    visible: Any,
    position_RC: jax.Array,
    *,
    place: Any,
    part: Callable[..., jax.Array],
) -> jax.Array:
    """As `attention.attend`, on every device's own part.

    Args:
      q_RTHE, key_RTGE, value_RTGE, visible: as there.
      position_RC: int32, the positions of the keys, which may be more than the queries.
      place: names the mesh.
      part: `(q, key, value, Visible, key_position) -> [R, T, H * E]` of one device, with more keys
        than queries.
    """
    found = split(
        place, rows=q_RTHE.shape[0], length=q_RTHE.shape[1], heads=q_RTHE.shape[2],
        groups=key_RTGE.shape[2],
    )  # fmt: skip

    def local(q, key, value, first, last, position, key_position):
        keys, values, at = (gather(x, found.context, 1) for x in (key, value, key_position))
        return part(q, keys, values, visible._replace(
            first_RT=first, last_RT=last, position_RT=position), at)  # fmt: skip

    array, tokens = found.spec(heads_at=2), found.spec()
    return jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(array, array, array, tokens, tokens, tokens, tokens),
        out_specs=array,
        check_vma=False,
    )(
        q_RTHE, key_RTGE, value_RTGE, visible.first_RT, visible.last_RT, visible.position_RT,
        position_RC,
    )  # fmt: skip
