"""Mixers: the part of a block that lets tokens see one another.

One face for all: `forward(x, positions=None, state=None) -> (y, state)`. The state is a typed
tuple of tensors whose first dimension is the batch, so that beams can be reordered and rows
selected without knowing what is inside.

    spectral_window  the paper's layer: Y = (RMSNorm(Y_spec) + Y_local) W_out, constant state
    memory           the same with a delta-rule memory beside the window (`memory`), constant state
    attention        the Transformer baseline: full causal attention with RoPE, state grows with
    every token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_window.errors import UserError
from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS
from spectral_window.nn.layers import project
from spectral_window.nn.options import Option, Part, Registry, settings
from spectral_window.ops.documents import Documents, given_documents
from spectral_window.ops.methods import METHODS, Method, enrol, resolve
from spectral_window.ops.rotary import rotate
from spectral_window.ops.window import window_attention
from spectral_window.ops.window_state import WindowState, empty_state

BRANCHES = ("spectral", "window")
MIXERS: Registry[Mixer] = Registry("mixer")
register = MIXERS.register
State = TypeVar("State")

ROPE_THETA = Option(
    "rope_theta", float, 10000.0, above=0.0, always=True, help="base of the rotary angles"
)
PAPERS_OPTIONS = (
    Option("window", int, 32, always=True, help="W: a token sees its chunk and the one before"),
    Option(
        "kernel", str, "damped_oscillator", choices=KERNELS, always=True,
        help="of the convolution (nn/kernels.py)",
    ),
    Option(
        "fusion", str, "norm_add", choices=FUSIONS, always=True,
        help="how the two branches become one (nn/fusions.py)",
    ),
    Option(
        "branches", tuple, BRANCHES, choices=BRANCHES, always=True,
        help="those that are on, one or both",
    ),
    ROPE_THETA,
)  # fmt: skip


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


class SpectralWindowState(NamedTuple):
    """spectral: the kernel's, [B, D, M, 2] float64 for oscillators, the last inputs [B, L - 1, D]
    for taps; window: `WindowState`, at most 2W keys and values. None where a branch is off."""

    spectral: Tensor | None
    window: WindowState | None


def _check_rotary(values: Mapping[str, Any]) -> None:
    """Raise UserError for a head size that rotary positions cannot turn."""
    size, heads = values["hidden_size"], values["num_attention_heads"]
    if size // heads % 2:
        raise UserError(
            f"head size {size // heads} is odd (config: hidden_size {size} / "
            f"num_attention_heads {heads}): rotary positions turn pairs of channels; make it even"
        )


@register("spectral_window", *PAPERS_OPTIONS)
class SpectralWindowMixer(Mixer):
    """The paper's layer (section 1): Y = (RMSNorm(Y_spec) + Y_local) W_out.

    Y_spec is the causal convolution of X W_conv + b with a kernel of `KERNELS`, Y_local =
    Attention(X) W_local in chunks; a fusion of `FUSIONS` brings them together. The convolution's
    projection alone has a bias. `branches` switches one of them off for ablations.
    """

    label = "SWH"
    visible = "its chunk up to itself and all of the chunk before it"
    state_type: type[Any] = SpectralWindowState

    def __init__(self, **options: Any):
        super().__init__(**options)
        told, dim = self.settings, self.hidden_size
        self.window, self.rope_theta = told["window"], told["rope_theta"]
        self.branches = branches = told["branches"]
        if "spectral" in branches:
            self.conv_proj = nn.Linear(dim, dim, bias=True)
            self.kernel = KERNELS.make(told, told["kernel"], dim)
        if "window" in branches:
            self.q_proj = nn.Linear(dim, dim, bias=False)
            self.k_proj = nn.Linear(dim, dim, bias=False)
            self.v_proj = nn.Linear(dim, dim, bias=False)
            self.local_proj = nn.Linear(dim, dim, bias=False)
        self.fusion = FUSIONS.make(told, told["fusion"], dim, self.eps, branches)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        super().check(values)
        if "window" in values["branches"]:
            _check_rotary(values)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | Documents | None = None,
        state: SpectralWindowState | None = None,
    ) -> tuple[Tensor, SpectralWindowState]:
        documents = given_documents(positions, None, x)
        spectral = local = spectral_state = None
        local_states: tuple[Any, ...] = (None,)
        projected = self._project(x)
        if "spectral" in self.branches:
            spectral, spectral_state = self.kernel.convolve(
                projected.pop(),
                state=None if state is None else state.spectral,
                positions=documents,
                method=self.method(self.kernel.operator),
            )
        if "window" in self.branches:
            attended, local_states = self._local(projected, documents, state)
            local = project(attended, self.local_proj)[0]
        (y,) = project(self.fusion(spectral, local), self.out_proj)
        return y, self.state_type(spectral_state, *local_states)

    def _local(
        self, projected: list[Tensor], documents: Documents | None, state: Any
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """What is local, before W_local: [B, T, D] from the results of `_local_maps`, and the
        states beside the convolution's, in the order of `state_type`."""
        q, k, v = (self._split(part) for part in projected)
        attended, after = window_attention(
            q,
            k,
            v,
            window=self.window,
            rope_theta=self.rope_theta,
            state=None if state is None else state.window,
            positions=documents,
            method=self.method("window"),
        )
        return attended.flatten(-2), (after,)

    def _local_maps(self) -> list[nn.Linear]:
        """The maps of the mixer's input that `_local` takes the results of."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def _project(self, x: Tensor) -> list[Tensor]:
        """What `_local` takes and the convolution's input (of the branches that are on): all are
        maps of one x, and made together."""
        maps = self._local_maps() if "window" in self.branches else []
        if "spectral" in self.branches:
            maps.append(self.conv_proj)
        return list(project(x, *maps))

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        called: list[tuple[str, tuple[Any, ...]]] = []
        if "spectral" in self.branches:
            called.append((self.kernel.operator, tuple(self.kernel())))
        if "window" in self.branches:
            called.append(("window", ()))
        return called

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> SpectralWindowState:
        spectral = window = None
        if "spectral" in self.branches:
            spectral = self._spectral_state(batch_size, dtype, torch.device(device))
        if "window" in self.branches:
            size = self.head_dim
            window = empty_state(
                batch_size, self.window, self.num_heads, size, size, dtype=dtype, device=device
            )
        return SpectralWindowState(spectral, window)

    def _spectral_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The convolution's state before any token, as the kernel's kind has it."""
        kernel = self.kernel()
        shape = kernel.state_shape(batch)
        return torch.zeros(shape, dtype=kernel.state_dtype(dtype, device), device=device)

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        total = 0
        if "spectral" in self.branches:
            total += self._spectral_state(1, dtype, torch.device("meta")).nbytes
        if "window" in self.branches:
            total += 2 * 2 * self.window * self.hidden_size * dtype.itemsize + 8
        return batch_size * total

    def flops_per_token(self, context: int) -> int:
        total = 0
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("kernel."):  # maps of every token
                total += 2 * parameter.numel()
        if "spectral" in self.branches:
            total += self.kernel().flops_per_token()
        if "window" in self.branches:
            seen = _mean_window(context, self.window)
            total += int(4 * self.hidden_size * seen)  # scores and weighted sum
        return total

    def count_visible(self, positions: Tensor, window: int) -> Tensor:
        if "window" not in self.branches:
            return super().count_visible(positions, window)
        return positions % window + 1 + window * (positions >= window)


def _mean_window(context: int, window: int) -> float:
    """Mean number of keys a query sees in a document of `context` tokens: (t mod W) + 1, and W
    more after chunk 0."""
    if context < 1:
        return 0.0
    full, rest = divmod(context, window)
    own = full * window * (window + 1) / 2 + rest * (rest + 1) / 2
    return (own + max(context - window, 0) * window) / context


class AttentionState(NamedTuple):
    """key, value: [B, S, H, K] in the model's dtype, keys already rotated; position: [B, S] int64,
    -1 where a key is padding or belongs to a document that has ended. S grows with every call."""

    key: Tensor
    value: Tensor
    position: Tensor


@register("attention", ROPE_THETA)
class AttentionMixer(Mixer):
    """Full causal attention with RoPE, by PyTorch's fused kernel: the Transformer baseline. No
    biases."""

    label = "Transformer"
    constant_state = False
    visible = "itself and all tokens before it"

    def __init__(self, **options: Any):
        super().__init__(**options)
        dim = self.hidden_size
        self.rope_theta = self.settings["rope_theta"]
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        super().check(values)
        _check_rotary(values)

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [("attention", ())]

    def forward(
        self,
        x: Tensor,
        positions: Tensor | Documents | None = None,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, AttentionState]:
        batch, time = x.shape[:2]
        documents = given_documents(positions, None, x)
        if documents is not None:
            documents.check(None if state is None else self._next(state))
        positions = None if documents is None else documents.positions
        q, k, v = map(self._split, project(x, self.q_proj, self.k_proj, self.v_proj))
        past = 0 if state is None else state.key.shape[1]
        # where every row is one document without padding, no mask is built and the fused causal
        # kernel is used
        plain = positions is None
        if positions is None:
            begin = x.new_zeros(batch, dtype=torch.int64) if state is None else self._next(state)
            positions = begin[:, None] + torch.arange(time, dtype=torch.int64, device=x.device)
        q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        if state is not None:
            k, v = torch.cat((state.key, k), 1), torch.cat((state.value, v), 1)
        key_position = positions if state is None else torch.cat((state.position, positions), 1)
        mask = None
        if not plain or past:
            mask, key_position = self._mask(positions, key_position)
        attend = resolve("attention", self.method("attention"), q).function
        y = attend(q, k, v, mask, mask is None and past == 0)
        if not plain:
            y = torch.where((positions >= 0)[..., None, None], y, 0.0)
        return project(y.flatten(-2), self.out_proj)[0], AttentionState(k, v, key_position)

    @staticmethod
    def _next(state: AttentionState) -> Tensor:
        if not state.position.shape[1]:
            return state.position.new_zeros(state.position.shape[0])
        return state.position.amax(1) + 1

    @staticmethod
    def _mask(positions: Tensor, key_position: Tensor) -> tuple[Tensor, Tensor]:
        """Which keys a query sees [B, T, S], and the keys' positions with those of ended documents
        set to -1."""
        past = key_position.shape[1] - positions.shape[1]
        token = key_position >= 0
        begins = (key_position == 0) & (
            torch.arange(key_position.shape[1], dtype=torch.int64, device=token.device) >= past
        )
        document = begins.cumsum(1)
        query = document[:, past:]
        mask = (
            (query[..., None] == document[:, None])
            & (key_position[:, None] <= positions[..., None])
            & token[:, None]
        )
        itself = torch.arange(
            key_position.shape[1], dtype=torch.int64, device=token.device
        ) == past + torch.arange(
            positions.shape[1], dtype=torch.int64, device=token.device
        ).unsqueeze(-1)
        mask = mask | (
            itself & (positions < 0)[..., None]
        )  # padding attends to itself: no row is empty
        return mask, torch.where(document == document[:, -1:], key_position, -1)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> AttentionState:
        empty = torch.zeros(
            batch_size, 0, self.num_heads, self.head_dim, dtype=dtype, device=device
        )
        return AttentionState(
            empty, empty, torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        )

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        return batch_size * context * (2 * self.hidden_size * dtype.itemsize + 8)

    def flops_per_token(self, context: int) -> int:
        return 2 * sum(p.numel() for p in self.parameters()) + 2 * self.hidden_size * (context + 1)

    def count_visible(self, positions: Tensor, window: int) -> Tensor:
        return positions + 1


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """q [B, T, H, K], k and v [B, S, H, K], mask [B, T, S] or None -> [B, T, H, K]."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=causal,
    ).transpose(1, 2)


enrol(
    "attention",
    Method("sdpa", _sdpa, "PyTorch's fused scaled_dot_product_attention, over every earlier key"),
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
