"""Checkpoints: a thin owner of Orbax's `CheckpointManager`.

A checkpoint holds three things: the train state (a sharded tree of `jax.Array`s, typed PRNG keys
included), host arrays by name (memory, pool, plan) and JSON (round, position, resolved config).
Host arrays restore with the shapes that they had, so that memory for a data set of another
length need not be known ahead; the state restores onto whatever mesh the abstract tree names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sage_jax import config

_STORES = ("gs", "s3")  # of URIs
# Orbax cannot store arrays without elements; their dtypes and shapes go into the JSON.
_EMPTY = "__empty_arrays__"
_RAISES = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")  # what they log, too
_FILLER = "__filler__"  # Orbax refuses an item without any leaf


def place(directory: str | os.PathLike[str]) -> Any:
    """A directory by path or URI, as what Orbax takes.

    Raises:
        ValueError: a URI of a kind that Orbax does not write to.
        ImportError: the package that knows the store is not installed.

    >>> place("runs/mine").is_absolute()
    True
    """
    text = os.fspath(directory)
    kind, found, _ = text.partition("://")
    if not found:
        return pathlib.Path(text).absolute()
    if kind not in _STORES:
        raise ValueError(
            f"checkpoint.directory={text}: {kind}:// is none of {', '.join(_STORES)}. Mount the "
            f"store as a directory, or use one of these."
        )
    from etils import epath

    _need({"gs": "gcsfs", "s3": "s3fs"}[kind], text, {"gs": "gcs", "s3": "s3"}[kind])
    return epath.Path(text)


def directory(run: config.Run, workdir: pathlib.Path) -> Any:
    """Where the checkpoints of a run lie."""
    if not run.checkpoint.directory:
        return workdir / "checkpoints"
    return place(run.checkpoint.directory)


def _need(package: str, text: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"checkpoint.directory={text} needs the package {package}: pip install "
            f"'sage_jax[{extra}]'."
        )


class Checkpoints:
    """The checkpoints of one directory; saves run in the background.

    Args:
        directory: where they lie, one sub-directory a step; made when missing. A path, or a URI of
            an object store that Orbax writes to itself: gs://bucket/run, s3://bucket/run.
        keep: how many of the newest to keep, at least 1.
        every: a checkpoint is `due` at multiples of this many steps; 0 = never by itself.

    Example:
        with Checkpoints(workdir / "checkpoints", every=50) as checkpoints:
            state, arrays, meta = checkpoints.restore(checkpoints.latest(), abstract_state)
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, every: int = 0):
        if keep < 1:
            raise ValueError(f"checkpoint.keep={keep} must be at least 1, the newest checkpoint.")
        if every < 0:
            raise ValueError(f"checkpoint.every={every} must be a number of steps, or 0 for never.")
        import orbax.checkpoint as ocp

        _quiet()
        self.directory = place(directory)
        self.every = every
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers={  # without them item_metadata is None before the first save
                "state": ocp.StandardCheckpointHandler(),
                "arrays": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Whether `every` asks for a checkpoint after this many steps."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first; killed saves are not among them."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        arrays: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
    ) -> None:
        """Begins to write a checkpoint, and returns once everything has been copied.

        A previous save that still runs is waited for. A process killed before the save is complete
        leaves the checkpoint before as the latest.

        Args:
            step: optimizer steps done; must be larger than `latest()`.
            state: tree of `jax.Array`s, of any dtype and sharding, typed PRNG keys included.
            arrays: host arrays by name, of any shape, numbers or booleans.
            meta: what `json` can write.

        Raises:
            ValueError: a checkpoint of this or a later step exists, or `arrays` or `meta` hold
                what cannot be stored.
            OSError: this one or the one before cannot be written, as when a disk is full.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"{self.directory} already has a checkpoint of step {latest}, so one of step "
                f"{step} would not be the latest. Resume from step {latest}, or start in another "
                "workdir."
            )
        full, empty = _split(arrays)
        try:
            json.dumps({**meta, _EMPTY: empty})
        except TypeError as e:
            raise ValueError(f"The checkpoint's meta must be plain JSON values: {e}.") from e
        args = self._ocp.args
        with self._writing():
            saved = self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(state),
                    arrays=args.StandardSave(full),
                    meta=args.JsonSave({**meta, _EMPTY: empty}),
                ),
            )
        if not saved:  # Orbax says no by returning False, which would lose the checkpoint silently
            raise RuntimeError(f"Orbax did not save step {step} in {self.directory}.")

    def restore(
        self, step: int, abstract_state: Any
    ) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
        """Reads a checkpoint, bit for bit, onto the mesh of `abstract_state`.

        Args:
            step: one of `steps()`.
            abstract_state: tree of `jax.ShapeDtypeStruct`s with shardings, or of arrays, with the
                structure of the saved state. Leaves without sharding go to the default device.

        Returns:
            (state, arrays, meta) as they were given to `save`.

        Raises:
            ValueError: there is no such checkpoint, it cannot be read, or a leaf of the state has
                another name, shape or dtype than the one that was saved.
        """
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(
                f"{self.directory} has no complete checkpoint of step {step}; it has: {known}."
            )
        self.wait()
        where = self.directory / str(step)
        args = self._ocp.args
        try:
            saved = _leaves(self._manager.item_metadata(step)["state"].tree)
        except Exception as e:
            raise _unreadable(where, e) from e
        abstract = jax.tree.map(_abstract, abstract_state)
        _compare(saved, _leaves(abstract), where)
        try:
            found = self._manager.restore(
                step,
                args=args.Composite(
                    state=args.StandardRestore(abstract),
                    arrays=args.StandardRestore(),
                    meta=args.JsonRestore(),
                ),
            )
        except Exception as e:
            raise _unreadable(where, e) from e
        meta = dict(found["meta"])
        arrays = {name: np.asarray(leaf) for name, leaf in found["arrays"].items()}
        arrays.pop(_FILLER)
        for name, (dtype, shape) in meta.pop(_EMPTY).items():
            arrays[name] = np.empty(shape, dtype)
        return found["state"], arrays, meta

    def wait(self) -> None:
        """Returns when the save in the background is complete; raises what went wrong in it."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the threads of the manager."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong in a save comes up in a later call, as dozens of lines: here as one."""
        try:
            yield
        except Exception as e:
            known = [step for step in self.steps() if (self.directory / str(step)).exists()]
            last = f"the last complete one, of step {known[-1]}" if known else "the start"
            raise OSError(
                f"A checkpoint in {self.directory} could not be written ({_reason(e)}). With that "
                f"mended, the same command goes on from {last}."
            ) from e


def _split(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """Copies of the arrays with elements, and (dtype, shape) of those without."""
    full, empty = {_FILLER: np.zeros(1, np.uint8)}, {}
    for name, value in arrays.items():
        array = np.array(value)  # a copy: the caller goes on writing to its memory
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"The array {name!r} of a checkpoint has the dtype {array.dtype}; it must hold "
                "numbers or booleans. Put text into meta."
            )
        if array.size:
            full[name] = array
        else:
            empty[name] = [array.dtype.str, list(array.shape)]
    return full, empty


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype by leaf name; PRNG keys as the integers that they are stored as."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    return found


def _compare(saved: dict, wanted: dict, where: pathlib.Path) -> None:
    """Raises one line about the first leaf that differs; Orbax would print thousands."""

    def show(leaf: tuple[tuple[int, ...], str] | None) -> str:
        return "no such leaf" if leaf is None else f"{leaf[1]}{list(leaf[0])}"

    names = [n for n in {**wanted, **saved} if saved.get(n) != wanted.get(n)]
    if names:
        more = f" (and {len(names) - 1} more leaves differ)" if len(names) > 1 else ""
        raise ValueError(
            f"The checkpoint {where} does not fit this run: {names[0]} is "
            f"{show(saved.get(names[0]))} in the checkpoint and {show(wanted.get(names[0]))} in "
            f"the run{more}. Use the model and optimizer it was saved with, or another workdir."
        )


def _unreadable(where: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"The checkpoint {where} cannot be read ({_reason(error)}). Remove this directory to "
        f"resume from the checkpoint before it."
    )


def _reason(error: Exception) -> str:
    """The cause alone, of an error of TensorStore its place and, at its end, the innermost one."""
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    text = (str(error).splitlines() or [type(error).__name__])[0]
    text = re.sub(r" \[\w+='.*'\]", "", text).rstrip(". ")
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-130:]}"


def _quiet() -> None:
    """Keeps out of the progress what Orbax says besides what it raises.

    Its many INFO lines, which absl prints inside `app.run`, and the tracebacks of its threads. And
    after the first error of several reads or writes it closes their event loop: each of the others
    then reports that, from another thread or when it is collected, with nothing to be mended.
    """
    logger = logging.getLogger("absl")
    if _not_chatter in logger.filters:
        return
    logger.addFilter(_not_chatter)
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        code = getattr(found.object, "cr_code", None)
        orphan = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
        if not orphan and "Event loop is closed" not in str(found.exc_value):
            before(found)

    sys.unraisablehook = hook


def _not_chatter(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
        return True
    if record.exc_info and record.filename in _RAISES:
        return False
    return record.levelno >= logging.WARNING
