"""Modules: `[B, T, D] -> [B, T, D]` with an explicit state. Parameters live here, algorithms in
`ops`."""

import spectral_window.nn.memory  # noqa: F401 (it registers the mixer "memory")
