"""`delta_memory` by its compiled methods."""

from __future__ import annotations

from typing import Any

import torch

from spectral_window.ops import delta_memory

COMPILED = {"chunked": "compiled", "step": "step_compiled"}


def compiled_memory(*tensors: torch.Tensor, method: str = "chunked", **options: Any) -> Any:
    return delta_memory(*tensors, **options, method=COMPILED.get(method, method))
