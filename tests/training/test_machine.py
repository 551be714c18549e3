"""What the commands set for their process does what it says."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from spectral_window.training import machine
from spectral_window.training.recipes import MATMUL_PRECISIONS

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
    done = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(
    not platform.libc_ver()[0].startswith("glibc"), reason="only glibc is told to keep memory"
)
def test_kept_memory_is_not_mapped_anew() -> None:
    # 16,384 pages without, or 32 where the system gives huge ones; next to none with
    assert 4 * faults("keep") < faults("no")


# ------------------------------------------------------------- the precision of float32 products


def bfloat16(x, w):
    """What AMX makes of a float32 product at "medium"."""
    return x.bfloat16().float() @ w.bfloat16().float()


def two_bfloat16s(x, w):
    """What "high" may be: each float32 as a sum of two bfloat16."""
    (a, b), (c, d) = ((high := z.bfloat16().float(), (z - high).bfloat16().float()) for z in (x, w))
    return a @ c + a @ d + b @ c


def tf32(x, w):
    """What a GPU makes of a float32 product at "high" and "medium": ten bits of mantissa."""
    x, w = ((z.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for z in (x, w))
    return x @ w


def float64(x, w):
    return (x.double() @ w.double()).float()


@pytest.mark.parametrize(
    ("processor", "medium", "high", "highest", "taken"),
    [
        ("with float32 units alone", float64, float64, float64, "medium"),
        ("with AMX", bfloat16, float64, float64, "high"),
        ("with AMX, a later one", bfloat16, tf32, float64, "highest"),
        ("that splits", bfloat16, two_bfloat16s, float64, "highest"),
        ("a GPU", tf32, tf32, float64, "highest"),
        ("that has no float32 at all", bfloat16, two_bfloat16s, tf32, "highest"),
    ],
)
def test_auto_is_the_fastest_setting_whose_products_are_float32(
    processor, medium, high, highest, taken
):
    products = {"medium": medium, "high": high, "highest": highest}

    def error(setting):
        return machine.product_error("cpu", products[setting])

    assert machine.fastest(error) == taken, processor


@pytest.mark.parametrize("asked", MATMUL_PRECISIONS)
def test_what_is_in_force_is_recorded_beside_what_was_asked(asked):
    with machine.matmul_precision(asked, "cpu") as found:
        about = machine.environment("cpu", asked=asked)
        in_force, error = torch.get_float32_matmul_precision(), machine.product_error("cpu")
    assert about["matmul_precision"] == found.in_force == in_force
    assert about["matmul_precision_asked"] == found.asked == asked
    assert about["matmul_error"] == pytest.approx(error, rel=0.5)  # threads may sum otherwise
    assert f"matmul_precision {in_force}" in str(found)
    assert ("less exact than float32" in str(found)) == (found.error >= machine.FLOAT32)
    if asked == "auto":
        assert error < machine.FLOAT32
    else:
        assert in_force == asked


def switches():
    libraries = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    return machine.in_force(), *(library.fp32_precision for library in libraries)


@pytest.mark.parametrize("before", ["nothing", "medium", "mixed"])
def test_torchs_switches_are_put_back_as_they_were_and_no_random_number_is_drawn(before):
    """torch has a newer switch for each library; where they differ the old one cannot be read."""
    was, generator = switches(), torch.get_rng_state()
    try:
        if before == "medium":
            torch.set_float32_matmul_precision("medium")
        elif before == "mixed":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        found = switches()
        with machine.matmul_precision("highest", "cpu"):
            assert machine.in_force() == "highest"
            assert machine.product_error("cpu") < machine.FLOAT32
        assert switches() == found
        assert machine.environment("cpu", asked="auto")["matmul_precision"] == found[0]
        assert torch.equal(torch.get_rng_state(), generator)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = was[1]
        torch.backends.cuda.matmul.fp32_precision = was[2]


def test_the_error_is_of_float32_whatever_the_defaults_and_autocast():
    plain = machine.product_error("cpu")
    torch.set_default_dtype(torch.float16)  # the suite's fixture puts it back
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert machine.product_error("cpu") == plain


@pytest.mark.parametrize(
    ("processor", "folder"),
    [
        ("AMD EPYC (znver5)", "amd-epyc-znver5"),
        (
            "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (sapphirerapids)",
            "intel-xeon-platinum-8481c-sapphirerapids",
        ),
        ("aarch64 (neoverse-n1)", "aarch64-neoverse-n1"),
        ("AMD Ryzen 9 7950X 16-Core Processor (znver4)", "amd-ryzen-9-7950x-16-core-znver4"),
        ("../../", "unknown"),
    ],
)
def test_a_processor_names_a_folder(processor, folder):
    assert machine.folder_name(processor) == folder


def test_a_dtype_that_the_processor_emulates_is_named_and_still_used():
    """bfloat16 on a CPU without units for it took 16 times as long as float32, without a word."""
    emulated = not machine.has_bfloat16_units()
    assert (machine.slow_dtype("bfloat16", "cpu") is not None) == emulated
    assert machine.slow_dtype("float32", "cpu") is None
    assert machine.slow_dtype("bfloat16", "cuda") is None
