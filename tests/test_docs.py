"""README and the pages of the site: what they show runs, what they name exists, their numbers are
those of results/, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.cli.program import command_names, load_command
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.training.recipes import RECIPES, resolve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
BLOCKS = [
    (name, block)
    for name, text in TEXT.items()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
]
COMMANDS = [
    line for text in TEXT.values() for line in re.findall(r"^    (spectral-window .+)", text, re.M)
]

spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
assert spec is not None
assert spec.loader is not None
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


@pytest.mark.parametrize("block", [block for _, block in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("bytes")
    config = SWHConfig.preset("paper", size="tiny", vocab_size=len(tokenizer), num_hidden_layers=1)
    SWHForCausalLM(config).save_pretrained("runs/mine/model")
    tokenizer.save_pretrained("runs/mine/model")
    exec(block.replace('"125m"', '"tiny"'), {})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_commands_of_the_program(line):
    command, *words = shlex.split(line, comments=True)[1:]
    while command.startswith("--"):  # the program's own option, with its value
        _, command, *words = words
    known = load_command(command)
    options = {name for parameter in known.params for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= options
    if command == "train" and words[0] != "--resume":  # which takes a run's folder
        overrides = [word for word in words if re.fullmatch(r"[a-z_]+=\S+", word)]
        resolve(words[0], [word for word in overrides if word != "mixer=mine"])


def test_readme_names_every_recipe_and_its_overrides_are_real():
    text = " ".join(TEXT["README.md"].split())
    named = re.search(r"Recipes are (.*?); every setting is a `key=value`: `([^`]+)`", text)
    assert named
    shown = set(re.findall(r"`([\w-]+)`", named[1]))
    assert shown == RECIPES.keys() - {"paper-lm-small"}
    resolve("small", named[2].split())


@pytest.mark.parametrize("page", TEXT)
def test_files_and_make_targets_named_are_there(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT[page]):
        assert (folder / target).exists(), target
    for target in re.findall(
        r"`((?:tests|results|examples|spectral_window)/[\w./-]+)`", TEXT[page]
    ):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^    |`)make ([a-z][\w-]*)", TEXT[page], re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("page", TEXT)
def test_tables_are_those_of_the_results(page):
    assert tables.renew(TEXT[page]) == TEXT[page], "write them by `python docs/tables.py`"


def test_every_table_has_a_place():
    places = re.findall(r"<!-- table: ([\w-]+) -->", "".join(TEXT.values()))
    assert set(places) == tables.TABLES.keys()


def test_readme_counts_the_verdicts_of_the_paper():
    verdicts = Counter(re.findall(r"\*\*([a-z ]+)\*\* \|$", tables.paper(), re.M))
    holds, published, fails = map(
        verdicts.__getitem__, ("holds", "holds only as published", "does not hold")
    )
    sentence = (
        f"Of {verdicts.total()} claims {holds} hold, {published} hold only as published, and "
        f"{fails} do not hold"
    )
    assert sentence in " ".join(TEXT["README.md"].split())


def test_readme_is_short_and_pages_have_one_title():
    assert TEXT["README.md"].count("\n") <= 130
    for page, text in TEXT.items():
        outside = re.sub(r"```.*?```|^    .*?$", "", text, flags=re.DOTALL | re.M)
        titles = re.findall(r"^# ", outside, re.M)
        assert len(titles) == (0 if "{include}" in text else 1), page


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-d", tmp_path / "trees"]
    subprocess.run([*command, ROOT / "docs", tmp_path / "site"], check=True, cwd=ROOT)
    commands = (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    for name in command_names():
        assert f'id="{name}"' in commands
