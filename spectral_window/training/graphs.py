"""The forward and backward pass of a micro-batch as a CUDA graph: recorded once, then replayed.

A step of a small model launches hundreds of kernels that take a few microseconds each; Python needs
longer to launch them than the GPU to run them. A graph is launched at once. It computes the same
bits: the same kernels on the same memory, with the inputs copied into the tensors that were
recorded.

Batches of different kinds (their tensors and shapes) have graphs of their own, which share their
memory. The first micro-batches of a kind run as usual, so that all kernels are compiled before one
is recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Compute = Callable[[Batch, Tensor], Tensor]
WARM = 3  # micro-batches of a kind before it is recorded


class CudaGraphs:
    """Records calls on the current CUDA device; all recordings share a pool of memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        """Return call(), run beside the main stream: gradients must not be tied to it, or a
        backward pass could not be recorded."""
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            result = call()
        main.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return (what replays call(), the tensor that call() returned)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result


class GraphedStep:
    """`compute(batch, tokens)`, which adds to gradients and returns a loss, by graphs.

    Gradients must keep their memory between calls: zero them, do not drop them.

    Args:
        compute: takes a batch and a count on `device`; returns a tensor without a gradient. It
            must not wait for the device.
        device: of the model.
        note: gets a line if the pass cannot be recorded; it then runs as usual.
        recorder: what records; CudaGraphs by default.
    """

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        note: Callable[[str], None],
        recorder: Any = None,
    ) -> None:
        self.compute, self.device, self.note = compute, device, note
        self.recorder = CudaGraphs() if recorder is None else recorder
        self.refused = False
        self._seen: Counter[Any] = Counter()
        self._graphs: dict[Any, tuple[Batch, Tensor, Callable[[], None], Tensor]] = {}

    def __call__(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Return the loss of `batch`, a tensor that the next call overwrites.

        Args:
            batch: tensors on the CPU.
            tokens: a number on the device, by which the loss is divided.
        """
        kind = tuple((name, tuple(x.shape)) for name, x in sorted(batch.items()))
        if kind not in self._graphs:
            self._seen[kind] += 1
            if self.refused or self._seen[kind] <= WARM or not self._record(kind, batch, tokens):
                here = {name: x.to(self.device) for name, x in batch.items()}
                return self.recorder.warm(lambda: self.compute(here, tokens))
        inputs, count, replay, loss = self._graphs[kind]
        for name, x in batch.items():
            inputs[name].copy_(x, non_blocking=True)
        count.copy_(tokens)
        replay()
        return loss

    def _record(self, kind: Any, batch: Batch, tokens: Tensor) -> bool:
        inputs = {name: x.to(self.device, copy=True) for name, x in batch.items()}
        count = tokens.clone()
        try:
            replay, loss = self.recorder.record(lambda: self.compute(inputs, count))
        except RuntimeError as error:
            self.refused = True
            self.note(f"without CUDA graphs: {str(error).splitlines()[0]}")
            return False
        self._graphs[kind] = inputs, count, replay, loss
        return True
