"""A call that is replayed from a recording computes what it computes as usual.

CUDA graphs need a GPU (`bench --device cuda` compares them there); here a recorder for a CPU stands
for them. Like a graph it calls with the tensors of the recording alone.
"""

from __future__ import annotations

import pytest
import torch

from spectral_window.ops.cuda_graphs import WARM, Replayed
from tests.ops.recorder import Recorder


def steps(recorder, batches):
    """Losses and gradients of a linear model over `batches`, each a step."""
    notes: list[str] = []
    weight = torch.ones(3, requires_grad=True)

    def compute(inputs):
        loss = (inputs["x"] @ weight).sum() / inputs["tokens"]
        loss = loss + inputs.get("y", torch.zeros(1)).sum()
        loss.backward()
        return loss.detach()

    step = Replayed(compute, torch.device("cpu"), note=notes.append, recorder=recorder)
    seen = []
    for index, batch in enumerate(batches):
        loss = float(step(batch | {"tokens": torch.tensor(index + 1)}))
        seen.append((loss, weight.grad.clone()))
        weight.grad.zero_()
    return seen, notes


def draw(count, rows=2, **more):
    return [{"x": torch.randn(rows, 3), **more} for _ in range(count)]


def test_replayed_steps_compute_the_loss_and_the_gradient_of_their_own_batch():
    batches = draw(WARM + 4)
    recorder = Recorder(adds=True)
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
    recorder = Recorder(adds=True)
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
