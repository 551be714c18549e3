"""Kernels on torch's threads: every part runs once, on any number of threads, with or without a
team; bfloat16 is rounded as torch rounds it."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("numba")

from spectral_window.ops.compiled import threads as on_threads
from spectral_window.ops.compiled.addresses import BFLOAT16, FLOAT32, FLOAT64, INT64, address
from spectral_window.ops.compiled.threads import (
    bfloat16s,
    float32s,
    float64s,
    int64s,
    kernel,
    narrow,
    take,
    widen,
)


@kernel(lambda parts, counts: (address(counts, INT64, parts),))
def count_parts(job):
    part = take(job)
    while part >= 0:
        int64s(job[2], job[1])[part] += 1
        part = take(job)


@kernel(lambda parts, x, y, n: (address(x, FLOAT32, parts * n), address(y, FLOAT64, parts), n))
def add_up(job):
    part = take(job)
    while part >= 0:
        n = job[4]
        x, y = float32s(job[2], n * job[1]), float64s(job[3], job[1])
        total = 0.0
        for i in range(n):
            total += x[part * n + i]
        y[part] = total
        part = take(job)


@kernel(
    lambda parts, x, half, y, n: (
        address(x, FLOAT32, n),
        address(half, BFLOAT16, n),
        address(y, FLOAT32, n),
        n,
    )
)
def round_trip(job):
    part = take(job)
    while part >= 0:
        n = job[5]
        x, bits, y = float32s(job[2], n), bfloat16s(job[3], n), float32s(job[4], n)
        for i in range(n):
            bits[i] = narrow(x[i])
            y[i] = widen(bits[i])
        part = take(job)


@kernel(lambda parts, x: (address(x, INT64, 2),))
def fail_at_once(job):
    while take(job) >= 0:
        int64s(job[2], 1)[:] = int64s(job[2], 2)


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


@pytest.mark.parametrize("parts", [0, 1, 2, 7, 1000])
def test_every_part_runs_once(parts, team, threads):
    counts = torch.zeros(max(parts, 1), dtype=torch.int64)
    count_parts(parts, counts)
    assert counts.tolist() == ([1] * parts if parts else [0])


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
