"""The memory's GPU kernels, proven without a GPU: their numbers in Triton's interpreter (in a
process of its own), and what the compiler makes of them for real cards."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from spectral_window.errors import UserError
from spectral_window.ops import delta_memory, resolve
from spectral_window.ops.delta_memory import CHECKED
from tests.ops.machine_code import astray, machine_code, touched_in_flight
from tests.ops.test_triton_window import PRODUCTS, SHORT, TARGETS, in_interpreter

triton = pytest.importorskip("triton", reason="triton is not installed")


def test_the_kernels_keep_the_contract_in_the_interpreter():
    pytest_alone = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist")
    shown = in_interpreter(*pytest_alone, "tests/ops/interpreted_delta.py")
    assert re.search(r"\d+ passed", shown)
    assert "skipped" not in shown


def test_a_cpu_takes_no_gpu_method(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(UserError, match="'triton'"):
        delta_memory(q, q, q, torch.ones(1, 5, 1), method="triton")
    assert resolve("delta", "auto", q)[0] != "triton"


def test_a_gpu_takes_the_kernels_and_says_why():
    class OnGPU:
        shape, dtype, device = (1, 5, 1, 64), torch.bfloat16, torch.device("cuda")
        is_cuda = True

        def dim(self):
            return 4

    assert resolve("delta", "auto", OnGPU())[0] == "triton"
    OnGPU.dtype = torch.float64
    assert resolve("delta", "auto", OnGPU())[0] == "chunked"
    OnGPU.dtype, OnGPU.shape = torch.float32, (1, 5, 1, 257)
    choice = resolve("delta", "auto", OnGPU())
    assert choice.name == "chunked"
    assert "256" in dict(choice.passed)["triton"]


def test_what_an_old_assembler_compiles_wrongly_is_left_to_plain_torch(monkeypatch):
    """On Hopper; unless the kernels are asked for by name."""
    from spectral_window.ops import triton_launch

    class OnHopper:
        device, is_cuda = torch.device("cuda"), True

        def __init__(self, channels, dtype):
            self.shape, self.dtype = (1, 70, 1, channels), dtype

        def dim(self):
            return 4

    def choice(method="auto", key=128, value=128, documents=False, dtype=torch.float32):
        q, v = OnHopper(key, dtype), OnHopper(value, dtype)
        given = torch.arange(70)[None] if documents else None
        return resolve("delta", method, q, q, v, None, None, None, given)

    monkeypatch.setattr(triton_launch, "sound", lambda device: False)
    sizes = {"value": 16}, {"key": 40, "value": 40}, {"dtype": torch.float16}
    for affected in ({"documents": True}, *sizes):
        chosen = choice(**affected)
        assert chosen.name == "chunked"
        assert "spectral-window[gpu]" in dict(chosen.passed)["triton"]
        assert choice("triton", **affected).name == "triton"
    assert {choice(key=size, value=size).name for size in CHECKED} == {"triton"}
    monkeypatch.setattr(triton_launch, "sound", lambda device: True)
    assert choice(documents=True).name == choice(value=16).name == "triton"


def test_the_dry_run_walks_every_part_of_the_bench():
    run = (
        "import sys; from spectral_window.lab.bench import gpu_delta;"
        "sys.argv[1:] = ['--device', 'cpu', '--quick']; gpu_delta.main()"
    )
    rows = [json.loads(line) for line in in_interpreter("-c", run).splitlines()]
    excused = ("left out", "not here")  # a CUDA graph on a CPU, a package that is not installed
    wrong = [r for r in rows if r["status"] != "ok" and not r["status"].startswith(excused)]
    assert not wrong
    parts = {row.get("part", "bench") for row in rows}
    wanted = {
        "short",
        "float64",
        "documents and state",
        "equal keys",
        "repeats",
        "threads",
        "bench",
    }
    assert parts >= wanted


# ---------------------------------------------------------------- what the compiler makes of it

KERNELS = ("prepare", "scan", "outputs", "inflow", "retreat", "gradients")
OPERANDS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "states", "writes")
OPERANDS += ("d_states", "d_writes", "entering")


def build(name, target, dtype=torch.bfloat16, key=128, value=128, decay=False, docs=False, rows=96):
    """(compiled kernel, its tiles), as a call with these inputs would have it; rows: B times H."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spectral_window.ops import triton_delta_gradients, triton_delta_kernels
    from spectral_window.ops.triton_delta import CHUNK, tiles

    files = triton_delta_kernels, triton_delta_gradients
    kernel = next(getattr(file, name) for file in files if hasattr(file, name))
    wide = dtype == torch.float32
    cut = tiles(name, rows, key, value, wide)
    how = "ieee" if target == "gfx942" else "tf32x3" if wide else "tf32"
    constants = {"H": 6, "K": key, "V": value, "KB": cut.keys, "VB": cut.columns, "C": CHUNK}
    constants |= {"DECAY": decay, "DOCS": docs, "GATED": decay or docs, "GIVEN": True}
    constants |= {"PRECISION": how, "SOLVE": how}
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in OPERANDS:
            signature[argument] = f"*{SHORT[dtype]}"
        elif argument == "positions":
            signature[argument] = "*i64"
        else:
            signature[argument] = "i32" if argument in ("time", "chunks") else "*fp32"
        if signature[argument][0] == "*":
            aligned[(index,)] = [["tt.divisibility", 16]]
    places = {
        (kernel.arg_names.index(name),): value
        for name, value in constants.items()
        if name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options), cut


def check_compiled(name, target, **about):
    compiled, _ = build(name, target, **about)
    wide = about.get("dtype") == torch.float32
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
    text = compiled.asm["ptx"]
    if not wide:
        assert PRODUCTS[target] in text, "products by tensor cores"
    assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg\.shared\.global", text), "128-bit loads"
    assert ".f64" not in text
    code = machine_code(compiled)
    assert touched_in_flight(code) == []
    assert astray(code) == []


def test_a_register_that_is_used_again_too_early_would_show():
    product = "/*0010*/ HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR12], RZ, gsb0 ;"
    ended = "/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    for line in ("MOV R57, R3", "FADD R2, R30, R3", "LDSM.16.M88.4 R36, [R10]"):
        again = f"/*0020*/ {line} ;"
        assert touched_in_flight("\n".join((product, again, ended))) == [f"{line} "]
        assert touched_in_flight("\n".join((product, ended, again))) == []
    assert touched_in_flight("\n".join((product, "/*0020*/ STS [R3], R56 ;", ended))) == []


MISCOMPILED = """
    /*0000*/ S2UR UR4, SR_CgaCtaId ;
    /*0010*/ UMOV UR6, 0x400 ;
    /*0020*/ ULEA UR6, UR4, UR6, 0x18 ;
    /*0030*/ USHF.R.U32.HI UR28, URZ, 0x4, UR6 ;
    /*0040*/ USGXT.U32 UR28, UR28, 0xe ;
    /*0050*/ UIADD3 UR39, UP0, UR39, 0x40, URZ ;
    /*0060*/ UIADD3.X UR42, UR42, -0x7fffffe0, URZ, UP0, !UPT ;
    /*0070*/ IMAD.U32 R156, RZ, RZ, UR39 ;
    /*0080*/ IMAD.U32 R157, RZ, RZ, UR42 ;
    /*0090*/ STL.64 [R1+0x10], R156 ;
    /*00a0*/ CS2R R156, SRZ ;
    /*00b0*/ LDL.64 R156, [R1+0x10] ;
    /*00c0*/ R2UR UR46, R156 ;
    /*00d0*/ R2UR UR47, R157 ;
    /*00e0*/ HGMMA.64x32x16.F32 R24, R88, gdesc[UR44].tnspB, R24, gsb0 ;
"""  # what `scan` was compiled to, shortened: its second product looks nowhere


def test_a_product_that_looks_for_its_operand_elsewhere_would_show():
    """The assembler of CUDA 12.8 left out that UR39 begins as UR28 and UR42 as 0."""
    product = MISCOMPILED.splitlines()[-1].split("*/ ")[1].removesuffix(" ;")
    found = astray(MISCOMPILED)
    assert found[-1] == product
    assert [line.split()[1] for line in found] == ["UR39,", "UR42,", "R24,"]
    started = MISCOMPILED.replace("UP0, UR39,", "UP0, UR28,").replace("UR42, UR42,", "UR42, URZ,")
    assert astray(started) == []
    stale = "/*0000*/ S2UR UR39, SR_CTAID.X ;\n/*0008*/ UMOV UR42, URZ ;" + MISCOMPILED
    assert astray(stale) == [product]  # left from something else, so written
    assert astray(started.replace("[R1+0x10], R156", "[R1+0x20], R156"))[-1] == product


@pytest.mark.slow
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", CHECKED)
def test_products_find_their_operands(name, dtype, size, docs):
    """Of few rows too, which have tiles of their own."""
    for rows in (96, 1) if name in ("scan", "retreat") else (96,):
        about = {"dtype": dtype, "key": size, "value": size, "rows": rows}
        compiled, _ = build(name, "sm_90", decay=True, docs=docs, **about)
        assert astray(machine_code(compiled)) == [], rows


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_compile_without_spills_to_tensor_cores(name, dtype):
    check_compiled(name, "sm_90", dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_kernels_in_16_bits_compile_for_other_cards(name, target):
    if (name, target) == ("gradients", "sm_80"):
        pytest.xfail("its tiles are those of Hopper, and spill on Ampere")
    check_compiled(name, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 192, 256])
def test_kernels_of_other_sizes_compile_without_spills(name, dtype, size):
    check_compiled(name, "sm_90", dtype=dtype, key=size, value=size)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_with_decays_and_documents_compile_without_spills(name):
    check_compiled(name, "sm_90", decay=True, docs=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "gradients"])  # it spills
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_compile_for_amd(name, dtype):
    check_compiled(name, "gfx942", dtype=dtype)
