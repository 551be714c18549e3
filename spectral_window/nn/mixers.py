"""Mixers: the part of a block that passes information between tokens; base class and registry.

`forward(x, positions=None, state=None) -> (y, state)`. The state is a NamedTuple of tensors whose
first dimension is the batch, so that code can reorder beams and select rows without knowing its
content. Each mixer has its own file:

    spectral_window  the paper's layer: Y = (RMSNorm(Y_spec) + Y_local) W_out, constant state
    memory           the same with a delta-rule memory beside the window, constant state
    attention        the Transformer baseline: full causal attention with RoPE, growing state
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectral_window.errors import UserError
from spectral_window.nn.options import Option, Part, PartRegistry, settings
from spectral_window.ops.documents import Documents
from spectral_window.ops.methods import METHODS, resolve

BRANCHES = ("spectral", "window")
MIXERS: PartRegistry[Mixer] = PartRegistry("mixer")
register = MIXERS.register
State = TypeVar("State")

ROPE_THETA = Option(
    "rope_theta", float, 10000.0, above=0.0, always=True, help="base of the rotary angles"
)


def map_state(state: State, fn: Callable[[Tensor], Tensor]) -> State:
    """Apply `fn` to every tensor of a state; return a state of the same type.

    None, the state of a branch that is off, stays None.
    """
    if state is None:
        return state
    if isinstance(state, Tensor):
        return fn(state)  # type: ignore[return-value]
    parts = [map_state(part, fn) for part in state]  # type: ignore[attr-defined]
    return type(state)(*parts)


class Mixer(Part, nn.Module):
    """Base class: [B, T, D] -> [B, T, D] with a state.

    Args:
        hidden_size: D.
        num_heads: H; the head size is D / H.
        eps: of norms.
        layer: the number of its block, from 0.
        options: the options that the mixer is registered with, and those of the parts that these
            name. The attribute `settings` has all of them, with defaults for those not given.

    Raises:
        UserError: an unknown option or a bad value.
    """

    label = ""  # the name of such models in reports; "": the name of the mixer
    constant_state = True  # the state has the same size after any number of tokens
    branches: tuple[str, ...] = ()  # those of `BRANCHES` that it has
    # Whether several processes can share a row: `forward` then gets `SpanDocuments`. It says so of
    # a class alone and not of its subclasses, which may pass more between tokens.
    in_spans = False
    visible = ""  # the keys that a query sees, in words; "": it has no attention

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        eps: float = 1e-6,
        layer: int = 0,
        **options: Any,
    ):
        super().__init__()
        self.settings = settings(self, options)
        self.check({"hidden_size": hidden_size, "num_attention_heads": num_heads} | self.settings)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.eps = eps
        self.layer = layer
        # a choice of speed: see `set_methods`
        self.methods = dict.fromkeys(METHODS, "auto")

    @classmethod
    def check_in_spans(cls) -> None:
        """Raise UserError for a mixer whose rows several processes cannot share."""
        if not vars(cls).get("in_spans", False):
            raise UserError(
                f"rows of {cls.label or cls.__name__} models cannot be shared by processes "
                "(context_parallel): use mixer spectral_window or memory, or whole rows"
            )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        size, heads = values["hidden_size"], values["num_attention_heads"]
        if size % heads:
            near = next(  # outwards from `heads`: below it there may be two thousand million
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
        """Mix tokens.

        Args:
            x: [B, T, D].
            positions: [B, T] int64, or `Documents`, or None (see `spectral_window.ops`).
            state: the state after the earlier tokens, or None.

        Returns:
            y [B, T, D] and the state after the last token of each row.
        """
        raise NotImplementedError

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Return the operators it calls, by their names in METHODS.

        Each comes with the arguments of `resolve` after the input.
        """
        return []

    def method(self, op: str) -> str:
        """Return the method that is set for an operator."""
        return self.methods.get(op, "auto")

    def init_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """Return the state before any token."""
        raise NotImplementedError

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """Return the bytes of the state after `context` tokens."""
        raise NotImplementedError

    def flops_per_token(self, context: int) -> int:
        """Return the floating-point operations of a forward pass per token.

        A multiply-add counts as 2. Averaged over `context` tokens.
        """
        raise NotImplementedError

    def count_visible(self, positions: Tensor, window: int) -> Tensor:
        """Return the number of keys that a query sees, itself and the last ones before it.

        Args:
            positions: positions of queries in a document.
            window: the model's window.

        Returns:
            int64 of the same shape; 0 for a mixer without attention.
        """
        return torch.zeros_like(positions)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))


def check_rotary(values: Mapping[str, Any]) -> None:
    """Raise UserError for an odd head size, which the rotary embedding cannot rotate."""
    size, heads = values["hidden_size"], values["num_attention_heads"]
    if size // heads % 2:
        raise UserError(
            f"head size {size // heads} is odd (config: hidden_size {size} / "
            f"num_attention_heads {heads}): rotary positions turn pairs of channels; make it even"
        )


def set_methods(module: nn.Module, **methods: str) -> None:
    """Set the methods of operators in every mixer of `module`.

    This is a choice of speed and is never saved.

    Args:
        module: a model or a mixer.
        methods: operator -> method, by the names in METHODS; "auto" for operators not named.

    Raises:
        UserError: an unknown operator or method.
    """
    probe = torch.empty(0, dtype=torch.float32, device="cpu")
    for op, method in methods.items():
        resolve(op, method, probe)
    for part in module.modules():
        if isinstance(part, Mixer):
            part.methods = {**dict.fromkeys(METHODS, "auto"), **methods}
