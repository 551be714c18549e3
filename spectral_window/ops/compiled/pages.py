"""Fresh memory for large outputs, in huge pages.

The C library takes memory for every large tensor from the system anew and gives it back afterwards.
The system hands it out page by page, cleared, at the first touch of each: in pages of 4 KiB that
takes nine times as long as a copy of the tensor. In pages of 2 MiB it takes once or twice as long,
and Linux, as it is usually set, gives those to who asks. (PyTorch asks for all tensors of a program
where THP_MEM_ALLOC_ENABLE=1 stands in its environment.)
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_LARGE = 32 << 20  # bytes; smaller tensors get memory that the C library keeps and gives again


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on a CPU; a large tensor lies in huge pages where the system has them."""
    x = torch.empty(shape, dtype=dtype, device="cpu")
    if x.nbytes >= _LARGE and (advise := _madvise()) is not None:
        begin = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return x


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
