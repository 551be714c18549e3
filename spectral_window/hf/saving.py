"""How a model is saved and uploaded: transformers' way, and a model card beside the weights."""

from __future__ import annotations

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers.modeling_utils import PreTrainedModel

from spectral_window.hf.card import CARD, write_card


class SavedModel(PreTrainedModel):
    """transformers' base class of models, saved and uploaded with a model card."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: every saved folder can be loaded by trust_remote_code (`stubs.py`).

        transformers calls this after loading a class that way.
        """

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write weights, config, a model card, and the files for `trust_remote_code=True`.

        A README.md that a person wrote stays. Where PEFT adapters are loaded, only those are
        written.

        Args:
            save_directory: the folder, which is made.
            is_main_process: whether this process writes what is not weights.
            args: as in transformers' `save_pretrained`.
            push_to_hub: upload it too, to the repository `repo_id` (default: the folder's name).
            kwargs: as in transformers' `save_pretrained`; with push_to_hub those of that method.
        """
        pushed = set(inspect.signature(self.push_to_hub).parameters) - {"max_shard_size"}
        given = {name: kwargs.pop(name) for name in pushed & set(kwargs)} if push_to_hub else {}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            write_card(save_directory, self)
        if is_main_process and push_to_hub:
            self.push_to_hub(given.pop("repo_id", Path(save_directory).name), **given)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload the model and its card to the Hub; a card that is there already stays.

        transformers' own method would upload an empty form in the place of our card.

        Args:
            repo_id: the repository, `user/name`; it is made if there is none.
            commit_message: first line of the commit; None is "Upload model".
            commit_description: more lines of it.
            private: of a new repository: only its owner sees it.
            token: of the Hub; None is the one that `hf auth login` stored.
            revision: the branch, which is made if there is none; None is the main one.
            create_pr: open a pull request instead of committing.
            max_shard_size: as in `save_pretrained`.
            tags: further tags of the card.

        Returns:
            The address of the commit.
        """
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        has_card = hub.file_exists(repo_id, CARD, revision=revision)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            path = Path(folder) / CARD
            if path.is_file() and tags:
                card = ModelCard.load(path)
                card.data.tags = [*(card.data.tags or []), *tags]
                card.save(path)
            return hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=[CARD] if has_card else None,
            )
