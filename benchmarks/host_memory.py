"""What keeping freed memory saves in a train step on the CPU.

    python benchmarks/host_memory.py --out=benchmarks/results/host_memory.json

The same step in two processes that take turns: as the C library comes, and with
`common.KEEP_MEMORY` in the environment variable GLIBC_TUNABLES. The shape is that of the small
decoder in benchmarks/selection.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import common


def measure(repeats: int) -> dict[str, float]:
    """Median seconds and mean page faults of a train step on 32 unpacked pairs of 2 x 60 tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sage_jax import batch, logprobs, losses, optim, step
    from sage_jax.models import decoder, spec

    model = decoder.Model(
        spec.ModelSpec(vocab=20, d_model=64, d_ff=192, layers=2, heads=4, kv_heads=2, tied=True,
                       bos_id=0, eos_id=1, pad_id=2),
        remat="dots",
    )  # fmt: skip
    rows = batch.empty(32, 120, 1)
    rows.tokens_RT[:] = np.random.default_rng(0).integers(3, 20, rows.tokens_RT.shape)
    rows.segment_RT[:] = np.repeat([1, 2], 60)
    rows.position_RT[:] = np.tile(np.arange(60), 2)
    rows.completion_RT[:] = rows.position_RT >= 15
    rows.pair_RS[:], rows.weight_RS[:] = 0, 1.0
    rows = jax.tree.map(jnp.asarray, rows)
    logps_fn = logprobs.make_logps_fn(
        lambda p, _, b: model.hidden(p, b.tokens_RT, b.position_RT, b.segment_RT),
        lambda p, _: model.head(p),
    )
    tx, _ = optim.make(lr=1e-4, warmup=0, steps=10_000)
    train_step = jax.jit(step.make_train_step(logps_fn, losses.sigmoid(), tx), donate_argnums=0)
    state, times = step.init_state(model.init(jax.random.key(0)), tx), []
    for turn in range(5 + repeats):
        if turn == 5:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, None, rows))
        times.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"seconds": statistics.median(times[5:]), "page_faults": faults / repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--one", action="store_true", help="measure in this process")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.repeats)))
        return
    found: dict[str, list[dict[str, float]]] = {"plain": [], "keep": []}
    for turn in range(args.turns):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            command = [sys.executable, __file__, "--one", f"--repeats={args.repeats}"]
            kept = {"GLIBC_TUNABLES": common.KEEP_MEMORY if name == "keep" else ""}
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | kept
            )
            found[name].append(json.loads(done.stdout))
    seconds = {name: [each["seconds"] for each in of] for name, of in found.items()}
    ratio = common.median_ratio(seconds["keep"], seconds["plain"])
    common.write(args.out, {"question": __doc__.split("\n")[0], "found": found, "ratio": ratio})


if __name__ == "__main__":
    main()
