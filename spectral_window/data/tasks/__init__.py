"""Diagnostic tasks: small worlds made from a seed, in which one ability can be measured alone.

A task draws sequences and says what must be predicted where. Each knows the best that any solver
can do on it, because a score means nothing without its ceiling: the paper's associative recall
cannot be solved better than 86 %, and a model at 86 % has solved it.

    published-*   the paper's own tasks (section 2 of the experiments), flaws included
    recall, needle, induction, sorting, mqar
                  the same questions so asked that an answer exists (ceiling 1)
    gap, value-first, two-token-keys, overwriting, two-hops, parity
                  recall that is more than "what followed this token", and a state (ceiling 1)

    task = make("recall", pairs=4)
    batch = task.batch(generator(seed=0, split="train"), rows=64, length=32)

To add one: subclass `Task`, decorate it with `@register("name")`; the contract suite
(tests/data/test_tasks.py) then checks its labels, its solver against its ceiling, and its seeds.
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
