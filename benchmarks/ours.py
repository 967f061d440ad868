"""This library's train step for benchmarks: packed rows of given pairs, in every shape compiled."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import batch, head, logprobs, losses, models, optim, step
from sage_jax.data import encode, pack, records
from sage_jax.models import attention

GIB = 2**30


def memory(device: jax.Device) -> head.Memory:
    """What the head may take: more on a device with more of it."""
    limit = (device.memory_stats() or {}).get("bytes_limit", 8 * GIB)
    return head.Memory(chunk=max(2**26, int(limit / 80)), kept=max(2**29, int(limit / 10)))


@dataclasses.dataclass
class Ours:
    """Pairs in rows, and the jitted steps over them."""

    model: models.Model
    pairs: encode.EncodedPairs
    batch_pairs: int
    share: bool = True
    budget: head.Memory | None = None
    sizes: int = 4  # row lengths in use
    batches: list[batch.PackedBatch] = dataclasses.field(default_factory=list)
    padding: float = 0.0

    def __post_init__(self) -> None:
        place = self.model.place.fitted(self.model.spec.head_dim, self.pairs.lengths_N2)
        self.model = dataclasses.replace(self.model, place=place)
        lengths_N = self.pairs.row_lengths(self.share)
        order = np.arange(len(self.pairs))
        shape = pack.shape(
            lengths_N, batch_pairs=self.batch_pairs, factors=(pack.LONG,), sizes=self.sizes
        )
        # The pairs of these very steps, which random ones need not be as long as.
        loads = lengths_N[: len(order) // self.batch_pairs * self.batch_pairs]
        most = int(loads.reshape(-1, self.batch_pairs).sum(axis=1).max())
        if most > shape.row_length:
            longest = -(-most // 128) * 128
            sizes = (*shape.sizes[:-1], longest) if shape.sizes else ()
            shape = shape._replace(row_length=longest, sizes=sizes)
        plan = pack.plan(lengths_N, order, **shape._asdict(), batch_pairs=self.batch_pairs)
        self.padding = pack.padding_fraction(plan, lengths_N, shape)
        zero_N2 = np.zeros((len(self.pairs), 2))  # until somebody asks `stats`
        self.batches = [
            pack.collate(
                self.pairs,
                pair_RS,
                pack.row_length(pair_RS, lengths_N, shape),
                zero_N2,
                share=self.share,
            )
            for pair_RS in plan
        ]
        memory_ = self.budget or memory(jax.devices()[0])
        self.logps_fn = logprobs.make_logps_fn(
            lambda p, _, b: self.model.hidden(
                p, *map(jnp.asarray, (b.tokens_RT, b.position_RT, b.segment_RT)), b.shared
            ),
            lambda p, _: self.model.head(p),
            memory=memory_,
        )
        self.stats = jax.jit(step.make_stats_step(self.logps_fn))

    def optimizer(self) -> Any:
        return optim.make(lr=1e-6, schedule="constant", warmup=0, steps=10**6)[0]

    def train_step(self) -> Any:
        return jax.jit(
            step.make_train_step(self.logps_fn, losses.sigmoid(0.1), self.optimizer()),
            donate_argnums=0,
        )

    def useful_flops(self, rows: batch.PackedBatch) -> float:
        """Of a forward pass over the real tokens, each with the keys that it sees."""
        real = np.asarray(rows.segment_RT) > 0
        if rows.shared is None:
            seen = np.asarray(rows.position_RT) + 1
        else:
            seen = np.asarray(rows.shared.last_RT) - np.asarray(rows.shared.first_RT) + 1
        counted = int(np.asarray(logprobs.targets(rows)[2]).sum())
        return self.model.forward_flops(int(real.sum()), int(seen[real].sum()), counted)


def make(
    model: models.Model, rows: list[dict[str, list[int]]], batch_pairs: int, **options: Any
) -> Ours:
    """Ours on pre-tokenised rows; `options` as the fields of `Ours`."""
    encoded = encode.encode(records.read(rows), None, max_length=10**6)
    return Ours(model, encoded, batch_pairs, **options)


def model_of(name: str, *, dtype: str, kernel: str = "auto", remat: str = "dots") -> models.Model:
    """A named architecture, for random weights."""
    from sage_jax.models import catalog

    return dataclasses.replace(
        models.Model(catalog.SPECS[name]),
        dtype=dtype,
        remat=remat,
        place=attention.Placement(kernel),
    )


def compiled(step_fn: Any, ours: Ours, *args: Any) -> dict[int, Any]:
    """The step compiled for every row length among the batches; seconds go to stderr."""
    import sys

    out = {}
    for rows in ours.batches:
        length = rows.tokens_RT.shape[1]
        if length not in out:
            began = time.perf_counter()
            out[length] = step_fn.lower(*args, rows).compile()
            print(f"compiled {length}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return out
