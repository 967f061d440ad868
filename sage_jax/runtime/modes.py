"""What each mode of the launcher does: a function of a checked run that returns an exit code."""

from __future__ import annotations

import pathlib

from sage_jax import config
from sage_jax.data import encode
from sage_jax.generate import pairs as pair_makers
from sage_jax.report import progress, writers
from sage_jax.runtime import (
    checkpoint,
    dataset,
    evaluation,
    forward,
    hosts,
    setup,
    sharing,
    state,
    training,
)  # fmt: skip
from sage_jax.runtime import mesh as meshes


def train(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Aligns a model on selected pairs, with uniform DPO at equal FLOPs beside it if asked."""
    if run.loss.name == "sft":
        raise ValueError("config.loss.name='sft' needs no pairs. Use the mode: sage-jax sft.")
    return training.fit(run, training.open_workdir(run, workdir, "train"), "train")


def sft(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Supervised fine-tuning: the same step and loop, with the loss of single answers."""
    if run.rounds.resample:
        raise ValueError(
            f"config.rounds.resample={run.rounds.resample} makes pairs, and `sage-jax sft` trains "
            f"on single answers. Set it to 0, or use the mode train."
        )
    run = config.replace(  # single answers have no margin to select, guard or weigh by
        run, **{"loss.name": "sft", "selection.name": "uniform", "curriculum.sharpness": 0.0,
                "selection.guard": "off", "selection.refresh": 0.0, "selection.soft": 0.0,
                "compare.uniform": False, "compare.random": False, "eval.kl_prompts": 0},
    )  # fmt: skip
    return training.fit(run, training.open_workdir(run, workdir, "sft"), "sft")


def sample(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Samples answers of the model to problems and writes verified pairs to WORKDIR/pairs.jsonl."""
    workdir = training.need(workdir, "sample")
    out = workdir / "pairs.jsonl"
    if hosts.on_first(out.exists):
        raise ValueError(f"{out} exists. Name another --workdir; nothing was overwritten.")
    settings = run.sample
    source = config.sample_source(run)
    problems, check, name = evaluation.load_problems(
        source, settings.count, split="train", seed=run.seed, verifier=run.eval.verify
    )
    policy = setup.load_policy(run, setup.make_mesh(run))
    total = len({str(p.prompt) for p in problems}) * settings.per_problem
    with progress.Progress(total, "sampling", "answers") as bar:
        rows, tally = pair_makers.sample_pairs(
            policy.model, policy.whole(policy.params), policy.tokenizer, problems,
            check=check, task=name, max_new_tokens=run.eval.max_new_tokens,
            samples=settings.per_problem, per_problem=settings.pairs_per_problem,
            temperature=settings.temperature, top_p=settings.top_p, seed=run.seed,
            batch=run.eval.batch, progress=lambda done, _: bar.update(done - bar.done),
            rows=policy.rows,
        )  # fmt: skip
    if not rows:
        raise ValueError(
            f"No problem had both a right and a wrong answer: of {tally.problems}, "
            f"{tally.no_right} had none right and {tally.no_wrong} none wrong, and "
            f"{tally.unfinished} of {total} answers were cut at "
            f"config.eval.max_new_tokens={run.eval.max_new_tokens}. Use easier or harder problems, "
            f"more samples, or longer answers."
        )
    if hosts.first():
        pair_makers.write_jsonl(out, rows)
        writers.write_json(workdir / "sample.json", tally._asdict())
    print(
        f"{tally.pairs} pairs from {tally.with_pairs} of {tally.problems} problems "
        f"({tally.no_right} had no right answer, {tally.no_wrong} no wrong one; {tally.unfinished} "
        f"of {total} answers were cut at {run.eval.max_new_tokens} tokens and not used; pass rate "
        f"{tally.pass_rate:.3f})\n{out}"
    )
    return 0


def eval(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Greedy accuracy with its interval, per level; preference accuracy on held-out pairs."""
    if not run.eval.problems and not run.data.eval:
        raise ValueError("config.eval.problems and config.data.eval are both empty. Give one.")
    mesh = setup.make_mesh(run)
    tokenizer = setup.load_tokenizer(run)
    trained = None  # problems of a built-in task are no training data of another split
    if run.data.train and not run.data.train.startswith("task:"):
        trained = dataset.load_pairs(run, tokenizer, run.data.train)
    held = evaluation.held_out(run, tokenizer, trained)
    pairs = dataset.load_pairs(run, tokenizer, run.data.eval) if run.data.eval else None
    if pairs is not None:
        dataset.check_sides(pairs, "data.eval")
    policy = setup.load_policy(run, mesh, tokenizer)
    other = passes = None
    if pairs is not None:
        dataset.check_ids(pairs, policy)
        policy = setup.fitted(policy, pairs.lengths_N2)
        other = setup.load_reference(run, policy, mesh)
        passes = forward.Passes(policy, mesh, *sharing.shapes(run, policy.model, mesh, pairs))
    evaluator = evaluation.Evaluator(run, policy, held, passes, pairs, other)
    row = evaluator(policy.params)
    _print_evaluation(run, evaluator, row)
    if workdir is not None and hosts.first():
        named = {"model": run.model.path, "problems": run.eval.problems, "pairs": run.data.eval}
        workdir.mkdir(parents=True, exist_ok=True)
        writers.write_json(workdir / "eval.json", named | row)
        print(f"\n{workdir / 'eval.json'}")
    return 0


def _print_evaluation(
    run: config.Run, evaluator: evaluation.Evaluator, row: dict[str, float]
) -> None:
    if evaluator.last is not None:
        found = evaluator.last
        levels = [
            [str(level), f"{100 * a.mean:.1f} % ({100 * a.low:.1f} - {100 * a.high:.1f})",
             str(a.count)]
            for level, a in [*found.by_level.items(), ("all", found.overall)]
        ]  # fmt: skip
        print(progress.table(["level", "greedy accuracy (95 %)", "problems"], levels))
        if found.unfinished:
            print(
                f"\n{found.unfinished} answers were cut at config.eval.max_new_tokens="
                f"{run.eval.max_new_tokens}."
            )
    if evaluator.pairs is not None:
        share = row["eval_likelihood_accuracy"]
        text = f"\n{len(evaluator.pairs)} pairs: {100 * share:.1f} % of the chosen answers are "
        text += "likelier than the rejected ones"
        if run.reference.path:
            text += (
                f"; against the reference: loss {row['eval_loss']:.4f}, rewards/accuracies "
                f"{row['eval_rewards/accuracies']:.3f}"
            )
        print(text)


def score(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Scores a data set; writes the scores, and the selected rows as they came."""
    from sage_jax.runtime import scoring

    return scoring.score(run, training.need(workdir, "score"))


def export(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Writes the weights of a run's latest checkpoint to WORKDIR/export."""
    workdir = training.need(workdir, "export")
    where = checkpoint.directory(run, workdir)
    if not hosts.on_first(where.is_dir):
        raise ValueError(f"--workdir={workdir} holds no checkpoints. Name the workdir of a run.")
    try:
        mesh = setup.make_mesh(run)
    except ValueError:  # trained on other devices than these; where weights lie changes no file
        mesh = meshes.make_mesh(data=1, fsdp=-1)
        print(f"The run's mesh does not fit the {mesh.size} devices here: mesh.fsdp={mesh.size}.")
    with checkpoint.Checkpoints(where) as checkpoints:
        at = hosts.agree(checkpoints.latest())
        if at is None:
            raise ValueError(f"{where} holds no complete checkpoint to export.")
        policy = setup.load_policy(run, mesh)
        found, _, _ = checkpoints.restore(at, state.abstract_state(run, policy.params, mesh))
    training.export(workdir / "export", run, policy, found.params)
    print(f"step {at}: {workdir / 'export'}")
    return 0


def report(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Writes report.html again from the files of a workdir."""
    from sage_jax.report import html

    del run
    workdir = training.need(workdir, "report")
    if not hosts.on_first((workdir / "metrics.jsonl").exists):
        raise ValueError(f"--workdir={workdir} holds no metrics.jsonl. Name the workdir of a run.")
    if hosts.first():
        print(html.write(workdir))
    return 0


def doctor(run: config.Run, workdir: pathlib.Path | None) -> int:
    """Looks a data set over, with the tokenizer of the model; writes nothing."""
    from sage_jax.data import doctor as doctors
    from sage_jax.data import records

    del workdir
    tokenizer = setup.load_tokenizer(run)
    found = records.read(
        dataset.sources(run, run.data.train), format=run.data.format, on_bad_row="skip"
    )
    encoded = encode.encode(found, tokenizer, max_length=run.data.max_length)
    print(doctors.report(found, encoded)[1])
    return 0


def compile(
    run: config.Run,
    workdir: pathlib.Path | None,
    *,
    topology: str = "",
    steps: str = "",
    search: bool = True,
    json: bool = False,
    **lengths: float,
) -> int:
    """Compiles a run's steps for a topology that is not there; 3 when one does not fit.

    `lengths` are those of the pairs, see `compiler.run_mode`.
    """
    from sage_jax.runtime import compile as compiler

    if workdir is not None:
        raise ValueError(f"--workdir={workdir}: the mode compile writes nothing. Leave it out.")
    if not topology:
        raise ValueError("--topology is missing. Example: --topology=v5e:4x4, or cpu:8.")
    return compiler.run_mode(
        run, topology=topology, steps=steps, search=search, as_json=json, **lengths
    )
