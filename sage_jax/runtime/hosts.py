"""Several processes as one run: started together, of one mind, and ended together.

The first process decides whatever devices do not compute: what is on disk, which pairs are drawn
and selected, which text was sampled. The others take its word (`agree`), so that all of them run
the same programs on the same pairs even where they see other files or round otherwise. A process
that fails tells the others why, through the key-value store that `jax.distributed` keeps, and they
end with its message.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np

T = TypeVar("T")

HEARTBEAT = 30  # seconds without a sign of life after which jax ends the run; its default is 100
JOIN = 50  # seconds in which all have to be there; a pod that first pulls its image needs more
_FAILURE, _SEEN, _END = "sage_jax/failure", "sage_jax/seen", "sage_jax/end"
_DAY_MS = 24 * 3600 * 1000
_WHO = ("coordinator", "num_processes", "process_id")
FLAGS = (*_WHO, "join_timeout")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Launch(NamedTuple):
    """Who takes part: what the flags or the environment say."""

    coordinator: str  # host:port of the first process
    num_processes: int
    process_id: int


class _Cluster:
    """Owner of the thread that listens for failures of other processes."""

    def __init__(self, client: Any, index: int, count: int):
        self.client, self.index, self.count = client, index, count
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        lost = 0
        while not self.done.is_set():
            try:
                said = json.loads(self.client.blocking_key_value_get(_FAILURE, 1000))
            except Exception as e:
                lost = 0 if "DEADLINE_EXCEEDED" in str(e) else lost + 1
                if lost < 3 or self.done.wait(1):
                    continue
                said = {"process": 0, "host": "", "text": "it is gone, killed or out of memory"}
            if said["process"] != self.index:
                self._end(said)
            return  # this process's own failure: its main thread says it

    def _end(self, said: dict[str, Any], also: str = "") -> NoReturn:
        where = f"process {said['process']}" + (f" on {said['host']}" if said["host"] else "")
        print(f"sage-jax: {where} failed: {said['text']}{also}", file=sys.stderr, flush=True)
        self._leave(1, said["process"])

    def _leave(self, code: int, failed: int) -> NoReturn:
        """Ends this process when the others know: the first keeps what they read it from."""
        try:
            if failed != self.index:
                self.client.key_value_set(f"{_SEEN}/{self.index}", "1")
            if self.index in (0, failed):
                for other in set(range(self.count)) - {self.index, failed}:
                    self.client.blocking_key_value_get(f"{_SEEN}/{other}", 5000)
        except Exception:  # one that is gone says nothing
            pass
        if self.index == 0 and failed != 0:
            time.sleep(2)  # else the one that failed is ended by the loss of the first
        sys.stdout.flush()
        os._exit(code)

    def fail(self, text: str, code: int) -> NoReturn:
        """Says what failed, here and to the others, and ends this process."""
        mine = {"process": self.index, "host": socket.gethostname(), "text": text}
        try:
            self.client.key_value_set(_FAILURE, json.dumps(mine), allow_overwrite=False)
        except Exception:  # somebody was first, or the first process is gone
            try:
                said = json.loads(self.client.blocking_key_value_get(_FAILURE, 1000))
            except Exception:
                said = mine
            if said["process"] != self.index:
                if _last_line(said["text"]) == _last_line(text):  # a mistake that all of them see
                    self._leave(code, said["process"])
                self._end(said, f"\n(then, in process {self.index}: {_last_line(text)})")
        who = f" in process {self.index}" if self.index else ""
        print(f"sage-jax{who}: {text}", file=sys.stderr, flush=True)
        self._leave(code, self.index)

    def finish(self) -> None:
        """Waits for all; a failure of one of them still ends the others meanwhile."""
        self.client.wait_at_barrier(_END, _DAY_MS)
        self.done.set()
        self.thread.join()
        jax.distributed.shutdown()


_cluster: _Cluster | None = None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def take_flags(
    argv: list[str], environ: Mapping[str, str] = os.environ
) -> tuple[list[str], Launch | None, int]:
    """Takes what says how to join the other processes out of a command line.

    These are `--coordinator`, `--num_processes`, `--process_id` and `--join_timeout`. Of the first
    three, what is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Returns:
        The rest of the arguments; who takes part, None where nothing says it; and for how many
        seconds to wait for the others.

    Raises:
        ValueError: some of the three without the others, or numbers that are none.

    >>> take_flags(["train", "--coordinator=10.0.0.1:9876", "--num-processes=2",
    ...             "--process_id", "1"], {})
    (['train'], Launch(coordinator='10.0.0.1:9876', num_processes=2, process_id=1), 50)
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    waiting = ""
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if waiting:
            given[waiting], waiting = argument, ""
        elif argument.startswith("--") and name in FLAGS:
            if equals:
                given[name] = value
            else:
                waiting = name
        else:
            rest.append(argument)
    wait = given.pop("join_timeout", str(JOIN))
    if waiting == "join_timeout" or not wait.isdigit() or int(wait) < 1:
        raise ValueError(f"--join_timeout={wait if not waiting else ''} has to be whole seconds.")
    known = {flag: environ[v] for flag, v in zip(_WHO, _VARIABLES, strict=True) if v in environ}
    if not given and not waiting and len(known) < len(_WHO):
        return rest, None, int(wait)  # some of them alone are completed by what the cluster says
    given = known | given
    missing = [flag for flag in _WHO if flag not in given] + ([waiting] if waiting else [])
    if missing:
        raise ValueError(
            f"--{missing[0]} is missing. Give --coordinator=HOST:PORT of the first process, "
            f"--num_processes and --process_id together, or none of them."
        )
    if not re.fullmatch(r".+:\d+", given["coordinator"]):
        raise ValueError(f"--coordinator={given['coordinator']} is not HOST:PORT.")
    try:
        found = Launch(given["coordinator"], *(int(given[flag]) for flag in _WHO[1:]))
    except ValueError as e:
        raise ValueError(
            f"--num_processes={given['num_processes']} and --process_id={given['process_id']} "
            f"have to be whole numbers."
        ) from e
    if not 0 <= found.process_id < found.num_processes:
        raise ValueError(
            f"--process_id={found.process_id} has to be in [0, {found.num_processes}), the number "
            f"of processes."
        )
    return rest, found, int(wait)


def detect(environ: Mapping[str, str] = os.environ) -> str | None:
    """The kind of cluster that started this process among others; None for a single one.

    Asked before `jax.distributed`, whose own detection needs packages, permissions and metadata
    servers that a single process on a laptop, in a container or in an interactive allocation lacks.

    Returns:
        "slurm", "ompi", "mpi4py", "kubernetes", "tpu" or None.

    Raises:
        ValueError: started by an MPI that JAX cannot ask, without mpi4py.

    >>> detect({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
    ...         "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    'slurm'
    """

    def number(name: str) -> int:
        value = environ.get(name, "")
        return int(value) if value.isdigit() else 0

    if _tpu_hosts(environ):
        return "tpu"
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in step) and number("SLURM_NTASKS") > 1:
        return "slurm"
    if max(number("OMPI_COMM_WORLD_SIZE"), number("PMI_SIZE")) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return "ompi"
        if importlib.util.find_spec("mpi4py"):
            return "mpi4py"
        raise ValueError(
            "This process is one of several that MPI started, and JAX cannot ask this MPI who they "
            "are. Install mpi4py, or give --coordinator, --num_processes and --process_id."
        )
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "kubernetes"
    return None


def _tpu_hosts(environ: Mapping[str, str]) -> bool:
    """Whether this is a host of a TPU slice; a slice of one host is asked, and says so."""
    platforms = environ.get("JAX_PLATFORMS", "tpu")
    if "tpu" not in platforms or "TPU_SKIP_MDS_QUERY" in environ:
        return False
    if not glob.glob("/dev/accel[0-9]*") and not glob.glob("/dev/vfio/[0-9]*"):
        return False
    return importlib.util.find_spec("libtpu") is not None


def start(given: Launch | None, wait: int = JOIN, environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run, if there are any; before anything else uses JAX.

    A process that finds itself alone ends: JAX would end it with a stack trace of its own library.

    Args:
        given: from `take_flags`; None asks the cluster.
        wait: seconds in which the others have to be there.
        environ: of the process.

    Raises:
        ValueError: as `detect`.
    """
    global _cluster
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT}
    settings["initialization_timeout"] = wait + 60  # `_watch` comes first, and says more
    if given is not None:
        if given.num_processes == 1:
            return
        settings |= given._asdict() | {"cluster_detection_method": "deactivate"}
        settings["coordinator_address"] = settings.pop("coordinator")
    else:
        kind = detect(environ)
        if kind is None:
            return
        if kind == "mpi4py":
            settings["cluster_detection_method"] = "mpi4py"
    joined = threading.Event()
    threading.Thread(target=_watch, args=(joined, wait), daemon=True).start()
    try:
        jax.distributed.initialize(**settings)
    except ValueError as e:
        if given is None and "coordinator_address should be defined" in str(e):
            return  # a TPU that belongs to no slice
        raise
    finally:
        joined.set()
    if given is None and whole_node(environ):
        # JAX gives a SLURM or MPI task one GPU, which is right for one task a GPU only.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    from jax._src import distributed  # no public name gives the key-value store

    state = distributed.global_state
    _cluster = _Cluster(state.client, state.process_id, state.num_processes)
    if _cluster.index:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all


def _watch(joined: threading.Event, wait: int) -> None:
    """Says that this process waits for others, and ends it when they do not come.

    Which of them is missing JAX does not say: it is the one whose output lacks the first line.
    """
    soon = min(10, wait / 2)
    if joined.wait(soon):
        return
    from jax._src import distributed

    state = distributed.global_state

    def who() -> str:  # JAX knows which once it has asked the cluster
        process = "a process" if state.client is None else f"process {state.process_id}"
        return f"sage-jax: {process} on {socket.gethostname()}"

    where = f" at {state.coordinator_address}" if state.coordinator_address else ""
    print(f"{who()} waits for the others{where}", file=sys.stderr, flush=True)
    # The first holds what the others ask: it goes last, so that all of them end in words.
    if joined.wait(wait - soon + (5 if state.process_id == 0 else 0)):
        return
    if state.client is None:
        said = f"the cluster did not say within {wait} seconds who takes part."
    else:
        said = (
            f"not all of the {state.num_processes} processes were there{where} within {wait} "
            f"seconds. Those that were say that they wait; the output of the one that does not "
            f"says why."
        )
    print(f"{who()}: {said} --join_timeout=SECONDS waits longer.", file=sys.stderr, flush=True)
    os._exit(1)


def whole_node(environ: Mapping[str, str]) -> bool:
    """Whether a task has its node to itself.

    >>> whole_node({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}), whole_node({})
    (True, False)
    """
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    return re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks) is not None


def several() -> bool:
    """Whether this process is one of several."""
    return _cluster is not None and _cluster.count > 1


def first() -> bool:
    """Whether this is the process that writes files and prints."""
    return _cluster is None or _cluster.index == 0


def agree(value: T) -> T:
    """The first process's value, on every process; all of them have to call it.

    It goes over the devices' own network. No other program may be running meanwhile: on CPUs two
    at once can meet in another order on another process, and neither ends.

    Args:
        value: what `pickle` can copy; what the others give is not looked at.

    >>> agree({"step": 3})
    {'step': 3}
    """
    if _cluster is None or _cluster.count == 1:
        return value
    from jax.experimental import multihost_utils

    barrier()  # CPUs wait half a minute for each other inside a program, and a day here
    data = np.frombuffer(pickle.dumps(value), np.uint8) if first() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(data))))
    room = np.zeros(1 << max(size - 1, 1023).bit_length(), np.uint8)  # few shapes, few programs
    room[: len(data)] = data
    found = np.asarray(multihost_utils.broadcast_one_to_all(room))
    return pickle.loads(found[:size].tobytes())


def on_first(make: Callable[[], T]) -> T:
    """What `make()` returns on the first process, on every process; or raises there, everywhere.

    >>> on_first(lambda: 1 + 1)
    2
    """
    if not several():
        return make()
    outcome: tuple[bool, Any] = (True, None)
    if first():
        try:
            outcome = (True, make())
        except Exception as e:
            outcome = (False, e if isinstance(e, ValueError | OSError) else RuntimeError(str(e)))
    worked, value = agree(outcome)
    if not worked:
        raise value
    return value


def same(what: str, value: Any) -> None:
    """Refuses to go on with processes that were given different things.

    Args:
        what: names it, in the plural.
        value: what has to be the same.

    Raises:
        ValueError: this process has another value than the first.
    """
    if several() and agree(value) != value:
        raise ValueError(
            f"The {what} of this process are not those of the first process. Give every process "
            f"the same command, and the same files."
        )


_barriers = 0


def barrier() -> None:
    """Waits for all processes, without using devices."""
    global _barriers
    if _cluster is not None and _cluster.count > 1:
        _barriers += 1
        _cluster.client.wait_at_barrier(f"sage_jax/barrier/{_barriers}", _DAY_MS)


def failed(text: str, code: int) -> int:
    """Ends all processes with what went wrong in this one; a single process prints it.

    Returns:
        The exit code, to a single process; of several none returns.
    """
    if _cluster is not None and _cluster.count > 1:
        _cluster.fail(text, code)
    print(f"sage-jax: {text}", file=sys.stderr)
    return code


def finish() -> None:
    """Ends a run that went well, when every process has come to its end."""
    global _cluster
    if _cluster is not None:
        _cluster.finish()
        _cluster = None
