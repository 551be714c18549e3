"""What a compiler made of a Triton kernel: resources, loops, bytes and instructions.

Triton compiles for cards that are not here, so what follows from the code of a kernel is tested
without one; `test_triton_*.py` share this.
"""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PARKED = 16  # bytes
REGISTERS = 65_536  # of a multiprocessor of NVIDIA's
F64 = r"\b(?:fma|mul|add|sub)(?:\.rn)?\.f64\b"
F32 = r"\b(?:fma|mul|add|sub|max|min)(?:\.rn)?\.f32\b"
EXP2 = r"\bex2\.approx\S*\.f32\b"


def resources(kernel) -> dict[str, int]:
    """REG, STACK and LOCAL of a thread; a spill is STACK or LOCAL."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(program), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def check_no_spill(kernel, about: str = "") -> None:
    """No loop of the kernel keeps a register on the stack.

    On NVIDIA a few registers may be parked there around a loop (PARKED bytes): that costs a store
    and a load per program. On AMD neither scratch memory nor a spilled register is allowed.
    """
    if "cubin" in kernel.asm:
        used = resources(kernel)
        assert used["STACK"] + used["LOCAL"] <= PARKED, f"spills: {about} {used}"
        if used["STACK"]:
            assert spilled_in_loops(kernel) == 0, f"spills in a loop: {about} {used}"
        return
    code = kernel.asm["amdgcn"]
    assert re.search(r"\.private_segment_fixed_size: +0\b", code), f"spills: {about}"
    assert re.search(r"\.vgpr_spill_count: +0\b", code), f"spills: {about}"
    assert count(r"\bscratch_", code) == 0, f"spills: {about}"


def loops(ptx: str) -> list[str]:
    """The bodies of the loops: blocks that branch back to their own label."""
    parts = re.split(r"^(\$L__BB\d+_\d+):", ptx, flags=re.M)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [body for label, body in pairs if re.search(rf"bra\S*\s+{re.escape(label)}\b", body)]


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


class Moved(NamedTuple):
    """Bytes that one thread loads and stores, by the bytes of an instruction: {16: 64} is four
    loads of 128 bits."""

    loads: Counter
    stores: Counter

    def __sub__(self, other: Moved) -> Moved:
        return Moved(self.loads - other.loads, self.stores - other.stores)


def moved(ptx: str) -> Moved:
    """What a piece of PTX loads from global memory and stores there, for each thread."""
    found = {"ld": Counter(), "st": Counter()}
    pattern = r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
    for kind, vector, bits in re.findall(pattern, ptx):
        size = int(vector or 1) * int(bits) // 8
        found[kind][size] += size
    return Moved(found["ld"], found["st"])


def moved_outside(ptx: str) -> Moved:
    """What is moved before, between and after the loops."""
    rest = moved(ptx)
    for body in loops(ptx):
        rest -= moved(body)
    return rest


def build(kernel, types: dict[str, str], constants: dict, target: str, divisible=(), **options):
    """A kernel compiled for a target of `TARGETS`, as a launch would.

    Args:
        kernel: the JIT function.
        types: of the arguments by name, pointers as "*bf16".
        constants: compile-time constants, and arguments that are None.
        target: a key of `TARGETS`.
        divisible: integer arguments that are divisible by 16, as pointers are.
        options: num_warps and others.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = types[argument]
        if types[argument][0] == "*" or argument in divisible:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def module_of(source: str, folder: Path):
    """A module made of changed kernels: Triton reads a kernel's source from its file."""
    path = folder / "changed_kernels.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spilled_in_loops(kernel) -> int:
    """Instructions of a loop of the machine code that store a register on the stack or load it."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", machine_code(kernel))
    jumps = [(int(at, 16), re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", line)) for at, line in lines]
    bodies = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    stack = [int(at, 16) for at, line in lines if re.search(r"\b(?:STL|LDL)\b", line)]
    return sum(any(first <= at <= last for first, last in bodies) for at in stack)


def moved_in_tiles(ttir: str) -> dict[str, int]:
    """Bytes that a program loads and stores, from Triton's optimised form of the kernel, in which a
    load is one of a tile: {"load", "load in a loop", "store", "store in a loop"}.

    Each is the bytes of its tile times the trips of the loops around it whose bounds are constants.
    "in a loop" is what stands in a loop of other bounds, for one trip of that.
    """
    widths = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "i32": 4, "i64": 8}
    found: dict[str, int] = Counter()
    nest: list[int | None] = []  # per brace: trips of a loop, 0 for unknown, None for other blocks
    for line in ttir.splitlines():
        name = re.search(r"= tt\.(load) |^\s*tt\.(store) ", line)
        if name:
            tile, kind = re.findall(r"(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>", line)[-1]
            size = widths[kind] * math.prod(int(side) for side in tile.split("x") if side)
            trips = [trip for trip in nest if trip is not None]
            inside = " in a loop" if 0 in trips else ""
            found[(name[1] or name[2]) + inside] += size * math.prod(trip or 1 for trip in trips)
        loop = re.search(r"scf\.for .*= %c(\d+)_i32\S* to %c(\d+)_i32\S* step %c(\d+)_i32", line)
        for brace in re.findall(r"[{}]", re.sub(r"{[^{}]*}", "", line)):
            if brace == "}":
                nest.pop()
            elif loop:
                first, last, step = map(int, loop.groups())
                nest.append(-(-(last - first) // step))
            else:
                nest.append(0 if "scf.for" in line else None)
    return found


def machine_code(kernel) -> str:
    """The machine code of a kernel for NVIDIA."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(program), "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def touched_in_flight(code: str) -> list[str]:
    """Instructions that touch registers of a matrix product of Hopper's that still runs.

    Such a product (HGMMA) reads a register operand and writes its result after it was issued, until
    a barrier (WARPGROUP.DEPBAR) says that it has ended. NVIDIA's assembler before CUDA 13.3 is
    known to use operands again too early, in kernels like ours.
    """
    found, running = [], []
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?);", code):
        words = line.replace(".reuse", "").split()
        name = words[words[0].startswith("@")]
        numbers = [int(n) for n in re.findall(r"\bR(\d+)\b", line)]
        if "GMMA." in name:
            columns = int(re.search(r"64x(\d+)x", name)[1])
            result = set(range(numbers[0], numbers[0] + columns // 2))
            operand = re.search(r"R\d+, R(\d+), gdesc", line)
            first = int(operand[1]) if operand else 0
            running.append((result, set(range(first, first + 4)) if operand else set()))
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(line.split("0x")[-1], 16)  # groups that may still run
            running = running if left else []
        elif numbers:
            width = (
                4 if ".128" in name or ".M88.4" in name else 2 if re.search("64|WIDE", name) else 1
            )
            stores = re.match(r"ST|LDGSTS|RED|ATOM|R2UR|[IFH]?SETP", name.split(".")[0])
            written = set() if stores else set(range(numbers[0], numbers[0] + width))
            read = set(numbers[not stores :])
            for result, operand in running:
                if written & (result | operand) or read & result:
                    found.append(line)
    return found


NOWHERE = frozenset({"nothing"})
SHARED_MEMORY = {"SR_CgaCtaId", "SR_TID.X"}  # of the program, and a warp's part of it
RESULTLESS = (
    r"ST|RED|LDGSTS|LDGDEPBAR|[UIFHD]*SETP|U?PLOP3|VOTE\b|BAR|DEPBAR|WARP|MEMBAR|FENCE|ERRBAR|CCTL"
    r"|BRA|BRX|BSSY|BSYNC|CALL|RET|EXIT|NOP|UTMA|SYNCS"
)


def astray(code: str) -> list[str]:
    """Instructions that work with uniform registers in which nothing was written, and matrix
    products of Hopper's (HGMMA) that would look for an operand elsewhere than in shared memory.

    A product finds an operand by a descriptor in two uniform registers: a place, which counts from
    the program's own shared memory (computed from SR_CgaCtaId, and SR_TID.X for a warp's part), and
    sizes, which are constants. Both are followed back to what they were computed from: through the
    code, and again with what the first round left, as a loop does. The assembler of CUDA 12.8
    computes places of some products from registers in which nothing was written.
    """
    origins: dict[str, frozenset[str]] = {}  # of registers, and of places on the stack

    def origin(operand: str, word: int = 0) -> frozenset[str]:
        """What a word of an operand was computed from: special registers, "parameter", "memory";
        nothing for a constant."""
        if "c[" in operand:
            return frozenset({"parameter"})
        names = re.findall(r"\b(UR|R)(\d+)\b", operand)
        each = (origins.get(f"{kind}{int(number) + word}", NOWHERE) for kind, number in names)
        return frozenset().union(*each)

    found: dict[str, None] = {}
    for line in 2 * re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", code):
        guard, name, rest = re.match(r"(@\S+ )?(\S+) ?(.*)", line.replace(".reuse", "")).groups()
        operands = [operand.strip() for operand in rest.split(",")]
        product = re.match(r"HGMMA.*?\.64x(\d+)x", name)
        if product:
            in_registers, first = re.search(r"R\d+, (R\d+, )?gdesc\[UR(\d+)\]", rest).groups()
            for low in range(int(first) + (2 if in_registers else 0), int(first) + 4, 2):
                place, sizes = origin(f"UR{low}"), origin(f"UR{low + 1}")
                if not {"SR_CgaCtaId"} <= place <= SHARED_MEMORY or sizes:
                    found[line] = None
        if name.startswith("STL"):
            stored = re.fullmatch(r"R(\d+)", operands[1])
            for word in range(words(name)):
                value = origin(operands[1], word) if stored else frozenset()
                origins[f"stack {offset(operands[0]) + 4 * word}"] = value
        if re.match(RESULTLESS, name):
            continue
        while operands and re.fullmatch(r"U?P[T\d]", operands[0]):  # a predicate as a result
            del operands[0]
        result = re.fullmatch(r"(UR|R)(\d+)", operands[0]) if operands else None
        if not result:
            continue
        sources = operands[1:]
        count = int(product[1]) // 2 if product else words(name)
        values = []
        for word in range(count):
            apart = name.startswith("UIADD3.64")  # word by word
            parts = [origin(each, word * apart) for each in sources]
            if name[0] == "U" and any(part >= NOWHERE for part in parts):
                found[line] = None
            if product or re.match(r"LD[^LC]|ATOM|SHFL|REDUX", name):
                value = frozenset({"memory"})
            elif name.startswith("S2"):
                value = frozenset(sources)
            elif name.startswith("LDL"):
                value = origins.get(f"stack {offset(sources[0]) + 4 * word}", NOWHERE)
            elif re.fullmatch(r"U?LOP3\.LUT .*RZ, 0x3c, !U?PT", f"{name} {rest}"):
                value = parts[0] ^ parts[1]  # three of these exchange two registers
            else:
                value = frozenset().union(*parts)
            values.append(value)
        for word, value in enumerate(values):
            register = f"{result[1]}{int(result[2]) + word}"
            before = origins.get(register, frozenset()) if guard else frozenset()
            origins[register] = value | before
    return list(found)


def words(name: str) -> int:
    """The registers of an instruction's result."""
    if re.search(r"\.128|M88\.4", name):
        return 4
    return 2 if re.search(r"\.64\b|WIDE|M88\.2|^CS2R$", name) else 1


def offset(place: str) -> int:
    """The place on the stack: [R1+0x10] is 16."""
    found = re.search(r"\+0x([0-9a-f]+)", place)
    return int(found[1], 16) if found else 0
