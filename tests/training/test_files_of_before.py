"""Two runs that were finished in November 2026, before parts of a model declared their options:
their models, sessions and checkpoints still mean the same."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectral_window.generation.session import Session
from spectral_window.training.loading import load
from spectral_window.training.recipes import Recipe
from spectral_window.training.trainer import train

FILES = Path(__file__).parent.parent / "files" / "runs-of-november-2026.tar.xz"
# what their sessions wrote next, when they were saved
NEXT = {"paper": "\ufffd_\x15G$P4t", "attention": "\ufffd\ufffd\x10\x06ge\ufffd\ufffd"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(FILES) as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # their recipes name the text by a relative path
    return tmp_path


@pytest.mark.parametrize("name", NEXT)
def test_a_model_and_its_session_go_on(name: str, runs: Path) -> None:
    loaded = load(runs / name, device="cpu")
    assert loaded.model.config.mixer == {"paper": "spectral_window"}.get(name, name)
    session = Session.load(runs / name / "story.session", loaded.model, loaded.tokenizer)
    assert "".join(session.stream(12)).startswith(NEXT[name])


@pytest.mark.parametrize("name", NEXT)
def test_a_run_resumes_from_its_checkpoint_and_ends_where_it_did(name: str, runs: Path) -> None:
    folder = runs / name
    ended = load_file(folder / "checkpoints" / "step-4" / "model.safetensors")
    # (tokens are made again too: they are tied to the place of their text)
    for part in ("checkpoints/step-4", "model", "data"):
        shutil.rmtree(folder / part)
    (folder / "result.json").unlink()
    recipe = Recipe.from_dict(json.loads((folder / "config.json").read_text())["recipe"])
    train(recipe, folder, resume=True)
    again = load_file(folder / "checkpoints" / "step-4" / "model.safetensors")
    assert again.keys() == ended.keys()
    for key, value in ended.items():
        assert torch.allclose(again[key], value, rtol=0, atol=1e-5), key
    notes = [
        line for line in (folder / "metrics.jsonl").read_text().splitlines() if "resume" in line
    ]
    assert len(notes) == 1, "it did not begin again"
