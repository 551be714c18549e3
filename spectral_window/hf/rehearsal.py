"""One step of everything that a model does, at the least size, so that its kernels are compiled."""

from __future__ import annotations

import torch

from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM

VOCABULARY, MLP_WIDTH = 64, 64


def rehearse(config: SWHConfig) -> None:
    """Train, read and write once on the CPU as a model of `config` would, in both dtypes.

    Kernels depend on the parts of a layer and not on sizes, so a single layer with a small
    vocabulary and feed-forward width calls all that the model will call.

    Args:
        config: of the model. Its weights are not needed.
    """
    tokens = {name: None for name in config.deciding("tokens") if name.endswith("_token_id")}
    sizes = {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "intermediate_size": MLP_WIDTH}
    small = SWHConfig(**config.recorded() | tokens | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SWHForCausalLM(small)
        text = torch.randint(VOCABULARY, (2, 4 * config.window + 1))
    for dtype in (torch.float32, torch.bfloat16):
        half = dtype is torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=half):
            loss = model(text[:, :-1], shift_labels=text[:, 1:]).loss
        loss.backward()
        with torch.inference_mode():
            served = torch.nn.Module.to(model, dtype)
            state = served(text, use_cache=True).past_key_values
            served(text[:, -1:], past_key_values=state)
