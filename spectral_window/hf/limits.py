"""How large a model may be before anything is built for it.

A config.json is a stranger's few lines, and some numbers in it ask for terabytes. So the sizes are
multiplied out before a tensor, a layer or a list of layers is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectral_window.errors import ResourceError

if TYPE_CHECKING:
    from spectral_window.hf.config import SWHConfig

MOST_LAYERS = 10_000  # a layer takes some 60 kB and a millisecond even where it has no weights
MOST_PARAMETERS = 10**15  # on the meta device sizes beyond 2**63 bytes overflow


def least_parameters(config: SWHConfig) -> int:
    """The matrices that a model of any mixer has: embedding, head, and of each layer an output
    projection and two maps of the feed-forward layer."""
    size, wide = config.hidden_size, config.intermediate_size or 1
    tables = config.vocab_size * size * (1 if config.tie_word_embeddings else 2)
    return tables + config.num_hidden_layers * (size * size + 2 * size * wide)


def check_size(config: SWHConfig) -> None:
    """Raise ResourceError for a model that no machine holds."""
    parameters, layers = least_parameters(config), config.num_hidden_layers
    if parameters > MOST_PARAMETERS or layers > MOST_LAYERS:
        raise ResourceError(
            f"num_hidden_layers {layers:,}, hidden_size {config.hidden_size:,}, vocab_size "
            f"{config.vocab_size:,} (config): at least {parameters:,} parameters, "
            f"{parameters / 1e9 * 4:,.0f} GB, in {layers:,} layers; use fewer, at most "
            f"{MOST_LAYERS:,} layers and {MOST_PARAMETERS:.0e} parameters"
        )
