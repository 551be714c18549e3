"""Runs that are stopped at a step, and the comparison of two runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

SAME = ("step", "tokens", "loss", "lr", "grad_norm", "eval_loss", "bits_per_byte")


class Stopper:
    """A Progress that does something at a step."""

    def __init__(self, at: int, action) -> None:
        self.at, self.action, self.notes = at, action, []

    def prepare(self, stage, done, total): ...
    def start(self, title, first_step, steps): ...
    def stop(self): ...

    def step(self, step, loss, tokens_per_second):
        if step == self.at:
            self.action()

    def note(self, text):
        self.notes.append(text)


class Crash(Exception):
    pass


def crash():
    raise Crash


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model", "optimizer", "rng"):
        loaded = load_file(folder / "checkpoints" / f"step-{step}" / f"{name}.safetensors")
        found |= {f"{name}/{key}": value for key, value in loaded.items()}
    return found


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in SAME if key in row} for row in lines if "event" not in row]


def assert_same_run(one: Path, two: Path, step: int = 12) -> None:
    a, b = tensors(one, step), tensors(two, step)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    counters = [
        json.loads((d / f"checkpoints/step-{step}/training.json").read_text()) for d in (one, two)
    ]
    for found in counters:
        found["counters"].pop("seconds")
    assert counters[0] == counters[1]
    assert rows(one) == rows(two)
