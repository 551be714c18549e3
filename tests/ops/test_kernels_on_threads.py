"""Kernels on torch's threads: every tile runs once, on any number of threads, with or without a
team; every argument arrives; bfloat16 is rounded as torch rounds it."""

from __future__ import annotations

import struct
import threading
from typing import Annotated, NamedTuple

import pytest
import torch

pytest.importorskip("numba")

from spectral_window.ops.compiled import threads as on_threads
from spectral_window.ops.compiled.addresses import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    Address,
    address,
)
from spectral_window.ops.compiled.simd import (
    bfloat16s,
    float32s,
    float64s,
    int64s,
    narrow,
    widen,
)
from spectral_window.ops.compiled.threads import claim_tile, kernel


class Counts(NamedTuple):
    counts: Address


@kernel(Counts, lambda tiles, counts: Counts(address(counts, INT64, tiles)))
def count_tiles(args):
    tile = claim_tile(args)
    while tile >= 0:
        int64s(args.counts, args.tiles)[tile] += 1
        tile = claim_tile(args)


class Sums(NamedTuple):
    x: Address
    y: Address
    n: int


@kernel(
    Sums, lambda tiles, x, y, n: Sums(address(x, FLOAT32, tiles * n), address(y, FLOAT64, tiles), n)
)
def add_up(args):
    tile = claim_tile(args)
    while tile >= 0:
        n = args.n
        x, y = float32s(args.x, n * args.tiles), float64s(args.y, args.tiles)
        total = 0.0
        for i in range(n):
            total += x[tile * n + i]
        y[tile] = total
        tile = claim_tile(args)


class Rounded(NamedTuple):
    x: Address
    half: Address
    y: Address
    n: int


@kernel(
    Rounded,
    lambda tiles, x, half, y, n: Rounded(
        address(x, FLOAT32, n), address(half, BFLOAT16, n), address(y, FLOAT32, n), n
    ),
)
def round_trip(args):
    tile = claim_tile(args)
    while tile >= 0:
        n = args.n
        x, bits, y = float32s(args.x, n), bfloat16s(args.half, n), float32s(args.y, n)
        for i in range(n):
            bits[i] = narrow(x[i])
            y[i] = widen(bits[i])
        tile = claim_tile(args)


@kernel(Counts, lambda tiles, x: Counts(address(x, INT64, 2)))
def fail_at_once(args):
    while claim_tile(args) >= 0:
        int64s(args.counts, 1)[:] = int64s(args.counts, 2)


class Entry(NamedTuple):
    first: int
    second: int


class Mixed(NamedTuple):
    """Fields of every kind, in an order that needs padding."""

    flag: bool
    scale: float
    other: bool
    count: int
    table: Annotated[bytes, Entry, 3]
    last: bool
    y: Address


def mixed(tiles, flag, scale, other, table, last, y):
    entries = struct.pack(f"{len(table)}q", *table)
    return Mixed(flag, scale, other, len(table) // 2, entries, last, address(y, FLOAT64, 8))


@kernel(Mixed, mixed)
def read_fields(args):
    y = float64s(args.y, 8)
    while claim_tile(args) >= 0:
        y[0], y[1], y[2], y[3] = args.flag, args.scale, args.other, args.last
        for i in range(args.count):
            y[4 + 2 * i], y[5 + 2 * i] = args.table[i].first, args.table[i].second


@pytest.fixture(params=["team", "no team"])
def team(request, monkeypatch):
    if request.param == "no team":
        monkeypatch.setattr(on_threads, "_team", lambda: None)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tiles", [0, 1, 2, 7, 1000])
def test_every_tile_runs_once(tiles, team, threads):
    counts = torch.zeros(max(tiles, 1), dtype=torch.int64)
    count_tiles(tiles, counts)
    assert counts.tolist() == ([1] * tiles if tiles else [0])


def test_kernels_called_from_several_threads_at_once_do_not_mix(team, threads):
    def call(index):
        x = torch.full((8, 1000), float(index))
        y = torch.empty(8, dtype=torch.float64)
        for _ in range(50):
            y.zero_()
            add_up(8, x, y, 1000)
            assert y.tolist() == [1000.0 * index] * 8
        done.append(index)

    done: list[int] = []
    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done) == [0, 1, 2, 3]


def test_bfloat16_is_rounded_as_torch_rounds_it():
    torch.manual_seed(0)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3.4e38, 1.00390625]
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)
    x = torch.cat((torch.tensor(special), torch.randn(1000), bits.view(torch.float32)))
    half, y = torch.empty(len(x), dtype=torch.bfloat16), torch.empty_like(x)
    round_trip(1, x, half, y, len(x))
    assert torch.equal(half.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(half[number], x.bfloat16()[number])
    assert torch.equal(y[number], half.float()[number])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_inside_is_not_taken_for_a_result(team, threads):
    with pytest.raises(RuntimeError, match="fail_at_once failed"):
        fail_at_once(1000, torch.zeros(2, dtype=torch.int64))


def test_every_field_arrives(team, threads):
    y = torch.zeros(8, dtype=torch.float64)
    read_fields(1, True, 0.1, False, (3, -4, 1 << 40, 6), True, y)
    assert y.tolist() == [1.0, float(torch.tensor(0.1)), 0.0, 1.0, 3.0, -4.0, 2.0**40, 6.0]
    read_fields(1, False, -2.5, True, (), False, y)
    assert y.tolist()[:4] == [0.0, -2.5, 1.0, 0.0]
