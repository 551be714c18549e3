"""The machine: device, precision of float32 products, memory, and the record of all three."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import transformers
from torch import Tensor

import spectral_window
from spectral_window.errors import UserError
from spectral_window.training.recipes import MATMUL_SETTINGS as SETTINGS


def choose_device(name: str, kinds: Sequence[str] = ("cpu", "cuda", "mps")) -> torch.device:
    """Choose a device of this machine.

    Args:
        name: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        kinds: the kinds of devices that will do.

    Raises:
        UserError: the machine has no such device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if "cuda" in kinds else []
    if "mps" in kinds and torch.backends.mps.is_available():
        gpus.append("mps")
    if name == "auto":
        return torch.device(gpus[0] if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    here = ["cpu", *gpus]
    if device is None or not any(str(device) in (one, one.partition(":")[0]) for one in here):
        raise UserError(
            f"no device '{name}' (device): this machine has {', '.join(here)}; or use auto"
        )
    return device


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
    """Let this process reuse the memory of freed tensors; returns what was set, as a text.

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


# ------------------------------------------------------------- the precision of float32 products

FLOAT32 = 1e-6  # the error of a float32 product stays below; TF32's is 3e-4, bfloat16's 2e-3
_SHAPES = ((256, 768, 768), (1, 768, 768), (8, 64, 64, 64))  # ([batch,] rows, in, out)

Product = Callable[[Tensor, Tensor], Tensor]


class Precision(NamedTuple):
    """How float32 products are computed: the setting that was asked for, torch's setting in force,
    and the relative error of a product under it."""

    asked: str
    in_force: str
    error: float

    def __str__(self) -> str:
        asked = "" if self.asked == self.in_force else f" ({self.asked})"
        exact = "" if self.error < FLOAT32 else ": less exact than float32"
        return f"matmul_precision {self.in_force}{asked}, relative error {self.error:.1e}{exact}"


def precision(asked: str, device: str) -> Precision:
    """What `asked` ("auto", or one of torch's settings) means on `device`: measured once a
    process."""
    error = functools.partial(_error_under, device=device)
    setting = fastest(error) if asked == "auto" else asked
    return Precision(asked, setting, error(setting))


def fastest(error: Callable[[str], float]) -> str:
    """The first of `SETTINGS` whose products are float32's: error(setting) < `FLOAT32`.

    The names alone do not tell. On a CPU "medium" lets torch hand products to oneDNN, which
    computes in bfloat16 where the processor has units for it (AMX), and else in float32: as fast as
    "highest", or twice as fast (AMD Zen 5). So the order is fixed, and no clock decides what a run
    computes. On a GPU "medium" and "high" mean TF32, which is not float32. Where no setting stays
    below, it is the most exact one.
    """
    return next((setting for setting in SETTINGS if error(setting) < FLOAT32), SETTINGS[-1])


def product_error(device: str, product: Product = torch.matmul) -> float:
    """The error of float32 products relative to float64, as torch is set now: the largest over a
    few shapes that models have. Leaves the random generators alone."""
    generator, worst = torch.Generator("cpu").manual_seed(0), 0.0
    kind: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        for *batch, rows, size, out in _SHAPES:
            x = torch.randn(*batch, rows, size, generator=generator, **kind)
            w = torch.randn(*batch, out, size, generator=generator, **kind).mT
            truth = x.double() @ w.double()
            off = product(x.to(device), w.to(device)).double().cpu() - truth
            worst = max(worst, float(off.norm() / truth.norm()))
    return worst


def slow_dtype(dtype: str, device: str) -> str | None:
    """A line to show if the processor emulates `dtype`, else None. The run computes in it anyway:
    its numbers do not depend on the machine."""
    if dtype != "bfloat16" or torch.device(device).type != "cpu" or has_bfloat16_units():
        return None
    return "dtype=bfloat16 is emulated on this processor, several times slower than dtype=float32"


def has_bfloat16_units() -> bool:
    """Does the processor multiply bfloat16 (AVX-512, AMX, Arm's BF16)? As oneDNN says, by which
    torch multiplies it; without oneDNN the answer is no."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def _error_under(setting: str, device: str) -> float:
    with _set(setting):
        return product_error(device)


@contextlib.contextmanager
def matmul_precision(asked: str, device: str) -> Iterator[Precision]:
    """Compute float32 products in the precision `asked` (see `precision`); put back afterwards what
    was set before."""
    measured = precision(asked, device)
    with _set(measured.in_force):
        yield measured


@contextlib.contextmanager
def _set(setting: str) -> Iterator[None]:
    # torch keeps the setting twice: under this name, and for each library. A program may have set
    # the latter alone; then the name cannot be read, but both can be set.
    backends: Any = torch.backends
    libraries = (backends.mkldnn.matmul, backends.cuda.matmul)
    values = [library.fp32_precision for library in libraries]
    before = in_force()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before if before in SETTINGS else "highest")
        for library, value in zip(libraries, values, strict=True):
            library.fp32_precision = value


def in_force() -> str:
    """How float32 products are computed now: one of `SETTINGS`, or in words where a program set
    its libraries apart."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        backends: Any = torch.backends
        cpu, gpu = (x.matmul.fp32_precision for x in (backends.mkldnn, backends.cuda))
        return f"{cpu} (CPU), {gpu} (GPU)"


# ------------------------------------------------------------------------------ what is recorded


def environment(
    device: str, *, asked: str, processes: int = 1, dtype: str = "float32"
) -> dict[str, Any]:
    """What numbers were measured on, as torch is set now. Names no user, host or path.

    asked: the precision of float32 products that was asked for; what is in force stands beside it,
    with the relative error of a product.
    """
    setting = in_force()
    error = _error_under(setting, device) if setting in SETTINGS else product_error(device)
    return {
        "spectral_window": spectral_window.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "dtype": dtype,
        "matmul_precision": setting,
        "matmul_precision_asked": asked,
        "matmul_error": float(f"{error:.3g}"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """The processor's name, and its kind as compilers call it: virtual machines hide the model."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    with contextlib.suppress(ImportError):
        from llvmlite.binding import get_host_cpu_name

        return f"{name} ({get_host_cpu_name()})"
    return name


def folder_name(processor: str) -> str:
    """A processor as the name of a folder: 'AMD EPYC (znver5)' -> 'amd-epyc-znver5'."""
    plain = re.sub(r"\((r|tm|c)\)|@.*?hz\b|\b(cpu|processor)\b", " ", processor.lower())
    return "-".join(re.findall(r"[a-z0-9]+", plain)) or "unknown"
