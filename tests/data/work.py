"""What the workers of test_workers.py do; it imports little, so that they start quickly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from spectral_window.errors import UserError


def square(number):
    """The square, the threads that libraries may use, and the process; or a way to fail."""
    if number == 3:
        raise UserError("a bad line (a.txt, line 7): repair it")
    if number == 5:
        raise KeyError("surprise")
    if number == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise MemoryError
    if number == 8:
        print("a library talks")
    return number * number, os.environ["OMP_NUM_THREADS"], os.getpid()


def wait_for_ever(folder):
    """Say that a worker is busy, and stay so."""
    Path(folder, str(os.getpid())).touch()
    signal.pause()
