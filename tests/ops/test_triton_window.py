"""The window's GPU kernels, proven without a GPU: their numbers in Triton's interpreter (in a
process of its own), and what the compiler makes of them for real cards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from spectral_window.errors import UserError
from spectral_window.lab.bench.gpu_window import roofline
from spectral_window.ops import resolve, window_attention

triton = pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parent.parent.parent


def in_interpreter(*command: str) -> str:
    """Output of a Python command that may import kernels for the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_kernels_keep_the_contract_in_the_interpreter():
    shown = in_interpreter(
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/ops/interpreted_window.py",
    )
    assert re.search(r"\d+ passed", shown)
    assert "skipped" not in shown


def test_a_cpu_takes_no_gpu_method(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(UserError, match="'triton'"):
        window_attention(q, q, q, window=2, method="triton")
    assert resolve("window", "auto", q)[0] != "triton"


def test_a_gpu_takes_the_kernels_and_says_why():
    class OnGPU:
        shape, dtype, device = (1, 5, 1, 4), torch.bfloat16, torch.device("cuda")
        is_cuda = True

        def dim(self):
            return 4

    assert resolve("window", "auto", OnGPU())[0] == "triton"
    OnGPU.dtype = torch.float64
    assert resolve("window", "auto", OnGPU())[0] == "chunked"


def test_the_dry_run_walks_every_part_of_the_bench():
    run = (
        "import sys; from spectral_window.lab.bench import gpu_window;"
        "sys.argv[1:] = ['--device', 'cpu', '--quick']; gpu_window.main()"
    )
    rows = [json.loads(line) for line in in_interpreter("-c", run).splitlines()]
    excused = ("left out", "failed: NotImplementedError: FlexAttention does not support backward")
    wrong = [r for r in rows if r["status"] != "ok" and not r["status"].startswith(excused)]
    assert not wrong
    parts = {row.get("part", "bench") for row in rows}
    assert parts >= {"float64", "long", "documents and state", "repeats", "bench", "tune"}


def test_the_roofline_says_what_limits_each_kernel():
    rows = {(row["kernel"], row["window"]): row for row in roofline()}
    assert rows["attend", 128]["memory"] == pytest.approx(
        0.154, rel=0.01
    )  # (4 * 64 * 2 + 4) / 3.35
    assert rows["attend", 256]["products"] > rows["attend", 32]["products"]


# ---------------------------------------------------------------- what the compiler makes of it

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)
PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
KERNELS = ("attend", "attend_queries", "attend_keys")
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def build(name, target, dtype=torch.bfloat16, window=128, size=64, documents=False, rope=True):
    """(compiled kernel, its tiles), as a call with these inputs would have it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spectral_window.ops import triton_window_kernels
    from spectral_window.ops.triton_window_stream import tiles

    kernel = getattr(triton_window_kernels, name)
    cut = tiles(name, window, size, size, dtype, target in ("sm_90", "sm_100"))
    constants = {"K": size, "KP": size, "V": size, "VP": size, "M": cut.own, "N": cut.met}
    constants |= {"ROPE": rope, "DOCS": documents, "GUARD": documents, "PRECISION": "ieee"}
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        stride = re.fullmatch(r"[qkvg]_[bth]", argument)
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in ("q", "k", "v", "out", "grad", "dq", "dk", "dv"):
            signature[argument] = f"*{SHORT[dtype]}"
        elif argument in ("low", "order"):
            signature[argument] = "*i32" if documents else "*fp32"
        elif argument in ("lse", "delta", "turns"):
            signature[argument] = "*fp32"
        else:
            signature[argument] = "fp32" if argument in ("scale", "unit") else "i32"
        if signature[argument][0] == "*" or stride:
            aligned[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options), cut


def check_compiled(name, target, **about):
    compiled, cut = build(name, target, **about)
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        assert re.search(r"\.private_segment_fixed_size: 0\b", text), "spills"
        assert re.search(r"\.vgpr_spill_count: +0\b", text), "spills"
        assert "v_mfma" in text
        assert "load_dwordx4" in text
        return
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(program), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    assert found["STACK"] == found["LOCAL"] == 0, f"spills: {found}"
    per_processor = 65_536 // (found["REG"] * 32 * cut.warps)
    assert per_processor * cut.warps >= 8, f"two warps for each scheduler: {found}"
    text = compiled.asm["ptx"]
    if about.get("dtype") != torch.float32:
        groups = PRODUCTS[target] if cut.own >= 64 else "mma.sync"
        assert groups in text, "products by tensor cores"
    assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg\.shared\.global", text), "128-bit loads"
    assert ".f64" not in text


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills_to_tensor_cores(name, target):
    check_compiled(name, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(("window", "size"), [(16, 64), (128, 32), (128, 64), (128, 128)])
def test_kernels_of_every_kind_compile_without_spills(name, target, documents, dtype, window, size):
    check_compiled(name, target, dtype=dtype, window=window, size=size, documents=documents)
