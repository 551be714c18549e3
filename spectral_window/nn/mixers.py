"""Mixers: the part of a block that lets tokens see one another. Their registry and common face.

`forward(x, positions=None, state=None) -> (y, state)`. The state is a typed tuple of tensors whose
first dimension is the batch, so that beams can be reordered and rows selected without knowing what
is inside. A file each:

    spectral_window  the paper's layer: Y = (RMSNorm(Y_spec) + Y_local) W_out, constant state
    memory           the same with a delta-rule memory beside the window, constant state
    attention        the Transformer baseline: full causal attention with RoPE, state grows with
                     every token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectral_window.errors import UserError
from spectral_window.nn.options import Option, Part, Registry, settings
from spectral_window.ops.documents import Documents
from spectral_window.ops.methods import METHODS, resolve

BRANCHES = ("spectral", "window")
MIXERS: Registry[Mixer] = Registry("mixer")
register = MIXERS.register
State = TypeVar("State")

ROPE_THETA = Option(
    "rope_theta", float, 10000.0, above=0.0, always=True, help="base of the rotary angles"
)


def map_state(state: State, fn: Callable[[Tensor], Tensor]) -> State:
    """Apply `fn` to every tensor of a state; the result has the same type. Branches that are off
    (None) stay so."""
    if state is None:
        return state
    if isinstance(state, Tensor):
        return fn(state)  # type: ignore[return-value]
    parts = [map_state(part, fn) for part in state]  # type: ignore[attr-defined]
    return type(state)(*parts)


class Mixer(Part, nn.Module):
    """[B, T, D] -> [B, T, D] with a state.

    hidden_size D, num_heads H (D / H is the head size), eps of norms; options: those that it is
    registered with, by name, and those of the parts that they name. `settings` has them all, with
    defaults where none was given. Raises UserError for any other and for bad values.
    """

    label = ""  # what a reader calls a model of this mixer; "": by its own name
    constant_state = True  # the state after any number of tokens has the same size
    branches: tuple[str, ...] = ()  # of `BRANCHES`, those it computes with
    visible = ""  # the keys that a query sees, in words; "": there is no attention

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        eps: float = 1e-6,
        **options: Any,
    ):
        super().__init__()
        self.settings = settings(self, options)
        self.check({"hidden_size": hidden_size, "num_attention_heads": num_heads} | self.settings)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.eps = eps
        # a speed choice: see `set_methods`
        self.methods = dict.fromkeys(METHODS, "auto")

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        size, heads = values["hidden_size"], values["num_attention_heads"]
        if size % heads:
            near = next(  # outwards from `heads`, for there may be two thousand million below
                n
                for distance in range(1, max(heads, size))
                for n in (heads - distance, heads + distance)
                if 0 < n <= size and size % n == 0
            )
            raise UserError(
                f"hidden_size {size} does not divide into num_attention_heads {heads} (config): "
                f"use {near} heads, or hidden_size {max(1, round(size / heads)) * heads}"
            )

    def forward(
        self, x: Tensor, positions: Tensor | Documents | None = None, state: Any = None
    ) -> tuple[Tensor, Any]:
        """x [B, T, D], positions [B, T] int64, what was understood of them, or None (see
        `spectral_window.ops`), state of the tokens before or None."""
        raise NotImplementedError

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        """The operators that it calls, by their names in METHODS, each with what `resolve` asks
        for beside the input."""
        return []

    def method(self, op: str) -> str:
        """The method chosen for an operator."""
        return self.methods.get(op, "auto")

    def init_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """The state before any token."""
        raise NotImplementedError

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """Bytes of the state after `context` tokens."""
        raise NotImplementedError

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations of a forward pass a token (2 a multiply-add), averaged over
        `context` tokens."""
        raise NotImplementedError

    def count_visible(self, positions: Tensor, window: int) -> Tensor:
        """How many keys a query at each of `positions` in a document sees in a model of this
        `window`, itself and the last ones before it: int64; 0 where there is no attention."""
        return torch.zeros_like(positions)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))


def check_rotary(values: Mapping[str, Any]) -> None:
    """Raise UserError for a head size that rotary positions cannot turn."""
    size, heads = values["hidden_size"], values["num_attention_heads"]
    if size // heads % 2:
        raise UserError(
            f"head size {size // heads} is odd (config: hidden_size {size} / "
            f"num_attention_heads {heads}): rotary positions turn pairs of channels; make it even"
        )


def set_methods(module: nn.Module, **methods: str) -> None:
    """Choose the operators' methods in every mixer below `module`, by the operators' names in
    METHODS; "auto" for those not named. A choice of speed: it is never saved.

    Raises UserError for an unknown operator or method.
    """
    probe = torch.empty(0, dtype=torch.float32, device="cpu")
    for op, method in methods.items():
        resolve(op, method, probe)
    for part in module.modules():
        if isinstance(part, Mixer):
            part.methods = {**dict.fromkeys(METHODS, "auto"), **methods}
