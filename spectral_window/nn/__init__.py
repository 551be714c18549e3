"""Modules: `[B, T, D] -> [B, T, D]` with an explicit state. Parameters live here, algorithms in
`ops`."""
