"""The two operators alone: pure functions of tensors, with an explicit state.

    python examples/operators.py

A sequence is read in one call, and again in two calls that hand the state over: the outputs agree.
"""

import torch

from spectral_window.ops import Modes, spectral_conv, window_attention

torch.manual_seed(0)
B, T, D, H, K = 2, 512, 64, 4, 16  # batch, tokens, channels, heads, key dimension

# The convolution: y[t] = sum_s exp(-decay s) cos(frequency s) u[t - s], in O(T).
u = torch.randn(B, T, D)
modes = Modes(decay=torch.rand(D), frequency=torch.randn(D))
y, _ = spectral_conv(u, modes)
start, state = spectral_conv(u[:, :300], modes)
rest, state = spectral_conv(u[:, 300:], modes, state=state)
difference = (torch.cat((start, rest), 1) - y).abs().max()
print(f"convolution: {tuple(y.shape)}, state {tuple(state.shape)}, difference {difference:.1e}")
assert difference < 1e-5

# The window: chunks of 32 tokens, each sees itself and the one before.
q, k, v = torch.randn(3, B, T, H, K)
out, _ = window_attention(q, k, v, window=32, rope_theta=1e4)
start, ring = window_attention(q[:, :300], k[:, :300], v[:, :300], window=32, rope_theta=1e4)
rest, ring = window_attention(
    q[:, 300:], k[:, 300:], v[:, 300:], window=32, rope_theta=1e4, state=ring
)
difference = (torch.cat((start, rest), 1) - out).abs().max()
print(f"window: {tuple(out.shape)}, ring of keys {ring.key.shape[1]}, difference {difference:.1e}")
assert difference < 1e-5
