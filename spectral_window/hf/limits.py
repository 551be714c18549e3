"""Limits of a model's size, checked before anything is allocated.

A config.json may come from anywhere, and its numbers can ask for terabytes. So sizes are computed
before a tensor, a layer or a list of layers is constructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectral_window.errors import ResourceError

MOST_LAYERS = 10_000  # a layer takes about 60 kB and a millisecond even without weights
MOST_PARAMETERS = 10**15  # on the meta device sizes beyond 2**63 bytes overflow


def least_parameters(fields: Mapping[str, Any]) -> int:
    """Return a lower bound of a model's parameters, by the fields of its config.

    Counted are the matrices that a model of any mixer has: embedding, head, and in each layer an
    output projection and two maps of the feed-forward layer.
    """
    size, wide = fields["hidden_size"], fields["intermediate_size"] or 1
    tables = fields["vocab_size"] * size * (1 if fields["tie_word_embeddings"] else 2)
    return tables + fields["num_hidden_layers"] * (size * size + 2 * size * wide)


def check_size(fields: Mapping[str, Any]) -> None:
    """Raise ResourceError for the fields of a config whose model fits no machine."""
    parameters, layers = least_parameters(fields), fields["num_hidden_layers"]
    if parameters > MOST_PARAMETERS or layers > MOST_LAYERS:
        raise ResourceError(
            f"num_hidden_layers {layers:,}, hidden_size {fields['hidden_size']:,}, vocab_size "
            f"{fields['vocab_size']:,} (config): at least {parameters:,} parameters, "
            f"{parameters / 1e9 * 4:,.0f} GB, in {layers:,} layers; use fewer, at most "
            f"{MOST_LAYERS:,} layers and {MOST_PARAMETERS:.0e} parameters"
        )
