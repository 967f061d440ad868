"""Trains the same few steps under several meshes, in one process or as one of two.

`python pod_worker.py OUT.json --coordinator=... --num_processes=2 --process_id=0` makes it one of
two; the first writes what happened, by mesh.
"""

import json
import pathlib
import sys

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"data": 1, "fsdp": 8},
    "fsdp=4 x tensor=2": {"data": 1, "fsdp": 4, "tensor": 2},
    "data=2 x fsdp=2 x tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
STEPS = 20
SETTINGS = {
    "model": {"path": str(ROOT / "sage_jax/assets/quickstart")},
    "data": {"train": str(ROOT / "sage_jax/assets/quickstart/pairs.jsonl"), "limit": 96},
    "train": {"steps": STEPS, "batch_pairs": 8},
    "curriculum": {"pool_size": 48},
    "selection": {"keep": 0.5},
    "optim": {"lr": 3e-4},
    "loss": {"beta": 0.5},
    "checkpoint": {"every": 1000},
    "eval": {"kl_prompts": 0},
}


def bytes_of(tree):
    """(bytes on the first device of this process, bytes of everything)."""
    leaves = jax.tree.leaves(tree)
    here = jax.local_devices()[0]
    mine = sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == here)
    return mine, sum(x.nbytes for x in leaves)


def train(mesh, workdir, cache, stop_after=None):
    """One run; returns what a comparison needs, as JSON knows it."""
    from sage_jax import config
    from sage_jax.models import tensors
    from sage_jax.report import writers
    from sage_jax.runtime import dataset, forward, hosts, loop, setup

    own = {"reference": {"store": str(cache)}, "data": SETTINGS["data"] | {"cache": str(cache)}}
    run = config.resolve(SETTINGS | own)
    read = [0]
    real = tensors.assemble

    def counted(spec, source, *rest):
        def note(*asked):
            value = source.read(*asked)
            read[0] += value.nbytes
            return value

        return real(spec, source._replace(read=note), *rest)

    tensors.assemble = counted
    policy = setup.load_policy(run, mesh)
    tensors.assemble = real
    pairs = dataset.load_pairs(run, policy.tokenizer, run.data.train)
    passes = forward.Passes(policy, mesh, setup.row_shape(run, pairs.lengths_N2, mesh))
    start = forward.stored_stats(run, policy, passes, pairs, "reference")
    trainer = loop.Trainer(
        run, workdir, policy=policy, passes=passes, pairs=pairs, start=start,
        reference=start.logps, evaluate=lambda _: {}, label="test",
    )  # fmt: skip
    found = trainer.train(lambda: stop_after is not None and trainer.counters.step >= stop_after)
    rows = hosts.on_first(lambda: writers.read_rows(workdir / "metrics.jsonl"))
    logs = hosts.on_first(
        lambda: [path.read_text() for path in sorted((workdir / "selection").glob("round*.jsonl"))]
    )
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "pairs": [row["pairs"] for row in rows],
        "selected": [
            [row["pair"] for row in map(json.loads, log.splitlines()) if row["selected"]]
            for log in logs
        ],
        "trained": trainer.memory.trained.tolist(),
        "plan": trainer.round.pair_KB.tolist(),
        "params": bytes_of(trainer.state.params),
        "opt_state": bytes_of(trainer.state.opt_state),
        "read": read[0],
        "fingerprint": policy.fingerprint,
        "finished": found.finished,
    }


def main():
    from sage_jax.runtime import hosts
    from sage_jax.runtime import mesh as meshes

    (out,), given, _ = hosts.take_flags(sys.argv[1:])
    hosts.start(given)
    out = pathlib.Path(out)
    found = {}
    for name, sizes in MESHES.items():
        workdir = out.parent / name.replace(" ", "")
        if hosts.first():
            workdir.mkdir()
        result = train(meshes.make_mesh(**sizes), workdir, out.parent / "cache")
        result["read_by_all"] = [int(n) for n in np.ravel(_gather(result["read"]))]
        found[name] = result
    if hosts.first():
        out.write_text(json.dumps(found))
    hosts.finish()


def _gather(value):
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(value))


if __name__ == "__main__":
    main()
