"""The text of a run: the first process prepares it, every process opens it."""

from __future__ import annotations

from pathlib import Path

from spectral_window.data.remote import PieceCache, is_url
from spectral_window.data.text import Corpus, open_corpus, prepare
from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import check_name
from spectral_window.training.folder import DATA
from spectral_window.training.parallel import World
from spectral_window.training.progress import Progress, Silent
from spectral_window.training.recipes import Recipe


def prepare_text(
    recipe: Recipe,
    folder: Path,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Tokenize the recipe's text into `folder`, unless it is there; raises as `data.text.prepare`
    does."""
    prepare(
        list(recipe.data),
        recipe.tokenizer,
        folder,
        valid_fraction=recipe.valid_fraction,
        valid_sources=list(recipe.valid) or None,
        seed=recipe.split_seed,
        txt_documents=recipe.txt_documents,
        errors=recipe.errors,
        skip_bad=recipe.skip_bad,
        drop_shared=recipe.drop_shared,
        max_bytes=recipe.max_bytes,
        chat=recipe.sequence_length if recipe.chat else None,
        progress=(progress or Silent()).prepare,
        overwrite=overwrite,
        workers=workers,
    )


def corpus_of(
    recipe: Recipe,
    out: Path,
    folder: Path | str | None,
    world: World,
    progress: Progress,
    resume: bool,
    overwrite: bool,
    workers: int | None = None,
    cache: PieceCache | None = None,
) -> Corpus:
    """The prepared text: the first process makes or finds it, all open it. At a URL it is there."""
    if folder is not None and is_url(folder):
        corpus = open_corpus(folder, cache=cache)
        _show(corpus, world, progress)
        return corpus
    if cache is not None:
        raise UserError(f"a cache without a URL (corpus is {folder}): name where the text is")
    where = Path(folder) if folder is not None else out / DATA
    check_name(where, "the folder of tokens")
    resuming = resume and (out / "checkpoints").is_dir()

    def make() -> None:
        try:
            replace = overwrite and folder is None
            prepare_text(recipe, where, progress, overwrite=replace, workers=workers)
        except UserError as error:
            if resuming and where.is_dir():
                raise IntegrityError(
                    f"the run's text or tokenizer changed, so it cannot be resumed: {error}"
                ) from None
            raise

    world.first(make)
    corpus = open_corpus(where)
    _show(corpus, world, progress)
    return corpus


def _show(corpus: Corpus, world: World, progress: Progress) -> None:
    if world.is_first:
        for line in corpus.summary():
            progress.note(line)


def vocabulary_size(recipe: Recipe, corpus: Corpus) -> int:
    """The size of the model's vocabulary: the recipe's if it has one, otherwise the tokenizer's.
    UserError if too small."""
    size = recipe.model["vocab_size"] or corpus.vocab_size
    if size < corpus.vocab_size:
        raise UserError(
            f"vocab_size={size} (recipe): the tokenizer has {corpus.vocab_size} entries; "
            "leave vocab_size out"
        )
    return size
