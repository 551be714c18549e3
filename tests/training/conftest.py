"""A corpus and a recipe small enough to train in a second, and processes to kill."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import string
from pathlib import Path

import pytest

from spectral_window.training.recipes import Recipe

TEXT = inspect.getsource(string) + inspect.getsource(json)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 30 kB of real text in several documents."""
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text.jsonl"
    part = len(TEXT) // 12
    path.write_text(
        "".join(json.dumps({"text": TEXT[i * part : (i + 1) * part]}) + "\n" for i in range(12))
    )
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Where the prepared tokens of all tests of this session are kept."""
    return tmp_path_factory.mktemp("prepared") / "tokens"


@pytest.fixture(scope="session")
def recipe(text_file) -> Recipe:
    """Twelve steps of a model of 2 layers x 16 channels on bytes."""
    return Recipe(
        name="test",
        data=(str(text_file),),
        valid_fraction=0.2,
        tokenizer="bytes",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        window=4,
        initializer_range=0.1,
        sequence_length=16,
        batch_size=8,
        micro_batch_size=4,
        steps=12,
        lr=3e-3,
        warmup_steps=3,
        log_every=2,
        eval_every=6,
        eval_tokens=256,
        save_every=4,
        match=None,
        device="cpu",
    )


@pytest.fixture(scope="session")
def processes():
    """Starts real processes in milliseconds: they are forked from one that imported everything."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spectral_window.training.trainer", "tests.training.children"])
    return context


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory) -> Path:
    """Where the first test that needs it puts a run that nothing interrupted."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def uninterrupted(uninterrupted_run, recipe, corpus) -> Path:
    from spectral_window.training import train

    if not uninterrupted_run.exists():
        train(recipe, uninterrupted_run, corpus=corpus)
    return uninterrupted_run
