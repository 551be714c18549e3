"""The processes of a shared row as threads of one: everything real but the exchange's transport.

The tensors of the other threads are received as they are, with their graph, so that one backward
pass goes through all spans.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from spectral_window.ops.context_parallel import ContextParallel


class _Table:
    """Where the threads lay what they send, in rounds."""

    def __init__(self, size: int):
        self.sent: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)


class InThread(ContextParallel):
    """One of `size` threads that share rows."""

    def __init__(self, rank: int, size: int, table: _Table):
        self.rank, self.size, self.sent = rank, size, 0
        self._table = table

    def gather(self, anchor, tensors):
        self._table.sent[self.rank] = list(tensors)
        self._table.barrier.wait()
        earlier = [[x.clone() for x in sent] for sent in self._table.sent[: self.rank]]
        self._table.barrier.wait()
        return anchor, earlier


def in_threads(size: int, work: Callable[[ContextParallel], Any]) -> list[Any]:
    """Return what `work(context)` returns for each of `size` spans, in threads of their own."""
    table, results = _Table(size), [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(InThread(rank, size, table))
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return results
