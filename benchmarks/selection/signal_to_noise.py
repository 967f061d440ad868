"""Does the selected half carry more signal per unit of noise than a random half?

    python benchmarks/selection/signal_to_noise.py

For pairs that could be trained next, the gradient of each pair's DPO loss is compared with the mean
gradient over held-out pairs that are never trained: mean dot product of the selected ones (with its
direction) over their root-mean-square norm, beside the same of all candidates. At the start, and
during training on uniform batches. Beside it Spearman's correlation of each score with that dot
product, and the same with the gradient of the policy's own ranking error, the mean of sigmoid(-u)
over held-out pairs, u the likelihood margin: what greedy answers depend on.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import lab
import numpy as np
from lab import curves

STAGES = (0, 50, 100)  # uniform steps trained before measuring
CANDIDATES, HELD_OUT, CHUNK = 800, 800, 40


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; equal values share their mean rank. None where all values are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:  # reward margins before the first step
        return None

    def ranks(x: np.ndarray) -> np.ndarray:
        _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def priorities(pairs: Any, kappas: tuple[float, ...], rng: np.random.Generator) -> dict[str, Any]:
    """What is measured: larger first."""
    u, error = np.asarray(pairs.likelihood_margin), np.asarray(pairs.margin_error)
    return {
        "random": rng.random(len(u)),
        **{f"SAGE, κ {kappa:g}": -(u + kappa * error) for kappa in kappas},
        "likelihood margin alone (κ 0)": -u,
        "reward margin alone": -np.asarray(pairs.reward_margin),
        "smallest standard error": -error,
        "largest curvature": -np.abs(u),
    }


def measure(scratch: str, task: str, seed: int, flips: float, lr: float) -> list[dict[str, Any]]:
    """All stages of one world: a row a (stage, score)."""
    import jax
    import jax.numpy as jnp

    from sage_jax import config, step
    from sage_jax.data import pack
    from sage_jax.runtime import dataset, setup, state
    from sage_jax.runtime import mesh as meshes

    world = lab.make_world(pathlib.Path(scratch), task, seed)
    run = lab.load("quickstart", lab.RUN | {
        "model.path": str(world / "base" / "export"), "optim.lr": lr,
        "data.train": str(lab.pairs_file(world, seed, flips, "policy", task)),
        "data.cache": str(pathlib.Path(scratch) / "encoded"),
    })  # fmt: skip
    tokenizer = setup.load_tokenizer(run)
    pairs = dataset.load_pairs(run, tokenizer, run.data.train)
    run = config.settle_data(run, pairs.columns)
    policy = setup.load_policy(run, meshes.make_mesh(1, 1, 1), tokenizer)
    loss, logps_fn = setup.make_loss(run), policy.logps_fn()
    length = -(-int(pairs.lengths_N2.sum(axis=1).max()) // 8) * 8
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pairs))
    clean = order[pairs.columns["flipped"][order] == 0]
    held = clean[:HELD_OUT]
    train = order[~np.isin(order, held)]
    candidates = train[:CANDIDATES]

    def rows(index: np.ndarray):
        batch = pack.collate(pairs, index.reshape(-1, 1), length)
        return jax.tree.map(jnp.asarray, batch._replace(ref_logps_RS2=reference[index][:, None]))

    stats_fn = jax.jit(lambda params, batch: logps_fn(params, None, batch))
    reference = np.zeros((len(pairs), 2), np.float32)

    def stats(params, index):
        parts = [jax.device_get(stats_fn(params, rows(index[i : i + CHUNK])))
                 for i in range(0, len(index), CHUNK)]  # fmt: skip
        return jax.tree.map(lambda *x: np.concatenate(x)[:, 0], *parts)

    used = np.concatenate([held, train[: max(CANDIDATES, 32 * max(STAGES))]])
    used = used[: len(used) // CHUNK * CHUNK]
    reference[used] = stats(policy.params, used).logps

    def dpo(params, batch):
        return step.pair_losses(loss, logps_fn(params, None, batch), batch.ref_logps_RS2).mean()

    def ranking(params, batch):
        logps = logps_fn(params, None, batch).logps
        return jax.nn.sigmoid(logps[..., 1] - logps[..., 0]).mean()

    def flat(tree):
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

    held_grad = {name: jax.jit(lambda p, b, f=f: flat(jax.grad(f)(p, b)))
                 for name, f in (("dpo", dpo), ("ranking", ranking))}  # fmt: skip

    @jax.jit
    def against(params, batch, targets):
        def one(single):
            grad = flat(jax.grad(dpo)(params, jax.tree.map(lambda x: x[None], single)))
            return targets @ grad, grad @ grad

        return jax.lax.map(one, batch)

    tx, _ = state.make_optimizer(run)
    train_step = jax.jit(step.make_train_step(logps_fn, loss, tx, nll_weight=run.loss.nll_weight))
    now, done, found = step.init_state(policy.params, tx), 0, []
    score_fn = setup.make_score_fn(run, loss)
    for stage in STAGES:
        for k in range(done, stage):
            at = (np.arange(32) + 32 * k) % (len(used) - HELD_OUT)
            now, _ = train_step(now, None, rows(used[HELD_OUT:][at]))
        done = stage
        targets = {}
        for name, fn in held_grad.items():
            parts = [fn(now.params, rows(held[i : i + CHUNK])) for i in range(0, HELD_OUT, CHUNK)]
            targets[name] = jnp.stack(parts).mean(axis=0)
            targets[name] /= jnp.linalg.norm(targets[name])
        goal = jnp.stack(list(targets.values()))
        parts = [against(now.params, rows(candidates[i : i + CHUNK]), goal)
                 for i in range(0, CANDIDATES, CHUNK)]  # fmt: skip
        dot = np.concatenate([np.asarray(d) for d, _ in parts])  # [P, 2]
        square = np.concatenate([np.asarray(s) for _, s in parts])
        whole = dot.mean(axis=0) / np.sqrt(square.mean())
        scored = jax.device_get(score_fn(stats(now.params, candidates), reference[candidates]))
        for name, priority in priorities(scored, (1.0, 2.0, 4.0, 8.0), rng).items():
            half = np.argsort(-priority, kind="stable")[: CANDIDATES // 2]
            snr = dot[half].mean(axis=0) / np.sqrt(square[half].mean())
            found.append({
                "task": task, "seed": seed, "flips": flips, "stage": stage, "score": name,
                "snr_dpo": float(snr[0]), "snr_ranking": float(snr[1]),
                "spearman_dpo": spearman(priority, dot[:, 0]),
                "spearman_ranking": spearman(priority, dot[:, 1]),
                "uniform_dpo": float(whole[0]), "uniform_ranking": float(whole[1]),
            })  # fmt: skip
    return found


def _measure(args: tuple) -> list[dict[str, Any]]:
    return measure(*args)


def summarise(rows: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """A table for each (flips, stage), and the means behind it."""
    tables, summary = [], []
    for flips, stage in sorted({(r["flips"], r["stage"]) for r in rows}):
        here = [r for r in rows if (r["flips"], r["stage"]) == (flips, stage)]
        lines = []
        for name in ("all candidates", *dict.fromkeys(r["score"] for r in here)):
            of = [r for r in here if r["score"] == name or name == "all candidates"]
            whole = name == "all candidates"
            each = {
                f"snr_{goal}": [r[f"uniform_{goal}" if whole else f"snr_{goal}"] for r in of]
                for goal in ("dpo", "ranking")
            }
            if not whole:
                for goal in ("dpo", "ranking"):
                    each[f"spearman_{goal}"] = [r[f"spearman_{goal}"] for r in of]
            else:  # the same for every score: one value a world
                count = len({(r["task"], r["seed"]) for r in of})
                each = {k: v[:: len(v) // count] for k, v in each.items()}
            means = {k: curves.mean_error(v) for k, v in each.items()}
            summary.append({"flips": flips, "stage": stage, "score": name} | means)
            cells = [curves.text(_hundredfold(means[k]), 2) for k in ("snr_dpo", "snr_ranking")] + [
                curves.text(means.get(k), 2) for k in ("spearman_dpo", "spearman_ranking")
            ]
            lines.append([name, *cells])
        header = ["selected half by", "100 × signal to noise", "for the ranking error",
                  "Spearman with the dot product", "for the ranking error"]  # fmt: skip
        title = f"## {flips:.0%} flipped, after {stage} uniform steps"
        tables.append(f"{title}\n\n" + curves.markdown(header, lines))
    return tables, summary


def _hundredfold(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v if k == "count" or v is None else 100 * v for k, v in value.items()}


def main() -> None:
    parser = lab.arguments(__doc__.split("\n")[0], "signal_to_noise.json")
    parser.add_argument("--lr", type=float, default=8e-5, help="of the uniform steps in between")
    parser.add_argument("--flips", default="0,0.2")
    args = parser.parse_args()
    where = [
        (args.scratch, task, seed, float(flips), args.lr)
        for task in args.task.split(",")
        for seed in lab.numbers(args.seeds)
        for flips in args.flips.split(",")
    ]
    with lab.workers(pathlib.Path(args.scratch), args.processes) as pool:
        rows = [row for part in pool.imap_unordered(_measure, where) for row in part]
    rows.sort(key=lambda r: json.dumps([r["task"], r["flips"], r["stage"], r["seed"]]))
    tables, summary = summarise(rows)
    lab.write(args.out, __doc__.split("\n")[0], tables, {
        "seeds": lab.numbers(args.seeds), "tasks": args.task.split(","), "lr": args.lr,
        "summary": summary, "rows": rows,
    })  # fmt: skip
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
