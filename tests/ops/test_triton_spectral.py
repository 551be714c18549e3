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
from spectral_window.lab.bench.gpu_roofline import convolution
from spectral_window.ops import Modes, spectral_conv
from spectral_window.ops.methods import HAS_TRITON, resolve
from tests.ops.machine_code import (
    F32,
    F64,
    REGISTERS,
    TARGETS,
    build,
    check_no_spill,
    count,
    loops,
    module_of,
    moved,
    moved_outside,
    resources,
)

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

SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
STREAMS = {"x", "u", "y", "g", "du"}
STREAMING = ["ends", "ends_back", "outputs", "gradients"]
KERNELS = [*STREAMING, "dynamics", "carry", "finish"]
# registers a lane: at least 12 programs of a warp fit a multiprocessor
MOST = {"ends": 168, "ends_back": 128, "outputs": 128, "gradients": 168}
WARPS = {"dynamics": 4, "finish": 4}  # of a program; others are one
FEWEST = 8  # warps that fit a multiprocessor: two for each of its schedulers
SHAPE = (8, 4096, 768)
SIZES = ("time", "channels", "chunks", "count", "parts")


def compiled(name: str, dtype, target: str = "sm_90", *, documents: bool = False, **changed):
    """A kernel compiled as `triton_spectral` would launch it at `SHAPE`; modules: where it is
    defined, other than there."""
    from spectral_window.ops import triton_spectral as ts

    modules = changed.pop("modules", (ts.forwards, ts.backwards))
    function = name.removesuffix("_back")
    kernel = next(vars(m)[function] for m in reversed(modules) if function in vars(m))
    plan, cut = ts.PLANS[dtype], ts.layout(*SHAPE, 1, dtype)
    rows = plan.rows_back if name == "gradients" else plan.rows
    state = ts.tl.float64 if name == "ends" else plan.dtype
    given = {"GAIN": False, "gain": None, "DOCUMENTS": documents, "GIVEN": False, "first": None}
    given |= {"REVERSE": name.endswith("_back"), "BITS": cut.chunk.bit_length()}
    given |= ts.constants(plan, cut, SHAPE[2], state, rows)
    if not documents:
        given |= {"positions": None, "steps": None}
    if name == "carry":
        given |= {"BLOCK": ts.LANES, "ROWS": ts.CARRIED}
    if name == "finish":
        given |= dict(zip(("ROWS", "BLOCK"), ts.SUMMED, strict=True))
    if name == "dynamics":
        given |= {"BLOCK": 128}
    constants = {key: value for key, value in (given | changed).items() if key in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "*fp64")
    types |= dict.fromkeys(SIZES, "i32") | {"positions": "*i64"}
    types |= dict.fromkeys(STREAMS, f"*{SHORT[dtype]}")
    parameters = ("decay", "frequency", "d_decay", "d_frequency", "d_gain")
    types |= dict.fromkeys(parameters, "*fp32")
    warps = WARPS.get(name, 1)
    return build(kernel, types, constants, target, ("channels", "count"), num_warps=warps)


def check_kernel(name, dtype, target, documents=False):
    """Without a spill; as many registers as the planned occupancy allows; rows in 128 bits; float64
    in no loop but where states of chunks are computed."""
    kernel = compiled(name, dtype, target, documents=documents)
    streams = name in STREAMING
    about = f"{name} {dtype} {target}"
    if name != "dynamics":  # libdevice's cos and sin reduce large angles by an array on the stack
        check_no_spill(kernel, about)
    if target.startswith("gfx"):
        # 64 lanes there: a row of a program's block has 64 bits a lane, 512 bytes in all
        narrow = r"(?:global|buffer|flat)_(?:load|store)_(?:dword\b|[us]?short|[us]?byte)"
        assert not streams or documents or not count(narrow, kernel.asm["amdgcn"])
        return
    used = resources(kernel)
    if dtype == torch.float64 or not streams:
        warps = WARPS.get(name, 1)
        assert REGISTERS // (used["REG"] * 32 * warps) * warps >= FEWEST, f"{about} {used}"
    else:
        assert used["REG"] <= MOST[name], f"{about} {used}"
    ptx = kernel.asm["ptx"]
    if not streams:
        return
    bodies = loops(ptx)
    assert bodies
    if name != "ends" and dtype != torch.float64:
        assert not any(count("f64", body) for body in bodies), "float64 in a loop"
    assert count(r"cp\.async\.cg\S* .*, (?:16|0x10)", ptx) > 0, "rows are not asked for ahead"
    narrow = "(?:4|0x4)" if documents else "(?:4|8|0x4|0x8)"  # a position has 8 bytes
    assert count(rf"cp\.async\.c[ag]\S* .*, {narrow},", ptx) == 0, "narrow copies"
    for body in bodies:
        assert not set(moved(body).stores) - {16}, "narrow stores in a loop"
    if name in ("outputs", "gradients"):
        assert any(moved(body).stores for body in bodies)
        assert dtype != torch.bfloat16 or "cvt.rn.bf16" in ptx, "bfloat16 is not rounded to nearest"


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for_every_gpu_without_a_spill(name, target):
    check_kernel(name, torch.bfloat16, target)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", STREAMING)
def test_wider_dtypes_compile_for_hopper_without_a_spill(name, dtype):
    check_kernel(name, dtype, "sm_90")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_of_every_dtype_compiles_without_a_spill(name, dtype, target, documents):
    check_kernel(name, dtype, target, documents)


# --- the roofline -------------------------------------------------------------------------------


def compare_stream(name, dtype, **changed):
    """The roofline's bytes and operations of a streaming kernel with those of its PTX.

    Without copies ahead (STAGES=1) every load is an instruction in the loop that uses it. A kernel
    has two loops each time it passes over a chunk: one takes ROWS rows of time a trip, one takes
    single rows. A trip moves per lane the bytes of its instructions, and a row has 16 bytes per
    lane: bytes per trip / rows per trip = bytes per token, for both loops. Outside the loops a
    program moves the chunk's states and z, once.
    """
    from spectral_window.ops.triton_spectral import LANES, PLANS, layout

    plan, cut = PLANS[dtype], layout(*SHAPE, 1, dtype)
    ptx = compiled(name, dtype, STAGES=1, **changed).asm["ptx"]
    row = next(
        work
        for work in convolution(*SHAPE, dtype)
        if work.name == name.removesuffix("_back") and work.backward == (name in BACKWARD)
    )
    tokens = SHAPE[0] * SHAPE[1] * SHAPE[2]
    border = 16 * SHAPE[0] * SHAPE[2] * cut.chunks  # bytes of one state per chunk
    passes = 2 if name == "gradients" else 1
    rows = plan.rows_back if name == "gradients" else plan.rows
    bodies = loops(ptx)
    assert len(bodies) == 2 * passes
    for each, per_trip in ((bodies[0::2], rows), (bodies[1::2], 1)):
        found = moved("".join(each))
        assert set(found.loads) | set(found.stores) == {16}, "128-bit loads and stores"
        per_channel = per_trip * plan.lanes
        streamed = row.read + row.again - border * (1 + STATES[name][0])
        assert found.loads[16] / per_channel == streamed / tokens, "bytes loaded"
        streamed = row.written - border * STATES[name][1]
        assert found.stores[16] / per_channel == streamed / tokens, "bytes stored"
        exact = count(F64, "".join(each)) / per_channel
        single = count(F32, "".join(each)) / per_channel
        assert exact == pytest.approx(row.float64 / tokens, rel=0.05)
        assert single == pytest.approx(row.float32 / tokens, rel=0.05)
    outside, programs = moved_outside(ptx), SHAPE[0] * cut.chunks * cut.blocks
    loaded, stored = (LANES * programs * sum(side.values()) for side in outside)
    assert loaded == (1 + STATES[name][0]) * border  # and z
    assert stored == STATES[name][1] * border


BACKWARD = ("ends_back", "gradients")
# states of a chunk that are read and written
STATES = {"ends": (0, 1), "ends_back": (0, 1), "outputs": (1, 0), "gradients": (2, 1.5)}


@needs_triton
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("name", STREAMING)
def test_roofline_counts_what_the_compiled_kernel_loads_and_stores(name, dtype):
    compare_stream(name, dtype)


@needs_triton
def test_roofline_tells_a_kernel_that_reads_its_input_twice(tmp_path):
    from spectral_window.ops import triton_spectral_kernels as kernels

    line = "            h = step_state(h, z, rows[k], position, PAIR, DOCUMENTS)\n            value"
    twice = line.replace("rows[k]", "rows[k] + load_rows(u, at, i + k + 1, 1, 1, MASKED)[0]")
    source = Path(kernels.__file__).read_text()
    assert source.count(line) == 1
    module = module_of(source.replace(line, twice), tmp_path)
    with pytest.raises(AssertionError, match="bytes loaded"):
        compare_stream("outputs", torch.bfloat16, modules=(module,))


@needs_triton
def test_roofline_counts_what_the_carry_and_the_last_sum_move():
    from spectral_window.ops import triton_spectral as ts

    works = {work.name: work for work in convolution(*SHAPE, torch.bfloat16)}
    border = 16 * SHAPE[0] * SHAPE[2] * ts.layout(*SHAPE, 1, torch.bfloat16).chunks
    (body,) = loops(compiled("carry", torch.bfloat16).asm["ptx"])
    states = ts.CARRIED  # of a lane in a trip: it has a channel
    loaded, stored = (sum(side.values()) / states for side in moved(body))
    assert loaded * border / 16 == works["carry"].read
    final = 16 * SHAPE[0] * SHAPE[2]
    assert stored * border / 16 + final == works["carry"].written
    (body,) = loops(compiled("finish", torch.bfloat16).asm["ptx"])
    parts, block = ts.SUMMED
    threads = 32 * WARPS["finish"]
    loaded = sum(moved(body).loads.values()) * threads / (parts * block)
    assert loaded * border / 16 == works["finish"].read
