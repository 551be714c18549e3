"""Every enrolled method, with the properties that it must have.

A method must have all properties of its operator; `EXCEPT` lists exceptions, with reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from spectral_window.ops import METHODS, delta_memory, fir_conv, spectral_conv, window_attention
from spectral_window.ops.linear import linear_maps
from spectral_window.ops.methods import serving
from tests.contracts import operators

OPERATORS: dict[str, Callable[..., Any]] = {
    "spectral": spectral_conv,
    "fir": fir_conv,
    "window": window_attention,
    "delta": delta_memory,
    "linear": linear_maps,
}
CONTRACTS: dict[str, list[Callable[..., None]]] = {
    "spectral": operators.CONV_CONTRACT,
    "fir": operators.FIR_CONTRACT,
    "window": operators.ATTENTION_CONTRACT,
    "delta": operators.MEMORY_CONTRACT,
    "linear": operators.LINEAR_CONTRACT,
}
EXCEPT = {
    ("spectral", "fft"): {
        # its error is relative to the loudest position, so it is held to short signals alone
        "conv_equals_the_direct_sum": partial(
            operators.conv_equals_the_direct_sum, times=(1, 2, 31, 33, 64)
        ),
        "conv_of_an_impulse_is_the_kernel": None,
        "conv_carries_its_state": None,
        "conv_is_exact_far_away": None,
    },
    # token by token: the same promise, nearer
    ("spectral", "reference"): {
        "conv_is_exact_far_away": partial(operators.conv_is_exact_far_away, time=2048)
    },
    ("spectral", "step"): {
        "conv_is_exact_far_away": partial(operators.conv_is_exact_far_away, time=4096)
    },
    ("spectral", "step_compiled"): {
        "conv_is_exact_far_away": partial(operators.conv_is_exact_far_away, time=4096)
    },
}


def by_method(op: str, method: str) -> Callable[..., Any]:
    """The operator computed by one method; a step is called token by token."""
    run = partial(OPERATORS[op], method=method)
    return stepwise(run) if method.startswith("step") else run


def stepwise(op: Callable[..., Any]) -> Callable[..., Any]:
    """The operator called one token at a time, as in decoding."""

    def run(*inputs: Any, state: Any = None, decay: Any = None, **options: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        rest = inputs[len(tensors) :]
        parts = []
        with torch.no_grad():  # decoding wants none
            for t in range(tensors[0].shape[1]):
                if decay is not None:
                    options["decay"] = decay[:, t : t + 1]
                cut = (x[:, t : t + 1] for x in tensors)
                y, state = op(*cut, *rest, state=state, **options)
                parts.append(y)
        return torch.cat(parts, 1), state

    return run


def here(op: str) -> list[str]:
    """The methods of `op` that serve float32 on this machine, steps among them."""
    with torch.no_grad():
        one, many = torch.empty(1, 1, 2), torch.empty(1, 2, 2)
        served = {*serving(op, one), *serving(op, many)}
    return [name for name in METHODS[op] if name in served]


def cases() -> list[tuple[str, str, str]]:
    """(operator, method, promise) for every promise that is made."""
    return [
        (op, method, promise.__name__)
        for op, contract in CONTRACTS.items()
        for method in here(op)
        for promise in contract
        if EXCEPT.get((op, method), {}).get(promise.__name__, promise) is not None
    ]


def keep(op: str, method: str, promise: str) -> None:
    """Raise AssertionError where `method` breaks a promise."""
    (asked,) = (each for each in CONTRACTS[op] if each.__name__ == promise)
    asked = EXCEPT.get((op, method), {}).get(promise, asked)
    asked(by_method(op, method))
