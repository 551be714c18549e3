"""A saved folder: it loads where nobody imported the package, and its card says what is known."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from spectral_window.hf import (
    SWHConfig,
    SWHForCausalLM,
    SWHForSequenceClassification,
    SWHForTokenClassification,
    SWHModel,
)
from spectral_window.hf.card import MARK, TrainingRecord, write_card
from spectral_window.hf.stubs import AUTO_CLASSES, auto_map
from tests.hf.small import small_config, small_model, word_tokenizer

RECORD = TrainingRecord(
    recipe="demo",
    command="spectral-window train demo --data books/",
    data=("books/", "notes.md"),
    tokens=1_228_800,
    loss=2.25,
    perplexity=9.4877,
    bits_per_byte=1.625,
    held_out=40_000,
    context=256,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a model and a tokenizer of words w1 to w60."""
    small_model(pad_token_id=0).save_pretrained(tmp_path / "saved")
    word_tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _python(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python, which keeps copies of a folder's code in `cache`."""
    environment = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


LOADING = """
import json, sys, torch, transformers
assert "spectral_window" not in sys.modules
path, how = {path!r}, {{"trust_remote_code": True}}
{code}
print(json.dumps(answer))
"""


def _load(code: str, folder: Path, cache: Path) -> Any:
    """Run `code` where the package is installed and not imported; return its `answer`."""
    done = _python(LOADING.format(path=str(folder), code=code), cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


LOADING_ALL = f"""
from transformers.cli.serving.model_manager import ModelManager  # of `transformers serve`
manager = ModelManager(device="cpu", **how)
served, _ = manager.load_model_and_processor(path + "@main")
manager.shutdown()  # a timer of five minutes would keep the process alive
config = transformers.AutoConfig.from_pretrained(path, **how)
# so trainers that are given a path look a model up
model = getattr(transformers, config.architectures[0]).from_pretrained(path, **how)
classes = {["AutoConfig", *AUTO_CLASSES.values()]}
names = [type(getattr(transformers, c).from_pretrained(path, **how)).__name__ for c in classes]
alone = transformers.AutoConfig.from_pretrained(path + "-config", **how)
write = transformers.pipeline("text-generation", model=path, device="cpu", **how)
model.save_pretrained(path + "-again")
again = transformers.AutoModelForCausalLM.from_pretrained(path + "-again", **how)
answer = {{
    "served": type(served).__name__, "names": names, "map": config.auto_map, "window": alone.window,
    "ids": transformers.AutoTokenizer.from_pretrained(path, **how)("w3 w4").input_ids,
    "text": write("w3 w4 w5", max_new_tokens=9, do_sample=False),
    "same": all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters())),
}}"""


def test_a_process_that_imported_nothing_loads_the_folder(saved: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    small_config().save_pretrained(f"{saved}-config")
    here = pipeline("text-generation", model=str(saved), device="cpu")
    assert _load(LOADING_ALL, saved, tmp_path / "cache") == {
        "served": "SWHForCausalLM",
        "names": ["SWHConfig", *AUTO_CLASSES],
        "map": {},
        "window": 5,
        "ids": [3, 4],
        "text": here("w3 w4 w5", max_new_tokens=9, do_sample=False),
        "same": True,
    }


MISSING = """
import sys
class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "spectral_window":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled)
import transformers
for loader in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
    try:
        getattr(transformers, loader).from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print("told:", error)
"""


def test_where_the_package_is_missing_the_error_is_one_line(saved: Path, tmp_path: Path) -> None:
    done = _python(MISSING.replace("sys.argv[1]", repr(str(saved))), tmp_path / "cache")
    lines = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    assert len(lines) == 3, done.stdout + done.stderr
    for line in lines:
        assert "this model needs the Python package spectral-window: `pip install" in line


def test_without_trust_no_code_of_the_folder_runs(saved: Path, tmp_path: Path) -> None:
    """Also where the package is imported: then its own classes load the folder."""
    for path in saved.glob("*.py"):
        path.write_text("raise SystemExit('code of the folder ran')\n")
    first = "import spectral_window\n"
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(saved)!r})\n"
    )
    assert _python(first + load, tmp_path / "cache").returncode == 0
    refused = _python(load, tmp_path / "cache").stderr
    assert "trust_remote_code=True" in refused.strip().splitlines()[-1]


def test_every_class_of_auto_map_is_in_its_file_and_fits_its_auto_class(saved: Path) -> None:
    import transformers

    assert json.loads((saved / "config.json").read_text())["auto_map"] == auto_map()
    for auto, place in auto_map().items():
        module, name = place.split(".")
        assert f" {name},\n" in (saved / f"{module}.py").read_text()
        if auto != "AutoConfig":
            model = getattr(transformers, auto).from_config(small_config())
            assert type(model).__name__ == name


def test_loading_by_trust_copies_no_source_of_the_package_when_saving_again() -> None:
    """transformers would copy hf/config.py, which cannot be imported alone."""
    for cls in (SWHConfig, SWHForCausalLM, SWHModel, SWHForSequenceClassification):
        cls.register_for_auto_class()
        assert cls._auto_class is None


# ---------------------------------------------------------------------------------------- the card


def test_a_card_of_a_model_alone_says_what_is_known(saved: Path) -> None:
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "unknown"
    assert {"spectral-window", "swh"} <= set(card.data.tags)
    assert card.data.eval_results is None
    assert f"{small_model().count_parameters():,} parameters" in card.text
    assert "trust_remote_code=True" in card.text
    assert "## Training" not in card.text


@pytest.mark.parametrize(
    ("model_class", "task"),
    [
        (SWHModel, "feature-extraction"),
        (SWHForSequenceClassification, "text-classification"),
        (SWHForTokenClassification, "token-classification"),
    ],
)
def test_a_card_names_the_task_of_the_head(model_class: Any, task: str, tmp_path: Path) -> None:
    model_class(small_config()).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == task
    assert f"import AutoTokenizer, {AUTO_CLASSES[model_class.__name__]}\n" in card.text


def test_a_card_of_a_run_has_its_numbers_and_a_loaded_model_hands_them_on(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "run")
    write_card(tmp_path / "run", model, RECORD)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"loss": 2.25, "perplexity": 9.4877, "bits_per_byte": 1.625}
    for told in ("2.2500 nats", "9.49", "1.6250", "1,228,800", "`notes.md`", RECORD.command):
        assert told in card.text
    before = card.text
    for generation in ("one", "two"):
        source = "run" if generation == "one" else "one"
        SWHForCausalLM.from_pretrained(tmp_path / source).save_pretrained(tmp_path / generation)
        card = ModelCard.load(tmp_path / generation / "README.md")
        section = card.text.split("## Training\n")[1].split("\n## ")[0]
        assert section.count("what was done to them later is not recorded") == 1
        assert before.split("## Training\n")[1].split("\n## ")[0].strip() in section
        assert card.data.eval_results is None, "numbers of these weights, which may have changed"


def test_a_readme_that_a_person_wrote_is_kept(saved: Path) -> None:
    model = small_model()
    (saved / "README.md").write_text("# Mine\n")
    model.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "# Mine\n"
    (saved / "README.md").write_text(f"old\n{MARK}\n")
    model.save_pretrained(saved)
    assert "parameters" in (saved / "README.md").read_text()


def test_the_weights_are_the_ones_that_transformers_writes(saved: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedModel

    model = small_model()
    PreTrainedModel.save_pretrained(model, tmp_path / "theirs")
    theirs = (tmp_path / "theirs" / "model.safetensors").read_bytes()
    assert (saved / "model.safetensors").read_bytes() == theirs


# -------------------------------------------------------------------------------------- uploading


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that an upload uses, over real HTTP; files are kept in memory."""

    server: _HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            name = "me/" + json.loads(body)["name"].removeprefix("me/")
            self._answer({"url": f"{self.server.address}/{name}", "id": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    self.server.files[self._repository()][value["path"]] = content
            url = f"{self.server.address}/{self._repository()}/commit/0"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self._answer({}, 200 if "validate-yaml" in self.path else 404)

    def do_HEAD(self) -> None:
        repository, _, name = self.path.strip("/").partition("/resolve/main/")
        there = name in self.server.files[repository]
        self.send_response(200 if there else 404)
        for key, value in (
            {"ETag": '"0"', "X-Repo-Commit": "0" * 40}
            if there
            else {"X-Error-Code": "EntryNotFound"}
        ).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self._answer({"id": self._repository(), "sha": "0" * 40, "siblings": []})

    def _repository(self) -> str:
        """Return the name in /api/models/USER/NAME/..."""
        return "/".join(self.path.split("/")[3:5])

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""


class _HubServer(ThreadingHTTPServer):
    files: defaultdict[str, dict[str, bytes]]  # by repository

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hub() -> Iterator[_HubServer]:
    server = _HubServer(("127.0.0.1", 0), _Hub)
    server.files = defaultdict(dict)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


PUSH = """
import sys
from spectral_window.hf import SWHForCausalLM
model = SWHForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("me/one", tags=["small"])
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/two", tags=["small"])
model.push_to_hub("me/written")
"""


def test_an_upload_has_the_weights_the_card_and_what_loads_them(
    saved: Path, hub: _HubServer, tmp_path: Path
) -> None:
    write_card(saved, small_model(), RECORD)
    hub.files["me/written"]["README.md"] = b"# Mine\n"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(saved), str(tmp_path / "there")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {"config.json", "model.safetensors", "README.md", "generation_config.json"}
    names |= {"configuration_spectral_window.py", "modeling_spectral_window.py"}
    weights = (saved / "model.safetensors").read_bytes()
    for repository in ("me/one", "me/two", "me/written"):
        assert set(hub.files[repository]) == names
        assert hub.files[repository]["model.safetensors"] == weights
    for repository in ("me/one", "me/two"):
        card = ModelCard(hub.files[repository]["README.md"].decode())
        assert "2.2500 nats" in card.text
        assert "small" in card.data.tags
    assert hub.files["me/written"]["README.md"] == b"# Mine\n", "a card that is there stays"


def test_adapters_are_saved_alone(tmp_path: Path) -> None:
    """PEFT writes a card of its own, and a folder of adapters is no model."""
    from peft import LoraConfig

    model = small_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json"
    }  # fmt: skip
