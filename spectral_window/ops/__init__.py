"""Pure functions on tensors: the two branches of the Spectral-Window Hybrid, and its memory.

Every operator takes tensors, returns `(output, final_state)`, keeps nothing, and knows no module
and no config. The same function has several *methods* (a slow truth and faster ways to the same
numbers), in one table; `methods.resolve` picks.

Legend, the same letters everywhere:

    B batch   T time   D channels   H heads   K key dim   V value dim
    W window  C chunk length        G chunks, all documents together   M modes a channel
    L taps of a finite filter

Documents and padding. `positions` (int64, [B, T]) gives every token's position inside its own
document: it counts 0, 1, 2, ... ; 0 begins a document; -1 marks padding, which takes no part and
whose output is zero. `cu_seqlens` (integers, [documents + 1]) says the same for rows packed
without padding, as offsets into the B*T tokens in row order; a row always begins a document.
Without either, a row is one document that continues from `state`. Where several operators are
called for the same rows, `Documents` says it for all of them at once.

One family of files for each operator: `spectral.py` checks a call and holds the table of methods,
`chunked_spectral.py` is plain torch, `compiled/scan*.py` numba, `triton_spectral*.py` Triton; so
with `window`, `delta_memory` and `fir`. `reference.py` is the slow truth of all.
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
