"""A step that is replayed from a recording computes what it computes as usual.

CUDA graphs need a GPU (`bench --device cuda` compares them there); here a recorder for a CPU stands
for them. Like a graph it calls with the tensors of the recording alone.
"""

from __future__ import annotations

import pytest
import torch

from spectral_window.training.graphs import WARM, GraphedStep


class Recorder:
    """Records calls on a CPU: replaying calls again, and writes into the recorded result."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.recorded, self.replayed = fails, 0, 0

    def warm(self, call):
        return call()

    def record(self, call):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.recorded += 1
        result = torch.full((), torch.nan)

        def replay():
            self.replayed += 1
            result.copy_(call())

        return replay, result


def steps(recorder, batches):
    """Losses and gradients of a linear model over `batches`, each a step."""
    notes: list[str] = []
    weight = torch.ones(3, requires_grad=True)

    def compute(batch, tokens):
        loss = (batch["x"] @ weight).sum() / tokens + batch.get("y", torch.zeros(1)).sum()
        loss.backward()
        return loss.detach()

    step = GraphedStep(compute, torch.device("cpu"), notes.append, recorder)
    seen = []
    for index, batch in enumerate(batches):
        loss = float(step(batch, torch.tensor(index + 1)))
        seen.append((loss, weight.grad.clone()))
        weight.grad.zero_()
    return seen, notes


def draw(count, rows=2, **more):
    return [{"x": torch.randn(rows, 3), **more} for _ in range(count)]


def test_replayed_steps_compute_the_loss_and_the_gradient_of_their_own_batch():
    batches = draw(WARM + 4)
    recorder = Recorder()
    seen, notes = steps(recorder, batches)
    assert recorder.recorded == 1
    assert recorder.replayed == 4
    assert not notes
    for index, (batch, (loss, grad)) in enumerate(zip(batches, seen, strict=True)):
        assert loss == pytest.approx(float(batch["x"].sum() / (index + 1)), rel=1e-5)
        assert torch.allclose(grad, batch["x"].sum(0) / (index + 1))


def test_batches_of_other_shapes_and_tensors_have_recordings_of_their_own():
    kinds = [draw(1), draw(1, rows=5), draw(1, y=torch.ones(2))]
    batches = [batch for _ in range(WARM + 2) for kind in kinds for batch in kind]
    recorder = Recorder()
    seen, _ = steps(recorder, batches)
    assert recorder.recorded == len(kinds)
    assert recorder.replayed == 2 * len(kinds)
    for batch, (_, grad) in zip(batches[-3:], seen[-3:], strict=True):
        scale = [i for i, b in enumerate(batches) if b is batch][-1] + 1
        assert torch.allclose(grad, batch["x"].sum(0) / scale)


def test_a_step_that_cannot_be_recorded_runs_as_usual_and_says_so_once():
    batches = draw(WARM + 3)
    seen, notes = steps(Recorder(fails=True), batches)
    assert notes == ["without CUDA graphs: operation not permitted when stream is capturing"]
    assert torch.allclose(seen[-1][1], batches[-1]["x"].sum(0) / len(batches))
