"""The mixer `spectral_window`: the paper's layer (section 1).

    Y = (RMSNorm(Y_spec) + Y_local) W_out

Y_spec is the causal convolution of X W_conv + b with learned kernels, Y_local = Attention(X)
W_local in chunks of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS
from spectral_window.nn.layers import project
from spectral_window.nn.mixers import BRANCHES, ROPE_THETA, Mixer, check_rotary, register
from spectral_window.nn.options import Option
from spectral_window.ops.context_parallel import SpanDocuments
from spectral_window.ops.documents import Documents, given_documents
from spectral_window.ops.spans import Share, last_inputs, ring
from spectral_window.ops.window import window_attention
from spectral_window.ops.window_state import WindowState, empty_state

OPTIONS = (
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


class SpectralWindowState(NamedTuple):
    """The state of a `SpectralWindowMixer`; None for a branch that is off.

    Attributes:
        spectral: the convolution's state: [B, D, M, 2] float64 for oscillators, the last inputs
            [B, L - 1, D] for taps.
        window: at most 2W keys and values.
    """

    spectral: Tensor | None
    window: WindowState | None


@register("spectral_window", *OPTIONS)
class SpectralWindowMixer(Mixer):
    """The paper's layer (section 1): Y = (RMSNorm(Y_spec) + Y_local) W_out.

    Y_spec is the causal convolution of X W_conv + b with a kernel of `KERNELS`, and
    Y_local = Attention(X) W_local in chunks; a fusion of `FUSIONS` combines them. Only the
    projection of the convolution has a bias. `branches` can switch one branch off, for ablations.

    Example:
        The state after the first part of a text continues it:

        >>> layer = SpectralWindowMixer(hidden_size=16, num_heads=2, window=4)
        >>> x = torch.randn(1, 9, 16)
        >>> first, state = layer(x[:, :5])
        >>> second, state = layer(x[:, 5:], state=state)
        >>> torch.allclose(torch.cat((first, second), 1), layer(x)[0], atol=1e-5)
        True
    """

    label = "SWH"
    in_spans = True
    visible = "its chunk up to itself and all of the chunk before it"
    state_type: type[Any] = SpectralWindowState

    def __init__(self, **options: Any):
        super().__init__(**options)
        options, dim = self.settings, self.hidden_size
        self.window, self.rope_theta = options["window"], options["rope_theta"]
        self.branches = branches = options["branches"]
        if "spectral" in branches:
            self.conv_proj = nn.Linear(dim, dim, bias=True)
            self.kernel = KERNELS.make(options, options["kernel"], dim)
        if "window" in branches:
            self.q_proj = nn.Linear(dim, dim, bias=False)
            self.k_proj = nn.Linear(dim, dim, bias=False)
            self.v_proj = nn.Linear(dim, dim, bias=False)
            self.local_proj = nn.Linear(dim, dim, bias=False)
        self.fusion = FUSIONS.make(options, options["fusion"], dim, self.eps, branches)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        super().check(values)
        if "window" in values["branches"]:
            check_rotary(values)

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
        more_states = self._convolve_first(projected, documents, state)
        if isinstance(documents, SpanDocuments):
            state = self._receive(projected, documents)
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
        return y, self.state_type(spectral_state, *local_states, *more_states)

    def _convolve_first(
        self, projected: list[Tensor], documents: Documents | None, state: Any
    ) -> tuple[Any, ...]:
        """Convolve what `_local` takes, in place, before all else; here nothing is.

        Args:
            projected: the results of `_project`.
            documents: documents and padding, or None.
            state: the mixer's state, or None.

        Returns:
            The states of that, which are the last of `state_type`.
        """
        return ()

    def _local(
        self, projected: list[Tensor], documents: Documents | None, state: Any
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Compute the local output before W_local.

        Args:
            projected: the results of `_local_maps`.
            documents: documents and padding, or None.
            state: the mixer's state, or None.

        Returns:
            [B, T, D], and the states between that of the convolution and those of
            `_convolve_first`, in the order of `state_type`.
        """
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

    def _receive(self, projected: list[Tensor], documents: SpanDocuments) -> Any:
        """Hand over to the later spans, and return the state at which this one starts.

        Args:
            projected: the results of `_project`; the first is replaced by the exchange's anchor.
            documents: of this span.
        """
        shares = self._shares(projected, documents)
        projected[0], states = documents.receive(projected[0], list(shares.values()))
        before: dict[str, Any] = dict(zip(shares, states, strict=True))
        if "window" in self.branches:
            ends = self._split(before.pop("key")), self._split(before.pop("value"))
            before["window"] = ring(*ends, documents.start, self.window, self.rope_theta)
        return self.state_type(**dict.fromkeys(self.state_type._fields) | before)

    def _shares(self, projected: list[Tensor], documents: SpanDocuments) -> dict[str, Share]:
        """Return what this span does to each part of the state; keys and values for the window."""
        shares = {}
        if "window" in self.branches:
            for name, x in zip(("key", "value"), projected[1:3], strict=True):
                shares[name] = last_inputs(x, 2 * self.window, documents)
        if "spectral" in self.branches:
            method = self.method(self.kernel.operator)
            shares["spectral"] = self.kernel.share(projected[-1], documents, method)
        return shares

    def _local_maps(self) -> list[nn.Linear]:
        """Return the linear maps of the mixer's input whose results `_local` takes."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def _project(self, x: Tensor) -> list[Tensor]:
        """Return what `_local` takes, then the convolution's input, for the branches that are on.

        All are linear maps of one x and are computed together.
        """
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
        """Return the convolution's state before any token, in the form of its kernel."""
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
    """Return the mean number of keys that a query sees in a document of `context` tokens.

    It is (t mod W) + 1, and W more after chunk 0.
    """
    if context < 1:
        return 0.0
    full, rest = divmod(context, window)
    own = full * window * (window + 1) / 2 + rest * (rest + 1) / 2
    return (own + max(context - window, 0) * window) / context
