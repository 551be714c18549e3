"""The roofline of a layer on a GPU: what each kernel must move and compute, and the least time of
that on an H100.

    convolution, window, memory   the Triton kernels, counted from their code
    layer                         these, the matrix products and what lies between them
    ends                          what a model has once: embedding, head, loss, optimizer
    table, sums                   rows of all of it: per token and channel, and in microseconds
    compare                       times in results/gpu beside the least time of the same shape

All of it is prediction: a kernel cannot be faster than its bytes through memory, each input once
and each output once, nor than its operations on the unit that does them. It may be slower:
launches, latency, and what is loaded again from a cache (`Work.again`; NVIDIA gives no rate for the
L2 cache) are in no least time. One thing can beat it: a small tensor that the kernel before has
written may still be in the cache. `tests/ops/test_triton_*.py` compare the counts with the loads,
stores and instructions of the compiled kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch

from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import count_parameters, match_parameters
from spectral_window.lab.bench.gpu_train import WAYS
from spectral_window.lab.bench.roofline import layer_products
from spectral_window.lab.jobs import Row
from spectral_window.nn.memory import LAG, recommended
from spectral_window.nn.mixers import MIXERS

# NVIDIA H100 SXM5, from NVIDIA's datasheet of it (dense products, highest clock)
DEVICE = "H100"
MEMORY = 3.35e12  # bytes/s
TENSOR = 989e12  # FLOP/s of 16-bit products on tensor cores
FLOAT32 = 67e12 / 2  # instructions/s, of which a fused multiply-add is two operations
FLOAT64 = 34e12 / 2  # instructions/s without tensor cores
# exp2, log2 and conversions to and from float64: 16 per clock and multiprocessor, where float32 has
# 128 (CUDA C++ Programming Guide, throughput of arithmetic instructions, compute capability 9.0)
SPECIAL = FLOAT32 * 16 / 128

WINDOWS = (32, 128)  # shown: the paper's, and one whose tiles are full
ADAMW = (16, 12)  # bytes read and written per parameter: float32 weight, gradient and two moments


@dataclass(frozen=True)
class Work:
    """What a kernel, or a step of a layer, has to do in one call.

    Attributes:
        part: of the layer.
        name: of the kernel.
        backward: whether it belongs to the backward pass.
        read: bytes through memory, each input once.
        written: the same, each output once.
        again: bytes that programs load or store beyond these, from a cache.
        tensor: floating-point operations on tensor cores.
        float32: float32 instructions; a fused multiply-add is one.
        float64: the same in float64.
        special: instructions of the slow unit, see `SPECIAL`.
    """

    part: str
    name: str
    backward: bool
    read: float = 0
    written: float = 0
    again: float = 0
    tensor: float = 0
    float32: float = 0
    float64: float = 0
    special: float = 0

    def seconds(self) -> dict[str, float]:
        """Return the least time on an H100 by what limits it."""
        return {
            "bytes": (self.read + self.written) / MEMORY,
            "tensor": self.tensor / TENSOR,
            "float32": self.float32 / FLOAT32,
            "float64": self.float64 / FLOAT64,
            "exp2": self.special / SPECIAL,
        }

    @property
    def floor(self) -> float:
        """The least time in seconds."""
        return max(self.seconds().values())

    @property
    def bound(self) -> str:
        """What takes that time."""
        seconds = self.seconds()
        return max(seconds, key=lambda unit: seconds[unit])


def _multiplied(flops: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return operations on tensor cores, and float32 instructions, of products in a dtype."""
    return (flops, 0) if dtype.itemsize == 2 else (0, flops / 2)


def least(works: list[Work]) -> float:
    """Return the least time in seconds of works that run one after the other."""
    return sum(work.floor for work in works)


# ---------------------------------------------------------------------------------- convolution


def convolution(
    batch: int, time: int, channels: int, dtype: torch.dtype, modes: int = 1
) -> list[Work]:
    """Count the kernels of `triton_spectral`, without documents, gains and an initial state.

    Args:
        batch: B.
        time: T.
        channels: D.
        dtype: of u.
        modes: M.
    """
    from spectral_window.ops.triton_spectral import PLANS, layout

    plan, cut = PLANS[dtype], layout(batch, time, channels, modes, dtype)
    wide = dtype == torch.float64
    oscillators = modes * channels
    border = 16 * oscillators * batch * cut.chunks  # bytes of a complex float64 state a chunk
    plane = batch * time * channels * dtype.itemsize
    steps = batch * time * oscillators
    product = 8 if plan.pair else 4  # instructions of z h + x

    def streamed(
        name: str,
        backward: bool,
        reads: int,
        writes: int,
        states: tuple[float, float],
        instructions: int,
        exact: bool = False,
        reads_again: int = 0,
    ) -> Work:
        """states: read and written per chunk; exact: computed in float64 whatever the dtype."""
        double = steps * instructions if wide or exact else 0
        return Work(
            "convolution",
            name,
            backward,
            read=reads * plane + states[0] * border,
            written=writes * plane + states[1] * border,
            again=reads_again * plane + border,  # every program reads its z
            float32=0 if double else steps * instructions,
            float64=double,
            special=reads * batch * time * channels if exact and not wide else 0,
        )

    def carried(backward: bool) -> Work:
        state = 16 * oscillators * batch
        work = 6 * oscillators * batch * cut.chunks  # a complex product and a sum
        return Work("convolution", "carry", backward, border, border + state, state, float64=work)

    def dynamics(backward: bool) -> Work:
        return Work("convolution", "dynamics", backward, 8 * oscillators, 16 * oscillators)

    sums = 1.5 * border  # dL/dz and dL/dgain
    return [
        dynamics(False),
        streamed("ends", False, 1, 0, (0, 1), 4, exact=True),
        carried(False),
        streamed("outputs", False, 1, 1, (1, 0), product),
        dynamics(True),
        streamed("ends", True, 1, 0, (0, 1), product + 1),
        carried(True),
        streamed("gradients", True, 2, 1, (2, 1.5), 3 * product + 5, reads_again=1),
        Work(
            "convolution",
            "finish",
            True,
            read=sums,
            written=12 * oscillators,
            float64=3 * oscillators * batch * cut.chunks,
        ),
    ]


# ---------------------------------------------------------------------------------- window


class Trip(NamedTuple):
    """What a program of a window kernel does to a tile of the other side.

    Attributes:
        loads: bytes of the tile's rows.
        tables: bytes of float32 numbers that belong to its rows: lse and delta.
        flops: of the products, two per element and term.
        float32: other instructions.
        special: exp2.
    """

    loads: int
    tables: int
    flops: int
    float32: int
    special: int


class _Rows(NamedTuple):
    """Elements and float32 numbers per row that a kernel loads, stores and multiplies."""

    own: int
    own_numbers: int
    met: int
    met_numbers: int
    stored: int
    stored_numbers: int
    terms: int


def _rows(kernel: str, key: int, value: int) -> _Rows:
    return {
        "attend": _Rows(key, 0, key + value, 0, value, 1, key + value),
        "attend_queries": _Rows(key + 2 * value, 1, key + value, 0, key, 1, 2 * key + value),
        "attend_keys": _Rows(key + value, 0, key + value, 2, key + value, 0, 2 * (key + value)),
    }[kernel]


def trip(kernel: str, key: int, value: int, size: int, own: int, met: int) -> Trip:
    """Count one tile that a program of `kernel` meets, with RoPE and without documents.

    Args:
        kernel: "attend", "attend_queries" or "attend_keys".
        key: head size K, a power of two.
        value: head size V.
        size: bytes per element.
        own: rows of the program.
        met: rows that it meets at a time.
    """
    rows, scores = _rows(kernel, key, value), own * met
    # Per score: scale and subtract, then maximum and sum; or subtract and multiply. Turning a pair
    # of channels takes 8: four for its angle, four to rotate.
    instructions, special = 3 * scores + 4 * met * key, scores
    if (
        kernel == "attend"
    ):  # rescales its result, by six more in each of four lanes that share a row
        instructions += own * value + 4 * 6 * own
        special += 4 * own
    flops = 2 * scores * rows.terms
    return Trip(met * rows.met * size, 4 * met * rows.met_numbers, flops, instructions, special)


class Counts(NamedTuple):
    """What one row and head takes.

    Attributes:
        read: bytes through memory, each input once.
        written: the same, each output once.
        loads: bytes that all programs load; tables of RoPE's angles are not in it.
        turns: bytes of those tables that all programs load.
        stores: bytes that all programs store.
        flops: of the products, tiles with masked corners included.
        float32: other instructions.
        special: exp2.
    """

    read: int
    written: int
    loads: int
    turns: int
    stores: int
    flops: int
    float32: int
    special: int


def count(
    kernel: str, time: int, window: int, key: int, value: int, size: int, own: int, met: int
) -> Counts:
    """Count a kernel on one document of `time` tokens in one head.

    Args:
        kernel: "attend", "attend_queries" or "attend_keys".
        time: T.
        window: W.
        key: head size K, a power of two.
        value: head size V, a power of two.
        size: bytes per element.
        own: rows of a tile, see `triton_window_stream.Tiles`.
        met: rows of the tiles that it meets.
    """
    rows, once = _rows(kernel, key, value), trip(kernel, key, value, size, own, met)
    loads = turns = stores = trips = single = 0
    angles = 4 * key  # bytes of cos and sin of one place
    back = 1 if kernel == "attend" else 2  # the result is turned back
    for first in range(0, time, own):
        here = min(own, time - first)
        if kernel == "attend_keys":
            begin, end = first // met * met, ((first + own - 1) // window + 2) * window
        else:
            begin, end = max(first // window - 1, 0) * window // met * met, first + own
        end = min(end, time)
        tiles = -(-(end - begin) // met)
        others = min(begin + tiles * met, time) - begin
        loads += here * (rows.own * size + 4 * rows.own_numbers)
        loads += others * (rows.met * size + 4 * rows.met_numbers)
        turns += angles * (back * (own + 1) + met + tiles)
        stores += here * (rows.stored * size + 4 * rows.stored_numbers)
        single += 4 * back * own * key + own * value  # turned; divided, or delta and the scale
        trips += tiles
    inputs = {"attend": 2 * key + value, "attend_queries": 2 * key + 3 * value}
    numbers = {"attend": 0, "attend_queries": 1, "attend_keys": 2}[kernel]  # lse and delta
    return Counts(
        read=time * (inputs.get(kernel, 2 * (key + value)) * size + 4 * numbers),
        written=time * (rows.stored * size + 4 * rows.stored_numbers),
        loads=loads,
        turns=turns,
        stores=stores,
        flops=trips * once.flops,
        float32=single + trips * once.float32,
        special=trips * once.special,
    )


def window(
    batch: int, time: int, heads: int, size: int, width: int, dtype: torch.dtype
) -> list[Work]:
    """Count the kernels of `triton_window` with RoPE, for rows that are one document each.

    Args:
        batch: B.
        time: T.
        heads: H.
        size: of a head, K = V.
        width: W.
        dtype: of q, k and v.
    """
    from spectral_window.ops.triton_window_stream import padded, tiles

    of = f"W={width}"
    key = padded(size)
    kernels = ("attend", "attend_queries", "attend_keys")
    cut = {name: tiles(name, width, key, key, dtype, True) for name in kernels}

    def attended(name: str) -> Work:
        counts = count(name, time, width, key, key, dtype.itemsize, cut[name].own, cut[name].met)
        moved = counts.loads + counts.turns + counts.stores
        tensor, single = _multiplied(counts.flops, dtype)
        times = batch * heads
        return Work(
            "window",
            f"{name} {of}",
            name != "attend",
            read=times * counts.read,
            written=times * counts.written,
            again=times * max(0, moved - counts.read - counts.written),
            tensor=times * tensor,
            float32=times * (counts.float32 + single),
            special=times * counts.special,
        )

    kept = time - max(time // width - 1, 0) * width  # tokens that the next one can see
    row = 2 * heads * size * dtype.itemsize
    sides = [side for each in cut.values() for side in each[:2]]
    near, step = max(sides), min(sides)
    places = near + time // step + near // step  # within a tile, and the tiles' first

    def turns(backward: bool) -> Work:
        own = 0 if backward else kept  # of `remember`
        return Work("window", f"find_turns {of}", backward, written=4 * key * (places + own))

    remember = Work(
        "window",
        f"remember {of}",
        False,
        read=batch * kept * row,
        written=batch * 2 * width * row,
        float32=4 * batch * kept * heads * key,
    )
    return [
        turns(False),
        attended("attend"),
        remember,
        turns(True),
        *map(attended, kernels[1:]),
    ]


# ---------------------------------------------------------------------------------- memory


def memory(
    batch: int, time: int, heads: int, size: int, dtype: torch.dtype, exact: bool = True
) -> list[Work]:
    """Count the kernels of `triton_delta`, without documents, decay and an initial state.

    Args:
        batch: B.
        time: T.
        heads: H.
        size: of a head, K = V, of whole tiles.
        dtype: of q, k and v.
        exact: whether a product of float32 inputs is three in TF32, as under "highest".
    """
    from spectral_window.ops.triton_delta import CHUNK, tiles

    chunks, number = batch * heads * -(-time // CHUNK), dtype.itemsize
    plane = batch * time * heads * size * number  # bytes of q, k, v, out, or what tokens write
    column = batch * time * heads * 4  # beta
    system = chunks * CHUNK * CHUNK * 4  # the inverse of each chunk's system
    states = chunks * size * size * number
    inner = 2 * chunks * CHUNK * CHUNK * size  # FLOP of a product of [C, C] and [C, K]
    outer = 2 * chunks * CHUNK * size * size  # of [C, K] and [K, V]
    cube = 2 * chunks * CHUNK**3
    wide = number == 4
    # TF32 has half the rate of 16-bit products; those with the inverse are TF32 for all inputs
    slow = (3 if exact and wide else 1) * 2
    rate = slow if wide else 1

    def blocks(kernel: str) -> tuple[int, int]:
        """How many tiles cover K, and V."""
        cut = tiles(kernel, batch * heads, size, size, wide)
        return -(-size // cut.keys), -(-size // cut.columns)

    def of(
        name: str, back: bool, read: float, written: float, flops: float, again: float = 0
    ) -> Work:
        return Work("memory", name, back, read, written, again, tensor=flops)

    final = batch * heads * size * size * 4

    def follow(name: str, back: bool, moved: tuple[float, float]) -> Work:
        """A block of columns through all chunks: K S or K dS, the inverse times what is left, and
        K^T times that; each block loads k (float32: twice), beta and the inverses."""
        programs = blocks(name)[1]
        again = (programs * (2 if wide else 1) - 1) * plane + (programs - 1) * (system + column)
        return of(name, back, *moved, rate * 2 * outer + slow * inner, again)

    def meet(name: str, back: bool, moved: tuple[float, float]) -> Work:
        """Q K^T for each block of columns, which loads q and k, and products with a state and
        with the scores. The compiler makes two loops of that of inflow, and both load q."""
        programs = blocks(name)[1]
        flops = rate * ((programs + 1) * inner + outer)
        again = 2 * (programs - 1) + (programs if name == "inflow" else 0)
        return of(name, back, *moved, flops, again * plane)

    scanned = 2 * plane + column + system, plane + states + final
    return [
        # k k^T, and the inverse: by four products from blocks of 16 on
        of("prepare", False, plane + column, system, rate * inner + slow * 4 * cube),
        follow("scan", False, scanned),
        meet("outputs", False, (3 * plane + states, plane)),
        follow("scan", True, scanned),
        meet("inflow", True, (3 * plane, plane + states)),
        # backwards over chunks, with what inflow left
        follow(
            "retreat",
            True,
            (2 * plane + column + system + states, 2 * plane + states + final),
        ),
        # from d out, writes, targets and both states to dq, dk and d beta; for each tile of K the
        # first three again
        of(
            "gradients",
            True,
            6 * plane + column + 2 * states,
            2 * plane + column,
            rate * (3 * outer + 6 * inner),
            3 * blocks("gradients")[0] * plane,
        ),
    ]


# ---------------------------------------------------------------------------------- layers


def layer(
    config: SWHConfig, batch: int, time: int, dtype: torch.dtype = torch.bfloat16
) -> list[Work]:
    """Count a layer of the mixer `spectral_window` or `memory`, with kernels of one mode.

    Products read their inputs and weights once in `dtype`. What lies between them is counted as one
    pass over memory each, as if it were fused; plain torch takes several.
    """
    size = config.hidden_size
    works = [*_products(config, batch * time, dtype), *_between(config, batch * time, dtype)]
    works += convolution(batch, time, size, dtype)
    heads, width = cast(int, config.num_attention_heads), config.window
    works += window(batch, time, heads, config.head_dim, width, dtype)
    if config.mixer == "memory":
        parts = config.memory_heads
        works += memory(batch, time, parts, size // parts, dtype)
    return works


def _product(name: str, rows: int, k: int, n: int, dtype: torch.dtype) -> list[Work]:
    """A matrix product forward, and the two of its backward pass."""
    x, w, y = (count * dtype.itemsize for count in (rows * k, k * n, rows * n))
    tensor, single = _multiplied(2 * rows * k * n, dtype)
    return [
        Work("products", name, False, x + w, y, tensor=tensor, float32=single),
        Work("products", name, True, x + w + 2 * y, x + w, tensor=2 * tensor, float32=2 * single),
    ]


def _products(config: SWHConfig, rows: int, dtype: torch.dtype) -> list[Work]:
    names = ("q, k, v, conv. input", "W_local", "W_out", "gate and up", "down")
    works: list[Work] = []
    for name, (k, n) in zip(names, layer_products(config), strict=True):
        works += _product(name, rows, k, n, dtype)
    return works


def _pass(
    name: str, forward: tuple[float, float], backward: tuple[float, float], part: str = "between"
) -> list[Work]:
    """Bytes read and written in one pass over memory, forward and backward."""
    return [Work(part, name, False, *forward), Work(part, name, True, *backward)]


def _between(config: SWHConfig, rows: int, dtype: torch.dtype) -> list[Work]:
    plane = rows * config.hidden_size * dtype.itemsize
    hidden = rows * int(config.intermediate_size or 0) * dtype.itemsize
    works = [
        # twice a layer: x + branch, and its norm; back: the gradients of both and x, to that of x
        *_pass("residual sums and norms", (4 * plane, 4 * plane), (6 * plane, 2 * plane)),
        # norm of the convolution's output, plus the window's, whose gradient is that of the sum
        *_pass("fusion", (2 * plane, plane), (2 * plane, plane)),
        *_pass("SwiGLU", (2 * hidden, hidden), (3 * hidden, 2 * hidden)),
    ]
    if config.mixer == "memory":
        gates = 2 * config.memory_heads
        works += _product("gates of the memory", rows, config.hidden_size, gates, dtype)
        works += [
            *_pass(f"filter of {LAG} queries", (plane, plane), (2 * plane, plane)),
            *_pass("unit vectors", (2 * plane, 2 * plane), (4 * plane, 2 * plane)),
            *_pass("gated sum", (2 * plane, plane), (2 * plane, plane)),
        ]
        if config.short_convolution:
            moved = (3 * plane, 3 * plane), (6 * plane, 3 * plane)
            works += _pass("short convolution of q, k, v", *moved)
    return works


def ends(
    config: SWHConfig, batch: int, time: int, dtype: torch.dtype = torch.bfloat16
) -> list[Work]:
    """Count what a training step has once, whatever its number of layers."""
    rows, size, words = batch * time, config.hidden_size, config.vocab_size
    plane, logits = rows * size * dtype.itemsize, rows * words * dtype.itemsize
    read, written = (each * count_parameters(config) for each in ADAMW)
    return [
        *_pass("embedding", (plane, plane), (plane, 4 * words * size), "once"),
        *_pass("last norm", (plane, plane), (2 * plane, plane), "once"),
        *(
            Work("once", "head", w.backward, w.read, w.written, 0, w.tensor, w.float32)
            for w in _product("head", rows, size, words, dtype)
        ),
        *_pass("loss", (logits, 0), (logits, logits), "once"),
        Work("once", "AdamW", True, read, written),
    ]


# ---------------------------------------------------------------------------------- rows


def paper(mixer: str = "memory", width: int = WINDOWS[0]) -> SWHConfig:
    """Return the config whose layer is shown: the paper's size, the memory as it is recommended but
    for its window, with as many parameters as the model without."""
    config = SWHConfig(window=width)
    if mixer == config.mixer:
        return config
    fields = config.recorded() | recommended(config.hidden_size) | {"window": width}
    return match_parameters(SWHConfig(**fields), count_parameters(config))


def table(
    batch: int = 16,
    time: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    config: SWHConfig | None = None,
) -> list[Row]:
    """Return a row for each kernel and step of a layer, and of what a model has once.

    The window's kernels have rows for each of `WINDOWS`.

    Args:
        batch: B.
        time: T.
        dtype: of activations and weights.
        config: whose layer; default: `paper()`.

    Returns:
        Rows {part, kernel, pass, the fields of `Work` per token and channel, microseconds, bound,
        share}. share is of the layer's least time, forward and backward; None for what a model has
        once.
    """
    shown = paper() if config is None else config
    rows: list[Row] = []
    for width in WINDOWS:
        changed = _with_window(shown, width)
        works = layer(changed, batch, time, dtype)
        total = least(works)
        if width != WINDOWS[0]:
            works = [work for work in works if work.part == "window"]
        rows += [_row(work, batch * time * shown.hidden_size, total) for work in works]
    rows += [
        _row(work, batch * time * shown.hidden_size) for work in ends(shown, batch, time, dtype)
    ]
    order = list(PARTS)
    return sorted(rows, key=lambda row: (order.index(row["part"]), row["pass"] == "backward"))


def _with_window(config: SWHConfig, width: int) -> SWHConfig:
    return SWHConfig(**config.recorded() | {"window": width})


def _row(work: Work, elements: int, total: float | None = None) -> Row:
    def short(value: float) -> float:
        return float(f"{value:.4g}")

    fields = ("read", "written", "again", "tensor", "float32", "float64", "special")
    return {
        "part": work.part,
        "kernel": work.name,
        "pass": "backward" if work.backward else "forward",
        **{name: short(getattr(work, name) / elements) for name in fields},
        "microseconds": short(1e6 * work.floor),
        "bound": work.bound,
        "share": None if total is None else short(work.floor / total),
    }


def sums(
    batch: int = 16,
    time: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    folder: Path | None = None,
) -> list[Row]:
    """Return the least time of layers and of training steps.

    Args:
        batch: B.
        time: T.
        dtype: of activations and weights.
        folder: of measured times (results/gpu), or None.

    Returns:
        Rows {what, mixer, window, forward, backward, microseconds}; where the same step was
        measured also how it ran, measured (microseconds) and times (the least).
    """
    rows: list[Row] = []
    seen = {} if folder is None else _steps(folder, batch, time)
    for mixer in ("spectral_window", "memory"):
        for width in WINDOWS:
            config = paper(mixer, width)
            one = layer(config, batch, time, dtype)
            whole = config.num_hidden_layers * one + ends(config, batch, time, dtype)
            for name, works in (("layer", one), ("training step", whole)):
                back = [work for work in works if work.backward]
                row: Row = {"what": name, "mixer": mixer, "window": width}
                row["forward"] = round(1e6 * (least(works) - least(back)), 1)
                row["backward"] = round(1e6 * least(back), 1)
                row["microseconds"] = round(1e6 * least(works), 1)
                if name == "training step" and dtype == torch.bfloat16 and (mixer, width) in seen:
                    how, measured = seen[mixer, width]
                    row |= {"how": how, "measured": measured}
                    row["times"] = _times(measured, least(works))
                rows.append(row)
    return rows


def _times(microseconds: float, floor: float) -> float:
    return float(f"{microseconds / 1e6 / floor:.3g}")


def _measured(folder: Path, part: str) -> Iterator[Row]:
    """Rows of `part` that were measured on the card whose rates stand here."""
    for path in sorted(folder.glob(f"*/{part}.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if DEVICE in content["environment"]["processor"] and not content["dry_run"]:
            yield from (row for row in content["rows"] if row.get("milliseconds"))


def _steps(folder: Path, batch: int, time: int) -> dict[tuple[str, int], tuple[str, float]]:
    """How a training step of this shape ran fastest, and its microseconds, by mixer and window."""
    mixers = {MIXERS[mixer].label: mixer for mixer in ("spectral_window", "memory")}
    found: dict[tuple[str, int], tuple[str, float]] = {}
    for row in _measured(folder, "train"):
        name, _, how = row["contestant"].partition(", ")
        mixer = mixers.get(name)
        if mixer is None or (row["batch"], row["length"]) != (batch, time):
            continue
        if how not in WAYS and (how or mixer == "memory"):  # the first results had other heads
            continue
        key, spent = (mixer, row.get("window", WINDOWS[0])), 1000 * row["milliseconds"]
        if key not in found or spent < found[key][1]:
            found[key] = how or WAYS[0], spent
    return found


def compare(folder: Path) -> list[Row]:
    """Return measured times of our operators beside the least time of their shape.

    Args:
        folder: of measured times (results/gpu).

    Returns:
        Rows {operator, how, shape, window, dtype, pass, least, measured: microseconds, times}.
    """
    rows: list[Row] = []
    for each in _measured(folder, "spectral"):
        if str(each.get("contestant")).startswith("triton"):
            batch, time, channels = each["shape"]
            works = convolution(batch, time, channels, getattr(torch, each["dtype"]))
            about = {"operator": "convolution", "window": None}
            rows.append(about | _beside(each, works, each["direction"] == "both"))
    for each in _measured(folder, "window"):
        if each.get("contestant") == "ours":
            batch, time, heads, size = each["shape"]
            works = window(batch, time, heads, size, each["window"], getattr(torch, each["dtype"]))
            about = {"operator": "window", "window": each["window"]}
            rows.append(about | _beside(each, works, each["pass"] != "forward"))
    for each in _measured(folder, "delta"):
        if each.get("contestant") == "ours" and each["shape"][3] == each["shape"][4]:
            batch, time, heads, size = each["shape"][:4]
            works = memory(batch, time, heads, size, getattr(torch, each["dtype"]))
            about = {"operator": "memory", "window": None}
            rows.append(about | _beside(each, works, each["pass"] != "forward"))
    return rows


def _beside(row: Row, works: list[Work], backward: bool) -> Row:
    floor = least([work for work in works if backward or not work.backward])
    measured = 1000 * row["milliseconds"]
    return {
        "how": "graph" if "graph" in row["contestant"] else "eager",
        "shape": row["shape"],
        "dtype": row["dtype"],
        "pass": "both" if backward else "forward",
        "least": round(1e6 * floor, 1),
        "measured": round(measured, 1),
        "times": _times(measured, floor),
    }


# ---------------------------------------------------------------------------------- as text

Cells = tuple[tuple[str, ...], list[tuple[str, ...]]]  # a head, and rows
PARTS = {
    "convolution": "convolution",
    "window": "window",
    "memory": "memory",
    "products": "products",
    "between": "between",
    "once": "model",
}


def kernel_cells(rows: list[Row]) -> Cells:
    """Return the rows of `table` as cells: a head, and lines with a title above each part."""
    head = ("", "in", "out", "tensor", "other", "us", "limit", "%")
    lines: list[tuple[str, ...]] = []
    title = ""
    for row in rows:
        if title != (title := f"{PARTS[row['part']]} {row['pass']}"):
            lines.append((title, *[""] * (len(head) - 1)))
        lines.append((f"  {row['kernel']}", *number_cells(row), row["bound"], _share(row)))
    return head, lines


def number_cells(row: Row) -> list[str]:
    """Return bytes in and out, operations on tensor cores and others, and microseconds."""
    other = _short(row["float64"]) + " f64" if row["float64"] else _short(row["float32"])
    counts = (_short(row[name]) for name in ("read", "written", "tensor"))
    return [*counts, other, f"{row['microseconds']:.1f}"]


def _share(row: Row) -> str:
    return "" if row["share"] is None else f"{100 * row['share']:.1f}"


def _short(value: float) -> str:
    if value < 0.005:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def sum_cells(rows: list[Row]) -> Cells:
    """Return the rows of `sums` as cells: a head, and lines."""
    head = ("least ms", "forward", "backward", "both", "measured", "times")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        name = f"{row['what']}, {MIXERS[row['mixer']].label}, W={row['window']}"
        times = (f"{row[key] / 1000:.3g}" for key in ("forward", "backward", "microseconds"))
        measured = (
            (f"{row['measured'] / 1000:.3g}", f"{row['times']:.3g}") if "times" in row else ("", "")
        )
        lines.append((name, *times, *measured))
    return head, lines


def measured_cells(rows: list[Row]) -> Cells:
    """Return the rows of `compare` as cells: a head, and lines."""
    head = ("us", "dtype", "pass", "how", "least", "measured", "times")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        name = row["operator"] + (f" W={row['window']}" if row["window"] else "")
        shape = "x".join(str(size) for size in row["shape"])
        times = (f"{row['least']:.0f}", f"{row['measured']:.0f}", f"{row['times']:.3g}")
        lines.append((f"{name} {shape}", row["dtype"], row["pass"], row["how"], *times))
    return head, lines
