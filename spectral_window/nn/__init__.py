"""Modules: `[B, T, D] -> [B, T, D]` with an explicit state. Parameters live here, algorithms in
`ops`. The mixers are imported here, which registers them."""

from spectral_window.nn import attention, memory, spectral_window

__all__ = ["attention", "memory", "spectral_window"]
