"""The numbers of the design: gradients, half precision, long decoding, compilation, bad inputs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from spectral_window.errors import UserError
from spectral_window.ops import Modes, reference, resolve, spectral_conv, window_attention
from spectral_window.ops.modes import kernel, powers
from spectral_window.ops.rotary import rotate
from tests.contracts.measure import block_error, relative, rms
from tests.contracts.operators import at_blocks, draw_modes, draw_qkv

CU = torch.tensor([0, 3, 3, 10, 12])


@pytest.mark.parametrize("method", ["scan", "chunked", "fft", "step"])
@pytest.mark.parametrize("documents", [None, CU], ids=["plain", "packed"])
def test_convolution_gradients_are_right_twice(method, documents):
    time = 1 if method == "step" else 6
    if documents is not None and method == "step":
        documents = torch.tensor([0, 1, 2])
    u = torch.randn(2, time, 2, dtype=torch.float64, requires_grad=True)
    dynamics = [(torch.rand(2, 2, dtype=torch.float64) + 0.1).requires_grad_() for _ in range(3)]
    state = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def f(u, decay, frequency, gain, state):
        return spectral_conv(
            u, Modes(decay, frequency, gain), state=state, cu_seqlens=documents, method=method
        )

    assert gradcheck(f, (u, *dynamics, state))
    assert gradgradcheck(f, (u, *dynamics, state))


@pytest.mark.parametrize(
    "documents", [None, torch.tensor([0, 3, 6, 9, 14])], ids=["plain", "packed"]
)
def test_window_attention_gradients_are_right_twice(documents):
    q, k, v = (x.requires_grad_() for x in draw_qkv(2, 7, 1, 2, 3, torch.float64))

    def f(q, k, v):
        return window_attention(q, k, v, window=2, rope_theta=100.0, cu_seqlens=documents)[0]

    assert gradcheck(f, (q, k, v))
    assert gradgradcheck(f, (q, k, v))


@pytest.mark.parametrize("time", [1, 2, 63, 64, 200, 1000])
@pytest.mark.parametrize("method", ["scan", "chunked"])
def test_float32_gradients_meet_the_bar(method, time):
    modes = draw_modes(4, 2, dtype=torch.float32, gain=True)
    u, weight = torch.randn(2, time, 4), torch.randn(2, time, 4)

    def gradients(dtype, run):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (u, *modes)]
        y = run(leaves[0], Modes(*leaves[1:]))
        return torch.autograd.grad(y, leaves, weight.to(dtype))

    got = gradients(torch.float32, lambda u, m: spectral_conv(u, m, method=method)[0])
    truth = gradients(torch.float64, lambda u, m: reference.spectral(u, m)[0])
    assert block_error(got[0], truth[0]) <= 2e-6
    for mine, exact in zip(got[1:], truth[1:], strict=True):
        assert relative(mine, exact) <= 2e-6


@pytest.mark.parametrize("method", ["tiled", "chunked"])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_float32_window_gradients_meet_the_bar(window, method):
    q, k, v = draw_qkv(2, 3 * window + 2, key_dim=8, value_dim=8)

    def gradients(dtype, method):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = window_attention(*leaves, window=window, rope_theta=1e4, method=method)
        return torch.autograd.grad(out, leaves, torch.ones_like(out) * torch.arange(8))

    for mine, exact in zip(
        gradients(torch.float32, method), gradients(torch.float64, "reference"), strict=True
    ):
        assert rms(mine - exact) <= 2e-6 * max(rms(exact), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 60, 768])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 1000])
def test_convolution_fills_given_memory_at_odd_sizes(time, channels, dtype):
    each = 2 if channels < 60 else 1
    modes = draw_modes(channels, each, dtype=torch.float32, gain=each > 1)
    u = torch.randn(channels, time, 2).to(dtype).permute(2, 1, 0)  # not contiguous
    state = torch.randn(2, channels, each, 2, dtype=torch.float64)
    out = torch.full((2, time, channels), torch.nan, dtype=dtype)
    y, end = spectral_conv(u, modes, state=state, out=out)
    assert y.data_ptr() == out.data_ptr()
    truth, final = spectral_conv(u.double(), modes, state=state, method="chunked")
    bar = {torch.float32: 2e-6, torch.float64: 1e-11}.get(dtype)
    if bar is None:
        assert relative(out, truth) <= 1.25 * relative(truth.to(dtype), truth)
    else:
        assert block_error(out, truth) <= bar
    assert relative(end, final) <= 1e-10
    recorded, _ = spectral_conv(u.requires_grad_(), modes, state=state, method="scan")
    assert torch.equal(recorded, out)


def test_a_large_output_written_past_the_cache_is_the_same():
    from spectral_window.ops.compiled import scan

    modes = draw_modes(64, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        u = torch.randn(1, (scan.PAST_CACHE >> 6) // dtype.itemsize + 3, 64).to(dtype)
        whole, _ = spectral_conv(u, modes, method="scan")
        parts, state = [], None
        for part in u.split(len(u[0]) // 2, 1):
            y, state = spectral_conv(part, modes, state=state, method="scan")
            parts.append(y)
        assert torch.equal(torch.cat(parts, 1), whole)


def test_large_fresh_memory_is_like_any_other():
    from spectral_window.ops.compiled.pages import empty

    x = empty((9, 1_000_001), torch.float32)  # 36 MB
    assert (x.shape, x.dtype, x.is_contiguous()) == ((9, 1_000_001), torch.float32, True)
    x.fill_(1.0)
    assert x.sum(dtype=torch.float64) == x.numel()


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("time", [64, 65, 200])
def test_gradients_of_documents_and_padding_across_blocks(time, gain):
    modes = draw_modes(5, 2, gain=gain)
    u, weight = torch.randn(2, 2, time, 5, dtype=torch.float64)
    state, weight_end = torch.randn(2, 2, 5, 2, 2, dtype=torch.float64)
    positions = torch.full((2, time), -1)
    for row in positions:
        count = 5  # the first document goes on from the state
        for t in range(time):
            event = torch.rand(()).item()
            if event < 0.1:
                continue  # padding
            count = 0 if event < 0.15 else count
            row[t] = count
            count += 1
    found = []
    for method in ("scan", "chunked"):
        leaves = [x.detach().requires_grad_() for x in (u, state, *modes) if x is not None]
        y, end = spectral_conv(
            leaves[0], Modes(*leaves[2:]), state=leaves[1], positions=positions, method=method
        )
        found.append(torch.autograd.grad((y * weight).sum() + (end * weight_end).sum(), leaves))
    for mine, truth in zip(*found, strict=True):
        assert relative(mine, truth) <= 1e-12


@pytest.mark.parametrize("each", [1, 3])
def test_a_compiled_step_is_the_plain_one(each):
    modes = draw_modes(37, each, dtype=torch.float32, gain=each > 1)
    u, state = torch.randn(4, 1, 37), torch.randn(4, 37, each, 2, dtype=torch.float64)
    positions = torch.tensor([[0], [7], [-1], [1]])
    for at in (None, positions):
        y, h = spectral_conv(u, modes, state=state, positions=at)
        before = state.clone()
        truth, after = spectral_conv(u.clone().requires_grad_(), modes, state=state, positions=at)
        assert relative(h, after) <= 1e-15
        assert relative(y, truth) <= 1e-7
        assert torch.equal(state, before)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e5, 1e7])
def test_compiled_powers_are_exact(scale):
    """z, read off one step from the state 1, against exp, cos and sin of the C library."""
    decay = torch.rand(1000, dtype=torch.float64) * 3
    decay[:4] = torch.tensor([0.0, 700.0, 740.0, 1e300], dtype=torch.float64)
    frequency = torch.randn(1000, dtype=torch.float64).clamp(-1, 1) * scale
    frequency[4:8] = torch.tensor([0.0, 0.5, -1, 0.75], dtype=torch.float64) * math.pi
    h = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1000, 1, 2)
    u = torch.zeros(1, 1, 1000, dtype=torch.float64)
    _, z = spectral_conv(u, Modes(decay, frequency), state=h)
    truth = [
        (math.exp(-a) * math.cos(w), math.exp(-a) * math.sin(w))
        for a, w in zip(decay.tolist(), frequency.tolist(), strict=True)
    ]
    size = torch.exp(-decay)[:, None].clamp(min=1e-300)
    assert (
        float(((z[0, :, 0] - torch.tensor(truth, dtype=torch.float64)) / size).abs().max()) < 5e-16
    )


def test_forward_mode_and_vmap_reach_through_the_compiled_methods():
    modes = draw_modes(3, dtype=torch.float32)
    u = torch.randn(2, 2, 9, 3)
    with pytest.raises(UserError, match=r"'scan'.*no forward-mode derivatives"):
        torch.func.jvp(lambda x: spectral_conv(x, modes, method="scan")[0], (u[0],), (u[1],))
    for method in ("auto", "chunked"):
        conv = partial(spectral_conv, kernel=modes, method=method)
        _, tangent = torch.func.jvp(lambda x, f=conv: f(x)[0], (u[0],), (u[1],))
        assert relative(tangent, conv(u[1])[0]) <= 2e-6  # the convolution is linear
    mapped = torch.func.vmap(lambda x: spectral_conv(x, modes)[0])(u)
    assert relative(mapped, torch.stack([spectral_conv(x, modes)[0] for x in u])) <= 2e-6


@pytest.mark.parametrize("op", ["scan", "chunked", "window"])
def test_bfloat16_loses_no_more_than_its_own_rounding(op):
    """At most 1.25 times the error of rounding the exact result once."""
    if op != "window":
        modes = draw_modes(16, dtype=torch.float32)
        u = torch.randn(2, 500, 16).bfloat16()
        exact, _ = reference.spectral(u.double(), modes.validated(16))
        y, _ = spectral_conv(u, modes, method=op)
    else:
        q, k, v = draw_qkv(2, 100, key_dim=16, value_dim=16, dtype=torch.bfloat16)
        exact = reference.window(q.double(), k.double(), v.double(), 16)
        y, _ = window_attention(q, k, v, window=16)
    assert y.dtype == torch.bfloat16
    assert relative(y, exact) <= 1.25 * relative(exact.bfloat16(), exact)


@pytest.mark.parametrize("method", ["scan", "chunked"])
def test_strong_damping_underflows_to_zero_and_not_to_nan(method):
    modes = Modes(torch.tensor([800.0, 50.0, 0.0]), torch.tensor([3.0, 0.0, 0.0]))
    u = torch.randn(1, 5000, 3, requires_grad=True)
    y, state = spectral_conv(u, modes, method=method)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()
    assert torch.isfinite(u.grad).all()
    assert torch.equal(y[..., 0], u[..., 0])


def test_angles_at_a_million_are_exact():
    modes = Modes(torch.zeros(1, 1), torch.tensor([[0.7]]))
    t = 1_000_003
    re, im = powers(modes, torch.tensor([t]))[0, 0, 0].tolist()
    frequency = float(modes.frequency)
    assert abs(re - math.cos(frequency * t)) < 1e-9
    assert abs(im - math.sin(frequency * t)) < 1e-9
    x = torch.randn(1, 1, 1, 2)
    far = rotate(x, torch.tensor([t]), 1e4)
    c, s = math.cos(t), math.sin(t)
    a, b = x.flatten().tolist()
    assert torch.allclose(far.flatten(), torch.tensor([a * c - b * s, a * s + b * c]), atol=1e-6)


def decode(steps: int, channels: int, probe: list[int]):
    """Decode `steps` tokens one by one; the outputs at the blocks that begin at `probe`, and the
    state's bytes seen."""
    modes = draw_modes(channels, dtype=torch.float32, slow=True)
    u = torch.randn(1, steps, channels)
    q, k, v = draw_qkv(1, steps, 1, 2, 2)
    state = ring = None
    outputs, sizes = {}, set()
    wanted = {t for start in probe for t in range(start, start + 64)}
    for t in range(steps):
        y, state = spectral_conv(u[:, t : t + 1], modes, state=state)
        if t % 16 == 0 or t < 64:  # attention's ring is checked elsewhere; here its size
            cut = slice(t, t + 1)
            _, ring = window_attention(q[:, cut], k[:, cut], v[:, cut], window=4, state=ring)
            sizes.add(sum(x.nbytes for x in (state, *ring)))
        if t in wanted:
            outputs[t] = y
    got = torch.cat([outputs[t] for t in sorted(wanted)], 1)
    return got, at_blocks(u, modes, probe), sizes


def test_ten_thousand_decode_steps_stay_exact_in_constant_bytes():
    got, truth, sizes = decode(10_000, 6, [0, 5000, 9936])
    assert block_error(got, truth) <= 2e-6
    assert len(sizes) == 1


@pytest.mark.slow
def test_a_million_decode_steps_stay_exact_in_constant_bytes():
    got, truth, sizes = decode(1_000_000, 6, [0, 500_000, 999_936])
    assert block_error(got, truth) <= 2e-6
    assert len(sizes) == 1


def test_compiled_operators_equal_eager_without_a_graph_break():
    modes = draw_modes(8, dtype=torch.float32)
    u = torch.randn(2, 70, 8)
    q, k, v = draw_qkv(2, 70, key_dim=8, value_dim=8)

    def both(u, decay, frequency, q, k, v, state):
        y, h = spectral_conv(u, Modes(decay, frequency), state=state)
        out, _ = window_attention(q, k, v, window=16, rope_theta=1e4)
        return y, h, out

    inputs = (u, modes.decay, modes.frequency, q, k, v, None)
    compiled = torch.compile(both, fullgraph=True)
    for mine, eager in zip(compiled(*inputs), both(*inputs), strict=True):
        assert relative(mine, eager) <= 2e-6


def test_compiled_step_has_one_graph_for_all_positions():
    modes = draw_modes(8, dtype=torch.float32)
    u = torch.randn(2, 20, 8)
    q, k, v = draw_qkv(2, 20, key_dim=8, value_dim=8)

    def step(t, state, ring):
        cut = slice(t, t + 1)
        y, state = spectral_conv(u[:, cut], modes, state=state)
        return y, state, *window_attention(q[:, cut], k[:, cut], v[:, cut], window=4, state=ring)

    @torch.compile(fullgraph=True)
    def compiled(u, q, k, v, state, ring):
        y, state = spectral_conv(u, modes, state=state)
        return y, state, *window_attention(q, k, v, window=4, state=ring)

    _, state, _, ring = step(0, None, None)
    mine, mine_ring = state, ring
    for t in range(1, 20):
        cut = slice(t, t + 1)
        y, state, out, ring = step(t, state, ring)
        y2, mine, out2, mine_ring = compiled(
            u[:, cut], q[:, cut], k[:, cut], v[:, cut], mine, mine_ring
        )
        assert relative(y2, y) <= 2e-6
        assert relative(out2, out) <= 2e-6


@pytest.mark.parametrize("method", ["scan", "chunked"])
def test_autocast_does_not_reach_into_the_convolution(method):
    modes = draw_modes(4, dtype=torch.float32)
    u = torch.randn(1, 100, 4)
    plain, _ = spectral_conv(u, modes, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = spectral_conv(u, modes, method=method)
    assert torch.equal(plain, cast)


def test_autocast_does_not_reach_into_the_window():
    q, k, v = draw_qkv(1, 40, key_dim=8, value_dim=8)
    plain, _ = window_attention(q, k, v, window=8)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = window_attention(q, k, v, window=8)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("method", ["scan", "chunked"])
def test_reduced_matmul_precision_does_not_reach_into_the_convolution(method):
    modes = draw_modes(4, dtype=torch.float32)
    u = torch.randn(1, 100, 4)
    plain, _ = spectral_conv(u, modes, method=method)
    torch.set_float32_matmul_precision("medium")
    try:
        low, _ = spectral_conv(u, modes, method=method)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(plain, low)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("gain", [False, True])
def test_registered_operators_pass_opcheck(gain, documents):
    from spectral_window.ops.compiled.scan import scan, scan_backward

    modes = draw_modes(3, 2, gain=gain)
    u = torch.randn(2, 70, 3, requires_grad=True)
    positions = torch.tensor([[*range(30), *range(38), -1, -1]] * 2) if documents else None
    leaves = [None if x is None else x.detach().float().requires_grad_() for x in modes]
    state = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(scan, (u, *leaves, state, positions, True))
    kept = scan(u, *leaves, state, positions, True)[2].detach()
    plain = [None if x is None else x.detach() for x in leaves]
    torch.library.opcheck(
        scan_backward, (u.detach(), *plain, positions, kept, torch.randn(2, 70, 3), state.detach())
    )


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (0, 0, 3), (0, 1, 3)])
def test_empty_inputs_give_empty_outputs_with_gradients(shape):
    u = torch.randn(shape, requires_grad=True)
    y, state = spectral_conv(u, draw_modes(3, dtype=torch.float32))
    assert y.shape == u.shape
    assert state.shape == (shape[0], 3, 1, 2)
    y.sum().backward()
    q = torch.randn(*shape[:2], 1, 4, requires_grad=True)
    out, ring = window_attention(q, q, q, window=2, rope_theta=1e4)
    assert out.shape == q.shape
    assert ring.key.shape == (shape[0], 4, 1, 4)
    out.sum().backward()


def test_meta_tensors_give_meta_tensors():
    modes = Modes(torch.empty(4, device="meta"), torch.empty(4, device="meta"))
    y, state = spectral_conv(torch.empty(2, 40, 4, device="meta"), modes)
    assert y.device.type == state.device.type == "meta"
    q = torch.empty(2, 40, 1, 4, device="meta")
    assert window_attention(q, q, q, window=8)[0].device.type == "meta"


U, M = torch.randn(2, 8, 3), Modes(torch.rand(3), torch.rand(3))
Q = torch.randn(2, 8, 1, 4)


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "expected .batch, time, channels", lambda: spectral_conv(U[0], M)),
        (TypeError, "floating", lambda: spectral_conv(U.long(), M)),
        (ValueError, r"expected \[8\]", lambda: spectral_conv(U.transpose(1, 2), M)),
        (
            ValueError,
            "frequency has shape",
            lambda: spectral_conv(U, Modes(M.decay, torch.rand(4))),
        ),
        (
            TypeError,
            "decay is torch.bfloat16",
            lambda: spectral_conv(U, Modes(M.decay.bfloat16(), M.frequency)),
        ),
        (
            ValueError,
            "frequency is not finite",
            lambda: spectral_conv(U, Modes(M.decay, M.frequency * torch.nan)),
        ),
        (
            ValueError,
            "decay is negative",
            lambda: spectral_conv(U, Modes(-M.decay - 1, M.frequency)),
        ),
        (
            ValueError,
            "same batch and modes",
            lambda: spectral_conv(U, M, state=torch.zeros(1, 3, 1, 2)),
        ),
        (
            ValueError,
            "same batch and modes",
            lambda: spectral_conv(U, M, state=torch.zeros(2, 3, 1, 2).bfloat16()),
        ),
        (ValueError, "like u", lambda: spectral_conv(U, M, out=torch.empty(2, 8, 4))),
        (ValueError, "like u", lambda: spectral_conv(U, M, out=torch.empty_like(U).double())),
        (
            ValueError,
            "not contiguous",
            lambda: spectral_conv(U, M, out=torch.empty(8, 2, 3).transpose(0, 1)),
        ),
        (ValueError, "overlaps", lambda: spectral_conv(U, M, out=U)),
        (
            ValueError,
            "gradient to record",
            lambda: spectral_conv(
                U, Modes(M.decay.clone().requires_grad_(), M.frequency), out=torch.empty_like(U)
            ),
        ),
        (ValueError, "did you mean 'chunked'", lambda: spectral_conv(U, M, method="chunkd")),
        (ValueError, "one token a call", lambda: spectral_conv(U, M, method="step")),
        (ValueError, "begin at 0", lambda: spectral_conv(U, M, cu_seqlens=torch.tensor([1, 16]))),
        (
            ValueError,
            "never fall",
            lambda: spectral_conv(U, M, cu_seqlens=torch.tensor([0, 9, 4, 16])),
        ),
        (ValueError, "end at 16", lambda: spectral_conv(U, M, cu_seqlens=torch.tensor([0, 17]))),
        (
            TypeError,
            "int32 or int64",
            lambda: spectral_conv(U, M, cu_seqlens=torch.tensor([0.0, 16.0])),
        ),
        (
            ValueError,
            "expected .2, 8.",
            lambda: spectral_conv(U, M, positions=torch.zeros(2, 7).long()),
        ),
        (TypeError, "int64", lambda: spectral_conv(U, M, positions=torch.zeros(2, 8))),
        (
            ValueError,
            "counts",
            lambda: spectral_conv(U, M, positions=torch.arange(8).repeat(2, 1) + 1),
        ),
        (
            ValueError,
            "row 1, column 4",
            lambda: spectral_conv(
                U, M, positions=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 5, 6, 7, 8]])
            ),
        ),
        (
            ValueError,
            "disagree",
            lambda: spectral_conv(
                U, M, positions=torch.arange(8).repeat(2, 1), cu_seqlens=torch.tensor([0, 4, 16])
            ),
        ),
        (
            ValueError,
            "fft would spread|FFT would spread",
            lambda: spectral_conv(U / 0, M, method="fft"),
        ),
        (ValueError, "window is 0", lambda: window_attention(Q, Q, Q, window=0)),
        (ValueError, "window is True", lambda: window_attention(Q, Q, Q, window=True)),
        (ValueError, "window is 1.5", lambda: window_attention(Q, Q, Q, window=1.5)),
        (ValueError, "expected .B, T, H, K.", lambda: window_attention(Q[0], Q[0], Q[0], window=2)),
        (TypeError, "one floating dtype", lambda: window_attention(Q, Q.double(), Q, window=2)),
        (
            ValueError,
            "odd",
            lambda: window_attention(Q[..., :3], Q[..., :3], Q, window=2, rope_theta=1e4),
        ),
        (
            ValueError,
            "another batch, window",
            lambda: window_attention(
                Q, Q, Q, window=3, state=window_attention(Q, Q, Q, window=2)[1]
            ),
        ),
        (
            ValueError,
            "row 1, column 0 .* goes on where its state stopped",
            lambda: window_attention(
                Q[:, :1],
                Q[:, :1],
                Q[:, :1],
                window=2,
                state=window_attention(Q, Q, Q, window=2)[1],
                positions=torch.tensor([[8], [5]]),
            ),
        ),
        (
            UserError,
            "float32 or bfloat16 on a CPU",
            lambda: window_attention(Q.double(), Q.double(), Q.double(), window=2, method="tiled"),
        ),
        (ValueError, "unknown operator", lambda: resolve("spectrl", "auto", U)),
    ],
)
def test_bad_input_is_named(error, says, call):
    with pytest.raises(error, match=says):
        call()


def test_checks_do_not_lean_on_assert():
    """`python -O` removes assertions; the errors must stay."""
    code = (
        "import torch\nfrom spectral_window.ops import window_attention\n"
        "q = torch.randn(1, 4, 1, 2)\n"
        "try:\n    window_attention(q, q, q, window=0)\n"
        "except ValueError as e:\n    print('refused')"
    )
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    shown = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert shown.stdout.strip() == "refused"


def test_kernel_is_the_papers():
    modes = Modes(torch.tensor([0.3, 0.0]), torch.tensor([2.0, -0.5]))
    t = torch.arange(50, dtype=torch.float64)
    for c in range(2):
        expected = torch.exp(-modes.decay[c].double() * t) * torch.cos(
            modes.frequency[c].double() * t
        )
        assert torch.allclose(kernel(modes.validated(2), 50)[c], expected, rtol=0, atol=1e-14)


def test_the_scan_rounds_to_bfloat16_as_torch_does_on_every_processor():
    """Once LLVM's own rounding was asked for: it aborts the process where the processor has none,
    and where it has, numbers below 2^-126 became 0."""
    u = (torch.randn(2, 100, 37) * torch.logspace(-42, 30, 37)).bfloat16()
    u[0, 50, 3], u[0, 60, 4] = torch.nan, torch.inf
    modes = Modes(torch.rand(37) + 0.1, torch.randn(37))
    y, _ = spectral_conv(u, modes, method="scan")
    exact, _ = spectral_conv(u.double(), modes, method="scan")
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.nan_to_num(), exact.float().bfloat16().nan_to_num())
    assert (y != 0).sum() > (y.abs() > 2.0**-126).sum(), "numbers below 2^-126 are kept"
