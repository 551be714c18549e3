"""What the window's kernels stand on: the words of a job, the position of a column, RoPE's angles,
and rows of q, k, v coming into a kernel's scratch and leaving it.

In the scratch everything is float32, padded with zeros to whole vectors, and q and k are turned to
their positions. The pairs (cos, sin) of a position are found once for all heads: from cos and sin
in float64 at the multiple of 64 below it, by at most 63 turns of one step (an error of 1e-14), then
rounded. So they depend on the position alone, never on where a call begins.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    dense,
    optional,
    settled,
    strided,
)
from spectral_window.ops.compiled.float32_lanes import (
    BYTES,
    LANES,
    fused,
    load,
    load_bfloat16,
    prefetch,
    spread,
    store,
    store_bfloat16,
    turned,
)
from spectral_window.ops.compiled.threads import (
    bfloat16s,
    float32s,
    float64s,
    inner,
    int64s,
    kernel,
    narrow,
    take,
    widen,
)

ANCHOR = 64  # an angle is exact at multiples of 64, and follows from there in float64

# the words of a job: addresses, and strides in bytes
Q, Q_ROW, Q_TIME, Q_HEAD, K, K_ROW, K_TIME, K_HEAD, V, V_ROW, V_TIME, V_HEAD = range(2, 14)
BATCH, TIME, HEADS, KEY_DIM, VALUE_DIM, WINDOW, HALF = range(14, 21)  # HALF: 1 for bfloat16
POSITIONS, BEGIN = 21, 22  # [B, T]; or where each row begins [B]; or neither, for 0
FREQUENCY, TURNS = 23, 24  # of RoPE, or 0: see `_frequencies`; (cos, sin) [rows, T, K / 2]
RING_KEY, RING_VALUE = 25, 26  # of the state before [B, 2W, H, *], or 0
OUT, NEW_KEY, NEW_VALUE, NEW_POSITION = range(27, 31)  # backward: their gradients, or 0
DQ, DK, DV, D_RING_KEY, D_RING_VALUE = range(31, 36)  # backward: what to write
SHARES = 31  # a step: the parts into which the heads of a row are divided

ZERO, ONE = np.float32(0), np.float32(1)


# ---------------------------------------------------------------- positions


@inner
def position(job, b, c):
    """The position of column c of row b: -1 for padding. Columns before 0 count on backwards."""
    if job[POSITIONS]:
        return int64s(job[POSITIONS] + 8 * b * job[TIME], job[TIME])[max(c, 0)] + min(c, 0)
    return c + (int64s(job[BEGIN], job[BATCH])[b] if job[BEGIN] else 0)


@inner
def oldest(p, window):
    """The first position that a query at p sees."""
    return max(p // window - 1, 0) * window


@inner
def last_token(job, b):
    """The last column of row b that is no padding, or -1."""
    c = job[TIME] - 1
    while c >= 0 and position(job, b, c) < 0:
        c -= 1
    return c


@inner
def advance(re, im, cos, sin):
    for i in range(re.shape[0]):
        real = re[i] * cos[i] - im[i] * sin[i]
        im[i] = re[i] * sin[i] + im[i] * cos[i]
        re[i] = real


@inner
def write_pairs(re, im, out):
    for i in range(re.shape[0]):
        out[2 * i] = re[i]
        out[2 * i + 1] = im[i]


@inner
def fill_turns(job, b, begin, end, out, room):
    """RoPE's (cos, sin) of columns begin ... end - 1 at `out`; room for twice K numbers, padded."""
    pairs = blocks_of(job[KEY_DIM]) * LANES // 2
    frequency = float64s(job[FREQUENCY], pairs)
    cos = float64s(job[FREQUENCY] + 8 * pairs, pairs)
    sin = float64s(job[FREQUENCY] + 16 * pairs, pairs)
    re, im = room[:pairs], room[pairs : 2 * pairs]
    before = -2
    for c in range(begin, end):
        p = position(job, b, c)
        steps = 1
        if p != before + 1 or p % ANCHOR == 0:
            steps = max(p, 0) % ANCHOR
            for i in range(pairs):
                re[i] = math.cos((max(p, 0) - steps) * frequency[i])
                im[i] = math.sin((max(p, 0) - steps) * frequency[i])
        for _ in range(steps):
            advance(re, im, cos, sin)
        before = p
        write_pairs(re, im, float32s(out + 8 * pairs * (c - begin), 2 * pairs))


@inner
def turns_row(job, b):
    """The row of TURNS that row b uses: the first, where it begins at the same position."""
    return 0 if not job[POSITIONS] and position(job, b, 0) == position(job, 0, 0) else b


@inner
def turns_at(job, b, c):
    """The address of (cos, sin) of column c in row b; 0 without RoPE."""
    size = blocks_of(job[KEY_DIM]) * BYTES
    return job[TURNS] + (turns_row(job, b) * job[TIME] + c) * size if job[TURNS] else 0


# ---------------------------------------------------------------- rows in and out of the scratch


@inner
def blocks_of(size):
    return (size + LANES - 1) // LANES


@inner
def ask(row, half, size):
    """Ask for a row that is fetched soon: rows of a head lie too far apart to be foreseen."""
    for line in range(0, size * (2 if half else 4), 64):
        prefetch(row + line)


@inner
def fetch(source, half, size, turns, scale, target):
    """Bring a row of `size` numbers to `target` in float32, padded with zeros, turned and scaled.

    Returns a vector of zeros, or with a NaN where the row is not finite.
    """
    blocks = blocks_of(size)
    if size % LANES:
        clear(target, blocks)
        numbers = float32s(target, size)
        if half:
            bits = bfloat16s(source, size)
            for i in range(size):
                numbers[i] = widen(bits[i])
        else:
            numbers[:] = float32s(source, size)
        source, half = target, 0
    doubt = spread(ZERO)
    for i in range(blocks):
        x = load_bfloat16(source + i * BYTES // 2) if half else load(source + i * BYTES)
        if turns:
            x = turned(x, load(turns + i * BYTES), False)
        x = x * spread(scale)
        store(target + i * BYTES, x)
        doubt = fused(x, spread(ZERO), doubt)
    return doubt


@inner
def put(source, half, size, turns, scale, target):
    """Write a row of the scratch to `target`, scaled, turned back and rounded once."""
    final, narrowed = (source, 0) if size % LANES else (target, half)
    for i in range(blocks_of(size)):
        x = load(source + i * BYTES) * spread(scale)
        if turns:
            x = turned(x, load(turns + i * BYTES), True)
        if narrowed:
            store_bfloat16(final + i * BYTES // 2, x)
        else:
            store(final + i * BYTES, x)
    if size % LANES:
        numbers = float32s(source, size)
        if half:
            bits = bfloat16s(target, size)
            for i in range(size):
                bits[i] = narrow(numbers[i])
        else:
            float32s(target, size)[:] = numbers


@inner
def copy_row(job, source, size, turns, target, between):
    fetch(source, job[HALF], size, turns, ONE, between)
    put(between, job[HALF], size, 0, ONE, target)


@inner
def aligned(room):
    return (room.ctypes.data + BYTES - 1) // BYTES * BYTES


@inner
def clear(address, vectors):
    for i in range(vectors):
        store(address + i * BYTES, spread(ZERO))


@inner
def row_of(job, which, b, c, h):
    """Address of row b, column c, head h of Q, K or V."""
    return job[which] + b * job[which + 1] + c * job[which + 2] + h * job[which + 3]


@inner
def number_bytes(job):
    return 2 if job[HALF] else 4


@inner
def out_row(job, which, b, c, h, size):
    """The same of a contiguous tensor [B, T, H, size]."""
    return job[which] + ((b * job[TIME] + c) * job[HEADS] + h) * size * number_bytes(job)


@inner
def ring_row(job, which, b, p, h, size):
    """The same of a ring [B, 2W, H, size], for position p."""
    slots = 2 * job[WINDOW]
    return job[which] + ((b * slots + p % slots) * job[HEADS] + h) * size * number_bytes(job)


# ---------------------------------------------------------------- from Python


class Call(NamedTuple):
    """What all kernels of the window begin with.

    q, k [B, T, H, K], v [B, T, H, V]; frequency and turns: of RoPE, or None; key, value [B, 2W, H,
    *]: the ring of the state, or None; begin [B] int64: where a row goes on, only with a ring;
    positions [B, T] int64, which count on (see `window.check_positions`), or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    window: int
    frequency: Tensor | None
    turns: Tensor | None
    key: Tensor | None
    value: Tensor | None
    begin: Tensor | None
    positions: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int,
        theta: float | None,
        ring: tuple[Tensor | None, Tensor | None],
        begin: Tensor | None,
        positions: Tensor | None,
        *,
        turns: bool = True,
    ) -> Call:
        """From an operator's arguments. `turns`: with memory for RoPE's angles of all columns."""
        q, k, v = (settled(x if x.stride(3) == 1 else x.contiguous()) for x in (q, k, v))
        frequency = None if theta is None else _frequencies(q.shape[3], theta)
        place = None
        if turns and theta is not None:
            rows = 1 if positions is None and begin is None else q.shape[0]
            shape = rows, q.shape[1], padded(q.shape[3])
            place = torch.empty(shape, dtype=torch.float32, device=q.device)
        key, value, begin, positions = (
            x if x is None else dense(x) for x in (*ring, begin, positions)
        )
        return cls(q, k, v, window, frequency, place, key, value, begin, positions)

    @property
    def numbers(self) -> tuple[Any, int, int, int, int]:
        """(dtype, numbers of q, of v, of the ring's keys, of its values)."""
        batch, time, heads, key_dim = self.q.shape
        row, ring, value_dim = time * heads, 2 * self.window * heads, self.v.shape[3]
        sizes = (row * key_dim, row * value_dim, ring * key_dim, ring * value_dim)
        return self.q.dtype, *(batch * size for size in sizes)  # type: ignore[return-value]

    def words(self) -> tuple[int, ...]:
        """Q ... RING_VALUE."""
        q, k, v, window, frequency, turns, key, value, begin, positions = self
        batch, time, heads, key_dim = shape = q.shape
        value_dim, dtype = v.shape[3], q.dtype
        if dtype is not FLOAT32 and dtype is not BFLOAT16:
            raise UserTypeError(f"{dtype} (compiled window): expected float32 or bfloat16")
        if window < 1 or (key is None) != (value is None) or (key is None) > (begin is None):
            raise UserError("a position without keys and values (compiled window): pass all three")
        rows = 1 if positions is None and begin is None else batch
        pairs, ring = padded(key_dim), batch * 2 * window * heads
        return (
            *strided(q, dtype, shape),
            *strided(k, dtype, shape),
            *strided(v, dtype, (batch, time, heads, value_dim)),
            *(batch, time, heads, key_dim, value_dim, window, dtype is BFLOAT16),
            optional(positions, INT64, batch * time),
            optional(begin, INT64, batch),
            optional(frequency, FLOAT64, 3 * pairs // 2),
            optional(turns, FLOAT32, rows * time * pairs),
            optional(key, dtype, ring * key_dim),
            optional(value, dtype, ring * value_dim),
        )


def expect_parts(parts: int, wanted: int) -> None:
    if parts != wanted:
        raise UserError(f"{parts} parts (compiled window): expected {wanted}")


def _turns_words(parts, call):
    if call.turns is None or call.frequency is None:
        raise UserError("no angles (compiled window): nothing to turn by")
    rows = 1 if call.positions is None and call.begin is None else call.q.shape[0]
    expect_parts(parts, rows * -(-call.q.shape[1] // ANCHOR))
    return call.words()


@kernel(_turns_words)
def find_turns(job):
    """RoPE's (cos, sin) of all columns. Parts: (row, ANCHOR columns)."""
    room = np.empty(2 * (job[KEY_DIM] + LANES))
    runs = (job[TIME] + ANCHOR - 1) // ANCHOR
    part = take(job)
    while part >= 0:
        b, begin = part // runs, part % runs * ANCHOR
        if turns_row(job, b) == b:
            end = min(begin + ANCHOR, job[TIME])
            fill_turns(job, b, begin, end, turns_at(job, b, begin), room)
        part = take(job)


@lru_cache
def _frequencies(key_dim: int, theta: float) -> Tensor:
    """RoPE's frequencies, and cos and sin of one step: [3, K / 2 padded] float64."""
    frequency = np.zeros(padded(key_dim) // 2)
    frequency[: key_dim // 2] = theta ** -(np.arange(0, key_dim, 2) / key_dim)
    return torch.from_numpy(np.stack((frequency, np.cos(frequency), np.sin(frequency))))


def padded(size: int) -> int:
    """The next multiple of a vector's lanes."""
    return -(-size // LANES) * LANES
