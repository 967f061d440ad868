"""Does SAGE need less than uniform DPO, on two tasks and with noisy labels?

    python benchmarks/selection/small.py --choose       # learning rates, on the eval split
    python benchmarks/selection/small.py                # then once on the test split, fresh seeds
    python benchmarks/selection/small.py --methods=all --conditions=all --own-rates  # all there is

Every method starts from the same decoder and pairs, takes the same number of optimizer steps and
has the same grid of learning rates. `--choose` finds the rate of each (task, method) by its mean
accuracy over steps on validation seeds and problems, without label noise, and writes it to
results/selection/small_rates.json. The main command trains every method at the rate that is best
for uniform; with `--own-rates` besides at its own where that is another. Differences are paired by
seed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import lab
from lab import curves

METHODS: dict[str, dict[str, Any]] = {  # on top of lab.RUN; `sage` is the default configuration
    "uniform": {"selection.name": "uniform"},
    "sage": {},
    "sage even": {"selection.soft": 0.0},  # the same without weights inside the steps
    "sage soft": {"selection.soft": 0.5},  # with them whatever the labels look like
    "sage unguarded": {"selection.guard": "off"},  # whatever labels look flipped
    "sage likelihood": {"selection.margin": "likelihood"},  # also of a policy that knows little
    "random": {"selection.name": "random", "curriculum.sharpness": 0.0},
    "static": {"selection.name": "uniform"},  # on the third that SAGE selects before training
    "gradient": {"selection.name": "gradient", "selection.margin": "reward",
                 "curriculum.sharpness": 0.0},
    "hard_first": {"selection.name": "hard_first"},
    "max_curvature": {"selection.name": "max_curvature"},
    "beta_dpo": {"selection.name": "beta_dpo", "selection.keep": 0.8, "curriculum.strata": 1,
                 "curriculum.sharpness": 0.0, "selection.guard": "off"},
}  # fmt: skip
PAIRS = {"static": {"chosen": "static"}}  # other pairs than the world's
RATES = (4e-5, 8e-5, 1.6e-4)
# Policies that know little: supervised for a third, and two fifths, of the steps.
WEAK = {"arithmetic": {"train.steps": 260}, "equations": {"train.steps": 500},
        "mixed:TASK": {"train.steps": 800}}  # fmt: skip
OWN = ", own rate"
# What is compared unless told otherwise; besides these, all of METHODS, and "weak policy".
COMPARED = ("uniform", "sage")
CONDITIONS = ("on-policy", "exact chosen", "10% flipped", "20% flipped")
RATES_FILE = lab.RESULTS / "small_rates.json"


def jobs_of(args, seeds: list[int], rates: dict[str, dict[str, float]]) -> dict[tuple, lab.Job]:
    """(condition, task, method, seed) -> job."""
    found = {}
    for task in args.task.split(","):
        own_rates = rates[task] if args.own_rates else {}
        methods_of = conditions(args.methods, own_rates, WEAK.get(task))
        for condition, methods in methods_of.items():
            if condition not in args.conditions:
                continue
            for name, (settings, more) in methods.items():
                own = rates[task][name.removesuffix(OWN)] if name.endswith(OWN) else None
                changed = {"train.steps": args.steps, "optim.lr": own or rates[task]["uniform"]}
                for seed in seeds:
                    job = lab.job(task, seed, settings | changed, **more)
                    found[condition, task, name, seed] = job
    return found


def conditions(
    methods: list[str], rates: dict[str, float], weak: dict[str, Any] | None = None
) -> dict[str, dict[str, tuple[dict, dict]]]:
    """What is compared under which kind of pairs: settings, and what else makes the job.

    A method whose best rate, by `rates`, is not uniform's is there at that rate, too.
    """
    plain = {name: (METHODS[name], PAIRS.get(name, {})) for name in methods}
    few = {name: plain[name] for name in ("uniform", "sage") if name in plain}
    weakly = few | {name: plain[name] for name in ("sage likelihood", "random") if name in plain}
    best = rates.get("uniform")
    own = {n + OWN: plain[n] for n in methods if rates.get(n, best) != best}
    found = {"on-policy": plain | own}
    found["exact chosen"] = {n: (s, {"chosen": "exact"}) for n, (s, _) in few.items()}
    if weak:
        found["weak policy"] = {n: (s, {"model": json.dumps(weak)}) for n, (s, _) in weakly.items()}
    for flips in (0.1, 0.2):
        guards = few | {name: plain[name] for name in ("sage unguarded",) if name in plain}
        found[f"{flips:.0%} flipped"] = {n: (s, {"flips": flips}) for n, (s, _) in guards.items()}
    return found


def choose(args) -> None:
    """The learning rate of each method by its mean accuracy over steps, on validation."""
    jobs = {
        (task, name, lr, seed): lab.job(
            task,
            seed,
            METHODS[name] | {"train.steps": args.steps, "optim.lr": lr},
            split="eval",
            **PAIRS.get(name, {}),
        )
        for task in args.task.split(",")
        for name in args.methods
        for lr in RATES
        for seed in lab.numbers(args.seeds)
    }
    done = lab.run_all(pathlib.Path(args.scratch), jobs.values(), args.processes)
    rates: dict[str, dict[str, float]] = {}
    grid: dict[str, dict[str, dict[str, Any]]] = {}
    for task in args.task.split(","):
        for name in args.methods:
            mean = {}
            for lr in RATES:
                each = [done[jobs[task, name, lr, seed]]["curve"] for seed in
                        lab.numbers(args.seeds)]  # fmt: skip
                mean[lr] = curves.mean_error([curves.area(c, "step", args.steps) for c in each])
            rates.setdefault(task, {})[name] = max(mean, key=lambda lr: mean[lr]["mean"])
            grid.setdefault(task, {})[name] = {f"{lr:g}": value for lr, value in mean.items()}
    header = ["task", "method", *(f"{lr:g}" for lr in RATES), "chosen"]
    rows = [
        [task, name, *(curves.text(grid[task][name][f"{lr:g}"]) for lr in RATES),
         f"{rates[task][name]:g}"]
        for task in rates
        for name in rates[task]
    ]  # fmt: skip
    lab.write(
        args.rates, "Mean accuracy over steps by learning rate, on validation",
        [curves.markdown(header, rows)],
        {"rates": rates, "grid": grid, "seeds": args.seeds, "steps": args.steps}, done,
    )  # fmt: skip


def table(found: dict[tuple, lab.Job], done: dict[lab.Job, dict], task: str) -> tuple[str, dict]:
    """One task's table of all conditions, and the numbers behind it."""
    rows, values = [], {}
    for condition in dict.fromkeys(key[0] for key in found):
        cells: dict[str, dict[int, Any]] = {}
        for (where, of, name, seed), job in found.items():
            if (where, of) == (condition, task):
                cells.setdefault(name, {})[seed] = done[job]
        by = {n: {s: r["curve"] for s, r in runs.items()} for n, runs in cells.items()}
        for name, runs in cells.items():
            c = curves.compare(by[name], by["uniform"])
            spent = [r["summary"] for r in runs.values()]
            c["scoring_seconds_share"] = curves.mean_error([
                s["seconds_scoring"] / (s["seconds_scoring"] + s["seconds_training"]) for s in spent
            ])  # fmt: skip
            if all("flip_share" in s for s in spent):
                c["estimated_flips"] = curves.mean_error([s["flip_share"] for s in spent])
            values[f"{condition}/{name}"] = c
            rows.append([
                condition, name,
                curves.text(c["accuracy_after"]),
                curves.text(c["minus_uniform_over_step"], sign=True),
                curves.text(c["minus_uniform_at_equal_flops"], sign=True),
                curves.text(c["minus_uniform_over_flops"], sign=True),
                curves.text(c["step_to_95"], 2),
                curves.text(c["flops_to_95"], 2), curves.text(c["flops_to_best"], 2),
                f"{100 * c['scoring_seconds_share']['mean']:.0f} %",
            ])  # fmt: skip
    header = ["pairs", "method", "accuracy after", "− uniform, mean over steps",
              "− uniform at equal FLOPs", "− uniform, mean over FLOPs",
              "steps to 95 % of uniform's best gain", "FLOPs for that",
              "FLOPs to uniform's best", "device time of scoring"]  # fmt: skip
    return f"## {task}\n\n" + curves.markdown(header, rows), values


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = lab.arguments(__doc__.split("\n")[0], "small.json")
    parser.add_argument("--methods", default=",".join(COMPARED), help="by comma, or all")
    parser.add_argument("--conditions", default=",".join(CONDITIONS), help="of the pairs, likewise")
    parser.add_argument("--own-rates", action="store_true", help="each method at its best one, too")
    parser.add_argument("--choose", action="store_true", help="learning rates, on validation")
    parser.add_argument("--rates", default=str(RATES_FILE), help="where --choose wrote them")
    args = parser.parse_args(argv)
    args.methods = list(METHODS) if args.methods == "all" else args.methods.split(",")
    if set(args.methods) - set(METHODS) or "uniform" not in args.methods:
        parser.error(f"--methods: uniform, and any of {', '.join(METHODS)}, or all")
    every = [*CONDITIONS, "weak policy"]
    args.conditions = every if args.conditions == "all" else args.conditions.split(",")
    if set(args.conditions) - set(every):
        parser.error(f"--conditions: any of {', '.join(every)}, or all")
    if args.choose and args.own_rates:
        parser.error("--choose finds the rates that --own-rates reads: one of them at a time")
    if args.choose and args.seeds == parser.get_default("seeds"):
        args.seeds = "100,101"
    return args


def plan(argv: list[str]) -> list[lab.Job]:
    args = parse(argv)
    rates = json.loads(pathlib.Path(args.rates).read_text())["rates"]
    return list(jobs_of(args, lab.numbers(args.seeds), rates).values())


def main() -> None:
    args = parse()
    if args.choose:
        return choose(args)
    rates = json.loads(pathlib.Path(args.rates).read_text())["rates"]
    seeds = lab.numbers(args.seeds)
    jobs = jobs_of(args, seeds, rates)
    done = lab.run_all(pathlib.Path(args.scratch), jobs.values(), args.processes)
    tables, values = [], {}
    for task in args.task.split(","):
        text, values[task] = table(jobs, done, task)
        tables.append(text)
    by_key = {"/".join(map(str, key)): done[job]["curve"] for key, job in jobs.items()}
    lab.write(args.out, __doc__.split("\n")[0], tables, {
        "seeds": seeds, "rates": rates, "methods": METHODS, "summary": values, "curves": by_key,
    }, done)  # fmt: skip
    out = pathlib.Path(args.out)
    few = ("uniform", "sage", "random", "static", "sage unguarded")
    for path, wanted in ((out, True), (out.with_stem(out.stem + "_other"), False)):
        panels: dict[str, dict] = {}
        for (condition, task, name, seed), job in jobs.items():
            if (condition == "on-policy") == wanted and name in few:
                panel = panels.setdefault(f"{task}, {condition}", {})
                panel.setdefault(name, {})[seed] = done[job]["curve"]
        if panels:
            curves.plot(panels, path.with_suffix(".png"), ("step", "flops", "seconds"))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
