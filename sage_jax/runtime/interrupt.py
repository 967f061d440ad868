"""Being told to stop: a run finishes the step it is in, saves, and ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from sage_jax.runtime import hosts


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM and the first Ctrl-C, so that the loop can save before it ends.

    Of several processes any one may be told. All of them then stop at the same call of what this
    yields, as long as each calls it after every step: JAX's preemption service finds one that is
    still ahead of all.
    """
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)  # which is what the service listens to

    told = (signal.SIGINT,) if hosts.several() else (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, note) for s in told}
    try:
        yield _together() if hosts.several() else lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _together() -> Callable[[], bool]:
    from jax.experimental import multihost_utils

    calls, agreed = itertools.count(), [False]

    def stopped() -> bool:
        if not agreed[0]:
            agreed[0] = multihost_utils.reached_preemption_sync_point(next(calls))
        return agreed[0]

    return stopped
