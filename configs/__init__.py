"""Runnable experiments, one a file: each starts from `config.default()` and changes little."""
