"""Loss on held-out text: nats per token, perplexity, bits per byte.

Nats per token depend on the tokenizer (longer tokens are harder to guess and there are fewer of
them), so models with different tokenizers are compared by *bits per byte*: all the nats spent on a
text, divided by ln 2 and by its UTF-8 bytes. The nats include those spent on announcing where a
document ends; the separator itself counts no bytes.

Each block of `length` tokens is read on its own, as in training, so its first tokens are predicted
with little context: a longer `length` gives a better number from the same model. State the length
beside the number.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from spectral_window.data.blocks import IGNORED, TokenStream, blocks_of
from spectral_window.errors import DivergedError, UserError


@torch.no_grad()
def evaluate(
    model: Any,
    stream: TokenStream,
    *,
    length: int,
    batch: int = 16,
    max_tokens: int | None = None,
    dtype: str = "float32",
    world: Any = None,
) -> dict[str, float]:
    """Loss of `model` over the blocks of `stream`, every predicted token weighing the same.

    length: tokens in a block.  batch: blocks at a time.  max_tokens: about how many tokens to
    predict at most; whole blocks are then taken at even spacing over the stream, and `bytes` is the
    stream's bytes in proportion to the tokens predicted (exact without max_tokens).  dtype:
    "bfloat16" runs under autocast.  world: `training.parallel.World` to share the blocks among
    processes; every one gets the same result. All call the model equally often, as a sharded one
    demands.

    Returns {"loss" (nats per token), "perplexity", "bits_per_byte", "tokens" (predicted), "bytes"
    (of text)}. Raises UserError for less than one predictable token, DivergedError if the loss is
    not finite.  The model keeps its mode (train or eval).
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens} (evaluate): give at least 1, or None for all")
    blocks = blocks_of(stream, length, allow_short=True)
    chosen = spread(
        len(blocks), len(blocks) if max_tokens is None else math.ceil(max_tokens / length)
    )
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    device = next(model.parameters()).device

    mine = chosen[rank::size]
    most = len(chosen[0::size])  # blocks of any process
    spare = math.ceil(most / batch) - math.ceil(len(mine) / batch)

    was_training = model.training
    model.eval()
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    try:
        # Its own generator, so that evaluating does not move torch's (a DataLoader draws from it
        # when it starts).
        loader = partial(DataLoader, batch_size=batch, generator=torch.Generator())
        own, others = loader(Subset(blocks, mine)), loader(Subset(blocks, chosen[:1] * spare))
        for inputs, counts in chain(zip(own, repeat(1)), zip(others, repeat(0))):
            counted = counts * int((inputs["shift_labels"] != IGNORED).sum())
            inputs = {key: value.to(device, non_blocking=True) for key, value in inputs.items()}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                mean = model(**inputs, use_cache=False).loss
            nats += mean.double().cpu() * counted
            tokens += counted
    finally:
        model.train(was_training)

    total = nats.item()
    if world is not None:
        total, summed = world.sum(total, tokens)
        tokens = int(summed)
    if not math.isfinite(total):
        raise DivergedError(
            "the loss on held-out text is not finite (evaluate): the weights are unusable; "
            "use an earlier checkpoint"
        )
    text_bytes = stream.bytes * tokens / blocks.labels
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / text_bytes,
        "tokens": tokens,
        "bytes": round(text_bytes),
    }


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 ... count - 1, evenly spaced and rising; at most all of them."""
    if wanted >= count:
        return list(range(count))
    return [i * count // wanted for i in range(wanted)]
