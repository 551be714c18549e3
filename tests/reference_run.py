"""A small reference run: training, evaluation, text and sessions in float32 on a CPU.

    python -m tests.reference_run            prints a SHA-256 for each part, and the numbers

Before and after a change that must compute the same, on one machine with one number of threads, the
hashes are equal. Sums differ between processors, so `test_reference_run.py` holds the losses within
a tolerance instead.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_window.data.text import open_corpus
from spectral_window.generation.session import Session
from spectral_window.training.evaluate import evaluate
from spectral_window.training.loading import load
from spectral_window.training.recipes import resolve
from spectral_window.training.trainer import train

OVERRIDES = """
    tokenizer=bytes hidden_size=32 num_hidden_layers=2 num_attention_heads=2 window=8 steps=12
    sequence_length=48 batch_size=4 micro_batch_size=2 warmup_steps=2 eval_every=6 save_every=6
    eval_tokens=2000 matmul_precision=highest device=cpu
""".split()  # noqa: SIM905 (as a user types them)
MODELS = {
    "paper": [],
    "attention": ["mixer=attention"],
    "memory": ["mixer=memory"],
    "taps": ["kernel=free_form", "fusion=gated", "match=none"],
    "modes": ["kernel=multi_mode", "fusion=symmetric_norm", "mlp=gelu", "match=none"],
    "window": ["branches=window", "tie_word_embeddings=true"],
}


def write_text(path: Path) -> None:
    """Sentences of a small grammar, always the same."""
    draw = random.Random(0)
    words = "the a window kernel memory layer keeps reads forgets slow fast past token"
    lines = [
        " ".join(draw.choices(words.split(), k=draw.randint(4, 12))) + ".\n" for _ in range(900)
    ]
    path.write_text("".join(lines))


def sha(value: Any) -> str:
    """SHA-256 of a tensor, of a (nested) collection of them, or of plain values; 16 hex digits."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            found.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, dict):
            for key in sorted(part):
                found.update(key.encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for each in part:
                add(each)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()[:16]


def one(name: str, text: Path, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(hashes, numbers) of the model `name`."""
    recipe = resolve("tiny", [f"data={text}", *OVERRIDES, *MODELS[name]])
    result = train(recipe, folder)
    loaded = load(folder, device="cpu")
    model = loaded.model.eval()
    hashes = {"weights": sha(dict(model.state_dict()))}

    corpus = open_corpus(folder / "data")
    measured = evaluate(model, corpus.valid, length=48, batch=4)
    hashes["evaluation"] = sha(measured)

    session = Session(model, loaded.tokenizer, seed=7)
    session.feed("the window keeps ")
    written = "".join(session.stream(24, temperature=0.8))
    session.save(folder / "s.session")
    again = Session.load(folder / "s.session", model, loaded.tokenizer)
    more = "".join(again.stream(24, temperature=0.8))
    hashes["session"] = sha([written, more, list(again.row.states)])

    ids = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        beams = model.generate(ids[:, :9], max_new_tokens=8, num_beams=3, do_sample=False)
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        packed = torch.cat((torch.arange(13), torch.arange(27))).expand(2, -1)
    model.zero_grad()
    out = model(ids, position_ids=packed, labels=ids, use_cache=False)
    out.loss.backward()
    hashes["generate"] = sha(beams)
    hashes["padded"] = sha(padded)
    hashes["packed"] = sha([out.logits, {n: p.grad for n, p in model.named_parameters()}])
    numbers = {
        "parameters": result["parameters"],
        "loss": measured["loss"],
        "packed_loss": float(out.loss.detach()),
        "text": written + more,
    }
    return hashes, numbers


def run(names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """{model: {"hashes", "numbers"}}."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text)
        found = {}
        for name in names or MODELS:
            hashes, numbers = one(name, text, Path(folder) / name)
            found[name] = {"hashes": hashes, "numbers": numbers}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(sys.argv[1:]), indent=1))
