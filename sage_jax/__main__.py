"""The launcher: `sage-jax MODE --config=FILE --workdir=DIR --config.key=value`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import sys
import traceback
from typing import Any

# Before anything imports transformers: it tells every user without torch that torch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

MODES = {  # name -> one line of help; the functions are in runtime/modes.py
    "train": "align a model on preference pairs that SAGE selects",
    "sft": "supervised fine-tuning; also makes small models from scratch",
    "sample": "sample answers of the model, verify them, write preference pairs",
    "eval": "greedy accuracy on problems, preference accuracy on pairs",
    "score": "score a data set, write the scores and the selected rows",
    "export": "write a run's latest weights as a Hugging Face directory",
    "report": "write report.html of a workdir again",
    "doctor": "look a data set over: lengths, truncation, duplicates, bad rows",
    "compile": "memory, cost and collectives of a run's steps on a TPU pod, without one",
}
OWN_FLAGS: dict[str, dict[str, type]] = {
    "compile": {
        "topology": str, "steps": str, "search": bool, "json": bool, "length_mean": float,
        "length_sigma": float, "prompt_share": float,
    }
}  # fmt: skip
FROM_WORKDIR = ("export", "report")  # these find their settings in the workdir of the run
USAGE = """usage: sage-jax MODE --config=FILE --workdir=DIR [--config.key=value ...]

modes:
{modes}

FILE is a config (configs/quickstart.py) or the name of one that comes with the package
(quickstart); export and report need only the workdir. compile takes --topology=v5e:16x16 (any TPU
slice, or cpu:8), --steps=train,score,eval,sample, --search=false and --json, and ends with 3 when
something does not fit; --length_mean=TOKENS (of a prompt and one answer), --length_sigma=0.5 and
--prompt_share=0.4 say which pairs to plan its rows for. A run that was stopped or killed goes on
when its command is given again. Every setting and its default: python -m sage_jax.config

On several hosts the command is the same on each. TPU slices, SLURM, Kubernetes and MPI say who
takes part; elsewhere --coordinator=HOST:PORT --num_processes=N --process_id=I do. A run
begins when all of them are there, and ends when one is not within --join_timeout=50 seconds.

example:
  sage-jax train --config=configs/quickstart.py --workdir=runs/quickstart --config.optim.lr=1e-4"""


class UsageError(ValueError):
    """Something that the user typed."""


def usage() -> str:
    """The text of `sage-jax --help`."""
    return USAGE.format(modes="\n".join(f"  {name:8}{text}" for name, text in MODES.items()))


def find_config(name: str) -> pathlib.Path:
    """A config file by path, or by the name of one that comes with the package.

    Raises:
        UsageError: there is no such file.
    """
    path = pathlib.Path(name)
    if path.is_file():
        return path
    shipped = importlib.util.find_spec("sage_jax.configs")
    places = list(shipped.submodule_search_locations or []) if shipped else []
    known = sorted(p for d in places for p in pathlib.Path(d).glob("*.py") if p.stem[0] != "_")
    for candidate in known:
        if candidate.stem == name or (
            candidate.name == path.name and path.parent.name == "configs"
        ):
            return candidate
    beside = {str(p): p.stem for p in sorted(path.parent.glob("*.py"))}
    names = beside or {p.stem: p.stem for p in known}
    near = difflib.get_close_matches(path.stem, names.values(), n=1, cutoff=0.0)
    hint = next((f" Did you mean {k}?" for k, stem in names.items() if stem in near), "")
    raise UsageError(f"--config={name}: there is no such file.{hint}")


def parse(argv: list[str]) -> tuple[str, Any, pathlib.Path | None]:
    """Reads the command line.

    Args:
        argv: arguments without the program's name.

    Returns:
        The mode, the ConfigDict with overrides applied, and the workdir (None when not given).

    Raises:
        UsageError: an unknown mode or flag, a missing file, an unknown key, a mistyped value.
    """
    from sage_jax import config as settings
    from sage_jax.runtime import hosts

    mode = argv[0] if argv else ""
    if mode not in MODES:
        near = difflib.get_close_matches(mode, MODES, n=1, cutoff=0.0)
        if not mode or mode.startswith("-"):
            raise UsageError(
                f"the mode comes first: sage-jax MODE {mode or '--config=FILE'} ..., with MODE one "
                f"of {', '.join(MODES)}."
            )
        raise UsageError(f"{mode!r} is not a mode ({', '.join(MODES)}). Did you mean {near[0]!r}?")
    arguments = _join_values(argv[1:])
    known = settings.flatten(settings.default())
    for argument in arguments:
        name, equals, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UsageError(f"{argument!r} is not a flag. Write --config.key=value.")
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            hint = settings.nearest(name.removeprefix("config."), known)
            raise UsageError(f"{argument}: there is no key {name}. The nearest is config.{hint}.")
        if not name.startswith("config.") and name not in ("config", "workdir"):
            flags = ["config", "workdir", *hosts.FLAGS]
            near = difflib.get_close_matches(name, flags, n=1, cutoff=0.0)
            raise UsageError(f"--{name} is not a flag. Did you mean --{near[0]}?")
        if not equals:
            raise UsageError(f"--{name} needs a value: --{name}=...")
    given = {a.removeprefix("--").partition("=")[0]: a.partition("=")[2] for a in arguments}
    if "://" in given.get("workdir", ""):
        raise UsageError(
            f"--workdir={given['workdir']}: a workdir holds small files that grow, so it is a "
            f"directory. Only checkpoints go to a URI: "
            f"--config.checkpoint.directory={given['workdir']}."
        )
    workdir = pathlib.Path(given["workdir"]).expanduser() if given.get("workdir") else None
    overrides = [a for a in arguments if a.startswith("--config.")]
    if "config" in given:
        config = _run_file(find_config(given["config"]))
    elif mode not in FROM_WORKDIR:
        raise UsageError("--config=FILE is missing. Example: --config=configs/quickstart.py")
    elif workdir is None:
        raise UsageError(f"--workdir is missing. Example: sage-jax {mode} --workdir=runs/my_run")
    else:
        config = _of_workdir(workdir)
    return mode, _override(config, overrides, known), workdir


def take_own_flags(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The command line without the flags that only its mode has, and these.

    Raises:
        UsageError: a value that is not of the flag's kind.

    >>> take_own_flags(["compile", "--topology=v5e:4x4", "--json", "--config=quickstart"])
    (['compile', '--config=quickstart'], {'topology': 'v5e:4x4', 'json': True})
    """
    own: dict[str, Any] = {}
    kinds, rest = OWN_FLAGS[argv[0]], argv[:1]
    switches = [f"--{name}" for name, kind in kinds.items() if kind is bool]
    for argument in _join_values([f"{a}=true" if a in switches else a for a in argv[1:]]):
        name, _, text = argument.removeprefix("--").partition("=")
        if name not in kinds:
            rest.append(argument)
        elif kinds[name] is float:
            try:
                own[name] = float(text)
            except ValueError as e:
                raise UsageError(f"--{name}={text!r} is not a number.") from e
        elif kinds[name] is not bool:
            own[name] = text
        elif text.lower() in ("true", "false"):
            own[name] = text.lower() == "true"
        else:
            raise UsageError(f"--{name}={text!r} is not a bool. Write true or false.")
    return rest, own


def _run_file(path: pathlib.Path) -> Any:
    """What `get_config()` of a config file returns."""
    from ml_collections import config_dict

    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as e:  # whatever a user's file may do, such as to mistype a key
        if isinstance(e, KeyError) and e.args == ("get_config",):
            raise UsageError(f"{path} defines no function get_config().") from e
        said = (str(e).splitlines() or [""])[0]
        raise UsageError(f"{_place(path, e)}: {type(e).__name__}: {said}") from e
    if not isinstance(config, config_dict.ConfigDict):
        raise UsageError(
            f"{path}: get_config() returns a {type(config).__name__}. Start from c = "
            f"config.default() and end with return c."
        )
    return config


def _of_workdir(workdir: pathlib.Path) -> Any:
    """The settings that a run was started with."""
    from sage_jax import config as settings

    path = workdir / "config.json"
    if not path.is_file():
        raise UsageError(f"--workdir={workdir} holds no run: there is no config.json in it.")
    config = settings.default()
    found = json.loads(path.read_text())
    config.update({key: value for key, value in found.items() if key != "mode"})
    return config


def _override(config: Any, overrides: list[str], known: dict[str, Any]) -> Any:
    """The settings with those of the command line in place of their own."""
    from absl import flags
    from ml_collections import config_flags

    line = ["sage-jax", *overrides]
    values = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=line
        )
        values(line)
    except (flags.Error, TypeError, ValueError) as e:
        raise UsageError(_override_error(overrides, known, e)) from e
    return holder.value


def _place(path: pathlib.Path, error: BaseException) -> str:
    """`file:line` of the last line of the config file that an error went through."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if pathlib.Path(frame.filename) == path.absolute() or frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno or 0)
    return f"{path}:{lines[-1]}" if lines else str(path)


def _join_values(arguments: list[str]) -> list[str]:
    """`--workdir DIR` as `--workdir=DIR`, as absl reads it."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            if not argument.startswith("--"):
                joined[-1] += "=" + argument
                continue
        joined.append(argument)
    return joined


def _override_error(overrides: list[str], known: dict[str, Any], error: Exception) -> str:
    for override in overrides:
        key, _, text = override.removeprefix("--config.").partition("=")
        kind = type(known[key])
        if kind in (int, float):
            try:
                kind(text)
            except ValueError:
                return f"config.{key}={text!r} is not {'an int' if kind is int else 'a float'}."
        if kind is bool and text.lower() not in ("true", "false", "1", "0", "t", "f", "yes", "no"):
            return f"config.{key}={text!r} is not a bool. Write true or false."
    return str(error).splitlines()[0]


def main(argv: list[str]) -> int:
    """Runs one mode and returns the exit code: 0, 1 for a failed run, 2 for a wrong command."""
    if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from sage_jax import __version__

        print(f"sage_jax {__version__}")
        return 0
    from sage_jax.runtime import hosts

    try:
        code = _run(argv)
    except (ValueError, OSError, ImportError) as e:
        if os.environ.get("SAGE_JAX_TRACEBACK") or not _is_message(e):
            return _defect(e)
        return hosts.failed(str(e), 2)
    except FloatingPointError as e:
        return hosts.failed(str(e), 1)
    except Exception as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            return _defect(e)
        return hosts.failed(
            f"out of memory: {str(e).splitlines()[0]}. Lower train.batch_pairs or "
            "data.max_length, raise train.accumulate, or set model.remat=full.",
            1,
        )
    except KeyboardInterrupt:
        return hosts.failed("interrupted", 130)
    hosts.finish()
    return code


def _run(argv: list[str]) -> int:
    """Joins the other processes, if there are any, and runs the mode."""
    from sage_jax.runtime import hosts

    own: dict[str, Any] = {}
    if argv[0] in OWN_FLAGS:  # a command of one process, whatever machine it is typed on
        argv, own = take_own_flags(argv)
    else:  # before all that can fail on one of them alone: a failure then reaches the others
        argv, given, wait = hosts.take_flags(argv)
        hosts.start(given, wait)
    from sage_jax import config as settings

    mode, config, workdir = parse(argv)
    run = settings.resolve(config)
    hosts.same("settings", (mode, settings.as_dict(run), str(workdir)))
    modes = importlib.import_module("sage_jax.runtime.modes")
    return getattr(modes, mode)(run, workdir, **own)


def _defect(error: Exception) -> int:
    """What is no user's mistake is shown with its traceback; one process of several ends all."""
    from sage_jax.runtime import hosts

    if not hosts.several():
        raise error
    text = "".join(traceback.format_exception(error))
    lost = re.search(r"Gloo|NCCL|[Cc]onnection (reset|closed|refused)|closed by peer", str(error))
    if lost:
        text += (
            "another process of this run is gone, killed or out of memory; its output says more. "
            "The same command on all hosts goes on from the last checkpoint."
        )
    return hosts.failed(text, 1)


def _is_message(error: Exception) -> bool:
    """Whether an error is one that this package raised for its user, and not a defect.

    What our own code raises says what to change. The same type from inside jax or numpy is a
    mistake of ours, and its traceback is what its reader needs. Files that are missing or may not
    be written are the user's, wherever that comes up.
    """
    if isinstance(error, OSError) and error.filename:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(pathlib.Path(__file__).parent) + os.sep
    return bool(frames) and frames[-1].filename.startswith(ours)


def console() -> None:
    """Entry point of the `sage-jax` command."""
    sys.path.append(os.getcwd())  # a user's own "module:function" beside the command, as python -m
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the help, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    console()
