"""Every compiled entry called wrongly, in a process of its own: `python -m tests.ops.misuse`.

Prints one line for each call that neither raised a Python error nor gave the right numbers, and
"done" at the end: a signal would leave that away.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops import (
    Modes,
    Taps,
    WindowState,
    compiled,
    delta_memory,
    fir_conv,
    memory_step,
    spectral_conv,
    window_attention,
)
from spectral_window.ops.compiled.threads import KERNELS, Kernel
from spectral_window.ops.documents import given_documents
from spectral_window.ops.lagged_units import lagged_units
from spectral_window.ops.linear import linear_maps
from spectral_window.ops.memory_step import Parameters
from spectral_window.ops.pointwise import gated_add, rms_norm, swiglu, unit

REFUSED = (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError)


class Subclass(torch.Tensor):
    pass


def negative_bit(x: Tensor) -> Tensor:
    """x, whose memory holds -x."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def emptied(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


# The same tensor in another form ...
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "negative bit": negative_bit,
    "every other number": lambda x: torch.stack((x, x), -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "subclass": lambda x: x.as_subclass(Subclass),
    "leaf": lambda x: x.detach().clone().requires_grad_(),
}
# ... or another tensor, or none.
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "int32": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.cfloat(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "shorter": lambda x: x[..., :-1],
    "fewer rows": lambda x: x[:-1],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    "a dimension more": lambda x: x[None],
    "a number": lambda x: x.flatten()[0],
    "nothing": lambda x: None,
    "a list": lambda x: x.tolist(),
}
# What no kernel may take, whatever its declaration.
NEVER = {
    "bool": OTHERS["bool"],
    "meta": OTHERS["meta"],
    "shorter": lambda x: x.flatten()[:-1],
    "longer": lambda x: torch.cat((x.flatten(), x.flatten()[:1])),
    "float16": OTHERS["float16"],
    "subclass": FORMS["subclass"],
    "emptied": emptied,
    "sparse": OTHERS["sparse"],
    "an address": lambda x: x.data_ptr(),
}


def operators() -> dict[str, tuple[Callable[..., Any], list[Tensor | None], dict[str, Any]]]:
    """name: (operator, its tensors, what makes it the slow truth in float64)."""
    torch.manual_seed(0)
    slow = {"method": "reference"}

    def conv(u, decay, frequency, gain, state, positions, **options):
        modes = Modes(decay, frequency, gain)
        return spectral_conv(u, modes, state=state, positions=positions, **options)

    def attend(q, k, v, key, value, position, positions, **options):
        state = WindowState(key, value, position)
        options = {
            "window": 3,
            "rope_theta": 100.0,
            "state": state,
            "positions": positions,
        } | options
        out, after = window_attention(q, k, v, **options)
        return out, *after

    def norm(x, weight, method=None):
        if method:
            return (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight,)
        return (rms_norm(x, weight, 1e-6),)

    def gate(x, y, method=None):
        return (x * torch.sigmoid(x) * y,) if method else (swiglu(x, y),)

    def linear(x, a, b, bias, method="auto"):
        return linear_maps(
            x, (a, b), (bias, None), method="matmul" if method == "reference" else method
        )

    def remember(q, k, v, beta, decay, state, positions, method=None):
        memory = partial(delta_memory, method=method or "auto")  # "auto" is compiled code
        return memory(q, k, v, beta, decay=decay, state=state, positions=positions)

    def filtered(u, weights, state, positions, method="auto"):
        return fir_conv(u, Taps(weights), state=state, positions=positions, method=method)

    def lagged(u, weights, state, positions, method=None):
        if not method:
            return lagged_units(u, Taps(weights), 2, 1e-4, state=state, positions=positions)
        y, after = fir_conv(u, Taps(weights), state=state, positions=positions, method=method)
        away = u.new_zeros(1).bool() if positions is None else (positions < 0)[..., None, None]
        parts = (x.unflatten(-1, (2, -1)) for x in (u, y))
        rows = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-4) for x in parts)
        return *(torch.where(away, 0.0, x) for x in rows), after

    def length(x, method=None):
        if method:
            return (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-4),)
        return (unit(x, 1e-4),)

    def add(base, x, gate, scale, method=None):
        if method:
            return (base + (gate[..., None] * x).flatten(-2) * scale,)
        return (gated_add(base, x, gate, scale),)

    def token(q, v, attended, gates, memory, queries, lag, write, read, scale, at, method=None):
        own = Parameters(lag, write, read, scale, 1e-4)
        given, state = (q, v, attended, gates), (memory, queries)
        if not method and memory_step.serves({}, given, state, own):
            return memory_step.step(given, state, own, given_documents(at, None, q))
        lagged, after = fir_conv(q, Taps(lag), state=queries, positions=at)
        p, kappa, value = (x.unflatten(-1, (len(write), -1)) for x in (q, lagged, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        found, memory = delta_memory(
            unit(p, 1e-4),
            unit(kappa, 1e-4),
            value.to(wide),
            torch.sigmoid(gates[..., : len(write)].to(wide) + write),
            state=memory,
            positions=at,
            method=method or "auto",
        )
        opened = torch.sigmoid(gates[..., len(write) :].to(wide) + read)
        return gated_add(attended, found, opened, scale), memory, after

    def convolved(q, k, v, weights, before, at, method=None):
        if not method and memory_step.convolves({}, (q, k, v), weights, before):
            return memory_step.convolve((q, k, v), weights, before, given_documents(at, None, q))
        u = torch.cat((q, k, v), -1)
        y, after = fir_conv(u, Taps(weights), state=before, positions=at, method=method or "auto")
        return *y.chunk(3, -1), after

    found: dict[str, Any] = {
        "norm": (norm, [torch.randn(3, 2, 8), torch.rand(8)], slow),
        "gate": (gate, [torch.randn(3, 2, 8), torch.randn(3, 2, 8)], slow),
        "length": (length, [torch.randn(3, 2, 8)], slow),
        "add": (
            add,
            [torch.randn(3, 2, 8), torch.randn(3, 2, 2, 4), torch.rand(3, 2, 2), torch.rand(8)],
            slow,
        ),
        "linear": (linear, [torch.randn(3, 8), *torch.randn(2, 6, 8), torch.randn(6)], slow),
    }
    for time in (1, 6):
        modes = (torch.rand(8, 2), torch.randn(8, 2), torch.randn(8, 2))
        state = torch.randn(3, 8, 2, 2, dtype=torch.float64)
        begin = torch.tensor([4, 7, 0])
        at = begin[:, None] + torch.arange(time)
        found[f"conv {time}"] = conv, [torch.randn(3, time, 8), *modes, state, at], slow
        qkv = [torch.randn(3, time, 2, 4) for _ in range(3)]
        ring = [torch.randn(3, 6, 2, 4) for _ in range(2)]
        ring = [torch.where((begin > 0)[:, None, None, None], x, 0.0) for x in ring]
        found[f"window {time}"] = attend, [*qkv, *ring, begin, at], slow
        tensors = [torch.randn(3, time, 8), torch.randn(8, 4), torch.randn(3, 3, 8), at]
        found[f"filter {time}"] = filtered, tensors, slow
        found[f"lagged {time}"] = lagged, tensors, slow
    vectors = [torch.randn(3, 1, 8) for _ in range(3)]
    past = [torch.randn(3, 1, 4), torch.randn(3, 2, 4, 4), torch.randn(3, 3, 8)]
    own = [torch.randn(8, 4), torch.randn(2), torch.randn(2), torch.randn(8)]
    at = torch.tensor([[4], [-1], [0]])
    found["token"] = token, [*vectors, *past, *own, at], slow
    filters = torch.randn(24, 4), torch.randn(3, 3, 24)
    found["convolved token"] = convolved, [*vectors, *filters, at], slow
    for time in (1, 66):
        qkv = [F.normalize(torch.randn(3, time, 2, 4), dim=-1) for _ in range(3)]
        gates = [torch.rand(3, time, 2) for _ in range(2)]
        at = torch.tensor([4, 7, 0])[:, None] + torch.arange(time)
        tensors = [*qkv, *gates, torch.randn(3, 2, 4, 4), at]
        found[f"memory {time}"] = remember, tensors, {"method": "chunked"}
    return found


def answer(operator: Callable[..., Any], inputs: list[Any], **options: Any) -> list[Tensor]:
    """The outputs and, where a tensor wants one, its gradient."""
    outputs = [x for x in operator(*inputs, **options) if x is not None]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.is_leaf and x.requires_grad]
    grown = [y for y in outputs if y.requires_grad]
    if leaves and grown:
        given = [torch.ones_like(y) for y in grown]
        outputs += torch.autograd.grad(grown, leaves, given, allow_unused=True)
    return [x for x in outputs if x is not None]


def exact(x: Any) -> Any:
    """x as a plain float64 tensor (integers as they are)."""
    if not isinstance(x, Tensor):
        return x
    wants, x = x.requires_grad, x.detach().as_subclass(Tensor).resolve_neg().contiguous()
    return x.double().requires_grad_(wants) if x.is_floating_point() else x


def wrong(mine: list[Tensor], true: list[Tensor], bar: float = 2e-6) -> str | None:
    if len(mine) != len(true):
        return f"{len(mine)} results for {len(true)}"
    for i, (x, y) in enumerate(zip(mine, true, strict=True)):
        y = y.detach().double()
        if x.is_meta or x.shape != y.shape:
            return None if x.is_meta else f"result {i} has shape {list(x.shape)}"
        off = float((x.detach().double() - y).norm() / y.norm().clamp(min=1e-9))
        if not off <= bar:
            return f"result {i} is off by {off:.1e}"
    return None


def misused_operators() -> Iterator[str]:
    for name, (operator, inputs, slow) in operators().items():
        for at, x in enumerate(inputs):
            if x is None:
                continue
            for what, change in (FORMS | OTHERS).items():
                case = f"{name}, input {at}, {what}"
                try:
                    changed = [*inputs[:at], change(x), *inputs[at + 1 :]]
                except REFUSED:
                    continue  # an integer has no negative bit
                for grad in (False, True):
                    with torch.set_grad_enabled(grad):
                        try:
                            mine = answer(operator, changed)
                        except REFUSED as error:
                            if what in FORMS and what != "leaf":
                                yield f"{case}: {type(error).__name__}: {error}"
                            continue
                        if what in ("meta", "sparse", "a list"):
                            continue
                        try:
                            true = answer(operator, [exact(x) for x in changed], **slow)
                        except REFUSED as error:
                            yield f"{case}: taken, though {error}"
                            continue
                    half = any(isinstance(x, Tensor) and x.dtype.itemsize == 2 for x in changed)
                    if fault := wrong(mine, true, 2e-2 if half else 2e-6):
                        yield f"{case}, grad {grad}: {fault}"


def misused_kernels() -> Iterator[str]:
    calls = recorded_calls()
    for name, kernel in KERNELS.items():
        if name not in calls:
            yield f"{name}: no operator here calls it, add one that does"
            continue
        tiles, arguments = calls[name]
        for place, x in tensors_in(arguments):
            for what, change in NEVER.items():
                try:
                    kernel(tiles, *replaced(arguments, place, change(x)))
                except (*REFUSED, OverflowError):
                    continue
                yield f"{name}, argument {place}: took {what}"
        for count in (tiles + 1, tiles - 1):
            with contextlib.suppress(*REFUSED):
                kernel(count, *arguments)


def recorded_calls() -> dict[str, tuple[int, tuple[Any, ...]]]:
    """One call of each kernel, as the operators make it."""
    calls: dict[str, tuple[int, tuple[Any, ...]]] = {}
    plain = Kernel.__call__

    def recording(self: Kernel, tiles: int, *arguments: Any) -> None:
        calls.setdefault(self.name, (tiles, arguments))
        plain(self, tiles, *arguments)

    Kernel.__call__ = recording  # type: ignore[method-assign]
    try:
        for operator, inputs, _ in operators().values():
            with torch.no_grad():
                answer(operator, inputs)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                changed = [cast(x, dtype, at) for at, x in enumerate(inputs)]
                if inputs[0].dim() == 3 and len(inputs) == 6:  # modes and state keep their dtypes
                    changed = [changed[0], *inputs[1:]]
                    changed[0] = changed[0].requires_grad_()
                if operator.__name__ == "remember":  # so does its state
                    changed[5] = inputs[5]
                if operator.__name__ in ("filtered", "lagged"):
                    changed[1] = inputs[1]
                if operator.__name__ == "token":
                    changed[4], changed[6:] = inputs[4], inputs[6:]
                answer(operator, changed)
    finally:
        Kernel.__call__ = plain  # type: ignore[method-assign]
    return calls


def cast(x: Any, dtype: torch.dtype, at: int) -> Any:
    return x.detach().to(dtype).clone().requires_grad_(at == 0) if x.is_floating_point() else x


def tensors_in(tree: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, (tuple, list)):
        for i, part in enumerate(tree):
            yield from tensors_in(part, (*place, i))


def replaced(tree: Any, place: tuple[int, ...], value: Any) -> Any:
    if not place:
        return value
    parts = list(tree)
    parts[place[0]] = replaced(parts[place[0]], place[1:], value)
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def other_defaults() -> Iterator[str]:
    """The bits may not depend on the default dtype and device."""
    cases = operators()
    for x in (x for _, inputs, _ in cases.values() for x in inputs):
        if x is not None and x.is_floating_point() and x.dtype == torch.float32:
            x.requires_grad_()
    plain = {name: answer(operator, inputs) for name, (operator, inputs, _) in cases.items()}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for device in ("cpu", "meta"):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            try:
                for name, (operator, inputs, _) in cases.items():
                    for method in ("auto", "chunked"):
                        given = {"method": method} if "conv 6" in name or "window 6" in name else {}
                        found = answer(operator, inputs, **given)
                        same = method == "auto" and all(
                            torch.equal(x, y) for x, y in zip(found, plain[name], strict=True)
                        )
                        if not same and (method == "auto" or wrong(found, plain[name])):
                            yield f"{name} by {method} with {dtype} on {device} by default"
            finally:
                torch.set_default_dtype(torch.float32)
                torch.set_default_device("cpu")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for found in pkgutil.iter_modules(compiled.__path__, compiled.__name__ + "."):
        importlib.import_module(found.name)
    for misuse in (other_defaults, misused_operators, misused_kernels):
        for line in misuse():
            print(line)
    print("done")


if __name__ == "__main__":
    main()
