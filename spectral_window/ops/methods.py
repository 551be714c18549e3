"""The table of methods: the ways to compute each operator, in order of preference.

A method is a choice of speed and not of architecture: all methods of an operator compute the same
function, and no config file names one. The module of an operator enrols its methods. `resolve`
returns the first that can compute the tensors of a call and is fast there, with the reasons why
those before it were skipped.

    spectral     convolution with damped oscillators      `spectral.spectral_conv`
    fir          convolution with finite filters          `fir.fir_conv`
    window       chunked sliding-window attention         `window.window_attention`
    delta        key-value memory by the delta rule       `delta_memory.delta_memory`
    linear       several linear maps of one input         `linear.linear_maps`
    rms_norm, swiglu, unit, gated_add                     `pointwise`
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_window.errors import UserError, unknown
from spectral_window.ops.tracing import (
    PLAIN,
    is_exported,
    is_recorded,
    is_transformed,
    may_bypass,
)

HAS_NUMBA = find_spec("numba") is not None
HAS_TRITON = find_spec("triton") is not None

Reason = str | None


class Method(NamedTuple):
    """One way to compute an operator.

    Reasons are fixed texts: a reason that contained a size would tie a recorded graph to that size.

    Attributes:
        name: the value of `method=`.
        function: called by the operator with its checked inputs.
        cost: one line: what it does, its order of work, on which device.
        runs_on: called with the tensors of a call (the input [B, T, ...] first); returns why the
            method cannot compute them, or None. Absent: it can compute all.
        pays: the same for why another method is faster there; used under "auto" only. Absent: it is
            always fast.
    """

    name: str
    function: Callable[..., Any]
    cost: str
    runs_on: Callable[..., Reason] | None = None
    pays: Callable[..., Reason] | None = None


class Choice(NamedTuple):
    """The result of `resolve`.

    Attributes:
        name: the method's name.
        reason: the method's cost, or that it was asked for by name.
        passed: the name of every preferred method that was skipped, with the reason.
        function: the method's function.
    """

    name: str
    reason: str
    passed: tuple[tuple[str, str], ...]
    function: Callable[..., Any]


METHODS: dict[str, dict[str, Method]] = {}


def enrol(op: str, *methods: Method, before: str | None = None) -> None:
    """Add `methods` to operator `op`, in order of preference.

    Args:
        op: the operator's name.
        methods: the methods.
        before: the name of a method in front of which they are inserted; None appends them.

    Raises:
        UserError: the operator has a method of that name, or has no method `before`.
    """
    table = METHODS.setdefault(op, {})
    for method in methods:
        if method.name in table or method.name == "auto":
            raise UserError(f"method '{method.name}' of '{op}' is enrolled already: rename it")
    if before is not None and before not in table:
        raise unknown(f"{op} method", before, table)
    entries = list(table.values())
    at = len(entries) if before is None else list(table).index(before)
    entries[at:at] = methods
    table.clear()
    table.update((method.name, method) for method in entries)


def resolve(op: str, method: str, x: Tensor, *others: Any) -> Choice:
    """Choose the method that computes operator `op`.

    Args:
        op: the operator's name.
        method: a method's name, or "auto".
        x: the input [B, T, ...].
        others: the operator's other tensors; those left out exclude no method.

    Raises:
        UserError: an unknown operator or method (the message suggests the nearest name), or a
            method that cannot compute these tensors (with the reason).

    Example:
        >>> resolve("spectral", "chunked", torch.zeros(1, 5, 2)).name
        'chunked'
    """
    if op not in METHODS:
        raise unknown("operator", op, METHODS)
    table = METHODS[op]
    if method == "auto":
        passed: tuple[tuple[str, str], ...] = ()
        for each in table.values():
            why = None if each.runs_on is None else each.runs_on(x, *others)
            if why is None and each.pays is not None:
                why = each.pays(x, *others)
            if why is None:
                return Choice(each.name, each.cost, passed, each.function)
            passed = (*passed, (each.name, why))
        raise UserError(f"no method serves {x.dtype} on {x.device} ({op}): {passed}")
    if method not in table:
        raise unknown(f"{op} method", method, [*table, "auto"])
    chosen = table[method]
    why = None if chosen.runs_on is None else chosen.runs_on(x, *others)
    if why is not None:
        tensor = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
        raise UserError(f"method '{method}' ({op}): {why}, not {tensor}: use 'auto'")
    return Choice(method, "asked for by name", (), chosen.function)


def serving(op: str, x: Tensor, *others: Any) -> list[str]:
    """Return the methods of `op` that can compute these tensors, in order of preference."""
    return [
        each.name
        for each in METHODS[op].values()
        if each.runs_on is None or each.runs_on(x, *others) is None
    ]


# ------------------------------------------------------------------ reasons that methods share


def one_token(x: Tensor, *_: Any) -> Reason:
    """Reason of methods that take a single token."""
    if x.dim() > 1 and x.shape[1] == 1:
        return None
    return "it takes one token a call"


def numba_on_cpu(*dtypes: torch.dtype) -> Callable[..., Reason]:
    """Reason of compiled code: it needs numba, a CPU and one of `dtypes` (none given: any)."""
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    needs = f"it needs numba, and {names} on a CPU" if names else "it needs numba and a CPU"

    def reason(x: Tensor, *_: Any) -> Reason:
        if not HAS_NUMBA:
            return "it needs numba, which is not installed"
        if x.device.type != "cpu" or (dtypes and x.dtype not in dtypes):
            return needs
        return None

    return reason


def triton_on_gpu(*dtypes: torch.dtype) -> Callable[..., Reason]:
    """Reason of Triton kernels: a GPU, or for tests the slow interpreter (TRITON_INTERPRET=1)."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    needs = f"it needs the package triton and a GPU (or TRITON_INTERPRET=1 on a CPU), and {names}"

    def reason(x: Tensor, *_: Any) -> Reason:
        interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        there = HAS_TRITON and x.device.type == ("cpu" if interpreted else "cuda")
        if not there or x.dtype not in dtypes:
            return needs
        return "the graph may run elsewhere" if is_exported() else None

    return reason


def not_exported(*_: Any) -> Reason:
    """Reason of compiled code under "auto": an exported graph may run elsewhere."""
    return "the graph may run elsewhere: plain torch" if is_exported() else None


def not_transformed(*_: Any) -> Reason:
    """Reason of code that torch.func and forward-mode derivatives cannot transform."""
    if is_transformed() and not is_recorded():
        return "torch.func and forward-mode derivatives know plain torch alone"
    return None


def not_interpreted(x: Tensor, *_: Any) -> Reason:
    """Reason of Triton kernels under "auto"."""
    return "Triton's interpreter is for tests" if x.device.type == "cpu" else None


def not_recorded(*tensors: Any) -> Reason:
    """Reason of compiled code whose derivatives are only recorded in eager mode."""
    if is_recorded() or is_transformed():
        return "graphs and transformations need torch's operations"
    if any(isinstance(x, Tensor) and type(x) not in PLAIN for x in tensors):
        return "it needs plain tensors"
    return None


def past_the_dispatcher(*tensors: Tensor | None) -> Reason:
    """Reason of compiled code that works on the tensors' memory directly."""
    if may_bypass(*tensors):
        return None
    return "gradients, graphs and transformations need torch's own operations"


def first_of(*reasons: Callable[..., Reason]) -> Callable[..., Reason]:
    """Return a reason that is the first of `reasons` that applies."""

    def reason(*args: Any) -> Reason:
        for each in reasons:
            why = each(*args)
            if why is not None:
                return why
        return None

    return reason
