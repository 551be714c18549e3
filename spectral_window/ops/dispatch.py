"""Which method computes an operator: resolved here and nowhere else, with a reason that can be
printed.

A method is a choice of speed, never of architecture: all methods of an operator compute the same
function, and no config file names one.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from spectral_window.errors import UserError, unknown

HAS_NUMBA = find_spec("numba") is not None
METHODS = {
    "spectral": {
        "reference": "direct sum in float64, O(T^2): the truth for the others",
        "fft": "the paper's zero-padded FFT in float32, O(T log T)",
        "scan": "the recurrence in compiled code (numba), O(T), float64 state, on a CPU",
        "chunked": "float64 chunk products and a scan over chunks, O(T), plain torch",
        "step": "the recurrence, for calls with one token: constant state, constant time",
    },
    "window": {
        "reference": "dense masked softmax in float64, O(T^2): the truth for the others",
        "chunked": "one attention call over all chunks, O(T W), plain torch",
        "step": "attention to the ring of 2W keys, for calls with one token",
    },
}


def resolve(op: str, method: str, tensor: Tensor) -> tuple[str, str]:
    """(method, reason) for operator `op` on inputs like `tensor` ([B, T, ...]); `method` may be
    "auto".

    Raises ValueError for an unknown operator or method, naming the nearest one.
    """
    if op not in METHODS:
        raise unknown("operator", op, METHODS)
    one_token = tensor.dim() > 1 and tensor.shape[1] == 1
    if method == "auto":
        if one_token:
            return "step", "one token: constant state, constant time"
        if op == "spectral" and tensor.device.type == "cpu":
            if HAS_NUMBA:
                return "scan", "one pass over memory, compiled by numba for this CPU"
            return "chunked", "numba is not installed: linear time in plain torch"
        return "chunked", "linear time in plain torch on any device"
    if method not in METHODS[op]:
        raise unknown(f"{op} method", method, [*METHODS[op], "auto"])
    if method == "step" and not one_token:
        raise UserError(f"method 'step' ({op}): it takes one token a call, not {tensor.shape[1]}")
    return method, "asked for by name"
