"""Modules: `[B, T, D] -> [B, T, D]` with an explicit state. Parameters live here, algorithms in
`ops`. The mixers are imported here, which registers them."""

import spectral_window.nn.attention
import spectral_window.nn.memory
import spectral_window.nn.spectral_window  # noqa: F401
