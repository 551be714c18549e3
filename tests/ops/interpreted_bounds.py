"""No kernel loads or stores outside its tensors, at the edges of chunks and beyond 2^31 elements.

Collected by `test_triton_bounds` in a process of its own; run alone as
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_bounds.py`.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from spectral_window.ops import triton_delta, triton_delta_kernels, triton_spectral, triton_window
from spectral_window.ops import triton_window_stream as stream
from tests.ops.bounds import checked, meta
from tests.ops.machine_code import module_of

HUGE = 65_536, 130, 6, 128, 128  # 6.5e9 elements of q, last chunk of 2 tokens


def remember(shape, dtype=torch.float32, gated=False, most=2):
    """The memory forwards and backwards."""
    batch, time, heads, key, value = shape
    q, k = (meta(batch, time, heads, key, dtype=dtype) for _ in range(2))
    v, beta = meta(batch, time, heads, value, dtype=dtype), meta(batch, time, heads)
    decay = meta(batch, time, heads) if gated else None
    state = meta(batch, heads, key, value) if gated else None
    positions = meta(batch, time, dtype=torch.int64) if gated else None
    call = q, k, v, beta, decay, state, positions
    with checked(most=most) as done:
        out, final, solved, gates = triton_delta._run(*call)
        triton_delta._run_backward(*call, solved, gates, out, final)
    return done


@pytest.mark.parametrize("length", [1, 65])
def test_the_memory_stays_inside_its_tensors(length):
    done = remember((4, length, 6, 128, 128))
    assert set(done.launches) == {"prepare", "scan", "outputs", "inflow", "retreat", "gradients"}
    assert done.accesses > 100


@pytest.mark.parametrize("size", [20, 192])
def test_the_memory_with_documents_stays_inside_its_tensors(size):
    remember((2, 70, 3, size, size + 1), gated=True)


def test_the_memory_stays_inside_beyond_2_31_elements():
    remember(HUGE, torch.bfloat16, gated=True, most=1)


def convolve(batch, time, channels, modes=2, dtype=torch.float32, most=3):
    u, gain = meta(batch, time, channels, dtype=dtype), meta(channels, modes)
    positions = meta(batch, time, dtype=torch.int64)
    state = meta(batch, channels, modes, 2, dtype=torch.float64)
    dynamics = meta(channels, modes), meta(channels, modes)
    with checked(most=most) as done:
        y, final, starts = triton_spectral._run(u, *dynamics, gain, state, positions)
        triton_spectral._run_backward(u, *dynamics, gain, positions, starts, y, final)
    return done


def test_the_convolution_stays_inside_its_tensors():
    done = convolve(2, 37, 70)
    assert set(done.launches) == {"dynamics", "ends", "carry", "outputs", "gradients", "finish"}
    convolve(1, 1, 3)


def test_the_convolution_stays_inside_beyond_2_31_elements():
    convolve(4_096, 700, 768, modes=1, dtype=torch.bfloat16, most=1)


def attend(batch, time, heads, size, window, dtype=torch.float32, most=3, places=None):
    """Window attention; with `places` tokens before the row, tables say which token is where."""
    prefix = places or 0
    q = meta(batch, time, heads, size, dtype=dtype)
    k, v = (meta(batch, prefix + time, heads, size, dtype=dtype) for _ in range(2))
    tables = [None, None]
    if places is not None:
        tables = [meta(batch, time, dtype=torch.int32) for _ in range(2)]
    call = q, k, v, window, 1e4, *tables
    with checked({"order": time - 1, "low": 0}, most) as done:
        out, lse = stream._run(*call)
        stream._run_backward(*call, out, lse, out)
        if places is None:
            triton_window._last_two_chunks(k, v, window, 1e4)
    return done


def test_the_window_stays_inside_its_tensors():
    done = attend(2, 70, 3, 20, 16)
    assert set(done.launches) == {
        *("find_turns", "attend", "attend_queries", "attend_keys", "remember")
    }
    attend(2, 70, 3, 20, 16, places=32)
    attend(1, 1, 1, 8, 4)


def test_the_window_stays_inside_beyond_2_31_elements():
    attend(65_536, 300, 12, 64, 32, torch.bfloat16, most=1)


# --- deliberate bugs ----------------------------------------------------------------------------


def test_a_buffer_that_is_a_chunk_short_would_show(monkeypatch):
    def short(self, *shape, dtype):
        return meta(self.batch, self.heads, self.chunks - 1, *shape, dtype=dtype)

    monkeypatch.setattr(triton_delta._Call, "per_chunk", short)
    with pytest.raises(AssertionError, match=r"prepare.* stores to solved up to byte"):
        remember((1, 65, 1, 16, 16))


@pytest.mark.parametrize("shape", [(2, 65, 1, 16, 16), HUGE])
def test_an_offset_in_int32_would_show(monkeypatch, tmp_path, shape):
    source = inspect.getsource(triton_delta_kernels)
    assert source.count("(pid // H // chunks).to(tl.int64)") == 2
    narrow = module_of(source.replace("// chunks).to(tl.int64)", "// chunks)"), tmp_path)
    monkeypatch.setattr(triton_delta_kernels, "prepare", narrow.prepare)
    if shape != HUGE:  # where it does no harm
        remember(shape, most=1)
        return
    with pytest.raises(AssertionError, match=r"prepare.* bytes before its start|up to byte"):
        remember(shape, torch.bfloat16, most=1)


def test_a_tail_without_a_mask_would_show(monkeypatch, tmp_path):
    source = inspect.getsource(triton_delta_kernels)
    unmasked = source.replace("    live = t < time\n", "    live = t < time + C\n")
    assert unmasked != source
    changed = module_of(unmasked, tmp_path)
    monkeypatch.setattr(triton_delta_kernels, "outputs", changed.outputs)
    with pytest.raises(AssertionError, match=r"outputs.* loads q up to byte"):
        remember((1, 65, 1, 16, 16))
