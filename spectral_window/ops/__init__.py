"""Operators: pure functions on tensors for both branches of a layer and for its memory.

An operator takes tensors and returns `(output, final_state)`. It stores nothing, and uses no module
and no config. Each operator has several *methods* that compute the same function: a slow reference
and faster implementations. They stand in one table, from which `methods.resolve` chooses.

The letters of shapes, the same in every file:

    B batch   T time   D channels   H heads   K key dim   V value dim
    W window  C chunk length        G chunks of all documents together   M modes per channel
    L taps of a FIR filter

Documents and padding. `positions` (int64, [B, T]) is the position of every token inside its own
document: it counts 0, 1, 2, ...; 0 starts a document; -1 marks padding, which has no effect and
whose output is zero. `cu_seqlens` (integers, [documents + 1]) describes rows that are packed
without padding, as offsets into the B*T tokens in row order; every row starts a document. Without
either, a row is one document that continues from `state`. To call several operators for the same
rows, pass one `Documents` object to all of them.

Each operator has a family of files: `spectral.py` checks the arguments and holds the table of
methods, `chunked_spectral.py` is plain torch, `compiled/` is numba, `triton_spectral*.py` is
Triton. `window`, `delta_memory` and `fir` are laid out in the same way. `reference.py` has the
slow reference of all operators.
"""

from spectral_window.ops.delta_memory import delta_memory
from spectral_window.ops.documents import Documents
from spectral_window.ops.fir import Taps, fir_conv
from spectral_window.ops.linear import linear_maps
from spectral_window.ops.methods import METHODS, Method, enrol, resolve
from spectral_window.ops.modes import Modes
from spectral_window.ops.pointwise import rms_norm, swiglu
from spectral_window.ops.rotary import rotate
from spectral_window.ops.spectral import spectral_conv
from spectral_window.ops.window import WindowState, window_attention

__all__ = [
    "METHODS",
    "Documents",
    "Method",
    "Modes",
    "Taps",
    "WindowState",
    "delta_memory",
    "enrol",
    "fir_conv",
    "linear_maps",
    "resolve",
    "rms_norm",
    "rotate",
    "spectral_conv",
    "swiglu",
    "window_attention",
]
