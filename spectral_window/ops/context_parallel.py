"""Context parallelism: a row of T tokens over P processes, each with a span of it.

A process computes everything of its own span. Only where a layer passes information between tokens
it needs something of the spans before it, and that is a state of constant size (see `spans.py`). So
the processes exchange once or twice a layer, the same number of bytes for any T, and the backward
pass sends the gradients of what was received back the same way:

    process 0        1          2          3          each sends to all later ones (forward),
       |------------->|          |          |         and each receives the gradients of what
       |------------------------>|          |         it sent from all later ones (backward)
       |----------------------------------->|

Every process has the same input, whole rows, and takes its own span of them: token ids are small
beside activations, and the documents of all spans are then known to all. Its output is that of its
span. Outputs, gradients and states are those of one process up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_window.errors import UserError
from spectral_window.ops.documents import Documents
from spectral_window.ops.spans import Share, Span, bounds, read_spans, state_before

ALIGNED = (
    16  # bytes to which each tensor of a message is padded, as a view of another dtype asks for
)


class ContextParallel:
    """The processes that share rows, and the exchange between them.

    Pass it to a model: `model(input_ids, context_parallel=ContextParallel(group))`.

    Args:
        group: a process group, in the order of the spans; None for all processes.

    Attributes:
        rank: the number of this process, and of its span, among them.
        size: P.
        sent: bytes that this process has sent so far.

    Raises:
        UserError: torch.distributed has not been started.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_initialized():
            raise UserError(
                "there is no process group (context_parallel): start the processes with torchrun "
                "and call torch.distributed.init_process_group"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0

    def span(self, time: int) -> slice:
        """Return the columns of this process in rows of `time` tokens."""
        return bounds(time, self.size)[self.rank]

    def gather(self, anchor: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
        """Send tensors to the processes of later spans, and receive those of the earlier ones.

        Args:
            anchor: a tensor that every process uses in what follows. It is returned unchanged, and
                puts the exchange of gradients in the backward pass of every process, also of the
                first, which receives nothing.
            tensors: of the same shapes and dtypes in every process.

        Returns:
            anchor, and for each earlier process the tensors that it sent.
        """
        anchor, *flat = _Exchange.apply(self, anchor, *tensors)
        size = len(tensors)
        return anchor, [flat[size * r : size * (r + 1)] for r in range(self.rank)]

    def swap(self, outgoing: Tensor, targets: Sequence[int], sources: Sequence[int]) -> Tensor:
        """Send a row of bytes to each of `targets` and receive one from each of `sources`.

        Args:
            outgoing: [targets, n] uint8; n is the same in every process.
            targets: ranks, rising.
            sources: ranks, rising.

        Returns:
            [sources, n] uint8.
        """
        size = outgoing.shape[1]
        incoming = outgoing.new_empty(len(sources), size)
        if self.size > 1:
            received, sent = (
                [size * (r in ranks) for r in range(self.size)] for ranks in (sources, targets)
            )
            dist.all_to_all_single(
                incoming.view(-1), outgoing.reshape(-1), received, sent, group=self.group
            )
            self.sent += outgoing.numel()
        return incoming


class _Exchange(torch.autograd.Function):
    """See `ContextParallel.gather`. One message holds all tensors, whatever their dtypes.

    Every process runs it in the same order, in the forward as in the backward pass: within a layer
    what comes after one exchange uses its anchor, and a layer uses what the one before it returned.
    """

    @staticmethod
    def forward(ctx: Any, context: ContextParallel, anchor: Tensor, *tensors: Tensor) -> Any:
        ctx.context, ctx.like = context, [(x.shape, x.dtype) for x in tensors]
        earlier, later = _others(context)
        message = _pack(tensors).expand(len(later), -1)
        incoming = context.swap(message, later, earlier)
        return anchor.view_as(anchor), *[x for row in incoming for x in _unpack(row, ctx.like)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> Any:
        earlier, later = _others(ctx.context)
        size = len(ctx.like)
        messages = [_pack(gradients[size * r : size * (r + 1)]) for r in earlier]
        # the first process sends none, but as many bytes come from each later one
        none = _pack([anchor.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.like])
        outgoing = torch.stack(messages) if messages else none.new_empty(0, len(none))
        incoming = ctx.context.swap(outgoing, earlier, later)
        totals = list(_unpack(none, ctx.like))
        for row in incoming:  # in the order of the processes, so that sums round alike
            totals = [a + b for a, b in zip(totals, _unpack(row, ctx.like), strict=True)]
        return None, anchor, *totals


def _others(context: ContextParallel) -> tuple[range, range]:
    """Return the ranks of the earlier and of the later spans."""
    return range(context.rank), range(context.rank + 1, context.size)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one row of bytes."""
    parts = []
    for x in tensors:
        octets = x.detach().contiguous().view(-1).view(torch.uint8)
        parts += [octets, octets.new_zeros(-len(octets) % ALIGNED)]
    return torch.cat(parts)


def _unpack(octets: Tensor, like: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Return the tensors of a row of bytes, without copying."""
    tensors, at = [], 0
    for shape, dtype in like:
        size = shape.numel() * dtype.itemsize
        tensors.append(octets[at : at + size].view(dtype).view(shape))
        at += size + -size % ALIGNED
    return tensors


class SpanDocuments(Documents):
    """The documents of this process's span of rows, and the spans of all.

    Args:
        positions: [B, T] on the CPU, of the whole rows, which start here.
        context: the processes that share the rows.
        device: where the layers compute.
    """

    def __init__(self, positions: Tensor, context: ContextParallel, device: torch.device):
        here = positions[:, context.span(positions.shape[1])]
        super().__init__(here.to(device), here, checked=True)
        self.context = context
        parts = bounds(positions.shape[1], context.size)
        self.spans = [Span(*(x.to(device) for x in span)) for span in read_spans(positions, parts)]

    @property
    def start(self) -> Tensor:
        """The position of the row's next token before this span: [B]."""
        rank = self.context.rank
        return self.spans[rank - 1].position if rank else torch.zeros_like(self.spans[0].position)

    def receive(self, anchor: Tensor, shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
        """Hand over what this span does to states, and return the states at which it starts.

        Args:
            anchor: see `ContextParallel.gather`.
            shares: the same operators' in every process.
        """
        anchor, earlier = self.context.gather(anchor, [share.own for share in shares])
        return anchor, [
            state_before(share, [sent[i] for sent in earlier], self.spans)
            for i, share in enumerate(shares)
        ]
