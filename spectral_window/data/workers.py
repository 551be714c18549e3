"""A function over many tasks in processes of their own: the same results, in the same order.

A worker is a fresh Python that imports the function by its name, so a script that starts workers
needs no `if __name__ == "__main__"`, and nothing of this process (threads, locks, GPU contexts) is
copied. It reads pickled tasks from its standard input and ends with it; so workers of a process
that was killed end with the task they are at.

Libraries inside a worker compute with one thread: there is a worker for each core.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from spectral_window.errors import ResourceError, SpectralWindowError, UserError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_DEFAULT_CPU_COUNT"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}
_START = (
    "import sys; sys.path[:] = sys.argv[1:]; from spectral_window.data.workers import _serve; "
    "_serve()"
)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """At most `count` processes, which are started when they are first needed.

    Leaving the `with` block ends them at once, also on Ctrl-C.

    Args:
        count: the number of processes; None for one a core. With 1 the work is done here.

    Raises:
        UserError: fewer than 1.
    """

    def __init__(self, count: int | None = None):
        if count is not None and (isinstance(count, bool) or count < 1):
            raise UserError(f"workers is {count}: give at least 1, or none for one a core")
        self.count = count or cores()
        self._running: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def map(
        self, function: Callable[[_Task], _Result], tasks: Iterable[_Task]
    ) -> Generator[_Result]:
        """Yield `function(task)` for every task, in order.

        Args:
            function: a function of a module, or a partial of one, of what can be pickled.
            tasks: their `str` names them in errors.

        Raises:
            SpectralWindowError: what the function raised, for the first task that failed. Any
                other error is named with its task, under this class.
            ResourceError: a worker was killed, or ran out of memory.
        """
        tasks = list(tasks)
        if min(self.count, len(tasks)) < 2:
            yield from map(function, tasks)
            return
        while len(self._running) < min(self.count, len(tasks)):
            self._running.append(_Worker())
        results: list[Future[_Result]] = [Future() for _ in tasks]
        waiting, lock, stopped = iter(range(len(tasks))), threading.Lock(), threading.Event()

        def work(worker: _Worker) -> None:
            try:
                worker.send("function", function)
                while True:
                    with lock:  # in order: all tasks before one that was taken were taken too
                        index = None if stopped.is_set() else next(waiting, None)
                    if index is None:
                        return
                    try:
                        results[index].set_result(worker.ask(tasks[index]))
                    except BaseException as error:
                        stopped.set()
                        results[index].set_exception(error)
            except BaseException as error:  # it could not even be told what to do
                stopped.set()
                for future in results:
                    with contextlib.suppress(Exception):  # it has a result
                        future.set_exception(error)

        threads = [
            threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._running
        ]
        for thread in threads:
            thread.start()
        done = False
        try:
            for index, future in enumerate(results):
                result = future.result()
                results[index] = Future()  # what was yielded is kept no longer
                done = index == len(results) - 1  # who takes the last one may not ask for more
                yield result
        finally:
            stopped.set()
            if not done:
                self._end()
            for thread in threads:
                thread.join()

    def _end(self) -> None:
        while self._running:
            self._running.pop().kill()


class _Worker:
    """A process that computes one task at a time."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed with the process)
        # Ctrl-C in a terminal signals the foreground group; the workers are ended by this process.
        group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | _ONE_THREAD,
            **group,
        )

    def send(self, what: str, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            pickle.dump((what, value), self.process.stdin)
            self.process.stdin.flush()
        except OSError:  # it has ended: the answer that does not come says how
            pass

    def ask(self, task: Any) -> Any:
        """Return the worker's result for a task; raises what `Workers.map` does."""
        assert self.process.stdout is not None
        self.send("task", task)
        try:
            good, value = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._ended(task) from None
        if good:
            return value
        raise value if isinstance(value, SpectralWindowError) else _failed(task, *value)

    def _ended(self, task: Any) -> ResourceError:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            how = f"by signal {-code} ({signal.strsignal(-code)})"
            todo = "if it ran out of memory, use fewer workers"
        else:
            how, todo = f"with exit code {code}", lines[-1][:200] if lines else "it said nothing"
        return ResourceError(f"a worker ended {how} ({task}): {todo}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):  # a task that it will not read
                pipe.close()  # type: ignore[union-attr]


def _failed(task: Any, kind: str, message: str) -> SpectralWindowError:
    if kind == "MemoryError":
        return ResourceError(f"a worker ran out of memory ({task}): use fewer workers")
    return SpectralWindowError(f"{kind} in a worker ({task}): {message}")


def _serve() -> None:
    """Be a worker: read functions, and tasks for the latest, until the standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    function: Callable[[Any], Any] | None = None
    while True:
        try:
            what, value = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if what == "function":
            function = value
            continue
        assert function is not None
        try:
            answer = True, function(value)
        except SpectralWindowError as error:
            answer = False, error
        except Exception as error:
            answer = False, (type(error).__name__, " ".join(str(error).split())[:300])
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:  # nobody waits for it any more
            return
