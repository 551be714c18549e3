"""Starting a run from the weights of a model instead of random ones: `train --init`.

The model gives its architecture, its tokenizer and its weights; the recipe gives the text, the
schedule and everything else. Use it to train a finished run further, or to tune a model to other
text. The SHA-256 of the model is in the record and in every checkpoint, and a resume needs the same
model again.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_window.data.chat import end_ids
from spectral_window.data.tokenizers import vocabulary_size
from spectral_window.errors import UserError
from spectral_window.files import hash_file
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.training.loading import load, weight_files
from spectral_window.training.recipes import Recipe

NOISE = 0.1  # of new embeddings, in standard deviations of the old ones


@dataclass(frozen=True)
class Initial:
    """The model to start from: its folder, its config, its weights by name (float32, on the CPU)
    and the SHA-256 of their files."""

    folder: Path
    config: SWHConfig
    weights: Mapping[str, Tensor]
    sha256: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Initial:
        """The model at `path`, a run folder or of save_pretrained; raises as `load` does."""
        loaded = load(path, device="cpu")
        sha = hashlib.sha256()
        for file in weight_files(loaded.folder):
            sha.update(bytes.fromhex(hash_file(file)))
        weights = {name: value.float() for name, value in loaded.model.state_dict().items()}
        return cls(loaded.folder, loaded.model.config, weights, sha.hexdigest())

    def adopt(self, recipe: Recipe, named: Mapping[str, object] | None = None) -> Recipe:
        """`recipe` with this model's architecture and tokenizer.

        named: settings that the user gave. UserError for one that the model contradicts.
        """
        fields = self.config.fields().values()
        own = {field.name: getattr(self.config, field.name) for field in fields if field.in_recipes}
        own |= {"tokenizer": str(self.folder), "match": None, "parameters": None}
        if recipe.chat:
            own["vocab_size"] = None  # it grows by the tokens of conversations that are missing
        for name, value in (named or {}).items():
            if name in own and value != own[name]:
                raise UserError(
                    f"{name}={value} (recipe): {self.folder} is to begin from and has "
                    f"{own[name]!r}; leave {name} out"
                )
        return recipe.replace(**own)

    def config_for(self, recipe: Recipe, tokenizer: Any) -> SWHConfig:
        """The model's config, trained at the recipe's length with its text's tokenizer."""
        config = copy.deepcopy(self.config)
        config.training_length = max(config.training_length, recipe.sequence_length)
        config.dtype = None  # it trains in float32, whatever it was saved in
        if recipe.chat:
            config.vocab_size = max(config.vocab_size, vocabulary_size(tokenizer))
            config.eos_token_id = end_ids(tokenizer)
        return config

    def weights_for(self, model: SWHForCausalLM) -> dict[str, Tensor]:
        """The weights for a model of `config_for`; its new tokens get rows beside the mean of the
        others, which say as little as possible and yet differ."""
        wanted, generator = model.state_dict(), torch.Generator().manual_seed(0)
        weights = dict(self.weights)
        for name, rows in weights.items():
            if len(wanted[name]) > len(rows):
                more = torch.randn(
                    (len(wanted[name]) - len(rows), *rows.shape[1:]), generator=generator
                )
                new = rows.mean(0) + NOISE * rows.std(0) * more
                weights[name] = torch.cat((rows, new))
        return weights
