"""A kernel of your own in 20 lines: registered, it is a choice of every config and recipe.

    python examples/new_kernel.py

or, from the folder of this file, in a training:

    spectral-window --plugin new_kernel train tiny kernel=change --out runs/change
"""

import torch

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.nn.kernels import Kernel, float32_parameter, register
from spectral_window.ops import Modes


@register("change")
class Change(Kernel):
    """A fast mean minus a slow one: the recent change of a channel."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.decay = float32_parameter(channels, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.decay)

    def forward(self) -> Modes:
        gain = torch.tensor([1.0, -1.0], device=self.decay.device).expand_as(self.decay)
        return Modes(self.decay.abs(), torch.zeros_like(self.decay), gain)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = SWHForCausalLM(SWHConfig.preset("paper", size="tiny", vocab_size=257, kernel="change"))
    ids = torch.randint(0, 257, (1, 64))
    loss = model(ids, labels=ids).loss
    loss.backward()
    print(f"{model.count_parameters():,} parameters, loss {loss:.3f}")
    print(model.generate(ids[:, :8], max_new_tokens=8, do_sample=False).tolist())
