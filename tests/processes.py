"""Child processes of tests: how many threads they compute with, how to start one and wait for it.

No test has a clock of its own. What waits for a child waits as long as the child lives; one that
hangs is ended by the suite's only timeout, pytest's. Whatever a test started is dead, waited for
and its pipes closed when the test ends (`end_all`, in conftest.py), so that it fails no other test.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

# Of every test and its children: bits depend on the number of threads, and runs are compared.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0])
_started: list[subprocess.Popen] = []


def python(*words: object, within: Sequence[str] = (), **options: Any) -> subprocess.Popen:
    """A fresh Python with the arguments `words`, started as subprocess.Popen would. within: a
    command that starts it, as `ip netns exec NAME`."""
    child = subprocess.Popen([*within, sys.executable, *map(str, words)], **options)
    _started.append(child)
    return child


def kill_tree(child: subprocess.Popen) -> None:
    """Kill a child with all that it has started, torchrun with its workers."""
    if child.poll() is None:
        root = psutil.Process(child.pid)
        root.suspend()  # it starts no others meanwhile
        for each in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def end_all() -> None:
    """Kill and wait for every child that `python` started, and for what it has started."""
    while _started:
        child = _started.pop()
        kill_tree(child)
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
        child.wait()


def wait_until(ready: Callable[[], bool], child: subprocess.Popen) -> None:
    """Return when `ready()`; fail when the child has ended before."""
    while not ready():
        assert child.poll() is None, f"it ended with {child.returncode}"
        time.sleep(0.02)


def wait_for_file(path: Path) -> None:
    """Return when the file `path` is there: of use in a child, which its test waits for."""
    while not path.exists():
        time.sleep(0.02)
