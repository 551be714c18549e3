"""`delta_memory` by its compiled methods."""

from __future__ import annotations

from typing import Any

import torch

from spectral_window.ops import delta_memory
from spectral_window.ops.tracing import may_bypass


def compiled_memory(*tensors: torch.Tensor, method: str = "chunked", **options: Any) -> Any:
    """ "chunked" and "step" mean the compiled ones; a step that they cannot serve is torch's."""
    if method == "chunked":
        method = "compiled"
    elif method == "step":
        bare = may_bypass(*tensors, options.get("decay"), options.get("state"))
        method = "step_compiled" if bare and tensors[0].dtype != torch.float64 else "step"
    return delta_memory(*tensors, **options, method=method)
