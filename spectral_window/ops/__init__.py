"""Pure functions on tensors: the two branches of the Spectral-Window Hybrid, and its memory.

Every operator takes tensors, returns `(output, final_state)`, keeps nothing, and knows no module
and no config. The same function has several *methods* (a slow truth and faster ways to the same
numbers); `dispatch.resolve` picks.

Legend, the same letters everywhere:

    B batch   T time   D channels   H heads   K key dim   V value dim
    W window  C chunk length        G chunks, all documents together   M modes a channel
    L taps of a finite filter

Documents and padding. `positions` (int64, [B, T]) gives every token's position inside its own
document: it counts 0, 1, 2, ... ; 0 begins a document; -1 marks padding, which takes no part and
whose output is zero. `cu_seqlens` (integers, [documents + 1]) says the same for rows packed
without padding, as offsets into the B*T tokens in row order; a row always begins a document.
Without either, a row is one document that continues from `state`.
"""

from spectral_window.ops.delta_memory import delta_memory
from spectral_window.ops.dispatch import METHODS, resolve
from spectral_window.ops.modes import Modes
from spectral_window.ops.rotary import rotate
from spectral_window.ops.spectral import spectral_conv
from spectral_window.ops.taps import Taps
from spectral_window.ops.window import WindowState, window_attention

__all__ = [
    "METHODS",
    "Modes",
    "Taps",
    "WindowState",
    "delta_memory",
    "resolve",
    "rotate",
    "spectral_conv",
    "window_attention",
]
