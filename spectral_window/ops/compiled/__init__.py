"""Loops compiled by numba for a CPU; `threads` is where to start reading.

threads             how a kernel is declared, compiled, called, and shared among torch's threads
addresses           where a tensor becomes an address, and what is checked there
simd                what kernels compute with: arrays at addresses, bfloat16, vectors, products
cache               compiled code on disk
ahead               all kernels compiled before anything is computed
pages               fresh memory for large outputs

pointwise, linear, fir                      an operator of `ops` each, with its kernels
lagged_units                                fir and the unit vectors of pointwise in one pass
scan, window, delta                         the same, as they are called and registered with torch;
scan_loops, window_loops, delta_loops       ... their kernels for many tokens;
window_step, delta_step, memory_step        ... and for one token per row
"""
