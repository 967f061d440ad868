"""What do the pod configs cost by the TPU compiler, and how does that grow from 8 to 256 chips?

    python benchmarks/compile_scaling.py

Compiles the steps of the three pod configs; their train steps again for shorter pairs, padded,
packed and with shared prompts; one model with the same work a chip on 8, 16, 64 and 256 chips; and
sums over all chips of a slice. Needs libtpu and no TPU (pip install 'sage_jax[tpu]'); about half an
hour on two quiet cores. Every figure is the compiler's or follows from data sheets: nothing is
measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

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
# Pairs as long on average as a quarter of what the config admits, 40 % of it the prompt; four times
# the config's batch, so that packed rows fill. Padded, they are four parts one after the other.
LENGTHS = {  # config: (pairs in a step, mean tokens of a sequence)
    "qwen2_1p5b_v5e8": (128, 512),
    "llama3_8b_v5e256": (1024, 1024),
    "llama3_8b_v5p64": (64, 8192),
}
PROMPT_SHARE = 0.4
ROWS = {
    "padded": ("data.packing=false", "data.share_prompts=off", "train.accumulate=4"),
    "packed": ("data.share_prompts=off",),
    "shared": ("data.share_prompts=pair",),
}
SLICES = (("v5e:16x16", 256, 256), ("v5e:16x16", 256, 16), ("v5p:4x4x4", 64, 64))


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


def in_rows(config: str, topology: str, kind: str) -> dict:
    """The train step of a config for pairs of stated lengths, in rows of a kind."""
    pairs, mean = LENGTHS[config]
    return compiled(
        config, topology, "train", f"--length_mean={mean}", f"--prompt_share={PROMPT_SHARE}",
        f"--config.train.batch_pairs={pairs}", *(f"--config.{setting}" for setting in ROWS[kind]),
    )  # fmt: skip


def sums() -> list[dict]:
    """What the compiler makes of an explicit reduce-scatter and all-gather of one weight."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from sage_jax.runtime import hlo, targets
    from sage_jax.runtime import mesh as meshes

    found = []
    for topology, chips, over in SLICES:
        mesh = meshes.make_mesh(
            data=chips // over, fsdp=over, devices=targets.target(topology).devices
        )
        rows, weight = PartitionSpec(meshes.ROWS), PartitionSpec("fsdp")

        def given(shape, where, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, where))

        def scattered(x, y):
            return jax.lax.psum_scatter(x.T @ y, "fsdp", scatter_dimension=0, tiled=True)

        def gathered(x, w):
            return x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)

        x, y = given((chips * 256, 4096), rows), given((chips * 256, 8192), rows)
        for name, fn, args, out in (
            ("psum_scatter", scattered, (x, y), weight),
            ("all_gather", gathered, (x, given((4096, 8192), weight)), rows),
        ):
            specs = tuple(a.sharding.spec for a in args)
            program = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
            text = jax.jit(program).lower(*args).compile().as_text()
            kinds = sorted({one.kind for one in hlo.Program(text).totals().collectives})
            found.append({"topology": topology, "chips": over, "asked": name, "compiled": kinds})
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


GIB = 2**30


def table(corner: str, heads: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> list:
    """Lines of a Markdown table."""
    heads = list(heads)
    lines = [f"| {corner} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    return lines + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]


def span(low: float, high: float, text: str = ",.0f") -> str:
    return f"{low:{text}} - {high:{text}}"


def mfu(step: dict) -> str:
    if not step["mfu"]:
        return "-"
    worst = step["mfu"] * step["seconds"]["overlapped"] / step["seconds"]["serial"]
    return f"{100 * worst:.2g} - {100 * step['mfu']:.2g} %"


def config_table(one: dict) -> list[str]:
    """A config's steps, each with a column of its own."""
    steps = one["steps"].values()

    def row(label: str, text: Callable[[dict], str]) -> tuple[str, list[str]]:
        return label, [text(step) for step in steps]

    def size(name: str) -> Callable[[dict], str]:
        return lambda s: f"{s[name] / GIB:.2f}"

    def bound(name: str) -> Callable[[dict], str]:
        return lambda s: f"{s['seconds'][name]:.3g} s"

    def sent(s: dict) -> str:
        return ", ".join(f"{c['kind']} {c['bytes'] / GIB:.2f}" for c in s["collectives"][:3])

    rows = [
        row("pairs (prompts)", lambda s: f"{s['pairs']:.0f}"),
        row("tokens", lambda s: f"{s['tokens']:,.0f}"),
        row("arguments, GiB", size("argument_bytes")),
        row("temporaries, GiB", size("temporary_bytes")),
        row("beside it in a training, GiB", size("beside_bytes")),
        row("together, GiB", size("total_bytes")),
        row("of usable, GiB", size("usable_bytes")),
        row("fits", lambda s: "yes" if s["fits"] else "no"),
        row("largest batch that fits", lambda s: f"{s['largest_batch'] or '-'}"),
        row("TFLOP", lambda s: f"{s['flops'] / 1e12:.4g}"),
        row("arithmetic at the peak", bound("compute")),
        row("memory at its bandwidth", bound("memory")),
        row("collectives over their links", bound("collectives")),
        row("collectives, GiB", sent),
        row("tokens/s", lambda s: span(s["tokens_per_second_serial"], s["tokens_per_second"])),
        row("MFU", mfu),
        row("seconds to compile", lambda s: f"{s['compile_seconds']:.0f}"),
    ]
    return table("one step", one["steps"], rows)


def rows_table(kinds: dict, before: bool = False) -> list[str]:
    """A config's train step with padded rows, packed ones, and ones with shared prompts.

    Args:
        kinds: reports by kind of rows.
        before: only what attention changes, for reports of before it took its blocks from the rows.
    """
    steps = [kinds[kind]["steps"]["train"] for kind in ROWS]
    first = steps[0]

    def row(label: str, text: Callable[[dict], str]) -> tuple[str, list[str]]:
        return label, [text(step) for step in steps]

    def against(name: str) -> Callable[[dict], float]:
        return lambda s: s[name] / first[name]

    rows = [
        row("rows x tokens", lambda s: f"{s['rows']} x {s['row_length']:,}"),
        row("padding", lambda s: f"{100 * s['padding']:.0f} %"),
        row("tokens computed a pair", lambda s: f"{s['computed_per_pair']:,.0f}"),
        row("keys computed a query", lambda s: f"{s.get('keys', 0):,.0f}"),
        row("arithmetic at the peak", lambda s: f"{s['seconds']['compute']:.2f} s"),
        row("memory at its bandwidth", lambda s: f"{s['seconds']['memory']:.2f} s"),
        row("collectives over their links", lambda s: f"{s['seconds']['collectives']:.2f} s"),
        row("the compiler's own, no collectives", lambda s: f"{s['optimal_seconds']:.2f} s"),
        row(
            "pairs/s",
            lambda s: span(s["pairs_per_second_serial"], s["pairs_per_second"], ".3g"),
        ),
        row("pairs/s against padded", lambda s: span(
            *sorted((against("pairs_per_second_serial")(s), against("pairs_per_second")(s))), ".2f"
        )),
        row(
            "expected from the tokens",
            lambda s: f"{first['computed_per_pair'] / s['computed_per_pair']:.2f}",
        ),
        row("MFU", mfu),
        row("together, GiB", lambda s: f"{s['total_bytes'] / GIB:.1f}"),
    ]  # fmt: skip
    if before:
        changed = ("arithmetic at the peak", "pairs/s", "pairs/s against padded", "MFU")
        return table("before", ROWS, [one for one in rows if one[0] in changed])
    return table(f"{first['pairs']:.0f} pairs", ROWS, rows)


def weak_table(weak: dict) -> list[str]:
    """The same work a chip on more and more chips."""
    heads = ("step", "compute", "memory", "collectives", "sum", "tokens/s a chip", "GiB a chip")
    rows = []
    for chips, one in sorted(weak.items(), key=lambda item: int(item[0])):
        for name, s in one["steps"].items():
            each = [f"{s['seconds'][k]:.3f} s" for k in ("compute", "memory", "collectives")]
            rate = s["tokens_per_second_serial"] / int(chips)
            rows.append(
                (
                    chips,
                    [name, *each, f"{s['seconds']['serial']:.3f} s", f"{rate:,.0f}",
                     f"{s['total_bytes'] / GIB:.1f}"],
                )
            )  # fmt: skip
    return table("chips", heads, rows)


def sums_table(sums: list[dict]) -> list[str]:
    """What became of explicit collectives over some chips of a slice."""
    rows = [
        (one["topology"], [f"{one['chips']}", one["asked"], ", ".join(one["compiled"])])
        for one in sums
    ]
    return table("slice", ("chips in a group", "asked for", "compiled"), rows)


def tables(found: dict) -> list[tuple[str, list[str]]]:
    """The tables of docs/scaling.md: a title, and the lines."""
    out = []
    for name, one in found.get("configs", {}).items():
        mesh = ", ".join(f"{k} {v}" for k, v in one["mesh"].items() if v > 1)
        out.append((f"{name}, {one['topology']} (mesh: {mesh})", config_table(one)))
    for name, (_, mean) in LENGTHS.items():
        kinds = found.get("rows", {}).get(name, {})
        if set(kinds) != set(ROWS):
            continue
        out.append((f"{name}, sequences of {mean} tokens on average", rows_table(kinds)))
        if name in found.get("rows_before", {}):
            out.append((f"{name}, before", rows_table(found["rows_before"][name], before=True)))
    if found.get("weak"):
        out.append(("The same work a chip on 8 to 256 chips", weak_table(found["weak"])))
    if found.get("sums"):
        out.append(("Sums over the chips of a slice", sums_table(found["sums"])))
    return out


def text(found: dict) -> str:
    return "\n\n".join("\n".join([f"### {title}\n", *lines]) for title, lines in tables(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="also the largest batches")
    parser.add_argument("--steps", default=",".join(STEPS), help="of the configs, by comma")
    parser.add_argument("--tables", action="store_true", help="print what is there already")
    parser.add_argument(
        "--only",
        default="",
        help="configs, rows, rows/CONFIG, rows/CONFIG/KIND, weak, weak/CHIPS, sums; by comma",
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.tables:
        print(text(found))
        return
    every = [*(n for n, _ in CONFIGS), "rows", "weak", "sums"]
    chosen = options.only.split(",") if options.only else every
    found["versions"] = {n: importlib.metadata.version(n) for n in ("jax", "libtpu")}
    for name, topology in CONFIGS:
        if name in chosen:
            one = compiled(name, topology, options.steps, search=options.search)
            known = found.setdefault("configs", {}).get(name, {}).get("steps", {}) | one["steps"]
            one["steps"] = {step: known[step] for step in STEPS if step in known}
            found["configs"][name] = one
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, topology in CONFIGS:
        for kind in ROWS:
            if not {"rows", f"rows/{name}", f"rows/{name}/{kind}"} & set(chosen):
                continue
            one = in_rows(name, topology, kind)
            found.setdefault("rows", {}).setdefault(name, {})[kind] = one
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    if "sums" in chosen:
        found["sums"] = sums()
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if any(name.partition("/")[0] == "weak" for name in chosen):
        for chips, topology in WEAK.items():
            if "weak" not in chosen and f"weak/{chips}" not in chosen:
                continue
            known = found.get("configs", {}).get("qwen2_1p5b_v5e8", {})
            if chips == 8 and {"train", "score"} <= set(known.get("steps", {})):
                one = known | {"steps": {s: known["steps"][s] for s in ("train", "score")}}
            else:  # on 8 chips it is that config
                one = weak(chips, topology)
            found.setdefault("weak", {})[str(chips)] = one
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    if len(found.get("weak", {})) > 2:
        plot(found, options.out.with_suffix(".png"))
    print(text(found))
    print(options.out)


if __name__ == "__main__":
    main()
