"""What do the pod configs cost by the TPU compiler, and how does that grow from 8 to 256 chips?

    python benchmarks/compile_scaling.py

Compiles the steps of the three pod configs, and of one model with the same work a chip on 8, 16, 64
and 256 chips. Needs libtpu and no TPU (pip install 'sage_jax[tpu]'); about ten minutes on two
quiet cores. Every figure is the compiler's or follows from data sheets: nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "compile_scaling.json"
CONFIGS = (
    ("qwen2_1p5b_v5e8", "v5e:2x4"),
    ("llama3_8b_v5e256", "v5e:16x16"),
    ("llama3_8b_v5p64", "v5p:4x4x4"),
)
WEAK = {8: "v5e:2x4", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}  # chips: topology
PAIRS_A_CHIP = 4
STEPS = ("train", "score", "sample")


def compiled(config: str, topology: str, steps: str, *flags: str, search: bool = False) -> dict:
    """The report of `sage-jax compile`, in a process of its own."""
    command = [
        sys.executable, "-m", "sage_jax", "compile", f"--config={config}",
        f"--topology={topology}", f"--steps={steps}", f"--search={str(search).lower()}", "--json",
        *flags,
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    print(f"{config} on {topology}: {time.perf_counter() - start:.0f} s", flush=True)
    found = json.loads(done.stdout)
    found["config"] = {k: found["config"][k] for k in ("model", "data", "train", "mesh")}
    return found


def weak(chips: int, topology: str) -> dict:
    """The 1.5 B config with the same rows a chip."""
    return compiled(
        "qwen2_1p5b_v5e8", topology, "train,score",
        f"--config.mesh.fsdp={chips}", f"--config.train.batch_pairs={PAIRS_A_CHIP * chips}",
    )  # fmt: skip


def plot(found: dict, file: pathlib.Path) -> None:
    """Bounds of a step's seconds against chips, for train and score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    chips = sorted(int(n) for n in found["weak"])
    for axis, step in zip(axes, ("train", "score"), strict=True):
        for name, marker in (
            ("compute", "o"), ("memory", "s"), ("collectives", "^"), ("serial", "d")
        ):  # fmt: skip
            seconds = [found["weak"][str(n)]["steps"][step]["seconds"][name] for n in chips]
            label = {"serial": "all, one after the other"}.get(name, name)
            axis.plot(chips, seconds, marker=marker, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(chips, [str(n) for n in chips])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("chips (v5e)")
        axis.set_ylabel("seconds a step, at least")
        axis.set_title(f"{step}: {PAIRS_A_CHIP} pairs of 2 x 2048 tokens a chip")
        axis.grid(alpha=0.3)
    axes[1].legend(loc="upper right")
    figure.savefig(file, dpi=120)


def tables(found: dict) -> str:
    """The figures of docs/scaling.md."""
    gib = 2**30
    lines = []
    for name, one in found.get("configs", {}).items():
        mesh = ", ".join(f"{k} {v}" for k, v in one["mesh"].items() if v > 1)
        steps = one["steps"]
        lines += [f"\n### {name}, {one['topology']} (mesh: {mesh})\n"]
        lines += ["| | " + " | ".join(steps) + " |", "|---|" + "---|" * len(steps)]

        def row(label: str, text, steps=steps) -> str:
            return f"| {label} | " + " | ".join(text(s) for s in steps.values()) + " |"

        def bound(key: str):
            return lambda s: f"{s['seconds'][key]:.3g} s" if s["seconds"] else "-"

        def sent(s: dict) -> str:
            return ", ".join(f"{c['kind']} {c['bytes'] / gib:.2f}" for c in s["collectives"][:3])

        def mfu(s: dict) -> str:
            if not s["mfu"]:
                return "-"
            worst = s["mfu"] * s["seconds"]["overlapped"] / s["seconds"]["serial"]
            return f"{100 * worst:.0f} - {100 * s['mfu']:.0f} %"

        def rate(s: dict) -> str:
            if not s["tokens_per_second"]:
                return "-"
            return f"{s['tokens_per_second_serial']:,.0f} - {s['tokens_per_second']:,.0f}"

        lines += [
            row("pairs (prompts)", lambda s: f"{s['pairs']:.0f}"),
            row("tokens", lambda s: f"{s['tokens']:,.0f}"),
            row("arguments, GiB", lambda s: f"{s['argument_bytes'] / gib:.2f}"),
            row("temporaries, GiB", lambda s: f"{s['temporary_bytes'] / gib:.2f}"),
            row("beside it in a training, GiB", lambda s: f"{s['beside_bytes'] / gib:.2f}"),
            row("together, GiB", lambda s: f"{s['total_bytes'] / gib:.2f}"),
            row("of usable, GiB", lambda s: f"{s['usable_bytes'] / gib:.2f}"),
            row("fits", lambda s: "yes" if s["fits"] else "no"),
            row("TFLOP", lambda s: f"{s['flops'] / 1e12:.4g}"),
            row("arithmetic at the peak", bound("compute")),
            row("memory at its bandwidth", bound("memory")),
            row("collectives over their links", bound("collectives")),
            row("collectives, GiB", sent),
            row("tokens/s", rate),
            row("MFU", mfu),
            row("seconds to compile", lambda s: f"{s['compile_seconds']:.0f}"),
        ]
    if found.get("weak"):
        lines += ["\n### The same work a chip on 8 to 256 chips\n"]
        lines += ["| chips | step | compute | memory | collectives | sum | tokens/s a chip |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for chips, one in sorted(found["weak"].items(), key=lambda item: int(item[0])):
            for step, s in one["steps"].items():
                t = s["seconds"]
                each = [f"{t[k]:.3f} s" for k in ("compute", "memory", "collectives", "serial")]
                rate = s["tokens_per_second_serial"] / int(chips)
                lines.append(f"| {chips} | {step} | " + " | ".join(each) + f" | {rate:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="also the largest train batch")
    parser.add_argument("--steps", default=",".join(STEPS), help="of the configs, by comma")
    parser.add_argument("--tables", action="store_true", help="print what is there already")
    parser.add_argument("--only", default="", help="names of configs, or weak, by comma")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.tables:
        print(tables(found))
        return
    chosen = options.only.split(",") if options.only else [*(n for n, _ in CONFIGS), "weak"]
    for name, topology in CONFIGS:
        if name in chosen:
            one = compiled(name, topology, options.steps)
            known = found.setdefault("configs", {}).get(name, {}).get("steps", {})
            one["steps"] = {
                s: (known | one["steps"])[s] for s in STEPS if s in known | one["steps"]
            }
            found["configs"][name] = one
            if options.search:
                most = compiled(name, topology, "train", search=True)["steps"]["train"]
                found["configs"][name]["largest_train_batch"] = most["largest_batch"]
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    if "weak" in chosen:
        for chips, topology in WEAK.items():
            found.setdefault("weak", {})[str(chips)] = weak(chips, topology)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    if len(found.get("weak", {})) > 2:
        plot(found, options.out.with_suffix(".png"))
    print(tables(found))
    print(options.out)


if __name__ == "__main__":
    main()
