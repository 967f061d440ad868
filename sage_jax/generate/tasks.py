"""The built-in tasks, and how a user's own is found."""

from __future__ import annotations

import importlib

from sage_jax.generate import arithmetic, base_conversion, equations, one_digit
from sage_jax.generate.problem import Problem, Task, problems, split_of, supervised

__all__ = ["TASKS", "Problem", "Task", "problems", "resolve", "split_of", "supervised"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (arithmetic.TASK, equations.TASK, base_conversion.TASK, one_digit.TASK)
}


def resolve(name: str) -> Task:
    """A built-in task by name, or a user's own by "module:attribute".

    >>> resolve("arithmetic").name, resolve("sage_jax.generate.arithmetic:TASK").name
    ('arithmetic', 'arithmetic')

    Raises:
        ValueError: no such task, module or attribute, or the attribute is not a `Task`.
    """
    if name in TASKS:
        return TASKS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"task={name!r} is not a built-in task ({', '.join(TASKS)}); for your own write "
            '"module:attribute".'
        )
    try:
        task = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(
            f"task={name!r} cannot be loaded ({e}); the module must be importable from here and "
            "the attribute a sage_jax.generate.tasks.Task."
        ) from e
    if not isinstance(task, Task):
        raise ValueError(
            f"task={name!r} is a {type(task).__name__}; it must be a sage_jax.generate.tasks.Task."
        )
    return task
