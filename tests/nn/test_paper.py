"""The paper's section 1 in float64 and plain loops: equal to the layer to 1e-12."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_window.nn.spectral_window import SpectralWindowMixer


def papers_layer(
    x: torch.Tensor, p: dict[str, torch.Tensor], heads: int, window: int, eps: float
) -> torch.Tensor:
    """Y = (RMSNorm(Y_spec) + Y_local) W_out, written from the equations; shares no code with the
    package."""
    batch, time, dim = x.shape
    size = dim // heads

    # spectral branch: U = X W_conv + b; K[t, c] = exp(-|alpha_c| t) cos(omega_c t); convolution
    # theorem with >= 2T points
    u = x @ p["conv_proj.weight"].T + p["conv_proj.bias"]
    t = torch.arange(time, dtype=torch.float64)[:, None]
    K = torch.exp(-p["kernel.decay"].abs() * t) * torch.cos(p["kernel.frequency"] * t)
    points = 2 ** math.ceil(math.log2(2 * time))
    spectrum = torch.fft.rfft(u, points, dim=1) * torch.fft.rfft(K, points, dim=0)
    y_spec = torch.fft.irfft(spectrum, points, dim=1)[:, :time]

    # window branch: RoPE at global positions, interleaved pairs, then chunks of W with the
    # previous chunk as context
    def project(name):
        return (x @ p[name].T).view(batch, time, heads, size)

    def rope(z):
        out = torch.empty_like(z)
        for i in range(size // 2):
            angle = torch.arange(time, dtype=torch.float64) / 10000.0 ** (2 * i / size)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            out[..., 2 * i] = z[..., 2 * i] * cos - z[..., 2 * i + 1] * sin
            out[..., 2 * i + 1] = z[..., 2 * i] * sin + z[..., 2 * i + 1] * cos
        return out

    q, k, v = (
        rope(project("q_proj.weight")),
        rope(project("k_proj.weight")),
        project("v_proj.weight"),
    )
    chunks = math.ceil(time / window)
    pad = chunks * window - time
    q, k, v = (torch.cat((z, z.new_zeros(batch, pad, heads, size)), 1) for z in (q, k, v))
    local = torch.zeros_like(q)
    for n in range(chunks):
        own = slice(n * window, (n + 1) * window)
        before = slice((n - 1) * window, n * window)
        keys = torch.cat((k[:, before] if n else torch.zeros_like(k[:, own]), k[:, own]), 1)
        values = torch.cat((v[:, before] if n else torch.zeros_like(v[:, own]), v[:, own]), 1)
        scores = torch.einsum("bqhs,bkhs->bhqk", q[:, own], keys) / math.sqrt(size)
        for i in range(window):
            for j in range(2 * window):
                previous, later = j < window, j - window > i
                if (previous and n == 0) or (not previous and later):
                    scores[:, :, i, j] = -math.inf
        local[:, own] = torch.einsum("bhqk,bkhs->bqhs", scores.softmax(-1), values)
    y_local = local[:, :time].reshape(batch, time, dim) @ p["local_proj.weight"].T

    normed = (
        y_spec / (y_spec.square().mean(-1, keepdim=True) + eps).sqrt() * p["fusion.norm.weight"]
    )
    return (normed + y_local) @ p["out_proj.weight"].T


@pytest.mark.parametrize(
    ("time", "window"), [(12, 4), (13, 4), (3, 4), (1, 1), (29, 8), (32, 8), (100, 32), (97, 5)]
)
def test_the_layer_is_the_papers_to_the_last_digit(time, window):
    layer = SpectralWindowMixer(hidden_size=24, num_heads=3, window=window, eps=1e-6).double()
    with torch.no_grad():
        layer.fusion.norm.weight.normal_()
    x = torch.randn(2, time, 24, dtype=torch.float64)
    truth = papers_layer(x, dict(layer.state_dict()), 3, window, 1e-6)
    y, _ = layer(x)
    assert (y - truth).abs().max() <= 1e-12 * truth.abs().max()


def test_parameters_are_the_papers():
    """Six D x D maps, a bias on the convolution's projection alone, decay and frequency a channel,
    one norm."""
    dim = 16
    layer = SpectralWindowMixer(hidden_size=dim, num_heads=2, window=4)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    maps = ("conv_proj", "q_proj", "k_proj", "v_proj", "local_proj", "out_proj")
    assert shapes == {
        **{f"{name}.weight": (dim, dim) for name in maps},
        "conv_proj.bias": (dim,),
        "kernel.decay": (dim,),
        "kernel.frequency": (dim,),
        "fusion.norm.weight": (dim,),
    }


def test_dynamics_start_as_standard_normals():
    layer = SpectralWindowMixer(hidden_size=4096, num_heads=1, window=4)
    for p in (layer.kernel.decay, layer.kernel.frequency):
        assert abs(p.detach().mean()) < 0.1
        assert abs(p.detach().std() - 1) < 0.1
