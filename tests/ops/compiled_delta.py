"""`delta_memory` by its compiled methods."""

from __future__ import annotations

from typing import Any

import torch

from spectral_window.ops import delta_memory
from spectral_window.ops.methods import serving


def compiled_memory(*tensors: torch.Tensor, method: str = "chunked", **options: Any) -> Any:
    """ "chunked" and "step" mean the compiled ones; what those cannot serve is left to torch's."""
    compiled = {"chunked": "compiled", "step": "step_compiled"}.get(method, method)
    served = serving("delta", *tensors, options.get("decay"), options.get("state"))
    return delta_memory(*tensors, **options, method=compiled if compiled in served else method)
