"""What README shows runs as shown; only sizes and paths are made small."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.lab.experiments import lm
from spectral_window.lab.paper import claims
from spectral_window.training.recipes import RECIPES, resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"^    (spectral-window [^\n#]+)", README, re.M)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_examples_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("bytes")
    config = SWHConfig.preset("paper", size="tiny", vocab_size=len(tokenizer), num_hidden_layers=1)
    SWHForCausalLM(config).save_pretrained("runs/mine/model")
    tokenizer.save_pretrained("runs/mine/model")
    exec(block.replace('"125m"', '"tiny"'), {})


def test_commands_name_real_recipes_and_knobs():
    trained = [shlex.split(c) for c in COMMANDS if c.startswith("spectral-window train")]
    assert trained
    for words in trained:
        assert words[2] in RECIPES
    knobs = re.search(r"every setting is a `key=value`:\s+`([^`]+)`", README)
    assert knobs
    resolve("small", knobs.group(1).split())


def test_files_and_pictures_named_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:tests|results)/[\w./-]+)`", README
    ):
        assert (ROOT / target).exists(), target


def test_the_two_commands_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^    make ([\w-]+)", README, re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command


def test_claims_are_what_the_results_say():
    table = claims.markdown(claims.judge(claims.read(ROOT / "results/paper")))
    assert table in README, "make it anew with `spectral-window report results/paper`: claims.md"


def test_losses_beside_the_memory_are_what_the_results_say():
    for corpus, column in (("", 2), ("prose", 3)):
        rows = json.loads((ROOT / "results/memory" / corpus / "lm-short.json").read_text())["rows"]
        for name, knobs in lm.best(rows).items():
            (loss,) = {r["eval_loss"] for r in lm.counted(rows, "sweep", name)}
            lines = [line for line in README.splitlines() if line.startswith(f"| {name} | ")]
            cells = [line.split("|")[column].strip(" *") for line in lines if line.count("|") == 4]
            assert f"{loss:.3f}" in cells, (name, knobs)
