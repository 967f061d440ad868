"""Lists every setting with its default: `python -m sage_jax.config`."""

from sage_jax.config import describe

print(describe())
