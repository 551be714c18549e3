"""Diagnostic tasks: synthetic sequences that measure a single ability.

A task draws sequences and the labels to predict. It also has the best possible solver, because a
score has no meaning without its ceiling: no model can solve more than 86 % of the paper's
associative recall.

    published-*   the paper's tasks (section 2 of its experiments), including their flaws
    recall, needle, induction, sorting, mqar
                  the same questions, posed so that each has one answer (ceiling 1)
    gap, value-first, two-token-keys, overwriting, two-hops, parity, permutations
                  recall beyond "what followed this token", and state tracking (ceiling 1)

To add one, subclass `Task` and decorate it with `@register("name")`; the contract suite
(tests/data/test_tasks.py) then checks its labels, its solver and ceiling, and its seeds.

Example:
    >>> task = make("recall", pairs=4)
    >>> batch = task.batch(generator(seed=0, split="train"), rows=64, length=32)
    >>> batch.inputs.shape, int((batch.labels != IGNORED).sum())
    ((64, 32), 256)
"""

from spectral_window.data.tasks import published, recall, well_posed
from spectral_window.data.tasks.task import (
    IGNORED,
    TASKS,
    Batch,
    Task,
    ceiling,
    generator,
    make,
    register,
)

__all__ = [
    "IGNORED",
    "TASKS",
    "Batch",
    "Task",
    "ceiling",
    "generator",
    "make",
    "published",
    "recall",
    "register",
    "well_posed",
]
