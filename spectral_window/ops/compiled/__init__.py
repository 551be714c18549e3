"""Loops compiled by numba for a CPU, one file an idea; `threads` is where to begin.

threads                       how a kernel is compiled, called, and shared among torch's threads
addresses                     where a tensor becomes an address, and what is asked of it there
cache                         compiled code on disk
float64_lanes, float32_lanes  vectors as values, for kernels whose speed hangs on registers
scan*, window*, delta*        the kernels themselves, each called by one operator of `ops`
linear, pointwise             the same
pages                         fresh memory for large outputs
"""
