"""Lists every setting with its default: `python -m sage_jax.config`."""

import os
import sys

from sage_jax.config import describe

try:
    print(describe(), flush=True)
except BrokenPipeError:  # the reader, such as head, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
