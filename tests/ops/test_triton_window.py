"""The window's GPU kernels, proven without a GPU: their numbers in Triton's interpreter (in a
process of its own), and what the compiler makes of them for real cards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_window.errors import UserError
from spectral_window.lab.bench.gpu_roofline import count as count_window
from spectral_window.lab.bench.gpu_roofline import trip, window
from spectral_window.ops import resolve, window_attention
from tests.ops.machine_code import (
    EXP2,
    F32,
    REGISTERS,
    TARGETS,
    astray,
    build,
    check_no_spill,
    count,
    loops,
    machine_code,
    module_of,
    moved,
    moved_outside,
    resources,
)

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
    few, many = (window(1, 1 << 14, 1, 64, width, torch.bfloat16) for width in (32, 256))
    attend = next(work for work in few if work.name == "attend W=32")
    # a token of a head: q, k, v in, out and lse out
    assert attend.seconds()["bytes"] == pytest.approx((1 << 14) * (4 * 64 * 2 + 4) / 3.35e12)
    assert attend.bound == "bytes"
    assert sum(work.tensor for work in many) > 2 * sum(work.tensor for work in few)


# ---------------------------------------------------------------- what the compiler makes of it

PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
ATTEND = ("attend", "attend_queries", "attend_keys")
KERNELS = (*ATTEND, "remember", "find_turns")
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FEWEST = 8  # warps that fit a multiprocessor: two for each of its schedulers
ROWS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv", "key", "value")


def compiled(
    name,
    target="sm_90",
    *,
    dtype=torch.bfloat16,
    window=128,
    size=64,
    documents=False,
    rope=True,
    **changed,
):
    """(compiled kernel, its tiles), as a call with these inputs would have it; module: where it is
    defined, other than `triton_window_kernels`."""
    from spectral_window.ops import triton_window_kernels
    from spectral_window.ops.triton_window_stream import Tiles, tiles

    kernel = vars(changed.pop("module", triton_window_kernels))[name]
    cut = Tiles(16, 16, 4, 3)
    if name in ATTEND:
        cut = tiles(name, window, size, size, dtype, target in ("sm_90", "sm_100"))
    given = {"K": size, "KP": size, "V": size, "VP": size, "M": cut.own, "N": cut.met, "R": 16}
    given |= {"ROPE": rope, "DOCS": documents, "GUARD": documents, "PRECISION": "ieee"}
    if name == "find_turns":
        given |= {"R": 8, "KH": size // 2, "LOG_THETA": 9.2}
    constants = {key: value for key, value in given.items() if key in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(ROWS, f"*{SHORT[dtype]}")
    types |= dict.fromkeys(("low", "order"), "*i32" if documents else "*fp32")
    types |= dict.fromkeys(("lse", "delta", "turns"), "*fp32")
    types |= dict.fromkeys(("scale", "unit"), "fp32")
    strides = [argument for argument in kernel.arg_names if re.fullmatch(r"[qkvg]_[bth]", argument)]
    options = {"num_warps": cut.warps, "num_stages": cut.stages} | changed
    return build(kernel, types, constants, target, strides, **options), cut


def spills(name, target, cut, *, dtype=torch.bfloat16, size=64, documents=False, **_):
    """Whether this kernel is known to keep registers on the stack within its loop.

    Smaller tiles would not; which are faster only a card can show, and none of these was on one.
    """
    if target == "gfx942":
        if dtype == torch.float32:
            return name == "attend_keys" and size <= 64
        return name in ("attend_queries", "attend_keys") and size > 64
    if target == "sm_90":
        return documents and name == "attend_keys" and cut[:2] == (64, 64)
    return target == "sm_100" and documents and size > 64 and dtype == torch.float16


def check_compiled(name, target, **about):
    """Without a spill; with the planned occupancy; products by tensor cores; rows in 128 bits; no
    float64 but in the angles."""
    kernel, cut = compiled(name, target, **about)
    products = name in ATTEND
    short = about.get("dtype") != torch.float32
    # cos and sin of find_turns: libdevice reduces large angles by an array on the stack
    if name != "find_turns" and not spills(name, target, cut, **about):
        check_no_spill(kernel, name)
    if target == "gfx942":
        text = kernel.asm["amdgcn"]
        assert not products or not short or "v_mfma" in text
        assert name == "find_turns" or "load_dwordx4" in text
        return
    used = resources(kernel)
    per_processor = REGISTERS // (used["REG"] * 32 * cut.warps)
    assert per_processor * cut.warps >= FEWEST, f"two warps for each scheduler: {used}"
    text = kernel.asm["ptx"]
    if products and short:
        groups = PRODUCTS[target] if cut.own >= 64 else "mma.sync"
        assert groups in text, "products by tensor cores"
    if name == "find_turns":
        return
    if target == "sm_90":
        assert astray(machine_code(kernel)) == []
    if products or about.get("size", 64) >= 64:  # else a tile has fewer bytes for each thread
        wide = r"ld\.global\S*\.v4|cp\.async\.cg\.shared\.global"
        assert re.search(wide, text), "128-bit loads"
        assert "st.global.v4" in text, "128-bit stores"
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


# ---------------------------------------------------------------- the roofline

SHARED = 32  # threads that hold one number of a column of a tile of products, and load it each


def compare_loop(name, **about):
    """The roofline's counts of a tile that a program meets, with the loop of its PTX.

    With one stage every load is an instruction of the loop that uses it. A trip of the loop meets
    one tile, so it loads, over all threads, the bytes of the tile's rows: 128-bit loads alone,
    exactly as many as counted. The numbers of its rows (lse, delta) are loaded by every thread that
    needs them, SHARED of them each; the cache serves these as one. RoPE is off for that, and on for
    the instructions: its tables are the same for all programs and stay in the cache.
    """
    kernel, cut = compiled(name, rope=False, num_stages=1, **about)
    (body,) = loops(kernel.asm["ptx"])
    size = about.get("size", 64)
    counts = trip(name, size, size, 2, cut.own, cut.met)
    threads, found = 32 * cut.warps, moved(body)
    assert found.loads[16] * threads == counts.loads, "bytes loaded"
    narrow = sum(found.loads.values()) - found.loads[16]
    assert narrow * threads == SHARED * counts.tables
    assert not found.stores
    kernel, cut = compiled(name, num_stages=1, **about)
    (body,) = loops(kernel.asm["ptx"])
    assert count(F32, body) * threads == counts.float32
    assert count(EXP2, body) * threads == counts.special


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("name", ATTEND)
def test_the_roofline_counts_the_loop_of_the_compiled_kernel(name, width):
    compare_loop(name, window=width)


def test_the_roofline_tells_a_kernel_that_reads_its_keys_twice(tmp_path):
    from spectral_window.ops import triton_window_kernels as kernels

    line = "        values, poison = clean(values, GUARD)\n"
    twice = (
        line + "        keys += load_rows(k + b * k_b + h * k_h, source + 1, exists, k_t, K, KP)\n"
    )
    source = Path(kernels.__file__).read_text()
    assert source.count(line) == 1
    module = module_of(source.replace(line, twice), tmp_path)
    with pytest.raises(AssertionError, match="bytes loaded"):
        compare_loop("attend", module=module)


@pytest.mark.parametrize("name", ATTEND)
def test_the_roofline_counts_what_a_program_moves_outside_its_loop(name):
    """One document in one head whose tiles are met once each: loads and stores of all programs are
    theirs outside the loop, plus a trip's for each tile."""
    kernel, cut = compiled(name, rope=False, num_stages=1)
    outside, threads = moved_outside(kernel.asm["ptx"]), 32 * cut.warps
    whole = count_window(name, cut.own, 128, 64, 64, 2, cut.own, cut.own)  # one program, one trip
    inside = trip(name, 64, 64, 2, cut.own, cut.own)
    assert outside.loads[16] * threads == whole.loads - inside.loads - inside.tables - OWN[name][0]
    assert outside.stores[16] * threads == whole.stores - OWN[name][1]


# bytes of lse and delta that a tile of 64 queries loads and stores: in narrower instructions
OWN = {"attend": (0, 256), "attend_queries": (256, 256), "attend_keys": (0, 0)}
