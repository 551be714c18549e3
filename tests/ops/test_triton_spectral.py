"""The convolution's Triton kernels, proven without a GPU: numbers in the interpreter, machine code
by the compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectral_window.errors import UserError
from spectral_window.ops import Modes, spectral_conv
from spectral_window.ops.methods import HAS_TRITON, resolve

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@needs_triton
def test_kernels_keep_the_contract_in_the_interpreter():
    # triton reads the variable when it is first imported: a process of its own
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-n0"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_spectral.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout[-500:]


def on(device: str, dtype=torch.float32):
    """What `resolve` asks of a tensor that no CPU can make."""
    return SimpleNamespace(
        device=torch.device(device),
        dtype=dtype,
        shape=(2, 8, 3),
        dim=lambda: 3,
        element_size=lambda: dtype.itemsize,
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_gpu_gets_the_kernels_and_a_reason(dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    method, reason, *_ = resolve("spectral", "auto", on("cuda", dtype))
    assert method == "triton"
    assert "GPU" in reason


def test_a_gpu_without_triton_gets_plain_torch(monkeypatch):
    monkeypatch.setattr("spectral_window.ops.methods.HAS_TRITON", False)
    assert resolve("spectral", "auto", on("cuda"))[0] == "chunked"


def test_kernels_asked_for_on_a_cpu_are_refused_by_what_they_need(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    u, modes = torch.randn(1, 4, 2), Modes(torch.rand(2), torch.rand(2))
    with pytest.raises(UserError, match="triton and a GPU"):
        spectral_conv(u, modes, method="triton")


# --- what the compiler makes of them ------------------------------------------------------------

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
STREAMS = {"x", "u", "y", "g", "du"}
KERNELS = ["ends", "ends_back", "outputs", "gradients"]
# registers a lane: at least 12 programs of a warp fit a multiprocessor
MOST = {"ends": 168, "ends_back": 128, "outputs": 128, "gradients": 168}


def compiled(name: str, dtype, target: str = "sm_90", *, documents: bool = False, **changed):
    """A streaming kernel compiled as `triton_spectral` would launch it at [8, 4096, 768]."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spectral_window.ops import triton_spectral as ts

    plan = ts.PLANS[dtype]
    cut = ts.layout(8, 4096, 768, 1, dtype)
    kernel = getattr(
        ts.backwards if name == "gradients" else ts.forwards, name.removesuffix("_back")
    )
    state = ts.tl.float64 if name == "ends" else plan.dtype
    rows = plan.rows_back if name == "gradients" else plan.rows
    constants = ts.constants(plan, cut, 768, state, rows)
    constants |= {"GAIN": False, "DOCUMENTS": documents, "gain": None} | changed
    if name.startswith("ends"):
        constants |= {"REVERSE": name == "ends_back", "BITS": cut.chunk.bit_length()}
        if not documents:
            constants["steps"] = None
    if not documents:
        constants["positions"] = None
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in ("time", "chunks", "channels"):
            signature[argument] = "i32"
        elif argument in STREAMS:
            signature[argument] = POINTERS[dtype]
        else:
            signature[argument] = "*i64" if argument == "positions" else "*fp64"
        if argument not in ("time", "chunks"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": 1})


def resources(kernel, folder: Path) -> dict[str, int]:
    """What the machine code takes: REG, STACK, LOCAL."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run(
        [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def loops(ptx: str) -> list[str]:
    """The bodies of the loops: blocks that branch back to their own label."""
    parts = re.split(r"^(\$L__BB\d+_\d+):", ptx, flags=re.M)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [body for label, body in pairs if re.search(rf"bra\S*\s+{re.escape(label)}\b", body)]


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


WIDE_LOAD = r"ld\.global\S*\.v4\.b32"
WIDE_STORE = r"st\.global\S*\.v4\.b32"
F64 = r"\b(?:fma|mul|add|sub)\.rn\.f64|\b(?:mul|add|sub)\.f64"


def check_kernel(name, dtype, target, folder, documents=False):
    kernel = compiled(name, dtype, target, documents=documents)
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        assert int(re.search(r"\.private_segment_fixed_size: (\d+)", code)[1]) == 0
        assert count("scratch_", code) == 0
        return
    used = resources(kernel, folder)
    assert used["STACK"] == used["LOCAL"] == 0, f"{name} {dtype} {target}: {used}"
    assert used["REG"] <= MOST[name], f"{name} {dtype} {target}: {used}"
    ptx = kernel.asm["ptx"]
    bodies = loops(ptx)
    assert bodies
    if name != "ends":
        assert not any(count("f64", body) for body in bodies), "float64 in a loop"
    assert count(r"cp\.async\.cg\S* .*, (?:16|0x10)", ptx) > 0, "rows are not asked for ahead"
    assert count(r"cp\.async\.c[ag]\S* .*, (?:4|8|0x4|0x8),", ptx) == 0, "narrow copies"
    if name in ("outputs", "gradients"):
        assert count(WIDE_STORE, ptx) > 0
        assert dtype != torch.bfloat16 or "cvt.rn.bf16" in ptx, "bfloat16 is not rounded to nearest"


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_for_hopper_without_a_spill(name, dtype, tmp_path):
    check_kernel(name, dtype, "sm_90", tmp_path)


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_kernel_compiles_for_other_gpus_without_a_spill(target, tmp_path):
    check_kernel("outputs", torch.bfloat16, target, tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_every_gpu_without_a_spill(
    name, dtype, target, documents, tmp_path
):
    check_kernel(name, dtype, target, tmp_path, documents)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_roofline_counts_what_the_compiled_kernel_loads_and_stores(name, dtype):
    from spectral_window.lab.bench.gpu_spectral import roofline
    from spectral_window.ops.triton_spectral import PLANS

    # without copies ahead every load of a row is one instruction of 16 bytes a lane
    kernel = compiled(name, dtype, STAGES=1)
    row = next(r for r in roofline(dtype) if r["kernel"] == name)
    plan = PLANS[dtype]
    rows = (plan.rows_back if name == "gradients" else plan.rows) + 1  # and one row at a time
    lane = 16  # bytes
    ptx = kernel.asm["ptx"]
    per_lane = plan.lanes * dtype.itemsize
    assert per_lane == lane
    assert count(WIDE_LOAD, ptx) == row["reads"] * rows
    assert count(WIDE_STORE, ptx) == row["writes"] * rows
    if name == "ends":
        done = count(F64, "".join(loops(ptx)))
        assert done == row["float64_operations"] * plan.lanes * rows
    else:
        done = count(r"\b(?:fma|mul|add|sub)\.rn\.f32|\b(?:mul|add|sub)\.f32", "".join(loops(ptx)))
        assert done == pytest.approx(row["float32_operations"] * plan.lanes * rows, rel=0.05)
