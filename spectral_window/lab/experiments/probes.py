"""Probes: small models trained on one diagnostic task from a seed, and scored on fresh examples.

A `Probe` holds everything that decides its outcome, so its row is saved under its key and it is not
run again. Two things follow the paper's code: `decay_all` (weight decay moves decays and
frequencies too), and the score of one leftover training batch (`batch_right`), which is what the
paper prints. Beside it stands the score on held-out examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectral_window.data.tasks import IGNORED, Batch, Task, generator, make
from spectral_window.errors import DivergedError, NotFiniteError
from spectral_window.files import write_json
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHForCausalLM, count_parameters, match_parameters
from spectral_window.lab import variants  # noqa: F401 - registers its mixer and the baselines
from spectral_window.lab.jobs import Job
from spectral_window.training.machine import (
    choose_device,
    environment,
    keep_memory,
    matmul_precision,
)
from spectral_window.training.optimizer import parameter_groups

PRECISION = "auto"  # of float32 products
TEST_TOKENS = 32_768  # of a test batch: enough to fill a processor at any length


@dataclass(frozen=True)
class Exam:
    """Where a trained probe is scored: a task, a length, and how many examples."""

    task: str
    length: int
    rows: int = 2048
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A model, a task, how it learns, and where it is tested.

    model:        fields of SWHConfig; vocab_size comes from the task.
    match:        give a variant (attention, one branch, another kernel or fusion) as many
                  parameters as the paper's layer of this shape has.
    lengths:      one is drawn for each step of the second half of training, the first of them
                  always in the first half; longer sequences come in fewer rows.
    lr:           peak of the one-cycle schedule, which rises for a fifth of the steps (PyTorch's
                  OneCycleLR, as in the paper).
    decay_all:    weight decay on every parameter, as in the paper's code.
    """

    task: str
    model: dict[str, Any]
    tests: tuple[Exam, ...]
    options: dict[str, Any] = field(default_factory=dict)
    match: bool = True
    lengths: tuple[int, ...] = (32,)
    rows: int = 64
    steps: int = 3000
    lr: float = 1e-3
    weight_decay: float = 0.01
    decay_all: bool = False
    clip: float = 1.0
    seed: int = 0

    @property
    def key(self) -> str:
        """Names this probe: the same settings, the same key."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, work: Path) -> dict[str, Any] | None:
        """Its row in the folder `work`, or None where it has not been run there."""
        path = work / f"{self.key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def config(self) -> SWHConfig:
        """The model's config, at the size that `match` asks for."""
        fields = {
            "initializer_range": None,  # PyTorch's own: what the paper's synthetic models have
            "mlp": "gelu",
            "vocab_size": make(self.task, **self.options).vocab_size,
        } | self.model
        config = SWHConfig(**fields)
        if not self.match:
            return config
        return match_parameters(config, count_parameters(config.papers_layer()))


def run(probe: Probe, *, device: str = "cpu") -> dict[str, Any]:
    """Train and score `probe`; returns a row of plain values.

    "tests" has, for each test, `right` of `asked` questions, `rows_right` of `rows` whole examples,
    and the same for the questions whose answer lies beyond the window ("far"). Raises
    DivergedError where the loss is not finite.
    """
    begin = time.perf_counter()
    task = make(probe.task, **probe.options)
    torch.manual_seed(probe.seed)
    config = probe.config()
    model = SWHForCausalLM(config)
    model.to(torch.device(device))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        _groups(model, probe), lr=probe.lr, weight_decay=probe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=probe.lr, total_steps=probe.steps, pct_start=0.2
    )
    losses: list[float] = []
    batch = None
    for batch in _batches(probe, task):
        with _short_rows(device):
            loss = _loss(model, batch, device)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise DivergedError(f"the loss is not finite (probe {probe.key}, step {len(losses)})")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), probe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trained = time.perf_counter() - begin
    assert batch is not None
    right, asked = _score(model, batch, device)[:2]
    return {
        "key": probe.key,
        "probe": dataclasses.asdict(probe),
        "parameters": model.count_parameters(),
        "loss": float(np.mean(losses[-max(1, probe.steps // 50) :])),
        "batch_right": right,
        "batch_asked": asked,
        "tests": [_test(model, probe, test, device) for test in probe.tests],
        "train_seconds": round(trained, 1),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _groups(model: SWHForCausalLM, probe: Probe) -> Any:
    if probe.decay_all:
        return model.parameters()
    return parameter_groups(model, probe.weight_decay)


def _short_rows(device: str) -> AbstractContextManager[None]:
    """Attention by plain products: on a CPU at "medium" matmul precision PyTorch's fused kernel
    takes 3 to 4 times as long for rows of 32 to 64 tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


def _batches(probe: Probe, task: Task) -> Iterator[Batch]:
    rng = generator(probe.seed, "train")
    for step in range(probe.steps):
        length = probe.lengths[0]
        if step >= probe.steps // 2:
            length = probe.lengths[int(rng.integers(len(probe.lengths)))]
        rows = max(8, probe.rows * probe.lengths[0] // length)
        yield task.batch(rng, rows, length)


def _answers(model: SWHForCausalLM, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    """Logits [N, vocabulary] and labels [N] of the N questions alone."""
    inputs = torch.from_numpy(batch.inputs).to(device)
    labels = torch.from_numpy(batch.labels).to(device)
    asked = labels != IGNORED
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden[asked]), labels[asked]


def _loss(model: SWHForCausalLM, batch: Batch, device: str) -> Tensor:
    """Mean cross entropy of the questions; NaN where the model itself refuses its numbers."""
    try:
        logits, labels = _answers(model, batch, device)
    except NotFiniteError:
        return torch.tensor(torch.nan)
    return F.cross_entropy(logits.float(), labels)


@torch.no_grad()
def _score(
    model: SWHForCausalLM, batch: Batch, device: str, beyond: int = 0
) -> tuple[int, int, int, int, int]:
    """Questions right and asked, whole rows right, and right and asked where the answer lies
    `beyond` tokens back or farther."""
    logits, labels = _answers(model, batch, device)
    right = (logits.argmax(-1) == labels).cpu().numpy()
    where = batch.labels != IGNORED
    hit = np.zeros(batch.labels.shape, dtype=bool)
    hit[where] = right
    far = where & (batch.distance >= beyond)
    whole = int((hit == where).all(1).sum())
    return int(right.sum()), len(right), whole, int(hit[far].sum()), int(far.sum())


def _test(model: SWHForCausalLM, probe: Probe, test: Exam, device: str) -> dict[str, Any]:
    task = make(test.task, **(test.options or probe.options))
    # the seed of a test is its own: every model answers the same questions
    rng = generator(test.length, "test")
    totals = np.zeros(5, dtype=np.int64)
    left, most = test.rows, max(1, TEST_TOKENS // test.length)
    while left:
        rows = min(left, most)
        batch = task.batch(rng, rows, test.length)
        totals += _score(model, batch, device, beyond=2 * model.config.window)
        left -= rows
    right, asked, whole, far_right, far_asked = totals.tolist()
    return {
        "task": test.task,
        "length": test.length,
        "rows": test.rows,
        "right": right,
        "asked": asked,
        "rows_right": whole,
        "far_right": far_right,
        "far_asked": far_asked,
    }


def job(named: Sequence[tuple[str, Probe]], work: Path) -> Job:
    """These probes, each with its name, in one process. A probe's settings are written to
    work/KEY.probe.json; its row will be work/KEY.json."""
    work.mkdir(parents=True, exist_ok=True)
    settings = [work / f"{probe.key}.probe.json" for _, probe in named]
    for path, (_, probe) in zip(settings, named, strict=True):
        write_json(path, dataclasses.asdict(probe))
    name = "; ".join(name for name, _ in named)
    return Job(name, tuple(map(str, settings)), _row_of(settings[-1]), module=__name__)


def main(settings: Sequence[str]) -> int:
    """Run the probes that the files KEY.probe.json describe, and write KEY.json beside each; 1
    where one of them failed, after the others have run."""
    device = choose_device("auto", ("cpu", "cuda")).type
    keep_memory()
    failed = 0
    for path in map(Path, settings):
        values = json.loads(path.read_text(encoding="utf-8"))
        values["tests"] = tuple(Exam(**test) for test in values["tests"])
        values["lengths"] = tuple(values["lengths"])
        try:
            with matmul_precision(PRECISION, device):
                row = run(Probe(**values), device=device)
                row |= {"environment": environment(device, asked=PRECISION)}
        except DivergedError as error:
            print(error, file=sys.stderr)
            failed = 1
        else:
            write_json(_row_of(path), row)
    return failed


def _row_of(settings: Path) -> Path:
    return settings.with_name(settings.name.replace(".probe.json", ".json"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
