"""Launches of Triton kernels: on the device of their tensors, from one thread at a time.

Triton (up to 3.7) makes a compiled kernel visible to other threads before its code is loaded on the
device, so a second thread that launches it meanwhile fails (its pull request 11518); and its
interpreter changes the language for all threads. The lock is held while kernels are compiled and
launched, never while they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock

import torch
from torch import Tensor

_LAUNCHES = RLock()


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """Return a context for launches: x's device is the current one, other threads wait."""
    with _LAUNCHES, torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        yield
