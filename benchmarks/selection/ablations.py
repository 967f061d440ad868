"""What each setting of the selection is worth: one is changed at a time, the rest stays default.

    python benchmarks/selection/ablations.py

Validation seeds and problems (these tables chose the defaults; small.py reports them on others).
All variants train at the learning rate that validation gave SAGE. Differences to the default and
to uniform are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import lab
import small
from lab import curves

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "keep share": {f"keep {k}": {"selection.keep": k} for k in (0.2, 0.33, 0.5)},
    "kappa": {f"κ {k:g}": {"selection.kappa": float(k)} for k in (0, 1, 2, 4)},
    "delta": {f"δ {d:g}": {"selection.damping": d} for d in (0.01, 1.0)},
    "margin": {
        "likelihood margin": {"selection.margin": "likelihood"},
        "per token": {"selection.length_normalised": True},
        "reward margin": {"selection.margin": "reward"},
    },
    "stability": {
        "token error": {},
        "variance over rounds": {"selection.stability": "rounds"},
        "logit norm": {"selection.stability": "logit_norm"},
        "token error + rounds": {"selection.stability": "token_error+rounds"},
        "none": {"selection.stability": "none"},
    },
    "strata": {
        "by pass rate": {},
        "none": {"curriculum.strata": 1},
        "by level": {"curriculum.difficulty": "level"},
        "by margin": {"curriculum.difficulty": "margin"},
    },
    "competence": {
        "on": {},
        "off": {"curriculum.sharpness": 0.0},
        "sharper": {"curriculum.sharpness": 2.0},
    },
    "uniform share": {f"share {u}": {"selection.uniform_share": u} for u in (0.0, 0.25, 0.5)},
    "keep and uniform share": {
        f"keep {k}, share {u}": {"selection.keep": k, "selection.uniform_share": u}
        for k, u in ((0.33, 0.0), (0.5, 0.0), (0.5, 0.5), (0.75, 0.5), (0.75, 0.0))
    },
    "pool": {f"pool {p}": {"curriculum.pool_size": p} for p in (128, 512, 2048)},
    "refresh": {f"refresh {r:g}": {"selection.refresh": r} for r in (0.0, 3 / 16, 0.25, 1.0)},
    "soft weights": {
        "by the labels": {}, "off": {"selection.soft": 0.0},
        **{f"exponent {x:g}": {"selection.soft": x} for x in (0.5, 1.0)},
    },
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = lab.arguments(__doc__.split("\n")[0], "ablations.json")
    parser.set_defaults(seeds="100,101,102")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--variants", default="", help="of these groups, by comma; all by default")
    parser.add_argument("--chosen", default="policy", help="policy, or exact chosen answers")
    parser.add_argument("--weak", action="store_true", help="policies of small.py that know little")
    parser.add_argument("--flips", type=float, default=0.0, help="share of flipped labels")
    parser.add_argument("--rates", default=str(small.RATES_FILE), help="where small.py wrote them")
    parser.add_argument("--rate", default="sage", help="whose learning rate the variants take")
    args = parser.parse_args(argv)
    if unknown := set(args.groups.split(",")) - set(GROUPS):
        parser.error(f"--groups: unknown {unknown}; there are {', '.join(GROUPS)}")
    args.groups = args.groups.split(",")
    args.rates = json.loads(pathlib.Path(args.rates).read_text())["rates"]
    return args


def jobs_of(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[tuple, lab.Job]]:
    """The variants, and (task, seed, variant) -> job."""
    variants = {"uniform": small.METHODS["uniform"], "default": small.METHODS["sage"]}
    wanted = args.variants.split(",") if args.variants else []
    variants |= {
        f"{g}/{n}": s
        for g in args.groups
        for n, s in GROUPS[g].items()
        if not wanted or n in wanted
    }

    def job(task: str, seed: int, name: str) -> lab.Job:
        rate = args.rates[task]["uniform" if name == "uniform" else args.rate]
        settings = variants[name] | {"train.steps": args.steps, "optim.lr": rate}
        model = json.dumps(small.WEAK[task]) if args.weak else ""
        return lab.job(task, seed, settings, split="eval", chosen=args.chosen, flips=args.flips,
                       model=model)  # fmt: skip

    return variants, {
        (t, s, n): job(t, s, n)
        for s in lab.numbers(args.seeds) for t in args.task.split(",") for n in variants
    }  # fmt: skip


def plan(argv: list[str]) -> list[lab.Job]:
    return list(jobs_of(parse(argv))[1].values())


def main() -> None:
    args = parse()
    seeds, tasks, groups = lab.numbers(args.seeds), args.task.split(","), args.groups
    variants, jobs = jobs_of(args)
    done = lab.run_all(pathlib.Path(args.scratch), jobs.values(), args.processes)
    by = {
        name: {(t, s): done[jobs[t, s, name]]["curve"] for t in tasks for s in seeds}
        for name in variants
    }
    summary = {name: curves.compare(by[name], by["uniform"]) for name in variants}
    against = {name: curves.compare(by[name], by["default"]) for name in variants}
    by_task = {
        t: {n: curves.compare(*({k: c for k, c in by[which].items() if k[0] == t}
                                for which in (n, "uniform"))) for n in variants}
        for t in tasks
    }  # fmt: skip

    def table(names: dict[str, str]) -> str:  # by what they are called
        rows = [
            [called, *_cells(summary[name], against[name]),
             *(curves.text(each[name]["minus_uniform_over_flops"], sign=True)
               for each in by_task.values() if len(tasks) > 1)]
            for called, name in names.items()
        ]  # fmt: skip
        more = [f"− uniform, mean over FLOPs, {t}" for t in tasks if len(tasks) > 1]
        return curves.markdown([*_HEADER, *more], rows)

    tables = [table({"uniform": "uniform", "default": "default"})]
    for group in groups:
        names = {n.partition("/")[2]: n for n in variants if n.startswith(f"{group}/")}
        tables.append(f"## {group}\n\n" + table(names))
    lab.write(args.out, __doc__.split("\n")[0], tables, {
        "seeds": seeds, "tasks": tasks, "rates": args.rates, "chosen": args.chosen,
        "flips": args.flips, "weak": args.weak, "default": small.METHODS["sage"],
        "summary": summary, "against_default": against, "by_task": by_task,
        "curves": {n: {f"{t}/{s}": c for (t, s), c in each.items()} for n, each in by.items()},
    }, done)  # fmt: skip
    print("\n\n".join(tables))


_HEADER = ["", "− default, mean over steps", "− uniform, mean over steps",
           "− uniform, mean over FLOPs", "steps to 95 % of uniform's best gain", "FLOPs for that",
           "accuracy after"]  # fmt: skip


def _cells(uniform: dict[str, Any], default: dict[str, Any]) -> list[str]:
    return [
        curves.text(default["minus_uniform_over_step"], sign=True),  # compared with the default
        curves.text(uniform["minus_uniform_over_step"], sign=True),
        curves.text(uniform["minus_uniform_over_flops"], sign=True),
        curves.text(uniform["step_to_95"], 2),
        curves.text(uniform["flops_to_95"], 2),
        curves.text(uniform["accuracy_after"]),
    ]


if __name__ == "__main__":
    main()
