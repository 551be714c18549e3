"""What the commands set for their process does what it says."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import torch
from spectral_window.training.machine import keep_memory

if sys.argv[1] == "keep":
    keep_memory()
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 18).fill_(1.0)  # 64 MB: taken, touched, given back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(4)][-1])
"""


def faults(choice: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(
    not platform.libc_ver()[0].startswith("glibc"), reason="only glibc is told to keep memory"
)
def test_kept_memory_is_not_mapped_anew() -> None:
    # 16,384 pages without, or 32 where the system gives huge ones; next to none with
    assert 4 * faults("keep") < faults("no")
