"""The machine: which device trains, whether the model fits, and what is recorded about both."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import spectral_window
from spectral_window.errors import ResourceError, UserError
from spectral_window.training.recipes import Recipe


def pick_device(recipe: Recipe) -> str:
    """ "cpu" or "cuda". Raises UserError for a GPU that is not there."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda (recipe): this machine has no usable GPU; use device=cpu")
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return recipe.device


def check_memory(parameters: int, device: str) -> None:
    """ResourceError before anything large is allocated: weights, gradients and Adam's two moments
    take 16 bytes a parameter."""
    needed = 16 * parameters
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"{parameters:,} parameters need at least {needed / 1e9:,.1f} GB to train and "
            f"{free / 1e9:,.1f} GB are free ({device}): use a smaller model"
        )


def peak_memory(device: str) -> int:
    """Bytes: the largest resident memory of this process so far; on a GPU what tensors held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    with contextlib.suppress(OSError, StopIteration):
        # exact on Linux: getrusage's figure may be inherited from the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_memory() -> str:
    """Let this process reuse the memory of freed tensors; returns what was set, in words.

    glibc maps every block beyond 32 MiB anew and gives it back when freed, so each large tensor
    pays for fresh zeroed pages: measured, 90 ms for a clone of 200 MB that takes 12 ms in memory
    at hand. Raised thresholds keep such blocks in the heap. The sliver that aligning a tensor cuts
    off must go back to its neighbour at once, or the hole no longer fits a tensor of the same
    size: no fast bins, and the caches of small blocks are filled beforehand. Elsewhere than on
    glibc nothing changes. The price: what the process once used it keeps until it ends.
    """
    if not platform.libc_ver()[0].startswith("glibc"):
        return "as the system has it"
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    fast_bins, trim_threshold, mmap_threshold = 1, -1, -3  # malloc.h's names: M_MXFAST, ...
    for option, value in ((mmap_threshold, 2**31 - 1), (trim_threshold, -1), (fast_bins, 0)):
        libc.mallopt(option, value)
    for size in range(16, 144, 16):
        for block in [libc.malloc(size) for _ in range(16)]:
            libc.free(block)
    return "glibc keeps freed memory (blocks to 2 GiB in the heap, no trimming, no fast bins)"


@contextlib.contextmanager
def matmul_precision(recipe: Recipe) -> Iterator[None]:
    """The recipe's precision of float32 matrix products, put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(recipe.matmul_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def environment(device: str, *, processes: int = 1, dtype: str = "float32") -> dict[str, Any]:
    """What numbers were measured on, as torch is set now. Names no user, host or path."""
    return {
        "spectral_window": spectral_window.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "dtype": dtype,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
