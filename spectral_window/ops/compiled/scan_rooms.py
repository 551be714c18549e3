"""What the scan's loops work with: the words of their job, a part's share of it, and the `room` in
which the part keeps its numbers.

A part of the work (see `threads`) is a group of the batch's rows and a slice of the
channels. Its room is a few
float64 planes of [M, width], the width rounded up to whole `Lanes`, so that only tensors, never a
room, end in a partial vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from spectral_window.errors import UserError
from spectral_window.ops.compiled.addresses import FLOAT32, FLOAT64, INT64, address, optional
from spectral_window.ops.compiled.float64_lanes import LANES
from spectral_window.ops.compiled.scan_modes import exponentiate
from spectral_window.ops.compiled.threads import float32s, float64s, inner, int64s

BLOCK = 64  # positions between kept states
ROWS = 4  # of time that a state stays in registers
LINE = 16  # slices begin at multiples of it, so that no two threads write one cache line

# The words of a job.
DECAY, FREQUENCY, GAIN, DOUBLE, AT, BATCH, TIME, CHANNELS, MODES, CUTS, GROUPS = range(2, 13)
STREAM, KEPT, REFUSED, U = range(13, 17)
Y, STATE, FINAL = range(17, 20)  # forwards
G, DU, END, BEGIN, SUMS = range(17, 22)  # backwards
# The planes of a part's working memory, each [M, width] float64: z, gain, h; backwards also s,
# sum g s, sum g Re h, l and sum conj(l) s. Then ROWS rows in which modes are summed.
ZR, ZI, W, HR, HI, SR, SI, QR, QI, GG, LR, LI, ER, EI = range(14)


def _input_words(parts, decay, frequency, gain, at, batch, time, channels, modes, cuts, groups):
    """The words DECAY ... GROUPS: modes [D, M], all float64 or all float32; positions [B, T]."""
    dtype, count = (FLOAT64 if decay.dtype is FLOAT64 else FLOAT32), channels * modes
    kernel = address(decay, dtype, count), address(frequency, dtype, count)
    if parts != cuts * groups or min(cuts, groups) < 1:
        raise UserError(f"{parts} parts (compiled code): expected {groups} groups, {cuts} slices")
    at = optional(at, INT64, batch * time)
    double = dtype is FLOAT64
    return (
        *kernel,
        optional(gain, dtype, count),
        double,
        at,
        batch,
        time,
        channels,
        modes,
        cuts,
        groups,
    )


def forward_words(dtype: Any) -> Callable[..., tuple[int, ...]]:
    """The words of a forward pass over u and y in `dtype`; see `scan.run`."""

    def words(parts, inputs, stream, kept, refused, u, y, state, final):
        *_, batch, time, channels, modes, _, _ = inputs
        count, numbers = batch * time * channels, batch * channels * modes * 2
        return (
            *_input_words(parts, *inputs),
            stream,
            optional(kept, FLOAT64, batch * -(-time // BLOCK) * 2 * modes * channels),
            optional(refused, INT64, 1),
            address(u, dtype, count),
            address(y, dtype, count),
            optional(state, FLOAT64, numbers),
            address(final, FLOAT64, numbers),
        )

    return words


def backward_words(dtype: Any) -> Callable[..., tuple[int, ...]]:
    """The words of a backward pass over u, its gradient and that of y in `dtype`."""

    def words(parts, inputs, stream, kept, u, g, du, end, begin, sums):
        *_, batch, time, channels, modes, _, groups = inputs
        count, numbers = batch * time * channels, batch * channels * modes * 2
        return (
            *_input_words(parts, *inputs),
            stream,
            address(kept, FLOAT64, batch * -(-time // BLOCK) * 2 * modes * channels),
            0,
            address(u, dtype, count),
            address(g, dtype, count),
            address(du, dtype, count),
            address(end, FLOAT64, numbers),
            address(begin, FLOAT64, numbers),
            address(sums, FLOAT64, groups * 3 * channels * modes),
        )

    return words


always = numba.njit(forceinline=True, error_model="numpy")


@inner
def _gather(source, job, begin, width, room, plane):
    """Slice `begin`, `width` of [D, M] into a plane; whether all are finite."""
    modes = job[MODES]
    padded = padded_to(width)
    finite = True
    for m in range(modes):
        first = (plane * modes + m) * padded
        for j in range(width):
            room[first + j] = source[(begin + j) * modes + m]
            finite &= abs(room[first + j]) < np.inf
    return finite


@inner
def dynamics(job, begin, width, room):
    """Fill the planes of z and gain; False where the call asked to refuse modes that are not
    finite or grow, and some are."""
    size = job[MODES] * padded_to(width)
    count = job[CHANNELS] * job[MODES]
    right = True
    room[W * size : (W + 1) * size] = 1.0
    for plane, source in ((ZR, job[DECAY]), (ZI, job[FREQUENCY]), (W, job[GAIN])):
        if source != 0:
            if job[DOUBLE]:
                right &= _gather(float64s(source, count), job, begin, width, room, plane)
            else:
                right &= _gather(float32s(source, count), job, begin, width, room, plane)
    for i in range(size):
        right &= room[i] >= 0.0
    if job[REFUSED] != 0 and not right:
        int64s(job[REFUSED], 1)[0] = 1
        return False
    exponentiate(room, size)
    return True


# ---------------------------------------------------------------- parts and their memory


@always
def padded_to(width):
    return (width + LANES - 1) // LANES * LANES


@inner
def numbers(job):
    return job[BATCH] * job[TIME] * job[CHANNELS]


@inner
def slice_of(job, part):
    """(first batch row, last + 1, first channel, channels) of a part."""
    batch, channels, cuts, groups = job[BATCH], job[CHANNELS], job[CUTS], job[GROUPS]
    group, cut = part // cuts, part % cuts
    begin = channels * cut // cuts // LINE * LINE
    end = channels if cut == cuts - 1 else channels * (cut + 1) // cuts // LINE * LINE
    return batch * group // groups, batch * (group + 1) // groups, begin, end - begin


@inner
def new_room(planes, job, width):
    """Zeros for `planes` planes and ROWS rows, at a cache line's beginning."""
    count = (planes * job[MODES] + ROWS) * padded_to(width)
    memory = np.zeros(count + 8)
    shift = -(memory.ctypes.data // 8) % 8
    return memory[shift : shift + count]


@inner
def read_state(job, address, b, begin, width, room, plane):
    """Row b of a state [B, D, M, 2] (address 0: zeros) into two planes."""
    modes, padded = job[MODES], padded_to(width)
    size = modes * padded
    room[plane * size : (plane + 2) * size] = 0.0
    if address != 0:
        h = float64s(address, job[BATCH] * job[CHANNELS] * modes * 2)
        for m in range(modes):
            at, to = ((b * job[CHANNELS] + begin) * modes + m) * 2, plane * size + m * padded
            for j in range(width):
                room[to + j] = h[at + j * modes * 2]
                room[to + size + j] = h[at + j * modes * 2 + 1]


@inner
def write_state(job, address, b, begin, width, room, plane):
    modes, padded = job[MODES], padded_to(width)
    size = modes * padded
    h = float64s(address, job[BATCH] * job[CHANNELS] * modes * 2)
    for m in range(modes):
        to, at = ((b * job[CHANNELS] + begin) * modes + m) * 2, plane * size + m * padded
        for j in range(width):
            h[to + j * modes * 2] = room[at + j]
            h[to + j * modes * 2 + 1] = room[at + size + j]


@inner
def kept_states(job):
    blocks = (job[TIME] + BLOCK - 1) // BLOCK
    return float64s(job[KEPT], job[BATCH] * blocks * 2 * job[MODES] * job[CHANNELS])


@inner
def kept_place(job, b, t, begin):
    """The index, in the kept states [B, blocks, 2, M, D], of the block that holds position t."""
    blocks = (job[TIME] + BLOCK - 1) // BLOCK
    return (b * blocks + t // BLOCK) * 2 * job[MODES] * job[CHANNELS] + begin
